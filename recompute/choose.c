/* recompute/choose.c: what the policy asks for, and under a budget the cheapest choice that meets
   it.

   Up to RGI_EXACT_LIMIT candidates the search is exact: choices are visited in order of model time,
   those that the model's bound rules out are skipped, and the first that memplan packs within the
   budget is the answer; nothing cheaper exists. Above that: candidates are added by memory freed
   per millisecond until the budget holds, then the costliest are dropped where it still holds; a
   fractional knapsack over freed bytes bounds the optimum from below, and the gap is reported.
 */
#include "search.h"
#include <string.h>

typedef struct chooser {
  const rgi_model *m;
  int64_t budget;
  bool of_saved;
  rgi_progress progress;
  rgi_choice *report;
  uint64_t *best; /* set */
  bool found;
  int64_t least; /* lowest figure seen, for the message when nothing fits */
} chooser;

static void tell(const chooser *c, double done, double total) {
  if (c->progress.fn) c->progress.fn(c->progress.user, "recompute", done, total);
}

/* Memplan's verdict on a set. */
static rg_status fits(chooser *c, const uint64_t *set, bool *yes, rg_error *e) {
  int64_t saved, peak;
  double ms;
  RGI_TRY(rgi_model_measure(c->m, set, c->of_saved ? -1 : c->budget, &saved, &peak, &ms, e));
  int64_t figure = c->of_saved ? saved : peak;
  c->report->explored++;
  *yes = figure <= c->budget;
  if (figure < c->least) c->least = figure;
  return RG_OK;
}

/* What the model says a set takes at least. */
static int64_t bound_of(const chooser *c, const uint64_t *set) {
  return c->of_saved ? rgi_model_saved(c->m, set) : rgi_model_peak_bound(c->m, set);
}

static rg_status exact(chooser *c, rg_error *e) {
  const rgi_model *m = c->m;
  rgi_subsets *s = rgi_subsets_create(m->g->ctx, m->ms, m->ncandidate);
  if (!s) return rgi_nomem(e);
  rg_status status = RG_OK;
  uint64_t set, needed;
  double cost, total = (double)(UINT64_C(1) << m->ncandidate);
  bool failed = false;
  for (int64_t seen = 0; rgi_subsets_next(s, &set, &cost, &failed); seen++) {
    if ((seen & 1023) == 0) tell(c, (double)seen, total);
    if (!rgi_model_needed(m, &set, &needed)) continue; /* a cheaper set does the same */
    int64_t bound = bound_of(c, &set);
    if (bound > c->budget) {
      if (bound < c->least) c->least = bound;
      continue;
    }
    bool yes;
    RGI_GOTO(status, fits(c, &set, &yes, e), done);
    if (!yes) continue;
    c->best[0] = set;
    c->found = true;
    c->report->optimal = true;
    c->report->bound_ms = cost;
    break;
  }
  if (failed) status = rgi_nomem(e);
done:
  rgi_subsets_destroy(s);
  return status;
}

static double set_ms(const rgi_model *m, const uint64_t *set) {
  double ms = 0;
  for (int i = 0; i < m->ncandidate; i++)
    if (rgi_has(set, i)) ms += m->ms[i];
  return ms;
}

/* Least time in which candidates, taken in `order`, could free `bytes` of saved
 * memory if parts could be chosen. */
static double knapsack_bound(const rgi_model *m, const int *order, int64_t bytes) {
  double ms = 0;
  for (int i = 0; i < m->ncandidate && bytes > 0; i++) {
    int64_t freed = m->kept_bytes[order[i]];
    if (freed == 0) break;
    ms += m->ms[order[i]] * (freed > bytes ? (double)bytes / (double)freed : 1);
    bytes -= freed;
  }
  return ms;
}

enum { MOST_DROPS = 64, MOST_TRIED = 256 };
static const double LEAST_MS = 1e-9; /* a rate by time needs some, and a candidate may take none */

/* The candidate to add next: the one that lowers the bound most per millisecond, or (too many to
 * try) the next by memory freed. */
static int next_candidate(const chooser *c, uint64_t *set, const int *order) {
  const rgi_model *m = c->m;
  int best = -1;
  double best_rate = 0;
  int64_t now = bound_of(c, set);
  for (int k = 0; k < m->ncandidate; k++) {
    int i = order[k];
    if (rgi_has(set, i)) continue;
    if (m->ncandidate > MOST_TRIED) return i;
    rgi_put(set, i);
    double rate = (double)(now - bound_of(c, set)) / (m->ms[i] + LEAST_MS);
    rgi_drop(set, i);
    if (best < 0 || rate > best_rate) best = i, best_rate = rate;
  }
  return best;
}

static rg_status bounded(chooser *c, rg_error *e) {
  const rgi_model *m = c->m;
  int *order = rgi_alloc_n(m->arena, (size_t)m->ncandidate, sizeof *order);
  uint64_t *set = rgi_model_set(m);
  bool *tried = rgi_alloc_n(m->arena, (size_t)m->ncandidate, sizeof *tried), yes = false;
  if (!order || !set || !tried) return rgi_nomem(e);
  rgi_model_order(m, order);
  int next = 0; /* how many must be taken before the next trial */
  for (int taken = 0;; taken++) {
    if ((taken >= next && bound_of(c, set) <= c->budget) || taken == m->ncandidate) {
      RGI_TRY(fits(c, set, &yes, e));
      next = taken + rgi_model_stride(m);
    }
    if (yes || taken == m->ncandidate) break;
    rgi_put(set, next_candidate(c, set, order));
    tell(c, taken, m->ncandidate);
  }
  if (!yes) return RG_OK;
  for (int drop = 0; drop < MOST_DROPS; drop++) { /* the costliest first */
    int costliest = -1;
    for (int i = 0; i < m->ncandidate; i++)
      if (rgi_has(set, i) && !tried[i] && (costliest < 0 || m->ms[i] > m->ms[costliest]))
        costliest = i;
    if (costliest < 0) break;
    tried[costliest] = true;
    rgi_drop(set, costliest);
    bool still = false;
    if (bound_of(c, set) <= c->budget) RGI_TRY(fits(c, set, &still, e));
    if (!still) rgi_put(set, costliest);
  }
  rgi_model_needed(m, set, c->best);
  c->found = true;
  uint64_t *none = rgi_model_set(m);
  if (!none) return rgi_nomem(e);
  c->report->bound_ms = knapsack_bound(m, order, rgi_model_saved(m, none) - c->budget);
  c->report->optimal = set_ms(m, c->best) <= c->report->bound_ms;
  return RG_OK;
}

static rg_status choose(chooser *c, rg_error *e) {
  c->least = INT64_MAX;
  c->best = rgi_model_set(c->m);
  if (!c->best) return rgi_nomem(e);
  RGI_TRY(c->m->ncandidate <= RGI_EXACT_LIMIT ? exact(c, e) : bounded(c, e));
  if (c->found) return RG_OK;
  char asked[32], least[32];
  return rgi_fail(e, RG_E_INFEASIBLE, "/budget/bytes", NULL,
                  "%s fits %s of %s memory; the least any reaches is %s (%lld bytes)",
                  c->m->ncandidate <= RGI_EXACT_LIMIT
                      ? "no choice of recomputed nodes"
                      : "no choice of recomputed nodes that the bounded search tried",
                  rgi_human_bytes(c->budget, asked), c->of_saved ? "saved" : "peak",
                  rgi_human_bytes(c->least, least), (long long)c->least);
}

/* ---- the pass ---- */

static rg_status new_report(const rgi_graph *g, const rgi_model *m, const rg_policy *policy,
                            rgi_choice **out, rg_error *e) {
  rgi_arena *a = rgi_arena_create(g->ctx);
  rgi_choice *c = a ? rgi_alloc(a, sizeof *c) : NULL;
  if (c) {
    *c = (rgi_choice){.arena = a,
                      .preset = policy ? policy->preset : RGI_PRESET_NONE,
                      .nnode = g->norigin,
                      .optimal = true};
    c->node = rgi_alloc_n(a, (size_t)g->norigin + 1, sizeof *c->node);
  }
  if (!c || !c->node) {
    rgi_arena_destroy(a);
    return rgi_nomem(e);
  }
  if (policy && policy->preset == RGI_PRESET_BUDGET) {
    c->budget = policy->budget;
    c->budget_of_saved = policy->budget_of_saved;
  }
  for (int o = 0; o < g->norigin; o++) {
    c->node[o].name = rgi_strdup(a, g->origin[o].name);
    c->node[o].op = g->origin[o].op->name;
    c->node[o].recomputable = rgi_recomputable(&g->origin[o]);
    c->node[o].why = c->node[o].recomputable ? "backward reads nothing of it" : "not recomputable";
    if (!c->node[o].name) {
      rgi_arena_destroy(a);
      return rgi_nomem(e);
    }
  }
  for (int i = 0; i < m->ncandidate; i++) {
    rgi_choice_node *n = &c->node[m->origin[i]];
    n->candidate = true;
    n->saved_bytes = m->kept_bytes[i];
    n->extra_ms = m->ms[i];
  }
  *out = c;
  return RG_OK;
}

static const char *reason(const rgi_choice *c, bool recomputed) {
  switch (c->preset) {
  case RGI_PRESET_ALL: return "the policy recomputes all it can";
  case RGI_PRESET_LIST: return recomputed ? "named by the policy" : "not named by the policy";
  case RGI_PRESET_BUDGET:
    return recomputed ? "cheapest way to meet the budget" : "the budget holds without it";
  default: return "the policy keeps everything";
  }
}

static void mark(rgi_choice *c, const rgi_model *m, const bool *chosen) {
  for (int i = 0; i < m->ncandidate; i++) {
    rgi_choice_node *n = &c->node[m->origin[i]];
    n->recomputed = chosen[m->origin[i]];
    n->why = reason(c, n->recomputed);
  }
}

static rg_status decide(const rgi_graph *g, const rgi_model *m, const rg_policy *policy,
                        rgi_progress progress, rgi_choice *report, bool *chosen, rg_error *e) {
  rgi_preset preset = policy ? policy->preset : RGI_PRESET_NONE;
  for (int o = 0; o < g->norigin && preset == RGI_PRESET_ALL; o++)
    chosen[o] = rgi_recomputable(&g->origin[o]);
  for (int i = 0; preset == RGI_PRESET_LIST && i < policy->nrecompute; i++)
    for (int o = 0; o < g->norigin; o++)
      if (strcmp(g->origin[o].name, policy->recompute[i]) == 0) chosen[o] = true;
  if (preset == RGI_PRESET_BUDGET) {
    chooser c = {.m = m,
                 .budget = policy->budget,
                 .of_saved = policy->budget_of_saved,
                 .progress = progress,
                 .report = report};
    report->optimal = false;
    RGI_TRY(choose(&c, e));
    for (int i = 0; i < m->ncandidate; i++)
      if (rgi_has(c.best, i)) chosen[m->origin[i]] = true;
    if (!report->optimal) {
      double ms = set_ms(m, c.best);
      report->gap = ms > 0 ? (ms - report->bound_ms) / ms : 0;
    }
  }
  return RG_OK;
}

/* Saved bytes and the peak's lower bound. */
static rg_status bytes_of(const rgi_graph *g, const rgi_memory_options *mem, int64_t *saved,
                          int64_t *peak, rg_error *e) {
  int64_t forward, backward;
  RGI_TRY(rgi_memory_peak(g, mem, true, saved, &forward, &backward, e));
  *peak = *saved + (forward > backward ? forward : backward);
  return RG_OK;
}

rg_status rgi_choice_peak(const rgi_choice *c, const rgi_graph *g, const rgi_memory_options *mem,
                          int64_t *peak, rg_error *e) {
  bool *chosen = rgi_malloc(g->ctx, (size_t)g->norigin + 1);
  if (!chosen) return rgi_nomem(e);
  memset(chosen, 0, (size_t)g->norigin + 1);
  for (int o = 0; o < g->norigin && o < c->nnode; o++) chosen[o] = c->node[o].recomputed;
  rgi_graph *next;
  int64_t saved;
  rg_status status = rgi_rewrite(g, chosen, NULL, &next, NULL, e);
  rgi_free(g->ctx, chosen);
  RGI_TRY(status);
  status = bytes_of(next, mem, &saved, peak, e);
  rgi_graph_destroy(next);
  return status;
}

rg_status rgi_recompute(const rgi_graph *g, const rg_policy *policy, const rgi_profile *profile,
                        const rgi_memory_options *mem, rgi_progress progress, rgi_graph **out,
                        rgi_choice **report, rg_error *e) {
  *out = NULL;
  if (report) *report = NULL;
  rgi_model *m;
  rgi_choice *c = NULL;
  rgi_graph *next = NULL;
  RGI_TRY(rgi_model_create(g, profile, mem, &m, e));
  rg_status status;
  RGI_GOTO(status, new_report(g, m, policy, &c, e), done);
  bool *chosen = rgi_alloc_n(m->arena, (size_t)g->norigin + 1, sizeof *chosen);
  if (!chosen) {
    status = rgi_nomem(e);
    goto done;
  }
  RGI_GOTO(status, decide(g, m, policy, progress, c, chosen, e), done);
  RGI_GOTO(status, rgi_rewrite(g, chosen, profile, &next, &c->extra_ms, e), done);
  RGI_GOTO(status, rgi_verify(next, "recompute", e), done);
  mark(c, m, chosen);
  if (c->optimal) c->bound_ms = c->extra_ms;
  RGI_GOTO(status, bytes_of(g, mem, &c->saved_before, &c->peak_before, e), done);
  RGI_GOTO(status, bytes_of(next, mem, &c->saved_after, &c->peak_after, e), done);
  *out = next;
  next = NULL;
  if (report) {
    *report = c;
    c = NULL;
  }
done:
  rgi_graph_destroy(next);
  rgi_choice_destroy(c);
  rgi_model_destroy(m);
  return status;
}

void rgi_choice_destroy(rgi_choice *c) {
  if (c) rgi_arena_destroy(c->arena);
}
