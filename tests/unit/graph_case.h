/* tests/unit/graph_case.h: whole plans against the whole-graph oracle, through the public API.

   A case is a spec and a pack. Its plain plan (everything kept, not cut, two threads) runs from
   poisoned memory and is compared with the oracle; every other plan of it (recompute all or some,
   heads cut, one thread) must give the same bits. Each poisoned run also checks that predicted
   bytes are the bytes touched; each run, that dead rows are zero; dead rows of all inputs and
   incoming gradients are NaN.

   REGRAPH_TEST_PROFILE: a profile that plans are made for, such as an older GPU's.

   Gates: one op is held to 2e-6 (outputs) and 5e-6 (gradients) in fp32, 4e-3 and 6e-3 where bf16
   takes part. Errors of ops in a row add up at worst, so a tensor behind n arithmetic nodes gets
   max(1, 0.3 n) times the gate of one; a gradient has come through the nodes behind its tensor as
   well as those before them, at most all on the longest path. The worst of five thousand random
   graphs used nine tenths of that.
 */
#ifndef GRAPH_CASE_H
#define GRAPH_CASE_H

#include "run_util.h"
#include "graph/spec.h"
#include "passes/passes.h"
#include "tests/harness/graph_ref.h"
#include "tests/ref/ref.h"

#include <math.h>

#define SLACK 0.3

typedef struct pack {
  int64_t T, S, B;
  const int *length;   /* [B] */
  const int *length_k; /* [B], of cu_keys; NULL: near-equal over S */
} pack;

/* How a plan is made and run. */
typedef struct run_how {
  const char *policy; /* NULL: everything kept */
  int threads;
  bool poison; /* fill everything with NaN before each run, count the bytes touched */
  bool no_reuse, no_lanes, eager;
} run_how;

typedef struct graph_case {
  ot *t;
  rg_context *ctx;
  rg_spec *spec;
  rgi_graph *forward; /* elaborated */
  pack p;
  uint64_t seed;
  char what[160];
  gref *oracle;
  const int *offset; /* [B], positions of first queries; NULL: small ones */
  /* NULL, or a last change to what is bound */
  void (*spoil)(const struct graph_case *c, buffers *b);
  /* Tensors may be so small that a root mean square of errors varies: gates widen by four sigma, by
   * more for a handful of numbers (sinks' gradients), each a sum over all tokens that cancels out.
   * Errors of ops near their gates add up as squares do. Gradients may cancel out: their errors
   * count beside incoming ones of size 1, not below. */
  bool few_vary;
} graph_case;

typedef struct report {
  int plans, refused;
  double worst_output, worst_gradient; /* in units of the gate */
} report;

static inline int64_t live_of(const pack *p) {
  int64_t n = 0;
  for (int64_t b = 0; b < p->B; b++) n += p->length[b];
  return n;
}

static inline size_t bindings(const graph_case *c, rg_binding set[3]) {
  static const char *const names[] = {"T", "B", "S"};
  const int64_t values[] = {c->p.T, c->p.B, c->p.S};
  size_t n = 0;
  for (int i = 0; i < 3; i++)
    for (int k = 0; k < c->spec->nfree; k++)
      if (strcmp(c->spec->free_name[k], names[i]) == 0)
        set[n++] = (rg_binding){names[i], values[i], NULL};
  return n;
}

/* ---- data ---- */

static inline const rgi_io *declared(const graph_case *c, const rg_tensor_info *t) {
  bool in = t->role == RG_INPUT || t->role == RG_GRAD_OUT;
  for (int i = 0; i < (in ? c->forward->ninput : c->forward->noutput); i++) {
    const rgi_io *io = in ? &c->forward->input[i] : &c->forward->output[i];
    if (strcmp(io->name, t->name) == 0) return io;
  }
  cr_assert(false, "%s: %s is not declared", c->what, t->name);
  return NULL;
}

/* Live rows of a bound tensor. */
static inline int64_t live_rows(const graph_case *c, const rg_tensor_info *t) {
  const rgi_tensor *x = &c->forward->tensor[declared(c, t)->tensor];
  if (t->rank == 0 || x->seqlens < 0) return t->rank ? t->dim[0] : 1;
  int32_t lengths = x->seqlens;
  int64_t n = 0, times = 1;
  const int maker = c->forward->tensor[lengths].producer;
  if (maker >= 0 && strcmp(c->forward->node[maker].op->name, "scale_lengths") == 0) {
    times = c->forward->node[maker].attr[0].i;
    lengths = c->forward->node[maker].in[0];
  }
  if (strcmp(c->forward->tensor[lengths].name, "cu_keys") != 0) return times * live_of(&c->p);
  for (int64_t b = 0; b < c->p.B; b++)
    n += c->p.length_k ? c->p.length_k[b] : (b + 1) * c->p.S / c->p.B - b * c->p.S / c->p.B;
  return times * n;
}

static inline int64_t elements(const rg_tensor_info *t) {
  return t->bytes / (int64_t)rg_dtype_size(t->dtype);
}
static inline int64_t live_elements(const graph_case *c, const rg_tensor_info *t) {
  return t->rank && t->dim[0] ? elements(t) / t->dim[0] * live_rows(c, t) : elements(t);
}

static inline void fill_case(const graph_case *c, const rg_plan *plan, buffers *b) {
  make_buffers(plan, c->seed, c->p.T, c->p.length, b);
  for (int i = 0; i < b->n; i++) {
    rg_tensor_info *t = &b->info[i];
    int64_t n = elements(t);
    t->name = strdup(t->name); /* the plan's go with it */
    if (t->seqlens && strcmp(t->name, "cu_keys") == 0) {
      fill_starts(b->data[i], t->dim[0], c->p.S, c->p.length_k);
    } else if (t->role == RG_INPUT && t->dtype == RG_I32 && !t->seqlens) {
      for (int64_t k = 0; k < n; k++)
        ((int32_t *)b->data[i])[k] =
            t->offsets && c->offset ? c->offset[k] : (int32_t)((k * 7 + 3) % 5);
    } else if (t->accumulates) {
      fill_floats(t, b->data[i], c->seed + (uint64_t)n);
    } else if ((t->role == RG_INPUT || t->role == RG_GRAD_IN) && t->dtype != RG_I32) {
      float *x = malloc((size_t)n * sizeof *x + 4);
      rg_convert(RG_F32, x, t->dtype, b->data[i], (size_t)n);
      if ((t->name[0] == 'w' || strstr(t->name, "_w")) && t->role == RG_INPUT)
        for (int64_t k = 0; k < n; k++) x[k] /= sqrtf((float)t->dim[t->rank - 1]);
      for (int64_t k = live_elements(c, t); k < n; k++) x[k] = NAN;
      rg_convert(t->dtype, b->data[i], RG_F32, x, (size_t)n);
      free(x);
    }
  }
}

static inline void drop(buffers *b) {
  for (int i = 0; i < b->n; i++) free((char *)b->info[i].name);
  free_buffers(b);
}

static inline double *doubles(ot *t, const rg_tensor_info *info, const void *data) {
  int64_t n = elements(info);
  float *x = malloc((size_t)n * sizeof *x + 4);
  double *y = ot_doubles(t, n + 1);
  rg_convert(RG_F32, x, info->dtype, data, (size_t)n);
  for (int64_t k = 0; k < n; k++) y[k] = x[k];
  free(x);
  return y;
}

/* ---- one plan, run ---- */

static inline void check_dead_rows(const graph_case *c, const buffers *before, const buffers *b) {
  for (int i = 0; i < b->n; i++) {
    const rg_tensor_info *t = &b->info[i];
    if ((t->role != RG_OUTPUT && t->role != RG_GRAD_OUT) || t->dtype == RG_I32) continue;
    float *x = malloc((size_t)elements(t) * 8 + 8), *y = x + elements(t);
    rg_convert(RG_F32, x, t->dtype, b->data[i], (size_t)elements(t));
    rg_convert(RG_F32, y, t->dtype, before->data[i], (size_t)elements(t));
    for (int64_t k = live_elements(c, t); k < elements(t); k++)
      cr_assert(t->accumulates ? x[k] == y[k] : x[k] == 0, "%s: dead row of %s %s holds %g",
                c->what, t->role == RG_OUTPUT ? "output" : "gradient", t->name, (double)x[k]);
    free(x);
  }
}

/* Gives back what upload_all took on the device; while the plan still stands. */
static inline void release_device(buffers *b) {
  for (int i = 0; i < b->n; i++)
    if (b->device[i] && b->device[i] != b->data[i]) rg_memory_free(b->plan, b->device[i]);
}

static inline buffers copy_of(const buffers *b) {
  buffers x = *b;
  for (int i = 0; i < b->n; i++) {
    x.data[i] = malloc((size_t)b->info[i].bytes + 64);
    memcpy(x.data[i], b->data[i], (size_t)b->info[i].bytes);
  }
  return x;
}

/* False if the policy does not suit the graph. */
static inline bool run_plan(const graph_case *c, run_how how, buffers *b, rg_session **session,
                            rg_plan **kept_plan) {
  rg_error e = {0};
  rg_binding set[3];
  const char *policy_text = how.policy ? how.policy : "kept";
  rg_policy *policy = how.policy ? load_policy(c->ctx, how.policy) : NULL;
  rg_plan_options o = {.set = set,
                       .nset = bindings(c, set),
                       .device = test_device(),
                       .profile_path = getenv("REGRAPH_TEST_PROFILE"),
                       .threads = how.threads,
                       .no_reuse = how.no_reuse,
                       .no_lanes = how.no_lanes,
                       .pack_seconds = 0.002};
  rg_plan *plan = NULL;
  rg_status status = rg_plan_create(c->spec, policy, &o, &plan, &e);
  rg_policy_destroy(policy);
  if (status == RG_E_POLICY) return false;
  cr_assert_eq(status, RG_OK, "%s, %s: %s", c->what, policy_text, e.message);
  fill_case(c, plan, b);
  if (c->spoil) c->spoil(c, b);
  buffers before = copy_of(b);
  rg_session *s = NULL;
  rg_session_options so = {.debug_poison = how.poison, .eager = how.eager};
  CR_OK(rg_session_create(plan, &so, &s, &e), &e);
  bind_all(s, b);
  CR_OK(rg_session_forward(s, &e), &e);
  bool backward = false;
  for (int i = 0; i < b->n; i++) backward = backward || b->info[i].role == RG_GRAD_OUT;
  if (backward) CR_OK(rg_session_backward(s, &e), &e);
  fetch_all(s, b);
  int64_t saved, scratch;
  rg_sizes z;
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  if (how.poison) {
    cr_assert_eq(rg_session_touched(s, &saved, &scratch), RG_OK);
    cr_assert(saved == z.saved && scratch == z.scratch,
              "%s, %s: touched %lld + %lld bytes, predicted %lld + %lld", c->what, policy_text,
              (long long)saved, (long long)scratch, (long long)z.saved, (long long)z.scratch);
  }
  check_dead_rows(c, &before, b);
  free_buffers(&before);
  if (session) {
    *session = s;
    *kept_plan = plan;
  } else {
    rg_session_destroy(s);
    release_device(b);
    rg_plan_destroy(plan);
  }
  return true;
}

/* ---- against the oracle ---- */

/* The values a step has read, where they still live. */
static inline double *read_floats(const graph_case *c, rg_session *s, int tensor) {
  const rgi_tensor *x = &c->forward->tensor[tensor];
  size_t bytes = (size_t)rgi_bytes(x), n = bytes / rg_dtype_size(x->dtype);
  void *data = ot_alloc(c->t, bytes + 4);
  float *f = ot_alloc(c->t, n * sizeof *f + 4);
  rg_error e = {0};
  if (rg_session_read(s, x->name, data, bytes, &e)) return NULL;
  rg_convert(RG_F32, f, x->dtype, data, n);
  double *d = ot_doubles(c->t, (int64_t)n + 1);
  for (size_t i = 0; i < n; i++) d[i] = f[i];
  return d;
}

static inline int in_tensor(const rgi_node *node, const char *port) {
  int p = rgi_in_port(node->op, port);
  return p < 0 ? -1 : rgi_in(node, p);
}

/* A choice against the oracle's on the very numbers the step has read. False: they are gone. */
static inline bool check_choice(const graph_case *c, rg_session *s, const rgi_node *node,
                                const int32_t *idx, const gref *r) {
  const rgi_tensor *q = &c->forward->tensor[in_tensor(node, "q")],
                   *k = &c->forward->tensor[in_tensor(node, "k")],
                   *out = &c->forward->tensor[node->out[0]];
  int lse = in_tensor(node, "lse"), cu_k = in_tensor(node, "cu_seqlens_k"),
      offset = in_tensor(node, "q_offset"), weight = in_tensor(node, "weight");
  ref_topk a = {.T = q->dim[0].c,
                .TK = k->dim[0].c,
                .B = c->p.B,
                .H = q->dim[1].c,
                .KH = k->dim[1].c,
                .D = q->dim[2].c};
  a.q = read_floats(c, s, in_tensor(node, "q"));
  a.k = read_floats(c, s, in_tensor(node, "k"));
  a.lse = lse < 0 ? NULL : read_floats(c, s, lse);
  a.weight = weight < 0 ? NULL : read_floats(c, s, weight);
  if (!a.q || !a.k || (lse >= 0 && !a.lse) || (weight >= 0 && !a.weight)) return false;
  a.cu = gref_ints(r, in_tensor(node, "cu_seqlens"));
  a.cu_k = cu_k < 0 ? NULL : gref_ints(r, cu_k);
  a.q_offset = offset < 0 ? NULL : gref_ints(r, offset);
  gref_topk_attrs(node, &a);
  int64_t farthest = a.T;
  for (int64_t b = 0; a.q_offset && b < a.B; b++)
    if (a.q_offset[b] + a.T > farthest) farthest = a.q_offset[b] + a.T;
  int64_t nblock = farthest / a.block + 1;
  int32_t *ref = ot_ints(c->t, a.T * a.KH * a.top_n + 1);
  double *scores = ot_doubles(c->t, a.T * a.KH * nblock + 1), logit;
  ref_topk_forward(&a, ref, scores, nblock, &logit);
  ot_tensor *got = OT_NEW(c->t, RG_I32, a.T, a.KH, out->dim[2].c);
  ot_set_ints(got, idx);
  const char *bad = ot_check_topk(c->t, got, a.cu[a.B], ref, scores, nblock, logit, 0, 0.99);
  cr_assert_null(bad, "%s: %s: %s", c->what, out->name, bad);
  return true;
}

/* Inputs and the chosen indices into the oracle; runs it. */
static inline void run_oracle(graph_case *c, const buffers *b, rg_session *s) {
  bool low = false, checked = true;
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
    if (rg_session_read(s, c->forward->tensor[id].name, idx, bytes, &e)) continue;
    gref_set_ints(r, id, idx);
    checked = check_choice(c, s, node, idx, r) && checked;
  }
  const char *unknown = gref_forward(r);
  cr_assert_null(unknown, "%s: the oracle has no op for %s", c->what, unknown);
  /* The oracle's own numbers upstream of a choice differ by roundings. */
  cr_assert_geq(gref_topk_overlap(r), low && checked ? 0.9 : 0.97,
                "%s: only %g of the indices agree", c->what, gref_topk_overlap(r));
  for (int i = 0; i < b->n; i++)
    if (b->info[i].role == RG_GRAD_IN)
      gref_seed(r, declared(c, &b->info[i])->tensor, doubles(c->t, &b->info[i], b->data[i]));
  gref_backward(r);
}

static inline double relative(const double *x, const double *ref, int64_t n, double floor) {
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

static inline double gate_of(bool gradient, rg_dtype worst) {
  static const double output[] = {[RG_F32] = 2e-6, [RG_F16] = 5e-4, [RG_BF16] = 4e-3};
  static const double grad[] = {[RG_F32] = 5e-6, [RG_F16] = 8e-4, [RG_BF16] = 6e-3};
  return gradient ? grad[worst] : output[worst];
}

static inline void compare_with_oracle(graph_case *c, const buffers *b, report *rep) {
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
  rg_plan_options o = {.set = set,
                       .nset = bindings(c, set),
                       .device = test_device(),
                       .profile_path = getenv("REGRAPH_TEST_PROFILE"),
                       .threads = 1,
                       .pack_seconds = 0.002};
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
    double slack = fmax(1, SLACK * depth);
    if (c->few_vary) slack = fmax(slack, sqrt((double)depth));
    double gate = gate_of(gradient, lowest) * slack,
           error = relative(x, ref, live_elements(c, t),
                            !gradient                          ? 1e-3
                            : lowest == RG_F32 && !c->few_vary ? 0.05
                                                               : 1);
    const double n = (double)live_elements(c, t);
    if (c->few_vary) gate *= n < 16 ? 5 : 1 + 4 / sqrt(2 * n);
    double *worst = gradient ? &rep->worst_gradient : &rep->worst_output;
    if (error / gate > *worst) *worst = error / gate;
    cr_assert_leq(error, gate, "%s: %s %s is off by %g, gate %g (%d nodes deep)", c->what,
                  gradient ? "gradient of" : "output", t->name, error, gate, depth);
  }
  drop(&initial);
  rg_plan_destroy(plan);
}

/* ---- a case through all its plans ---- */

static inline graph_case open_case(rg_context *ctx, ot *t, rg_spec *spec, pack p, uint64_t seed,
                                   const char *what) {
  rg_error e = {0};
  rg_binding set[3];
  graph_case c = {.t = t, .ctx = ctx, .spec = spec, .p = p, .seed = seed};
  snprintf(c.what, sizeof c.what, "%s", what);
  CR_OK(rgi_spec_elaborate(spec, set, bindings(&c, set), true, &c.forward, &e), &e);
  return c;
}

/* A policy that recomputes spec nodes with probability p and cuts heads into groups of `split` (0:
 * not). */
static inline const char *random_policy(graph_case *c, double p, int split) {
  char *text = ot_alloc(c->t, 8192);
  size_t n = (size_t)snprintf(text, 8192, "{ \"regraph_policy\": 1, \"recompute\": [");
  bool first = true;
  for (int i = 0; i < c->forward->norigin; i++) {
    const rgi_origin *o = &c->forward->origin[i];
    if (!(o->op->flags & RG_OP_RECOMPUTABLE) || strchr(o->name, '.') || ot_uniform(c->t) >= p)
      continue;
    n += (size_t)snprintf(text + n, 8192 - n, "%s\"%s\"", first ? "" : ", ", o->name);
    first = false;
  }
  n += (size_t)snprintf(text + n, 8192 - n, "]");
  if (split) n += (size_t)snprintf(text + n, 8192 - n, ", \"split_heads\": %d", split);
  snprintf(text + n, 8192 - n, " }");
  return text;
}

static inline void same_as(graph_case *c, const buffers *kept, run_how how, report *rep) {
  buffers b;
  char what[9000];
  rep->plans++;
  if (!run_plan(c, how, &b, NULL, NULL)) {
    rep->refused++;
    return;
  }
  snprintf(what, sizeof what, "%s, %s, threads %d%s%s%s%s", c->what,
           how.policy ? how.policy : "kept", how.threads, how.poison ? ", poisoned" : "",
           how.no_reuse ? ", no reuse" : "", how.no_lanes ? ", no lanes" : "",
           how.eager ? ", eager" : "");
  same_results(kept, &b, what);
  drop(&b);
}

/* Fewest heads on any port that has them; 0: none. */
static inline int fewest_heads(const graph_case *c) {
  int64_t least = 0;
  for (int n = 0; n < c->forward->nnode; n++) {
    const rgi_node *node = &c->forward->node[n];
    for (int p = 0; p < node->op->nin; p++)
      for (int i = node->in_begin[p]; i < node->in_begin[p + 1] && node->op->in[p].head_axis >= 0;
           i++) {
        int64_t heads = c->forward->tensor[node->in[i]].dim[node->op->in[p].head_axis].c;
        if (least == 0 || heads < least) least = heads;
      }
  }
  return (int)least;
}

/* The plain plan, compared with the oracle; its results. */
static inline buffers run_kept(graph_case *c, report *rep) {
  buffers kept;
  rg_session *s;
  rg_plan *plan;
  cr_assert(run_plan(c, (run_how){.threads = 2, .poison = true}, &kept, &s, &plan));
  run_oracle(c, &kept, s);
  rg_session_destroy(s);
  release_device(&kept);
  rg_plan_destroy(plan);
  compare_with_oracle(c, &kept, rep);
  return kept;
}

static inline void run_case(graph_case *c, report *rep) {
  buffers kept = run_kept(c, rep);
  same_as(c, &kept, (run_how){NULL, 1, .poison = true}, rep);
  same_as(c, &kept, (run_how){"{ \"regraph_policy\": 1, \"preset\": \"all\" }", 2, .poison = true},
          rep);
  same_as(c, &kept, (run_how){random_policy(c, 0.5, 0), 1, .poison = true}, rep);
  int heads = fewest_heads(c);
  /* Half of the time with heads cut, which makes what is copied part of a join. */
  if (!test_on_gpu()) {
    char *text = ot_alloc(c->t, 128);
    snprintf(text, 128, "{ \"regraph_policy\": 1, \"nodes\": { \"*\": \"offload\" }%s }",
             heads > 1 && c->seed % 2 ? ", \"split_heads\": 1" : "");
    same_as(c, &kept, (run_how){text, 2, .poison = true}, rep);
  }
  for (int split = 1; split < heads; split++) {
    if (heads % split) continue;
    same_as(c, &kept, (run_how){random_policy(c, 0, split), 2, .poison = true}, rep);
    same_as(c, &kept, (run_how){random_policy(c, 0.5, split), 1, .poison = true}, rep);
    same_as(c, &kept, (run_how){random_policy(c, 1, split), 2, .poison = true}, rep);
  }
  drop(&kept);
}

static inline void close_case(graph_case *c) {
  rgi_graph_destroy(c->forward);
}

/* One spec given as text. */
static inline void run_text(const char *text, pack p, uint64_t seed, const char *what,
                            report *rep) {
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

#endif
