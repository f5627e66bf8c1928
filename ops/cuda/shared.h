/* ops/cuda/shared.h: how much shared memory a GPU's blocks may have. Tiles are chosen by it, so a
 * plan runs where there is as much (exec/nodes.c). */
#ifndef RGI_CUDA_SHARED_H
#define RGI_CUDA_SHARED_H

#include <regraph/op.h>

/* KB a block. */
static inline int rgi_cuda_block_kb(const rg_gpu *gpu) {
  if (gpu->cc >= 90 && gpu->cc < 120) return 227;
  return gpu->cc == 86 || gpu->cc == 89 || gpu->cc >= 120 ? 99 : 163;
}

#endif
