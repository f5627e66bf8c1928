/* graph/lengths.c: row lengths: tensors whose axis 0 is the same packed token axis share one
 * lengths tensor.
 *
 * Ports say which axes are the same (RG_PORT_ROWS, RG_PORT_KROWS); views that keep axis 0 do too.
 * A spec names the lengths in one node, and every op of the class that takes lengths is handed
 * them here.
 */
#include "spec.h"
#include <string.h>

/* A node reads rows of queries and, where these have lengths of their own, rows of keys. */
enum { QUERY, KEY, SIDES };
static const struct {
  uint32_t rows, lengths; /* flags of the ports that carry them */
} side[SIDES] = {{RG_PORT_ROWS, RG_PORT_SEQLENS}, {RG_PORT_KROWS, RG_PORT_KSEQLENS}};

typedef struct rows {
  int32_t *parent;    /* union-find over tensors */
  int32_t *lengths;   /* of a root: lengths tensor, or -1 */
  int32_t *who;       /* of a root: the node that said so */
  int32_t *of[SIDES]; /* per node: a tensor with the rows it reads on that side, or -1 */
} rows;

static int root(rows *r, int t) {
  while (r->parent[t] != t) t = r->parent[t] = r->parent[r->parent[t]];
  return t;
}

/* Ties t to *first, or makes it *first. Axes of different extents (a concatenation along axis 0) are not the
 * same. */
static void tie(const rgi_graph *g, rows *r, int32_t *first, int t) {
  if (t < 0 || g->tensor[t].rank == 0) return;
  if (*first < 0)
    *first = t;
  else if (rgi_dim_equal(g->tensor[t].dim[0], g->tensor[*first].dim[0]))
    r->parent[root(r, t)] = root(r, *first);
}

/* The first tensor on ports with `flag`, all of which it ties together; -1 if there is none. */
static int tie_ports(const rgi_graph *g, rows *r, const rgi_node *n, uint32_t flag) {
  int32_t first = -1;
  for (int p = 0; p < n->op->nin; p++)
    for (int i = n->in_begin[p]; i < n->in_begin[p + 1]; i++)
      if (n->op->in[p].flags & flag) tie(g, r, &first, n->in[i]);
  for (int p = 0; p < n->op->nout; p++)
    for (int i = n->out_begin[p]; i < n->out_begin[p + 1]; i++)
      if (n->op->out[p].flags & flag) tie(g, r, &first, n->out[i]);
  return first;
}

/* Does a view keep axis 0 whole? Extents may agree by chance; where strides exist they must agree too. */
static bool same_rows(const rgi_graph *g, int x, int y) {
  const rgi_tensor *a = &g->tensor[x], *b = &g->tensor[y];
  return a->rank > 0 && b->rank > 0 && rgi_dim_equal(a->dim[0], b->dim[0]) &&
         (!g->bound || a->stride[0] == b->stride[0]);
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
    return rgi_fail(
        e, RG_E_SHAPE, rgi_pointer_key(&at, in.text, node->op->in[p].name), node->name,
        "rows of '%s' get their lengths from '%s' here, but from '%s' in node '%s'; tensors over one token "
        "axis share one lengths tensor",
        g->tensor[t].name, g->tensor[lengths].name, g->tensor[r->lengths[k]].name, g->node[r->who[k]].name);
  }
  r->lengths[k] = lengths;
  r->who[k] = n;
  return RG_OK;
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
  r->who = rgi_alloc_n(g->arena, nt, sizeof *r->who);
  r->of[QUERY] = rgi_alloc_n(g->arena, nn, sizeof *r->of[QUERY]);
  r->of[KEY] = rgi_alloc_n(g->arena, nn, sizeof *r->of[KEY]);
  if (!r->parent || !r->lengths || !r->who || !r->of[QUERY] || !r->of[KEY]) return rgi_nomem(e);
  for (int t = 0; t < g->ntensor; t++) {
    r->parent[t] = t;
    r->lengths[t] = -1;
  }
  return RG_OK;
}

static void tie_rows(const rgi_graph *g, rows *r) {
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    for (int s = 0; s < SIDES; s++) r->of[s][n] = tie_ports(g, r, node, side[s].rows);
    if (!(node->op->flags & RG_OP_VIEW)) continue;
    for (int i = 0; i < rgi_nout(node); i++)
      if (same_rows(g, node->in[0], node->out[i])) {
        int32_t first = node->in[0];
        tie(g, r, &first, node->out[i]);
      }
  }
}

/* What the spec says, and what follows for keys. */
static rg_status find_lengths(const rgi_graph *g, rows *r, rg_error *e) {
  for (int n = 0; n < g->nnode; n++)
    for (int s = 0; s < SIDES; s++)
      RGI_TRY(say_lengths(g, r, r->of[s][n], n, port_with(g->node[n].op, side[s].lengths), e));
  /* Keys without lengths of their own, in a node that gives none, have the queries'. */
  for (int n = 0; n < g->nnode; n++) {
    const int p = port_with(g->node[n].op, side[KEY].lengths), query = r->of[QUERY][n], key = r->of[KEY][n];
    if (p < 0 || key < 0 || query < 0 || rgi_in(&g->node[n], p) >= 0) continue;
    const int k = root(r, key), lengths = r->lengths[root(r, query)];
    if (r->lengths[k] >= 0 || lengths < 0) continue;
    r->lengths[k] = lengths;
    r->who[k] = n;
  }
  return RG_OK;
}

/* Hands them to the ports that the spec left open; sets *late if one stands before the node that
 * makes them. */
static rg_status bind_lengths(rgi_graph *g, const rows *r, bool *late, rg_error *e) {
  bool *changed = rgi_alloc_n(g->arena, (size_t)g->nnode, sizeof *changed);
  if (!changed) return rgi_nomem(e);
  for (int n = 0; n < g->nnode; n++) {
    int32_t lengths[SIDES];
    for (int s = 0; s < SIDES; s++) lengths[s] = r->of[s][n] < 0 ? -1 : g->tensor[r->of[s][n]].seqlens;
    if (lengths[KEY] == lengths[QUERY]) lengths[KEY] = -1; /* absent: as the queries */
    for (int s = 0; s < SIDES; s++) {
      const int p = port_with(g->node[n].op, side[s].lengths);
      if (p < 0 || lengths[s] < 0 || rgi_in(&g->node[n], p) >= 0) continue;
      if (!bind_port(g, n, p, lengths[s])) return rgi_nomem(e);
      changed[n] = true;
      *late = *late || g->tensor[lengths[s]].producer >= n;
    }
  }
  for (int n = 0; n < g->nnode; n++)
    if (changed[n]) RGI_TRY(rgi_infer_node(g, n, g->origin[g->node[n].origin].pointer, e));
  return RG_OK;
}

rg_status rgi_fill_lengths(rgi_graph *g, rg_error *e) {
  rows r = {0};
  bool late = false;
  RGI_TRY(make_rows(g, &r, e));
  tie_rows(g, &r);
  RGI_TRY(find_lengths(g, &r, e));
  for (int t = 0; t < g->ntensor; t++) g->tensor[t].seqlens = r.lengths[root(&r, t)];
  RGI_TRY(bind_lengths(g, &r, &late, e));
  return late ? rgi_sort_nodes(g, e) : RG_OK;
}
