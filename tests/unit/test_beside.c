/* tests/unit/test_beside.c: choices looked for while a proof is at work are the same with a thread
 * (pthread) of its own and without. Meant for ThreadSanitizer as well.
 */
#include "graph/spec.h"
#include "passes/passes.h"
#include "recompute/search.h"
#include "../harness/random_spec.h"
#include "must.h"
#include <string.h>

enum { MEETINGS = 2 };

typedef struct found {
  double ms[MEETINGS + 1]; /* at each meeting */
  uint64_t set[4];
  int64_t explored;
} found;

/* From a choice that has room. */
static found look(rgi_model *m, const uint64_t *from, int64_t budget, bool alone) {
  const size_t bytes = (size_t)m->words * sizeof *from;
  found f = {0};
  rgi_chooser c;
  rgi_beside *b;
  int64_t saved, peak;
  double ms;
  must(rgi_chooser_init(&c, m, &err), "chooser");
  c.budget = budget;
  c.best_ms = rgi_model_ms(m, from);
  memcpy(c.best, from, bytes);
  m->mem.alone = alone;
  must(rgi_beside_open(&c, &b, &err), "beside");
  for (int64_t k = 0; k <= MEETINGS; k++) {
    must(rgi_beside_meet(b, &c, k << 40, k == MEETINGS, &err), "meeting");
    f.ms[k] = c.best_ms;
    if (k == 1) rgi_beside_offer(b, c.always);
  }
  rgi_beside_close(b);
  must(rgi_model_measure(m, c.best, budget, true, &saved, &peak, &ms, &err), "measure");
  cr_assert_leq(peak, budget);
  cr_assert_float_eq(ms, c.best_ms, 1e-9 * ms);
  memcpy(f.set, c.best, bytes);
  f.explored = c.explored;
  return f;
}

/* What is found is found at the same meeting, and has room. */
Test(beside, alone_or_not) {
  rg_context *ctx;
  rg_spec *spec;
  rgi_graph *forward, *g;
  rgi_profile *profile;
  rgi_model *m;
  uint64_t state = UINT64_C(17) * 1000003 + 4242;
  const rg_binding set[] = {{"T", 256, NULL}};
  const rgi_memory_options mem = {.threads = 2};
  must(rg_context_create(NULL, &ctx, &err), "context");
  must(rgi_random_spec_near(ctx, &state, 125, 12, &spec, &err), "load");
  must(rgi_spec_elaborate(spec, set, 1, true, &forward, &err), "elaborate");
  must(rgi_autodiff(forward, &g, &err), "autodiff");
  must(rgi_profile_load(ctx, NULL, "cpu", &profile, &err), "profile");
  must(rgi_model_create(g, profile, &mem, &m, &err), "model");
  uint64_t *from = rgi_model_set(m);
  for (int i = 0; i < m->ncandidate; i++) rgi_put(from, i);
  const int64_t peak = rgi_replay_run(m->replay, from, NULL).peak, budget = peak + peak / 8;
  const found x = look(m, from, budget, false), y = look(m, from, budget, true);
  cr_assert_lt(x.ms[1], 0.97 * x.ms[0], "%g of %g", x.ms[1], x.ms[0]);
  for (int k = 0; k <= MEETINGS; k++) cr_assert_eq(x.ms[k], y.ms[k], "at meeting %d", k);
  cr_assert_eq(memcmp(x.set, y.set, sizeof x.set), 0);
  cr_assert_eq(x.explored, y.explored);
  rgi_chooser none;
  rgi_beside *nobody;
  must(rgi_chooser_init(&none, m, &err), "chooser");
  none.nfree = 0;
  must(rgi_beside_open(&none, &nobody, &err), "beside");
  cr_assert_null(nobody, "there is nothing to look for");
  rgi_model_destroy(m);
  rgi_profile_destroy(profile);
  rgi_graph_destroy(g);
  rgi_graph_destroy(forward);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}
