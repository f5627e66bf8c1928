/* memplan/pack_beam.c: beam search for a packing within a capacity: incomplete, but it finds what
   depth first misses.

   Where nothing (or little) may be wasted, depth first suffers from a wrong piece early on. Here a
   whole front of partial packings with equally many pieces moves up together; only the `width`
   smoothest go on. Smooth: few steps between the floors of neighbouring sections, since each step
   must be matched by just the right pieces later.

   States, inference (room, settled, forced levels) and branching are those of pack_search.c; see
   there for `real`, `least` and floors. A placed piece keeps its offset in `least`.
 */
#include "pack_internal.h"
#include <stdlib.h>
#include <string.h>

enum { MOST_GIVEN_UP = 4 }; /* how often one step may leave a section empty at its level */

typedef struct state {
  int64_t *least, *real; /* [n] */
  int64_t *left;         /* [m] */
  uint64_t *open;        /* [n] bits: unplaced */
  double credit;         /* area placed, weighted */
} state;

typedef struct child {
  double score; /* low is good */
  int64_t level;
  int32_t parent, piece;
  int32_t given_up;
} child;

struct rgi_beam {
  const rgi_packing *p;
  int32_t n, m, words;
  int64_t *limit, *cap, *floor;
  int32_t *count, *alive, *candidate;
  double *area;                                               /* share of the total, times n */
  int32_t *ending, *ending_begin, *starting, *starting_begin; /* pieces by last, by first section */
  int32_t nalive, ncandidate;
  int32_t sum_words; /* of a set of sums up to the capacity; 0: too many */
  bool *tight;       /* [m] no byte to spare */
  int64_t *even;     /* [m] lowest level at which t and t + 1 can be even again */
  /* of one run */
  int32_t width;
  state *now, *then, scratch;
  void *block; /* behind all states */
  child *children;
  int64_t nchildren, children_capacity;
  uint64_t *seen;
  uint64_t seen_mask;
  int64_t work;         /* of a node */
  int64_t nodes, asked; /* asked: of these when it was last asked whether to stop */
  uint64_t random;
  struct {
    bool anywhere;
    double area;  /* worth of area placed */
    double noise; /* how far scores are shaken */
    double gap;   /* what leaving a section empty costs, in steps */
    double match; /* what a step costs that one piece would level */
  } how;
};

static void copy(const rgi_beam *b, state *to, const state *from) {
  memcpy(to->least, from->least, (size_t)b->n * sizeof *to->least);
  memcpy(to->real, from->real, (size_t)b->n * sizeof *to->real);
  memcpy(to->left, from->left, (size_t)b->m * sizeof *to->left);
  memcpy(to->open, from->open, (size_t)b->words * sizeof *to->open);
  to->credit = from->credit;
}

static inline bool is_open(const state *s, int32_t v) {
  return s->open[v >> 6] >> (v & 63) & 1;
}

static void place(const rgi_beam *b, state *s, int32_t u, int64_t at) {
  const rgi_packing *p = b->p;
  int64_t top = at + p->piece[u].size;
  s->open[u >> 6] &= ~(UINT64_C(1) << (u & 63));
  s->least[u] = at;
  s->credit += b->area[u];
  for (int32_t t = p->piece[u].first; t <= p->piece[u].last; t++) s->left[t] -= p->piece[u].size;
  for (int64_t k = p->near_begin[u]; k < p->near_begin[u + 1]; k++) {
    int32_t v = p->near[k];
    if (!is_open(s, v)) continue;
    if (s->real[v] < top) s->real[v] = top;
    if (s->least[v] < top) s->least[v] = top;
  }
}

enum { SUM_WORDS = 32 };
typedef struct sums {
  uint64_t bit[SUM_WORDS];
} sums;

/* Sums that subsets of the open pieces of a list reach. */
static void reach(const rgi_beam *b, const state *s, const int32_t *list, int32_t from, int32_t to,
                  sums *out) {
  const int32_t words = b->sum_words;
  for (int32_t w = 0; w < words; w++) out->bit[w] = 0;
  out->bit[0] = 1;
  for (int32_t i = from; i < to; i++) {
    if (!is_open(s, list[i])) continue;
    const int64_t by = b->p->piece[list[i]].size;
    const int32_t jump = (int32_t)(by >> 6), bits = by & 63;
    for (int32_t w = words - 1; w >= jump; w--) {
      uint64_t x = out->bit[w - jump] << bits;
      if (bits && w > jump) x |= out->bit[w - jump - 1] >> (64 - bits);
      out->bit[w] |= x;
    }
  }
}

/* Lowest level at which the floors of t and t + 1 can be even again; -1: never. */
static int64_t even_again(const rgi_beam *b, const state *s, int32_t t, int64_t here,
                          int64_t there) {
  sums west, east;
  reach(b, s, b->ending, b->ending_begin[t], b->ending_begin[t + 1], &west);
  reach(b, s, b->starting, b->starting_begin[t + 1], b->starting_begin[t + 2], &east);
  /* a + here == e + there, smallest a */
  const int64_t d = there - here;
  for (int32_t w = 0; w < b->sum_words; w++)
    for (uint64_t bits = west.bit[w]; bits; bits &= bits - 1) {
      int64_t a = w * 64 + __builtin_ctzll(bits), e = a - d;
      if (e >= 0 && e < b->sum_words * 64 && east.bit[e >> 6] >> (e & 63) & 1) return here + a;
    }
  return -1;
}

/* Sets the floors; false: a piece or a section has no room left. */
static bool set_floors(rgi_beam *b, const state *s) {
  for (int32_t t = 0; t < b->m; t++) b->floor[t] = INT64_MAX;
  for (int32_t i = 0; i < b->nalive; i++) {
    const rgi_piece *x = &b->p->piece[b->alive[i]];
    const int64_t least = s->least[b->alive[i]];
    if (least > b->limit[b->alive[i]]) return false;
    for (int32_t t = x->first; t <= x->last; t++)
      if (least < b->floor[t]) b->floor[t] = least;
  }
  for (int32_t t = 0; t < b->m; t++)
    if (b->floor[t] != INT64_MAX && b->floor[t] + s->left[t] > b->cap[t]) return false;
  return true;
}

/* Between two neighbouring sections that both must be filled to the last byte, what ends in the one
 * and what starts in the other covers the same addresses. So while their floors differ, nothing can
 * span both before the floors are even. */
static bool level_towers(rgi_beam *b, state *s) {
  bool any = false, changed = false;
  for (int32_t t = 0; t + 1 < b->m; t++) {
    const int64_t here = b->floor[t], there = b->floor[t + 1];
    b->even[t] = 0;
    if (!b->tight[t] || !b->tight[t + 1] || here == there || here == INT64_MAX ||
        there == INT64_MAX)
      continue;
    if ((b->even[t] = even_again(b, s, t, here, there)) < 0) return false;
    any = true;
  }
  if (!any) return true;
  for (int32_t i = 0; i < b->nalive; i++) {
    const int32_t v = b->alive[i];
    int64_t least = s->least[v];
    for (int32_t t = b->p->piece[v].first; t < b->p->piece[v].last; t++)
      if (b->even[t] > least) least = b->even[t];
    if (least > s->least[v]) s->least[v] = least, changed = true;
  }
  return !changed || set_floors(b, s);
}

/* Infers; finds the section to branch on and what can rest there. false: a dead end. */
static bool look(rgi_beam *b, state *s, int32_t *section) {
  const rgi_packing *p = b->p;
  const rgi_piece *piece = p->piece;
  int64_t lowest_top = INT64_MAX, level = INT64_MAX, best = INT64_MAX, best_tie = 0;
  b->nodes++;
  b->nalive = 0;
  for (int32_t w = 0; w < b->words; w++)
    for (uint64_t bits = s->open[w]; bits; bits &= bits - 1) {
      int32_t v = w * 64 + __builtin_ctzll(bits);
      b->alive[b->nalive++] = v;
      if (s->least[v] == s->real[v] && s->least[v] + piece[v].size < lowest_top)
        lowest_top = s->least[v] + piece[v].size;
    }
  if (lowest_top == INT64_MAX) return false;
  for (int32_t i = 0; i < b->nalive; i++) {
    int32_t v = b->alive[i];
    if (s->least[v] > s->real[v] && s->least[v] < lowest_top) s->least[v] = lowest_top;
  }
  if (!set_floors(b, s)) return false;
  if (b->sum_words && !level_towers(b, s)) return false;
  for (int32_t t = 0; t < b->m; t++) {
    if (b->floor[t] < level) level = b->floor[t];
    b->count[t] = 0;
  }
  for (int32_t i = 0; i < b->nalive; i++) {
    int32_t v = b->alive[i];
    int64_t least = s->least[v];
    if (s->real[v] + piece[v].size <= level) return false;
    if (!b->how.anywhere && least != level) continue;
    bool flat = s->real[v] == least, rests = false;
    for (int32_t t = piece[v].first; t <= piece[v].last; t++) {
      if (b->floor[t] == least)
        rests = true;
      else
        flat = false;
    }
    if (!rests) continue;
    for (int32_t t = piece[v].first; t <= piece[v].last; t++)
      if (b->floor[t] == least) b->count[t] += flat ? 1 : 1 << 20;
  }
  for (int32_t t = 0; t < b->m; t++) {
    if (b->floor[t] == INT64_MAX || (!b->how.anywhere && b->floor[t] != level)) continue;
    int64_t room = b->cap[t] - s->left[t], choices = b->count[t], tie = room;
    if (b->how.anywhere) choices += room > b->floor[t], tie = b->floor[t];
    if (choices < best || (choices == best && tie < best_tie))
      best = choices, best_tie = tie, *section = t;
  }
  level = b->floor[*section];
  b->ncandidate = 0;
  for (int32_t i = 0; i < b->nalive; i++) {
    int32_t v = b->alive[i];
    if (s->least[v] == level && piece[v].first <= *section && piece[v].last >= *section)
      b->candidate[b->ncandidate++] = v;
  }
  return true;
}

/* The pieces that could rest in the section at its level must not. */
static void give_up(const rgi_beam *b, state *s, int32_t section) {
  int64_t level = b->floor[section];
  for (int32_t i = 0; i < b->ncandidate; i++) s->least[b->candidate[i]] = level + 1;
}

static double random_unit(rgi_beam *b) {
  return (double)(rgi_next_random(&b->random) >> 11) * 0x1p-53;
}

/* What the step between the floors of t and t + 1 costs: less if one piece would level it. */
static double step(const rgi_beam *b, const state *s, int32_t t, int64_t here, int64_t there) {
  if (here == there || here == INT64_MAX || there == INT64_MAX) return 0;
  const int32_t *list = here < there ? b->ending : b->starting;
  const int32_t *begin = here < there ? &b->ending_begin[t] : &b->starting_begin[t + 1];
  int64_t gap = here < there ? there - here : here - there;
  for (int32_t i = begin[0]; i < begin[1]; i++)
    if (b->p->piece[list[i]].size == gap && is_open(s, list[i])) return b->how.match;
  return 1;
}

static double roughness(const rgi_beam *b, const state *s) {
  double sum = 0;
  for (int32_t t = 0; t + 1 < b->m; t++) sum += step(b, s, t, b->floor[t], b->floor[t + 1]);
  return sum;
}

static bool add_child(rgi_beam *b, child c) {
  if (b->nchildren == b->children_capacity) {
    child *more = rgi_malloc(b->p->ctx, 2 * (size_t)b->children_capacity * sizeof *more);
    if (!more) return false;
    memcpy(more, b->children, (size_t)b->nchildren * sizeof *more);
    rgi_free(b->p->ctx, b->children);
    b->children = more;
    b->children_capacity *= 2;
  }
  b->children[b->nchildren++] = c;
  return true;
}

static bool expand(rgi_beam *b, int32_t parent) {
  state *s = &b->scratch;
  int32_t section = 0;
  copy(b, s, &b->now[parent]);
  for (int32_t given_up = 0; given_up <= MOST_GIVEN_UP; given_up++) {
    if (!look(b, s, &section)) return true;
    const int64_t level = b->floor[section];
    const double rough = roughness(b, s);
    for (int32_t i = 0; i < b->ncandidate; i++) {
      int32_t u = b->candidate[i], west = b->p->piece[u].first - 1, last = b->p->piece[u].last;
      int64_t top = level + b->p->piece[u].size;
      double steps = rough;
      s->open[u >> 6] ^= UINT64_C(1) << (u & 63);
      if (west >= 0)
        steps += step(b, s, west, b->floor[west], top) - step(b, s, west, b->floor[west], level);
      if (last + 1 < b->m)
        steps +=
            step(b, s, last, top, b->floor[last + 1]) - step(b, s, last, level, b->floor[last + 1]);
      s->open[u >> 6] ^= UINT64_C(1) << (u & 63);
      double score =
          steps - b->how.area * s->credit + b->how.noise * random_unit(b) + b->how.gap * given_up;
      if (!add_child(b, (child){score, level, parent, u, given_up})) return false;
    }
    if (b->cap[section] - s->left[section] <= level) return true;
    give_up(b, s, section);
  }
  return true;
}

static int compare_children(const void *x, const void *y) {
  const child *a = x, *b = y;
  if (a->score != b->score) return a->score < b->score ? -1 : 1;
  if (a->parent != b->parent) return a->parent < b->parent ? -1 : 1;
  return (a->piece > b->piece) - (a->piece < b->piece);
}

/* true if the state is new to this step. */
static bool note(rgi_beam *b, const state *s) {
  uint64_t key = 1;
  for (int32_t w = 0; w < b->words; w++)
    for (uint64_t bits = s->open[w]; bits; bits &= bits - 1) {
      uint64_t v = (uint64_t)(w * 64 + __builtin_ctzll(bits));
      key += rgi_mix(v * UINT64_C(0x9e3779b97f4a7c15) +
                     (uint64_t)s->least[v] * UINT64_C(0xd1342543de82ef95));
    }
  key |= 1;
  for (uint64_t i = rgi_mix(key) & b->seen_mask;; i = (i + 1) & b->seen_mask) {
    if (b->seen[i] == key) return false;
    if (b->seen[i]) continue;
    b->seen[i] = key;
    return true;
  }
}

/* The smoothest children become the next front; returns its size. */
static int32_t select_front(rgi_beam *b) {
  int32_t kept = 0;
  qsort(b->children, (size_t)b->nchildren, sizeof *b->children, compare_children);
  memset(b->seen, 0, (size_t)(b->seen_mask + 1) * sizeof *b->seen);
  for (int64_t i = 0; i < b->nchildren && kept < b->width; i++) {
    const child *c = &b->children[i];
    state *s = &b->then[kept];
    int32_t section;
    copy(b, s, &b->now[c->parent]);
    /* The same steps as in expand lead to the same state. */
    for (int32_t k = 0; k <= c->given_up && c->given_up > 0; k++) {
      if (!look(b, s, &section)) break;
      if (k < c->given_up) give_up(b, s, section);
    }
    place(b, s, c->piece, c->level);
    kept += note(b, s);
  }
  state *swap = b->now;
  b->now = b->then;
  b->then = swap;
  return kept;
}

static void free_run(rgi_beam *b) {
  void *all[] = {b->block, b->now, b->then, b->children, b->seen};
  for (int i = 0; i < RGI_COUNT(all); i++) rgi_free(b->p->ctx, all[i]);
  b->block = NULL;
  b->now = b->then = NULL;
  b->children = NULL;
  b->seen = NULL;
}

static bool make_run(rgi_beam *b, int32_t width) {
  const rg_context *ctx = b->p->ctx;
  size_t each = (2 * (size_t)b->n + (size_t)b->m + (size_t)b->words) * 8,
         states = 2 * (size_t)width + 1;
  b->width = width;
  b->seen_mask = 1;
  while (b->seen_mask < 4 * (uint64_t)width) b->seen_mask *= 2;
  b->seen_mask--;
  b->children_capacity = 4 * (int64_t)width;
  b->block = rgi_malloc(ctx, states * each);
  b->now = rgi_malloc(ctx, (size_t)width * sizeof *b->now);
  b->then = rgi_malloc(ctx, (size_t)width * sizeof *b->then);
  b->children = rgi_malloc(ctx, (size_t)b->children_capacity * sizeof *b->children);
  b->seen = rgi_malloc(ctx, (size_t)(b->seen_mask + 1) * sizeof *b->seen);
  if (!b->block || !b->now || !b->then || !b->children || !b->seen) return false;
  for (size_t i = 0; i < states; i++) {
    state *s = i == 0               ? &b->scratch
               : i <= (size_t)width ? &b->now[i - 1]
                                    : &b->then[i - 1 - (size_t)width];
    int64_t *at = (int64_t *)b->block + i * each / 8;
    s->least = at;
    s->real = at + b->n;
    s->left = at + 2 * b->n;
    s->open = (uint64_t *)(at + 2 * b->n + b->m);
  }
  return true;
}

static void begin(rgi_beam *b) {
  state *s = &b->now[0];
  memset(s->least, 0, (size_t)b->n * sizeof *s->least);
  memset(s->real, 0, (size_t)b->n * sizeof *s->real);
  memset(s->open, 0, (size_t)b->words * sizeof *s->open);
  memcpy(s->left, b->p->load, (size_t)b->m * sizeof *s->left);
  for (int32_t v = 0; v < b->n; v++) s->open[v >> 6] |= UINT64_C(1) << (v & 63);
  s->credit = 0;
}

/* Work since it was last asked. */
static int64_t since(rgi_beam *b) {
  const int64_t nodes = b->nodes - b->asked;
  b->asked = b->nodes;
  return nodes * b->work;
}

rgi_verdict rgi_beam_run(rgi_beam *b, int64_t capacity, int32_t width, uint32_t attempt,
                         const rgi_stop *stop, int64_t *offset, int64_t *explored) {
  const rgi_packing *p = b->p;
  for (int32_t i = 0; i < b->n; i++) {
    int64_t bytes = rgi_piece_bytes(p, i);
    if (bytes > capacity) return RGI_STOPPED;
    b->limit[i] = (capacity - bytes) / p->unit;
  }
  for (int32_t t = 0; t < b->m; t++) b->cap[t] = (capacity + p->pad[t]) / p->unit;
  b->sum_words = capacity / p->unit < SUM_WORDS * 64 ? (int32_t)(capacity / p->unit / 64 + 1) : 0;
  for (int32_t t = 0; t < b->m; t++) b->tight[t] = p->load[t] == b->cap[t];
  static const double area[] = {0.05, 0.1, 0, 0.3, -0.1}, match[] = {0.7, 1, 0.5};
  b->how.anywhere = attempt % 4 != 2;
  b->how.area = area[attempt % RGI_COUNT(area)];
  b->how.match = match[attempt % RGI_COUNT(match)];
  b->how.noise = attempt % 2 ? 0.3 : 1;
  b->how.gap = 0.5;
  b->random = attempt;
  b->nodes = b->asked = 0;
  rgi_verdict verdict = RGI_NO_MEMORY;
  if (!make_run(b, width)) goto out;
  begin(b);
  int32_t front = 1, step = 0;
  verdict = RGI_STOPPED;
  for (; step < b->n && front > 0; step++) {
    b->nchildren = 0;
    for (int32_t i = 0; i < front; i++) {
      if ((i & 63) == 63 && rgi_stops(stop, since(b))) goto out;
      if (!expand(b, i)) {
        verdict = RGI_NO_MEMORY;
        goto out;
      }
    }
    if (rgi_stops(stop, since(b))) goto out;
    front = select_front(b);
  }
  if (front > 0) {
    memcpy(offset, b->now[0].least, (size_t)b->n * sizeof *offset);
    verdict = RGI_FOUND;
  }
out:
  free_run(b);
  *explored += b->nodes;
  return verdict;
}

rg_status rgi_beam_create(const rgi_packing *p, rgi_beam **out, rg_error *e) {
  size_t n = (size_t)p->n, m = (size_t)p->m;
  rgi_beam *b = *out = rgi_malloc(p->ctx, sizeof *b);
  if (!b) return rgi_nomem(e);
  memset(b, 0, sizeof *b);
  b->p = p;
  b->n = p->n;
  b->m = p->m;
  b->work = 2000 + (int64_t)p->n * p->m / 2;
  b->words = (p->n + 63) / 64;
  if (!(b->limit = rgi_malloc(p->ctx, n * sizeof *b->limit)) ||
      !(b->cap = rgi_malloc(p->ctx, m * sizeof *b->cap)) ||
      !(b->floor = rgi_malloc(p->ctx, m * sizeof *b->floor)) ||
      !(b->count = rgi_malloc(p->ctx, m * sizeof *b->count)) ||
      !(b->alive = rgi_malloc(p->ctx, n * sizeof *b->alive)) ||
      !(b->candidate = rgi_malloc(p->ctx, n * sizeof *b->candidate)) ||
      !(b->tight = rgi_malloc(p->ctx, m * sizeof *b->tight)) ||
      !(b->even = rgi_malloc(p->ctx, m * sizeof *b->even)) ||
      !(b->ending = rgi_malloc(p->ctx, n * sizeof *b->ending)) ||
      !(b->starting = rgi_malloc(p->ctx, n * sizeof(int32_t))) ||
      !(b->ending_begin = rgi_malloc(p->ctx, (m + 1) * sizeof(int32_t))) ||
      !(b->starting_begin = rgi_malloc(p->ctx, (m + 1) * sizeof(int32_t))) ||
      !(b->area = rgi_malloc(p->ctx, n * sizeof *b->area))) {
    rgi_beam_destroy(b);
    *out = NULL;
    return rgi_nomem(e);
  }
  for (int32_t t = 0; t <= p->m; t++) b->ending_begin[t] = b->starting_begin[t] = 0;
  for (int32_t i = 0; i < p->n; i++)
    b->ending_begin[p->piece[i].last + 1]++, b->starting_begin[p->piece[i].first + 1]++;
  for (int32_t t = 0; t < p->m; t++)
    b->ending_begin[t + 1] += b->ending_begin[t], b->starting_begin[t + 1] += b->starting_begin[t];
  for (int32_t t = 0, i = 0, j = 0; t < p->m; t++)
    for (int32_t v = 0; v < p->n; v++) {
      if (p->piece[v].last == t) b->ending[i++] = v;
      if (p->piece[v].first == t) b->starting[j++] = v;
    }
  double total = 0;
  for (int32_t i = 0; i < p->n; i++)
    total += b->area[i] = (double)p->piece[i].size * (p->piece[i].last - p->piece[i].first + 1);
  for (int32_t i = 0; i < p->n; i++) b->area[i] *= p->n / total;
  return RG_OK;
}

void rgi_beam_destroy(rgi_beam *b) {
  if (!b) return;
  void *all[] = {b->limit,        b->cap,      b->floor,         b->count, b->alive,
                 b->candidate,    b->area,     b->tight,         b->even,  b->ending,
                 b->ending_begin, b->starting, b->starting_begin};
  for (int i = 0; i < RGI_COUNT(all); i++) rgi_free(b->p->ctx, all[i]);
  rgi_free(b->p->ctx, b);
}
