/* kernels/gemm_mma_bf16.cu: instances of gemm_mma.cuh. */
#include "gemm_mma.cuh"

const void *rgk_gemm_mma_bf16(int mode, bool large) {
  return large ? rgk::gemm_mma_instance<__nv_bfloat16, true>(mode)
               : rgk::gemm_mma_instance<__nv_bfloat16, false>(mode);
}
