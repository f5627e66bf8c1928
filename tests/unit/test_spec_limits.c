/* tests/unit/test_spec_limits.c: specs at their limits: sizes, misuse, threads, no memory. */
#include "spec_case.h"
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void must_fail(rg_context *ctx, const char *text, rg_status want, const char *pointer) {
  rg_error e = {0};
  rg_spec *spec = (rg_spec *)&e;
  cr_assert_eq(rg_spec_load_text(ctx, text, strlen(text), "text", NULL, 0, &spec, &e), want, "%s",
               e.message);
  cr_assert_null(spec);
  cr_assert_eq(e.status, want);
  cr_assert_str_eq(e.pointer, pointer);
  cr_assert_str_eq(e.file, "text");
}

/* ---- limits ---- */

/* A chain of n nodes as a spec; free it. */
static char *chain(int n) {
  char *text = malloc((size_t)n * 80 + 400), *p = text;
  p += sprintf(
      p,
      "{\"regraph\": 1, \"inputs\": {\"x\": {\"shape\": [2], \"dtype\": \"f32\"}}, \"nodes\": [");
  for (int i = 0; i < n; i++) {
    char from[32];
    snprintf(from, sizeof from, "n%d.y", i - 1);
    p += sprintf(p, "%s{\"name\": \"n%d\", \"op\": \"silu\", \"in\": {\"x\": \"%s\"}}",
                 i ? "," : "", i, i ? from : "x");
  }
  sprintf(p, "], \"outputs\": {\"y\": \"n%d.y\"}}", n - 1);
  return text;
}

Test(spec, limits) {
  rg_context *ctx = context();
  rg_error e = {0};
  char *text = chain(16384);
  rg_spec *spec = must_load(ctx, text, NULL, 0);
  cr_assert_eq(rg_check(spec, NULL, &e), RG_OK, "%s", e.message);
  cr_assert_eq(rgi_spec_context(spec), ctx);
  rg_spec_destroy(spec);
  free(text);
  text = chain(16385);
  must_fail(ctx, text, RG_E_LIMIT, "/nodes");
  free(text);

  /* tensors: one split into very many; free dimensions: eight new ones per input */
  text = malloc(1 << 21);
  char *end =
      text +
      sprintf(text,
              "{\"regraph\": 1, \"inputs\": {\"x\": {\"shape\": [131072], \"dtype\": \"f32\"}},"
              " \"nodes\": [{\"name\": \"s\", \"op\": \"split\", \"in\": {\"x\": \"x\"},"
              " \"attrs\": {\"axis\": 0}, \"out\": {\"y\": [\"a\"");
  for (int i = 1; i < 131072; i++) end += sprintf(end, ",\"a%d\"", i);
  strcpy(end, "]}}], \"outputs\": {\"y\": \"a\"}}");
  must_fail(ctx, text, RG_E_LIMIT, "/nodes");
  end =
      text +
      sprintf(text, "{\"regraph\": 1, \"nodes\": [], \"outputs\": {\"y\": \"x0\"}, \"inputs\": {");
  for (int i = 0; i < 513; i++) {
    end +=
        sprintf(end, "%s\"x%d\": {\"dtype\": \"f32\", \"shape\": [\"D%d\"", i ? "," : "", i, i * 8);
    for (int d = 1; d < 8; d++) end += sprintf(end, ",\"D%d\"", i * 8 + d);
    end += sprintf(end, "]}");
  }
  strcpy(end, "}}");
  must_fail(ctx, text, RG_E_LIMIT, "/inputs/x512");
  free(text);

  size_t size = ((size_t)16 << 20) + 1;
  text = malloc(size + 1);
  memset(text, ' ', size);
  memcpy(text, small, strlen(small));
  text[size] = 0;
  must_fail(ctx, text, RG_E_LIMIT, "");
  text[size - 1] = 0; /* exactly 16 MiB */
  rg_spec_destroy(must_load(ctx, text, NULL, 0));

  char path[] = "/tmp/rg_spec_XXXXXX";
  int file = mkstemp(path);
  cr_assert_geq(file, 0);
  cr_assert_eq(write(file, text, size), (ssize_t)size);
  close(file);
  cr_assert_eq(rg_spec_load_file(ctx, path, NULL, 0, &spec, &e), RG_E_LIMIT);
  cr_assert_str_eq(e.file, path);
  cr_assert_null(spec);
  unlink(path);
  free(text);

  /* 64 levels are fine, brackets in strings do not count */
  char deep[300], *p = deep;
  p += sprintf(p, "{\"regraph\": 1, \"doc\": ");
  for (int i = 0; i < 63; i++) *p++ = '[';
  p += sprintf(p, "\"[[[[{{\\\"[\"");
  for (int i = 0; i < 63; i++) *p++ = ']';
  strcpy(p, "}");
  must_fail(ctx, deep, RG_E_KEY, ""); /* parsed; only its keys are wrong */
  rg_context_destroy(ctx);
}

/* ---- misuse ---- */

Test(spec, files_and_handles) {
  rg_context *ctx = context();
  rg_error e = {0};
  rg_spec *spec;
  rg_text text;
  size_t n = 0;
  rg_tensor_info t;
  cr_assert_eq(rg_spec_load_file(ctx, "/nonexistent/spec.json", NULL, 0, &spec, &e), RG_E_IO);
  cr_assert_str_eq(e.file, "/nonexistent/spec.json");
  e = (rg_error){0};
  cr_assert_eq(rg_spec_load_file(ctx, "/", NULL, 0, &spec, &e), RG_E_IO);
  /* the first error wins, and its file stays */
  cr_assert_eq(rg_spec_load_text(ctx, "{}", 2, "late", NULL, 0, &spec, &e), RG_E_KEY);
  cr_assert_eq(e.status, RG_E_IO);
  cr_assert_str_eq(e.file, "/");
  cr_assert_eq(rg_spec_load_text(ctx, "{}", 2, NULL, NULL, 0, &spec, NULL), RG_E_KEY);
  cr_assert_null(spec);

  cr_assert_eq(rg_spec_load_file(NULL, NSA, NULL, 0, &spec, NULL), RG_E_USAGE);
  cr_assert_eq(rg_spec_load_file(ctx, NULL, NULL, 0, &spec, NULL), RG_E_USAGE);
  cr_assert_eq(rg_spec_load_file(ctx, NSA, NULL, 0, NULL, NULL), RG_E_USAGE);
  cr_assert_eq(rg_spec_load_file(ctx, NSA, NULL, 1, &spec, NULL), RG_E_USAGE);
  cr_assert_eq(rg_spec_load_text(ctx, NULL, 0, "x", NULL, 0, &spec, NULL), RG_E_USAGE);
  cr_assert_eq(rg_spec_tensor(NULL, 0, &t), RG_E_USAGE);
  cr_assert_eq(rg_spec_solve(NULL, "q", 0, NULL, NULL, 0, &n, NULL), RG_E_USAGE);
  cr_assert_eq(rg_check(NULL, NULL, NULL), RG_E_USAGE);
  cr_assert_eq(rg_spec_write(NULL, "text", &text, NULL), RG_E_USAGE);
  cr_assert_null(text.data);
  rg_spec_destroy(NULL);

  cr_assert_eq(rg_spec_load_file(ctx, NSA, NULL, 0, &spec, NULL), RG_OK);
  cr_assert_eq(rg_spec_write(spec, "dots", &text, NULL), RG_E_USAGE);
  static const char *const formats[] = {"text", "dot", "summary"};
  for (int i = 0; i < 3; i++) {
    cr_assert_eq(rg_spec_write(spec, formats[i], &text, NULL), RG_OK);
    cr_assert_eq(text.size, strlen(text.data));
    cr_assert(strstr(text.data, "slc_o"));
    rg_text_destroy(&text);
  }
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

/* ---- threads ---- */

static void *use_spec(void *arg) {
  const rg_spec *spec = arg;
  rg_binding set[] = {{"T", 64, NULL}, {"B", 2, NULL}}, solved[4];
  for (int i = 0; i < 4; i++) {
    rgi_graph *g;
    rg_text text;
    size_t n = 0;
    rg_error e = {0};
    bool good = rgi_spec_elaborate(spec, set, 2, true, &g, &e) == RG_OK;
    if (good) rgi_graph_destroy(g);
    good = good && rg_check(spec, NULL, &e) == RG_OK &&
           rg_spec_write(spec, "text", &text, &e) == RG_OK;
    if (good) rg_text_destroy(&text);
    good = good &&
           rg_spec_solve(spec, "q", 3, (int64_t[]){9, 64, 128}, solved, 4, &n, &e) == RG_OK &&
           n == 1;
    if (!good) return "failed";
  }
  return NULL;
}

Test(spec, shared_between_threads) {
  rg_context *ctx = context();
  rg_spec *spec;
  pthread_t thread[4];
  cr_assert_eq(rg_spec_load_file(ctx, NSA, NULL, 0, &spec, NULL), RG_OK);
  for (int i = 0; i < 4; i++) cr_assert_eq(pthread_create(&thread[i], NULL, use_spec, spec), 0);
  for (int i = 0; i < 4; i++) {
    void *result;
    pthread_join(thread[i], &result);
    cr_assert_null(result);
  }
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

/* ---- no memory ---- */

typedef struct failing {
  long left;    /* allocations until the first refusal; -1: never */
  bool forever; /* refuse everything after it too */
  bool refused;
  long live;
} failing;

static void *failing_alloc(void *user, size_t size) {
  failing *f = user;
  if (f->left == 0) {
    if (!f->forever) f->left = -1;
    f->refused = true;
    return NULL;
  }
  if (f->left > 0) f->left--;
  void *p = malloc(size);
  if (p) f->live++;
  return p;
}
static void failing_free(void *user, void *p) {
  if (p) ((failing *)user)->live--;
  free(p);
}

static rg_status load_all(const rg_context *ctx, rg_error *e) {
  rg_binding set[] = {{"T", 64, NULL}, {"B", 0, "2"}};
  rg_spec *spec = NULL;
  rg_policy *policy = NULL;
  rg_text text = {0};
  rg_status status = rg_spec_load_file((rg_context *)ctx, NSA, set, 2, &spec, e);
  if (status == RG_OK)
    status = rg_policy_load_file((rg_context *)ctx, RG_SOURCE_DIR "/examples/policies/partial.json",
                                 &policy, e);
  if (status == RG_OK) status = rg_check(spec, policy, e);
  if (status == RG_OK) status = rg_spec_write(spec, "summary", &text, e);
  if (status == RG_OK) rg_text_destroy(&text);
  cr_assert_null(text.data);
  rg_policy_destroy(policy);
  rg_spec_destroy(spec);
  return status;
}

Test(spec, every_allocation_may_fail) {
  for (int forever = 0; forever < 2; forever++) {
    long n = 0;
    for (;; n++) {
      failing f = {.left = -1};
      rg_allocator host = {failing_alloc, failing_free, &f};
      rg_context *ctx;
      rg_error e = {0};
      cr_assert_eq(rg_context_create(&host, &ctx, NULL), RG_OK);
      long before = f.live;
      f.left = n;
      f.forever = forever;
      rg_status status = load_all(ctx, &e);
      f.left = -1;
      cr_assert_eq(f.live, before, "leak when allocation %ld fails", n);
      rg_context_destroy(ctx);
      cr_assert_eq(f.live, 0);
      if (!f.refused) {
        cr_assert_eq(status, RG_OK, "%s", e.message);
        break;
      }
      cr_assert_eq(status, RG_E_NOMEM, "allocation %ld: %s", n, e.message);
    }
    cr_assert_gt(n, 20);
  }
}

/* Out of memory between errors: what was found so far is said, and nothing leaks. */
Test(spec, several_errors_and_no_memory) {
  enum { MOST = 20 };
  static rg_error e[MOST];
  long refusals = 0;
  for (bool refused = true; refused; refusals += refused) {
    failing f = {.left = -1};
    rg_allocator host = {failing_alloc, failing_free, &f};
    rg_context *ctx;
    rg_spec *spec;
    size_t n;
    cr_assert_eq(rg_context_create(&host, &ctx, NULL), RG_OK);
    long before = f.live;
    f.left = refusals;
    const rg_status status = rg_spec_load_file_all(ctx, RG_SOURCE_DIR "/tests/golden/run/many.json",
                                                   NULL, 0, &spec, e, MOST, &n);
    f.left = -1;
    refused = f.refused;
    cr_assert_null(spec);
    cr_assert(n >= 1 && e[0].status == status);
    cr_assert_eq(e[n - 1].status == RG_E_NOMEM, refused, "allocation %ld", refusals);
    if (!refused) cr_assert_eq(n, 11);
    cr_assert_eq(f.live, before, "leak when allocation %ld fails", refusals);
    rg_context_destroy(ctx);
  }
  cr_assert_gt(refusals, 10);
}

Test(spec, several_errors_misused) {
  rg_context *ctx = context();
  rg_error e[2];
  rg_spec *spec;
  size_t n = 7;
  cr_assert_eq(rg_spec_load_text_all(ctx, "{}", 2, "x", NULL, 0, &spec, NULL, 2, &n), RG_E_USAGE);
  cr_assert_eq(n, 0);
  cr_assert_eq(rg_spec_load_text_all(ctx, "{}", 2, "x", NULL, 0, &spec, e, 0, &n), RG_E_USAGE);
  cr_assert_eq(rg_spec_load_text_all(ctx, "{}", 2, "x", NULL, 0, &spec, e, 2, NULL), RG_E_USAGE);
  cr_assert_eq(rg_spec_load_text_all(ctx, NULL, 2, "x", NULL, 0, &spec, e, 2, &n), RG_E_USAGE);
  cr_assert(n == 1 && e[0].status == RG_E_USAGE && e[0].message[0] && !spec);
  cr_assert_eq(rg_spec_load_file_all(ctx, "nowhere", NULL, 0, &spec, e, 2, &n), RG_E_IO);
  cr_assert(n == 1 && e[0].status == RG_E_IO && strcmp(e[0].file, "nowhere") == 0);
  cr_assert_eq(rg_check_all(NULL, NULL, e, 2, &n), RG_E_USAGE);
  cr_assert_eq(n, 1);
  rg_context_destroy(ctx);
}

/* jansson takes its memory from hooks of its own; each Criterion test is a
 * process, so they may be set here. */
static failing jansson_memory;
static void *jansson_alloc(size_t size) {
  return failing_alloc(&jansson_memory, size);
}
static void jansson_free(void *p) {
  failing_free(&jansson_memory, p);
}

Test(spec, jansson_may_run_out_of_memory) {
  rg_context *ctx = context();
  json_set_alloc_funcs(jansson_alloc, jansson_free);
  long n = 0;
  for (;; n++) {
    rg_error e = {0};
    jansson_memory = (failing){.left = n, .forever = true};
    rg_status status = load_all(ctx, &e);
    cr_assert_eq(jansson_memory.live, 0, "leak when allocation %ld fails", n);
    if (!jansson_memory.refused) {
      cr_assert_eq(status, RG_OK, "%s", e.message);
      break;
    }
    cr_assert_eq(status, RG_E_NOMEM, "allocation %ld: %s", n, e.message);
  }
  cr_assert_gt(n, 100);
  rg_context_destroy(ctx);
}
