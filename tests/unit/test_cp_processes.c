/* tests/unit/test_cp_processes.c: ranks that are processes: what each gets, how all end when one
 * dies, comes late or does something else, and what launchers say. */
#include "cp/comm.h"
#include "cp/launch.h"
#include "cp/processes.h"

#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 6 };

typedef struct outcome {
  rg_status status;
  char message[640];
  double seconds; /* from the start of the last call */
  bool wrong, there;
} outcome;

typedef struct child {
  rg_comm *comm;
  rg_context *ctx;
  int bad; /* the one that misbehaves */
  outcome out;
  rg_error e;
} child;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int free_port(void) {
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t size = sizeof a;
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  cr_assert_eq(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
  cr_assert_eq(getsockname(fd, (struct sockaddr *)&a, &size), 0);
  close(fd);
  return ntohs(a.sin_port);
}

typedef struct world {
  int n, bad, port, ranks_of_bad; /* ranks_of_bad: how many it thinks there are, 0: as many */
  double deadline;
  void (*fn)(child *c);
} world;

static void be_child(const world *w, int rank, int pipe_end) {
  child c = {.bad = w->bad};
  const int n = rank == w->bad && w->ranks_of_bad ? w->ranks_of_bad : w->n;
  rg_comm_options o = {
      .rank = rank, .ranks = n, .port = w->port, .address = "127.0.0.1", .deadline = w->deadline};
  if (rg_context_create(NULL, &c.ctx, &c.e) != RG_OK) _exit(3);
  const double begun = now();
  c.out.status = rg_comm_processes(c.ctx, &o, &c.comm, &c.e);
  c.out.seconds = now() - begun;
  if (c.out.status == RG_OK) w->fn(&c);
  rg_comm_destroy(c.comm, c.out.status == RG_OK ? NULL : &c.e);
  rg_context_destroy(c.ctx);
  c.out.there = true;
  snprintf(c.out.message, sizeof c.out.message, "%s", c.e.message);
  if (write(pipe_end, &c.out, sizeof c.out) != (ssize_t)sizeof c.out) _exit(4);
#ifdef __SANITIZE_ADDRESS__
  _exit(0); /* else the harness's memory, which only its own process frees, counts as lost */
#endif
  exit(0); /* counts coverage */
}

static void run_processes(const world *w, outcome *out) {
  int ends[MOST][2];
  pid_t pid[MOST];
  fflush(NULL);
  for (int r = 0; r < w->n; r++) {
    cr_assert_eq(pipe(ends[r]), 0);
    pid[r] = fork();
    cr_assert_geq(pid[r], 0);
    if (pid[r] == 0) be_child(w, r, ends[r][1]);
    close(ends[r][1]);
  }
  for (int r = 0; r < w->n; r++) {
    if (read(ends[r][0], &out[r], sizeof out[r]) != (ssize_t)sizeof out[r]) out[r] = (outcome){0};
    close(ends[r][0]);
    waitpid(pid[r], NULL, 0);
  }
}

/* ---- moving bytes ---- */

static int value(int from, int to, int turn) {
  return 1000000 * from + 1000 * to + turn;
}

static rg_status round_of(child *me, int turn) {
  rg_comm *c = me->comm;
  int send[MOST], recv[MOST], to_next = value(c->rank, c->rank + 1, turn),
                              to_previous = value(c->rank, c->rank - 1, turn);
  int from_next = -1, from_previous = -1;
  const bool before = c->rank > 0, after = c->rank + 1 < c->size;
  for (int i = 0; i < c->size; i++) send[i] = value(c->rank, i, turn);
  RGI_TRY(c->all_gather(c, "a", &to_next, recv, sizeof to_next, NULL, &me->e));
  for (int i = 0; i < c->size; i++) me->out.wrong |= recv[i] != value(i, i + 1, turn);
  RGI_TRY(c->all_to_all(c, "b", send, recv, sizeof *send, NULL, &me->e));
  for (int i = 0; i < c->size; i++) me->out.wrong |= recv[i] != value(i, c->rank, turn);
  const rg_halo h = {before ? &to_previous : NULL, after ? &to_next : NULL,
                     before ? &from_previous : NULL, after ? &from_next : NULL};
  RGI_TRY(c->halo(c, "h", &h, sizeof to_next, NULL, &me->e));
  me->out.wrong |= before && from_previous != value(c->rank - 1, c->rank, turn);
  me->out.wrong |= after && from_next != value(c->rank + 1, c->rank, turn);
  return c->barrier(c, "stop", &me->e);
}

static void exchange(child *me) {
  enum { BIG = 300000 };
  for (int turn = 0; turn < 50 && me->out.status == RG_OK; turn++)
    me->out.status = round_of(me, turn);
  char *all = malloc((size_t)me->comm->size * BIG), *mine = malloc(BIG);
  memset(mine, 'a' + me->comm->rank, BIG);
  if (me->out.status == RG_OK)
    me->out.status = me->comm->all_gather(me->comm, "big", mine, all, BIG, NULL, &me->e);
  for (int i = 0; i < me->comm->size * BIG && me->out.status == RG_OK; i++)
    me->out.wrong |= all[i] != 'a' + i / BIG;
  free(all), free(mine);
}

Test(cp_processes, exchange) {
  for (int n = 1; n <= MOST; n += n < 3 ? 1 : 3) {
    outcome out[MOST];
    const world w = {.n = n, .bad = -1, .port = free_port(), .deadline = 20, .fn = exchange};
    run_processes(&w, out);
    for (int r = 0; r < n; r++) {
      cr_assert(out[r].there && out[r].status == RG_OK, "rank %d of %d: %s", r, n, out[r].message);
      cr_assert(!out[r].wrong, "rank %d of %d has wrong bytes", r, n);
    }
  }
}

/* ---- failing ---- */

typedef enum fault {
  DIES,
  DIES_WAITED_FOR,
  SLEEPS,
  LEAVES,
  CALLS_OTHER,
  CALLS_MORE,
  FAILS,
  NOT_ON_GPU, /* the others say that they wait for it there */
  FAULTS
} fault;
static fault how;

static void misbehave(child *me) {
  rg_comm *c = me->comm;
  int x = 0, all[2 * MOST];
  const bool bad = c->rank == me->bad;
  me->out.status = c->barrier(c, "first", &me->e);
  if (me->out.status != RG_OK) return;
  if (bad && how == DIES) raise(SIGKILL);
  if (bad && how == DIES_WAITED_FOR) usleep(200 * 1000), _exit(1);
  if (bad && how == SLEEPS) usleep(1500 * 1000);
  if (bad && how == LEAVES) return;
  if (bad && how == FAILS) {
    rgi_fail(&me->e, RG_E_DATA, NULL, NULL, "the data are spoilt");
    c->abort(c, &me->e);
    me->out.status = RG_E_DATA;
    return;
  }
  const double begun = now();
  if (how == NOT_ON_GPU && bad) usleep(3500 * 1000);
  if (how == NOT_ON_GPU && !bad) rgi_process_stuck(c, "all_gather k.gather");
  if (bad && how == CALLS_OTHER)
    me->out.status = c->all_to_all(c, "k.gather", all, all + MOST, sizeof x, NULL, &me->e);
  else
    me->out.status = c->all_gather(c, "k.gather", &x, all, bad && how == CALLS_MORE ? 1 : sizeof x,
                                   NULL, &me->e);
  me->out.seconds = now() - begun;
}

Test(cp_processes, one_goes_wrong) {
  static const struct {
    const char *say;
    double most;
  } want[FAULTS] = {
      [DIES] = {"rank %d ended without a word (its last: barrier first)", 5},
      [DIES_WAITED_FOR] = {"rank %d ended without a word (its last: barrier first)", 5},
      [SLEEPS] = {"rank %d did not reach all_gather k.gather within 0.7 s (its last: barrier "
                  "first)",
                  6},
      [LEAVES] = {"rank %d left before all_gather k.gather", 5},
      [CALLS_OTHER] = {"another collective", 5},
      [CALLS_MORE] = {"another number of bytes", 5},
      [FAILS] = {"rank %d failed: the data are spoilt", 5},
      [NOT_ON_GPU] = {"rank %d did not reach all_gather k.gather within 30 s", 8},
  };
  for (how = 0; how < FAULTS; how++)
    for (int bad = 0; bad < 3; bad += 2) {
      outcome out[MOST];
      char say[128];
      const world w = {.n = 3,
                       .bad = bad,
                       .port = free_port(),
                       .deadline = how == SLEEPS ? 0.7 : 30,
                       .fn = misbehave};
      const bool dies = how == DIES || how == DIES_WAITED_FOR;
      run_processes(&w, out);
      snprintf(say, sizeof say, want[how].say, bad);
      if (dies && bad == 0) strcpy(say, "rank 0 ended without a word");
      for (int r = 0; r < 3; r++) {
        if (r == bad && (dies || how == LEAVES || how == FAILS)) continue;
        cr_assert_eq(out[r].status, RG_E_COMM, "fault %d of rank %d: rank %d: %d %s", how, bad, r,
                     out[r].status, out[r].message);
        cr_assert(strstr(out[r].message, say), "fault %d of rank %d: rank %d says \"%s\"", how, bad,
                  r, out[r].message);
        cr_assert_lt(out[r].seconds, want[how].most);
      }
    }
}

/* At the start: one does not come, or takes the world for larger. */
static void nothing(child *me) {
  (void)me;
}
Test(cp_processes, starts) {
  outcome out[MOST];
  world w = {
      .n = 3, .bad = 1, .ranks_of_bad = 4, .port = free_port(), .deadline = 20, .fn = nothing};
  run_processes(&w, out);
  for (int r = 0; r < 3; r++) {
    cr_assert_eq(out[r].status, RG_E_COMM);
    cr_assert(strstr(out[r].message, "rank 1 of 4 came to a meeting of 3 ranks"), "%s",
              out[r].message);
  }
  rg_context *ctx = NULL;
  rg_comm *comm = NULL;
  rg_error e = {0};
  cr_assert_eq(rg_context_create(NULL, &ctx, &e), RG_OK);
  rg_comm_options o = {.ranks = 2, .port = free_port(), .address = "127.0.0.1", .deadline = 0.5};
  cr_assert_eq(rg_comm_processes(ctx, &o, &comm, &e), RG_E_COMM);
  cr_assert(strstr(e.message, "rank 1 of 2 did not come within 0.5 s"), "%s", e.message);
  e = (rg_error){0};
  o.rank = 1;
  cr_assert_eq(rg_comm_processes(ctx, &o, &comm, &e), RG_E_COMM);
  cr_assert(strstr(e.message, "rank 0 is not there"), "%s", e.message);
  rg_context_destroy(ctx);
}

/* Somebody who comes to the port and says nothing, a check of health, say, keeps nobody waiting. */
static int visited;
static void with_a_visitor(child *me) {
  struct sockaddr_in a = {.sin_family = AF_INET,
                          .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                          .sin_port = htons((uint16_t)visited)};
  if (me->comm->rank == 0) {
    const int fd = socket(AF_INET, SOCK_STREAM, 0); /* open to the end of the process */
    me->out.wrong = connect(fd, (struct sockaddr *)&a, sizeof a) != 0;
  }
  me->out.status = round_of(me, 0);
}
Test(cp_processes, a_silent_visitor) {
  outcome out[MOST];
  visited = free_port();
  const world w = {.n = 2, .bad = -1, .port = visited, .deadline = 20, .fn = with_a_visitor};
  const double begun = now();
  run_processes(&w, out);
  for (int r = 0; r < 2; r++)
    cr_assert(out[r].status == RG_OK && !out[r].wrong, "rank %d: %s", r, out[r].message);
  cr_assert_lt(now() - begun, 10);
}

/* NCCL is looked for when it is asked for; a file that is none is named, and so is the remedy. A
 * process has looked once, so each is a test. */
static void no_nccl(const char *file, const char *say) {
  rg_context *ctx = NULL;
  rg_error e = {0};
  rg_comm *comm = NULL;
  const rg_comm_options o = {
      .size = sizeof o, .ranks = 1, .port = free_port(), .cuda = true, .deadline = 5};
  setenv("REGRAPH_NCCL", file, 1);
  cr_assert_eq(rg_context_create(NULL, &ctx, &e), RG_OK);
  const rg_status status = rg_comm_processes(ctx, &o, &comm, &e);
  rg_context_destroy(ctx);
  cr_assert(status != RG_OK && !comm);
  if (strstr(e.message, "this build")) cr_skip_test("%s", e.message);
  cr_assert_eq(status, RG_E_COMM, "%s", e.message);
  cr_assert(strstr(e.message, say), "%s", e.message);
}
Test(cp_processes, nccl_is_not_there) {
  no_nccl("/nowhere/libnccl.so.2", "/nowhere/libnccl.so.2");
}
Test(cp_processes, another_library_for_nccl) {
  no_nccl("libm.so.6", "libm.so.6 has no nccl");
}

/* ---- launchers ---- */

static const char *const *environment;
static const char *get(const char *name) {
  const size_t n = strlen(name);
  for (const char *const *p = environment; *p; p++)
    if (strncmp(*p, name, n) == 0 && (*p)[n] == '=') return *p + n + 1;
  return NULL;
}

Test(cp_processes, launchers) {
  static const struct {
    const char *set[8], *by;
    int rank, ranks, local, port;
  } good[] = {
      {{0}, NULL, 0, 1, 0, 0},
      {{"RANK=3", "WORLD_SIZE=8", "LOCAL_RANK=1", "MASTER_PORT=29500", NULL},
       "torchrun",
       3,
       8,
       1,
       29501},
      {{"RANK=3", "WORLD_SIZE=8", "MASTER_PORT=29500", "REGRAPH_MASTER_PORT=4000", NULL},
       "torchrun",
       3,
       8,
       3,
       4000},
      {{"OMPI_COMM_WORLD_RANK=2", "OMPI_COMM_WORLD_SIZE=4", "OMPI_COMM_WORLD_LOCAL_RANK=0", NULL},
       "mpirun",
       2,
       4,
       0,
       0},
      {{"PMI_RANK=1", "PMI_SIZE=2", NULL}, "mpiexec", 1, 2, 1, 0},
      {{"SLURM_PROCID=5", "SLURM_NTASKS=6", "SLURM_LOCALID=1", "SLURM_STEP_ID=0", NULL},
       "srun",
       5,
       6,
       1,
       0},
      {{"SLURM_PROCID=0", "SLURM_NTASKS=6", NULL}, NULL, 0, 1, 0, 0}, /* a batch script */
      {{"RANK=0", NULL}, NULL, 0, 1, 0, 0},
  };
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    rgi_launch at;
    rg_error e = {0};
    environment = good[i].set;
    cr_assert_eq(rgi_launch_find(get, &at, &e), RG_OK, "%s", e.message);
    cr_assert(good[i].by ? at.by && strcmp(at.by, good[i].by) == 0 : !at.by, "case %d", (int)i);
    cr_assert(at.rank == good[i].rank && at.ranks == good[i].ranks && at.local == good[i].local,
              "case %d: %d of %d, %d", (int)i, at.rank, at.ranks, at.local);
    if (good[i].port) cr_assert_eq(at.port, good[i].port);
    cr_assert(at.port >= 1024 && at.port < 65536);
  }
  static const char *const bad[][5] = {{"RANK=8", "WORLD_SIZE=8", NULL},
                                       {"RANK=x", "WORLD_SIZE=8", NULL},
                                       {"RANK=0", "WORLD_SIZE=0", NULL},
                                       {"MASTER_PORT=65535", NULL},
                                       {"REGRAPH_MASTER_PORT=7seven", NULL}};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    rgi_launch at;
    rg_error e = {0};
    environment = bad[i];
    cr_assert_eq(rgi_launch_find(get, &at, &e), RG_E_USAGE);
    cr_assert(strstr(e.message, "expected"), "%s", e.message);
  }
}
