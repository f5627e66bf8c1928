/* ops/comm/pair.c: a weight's gradient that is one number a head, summed over all tokens. Its terms
 * cancel, so that a sum rounded to fp32 on every slot and rank could be off by many times 2^-24 of
 * what is left in the end. Ports with RG_PORT_PAIR take such a weight as a pair, its gradient then
 * is two floats, the sum and what its rounding left, and is rounded once, here.
 *
 *     pair        y[0 … n) = x, y[n … 2n) = 0
 *     pair_sum    y[i] = Σ_r (x_r[i] + x_r[n + i])    in fp64, in rank order; `local`: this rank's
 */
#include "../cuda/comm.h"
#include "comm.h"

enum { A_RANKS, A_LOCAL };
static const rg_attr attrs[] = {
    {"ranks", RG_ATTR_INT, true, 1, RGI_MOST_RANKS, 1, NULL, "ranks there are"},
    {"local", RG_ATTR_BOOL, false, 0, 0, 0, NULL, "no sum over the ranks"}};

static const rg_port in[] = {{"x", "*", 0, RG_D_FLOAT, 0, -1, "a number a head, or a pair"}};
static const rg_port out[] = {{"y", "*", 0, RG_D(RG_F32), 0, -1, "the other"}};

static rg_status infer(rgi_graph *g, int node, bool pair) {
  const rgi_node *n = &g->node[node];
  rgi_tensor *y = &g->tensor[n->out[0]];
  const int64_t x = g->tensor[n->in[0]].dim[0].c;
  const rgi_dim dim = rgi_dim_of(pair ? 2 * x : x / 2);
  rgi_tensor_like(g, n->out[0], &g->tensor[n->in[0]], &dim);
  y->dtype = RG_F32;
  y->paired = pair;
  return RG_OK;
}

static void cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.bytes = rgi_call_bytes(c)};
}

/* ---- pair ---- */

static rg_status pair_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  (void)pointer, (void)e;
  return infer(g, node, true);
}

static rg_arg half_of(const rg_arg *y) {
  rg_arg half = *y;
  half.dim[0] /= 2;
  return half;
}

static rg_status pair_run(const rg_call *c) {
  const rg_arg *x = rg_in(c, 0), *y = rg_out(c, 0), half = half_of(y);
  rgi_copy_rows(c, &half, x, INT64_MAX);
  memset((float *)y->data + x->dim[0], 0, (size_t)x->dim[0] * sizeof(float));
  return RG_OK;
}

static rg_status pair_cuda(const rg_call *c, rg_cuda *k) {
  const rg_arg *x = rg_in(c, 0), *y = rg_out(c, 0), half = half_of(y);
  RGI_TRY(rgi_cuda_copy(k, x, &half, NULL));
  return rgi_cuda_clear(k, (float *)y->data + x->dim[0], x->dim[0] * (int64_t)sizeof(float),
                        RG_F32);
}

static rg_status pair_backward(rgi_backward *b, int node, rg_error *e) {
  const int gradient = rgi_bwd_gradient(b, node, 0), count[] = {1};
  int made;
  if (gradient < 0) return RG_OK;
  const rg_value *attr = rgi_bwd_graph(b)->node[node].attr;
  RGI_TRY(rgi_bwd_node(b, node, "pair_sum", attr, &gradient, count, ".sum", 1, &made, e));
  return rgi_bwd_hand_over(b, node, 0, made, e);
}

static const rgi_rules pair_rules = {.infer = pair_infer, .backward = pair_backward, .wide = true};
const rg_op rgi_op_pair = {.abi = RG_OP_ABI,
                           .name = "pair",
                           .doc = "numbers and zeros: what is gathered of their gradient has two "
                                  "floats for each",
                           .flags = RG_OP_INTERNAL,
                           .in = in,
                           .nin = RGI_COUNT(in),
                           .out = out,
                           .nout = RGI_COUNT(out),
                           .attrs = attrs,
                           .nattr = RGI_COUNT(attrs),
                           .cost = cost,
                           .run_cpu = pair_run,
                           .cuda_steps = pair_cuda,
                           .rules = &pair_rules};

/* ---- pair_sum ---- */

static rg_status sum_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  (void)pointer, (void)e;
  return infer(g, node, false);
}

static int ranks_of(const rg_call *c) {
  return c->attr[A_LOCAL].i ? 1 : rgi_ranks(c, A_RANKS);
}

static int64_t pair_bytes(const rg_call *c) {
  return rg_in(c, 0)->dim[0] * (int64_t)sizeof(float);
}

static size_t sum_comm(const rg_call *c) {
  return RGI_ROUND256(pair_bytes(c)) + RGI_ROUND256(pair_bytes(c) * ranks_of(c));
}

static rg_status sum_run(const rg_call *c) {
  const rg_arg *x = rg_in(c, 0), *y = rg_out(c, 0);
  const int64_t n = y->dim[0], bytes = pair_bytes(c);
  const int ranks = ranks_of(c);
  char *send = c->comm_block, *recv = send + RGI_ROUND256(bytes);
  const rg_arg dense = rgi_dense_rows(x, 2 * n, send, RG_F32);
  rgi_copy_rows(c, &dense, x, INT64_MAX);
  if (ranks > 1)
    RGI_TRY(rgi_all_gather(c, send, recv, (size_t)bytes));
  else
    recv = send;
  for (int64_t i = 0; i < n; i++) {
    double sum = 0;
    for (int r = 0; r < ranks; r++) {
      const float *of = (const float *)(recv + r * bytes);
      sum += (double)of[i] + (double)of[n + i];
    }
    ((float *)y->data)[i * y->stride[0]] = (float)sum;
  }
  return RG_OK;
}

static rg_status sum_cuda(const rg_call *c, rg_cuda *k) {
  const rg_arg *x = rg_in(c, 0), *y = rg_out(c, 0);
  const int64_t bytes = pair_bytes(c);
  const int ranks = ranks_of(c);
  int64_t recv = RGI_ROUND256(bytes);
  const rg_arg dense = rgi_cuda_dense(c, x, x->dim[0], 0, RG_F32);
  RGI_TRY(rgi_cuda_copy(k, x, &dense, NULL));
  if (ranks > 1)
    RGI_TRY(rgi_cuda_all_gather(c, k, ranks, 0, &recv, bytes));
  else
    recv = 0;
  return rgi_cuda_sum_pairs(k, y, (const char *)c->comm_block + recv, ranks);
}

static void sum_cost(const rg_call *c, rg_cost *out) {
  cost(c, out);
  out->wire = (double)(ranks_of(c) - 1) * (double)pair_bytes(c);
}

static const rgi_rules sum_rules = {.infer = sum_infer};
const rg_op rgi_op_pair_sum = {.abi = RG_OP_ABI,
                               .name = "pair_sum",
                               .doc = "sums over the ranks of numbers in two floats each",
                               .flags = RG_OP_COMM | RG_OP_INTERNAL,
                               .in = in,
                               .nin = RGI_COUNT(in),
                               .out = out,
                               .nout = RGI_COUNT(out),
                               .attrs = attrs,
                               .nattr = RGI_COUNT(attrs),
                               .cost = sum_cost,
                               .comm_bytes = sum_comm,
                               .run_cpu = sum_run,
                               .cuda_steps = sum_cuda,
                               .rules = &sum_rules};
