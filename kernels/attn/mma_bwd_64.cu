/* kernels/attn/mma_bwd_64.cu: attention's backward (mma_bwd.h) of widths 64 and 64. */
#include "mma_bwd_alone.cuh"
#include "mma_bwd_keys.cuh"
#include "mma_bwd_queries.cuh"

using namespace rgk::mma_bwd;

rgk_mma_bwd_kernels rgk_mma_bwd_64(rg_dtype type, bool small) {
  if (type == RG_BF16)
    return kernels_of<__nv_bfloat16, 64, 64>(small,
                                             rgk::mma_bwd_alone::of<__nv_bfloat16, 64, 64>());
  if (type == RG_F16)
    return kernels_of<__half, 64, 64>(small, rgk::mma_bwd_alone::of<__half, 64, 64>());
  return {};
}
