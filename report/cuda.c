/* report/cuda.c: which kernels the steps of a plan for a GPU take. */
#include "report.h"

/* Clones and groups of a node take the same way: each line names the first of them. */
void rgi_report_kernels(const rg_plan *plan, rgi_buf *b) {
  const rgi_graph *g = plan->graph;
  bool any = false;
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_node *n = &g->node[plan->step[i].node];
    const char *path = rgi_plan_path(plan, i);
    bool known = !path || n->origin < 0;
    for (int32_t k = 0; k < i && !known; k++) {
      const rgi_node *m = &g->node[plan->step[k].node];
      known = m->origin == n->origin && m->op == n->op;
    }
    if (known) continue;
    if (!any)
      rgi_buf_printf(b, "kernels (compute capability %d.%d, %d multiprocessors)\n",
                     plan->gpu.cc / 10, plan->gpu.cc % 10, plan->gpu.sms);
    any = true;
    rgi_buf_printf(b, "  %-15s %-14s %s\n", g->origin[n->origin].name, n->op->name, path);
  }
}
