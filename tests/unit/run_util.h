/* tests/unit/run_util.h: small NSA specs, and buffers for everything a plan lets the caller
 * bind, for the tests of plans and sessions. Contents depend on seed, role and name alone, so
 * that two plans of one spec get the same data.
 */
#ifndef RUN_UTIL_H
#define RUN_UTIL_H

#include <regraph/regraph.h>

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CR_OK(call, e) \
  cr_assert_eq((call), RG_OK, "%s: %s (%s)", (e)->message, rg_status_name((e)->status), (e)->node)

/* The call, which takes &e, fails so and says that. */
#define FAILS(call, code, part)                                                            \
  do {                                                                                     \
    rg_error e = {0};                                                                      \
    rg_status got_ = (call);                                                               \
    cr_assert_eq(got_, code, "%s: %s", rg_status_name(got_), e.message);                   \
    cr_assert_eq(e.status, code);                                                          \
    cr_assert(strstr(e.message, part), "\"%s\" does not mention \"%s\"", e.message, part); \
  } while (0)

enum { MOST_TENSORS = 96 };

/* With REGRAPH_TEST_DEVICE=cuda plans are for a GPU: buffers then have a copy in its memory (never
 * freed: each test is a process), which is what gets bound; fetch_all brings results back. */
static inline bool test_on_gpu(void) {
  const char *device = getenv("REGRAPH_TEST_DEVICE");
  return device && strcmp(device, "cuda") == 0;
}
static inline const char *test_device(void) {
  return test_on_gpu() ? "cuda" : "cpu";
}

/* Long lists of cases can be shared out among processes: REGRAPH_SHARD=2/16 takes cases 2,
 * 18, 34 … */
static inline bool in_shard(int i) {
  const char *shard = getenv("REGRAPH_SHARD");
  int k = 0, n = 1;
  return !shard || sscanf(shard, "%d/%d", &k, &n) != 2 || n < 1 || i % n == k;
}

/* The six nodes of NSA on small shapes; `weights` adds learned compression with
 * accumulated weight gradients. */
static inline const char *nsa_spec(const char *dtype, bool weights, char *text, size_t size) {
  int n = snprintf(
      text, size,
      "{ \"regraph\": 1, \"name\": \"nsa\",\n"
      "  \"params\": { \"H\": 4, \"KH\": 2, \"D\": 16, \"kernel\": 8, \"stride\": 4, \"block\": "
      "16, "
      "\"top_n\": 4,\n"
      "    \"init\": 1, \"local\": 2, \"window\": 24, \"dtype\": \"%s\" },\n"
      "  \"inputs\": {\n"
      "    \"q\": { \"shape\": [\"T\", \"H\", \"D\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
      "    \"k\": { \"shape\": [\"T\", \"KH\", \"D\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
      "    \"v\": { \"shape\": [\"T\", \"KH\", \"D\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
      "    \"gate\": { \"shape\": [\"T\", \"H\", 3], \"dtype\": \"$dtype\", \"grad\": true },\n"
      "%s"
      "    \"cu_seqlens\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } },\n"
      "  \"nodes\": [\n"
      "    { \"name\": \"compress_kv\", \"op\": \"compress_kv\",\n"
      "      \"in\": { \"k\": \"k\", \"v\": \"v\", %s\"cu_seqlens\": \"cu_seqlens\" },\n"
      "      \"out\": { \"k\": \"cmp_k\", \"v\": \"cmp_v\" },\n"
      "      \"attrs\": { \"kernel\": \"$kernel\", \"stride\": \"$stride\"%s } },\n"
      "    { \"name\": \"cmp_o\", \"op\": \"cmp_attn\",\n"
      "      \"in\": { \"q\": \"q\", \"k\": \"cmp_k\", \"v\": \"cmp_v\", \"cu_seqlens\": "
      "\"cu_seqlens\" },\n"
      "      \"out\": { \"o\": \"cmp_o\", \"lse\": \"cmp_lse\" },\n"
      "      \"attrs\": { \"kernel\": \"$kernel\", \"stride\": \"$stride\" } },\n"
      "    { \"name\": \"topk\", \"op\": \"topk\",\n"
      "      \"in\": { \"q\": \"q\", \"k\": \"cmp_k\", \"lse\": \"cmp_lse\", \"cu_seqlens\": "
      "\"cu_seqlens\" "
      "},\n"
      "      \"out\": { \"idx\": \"idx\" },\n"
      "      \"attrs\": { \"kernel\": \"$kernel\", \"stride\": \"$stride\", \"block\": "
      "\"$block\",\n"
      "        \"top_n\": \"$top_n\", \"init\": \"$init\", \"local\": \"$local\" } },\n"
      "    { \"name\": \"slc_o\", \"op\": \"slc_attn\",\n"
      "      \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": \"v\", \"idx\": \"idx\", \"cu_seqlens\": "
      "\"cu_seqlens\" },\n"
      "      \"out\": { \"o\": \"slc_o\" }, \"attrs\": { \"block\": \"$block\" } },\n"
      "    { \"name\": \"swa_o\", \"op\": \"swa_attn\",\n"
      "      \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": \"v\", \"cu_seqlens\": \"cu_seqlens\" "
      "},\n"
      "      \"out\": { \"o\": \"swa_o\" }, \"attrs\": { \"window_left\": \"$window\" } },\n"
      "    { \"name\": \"combine\", \"op\": \"combine\",\n"
      "      \"in\": { \"o\": [\"cmp_o\", \"slc_o\", \"swa_o\"], \"gate\": \"gate\" }, \"out\": { "
      "\"o\": "
      "\"o\" } } ],\n"
      "  \"outputs\": { \"o\": \"o\" } }\n",
      dtype,
      weights ? "    \"wk\": { \"shape\": [\"D\", \"kernel*D\"], \"dtype\": \"$dtype\", \"grad\": "
                "\"accumulate\" },\n"
                "    \"wv\": { \"shape\": [\"D\", \"kernel*D\"], \"dtype\": \"$dtype\", \"grad\": "
                "\"accumulate\" },\n"
              : "",
      weights ? "\"k_weight\": \"wk\", \"v_weight\": \"wv\", " : "",
      weights ? ", \"k_method\": \"linear\", \"v_method\": \"linear\"" : "");
  cr_assert(n > 0 && (size_t)n < size);
  return text;
}

static const char *const nsa_nodes[] = {"compress_kv", "cmp_o", "topk",
                                        "slc_o",       "swa_o", "combine"};
enum { NSA_NODES = 6 };

/* Nodes in `mask` (over nsa_nodes) are recomputed. */
static inline const char *nsa_policy(unsigned mask, int split, char *text, size_t size) {
  int n = snprintf(text, size, "{ \"regraph_policy\": 1, \"recompute\": [");
  for (int i = 0, first = 1; i < NSA_NODES; i++)
    if (mask >> i & 1) {
      n += snprintf(text + n, size - (size_t)n, "%s\"%s\"", first ? "" : ", ", nsa_nodes[i]);
      first = 0;
    }
  n += snprintf(text + n, size - (size_t)n, "]");
  if (split) n += snprintf(text + n, size - (size_t)n, ", \"split_heads\": %d", split);
  snprintf(text + n, size - (size_t)n, " }");
  return text;
}

static inline rg_spec *load_spec(rg_context *ctx, const char *text) {
  rg_error e = {0};
  rg_spec *spec = NULL;
  CR_OK(rg_spec_load_text(ctx, text, strlen(text), "test spec", NULL, 0, &spec, &e), &e);
  return spec;
}

static inline rg_policy *load_policy(rg_context *ctx, const char *text) {
  rg_error e = {0};
  rg_policy *policy = NULL;
  CR_OK(rg_policy_load_text(ctx, text, strlen(text), "test policy", &policy, &e), &e);
  return policy;
}

static inline rg_plan *make_plan(const rg_spec *spec, const rg_policy *policy, int64_t T, int64_t B,
                                 int threads) {
  rg_error e = {0};
  rg_plan *plan = NULL;
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rg_plan_options o = {
      .set = set, .nset = 2, .device = test_device(), .threads = threads, .pack_seconds = 0.2};
  CR_OK(rg_plan_create(spec, policy, &o, &plan, &e), &e);
  return plan;
}

/* ---- buffers ---- */

typedef struct buffers {
  int n;
  rg_tensor_info info[MOST_TENSORS];
  void *data[MOST_TENSORS];
  void *device[MOST_TENSORS]; /* set by bind_all */
  const rg_plan *plan;
} buffers;

static inline uint32_t next_random(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(*state >> 33);
}

static inline void fill_floats(const rg_tensor_info *t, void *data, uint64_t state) {
  size_t n = (size_t)t->bytes / rg_dtype_size(t->dtype);
  float *x = malloc(n * sizeof *x + 4);
  for (size_t i = 0; i < n; i++) { /* a sum of four uniforms: near enough to normal */
    float sum = 0;
    for (int k = 0; k < 4; k++) sum += (float)(next_random(&state) & 0xffff) / 65536.0f - 0.5f;
    x[i] = sum * 1.7f;
  }
  rg_convert(t->dtype, data, RG_F32, x, n);
  free(x);
}

/* Sequence starts: `lengths` (B of them, sum <= T), or near-equal ones. */
static inline void fill_starts(int32_t *cu, int64_t entries, int64_t T, const int *lengths) {
  int64_t B = entries - 1;
  cu[0] = 0;
  for (int64_t b = 0; b < B; b++)
    cu[b + 1] = lengths ? cu[b] + lengths[b] : (int32_t)((b + 1) * T / B);
}

/* Everything the plan binds, filled: inputs and incoming gradients with data, sums
 * with ones, the rest with 0x7e. */
static inline void make_buffers(const rg_plan *plan, uint64_t seed, int64_t T, const int *lengths,
                                buffers *out) {
  out->n = 0;
  out->plan = plan;
  rg_tensor_info t;
  for (size_t i = 0; rg_plan_tensor(plan, i, &t) == RG_OK; i++) {
    cr_assert_lt(out->n, (int)MOST_TENSORS);
    void *p = NULL;
    cr_assert_eq(posix_memalign(&p, 64, (size_t)t.bytes + 64), 0);
    uint64_t state = seed * 1000003u + (uint64_t)t.role * 7919u;
    for (const char *c = t.name; *c; c++) state = state * 131u + (unsigned char)*c;
    memset(p, 0x7e, (size_t)t.bytes);
    if (t.seqlens) {
      fill_starts(p, t.dim[0], T, lengths);
    } else if ((t.role == RG_INPUT || t.role == RG_GRAD_IN) && t.dtype != RG_I32) {
      fill_floats(&t, p, state);
    } else if (t.accumulates) {
      for (int64_t k = 0; k < t.bytes / 4; k++) ((float *)p)[k] = 1.0f;
    }
    out->device[out->n] = NULL;
    out->info[out->n] = t;
    out->data[out->n++] = p;
  }
  cr_assert_gt(out->n, 0);
}

static inline void free_buffers(buffers *b) {
  for (int i = 0; i < b->n; i++) free(b->data[i]);
  b->n = 0;
}

/* Contents to the device, where there is one. */
static inline void upload_all(buffers *b) {
  rg_error e = {0};
  for (int i = 0; i < b->n; i++) {
    if (!test_on_gpu()) {
      b->device[i] = b->data[i];
      continue;
    }
    if (!b->device[i])
      CR_OK(rg_memory_alloc(b->plan, (size_t)b->info[i].bytes + 16, &b->device[i], &e), &e);
    CR_OK(rg_memory_write(b->plan, b->device[i], b->data[i], (size_t)b->info[i].bytes, &e), &e);
  }
}

static inline void bind_all(rg_session *s, buffers *b) {
  rg_error e = {0};
  upload_all(b);
  for (int i = 0; i < b->n; i++)
    CR_OK(rg_session_bind(s, b->info[i].role, b->info[i].name, b->device[i],
                          (size_t)b->info[i].bytes, &e),
          &e);
}

/* Brings back what is on the device. */
static inline void read_all(buffers *b) {
  rg_error e = {0};
  for (int i = 0; i < b->n; i++)
    if (b->device[i] != b->data[i] && b->device[i])
      CR_OK(rg_memory_read(b->plan, b->data[i], b->device[i], (size_t)b->info[i].bytes, &e), &e);
}
/* Waits for the session and brings results back. */
static inline void fetch_all(rg_session *s, buffers *b) {
  rg_error e = {0};
  CR_OK(rg_session_synchronize(s, &e), &e);
  read_all(b);
}
/* Contents of a role to the device, as they are now. */
static inline void upload_role(buffers *b, rg_role role) {
  rg_error e = {0};
  for (int i = 0; i < b->n; i++)
    if (b->info[i].role == role && b->device[i] != b->data[i] && b->device[i])
      CR_OK(rg_memory_write(b->plan, b->device[i], b->data[i], (size_t)b->info[i].bytes, &e), &e);
}
/* A forward on the inputs as they are now; all that came of it is back when it returns, whatever
 * was wrong with contents: on a GPU that is said when one waits for the run. */
static inline rg_status try_forward(rg_session *s, buffers *b, rg_error *e) {
  upload_role(b, RG_INPUT);
  rg_status status = rg_session_forward(s, e);
  if (status == RG_OK) status = rg_session_synchronize(s, e);
  read_all(b);
  return status;
}

static inline void *buffer(const buffers *b, rg_role role, const char *name) {
  for (int i = 0; i < b->n; i++)
    if (b->info[i].role == role && strcmp(b->info[i].name, name) == 0) return b->data[i];
  cr_assert(false, "no tensor %s of role %d", name, role);
  return NULL;
}

/* Results (outputs and gradients of inputs) are the same bits. `what` names the comparison in the
 * message. */
static inline void same_results(const buffers *a, const buffers *b, const char *what) {
  int compared = 0;
  cr_assert_eq(a->n, b->n, "%s", what);
  for (int i = 0; i < a->n; i++) {
    if (a->info[i].role != RG_OUTPUT && a->info[i].role != RG_GRAD_OUT) continue;
    const unsigned char *x = a->data[i], *y = buffer(b, a->info[i].role, a->info[i].name);
    int64_t first = -1, last = 0, n = 0;
    for (int64_t k = 0; k < a->info[i].bytes; k++)
      if (x[k] != y[k]) first = first < 0 ? k : first, last = k, n++;
    uint32_t was = 0, is = 0; /* the first word that differs */
    const size_t at = first < 0 ? 0 : (size_t)first / 4 * 4, left = (size_t)a->info[i].bytes - at;
    memcpy(&was, x + at, left < 4 ? left : 4), memcpy(&is, y + at, left < 4 ? left : 4);
    cr_assert_eq(
        n, 0, "%s: %s %s of %lld bytes: %lld differ, from %lld to %lld, first %08x and %08x", what,
        a->info[i].role == RG_OUTPUT ? "output" : "gradient of", a->info[i].name,
        (long long)a->info[i].bytes, (long long)n, (long long)first, (long long)last, was, is);
    compared++;
  }
  cr_assert_gt(compared, 0, "%s", what);
}

/* Every result is finite. */
static inline void finite_results(const buffers *b, const char *what) {
  for (int i = 0; i < b->n; i++) {
    if (b->info[i].role != RG_OUTPUT && b->info[i].role != RG_GRAD_OUT) continue;
    size_t n = (size_t)b->info[i].bytes / rg_dtype_size(b->info[i].dtype);
    float *x = malloc(n * sizeof *x + 4);
    rg_convert(RG_F32, x, b->info[i].dtype, b->data[i], n);
    double sum = 0;
    for (size_t k = 0; k < n; k++) {
      cr_assert(x[k] - x[k] == 0, "%s: %s[%zu] is %g", what, b->info[i].name, k, x[k]);
      sum += x[k] < 0 ? -x[k] : x[k];
    }
    cr_assert_gt(sum, 0, "%s: %s is all zero", what, b->info[i].name);
    free(x);
  }
}

static inline void run_both(rg_session *s) {
  rg_error e = {0};
  CR_OK(rg_session_forward(s, &e), &e);
  CR_OK(rg_session_backward(s, &e), &e);
}

#endif
