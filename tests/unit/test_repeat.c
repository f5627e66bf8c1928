/* tests/unit/test_repeat.c: a repeated block is what one would have written by hand. Malformed
 * blocks are in tests/golden/errors. */
#include "graph/spec.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static rg_context *ctx;
static void setup(void) {
  cr_assert_eq(rg_context_create(NULL, &ctx, NULL), RG_OK);
}
static void teardown(void) {
  rg_context_destroy(ctx);
}
TestSuite(repeat, .init = setup, .fini = teardown);

static rg_spec *load(const char *text, const rg_binding *set, size_t nset) {
  rg_spec *spec;
  rg_error e = {0};
  rg_status status = rg_spec_load_text(ctx, text, strlen(text), "spec", set, nset, &spec, &e);
  cr_assert_eq(status, RG_OK, "%s: %s", e.pointer, e.message);
  return spec;
}

static void same(const char *block, const char *by_hand, const rg_binding *set, size_t nset) {
  rg_spec *a = load(block, set, nset), *b = load(by_hand, NULL, 0);
  rg_text x, y;
  rg_error e = {0};
  cr_assert_eq(rg_spec_write(a, "text", &x, &e), RG_OK);
  cr_assert_eq(rg_spec_write(b, "text", &y, &e), RG_OK);
  cr_assert_str_eq(x.data, y.data);
  rg_text json; /* written, blocks are written out */
  cr_assert_eq(rg_spec_write(a, "json", &json, &e), RG_OK);
  rg_spec *c = load(json.data, NULL, 0);
  rg_text_destroy(&y);
  cr_assert_eq(rg_spec_write(c, "text", &y, &e), RG_OK);
  cr_assert_str_eq(x.data, y.data);
  rg_text_destroy(&json);
  rg_text_destroy(&x);
  rg_text_destroy(&y);
  rg_spec_destroy(a);
  rg_spec_destroy(b);
  rg_spec_destroy(c);
}

#define HEAD "{\"regraph\": 1, \"params\": {\"n\": 2}, \"inputs\": {"
#define IN   "{\"shape\": [\"T\", 4], \"dtype\": \"f32\", \"grad\": true}"
#define W    "{\"shape\": [4, 4], \"dtype\": \"f32\", \"grad\": true}"
#define BLOCK(count, more)                                                                    \
  "{\"repeat\": " count                                                                       \
  ", \"name\": \"l\", \"carry\": {\"h\": {\"first\": \"e\", \"next\": \"y\"}},"               \
  "\"inputs\": {\"w\": " W "}, \"nodes\": ["                                                  \
  "{\"name\": \"up\", \"op\": \"linear\", \"in\": {\"x\": \"h\", \"w\": \"w\"}},"             \
  "{\"name\": \"sum\", \"op\": \"add\", \"in\": {\"a\": [\"h\", \"up.y\", \"x\"]}, \"out\": " \
  "{\"y\": "                                                                                  \
  "\"y\"}}],"                                                                                 \
  "\"out\": {\"last\": \"y\"}}" more

/* An input "x" that all copies read, a node before and one after, a carried tensor. */
Test(repeat, is_what_one_would_write) {
  static const char by_hand[] = HEAD
      "\"x\": " IN ", \"l0_w\": " W ", \"l1_w\": " W "}, \"nodes\": ["
      "{\"name\": \"enter\", \"op\": \"silu\", \"in\": {\"x\": \"x\"}, \"out\": {\"y\": \"e\"}},"
      "{\"name\": \"l0_up\", \"op\": \"linear\", \"in\": {\"x\": \"e\", \"w\": \"l0_w\"}},"
      "{\"name\": \"l0_sum\", \"op\": \"add\", \"in\": {\"a\": [\"e\", \"l0_up.y\", \"x\"]}, "
      "\"out\": "
      "{\"y\": "
      "\"l0_y\"}},"
      "{\"name\": \"l1_up\", \"op\": \"linear\", \"in\": {\"x\": \"l0_y\", \"w\": \"l1_w\"}},"
      "{\"name\": \"l1_sum\", \"op\": \"add\", \"in\": {\"a\": [\"l0_y\", \"l1_up.y\", \"x\"]}, "
      "\"out\": {\"y\": "
      "\"l1_y\"}},"
      "{\"name\": \"leave\", \"op\": \"silu\", \"in\": {\"x\": \"l1_y\"}, \"out\": {\"y\": "
      "\"z\"}}],"
      "\"outputs\": {\"z\": \"z\", \"last\": \"l1_y\"}}";
#define AROUND(block)                                                                         \
  HEAD "\"x\": " IN "}, \"nodes\": ["                                                         \
       "{\"name\": \"enter\", \"op\": \"silu\", \"in\": {\"x\": \"x\"}, \"out\": {\"y\": "    \
       "\"e\"}}," block "{\"name\": \"leave\", \"op\": \"silu\", \"in\": {\"x\": \"last\"}, " \
       "\"out\": {\"y\": \"z\"}}],"                                                           \
       "\"outputs\": {\"z\": \"z\", \"last\": \"last\"}}"
  rg_binding two[] = {{"n", 2, NULL}}, text[] = {{"n", 0, "2"}};
  same(AROUND(BLOCK("2", ",")), by_hand, NULL, 0);
  same(AROUND(BLOCK("\"$n\"", ",")), by_hand, NULL, 0);
  same(AROUND(BLOCK("\"$n\"", ",")), by_hand, two, 1);
  same(AROUND(BLOCK("\"$n\"", ",")), by_hand, text, 1);
}

/* A second block carries on from the first. */
Test(repeat, blocks_follow_each_other) {
  rg_spec *spec = load(
      HEAD
      "\"x\": " IN "}, \"nodes\": ["
      "{\"repeat\": 3, \"name\": \"a\", \"carry\": {\"h\": {\"first\": \"x\", \"next\": \"s.y\"}},"
      "\"nodes\": [{\"name\": \"s\", \"op\": \"silu\", \"in\": {\"x\": \"h\"}}], \"out\": {\"p\": "
      "\"s.y\"}},"
      "{\"repeat\": 2, \"name\": \"b\", \"carry\": {\"h\": {\"first\": \"p\", \"next\": \"s.y\"}},"
      "\"nodes\": [{\"name\": \"s\", \"op\": \"silu\", \"in\": {\"x\": \"h\"}}], \"out\": {\"q\": "
      "\"s.y\"}}],"
      "\"outputs\": {\"o\": \"q\"}}",
      NULL, 0);
  cr_assert_eq(spec->graph->nnode, 5);
  static const char *const order[] = {"a0_s", "a1_s", "a2_s", "b0_s", "b1_s"};
  for (int i = 0; i < 5; i++) {
    cr_assert_str_eq(spec->graph->node[i].name, order[i]);
    cr_assert_eq(spec->graph->node[i].in[0],
                 i ? spec->graph->node[i - 1].out[0] : spec->graph->input[0].tensor);
  }
  rg_spec_destroy(spec);
}

/* A plan cannot change how many copies there are. */
Test(repeat, count_is_fixed_at_load) {
  rg_spec *spec = load(AROUND(BLOCK("\"$n\"", ",")), NULL, 0);
  rg_binding set[] = {{"T", 8, NULL}, {"n", 3, NULL}};
  rg_plan_options o = {.set = set, .nset = 2};
  rg_plan *plan;
  rg_error e = {0};
  cr_assert_eq(rg_plan_create(spec, NULL, &o, &plan, &e), RG_E_USAGE);
  cr_assert_not_null(strstr(e.message, "loaded with 2"), "%s", e.message);
  e = (rg_error){0};
  o.nset = 1;
  cr_assert_eq(rg_plan_create(spec, NULL, &o, &plan, &e), RG_OK, "%s", e.message);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
}

/* Read as any other number that is set: 2K is 2048 of them, and what is none is said to be none. */
Test(repeat, count_as_text) {
  rg_error e = {0};
  rg_binding set[] = {{"n", 0, "1K"}};
  rg_spec *spec = load(AROUND(BLOCK("\"$n\"", ",")), set, 1);
  cr_assert_gt(spec->graph->nnode, 1024);
  rg_spec_destroy(spec);
  static const char *const bad[] = {"abc", "2x", "", "99999999999999999999"};
  static const char text[] = AROUND(BLOCK("\"$n\"", ","));
  for (int i = 0; i < RGI_COUNT(bad); i++) {
    set[0].text = bad[i];
    e = (rg_error){0};
    cr_assert_eq(rg_spec_load_text(ctx, text, strlen(text), "spec", set, 1, &spec, &e), RG_E_USAGE);
    cr_assert_not_null(strstr(e.message, "'n' is set to '"), "%s", e.message);
    cr_assert_not_null(strstr(e.message, bad[i]), "%s", e.message);
  }
}

Test(repeat, stock_model) {
  rg_spec *spec;
  rg_error e = {0};
  rg_binding set[] = {{"layers", 3, NULL}};
  for (size_t n = 0; n < 2; n++) {
    cr_assert_eq(
        rg_spec_load_file(ctx, RG_SOURCE_DIR "/examples/nsa_model.json", set, n, &spec, &e), RG_OK,
        "%s", e.message);
    cr_assert_eq(spec->graph->nnode, n ? 3 * 20 : 12 * 20);
    rg_spec_destroy(spec);
  }
}

/* A plan of many layers says what each does once, and which differ. */
Test(repeat, plan_of_many_layers_is_short) {
  rg_spec *spec;
  rg_plan *plan;
  rg_policy *policy;
  rg_text text;
  rg_error e = {0};
  static const char wish[] =
      "{\"regraph_policy\": 1, \"nodes\": {\"layer3_swa_o\": \"recompute\"}}";
  rg_binding layers = {"layers", 40, NULL}, set[] = {{"T", 256, NULL}, {"B", 1, NULL}};
  cr_assert_eq(
      rg_spec_load_file(ctx, RG_SOURCE_DIR "/examples/nsa_model.json", &layers, 1, &spec, &e),
      RG_OK, "%s", e.message);
  cr_assert_eq(rg_policy_load_text(ctx, wish, strlen(wish), "policy", &policy, &e), RG_OK);
  rg_plan_options o = {.set = set, .nset = 2};
  cr_assert_eq(rg_plan_create(spec, policy, &o, &plan, &e), RG_OK, "%s", e.message);
  cr_assert_eq(rg_plan_write(plan, "text", &text, &e), RG_OK);
  int lines = 0;
  for (const char *p = text.data; *p; p++) lines += *p == '\n';
  cr_assert_lt(lines, 100, "%d lines for 40 layers", lines);
  cr_assert_not_null(strstr(text.data, "layer*_q_heads (40)"), "%s", text.data);
  const char *rest = strstr(text.data, "\nrecompute: ");
  cr_assert_not_null(rest);
  const char *one = strstr(rest, "layer3_swa_o"), *others = strstr(rest, "layer*_swa_o");
  cr_assert(one && others);
  cr_assert_not_null(strstr(others, "each of 39\n"));
  rg_text_destroy(&text);
  rg_plan_destroy(plan);
  rg_policy_destroy(policy);
  rg_spec_destroy(spec);
}
