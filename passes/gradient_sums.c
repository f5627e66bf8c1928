/* passes/gradient_sums.c: the sums that gradients meet in, the nodes that sums are made of, and
 * what the rules of structural ops may append (graph/autodiff.h). See gradients.h. */
#include "gradients.h"
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

rgi_graph *rgi_bwd_graph(rgi_backward *b) {
  return b->g;
}

/* ---- small builders ---- */

int rgi_add_gradient(rgi_backward *b, const char *name, int of, rg_dtype dtype) {
  name = rgi_free_name(b->g, name); /* one gradient may reach several views or sums */
  if (!name) return -1;
  rgi_tensor t = {
      .name = name, .dtype = dtype, .base = -1, .producer = -1, .seqlens = -1, .grad_of = of};
  if (of >= 0) t.seqlens = b->g->tensor[of].seqlens;
  return rgi_add_tensor(b->g, &t);
}

/* One node with at most one tensor (in[i] >= 0) on each of its at most two in-ports and one output,
 * which is created. */
static rg_status add_glue(rgi_backward *b, const char *op_name, const rg_value *attr, const int *in,
                          const char *name, int of, rg_dtype dtype, int *out, rg_error *e) {
  rgi_graph *g = b->g;
  const rg_op *op = rgi_find_op(g->ctx, op_name);
  int nin[2] = {0, 0}, nout[1] = {1};
  for (int p = 0; p < op->nin; p++) nin[p] = in[p] >= 0;
  int t = rgi_add_gradient(b, name, of, dtype);
  char *node_name = t >= 0 ? rgi_format(g->arena, "%s.%s", g->tensor[t].name, op_name) : NULL;
  int n = node_name && t >= 0 ? rgi_add_node(g, node_name, op, nin, nout, attr) : -1;
  if (n < 0) return rgi_nomem(e);
  rgi_node *node = &g->node[n];
  for (int p = 0; p < op->nin; p++)
    if (nin[p]) node->in[node->in_begin[p]] = in[p];
  node->out[0] = t;
  node->backward = true;
  node->kind = RGI_GLUE;
  *out = t;
  return rgi_infer_node(g, n, NULL, e);
}

rg_status rgi_add_cast(rgi_backward *b, int x, rg_dtype dtype, const char *name, int of, int *out,
                       rg_error *e) {
  static const int choice[] = {
      [RG_F32] = 1, [RG_F16] = 2, [RG_BF16] = 3}; /* ops/cast.c: attribute "to" */
  rg_value to = {.i = choice[dtype], .set = true};
  int in[2] = {x, b->g->tensor[x].seqlens};
  return add_glue(b, "cast", &to, in, name, of, dtype, out, e);
}

static rg_status add_accumulate(rgi_backward *b, int acc, int x, int axis, int64_t start,
                                const char *name, int of, int *out, rg_error *e) {
  rg_value attr[2] = {{.i = axis < 0 ? 0 : axis, .set = true}, {.i = start, .set = true}};
  int in[2] = {acc, x};
  return add_glue(b, "accumulate", attr, in, name, of, RG_F32, out, e);
}

rg_status rgi_add_zero(rgi_backward *b, int like, bool begin_sum, rg_dtype dtype, const char *name,
                       int of, int *out, rg_error *e) {
  const rgi_tensor *t = &b->g->tensor[like];
  int64_t shape[RG_MAX_RANK];
  for (int d = 0; d < t->rank; d++) shape[d] = t->dim[d].c;
  rg_value attr[] = {{.i = t->rank, .list = shape, .set = true}, {.i = begin_sum, .set = true}};
  return add_glue(b, "zero", attr, NULL, name, of, dtype, out, e);
}

/* ---- rules' view of it ---- */

bool rgi_bwd_wants(const rgi_backward *b, int node, int i) {
  int t = b->g->node[node].in[i];
  return t >= 0 && b->flows[t];
}

rg_status rgi_bwd_node(rgi_backward *b, int node, const char *op_name, const rg_value *attr,
                       const int *in, const int *count, const char *suffix, int nout, int *out,
                       rg_error *e) {
  rgi_graph *g = b->g;
  const rg_op *op = rgi_find_op(g->ctx, op_name);
  char *name = rgi_format(g->arena, "%s%s", g->node[node].name, suffix);
  int n = name ? rgi_add_node(g, name, op, count, &nout, attr) : -1;
  if (n < 0) return rgi_nomem(e);
  rgi_node *made = &g->node[n];
  memcpy(made->in, in, (size_t)rgi_nin(made) * sizeof *in);
  made->backward = true;
  made->kind = RGI_GLUE;
  made->origin = g->node[node].origin;
  made->group = g->node[node].group;
  for (int i = 0; i < nout; i++) {
    out[i] = rgi_add_gradient(b, name, -1, RG_F32);
    if (out[i] < 0) return rgi_nomem(e);
    g->node[n].out[i] = out[i];
  }
  return rgi_infer_node(g, n, NULL, e);
}

rg_status rgi_bwd_unary(rgi_backward *b, const char *op, const rg_value *attr, int input,
                        const char *suffix, int *output, rg_error *e) {
  char *name = rgi_format(b->g->arena, "%s%s", b->g->tensor[input].name, suffix);
  if (!name) return rgi_nomem(e);
  int in[2] = {input, -1};
  return add_glue(b, op, attr, in, name, -1, b->g->tensor[input].dtype, output, e);
}

bool rgi_is_dense(const rgi_tensor *t) {
  int64_t stride = 1;
  for (int i = t->rank - 1; i >= 0; i--) {
    if (t->dim[i].c != 1 && t->stride[i] != stride) return false;
    stride *= t->dim[i].c;
  }
  return true;
}

rg_status rgi_bwd_dense(rgi_backward *b, int tensor, int *out, rg_error *e) {
  *out = tensor;
  if (rgi_is_dense(&b->g->tensor[tensor])) return RG_OK;
  char *name = rgi_format(b->g->arena, "%s.dense", b->g->tensor[tensor].name);
  if (!name) return rgi_nomem(e);
  return rgi_add_cast(b, tensor, b->g->tensor[tensor].dtype, name, b->g->tensor[tensor].grad_of,
                      out, e);
}

/* Is it the caller's memory? Then its dead rows may hold anything. */
static bool foreign(const rgi_graph *g, int t) {
  return g->tensor[rgi_owner(g, t)].producer < 0;
}

rg_status rgi_bwd_live(rgi_backward *b, int tensor, int *out, rg_error *e) {
  *out = tensor;
  if (!foreign(b->g, tensor) || b->g->tensor[tensor].seqlens < 0) return RG_OK;
  char *name = rgi_format(b->g->arena, "%s.live", b->g->tensor[tensor].name);
  if (!name) return rgi_nomem(e);
  return rgi_add_cast(b, tensor, b->g->tensor[tensor].dtype, name, b->g->tensor[tensor].grad_of,
                      out, e);
}

rg_status rgi_bwd_masked(rgi_backward *b, int tensor, int lengths, int *out, rg_error *e) {
  char *name = rgi_format(b->g->arena, "%s.live", b->g->tensor[tensor].name);
  if (!name) return rgi_nomem(e);
  int in[2] = {tensor, lengths};
  return add_glue(b, "live", NULL, in, name, b->g->tensor[tensor].grad_of,
                  b->g->tensor[tensor].dtype, out, e);
}

rg_status rgi_bwd_cut(rgi_backward *b, int node, rg_error *e) {
  int gradient = rgi_bwd_gradient(b, node, 0), part;
  int parts = b->g->node[node].in_begin[1];
  int64_t start = 0;
  for (int i = 0; i < parts && gradient >= 0; i++) {
    const rgi_node *n = &b->g->node[node];
    int64_t axis = n->attr[0].i, size = b->g->tensor[n->in[i]].dim[axis].c;
    if (rgi_bwd_wants(b, node, i)) {
      char suffix[24];
      snprintf(suffix, sizeof suffix, ".cut%d", i);
      rg_value attr[] = {
          {.i = axis, .set = true}, {.i = start, .set = true}, {.i = start + size, .set = true}};
      RGI_TRY(rgi_bwd_unary(b, "slice", attr, gradient, suffix, &part, e));
      RGI_TRY(rgi_bwd_give(b, node, i, part, -1, 0, e));
    }
    start += size;
  }
  return RG_OK;
}

/* ---- sums ---- */

/* The dtype that t's gradient has in the end. */
static rg_dtype final_dtype(const rgi_graph *g, int t) {
  const int n = g->tensor[t].producer;
  const rgi_rules *rules = n < 0 ? NULL : g->node[n].op->rules;
  return rules && rules->wide ? RG_F32 : g->tensor[t].dtype;
}

/* Name of the next version of t's gradient; the last one is "d.T". */
static char *version_name(rgi_backward *b, int t, bool last) {
  rgi_arena *a = b->g->arena;
  const char *name = b->g->tensor[t].name;
  return last ? rgi_format(a, "d.%s", name) : rgi_format(a, "d.%s.sum%d", name, b->sums[t].arrived);
}

/* After this arrival a chain is complete and needs no cast. */
static bool last_version(const rgi_backward *b, int t) {
  const rgi_sum *s = &b->sums[t];
  return s->arrived + 1 == s->slots &&
         (s->how == RGI_SINGLE || final_dtype(b->g, t) == RG_F32 || s->initial >= 0);
}

static rg_status push_part(rgi_backward *b, int t, rgi_part p, rg_error *e) {
  rgi_sum *s = &b->sums[t];
  if (!s->parts) s->parts = rgi_alloc_n(b->g->arena, (size_t)s->slots, sizeof *s->parts);
  if (!s->parts) return rgi_nomem(e);
  if (s->nparts >= s->slots)
    return rgi_fail(e, RG_E_INTERNAL, NULL, b->g->tensor[t].name, "more gradients than slots");
  p.serial = s->arrived++;
  s->parts[s->nparts++] = p;
  return RG_OK;
}

static int64_t clamp(int64_t x, int64_t most) {
  return x < 0 ? 0 : x > most ? most : x;
}

/* What arrives at a joined tensor goes to its parts, to each its share; an empty one where a slice
   misses it.
 */
static rg_status arrive_at_parts(rgi_backward *b, int join, int gradient, int node, int axis,
                                 int64_t start, rg_error *e) {
  int64_t low = 0; /* where the part starts */
  int cut = (int)b->g->node[join].attr[0].i;
  for (int i = 0; i < rgi_nin(&b->g->node[join]); i++) {
    int to = b->g->node[join].in[i], share;
    int64_t size = b->g->tensor[to].dim[cut].c, extent = b->g->tensor[gradient].dim[cut].c;
    int64_t offset = axis == cut ? start : 0; /* of the gradient in the whole */
    int64_t from = clamp(low - offset, extent), stop = clamp(low + size - offset, extent);
    rg_value attr[] = {{.i = cut, .set = true}, {.i = from, .set = true}, {.i = stop, .set = true}};
    char suffix[24];
    snprintf(suffix, sizeof suffix, ".g%d", i);
    RGI_TRY(rgi_bwd_unary(b, "slice", attr, gradient, suffix, &share, e));
    RGI_TRY(rgi_sum_arrive(b, to, share, node, axis,
                           axis == cut ? clamp(offset + from - low, size) : start, e));
    low += size;
  }
  return RG_OK;
}

rg_status rgi_sum_arrive(rgi_backward *b, int t, int gradient, int node, int axis, int64_t start,
                         rg_error *e) {
  rgi_sum *s = &b->sums[t];
  rgi_graph *g = b->g;
  /* it covers t's rows, unless it is a slice of them: those past the live ones are dead in it
   * too */
  if (axis != 0 && g->tensor[gradient].seqlens < 0)
    g->tensor[gradient].seqlens = g->tensor[t].seqlens;
  if (s->whole >= 0)
    return rgi_sum_arrive(b, s->whole, gradient, node, s->whole_axis, s->whole_start, e);
  if (s->join >= 0) return arrive_at_parts(b, s->join, gradient, node, axis, start, e);
  if (s->how == RGI_SINGLE) {
    s->tensor = gradient;
    s->arrived++;
    return RG_OK;
  }
  if (s->how == RGI_CHAIN) {
    char *name = version_name(b, t, last_version(b, t));
    if (!name) return rgi_nomem(e);
    int so_far = s->tensor >= 0 ? s->tensor : s->initial;
    if (so_far >= 0) RGI_TRY(rgi_bwd_live(b, gradient, &gradient, e));
    if (so_far < 0)
      RGI_TRY(rgi_add_cast(b, gradient, RG_F32, name, t, &s->tensor, e));
    else
      RGI_TRY(add_accumulate(b, so_far, gradient, -1, 0, name, t, &s->tensor, e));
    b->sums[t].arrived++;
    return RG_OK;
  }
  if (foreign(g, gradient)) { /* a part must own its bytes, in case it is joined */
    char *copy = rgi_format(g->arena, "%s.part%d", g->tensor[t].name, s->arrived);
    if (!copy) return rgi_nomem(e);
    RGI_TRY(rgi_add_cast(b, gradient, g->tensor[gradient].dtype, copy, -1, &gradient, e));
  }
  rgi_part p = {.rank = node < 0 ? INT_MAX : g->node[node].rank,
                .tensor = gradient,
                .node = node,
                .axis = axis,
                .start = start};
  return push_part(b, t, p, e);
}

void rgi_sum_prepare(const rgi_backward *b, rgi_grad_term *x) {
  const rgi_sum *s = &b->sums[x->tensor];
  x->dtype = s->how == RGI_SINGLE ? final_dtype(b->g, x->tensor) : RG_F32;
  x->so_far = -1;
  if (s->how == RGI_CHAIN) x->so_far = s->tensor >= 0 ? s->tensor : s->initial;
  if (s->how != RGI_PARTS || !x->shared) return;
  for (int i = 0; i < s->nparts && x->so_far < 0; i++) {
    const rgi_part *p = &s->parts[i];
    if (p->shared && p->rank == b->g->node[x->node].rank && p->slot == x->slot &&
        p->node != x->node)
      x->so_far = p->tensor;
  }
}

char *rgi_sum_name(rgi_backward *b, const rgi_grad_term *x, const char *port) {
  const rgi_sum *s = &b->sums[x->tensor];
  if (s->how != RGI_PARTS && !x->apart)
    return version_name(b, x->tensor, last_version(b, x->tensor));
  return rgi_format(b->g->arena, "d.%s.part%d.%s", b->g->tensor[x->tensor].name, s->arrived, port);
}

rg_status rgi_sum_book(rgi_backward *b, const rgi_grad_term *x, int made, rg_error *e) {
  rgi_sum *s = &b->sums[x->tensor];
  if (rgi_relays(s) || x->apart) return rgi_sum_arrive(b, x->tensor, made, x->node, -1, 0, e);
  if (s->how == RGI_PARTS) {
    for (int k = 0; k < s->nparts; k++) /* the next version of a shared weight's sum */
      if (x->so_far >= 0 && s->parts[k].tensor == x->so_far) {
        s->parts[k].tensor = made;
        s->parts[k].node = x->node;
        s->arrived++;
        return RG_OK;
      }
    return push_part(b, x->tensor,
                     (rgi_part){.rank = b->g->node[x->node].rank,
                                .tensor = made,
                                .node = x->node,
                                .axis = -1,
                                .shared = x->shared,
                                .slot = x->slot},
                     e);
  }
  s->tensor = made;
  s->arrived++;
  return RG_OK;
}

rg_status rgi_bwd_give(rgi_backward *b, int node, int i, int gradient, int axis, int64_t start,
                       rg_error *e) {
  int t = b->g->node[node].in[i];
  if (t < 0 || !b->flows[t]) return RG_OK;
  return rgi_sum_arrive(b, t, gradient, node, axis, start, e);
}

rg_status rgi_bwd_hand_over(rgi_backward *b, int node, int i, int gradient, rg_error *e) {
  const int t = b->g->node[node].in[i];
  rgi_tensor *x = &b->g->tensor[gradient];
  rgi_sum *s = t < 0 ? NULL : &b->sums[t];
  if (!s || !b->flows[t] || s->how != RGI_CHAIN || rgi_relays(s) || s->tensor >= 0 ||
      s->initial >= 0 || x->dtype != RG_F32 || x->base >= 0)
    return rgi_bwd_give(b, node, i, gradient, -1, 0, e);
  if (x->seqlens < 0) x->seqlens = b->g->tensor[t].seqlens;
  s->tensor = gradient;
  s->arrived++;
  return RG_OK;
}

/* Do the parts tile t along one axis, all in t's dtype? Sorts them by start if so. */
static int by_start(const void *x, const void *y) {
  int64_t a = ((const rgi_part *)x)->start, b = ((const rgi_part *)y)->start;
  return (a > b) - (a < b);
}
static int by_rank(const void *x, const void *y) { /* last reader first; then as they came */
  const rgi_part *a = x, *b = y;
  if (a->rank != b->rank) return a->rank < b->rank ? 1 : -1;
  return (a->serial > b->serial) - (a->serial < b->serial);
}
static bool tiles(const rgi_graph *g, int t, rgi_part *p, int n) {
  int axis = n ? p[0].axis : -1;
  if (axis < 0) return false;
  for (int i = 0; i < n; i++)
    if (p[i].axis != axis || g->tensor[p[i].tensor].dtype != final_dtype(g, t)) return false;
  qsort(p, (size_t)n, sizeof *p, by_start);
  int64_t at = 0;
  for (int i = 0; i < n; i++) {
    if (p[i].start != at) return false;
    at += g->tensor[p[i].tensor].dim[axis].c;
  }
  return at == g->tensor[t].dim[axis].c;
}

/* May x's bytes be placed inside another tensor? Only if it owns them and nothing else looks into
 * them. */
static bool may_move(const rgi_graph *g, int x) {
  if (g->tensor[x].base >= 0 || g->tensor[x].producer < 0) return false;
  for (int t = 0; t < g->ntensor; t++)
    if (g->tensor[t].base == x) return false;
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].grad >= 0 && rgi_owner(g, g->input[i].grad) == x) return false;
  return true;
}

static rg_status join_parts(rgi_backward *b, int t, rg_error *e) {
  rgi_sum *s = &b->sums[t];
  rgi_graph *g = b->g;
  for (int i = 0; i < s->nparts; i++) {
    bool movable = may_move(g, s->parts[i].tensor);
    for (int j = 0; j < i; j++) movable = movable && s->parts[j].tensor != s->parts[i].tensor;
    if (movable) continue;
    char *name = rgi_format(g->arena, "d.%s.part%d", g->tensor[t].name, i);
    if (!name) return rgi_nomem(e);
    RGI_TRY(
        rgi_add_cast(b, s->parts[i].tensor, final_dtype(g, t), name, -1, &s->parts[i].tensor, e));
  }
  const rg_op *op = rgi_find_op(g->ctx, "join");
  char *name = rgi_format(g->arena, "d.%s", g->tensor[t].name);
  char *node_name = rgi_format(g->arena, "d.%s.join", g->tensor[t].name);
  rg_value axis = {.i = s->parts[0].axis, .set = true};
  int whole = name ? rgi_add_gradient(b, name, t, final_dtype(g, t)) : -1;
  int n =
      node_name && whole >= 0 ? rgi_add_node(g, node_name, op, &s->nparts, &(int){1}, &axis) : -1;
  if (n < 0) return rgi_nomem(e);
  rgi_node *node = &g->node[n];
  for (int i = 0; i < s->nparts; i++) node->in[i] = s->parts[i].tensor;
  node->out[0] = whole;
  node->backward = true;
  node->kind = RGI_GLUE;
  s->result = whole;
  return rgi_infer_node(g, n, NULL, e);
}

static rg_status add_parts(rgi_backward *b, int t, rg_error *e) {
  rgi_sum *s = &b->sums[t];
  rgi_arena *a = b->g->arena;
  int acc = s->initial;
  if (acc < 0) {
    char *name = rgi_format(a, "d.%s.sum", b->g->tensor[t].name);
    if (!name) return rgi_nomem(e);
    RGI_TRY(rgi_add_zero(b, t, true, RG_F32, name, t, &acc, e));
  }
  qsort(s->parts, (size_t)s->nparts, sizeof *s->parts, by_rank);
  bool exact = final_dtype(b->g, t) == RG_F32 || s->initial >= 0;
  for (int i = 0; i < s->nparts; i++) {
    bool last = i + 1 == s->nparts && exact;
    char *name = last ? rgi_format(a, "d.%s", b->g->tensor[t].name)
                      : rgi_format(a, "d.%s.sum%d", b->g->tensor[t].name, i);
    if (!name) return rgi_nomem(e);
    RGI_TRY(add_accumulate(b, acc, s->parts[i].tensor, s->parts[i].axis, s->parts[i].start, name, t,
                           &acc, e));
  }
  b->sums[t].tensor = acc;
  return RG_OK;
}

rg_status rgi_sum_finish(rgi_backward *b, int t, int *out, rg_error *e) {
  rgi_sum *s = &b->sums[t];
  if (!s->done) {
    s->done = true;
    s->result = -1;
    if (s->arrived && s->how == RGI_PARTS) {
      if (s->initial < 0 && tiles(b->g, t, s->parts, s->nparts))
        RGI_TRY(join_parts(b, t, e));
      else
        RGI_TRY(add_parts(b, t, e));
    }
    s = &b->sums[t];
    if (s->result < 0 && s->tensor >= 0) {
      s->result = s->tensor;
      rg_dtype want = final_dtype(b->g, t);
      if (s->initial < 0 && b->g->tensor[s->tensor].dtype != want) {
        char *name = version_name(b, t, true);
        if (!name) return rgi_nomem(e);
        RGI_TRY(rgi_add_cast(b, s->tensor, want, name, t, &s->result, e));
      }
    }
  }
  *out = b->sums[t].result;
  return RG_OK;
}

int rgi_bwd_gradient(rgi_backward *b, int node, int i) {
  int t = b->g->node[node].out[i];
  return t < 0 || !b->sums[t].done ? -1 : b->sums[t].result; /* finished before the rule runs */
}
