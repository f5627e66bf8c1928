/* kernels/gemm_mma_f16.cu: instances of gemm_mma.cuh. */
#include "gemm_mma.cuh"

const void *rgk_gemm_mma_f16(int mode, bool large) {
  return large ? rgk::gemm_mma_instance<__half, true>(mode)
               : rgk::gemm_mma_instance<__half, false>(mode);
}
