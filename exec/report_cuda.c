/* exec/report_cuda.c: what a plan for a GPU says besides: which kernels each step takes, and its
 * lanes; and what fills the memory where there is too little. */
#include "report.h"
#include <stdio.h>
#include <string.h>

/* "wgmma", "plain: …", or NULL where an op has but one way. */
static const char *path_of(const rg_plan *plan, int32_t i) {
  const rgi_step *s = &plan->step[i];
  const rg_op *op = plan->graph->node[s->node].op;
  return op->cuda_path ? op->cuda_path(&s->call) : NULL;
}

const char *rgi_report_path(const rg_plan *plan, int32_t i) {
  return plan->cuda ? path_of(plan, i) : NULL;
}

/* Clones and groups of a node take the same way: each line names the first of them. */
void rgi_report_kernels(const rg_plan *plan, rgi_buf *b) {
  const rgi_graph *g = plan->graph;
  bool any = false;
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_node *n = &g->node[plan->step[i].node];
    const char *path = path_of(plan, i);
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

/* The largest block that is none of the `n` picked ones. */
static int32_t next_largest(const rgi_memory *m, const int32_t *picked, int n) {
  int32_t best = -1;
  for (int32_t i = 0; i < m->nblock; i++) {
    bool taken = false;
    for (int k = 0; k < n; k++) taken |= picked[k] == i;
    if (!taken && (best < 0 || m->block[i].size > m->block[best].size)) best = i;
  }
  return best;
}

rg_status rgi_report_no_memory(const rg_plan *plan, int64_t bytes, int64_t have, int64_t all,
                               rg_error *e) {
  const rgi_graph *g = plan->graph;
  const rgi_memory *m = plan->memory;
  char need[32], left[32], total[32], list[320] = "", size[32];
  int32_t picked[3];
  for (int n = 0; n < RGI_COUNT(picked) && n < m->nblock; n++) {
    picked[n] = next_largest(m, picked, n);
    const rgi_block *b = &m->block[picked[n]];
    size_t used = strlen(list);
    snprintf(list + used, sizeof list - used, "%s%s%.60s (%s)", n ? ", " : "",
             b->tensor < 0 ? "the workspace of " : "",
             b->tensor < 0 ? g->node[b->first].name : g->tensor[b->tensor].name,
             rgi_human_bytes(b->size, size));
  }
  return rgi_fail(e, RG_E_DEVICE, NULL, NULL,
                  "out of device memory: a block of %s is needed, %s of %s are free; the largest "
                  "tensors are %s. "
                  "Recompute more, set split_heads or a budget in the policy",
                  rgi_human_bytes(bytes, need), rgi_human_bytes(have, left),
                  rgi_human_bytes(all, total), list);
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
      const char *path = path_of(plan, i);
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
