/* tests/unit/test_offload.c: what a policy offloads waits in the host's memory and comes back to
 * the bit; the arena shrinks by it, and the host block is as large as said. Random graphs of it are
 * among those of test_graph. */
#include "recompute/search.h"
#include "run_util.h"

enum { T = 300, B = 3 };
static const int lengths[B] = {147, 0, 138}; /* rows 285 … 299 are past the last live token */

typedef struct subject {
  rg_context *ctx;
  rg_spec *spec;
  buffers kept;
  rg_plan *plan; /* everything kept */
} subject;

static rg_plan *plan_with(const subject *x, const char *text) {
  rg_policy *policy = text ? load_policy(x->ctx, text) : NULL;
  rg_plan *plan = make_plan(x->spec, policy, T, B, 2);
  rg_policy_destroy(policy);
  return plan;
}

static rg_sizes sizes_of(const rg_plan *plan) {
  rg_sizes z;
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  cr_assert_eq(z.predicted_peak, z.saved + z.scratch);
  return z;
}

static void run(const rg_plan *plan, const rg_session_options *o, buffers *b) {
  rg_error e = {0};
  rg_session *s;
  make_buffers(plan, 7, T, lengths, b);
  CR_OK(rg_session_create(plan, o, &s, &e), &e);
  bind_all(s, b);
  run_both(s);
  fetch_all(s, b);
  if (o && o->debug_poison) {
    const rg_sizes z = sizes_of(plan);
    int64_t saved, scratch;
    cr_assert_eq(rg_session_touched(s, &saved, &scratch), RG_OK);
    cr_assert_eq(saved, z.saved);
    cr_assert_eq(scratch, z.scratch);
  }
  rg_session_destroy(s);
}

static subject open_nsa(const char *dtype) {
  static char text[8192];
  rg_error e = {0};
  subject x = {0};
  CR_OK(rg_context_create(NULL, &x.ctx, &e), &e);
  x.spec = load_spec(x.ctx, nsa_spec(dtype, false, text, sizeof text));
  x.plan = plan_with(&x, NULL);
  run(x.plan, NULL, &x.kept);
  return x;
}

static void close_nsa(subject *x) {
  free_buffers(&x->kept);
  rg_plan_destroy(x->plan);
  rg_spec_destroy(x->spec);
  rg_context_destroy(x->ctx);
}

static char *blocks(int64_t size, int n) {
  void *p;
  cr_assert_eq(posix_memalign(&p, 256, (size_t)n * (size_t)(size + 256)), 0);
  memset(p, 0x5b, (size_t)n * (size_t)(size + 256));
  return p;
}

/* Bits of every result, bytes of every block, with memory of the session's own and of the
 * caller's. */
static rg_sizes check(const subject *x, const char *policy) {
  rg_plan *plan = plan_with(x, policy);
  const rg_sizes z = sizes_of(plan);
  buffers b;
  run(plan, &(rg_session_options){.debug_poison = true}, &b);
  same_results(&x->kept, &b, policy);
  free_buffers(&b);
  char *host = blocks(z.host, 1);
  run(plan, &(rg_session_options){.host = z.host ? host : NULL}, &b);
  same_results(&x->kept, &b, policy);
  free_buffers(&b);
  int64_t touched = z.host + 256;
  while (touched > 0 && host[touched - 1] == 0x5b) touched--;
  cr_assert(touched <= z.host && touched > z.host - 16, "%s: %lld of %lld", policy,
            (long long)touched, (long long)z.host);
  free(host);
  rg_plan_destroy(plan);
  return z;
}

static void each_node(const char *dtype) {
  subject x = open_nsa(dtype);
  const rg_sizes none = sizes_of(x.plan);
  char text[256];
  for (int i = 0; i < NSA_NODES - 1; i++) {
    snprintf(text, sizeof text, "{\"regraph_policy\": 1, \"nodes\": {\"%s\": \"offload\"}}",
             nsa_nodes[i]);
    const rg_sizes z = check(&x, text);
    cr_assert(z.host > 0 && z.saved < none.saved, "%s", nsa_nodes[i]);
    cr_assert_leq(none.saved - z.saved, z.host + 512, "%s frees more than it moves", nsa_nodes[i]);
  }
  const rg_sizes all = check(&x, "{\"regraph_policy\": 1, \"nodes\": {\"*\": \"offload\"}}");
  cr_assert_lt(all.predicted_peak, none.predicted_peak);
  cr_assert_leq(all.saved, 256, "only lengths stay");
  close_nsa(&x);
}

Test(offload, each_node) {
  each_node("f32");
}
Test(offload, each_node_bf16) {
  each_node("bf16");
}

Test(offload, with_everything_else) {
  static const char *const policy[] = {
      "{\"regraph_policy\": 1, \"nodes\": {\"*\": \"offload\"}, \"split_heads\": 1}",
      "{\"regraph_policy\": 1, \"nodes\": {\"*_o\": \"offload\"}, \"preset\": \"all\"}",
      "{\"regraph_policy\": 1, \"nodes\": {\"*_o\": \"offload\", \"swa_o\": \"recompute\"}}",
      "{\"regraph_policy\": 1, \"nodes\": {\"slc_o\": \"offload\"}, \"recompute\": [\"cmp_o\", "
      "\"topk\"]}",
      "{\"regraph_policy\": 1, \"nodes\": {\"cmp_o\": \"offload\"}, \"budget\": \"least\"}",
      "{\"regraph_policy\": 1, \"nodes\": {\"slc_o\": \"offload\"}, \"budget\": \"least\", "
      "\"split_heads\": 1}"};
  subject x = open_nsa("f32");
  for (size_t i = 0; i < sizeof policy / sizeof *policy; i++) check(&x, policy[i]);
  /* no more than the least without it */
  rg_plan *plan = plan_with(&x, "{\"regraph_policy\": 1, \"budget\": \"least\"}");
  const int64_t least = sizes_of(plan).predicted_peak;
  rg_plan_destroy(plan);
  plan = plan_with(&x, policy[4]);
  cr_assert_leq(sizes_of(plan).predicted_peak, least);
  rg_plan_destroy(plan);
  close_nsa(&x);
}

/* What is computed again reads what comes back: nothing that is away is kept for it. */
Test(offload, computed_again_from_what_comes_back) {
  static const char again[] = "{\"regraph_policy\": 1, \"recompute\": [\"cmp_o\", \"topk\"]}";
  static const char both[] = "{\"regraph_policy\": 1, \"recompute\": [\"cmp_o\", \"topk\"], "
                             "\"nodes\": {\"compress_kv\": \"offload\"}}";
  subject x = open_nsa("f32");
  const rg_sizes kept = check(&x, again), away = check(&x, both);
  cr_assert_gt(away.host, 0);
  cr_assert_leq(away.saved, kept.saved - away.host + 512);
  close_nsa(&x);
}

/* Two calls in flight, each with a saved and a host block; and what is refused. */
Test(offload, microbatches) {
  subject x = open_nsa("f32");
  rg_plan *plan = plan_with(&x, "{\"regraph_policy\": 1, \"nodes\": {\"*\": \"offload\"}}");
  const rg_sizes z = sizes_of(plan);
  char *saved = blocks(z.saved + 256 - z.saved % 256, 2),
       *host = blocks(z.host + 256 - z.host % 256, 2);
  const int64_t next_saved = z.saved + 512 - z.saved % 256, next_host = z.host + 512 - z.host % 256;
  rg_error e = {0};
  rg_session *s;
  buffers b[2];
  CR_OK(rg_session_create(plan, &(rg_session_options){.saved = saved, .host = host}, &s, &e), &e);
  for (int i = 0; i < 2; i++) make_buffers(plan, 7, T, lengths, &b[i]);
  bind_all(s, &b[0]);
  CR_OK(rg_session_forward(s, &e), &e);
  bind_all(s, &b[1]);
  CR_OK(rg_session_bind_saved(s, saved + next_saved, &e), &e);
  cr_assert_eq(rg_session_forward(s, &e), RG_E_USAGE);
  cr_assert(strstr(e.message, "has no host block"), "%s", e.message);
  e = (rg_error){0};
  cr_assert_eq(rg_session_bind_host(s, host + 8, &e), RG_E_USAGE);
  e = (rg_error){0};
  cr_assert_eq(rg_session_bind_host(s, NULL, &e), RG_E_USAGE); /* it has none of its own */
  e = (rg_error){0};
  CR_OK(rg_session_bind_host(s, host + next_host, &e), &e);
  CR_OK(rg_session_forward(s, &e), &e);
  CR_OK(rg_session_bind_saved(s, saved, &e), &e);
  bind_all(s, &b[0]);
  CR_OK(rg_session_backward(s, &e), &e);
  CR_OK(rg_session_bind_saved(s, saved + next_saved, &e), &e);
  bind_all(s, &b[1]);
  CR_OK(rg_session_backward(s, &e), &e);
  for (int i = 0; i < 2; i++) {
    fetch_all(s, &b[i]);
    same_results(&x.kept, &b[i], i ? "second" : "first");
  }
  /* a host block named for another saved block takes the forward before with it */
  CR_OK(rg_session_bind_host(s, host, &e), &e);
  CR_OK(rg_session_bind_saved(s, saved, &e), &e);
  cr_assert_eq(rg_session_backward(s, &e), RG_E_USAGE);
  e = (rg_error){0};
  cr_assert_eq(rg_session_adopt_saved(s, saved, &e), RG_E_USAGE);
  e = (rg_error){0};
  /* nor may a result stand there */
  CR_OK(rg_session_bind_host(s, host, &e), &e);
  for (int i = 0; i < b[0].n; i++)
    if (b[0].info[i].role == RG_OUTPUT && b[0].info[i].bytes <= z.host)
      CR_OK(rg_session_bind(s, RG_OUTPUT, b[0].info[i].name, host, (size_t)b[0].info[i].bytes, &e),
            &e);
  cr_assert_eq(rg_session_forward(s, &e), RG_E_USAGE);
  cr_assert(strstr(e.message, "the host block"), "%s", e.message);
  rg_session_destroy(s);
  for (int i = 0; i < 2; i++) free_buffers(&b[i]);
  free(saved);
  free(host);
  rg_plan_destroy(plan);
  close_nsa(&x);
}

Test(offload, bounded) {
  subject x = open_nsa("f32");
  rg_plan *plan = plan_with(&x, "{\"regraph_policy\": 1, \"nodes\": {\"*_o\": \"offload\"}}");
  const int64_t host = sizes_of(plan).host;
  rg_plan_destroy(plan);
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rg_plan_options o = {.set = set, .nset = 2};
  for (int less = 0; less < 2; less++) {
    char text[256];
    rg_error e = {0};
    snprintf(text, sizeof text,
             "{\"regraph_policy\": 1, \"nodes\": {\"*_o\": \"offload\"}, \"host\": %lld}",
             (long long)host - less);
    rg_policy *policy = load_policy(x.ctx, text);
    cr_assert_eq(rg_plan_create(x.spec, policy, &o, &plan, &e), less ? RG_E_INFEASIBLE : RG_OK);
    if (less) cr_assert_str_eq(e.pointer, "/host");
    rg_plan_destroy(plan);
    rg_text front;
    e = (rg_error){0};
    cr_assert_eq(rg_pareto(x.spec, policy, &o, "text", &front, &e), less ? RG_E_INFEASIBLE : RG_OK,
                 "%s", e.message);
    if (less) cr_assert_str_eq(e.pointer, "/host");
    rg_text_destroy(&front);
    o.device = "cuda"; /* the same for a GPU */
    e = (rg_error){0};
    cr_assert_eq(rg_plan_create(x.spec, policy, &o, &plan, &e), less ? RG_E_INFEASIBLE : RG_OK);
    rg_plan_destroy(plan);
    o.device = NULL;
    rg_policy_destroy(policy);
  }
  close_nsa(&x);
}

/* A copy wanted at 15 whose window would begin within the step that ends at 10: it waits for that
 * end if a tenth of the copy is left to spare then, and goes before the step if not. */
Test(offload, back_behind_a_step_if_there_is_time) {
  rg_context *ctx;
  rg_error e;
  cr_assert_eq(rg_context_create(NULL, &ctx, &e), RG_OK);
  rgi_arena *a = rgi_arena_create(ctx);

  rgi_lane w;
  cr_assert_eq(rgi_lane_open(&w, 4, a, &e), RG_OK);
  static const struct {
    double copy;
    int place;
  } cases[] = {{3.9, 1}, {4.5, 1}, {4.8, 0}, {4.95, 0}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const double ms[4] = {10, 5, cases[i].copy, 1};
    for (int k = 0; k < 4; k++) w.ms[k] = ms[k], w.copy[k] = k == 2;
    w.n = 4;
    cr_assert_eq(rgi_lane_place(&w, true), 0);
    cr_assert_eq(w.next[cases[i].place], 2, "%g", cases[i].copy);
  }
  rgi_arena_destroy(a);
  rg_context_destroy(ctx);
}

/* The names in [ … ] behind a key, with `value` behind each, into `out`. */
static const char *names_behind(const char *at, const char *key, const char *value, char *out) {
  at = strstr(at, key);
  cr_assert_not_null(at, "%s", key);
  at = strchr(at, '[') + 1;
  for (*out = 0; *at != ']';) {
    const char *end = strchr(at + 1, '"') + 1; /* at a name's first quote */
    out += sprintf(out, "%.*s%s", (int)(end - at), at, value);
    at = end;
    if (*at == ',') at += 2, out += sprintf(out, ", ");
  }
  return at;
}

/* With `host` the front knows both: written as a policy, each of its points is a plan of these
 * bytes, and one of them needs the host. */
Test(offload, points_of_a_front) {
  subject x = open_nsa("f32");
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  const rg_plan_options o = {.set = set, .nset = 2, .threads = 2};
  rg_policy *policy = load_policy(x.ctx, "{\"regraph_policy\": 1, \"host\": \"1GiB\"}");
  rg_text front;
  rg_error e = {0};
  int points = 0, offload = 0;
  CR_OK(rg_pareto(x.spec, policy, &o, "json", &front, &e), &e);
  long long last = INT64_MAX;
  for (const char *at = front.data; (at = strstr(at, "\"peak_bytes\": "));) {
    long long peak, saved, host;
    char again[1024], away[1024], text[4096];
    cr_assert_eq(sscanf(at, "\"peak_bytes\": %lld, \"saved_bytes\": %lld", &peak, &saved), 2);
    cr_assert_lt(peak, last);
    last = peak;
    names_behind(at, "\"recompute\"", "", again);
    cr_assert_eq(sscanf(strstr(at, "\"host_bytes\""), "\"host_bytes\": %lld", &host), 1);
    at = names_behind(at, "\"offload\"", ": \"offload\"", away);
    points++;
    offload += host > 0;
    cr_assert_eq(host > 0, *away != 0);
    snprintf(text, sizeof text, "{\"regraph_policy\": 1, \"recompute\": [%s], \"nodes\": {%s}}",
             again, away);
    rg_plan *plan = plan_with(&x, text);
    const rg_sizes z = sizes_of(plan);
    cr_assert(z.predicted_peak == peak && z.saved == saved && z.host == host,
              "%s: %lld, %lld, %lld on the front, %lld, %lld, %lld as a plan", text, peak, saved,
              host, (long long)z.predicted_peak, (long long)z.saved, (long long)z.host);
    rg_plan_destroy(plan);
  }
  cr_assert(points > 2 && offload > 0, "%d points, %d that offload", points, offload);
  rg_text_destroy(&front);
  rg_policy_destroy(policy);
  close_nsa(&x);
}
