/* ops/combine.c: the gated sum of branches, and its gradients.
 *
 *   out[t, h, :] = Σ_n a_n · o_n[t, h, :]      a_n = act(gate[t, h, n]), in list order
 *
 * With D_n = dout · o_n:   d o_n = a_n · dout
 *   sigmoid   d gate_n = D_n · a_n · (1 - a_n)         1 - a_n formed as sigmoid(-gate): exact where a_n is
 * near 1 softmax   d gate_n = a_n · (D_n - Σ_m a_m D_m) none      d gate_n = D_n
 */
#include "cpu_blend.h"
#include "cuda_blend.h"

enum { IN_O, IN_GATE, IN_CU };
enum { BW_O, BW_GATE, BW_CU, BW_GRAD, BW_ACC_O, BW_ACC_GATE };
enum { OUT_O, OUT_GATE };
enum { ACT_SIGMOID, ACT_SOFTMAX, ACT_NONE };

static const char *const acts[] = {"sigmoid", "softmax", "none", NULL};
static const rg_attr attrs[] = {
    {"act", RG_ATTR_ENUM, false, 0, 0, ACT_SIGMOID, acts,
     "what makes weights of gates; softmax is over the branches"},
};

#define O_PORT                                                                                               \
  { "o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST, RG_D_FLOAT, 'F', 1, "branches, as many as gate has columns" }
#define GATE_PORT                                                                                            \
  { "gate", "T,H,N", RG_PORT_ROWS, RG_D_FLOAT, 'G', 1, "gates; column n goes with branch n" }
#define CU_PORT                                                                                              \
  { "cu_seqlens", "B1", RG_PORT_SEQLENS | RG_PORT_OPTIONAL, RG_D(RG_I32), 0, -1, "starts of the sequences" }

static const rg_port in_ports[] = {[IN_O] = O_PORT, [IN_GATE] = GATE_PORT, [IN_CU] = CU_PORT};
static const rg_port out_ports[] = {{"o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "their weighted sum"}};
static const rg_port bwd_in[] = {
    [BW_O] = O_PORT,
    [BW_GATE] = GATE_PORT,
    [BW_CU] = CU_PORT,
    [BW_GRAD] = {"grad.o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "gradient of the sum"},
    [BW_ACC_O] = {"acc.o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST | RG_PORT_OPTIONAL, RG_D(RG_F32), 0, 1,
                  "gradients of the branches so far"},
    [BW_ACC_GATE] = {"acc.gate", "T,H,N", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D(RG_F32), 0, 1,
                     "gradient of the gates so far"},
};
static const rg_port bwd_out[] = {
    [OUT_O] = {"d.o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST | RG_PORT_OPTIONAL | RG_PORT_GRAD, RG_D_FLOAT, 'F',
               1, "gradients of the branches"},
    [OUT_GATE] = {"d.gate", "T,H,N", RG_PORT_ROWS | RG_PORT_OPTIONAL | RG_PORT_GRAD, RG_D_FLOAT, 'G', 1,
                  "gradient of the gates"},
};

static rg_status check(const rg_call *c, rg_error *e) {
  int64_t columns = rg_in(c, IN_GATE)->dim[2];
  if (columns != RG_DIM_FREE && columns != rg_in_count(c, IN_O))
    return rg_op_fail(e, RG_E_SHAPE, c, "gate has %lld columns for a list of %d branches; one each is needed",
                      (long long)columns, rg_in_count(c, IN_O));
  return rgi_cuda_blend_check(c, IN_O,
                              "combine them in groups and add those (gates of softmax: make them before)", e);
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
  float *x = (float *)(void *)((char *)c->workspace + (size_t)thread * rgi_blend_bytes(n, 3)), *a = x + n;
  for (int64_t t = task * RGI_BLEND_TOKENS; t < (task + 1) * RGI_BLEND_TOKENS && t < out->dim[0]; t++) {
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
  const rg_arg *g = rg_in(c, BW_GRAD), *d_gate = rg_out(c, OUT_GATE), *acc_gate = rg_in(c, BW_ACC_GATE);
  const int n = rg_in_count(c, BW_O);
  const int64_t live = rgi_live_rows(rg_in(c, BW_CU), g->dim[0]);
  float *x = (float *)(void *)((char *)c->workspace + (size_t)thread * rgi_blend_bytes(n, 3)), *a = x + n,
        *D = a + n;
  for (int64_t t = task * RGI_BLEND_TOKENS; t < (task + 1) * RGI_BLEND_TOKENS && t < g->dim[0]; t++) {
    if (t >= live) {
      for (int k = 0; k < n; k++) rgi_blend_dead(rgi_out_at(c, OUT_O, k), rgi_in_at(c, BW_ACC_O, k), t);
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

const rg_op rgi_op_combine = {
    .abi = RG_OP_ABI,
    .name = "combine",
    .doc = "gated sum of branches",
    .flags = RG_OP_RECOMPUTABLE,
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
};
