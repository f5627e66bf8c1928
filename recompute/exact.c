/* recompute/exact.c: budgets for up to RGI_EXACT_LIMIT candidates, by going through all choices.

   For the least time, choices are visited in order of model time; those that the replay rules out
   are skipped, and the first that memplan packs within the budget is the answer: nothing cheaper
   exists. For the least memory they are visited in order of the replay's bytes, until none left can
   beat the best packed.
 */
#include "search.h"
#include <stdlib.h>

/* always, and of the free candidates those in mask. */
static void expand(const rgi_chooser *c, uint64_t mask, uint64_t *set) {
  memcpy(set, c->always, (size_t)c->m->words * sizeof *set);
  for (int i = 0; i < c->nfree; i++)
    if (mask >> i & 1) rgi_put(set, c->free[i]);
}

/* Is every free candidate of the set read by something? If not, a cheaper set does the same. */
static bool needed(const rgi_chooser *c, const uint64_t *set, const uint64_t *used) {
  for (int i = 0; i < c->nfree; i++)
    if (rgi_has(set, c->free[i]) && !rgi_has(used, c->free[i])) return false;
  return true;
}

rg_status rgi_choose_exact(rgi_chooser *c, rg_error *e) {
  rgi_model *m = c->m;
  double ms[RGI_EXACT_LIMIT];
  for (int i = 0; i < c->nfree; i++) ms[i] = m->ms[c->free[i]];
  uint64_t *set = rgi_model_set(m), *used = rgi_model_set(m), mask;
  rgi_subsets *s = rgi_subsets_create(m->g->ctx, ms, c->nfree);
  if (!s || !set || !used) {
    rgi_subsets_destroy(s);
    return rgi_nomem(e);
  }
  rg_status status = RG_OK;
  double cost, total = (double)(UINT64_C(1) << c->nfree);
  bool failed = false;
  for (int64_t seen = 0; rgi_subsets_next(s, &mask, &cost, &failed); seen++) {
    if (c->progress.fn && (seen & 1023) == 0)
      c->progress.fn(c->progress.user, "recompute", (double)seen, total);
    if (c->found && cost >= c->best_ms) break; /* what is always chosen can only add to it */
    expand(c, mask, set);
    rgi_taken x = rgi_replay_run(m->replay, set, used);
    if (rgi_figure(c, x) > c->budget || !needed(c, set, used)) continue;
    double takes = rgi_model_ms(m, used) + x.wait_ms;
    if (c->found && takes >= c->best_ms) continue;
    bool yes;
    RGI_GOTO(status, rgi_chooser_fits(c, set, &yes, e), done);
    if (!yes) continue;
    memcpy(c->best, set, (size_t)m->words * sizeof *set);
    c->found = c->optimal = true;
    c->best_ms = c->bound_ms = takes;
  }
  if (failed) status = rgi_nomem(e);
done:
  rgi_subsets_destroy(s);
  return status;
}

typedef struct figure {
  int64_t bytes;
  uint64_t mask;
} figure;

static int compare(const void *x, const void *y) {
  const figure *a = x, *b = y;
  if (a->bytes != b->bytes) return a->bytes < b->bytes ? -1 : 1;
  return (a->mask > b->mask) - (a->mask < b->mask);
}

rg_status rgi_least_exact(rgi_chooser *c, uint64_t *best, int64_t *least, rg_error *e) {
  rgi_model *m = c->m;
  const uint64_t all = UINT64_C(1) << c->nfree;
  size_t n = 0;
  figure *f = rgi_malloc(m->g->ctx, (size_t)all * sizeof *f);
  uint64_t *set = rgi_model_set(m), *used = rgi_model_set(m);
  rg_status status = f && set && used ? RG_OK : rgi_nomem(e);
  *least = INT64_MAX;
  for (uint64_t mask = 0; mask < all && status == RG_OK; mask++) {
    if (c->progress.fn && (mask & 1023) == 0)
      c->progress.fn(c->progress.user, "least", (double)mask, (double)all);
    expand(c, mask, set);
    rgi_taken x = rgi_replay_run(m->replay, set, used);
    if (needed(c, set, used)) f[n++] = (figure){rgi_figure(c, x), mask};
  }
  if (status == RG_OK) qsort(f, n, sizeof *f, compare);
  for (size_t i = 0; i < n && status == RG_OK && f[i].bytes < *least; i++) {
    int64_t saved, peak;
    double ms;
    expand(c, f[i].mask, set);
    status = rgi_model_measure(m, set, c->of_saved ? -1 : *least - 1, false, &saved, &peak, &ms, e);
    c->explored++;
    if (status != RG_OK || (c->of_saved ? saved : peak) >= *least) continue;
    *least = c->of_saved ? saved : peak;
    memcpy(best, set, (size_t)m->words * sizeof *best);
  }
  rgi_free(m->g->ctx, f);
  return status;
}
