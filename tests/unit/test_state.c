/* tests/unit/test_state.c: state in a graph, with page_copy as the op that writes it: what is
 * refused, in which order nodes come, what a session does with it. */
#include "graph/spec.h"
#include "run_util.h"

#include <math.h>
#include <stdint.h>

/* Two caches of P pages of four rows of three, another layout of the first, and a reader of the
 * version before the copy that stands behind it in the file. */
static const char plain[] =
    "{\"regraph\": 1, \"inputs\": {\"pages\": {\"shape\": [\"N\", 2], \"dtype\": \"i32\"}},\n"
    " \"state\": {\n"
    "  \"a\": {\"shape\": [\"P\", 4, 3], \"dtype\": \"f32\", \"next\": \"a1\"},\n"
    "  \"b\": {\"shape\": [\"P\", 2, 5], \"dtype\": \"bf16\", \"next\": \"b2\"}},\n"
    " \"nodes\": [\n"
    "  {\"name\": \"once\", \"op\": \"page_copy\", \"in\": {\"cache\": [\"a\", \"b\"], \"pages\": "
    "\"pages\"},\n"
    "   \"out\": {\"cache\": [\"a1\", \"b1\"]}},\n"
    "  {\"name\": \"again\", \"op\": \"page_copy\", \"in\": {\"cache\": [\"b1\"], \"pages\": "
    "\"pages\"},\n"
    "   \"out\": {\"cache\": [\"b2\"]}},\n"
    "  {\"name\": \"seen\", \"op\": \"transpose\", \"in\": {\"x\": \"a\"}, \"out\": {\"y\": "
    "\"old_view\"},\n"
    "   \"attrs\": {\"perm\": [1, 0, 2]}},\n"
    "  {\"name\": \"before\", \"op\": \"silu\", \"in\": {\"x\": \"old_view\"}, \"out\": {\"y\": "
    "\"was\"}},\n"
    "  {\"name\": \"after\", \"op\": \"silu\", \"in\": {\"x\": \"a1\"}, \"out\": {\"y\": "
    "\"is\"}}],\n"
    " \"outputs\": {\"was\": \"was\", \"is\": \"is\", \"a_now\": \"a1\"}}";

enum { P = 6, N = 3 };
static rg_context *ctx;

static void setup(void) {
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
}
static void teardown(void) {
  rg_context_destroy(ctx);
}
TestSuite(state, .init = setup, .fini = teardown);

/* `plain` with its first `from` replaced by `to`. */
static char *with(const char *from, const char *to) {
  const char *at = strstr(plain, from);
  cr_assert(at, "no %s", from);
  char *text = malloc(sizeof plain + strlen(to));
  sprintf(text, "%.*s%s%s", (int)(at - plain), plain, to, at + strlen(from));
  return text;
}

static void refused(const char *from, const char *to, rg_status code, const char *pointer,
                    const char *part) {
  rg_error e = {0};
  rg_spec *spec = NULL;
  char *text = with(from, to);
  rg_status got = rg_spec_load_text(ctx, text, strlen(text), "s", NULL, 0, &spec, &e);
  cr_assert_eq(got, code, "%s for %s: %s", rg_status_name(got), to, e.message);
  cr_assert_str_eq(e.pointer, pointer);
  cr_assert(strstr(e.message, part), "\"%s\" does not mention \"%s\"", e.message, part);
  /* all errors at once find it, too */
  rg_error some[20];
  size_t n = 0;
  cr_assert_neq(rg_spec_load_text_all(ctx, text, strlen(text), "s", NULL, 0, &spec, some, 20, &n),
                RG_OK);
  bool found = false;
  for (size_t i = 0; i < n; i++)
    found = found || (some[i].status == code && strcmp(some[i].pointer, pointer) == 0);
  cr_assert(found, "not among %zu errors: %s", n, to);
  free(text);
}

Test(state, what_makes_no_sense_is_refused) {
  refused("\"next\": \"a1\"", "\"next\": \"a\"", RG_E_NAME, "/state/a/next", "'a1' is");
  refused("\"next\": \"a1\"", "\"next\": \"is\"", RG_E_NAME, "/state/a/next", "last version");
  refused("\"next\": \"b2\"", "\"next\": \"b1\"", RG_E_NAME, "/state/b/next", "'b2' is");
  refused("\"next\": \"a1\"", "\"next\": \"nowhere\"", RG_E_NAME, "/state/a/next", "nowhere");
  refused(", \"next\": \"a1\"", "", RG_E_KEY, "/state/a", "next");
  refused("\"next\": \"a1\"", "\"next\": \"a1\", \"grad\": true", RG_E_KEY, "/state/a/grad",
          "grad");
  refused("\"dtype\": \"i32\"}", "\"dtype\": \"i32\", \"next\": \"a1\"}", RG_E_KEY,
          "/inputs/pages/next", "next");
  refused("\"pages\": {\"shape\"",
          "\"w\": {\"shape\": [3], \"dtype\": \"f32\", \"grad\": true}, \"pages\": {\"shape\"",
          RG_E_VALUE, "/inputs/w/grad", "state");
  refused("\"b\": {\"shape\"", "\"pages\": {\"shape\"", RG_E_NAME, "/state/pages", "already");
  refused("[\"b1\"], \"pages\"", "[\"b\"], \"pages\"", RG_E_NAME, "/nodes/1/in/cache",
          "written by 'once'");
  refused("[\"a\", \"b\"], \"pages\"", "[\"was\", \"b\"], \"pages\"", RG_E_NAME,
          "/nodes/0/in/cache", "no state");
  refused("[\"a1\", \"b1\"]", "[\"a1\", \"b1\", \"c1\"]", RG_E_KEY, "/nodes/0/in/cache", "as many");
  refused("\"a_now\": \"a1\"", "\"a_now\": \"a\"", RG_E_VALUE, "/outputs/a_now",
          "overwritten by 'once'");
  refused("\"a_now\": \"a1\"", "\"a_now\": \"old_view\"", RG_E_VALUE, "/outputs/a_now", "last");
  refused("\"x\": \"a1\"}, \"out\": {\"y\": \"is\"}}]",
          "\"x\": \"a1\"}, \"out\": {\"y\": \"is\"}},\n"
          " {\"name\": \"both\", \"op\": \"add\", \"in\": {\"a\": [\"a\", \"is\"]}}]",
          RG_E_CYCLE, "/nodes/0", "wait for each other");
}

Test(state, a_part_is_not_written) {
  refused(
      "{\"name\": \"once\", \"op\": \"page_copy\", \"in\": {\"cache\": [\"a\", \"b\"]",
      "{\"name\": \"cut\", \"op\": \"slice\", \"in\": {\"x\": \"a\"}, \"out\": {\"y\": \"part\"},"
      " \"attrs\": {\"axis\": 1, \"start\": 0, \"stop\": 2}},\n"
      "{\"name\": \"once\", \"op\": \"page_copy\", \"in\": {\"cache\": [\"part\", \"b\"]",
      RG_E_VALUE, "/nodes/1/in/cache", "as a whole");
}

Test(state, readers_of_the_old_version_come_first) {
  rg_spec *spec = load_spec(ctx, plain);
  const rgi_graph *g = spec->graph;
  int at[5] = {0};
  static const char *const name[] = {"once", "again", "seen", "before", "after"};
  for (int n = 0; n < g->nnode; n++)
    for (int k = 0; k < 5; k++)
      if (strcmp(g->node[n].name, name[k]) == 0) at[k] = n;
  cr_assert_lt(at[3], at[0]);
  cr_assert_lt(at[0], at[4]);
  cr_assert_lt(at[0], at[1]);
  const rgi_io *a = rgi_state_of(g, -1);
  cr_assert_str_eq(a->name, "a");
  cr_assert_eq(rgi_owner(g, a->next), a->tensor);
  cr_assert_eq(g->tensor[a->next].rank, 3);
  rg_spec_destroy(spec);
}

/* Each way to break I10, on a graph that holds it. */
Test(state, the_verifier_sees_what_breaks_it) {
  rg_error e = {0};
  rg_spec *spec = load_spec(ctx, plain);
  for (int way = 0; way < 5; way++) {
    rgi_graph *g;
    CR_OK(rgi_graph_clone(spec->graph, &g, &e), &e);
    cr_assert_eq(rgi_verify(g, "test", &e), RG_OK, "%s", e.message);
    int once = -1, after = -1;
    for (int n = 0; n < g->nnode; n++) {
      if (strcmp(g->node[n].name, "once") == 0) once = n;
      if (strcmp(g->node[n].name, "after") == 0) after = n;
    }
    switch (way) {
    case 0: g->input[1].next = g->input[1].tensor; break;
    case 1: g->input[1].state = false; break;
    case 2: g->node[after].in[0] = g->input[1].tensor; break; /* reads what was overwritten */
    case 3: g->input[2].next = g->node[once].out[1]; break;   /* not the last */
    case 4: g->tensor[g->node[once].out[0]].base = g->input[2].tensor; break;
    }
    cr_assert_eq(rgi_verify(g, "test", &e), RG_E_INTERNAL, "way %d", way);
    static const char *const says[] = {"I10", "I6", "I10", "I10", "I5"};
    cr_assert(strstr(e.message, says[way]), "way %d: %s", way, e.message);
    e = (rg_error){0};
    rgi_graph_destroy(g);
  }
  rg_spec_destroy(spec);
}

/* ---- sessions ---- */

static rg_plan *plan_of(const rg_spec *spec, int threads) {
  rg_error e = {0};
  rg_plan *plan = NULL;
  const rg_binding set[] = {{"P", P, NULL}, {"N", N, NULL}};
  rg_plan_options o = {.set = set, .nset = 2, .threads = threads};
  CR_OK(rg_plan_create(spec, NULL, &o, &plan, &e), &e);
  return plan;
}

typedef struct world {
  rg_spec *spec;
  rg_plan *plan;
  rg_session *session;
  buffers io;
  float *a, *is, *was, *now;
  uint16_t *b;
  int32_t *pages;
} world;

static world open_world(bool poison) {
  rg_error e = {0};
  world w = {.spec = load_spec(ctx, plain)};
  w.plan = plan_of(w.spec, 2);
  rg_session_options o = {.debug_poison = poison};
  CR_OK(rg_session_create(w.plan, &o, &w.session, &e), &e);
  make_buffers(w.plan, 1, 0, NULL, &w.io);
  w.a = buffer(&w.io, RG_STATE, "a");
  w.b = buffer(&w.io, RG_STATE, "b");
  w.is = buffer(&w.io, RG_OUTPUT, "is");
  w.was = buffer(&w.io, RG_OUTPUT, "was");
  w.now = buffer(&w.io, RG_OUTPUT, "a_now");
  w.pages = buffer(&w.io, RG_INPUT, "pages");
  for (int i = 0; i < P * 12; i++) w.a[i] = (float)i;
  for (int i = 0; i < P * 10; i++) w.b[i] = (uint16_t)(1000 + i);
  bind_all(w.session, &w.io);
  return w;
}

static void close_world(world *w) {
  free_buffers(&w->io);
  rg_session_destroy(w->session);
  rg_plan_destroy(w->plan);
  rg_spec_destroy(w->spec);
}

static void set_pages(world *w, const int32_t (*pages)[2]) {
  memcpy(w->pages, pages, N * sizeof *pages);
}

Test(state, lives_from_run_to_run) {
  rg_error e = {0};
  world w = open_world(true);
  set_pages(&w, (const int32_t[N][2]){{0, 2}, {-1, -1}, {5, 1}});
  CR_OK(rg_session_forward(w.session, &e), &e);
  for (int page = 0; page < P; page++) {
    const int from = page == 2 ? 0 : page == 1 ? 5 : page;
    for (int i = 0; i < 12; i++) {
      cr_assert_eq(w.a[page * 12 + i], (float)(from * 12 + i));
      cr_assert_eq(w.now[page * 12 + i], (float)(from * 12 + i));
      const float x = (float)(page * 12 + i); /* old_view, [4, P, 3] */
      cr_assert_float_eq(w.was[(i / 3 * P + page) * 3 + i % 3], x / (1 + expf(-x)), 1e-4f * x);
    }
    for (int i = 0; i < 10; i++) cr_assert_eq(w.b[page * 10 + i], 1000 + from * 10 + i);
  }
  set_pages(&w, (const int32_t[N][2]){{2, 3}, {1, 4}, {-1, -1}});
  CR_OK(rg_session_forward(w.session, &e), &e);
  cr_assert_eq(w.a[3 * 12 + 1], 1);
  cr_assert_eq(w.a[4 * 12], 60);
  cr_assert_eq(w.b[4 * 10 + 9], 1059);
  close_world(&w);
}

Test(state, a_wrong_list_copies_nothing) {
  static const struct {
    int32_t pages[N][2];
    const char *part;
  } bad[] = {
      {{{0, 2}, {0, P}, {-1, -1}}, "pages[1][1] is 6"},
      {{{0, 2}, {-1, 3}, {-1, -1}}, "pages[1][0] is -1"},
      {{{0, 2}, {-2, -2}, {-1, -1}}, "pages[1][0] is -2"},
      {{{0, 2}, {INT32_MAX, 1}, {-1, -1}}, "2147483647"},
      {{{0, 2}, {1, 2}, {-1, -1}}, "writes, too"},
      {{{0, 2}, {2, 3}, {-1, -1}}, "reads"},
  };
  world w = open_world(false);
  float a[P * 12];
  memcpy(a, w.a, sizeof a);
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    set_pages(&w, bad[i].pages);
    FAILS(rg_session_forward(w.session, &e), RG_E_DATA, bad[i].part);
    cr_assert_eq(memcmp(a, w.a, sizeof a), 0);
  }
  close_world(&w);
}

Test(state, is_a_role_of_its_own) {
  rg_error e = {0};
  world w = open_world(false);
  rg_tensor_info t;
  CR_OK(rg_spec_tensor(w.spec, 1, &t), &e);
  cr_assert_eq(t.role, RG_STATE);
  cr_assert_str_eq(t.name, "a");
  FAILS(rg_session_bind(w.session, RG_INPUT, "a", w.a, sizeof(float) * P * 12, &e), RG_E_USAGE,
        "no input \"a\"");
  CR_OK(rg_session_bind(w.session, RG_STATE, "a", NULL, 0, &e), &e);
  FAILS(rg_session_forward(w.session, &e), RG_E_USAGE, "the state \"a\" is not bound");
  /* what is written shares its bytes with nothing */
  CR_OK(rg_session_bind(w.session, RG_STATE, "a", w.now, sizeof(float) * P * 12, &e), &e);
  FAILS(rg_session_forward(w.session, &e), RG_E_USAGE, "the state \"a\"");
  close_world(&w);
}

Test(state, head_groups_and_ranks_are_refused) {
  rg_spec *spec = load_spec(ctx, plain);
  rg_policy *policy = load_policy(ctx, "{\"regraph_policy\": 1, \"split_heads\": 1}");
  const rg_binding set[] = {{"P", P, NULL}, {"N", N, NULL}};
  rg_plan_options o = {.set = set, .nset = 2};
  rg_plan *plan = NULL;
  FAILS(rg_plan_create(spec, policy, &o, &plan, &e), RG_E_POLICY, "state ('a')");
  o.cp = 2;
  FAILS(rg_plan_create(spec, NULL, &o, &plan, &e), RG_E_POLICY, "state");
  rg_policy_destroy(policy);
  rg_spec_destroy(spec);
}

/* A layer's cache is declared in the block. */
Test(state, in_repeated_blocks) {
  static const char text[] =
      "{\"regraph\": 1, \"inputs\": {\"pages\": {\"shape\": [\"N\", 2], \"dtype\": \"i32\"}},\n"
      " \"nodes\": [{\"repeat\": 2, \"name\": \"layer\",\n"
      "  \"state\": {\"k\": {\"shape\": [\"P\", 4], \"dtype\": \"f16\", \"next\": \"k1\"}},\n"
      "  \"nodes\": [{\"name\": \"copy\", \"op\": \"page_copy\", \"in\": {\"cache\": [\"k\"], "
      "\"pages\": \"pages\"},\n"
      "    \"out\": {\"cache\": [\"k1\"]}}], \"out\": {\"last\": \"k1\"}}],\n"
      " \"outputs\": {\"last\": \"last\"}}";
  rg_error e = {0};
  rg_tensor_info t;
  rg_spec *spec = load_spec(ctx, text);
  CR_OK(rg_spec_tensor(spec, 2, &t), &e);
  cr_assert_str_eq(t.name, "layer1_k");
  cr_assert_eq(t.role, RG_STATE);
  cr_assert_eq(spec->graph->nnode, 3); /* both are kept, though only one has an output */
  rg_spec_destroy(spec);
}

Test(state, by_calls) {
  rg_error e = {0};
  rg_builder *b;
  rg_spec *spec;
  rg_text said;
  CR_OK(rg_builder_create(ctx, "built", &b, &e), &e);
  rg_build_input(b, "pages", "N,2", "i32", RG_GRAD_NONE);
  rg_build_state(b, "k", "P,4", "f16", "k1");
  rg_build_node(b, "copy", "page_copy", "cache=k pages", "cache=k1", NULL, 0);
  rg_build_output(b, "now", "k1");
  CR_OK(rg_build_spec(b, NULL, 0, &spec, &e), &e);
  CR_OK(rg_spec_write(spec, "text", &said, &e), &e);
  cr_assert(strstr(said.data, "state  k: f16[P, 4] next k1") || strstr(said.data, "next k1"), "%s",
            said.data);
  rg_text_destroy(&said);
  rg_spec_destroy(spec);
  rg_builder_destroy(b);
}
