/* tests/unit/test_policy.c: policies as read. Malformed policies are in
 * tests/golden/errors. */
#include "graph/policy.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef RG_SOURCE_DIR
#define RG_SOURCE_DIR "."
#endif

static rg_context *ctx;
static void setup(void) {
  cr_assert_eq(rg_context_create(NULL, &ctx, NULL), RG_OK);
}
static void teardown(void) {
  rg_context_destroy(ctx);
}
TestSuite(policy, .init = setup, .fini = teardown);

static rg_status load(const char *members, rg_policy **out, rg_error *e) {
  char text[1024];
  snprintf(text, sizeof text, "{\"regraph_policy\": 1%s%s}", *members ? ", " : "", members);
  return rg_policy_load_text(ctx, text, strlen(text), "policy", out, e);
}

static rg_policy *must_load(const char *members) {
  rg_policy *p;
  rg_error e = {0};
  cr_assert_eq(load(members, &p, &e), RG_OK, "%s: %s", e.pointer, e.message);
  return p;
}

Test(policy, kinds) {
  rg_policy *p = must_load("");
  cr_assert_eq(p->preset, RGI_PRESET_NONE);
  cr_assert_eq(p->split_heads, 0);
  cr_assert_not(p->split_kv);
  rg_policy_destroy(p);
  p = must_load("\"preset\": \"none\", \"split_heads\": 2, \"split_kv\": true, \"doc\": \"text\"");
  cr_assert_eq(p->preset, RGI_PRESET_NONE);
  cr_assert_eq(p->split_heads, 2);
  cr_assert(p->split_kv);
  rg_policy_destroy(p);
  p = must_load("\"preset\": \"all\"");
  cr_assert_eq(p->preset, RGI_PRESET_ALL);
  rg_policy_destroy(p);
  p = must_load("\"recompute\": []");
  cr_assert_eq(p->preset, RGI_PRESET_LIST);
  cr_assert_eq(p->nrecompute, 0);
  rg_policy_destroy(p);
  p = must_load("\"recompute\": [\"b\", \"a\"]");
  cr_assert_eq(p->nrecompute, 2);
  cr_assert_str_eq(p->recompute[0], "b");
  cr_assert_str_eq(p->pointer[1], "/recompute/1");
  rg_policy_destroy(p);
}

Test(policy, budgets) {
  static const struct {
    const char *text;
    int64_t bytes;
  } good[] = {{"0", 0},
              {"123", 123},
              {"\"17\"", 17},
              {"\"17B\"", 17},
              {"\"6GiB\"", INT64_C(6) << 30},
              {"\"6 GiB\"", INT64_C(6) << 30},
              {"\"512MiB\"", 512 << 20},
              {"\"100KB\"", 100000},
              {"\"1.5GiB\"", INT64_C(3) << 29},
              {"\"0.000001MB\"", 1},
              {"\"1.999999KiB\"", 2047},
              {"\"2TB\"", 2000000000000},
              {"\"8388607TiB\"", INT64_C(8388607) << 40},
              {"9223372036854775807", INT64_MAX}};
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    char members[128];
    snprintf(members, sizeof members, "\"budget\": {\"bytes\": %s}", good[i].text);
    rg_policy *p = must_load(members);
    cr_assert_eq(p->preset, RGI_PRESET_BUDGET);
    cr_assert_eq(p->budget, good[i].bytes, "%s", good[i].text);
    cr_assert_not(p->budget_of_saved);
    rg_policy_destroy(p);
  }
  static const char *const bad[] = {"\"\"",
                                    "\" 1\"",
                                    "\"1  GiB\"",
                                    "\"-1\"",
                                    "\"1.\"",
                                    "\".5GiB\"",
                                    "\"1.2.3\"",
                                    "\"1.1234567GiB\"",
                                    "\"1gib\"",
                                    "\"1GiB \"",
                                    "\"1e3\"",
                                    "true",
                                    "null",
                                    "[]",
                                    "1.0",
                                    "\"0x10\"",
                                    "-5",
                                    "\"8388608TiB\"",
                                    "\"99999999999999999999\""};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    char members[128];
    rg_policy *p;
    rg_error e = {0};
    snprintf(members, sizeof members, "\"budget\": {\"bytes\": %s}", bad[i]);
    cr_assert_neq(load(members, &p, &e), RG_OK, "%s", bad[i]);
    cr_assert_null(p);
    cr_assert_str_eq(e.pointer, "/budget/bytes");
    cr_assert_str_eq(e.file, "policy");
    cr_assert_eq(rg_status_exit_code(e.status), 3);
  }
  rg_policy *p = must_load("\"budget\": {\"bytes\": 5, \"of\": \"saved\"}");
  cr_assert(p->budget_of_saved);
  rg_policy_destroy(p);
}

static const char *const spec_text =
    "{\"regraph\": 1, \"params\": {\"KH\": 4}, \"inputs\": {"
    "\"q\": {\"shape\": [\"T\", 8, 16], \"dtype\": \"f32\", \"grad\": true},"
    "\"k\": {\"shape\": [\"T\", \"KH\", 16], \"dtype\": \"f32\", \"grad\": true},"
    "\"v\": {\"shape\": [\"T\", \"KH\", 16], \"dtype\": \"f32\", \"grad\": true},"
    "\"cu\": {\"shape\": [\"B+1\"], \"dtype\": \"i32\"}},"
    "\"nodes\": [{\"name\": \"a\", \"op\": \"swa_attn\", \"in\": {\"q\": \"q\", \"k\": \"k\", "
    "\"v\": \"v\","
    " \"cu_seqlens\": \"cu\"}, \"attrs\": {\"window_left\": 3}},"
    "{\"name\": \"dead\", \"op\": \"silu\", \"in\": {\"x\": \"q\"}},"
    "{\"name\": \"flat\", \"op\": \"reshape\", \"in\": {\"x\": \"a.o\"}, \"attrs\": {\"shape\": "
    "[0, -1]}}],"
    "\"outputs\": {\"o\": \"flat.y\"}}";

static rg_status check(const char *members, const rg_binding *set, size_t nset, rg_error *e) {
  rg_spec *spec;
  cr_assert_eq(rg_spec_load_text(ctx, spec_text, strlen(spec_text), "spec", set, nset, &spec, e),
               RG_OK, "%s", e->message);
  rg_policy *p = must_load(members);
  rg_status status = rg_check(spec, p, e);
  rg_policy_destroy(p);
  rg_spec_destroy(spec);
  return status;
}

Test(policy, against_a_spec) {
  rg_binding set[] = {{"T", 8, NULL}, {"B", 2, NULL}};
  for (size_t bound = 0; bound <= 2; bound += 2) {
    rg_error e = {0};
    cr_assert_eq(check("\"recompute\": [\"a\"]", set, bound, &e), RG_OK, "%s", e.message);
    cr_assert_eq(check("\"recompute\": [\"dead\"]", set, bound, &e), RG_OK, "%s",
                 e.message); /* named, though unused */
    cr_assert_eq(check("\"recompute\": [\"o.copy\"]", set, bound, &e), RG_OK, "%s", e.message);
    cr_assert_eq(check("\"preset\": \"all\", \"split_heads\": 2", set, bound, &e), RG_OK, "%s",
                 e.message);
    cr_assert_eq(check("\"recompute\": [\"aa\"]", set, bound, &e), RG_E_POLICY);
    cr_assert_str_eq(e.file, "policy");
    cr_assert_str_eq(e.pointer, "/recompute/0");
    e = (rg_error){0};
    cr_assert_eq(check("\"recompute\": [\"flat\"]", set, bound, &e), RG_E_POLICY);
    e = (rg_error){0};
    cr_assert_eq(check("\"split_heads\": 3", set, bound, &e), RG_E_POLICY);
    cr_assert_str_eq(e.file, "policy");
    cr_assert_str_eq(e.pointer, "/split_heads");
    e = (rg_error){0};
    cr_assert_eq(check("\"split_heads\": 8", set, bound, &e), RG_E_POLICY);
  }
}

Test(policy, names_are_limited) {
  size_t n = (size_t)1 << 17;
  char *text = malloc(n),
       *end = text + sprintf(text, "{\"regraph_policy\": 1, \"recompute\": [\"a\"");
  for (int i = 0; i < 8192; i++) end += sprintf(end, ",\"n%d\"", i);
  strcpy(end, "]}");
  rg_policy *p;
  rg_error e = {0};
  cr_assert_eq(rg_policy_load_text(ctx, text, strlen(text), "policy", &p, &e), RG_E_LIMIT);
  cr_assert_str_eq(e.pointer, "/recompute");
  free(text);
}

Test(policy, misuse) {
  rg_policy *p = (rg_policy *)ctx;
  rg_error e = {0};
  cr_assert_eq(rg_policy_load_file(ctx, "/nonexistent", &p, &e), RG_E_IO);
  cr_assert_str_eq(e.file, "/nonexistent");
  cr_assert_null(p);
  cr_assert_eq(rg_policy_load_file(ctx, NULL, &p, NULL), RG_E_USAGE);
  cr_assert_eq(rg_policy_load_file(NULL, "x", &p, NULL), RG_E_USAGE);
  cr_assert_eq(rg_policy_load_text(ctx, "{}", 2, NULL, NULL, NULL), RG_E_USAGE);
  cr_assert_eq(rg_policy_load_text(ctx, "{}", 2, NULL, &p, NULL), RG_E_KEY);
  rg_policy_destroy(NULL);
  static const char *const name[] = {"all", "none", "budget", "partial", "split_kv"};
  for (int i = 0; i < 5; i++) {
    char path[512];
    snprintf(path, sizeof path, RG_SOURCE_DIR "/examples/policies/%s.json", name[i]);
    e = (rg_error){0};
    cr_assert_eq(rg_policy_load_file(ctx, path, &p, &e), RG_OK, "%s", e.message);
    rg_policy_destroy(p);
  }
}

/* ---- words, rules, patterns ---- */

Test(policy, words) {
  static const struct {
    const char *word;
    rgi_preset preset;
    bool least;
    int64_t budget;
  } words[] = {{"none", RGI_PRESET_NONE, false, 0},
               {"all", RGI_PRESET_ALL, false, 0},
               {"least", RGI_PRESET_BUDGET, true, 0},
               {"6GiB", RGI_PRESET_BUDGET, false, INT64_C(6) << 30},
               {"100", RGI_PRESET_BUDGET, false, 100}};
  rg_policy *p;
  rg_error e = {0};
  for (size_t i = 0; i < sizeof words / sizeof *words; i++)
    for (int file = 0; file < 2; file++) {
      rg_status status =
          file ? rg_policy_load_file(ctx, words[i].word, &p, &e)
               : rg_policy_load_text(ctx, words[i].word, strlen(words[i].word), NULL, &p, &e);
      cr_assert_eq(status, RG_OK, "%s: %s", words[i].word, e.message);
      cr_assert_eq(p->preset, words[i].preset);
      cr_assert_eq(p->least, words[i].least);
      cr_assert_eq(p->budget, words[i].budget);
      rg_policy_destroy(p);
    }
  cr_assert_eq(rg_policy_load_file(ctx, "al", &p, &e), RG_E_IO);
  e = (rg_error){0};
  cr_assert_eq(rg_policy_load_text(ctx, "all\0", 4, NULL, &p, &e), RG_E_SYNTAX);
  e = (rg_error){0};
  cr_assert_eq(rg_policy_load_text(ctx, "6GiBs", 5, NULL, &p, &e), RG_E_SYNTAX);
}

Test(policy, rules) {
  rg_policy *p = must_load(
      "\"budget\": \"least\", \"nodes\": {\"layer*\": \"keep\", \"layer*_o\": \"recompute\", "
      "\"layer1_o\": \"auto\", \"*a*b*\": \"keep\"}");
  cr_assert(p->least && p->preset == RGI_PRESET_BUDGET);
  static const struct {
    const char *name;
    rgi_action action;
  } say[] = {{"layer0_q", RGI_KEEP}, {"layer0_o", RGI_RECOMPUTE},
             {"layer1_o", RGI_AUTO}, {"layer", RGI_KEEP},
             {"lay", RGI_AUTO},      {"ab", RGI_KEEP},
             {"xaxxaxbx", RGI_KEEP}, {"ba", RGI_AUTO},
             {"", RGI_AUTO}};
  for (size_t i = 0; i < sizeof say / sizeof *say; i++)
    cr_assert_eq(rgi_policy_action(p, say[i].name), say[i].action, "%s", say[i].name);
  rg_policy_destroy(p);
  p = must_load("\"recompute\": [\"a\", \"c*\"]");
  cr_assert(rgi_policy_lists(p, "a") && rgi_policy_lists(p, "cd") && !rgi_policy_lists(p, "ab"));
  rg_policy_destroy(p);
}

Test(policy, rules_against_a_spec) {
  static const struct {
    const char *members;
    rg_status status;
    const char *pointer;
  } cases[] = {{"\"nodes\": {\"a\": \"recompute\", \"*\": \"auto\"}", RG_OK, ""},
               {"\"nodes\": {\"flat\": \"keep\"}", RG_OK, ""},
               {"\"nodes\": {\"flat\": \"recompute\"}", RG_E_POLICY, "/nodes/flat"},
               {"\"nodes\": {\"fl*\": \"recompute\"}", RG_E_POLICY, "/nodes/fl*"},
               {"\"nodes\": {\"fl*\": \"keep\"}", RG_OK, ""},
               {"\"nodes\": {\"b*\": \"keep\"}", RG_E_POLICY, "/nodes/b*"},
               {"\"nodes\": {\"aa\": \"auto\"}", RG_E_POLICY, "/nodes/aa"},
               {"\"recompute\": [\"*\"]", RG_OK, ""},
               {"\"recompute\": [\"f*\"]", RG_E_POLICY, "/recompute/0"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    rg_error e = {0};
    cr_assert_eq(check(cases[i].members, NULL, 0, &e), cases[i].status, "%s: %s", cases[i].members,
                 e.message);
    cr_assert_str_eq(e.pointer, cases[i].pointer);
  }
}
