/* exec/cuda.h: CUDA at the lowest level: taking launches, and telling failures
 * apart. Only in builds with nvcc.
 */
#ifndef RGI_CUDA_H
#define RGI_CUDA_H

#include "../graph/base.h"
#include <cuda_runtime_api.h>
#include <regraph/op.h>

/* RG_E_DEVICE with the call's name and CUDA's own words; RG_OK for cudaSuccess. */
rg_status rgi_cuda_status(cudaError_t code, const char *what, const char *node, rg_error *e);

static inline enum cudaMemcpyKind rgi_cuda_kind(const rg_copy *c) {
  return c->to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
}

/* Takes launches by running them at once on a stream. */
typedef struct rgi_cuda_eager {
  rg_cuda base;
  cudaStream_t stream;
  /* kernels prepared on this device, borrowed; NULL: each launch prepares */
  struct rgi_cuda_known *known;
} rgi_cuda_eager;
typedef struct rgi_cuda_known { /* what meets in a place takes turns */
  const void *function[64];
  uint32_t shared[64];
} rgi_cuda_known;
void rgi_cuda_eager_init(rgi_cuda_eager *x, cudaStream_t stream, rg_error *e);
void rgi_cuda_eager_done(rgi_cuda_eager *x);

/* Makes a kernel's dynamic shared memory legal on the current device, beside what it has of its
 * own. */
rg_status rgi_cuda_prepare(const rg_launch *l, rg_error *e);
/* l as the runtime wants it; `attrs` has room for 1. */
void rgi_cuda_config(const rg_launch *l, cudaStream_t stream, cudaLaunchConfig_t *config,
                     cudaLaunchAttribute *attrs);

/* An NVTX range around a node's launches, for profilers. */
void rgi_cuda_range_push(const char *name);
void rgi_cuda_range_pop(void);

/* The current device, or RG_E_DEVICE saying what is missing: no driver, too old a driver, no
 * device. */
rg_status rgi_cuda_device(rg_gpu *out, rg_error *e);
/* The same, with its name (name NULL: unasked) and its memory in bytes. */
rg_status rgi_cuda_about(rg_gpu *out, char *name, size_t size, int64_t *memory, rg_error *e);

/* Measures what copies between pinned memory and the current device's do, the slower way, in 10^9
 * bytes a second. Where that fails *gbs stays as it is. */
void rgi_cuda_host_rate(double *gbs);

#endif
