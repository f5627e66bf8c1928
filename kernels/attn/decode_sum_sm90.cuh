/* kernels/attn/decode_sum_sm90.cuh: the gated sum of a token's branches, to the bits of blend.cu,
   where rows of selected blocks and window are made by the same block of threads. */
#pragma once
#include "../device/chunk.cuh"
#include "../device/gate.cuh"
#include "decode_sm90.cuh"

namespace rgk {
namespace decode {

/* Weights of a head's branches. */
__device__ __forceinline__ void gate_weights(const rgk_decode_pair &d, int token, int head,
                                             float (&w)[RGK_PAIR_BRANCHES]) {
  constexpr int MOST = RGK_PAIR_BRANCHES;
  float x[MOST], most = -INFINITY, sum = 0;
#pragma unroll
  for (int k = 0; k < MOST; k++)
    if (k < d.n)
      x[k] = rgk::load(d.gate.data, d.gate.dtype,
                       (int64_t)token * d.gate.row + head * d.gate.head + k);
  if (d.act == SOFTMAX) {
#pragma unroll
    for (int k = 0; k < MOST; k++)
      if (k < d.n) most = more_gate(most, x[k]);
#pragma unroll
    for (int k = 0; k < MOST; k++)
      if (k < d.n) sum = gate_sum_add(sum, x[k], most);
  }
#pragma unroll
  for (int k = 0; k < MOST; k++)
    if (k < d.n) w[k] = gate_weight(d.act, x[k], most, sum);
}

/* A warpgroup's thread has PIECES of eight values of 16 heads' rows, of which this takes N. */
template <class C> constexpr int PIECES = HEADS *(C::E / 8) / WARPGROUP;
template <class C, int N> struct branch_sum {
  static constexpr int MOST = RGK_PAIR_BRANCHES, UNITS = C::E / 8;
  static constexpr int WINDOW = MOST; /* place of the window's, where it is not in memory */
  using T = typename C::type;
  const rgk_decode_pair &d;
  const int token, head, tid; /* tid: number of the first piece */
  float w[N][MOST];
  uint4 part[N][MOST + 1]; /* of other branches */

  __device__ __forceinline__ int head_of(int i) const {
    return head + (tid + i * WARPGROUP) / UNITS;
  }
  __device__ __forceinline__ branch_sum(const rgk_decode_pair &d, const job &j, int tid)
      : d(d), token(j.token), head(j.head), tid(tid) {
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
      for (int k = 0; k < MOST; k++) {
        const rgk_pair_branch &b = d.branch[k];
        part[i][k] = make_uint4(0, 0, 0, 0);
        if (k < d.n && b.o)
          part[i][k] = *(const uint4 *)((const T *)b.o + (int64_t)token * b.row +
                                        head_of(i) * b.head + tid % UNITS * 8);
      }
      gate_weights(d, token, head_of(i), w[i]);
    }
  }
  /* Piece i, of which selected blocks made `selected`. */
  __device__ __forceinline__ void put(int i, const uint4 &selected) const {
    const rgk_tensor &o = d.window.f.o;
    float sum[CHUNK], v[CHUNK];
#pragma unroll
    for (int e = 0; e < CHUNK; e++) sum[e] = -0.0f; /* as blend.cu */
#pragma unroll
    for (int k = 0; k < MOST; k++) {
      if (k >= d.n) continue;
      chunk<T> x;
      x.q[0] = k == d.at_selected ? selected : k == d.at_window ? part[i][WINDOW] : part[i][k];
      x.get(v);
#pragma unroll
      for (int e = 0; e < CHUNK; e++) sum[e] = __fmaf_rn(w[i][k], v[e], sum[e]);
    }
    store16<T>(o.data, (int64_t)token * o.row + head_of(i) * o.head + tid % UNITS * 8, sum);
  }
};

} // namespace decode
} // namespace rgk
