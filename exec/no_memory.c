/* exec/no_memory.c: what fills a GPU's memory where there is too little. */
#include <stdio.h>
#include <string.h>

#include "plan.h"

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

rg_status rgi_plan_no_memory(const rg_plan *plan, int64_t bytes, int64_t have, int64_t all,
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
             rg_human_bytes(b->size, size));
  }
  return rgi_fail(e, RG_E_DEVICE, NULL, NULL,
                  "out of device memory: a block of %s is needed, %s of %s are free; the largest "
                  "tensors are %s. "
                  "Recompute more, set split_heads or a budget in the policy",
                  rg_human_bytes(bytes, need), rg_human_bytes(have, left),
                  rg_human_bytes(all, total), list);
}
