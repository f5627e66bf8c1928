/* tests/unit/test_alloc.c: every host allocation may fail. The n-th one does, for n =
 * 1, 2, … until all succeed: each time the chain ends in RG_E_NOMEM, nothing is leaked
 * and every out-pointer is NULL.
 */
#include "run_util.h"

typedef struct failing {
  long count, fail_at; /* the fail_at-th allocation fails, once; 0: none */
  long live;
} failing;

static void *fail_alloc(void *user, size_t size) {
  failing *f = user;
  if (++f->count == f->fail_at) return NULL;
  f->live++;
  return malloc(size);
}
static void fail_free(void *user, void *ptr) {
  if (!ptr) return;
  ((failing *)user)->live--;
  free(ptr);
}

/* The whole chain, stopping at the first failure. */
static rg_status chain(failing *f, const char *spec_text, const char *policy_text, int64_t T, rg_error *e) {
  rg_allocator host = {fail_alloc, fail_free, f};
  rg_context *ctx = (rg_context *)f; /* wrong on purpose: a failure must set NULL */
  rg_spec *spec = NULL;
  rg_policy *policy = NULL;
  rg_plan *plan = NULL;
  rg_session *session = NULL;
  rg_text text = {0};
  rg_binding set[] = {{"T", T, NULL}, {"B", 2, NULL}};
  rg_plan_options o = {.set = set, .nset = 2, .threads = 2, .pack_seconds = 0.01};
  rg_session_options so = {.arena = &host};
  rg_status status = rg_context_create(&host, &ctx, e);
  if (status) cr_assert_null(ctx);
  if (!status && (status = rg_spec_load_text(ctx, spec_text, strlen(spec_text), "spec", NULL, 0, &spec, e)))
    cr_assert_null(spec);
  if (!status && (status = rg_policy_load_text(ctx, policy_text, strlen(policy_text), "policy", &policy, e)))
    cr_assert_null(policy);
  if (!status) status = rg_check(spec, policy, e);
  if (!status && (status = rg_plan_create(spec, policy, &o, &plan, e))) cr_assert_null(plan);
  static const char *const format[] = {"text", "json", "timeline", "graph"};
  for (int i = 0; i < 4 && !status; i++) {
    status = rg_plan_write(plan, format[i], &text, e);
    if (status) cr_assert_null(text.data);
    rg_text_destroy(&text);
  }
  if (!status && (status = rg_session_create(plan, &so, &session, e))) cr_assert_null(session);
  rg_session_destroy(session);
  rg_plan_destroy(plan);
  rg_policy_destroy(policy);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
  return status;
}

static void every_failure(const char *policy, int64_t T) {
  char text[8192];
  nsa_spec("f32", false, text, sizeof text);
  rg_error e = {0};
  failing f = {0};
  CR_OK(chain(&f, text, policy, T, &e), &e);
  cr_assert_eq(f.live, 0, "leaked %ld blocks without a failure", f.live);
  long total = f.count;
  cr_assert_gt(total, 10);
  rg_status status = RG_E_NOMEM;
  long n;
  for (n = 1; n <= 2 * total && status != RG_OK; n++) {
    f = (failing){.fail_at = n};
    e = (rg_error){0};
    status = chain(&f, text, policy, T, &e);
    cr_assert_eq(f.live, 0, "allocation %ld of %ld failed: %ld blocks leaked", n, total, f.live);
    if (f.count >= n)
      cr_assert_eq(status, RG_E_NOMEM, "allocation %ld failed: %s %s", n, rg_status_name(status), e.message);
    cr_assert_eq(e.status, status);
  }
  cr_assert_eq(status, RG_OK, "still failing after %ld allocations", n);
}

Test(alloc, keep_everything) {
  every_failure("{ \"regraph_policy\": 1, \"preset\": \"none\" }", 96);
}
Test(alloc, recompute_and_split) {
  every_failure("{ \"regraph_policy\": 1, \"recompute\": [\"compress_kv\", \"topk\"], \"split_heads\": 1 }",
                96);
}
/* Here the greedy packing is not optimal, so the exact search allocates as well. */
Test(alloc, exact_packing) {
  every_failure("{ \"regraph_policy\": 1, \"recompute\": [\"compress_kv\", \"cmp_o\"] }", 300);
}
Test(alloc, budget) {
  every_failure("{ \"regraph_policy\": 1, \"budget\": { \"bytes\": \"150KiB\", \"of\": \"saved\" } }", 300);
}
