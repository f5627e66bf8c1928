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
static rg_status chain(failing *f, const char *spec_text, const char *policy_text, int64_t T,
                       rg_error *e) {
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
  if (!status &&
      (status = rg_spec_load_text(ctx, spec_text, strlen(spec_text), "spec", NULL, 0, &spec, e)))
    cr_assert_null(spec);
  if (!status &&
      (status = rg_policy_load_text(ctx, policy_text, strlen(policy_text), "policy", &policy, e)))
    cr_assert_null(policy);
  if (!status) status = rg_check(spec, policy, e);
  if (!status && (status = rg_plan_create(spec, policy, &o, &plan, e))) cr_assert_null(plan);
  static const char *const format[] = {"text", "json", "timeline", "graph", "dot", "trace", "html"};
  for (int i = 0; i < 7 && !status; i++) {
    status = i < 5 ? rg_plan_write(plan, format[i], &text, e)
                   : rg_plan_report(plan, format[i], NULL, &text, e);
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

/* A spec by calls, written and loaded again. */
static rg_status build(failing *f, const char *ignored, const char *policy, int64_t T,
                       rg_error *e) {
  (void)ignored, (void)policy, (void)T;
  rg_allocator host = {fail_alloc, fail_free, f};
  rg_context *ctx = NULL;
  rg_builder *b = (rg_builder *)f;
  rg_spec *spec[2] = {NULL};
  rg_text text = {0};
  const rg_item attrs[] = {rg_list("shape", "0,H*D")};
  rg_status status = rg_context_create(&host, &ctx, e);
  if (!status && (status = rg_builder_create(ctx, "built", &b, e))) cr_assert_null(b);
  if (!status) {
    char name[16];
    rg_build_param(b, rg_int("H", 4));
    rg_build_param(b, rg_word("dtype", "f32"));
    for (int i = 0; i < 6; i++) { /* past what the lists hold at first */
      sprintf(name, "x%d", i);
      rg_build_input(b, name, "T,H,D", "$dtype", RG_GRAD_PLAIN);
    }
    rg_build_param(b, rg_int("D", 8));
    rg_build_node(b, "sum", "add", "a=x0+x1+x2+x3+x4+x5", "y=z", NULL, 0);
    rg_build_node(b, "flat", "reshape", "x=z", NULL, attrs, 1);
    rg_build_output(b, "y", "flat.y");
    if ((status = rg_build_spec(b, NULL, 0, &spec[0], e))) cr_assert_null(spec[0]);
    rg_builder_destroy(b);
  }
  if (!status && (status = rg_spec_write(spec[0], "json", &text, e))) cr_assert_null(text.data);
  if (!status &&
      (status = rg_spec_load_text(ctx, text.data, text.size, "written", NULL, 0, &spec[1], e)))
    cr_assert_null(spec[1]);
  rg_text_destroy(&text);
  rg_spec_destroy(spec[1]);
  rg_spec_destroy(spec[0]);
  rg_context_destroy(ctx);
  return status;
}

/* Pages for more sequences than there is room for at first. */
static rg_status pages(failing *f, const char *ignored, const char *policy, int64_t T,
                       rg_error *e) {
  (void)ignored, (void)policy, (void)T;
  rg_allocator host = {fail_alloc, fail_free, f};
  rg_context *ctx = NULL;
  rg_pages *p = (rg_pages *)f;
  const rg_pages_options o = {.size = sizeof o, .pages = 400, .page = 2};
  const int32_t text[40] = {1, 2, 3};
  rg_sequence s, other;
  int64_t known;
  rg_status status = rg_context_create(&host, &ctx, e);
  if (!status && (status = rg_pages_create(ctx, &o, &p, e))) cr_assert_null(p);
  for (int i = 0; i < 12 && !status; i++) {
    if ((status = rg_pages_open(p, text, i, &s, &known, e))) cr_assert_eq(s, 0);
    if (!status) status = rg_pages_reserve(p, s, 19 + i % 2, e);
    if (!status) status = rg_pages_commit(p, s, text + known, 19 + i % 2, e);
    if (!status && (status = rg_pages_fork(p, s, &other, e))) cr_assert_eq(other, 0);
    if (!status) status = rg_pages_reserve(p, s, 1, e);
  }
  if (ctx) rg_pages_destroy(p);
  rg_context_destroy(ctx);
  return status;
}

/* Requests, a fork and steps; after a failure no step is left half made. */
static rg_status queue(failing *f, const char *ignored, const char *policy, int64_t T,
                       rg_error *e) {
  (void)ignored, (void)policy, (void)T;
  rg_allocator host = {fail_alloc, fail_free, f};
  rg_context *ctx = NULL;
  rg_queue *q = (rg_queue *)f;
  const rg_queue_options o = {
      .size = sizeof o, .pages = 60, .page = 2, .rows = 40, .slots = 20, .most = 20, .forks = 1};
  int32_t tokens[40] = {1, 2, 3}, lengths[20], context[20], pages[400], forks[1][2];
  rg_request requests[20], r;
  bool wanted[20], last[20];
  rg_queue_arrays a = {.tokens = tokens,
                       .lengths = lengths,
                       .context = context,
                       .pages = pages,
                       .forks = forks,
                       .request = requests,
                       .wanted = wanted,
                       .last = last};
  const int32_t next[20] = {4, 5, 6};
  rg_status status = rg_context_create(&host, &ctx, e);
  if (!status && (status = rg_queue_create(ctx, &o, &q, e))) cr_assert_null(q);
  for (int i = 0; i < 18 && !status; i++)
    if ((status = rg_queue_add(q, tokens, 3, 20, &r, e))) cr_assert_eq(r, 0);
  for (int i = 0; i < 4 && !status; i++) {
    if ((status = rg_queue_step(q, &a, e)))
      cr_assert_eq(a.rows, 0);
    else
      status = rg_queue_done(q, next, e);
    if (!status && i == 1 && (status = rg_queue_fork(q, 1, 9, &r, e))) cr_assert_eq(r, 0);
  }
  if (status && ctx && q) { /* and goes on all the same */
    rg_error other = {0};
    CR_OK(rg_queue_step(q, &a, &other), &other);
  }
  if (ctx) rg_queue_destroy(q);
  rg_context_destroy(ctx);
  return status;
}

typedef rg_status chain_fn(failing *f, const char *spec_text, const char *policy_text, int64_t T,
                           rg_error *e);

static void every_failure_of(chain_fn *chain, const char *policy, int64_t T) {
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
      cr_assert_eq(status, RG_E_NOMEM, "allocation %ld failed: %s %s", n, rg_status_name(status),
                   e.message);
    cr_assert_eq(e.status, status);
  }
  cr_assert_eq(status, RG_OK, "still failing after %ld allocations", n);
}

static void every_failure(const char *policy, int64_t T) {
  every_failure_of(chain, policy, T);
}

Test(alloc, built_spec) {
  every_failure_of(build, NULL, 0);
}
Test(alloc, pages) {
  every_failure_of(pages, NULL, 0);
}
Test(alloc, queue) {
  every_failure_of(queue, NULL, 0);
}
Test(alloc, keep_everything) {
  every_failure("{ \"regraph_policy\": 1, \"preset\": \"none\" }", 96);
}
Test(alloc, recompute_and_split) {
  every_failure(
      "{ \"regraph_policy\": 1, \"recompute\": [\"compress_kv\", \"topk\"], \"split_heads\": 1 }",
      96);
}
/* Here the greedy packing is not optimal, so the exact search allocates as well. */
Test(alloc, exact_packing) {
  every_failure("{ \"regraph_policy\": 1, \"recompute\": [\"compress_kv\", \"cmp_o\"] }", 300);
}
Test(alloc, budget) {
  every_failure(
      "{ \"regraph_policy\": 1, \"budget\": { \"bytes\": \"150KiB\", \"of\": \"saved\" } }", 300);
}
