/* tests/unit/test_cp_random.c: random specs, batches and policies on one rank and on several, and
 * the examples: the same results. */
#include "cp_case.h"

#include "../harness/random_spec.h"
#include "../harness/round.h"

typedef struct drawn {
  char spec[8192], policy[400], what[256];
  int ranks, mode, kernel, stride;
  int64_t T, B;
  int lengths[64];
  const char *dtype;
} drawn;

static uint64_t state;
static int pick(int n) {
  return rgi_draw(&state, n);
}
static int among(const int *list, int n) {
  return list[pick(n)];
}
#define AMONG(...) \
  among((const int[]){__VA_ARGS__}, (int)(sizeof((int[]){__VA_ARGS__}) / sizeof(int)))

static void add(char *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void add(char *text, const char *format, ...) {
  const size_t n = strlen(text);
  va_list args;
  va_start(args, format);
  vsnprintf(text + n, 8192 - n, format, args);
  va_end(args);
}

/* Branches over q, k, v, perhaps projected, normalised and rotated first; perhaps a layer's end. */
static void draw_spec(drawn *d) {
  const int KH = AMONG(1, 2, 4), H = KH * AMONG(1, 2, 3), D = AMONG(8, 16, 24), E = AMONG(8, 16);
  const int block = d->stride * AMONG(1, 2, 4), top = AMONG(3, 5), init = pick(2);
  const bool made = pick(2), learned = pick(2), sinks = pick(2), end = pick(2);
  static const char *const methods[] = {"linear", "swiglu", "sigmoid_mul"};
  const char *method = methods[pick(3)];
  const int wide = strcmp(method, "linear") == 0 ? 1 : 2;
  char *s = d->spec, *in[] = {"q", "k", "v"};
  const int heads[] = {H, KH, KH}, width[] = {D, D, E};
  const char *input = made ? "p" : "";
  *s = 0;
  add(s, "{ \"regraph\": 1, \"inputs\": { \"cu\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" }");
  for (int i = 0; i < 3; i++)
    add(s, ", \"%s%s\": { \"shape\": [\"T\", %d, %d], \"dtype\": \"%s\", \"grad\": true }", in[i],
        input, heads[i], width[i], d->dtype);
  if (made)
    add(s, ", \"norm\": { \"shape\": [%d], \"dtype\": \"%s\", \"grad\": true }", D, d->dtype);
  if (learned)
    add(s,
        ", \"wk\": { \"shape\": [%d, %d], \"dtype\": \"%s\", \"grad\": true }, \"wv\": { "
        "\"shape\": [%d, "
        "%d], \"dtype\": \"%s\", \"grad\": \"accumulate\" }",
        D * wide, D * d->kernel, d->dtype, E * wide, E * d->kernel, d->dtype);
  if (sinks)
    add(s, ", \"sinks\": { \"shape\": [%d], \"dtype\": \"%s\", \"grad\": true }", H, d->dtype);
  if (end)
    add(s, ", \"wo\": { \"shape\": [12, %d], \"dtype\": \"%s\", \"grad\": true }", H * E, d->dtype);
  add(s,
      ", \"gate\": { \"shape\": [\"T\", %d, 3], \"dtype\": \"%s\", \"grad\": true } }, \"nodes\": "
      "[",
      H, d->dtype);
  if (made) {
    add(s, "{ \"name\": \"n\", \"op\": \"rmsnorm\", \"in\": { \"x\": \"qp\", \"w\": \"norm\" }, "
           "\"out\": { "
           "\"y\": \"qn\" } }, ");
    add(s,
        "{ \"name\": \"rq\", \"op\": \"rope\", \"in\": { \"x\": \"qn\", \"cu_seqlens\": \"cu\" }, "
        "\"out\": { \"y\": \"q\" }, \"attrs\": { \"theta\": 100 } }, ");
    add(s,
        "{ \"name\": \"rk\", \"op\": \"rope\", \"in\": { \"x\": \"kp\", \"cu_seqlens\": \"cu\" }, "
        "\"out\": { \"y\": \"k\" }, \"attrs\": { \"theta\": 100 } }, ");
    add(s, "{ \"name\": \"sv\", \"op\": \"silu\", \"in\": { \"x\": \"vp\" }, \"out\": { \"y\": "
           "\"v\" } }, ");
  }
  add(s,
      "{ \"name\": \"c\", \"op\": \"compress_kv\", \"in\": { \"k\": \"k\", \"v\": \"v\", "
      "\"cu_seqlens\": \"cu\"%s }, \"out\": { \"k\": \"ck\", \"v\": \"cv\" }, \"attrs\": { "
      "\"kernel\": "
      "%d, \"stride\": %d",
      learned ? ", \"k_weight\": \"wk\", \"v_weight\": \"wv\"" : "", d->kernel, d->stride);
  if (learned) add(s, ", \"k_method\": \"%s\", \"v_method\": \"%s\"", method, method);
  add(s,
      " } }, { \"name\": \"cmp\", \"op\": \"cmp_attn\", \"in\": { \"q\": \"q\", \"k\": \"ck\", "
      "\"v\": "
      "\"cv\", \"cu_seqlens\": \"cu\" }, \"out\": { \"o\": \"co\", \"lse\": \"lse\" }, \"attrs\": "
      "{ "
      "\"kernel\": %d, \"stride\": %d } }, ",
      d->kernel, d->stride);
  add(s,
      "{ \"name\": \"top\", \"op\": \"topk\", \"in\": { \"q\": \"q\", \"k\": \"ck\", \"lse\": "
      "\"lse\", \"cu_seqlens\": \"cu\" }, \"out\": { \"idx\": \"idx\" }, \"attrs\": { \"kernel\": "
      "%d, "
      "\"stride\": %d, \"block\": %d, \"top_n\": %d, \"init\": %d, \"local\": 1 } }, ",
      d->kernel, d->stride, block, top, init);
  add(s,
      "{ \"name\": \"slc\", \"op\": \"slc_attn\", \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": "
      "\"v\", "
      "\"idx\": \"idx\", \"cu_seqlens\": \"cu\" }, \"out\": { \"o\": \"so\" }, \"attrs\": { "
      "\"block\": "
      "%d } }, ",
      block);
  add(s,
      "{ \"name\": \"win\", \"op\": \"swa_attn\", \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": "
      "\"v\", "
      "\"cu_seqlens\": \"cu\"%s }, \"out\": { \"o\": \"wino\" }, \"attrs\": { \"window_left\": %d, "
      "\"softcap\": %d } }, ",
      sinks ? ", \"sinks\": \"sinks\"" : "", AMONG(-1, 0, 5, 40), AMONG(0, 3));
  add(s,
      "{ \"name\": \"mix\", \"op\": \"combine\", \"in\": { \"o\": [\"co\", \"so\", \"wino\"], "
      "\"gate\": "
      "\"gate\" }, \"out\": { \"o\": \"o\" }, \"attrs\": { \"act\": \"%s\" } }",
      pick(2) ? "softmax" : "sigmoid");
  if (end)
    add(s,
        ", { \"name\": \"flat\", \"op\": \"reshape\", \"in\": { \"x\": \"o\" }, \"out\": { \"y\": "
        "\"of\" }, \"attrs\": { \"shape\": [0, -1] } }, { \"name\": \"out\", \"op\": \"linear\", "
        "\"in\": "
        "{ \"x\": \"of\", \"w\": \"wo\" }, \"out\": { \"y\": \"y\" } }");
  add(s, " ], \"outputs\": { \"y\": \"%s\"%s } }", end ? "y" : "o",
      pick(2) ? ", \"idx\": \"idx\"" : "");
  snprintf(d->what, sizeof d->what, "H %d, KH %d, D %d, E %d, kernel %d, stride %d, block %d", H,
           KH, D, E, d->kernel, d->stride, block);
  static const char *const what[] = {
      "",
      ", \"preset\": \"all\"",
      ", \"split_heads\": 1",
      ", \"preset\": \"all\", \"split_heads\": 1",
      ", \"recompute\": [\"c\", \"slc\", \"mix\"]",
      ", \"budget\": \"least\", \"nodes\": { \"mix*\": \"keep\", \"win*\": \"keep\" }"};
  snprintf(d->policy, sizeof d->policy,
           "{ \"regraph_policy\": 1, \"cp\": { \"ranks\": %d, \"mode\": %s }%s }", d->ranks,
           (const char *[]){"\"auto\"", "1", "2"}[d->mode], what[pick(6)]);
}

/* For so many ranks in that mode (negative: drawn, too). */
static void draw(drawn *d, uint64_t seed, int ranks, int mode) {
  state = seed * 0x9e3779b97f4a7c15u + 1;
  pick(2);
  d->ranks = AMONG(2, 3, 4, 8);
  d->mode = pick(3);
  if (ranks > 0) d->ranks = ranks;
  if (mode >= 0) d->mode = mode;
  d->stride = AMONG(1, 2, 4, 8);
  d->kernel = d->stride * AMONG(1, 2, 3);
  d->dtype = pick(3) ? "f32" : "bf16";
  const int least = d->kernel > 1 ? d->kernel - 1 : 1;
  const int64_t chunk = (int64_t)d->stride * ((least + d->stride - 1) / d->stride + pick(5));
  d->T = chunk * 2 * d->ranks;
  d->B = 1 + pick(8);
  int64_t left = d->T;
  for (int b = 0; b < d->B; b++) {
    const int like[] = {0,
                        1,
                        d->kernel - 1,
                        d->kernel,
                        d->kernel + 1,
                        (int)chunk,
                        pick((int)chunk + 1),
                        pick((int)d->T + 1),
                        (int)(3 * chunk + 1)};
    const int n = like[pick(9)];
    d->lengths[b] = n < left ? n : (int)left;
    left -= d->lengths[b];
  }
  draw_spec(d);
}

static rg_plan *plan_of(rg_context *ctx, const drawn *d, bool many) {
  rg_binding set[] = {{"T", d->T, NULL}, {"B", d->B, NULL}};
  rg_plan_options o = {.set = set, .nset = 2, .threads = 1, .pack_seconds = 0.05};
  rg_policy *policy = many ? load_policy(ctx, d->policy) : NULL;
  rg_spec *spec = load_spec(ctx, d->spec);
  rg_plan *plan = NULL;
  rg_error e = {0};
  CR_OK(rg_plan_create(spec, policy, &o, &plan, &e), &e);
  rg_spec_destroy(spec);
  rg_policy_destroy(policy);
  return plan;
}

static void draw_and_compare(rg_context *ctx, uint64_t seed, int ranks, int mode) {
  static drawn d;
  char what[800];
  draw(&d, seed, ranks, mode);
  snprintf(what, sizeof what, "seed %llu: %s, T %lld, B %lld, %s, %s", (unsigned long long)seed,
           d.what, (long long)d.T, (long long)d.B, d.dtype, d.policy);
  rg_plan *one = plan_of(ctx, &d, false), *many = plan_of(ctx, &d, true);
  const double most = strcmp(d.dtype, "f32") == 0 ? 2e-6 : 2e-2;
  cp_compare(ctx, one, many, seed, d.T, d.lengths, "qp gate", most, what);
  rg_plan_destroy(one);
  rg_plan_destroy(many);
}

/* A round of tests/soak.sh is 200 specs on 1, 2, 3, 4 and 8 ranks in every mode; each time, 60 take
 * one of them. */
Test(cp_random, specs) {
  enum { ROUND = 200, SAMPLE = 60 };
  static const int counts[] = {1, 2, 3, 4, 8};
  const uint64_t from = round_seed(1, ROUND), n = from == 1 ? SAMPLE : ROUND;
  rg_context *ctx = NULL;
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  for (uint64_t seed = from; seed < from + n; seed++) {
    if (n == SAMPLE) draw_and_compare(ctx, seed, 0, -1);
    for (int i = 0; i < 5 && n == ROUND; i++)
      for (int mode = 0; mode < 3; mode++) draw_and_compare(ctx, seed, counts[i], mode);
  }
  rg_context_destroy(ctx);
}

/* Of a few heads' sinks that cancel to a fiftieth and less: of all that soaks had found. */
Test(cp_random, sinks_that_cancel) {
  rg_context *ctx = NULL;
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  draw_and_compare(ctx, 20263, 4, 0);
  rg_context_destroy(ctx);
}

/* ---- the examples ---- */

static const char *const examples[] = {"nsa",          "nsa_layer",        "nsa_linear",
                                       "moba",         "two_branch",       "sliding_window",
                                       "dense_causal", "plugin/hard_gate", "variants/msa",
                                       "variants/qsa"};

static rg_plan *plan_example(rg_context *ctx, const char *name, int ranks, int64_t T,
                             const rg_binding *param, size_t nparam) {
  char path[512];
  rg_binding set[] = {{"T", T, NULL}, {"B", 3, NULL}};
  rg_plan_options o = {.set = set, .nset = 2, .threads = 1, .pack_seconds = 0.05, .cp = ranks};
  rg_spec *spec = NULL;
  rg_plan *plan = NULL;
  rg_error e = {0};
  snprintf(path, sizeof path, "%s/examples/%s.json", RG_SOURCE_DIR, name);
  CR_OK(rg_spec_load_file(ctx, path, param, nparam, &spec, &e), &e);
  CR_OK(rg_plan_create(spec, NULL, &o, &plan, &e), &e);
  rg_spec_destroy(spec);
  return plan;
}

Test(cp_random, examples) {
  const bool whole = in_sample(1, 2); /* at their own widths: shorter where that is slow */
  const int64_t T = whole ? 1536 : 768;
  const int lengths[] = {whole ? 900 : 450, 1, whole ? 500 : 250};
  /* of all, and of variants, whose choices should leave something out */
  const rg_binding param[] = {{"dtype", 0, "f32"}, {"H", 4, NULL},   {"KH", 2, NULL},
                              {"D", 32, NULL},     {"DI", 16, NULL}, {"top_n", 3, NULL}};
  const size_t all = sizeof param / sizeof *param;
  rg_context *ctx = NULL;
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  CR_OK(rg_plugin_load(ctx, RG_TEST_PLUGIN, &e), &e);
  for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
    if (!in_sample((int)i, 4)) continue;
    const size_t set = strncmp(examples[i], "variants/", 9) == 0 ? all : 1;
    rg_plan *one = plan_example(ctx, examples[i], 1, T, param, set);
    rg_plan *many = plan_example(ctx, examples[i], 2 + (int)(i % 2), T, param, set);
    cp_compare(ctx, one, many, round_seed(3, 1), T, lengths, "", 2e-6, examples[i]);
    rg_plan_destroy(one);
    rg_plan_destroy(many);
  }
  rg_context_destroy(ctx);
}

/* More than 2^20 rows. In a soak one sequence has them, its keys compressed to a 512th to be quick;
 * each time there are 64 of 16K and one beyond them. */
Test(cp_random, past_2_20) {
  if (!in_sample(1, 2)) cr_skip_test("a million rows, in a build that watches each access");
  const bool soak = getenv("REGRAPH_ROUND") != NULL;
  const int block = soak ? 512 : 64, ranks = 2;
  const int64_t unit = 2 * ranks * block, T = ((1 << 20) / unit + 9) * unit;
  const rg_binding param[] = {
      {"dtype", 0, "f32"}, {"H", 1, NULL},          {"KH", 1, NULL},        {"D", 8, NULL},
      {"DV", 8, NULL},     {"kernel", block, NULL}, {"block", block, NULL}, {"stride", block, NULL},
      {"top_n", 2, NULL},  {"local", 1, NULL},      {"window", 16, NULL}};
  rg_binding set[] = {{"T", T, NULL}, {"B", 65, NULL}};
  const rg_plan_options o = {.set = set, .nset = 2, .threads = 1, .pack_seconds = 0.05};
  rg_plan_options shared = o;
  int lengths[65] = {0};
  if (soak) lengths[7] = (int)T - 5;
  for (int i = 0; i < 64 && !soak; i++) lengths[i] = 1 << 14;
  if (!soak) lengths[64] = (int)(T - (1 << 20) - 5);
  char path[512];
  rg_context *ctx = NULL;
  rg_spec *spec = NULL;
  rg_plan *one = NULL, *many = NULL;
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  snprintf(path, sizeof path, "%s/examples/nsa.json", RG_SOURCE_DIR);
  CR_OK(rg_spec_load_file(ctx, path, param, sizeof param / sizeof *param, &spec, &e), &e);
  shared.cp = ranks;
  CR_OK(rg_plan_create(spec, NULL, &o, &one, &e), &e);
  CR_OK(rg_plan_create(spec, NULL, &shared, &many, &e), &e);
  cp_compare(ctx, one, many, round_seed(5, 1), T, lengths, "q gate", 2e-6, "past 2^20 rows");
  rg_plan_destroy(one);
  rg_plan_destroy(many);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}
