/* memplan/pack_repair.c: local repair: makes of a packing one with a lower peak, piece by piece.

   What ends above the capacity is taken out. While anything is out, the heaviest of it goes where
   what it displaces weighs least, and that is taken out instead. A piece that had to displace
   others grows heavier: so what is hard to place is placed first and stays. A step looks at the
   neighbours of one piece alone, which is why thousands of pieces are as easy as hundreds, as long
   as few are alive together.

   Whole numbers only: the same packing on every machine.
 */
#include "pack_internal.h"
#include <string.h>

/* Weights: of a piece of average area at first, what they grow by for each time (a share of the
 * first weight), the most; how many steps a piece that displaced others stays at most, and how much
 * heavier it is until then. */
enum { AVERAGE = 100000, SHARE = 4, STAYS = 3, STAYING = 4 };
/* Up to so many units of capacity changes are noted by place: nothing need be sorted. */
enum { PLACES = 4096 };
static const int64_t most_weight = INT64_C(1) << 36;

typedef struct edge { /* where the weight of what is displaced changes */
  int64_t at, by;
} edge;

struct rgi_repair {
  const rgi_packing *p;
  int64_t *offset, *limit; /* [n] */
  int64_t *first, *weight; /* [n] at first, now */
  int64_t *stays;          /* [n] until which step */
  int32_t *out, *where;    /* [n] what is out; where in `out` a piece is, -1: it is placed */
  int32_t nout;
  edge *edge; /* [2 * most neighbours + 1] */
  /* the same by place, where there are few: what changes there, and where anything does */
  int64_t *by;
  uint64_t *marked;
  bool by_place;
  uint64_t state;
  int64_t work; /* of a step, by place */
};

/* Shell's sort: no calls, and a few hundred at most where it matters. */
static void sort_edges(edge *x, int32_t k) {
  static const int32_t gaps[] = {3548, 1577, 701, 301, 132, 57, 23, 10, 4, 1};
  for (int g = 0; g < RGI_COUNT(gaps); g++)
    for (int32_t i = gaps[g]; i < k; i++) {
      const edge y = x[i];
      int32_t j = i;
      for (; j >= gaps[g] && x[j - gaps[g]].at > y.at; j -= gaps[g]) x[j] = x[j - gaps[g]];
      x[j] = y;
    }
}

static void take_out(rgi_repair *h, int32_t v) {
  h->where[v] = h->nout;
  h->out[h->nout++] = v;
}

/* The heaviest, which is out no longer. */
static int32_t take_heaviest(rgi_repair *h) {
  int32_t i = 0;
  for (int32_t j = 1; j < h->nout; j++)
    if (h->weight[h->out[j]] > h->weight[h->out[i]]) i = j;
  const int32_t u = h->out[i];
  h->out[i] = h->out[--h->nout];
  h->where[h->out[i]] = i;
  h->where[u] = -1;
  return u;
}

/* Where a piece displaces the least, as far as has been looked: anywhere in from … to. */
typedef struct best {
  int64_t weight, from, to;
  uint64_t tie;
} best;

/* Anywhere in from … to it displaces the weight `now`. Of places that cost nothing, the
 * tightest. */
static void look_at(rgi_repair *h, int64_t from, int64_t to, int64_t now, best *x) {
  if (to < from || now > x->weight) return;
  const uint64_t tie = now > 0 ? rgi_next_random(&h->state) : (uint64_t)(to - from);
  if (now < x->weight || tie < x->tie) *x = (best){now, from, to, tie};
}

static void note(rgi_repair *h, int32_t *k, int64_t at, int64_t by) {
  if (!h->by_place) {
    h->edge[(*k)++] = (edge){at, by};
    return;
  }
  h->by[at] += by;
  h->marked[at >> 6] |= UINT64_C(1) << (at & 63);
}

/* Goes through what was noted by place, up to the last one, and forgets it. */
static void look_by_place(rgi_repair *h, int64_t last, int64_t now, best *x) {
  int64_t from = 0;
  for (int64_t w = 0; w <= last >> 6; w++)
    for (; h->marked[w]; h->marked[w] &= h->marked[w] - 1) {
      const int64_t at = w * 64 + __builtin_ctzll(h->marked[w]);
      look_at(h, from, at - 1, now, x);
      from = at;
      now += h->by[at];
      h->by[at] = 0;
    }
  look_at(h, from, last, now, x);
}

static void look_by_edge(rgi_repair *h, int32_t k, int64_t last, int64_t now, best *x) {
  int64_t from = 0;
  sort_edges(h->edge, k);
  h->edge[k] = (edge){last + 1, 0};
  for (int32_t i = 0; i <= k; i++) {
    look_at(h, from, h->edge[i].at - 1, now, x);
    from = h->edge[i].at;
    now += h->edge[i].by;
  }
}

/* Where u displaces the least weight: *least. */
static int64_t find_place(rgi_repair *h, int32_t u, int64_t step, int64_t *least) {
  const rgi_packing *p = h->p;
  const int64_t size = p->piece[u].size, limit = h->limit[u];
  int64_t now = 0;
  int32_t k = 0;
  for (int64_t i = p->near_begin[u]; i < p->near_begin[u + 1]; i++) {
    const int32_t v = p->near[i];
    if (h->where[v] >= 0) continue;
    const int64_t begin = h->offset[v] - size + 1, end = h->offset[v] + p->piece[v].size;
    const int64_t weight = h->weight[v] * (h->stays[v] > step ? STAYING : 1);
    if (begin <= 0)
      now += weight;
    else if (begin <= limit)
      note(h, &k, begin, weight);
    if (end <= limit) note(h, &k, end, -weight);
  }
  best x = {.weight = INT64_MAX};
  if (h->by_place)
    look_by_place(h, limit, now, &x);
  else
    look_by_edge(h, k, limit, now, &x);
  *least = x.weight;
  return x.from == 0 || rgi_next_random(&h->state) % 2 == 0 ? x.from : x.to;
}

/* Puts u in, in place of what is there. */
static void put_in(rgi_repair *h, int32_t u, int64_t step) {
  const rgi_packing *p = h->p;
  int64_t displaced;
  const int64_t at = find_place(h, u, step, &displaced), top = at + p->piece[u].size;
  h->offset[u] = at;
  if (displaced == 0) return;
  for (int64_t i = p->near_begin[u]; i < p->near_begin[u + 1]; i++) {
    const int32_t v = p->near[i];
    if (h->where[v] < 0 && h->offset[v] < top && at < h->offset[v] + p->piece[v].size)
      take_out(h, v);
  }
  if (h->weight[u] < most_weight) h->weight[u] += 1 + h->first[u] / SHARE;
  h->stays[u] = step + 1 + (int64_t)(rgi_next_random(&h->state) % STAYS);
}

rgi_verdict rgi_repair_run(rgi_repair *h, int64_t capacity, int64_t steps, const rgi_stop *stop,
                           const int64_t *from, int64_t *offset, int64_t *explored) {
  enum { ASKS = 64 };
  const rgi_packing *p = h->p;
  h->nout = 0;
  h->by_place = capacity / p->unit < PLACES;
  const int64_t work = h->by_place ? h->work : 4 * h->work;
  for (int32_t i = 0; i < p->n; i++) {
    const int64_t bytes = rgi_piece_bytes(p, i);
    if (bytes > capacity) return RGI_NONE;
    h->limit[i] = (capacity - bytes) / p->unit;
    h->offset[i] = from[i];
    h->weight[i] = h->first[i];
    h->stays[i] = 0;
    h->where[i] = -1;
    if (h->offset[i] > h->limit[i]) take_out(h, i);
  }
  int64_t step = 0;
  while (h->nout > 0 && step < steps) {
    if (step++ % ASKS == ASKS - 1 && rgi_stops(stop, ASKS * work)) break;
    put_in(h, take_heaviest(h), step);
  }
  *explored += step;
  if (h->nout > 0) return RGI_STOPPED;
  memcpy(offset, h->offset, (size_t)p->n * sizeof *offset);
  return RGI_FOUND;
}

rg_status rgi_repair_create(const rgi_packing *p, rgi_repair **out, rg_error *e) {
  const size_t n = (size_t)p->n;
  int64_t most = 0;
  rgi_repair *h = *out = rgi_malloc(p->ctx, sizeof *h);
  if (!h) return rgi_nomem(e);
  memset(h, 0, sizeof *h);
  h->p = p;
  h->state = (uint64_t)p->n;
  h->work = 125 + 18 * p->near_begin[n] / p->n;
  for (size_t i = 0; i < n; i++)
    if (p->near_begin[i + 1] - p->near_begin[i] > most)
      most = p->near_begin[i + 1] - p->near_begin[i];
  if (!(h->offset = rgi_malloc(p->ctx, n * sizeof *h->offset)) ||
      !(h->limit = rgi_malloc(p->ctx, n * sizeof *h->limit)) ||
      !(h->first = rgi_malloc(p->ctx, n * sizeof *h->first)) ||
      !(h->weight = rgi_malloc(p->ctx, n * sizeof *h->weight)) ||
      !(h->stays = rgi_malloc(p->ctx, n * sizeof *h->stays)) ||
      !(h->out = rgi_malloc(p->ctx, n * sizeof *h->out)) ||
      !(h->where = rgi_malloc(p->ctx, n * sizeof *h->where)) ||
      !(h->by = rgi_malloc(p->ctx, PLACES * sizeof *h->by)) ||
      !(h->marked = rgi_malloc(p->ctx, PLACES / 64 * sizeof *h->marked)) ||
      !(h->edge = rgi_malloc(p->ctx, (2 * (size_t)most + 1) * sizeof *h->edge))) {
    rgi_repair_destroy(h);
    *out = NULL;
    return rgi_nomem(e);
  }
  memset(h->by, 0, PLACES * sizeof *h->by);
  memset(h->marked, 0, PLACES / 64 * sizeof *h->marked);
  double total = 0;
  for (int32_t i = 0; i < p->n; i++)
    total += (double)p->piece[i].size * (p->piece[i].last - p->piece[i].first + 1);
  for (int32_t i = 0; i < p->n; i++) {
    const double area = (double)p->piece[i].size * (p->piece[i].last - p->piece[i].first + 1);
    h->first[i] = 1 + (int64_t)(area / total * p->n * AVERAGE);
  }
  return RG_OK;
}

void rgi_repair_destroy(rgi_repair *h) {
  if (!h) return;
  void *all[] = {h->offset, h->limit, h->first, h->weight, h->stays,
                 h->out,    h->where, h->edge,  h->by,     h->marked};
  for (int i = 0; i < RGI_COUNT(all); i++) rgi_free(h->p->ctx, all[i]);
  rgi_free(h->p->ctx, h);
}
