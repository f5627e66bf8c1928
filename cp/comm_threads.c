/* cp/comm_threads.c: ranks that are threads of one process: a collective is two meetings.
 *
 *     arrive     every rank says what it calls and where its bytes are; the last one to come
 *                checks that all call the same
 *     copy       each takes what it gets out of the others' memory, without the lock
 *     leave      nobody returns, and perhaps frees its buffers, before all have copied
 *
 * On a GPU, one for all ranks, the meetings are of the threads that enqueue. Each marks its stream
 * when its bytes are made (ready) and when it has copied (done); the others' streams wait for the
 * marks. A mark is made anew only after a meeting that all those who wait for it have come to.
 *
 * Failing. The first failure stands, every rank that waits or calls later gets it. Only arriving
 * has a deadline: once all have arrived nothing but copying stands before leaving, and while
 * anybody copies nobody may go. The watch is kept by whoever waits, so there is no further thread.
 */
#include "device.h"
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { MOST_RANKS = 1024, DEADLINE = 60 };

typedef enum kind { ALL_GATHER, ALL_TO_ALL, HALO, BARRIER, NOTHING } kind;
static const char *const kind_name[] = {"all_gather", "all_to_all", "halo", "barrier"};

typedef struct member {
  rg_comm comm;
  bool here;  /* has arrived, and not left */
  bool alive; /* rg_comm.destroy was not called */
  kind what;  /* the collective it is in, or was in last */
  char node[128];
  size_t bytes;
  const void *send, *send_next; /* all_gather, all_to_all; halo: to the previous, to the next */
  void *ready, *done;           /* marks on its stream */
} member;

typedef struct world {
  const rg_context *ctx;
  pthread_mutex_t lock;
  pthread_cond_t moved;
  double deadline;
  int size, living;
  int arrived, leaving; /* of the collective that is under way */
  uint64_t round;       /* collectives that all have arrived at */
  uint64_t over;        /* … and left */
  bool failed;
  rg_error failure;
  member rank[];
} world;

static member *me(const rg_comm *c) {
  world *w = c->user;
  return &w->rank[c->rank];
}

/* ---- failing: with the lock ---- */

static void fail_all(world *w, const char *message) {
  if (w->failed) return;
  w->failed = true;
  w->failure = (rg_error){.status = RG_E_COMM};
  snprintf(w->failure.message, sizeof w->failure.message, "%s", message);
  pthread_cond_broadcast(&w->moved);
}

static rg_status failure(const world *w, const char *node, rg_error *e) {
  return rgi_fail(e, RG_E_COMM, NULL, node, "%s", w->failure.message);
}

static void describe(const member *m, char *text, size_t size) {
  if (m->what == NOTHING)
    snprintf(text, size, "none");
  else
    snprintf(text, size, "%s %s", kind_name[m->what], m->node);
}

/* Some rank is missing, and the time is up. */
static void too_late(world *w, const member *mine) {
  char message[640], last[160];
  for (int r = 0; r < w->size; r++) {
    if (w->rank[r].here) continue;
    describe(&w->rank[r], last, sizeof last);
    snprintf(message, sizeof message, "rank %d did not reach %s %s within %g s (its last: %s)", r,
             kind_name[mine->what], mine->node, w->deadline, last);
    fail_all(w, message);
    return;
  }
}

/* All have arrived: at the same place? */
static void check_agreement(world *w) {
  char message[640], mine[160], theirs[160];
  const member *a = &w->rank[0];
  for (int r = 1; r < w->size; r++) {
    const member *b = &w->rank[r];
    if (a->what == b->what && a->bytes == b->bytes && strcmp(a->node, b->node) == 0) continue;
    describe(a, mine, sizeof mine);
    describe(b, theirs, sizeof theirs);
    const bool size = strcmp(mine, theirs) == 0;
    snprintf(message, sizeof message,
             "rank %d calls %s with %zu bytes, rank 0 %s with %zu: another %s", r, theirs, b->bytes,
             mine, a->bytes, size ? "number of bytes" : "collective");
    fail_all(w, message);
    return;
  }
}

static void left_before(world *w, const member *gone, const member *waits) {
  char message[640], what[160];
  describe(waits, what, sizeof what);
  snprintf(message, sizeof message, "rank %d left before %s", gone->comm.rank, what);
  fail_all(w, message);
}

/* ---- the two meetings ---- */

static struct timespec deadline_of(const world *w) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  const double whole = (double)(int64_t)w->deadline;
  t.tv_sec += (time_t)whole;
  t.tv_nsec += (long)((w->deadline - whole) * 1e9);
  if (t.tv_nsec >= 1000000000L) t.tv_sec++, t.tv_nsec -= 1000000000L;
  return t;
}

static void abort_all(rg_comm *c, const rg_error *why);

static rg_status arrive(rg_comm *c, kind what, const char *node, const void *send,
                        const void *send_next, size_t bytes, void *stream, rg_error *e) {
  world *w = c->user;
  member *m = me(c);
  rg_status status = RG_OK;
  if (stream) {
    rg_error own = {0};
    status = rgi_device_mark(&m->ready, stream, &own);
    if (status != RG_OK) abort_all(c, &own);
  }
  pthread_mutex_lock(&w->lock);
  if (w->failed) {
    status = failure(w, node, e);
    pthread_mutex_unlock(&w->lock);
    return status;
  }
  m->what = what;
  m->bytes = bytes;
  m->send = send;
  m->send_next = send_next;
  snprintf(m->node, sizeof m->node, "%s", node ? node : "");
  m->here = true;
  for (int r = 0; r < w->size; r++)
    if (!w->rank[r].alive) left_before(w, &w->rank[r], m);
  const uint64_t round = w->round;
  if (++w->arrived == w->size) {
    check_agreement(w);
    if (!w->failed) {
      w->arrived = 0;
      w->leaving = w->size;
      w->round++;
      pthread_cond_broadcast(&w->moved);
    }
  }
  const struct timespec until = deadline_of(w);
  while (!w->failed && w->round == round)
    if (pthread_cond_timedwait(&w->moved, &w->lock, &until) == ETIMEDOUT && w->round == round)
      too_late(w, m);
  if (w->round ==
      round) { /* else all arrived, and what failed since is for the next call to tell */
    m->here = false;
    status = failure(w, node, e);
  }
  pthread_mutex_unlock(&w->lock);
  return status;
}

/* Copies wait for what others have made. */
static rg_status others_ready(rg_comm *c, void *stream, rg_error *e) {
  const world *w = c->user;
  for (int r = 0; r < c->size && stream; r++)
    if (r != c->rank) RGI_TRY(rgi_device_wait(w->rank[r].ready, stream, e));
  return RG_OK;
}

static rg_status move(void *to, const void *from, size_t bytes, void *stream, rg_error *e) {
  if (bytes == 0) return RG_OK;
  if (stream) return rgi_device_copy(to, from, bytes, stream, e);
  memcpy(to, from, bytes);
  return RG_OK;
}

/* `status`: how the copies went. */
static rg_status leave(rg_comm *c, void *stream, rg_status status, rg_error *e) {
  world *w = c->user;
  member *m = me(c);
  rg_error own = {0};
  if (stream && status == RG_OK) status = rgi_device_mark(&m->done, stream, &own);
  pthread_mutex_lock(&w->lock);
  const uint64_t over = w->over;
  m->here = false;
  if (--w->leaving == 0) {
    w->over++;
    pthread_cond_broadcast(&w->moved);
  }
  while (w->over == over) pthread_cond_wait(&w->moved, &w->lock);
  pthread_mutex_unlock(&w->lock);
  for (int r = 0; r < c->size && stream && status == RG_OK; r++) /* before they write there again */
    if (r != c->rank && w->rank[r].done) status = rgi_device_wait(w->rank[r].done, stream, &own);
  if (own.status != RG_OK) rgi_fail(e, status, NULL, NULL, "%s", own.message);
  if (status != RG_OK) abort_all(c, own.status != RG_OK ? &own : e);
  return status;
}

/* ---- collectives ---- */

static rg_status all_gather(rg_comm *c, const char *node, const void *send, void *recv,
                            size_t bytes, void *stream, rg_error *e) {
  const world *w = c->user;
  RGI_TRY(arrive(c, ALL_GATHER, node, send, NULL, bytes, stream, e));
  rg_status status = others_ready(c, stream, e);
  for (int r = 0; r < c->size && status == RG_OK && bytes; r++)
    status = move((char *)recv + (size_t)r * bytes, w->rank[r].send, bytes, stream, e);
  return leave(c, stream, status, e);
}

static rg_status all_to_all(rg_comm *c, const char *node, const void *send, void *recv,
                            size_t bytes, void *stream, rg_error *e) {
  const world *w = c->user;
  const size_t mine = (size_t)c->rank * bytes;
  RGI_TRY(arrive(c, ALL_TO_ALL, node, send, NULL, bytes, stream, e));
  rg_status status = others_ready(c, stream, e);
  for (int r = 0; r < c->size && status == RG_OK && bytes; r++)
    status = move((char *)recv + (size_t)r * bytes, (const char *)w->rank[r].send + mine, bytes,
                  stream, e);
  return leave(c, stream, status, e);
}

static rg_status halo(rg_comm *c, const char *node, const rg_halo *h, size_t bytes, void *stream,
                      rg_error *e) {
  const world *w = c->user;
  RGI_TRY(arrive(c, HALO, node, h->to_previous, h->to_next, bytes, stream, e));
  rg_status status = others_ready(c, stream, e);
  if (c->rank > 0 && status == RG_OK)
    status = move(h->from_previous, w->rank[c->rank - 1].send_next, bytes, stream, e);
  if (c->rank + 1 < c->size && status == RG_OK)
    status = move(h->from_next, w->rank[c->rank + 1].send, bytes, stream, e);
  return leave(c, stream, status, e);
}

static rg_status barrier(rg_comm *c, const char *node, rg_error *e) {
  RGI_TRY(arrive(c, BARRIER, node, NULL, NULL, 0, NULL, e));
  return leave(c, NULL, RG_OK, e);
}

static void abort_all(rg_comm *c, const rg_error *why) {
  world *w = c->user;
  char message[640];
  pthread_mutex_lock(&w->lock);
  if (why && why->status == RG_E_COMM)
    snprintf(message, sizeof message, "%s", why->message);
  else
    snprintf(message, sizeof message, "rank %d failed: %.560s", c->rank,
             why ? why->message : "no reason given");
  fail_all(w, message);
  pthread_mutex_unlock(&w->lock);
}

/* ---- life ---- */

static void destroy(rg_comm *c) {
  world *w = c->user;
  pthread_mutex_lock(&w->lock);
  const bool first = me(c)->alive;
  me(c)->alive = false;
  if (first) w->living--;
  const bool last = first && w->living == 0;
  for (int r = 0; r < w->size && w->arrived > 0; r++) /* some wait for one who won't come */
    if (w->rank[r].here) left_before(w, me(c), &w->rank[r]);
  pthread_mutex_unlock(&w->lock);
  if (!last) return;
  for (int r = 0; r < w->size; r++) {
    rgi_device_forget(w->rank[r].ready);
    rgi_device_forget(w->rank[r].done);
  }
  pthread_cond_destroy(&w->moved);
  pthread_mutex_destroy(&w->lock);
  rgi_free(w->ctx, w);
}

rg_status rg_comm_threads(rg_context *ctx, int ranks, double deadline, rg_comm **comm,
                          rg_error *e) {
  if (!ctx || !comm)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "rg_comm_threads needs a context and a place");
  if (ranks < 1 || ranks > MOST_RANKS)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%d ranks; expected 1 to %d", ranks, MOST_RANKS);
  if (!(deadline >= 0 && deadline < 1e6))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "a deadline of %g seconds; expected 0 to 1e6",
                    deadline);
  const size_t size = sizeof(world) + (size_t)ranks * sizeof(member);
  world *w = rgi_malloc(ctx, size);
  if (!w) return rgi_nomem(e);
  memset(w, 0, size);
  w->ctx = ctx;
  w->size = w->living = ranks;
  w->deadline = deadline > 0 ? deadline : DEADLINE;
  pthread_condattr_t attr;
  pthread_condattr_init(&attr);
  pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
  pthread_mutex_init(&w->lock, NULL);
  pthread_cond_init(&w->moved, &attr);
  pthread_condattr_destroy(&attr);
  for (int r = 0; r < ranks; r++) {
    w->rank[r] = (member){.alive = true,
                          .what = NOTHING,
                          .comm = {.abi = RG_OP_ABI,
                                   .size = ranks,
                                   .rank = r,
                                   .user = w,
                                   .all_gather = all_gather,
                                   .all_to_all = all_to_all,
                                   .halo = halo,
                                   .barrier = barrier,
                                   .abort = abort_all,
                                   .destroy = destroy}};
    comm[r] = &w->rank[r].comm;
  }
  return RG_OK;
}

void rg_comm_destroy(rg_comm *comm, const rg_error *why) {
  if (!comm) return;
  if (why && why->status != RG_OK) comm->abort(comm, why);
  comm->leaving = true; /* graphs of sessions may hold on to it */
  if (comm->sessions == 0) comm->destroy(comm);
}
