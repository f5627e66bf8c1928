/* tests/unit/lower_case.h: plans for a GPU that is not there, and what has to hold of their
   launches and edges. Its rgk_map_make stands in for the driver's: include it once a program. */
#ifndef LOWER_CASE_H
#define LOWER_CASE_H

#include "../harness/graph_gen.h"
#include "../harness/lower.h"
#include "../harness/round.h"
#include "../../exec/plan.h"
#include "../../kernels/tma.h"
#include "run_util.h"
#include <unistd.h>

static int maps_made;

#ifdef REGRAPH_CUDA
/* In place of kernels/tma.c, which needs a driver: a map that says what it was made of. */
rg_status rgk_map_make(rgk_map *map, const rgk_map_of *of, rg_error *e) {
  memset(map, 0, sizeof *map);
  maps_made++;
  map->opaque[0] = (uint64_t)(uintptr_t)of->data;
  for (int i = 0; i < of->rank; i++) {
    if (of->box[i] < 1 || of->box[i] > 256 || of->dim[i] < 1)
      return rgi_fail(e, RG_E_INTERNAL, NULL, NULL, "a map's box of %d in an axis of %lld",
                      of->box[i], (long long)of->dim[i]);
    if (i > 0 && of->dim[i] > 1 &&
        of->stride[i] * (int64_t)rg_dtype_size((rg_dtype)of->dtype) % 16 != 0)
      return rgi_fail(e, RG_E_INTERNAL, NULL, NULL, "a map's stride is off 16 bytes");
    map->opaque[1 + i] = (uint64_t)of->dim[i];
    map->opaque[6 + i] = (uint64_t)of->stride[i];
    map->opaque[11] = map->opaque[11] * 257 + (uint64_t)of->box[i];
  }
  if ((uintptr_t)of->data % 16 != 0)
    return rgi_fail(e, RG_E_INTERNAL, NULL, NULL, "a map's address is off 16 bytes");
  return RG_OK;
}
#endif

/* ---- plans ---- */

typedef struct bench {
  ot *t;
  rg_context *ctx;
  rg_spec *spec;
  int64_t T, B;
  char older[64]; /* a profile of compute capability 8.6 */
  int asked, skipped, library;
} bench;

static inline bench open_bench(uint64_t seed) {
  rg_error e = {0};
  bench b = {.t = ot_begin(seed)};
  CR_OK(rg_context_create(NULL, &b.ctx, &e), &e);
  snprintf(b.older, sizeof b.older, "/tmp/regraph_older_XXXXXX");
  const int file = mkstemp(b.older);
  cr_assert_geq(file, 0);
  static const char text[] =
      "{ \"regraph_profile\": 1, \"name\": \"older\", \"doc\": \"a test's\", \"device\": "
      "\"cuda\",\n"
      "  \"compute_capability\": 86, \"multiprocessors\": 82, \"special_gops\": 1000, "
      "\"bandwidth_gbs\": "
      "900,\n"
      "  \"matrix_gflops\": { \"f32\": 20000, \"f16\": 100000, \"bf16\": 100000 },\n"
      "  \"step_us\": 3, \"memory\": \"24GB\", \"efficiency\": 0.5 }\n";
  cr_assert_eq(write(file, text, sizeof text - 1), (ssize_t)sizeof text - 1);
  close(file);
  return b;
}
static inline void close_bench(bench *b) {
  unlink(b->older);
  rg_spec_destroy(b->spec);
  rg_context_destroy(b->ctx);
  ot_end(b->t);
}

static inline void load_example(bench *b, const char *name, bool small) {
  static const char *const sets[][2] = {{"H", "4"},      {"KH", "2"},     {"D", "16"},
                                        {"DV", "8"},     {"kernel", "8"}, {"stride", "4"},
                                        {"block", "8"},  {"top_n", "3"},  {"local", "1"},
                                        {"window", "9"}, {"M", "24"}};
  rg_error e = {0};
  char path[512];
  rg_spec_destroy(b->spec);
  b->spec = NULL;
  snprintf(path, sizeof path, "%s/examples/%s.json", RG_SOURCE_DIR, name);
  CR_OK(rg_spec_load_file(b->ctx, path, NULL, 0, &b->spec, &e), &e);
  b->T = 4096, b->B = 3;
  if (!small) return;
  rg_binding set[RGI_COUNT(sets)];
  size_t n = 0;
  for (int i = 0; i < RGI_COUNT(sets); i++) { /* those that the spec has */
    rg_binding one = {sets[i][0], atoll(sets[i][1]), NULL};
    rg_spec *spec = NULL;
    if (rg_spec_load_file(b->ctx, path, &one, 1, &spec, NULL) == RG_OK) set[n++] = one;
    rg_spec_destroy(spec);
  }
  rg_spec_destroy(b->spec);
  CR_OK(rg_spec_load_file(b->ctx, path, set, n, &b->spec, &e), &e);
  b->T = 70, b->B = 4;
}

static inline void load_text(bench *b, const char *text) {
  rg_error e = {0};
  rg_spec_destroy(b->spec);
  b->spec = NULL;
  CR_OK(rg_spec_load_text(b->ctx, text, strlen(text), "text", NULL, 0, &b->spec, &e), &e);
  b->T = 48, b->B = 3;
}

static inline void load_random(bench *b, uint64_t seed) {
  ot *t = ot_begin(seed);
  load_text(b, graph_gen(t, (gen_options){.whole = seed % 3 == 0,
                                          .mixed = seed % 2,
                                          .stops = seed % 5 == 0,
                                          .nodes = 8}));
  ot_end(t);
}

static inline rg_plan *plan_of(bench *b, const char *policy, bool no_lanes, bool older) {
  rg_error e = {0};
  rg_policy *p = policy ? load_policy(b->ctx, policy) : NULL;
  rg_plan *plan = NULL;
  char profile[512];
  const rg_binding all[] = {{"T", b->T, NULL}, {"B", b->B, NULL}, {"S", 40, NULL}};
  snprintf(profile, sizeof profile, "%s/recompute/profiles/h200.json", RG_SOURCE_DIR);
  rg_plan_options o = {.set = all,
                       .device = "cuda",
                       .profile_path = older ? b->older : profile,
                       .no_lanes = no_lanes,
                       .pack_seconds = 0.1};
  for (o.nset = 3; o.nset > 0 && !plan; o.nset--) { /* not every spec has S and B */
    e = (rg_error){0};
    rg_plan_create(b->spec, p, &o, &plan, &e);
  }
  cr_assert(plan, "%s: %s", e.node, e.message);
  rg_policy_destroy(p);
  return plan;
}

static const char *const examples[] = {"nsa",
                                       "nsa_linear",
                                       "nsa_layer",
                                       "moba",
                                       "dense_causal",
                                       "sliding_window",
                                       "two_branch",
                                       "variants/gated_attention",
                                       "variants/infllm",
                                       "variants/msa",
                                       "variants/qsa"};
static const char *const policies[] = {NULL, "{ \"regraph_policy\": 1, \"preset\": \"all\" }",
                                       "{ \"regraph_policy\": 1, \"split_heads\": 1 }"};

static inline void report(const bench *b) {
  fprintf(stderr, "%d steps asked, %d skipped, %d products of a library seen by number only\n",
          b->asked, b->skipped, b->library);
#ifdef REGRAPH_CUDA
  cr_assert_eq(b->skipped, 0);
#endif
}

/* ---- launches ---- */

static inline const char *node_of(const rg_plan *plan, int32_t step) {
  return plan->graph->node[plan->step[step].node].name;
}

static inline void check_limits(const rg_plan *plan, const lo_launch *x) {
  const rg_launch *l = &x->launch;
  const char *name = node_of(plan, x->step);
#ifdef REGRAPH_CUDA
  cr_assert(l->function, "%s: no kernel", name);
#endif
  cr_assert_leq(l->size, 4096, "%s: %zu bytes of parameters", name, l->size);
  cr_assert(l->grid[0] <= INT32_MAX && l->grid[1] <= 65535 && l->grid[2] <= 65535,
            "%s: grid %u %u %u", name, l->grid[0], l->grid[1], l->grid[2]);
  const uint32_t *block = l->block;
  cr_assert(block[0] && block[1] && block[2] && block[0] * block[1] * block[2] <= 1024 &&
                block[2] <= 64,
            "%s: block %u %u %u", name, block[0], block[1], block[2]);
  const uint32_t room = plan->gpu.cc >= 90 ? 227 << 10 : 99 << 10;
  cr_assert_leq(l->shared, room, "%s: %u bytes of shared memory", name, l->shared);
  cr_assert(l->cluster <= 8 && (l->cluster < 2 || l->grid[0] % l->cluster == 0),
            "%s: cluster %u, grid %u", name, l->cluster, l->grid[0]);
}

/* Is the address inside (or at the end of) an argument or the workspace of the step? */
static inline bool touches(const rg_plan *plan, int32_t i, uint64_t word, int set) {
  const rgi_step *s = &plan->step[i];
  for (int k = 0; k <= s->nin + s->nout; k++) {
    const bool work = k == s->nin + s->nout;
    const rgi_place at = work ? (rgi_place){RGI_AT_SCRATCH, s->workspace} : s->place[k];
    const int64_t size = work ? s->workspace_size : lo_bytes(s, k);
    if (at.bind == RGI_AT_NOTHING || (work && !size)) continue;
    const uint64_t from = (uint64_t)(uintptr_t)lo_address(at, set);
    if (word >= from && word <= from + (uint64_t)size) return true;
  }
  return false;
}

/* One end is of the host's block, the other is not; both stay within their tensors, which are
 * copied whole, and both follow what is bound. */
static inline void check_copy(const rg_plan *plan, const lo_launch *x, const lo_launch *y,
                              const lo_launch *z, const char *what) {
  const rgi_step *s = &plan->step[x->step];
  const rg_copy *c = &x->copy;
  const char *name = node_of(plan, x->step);
  cr_assert(y->copies && z->copies && c->width == z->copy.width && c->rows == z->copy.rows,
            "%s, %s", what, name);
  for (int k = 0; k < 2; k++) {
    const char *at = k ? c->to : c->from, *again = k ? y->copy.to : y->copy.from,
               *moved = k ? z->copy.to : z->copy.from;
    const size_t pitch = k ? c->to_pitch : c->from_pitch;
    const char *first = lo_address(s->place[k], 0);
    cr_assert_eq(s->place[k].bind == RGI_AT_HOST, c->to_host == (k == 1), "%s, %s", what, name);
    cr_assert(at == again && at - first == moved - lo_address(s->place[k], 1), "%s, %s", what,
              name);
    cr_assert(at >= first && at + (c->rows - 1) * pitch + c->width <= first + lo_bytes(s, k) &&
                  pitch >= c->width,
              "%s, %s: %zu rows of %zu bytes, %zu apart", what, name, c->rows, c->width, pitch);
  }
}

static inline void check_launches(bench *b, const rg_plan *plan, const char *what) {
  lo_list first, again, moved;
  OT_OK(lo_ask(b->t, plan, 0, &first));
  OT_OK(lo_ask(b->t, plan, 0, &again));
  OT_OK(lo_ask(b->t, plan, 1, &moved));
  b->asked += plan->nstep;
  b->skipped += first.skipped;
  cr_assert(first.n == again.n && first.n == moved.n, "%s: %d, %d, %d launches", what, first.n,
            again.n, moved.n);
  for (int i = 0; i < first.n; i++) {
    const lo_launch *x = &first.at[i], *y = &again.at[i], *z = &moved.at[i];
    const rg_launch *l = &x->launch;
    const char *name = node_of(plan, x->step);
    cr_assert(x->step == y->step && x->step == z->step && x->library == y->library &&
                  x->library == z->library,
              "%s, %s", what, name);
    b->library += x->library;
    if (x->copies) check_copy(plan, x, y, z, what);
    if (x->library || x->copies) continue;
    check_limits(plan, x);
    for (int k = 0; k < 2; k++) {
      const rg_launch *m = k ? &z->launch : &y->launch;
      cr_assert(l->function == m->function && l->size == m->size && l->shared == m->shared &&
                    l->cluster == m->cluster && memcmp(l->grid, m->grid, sizeof l->grid) == 0 &&
                    memcmp(l->block, m->block, sizeof l->block) == 0,
                "%s, %s: another launch when asked again", what, name);
    }
    for (size_t w = 0; w < (l->size + 7) / 8; w++) {
      cr_assert(x->params[w] == y->params[w],
                "%s, %s (%s): word %zu of parameters is %llx, asked again %llx", what, name,
                plan->graph->node[plan->step[x->step].node].op->name, w,
                (unsigned long long)x->params[w], (unsigned long long)y->params[w]);
      if (lo_is_address(x->params[w], 0)) {
        cr_assert(touches(plan, x->step, x->params[w], 0), "%s, %s: word %zu points elsewhere",
                  what, name, w);
        const uint64_t base = (uint64_t)(uintptr_t)lo_address((rgi_place){RGI_AT_NOTHING, 0}, 0),
                       base1 = (uint64_t)(uintptr_t)lo_address((rgi_place){RGI_AT_NOTHING, 0}, 1);
        cr_assert(x->params[w] - base == z->params[w] - base1, "%s, %s: word %zu does not follow",
                  what, name, w);
      } else {
        cr_assert(x->params[w] == z->params[w],
                  "%s, %s: word %zu changes with addresses, %llx to %llx", what, name, w,
                  (unsigned long long)x->params[w], (unsigned long long)z->params[w]);
      }
    }
  }
}

/* Tensor maps of a plan; without nvcc, the steps that would have made them. */
static inline int maps_of(bench *b, const rg_plan *plan) {
  lo_list list;
  maps_made = 0;
  OT_OK(lo_ask(b->t, plan, 0, &list));
  return maps_made + list.skipped;
}

/* ---- edges ---- */

/* Bytes [from, to) of a buffer, all of which a step reads or writes. */
typedef struct run {
  int32_t bind;
  int64_t from, to;
  bool write;
} run;
typedef struct runs {
  run *at;
  int n;
} runs;

static inline void list_runs(const rg_arg *a, int axis, rgi_place at, bool write, runs *out) {
  const int64_t size = (int64_t)rg_dtype_size(a->dtype);
  int64_t dense = 1; /* elements, if all axes from here on lie without holes */
  for (int i = a->rank - 1; i >= axis && dense; i--)
    dense = a->dim[i] == 1 || a->stride[i] == dense ? dense * a->dim[i] : 0;
  for (int i = 0; i < a->rank; i++)
    if (a->dim[i] == 0) return;
  if (dense) {
    if (out->at) out->at[out->n] = (run){at.bind, at.offset, at.offset + dense * size, write};
    out->n++;
    return;
  }
  for (int64_t i = 0; i < a->dim[axis]; i++) {
    list_runs(a, axis + 1, at, write, out);
    at.offset += a->stride[axis] * size;
  }
}

static inline void runs_of_step(const rgi_step *s, runs *out) {
  for (int k = 0; k < s->nin + s->nout; k++)
    if (s->place[k].bind != RGI_AT_NOTHING)
      list_runs(k < s->nin ? &s->call.in[k] : &s->call.out[k - s->nin], 0, s->place[k], k >= s->nin,
                out);
  if (s->workspace_size) {
    if (out->at)
      out->at[out->n] = (run){RGI_AT_SCRATCH, s->workspace, s->workspace + s->workspace_size, true};
    out->n++;
  }
}

static inline int by_place(const void *a, const void *b) {
  const run *x = a, *y = b;
  if (x->bind != y->bind) return x->bind < y->bind ? -1 : 1;
  return x->from < y->from ? -1 : x->from > y->from;
}

/* Both in order of place. */
static inline bool clash(const runs *x, const runs *y) {
  for (int i = 0, from = 0; i < x->n; i++) {
    const run *a = &x->at[i];
    while (from < y->n && (y->at[from].bind < a->bind ||
                           (y->at[from].bind == a->bind && y->at[from].from < a->from - (1 << 22))))
      from++;
    for (int k = from; k < y->n && y->at[k].bind == a->bind && y->at[k].from < a->to; k++)
      if (y->at[k].to > a->from && (a->write || y->at[k].write)) return true;
  }
  return false;
}

/* Counts pairs of steps with no way between them; *wrong says what such a pair should not do. */
static inline int count_apart(ot *t, const rg_plan *plan, const char **wrong) {
  const int n = plan->nstep;
  /* before[j * n + i]: i has run when j starts */
  bool *before = ot_alloc(t, (size_t)n * (size_t)n + 1);
  runs *all = ot_alloc(t, (size_t)(n + 1) * sizeof *all);
  int apart = 0;
  for (int j = 0; j < n; j++) {
    for (int k = 0; k < 2; k++) { /* count, then list */
      if (k) all[j].at = ot_alloc(t, (size_t)(all[j].n + 1) * sizeof *all[j].at);
      all[j].n = 0;
      runs_of_step(&plan->step[j], &all[j]);
    }
    qsort(all[j].at, (size_t)all[j].n, sizeof *all[j].at, by_place);
    for (const int32_t *p = plan->after[j]; *p >= 0; p++) {
      if (*p >= j || (*p >= plan->nforward) != (j >= plan->nforward))
        *wrong = "waits for what comes later";
      before[j * n + *p] = true;
      for (int i = 0; i < *p; i++) before[j * n + i] |= before[*p * n + i];
    }
  }
  for (int j = 0; j < n; j++)
    for (int i = j < plan->nforward ? 0 : plan->nforward; i < j; i++) {
      if (before[j * n + i]) continue;
      apart++;
      if (plan->lane[i] == plan->lane[j])
        *wrong =
            ot_text(t, "%s and %s share a lane and no path", node_of(plan, i), node_of(plan, j));
      if (plan->step[i].comm_size && plan->step[j].comm_size)
        *wrong =
            ot_text(t, "collectives %s and %s may run at once", node_of(plan, i), node_of(plan, j));
      if (clash(&all[i], &all[j]))
        *wrong = ot_text(t, "%s and %s may run at once and touch the same bytes", node_of(plan, i),
                         node_of(plan, j));
    }
  return apart;
}
static inline int check_edges(ot *t, const rg_plan *plan, const char *what) {
  const char *wrong = NULL;
  int apart = count_apart(t, plan, &wrong);
  cr_assert(!wrong, "%s: %s", what, wrong);
  return apart;
}

#endif
