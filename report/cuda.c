/* report/cuda.c: what a plan for a GPU says besides: the kernels that each step takes, its lanes. */
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

/* One box per step, edges as the CUDA graph has them, a colour per lane. */
void rgi_report_dot(const rg_plan *plan, rgi_buf *b) {
  static const char *const colour[] = {"#e0ecf8", "#fff2cc", "#e2f0d9",
                                       "#f8e0e0", "#e9e0f5", "#ddf0f0"};
  const rgi_graph *g = plan->graph;
  const int32_t *lane = plan->lane;
  rgi_buf_printf(b, "digraph ");
  rgi_buf_json(b, g->name);
  rgi_buf_printf(
      b,
      " {\n  rankdir=LR;\n  node [shape=box, style=filled, fontname=\"sans-serif\", fontsize=10];\n"
      "  edge [color=\"#888888\"];\n");
  for (int direction = 0; direction < 2; direction++) {
    int32_t from = direction ? plan->nforward : 0, to = direction ? plan->nstep : plan->nforward;
    if (from == to) continue;
    rgi_buf_printf(b, "  subgraph cluster_%s {\n    label=\"%s\";\n",
                   direction ? "backward" : "forward",
                   direction ? "backward graph" : "forward graph");
    for (int32_t i = from; i < to; i++) {
      const rgi_node *n = &g->node[plan->step[i].node];
      const char *path = rgi_plan_path(plan, i);
      rgi_buf_printf(b, "    s%d [label=\"%s\\n%s%s%s\\nlane %d\", fillcolor=\"%s\"];\n", i,
                     n->name, n->op->name, path ? "\\n" : "", path ? path : "", lane[i],
                     colour[lane[i] % (int)(sizeof colour / sizeof *colour)]);
    }
    for (int32_t i = from; i < to; i++)
      for (const int32_t *p = plan->after[i]; *p >= 0; p++)
        rgi_buf_printf(b, "    s%d -> s%d;\n", *p, i);
    rgi_buf_printf(b, "  }\n");
  }
  rgi_buf_printf(b, "}\n");
}
