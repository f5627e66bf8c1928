/* recompute/bound.c: a time that no choice within the budget beats.

   Let saved memory of a choice lie in s0 … s1. Then its scratch has at most budget - s0 bytes,
   which says

       saved     what backward reads and is not recomputed takes at most s1 in all
       scratch   at every backward node: gradients alive there (base) and recomputed values that
                 live from a reader before it to one after it
       needs     what a recomputed node reads is saved, too, if it is not recomputed itself
       covers    not all of a set are recomputed that together need more scratch than that:
                 recomputing more never takes scratch from backward's own nodes, since clones then
                 only come earlier, and count until backward itself reads them last
       blocks    the choices among some ten neighbours that need more than that on their own are out

   and the least time under these, where a block may also be recomputed by parts, is a linear
   program. Its Lagrangian (a price for every line above) is a lower bound whatever the prices are;
   a few hundred subgradient steps find good ones. The bound is the least over stretches that
   together hold every s; the one that is least is halved as long as work is left. Where that stays
   far from what was found, as next to the least budget of layers upon layers, layers.c looks at the
   same stretches.
 */
#include "bound.h"
#include <math.h>
#include <stdlib.h>

static const int64_t COVER_WORK = 60000000, BLOCK_WORK = 60000000; /* nodes replayed */
enum {
  STEPS = 160,
  MOST_STRETCHES = 96,
  MOST_BY_LAYERS = 64, /* more */
  WIDEST_BLOCK = 12,
  FIRST_STRETCHES = 8
};
/* of the whole time: from so far off on, layers are looked at, too */
static const double FAR = 0.01;

typedef struct cover {
  int *of, n;
} cover;

/* Candidates of which any choice has been looked at, with everything else kept. */
typedef struct block {
  int of[WIDEST_BLOCK], n;
  double *scratch; /* [1 << n]: what each choice needs at least */
} block;

typedef struct stretch {
  double s0, s1, ms;
  uint64_t *may[2]; /* candidates that may be kept, and computed again, in a choice of less than
                       `most`; NULL: not looked at */
} stretch;
/* The least time with saved bytes in s0 … s1, or something below; never above `most`, which is
 * known. */
typedef rg_status solver(rgi_bound *, stretch *x, double most, rg_error *e);

struct rgi_bound {
  rgi_chooser *c;
  rgi_model *m;
  rgi_parts p;
  rgi_layers *layers; /* NULL: not yet asked for */
  int n;              /* candidates */
  double forced;      /* time of what is chosen in any case */
  int *by_rate;       /* free candidates, cheapest bytes first */
  cover *cover;
  int ncover;
  block *block; /* every free candidate is in one */
  int nblock;
  uint64_t *set;
  int64_t work;
  double unit; /* bytes that make numbers handy */
  /* prices and what they come to: of saved bytes, of moved ones, of scratch at each row, of covers,
   * of needs */
  double *price, *slope, *way, *kept, *best, *sum, *cost;
  double *other; /* per candidate: the least cost if it leaves, and … */
  char *state;   /* its rgi_fate there */
  bool *both;    /* of other: also computed again, for clones */
};
enum { SAVED, MOVED, SCRATCH }; /* first prices */

/* ---- what the program is made of ---- */

/* The candidate behind each forward tensor; -1: none, -2: several. */
static int *makers(const rgi_bound *b) {
  const rgi_graph *g = b->m->g;
  int *by = rgi_alloc_n(b->m->arena, (size_t)g->ntensor + 1, sizeof *by);
  if (!by) return NULL;
  for (int32_t t = 0; t < g->ntensor; t++) by[t] = -1;
  for (int32_t k = 0; k < g->nnode; k++) {
    const rgi_node *n = &g->node[k];
    if (n->backward) continue;
    int c = n->origin >= 0 && n->kind == RGI_PRIMAL ? b->m->candidate_of[n->origin] : -1;
    if (n->op->flags & RG_OP_VIEW) {
      c = rgi_nin(n) ? by[n->in[0]] : -1;
      for (int i = 1; i < rgi_nin(n); i++)
        if (by[n->in[i]] != c) c = -2;
    }
    for (int i = 0; i < rgi_nout(n); i++)
      if (n->out[i] >= 0) by[n->out[i]] = c;
  }
  for (int32_t i = 0; i < g->noutput; i++)
    for (int32_t t = 0; t < g->ntensor; t++)
      if (rgi_owner(g, t) == g->output[i].tensor) by[t] = -3;
  return by;
}

/* Values that only clones read. */
static rg_status find_needs(rgi_bound *b, const int *by, const int *value_of, rg_error *e) {
  const rgi_graph *g = b->m->g;
  size_t edges = 1;
  for (int32_t k = 0; k < g->nnode; k++) edges += (size_t)rgi_nin(&g->node[k]);
  int32_t *next = rgi_alloc_n(b->m->arena, edges, sizeof *next); /* edges of an owner, chained */
  int32_t *head = rgi_alloc_n(b->m->arena, (size_t)g->ntensor + 1, sizeof *head);
  int *reader = rgi_alloc_n(b->m->arena, edges, sizeof *reader), *from = NULL;
  from = rgi_alloc_n(b->m->arena, edges, sizeof *from);
  b->p.need = rgi_alloc_n(b->m->arena, edges, sizeof *b->p.need);
  bool *back = rgi_alloc_n(b->m->arena, (size_t)g->ntensor + 1, sizeof *back); /* from the host */
  if (!next || !head || !reader || !from || !back || !b->p.need) return rgi_nomem(e);
  for (int32_t t = 0; t < g->ntensor; t++) head[t] = -1;
  for (int32_t k = 0; k < g->nnode; k++)
    if (rgi_brings_back(g, k) >= 0) back[rgi_brings_back(g, k)] = true;
  int32_t count = 0;
  for (int32_t k = 0; k < g->nnode; k++) {
    const rgi_node *n = &g->node[k];
    if (n->backward || n->op->flags & RG_OP_VIEW || n->kind != RGI_PRIMAL || n->origin < 0)
      continue;
    const int c = b->m->candidate_of[n->origin];
    if (c < 0 || !b->p.is_free[c]) continue;
    for (int i = 0; i < rgi_nin(n); i++) {
      const int32_t t = n->in[i], owner = t < 0 ? -1 : rgi_owner(g, t);
      if (t < 0 || g->tensor[owner].producer < 0 || back[owner] || value_of[owner] >= 0 ||
          by[t] <= -2 || by[t] == c)
        continue;
      if (by[t] >= 0 && rgi_has(b->c->always, by[t])) continue;
      bool known = false;
      for (int32_t x = head[owner]; x >= 0; x = next[x]) known = known || reader[x] == c;
      if (known) continue;
      reader[count] = c;
      from[count] = by[t] >= 0 && b->p.is_free[by[t]] ? by[t] : -1;
      next[count] = head[owner];
      head[owner] = count++;
    }
  }
  for (int32_t t = 0; t < g->ntensor; t++)
    for (int32_t x = head[t]; x >= 0; x = next[x])
      b->p.need[b->p.nneed++] = (rgi_need){reader[x], from[x], (double)rgi_bytes(&g->tensor[t]), t};
  return RG_OK;
}

static rg_status find_values(rgi_bound *b, rg_error *e) {
  const rgi_graph *g = b->m->g;
  const int *by = b->p.by = makers(b);
  int *value_of = rgi_alloc_n(b->m->arena, (size_t)g->ntensor + 1, sizeof *value_of);
  b->p.value = rgi_alloc_n(b->m->arena, (size_t)g->ntensor + 1, sizeof *b->p.value);
  if (!by || !value_of || !b->p.value) return rgi_nomem(e);
  for (int32_t t = 0; t < g->ntensor; t++) value_of[t] = -1;
  b->p.fixed = (double)b->m->mem.reserved;
  for (int32_t k = 0; k < g->nnode; k++) {
    const rgi_node *n = &g->node[k];
    if (!rgi_takes_row(g, k)) continue;
    for (int i = 0; i < rgi_nin(n); i++) {
      const int32_t t = n->in[i], owner = t < 0 ? -1 : rgi_owner(g, t);
      if (t < 0 || g->tensor[owner].producer < 0 || g->node[g->tensor[owner].producer].backward)
        continue;
      if (by[t] <= -2) continue;
      if (value_of[owner] < 0) {
        value_of[owner] = b->p.nvalue;
        b->p.value[b->p.nvalue++] =
            (rgi_direct){by[t], owner, (double)rgi_bytes(&g->tensor[owner]), b->p.nt, b->p.nt};
      }
      /* An output may take over its bytes here, and is in the base. */
      b->p.value[value_of[owner]].last = i == 0 && rgi_memory_alike(g, k) ? b->p.nt - 1 : b->p.nt;
    }
    b->p.nt++;
  }
  for (int i = 0; i < b->p.nvalue; i++) {
    const rgi_direct *v = &b->p.value[i];
    if (v->by < 0 || (!b->p.is_free[v->by] && !rgi_has(b->c->always, v->by)))
      b->p.fixed += v->bytes;
    else
      b->p.bytes[v->by] += v->bytes;
  }
  return find_needs(b, by, value_of, e);
}

static double scratch_of(rgi_bound *b, const uint64_t *set) {
  rgi_replay_run(b->m->replay, set, NULL);
  b->work -= b->m->g->nnode;
  b->m->spent += rgi_replay_work(b->m);
  return (double)rgi_replay_scratch(b->m->replay);
}

static void sort_by_rate(rgi_bound *b) {
  for (int i = 0, k = 0; i < b->n; i++) {
    if (!b->p.is_free[i]) continue;
    int j = k++;
    for (; j > 0; j--) {
      const int other = b->by_rate[j - 1];
      if (b->m->ms[other] * b->p.bytes[i] <= b->m->ms[i] * b->p.bytes[other]) break;
      b->by_rate[j] = other;
    }
    b->by_rate[j] = i;
  }
}

/* ---- blocks ---- */

/* Neighbours whose values are worth a block; it ends with a layer (where names begin to come again)
 * if the next does not fit, too. */
static int fill_block(const rgi_bound *b, int from, int width, double least, block *x) {
  const rgi_model *m = b->m;
  const int *free = b->c->free;
  int i = from, layer = 0;
  for (x->n = 0; i < b->c->nfree && x->n < width; i++) {
    if ((double)m->kept_bytes[free[i]] < least) continue;
    if (x->n > 1 && m->kind[free[i]] == m->kind[x->of[0]] &&
        m->kind[x->of[1]] != m->kind[x->of[0]]) {
      if (layer == 0) layer = x->n;
      if (x->n + layer > width) break;
    }
    x->of[x->n++] = free[i];
  }
  return i;
}

static rg_status measure_block(rgi_bound *b, block *x, rg_error *e) {
  x->scratch = rgi_alloc_n(b->m->arena, (size_t)1 << x->n, sizeof *x->scratch);
  if (!x->scratch) return rgi_nomem(e);
  for (int w = 0; w < 1 << x->n; w++) {
    if (x->n == 1) {
      x->scratch[w] = w ? b->p.alone[x->of[0]] : 0;
      continue;
    }
    memcpy(b->set, b->c->always, (size_t)b->m->words * sizeof *b->set);
    for (int i = 0; i < x->n; i++)
      if (w >> i & 1) rgi_put(b->set, x->of[i]);
    x->scratch[w] = scratch_of(b, b->set);
  }
  return RG_OK;
}

static rg_status find_blocks(rgi_bound *b, rg_error *e) {
  const rgi_model *m = b->m;
  int width = WIDEST_BLOCK;
  while (width > 1 && (double)b->c->nfree / width * (1 << width) * m->g->nnode > (double)BLOCK_WORK)
    width--;
  double largest = 0;
  for (int i = 0; i < b->c->nfree; i++)
    if ((double)m->kept_bytes[b->c->free[i]] > largest)
      largest = (double)m->kept_bytes[b->c->free[i]];
  const double least = largest / 8;
  b->block = rgi_alloc_n(m->arena, (size_t)b->c->nfree + 1, sizeof *b->block);
  if (!b->block) return rgi_nomem(e);
  for (int i = 0; i < b->c->nfree;) {
    i = fill_block(b, i, width, least, &b->block[b->nblock]);
    if (b->block[b->nblock].n) RGI_TRY(measure_block(b, &b->block[b->nblock++], e));
  }
  for (int i = 0; i < b->c->nfree; i++) {
    const int c = b->c->free[i];
    if ((double)m->kept_bytes[c] >= least) continue;
    b->block[b->nblock] = (block){.of = {c}, .n = 1};
    RGI_TRY(measure_block(b, &b->block[b->nblock++], e));
  }
  b->work = COVER_WORK;
  return RG_OK;
}

/* ---- covers ---- */

static void put_all(rgi_bound *b, const int *of, int n, int but) {
  memcpy(b->set, b->c->always, (size_t)b->m->words * sizeof *b->set);
  for (int i = 0; i < n; i++)
    if (i != but) rgi_put(b->set, of[i]);
}

/* Drops from of[0 … n) what the set needs not to take more than `room`, small values first; returns
 * what is left of n. */
static int shrink(rgi_bound *b, int *of, int n, double room) {
  for (int i = 1; i < n; i++) { /* large first */
    const int x = of[i];
    int j = i;
    for (; j > 0 && b->p.bytes[of[j - 1]] < b->p.bytes[x]; j--) of[j] = of[j - 1];
    of[j] = x;
  }
  for (int chunk = n / 2; chunk > 0; chunk /= 2)
    for (int end = n; end >= chunk && b->work > 0;) {
      /* without of[end - chunk … end) */
      memcpy(b->set, b->c->always, (size_t)b->m->words * sizeof *b->set);
      for (int i = 0; i < n; i++)
        if (i < end - chunk || i >= end) rgi_put(b->set, of[i]);
      if (scratch_of(b, b->set) > room) {
        memmove(&of[end - chunk], &of[end], (size_t)(n - end) * sizeof *of);
        n -= chunk;
      }
      end -= chunk;
    }
  return n;
}

/* Sets of candidates next to each other that need more scratch than `room`. */
static rg_status find_covers(rgi_bound *b, double room, rg_error *e) {
  const int nfree = b->c->nfree, *free = b->c->free;
  b->ncover = 0;
  int *of = rgi_alloc_n(b->m->arena, (size_t)nfree + 1, sizeof *of);
  if (!of) return rgi_nomem(e);
  for (int from = 0; from < nfree && b->work > 0;) {
    /* free[from … lo) fit, free[from … hi) do not, or hi is past the end */
    int lo = from, hi = nfree;
    put_all(b, free + from, nfree - from, -1);
    if (scratch_of(b, b->set) <= room) break;
    for (int width = 1; from + width < nfree; width *= 2) { /* most are narrow */
      put_all(b, free + from, width, -1);
      if (scratch_of(b, b->set) > room) {
        hi = from + width;
        break;
      }
      lo = from + width;
    }
    while (hi - lo > 1) {
      const int mid = lo + (hi - lo) / 2;
      put_all(b, free + from, mid - from, -1);
      if (scratch_of(b, b->set) > room)
        hi = mid;
      else
        lo = mid;
    }
    memcpy(of, free + from, (size_t)(hi - from) * sizeof *of);
    const int n = shrink(b, of, hi - from, room);
    if (n > 1) { /* of one alone, `alone` says all */
      cover *x = &b->cover[b->ncover++];
      *x = (cover){rgi_alloc_n(b->m->arena, (size_t)n, sizeof(int)), n};
      if (!x->of) return rgi_nomem(e);
      memcpy(x->of, of, (size_t)n * sizeof *of);
    }
    from = hi;
  }
  return RG_OK;
}

/* ---- the linear program ---- */

/* Most scratch of a choice that saves s0 bytes or more. */
static double room_of(const rgi_bound *b, double s0) {
  return (double)(b->c->budget - b->m->mem.comm) - s0;
}

/* By saved bytes alone, candidates by parts. INFINITY: not even all of them free enough. */
static double knapsack(const rgi_bound *b, double s0, double s1, double *rate) {
  double need = b->p.fixed - s1, ms = 0;
  const double room = room_of(b, s0);
  *rate = 0;
  if (b->c->moved) need -= b->c->movable;
  for (int i = 0; i < b->n; i++)
    if (b->p.is_free[i]) need += b->p.bytes[i];
  for (int k = 0; k < b->c->nfree && need > 0; k++) {
    const int i = b->by_rate[k];
    if (b->p.bytes[i] <= 0 || (!b->c->of_saved && b->p.alone[i] > room)) continue;
    *rate = b->m->ms[i] / b->p.bytes[i];
    if (b->c->moved && *rate > b->c->moved_ms) break;
    ms += b->p.bytes[i] < need ? b->m->ms[i] : *rate * need;
    need -= b->p.bytes[i];
  }
  if (need <= 0) return ms;
  *rate = b->c->moved ? b->c->moved_ms : 0;
  return b->c->moved ? ms + *rate * need : INFINITY;
}

/* The least cost of a block's choices that need at most `room`; b->state says which that is. What
 * leaves needs no clone's scratch. */
static double cheapest(rgi_bound *b, const block *x, double room) {
  double sum[1 << WIDEST_BLOCK];
  int best = 0;
  sum[0] = 0;
  for (int i = 0; i < x->n; i++) sum[0] += fmin(b->other[x->of[i]], 0);
  for (int w = 1; w < 1 << x->n; w++) {
    const int low = x->of[__builtin_ctz((unsigned)w)];
    sum[w] = sum[w & (w - 1)] + b->cost[low] - fmin(b->other[low], 0);
    if (sum[w] < sum[best] && x->scratch[w] <= room) best = w;
  }
  for (int i = 0; i < x->n; i++) {
    const int c = x->of[i];
    const bool leaves = !(best >> i & 1) && b->other[c] < 0;
    b->state[c] = leaves ? (b->both[c] ? RGI_BOTH : RGI_AWAY) : (char)(best >> i & 1);
    if (b->state[c] != RGI_KEPT) b->slope[SAVED] -= b->p.bytes[c] / b->unit;
    if (leaves) b->slope[MOVED] += b->c->moved[c] / b->unit;
  }
  return sum[best];
}

/* What it costs that candidates leave: their bytes on the way, and in scratch once they are back;
 * and a clone beside that, which only clones read. */
static void cost_of_leaving(rgi_bound *b) {
  for (int i = 0; i < b->n; i++) {
    const double moved = b->c->moved ? b->c->moved[i] : 0;
    if (moved > 0) {
      const double way = b->price[MOVED] * moved / b->unit;
      b->both[i] = b->cost[i] < b->other[i];
      b->other[i] = way + fmin(b->cost[i], b->other[i]);
    } else {
      b->other[i] = 0;
    }
  }
}

/* The Lagrangian at b->price (saved, scratch, covers, needs), and its slopes. Bytes in units. */
static double lagrangian(rgi_bound *b, double excess, double room) {
  const double *scratch = b->price + SCRATCH, *covers = scratch + b->p.nt,
               *needs = covers + b->ncover;
  double *scratch_slope = b->slope + SCRATCH, *cover_slope = scratch_slope + b->p.nt;
  double *need_slope = cover_slope + b->ncover;
  const double u = b->unit, movable = b->c->moved ? b->c->movable / u : 0;
  b->sum[0] = 0;
  double total = b->price[SAVED] * excess - b->price[MOVED] * movable;
  b->slope[SAVED] = excess;
  b->slope[MOVED] = -movable;
  for (int32_t t = 0; t < b->p.nt; t++) {
    b->sum[t + 1] = b->sum[t] + scratch[t];
    total -= scratch[t] * (room - b->p.base[t] / u);
    scratch_slope[t] = -(room - b->p.base[t] / u);
  }
  for (int i = 0; i < b->n; i++) b->other[i] = -b->price[SAVED] * b->p.bytes[i] / u;
  for (int k = 0; k < b->p.nvalue; k++) {
    const rgi_direct *v = &b->p.value[k];
    if (v->by >= 0 && v->last >= v->first)
      b->other[v->by] += v->bytes / u * (b->sum[v->last + 1] - b->sum[v->first]);
  }
  for (int i = 0; i < b->n; i++) b->cost[i] = b->m->ms[i] + b->other[i];
  for (int i = 0; i < b->p.nneed; i++) {
    b->cost[b->p.need[i].reader] += needs[i];
    if (b->p.need[i].by >= 0) b->cost[b->p.need[i].by] -= needs[i];
  }
  cost_of_leaving(b);
  for (int j = 0; j < b->ncover; j++) {
    total -= covers[j] * (b->cover[j].n - 1);
    cover_slope[j] = -(b->cover[j].n - 1);
    for (int i = 0; i < b->cover[j].n; i++) b->cost[b->cover[j].of[i]] += covers[j];
  }
  for (int k = 0; k < b->nblock; k++) total += cheapest(b, &b->block[k], room * u);
  for (int32_t t = 0; t <= b->p.nt; t++) b->sum[t] = 0; /* now: scratch of what is taken */
  for (int k = 0; k < b->p.nvalue; k++) {
    const rgi_direct *v = &b->p.value[k];
    if (v->by < 0 || b->state[v->by] == RGI_KEPT || v->last < v->first) continue;
    b->sum[v->first] += v->bytes / u;
    b->sum[v->last + 1] -= v->bytes / u;
  }
  double alive = 0;
  for (int32_t t = 0; t < b->p.nt; t++) {
    alive += b->sum[t];
    scratch_slope[t] += alive;
  }
  for (int j = 0; j < b->ncover; j++)
    for (int i = 0; i < b->cover[j].n; i++)
      cover_slope[j] += b->state[b->cover[j].of[i]] == RGI_AGAIN;
  for (int i = 0; i < b->p.nneed; i++) {
    const rgi_need *x = &b->p.need[i];
    need_slope[i] = (b->state[x->reader] & 1) - (x->by >= 0 ? b->state[x->by] & 1 : 0);
  }
  return total;
}

/* Prices are not negative, and those of a value's needs add up to no more than its bytes cost. */
static void project(rgi_bound *b, int rows) {
  for (int i = 0; i < rows; i++)
    if (b->price[i] < 0) b->price[i] = 0;
  if (b->c->moved) b->price[MOVED] = fmin(b->price[MOVED], b->c->moved_ms * b->unit);
  double *price = b->price + SCRATCH + b->p.nt + b->ncover;
  for (int i = 0, j; i < b->p.nneed; i = j) {
    double sum = 0, most = b->price[SAVED] * b->p.need[i].bytes / b->unit;
    for (j = i; j < b->p.nneed && b->p.need[j].tensor == b->p.need[i].tensor; j++) sum += price[j];
    for (int k = i; k < j && sum > most; k++) price[k] *= most / sum;
  }
}

/* The best prices so far are where the next stretch may start from; covers are each stretch's
 * own. */
static void keep_prices(rgi_bound *b) {
  const int shared = SCRATCH + b->p.nt;
  memcpy(b->kept, b->price, (size_t)shared * sizeof *b->kept);
  memcpy(b->kept + shared, b->price + shared + b->ncover, (size_t)b->p.nneed * sizeof *b->kept);
}

static void start(rgi_bound *b, double rate, double excess, double room) {
  const int shared = SCRATCH + b->p.nt;
  double *price = b->price;
  memcpy(price, b->kept, (size_t)shared * sizeof *price);
  memset(price + shared, 0, (size_t)b->ncover * sizeof *price);
  memcpy(price + shared + b->ncover, b->kept + shared, (size_t)b->p.nneed * sizeof *price);
  const double warm = lagrangian(b, excess, room);
  memset(price, 0, (size_t)(shared + b->ncover + b->p.nneed) * sizeof *price);
  price[SAVED] = rate;
  if (lagrangian(b, excess, room) >= warm) return;
  memcpy(price, b->kept, (size_t)shared * sizeof *price);
  memcpy(price + shared + b->ncover, b->kept + shared, (size_t)b->p.nneed * sizeof *price);
}

/* What a block's candidates may be if the whole is to stay below `most`, at `below` without it. */
static void may_be(const rgi_bound *b, const block *x, double room, double below, stretch *s,
                   double most) {
  double sum[1 << WIDEST_BLOCK];
  sum[0] = 0;
  for (int w = 0; w < 1 << x->n; w++) {
    if (w) sum[w] = sum[w & (w - 1)] + b->cost[x->of[__builtin_ctz((unsigned)w)]];
    if (below + sum[w] >= most || (w && x->scratch[w] > room)) continue;
    for (int i = 0; i < x->n; i++) rgi_put(s->may[w >> i & 1], x->of[i]);
  }
}

static rg_status look_at_each(rgi_bound *b, stretch *x, double excess, double room, double most,
                              rg_error *e) {
  for (int v = 0; v < 2; v++) {
    x->may[v] = rgi_model_set(b->m);
    if (!x->may[v]) return rgi_nomem(e);
  }
  const double total = lagrangian(b, excess / b->unit, room / b->unit);
  for (int k = 0; k < b->nblock; k++)
    may_be(b, &b->block[k], room, total - cheapest(b, &b->block[k], room), x, most);
  return RG_OK;
}

static rg_status solve(rgi_bound *b, stretch *x, double most, rg_error *e) {
  double rate;
  x->may[0] = x->may[1] = NULL;
  x->ms = knapsack(b, x->s0, x->s1, &rate);
  if (x->ms >= most || b->c->of_saved) return RG_OK;
  const double room = room_of(b, x->s0);
  RGI_TRY(find_covers(b, room, e));
  const int rows = SCRATCH + b->p.nt + b->ncover + b->p.nneed;
  double excess = b->p.fixed - x->s1;
  for (int i = 0; i < b->n; i++)
    if (b->p.is_free[i]) excess += b->p.bytes[i];
  start(b, rate * b->unit, excess / b->unit, room / b->unit);
  double theta = 1, best = -INFINITY;
  int since = 0;
  for (int i = 0; i < rows; i++) b->way[i] = 0;
  for (int step = 0; step < STEPS && x->ms < most; step++) {
    const double now = lagrangian(b, excess / b->unit, room / b->unit);
    if (now > x->ms) x->ms = now;
    if (now > best) {
      if (now > best + 1e-4 * fabs(best)) since = 0;
      best = now;
      keep_prices(b);
      memcpy(b->best, b->price, (size_t)rows * sizeof *b->best);
    }
    if (++since > 6) {
      theta *= 0.7;
      since = 0;
    }
    double length = 0;
    for (int i = 0; i < rows; i++) {
      b->way[i] = b->slope[i] + 0.6 * b->way[i];
      if (b->price[i] <= 0 && b->way[i] < 0) b->way[i] = 0;
      length += b->way[i] * b->way[i];
    }
    if (length <= 1e-18) break;
    const double size = theta * (most - now) / length;
    for (int i = 0; i < rows; i++) b->price[i] += size * b->way[i];
    project(b, rows);
  }
  if (x->ms >= most || b->c->moved || best == -INFINITY) return RG_OK;
  memcpy(b->price, b->best, (size_t)rows * sizeof *b->best);
  return look_at_each(b, x, excess, room, most, e);
}

/* ---- the whole ---- */

static rg_status open_bound(rgi_bound *b, rgi_chooser *c, rg_error *e) {
  rgi_model *m = c->m;
  const size_t n = (size_t)m->ncandidate + 1, nn = (size_t)m->g->nnode + 2;
  *b = (rgi_bound){.c = c, .m = m, .p.c = c, .n = m->ncandidate, .work = COVER_WORK};
  b->p.base = rgi_alloc_n(m->arena, nn, sizeof *b->p.base);
  b->p.bytes = rgi_alloc_n(m->arena, n, sizeof *b->p.bytes);
  b->p.alone = rgi_alloc_n(m->arena, n, sizeof *b->p.alone);
  b->p.is_free = rgi_alloc_n(m->arena, n, sizeof *b->p.is_free);
  b->by_rate = rgi_alloc_n(m->arena, n, sizeof *b->by_rate);
  b->cover = rgi_alloc_n(m->arena, n, sizeof *b->cover);
  b->cost = rgi_alloc_n(m->arena, n, sizeof *b->cost);
  b->other = rgi_alloc_n(m->arena, n, sizeof *b->other);
  b->state = rgi_alloc_n(m->arena, n, sizeof *b->state);
  b->both = rgi_alloc_n(m->arena, n, sizeof *b->both);
  b->sum = rgi_alloc_n(m->arena, nn, sizeof *b->sum);
  b->set = rgi_model_set(m);
  if (!b->p.base || !b->p.bytes || !b->p.alone || !b->p.is_free || !b->by_rate || !b->cover ||
      !b->cost || !b->other || !b->state || !b->both || !b->sum || !b->set)
    return rgi_nomem(e);
  for (int i = 0; i < c->nfree; i++) b->p.is_free[c->free[i]] = true;
  rgi_replay_run(m->replay, c->always, b->set);
  b->forced = rgi_model_ms(m, b->set);
  memset(b->set, 0, (size_t)m->words * sizeof *b->set);
  RGI_TRY(find_values(b, e));
  const size_t rows = SCRATCH + (size_t)b->p.nt + n + (size_t)b->p.nneed;
  b->price = rgi_alloc_n(m->arena, rows, sizeof *b->price);
  b->slope = rgi_alloc_n(m->arena, rows, sizeof *b->slope);
  b->way = rgi_alloc_n(m->arena, rows, sizeof *b->way);
  b->kept = rgi_alloc_n(m->arena, rows, sizeof *b->kept);
  b->best = rgi_alloc_n(m->arena, rows, sizeof *b->best);
  if (!b->best || !b->price || !b->slope || !b->way || !b->kept) return rgi_nomem(e);
  sort_by_rate(b);
  rgi_replay_run(m->replay, b->set, NULL);
  for (int32_t t = 0; t < b->p.nt; t++) b->p.base[t] = (double)rgi_replay_alive(m->replay, t);
  for (int i = 0; i < c->nfree; i++) {
    memcpy(b->set, c->always, (size_t)m->words * sizeof *b->set);
    rgi_put(b->set, c->free[i]);
    b->p.alone[c->free[i]] = scratch_of(b, b->set);
  }
  for (int i = 0; i < b->n; i++)
    if (b->p.bytes[i] > b->unit) b->unit = b->p.bytes[i];
  if (b->unit == 0) b->unit = 1;
  return find_blocks(b, e);
}

static const double CLOSE = 1e-9; /* relative; what sums of doubles may be off by */
/* Where all candidates take the same time, all choices take multiples of it. */
static void round_up(const rgi_bound *b) {
  const double unit = b->m->ms[b->c->free[0]];
  for (int i = 0; i < b->n; i++)
    if ((b->p.is_free[i] || rgi_has(b->c->always, i)) && fabs(b->m->ms[i] - unit) > CLOSE * unit)
      return;
  if (unit > 0) b->c->bound_ms = ceil(b->c->bound_ms / unit * (1 - CLOSE)) * unit;
}

/* of the largest candidate's bytes: no use to halve any more */
static const double NARROW = 1.0 / 64;

const rgi_parts *rgi_bound_parts(const rgi_bound *b) {
  return &b->p;
}

rg_status rgi_bound_open(rgi_chooser *c, rgi_bound **out, rg_error *e) {
  *out = rgi_alloc(c->m->arena, sizeof **out);
  return *out ? open_bound(*out, c, e) : rgi_nomem(e);
}

/* Halves the stretch that is least, until that brings nothing more. */
static rg_status halve(rgi_bound *b, stretch *all, int *n, int limit, double most, solver *f,
                       int *least, rg_error *e) {
  for (; *n > 0; ++*n) {
    for (int i = *least = 0; i < *n; i++)
      if (all[i].ms < all[*least].ms) *least = i;
    stretch *x = &all[*least], *y = &all[*n];
    if (x->ms >= most || *n >= limit || b->work <= 0 || b->c->of_saved) break;
    if (x->s1 - x->s0 < b->unit * NARROW) break;
    const double before = x->ms, middle = (x->s0 + x->s1) / 2;
    *y = (stretch){.s0 = middle, .s1 = x->s1};
    x->s1 = middle;
    RGI_TRY(f(b, x, most, e));
    RGI_TRY(f(b, y, most, e));
    if (x->ms < before) x->ms = before;
    if (y->ms < before) y->ms = before;
  }
  return RG_OK;
}

static rg_status by_layers(rgi_bound *b, stretch *x, double most, rg_error *e) {
  if (!b->layers) RGI_TRY(rgi_layers_open(&b->p, RGI_WIDEST_LAYER, &b->layers, e));
  x->ms = rgi_layers_ms(b->layers, room_of(b, x->s0), x->s1, most);
  return RG_OK;
}

/* Of all stretches that may hold a choice of less than `most`. */
static void look_at_all(rgi_chooser *c, const stretch *all, int n, double most) {
  for (int v = 0; v < 2; v++)
    for (int w = 0; w < c->m->words && c->may[v]; w++) {
      c->may[v][w] = 0;
      for (int i = 0; i < n; i++)
        if (all[i].ms < most) c->may[v][w] |= all[i].may[v] ? all[i].may[v][w] : ~UINT64_C(0);
    }
}

rg_status rgi_bound_find(rgi_bound *b, rg_error *e) {
  rgi_chooser *c = b->c;
  stretch all[MOST_STRETCHES + MOST_BY_LAYERS] = {0};
  int n = 0, least = 0;
  b->work = COVER_WORK;
  const double most = c->best_ms * (1 - CLOSE) - b->forced, lo = b->p.fixed,
               hi = (double)(c->budget - (c->of_saved ? 0 : b->m->mem.comm));
  for (int i = 0; i < FIRST_STRETCHES && hi > lo; i++) {
    const double width = (hi - lo) / FIRST_STRETCHES;
    all[n] =
        (stretch){.s0 = lo + width * i, .s1 = i + 1 < FIRST_STRETCHES ? lo + width * (i + 1) : hi};
    RGI_TRY(solve(b, &all[n++], most, e));
  }
  RGI_TRY(halve(b, all, &n, MOST_STRETCHES, most, solve, &least, e));
  if (n > 0 && !c->of_saved && all[least].ms < most - FAR * c->m->all_ms) {
    for (int i = 0; i < n; i++) {
      const double before = all[i].ms;
      if (before < most) RGI_TRY(by_layers(b, &all[i], most, e));
      if (all[i].ms < before) all[i].ms = before;
    }
    b->work = COVER_WORK;
    RGI_TRY(halve(b, all, &n, n + MOST_BY_LAYERS, most, by_layers, &least, e));
  }
  look_at_all(c, all, n, most);
  c->bound_ms = b->forced + (n > 0 && all[least].ms > 0 ? all[least].ms : 0);
  if (!c->moved) round_up(b); /* waits are no multiples */
  c->optimal = c->bound_ms >= c->best_ms * (1 - CLOSE);
  if (c->optimal) c->bound_ms = c->best_ms;
  return RG_OK;
}
