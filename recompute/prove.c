/* recompute/prove.c: depth-first search over all choices, for a few dozen candidates: proves what
   was found to be the best, or finds what is, if the work allows.

   A node of the search has decided some candidates. With all others kept, the replay says what is
   saved and what scratch backward's own nodes need; recomputing more frees no more than its own
   bytes and takes away no scratch, so the bytes above the budget have to come from candidates still
   open, cheapest first and by parts.
 */
#include "search.h"
#include <stdlib.h>

typedef struct proof {
  rgi_chooser *c;
  rgi_model *m;
  int *order;   /* of deciding: the largest first, which rules out most */
  int *by_rate; /* cheapest bytes first */
  bool *open;
  uint64_t *set, *used;
  double best;
  int64_t work;
} proof;

/* Sorts the free candidates by before(a, b), stably. */
static int *sorted(const rgi_chooser *c, bool (*before)(const rgi_model *, int, int)) {
  int *x = rgi_alloc_n(c->m->arena, (size_t)c->nfree + 1, sizeof *x);
  for (int i = 0; x && i < c->nfree; i++) {
    int j = i;
    for (; j > 0 && before(c->m, c->free[i], x[j - 1]); j--) x[j] = x[j - 1];
    x[j] = c->free[i];
  }
  return x;
}

static bool larger(const rgi_model *m, int a, int b) {
  return m->kept_bytes[a] > m->kept_bytes[b];
}
static bool frees_cheaper(const rgi_model *m, int a, int b) {
  return m->ms[a] * (double)m->kept_bytes[b] < m->ms[b] * (double)m->kept_bytes[a];
}

/* Time that freeing `bytes` takes at least, or more than any. */
static double least_time(const proof *p, int64_t bytes) {
  double ms = 0;
  for (int i = 0; i < p->c->nfree && bytes > 0; i++) {
    const int x = p->by_rate[i];
    const int64_t freed = p->m->kept_bytes[x] ? p->m->kept_bytes[x] + RGI_ALIGN : 0;
    if (!p->open[x] || freed == 0) continue;
    ms += freed > bytes ? p->m->ms[x] * ((double)bytes / (double)freed) : p->m->ms[x];
    bytes -= freed;
  }
  return bytes > 0 ? p->best : ms;
}

/* A better choice, if memplan says so. */
static rg_status consider(proof *p, double ms, bool *taken, rg_error *e) {
  RGI_TRY(rgi_chooser_fits(p->c, p->set, taken, e));
  if (!*taken) return RG_OK;
  memcpy(p->c->best, p->set, (size_t)p->m->words * sizeof *p->set);
  p->best = p->c->best_ms = ms;
  return RG_OK;
}

/* above: bytes that p->set, of so much time and with nothing else chosen, is above the budget at
 * least. */
static rg_status explore(proof *p, int depth, double ms, int64_t above, rg_error *e);

/* The same, with the candidate just put into p->set, which has not been looked at. */
static rg_status look(proof *p, int depth, double ms, rg_error *e) {
  if (p->work <= 0 || ms >= p->best) return RG_OK;
  p->work -= p->m->g->nnode;
  const rgi_taken x = rgi_replay_run(p->m->replay, p->set, p->used);
  if (rgi_figure(p->c, x) <= p->c->budget) {
    bool taken = false;
    const double takes = rgi_model_ms(p->m, p->used) + x.wait_ms;
    if (takes < p->best) RGI_TRY(consider(p, takes, &taken, e));
    if (taken) return RG_OK; /* recomputing more only takes longer */
    rgi_replay_run(p->m->replay, p->set, p->used);
  }
  const int64_t scratch = p->c->of_saved ? 0 : rgi_replay_scratch(p->m->replay);
  return explore(p, depth, ms, x.saved + scratch - p->c->budget, e);
}

static rg_status explore(proof *p, int depth, double ms, int64_t above, rg_error *e) {
  if (p->work <= 0 || depth == p->c->nfree || ms + least_time(p, above) >= p->best) return RG_OK;
  const int i = p->order[depth];
  p->open[i] = false;
  RGI_TRY(explore(p, depth + 1, ms, above, e));
  rgi_put(p->set, i);
  RGI_TRY(look(p, depth + 1, ms + p->m->ms[i], e));
  rgi_drop(p->set, i);
  p->open[i] = true;
  return RG_OK;
}

rg_status rgi_prove(rgi_chooser *c, int64_t work, rg_error *e) {
  proof p = {.c = c, .m = c->m, .work = work};
  p.order = sorted(c, larger);
  p.by_rate = sorted(c, frees_cheaper);
  p.open = rgi_alloc_n(c->m->arena, (size_t)c->m->ncandidate + 1, sizeof *p.open);
  p.set = rgi_model_set(c->m);
  p.used = rgi_model_set(c->m);
  if (!p.order || !p.by_rate || !p.open || !p.set || !p.used) return rgi_nomem(e);
  for (int i = 0; i < c->nfree; i++) p.open[c->free[i]] = true;
  memcpy(p.set, c->always, (size_t)c->m->words * sizeof *p.set);
  rgi_replay_run(c->m->replay, p.set, p.used);
  const double forced = rgi_model_ms(c->m, p.used); /* more of it is used the more is chosen */
  p.best = c->best_ms * (1 - 1e-9);
  RGI_TRY(look(&p, 0, forced, e));
  if (p.work > 0) c->bound_ms = c->best_ms;
  return RG_OK;
}
