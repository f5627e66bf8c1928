/* tests/unit/ranks_util.h: one plan on W ranks that are threads: each has a session and buffers of
 * its own; on a GPU, all on that one. */
#ifndef RANKS_UTIL_H
#define RANKS_UTIL_H

#include "run_util.h"

#include <pthread.h>

enum { MOST_RANKS = 8 };

typedef struct a_rank {
  int rank;
  const rg_plan *plan;
  rg_comm *comm;
  buffers b; /* filled before the run */
  bool backward, poison;
  int repeats;
  pthread_t thread;
  rg_status status;
  rg_error e;
  int64_t asked; /* bytes that the session asked for */
} a_rank;

/* Memory full of NaN: what nobody writes and somebody reads shows. (The GPU's is often zero.) */
static inline void *ranks_alloc(void *user, size_t size) {
  a_rank *r = user;
  void *p = NULL, *host = NULL;
  r->asked += (int64_t)size;
  if (posix_memalign(&host, 256, size)) return NULL;
  memset(host, 0xff, size);
  if (!test_on_gpu()) return host;
  if (rg_memory_alloc(r->plan, size, &p, NULL) == RG_OK &&
      rg_memory_write(r->plan, p, host, size, NULL) != RG_OK)
    rg_memory_free(r->plan, p), p = NULL;
  free(host);
  return p;
}
static inline void ranks_free(void *user, void *p) {
  if (test_on_gpu())
    rg_memory_free(((a_rank *)user)->plan, p);
  else
    free(p);
}

/* Makes a stream for each rank, where tests on a GPU say so. */
static void *(*ranks_stream)(void);

static inline void *run_a_rank(void *arg) {
  a_rank *r = arg;
  rg_session *s = NULL;
  rg_allocator arena = {ranks_alloc, ranks_free, r};
  rg_session_options o = {
      .size = sizeof o, .comm = r->comm, .arena = &arena, .debug_poison = r->poison};
  if (ranks_stream) o.stream = ranks_stream();
  if (r->b.n) upload_all(&r->b);
  r->status = rg_session_create(r->plan, &o, &s, &r->e);
  for (int i = 0; i < r->b.n && r->status == RG_OK; i++)
    r->status = rg_session_bind(s, r->b.info[i].role, r->b.info[i].name, r->b.device[i],
                                (size_t)r->b.info[i].bytes, &r->e);
  for (int i = 0; i <= r->repeats && r->status == RG_OK; i++) {
    r->status = rg_session_forward(s, &r->e);
    if (r->status == RG_OK && r->backward) r->status = rg_session_backward(s, &r->e);
  }
  if (r->status == RG_OK) r->status = rg_session_synchronize(s, &r->e);
  if (r->status == RG_OK && r->b.n) fetch_all(s, &r->b);
  rg_session_destroy(s);
  rg_comm_destroy(r->comm, r->status == RG_OK ? NULL : &r->e);
  return NULL;
}

/* Runs what rank[0 … n) hold; their status says how it went. */
static inline void run_ranks(rg_context *ctx, a_rank *rank, int n, double deadline) {
  rg_comm *comm[MOST_RANKS];
  rg_error e = {0};
  CR_OK(rg_comm_threads(ctx, n, deadline, comm, &e), &e);
  for (int i = 0; i < n; i++) {
    rank[i].rank = i;
    rank[i].comm = comm[i];
    cr_assert_eq(pthread_create(&rank[i].thread, NULL, run_a_rank, &rank[i]), 0);
  }
  for (int i = 0; i < n; i++) pthread_join(rank[i].thread, NULL);
}

#endif
