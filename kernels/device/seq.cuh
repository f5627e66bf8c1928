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
  tile t;
  t.b = lo;
  t.begin = seq_start(s, lo);
  t.length = (lo < s.n ? seq_start(s, lo + 1) : s.rows) - t.begin;
  t.first = (slot - t.begin / size - lo) * size;
  int64_t left = t.length - t.first;
  t.n = left <= 0 ? 0 : left < size ? (int)left : size;
  return t;
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

__device__ __forceinline__ int64_t live_rows(const rgk_seqs &s) {
  return seq_start(s, s.n);
}

} // namespace rgk
