/* ops/merge_lse.c: merges attention branches over disjoint keys, and its gradients.

     lse = log Σ_n exp(lse_n)      w_n = exp(lse_n - lse)      o = Σ_n w_n · o_n, in list order

   With D_n = do · o_n:   d o_n = w_n · do      d lse_n = w_n · (D_n - Σ_m w_m D_m + dlse)
   A branch of lse -inf saw no key: its weight is 0, and its o is not looked at in the forward.
   Where all are -inf, o is 0, lse -inf, and gradients are 0. The backward makes the weights anew
   from the lse_n, so nothing else need be kept.
 */
#include "cpu/blend.h"
#include "cuda/blend.h"

enum { IN_O, IN_LSE, IN_CU };
enum { BW_O, BW_LSE, BW_CU, BW_GRAD_O, BW_GRAD_LSE, BW_ACC_O, BW_ACC_LSE };
enum { OUT_O, OUT_LSE };

#define O_PORT \
  { "o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST, RG_D_FLOAT, 'F', 1, "outputs of the branches" }
#define LSE_PORT                                                   \
  {                                                                \
    "lse", "T,H", RG_PORT_ROWS | RG_PORT_LIST, RG_D(RG_F32), 0, 1, \
        "their log-sum-exps, in the same order"                    \
  }
#define CU_PORT                                                                  \
  {                                                                              \
    "cu_seqlens", "B1", RG_PORT_SEQLENS | RG_PORT_OPTIONAL, RG_D(RG_I32), 0, -1, \
        "starts of the sequences"                                                \
  }

static const rg_port in_ports[] = {[IN_O] = O_PORT, [IN_LSE] = LSE_PORT, [IN_CU] = CU_PORT};
static const rg_port out_ports[] = {
    [OUT_O] = {"o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1,
               "attention over the keys of all branches"},
    [OUT_LSE] = {"lse", "T,H", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D(RG_F32), 0, 1,
                 "its log-sum-exp"},
};
static const rg_port bwd_in[] = {
    [BW_O] = O_PORT,
    [BW_LSE] = LSE_PORT,
    [BW_CU] = CU_PORT,
    [BW_GRAD_O] = {"grad.o", "T,H,E", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', 1,
                   "gradient of o"},
    [BW_GRAD_LSE] = {"grad.lse", "T,H", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D(RG_F32), 0, 1,
                     "gradient of lse"},
    [BW_ACC_O] = {"acc.o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST | RG_PORT_OPTIONAL, RG_D(RG_F32), 0,
                  1, "gradients of the branches' outputs so far"},
    [BW_ACC_LSE] = {"acc.lse", "T,H", RG_PORT_ROWS | RG_PORT_LIST | RG_PORT_OPTIONAL, RG_D(RG_F32),
                    0, 1, "gradients of their log-sum-exps so far"},
};
static const rg_port bwd_out[] = {
    [OUT_O] = {"d.o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST | RG_PORT_OPTIONAL | RG_PORT_GRAD,
               RG_D_FLOAT, 'F', 1, "gradients of the branches' outputs"},
    [OUT_LSE] = {"d.lse", "T,H", RG_PORT_ROWS | RG_PORT_LIST | RG_PORT_OPTIONAL | RG_PORT_GRAD,
                 RG_D(RG_F32), 0, 1, "gradients of their log-sum-exps"},
};

static rg_status check(const rg_call *c, rg_error *e) {
  int n = rg_in_count(c, IN_O), m = rg_in_count(c, IN_LSE);
  if (n != m)
    return rg_op_fail(e, RG_E_SHAPE, c, "%d outputs come with %d log-sum-exps; one each is needed",
                      n, m);
  return rgi_cuda_blend_check(c, IN_O, "merge them in groups, then the groups", e);
}

static void cost(const rg_call *c, rg_cost *out) {
  const rg_arg *o = rgi_in_at(c, IN_O, 0), *lse = rgi_in_at(c, IN_LSE, 0);
  out->flops = 2 * rgi_arg_elements(o) * rg_in_count(c, IN_O);
  out->exps = rgi_arg_elements(lse) * (rg_in_count(c, IN_O) + 1);
  out->bytes = rgi_call_bytes(c);
}
static void cost_backward(const rg_call *c, rg_cost *out) {
  cost(c, out);
  out->flops *= 2;
}

static size_t workspace(const rg_call *c) {
  return c->gpu ? 0 : (size_t)c->threads * rgi_blend_bytes(rg_in_count(c, IN_O), 2);
}

/* Weights of row (t, h); returns the merged lse. Sums in double: n is small, and
 * lse is what others build on. */
static float weigh(const rg_call *c, int n, int64_t t, int64_t h, float *w) {
  float most = -INFINITY;
  double sum = 0;
  for (int k = 0; k < n; k++) {
    w[k] = *(const float *)rgi_at(rgi_in_at(c, IN_LSE, k), t, h);
    if (w[k] > most || w[k] != w[k]) most = w[k]; /* NaN stays, and then every weight is one */
  }
  if (most == -INFINITY) {
    for (int k = 0; k < n; k++) w[k] = 0;
    return most;
  }
  for (int k = 0; k < n; k++) sum += exp((double)w[k] - (double)most);
  for (int k = 0; k < n; k++) w[k] = (float)(exp((double)w[k] - (double)most) / sum);
  return (float)((double)most + log(sum));
}

static void run_tokens(void *arg, int64_t task, int thread) {
  const rg_call *c = arg;
  const rg_arg *out = rg_out(c, OUT_O), *out_lse = rg_out(c, OUT_LSE);
  const int n = rg_in_count(c, IN_O);
  const int64_t live = rgi_live_rows(rg_in(c, IN_CU), out->dim[0]);
  float *w = (float *)(void *)((char *)c->workspace + (size_t)thread * rgi_blend_bytes(n, 2));
  for (int64_t t = task * RGI_BLEND_TOKENS; t < (task + 1) * RGI_BLEND_TOKENS && t < out->dim[0];
       t++) {
    if (t >= live) {
      rgi_blend_dead(out, NULL, t);
      rgi_blend_dead(out_lse, NULL, t);
    }
    for (int64_t h = 0; t < live && h < out->dim[1]; h++) {
      float lse = weigh(c, n, t, h, w);
      rgi_blend_row(c, IN_O, w, true, out, t, h);
      if (out_lse) *(float *)rgi_at(out_lse, t, h) = lse;
    }
  }
}

static rg_status run_cpu(const rg_call *c) {
  c->parallel(c->pool, rgi_blend_tasks(rg_out(c, OUT_O)), run_tokens, (void *)c);
  return RG_OK;
}

/* Gradients of row (t, h)'s log-sum-exps. */
static void lse_gradients(const rg_call *c, int n, const float *w, const float *D, int64_t t,
                          int64_t h) {
  const rg_arg *g_lse = rg_in(c, BW_GRAD_LSE);
  float mean = 0;
  for (int k = 0; k < n; k++)
    if (w[k] != 0) mean += w[k] * D[k];
  float rest = (g_lse ? *(const float *)rgi_at(g_lse, t, h) : 0) - mean;
  for (int k = 0; k < n; k++) {
    const rg_arg *d = rgi_out_at(c, OUT_LSE, k);
    if (!d) continue;
    float x = w[k] != 0 ? w[k] * (D[k] + rest) : 0;
    float *to = rgi_at(d, t, h);
    *to = rgi_in_at(c, BW_ACC_LSE, k) ? *to + x : x;
  }
}

static void run_tokens_backward(void *arg, int64_t task, int thread) {
  const rg_call *c = arg;
  const rg_arg *g = rg_in(c, BW_GRAD_O), *like = rgi_in_at(c, BW_O, 0);
  const int n = rg_in_count(c, BW_O);
  const int64_t live = rgi_live_rows(rg_in(c, BW_CU), like->dim[0]);
  float *w = (float *)(void *)((char *)c->workspace + (size_t)thread * rgi_blend_bytes(n, 2)),
        *D = w + n;
  for (int64_t t = task * RGI_BLEND_TOKENS; t < (task + 1) * RGI_BLEND_TOKENS && t < like->dim[0];
       t++) {
    if (t >= live) {
      for (int k = 0; k < n; k++) {
        rgi_blend_dead(rgi_out_at(c, OUT_O, k), rgi_in_at(c, BW_ACC_O, k), t);
        rgi_blend_dead(rgi_out_at(c, OUT_LSE, k), rgi_in_at(c, BW_ACC_LSE, k), t);
      }
      continue;
    }
    for (int64_t h = 0; h < like->dim[1]; h++) {
      weigh(c, n, t, h, w);
      rgi_blend_row_backward(c, BW_O, g, w, OUT_O, BW_ACC_O, D, t, h);
      lse_gradients(c, n, w, D, t, h);
    }
  }
}

static rg_status run_cpu_backward(const rg_call *c) {
  c->parallel(c->pool, rgi_blend_tasks(rgi_in_at(c, BW_O, 0)), run_tokens_backward, (void *)c);
  return RG_OK;
}

/* ---- CUDA ---- */

static rgi_blend blend(const rg_call *c) {
  return (rgi_blend){.merge = true,
                     .o = IN_O,
                     .lse = IN_LSE,
                     .d_o = RGI_NO_PORT,
                     .acc_o = RGI_NO_PORT,
                     .d_lse = RGI_NO_PORT,
                     .acc_lse = RGI_NO_PORT,
                     .cu = rg_in(c, IN_CU),
                     .row = rg_out(c, OUT_O),
                     .row_lse = rg_out(c, OUT_LSE)};
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
  return (rgi_blend){.merge = true,
                     .backward = true,
                     .o = BW_O,
                     .lse = BW_LSE,
                     .d_o = OUT_O,
                     .acc_o = BW_ACC_O,
                     .d_lse = OUT_LSE,
                     .acc_lse = BW_ACC_LSE,
                     .cu = rg_in(c, BW_CU),
                     .row = rg_in(c, BW_GRAD_O),
                     .row_lse = rg_in(c, BW_GRAD_LSE)};
}
static rg_status cuda_backward(const rg_call *c, rg_cuda *x) {
  rgi_blend b = blend_backward(c);
  return rgi_cuda_blend(c, &b, x);
}
static const char *cuda_path_backward(const rg_call *c) {
  rgi_blend b = blend_backward(c);
  return rgi_cuda_blend_path(c, &b);
}

const rg_op rgi_op_merge_lse = {
    .abi = RG_OP_ABI,
    .name = "merge_lse",
    .doc = "merges attention over disjoint keys by its log-sum-exps",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_ROWWISE,
    .in = in_ports,
    .nin = RGI_COUNT(in_ports),
    .out = out_ports,
    .nout = RGI_COUNT(out_ports),
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = run_cpu,
    .cuda_steps = cuda,
    .cuda_path = cuda_path,
    .backward = "merge_lse.bwd",
};

const rg_op rgi_op_merge_lse_bwd = {
    .abi = RG_OP_ABI,
    .name = "merge_lse.bwd",
    .doc = "gradients of merge_lse",
    .flags = RG_OP_INTERNAL | RG_OP_RECOMPUTABLE,
    .in = bwd_in,
    .nin = RGI_COUNT(bwd_in),
    .out = bwd_out,
    .nout = RGI_COUNT(bwd_out),
    .check = check,
    .cost = cost_backward,
    .workspace = workspace,
    .run_cpu = run_cpu_backward,
    .cuda_steps = cuda_backward,
    .cuda_path = cuda_path_backward,
};
