/* recompute/choose.c: what the policy asks for, and under a budget the cheapest choice that meets
   it.

   Up to RGI_EXACT_LIMIT candidates all choices are looked at (exact.c), above that many (many.c).
   Either way the least budget that can be met is the same number whoever asks, and whatever budget:
   one byte less is refused, and the refusal names it.
 */
#include "search.h"
#include <string.h>

rg_status rgi_chooser_init(rgi_chooser *c, rgi_model *m, rg_error *e) {
  *c = (rgi_chooser){.m = m};
  c->free = rgi_alloc_n(m->arena, (size_t)m->ncandidate + 1, sizeof *c->free);
  c->always = rgi_model_set(m);
  c->best = rgi_model_set(m);
  if (!c->free || !c->always || !c->best) return rgi_nomem(e);
  for (int i = 0; i < m->ncandidate; i++) c->free[c->nfree++] = i;
  return RG_OK;
}

rg_status rgi_chooser_by(rgi_chooser *c, rgi_model *m, const rg_policy *policy, rg_error *e) {
  RGI_TRY(rgi_chooser_init(c, m, e));
  c->budget = policy->budget;
  c->budget_at = policy->budget_at;
  c->of_saved = policy->budget_of_saved;
  c->nfree = 0;
  for (int i = 0; i < m->ncandidate; i++) {
    const rgi_action action = rgi_policy_action(policy, m->g->origin[m->origin[i]].name);
    if (action == RGI_AUTO) c->free[c->nfree++] = i;
    if (action == RGI_RECOMPUTE) rgi_put(c->always, i);
  }
  return RG_OK;
}

/* Goes on from the choice that the hint knows, if that fits. */
static rg_status go_on(rgi_chooser *c, const rgi_start *hint, uint64_t *set, rg_error *e) {
  bool yes;
  memcpy(set, c->always, (size_t)c->m->words * sizeof *set);
  for (int i = 0; i < c->nfree; i++)
    if (hint->start[c->m->origin[c->free[i]]]) rgi_put(set, c->free[i]);
  RGI_TRY(rgi_chooser_fits(c, set, &yes, e));
  return yes ? rgi_choose_many(c, set, e) : RG_OK;
}

/* The choice for a budget, or (least) for the least budget that can be met. */
static rg_status choose(rgi_chooser *c, bool least, rgi_start *hint, rg_error *e) {
  const bool exact = c->nfree <= RGI_EXACT_LIMIT;
  int64_t reachable = 0;
  uint64_t *set = rgi_model_set(c->m);
  if (!set) return rgi_nomem(e);
  c->brief = hint && hint->brief;
  if (hint && hint->start && !least && !exact) RGI_TRY(go_on(c, hint, set, e));
  if (c->found) return RG_OK;
  if (!least && !exact) RGI_TRY(rgi_choose_many(c, NULL, e));
  if (c->found) return RG_OK;
  const bool given_up = hint && hint->start && hint->brief && !exact; /* others will do */
  if (least || (!exact && !given_up)) {
    RGI_TRY((exact ? rgi_least_exact : rgi_least_many)(c, set, &reachable, e));
    if (least) c->budget = reachable;
  }
  if (reachable <= c->budget && !given_up)
    RGI_TRY(exact ? rgi_choose_exact(c, e) : rgi_choose_many(c, set, e));
  if (c->found) return RG_OK;
  if (exact) RGI_TRY(rgi_least_exact(c, set, &reachable, e));
  if (hint) hint->least = reachable;
  char asked[32], bytes[32];
  return rgi_fail(
      e, RG_E_INFEASIBLE, c->budget_at, NULL,
      "no choice of recomputed nodes%s fits %s of %s memory; the least %s is %s (%lld bytes)",
      exact ? "" : " that was found", rg_human_bytes(c->budget, asked),
      c->of_saved ? "saved" : "peak", exact ? "any reaches" : "that any reaches",
      rg_human_bytes(reachable, bytes), (long long)reachable);
}

/* ---- the pass ---- */

bool rgi_offloaded(const rgi_graph *g, const rg_policy *policy, bool *chosen) {
  bool any = false;
  for (int o = 0; o < g->norigin; o++) {
    chosen[o] = policy && rgi_recomputable(&g->origin[o]) &&
                rgi_policy_action(policy, g->origin[o].name) == RGI_OFFLOAD;
    any |= chosen[o];
  }
  return any;
}

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
    c->least = policy->least;
  }
  c->all_ms = m->all_ms;
  for (int o = 0; o < g->norigin; o++) {
    c->node[o].name = rgi_strdup(a, g->origin[o].name);
    c->node[o].op = g->origin[o].op->name;
    c->node[o].recomputable = rgi_recomputable(&g->origin[o]);
    c->node[o].offloaded = policy && c->node[o].recomputable &&
                           rgi_policy_action(policy, g->origin[o].name) == RGI_OFFLOAD;
    c->node[o].why = c->node[o].offloaded      ? "offloaded by the policy"
                     : c->node[o].recomputable ? "backward reads nothing of it"
                                               : "not recomputable";
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

static const char *reason(const rgi_choice *c, rgi_action action, bool recomputed) {
  if (action == RGI_KEEP) return "kept by the policy";
  if (action == RGI_OFFLOAD) return "offloaded by the policy";
  if (action == RGI_RECOMPUTE) return "named by the policy";
  switch (c->preset) {
  case RGI_PRESET_ALL: return "the policy recomputes all it can";
  case RGI_PRESET_LIST: return recomputed ? "named by the policy" : "not named by the policy";
  case RGI_PRESET_BUDGET:
    return recomputed ? "cheapest way to meet the budget" : "the budget holds without it";
  default: return "the policy keeps everything";
  }
}

static void mark(rgi_choice *c, const rgi_model *m, const rg_policy *policy, const bool *chosen) {
  for (int i = 0; i < m->ncandidate; i++) {
    rgi_choice_node *n = &c->node[m->origin[i]];
    n->recomputed = chosen[m->origin[i]];
    c->named += policy && rgi_policy_action(policy, n->name) != RGI_AUTO;
    n->why = reason(c, policy ? rgi_policy_action(policy, n->name) : RGI_AUTO, n->recomputed);
  }
}

static rg_status decide(const rgi_graph *g, rgi_model *m, const rg_policy *policy,
                        rgi_progress progress, rgi_start *hint, rgi_choice *report, bool *chosen,
                        rg_error *e) {
  const rgi_preset preset = policy ? policy->preset : RGI_PRESET_NONE;
  for (int o = 0; o < g->norigin && policy; o++) {
    const char *name = g->origin[o].name;
    const rgi_action action = rgi_policy_action(policy, name);
    const bool listed =
        preset == RGI_PRESET_ALL || (preset == RGI_PRESET_LIST && rgi_policy_lists(policy, name));
    chosen[o] = rgi_recomputable(&g->origin[o]) &&
                (action == RGI_RECOMPUTE || (action == RGI_AUTO && listed));
  }
  if (preset == RGI_PRESET_BUDGET) {
    rgi_chooser c;
    RGI_TRY(rgi_chooser_by(&c, m, policy, e));
    c.progress = progress;
    RGI_TRY(choose(&c, policy->least, hint, e));
    for (int i = 0; i < m->ncandidate; i++)
      if (rgi_has(c.best, i)) chosen[m->origin[i]] = true;
    report->budget = c.budget;
    report->explored = c.explored;
    report->optimal = c.optimal;
    report->bound_ms = c.bound_ms;
    if (!c.optimal) report->gap = (c.best_ms - c.bound_ms) / c.m->all_ms;
  }
  return RG_OK;
}

/* Saved bytes and the peak's lower bound. */
static rg_status bytes_of(const rgi_graph *g, const rgi_memory_options *mem, int64_t *saved,
                          int64_t *peak, rg_error *e) {
  int64_t forward, backward;
  RGI_TRY(rgi_memory_peak(g, mem, true, saved, &forward, &backward, e));
  *peak = *saved + mem->comm + (forward > backward ? forward : backward);
  return RG_OK;
}

rg_status rgi_choice_peak(const rgi_choice *c, const rgi_graph *g, const rgi_profile *profile,
                          const rgi_memory_options *mem, int64_t *peak, rg_error *e) {
  bool *chosen = rgi_malloc(g->ctx, (size_t)g->norigin + 1);
  if (!chosen) return rgi_nomem(e);
  memset(chosen, 0, (size_t)g->norigin + 1);
  for (int o = 0; o < g->norigin && o < c->nnode; o++) chosen[o] = c->node[o].recomputed;
  rgi_graph *next;
  int64_t saved;
  rg_status status = rgi_rewrite(g, chosen, profile, &next, NULL, e);
  rgi_free(g->ctx, chosen);
  RGI_TRY(status);
  status = bytes_of(next, mem, &saved, peak, e);
  rgi_graph_destroy(next);
  return status;
}

rg_status rgi_recompute(const rgi_graph *g, const rg_policy *policy, const rgi_profile *profile,
                        const rgi_memory_options *mem, rgi_progress progress, rgi_graph **out,
                        rgi_choice **report, rg_error *e) {
  return rgi_recompute_by(g, policy, profile, mem, progress, NULL, out, report, e);
}

rg_status rgi_recompute_by(const rgi_graph *g, const rg_policy *policy, const rgi_profile *profile,
                           const rgi_memory_options *mem, rgi_progress progress, rgi_start *hint,
                           rgi_graph **out, rgi_choice **report, rg_error *e) {
  *out = NULL;
  if (report) *report = NULL;
  rgi_model *m;
  rgi_choice *c = NULL;
  rgi_graph *next = NULL, *none = NULL;
  RGI_TRY(rgi_model_create(g, profile, mem, &m, e));
  rg_status status;
  RGI_GOTO(status, new_report(g, m, policy, &c, e), done);
  bool *chosen = rgi_alloc_n(m->arena, (size_t)g->norigin + 1, sizeof *chosen);
  if (!chosen) {
    status = rgi_nomem(e);
    goto done;
  }
  RGI_GOTO(status, decide(g, m, policy, progress, hint, c, chosen, e), done);
  RGI_GOTO(status, rgi_rewrite(g, chosen, profile, &next, &c->extra_ms, e), done);
  RGI_GOTO(status, rgi_verify(next, "recompute", e), done);
  mark(c, m, policy, chosen);
  if (c->optimal) c->bound_ms = c->extra_ms;
  memset(chosen, 0, (size_t)g->norigin * sizeof *chosen);
  RGI_GOTO(status, rgi_rewrite(g, chosen, profile, &none, NULL, e), done);
  RGI_GOTO(status, bytes_of(none, mem, &c->saved_before, &c->peak_before, e), done);
  RGI_GOTO(status, bytes_of(next, mem, &c->saved_after, &c->peak_after, e), done);
  *out = next;
  next = NULL;
  if (report) {
    *report = c;
    c = NULL;
  }
done:
  rgi_graph_destroy(none);
  rgi_graph_destroy(next);
  rgi_choice_destroy(c);
  rgi_model_destroy(m);
  return status;
}

void rgi_choice_destroy(rgi_choice *c) {
  if (c) rgi_arena_destroy(c->arena);
}
