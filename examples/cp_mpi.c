/* cp_mpi.c: context parallelism over MPI: a communicator made of the caller's own functions.
 *
 *     mpicc -o cp_mpi examples/cp_mpi.c $(pkg-config --cflags --libs regraph)
 *     mpirun -n 4 ./cp_mpi examples/nsa.json
 *
 * Rank 0 draws a batch; each rank takes its rows of it (rg_cp_rows), runs forward and backward on
 * the CPU, and rank 0 puts the output together and prints its sum, which is the same on any number
 * of ranks. What the seven functions promise, regraph/op.h says. A rank that fails ends all with
 * MPI_Abort: MPI itself has no way to leave a collective. With --die N rank N does. */
#include <mpi.h>
#include <regraph/op.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static rg_status done(int code, const char *node, rg_error *e) {
  if (code == MPI_SUCCESS) return RG_OK;
  if (e && e->status == RG_OK) {
    e->status = RG_E_COMM;
    snprintf(e->message, sizeof e->message, "MPI failed in %s (error %d)", node, code);
  }
  return RG_E_COMM;
}

static rg_status all_gather(rg_comm *c, const char *node, const void *send, void *recv,
                            size_t bytes, void *stream, rg_error *e) {
  (void)c, (void)stream;
  return done(MPI_Allgather(send, (int)bytes, MPI_BYTE, recv, (int)bytes, MPI_BYTE, MPI_COMM_WORLD),
              node, e);
}

static rg_status all_to_all(rg_comm *c, const char *node, const void *send, void *recv,
                            size_t bytes, void *stream, rg_error *e) {
  (void)c, (void)stream;
  return done(MPI_Alltoall(send, (int)bytes, MPI_BYTE, recv, (int)bytes, MPI_BYTE, MPI_COMM_WORLD),
              node, e);
}

static rg_status halo(rg_comm *c, const char *node, const rg_halo *h, size_t bytes, void *stream,
                      rg_error *e) {
  const int before = c->rank > 0 ? c->rank - 1 : MPI_PROC_NULL, nb = before < 0 ? 0 : (int)bytes;
  const int after = c->rank + 1 < c->size ? c->rank + 1 : MPI_PROC_NULL,
            na = after < 0 ? 0 : (int)bytes;
  (void)stream;
  const int code = MPI_Sendrecv(h->to_previous, nb, MPI_BYTE, before, 0, h->from_next, na, MPI_BYTE,
                                after, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  if (code != MPI_SUCCESS) return done(code, node, e);
  return done(MPI_Sendrecv(h->to_next, na, MPI_BYTE, after, 1, h->from_previous, nb, MPI_BYTE,
                           before, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE),
              node, e);
}

static rg_status barrier(rg_comm *c, const char *node, rg_error *e) {
  (void)c;
  return done(MPI_Barrier(MPI_COMM_WORLD), node, e);
}

static void end_all(rg_comm *c, const rg_error *why) {
  fprintf(stderr, "rank %d failed: %s\n", c->rank, why ? why->message : "no reason given");
  MPI_Abort(MPI_COMM_WORLD, 6);
}

static void nothing(rg_comm *c) {
  (void)c;
}

/* ---- the program ---- */

enum { T = 4096, B = 3 };

static void check(rg_status status, const rg_error *e) {
  if (status == RG_OK) return;
  fprintf(stderr, "%s\n", e->message);
  MPI_Abort(MPI_COMM_WORLD, rg_status_exit_code(status));
}

int main(int argc, char **argv) {
  rg_comm comm = {.abi = RG_OP_ABI,
                  .all_gather = all_gather,
                  .all_to_all = all_to_all,
                  .halo = halo,
                  .barrier = barrier,
                  .abort = end_all,
                  .destroy = nothing};
  rg_context *ctx = NULL;
  rg_spec *spec = NULL;
  rg_plan *plan = NULL;
  rg_session *session = NULL;
  rg_error e = {0};
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &comm.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &comm.size);
  const int dies = argc > 3 && strcmp(argv[2], "--die") == 0 ? atoi(argv[3]) : -1;
  if (argc < 2) {
    fprintf(stderr, "usage: cp_mpi SPEC [--die RANK]\n");
    MPI_Abort(MPI_COMM_WORLD, 2);
  }

  const rg_binding param[] = {{"H", 8, NULL}, {"KH", 2, NULL}, {"D", 32, NULL}, {"DV", 32, NULL}};
  const rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  const rg_plan_options how = {.set = set, .nset = 2, .threads = 1, .cp = comm.size};
  check(rg_context_create(NULL, &ctx, &e), &e);
  check(rg_spec_load_file(ctx, argv[1], param, 4, &spec, &e), &e);
  check(rg_plan_create(spec, NULL, &how, &plan, &e), &e);
  const rg_session_options options = {.size = sizeof options, .comm = &comm};
  check(rg_session_create(plan, &options, &session, &e), &e);

  /* every rank draws the whole batch, in the same way, and keeps its own rows */
  const int32_t starts[B + 1] = {0, 1500, 1501, 4000};
  rg_cp_info cp;
  rg_range own[2] = {{0, T}, {T, T}};
  rg_plan_cp(plan, &cp);
  if (cp.ranks > 1) check(rg_cp_rows(starts, B + 1, T, cp.ranks, cp.mode, comm.rank, own, &e), &e);
  rg_tensor_info t;
  void *out = NULL;
  rg_tensor_info out_is = {0};
  for (size_t i = 0; rg_plan_tensor(plan, i, &t) == RG_OK; i++) {
    const size_t size = rg_dtype_size(t.dtype), n = (size_t)t.bytes / size;
    char *data = calloc((size_t)t.bytes + 1, 1);
    const size_t row = t.sharded && t.dim[0] ? n / (size_t)t.dim[0] : n;
    uint64_t state = 1 + t.role;
    for (const char *p = t.name; *p; p++) state = state * 131 + (unsigned char)*p;
    if (t.seqlens) memcpy(data, starts, sizeof starts);
    for (size_t r = 0, to = 0; !t.seqlens && (t.role == RG_INPUT || t.role == RG_GRAD_IN) &&
                               r < (t.sharded || cp.ranks == 1 ? (size_t)T : 1);
         r++) {
      const int mine = ((int64_t)r >= own[0].begin && (int64_t)r < own[0].end) ||
                       ((int64_t)r >= own[1].begin && (int64_t)r < own[1].end);
      const size_t width = cp.ranks == 1 ? n / T : row;
      for (size_t k = 0; k < width; k++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const float x = (float)(state >> 40) / (1 << 23) - 1;
        if (mine) rg_convert(t.dtype, data + (to + k) * size, RG_F32, &x, 1);
      }
      if (mine) to += width;
    }
    if (t.role == RG_OUTPUT && !out) out = data, out_is = t;
    check(rg_session_bind(session, t.role, t.name, data, (size_t)t.bytes, &e), &e);
  }
  if (dies == comm.rank) abort();
  check(rg_session_forward(session, &e), &e);
  check(rg_session_backward(session, &e), &e);

  /* a checksum of every row of the output, put together in the order of the whole batch */
  double *sums = calloc(T, sizeof *sums), *all = calloc(T, sizeof *all), total = 0;
  const size_t rows = (size_t)out_is.dim[0], size = rg_dtype_size(out_is.dtype),
               width = (size_t)out_is.bytes / size / rows;
  for (size_t r = 0; r < rows; r++) {
    const size_t half = (size_t)(own[0].end - own[0].begin);
    const int64_t at = r < half ? own[0].begin + (int64_t)r : own[1].begin + (int64_t)(r - half);
    for (size_t k = 0; k < width; k++) {
      float x;
      rg_convert(RG_F32, &x, out_is.dtype, (char *)out + (r * width + k) * size, 1);
      sums[at] += (double)x * (double)(1 + k % 7);
    }
  }
  MPI_Reduce(sums, all, T, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
  for (int r = 0; r < T; r++) total += all[r] * (1 + r % 5);
  if (comm.rank == 0) printf("%d ranks: output %s sums to %.12g\n", comm.size, out_is.name, total);
  rg_session_destroy(session);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
  MPI_Finalize();
  return 0;
}
