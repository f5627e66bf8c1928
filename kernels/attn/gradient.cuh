/* kernels/attn/gradient.cuh: dK and dV on Hopper: a product's accumulators, as device/wgmma.cuh
 * deals them out, become rows of a gradient. */
#pragma once
#include "../device/wgmma.cuh"
#include "../kernels.h"

namespace rgk {

/* Two neighbours of a gradient. Nobody else adds to them meanwhile, so that the order stands; a sum
 * is left to the memory, since who reads it first waits for each pair in turn. */
__device__ __forceinline__ void put_pair(const rgk_tensor &y, bool add, int64_t at, float v0,
                                         float v1) {
  if (add)
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"((float *)y.data + at),
                 "f"(v0), "f"(v1)
                 : "memory");
  else if (y.dtype == RG_F32)
    *(float2 *)((float *)y.data + at) = make_float2(v0, v1);
  else
    *(uint32_t *)((uint16_t *)y.data + at) =
        y.dtype == RG_F16 ? pack2<__half>(v0, v1) : pack2<__nv_bfloat16>(v0, v1);
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
