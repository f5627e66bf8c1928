/* tests/unit/test_bitequal.c: recomputing changes bytes and time, never a bit of a result.

   Each node of NSA alone, every pair, and all of them, with and without head split: outputs and
   gradients are those of the plan that keeps everything, and predicted bytes are the bytes asked of
   the allocator and the bytes touched.
 */
#include "run_util.h"

enum { T = 300, B = 3 };
static const int lengths[B] = {147, 0, 138}; /* rows 285 … 299 are past the last live token */

typedef struct counter {
  const rg_plan *plan;
  size_t asked;
  int live;
} counter;

static void *arena_alloc(void *user, size_t size) {
  counter *c = user;
  void *p = NULL;
  if (rg_memory_alloc(c->plan, size, &p, NULL) != RG_OK) return NULL;
  c->asked += size;
  c->live++;
  return p;
}
static void arena_free(void *user, void *ptr) {
  counter *c = user;
  c->live--;
  rg_memory_free(c->plan, ptr);
}

/* Runs one policy; returns its sizes. */
static rg_sizes run_policy(rg_context *ctx, const rg_spec *spec, unsigned mask, int split,
                           buffers *result) {
  char text[512], what[600];
  rg_error e = {0};
  rg_policy *policy = load_policy(ctx, nsa_policy(mask, split, text, sizeof text));
  snprintf(what, sizeof what, "%s", text);
  rg_plan *plan = make_plan(spec, policy, T, B, 2);
  rg_policy_destroy(policy);
  rg_sizes z;
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  cr_assert_eq(z.predicted_peak, z.saved + z.scratch);
  cr_assert_leq(z.lower_bound, z.predicted_peak, "%s", what);
  cr_assert_eq(z.scratch,
               z.forward_scratch > z.backward_scratch ? z.forward_scratch : z.backward_scratch);

  /* Bytes asked for. */
  counter count = {.plan = plan};
  rg_allocator arena = {arena_alloc, arena_free, &count};
  rg_session_options o = {.arena = &arena};
  rg_session *s = NULL;
  CR_OK(rg_session_create(plan, &o, &s, &e), &e);
  cr_assert_eq((int64_t)count.asked, z.predicted_peak, "%s: asked for %zu, predicted %lld", what,
               count.asked, (long long)z.predicted_peak);
  make_buffers(plan, 7, T, lengths, result);
  bind_all(s, result);
  run_both(s);
  fetch_all(s, result);
  rg_session_destroy(s);
  cr_assert_eq(count.live, 0);

  /* Bytes touched, guards whole, and the same bits from poisoned memory. */
  o.debug_poison = true;
  buffers again;
  make_buffers(plan, 7, T, lengths, &again);
  CR_OK(rg_session_create(plan, &o, &s, &e), &e);
  bind_all(s, &again);
  run_both(s);
  fetch_all(s, &again);
  int64_t saved = -1, scratch = -1;
  cr_assert_eq(rg_session_touched(s, &saved, &scratch), RG_OK);
  cr_assert_eq(saved, z.saved, "%s: touched %lld saved, predicted %lld", what, (long long)saved,
               (long long)z.saved);
  cr_assert_eq(scratch, z.scratch, "%s: touched %lld scratch, predicted %lld", what,
               (long long)scratch, (long long)z.scratch);
  rg_session_destroy(s);
  same_results(result, &again, what);
  finite_results(result, what);
  free_buffers(&again);
  for (int i = 0; i < result->n; i++)
    result->info[i].name = strdup(result->info[i].name); /* the plan's go with it */
  rg_plan_destroy(plan);
  return z;
}

static void drop_result(buffers *b) {
  for (int i = 0; i < b->n; i++) free((char *)b->info[i].name);
  free_buffers(b);
}

static void compare(rg_context *ctx, const rg_spec *spec, const buffers *kept, unsigned mask,
                    int split, rg_sizes *z) {
  buffers got;
  char what[64];
  *z = run_policy(ctx, spec, mask, split, &got);
  snprintf(what, sizeof what, "recompute mask %#x, split %d", mask, split);
  same_results(kept, &got, what);
  drop_result(&got);
}

static void sweep(const char *dtype, bool weights, bool pairs) {
  char text[8192];
  rg_context *ctx = NULL;
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_spec *spec = load_spec(ctx, nsa_spec(dtype, weights, text, sizeof text));
  buffers kept;
  rg_sizes none = run_policy(ctx, spec, 0, 0, &kept), z;
  const unsigned all = (1u << NSA_NODES) - 1;
  for (int split = 0; split <= 1; split++) {
    if (split) compare(ctx, spec, &kept, 0, split, &z);
    for (int i = 0; i < NSA_NODES; i++) {
      compare(ctx, spec, &kept, 1u << i, split, &z);
      if (!split) cr_assert_leq(z.saved, none.saved, "recomputing %s saved more", nsa_nodes[i]);
      for (int j = 0; pairs && j < i; j++) compare(ctx, spec, &kept, 1u << i | 1u << j, split, &z);
    }
    compare(ctx, spec, &kept, all, split, &z);
    cr_assert_lt(z.saved, none.saved, "recomputing everything saved nothing");
  }
  drop_result(&kept);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

Test(bitequal, f32_each_pair_all) {
  sweep("f32", false, true);
}
Test(bitequal, bf16_each_pair_all) {
  sweep("bf16", false, true);
}
Test(bitequal, learned_weights) {
  sweep("bf16", true, false);
}
