/* graph/state.c: versions of state (ir.h, invariant I10).

   State is bytes that the caller keeps from run to run. In the graph they are a chain of tensors,
   each made once, like everything else:

       k_cache ──kv_append──▶ k_now ──page_copy──▶ k_next          one owner, version 0, 1, 2
          └─transpose─▶ view, of version 0

   A node that writes state reads one version and makes the next in the same bytes. So whoever else
   reads the old one, itself or by a view, must be done before: that node waits for them, though it
   reads nothing of theirs.
 */
#include "ir.h"

/* Does the node look into its first input, all of it or a part? A join is looked into. */
static bool looks(const rgi_node *n) {
  return n->op->flags & RG_OP_VIEW && n->op->nin > 0 && !(n->op->in[0].flags & RG_PORT_LIST);
}

int rgi_version(const rgi_graph *g, int t, bool *partial) {
  /* as many steps as there are tensors, since what is not sorted yet may go around in circles */
  for (int32_t step = 0; t >= 0 && step < g->ntensor; step++) {
    const int32_t from = g->tensor[t].producer;
    if (from < 0 || !looks(&g->node[from]) || rgi_in(&g->node[from], 0) < 0) break;
    if (partial && g->node[from].op->rules) *partial |= g->node[from].op->rules->partial;
    t = rgi_in(&g->node[from], 0);
  }
  return t;
}

int rgi_next_in(const rgi_node *n, int i, int *port) {
  for (int p = 0; p < n->op->nin; p++) {
    if (!(n->op->in[p].flags & RG_PORT_STATE) || i < n->in_begin[p] || i >= n->in_begin[p + 1])
      continue;
    const int out = rgi_out_port(n->op, n->op->in[p].name), k = i - n->in_begin[p];
    if (port) *port = p;
    return out < 0 || k >= n->out_begin[out + 1] - n->out_begin[out]
               ? -1
               : n->out[n->out_begin[out] + k];
  }
  return -1;
}

int rgi_next_version(const rgi_graph *g, int t, int *node) {
  for (int n = 0; n < g->nnode; n++) {
    if (!(g->node[n].op->flags & RG_OP_STATE)) continue;
    for (int i = 0; i < rgi_nin(&g->node[n]); i++) {
      const int next = rgi_next_in(&g->node[n], i, NULL);
      if (next < 0 || rgi_version(g, g->node[n].in[i], NULL) != t) continue;
      if (node) *node = n;
      return next;
    }
  }
  return -1;
}

int rgi_state_waits(const rgi_graph *g, int n, const bool *placed) {
  const rgi_node *node = &g->node[n];
  if (!(node->op->flags & RG_OP_STATE)) return -1;
  for (int i = 0; i < rgi_nin(node); i++) {
    if (rgi_next_in(node, i, NULL) < 0) continue;
    const int old = rgi_version(g, node->in[i], NULL);
    for (int m = 0; m < g->nnode; m++) {
      if (m == n || placed[m]) continue;
      for (int k = 0; k < rgi_nin(&g->node[m]); k++)
        if (g->node[m].in[k] >= 0 && rgi_version(g, g->node[m].in[k], NULL) == old) return m;
    }
  }
  return -1;
}

const rgi_io *rgi_state_of(const rgi_graph *g, int t) {
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].state && (t < 0 || g->input[i].tensor == t)) return &g->input[i];
  return NULL;
}
