/* ops/concat.c: tensors side by side along one axis (not the token axis: packs are not
 * concatenated). */
#include "../graph/autodiff.h"
#include "cpu/rows.h"
#include "cuda/rows.h"

enum { A_AXIS };

static void cost(const rg_call *c, rg_cost *out) {
  const rg_arg *y = rg_out(c, 0);
  *out = (rg_cost){.bytes = 2.0 * (double)rgi_arg_elements(y) * (double)rg_dtype_size(y->dtype)};
}

static rg_status infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  int64_t axis = n->attr[A_AXIS].i;
  const rgi_tensor *first = &g->tensor[n->in[0]];
  rgi_tensor *y = &g->tensor[rgi_out(n, 0)];
  if (axis >= first->rank)
    return rgi_fail(e, RG_E_VALUE, pointer, n->name,
                    "axis %lld does not exist; \"%s\" has %d axes, counted from 0", (long long)axis,
                    first->name, first->rank);
  y->dtype = first->dtype;
  y->rank = first->rank;
  memcpy(y->dim, first->dim, sizeof y->dim);
  for (int i = 1; i < n->in_begin[1]; i++) {
    const rgi_tensor *part = &g->tensor[n->in[i]];
    bool fits = part->rank == first->rank;
    for (int d = 0; fits && d < part->rank; d++)
      fits = d == axis || rgi_dim_equal(part->dim[d], first->dim[d]) ||
             !(rgi_dim_known(part->dim[d]) && rgi_dim_known(first->dim[d]));
    if (!fits)
      return rgi_fail(e, RG_E_SHAPE, pointer, n->name,
                      "\"%s\" and \"%s\" differ on an axis other than %lld", part->name,
                      first->name, (long long)axis);
    RGI_TRY(rgi_dim_binary(g->arena, '+', y->dim[axis], part->dim[axis], &y->dim[axis], e));
  }
  y->base = -1;
  y->offset = 0;
  if (g->bound) rgi_dense_strides(y);
  return RG_OK;
}

static const rg_port in[] = {
    {"x", "*", RG_PORT_LIST | RG_PORT_ROWS, RG_D_FLOAT, 'F', -1,
     "the parts, in order; same extents on the other axes"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "sequence starts"},
};
static const rg_port out[] = {
    {"y", "*", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "the whole"},
};
static const rg_attr attrs[] = {
    {"axis", RG_ATTR_INT, true, 1, RG_MAX_RANK - 1, 0, NULL,
     "axis along which the parts follow each other"},
};
static const rgi_rules rules = {.infer = infer, .backward = rgi_bwd_cut};
const rg_op rgi_op_concat = {.abi = RG_OP_ABI,
                             .name = "concat",
                             .doc = "tensors one after the other along an axis",
                             .flags = RG_OP_RECOMPUTABLE | RG_OP_ROWWISE,
                             .in = in,
                             .nin = RGI_COUNT(in),
                             .out = out,
                             .nout = RGI_COUNT(out),
                             .attrs = attrs,
                             .nattr = RGI_COUNT(attrs),
                             .cost = cost,
                             .run_cpu = rgi_run_concat,
                             .cuda_steps = rgi_cuda_concat,
                             .cuda_path = rgi_cuda_concat_path,
                             .rules = &rules};
