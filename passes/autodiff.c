/* passes/autodiff.c: appends the backward nodes that the requested gradients need.
 *
 * Forward nodes are walked last to first. A node that a gradient reaches gets its backward op
 * (ports matched by name, see regraph/op.h) or runs its structural rule (autodiff.h). What arrives
 * at a tensor is one of its *slots*; how many will arrive is counted beforehand, because it decides
 * how they are summed:
 *
 *   single   one slot: it is the gradient, in the tensor's dtype
 *   chain    several, arriving in the order of the forward graph, last reader first: the first is
 *            stored in fp32, each later op adds to it in place ("acc.x"), one cast at the end
 *   parts    anything else. Slices that tile the tensor are joined where they were written; other
 *            mixtures are kept apart in fp32 and added up at the end in order of rank
 *
 * Rank is a node's place before a head split, so all three add the terms of an element in the same
 * order whether the graph is split or not: the bits agree. A weight that several heads share is
 * summed by its op head by head, last head first; if several nodes use it, each has a sum of its own
 * first (parts).
 *
 * Where a head split left a tensor in two forms that are both read, one form holds the sum and the
 * other relays what arrives, term by term (a sum of sums would round differently):
 *
 *   read whole and in slices                  slice -> whole
 *   made in parts, read in parts and joined   whole -> parts
 */
#include "passes.h"
#include "../graph/autodiff.h"
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum strategy { SINGLE, CHAIN, PARTS } strategy;

typedef struct part {
  int rank, tensor, node; /* node: forward node that gave it, -1: the incoming gradient */
  int axis;               /* slice axis, or -1: the whole tensor */
  int64_t start;
  int serial;  /* order of arrival */
  bool shared; /* a weight's sum that later head groups add to … */
  int slot;    /* … on the same flat input */
} part;

typedef struct sum {
  strategy how;
  int slots, arrived;
  int last_rank, last_node; /* while counting */
  bool partial, disorder, shared, several_ranks;
  int initial; /* the caller's fp32 buffer to add to, or -1 */
  int tensor;  /* single, chain: what there is so far, or -1 */
  part *parts;
  int nparts;
  bool done;
  int result; /* the finished gradient, or -1 */
  int whole;  /* relays what arrives to this tensor, as the slice that starts at whole_start on whole_axis; or
                 -1 */
  int whole_axis;
  int64_t whole_start;
  int join; /* relays what arrives to the parts that this node joins, or -1 */
} sum;

struct rgi_backward {
  rgi_graph *g;
  int nforward; /* forward nodes */
  int nprimal;  /* forward tensors */
  sum *sums;    /* per forward tensor */
  bool *needs;  /* its gradient is wanted, for itself or for something before it */
  bool *flows;  /* a gradient reaches it */
};

rgi_graph *rgi_bwd_graph(rgi_backward *b) {
  return b->g;
}

/* ---- which slots exist ---- */

static bool is_float(const rgi_graph *g, int t) {
  return g->tensor[t].dtype != RG_I32;
}

static int port_of(const int32_t *begin, int flat) {
  int p = 0;
  while (begin[p + 1] <= flat) p++;
  return p;
}

/* Port of the backward op that carries the gradient of in-port p, or -1. */
static int gradient_port(const rg_op *backward, const rg_op *op, int p) {
  char name[72];
  snprintf(name, sizeof name, "d.%s", op->in[p].name);
  return rgi_out_port(backward, name);
}

static bool differentiable(const rgi_graph *g, const rgi_node *n, int i) {
  if (n->in[i] < 0 || !is_float(g, n->in[i])) return false;
  if (n->op->rules && n->op->rules->backward) return true;
  if (!n->op->backward) return false;
  const rg_op *backward = rgi_find_op(g->ctx, n->op->backward);
  return backward && gradient_port(backward, n->op, port_of(n->in_begin, i)) >= 0;
}

static bool cut_by_heads(const rg_op *op) {
  for (int p = 0; p < op->nin; p++)
    if (op->in[p].head_axis >= 0) return true;
  return false;
}

static void count_slot(sum *s, int node, int rank, bool partial, bool shared) {
  if (s->slots > 0) {
    if (node == s->last_node || rank > s->last_rank) s->disorder = true;
    if (rank != s->last_rank) s->several_ranks = true;
  }
  s->slots++;
  s->last_node = node;
  s->last_rank = rank;
  s->partial = s->partial || partial;
  s->shared = s->shared || shared;
}

static bool relays(const sum *s) {
  return s->whole >= 0 || s->join >= 0;
}

/* Does input i of node n carry a gradient back, if one reaches the node? */
static bool gives(const rgi_backward *b, int n, int i) {
  const rgi_node *node = &b->g->node[n];
  return node->in[i] >= 0 && b->needs[node->in[i]] && differentiable(b->g, node, i);
}

static bool active(const rgi_backward *b, int n) {
  const rgi_node *node = &b->g->node[n];
  for (int i = 0; i < rgi_nout(node); i++)
    if (node->out[i] >= 0 && b->flows[node->out[i]]) return true;
  return false;
}

/* Fills needs and flows. */
static void find_flows(rgi_backward *b) {
  const rgi_graph *g = b->g;
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].want != RGI_GRAD_NONE) b->needs[g->input[i].tensor] = true;
  for (int n = 0; n < b->nforward; n++) {
    const rgi_node *node = &g->node[n];
    bool any = false;
    for (int i = 0; i < rgi_nin(node); i++) any = any || gives(b, n, i);
    for (int i = 0; i < rgi_nout(node) && any; i++)
      if (node->out[i] >= 0 && is_float(g, node->out[i])) b->needs[node->out[i]] = true;
  }
  for (int i = 0; i < g->noutput; i++)
    if (b->needs[g->output[i].tensor]) b->flows[g->output[i].tensor] = true;
  for (int n = b->nforward - 1; n >= 0; n--)
    for (int i = 0; i < rgi_nin(&g->node[n]) && active(b, n); i++)
      if (gives(b, n, i)) b->flows[g->node[n].in[i]] = true;
}

/* Decides which slices and joins of a head split relay. */
static rg_status choose_relays(rgi_backward *b, rg_error *e) {
  const rgi_graph *g = b->g;
  bool *met =
      rgi_alloc_n(g->arena, (size_t)b->nprimal, sizeof *met); /* a gradient that no split made arrives here */
  if (!met) return rgi_nomem(e);
  for (int t = 0; t < b->nprimal; t++) {
    b->sums[t].whole = b->sums[t].join = -1;
    met[t] = b->sums[t].initial >= 0;
  }
  for (int i = 0; i < g->noutput; i++) met[g->output[i].tensor] = true;
  for (int n = 0; n < b->nforward; n++)
    for (int i = 0; i < rgi_nin(&g->node[n]) && g->node[n].kind != RGI_GLUE && active(b, n); i++)
      if (gives(b, n, i)) met[g->node[n].in[i]] = true;
  for (int n = 0; n < b->nforward; n++) {
    const rgi_node *node = &g->node[n];
    if (node->kind != RGI_GLUE || !active(b, n)) continue;
    sum *s = &b->sums[node->out[0]];
    if (!node->op->rules->partial) {
      for (int i = 0; i < rgi_nin(node); i++)
        if (met[node->in[i]]) s->join = n;
    } else if (met[node->in[0]]) {
      s->whole = node->in[0];
      s->whole_axis = (int)node->attr[0].i;
      s->whole_start = node->attr[1].i;
    }
  }
  return RG_OK;
}

/* A gradient will arrive at t. */
static void count(rgi_backward *b, int t, int n, int rank, bool partial, bool shared) {
  sum *s = &b->sums[t];
  if (s->whole >= 0) {
    count_slot(&b->sums[s->whole], n, rank, true, shared);
  } else if (s->join >= 0) {
    const rgi_node *join = &b->g->node[s->join];
    for (int i = 0; i < rgi_nin(join); i++) count_slot(&b->sums[join->in[i]], n, rank, partial, shared);
  } else {
    count_slot(s, n, rank, partial, shared);
  }
}

/* Fills needs, flows and the sums' strategies. */
static rg_status survey(rgi_backward *b, rg_error *e) {
  const rgi_graph *g = b->g;
  find_flows(b);
  RGI_TRY(choose_relays(b, e));
  for (int i = 0; i < g->noutput; i++)
    if (b->needs[g->output[i].tensor]) count(b, g->output[i].tensor, -1, INT_MAX, false, false);
  for (int n = b->nforward - 1; n >= 0; n--) {
    const rgi_node *node = &g->node[n];
    if (node->kind == RGI_GLUE && relays(&b->sums[node->out[0]])) continue;
    for (int i = 0; i < rgi_nin(node) && active(b, n); i++) {
      if (!gives(b, n, i)) continue;
      bool partial = node->op->rules && node->op->rules->partial;
      bool shared = cut_by_heads(node->op) && node->op->in[port_of(node->in_begin, i)].head_axis < 0;
      int gifts = partial ? 0 : 1; /* a split gives one part per output that a gradient reaches */
      for (int o = 0; partial && o < rgi_nout(node); o++)
        gifts += node->out[o] >= 0 && b->flows[node->out[o]];
      for (int k = 0; k < gifts; k++) count(b, node->in[i], n, node->rank, partial, shared);
    }
  }
  for (int t = 0; t < b->nprimal; t++) {
    sum *s = &b->sums[t];
    if (relays(s) || s->partial || s->disorder || (s->shared && s->several_ranks))
      s->how = PARTS;
    else
      s->how = s->slots > 1 || s->initial >= 0 ? CHAIN : SINGLE;
  }
  return RG_OK;
}

/* ---- small builders ---- */

/* -1 on NOMEM */
static int add_gradient_tensor(rgi_backward *b, const char *name, int of, rg_dtype dtype) {
  name = rgi_free_name(b->g, name); /* one gradient may reach several views or sums */
  if (!name) return -1;
  rgi_tensor t = {.name = name, .dtype = dtype, .base = -1, .producer = -1, .seqlens = -1, .grad_of = of};
  if (of >= 0) t.seqlens = b->g->tensor[of].seqlens;
  return rgi_add_tensor(b->g, &t);
}

/* One node with at most one tensor (in[i] >= 0) on each of its at most two in-ports
 * and one output, which is created. */
static rg_status add_glue(rgi_backward *b, const char *op_name, const rg_value *attr, const int *in,
                          const char *name, int of, rg_dtype dtype, int *out, rg_error *e) {
  rgi_graph *g = b->g;
  const rg_op *op = rgi_find_op(g->ctx, op_name);
  int nin[2] = {0, 0}, nout[1] = {1};
  for (int p = 0; p < op->nin; p++) nin[p] = in[p] >= 0;
  int t = add_gradient_tensor(b, name, of, dtype);
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

/* A dense copy in `dtype`; rows past the live ones become zero. */
static rg_status add_cast(rgi_backward *b, int x, rg_dtype dtype, const char *name, int of, int *out,
                          rg_error *e) {
  static const int choice[] = {[RG_F32] = 1, [RG_F16] = 2, [RG_BF16] = 3}; /* ops/cast.c: attribute "to" */
  rg_value to = {.i = choice[dtype], .set = true};
  int in[2] = {x, b->g->tensor[x].seqlens};
  return add_glue(b, "cast", &to, in, name, of, dtype, out, e);
}

static rg_status add_accumulate(rgi_backward *b, int acc, int x, int axis, int64_t start, const char *name,
                                int of, int *out, rg_error *e) {
  rg_value attr[2] = {{.i = axis < 0 ? 0 : axis, .set = true}, {.i = start, .set = true}};
  int in[2] = {acc, x};
  return add_glue(b, "accumulate", attr, in, name, of, RG_F32, out, e);
}

static rg_status add_zero(rgi_backward *b, int like, bool begin_sum, rg_dtype dtype, const char *name, int of,
                          int *out, rg_error *e) {
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

rg_status rgi_bwd_unary(rgi_backward *b, const char *op, const rg_value *attr, int input, const char *suffix,
                        int *output, rg_error *e) {
  char *name = rgi_format(b->g->arena, "%s%s", b->g->tensor[input].name, suffix);
  if (!name) return rgi_nomem(e);
  int in[2] = {input, -1};
  return add_glue(b, op, attr, in, name, -1, b->g->tensor[input].dtype, output, e);
}

static bool is_dense(const rgi_tensor *t) {
  int64_t stride = 1;
  for (int i = t->rank - 1; i >= 0; i--) {
    if (t->dim[i].c != 1 && t->stride[i] != stride) return false;
    stride *= t->dim[i].c;
  }
  return true;
}

rg_status rgi_bwd_dense(rgi_backward *b, int tensor, int *out, rg_error *e) {
  *out = tensor;
  if (is_dense(&b->g->tensor[tensor])) return RG_OK;
  char *name = rgi_format(b->g->arena, "%s.dense", b->g->tensor[tensor].name);
  if (!name) return rgi_nomem(e);
  return add_cast(b, tensor, b->g->tensor[tensor].dtype, name, b->g->tensor[tensor].grad_of, out, e);
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
  return add_cast(b, tensor, b->g->tensor[tensor].dtype, name, b->g->tensor[tensor].grad_of, out, e);
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

/* Name of the next version of t's gradient; the last one is "d.T". */
static char *version_name(rgi_backward *b, int t, bool last) {
  rgi_arena *a = b->g->arena;
  const char *name = b->g->tensor[t].name;
  return last ? rgi_format(a, "d.%s", name) : rgi_format(a, "d.%s.sum%d", name, b->sums[t].arrived);
}

/* After this arrival a chain is complete and needs no cast. */
static bool last_version(const rgi_backward *b, int t) {
  const sum *s = &b->sums[t];
  return s->arrived + 1 == s->slots &&
         (s->how == SINGLE || b->g->tensor[t].dtype == RG_F32 || s->initial >= 0);
}

static rg_status push_part(rgi_backward *b, int t, part p, rg_error *e) {
  sum *s = &b->sums[t];
  if (!s->parts) s->parts = rgi_alloc_n(b->g->arena, (size_t)s->slots, sizeof *s->parts);
  if (!s->parts) return rgi_nomem(e);
  if (s->nparts >= s->slots)
    return rgi_fail(e, RG_E_INTERNAL, NULL, b->g->tensor[t].name, "more gradients than slots");
  p.serial = s->arrived++;
  s->parts[s->nparts++] = p;
  return RG_OK;
}

static rg_status arrive(rgi_backward *b, int t, int gradient, int node, int axis, int64_t start, rg_error *e);

static int64_t clamp(int64_t x, int64_t most) {
  return x < 0 ? 0 : x > most ? most : x;
}

/* What arrives at a joined tensor goes to its parts, to each its share; an empty
 * one where a slice misses it. */
static rg_status arrive_at_parts(rgi_backward *b, int join, int gradient, int node, int axis, int64_t start,
                                 rg_error *e) {
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
    RGI_TRY(arrive(b, to, share, node, axis, axis == cut ? clamp(offset + from - low, size) : start, e));
    low += size;
  }
  return RG_OK;
}

/* A finished tensor arrives at t. */
static rg_status arrive(rgi_backward *b, int t, int gradient, int node, int axis, int64_t start,
                        rg_error *e) {
  sum *s = &b->sums[t];
  rgi_graph *g = b->g;
  /* it covers t's rows, unless it is a slice of them: those past the live ones are dead in it too */
  if (axis != 0 && g->tensor[gradient].seqlens < 0) g->tensor[gradient].seqlens = g->tensor[t].seqlens;
  if (s->whole >= 0) return arrive(b, s->whole, gradient, node, s->whole_axis, s->whole_start, e);
  if (s->join >= 0) return arrive_at_parts(b, s->join, gradient, node, axis, start, e);
  if (s->how == SINGLE) {
    s->tensor = gradient;
    s->arrived++;
    return RG_OK;
  }
  if (s->how == CHAIN) {
    char *name = version_name(b, t, last_version(b, t));
    if (!name) return rgi_nomem(e);
    int so_far = s->tensor >= 0 ? s->tensor : s->initial;
    if (so_far >= 0) RGI_TRY(rgi_bwd_live(b, gradient, &gradient, e));
    if (so_far < 0)
      RGI_TRY(add_cast(b, gradient, RG_F32, name, t, &s->tensor, e));
    else
      RGI_TRY(add_accumulate(b, so_far, gradient, -1, 0, name, t, &s->tensor, e));
    b->sums[t].arrived++;
    return RG_OK;
  }
  if (foreign(g, gradient)) { /* a part must own its bytes, in case it is joined */
    char *copy = rgi_format(g->arena, "%s.part%d", g->tensor[t].name, s->arrived);
    if (!copy) return rgi_nomem(e);
    RGI_TRY(add_cast(b, gradient, g->tensor[gradient].dtype, copy, -1, &gradient, e));
  }
  part p = {.rank = node < 0 ? INT_MAX : g->node[node].rank,
            .tensor = gradient,
            .node = node,
            .axis = axis,
            .start = start};
  return push_part(b, t, p, e);
}

rg_status rgi_bwd_give(rgi_backward *b, int node, int i, int gradient, int axis, int64_t start, rg_error *e) {
  int t = b->g->node[node].in[i];
  if (t < 0 || !b->flows[t]) return RG_OK;
  return arrive(b, t, gradient, node, axis, start, e);
}

/* Do the parts tile t along one axis, all in t's dtype? Sorts them by start if so. */
static int by_start(const void *x, const void *y) {
  int64_t a = ((const part *)x)->start, b = ((const part *)y)->start;
  return (a > b) - (a < b);
}
static int by_rank(const void *x, const void *y) { /* last reader first; then as they came */
  const part *a = x, *b = y;
  if (a->rank != b->rank) return a->rank < b->rank ? 1 : -1;
  return (a->serial > b->serial) - (a->serial < b->serial);
}
static bool tiles(const rgi_graph *g, int t, part *p, int n) {
  int axis = n ? p[0].axis : -1;
  if (axis < 0) return false;
  for (int i = 0; i < n; i++)
    if (p[i].axis != axis || g->tensor[p[i].tensor].dtype != g->tensor[t].dtype) return false;
  qsort(p, (size_t)n, sizeof *p, by_start);
  int64_t at = 0;
  for (int i = 0; i < n; i++) {
    if (p[i].start != at) return false;
    at += g->tensor[p[i].tensor].dim[axis].c;
  }
  return at == g->tensor[t].dim[axis].c;
}

/* May x's bytes be placed inside another tensor? Only if it owns them and nothing else looks into them. */
static bool may_move(const rgi_graph *g, int x) {
  if (g->tensor[x].base >= 0 || g->tensor[x].producer < 0) return false;
  for (int t = 0; t < g->ntensor; t++)
    if (g->tensor[t].base == x) return false;
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].grad >= 0 && rgi_owner(g, g->input[i].grad) == x) return false;
  return true;
}

static rg_status join_parts(rgi_backward *b, int t, rg_error *e) {
  sum *s = &b->sums[t];
  rgi_graph *g = b->g;
  for (int i = 0; i < s->nparts; i++) {
    bool movable = may_move(g, s->parts[i].tensor);
    for (int j = 0; j < i; j++) movable = movable && s->parts[j].tensor != s->parts[i].tensor;
    if (movable) continue;
    char *name = rgi_format(g->arena, "d.%s.part%d", g->tensor[t].name, i);
    if (!name) return rgi_nomem(e);
    RGI_TRY(add_cast(b, s->parts[i].tensor, g->tensor[t].dtype, name, -1, &s->parts[i].tensor, e));
  }
  const rg_op *op = rgi_find_op(g->ctx, "join");
  char *name = rgi_format(g->arena, "d.%s", g->tensor[t].name);
  char *node_name = rgi_format(g->arena, "d.%s.join", g->tensor[t].name);
  rg_value axis = {.i = s->parts[0].axis, .set = true};
  int whole = name ? add_gradient_tensor(b, name, t, g->tensor[t].dtype) : -1;
  int n = node_name && whole >= 0 ? rgi_add_node(g, node_name, op, &s->nparts, &(int){1}, &axis) : -1;
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
  sum *s = &b->sums[t];
  rgi_arena *a = b->g->arena;
  int acc = s->initial;
  if (acc < 0) {
    char *name = rgi_format(a, "d.%s.sum", b->g->tensor[t].name);
    if (!name) return rgi_nomem(e);
    RGI_TRY(add_zero(b, t, true, RG_F32, name, t, &acc, e));
  }
  qsort(s->parts, (size_t)s->nparts, sizeof *s->parts, by_rank);
  bool exact = b->g->tensor[t].dtype == RG_F32 || s->initial >= 0;
  for (int i = 0; i < s->nparts; i++) {
    bool last = i + 1 == s->nparts && exact;
    char *name = last ? rgi_format(a, "d.%s", b->g->tensor[t].name)
                      : rgi_format(a, "d.%s.sum%d", b->g->tensor[t].name, i);
    if (!name) return rgi_nomem(e);
    RGI_TRY(
        add_accumulate(b, acc, s->parts[i].tensor, s->parts[i].axis, s->parts[i].start, name, t, &acc, e));
  }
  b->sums[t].tensor = acc;
  return RG_OK;
}

/* The finished gradient of forward tensor t in *out, or -1 if none arrived. */
static rg_status finish(rgi_backward *b, int t, int *out, rg_error *e) {
  sum *s = &b->sums[t];
  if (!s->done) {
    s->done = true;
    s->result = -1;
    if (s->arrived && s->how == PARTS) {
      if (s->initial < 0 && tiles(b->g, t, s->parts, s->nparts))
        RGI_TRY(join_parts(b, t, e));
      else
        RGI_TRY(add_parts(b, t, e));
    }
    s = &b->sums[t];
    if (s->result < 0 && s->tensor >= 0) {
      s->result = s->tensor;
      rg_dtype want = b->g->tensor[t].dtype;
      if (s->initial < 0 && b->g->tensor[s->tensor].dtype != want) {
        char *name = version_name(b, t, true);
        if (!name) return rgi_nomem(e);
        RGI_TRY(add_cast(b, s->tensor, want, name, t, &s->result, e));
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

/* ---- backward ops ---- */

typedef struct gradient_node {
  int forward; /* node */
  const rg_op *op;
  int nin[64], nout[64];
  int32_t *in, *out;
} gradient_node;

/* How many elements a port of the backward op has, and which tensor is element k: by the port's name. */
typedef enum source { FROM_INPUT, FROM_OUTPUT, FROM_GRADIENT, FROM_SUM, FROM_FUSE } source;

static source source_of(const char *port, const char **rest) {
  static const struct {
    const char *prefix;
    source from;
  } table[] = {{"out.", FROM_OUTPUT}, {"grad.", FROM_GRADIENT}, {"acc.", FROM_SUM}, {"delta.", FROM_FUSE}};
  for (int i = 0; i < RGI_COUNT(table); i++)
    if (strncmp(port, table[i].prefix, strlen(table[i].prefix)) == 0) {
      *rest = port + strlen(table[i].prefix);
      return table[i].from;
    }
  *rest = port;
  return FROM_INPUT;
}

/* The sum that the gradient of t, flat input `slot` of `node`, is added to inside the
 * op, or -1; *dtype: what it writes. */
static int running_sum(rgi_backward *b, int node, int slot, int t, bool shared, rg_dtype *dtype) {
  sum *s = &b->sums[t];
  *dtype = s->how == SINGLE ? b->g->tensor[t].dtype : RG_F32;
  if (s->how == CHAIN) return s->tensor >= 0 ? s->tensor : s->initial;
  if (s->how == PARTS && shared)
    for (int i = 0; i < s->nparts; i++) {
      const part *p = &s->parts[i];
      if (p->shared && p->rank == b->g->node[node].rank && p->slot == slot && p->node != node)
        return p->tensor;
    }
  return -1;
}

static rg_status fill_inputs(rgi_backward *b, const rgi_node *f, gradient_node *gn, rg_error *e) {
  const rgi_graph *g = b->g;
  int total = 0;
  for (int p = 0; p < gn->op->nin; p++) {
    const char *name;
    source from = source_of(gn->op->in[p].name, &name);
    int q = from == FROM_INPUT || from == FROM_SUM ? rgi_in_port(f->op, name) : rgi_out_port(f->op, name);
    if (q < 0)
      return rgi_fail(e, RG_E_INTERNAL, NULL, f->name, "port \"%s\" of %s matches nothing of %s",
                      gn->op->in[p].name, gn->op->name, f->op->name);
    const int32_t *begin = from == FROM_INPUT || from == FROM_SUM ? f->in_begin : f->out_begin;
    const int32_t *ids = from == FROM_INPUT || from == FROM_SUM ? f->in : f->out;
    int count = begin[q + 1] - begin[q], kept = 0;
    for (int k = 0; k < count; k++) {
      int t = ids[begin[q] + k], id = t;
      if (from == FROM_FUSE) {
        id = -1; /* bound by fuse.c, if at all */
      } else if (from == FROM_GRADIENT) {
        id = t < 0 ? -1 : b->sums[t].result;
        if (t >= 0 && id < 0 && !(gn->op->in[p].flags & RG_PORT_OPTIONAL)) {
          char *zero = rgi_format(g->arena, "d.%s.zero", g->tensor[t].name);
          if (!zero) return rgi_nomem(e);
          RGI_TRY(add_zero(b, t, false, g->tensor[t].dtype, zero, t, &id, e));
        }
      } else if (from == FROM_SUM) {
        rg_dtype dtype;
        int d = gradient_port(gn->op, f->op, q);
        bool shared = cut_by_heads(f->op) && f->op->in[q].head_axis < 0;
        id = t >= 0 && d >= 0 && b->flows[t] ? running_sum(b, gn->forward, begin[q] + k, t, shared, &dtype)
                                             : -1;
      }
      gn->in[total + k] = id;
      kept += id >= 0;
    }
    if (!kept) count = 0; /* an absent port */
    gn->nin[p] = count;
    total += count;
  }
  return RG_OK;
}

/* Creates the output tensors; *slot_input[i]: flat forward input that output i is the gradient of. */
static rg_status fill_outputs(rgi_backward *b, const rgi_node *f, gradient_node *gn, int *slot_input,
                              rg_error *e) {
  int total = 0;
  for (int p = 0; p < gn->op->nout; p++) {
    int q = rgi_in_port(f->op, gn->op->out[p].name + 2);
    if (q < 0)
      return rgi_fail(e, RG_E_INTERNAL, NULL, f->name, "port \"%s\" of %s matches nothing of %s",
                      gn->op->out[p].name, gn->op->name, f->op->name);
    gn->nout[p] = f->in_begin[q + 1] - f->in_begin[q];
    for (int k = 0; k < gn->nout[p]; k++) {
      int i = f->in_begin[q] + k, t = f->in[i], slot = total + k;
      gn->out[slot] = -1;
      slot_input[slot] = i;
      if (t < 0 || !b->flows[t]) continue;
      rg_dtype dtype;
      sum *s = &b->sums[t];
      bool shared = cut_by_heads(f->op) && f->op->in[q].head_axis < 0;
      int acc = running_sum(b, gn->forward, i, t, shared, &dtype);
      char acc_name[72];
      snprintf(acc_name, sizeof acc_name, "acc.%s", f->op->in[q].name);
      bool adds = acc < 0 || rgi_in_port(gn->op, acc_name) >= 0;
      char *name;
      if (s->how == PARTS || !adds)
        name = rgi_format(b->g->arena, "d.%s.part%d.%s", b->g->tensor[t].name, s->arrived,
                          gn->op->out[p].name + 2);
      else
        name = version_name(b, t, last_version(b, t));
      if (!name) return rgi_nomem(e);
      gn->out[slot] = add_gradient_tensor(b, name, t, dtype);
      if (gn->out[slot] < 0) return rgi_nomem(e);
    }
    total += gn->nout[p];
  }
  return RG_OK;
}

/* Output `made` of the new node, the gradient of forward input i of node n, joins its sum. */
static rg_status book(rgi_backward *b, int n, int i, int made, bool has_acc_port, rg_error *e) {
  const rgi_node *f = &b->g->node[n];
  int t = f->in[i], q = port_of(f->in_begin, i);
  sum *s = &b->sums[t];
  bool shared = cut_by_heads(f->op) && f->op->in[q].head_axis < 0;
  rg_dtype dtype;
  int acc = running_sum(b, n, i, t, shared, &dtype);
  if (relays(s) || (acc >= 0 && !has_acc_port))
    return arrive(b, t, made, n, -1, 0, e); /* the op cannot add there */
  if (s->how == PARTS) {
    for (int k = 0; k < s->nparts; k++)
      if (acc >= 0 && s->parts[k].tensor == acc) { /* the next version of a shared weight's sum */
        s->parts[k].tensor = made;
        s->parts[k].node = n;
        s->arrived++;
        return RG_OK;
      }
    return push_part(
        b, t, (part){.rank = f->rank, .tensor = made, .node = n, .axis = -1, .shared = shared, .slot = i}, e);
  }
  s->tensor = made;
  s->arrived++;
  return RG_OK;
}

static rg_status emit(rgi_backward *b, int n, rg_error *e) {
  rgi_graph *g = b->g;
  const rg_op *forward_op = g->node[n].op;
  const rg_op *op = rgi_find_op(g->ctx, forward_op->backward);
  if (!op)
    return rgi_fail(e, RG_E_INTERNAL, NULL, g->node[n].name,
                    "%s names a backward op \"%s\" that does not exist", forward_op->name,
                    forward_op->backward);
  gradient_node gn = {.forward = n, .op = op};
  /* lists on any port are no longer than the node's own; 4 kinds of ports may repeat them */
  size_t room = 8 * (size_t)(rgi_nin(&g->node[n]) + rgi_nout(&g->node[n])) + 64;
  gn.in = rgi_alloc_n(g->arena, room, sizeof *gn.in);
  gn.out = rgi_alloc_n(g->arena, room, sizeof *gn.out);
  int *slot_input = rgi_alloc_n(g->arena, room, sizeof *slot_input);
  if (!gn.in || !gn.out || !slot_input) return rgi_nomem(e);
  if (op->nin > RGI_COUNT(gn.nin) || op->nout > RGI_COUNT(gn.nout))
    return rgi_fail(e, RG_E_INTERNAL, NULL, g->node[n].name, "%s has too many ports", op->name);
  rgi_node f = g->node[n]; /* a copy: the array may move; its lists do not */
  RGI_TRY(fill_inputs(b, &f, &gn, e));
  RGI_TRY(fill_outputs(b, &f, &gn, slot_input, e));
  char *name = rgi_format(g->arena, "%s.bwd", f.name);
  int m =
      name ? rgi_add_node(g, name, op, gn.nin, gn.nout, op->nattr == forward_op->nattr ? f.attr : NULL) : -1;
  if (m < 0) return rgi_nomem(e);
  rgi_node *node = &g->node[m];
  memcpy(node->in, gn.in, (size_t)rgi_nin(node) * sizeof *node->in);
  memcpy(node->out, gn.out, (size_t)rgi_nout(node) * sizeof *node->out);
  node->backward = true;
  node->kind = RGI_GRADIENT;
  node->origin = f.origin;
  node->group = f.group;
  node->rank = f.rank;
  RGI_TRY(rgi_infer_node(g, m, NULL, e));
  for (int i = 0; i < rgi_nout(&g->node[m]); i++) {
    int made = g->node[m].out[i];
    if (made < 0) continue;
    char acc_name[72];
    snprintf(acc_name, sizeof acc_name, "acc.%s", forward_op->in[port_of(f.in_begin, slot_input[i])].name);
    RGI_TRY(book(b, n, slot_input[i], made, rgi_in_port(op, acc_name) >= 0, e));
  }
  return RG_OK;
}

/* ---- the pass ---- */

/* Incoming gradients of outputs, and the callers' buffers that gradients accumulate into: graph inputs. */
static rg_status add_sources(rgi_backward *b, rg_error *e) {
  rgi_graph *g = b->g;
  for (int t = 0; t < b->nprimal; t++) b->sums[t].initial = b->sums[t].tensor = b->sums[t].result = -1;
  for (int i = 0; i < g->ninput; i++) {
    if (g->input[i].want != RGI_GRAD_ACCUMULATE) continue;
    int of = g->input[i].tensor;
    char *name = rgi_format(g->arena, "main.%s", g->input[i].name);
    int t = name ? add_gradient_tensor(b, name, of, RG_F32) : -1;
    if (t < 0) return rgi_nomem(e);
    g->tensor[t].rank = g->tensor[of].rank;
    memcpy(g->tensor[t].dim, g->tensor[of].dim, sizeof g->tensor[t].dim);
    rgi_dense_strides(&g->tensor[t]);
    b->sums[of].initial = t;
  }
  return RG_OK;
}

static rg_status add_incoming(rgi_backward *b, rg_error *e) {
  rgi_graph *g = b->g;
  for (int i = 0; i < g->noutput; i++) {
    int of = g->output[i].tensor;
    g->output[i].grad = -1;
    if (!b->needs[of]) continue;
    char *name = rgi_format(g->arena, "grad.%s", g->output[i].name);
    int t = name ? add_gradient_tensor(b, name, of, g->tensor[of].dtype) : -1;
    if (t < 0) return rgi_nomem(e);
    g->tensor[t].rank = g->tensor[of].rank;
    memcpy(g->tensor[t].dim, g->tensor[of].dim, sizeof g->tensor[t].dim);
    rgi_dense_strides(&g->tensor[t]);
    g->output[i].grad = t;
    RGI_TRY(arrive(b, of, t, -1, -1, 0, e));
  }
  return RG_OK;
}

/* Gradients of inputs are the caller's memory: each needs dense bytes of its own. */
static rg_status deliver(rgi_backward *b, rgi_io *io, rg_error *e) {
  rgi_graph *g = b->g;
  int t;
  RGI_TRY(finish(b, io->tensor, &t, e));
  sum *s = &b->sums[io->tensor];
  if (s->initial >= 0) {
    io->grad = t >= 0 ? t : s->initial;
    return RG_OK;
  }
  const rgi_tensor *x = &g->tensor[io->tensor];
  char *name = rgi_format(g->arena, "d.%s.out", io->name);
  if (!name) return rgi_nomem(e);
  if (t < 0) {
    RGI_TRY(add_zero(b, io->tensor, false, x->dtype, name, io->tensor, &t, e));
  } else {
    const rgi_tensor *d = &g->tensor[t];
    int owner = rgi_owner(g, t); /* another tensor where t is the last version of a sum */
    bool own = g->tensor[owner].producer >= 0 && is_dense(d) && d->offset == 0 &&
               rgi_elements(d) == rgi_elements(&g->tensor[owner]) &&
               g->tensor[owner].seqlens == x->seqlens; /* else its dead rows may hold anything */
    for (int i = 0; i < g->ninput; i++)
      own = own && (g->input[i].grad < 0 || rgi_owner(g, g->input[i].grad) != owner);
    for (int i = 0; i < g->noutput; i++) own = own && rgi_owner(g, g->output[i].tensor) != owner;
    if (!own) RGI_TRY(add_cast(b, t, x->dtype, name, io->tensor, &t, e));
  }
  io->grad = t;
  return RG_OK;
}

static rg_status differentiate(rgi_backward *b, rg_error *e) {
  rgi_graph *g = b->g;
  RGI_TRY(add_sources(b, e));
  RGI_TRY(survey(b, e));
  RGI_TRY(add_incoming(b, e));
  for (int n = b->nforward - 1; n >= 0; n--) {
    bool reached = false;
    for (int i = 0; i < rgi_nout(&g->node[n]); i++) {
      int t = g->node[n].out[i], done;
      if (t < 0 || !b->flows[t]) continue;
      RGI_TRY(finish(b, t, &done, e));
      reached = reached || done >= 0;
    }
    bool wanted = false;
    for (int i = 0; i < rgi_nin(&g->node[n]); i++)
      wanted = wanted || (differentiable(g, &g->node[n], i) && b->flows[g->node[n].in[i]]);
    if (!reached || !wanted) continue;
    const rgi_rules *rules = g->node[n].op->rules;
    if (rules && rules->backward)
      RGI_TRY(rules->backward(b, n, e));
    else
      RGI_TRY(emit(b, n, e));
  }
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].want != RGI_GRAD_NONE) RGI_TRY(deliver(b, &g->input[i], e));
  return RG_OK;
}

rg_status rgi_autodiff(const rgi_graph *forward, rgi_graph **out, rg_error *e) {
  rgi_graph *g;
  *out = NULL;
  RGI_TRY(rgi_graph_clone(forward, &g, e));
  rg_status status = RG_OK;
  for (int i = 0; i < g->ninput; i++) g->input[i].grad = -1;
  for (int i = 0; i < g->noutput; i++) g->output[i].grad = -1;
  RGI_GOTO(status, rgi_prune(g, e), fail);
  rgi_backward b = {.g = g, .nforward = g->nnode, .nprimal = g->ntensor};
  b.sums = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *b.sums);
  b.needs = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *b.needs);
  b.flows = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *b.flows);
  if (!b.sums || !b.needs || !b.flows) {
    status = rgi_nomem(e);
    goto fail;
  }
  bool any = false;
  for (int i = 0; i < g->ninput; i++) any = any || g->input[i].want != RGI_GRAD_NONE;
  if (any) RGI_GOTO(status, differentiate(&b, e), fail);
  RGI_GOTO(status, rgi_prune(g, e), fail);
  RGI_GOTO(status, rgi_verify(g, "autodiff", e), fail);
  *out = g;
  return RG_OK;
fail:
  rgi_graph_destroy(g);
  return status;
}
