/* kernels/blas.c: see blas.h. */
#include "blas.h"
#include "../graph/base.h"
#include <cublasLt.h>

void *rgk_blas(rg_cuda *x) {
  cublasLtHandle_t handle = NULL;
  if (x->blas) return x->blas;
  if (cublasLtCreate(&handle) != CUBLAS_STATUS_SUCCESS)
    rgi_fail(x->error, RG_E_DEVICE, NULL, NULL, "cuBLASLt did not start");
  return x->blas = handle;
}

void rgk_blas_destroy(void *handle) {
  if (handle) cublasLtDestroy((cublasLtHandle_t)handle);
}
