/* kernels/attn/mma_bwd_96.cu: attention's backward (mma_bwd.h) of widths 96 and 96. */
#include "mma_bwd_alone.cuh"
#include "mma_bwd_keys.cuh"
#include "mma_bwd_queries.cuh"

using namespace rgk::mma_bwd;

rgk_mma_bwd_kernels rgk_mma_bwd_96(rg_dtype type, bool small) {
#ifndef RGK_DEV
  if (type == RG_BF16)
    return kernels_of<__nv_bfloat16, 96, 96>(small,
                                             rgk::mma_bwd_alone::of<__nv_bfloat16, 96, 96>());
  if (type == RG_F16)
    return kernels_of<__half, 96, 96>(small, rgk::mma_bwd_alone::of<__half, 96, 96>());
#endif
  return {};
}
