/* kernels/blas.h: matrix products through cuBLASLt. */
#ifndef RGK_BLAS_H
#define RGK_BLAS_H

#include "kernels.h"

#ifdef REGRAPH_CUDA
/* The handle that `x` keeps, made at the first call; NULL and x->error on failure. */
void *rgk_blas(rg_cuda *x);
void rgk_blas_destroy(void *handle);
#endif

#endif
