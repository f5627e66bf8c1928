/* tests/cp_late.c: a rank that a launcher started, with a deadline of its own, which the command
 * does not have: two forwards, and one rank that sleeps before the second.
 *
 *   mpirun -n 3 cp_late SPEC DEADLINE RANK-THAT-SLEEPS SECONDS
 *
 * A rank says what it was told and how long its last call took; it ends with 0 only if all went
 * well. */
#include <regraph/regraph.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static rg_status bind_all(const rg_plan *plan, rg_session *s, rg_error *e) {
  rg_tensor_info t;
  rg_status status = RG_OK;
  for (size_t i = 0; rg_plan_tensor(plan, i, &t) == RG_OK && status == RG_OK; i++) {
    void *zeros =
        calloc((size_t)t.bytes + 1, 1); /* no sequence has a token: the process's end frees it */
    status = rg_session_bind(s, t.role, t.name, zeros, (size_t)t.bytes, e);
  }
  return status;
}

int main(int argc, char **argv) {
  if (argc != 5) return 2;
  const double deadline = atof(argv[2]), seconds = atof(argv[4]);
  const rg_binding param[] = {{"H", 4, NULL}, {"KH", 2, NULL}, {"D", 16, NULL}, {"DV", 16, NULL}};
  const rg_binding set[] = {{"T", 1056, NULL}, {"B", 3, NULL}};
  const rg_comm_options where = {.size = sizeof where, .deadline = deadline};
  rg_context *ctx = NULL;
  rg_comm *comm = NULL;
  rg_spec *spec = NULL;
  rg_plan *plan = NULL;
  rg_session *s = NULL;
  rg_error e = {0};
  int rank = 0, ranks = 1;
  rg_comm_launched(&rank, &ranks, NULL);
  const rg_plan_options how = {.set = set, .nset = 2, .threads = 1, .cp = ranks};
  rg_status status = rg_context_create(NULL, &ctx, &e);
  if (status == RG_OK) status = rg_spec_load_file(ctx, argv[1], param, 4, &spec, &e);
  if (status == RG_OK) status = rg_plan_create(spec, NULL, &how, &plan, &e);
  if (status == RG_OK) status = rg_comm_processes(ctx, &where, &comm, &e);
  const rg_session_options options = {.size = sizeof options, .comm = comm};
  if (status == RG_OK) status = rg_session_create(plan, &options, &s, &e);
  if (status == RG_OK) status = bind_all(plan, s, &e);
  if (status == RG_OK) status = rg_session_forward(s, &e);
  if (rank == atoi(argv[3])) usleep((useconds_t)(1e6 * seconds));
  const double begun = now();
  if (status == RG_OK) status = rg_session_forward(s, &e);
  fprintf(stderr, "rank %d, after %.1f s: %s\n", rank, now() - begun,
          status == RG_OK ? "no error" : e.message);
  rg_session_destroy(s);
  rg_comm_destroy(comm, status == RG_OK ? NULL : &e);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
  return status == RG_OK ? 0 : rg_status_exit_code(status);
}
