/* tests/unit/test_spec.c: loading specs: what is listed, bound, solved, filled in, described.
   Limits and failures: test_spec_limits.c. Malformed specs are in tests/golden/errors
   (test_golden.c). */
#include "spec_case.h"
#include <stdio.h>
#include <stdlib.h>

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
  cr_assert_eq(find(schema, "properties")->n, 11);
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
