/* recompute/subsets.c: all subsets of a few costs in order of their sum, lazily.

   Costs sorted ascending; a subset whose largest element stands at place i is followed by the one
   with i+1 added and the one with i replaced by i+1. Every subset is reached once, and never before
   a cheaper one.
 */
#include "search.h"
#include <stdlib.h>
#include <string.h>

typedef struct entry {
  double cost;
  uint64_t mask; /* over sorted places */
  int top;       /* largest place, -1: the empty set */
} entry;

struct rgi_subsets {
  const rg_context *ctx;
  int n;
  double cost[RGI_EXACT_LIMIT];
  int place[RGI_EXACT_LIMIT]; /* sorted place → original index */
  entry *heap;
  size_t count, capacity;
};

static bool less(const entry *a, const entry *b) {
  if (a->cost != b->cost) return a->cost < b->cost;
  return a->mask < b->mask;
}

static bool push(rgi_subsets *s, entry x) {
  if (s->count == s->capacity) {
    size_t larger = s->capacity ? s->capacity * 2 : 64;
    entry *heap = rgi_malloc(s->ctx, larger * sizeof *heap);
    if (!heap) return false;
    if (s->count) memcpy(heap, s->heap, s->count * sizeof *heap);
    rgi_free(s->ctx, s->heap);
    s->heap = heap;
    s->capacity = larger;
  }
  size_t i = s->count++;
  for (; i > 0 && less(&x, &s->heap[(i - 1) / 2]); i = (i - 1) / 2)
    s->heap[i] = s->heap[(i - 1) / 2];
  s->heap[i] = x;
  return true;
}

static entry pop(rgi_subsets *s) {
  entry top = s->heap[0], x = s->heap[--s->count];
  size_t i = 0;
  for (;;) {
    size_t child = 2 * i + 1;
    if (child >= s->count) break;
    if (child + 1 < s->count && less(&s->heap[child + 1], &s->heap[child])) child++;
    if (!less(&s->heap[child], &x)) break;
    s->heap[i] = s->heap[child];
    i = child;
  }
  s->heap[i] = x;
  return top;
}

rgi_subsets *rgi_subsets_create(const rg_context *ctx, const double *cost, int n) {
  rgi_subsets *s = rgi_malloc(ctx, sizeof *s);
  if (!s) return NULL;
  *s = (rgi_subsets){.ctx = ctx, .n = n};
  for (int i = 0; i < n; i++) { /* insertion sort, stable */
    int j = i;
    for (; j > 0 && cost[s->place[j - 1]] > cost[i]; j--) s->place[j] = s->place[j - 1];
    s->place[j] = i;
  }
  for (int i = 0; i < n; i++) s->cost[i] = cost[s->place[i]];
  if (!push(s, (entry){.top = -1})) {
    rgi_free(ctx, s);
    return NULL;
  }
  return s;
}

void rgi_subsets_destroy(rgi_subsets *s) {
  if (!s) return;
  rgi_free(s->ctx, s->heap);
  rgi_free(s->ctx, s);
}

bool rgi_subsets_next(rgi_subsets *s, uint64_t *mask, double *cost, bool *failed) {
  *failed = false;
  if (s->count == 0) return false;
  entry x = pop(s);
  int next = x.top + 1;
  if (next < s->n) {
    entry more = {x.cost + s->cost[next], x.mask | UINT64_C(1) << next, next};
    bool ok = push(s, more);
    if (ok && x.top >= 0) {
      entry moved = {x.cost - s->cost[x.top] + s->cost[next],
                     (x.mask & ~(UINT64_C(1) << x.top)) | UINT64_C(1) << next, next};
      ok = push(s, moved);
    }
    if (!ok) {
      *failed = true;
      return false;
    }
  }
  *mask = 0;
  for (int i = 0; i < s->n; i++)
    if (x.mask >> i & 1) *mask |= UINT64_C(1) << s->place[i];
  *cost = x.cost;
  return true;
}
