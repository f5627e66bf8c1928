/* tests/unit/test_lower_cuda.c: from a plan to the launches of a GPU, checked without one.

     launches   are legal, say the same when asked again, point nowhere but into the bytes of their
                node's tensors and workspace, and change nothing but such pointers when everything
                is bound elsewhere
     edges      leave no two steps side by side that touch the same byte, one of them writing
     lanes      cost memory where they may, and are given up where the policy asks for less
     older GPUs get no kernel that has the copy engine write, which initcheck does not follow

   Without nvcc kernels have no addresses and tensor maps cannot be made: steps that need them are
   skipped and counted.
 */
#include "../harness/graph_gen.h"
#include "../harness/lower.h"
#include "../harness/random_spec.h"
#include "../../exec/plan.h"
#include "../harness/round.h"
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

static bench open_bench(uint64_t seed) {
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
static void close_bench(bench *b) {
  unlink(b->older);
  rg_spec_destroy(b->spec);
  rg_context_destroy(b->ctx);
  ot_end(b->t);
}

static void load_example(bench *b, const char *name, bool small) {
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

static void load_text(bench *b, const char *text) {
  rg_error e = {0};
  rg_spec_destroy(b->spec);
  b->spec = NULL;
  CR_OK(rg_spec_load_text(b->ctx, text, strlen(text), "text", NULL, 0, &b->spec, &e), &e);
  b->T = 48, b->B = 3;
}

static void load_random(bench *b, uint64_t seed) {
  ot *t = ot_begin(seed);
  load_text(b, graph_gen(t, (gen_options){.whole = seed % 3 == 0, .mixed = seed % 2, .nodes = 8}));
  ot_end(t);
}

static rg_plan *plan_of(bench *b, const char *policy, bool no_lanes, bool older) {
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

/* ---- launches ---- */

static const char *node_of(const rg_plan *plan, int32_t step) {
  return plan->graph->node[plan->step[step].node].name;
}

static void check_limits(const rg_plan *plan, const lo_launch *x) {
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
static bool touches(const rg_plan *plan, int32_t i, uint64_t word, int set) {
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
static void check_copy(const rg_plan *plan, const lo_launch *x, const lo_launch *y,
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

static void check_launches(bench *b, const rg_plan *plan, const char *what) {
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

static int check_edges(ot *t, const rg_plan *plan, const char *what);

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

static void report(const bench *b) {
  fprintf(stderr, "%d steps asked, %d skipped, %d products of a library seen by number only\n",
          b->asked, b->skipped, b->library);
#ifdef REGRAPH_CUDA
  cr_assert_eq(b->skipped, 0);
#endif
}

Test(lower_cuda, launches_of_examples) {
  bench b = open_bench(1);
  for (int i = 0; i < RGI_COUNT(examples); i++)
    for (int small = 0; small < 2; small++) {
      load_example(&b, examples[i], small);
      for (int k = 0; k < RGI_COUNT(policies); k++)
        for (int older = 0; older < 2; older++) {
          rg_plan *plan = plan_of(&b, policies[k], false, older);
          check_launches(&b, plan, examples[i]);
          rg_plan_destroy(plan);
        }
    }
  report(&b);
  close_bench(&b);
}

/* A serving step, whose lengths and tables only the device knows: caches as wide as models have
 * them, and small ones; rows for prompts, and for single tokens. */
Test(lower_cuda, launches_over_pages) {
  static const char *const name[] = {"nsa_serve", "serve_model"};
  static const rg_binding set[2][10] = {{{"M", 24, NULL},
                                         {"P", 90, NULL},
                                         {"F", 3, NULL},
                                         {"H", 4, NULL},
                                         {"KH", 2, NULL},
                                         {"D", 10, NULL},
                                         {"DV", 6, NULL},
                                         {"kernel", 8, NULL},
                                         {"stride", 8, NULL},
                                         {"block", 8, NULL}},
                                        {{"M", 24, NULL},
                                         {"P", 90, NULL},
                                         {"forks", 3, NULL},
                                         {"layers", 2, NULL},
                                         {"V", 50, NULL},
                                         {"H", 4, NULL},
                                         {"KH", 2, NULL},
                                         {"D", 16, NULL},
                                         {"DV", 8, NULL},
                                         {"W", 24, NULL}}};
  bench b = open_bench(9);
  int all = 0;
  for (int i = 0; i < 2; i++)
    for (int small = 0; small < 2; small++)
      for (int k = 0; k < 4; k++) {
        rg_error e = {0};
        char path[512];
        const bool older = k % 2;
        b.B = k < 2 || small ? 4 : i ? 100 : 60; /* or enough to fill a GPU's multiprocessors */
        b.T = k < 2 ? 70 : b.B;
        snprintf(path, sizeof path, "%s/examples/%s.json", RG_SOURCE_DIR, name[i]);
        rg_spec_destroy(b.spec);
        CR_OK(rg_spec_load_file(b.ctx, path, set[i], small ? 10 : 3 + i, &b.spec, &e), &e);
        rg_plan *plan = plan_of(&b, NULL, false, older);
        check_launches(&b, plan, name[i]);
        check_edges(b.t, plan, name[i]);
        for (int n = 0; n < plan->graph->nnode; n++)
          all += strcmp(plan->graph->node[n].op->name, "paged_nsa") == 0;
        rg_plan_destroy(plan);
      }
  cr_assert_gt(all, 0);
  report(&b);
  close_bench(&b);
}

/* A batch shared out among ranks: collectives, tables, slots. Nothing of them moves with what is
 * bound but the rows that they pack and unpack, and they run in one order. */
Test(lower_cuda, ranks) {
  static const char *const of_ranks[] = {
      "{ \"regraph_policy\": 1, \"cp\": { \"ranks\": 4 } }",
      "{ \"regraph_policy\": 1, \"cp\": { \"ranks\": 2, \"mode\": 2, \"wire\": \"bf16\" }, "
      "\"preset\": \"all\", \"split_heads\": 1 }"};
  bench b = open_bench(8);
  for (int i = 0; i < RGI_COUNT(examples); i++)
    for (int small = 0; small < 2; small++) {
      load_example(&b, examples[i], small);
      if (small) b.T = 256;
      for (int k = 0; k < RGI_COUNT(of_ranks); k++) {
        rg_plan *plan = plan_of(&b, of_ranks[k], false, k);
        const int before = b.library;
        check_launches(&b, plan, examples[i]);
        cr_assert_gt(b.library, before, "%s: no collective", examples[i]);
        check_edges(b.t, plan, examples[i]);
        rg_plan_destroy(plan);
      }
    }
  report(&b);
  close_bench(&b);
}

/* Lengths counted in merged rows, and a copy before the token axis moves. */
Test(lower_cuda, launches_behind_views) {
  static const char text[] =
      "{ \"regraph\": 1, \"inputs\": { \"x\": { \"shape\": [\"T\", 2, 8], \"dtype\": \"bf16\", "
      "\"grad\": "
      "true }, "
      "\"w\": { \"shape\": [16, 8], \"dtype\": \"bf16\", \"grad\": true }, "
      "\"cu\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } }, \"nodes\": ["
      "{ \"name\": \"p\", \"op\": \"silu\", \"in\": { \"x\": \"x\", \"cu_seqlens\": \"cu\" } }, "
      "{ \"name\": \"r\", \"op\": \"reshape\", \"in\": { \"x\": \"x\" }, \"out\": { \"y\": \"m\" "
      "}, "
      "\"attrs\": { \"shape\": [-1, 8] } }, "
      "{ \"name\": \"t\", \"op\": \"transpose\", \"in\": { \"x\": \"x\" }, \"out\": { \"y\": \"t\" "
      "}, "
      "\"attrs\": { \"perm\": [1, 0, 2] } }, "
      "{ \"name\": \"l\", \"op\": \"linear\", \"in\": { \"x\": \"m\", \"w\": \"w\" }, \"out\": { "
      "\"y\": "
      "\"y\" } }"
      " ], \"outputs\": { \"y\": \"y\", \"t\": \"t\" } }";
  bench b = open_bench(3);
  rg_error e = {0};
  load_text(&b, text);
  for (int older = 0; older < 2; older++) {
    rg_plan *plan = plan_of(&b, NULL, false, older);
    rg_text steps;
    CR_OK(rg_plan_write(plan, "steps", &steps, &e), &e);
    cr_assert(strstr(steps.data, "scale_lengths") && strstr(steps.data, "live"), "%s", steps.data);
    rg_text_destroy(&steps);
    check_launches(&b, plan, "views");
    rg_plan_destroy(plan);
  }
  report(&b);
  close_bench(&b);
}

Test(lower_cuda, launches_of_random_graphs) {
  bench b = open_bench(2);
  uint64_t first = round_seed(500, 24);
  for (uint64_t seed = first; seed < first + 24; seed++) {
    char what[32];
    snprintf(what, sizeof what, "random graph %d", (int)seed);
    load_random(&b, seed);
    rg_plan *plan = plan_of(&b, policies[seed / 2 % 2], false, seed % 4 == 0);
    check_launches(&b, plan, what);
    rg_plan_destroy(plan);
  }
  first = round_seed(1, 8);
  /* others: linear, silu, mul and add alone */
  for (uint64_t seed = first; seed < first + 8; seed++) {
    rg_error e = {0};
    uint64_t state = seed;
    rg_spec_destroy(b.spec);
    CR_OK(rgi_random_spec(b.ctx, &state, 20, &b.spec, &e), &e);
    rg_plan *plan = plan_of(&b, policies[seed % 2], false, seed % 4 == 0);
    check_launches(&b, plan, "linear, silu, mul, add");
    rg_plan_destroy(plan);
  }
  report(&b);
  close_bench(&b);
}

/* ---- for initcheck ---- */

/* Tensor maps of a plan; without nvcc, the steps that would have made them. */
static int maps_of(bench *b, const rg_plan *plan) {
  lo_list list;
  maps_made = 0;
  OT_OK(lo_ask(b->t, plan, 0, &list));
  return maps_made + list.skipped;
}

static int step_of(const rg_plan *plan, const char *op) {
  for (int32_t i = 0; i < plan->nstep; i++)
    if (strcmp(plan->graph->node[plan->step[i].node].op->name, op) == 0) return i;
  return -1;
}

/* Where one gradient takes K's and V's by kernels that make them apart, both are summed before the
 * sum so far: it is looked at once, at the end. Otherwise cut and whole graphs differ in a bit. */
Test(lower_cuda, a_sum_so_far_comes_last) {
  static const char text[] =
      "{ \"regraph\": 1, \"inputs\": { \"q\": { \"shape\": [\"T\", 4, 16], \"dtype\": \"f32\" }, "
      "\"k\": { \"shape\": [\"T\", 2, 16], \"dtype\": \"f32\", \"grad\": \"accumulate\" }, "
      "\"idx\": { \"shape\": [\"T\", 2, 3], \"dtype\": \"i32\" }, "
      "\"cu\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } }, \"nodes\": ["
      "{ \"name\": \"a\", \"op\": \"slc_attn\", \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": "
      "\"k\", "
      "\"idx\": \"idx\", \"cu_seqlens\": \"cu\" }, \"out\": { \"o\": \"o\" }, "
      "\"attrs\": { \"block\": 8 } } ], \"outputs\": { \"o\": \"o\" } }";
  bench b = open_bench(4);
  load_text(&b, text);
  rg_plan *plan = plan_of(&b, NULL, false, false);
  const int i = step_of(plan, "slc_attn.bwd");
  cr_assert_geq(i, 0);
  const rgi_step *s = &plan->step[i];
  const uint64_t sum = (uint64_t)(uintptr_t)lo_address(s->place[s->nin + s->call.out_begin[1]], 0);
  lo_list list;
  int n = 0, of_sum = 0, last = 0;
  OT_OK(lo_ask(b.t, plan, 0, &list));
  for (int k = 0; k < list.n; k++) {
    const lo_launch *x = &list.at[k];
    if (x->step != i || x->library || x->copies) continue;
    bool found = false;
    for (size_t w = 0; w < x->launch.size / sizeof *x->params; w++) found |= x->params[w] == sum;
    n++, of_sum += found, last = found ? n : last;
  }
  cr_assert_gt(n, 2);
  cr_assert(of_sum == 1 && last == n, "%d of %d launches take it, the last of them %d", of_sum, n,
            last);
  rg_plan_destroy(plan);
  close_bench(&b);
}

/* initcheck takes what the copy engine stores for unwritten. Of test_gpu_random.c's seed 80559 it
 * therefore reports the first ordinary read of cmp_attn's o (24 wide, by wgmma, sixteen rows a
 * store): silu's, 16 bytes a thread. So tests/gpu_sanitize.sh has whole graphs planned for a GPU
 * without one; then no step may need a tensor map. */
Test(lower_cuda, initcheck_sees_all_writes) {
  const uint64_t seed = 80559;
  bench b = open_bench(3);
  ot *t = ot_begin(seed);
  gen_options o = {.large = true, .whole = ot_uniform(t) < 0.15, .mixed = ot_uniform(t) < 0.25};
  o.nodes = 4 + (int)ot_below(t, 12);
  load_text(&b, graph_gen(t, o));
  b.T = 482, b.B = 8;
  for (int older = 0; older < 2; older++) {
    rg_plan *plan = plan_of(&b, NULL, false, older);
    const int writer = step_of(plan, "cmp_attn"), reader = step_of(plan, "silu");
    cr_assert(writer >= 0 && reader > writer, "the seed draws another graph");
    const rgi_node *silu = &plan->graph->node[plan->step[reader].node],
                   *attn = &plan->graph->node[plan->step[writer].node];
    cr_assert_eq(silu->in[0], attn->out[0], "silu reads something else");
    const int maps = maps_of(&b, plan);
    if (older)
      cr_assert_eq(maps, 0, "%d tensor maps for an older GPU", maps);
    else if (strcmp(rgi_plan_path(plan, writer), "wgmma") == 0)
      cr_assert_gt(maps, 0);
    else
      fprintf(stderr, "this build has no wgmma kernel for f16: nothing to compare with\n");
    rg_plan_destroy(plan);
  }
  for (int i = 0; i < RGI_COUNT(examples); i++) {
    load_example(&b, examples[i], true);
    rg_plan *plan = plan_of(&b, policies[1], false, true);
    cr_assert_eq(maps_of(&b, plan), 0, "%s", examples[i]);
    rg_plan_destroy(plan);
  }
  ot_end(t);
  close_bench(&b);
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

static void list_runs(const rg_arg *a, int axis, rgi_place at, bool write, runs *out) {
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

static void runs_of_step(const rgi_step *s, runs *out) {
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

static int by_place(const void *a, const void *b) {
  const run *x = a, *y = b;
  if (x->bind != y->bind) return x->bind < y->bind ? -1 : 1;
  return x->from < y->from ? -1 : x->from > y->from;
}

/* Both in order of place. */
static bool clash(const runs *x, const runs *y) {
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
static int count_apart(ot *t, const rg_plan *plan, const char **wrong) {
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
static int check_edges(ot *t, const rg_plan *plan, const char *what) {
  const char *wrong = NULL;
  int apart = count_apart(t, plan, &wrong);
  cr_assert(!wrong, "%s: %s", what, wrong);
  return apart;
}

Test(lower_cuda, edges_of_examples) {
  bench b = open_bench(3);
  for (int i = 0; i < RGI_COUNT(examples); i++) {
    load_example(&b, examples[i], true);
    for (int k = 0; k < RGI_COUNT(policies); k++)
      for (int no_lanes = 0; no_lanes < 2; no_lanes++) {
        rg_plan *plan = plan_of(&b, policies[k], no_lanes, false);
        int apart = check_edges(b.t, plan, examples[i]);
        if (i == 0 && k == 0 && !no_lanes) cr_assert_gt(apart, 0, "nsa has no branches");
        rg_plan_destroy(plan);
      }
  }
  close_bench(&b);
}

/* Copies of what is offloaded: they run one by one, on a lane that nothing else takes, beside what
 * computes; all bytes of a tensor leave once and come back once. */
static void check_offload(bench *b, const rg_plan *plan, const char *what) {
  lo_list list;
  int64_t bytes[2] = {0, 0}, moved[2] = {0, 0};
  check_launches(b, plan, what);
  check_edges(b->t, plan, what);
  for (int32_t i = 0; i < plan->nstep; i++) {
    const bool backward = i >= plan->nforward;
    for (int32_t k = backward ? plan->nforward : 0; k < i; k++) {
      const bool one = rgi_is_copy(plan->graph, plan->step[i].node),
                 other = rgi_is_copy(plan->graph, plan->step[k].node);
      cr_assert(one == other || plan->lane[i] != plan->lane[k], "%s: %s and %s share a lane", what,
                node_of(plan, i), node_of(plan, k));
      cr_assert(!one || !other || plan->lane[i] == plan->lane[k], "%s: two lanes of copies", what);
    }
    if (rgi_is_copy(plan->graph, plan->step[i].node))
      bytes[backward] +=
          rgi_bytes(&plan->graph->tensor[plan->graph->node[plan->step[i].node].out[0]]);
  }
  OT_OK(lo_ask(b->t, plan, 0, &list));
  for (int i = 0; i < list.n; i++)
    if (list.at[i].copies) {
      const rg_copy *c = &list.at[i].copy;
      cr_assert_eq(c->to_host, list.at[i].step < plan->nforward);
      moved[!c->to_host] += (int64_t)(c->width * c->rows);
    }
  cr_assert(bytes[0] == moved[0] && bytes[1] == moved[1], "%s", what);
  cr_assert(bytes[0] == bytes[1] && bytes[0] <= plan->sizes.host &&
                bytes[0] + 512 * plan->nstep >= plan->sizes.host,
            "%s: %lld leave, %lld come back, %lld wait", what, (long long)bytes[0],
            (long long)bytes[1], (long long)plan->sizes.host);
}

static const char *const offloads[] = {
    "{ \"regraph_policy\": 1, \"nodes\": { \"*\": \"offload\" } }",
    "{ \"regraph_policy\": 1, \"nodes\": { \"*\": \"offload\" }, \"split_heads\": 1 }",
    "{ \"regraph_policy\": 1, \"nodes\": { \"*o*\": \"offload\" }, \"preset\": \"all\" }"};

Test(lower_cuda, offload_of_examples) {
  bench b = open_bench(11);
  for (int i = 0; i < RGI_COUNT(examples); i++)
    for (int small = 0; small < 2; small++) {
      load_example(&b, examples[i], small);
      for (int k = 0; k < (small ? RGI_COUNT(offloads) : 1); k++) {
        rg_plan *plan = plan_of(&b, offloads[k], false, k == 1);
        if (i < 3) cr_assert_gt(plan->sizes.host, 0, "%s", examples[i]);
        check_offload(&b, plan, examples[i]);
        rg_plan_destroy(plan);
      }
    }
  report(&b);
  close_bench(&b);
}

Test(lower_cuda, offload_of_random_graphs) {
  bench b = open_bench(12);
  const uint64_t first = round_seed(800, 16);
  for (uint64_t seed = first; seed < first + 16; seed++) {
    load_random(&b, seed);
    rg_plan *plan = plan_of(&b, offloads[0], false, seed % 4 == 0);
    check_offload(&b, plan, "a random graph");
    rg_plan_destroy(plan);
  }
  report(&b);
  close_bench(&b);
}

/* Layers one after the other, times by a profile of our own: a copy of an early layer runs beside
 * the later ones, takes its bytes with it for as long as it lasts, and costs nothing; with a link
 * so slow that it lasts longer than all that is computed, the rest of it is waited for. */
Test(lower_cuda, windows) {
  bench b = open_bench(13);
  double wait[3];
  int leaves[3];
  static const double gbs[3] = {1e9, 900, 1}; /* of the host's link */
  for (int k = 0; k < 3; k++) {
    char text[1024];
    snprintf(text, sizeof text,
             "{ \"regraph_profile\": 1, \"device\": \"cuda\", \"special_gops\": 1000, "
             "\"bandwidth_gbs\": 900, \"host_gbs\": %g, \"memory\": \"24GB\", \"step_us\": 3, "
             "\"compute_capability\": 86, "
             "\"matrix_gflops\": { \"f32\": 20000, \"f16\": 100000, \"bf16\": 100000 } }",
             gbs[k]);
    FILE *f = fopen(b.older, "w");
    cr_assert(f && fputs(text, f) >= 0 && fclose(f) == 0);
    rg_spec_destroy(b.spec);
    char spec[4096], *at = spec;
    at += sprintf(at, "{ \"regraph\": 1, \"inputs\": { \"x0\": { \"shape\": [\"T\", 64], "
                      "\"dtype\": \"f32\", \"grad\": true } }, \"nodes\": [");
    for (int i = 0; i < 12; i++)
      at += sprintf(at,
                    "%s{ \"name\": \"n%d\", \"op\": \"silu\", \"in\": { \"x\": \"x%d\" }, "
                    "\"out\": { \"y\": \"x%d\" } }",
                    i ? ", " : "", i, i, i + 1);
    sprintf(at, "], \"outputs\": { \"y\": \"x12\" } }");
    b.spec = load_spec(b.ctx, spec);
    b.T = 1 << 16;
    rg_plan *plan =
        plan_of(&b, "{ \"regraph_policy\": 1, \"nodes\": { \"n2\": \"offload\" } }", false, true);
    check_offload(&b, plan, "windows");
    wait[k] = plan->offload_ms[0] + plan->offload_ms[1];
    int copy = -1, reader = -1;
    leaves[k] = 0;
    while (!rgi_is_copy(plan->graph, plan->step[leaves[k]].node)) leaves[k]++;
    for (int32_t i = plan->nforward; i < plan->nstep; i++) {
      const rgi_node *n = &plan->graph->node[plan->step[i].node];
      if (rgi_is_copy(plan->graph, plan->step[i].node)) copy = i;
      if (copy >= 0 && reader < 0 && strcmp(n->name, "n3.bwd") == 0) reader = i;
    }
    cr_assert(copy >= 0 && reader > copy, "n3.bwd is to read what came back");
    if (k == 0) cr_assert_leq(reader, copy + 2, "a short copy begins while the node before runs");
    if (k == 2)
      cr_assert_eq(copy, plan->nforward, "one that takes for ever is as early as it gets");
    rg_plan_destroy(plan);
  }
  cr_assert_eq(wait[0], 0);
  cr_assert_eq(wait[1], 0);
  cr_assert_gt(wait[2], 2 * 16 - 1.0, "16 MiB at 1 GB/s either way: %g ms", wait[2]);
  cr_assert(leaves[0] <= 4 && leaves[1] >= leaves[0] && leaves[1] < 12 && leaves[2] == 12,
            "the copy is over at step %d, %d, %d", leaves[0], leaves[1], leaves[2]);
  close_bench(&b);
}

/* A budget that may be met by offloading is, where copies hide: several layers, the time of nothing
 * computed again. */
Test(lower_cuda, offload_for_a_budget) {
  bench b = open_bench(14);
  rg_error e = {0};
  const rg_binding few = {"layers", 2, NULL};
  CR_OK(rg_spec_load_file(b.ctx, RG_SOURCE_DIR "/examples/nsa_model.json", &few, 1, &b.spec, &e),
        &e);
  b.T = 8192, b.B = 3;
  rg_plan *kept = plan_of(&b, NULL, true, false);
  char policy[2][256];
  for (int host = 0; host < 2; host++)
    snprintf(policy[host], sizeof *policy,
             "{ \"regraph_policy\": 1, \"budget\": %lld, \"host\": %d }",
             (long long)(kept->sizes.predicted_peak - (16 << 20)), host ? 256 << 20 : 0);
  rg_plan *alone = plan_of(&b, policy[0], false, false),
          *plan = plan_of(&b, policy[1], false, false);
  cr_assert(alone->choice->extra_ms > 0 && alone->sizes.host == 0);
  cr_assert_eq(plan->choice->extra_ms + plan->choice->wait_ms, 0);
  cr_assert(plan->sizes.host > 0 && plan->sizes.host <= 256 << 20);
  cr_assert_leq(plan->sizes.predicted_peak, kept->sizes.predicted_peak - (16 << 20));
  check_offload(&b, plan, "nsa_model");
  rg_plan_destroy(plan);
  rg_plan_destroy(alone);
  rg_plan_destroy(kept);
  close_bench(&b);
}

Test(lower_cuda, edges_of_random_graphs) {
  bench b = open_bench(4);
  int apart = 0;
  uint64_t first = round_seed(600, 40);
  for (uint64_t seed = first; seed < first + 40; seed++) {
    char what[32];
    snprintf(what, sizeof what, "random graph %d", (int)seed);
    load_random(&b, seed);
    for (int no_lanes = 0; no_lanes < 2; no_lanes++) {
      rg_plan *plan = plan_of(&b, policies[seed % 2], no_lanes, false);
      apart += check_edges(b.t, plan, what);
      rg_plan_destroy(plan);
    }
  }
  cr_assert_gt(apart, 0);
  close_bench(&b);
}

/* The checker itself sees a missing edge. */
Test(lower_cuda, a_missing_edge_shows) {
  bench b = open_bench(5);
  load_example(&b, "nsa", true);
  rg_plan *plan = plan_of(&b, NULL, false, false);
  int shown = 0;
  for (int i = 0; i < plan->nstep; i++) {
    int32_t *after = plan->after[i], first = after[0];
    const char *what = NULL;
    after[0] = -1;
    if (first >= 0) {
      count_apart(b.t, plan, &what);
      cr_assert(what, "step %d may run before step %d", i, first);
      shown++;
    }
    after[0] = first;
  }
  cr_assert_gt(shown, 0);
  rg_plan_destroy(plan);
  close_bench(&b);
}

/* ---- lanes ---- */

static void same_plan(bench *b, const char *policy) {
  rg_plan *with = plan_of(b, policy, false, false), *without = plan_of(b, policy, true, false);
  cr_assert_eq(with->sizes.predicted_peak, without->sizes.predicted_peak, "%s", policy);
  cr_assert_eq(with->nstep, without->nstep);
  for (int i = 0; i < with->nstep; i++)
    for (int k = 0; k == 0 || with->after[i][k - 1] >= 0; k++)
      cr_assert_eq(with->after[i][k], without->after[i][k], "%s", policy);
  rg_plan_destroy(with);
  rg_plan_destroy(without);
}

Test(lower_cuda, lanes_are_given_up) {
  bench b = open_bench(6);
  int64_t scratch[2] = {0, 0};
  int apart[2] = {0, 0};
  for (uint64_t seed = 700; seed < 720; seed++) { /* side by side costs memory, taken together */
    load_random(&b, seed);
    for (int no_lanes = 0; no_lanes < 2; no_lanes++) {
      rg_plan *plan = plan_of(&b, NULL, no_lanes, false);
      scratch[no_lanes] += plan->sizes.scratch;
      apart[no_lanes] += check_edges(b.t, plan, "random");
      rg_plan_destroy(plan);
    }
  }
  cr_assert(scratch[0] > scratch[1] && apart[0] > apart[1],
            "with lanes %lld bytes and %d pairs, without %lld and %d", (long long)scratch[0],
            apart[0], (long long)scratch[1], apart[1]);
  load_example(&b, "nsa", false);
  same_plan(&b, "{ \"regraph_policy\": 1, \"split_heads\": 1 }");
  same_plan(&b, "{ \"regraph_policy\": 1, \"budget\": { \"bytes\": \"6GiB\", \"of\": \"peak\" } }");
  close_bench(&b);
}

/* More branches than a kernel's parameters hold are refused by the plan, not by the run. */
Test(lower_cuda, too_many_branches) {
  bench b = open_bench(9);
  for (int n = 32; n <= 33; n++) {
    rg_error e = {0};
    rg_plan *plan = NULL;
    char text[2048], *at = text;
    at +=
        sprintf(at, "{ \"regraph\": 1, \"name\": \"many\", \"inputs\": {"
                    "\"a\": { \"shape\": [\"T\", 2, 8], \"dtype\": \"f32\", \"grad\": true },"
                    "\"l\": { \"shape\": [\"T\", 2], \"dtype\": \"f32\" } },"
                    "\"nodes\": [ { \"name\": \"all\", \"op\": \"merge_lse\", \"in\": { \"o\": [");
    for (int i = 0; i < n; i++) at += sprintf(at, "%s\"a\"", i ? "," : "");
    at += sprintf(at, "], \"lse\": [");
    for (int i = 0; i < n; i++) at += sprintf(at, "%s\"l\"", i ? "," : "");
    sprintf(at, "] }, \"out\": { \"o\": \"y\" } } ], \"outputs\": { \"y\": \"y\" } }");
    rg_spec *spec = load_spec(b.ctx, text);
    const rg_binding set[] = {{"T", 16, NULL}};
    for (int cuda = 0; cuda < 2; cuda++) {
      rg_plan_options o = {.set = set, .nset = 1, .device = cuda ? "cuda" : "cpu"};
      const rg_status status = rg_plan_create(spec, NULL, &o, &plan, &e);
      cr_assert_eq(status, cuda && n > 32 ? RG_E_LIMIT : RG_OK, "%d: %s", n, e.message);
      if (status != RG_OK)
        cr_assert(strcmp(e.node, "all") == 0 && strstr(e.message, "in groups"), "%s", e.message);
      rg_plan_destroy(plan);
    }
    rg_spec_destroy(spec);
  }
  close_bench(&b);
}

/* Copies of lengths are bytes like any others: they count in what is predicted and against a
 * budget. */
Test(lower_cuda, copies_of_lengths_count) {
  bench b = open_bench(8);
  load_example(&b, "nsa", true);
  b.B = 50000;
  rg_plan *keep = plan_of(&b, NULL, true, false);
  cr_assert_eq(keep->nclean, 1);
  cr_assert_geq(keep->memory->reserved, 4 * (b.B + 1));
  cr_assert_eq(keep->choice->saved_after, keep->sizes.saved);
  const int64_t most = keep->sizes.predicted_peak, saved = keep->sizes.saved;
  for (int k = 0; k < 5; k++) {
    char policy[128];
    const bool of_saved = k > 0;
    const int64_t budget = (of_saved ? saved : most) - (k < 2 ? 0 : k < 3 ? 1 : 4000 * k);
    snprintf(policy, sizeof policy,
             "{ \"regraph_policy\": 1, \"budget\": { \"bytes\": %lld, \"of\": \"%s\" } }",
             (long long)budget, of_saved ? "saved" : "peak");
    rg_plan *plan = plan_of(&b, policy, false, false);
    cr_assert_leq(of_saved ? plan->sizes.saved : plan->sizes.predicted_peak, budget, "%s", policy);
    cr_assert_eq(plan->choice->saved_after, plan->sizes.saved, "%s", policy);
    if (k < 2) cr_assert_eq(plan->nstep, keep->nstep, "%s recomputes", policy);
    rg_plan_destroy(plan);
  }
  rg_plan_destroy(keep);
  close_bench(&b);
}

Test(lower_cuda, dot_shows_lanes) {
  bench b = open_bench(7);
  rg_error e = {0};
  rg_text text;
  load_example(&b, "nsa", false);
  rg_plan *plan = plan_of(&b, NULL, false, false);
  CR_OK(rg_plan_write(plan, "dot", &text, &e), &e);
  cr_assert(strstr(text.data, "cluster_forward") && strstr(text.data, "cluster_backward"));
  for (int i = 0; i < plan->nstep; i++) {
    char line[256];
    snprintf(line, sizeof line, "    s%d [label=\"%s\\n", i, node_of(plan, i));
    const char *at = strstr(text.data, line);
    cr_assert(at, "%s", line);
    snprintf(line, sizeof line, "\\nlane %d\"", plan->lane[i]);
    cr_assert(strstr(at, line) && strstr(at, line) < strchr(at, '\n'), "%s of %s", line,
              node_of(plan, i));
    for (const int32_t *p = plan->after[i]; *p >= 0; p++) {
      snprintf(line, sizeof line, "s%d -> s%d [", *p, i);
      cr_assert(strstr(text.data, line), "%s", line);
    }
  }
  rg_text_destroy(&text);
  rg_plan_destroy(plan);
  close_bench(&b);
}
