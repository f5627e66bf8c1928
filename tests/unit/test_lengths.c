/* tests/unit/test_lengths.c: rows behind views: which are dead, told without the library's own
 * opinion. What dead rows of inputs and incoming gradients hold changes no bit of any result, and
 * dead rows of results are zero. / */
#include "run_util.h"

#include <math.h>

enum { T = 23, B = 3 };
static const int lengths[B] = {9, 0, 8};
enum { LIVE = 17 };

#define CU "\"cu_seqlens\": \"cu_seqlens\""

/* Rows of axis 0 that are alive: `times` for each token where axis 0 counts tokens so, else all of
 * them (0). */
typedef struct expected {
  const char *name;
  int times;
} expected;

/* A spec over inputs and nodes; `of` lists tensors whose axis 0 counts tokens, by name, ended by
 * NULL. */
static rg_spec *make_spec(rg_context *ctx, const char *inputs, const char *nodes,
                          const char *outputs) {
  static char text[4096];
  snprintf(text, sizeof text,
           "{ \"regraph\": 1, \"name\": \"rows\", \"inputs\": { %s, \"cu_seqlens\": { \"shape\": "
           "[\"B+1\"], "
           "\"dtype\": \"i32\" } }, \"nodes\": [ %s ], \"outputs\": { %s } }",
           inputs, nodes, outputs);
  return load_spec(ctx, text);
}

static int64_t live_elements(const rg_tensor_info *t, const expected *of) {
  const int64_t n = t->bytes / (int64_t)rg_dtype_size(t->dtype);
  for (; of->name; of++)
    if (strcmp(of->name, t->name) == 0 && of->times) return n / t->dim[0] * LIVE * of->times;
  return n;
}

static void unchanged_by_dead_rows(const char *inputs, const char *nodes, const char *outputs,
                                   const expected *of) {
  static const float dead[] = {0, 1e30f, -7, NAN};
  rg_context *ctx = NULL;
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_spec *spec = make_spec(ctx, inputs, nodes, outputs);
  static const char *const policy_text[] = {NULL, "{ \"regraph_policy\": 1, \"preset\": \"all\" }"};
  buffers first = {0};
  for (int p = 0; p < 2; p++) {
    rg_policy *policy = policy_text[p] ? load_policy(ctx, policy_text[p]) : NULL;
    rg_plan *plan = make_plan(spec, policy, T, B, 2);
    for (size_t k = 0; k < sizeof dead / sizeof *dead; k++) {
      buffers b;
      rg_session *s = NULL;
      rg_session_options o = {.debug_poison = k & 1};
      make_buffers(plan, 5, T, lengths, &b);
      /* a node may stand before it */
      fill_starts(buffer(&b, RG_INPUT, "cu_seqlens"), B + 1, T, lengths);
      for (int i = 0; i < b.n; i++) {
        const rg_tensor_info *t = &b.info[i];
        if ((t->role != RG_INPUT && t->role != RG_GRAD_IN) || t->dtype != RG_F32) continue;
        for (int64_t j = live_elements(t, of); j < t->bytes / 4; j++)
          ((float *)b.data[i])[j] = dead[k];
      }
      CR_OK(rg_session_create(plan, &o, &s, &e), &e);
      bind_all(s, &b);
      run_both(s);
      fetch_all(s, &b);
      rg_session_destroy(s);
      for (int i = 0; i < b.n; i++) {
        const rg_tensor_info *t = &b.info[i];
        if (t->role != RG_OUTPUT && t->role != RG_GRAD_OUT) continue;
        for (int64_t j = live_elements(t, of); j < t->bytes / 4; j++)
          cr_assert_eq(((float *)b.data[i])[j], 0, "%s: %s[%lld] is %g, and dead", nodes, t->name,
                       (long long)j, (double)((float *)b.data[i])[j]);
      }
      finite_results(&b, nodes);
      if (!first.n) {
        make_buffers(plan, 5, T, lengths, &first);
        for (int i = 0; i < b.n; i++) memcpy(first.data[i], b.data[i], (size_t)b.info[i].bytes);
      }
      for (int i = 0; i < b.n; i++)
        if (b.info[i].role == RG_OUTPUT || b.info[i].role == RG_GRAD_OUT)
          cr_assert_eq(memcmp(first.data[i], b.data[i], (size_t)b.info[i].bytes), 0,
                       "%s: dead rows of %g change %s %s", nodes, (double)dead[k],
                       b.info[i].role == RG_OUTPUT ? "output" : "gradient", b.info[i].name);
      free_buffers(&b);
    }
    rg_plan_destroy(plan);
    rg_policy_destroy(policy);
  }
  free_buffers(&first);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

#define F32(name, shape) \
  "\"" name "\": { \"shape\": [" shape "], \"dtype\": \"f32\", \"grad\": true }"
#define NODE(name, op, in, out, attrs)                                                \
  "{ \"name\": \"" name "\", \"op\": \"" op "\", \"in\": { " in " }, \"out\": { " out \
  " }, \"attrs\": { " attrs " } }"
/* Says that rows of x are tokens; nobody reads what it makes. */
#define TOKENS(x) NODE("tokens", "silu", "\"x\": \"" x "\", " CU, "\"y\": \"unread\"", "")

Test(lengths, merged) {
  const expected of[] = {{"x", 1}, {"y", 2}, {"m", 2}, {NULL, 0}};
  unchanged_by_dead_rows(
      F32("x", "\"T\", 2, 8") ", " F32("w", "6, 8") ", " F32("b", "6"),
      TOKENS("x") ", " NODE(
          "r", "reshape", "\"x\": \"x\"", "\"y\": \"m\"",
          "\"shape\": [-1, 8]") ", " NODE("l", "linear", "\"x\": \"m\", \"w\": \"w\", \"b\": \"b\"",
                                          "\"y\": \"y\"", ""),
      "\"y\": \"y\", \"m\": \"m\"", of);
}

/* There and back: what comes out are tokens again. */
Test(lengths, merged_and_cut) {
  const expected of[] = {{"x", 1}, {"t", 1}, {"s", 1}, {NULL, 0}};
  unchanged_by_dead_rows(
      F32("x", "\"T\", 2, 8") ", " F32("w", "6, 8") ", " F32("b", "6"),
      TOKENS("x") ", " NODE(
          "r", "reshape", "\"x\": \"x\"", "\"y\": \"m\"",
          "\"shape\": [-1, 8]") ", " NODE("l", "linear", "\"x\": \"m\", \"w\": \"w\", \"b\": \"b\"",
                                          "\"y\": \"y\"",
                                          "") ", " NODE("c", "reshape", "\"x\": \"y\"",
                                                        "\"y\": \"t\"",
                                                        "\"shape\": [-1, 12]") ", " NODE("s",
                                                                                         "silu",
                                                                                         "\"x\": "
                                                                                         "\"t\"",
                                                                                         "\"y\": "
                                                                                         "\"s\"",
                                                                                         ""),
      "\"t\": \"t\", \"s\": \"s\"", of);
}

/* Lengths said of the rows behind the view hold for those before it. */
Test(lengths, cut) {
  const expected of[] = {{"x", 2}, {"s", 2}, {"a", 1}, {NULL, 0}};
  unchanged_by_dead_rows(
      F32("x", "\"2*T\", 8") ", " F32("w", "8"),
      NODE("r", "reshape", "\"x\": \"x\"", "\"y\": \"y\"", "\"shape\": [-1, 2, 8]") ", " NODE(
          "a", "silu", "\"x\": \"y\", " CU, "\"y\": \"a\"",
          "") ", " NODE("s", "rmsnorm", "\"x\": \"x\", \"w\": \"w\"", "\"y\": \"s\"", ""),
      "\"a\": \"a\", \"s\": \"s\"", of);
}

/* Behind these views all rows count; those of dead tokens are zero. */
Test(lengths, transposed) {
  const expected of[] = {{"x", 1}, {NULL, 0}};
  unchanged_by_dead_rows(
      F32("x", "\"T\", 2, 8") ", " F32("w", "8"),
      TOKENS("x") ", " NODE("t", "transpose", "\"x\": \"x\"", "\"y\": \"t\"",
                            "\"perm\": [1, 0, 2]") ", " NODE("n", "rmsnorm",
                                                             "\"x\": \"t\", \"w\": \"w\"",
                                                             "\"y\": \"n\"", ""),
      "\"n\": \"n\", \"t\": \"t\"", of);
}
Test(lengths, sliced) {
  const expected of[] = {{"x", 1}, {"p", 1}, {NULL, 0}};
  unchanged_by_dead_rows(
      F32("x", "\"T\", 8") ", " F32("w", "6, 8") ", " F32("b", "6"),
      NODE("c", "cast", "\"x\": \"x\", " CU, "\"y\": \"p\"", "") ", " NODE(
          "f", "slice", "\"x\": \"x\"", "\"y\": \"f\"",
          "\"axis\": 0, \"start\": 10, \"stop\": 20") ", " NODE("g", "split", "\"x\": \"p\"",
                                                                "\"y\": [\"g\", \"h\"]",
                                                                "\"axis\": 0, \"sizes\": [16, "
                                                                "7]") ", " NODE("l", "linear",
                                                                                "\"x\": \"f\", "
                                                                                "\"w\": \"w\", "
                                                                                "\"b\": \"b\"",
                                                                                "\"y\": \"y\"", ""),
      "\"y\": \"y\", \"h\": \"h\"", of);
}
/* 8 features in 2 rows of 4, whose tokens are not told apart any more */
Test(lengths, rows_cut_across) {
  const expected of[] = {{"x", 1}, {NULL, 0}};
  unchanged_by_dead_rows(
      F32("x", "\"T\", 8") ", " F32("w", "6, 4"),
      TOKENS("x") ", " NODE("r", "reshape", "\"x\": \"x\"", "\"y\": \"r\"",
                            "\"shape\": [-1, 4]") ", " NODE("l", "linear",
                                                            "\"x\": \"r\", \"w\": \"w\"",
                                                            "\"y\": \"y\"", ""),
      "\"y\": \"y\"", of);
}

/* An op's own result is dead where it should be: no copy is made of it. */
Test(lengths, no_copy_without_need) {
  rg_context *ctx = NULL;
  rg_error e = {0};
  rg_text steps;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_spec *spec =
      make_spec(ctx, F32("x", "\"T\", 2, 8"),
                NODE("r", "rope", "\"x\": \"x\", " CU, "\"y\": \"r\"", "") ", " NODE(
                    "t", "transpose", "\"x\": \"r\"", "\"y\": \"t\"", "\"perm\": [1, 0, 2]"),
                "\"t\": \"t\"");
  rg_plan *plan = make_plan(spec, NULL, T, B, 1);
  CR_OK(rg_plan_write(plan, "steps", &steps, &e), &e);
  cr_assert_null(strstr(steps.data, "live"), "%s", steps.data);
  rg_text_destroy(&steps);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

/* One tensor cannot count both tokens and rows that are others; the message points at the port. */
Test(lengths, counted_twice) {
  static const struct {
    const char *inputs, *nodes, *pointer, *part;
  } bad[] = {
      {F32("x", "\"T\", 2, 8"),
       TOKENS("x") ", " NODE("r", "reshape", "\"x\": \"x\"", "\"y\": \"m\"",
                             "\"shape\": [-1, 8]") ", " NODE("s", "silu", "\"x\": \"m\", " CU,
                                                             "\"y\": \"y\"", ""),
       "/nodes/2/in/cu_seqlens", "'cu_seqlens' counts the rows of 'x'; those of 'm'"},
      {F32("x", "\"T\", 2, 8"),
       NODE("r", "reshape", "\"x\": \"x\"", "\"y\": \"m\"", "\"shape\": [-1, 8]") ", " NODE(
           "s", "silu", "\"x\": \"m\", " CU, "\"y\": \"y\"", "") ", " TOKENS("x"),
       "/nodes/1/in/cu_seqlens", "leave the lengths out"},
      {F32("x", "\"T\", 2, 8"),
       TOKENS("x") ", " NODE("r", "reshape", "\"x\": \"x\"", "\"y\": \"m\"",
                             "\"shape\": [-1, 1, 8]") ", " NODE("s", "rope", "\"x\": \"m\", " CU,
                                                                "\"y\": \"y\"", ""),
       "/nodes/2/in/cu_seqlens", "Name an input that counts these rows"},
      {F32("x", "\"T\", 2, 8"),
       TOKENS("x") ", " NODE("t", "transpose", "\"x\": \"x\"", "\"y\": \"m\"",
                             "\"perm\": [1, 0, 2]") ", " NODE("s", "silu", "\"x\": \"m\", " CU,
                                                              "\"y\": \"y\"", ""),
       "/nodes/2/in/cu_seqlens", "those of 'm'"},
      {F32("x", "\"T\", 8"),
       TOKENS("x") ", " NODE("t", "slice", "\"x\": \"x\"", "\"y\": \"m\"",
                             "\"axis\": 0, \"start\": 3") ", " NODE("s", "silu",
                                                                    "\"x\": \"m\", " CU,
                                                                    "\"y\": \"y\"", ""),
       "/nodes/2/in/cu_seqlens", "those of 'm'"},
  };
  rg_context *ctx = NULL;
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    char text[4096];
    rg_spec *spec = NULL;
    rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
    snprintf(text, sizeof text,
             "{ \"regraph\": 1, \"inputs\": { %s, \"cu_seqlens\": { \"shape\": [\"B+1\"], "
             "\"dtype\": \"i32\" } }, "
             "\"nodes\": [ %s ], \"outputs\": { \"y\": \"y\" } }",
             bad[i].inputs, bad[i].nodes);
    e = (rg_error){0};
    cr_assert_eq(rg_spec_load_text(ctx, text, strlen(text), "bad", set, 2, &spec, &e), RG_E_SHAPE,
                 "%zu: %s", i, e.message);
    cr_assert_str_eq(e.pointer, bad[i].pointer, "%zu: %s", i, e.message);
    cr_assert(strstr(e.message, bad[i].part), "%zu: %s", i, e.message);
  }
  rg_context_destroy(ctx);
}

/* Lengths that a node makes are kept: everyone counts by the same tensor, whatever is
 * recomputed. */
Test(lengths, made_by_a_node) {
  const expected of[] = {{"x", 1}, {"y", 1}, {NULL, 0}};
  unchanged_by_dead_rows(F32("x", "\"T\", 8"),
                         NODE("c", "cast", "\"x\": \"cu_seqlens\"", "\"y\": \"cu\"", "") ", " NODE(
                             "s", "silu", "\"x\": \"x\", \"cu_seqlens\": \"cu\"", "\"y\": \"s\"",
                             "") ", " NODE("t", "silu", "\"x\": \"s\"", "\"y\": \"y\"", ""),
                         "\"y\": \"y\"", of);
}

/* Another input may count the merged rows: they are its, whatever the tokens' lengths are. */
Test(lengths, other_lengths_for_merged_rows) {
  rg_context *ctx = NULL;
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_spec *spec = make_spec(
      ctx, F32("x", "\"T\", 2, 8") ", \"cu2\": { \"shape\": [3], \"dtype\": \"i32\" }",
      TOKENS("x") ", " NODE("r", "reshape", "\"x\": \"x\"", "\"y\": \"m\"",
                            "\"shape\": [-1, 8]") ", " NODE("s", "silu",
                                                            "\"x\": \"m\", \"cu_seqlens\": \"cu2\"",
                                                            "\"y\": \"y\"", ""),
      "\"y\": \"y\"");
  rg_plan *plan = make_plan(spec, NULL, T, B, 1);
  buffers b;
  rg_session *s = NULL;
  make_buffers(plan, 5, T, NULL, &b);
  int32_t cu2[3] = {0, 11, 29};
  memcpy(buffer(&b, RG_INPUT, "cu2"), cu2, sizeof cu2);
  fill_starts(buffer(&b, RG_INPUT, "cu_seqlens"), B + 1, T, lengths);
  CR_OK(rg_session_create(plan, NULL, &s, &e), &e);
  bind_all(s, &b);
  run_both(s);
  fetch_all(s, &b);
  const float *y = buffer(&b, RG_OUTPUT, "y"), *dx = buffer(&b, RG_GRAD_OUT, "x");
  for (int i = 0; i < 2 * T * 8; i++) {
    cr_assert((y[i] != 0) == (i < 29 * 8), "y[%d] is %g", i, (double)y[i]);
    cr_assert((dx[i] != 0) == (i < 29 * 8), "dx[%d] is %g", i, (double)dx[i]);
  }
  rg_session_destroy(s);
  free_buffers(&b);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}
