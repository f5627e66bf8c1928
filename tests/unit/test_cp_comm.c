/* tests/unit/test_cp_comm.c: thread ranks: what each gets, and how all end when one does not come,
 * comes late, or calls something else. */
#include "cp/comm.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 8 };

typedef struct rank {
  pthread_t thread;
  rg_comm *comm;
  int bad; /* the one that misbehaves */
  int repeats;
  rg_status status;
  rg_error e;
  double seconds;
  bool wrong;
} rank;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Runs fn on `n` ranks, each of which ends its communicator with its own error. */
static void run_ranks(rank *r, int n, int bad, double deadline, void *(*fn)(void *)) {
  rg_context *ctx = NULL;
  rg_error e = {0};
  rg_comm *comm[MOST];
  cr_assert_eq(rg_context_create(NULL, &ctx, &e), RG_OK);
  cr_assert_eq(rg_comm_threads(ctx, n, deadline, comm, &e), RG_OK, "%s", e.message);
  for (int i = 0; i < n; i++) {
    r[i] = (rank){.comm = comm[i], .bad = bad, .repeats = 50};
    cr_assert_eq(pthread_create(&r[i].thread, NULL, fn, &r[i]), 0);
  }
  for (int i = 0; i < n; i++) pthread_join(r[i].thread, NULL);
  rg_context_destroy(ctx);
}

/* ---- moving bytes ---- */

static int value(int from, int to, int turn) {
  return 1000000 * from + 1000 * to + turn;
}

static rg_status exchange(rank *me, int turn) {
  rg_comm *c = me->comm;
  int send[MOST], recv[MOST], next = value(c->rank, c->rank + 1, turn),
                              previous = value(c->rank, c->rank - 1, turn), from_next = -1,
                              from_previous = -1;
  for (int i = 0; i < c->size; i++) send[i] = value(c->rank, i, turn);
  RGI_TRY(c->all_gather(c, "a", &next, recv, sizeof next, NULL, &me->e));
  for (int i = 0; i < c->size; i++) me->wrong |= recv[i] != value(i, i + 1, turn);
  RGI_TRY(c->all_to_all(c, "b", send, recv, sizeof *send, NULL, &me->e));
  for (int i = 0; i < c->size; i++) me->wrong |= recv[i] != value(i, c->rank, turn);
  const rg_halo h = {c->rank ? &previous : NULL, c->rank + 1 < c->size ? &next : NULL,
                     c->rank ? &from_previous : NULL, c->rank + 1 < c->size ? &from_next : NULL};
  RGI_TRY(c->halo(c, "h", &h, sizeof next, NULL, &me->e));
  me->wrong |= c->rank > 0 && from_previous != value(c->rank - 1, c->rank, turn);
  me->wrong |= c->rank + 1 < c->size && from_next != value(c->rank + 1, c->rank, turn);
  memset(send, 0, sizeof send); /* nobody reads them any more */
  RGI_TRY(c->all_gather(c, "nothing", NULL, NULL, 0, NULL, &me->e));
  return c->barrier(c, "b", &me->e);
}

static void *exchange_many(void *arg) {
  rank *me = arg;
  for (int i = 0; i < me->repeats && me->status == RG_OK; i++) me->status = exchange(me, i);
  rg_comm_destroy(me->comm, NULL);
  return NULL;
}

Test(cp_comm, everybody_gets_what_was_sent) {
  rank r[MOST];
  for (int n = 1; n <= MOST; n++) {
    run_ranks(r, n, -1, 10, exchange_many);
    for (int i = 0; i < n; i++) {
      cr_assert_eq(r[i].status, RG_OK, "%s", r[i].e.message);
      cr_assert_not(r[i].wrong, "rank %d of %d", i, n);
    }
  }
}

/* ---- failing ---- */

enum { WAY_DIES, WAY_LEAVES, WAY_SLEEPS, WAY_CALLS_ANOTHER, WAY_OTHER_NODE, WAY_OTHER_BYTES, WAYS };
static int way;

static rg_status misbehave(rank *me) {
  rg_comm *c = me->comm;
  char buffer[MOST * 16] = {0};
  switch (way) {
  case WAY_DIES: return rgi_fail(&me->e, RG_E_NOMEM, NULL, NULL, "no bytes for \"x\"");
  case WAY_LEAVES: return RG_OK;
  case WAY_SLEEPS: usleep(900000); break;
  case WAY_CALLS_ANOTHER: return c->barrier(c, "k.gather", &me->e);
  case WAY_OTHER_NODE: return c->all_gather(c, "v.gather", buffer, buffer + 8, 8, NULL, &me->e);
  default: return c->all_gather(c, "k.gather", buffer, buffer + 4, 4, NULL, &me->e);
  }
  return c->all_gather(c, "k.gather", buffer, buffer + 8, 8, NULL, &me->e);
}

static void *until_one_fails(void *arg) {
  rank *me = arg;
  char mine[8] = {0}, all[MOST * 8];
  me->status = exchange(me, 0);
  const double start = now();
  if (me->status == RG_OK)
    me->status = me->comm->rank == me->bad ? misbehave(me)
                                           : me->comm->all_gather(me->comm, "k.gather", mine, all,
                                                                  sizeof mine, NULL, &me->e);
  /* it stays failed, whatever is called then */
  rg_error later = {0};
  if (me->status != RG_OK && me->status != RG_E_NOMEM)
    me->wrong |= me->comm->barrier(me->comm, "later", &later) != RG_E_COMM;
  me->seconds = now() - start;
  rg_comm_destroy(me->comm, me->status == RG_OK ? NULL : &me->e);
  return NULL;
}

static void check_failure(const char *const *say) {
  rank r[MOST];
  const int n = 4;
  for (int bad = 0; bad < n; bad++) {
    run_ranks(r, n, bad, 0.3, until_one_fails);
    for (int i = 0; i < n; i++) {
      char who[24];
      cr_assert_not(r[i].wrong, "rank %d", i);
      cr_assert_lt(r[i].seconds, 2.0, "rank %d took %g s", i, r[i].seconds);
      if (i == bad && (way == WAY_DIES || way == WAY_LEAVES)) continue;
      cr_assert_eq(r[i].status, RG_E_COMM, "rank %d: %d", i, (int)r[i].status);
      snprintf(who, sizeof who, "rank %d ", bad);
      /* of two ranks that differ, 0 stands for the others */
      const bool named = strstr(r[i].e.message, who) || (bad == 0 && way >= WAY_CALLS_ANOTHER);
      cr_assert(named, "way %d, rank %d of which %d: %s", way, i, bad, r[i].e.message);
      for (const char *const *s = say; *s; s++)
        cr_assert(strstr(r[i].e.message, *s), "\"%s\" does not say \"%s\"", r[i].e.message, *s);
    }
  }
}

Test(cp_comm, one_dies) {
  way = WAY_DIES;
  check_failure((const char *const[]){"failed: no bytes for \"x\"", NULL});
}
Test(cp_comm, one_leaves) {
  way = WAY_LEAVES;
  check_failure((const char *const[]){"left before all_gather k.gather", NULL});
}
Test(cp_comm, one_sleeps_past_the_deadline) {
  way = WAY_SLEEPS;
  check_failure((const char *const[]){"did not reach all_gather k.gather within 0.3 s",
                                      "its last: barrier b", NULL});
}
Test(cp_comm, one_calls_another_collective) {
  way = WAY_CALLS_ANOTHER;
  check_failure(
      (const char *const[]){"barrier k.gather", "all_gather k.gather", "another collective", NULL});
}
Test(cp_comm, one_is_at_another_node) {
  way = WAY_OTHER_NODE;
  check_failure((const char *const[]){"v.gather", "k.gather", "another collective", NULL});
}
Test(cp_comm, one_sends_another_number_of_bytes) {
  way = WAY_OTHER_BYTES;
  check_failure((const char *const[]){"with 8", "with 4", "another number of bytes", NULL});
}

/* ---- start-up ---- */

static const rgi_cp_field *fields_of(int bad_field, bool bad) {
  static rgi_cp_field field[2][3];
  for (int i = 0; i < 3; i++) {
    static const char *const name[] = {"spec", "policy", "capacity"};
    field[bad][i] =
        (rgi_cp_field){name[i], rgi_hash_text(RGI_HASH, bad && i == bad_field ? "other" : name[i])};
  }
  return field[bad];
}

static const rgi_cp_field *good_fields, *bad_fields;
static rg_context *start_ctx;
static void *agree(void *arg) {
  rank *me = arg;
  const rgi_cp_field *f = me->comm->rank == me->bad ? bad_fields : good_fields;
  me->status = rgi_cp_agree(start_ctx, me->comm, f, 3, &me->e);
  rg_comm_destroy(me->comm, me->status == RG_OK ? NULL : &me->e);
  return NULL;
}

Test(cp_comm, what_ranks_must_have_in_common) {
  static const char *const say[] = {"another spec", "another policy", "another capacity"};
  rank r[MOST];
  rg_error e = {0};
  cr_assert_eq(rg_context_create(NULL, &start_ctx, &e), RG_OK);
  good_fields = fields_of(-1, false);
  run_ranks(r, 4, -1, 5, agree);
  for (int i = 0; i < 4; i++) cr_assert_eq(r[i].status, RG_OK, "%s", r[i].e.message);
  for (int field = 0; field < 3; field++) {
    bad_fields = fields_of(field, true);
    run_ranks(r, 4, 2, 5, agree);
    for (int i = 0; i < 4; i++) {
      cr_assert_eq(r[i].status, RG_E_COMM);
      cr_assert(strstr(r[i].e.message, say[field]) && strstr(r[i].e.message, "rank 2"), "%s",
                r[i].e.message);
    }
  }
  rg_context_destroy(start_ctx);
}

/* Greetings with bits and bytes changed are refused, or say the same thing. */
Test(cp_comm, greetings_of_any_bytes) {
  enum { N = 3 };
  const rgi_cp_field *field = fields_of(-1, false);
  rgi_cp_hello good[N], bad[N];
  uint64_t state = 7;
  memset(good, 0, sizeof good);
  for (uint32_t r = 0; r < N; r++) {
    good[r] = (rgi_cp_hello){.magic = "regraph", .format = 1, .size = N, .rank = r, .fields = 3};
    for (int i = 0; i < 3; i++) good[r].hash[i] = field[i].hash;
  }
  cr_assert_eq(rgi_cp_compare(good, N, field, 3, NULL), RG_OK);
  for (int turn = 0; turn < 20000; turn++) {
    memcpy(bad, good, sizeof bad);
    for (int k = 0; k < 1 + turn % 3; k++) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      ((unsigned char *)bad)[(state >> 33) % sizeof bad] ^=
          (unsigned char)(1u << (state >> 60 & 7));
    }
    bool same = true;
    for (int r = 0; r < N; r++)
      same = same && memcmp(&bad[r], &good[r], offsetof(rgi_cp_hello, hash[3])) == 0;
    rg_error e = {0};
    cr_assert_eq(rgi_cp_compare(bad, N, field, 3, &e), same ? RG_OK : RG_E_COMM, "%s", e.message);
  }
}

Test(cp_comm, what_makes_no_sense_is_refused) {
  rg_context *ctx = NULL;
  rg_comm *comm[2];
  rg_error e = {0};
  cr_assert_eq(rg_context_create(NULL, &ctx, &e), RG_OK);
  cr_assert_eq(rg_comm_threads(ctx, 0, 0, comm, &e), RG_E_USAGE);
  e = (rg_error){0};
  cr_assert_eq(rg_comm_threads(ctx, 2, -1, comm, &e), RG_E_USAGE);
  e = (rg_error){0};
  cr_assert_eq(rg_comm_threads(NULL, 2, 0, comm, &e), RG_E_USAGE);
  rg_comm_destroy(NULL, NULL);
  rg_context_destroy(ctx);
}
