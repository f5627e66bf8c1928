/* ops/combine.c: the gated sum of branches, and its gradients.
 *
 *   out[t, h, :] = Σ_n a_n · o_n[t, h, :]      a_n = act(gate[t, h, n]), in list order
 *
 * With D_n = dout · o_n:   d o_n = a_n · dout
 *   sigmoid   d gate_n = D_n · a_n · (1 - a_n)         1 - a_n formed as sigmoid(-gate): exact
 *                                                      where a_n is near 1
 *   softmax   d gate_n = a_n · (D_n - Σ_m a_m D_m)
 *   none      d gate_n = D_n
 *
 * The fuse pass takes the gradient apart: a node per branch, which writes d o_n, D_n and the sum of
 * d o_n · o_n that attention's backward begins with, each when it is needed; one more makes the
 * gates' gradient of the D_n.
 */
#include "../graph/ir.h"
#include "attn.h"
#include "cpu/attn.h"
#include "cpu/blend.h"
#include "cuda/blend.h"

enum { IN_O, IN_GATE, IN_CU };
enum { BW_O, BW_GATE, BW_CU, BW_GRAD, BW_ACC_O, BW_ACC_GATE };
enum { GATES_PRODUCT, GATES_ACC = BW_CU + 1 };
enum { OUT_O, OUT_GATE };
enum { BRANCH_O, BRANCH_PRODUCT, BRANCH_DELTA };
enum { A_ACT, A_BRANCH, A_ORDER };
enum { ACT_SIGMOID, ACT_SOFTMAX, ACT_NONE };

static const char *const acts[] = {"sigmoid", "softmax", "none", NULL};
static const rg_attr attrs[] = {
    {"act", RG_ATTR_ENUM, false, 0, 0, ACT_SIGMOID, acts,
     "what makes weights of gates; softmax is over the branches"},
};

#define O_PORT                                                     \
  {                                                                \
    "o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST, RG_D_FLOAT, 'F', 1, \
        "branches, as many as gate has columns"                    \
  }
#define GATE_PORT \
  { "gate", "T,H,N", RG_PORT_ROWS, RG_D_FLOAT, 'G', 1, "gates; column n goes with branch n" }
#define CU_PORT                                                                  \
  {                                                                              \
    "cu_seqlens", "B1", RG_PORT_SEQLENS | RG_PORT_OPTIONAL, RG_D(RG_I32), 0, -1, \
        "starts of the sequences"                                                \
  }

static const rg_port in_ports[] = {[IN_O] = O_PORT, [IN_GATE] = GATE_PORT, [IN_CU] = CU_PORT};
static const rg_port out_ports[] = {
    {"o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "their weighted sum"}};
static const rg_port bwd_in[] = {
    [BW_O] = O_PORT,
    [BW_GATE] = GATE_PORT,
    [BW_CU] = CU_PORT,
    [BW_GRAD] = {"grad.o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "gradient of the sum"},
    [BW_ACC_O] = {"acc.o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST | RG_PORT_OPTIONAL, RG_D(RG_F32), 0,
                  1, "gradients of the branches so far"},
    [BW_ACC_GATE] = {"acc.gate", "T,H,N", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D(RG_F32), 0, 1,
                     "gradient of the gates so far"},
};
static const rg_port bwd_out[] = {
    [OUT_O] = {"d.o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST | RG_PORT_OPTIONAL | RG_PORT_GRAD,
               RG_D_FLOAT, 'F', 1, "gradients of the branches"},
    [OUT_GATE] = {"d.gate", "T,H,N", RG_PORT_ROWS | RG_PORT_OPTIONAL | RG_PORT_GRAD, RG_D_FLOAT,
                  'G', 1, "gradient of the gates"},
};

/* One branch of the gradient, and the gates' part. */
#define ROW_PORT(name, flag, doc) \
  { name, "T,H", RG_PORT_ROWS | (flag), RG_D(RG_F32), 0, 1, doc }
static const char *const orders[] = {"none", "chain", "lanes", NULL}; /* rgi_delta */
static const rg_attr branch_attrs[] = {
    {"act", RG_ATTR_ENUM, false, 0, 0, ACT_SIGMOID, acts, "as combine's"},
    {"branch", RG_ATTR_INT, true, 0, 65535, 0, NULL, "the gates' column"},
    {"order", RG_ATTR_ENUM, false, 0, 0, RGI_DELTA_CHAIN, orders,
     "in which delta is summed on a GPU"},
};
static const rg_port branch_in[] = {
    [BW_O] = {"o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "the branch"},
    [BW_GATE] = GATE_PORT,
    [BW_CU] = CU_PORT,
    [BW_GRAD] = {"grad.o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "gradient of the sum"},
    [BW_ACC_O] = {"acc.o", "T,H,E", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D(RG_F32), 0, 1,
                  "gradient of the branch so far"},
};
static const rg_port branch_out[] = {
    [BRANCH_O] = {"d.o", "T,H,E", RG_PORT_ROWS | RG_PORT_OPTIONAL | RG_PORT_GRAD, RG_D_FLOAT, 'F',
                  1, "gradient of the branch"},
    [BRANCH_PRODUCT] =
        ROW_PORT("product", RG_PORT_OPTIONAL, "grad.o times o, summed over the last axis"),
    [BRANCH_DELTA] =
        ROW_PORT("delta", RG_PORT_OPTIONAL, "d.o as stored times o, summed over the last axis"),
};
static const rg_port gates_in[] = {
    [GATES_PRODUCT] =
        ROW_PORT("product", RG_PORT_LIST, "of each branch with the gradient of the sum"),
    [BW_GATE] = GATE_PORT,
    [BW_CU] = CU_PORT,
    [GATES_ACC] = {"acc.gate", "T,H,N", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D(RG_F32), 0, 1,
                   "gradient of the gates so far"},
};
static const rg_port gates_out[] = {
    {"d.gate", "T,H,N", RG_PORT_ROWS | RG_PORT_OPTIONAL | RG_PORT_GRAD, RG_D_FLOAT, 'G', 1,
     "gradient of the gates"},
};

static rg_status check(const rg_call *c, rg_error *e) {
  int64_t columns = rg_in(c, IN_GATE)->dim[2];
  if (columns != RG_DIM_FREE && columns != rg_in_count(c, IN_O))
    return rg_op_fail(e, RG_E_SHAPE, c,
                      "gate has %lld columns for a list of %d branches; one each is needed",
                      (long long)columns, rg_in_count(c, IN_O));
  return rgi_cuda_blend_check(
      c, IN_O, "combine them in groups and add those (gates of softmax: make them before)", e);
}

static rg_status check_branch(const rg_call *c, rg_error *e) {
  const rg_arg *d = rg_out(c, BRANCH_O);
  const int64_t columns = rg_in(c, IN_GATE)->dim[2];
  if (columns != RG_DIM_FREE && c->attr[A_BRANCH].i >= columns)
    return rg_op_fail(e, RG_E_VALUE, c, "branch %lld of %lld", (long long)c->attr[A_BRANCH].i,
                      (long long)columns);
  if (rg_out(c, BRANCH_DELTA) && (!d || rg_in(c, BW_ACC_O)))
    return rg_op_fail(e, RG_E_VALUE, c, "delta is of a gradient that is stored by itself");
  return RG_OK;
}

static void cost(const rg_call *c, rg_cost *out) {
  const rg_arg *o = rgi_in_at(c, IN_O, 0), *gate = rg_in(c, IN_GATE);
  out->flops = 2 * rgi_arg_elements(o) * rg_in_count(c, IN_O);
  out->exps = c->attr[0].i == ACT_NONE ? 0 : rgi_arg_elements(gate);
  out->bytes = rgi_call_bytes(c);
}
static void cost_backward(const rg_call *c, rg_cost *out) {
  cost(c, out);
  out->flops *= 2;
  if (c->attr[0].i == ACT_SIGMOID) out->exps *= 2;
}

static void cost_branch(const rg_call *c, rg_cost *out) {
  const rg_arg *gate = rg_in(c, IN_GATE);
  const int sums = (rg_out(c, BRANCH_PRODUCT) != NULL) + (rg_out(c, BRANCH_DELTA) != NULL);
  out->flops = rgi_arg_elements(rg_in(c, BW_O)) * (1 + 2 * sums);
  out->exps = c->attr[A_ACT].i == ACT_NONE ? 0 : rgi_arg_elements(gate);
  out->bytes = rgi_call_bytes(c);
}
static void cost_gates(const rg_call *c, rg_cost *out) {
  const rg_arg *gate = rg_in(c, IN_GATE);
  out->flops = 4 * rgi_arg_elements(gate);
  out->exps = c->attr[A_ACT].i == ACT_NONE ? 0 : 2 * rgi_arg_elements(gate);
  out->bytes = rgi_call_bytes(c);
}

static size_t workspace(const rg_call *c) {
  return c->gpu ? 0 : (size_t)c->threads * rgi_blend_bytes(rg_in_count(c, IN_O), 3);
}

/* Row (t, h) of the gates into x, their weights into a. */
static void weigh(const rg_call *c, int n, int64_t t, int64_t h, float *x, float *a) {
  const rg_arg *gate = rg_in(c, IN_GATE);
  rgi_load(x, gate->dtype, rgi_at(gate, t, h), n);
  if (c->attr[0].i == ACT_NONE) {
    memcpy(a, x, (size_t)n * sizeof *a);
  } else if (c->attr[0].i == ACT_SIGMOID) {
    for (int k = 0; k < n; k++) a[k] = 1.0f / (1.0f + expf(-x[k]));
  } else {
    float most = x[0], sum = 0;
    for (int k = 1; k < n; k++) most = x[k] > most ? x[k] : most;
    for (int k = 0; k < n; k++) sum += a[k] = expf(x[k] - most);
    for (int k = 0; k < n; k++) a[k] /= sum;
  }
}

static void run_tokens(void *arg, int64_t task, int thread) {
  const rg_call *c = arg;
  const rg_arg *out = rg_out(c, OUT_O);
  const int n = rg_in_count(c, IN_O);
  const int64_t live = rgi_live_rows(rg_in(c, IN_CU), out->dim[0]);
  float *x = (float *)(void *)((char *)c->workspace + (size_t)thread * rgi_blend_bytes(n, 3)),
        *a = x + n;
  for (int64_t t = task * RGI_BLEND_TOKENS; t < (task + 1) * RGI_BLEND_TOKENS && t < out->dim[0];
       t++) {
    if (t >= live) rgi_blend_dead(out, NULL, t);
    for (int64_t h = 0; t < live && h < out->dim[1]; h++) {
      weigh(c, n, t, h, x, a);
      rgi_blend_row(c, IN_O, a, false, out, t, h);
    }
  }
}

static rg_status run_cpu(const rg_call *c) {
  c->parallel(c->pool, rgi_blend_tasks(rg_out(c, OUT_O)), run_tokens, (void *)c);
  return RG_OK;
}

/* D (products of dout with the branches) becomes the gates' gradient, in place. */
static void gate_gradient(int64_t act, int n, const float *x, const float *a, float *D) {
  float mean = 0;
  for (int k = 0; act == ACT_SOFTMAX && k < n; k++) mean += a[k] * D[k];
  for (int k = 0; k < n; k++) {
    if (act == ACT_SIGMOID) D[k] *= a[k] * (1.0f / (1.0f + expf(x[k])));
    if (act == ACT_SOFTMAX) D[k] = a[k] * (D[k] - mean);
  }
}

static void run_tokens_backward(void *arg, int64_t task, int thread) {
  const rg_call *c = arg;
  const rg_arg *g = rg_in(c, BW_GRAD), *d_gate = rg_out(c, OUT_GATE),
               *acc_gate = rg_in(c, BW_ACC_GATE);
  const int n = rg_in_count(c, BW_O);
  const int64_t live = rgi_live_rows(rg_in(c, BW_CU), g->dim[0]);
  float *x = (float *)(void *)((char *)c->workspace + (size_t)thread * rgi_blend_bytes(n, 3)),
        *a = x + n, *D = a + n;
  for (int64_t t = task * RGI_BLEND_TOKENS; t < (task + 1) * RGI_BLEND_TOKENS && t < g->dim[0];
       t++) {
    if (t >= live) {
      for (int k = 0; k < n; k++)
        rgi_blend_dead(rgi_out_at(c, OUT_O, k), rgi_in_at(c, BW_ACC_O, k), t);
      rgi_blend_dead(d_gate, acc_gate, t);
      continue;
    }
    for (int64_t h = 0; h < g->dim[1]; h++) {
      weigh(c, n, t, h, x, a);
      rgi_blend_row_backward(c, BW_O, g, a, OUT_O, BW_ACC_O, D, t, h);
      if (!d_gate) continue;
      gate_gradient(c->attr[0].i, n, x, a, D);
      rgi_put_grad(c->isa, acc_gate != NULL, rgi_at(d_gate, t, h), d_gate->dtype, D, n);
    }
  }
}

/* ---- the gradient in parts ---- */

enum { ROWS = 8 }; /* of one token, whose deltas are summed side by side */

static size_t branch_bytes(const rg_call *c) {
  const size_t rows = rg_out(c, BRANCH_DELTA) ? 2 * ROWS * (size_t)rg_in(c, BW_O)->dim[2] : 0;
  return rgi_blend_bytes((int)rg_in(c, IN_GATE)->dim[2], 2) + RGI_ROUND256(rows * sizeof(float));
}
static size_t workspace_branch(const rg_call *c) {
  return c->gpu ? 0 : (size_t)c->threads * branch_bytes(c);
}
static size_t workspace_gates(const rg_call *c) {
  return c->gpu ? 0 : (size_t)c->threads * rgi_blend_bytes(rg_in_count(c, GATES_PRODUCT), 3);
}

/* Heads [h, h + n) of token t, by attention's own function. rows: 2 * ROWS rows of workspace. */
static void put_deltas(const rg_call *c, int64_t t, int64_t h, int n, float *rows) {
  const rg_arg *o = rg_in(c, BW_O), *d = rg_out(c, BRANCH_O), *delta = rg_out(c, BRANCH_DELTA);
  const int64_t width = o->dim[2];
  float *other = rows + ROWS * width, sum[ROWS];
  for (int i = 0; i < n; i++) {
    rgi_load_by(c->isa, rows + i * width, o->dtype, rgi_at(o, t, h + i), width);
    rgi_load_by(c->isa, other + i * width, d->dtype, rgi_at(d, t, h + i), width);
  }
  rgi_attn_level(c->isa)->dots(n, width, rows, other, width, sum);
  for (int i = 0; i < n; i++) *(float *)rgi_at(delta, t, h + i) = sum[i];
}

static void run_tokens_branch(void *arg, int64_t task, int thread) {
  const rg_call *c = arg;
  const rg_arg *g = rg_in(c, BW_GRAD), *product = rg_out(c, BRANCH_PRODUCT),
               *delta = rg_out(c, BRANCH_DELTA);
  const int n = (int)rg_in(c, IN_GATE)->dim[2];
  const int64_t live = rgi_live_rows(rg_in(c, BW_CU), g->dim[0]), H = g->dim[1];
  char *mine = (char *)c->workspace + (size_t)thread * branch_bytes(c);
  float *x = (float *)(void *)mine, *a = x + n,
        *rows = (float *)(void *)(mine + rgi_blend_bytes(n, 2));
  for (int64_t t = task * RGI_BLEND_TOKENS; t < (task + 1) * RGI_BLEND_TOKENS && t < g->dim[0];
       t++) {
    if (t >= live) {
      rgi_blend_dead(rg_out(c, BRANCH_O), rg_in(c, BW_ACC_O), t);
      rgi_blend_dead(product, NULL, t);
      rgi_blend_dead(delta, NULL, t);
      continue;
    }
    for (int64_t h = 0; h < H; h++) {
      float D;
      weigh(c, n, t, h, x, a);
      rgi_blend_row_backward(c, BW_O, g, a + c->attr[A_BRANCH].i, BRANCH_O, BW_ACC_O, &D, t, h);
      if (product) *(float *)rgi_at(product, t, h) = D;
    }
    for (int64_t h = 0; delta && h < H; h += ROWS)
      put_deltas(c, t, h, H - h < ROWS ? (int)(H - h) : ROWS, rows);
  }
}

static void run_tokens_gates(void *arg, int64_t task, int thread) {
  const rg_call *c = arg;
  const rg_arg *d = rg_out(c, 0), *acc = rg_in(c, GATES_ACC);
  const int n = rg_in_count(c, GATES_PRODUCT);
  const int64_t live = rgi_live_rows(rg_in(c, BW_CU), d->dim[0]);
  float *x = (float *)(void *)((char *)c->workspace + (size_t)thread * rgi_blend_bytes(n, 3)),
        *a = x + n, *D = a + n;
  for (int64_t t = task * RGI_BLEND_TOKENS; t < (task + 1) * RGI_BLEND_TOKENS && t < d->dim[0];
       t++) {
    if (t >= live) rgi_blend_dead(d, acc, t);
    for (int64_t h = 0; t < live && h < d->dim[1]; h++) {
      weigh(c, n, t, h, x, a);
      for (int k = 0; k < n; k++)
        D[k] = *(const float *)rgi_at(rgi_in_at(c, GATES_PRODUCT, k), t, h);
      gate_gradient(c->attr[A_ACT].i, n, x, a, D);
      rgi_put_grad(c->isa, acc != NULL, rgi_at(d, t, h), d->dtype, D, n);
    }
  }
}

static rg_status run_cpu_branch(const rg_call *c) {
  c->parallel(c->pool, rgi_blend_tasks(rg_in(c, BW_GRAD)), run_tokens_branch, (void *)c);
  return RG_OK;
}
static rg_status run_cpu_gates(const rg_call *c) {
  if (rg_out(c, 0))
    c->parallel(c->pool, rgi_blend_tasks(rg_out(c, 0)), run_tokens_gates, (void *)c);
  return RG_OK;
}

static rg_status run_cpu_backward(const rg_call *c) {
  c->parallel(c->pool, rgi_blend_tasks(rg_in(c, BW_GRAD)), run_tokens_backward, (void *)c);
  return RG_OK;
}

/* ---- CUDA ---- */

static rgi_blend blend(const rg_call *c) {
  return (rgi_blend){.o = IN_O,
                     .lse = RGI_NO_PORT,
                     .d_o = RGI_NO_PORT,
                     .acc_o = RGI_NO_PORT,
                     .d_lse = RGI_NO_PORT,
                     .acc_lse = RGI_NO_PORT,
                     .cu = rg_in(c, IN_CU),
                     .row = rg_out(c, OUT_O),
                     .gate = rg_in(c, IN_GATE),
                     .act = (int)c->attr[0].i};
}
static rg_status cuda(const rg_call *c, rg_cuda *x) {
  rgi_blend b = blend(c);
  return rgi_cuda_blend(c, &b, x);
}
static const char *cuda_path(const rg_call *c) {
  rgi_blend b = blend(c);
  return rgi_cuda_blend_path(c, &b);
}

static rgi_blend blend_backward(const rg_call *c) {
  return (rgi_blend){.backward = true,
                     .o = BW_O,
                     .lse = RGI_NO_PORT,
                     .d_o = OUT_O,
                     .acc_o = BW_ACC_O,
                     .d_lse = RGI_NO_PORT,
                     .acc_lse = RGI_NO_PORT,
                     .cu = rg_in(c, BW_CU),
                     .row = rg_in(c, BW_GRAD),
                     .gate = rg_in(c, BW_GATE),
                     .d_gate = rg_out(c, OUT_GATE),
                     .acc_gate = rg_in(c, BW_ACC_GATE),
                     .act = (int)c->attr[0].i};
}
static rg_status cuda_backward(const rg_call *c, rg_cuda *x) {
  rgi_blend b = blend_backward(c);
  return rgi_cuda_blend(c, &b, x);
}
static const char *cuda_path_backward(const rg_call *c) {
  rgi_blend b = blend_backward(c);
  return rgi_cuda_blend_path(c, &b);
}

static rgi_blend blend_branch(const rg_call *c) {
  return (rgi_blend){.cu = rg_in(c, BW_CU),
                     .row = rg_in(c, BW_GRAD),
                     .gate = rg_in(c, BW_GATE),
                     .act = (int)c->attr[A_ACT].i,
                     .one = {.o = rg_in(c, BW_O),
                             .d = rg_out(c, BRANCH_O),
                             .product = rg_out(c, BRANCH_PRODUCT),
                             .delta = rg_out(c, BRANCH_DELTA),
                             .add = rg_in(c, BW_ACC_O) != NULL,
                             .column = (int)c->attr[A_BRANCH].i,
                             .chain = c->attr[A_ORDER].i == RGI_DELTA_CHAIN}};
}
static rg_status cuda_branch(const rg_call *c, rg_cuda *x) {
  rgi_blend b = blend_branch(c);
  return rgi_cuda_blend_branch(c, &b, x);
}
static const char *cuda_path_branch(const rg_call *c) {
  rgi_blend b = blend_branch(c);
  return rgi_cuda_blend_branch_path(&b);
}
static rg_status cuda_gates(const rg_call *c, rg_cuda *x) {
  rgi_blend b = {.o = RGI_NO_PORT,
                 .lse = GATES_PRODUCT,
                 .d_o = RGI_NO_PORT,
                 .acc_o = RGI_NO_PORT,
                 .d_lse = RGI_NO_PORT,
                 .acc_lse = RGI_NO_PORT,
                 .cu = rg_in(c, BW_CU),
                 .gate = rg_in(c, BW_GATE),
                 .d_gate = rg_out(c, 0),
                 .acc_gate = rg_in(c, GATES_ACC),
                 .act = (int)c->attr[A_ACT].i};
  return rgi_cuda_blend_gates(c, &b, x);
}

static const rgi_rules bwd_rules = {.fusing = &(const rgi_fusing){.part = "combine.branch.bwd",
                                                                  .list = "o",
                                                                  .rest = "combine.gates.bwd"}};

static bool joins(const rg_call *selected, const rg_call *window, const rg_call *c, bool split) {
  const rgi_blend b = blend(c);
  return rgi_cuda_blend_vectors(c, &b) &&
         rgi_joins_slc_swa(selected, window, rg_in_count(c, IN_O), split);
}

const rg_op rgi_op_combine = {
    .abi = RG_OP_ABI,
    .name = "combine",
    .doc = "gated sum of branches",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_ROWWISE,
    .in = in_ports,
    .nin = RGI_COUNT(in_ports),
    .out = out_ports,
    .nout = RGI_COUNT(out_ports),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = run_cpu,
    .cuda_steps = cuda,
    .cuda_path = cuda_path,
    .backward = "combine.bwd",
    .rules = &(const rgi_rules){.fusing = &(const rgi_fusing){.with = "paged_slc_attn",
                                                              .and_with = "paged_swa_attn",
                                                              .link = "o",
                                                              .joined = "paged_slc_swa",
                                                              .joins_both = joins}},
};

const rg_op rgi_op_combine_bwd = {
    .abi = RG_OP_ABI,
    .name = "combine.bwd",
    .doc = "gradients of combine",
    .flags = RG_OP_INTERNAL | RG_OP_RECOMPUTABLE,
    .in = bwd_in,
    .nin = RGI_COUNT(bwd_in),
    .out = bwd_out,
    .nout = RGI_COUNT(bwd_out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .check = check,
    .cost = cost_backward,
    .workspace = workspace,
    .run_cpu = run_cpu_backward,
    .cuda_steps = cuda_backward,
    .cuda_path = cuda_path_backward,
    .rules = &bwd_rules,
};

const rg_op rgi_op_combine_branch_bwd = {
    .abi = RG_OP_ABI,
    .name = "combine.branch.bwd",
    .doc = "gradient of one branch of combine, and what others would read it again for",
    .flags = RG_OP_INTERNAL | RG_OP_RECOMPUTABLE,
    .in = branch_in,
    .nin = RGI_COUNT(branch_in),
    .out = branch_out,
    .nout = RGI_COUNT(branch_out),
    .attrs = branch_attrs,
    .nattr = RGI_COUNT(branch_attrs),
    .check = check_branch,
    .cost = cost_branch,
    .workspace = workspace_branch,
    .run_cpu = run_cpu_branch,
    .cuda_steps = cuda_branch,
    .cuda_path = cuda_path_branch,
};

const rg_op rgi_op_combine_gates_bwd = {
    .abi = RG_OP_ABI,
    .name = "combine.gates.bwd",
    .doc = "gradient of combine's gates, of the branches' products",
    .flags = RG_OP_INTERNAL | RG_OP_RECOMPUTABLE,
    .in = gates_in,
    .nin = RGI_COUNT(gates_in),
    .out = gates_out,
    .nout = RGI_COUNT(gates_out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .cost = cost_gates,
    .workspace = workspace_gates,
    .run_cpu = run_cpu_gates,
    .cuda_steps = cuda_gates,
};
