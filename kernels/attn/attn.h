/* kernels/attn/attn.h: one attention call, forward or backward, as every attention kernel
 * sees it. */
#ifndef RGK_ATTN_H
#define RGK_ATTN_H

#include "../kernels.h"

enum { RGK_SWA, RGK_CMP, RGK_SLC };

/* Query head h belongs to KV head h / G. Query i of sequence b stands at position i + offset[b] and
 * sees, of the sequence's n keys,
 *   SWA  keys [position − window_left, position]       (window_left < 0: from 0)
 *   CMP  keys j with position >= j·stride + kernel − 1
 *   SLC  keys up to its position in the blocks of its row of idx: an entry counts if it is larger
 *        than all before it in the row, not negative, and its block starts before key n
 * Keys of sequence b: rows starts[b] … of k and v; CMP: from row starts[b] / stride on, as many as
 * (L − kernel) / stride + 1 (none if L < kernel), L the length in tokens; cut at S rows. */
typedef struct rgk_attn {
  int32_t mode, dtype;    /* of q, k, v, o, d_o */
  int32_t H, KH, G, D, E; /* heads, KV heads, H / KH, width of q and k, width of v */
  rgk_seqs seqs,
      kseqs; /* of queries; of keys, in tokens. The same starts where keys have none of their own */
  const int32_t *offset; /* [n] or NULL */
  int64_t T, S;          /* rows of q, of k */
  float scale, softcap;  /* softcap 0: off */
  int64_t window_left;
  int32_t kernel, stride, block, N; /* N: width of idx */
  rgk_tensor q, k, v, idx, sinks;
  rgk_tensor o, lse; /* forward writes them (lse may be absent), backward reads them */
  /* backward; absent ones are NULL. d_o, d_lse absent: zero */
  rgk_tensor d_o, d_lse, dq, dk, dv, d_sinks;
  rgk_tensor dq_sum; /* fp32: dq is this and the call's term, rounded once; or NULL. Then acc_q is
                        off, but for flash_bwd, where dq_sum is dq */
  rgk_tensor delta;  /* [T, H] fp32 sums of o d_o, given instead of o, or NULL */
  bool acc_q, acc_k, acc_v, acc_sinks; /* add to the fp32 sum that is there */
  bool pair_sinks; /* d_sinks has 2H floats: sums, then what is left of them beyond fp32 */
  /* q, k, v, o, d_o, dq, dk, dv, dq_sum start on, and step by, multiples of 16 bytes */
  bool aligned;
} rgk_attn;

/* n / d for 0 <= n < 2^31 by a product: m = ⌈2^(31 + shift) / d⌉, 2^(shift − 1) < d <= 2^shift. */
typedef struct rgk_divisor {
  uint32_t m, shift;
} rgk_divisor;

RGK_BOTH rgk_divisor rgk_divide_by(int32_t d) {
  rgk_divisor r = {0, 31};
  while (d > 1 && (int64_t)1 << (r.shift - 31) < d) r.shift++;
  r.m = (uint32_t)((((uint64_t)1 << r.shift) + (uint64_t)d - 1) / (uint64_t)d);
  return r;
}
#ifdef __CUDACC__
__device__ __forceinline__ int rgk_over(int n, rgk_divisor d) {
  return (int)((uint64_t)(uint32_t)n * d.m >> d.shift);
}
#endif

#endif
