/* cp/comm_processes.c: ranks that are processes, on one host or several. Rank 0's process has the
 * meeting point (hub.h), a thread with a listening socket; every rank, 0 too, has one connection to
 * it, which stays open: a process that dies is an end of file within milliseconds.
 *
 *     a rank's caller    sends a call, sleeps until its RESULT or a FAIL
 *     its ear            a thread that reads the connection: fills the waiting caller's buffers, or
 *                        notes a failure, at any time
 *
 * Bytes of the host's memory go through the hub, W·bytes of them: meant for start-up, tests and the
 * CPU. What is on a GPU goes through NCCL (nccl.h), whose failures the ear ends.
 */
#include "comm.h"
#include "hub.h"
#include "launch.h"
#include "nccl.h"
#include "processes.h"
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { DEADLINE = 60, PATIENCE = 10, TICK_MS = 50, LINGER = 2, SENTENCE = 512 };

typedef struct piece {
  void *data;
  size_t n;
} piece;

typedef struct meeting { /* rank 0's process */
  rgi_hub *hub;
  int listener, *fd; /* by connection, -1: none */
  int most;
  double deadline, left; /* left: when rank 0 said BYE */
  bool leaving;
  pthread_mutex_t lock; /* of leaving */
  pthread_t thread;
} meeting;

typedef struct process {
  rg_comm comm;
  const rg_context *ctx;
  uint64_t nonce;
  double deadline;
  int fd;
  pthread_t ear;
  bool listening; /* the ear runs */
  pthread_mutex_t lock, writing;
  pthread_cond_t moved;
  bool waits, done, failed, leaving;
  rgi_word expects;
  piece into[2];
  char failure[SENTENCE];
  meeting *meeting;
  rgi_nccl *nccl; /* NULL: the host's memory alone */
} process;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the meeting point ---- */

static void read_some(meeting *m, int i) {
  char buffer[1 << 16];
  const ssize_t n = recv(m->fd[i], buffer, sizeof buffer, 0);
  if (n > 0) {
    rgi_hub_take(m->hub, i, buffer, (size_t)n, now());
  } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
    rgi_hub_gone(m->hub, i);
    close(m->fd[i]);
    m->fd[i] = -1;
  }
}

static void write_some(meeting *m, int i) {
  size_t n;
  const void *data = rgi_hub_outgoing(m->hub, i, &n);
  const ssize_t sent = n ? send(m->fd[i], data, n, MSG_NOSIGNAL) : 0;
  if (sent > 0) rgi_hub_sent(m->hub, i, (size_t)sent);
}

static void let_in(meeting *m) {
  const int fd = accept(m->listener, NULL, NULL), one = 1;
  if (fd < 0) return;
  const int i = rgi_hub_connect(m->hub);
  if (i < 0) {
    close(fd);
    return;
  }
  fcntl(fd, F_SETFL, O_NONBLOCK);
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  m->fd[i] = fd;
}

/* Those that somebody waits at. */
static int open_connections(const meeting *m) {
  int n = 0;
  for (int i = 0; i < m->most; i++) n += m->fd[i] >= 0 && !rgi_hub_idle(m->hub, i);
  return n;
}

/* Rank 0 is gone and so is everybody else, or nobody has anything to hear any more. Who has not
 * come yet still has to hear that the start has failed. */
static bool over(meeting *m) {
  pthread_mutex_lock(&m->lock);
  const bool leaving = m->leaving;
  const double since = now() - m->left;
  pthread_mutex_unlock(&m->lock);
  if (!leaving) return false;
  const bool all = rgi_hub_complete(m->hub);
  if (all && open_connections(m) == 0) return true;
  return since > (all && rgi_hub_failed(m->hub) ? LINGER : m->deadline);
}

static void *hold_meeting(void *arg) {
  meeting *m = arg;
  struct pollfd p[RGI_HUB_MOST_RANKS + 64];
  while (!over(m)) {
    int n = 0, at[RGI_HUB_MOST_RANKS + 64];
    p[n] = (struct pollfd){.fd = m->listener, .events = POLLIN};
    at[n++] = -1;
    for (int i = 0; i < m->most; i++) {
      size_t out;
      if (m->fd[i] < 0) continue;
      rgi_hub_outgoing(m->hub, i, &out);
      p[n] = (struct pollfd){.fd = m->fd[i], .events = (short)(POLLIN | (out ? POLLOUT : 0))};
      at[n++] = i;
    }
    if (poll(p, (nfds_t)n, TICK_MS) < 0 && errno != EINTR) break;
    for (int k = 0; k < n; k++) {
      if (at[k] < 0 && p[k].revents) let_in(m);
      if (at[k] < 0) continue;
      if (p[k].revents & (POLLIN | POLLHUP | POLLERR)) read_some(m, at[k]);
      if (m->fd[at[k]] >= 0 && p[k].revents & POLLOUT) write_some(m, at[k]);
    }
    rgi_hub_tick(m->hub, now());
    for (int i = 0; i < m->most; i++)
      if (m->fd[i] >= 0) {
        write_some(m, i);
        if (!rgi_hub_closes(m->hub, i)) continue;
        rgi_hub_gone(m->hub, i);
        close(m->fd[i]);
        m->fd[i] = -1;
      }
  }
  return NULL;
}

static struct addrinfo *resolve(const char *address, int port, rg_error *e) {
  char text[16];
  struct addrinfo *list = NULL;
  const struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
  snprintf(text, sizeof text, "%d", port);
  const int code = getaddrinfo(address, text, &hints, &list);
  if (code == 0) return list;
  rgi_fail(e, RG_E_COMM, NULL, NULL, "rank 0's host \"%s\" is not known: %s", address,
           gai_strerror(code));
  return NULL;
}

static int listen_at(const struct addrinfo *a) {
  const int one = 1, fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
  if (fd < 0) return -1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, 128) == 0) return fd;
  const int code = errno;
  close(fd);
  errno = code;
  return -1;
}

static void end_meeting(const rg_context *ctx, meeting *m) {
  if (!m) return;
  for (int i = 0; m->fd && i < m->most; i++)
    if (m->fd[i] >= 0) close(m->fd[i]);
  if (m->listener >= 0) close(m->listener);
  rgi_hub_destroy(m->hub);
  pthread_mutex_destroy(&m->lock);
  rgi_free(ctx, m->fd);
  rgi_free(ctx, m);
}

static rg_status begin_meeting(process *p, const char *address, int port, rg_error *e) {
  meeting *m = rgi_malloc(p->ctx, sizeof *m);
  if (!m) return rgi_nomem(e);
  *m = (meeting){.listener = -1, .deadline = p->deadline, .most = p->comm.size + 16};
  pthread_mutex_init(&m->lock, NULL);
  m->fd = rgi_malloc(p->ctx, (size_t)m->most * sizeof *m->fd);
  for (int i = 0; m->fd && i < m->most; i++) m->fd[i] = -1;
  struct addrinfo *list = m->fd ? resolve(address, port, e) : NULL;
  rg_status status = m->fd ? RG_OK : rgi_nomem(e);
  for (const struct addrinfo *a = list; a && m->listener < 0; a = a->ai_next)
    m->listener = listen_at(a);
  if (list && m->listener < 0)
    rgi_fail(e, RG_E_COMM, NULL, NULL, "rank 0 can not listen at %s port %d: %s", address, port,
             strerror(errno));
  if (list) freeaddrinfo(list);
  if (m->listener < 0 && status == RG_OK) status = RG_E_COMM;
  if (status == RG_OK)
    status = rgi_hub_create(p->ctx, p->comm.size, p->nonce, p->deadline, now(), &m->hub, e);
  if (status == RG_OK && rgi_thread_start(&m->thread, hold_meeting, m) != 0)
    status = rgi_fail(e, RG_E_NOMEM, NULL, NULL, "no thread for the ranks' meeting point");
  if (status != RG_OK)
    end_meeting(p->ctx, m);
  else
    p->meeting = m;
  return status;
}

/* ---- a rank's end ---- */

static bool send_all(process *p, const void *data, size_t n, int more) {
  const char *at = data;
  while (n) {
    const ssize_t k = send(p->fd, at, n, MSG_NOSIGNAL | more);
    if (k < 0 && errno == EINTR) continue;
    if (k <= 0) return false;
    at += k;
    n -= (size_t)k;
  }
  return true;
}

static bool say(process *p, const rgi_frame *f, const piece *payload, int n) {
  pthread_mutex_lock(&p->writing);
  bool good = send_all(p, f, sizeof *f, n ? MSG_MORE : 0);
  for (int i = 0; i < n && good; i++) good = send_all(p, payload[i].data, payload[i].n, 0);
  pthread_mutex_unlock(&p->writing);
  return good;
}

static bool read_all(int fd, void *data, size_t n) {
  char *at = data;
  while (n) {
    const ssize_t k = recv(fd, at, n, 0);
    if (k < 0 && errno == EINTR) continue;
    if (k <= 0) return false;
    at += k;
    n -= (size_t)k;
  }
  return true;
}

static void note_failure(process *p, const char *sentence) {
  pthread_mutex_lock(&p->lock);
  const bool first = !p->failed && !p->leaving;
  if (first) snprintf(p->failure, sizeof p->failure, "%s", sentence);
  p->failed = true;
  pthread_cond_broadcast(&p->moved);
  pthread_mutex_unlock(&p->lock);
  if (first) rgi_nccl_abort(p->nccl);
}

/* One word from the hub; false: the connection is over. */
static bool hear(process *p) {
  rgi_frame f;
  char sentence[SENTENCE];
  if (!read_all(p->fd, &f, sizeof f)) return false;
  if (f.word == RGI_FAIL && f.bytes < sizeof sentence) {
    if (!read_all(p->fd, sentence, f.bytes)) return false;
    sentence[f.bytes] = 0;
    note_failure(p, sentence);
    return true;
  }
  pthread_mutex_lock(&p->lock);
  const bool fits = p->waits && f.word == p->expects && f.bytes == p->into[0].n + p->into[1].n;
  pthread_mutex_unlock(&p->lock);
  if (!fits || !read_all(p->fd, p->into[0].data, p->into[0].n) ||
      !read_all(p->fd, p->into[1].data, p->into[1].n))
    return false;
  pthread_mutex_lock(&p->lock);
  p->done = true;
  pthread_cond_broadcast(&p->moved);
  pthread_mutex_unlock(&p->lock);
  return true;
}

static void *ear(void *arg) {
  process *p = arg;
  while (hear(p)) {
  }
  note_failure(p, "rank 0 ended without a word");
  return NULL;
}

static rg_status failure(const process *p, const char *node, rg_error *e) {
  return rgi_fail(e, RG_E_COMM, NULL, node, "%s", p->failure[0] ? p->failure : "it has ended");
}

/* Says a word and sleeps until it is answered. The buffers stay the ear's until then, so there is
 * no leaving early: a hub that does not answer has its connection cut. */
static rg_status ask(process *p, const rgi_frame *f, const piece *payload, int n, rgi_word expects,
                     const piece into[2], rg_error *e) {
  rg_status status = RG_OK;
  struct timespec until;
  clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_sec += (time_t)p->deadline + PATIENCE;
  pthread_mutex_lock(&p->lock);
  if (p->failed) {
    status = failure(p, f->node, e);
    pthread_mutex_unlock(&p->lock);
    return status;
  }
  p->waits = true;
  p->done = false;
  p->expects = expects;
  p->into[0] = into[0], p->into[1] = into[1];
  pthread_mutex_unlock(&p->lock);
  if (!say(p, f, payload, n)) shutdown(p->fd, SHUT_RDWR); /* the ear says so */
  pthread_mutex_lock(&p->lock);
  while (!p->done && !p->failed)
    if (pthread_cond_timedwait(&p->moved, &p->lock, &until) == ETIMEDOUT) {
      pthread_mutex_unlock(&p->lock);
      note_failure(p, "rank 0 did not answer");
      shutdown(p->fd, SHUT_RDWR);
      pthread_mutex_lock(&p->lock);
    }
  p->waits = false;
  if (!p->done) status = failure(p, f->node[0] ? f->node : NULL, e);
  pthread_mutex_unlock(&p->lock);
  return status;
}

static rg_status call(rg_comm *c, rgi_word word, const char *node, size_t bytes,
                      const piece *payload, int n, const piece into[2], rg_error *e) {
  process *p = c->user;
  rgi_frame f = rgi_frame_of(word, c->rank, c->size, p->nonce);
  f.piece = bytes;
  f.bytes = rgi_call_payload(word, bytes, c->size);
  snprintf(f.node, sizeof f.node, "%s", node ? node : "");
  return ask(p, &f, payload, n, RGI_RESULT, into, e);
}

/* ---- collectives ---- */

static piece of(const void *data, size_t n) {
  return (piece){(void *)(uintptr_t)data, n};
}

static rg_status all_gather(rg_comm *c, const char *node, const void *send, void *recv,
                            size_t bytes, void *stream, rg_error *e) {
  const process *p = c->user;
  const piece from = of(send, bytes), into[2] = {of(recv, (size_t)c->size * bytes)};
  if (stream) return rgi_nccl_all_gather(p->nccl, node, send, recv, bytes, stream, e);
  return call(c, RGI_ALL_GATHER, node, bytes, &from, 1, into, e);
}

static rg_status all_to_all(rg_comm *c, const char *node, const void *send, void *recv,
                            size_t bytes, void *stream, rg_error *e) {
  const process *p = c->user;
  const piece from = of(send, (size_t)c->size * bytes), into[2] = {of(recv, from.n)};
  if (stream) return rgi_nccl_all_to_all(p->nccl, node, send, recv, bytes, stream, e);
  return call(c, RGI_ALL_TO_ALL, node, bytes, &from, 1, into, e);
}

static rg_status halo(rg_comm *c, const char *node, const rg_halo *h, size_t bytes, void *stream,
                      rg_error *e) {
  static const char nothing[64];
  const process *p = c->user;
  if (stream) return rgi_nccl_halo(p->nccl, node, h, bytes, stream, e);
  const bool before = c->rank > 0, after = c->rank + 1 < c->size;
  piece from[2] = {of(h->to_previous, bytes), of(h->to_next, bytes)}, into[2] = {{0}};
  int n = 0;
  if (before) into[n++] = of(h->from_previous, bytes);
  if (after) into[n++] = of(h->from_next, bytes);
  if (before && after) return call(c, RGI_HALO, node, bytes, from, 2, into, e);
  /* towards nobody go zeros, a little at a time */
  char *zeros = bytes > sizeof nothing ? rgi_malloc(p->ctx, bytes) : (char *)(uintptr_t)nothing;
  if (!zeros) return rgi_nomem(e);
  if (bytes > sizeof nothing) memset(zeros, 0, bytes);
  if (!before) from[0].data = zeros;
  if (!after) from[1].data = zeros;
  const rg_status status = call(c, RGI_HALO, node, bytes, from, 2, into, e);
  if (zeros != nothing) rgi_free(p->ctx, zeros);
  return status;
}

static rg_status barrier(rg_comm *c, const char *node, rg_error *e) {
  const piece into[2] = {{0}};
  return call(c, RGI_BARRIER, node, 0, NULL, 0, into, e);
}

static void abort_all(rg_comm *c, const rg_error *why) {
  process *p = c->user;
  char sentence[SENTENCE];
  if (why && why->status == RG_E_COMM)
    snprintf(sentence, sizeof sentence, "%.470s", why->message);
  else
    snprintf(sentence, sizeof sentence, "rank %d failed: %.440s", c->rank,
             why ? why->message : "no reason given");
  const piece text = of(sentence, strlen(sentence) < 479 ? strlen(sentence) : 479);
  rgi_frame f = rgi_frame_of(RGI_FAIL, c->rank, c->size, p->nonce);
  f.bytes = text.n;
  pthread_mutex_lock(&p->lock);
  const bool known = p->failed;
  pthread_mutex_unlock(&p->lock);
  if (!known) say(p, &f, &text, 1);
  note_failure(p, sentence);
}

static rg_status check(rg_comm *c, rg_error *e) {
  process *p = c->user;
  pthread_mutex_lock(&p->lock);
  const rg_status status = p->failed ? failure(p, NULL, e) : RG_OK;
  pthread_mutex_unlock(&p->lock);
  return status;
}

void rgi_process_stuck(rg_comm *c, const char *collective) {
  process *p = c->user;
  const piece text = of(collective, strlen(collective));
  rgi_frame f = rgi_frame_of(RGI_STUCK, c->rank, c->size, p->nonce);
  f.bytes = text.n;
  say(p, &f, &text, 1);
}

/* ---- life ---- */

static void destroy(rg_comm *c) {
  process *p = c->user;
  if (p->fd >= 0) {
    const rgi_frame bye = rgi_frame_of(RGI_BYE, c->rank, c->size, p->nonce);
    pthread_mutex_lock(&p->lock);
    p->leaving = true;
    pthread_mutex_unlock(&p->lock);
    say(p, &bye, NULL, 0);
    shutdown(p->fd, SHUT_RDWR);
    if (p->listening) pthread_join(p->ear, NULL);
    close(p->fd);
  }
  rgi_nccl_close(p->nccl);
  if (p->meeting) {
    pthread_mutex_lock(&p->meeting->lock);
    p->meeting->leaving = true;
    p->meeting->left = now();
    pthread_mutex_unlock(&p->meeting->lock);
    pthread_join(p->meeting->thread, NULL);
    end_meeting(p->ctx, p->meeting);
  }
  pthread_cond_destroy(&p->moved);
  pthread_mutex_destroy(&p->writing);
  pthread_mutex_destroy(&p->lock);
  rgi_free(p->ctx, p);
}

/* Rank 0 may still be starting. */
static rg_status connect_to(process *p, const char *address, int port, rg_error *e) {
  const double until = now() + p->deadline;
  const int one = 1;
  struct addrinfo *list = resolve(address, port, e);
  if (!list) return RG_E_COMM;
  do {
    for (const struct addrinfo *a = list; a && p->fd < 0; a = a->ai_next) {
      p->fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
      if (p->fd < 0 || connect(p->fd, a->ai_addr, a->ai_addrlen) == 0) continue;
      close(p->fd);
      p->fd = -1;
    }
    if (p->fd < 0) nanosleep(&(struct timespec){.tv_nsec = 20 * 1000 * 1000}, NULL);
  } while (p->fd < 0 && now() < until);
  freeaddrinfo(list);
  if (p->fd < 0)
    return rgi_fail(e, RG_E_COMM, NULL, NULL, "rank 0 is not there: nobody answers at %s port %d",
                    address, port);
  setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  return RG_OK;
}

static rg_status meet(process *p, const char *address, int port, rg_error *e) {
  const piece into[2] = {{0}};
  const rgi_frame hello = rgi_frame_of(RGI_HELLO, p->comm.rank, p->comm.size, p->nonce);
  if (p->comm.rank == 0) RGI_TRY(begin_meeting(p, address, port, e));
  RGI_TRY(connect_to(p, address, port, e));
  p->listening = rgi_thread_start(&p->ear, ear, p) == 0;
  if (!p->listening) return rgi_fail(e, RG_E_NOMEM, NULL, NULL, "no thread for rank's connection");
  return ask(p, &hello, NULL, 0, RGI_WELCOME, into, e);
}

RGI_NO_TAIL(rg_comm_options, deadline);

rg_status rg_comm_processes(rg_context *ctx, const rg_comm_options *options, rg_comm **out,
                            rg_error *e) {
  rg_comm_options o;
  rgi_launch at;
  if (!ctx || !out)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "rg_comm_processes needs a context and a place");
  *out = NULL;
  RGI_TRY(RGI_OPTIONS(rg_comm_options, deadline, options, &o, e));
  RGI_TRY(rgi_launch_find(rgi_getenv, &at, e));
  if (o.ranks) at.rank = o.rank, at.ranks = o.ranks;
  if (o.address) at.address = o.address;
  if (o.port) at.port = o.port;
  if (at.ranks < 1 || at.ranks > RGI_HUB_MOST_RANKS || at.rank < 0 || at.rank >= at.ranks)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "rank %d of %d; expected 1 to %d ranks", at.rank,
                    at.ranks, RGI_HUB_MOST_RANKS);
  if (!(o.deadline >= 0 && o.deadline < 1e6) || at.port < 1 || at.port > 65535)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "a deadline of %g seconds, port %d", o.deadline,
                    at.port);
  process *p = rgi_malloc(ctx, sizeof *p);
  if (!p) return rgi_nomem(e);
  *p = (process){.ctx = ctx,
                 .nonce = at.nonce,
                 .fd = -1,
                 .deadline = o.deadline > 0 ? o.deadline : DEADLINE,
                 .comm = {.abi = RG_OP_ABI,
                          .size = at.ranks,
                          .rank = at.rank,
                          .user = p,
                          .all_gather = all_gather,
                          .all_to_all = all_to_all,
                          .halo = halo,
                          .barrier = barrier,
                          .abort = abort_all,
                          .destroy = destroy,
                          .check = check}};
  pthread_condattr_t attr;
  pthread_condattr_init(&attr);
  pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
  pthread_cond_init(&p->moved, &attr);
  pthread_condattr_destroy(&attr);
  pthread_mutex_init(&p->lock, NULL);
  pthread_mutex_init(&p->writing, NULL);
  rg_status status = meet(p, at.address, at.port, e);
  if (status == RG_OK && o.cuda) {
    status = rgi_nccl_open(&p->comm, rgi_process_stuck, p->ctx, p->deadline, &p->nccl, e);
    p->comm.captures = status == RG_OK;
  }
  if (status != RG_OK) {
    if (p->fd >= 0 && e) abort_all(&p->comm, e);
    destroy(&p->comm);
    return status;
  }
  *out = &p->comm;
  return RG_OK;
}

int rg_comm_launched(int *rank, int *ranks, int *local) {
  rgi_launch at;
  if (rgi_launch_find(rgi_getenv, &at, NULL) != RG_OK || !at.by) return 0;
  if (rank) *rank = at.rank;
  if (ranks) *ranks = at.ranks;
  if (local) *local = at.local;
  return 1;
}
