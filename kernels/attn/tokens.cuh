/* kernels/attn/tokens.cuh: jobs of attention over single tokens (see tokens.h), the tiles of keys
   that each goes through, and how a warpgroup copies 64 rows.
 */
#pragma once
#include "attn.cuh"
#include "../device/ptx.cuh"
#include "tokens.h"

namespace rgk {
namespace tokens {

/* ---- jobs ---- */

struct job {
  int64_t row, head; /* of q; the first head of q */
  int across;        /* which tile of a query's heads */
  int kh, rows;      /* heads of the tile that exist */
  int seen;          /* keys below that may be seen */
  int64_t key;       /* the sequence's first row of k; -1: a dead row of q */
};
__device__ __forceinline__ bool find_job(const rgk_tokens &p, int id, job &j) {
  if (id >= p.jobs) return false;
  const int across = p.a.KH * p.parts, token = id / across, part = id % across % p.parts;
  j.row = p.row + p.rows - 1 - token;
  j.across = id % across;
  j.kh = j.across / p.parts;
  j.head = (int64_t)j.kh * p.a.G + part * RGK_TOKENS_ROWS;
  j.rows = min((int)RGK_TOKENS_ROWS, p.a.G - part * RGK_TOKENS_ROWS);
  const int b = find_seq(p.a.seqs, j.row);
  j.key = -1;
  if (b == p.a.seqs.n) return true;
  const key_span span = keys_of(p.a, b);
  const int64_t position = j.row - seq_start(p.a.seqs, b) + first_position(p.a, b);
  j.key = span.row;
  j.seen = (int)max(visible(p.a, position, span.n).hi, (int64_t)0);
  return true;
}

/* ---- copies ---- */

/* A thread's share of 64 rows: four of them, every eighth 16 bytes of each. */
template <class T> struct rows4 {
  const T *at[4];
  bool real[4];
};
template <class T> struct loader {
  const int lane, warp;
  uint32_t place[4]; /* in a panel */

  __device__ __forceinline__ loader() : lane(threadIdx.x % 32), warp(threadIdx.x / 32 % 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int r = row(i);
      place[i] = r * 128 + ((lane ^ r) & 7) * 16;
    }
  }
  __device__ __forceinline__ int row(int i) const {
    return 16 * warp + 4 * i + lane / 8;
  }
  template <int first, int end>
  __device__ __forceinline__ void copy(char *to, const rows4<T> &from) const {
#pragma unroll
    for (int x = first; x < end; x++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        copy16(smem_at(to) + x * RGK_TOKENS_PANEL + place[i], from.at[i] + x * 64, from.real[i]);
  }
  /* Rows of t, a head's, that `chosen` says: below 0 there is none. */
  __device__ __forceinline__ rows4<T> find(const rgk_tensor &t, int64_t first, int kh,
                                           const int (&chosen)[4]) const {
    rows4<T> x;
    const T *base = (const T *)t.data + kh * t.head + lane % 8 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x.real[i] = chosen[i] >= 0;
      x.at[i] = base + (first + max(chosen[i], 0)) * t.row;
    }
    return x;
  }
  /* A job's heads of t, which is as q. */
  __device__ __forceinline__ rows4<T> find_heads(const rgk_tensor &t, const job &j) const {
    rows4<T> x;
    const T *base = (const T *)t.data + j.row * t.row + lane % 8 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x.real[i] = row(i) < j.rows;
      x.at[i] = base + (j.head + (x.real[i] ? row(i) : 0)) * t.head;
    }
    return x;
  }
};

/* Entries of a row up to the last one that could count. */
__device__ __forceinline__ int entries(const int32_t *idx, int n, int seen) {
  const int lane = threadIdx.x % 32;
  for (int end = n; end > 0; end -= 256) {
    int last = 0;
#pragma unroll
    for (int i = 1; i <= 8; i++) {
      const int at = end - 32 * i + lane, e = at >= 0 ? idx[at] : -1;
      if (e >= 0 && e < seen) last = max(last, at + 1);
    }
    last = __reduce_max_sync(~0u, last);
    if (last > 0) return last;
  }
  return 0;
}

/* The key of this lane's entry e, or -1: it does not count. before: the largest entry so far, or
 * -1. */
__device__ __forceinline__ int counted(int e, int seen, int &before) {
  const int lane = threadIdx.x % 32;
  int most = e;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(~0u, most, i);
    if (lane >= i) most = max(most, other);
  }
  int others = __shfl_up_sync(~0u, most, 1);
  others = lane > 0 ? max(others, before) : before;
  before = max(before, __shfl_sync(~0u, most, 31));
  return e > others && e < seen ? e : -1;
}

/* ---- tiles ---- */

/* Which of a tile's keys count, bit by bit. */
struct alignas(16) label {
  uint32_t low, high;
  int last; /* of the job */
};
/* Read by a warp's first lane, which gives the stage back, for all. */
__device__ __forceinline__ label read_label(const label &from) {
  label y = {};
  if (threadIdx.x % 32 == 0) y = from;
  y.low = __shfl_sync(~0u, y.low, 0);
  y.high = __shfl_sync(~0u, y.high, 0);
  y.last = __shfl_sync(~0u, y.last, 0);
  return y;
}

/* A row of idx, tile by tile, by each warp of the loaders. */
template <class T> struct walk {
  const int32_t *idx;
  int n, seen, from, before, low, high;

  __device__ __forceinline__ walk(const rgk_tokens &p, const job &j)
      : idx((const int32_t *)p.a.idx.data + j.row * p.a.idx.row + j.kh * p.a.idx.head),
        n(entries(idx, p.a.N, j.seen)), seen(j.seen), from(0), before(-1) {
    read();
  }
  __device__ __forceinline__ int entry(int at) const { return at < n ? idx[at] : -1; }
  __device__ __forceinline__ void read() {
    const int lane = threadIdx.x % 32;
    low = entry(from + lane), high = entry(from + 32 + lane);
  }
  /* The next tile: which of its keys count, and those of this thread's rows. There is one at
   * least. */
  __device__ __forceinline__ label next(const loader<T> &x, int (&chosen)[4]) {
    const int first = counted(low, seen, before), second = counted(high, seen, before);
    from += RGK_TOKENS_KEYS;
    const label y = {__ballot_sync(~0u, first >= 0), __ballot_sync(~0u, second >= 0), from >= n};
#pragma unroll
    for (int i = 0; i < 4; i++)
      chosen[i] = __shfl_sync(~0u, x.warp < 2 ? first : second, x.row(i) % 32);
    read();
    return y;
  }
};

} // namespace tokens
} // namespace rgk
