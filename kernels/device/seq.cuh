/* device/seq.cuh: which sequence and tile a block works on (see "tiles of packed sequences" in
 * kernels.h). */
#pragma once
#include "../kernels.h"

namespace rgk {

__device__ __forceinline__ int64_t seq_start(const rgk_seqs &s, int b) {
  return s.starts ? s.starts[b] : b == 0 ? 0 : s.rows;
}

struct tile {
  int b;          /* sequence; s.n: the dead rows */
  int64_t begin;  /* first row of the sequence in the pack */
  int64_t first;  /* position of the tile's first row inside the sequence */
  int64_t length; /* of the sequence */
  int n;          /* rows of the tile that exist, 0: the slot is empty */
};

/* Tile `slot` of those of sequence b. */
__device__ __forceinline__ tile tile_at(const rgk_seqs &s, int b, int64_t slot, int size) {
  tile t;
  t.b = b;
  t.begin = seq_start(s, b);
  t.length = (b < s.n ? seq_start(s, b + 1) : s.rows) - t.begin;
  t.first = (slot - t.begin / size - b) * size;
  int64_t left = t.length - t.first;
  t.n = left <= 0 ? 0 : left < size ? (int)left : size;
  return t;
}

/* The tile of slot `slot`. All threads of a block may call it: the bisection reads a few cached
 * words. */
__device__ __forceinline__ tile find_tile(const rgk_seqs &s, int64_t slot, int size) {
  int lo = 0, hi = s.n; /* the answer is in [lo, hi] */
  while (lo < hi) {
    int mid = (lo + hi + 1) >> 1;
    if (seq_start(s, mid) / size + mid <= slot)
      lo = mid;
    else
      hi = mid - 1;
  }
  return tile_at(s, lo, slot, size);
}
/* The same by whole warps, whose lanes look at once. */
__device__ __forceinline__ tile find_tile_warp(const rgk_seqs &s, int64_t slot, int size) {
  int lo = 0, hi = s.n;
  while (lo < hi) {
    const int step = (hi - lo + 31) / 32, at = lo + step * ((int)threadIdx.x % 32 + 1);
    lo += step * __popc(__ballot_sync(~0u, at <= hi && seq_start(s, at) / size + at <= slot));
    hi = min(hi, lo + step - 1);
  }
  return tile_at(s, lo, slot, size);
}

/* The sequence of row `row`; s.n for a dead row. Empty sequences are passed over. */
__device__ __forceinline__ int find_seq(const rgk_seqs &s, int64_t row) {
  if (!s.starts) return row < s.rows ? 0 : 1;
  int lo = 0, hi = s.n;
  while (lo < hi) { /* the last b with starts[b] <= row */
    int mid = (lo + hi + 1) >> 1;
    if (s.starts[mid] <= row)
      lo = mid;
    else
      hi = mid - 1;
  }
  return lo;
}

/* The same by whole warps, whose lanes look at once; dead rows too. */
__device__ __forceinline__ int find_seq_warp(const rgk_seqs &s, int64_t row) {
  int lo = 0, hi = s.n;
  while (lo < hi) {
    const int step = (hi - lo + 31) / 32, at = lo + step * ((int)threadIdx.x % 32 + 1);
    lo += step * __popc(__ballot_sync(~0u, at <= hi && seq_start(s, at) <= row));
    hi = min(hi, lo + step - 1);
  }
  return lo;
}

__device__ __forceinline__ int64_t live_rows(const rgk_seqs &s) {
  return seq_start(s, s.n);
}

} // namespace rgk
