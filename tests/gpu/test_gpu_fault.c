/* tests/gpu/test_gpu_fault.c: a step that reads memory that is not there. The session reports it
 * once in full (in debug mode with the node's name), every later call of it fails at once with
 * the same words, and all can be taken down. A fault takes the process' device away for good, so
 * each test here is a process of its own: without Criterion's, the program runs itself.
 */
#include "tests/unit/run_util.h"

#ifdef REGRAPH_CUDA
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { T = 300, B = 2 };

/* Is this the process to do it in? Otherwise it has been done in another, and went well. */
static bool own_process(const char *test) {
  if (!test_on_gpu()) return false;
#ifdef PLAIN_CATCHES
  if (getenv("REGRAPH_FAULT")) return true;
  pid_t child = fork();
  if (child == 0) {
    setenv("REGRAPH_FAULT", "1", 1);
    execl("/proc/self/exe", "gpu_tests", test, (char *)NULL);
    _exit(127);
  }
  int status = -1;
  cr_assert(child > 0 && waitpid(child, &status, 0) == child);
  cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: status %x", test, status);
  return false;
#else
  (void)test;
  return true;
#endif
}

static double ms_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* Calls after the fault: each fails, says since when, and does not try anything that takes time. */
typedef rg_status (*session_call)(rg_session *s, rg_error *e);
static rg_status set_no_stream(rg_session *s, rg_error *e) {
  return rg_session_set_stream(s, NULL, e);
}
static void fails_at_once(rg_session *s, session_call call, const char *what) {
  rg_error e = {0};
  const double t0 = ms_now();
  const rg_status status = call(s, &e);
  const double took = ms_now() - t0;
  cr_assert_eq(status, RG_E_DEVICE, "%s: %s (%s)", what, e.message, rg_status_name(status));
  cr_assert(strstr(e.message, "the session is lost since"), "%s: %s", what, e.message);
  cr_assert_lt(took, 100, "%s took %.1f ms", what, took);
}

static void fault(bool debug, const char *input, rg_role role) {
  static char text[8192];
  rg_error e = {0};
  rg_context *ctx = NULL;
  rg_session *s = NULL, *other = NULL;
  rg_binding set[] = {
      {"D", 128, NULL}, {"kernel", 32, NULL}, {"stride", 16, NULL}, {"block", 64, NULL}};
  rg_spec *spec = NULL;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  nsa_spec("bf16", false, text, sizeof text);
  CR_OK(rg_spec_load_text(ctx, text, strlen(text), "nsa", set, 4, &spec, &e), &e);
  rg_plan *plan = make_plan(spec, NULL, T, B, 1);
  rg_session_options o = {.debug_poison = debug};
  CR_OK(rg_session_create(plan, &o, &s, &e), &e);
  CR_OK(rg_session_create(plan, NULL, &other, &e), &e);
  buffers b, c;
  make_buffers(plan, 1, T, NULL, &b);
  make_buffers(plan, 1, T, NULL, &c);
  bind_all(other, &c);
  bind_all(s, &b);
  run_both(s);
  fetch_all(s, &b);
  finite_results(&b, "before the fault");

  rg_tensor_info t = {.name = NULL};
  for (int i = 0; i < b.n; i++)
    if (b.info[i].role == role && strcmp(b.info[i].name, input) == 0) t = b.info[i];
  cr_assert_not_null(t.name);
  void *nowhere = (void *)(uintptr_t)0x10000;
  CR_OK(rg_session_bind(s, t.role, t.name, nowhere, (size_t)t.bytes, &e), &e);
  rg_status status = rg_session_forward(s, &e);
  if (status == RG_OK) status = rg_session_backward(s, &e);
  if (status == RG_OK) status = rg_session_synchronize(s, &e);
  fprintf(stderr, "%s, %s: %s: %s (%s)\n", debug ? "debug" : "graph", input, rg_status_name(status),
          e.message, e.node);
  cr_assert_eq(status, RG_E_DEVICE);
  if (debug) cr_assert(strlen(e.node) > 0, "the message does not name the node: %s", e.message);
  for (int i = 0; i < 100; i++) {
    fails_at_once(s, rg_session_backward, "backward");
    fails_at_once(s, rg_session_forward, "forward");
    fails_at_once(s, rg_session_synchronize, "synchronize");
    fails_at_once(s, set_no_stream, "set_stream");
  }
  /* the first error wins */
  rg_error first = {.status = RG_E_SHAPE, .message = "an earlier call's"};
  cr_assert_eq(rg_session_backward(s, &first), RG_E_DEVICE);
  cr_assert(first.status == RG_E_SHAPE && strcmp(first.message, "an earlier call's") == 0, "%s",
            first.message);
  /* The device is gone for the others too: errors, nothing worse. */
  e = (rg_error){0};
  cr_assert_neq(rg_session_forward(other, &e), RG_OK);
  cr_assert(strlen(e.message) > 0);
  e = (rg_error){0};
  rg_session *third = NULL;
  cr_assert_neq(rg_session_create(plan, NULL, &third, &e), RG_OK);
  void *p = NULL;
  cr_assert_neq(rg_memory_alloc(plan, 1 << 20, &p, &e), RG_OK);
  const double t0 = ms_now();
  rg_session_destroy(other);
  rg_session_destroy(s);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
  cr_assert_lt(ms_now() - t0, 2000, "taking all down took %.0f ms", ms_now() - t0);
}

Test(gpu_fault, debug_forward) {
  if (own_process("gpu_fault/debug_forward")) fault(true, "q", RG_INPUT);
}
Test(gpu_fault, debug_backward) {
  if (own_process("gpu_fault/debug_backward")) fault(true, "o", RG_GRAD_IN);
}
Test(gpu_fault, graph_forward) {
  if (own_process("gpu_fault/graph_forward")) fault(false, "v", RG_INPUT);
}
Test(gpu_fault, graph_output) {
  if (own_process("gpu_fault/graph_output")) fault(false, "k", RG_GRAD_OUT);
}

#endif
