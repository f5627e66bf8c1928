/* memplan/pack_search.c: the exact search: is there a packing within a capacity?
 *
 * Builds packings bottom up. A node of the search knows for every unplaced piece two offsets:
 * `real`, where it would come to rest on the pieces placed so far, and `least`, below which no
 * packing of this subtree has it. A section's floor is the smallest `least` of its unplaced pieces.
 * The level is the lowest floor. A node picks a section at that level and branches on what rests
 * there: one of the pieces that can, or (the last branch) nothing.
 *
 * What keeps the tree small:
 *
 *   P1 room     floor + unplaced bytes of a section must fit under the capacity
 *   P2 settled  only packings in which no piece could be moved down are looked for, so every
 *               piece rests on another one or on the ground. A piece without support below `least`
 *               waits for a piece still to come; and a piece that would fit into a hole already
 *               closed off ends the branch
 *   P3 split    once placed pieces cut time apart, the parts are solved one by one
 *   P4 memory   failed states are remembered by (unplaced pieces, where they can lie); each is
 *               explored once, over restarts too. A state is known by a 64-bit hash
 *   P5 twins    pieces equal in lifetime and size are placed in order
 *   P6 base     a piece that spans a part whose ground is even lies at the bottom
 *   P7 queue    (some attempts) the pieces of a section, taken in order of `least`, must end under
 *               the capacity
 */
#include "pack_internal.h"
#include <string.h>

typedef struct undo {
  int32_t what; /* piece, coded by kind */
  int64_t old;
} undo;
enum { UNDO_REAL, UNDO_LEAST, UNDO_PLACE };

/* What a piece that would overhang adds to a section's count: no branching there. */
enum { NOT_FLAT = 1 << 20 };

/* How an attempt explores. No setting is best everywhere and the time to a packing
 * varies wildly, so attempts cycle. */
typedef enum rgi_rule {
  FEWEST,  /* at the level, the section with the fewest candidates */
  TIGHT,   /* at the level, the section with the least room */
  ANYWHERE /* of all sections on even ground, the one with the fewest choices: best where nothing
              may be wasted */
} rgi_rule;
typedef struct strategy {
  rgi_rule rule;
  int order;    /* what pieces are worth by, see worth() */
  bool flush;   /* prefer pieces that end level with their neighbours */
  double noise; /* how far worths are shaken */
  bool ahead;   /* P7 */
} strategy;

struct rgi_search {
  const rgi_packing *p;
  const rg_context *ctx;
  int32_t n, m;
  int64_t *size, *real, *least, *limit, *offset;
  int32_t *first, *last;
  int32_t *next, *prev; /* unplaced pieces by first section, circular around n */
  int32_t *twin;        /* an equal piece that goes first, or -1 */
  bool *placed;
  int64_t *left, *cap; /* [m] unplaced units; capacity in units */
  int64_t *floor;      /* [m] scratch of one node */
  int32_t *count;      /* [m] scratch: pieces that can rest at the level */
  double *score, *rank;
  strategy how;
  int64_t *queue_end; /* [m] scratch of P7 */
  int32_t *sorted;    /* [n] likewise */
  undo *trail;
  int64_t ntrail, trail_capacity;
  int32_t *stack;
  int64_t nstack, stack_capacity;
  uint64_t *memory; /* failed states */
  uint64_t memory_mask;
  uint64_t salt;
  int64_t nodes, budget, clock_mask;
  int64_t work;              /* of a node */
  int32_t open, fewest_open; /* unplaced pieces; the fewest of this run */
  const rgi_stop *stop;
  bool no_memory;
};

/* ---- growing stacks ---- */

static bool grow(const rg_context *ctx, void **data, int64_t *capacity, int64_t used, size_t item) {
  int64_t more = *capacity * 2;
  void *fresh = rgi_malloc(ctx, (size_t)more * item);
  if (!fresh) return false;
  memcpy(fresh, *data, (size_t)used * item);
  rgi_free(ctx, *data);
  *data = fresh;
  *capacity = more;
  return true;
}

static inline void remember(rgi_search *s, int kind, int32_t piece, int64_t old) {
  if (s->ntrail == s->trail_capacity &&
      !grow(s->ctx, (void **)&s->trail, &s->trail_capacity, s->ntrail, sizeof *s->trail)) {
    s->no_memory = true; /* the trail is now useless: the search ends at the next node */
    return;
  }
  s->trail[s->ntrail++] = (undo){piece * 3 + kind, old};
}

static inline void push(rgi_search *s, int32_t value) {
  if (s->nstack == s->stack_capacity &&
      !grow(s->ctx, (void **)&s->stack, &s->stack_capacity, s->nstack, sizeof *s->stack)) {
    s->no_memory = true;
    return;
  }
  s->stack[s->nstack++] = value;
}

/* ---- moves ---- */

static inline void raise_least(rgi_search *s, int32_t v, int64_t to) {
  remember(s, UNDO_LEAST, v, s->least[v]);
  s->least[v] = to;
}

static void place(rgi_search *s, int32_t u, int64_t at) {
  int64_t top = at + s->size[u];
  remember(s, UNDO_PLACE, u, 0);
  s->placed[u] = true;
  if (--s->open < s->fewest_open) s->fewest_open = s->open;
  s->offset[u] = at;
  s->next[s->prev[u]] = s->next[u];
  s->prev[s->next[u]] = s->prev[u];
  for (int32_t t = s->first[u]; t <= s->last[u]; t++) s->left[t] -= s->size[u];
  for (int64_t k = s->p->near_begin[u]; k < s->p->near_begin[u + 1]; k++) {
    int32_t v = s->p->near[k];
    if (s->placed[v]) continue;
    if (s->real[v] < top) {
      remember(s, UNDO_REAL, v, s->real[v]);
      s->real[v] = top;
      if (s->least[v] < top) raise_least(s, v, top);
    }
  }
}

static void undo_to(rgi_search *s, int64_t mark) {
  while (s->ntrail > mark) {
    undo *x = &s->trail[--s->ntrail];
    int32_t v = x->what / 3;
    switch (x->what % 3) {
    case UNDO_REAL: s->real[v] = x->old; break;
    case UNDO_LEAST: s->least[v] = x->old; break;
    default:
      s->placed[v] = false;
      s->open++;
      s->next[s->prev[v]] = v;
      s->prev[s->next[v]] = v;
      for (int32_t t = s->first[v]; t <= s->last[v]; t++) s->left[t] += s->size[v];
    }
  }
}

/* ---- memory of failed states ---- */

static bool known_failure(const rgi_search *s, uint64_t key) {
  const uint64_t *bucket = &s->memory[(key & s->memory_mask) & ~UINT64_C(3)];
  uint64_t tag = rgi_mix(key ^ UINT64_C(0x5851f42d4c957f2d)) | 1;
  return bucket[0] == tag || bucket[1] == tag || bucket[2] == tag || bucket[3] == tag;
}

static void note_failure(rgi_search *s, uint64_t key) {
  uint64_t *bucket = &s->memory[(key & s->memory_mask) & ~UINT64_C(3)];
  uint64_t tag = rgi_mix(key ^ UINT64_C(0x5851f42d4c957f2d)) | 1;
  for (int i = 0; i < 4; i++)
    if (!bucket[i]) {
      bucket[i] = tag;
      return;
    }
  bucket[(key >> 60) & 3] = tag;
}

/* ---- the search ---- */

/* Shell's sort: the lists are short, and nearly in order. */
static void sort_by_least(rgi_search *s, int32_t k) {
  static const int32_t gaps[] = {301, 132, 57, 23, 10, 4, 1};
  for (int g = 0; g < RGI_COUNT(gaps); g++)
    for (int32_t i = gaps[g]; i < k; i++) {
      int32_t v = s->sorted[i], j = i;
      for (; j >= gaps[g] && s->least[s->sorted[j - gaps[g]]] > s->least[v]; j -= gaps[g])
        s->sorted[j] = s->sorted[j - gaps[g]];
      s->sorted[j] = v;
    }
}

/* P7. false: no packing. */
static bool queues_fit(rgi_search *s, int32_t head, int32_t end, int32_t lo, int32_t hi) {
  int32_t k = 0;
  for (int32_t v = head; v != end; v = s->next[v]) s->sorted[k++] = v;
  sort_by_least(s, k);
  for (int32_t t = lo; t <= hi; t++) s->queue_end[t] = 0;
  for (int32_t i = 0; i < k; i++) {
    int32_t v = s->sorted[i];
    int64_t least = s->least[v], size = s->size[v];
    for (int32_t t = s->first[v]; t <= s->last[v]; t++)
      s->queue_end[t] = (s->queue_end[t] > least ? s->queue_end[t] : least) + size;
  }
  for (int32_t t = lo; t <= hi; t++)
    if (s->queue_end[t] > s->cap[t]) return false;
  return true;
}

static rgi_verdict explore(rgi_search *s, int32_t head, int32_t tail);

/* Solves the parts stack[from …): pairs of first and last piece. */
static rgi_verdict explore_parts(rgi_search *s, int64_t from) {
  rgi_verdict verdict = RGI_FOUND;
  int64_t to = s->nstack;
  if (s->no_memory) return RGI_NO_MEMORY;
  for (int64_t i = from; i < to && verdict == RGI_FOUND; i += 2)
    verdict = explore(s, s->stack[i], s->stack[i + 1]);
  s->nstack = from;
  return verdict;
}

/* One connected part, in one node of the search. */
typedef struct part {
  int32_t head, tail, end; /* its pieces in the list: head … tail, end comes after */
  int32_t lo, hi;          /* its sections */
  int64_t level;           /* the lowest floor */
  uint64_t key;            /* of the state (P4) */
  int32_t spanning;        /* the largest piece that covers all sections, or -1 … */
  bool even;               /* … and whether the ground of the whole part is even (P6) */
} part;

/* P2: the next piece to come to rest has support already; the others wait for its top at least.
 * false: none has. */
static bool settle(rgi_search *s, const part *x) {
  int64_t lowest_top = INT64_MAX;
  for (int32_t v = x->head; v != x->end; v = s->next[v])
    if (s->least[v] == s->real[v] && s->least[v] + s->size[v] < lowest_top)
      lowest_top = s->least[v] + s->size[v];
  if (lowest_top == INT64_MAX) return false;
  for (int32_t v = x->head; v != x->end; v = s->next[v])
    if (s->least[v] > s->real[v] && s->least[v] < lowest_top) raise_least(s, v, lowest_top);
  return true;
}

/* Floors and sections, and where the part falls apart (P3): all parts but the last are pushed, the
 * last stays in *x. false: a piece has no place left. */
static bool find_floors(rgi_search *s, part *x) {
  x->lo = s->first[x->head];
  x->hi = x->lo - 1;
  for (int32_t v = x->head; v != x->end; v = s->next[v]) {
    int64_t least = s->least[v];
    if (least > s->limit[v]) return false;
    int32_t a = s->first[v], b = s->last[v];
    if (a > x->hi && v != x->head) { /* nothing spans the border before a */
      push(s, x->head);
      push(s, s->prev[v]);
      x->head = v;
    }
    if (b > x->hi) {
      for (int32_t t = x->hi + 1 > a ? x->hi + 1 : a; t <= b; t++) s->floor[t] = INT64_MAX;
      x->hi = b;
    }
    for (int32_t t = a; t <= b; t++) s->floor[t] = least < s->floor[t] ? least : s->floor[t];
  }
  return true;
}

/* Counts v at the sections where it can rest. */
static inline void count_choices(rgi_search *s, const part *x, int32_t v) {
  if (s->how.rule != ANYWHERE) {
    /* At the level everything that rests lies flat, on real ground. */
    if (s->least[v] == x->level)
      for (int32_t t = s->first[v]; t <= s->last[v]; t++) s->count[t]++;
    return;
  }
  bool flat = s->real[v] == s->least[v], rests = false;
  for (int32_t t = s->first[v]; t <= s->last[v]; t++) {
    if (s->floor[t] == s->least[v])
      rests = true;
    else
      flat = false;
  }
  if (rests)
    for (int32_t t = s->first[v]; t <= s->last[v]; t++)
      if (s->floor[t] == s->least[v]) s->count[t] += flat ? 1 : NOT_FLAT;
}

/* Level, key, counts, and what P6 asks. false: no packing (P1, P2). */
static bool survey(rgi_search *s, part *x) {
  int64_t peak_floor = 0;
  x->level = INT64_MAX;
  x->key = s->salt;
  x->spanning = -1;
  for (int32_t t = x->lo; t <= x->hi; t++) {
    int64_t f = s->floor[t];
    if (f + s->left[t] > s->cap[t]) return false; /* P1 */
    if (f < x->level) x->level = f;
    if (f > peak_floor) peak_floor = f;
    s->count[t] = 0;
  }
  x->even = peak_floor == x->level;
  for (int32_t v = x->head; v != x->end; v = s->next[v]) {
    if (s->real[v] + s->size[v] <= x->level) return false; /* P2: a hole below would take it */
    x->key += rgi_mix((uint64_t)v * UINT64_C(0xd1342543de82ef95) +
                      (uint64_t)s->least[v] * UINT64_C(0x9e3779b97f4a7c15));
    if (s->real[v] != s->least[v])
      x->key += rgi_mix((uint64_t)v * UINT64_C(0xda942042e4dd58b5) +
                        (uint64_t)s->real[v] * UINT64_C(0xaef17502108ef2d9));
    if (s->real[v] != x->level) x->even = false;
    count_choices(s, x, v);
    if (s->first[v] == x->lo && s->last[v] == x->hi && s->p->piece[v].pad == 0 &&
        (x->spanning < 0 || s->size[v] > s->size[x->spanning]))
      x->spanning = v;
  }
  return true;
}

/* The section to branch at, by the attempt's rule. */
static int32_t pick_section(const rgi_search *s, const part *x) {
  int32_t section = -1;
  int64_t best = INT64_MAX, best_tie = 0;
  for (int32_t t = x->lo; t <= x->hi; t++) {
    if (s->floor[t] == INT64_MAX) continue;
    if (s->how.rule != ANYWHERE && s->floor[t] != x->level) continue;
    int64_t room = s->cap[t] - s->left[t], choices = s->count[t], tie = room;
    if (s->how.rule == TIGHT)
      choices = room, tie = s->count[t];
    else if (s->how.rule == ANYWHERE)
      choices += room > s->floor[t], tie = s->floor[t];
    if (choices < best || (choices == best && tie < best_tie))
      best = choices, best_tie = tie, section = t;
  }
  return section;
}

/* Pushes what can rest at the section, best first. */
static void push_candidates(rgi_search *s, const part *x, int32_t section) {
  const int64_t base = s->nstack, level = s->floor[section];
  for (int32_t v = x->head; v != x->end; v = s->next[v]) {
    if (s->least[v] != level || s->first[v] > section || s->last[v] < section) continue;
    if (s->twin[v] >= 0 && !s->placed[s->twin[v]]) continue; /* P5 */
    double rank = s->score[v];
    if (s->how.flush) {
      const int64_t top = level + s->size[v];
      const int64_t west = s->first[v] > x->lo ? s->floor[s->first[v] - 1] : INT64_MAX;
      const int64_t east = s->last[v] < x->hi ? s->floor[s->last[v] + 1] : INT64_MAX;
      if (west > level && east > level) rank *= 4; /* fills its valley from wall to wall */
      if (west == top && east == top)
        rank *= 11;
      else if (west == top || east == top)
        rank *= 2;
    }
    s->rank[v] = rank;
    push(s, v);
    for (int64_t i = s->nstack - 1; i > base && s->rank[s->stack[i]] > s->rank[s->stack[i - 1]];
         i--) {
      int32_t y = s->stack[i];
      s->stack[i] = s->stack[i - 1];
      s->stack[i - 1] = y;
    }
  }
}

/* Places u, one of the part's pieces, and goes on with the others. */
static rgi_verdict explore_with(rgi_search *s, const part *x, int32_t u, int64_t at) {
  const bool alone = x->head == x->tail;
  const int32_t head = x->head == u ? s->next[u] : x->head,
                tail = x->tail == u ? s->prev[u] : x->tail;
  place(s, u, at);
  return alone ? RGI_FOUND : explore(s, head, tail);
}

/* Places all unplaced pieces from head to tail (in the list), which form one connected part. On any
 * verdict but FOUND the state is as before. */
static rgi_verdict explore(rgi_search *s, int32_t head, int32_t tail) {
  const int64_t mark = s->ntrail, bottom = s->nstack;
  part x = {.head = head, .tail = tail};
  uint64_t entry_key = 0;
  bool keyed = false;
  rgi_verdict verdict;

  for (;;) {
    s->nodes++;
    if (s->no_memory) return RGI_NO_MEMORY;
    if (s->nodes >= s->budget ||
        ((s->nodes & s->clock_mask) == 0 && rgi_stops(s->stop, (s->clock_mask + 1) * s->work))) {
      verdict = RGI_STOPPED;
      goto out;
    }
    x.end = s->next[tail];
    verdict = RGI_NONE;
    if (!settle(s, &x) || !find_floors(s, &x)) goto out;
    if (s->nstack > bottom) {
      push(s, x.head);
      push(s, tail);
      verdict = explore_parts(s, bottom);
      goto out;
    }
    if (!survey(s, &x) || known_failure(s, x.key)) goto out;
    if (s->how.ahead && !queues_fit(s, head, x.end, x.lo, x.hi)) goto out;
    if (!keyed) entry_key = x.key, keyed = true;
    if (x.spanning >= 0 && x.even) { /* P6: swapping it with what lies below changes nothing else */
      verdict = explore_with(s, &x, x.spanning, x.level);
      goto out;
    }

    const int32_t section = pick_section(s, &x);
    const int64_t level = s->floor[section], base = s->nstack, here = s->ntrail;
    push_candidates(s, &x, section);
    for (int64_t i = base, after = s->nstack; i < after; i++) {
      verdict = explore_with(s, &x, s->stack[i], level);
      if (verdict == RGI_FOUND) goto out;
      undo_to(s, here);
      if (verdict != RGI_NONE) goto out;
    }
    s->nstack = base;
    /* Nothing rests here at this level. */
    for (int32_t v = head; v != x.end; v = s->next[v])
      if (s->least[v] == level && s->first[v] <= section && s->last[v] >= section)
        raise_least(s, v, level + 1);
  }

out:
  s->nstack = bottom;
  if (verdict == RGI_FOUND || verdict == RGI_NO_MEMORY) return verdict;
  undo_to(s, mark);
  if (verdict == RGI_NONE && keyed) note_failure(s, entry_key);
  return verdict;
}

/* ---- entry ---- */

static double worth(const rgi_search *s, int32_t i, int order) {
  double size = (double)s->size[i], length = s->last[i] - s->first[i] + 1, most = 0;
  switch (order) {
  case 0: return size;
  case 1: return length + size * 1e-12;
  case 2: return size * length * length;
  case 3: return size * size * length;
  default: /* fullest section first, then the longest */
    for (int32_t t = s->first[i]; t <= s->last[i]; t++)
      if ((double)s->left[t] / (double)s->cap[t] > most)
        most = (double)s->left[t] / (double)s->cap[t];
    return most * 1e6 + length;
  }
}

static void choose_strategy(rgi_search *s, uint32_t attempt) {
  static const struct {
    rgi_rule rule;
    int order;
    bool flush, ahead;
  } cycle[RGI_SEARCH_CYCLE] = {
      {FEWEST, 2, true, false},    {ANYWHERE, 2, true, false}, {TIGHT, 2, true, true},
      {TIGHT, 1, true, true},      {FEWEST, 0, true, false},   {TIGHT, 0, false, false},
      {ANYWHERE, 0, true, false},  {TIGHT, 1, false, true},    {FEWEST, 1, false, false},
      {ANYWHERE, 0, false, false}, {FEWEST, 4, false, true},   {TIGHT, 1, true, false},
      {FEWEST, 0, false, true},    {ANYWHERE, 1, true, false}};
  static const double noise[] = {0.3, 1, 0.3, 1.9};
  uint32_t k = attempt % RGI_SEARCH_CYCLE, round = attempt / RGI_SEARCH_CYCLE;
  s->how = (strategy){cycle[k].rule, cycle[k].order, cycle[k].flush,
                      round ? noise[round % RGI_COUNT(noise)] : 0, cycle[k].ahead};
  for (int32_t i = 0; i < s->n; i++) {
    double shake = (double)(rgi_mix(((uint64_t)attempt << 32) + (uint64_t)i) >> 11) * 0x1p-53;
    s->score[i] = worth(s, i, s->how.order) * (1 + s->how.noise * (shake - 0.5));
  }
}

rgi_verdict rgi_search_run(rgi_search *s, int64_t capacity, int64_t budget, uint32_t attempt,
                           const rgi_stop *stop, int64_t *offset, int64_t *explored) {
  const rgi_packing *p = s->p;
  s->nodes = 0;
  s->budget = budget;
  s->stop = stop;
  s->ntrail = s->nstack = 0;
  s->open = s->fewest_open = s->n;
  s->salt = rgi_mix((uint64_t)capacity);
  memset(s->left, 0, (size_t)s->m * sizeof *s->left);
  for (int32_t t = 0; t < s->m; t++) {
    s->left[t] = p->load[t];
    s->cap[t] = (capacity + p->pad[t]) / p->unit;
  }
  for (int32_t i = 0; i <= s->n; i++) {
    s->next[i] = i == s->n ? 0 : i + 1;
    s->prev[i] = i == 0 ? s->n : i - 1;
  }
  for (int32_t i = 0; i < s->n; i++) {
    int64_t bytes = rgi_piece_bytes(p, i);
    if (bytes > capacity) return RGI_NONE;
    s->limit[i] = (capacity - bytes) / p->unit;
    s->real[i] = s->least[i] = 0;
    s->placed[i] = false;
  }
  choose_strategy(s, attempt);
  rgi_verdict verdict = explore(s, 0, s->n - 1);
  if (s->no_memory) verdict = RGI_NO_MEMORY;
  if (verdict == RGI_FOUND) memcpy(offset, s->offset, (size_t)s->n * sizeof *offset);
  *explored += s->nodes;
  return verdict;
}

rg_status rgi_search_create(const rgi_packing *p, rgi_search **out, rg_error *e) {
  size_t n = (size_t)p->n, m = (size_t)p->m;
  rgi_search *s = *out = rgi_malloc(p->ctx, sizeof *s);
  if (!s) return rgi_nomem(e);
  memset(s, 0, sizeof *s);
  s->p = p;
  s->ctx = p->ctx;
  s->n = p->n;
  s->m = p->m;
  s->trail_capacity = s->stack_capacity = 1 << 12;
  s->memory_mask = (UINT64_C(1) << (p->n < 100 ? 16 : 20)) - 1;
  s->clock_mask = p->n < 1000 ? 127 : 7;
  s->work = 500 + (int64_t)p->n * p->m / 4;
  size_t memory = (size_t)(s->memory_mask + 1) * sizeof *s->memory;
  bool ok = (s->rank = rgi_malloc(p->ctx, n * 8)) && (s->queue_end = rgi_malloc(p->ctx, m * 8)) &&
            (s->sorted = rgi_malloc(p->ctx, n * 4)) &&
            (s->size = rgi_malloc(p->ctx, n * sizeof *s->size)) &&
            (s->real = rgi_malloc(p->ctx, n * sizeof *s->real)) &&
            (s->least = rgi_malloc(p->ctx, n * sizeof *s->least)) &&
            (s->limit = rgi_malloc(p->ctx, n * sizeof *s->limit)) &&
            (s->offset = rgi_malloc(p->ctx, n * sizeof *s->offset)) &&
            (s->first = rgi_malloc(p->ctx, n * sizeof *s->first)) &&
            (s->last = rgi_malloc(p->ctx, n * sizeof *s->last)) &&
            (s->next = rgi_malloc(p->ctx, (n + 1) * sizeof *s->next)) &&
            (s->prev = rgi_malloc(p->ctx, (n + 1) * sizeof *s->prev)) &&
            (s->twin = rgi_malloc(p->ctx, n * sizeof *s->twin)) &&
            (s->placed = rgi_malloc(p->ctx, n * sizeof *s->placed)) &&
            (s->score = rgi_malloc(p->ctx, n * sizeof *s->score)) &&
            (s->left = rgi_malloc(p->ctx, m * sizeof *s->left)) &&
            (s->cap = rgi_malloc(p->ctx, m * sizeof *s->cap)) &&
            (s->floor = rgi_malloc(p->ctx, m * sizeof *s->floor)) &&
            (s->count = rgi_malloc(p->ctx, m * sizeof *s->count)) &&
            (s->trail = rgi_malloc(p->ctx, (size_t)s->trail_capacity * sizeof *s->trail)) &&
            (s->stack = rgi_malloc(p->ctx, (size_t)s->stack_capacity * sizeof *s->stack)) &&
            (s->memory = rgi_malloc(p->ctx, memory));
  if (!ok) {
    rgi_search_destroy(s);
    *out = NULL;
    return rgi_nomem(e);
  }
  memset(s->memory, 0, memory);
  for (int32_t i = 0; i < p->n; i++) {
    const rgi_piece *a = &p->piece[i];
    s->size[i] = a->size;
    s->first[i] = a->first;
    s->last[i] = a->last;
    s->twin[i] = -1;
    for (int32_t j = i - 1; j >= 0 && p->piece[j].first == a->first; j--)
      if (p->piece[j].last == a->last && p->piece[j].size == a->size && p->piece[j].pad == a->pad) {
        s->twin[i] = j;
        break;
      }
  }
  return RG_OK;
}

void rgi_search_destroy(rgi_search *s) {
  if (!s) return;
  void *all[] = {s->rank,  s->queue_end, s->sorted, s->size,  s->real, s->least,
                 s->limit, s->offset,    s->first,  s->last,  s->next, s->prev,
                 s->twin,  s->placed,    s->score,  s->left,  s->cap,  s->floor,
                 s->count, s->trail,     s->stack,  s->memory};
  for (int i = 0; i < RGI_COUNT(all); i++) rgi_free(s->ctx, all[i]);
  rgi_free(s->ctx, s);
}
