/* report/flow.c: what flows between a plan's nodes, for those who draw it: which tensors are
   lengths (every op takes them, so pictures leave them out), and what the passes made of each node.
 */
#include "report.h"

#include <stdio.h>
#include <string.h>

const char *rgi_mark_name(int bit) {
  static const char *const name[RGI_MARKS] = {"kept", "again", "offloaded", "in place", "fused"};
  return name[bit];
}

/* Lengths are what length ports take and what tensors name as theirs, and what these are made of by
 * nodes that make nothing else. Backwards through the nodes, one pass finds all. */
static void find_lengths(rgi_flow *f) {
  const rgi_graph *g = f->plan->graph;
  for (int32_t t = 0; t < g->ntensor; t++)
    if (g->tensor[t].seqlens >= 0) f->lengths[g->tensor[t].seqlens] = true;
  for (int32_t i = g->nnode - 1; i >= 0; i--) {
    const rgi_node *n = &g->node[i];
    bool only = rgi_nout(n) > 0;
    for (int k = 0; k < rgi_nout(n); k++) only &= n->out[k] >= 0 && f->lengths[n->out[k]];
    for (int p = 0; p < n->op->nin; p++)
      for (int32_t k = n->in_begin[p]; k < n->in_begin[p + 1]; k++)
        if (n->in[k] >= 0 && (only || n->op->in[p].flags & RGI_LENGTH_PORTS))
          f->lengths[n->in[k]] = true;
  }
}

static bool shares_bytes(const rgi_graph *g, const rgi_node *n) {
  for (int k = 0; k < rgi_nout(n); k++)
    for (int i = 0; i < rgi_nin(n) && n->out[k] >= 0; i++)
      if (n->in[i] >= 0 && g->tensor[n->out[k]].base >= 0 &&
          rgi_owner(g, n->in[i]) == rgi_owner(g, n->out[k]))
        return true;
  return false;
}

/* A part does not bear the name of its op's whole gradient. */
static bool is_part(const rg_plan *plan, const rgi_node *n) {
  const rgi_fusions *f = plan->fusions;
  char whole[128];
  if (n->kind != RGI_GRADIENT || n->origin < 0) return false;
  for (int i = 0; f && i < f->count; i++) {
    if (f->at[i].origin != n->origin || f->at[i].why) continue;
    snprintf(whole, sizeof whole, "%s.bwd", plan->graph->origin[n->origin].op->name);
    if (strcmp(whole, n->op->name) != 0) return true;
  }
  return false;
}

static void find_marks(rgi_flow *f) {
  const rg_plan *plan = f->plan;
  const rgi_graph *g = plan->graph;
  for (int32_t i = 0; i < plan->memory->nblock; i++) {
    const rgi_block *b = &plan->memory->block[i];
    if (b->tensor < 0 || f->step[b->first] < 0) continue;
    if (b->region == RGI_R_SAVED) f->marks[b->first] |= RGI_MARK_KEPT;
    if (b->shares >= 0) f->marks[b->first] |= RGI_MARK_IN_PLACE;
  }
  for (int32_t i = 0; i < g->nnode; i++) {
    const rgi_node *n = &g->node[i];
    rg_node_info info;
    if (f->step[i] < 0 || rg_plan_node(plan, (size_t)i, &info) != RG_OK) continue;
    const rgi_choice *c = plan->choice;
    if (n->kind == RGI_CLONE || info.recomputed) f->marks[i] |= RGI_MARK_AGAIN;
    if (n->kind == RGI_PRIMAL && c && n->origin >= 0 && n->origin < c->nnode &&
        c->node[n->origin].offloaded)
      f->marks[i] |= RGI_MARK_OFFLOADED;
    if (shares_bytes(g, n)) f->marks[i] |= RGI_MARK_IN_PLACE;
    if (is_part(plan, n)) f->marks[i] |= RGI_MARK_FUSED;
  }
}

/* Counted, then filled in from behind; a node that reads a tensor twice stands there once. */
static void find_readers(rgi_flow *f) {
  const rgi_graph *g = f->plan->graph;
  for (int pass = 0; pass < 2; pass++) {
    for (int32_t i = g->nnode - 1; i >= 0; i--)
      for (int k = 0; k < rgi_nin(&g->node[i]); k++) {
        const int32_t t = g->node[i].in[k];
        bool again = t < 0;
        for (int j = 0; j < k && !again; j++) again = g->node[i].in[j] == t;
        if (!again && pass == 0) f->begin[t]++;
        if (!again && pass == 1) f->reader[--f->begin[t]] = i;
      }
    for (int32_t t = 0; t < g->ntensor && pass == 0; t++) f->begin[t + 1] += f->begin[t];
  }
}

bool rgi_flow_open(rgi_flow *f, const rg_plan *plan) {
  const rgi_graph *g = plan->graph;
  const size_t nodes = (size_t)g->nnode + 1, tensors = (size_t)g->ntensor + 1;
  size_t reads = 1;
  for (int32_t i = 0; i < g->nnode; i++) reads += (size_t)rgi_nin(&g->node[i]);
  *f = (rgi_flow){.plan = plan,
                  .lengths = rgi_malloc(plan->ctx, tensors * sizeof *f->lengths),
                  .step = rgi_malloc(plan->ctx, nodes * sizeof *f->step),
                  .marks = rgi_malloc(plan->ctx, nodes * sizeof *f->marks),
                  .begin = rgi_malloc(plan->ctx, tensors * sizeof *f->begin),
                  .reader = rgi_malloc(plan->ctx, reads * sizeof *f->reader)};
  if (!f->lengths || !f->step || !f->marks || !f->begin || !f->reader) return false;
  memset(f->begin, 0, tensors * sizeof *f->begin);
  memset(f->lengths, 0, tensors * sizeof *f->lengths);
  memset(f->marks, 0, nodes * sizeof *f->marks);
  for (int32_t i = 0; i < g->nnode; i++) f->step[i] = -1;
  for (int32_t i = 0; i < plan->nstep; i++) f->step[plan->step[i].node] = i;
  find_lengths(f);
  find_readers(f);
  find_marks(f);
  return true;
}

void rgi_flow_close(rgi_flow *f) {
  rgi_free(f->plan->ctx, f->lengths);
  rgi_free(f->plan->ctx, f->step);
  rgi_free(f->plan->ctx, f->marks);
  rgi_free(f->plan->ctx, f->begin);
  rgi_free(f->plan->ctx, f->reader);
}

const rg_tensor_info *rgi_flow_bound(const rg_plan *plan, int32_t tensor) {
  for (int32_t i = 0; i < plan->nbindable; i++) {
    const rgi_bindable *b = &plan->bindable[i];
    if (b->tensor == tensor || b->owner == tensor) return &b->info;
  }
  return NULL;
}

void rgi_report_times(const rg_plan *plan, char *text, size_t size) {
  const rgi_profile *p = plan->profile;
  snprintf(text, size, "%.600s%s; profile %08x, %.600s", p->source ? p->source : "uncalibrated",
           p->elsewhere ? ", on another GPU" : "", (unsigned)(p->id >> 32 ^ p->id), p->found);
}
