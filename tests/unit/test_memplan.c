/* tests/unit/test_memplan.c: memory plans of the examples and of small graphs made for one question each,
 * judged by the independent checker, and the checker judged by plans broken on purpose. */
#include "graph/passes.h"
#include "memplan/memplan.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static rg_context *ctx;
static rg_error err;

static void open_context(void) {
  cr_assert_eq(rg_context_create(NULL, &ctx, NULL), RG_OK);
}
static void close_context(void) {
  rg_context_destroy(ctx);
}
TestSuite(memplan, .init = open_context, .fini = close_context);

static void must(rg_status status, const char *what) {
  char line[1200];
  rg_error_format(&err, line, sizeof line);
  cr_assert_eq(status, RG_OK, "%s: %s", what, line);
}

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

static rgi_graph *from_text(const char *text) {
  rg_spec *spec;
  memset(&err, 0, sizeof err);
  must(rg_spec_load_text(ctx, text, strlen(text), "test", NULL, 0, &spec, &err), "load");
  return elaborate(spec, 64, 1, 0);
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
    "{\"regraph\":1,\"name\":\"chain\",\"inputs\":{\"x\":{\"shape\":[\"T\",8],\"dtype\":\"f32\"}},\"nodes\":["
    "{\"name\":\"one\",\"op\":\"silu\",\"in\":{\"x\":\"x\"},\"out\":{\"y\":\"a\"}},"
    "{\"name\":\"two\",\"op\":\"silu\",\"in\":{\"x\":\"a\"},\"out\":{\"y\":\"b\"}},"
    "{\"name\":\"three\",\"op\":\"silu\",\"in\":{\"x\":\"b\"},\"out\":{\"y\":\"y\"}}],\"outputs\":{\"y\":"
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
  rgi_graph *g =
      from_text("{\"regraph\":1,\"name\":\"fork\",\"inputs\":{\"x\":{\"shape\":[\"T\",8],\"dtype\":\"f32\"}},"
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
      if (j == i || other->region != was.region || other->last < was.first || was.last < other->first)
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
