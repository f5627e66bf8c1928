/* recompute/prove.c: branch and bound over all choices: proves what was found to be the best, finds
   what is, or says what no choice beats once the work is done.

   A place of the search has decided some candidates. rows.c says what no choice beats that goes on
   from there; what would take that to the best that is known is decided the other way at once. One
   of the others is tried both ways. The search goes on where the bound is least, now and then from
   there down to where nothing is better. So at any time no choice beats the least bound of all
   places that are left.

   What the program would choose, in whole candidates, rarely has room: every other time that is
   mended by flips until it has (mend.c), which finds better choices than a search from anywhere
   else. Where memplan refuses those, the next ones get less room. Where the best is far, beside.c
   looks for better ones at the same time, from what the program chooses.
 */
#include "rows.h"
#include <math.h>

enum {
  FIRST_ROUNDS = 200,
  ROUNDS = 12,
  CUTS = 20, /* rounds of them, at the first place */
  PART = 5,  /* of the packer's work: for a first word on a choice */
  KNOWN_REFUSED = 16,
  STEP = 256,     /* part of the budget by which choices get less room, and … */
  NARROWEST = 12, /* … how often */
  MENDS = 2,      /* of so many places one's choice is made to fit */
  TRIES = 8,      /* candidates looked at before one is tried both ways, … */
  KNOWN = 2,      /* … if less often before */
  DIVES = 16,     /* of so many places one is gone down from */
  MOST_PLACES = 1 << 16
};

static const double WHOLE = 1e-5; /* what decides a candidate, but for rounding */
static const double FAR = 0.01;   /* of the whole time: from so much on, more work is worth it */
static const int64_t MENDING =
    50000000; /* work that it may take, beside half of all that is done */

/* On a choice. */
typedef enum verdict { NOT_ASKED, TAKEN, REFUSED, UNKNOWN } verdict;

typedef struct place {
  verdict alone; /* on the choice in which nothing open is computed again */
  double bound;  /* no choice that goes on from here takes less */
  /* what was decided last, how far that was open, and the bound before */
  int32_t depth, by;
  bool again;
  double part, before;
  uint64_t set[]; /* what is computed again, what is open */
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
  int64_t work, more;
  struct gain {
    double sum;
    int n;
  } * gain[2], mean[2]; /* per candidate and way: what deciding it adds, of all that was open */
  rgi_mender mend;
  int64_t all, mending;             /* work, and what went into that */
  uint64_t *refused[KNOWN_REFUSED]; /* of the choices that were mended last */
  int nvisit, narrow, nrefused;
  int *cheapest; /* the free candidates by time */
  size_t size;   /* of a place */
} proof;

static uint64_t *again_of(place *x) {
  return x->set;
}
static uint64_t *open_of(const proof *p, place *x) {
  return x->set + p->m->words;
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

/* ---- one place ---- */

/* Memplan's word, of a part of its work: what that takes, all of it does, by the same way. */
static rg_status ask(proof *p, const uint64_t *set, verdict *v, rg_error *e) {
  int64_t over;
  const int64_t before = p->m->spent;
  RGI_TRY(rgi_chooser_ask(p->c, set, PART, &over, e));
  p->work -= p->m->spent - before;
  *v = over <= 0 ? TAKEN : UNKNOWN;
  return RG_OK;
}

/* A better choice, if memplan says so. */
static rg_status consider(proof *p, const uint64_t *set, verdict *v, rg_error *e) {
  *v = REFUSED;
  p->work -= rgi_replay_work(p->m);
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

/* ---- bounds and branches ---- */

/* So many of what is open have to be computed again that the dearest of them come to the bound: the
 * cheapest of them take no less, which is more where all take about the same. */
static double in_whole(const proof *p, place *x, double bound) {
  const double *ms = p->m->ms, base = rgi_model_ms(p->m, again_of(x)) - p->rows->unread;
  double least = base, most = base;
  int n = 0;
  for (int i = p->c->nfree - 1; i >= 0 && most < bound * (1 - 1e-9); i--)
    if (rgi_has(open_of(p, x), p->cheapest[i])) most += ms[p->cheapest[i]], n++;
  for (int i = 0; i < p->c->nfree && n > 0; i++)
    if (rgi_has(open_of(p, x), p->cheapest[i])) least += ms[p->cheapest[i]], n--;
  return fmax(bound, least * (1 - 1e-9));
}

static double bound_of(proof *p, place *x, int rounds, int cuts) {
  const int64_t before = p->rows->work;
  const double ms = rgi_rows_bound(p->rows, again_of(x), open_of(p, x), rounds, cuts, p->best);
  p->work -= p->rows->work - before;
  return in_whole(p, x, ms);
}

/* Where memplan refuses what has room the next has less; where nothing better has room, more. */
static rg_status try_mended(proof *p, rg_error *e) {
  verdict v = NOT_ASKED;
  const int64_t before = p->mend.work;
  p->mend.room = p->c->budget - p->c->budget / STEP * p->narrow;
  p->mend.best = p->best;
  const bool any = rgi_mend(&p->mend, p->trial);
  p->work -= p->mend.work - before;
  p->mending += p->mend.work - before;
  bool known = false;
  for (int i = 0; i < KNOWN_REFUSED && any; i++)
    known |= rgi_model_same(p->m, p->refused[i], p->trial);
  if (any && !known) RGI_TRY(consider(p, p->trial, &v, e));
  if (any && !known && v != TAKEN) {
    memcpy(p->refused[p->nrefused], p->trial, (size_t)p->m->words * sizeof *p->trial);
    p->nrefused = (p->nrefused + 1) % KNOWN_REFUSED;
  }
  if (any && v != TAKEN && p->narrow < NARROWEST) p->narrow++;
  if (!any && p->narrow > 0) p->narrow--;
  return RG_OK;
}

/* Decides what would else reach the best. */
static void decide(proof *p, place *x) {
  uint64_t *again = again_of(x), *open = open_of(p, x);
  for (int i = 0; i < p->c->nfree; i++) {
    const int c = p->c->free[i];
    if (!rgi_has(open, c)) continue;
    const double cost = p->rows->cost[c];
    if (p->rows->last + fabs(cost) < p->best) continue;
    rgi_drop(open, c);
    if (cost < 0) rgi_put(again, c), x->alone = NOT_ASKED;
  }
}

static void learn(proof *p, int i, bool again, double part, double gain) {
  gain = fmin(fmax(gain, 0), p->best) / fmax(part, 0.01);
  p->gain[again][i].sum += gain, p->gain[again][i].n++;
  p->mean[again].sum += gain, p->mean[again].n++;
}

static double expect(const proof *p, int i, bool again) {
  const struct gain *x = p->gain[again][i].n ? &p->gain[again][i] : &p->mean[again];
  return (x->n ? x->sum / x->n : 1) * (again ? 1 - p->rows->value[i] : p->rows->value[i]);
}

static double score(const proof *p, const place *x, double kept, double again) {
  const double most = p->best - x->bound, tiny = 1e-3 * most;
  return fmax(fmin(kept, most), tiny) * fmax(fmin(again, most), tiny);
}

/* The open candidate to be tried both ways, and the bounds of both; -1: there is none. */
static int choose(proof *p, place *x, double bound[2]) {
  int of[TRIES], n = 0, best = -1;
  double by[TRIES], most = -1;
  for (int i = 0; i < p->c->nfree; i++) {
    const int c = p->c->free[i];
    if (!rgi_has(open_of(p, x), c)) continue;
    const double value = p->rows->value[c];
    double now = -fabs(p->rows->cost[c]);
    if (value > WHOLE && value < 1 - WHOLE)
      now = score(p, x, expect(p, c, false), expect(p, c, true));
    int k = n < TRIES ? n++ : TRIES;
    for (; k > 0 && by[k - 1] < now; k--)
      if (k < TRIES) of[k] = of[k - 1], by[k] = by[k - 1];
    if (k < TRIES) of[k] = c, by[k] = now;
  }
  for (int k = 0; k < n; k++) {
    const int c = of[k];
    const double value = p->rows->value[c];
    double gain[2] = {0};
    if (value <= WHOLE || value >= 1 - WHOLE) {
      if (best < 0) best = c, bound[0] = bound[1] = x->bound;
      break;
    }
    const int64_t before = p->rows->work;
    const bool known = p->gain[0][c].n >= KNOWN && p->gain[1][c].n >= KNOWN;
    for (int again = 0; again < 2; again++) {
      gain[again] =
          known ? expect(p, c, again) : rgi_rows_try(p->rows, c, again, p->best) - p->rows->last;
      if (!known) learn(p, c, again, again ? 1 - value : value, gain[again]);
    }
    p->work -= p->rows->work - before;
    const double now = score(p, x, gain[0], gain[1]);
    if (now <= most) continue;
    most = now;
    best = c;
    for (int again = 0; again < 2; again++)
      bound[again] = known ? x->bound : fmax(p->rows->last + gain[again], x->bound);
  }
  return best;
}

static void leave(proof *p, place *x) {
  if (x->bound >= p->best) {
    done_with(p, x);
  } else if (p->nheap < MOST_PLACES) {
    push(p, x);
  } else {
    p->lost = fmin(p->lost, x->bound);
    done_with(p, x);
  }
}

/* Both ways from x, which becomes one of them, *next; the other is left for later. */
static rg_status branch(proof *p, place *x, int i, const double bound[2], place **next,
                        rg_error *e) {
  place *y = new_place(p);
  if (!y) return rgi_nomem(e);
  const double value = p->rows->value[i];
  memcpy(y, x, p->size);
  place *way[2] = {x, y};
  for (int again = 0; again < 2; again++) {
    place *z = way[again];
    z->depth++;
    rgi_drop(open_of(p, z), i);
    z->before = p->rows->last;
    z->bound = bound[again];
    z->by = i;
    z->again = again;
    z->part = again ? 1 - value : value;
  }
  rgi_put(again_of(y), i);
  for (int again = 0; again < 2; again++) way[again]->bound = in_whole(p, way[again], bound[again]);
  y->alone = NOT_ASKED;
  const int first = bound[0] == bound[1] ? value >= 0.5 : bound[1] < bound[0];
  leave(p, way[!first]);
  *next = way[first];
  return RG_OK;
}

/* Goes on from x; *next: that way, or NULL. */
static rg_status visit(proof *p, place *x, place **next, rg_error *e) {
  verdict v;
  *next = NULL;
  x->bound =
      fmax(x->bound, x->depth ? bound_of(p, x, ROUNDS, 0) : bound_of(p, x, FIRST_ROUNDS, CUTS));
  if (x->depth && x->part > WHOLE) learn(p, x->by, x->again, x->part, p->rows->last - x->before);
  if (x->bound < p->best) decide(p, x);
  if (x->bound < p->best && x->alone == NOT_ASKED) RGI_TRY(consider(p, again_of(x), &x->alone, e));
  if (x->bound >= p->best || x->alone == TAKEN) { /* recomputing more only takes longer */
    done_with(p, x);
    return RG_OK;
  }
  memcpy(p->trial, again_of(x), (size_t)p->m->words * sizeof *p->trial);
  for (int i = 0; i < p->c->nfree; i++)
    if (rgi_has(open_of(p, x), p->c->free[i]) && p->rows->value[p->c->free[i]] >= 0.5)
      rgi_put(p->trial, p->c->free[i]);
  if (!rgi_model_same(p->m, p->trial, again_of(x))) RGI_TRY(consider(p, p->trial, &v, e));
  if (p->c->beside) rgi_beside_offer(p->c->beside, p->trial);
  if (p->nvisit++ % MENDS == 0 && p->mending <= MENDING + (p->all - p->work) / 2)
    RGI_TRY(try_mended(p, e));
  double bound[2];
  const int i = choose(p, x, bound);
  if (i >= 0) return branch(p, x, i, bound, next, e);
  if (x->alone == UNKNOWN) p->lost = fmin(p->lost, x->bound);
  done_with(p, x);
  return RG_OK;
}

/* Takes what was found beside this. */
static rg_status meet(proof *p, bool last, rg_error *e) {
  if (!p->c->beside) return RG_OK;
  RGI_TRY(rgi_beside_meet(p->c->beside, p->c, p->all - p->work, last, e));
  p->best = fmin(p->best, p->c->best_ms * (1 - 1e-9));
  return RG_OK;
}

static rg_status search(proof *p, place *first, rg_error *e) {
  double least = INFINITY;
  int popped = 0;
  for (place *next = first; next || p->nheap > 0;) {
    if (!next) next = pop(p), popped++;
    RGI_TRY(meet(p, false, e));
    if (p->work <= 0 && p->best - next->bound > FAR * p->m->all_ms) {
      p->work += p->more;
      p->all += p->more;
      p->more = 0;
    }
    if (p->work <= 0) {
      least = next->bound;
      break;
    }
    if (next->bound >= p->best) {
      done_with(p, next);
      next = NULL;
      continue;
    }
    RGI_TRY(visit(p, next, &next, e));
    if (next && (popped % DIVES || !(next->part > WHOLE && next->part < 1 - WHOLE))) {
      push(p, next);
      next = NULL;
    }
  }
  if (least < p->best) RGI_TRY(meet(p, true, e));
  if (p->nheap > 0) least = fmin(least, p->heap[0]->bound);
  least = fmin(least, p->lost);
  p->c->bound_ms = fmax(p->c->bound_ms, fmin(least, p->c->best_ms));
  if (least >= p->best) p->c->bound_ms = p->c->best_ms;
  return RG_OK;
}

rg_status rgi_prove(rgi_chooser *c, const rgi_bound *bound, int64_t work, int64_t more,
                    rg_error *e) {
  proof p = {.c = c, .m = c->m, .work = work, .more = more, .lost = INFINITY};
  rg_status status = RG_OK;
  p.arena = rgi_arena_create(c->m->g->ctx);
  if (!p.arena) return rgi_nomem(e);
  p.best = c->best_ms * (1 - 1e-9);
  p.mend = (rgi_mender){.c = c, .m = c->m};
  p.all = work;
  RGI_GOTO(status, rgi_rows_open(rgi_bound_parts(bound), p.arena, &p.rows, e), done);
  p.size = sizeof(place) + 2 * (size_t)p.m->words * sizeof(uint64_t);
  p.heap = rgi_alloc_n(p.arena, MOST_PLACES + 2, sizeof *p.heap);
  p.spare = rgi_alloc_n(p.arena, MOST_PLACES + 8, sizeof *p.spare);
  p.trial = rgi_alloc_n(p.arena, (size_t)p.m->words, sizeof *p.trial);
  p.used = p.mend.used = rgi_alloc_n(p.arena, (size_t)p.m->words, sizeof *p.used);
  for (int again = 0; again < 2; again++)
    p.gain[again] = rgi_alloc_n(p.arena, (size_t)p.m->ncandidate + 1, sizeof *p.gain[again]);
  p.cheapest = rgi_alloc_n(p.arena, (size_t)c->nfree + 1, sizeof *p.cheapest);
  bool all = p.gain[0] && p.gain[1] && p.cheapest;
  for (int i = 0; i < KNOWN_REFUSED; i++)
    all &= (p.refused[i] = rgi_alloc_n(p.arena, (size_t)p.m->words, sizeof(uint64_t))) != NULL;
  if (!all) {
    status = rgi_nomem(e);
    goto done;
  }
  place *first = p.heap && p.spare && p.trial && p.used ? new_place(&p) : NULL;
  if (!first) {
    status = rgi_nomem(e);
    goto done;
  }
  memcpy(again_of(first), c->always, (size_t)p.m->words * sizeof(uint64_t));
  for (int i = 0; i < c->nfree; i++) rgi_put(open_of(&p, first), c->free[i]);

  for (int i = 0; i < c->nfree; i++) {
    int k = i;
    for (; k > 0 && c->m->ms[p.cheapest[k - 1]] > c->m->ms[c->free[i]]; k--)
      p.cheapest[k] = p.cheapest[k - 1];
    p.cheapest[k] = c->free[i];
  }
  RGI_GOTO(status, search(&p, first, e), done);
done:
  rgi_arena_destroy(p.arena);
  return status;
}
