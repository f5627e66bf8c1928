/* exec/edges.c: which steps of a direction must wait for which.

   Step j waits for an earlier step i where both touch the same bytes and at least one writes them:
   data that i makes for j, and bytes that the planner gave to both, one after the other. Parts of
   one tensor that do not meet (head groups) do not count. A node may also name another that it
   waits for. Collectives run in their order, the same on every rank: they share a communicator and
   its block. So do copies from or to the host, which share a copy engine: they are wanted in their
   order, and half of each is of no use to anyone. Steps with no path between them may run side by
   side. Only nearest predecessors are kept: edges that follow from others are left out.
 */
#include "../graph/order.h"
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

/* From or to the host's memory, by a GPU's copy engine. */
static bool is_copy(const rg_plan *plan, int32_t i) {
  return rgi_is_copy(plan->graph, plan->step[i].node);
}

static bool meet(const edges *m, int32_t i, int32_t j) {
  const rgi_graph *g = m->plan->graph;
  const int32_t after = g->node[m->plan->step[j].node].after;
  if (after >= 0 && g->tensor[after].producer == m->plan->step[i].node) return true;
  if (m->plan->step[i].comm_size && m->plan->step[j].comm_size) return true;
  if (is_copy(m->plan, i) && is_copy(m->plan, j)) return true;
  for (int32_t a = m->begin[i]; a < m->begin[i + 1]; a++)
    for (int32_t b = m->begin[j]; b < m->begin[j + 1]; b++) {
      const touch *x = &m->touch[a], *y = &m->touch[b];
      if (x->at.bind != y->at.bind || !(x->write || y->write)) continue;
      if (x->end <= y->at.offset || y->end <= x->at.offset) continue;
      if (x->tensor >= 0 && y->tensor >= 0 && rgi_apart(g, x->tensor, y->tensor)) continue;
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
      m->touch[n++] =
          (touch){{RGI_AT_SCRATCH, s->workspace}, s->workspace + s->workspace_size, -1, true};
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
      if (rgi_has(reach, i) || !meet(m, i, j)) continue;
      rgi_wait_for(reach, i, m->reach + (size_t)i * (size_t)m->words, m->words);
      list[n++] = i;
    }
    plan->after[j] = rgi_alloc_n(plan->arena, (size_t)n + 1, sizeof **plan->after);
    if (!plan->after[j]) return rgi_nomem(e);
    for (int32_t k = 0; k < n; k++) plan->after[j][k] = list[n - 1 - k];
    plan->after[j][n] = -1;
  }
  return RG_OK;
}

/* A step continues the lane of a step it waits for if none has done so yet; otherwise it
 * opens one. Copies, which run one by one, have one of their own. */
static void find_lanes(rg_plan *plan, bool *taken) {
  int32_t lanes = 0, copies = -1;
  for (int32_t i = 0; i < plan->nstep; i++) {
    if (i == plan->nforward) lanes = 0, copies = -1;
    if (is_copy(plan, i)) {
      if (copies < 0) copies = lanes++;
      plan->lane[i] = copies;
      continue;
    }
    plan->lane[i] = -1;
    for (const int32_t *p = plan->after[i]; *p >= 0 && plan->lane[i] < 0; p++)
      if (!taken[*p] && !is_copy(plan, *p)) {
        taken[*p] = true;
        plan->lane[i] = plan->lane[*p];
      }
    if (plan->lane[i] < 0) plan->lane[i] = lanes++;
  }
}

double rgi_plan_leads(const rg_plan *plan, int32_t from, int32_t to, double *leads) {
  double dearest = 0;
  for (int32_t i = from; i < to; i++) leads[i - from] = 0;
  for (int32_t i = to - 1; i >= from; i--) {
    double *mine = &leads[i - from];
    if (plan->step[i].comm_size && plan->step[i].cost.wire > *mine) *mine = plan->step[i].cost.wire;
    if (*mine > dearest) dearest = *mine;
    for (const int32_t *p = plan->after[i]; *p >= 0; p++)
      if (leads[*p - from] < *mine) leads[*p - from] = *mine;
  }
  return dearest;
}
bool rgi_leads_first(double leads, double dearest) {
  return dearest > 0 && leads >= dearest / 2;
}

rg_status rgi_plan_edges(rg_plan *plan, rg_error *e) {
  edges m = {.plan = plan, .words = rgi_words(plan->nstep)};
  plan->after = rgi_alloc_n(plan->arena, (size_t)plan->nstep + 1, sizeof *plan->after);
  m.touch =
      rgi_alloc_n(plan->arena, (size_t)plan->nargs + (size_t)plan->nstep + 1, sizeof *m.touch);
  m.begin = rgi_alloc_n(plan->arena, (size_t)plan->nstep + 1, sizeof *m.begin);
  m.reach = rgi_alloc_n(plan->arena, (size_t)plan->nstep * (size_t)m.words + 1, sizeof *m.reach);
  plan->lane = rgi_alloc_n(plan->arena, (size_t)plan->nstep + 1, sizeof *plan->lane);
  bool *taken = rgi_alloc_n(plan->arena, (size_t)plan->nstep + 1, sizeof *taken);
  if (!plan->lane || !taken || !plan->after || !m.touch || !m.begin || !m.reach)
    return rgi_nomem(e);
  list_touches(&m);
  RGI_TRY(connect(&m, 0, plan->nforward, e));
  RGI_TRY(connect(&m, plan->nforward, plan->nstep, e));
  find_lanes(plan, taken);
  return RG_OK;
}
