/* kernels/attn/mma_bwd.cuh: what the two kernels of mma_bwd.h share. */
#pragma once
#include "mma_bwd.h"
#include "../device/mma.cuh"

namespace rgk {
namespace mma_bwd {

/* s [16 m, N] = A B^T over W columns: rows of A and of B in shared memory, at a lane's addresses
 * mma_at_rows and mma_at_columns. */
template <class T, int W, int M, int n>
__device__ __forceinline__ void scores(float (&s)[M][n], uint32_t a, uint32_t b) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < n; i++) s[m][i] = 0;
#pragma unroll
  for (int k = 0; k < W / 16; k++) {
    uint32_t x[M][4], y[4];
#pragma unroll
    for (int m = 0; m < M; m++) load_matrices(on<W>(a, 2 * k) + m * 16 * pitch(W), x[m]);
#pragma unroll
    for (int j = 0; j < n / 8; j++) {
      load_matrices(on<W>(b, 2 * k) + j * 16 * pitch(W), y);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma<T>(s[m] + 8 * j, x[m], y);
        mma<T>(s[m] + 8 * j + 4, x[m], y + 2);
      }
    }
  }
}

/* d [16 m, W] += A B: A in registers, 16 * STEPS of k; B's rows are k, at mma_at_rows. */
template <class T, int W, int STEPS, int M, int n>
__device__ __forceinline__ void add_product(float (&d)[M][n], const uint32_t (&a)[M][4 * STEPS],
                                            uint32_t b) {
  static_assert(n >= W / 2, "d may have room for more");
#pragma unroll
  for (int k = 0; k < STEPS; k++)
#pragma unroll
    for (int j = 0; j < W / 16; j++) {
      uint32_t y[4];
      load_transposed(on<W>(b, 2 * j) + k * 16 * pitch(W), y);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma<T>(d[m] + 8 * j, a[m] + 4 * k, y);
        mma<T>(d[m] + 8 * j + 4, a[m] + 4 * k, y + 2);
      }
    }
}

/* Two neighbours of a gradient; `at` is even. */
__device__ __forceinline__ void put_two(const rgk_tensor &t, bool add, int64_t at, float x,
                                        float y) {
  if (t.dtype == RG_F32) {
    float2 *to = (float2 *)((float *)t.data + at);
    float2 v = make_float2(x, y);
    if (add) {
      const float2 old = *to;
      v = make_float2(__fadd_rn(old.x, x), __fadd_rn(old.y, y));
    }
    *to = v;
  } else {
    *(uint32_t *)((uint16_t *)t.data + at) =
        t.dtype == RG_F16 ? pack(x, y, __half()) : pack(x, y, __nv_bfloat16());
  }
}

} // namespace mma_bwd
} // namespace rgk

/* The kernels of a width, each in a file of its own, mma_bwd_W.cu, since drivers compile a file's
 * PTX as a whole; NULL: not in this build. */
struct rgk_mma_bwd_pair {
  const void *keys, *queries;
};
#define X(W, E) rgk_mma_bwd_pair rgk_mma_bwd_##W(rg_dtype type, bool small);
RGK_MMA_BWD_INSTANCES(X)
#undef X

namespace rgk {
namespace mma_bwd {
template <class T, int W, int E, bool SMALL>
__global__ void keys(const __grid_constant__ rgk_attn_plain p);
template <class T, int W, int E, bool SMALL>
__global__ void queries(const __grid_constant__ rgk_attn_plain p);

template <class T, int W, int E> rgk_mma_bwd_pair pair_of(bool small) {
  constexpr bool two = rgk_mma_bwd_batch(W, true) != rgk_mma_bwd_batch(W, false);
  if (two && small) return {(const void *)keys<T, W, E, two>, (const void *)queries<T, W, E, two>};
  return {(const void *)keys<T, W, E, false>, (const void *)queries<T, W, E, false>};
}
} // namespace mma_bwd
} // namespace rgk
