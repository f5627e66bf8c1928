/* ops/cuda/take.h: embed, gather_rows and argmax on a GPU (take.c). */
#ifndef RGI_CUDA_TAKE_H
#define RGI_CUDA_TAKE_H

#include "../ops.h"

/* Rows `rows` of x into y; numbers below `least` are faults. cu may be NULL: all rows are live. */
rg_status rgi_cuda_take(const rg_call *c, rg_cuda *x, const rg_arg *cu, int32_t least);
const char *rgi_cuda_take_path(const rg_call *c);
rg_status rgi_cuda_argmax(const rg_call *c, rg_cuda *x);
const char *rgi_cuda_argmax_path(const rg_call *c);

#endif
