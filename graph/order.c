/* graph/order.c: see order.h. */
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
