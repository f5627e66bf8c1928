/* ops/slc_attn.c: attention over the blocks of keys that each query selected. The work is cpu/attn's; this
 * file says which keys a query sees: those of the blocks in its row of idx, up to its own position. */
#include "cpu/attn.h"
#include "cuda/attn.h"

static const rg_attr attrs[] = {
    RGI_ATTN_ATTRS,
    {"block", RG_ATTR_INT, true, 1, 0x7fffffff, 0, NULL, "keys in a block"},
};

#define SELECTION                                                                                            \
  {                                                                                                          \
    "idx", "T,KH,N", RG_PORT_ROWS, RG_D(RG_I32), 0, 1,                                                       \
        "selected blocks, ascending, padded with -1; entries negative, past the keys or not larger than "    \
        "all before "                                                                                        \
        "them are ignored"                                                                                   \
  }

static const rg_port in[] = {
    RGI_ATTN_IN_QKV(RG_PORT_KROWS, "keys, S = T rows unless cu_seqlens_k is bound"),
    SELECTION,
    RGI_ATTN_IN_SEQ,
};
static const rg_port out[] = {RGI_ATTN_OUT};

static const rg_port in_bwd[] = {
    RGI_ATTN_IN_QKV(RG_PORT_KROWS, "keys, S = T rows unless cu_seqlens_k is bound"),
    SELECTION,
    RGI_ATTN_IN_SEQ,
    RGI_ATTN_IN_BWD(RG_PORT_KROWS),
};
static const rg_port out_bwd[] = {RGI_ATTN_OUT_BWD(RG_PORT_KROWS)};

static rgi_attn problem(const rg_call *c) {
  rgi_attn a = {.mode = RGI_ATTN_SLC, .block = c->attr[RGI_ATTN_OWN].i};
  rgi_attn_init(&a, c);
  return a;
}

static rgk_attn gpu_problem(const rg_call *c) {
  return (rgk_attn){.mode = RGK_SLC,
                    .block =
                        c->attr[RGI_ATTN_OWN].i > INT32_MAX ? INT32_MAX : (int32_t)c->attr[RGI_ATTN_OWN].i};
}

static rg_status check(const rg_call *c, rg_error *e) {
  RGI_TRY(rgi_attn_check(c, true, e));
  return rgi_attn_check_rows(c, true, e);
}

/* Every query is taken to have selected its own block and N - 1 full ones, or all there are. On average it
 * has passed half of its own. */
static double pairs(const rgi_attn *a) {
  const double most = (double)a->N * (double)a->block - ((double)a->block - 1) / 2;
  return a->N == 0 ? 0 : rgi_attn_pairs(a, a->S, most < 1e18 ? (int64_t)most : -1);
}

static void cost(const rg_call *c, rg_cost *r) {
  rgi_attn a = problem(c);
  rgi_attn_cost(c, &a, pairs(&a), false, r);
}
static size_t workspace(const rg_call *c) {
  rgk_attn on_gpu = gpu_problem(c);
  if (c->gpu) return rgi_cuda_attn_workspace(c, &on_gpu, false);
  rgi_attn a = problem(c);
  return rgi_attn_workspace(c, &a);
}
static rg_status run(const rg_call *c) {
  rgi_attn a = problem(c);
  return rgi_attn_run(c, &a);
}
static rg_status steps(const rg_call *c, rg_cuda *x) {
  rgk_attn on_gpu = gpu_problem(c);
  return rgi_cuda_attn_steps(c, &on_gpu, false, x);
}
static const char *path(const rg_call *c) {
  rgk_attn on_gpu = gpu_problem(c);
  return rgi_cuda_attn_path(c, &on_gpu, false);
}

static void cost_bwd(const rg_call *c, rg_cost *r) {
  rgi_attn a = problem(c);
  rgi_attn_cost(c, &a, pairs(&a), true, r);
}
static rg_status check_bwd(const rg_call *c, rg_error *e) {
  RGI_TRY(rgi_attn_check_bwd(c, true, e));
  return check(c, e);
}
static rgi_delta delta(const rg_call *c) {
  rgk_attn on_gpu = gpu_problem(c);
  return c->gpu ? rgi_cuda_attn_delta(c, &on_gpu) : RGI_DELTA_CHAIN;
}
static size_t workspace_bwd(const rg_call *c) {
  rgk_attn on_gpu = gpu_problem(c);
  if (c->gpu) return rgi_cuda_attn_workspace(c, &on_gpu, true);
  rgi_attn a = problem(c);
  return rgi_attn_bwd_workspace(c, &a);
}
static rg_status run_bwd(const rg_call *c) {
  rgi_attn a = problem(c);
  return rgi_attn_bwd_run(c, &a);
}
static rg_status steps_bwd(const rg_call *c, rg_cuda *x) {
  rgk_attn on_gpu = gpu_problem(c);
  return rgi_cuda_attn_steps(c, &on_gpu, true, x);
}
static const char *path_bwd(const rg_call *c) {
  rgk_attn on_gpu = gpu_problem(c);
  return rgi_cuda_attn_path(c, &on_gpu, true);
}

const rg_op rgi_op_slc_attn = {
    .abi = RG_OP_ABI,
    .name = "slc_attn",
    .doc = "causal attention over selected blocks of keys",
    .flags = RG_OP_RECOMPUTABLE,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = run,
    .cuda_steps = steps,
    .cuda_path = path,
    .backward = "slc_attn.bwd",
};

const rg_op rgi_op_slc_attn_bwd = {
    .abi = RG_OP_ABI,
    .name = "slc_attn.bwd",
    .doc = "gradient of slc_attn",
    .flags = RG_OP_INTERNAL,
    .in = in_bwd,
    .nin = RGI_COUNT(in_bwd),
    .out = out_bwd,
    .nout = RGI_COUNT(out_bwd),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .check = check_bwd,
    .cost = cost_bwd,
    .workspace = workspace_bwd,
    .run_cpu = run_bwd,
    .cuda_steps = steps_bwd,
    .cuda_path = path_bwd,
    .rules = &(const rgi_rules){.fusing = &(const rgi_fusing){.delta = delta}},
};
