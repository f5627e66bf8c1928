/* graph/lengths.c: row lengths: tensors whose axis 0 is the same packed token axis share one
 * lengths tensor.
 *
 * Ports say which axes are the same (RG_PORT_ROWS, RG_PORT_KROWS); views that keep axis 0 do too.
 * A spec names the lengths in one node, and every op of the class that takes lengths is handed
 * them here.
 *
 *     [T, 2, 8] reshape [2T, 8]     rows that are `times` for each row of another tensor: its
 *                                   lengths, multiplied (a node scale_lengths); and the reverse
 *     whatever else moves or        no sequences any more: all rows count. The view looks into a
 *     cuts axis 0                   copy (a node live) whose dead rows are zero, and so is their
 *                                   gradient
 *
 * What a spec names itself stands, but one tensor cannot count both the rows of a view and others.
 */
#include "spec.h"
#include <stdio.h>
#include <string.h>

/* A node reads rows of queries and, where these have lengths of their own, rows of keys. */
enum { QUERY, KEY, SIDES };
static const struct {
  uint32_t rows, lengths; /* flags of the ports that carry them */
} side[SIDES] = {{RG_PORT_ROWS, RG_PORT_SEQLENS}, {RG_PORT_KROWS, RG_PORT_KSEQLENS}};

typedef struct rows {
  int32_t *parent;  /* union-find over tensors */
  int32_t *lengths; /* of a root: lengths tensor, or -1 … */
  int64_t *times;   /* … rows for each that it counts … */
  int32_t *who;     /* … and the node whose port named it, or -1: it follows from others' */
  int32_t *port;
  int32_t *of[SIDES]; /* per node: a tensor with the rows it reads on that side, or -1 */
} rows;

/* How rows of a view, its output i, stand to those of what it looks into. */
/* MERGED: `times` for each; CUT: one for each */
typedef enum relation { APART, SAME, MERGED, CUT } relation;

static int root(rows *r, int t) {
  while (r->parent[t] != t) t = r->parent[t] = r->parent[r->parent[t]];
  return t;
}

/* Ties t to *first, or makes it *first. Axes of different extents (a concatenation along axis 0)
 * are not the same. */
static void tie(const rgi_graph *g, rows *r, int32_t *first, int t) {
  if (t < 0 || g->tensor[t].rank == 0) return;
  if (*first < 0)
    *first = t;
  else if (rgi_dim_equal(g->tensor[t].dim[0], g->tensor[*first].dim[0]))
    r->parent[root(r, t)] = root(r, *first);
}

static uint32_t flags_of(const rgi_node *n, int port) {
  const uint32_t flags = n->op->in[port].flags;
  return flags & RG_PORT_BLOCKS && rgi_blocks_are_rows(n) ? flags | RG_PORT_KROWS : flags;
}

/* The first tensor on ports with `flag`, all of which it ties together; -1 if there is none. */
static int tie_ports(const rgi_graph *g, rows *r, const rgi_node *n, uint32_t flag) {
  int32_t first = -1;
  for (int p = 0; p < n->op->nin; p++)
    for (int i = n->in_begin[p]; i < n->in_begin[p + 1]; i++)
      if (flags_of(n, p) & flag) tie(g, r, &first, n->in[i]);
  for (int p = 0; p < n->op->nout; p++)
    for (int i = n->out_begin[p]; i < n->out_begin[p + 1]; i++)
      if (n->op->out[p].flags & flag) tie(g, r, &first, n->out[i]);
  return first;
}

/* Does a view keep axis 0 whole? Extents may agree by chance; where strides exist they must agree
 * too. */
static bool same_rows(const rgi_graph *g, int x, int y) {
  const rgi_tensor *a = &g->tensor[x], *b = &g->tensor[y];
  return a->rank > 0 && b->rank > 0 && rgi_dim_equal(a->dim[0], b->dim[0]) &&
         (!g->bound || a->stride[0] == b->stride[0]);
}

/* The number of leading axes of `a` behind axis 0 that make its rows as many as axis 0 of b has,
 * multiplied out; 0 if there is none, or no number yet. */
static int64_t rows_in(const rgi_graph *g, const rgi_tensor *a, const rgi_tensor *b) {
  rgi_dim rows = a->dim[0];
  int64_t times = 1;
  for (int d = 1; d < a->rank && rgi_dim_known(a->dim[d]); d++) {
    if (rgi_dim_binary(g->arena, '*', rows, a->dim[d], &rows, NULL) != RG_OK) return 0;
    times *= a->dim[d].c;
    if (rgi_dim_equal(rows, b->dim[0])) return times;
  }
  return 0;
}

static relation relate(const rgi_graph *g, int n, int i, int64_t *times) {
  const rgi_node *node = &g->node[n];
  const int x = node->in[0], y = node->out[i];
  const rgi_tensor *a = &g->tensor[x], *b = &g->tensor[y];
  *times = 1;
  if (same_rows(g, x, y)) return SAME;
  if (!node->op->rules->ordered || a->rank == 0 || b->rank == 0) return APART;
  *times = rows_in(g, a, b);
  if (*times > 0) return *times == 1 ? SAME : MERGED;
  *times = rows_in(g, b, a);
  return *times == 0 ? APART : *times == 1 ? SAME : CUT;
}

static int port_with(const rg_op *op, uint32_t flag) {
  for (int p = 0; p < op->nin; p++)
    if (op->in[p].flags & flag) return p;
  return -1;
}

/* Notes that rows of t have the lengths tensor on port p of node n. */
static rg_status say_lengths(const rgi_graph *g, rows *r, int t, int n, int p, rg_error *e) {
  const rgi_node *node = &g->node[n];
  int lengths = p >= 0 ? rgi_in(node, p) : -1, k;
  if (lengths < 0 || t < 0) return RG_OK;
  k = root(r, t);
  if (r->lengths[k] >= 0 && r->lengths[k] != lengths) {
    rgi_pointer in, at;
    rgi_pointer_key(&in, g->origin[node->origin].pointer, "in");
    return rgi_fail(e, RG_E_SHAPE, rgi_pointer_key(&at, in.text, node->op->in[p].name), node->name,
                    "rows of '%s' get their lengths from '%s' here, but from '%s' in node '%s'; "
                    "tensors over one token "
                    "axis share one lengths tensor",
                    g->tensor[t].name, g->tensor[lengths].name, g->tensor[r->lengths[k]].name,
                    g->node[r->who[k]].name);
  }
  r->lengths[k] = lengths;
  r->who[k] = n;
  r->port[k] = p;
  return RG_OK;
}

/* The rows of view y of x are others than those of x, yet both get their lengths from one
 * tensor. */
static rg_status counts_both(const rgi_graph *g, const rows *r, int x, int y, int kx, int ky,
                             rg_error *e) {
  const int k = r->who[ky] >= 0 ? ky : kx;
  if (r->who[k] < 0)
    return rgi_fail(e, RG_E_SHAPE, g->origin[g->node[g->tensor[y].producer].origin].pointer,
                    g->node[g->tensor[y].producer].name,
                    "rows of '%s' and of '%s', which looks into it, would both be counted by '%s'",
                    g->tensor[x].name, g->tensor[y].name, g->tensor[r->lengths[k]].name);
  const rgi_node *node = &g->node[r->who[k]];
  rgi_pointer in, at;
  rgi_pointer_key(&in, g->origin[node->origin].pointer, "in");
  return rgi_fail(
      e, RG_E_SHAPE, rgi_pointer_key(&at, in.text, node->op->in[r->port[k]].name), node->name,
      "'%s' counts the rows of '%s'; those of '%s', another view of the same elements, are others. "
      "Name an input that counts these rows%s",
      g->tensor[r->lengths[k]].name, g->tensor[k == ky ? x : y].name,
      g->tensor[k == ky ? y : x].name,
      node->op->in[r->port[k]].flags & RG_PORT_OPTIONAL ? ", or leave the lengths out here" : "");
}

/* Gives the absent single port p of node n the tensor t. */
static bool bind_port(rgi_graph *g, int n, int p, int t) {
  rgi_node *node = &g->node[n];
  int at = node->in_begin[p], count = rgi_nin(node);
  int32_t *in = rgi_alloc_n(g->arena, (size_t)count + 1, sizeof *in);
  int32_t *begin = rgi_alloc_n(g->arena, (size_t)node->op->nin + 1, sizeof *begin);
  if (!in || !begin) return false;
  memcpy(in, node->in, (size_t)at * sizeof *in);
  in[at] = t;
  memcpy(in + at + 1, node->in + at, (size_t)(count - at) * sizeof *in);
  for (int q = 0; q <= node->op->nin; q++) begin[q] = node->in_begin[q] + (q > p);
  node->in = in;
  node->in_begin = begin;
  return true;
}

static rg_status make_rows(const rgi_graph *g, rows *r, rg_error *e) {
  const size_t nt = (size_t)g->ntensor, nn = (size_t)g->nnode;
  r->parent = rgi_alloc_n(g->arena, nt, sizeof *r->parent);
  r->lengths = rgi_alloc_n(g->arena, nt, sizeof *r->lengths);
  r->times = rgi_alloc_n(g->arena, nt, sizeof *r->times);
  r->who = rgi_alloc_n(g->arena, nt, sizeof *r->who);
  r->port = rgi_alloc_n(g->arena, nt, sizeof *r->port);
  r->of[QUERY] = rgi_alloc_n(g->arena, nn, sizeof *r->of[QUERY]);
  r->of[KEY] = rgi_alloc_n(g->arena, nn, sizeof *r->of[KEY]);
  if (!r->parent || !r->lengths || !r->times || !r->who || !r->port || !r->of[QUERY] || !r->of[KEY])
    return rgi_nomem(e);
  for (int t = 0; t < g->ntensor; t++) {
    r->parent[t] = t;
    r->lengths[t] = r->who[t] = -1;
    r->times[t] = 1;
  }
  return RG_OK;
}

static void tie_rows(const rgi_graph *g, rows *r) {
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    for (int s = 0; s < SIDES; s++) r->of[s][n] = tie_ports(g, r, node, side[s].rows);
    int64_t times;
    for (int i = 0; i < rgi_nout(node) && node->op->flags & RG_OP_VIEW; i++)
      if (relate(g, n, i, &times) == SAME) r->parent[root(r, node->out[i])] = root(r, node->in[0]);
  }
}

/* Lengths of a class from those of another whose rows are `times` for each of its own, or the
 * reverse. */
static bool follow(rows *r, int few, int many, int64_t times) {
  const int from = r->lengths[few] >= 0 ? few : many, to = from == few ? many : few;
  if (r->lengths[from] < 0 || r->lengths[to] >= 0) return false;
  if (from == many && r->times[many] % times != 0) return false;
  r->lengths[to] = r->lengths[from];
  r->times[to] = from == few ? r->times[few] * times : r->times[many] / times;
  return true;
}

/* Through views that merge or cut rows, until nothing new is known. */
static void spread(const rgi_graph *g, rows *r) {
  for (bool more = true; more;) {
    more = false;
    for (int n = 0; n < g->nnode; n++)
      for (int i = 0; i < rgi_nout(&g->node[n]) && g->node[n].op->flags & RG_OP_VIEW; i++) {
        int64_t times;
        const relation how = relate(g, n, i, &times);
        const int x = root(r, g->node[n].in[0]), y = root(r, g->node[n].out[i]);
        if (how == MERGED) more = follow(r, x, y, times) || more;
        if (how == CUT) more = follow(r, y, x, times) || more;
      }
  }
}

/* Does the view's output hold the rows that its input has, told by the same lengths? */
static bool carried(const rows *r, relation how, int64_t times, int x, int y) {
  if (r->lengths[x] != r->lengths[y]) return false;
  return how == MERGED ? r->times[y] == r->times[x] * times
         : how == CUT  ? r->times[x] == r->times[y] * times
                       : how == SAME;
}

static rg_status check_views(const rgi_graph *g, rows *r, rg_error *e) {
  for (int n = 0; n < g->nnode; n++)
    for (int i = 0; i < rgi_nout(&g->node[n]) && g->node[n].op->flags & RG_OP_VIEW; i++) {
      int64_t times;
      const relation how = relate(g, n, i, &times);
      const int x = g->node[n].in[0], y = g->node[n].out[i], kx = root(r, x), ky = root(r, y);
      if (r->lengths[kx] < 0 || r->lengths[kx] != r->lengths[ky] || carried(r, how, times, kx, ky))
        continue;
      if (how == APART && !g->bound) continue; /* an extent may still make it the same rows */
      RGI_TRY(counts_both(g, r, x, y, kx, ky, e));
    }
  return RG_OK;
}

/* What the spec says, and what follows for keys. */
static rg_status find_lengths(const rgi_graph *g, rows *r, rg_error *e) {
  for (int n = 0; n < g->nnode; n++)
    for (int s = 0; s < SIDES; s++)
      RGI_TRY(say_lengths(g, r, r->of[s][n], n, port_with(g->node[n].op, side[s].lengths), e));
  spread(g, r);
  /* Keys without lengths of their own, in a node that gives none, have the queries'. */
  for (int n = 0; n < g->nnode; n++) {
    const int p = port_with(g->node[n].op, side[KEY].lengths), query = r->of[QUERY][n],
              key = r->of[KEY][n];
    if (p < 0 || key < 0 || query < 0 || rgi_in(&g->node[n], p) >= 0) continue;
    const int k = root(r, key), q = root(r, query);
    if (r->lengths[k] >= 0 || r->lengths[q] < 0) continue;
    r->lengths[k] = r->lengths[q];
    r->times[k] = r->times[q];
  }
  spread(g, r);
  return check_views(g, r, e);
}

/* ---- nodes that lengths need ---- */

/* Appends a node without optional ports: in-ports and the one out-port take the tensors given. */
static rg_status add_node(rgi_graph *g, const char *op_name, const char *name, const rg_value *attr,
                          const int32_t *in, const char *pointer, int32_t *out, rg_error *e) {
  const rg_op *op = rgi_find_op(g->ctx, op_name);
  int one[2] = {1, 1};
  rgi_tensor made = {.name = rgi_free_name(g, name),
                     .base = -1,
                     .producer = g->nnode,
                     .seqlens = -1,
                     .grad_of = -1};
  *out = made.name ? rgi_add_tensor(g, &made) : -1;
  const int n = *out >= 0 ? rgi_add_node(g, g->tensor[*out].name, op, one, one, attr) : -1;
  if (n < 0) return rgi_nomem(e);
  rgi_node *node = &g->node[n];
  for (int p = 0; p < op->nin; p++) node->in[p] = in[p];
  node->out[0] = *out;
  node->origin = g->norigin;
  g->origin[g->norigin++] = (rgi_origin){.name = node->name, .op = op, .pointer = pointer};
  return rgi_infer_node(g, n, pointer, e);
}

/* The tensor that counts rows of class k, in *out: the class's own lengths, or those scaled, by a
 * node that classes with the same multiple share. */
static rg_status lengths_of(rgi_graph *g, const rows *r, int32_t *scaled, int nt, int k,
                            int32_t *out, rg_error *e) {
  *out = r->lengths[k];
  if (*out < 0 || r->times[k] == 1) return RG_OK;
  int64_t most = INT64_MAX;
  for (int t = 0; t < nt; t++) {
    if (r->parent[t] != t || r->lengths[t] != r->lengths[k] || r->times[t] != r->times[k]) continue;
    if (scaled[t] >= 0) {
      *out = scaled[k] = scaled[t];
      return RG_OK;
    }
    const rgi_dim rows = g->tensor[t].dim[0];
    if (rgi_dim_known(rows) && rows.c < most) most = rows.c;
  }
  const int32_t from = r->lengths[k];
  const rgi_tensor *x = &g->tensor[k];
  const char *pointer =
      x->producer < 0 ? "/inputs" : g->origin[g->node[x->producer].origin].pointer;
  if (most > INT32_MAX && g->bound)
    return rgi_fail(e, RG_E_LIMIT, pointer, NULL,
                    "'%s' has %lld rows; lengths count at most 2^31 - 1", x->name, (long long)most);
  const rg_value attr[] = {{.i = r->times[k], .set = true},
                           {.i = most > INT32_MAX ? 0 : most, .set = true}};
  const char *name = rgi_format(g->arena, "%s.x%lld", g->tensor[from].name, (long long)r->times[k]);
  if (!name) return rgi_nomem(e);
  RGI_TRY(add_node(g, "scale_lengths", name, attr, &from, pointer, out, e));
  scaled[k] = *out;
  return RG_OK;
}

/* Rows of x past the last token are zero, and gradients there are not read: an op made it that
 * keeps to these lengths itself, backward as well. */
static bool keeps_dead_rows_dead(const rgi_graph *g, rows *r, int x) {
  const int owner = rgi_owner(g, x), n = g->tensor[owner].producer;
  if (n < 0 || !g->node[n].op->backward || r->lengths[root(r, owner)] != r->lengths[root(r, x)])
    return false;
  const int p = port_with(g->node[n].op, RG_PORT_SEQLENS);
  return p >= 0 && rgi_in(&g->node[n], p) >= 0;
}

/* Puts copies with zeros in dead rows before views behind which dead rows could not be told. */
static rg_status add_live(rgi_graph *g, rows *r, bool *any, rg_error *e) {
  const int nn = g->nnode;
  int32_t *copy = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *copy);
  if (!copy) return rgi_nomem(e);
  for (int t = 0; t < g->ntensor; t++) copy[t] = -1;
  for (int n = 0; n < nn && g->bound; n++) {
    if (!(g->node[n].op->flags & RG_OP_VIEW)) continue;
    const int x = g->node[n].in[0], kx = root(r, x);
    bool lost = false;
    for (int i = 0; i < rgi_nout(&g->node[n]) && r->lengths[kx] >= 0; i++) {
      int64_t times;
      const relation how = relate(g, n, i, &times);
      lost = lost || !carried(r, how, times, kx, root(r, g->node[n].out[i]));
    }
    if (!lost || keeps_dead_rows_dead(g, r, x)) continue;
    if (copy[x] < 0) {
      const int32_t in[] = {x, g->tensor[x].seqlens};
      const char *name = rgi_format(g->arena, "%s.live", g->tensor[x].name);
      if (!name) return rgi_nomem(e);
      RGI_TRY(
          add_node(g, "live", name, NULL, in, g->origin[g->node[n].origin].pointer, &copy[x], e));
      g->tensor[copy[x]].seqlens = in[1];
    }
    g->node[n].in[0] = copy[x];
    *any = true;
  }
  return RG_OK;
}

/* Hands them to the ports that the spec left open; sets *late if one stands before the node that
 * makes them. */
static rg_status bind_lengths(rgi_graph *g, const rows *r, int nn, bool *late, rg_error *e) {
  bool *changed = rgi_alloc_n(g->arena, (size_t)g->nnode, sizeof *changed);
  if (!changed) return rgi_nomem(e);
  for (int n = 0; n < nn; n++) {
    int32_t lengths[SIDES];
    for (int s = 0; s < SIDES; s++)
      lengths[s] = r->of[s][n] < 0 ? -1 : g->tensor[r->of[s][n]].seqlens;
    if (lengths[KEY] == lengths[QUERY]) lengths[KEY] = -1; /* absent: as the queries */
    for (int s = 0; s < SIDES; s++) {
      const int p = port_with(g->node[n].op, side[s].lengths);
      if (p < 0 || lengths[s] < 0 || rgi_in(&g->node[n], p) >= 0) continue;
      if (!bind_port(g, n, p, lengths[s])) return rgi_nomem(e);
      changed[n] = true;
      *late = *late || g->tensor[lengths[s]].producer >= n;
    }
  }
  for (int n = 0; n < nn; n++)
    if (changed[n]) RGI_TRY(rgi_infer_node(g, n, g->origin[g->node[n].origin].pointer, e));
  return RG_OK;
}

rg_status rgi_fill_lengths(rgi_graph *g, rg_error *e) {
  rows r = {0};
  bool late = false, moved = false;
  RGI_TRY(make_rows(g, &r, e));
  tie_rows(g, &r);
  RGI_TRY(find_lengths(g, &r, e));
  const int nt = g->ntensor, nn = g->nnode;
  int32_t *scaled = rgi_alloc_n(g->arena, (size_t)nt, sizeof *scaled);
  if (!scaled) return rgi_nomem(e);
  for (int t = 0; t < nt; t++) scaled[t] = -1;
  for (int t = 0; t < nt; t++) {
    int32_t lengths;
    RGI_TRY(lengths_of(g, &r, scaled, nt, root(&r, t), &lengths, e));
    g->tensor[t].seqlens = lengths;
  }
  RGI_TRY(bind_lengths(g, &r, nn, &late, e));
  RGI_TRY(add_live(g, &r, &moved, e));
  if (late || moved || g->nnode > nn) RGI_TRY(rgi_sort_nodes(g, e));
  for (int n = 0; n < g->nnode && moved; n++) /* views look into other bytes now */
    if (g->node[n].op->flags & RG_OP_VIEW)
      RGI_TRY(rgi_infer_node(g, n, g->origin[g->node[n].origin].pointer, e));
  return RG_OK;
}
