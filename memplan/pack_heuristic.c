/* memplan/pack_heuristic.c: good packings quickly: first fit over many orders.

   First fit puts each piece of an order at the lowest offset where it fits between the pieces
   placed before. Improving is a squeaky wheel: pieces that end above the target move forward in the
   order, the rest is shaken a little.
 */
#include "pack_internal.h"
#include <stdlib.h>
#include <string.h>

struct rgi_heuristic {
  const rgi_packing *p;
  int32_t *order, *best_order, *by_offset; /* [n] */
  int64_t *offset;                         /* [n] */
  double *priority, *base;                 /* [n] */
  uint64_t state;
  int64_t round;
  int64_t work; /* of one */
};

static double unit_random(rgi_heuristic *h) {
  return (double)(rgi_next_random(&h->state) >> 11) * 0x1p-53;
}

int64_t rgi_first_fit(rgi_heuristic *h, const int32_t *order, int64_t *offset) {
  const rgi_packing *p = h->p;
  const rgi_piece *piece = p->piece;
  int64_t peak = 0;
  for (int32_t k = 0; k < p->n; k++) {
    const int32_t u = order[k], a = piece[u].first, b = piece[u].last;
    int64_t at = 0, size = piece[u].size;
    for (int32_t i = 0; i < k; i++) { /* placed pieces by offset */
      int32_t v = h->by_offset[i];
      if (piece[v].last < a || piece[v].first > b) continue;
      if (offset[v] - at >= size) break;
      int64_t top = offset[v] + piece[v].size;
      if (top > at) at = top;
    }
    offset[u] = at;
    int32_t i = k;
    for (; i > 0 && offset[h->by_offset[i - 1]] > at; i--) h->by_offset[i] = h->by_offset[i - 1];
    h->by_offset[i] = u;
    int64_t end = at * p->unit + rgi_piece_bytes(p, u);
    if (end > peak) peak = end;
  }
  return peak;
}

typedef struct ranked {
  double key;
  int32_t piece;
} ranked;

static int compare_ranked(const void *x, const void *y) {
  const ranked *a = x, *b = y;
  if (a->key != b->key) return a->key > b->key ? -1 : 1;
  return (a->piece > b->piece) - (a->piece < b->piece);
}

static void sort_by(rgi_heuristic *h, const double *key, ranked *scratch) {
  for (int32_t i = 0; i < h->p->n; i++) scratch[i] = (ranked){key[i], i};
  qsort(scratch, (size_t)h->p->n, sizeof *scratch, compare_ranked);
  for (int32_t i = 0; i < h->p->n; i++) h->order[i] = scratch[i].piece;
}

enum { STARTS = 6 };

/* The start orders: what a piece is worth by. */
static double worth(const rgi_packing *p, int32_t i, int kind) {
  const rgi_piece *x = &p->piece[i];
  double size = (double)x->size, length = x->last - x->first + 1;
  int64_t most = 0;
  switch (kind) {
  case 0: return size;
  case 1: return size * length;
  case 2: return length + size * 1e-12;
  case 3: return size * length * length;
  case 4: /* fullest section first */
    for (int32_t t = x->first; t <= x->last; t++)
      if (p->load[t] > most) most = p->load[t];
    return (double)most + size / (double)(most + 1);
  default: return size * size * length;
  }
}

void rgi_heuristic_improve(rgi_heuristic *h, int64_t target, int64_t rounds, const rgi_stop *stop,
                           int64_t *offset, int64_t *peak) {
  const rgi_packing *p = h->p;
  ranked *scratch = (ranked *)(void *)h->best_order;
  for (int64_t r = 0; r<rounds && * peak> target; r++, h->round++) {
    if (((r & 7) == 7 || p->n > 1000) && rgi_stops(stop, (p->n > 1000 ? 1 : 8) * h->work)) return;
    int64_t in_phase = h->round % 64;
    if (h->round < STARTS) {
      for (int32_t i = 0; i < p->n; i++) h->priority[i] = worth(p, i, (int)h->round);
      /* a fresh start from one of the orders, shaken */
    } else if (in_phase == STARTS || in_phase == 0) {
      int kind = (int)(rgi_next_random(&h->state) % STARTS);
      double most = 0;
      for (int32_t i = 0; i < p->n; i++) {
        h->priority[i] = worth(p, i, kind) * (0.75 + 0.5 * unit_random(h));
        if (h->priority[i] > most) most = h->priority[i];
      }
      for (int32_t i = 0; i < p->n; i++) h->priority[i] /= most;
    }
    sort_by(h, h->priority, scratch);
    int64_t now = rgi_first_fit(h, h->order, h->offset);
    if (now < *peak) {
      *peak = now;
      memcpy(offset, h->offset, (size_t)p->n * sizeof *offset);
    }
    if (h->round >= STARTS) {
      int64_t line = target + (int64_t)((double)(now - target) * unit_random(h));
      for (int32_t i = 0; i < p->n; i++) {
        int64_t end = h->offset[i] * p->unit + rgi_piece_bytes(p, i);
        if (end > line) h->priority[i] += 0.02 + 0.2 * unit_random(h);
      }
    }
  }
}

rg_status rgi_heuristic_create(const rgi_packing *p, rgi_heuristic **out, rg_error *e) {
  size_t n = (size_t)p->n;
  rgi_heuristic *h = *out = rgi_malloc(p->ctx, sizeof *h);
  if (!h) return rgi_nomem(e);
  memset(h, 0, sizeof *h);
  h->p = p;
  h->state = (uint64_t)p->n;
  h->work = (int64_t)p->n * p->n * 2;
  if (!(h->order = rgi_malloc(p->ctx, n * sizeof *h->order)) ||
      !(h->best_order = rgi_malloc(p->ctx, n * sizeof(ranked))) ||
      !(h->by_offset = rgi_malloc(p->ctx, n * sizeof *h->by_offset)) ||
      !(h->offset = rgi_malloc(p->ctx, n * sizeof *h->offset)) ||
      !(h->priority = rgi_malloc(p->ctx, n * sizeof *h->priority))) {
    rgi_heuristic_destroy(h);
    *out = NULL;
    return rgi_nomem(e);
  }
  return RG_OK;
}

void rgi_heuristic_destroy(rgi_heuristic *h) {
  if (!h) return;
  void *all[] = {h->order, h->best_order, h->by_offset, h->offset, h->priority};
  for (int i = 0; i < RGI_COUNT(all); i++) rgi_free(h->p->ctx, all[i]);
  rgi_free(h->p->ctx, h);
}
