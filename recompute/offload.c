/* recompute/offload.c: budgets that may also be met by offloading, where the policy says how much
   of the host's memory that may take.

   Which nodes leave is decided by a list: what is expensive to compute again for its bytes comes
   first, among equals what is made first, which has the longest windows; a node that would make
   anybody wait goes to the end. Any first part of the list is a choice of what to offload, and the
   chooser does the rest with it:

       few nodes  every choice of what to offload is looked at, and the best is the best there is
       keep all   the shortest part with which nothing need be recomputed, if one costs nothing
       else       all that hides; where that may miss the best by much, or does not fit: nothing,
                  that and what is dearer to recompute than to wait for, the whole list, and what
                  the choice of the least memory keeps if nothing leaves (what layers start from);
                  then what the best so far keeps, and all that hides beside it, again and again

   All but the last depend on no budget, so neither does the least that can be met. A node that
   leaves may be computed again, too, for clones that read it; backward itself reads what comes
   back.

   What no choice beats is bounded like this: offloading frees at most the blocks it moves, be it of
   saved memory or of a clone that backward would have held on to, and once in saved and in scratch
   memory what aligned the last of them. Of more bytes than a certain number the copies alone would
   take longer than the choice at hand, since none leaves before it is made nor is back later than
   it is wanted; with fewer, recomputing takes no less time than under a budget of so many bytes
   more.
 */
#include "search.h"
#include <math.h>
#include <stdlib.h>

enum {
  PARTS = 4,
  ROUNDS = 3,
  FEW = 6 /* offers, all of whose subsets are looked at … */,
  FEW_NODES = 12
};
static const double NEAR = 0.01;            /* of the whole time: near enough to the best */
enum { BOUNDS = 6, MOST_WAYS = 64 };        /* waits told apart; what no byte is worth */
static const int64_t PROOF_WORK = 20000000; /* nodes replayed, for each */

/* A copy of one tensor there and back. */
typedef struct trip {
  int origin;
  double made, wanted; /* when, in forward and in backward */
  double ms;           /* one way */
  int64_t bytes;       /* of its block */
} trip;

typedef struct offer {
  int origin;
  int64_t bytes;
  double again_ms; /* to compute it again */
  int worth;       /* again_ms for its bytes, in steps of 5 % */
  int made;        /* place in the forward */
} offer;

typedef struct outcome {
  bool *away; /* per origin */
  rgi_graph *graph;
  rgi_choice *choice;
  double ms[2], total;
} outcome;

typedef struct want {
  double when;
  int trip;
} want;

typedef struct search {
  const rgi_graph *g;
  const rg_policy *policy;
  const rgi_profile *profile;
  const rgi_memory_options *mem;
  rgi_progress progress;
  rgi_arena *arena;
  double forward_ms, way; /* ms that a byte of a block takes one way at least */
  trip *trip;             /* by the time they are made */
  int ntrip;
  want *want;          /* trips in the order in which they are wanted */
  offer *offer;        /* the list */
  int nall;            /* behind the list: what the host has no room for beside it */
  int noffer, nhidden; /* of it, those that nobody waits for */
  int nworth;          /* and those that are worth a wait */
  const bool *base;    /* per origin: offloaded by name */
  int64_t host;        /* bytes that the named ones take */
  double all;          /* … and all others would */
  bool *chosen;
  /* what bounds are made of: nothing offloaded but what is named; open_bound() */
  rgi_graph *named;
  double named_ms; /* waits */
  rgi_model *model;
  rgi_chooser chooser;
  rgi_bound *bound;
} search;

static rg_status hand_on(const rg_error *own, rg_error *e) {
  if (e && e->status == RG_OK) *e = *own;
  return own->status;
}

/* ---- what there is to offload ---- */

static rg_status find_trips(search *s, rg_error *e) {
  const rgi_graph *g = s->g;
  double now = 0, *made = rgi_alloc_n(s->arena, (size_t)g->ntensor + 1, sizeof *made),
         *wanted = rgi_alloc_n(s->arena, (size_t)g->ntensor + 1, sizeof *wanted);
  int64_t *bytes = rgi_alloc_n(s->arena, (size_t)g->ntensor + 1, sizeof *bytes);
  offer *of = rgi_alloc_n(s->arena, (size_t)g->norigin + 1, sizeof *of);
  s->trip = rgi_alloc_n(s->arena, (size_t)g->ntensor + 1, sizeof *s->trip);
  s->offer = of;
  if (!made || !wanted || !bytes || !of || !s->trip) return rgi_nomem(e);
  RGI_TRY(rgi_offload_bytes(g, bytes, e));
  for (int t = 0; t < g->ntensor; t++) wanted[t] = -1;
  for (int o = 0; o < g->norigin; o++) of[o] = (offer){.origin = o};
  bool backward = false;
  for (int k = 0; k < g->nnode; k++) {
    const rgi_node *n = &g->node[k];
    double ms;
    RGI_TRY(rgi_node_ms(g, k, s->profile, s->arena, &ms, e));
    if (n->backward && !backward) {
      s->forward_ms = now;
      backward = true;
      now = 0;
    }
    for (int i = 0; i < rgi_nin(n) && n->backward; i++) {
      const int owner = n->in[i] < 0 ? -1 : rgi_owner(g, n->in[i]);
      if (owner >= 0 && wanted[owner] < 0) wanted[owner] = now;
    }
    now += ms;
    for (int i = 0; i < rgi_nout(n); i++)
      if (n->out[i] >= 0 && !n->backward) made[n->out[i]] = now;
    if (!n->backward && n->origin >= 0 && n->kind == RGI_PRIMAL) {
      of[n->origin].again_ms += ms;
      of[n->origin].made = k;
    }
  }
  if (!backward) s->forward_ms = now;
  s->way = INFINITY;
  for (int k = 0; k < g->nnode && !g->node[k].backward; k++)
    for (int i = 0; i < rgi_nout(&g->node[k]); i++) {
      const int t = g->node[k].out[i];
      if (t < 0 || bytes[t] == 0) continue;
      const double each = s->profile->cuda ? 1 : 2; /* a CPU reads and writes */
      const rg_cost cost = {.bytes = each * (double)bytes[t],
                            .host = s->profile->cuda ? (double)bytes[t] : 0};
      trip *x = &s->trip[s->ntrip++];
      *x = (trip){.origin = g->node[k].origin, .made = made[t], .wanted = wanted[rgi_owner(g, t)]};
      x->ms = rgi_profile_ms(s->profile, "offload", NULL, g->tensor[t].dtype, &cost);
      if (x->wanted < 0) x->wanted = 0;
      x->bytes = rgi_aligned(bytes[t]);
      s->way = fmin(s->way, x->ms / (double)x->bytes);
      of[x->origin].bytes += x->bytes;
    }
  return RG_OK;
}

static int by_worth(const void *x, const void *y) {
  const offer *a = x, *b = y;
  if (a->worth != b->worth) return a->worth > b->worth ? -1 : 1;
  return (a->made > b->made) - (a->made < b->made);
}

static int by_want(const void *x, const void *y) {
  const want *a = x, *b = y;
  if (a->when != b->when) return a->when < b->when ? -1 : 1;
  return (a->trip > b->trip) - (a->trip < b->trip);
}

/* What is waited for the trips of the chosen, as windows.c has it. */
static double wait_for(const search *s, const bool *chosen) {
  double lane = 0, back = 0, late = 0, sum = 0;
  for (int i = 0; i < s->ntrip; i++) {
    const trip *x = &s->trip[i], *y = &s->trip[s->want[i].trip];
    if (chosen[x->origin]) {
      lane = fmax(lane, x->made) + x->ms;
      sum += 2 * x->ms;
    }
    if (!chosen[y->origin]) continue;
    back += y->ms;
    late = fmax(late, back - y->wanted);
  }
  if (!s->profile->cuda) return sum; /* whoever copies does nothing else */
  return fmax(lane - s->forward_ms, 0) + late;
}

/* Puts the list in order: what hides, what is worth a wait, the rest. */
static rg_status make_list(search *s, rg_error *e) {
  const size_t all = (size_t)s->g->norigin;
  s->want = rgi_alloc_n(s->arena, (size_t)s->ntrip + 1, sizeof *s->want);
  offer *rest = rgi_alloc_n(s->arena, all + 1, sizeof *rest);
  offer *none = rgi_alloc_n(s->arena, all + 1, sizeof *none);
  bool *trial = rgi_alloc_n(s->arena, all + 1, sizeof *trial);
  if (!s->want || !rest || !none || !trial) return rgi_nomem(e);
  for (int i = 0; i < s->ntrip; i++) s->want[i] = (want){s->trip[i].wanted, i};
  qsort(s->want, (size_t)s->ntrip, sizeof *s->want, by_want);
  int n = 0, left = 0, over = 0;
  for (size_t o = 0; o < all; o++) {
    offer x = s->offer[o];
    if (s->base[o]) s->host += x.bytes;
    if (!x.bytes || rgi_policy_action(s->policy, s->g->origin[o].name) != RGI_AUTO) continue;
    x.worth = (int)floor(log(x.again_ms / (double)x.bytes + 1e-30) / log(1.05));
    s->all += (double)x.bytes;
    s->offer[n++] = x;
  }
  qsort(s->offer, (size_t)n, sizeof *s->offer, by_worth);
  memcpy(trial, s->base, all * sizeof *trial);
  double waited = wait_for(s, trial);
  int64_t host = s->host;
  for (int i = 0; i < n; i++) {
    const offer x = s->offer[i];
    trial[x.origin] = true;
    const double wait = wait_for(s, trial);
    if (host + x.bytes <= s->policy->host && wait <= waited + 1e-9) {
      host += x.bytes;
      s->offer[s->nhidden++] = x;
    } else {
      trial[x.origin] = false;
      rest[left++] = x;
    }
  }
  s->noffer = s->nhidden;
  for (int i = 0; i < left; i++) { /* they are in order of worth */
    if (host + rest[i].bytes > s->policy->host) {
      none[over++] = rest[i];
      continue;
    }
    host += rest[i].bytes;
    if (rest[i].again_ms > 2 * s->way * (double)rest[i].bytes) s->nworth = s->noffer + 1;
    s->offer[s->noffer++] = rest[i];
  }
  if (s->nworth < s->nhidden) s->nworth = s->nhidden;
  memcpy(s->offer + s->noffer, none, (size_t)over * sizeof *none);
  s->nall = n;
  return RG_OK;
}

/* ---- what may leave ---- */

/* What is named, and the first n of the list. NULL on NOMEM. */
static bool *first_of(const search *s, int n) {
  bool *away = rgi_alloc_n(s->arena, (size_t)s->g->norigin + 1, sizeof *away);
  if (!away) return NULL;
  memcpy(away, s->base, (size_t)s->g->norigin * sizeof *away);
  for (int i = 0; i < n; i++) away[s->offer[i].origin] = true;
  return away;
}

/* The chooser's best with those offloaded. */
static rg_status look(search *s, bool *away, rgi_start *hint, outcome *out, rg_error *e) {
  rgi_graph *g;
  *out = (outcome){.away = away};
  RGI_TRY(rgi_offload(s->g, away, s->profile, &g, out->ms, e));
  rg_status status = rgi_verify(g, "offload", e);
  if (status == RG_OK)
    status = rgi_recompute_by(g, s->policy, s->profile, s->mem, s->progress, hint, &out->graph,
                              &out->choice, e);
  rgi_graph_destroy(g);
  if (status == RG_OK) out->total = out->ms[0] + out->ms[1] + out->choice->extra_ms;
  return status;
}

static void drop(outcome *x) {
  rgi_graph_destroy(x->graph);
  rgi_choice_destroy(x->choice);
  *x = (outcome){0};
}

/* Do the bytes alive at once fit, with everything kept and the first n of the list offloaded? */
static rg_status fits(search *s, int n, bool *yes, rg_error *e) {
  rgi_graph *g, *placed = NULL;
  double ms[2];
  int64_t saved = 0, forward = 0, backward = 0;
  bool *away = first_of(s, n),
       *none = away ? rgi_alloc_n(s->arena, (size_t)s->g->norigin + 1, 1) : NULL;
  if (!none) return rgi_nomem(e);
  RGI_TRY(rgi_offload(s->g, away, s->profile, &g, ms, e));
  rg_status status = rgi_rewrite(g, none, s->profile, &placed, NULL, e);
  rgi_graph_destroy(g);
  RGI_TRY(status);
  status = rgi_memory_peak(placed, s->mem, true, &saved, &forward, &backward, e);
  rgi_graph_destroy(placed);
  const int64_t peak = saved + s->mem->comm + (forward > backward ? forward : backward);
  *yes = (s->policy->budget_of_saved ? saved : peak) <= s->policy->budget;
  return status;
}

/* ---- the bound ---- */

/* The most bytes that leave by the end of forward, `wait` later at most, and are back when they are
 * wanted, `total` later at most, be that by parts. */
static double movable(const search *s, double wait, double total) {
  double out = 0, back = 0;
  if (!s->profile->cuda) return wait / (2 * s->way); /* whoever copies does nothing else */
  memset(s->chosen, 0, (size_t)s->g->norigin * sizeof *s->chosen);
  for (int i = 0; i < s->nall; i++) s->chosen[s->offer[i].origin] = true;
  for (int i = s->ntrip - 1; i >= 0; i--) {
    const trip *x = &s->trip[i];
    if (s->chosen[x->origin])
      out = fmin(out + (double)x->bytes, (s->forward_ms + wait - x->made) / s->way);
  }
  for (int i = 0; i < s->ntrip; i++) {
    const trip *x = &s->trip[s->want[i].trip];
    if (s->chosen[x->origin]) back = fmin(back + (double)x->bytes, (x->wanted + total) / s->way);
  }
  return fmin(out, back);
}

/* What recomputing takes at least with `free` bytes above the budget, up to `most`. */
static rg_status least_ms(search *s, int64_t budget, double free, double most, double *out,
                          rg_error *e) {
  rgi_chooser *c = &s->chooser;
  c->budget = budget < INT64_MAX / 4 ? budget + (int64_t)free + 2 * RGI_ALIGN : budget;
  c->found = false;
  c->best_ms = most;
  c->bound_ms = 0;
  if (c->nfree <= RGI_EXACT_LIMIT)
    RGI_TRY(rgi_choose_exact(c, e));
  else
    RGI_TRY(rgi_prove(c, s->bound, PROOF_WORK, 0, e));
  *out = fmin(c->bound_ms, most); /* that nothing was found proves nothing */
  return RG_OK;
}

static rg_status open_bound(search *s, rg_error *e) {
  rgi_memory_options mem = *s->mem;
  double waits[2];
  mem.bound_only = true;
  RGI_TRY(rgi_offload(s->g, s->base, s->profile, &s->named, waits, e));
  s->named_ms = waits[0] + waits[1];
  RGI_TRY(rgi_model_create(s->named, s->profile, &mem, &s->model, e));
  RGI_TRY(rgi_chooser_by(&s->chooser, s->model, s->policy, e));
  double *moved = rgi_alloc_n(s->arena, (size_t)s->model->ncandidate + 1, sizeof *moved);
  if (!moved) return rgi_nomem(e);
  for (int i = 0; i < s->nall; i++)
    if (s->model->candidate_of[s->offer[i].origin] >= 0)
      moved[s->model->candidate_of[s->offer[i].origin]] = (double)s->offer[i].bytes;
  s->chooser.moved = moved;
  return rgi_bound_open(&s->chooser, &s->bound, e);
}

/* At most `total`: what no choice of either kind beats. Whoever waits longer may have moved more,
 * by what the link moves in that time. */
static rg_status bound_of_many(search *s, int64_t budget, double room, double total, double *out,
                               rg_error *e) {
  rgi_chooser *c = &s->chooser;
  const double from = fmin(s->named_ms, total);
  c->budget = budget;
  c->movable = fmin(movable(s, from, total), room);
  c->moved_ms = (c->movable < room ? s->profile->cuda ? 1 : 2 : MOST_WAYS) * s->way;
  c->best_ms = total - from;
  c->bound_ms = 0;
  RGI_TRY(rgi_bound_find(s->bound, e));
  *out = from + c->bound_ms;
  return RG_OK;
}

/* The same for few. Waits between `from` and that of the next, and what they and the rest take at
 * least; the one that is least is halved until it is `near`. */
static rg_status bound_of_few(search *s, int64_t budget, double room, double total, double near,
                              double *out, rg_error *e) {
  struct {
    double from, again; /* ms */
  } all[BOUNDS + 1];
  int n = 1, least = 0;
  all[0].from = fmin(s->named_ms, total);
  RGI_TRY(least_ms(s, budget, fmin(movable(s, total, total), room), total - all[0].from,
                   &all[0].again, e));
  for (;; n++) {
    for (int i = least = 0; i < n; i++)
      if (all[i].from + all[i].again < all[least].from + all[least].again) least = i;
    *out = all[least].from + all[least].again;
    if (*out >= near || n == BOUNDS) return RG_OK;
    const double middle = (all[least].from + (least + 1 < n ? all[least + 1].from : total)) / 2;
    for (int i = n; i > least; i--) all[i] = all[i - 1];
    all[least + 1].from = middle;
    RGI_TRY(least_ms(s, budget, fmin(movable(s, middle, total), room), total - all[least].from,
                     &all[least].again, e));
    all[least].again = fmax(all[least].again, all[least + 1].again);
    all[least + 1].again = fmin(all[least + 1].again, total - middle);
  }
}

static rg_status bound(search *s, int64_t budget, double total, double near, double *out,
                       rg_error *e) {
  const double room = fmin(s->all, fmax((double)(s->policy->host - s->host), 0));
  double few = 0;
  *out = 0;
  if (!s->model) RGI_TRY(open_bound(s, e));
  RGI_TRY(bound_of_many(s, budget, room, total, out, e));
  if (*out < near && s->chooser.nfree <= 64)
    RGI_TRY(bound_of_few(s, budget, room, total, near, &few, e));
  *out = fmax(*out, few);
  return RG_OK;
}

/* ---- the whole ---- */

/* Do the named nodes and those of the mask fit the host's memory? */
static bool has_room(const search *s, uint32_t mask) {
  int64_t bytes = s->host;
  for (int i = 0; i < s->nall; i++)
    if (mask >> i & 1) bytes += s->offer[i].bytes;
  return mask == 0 || bytes <= s->policy->host;
}

static bool better(const search *s, const outcome *a, const outcome *b) {
  if (!b->choice) return true;
  if (s->policy->least && a->choice->budget != b->choice->budget)
    return a->choice->budget < b->choice->budget;
  return a->total < b->total;
}

/* The least that the chooser reaches with those offloaded; again (may be NULL): by recomputing
 * those. */
static rg_status find_least(search *s, const bool *away, int64_t *least, bool *again, rg_error *e) {
  rgi_graph *g;
  rgi_model *m = NULL;
  rgi_chooser c;
  double ms[2];
  RGI_TRY(rgi_offload(s->g, away, s->profile, &g, ms, e));
  rg_status status = rgi_model_create(g, s->profile, s->mem, &m, e);
  uint64_t *set = status == RG_OK ? rgi_model_set(m) : NULL;
  if (status == RG_OK) status = set ? rgi_chooser_by(&c, m, s->policy, e) : rgi_nomem(e);
  if (status == RG_OK) {
    c.progress = s->progress;
    status = (c.nfree <= RGI_EXACT_LIMIT ? rgi_least_exact : rgi_least_many)(&c, set, least, e);
  }
  for (int i = 0; again && status == RG_OK && i < m->ncandidate; i++)
    again[m->origin[i]] = rgi_has(set, i);
  rgi_model_destroy(m);
  rgi_graph_destroy(g);
  return status;
}

static rg_status none_fits(const search *s, bool all, int64_t least, rg_error *e) {
  char asked[32], bytes[32];
  return rgi_fail(e, RG_E_INFEASIBLE, s->policy->budget_at, NULL,
                  "no choice of recomputed and offloaded nodes%s fits %s of %s memory; "
                  "the least %s is %s (%lld bytes)",
                  all ? "" : " that was found", rg_human_bytes(s->policy->budget, asked),
                  s->policy->budget_of_saved ? "saved" : "peak",
                  all ? "any reaches" : "that any reaches", rg_human_bytes(least, bytes),
                  (long long)least);
}

static void better_of(const search *s, outcome *best, outcome *x) {
  if (x->choice && better(s, x, best)) {
    const outcome worse = *best;
    *best = *x;
    *x = worse;
  }
  drop(x);
}

/* Looks at what can be done with those offloaded; *best is the better of the two. */
static rg_status compete(search *s, bool *away, rgi_start *hint, outcome *best, rg_error *e) {
  outcome x;
  rg_error own = {0};
  if (!away) return rgi_nomem(e);
  const rg_status status = look(s, away, hint, &x, &own);
  if (status != RG_OK) return status == RG_E_INFEASIBLE ? RG_OK : hand_on(&own, e);
  better_of(s, best, &x);
  return RG_OK;
}

static bool few(const search *s) {
  int nodes = 0;
  for (int o = 0; o < s->g->norigin; o++) nodes += rgi_recomputable(&s->g->origin[o]);
  return s->nall <= FEW && nodes <= FEW_NODES;
}

static bool *masked(const search *s, uint32_t mask) {
  bool *away = first_of(s, 0);
  for (int i = 0; away && i < s->nall; i++)
    if (mask >> i & 1) away[s->offer[i].origin] = true;
  return away;
}

static rg_status try_all(search *s, outcome *best, double *bound_ms, rg_error *e) {
  const uint32_t n = 1u << s->nall;
  for (uint32_t mask = 0; mask < n; mask++)
    if (has_room(s, mask)) RGI_TRY(compete(s, masked(s, mask), NULL, best, e));
  if (best->choice) {
    *bound_ms = best->total;
    return RG_OK;
  }
  int64_t low = INT64_MAX;
  for (uint32_t mask = 0; mask < n; mask++) {
    int64_t least = low;
    const bool *away = masked(s, mask);
    if (!away) return rgi_nomem(e);
    if (has_room(s, mask)) RGI_TRY(find_least(s, away, &least, NULL, e));
    if (least < low) low = least;
  }
  return none_fits(s, true, low, e);
}

/* The shortest part with which nothing need be recomputed, if all that hides is enough for that. */
static rg_status keep_all(search *s, outcome *best, rg_error *e) {
  bool yes;
  int low = -1, high = s->nhidden;
  RGI_TRY(fits(s, high, &yes, e));
  if (!yes) return RG_OK;
  while (high - low > 1) {
    const int n = low + (high - low) / 2;
    RGI_TRY(fits(s, n, &yes, e));
    *(yes ? &high : &low) = n;
  }
  return compete(s, first_of(s, high), NULL, best, e);
}

/* What to look at, each once. */
typedef struct parts {
  int n;
  bool *away[PARTS + 1];
  int64_t least[PARTS + 1], low; /* that each reaches, and the least of them; 0: not known yet */
  bool *again[PARTS + 1];        /* … by recomputing those; NULL: not known */
  int kept;                      /* the one of add_kept() … */
  bool *wanted;                  /* … which would have those away */
} parts;

static rg_status add_part(const search *s, parts *p, bool *away, rg_error *e) {
  if (!away) return rgi_nomem(e);
  for (int i = 0; i < p->n; i++)
    if (memcmp(p->away[i], away, (size_t)s->g->norigin * sizeof *away) == 0) return RG_OK;
  p->away[p->n++] = away;
  return RG_OK;
}

/* Takes the offer along if the host has room for it, and nobody waits longer than that. */
static bool take(const search *s, const offer *x, double waited, bool *away, int64_t *host) {
  if (away[x->origin] || *host + x->bytes > s->policy->host) return false;
  away[x->origin] = true;
  if (wait_for(s, away) <= waited + 1e-9) {
    *host += x->bytes;
    return true;
  }
  return away[x->origin] = false;
}

/* Of those wanted, what hides, whatever is made first first; then, to fill up, the rest of the
 * list. */
static bool *hidden_of(const search *s, const bool *wanted, bool fill) {
  bool *away = first_of(s, 0);
  if (!away) return NULL;
  const double waited = wait_for(s, away);
  int64_t host = s->host;
  for (int last = -1, next;; last = s->offer[next].made) {
    next = -1;
    for (int i = 0; i < s->nall; i++)
      if (wanted[s->offer[i].origin] && s->offer[i].made > last &&
          (next < 0 || s->offer[i].made < s->offer[next].made))
        next = i;
    if (next < 0) break;
    take(s, &s->offer[next], waited, away, &host);
  }
  for (int i = 0; i < s->nall && fill; i++) take(s, &s->offer[i], waited, away, &host);
  return away;
}

static rg_status find_least_of(search *s, parts *p, int k, rg_error *e) {
  p->again[k] = rgi_alloc_n(s->arena, (size_t)s->g->norigin + 1, sizeof *p->again[k]);
  if (!p->again[k]) return rgi_nomem(e);
  return find_least(s, p->away[k], &p->least[k], p->again[k], e);
}

/* What the least keeps if nothing is offloaded but what is named, away. */
static rg_status add_kept(search *s, parts *p, rg_error *e) {
  const size_t n = (size_t)s->g->norigin;
  int k = 0;
  while (memcmp(p->away[k], s->base, n) != 0) k++;
  RGI_TRY(find_least_of(s, p, k, e));
  bool *kept = p->wanted = rgi_alloc_n(s->arena, n + 1, sizeof *kept);
  if (!kept) return rgi_nomem(e);
  for (size_t o = 0; o < n; o++) kept[o] = !p->again[k][o];
  RGI_TRY(add_part(s, p, hidden_of(s, kept, false), e));
  p->kept = p->n - 1;
  return RG_OK;
}

static rg_status find_leasts(search *s, parts *p, rg_error *e) {
  p->low = INT64_MAX;
  for (int k = 0; k < p->n; k++) {
    if (p->least[k] == 0) RGI_TRY(find_least_of(s, p, k, e));
    if (p->least[k] < p->low) p->low = p->least[k];
  }
  return RG_OK;
}

/* What is wanted leaves, and beside it whatever hides. What is then kept or offloaded is what
 * should leave; so once more, for as long as that is better. */
static rg_status improve(search *s, bool *wanted, outcome *x, rg_error *e) {
  const size_t n = (size_t)s->g->norigin;
  bool *again = rgi_alloc_n(s->arena, n + 1, sizeof *again);
  if (!again) return rgi_nomem(e);
  double before = INFINITY;
  for (int round = 0; round < ROUNDS && x->total < before; round++) {
    before = x->total;
    for (size_t o = 0; o < n; o++) again[o] = x->choice->node[o].recomputed;
    rgi_start from = {.start = again, .brief = true};
    RGI_TRY(compete(s, hidden_of(s, wanted, true), &from, x, e));
    for (size_t o = 0; o < n; o++) wanted[o] = !x->choice->node[o].recomputed;
  }
  return RG_OK;
}

/* *bound_ms: no choice takes less. */
static rg_status decide(search *s, rg_policy *policy, outcome *best, outcome *kept,
                        double *bound_ms, rg_error *e) {
  const int lengths[PARTS] = {s->nhidden, 0, s->nworth, s->noffer};
  const bool least = policy->least;
  parts p = {0};
  *bound_ms = 0;
  if (few(s)) return try_all(s, best, bound_ms, e);
  for (int k = 0; k < PARTS; k++) RGI_TRY(add_part(s, &p, first_of(s, lengths[k]), e));
  if (!least) {
    rgi_start hint = {0};
    RGI_TRY(keep_all(s, best, e));
    if (best->choice && best->total == 0) return RG_OK;
    RGI_TRY(compete(s, p.away[0], &hint, best, e));
    p.least[0] = hint.least;
  }
  if (best->choice) {
    const double near = best->total - NEAR * best->choice->all_ms;
    RGI_TRY(bound(s, policy->budget, best->total, near, bound_ms, e));
    if (*bound_ms >= near) return RG_OK;
    RGI_TRY(add_kept(s, &p, e));
  } else {
    RGI_TRY(add_kept(s, &p, e));
    RGI_TRY(find_leasts(s, &p, e));
    if (!least && p.low > policy->budget) return none_fits(s, false, p.low, e);
    policy->budget = least ? p.low : policy->budget;
    policy->least = false;
  }
  for (int k = 0; k < p.n; k++) {
    if (p.low == 0 ? k == 0 : p.least[k] > policy->budget) continue; /* looked at, or refused */
    rgi_start hint = {.start = p.again[k], .brief = true};
    RGI_TRY(compete(s, p.away[k], &hint, k == p.kept ? kept : best, e));
  }
  if (kept->choice) RGI_TRY(improve(s, p.wanted, kept, e));
  for (int o = 0; best->choice && o < s->g->norigin; o++)
    p.wanted[o] = !best->choice->node[o].recomputed;
  if (best->choice) RGI_TRY(improve(s, p.wanted, best, e));
  better_of(s, best, kept);
  return bound(s, policy->budget, best->total, best->total - NEAR * best->choice->all_ms, bound_ms,
               e);
}

rg_status rgi_recompute_offload(const rgi_graph *g, const rg_policy *policy,
                                const rgi_profile *profile, const rgi_memory_options *mem,
                                rgi_progress progress, bool *chosen, double ms[2], rgi_graph **out,
                                rgi_choice **report, rg_error *e) {
  outcome best = {0}, kept = {0};
  double least_ms = 0;
  *out = NULL;
  *report = NULL;
  rgi_arena *a = rgi_arena_create(g->ctx);
  if (!a) return rgi_nomem(e);
  rg_policy own = *policy; /* whose budget becomes the least, where it asks for that */
  search s = {
      .g = g, .policy = &own, .profile = profile, .mem = mem, .progress = progress, .arena = a};
  const size_t n = (size_t)g->norigin + 1;
  bool *base = rgi_alloc_n(a, n, sizeof *base);
  s.chosen = rgi_alloc_n(a, n, sizeof *s.chosen);
  rg_status status = base && s.chosen ? RG_OK : rgi_nomem(e);
  if (status != RG_OK) goto done;
  memcpy(base, chosen, (size_t)g->norigin * sizeof *base);
  s.base = base;
  RGI_GOTO(status, find_trips(&s, e), done);
  RGI_GOTO(status, make_list(&s, e), done);
  RGI_GOTO(status, decide(&s, &own, &best, &kept, &least_ms, e), done);
  rgi_choice *c = best.choice;
  c->least = policy->least;
  c->wait_ms = best.ms[0] + best.ms[1];
  c->bound_ms = least_ms;
  c->optimal = best.total - least_ms <= 1e-9;
  c->gap = c->optimal ? 0 : (best.total - least_ms) / c->all_ms;
  for (int i = 0; i < s.nall; i++) {
    if (!best.away[s.offer[i].origin]) continue;
    const int o = s.offer[i].origin;
    chosen[o] = c->node[o].offloaded = true;
    c->node[o].why = "a way to meet the budget: the host's memory";
  }
  memcpy(ms, best.ms, sizeof best.ms);
  *out = best.graph;
  *report = c;
  best = (outcome){0};
done:
  drop(&best);
  drop(&kept);
  rgi_model_destroy(s.model);
  rgi_graph_destroy(s.named);
  rgi_arena_destroy(a);
  return status;
}
