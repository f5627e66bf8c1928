/* kernels/attn/gather.cuh: softmax of a warpgroup's 64 rows by 64 keys, in registers, as both
   kernels by queries take it (gather_fwd_sm90.cu, tokens_fwd_sm90.cu).

     p = exp2(S c - m)    O += p V

   m is a reference rather than the maximum: it moves only when a row's maximum exceeds it by LAZY
   powers of two.
 */
#pragma once
#include "../device/ptx.cuh"
#include "../device/wgmma.cuh"

namespace rgk {
namespace by_queries {

constexpr float LAZY = 8;
enum { KEYS = 64 };

/* A thread's two rows of its warpgroup's 64: reference (raw) and this thread's share of the sum. */
struct rows2 {
  float m[2], l[2];
};

/* Logits of scores, capped; `to` as consumers have it. */
__device__ __forceinline__ void cap(float (&s)[KEYS / 2], float softcap, float to) {
#pragma unroll
  for (int i = 0; i < KEYS / 2; i++) s[i] = softcap * (1 - __fdividef(2, 1 + exp2_fast(s[i] * to)));
}

/* Finds the references of s, where what is masked is −inf. True: o must be multiplied by
 * `scale`. */
__device__ __forceinline__ bool refer(const float (&s)[KEYS / 2], rows2 &x, float (&scale)[2],
                                      float c) {
  bool moved = false;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float a = s[2 * h], b = s[2 * h + 1];
#pragma unroll
    for (int i = 1; i < KEYS / 8; i++)
      a = fmaxf(a, s[4 * i + 2 * h]), b = fmaxf(b, s[4 * i + 2 * h + 1]);
    a = fmaxf(a, b);
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 2));
    const bool move = (a - x.m[h]) * c > LAZY; /* −inf − −inf: no */
    scale[h] = move ? exp2_fast((x.m[h] - a) * c) : 1;
    x.m[h] = move ? a : x.m[h];
    x.l[h] *= scale[h];
    moved |= move;
  }
  return __any_sync(~0u, moved);
}

/* Columns 16 i … of s become the A of step i of the product with V. */
template <class T, int i>
__device__ __forceinline__ void weigh16(const float (&s)[KEYS / 2], uint32_t (&a)[KEYS / 4],
                                        rows2 &x, float c, const float (&minus)[2]) {
  float e[8];
#pragma unroll
  for (int j = 0; j < 8; j++) e[j] = exp2_fast(fmaf(s[8 * i + j], c, minus[j / 2 % 2]));
#pragma unroll
  for (int h = 0; h < 2; h++) x.l[h] += (e[2 * h] + e[2 * h + 1]) + (e[4 + 2 * h] + e[5 + 2 * h]);
#pragma unroll
  for (int j = 0; j < 4; j++) a[4 * i + j] = pack2<T>(e[2 * j], e[2 * j + 1]);
}

} // namespace by_queries
} // namespace rgk
