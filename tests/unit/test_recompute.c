/* tests/unit/test_recompute.c: the chooser against brute force, on the stock
 * examples and on random graphs.
 */
#include "graph/spec.h"
#include "passes/passes.h"
#include "recompute/rows.h"
#include "../harness/random_spec.h"
#include "../harness/round.h"
#include "must.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct bench {
  rg_context *ctx;
  rg_spec *spec;
  rgi_graph *forward, *g;
  rgi_profile *profile;
  rgi_memory_options mem;
} bench;

static bench open_graph(rg_context *ctx, rg_spec *spec, int heads, bool has_b) {
  bench b = {.ctx = ctx, .spec = spec, .mem = {.seconds = 1, .threads = 2}};
  rg_binding set[] = {{"T", 256, NULL}, {"B", 1, NULL}};
  rgi_graph *whole;
  memset(&err, 0, sizeof err);
  must(rgi_spec_elaborate(spec, set, has_b ? 2 : 1, true, &whole, &err), "elaborate");
  must(rgi_split_heads(whole, heads, &b.forward, &err), "split");
  must(rgi_autodiff(b.forward, &b.g, &err), "autodiff");
  must(rgi_profile_load(ctx, NULL, "cpu", &b.profile, &err), "profile");
  rgi_graph_destroy(whole);
  return b;
}

static void close_graph(bench *b) {
  rgi_profile_destroy(b->profile);
  rgi_graph_destroy(b->g);
  rgi_graph_destroy(b->forward);
}

typedef struct outcome {
  int64_t saved, peak;
  double ms;
} outcome;

static outcome measure(const bench *b, const bool *chosen) {
  outcome o;
  rgi_graph *g;
  int64_t forward, backward;
  must(rgi_rewrite(b->g, chosen, b->profile, &g, &o.ms, &err), "rewrite");
  must(rgi_verify(g, "rewrite", &err), "verify");
  must(rgi_memory_peak(g, &b->mem, false, &o.saved, &forward, &backward, &err), "peak");
  o.peak = o.saved + (forward > backward ? forward : backward);
  rgi_graph_destroy(g);
  return o;
}

static int64_t scratch_of(const rgi_model *m, const uint64_t *set) {
  rgi_replay_run(m->replay, set, NULL);
  return rgi_replay_scratch(m->replay);
}

/* The replay says what memplan's lower bound says, without the graph. */
static void compare_replay(const bench *b, int sets, uint64_t *state) {
  rgi_model *m;
  must(rgi_model_create(b->g, b->profile, &b->mem, &m, &err), "model");
  uint64_t *set = rgi_model_set(m), *used = rgi_model_set(m);
  for (int k = 0; k < sets; k++) {
    const int odds = 1 + rgi_draw(state, 5);
    for (int i = 0; i < m->ncandidate; i++) {
      rgi_drop(set, i);
      if (rgi_draw(state, 6) < odds) rgi_put(set, i);
    }
    int64_t saved, peak;
    double ms;
    rgi_taken x = rgi_replay_run(m->replay, set, used);
    must(rgi_model_measure(m, set, -1, false, &saved, &peak, &ms, &err), "measure");
    cr_assert_eq(x.saved, saved, "%s, set %llx: saved %lld, replayed %lld", b->g->name,
                 (unsigned long long)*set, (long long)saved, (long long)x.saved);
    cr_assert(x.peak <= peak && peak - x.peak < RGI_ALIGN, "%s, set %llx: peak %lld, replayed %lld",
              b->g->name, (unsigned long long)*set, (long long)peak, (long long)x.peak);
    cr_assert_float_eq(rgi_model_ms(m, used) + x.wait_ms, ms, 1e-9 * (1 + ms), "%s, set %llx",
                       b->g->name, (unsigned long long)*set);
    if (m->ncandidate == 0) continue;
    const int64_t before = scratch_of(m, set);
    rgi_put(set, rgi_draw(state, m->ncandidate));
    cr_assert_leq(before, scratch_of(m, set), "%s, set %llx: more takes less scratch", b->g->name,
                  (unsigned long long)*set);
  }
  rgi_model_destroy(m);
}

/* Every subset of the recomputable spec nodes. */
static outcome *measure_all(const bench *b, int *count) {
  int free_origin[24], k = 0;
  for (int o = 0; o < b->g->norigin; o++)
    if (rgi_recomputable(&b->g->origin[o])) free_origin[k++] = o;
  cr_assert_leq(k, 16, "too many nodes for brute force");
  outcome *all = malloc(sizeof *all << k);
  for (int mask = 0; mask < 1 << k; mask++) {
    bool chosen[64] = {0};
    for (int i = 0; i < k; i++) chosen[free_origin[i]] = mask >> i & 1;
    all[mask] = measure(b, chosen);
  }
  *count = 1 << k;
  return all;
}

/* The search for many candidates and its bound, on graphs small enough to know the answer (`best`,
 * if any). */
static void compare_many(const bench *b, int64_t budget, bool of_saved, double best) {
  rgi_model *m;
  rgi_chooser c;
  must(rgi_model_create(b->g, b->profile, &b->mem, &m, &err), "model");
  must(rgi_chooser_init(&c, m, &err), "chooser");
  uint64_t *set = rgi_model_set(m);
  int64_t least;
  c.of_saved = of_saved;
  must(rgi_least_many(&c, set, &least, &err), "least");
  cr_assert_eq(least <= budget, !isinf(best), "%s: least %lld, budget %lld", b->g->name,
               (long long)least, (long long)budget);
  if (least <= budget && m->ncandidate > 0) {
    c.budget = budget;
    must(rgi_choose_many(&c, set, &err), "many");
    const double near = c.optimal ? 0 : 0.0005 * m->all_ms; /* there the search rests */
    cr_assert(c.found && c.best_ms - c.bound_ms <= near * (1 + 1e-9));
    cr_assert(c.best_ms >= best - 1e-9 * (1 + best) &&
              c.best_ms <= best + near + 1e-9 * (1 + best));
    c.best_ms = 2 * best + 1; /* as if something much worse had been found */
    rgi_bound *bound;
    must(rgi_bound_open(&c, &bound, &err), "open");
    must(rgi_bound_find(bound, &err), "bound");
    cr_assert_leq(c.bound_ms, best * (1 + 1e-9) + 1e-12, "%s, budget %lld of %s: bound %g, best %g",
                  b->g->name, (long long)budget, of_saved ? "saved" : "peak", c.bound_ms, best);
    for (int64_t work = 2000; work <= 200000000; work *= 100000) { /* cut short, and to the end */
      c.best_ms = 2 * best + 1;
      c.bound_ms = 0;
      must(rgi_prove(&c, bound, work, 0, &err), "prove");
      cr_assert_leq(c.bound_ms, best * (1 + 1e-9) + 1e-12);
      cr_assert(work == 2000 || (fabs(c.best_ms - best) <= 1e-9 * (1 + best) &&
                                 fabs(c.bound_ms - best) <= 1e-9 * (1 + best)),
                "%s, budget %lld of %s: proved %g as the best and %g as the least, it is %g",
                b->g->name, (long long)budget, of_saved ? "saved" : "peak", c.best_ms, c.bound_ms,
                best);
    }
  }
  rgi_model_destroy(m);
}

/* The proof where all nodes take about the same, so that their number says most of it. */
static void compare_flat(const bench *b, int64_t budget, const outcome *all, int n,
                         uint64_t *state) {
  rgi_model *m;
  rgi_chooser c;
  rgi_bound *bound;
  must(rgi_model_create(b->g, b->profile, &b->mem, &m, &err), "model");
  for (int i = 0; i < m->ncandidate; i++) m->ms[i] = 1 + rgi_draw(state, 3) / 100.;
  must(rgi_chooser_init(&c, m, &err), "chooser");
  uint64_t *set = rgi_model_set(m), *used = rgi_model_set(m);
  double best = INFINITY;
  for (int mask = 0; mask < n; mask++) {
    if (all[mask].peak > budget) continue;
    memset(set, 0, (size_t)m->words * sizeof *set);
    for (int o = 0, k = 0; o < b->g->norigin; o++) {
      if (!rgi_recomputable(&b->g->origin[o])) continue;
      if (mask >> k++ & 1 && m->candidate_of[o] >= 0) rgi_put(set, m->candidate_of[o]);
    }
    const rgi_taken x = rgi_replay_run(m->replay, set, used);
    best = fmin(best, rgi_model_ms(m, used) + x.wait_ms);
  }
  c.budget = budget;
  c.best_ms = 2 * best + 1;
  must(rgi_bound_open(&c, &bound, &err), "open");
  for (int64_t work = 2000; work <= 200000000 && !isinf(best); work *= 100000) {
    c.best_ms = 2 * best + 1;
    c.bound_ms = 0;
    must(rgi_prove(&c, bound, work, 0, &err), "prove");
    cr_assert_leq(c.bound_ms, best * (1 + 1e-9) + 1e-12, "%s, budget %lld: bound %g, best %g",
                  b->g->name, (long long)budget, c.bound_ms, best);
    cr_assert(work == 2000 || fabs(c.best_ms - best) <= 1e-9 * (1 + best),
              "%s, budget %lld, times alike: proved %g as the best, it is %g", b->g->name,
              (long long)budget, c.best_ms, best);
  }
  rgi_model_destroy(m);
}

/* Layers, of any width: below every choice that saves as much and needs as much room. */
static void compare_layers(const bench *b, int sets, uint64_t *state) {
  static const int widths[] = {1, 2, 3, 5, 9};
  rgi_model *m;
  rgi_chooser c;
  rgi_bound *bound;
  must(rgi_model_create(b->g, b->profile, &b->mem, &m, &err), "model");
  must(rgi_chooser_init(&c, m, &err), "chooser");
  must(rgi_bound_open(&c, &bound, &err), "open");
  uint64_t *set = rgi_model_set(m), *used = rgi_model_set(m);
  for (int w = 0; w < RGI_COUNT(widths); w++) {
    rgi_layers *layers;
    must(rgi_layers_open(rgi_bound_parts(bound), widths[w], &layers, &err), "layers");
    for (int k = 0; k < sets; k++) {
      const int odds = rgi_draw(state, 7);
      for (int i = 0; i < m->ncandidate; i++) {
        rgi_drop(set, i);
        if (rgi_draw(state, 6) < odds) rgi_put(set, i);
      }
      const rgi_taken x = rgi_replay_run(m->replay, set, used);
      const double room = (double)rgi_replay_scratch(m->replay), takes = rgi_model_ms(m, used);
      const double ms = rgi_layers_ms(layers, room, (double)x.saved, INFINITY);
      cr_assert_leq(ms, takes * (1 + 1e-9) + 1e-12,
                    "%s, blocks of %d, set %llx: %g ms are said to be the least, it takes %g",
                    b->g->name, widths[w], (unsigned long long)*set, ms, takes);
    }
  }
  rgi_model_destroy(m);
}

/* Rows, of any part of a choice, the program as it is after others: below every choice that goes on
 * from there. */
static void compare_rows(const bench *b, int sets, uint64_t *state) {
  enum { PARTS = 4 }; /* of one choice */
  rgi_model *m;
  rgi_chooser c;
  rgi_bound *bound;
  rgi_rows *r;
  must(rgi_model_create(b->g, b->profile, &b->mem, &m, &err), "model");
  must(rgi_chooser_init(&c, m, &err), "chooser");
  must(rgi_bound_open(&c, &bound, &err), "open");
  uint64_t *set = rgi_model_set(m), *used = rgi_model_set(m), *again = rgi_model_set(m),
           *open = rgi_model_set(m);
  double takes = 0;
  for (int k = 0; k < sets; k++) {
    const int odds = rgi_draw(state, 7), decided = rgi_draw(state, 7);
    for (int i = 0; i < m->ncandidate && k % PARTS == 0; i++) {
      rgi_drop(set, i);
      if (rgi_draw(state, 6) < odds) rgi_put(set, i);
    }
    if (k % PARTS == 0) {
      c.budget = rgi_replay_run(m->replay, set, used).peak;
      memcpy(set, used, (size_t)m->words * sizeof *set);
      takes = rgi_model_ms(m, set);
      must(rgi_rows_open(rgi_bound_parts(bound), m->arena, &r, &err), "rows");
    }
    for (int i = 0; i < m->ncandidate; i++) {
      rgi_drop(again, i), rgi_drop(open, i);
      if (rgi_draw(state, 6) >= decided)
        rgi_put(open, i);
      else if (rgi_has(set, i))
        rgi_put(again, i);
    }
    const double most = takes * (1 + 1e-9) + 1e-12,
                 least = rgi_rows_bound(r, again, open, 1 + rgi_draw(state, 50), rgi_draw(state, 9),
                                        2 * takes + 1);
    cr_assert_leq(least, most,
                  "%s, set %llx, %llx decided, %llx open: %.12g ms are said to be the least, it "
                  "takes %.12g",
                  b->g->name, (unsigned long long)*set, (unsigned long long)*again,
                  (unsigned long long)*open, least, takes);
    for (int i = 0; i < m->ncandidate; i++) { /* what one more decision takes at least */
      if (!rgi_has(open, i)) continue;
      if ((r->cost[i] > 0) == rgi_has(set, i))
        cr_assert_leq(r->last + fabs(r->cost[i]), most, "%s, set %llx: candidate %d the other way",
                      b->g->name, (unsigned long long)*set, i);
      cr_assert_leq(rgi_rows_try(r, i, rgi_has(set, i), 2 * takes + 1), most,
                    "%s, set %llx: candidate %d its way", b->g->name, (unsigned long long)*set, i);
    }
  }
  rgi_model_destroy(m);
}

static void compare(const bench *b) {
  int n;
  uint64_t state = 7;
  compare_replay(b, 64, &state);
  compare_layers(b, 64, &state);
  compare_rows(b, 200, &state);
  outcome *all = measure_all(b, &n);
  int64_t low = INT64_MAX, high = 0;
  for (int i = 0; i < n; i++) {
    if (all[i].peak < low) low = all[i].peak;
    if (all[i].peak > high) high = all[i].peak;
  }
  for (int step = -1; step <= 6; step++) {
    for (int of_saved = 0; of_saved < 2; of_saved++) {
      int64_t budget = step < 0 ? low - 1 : low + (high - low) * step / 6;
      double best = INFINITY;
      for (int i = 0; i < n; i++)
        if ((of_saved ? all[i].saved : all[i].peak) <= budget && all[i].ms < best) best = all[i].ms;
      compare_many(b, budget, of_saved, best);
      if (!of_saved && step >= 0 && step < 4) compare_flat(b, budget, all, n, &state);
      rg_policy policy = {.ctx = b->ctx,
                          .source = {.name = ""},
                          .preset = RGI_PRESET_BUDGET,
                          .budget = budget,
                          .budget_of_saved = of_saved};
      rgi_graph *g;
      rgi_choice *choice;
      rg_error e = {0};
      rg_status status =
          rgi_recompute(b->g, &policy, b->profile, &b->mem, (rgi_progress){0}, &g, &choice, &e);
      if (isinf(best)) {
        cr_assert_eq(status, RG_E_INFEASIBLE, "%s: budget %lld", b->g->name, (long long)budget);
        cr_assert_null(g);
        cr_assert_null(choice);
        continue;
      }
      cr_assert_eq(status, RG_OK, "%s: %s", b->g->name, e.message);
      cr_assert(choice->optimal);
      cr_assert_float_eq(choice->extra_ms, best, 1e-9 * (1 + best),
                         "%s, budget %lld of %s: chose %g ms, best is %g ms", b->g->name,
                         (long long)budget, of_saved ? "saved" : "peak", choice->extra_ms, best);
      int64_t saved, f, w;
      must(rgi_memory_peak(g, &b->mem, false, &saved, &f, &w, &err), "peak");
      cr_assert_leq(of_saved ? saved : saved + (f > w ? f : w), budget);
      rgi_graph_destroy(g);
      rgi_choice_destroy(choice);
    }
  }
  /* the front: every point is some subset's, none is beaten, and its ends are
   * the cheapest and the smallest */
  rgi_buf text;
  rgi_buf_init(&text, b->ctx);
  must(rgi_pareto(b->g, NULL, b->profile, &b->mem, (rgi_progress){0}, "json", &text, &err),
       "pareto");
  int points = 0;
  int64_t last_peak = INT64_MAX;
  for (const char *p = text.data; (p = strstr(p, "\"peak_bytes\": ")); points++) {
    long long peak;
    double ms;
    cr_assert_eq(
        sscanf(p, "\"peak_bytes\": %lld, \"saved_bytes\": %*d, \"extra_ms\": %lf", &peak, &ms), 2);
    cr_assert_lt(peak, last_peak);
    last_peak = peak;
    bool exists = false;
    for (int i = 0; i < n; i++) {
      exists = exists || (all[i].peak == peak && fabs(all[i].ms - ms) <= 1e-6 * (1 + ms));
      cr_assert_not(all[i].peak <= peak && all[i].ms < ms - 1e-6 * (1 + ms),
                    "%s: a front point is beaten", b->g->name);
    }
    cr_assert(exists, "%s: a front point that no subset has", b->g->name);
    p++;
  }
  cr_assert_gt(points, 0);
  cr_assert_eq(last_peak, low, "%s: the front ends above the smallest peak", b->g->name);
  rgi_buf_free(&text);
  free(all);
}

static void compare_file(const char *file, const rg_binding *set, size_t nset, int most_heads) {
  char path[512];
  rg_context *ctx;
  rg_spec *spec;
  memset(&err, 0, sizeof err);
  snprintf(path, sizeof path, RG_SOURCE_DIR "/examples/%s", file);
  must(rg_context_create(NULL, &ctx, &err), "context");
  must(rg_spec_load_file(ctx, path, set, nset, &spec, &err), "load");
  for (int heads = 0; heads <= most_heads; heads++) {
    bench b = open_graph(ctx, spec, heads, true);
    compare(&b);
    close_graph(&b);
  }
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

static const rg_binding small[] = {
    {"H", 4, NULL}, {"KH", 2, NULL}, {"D", 16, NULL}, {"DV", 16, NULL}};

Test(recompute, nsa) {
  compare_file("nsa.json", small, 4, 1);
}
Test(recompute, nsa_linear) {
  compare_file("nsa_linear.json", small, 4, 1);
}
Test(recompute, dense_causal) {
  compare_file("dense_causal.json", small, 4, 1);
}
Test(recompute, sliding_window) {
  compare_file("sliding_window.json", small, 4, 1);
}
Test(recompute, nsa_layer) { /* 4,096 choices: where each takes long, not on every run */
  if (in_sample(1, 2)) compare_file("nsa_layer.json", small, 4, 0);
}
Test(recompute, moba) {
  static const rg_binding set[] = {{"H", 4, NULL}, {"D", 16, NULL}};
  compare_file("moba.json", set, 2, 1);
}
Test(recompute, two_branch) {
  compare_file("two_branch.json", small, 4, 1);
}

/* ---- random graphs ---- */

static rg_spec *random_spec(rg_context *ctx, uint64_t *state, int nodes) {
  rg_spec *spec;
  must(rgi_random_spec(ctx, state, nodes, &spec, &err), "load");
  return spec;
}

Test(recompute, random_graphs) {
  rg_context *ctx;
  must(rg_context_create(NULL, &ctx, &err), "context");
  const int most = getenv("REGRAPH_ROUND") ? 16 : 10;
  rgi_rule rule = {"*1", "/nodes/*1", RGI_OFFLOAD};
  const rg_policy offload = {.ctx = ctx, .rule = &rule, .nrule = 1};
  for (int seed = 0; seed < 40; seed++) {
    if (!in_sample(seed, 3)) continue;
    uint64_t state = round_seed((uint64_t)seed + 77, 40);
    rg_spec *spec = random_spec(ctx, &state, 4 + seed % (most - 3));
    bench b = open_graph(ctx, spec, 0, false);
    if (seed % 4 == 3) { /* some of it waits elsewhere; what is left is chosen among all the same */
      rgi_graph *next;
      double ms[2];
      bool chosen[64];
      cr_assert_lt(b.g->norigin, 64);
      if (seed % 8 == 7) { /* … by a GPU's windows */
        rgi_profile_destroy(b.profile);
        must(rgi_profile_load(ctx, "shipped", "cuda", &b.profile, &err), "profile");
        b.profile->host_gbs = 200 + 400 * (double)rgi_draw(&state, 8);
        b.mem.gpu = &b.profile->gpu;
      }
      rgi_offloaded(b.g, &offload, chosen);
      must(rgi_offload(b.g, chosen, b.profile, &next, ms, &err), "offload");
      must(rgi_verify(next, "offload", &err), "verify");
      rgi_graph_destroy(b.g);
      b.g = next;
    }
    compare(&b);
    close_graph(&b);
    rg_spec_destroy(spec);
  }
  rg_context_destroy(ctx);
}

/* Bounds and proofs rest on it: recomputing more takes no scratch from backward's own nodes. Of v
 * and d alone, d's clone stands where backward reads d, at the end, and v's lives until then; with
 * e, which wants d at once, v's is gone soon: v does not count that long. */
Test(recompute, more_takes_no_scratch) {
  static const char text[] =
      "{\"regraph\": 1, \"inputs\": {"
      "\"x\": {\"shape\": [\"T\", 64], \"dtype\": \"f32\", \"grad\": true}, "
      "\"y\": {\"shape\": [\"T\", 64], \"dtype\": \"bf16\"}}, \"nodes\": ["
      "{\"name\": \"v\", \"op\": \"silu\", \"in\": {\"x\": \"x\"}, \"out\": {\"y\": \"v\"}}, "
      "{\"name\": \"d\", \"op\": \"cast\", \"in\": {\"x\": \"v\"}, \"out\": {\"y\": \"d\"}, "
      "\"attrs\": {\"to\": \"bf16\"}}, "
      "{\"name\": \"e\", \"op\": \"silu\", \"in\": {\"x\": \"d\"}, \"out\": {\"y\": \"e\"}}, "
      "{\"name\": \"a\", \"op\": \"silu\", \"in\": {\"x\": \"x\"}, \"out\": {\"y\": \"a\"}}, "
      "{\"name\": \"b\", \"op\": \"mul\", \"in\": {\"a\": \"a\", \"b\": \"a\"}, \"out\": {\"y\": "
      "\"b\"}}, "
      "{\"name\": \"m\", \"op\": \"silu\", \"in\": {\"x\": \"v\"}, \"out\": {\"y\": \"m\"}}, "
      "{\"name\": \"n\", \"op\": \"mul\", \"in\": {\"a\": \"e\", \"b\": \"y\"}, \"out\": {\"y\": "
      "\"n\"}}], \"outputs\": {\"b\": \"b\", \"m\": \"m\", \"n\": \"n\"}}";
  rg_context *ctx;
  rg_spec *spec;
  rgi_model *m;
  memset(&err, 0, sizeof err);
  must(rg_context_create(NULL, &ctx, &err), "context");
  must(rg_spec_load_text(ctx, text, strlen(text), "late", NULL, 0, &spec, &err), "load");
  bench b = open_graph(ctx, spec, 0, false);
  must(rgi_model_create(b.g, b.profile, &b.mem, &m, &err), "model");
  for (uint64_t set = 0; set < UINT64_C(1) << m->ncandidate; set++)
    for (int i = 0; i < m->ncandidate; i++) {
      const uint64_t more = set | UINT64_C(1) << i;
      const int64_t x = scratch_of(m, &set), y = scratch_of(m, &more);
      cr_assert_leq(x, y, "set %llx: %lld bytes, with %s %lld", (unsigned long long)set,
                    (long long)x, b.g->origin[m->origin[i]].name, (long long)y);
    }
  rgi_model_destroy(m);
  close_graph(&b);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

/* Graphs of more nodes than can be gone through: chains of whole blocks. */
Test(recompute, layers_of_large_graphs) {
  rg_context *ctx;
  must(rg_context_create(NULL, &ctx, &err), "context");
  for (int seed = 0; seed < 6; seed++) {
    if (!in_sample(seed, 3)) continue;
    uint64_t state = round_seed((uint64_t)seed + 990, 6);
    rg_spec *spec = random_spec(ctx, &state, 20 + 10 * seed);
    bench b = open_graph(ctx, spec, 0, false);
    compare_layers(&b, 200, &state);
    compare_rows(&b, 400, &state);
    close_graph(&b);
    rg_spec_destroy(spec);
  }
  rg_context_destroy(ctx);
}

/* ---- beyond the exact limit: feasible, with an honest gap ---- */

/* A chain of `nodes` nodes, each of which reads the one before in backward. */
static rg_spec *chain_spec(rg_context *ctx, int nodes) {
  rgi_buf s;
  rgi_buf_init(&s, ctx);
  rgi_buf_printf(
      &s, "{\"regraph\":1,\"name\":\"chain\",\"inputs\":{\"x0\":{\"shape\":[\"T\",16],\"dtype\":"
          "\"f32\",\"grad\":true},"
          "\"w\":{\"shape\":[16,16],\"dtype\":\"f32\",\"grad\":true}},\"nodes\":[");
  for (int i = 1; i <= nodes; i++)
    if (i % 3)
      rgi_buf_printf(
          &s, "{\"name\":\"n%d\",\"op\":\"silu\",\"in\":{\"x\":\"x%d\"},\"out\":{\"y\":\"x%d\"}},",
          i, i - 1, i);
    else
      rgi_buf_printf(&s,
                     "{\"name\":\"n%d\",\"op\":\"linear\",\"in\":{\"x\":\"x%d\",\"w\":\"w\"},"
                     "\"out\":{\"y\":\"x%d\"}},",
                     i, i - 1, i);
  rgi_buf_printf(
      &s,
      "{\"name\":\"last\",\"op\":\"mul\",\"in\":{\"a\":\"x%d\",\"b\":\"x%d\"},\"out\":{\"y\":"
      "\"y\"}}],\"outputs\":{\"y\":\"y\"}}",
      nodes, nodes);
  rg_spec *spec;
  must(rg_spec_load_text(ctx, s.data, s.size, "chain", NULL, 0, &spec, &err), "load");
  rgi_buf_free(&s);
  return spec;
}

static void bounded(int nodes, int percent, bool of_saved) {
  rg_context *ctx;
  must(rg_context_create(NULL, &ctx, &err), "context");
  rg_spec *spec = chain_spec(ctx, nodes);
  bench b = open_graph(ctx, spec, 0, false);
  rgi_model *model;
  must(rgi_model_create(b.g, b.profile, &b.mem, &model, &err), "model");
  cr_assert_gt(model->ncandidate, RGI_EXACT_LIMIT);
  rgi_model_destroy(model);
  bool none[128] = {0};
  outcome most = measure(&b, none);
  int64_t budget = (of_saved ? most.saved : most.peak) * percent / 100;
  rg_policy policy = {.ctx = ctx,
                      .source = {.name = ""},
                      .preset = RGI_PRESET_BUDGET,
                      .budget = budget,
                      .budget_of_saved = of_saved};
  rgi_graph *g;
  rgi_choice *choice;
  rg_error e = {0};
  rg_status status =
      rgi_recompute(b.g, &policy, b.profile, &b.mem, (rgi_progress){0}, &g, &choice, &e);
  if (percent == 0 && !of_saved) { /* saved memory may well be empty, the peak not */
    cr_assert_eq(status, RG_E_INFEASIBLE);
  } else {
    cr_assert_eq(status, RG_OK, "%d nodes, %d %%: %s", nodes, percent, e.message);
    int64_t saved, forward, backward;
    must(rgi_memory_peak(g, &b.mem, false, &saved, &forward, &backward, &err), "peak");
    cr_assert_leq(of_saved ? saved : saved + (forward > backward ? forward : backward), budget);
    cr_assert_leq(choice->bound_ms, choice->extra_ms * (1 + 1e-9));
    cr_assert_float_eq(choice->gap,
                       choice->optimal ? 0 : (choice->extra_ms - choice->bound_ms) / choice->all_ms,
                       1e-9);
    cr_assert(percent < 100 || choice->extra_ms == 0, "nothing need be recomputed");
  }
  rgi_graph_destroy(g);
  rgi_choice_destroy(choice);
  close_graph(&b);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

/* Just beyond: a row of budgets, which is what takes long. */
Test(recompute, front_beyond_the_limit) {
  rg_context *ctx;
  must(rg_context_create(NULL, &ctx, &err), "context");
  rg_spec *spec = chain_spec(ctx, RGI_EXACT_LIMIT + 1);
  bench b = open_graph(ctx, spec, 0, false);
  rgi_buf text;
  rgi_buf_init(&text, ctx);
  must(rgi_pareto(b.g, NULL, b.profile, &b.mem, (rgi_progress){0}, "text", &text, &err), "pareto");
  cr_assert_not_null(strstr(text.data, "not a proved front"));
  rgi_buf_free(&text);
  close_graph(&b);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

Test(recompute, bounded_search) {
  static const int percents[] = {0, 90, 100};
  for (int i = 0; i < 3; i++)
    for (int of_saved = 0; of_saved < 2; of_saved++)
      if (in_sample(2 * i + of_saved, 3)) bounded(i == 1 ? 90 : 30, percents[i], of_saved);
  bounded(30, 60, true);
}

/* ---- subsets come in order, each once ---- */

Test(recompute, subsets_in_order) {
  rg_context *ctx;
  must(rg_context_create(NULL, &ctx, &err), "context");
  double cost[8] = {3, 1, 4, 1, 5, 9, 2, 6};
  rgi_subsets *s = rgi_subsets_create(ctx, cost, 8);
  uint64_t mask;
  double sum, last = -1;
  bool failed, seen[256] = {0};
  int n = 0;
  while (rgi_subsets_next(s, &mask, &sum, &failed)) {
    double real = 0;
    for (int i = 0; i < 8; i++) real += mask >> i & 1 ? cost[i] : 0;
    cr_assert_float_eq(real, sum, 1e-12);
    cr_assert_geq(sum, last);
    cr_assert_not(seen[mask]);
    seen[mask] = true;
    last = sum;
    n++;
  }
  cr_assert_not(failed);
  cr_assert_eq(n, 256);
  rgi_subsets_destroy(s);
  rg_context_destroy(ctx);
}
