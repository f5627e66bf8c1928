/* ops/cuda/comm.h: what the ops that communicate launch: rows into and out of a comm block, sums of
 * what came, the collectives between; tables of context parallelism. */
#ifndef RGI_CUDA_COMM_H
#define RGI_CUDA_COMM_H

#include "../../kernels/comm.h"
#include "../comm/comm.h"

/* to := from, of one shape, in to's type; rows past the live ones of `cu` (may be NULL) become
 * zero. */
rg_status rgi_cuda_copy(rg_cuda *x, const rg_arg *from, const rg_arg *to, const rg_arg *cu);
/* The same by chunks: chunk c of `to` comes from its place in `from`, or goes there (`scatter`).
 * order may be NULL. */
rg_status rgi_cuda_permute(rg_cuda *x, const rg_arg *from, const rg_arg *to, const rg_arg *order,
                           bool scatter);
/* to := Σ_r of what stands at from + r·step bytes, dense in `wire`. */
rg_status rgi_cuda_sum(rg_cuda *x, const rg_arg *to, const void *from, int64_t step, int ranks,
                       rg_dtype wire);
/* to[i] := Σ_r of floats i and to's extent + i of the r-th pair from `from` on, in fp64. */
rg_status rgi_cuda_sum_pairs(rg_cuda *x, const rg_arg *to, const void *from, int ranks);
/* Zeros. */
rg_status rgi_cuda_clear(rg_cuda *x, void *data, int64_t bytes, rg_dtype dtype);

/* A dense tensor of x's shape with n rows, `offset` bytes into the call's comm block. */
rg_arg rgi_cuda_dense(const rg_call *c, const rg_arg *x, int64_t n, int64_t offset, rg_dtype dtype);

/* Collectives of `ranks`: bytes at offset `send` of the comm block to offset `recv`. A call
 * without a communicator has one rank, whose bytes stay: *recv := send. */
rg_status rgi_cuda_all_gather(const rg_call *c, rg_cuda *x, int ranks, int64_t send, int64_t *recv,
                              int64_t bytes);
rg_status rgi_cuda_all_to_all(const rg_call *c, rg_cuda *x, int ranks, int64_t send, int64_t *recv,
                              int64_t bytes);
rg_status rgi_cuda_swap(const rg_call *c, rg_cuda *x, int ranks, const rg_halo *h, int64_t bytes);

/* A launch for each slot of a halo: `like` lays out the rows, x[0 … n) are what is read (rank -1:
 * absent), y what is written. */
typedef struct rgi_cuda_halo {
  const rg_arg *x[RGK_HALO_SLOTS], *y, *cu, *order;
  int n, slots, ranks, rank;
  int64_t chunk, left, right;
  char *message[RGK_MESSAGES];
} rgi_cuda_halo;
rg_status rgi_cuda_halo_launch(rg_cuda *x, const rgi_cuda_halo *h, rgk_halo_kernel *kernel,
                               int slot, bool send);

#endif
