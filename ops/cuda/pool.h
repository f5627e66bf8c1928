/* ops/cuda/pool.h: pool on a GPU: workspace and launches. */
#ifndef RGI_CUDA_POOL_H
#define RGI_CUDA_POOL_H

#include "../pool.h"

size_t rgi_cuda_pool_workspace(const rgi_pool *a);
rg_status rgi_cuda_pool_steps(const rgi_pool *a, void *workspace, rg_cuda *x);

#endif
