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
   early are waited for, too. On the way back a window that begins in the middle of a step lasts
   from behind that step, if that still is LEAST_SLACK times the copy: else a long step, as the
   backward of attention with its workspace, would have the next layer's input lie beside it for
   nothing. What is computed again takes no time here: windows are the longer for it, and do not
   hang on what that is but for where it wants something back.
 */
#include "search.h"

static const double SLACK = 1.25, LEAST_SLACK = 1.1;

/* Serial times of what computes, and the direction's end. */
static double find_starts(rgi_lane *w) {
  double now = 0;
  for (int32_t k = 0; k < w->n; k++) {
    w->start[k] = now;
    if (!w->copy[k]) now += w->ms[k];
  }
  return now;
}

/* Forward: copies in the order in which their tensors are made. What they last beyond `end`. */
static double leave(rgi_lane *w, double end) {
  double lane = 0, slack = 0;
  for (int32_t k = 0; k < w->n; k++) {
    if (!w->copy[k]) continue;
    if (lane < w->start[k]) lane = w->start[k];
    if (slack < w->start[k]) slack = w->start[k];
    lane += w->ms[k];
    w->at[k] = slack += SLACK * w->ms[k];
  }
  return lane > end ? lane - end : 0;
}

/* Backward: each as late as the next copy and its first reader, directly behind it so far, allow.
 * What readers wait for at most. */
static double come_back(rgi_lane *w, double end) {
  double late = 0, sum = 0, next = end, last = end;
  for (int32_t k = w->n - 1; k >= 0; k--) {
    if (!w->copy[k]) continue;
    if (next > w->start[k]) next = w->start[k];
    if (last > w->start[k]) last = w->start[k];
    w->at[k] = next -= SLACK * w->ms[k];
    w->latest[k] = last -= LEAST_SLACK * w->ms[k];
  }
  for (int32_t k = 0; k < w->n; k++) {
    if (!w->copy[k]) continue;
    sum += w->ms[k];
    if (sum - w->start[k] > late) late = sum - w->start[k];
  }
  return late;
}

/* May a copy stand before step k, which computes? */
static bool due(const rgi_lane *w, int32_t copy, int32_t k, bool backward) {
  if (backward) return w->at[copy] < w->start[k] || w->latest[copy] < w->start[k] + w->ms[k];
  return copy < k && w->at[copy] <= w->start[k]; /* is over */
}

/* What computes stays in its own order, and so do copies. */
static void place(rgi_lane *w, bool backward) {
  int32_t copy = 0, n = 0; /* the next that has no place */
  for (int32_t k = 0; k < w->n; k++) {
    for (; copy < w->n; copy++) {
      if (!w->copy[copy]) continue;
      const bool late = backward && copy <= k; /* as it may be */
      if (!late && (w->copy[k] || !due(w, copy, k, backward))) break;
      w->next[n++] = copy;
    }
    if (!w->copy[k]) w->next[n++] = k;
  }
  for (; copy < w->n; copy++)
    if (w->copy[copy]) w->next[n++] = copy;
}

double rgi_lane_place(rgi_lane *w, bool backward) {
  const double end = find_starts(w);
  const double wait = backward ? come_back(w, end) : leave(w, end);
  place(w, backward);
  return wait;
}

rg_status rgi_lane_open(rgi_lane *w, size_t n, rgi_arena *a, rg_error *e) {
  *w = (rgi_lane){.ms = rgi_alloc_n(a, n + 1, sizeof *w->ms),
                  .copy = rgi_alloc_n(a, n + 1, sizeof *w->copy),
                  .start = rgi_alloc_n(a, n + 1, sizeof *w->start),
                  .at = rgi_alloc_n(a, n + 1, sizeof *w->at),
                  .latest = rgi_alloc_n(a, n + 1, sizeof *w->latest),
                  .next = rgi_alloc_n(a, n + 1, sizeof *w->next)};
  return w->ms && w->copy && w->start && w->at && w->latest && w->next ? RG_OK : rgi_nomem(e);
}

static void reorder(rgi_graph *g, const rgi_node *old, const rgi_lane *w, int32_t first) {
  for (int32_t i = 0; i < w->n; i++) {
    rgi_node *node = &g->node[first + i];
    *node = old[first + w->next[i]];
    for (int k = 0; k < rgi_nout(node); k++)
      if (node->out[k] >= 0) g->tensor[node->out[k]].producer = first + i;
  }
}

rg_status rgi_copy_windows(rgi_graph *g, const rgi_profile *profile, bool move, double wait[2],
                           rg_error *e) {
  const size_t n = (size_t)g->nnode;
  rgi_lane w;
  bool any = false;
  wait[0] = wait[1] = 0;
  for (int32_t k = 0; k < g->nnode; k++) any |= rgi_is_copy(g, k);
  if (!any) return RG_OK;
  rgi_arena *a = rgi_arena_create(g->ctx);
  if (!a) return rgi_nomem(e);
  rg_status status = rgi_lane_open(&w, n, a, e);
  rgi_node *old = rgi_alloc_n(a, n + 1, sizeof *old);
  if (status == RG_OK && !old) status = rgi_nomem(e);
  if (status == RG_OK && n) memcpy(old, g->node, n * sizeof *old);
  for (int32_t k = 0; k < g->nnode && status == RG_OK;) {
    const int32_t first = k;
    const bool backward = g->node[k].backward;
    for (w.n = 0; k < g->nnode && g->node[k].backward == backward && status == RG_OK; k++, w.n++) {
      w.copy[w.n] = rgi_is_copy(g, k);
      w.ms[w.n] = 0;
      if (g->node[k].kind != RGI_CLONE || w.copy[w.n])
        status = rgi_node_ms(g, k, profile, a, &w.ms[w.n], e);
    }
    if (status != RG_OK) break;
    wait[backward] = rgi_lane_place(&w, backward);
    if (move) reorder(g, old, &w, first);
  }
  rgi_arena_destroy(a);
  return status;
}
