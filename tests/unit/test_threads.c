/* tests/unit/test_threads.c: one plan, many threads: sessions share it without locks, results
 * do not depend on the number of threads, and several calls may be in flight on one session.
 * Meant for ThreadSanitizer as well.
 */
#include "run_util.h"

#include <pthread.h>

enum { T = 200, B = 2 };
static const int lengths[B] = {83, 110};

typedef struct fixture {
  rg_context *ctx;
  rg_spec *spec;
  rg_policy *policy;
} fixture;

static fixture open_fixture(unsigned mask, int split) {
  char text[8192], policy[512];
  rg_error e = {0};
  fixture f = {0};
  CR_OK(rg_context_create(NULL, &f.ctx, &e), &e);
  f.spec = load_spec(f.ctx, nsa_spec("f32", false, text, sizeof text));
  f.policy = load_policy(f.ctx, nsa_policy(mask, split, policy, sizeof policy));
  return f;
}

static void close_fixture(fixture *f) {
  rg_policy_destroy(f->policy);
  rg_spec_destroy(f->spec);
  rg_context_destroy(f->ctx);
}

static void run_once(const rg_plan *plan, uint64_t seed, buffers *out) {
  rg_error e = {0};
  rg_session *s = NULL;
  make_buffers(plan, seed, T, lengths, out);
  CR_OK(rg_session_create(plan, NULL, &s, &e), &e);
  bind_all(s, out);
  run_both(s);
  rg_session_destroy(s);
}

Test(threads, number_changes_nothing) {
  fixture f = open_fixture(0x3, 1);
  rg_plan *plan[3];
  buffers result[3];
  for (int i = 0; i < 3; i++) {
    plan[i] = make_plan(f.spec, f.policy, T, B, i + 1);
    run_once(plan[i], 5, &result[i]);
    if (i) same_results(&result[0], &result[i], "1 thread against more");
  }
  for (int i = 0; i < 3; i++) {
    free_buffers(&result[i]);
    rg_plan_destroy(plan[i]);
  }
  close_fixture(&f);
}

typedef struct job {
  const rg_plan *plan;
  uint64_t seed;
  buffers result;
  rg_status status;
} job;

static void *run_job(void *user) {
  job *j = user;
  rg_session *s = NULL;
  rg_error e = {0};
  rg_session_create(j->plan, NULL, &s, &e);
  for (int i = 0; i < j->result.n; i++)
    rg_session_bind(s, j->result.info[i].role, j->result.info[i].name, j->result.data[i],
                    (size_t)j->result.info[i].bytes, &e);
  for (int i = 0; i < 3; i++) {
    rg_session_forward(s, &e);
    rg_session_backward(s, &e);
  }
  rg_session_destroy(s);
  j->status = e.status;
  return NULL;
}

/* Two sessions of one plan at once, each with a pool of two threads. */
Test(threads, two_sessions_of_one_plan) {
  fixture f = open_fixture(0x1f, 0);
  rg_plan *plan = make_plan(f.spec, f.policy, T, B, 2);
  job j[2];
  buffers alone[2];
  pthread_t thread[2];
  for (int i = 0; i < 2; i++) {
    run_once(plan, 11 + (uint64_t)i, &alone[i]);
    j[i] = (job){.plan = plan, .seed = 11 + (uint64_t)i};
    make_buffers(plan, j[i].seed, T, lengths, &j[i].result);
  }
  for (int i = 0; i < 2; i++) cr_assert_eq(pthread_create(&thread[i], NULL, run_job, &j[i]), 0);
  for (int i = 0; i < 2; i++) pthread_join(thread[i], NULL);
  for (int i = 0; i < 2; i++) {
    cr_assert_eq(j[i].status, RG_OK);
    same_results(&alone[i], &j[i].result, "two sessions at once against one alone");
    free_buffers(&alone[i]);
    free_buffers(&j[i].result);
  }
  rg_plan_destroy(plan);
  close_fixture(&f);
}

/* forward A, B, C; backward B, A, C: each backward meets its own saved values, inputs and
 * outputs. */
Test(threads, saved_blocks_in_flight) {
  enum { CALLS = 3 };
  static const int order[CALLS] = {1, 0, 2};
  fixture f = open_fixture(0x1, 0);
  rg_plan *plan = make_plan(f.spec, f.policy, T, B, 2);
  rg_sizes z;
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  buffers alone[CALLS], flight[CALLS];
  void *saved[CALLS], *scratch = NULL;
  cr_assert_eq(posix_memalign(&scratch, 256, (size_t)z.scratch), 0);
  for (int i = 0; i < CALLS; i++) {
    run_once(plan, 21 + (uint64_t)i, &alone[i]);
    make_buffers(plan, 21 + (uint64_t)i, T, lengths, &flight[i]);
    cr_assert_eq(posix_memalign(&saved[i], 256, (size_t)z.saved), 0);
  }
  rg_error e = {0};
  rg_session *s = NULL;
  rg_session_options o = {.saved = saved[0], .scratch = scratch};
  CR_OK(rg_session_create(plan, &o, &s, &e), &e);
  for (int i = 0; i < CALLS; i++) {
    CR_OK(rg_session_bind_saved(s, saved[i], &e), &e);
    bind_all(s, &flight[i]);
    CR_OK(rg_session_forward(s, &e), &e);
  }
  for (int k = 0; k < CALLS; k++) {
    const buffers *b = &flight[order[k]];
    CR_OK(rg_session_bind_saved(s, saved[order[k]], &e), &e);
    /* gradients only: inputs and outputs are known from the forward */
    for (int i = 0; i < b->n; i++)
      if (b->info[i].role == RG_GRAD_IN || b->info[i].role == RG_GRAD_OUT)
        CR_OK(rg_session_bind(s, b->info[i].role, b->info[i].name, b->data[i],
                              (size_t)b->info[i].bytes, &e),
              &e);
    CR_OK(rg_session_backward(s, &e), &e);
  }
  rg_session_destroy(s);
  for (int i = 0; i < CALLS; i++) {
    same_results(&alone[i], &flight[i], "several calls in flight against one at a time");
    free_buffers(&alone[i]);
    free_buffers(&flight[i]);
    free(saved[i]);
  }
  free(scratch);
  rg_plan_destroy(plan);
  close_fixture(&f);
}
