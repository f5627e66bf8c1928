/* tests/unit/test_cp_equal.c: a batch shared out among ranks gives what one rank gives: outputs, and
 * gradients of what is not gathered, to the bit; the others within the roundings of their sums. */
#include "cp_case.h"

static const char spec_text[] =
    "{ \"regraph\": 1, \"params\": { \"H\": 4, \"KH\": 2, \"D\": 16, \"kernel\": 8, \"stride\": 4, "
    "\"block\": 16, \"top_n\": 4, \"window\": 24, \"dtype\": \"f32\", \"how\": \"linear\" },\n"
    " \"inputs\": {\n"
    "  \"q\": { \"shape\": [\"T\", \"H\", \"D\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "  \"k\": { \"shape\": [\"T\", \"KH\", \"D\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "  \"v\": { \"shape\": [\"T\", \"KH\", \"D\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "  \"gate\": { \"shape\": [\"T\", \"H\", 3], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "  \"wk\": { \"shape\": [\"D\", \"kernel*D\"], \"dtype\": \"$dtype\", \"grad\": \"accumulate\" "
    "},\n"
    "  \"wv\": { \"shape\": [\"D\", \"kernel*D\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "  \"sinks\": { \"shape\": [\"H\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "  \"cu_seqlens\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } },\n"
    " \"nodes\": [\n"
    "  { \"name\": \"compress_kv\", \"op\": \"compress_kv\", \"in\": { \"k\": \"k\", \"v\": \"v\", "
    "\"k_weight\": \"wk\", \"v_weight\": \"wv\", \"cu_seqlens\": \"cu_seqlens\" },\n"
    "    \"out\": { \"k\": \"ck\", \"v\": \"cv\" }, \"attrs\": { \"kernel\": \"$kernel\", "
    "\"stride\": \"$stride\", \"k_method\": \"linear\", \"v_method\": \"linear\" } },\n"
    "  { \"name\": \"cmp_o\", \"op\": \"cmp_attn\", \"in\": { \"q\": \"q\", \"k\": \"ck\", \"v\": "
    "\"cv\", \"cu_seqlens\": \"cu_seqlens\" },\n"
    "    \"out\": { \"o\": \"cmp_o\", \"lse\": \"lse\" }, \"attrs\": { \"kernel\": \"$kernel\", "
    "\"stride\": \"$stride\" } },\n"
    "  { \"name\": \"topk\", \"op\": \"topk\", \"in\": { \"q\": \"q\", \"k\": \"ck\", \"lse\": "
    "\"lse\", "
    "\"cu_seqlens\": \"cu_seqlens\" }, \"out\": { \"idx\": \"idx\" },\n"
    "    \"attrs\": { \"kernel\": \"$kernel\", \"stride\": \"$stride\", \"block\": \"$block\", "
    "\"top_n\": \"$top_n\", \"init\": 1, \"local\": 2 } },\n"
    "  { \"name\": \"slc_o\", \"op\": \"slc_attn\", \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": "
    "\"v\", \"idx\": \"idx\", \"cu_seqlens\": \"cu_seqlens\" },\n"
    "    \"out\": { \"o\": \"slc_o\" }, \"attrs\": { \"block\": \"$block\" } },\n"
    "  { \"name\": \"swa_o\", \"op\": \"swa_attn\", \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": "
    "\"v\", \"sinks\": \"sinks\", \"cu_seqlens\": \"cu_seqlens\" },\n"
    "    \"out\": { \"o\": \"swa_o\" }, \"attrs\": { \"window_left\": \"$window\" } },\n"
    "  { \"name\": \"combine\", \"op\": \"combine\", \"in\": { \"o\": [\"cmp_o\", \"slc_o\", "
    "\"swa_o\"], "
    "\"gate\": \"gate\" }, \"out\": { \"o\": \"o\" } } ],\n"
    " \"outputs\": { \"o\": \"o\", \"lse\": \"lse\", \"idx\": \"idx\" } }\n";

#define RGI_N(a) (int)(sizeof(a) / sizeof *(a))

static rg_context *ctx;
static void setup(void) {
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
}
static void teardown(void) {
  rg_context_destroy(ctx);
}

static rg_plan *plan_of(const char *dtype, const char *policy_text, int64_t T, int64_t B,
                        int ranks) {
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rg_binding param[] = {{"dtype", 0, dtype}};
  rg_plan_options o = {.set = set, .nset = 2, .threads = 1, .pack_seconds = 0.2, .cp = ranks};
  rg_policy *policy = policy_text ? load_policy(ctx, policy_text) : NULL;
  rg_spec *spec = NULL;
  rg_plan *plan = NULL;
  rg_error e = {0};
  CR_OK(rg_spec_load_text(ctx, spec_text, strlen(spec_text), "spec", param, 1, &spec, &e), &e);
  CR_OK(rg_plan_create(spec, policy, &o, &plan, &e), &e);
  rg_spec_destroy(spec);
  rg_policy_destroy(policy);
  return plan;
}

/* Of a plan for one rank and one for several, which a policy asks for; `exact`: see cp_compare. */
static void compare(const char *dtype, const char *policy, int ranks, int64_t T, int64_t B,
                    const int *lengths, uint64_t seed, const char *what) {
  rg_plan *one = plan_of(dtype, NULL, T, B, 1), *many = plan_of(dtype, policy, T, B, ranks);
  const double most = strcmp(dtype, "f32") == 0 ? 2e-6 : strcmp(dtype, "f16") == 0 ? 1e-3 : 8e-3;
  cp_compare(ctx, one, many, seed, T, lengths, "q gate", most, what);
  rg_plan_destroy(one);
  rg_plan_destroy(many);
}

static const int all_ranks[] = {2, 3, 4, 8};
static const char *const modes[] = {"\"auto\"", "1", "2"};

/* chunk: rows of a chunk. */
static void all_modes(int64_t chunk, int64_t B, const int *lengths, const char *what) {
  for (int i = 0; i < 4; i++)
    for (int mode = 0; mode < 3; mode++) {
      char policy[200], name[160];
      snprintf(name, sizeof name, "%s, %d ranks, mode %s", what, all_ranks[i], modes[mode]);
      snprintf(policy, sizeof policy, "{ \"regraph_policy\": 1, \"cp\": { \"mode\": %s } }",
               modes[mode]);
      compare("f32", policy, all_ranks[i], chunk * 2 * all_ranks[i], B, lengths, 7, name);
    }
}

Test(cp_equal, packs, .init = setup, .fini = teardown) {
  /* chunks of 24 rows, for two ranks 96 in all */
  all_modes(24, 5, (const int[]){40, 0, 1, 30, 7}, "several sequences and dead rows");
  all_modes(24, 1, (const int[]){96}, "one sequence over four chunks, and dead chunks");
  all_modes(24, 2, (const int[]){3, 93}, "one over four chunks that starts in the first");
  all_modes(24, 4, (const int[]){7, 8, 9, 0}, "around the kernel; most chunks dead");
  all_modes(24, 3, (const int[]){0, 0, 0}, "nothing at all");
  all_modes(24, 4, (const int[]){24, 24, 24, 24}, "borders on chunks");
  all_modes(24, 4, (const int[]){23, 25, 23, 25}, "borders beside chunks");
  all_modes(8, 3, (const int[]){13, 2, 16}, "the smallest capacity");
}

Test(cp_equal, many_short_sequences, .init = setup, .fini = teardown) {
  int lengths[60];
  for (int i = 0; i < 60; i++) lengths[i] = i % 4;
  all_modes(24, 60, lengths, "sixty sequences");
}

/* A border at every residue of stride, block and kernel, and next to those of chunks. */
Test(cp_equal, borders_at_every_row, .init = setup, .fini = teardown) {
  for (int cut = 0; cut <= 64; cut++) {
    const int lengths[] = {cut, 64 - cut, 20};
    char what[64];
    snprintf(what, sizeof what, "a border at row %d", cut);
    compare("f32", "{ \"regraph_policy\": 1, \"cp\": { \"mode\": 2 } }", 3, 96, 3, lengths,
            (uint64_t)cut, what);
  }
}

Test(cp_equal, policies_and_types, .init = setup, .fini = teardown) {
  static const char *const policies[] = {
      "\"split_heads\": 1", "\"preset\": \"all\"", "\"preset\": \"all\", \"split_heads\": 1",
      "\"recompute\": [\"compress_kv\", \"topk\", \"slc_o\"]", "\"preset\": \"none\""};
  static const char *const types[] = {"f32", "bf16", "f16"};
  const int lengths[] = {70, 0, 1, 50, 20};
  for (int k = 0; k < RGI_N(policies); k++)
    for (int d = 0; d < 3; d++)
      for (int i = 0; i < 4; i++) {
        char policy[300];
        snprintf(policy, sizeof policy, "{ \"regraph_policy\": 1, \"cp\": {}, %s }", policies[k]);
        const int64_t T = all_ranks[i] == 3 ? 144 : all_ranks[i] == 8 ? 192 : 160;
        compare(types[d], policy, all_ranks[i], T, 5, lengths, 3, policies[k]);
      }
}
