/* kernels/index_loss.cuh: what both families of index_loss share (see index_loss.h): a row's loss,
 * or the gradients of its scores, from what its keys gave. */
#pragma once
#include "device/element.cuh"
#include "device/seq.cuh"
#include "index_loss.h"

namespace rgk {
namespace index_loss {

__device__ __forceinline__ float weight_of(const rgk_index_loss &p, int64_t row, int head) {
  return p.weight.data
             ? load(p.weight.data, p.weight.dtype, row * p.weight.row + head * p.weight.head)
             : 1.0f;
}

__device__ __forceinline__ void put(const rgk_tensor &t, int64_t at, float x, bool add) {
  if (add)
    ((float *)t.data)[at] += x;
  else
    store(t.data, t.dtype, at, x);
}

/* Sum or maximum over the block, the same in every thread; `room` has THREADS places. */
template <bool MAX, int THREADS>
__device__ __forceinline__ double over_block(double x, double *room) {
  __syncthreads();
  room[threadIdx.x] = x;
  __syncthreads();
  for (int d = THREADS / 2; d > 0; d /= 2) {
    if (threadIdx.x < d) {
      const double y = room[threadIdx.x + d];
      room[threadIdx.x] = MAX ? fmax(room[threadIdx.x], y) : room[threadIdx.x] + y;
    }
    __syncthreads();
  }
  return room[0];
}

/* What row t may see: keys of its sequence, which begin at row `first` of k, of which `seen` lie at
 * or before its position (0 or less: none). b: seqs.n where no sequence has the row. */
struct row_keys {
  int b;
  int64_t first, seen;
};
__device__ __forceinline__ row_keys find_keys(const rgk_index_loss &p, int64_t t) {
  row_keys r = {find_seq(p.seqs, t), 0, 0};
  if (r.b >= p.seqs.n) return r;
  r.first = seq_start(p.kseqs, r.b);
  const int64_t position = t - seq_start(p.seqs, r.b) + (p.offset ? p.offset[r.b] : 0);
  r.seen = min(position + 1, seq_start(p.kseqs, r.b + 1) - r.first);
  return r;
}

/* A row that no sequence has. */
template <bool BACKWARD, int THREADS>
__device__ __forceinline__ void clear_row(const rgk_index_loss &p, int64_t t, int head) {
  if constexpr (!BACKWARD) {
    if (threadIdx.x == 0) ((float *)p.loss.data)[t * p.loss.row + head * p.loss.head] = 0;
  } else {
    const int heads = p.IH / p.I;
    for (int j = head * heads; j < (head + 1) * heads; j++) {
      if (p.dw.data && !p.add_w && threadIdx.x == 0)
        store(p.dw.data, p.dw.dtype, t * p.dw.row + j * p.dw.head, 0.0f);
      for (int c = threadIdx.x; c < p.ID && p.dq.data && !p.add_q; c += THREADS)
        store(p.dq.data, p.dq.dtype, t * p.dq.row + j * p.dq.head + c, 0.0f);
    }
  }
}

/* Of exponentials m and scores s of a row's places, 0 and -inf where none is; any: one is. The loss
 * is written; or the gradients of the scores are, to `slope`, which may be s. */
template <bool BACKWARD, int THREADS>
__device__ __forceinline__ void finish_row(const rgk_index_loss &p, int64_t t, int head,
                                           int64_t keys, const float *m, const float *s, bool any,
                                           float *slope, double *room) {
  double most = -INFINITY, all = 0, exps = 0, loss = 0;
  for (int64_t i = threadIdx.x; i < keys; i += THREADS) most = fmax(most, (double)s[i]);
  most = over_block<true, THREADS>(most, room);
  for (int64_t i = threadIdx.x; i < keys && any; i += THREADS) {
    all += (double)m[i];
    exps += exp((double)s[i] - most);
    if (m[i] != 0) loss += (double)m[i] * (log((double)m[i]) - (double)s[i]);
  }
  all = over_block<false, THREADS>(all, room);
  exps = over_block<false, THREADS>(exps, room);
  const double lse = most + log(exps);
  if constexpr (!BACKWARD) {
    loss = over_block<false, THREADS>(loss, room);
    if (threadIdx.x == 0)
      ((float *)p.loss.data)[t * p.loss.row + head * p.loss.head] =
          any ? (float)(loss / all + lse - log(all)) : 0.0f;
  } else {
    const double up = ((const float *)p.d_loss.data)[t * p.d_loss.row + head * p.d_loss.head];
    for (int64_t i = threadIdx.x; i < keys; i += THREADS)
      slope[i] =
          s[i] == -INFINITY ? 0.0f : (float)(up * (exp((double)s[i] - lse) - (double)m[i] / all));
    __syncthreads();
  }
}

} // namespace index_loss
} // namespace rgk
