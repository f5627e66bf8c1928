/* ops/cuda/attn_mma.h: how rows are shared out among teams of warps (kernels/attn/mma.h), forward
 * and backward. */
#ifndef RGI_CUDA_ATTN_MMA_H
#define RGI_CUDA_ATTN_MMA_H

#include "../../kernels/attn/mma.h"
#include "attn.h"

/* T, S and H allow it: kernels count rows in 32 bits. */
bool rgi_attn_mma_counts(const rgk_attn *a);
rgk_mma rgi_attn_mma_teams(const rgk_attn *a, int shape);

#endif
