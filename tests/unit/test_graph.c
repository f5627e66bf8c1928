/* tests/unit/test_graph.c: stock examples, random graphs and graphs that broke something, as
 * whole plans against the whole-graph oracle (graph_case.h).
 */
#include "graph_case.h"
#include "tests/harness/graph_gen.h"
#include "tests/harness/round.h"

/* ---- stock examples ---- */

static void run_example(const char *name, const rg_binding *set, size_t nset) {
  static const int ragged[] = {37, 0, 1, 58, 0, 19, 9}, alone[] = {120}, none[] = {0, 0},
                   one_each[] = {1, 1, 1, 1, 1};
  const pack packs[] = {{130, 1, 7, ragged, NULL},
                        {120, 1, 1, alone, NULL},
                        {40, 1, 2, none, NULL},
                        {6, 1, 5, one_each, NULL}};
  rg_error e = {0};
  rg_context *ctx = NULL;
  rg_spec *spec = NULL;
  char path[512];
  report rep = {0};
  snprintf(path, sizeof path, "%s/examples/%s.json", RG_SOURCE_DIR, name);
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  CR_OK(rg_spec_load_file(ctx, path, set, nset, &spec, &e), &e);
  for (size_t i = 0; i < sizeof packs / sizeof *packs; i++) {
    ot *t = ot_begin(100 + i);
    graph_case c = open_case(ctx, t, spec, packs[i], 100 + i, name);
    run_case(&c, &rep);
    close_case(&c);
    ot_end(t);
  }
  if (getenv("GRAPH_VERBOSE"))
    fprintf(stderr, "%s: output %.2f, gradient %.2f of the gate\n", name, rep.worst_output,
            rep.worst_gradient);
  cr_assert_eq(rep.refused, 0, "%s: %d plans refused", name, rep.refused);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}
#define EXAMPLE(name, ...)                            \
  do {                                                \
    const rg_binding set[] = {__VA_ARGS__};           \
    run_example(name, set, sizeof set / sizeof *set); \
  } while (0)
#define F32 \
  { "dtype", 0, "f32" }
#define SMALL {"H", 4, NULL}, {"KH", 2, NULL}, {"D", 16, NULL}, {"DV", 8, NULL}, F32
#define BLOCKED                                                                     \
  {"kernel", 8, NULL}, {"stride", 4, NULL}, {"block", 8, NULL}, {"top_n", 3, NULL}, \
      {"local", 1, NULL}, {                                                         \
    "window", 12, NULL                                                              \
  }
#define SMALL_LAYER {"M", 24, NULL}, {"H", 4, NULL}, {"KH", 2, NULL}, {"D", 16, NULL}, F32

Test(graph, nsa) {
  EXAMPLE("nsa", SMALL, BLOCKED);
}
Test(graph, nsa_linear) {
  EXAMPLE("nsa_linear", SMALL, BLOCKED);
}
Test(graph, nsa_layer) {
  EXAMPLE("nsa_layer", SMALL, BLOCKED, {"M", 24, NULL});
}
Test(graph, moba) {
  EXAMPLE("moba", {"H", 4, NULL}, {"D", 16, NULL}, {"DV", 8, NULL}, {"block", 8, NULL},
          {"top_n", 2, NULL}, F32);
}
Test(graph, dense_causal) {
  EXAMPLE("dense_causal", SMALL);
}
Test(graph, sliding_window) {
  EXAMPLE("sliding_window", SMALL, {"window", 9, NULL});
}
Test(graph, two_branch) {
  EXAMPLE("two_branch", SMALL, {"window", 9, NULL});
}
Test(graph, gpt_oss) {
  EXAMPLE("variants/gpt_oss", SMALL_LAYER, {"pairs", 1, NULL}, {"window", 9, NULL});
}
Test(graph, gated_attention) {
  EXAMPLE("variants/gated_attention", SMALL_LAYER, {"turned", 8, NULL});
}
Test(graph, infllm) {
  EXAMPLE("variants/infllm", {"H", 4, NULL}, {"KH", 2, NULL}, {"D", 16, NULL}, {"kernel", 8, NULL},
          {"stride", 4, NULL}, {"block", 8, NULL}, {"top_n", 5, NULL}, {"local", 2, NULL}, F32);
}

#define SMALL_HEADS {"H", 4, NULL}, {"KH", 2, NULL}, {"D", 16, NULL}, {"DI", 8, NULL}, F32
Test(graph, msa) {
  EXAMPLE("variants/msa", SMALL_HEADS, {"block", 4, NULL}, {"top_n", 2, NULL});
}
Test(graph, qsa) {
  EXAMPLE("variants/qsa", SMALL_HEADS, {"HI", 3, NULL}, {"top_n", 3, NULL});
}
Test(graph, dsa) {
  EXAMPLE("variants/dsa", {"M", 24, NULL}, {"C", 20, NULL}, {"H", 4, NULL}, {"R", 32, NULL},
          {"P", 8, NULL}, {"HI", 3, NULL}, {"DI", 16, NULL}, {"top_n", 9, NULL}, F32);
}

Test(graph, csa) {
  EXAMPLE("variants/csa", {"H", 4, NULL}, {"D", 16, NULL}, {"HI", 3, NULL}, {"DI", 8, NULL},
          {"top_n", 3, NULL}, {"window", 6, NULL}, F32);
}

Test(graph, quest) {
  EXAMPLE("variants/quest", {"H", 4, NULL}, {"KH", 2, NULL}, {"D", 16, NULL}, {"page", 4, NULL},
          {"top_n", 3, NULL}, F32);
}

Test(graph, seer) {
  EXAMPLE("variants/seer", {"H", 4, NULL}, {"KH", 2, NULL}, {"D", 16, NULL}, {"DG", 8, NULL},
          {"block", 4, NULL}, {"top_n", 3, NULL}, F32);
}

/* ---- random graphs ---- */

static void random_graphs(uint64_t first, int n, gen_options o) {
  static const int lengths[6][5] = {{11, 0, 17, 5, 3}, {30, 1, 0, 0, 2}, {0, 0, 0, 0, 0}, {41},
                                    {8, 8, 8},         {1, 40}};
  static const int keys[5] = {9, 4, 0, 12, 7}, three[1] = {3};
  static const int64_t count[6] = {5, 5, 5, 1, 3, 2};
  report rep = {0};
  first = round_seed(first, n);
  for (int i = 0; i < n; i++) {
    if (!in_shard(i)) continue;
    uint64_t seed = first + (uint64_t)i;
    char what[64];
    ot *t = ot_begin(seed);
    o.nodes = 3 + (int)ot_below(t, 12);
    const char *text = graph_gen(t, o);
    int which = (int)ot_below(t, 6);
    pack p = {.S = 40, .B = count[which], .length = lengths[which], .length_k = keys};
    p.T = live_of(&p) + (o.whole ? 0 : ot_below(t, 9));
    if (p.T == 0) p.T = 7;
    if (o.whole && live_of(&p) == 0)
      p = (pack){.T = 3, .S = 40, .B = 1, .length = three, .length_k = keys};
    snprintf(what, sizeof what, "random graph %llu", (unsigned long long)seed);
    if (getenv("GRAPH_PRINT")) fprintf(stderr, "%s\n", text);
    run_text(text, p, seed, what, &rep);
    ot_end(t);
  }
  if (getenv("GRAPH_VERBOSE"))
    fprintf(stderr, "%d plans, %d refused: output %.2f, gradient %.2f of the gate\n", rep.plans,
            rep.refused, rep.worst_output, rep.worst_gradient);
  if (!getenv("REGRAPH_SHARD"))
    cr_assert_leq(rep.refused * 20, rep.plans, "%d of %d plans refused", rep.refused, rep.plans);
}

Test(graph, random_f32_a) {
  random_graphs(10000, 100, (gen_options){0});
}
Test(graph, random_f32_b) {
  random_graphs(20000, 100, (gen_options){0});
}
Test(graph, random_views) {
  random_graphs(30000, 80, (gen_options){.whole = true});
}
Test(graph, random_views_of_dead_rows) {
  random_graphs(50000, 80, (gen_options){.moved = true});
}
Test(graph, random_stops) {
  random_graphs(60000, 40, (gen_options){.stops = true});
}
Test(graph, random_mixed) {
  random_graphs(40000, 80, (gen_options){.mixed = true});
}

/* ---- graphs that broke something, or could ---- */

#define SPEC(inputs, nodes, outputs)                                                    \
  "{ \"regraph\": 1, \"name\": \"case\", \"inputs\": { " inputs                         \
  "\"cu_seqlens\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } }, \"nodes\": [ " nodes \
  " ], \"outputs\": { " outputs " } }"
#define IN(name, shape, dtype, grad) \
  "\"" name "\": { \"shape\": [" shape "], \"dtype\": \"" dtype "\", \"grad\": " grad " }, "
#define HEADS "\"T\", 4, 8"
#define NODE(name, op, in, out) \
  "{ \"name\": \"" name "\", \"op\": \"" op "\", \"in\": { " in " }, \"out\": { " out " } }"
#define NODE_AT(name, op, in, out, attrs)                                             \
  "{ \"name\": \"" name "\", \"op\": \"" op "\", \"in\": { " in " }, \"out\": { " out \
  " }, \"attrs\": { " attrs " } }"
/* Up to eight texts with commas between them. */
#define JOIN(...) \
  JOIN_PICK(__VA_ARGS__, JOIN8, JOIN7, JOIN6, JOIN5, JOIN4, JOIN3, JOIN2, )(__VA_ARGS__)
#define JOIN_PICK(a, b, c, d, e, f, g, h, join, ...) join
#define JOIN2(a, b)                                  a ", " b
#define JOIN3(a, ...)                                a ", " JOIN2(__VA_ARGS__)
#define JOIN4(a, ...)                                a ", " JOIN3(__VA_ARGS__)
#define JOIN5(a, ...)                                a ", " JOIN4(__VA_ARGS__)
#define JOIN6(a, ...)                                a ", " JOIN5(__VA_ARGS__)
#define JOIN7(a, ...)                                a ", " JOIN6(__VA_ARGS__)
#define JOIN8(a, ...)                                a ", " JOIN7(__VA_ARGS__)
#define P(port, tensor)                              "\"" port "\": \"" tensor "\""
#define CU                                           P("cu_seqlens", "cu_seqlens")
#define SWA(name, q, k, v, o)                                                           \
  NODE_AT(name, "swa_attn", P("q", q) ", " P("k", k) ", " P("v", v) ", " CU, P("o", o), \
          "\"window_left\": 6")
#define COMPRESS(name, k, v, kw, vw, out)                                                 \
  NODE_AT(name, "compress_kv",                                                            \
          P("k", k) ", " P("v", v) ", " P("k_weight", kw) ", " P("v_weight", vw) ", " CU, \
          P("k", out "_k") ", " P("v", out "_v"),                                         \
          "\"kernel\": 4, \"stride\": 4, \"k_method\": \"linear\", \"v_method\": \"linear\"")
#define CMP(name, q, from, o)                                                                \
  NODE_AT(name, "cmp_attn", P("q", q) ", " P("k", from "_k") ", " P("v", from "_v") ", " CU, \
          P("o", o), "\"kernel\": 4, \"stride\": 4")

static const int ragged_lengths[] = {14, 0, 1, 23}, tiny_lengths[] = {3};
static const pack ragged = {43, 1, 4, ragged_lengths, NULL}, tiny = {3, 1, 1, tiny_lengths, NULL};

static void run_one(const char *text, pack p) {
  report rep = {0};
  run_text(text, p, 77, text, &rep);
  cr_assert_eq(rep.refused, 0, "%d plans refused of %s", rep.refused, text);
}

/* A weight on two ports of one cut node, and on nodes of different rank: each use keeps a sum of
 * its own. */
Test(graph, shared_weights) {
  run_one(SPEC(IN("k", HEADS, "f32", "true") IN("q", HEADS, "f32", "true")
                   IN("w", "8, 32", "f32", "true"),
               JOIN(COMPRESS("c", "k", "k", "w", "w", "c"), CMP("a", "q", "c", "o")), P("o", "o")),
          ragged);
  run_one(SPEC(IN("k", HEADS, "bf16", "true") IN("q", HEADS, "bf16", "true")
                   IN("w", "8, 32", "bf16", "\"accumulate\""),
               JOIN(COMPRESS("c", "k", "k", "w", "w", "c"), CMP("a", "q", "c", "o")), P("o", "o")),
          ragged);
  run_one(SPEC(IN("k", HEADS, "f32", "true") IN("q", HEADS, "f32", "true")
                   IN("w", "8, 32", "f32", "true"),
               JOIN(COMPRESS("c", "k", "q", "w", "w", "c"), COMPRESS("d", "q", "k", "w", "w", "d"),
                    CMP("a", "q", "c", "o"), CMP("b", "o", "d", "p")),
               JOIN(P("o", "o"), P("p", "p"), P("w", "w"))),
          ragged);
  run_one(SPEC(IN("k", HEADS, "f32", "true") IN("q", HEADS, "f32", "true")
                   IN("w", "8, 32", "f32", "true") IN("u", "8, 32", "f32", "true"),
               JOIN(COMPRESS("c", "k", "q", "w", "u", "c"), COMPRESS("d", "q", "k", "w", "u", "d"),
                    CMP("a", "q", "c", "o"), CMP("b", "o", "d", "p")),
               JOIN(P("o", "o"), P("p", "p"), P("w", "w"))),
          ragged);
  run_one(SPEC(IN("k", HEADS, "f32", "true") IN("q", HEADS, "f32", "true")
                   IN("w", "8, 32", "f32", "\"accumulate\"") IN("x", "\"T\", 32", "f32", "true"),
               JOIN(COMPRESS("c", "k", "k", "w", "w", "c"), CMP("a", "q", "c", "o"),
                    NODE("l", "linear", JOIN(P("x", "x"), P("w", "w"), CU), P("y", "y"))),
               JOIN(P("o", "o"), P("y", "y"))),
          ragged);
}

/* Read by cut and by uncut nodes: the terms of a sum come in one order whichever way. */
Test(graph, cut_and_whole_readers) {
  static const char *const dtypes[] = {"f32", "bf16"};
  static const char *const wants[] = {"true", "\"accumulate\""};
  for (int i = 0; i < 4; i++) {
    char text[4096];
    snprintf(text, sizeof text,
             SPEC(IN("q", HEADS, "%s", "%s") IN("k", HEADS, "%s", "%s"),
                  JOIN(SWA("a", "q", "k", "k", "o"),
                       NODE("m", "mul", JOIN(P("a", "k"), P("b", "k")), P("y", "m")),
                       NODE_AT("s", "slice", P("x", "k"), P("y", "s"),
                               "\"axis\": 1, \"start\": 1, \"stop\": 3"),
                       NODE("r", "silu", P("x", "k"), P("y", "r")), SWA("b", "r", "k", "m", "p"),
                       NODE("z", "silu", P("x", "k"), P("y", "z"))),
                  JOIN(P("o", "o"), P("p", "p"), P("s", "s"), P("z", "z"))),
             dtypes[i & 1], wants[i >> 1], dtypes[i & 1], wants[i >> 1]);
    run_one(text, ragged);
    /* made in parts (o, t), read in parts, whole and by slices of heads, of features and of
     * nothing */
    snprintf(
        text, sizeof text,
        SPEC(IN("q", HEADS, "%s", "%s") IN("k", HEADS, "%s", "%s"),
             JOIN(SWA("a", "q", "k", "k", "o"),
                  NODE("t", "rope", JOIN(P("x", "o"), CU), P("y", "t")),
                  SWA("b", "o", "t", "t", "p"), NODE("r", "silu", P("x", "t"), P("y", "r")),
                  NODE_AT("s", "slice", P("x", "t"), P("y", "s"),
                          "\"axis\": 1, \"start\": 1, \"stop\": 2"),
                  NODE_AT("u", "slice", P("x", "t"), P("y", "u"), "\"axis\": 2, \"start\": 3"),
                  NODE_AT("e", "slice", P("x", "t"), P("y", "e"),
                          "\"axis\": 1, \"start\": 2, \"stop\": 2"),
                  SWA("c", "r", "t", "o", "w")),
             JOIN(P("o", "o"), P("t", "t"), P("p", "p"), P("s", "s"), P("u", "u"), P("w", "w"))),
        dtypes[i & 1], wants[i >> 1], dtypes[i & 1], wants[i >> 1]);
    run_one(text, ragged);
  }
}

/* Gradients that pass straight through to several tensors, joins whose parts are wanted twice. */
Test(graph, shared_gradients) {
  run_one(SPEC(IN("x", "\"T\", 6", "f32", "true") IN("z", "\"T\", 6", "f32", "true")
                   IN("u", "\"T\", 6", "f32", "\"accumulate\""),
               NODE("a", "add", "\"a\": [\"x\", \"x\", \"z\", \"u\"]", P("y", "y")), P("y", "y")),
          ragged);
  run_one(SPEC(IN("x", "\"T\", 6", "f32", "true") IN("z", "\"T\", 6", "f32", "true"),
               JOIN(NODE("a", "add", "\"a\": [\"x\", \"z\"]", P("y", "a")),
                    NODE("s", "silu", JOIN(P("x", "a"), CU), P("y", "y"))),
               P("y", "y")),
          ragged);
  run_one(SPEC(IN("x", "\"T\", 6", "f32", "true") IN("z", "\"T\", 6", "f32", "true"),
               JOIN(NODE_AT("s", "split", P("x", "x"), "\"y\": [\"x0\", \"x1\"]", "\"axis\": 1"),
                    NODE_AT("t", "split", P("x", "z"), "\"y\": [\"z0\", \"z1\"]", "\"axis\": 1"),
                    NODE("a", "add", "\"a\": [\"x0\", \"z1\", \"x1\"]", P("y", "y0")),
                    NODE("b", "add", "\"a\": [\"z0\", \"y0\"], " CU, P("y", "y1")),
                    NODE("c", "silu", P("x", "y1"), P("y", "y"))),
               P("y", "y")),
          ragged);
  run_one(SPEC(IN("x", "\"T\", 6", "f32", "true") IN("w", "6", "f32", "true"),
               JOIN(NODE("r", "rmsnorm", JOIN(P("x", "x"), P("w", "w"), CU), P("y", "y")),
                    NODE("s", "silu", P("x", "w"), P("y", "s"))),
               JOIN(P("w", "w"), P("y", "y"), P("x", "x"), P("s", "s"))),
          ragged);
}

/* Axes of one element have any stride: that must not keep a view from being reshaped, forward or
 * back. */
Test(graph, axes_of_one) {
  run_one(SPEC(IN("x", "\"T\", 2, 8", "f32", "true"),
               JOIN(NODE_AT("r", "reshape", P("x", "x"), P("y", "a"), "\"shape\": [0, 2, 1, 8]"),
                    NODE_AT("t", "transpose", P("x", "a"), P("y", "b"), "\"perm\": [0, 2, 1, 3]"),
                    NODE("m", "mul", JOIN(P("a", "b"), P("b", "b")), P("y", "c")),
                    NODE_AT("h", "slice", P("x", "x"), P("y", "d"), "\"axis\": 1, \"start\": 1"),
                    NODE_AT("f", "reshape", P("x", "d"), P("y", "e"), "\"shape\": [0, 8]"),
                    NODE("n", "silu", JOIN(P("x", "e"), CU), P("y", "f"))),
               JOIN(P("c", "c"), P("f", "f"))),
          ragged);
}

Test(graph, scalars) {
  run_one(SPEC(IN("x", "", "f32", "true") IN("z", "\"T\", 2", "f32", "true"),
               JOIN(NODE("s", "silu", P("x", "x"), P("y", "s")),
                    NODE_AT("r", "reshape", P("x", "s"), P("y", "r"), "\"shape\": [1, 1]"),
                    NODE("m", "mul", JOIN(P("a", "s"), P("b", "x")), P("y", "m")),
                    NODE("l", "linear", JOIN(P("x", "z"), P("w", "w"), CU), P("y", "l")),
                    NODE_AT("c", "concat", "\"x\": [\"r\", \"r\"]", P("y", "w"), "\"axis\": 1")),
               JOIN(P("l", "l"), P("m", "m"))),
          ragged);
}

/* Rows made of several heads each, or the other way: dead tokens stay dead in gradients. */
Test(graph, merged_rows) {
  run_one(SPEC(IN("x", "\"2*T\", 8", "f32", "true") IN("z", "\"T\", 2, 8", "f32", "true"),
               JOIN(NODE_AT("r", "reshape", P("x", "x"), P("y", "y"), "\"shape\": [-1, 2, 8]"),
                    NODE("a", "add", "\"a\": [\"y\", \"z\"], " CU, P("y", "s"))),
               P("s", "s")),
          ragged);
  run_one(SPEC(IN("x", "\"T\", 2, 8", "f32", "true") IN("z", "\"T\", 2, 8", "f32", "true"),
               JOIN(NODE("p", "rope", JOIN(P("x", "x"), CU), P("y", "unread")),
                    NODE_AT("r", "reshape", P("x", "x"), P("y", "y"), "\"shape\": [-1, 8]"),
                    NODE("s", "silu", P("x", "y"), P("y", "s"))),
               P("s", "s")),
          ragged);
}

/* Lengths go through views that merge rows or cut them again; behind views that move or cut the
 * token axis otherwise all rows count, and those of dead tokens are zero, in gradients too. Dead
 * rows of what is given are NaN here. */
#define UNREAD(x) NODE("p", "rope", P("x", x) ", " CU, P("y", "unread"))
Test(graph, rows_behind_views) {
  static const char *const dtypes[] = {"f32", "bf16"};
  char text[4096];
  for (int i = 0; i < 2; i++) {
    snprintf(
        text, sizeof text,
        SPEC(IN("x", HEADS, "%s", "true") IN("w", "6, 8", "%s", "\"accumulate\"")
                 IN("b", "6", "%s", "true"),
             JOIN(UNREAD("x"),
                  NODE_AT("r", "reshape", P("x", "x"), P("y", "m"), "\"shape\": [-1, 8]"),
                  NODE("l", "linear", JOIN(P("x", "m"), P("w", "w"), P("b", "b")), P("y", "y")),
                  NODE_AT("c", "reshape", P("x", "y"), P("y", "t"), "\"shape\": [-1, 4, 6]"),
                  NODE("s", "silu", P("x", "t"), P("y", "s"))),
             JOIN(P("y", "y"), P("s", "s"), P("m", "m"), P("t", "t"))),
        dtypes[i], dtypes[i], dtypes[i]);
    run_one(text, ragged);
    snprintf(text, sizeof text,
             SPEC(IN("x", "\"2*T\", 8", "%s", "true") IN("z", "\"T\", 2, 8", "%s", "true"),
                  JOIN(NODE_AT("r", "reshape", P("x", "x"), P("y", "y"), "\"shape\": [-1, 2, 8]"),
                       NODE("a", "add", "\"a\": [\"y\", \"z\"], " CU, P("y", "a")),
                       NODE("s", "silu", P("x", "x"), P("y", "s"))),
                  JOIN(P("a", "a"), P("s", "s"))),
             dtypes[i], dtypes[i]);
    run_one(text, ragged);
    snprintf(text, sizeof text,
             SPEC(IN("x", HEADS, "%s", "true") IN("w", "8", "%s", "true"),
                  JOIN(UNREAD("x"),
                       NODE_AT("t", "transpose", P("x", "x"), P("y", "t"), "\"perm\": [1, 0, 2]"),
                       NODE("n", "rmsnorm", JOIN(P("x", "t"), P("w", "w")), P("y", "n"))),
                  JOIN(P("t", "t"), P("n", "n"))),
             dtypes[i], dtypes[i]);
    run_one(text, ragged);
    snprintf(
        text, sizeof text,
        SPEC(IN("x", "\"T\", 8", "%s", "true") IN("w", "6, 8", "%s", "true")
                 IN("b", "6", "%s", "true"),
             JOIN(NODE("p", "silu", JOIN(P("x", "x"), CU), P("y", "p")),
                  NODE_AT("f", "slice", P("x", "x"), P("y", "f"),
                          "\"axis\": 0, \"start\": 30, \"stop\": 42"),
                  NODE_AT("g", "slice", P("x", "p"), P("y", "g"), "\"axis\": 0, \"start\": 30"),
                  NODE("l", "linear", JOIN(P("x", "f"), P("w", "w"), P("b", "b")), P("y", "y"))),
             JOIN(P("y", "y"), P("f", "f"), P("g", "g"))),
        dtypes[i], dtypes[i], dtypes[i]);
    run_one(text, ragged);
    snprintf(text, sizeof text,
             SPEC(IN("x", "\"T\", 8", "%s", "true") IN("w", "6, 4", "%s", "true"),
                  JOIN(NODE("p", "cast", JOIN(P("x", "x"), CU), P("y", "p")),
                       NODE_AT("f", "reshape", P("x", "p"), P("y", "f"), "\"shape\": [-1, 4]"),
                       NODE("l", "linear", JOIN(P("x", "f"), P("w", "w")), P("y", "y"))),
                  JOIN(P("y", "y"), P("f", "f"))),
             dtypes[i], dtypes[i]);
    run_one(text, ragged);
  }
}

/* As many heads as tokens: what is dead are tokens, wherever their axis stands. */
Test(graph, heads_as_many_as_tokens) {
  static const int two[] = {1, 1};
  run_one(SPEC(IN("x", "4, \"T\", 8", "f32", "true") IN("z", HEADS, "f32", "true"),
               JOIN(NODE_AT("t", "transpose", P("x", "x"), P("y", "y"), "\"perm\": [1, 0, 2]"),
                    NODE("a", "add", "\"a\": [\"y\", \"z\"], " CU, P("y", "s"))),
               P("s", "s")),
          (pack){4, 1, 2, two, NULL});
  run_one(SPEC(IN("x", HEADS, "f32", "true"),
               JOIN(NODE("r", "rope", JOIN(P("x", "x"), CU), P("y", "y")),
                    NODE_AT("t", "transpose", P("x", "y"), P("y", "z"), "\"perm\": [1, 0, 2]")),
               P("z", "z")),
          (pack){4, 1, 2, two, NULL});
}

/* No blocks, no heads' worth of features, no sequences; tensors of one axis. */
Test(graph, empty_tensors) {
  run_one(SPEC(IN("k", HEADS, "f32", "true") IN("q", HEADS, "f32", "true")
                   IN("w", "8, 32", "f32", "true"),
               JOIN(COMPRESS("c", "k", "k", "w", "w", "c"), CMP("a", "q", "c", "o"),
                    NODE("s", "silu", P("x", "c_k"), P("y", "s"))),
               JOIN(P("o", "o"), P("s", "s"))),
          tiny);
  run_one(SPEC(IN("x", "\"T\", 6", "f32", "true"),
               JOIN(NODE_AT("s", "split", P("x", "x"), "\"y\": [\"a\", \"b\", \"c\"]",
                            "\"axis\": 1, \"sizes\": [0, 4, 2]"),
                    NODE("e", "silu", JOIN(P("x", "a"), CU), P("y", "e")),
                    NODE("f", "silu", P("x", "b"), P("y", "f")),
                    NODE_AT("g", "concat", "\"x\": [\"e\", \"c\", \"f\", \"a\"]", P("y", "g"),
                            "\"axis\": 1"),
                    NODE_AT("r", "reshape", P("x", "e"), P("y", "r"), "\"shape\": [0, 0]")),
               JOIN(P("e", "e"), P("g", "g"), P("r", "r"))),
          ragged);
  run_one(SPEC(IN("x", "\"T\", 2, 4", "f32", "true"), SWA("a", "x", "x", "x", "o"), P("o", "o")),
          (pack){5, 1, 0, NULL, NULL});
  run_one(SPEC(IN("x", "\"T\"", "f32", "true") IN("w", "9", "bf16", "\"accumulate\""),
               JOIN(NODE("s", "silu", JOIN(P("x", "x"), CU), P("y", "y")),
                    NODE_AT("c", "cast", P("x", "w"), P("y", "v"), "\"to\": \"f32\""),
                    NODE_AT("t", "slice", P("x", "v"), P("y", "u"),
                            "\"axis\": 0, \"start\": 2, \"stop\": 5"),
                    NODE("m", "mul", JOIN(P("a", "v"), P("b", "v")), P("y", "m"))),
               JOIN(P("y", "y"), P("u", "u"), P("m", "m"))),
          ragged);
}

/* Gradients end where one is stopped, and nowhere else: beside another reader, of a weight, of what
 * attention reads twice, as keys and as values that are the keys' first columns, whose gradients
 * would be one. */
Test(graph, stops) {
#define STOP(name, x, y) NODE(name, "stop_gradient", P("x", x), P("y", y))
#define LATENT(k, v)                                                                           \
  NODE_AT("first", "slice", P("x", v), P("y", "v"), "\"axis\": 2, \"start\": 0, \"stop\": 6"), \
      NODE_AT("choose", "topk", JOIN(P("q", "q"), P("k", "k"), CU), P("idx", "idx"),           \
              "\"kernel\": 1, \"stride\": 1, \"block\": 1, \"top_n\": 5, \"init\": 0, "        \
              "\"local\": 1, \"score\": \"dot\""),                                             \
      NODE_AT("attend", "slc_attn",                                                            \
              JOIN(P("q", "q"), P("k", k), P("v", "v"), P("idx", "idx"), CU), P("o", "o"),     \
              "\"block\": 1")
  run_one(SPEC(IN("x", HEADS, "f32", "true") IN("w", "8", "f32", "true"),
               JOIN(STOP("a", "x", "y"), STOP("b", "w", "z"),
                    NODE("m", "mul", JOIN(P("a", "x"), P("b", "y")), P("y", "m")),
                    NODE("r", "rmsnorm", JOIN(P("x", "m"), P("w", "z"), CU), P("y", "n")),
                    STOP("c", "n", "last")),
               JOIN(P("n", "n"), P("last", "last"))),
          ragged);
  run_one(SPEC(IN("q", HEADS, "f32", "true") IN("k", "\"T\", 2, 8", "f32", "true"),
               JOIN(STOP("a", "k", "s"), LATENT("k", "s")), P("o", "o")),
          ragged);
  run_one(SPEC(IN("q", HEADS, "f32", "true") IN("k", "\"T\", 2, 8", "f32", "true"),
               JOIN(STOP("a", "k", "s"), LATENT("s", "k")), P("o", "o")),
          ragged);
}

/* Slices of tokens and of weights, overlapping, beside whole readers. */
Test(graph, slices) {
  static const int all[] = {20, 23};
  run_one(SPEC(IN("x", "\"T\", 6", "f32", "true"),
               JOIN(NODE_AT("a", "slice", P("x", "x"), P("y", "a"),
                            "\"axis\": 0, \"start\": 3, \"stop\": 20"),
                    NODE_AT("b", "slice", P("x", "x"), P("y", "b"),
                            "\"axis\": 0, \"start\": 13, \"stop\": 30"),
                    NODE("m", "mul", JOIN(P("a", "a"), P("b", "b")), P("y", "m")),
                    NODE_AT("c", "slice", P("x", "m"), P("y", "c"),
                            "\"axis\": 1, \"start\": 1, \"stop\": 4"),
                    NODE("s", "silu", P("x", "x"), P("y", "s"))),
               JOIN(P("m", "m"), P("c", "c"), P("s", "s"))),
          (pack){43, 1, 2, all, NULL});
  run_one(SPEC(IN("x", "\"T\", 6", "bf16", "true") IN("w", "10, 6", "bf16", "\"accumulate\""),
               JOIN(NODE_AT("a", "slice", P("x", "w"), P("y", "a"),
                            "\"axis\": 0, \"start\": 2, \"stop\": 8"),
                    NODE_AT("b", "slice", P("x", "a"), P("y", "b"), "\"axis\": 0, \"start\": 1"),
                    NODE("l", "linear", JOIN(P("x", "x"), P("w", "a"), CU), P("y", "l")),
                    NODE("m", "linear", JOIN(P("x", "l"), P("w", "w"), CU), P("y", "m")),
                    NODE("n", "linear", JOIN(P("x", "x"), P("w", "b")), P("y", "n"))),
               JOIN(P("m", "m"), P("n", "n"))),
          ragged);
}
