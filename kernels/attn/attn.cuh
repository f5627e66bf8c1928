/* kernels/attn/attn.cuh: which keys a query sees (see attn.h). */
#pragma once
#include "attn.h"
#include "../device/element.cuh"
#include "../device/seq.cuh"

namespace rgk {

/* Where sequence b's keys are: first row of k and v, and number. */
struct key_span {
  int64_t row, n;
};
__device__ __forceinline__ key_span keys_of(const rgk_attn &a, int b) {
  key_span k;
  k.row = seq_start(a.kseqs, b);
  k.n = seq_start(a.kseqs, b + 1) - k.row;
  if (a.mode == RGK_CMP) {
    k.row /= a.stride;
    k.n = rgk_blocks_in(k.n, a.kernel, a.stride);
  }
  k.row = min(k.row, a.S);
  k.n = min(k.n, a.S - k.row);
  return k;
}

/* Position of sequence b's first query. */
__device__ __forceinline__ int64_t first_position(const rgk_attn &a, int b) {
  return a.offset ? a.offset[b] : 0;
}

/* Keys [lo, hi) that the query at position pos may see of n, none if lo >= hi; SLC: of its
 * blocks. */
struct key_range {
  int64_t lo, hi;
};
__device__ __forceinline__ key_range visible(const rgk_attn &a, int64_t pos, int64_t n) {
  key_range r = {0, pos + 1};
  if (a.mode == RGK_CMP) r.hi = rgk_blocks_in(pos + 1, a.kernel, a.stride);
  if (a.mode == RGK_SWA && a.window_left >= 0 && pos > a.window_left) r.lo = pos - a.window_left;
  r.hi = min(r.hi, n);
  return r;
}

/* A head's d_sinks, the sum of all rows of this call. */
__device__ __forceinline__ void put_sink(const rgk_attn &a, int h, double sum) {
  if (!a.pair_sinks) {
    put_grad(a.d_sinks.data, a.d_sinks.dtype, h * a.d_sinks.row, (float)sum, a.acc_sinks);
    return;
  }
  float *value = (float *)a.d_sinks.data + h * a.d_sinks.row, *rest = value + a.H * a.d_sinks.row;
  if (a.acc_sinks) sum += (double)*value + (double)*rest;
  *value = (float)sum;
  *rest = (float)(sum - (double)*value);
}

} // namespace rgk
