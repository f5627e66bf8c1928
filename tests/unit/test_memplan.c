/* tests/unit/test_memplan.c: memory plans of the examples and of small graphs made for one question
 * each, judged by the independent checker, and the checker judged by plans broken on purpose. */
#include "graph/spec.h"
#include "memplan/memplan.h"
#include "passes/passes.h"
#include "must.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static rg_context *ctx;

static void open_context(void) {
  cr_assert_eq(rg_context_create(NULL, &ctx, NULL), RG_OK);
}
static void close_context(void) {
  rg_context_destroy(ctx);
}
TestSuite(memplan, .init = open_context, .fini = close_context);

/* Differentiated (where gradients are asked for), bound to T tokens. */
static rgi_graph *elaborate(rg_spec *spec, int64_t tokens, size_t nset, int heads) {
  rg_binding set[] = {{"T", tokens, NULL}, {"B", 1, NULL}};
  rgi_graph *whole, *split, *g;
  must(rgi_spec_elaborate(spec, set, nset, true, &whole, &err), "elaborate");
  if (heads) {
    must(rgi_split_heads(whole, heads, &split, &err), "split");
    rgi_graph_destroy(whole);
    whole = split;
  }
  must(rgi_autodiff(whole, &g, &err), "autodiff");
  rgi_graph_destroy(whole);
  rg_spec_destroy(spec);
  return g;
}

static rgi_graph *from_text_of(const char *text, int64_t tokens) {
  rg_spec *spec;
  memset(&err, 0, sizeof err);
  must(rg_spec_load_text(ctx, text, strlen(text), "test", NULL, 0, &spec, &err), "load");
  return elaborate(spec, tokens, 1, 0);
}

static rgi_graph *from_text(const char *text) {
  return from_text_of(text, 64);
}

static rgi_graph *from_file(const char *name, int heads) {
  char path[512];
  rg_spec *spec;
  memset(&err, 0, sizeof err);
  snprintf(path, sizeof path, "%s/examples/%s", RG_SOURCE_DIR, name);
  must(rg_spec_load_file(ctx, path, NULL, 0, &spec, &err), "load");
  return elaborate(spec, 256, 2, heads);
}

typedef struct planned {
  rgi_graph *g;
  rgi_memory *m;
} planned;

static planned plan(const rgi_graph *g, rgi_memory_options o) {
  planned p;
  if (!o.threads) o.threads = 2;
  must(rgi_memplan(g, &o, &p.g, &p.m, &err), "plan");
  must(rgi_memory_check(p.g, p.m, &err), "check");
  return p;
}

static const rgi_block *block_of(planned p, const char *name) {
  for (int32_t i = 0; i < p.m->nblock; i++)
    if (p.m->block[i].tensor >= 0 && strcmp(p.g->tensor[p.m->block[i].tensor].name, name) == 0)
      return &p.m->block[i];
  return NULL;
}

static const char *const examples[] = {"nsa.json",  "nsa_layer.json",    "nsa_linear.json",
                                       "moba.json", "dense_causal.json", "two_branch.json"};

Test(memplan, examples) {
  for (int i = 0; i < RGI_COUNT(examples); i++)
    for (int heads = 0; heads < 2; heads++) {
      rgi_graph *g = from_file(examples[i], heads);
      planned a = plan(g, (rgi_memory_options){0});
      cr_assert(a.m->forward_optimal && a.m->backward_optimal, "%s", examples[i]);
      cr_assert_leq(a.m->forward_bound, a.m->forward_scratch);
      cr_assert_leq(a.m->backward_bound, a.m->backward_scratch);

      int64_t saved, forward, backward;
      rgi_memory_options o = {.threads = 2};
      must(rgi_memory_peak(g, &o, false, &saved, &forward, &backward, &err), "peak");
      cr_assert_eq(saved, a.m->saved);
      cr_assert_eq(forward, a.m->forward_scratch);
      cr_assert_eq(backward, a.m->backward_scratch);
      must(rgi_memory_peak(g, &o, true, &saved, &forward, &backward, &err), "bound");
      cr_assert_eq(forward, a.m->forward_bound);
      cr_assert_eq(backward, a.m->backward_bound);

      planned apart = plan(g, (rgi_memory_options){.no_reuse = true});
      cr_assert_eq(apart.m->scratch, apart.m->no_reuse);
      cr_assert_eq(apart.m->no_reuse, a.m->no_reuse);
      cr_assert_gt(apart.m->scratch, a.m->scratch);
      cr_assert_eq(apart.m->saved, a.m->saved);
      o.no_reuse = true;
      must(rgi_memory_peak(g, &o, false, &saved, &forward, &backward, &err), "peak without reuse");
      cr_assert_eq(forward > backward ? forward : backward, apart.m->scratch);

      rgi_graph_destroy(a.g);
      rgi_graph_destroy(apart.g);
      rgi_graph_destroy(g);
    }
}

/* x → silu → a → silu → b → silu → y: a and b are scratch, b takes a's bytes. */
static const char chain[] =
    "{\"regraph\":1,\"name\":\"chain\",\"inputs\":{\"x\":{\"shape\":[\"T\",8],\"dtype\":\"f32\"}},"
    "\"nodes\":["
    "{\"name\":\"one\",\"op\":\"silu\",\"in\":{\"x\":\"x\"},\"out\":{\"y\":\"a\"}},"
    "{\"name\":\"two\",\"op\":\"silu\",\"in\":{\"x\":\"a\"},\"out\":{\"y\":\"b\"}},"
    "{\"name\":\"three\",\"op\":\"silu\",\"in\":{\"x\":\"b\"},\"out\":{\"y\":\"y\"}}],\"outputs\":{"
    "\"y\":"
    "\"y\"}}";

Test(memplan, in_place) {
  rgi_graph *g = from_text(chain);
  planned with = plan(g, (rgi_memory_options){0});
  const rgi_block *a = block_of(with, "a"), *b = block_of(with, "b");
  cr_assert_not_null(a);
  cr_assert_not_null(b);
  cr_assert_eq(b->shares, a - with.m->block);
  cr_assert_eq(a->address, b->address);
  cr_assert_eq(with.m->scratch, 64 * 8 * 4);
  cr_assert_eq(with.m->inplace_gain, 64 * 8 * 4);
  cr_assert_null(block_of(with, "y"));

  planned without = plan(g, (rgi_memory_options){.no_inplace = true});
  cr_assert_eq(without.m->scratch, 2 * 64 * 8 * 4);
  cr_assert_eq(without.m->inplace_gain, 0);
  rgi_graph_destroy(with.g);
  rgi_graph_destroy(without.g);
  rgi_graph_destroy(g);
}

/* a is read again after two, so b must not take its bytes; and mul reads a twice. */
Test(memplan, not_in_place) {
  rgi_graph *g = from_text(
      "{\"regraph\":1,\"name\":\"fork\",\"inputs\":{\"x\":{\"shape\":[\"T\",8],\"dtype\":\"f32\"}},"
      "\"nodes\":["
      "{\"name\":\"one\",\"op\":\"silu\",\"in\":{\"x\":\"x\"},\"out\":{\"y\":\"a\"}},"
      "{\"name\":\"two\",\"op\":\"silu\",\"in\":{\"x\":\"a\"},\"out\":{\"y\":\"b\"}},"
      "{\"name\":\"sum\",\"op\":\"mul\",\"in\":{\"a\":\"a\",\"b\":\"b\"},\"out\":{\"y\":\"c\"}},"
      "{\"name\":\"square\",\"op\":\"mul\",\"in\":{\"a\":\"c\",\"b\":\"c\"},\"out\":{\"y\":\"d\"}},"
      "{\"name\":\"last\",\"op\":\"silu\",\"in\":{\"x\":\"d\"},\"out\":{\"y\":\"y\"}}],\"outputs\":"
      "{\"y\":\"y\"}}");
  planned p = plan(g, (rgi_memory_options){0});
  cr_assert_eq(block_of(p, "b")->shares, -1);
  cr_assert_eq(block_of(p, "c")->shares, block_of(p, "a") - p.m->block);
  cr_assert_eq(block_of(p, "d")->shares, -1);
  rgi_graph_destroy(p.g);
  rgi_graph_destroy(g);
}

/* The chain with gradients. silu.bwd reads silu's input, so a and b are saved; d.b and d.a live
 * together in two.bwd; x, y, d.y and d.x are the caller's. Forward needs no scratch. */
static const char chain_with_gradients[] =
    "{\"regraph\":1,\"name\":\"tiny\",\"inputs\":{\"x\":{\"shape\":[\"T\",8],\"dtype\":\"f32\","
    "\"grad\":true}"
    "},"
    "\"nodes\":["
    "{\"name\":\"one\",\"op\":\"silu\",\"in\":{\"x\":\"x\"},\"out\":{\"y\":\"a\"}},"
    "{\"name\":\"two\",\"op\":\"silu\",\"in\":{\"x\":\"a\"},\"out\":{\"y\":\"b\"}},"
    "{\"name\":\"three\",\"op\":\"silu\",\"in\":{\"x\":\"b\"},\"out\":{\"y\":\"y\"}}],\"outputs\":{"
    "\"y\":"
    "\"y\"}}";

Test(memplan, predicted_sizes) {
  /* bytes of a [T, 8] f32, and where a second one starts */
  static const struct {
    int64_t tokens, bytes, second;
  } cases[] = {{64, 2048, 2048}, {1, 32, 256}, {9, 288, 512}, {8, 256, 256}};
  for (int i = 0; i < RGI_COUNT(cases); i++) {
    rgi_graph *g = from_text_of(chain_with_gradients, cases[i].tokens);
    planned p = plan(g, (rgi_memory_options){0});
    int64_t both = cases[i].second + cases[i].bytes;
    cr_assert_eq(p.m->saved, both);
    cr_assert_eq(p.m->forward_scratch, 0);
    cr_assert_eq(p.m->backward_scratch, both);
    cr_assert_eq(p.m->backward_bound, both);
    cr_assert_eq(p.m->scratch, both);
    cr_assert_eq(p.m->no_reuse, both);
    cr_assert_eq(p.m->nblock, 4);
    cr_assert_eq(block_of(p, "a")->region, RGI_R_SAVED);
    cr_assert_eq(block_of(p, "b")->region, RGI_R_SAVED);
    for (int32_t k = 0; k < p.m->nblock; k++) {
      cr_assert_eq(p.m->block[k].size, cases[i].bytes);
      cr_assert(p.m->block[k].address == 0 || p.m->block[k].address == cases[i].second);
    }
    rgi_graph_destroy(p.g);
    rgi_graph_destroy(g);
  }
}

Test(memplan, regions) {
  rgi_graph *g = from_file("nsa.json", 0);
  planned p = plan(g, (rgi_memory_options){0});
  for (int32_t t = 0; t < p.g->ntensor; t++)
    if (p.g->tensor[t].base < 0) cr_assert_neq(p.g->tensor[t].region, RGI_NOWHERE);
  for (int i = 0; i < p.g->noutput; i++) {
    cr_assert_eq(p.g->tensor[rgi_owner(p.g, p.g->output[i].tensor)].region, RGI_R_OUTPUT);
    cr_assert_eq(p.g->tensor[rgi_owner(p.g, p.g->output[i].grad)].region, RGI_R_INPUT);
  }
  for (int i = 0; i < p.g->ninput; i++) {
    cr_assert_eq(p.g->tensor[p.g->input[i].tensor].region, RGI_R_INPUT);
    if (p.g->input[i].grad >= 0)
      cr_assert_eq(p.g->tensor[rgi_owner(p.g, p.g->input[i].grad)].region, RGI_R_OUTPUT);
  }
  cr_assert_gt(p.m->saved, 0);
  rgi_graph_destroy(p.g);
  rgi_graph_destroy(g);
}

/* ---- the checker must see what is wrong ---- */

static void rejected(planned p, const char *what) {
  rg_error e = {0};
  cr_assert_eq(rgi_memory_check(p.g, p.m, &e), RG_E_INTERNAL, "the checker misses: %s", what);
  cr_assert(e.message[0]);
}

Test(memplan, checker_objects) {
  rgi_graph *g = from_file("nsa_layer.json", 0);
  planned p = plan(g, (rgi_memory_options){0});
  rgi_memory good = *p.m;
  int overlaps = 0;
  for (int32_t i = 0; i < p.m->nblock; i++) {
    rgi_block *b = &p.m->block[i], was = *b;
    b->size++;
    rejected(p, "a size");
    *b = was;
    b->address += RGI_ALIGN / 2;
    rejected(p, "an address off its grid");
    *b = was;
    b->first--;
    rejected(p, "a lifetime");
    *b = was;
    if (was.tensor < 0) continue;
    rgi_tensor *x = &p.g->tensor[was.tensor], tensor = *x;
    x->region = RGI_R_INPUT;
    rejected(p, "a region");
    *x = tensor;
    for (int32_t j = 0; j < p.m->nblock; j++) { /* on top of one that lives at the same time */
      const rgi_block *other = &p.m->block[j];
      if (j == i || other->region != was.region || other->last < was.first ||
          was.last < other->first)
        continue;
      b->address = x->address = other->address;
      rejected(p, "an overlap");
      overlaps++;
    }
    *b = was;
    *x = tensor;
  }
  cr_assert_gt(overlaps, 10);
  p.m->scratch--;
  rejected(p, "the scratch size");
  *p.m = good;
  p.m->saved += RGI_ALIGN;
  rejected(p, "the saved size");
  *p.m = good;
  p.m->nblock--;
  rejected(p, "a missing block");
  *p.m = good;
  must(rgi_memory_check(p.g, p.m, &err), "restored");
  rgi_graph_destroy(p.g);
  rgi_graph_destroy(g);

  g = from_text(chain); /* a hand-over that the op does not allow */
  p = plan(g, (rgi_memory_options){0});
  rgi_block *b = (rgi_block *)block_of(p, "b");
  b->shares = -1;
  rejected(p, "bytes taken without saying so");
  rgi_graph_destroy(p.g);
  rgi_graph_destroy(g);
}

/* Each kind of fault is told by its own sentence. */
static void says(planned p, const char *what) {
  rg_error e = {0};
  cr_assert_eq(rgi_memory_check(p.g, p.m, &e), RG_E_INTERNAL,
               "the checker misses what is due as \"%s\"", what);
  cr_assert(strstr(e.message, what), "\"%s\" does not say \"%s\"", e.message, what);
}

/* Sets an integer, expects the complaint, puts it back. */
#define BREAK(place, value, what)                       \
  do {                                                  \
    __typeof__(place) was_ = (place);                   \
    (place) = (value);                                  \
    says(p, what);                                      \
    (place) = was_;                                     \
    must(rgi_memory_check(p.g, p.m, &err), "put back"); \
  } while (0)

Test(memplan, checker_says_what) {
  rgi_graph *g = from_file("nsa_layer.json", 0);
  planned p = plan(g, (rgi_memory_options){0});
  rgi_memory *m = p.m;
  rgi_block *b = (rgi_block *)block_of(p, "cmp_o"), *w = NULL;
  rgi_tensor *x = &p.g->tensor[b->tensor];
  int32_t view = 0, idle = 0;
  cr_assert_eq(b->region, RGI_R_SAVED);
  while (p.g->tensor[view].base < 0) view++;
  while (p.g->node[idle].op->workspace) idle++;
  for (int32_t i = 0; i < m->nblock; i++)
    if (m->block[i].tensor < 0) w = &m->block[i];
  cr_assert_not_null(w);

  BREAK(b->tensor, p.g->ntensor, "is not there");
  BREAK(b->tensor, -2, "is not there");
  BREAK(b->first, -1, "is not there");
  BREAK(b->last, p.g->nnode, "is not there");
  BREAK(b->last, b->first - 1, "is not there");
  BREAK(b->shares, m->nblock, "is not there");
  BREAK(b->tensor, view, "looks into another tensor and yet has a block");
  BREAK(b->region, RGI_R_OUTPUT, "has a block outside saved and scratch");
  BREAK(b->size, -1, "block of negative size");
  BREAK(b->address, -RGI_ALIGN, "out of range");
  BREAK(b->address, INT64_MAX / RGI_ALIGN * RGI_ALIGN, "out of range");
  BREAK(b->address, b->address + 128, "not aligned");
  BREAK(b->address, b->address + RGI_ALIGN, "cmp_o and its block disagree");
  BREAK(b->size, b->size - 4, "cmp_o has a block of another size");
  BREAK(b->first, b->first + 1, "cmp_o has a block with another lifetime");
  BREAK(b->last, b->last - 1, "cmp_o has a block with another lifetime");
  BREAK(x->region, RGI_R_SCRATCH, "cmp_o is in the wrong region, scratch; expected saved");
  BREAK(x->region, RGI_NOWHERE, "cmp_o is in the wrong region");
  BREAK(x->address, x->address + RGI_ALIGN, "cmp_o and its block disagree");
  BREAK(m->saved, m->saved + 1, "saved is said to have");
  BREAK(m->forward_scratch, m->forward_scratch - 1, "forward scratch is said to have");
  BREAK(m->backward_scratch, m->backward_scratch + RGI_ALIGN, "backward scratch is said to have");
  BREAK(m->scratch, m->forward_scratch, "scratch is said to have");
  BREAK(m->forward_bound, m->forward_scratch + 1, "the lower bound of forward");
  BREAK(m->backward_bound, m->backward_scratch + 1, "the lower bound of backward");
  BREAK(m->backward_bound, -1, "the lower bound of backward");
  BREAK(m->nblock, m->nblock - 1, "a workspace without a block, or with several");
  BREAK(m->workspace_size[w->first], -1, "a workspace of negative size");
  BREAK(m->workspace_size[w->first], w->size + 1, "a workspace and its block disagree");
  BREAK(m->workspace[w->first], w->address + RGI_ALIGN, "a workspace and its block disagree");
  BREAK(m->workspace_size[idle], 64, "a workspace for an op that asks for none");
  BREAK(m->workspace[idle], 0, "an address for a workspace of no bytes");
  BREAK(w->region, RGI_R_SAVED, "a workspace and its block disagree");
  BREAK(w->shares, 0, "a workspace and its block disagree");
  rgi_block twin = *w;
  BREAK(*w, *b, "cmp_o has a block too many");
  BREAK(*b, twin, "cmp_o has no block");

  /* both names and both ranges */
  rgi_block *other = (rgi_block *)block_of(p, "slc_o");
  rgi_tensor *y = &p.g->tensor[other->tensor];
  int64_t was = b->address;
  char range[128];
  b->address = x->address = other->address;
  says(p, "overlap while both are alive");
  says(p, "slc_o");
  says(p, "cmp_o");
  snprintf(range, sizeof range, " [%lld, %lld) of saved", (long long)y->address,
           (long long)(y->address + other->size));
  says(p, range);
  b->address = x->address = was;
  /* a saved value in scratch, consistently so */
  BREAK(b->region, RGI_R_SCRATCH, "cmp_o and its block disagree");
  rgi_graph_destroy(p.g);
  rgi_graph_destroy(g);
}

/* Bytes handed over where the op reads its input twice, or elsewhere than the input was. */
Test(memplan, checker_hand_over) {
  rgi_graph *g = from_text(
      "{\"regraph\":1,\"name\":\"square\",\"inputs\":{\"x\":{\"shape\":[\"T\",8],"
      "\"dtype\":\"f32\"}},\"nodes\":["
      "{\"name\":\"one\",\"op\":\"silu\",\"in\":{\"x\":\"x\"},\"out\":{\"y\":\"a\"}},"
      "{\"name\":\"square\",\"op\":\"mul\",\"in\":{\"a\":\"a\",\"b\":\"a\"},\"out\":{\"y\":\"b\"}},"
      "{\"name\":\"last\",\"op\":\"silu\",\"in\":{\"x\":\"b\"},\"out\":{\"y\":\"y\"}}],"
      "\"outputs\":{\"y\":\"y\"}}");
  planned p = plan(g, (rgi_memory_options){0});
  rgi_block *a = (rgi_block *)block_of(p, "a"), *b = (rgi_block *)block_of(p, "b");
  b->shares = (int32_t)(a - p.m->block);
  b->address = p.g->tensor[b->tensor].address = a->address = p.g->tensor[a->tensor].address = 0;
  p.m->scratch = p.m->forward_scratch = p.m->forward_bound = a->size;
  says(p, "overlap while both are alive");
  rgi_graph_destroy(p.g);
  rgi_graph_destroy(g);

  g = from_text(chain); /* there it is allowed, but only at the very same bytes */
  p = plan(g, (rgi_memory_options){0});
  a = (rgi_block *)block_of(p, "a"), b = (rgi_block *)block_of(p, "b");
  b->address = p.g->tensor[b->tensor].address += RGI_ALIGN;
  p.m->scratch = p.m->forward_scratch += RGI_ALIGN;
  says(p, "overlap while both are alive");
  rgi_graph_destroy(p.g);
  rgi_graph_destroy(g);
}

/* ---- reports ---- */

static int count(const char *text, const char *what) {
  int n = 0;
  for (const char *p = text; (p = strstr(p, what)); p += strlen(what)) n++;
  return n;
}

Test(memplan, reports) {
  for (int i = 0; i < RGI_COUNT(examples); i++) {
    rgi_graph *g = from_file(examples[i], 1);
    planned p = plan(g, (rgi_memory_options){0});
    rgi_buf buf;
    rg_text text;
    rgi_buf_init(&buf, ctx);
    rgi_memory_text(p.g, p.m, 100, &buf);
    must(rgi_buf_finish(&buf, &text, &err), "text");
    cr_assert_gt(count(text.data, "\n"), 20);
    cr_assert_not_null(strstr(text.data, "scratch "));
    rg_text_destroy(&text);

    rgi_buf_init(&buf, ctx);
    rgi_memory_svg(p.g, p.m, &buf);
    must(rgi_buf_finish(&buf, &text, &err), "svg");
    cr_assert_eq(count(text.data, "<g>"), count(text.data, "</g>"));
    cr_assert_eq(count(text.data, "<text"), count(text.data, "</text>"));
    cr_assert_eq(strncmp(text.data, "<svg ", 5), 0);
    cr_assert_eq(strcmp(text.data + text.size - 7, "</svg>\n"), 0);
    cr_assert_null(strstr(text.data, "nan"));
    for (int32_t k = 0; k < p.m->nblock; k++) /* every tensor is named */
      if (p.m->block[k].tensor >= 0)
        cr_assert_not_null(strstr(text.data, p.g->tensor[p.m->block[k].tensor].name));
    rg_text_destroy(&text);
    rgi_graph_destroy(p.g);
    rgi_graph_destroy(g);
  }
}

static rg_text timeline(planned p, int columns) {
  rgi_buf buf;
  rg_text text;
  rgi_buf_init(&buf, ctx);
  rgi_memory_text(p.g, p.m, columns, &buf);
  must(rgi_buf_finish(&buf, &text, &err), "text");
  return text;
}

/* Word for word; with RG_GOLDEN_UPDATE set the record is rewritten and the test still fails. */
Test(memplan, timeline) {
  rgi_graph *g = from_text(chain_with_gradients);
  planned p = plan(g, (rgi_memory_options){0});
  rg_text text = timeline(p, 60);
  static const char path[] = RG_SOURCE_DIR "/tests/golden/timeline/tiny.txt";
  char want[8192] = "";
  FILE *f = fopen(path, "rb");
  if (f) {
    want[fread(want, 1, sizeof want - 1, f)] = 0;
    fclose(f);
  }
  if (strcmp(want, text.data) != 0 && getenv("RG_GOLDEN_UPDATE")) {
    cr_assert(f = fopen(path, "wb"));
    fputs(text.data, f);
    fclose(f);
  }
  cr_assert_str_eq(text.data, want);
  rg_text_destroy(&text);
  rgi_graph_destroy(p.g);
  rgi_graph_destroy(g);
}

/* No line is wider than asked for, none ends in a space, and the curve has a dozen rows. */
Test(memplan, timeline_fits) {
  static const int columns[] = {48, 60, 79, 100, 133, 200};
  for (int i = 0; i < RGI_COUNT(examples); i++)
    for (int k = 0; k < RGI_COUNT(columns); k++) {
      rgi_graph *g = from_file(examples[i], k % 2);
      planned p = plan(g, (rgi_memory_options){0});
      rg_text text = timeline(p, columns[k]);
      int line = 0, rows = 0;
      for (char *at = text.data, *end; (end = strchr(at, '\n')); at = end + 1, line++) {
        *end = 0;
        int wide = 0;
        for (const char *c = at; *c; c++) wide += ((unsigned char)*c & 0xC0) != 0x80;
        if (line >= 3 && strstr(at, "optimal") == NULL)
          cr_assert_leq(wide, columns[k], "%s at %d columns: %s", examples[i], columns[k], at);
        cr_assert(end == at || end[-1] != ' ', "%s: a line ends in a space: %s", examples[i], at);
        rows += strstr(at, "┤") || (strstr(at, "│") && at[0] == ' ');
      }
      cr_assert_eq(rows, 12, "%s: %d rows", examples[i], rows);
      rg_text_destroy(&text);
      rgi_graph_destroy(p.g);
      rgi_graph_destroy(g);
    }
}

/* A plan without a byte of its own. */
Test(memplan, reports_of_nothing) {
  rgi_graph *g = from_text(
      "{\"regraph\":1,\"name\":\"bare\",\"inputs\":{\"x\":{\"shape\":[\"T\",8],\"dtype\":\"f32\"}},"
      "\"nodes\":[{\"name\":\"one\",\"op\":\"silu\",\"in\":{\"x\":\"x\"},\"out\":{\"y\":\"y\"}}],"
      "\"outputs\":{\"y\":\"y\"}}");
  planned p = plan(g, (rgi_memory_options){0});
  rg_text text = timeline(p, 80);
  cr_assert_str_eq(text.data, "saved 0 B, scratch 0 B (0 B without reuse; in place spared 0 B)\n");
  rg_text_destroy(&text);
  rgi_buf buf;
  rgi_buf_init(&buf, ctx);
  rgi_memory_svg(p.g, p.m, &buf);
  must(rgi_buf_finish(&buf, &text, &err), "svg");
  cr_assert(strstr(text.data, "</svg>\n"));
  cr_assert_null(strstr(text.data, "nan"));
  cr_assert_null(strstr(text.data, "inf"));
  rg_text_destroy(&text);
  rgi_graph_destroy(p.g);
  rgi_graph_destroy(g);
}
