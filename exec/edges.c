/* exec/edges.c: which steps of a direction must wait for which.
 *
 * Step j waits for an earlier step i where both touch the same bytes and at least one writes them: data that
 * i makes for j, and bytes that the planner gave to both, one after the other. Parts of one tensor that do
 * not meet (head groups) do not count. Steps with no path between them may run side by side. Only nearest
 * predecessors are kept: edges that follow from others are left out.
 */
#include "plan.h"

#include <string.h>

/* What one argument touches. */
typedef struct touch {
  rgi_place at;
  int64_t end;    /* byte past its last element */
  int32_t tensor; /* -1: a workspace */
  bool write;
} touch;

typedef struct edges {
  rg_plan *plan;
  touch *touch;    /* of all steps */
  int32_t *begin;  /* [nstep + 1] */
  uint64_t *reach; /* [nstep][words]: the steps before it */
  int32_t words;
} edges;

static int64_t span(const rgi_tensor *t) {
  int64_t n = 1;
  for (int a = 0; a < t->rank; a++) {
    if (t->dim[a].c == 0) return 0;
    n += (t->dim[a].c - 1) * t->stride[a];
  }
  return n * (int64_t)rg_dtype_size(t->dtype);
}

/* Where x starts on axis a of its owner's box, if its strides fall and its extent does not wrap around. */
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

/* Two views of one owner that share no element, for sure. */
static bool apart(const rgi_graph *g, int32_t t, int32_t u) {
  const rgi_tensor *x = &g->tensor[t], *y = &g->tensor[u];
  int64_t sx[RG_MAX_RANK], sy[RG_MAX_RANK];
  if (rgi_owner(g, t) != rgi_owner(g, u) || x->rank != y->rank || x->dtype != y->dtype) return false;
  for (int a = 0; a < x->rank; a++)
    if (x->stride[a] != y->stride[a]) return false;
  if (!box(x, sx) || !box(y, sy)) return false;
  for (int a = 0; a < x->rank; a++)
    if (sx[a] + x->dim[a].c <= sy[a] || sy[a] + y->dim[a].c <= sx[a]) return true;
  return false;
}

static bool meet(const edges *m, int32_t i, int32_t j) {
  for (int32_t a = m->begin[i]; a < m->begin[i + 1]; a++)
    for (int32_t b = m->begin[j]; b < m->begin[j + 1]; b++) {
      const touch *x = &m->touch[a], *y = &m->touch[b];
      if (x->at.bind != y->at.bind || !(x->write || y->write)) continue;
      if (x->end <= y->at.offset || y->end <= x->at.offset) continue;
      if (x->tensor >= 0 && y->tensor >= 0 && apart(m->plan->graph, x->tensor, y->tensor)) continue;
      return true;
    }
  return false;
}

static void list_touches(edges *m) {
  const rg_plan *plan = m->plan;
  int32_t n = 0;
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *s = &plan->step[i];
    const rgi_node *node = &plan->graph->node[s->node];
    m->begin[i] = n;
    for (int32_t k = 0; k < s->nin + s->nout; k++) {
      int32_t t = k < s->nin ? node->in[k] : node->out[k - s->nin];
      if (t < 0) continue;
      m->touch[n++] =
          (touch){s->place[k], s->place[k].offset + span(&plan->graph->tensor[t]), t, k >= s->nin};
    }
    if (s->workspace_size)
      m->touch[n++] = (touch){{RGI_AT_SCRATCH, s->workspace}, s->workspace + s->workspace_size, -1, true};
  }
  m->begin[plan->nstep] = n;
}

static rg_status connect(edges *m, int32_t from, int32_t to, rg_error *e) {
  rg_plan *plan = m->plan;
  int32_t *list = rgi_alloc_n(m->plan->arena, (size_t)(to - from) + 1, sizeof *list);
  if (!list) return rgi_nomem(e);
  for (int32_t j = from; j < to; j++) {
    uint64_t *reach = m->reach + (size_t)j * (size_t)m->words;
    int32_t n = 0;
    for (int32_t i = j - 1; i >= from; i--) {
      if (reach[i / 64] >> (i % 64) & 1 || !meet(m, i, j)) continue;
      const uint64_t *more = m->reach + (size_t)i * (size_t)m->words;
      for (int32_t w = 0; w < m->words; w++) reach[w] |= more[w];
      reach[i / 64] |= UINT64_C(1) << (i % 64);
      list[n++] = i;
    }
    plan->after[j] = rgi_alloc_n(plan->arena, (size_t)n + 1, sizeof **plan->after);
    if (!plan->after[j]) return rgi_nomem(e);
    for (int32_t k = 0; k < n; k++) plan->after[j][k] = list[n - 1 - k];
    plan->after[j][n] = -1;
  }
  return RG_OK;
}

rg_status rgi_plan_edges(rg_plan *plan, rg_error *e) {
  edges m = {.plan = plan, .words = plan->nstep / 64 + 1};
  plan->after = rgi_alloc_n(plan->arena, (size_t)plan->nstep + 1, sizeof *plan->after);
  m.touch = rgi_alloc_n(plan->arena, (size_t)plan->nargs + (size_t)plan->nstep + 1, sizeof *m.touch);
  m.begin = rgi_alloc_n(plan->arena, (size_t)plan->nstep + 1, sizeof *m.begin);
  m.reach = rgi_alloc_n(plan->arena, (size_t)plan->nstep * (size_t)m.words + 1, sizeof *m.reach);
  if (!plan->after || !m.touch || !m.begin || !m.reach) return rgi_nomem(e);
  list_touches(&m);
  RGI_TRY(connect(&m, 0, plan->nforward, e));
  return connect(&m, plan->nforward, plan->nstep, e);
}
