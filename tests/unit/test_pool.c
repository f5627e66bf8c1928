/* tests/unit/test_pool.c: every task runs once, whatever the numbers of threads
 * and tasks; nothing is allocated. */
#include "exec/pool.h"

#include <criterion/criterion.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static _Atomic int allocations;

static void *count_alloc(void *user, size_t size) {
  (void)user;
  atomic_fetch_add(&allocations, 1);
  return malloc(size);
}
static void count_free(void *user, void *ptr) {
  (void)user;
  free(ptr);
}

static rg_context *context(void) {
  rg_allocator host = {count_alloc, count_free, NULL};
  rg_context *ctx = NULL;
  rg_error e = {0};
  cr_assert_eq(rg_context_create(&host, &ctx, &e), RG_OK, "%s", e.message);
  return ctx;
}

enum { MOST = 3000 };
typedef struct job {
  int count[MOST]; /* plain on purpose: a task run twice at once is a data race that TSan reports */
  int threads;
  _Atomic int bad_thread;
  long sum[8];
} job;

static void mark(void *arg, int64_t task, int thread) {
  job *j = arg;
  if (thread < 0 || thread >= j->threads) {
    atomic_fetch_add(&j->bad_thread, 1);
    return;
  }
  j->count[task]++;
  j->sum[thread] += task; /* each thread number belongs to one thread at a time */
}

Test(pool, every_task_once) {
  rg_context *ctx = context();
  static job j;
  const int tasks[] = {0, 1, 2, 3, 5, 17, 256, MOST};
  for (int threads = 1; threads <= 5; threads++) {
    rgi_pool *p = NULL;
    rg_error e = {0};
    cr_assert_eq(rgi_pool_create(ctx, threads, &p, &e), RG_OK, "%s", e.message);
    cr_assert_eq(rgi_pool_threads(p), threads);
    for (int r = 0; r < 40; r++) {
      int n = tasks[r % RGI_COUNT(tasks)];
      memset(&j, 0, sizeof j);
      j.threads = threads;
      rgi_pool_run(p, n, mark, &j);
      long sum = 0;
      for (int i = 0; i < MOST; i++)
        cr_assert_eq(j.count[i], i < n, "task %d of %d, %d threads", i, n, threads);
      for (int i = 0; i < 8; i++) sum += j.sum[i];
      cr_assert_eq(sum, (long)n * (n - 1) / 2);
      cr_assert_eq(j.bad_thread, 0);
    }
    rgi_pool_destroy(p);
  }
  rg_context_destroy(ctx);
}

static void nothing(void *arg, int64_t task, int thread) {
  (void)thread;
  atomic_fetch_add((_Atomic int64_t *)arg, task + 1);
}

/* Many short jobs back to back: closing a job while workers are on their way in. */
Test(pool, short_jobs) {
  rg_context *ctx = context();
  rgi_pool *p = NULL;
  rg_error e = {0};
  cr_assert_eq(rgi_pool_create(ctx, 3, &p, &e), RG_OK, "%s", e.message);
  int before = atomic_load(&allocations);
  for (int r = 0; r < 5000; r++) {
    _Atomic int64_t sum = 0;
    rgi_pool_run(p, 4, nothing, &sum);
    cr_assert_eq(atomic_load(&sum), 10);
  }
  cr_assert_eq(atomic_load(&allocations), before, "a run allocated");
  rgi_pool_destroy(p);
  rg_context_destroy(ctx);
}

Test(pool, refuses_no_threads) {
  rg_context *ctx = context();
  rgi_pool *p = (rgi_pool *)ctx;
  rg_error e = {0};
  cr_assert_eq(rgi_pool_create(ctx, 0, &p, &e), RG_E_USAGE);
  cr_assert_null(p);
  cr_assert_eq(e.status, RG_E_USAGE);
  rgi_pool_destroy(NULL);
  rg_context_destroy(ctx);
}
