/* exec/pool.c: the thread pool of pool.h.

   A job is one call of rgi_pool_run. The caller publishes it, takes tasks like everybody else,
   closes the job, and waits for the workers that are still inside. Workers join a job if they wake
   up in time; one that sleeps through a short job costs nothing, so a busy machine delays nobody.

   Ordering: everything about a job is written and read under `mutex`, except
     next    handed out by atomic addition (relaxed: the job's fields came through the mutex)
     epoch   lets idle workers spin without the mutex; only a hint, the decision falls under the
             mutex
     inside  lets the caller spin for the last workers; release by the leaving worker, acquire by
             the caller

   One job at a time: rgi_pool_run from within a task, or from two threads at once on one pool, is a
   programming error.
 */
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

/* Rounds of idle spinning before a thread sleeps: a few microseconds, the length
 * of the gap between two steps. */
enum { SPIN = 2000 };

typedef struct worker {
  struct rgi_pool *pool;
  pthread_t thread;
  int index;
} worker;

struct rgi_pool {
  const rg_context *ctx;
  int threads; /* with the caller */
  int started; /* workers to join */
  int spin;
  pthread_mutex_t mutex;
  pthread_cond_t wake; /* workers wait for a job */
  pthread_cond_t done; /* the caller waits for workers */
  void (*fn)(void *arg, int64_t task, int thread);
  void *arg;
  int64_t ntask;
  bool open; /* the job may be joined */
  bool stop;
  int sleeping; /* workers in `wake` */
  _Atomic int64_t next;
  _Atomic uint32_t epoch;
  _Atomic int inside; /* workers at work on the job */
  worker worker[];
};

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

static void take_tasks(rgi_pool *p, void (*fn)(void *, int64_t, int), void *arg, int64_t ntask,
                       int thread) {
  for (;;) {
    int64_t task = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
    if (task >= ntask) return;
    fn(arg, task, thread);
  }
}

static void *work(void *user) {
  worker *w = user;
  rgi_pool *p = w->pool;
  uint32_t seen = 0;
  for (;;) {
    for (int i = 0; i < p->spin && atomic_load_explicit(&p->epoch, memory_order_relaxed) == seen;
         i++)
      relax();
    pthread_mutex_lock(&p->mutex);
    while (!p->stop &&
           !(p->open && atomic_load_explicit(&p->epoch, memory_order_relaxed) != seen)) {
      p->sleeping++;
      pthread_cond_wait(&p->wake, &p->mutex);
      p->sleeping--;
    }
    if (p->stop) {
      pthread_mutex_unlock(&p->mutex);
      return NULL;
    }
    seen = atomic_load_explicit(&p->epoch, memory_order_relaxed);
    atomic_fetch_add_explicit(&p->inside, 1, memory_order_relaxed);
    void (*fn)(void *, int64_t, int) = p->fn;
    void *arg = p->arg;
    int64_t ntask = p->ntask;
    pthread_mutex_unlock(&p->mutex);

    take_tasks(p, fn, arg, ntask, w->index);

    /* The caller may return as soon as `inside` is zero, so signal under the mutex:
     * it cannot be destroyed there. */
    pthread_mutex_lock(&p->mutex);
    if (atomic_fetch_sub_explicit(&p->inside, 1, memory_order_release) == 1)
      pthread_cond_signal(&p->done);
    pthread_mutex_unlock(&p->mutex);
  }
}

void rgi_pool_run(void *pool, int64_t ntask, void (*fn)(void *arg, int64_t task, int thread),
                  void *arg) {
  rgi_pool *p = pool;
  if (p->threads == 1 || ntask <= 1) {
    for (int64_t t = 0; t < ntask; t++) fn(arg, t, 0);
    return;
  }
  pthread_mutex_lock(&p->mutex);
  p->fn = fn;
  p->arg = arg;
  p->ntask = ntask;
  p->open = true;
  atomic_store_explicit(&p->next, 0, memory_order_relaxed);
  atomic_fetch_add_explicit(&p->epoch, 1, memory_order_relaxed);
  /* No more sleepers than tasks for them. */
  int wanted = ntask - 1 < p->sleeping ? (int)(ntask - 1) : p->sleeping;
  if (wanted == p->sleeping) {
    if (wanted) pthread_cond_broadcast(&p->wake);
  } else {
    for (int i = 0; i < wanted; i++) pthread_cond_signal(&p->wake);
  }
  pthread_mutex_unlock(&p->mutex);

  take_tasks(p, fn, arg, ntask, 0);

  pthread_mutex_lock(&p->mutex);
  p->open = false; /* from here on `inside` only falls */
  bool idle = !atomic_load_explicit(&p->inside, memory_order_acquire);
  pthread_mutex_unlock(&p->mutex);
  if (idle) return;
  for (int i = 0; i < p->spin && atomic_load_explicit(&p->inside, memory_order_acquire); i++)
    relax();
  pthread_mutex_lock(&p->mutex);
  while (atomic_load_explicit(&p->inside, memory_order_acquire))
    pthread_cond_wait(&p->done, &p->mutex);
  pthread_mutex_unlock(&p->mutex);
}

int rgi_pool_threads(const rgi_pool *p) {
  return p->threads;
}

rg_status rgi_pool_create(const rg_context *ctx, int threads, rgi_pool **out, rg_error *e) {
  *out = NULL;
  if (threads < 1)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "a pool of %d threads; expected at least 1",
                    threads);
  size_t size = sizeof(rgi_pool) + (size_t)(threads - 1) * sizeof(worker);
  rgi_pool *p = rgi_malloc(ctx, size);
  if (!p) return rgi_nomem(e);
  memset(p, 0, size);
  p->ctx = ctx;
  p->threads = threads;
  /* Spinning helps only threads that have a core each. */
  p->spin = sysconf(_SC_NPROCESSORS_ONLN) >= threads ? SPIN : 0;
  atomic_init(&p->next, 0);
  atomic_init(&p->epoch, 0);
  atomic_init(&p->inside, 0);
  pthread_mutex_init(&p->mutex, NULL); /* default attributes: these three cannot fail on Linux */
  pthread_cond_init(&p->wake, NULL);
  pthread_cond_init(&p->done, NULL);
  for (int i = 1; i < threads; i++) {
    worker *w = &p->worker[i - 1];
    w->pool = p;
    w->index = i;
    int code = rgi_thread_start(&w->thread, work, w);
    if (code) {
      rgi_pool_destroy(p);
      return rgi_fail(e, RG_E_NOMEM, NULL, NULL, "thread %d of %d did not start: %s", i, threads,
                      strerror(code));
    }
    p->started++;
  }
  *out = p;
  return RG_OK;
}

void rgi_pool_destroy(rgi_pool *p) {
  if (!p) return;
  pthread_mutex_lock(&p->mutex);
  p->stop = true;
  atomic_fetch_add_explicit(&p->epoch, 1, memory_order_relaxed); /* ends the spinning */
  pthread_cond_broadcast(&p->wake);
  pthread_mutex_unlock(&p->mutex);
  for (int i = 0; i < p->started; i++) pthread_join(p->worker[i].thread, NULL);
  pthread_cond_destroy(&p->done);
  pthread_cond_destroy(&p->wake);
  pthread_mutex_destroy(&p->mutex);
  rgi_free(p->ctx, p);
}
