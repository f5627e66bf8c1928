/* tests/unit/test_plugin.c: plugins. The built example (RG_TEST_PLUGIN) loads and takes part in
 * everything a stock op does; one of another ABI (RG_TEST_PLUGIN_BAD_ABI), missing files and
 * unsound tables are refused with a reason, and leave the context as it was. */
#include "../../graph/plugin.h"
#include <criterion/criterion.h>
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK(call, e) cr_assert_eq((call), RG_OK, "%s: %s", (e).file, (e).message)

static rg_context *context(void) {
  rg_context *ctx;
  cr_assert_eq(rg_context_create(NULL, &ctx, NULL), RG_OK);
  return ctx;
}

static bool sorted(const rg_context *ctx) {
  for (int i = 1; i < ctx->nop; i++)
    if (strcmp(ctx->op[i - 1]->name, ctx->op[i]->name) >= 0) return false;
  return true;
}

/* ---- loading ---- */

Test(plugin, example_loads) {
  rg_error e = {0};
  rg_context *ctx = context();
  int before = ctx->nop;
  cr_assert_null(rgi_find_op(ctx, "hard_sigmoid"));
  OK(rg_plugin_load(ctx, RG_TEST_PLUGIN, &e), e);
  cr_assert_eq(ctx->nop, before + 2);
  cr_assert(sorted(ctx));
  cr_assert_not_null(rgi_find_op(ctx, "hard_sigmoid"));
  cr_assert_not_null(rgi_find_op(ctx, "hard_sigmoid.bwd"));
  cr_assert_not_null(rgi_find_op(ctx, "swa_attn"));
  const char *what[] = {"ops", "ops-json", "schema-spec"};
  for (int i = 0; i < 3; i++) {
    rg_text text = {0};
    OK(rg_describe(ctx, what[i], &text, &e), e);
    cr_assert_not_null(strstr(text.data, "hard_sigmoid"), "%s does not mention the plugin's op",
                       what[i]);
    rg_text_destroy(&text);
  }
  rg_context_destroy(ctx);
}

/* A context of its own each: plugins are no business of the process. */
Test(plugin, contexts_are_apart) {
  rg_error e = {0};
  rg_context *with = context(), *without = context(), *third = context();
  OK(rg_plugin_load(with, RG_TEST_PLUGIN, &e), e);
  cr_assert_null(rgi_find_op(without, "hard_sigmoid"));
  OK(rg_plugin_load(third, RG_TEST_PLUGIN, &e), e);
  rg_context_destroy(with);
  cr_assert_str_eq(rgi_find_op(third, "hard_sigmoid")->name, "hard_sigmoid"); /* still mapped */
  rg_context_destroy(third);
  rg_context_destroy(without);
}

static void refused(rg_context *ctx, const char *path, rg_status status, const char *word) {
  rg_error e = {0};
  int before = ctx->nop;
  cr_assert_eq(rg_plugin_load(ctx, path, &e), status, "%s: %s", path, rg_status_name(e.status));
  cr_assert_eq(e.status, status);
  cr_assert_str_eq(e.file, path);
  cr_assert_not_null(strstr(e.message, word), "\"%s\" lacks \"%s\"", e.message, word);
  cr_assert_eq(ctx->nop, before);
  cr_assert(sorted(ctx));
}

Test(plugin, refusals) {
  rg_context *ctx = context();
  Dl_info math;
  refused(ctx, RG_TEST_PLUGIN_BAD_ABI, RG_E_PLUGIN, "op ABI 4, this regraph has 3: rebuild");
  refused(ctx, RG_BINARY_DIR "/no_such_plugin.so", RG_E_IO, "No such file");
  refused(ctx, "no_such_plugin.so", RG_E_IO, "No such file");
  refused(ctx, RG_SOURCE_DIR "/examples/nsa.json", RG_E_PLUGIN, "can't load the plugin");
  cr_assert(dladdr((void *)(uintptr_t)&cosh, &math));
  refused(ctx, math.dli_fname, RG_E_PLUGIN, "does not export \"regraph_plugin\"");
  rg_error e = {0};
  OK(rg_plugin_load(ctx, RG_TEST_PLUGIN, &e), e);
  refused(ctx, RG_TEST_PLUGIN, RG_E_PLUGIN, "one of that name already");
  cr_assert_not_null(rgi_find_op(ctx, "hard_sigmoid"));
  rg_context_destroy(ctx);
}

Test(plugin, misuse) {
  rg_error e = {0};
  rg_context *ctx = context();
  cr_assert_eq(rg_plugin_load(NULL, RG_TEST_PLUGIN, &e), RG_E_USAGE);
  cr_assert_eq(rg_plugin_load(ctx, NULL, NULL), RG_E_USAGE);
  rg_plugin_load(ctx, RG_TEST_PLUGIN_BAD_ABI, &e);
  cr_assert_eq(e.status, RG_E_USAGE, "the first error wins");
  rg_context_destroy(ctx);
}

/* ---- host memory that runs out ---- */

struct rationed {
  int left, live;
};
static void *rationed_alloc(void *user, size_t size) {
  struct rationed *r = user;
  if (r->left-- <= 0) return NULL;
  r->live++;
  return malloc(size);
}
static void rationed_free(void *user, void *p) {
  ((struct rationed *)user)->live--;
  free(p);
}

Test(plugin, every_allocation_may_fail) {
  struct rationed r = {.left = 1000};
  rg_allocator host = {rationed_alloc, rationed_free, &r};
  rg_status status = RG_E_NOMEM;
  int n = 0;
  for (; status == RG_E_NOMEM; n++) {
    rg_context *ctx;
    rg_error e = {0};
    r.left = 1000;
    cr_assert_eq(rg_context_create(&host, &ctx, NULL), RG_OK);
    r.left = n;
    status = rg_plugin_load(ctx, RG_TEST_PLUGIN, &e);
    cr_assert_eq(e.status, status);
    cr_assert_eq(rgi_find_op(ctx, "hard_sigmoid") != NULL, status == RG_OK);
    rg_context_destroy(ctx);
    cr_assert_eq(r.live, 0);
  }
  cr_assert_eq(status, RG_OK);
  cr_assert_gt(n, 3);
}

/* ---- tables ---- */

static rg_status no_run(const rg_call *c) {
  (void)c;
  return RG_OK;
}
static void no_cost(const rg_call *c, rg_cost *out) {
  (void)c;
  (void)out;
}

/* A sound op "twice" with its backward op, to be spoilt one way at a time. */
typedef struct sample {
  rg_port in[2], out[1], bwd_in[3], bwd_out[1];
  rg_attr attrs[2];
  const char *choices[3];
  rg_op op, bwd;
  const rg_op *ops[3];
  rg_plugin plugin;
} sample;

static void fill(sample *s) {
  const uint32_t rows = RG_PORT_ROWS;
  *s = (sample){
      .in = {{"x", "T,N", rows, RG_D_FLOAT, 'F', 1, "x"},
             {"cu_seqlens", "B1", RG_PORT_SEQLENS | RG_PORT_OPTIONAL, RG_D(RG_I32), 0, -1,
              "starts"}},
      .out = {{"y", "T,(N+1)/part", rows, RG_D_FLOAT, 'F', 1, "y"}},
      .bwd_in = {{"x", "T,N", rows, RG_D_FLOAT, 'F', 1, "x"},
                 {"grad.y", "T,M", rows, RG_D_FLOAT, 'F', 1, "dy"},
                 {"acc.x", "T,N", rows | RG_PORT_OPTIONAL, RG_D(RG_F32), 0, 1, "sum"}},
      .bwd_out = {{"d.x", "T,N", rows | RG_PORT_GRAD, RG_D_FLOAT, 'F', 1, "dx"}},
      .choices = {"one", "two", NULL},
      .attrs = {{"part", RG_ATTR_INT, false, 1, 8, 2, NULL, "parts"},
                {"mode", RG_ATTR_ENUM, false, 0, 0, 1, s->choices, "mode"}},
  };
  s->op = (rg_op){.abi = RG_OP_ABI,
                  .name = "twice",
                  .doc = "twice",
                  .in = s->in,
                  .nin = 2,
                  .out = s->out,
                  .nout = 1,
                  .attrs = s->attrs,
                  .nattr = 2,
                  .cost = no_cost,
                  .run_cpu = no_run,
                  .backward = "twice.bwd"};
  s->bwd = (rg_op){.abi = RG_OP_ABI,
                   .name = "twice.bwd",
                   .doc = "its gradient",
                   .flags = RG_OP_INTERNAL,
                   .in = s->bwd_in,
                   .nin = 3,
                   .out = s->bwd_out,
                   .nout = 1,
                   .attrs = s->attrs,
                   .nattr = 2,
                   .cost = no_cost,
                   .run_cpu = no_run};
  s->ops[0] = &s->op;
  s->ops[1] = &s->bwd;
  s->plugin = (rg_plugin){.abi = RG_OP_ABI, .name = "sample", .ops = s->ops, .nop = 2};
}

Test(plugin, sound_tables_pass) {
  rg_error e = {0};
  rg_context *ctx = context();
  sample s;
  fill(&s);
  OK(rgi_plugin_add(ctx, &s.plugin, &e), e);
  cr_assert(sorted(ctx));
  cr_assert_eq(rgi_find_op(ctx, "twice"), &s.op);
  rg_context_destroy(ctx);
}

#define SPOILT(change, word)                                                                       \
  do {                                                                                             \
    sample s;                                                                                      \
    rg_error e = {0};                                                                              \
    fill(&s);                                                                                      \
    change;                                                                                        \
    int before = ctx->nop;                                                                         \
    cr_assert_eq(rgi_plugin_add(ctx, &s.plugin, &e), RG_E_PLUGIN, "passed: " #change);             \
    cr_assert_not_null(strstr(e.message, word), #change ": \"%s\" lacks \"%s\"", e.message, word); \
    cr_assert_eq(ctx->nop, before);                                                                \
  } while (0)

Test(plugin, unsound_tables_do_not) {
  rg_context *ctx = context();
  SPOILT(s.plugin.abi = 0, "op ABI 0");
  SPOILT(s.plugin.nop = 0, "0 ops");
  SPOILT(s.plugin.name = NULL, "a name");
  SPOILT(s.ops[1] = NULL, "op 1 is NULL");
  SPOILT(s.bwd.abi = 9, "op ABI 9");
  SPOILT(s.op.name = "2fold", "\"2fold\"");
  SPOILT(s.op.name = NULL, "(null)");
  /* what a terminal would obey is escaped */
  SPOILT(s.op.name = "a\x1b[31m\nb", "\"a\\x1b[31m\\nb\"");
  SPOILT(s.op.name = "swa_attn", "already");
  SPOILT(s.bwd.name = "twice", "occurs twice");
  SPOILT(s.op.run_cpu = NULL, "run_cpu");
  SPOILT(s.op.cost = NULL, "cost");
  SPOILT(s.op.doc = NULL, "doc line");
  SPOILT(s.op.flags = RG_OP_VIEW, "views");
  SPOILT(s.op.nin = -1, "-1 in-ports");
  SPOILT(s.op.nout = 0, "no out-port");
  SPOILT(s.op.out = NULL, "out-ports");
  SPOILT(s.in[1].name = "x", "occurs twice");
  SPOILT(s.in[1].name = "a b", "\"a b\"");
  SPOILT(s.in[0].shape = NULL, "lacks a shape");
  SPOILT(s.in[0].doc = NULL, "doc line");
  SPOILT(s.in[0].flags |= 1 << 20, "unknown flags 0x100000");
  SPOILT(s.in[0].dtypes = 0, "dtype set 0x0");
  SPOILT(s.in[0].dtypes = 1 << 9, "dtype set 0x200");
  SPOILT(s.in[0].type = 7, "dtype variable 7");
  SPOILT(s.in[1].dtypes = RG_D_FLOAT, "lengths");
  SPOILT(s.in[0].head_axis = 2, "head_axis 2");
  SPOILT(s.out[0].head_axis = -2, "head_axis -2");
  SPOILT(s.out[0].shape = "T,Q", "\"Q\"");
  SPOILT(s.out[0].shape = "T,N/mode", "\"mode\"");
  SPOILT(s.out[0].shape = "T,(N", "')'");
  SPOILT(s.out[0].shape = "T,", "head_axis 1");
  SPOILT(s.out[0].shape = "...", "\"...\"");
  SPOILT(s.out[0].shape = "T,N,N,N,N,N,N,N,N", "more than 8 axes");
  SPOILT(s.in[0].shape = "T,A_NAME_OF_MORE_THAN_TWENTY", "longer than 20");
  SPOILT(s.in[0].shape = "T,N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N+N",
         "longer than 60");
  SPOILT(s.out[0].flags |= RG_PORT_LIST, "is a list");
  SPOILT(s.op.nattr = 99, "99 attributes");
  SPOILT(s.attrs[1].name = "part", "occurs twice");
  SPOILT(s.attrs[0].name = "", "attribute 0");
  SPOILT(s.attrs[0].doc = NULL, "doc line");
  SPOILT(s.attrs[0].type = (rg_attr_type)17, "unknown type 17");
  SPOILT(s.attrs[0].min = 9, "above max");
  SPOILT(s.attrs[0].def = 0, "default 0");
  SPOILT(s.attrs[1].choices = NULL, "0 choices");
  SPOILT(s.attrs[1].def = 2, "default 2");
  SPOILT(s.op.backward = "thrice.bwd", "thrice.bwd");
  SPOILT(s.bwd.nattr = 1, "other attributes");
  SPOILT(s.bwd_in[0].name = "z", "\"z\"");
  SPOILT(s.bwd_in[1].name = "grad.x", "\"grad.x\"");
  SPOILT(s.bwd_in[2].flags |= RG_PORT_LIST, "\"acc.x\"");
  SPOILT(s.bwd_out[0].name = "x", "\"x\"");
  SPOILT(s.bwd_out[0].flags = RG_PORT_ROWS, "RG_PORT_GRAD");
  rg_context_destroy(ctx);
}

/* ---- running ---- */

enum { T = 70, LIVE = 67, H = 4, KH = 2, D = 16, N = 2 };

typedef struct run {
  float q[T * H * D], k[T * KH * D], v[T * KH * D], gate[T * H * N], o[T * H * D], d_o[T * H * D],
      dgate[T * H * N];
  float dq[T * H * D], dk[T * KH * D], dv[T * KH * D];
  int32_t cu[3];
} run;

static void run_spec(rg_context *ctx, const char *path, const char *text, const char *policy_text,
                     run *r) {
  static const rg_binding set[] = {{"T", T, NULL},      {"B", 2, NULL},     {"H", H, NULL},
                                   {"KH", KH, NULL},    {"D", D, NULL},     {"DV", D, NULL},
                                   {"window", 7, NULL}, {"dtype", 0, "f32"}};
  rg_error e = {0};
  rg_spec *spec;
  rg_policy *policy;
  rg_plan *plan;
  rg_session *session;
  if (path)
    OK(rg_spec_load_file(ctx, path, set, 8, &spec, &e), e);
  else
    OK(rg_spec_load_text(ctx, text, strlen(text), "text", set, 2, &spec, &e), e);
  OK(rg_policy_load_text(ctx, policy_text, strlen(policy_text), "policy", &policy, &e), e);
  OK(rg_plan_create(spec, policy, &(rg_plan_options){.threads = 2}, &plan, &e), e);
  OK(rg_session_create(plan, &(rg_session_options){.debug_poison = true}, &session, &e), e);
  OK(rg_session_bind(session, RG_INPUT, "q", r->q, sizeof r->q, &e), e);
  OK(rg_session_bind(session, RG_INPUT, "k", r->k, sizeof r->k, &e), e);
  OK(rg_session_bind(session, RG_INPUT, "v", r->v, sizeof r->v, &e), e);
  OK(rg_session_bind(session, RG_INPUT, "gate", r->gate, sizeof r->gate, &e), e);
  OK(rg_session_bind(session, RG_INPUT, "cu_seqlens", r->cu, sizeof r->cu, &e), e);
  OK(rg_session_bind(session, RG_OUTPUT, "o", r->o, sizeof r->o, &e), e);
  OK(rg_session_bind(session, RG_GRAD_IN, "o", r->d_o, sizeof r->d_o, &e), e);
  OK(rg_session_bind(session, RG_GRAD_OUT, "gate", r->dgate, sizeof r->dgate, &e), e);
  OK(rg_session_bind(session, RG_GRAD_OUT, "q", r->dq, sizeof r->dq, &e), e);
  OK(rg_session_bind(session, RG_GRAD_OUT, "k", r->dk, sizeof r->dk, &e), e);
  OK(rg_session_bind(session, RG_GRAD_OUT, "v", r->dv, sizeof r->dv, &e), e);
  OK(rg_session_forward(session, &e), e);
  OK(rg_session_backward(session, &e), e);
  rg_session_destroy(session);
  rg_plan_destroy(plan);
  rg_policy_destroy(policy);
  rg_spec_destroy(spec);
}

static void draw(run *r, float gate_scale) {
  uint32_t state = 12345;
  float *part[] = {r->q, r->k, r->v, r->d_o, r->gate};
  const int size[] = {T * H * D, T * KH * D, T * KH * D, T * H * D, T * H * N};
  memset(r, 0, sizeof *r);
  for (int p = 0; p < 5; p++)
    for (int i = 0; i < size[p]; i++) {
      state = state * 1664525u + 1013904223u;
      part[p][i] = ((float)(state >> 8) / 8388608.0f - 1) * (p == 4 ? gate_scale : 2);
    }
  r->cu[1] = 30;
  r->cu[2] = LIVE;
}

/* The same graph with the activation done here, by hand. */
static const char by_hand[] =
    "{ \"regraph\": 1, \"name\": \"by_hand\",\n"
    "  \"inputs\": {\n"
    "    \"q\": { \"shape\": [\"T\", 4, 16], \"dtype\": \"f32\", \"grad\": true },\n"
    "    \"k\": { \"shape\": [\"T\", 2, 16], \"dtype\": \"f32\", \"grad\": true },\n"
    "    \"v\": { \"shape\": [\"T\", 2, 16], \"dtype\": \"f32\", \"grad\": true },\n"
    "    \"gate\": { \"shape\": [\"T\", 4, 2], \"dtype\": \"f32\", \"grad\": true },\n"
    "    \"cu_seqlens\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } },\n"
    "  \"nodes\": [\n"
    "    { \"name\": \"near\", \"op\": \"swa_attn\",\n"
    "      \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": \"v\", \"cu_seqlens\": \"cu_seqlens\" },\n"
    "      \"out\": { \"o\": \"near_o\" }, \"attrs\": { \"window_left\": 7 } },\n"
    "    { \"name\": \"full\", \"op\": \"swa_attn\",\n"
    "      \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": \"v\", \"cu_seqlens\": \"cu_seqlens\" },\n"
    "      \"out\": { \"o\": \"full_o\" }, \"attrs\": { \"window_left\": -1 } },\n"
    "    { \"name\": \"combine\", \"op\": \"combine\",\n"
    "      \"in\": { \"o\": [\"near_o\", \"full_o\"], \"gate\": \"gate\", \"cu_seqlens\": "
    "\"cu_seqlens\" },\n"
    "      \"out\": { \"o\": \"o\" }, \"attrs\": { \"act\": \"none\" } } ],\n"
    "  \"outputs\": { \"o\": \"o\" } }\n";

static const char keep[] = "{ \"regraph_policy\": 1, \"preset\": \"none\" }";
static const char again[] = "{ \"regraph_policy\": 1, \"preset\": \"all\", \"split_heads\": 1 }";

Test(plugin, example_runs_and_differentiates) {
  static run with, hand;
  rg_error e = {0};
  rg_context *ctx = context();
  OK(rg_plugin_load(ctx, RG_TEST_PLUGIN, &e), e);
  draw(&with, 4); /* slope 1/4 reaches 0 and 1 at -2 and 2 */
  draw(&hand, 4);
  int cut = 0;
  for (int i = 0; i < T * H * N; i++) {
    hand.gate[i] = fminf(fmaxf(hand.gate[i] * 0.25f + 0.5f, 0), 1);
    cut += hand.gate[i] == 0 || hand.gate[i] == 1;
  }
  cr_assert(cut > 50 && cut < T * H * N - 50);
  run_spec(ctx, RG_SOURCE_DIR "/examples/plugin/hard_gate.json", NULL, keep, &with);
  run_spec(ctx, NULL, by_hand, keep, &hand);
  cr_assert_arr_eq(with.o, hand.o, sizeof with.o);
  cr_assert_arr_eq(with.dq, hand.dq, sizeof with.dq);
  cr_assert_arr_eq(with.dk, hand.dk, sizeof with.dk);
  cr_assert_arr_eq(with.dv, hand.dv, sizeof with.dv);
  for (int i = 0; i < T * H * N; i++) {
    bool open = i < LIVE * H * N && hand.gate[i] > 0 && hand.gate[i] < 1;
    cr_assert_eq(with.dgate[i], open ? 0.25f * hand.dgate[i] : 0, "gate %d: %g", i,
                 (double)with.dgate[i]);
  }
  rg_context_destroy(ctx);
}

/* A plugin's op may be recomputed and split by heads like any other, to the same bits. */
Test(plugin, example_recomputes) {
  static run kept, recomputed;
  rg_error e = {0};
  rg_context *ctx = context();
  OK(rg_plugin_load(ctx, RG_TEST_PLUGIN, &e), e);
  draw(&kept, 4);
  draw(&recomputed, 4);
  run_spec(ctx, RG_SOURCE_DIR "/examples/plugin/hard_gate.json", NULL, keep, &kept);
  run_spec(ctx, RG_SOURCE_DIR "/examples/plugin/hard_gate.json", NULL, again, &recomputed);
  cr_assert_arr_eq(&kept, &recomputed, sizeof kept);
  rg_context_destroy(ctx);
}

/* A spec that names the op without the plugin is told which op it is about. */
Test(plugin, spec_without_plugin) {
  rg_error e = {0};
  rg_spec *spec;
  rg_context *ctx = context();
  cr_assert_eq(
      rg_spec_load_file(ctx, RG_SOURCE_DIR "/examples/plugin/hard_gate.json", NULL, 0, &spec, &e),
      RG_E_NAME);
  cr_assert_null(spec);
  cr_assert_not_null(strstr(e.message, "hard_sigmoid"), "%s", e.message);
  rg_context_destroy(ctx);
}
