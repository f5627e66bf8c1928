/* tests/unit/test_memplan_sim.c: memory plans played through.

   The arena is painted: whoever writes leaves his mark on his bytes, whoever reads must find the
   mark of the value he wants. That judges a plan by what happens, without any notion of lifetimes,
   and so without anything in common with the planner or its checker. Played on the examples and on
   many random graphs, with nothing, everything and something recomputed, with and without reuse. At
   the end the same is done for real: in-place reuse changes no bit.
 */
#include "graph/spec.h"
#include "passes/passes.h"
#include "recompute/search.h"
#include "../harness/random_spec.h"
#include "../harness/round.h"
#include "run_util.h"

static rg_context *ctx;

static void open_context(void) {
  cr_assert_eq(rg_context_create(NULL, &ctx, NULL), RG_OK);
}
static void close_context(void) {
  rg_context_destroy(ctx);
}
TestSuite(memplan_sim, .init = open_context, .fini = close_context);

/* ---- the painted arena ---- */

enum { BLANK = -1 }; /* otherwise an owner's id, or -2 - node: a workspace */

typedef struct arena {
  const rgi_graph *g;
  const rgi_memory *m;
  int32_t *saved, *scratch; /* one mark for RGI_ALIGN bytes */
  bool *written;            /* per owner */
} arena;

static int64_t units(int64_t bytes) {
  return (bytes + RGI_ALIGN - 1) / RGI_ALIGN;
}

static int32_t *marks(const arena *a, rgi_region region, int64_t address, int64_t size) {
  int32_t *from = region == RGI_R_SAVED ? a->saved : region == RGI_R_SCRATCH ? a->scratch : NULL;
  if (!from) return NULL; /* the caller's memory */
  int64_t end = region == RGI_R_SAVED ? a->m->saved : a->m->scratch;
  cr_assert(address >= 0 && address % RGI_ALIGN == 0 && address + size <= end,
            "[%lld, %lld) outside the arena", (long long)address, (long long)(address + size));
  return from + address / RGI_ALIGN;
}

static void paint_tensor(const arena *a, int32_t owner) {
  const rgi_tensor *x = &a->g->tensor[owner];
  int64_t size = rgi_bytes(x);
  int32_t *mark = marks(a, x->region, x->address, size);
  if (mark)
    for (int64_t i = 0; i < units(size); i++) mark[i] = owner;
  a->written[owner] = true;
}

static void expect_tensor(const arena *a, int32_t owner, int32_t node, const char *when) {
  const rgi_tensor *x = &a->g->tensor[owner];
  int64_t size = rgi_bytes(x);
  const int32_t *mark = marks(a, x->region, x->address, size);
  if (!mark) return;
  cr_assert(a->written[owner], "%s: %s reads %s, which nobody wrote", a->g->name,
            a->g->node[node].name, x->name);
  for (int64_t i = 0; i < units(size); i++)
    cr_assert_eq(mark[i], owner, "%s: %s (%s) finds %s overwritten by %s", a->g->name,
                 a->g->node[node].name, when, x->name,
                 mark[i] == BLANK  ? "the turn"
                 : mark[i] < BLANK ? "a workspace"
                                   : a->g->tensor[mark[i]].name);
}

static void paint_workspace(const arena *a, int32_t k) {
  if (a->m->workspace_size[k] == 0) return;
  int32_t *mark = marks(a, RGI_R_SCRATCH, a->m->workspace[k], a->m->workspace_size[k]);
  for (int64_t i = 0; i < units(a->m->workspace_size[k]); i++) mark[i] = -2 - k;
}

static void expect_workspace(const arena *a, int32_t k) {
  if (a->m->workspace_size[k] == 0) return;
  const int32_t *mark = marks(a, RGI_R_SCRATCH, a->m->workspace[k], a->m->workspace_size[k]);
  for (int64_t i = 0; i < units(a->m->workspace_size[k]); i++)
    cr_assert_eq(mark[i], -2 - k, "%s: the workspace of %s is shared", a->g->name,
                 a->g->node[k].name);
}

/* Returns 1 if the node wrote its output over its input. */
static int play_node(const arena *a, int32_t k) {
  const rgi_graph *g = a->g;
  const rgi_node *n = &g->node[k];
  int in_place = 0;
  paint_workspace(a, k);
  for (int i = 0; i < rgi_nin(n); i++)
    if (n->in[i] >= 0) expect_tensor(a, rgi_owner(g, n->in[i]), k, "before");
  for (int i = 0; i < rgi_nout(n); i++) {
    if (n->out[i] < 0) continue;
    int32_t owner = rgi_owner(g, n->out[i]);
    if (a->written[owner]) expect_tensor(a, owner, k, "adding to it");
    paint_tensor(a, owner);
  }
  /* Outputs are written while inputs are still read, except where the op says it may do both in
   * place. */
  for (int i = 0; i < rgi_nin(n); i++) {
    if (n->in[i] < 0) continue;
    int32_t owner = rgi_owner(g, n->in[i]);
    const rgi_tensor *x = &g->tensor[owner],
                     *y = rgi_nout(n) && n->out[0] >= 0 ? &g->tensor[n->out[0]] : NULL;
    if (i == 0 && n->op->flags & RG_OP_INPLACE && y && y->base < 0 && y->region == RGI_R_SCRATCH &&
        x->region == RGI_R_SCRATCH && y->address == x->address) {
      cr_assert_eq(rgi_bytes(y), rgi_bytes(&g->tensor[n->in[0]]));
      cr_assert_eq(y->dtype, x->dtype);
      in_place = 1;
      continue;
    }
    expect_tensor(a, owner, k, "after");
  }
  for (int i = 0; i < rgi_nout(n); i++)
    if (n->out[i] >= 0) expect_tensor(a, rgi_owner(g, n->out[i]), k, "its own result");
  expect_workspace(a, k);
  return in_place;
}

/* Returns how many nodes worked in place. */
static int play(const rgi_graph *g, const rgi_memory *m) {
  arena a = {g, m, malloc(4 * ((size_t)units(m->saved) + 1)),
             malloc(4 * ((size_t)units(m->scratch) + 1)), calloc((size_t)g->ntensor, sizeof(bool))};
  int in_place = 0;
  for (int64_t i = 0; i < units(m->saved); i++) a.saved[i] = BLANK;
  for (int32_t k = 0; k < g->nnode; k++) {
    if (k == 0 ||
        /* nothing outlives the turn in scratch */
        (g->node[k].backward && !g->node[k - 1].backward))
      for (int64_t i = 0; i < units(m->scratch); i++) a.scratch[i] = BLANK;
    if (!(g->node[k].op->flags & RG_OP_VIEW)) in_place += play_node(&a, k);
  }
  free(a.saved);
  free(a.scratch);
  free(a.written);
  return in_place;
}

/* ---- one graph under every option ---- */

static void must(rg_status status, const rg_error *e, const char *what) {
  cr_assert_eq(status, RG_OK, "%s: %s", what, e->message);
}

/* The most scratch bytes that owners and workspaces of a direction have at once, owner by owner and
 * node by node. With in-place reuse less may do: then the two sides of a hand-over count once. */
static int64_t alive_at_once(const rgi_graph *g, const rgi_memory *m, bool backward) {
  int64_t most = 0;
  for (int32_t k = 0; k < g->nnode; k++) {
    int64_t sum = m->workspace_size[k];
    if (g->node[k].backward != backward) continue;
    for (int32_t i = 0; i < m->nblock; i++) {
      const rgi_block *b = &m->block[i];
      bool heir = b->shares >= 0 && b->first == k;
      if (b->tensor >= 0 && b->region == RGI_R_SCRATCH && b->first <= k && k <= b->last && !heir)
        sum += b->size;
    }
    if (sum > most) most = sum;
  }
  return most;
}

typedef struct sizes {
  int64_t saved, scratch, no_reuse;
  int in_place;
} sizes;

static sizes judge(const rgi_graph *g, rgi_memory_options o) {
  rg_error e = {0};
  rgi_graph *planned;
  rgi_memory *m;
  o.threads = 2;
  o.seconds = 0.2;
  must(rgi_memplan(g, &o, &planned, &m, &e), &e, "plan");
  must(rgi_verify(planned, "memplan", &e), &e, "verify");
  must(rgi_memory_check(planned, m, &e), &e, "check");
  sizes s = {m->saved, m->scratch, m->no_reuse, play(planned, m)};
  cr_assert_geq(m->forward_scratch, alive_at_once(planned, m, false));
  cr_assert_geq(m->backward_scratch, alive_at_once(planned, m, true));
  cr_assert_geq(m->forward_bound, alive_at_once(planned, m, false));
  cr_assert_geq(m->backward_bound, alive_at_once(planned, m, true));
  cr_assert_geq(m->no_reuse, m->scratch);
  cr_assert_eq(m->inplace_gain > 0, s.in_place > 0);
  rgi_graph_destroy(planned);
  return s;
}

/* Returns how many nodes worked in place. */
static int judge_all(const rgi_graph *g) {
  sizes packed = judge(g, (rgi_memory_options){0}),
        apart = judge(g, (rgi_memory_options){.no_reuse = true}),
        copied = judge(g, (rgi_memory_options){.no_inplace = true});
  cr_assert_eq(apart.scratch, apart.no_reuse);
  cr_assert_eq(apart.in_place, 0);
  cr_assert_eq(copied.in_place, 0);
  cr_assert_leq(copied.scratch, apart.scratch);
  cr_assert_leq(packed.scratch, apart.scratch);
  cr_assert(packed.saved == apart.saved && packed.saved == copied.saved);
  return packed.in_place;
}

/* Recomputing nothing, all and `some`. Returns how many nodes worked in place. */
static int judge_spec(rg_spec *spec, int64_t tokens, size_t nset, int heads, uint64_t some) {
  rg_error e = {0};
  rg_binding set[] = {{"T", tokens, NULL}, {"B", 1, NULL}};
  rgi_graph *whole, *cut, *g;
  rgi_profile *profile;
  int in_place = 0;
  must(rgi_profile_load(ctx, NULL, "cpu", &profile, &e), &e, "profile");
  must(rgi_spec_elaborate(spec, set, nset, true, &whole, &e), &e, "elaborate");
  in_place += judge_all(whole); /* forward alone */
  must(rgi_split_heads(whole, heads, &cut, &e), &e, "split");
  must(rgi_autodiff(cut, &g, &e), &e, "autodiff");
  for (int which = 0; which < 3; which++) {
    bool chosen[64] = {0};
    rgi_graph *rewritten;
    double ms;
    cr_assert_leq(g->norigin, 64);
    for (int i = 0; i < g->norigin; i++)
      chosen[i] = rgi_recomputable(&g->origin[i]) && (which == 1 || (which == 2 && some >> i & 1));
    must(rgi_rewrite(g, chosen, profile, &rewritten, &ms, &e), &e, "rewrite");
    in_place += judge_all(rewritten);
    rgi_graph_destroy(rewritten);
  }
  rgi_graph_destroy(g);
  rgi_graph_destroy(cut);
  rgi_graph_destroy(whole);
  rgi_profile_destroy(profile);
  return in_place;
}

static void judge_file(const char *name, int most_heads) {
  static const rg_binding set[] = {
      {"H", 4, NULL}, {"KH", 2, NULL}, {"D", 16, NULL}, {"DV", 16, NULL}};
  static const rg_binding moba[] = {{"H", 4, NULL}, {"D", 16, NULL}};
  bool same_heads = strcmp(name, "moba.json") == 0;
  char path[512];
  rg_spec *spec;
  rg_error e = {0};
  snprintf(path, sizeof path, "%s/examples/%s", RG_SOURCE_DIR, name);
  must(rg_spec_load_file(ctx, path, same_heads ? moba : set, same_heads ? 2 : 4, &spec, &e), &e,
       name);
  for (int heads = 0; heads <= most_heads; heads++) judge_spec(spec, 250, 2, heads, 0x15);
  rg_spec_destroy(spec);
}

Test(memplan_sim, nsa) {
  judge_file("nsa.json", 2);
}
Test(memplan_sim, nsa_linear) {
  judge_file("nsa_linear.json", 2);
}
Test(memplan_sim, nsa_layer) {
  judge_file("nsa_layer.json", 2);
}
Test(memplan_sim, moba) {
  judge_file("moba.json", 1);
}
Test(memplan_sim, others) {
  judge_file("dense_causal.json", 1);
  judge_file("sliding_window.json", 1);
  judge_file("two_branch.json", 1);
}

Test(memplan_sim, random_graphs) {
  int in_place = 0;
  for (int seed = 0; seed < 60; seed++) {
    uint64_t state = round_seed((uint64_t)seed, 60) * 31 + 5;
    rg_spec *spec;
    rg_error e = {0};
    must(rgi_random_spec(ctx, &state, 2 + seed % 17, &spec, &e), &e, "load");
    /* odd numbers of tokens give sizes that are no multiple of the alignment */
    in_place += judge_spec(spec, seed % 3 == 0 ? 1 : seed % 3 == 1 ? 37 : 64, 1, 0, state >> 20);
    rg_spec_destroy(spec);
  }
  cr_assert_gt(in_place, round_seed(0, 1) == 0 ? 100 : 0, "in-place reuse happened %d times only",
               in_place);
}

/* ---- for real: in place or not, the same bits ---- */

/* The names in `out` are the plan's, which is returned. */
static rg_plan *run(const rg_spec *spec, const rg_policy *policy, rg_plan_options o, int64_t T,
                    buffers *out) {
  rg_error e = {0};
  rg_plan *plan;
  rg_session *s;
  rg_session_options so = {.debug_poison = true};
  rg_binding set[] = {{"T", T, NULL}};
  o.set = set;
  o.nset = 1;
  o.threads = 2;
  o.pack_seconds = 0.2;
  CR_OK(rg_plan_create(spec, policy, &o, &plan, &e), &e);
  CR_OK(rg_session_create(plan, &so, &s, &e), &e);
  make_buffers(plan, 7, T, NULL, out);
  bind_all(s, out);
  run_both(s);
  rg_sizes sizes;
  int64_t saved, scratch;
  CR_OK(rg_plan_sizes(plan, &sizes), &e);
  CR_OK(rg_session_touched(s, &saved, &scratch), &e);
  cr_assert_eq(saved, sizes.saved);
  cr_assert_eq(scratch, sizes.scratch);
  rg_session_destroy(s);
  return plan;
}

Test(memplan_sim, in_place_changes_no_bit) {
  rg_policy *all = load_policy(ctx, "{\"regraph_policy\":1,\"preset\":\"all\"}");
  for (int seed = 0; seed < 12; seed++) {
    uint64_t state = round_seed((uint64_t)seed + 1000, 12);
    buffers want, got;
    rg_spec *spec;
    rg_error e = {0};
    must(rgi_random_spec(ctx, &state, 3 + seed, &spec, &e), &e, "load");
    rg_plan *apart = run(spec, NULL, (rg_plan_options){.no_reuse = true}, 33, &want);
    for (int i = 0; i < 3; i++) {
      rg_plan *plan =
          run(spec, i == 2 ? all : NULL, (rg_plan_options){.no_inplace = i == 1}, 33, &got);
      same_results(&want, &got,
                   i == 0   ? "in place"
                   : i == 1 ? "reuse without in place"
                            : "recomputed in place");
      free_buffers(&got);
      rg_plan_destroy(plan);
    }
    free_buffers(&want);
    rg_plan_destroy(apart);
    rg_spec_destroy(spec);
  }
  rg_policy_destroy(all);
}
