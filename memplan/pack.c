/* memplan/pack.c: the packer: reduces buffers to packings, proves bounds, drives heuristics and
   exact search.

   Promises: every result is a valid packing; never worse than greedy by size; `optimal` only if the
   peak equals a proved lower bound (most bytes alive at once, or more where the search exhausted a
   capacity). Work is measured out in search nodes and rounds, not in time, so a run that ends
   before its time limit gives the same result every time, and one that has none always does.
 */
#include "pack_internal.h"
#include <stdlib.h>
#include <string.h>

/* ---- checking and rounding ---- */

static bool trivial(const rg_buffer *b) {
  return b->lower == b->upper || b->size == 0;
}

static rg_status too_large(rg_error *e, size_t i) {
  return rgi_fail(e, RG_E_OVERFLOW, NULL, NULL,
                  "buffer %zu and those alive with it need more bytes than 64 bits can count", i);
}

static rg_status check_input(const rg_buffer *b, size_t n, int64_t align, rg_error *e) {
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
    if (!rgi_add(b[i].size, align - 1, &rounded)) return too_large(e, i);
  }
  return RG_OK;
}

static int64_t rounded_size(const rg_buffer *b, int64_t align) {
  return (b->size + (align - 1)) / align * align;
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

rg_status rgi_pack_greedy(const rg_context *ctx, rg_buffer *b, size_t n, int64_t align,
                          int64_t *peak, rg_error *e) {
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
  rg_status status = RG_OK;
  for (size_t k = 0; k < n; k++) {
    rg_buffer *u = &b[order[k].i];
    u->offset = 0;
    /* also if it is never alive: its bytes lie below the peak */
    if (u->size > *peak) *peak = u->size;
    if (trivial(u)) continue;
    int64_t at = 0, end;
    for (size_t i = 0; i < placed; i++) {
      const rg_buffer *v = &b[by_offset[i]];
      if (v->upper <= u->lower || u->upper <= v->lower) continue;
      if (v->offset - at >= u->size) break;
      int64_t top = v->offset + rounded_size(v, align);
      if (top > at) at = top;
    }
    if (!rgi_add(at, rounded_size(u, align), &end)) {
      status = too_large(e, order[k].i);
      break;
    }
    u->offset = at;
    size_t i = placed++;
    for (; i > 0 && b[by_offset[i - 1]].offset > at; i--) by_offset[i] = by_offset[i - 1];
    by_offset[i] = order[k].i;
    if (at + u->size > *peak) *peak = at + u->size;
  }
  rgi_free(ctx, order);
  rgi_free(ctx, by_offset);
  return status;
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

/* Completes a packing from its pieces (with sections 0 … m-1): loads, pads. */
static rg_status finish_packing(rgi_packing *p, rg_error *e) {
  size_t m = (size_t)p->m;
  p->load = rgi_malloc(p->ctx, (m + 1) * sizeof *p->load);
  p->pad = rgi_malloc(p->ctx, m * sizeof *p->pad);
  if (!p->load || !p->pad) return rgi_nomem(e);
  memset(p->load, 0, (m + 1) * sizeof *p->load);
  memset(p->pad, 0, m * sizeof *p->pad);
  for (int32_t i = 0; i < p->n; i++) {
    const rgi_piece *a = &p->piece[i];
    p->load[a->first] += a->size;
    p->load[a->last + 1] -= a->size;
    if (a->pad > 0)
      for (int32_t t = a->first; t <= a->last; t++)
        if (a->pad > p->pad[t]) p->pad[t] = a->pad;
  }
  for (size_t t = 1; t < m; t++) p->load[t] += p->load[t - 1];
  return RG_OK;
}

/* More pairs of neighbours than this (128 MiB) are not written down. */
enum { MOST_PAIRS = 1 << 25 };

/* Who overlaps whom, which all but first fit need: `near` stays NULL where too many do. */
static rg_status find_neighbours(rgi_packing *p, rg_error *e) {
  size_t n = (size_t)p->n;
  p->near_begin = rgi_malloc(p->ctx, (n + 2) * sizeof *p->near_begin);
  if (!p->near_begin) return rgi_nomem(e);
  memset(p->near_begin, 0, (n + 2) * sizeof *p->near_begin);
  for (int32_t i = 0; i < p->n; i++)
    for (int32_t j = i + 1; j < p->n && p->piece[j].first <= p->piece[i].last; j++)
      p->near_begin[i + 2]++, p->near_begin[j + 2]++;
  for (size_t i = 1; i <= n; i++) p->near_begin[i + 1] += p->near_begin[i];
  if (p->near_begin[n + 1] > MOST_PAIRS) return RG_OK;
  p->near = rgi_malloc(p->ctx, (size_t)p->near_begin[n + 1] * sizeof *p->near);
  if (!p->near) return rgi_nomem(e);
  for (int32_t i = 0; i < p->n; i++) /* near_begin[i + 1] runs from the begin of i to its end */
    for (int32_t j = i + 1; j < p->n && p->piece[j].first <= p->piece[i].last; j++)
      p->near[p->near_begin[i + 1]++] = j, p->near[p->near_begin[j + 1]++] = i;
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

/* Larger parts than the first are only improved, larger ones than the second stay as greedy left
 * them. */
enum { MOST_SEARCHED = 4096, MOST_IMPROVED = 20000 };

typedef struct part {
  rgi_packing packing;
  int64_t base;        /* bytes of peeled pieces that lie below */
  bool countable;      /* even all its pieces on top of each other end below 2^63 */
  bool within;         /* whatever ends within the capacity will do, of some work */
  int64_t *offset;     /* best, units above the base */
  int64_t peak, bound; /* bytes above the base */
  rgi_heuristic *heuristic;
  rgi_search *search;
  rgi_beam *beam;
  rgi_repair *repair;
  uint32_t searches, betweens, beams; /* so far */
  uint32_t misses, repair_misses;     /* between goal and peak, that failed in a row */
  int64_t search_nodes, between_nodes, beam_nodes, repair_steps;
} part;

static void free_part(const rg_context *ctx, part *x) {
  rgi_heuristic_destroy(x->heuristic);
  rgi_search_destroy(x->search);
  rgi_beam_destroy(x->beam);
  rgi_repair_destroy(x->repair);
  rgi_free(ctx, x->offset);
  free_packing(&x->packing);
}

/* What a search at one capacity taught: a better packing or a better bound. */
static rg_status learn(part *x, int64_t capacity, rgi_verdict verdict, const int64_t *found,
                       rg_error *e) {
  switch (verdict) {
  case RGI_FOUND:
    x->peak = 0;
    for (int32_t i = 0; i < x->packing.n; i++) {
      int64_t end = found[i] * x->packing.unit + rgi_piece_bytes(&x->packing, i);
      x->offset[i] = found[i];
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

/* 1 1 2 1 1 2 4 …: the restart lengths that lose least when nothing is known
 * about how long a search takes. */
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

static int64_t goal_of(const part *x, int64_t target) {
  return target > x->bound ? target : x->bound;
}

/* Halfway, or nearer to the peak if halfway has been tried in vain. */
static int64_t between_goal_and_peak(const part *x, int64_t goal, uint32_t misses) {
  return x->peak - 1 - ((x->peak - goal) >> (1 + misses % 4));
}

/* The beam's share of the nodes. It shines where nothing may be wasted; with room to
 * spare, depth first is better. */
static double beam_share(const rgi_packing *p, int64_t bound) {
  double cap = (double)bound / (double)p->unit, room = 0;
  for (int32_t t = 0; t < p->m; t++) room += 1 - (double)p->load[t] / cap;
  room /= p->m;
  return room < 0.01 ? 4 : 0.25;
}

/* How the work on a part is measured out: rounds of the heuristic at first and after each search,
 * nodes of a search times luby(), beams after which all are twice as wide, steps of a repair for
 * each piece (twice as many once none of a round of aims was met), so many of them a node where
 * anything within a capacity will do. */
enum {
  FIRST_ROUNDS = 64,
  LATER_ROUNDS = 8,
  SEARCH_NODES = 2000,
  NARROW_BEAMS = 64,
  REPAIR_STEPS = 8,
  REPAIR_WITHIN = 256
};

/* Of the searches of a cycle, those that try for a capacity between goal and peak. The
 * cycle's length has no divisor in common with RGI_SEARCH_CYCLE, so every way of exploring
 * comes to both. */
enum { TARGET_CYCLE = 11 };
static const bool tries_between[TARGET_CYCLE] = {[3] = true, [7] = true, [9] = true};

/* Ways to a better packing. Depth first mostly tries for the goal itself, as beams do. Where those
 * have most of the work, depth first also looks, by itself, for anything between goal and peak: of
 * what needs a little room it soon finds much. Repair proves nothing and needs room as well; it is
 * the quickest to a packing that has to be no better than a capacity a little above the bound, so
 * that has most of a planner's work. */
typedef enum way { FIRST_FIT, SEARCH, SEARCH_BETWEEN, BEAM, REPAIR } way;

/* Whose turn it is, by nodes and steps so far: they take about as long. What is in vain for long
 * gets its turn less often. */
static way next_way(const part *x, double beams) {
  if (!x->packing.near) return FIRST_FIT;
  if (x->packing.n > MOST_SEARCHED) return REPAIR;
  if (x->searches > 0) {
    const int64_t sought = x->search_nodes + x->beam_nodes;
    if (x->within && x->repair_steps < REPAIR_WITHIN * sought) return REPAIR;
    if (beams > 1 && (6 + x->misses) * x->between_nodes < sought) return SEARCH_BETWEEN;
    if ((8 + 2 * x->repair_misses) * x->repair_steps < sought) return REPAIR;
  }
  return (double)x->search_nodes * beams <= (double)x->beam_nodes ? SEARCH : BEAM;
}

/* Depth first, for the goal or for something between it and the peak; *capacity: which. */
static rgi_verdict search_part(part *x, bool between, int64_t goal, int64_t *nodes,
                               uint32_t *attempt, const rgi_stop *stop, int64_t *scratch,
                               int64_t *capacity) {
  const int64_t budget = SEARCH_NODES * luby(*attempt / RGI_SEARCH_CYCLE);
  *capacity = between ? between_goal_and_peak(x, goal, x->misses) : goal;
  const rgi_verdict verdict =
      rgi_search_run(x->search, *capacity, budget, (*attempt)++, stop, scratch, nodes);
  if (between) x->misses = verdict == RGI_FOUND ? 0 : x->misses + 1;
  return verdict;
}

static rg_status make_tools(part *x, rg_error *e) {
  rgi_packing *p = &x->packing;
  if (!p->near) return RG_OK;
  if (!x->repair) RGI_TRY(rgi_repair_create(p, &x->repair, e));
  if (p->n > MOST_SEARCHED) return RG_OK;
  if (!x->search) RGI_TRY(rgi_search_create(p, &x->search, e));
  return x->beam ? RG_OK : rgi_beam_create(p, &x->beam, e);
}

/* Works on a part until its peak is at most `target`, or its own bound, or it is time to stop. */
static rg_status solve_part(part *x, int64_t target, const rgi_stop *stop, int64_t *scratch,
                            rg_error *e) {
  static const int32_t widths[] = {20, 60, 20, 100, 60, 60, 20, 200};
  /* narrow ones that are content with something between goal and peak: if the goal takes too long,
   * a packing near it is soon found */
  static const bool between_too[RGI_COUNT(widths)] = {[2] = true, [4] = true, [6] = true};
  rgi_packing *p = &x->packing;
  const double share = beam_share(p, goal_of(x, target));
  if (p->n > MOST_IMPROVED || !x->countable) return RG_OK;
  if (!x->heuristic) RGI_TRY(rgi_heuristic_create(p, &x->heuristic, e));
  rgi_heuristic_improve(x->heuristic, goal_of(x, target),
                        p->n > MOST_SEARCHED ? LATER_ROUNDS : FIRST_ROUNDS, stop, x->offset,
                        &x->peak);
  while (x->peak > goal_of(x, target) && !rgi_stops(stop, 0)) {
    const int64_t goal = goal_of(x, target);
    int64_t capacity = goal, rounds = LATER_ROUNDS;
    rgi_verdict verdict = RGI_STOPPED;
    if (!p->near_begin) RGI_TRY(find_neighbours(p, e));
    RGI_TRY(make_tools(x, e));
    switch (next_way(x, share)) {
    case FIRST_FIT: rounds = INT64_MAX; break;
    case SEARCH:
      verdict = search_part(x, tries_between[x->searches % TARGET_CYCLE], goal, &x->search_nodes,
                            &x->searches, stop, scratch, &capacity);
      break;
    case SEARCH_BETWEEN:
      verdict =
          search_part(x, true, goal, &x->between_nodes, &x->betweens, stop, scratch, &capacity);
      break;
    case BEAM: {
      const uint32_t k = x->beams % RGI_COUNT(widths);
      if (between_too[k]) capacity = between_goal_and_peak(x, capacity, x->misses);
      const int32_t width = x->beams >= NARROW_BEAMS ? 2 * widths[k] : widths[k];
      verdict = rgi_beam_run(x->beam, capacity, width, x->beams++, stop, scratch, &x->beam_nodes);
      break;
    }
    case REPAIR: {
      const uint32_t doublings = x->repair_misses / 4;
      const int64_t steps = (int64_t)REPAIR_STEPS * p->n << (doublings < 10 ? doublings : 10);
      capacity = between_goal_and_peak(x, capacity, x->repair_misses);
      verdict =
          rgi_repair_run(x->repair, capacity, steps, stop, x->offset, scratch, &x->repair_steps);
      x->repair_misses = verdict == RGI_FOUND ? 0 : x->repair_misses + 1;
      if (x->within) rounds = 0;
      break;
    }
    }
    RGI_TRY(learn(x, capacity, verdict, scratch, e));
    rgi_heuristic_improve(x->heuristic, goal_of(x, target), rounds, stop, x->offset, &x->peak);
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
  int64_t unit;
  int64_t bound; /* bytes: no packing does better */
} whole;

static void free_whole(whole *w) {
  for (int32_t i = 0; i < w->nparts; i++) free_part(w->ctx, &w->part[i]);
  rgi_free(w->ctx, w->part);
  rgi_free(w->ctx, w->event);
  rgi_free(w->ctx, w->piece);
}

/* Pieces with their sections: the maximal sets alive together. A section ends where a
 * buffer ends after one started. */
static rg_status make_pieces(whole *w, const rg_buffer *b, size_t n, int64_t align, rg_error *e) {
  w->piece = rgi_malloc(w->ctx, (n + 1) * sizeof *w->piece);
  w->event = rgi_malloc(w->ctx, (2 * n + 1) * sizeof *w->event);
  if (!w->piece || !w->event) return rgi_nomem(e);
  w->unit = 0;
  for (size_t i = 0; i < n; i++) {
    if (trivial(&b[i])) continue;
    int64_t size = rounded_size(&b[i], align);
    w->unit = gcd(w->unit, size);
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
        /* everything alive now, this buffer included, was alive in the section just closed */
        section++;
      started = false;
      w->piece[~i].last = section - 1;
    }
  }
  for (int32_t i = 0; i < w->n; i++) w->piece[i].size /= w->unit;
  qsort(w->piece, (size_t)w->n, sizeof *w->piece, compare_pieces);
  return RG_OK;
}

/* One connected part of the pieces from … to-1, which start from the offsets in b. */
static rg_status add_part(whole *w, const rg_buffer *b, int32_t from, int32_t to, int64_t base,
                          rg_error *e) {
  part *x = &w->part[w->nparts++];
  memset(x, 0, sizeof *x);
  x->base = base;
  rgi_packing *p = &x->packing;
  int32_t lo = w->piece[from].first, hi = lo;
  for (int32_t i = from; i < to; i++)
    if (w->piece[i].last > hi) hi = w->piece[i].last;
  *p = (rgi_packing){.ctx = w->ctx, .n = to - from, .m = hi - lo + 1, .unit = w->unit};
  p->piece = rgi_malloc(w->ctx, (size_t)p->n * sizeof *p->piece);
  x->offset = rgi_malloc(w->ctx, (size_t)p->n * sizeof *x->offset);
  if (!p->piece || !x->offset) return rgi_nomem(e);
  int64_t pile = base;
  x->countable = true;
  for (int32_t k = 0; k < p->n; k++) {
    x->countable = x->countable && rgi_add(pile, w->piece[from + k].size * w->unit, &pile);
    p->piece[k] = w->piece[from + k];
    p->piece[k].first -= lo;
    p->piece[k].last -= lo;
    x->offset[k] = (b[p->piece[k].id].offset - base) / w->unit;
    int64_t end = x->offset[k] * w->unit + rgi_piece_bytes(p, k);
    if (end > x->peak) x->peak = end;
  }
  RGI_TRY(finish_packing(p, e));
  x->bound = packing_bound(p);
  if (base + x->bound > w->bound) w->bound = base + x->bound;
  return RG_OK;
}

/* Takes a piece that spans all sections lo … hi (and has no pad to lose on top) out of from … to-1:
 * it moves to the base, what lay below it moves up. -1 if there is none. */
static bool peel(whole *w, rg_buffer *b, int32_t from, int32_t to, int32_t lo, int32_t hi,
                 int64_t base) {
  int32_t u = from;
  while (u < to && (w->piece[u].first > lo || w->piece[u].last < hi || w->piece[u].pad > 0)) u++;
  if (u == to) return false;
  const rgi_piece peeled = w->piece[u];
  for (int32_t i = from; i < to; i++)
    if (b[w->piece[i].id].offset < b[peeled.id].offset)
      b[w->piece[i].id].offset += peeled.size * w->unit;
  b[peeled.id].offset = base;
  memmove(&w->piece[from + 1], &w->piece[from], (size_t)(u - from) * sizeof peeled);
  w->piece[from] = peeled;
  return true;
}

/* Cuts the pieces from … to-1 into parts that share no section; peels each and cuts again. Every
 * call below the first has fewer pieces, and only calls that cut nest. */
static rg_status make_parts(whole *w, rg_buffer *b, int32_t from, int32_t to, int64_t base,
                            rg_error *e) {
  while (from < to) {
    int32_t lo = w->piece[from].first, hi = w->piece[from].last, next = from;
    for (; next < to && w->piece[next].first <= hi; next++)
      if (w->piece[next].last > hi) hi = w->piece[next].last;
    if (next < to) {
      RGI_TRY(make_parts(w, b, from, next, base, e));
      from = next;
      continue;
    }
    if (!peel(w, b, from, to, lo, hi, base)) return add_part(w, b, from, to, base, e);
    base += w->piece[from++].size * w->unit;
    if (base > w->bound) w->bound = base;
  }
  return RG_OK;
}

rg_status rgi_pack(const rg_context *ctx, rg_buffer *b, size_t n, const rg_pack_options *o,
                   int64_t *work, rg_pack_result *r, rg_error *e) {
  const double start = rgi_pack_now();
  const rgi_stop stop = {start + (o && o->seconds > 0 ? o->seconds : 5), work};
  const int64_t align = o && o->align ? o->align : 1, capacity = o ? o->capacity : 0;
  int64_t greedy, *scratch = NULL;
  whole w = {.ctx = ctx};
  rg_status status;
  memset(r, 0, sizeof *r);
  RGI_TRY(rgi_pack_greedy(ctx, b, n, align, &greedy, e));
  RGI_GOTO(status, make_pieces(&w, b, n, align, e), out);
  for (size_t i = 0; i < n;
       i++) /* one that is never alive overlaps nothing, but lies below the peak like all */
    if (b[i].size > w.bound) w.bound = b[i].size;
  w.part = rgi_malloc(ctx, ((size_t)w.n + 1) * sizeof *w.part);
  scratch = rgi_malloc(ctx, ((size_t)w.n + 1) * sizeof *scratch);
  if (!w.part || !scratch) {
    status = rgi_nomem(e);
    goto out;
  }
  RGI_GOTO(status, make_parts(&w, b, 0, w.n, 0, e), out);
  /* w.bound rises where the search proves that a part cannot do with the bytes alive
   * at once; the report keeps those. */
  r->lower_bound = w.bound;
  bool hopeless = capacity > 0 && capacity < w.bound;
  for (bool again = !hopeless; again;) {
    int64_t target = capacity > w.bound ? capacity : w.bound;
    again = false;
    for (int32_t i = 0; i < w.nparts; i++) {
      part *x = &w.part[i];
      if (x->base + x->peak <= target || rgi_stops(&stop, 0)) continue;
      x->within = work && capacity > 0;
      RGI_GOTO(status, solve_part(x, target - x->base, &stop, scratch, e), out);
      if (x->base + x->bound > w.bound) w.bound = x->base + x->bound, again = true;
    }
  }
  for (int32_t i = 0; i < w.nparts; i++) {
    part *x = &w.part[i];
    r->nodes_explored += x->search_nodes + x->between_nodes + x->beam_nodes + x->repair_steps;
    for (int32_t k = 0; k < x->packing.n; k++)
      b[x->packing.piece[k].id].offset = x->base + x->offset[k] * w.unit;
  }
  for (size_t i = 0; i < n; i++)
    if (b[i].offset + b[i].size > r->peak) r->peak = b[i].offset + b[i].size;
  r->optimal = r->peak <= w.bound;
  r->seconds = rgi_pack_now() - start;
out:
  rgi_free(ctx, scratch);
  free_whole(&w);
  return status;
}

RGI_NO_TAIL(rg_pack_options, align);

rg_status rg_pack(rg_context *ctx, rg_buffer *buffers, size_t n, const rg_pack_options *options,
                  rg_pack_result *out, rg_error *error) {
  if (out) memset(out, 0, sizeof *out);
  if (!ctx || !out || (n > 0 && !buffers))
    return rgi_fail(error, RG_E_USAGE, NULL, NULL, "an argument is NULL");
  rg_pack_options o;
  RGI_TRY(RGI_OPTIONS(rg_pack_options, align, options, &o, error));
  return rgi_pack(ctx, buffers, n, &o, NULL, out, error);
}
