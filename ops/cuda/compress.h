/* ops/cuda/compress.h: compress_kv and its gradients on a GPU. */
#ifndef RGI_CUDA_COMPRESS_H
#define RGI_CUDA_COMPRESS_H

#include "../ops.h"

size_t rgi_cuda_compress_workspace(const rg_call *c);
size_t rgi_cuda_compress_bwd_workspace(const rg_call *c);
rg_status rgi_cuda_compress(const rg_call *c, rg_cuda *x);
rg_status rgi_cuda_compress_bwd(const rg_call *c, rg_cuda *x);
const char *rgi_cuda_compress_path(const rg_call *c);

#endif
