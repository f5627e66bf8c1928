/* tests/unit/test_session.c: a session's life and every way to misuse it; the bytes it asks for;
 * nothing allocated in a run; what it tells about itself.
 */
#include "exec/plan.h"
#include "run_util.h"

#include <stdatomic.h>

/* ---- every malloc of the process, counted (sanitizers bring their own malloc) ---- */

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__GLIBC__)
#define COUNTED 0
#else
#define COUNTED 1
#endif
static _Atomic bool counting;
static _Atomic long counted;
#if COUNTED
extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
static void count(void) {
  if (atomic_load(&counting)) atomic_fetch_add(&counted, 1);
}
void *malloc(size_t n) {
  count();
  return __libc_malloc(n);
}
void *calloc(size_t n, size_t size) {
  count();
  return __libc_calloc(n, size);
}
void *realloc(void *p, size_t n) {
  count();
  return __libc_realloc(p, n);
}
int posix_memalign(void **out, size_t align, size_t n) {
  count();
  *out = __libc_memalign(align, n);
  return *out ? 0 : 12;
}
void *aligned_alloc(size_t align, size_t n) {
  count();
  return __libc_memalign(align, n);
}
#endif

/* The context's allocator and the arena's. */
typedef struct counter {
  _Atomic long calls, live;
  _Atomic size_t bytes;
  bool refuse;
} counter;
static void *counter_alloc(void *user, size_t size) {
  counter *c = user;
  void *p = NULL;
  atomic_fetch_add(&c->calls, 1);
  if (c->refuse || posix_memalign(&p, 256, size)) return NULL;
  atomic_fetch_add(&c->bytes, size);
  atomic_fetch_add(&c->live, 1);
  return p;
}
static void counter_free(void *user, void *ptr) {
  if (!ptr) return;
  atomic_fetch_sub(&((counter *)user)->live, 1);
  free(ptr);
}

/* ---- fixture ---- */

enum { T = 150, B = 3 };
static const int lengths[B] = {70, 0, 75};

static counter host;
static rg_context *ctx;
static rg_spec *spec;
static rg_plan *plan;
static buffers io;

static void setup(void) {
  char text[8192];
  rg_error e = {0};
  rg_allocator allocator = {counter_alloc, counter_free, &host};
  CR_OK(rg_context_create(&allocator, &ctx, &e), &e);
  spec = load_spec(ctx, nsa_spec("f32", true, text, sizeof text));
  plan = make_plan(spec, NULL, T, B, 2);
  make_buffers(plan, 3, T, lengths, &io);
}

static void teardown(void) {
  free_buffers(&io);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
  cr_assert_eq(atomic_load(&host.live), 0, "leaked %ld host blocks", atomic_load(&host.live));
}

static rg_session *session(const rg_session_options *o) {
  rg_session *s = NULL;
  rg_error e = {0};
  CR_OK(rg_session_create(plan, o, &s, &e), &e);
  return s;
}

/* ---- tests ---- */

Test(session, bindable_tensors, .init = setup, .fini = teardown) {
  static const struct {
    const char *name;
    rg_role role;
    int64_t bytes;
    bool accumulates, seqlens;
  } want[] = {{"q", RG_INPUT, T * 4 * 16 * 4, false, false},
              {"cu_seqlens", RG_INPUT, (B + 1) * 4, false, true},
              {"o", RG_OUTPUT, T * 4 * 16 * 4, false, false},
              {"o", RG_GRAD_IN, T * 4 * 16 * 4, false, false},
              {"gate", RG_GRAD_OUT, T * 4 * 3 * 4, false, false},
              {"wk", RG_GRAD_OUT, 16 * 8 * 16 * 4, true, false}};
  for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
    bool found = false;
    for (int k = 0; k < io.n; k++) {
      const rg_tensor_info *t = &io.info[k];
      if (t->role != want[i].role || strcmp(t->name, want[i].name) != 0) continue;
      found = true;
      cr_assert_eq(t->bytes, want[i].bytes, "%s", t->name);
      cr_assert_eq(t->accumulates, want[i].accumulates, "%s", t->name);
      cr_assert_eq(t->seqlens, want[i].seqlens, "%s", t->name);
      cr_assert_not(t->offsets);
    }
    cr_assert(found, "%s", want[i].name);
  }
  cr_assert_eq(io.n, 7 + 1 + 1 + 6);
  rg_tensor_info t;
  cr_assert_eq(rg_plan_tensor(plan, (size_t)io.n, &t), RG_E_USAGE);
}

Test(session, misuse, .init = setup, .fini = teardown) {
  rg_session *s = session(NULL), *none = (rg_session *)plan;
  char word[4] = {0};
  FAILS(rg_session_create(NULL, NULL, &none, &e), RG_E_USAGE, "plan");
  cr_assert_null(none);
  FAILS(rg_session_forward(NULL, &e), RG_E_USAGE, "session");
  FAILS(rg_session_backward(NULL, &e), RG_E_USAGE, "session");
  FAILS(rg_session_bind(NULL, RG_INPUT, "q", word, 4, &e), RG_E_USAGE, "session");
  FAILS(rg_session_forward(s, &e), RG_E_USAGE, "not bound");
  /* nothing bound to look at either */
  FAILS(rg_session_backward(s, &e), RG_E_USAGE, "without a forward");
  FAILS(rg_session_adopt_saved(s, NULL, &e), RG_E_USAGE, "not bound");
  FAILS(rg_session_bind(s, RG_INPUT, "q", io.data[0], 12, &e), RG_E_USAGE, "\"q\"");
  FAILS(rg_session_bind(s, RG_INPUT, "qq", io.data[0], 12, &e), RG_E_USAGE, "\"qq\"");
  FAILS(rg_session_bind(s, RG_GRAD_OUT, "cu_seqlens", io.data[0], 12, &e), RG_E_USAGE,
        "cu_seqlens");
  FAILS(rg_session_bind(s, RG_INPUT, "q", (char *)io.data[0] + 1, T * 4 * 16 * 4, &e), RG_E_USAGE,
        "multiple");
  bind_all(s, &io);
  FAILS(rg_session_backward(s, &e), RG_E_USAGE, "forward");
  FAILS(rg_session_read(s, "idx", word, 4, &e), RG_E_USAGE, "forward");
  rg_error e = {0};
  CR_OK(rg_session_bind(s, RG_INPUT, "v", NULL, 0, &e), &e);
  FAILS(rg_session_forward(s, &e), RG_E_USAGE, "\"v\"");
  bind_all(s, &io);
  CR_OK(rg_session_bind(s, RG_GRAD_OUT, "gate", NULL, 0, &e), &e);
  CR_OK(rg_session_forward(s, &e), &e); /* gradients are not forward's business */
  FAILS(rg_session_backward(s, &e), RG_E_USAGE, "\"gate\"");
  int64_t a, b;
  cr_assert_eq(rg_session_touched(s, &a, &b), RG_E_USAGE);
  FAILS(rg_session_read(s, "nothing", word, 4, &e), RG_E_NAME, "nothing");
  rg_session_destroy(s);
  rg_session_destroy(NULL);
}

Test(session, plan_misuse, .init = setup, .fini = teardown) {
  rg_plan *p = plan;
  FAILS(rg_plan_create(NULL, NULL, NULL, &p, &e), RG_E_USAGE, "spec");
  cr_assert_null(p);
  rg_plan_options o = {.device = "tpu"};
  FAILS(rg_plan_create(spec, NULL, &o, &p, &e), RG_E_USAGE, "tpu");
  o = (rg_plan_options){.threads = -1};
  FAILS(rg_plan_create(spec, NULL, &o, &p, &e), RG_E_USAGE, "threads");
  o = (rg_plan_options){0};
  FAILS(rg_plan_create(spec, NULL, &o, &p, &e), RG_E_USAGE, "T"); /* unbound */
  rg_text text;
  FAILS(rg_plan_write(plan, "xml", &text, &e), RG_E_USAGE, "xml");
  cr_assert_null(text.data);
  FAILS(rg_plan_report(plan, "xml", NULL, &text, &e), RG_E_USAGE, "xml");
  FAILS(rg_plan_report(NULL, "trace", NULL, &text, &e), RG_E_USAGE, "NULL");
  const double ms = 1;
  const rg_report_options wrong = {.step_ms = &ms, .nstep = 1};
  FAILS(rg_plan_report(plan, "trace", &wrong, &text, &e), RG_E_USAGE, "1 times were given");
  static const struct {
    rg_report_options o;
    rg_status status;
    const char *part;
  } bad[] = {{{.front = "{"}, RG_E_SYNTAX, "not JSON"},
             {{.front = "[]"}, RG_E_KEY, "regraph pareto --json"},
             {{.front = "{\"version\": 2, \"exact\": true}"}, RG_E_KEY, "regraph pareto --json"},
             {{.against = "{\"version\": 1}"}, RG_E_KEY, "regraph plan --json"}};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    FAILS(rg_plan_report(plan, "html", &bad[i].o, &text, &e), bad[i].status, bad[i].part);
    cr_assert_null(text.data);
  }
}

Test(session, contents, .init = setup, .fini = teardown) {
  static const struct {
    int32_t cu[B + 1];
    const char *part;
  } bad[] = {{{1, 70, 70, 140}, "cu_seqlens[0] is 1"},
             {{0, 70, 69, 140}, "cu_seqlens[2] is 69"},
             {{0, 70, 70, T + 1}, "cu_seqlens[3] is 151; expected at most 150"},
             {{0, -1, 70, 140}, "cu_seqlens[1] is -1"}};
  rg_session *s = session(NULL);
  bind_all(s, &io);
  int32_t *cu = buffer(&io, RG_INPUT, "cu_seqlens");
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    memcpy(cu, bad[i].cu, sizeof bad[i].cu);
    FAILS(rg_session_forward(s, &e), RG_E_DATA, bad[i].part);
    FAILS(rg_session_backward(s, &e), RG_E_USAGE, "forward");
  }
  rg_error e = {0};
  memset(cu, 0, (B + 1) * sizeof *cu); /* an empty batch */
  CR_OK(rg_session_forward(s, &e), &e);
  CR_OK(rg_session_backward(s, &e), &e);
  const float *o = buffer(&io, RG_OUTPUT, "o"), *dq = buffer(&io, RG_GRAD_OUT, "q");
  for (int i = 0; i < T * 4 * 16; i++)
    cr_assert(o[i] == 0 && dq[i] == 0, "row past the last token");
  fill_starts(cu, B + 1, T, NULL); /* full to the last row */
  CR_OK(rg_session_forward(s, &e), &e);
  CR_OK(rg_session_backward(s, &e), &e);
  finite_results(&io, "full");
  rg_session_destroy(s);
}

Test(session, memory, .init = setup, .fini = teardown) {
  rg_sizes z;
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  cr_assert_gt(z.saved, 0);
  counter arena = {0};
  rg_allocator hook = {counter_alloc, counter_free, &arena};
  rg_session_options o = {.arena = &hook};
  rg_session *s = session(&o);
  cr_assert_eq((int64_t)arena.bytes, z.predicted_peak);
  bind_all(s, &io);
  run_both(s);
  cr_assert_eq((int64_t)arena.bytes, z.predicted_peak);
  rg_session_destroy(s);
  cr_assert_eq(arena.live, 0);

  /* The caller's blocks: nothing is asked for, nothing outside is touched. */
  arena = (counter){0};
  enum { ZONE = 512 };
  unsigned char *block[2];
  int64_t size[2] = {z.saved, z.scratch};
  for (int i = 0; i < 2; i++) {
    void *p = NULL;
    cr_assert_eq(posix_memalign(&p, 256, (size_t)size[i] + 2 * ZONE), 0);
    block[i] = p;
    memset(p, 0xab, (size_t)size[i] + 2 * ZONE);
  }
  o = (rg_session_options){
      .arena = &hook, .saved = block[0] + ZONE, .scratch = block[1] + ZONE, .debug_poison = true};
  s = session(&o);
  cr_assert_eq(arena.calls, 0);
  bind_all(s, &io);
  run_both(s);
  int64_t saved, scratch;
  cr_assert_eq(rg_session_touched(s, &saved, &scratch), RG_OK);
  cr_assert_eq(saved, z.saved);
  cr_assert_eq(scratch, z.scratch);
  rg_session_destroy(s);
  for (int i = 0; i < 2; i++) {
    for (int k = 0; k < ZONE; k++)
      cr_assert(block[i][k] == 0xab && block[i][ZONE + size[i] + k] == 0xab,
                "wrote outside block %d", i);
    free(block[i]);
  }
  cr_assert_eq(arena.calls, 0);

  /* Refused and misplaced memory. */
  rg_session *none = s;
  arena.refuse = true;
  o = (rg_session_options){.arena = &hook};
  FAILS(rg_session_create(plan, &o, &none, &e), RG_E_NOMEM, "bytes");
  cr_assert_null(none);
  o = (rg_session_options){.saved = (char *)io.data[0] + 4};
  FAILS(rg_session_create(plan, &o, &none, &e), RG_E_USAGE, "multiple of 64");
  o = (rg_session_options){.arena = &(rg_allocator){0}};
  FAILS(rg_session_create(plan, &o, &none, &e), RG_E_USAGE, "alloc");
}

Test(session, run_allocates_nothing, .init = setup, .fini = teardown) {
  rg_error e = {0};
#if COUNTED
  atomic_store(&counting, true);
  void *volatile probe = malloc(16); /* the counter works */
  atomic_store(&counting, false);
  free(probe);
  cr_assert_eq(atomic_exchange(&counted, 0), 1);
#endif
  for (int poisoned = 0; poisoned < 2; poisoned++) {
    rg_session_options o = {.debug_poison = poisoned};
    rg_session *s = session(&o);
    bind_all(s, &io);
    long before = atomic_load(&host.calls);
    for (int i = 0; i < 2; i++) {
      atomic_store(&counting, true);
      rg_status forward = rg_session_forward(s, &e), backward = rg_session_backward(s, &e);
      atomic_store(&counting, false);
      CR_OK(forward, &e);
      CR_OK(backward, &e);
    }
    cr_assert_eq(atomic_load(&host.calls), before, "a run used the context's allocator");
    cr_assert_eq(atomic_load(&counted), 0, "a run called malloc %ld times", atomic_load(&counted));
    rg_session_destroy(s);
  }
}

/* ---- an op that misbehaves ---- */

static char *overrun_at; /* NULL: fail instead */
static rg_status misbehave(const rg_call *c) {
  if (!overrun_at) return RG_E_DEVICE;
  *overrun_at ^= 1;
  return rgi_find_op(ctx, c->op->name)->run_cpu(c);
}

static void *last_block;
static void *remember_alloc(void *user, size_t size) {
  return last_block = counter_alloc(user, size);
}

Test(session, guards_and_failing_ops, .init = setup, .fini = teardown) {
  rg_sizes z;
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  counter arena = {0};
  rg_allocator hook = {remember_alloc, counter_free, &arena};
  rg_session_options o = {.arena = &hook, .debug_poison = true};
  rg_session *s = session(&o);
  bind_all(s, &io);
  run_both(s);
  /* scratch is asked for last: a guard of 256 bytes on each side */
  char *scratch = (char *)last_block + 256;
  rgi_node *node = &plan->graph->node[plan->step[1].node];
  const rg_op *good = node->op;
  rg_op bad = *good;
  bad.run_cpu = misbehave;
  char *const outside[] = {scratch - 1, scratch - 256, scratch + z.scratch,
                           scratch + z.scratch + 255};
  for (int i = 0; i < 4; i++) {
    rg_error e = {0};
    overrun_at = outside[i];
    node->op = &bad;
    cr_assert_eq(rg_session_forward(s, &e), RG_E_INTERNAL);
    cr_assert_str_eq(e.node, node->name);
    cr_assert(strstr(e.message, "outside the arena"), "%s", e.message);
    node->op = good;
    *overrun_at ^= 1;
    e = (rg_error){0};
    CR_OK(rg_session_forward(s, &e), &e);
  }
  rg_error e = {0};
  overrun_at = NULL;
  node->op = &bad;
  cr_assert_eq(rg_session_forward(s, &e), RG_E_DEVICE);
  cr_assert_eq(e.status, RG_E_DEVICE);
  cr_assert_str_eq(e.node, node->name);
  node->op = good;
  FAILS(rg_session_backward(s, &e), RG_E_USAGE,
        "forward"); /* the failed forward left nothing to go back from */
  rg_session_destroy(s);
}

/* An arena that is not 256-byte aligned is asked again for room to align in; the run works all the
 * same. */
static void *crooked_alloc(void *user, size_t size) {
  char *p = counter_alloc(user, size + 256);
  return p ? p + 16 : NULL;
}
static void crooked_free(void *user, void *ptr) {
  counter_free(user, (char *)ptr - 16);
}

Test(session, unaligned_arena, .init = setup, .fini = teardown) {
  counter arena = {0};
  rg_allocator hook = {crooked_alloc, crooked_free, &arena};
  for (int poisoned = 0; poisoned < 2; poisoned++) {
    rg_session_options o = {.arena = &hook, .debug_poison = poisoned};
    rg_session *s = session(&o);
    bind_all(s, &io);
    run_both(s);
    rg_session_destroy(s);
    cr_assert_eq(atomic_load(&arena.live), 0);
  }
}

/* Runs repeat bit for bit, whatever the arena held; sums are added to. */
Test(session, repeats, .init = setup, .fini = teardown) {
  rg_session *s = session(NULL);
  rg_session_options o = {.debug_poison = true};
  rg_session *poisoned = session(&o);
  buffers again;
  make_buffers(plan, 3, T, lengths, &again);
  bind_all(s, &io);
  bind_all(poisoned, &again);
  for (int i = 0; i < 3; i++) {
    run_both(s);
    run_both(poisoned);
    same_results(&io, &again, "plain against poisoned memory");
  }
  /* Three runs onto ones: one run's gradient is a third of what was added. */
  const float *wk = buffer(&io, RG_GRAD_OUT, "wk");
  buffers once;
  make_buffers(plan, 3, T, lengths, &once);
  bind_all(s, &once);
  run_both(s);
  const float *first = buffer(&once, RG_GRAD_OUT, "wk");
  bool any = false;
  for (int i = 0; i < 16 * 8 * 16; i++) {
    float g = first[i] - 1, sum = wk[i] - 1;
    cr_assert_float_eq(sum, 3 * g, 1e-4f * (1 + (g < 0 ? -g : g)),
                       "wk[%d]: %g after three runs of %g", i, sum, g);
    any |= g != 0;
  }
  cr_assert(any, "no weight gradient");
  rg_session_destroy(poisoned);
  rg_session_destroy(s);
  free_buffers(&again);
  free_buffers(&once);
}

/* A forward in one session, its saved block moved, the backward in another;
 * blocks come, go and are forgotten. */
Test(session, moved_saved_blocks, .init = setup, .fini = teardown) {
  rg_sizes z;
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  void *there[2];
  for (int i = 0; i < 2; i++) cr_assert_eq(posix_memalign(&there[i], 256, (size_t)z.saved), 0);
  rg_session_options o = {.saved = there[0]};
  rg_session *first = session(&o), *second = session(NULL), *plain = session(NULL);
  rg_error e = {0};
  buffers again;
  make_buffers(plan, 3, T, lengths, &again);
  bind_all(plain, &io);
  run_both(plain);
  bind_all(first, &again);
  CR_OK(rg_session_forward(first, &e), &e);
  memcpy(there[1], there[0], (size_t)z.saved);
  memset(there[0], 0xff, (size_t)z.saved);
  bind_all(second, &again);
  CR_OK(rg_session_adopt_saved(second, there[1], &e), &e);
  CR_OK(rg_session_backward(second, &e), &e);
  same_results(&io, &again, "a saved block that moved against one that stayed");
  CR_OK(rg_session_forget_saved(second, there[1], &e), &e);
  FAILS(rg_session_backward(second, &e), RG_E_USAGE, "without a forward");
  FAILS(rg_session_forget_saved(second, there[1], &e), RG_E_USAGE, "no saved block");
  FAILS(rg_session_forward(second, &e), RG_E_USAGE, "forget"); /* its memory may be gone */
  FAILS(rg_session_adopt_saved(NULL, there[1], &e), RG_E_USAGE, "session is NULL");
  FAILS(rg_session_forget_saved(NULL, there[1], &e), RG_E_USAGE, "session is NULL");
#if COUNTED
  long before = atomic_load(&host.calls);
  for (int i = 0; i < 1000; i++) { /* one record serves them all */
    CR_OK(rg_session_bind_saved(second, there[i & 1], &e), &e);
    CR_OK(rg_session_forget_saved(second, there[i & 1], &e), &e);
  }
  cr_assert_eq(atomic_load(&host.calls), before);
#endif
  rg_session_destroy(plain);
  rg_session_destroy(second);
  rg_session_destroy(first);
  free_buffers(&again);
  for (int i = 0; i < 2; i++) free(there[i]);
}

Test(session, times_and_reading, .init = setup, .fini = teardown) {
  rg_error e = {0};
  rg_session *s = session(NULL);
  bind_all(s, &io);
  run_both(s);
  rg_node_time t;
  size_t n = 0;
  int backward = 0, attention = 0;
  double total = 0;
  for (; rg_session_node_time(s, n, &t) == RG_OK; n++) {
    cr_assert(t.name && t.op);
    cr_assert(t.ms >= 0 && t.model_ms > 0, "%s: %g ms, model %g", t.name, t.ms, t.model_ms);
    backward += t.backward;
    attention += strcmp(t.op, "slc_attn") == 0;
    total += t.ms;
  }
  cr_assert(backward >= 5 && attention == 1 && n > (size_t)backward && total > 0);

  float *o = malloc(T * 4 * 16 * sizeof *o);
  CR_OK(rg_session_read(s, "o", o, T * 4 * 16 * sizeof *o, &e), &e);
  cr_assert_arr_eq(o, buffer(&io, RG_OUTPUT, "o"), T * 4 * 16 * sizeof *o);
  FAILS(rg_session_read(s, "o", o, 8, &e), RG_E_USAGE, "expected 38400");
  int32_t *idx = malloc(T * 2 * 4 * sizeof *idx); /* [T, KH, top_n], which backward reads */
  CR_OK(rg_session_read(s, "idx", idx, T * 2 * 4 * sizeof *idx, &e), &e);
  for (int row = 0; row < T; row++)
    for (int h = 0; h < 2; h++)
      cr_assert_eq(idx[(row * 2 + h) * 4],
                   row < lengths[0] + lengths[2] ? 0 : idx[(row * 2 + h) * 4],
                   "block 0 is always taken");
  free(idx);
  free(o);
  rg_session_destroy(s);
}

Test(session, no_gradients, .init = setup, .fini = teardown) {
  rg_error e = {0};
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rg_plan_options o = {.set = set, .nset = 2, .threads = 1, .no_grad = true};
  rg_plan *forward = NULL;
  rg_session *s = NULL;
  CR_OK(rg_plan_create(spec, NULL, &o, &forward, &e), &e);
  rg_sizes z;
  cr_assert_eq(rg_plan_sizes(forward, &z), RG_OK);
  cr_assert_eq(z.saved, 0);
  buffers mine;
  make_buffers(forward, 3, T, lengths, &mine);
  for (int i = 0; i < mine.n; i++)
    cr_assert(mine.info[i].role == RG_INPUT || mine.info[i].role == RG_OUTPUT);
  CR_OK(rg_session_create(forward, NULL, &s, &e), &e);
  bind_all(s, &mine);
  CR_OK(rg_session_forward(s, &e), &e);
  FAILS(rg_session_backward(s, &e), RG_E_USAGE, "no gradients");
  rg_session_destroy(s);

  s = session(NULL);
  bind_all(s, &io);
  run_both(s);
  rg_session_destroy(s);
  cr_assert_arr_eq(buffer(&mine, RG_OUTPUT, "o"), buffer(&io, RG_OUTPUT, "o"), T * 4 * 16 * 4);
  free_buffers(&mine);
  rg_plan_destroy(forward);
}

/* Planner switches change bytes in the direction they say, and no bit of a result. */
Test(session, planner_off_switches, .init = setup, .fini = teardown) {
  rg_error e = {0};
  rg_sizes packed, z;
  cr_assert_eq(rg_plan_sizes(plan, &packed), RG_OK);
  rg_session *s = session(NULL);
  bind_all(s, &io);
  run_both(s);
  rg_session_destroy(s);
  for (int i = 0; i < 2; i++) {
    rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
    rg_plan_options o = {
        .set = set, .nset = 2, .threads = 2, .no_reuse = i == 0, .no_inplace = i == 1};
    rg_plan *other = NULL;
    buffers mine;
    CR_OK(rg_plan_create(spec, NULL, &o, &other, &e), &e);
    cr_assert_eq(rg_plan_sizes(other, &z), RG_OK);
    cr_assert_geq(z.scratch, packed.scratch);
    cr_assert_eq(z.saved, packed.saved);
    make_buffers(other, 3, T, lengths, &mine);
    CR_OK(rg_session_create(other, NULL, &s, &e), &e);
    bind_all(s, &mine);
    run_both(s);
    rg_session_destroy(s);
    same_results(&io, &mine, i ? "in-place reuse off" : "reuse off");
    free_buffers(&mine);
    rg_plan_destroy(other);
  }
}

Test(session, reports, .init = setup, .fini = teardown) {
  static const struct {
    const char *format, *part[4];
  } want[] = {
      {"text", {"capacity", "recompute", "saved", "gap"}},
      {"json",
       {"\"version\": 1", "\"predicted_peak_bytes\": ", "\"nodes\": [", "\"recompute\": {"}},
      {"dot", {"digraph", "combine", NULL, NULL}},
      {"timeline", {"", NULL, NULL, NULL}},
      {"svg", {"<svg", "</svg>", NULL, NULL}},
      {"graph", {"slc_o", "cu_seqlens", NULL, NULL}},
      {"steps", {"slc_attn", "saved+0", "input:q", "grad_out:gate"}}};
  for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
    rg_text a, b;
    rg_error e = {0};
    CR_OK(rg_plan_write(plan, want[i].format, &a, &e), &e);
    CR_OK(rg_plan_write(plan, want[i].format, &b, &e), &e);
    cr_assert_gt(a.size, 100, "%s", want[i].format);
    cr_assert_eq(strlen(a.data), a.size);
    cr_assert_str_eq(a.data, b.data);
    for (int k = 0; k < 4 && want[i].part[k]; k++)
      cr_assert(strstr(a.data, want[i].part[k]), "%s lacks %s:\n%s", want[i].format,
                want[i].part[k], a.data);
    rg_text_destroy(&a);
    rg_text_destroy(&b);
  }
}

/* The page holds the plan's JSON, and times and texts that are given; none can end an element. */
Test(session, page, .init = setup, .fini = teardown) {
  rg_error e = {0};
  rg_text json, page, other;
  rg_node_info n;
  size_t steps = 0;
  double ms[64];
  for (size_t i = 0; rg_plan_node(plan, i, &n) == RG_OK; i++)
    if (n.step >= 0) ms[steps++] = 0.25 + (double)n.step;
  CR_OK(rg_plan_write(plan, "json", &json, &e), &e);
  CR_OK(rg_plan_report(plan, "html", NULL, &page, &e), &e);
  cr_assert(strstr(page.data, json.data));
  cr_assert_null(strstr(page.data, "data-measured\">"));
  rg_text_destroy(&page);
  const rg_report_options o = {.size = sizeof o,
                               .step_ms = ms,
                               .nstep = steps,
                               .forward_ms = 7.5,
                               .measured_peak = 4096,
                               .source = "one </script> run",
                               .front = "{\"version\": 1, \"exact\": true, \"gap_ms\": 0, "
                                        "\"points\": [], \"x\": \"<!--\"}",
                               .against = json.data};
  CR_OK(rg_plan_report(plan, "html", &o, &page, &e), &e);
  static const char *const part[] = {"\"step_ms\": [0.25, 1.25, ", "\"forward_ms\": 7.5",
                                     "\"peak_bytes\": 4096",       "one \\u003c/script> run",
                                     "\"x\": \"\\u003c!--\"",      "id=\"data-against\""};
  for (size_t i = 0; i < sizeof part / sizeof *part; i++)
    cr_assert(strstr(page.data, part[i]), "the page lacks %s", part[i]);
  CR_OK(rg_plan_report(plan, "html", &o, &other, &e), &e);
  cr_assert_str_eq(page.data, other.data);
  rg_text_destroy(&other);
  rg_text_destroy(&page);
  rg_text_destroy(&json);
}

/* ---- what the batch that is bound asks for ---- */

static const char *const work_spec = "{\"regraph\": 1, \"inputs\": {\"q\": {\"shape\": [\"T\", 2, "
                                     "4], \"dtype\": \"f32\", \"grad\": true}, "
                                     "\"k\": {\"shape\": [\"T\", 1, 4], \"dtype\": \"f32\"}, "
                                     "\"v\": {\"shape\": [\"T\", 1, 4], \"dtype\": "
                                     "\"f32\"}, "
                                     "\"w\": {\"shape\": [3, 8], \"dtype\": \"f32\"}, \"cu\": "
                                     "{\"shape\": [\"B+1\"], \"dtype\": \"i32\"}}, "
                                     "\"nodes\": [{\"name\": \"a\", \"op\": \"swa_attn\", \"in\": "
                                     "{\"q\": \"q\", \"k\": \"k\", \"v\": \"v\", "
                                     "\"cu_seqlens\": \"cu\"}, \"out\": {\"o\": \"o\"}, \"attrs\": "
                                     "{\"window_left\": -1}}], \"outputs\": "
                                     "{\"o\": \"o\"}}";

Test(work, follows_the_lengths) {
  enum { T = 60, B = 6 };
  rg_context *ctx;
  rg_spec *spec;
  rg_plan *plan;
  rg_session *session;
  rg_error e = {0};
  static float q[T * 8], k[T * 4], v[T * 4], w[24], o[T * 8], d_o[T * 8], d_q[T * 8];
  int32_t cu[B + 1] = {0, T, T, T, T, T, T};
  rg_binding set[] = {{.name = "T", .value = T}, {.name = "B", .value = B}};
  cr_assert_eq(rg_context_create(NULL, &ctx, &e), RG_OK);
  cr_assert_eq(rg_spec_load_text(ctx, work_spec, strlen(work_spec), "s", set, 2, &spec, &e), RG_OK,
               "%s", e.message);
  cr_assert_eq(rg_plan_create(spec, NULL, NULL, &plan, &e), RG_OK, "%s", e.message);
  cr_assert_eq(rg_session_create(plan, NULL, &session, &e), RG_OK, "%s", e.message);
  rg_node_work x;
  cr_assert_eq(rg_session_node_work(session, 0, &x, NULL), RG_E_USAGE, "no lengths are bound");
  rg_session_bind(session, RG_INPUT, "q", q, sizeof q, &e);
  rg_session_bind(session, RG_INPUT, "k", k, sizeof k, &e);
  rg_session_bind(session, RG_INPUT, "v", v, sizeof v, &e);
  rg_session_bind(session, RG_INPUT, "w", w, sizeof w, NULL); /* no output needs it */
  rg_session_bind(session, RG_INPUT, "cu", cu, sizeof cu, &e);
  rg_session_bind(session, RG_OUTPUT, "o", o, sizeof o, &e);
  rg_session_bind(session, RG_GRAD_IN, "o", d_o, sizeof d_o, &e);
  rg_session_bind(session, RG_GRAD_OUT, "q", d_q, sizeof d_q, &e);
  cr_assert_eq(rg_session_forward(session, &e), RG_OK, "%s", e.message);
  cr_assert_eq(rg_session_node_work(session, 99, &x, NULL), RG_E_USAGE);
  static const int32_t lengths[][B] = {
      {T}, {10, 10, 10, 10, 10, 10}, {1, 1, 1, 1, 1, 1}, {0, 7, 0, 20, 0, 1}, {0}};
  for (size_t c = 0; c < sizeof lengths / sizeof *lengths; c++) {
    double pairs = 0;
    for (int b = 0; b < B; b++) {
      cu[b + 1] = cu[b] + lengths[c][b];
      pairs += lengths[c][b] * (lengths[c][b] + 1) / 2.0;
    }
    rg_node_time t;
    for (size_t i = 0; rg_session_node_time(session, i, &t) == RG_OK; i++) {
      if (strncmp(t.op, "swa_attn", 8) != 0) continue;
      cr_assert_eq(rg_session_node_work(session, i, &x, &e), RG_OK, "%s", e.message);
      cr_assert_eq(x.flops, pairs * 2 * 2 * (t.backward ? 5 * 4 : 2 * 4), "case %zu, %s: %g", c,
                   t.name, x.flops);
      if (c == 0)
        cr_assert(x.flops == t.flops && x.bytes == t.bytes && x.roofline_ms == t.roofline_ms);
      if (c == 2) cr_assert_lt(x.bytes, t.bytes / 5);
    }
  }
  rg_session_destroy(session);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}
