/* memplan/pack.c: the packer: reduces buffers to packings, proves bounds, drives heuristics and exact search.
 *
 * Promises: every result is a valid packing; never worse than greedy by size; `optimal` only if the peak
 * equals a proved lower bound (most bytes alive at once, or more where the search exhausted a capacity). Work
 * is measured out in search nodes and rounds, not in time, so a run that ends before its limit gives the same
 * result every time.
 */
#include "pack_internal.h"
#include <stdlib.h>
#include <string.h>
#include <time.h>

double rgi_pack_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- checking and rounding ---- */

static bool trivial(const rg_buffer *b) {
  return b->lower == b->upper || b->size == 0;
}

/* Valid, and even the sum of all rounded sizes is a number. */
static rg_status check_input(const rg_buffer *b, size_t n, int64_t align, rg_error *e) {
  int64_t total = 0;
  if (n > 0 && !b) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "buffers is NULL");
  if (n > INT32_MAX / 4) return rgi_fail(e, RG_E_LIMIT, NULL, NULL, "%zu buffers are too many", n);
  if (align < 1)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "alignment %lld is not positive", (long long)align);
  for (size_t i = 0; i < n; i++) {
    if (b[i].lower > b[i].upper)
      return rgi_fail(e, RG_E_DATA, NULL, NULL, "buffer %zu ends (%lld) before it starts (%lld)", i,
                      (long long)b[i].upper, (long long)b[i].lower);
    if (b[i].size < 0)
      return rgi_fail(e, RG_E_DATA, NULL, NULL, "buffer %zu has the negative size %lld", i,
                      (long long)b[i].size);
    int64_t rounded;
    if (!rgi_add(b[i].size, align - 1, &rounded) || !rgi_add(total, rounded - rounded % align, &total))
      return rgi_fail(e, RG_E_OVERFLOW, NULL, NULL, "sizes add up to more than 64 bits at buffer %zu", i);
  }
  return RG_OK;
}

static int64_t rounded_size(const rg_buffer *b, int64_t align) {
  return (b->size + align - 1) / align * align;
}

/* ---- greedy by size, the baseline ---- */

typedef struct sized {
  int64_t size;
  size_t i;
} sized;

static int compare_sized(const void *x, const void *y) {
  const sized *a = x, *b = y;
  if (a->size != b->size) return a->size > b->size ? -1 : 1;
  return (a->i > b->i) - (a->i < b->i);
}

rg_status rgi_pack_greedy(const rg_context *ctx, rg_buffer *b, size_t n, int64_t align, int64_t *peak,
                          rg_error *e) {
  *peak = 0;
  RGI_TRY(check_input(b, n, align, e));
  sized *order = rgi_malloc(ctx, (n + 1) * sizeof *order);
  size_t *by_offset = rgi_malloc(ctx, (n + 1) * sizeof *by_offset);
  if (!order || !by_offset) {
    rgi_free(ctx, order);
    rgi_free(ctx, by_offset);
    return rgi_nomem(e);
  }
  for (size_t i = 0; i < n; i++) order[i] = (sized){b[i].size, i};
  qsort(order, n, sizeof *order, compare_sized);
  size_t placed = 0;
  for (size_t k = 0; k < n; k++) {
    rg_buffer *u = &b[order[k].i];
    u->offset = 0;
    if (trivial(u)) continue;
    int64_t at = 0;
    for (size_t i = 0; i < placed; i++) {
      const rg_buffer *v = &b[by_offset[i]];
      if (v->upper <= u->lower || u->upper <= v->lower) continue;
      if (v->offset - at >= u->size) break;
      int64_t top = v->offset + rounded_size(v, align);
      if (top > at) at = top;
    }
    u->offset = at;
    size_t i = placed++;
    for (; i > 0 && b[by_offset[i - 1]].offset > at; i--) by_offset[i] = by_offset[i - 1];
    by_offset[i] = order[k].i;
    if (at + u->size > *peak) *peak = at + u->size;
  }
  rgi_free(ctx, order);
  rgi_free(ctx, by_offset);
  return RG_OK;
}

/* ---- reduction ---- */

typedef struct event {
  int64_t time;
  int32_t piece; /* ends come first: coded as ~index */
} event;

static int compare_events(const void *x, const void *y) {
  const event *a = x, *b = y;
  if (a->time != b->time) return a->time < b->time ? -1 : 1;
  return (a->piece > b->piece) - (a->piece < b->piece);
}

static int compare_pieces(const void *x, const void *y) {
  const rgi_piece *a = x, *b = y;
  if (a->first != b->first) return a->first < b->first ? -1 : 1;
  if (a->last != b->last) return a->last < b->last ? -1 : 1;
  if (a->size != b->size) return a->size > b->size ? -1 : 1;
  return (a->id > b->id) - (a->id < b->id);
}

static void free_packing(rgi_packing *p) {
  void *all[] = {p->piece, p->near, p->near_begin, p->load, p->pad};
  for (int i = 0; i < RGI_COUNT(all); i++) rgi_free(p->ctx, all[i]);
}

/* Completes a packing from its pieces (with sections 0 … m-1): loads, pads, who is near whom. */
static rg_status finish_packing(rgi_packing *p, rg_error *e) {
  size_t m = (size_t)p->m, n = (size_t)p->n;
  int64_t pairs = 0;
  p->load = rgi_malloc(p->ctx, m * sizeof *p->load);
  p->pad = rgi_malloc(p->ctx, m * sizeof *p->pad);
  p->near_begin = rgi_malloc(p->ctx, (n + 1) * sizeof *p->near_begin);
  if (!p->load || !p->pad || !p->near_begin) return rgi_nomem(e);
  memset(p->load, 0, m * sizeof *p->load);
  memset(p->pad, 0, m * sizeof *p->pad);
  for (int32_t i = 0; i < p->n; i++) {
    const rgi_piece *a = &p->piece[i];
    for (int32_t t = a->first; t <= a->last; t++) {
      p->load[t] += a->size;
      if (a->pad > p->pad[t]) p->pad[t] = a->pad;
    }
    for (int32_t j = i + 1; j < p->n && p->piece[j].first <= a->last; j++) pairs += 2;
  }
  p->near = rgi_malloc(p->ctx, (size_t)(pairs + 1) * sizeof *p->near);
  if (!p->near) return rgi_nomem(e);
  int64_t k = 0;
  for (int32_t i = 0; i < p->n; i++) {
    const rgi_piece *a = &p->piece[i];
    p->near_begin[i] = k;
    for (int32_t j = 0; j < i; j++)
      if (p->piece[j].last >= a->first) p->near[k++] = j;
    for (int32_t j = i + 1; j < p->n && p->piece[j].first <= a->last; j++) p->near[k++] = j;
  }
  p->near_begin[p->n] = k;
  return RG_OK;
}

/* Most bytes any packing needs at the fullest section. */
static int64_t packing_bound(const rgi_packing *p) {
  int64_t bound = 0;
  for (int32_t t = 0; t < p->m; t++)
    if (p->load[t] * p->unit - p->pad[t] > bound) bound = p->load[t] * p->unit - p->pad[t];
  return bound;
}

/* ---- one connected packing ---- */

typedef struct part {
  rgi_packing packing;
  int64_t *offset; /* best, units */
  int64_t peak, bound;
  rgi_heuristic *heuristic;
  rgi_search *search;
  uint32_t attempt; /* searches so far */
  int64_t round;
} part;

static void free_part(const rg_context *ctx, part *x) {
  rgi_heuristic_destroy(x->heuristic);
  rgi_search_destroy(x->search);
  rgi_free(ctx, x->offset);
  free_packing(&x->packing);
}

/* Searches at one capacity; learns a better packing or a better bound. */
static rg_status decide(part *x, int64_t capacity, int64_t budget, double deadline, int64_t *scratch,
                        int64_t *explored, rg_error *e) {
  switch (rgi_search_run(x->search, capacity, budget, x->attempt++, deadline, scratch, explored)) {
  case RGI_FOUND:
    x->peak = 0;
    for (int32_t i = 0; i < x->packing.n; i++) {
      int64_t end = scratch[i] * x->packing.unit + rgi_piece_bytes(&x->packing, i);
      x->offset[i] = scratch[i];
      if (end > x->peak) x->peak = end;
    }
    break;
  case RGI_NONE:
    if (capacity + 1 > x->bound) x->bound = capacity + 1;
    break;
  case RGI_STOPPED: break;
  case RGI_NO_MEMORY: return rgi_nomem(e);
  }
  return RG_OK;
}

/* 1 1 2 1 1 2 4 …: the restart lengths that lose least when nothing is known about how long a search takes.
 */
static int64_t luby(int64_t i) {
  int64_t size = 1, length = 1;
  while (length < i + 1) length = 2 * length + 1, size *= 2;
  while (length - 1 != i) {
    length /= 2;
    size /= 2;
    i %= length;
  }
  return size;
}

/* Works on a part until its peak is at most `target`, or its own bound, or the deadline passes. Mostly it
 * asks whether the goal itself can be reached, every third time whether something in between can. */
static rg_status solve_part(part *x, int64_t target, double deadline, int64_t *scratch, int64_t *explored,
                            rg_error *e) {
  rgi_packing *p = &x->packing;
  if (!x->heuristic) RGI_TRY(rgi_heuristic_create(p, &x->heuristic, e));
  rgi_heuristic_improve(x->heuristic, target > x->bound ? target : x->bound, 64, deadline, x->offset,
                        &x->peak);
  for (; rgi_pack_now() < deadline; x->round++) {
    int64_t goal = target > x->bound ? target : x->bound;
    if (x->peak <= goal) break;
    if (!x->search) RGI_TRY(rgi_search_create(p, &x->search, e));
    int64_t capacity = x->round % 3 == 2 ? goal + (x->peak - goal) / 2 : goal;
    RGI_TRY(decide(x, capacity, 4000 * luby(x->round), deadline, scratch, explored, e));
    goal = target > x->bound ? target : x->bound;
    rgi_heuristic_improve(x->heuristic, goal, 16, deadline, x->offset, &x->peak);
  }
  return RG_OK;
}

/* ---- the whole ---- */

static int64_t gcd(int64_t a, int64_t b) {
  while (b) {
    int64_t r = a % b;
    a = b;
    b = r;
  }
  return a;
}

typedef struct whole {
  const rg_context *ctx;
  rgi_piece *piece; /* [n] of all parts, by first section */
  event *event;
  int32_t n;
  part *part;
  int32_t nparts;
} whole;

static void free_whole(whole *w) {
  for (int32_t i = 0; i < w->nparts; i++) free_part(w->ctx, &w->part[i]);
  rgi_free(w->ctx, w->part);
  rgi_free(w->ctx, w->event);
  rgi_free(w->ctx, w->piece);
}

/* Pieces with their sections: the maximal sets alive together. A section ends where a buffer ends after one
 * started. */
static rg_status make_pieces(whole *w, const rg_buffer *b, size_t n, int64_t align, int64_t *unit,
                             rg_error *e) {
  w->piece = rgi_malloc(w->ctx, (n + 1) * sizeof *w->piece);
  w->event = rgi_malloc(w->ctx, (2 * n + 1) * sizeof *w->event);
  if (!w->piece || !w->event) return rgi_nomem(e);
  *unit = 0;
  for (size_t i = 0; i < n; i++) {
    if (trivial(&b[i])) continue;
    int64_t size = rounded_size(&b[i], align);
    *unit = gcd(*unit, size);
    w->event[2 * w->n] = (event){b[i].lower, w->n};
    w->event[2 * w->n + 1] = (event){b[i].upper, ~w->n};
    w->piece[w->n++] = (rgi_piece){.id = (int32_t)i, .size = size, .pad = size - b[i].size};
  }
  qsort(w->event, 2 * (size_t)w->n, sizeof *w->event, compare_events);
  int32_t section = 0;
  bool started = false;
  for (int32_t k = 0; k < 2 * w->n; k++) {
    int32_t i = w->event[k].piece;
    if (i >= 0) {
      w->piece[i].first = section;
      started = true;
    } else {
      if (started)
        section++; /* everything alive now, this buffer included, was alive in the section just closed */
      started = false;
      w->piece[~i].last = section - 1;
    }
  }
  for (int32_t i = 0; i < w->n; i++) w->piece[i].size /= *unit;
  qsort(w->piece, (size_t)w->n, sizeof *w->piece, compare_pieces);
  return RG_OK;
}

/* Cuts the pieces into parts that share no section. Each starts from the offsets greedy left in b. */
static rg_status make_parts(whole *w, const rg_buffer *b, int64_t unit, rg_error *e) {
  int32_t hi = -1;
  for (int32_t i = 0; i < w->n; i++) {
    if (w->piece[i].first > hi) w->nparts++;
    if (w->piece[i].last > hi) hi = w->piece[i].last;
  }
  int32_t nparts = w->nparts;
  w->nparts = 0;
  w->part = rgi_malloc(w->ctx, (size_t)(nparts + 1) * sizeof *w->part);
  if (!w->part) return rgi_nomem(e);
  for (int32_t i = 0; i < w->n;) {
    int32_t j = i, base = w->piece[i].first;
    hi = w->piece[i].last;
    for (; j < w->n && w->piece[j].first <= hi; j++)
      if (w->piece[j].last > hi) hi = w->piece[j].last;
    part *x = &w->part[w->nparts++];
    memset(x, 0, sizeof *x);
    rgi_packing *p = &x->packing;
    *p = (rgi_packing){.ctx = w->ctx, .n = j - i, .m = hi - base + 1, .unit = unit};
    p->piece = rgi_malloc(w->ctx, (size_t)p->n * sizeof *p->piece);
    x->offset = rgi_malloc(w->ctx, (size_t)p->n * sizeof *x->offset);
    if (!p->piece || !x->offset) return rgi_nomem(e);
    for (int32_t k = 0; k < p->n; k++) {
      p->piece[k] = w->piece[i + k];
      p->piece[k].first -= base;
      p->piece[k].last -= base;
      x->offset[k] = b[p->piece[k].id].offset / unit;
      int64_t end = x->offset[k] * unit + rgi_piece_bytes(p, k);
      if (end > x->peak) x->peak = end;
    }
    RGI_TRY(finish_packing(p, e));
    x->bound = packing_bound(p);
    i = j;
  }
  return RG_OK;
}

rg_status rgi_pack(const rg_context *ctx, rg_buffer *b, size_t n, const rg_pack_options *o, rg_pack_result *r,
                   rg_error *e) {
  const double start = rgi_pack_now();
  int64_t align = o && o->align ? o->align : 1, unit = 1, greedy;
  double deadline = start + (o && o->seconds > 0 ? o->seconds : 5);
  whole w = {.ctx = ctx};
  int64_t *scratch = NULL;
  rg_status status;
  memset(r, 0, sizeof *r);
  RGI_TRY(rgi_pack_greedy(ctx, b, n, align, &greedy, e));
  RGI_GOTO(status, make_pieces(&w, b, n, align, &unit, e), out);
  if (w.n > 0) {
    /* Greedy rests on sums of rounded sizes: whole units. */
    RGI_GOTO(status, make_parts(&w, b, unit, e), out);
    scratch = rgi_malloc(ctx, (size_t)w.n * sizeof *scratch);
    if (!scratch) {
      status = rgi_nomem(e);
      goto out;
    }
  }
  /* `bound` rises where the search proves that a part cannot do with the bytes alive at once; the report
   * keeps those. */
  int64_t bound = 0, capacity = o ? o->capacity : 0;
  for (int32_t i = 0; i < w.nparts; i++)
    if (w.part[i].bound > bound) bound = w.part[i].bound;
  r->lower_bound = bound;
  bool hopeless = capacity > 0 && capacity < bound;
  for (bool again = !hopeless; again;) {
    int64_t target = capacity > bound ? capacity : bound;
    again = false;
    for (int32_t i = 0; i < w.nparts; i++) {
      part *x = &w.part[i];
      if (x->peak <= target || rgi_pack_now() > deadline) continue;
      RGI_GOTO(status, solve_part(x, target, deadline, scratch, &r->nodes_explored, e), out);
      if (x->bound > bound) bound = x->bound, again = true;
    }
  }
  r->peak = 0;
  for (int32_t i = 0; i < w.nparts; i++) {
    part *x = &w.part[i];
    if (x->peak > r->peak) r->peak = x->peak;
    for (int32_t k = 0; k < x->packing.n; k++) b[x->packing.piece[k].id].offset = x->offset[k] * unit;
  }
  r->optimal = r->peak <= bound;
  r->seconds = rgi_pack_now() - start;
out:
  rgi_free(ctx, scratch);
  free_whole(&w);
  return status;
}

rg_status rg_pack(rg_context *ctx, rg_buffer *buffers, size_t n, const rg_pack_options *options,
                  rg_pack_result *out, rg_error *error) {
  if (out) memset(out, 0, sizeof *out);
  if (!ctx || !out || (n > 0 && !buffers))
    return rgi_fail(error, RG_E_USAGE, NULL, NULL, "an argument is NULL");
  return rgi_pack(ctx, buffers, n, options, out, error);
}
