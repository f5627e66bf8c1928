/* recompute/pareto.c: the front of (peak bytes, extra milliseconds) over all choices.

   Choices are visited in order of time, but for what is waited for copies; one that packs below the
   lowest peak so far of what takes no longer may be on the front. Exact up to RGI_EXACT_LIMIT
   candidates. Above that, and where the host's memory may be had, the points are the choices for a
   row of budgets, and the output says how far above the front they may lie.
 */
#include "search.h"
#include <stdlib.h>
#include <string.h>

enum { BUDGETS = 20 };

static rg_status add_point(const rg_context *ctx, rgi_front *f, rgi_point_of_front p, rg_error *e) {
  if (f->count == f->capacity) {
    int larger = f->capacity ? 2 * f->capacity : 16;
    rgi_point_of_front *at = rgi_malloc(ctx, (size_t)larger * sizeof *at);
    if (!at) return rgi_nomem(e);
    if (f->count) memcpy(at, f->at, (size_t)f->count * sizeof *at);
    rgi_free(ctx, f->at);
    f->at = at;
    f->capacity = larger;
  }
  f->at[f->count++] = p;
  return RG_OK;
}

/* The lowest peak so far of what takes no longer. */
static int64_t lowest(const rgi_front *f, double ms) {
  int64_t best = INT64_MAX;
  for (int i = 0; i < f->count; i++)
    if (f->at[i].ms <= ms && f->at[i].peak < best) best = f->at[i].peak;
  return best;
}

static rg_status consider(rgi_model *m, rgi_front *f, const uint64_t *set, int64_t best,
                          rg_error *e) {
  rgi_point_of_front p = {0};
  RGI_TRY(rgi_model_measure(m, set, best - 1, false, &p.saved, &p.peak, &p.ms, e));
  f->explored++;
  if (p.peak >= best) return RG_OK;
  uint64_t *copy = rgi_model_set(m);
  if (!copy) return rgi_nomem(e);
  memcpy(copy, set, (size_t)m->words * sizeof *copy);
  p.set = copy;
  return add_point(m->g->ctx, f, p, e);
}

static int dearer(const void *x, const void *y) {
  const rgi_point_of_front *a = x, *b = y;
  if (a->ms != b->ms) return a->ms < b->ms ? -1 : 1;
  return (a->peak > b->peak) - (a->peak < b->peak);
}

static void leave_best(rgi_front *f) {
  int kept = 0;
  qsort(f->at, (size_t)f->count, sizeof *f->at, dearer);
  for (int i = 0; i < f->count; i++)
    if (kept == 0 || f->at[i].peak < f->at[kept - 1].peak) f->at[kept++] = f->at[i];
  f->count = kept;
}

static rg_status walk_all(rgi_model *m, rgi_progress progress, rgi_front *f, rg_error *e) {
  rgi_subsets *s = rgi_subsets_create(m->g->ctx, m->ms, m->ncandidate);
  if (!s) return rgi_nomem(e);
  rg_status status = RG_OK;
  uint64_t set, needed;
  double cost, total = (double)(UINT64_C(1) << m->ncandidate);
  bool failed = false;
  for (int64_t seen = 0; rgi_subsets_next(s, &set, &cost, &failed); seen++) {
    if (progress.fn && (seen & 255) == 0) progress.fn(progress.user, "pareto", (double)seen, total);
    rgi_taken x = rgi_replay_run(m->replay, &set, &needed);
    const int64_t best = lowest(f, cost + x.wait_ms);
    if (needed != set || x.peak >= best) continue;
    RGI_GOTO(status, consider(m, f, &set, best, e), done);
  }
  if (failed) status = rgi_nomem(e);
  leave_best(f);
done:
  rgi_subsets_destroy(s);
  return status;
}

/* The choices for budgets from what everything kept takes down to the least. */
static rg_status walk_budgets(rgi_model *m, rgi_progress progress, rgi_front *f, rg_error *e) {
  rgi_chooser c;
  int64_t least, most, saved;
  double ms;
  uint64_t *set = rgi_model_set(m), *none = rgi_model_set(m);
  if (!set || !none) return rgi_nomem(e);
  RGI_TRY(rgi_chooser_init(&c, m, e));
  RGI_TRY(rgi_least_many(&c, set, &least, e));
  RGI_TRY(rgi_model_measure(m, none, INT64_MAX, false, &saved, &most, &ms, e));
  f->explored = c.explored + 1;
  const rgi_point_of_front all = {.set = none, .saved = saved, .peak = most, .ms = ms};
  RGI_TRY(add_point(m->g->ctx, f, all, e));
  for (int i = 1; i <= BUDGETS && least < most; i++) {
    if (progress.fn) progress.fn(progress.user, "pareto", i - 1, BUDGETS);
    RGI_TRY(rgi_chooser_init(&c, m, e));
    c.budget = most - (most - least) / BUDGETS * i;
    if (i == BUDGETS) c.budget = least;
    if (c.budget >= f->at[f->count - 1].peak) continue; /* the point before is within it, too */
    RGI_TRY(rgi_choose_many(&c, set, e));
    rgi_point_of_front p = {.set = c.best};
    RGI_TRY(rgi_model_measure(m, c.best, INT64_MAX, false, &p.saved, &p.peak, &p.ms, e));
    f->explored += c.explored + 1;
    if (p.ms - c.bound_ms > f->gap_ms) f->gap_ms = p.ms - c.bound_ms;
    RGI_TRY(add_point(m->g->ctx, f, p, e));
  }
  leave_best(f);
  return RG_OK;
}

/* ---- with the host's memory ---- */

static int64_t host_bytes(const rgi_graph *g) {
  int64_t end = 0;
  for (int t = 0; t < g->ntensor; t++)
    if (g->tensor[t].host) end = rgi_aligned(end) + rgi_bytes(&g->tensor[t]);
  return end;
}

/* The choice for a budget, of both kinds; the budget becomes the least where the policy says so. */
static rg_status add_of_both(rgi_model *m, rg_policy *policy, rgi_progress progress, rgi_front *f,
                             rg_error *e) {
  rgi_point_of_front p = {0};
  rgi_graph *g = NULL;
  rgi_choice *c = NULL;
  int64_t forward = 0, backward = 0;
  double ms[2];
  const int n = m->g->norigin;
  bool *away = rgi_malloc(m->g->ctx, (size_t)n + 1);
  uint64_t *set = rgi_model_set(m), *gone = rgi_model_set(m);
  if (!away || !set || !gone) {
    rgi_free(m->g->ctx, away);
    return rgi_nomem(e);
  }
  rgi_offloaded(m->g, policy, away);
  rg_status status =
      rgi_recompute_offload(m->g, policy, m->profile, &m->mem, progress, away, ms, &g, &c, e);
  if (status == RG_OK)
    status = rgi_memory_peak(g, &m->mem, false, &p.saved, &forward, &backward, e);
  if (status == RG_OK) {
    for (int i = 0; i < m->ncandidate; i++) {
      if (c->node[m->origin[i]].recomputed) rgi_put(set, i);
      if (away[m->origin[i]]) rgi_put(gone, i);
    }
    p.set = set, p.away = gone, p.host = host_bytes(g);
    p.peak = p.saved + m->mem.comm + (forward > backward ? forward : backward);
    p.ms = c->extra_ms + ms[0] + ms[1];
    policy->budget = c->budget;
    f->explored += c->explored;
    if (!c->optimal && p.ms - c->bound_ms > f->gap_ms) f->gap_ms = p.ms - c->bound_ms;
    status = add_point(m->g->ctx, f, p, e);
  }
  rgi_graph_destroy(g);
  rgi_choice_destroy(c);
  rgi_free(m->g->ctx, away);
  return status;
}

static rg_status walk_both(rgi_model *m, const rg_policy *host, rgi_progress progress, rgi_front *f,
                           rg_error *e) {
  rg_policy policy = *host;
  int64_t saved, most;
  double ms;
  uint64_t *none = rgi_model_set(m);
  if (!none) return rgi_nomem(e);
  policy.budget_of_saved = false;
  RGI_TRY(rgi_model_measure(m, none, INT64_MAX, false, &saved, &most, &ms, e));
  policy.least = true;
  RGI_TRY(add_of_both(m, &policy, progress, f, e));
  const int64_t least = policy.budget;
  policy.least = false;
  for (int i = 0; i < BUDGETS && least < most; i++) {
    if (progress.fn) progress.fn(progress.user, "pareto", i, BUDGETS);
    policy.budget = most - (most - least) / BUDGETS * i;
    if (i > 0 && policy.budget >= f->at[f->count - 1].peak) continue;
    RGI_TRY(add_of_both(m, &policy, progress, f, e));
  }
  leave_best(f);
  return RG_OK;
}

rg_status rgi_pareto(const rgi_graph *g, const rg_policy *host, const rgi_profile *profile,
                     const rgi_memory_options *mem, rgi_progress progress, const char *format,
                     rgi_buf *out, rg_error *e) {
  rgi_model *m;
  rgi_front f = {.offloads = host != NULL};
  void (*write)(const rgi_model *, const rgi_front *, rgi_buf *) =
      strcmp(format, "json") == 0   ? rgi_front_json
      : strcmp(format, "svg") == 0  ? rgi_front_svg
      : strcmp(format, "text") == 0 ? rgi_front_text
                                    : NULL;
  if (!write)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "unknown format \"%s\"; expected text, json or svg",
                    format);
  RGI_TRY(rgi_model_create(g, profile, mem, &m, e));
  f.exact = !host && m->ncandidate <= RGI_EXACT_LIMIT;
  rg_status status = host      ? walk_both(m, host, progress, &f, e)
                     : f.exact ? walk_all(m, progress, &f, e)
                               : walk_budgets(m, progress, &f, e);
  if (status == RG_OK) write(m, &f, out);
  rgi_free(g->ctx, f.at);
  rgi_model_destroy(m);
  return status;
}
