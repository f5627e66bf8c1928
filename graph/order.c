/* graph/order.c: see order.h; and the order in which nodes can run at all (ir.h). */
#include "order.h"

/* Where x starts on axis a of its owner's box, if its strides fall and its extent does not wrap
 * around. */
static bool box(const rgi_tensor *x, int64_t *start) {
  int64_t left = x->base >= 0 ? x->offset : 0, outer = INT64_MAX;
  for (int a = 0; a < x->rank; a++) {
    if (x->dim[a].c == 1 && x->stride[a] >= outer) { /* its stride says nothing */
      start[a] = 0;
      continue;
    }
    if (x->stride[a] < 1 || x->stride[a] > outer) return false;
    start[a] = left / x->stride[a];
    left %= x->stride[a];
    if (outer != INT64_MAX && start[a] + x->dim[a].c > outer / x->stride[a]) return false;
    outer = x->stride[a];
  }
  return left == 0;
}

bool rgi_apart(const rgi_graph *g, int32_t t, int32_t u) {
  const rgi_tensor *x = &g->tensor[t], *y = &g->tensor[u];
  int64_t sx[RG_MAX_RANK], sy[RG_MAX_RANK];
  if (rgi_owner(g, t) != rgi_owner(g, u) || x->rank != y->rank || x->dtype != y->dtype)
    return false;
  for (int a = 0; a < x->rank; a++)
    if (x->stride[a] != y->stride[a]) return false;
  if (!box(x, sx) || !box(y, sy)) return false;
  for (int a = 0; a < x->rank; a++)
    if (sx[a] + x->dim[a].c <= sy[a] || sy[a] + y->dim[a].c <= sx[a]) return true;
  return false;
}

/* Does node j (later) touch bytes that node i writes, or write bytes that i touches? */
static bool linked(const rgi_graph *g, int32_t i, int32_t j) {
  const rgi_node *x = &g->node[i], *y = &g->node[j];
  if (y->after >= 0 && g->tensor[y->after].producer == i) return true;
  const int32_t nx = rgi_nin(x), mx = nx + rgi_nout(x), ny = rgi_nin(y), my = ny + rgi_nout(y);
  for (int32_t a = 0; a < mx; a++)
    for (int32_t b = 0; b < my; b++) {
      if (a < nx && b < ny) continue;
      int32_t t = a < nx ? x->in[a] : x->out[a - nx], u = b < ny ? y->in[b] : y->out[b - ny];
      if (t >= 0 && u >= 0 && rgi_owner(g, t) == rgi_owner(g, u) && !rgi_apart(g, t, u))
        return true;
    }
  return false;
}

rg_status rgi_order_find(const rgi_graph *g, rgi_arena *a, rgi_order *o, rg_error *e) {
  o->n = g->nnode;
  o->words = rgi_words(g->nnode);
  o->before = rgi_alloc_n(a, (size_t)g->nnode * (size_t)o->words + 1, sizeof *o->before);
  if (!o->before) return rgi_nomem(e);
  for (int32_t j = 0; j < g->nnode; j++) {
    uint64_t *mine = o->before + (size_t)j * (size_t)o->words;
    for (int32_t i = j - 1; i >= 0 && g->node[i].backward == g->node[j].backward; i--) {
      if (rgi_has(mine, i) || !linked(g, i, j)) continue;
      rgi_wait_for(mine, i, rgi_before(o, i), o->words);
    }
  }
  return RG_OK;
}

/* ---- of nodes as they were given ---- */

/* A node not yet placed that node n must wait for, or -1. */
static int waits_for(const rgi_graph *g, int n, const bool *placed) {
  for (int i = 0; i < rgi_nin(&g->node[n]); i++) {
    const int t = g->node[n].in[i], from = t < 0 ? -1 : g->tensor[t].producer;
    if (from >= 0 && !placed[from]) return from;
  }
  return rgi_state_waits(g, n, placed);
}

/* Names a cycle among the nodes not yet placed: follows unplaced producers until a node comes
 * again. */
static rg_status report_cycle(const rgi_graph *g, const bool *placed, rgi_arena *a, rg_error *e) {
  int *seen = rgi_alloc_n(a, (size_t)g->nnode, sizeof *seen), at = 0;
  if (!seen) return rgi_nomem(e);
  while (placed[at]) at++;
  for (int step = 1; !seen[at]; step++) {
    seen[at] = step;
    at = waits_for(g, at, placed);
  }
  rgi_buf text;
  rgi_buf_init(&text, g->ctx);
  int start = at;
  const char *pointer = g->node[at].origin >= 0 ? g->origin[g->node[at].origin].pointer : NULL;
  for (int shown = 0; shown < 8; shown++) {
    rgi_buf_printf(&text, "%s <- ", g->node[at].name);
    at = waits_for(g, at, placed);
    if (at == start) break;
  }
  rg_status status = rgi_fail(e, RG_E_CYCLE, pointer, g->node[start].name,
                              "these nodes wait for each other: %s%s; a graph must not have cycles",
                              text.data ? text.data : "", at == start ? g->node[start].name : "…");
  rgi_buf_free(&text);
  return status;
}

rg_status rgi_sort_nodes(rgi_graph *g, rg_error *e) {
  rgi_arena *a = rgi_arena_create(g->ctx);
  if (!a) return rgi_nomem(e);
  rg_status status = RG_OK;
  bool *placed = rgi_alloc_n(a, (size_t)g->nnode, sizeof *placed);
  int *order = rgi_alloc_n(a, (size_t)g->nnode, sizeof *order), count = 0;
  int *place = rgi_alloc_n(a, (size_t)g->nnode, sizeof *place);
  rgi_node *sorted = rgi_alloc_n(g->arena, (size_t)g->nnode, sizeof *sorted);
  if (!placed || !order || !place || !sorted) {
    status = rgi_nomem(e);
    goto done;
  }
  for (bool moved = true; moved && count < g->nnode;) {
    moved = false;
    for (int n = 0; n < g->nnode; n++) {
      if (placed[n] || waits_for(g, n, placed) >= 0) continue;
      placed[n] = moved = true;
      place[n] = count;
      order[count++] = n;
    }
  }
  if (count < g->nnode) {
    status = report_cycle(g, placed, a, e);
    goto done;
  }
  for (int i = 0; i < count; i++) sorted[i] = g->node[order[i]];
  for (int t = 0; t < g->ntensor; t++)
    if (g->tensor[t].producer >= 0) g->tensor[t].producer = place[g->tensor[t].producer];
  g->node = sorted;
  g->node_capacity = g->nnode;
done:
  rgi_arena_destroy(a);
  return status;
}
