/* ops/accumulate.c: the two ops autodiff sums with where an op cannot add to a sum itself: zero and
   accumulate.

   A sum starts as -0.0: adding it to x gives x for every x, +0.0 and -0.0 included, so that a sum
   begun with `zero` has the bits of one begun with its first term.
 */
#include "../graph/ir.h"
#include "cpu/rows.h"
#include "cuda/rows.h"

enum { A_AXIS, A_START };
enum { A_SHAPE, A_SUM };

static void zero_cost(const rg_call *c, rg_cost *out) {
  const rg_arg *y = rg_out(c, 0);
  *out = (rg_cost){.bytes = (double)rgi_arg_elements(y) * (double)rg_dtype_size(y->dtype)};
}

static void zero_run(void *user, const rgi_run *run) {
  const rg_call *c = user;
  const rg_arg *y = rg_out(c, 0);
  if (!c->attr[A_SUM].i) {
    memset(rgi_run_at(run, y), 0, (size_t)run->n * rg_dtype_size(y->dtype));
    return;
  }
  float *sum = rgi_run_at(run, y);
  for (int64_t i = 0; i < run->n; i++) sum[i] = -0.0f;
}

static rg_status run_zero(const rg_call *c) {
  rgi_walk w;
  rgi_walk_begin(&w, rg_out(c, 0), INT64_MAX);
  rgi_walk_run(c, &w, zero_run, (void *)c);
  return RG_OK;
}

static rg_status zero_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  (void)pointer, (void)e;
  const rgi_node *n = &g->node[node];
  rgi_tensor *y = &g->tensor[rgi_out(n, 0)]; /* its dtype is chosen by whoever adds the node */
  y->rank = (int32_t)n->attr[A_SHAPE].i;
  for (int d = 0; d < y->rank; d++) y->dim[d] = rgi_dim_of(n->attr[A_SHAPE].list[d]);
  y->base = -1;
  y->offset = 0;
  rgi_dense_strides(y);
  return RG_OK;
}

static const rg_port zero_out[] = {
    {"y", "*", 0, RG_D_FLOAT, 0, -1, "zeros"},
};
static const rg_attr zero_attrs[] = {
    {"shape", RG_ATTR_INTS, true, 0, 1099511627776.0, 0, NULL, "its extents"},
    {"sum", RG_ATTR_BOOL, false, 0, 1, 0, NULL, "start of a sum: -0.0"},
};
static const rgi_rules zero_rules = {.infer = zero_infer};
const rg_op rgi_op_zero = {.abi = RG_OP_ABI,
                           .name = "zero",
                           .doc = "zeros",
                           .flags = RG_OP_INTERNAL,
                           .out = zero_out,
                           .nout = 1,
                           .attrs = zero_attrs,
                           .nattr = RGI_COUNT(zero_attrs),
                           .cost = zero_cost,
                           .run_cpu = run_zero,
                           .cuda_steps = rgi_cuda_zero,
                           .cuda_path = rgi_cuda_zero_path,
                           .rules = &zero_rules};

static void accumulate_cost(const rg_call *c, rg_cost *out) {
  double n = (double)rgi_arg_elements(rg_in(c, 1));
  *out = (rg_cost){.flops = n, .bytes = n * (8.0 + (double)rg_dtype_size(rg_in(c, 1)->dtype))};
}

static rg_status infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  const rgi_tensor acc = g->tensor[rgi_in(n, 0)], *x = &g->tensor[rgi_in(n, 1)];
  rgi_tensor *y = &g->tensor[rgi_out(n, 0)];
  int64_t axis = n->attr[A_AXIS].i, start = n->attr[A_START].i;
  /* a scalar is added whole */
  bool fits = acc.rank == x->rank && (axis < acc.rank || acc.rank == 0);
  for (int d = 0; fits && d < acc.rank; d++)
    fits = d == axis ? start + x->dim[d].c <= acc.dim[d].c : x->dim[d].c == acc.dim[d].c;
  if (!fits)
    return rgi_fail(e, RG_E_INTERNAL, pointer, n->name, "\"%s\" does not fit into the sum",
                    x->name);
  int producer = y->producer;
  const char *name = y->name;
  int grad_of = y->grad_of;
  *y = acc;
  y->name = name;
  y->producer = producer;
  y->grad_of = grad_of;
  y->base = rgi_owner(g, rgi_in(n, 0));
  return RG_OK;
}

static const rg_port accumulate_in[] = {
    {"acc", "*", 0, RG_D(RG_F32), 0, -1, "the sum so far"},
    {"x", "*", 0, RG_D_FLOAT, 0, -1, "what is added to the slice that starts at `start`"},
};
static const rg_port accumulate_out[] = {
    {"y", "*", 0, RG_D(RG_F32), 0, -1, "the sum, in place"},
};
static const rg_attr accumulate_attrs[] = {
    {"axis", RG_ATTR_INT, false, 0, RG_MAX_RANK - 1, 0, NULL, "axis of the slice"},
    {"start", RG_ATTR_INT, false, 0, 1099511627776.0, 0, NULL, "its first index"},
};
static const rgi_rules accumulate_rules = {.infer = infer};
const rg_op rgi_op_accumulate = {.abi = RG_OP_ABI,
                                 .name = "accumulate",
                                 .doc = "adds into an fp32 sum in place",
                                 .flags = RG_OP_INTERNAL,
                                 .in = accumulate_in,
                                 .nin = 2,
                                 .out = accumulate_out,
                                 .nout = 1,
                                 .attrs = accumulate_attrs,
                                 .nattr = RGI_COUNT(accumulate_attrs),
                                 .cost = accumulate_cost,
                                 .run_cpu = rgi_run_accumulate,
                                 .cuda_steps = rgi_cuda_accumulate,
                                 .cuda_path = rgi_cuda_accumulate_path,
                                 .rules = &accumulate_rules};
