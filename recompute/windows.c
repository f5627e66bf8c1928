/* recompute/windows.c: when a GPU's copies to and from the host's memory run, by the time model,
   and where they therefore stand in the order of nodes.

   Compute runs node after node; beside it one copy engine takes what leaves in forward, another
   what comes back in backward, each copy after the one before.

       forward    a   b   c   d   e          leaves as soon as it is made, and stands where the
                   └ copy of a ┘ ▲           copy ends: until there its bytes are its own
       backward   e'  d'  c'  b'  a'         comes back as late as its first reader allows, and
                      ▲ copy of a ┘          stands where the copy begins: from there on it has
                                             bytes

   So lifetimes follow from the order as they always do, edges follow from bytes, and nothing but
   this file knows of windows. What the copies last beyond what is computed is waited for. Windows
   are SLACK times as long as the copies: the model's times are not exact, and bytes given away too
   early are waited for, too.
 */
#include "search.h"

static const double SLACK = 1.25;

typedef struct windows {
  const rgi_graph *g;
  double *ms;    /* per node */
  double *start; /* per node that computes: when, in its direction; [nnode]: the end of backward */
  double *at;    /* per copy: when its window ends (forward) or begins (backward) */
  int32_t *next; /* per place in the new order: the node */
  int32_t n;
} windows;

/* Serial times of what computes, and the forward's end. */
static double find_starts(windows *w) {
  double now = 0, forward = 0;
  bool backward = false;
  for (int32_t k = 0; k < w->g->nnode; k++) {
    if (w->g->node[k].backward && !backward) {
      backward = true;
      forward = now;
      now = 0;
    }
    w->start[k] = now;
    if (!rgi_is_copy(w->g, k)) now += w->ms[k];
  }
  w->start[w->g->nnode] = now;
  return backward ? forward : now;
}

/* Forward: copies in the order in which their tensors are made. What they last beyond `end`. */
static double leave(windows *w, double end) {
  double lane = 0, slack = 0;
  for (int32_t k = 0; k < w->g->nnode && !w->g->node[k].backward; k++) {
    if (!rgi_is_copy(w->g, k)) continue;
    if (lane < w->start[k]) lane = w->start[k];
    if (slack < w->start[k]) slack = w->start[k];
    lane += w->ms[k];
    w->at[k] = slack += SLACK * w->ms[k];
  }
  return lane > end ? lane - end : 0;
}

/* Backward: each as late as the next copy and its first reader, directly behind it so far, allow.
 * What readers wait for at most. */
static double come_back(windows *w) {
  double late = 0, sum = 0, next = w->start[w->g->nnode];
  for (int32_t k = w->g->nnode - 1; k >= 0 && w->g->node[k].backward; k--) {
    if (!rgi_is_copy(w->g, k)) continue;
    if (next > w->start[k]) next = w->start[k];
    w->at[k] = next -= SLACK * w->ms[k];
  }
  for (int32_t k = 0; k < w->g->nnode; k++) {
    if (!w->g->node[k].backward || !rgi_is_copy(w->g, k)) continue;
    sum += w->ms[k];
    if (sum - w->start[k] > late) late = sum - w->start[k];
  }
  return late;
}

/* May a copy stand before node k, which computes? */
static bool due(const windows *w, int32_t copy, int32_t k) {
  if (w->g->node[k].backward) return w->at[copy] < w->start[k] + w->ms[k]; /* begins by then */
  return copy < k && w->at[copy] <= w->start[k];                           /* is over */
}

/* The new order of nodes first … end - 1, a direction: what computes stays in its own, and so do
 * copies. */
static void place(windows *w, int32_t first, int32_t end) {
  const rgi_graph *g = w->g;
  int32_t copy = first; /* the next that has no place */
  for (int32_t k = first; k < end; k++) {
    const bool is_copy = rgi_is_copy(g, k);
    for (; copy < end; copy++) {
      if (!rgi_is_copy(g, copy)) continue;
      const bool late = g->node[k].backward && copy <= k; /* as it may be */
      if (!late && (is_copy || !due(w, copy, k))) break;
      w->next[w->n++] = copy;
    }
    if (!is_copy) w->next[w->n++] = k;
  }
  for (; copy < end; copy++)
    if (rgi_is_copy(g, copy)) w->next[w->n++] = copy;
}

static rg_status reorder(rgi_graph *g, const windows *w, rg_error *e) {
  rgi_node *node = rgi_alloc_n(g->arena, (size_t)g->nnode + 1, sizeof *node);
  if (!node) return rgi_nomem(e);
  for (int32_t i = 0; i < g->nnode; i++) {
    node[i] = g->node[w->next[i]];
    for (int k = 0; k < rgi_nout(&node[i]); k++)
      if (node[i].out[k] >= 0) g->tensor[node[i].out[k]].producer = i;
  }
  memcpy(g->node, node, (size_t)g->nnode * sizeof *node);
  return RG_OK;
}

rg_status rgi_copy_windows(rgi_graph *g, const rgi_profile *profile, double wait[2], rg_error *e) {
  const size_t n = (size_t)g->nnode + 1;
  rgi_arena *a = rgi_arena_create(g->ctx);
  if (!a) return rgi_nomem(e);
  windows w = {.g = g,
               .ms = rgi_alloc_n(a, n, sizeof *w.ms),
               .start = rgi_alloc_n(a, n, sizeof *w.start),
               .at = rgi_alloc_n(a, n, sizeof *w.at),
               .next = rgi_alloc_n(a, n, sizeof *w.next)};
  rg_status status = w.ms && w.start && w.at && w.next ? RG_OK : rgi_nomem(e);
  for (int32_t k = 0; k < g->nnode && status == RG_OK; k++)
    status = rgi_node_ms(g, k, profile, a, &w.ms[k], e);
  if (status == RG_OK) {
    const double forward = find_starts(&w);
    wait[0] = leave(&w, forward);
    wait[1] = come_back(&w);
    int32_t turn = 0;
    while (turn < g->nnode && !g->node[turn].backward) turn++;
    place(&w, 0, turn);
    place(&w, turn, g->nnode);
    status = reorder(g, &w, e);
  }
  rgi_arena_destroy(a);
  return status;
}
