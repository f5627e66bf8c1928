/* kernels/attn/mma_bwd.cuh: what the two kernels of mma_bwd.h share. */
#pragma once
#include "mma_bwd.h"
#include "../device/mma.cuh"

namespace rgk {
namespace mma_bwd {

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

/* A warp's sums of dQ, 16 rows of C columns from `column` on, sixteen of every GAP, to where they
 * go: at(x, r) is the element at which row r begins in x, negative where there is none. `room`: for
 * 16 rows of W, these columns of it the warp's own; `memory`: the same as a pointer. */
template <class T, int W, int C, int GAP = 16, class At>
__device__ __forceinline__ void put_dq(const rgk_attn &a, float (&sum)[C / 2], int column,
                                       uint32_t room, const char *memory, At at) {
  const int lane = threadIdx.x % 32, row = lane / 4, c0 = lane % 4 * 2;
  auto column_of = [&](int j) { return column + j / 2 * GAP + j % 2 * 8; }; /* of eight */
#pragma unroll
  for (int i = 0; i < C / 2; i++) sum[i] *= a.scale;
  if (a.dq.dtype == RG_F32) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t to = at(a.dq, row + 8 * i);
      if (to < 0) continue;
#pragma unroll
      for (int j = 0; j < C / 8; j++)
        if (column_of(j) < a.D)
          put_two(a.dq, a.acc_q, to + column_of(j) + c0, sum[4 * j + 2 * i],
                  sum[4 * j + 2 * i + 1]);
    }
    return;
  }
  if (a.dq_sum.data) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t from = at(a.dq_sum, row + 8 * i);
      if (from < 0) continue;
      const float *const before = (const float *)a.dq_sum.data + from + c0;
#pragma unroll
      for (int j = 0; j < C / 8; j++)
        if (column_of(j) < a.D) {
          const float2 x = *(const float2 *)(before + column_of(j));
          float *const y = sum + 4 * j + 2 * i;
          y[0] = __fadd_rn(x.x, y[0]), y[1] = __fadd_rn(x.y, y[1]);
        }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < C / 8; j++)
      put_pair<W>(room, row + 8 * i, column_of(j) + c0,
                  pack(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1], T()));
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * C / 8; i += 32) {
    const int r = i / (C / 8), c = column_of(i % (C / 8)) / 8;
    const int64_t to = at(a.dq, r);
    if (to < 0 || 8 * c >= a.D) continue;
    *(uint4 *)((uint16_t *)a.dq.data + to + 8 * c) = *(const uint4 *)(memory + place<W>(r, c));
  }
}

/* All warps of the block meet, wherever in the kernel each of them is: not the aligned bar.sync, of
 * which synccheck asks that all of a block run the same instruction. */
template <int N> __device__ __forceinline__ void meet() {
  asm volatile("barrier.sync 1, %0;" ::"n"(N) : "memory");
}

} // namespace mma_bwd
} // namespace rgk

/* The kernels of a width, each in a file of its own, mma_bwd_W.cu, since drivers compile a file's
 * PTX as a whole; NULL: not in this build. */
struct rgk_mma_bwd_kernels {
  const void *keys, *many_keys, *queries, *pairs, *alone;
};
#define X(W, E) rgk_mma_bwd_kernels rgk_mma_bwd_##W(rg_dtype type, bool small);
RGK_MMA_BWD_INSTANCES(X)
#undef X

namespace rgk {
namespace mma_bwd {
template <class T, int W, int E, bool SMALL, int KEYS>
__global__ void keys(const __grid_constant__ rgk_attn_plain p);
template <class T, int W, int E, bool SMALL>
__global__ void queries(const __grid_constant__ rgk_attn_plain p);

template <class T, int W, int E>
rgk_mma_bwd_kernels kernels_of(bool small, const void *pairs = nullptr,
                               const void *alone = nullptr) {
  constexpr bool two = rgk_mma_bwd_batch(W, true) != rgk_mma_bwd_batch(W, false);
  rgk_mma_bwd_kernels k = {(const void *)keys<T, W, E, false, RGK_MMA_BWD_KEYS>, nullptr,
                           (const void *)queries<T, W, E, false>, pairs, alone};
  if constexpr (W == RGK_MMA_BWD_MANY_WIDTH)
    k.many_keys = (const void *)keys<T, W, E, false, RGK_MMA_BWD_MANY_KEYS>;
  if (two && small) {
    k.keys = (const void *)keys<T, W, E, two, RGK_MMA_BWD_KEYS>;
    k.queries = (const void *)queries<T, W, E, two>;
  }
  return k;
}
} // namespace mma_bwd
} // namespace rgk
