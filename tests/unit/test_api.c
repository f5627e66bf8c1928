/* tests/unit/test_api.c: what the public header promises beyond results: options that grow, the
   list of a plan's nodes, what a bound pointer must satisfy, binding and running by index.
 */
#include "graph/base.h"
#include "run_util.h"

/* ---- fixture ---- */

enum { T = 96, B = 2 };
static rg_context *ctx;
static rg_spec *spec;
static rg_plan *plan;

static void setup(void) {
  char text[8192];
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  spec = load_spec(ctx, nsa_spec("bf16", false, text, sizeof text));
  plan = make_plan(spec, NULL, T, B, 2);
}
static void teardown(void) {
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

/* ---- options that grow ---- */

static rg_status plan_with(const rg_plan_options *o, rg_plan **out, rg_error *e) {
  return rg_plan_create(spec, NULL, o, out, e);
}

Test(options, size_zero_is_the_first_version, .init = setup, .fini = teardown) {
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rg_plan *p;
  rg_error e = {0};
  rg_plan_options o = {.set = set, .nset = 2, .threads = 1};
  CR_OK(plan_with(&o, &p, &e), &e);
  rg_plan_destroy(p);
  o.size = sizeof o;
  CR_OK(plan_with(&o, &p, &e), &e);
  rg_plan_destroy(p);
  rg_text text;
  CR_OK(rg_pareto(spec, NULL, &o, "text", &text, &e), &e);
  rg_text_destroy(&text);
}

/* A caller built for a later version: more members at the end. */
Test(options, newer_callers, .init = setup, .fini = teardown) {
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  struct {
    rg_plan_options known;
    int64_t later;
  } o = {.known = {.size = sizeof o, .set = set, .nset = 2, .threads = 1}};
  rg_plan *p;
  rg_error e = {0};
  CR_OK(plan_with(&o.known, &p, &e), &e);
  rg_plan_destroy(p);
  o.later = 1;
  FAILS(plan_with(&o.known, &p, &e), RG_E_USAGE,
        "rg_plan_options sets what regraph 0.1.0 does not know");
  cr_assert_null(p);
  o.known.size = 0; /* then it says nothing of later members */
  CR_OK(plan_with(&o.known, &p, &e), &e);
  rg_plan_destroy(p);
}

Test(options, sizes_that_make_no_sense, .init = setup, .fini = teardown) {
  static const size_t wrong[] = {1, sizeof(size_t), sizeof(rg_session_options) - 1, 1 << 20,
                                 SIZE_MAX};
  for (int i = 0; i < RGI_COUNT(wrong); i++) {
    rg_session *s;
    rg_plan *p;
    rg_text text;
    rg_pack_result result;
    rg_plan_options po = {.size = wrong[i]};
    rg_session_options so = {.size = wrong[i]};
    rg_pack_options ko = {.size = wrong[i]};
    FAILS(rg_session_create(plan, &so, &s, &e), RG_E_USAGE, "rg_session_options.size is");
    cr_assert_null(s);
    if (i != 2)
      FAILS(rg_pack(ctx, NULL, 0, &ko, &result, &e), RG_E_USAGE, "rg_pack_options.size is");
    FAILS(plan_with(&po, &p, &e), RG_E_USAGE, "rg_plan_options.size is");
    FAILS(rg_pareto(spec, NULL, &po, "text", &text, &e), RG_E_USAGE, "rg_plan_options.size is");
  }
}

/* A caller built for an earlier version than the library: the struct ends before `late` does. */
Test(options, older_callers) {
  typedef struct grown {
    size_t size;
    int64_t early, late;
  } grown;
  const size_t first = offsetof(grown, late);
  grown given = {0, 1, 2}, own;
  rg_error e = {0};
  CR_OK(rgi_options(&given, &own, first, sizeof own, "grown", &e), &e);
  cr_assert(own.early == 1 && own.late == 0 && own.size == sizeof own);
  given.size = first;
  CR_OK(rgi_options(&given, &own, first, sizeof own, "grown", &e), &e);
  cr_assert(own.early == 1 && own.late == 0);
  given.size = sizeof given;
  CR_OK(rgi_options(&given, &own, first, sizeof own, "grown", &e), &e);
  cr_assert(own.early == 1 && own.late == 2);
  CR_OK(rgi_options(NULL, &own, first, sizeof own, "grown", &e), &e);
  cr_assert(own.early == 0 && own.late == 0 && own.size == sizeof own);
}

/* ---- the nodes of a plan ---- */

static bool node(const rg_plan *p, const char *name, rg_node_info *out) {
  for (size_t i = 0; rg_plan_node(p, i, out) == RG_OK; i++)
    if (strcmp(out->name, name) == 0) return true;
  return false;
}

Test(nodes, what_each_is, .init = setup, .fini = teardown) {
  char text[256]; /* cmp_o again, one head a group */
  rg_policy *policy = load_policy(ctx, nsa_policy(1u << 1, 1, text, sizeof text));
  rg_plan *p = make_plan(spec, policy, T, B, 1);
  rg_session *s;
  rg_error e = {0};
  rg_node_info n;
  rg_node_time time;
  int steps = 0, clones = 0, recomputed = 0, gradients = 0;
  bool backward = false;
  CR_OK(rg_session_create(p, NULL, &s, &e), &e);
  for (size_t i = 0; rg_plan_node(p, i, &n) == RG_OK; i++) {
    cr_assert(n.backward || !backward, "%s stands after the backward has begun", n.name);
    backward = n.backward;
    if (n.step < 0) {
      cr_assert(n.written == 0 && n.flops == 0 && n.model_ms == 0, "%s runs nothing", n.name);
      continue;
    }
    cr_assert_eq(n.step, steps++, "%s", n.name);
    cr_assert_eq(rg_session_node_time(s, (size_t)n.step, &time), RG_OK);
    cr_assert_str_eq(time.name, n.name);
    cr_assert_str_eq(time.op, n.op);
    cr_assert(time.backward == n.backward && time.flops == n.flops && time.model_ms == n.model_ms);
    cr_assert(n.written > 0 && n.bytes >= (double)n.written && n.model_ms > 0, "%s", n.name);
    cr_assert_null(n.kernels, "%s: a CPU has one way", n.name);
    clones += n.kind == RG_NODE_CLONE;
    recomputed += n.recomputed;
    gradients += n.kind == RG_NODE_GRADIENT;
    if (n.recomputed || n.kind == RG_NODE_CLONE) cr_assert_str_eq(n.spec_node, "cmp_o");
    if (n.recomputed) cr_assert(!n.backward && n.group >= 0);
    if (n.kind == RG_NODE_CLONE) cr_assert(n.backward && n.group >= 0);
  }
  cr_assert_eq(rg_session_node_time(s, (size_t)steps, &time), RG_E_USAGE);
  cr_assert_eq(recomputed, 2, "one a head group, not %d", recomputed);
  cr_assert_eq(clones, 2, "one a head group, not %d", clones);
  cr_assert_gt(gradients, 5);
  rg_session_destroy(s);
  rg_plan_destroy(p);
  rg_policy_destroy(policy);
}

Test(nodes, bytes_and_ends, .init = setup, .fini = teardown) {
  rg_node_info n;
  cr_assert(node(plan, "combine", &n));
  cr_assert_eq(n.written, T * 4 * 16 * 2);
  cr_assert(!n.recomputed && n.kind == RG_NODE_PRIMAL && n.group == -1);
  cr_assert(node(plan, "topk", &n));
  cr_assert_eq(n.written, T * 2 * 4 * 4);
  cr_assert(!node(plan, "no_such_node", &n));
  cr_assert_eq(rg_plan_node(plan, SIZE_MAX, &n), RG_E_USAGE);
  cr_assert_eq(rg_plan_node(NULL, 0, &n), RG_E_USAGE);
  cr_assert_eq(rg_plan_node(plan, 0, NULL), RG_E_USAGE);
}

Test(nodes, kernels_on_a_gpu, .init = setup, .fini = teardown) {
  static const char *const dtype[] = {"bf16", "f32"}, *const kernels[] = {"wgmma", "plain: f32"};
  for (int i = 0; i < 2; i++) {
    rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}, {"dtype", 0, dtype[i]}};
    rg_plan_options o = {.set = set, .nset = 3, .device = "cuda"};
    rg_plan *p;
    rg_error e = {0};
    rg_node_info n;
    CR_OK(plan_with(&o, &p, &e), &e);
    cr_assert(node(p, "swa_o", &n));
    cr_assert_str_eq(n.kernels, kernels[i]);
    rg_plan_destroy(p);
  }
}

/* ---- what a bound pointer must satisfy ---- */

Test(alignment, as_told, .init = setup, .fini = teardown) {
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rg_plan_options o = {.set = set, .nset = 2, .device = "cuda"};
  rg_plan *gpu, *cpu;
  rg_session *s;
  rg_tensor_info t;
  rg_error e = {0};
  char *block = aligned_alloc(64, 1 << 20);
  CR_OK(plan_with(&o, &gpu, &e), &e);
  o.device = "cpu";
  CR_OK(plan_with(&o, &cpu, &e), &e);
  CR_OK(rg_session_create(cpu, NULL, &s, &e), &e);
  for (size_t i = 0; rg_spec_tensor(spec, i, &t) == RG_OK; i++) cr_assert_eq(t.alignment, -1);
  for (size_t i = 0; rg_plan_tensor(gpu, i, &t) == RG_OK; i++) cr_assert_eq(t.alignment, 16);
  for (size_t i = 0; rg_plan_tensor(cpu, i, &t) == RG_OK; i++) {
    cr_assert_eq(t.alignment, t.dtype == RG_I32 ? 4 : 2, "%s", t.name);
    CR_OK(rg_session_bind(s, t.role, t.name, block + t.alignment, (size_t)t.bytes, &e), &e);
    FAILS(rg_session_bind(s, t.role, t.name, block + t.alignment / 2, (size_t)t.bytes, &e),
          RG_E_USAGE, t.dtype == RG_I32 ? "expected a multiple of 4" : "expected a multiple of 2");
  }
  rg_session_destroy(s);
  rg_plan_destroy(cpu);
  rg_plan_destroy(gpu);
  free(block);
}

/* ---- by index ---- */

static void pointers_of(const buffers *io, void **pointers, rg_direction direction) {
  for (int i = 0; i < io->n; i++) {
    const bool gradient = io->info[i].role == RG_GRAD_IN || io->info[i].role == RG_GRAD_OUT;
    /* not to be looked at */
    pointers[i] = gradient == (direction == RG_BACKWARD) ? io->data[i] : (void *)1;
  }
}

/* Two calls in flight on saved blocks of the caller's, against the same by name. */
Test(by_index, runs_as_by_name, .init = setup, .fini = teardown) {
  static const int lengths[2][B] = {{40, 50}, {96, 0}};
  buffers name[2], index[2];
  void *pointers[MOST_TENSORS], *saved[2], *scratch;
  rg_session *s;
  rg_sizes z;
  rg_error e = {0};
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  CR_OK(rg_session_create(plan, NULL, &s, &e), &e);
  CR_OK(rg_memory_alloc(plan, (size_t)z.scratch, &scratch, &e), &e);
  for (int k = 0; k < 2; k++) {
    make_buffers(plan, 5 + (uint64_t)k, T, lengths[k], &name[k]);
    make_buffers(plan, 5 + (uint64_t)k, T, lengths[k], &index[k]);
    bind_all(s, &name[k]);
    run_both(s);
    CR_OK(rg_memory_alloc(plan, (size_t)z.saved, &saved[k], &e), &e);
  }
  for (int k = 0; k < 2; k++) {
    pointers_of(&index[k], pointers, RG_FORWARD);
    CR_OK(rg_session_run(s, RG_FORWARD, pointers, (size_t)index[k].n, saved[k], scratch, &e), &e);
  }
  for (int k = 0; k < 2; k++) {
    pointers_of(&index[k], pointers, RG_BACKWARD);
    CR_OK(rg_session_run(s, RG_BACKWARD, pointers, (size_t)index[k].n, saved[k], NULL, &e), &e);
  }
  for (int k = 0; k < 2; k++) {
    same_results(&name[k], &index[k], "by name and by index");
    finite_results(&index[k], "by index");
    free_buffers(&name[k]);
    free_buffers(&index[k]);
  }
  rg_session_destroy(s);
  rg_memory_free(plan, scratch);
  for (int k = 0; k < 2; k++) rg_memory_free(plan, saved[k]);
}

/* Each run on memory of its own, a backward by another session than its forward's, against the same
 * by name. */
Test(by_index, on_memory_of_each_run, .init = setup, .fini = teardown) {
  static const int lengths[2][B] = {{40, 50}, {96, 0}};
  buffers name[2], index[2];
  void *saved[2], *scratch;
  char *there[2];
  rg_session *s[2];
  rg_sizes z;
  rg_error e = {0};
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  cr_assert_eq(posix_memalign(&scratch, 64, (size_t)z.scratch), 0);
  for (int k = 0; k < 2; k++) {
    CR_OK(rg_session_create(plan, NULL, &s[k], &e), &e);
    make_buffers(plan, 5 + (uint64_t)k, T, lengths[k], &name[k]);
    make_buffers(plan, 5 + (uint64_t)k, T, lengths[k], &index[k]);
    bind_all(s[k], &name[k]);
    run_both(s[k]);
    cr_assert_eq(posix_memalign((void **)&there[k], 128, (size_t)z.saved + 64), 0);
    saved[k] = there[k] + 64; /* the least that is asked for */
  }
  for (int run = 0; run < 4; run++) {
    const rg_direction d = run < 2 ? RG_FORWARD : RG_BACKWARD;
    const int k = run % 2;
    CR_OK(rg_session_run_on(s[d == RG_FORWARD ? k : 1 - k], d, index[k].data, (size_t)index[k].n,
                            saved[k], scratch, NULL, &e),
          &e);
  }
  for (int k = 0; k < 2; k++) {
    same_results(&name[k], &index[k], "by name and on memory of each run");
    finite_results(&index[k], "on memory of each run");
    FAILS(rg_session_backward(s[k], &e), RG_E_USAGE, "without a forward"); /* it knows of none */
    FAILS(rg_session_forget_saved(s[k], saved[k], &e), RG_E_USAGE, "no saved block");
  }
  void *const *data = index[0].data;
  const size_t n = (size_t)index[0].n;
  FAILS(rg_session_run_on(s[0], RG_FORWARD, data, n, NULL, scratch, NULL, &e), RG_E_USAGE,
        "the saved block is NULL");
  FAILS(rg_session_run_on(s[0], RG_FORWARD, data, n, saved[0], scratch, data[0], &e), RG_E_USAGE,
        "has no stream");
  FAILS(rg_session_run_on(s[0], RG_FORWARD, data, n - 1, saved[0], scratch, NULL, &e), RG_E_USAGE,
        "the plan has");
  void *const was = index[0].data[0];
  index[0].data[0] = (char *)was + 1;
  FAILS(rg_session_run_on(s[0], RG_BACKWARD, data, n, saved[0], scratch, NULL, &e), RG_E_USAGE,
        "expected a multiple of 2");
  index[0].data[0] = was;
  for (int k = 0; k < 2; k++) {
    rg_session_destroy(s[k]);
    free(there[k]);
    free_buffers(&name[k]);
    free_buffers(&index[k]);
  }
  free(scratch);
}

Test(by_index, binds_one, .init = setup, .fini = teardown) {
  buffers io;
  rg_session *s;
  rg_error e = {0};
  make_buffers(plan, 1, T, NULL, &io);
  CR_OK(rg_session_create(plan, NULL, &s, &e), &e);
  for (int i = 0; i < io.n; i++)
    CR_OK(rg_session_bind_index(s, (size_t)i, io.data[i], (size_t)io.info[i].bytes, &e), &e);
  run_both(s);
  CR_OK(rg_session_bind_index(s, 0, NULL, 0, &e), &e);
  FAILS(rg_session_forward(s, &e), RG_E_USAGE, "the input \"q\" is not bound");
  FAILS(rg_session_bind_index(s, 0, io.data[0], 3, &e), RG_E_USAGE,
        "3 bytes bound to the input \"q\"");
  FAILS(rg_session_bind_index(s, (size_t)io.n, io.data[0], 3, &e), RG_E_USAGE,
        "there is no tensor");
  FAILS(rg_session_bind_index(s, SIZE_MAX, io.data[0], 3, &e), RG_E_USAGE, "there is no tensor");
  FAILS(rg_session_bind_index(NULL, 0, io.data[0], 3, &e), RG_E_USAGE, "the session is NULL");
  rg_session_destroy(s);
  free_buffers(&io);
}

Test(by_index, what_makes_no_sense_binds_nothing, .init = setup, .fini = teardown) {
  buffers io, other;
  void *pointers[MOST_TENSORS], *block;
  rg_session *s;
  rg_sizes z;
  rg_error e = {0};
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  CR_OK(rg_memory_alloc(plan, (size_t)z.scratch, &block, &e), &e);
  const char *scratch = memset(block, 0x3c, (size_t)z.scratch);
  make_buffers(plan, 1, T, NULL, &io);
  make_buffers(plan, 2, T, NULL, &other);
  CR_OK(rg_session_create(plan, NULL, &s, &e), &e);
  bind_all(s, &io);
  run_both(s);
  const size_t n = (size_t)io.n;
  pointers_of(&other, pointers, RG_FORWARD);
  FAILS(rg_session_run(NULL, RG_FORWARD, pointers, n, NULL, NULL, &e), RG_E_USAGE,
        "the session is NULL");
  FAILS(rg_session_run(s, (rg_direction)2, pointers, n, NULL, NULL, &e), RG_E_USAGE,
        "no direction 2");
  FAILS(rg_session_run(s, RG_FORWARD, pointers, n - 1, NULL, NULL, &e), RG_E_USAGE, "the plan has");
  FAILS(rg_session_run(s, RG_FORWARD, NULL, n, NULL, NULL, &e), RG_E_USAGE, "0 pointers");
  FAILS(rg_session_run(s, RG_FORWARD, pointers, n, (char *)io.data[0] + 4, NULL, &e), RG_E_USAGE,
        "saved block");
  FAILS(rg_session_run(s, RG_FORWARD, pointers, n, NULL, (char *)io.data[0] + 4, &e), RG_E_USAGE,
        "scratch block");
  FAILS(rg_session_run(s, RG_FORWARD, pointers, n, (char *)block + 4, block, &e), RG_E_USAGE,
        "saved block"); /* nor is the scratch block, which was as it should be */
  pointers[n - 1] = pointers[0];
  pointers[1] = (char *)pointers[1] + 1;
  FAILS(rg_session_run(s, RG_FORWARD, pointers, n, NULL, NULL, &e), RG_E_USAGE,
        "expected a multiple of 2");
  for (int i = 0; i < io.n; i++) /* a run now goes by what was bound at first */
    if (io.info[i].role == RG_OUTPUT) memset(io.data[i], 0x7e, (size_t)io.info[i].bytes);
  run_both(s);
  finite_results(&io, "still bound");
  for (size_t i = 0; i < (size_t)z.scratch; i++) cr_assert_eq(scratch[i], 0x3c, "byte %zu", i);
  pointers_of(&other, pointers, RG_BACKWARD);
  for (size_t i = 0; i < n; i++)
    if (other.info[i].role == RG_GRAD_OUT) pointers[i] = NULL;
  FAILS(rg_session_run(s, RG_BACKWARD, pointers, n, NULL, NULL, &e), RG_E_USAGE, "is not bound");
  pointers_of(&other, pointers, RG_FORWARD);
  pointers[0] = NULL;
  FAILS(rg_session_run(s, RG_FORWARD, pointers, n, NULL, NULL, &e), RG_E_USAGE,
        "the input \"q\" is not bound");
  rg_session_destroy(s);
  rg_memory_free(plan, block);
  free_buffers(&io);
  free_buffers(&other);
}
