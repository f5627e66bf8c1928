/* ops/cuda/index_loss.h: index_loss on a GPU: workspace and launches. */
#ifndef RGI_CUDA_INDEX_LOSS_H
#define RGI_CUDA_INDEX_LOSS_H

#include "../../kernels/index_loss.h"
#include "../index_loss.h"

size_t rgi_cuda_index_loss_workspace(const rgi_index_loss *a, const rg_gpu *gpu);
rg_status rgi_cuda_index_loss_steps(const rgi_index_loss *a, const rg_gpu *gpu, void *workspace,
                                    rg_cuda *x);
const char *rgi_cuda_index_loss_path(const rgi_index_loss *a, const rg_gpu *gpu);

#endif
