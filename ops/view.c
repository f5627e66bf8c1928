/* ops/view.c: slice, split, reshape, transpose, stop_gradient and join: ops that move no bytes.

   A view's output looks into its input's bytes. A join is the reverse: its inputs, which must own
   their bytes and tile the output along one axis, are placed inside the output. Strides and offsets
   exist once the graph is bound.
 */
#include "../graph/autodiff.h"
#include "ops.h"
#include <stdio.h>

enum { A_AXIS = 0, A_START = 1, A_STOP = 2, A_LIST = 0, A_SIZES = 1 };

static rg_status bad(rgi_graph *g, int node, const char *pointer, rg_status status, rg_error *e,
                     const char *attr, const char *text) {
  char where[256];
  snprintf(where, sizeof where, "%s%s%s", pointer ? pointer : "", pointer ? "/attrs/" : "",
           pointer ? attr : "");
  return rgi_fail(e, status, where, g->node[node].name, "%s", text);
}

static rg_status check_axis(rgi_graph *g, int node, const char *pointer, int64_t axis, int rank,
                            rg_error *e) {
  char text[160];
  if (axis >= 0 && axis < rank) return RG_OK;
  snprintf(text, sizeof text, "axis %lld does not exist; the input has %d axes, counted from 0",
           (long long)axis, rank);
  return bad(g, node, pointer, RG_E_VALUE, e, "axis", text);
}

/* y := a look into x with x's dtype, base, strides and offset, ready to be narrowed. */
static rgi_tensor *look_into(rgi_graph *g, int x, int y) {
  const rgi_tensor *from = &g->tensor[x];
  rgi_tensor *to = &g->tensor[y];
  to->dtype = from->dtype;
  to->rank = from->rank;
  memcpy(to->dim, from->dim, sizeof to->dim);
  memcpy(to->stride, from->stride, sizeof to->stride);
  to->offset = from->offset;
  to->base = rgi_owner(g, x);
  return to;
}

/* ---- slice ---- */

static rg_status slice_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  int x = rgi_in(n, 0), y = rgi_out(n, 0);
  int64_t axis = n->attr[A_AXIS].i, start = n->attr[A_START].i, stop = n->attr[A_STOP].i;
  RGI_TRY(check_axis(g, node, pointer, axis, g->tensor[x].rank, e));
  rgi_dim extent = g->tensor[x].dim[axis];
  bool to_end = !n->attr[A_STOP].set;
  char text[160], have[64];
  if (start < 0 || (!to_end && stop < start) ||
      (rgi_dim_known(extent) && (to_end ? start : stop) > extent.c)) {
    snprintf(text, sizeof text, "the slice [%lld, %lld) leaves the axis, which has %s",
             (long long)start, (long long)(to_end ? extent.c : stop),
             rgi_dim_text(extent, have, sizeof have));
    return bad(g, node, pointer, RG_E_VALUE, e, to_end ? "start" : "stop", text);
  }
  rgi_tensor *t = look_into(g, x, y);
  if (to_end)
    RGI_TRY(rgi_dim_binary(g->arena, '-', extent, rgi_dim_of(start), &t->dim[axis], e));
  else
    t->dim[axis] = rgi_dim_of(stop - start);
  if (g->bound) t->offset += start * t->stride[axis];
  return RG_OK;
}

static rg_status slice_backward(rgi_backward *b, int node, rg_error *e) {
  const rgi_node *n = &rgi_bwd_graph(b)->node[node];
  int gradient = rgi_bwd_gradient(b, node, 0);
  if (gradient < 0) return RG_OK;
  return rgi_bwd_give(b, node, 0, gradient, (int)n->attr[A_AXIS].i, n->attr[A_START].i, e);
}

static const rg_port view_in[] = {
    {"x", "*", 0, RG_D_FLOAT | RG_D(RG_I32), 'X', -1, "any tensor"},
};
static const rg_port view_out[] = {
    {"y", "*", 0, RG_D_FLOAT | RG_D(RG_I32), 'X', -1, "a look into x"},
};
static const rg_attr slice_attrs[] = {
    {"axis", RG_ATTR_INT, true, 0, RG_MAX_RANK - 1, 0, NULL, "axis to cut"},
    {"start", RG_ATTR_INT, false, 0, 1099511627776.0, 0, NULL, "first index kept"},
    {"stop", RG_ATTR_INT, false, 0, 1099511627776.0, 0, NULL,
     "first index no longer kept; to the end if left out"},
};
static const rgi_rules slice_rules = {
    .infer = slice_infer, .backward = slice_backward, .partial = true};
const rg_op rgi_op_slice = {.abi = RG_OP_ABI,
                            .name = "slice",
                            .doc = "view of the indices start … stop-1 of one axis",
                            .flags = RG_OP_VIEW,
                            .in = view_in,
                            .nin = 1,
                            .out = view_out,
                            .nout = 1,
                            .attrs = slice_attrs,
                            .nattr = RGI_COUNT(slice_attrs),
                            .rules = &slice_rules};

/* ---- split ---- */

static rg_status split_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  int x = rgi_in(n, 0), parts = rgi_nout(n);
  int64_t axis = n->attr[A_AXIS].i, start = 0;
  const rg_value *sizes = &n->attr[A_SIZES];
  char text[160], have[64];
  RGI_TRY(check_axis(g, node, pointer, axis, g->tensor[x].rank, e));
  rgi_dim extent = g->tensor[x].dim[axis];
  if (sizes->set && sizes->i != parts) {
    snprintf(text, sizeof text, "%lld sizes for %d outputs", (long long)sizes->i, parts);
    return bad(g, node, pointer, RG_E_SHAPE, e, "sizes", text);
  }
  if (!sizes->set && rgi_dim_known(extent) && extent.c % parts) {
    snprintf(text, sizeof text,
             "an axis of %lld does not split into %d equal parts; give \"sizes\"",
             (long long)extent.c, parts);
    return bad(g, node, pointer, RG_E_SHAPE, e, "axis", text);
  }
  for (int i = 0; i < parts; i++) {
    rgi_tensor *t = look_into(g, x, n->out[i]);
    if (sizes->set)
      t->dim[axis] = rgi_dim_of(sizes->list[i]);
    else
      RGI_TRY(rgi_dim_binary(g->arena, '/', extent, rgi_dim_of(parts), &t->dim[axis], e));
    if (g->bound) t->offset += start * t->stride[axis];
    start += rgi_dim_known(t->dim[axis]) ? t->dim[axis].c : 0;
  }
  if (sizes->set && rgi_dim_known(extent) && start != extent.c) {
    snprintf(text, sizeof text, "the sizes add up to %lld, but the axis has %s", (long long)start,
             rgi_dim_text(extent, have, sizeof have));
    return bad(g, node, pointer, RG_E_SHAPE, e, "sizes", text);
  }
  return RG_OK;
}

static rg_status split_backward(rgi_backward *b, int node, rg_error *e) {
  int axis = (int)rgi_bwd_graph(b)->node[node].attr[A_AXIS].i;
  int64_t start = 0;
  for (int i = 0; i < rgi_nout(&rgi_bwd_graph(b)->node[node]); i++) {
    const rgi_graph *g = rgi_bwd_graph(b);
    int64_t size = g->tensor[g->node[node].out[i]].dim[axis].c;
    int gradient = rgi_bwd_gradient(b, node, i);
    if (gradient >= 0) RGI_TRY(rgi_bwd_give(b, node, 0, gradient, axis, start, e));
    start += size;
  }
  return RG_OK;
}

static const rg_port split_out[] = {
    {"y", "*", RG_PORT_LIST, RG_D_FLOAT | RG_D(RG_I32), 'X', -1, "the parts, in order"},
};
static const rg_attr split_attrs[] = {
    {"axis", RG_ATTR_INT, true, 0, RG_MAX_RANK - 1, 0, NULL, "axis to cut"},
    {"sizes", RG_ATTR_INTS, false, 0, 1099511627776.0, 0, NULL,
     "extent of each part; equal parts if left out"},
};
static const rgi_rules split_rules = {
    .infer = split_infer, .backward = split_backward, .partial = true};
const rg_op rgi_op_split = {.abi = RG_OP_ABI,
                            .name = "split",
                            .doc = "views that cut one axis into consecutive parts",
                            .flags = RG_OP_VIEW,
                            .in = view_in,
                            .nin = 1,
                            .out = split_out,
                            .nout = 1,
                            .attrs = split_attrs,
                            .nattr = RGI_COUNT(split_attrs),
                            .rules = &split_rules};

/* ---- reshape ---- */

/* The axis before axis k that is longer than 1, or -1: an axis of 1 may have any stride. */
static int axis_before(const rgi_tensor *t, int k) {
  do k--;
  while (k >= 0 && t->dim[k].c == 1);
  return k;
}

/* Strides for the new shape over the old layout: each run of old axes that merges must be
 * contiguous. */
static bool restride(const rgi_tensor *from, rgi_tensor *to) {
  if (rgi_elements(from) == 0) {
    rgi_dense_strides(to);
    return true;
  }
  int i = axis_before(from, from->rank), j = axis_before(to, to->rank);
  while (i >= 0 && j >= 0) { /* one run: the fewest trailing axes of both with equal products */
    int64_t old_product = from->dim[i].c, new_product = to->dim[j].c;
    to->stride[j] = from->stride[i];
    while (old_product != new_product) {
      int next = old_product < new_product ? axis_before(from, i) : axis_before(to, j);
      if (next < 0) return false;
      if (old_product < new_product) {
        if (from->stride[next] != from->stride[i] * from->dim[i].c) return false;
        i = next;
        old_product *= from->dim[i].c;
      } else {
        to->stride[next] = to->stride[j] * to->dim[j].c;
        j = next;
        new_product *= to->dim[j].c;
      }
    }
    i = axis_before(from, i);
    j = axis_before(to, j);
  }
  for (int k = to->rank - 1; k >= 0; k--)
    if (to->dim[k].c == 1)
      to->stride[k] = k + 1 < to->rank ? to->stride[k + 1] * to->dim[k + 1].c : 1;
  return to->rank == 0 ||
         /* elements of the last axis lie side by side in every tensor */
         to->stride[to->rank - 1] == 1;
}

static rg_status reshape_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  int x = rgi_in(n, 0), y = rgi_out(n, 0);
  const rg_value *shape = &n->attr[A_LIST];
  rgi_tensor from = g->tensor[x];
  rgi_tensor *t = look_into(g, x, y);
  char text[256];
  if (shape->i > RG_MAX_RANK) { /* none: a scalar, which backward may have to come back to */
    snprintf(text, sizeof text, "a shape has at most %d axes, not %lld", RG_MAX_RANK,
             (long long)shape->i);
    return bad(g, node, pointer, RG_E_RANK, e, "shape", text);
  }
  t->rank = (int32_t)shape->i;
  rgi_dim total = rgi_dim_of(1), rest = rgi_dim_of(1);
  int open = -1;
  for (int i = 0; i < from.rank; i++)
    RGI_TRY(rgi_dim_binary(g->arena, '*', total, from.dim[i], &total, e));
  for (int i = 0; i < t->rank; i++) {
    if (shape->list[i] == 0) { /* as in the input */
      if (i >= from.rank)
        return bad(g, node, pointer, RG_E_SHAPE, e, "shape",
                   "0 keeps an axis the input does not have");
      t->dim[i] = from.dim[i];
    } else if (shape->list[i] < 0) {
      if (open >= 0)
        return bad(g, node, pointer, RG_E_SHAPE, e, "shape", "-1 may stand for one axis only");
      open = i;
      continue;
    } else {
      t->dim[i] = rgi_dim_of(shape->list[i]);
    }
    RGI_TRY(rgi_dim_binary(g->arena, '*', rest, t->dim[i], &rest, e));
  }
  if (open >= 0) {
    if (rgi_dim_known(rest) && rest.c == 0)
      return bad(g, node, pointer, RG_E_SHAPE, e, "shape", "-1 cannot be told beside an axis of 0");
    RGI_TRY(rgi_dim_binary(g->arena, '/', total, rest, &t->dim[open], e));
    RGI_TRY(rgi_dim_binary(g->arena, '*', rest, t->dim[open], &rest, e));
  }
  if (!rgi_dim_equal(total, rest) && (g->bound || (rgi_dim_known(total) && rgi_dim_known(rest)))) {
    char a[96], b[96];
    snprintf(text, sizeof text, "the new shape has %s elements, the input %s",
             rgi_dim_text(rest, a, sizeof a), rgi_dim_text(total, b, sizeof b));
    return bad(g, node, pointer, RG_E_SHAPE, e, "shape", text);
  }
  if (g->bound && !restride(&from, t))
    return bad(g, node, pointer, RG_E_SHAPE, e, "shape",
               "this view of a strided tensor cannot be reshaped without moving bytes; put a "
               "\"cast\" before it");
  return RG_OK;
}

static rg_status reshape_backward(rgi_backward *b, int node, rg_error *e) {
  int gradient = rgi_bwd_gradient(b, node, 0), back;
  if (gradient < 0) return RG_OK;
  const rgi_node *n = &rgi_bwd_graph(b)->node[node];
  const rgi_tensor *to = rgi_bwd_graph(b)->tensor + rgi_in(n, 0),
                   *from = rgi_bwd_graph(b)->tensor + rgi_out(n, 0);
  if (to->dim[0].c != from->dim[0].c) RGI_TRY(rgi_bwd_live(b, gradient, &gradient, e));
  RGI_TRY(rgi_bwd_dense(b, gradient, &gradient, e));
  const rgi_graph *g = rgi_bwd_graph(b);
  const rgi_tensor *x = &g->tensor[rgi_in(&g->node[node], 0)];
  int64_t list[RG_MAX_RANK];
  for (int i = 0; i < x->rank; i++) list[i] = x->dim[i].c;
  rg_value attr = {.i = x->rank, .list = list, .set = true};
  bool empty = rgi_elements(x) == 0; /* a shape list says 0 for "as in the input" */
  if (empty) return RG_OK;
  RGI_TRY(rgi_bwd_unary(b, "reshape", &attr, gradient, ".reshape", &back, e));
  return rgi_bwd_give(b, node, 0, back, -1, 0, e);
}

static const rg_port reshape_out[] = {
    {"y", "*", 0, RG_D_FLOAT | RG_D(RG_I32), 'X', -1, "a look into x"},
};
static const rg_attr reshape_attrs[] = {
    {"shape", RG_ATTR_INTS, true, -1, 1099511627776.0, 0, NULL,
     "new extents; 0 keeps the input's extent on that axis, one -1 takes what is left"},
};
static const rgi_rules reshape_rules = {
    .infer = reshape_infer, .backward = reshape_backward, .ordered = true};
const rg_op rgi_op_reshape = {.abi = RG_OP_ABI,
                              .name = "reshape",
                              .doc =
                                  "view with other axes over the same elements in the same order",
                              .flags = RG_OP_VIEW,
                              .in = view_in,
                              .nin = 1,
                              .out = reshape_out,
                              .nout = 1,
                              .attrs = reshape_attrs,
                              .nattr = RGI_COUNT(reshape_attrs),
                              .rules = &reshape_rules};

/* ---- transpose ---- */

static rg_status transpose_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  const rg_value *perm = &n->attr[A_LIST];
  rgi_tensor from = g->tensor[rgi_in(n, 0)];
  rgi_tensor *t = look_into(g, rgi_in(n, 0), rgi_out(n, 0));
  uint32_t seen = 0;
  bool good = from.rank > 0 && perm->i == from.rank;
  for (int i = 0; good && i < from.rank; i++) {
    good = perm->list[i] >= 0 && perm->list[i] < from.rank && !(seen >> perm->list[i] & 1);
    if (good) seen |= 1u << perm->list[i];
  }
  if (!good)
    return bad(g, node, pointer, RG_E_VALUE, e, "perm",
               "perm must name each axis of the input once, counted from 0");
  if (perm->list[from.rank - 1] != from.rank - 1)
    return bad(g, node, pointer, RG_E_VALUE, e, "perm",
               "the last axis must stay last: its elements are contiguous");
  for (int i = 0; i < from.rank; i++) {
    t->dim[i] = from.dim[perm->list[i]];
    t->stride[i] = from.stride[perm->list[i]];
  }
  return RG_OK;
}

static rg_status transpose_backward(rgi_backward *b, int node, rg_error *e) {
  int gradient = rgi_bwd_gradient(b, node, 0), back;
  if (gradient < 0) return RG_OK;
  const rg_value *perm = &rgi_bwd_graph(b)->node[node].attr[A_LIST];
  int64_t inverse[RG_MAX_RANK] = {0};
  for (int i = 0; i < perm->i; i++) inverse[perm->list[i]] = i;
  rg_value attr = {.i = perm->i, .list = inverse, .set = true};
  if (inverse[0] != 0) RGI_TRY(rgi_bwd_live(b, gradient, &gradient, e));
  RGI_TRY(rgi_bwd_unary(b, "transpose", &attr, gradient, ".transpose", &back, e));
  return rgi_bwd_give(b, node, 0, back, -1, 0, e);
}

static const rg_attr transpose_attrs[] = {
    {"perm", RG_ATTR_INTS, true, 0, RG_MAX_RANK - 1, 0, NULL,
     "axis of the input for each axis of the output"},
};
static const rgi_rules transpose_rules = {.infer = transpose_infer, .backward = transpose_backward};
const rg_op rgi_op_transpose = {.abi = RG_OP_ABI,
                                .name = "transpose",
                                .doc = "view with the outer axes in another order",
                                .flags = RG_OP_VIEW,
                                .in = view_in,
                                .nin = 1,
                                .out = reshape_out,
                                .nout = 1,
                                .attrs = transpose_attrs,
                                .nattr = RGI_COUNT(transpose_attrs),
                                .rules = &transpose_rules};

/* ---- stop_gradient ---- */

static rg_status stop_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  (void)pointer, (void)e;
  look_into(g, rgi_in(&g->node[node], 0), rgi_out(&g->node[node], 0));
  return RG_OK;
}

static const rgi_rules stop_rules = {.infer = stop_infer, .ordered = true}; /* no backward: zero */
const rg_op rgi_op_stop_gradient = {.abi = RG_OP_ABI,
                                    .name = "stop_gradient",
                                    .doc = "view of the whole, behind which gradients end",
                                    .flags = RG_OP_VIEW,
                                    .in = view_in,
                                    .nin = 1,
                                    .out = reshape_out,
                                    .nout = 1,
                                    .rules = &stop_rules};

/* ---- join ---- */

static rg_status join_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  int y = rgi_out(n, 0), parts = rgi_nin(n);
  int64_t axis = n->attr[A_AXIS].i, start = 0;
  const rgi_tensor *first = &g->tensor[n->in[0]];
  RGI_TRY(check_axis(g, node, pointer, axis, first->rank, e));
  rgi_tensor *t = &g->tensor[y];
  t->dtype = first->dtype;
  t->rank = first->rank;
  memcpy(t->dim, first->dim, sizeof t->dim);
  t->base = -1;
  t->offset = 0;
  for (int i = 1; i < parts; i++)
    RGI_TRY(rgi_dim_binary(g->arena, '+', t->dim[axis], g->tensor[n->in[i]].dim[axis],
                           &t->dim[axis], e));
  if (!g->bound)
    return rgi_fail(e, RG_E_INTERNAL, pointer, n->name, "joins exist in bound graphs only");
  rgi_dense_strides(t);
  for (int i = 0; i < parts; i++) {
    rgi_tensor *part = &g->tensor[n->in[i]];
    if ((part->base >= 0 && part->base != y) || part->producer < 0)
      return rgi_fail(e, RG_E_INTERNAL, pointer, n->name, "part \"%s\" does not own its bytes",
                      part->name);
    part->base = y;
    part->offset = start * t->stride[axis];
    memcpy(part->stride, t->stride, sizeof part->stride);
    start += part->dim[axis].c;
  }
  return RG_OK;
}

static const rg_port join_in[] = {
    {"x", "*", RG_PORT_LIST, RG_D_FLOAT | RG_D(RG_I32), 'X', -1, "the parts, in order"},
};
static const rg_port join_out[] = {
    {"y", "*", 0, RG_D_FLOAT | RG_D(RG_I32), 'X', -1,
     "the whole, whose bytes the parts are written into"},
};
static const rg_attr join_attrs[] = {
    {"axis", RG_ATTR_INT, true, 0, RG_MAX_RANK - 1, 0, NULL,
     "axis along which the parts follow each other"},
};
static const rgi_rules join_rules = {.infer = join_infer, .backward = rgi_bwd_cut};
const rg_op rgi_op_join = {.abi = RG_OP_ABI,
                           .name = "join",
                           .doc = "parts written by different nodes, seen as one tensor",
                           .flags = RG_OP_VIEW | RG_OP_INTERNAL,
                           .in = join_in,
                           .nin = 1,
                           .out = join_out,
                           .nout = 1,
                           .attrs = join_attrs,
                           .nattr = RGI_COUNT(join_attrs),
                           .rules = &join_rules};
