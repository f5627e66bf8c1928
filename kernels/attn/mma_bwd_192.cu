/* kernels/attn/mma_bwd_192.cu: attention's backward (mma_bwd.h) of widths 192 and 128. */
#include "mma_bwd_keys.cuh"
#include "mma_bwd_queries.cuh"

using namespace rgk::mma_bwd;

rgk_mma_bwd_kernels rgk_mma_bwd_192(rg_dtype type, bool small) {
#ifndef RGK_DEV
  if (type == RG_BF16) return kernels_of<__nv_bfloat16, 192, 128>(small);
  if (type == RG_F16) return kernels_of<__half, 192, 128>(small);
#endif
  return {};
}
