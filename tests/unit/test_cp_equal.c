/* tests/unit/test_cp_equal.c: a batch shared out among ranks gives what one rank gives: outputs,
 * and gradients of what is not gathered, to the bit; the others within the roundings of their
 * sums. */
#include "cp_case.h"
#include "exec/plan.h"

#include "../harness/round.h"

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
  static int n; /* 12 cases a pack: another one of each in builds that take one of five */
  for (int i = 0; i < 4; i++)
    for (int mode = 0; mode < 3; mode++) {
      char policy[200], name[160];
      if (!in_sample(n++, 5)) continue;
      snprintf(name, sizeof name, "%s, %d ranks, mode %s", what, all_ranks[i], modes[mode]);
      snprintf(policy, sizeof policy, "{ \"regraph_policy\": 1, \"cp\": { \"mode\": %s } }",
               modes[mode]);
      compare("f32", policy, all_ranks[i], chunk * 2 * all_ranks[i], B, lengths, round_seed(7, 1),
              name);
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
    if (!in_sample(cut, 5)) continue;
    snprintf(what, sizeof what, "a border at row %d", cut);
    compare("f32", "{ \"regraph_policy\": 1, \"cp\": { \"mode\": 2 } }", 3, 96, 3, lengths,
            round_seed((uint64_t)cut, 65), what);
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
        if (!in_sample(12 * k + 4 * d + i, 7)) continue;
        snprintf(policy, sizeof policy, "{ \"regraph_policy\": 1, \"cp\": {}, %s }", policies[k]);
        const int64_t T = all_ranks[i] == 3 ? 144 : all_ranks[i] == 8 ? 192 : 160;
        compare(types[d], policy, all_ranks[i], T, 5, lengths, round_seed(3, 1), policies[k]);
      }
}

/* Keys that only windows see come out of halos: nothing is gathered, and the bits are the same. */
static rg_plan *window_plan(int64_t T, int window, int ranks, const char *policy_text) {
  char text[1024];
  rg_binding set[] = {{"T", T, NULL}, {"B", 3, NULL}};
  rg_plan_options o = {.set = set, .nset = 2, .threads = 1, .pack_seconds = 0.2, .cp = ranks};
  snprintf(
      text, sizeof text,
      "{ \"regraph\": 1, \"inputs\": { \"q\": { \"shape\": [\"T\", 4, 16], \"dtype\": \"f32\", "
      "\"grad\": "
      "true }, \"k\": { \"shape\": [\"T\", 2, 16], \"dtype\": \"f32\", \"grad\": true }, \"v\": { "
      "\"shape\": [\"T\", 2, 8], \"dtype\": \"f32\", \"grad\": true }, \"cu\": { \"shape\": "
      "[\"B+1\"], "
      "\"dtype\": \"i32\" } }, \"nodes\": [ { \"name\": \"a\", \"op\": \"swa_attn\", \"in\": { "
      "\"q\": "
      "\"q\", \"k\": \"k\", \"v\": \"v\", \"cu_seqlens\": \"cu\" }, \"out\": { \"o\": \"o\", "
      "\"lse\": "
      "\"lse\" }, \"attrs\": { \"window_left\": %d } } ], \"outputs\": { \"o\": \"o\", \"lse\": "
      "\"lse\" } }",
      window);
  rg_spec *spec = load_spec(ctx, text);
  rg_policy *policy = policy_text ? load_policy(ctx, policy_text) : NULL;
  rg_plan *plan = NULL;
  rg_error e = {0};
  CR_OK(rg_plan_create(spec, policy, &o, &plan, &e), &e);
  rg_spec_destroy(spec);
  rg_policy_destroy(policy);
  return plan;
}

static bool has_op(const rg_plan *plan, const char *op) {
  rg_node_info n;
  bool any = false;
  for (size_t i = 0; rg_plan_node(plan, i, &n) == RG_OK; i++) any = any || strcmp(n.op, op) == 0;
  return any;
}

Test(cp_equal, windows, .init = setup, .fini = teardown) {
  static const char *const policies[] = {NULL, "{ \"regraph_policy\": 1, \"preset\": \"all\" }",
                                         "{ \"regraph_policy\": 1, \"split_heads\": 1 }"};
  for (int ranks = 2; ranks <= 4; ranks++)
    for (int window = 0; window <= 40; window += 20) {
      if (!in_sample(3 * (ranks - 2) + window / 20, 4)) continue;
      const int64_t chunk = 104, T = chunk * 2 * ranks;
      rg_plan *one = window_plan(T, window, 1, NULL);
      for (int i = 0; i < RGI_N(policies); i++) {
        rg_plan *many = window_plan(T, window, ranks, policies[i]);
        cr_assert(has_op(many, "halo") && !has_op(many, "all_gather"));
        for (int cut = 0; cut <= 2 * chunk; cut += i ? 52 : 13) {
          const int lengths[] = {cut, 1, (int)T - cut - 40};
          char what[64];
          snprintf(what, sizeof what, "%d ranks, window %d, a border at %d", ranks, window, cut);
          cp_compare(ctx, one, many, round_seed(11, 1), T, lengths, "q", 2e-6, what);
        }
        rg_plan_destroy(many);
      }
      rg_plan_destroy(one);
    }
  rg_plan *plan = window_plan(416, 60, 2, NULL); /* more than a chunk with its tile */
  cr_assert(has_op(plan, "all_gather") && !has_op(plan, "halo"));
  rg_plan_destroy(plan);
}

static bool alone; /* queries choose alone, though the spec has query_block */

/* A spec of examples/variants, on so many ranks; NULL where it is refused, with *e. */
static rg_plan *variant_plan(const char *name, const rg_binding *param, size_t nparam, int64_t T,
                             int ranks, const char *policy_text, rg_error *e) {
  char path[512];
  rg_binding set[] = {{"T", T, NULL}, {"B", 4, NULL}};
  rg_plan_options o = {.set = set, .nset = 2, .threads = 1, .pack_seconds = 0.1, .cp = ranks};
  rg_policy *policy = policy_text ? load_policy(ctx, policy_text) : NULL;
  rg_spec *spec = NULL;
  rg_plan *plan = NULL;
  snprintf(path, sizeof path, "%s/examples/variants/%s.json", RG_SOURCE_DIR, name);
  static char text[1 << 14];
  FILE *f = fopen(path, "r");
  cr_assert(f);
  text[fread(text, 1, sizeof text - 1, f)] = 0;
  fclose(f);
  char *share = strstr(text, "\"query_block\": \"$block\"");
  if (share && alone) memcpy(share, "\"query_block\": 1       ", 23);
  CR_OK(rg_spec_load_text(ctx, text, strlen(text), path, param, nparam, &spec, e), e);
  if (rg_plan_create(spec, policy, &o, &plan, e) != RG_OK) plan = NULL;
  rg_spec_destroy(spec);
  rg_policy_destroy(policy);
  return plan;
}

/* Rows that pool makes, alone or by way of other ops, whose blocks reach back over chunks: keys of
 * attention (csa), and of its choice (quest). */
Test(cp_equal, pooled_rows, .init = setup, .fini = teardown) {
  static const rg_binding csa[] = {{"H", 4, NULL},     {"D", 16, NULL},      {"HI", 3, NULL},
                                   {"DI", 8, NULL},    {"kernel", 12, NULL}, {"stride", 4, NULL},
                                   {"top_n", 3, NULL}, {"window", 6, NULL},  {"dtype", 0, "f32"}},
                          quest[] = {{"H", 4, NULL},    {"KH", 2, NULL},    {"D", 16, NULL},
                                     {"page", 4, NULL}, {"top_n", 4, NULL}, {"dtype", 0, "f32"}};
  static const int lengths[][4] = {{70, 0, 1, 50}, {144, 0, 0, 0}, {23, 25, 47, 5}, {3, 6, 2, 120}};
  static const char *const policies[] = {
      "{ \"regraph_policy\": 1, \"cp\": { \"mode\": 1 } }",
      "{ \"regraph_policy\": 1, \"cp\": { \"mode\": 2 }, \"preset\": \"all\" }"};
  for (int which = 0; which < 2; which++)
    for (int i = 0; i < RGI_N(lengths); i++)
      for (int k = 0; k < 2; k++) {
        const rg_binding *set = which ? quest : csa;
        const size_t n = which ? RGI_N(quest) : RGI_N(csa);
        const char *name = which ? "quest" : "csa";
        const int ranks = 2 + (i + k) % 3;
        const int64_t T = ranks == 4 ? 192 : 144;
        char what[128];
        rg_error e = {0};
        if (!in_sample(4 * i + 2 * which + k, 4)) continue;
        rg_plan *one = variant_plan(name, set, n, T, 1, NULL, &e);
        CR_OK(one ? RG_OK : e.status, &e);
        rg_plan *many = variant_plan(name, set, n, T, ranks, policies[k], &e);
        CR_OK(many ? RG_OK : e.status, &e);
        snprintf(what, sizeof what, "%s, %d ranks, lengths %d, policy %d", name, ranks, i, k);
        cp_compare(ctx, one, many, round_seed(13, 1), T, lengths[i], "q", 2e-6, what);
        rg_plan_destroy(one);
        rg_plan_destroy(many);
      }
  /* keys that linear makes of pooled rows; queries that choose together can't be shared out */
  rg_error e = {0};
  const rg_binding seer[] = {{"H", 4, NULL},     {"KH", 2, NULL},    {"D", 16, NULL},
                             {"DG", 8, NULL},    {"block", 8, NULL}, {"top_n", 3, NULL},
                             {"dtype", 0, "f32"}};
  cr_assert(!variant_plan("seer", seer, RGI_N(seer), 192, 2, NULL, &e));
  cr_assert(strstr(e.message, "needs whole sequences of queries"), "%s", e.message);
  alone = true;
  rg_plan *one = variant_plan("seer", seer, RGI_N(seer), 192, 1, NULL, &e),
          *many = variant_plan("seer", seer, RGI_N(seer), 192, 3, NULL, &e);
  cr_assert(one && many, "%s", e.message);
  cp_compare(ctx, one, many, round_seed(19, 1), 192, (const int[]){70, 0, 1, 50}, NULL, 2e-6,
             "seer, each query by itself");
  rg_plan_destroy(one);
  rg_plan_destroy(many);
}

/* pool alone: each token goes into one row, so its gradients are one rank's to the bit. */
Test(cp_equal, pool, .init = setup, .fini = teardown) {
  static const char *const method[] = {"softmax", "max", "min"};
  for (int m = 0; m < 3; m++)
    for (int parts = 1; parts <= 3; parts++)
      for (int ranks = 2; ranks <= 4; ranks++) {
        const int stride = 4, T = 2 * ranks * (parts == 3 ? 12 : 8);
        const int lengths[] = {T / 2 - 3, 1, 0, T / 2 - 6};
        char text[1536], what[64];
        rg_plan *plan[2];
        if (!in_sample(9 * m + 3 * parts + ranks, 4)) continue;
        snprintf(
            text, sizeof text,
            "{ \"regraph\": 1, \"inputs\": {"
            " \"x\": { \"shape\": [\"T\", 2, %d], \"dtype\": \"f32\", \"grad\": true },%s"
            " \"cu\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } },\n"
            " \"nodes\": [ { \"name\": \"pool\", \"op\": \"pool\", \"in\": { \"x\": \"x\", "
            "%s\"cu_seqlens\": "
            "\"cu\" }, \"out\": { \"y\": \"y\" }, \"attrs\": { \"kernel\": %d, \"stride\": %d, "
            "\"method\": \"%s\" } } ],\n \"outputs\": { \"y\": \"y\" } }",
            5 * parts,
            m ? ""
              : " \"z\": { \"shape\": [\"T\", 2, \"W\"], \"dtype\": \"f32\", \"grad\": true }, "
                "\"bias\": { \"shape\": [4, \"W\"], \"dtype\": \"f32\", \"grad\": true },",
            m ? "" : "\"z\": \"z\", \"bias\": \"bias\", ", parts * stride, stride, method[m]);
        for (int i = 0; i < 2; i++) {
          rg_binding set[] = {{"T", T, NULL}, {"B", 4, NULL}, {"W", 5 * parts, NULL}};
          rg_plan_options o = {.set = set, .nset = m ? 2 : 3, .threads = 1, .cp = i ? ranks : 1};
          rg_spec *spec = load_spec(ctx, text);
          rg_error e = {0};
          CR_OK(rg_plan_create(spec, NULL, &o, &plan[i], &e), &e);
          rg_spec_destroy(spec);
        }
        snprintf(what, sizeof what, "pool by %s, %d parts, %d ranks", method[m], parts, ranks);
        cp_compare(ctx, plan[0], plan[1], round_seed(17, 1), T, lengths, m ? "" : "x z",
                   m ? 0 : 2e-6, what); /* of max and min but for the sign of zeros */
        for (int i = 0; i < 2; i++) rg_plan_destroy(plan[i]);
      }
}

/* What one plan predicts is what the session of every rank asks for, and budgets count it. */
Test(cp_equal, bytes, .init = setup, .fini = teardown) {
  const char *text = "{ \"regraph_policy\": 1, \"cp\": { \"ranks\": 4 }%s }";
  char policy[300], budget[160];
  rg_sizes keep, all, z;
  snprintf(policy, sizeof policy, text, "");
  rg_plan *plan = plan_of("f32", policy, 768, 3, 0);
  rg_plan_sizes(plan, &keep);
  rg_plan_destroy(plan);
  snprintf(policy, sizeof policy, text, ", \"preset\": \"all\"");
  plan = plan_of("f32", policy, 768, 3, 0);
  rg_plan_sizes(plan, &all);
  rg_plan_destroy(plan);
  cr_assert_gt(keep.comm, 0);
  cr_assert_eq(keep.comm, all.comm);
  const int64_t asked = (keep.predicted_peak + all.predicted_peak) / 2;
  cr_assert_lt(all.predicted_peak, asked);
  snprintf(budget, sizeof budget, ", \"budget\": { \"bytes\": %lld }", (long long)asked);
  snprintf(policy, sizeof policy, text, budget);
  plan = plan_of("f32", policy, 768, 3, 0);
  rg_plan_sizes(plan, &z);
  cr_assert_leq(z.predicted_peak, asked);
  cr_assert_eq(z.predicted_peak, z.saved + z.scratch + z.comm);
  const int lengths[] = {400, 1, 300};
  rg_plan *one = plan_of("f32", NULL, 768, 3, 1);
  cp_compare(ctx, one, plan, 5, 768, lengths, "q gate", 2e-6, "a budget");
  a_rank rank[MOST_RANKS];
  for (int r = 0; r < 4; r++) {
    rank[r] = (a_rank){.plan = plan, .backward = true};
    make_buffers(plan, 5, 768, lengths, &rank[r].b);
  }
  run_ranks(ctx, rank, 4, 20);
  for (int r = 0; r < 4; r++) {
    cr_assert_eq(rank[r].status, RG_OK, "%s", rank[r].e.message);
    cr_assert_eq(rank[r].asked, z.predicted_peak, "rank %d", r);
    free_buffers(&rank[r].b);
  }
  rg_plan_destroy(one);
  rg_plan_destroy(plan);
}

/* What the report says of a collective. */
static double said(const rg_plan *plan, const char *collective, const char *what) {
  char name[128];
  rg_text text = {0};
  rg_error e = {0};
  CR_OK(rg_plan_write(plan, "json", &text, &e), &e);
  snprintf(name, sizeof name, "{\"name\": \"%s\", \"op\"", collective);
  const char *at = strstr(text.data, name);
  cr_assert(at, "no collective %s", collective);
  snprintf(name, sizeof name, "\"%s\": ", what);
  at = strstr(at, name);
  cr_assert(at);
  const double is = atof(at + strlen(name));
  rg_text_destroy(&text);
  return is;
}

/* On a GPU keys travel behind attention over what is compressed, which nothing can run before; the
 * CPU waits for each collective. */
Test(cp_equal, what_is_exposed, .init = setup, .fini = teardown) {
  for (int cuda = 0; cuda < 2; cuda++) {
    char path[512];
    rg_binding set[] = {{"T", 16384, NULL}, {"B", 1, NULL}};
    rg_plan_options o = {.set = set,
                         .nset = 2,
                         .cp = 2,
                         .device = cuda ? "cuda" : "cpu",
                         .profile_path = cuda ? "shipped" : NULL};
    rg_spec *spec = NULL;
    rg_plan *plan = NULL;
    rg_error e = {0};
    snprintf(path, sizeof path, "%s/examples/nsa.json", RG_SOURCE_DIR);
    CR_OK(rg_spec_load_file(ctx, path, NULL, 0, &spec, &e), &e);
    CR_OK(rg_plan_create(spec, NULL, &o, &plan, &e), &e);
    const double early = said(plan, "cmp_k.gather", "exposed_ms"),
                 keys = said(plan, "k.gather", "exposed_ms"),
                 back = said(plan, "k.gather.scatter", "exposed_ms");
    cr_assert_gt(early, 0);
    cr_assert(cuda ? keys == 0 && back == 0 : keys >= said(plan, "k.gather", "wire_ms"));
    rg_plan_destroy(plan);
    rg_spec_destroy(spec);
  }
}

/* "local": each rank keeps its terms of weights' gradients; their sum is what "sum" gives. */
Test(cp_equal, weights_left_to_the_caller, .init = setup, .fini = teardown) {
  const int64_t T = 192, B = 2;
  const int lengths[] = {100, 60}, ranks = 4;
  static const char *const weights[] = {"wk", "wv", "sinks"};
  const char *policy = "{ \"regraph_policy\": 1, \"cp\": { \"weights\": \"local\" } }";
  rg_plan *one = plan_of("f32", NULL, T, B, 1), *many = plan_of("f32", policy, T, B, ranks);
  a_rank alone = {.plan = one, .backward = true}, rank[MOST_RANKS];
  buffers whole;
  rg_cp_info cp;
  rg_plan_cp(many, &cp);
  make_buffers(one, 9, T, lengths, &whole);
  make_buffers(one, 9, T, lengths, &alone.b);
  for (int r = 0; r < ranks; r++) {
    rank[r] = (a_rank){.rank = r, .plan = many, .backward = true};
    make_buffers(many, 9, T, lengths, &rank[r].b);
    cp_copy(&whole, &rank[r], &cp, false);
  }
  run_a_rank(&alone);
  run_ranks(ctx, rank, ranks, 20);
  for (int i = 0; i < whole.n; i++) {
    const rg_tensor_info *t = &whole.info[i];
    bool weight = false;
    for (int k = 0; k < 3; k++) weight = weight || strcmp(t->name, weights[k]) == 0;
    if (!weight || t->role != RG_GRAD_OUT) continue;
    float *sum = whole.data[i];
    const int64_t n = t->bytes / 4,
                  begun = t->accumulates ? ranks - 1 : 0; /* ones in each buffer */
    memset(sum, 0, (size_t)t->bytes);
    for (int r = 0; r < ranks; r++) {
      cr_assert_eq(rank[r].status, RG_OK, "%s", rank[r].e.message);
      for (int k = 0; k < rank[r].b.n; k++)
        if (rank[r].b.info[k].role == RG_GRAD_OUT)
          cr_assert_eq(rank[r].b.info[k].partial, !rank[r].b.info[k].sharded);
      const float *mine = buffer(&rank[r].b, RG_GRAD_OUT, t->name);
      for (int64_t k = 0; k < n; k++) sum[k] += mine[k];
    }
    for (int64_t k = 0; k < n; k++) sum[k] -= (float)begun;
    const double off = cp_error(t, sum, buffer(&alone.b, RG_GRAD_OUT, t->name), NULL);
    cr_assert(off <= 2e-6, "%s is off by %g", t->name, off);
  }
  for (int r = 0; r < ranks; r++) free_buffers(&rank[r].b);
  free_buffers(&alone.b);
  free_buffers(&whole);
  rg_plan_destroy(one);
  rg_plan_destroy(many);
}

/* A hundred runs of one batch (ten where they are slow), with the same bits each time. */
Test(cp_equal, repeats, .init = setup, .fini = teardown) {
  const int64_t T = 192;
  const int lengths[] = {100, 60}, ranks = 4;
  rg_plan *plan =
      plan_of("bf16", "{ \"regraph_policy\": 1, \"cp\": { \"wire\": \"bf16\" } }", T, 2, ranks);
  a_rank once[MOST_RANKS], often[MOST_RANKS];
  for (int r = 0; r < ranks; r++) {
    once[r] = (a_rank){.plan = plan, .backward = true};
    make_buffers(plan, 4, T, lengths, &once[r].b);
    often[r] = (a_rank){.plan = plan, .backward = true, .repeats = in_sample(1, 2) ? 99 : 9};
    make_buffers(plan, 4, T, lengths, &often[r].b);
  }
  run_ranks(ctx, once, ranks, 20);
  run_ranks(ctx, often, ranks, 20);
  for (int r = 0; r < ranks; r++) {
    cr_assert_eq(once[r].status, RG_OK, "%s", once[r].e.message);
    cr_assert_eq(often[r].status, RG_OK, "%s", often[r].e.message);
    for (int i = 0; i < once[r].b.n; i++) /* what a caller's sum holds grows with every run */
      if (!once[r].b.info[i].accumulates)
        cr_assert_eq(memcmp(once[r].b.data[i], often[r].b.data[i], (size_t)once[r].b.info[i].bytes),
                     0, "%s", once[r].b.info[i].name);
    free_buffers(&once[r].b);
    free_buffers(&often[r].b);
  }
  rg_plan_destroy(plan);
}

/* ---- ranks that do not fit together ---- */

Test(cp_equal, a_rank_with_another_plan, .init = setup, .fini = teardown) {
  static const char *const text = "{ \"regraph_policy\": 1, \"cp\": { \"ranks\": %d%s }%s }";
  static const struct {
    const char *dtype, *cp, *more;
    int64_t T;
    const char *say;
    int ranks; /* 0: three, like the others */
    bool library;
  } bad[] = {
      {"bf16", "", "", 192, "another spec", 0, false},
      {"f32", "", ", \"split_heads\": 1", 192, "another policy", 0, false},
      {"f32", "", "", 288, "another capacity", 0, false},
      {"f32", ", \"mode\": 2", "", 192, "another shard mode", 0, false},
      {"f32", ", \"wire\": \"bf16\"", "", 192, "another policy", 0, false},
      {"f32", "", "", 192, "another number of ranks", 4, false},
      {"f32", "", "", 192, "another library version", 0, true},
  };
  for (int i = 0; i < RGI_N(bad); i++) {
    char policy[300];
    snprintf(policy, sizeof policy, text, 3, "", "");
    rg_plan *good = plan_of("f32", policy, 192, 2, 0);
    snprintf(policy, sizeof policy, text, bad[i].ranks ? bad[i].ranks : 3, bad[i].cp, bad[i].more);
    rg_plan *other = plan_of(bad[i].dtype, policy, bad[i].T, 2, 0);
    if (bad[i].library) {
      cr_assert_str_eq(other->field[0].name, "library version");
      other->field[0].hash ^= 1;
    }
    a_rank rank[MOST_RANKS];
    for (int r = 0; r < 3; r++) rank[r] = (a_rank){.plan = r == 1 ? other : good};
    run_ranks(ctx, rank, 3, 5);
    for (int r = 0; r < 3; r++) {
      cr_assert_eq(rank[r].status, RG_E_COMM, "%s", rank[r].e.message);
      cr_assert(strstr(rank[r].e.message, "rank 1") && strstr(rank[r].e.message, bad[i].say), "%s",
                rank[r].e.message);
    }
    rg_plan_destroy(good);
    rg_plan_destroy(other);
  }
}

/* A call that is refused on one rank ends those of the others at once: nobody waits for the
 * deadline. */
typedef enum refusal { UNALIGNED_SCRATCH, NOTHING_BOUND, BACKWARD_FIRST, REFUSALS } refusal;
typedef struct refused_rank {
  const rg_plan *plan;
  rg_comm *comm;
  buffers b;
  refusal how;
  bool refuses;
  rg_status status;
  rg_error e;
} refused_rank;

static void *run_refused(void *arg) {
  refused_rank *r = arg;
  rg_session *s = NULL;
  rg_session_options o = {.size = sizeof o, .comm = r->comm};
  if (r->refuses && r->how == UNALIGNED_SCRATCH) o.scratch = (char *)r->b.data[0] + 1;
  r->status = rg_session_create(r->plan, &o, &s, &r->e);
  for (int i = 0; i < r->b.n && r->status == RG_OK; i++)
    if (!r->refuses || r->how != NOTHING_BOUND)
      r->status = rg_session_bind(s, r->b.info[i].role, r->b.info[i].name, r->b.data[i],
                                  (size_t)r->b.info[i].bytes, &r->e);
  if (r->status == RG_OK && r->refuses && r->how == BACKWARD_FIRST)
    r->status = rg_session_backward(s, &r->e);
  if (r->status == RG_OK) r->status = rg_session_forward(s, &r->e);
  rg_session_destroy(s);
  return NULL;
}

Test(cp_equal, a_refused_call, .init = setup, .fini = teardown) {
  const int lengths[] = {100, 60}, ranks = 3;
  rg_plan *plan = plan_of("f32", "{ \"regraph_policy\": 1 }", 192, 2, ranks);
  for (refusal how = 0; how < REFUSALS; how++) {
    rg_comm *comm[3];
    refused_rank rank[3];
    pthread_t thread[3];
    rg_error e = {0};
    CR_OK(rg_comm_threads(ctx, ranks, 600, comm, &e), &e);
    for (int r = 0; r < ranks; r++) {
      rank[r] = (refused_rank){.plan = plan, .comm = comm[r], .how = how, .refuses = r == 1};
      make_buffers(plan, 4, 192, lengths, &rank[r].b);
      cr_assert_eq(pthread_create(&thread[r], NULL, run_refused, &rank[r]), 0);
    }
    for (int r = 0; r < ranks; r++) pthread_join(thread[r], NULL);
    for (int r = 0; r < ranks; r++) {
      cr_assert_eq(rank[r].status, r == 1 ? RG_E_USAGE : RG_E_COMM, "%s", rank[r].e.message);
      if (r != 1) cr_assert(strstr(rank[r].e.message, "rank 1 failed: "), "%s", rank[r].e.message);
      free_buffers(&rank[r].b);
      rg_comm_destroy(comm[r], NULL);
    }
  }
  rg_plan_destroy(plan);
}

/* ---- refusals ---- */

static void refused(const char *nodes, const char *outputs, int64_t T, const char *pointer,
                    const char *say) {
  char text[2048];
  rg_spec *spec = NULL;
  rg_plan *plan = NULL;
  rg_error e = {0};
  rg_binding set[] = {{"T", T, NULL}, {"B", 2, NULL}};
  rg_plan_options o = {.set = set, .nset = 2, .cp = 2};
  snprintf(text, sizeof text,
           "{ \"regraph\": 1, \"inputs\": { \"x\": { \"shape\": [\"T\", 2, 8], \"dtype\": \"f32\", "
           "\"grad\": true }, \"w\": { \"shape\": [4, 16], \"dtype\": \"f32\", \"grad\": true }, "
           "\"at\": { \"shape\": [\"B\"], \"dtype\": \"i32\" }, "
           "\"cu\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } }, \"nodes\": [ %s ], "
           "\"outputs\": { %s "
           "} }",
           nodes, outputs);
  CR_OK(rg_spec_load_text(ctx, text, strlen(text), "spec.json", NULL, 0, &spec, &e), &e);
  cr_assert_neq(rg_plan_create(spec, NULL, &o, &plan, &e), RG_OK, "%s", say);
  cr_assert_str_eq(e.file, "spec.json");
  cr_assert_str_eq(e.pointer, pointer, "%s: %s", e.pointer, e.message);
  cr_assert(strstr(e.message, say), "\"%s\" does not say \"%s\"", e.message, say);
  rg_spec_destroy(spec);
}

Test(cp_equal, what_can_not_be_shared_out, .init = setup, .fini = teardown) {
  static const char attend[] =
      "{ \"name\": \"a\", \"op\": \"swa_attn\", \"in\": { \"q\": \"x\", \"k\": \"x\", \"v\": "
      "\"x\", "
      "\"cu_seqlens\": \"cu\"%s }, \"out\": { \"o\": \"o\" }, \"attrs\": { \"window_left\": 3 } }";
  char nodes[1024];
  snprintf(nodes, sizeof nodes, attend, "");
  refused(nodes, "\"o\": \"o\"", 66, "/inputs", "the next capacity that does is 68");
  snprintf(nodes, sizeof nodes, attend, ", \"q_offset\": \"at\"");
  refused(nodes, "\"o\": \"o\"", 64, "/nodes/0/in/q_offset", "leave this port out");
  snprintf(nodes, sizeof nodes, attend, "");
  strcat(nodes,
         ", { \"name\": \"turn\", \"op\": \"transpose\", \"in\": { \"x\": \"o\" }, \"out\": { "
         "\"y\": \"y\" }, \"attrs\": { \"perm\": [1, 0, 2] } }");
  refused(nodes, "\"y\": \"y\"", 64, "/nodes/1", "a view must keep axis 0");
  snprintf(nodes, sizeof nodes, attend, "");
  strcat(nodes,
         ", { \"name\": \"more\", \"op\": \"silu\", \"in\": { \"x\": \"w\" }, \"out\": { \"y\": "
         "\"y\" } }");
  refused(nodes, "\"o\": \"o\", \"y\": \"y\"", 64, "/outputs/y", "every output has tokens");
  snprintf(nodes, sizeof nodes, attend, "");
  strcat(nodes,
         ", { \"name\": \"all\", \"op\": \"all_gather\", \"in\": { \"x\": \"o\" }, \"out\": { "
         "\"y\": \"y\" }, \"attrs\": { \"ranks\": 2 } }");
  refused(nodes, "\"y\": \"y\"", 64, "/nodes/1", "no collectives of its own");
  refused(
      "{ \"name\": \"n\", \"op\": \"silu\", \"in\": { \"x\": \"x\" }, \"out\": { \"y\": \"y\" } }",
      "\"y\": \"y\"", 64, "/inputs", "no tensor has sequences");
  snprintf(
      nodes, sizeof nodes, "%s",
      "{ \"name\": \"c\", \"op\": \"compress_kv\", \"in\": { \"k\": \"x\", \"v\": \"x\", "
      "\"cu_seqlens\": \"cu\" }, \"out\": { \"k\": \"k\", \"v\": \"v\" }, \"attrs\": { \"kernel\": "
      "12, \"stride\": 4 } }");
  refused(nodes, "\"k\": \"k\"", 32, "/nodes/0",
          "no fewer than 12; the next capacity that does is 48");
}
