/* ops/cuda/topk.h: topk on a GPU: which kernels take a call, their workspace and launches. The
 * caller fills in what ops/topk.c's attributes and ports say, what a path adds to it starts as
 * zero. `pages`: where keys are that stand in pages, or NULL. */
#ifndef RGI_CUDA_TOPK_H
#define RGI_CUDA_TOPK_H

#include "../../kernels/attn/topk.h"
#include "../ops.h"

size_t rgi_cuda_topk_workspace(const rgk_topk *p, bool paged, const rg_gpu *gpu);
rg_status rgi_cuda_topk_steps(const rgk_topk *p, const rgk_pages *pages, const rg_gpu *gpu,
                              void *workspace, rg_cuda *x);
/* What kernels are told of a call of paged_topk (ops/topk.c). */
rgk_topk rgi_paged_topk_view(const rg_call *c, rgk_pages *pages);
const char *rgi_cuda_topk_path(const rgk_topk *p, const rgk_pages *pages, const rg_gpu *gpu);

#endif
