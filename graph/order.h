/* graph/order.h: which nodes must wait for which, by the data they hand on or because a pass said
 * so. Nodes without a path between them may run at the same time. */
#ifndef RGI_ORDER_H
#define RGI_ORDER_H

#include "bits.h"
#include "ir.h"

/* Two views of one owner that share no element, for sure (head groups of one tensor). */
bool rgi_apart(const rgi_graph *g, int32_t t, int32_t u);

typedef struct rgi_order {
  int32_t n, words;
  uint64_t *before; /* [n][words]: the nodes that node i waits for, directly or not */
} rgi_order;

static inline const uint64_t *rgi_before(const rgi_order *o, int32_t node) {
  return o->before + (size_t)node * (size_t)o->words;
}

/* A node that waits for `node` waits for all that one waits for (`before`). */
static inline void rgi_wait_for(uint64_t *mine, int32_t node, const uint64_t *before,
                                int32_t words) {
  for (int32_t w = 0; w < words; w++) mine[w] |= before[w];
  rgi_put(mine, node);
}

/* Of a bound graph whose nodes stand in execution order. The two directions do not wait for each
 * other. */
rg_status rgi_order_find(const rgi_graph *g, rgi_arena *a, rgi_order *out, rg_error *e);

#endif
