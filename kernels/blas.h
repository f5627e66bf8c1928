/* kernels/blas.h: matrix products through cuBLASLt. */
#ifndef RGK_BLAS_H
#define RGK_BLAS_H

#include "kernels.h"

/* Row-major C [m, n] = A [m, k] · Bᵀ, B [n, k], or A · B, B [k, n]; plus bias [n] if there is one.
 * 16-bit types, everything on multiples of 16 bytes. */
typedef struct rgk_product {
  rg_dtype dtype, c_dtype; /* of a, b, bias; of c */
  int64_t m, n, k, lda, ldb, ldc;
  const void *a, *b, *bias;
  void *c;
  bool transposed; /* B is [n, k] */
} rgk_product;

#ifdef REGRAPH_CUDA
/* The handle that `x` keeps, made at the first call; NULL and x->error on failure. */
void *rgk_blas(rg_cuda *x);
void rgk_blas_destroy(void *handle);
/* Takes the algorithm that cuBLASLt names first for RGK_PRODUCT_ROWS rows, without split sums and
 * without workspace, also for other m where it serves them: so a row's bits depend neither on m nor
 * on its place. */
enum { RGK_PRODUCT_ROWS = 8192 };
rg_status rgk_blas_product(rg_cuda *x, const rgk_product *p);
#else
static inline rg_status rgk_blas_product(rg_cuda *x, const rgk_product *p) {
  (void)x, (void)p;
  return RG_E_DEVICE;
}
#endif

#endif
