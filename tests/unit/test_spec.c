/* tests/unit/test_spec.c: loading specs: what is listed, bound, solved, filled in; limits, misuse,
 * threads, no memory. Malformed specs are in tests/golden/errors (test_golden.c). */
#include "graph/spec.h"
#include <criterion/criterion.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef RG_SOURCE_DIR
#define RG_SOURCE_DIR "."
#endif
#define NSA RG_SOURCE_DIR "/examples/nsa.json"

static rg_context *context(void) {
  rg_context *ctx;
  cr_assert_eq(rg_context_create(NULL, &ctx, NULL), RG_OK);
  return ctx;
}

static rg_spec *must_load(rg_context *ctx, const char *text, const rg_binding *set, size_t nset) {
  rg_error e = {0};
  rg_spec *spec;
  rg_status status = rg_spec_load_text(ctx, text, strlen(text), "text", set, nset, &spec, &e);
  cr_assert_eq(status, RG_OK, "%s: %s", e.pointer, e.message);
  return spec;
}

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

static const char *const small =
    "{\"regraph\": 1, \"params\": {\"H\": 4, \"D\": 16, \"dtype\": \"f16\", \"eps\": 0.5, "
    "\"flag\": true},"
    " \"inputs\": {\"x\": {\"shape\": [\"T\", \"H*D\"], \"dtype\": \"$dtype\", \"grad\": true},"
    "   \"w\": {\"shape\": [\"H*D\"], \"dtype\": \"$dtype\", \"grad\": \"accumulate\"},"
    "   \"cu\": {\"shape\": [\"B+1\"], \"dtype\": \"i32\"}},"
    " \"nodes\": [{\"name\": \"n\", \"op\": \"rmsnorm\", \"in\": {\"x\": \"x\", \"w\": \"w\", "
    "\"cu_seqlens\": \"cu\"}}],"
    " \"outputs\": {\"y\": \"n.y\"}}";

/* ---- what the caller binds ---- */

Test(spec, lists_tensors_in_order) {
  rg_context *ctx = context();
  rg_spec *spec = must_load(ctx, small, NULL, 0);
  static const struct {
    const char *name;
    rg_role role;
    rg_dtype dtype;
    int rank;
    int64_t last;
    bool accumulates, seqlens;
  } want[] = {{"x", RG_INPUT, RG_F16, 2, 64, false, false},
              {"w", RG_INPUT, RG_F16, 1, 64, false, false},
              {"cu", RG_INPUT, RG_I32, 1, -1, false, true},
              {"y", RG_OUTPUT, RG_F16, 2, 64, false, false},
              {"y", RG_GRAD_IN, RG_F16, 2, 64, false, false},
              {"x", RG_GRAD_OUT, RG_F16, 2, 64, false, false},
              {"w", RG_GRAD_OUT, RG_F32, 1, 64, true, false}};
  rg_tensor_info t;
  for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
    cr_assert_eq(rg_spec_tensor(spec, i, &t), RG_OK);
    cr_assert_str_eq(t.name, want[i].name);
    cr_assert_eq(t.role, want[i].role);
    cr_assert_eq(t.dtype, want[i].dtype);
    cr_assert_eq(t.rank, want[i].rank);
    cr_assert_eq(t.dim[t.rank - 1], want[i].last);
    cr_assert_eq(t.accumulates, want[i].accumulates);
    cr_assert_eq(t.seqlens, want[i].seqlens);
    cr_assert_not(t.offsets);
  }
  cr_assert_eq(rg_spec_tensor(spec, 7, &t), RG_E_USAGE);
  cr_assert_eq(rg_spec_tensor(spec, 0, &t), RG_OK);
  cr_assert_eq(t.dim[0], -1);
  cr_assert_eq(t.bytes, -1);
  rg_spec_destroy(spec);

  rg_binding set[] = {{"T", 10, NULL}, {"B", 0, "2"}, {"dtype", 0, "f32"}};
  spec = must_load(ctx, small, set, 3);
  cr_assert_eq(rg_spec_tensor(spec, 0, &t), RG_OK);
  cr_assert_eq(t.dim[0], 10);
  cr_assert_eq(t.bytes, 10 * 64 * 4);
  cr_assert_eq(rg_spec_tensor(spec, 2, &t), RG_OK);
  cr_assert_eq(t.dim[0], 3);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

Test(spec, integer_outputs_have_no_gradient) {
  rg_context *ctx = context();
  rg_spec *spec = must_load(
      ctx,
      "{\"regraph\": 1, \"inputs\": {\"x\": {\"shape\": [4, 2, 3], \"dtype\": \"f32\", \"grad\": "
      "true},"
      " \"i\": {\"shape\": [4], \"dtype\": \"i32\"}, \"z\": {\"shape\": [4], \"dtype\": \"f32\"}},"
      " \"nodes\": [{\"name\": \"s\", \"op\": \"silu\", \"in\": {\"x\": \"z\"}}],"
      " \"outputs\": {\"i\": \"i\", \"x\": \"x\", \"constant\": \"s.y\"}}",
      NULL, 0);
  rg_tensor_info t;
  int gradients = 0;
  for (size_t i = 0; rg_spec_tensor(spec, i, &t) == RG_OK; i++)
    if (t.role == RG_GRAD_IN) {
      cr_assert_str_eq(t.name, "x"); /* neither i nor what only z reaches */
      gradients++;
    }
  cr_assert_eq(gradients, 1);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

/* ---- bindings ---- */

Test(spec, bindings) {
  rg_context *ctx = context();
  rg_tensor_info t;
  /* later ones win; a string parameter takes a number as text; a number parameter any number */
  rg_binding set[] = {
      {"D", 8, NULL}, {"D", 0, "32"}, {"dtype", 0, "bf16"}, {"eps", 0, "3"}, {"flag", 0, "false"}};
  rg_spec *spec = must_load(ctx, small, set, 5);
  cr_assert_eq(rg_spec_tensor(spec, 0, &t), RG_OK);
  cr_assert_eq(t.dim[1], 4 * 32);
  cr_assert_eq(t.dtype, RG_BF16);

  rg_error e = {0};
  rgi_graph *g;
  cr_assert_eq(rgi_spec_elaborate(spec, NULL, 0, true, &g, &e), RG_E_USAGE);
  cr_assert_null(g);
  cr_assert(strstr(e.message, "'T'"), "%s", e.message);
  rg_binding rest[] = {{"T", 100, NULL}, {"B", 5, NULL}, {"D", 2, NULL}};
  e = (rg_error){0};
  cr_assert_eq(rgi_spec_elaborate(spec, rest, 3, true, &g, &e), RG_OK, "%s", e.message);
  cr_assert(g->bound);
  cr_assert_eq(g->tensor[g->input[0].tensor].dim[0].c, 100);
  cr_assert_eq(g->tensor[g->input[0].tensor].dim[1].c, 8);
  cr_assert_eq(g->tensor[g->input[2].tensor].dim[0].c, 6);
  rgi_graph_destroy(g);
  rg_binding wrong[] = {{"C", 1, NULL}};
  cr_assert_eq(rgi_spec_elaborate(spec, wrong, 1, false, &g, &e), RG_E_USAGE);
  rg_binding flag[] = {{"flag", 0, "maybe"}}, nameless[] = {{NULL, 1, NULL}};
  cr_assert_eq(rgi_spec_elaborate(spec, flag, 1, false, &g, NULL), RG_E_USAGE);
  cr_assert_eq(rgi_spec_elaborate(spec, nameless, 1, false, &g, NULL), RG_E_USAGE);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

Test(spec, solves_dimensions) {
  rg_context *ctx = context();
  rg_error e = {0};
  rg_spec *spec =
      must_load(ctx,
                "{\"regraph\": 1, \"params\": {\"H\": 4}, \"inputs\": {"
                "\"a\": {\"shape\": [\"T\", \"H\"], \"dtype\": \"f32\"},"
                "\"b\": {\"shape\": [\"2*B+1\", \"T*B\", \"(T+1)/2\"], \"dtype\": \"f32\"},"
                "\"c\": {\"shape\": [\"B*T\", \"T\"], \"dtype\": \"f32\"}},"
                "\"nodes\": [{\"name\": \"s\", \"op\": \"silu\", \"in\": {\"x\": \"a\"}}],"
                "\"outputs\": {\"y\": \"s.y\"}}",
                NULL, 0);
  rg_binding s[4];
  size_t n = 0;
  cr_assert_eq(rg_spec_solve(spec, "a", 2, (int64_t[]){7, 4}, s, 4, &n, &e), RG_OK, "%s",
               e.message);
  cr_assert_eq(n, 1);
  cr_assert_str_eq(s[0].name, "T");
  cr_assert_eq(s[0].value, 7);
  cr_assert_eq(rg_spec_solve(spec, "b", 3, (int64_t[]){5, 14, 4}, s, 4, &n, &e), RG_OK, "%s",
               e.message);
  cr_assert_eq(n, 2);
  cr_assert_str_eq(s[1].name, "B");
  cr_assert_eq(s[1].value, 2);
  cr_assert_eq(rg_spec_solve(spec, "c", 2, (int64_t[]){14, 7}, s, 4, &n, &e), RG_OK);
  cr_assert_eq(n, 2);
  /* contradictions: with a solved name, with a parameter, with the form of an expression, in
   * rank */
  cr_assert_eq(rg_spec_solve(spec, "b", 3, (int64_t[]){5, 15, 4}, s, 4, &n, &e), RG_E_SHAPE);
  cr_assert_str_eq(e.pointer, "/inputs/b/shape/1");
  n = 0;
  cr_assert_eq(rg_spec_solve(spec, "a", 2, (int64_t[]){7, 5}, s, 4, &n, NULL), RG_E_SHAPE);
  n = 0;
  cr_assert_eq(rg_spec_solve(spec, "b", 3, (int64_t[]){4, 1, 1}, s, 4, &n, NULL), RG_E_SHAPE);
  cr_assert_eq(rg_spec_solve(spec, "b", 3, (int64_t[]){INT64_MIN, 1, 1}, s, 4, &n, NULL),
               RG_E_SHAPE);
  cr_assert_eq(rg_spec_solve(spec, "a", 3, (int64_t[]){1, 4, 1}, s, 4, &n, NULL), RG_E_RANK);
  cr_assert_eq(rg_spec_solve(spec, "nobody", 1, (int64_t[]){1}, s, 4, &n, NULL), RG_E_NAME);
  cr_assert_eq(n, 0);
  cr_assert_eq(rg_spec_solve(spec, "a", 2, (int64_t[]){7, 4}, s, 0, &n, NULL), RG_E_USAGE);
  /* an order of axes that needs two rounds: B*T is known once T is */
  s[0] = (rg_binding){"B", 3, NULL};
  n = 1;
  cr_assert_eq(rg_spec_solve(spec, "c", 2, (int64_t[]){12, 4}, s, 4, &n, NULL), RG_OK);
  cr_assert_eq(n, 2);
  cr_assert_eq(s[1].value, 4);
  cr_assert_eq(rg_spec_solve(spec, "c", 2, (int64_t[]){13, 4}, s, 4, &n, NULL), RG_E_SHAPE);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

/* ---- elaboration ---- */

static const rg_value *attr_of(const rgi_graph *g, const char *node, const char *attr) {
  for (int n = 0; n < g->nnode; n++) {
    const rg_op *op = g->node[n].op;
    for (int i = 0; i < op->nattr && strcmp(g->node[n].name, node) == 0; i++)
      if (strcmp(op->attrs[i].name, attr) == 0) return &g->node[n].attr[i];
  }
  cr_assert_fail("no attribute %s of %s", attr, node);
  return NULL;
}

Test(spec, attribute_values) {
  rg_context *ctx = context();
  static const char *const text =
      "{\"regraph\": 1, \"params\": {\"W\": 8, \"scale\": 1, \"cap\": 2.5, \"to\": \"bf16\"}, "
      "\"inputs\": {"
      "\"q\": {\"shape\": [8, 4, 16], \"dtype\": \"f32\"}, \"cu\": {\"shape\": [3], \"dtype\": "
      "\"i32\"}},"
      "\"nodes\": [{\"name\": \"a\", \"op\": \"swa_attn\", \"in\": {\"q\": \"q\", \"k\": \"q\", "
      "\"v\": \"q\","
      " \"cu_seqlens\": \"cu\"}, \"attrs\": {\"window_left\": \"(W*2-1)/4\", \"scale\": \"$scale\","
      " \"softcap\": \"$cap\"}},"
      "{\"name\": \"b\", \"op\": \"cast\", \"in\": {\"x\": \"a.o\"}, \"attrs\": {\"to\": \"$to\"}},"
      "{\"name\": \"c\", \"op\": \"reshape\", \"in\": {\"x\": \"b.y\"}, \"attrs\": {\"shape\": "
      "[-1, \"W*W\", "
      "\"$W\"]}},"
      "{\"name\": \"d\", \"op\": \"cast\", \"in\": {\"x\": \"c.y\"}}], \"outputs\": {\"y\": "
      "\"d.y\"}}";
  rg_binding set[] = {{"scale", 0, "-0.25"}, {"cap", 3, NULL}, {"to", 0, "f16"}};
  rg_error e = {0};
  for (size_t n = 0; n <= 3; n += 3) {
    rgi_graph *g;
    rg_spec *spec = must_load(ctx, text, NULL, 0);
    cr_assert_eq(rgi_spec_elaborate(spec, set, n, true, &g, &e), RG_OK, "%s: %s", e.pointer,
                 e.message);
    cr_assert_eq(attr_of(g, "a", "window_left")->i, 3);
    cr_assert_eq(attr_of(g, "a", "scale")->f, n ? -0.25 : 1.0);
    cr_assert_eq(attr_of(g, "a", "softcap")->f, n ? 3.0 : 2.5);
    cr_assert_str_eq(rg_dtype_name(g->tensor[g->output[0].tensor].dtype), n ? "f16" : "bf16");
    const rg_value *shape = attr_of(g, "c", "shape");
    cr_assert_eq(shape->i, 3);
    cr_assert(shape->list[0] == -1 && shape->list[1] == 64 && shape->list[2] == 8);
    cr_assert(shape->set);
    cr_assert_not(attr_of(g, "d", "to")->set); /* the default */
    cr_assert_eq(attr_of(g, "d", "to")->i, 0);
    rgi_graph_destroy(g);
    rg_spec_destroy(spec);
  }
  rg_spec *spec = must_load(ctx, text, NULL, 0);
  static const char *const bad[] = {"0.5.1", "inf", "nan",   "1,2", "0x1p3",
                                    "",      " 1",  "1e999", "[1]", "1 "};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    rgi_graph *g;
    rg_binding one = {"scale", 0, bad[i]};
    cr_assert_eq(rgi_spec_elaborate(spec, &one, 1, false, &g, NULL), RG_E_USAGE, "%s", bad[i]);
  }
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

static const char *port_tensor(const rgi_graph *g, const char *node, const char *port) {
  for (int n = 0; n < g->nnode; n++) {
    if (strcmp(g->node[n].name, node) != 0) continue;
    int t = rgi_in(&g->node[n], rgi_in_port(g->node[n].op, port));
    return t < 0 ? "" : g->tensor[t].name;
  }
  return "no such node";
}

/* Queries of one chunk against keys of whole prefixes: two lengths tensors, each
 * found through the rows it governs. */
Test(spec, fills_in_lengths) {
  rg_context *ctx = context();
  static const char *const text =
      "{\"regraph\": 1, \"inputs\": {"
      "\"q\": {\"shape\": [\"T\", 4, 16], \"dtype\": \"f32\"}, \"k\": {\"shape\": [\"S\", 2, 16], "
      "\"dtype\": "
      "\"f32\"},"
      "\"v\": {\"shape\": [\"S\", 2, 16], \"dtype\": \"f32\"}, \"cu_q\": {\"shape\": [\"B+1\"], "
      "\"dtype\": "
      "\"i32\"},"
      "\"cu_k\": {\"shape\": [\"B+1\"], \"dtype\": \"i32\"}},"
      "\"nodes\": ["
      "{\"name\": \"last\", \"op\": \"silu\", \"in\": {\"x\": \"half\"}},"
      "{\"name\": \"cut\", \"op\": \"slice\", \"in\": {\"x\": \"a.o\"}, \"out\": {\"y\": \"half\"},"
      " \"attrs\": {\"axis\": 1, \"stop\": 2}},"
      "{\"name\": \"a\", \"op\": \"swa_attn\", \"in\": {\"q\": \"q\", \"k\": \"key\", \"v\": "
      "\"v\", "
      "\"cu_seqlens\": \"cu_q\"},"
      " \"attrs\": {\"window_left\": -1}},"
      "{\"name\": \"turn\", \"op\": \"rope\", \"in\": {\"x\": \"k\", \"cu_seqlens\": \"cu_k\"}, "
      "\"out\": "
      "{\"y\": \"key\"}},"
      "{\"name\": \"plain\", \"op\": \"silu\", \"in\": {\"x\": \"other\"}},"
      "{\"name\": \"split\", \"op\": \"slice\", \"in\": {\"x\": \"a.o\"}, \"out\": {\"y\": "
      "\"other\"},"
      " \"attrs\": {\"axis\": 0, \"stop\": 1}}],"
      "\"outputs\": {\"y\": \"last.y\", \"z\": \"plain.y\"}}";
  rg_binding set[] = {{"T", 8, NULL}, {"S", 8, NULL}, {"B", 2, NULL}};
  for (size_t bound = 0; bound < 2; bound++) {
    rg_error e = {0};
    rgi_graph *g;
    rg_spec *spec = must_load(ctx, text, NULL, 0);
    cr_assert_eq(rgi_spec_elaborate(spec, set, bound ? 3 : 0, bound, &g, &e), RG_OK, "%s",
                 e.message);
    cr_assert_str_eq(port_tensor(g, "a", "cu_seqlens"), "cu_q");
    cr_assert_str_eq(port_tensor(g, "a", "cu_seqlens_k"), "cu_k");
    cr_assert_str_eq(port_tensor(g, "last", "cu_seqlens"), "cu_q");
    /* one row cut out: not the pack any more */
    cr_assert_str_eq(port_tensor(g, "plain", "cu_seqlens"), "");
    cr_assert_eq(rgi_verify(g, "test", &e), RG_OK, "%s", e.message);
    rgi_graph_destroy(g);
    rg_spec_destroy(spec);
  }
  rg_context_destroy(ctx);
}

/* The one lengths tensor of a spec need not be named at all: not in a file, not in calls, and what
 * is written back leaves it out as well. */
Test(spec, one_lengths_tensor_serves_all_nodes) {
  static const char said[] = ", \"cu_seqlens\": \"cu_seqlens\"";
  rg_context *ctx = context();
  rg_text want, got, json;
  rg_error e = {0};
  char *text = calloc(1, 1 << 16);
  FILE *f = fopen(NSA, "rb");
  cr_assert(f && fread(text, 1, 1 << 16, f) > 0);
  fclose(f);
  rg_spec *spec = must_load(ctx, text, NULL, 0);
  cr_assert_eq(rg_spec_write(spec, "text", &want, &e), RG_OK);
  rg_spec_destroy(spec);
  int left_out = 0;
  for (char *at; (at = strstr(text, said)); left_out++)
    memmove(at, at + sizeof said - 1, strlen(at + sizeof said - 1) + 1);
  cr_assert_eq(left_out, 6);
  for (int again = 0; again < 2; again++) {
    spec = must_load(ctx, again ? json.data : text, NULL, 0);
    cr_assert_eq(rg_check(spec, NULL, &e), RG_OK, "%s", e.message);
    cr_assert_eq(rg_spec_write(spec, "text", &got, &e), RG_OK);
    cr_assert_str_eq(got.data, want.data);
    if (!again) cr_assert_eq(rg_spec_write(spec, "json", &json, &e), RG_OK);
    rg_text_destroy(&got);
    rg_spec_destroy(spec);
  }
  cr_assert_null(strstr(json.data, said));
  rg_text_destroy(&json);
  rg_text_destroy(&want);
  free(text);

  rg_builder *b;
  rg_binding set[] = {{"T", 8, NULL}, {"B", 2, NULL}};
  const rg_item window = rg_int("window_left", 3);
  cr_assert_eq(rg_builder_create(ctx, "built", &b, &e), RG_OK);
  rg_build_input(b, "q", "T,4,16", "f32", RG_GRAD_PLAIN);
  rg_build_input(b, "starts", "B+1", "i32", RG_GRAD_NONE);
  rg_build_input(b, "offset", "B", "i32", RG_GRAD_NONE); /* read, but not as lengths */
  rg_build_node(b, "turn", "rope", "x=q q_offset=offset", "y=r", NULL, 0);
  rg_build_node(b, "attend", "swa_attn", "q=r k=r v=q", "o=y", &window, 1);
  rg_build_output(b, "y", NULL);
  rgi_graph *g;
  cr_assert_eq(rg_build_spec(b, NULL, 0, &spec, &e), RG_OK, "%s", e.message);
  cr_assert_eq(rgi_spec_elaborate(spec, set, 2, true, &g, &e), RG_OK, "%s", e.message);
  cr_assert_str_eq(port_tensor(g, "turn", "cu_seqlens"), "starts");
  cr_assert_str_eq(port_tensor(g, "attend", "cu_seqlens"), "starts");
  rg_tensor_info info;
  for (size_t i = 0; rg_spec_tensor(spec, i, &info) == RG_OK; i++)
    cr_assert_eq(info.seqlens, strcmp(info.name, "starts") == 0);
  rgi_graph_destroy(g);
  rg_spec_destroy(spec);
  rg_builder_destroy(b);
  rg_context_destroy(ctx);
}

/* What was loaded keeps its places: a plan's error has a line, too. Calls have none. */
Test(spec, errors_have_lines) {
  rg_context *ctx = context();
  rg_plan *plan;
  static const char *const text = "{\"regraph\": 1,\n \"inputs\": {\"x\": {\"shape\": [\"T\", "
                                  "\"T-4\"],\n   \"dtype\": \"f32\"}},\n \"nodes\": [],\n "
                                  "\"outputs\": {\"y\": \"x\"}}";
  static const rg_binding set[] = {{"T", 3, NULL}};
  rg_plan_options o = {.set = set, .nset = 1};
  rg_error e = {0};
  rg_spec *spec = must_load(ctx, text, NULL, 0);
  cr_assert_eq(rg_plan_create(spec, NULL, &o, &plan, &e), RG_E_VALUE);
  cr_assert_str_eq(e.pointer, "/inputs/x/shape/1");
  cr_assert(e.line == 2 && e.column == 34, "%d:%d", e.line, e.column);
  rg_spec_destroy(spec);
  char line[512];
  rg_error_format(&e, line, sizeof line);
  cr_assert(strstr(line, "text:2:34: /inputs/x/shape/1: RG_E_VALUE: ") == line, "%s", line);

  rg_builder *b;
  e = (rg_error){0};
  cr_assert_eq(rg_builder_create(ctx, "built", &b, &e), RG_OK);
  rg_build_output(b, "y", "x");
  cr_assert_eq(rg_build_spec(b, NULL, 0, &spec, &e), RG_E_NAME);
  cr_assert(e.line == 0 && e.column == 0);
  rg_error_format(&e, line, sizeof line);
  cr_assert(strstr(line, "built:/outputs/y: RG_E_NAME: ") == line, "%s", line);
  rg_builder_destroy(b);
  rg_context_destroy(ctx);
}

Test(spec, order_of_nodes_is_free) {
  rg_context *ctx = context();
  const char *node[3] = {
      "{\"name\": \"a\", \"op\": \"silu\", \"in\": {\"x\": \"x\"}}",
      "{\"name\": \"b\", \"op\": \"silu\", \"in\": {\"x\": \"a.y\"}}",
      "{\"name\": \"c\", \"op\": \"mul\", \"in\": {\"a\": \"a.y\", \"b\": \"b.y\"}}"};
  static const int order[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
  char *first = NULL;
  for (int i = 0; i < 6; i++) {
    char text[1024];
    rg_text dump;
    snprintf(text, sizeof text,
             "{\"regraph\": 1, \"inputs\": {\"x\": {\"shape\": [\"T\", 3], \"dtype\": \"f32\"}}, "
             "\"nodes\": "
             "[%s, %s, %s],"
             " \"outputs\": {\"y\": \"c.y\"}}",
             node[order[i][0]], node[order[i][1]], node[order[i][2]]);
    rg_spec *spec = must_load(ctx, text, NULL, 0);
    cr_assert_eq(rg_spec_write(spec, "summary", &dump, NULL), RG_OK);
    if (!first) first = strdup(dump.data);
    cr_assert_str_eq(dump.data, first);
    rg_text_destroy(&dump);
    rg_spec_destroy(spec);
  }
  free(first);
  rg_context_destroy(ctx);
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

/* ---- descriptions ---- */

static const rgi_json *find(const rgi_json *v, const char *key) {
  cr_assert(v && v->type == RGI_JSON_OBJECT, "no object around '%s'", key);
  const rgi_json *member = rgi_json_get(v, key);
  cr_assert(member, "no '%s'", key);
  return member;
}

Test(spec, schemas_follow_the_op_table) {
  rg_context *ctx = context();
  rgi_arena *a = rgi_arena_create(ctx);
  rg_text text;
  const rgi_json *schema, *ops;
  cr_assert_eq(rg_describe(ctx, "schema-spec", &text, NULL), RG_OK);
  cr_assert_eq(rgi_json_parse(a, text.data, text.size, &schema, NULL), RG_OK);
  rg_text_destroy(&text);
  cr_assert_eq(rg_describe(ctx, "ops-json", &text, NULL), RG_OK);
  cr_assert_eq(rgi_json_parse(a, text.data, text.size, &ops, NULL), RG_OK);
  rg_text_destroy(&text);
  cr_assert_eq(find(ops, "version")->i, 1);
  cr_assert_eq(find(ops, "ops")->n, ctx->nop);

  const rgi_json *defs = find(schema, "$defs");
  const rgi_json *choice = find(find(defs, "node"), "allOf");
  int seen = 0;
  for (int i = 0; i < ctx->nop; i++) {
    const rg_op *op = ctx->op[i];
    char name[80];
    snprintf(name, sizeof name, "op_%s", op->name);
    if (op->flags & RG_OP_INTERNAL) {
      cr_assert_null(rgi_json_get(defs, name));
      continue;
    }
    seen++;
    const rgi_json *node = find(find(defs, name), "properties");
    cr_assert_str_eq(find(find(node, "op"), "const")->text, op->name);
    cr_assert_eq(find(find(defs, name), "additionalProperties")->type, RGI_JSON_BOOL);
    const rgi_json *in = find(find(node, "in"), "properties"),
                   *out = find(find(node, "out"), "properties");
    const rgi_json *attrs = find(find(node, "attrs"), "properties");
    cr_assert_eq(in->n, op->nin);
    cr_assert_eq(out->n, op->nout);
    cr_assert_eq(attrs->n, op->nattr);
    for (int p = 0; p < op->nin; p++) cr_assert_str_eq(in->key[p], op->in[p].name);
    for (int p = 0; p < op->nout; p++) cr_assert_str_eq(out->key[p], op->out[p].name);
    for (int k = 0; k < op->nattr; k++) cr_assert_str_eq(attrs->key[k], op->attrs[k].name);
  }
  cr_assert_eq(choice->n, seen);

  cr_assert_eq(rg_describe(ctx, "schema-policy", &text, NULL), RG_OK);
  cr_assert_eq(rgi_json_parse(a, text.data, text.size, &schema, NULL), RG_OK);
  cr_assert_eq(find(schema, "properties")->n, 10);
  rg_text_destroy(&text);
  cr_assert_eq(rg_describe(ctx, "ops", &text, NULL), RG_OK);
  cr_assert(strstr(text.data, "\ncompress_kv: "));
  cr_assert_null(strstr(text.data, "_bwd"));
  rg_text_destroy(&text);
  rg_error e = {0};
  cr_assert_eq(rg_describe(ctx, "schema-specs", &text, &e), RG_E_USAGE);
  cr_assert(strstr(e.message, "schema-spec'"), "%s", e.message);
  cr_assert_eq(rg_describe(NULL, "ops", &text, NULL), RG_E_USAGE);
  rgi_arena_destroy(a);
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
