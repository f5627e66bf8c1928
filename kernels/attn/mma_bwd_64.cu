/* kernels/attn/mma_bwd_64.cu: attention's backward (mma_bwd.h) of widths 64 and 64. */
#include "mma_bwd_alone.cuh"
#include "mma_bwd_keys.cuh"
#include "mma_bwd_pairs.cuh"

using namespace rgk::mma_bwd;

template <class T> static rgk_mma_bwd_kernels all(bool small) {
  return kernels_of<T, 64, 64>(small, (const void *)pairs<T, 64, 64>,
                               rgk::mma_bwd_alone::of<T, 64, 64>());
}

rgk_mma_bwd_kernels rgk_mma_bwd_64(rg_dtype type, bool small) {
  if (type == RG_BF16) return all<__nv_bfloat16>(small);
  if (type == RG_F16) return all<__half>(small);
  return {};
}
