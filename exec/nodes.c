/* exec/nodes.c: a plan's nodes one by one, for callers and for the reports: what each is, which
   kernels it takes, what it writes and what the cost model makes of it; and which GPUs have such
   kernels.

   Nodes stand in the order in which they run. A view runs nothing: no step, no byte written, no
   cost.
 */
#include "plan.h"
#include "../ops/cuda/shared.h"

/* The step of node n, or -1. Steps are in the order of their nodes. */
static int32_t step_of(const rg_plan *plan, int32_t n) {
  int32_t low = 0, high = plan->nstep;
  while (low < high) {
    const int32_t mid = low + (high - low) / 2;
    if (plan->step[mid].node < n)
      low = mid + 1;
    else
      high = mid;
  }
  return low < plan->nstep && plan->step[low].node == n ? low : -1;
}

static rg_node_kind kind_of(const rgi_node *n) {
  switch (n->kind) {
  case RGI_PRIMAL: return RG_NODE_PRIMAL;
  case RGI_GRADIENT: return RG_NODE_GRADIENT;
  case RGI_CLONE: return RG_NODE_CLONE;
  case RGI_GLUE: break;
  }
  return RG_NODE_GLUE;
}

const char *rgi_plan_path(const rg_plan *plan, int32_t i) {
  const rgi_step *s = &plan->step[i];
  const rg_op *op = plan->graph->node[s->node].op;
  return plan->cuda && op->cuda_path ? op->cuda_path(&s->call) : NULL;
}

/* Kernels that any GPU from 8.0 on has are there as PTX: a plan for an older GPU runs on a newer
 * one, by the older one's kernels and where its tiles fit. Hopper's own are machine code for Hopper
 * alone. */
rg_status rgi_plan_runs_on(const rg_plan *plan, const rg_gpu *here, rg_error *e) {
  const int cc = plan->gpu.cc, wants = rgi_cuda_block_kb(&plan->gpu), has = rgi_cuda_block_kb(here);
  if (here->cc < cc || (cc == 90 && here->cc > 90))
    return rgi_fail(
        e, RG_E_DEVICE, NULL, NULL,
        "the plan is for compute capability %d.%d%s, the GPU has %d.%d; make the plan on "
        "this machine or with its profile",
        cc / 10, cc % 10, cc == 90 && here->cc > 90 ? " alone" : "", here->cc / 10, here->cc % 10);
  if (has < wants)
    return rgi_fail(
        e, RG_E_DEVICE, NULL, NULL,
        "the plan is for compute capability %d.%d, where a block has %d KB of shared "
        "memory; on the GPU, %d.%d, it has %d; make the plan on this machine or with its "
        "profile",
        cc / 10, cc % 10, wants, here->cc / 10, here->cc % 10, has);
  return RG_OK;
}

rg_status rg_plan_node(const rg_plan *plan, size_t i, rg_node_info *out) {
  if (!plan || !out || i >= (size_t)plan->graph->nnode) return RG_E_USAGE;
  const rgi_graph *g = plan->graph;
  const rgi_node *n = &g->node[i];
  const rgi_choice *c = plan->choice;
  const int32_t at = step_of(plan, (int32_t)i);
  *out = (rg_node_info){.name = n->name,
                        .op = n->op->name,
                        .spec_node = n->origin >= 0 ? g->origin[n->origin].name : NULL,
                        .kind = kind_of(n),
                        .backward = n->backward,
                        .group = n->group,
                        .step = at};
  out->recomputed = n->kind == RGI_PRIMAL && c && n->origin >= 0 && n->origin < c->nnode &&
                    c->node[n->origin].recomputed;
  if (at < 0) return RG_OK;
  const rgi_step *s = &plan->step[at];
  out->kernels = rgi_plan_path(plan, at);
  out->workspace = s->workspace_size;
  out->flops = s->cost.flops;
  out->bytes = s->cost.bytes;
  out->exps = s->cost.exps;
  out->dtype = s->dtype;
  out->model_ms = s->ms;
  out->roofline_ms = s->roofline_ms;
  for (int k = 0; k < rgi_nout(n); k++)
    if (n->out[k] >= 0) out->written += rgi_bytes(&g->tensor[n->out[k]]);
  return RG_OK;
}
