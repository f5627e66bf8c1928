/* ops/cuda_rows.h: elementwise and row-wise ops on a GPU: fills kernels/rows.h's structs from calls. */
#ifndef RGI_CUDA_ROWS_H
#define RGI_CUDA_ROWS_H

#include "../kernels/rows.h"
#include "ops.h"

/* Starts a walk over `shape` and adds tensors to it, as rgi_walk does on the CPU. */
void rgi_cuda_walk(rgk_walk *w, const rg_arg *const *tensor, int n);

rg_status rgi_cuda_zero(const rg_call *c, rg_cuda *x);

#endif
