/* tests/unit/test_graph.c: whole plans against the whole-graph oracle, through the public API.
 *
 * A case is a spec and a pack. Its plain plan (everything kept, not cut, two threads) runs from poisoned
 * memory and is compared with the oracle; every other plan of it (recompute all or some, heads cut, one
 * thread) must give the same bits. Each run also checks that predicted bytes are the bytes touched and that
 * dead rows are zero; dead rows of all inputs and incoming gradients are NaN.
 *
 * Gates: one op is held to 2e-6 (outputs) and 5e-6 (gradients) in fp32, 4e-3 and 6e-3 where bf16 takes part.
 * Errors of ops in a row add up at worst, so a tensor behind n arithmetic nodes gets max(1, 0.3 n) times the
 * gate of one; a gradient has come through the nodes behind its tensor as well as those before them, at most
 * all on the longest path. The worst of five thousand random graphs used nine tenths of that.
 */
#include "run_util.h"
#include "graph/passes.h"
#include "graph/spec.h"
#include "tests/harness/graph_gen.h"
#include "tests/harness/graph_ref.h"

#include <math.h>

#define SLACK 0.3

typedef struct pack {
  int64_t T, S, B;
  const int *length;   /* [B] */
  const int *length_k; /* [B], of cu_keys; NULL: near-equal over S */
} pack;

typedef struct graph_case {
  ot *t;
  rg_context *ctx;
  rg_spec *spec;
  rgi_graph *forward; /* elaborated */
  pack p;
  uint64_t seed;
  char what[160];
  gref *oracle;
  bool empty; /* no gradient wanted or none arrives */
} graph_case;

typedef struct report {
  int plans, refused;
  double worst_output, worst_gradient; /* in units of the gate */
} report;

static int64_t live_of(const pack *p) {
  int64_t n = 0;
  for (int64_t b = 0; b < p->B; b++) n += p->length[b];
  return n;
}

static size_t bindings(const graph_case *c, rg_binding set[3]) {
  static const char *const names[] = {"T", "B", "S"};
  const int64_t values[] = {c->p.T, c->p.B, c->p.S};
  size_t n = 0;
  for (int i = 0; i < 3; i++)
    for (int k = 0; k < c->spec->nfree; k++)
      if (strcmp(c->spec->free_name[k], names[i]) == 0) set[n++] = (rg_binding){names[i], values[i], NULL};
  return n;
}

/* ---- data ---- */

static const rgi_io *declared(const graph_case *c, const rg_tensor_info *t) {
  bool in = t->role == RG_INPUT || t->role == RG_GRAD_OUT;
  for (int i = 0; i < (in ? c->forward->ninput : c->forward->noutput); i++) {
    const rgi_io *io = in ? &c->forward->input[i] : &c->forward->output[i];
    if (strcmp(io->name, t->name) == 0) return io;
  }
  cr_assert(false, "%s: %s is not declared", c->what, t->name);
  return NULL;
}

/* Live rows of a bound tensor. */
static int64_t live_rows(const graph_case *c, const rg_tensor_info *t) {
  const rgi_tensor *x = &c->forward->tensor[declared(c, t)->tensor];
  if (t->rank == 0 || x->seqlens < 0) return t->rank ? t->dim[0] : 1;
  const char *lengths = c->forward->tensor[x->seqlens].name;
  if (strcmp(lengths, "cu_keys") != 0) return live_of(&c->p);
  int64_t n = 0;
  for (int64_t b = 0; b < c->p.B; b++)
    n += c->p.length_k ? c->p.length_k[b] : (b + 1) * c->p.S / c->p.B - b * c->p.S / c->p.B;
  return n;
}

static int64_t elements(const rg_tensor_info *t) {
  return t->bytes / (int64_t)rg_dtype_size(t->dtype);
}
static int64_t live_elements(const graph_case *c, const rg_tensor_info *t) {
  return t->rank && t->dim[0] ? elements(t) / t->dim[0] * live_rows(c, t) : elements(t);
}

static void fill_case(const graph_case *c, const rg_plan *plan, buffers *b) {
  make_buffers(plan, c->seed, c->p.T, c->p.length, b);
  for (int i = 0; i < b->n; i++) {
    rg_tensor_info *t = &b->info[i];
    int64_t n = elements(t);
    t->name = strdup(t->name); /* the plan's go with it */
    if (t->seqlens && strcmp(t->name, "cu_keys") == 0) {
      fill_starts(b->data[i], t->dim[0], c->p.S, c->p.length_k);
    } else if (t->role == RG_INPUT && t->dtype == RG_I32 && !t->seqlens) {
      for (int64_t k = 0; k < n; k++) ((int32_t *)b->data[i])[k] = (int32_t)((k * 7 + 3) % 5);
    } else if (t->accumulates) {
      fill_floats(t, b->data[i], c->seed + (uint64_t)n);
    } else if ((t->role == RG_INPUT || t->role == RG_GRAD_IN) && t->dtype != RG_I32) {
      float *x = malloc((size_t)n * sizeof *x + 4);
      rg_convert(RG_F32, x, t->dtype, b->data[i], (size_t)n);
      if (t->name[0] == 'w' && t->role == RG_INPUT)
        for (int64_t k = 0; k < n; k++) x[k] /= sqrtf((float)t->dim[t->rank - 1]);
      for (int64_t k = live_elements(c, t); k < n; k++) x[k] = NAN;
      rg_convert(t->dtype, b->data[i], RG_F32, x, (size_t)n);
      free(x);
    }
  }
}

static void drop(buffers *b) {
  for (int i = 0; i < b->n; i++) free((char *)b->info[i].name);
  free_buffers(b);
}

static double *doubles(ot *t, const rg_tensor_info *info, const void *data) {
  int64_t n = elements(info);
  float *x = malloc((size_t)n * sizeof *x + 4);
  double *y = ot_doubles(t, n + 1);
  rg_convert(RG_F32, x, info->dtype, data, (size_t)n);
  for (int64_t k = 0; k < n; k++) y[k] = x[k];
  free(x);
  return y;
}

/* ---- one plan, run ---- */

static void check_dead_rows(const graph_case *c, const buffers *before, const buffers *b) {
  for (int i = 0; i < b->n; i++) {
    const rg_tensor_info *t = &b->info[i];
    if ((t->role != RG_OUTPUT && t->role != RG_GRAD_OUT) || t->dtype == RG_I32) continue;
    float *x = malloc((size_t)elements(t) * 8 + 8), *y = x + elements(t);
    rg_convert(RG_F32, x, t->dtype, b->data[i], (size_t)elements(t));
    rg_convert(RG_F32, y, t->dtype, before->data[i], (size_t)elements(t));
    for (int64_t k = live_elements(c, t); k < elements(t); k++)
      cr_assert(t->accumulates ? x[k] == y[k] : x[k] == 0, "%s: dead row of %s %s holds %g", c->what,
                t->role == RG_OUTPUT ? "output" : "gradient", t->name, (double)x[k]);
    free(x);
  }
}

/* False if the policy does not suit the graph. */
static bool run_plan(const graph_case *c, const char *policy_text, int threads, buffers *b,
                     rg_session **session, rg_plan **kept_plan) {
  rg_error e = {0};
  rg_binding set[3];
  rg_policy *policy = policy_text ? load_policy(c->ctx, policy_text) : NULL;
  rg_plan_options o = {.set = set,
                       .nset = bindings(c, set),
                       .device = test_device(),
                       .threads = threads,
                       .pack_seconds = 0.002};
  rg_plan *plan = NULL;
  rg_status status = rg_plan_create(c->spec, policy, &o, &plan, &e);
  rg_policy_destroy(policy);
  if (status == RG_E_POLICY) return false;
  cr_assert_eq(status, RG_OK, "%s, %s: %s", c->what, policy_text ? policy_text : "kept", e.message);
  fill_case(c, plan, b);
  buffers before;
  fill_case(c, plan, &before);
  rg_session *s = NULL;
  rg_session_options so = {.debug_poison = true};
  CR_OK(rg_session_create(plan, &so, &s, &e), &e);
  bind_all(s, b);
  CR_OK(rg_session_forward(s, &e), &e);
  bool backward = false;
  for (int i = 0; i < b->n; i++) backward = backward || b->info[i].role == RG_GRAD_OUT;
  if (backward) CR_OK(rg_session_backward(s, &e), &e);
  fetch_all(s, b);
  int64_t saved, scratch;
  rg_sizes z;
  cr_assert_eq(rg_session_touched(s, &saved, &scratch), RG_OK);
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  cr_assert(saved == z.saved && scratch == z.scratch,
            "%s, %s: touched %lld + %lld bytes, predicted %lld + %lld", c->what,
            policy_text ? policy_text : "kept", (long long)saved, (long long)scratch, (long long)z.saved,
            (long long)z.scratch);
  check_dead_rows(c, &before, b);
  drop(&before);
  if (session) {
    *session = s;
    *kept_plan = plan;
  } else {
    rg_session_destroy(s);
    rg_plan_destroy(plan);
  }
  return true;
}

/* ---- against the oracle ---- */

/* Inputs and the chosen indices into the oracle; runs it. */
static void run_oracle(graph_case *c, const buffers *b, rg_session *s) {
  bool low = false;
  for (int t = 0; t < c->forward->ntensor; t++)
    low = low || c->forward->tensor[t].dtype == RG_F16 || c->forward->tensor[t].dtype == RG_BF16;
  gref *r = c->oracle = gref_new(c->t, c->forward, low);
  for (int i = 0; i < b->n; i++) {
    const rg_tensor_info *t = &b->info[i];
    if (t->role != RG_INPUT) continue;
    int id = declared(c, t)->tensor;
    if (t->dtype == RG_I32)
      gref_set_ints(r, id, b->data[i]);
    else
      gref_set(r, id, doubles(c->t, t, b->data[i]));
  }
  for (int n = 0; n < c->forward->nnode; n++) {
    const rgi_node *node = &c->forward->node[n];
    if (strcmp(node->op->name, "topk") != 0) continue;
    int id = node->out[0];
    size_t bytes = (size_t)rgi_bytes(&c->forward->tensor[id]);
    int32_t *idx = ot_alloc(c->t, bytes + 4);
    rg_error e = {0};
    if (rg_session_read(s, c->forward->tensor[id].name, idx, bytes, &e) == RG_OK) gref_set_ints(r, id, idx);
  }
  const char *unknown = gref_forward(r);
  cr_assert_null(unknown, "%s: the oracle has no op for %s", c->what, unknown);
  cr_assert_geq(gref_topk_overlap(r), 0.97, "%s: only %g of the indices agree", c->what,
                gref_topk_overlap(r));
  for (int i = 0; i < b->n; i++)
    if (b->info[i].role == RG_GRAD_IN)
      gref_seed(r, declared(c, &b->info[i])->tensor, doubles(c->t, &b->info[i], b->data[i]));
  gref_backward(r);
}

static double relative(const double *x, const double *ref, int64_t n, double floor) {
  double error = 0, norm = 0;
  for (int64_t k = 0; k < n; k++) {
    if (x[k] == ref[k] ||
        (isnan(x[k]) && isnan(ref[k]))) { /* infinities too; NaN where nobody knows of dead rows */
      norm += isfinite(ref[k]) ? ref[k] * ref[k] : 0;
      continue;
    }
    error += (x[k] - ref[k]) * (x[k] - ref[k]);
    norm += ref[k] * ref[k];
  }
  if (!(error < INFINITY)) return INFINITY;
  return sqrt(error) / fmax(sqrt(norm), floor * sqrt((double)n + 1));
}

static double gate_of(bool gradient, rg_dtype worst) {
  static const double output[] = {[RG_F32] = 2e-6, [RG_F16] = 5e-4, [RG_BF16] = 4e-3};
  static const double grad[] = {[RG_F32] = 5e-6, [RG_F16] = 8e-4, [RG_BF16] = 6e-3};
  return gradient ? grad[worst] : output[worst];
}

static void compare_with_oracle(graph_case *c, const buffers *b, report *rep) {
  rg_dtype lowest = RG_F32;
  int longest = 1;
  for (int t = 0; t < c->forward->ntensor; t++) {
    rg_dtype d = c->forward->tensor[t].dtype;
    if (d == RG_BF16 || (d == RG_F16 && lowest == RG_F32)) lowest = d;
    if (gref_depth(c->oracle, t) > longest) longest = gref_depth(c->oracle, t);
  }
  buffers initial;
  rg_plan *plan = NULL;
  rg_binding set[3];
  rg_plan_options o = {
      .set = set, .nset = bindings(c, set), .device = test_device(), .threads = 1, .pack_seconds = 0.002};
  cr_assert_eq(rg_plan_create(c->spec, NULL, &o, &plan, NULL), RG_OK);
  fill_case(c, plan, &initial);
  for (int i = 0; i < b->n; i++) {
    const rg_tensor_info *t = &b->info[i];
    if ((t->role != RG_OUTPUT && t->role != RG_GRAD_OUT) || t->dtype == RG_I32) continue;
    bool gradient = t->role == RG_GRAD_OUT;
    int id = declared(c, t)->tensor;
    const double *x = doubles(c->t, t, b->data[i]),
                 *want = gradient ? gref_gradient(c->oracle, id) : gref_value(c->oracle, id);
    double *ref = ot_doubles(c->t, elements(t) + 1);
    if (want) memcpy(ref, want, (size_t)elements(t) * sizeof *ref);
    if (t->accumulates) {
      const double *start = doubles(c->t, t, initial.data[i]);
      for (int64_t k = 0; k < elements(t); k++) ref[k] += start[k];
    }
    int depth = gradient ? longest : gref_depth(c->oracle, id);
    double gate = gate_of(gradient, lowest) * fmax(1, SLACK * depth),
           error = relative(x, ref, live_elements(c, t),
                            !gradient          ? 1e-3
                            : lowest == RG_F32 ? 0.05
                                               : 1);
    double *worst = gradient ? &rep->worst_gradient : &rep->worst_output;
    if (error / gate > *worst) *worst = error / gate;
    cr_assert_leq(error, gate, "%s: %s %s is off by %g, gate %g (%d nodes deep)", c->what,
                  gradient ? "gradient of" : "output", t->name, error, gate, depth);
  }
  drop(&initial);
  rg_plan_destroy(plan);
}

/* ---- a case through all its plans ---- */

static graph_case open_case(rg_context *ctx, ot *t, rg_spec *spec, pack p, uint64_t seed, const char *what) {
  rg_error e = {0};
  rg_binding set[3];
  graph_case c = {.t = t, .ctx = ctx, .spec = spec, .p = p, .seed = seed};
  snprintf(c.what, sizeof c.what, "%s", what);
  CR_OK(rgi_spec_elaborate(spec, set, bindings(&c, set), true, &c.forward, &e), &e);
  return c;
}

/* A policy that recomputes spec nodes with probability p and cuts heads into groups of `split` (0: not). */
static const char *random_policy(graph_case *c, double p, int split) {
  char *text = ot_alloc(c->t, 8192);
  size_t n = (size_t)snprintf(text, 8192, "{ \"regraph_policy\": 1, \"recompute\": [");
  bool first = true;
  for (int i = 0; i < c->forward->norigin; i++) {
    const rgi_origin *o = &c->forward->origin[i];
    if (!(o->op->flags & RG_OP_RECOMPUTABLE) || strchr(o->name, '.') || ot_uniform(c->t) >= p) continue;
    n += (size_t)snprintf(text + n, 8192 - n, "%s\"%s\"", first ? "" : ", ", o->name);
    first = false;
  }
  n += (size_t)snprintf(text + n, 8192 - n, "]");
  if (split) n += (size_t)snprintf(text + n, 8192 - n, ", \"split_heads\": %d", split);
  snprintf(text + n, 8192 - n, " }");
  return text;
}

static void same_as(graph_case *c, const buffers *kept, const char *policy, int threads, report *rep) {
  buffers b;
  char what[9000];
  rep->plans++;
  if (!run_plan(c, policy, threads, &b, NULL, NULL)) {
    rep->refused++;
    return;
  }
  snprintf(what, sizeof what, "%s, %s, threads %d", c->what, policy ? policy : "kept", threads);
  same_results(kept, &b, what);
  drop(&b);
}

/* Fewest heads on any port that has them; 0: none. */
static int fewest_heads(const graph_case *c) {
  int64_t least = 0;
  for (int n = 0; n < c->forward->nnode; n++) {
    const rgi_node *node = &c->forward->node[n];
    for (int p = 0; p < node->op->nin; p++)
      for (int i = node->in_begin[p]; i < node->in_begin[p + 1] && node->op->in[p].head_axis >= 0; i++) {
        int64_t heads = c->forward->tensor[node->in[i]].dim[node->op->in[p].head_axis].c;
        if (least == 0 || heads < least) least = heads;
      }
  }
  return (int)least;
}

static void run_case(graph_case *c, report *rep) {
  buffers kept;
  rg_session *s;
  rg_plan *plan;
  cr_assert(run_plan(c, NULL, 2, &kept, &s, &plan));
  run_oracle(c, &kept, s);
  rg_session_destroy(s);
  rg_plan_destroy(plan);
  compare_with_oracle(c, &kept, rep);
  same_as(c, &kept, NULL, 1, rep);
  same_as(c, &kept, "{ \"regraph_policy\": 1, \"preset\": \"all\" }", 2, rep);
  same_as(c, &kept, random_policy(c, 0.5, 0), 1, rep);
  int heads = fewest_heads(c);
  for (int split = 1; split < heads; split++) {
    if (heads % split) continue;
    same_as(c, &kept, random_policy(c, 0, split), 2, rep);
    same_as(c, &kept, random_policy(c, 0.5, split), 1, rep);
    same_as(c, &kept, random_policy(c, 1, split), 2, rep);
  }
  drop(&kept);
}

static void close_case(graph_case *c) {
  rgi_graph_destroy(c->forward);
}

/* One spec given as text. */
static void run_text(const char *text, pack p, uint64_t seed, const char *what, report *rep) {
  rg_error e = {0};
  rg_context *ctx = NULL;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_spec *spec = NULL;
  CR_OK(rg_spec_load_text(ctx, text, strlen(text), what, NULL, 0, &spec, &e), &e);
  ot *t = ot_begin(seed);
  graph_case c = open_case(ctx, t, spec, p, seed, what);
  run_case(&c, rep);
  close_case(&c);
  ot_end(t);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

/* ---- stock examples ---- */

static void run_example(const char *name, const rg_binding *set, size_t nset) {
  static const int ragged[] = {37, 0, 1, 58, 0, 19, 9}, alone[] = {120}, none[] = {0, 0},
                   one_each[] = {1, 1, 1, 1, 1};
  const pack packs[] = {
      {130, 1, 7, ragged, NULL}, {120, 1, 1, alone, NULL}, {40, 1, 2, none, NULL}, {6, 1, 5, one_each, NULL}};
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
#define EXAMPLE(name, ...)                                                                                   \
  do {                                                                                                       \
    const rg_binding set[] = {__VA_ARGS__};                                                                  \
    run_example(name, set, sizeof set / sizeof *set);                                                        \
  } while (0)
#define F32                                                                                                  \
  { "dtype", 0, "f32" }
#define SMALL {"H", 4, NULL}, {"KH", 2, NULL}, {"D", 16, NULL}, {"DV", 8, NULL}, F32
#define BLOCKED                                                                                              \
  {"kernel", 8, NULL}, {"stride", 4, NULL}, {"block", 8, NULL}, {"top_n", 3, NULL}, {"local", 1, NULL}, {    \
    "window", 12, NULL                                                                                       \
  }

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
  EXAMPLE("moba", {"H", 4, NULL}, {"D", 16, NULL}, {"DV", 8, NULL}, {"block", 8, NULL}, {"top_n", 2, NULL},
          F32);
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

/* ---- random graphs ---- */

static void random_graphs(uint64_t first, int n, gen_options o) {
  static const int lengths[6][5] = {{11, 0, 17, 5, 3}, {30, 1, 0, 0, 2}, {0, 0, 0, 0, 0}, {41},
                                    {8, 8, 8},         {1, 40}};
  static const int keys[5] = {9, 4, 0, 12, 7}, three[1] = {3};
  static const int64_t count[6] = {5, 5, 5, 1, 3, 2};
  report rep = {0};
  const char *more = getenv("GRAPH_MORE"); /* times as many graphs */
  if (more) n *= atoi(more);
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
    if (o.whole && live_of(&p) == 0) p = (pack){.T = 3, .S = 40, .B = 1, .length = three, .length_k = keys};
    snprintf(what, sizeof what, "random graph %llu", (unsigned long long)seed);
    if (getenv("GRAPH_PRINT")) fprintf(stderr, "%s\n", text);
    run_text(text, p, seed, what, &rep);
    ot_end(t);
  }
  if (getenv("GRAPH_VERBOSE"))
    fprintf(stderr, "%d plans, %d refused: output %.2f, gradient %.2f of the gate\n", rep.plans, rep.refused,
            rep.worst_output, rep.worst_gradient);
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
Test(graph, random_mixed) {
  random_graphs(40000, 80, (gen_options){.mixed = true});
}

/* ---- graphs that broke something, or could ---- */

#define SPEC(inputs, nodes, outputs)                                                                         \
  "{ \"regraph\": 1, \"name\": \"case\", \"inputs\": { " inputs                                              \
  "\"cu_seqlens\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } }, \"nodes\": [ " nodes                      \
  " ], \"outputs\": { " outputs " } }"
#define IN(name, shape, dtype, grad)                                                                         \
  "\"" name "\": { \"shape\": [" shape "], \"dtype\": \"" dtype "\", \"grad\": " grad " }, "
#define HEADS "\"T\", 4, 8"
#define NODE(name, op, in, out)                                                                              \
  "{ \"name\": \"" name "\", \"op\": \"" op "\", \"in\": { " in " }, \"out\": { " out " } }"
#define NODE_AT(name, op, in, out, attrs)                                                                    \
  "{ \"name\": \"" name "\", \"op\": \"" op "\", \"in\": { " in " }, \"out\": { " out                        \
  " }, \"attrs\": { " attrs " } }"
#define P(port, tensor) "\"" port "\": \"" tensor "\""
#define CU              P("cu_seqlens", "cu_seqlens")
#define SWA(name, q, k, v, o)                                                                                \
  NODE_AT(name, "swa_attn", P("q", q) ", " P("k", k) ", " P("v", v) ", " CU, P("o", o), "\"window_left\": 6")
#define COMPRESS(name, k, v, kw, vw, out)                                                                    \
  NODE_AT(name, "compress_kv",                                                                               \
          P("k", k) ", " P("v", v) ", " P("k_weight", kw) ", " P("v_weight", vw) ", " CU,                    \
          P("k", out "_k") ", " P("v", out "_v"),                                                            \
          "\"kernel\": 4, \"stride\": 4, \"k_method\": \"linear\", \"v_method\": \"linear\"")
#define CMP(name, q, from, o)                                                                                \
  NODE_AT(name, "cmp_attn", P("q", q) ", " P("k", from "_k") ", " P("v", from "_v") ", " CU, P("o", o),      \
          "\"kernel\": 4, \"stride\": 4")

static const int ragged_lengths[] = {14, 0, 1, 23}, tiny_lengths[] = {3};
static const pack ragged = {43, 1, 4, ragged_lengths, NULL}, tiny = {3, 1, 1, tiny_lengths, NULL};

static void run_one(const char *text, pack p) {
  report rep = {0};
  run_text(text, p, 77, text, &rep);
  cr_assert_eq(rep.refused, 0, "%d plans refused of %s", rep.refused, text);
}

/* A weight on two ports of one cut node, and on nodes of different rank: each use keeps a sum of its own. */
Test(graph, shared_weights) {
  run_one(SPEC(IN("k", HEADS, "f32", "true") IN("q", HEADS, "f32", "true") IN("w", "8, 32", "f32", "true"),
               COMPRESS("c", "k", "k", "w", "w", "c") ", " CMP("a", "q", "c", "o"), P("o", "o")),
          ragged);
  run_one(SPEC(IN("k", HEADS, "bf16", "true") IN("q", HEADS, "bf16", "true")
                   IN("w", "8, 32", "bf16", "\"accumulate\""),
               COMPRESS("c", "k", "k", "w", "w", "c") ", " CMP("a", "q", "c", "o"), P("o", "o")),
          ragged);
  run_one(SPEC(IN("k", HEADS, "f32", "true") IN("q", HEADS, "f32", "true") IN("w", "8, 32", "f32", "true"),
               COMPRESS("c", "k", "q", "w", "w", "c") ", " COMPRESS("d", "q", "k", "w", "w", "d") ", " CMP(
                   "a", "q", "c", "o") ", " CMP("b", "o", "d", "p"),
               P("o", "o") ", " P("p", "p") ", " P("w", "w")),
          ragged);
  run_one(SPEC(IN("k", HEADS, "f32", "true") IN("q", HEADS, "f32", "true") IN("w", "8, 32", "f32", "true")
                   IN("u", "8, 32", "f32", "true"),
               COMPRESS("c", "k", "q", "w", "u", "c") ", " COMPRESS("d", "q", "k", "w", "u", "d") ", " CMP(
                   "a", "q", "c", "o") ", " CMP("b", "o", "d", "p"),
               P("o", "o") ", " P("p", "p") ", " P("w", "w")),
          ragged);
  run_one(SPEC(IN("k", HEADS, "f32", "true") IN("q", HEADS, "f32", "true")
                   IN("w", "8, 32", "f32", "\"accumulate\"") IN("x", "\"T\", 32", "f32", "true"),
               COMPRESS("c", "k", "k", "w", "w", "c") ", " CMP("a", "q", "c", "o") ", " NODE(
                   "l", "linear", P("x", "x") ", " P("w", "w") ", " CU, P("y", "y")),
               P("o", "o") ", " P("y", "y")),
          ragged);
}

/* Read by cut and by uncut nodes: the terms of a sum come in one order whichever way. */
Test(graph, cut_and_whole_readers) {
  static const char *const dtypes[] = {"f32", "bf16"};
  static const char *const wants[] = {"true", "\"accumulate\""};
  for (int i = 0; i < 4; i++) {
    char text[4096];
    snprintf(text, sizeof text,
             SPEC(
                 IN("q", HEADS, "%s", "%s") IN("k", HEADS, "%s", "%s"),
                 SWA("a", "q", "k", "k", "o") ", " NODE("m", "mul", P("a", "k") ", " P("b", "k"), P("y", "m")) ", " NODE_AT(
                     "s", "slice", P("x", "k"), P("y", "s"),
                     "\"axis\": 1, \"start\": 1, \"stop\": 3") ", " NODE("r", "silu", P("x", "k"),
                                                                         P("y",
                                                                           "r")) ", " SWA("b", "r", "k", "m",
                                                                                          "p") ", " NODE("z",
                                                                                                         "sil"
                                                                                                         "u",
                                                                                                         P("x",
                                                                                                           "k"),
                                                                                                         P("y",
                                                                                                           "z")),
                 P("o", "o") ", " P("p", "p") ", " P("s", "s") ", " P("z", "z")),
             dtypes[i & 1], wants[i >> 1], dtypes[i & 1], wants[i >> 1]);
    run_one(text, ragged);
    /* made in parts (o, t), read in parts, whole and by slices of heads, of features and of nothing */
    snprintf(
        text, sizeof text,
        SPEC(
            IN("q", HEADS, "%s", "%s") IN("k", HEADS, "%s", "%s"),
            SWA("a", "q", "k", "k", "o") ", " NODE("t", "rope", P("x", "o") ", " CU, P("y", "t")) ", " SWA(
                "b", "o", "t", "t",
                "p") ", " NODE("r", "silu", P("x", "t"),
                               P("y",
                                 "r")) ", " NODE_AT("s", "slice", P("x", "t"), P("y", "s"),
                                                    "\"axis\": 1, \"start\": 1, \"stop\": "
                                                    "2") ", " NODE_AT("u", "slice", P("x", "t"), P("y", "u"),
                                                                      "\"axis\": 2, "
                                                                      "\"start\": 3") ","
                                                                                      " " NODE_AT(
                                                                                          "e", "slice",
                                                                                          P("x", "t"),
                                                                                          P("y", "e"),
                                                                                          "\"axis\": 1, "
                                                                                          "\"start\": "
                                                                                          "2, \"stop\": "
                                                                                          "2") ", " SWA("c",
                                                                                                        "r",
                                                                                                        "t",
                                                                                                        "o",
                                                                                                        "w"),
            P("o", "o") ", " P("t", "t") ", " P("p", "p") ", " P("s", "s") ", " P("u", "u") ", " P("w", "w")),
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
               NODE("a", "add", "\"a\": [\"x\", \"z\"]",
                    P("y", "a")) ", " NODE("s", "silu", P("x", "a") ", " CU, P("y", "y")),
               P("y", "y")),
          ragged);
  run_one(
      SPEC(IN("x", "\"T\", 6", "f32", "true") IN("z", "\"T\", 6", "f32", "true"),
           NODE_AT("s", "split", P("x", "x"), "\"y\": [\"x0\", \"x1\"]", "\"axis\": 1") ", " NODE_AT(
               "t", "split", P("x", "z"), "\"y\": [\"z0\", \"z1\"]",
               "\"axis\": 1") ", " NODE("a", "add", "\"a\": [\"x0\", \"z1\", \"x1\"]",
                                        P("y", "y0")) ", " NODE("b", "add", "\"a\": [\"z0\", \"y0\"], " CU,
                                                                P("y", "y1")) ", " NODE("c", "silu",
                                                                                        P("x", "y1"),
                                                                                        P("y", "y")),
           P("y", "y")),
      ragged);
  run_one(SPEC(IN("x", "\"T\", 6", "f32", "true") IN("w", "6", "f32", "true"),
               NODE("r", "rmsnorm", P("x", "x") ", " P("w", "w") ", " CU,
                    P("y", "y")) ", " NODE("s", "silu", P("x", "w"), P("y", "s")),
               P("w", "w") ", " P("y", "y") ", " P("x", "x") ", " P("s", "s")),
          ragged);
}

/* Axes of one element have any stride: that must not keep a view from being reshaped, forward or back. */
Test(graph, axes_of_one) {
  run_one(
      SPEC(
          IN("x", "\"T\", 2, 8", "f32", "true"),
          NODE_AT("r", "reshape", P("x", "x"), P("y", "a"), "\"shape\": [0, 2, 1, 8]") ", " NODE_AT(
              "t", "transpose", P("x", "a"), P("y", "b"),
              "\"perm\": [0, 2, 1, 3]") ", " NODE("m", "mul", P("a", "b") ", " P("b", "b"),
                                                  P("y",
                                                    "c")) ", " NODE_AT("h", "slice", P("x", "x"), P("y", "d"),
                                                                       "\"axis\": 1, \"start\": "
                                                                       "1") ", " NODE_AT("f",
                                                                                         "reshap"
                                                                                         "e",
                                                                                         P("x", "d"),
                                                                                         P("y", "e"),
                                                                                         "\"shap"
                                                                                         "e\": "
                                                                                         "[0, "
                                                                                         "8]") ", " NODE("n",
                                                                                                         "sil"
                                                                                                         "u",
                                                                                                         P("x",
                                                                                                           "e") ", " CU,
                                                                                                         P("y",
                                                                                                           "f")),
          P("c", "c") ", " P("f", "f")),
      ragged);
}

Test(graph, scalars) {
  run_one(
      SPEC(IN("x", "", "f32", "true") IN("z", "\"T\", 2", "f32", "true"),
           NODE("s", "silu", P("x", "x"), P("y", "s")) ", " NODE_AT(
               "r", "reshape", P("x", "s"), P("y", "r"),
               "\"shape\": [1, 1]") ", " NODE("m", "mul", P("a", "s") ", " P("b", "x"),
                                              P("y",
                                                "m")) ", " NODE("l", "linear",
                                                                P("x", "z") ", " P("w", "w") ", " CU,
                                                                P("y",
                                                                  "l")) ", " NODE_AT("c", "concat",
                                                                                     "\"x\": [\"r\", \"r\"]",
                                                                                     P("y", "w"),
                                                                                     "\"axis\": 1"),
           P("l", "l") ", " P("m", "m")),
      ragged);
}

/* Rows made of several heads each, or the other way: dead tokens stay dead in gradients. */
Test(graph, merged_rows) {
  run_one(SPEC(IN("x", "\"2*T\", 8", "f32", "true") IN("z", "\"T\", 2, 8", "f32", "true"),
               NODE_AT("r", "reshape", P("x", "x"), P("y", "y"), "\"shape\": [-1, 2, 8]") ", " NODE(
                   "a", "add", "\"a\": [\"y\", \"z\"], " CU, P("y", "s")),
               P("s", "s")),
          ragged);
  run_one(SPEC(IN("x", "\"T\", 2, 8", "f32", "true") IN("z", "\"T\", 2, 8", "f32", "true"),
               NODE("p", "rope", P("x", "x") ", " CU, P("y", "unread")) ", " NODE_AT(
                   "r", "reshape", P("x", "x"), P("y", "y"),
                   "\"shape\": [-1, 8]") ", " NODE("s", "silu", P("x", "y"), P("y", "s")),
               P("s", "s")),
          ragged);
}

/* As many heads as tokens: what is dead are tokens, wherever their axis stands. */
Test(graph, heads_as_many_as_tokens) {
  static const int two[] = {1, 1};
  run_one(SPEC(IN("x", "4, \"T\", 8", "f32", "true") IN("z", HEADS, "f32", "true"),
               NODE_AT("t", "transpose", P("x", "x"), P("y", "y"), "\"perm\": [1, 0, 2]") ", " NODE(
                   "a", "add", "\"a\": [\"y\", \"z\"], " CU, P("y", "s")),
               P("s", "s")),
          (pack){4, 1, 2, two, NULL});
  run_one(SPEC(IN("x", HEADS, "f32", "true"),
               NODE("r", "rope", P("x", "x") ", " CU, P("y", "y")) ", " NODE_AT(
                   "t", "transpose", P("x", "y"), P("y", "z"), "\"perm\": [1, 0, 2]"),
               P("z", "z")),
          (pack){4, 1, 2, two, NULL});
}

/* No blocks, no heads' worth of features, no sequences; tensors of one axis. */
Test(graph, empty_tensors) {
  run_one(SPEC(IN("k", HEADS, "f32", "true") IN("q", HEADS, "f32", "true") IN("w", "8, 32", "f32", "true"),
               COMPRESS("c", "k", "k", "w", "w",
                        "c") ", " CMP("a", "q", "c", "o") ", " NODE("s", "silu", P("x", "c_k"), P("y", "s")),
               P("o", "o") ", " P("s", "s")),
          tiny);
  run_one(
      SPEC(
          IN("x", "\"T\", 6", "f32", "true"),
          NODE_AT("s", "split", P("x", "x"), "\"y\": [\"a\", \"b\", \"c\"]", "\"axis\": 1, \"sizes\": [0, 4, 2]") ", " NODE(
              "e", "silu", P("x", "a") ", " CU,
              P("y", "e")) ", " NODE("f", "silu", P("x", "b"),
                                     P("y",
                                       "f")) ", " NODE_AT("g", "concat",
                                                          "\"x\": [\"e\", \"c\", \"f\", \"a\"]", P("y", "g"),
                                                          "\"axis\": 1") ", " NODE_AT("r", "reshape",
                                                                                      P("x", "e"),
                                                                                      P("y", "r"),
                                                                                      "\"shape\": [0, 0]"),
          P("e", "e") ", " P("g", "g") ", " P("r", "r")),
      ragged);
  run_one(SPEC(IN("x", "\"T\", 2, 4", "f32", "true"), SWA("a", "x", "x", "x", "o"), P("o", "o")),
          (pack){5, 1, 0, NULL, NULL});
  run_one(SPEC(IN("x", "\"T\"", "f32", "true") IN("w", "9", "bf16", "\"accumulate\""),
               NODE("s", "silu", P("x", "x") ", " CU, P("y", "y")) ", " NODE_AT(
                   "c", "cast", P("x", "w"), P("y", "v"),
                   "\"to\": \"f32\"") ", " NODE_AT("t", "slice", P("x", "v"), P("y", "u"),
                                                   "\"axis\": 0, \"start\": 2, \"stop\": "
                                                   "5") ", " NODE("m", "mul", P("a", "v") ", " P("b", "v"),
                                                                  P("y", "m")),
               P("y", "y") ", " P("u", "u") ", " P("m", "m")),
          ragged);
}

/* Slices of tokens and of weights, overlapping, beside whole readers. */
Test(graph, slices) {
  static const int all[] = {20, 23};
  run_one(
      SPEC(
          IN("x", "\"T\", 6", "f32", "true"),
          NODE_AT(
              "a", "slice", P("x", "x"), P("y", "a"),
              "\"axis\": 0, \"start\": 3, \"stop\": 20") ", " NODE_AT("b", "slice", P("x", "x"), P("y", "b"),
                                                                      "\"axis\": 0, \"start\": 13, \"stop\": "
                                                                      "30") ", " NODE("m", "mul",
                                                                                      P("a", "a") ", " P("b",
                                                                                                         "b"),
                                                                                      P("y",
                                                                                        "m")) ", " NODE_AT("c",
                                                                                                           "s"
                                                                                                           "l"
                                                                                                           "i"
                                                                                                           "c"
                                                                                                           "e",
                                                                                                           P("x",
                                                                                                             "m"),
                                                                                                           P("y",
                                                                                                             "c"),
                                                                                                           "\"axis\": 1, \"start\": 1, \"stop\": 4") ", " NODE("s",
                                                                                                                                                               "silu",
                                                                                                                                                               P("x",
                                                                                                                                                                 "x"),
                                                                                                                                                               P("y",
                                                                                                                                                                 "s")),
          P("m", "m") ", " P("c", "c") ", " P("s", "s")),
      (pack){43, 1, 2, all, NULL});
  run_one(
      SPEC(
          IN("x", "\"T\", 6", "bf16", "true") IN("w", "10, 6", "bf16", "\"accumulate\""),
          NODE_AT(
              "a", "slice", P("x", "w"), P("y", "a"),
              "\"axis\": 0, \"start\": 2, \"stop\": 8") ", " NODE_AT("b", "slice", P("x", "a"), P("y", "b"),
                                                                     "\"axis\": 0, \"start\": "
                                                                     "1") ", " NODE("l", "linear",
                                                                                    P("x", "x") ", " P(
                                                                                        "w", "a") ","
                                                                                                  " " CU,
                                                                                    P("y",
                                                                                      "l")) ","
                                                                                            " " NODE(
                                                                                                "m", "linear",
                                                                                                P("x", "l") ", " P(
                                                                                                    "w",
                                                                                                    "w") ","
                                                                                                         " " CU,
                                                                                                P("y",
                                                                                                  "m")) ","
                                                                                                        " " NODE(
                                                                                                            "n",
                                                                                                            "linear",
                                                                                                            P("x", "x") ", " P(
                                                                                                                "w",
                                                                                                                "b"),
                                                                                                            P("y",
                                                                                                              "n")),
          P("m", "m") ", " P("n", "n")),
      ragged);
}
