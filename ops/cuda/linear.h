/* ops/cuda/linear.h: linear and its gradients on a GPU. */
#ifndef RGI_CUDA_LINEAR_H
#define RGI_CUDA_LINEAR_H

#include "../ops.h"

enum { RGI_LINEAR_BATCH_INVARIANT, RGI_LINEAR_ATTRS };

size_t rgi_cuda_linear_bwd_workspace(const rg_call *c);
rg_status rgi_cuda_linear(const rg_call *c, rg_cuda *x);
rg_status rgi_cuda_linear_bwd(const rg_call *c, rg_cuda *x);
const char *rgi_cuda_linear_path(const rg_call *c);

#endif
