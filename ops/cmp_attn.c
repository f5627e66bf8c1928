/* ops/cmp_attn.c: attention over compressed keys, each of which stands for `kernel` tokens.
 * The work is cpu_attn's; this file says which compressed keys a query sees: those whose
 * tokens all lie at or before its position. */
#include "cpu_attn.h"
#include "cuda_attn.h"

enum { KERNEL = RGI_ATTN_OWN, STRIDE };

static const rg_attr attrs[] = {
    RGI_ATTN_ATTRS,
    {"kernel", RG_ATTR_INT, true, 1, 65536, 0, NULL, "tokens that a compressed key stands for"},
    {"stride", RG_ATTR_INT, true, 1, 65536, 0, NULL,
     "tokens from one compressed key to the next; divides kernel"},
};

static const rg_port in[] = {
    RGI_ATTN_IN_QKV(0, "compressed keys, S = T/stride rows unless cu_seqlens_k is bound; b's from "
                       "cu_seqlens_k[b]/stride on"),
    RGI_ATTN_IN_SEQ,
};
static const rg_port out[] = {RGI_ATTN_OUT};

static const rg_port in_bwd[] = {
    RGI_ATTN_IN_QKV(0, "compressed keys, S = T/stride rows unless cu_seqlens_k is bound; b's from "
                       "cu_seqlens_k[b]/stride on"),
    RGI_ATTN_IN_SEQ,
    RGI_ATTN_IN_BWD(0),
};
static const rg_port out_bwd[] = {RGI_ATTN_OUT_BWD(0)};

static rgi_attn problem(const rg_call *c) {
  rgi_attn a = {.mode = RGI_ATTN_CMP, .kernel = c->attr[KERNEL].i, .stride = c->attr[STRIDE].i};
  rgi_attn_init(&a, c);
  return a;
}

static rgk_attn gpu_problem(const rg_call *c) {
  return (rgk_attn){
      .mode = RGK_CMP, .kernel = (int32_t)c->attr[KERNEL].i, .stride = (int32_t)c->attr[STRIDE].i};
}

static rg_status check(const rg_call *c, rg_error *e) {
  const int64_t kernel = c->attr[KERNEL].i, stride = c->attr[STRIDE].i;
  RGI_TRY(rgi_attn_check(c, false, e));
  if (kernel % stride != 0)
    return rg_op_fail(e, RG_E_VALUE, c, "stride %lld does not divide kernel %lld", (long long)stride,
                      (long long)kernel);
  const int64_t T = rg_in(c, 0)->dim[0], S = rg_in(c, 1)->dim[0];
  if (!rg_in(c, RGI_ATTN_CU_K) && T != RG_DIM_FREE && S != RG_DIM_FREE && S != T / stride)
    return rg_op_fail(e, RG_E_SHAPE, c, "k has %lld rows, expected %lld tokens / stride %lld = %lld",
                      (long long)S, (long long)T, (long long)stride, (long long)(T / stride));
  return RG_OK;
}

/* Each compressed key is seen by every position from its last token on. */
static double pairs(const rgi_attn *a) {
  const double keys = (double)(a->S * a->stride);
  const double first = a->offset && keys > (double)a->T ? keys - (double)a->T : 0, end = first + (double)a->T;
  /* counted key by key */
  double n = floor((end - (double)a->kernel) / (double)a->stride) + 1, before = 0;
  if (n > (double)a->S) n = (double)a->S;
  if (n <= 0) return 0;
  if (first >= (double)a->kernel) before = floor((first - (double)a->kernel) / (double)a->stride) + 1;
  if (before > n) before = n;
  /* keys seen by all T queries, then those seen from position j * stride + kernel - 1 on */
  const double sum_j = (n * (n - 1) - before * (before - 1)) / 2;
  return before * (double)a->T + (n - before) * (end - (double)a->kernel + 1) - sum_j * (double)a->stride;
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
  RGI_TRY(rgi_attn_check_bwd(c, false, e));
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

const rg_op rgi_op_cmp_attn = {
    .abi = RG_OP_ABI,
    .name = "cmp_attn",
    .doc = "attention over compressed keys: position i sees key j iff i >= j*stride + kernel - 1",
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
    .backward = "cmp_attn.bwd",
};

const rg_op rgi_op_cmp_attn_bwd = {
    .abi = RG_OP_ABI,
    .name = "cmp_attn.bwd",
    .doc = "gradient of cmp_attn",
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
