/* recompute/prove.c: branch and bound over all choices: proves what was found to be the best, finds
   what is, or says what no choice beats once the work is done.

   A place of the search has decided some candidates. rows.c says what no choice beats that goes on
   from there; what would take that to the best that is known is decided the other way at once. Of
   the others, one whose cost hardly tells is tried both ways, the cheaper first, down to where
   nothing is better; then the search goes on where the bound is least. So at any time no choice
   beats the least bound of all places that are left.
 */
#include "rows.h"
#include <math.h>

enum {
  FIRST_ROUNDS = 16,
  FIRST_STEPS = 800,
  STEPS = 20,
  ROUNDS = 4,
  PART = 20,        /* of the packer's work: for a first word on a choice */
  REFUSALS = 1,     /* … after so many only that is asked */
  TRIES = 8,        /* candidates looked at before one is tried both ways */
  MOST_PRICES = 24, /* that a place remembers */
  MOST_PLACES = 1 << 16
};

static const int64_t ALL_WORK = 100000000; /* of the packer, in nodes replayed */

/* On a choice. */
typedef enum verdict { NOT_ASKED, TAKEN, REFUSED, UNKNOWN } verdict;

typedef struct place {
  verdict alone; /* on the choice in which nothing open is computed again */
  double bound;  /* no choice that goes on from here takes less */
  int32_t depth, nprice, row[MOST_PRICES];
  float price[MOST_PRICES];
  uint64_t set[]; /* what is computed again, what is open; behind them the prices of needs */
} place;

typedef struct proof {
  rgi_chooser *c;
  rgi_model *m;
  rgi_rows *rows;
  rgi_arena *arena;
  place **heap, **spare; /* those that are left, the least bound first; room for others */
  int nheap, nspare;
  uint64_t *trial, *used;
  double best, lost; /* lost: the least bound of those there was no room for */
  int64_t work;
  int refusals;
  size_t size; /* of a place */
} proof;

static uint64_t *again_of(place *x) {
  return x->set;
}
static uint64_t *open_of(const proof *p, place *x) {
  return x->set + p->m->words;
}

static float *lack_of(const proof *p, place *x) {
  return (float *)(x->set + 2 * p->m->words);
}

/* ---- the places that are left ---- */

static bool before(const place *a, const place *b) {
  return a->bound != b->bound ? a->bound < b->bound : a->depth > b->depth;
}

static void push(proof *p, place *x) {
  int i = p->nheap++;
  for (; i > 0 && before(x, p->heap[(i - 1) / 2]); i = (i - 1) / 2)
    p->heap[i] = p->heap[(i - 1) / 2];
  p->heap[i] = x;
}

static place *pop(proof *p) {
  place *top = p->heap[0], *x = p->heap[--p->nheap];
  int i = 0;
  for (int child; (child = 2 * i + 1) < p->nheap; i = child) {
    if (child + 1 < p->nheap && before(p->heap[child + 1], p->heap[child])) child++;
    if (!before(p->heap[child], x)) break;
    p->heap[i] = p->heap[child];
  }
  p->heap[i] = x;
  return top;
}

static place *new_place(proof *p) {
  if (p->nspare > 0) return p->spare[--p->nspare];
  return rgi_alloc(p->arena, p->size);
}

static void done_with(proof *p, place *x) {
  p->spare[p->nspare++] = x;
}

static void keep_prices(proof *p, place *x) {
  x->nprice = 0;
  for (int i = 0; i < p->rows->p->nneed; i++) lack_of(p, x)[i] = (float)p->rows->lack[i];
  for (int32_t t = 0; t < p->rows->nt; t++) {
    const float price = (float)p->rows->price[t];
    if (!(price > 0)) continue;
    int k = x->nprice < MOST_PRICES ? x->nprice++ : MOST_PRICES;
    for (; k > 0 && x->price[k - 1] < price; k--)
      if (k < MOST_PRICES) x->price[k] = x->price[k - 1], x->row[k] = x->row[k - 1];
    if (k < MOST_PRICES) x->price[k] = price, x->row[k] = t;
  }
}

static void load_prices(proof *p, place *x) {
  memset(p->rows->price, 0, (size_t)p->rows->nt * sizeof *p->rows->price);
  for (int k = 0; k < x->nprice; k++) p->rows->price[x->row[k]] = (double)x->price[k];
  for (int i = 0; i < p->rows->p->nneed; i++) p->rows->lack[i] = (double)lack_of(p, x)[i];
}

/* ---- one place ---- */

/* Memplan's word, first of a part of its work; whether the rest is worth it depends on how often it
 * was for nothing. */
static rg_status ask(proof *p, const uint64_t *set, verdict *v, rg_error *e) {
  int64_t over;
  bool fits;
  RGI_TRY(rgi_chooser_ask(p->c, set, PART, &over, e));
  *v = UNKNOWN;
  if (over > 0) p->work -= ALL_WORK / PART;
  if (over > 0 && p->refusals++ >= REFUSALS) return RG_OK;
  RGI_TRY(rgi_chooser_fits(p->c, set, &fits, e));
  if (!fits) p->work -= ALL_WORK;
  *v = fits ? TAKEN : REFUSED;
  return RG_OK;
}

/* A better choice, if memplan says so. */
static rg_status consider(proof *p, const uint64_t *set, verdict *v, rg_error *e) {
  *v = REFUSED;
  p->work -= p->m->g->nnode;
  const rgi_taken x = rgi_replay_run(p->m->replay, set, p->used);
  if (rgi_figure(p->c, x) > p->c->budget) return RG_OK;
  const double ms = rgi_model_ms(p->m, p->used) + x.wait_ms;
  if (ms >= p->best) return RG_OK;
  RGI_TRY(ask(p, set, v, e));
  if (*v != TAKEN) return RG_OK;
  memcpy(p->c->best, set, (size_t)p->m->words * sizeof *set);
  p->c->best_ms = ms;
  p->best = ms * (1 - 1e-9);
  return RG_OK;
}

/* By so many steps that aim at `most`. */
static double bound_of(proof *p, place *x, int steps, double most) {
  const int64_t before = p->rows->work;
  rgi_rows_decide(p->rows, again_of(x), open_of(p, x));
  const double ms = rgi_rows_best(p->rows, steps, most);
  p->work -= p->rows->work - before;
  return ms;
}

/* Decides what would else reach the best; is anything computed again by that? */
static bool decide(proof *p, place *x) {
  uint64_t *again = again_of(x), *open = open_of(p, x);
  bool any = false;
  for (int i = 0; i < p->c->nfree; i++) {
    const int c = p->c->free[i];
    if (!rgi_has(open, c)) continue;
    const double cost = p->rows->cost[c];
    if (p->rows->last + fabs(cost) < p->best) continue;
    rgi_drop(open, c);
    if (cost < 0) rgi_put(again, c);
    any |= cost < 0;
  }
  return any;
}

/* The open candidate to be tried both ways; -1: there is none. */
static int choose(proof *p, place *x) {
  int of[TRIES], n = 0;
  double cost[TRIES], far[TRIES];
  uint64_t *again = again_of(x), *open = open_of(p, x);
  for (int i = 0; i < p->c->nfree; i++) {
    const int c = p->c->free[i];
    if (!rgi_has(open, c)) continue;
    const double now = fabs(p->rows->mean[c] - 0.5);
    int k = n < TRIES ? n++ : TRIES;
    for (; k > 0 && far[k - 1] > now; k--)
      if (k < TRIES) of[k] = of[k - 1], far[k] = far[k - 1], cost[k] = cost[k - 1];
    if (k < TRIES) of[k] = c, far[k] = now, cost[k] = p->rows->cost[c];
  }
  int best = -1;
  double most = -1;
  for (int k = 0; k < n; k++) {
    const int64_t before = p->rows->work;
    rgi_put(again, of[k]);
    rgi_drop(open, of[k]);
    rgi_rows_decide(p->rows, again, open);
    const double up = fmin(rgi_rows_bound(p->rows), p->best) - x->bound;
    rgi_drop(again, of[k]);
    rgi_put(open, of[k]);
    p->work -= p->rows->work - before;
    const double down = fmin(x->bound + fmax(-cost[k], 0), p->best) - x->bound;
    const double tiny = 1e-4 * (p->best - x->bound);
    const double score = fmax(up, tiny) * fmax(down, tiny);
    if (score > most) most = score, best = of[k];
  }
  return best;
}

/* Both ways from x, which becomes one of them; the other is left for later. *next: the cheaper, or
 * NULL. */
static rg_status branch(proof *p, place *x, int i, place **next, rg_error *e) {
  place *y = new_place(p);
  if (!y) return rgi_nomem(e);
  keep_prices(p, x);
  memcpy(y, x, p->size);
  x->depth = ++y->depth;
  rgi_put(again_of(x), i);
  rgi_drop(open_of(p, x), i);
  rgi_drop(open_of(p, y), i);
  x->alone = NOT_ASKED;
  x->bound = fmax(x->bound, bound_of(p, x, STEPS, p->best));
  keep_prices(p, x);
  load_prices(p, y);
  y->bound = fmax(y->bound, bound_of(p, y, STEPS, p->best));
  keep_prices(p, y);
  place *less = y->bound < x->bound ? y : x, *more = less == x ? y : x;
  *next = less;
  if (more->bound >= p->best) {
    done_with(p, more);
  } else if (p->nheap < MOST_PLACES) {
    push(p, more);
  } else {
    p->lost = fmin(p->lost, more->bound);
    done_with(p, more);
  }
  return RG_OK;
}

/* Bounds x and decides what follows from that. */
static void tighten(proof *p, place *x) {
  load_prices(p, x);
  for (int round = 0; round < ROUNDS; round++) {
    x->bound = fmax(x->bound, bound_of(p, x, STEPS, p->best));
    if (x->bound >= p->best || !decide(p, x)) return;
    x->alone = NOT_ASKED;
  }
}

/* Goes on from x; *next as above. */
static rg_status visit(proof *p, place *x, place **next, rg_error *e) {
  verdict v;
  *next = NULL;
  tighten(p, x);
  if (x->bound < p->best && x->alone == NOT_ASKED) RGI_TRY(consider(p, again_of(x), &x->alone, e));
  if (x->bound >= p->best || x->alone == TAKEN) { /* recomputing more only takes longer */
    done_with(p, x);
    return RG_OK;
  }
  memcpy(p->trial, again_of(x), (size_t)p->m->words * sizeof *p->trial);
  for (int i = 0; i < p->rows->nlist; i++)
    if (rgi_has(open_of(p, x), p->rows->list[i]) && p->rows->cost[p->rows->list[i]] < 0)
      rgi_put(p->trial, p->rows->list[i]);
  if (!rgi_model_same(p->m, p->trial, again_of(x))) RGI_TRY(consider(p, p->trial, &v, e));
  const int i = choose(p, x);
  if (i >= 0) return branch(p, x, i, next, e);
  if (x->alone == UNKNOWN) p->lost = fmin(p->lost, x->bound);
  done_with(p, x);
  return RG_OK;
}

static rg_status search(proof *p, place *first, rg_error *e) {
  double least = INFINITY;
  for (place *next = first; next || p->nheap > 0;) {
    if (!next) next = pop(p);
    if (p->work <= 0) {
      least = next->bound;
      break;
    }
    if (next->bound < p->best) {
      RGI_TRY(visit(p, next, &next, e));
    } else {
      done_with(p, next);
      next = NULL;
    }
  }
  if (p->nheap > 0) least = fmin(least, p->heap[0]->bound);
  least = fmin(least, p->lost);
  p->c->bound_ms = fmax(p->c->bound_ms, fmin(least, p->c->best_ms));
  if (least >= p->best) p->c->bound_ms = p->c->best_ms;
  return RG_OK;
}

/* Where nothing is decided steps cost little beside what follows: many rounds, each aiming above
 * the bound by less if the one before got nowhere near, with means of so many steps that shares
 * settle, too. */
static void bound_first(proof *p, place *x) {
  static const double SLOW = 0.01, NEAR = 0.1, LESS = 0.7; /* NEAR: a part of the way */
  const double rate = p->rows->rate;
  double far = 1;
  p->rows->rate = SLOW;
  x->bound = 0;
  for (int round = 0; round < FIRST_ROUNDS; round++) {
    const double aim = x->bound + far * (p->best - x->bound),
                 bound = bound_of(p, x, FIRST_STEPS, aim);
    if (bound < x->bound + NEAR * (aim - x->bound)) far *= LESS;
    x->bound = fmax(x->bound, bound);
  }
  p->rows->rate = rate;
}

rg_status rgi_prove(rgi_chooser *c, const rgi_bound *bound, int64_t work, rg_error *e) {
  proof p = {.c = c, .m = c->m, .work = work, .lost = INFINITY};
  rg_status status = RG_OK;
  p.arena = rgi_arena_create(c->m->g->ctx);
  if (!p.arena) return rgi_nomem(e);
  p.best = c->best_ms * (1 - 1e-9);
  RGI_GOTO(status, rgi_rows_open(rgi_bound_parts(bound), p.arena, &p.rows, e), done);
  p.size = sizeof(place) + 2 * (size_t)p.m->words * sizeof(uint64_t) +
           (size_t)p.rows->p->nneed * sizeof(float);
  p.heap = rgi_alloc_n(p.arena, MOST_PLACES + 2, sizeof *p.heap);
  p.spare = rgi_alloc_n(p.arena, MOST_PLACES + 8, sizeof *p.spare);
  p.trial = rgi_alloc_n(p.arena, (size_t)p.m->words, sizeof *p.trial);
  p.used = rgi_alloc_n(p.arena, (size_t)p.m->words, sizeof *p.used);
  place *first = p.heap && p.spare && p.trial && p.used ? new_place(&p) : NULL;
  if (!first) {
    status = rgi_nomem(e);
    goto done;
  }
  memcpy(again_of(first), c->always, (size_t)p.m->words * sizeof(uint64_t));
  for (int i = 0; i < c->nfree; i++) rgi_put(open_of(&p, first), c->free[i]);

  bound_first(&p, first);
  keep_prices(&p, first);
  RGI_GOTO(status, search(&p, first, e), done);
done:
  rgi_arena_destroy(p.arena);
  return status;
}
