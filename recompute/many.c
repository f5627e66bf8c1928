/* recompute/many.c: budgets for more candidates than can be gone through.

   Starting points are the policies that people write by hand (nothing, all, one, every k-th, a
   first or last stretch, all nodes of one kind, all but those that cross a few cuts). The least
   memory is where the best of them end when single candidates or whole kinds are flipped for as
   long as that takes bytes away; it does not depend on the budget, and what any starting point
   takes is no less. The least time starts from points within the budget, and keeps and swaps what
   can be kept; bound.c says how far from the optimum the result may be at most, and where that is
   far, prove.c looks for better ones. All of it is measured out in work (nodes replayed, pivots,
   what the packer counts), never in time, so a choice is the same on every machine.
 */
#include "search.h"
#include <math.h>
#include <stdlib.h>

/* Work, in nodes replayed: some 20 ns each. */
static const int64_t LEAST_WORK = 60000000, DROP_WORK = 60000000, SWAP_WORK = 80000000;
/* … and in steps of some 10 ns. A proof has what the rest leaves of a plan's work, within bounds;
 * where that ends far from the best, so much. */
static const int64_t PLAN_WORK = 800000000, LEAST_PROOF = 280000000, MOST_PROOF = 420000000,
                     FAR_PLAN = 900000000, FAR_PROOF = 400000000;
enum {
  STARTS = 8,
  MOST_PERIOD = 64,
  SPARSEST = 8,
  MOST_KINDS = 32,
  SWAPS = 512,
  BRIEF = 4,       /* a part of the work */
  RETRIES = 3,     /* of memplan's word */
  STIRS = 2048,    /* a candidate */
  NEAR_LIMIT = 64, /* candidates open to a proof, near the bound */
  PART = 2,        /* of the packer's work: for a first word on a choice */
};
static const double NEAR = 0.0005; /* of the whole time: as good as the bound */
static const double FAR = 0.01;    /* … from so much on, more of a proof is worth it */

typedef struct point {
  uint64_t *set;
  int64_t figure;
  int32_t crowd; /* places as full as the fullest */
  double ms;
} point;

typedef struct search {
  rgi_chooser *c;
  rgi_model *m;
  int n;        /* free candidates, in the graph's order */
  int64_t work; /* left */
  uint64_t *used;
  int *kind, nkind; /* per free candidate: those that are named alike, but for numbers */
  int *op, nop;     /* … or have the same op */
  uint64_t *trial;
  point best[STARTS]; /* of the seeds */
  int nbest;
  bool by_time; /* seeds are ranked by time among those within the budget, else by bytes */
  int64_t low;  /* the least that any seed takes */
  int64_t room; /* what a choice may take as the replay sees it: the budget, or less (settle) */
  uint64_t random;
} search;

static bool better(const search *s, const point *a, const point *b) {
  if (s->by_time && a->ms != b->ms) return a->ms < b->ms;
  if (a->figure != b->figure) return a->figure < b->figure;
  if (a->crowd != b->crowd) return a->crowd < b->crowd;
  return a->ms < b->ms;
}

/* What p->set takes; the set loses what nothing reads. */
static void look(search *s, point *p) {
  rgi_model *m = s->m;
  rgi_taken x = rgi_replay_run(m->replay, p->set, s->used);
  p->figure = rgi_figure(s->c, x);
  p->crowd = s->c->of_saved ? 0 : x.crowd;
  for (int w = 0; w < m->words; w++) p->set[w] = s->used[w] | s->c->always[w];
  p->ms = rgi_model_ms(m, s->used) + x.wait_ms;
  s->work -= m->g->nnode;
  m->spent += rgi_replay_work(m);
}

static void copy(const search *s, point *to, const point *from) {
  uint64_t *set = to->set;
  memcpy(set, from->set, (size_t)s->m->words * sizeof *set);
  *to = *from;
  to->set = set;
}

static void flip(const search *s, uint64_t *set, int i) {
  const int candidate = s->c->free[i];
  if (rgi_has(set, candidate))
    rgi_drop(set, candidate);
  else
    rgi_put(set, candidate);
}

static bool chosen(const search *s, const point *p, int i) {
  return rgi_has(p->set, s->c->free[i]);
}

/* ---- seeds ---- */

static uint64_t *begin(search *s) {
  memcpy(s->trial, s->c->always, (size_t)s->m->words * sizeof *s->trial);
  return s->trial;
}

/* Takes the trial among the best, if it is. */
static void offer(search *s) {
  point p = {.set = s->trial};
  look(s, &p);
  if (p.figure < s->low) s->low = p.figure;
  if (s->by_time && p.figure > s->room) return;
  for (int i = 0; i < s->nbest; i++)
    if (rgi_model_same(s->m, s->best[i].set, p.set)) return;
  int at = s->nbest;
  while (at > 0 && better(s, &p, &s->best[at - 1])) at--;
  if (at == STARTS) return;
  if (s->nbest < STARTS) s->nbest++;
  uint64_t *set = s->best[s->nbest - 1].set;
  for (int i = s->nbest - 1; i > at; i--) s->best[i] = s->best[i - 1];
  s->best[at].set = set;
  copy(s, &s->best[at], &p);
}

/* Candidates i with i % k == from, or all others. */
static void offer_every(search *s, int k, int from, bool others) {
  uint64_t *set = begin(s);
  for (int i = 0; i < s->n; i++)
    if ((i % k == from) != others) rgi_put(set, s->c->free[i]);
  offer(s);
}

static void offer_stretch(search *s, int from, int to) {
  uint64_t *set = begin(s);
  for (int i = from; i < to; i++) rgi_put(set, s->c->free[i]);
  offer(s);
}

static void offer_kinds(search *s, const int *kind, int nkind) {
  for (int k = 0; k < nkind; k++)
    for (int others = 0; others < 2; others++) {
      uint64_t *set = begin(s);
      for (int i = 0; i < s->n; i++)
        if ((kind[i] == k) != others) rgi_put(set, s->c->free[i]);
      offer(s);
    }
}

/* All but every k-th of each kind: a few layers' ends kept, say. */
static void offer_sparse(search *s) {
  for (int kind = 0; kind < s->nkind; kind++)
    for (int k = 2; k <= SPARSEST && s->nkind <= MOST_KINDS; k++)
      for (int from = 0; from < k; from++) {
        uint64_t *set = begin(s);
        for (int i = 0, nth = 0; i < s->n; i++)
          if (s->kind[i] != kind || nth++ % k != from) rgi_put(set, s->c->free[i]);
        offer(s);
      }
}

static void offer_seeds(search *s) {
  offer_sparse(s);
  offer_stretch(s, 0, 0);
  for (int i = 1; i <= s->n; i++) offer_stretch(s, 0, i);
  for (int i = 1; i < s->n; i++) offer_stretch(s, i, s->n);
  for (int i = 0; i < s->n; i++) offer_stretch(s, i, i + 1);
  for (int i = 0; i < s->n; i++) offer_every(s, s->n, i, true); /* all but one */
  for (int k = 2; k <= s->n; k++) {
    /* of long periods only the first and last phase */
    const int step = k <= MOST_PERIOD ? 1 : k - 1;
    for (int from = 0; from < k; from += step) {
      offer_every(s, k, from, false);
      offer_every(s, k, from, true);
    }
    if (k > MOST_PERIOD) k += k / 16;
  }
  offer_kinds(s, s->kind, s->nkind);
  offer_kinds(s, s->op, s->nop);
}

/* ---- flips that take bytes away ---- */

static bool try_flip(search *s, point *p, point *q, const int *kind, int which) {
  copy(s, q, p);
  if (!kind)
    flip(s, q->set, which);
  else
    for (int i = 0; i < s->n; i++)
      if (kind[i] == which && chosen(s, q, i) == chosen(s, p, i)) flip(s, q->set, i);
  look(s, q);
  if (!better(s, q, p)) return false;
  copy(s, p, q);
  return true;
}

/* All of a kind kept, or all recomputed. */
static bool try_kind(search *s, point *p, point *q, int which, bool again) {
  copy(s, q, p);
  for (int i = 0; i < s->n; i++)
    if (s->kind[i] == which && chosen(s, q, i) != again) flip(s, q->set, i);
  look(s, q);
  if (!better(s, q, p)) return false;
  copy(s, p, q);
  return true;
}

static void descend(search *s, point *p, point *q, int64_t until) {
  for (bool again = true; again && s->work > until;) {
    again = false;
    for (int k = 0; k < s->nkind && s->work > until && s->nkind < s->n; k++) {
      again = try_kind(s, p, q, k, true) || again;
      again = try_kind(s, p, q, k, false) || again;
    }
    for (int i = 0; i < s->n && s->work > until; i++) again = try_flip(s, p, q, NULL, i) || again;
  }
}

/* Flips a few candidates, near each other or far apart, or whole kinds. */
static void flip_some(search *s, uint64_t *set, int count) {
  const bool kinds = s->nkind > 1 && s->nkind <= s->n / 2 && rgi_draw(&s->random, 4) == 0;
  for (int k = 0; k < count && kinds; k++) {
    const int which = rgi_draw(&s->random, s->nkind),
              way = rgi_draw(&s->random, 3); /* flip, keep, recompute */
    for (int i = 0; i < s->n; i++)
      if (s->kind[i] == which && (way == 0 || rgi_has(set, s->c->free[i]) == (way == 1)))
        flip(s, set, i);
  }
  if (kinds) return;
  const int near = 8 < s->n ? 8 : s->n, reach = rgi_draw(&s->random, 2) ? s->n : near;
  int at = rgi_draw(&s->random, s->n);
  for (int i = 0; i < count; i++) {
    flip(s, set, at);
    at = (at + 1 + rgi_draw(&s->random, reach)) % s->n;
  }
}

/* Goes where it gets no worse, for as long as the work lasts. */
static void stir(search *s, point *p, point *q, int64_t until) {
  while (s->work > until) {
    copy(s, q, p);
    flip_some(s, q->set, 1 + rgi_draw(&s->random, 4));
    look(s, q);
    if (!better(s, p, q)) copy(s, p, q);
  }
}

/* ---- the search's own room ---- */

static rg_status open_search(search *s, rgi_chooser *c, rg_error *e) {
  rgi_model *m = c->m;
  *s = (search){.c = c,
                .m = m,
                .n = c->nfree,
                .random = 0x9e3779b97f4a7c15,
                .low = INT64_MAX,
                .room = c->budget};
  s->used = rgi_model_set(m);
  s->trial = rgi_model_set(m);
  s->kind = rgi_alloc_n(m->arena, (size_t)s->n, sizeof *s->kind);
  s->op = rgi_alloc_n(m->arena, (size_t)s->n, sizeof *s->op);
  if (!s->used || !s->trial || !s->kind || !s->op) return rgi_nomem(e);
  for (int i = 0; i < STARTS; i++)
    if (!(s->best[i].set = rgi_model_set(m))) return rgi_nomem(e);
  for (int i = 0; i < s->n; i++) s->kind[i] = m->kind[c->free[i]], s->op[i] = m->op[c->free[i]];
  s->nkind = m->nkind, s->nop = m->nop;
  return RG_OK;
}

static rg_status new_point(const search *s, point *p, rg_error *e) {
  *p = (point){.set = rgi_model_set(s->m)};
  return p->set ? RG_OK : rgi_nomem(e);
}

static void tell(const search *s, const char *stage, double done, double total) {
  if (s->c->progress.fn) s->c->progress.fn(s->c->progress.user, stage, done, total);
}

/* ---- the least memory ---- */

rg_status rgi_least_many(rgi_chooser *c, uint64_t *set, int64_t *least, rg_error *e) {
  search s;
  point q;
  RGI_TRY(open_search(&s, c, e));
  RGI_TRY(new_point(&s, &q, e));
  offer_seeds(&s);
  s.work = LEAST_WORK;
  *least = INT64_MAX;
  int64_t share = (int64_t)STIRS * s.n * s.m->g->nnode / s.nbest;
  if (share > LEAST_WORK / 2 / s.nbest) share = LEAST_WORK / 2 / s.nbest;
  for (int i = 0; i < s.nbest; i++) {
    tell(&s, "least", i, s.nbest);
    descend(&s, &s.best[i], &q, s.work - s.work / (s.nbest - i) / 2);
    stir(&s, &s.best[i], &q, s.work - share);
    descend(&s, &s.best[i], &q, 0);
  }
  for (int k = 0; k < s.nbest; k++) { /* what may take the least first */
    int first = k;
    for (int i = k + 1; i < s.nbest; i++)
      if (s.best[i].figure < s.best[first].figure) first = i;
    const point p = s.best[first];
    s.best[first] = s.best[k];
    s.best[k] = p;
    int64_t saved, peak;
    double ms;
    if (p.figure >= *least) break;
    RGI_TRY(
        rgi_model_measure(s.m, p.set, c->of_saved ? -1 : *least - 1, false, &saved, &peak, &ms, e));
    c->explored++;
    if ((c->of_saved ? saved : peak) >= *least) continue;
    *least = c->of_saved ? saved : peak;
    memcpy(set, p.set, (size_t)s.m->words * sizeof *set);
  }
  return RG_OK;
}

/* ---- the least time ---- */

/* The candidates by what recomputing them costs for the bytes it frees, dearest first. */
static rg_status dearest(search *s, int **order, rg_error *e) {
  const rgi_model *m = s->m;
  int *x = *order = rgi_alloc_n(m->arena, (size_t)s->n, sizeof *x);
  if (!x) return rgi_nomem(e);
  for (int i = 0; i < s->n; i++) {
    const int c = s->c->free[i];
    int j = i;
    for (; j > 0; j--) {
      const int b = s->c->free[x[j - 1]];
      if (m->ms[b] * (double)m->kept_bytes[c] >= m->ms[c] * (double)m->kept_bytes[b]) break;
      x[j] = x[j - 1];
    }
    x[j] = i;
  }
  return RG_OK;
}

static bool keep(search *s, point *p, point *q, int i) {
  if (!chosen(s, p, i)) return false;
  copy(s, q, p);
  flip(s, q->set, i);
  look(s, q);
  if (q->figure > s->room || q->ms > p->ms) return false;
  copy(s, p, q);
  return true;
}

/* Keeps what can be kept, the dearest first. */
static void drop(search *s, point *p, point *q, const int *order, int64_t until) {
  for (int i = 0; i < s->n && s->work > until; i++) keep(s, p, q, order[i]);
}

/* Flips two or three candidates near each other or far apart, until the time is `near` or the work
 * done, and goes where it gets no dearer. */
static void swap(search *s, point *p, point *q, const int *order, double near) {
  const int64_t all = s->work;
  for (int64_t round = 0; s->work > 0 && p->ms > near; round++) {
    if ((round & 1023) == 0) tell(s, "recompute", (double)(all - s->work), (double)all);
    copy(s, q, p);
    flip_some(s, q->set, 2 + rgi_draw(&s->random, 4) / 3);
    if (rgi_model_ms(s->m, q->set) > p->ms) { /* it may cost less than that, but hardly ever does */
      s->work -= s->n;
      continue;
    }
    look(s, q);
    if (q->figure > s->room || q->ms > p->ms || (q->ms == p->ms && q->figure > p->figure)) continue;
    const bool cheaper = q->ms < p->ms || q->figure < p->figure;
    copy(s, p, q);
    if (cheaper) drop(s, p, q, order, s->work - 16 * s->m->g->nnode);
  }
}

static void offer_within(search *s, const uint64_t *least) {
  s->nbest = 0;
  if (least) {
    memcpy(begin(s), least, (size_t)s->m->words * sizeof *least);
    offer(s);
  }
  offer_seeds(s);
}

/* The cheapest of the seeds once all is kept that can be; NULL: there is none. */
static point *best_kept(search *s, point *q, const int *order, int64_t work) {
  s->work = work;
  point *best = s->nbest ? &s->best[0] : NULL;
  for (int i = 0; i < s->nbest; i++) {
    drop(s, &s->best[i], q, order, s->work - s->work / (s->nbest - i));
    if (better(s, &s->best[i], best)) best = &s->best[i];
  }
  return best;
}

static void take(search *s, const point *p) {
  rgi_chooser *c = s->c;
  memcpy(c->best, p->set, (size_t)s->m->words * sizeof *c->best);
  c->best_ms = p->ms;
  c->found = true;
}

/* Memplan has the last word. Where it has less room than the replay saw, the search goes below the
 * budget by what was lacking, each time further. What comes of that is taken; at last there is the
 * least, which is known to fit. Before a proof, which asks about what it comes by itself, a part of
 * memplan's work will do. */
static rg_status settle(search *s, point *p, point *q, const point *least, const int *order,
                        double near, bool proves, rg_error *e) {
  const int retries = proves ? 0 : RETRIES; /* a proof mends by itself */
  int64_t over;
  for (int again = 0; p; again++) {
    RGI_TRY(rgi_chooser_ask(s->c, p->set, proves ? PART : 0, &over, e));
    if (over <= 0) break;
    if (again == retries) {
      p = NULL;
      break;
    }
    s->room = (p->figure < s->room ? p->figure : s->room) - (over << again);
    offer_within(s, least ? least->set : NULL);
    p = best_kept(s, q, order, DROP_WORK / RETRIES);
    s->work = SWAP_WORK / RETRIES;
    if (p && p->ms > near) swap(s, p, q, order, near);
  }
  const point *taken = p ? p : least;
  if (taken) take(s, taken);
  return RG_OK;
}

/* Where a seed is so far below the budget, the least is, too, whatever it is: no need to look for
 * it. */
static bool room_to_spare(const search *s) {
  return s->low <= s->c->budget - s->c->budget / 16;
}

static bool is_far(const rgi_chooser *c) {
  return c->best_ms - c->bound_ms > FAR * c->m->all_ms;
}

/* What the bound leaves open: nothing else need be decided. */
static rg_status what_is_open(const rgi_chooser *c, rgi_chooser *open, rg_error *e) {
  *open = *c;
  open->nfree = 0;
  open->free = rgi_alloc_n(c->m->arena, (size_t)c->nfree + 1, sizeof *open->free);
  open->always = rgi_model_set(c->m);
  if (!open->free || !open->always) return rgi_nomem(e);
  memcpy(open->always, c->always, (size_t)c->m->words * sizeof *c->always);
  for (int i = 0; i < c->nfree; i++) {
    const bool kept = rgi_has(c->may[0], c->free[i]), again = rgi_has(c->may[1], c->free[i]);
    if (kept && again) open->free[open->nfree++] = c->free[i];
    if (!kept) rgi_put(open->always, c->free[i]);
  }
  return RG_OK;
}

/* Goes through all of that, if it is not too much. */
static rg_status prove(rgi_chooser *c, rgi_bound *bound, rg_error *e) {
  rgi_chooser open;
  RGI_TRY(what_is_open(c, &open, e));
  if (open.nfree > (is_far(c) ? RGI_PROOF_LIMIT : NEAR_LIMIT)) return RG_OK;
  int64_t work = PLAN_WORK - c->m->spent;
  if (work < LEAST_PROOF) work = LEAST_PROOF;
  if (work > MOST_PROOF) work = MOST_PROOF;
  int64_t far = FAR_PLAN - c->m->spent;
  if (far > FAR_PROOF) far = FAR_PROOF;
  const int64_t more = far > work ? far - work : 0;
  if (is_far(c)) RGI_TRY(rgi_beside_open(&open, &open.beside, e));
  const rg_status status = rgi_prove(&open, bound, work, more, e);
  rgi_beside_close(open.beside);
  RGI_TRY(status);
  c->m->spent = 0;
  c->best_ms = open.best_ms;
  c->bound_ms = open.bound_ms;
  c->explored = open.explored;
  return RG_OK;
}

/* Does the cheapest of all fit, which computes nothing again but what it has to? */
static rg_status take_cheapest(search *s, point *p, rg_error *e) {
  rgi_chooser *c = s->c;
  bool fits = false;
  c->found = false;
  memcpy(p->set, c->always, (size_t)s->m->words * sizeof *p->set);
  look(s, p);
  if (p->figure <= s->room) RGI_TRY(rgi_chooser_fits(c, p->set, &fits, e));
  if (!fits) return RG_OK;
  take(s, p);
  c->bound_ms = p->ms;
  c->optimal = true;
  return RG_OK;
}

rg_status rgi_choose_many(rgi_chooser *c, const uint64_t *least, rg_error *e) {
  search s;
  point q, known, *best;
  int *order;
  rgi_bound *bound;
  RGI_TRY(open_search(&s, c, e));
  RGI_TRY(new_point(&s, &q, e));
  RGI_TRY(new_point(&s, &known, e));
  RGI_TRY(dearest(&s, &order, e));
  s.by_time = true;
  RGI_TRY(take_cheapest(&s, &q, e));
  if (c->found) return RG_OK;
  if (least) {
    memcpy(known.set, least, (size_t)s.m->words * sizeof *least);
    look(&s, &known);
  }
  offer_within(&s, least);
  if (!least && !room_to_spare(&s)) return RG_OK;
  if (!(best = best_kept(&s, &q, order, DROP_WORK))) return RG_OK;
  c->best_ms = best->ms;
  c->bound_ms = 0;
  for (int v = 0; v < 2; v++)
    if (!(c->may[v] = rgi_model_set(c->m))) return rgi_nomem(e);
  if (!c->brief) RGI_TRY(rgi_bound_open(c, &bound, e));
  if (!c->brief) RGI_TRY(rgi_bound_find(bound, e));
  const double near = c->brief ? 0 : c->bound_ms + NEAR * s.m->all_ms;
  const int64_t size = s.n * (int64_t)s.m->g->nnode;
  s.work = (SWAPS * size < SWAP_WORK ? SWAPS * size : SWAP_WORK) / (c->brief ? BRIEF : 1);
  if (best->ms > near) swap(&s, best, &q, order, near);
  c->best_ms = best->ms;
  const bool proves = !c->brief && is_far(c) && s.n <= RGI_PROOF_LIMIT;
  RGI_TRY(settle(&s, best, &q, least ? &known : NULL, order, near, proves, e));
  if (!c->found) return RG_OK;
  if (!c->brief && c->best_ms > near) RGI_TRY(prove(c, bound, e));
  c->optimal = c->best_ms <= c->bound_ms;
  return RG_OK;
}
