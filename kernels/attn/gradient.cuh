/* kernels/attn/gradient.cuh: dK and dV on Hopper: a product's accumulators, as device/wgmma.cuh
 * deals them out, become rows of a gradient. */
#pragma once
#include "../device/wgmma.cuh"
#include "../kernels.h"

namespace rgk {

/* Two neighbours: they overwrite, or are added to the fp32 sums that are there. */
__device__ __forceinline__ void put_pair(const rgk_tensor &y, bool add, int64_t at, float a,
                                         float b) {
  if (y.dtype == RG_F32) {
    float2 *to = (float2 *)((float *)y.data + at);
    if (add) { /* not fused with what made a and b: each is one term */
      const float2 old = *to;
      a = __fadd_rn(old.x, a), b = __fadd_rn(old.y, b);
    }
    *to = make_float2(a, b);
  } else {
    *(uint32_t *)((uint16_t *)y.data + at) =
        y.dtype == RG_F16 ? pack2<__half>(a, b) : pack2<__nv_bfloat16>(a, b);
  }
}

/* This thread's accumulators x, times scale, of columns from `first` on, CUT: those below `width`;
 * its keys are `key` and key + 8 of `keys`, the first of which is at row `row` of y. */
template <bool CUT, int N>
__device__ __forceinline__ void put_keys(const rgk_tensor &y, bool add, int64_t row, int kh,
                                         int key, int keys, int first, int width,
                                         const float (&x)[N], float scale) {
  const int c = first + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (key + 8 * i >= keys) continue;
    const int64_t at = (row + key + 8 * i) * y.row + kh * y.head + c;
#pragma unroll
    for (int j = 0; j < N / 4; j++)
      if (!CUT || c + 8 * j < width)
        put_pair(y, add, at + 8 * j, x[4 * j + 2 * i] * scale, x[4 * j + 2 * i + 1] * scale);
  }
}

} // namespace rgk
