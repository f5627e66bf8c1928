/* tests/unit/test_fuse.c: gradients taken apart: what is found and what is left alone and why,
 * what it gains, and that it changes no bit.
 */
#include "graph/spec.h"
#include "passes/fuse.h"
#include "passes/passes.h"
#include "tests/harness/round.h"
#include "run_util.h"

enum { T = 300, B = 3 };
static const int lengths[B] = {147, 0, 138};

static rg_context *ctx;

static void begin(void) {
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
}
static void end(void) {
  rg_context_destroy(ctx);
}

/* ---- finding ---- */

typedef struct fused {
  rgi_graph *before, *after;
  rgi_fusions *report;
} fused;

static fused fuse_spec(const rg_spec *spec, int heads, const rg_gpu *gpu, bool lanes) {
  rg_error e = {0};
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rgi_graph *whole, *split;
  fused f;
  CR_OK(rgi_spec_elaborate(spec, set, 2, true, &whole, &e), &e);
  CR_OK(rgi_split_heads(whole, heads, &split, &e), &e);
  CR_OK(rgi_autodiff(split, &f.before, &e), &e);
  CR_OK(rgi_fuse(f.before, gpu, lanes, false, &f.after, &f.report, &e), &e);
  rgi_graph_destroy(whole);
  rgi_graph_destroy(split);
  return f;
}

static void drop(fused *f) {
  rgi_graph_destroy(f->before);
  rgi_graph_destroy(f->after);
  rgi_fusions_destroy(f->report);
}

static int count_op(const rgi_graph *g, const char *op) {
  int n = 0;
  for (int i = 0; i < g->nnode; i++) n += strcmp(g->node[i].op->name, op) == 0;
  return n;
}

/* One layer's serving step, for so many rows and sequences, whose tables have `most` entries. */
static fused fuse_step(const rg_gpu *gpu, int rows, int sequences, int most, const char *name,
                       int value, bool split_kv) {
  rg_error e = {0};
  rg_spec *spec;
  rgi_graph *g;
  fused f;
  const rg_binding given = {name, value, NULL}, set[] = {{"T", rows, NULL},
                                                         {"B", sequences, NULL},
                                                         {"M", most, NULL},
                                                         {"P", 100, NULL},
                                                         {"F", 1, NULL}};
  CR_OK(rg_spec_load_file(ctx, RG_SOURCE_DIR "/examples/nsa_serve.json", &given, 1, &spec, &e), &e);
  CR_OK(rgi_spec_elaborate(spec, set, 5, true, &g, &e), &e);
  CR_OK(rgi_autodiff(g, &f.before, &e), &e);
  CR_OK(rgi_fuse(f.before, gpu, true, split_kv, &f.after, &f.report, &e), &e);
  rgi_graph_destroy(g);
  rg_spec_destroy(spec);
  return f;
}

/* The only tensor on a port of node x. */
static const char *name_on(const rgi_graph *g, const rgi_node *x, const char *port) {
  const int in = rgi_in_port(x->op, port), out = rgi_out_port(x->op, port),
            begin = in >= 0 ? x->in_begin[in] : x->out_begin[out],
            end = in >= 0 ? x->in_begin[in + 1] : x->out_begin[out + 1];
  return end - begin != 1 ? "" : g->tensor[in >= 0 ? x->in[begin] : x->out[begin]].name;
}

/* Of the combine of cmp_o, slc_o and swa_o: which are in the node that stands for the last two, and
 * which is left to be handed in, or made there, too. */
static void check_places(const rgi_graph *g, size_t i) {
  for (int32_t n = 0; n < g->nnode; n++) {
    const rgi_node *x = &g->node[n];
    if (strcmp(x->op->name, "copy_batch") == 0) {
      static const char *const own[] = {"k_own", "v_own", "k_cmp_own", "v_cmp_own"};
      cr_assert_eq(x->attr[rgi_attribute(x->op, "own")].i, 0, "case %zu", i);
      cr_assert_str_eq(name_on(g, x, "first.pages"), "forks", "case %zu", i);
      cr_assert_str_eq(name_on(g, x, "pages"), "pages", "case %zu", i);
      for (int k = 0; k < 4; k++)
        cr_assert_str_eq(g->tensor[x->out[x->out_begin[0] + k]].name, own[k], "case %zu", i);
    }
    const bool step = strcmp(x->op->name, "kv_nsa") == 0, /* what kv_step does, too */
        all = step || strcmp(x->op->name, "paged_nsa") == 0;
    if (strcmp(x->op->name, "paged_slc_swa") != 0 && !all) continue;
    cr_assert_eq(x->attr[rgi_attribute(x->op, "first")].i, 1, "case %zu", i);
    cr_assert_eq(x->attr[rgi_attribute(x->op, "second")].i, 2, "case %zu", i);
    cr_assert_str_eq(name_on(g, x, "k_cache"), step ? "k_own" : "k_now", "case %zu", i);
    cr_assert_str_eq(name_on(g, x, all ? "first.o" : "o"), "cmp_o", "case %zu", i);
    if (!all) continue;
    cr_assert_eq(x->attr[rgi_attribute(x->op, "own")].i, 0, "case %zu", i);
    cr_assert_str_eq(name_on(g, x, step ? "k_cmp" : "first.k_cache"),
                     step ? "k_cmp_own" : "k_cmp_now", "case %zu", i);
    cr_assert_str_eq(name_on(g, x, step ? "v_cmp" : "first.v_cache"),
                     step ? "v_cmp_own" : "v_cmp_now", "case %zu", i);
    static const char *const made[4][2] = {
        {"k_cache", "k_now"}, {"v_cache", "v_now"}, {"k_cmp", "k_cmp_now"}, {"v_cmp", "v_cmp_now"}};
    for (int k = 0; k < 4 && step; k++)
      cr_assert_str_eq(g->tensor[rgi_out(x, rgi_out_port(x->op, made[k][0]))].name, made[k][1],
                       "case %zu", i);
    cr_assert_str_eq(name_on(g, x, "idx"), "idx", "case %zu", i);
    cr_assert_eq(x->out[x->out_begin[rgi_out_port(x->op, "o")]], g->output[0].tensor, "case %zu",
                 i);
    const int port = rgi_in_port(x->op, "o");
    cr_assert_eq(x->in_begin[port + 1], x->in_begin[port], "case %zu", i);
  }
}

Test(fuse, one_kernel_for_several_nodes_of_a_step, .init = begin, .fini = end) {
  static const rg_gpu hopper = {90, 132}, older = {80, 108};
  static const struct {
    const rg_gpu *gpu;
    int rows, sequences, most;
    const char *name;
    int value;
    bool choice, sum; /* attention and choice; selected blocks, window and combine */
  } c[] = {
      {&hopper, 8, 16, 32, "H", 64, true, false}, /* two blocks of threads a token */
      {&hopper, 7, 16, 32, "top_n", 32, true, false},
      {&hopper, 9, 16, 32, "H", 64, true, true},
      {&hopper, 98, 98, 32, "H", 64, true, true}, /* fewer tokens than three a multiprocessor */
      {&hopper, 99, 99, 32, "H", 64, true, true},
      {&hopper, 99, 99, 100, "top_n", 32, true, true},
      {&hopper, 99, 99, 101, "H", 64, false, true},  /* a table longer than the pool */
      {&hopper, 100, 99, 32, "H", 64, false, false}, /* more rows than single tokens have */
      {&hopper, 99, 99, 32, "H", 32, false, false},
      {&hopper, 99, 99, 32, "top_n", 33, false, false},
      {&hopper, 99, 99, 32, "stride", 8, false, true},
      {&hopper, 99, 99, 32, "window", 1024, true, true},
      {&hopper, 99, 99, 32, "window", 1025, true, false},
      {&hopper, 99, 99, 32, "window", -1, true, false},
      {&hopper, 99, 99, 32, "D", 192, false, false},
      {&older, 99, 99, 32, "H", 64, false, false},
      {NULL, 99, 99, 32, "H", 64, false, false},
  };
  for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
    fused f =
        fuse_step(c[i].gpu, c[i].rows, c[i].sequences, c[i].most, c[i].name, c[i].value, false);
    const bool all = c[i].choice && c[i].sum && c[i].rows < 99;     /* then in turn, with rows */
    const bool rows = c[i].gpu && strcmp(c[i].name, "stride") != 0; /* blocks of two groups */
    const bool begins = c[i].gpu != NULL; /* copies beside lengths and tables */
    cr_assert_eq(f.report->fused, c[i].choice + c[i].sum + 2 * all + rows + begins, "case %zu: %d",
                 i, f.report->fused);
    cr_assert_eq(count_op(f.after, "copy_batch"), begins, "case %zu", i);
    cr_assert_eq(count_op(f.after, "page_copy"), !begins, "case %zu", i);
    cr_assert_eq(count_op(f.after, "paged_batch"), !begins, "case %zu", i);
    cr_assert_eq(count_op(f.after, "kv_step"), rows && !all, "case %zu", i);
    cr_assert_eq(count_op(f.after, "kv_nsa"), all, "case %zu", i);
    cr_assert_eq(count_op(f.after, "kv_append"), !rows, "case %zu", i);
    cr_assert_eq(count_op(f.after, "kv_compress"), !rows, "case %zu", i);
    cr_assert_eq(count_op(f.after, "paged_nsa"), 0, "case %zu", i);
    cr_assert_eq(count_op(f.after, "paged_cmp_topk"), c[i].choice && !all, "case %zu", i);
    cr_assert_eq(count_op(f.after, "paged_topk"), !c[i].choice, "case %zu", i);
    cr_assert_eq(count_op(f.after, "paged_cmp_attn"), !c[i].choice, "case %zu", i);
    cr_assert_eq(count_op(f.after, "paged_slc_swa"), c[i].sum && !all, "case %zu", i);
    cr_assert_eq(count_op(f.after, "paged_slc_attn"), !c[i].sum, "case %zu", i);
    cr_assert_eq(count_op(f.after, "paged_swa_attn"), !c[i].sum, "case %zu", i);
    cr_assert_eq(count_op(f.after, "combine"), !c[i].sum, "case %zu", i);
    cr_assert_eq(f.after->nnode,
                 f.before->nnode - c[i].choice - 2 * c[i].sum - 2 * all - rows - begins, "case %zu",
                 i);
    check_places(f.after, i);
    drop(&f);
  }
}

/* Keys of a token are shared out whatever the number of tokens and the table's width are: no bit
 * hangs on those. */
Test(fuse, shared_out_keys, .init = begin, .fini = end) {
  static const rg_gpu hopper = {90, 132}, older = {80, 108};
  static const struct {
    const rg_gpu *gpu;
    int rows, sequences, most;
    const char *name;
    int value;
    bool taken;
  } c[] = {{&hopper, 1, 1, 32, "H", 64, true},         {&hopper, 8, 16, 32, "H", 64, true},
           {&hopper, 98, 98, 32, "H", 64, true},       {&hopper, 300, 300, 32, "H", 64, true},
           {&hopper, 9, 9, 101, "H", 64, true},        {&hopper, 9, 9, 32, "window", 1024, true},
           {&hopper, 9, 9, 32, "window", 1025, false}, {&hopper, 9, 9, 32, "H", 32, false},
           {&hopper, 10, 9, 32, "H", 64, false},       {&hopper, 9, 9, 32, "stride", 8, false},
           {&older, 9, 9, 32, "H", 64, false},         {NULL, 9, 9, 32, "H", 64, false}};
  for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
    fused f =
        fuse_step(c[i].gpu, c[i].rows, c[i].sequences, c[i].most, c[i].name, c[i].value, true);
    cr_assert_eq(f.report->split, c[i].taken, "case %zu", i);
    cr_assert_eq(count_op(f.after, "paged_nsa"), c[i].taken, "case %zu", i);
    cr_assert_eq(count_op(f.after, "kv_nsa"), 0, "case %zu", i);
    for (int32_t n = 0; n < f.after->nnode; n++) {
      const rgi_node *x = &f.after->node[n];
      if (strcmp(x->op->name, "paged_nsa") == 0)
        cr_assert_eq(x->attr[rgi_attribute(x->op, "split_kv")].i, 1, "case %zu", i);
    }
    check_places(f.after, i);
    drop(&f);
  }
}

/* Nodes of this op with and without something on the port. */
static void count_port(const rgi_graph *g, const char *op, const char *port, int *with,
                       int *without) {
  *with = *without = 0;
  for (int i = 0; i < g->nnode; i++) {
    const rgi_node *n = &g->node[i];
    if (strcmp(n->op->name, op) == 0)
      ++*(rgi_in(n, rgi_in_port(n->op, port)) >= 0 ? with : without);
  }
}

/* Two or three branches of window attention and a combine. `extra` goes among the nodes, `outputs`
 * into the outputs; `branches` is combine's list. */
static const char *branches_spec(const char *act, const char *branches, int n, const char *grads,
                                 const char *extra, const char *outputs, char *text, size_t size) {
  int used =
      snprintf(text, size,
               "{ \"regraph\": 1, \"name\": \"branches\", \"inputs\": {\n"
               " \"q\": { \"shape\": [\"T\", 4, 16], \"dtype\": \"f32\", \"grad\": %s },\n"
               " \"k\": { \"shape\": [\"T\", 2, 16], \"dtype\": \"f32\" },\n"
               " \"v\": { \"shape\": [\"T\", 2, 16], \"dtype\": \"f32\" },\n"
               " \"z\": { \"shape\": [\"T\", 4, 16], \"dtype\": \"f32\", \"grad\": true },\n"
               " \"gate\": { \"shape\": [\"T\", 4, %d], \"dtype\": \"f32\", \"grad\": %s },\n"
               " \"cu_seqlens\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } },\n \"nodes\": [\n"
               "  { \"name\": \"a\", \"op\": \"swa_attn\", \"in\": { \"q\": \"q\", \"k\": \"k\", "
               "\"v\": \"v\", "
               "\"cu_seqlens\": \"cu_seqlens\" }, \"out\": { \"o\": \"ao\" }, \"attrs\": { "
               "\"window_left\": 9 } },\n"
               "  { \"name\": \"b\", \"op\": \"swa_attn\", \"in\": { \"q\": \"q\", \"k\": \"k\", "
               "\"v\": \"v\", "
               "\"cu_seqlens\": \"cu_seqlens\" }, \"out\": { \"o\": \"bo\" }, \"attrs\": { "
               "\"window_left\": -1 } },\n"
               "%s  { \"name\": \"sum\", \"op\": \"combine\", \"in\": { \"o\": [%s], \"gate\": "
               "\"gate\" }, \"out\": { "
               "\"o\": "
               "\"o\" }, \"attrs\": { \"act\": \"%s\" } } ],\n \"outputs\": { \"o\": \"o\"%s } }\n",
               strchr(grads, 'q') ? "true" : "false", n, strchr(grads, 'g') ? "true" : "false",
               extra, branches, act, outputs);
  cr_assert(used > 0 && (size_t)used < size);
  return text;
}

static fused fuse_branches(const char *act, const char *branches, int n, const char *grads,
                           const char *extra, const char *outputs) {
  char text[4096];
  rg_spec *spec =
      load_spec(ctx, branches_spec(act, branches, n, grads, extra, outputs, text, sizeof text));
  fused f = fuse_spec(spec, 0, NULL, false);
  rg_spec_destroy(spec);
  return f;
}

Test(fuse, takes_apart_what_goes_to_attention, .init = begin, .fini = end) {
  static const char *const acts[] = {"sigmoid", "softmax", "none"};
  for (int i = 0; i < 3; i++) {
    fused f = fuse_branches(acts[i], "\"ao\", \"bo\"", 2, "qg", "", "");
    int with, without;
    cr_assert_eq(f.report->count, 1);
    cr_assert_null(f.report->at[0].why);
    cr_assert_str_eq(f.report->at[0].name, "sum");
    cr_assert_eq(f.report->at[0].parts, 2);
    cr_assert_eq(f.report->at[0].deltas, 2);
    cr_assert_eq(count_op(f.after, "combine.bwd"), 0);
    cr_assert_eq(count_op(f.after, "combine.branch.bwd"), 2);
    cr_assert_eq(count_op(f.after, "combine.gates.bwd"), 1);
    count_port(f.after, "swa_attn.bwd", "delta.o", &with, &without);
    cr_assert(with == 2 && without == 0);
    count_port(f.after, "swa_attn.bwd", "out.o", &with, &without);
    cr_assert(with == 0 && without == 2);
    /* a part stands directly before the reader of its gradient */
    for (int n = 0; n < f.after->nnode; n++)
      if (strcmp(f.after->node[n].op->name, "swa_attn.bwd") == 0) {
        const rgi_node *node = &f.after->node[n];
        const int from = f.after->tensor[rgi_in(node, rgi_in_port(node->op, "grad.o"))].producer;
        cr_assert(from == n - 1 || (from == n - 2 && strcmp(f.after->node[n - 1].op->name,
                                                            "combine.gates.bwd") == 0));
      }
    drop(&f);
  }
}

Test(fuse, gates_without_gradient_need_no_products, .init = begin, .fini = end) {
  fused f = fuse_branches("softmax", "\"ao\", \"bo\"", 2, "q", "", "");
  cr_assert_eq(f.report->fused, 1);
  cr_assert_eq(count_op(f.after, "combine.gates.bwd"), 0);
  for (int n = 0; n < f.after->nnode; n++)
    if (strcmp(f.after->node[n].op->name, "combine.branch.bwd") == 0)
      cr_assert_lt(rgi_out(&f.after->node[n], rgi_out_port(f.after->node[n].op, "product")), 0);
  drop(&f);
}

/* One branch is an input: its part has no sum to hand on. */
Test(fuse, other_branches_come_along, .init = begin, .fini = end) {
  fused f = fuse_branches("sigmoid", "\"ao\", \"z\", \"bo\"", 3, "qg", "", "");
  cr_assert_eq(f.report->fused, 1);
  cr_assert_eq(f.report->at[0].parts, 3);
  cr_assert_eq(f.report->at[0].deltas, 2);
  drop(&f);
}

static void left_whole(const char *act, const char *branches, int n, const char *grads,
                       const char *extra, const char *outputs, const char *why) {
  fused f = fuse_branches(act, branches, n, grads, extra, outputs);
  cr_assert_eq(f.report->count, 1);
  cr_assert_eq(f.report->fused, 0);
  cr_assert_not_null(f.report->at[0].why, "%s", why);
  cr_assert_not_null(strstr(f.report->at[0].why, why), "\"%s\" does not say \"%s\"",
                     f.report->at[0].why, why);
  cr_assert_eq(count_op(f.after, "combine.bwd"), 1);
  cr_assert_eq(f.after->nnode, f.before->nnode);
  for (int i = 0; i < f.after->nnode; i++)
    cr_assert_str_eq(f.after->node[i].name, f.before->node[i].name);
  drop(&f);
}

Test(fuse, leaves_the_rest_whole, .init = begin, .fini = end) {
  left_whole("sigmoid", "\"z\", \"z\"", 2, "g", "", "", "no reader");
  /* attention is not differentiated */
  left_whole("sigmoid", "\"ao\", \"z\"", 2, "g", "", "", "no reader");
  /* the gradient of ao has a second term */
  left_whole("sigmoid", "\"ao\", \"z\"", 2, "qg", "", ", \"too\": \"ao\"", "no reader");
  /* the same branch twice: its gradient is a sum */
  left_whole("sigmoid", "\"ao\", \"ao\"", 2, "qg", "", "", "no reader");
  /* something stands between attention and combine */
  left_whole("sigmoid", "\"as\", \"z\"", 2, "qg",
             "  { \"name\": \"s\", \"op\": \"silu\", \"in\": { \"x\": \"ao\" }, \"out\": { \"y\": "
             "\"as\" } },\n",
             "", "no reader");
  left_whole("sigmoid", "\"ao\", \"z\", \"z\"", 3, "qg", "", "", "read more");
}

/* Nothing to take apart: no gradients, no combine. */
Test(fuse, finds_nothing_in_forward_graphs, .init = begin, .fini = end) {
  fused f = fuse_branches("sigmoid", "\"ao\", \"bo\"", 2, "", "", "");
  rg_error e = {0};
  rgi_graph *again;
  rgi_fusions *report;
  cr_assert_eq(f.after->nnode > 0, true);
  CR_OK(rgi_fuse(f.after, NULL, false, false, &again, &report, &e),
        &e); /* what is fused stays as it is */
  cr_assert_eq(report->fused, 0);
  cr_assert_eq(again->nnode, f.after->nnode);
  rgi_graph_destroy(again);
  rgi_fusions_destroy(report);
  drop(&f);
}

Test(fuse, every_head_group, .init = begin, .fini = end) {
  char text[8192];
  rg_spec *spec = load_spec(ctx, nsa_spec("bf16", true, text, sizeof text));
  fused f = fuse_spec(spec, 1, NULL, false);
  cr_assert_eq(f.report->count, 1);
  cr_assert_eq(f.report->at[0].nodes, 2);
  cr_assert_eq(f.report->fused, 2);
  cr_assert_eq(count_op(f.after, "combine.branch.bwd"), 6);
  cr_assert_eq(count_op(f.after, "combine.gates.bwd"), 2);
  drop(&f);
  rg_spec_destroy(spec);
}

/* Where nodes may run side by side, a part waits for the reader of the gradient before it. */
Test(fuse, with_lanes_parts_wait, .init = begin, .fini = end) {
  char text[8192];
  rg_spec *spec = load_spec(ctx, nsa_spec("bf16", false, text, sizeof text));
  fused f = fuse_spec(spec, 0, NULL, true);
  int parts = 0;
  cr_assert_eq(f.report->fused, 1);
  for (int n = 0; n < f.after->nnode; n++) {
    if (strcmp(f.after->node[n].op->name, "combine.branch.bwd") != 0) continue;
    const int after = f.after->node[n].after;
    cr_assert_eq(after >= 0, parts > 0);
    if (after >= 0) cr_assert_eq(f.after->tensor[after].producer, n - 1);
    parts++;
  }
  cr_assert_eq(parts, 3);
  drop(&f);
  rg_spec_destroy(spec);
  /* these two attentions share no gradient */
  char branches[4096];
  branches_spec("sigmoid", "\"ao\", \"bo\"", 2, "qg", "", "", branches, sizeof branches);
  char *q = strstr(strstr(branches, "\"b\", \"op\""), "\"q\": \"q\"");
  q[6] = 'z';
  spec = load_spec(ctx, branches);
  f = fuse_spec(spec, 0, NULL, true);
  cr_assert_eq(f.report->fused, 0);
  cr_assert_not_null(strstr(f.report->at[0].why, "side by side"));
  drop(&f);
  f = fuse_spec(spec, 0, NULL, false);
  cr_assert_eq(f.report->fused, 1);
  drop(&f);
  rg_spec_destroy(spec);
}

/* On a GPU the order of a sum is that of the kernels that would have taken it. */
Test(fuse, asks_for_the_order_of_the_kernels, .init = begin, .fini = end) {
  char text[8192];
  static const rg_gpu hopper = {90, 132}, ampere = {80, 108};
  rg_spec *spec = load_spec(ctx, nsa_spec("f32", false, text, sizeof text));
  for (int i = 0; i < 2; i++) {
    fused f = fuse_spec(spec, 0, i ? &hopper : &ampere, false);
    cr_assert_eq(f.report->fused, 1);
    for (int n = 0; n < f.after->nnode; n++)
      if (strcmp(f.after->node[n].op->name, "combine.branch.bwd") == 0)
        cr_assert_eq(f.after->node[n].attr[2].i, RGI_DELTA_CHAIN);
    drop(&f);
  }
  rg_spec_destroy(spec);
}

/* What adds the last term of the caller's d.q rounds it, where kernels can; an fp32 one needs no
 * cast, and one that a rule reads on is rounded by a cast as before. */
Test(fuse, takes_casts_over, .init = begin, .fini = end) {
  static const rg_gpu hopper = {90, 132};
  static const struct {
    const char *dtype;
    const rg_gpu *gpu;
    bool read_on;
    int casts;
  } at[] = {{"bf16", NULL, false, 1},
            {"f16", NULL, false, 1},
            {"f32", NULL, false, 0},
            {"bf16", NULL, true, 0},
            {"f32", &hopper, false, 0}};
  char text[8192];
  for (int i = 0; i < RGI_COUNT(at); i++) {
    int with, without, casts = 0;
    nsa_spec(at[i].dtype, false, text, sizeof text);
    if (at[i].read_on) { /* all queries are silu of the input */
      for (char *q = text; (q = strstr(q, "\"q\": \"q\"")); q++) q[6] = 'y';
      char *nodes = strstr(text, "\"nodes\": [") + strlen("\"nodes\": ["), rest[8192];
      snprintf(rest, sizeof rest, "%s", nodes);
      snprintf(nodes, sizeof text - (size_t)(nodes - text),
               " { \"name\": \"before\", \"op\": \"silu\", \"in\": { \"x\": \"q\" }, "
               "\"out\": { \"y\": \"y\" } }, %s",
               rest);
    }
    rg_spec *spec = load_spec(ctx, text);
    fused f = fuse_spec(spec, 0, at[i].gpu, false);
    cr_assert_eq(f.report->casts, at[i].casts, "case %d: %d casts", i, f.report->casts);
    count_port(f.after, "cmp_attn.bwd", "sum.q", &with, &without);
    cr_assert_eq(with, at[i].casts);
    count_port(f.after, "cmp_attn.bwd", "acc.q", &with, &without);
    cr_assert_eq(without, at[i].casts);
    casts = count_op(f.before, "cast") - count_op(f.after, "cast");
    cr_assert_eq(casts, at[i].casts);
    if (at[i].casts) cr_assert_lt(f.report->cast_after, 0.6 * f.report->cast_before);
    drop(&f);
    rg_spec_destroy(spec);
  }
}

/* ---- what it gains ---- */

static rg_plan *plan_for(const rg_spec *spec, const rg_policy *policy, int64_t tokens,
                         bool no_fuse) {
  rg_error e = {0};
  rg_plan *plan = NULL;
  rg_binding set[] = {{"T", tokens, NULL}, {"B", B, NULL}};
  rg_plan_options o = {.set = set,
                       .nset = 2,
                       .device = test_device(),
                       .threads = 2,
                       .pack_seconds = 0.2,
                       .no_fuse = no_fuse};
  CR_OK(rg_plan_create(spec, policy, &o, &plan, &e), &e);
  return plan;
}

static char *written(const rg_plan *plan, const char *format) {
  rg_error e = {0};
  rg_text text = {0};
  CR_OK(rg_plan_write(plan, format, &text, &e), &e);
  char *copy = strdup(text.data);
  rg_text_destroy(&text);
  return copy;
}

Test(fuse, stock_examples_need_no_more_memory, .init = begin, .fini = end) {
  static const char *const name[] = {"nsa",  "nsa_layer",      "nsa_linear",  "two_branch",
                                     "moba", "sliding_window", "dense_causal"};
  static const char *const policies[] = {"none", "all", "branches", "groups"};
  for (int i = 0; i < RGI_COUNT(name); i++)
    for (int p = 0; p < RGI_COUNT(policies); p++) {
      char path[256];
      rg_error e = {0};
      rg_spec *spec = NULL;
      rg_policy *policy = NULL;
      snprintf(path, sizeof path, "examples/%s.json", name[i]);
      CR_OK(rg_spec_load_file(ctx, path, NULL, 0, &spec, &e), &e);
      snprintf(path, sizeof path, "examples/policies/%s.json", policies[p]);
      CR_OK(rg_policy_load_file(ctx, path, &policy, &e), &e);
      rg_binding set[] = {{"T", 2048, NULL}, {"B", 1, NULL}};
      rg_plan_options o = {.set = set, .nset = 2, .threads = 2, .pack_seconds = 0.2};
      rg_plan *with = NULL, *without = NULL;
      rg_sizes a, b;
      /* the policy may name nodes of nsa */
      if (rg_plan_create(spec, policy, &o, &with, &e) == RG_OK) {
        o.no_fuse = true;
        CR_OK(rg_plan_create(spec, policy, &o, &without, &e), &e);
        rg_plan_sizes(with, &a);
        rg_plan_sizes(without, &b);
        cr_assert_leq(a.predicted_peak, b.predicted_peak, "%s, %s: peak %lld, unfused %lld",
                      name[i], policies[p], (long long)a.predicted_peak,
                      (long long)b.predicted_peak);
        if (strncmp(name[i], "nsa", 3) == 0)
          cr_assert_lt(a.predicted_peak, b.predicted_peak, "%s, %s gains nothing", name[i],
                       policies[p]);
      }
      rg_plan_destroy(with);
      rg_plan_destroy(without);
      rg_policy_destroy(policy);
      rg_spec_destroy(spec);
    }
}

Test(fuse, is_reported_and_can_be_switched_off, .init = begin, .fini = end) {
  char text[8192];
  rg_spec *spec = load_spec(ctx, nsa_spec("bf16", false, text, sizeof text));
  rg_plan *on = plan_for(spec, NULL, T, false), *off = plan_for(spec, NULL, T, true);
  char *a = written(on, "text"), *b = written(off, "text"), *c = written(on, "json"),
       *d = written(off, "json");
  cr_assert_not_null(strstr(a, "gradient of combine in 3 parts, 3 sums handed on"), "%s", a);
  cr_assert_null(strstr(b, "fuse"));
  cr_assert_not_null(strstr(c, "\"sums_handed_on\": 3"));
  cr_assert_not_null(strstr(d, "\"fuse\": null"));
  free(a), free(b), free(c), free(d);
  rg_plan_destroy(on);
  rg_plan_destroy(off);
  rg_spec_destroy(spec);
}

/* A budget that only fused plans meet is met. */
Test(fuse, the_chooser_sees_it, .init = begin, .fini = end) {
  char text[8192], policy_text[128];
  rg_error e = {0};
  rg_spec *spec = load_spec(ctx, nsa_spec("bf16", false, text, sizeof text));
  rg_policy *all = load_policy(ctx, "{ \"regraph_policy\": 1, \"preset\": \"all\" }");
  rg_plan *plan = plan_for(spec, all, T, false);
  rg_sizes z;
  rg_plan_sizes(plan, &z);
  rg_plan_destroy(plan);
  snprintf(policy_text, sizeof policy_text,
           "{ \"regraph_policy\": 1, \"budget\": { \"bytes\": %lld, \"of\": \"peak\" } }",
           (long long)z.predicted_peak);
  rg_policy *budget = load_policy(ctx, policy_text);
  plan = plan_for(spec, budget, T, false);
  rg_plan_sizes(plan, &z);
  rg_plan_destroy(plan);
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rg_plan_options o = {
      .set = set, .nset = 2, .device = test_device(), .threads = 2, .no_fuse = true};
  cr_assert_eq(rg_plan_create(spec, budget, &o, &plan, &e), RG_E_INFEASIBLE);
  rg_policy_destroy(budget);
  rg_policy_destroy(all);
  rg_spec_destroy(spec);
}

/* ---- bits ---- */

static void run_plan(rg_plan *plan, int64_t tokens, const int *len, buffers *b) {
  rg_error e = {0};
  rg_session *s = NULL;
  rg_session_options o = {.debug_poison = true};
  CR_OK(rg_session_create(plan, &o, &s, &e), &e);
  make_buffers(plan, 11, tokens, len, b);
  bind_all(s, b);
  run_both(s);
  fetch_all(s, b);
  rg_session_destroy(s);
}

static void same_bits(const rg_spec *spec, const rg_policy *policy, const char *what) {
  rg_plan *plan[2];
  buffers b[2];
  for (int i = 0; i < 2; i++) {
    plan[i] = plan_for(spec, policy, T, i == 1);
    run_plan(plan[i], T, lengths, &b[i]);
  }
  same_results(&b[0], &b[1], what);
  for (int i = 0; i < 2; i++) {
    free_buffers(&b[i]);
    rg_plan_destroy(plan[i]);
  }
}

Test(fuse, changes_no_bit_of_nsa, .init = begin, .fini = end) {
  static const char *const dtype[] = {"f32", "bf16", "f16"};
  char text[8192], policy_text[512], what[600];
  for (int i = 0; i < 3; i++) {
    rg_spec *spec = load_spec(ctx, nsa_spec(dtype[i], i == 1, text, sizeof text));
    for (int split = 0; split <= 1; split++)
      for (int k = -1; k <= NSA_NODES; k++) { /* nothing, each node, all of them */
        const unsigned mask = k < 0 ? 0 : k == NSA_NODES ? (1u << NSA_NODES) - 1 : 1u << k;
        rg_policy *policy =
            load_policy(ctx, nsa_policy(mask, split, policy_text, sizeof policy_text));
        snprintf(what, sizeof what, "%s %s", dtype[i], policy_text);
        same_bits(spec, policy, what);
        rg_policy_destroy(policy);
      }
    rg_spec_destroy(spec);
  }
}

Test(fuse, changes_no_bit_of_branches, .init = begin, .fini = end) {
  static const char *const acts[] = {"sigmoid", "softmax", "none"};
  char text[4096];
  for (int i = 0; i < 3; i++) {
    rg_spec *spec =
        load_spec(ctx, branches_spec(acts[i], "\"ao\", \"z\", \"bo\"", 3, "qg", "",
                                     i == 2 ? ", \"too\": \"bo\"" : "", text, sizeof text));
    same_bits(spec, NULL, acts[i]);
    rg_spec_destroy(spec);
  }
}

/* Combines of combines: parts go before parts. */
Test(fuse, changes_no_bit_of_nested_branches, .init = begin, .fini = end) {
  char text[4096];
  const char *inner = "  { \"name\": \"in\", \"op\": \"combine\", \"in\": { \"o\": [\"ao\", "
                      "\"z\"], \"gate\": \"g2\" }, "
                      "\"out\": { \"o\": \"io\" } },\n";
  branches_spec("sigmoid", "\"io\", \"bo\"", 2, "qg", inner, "", text, sizeof text);
  char *at = strstr(text, " \"cu_seqlens\": { \"shape\"");
  char all[4096];
  snprintf(all, sizeof all,
           "%.*s \"g2\": { \"shape\": [\"T\", 4, 2], \"dtype\": \"f32\", \"grad\": true },\n%s",
           (int)(at - text), text, at);
  rg_spec *spec = load_spec(ctx, all);
  fused f = fuse_spec(spec, 0, NULL, false);
  cr_assert_eq(f.report->fused, 2);
  drop(&f);
  same_bits(spec, NULL, "nested");
  rg_spec_destroy(spec);
}

/* Random graphs of attention, silu and combine: branches read once or often, twice by one combine,
 * outputs besides; gates with and without gradients, read by one combine or by several. */
static const char *random_branches(uint64_t seed, const char *dtype, char *text, size_t size) {
  uint64_t state = seed * 7919;
  char name[24][16], drawn[24] = {0};
  int count = 0, used = 0, combines = 1 + (int)(next_random(&state) % 3);
#define ADD(...) used += snprintf(text + used, size - (size_t)used, __VA_ARGS__)
  ADD("{ \"regraph\": 1, \"name\": \"random\", \"inputs\": {\n"
      " \"q\": { \"shape\": [\"T\", 4, 16], \"dtype\": \"%s\", \"grad\": true },\n"
      " \"k\": { \"shape\": [\"T\", 2, 16], \"dtype\": \"%s\", \"grad\": true },\n"
      " \"v\": { \"shape\": [\"T\", 2, 16], \"dtype\": \"%s\", \"grad\": %s },\n"
      " \"z\": { \"shape\": [\"T\", 4, 16], \"dtype\": \"%s\", \"grad\": true },\n",
      dtype, dtype, dtype, next_random(&state) % 2 ? "true" : "\"accumulate\"", dtype);
  for (int n = 1; n <= 4; n++)
    ADD(" \"gate%d\": { \"shape\": [\"T\", 4, %d], \"dtype\": \"%s\", \"grad\": %s },\n", n, n,
        next_random(&state) % 2 ? dtype : "f32",
        next_random(&state) % 4 == 0 ? "false"
        : next_random(&state) % 2    ? "true"
                                     : "\"accumulate\"");
  ADD(" \"cu_seqlens\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } },\n \"nodes\": [\n");
  snprintf(name[count++], sizeof *name, "z");
  for (int c = 0; c < combines; c++) {
    const int attentions = 1 + (int)(next_random(&state) % 3), first = count;
    for (int i = 0; i < attentions; i++, count++) {
      const bool cut = next_random(&state) % 3 == 0;
      snprintf(name[count], sizeof *name, "a%d", count);
      ADD("  { \"name\": \"n%s\", \"op\": \"swa_attn\", \"in\": { \"q\": \"%s\", \"k\": \"k\", "
          "\"v\": \"v\", "
          "\"cu_seqlens\": \"cu_seqlens\" }, \"out\": { \"o\": \"%s\" }, \"attrs\": { "
          "\"window_left\": %d } "
          "},\n",
          name[count], cut ? name[next_random(&state) % (unsigned)first] : "q", name[count],
          (int)(next_random(&state) % 40) - 1);
    }
    if (next_random(&state) % 3 == 0) {
      snprintf(name[count], sizeof *name, "s%d", count);
      ADD("  { \"name\": \"n%s\", \"op\": \"silu\", \"in\": { \"x\": \"%s\" }, \"out\": { \"y\": "
          "\"%s\" } "
          "},\n",
          name[count], name[next_random(&state) % (unsigned)count], name[count]);
      count++;
    }
    static const char *const acts[] = {"sigmoid", "softmax", "none"};
    const int n = 1 + (int)(next_random(&state) % 4);
    ADD("  { \"name\": \"nc%d\", \"op\": \"combine\", \"in\": { \"o\": [", c);
    for (int i = 0; i < n; i++) { /* mostly what nobody has read yet */
      int k = count - 1 - i;
      if (k < 1 || drawn[k] || next_random(&state) % 5 == 0)
        k = (int)(next_random(&state) % (unsigned)count);
      drawn[k] = 1;
      ADD("%s\"%s\"", i ? ", " : "", name[k]);
    }
    ADD("], \"gate\": \"gate%d\" }, \"out\": { \"o\": \"c%d\" }, \"attrs\": { \"act\": \"%s\" } "
        "}%s\n",
        n, c, acts[next_random(&state) % 3], c + 1 < combines ? "," : " ],");
    snprintf(name[count++], sizeof *name, "c%d", c);
  }
  ADD(" \"outputs\": { \"o\": \"%s\"", name[count - 1]);
  for (int k = 1; k < count - 1; k++)
    if (!drawn[k] || next_random(&state) % 8 == 0) ADD(", \"o%d\": \"%s\"", k, name[k]);
  ADD(" } }\n");
#undef ADD
  cr_assert((size_t)used < size);
  return text;
}

Test(fuse, changes_no_bit_of_random_branches, .init = begin, .fini = end, .timeout = 600) {
  static const char *const dtype[] = {"f32", "bf16", "f16"};
  static const char *const policies[] = {
      "{ \"regraph_policy\": 1 }", "{ \"regraph_policy\": 1, \"preset\": \"all\" }",
      "{ \"regraph_policy\": 1, \"split_heads\": 1 }",
      "{ \"regraph_policy\": 1, \"preset\": \"all\", \"split_heads\": 1 }"};
  char text[16384], what[64];
  int fusions = 0, casts = 0;
  uint64_t first = round_seed(1, 90);
  for (uint64_t seed = first; seed < first + 90; seed++) {
    rg_spec *spec = load_spec(ctx, random_branches(seed, dtype[seed % 3], text, sizeof text));
    rg_policy *policy = load_policy(ctx, policies[seed / 3 % 4]);
    fused f = fuse_spec(spec, 0, NULL, false);
    fusions += f.report->fused;
    casts += f.report->casts;
    drop(&f);
    snprintf(what, sizeof what, "seed %d, policy %s", (int)seed, policies[seed / 3 % 4]);
    same_bits(spec, policy, what);
    rg_policy_destroy(policy);
    rg_spec_destroy(spec);
  }
  cr_assert_gt(fusions, 50, "%d combines of 90 random graphs were fused", fusions);
  cr_assert_gt(casts, 10, "%d casts of 90 random graphs were taken over", casts);
}
