/* kernels/attn/topk.cuh: what a row of topk may choose from. */
#pragma once
#include "topk.h"
#include "../device/seq.cuh"
#include <limits.h>

namespace rgk {

/* Positions are below 2^32 (an int32 offset and an int32 length), and 32-bit division is much the
 * faster. */
__device__ __forceinline__ int64_t divide(int64_t x, int32_t y) {
  return (uint32_t)x / (uint32_t)y;
}

/* Compressed keys that end before position `end`: rgk_blocks_in. */
__device__ __forceinline__ int64_t keys_before(int64_t end, const rgk_topk &p) {
  return end < p.kernel ? 0 : divide(end - p.kernel, p.stride) + 1;
}

/* Blocks past the last key are candidates, too: they score nothing. */
__device__ __forceinline__ rgk_topk_choice choice_of(const rgk_topk &p, int64_t position) {
  return rgk_topk_choose(position, divide(position, p.block), p.block, p.init, p.local, p.tail,
                         p.top_n);
}

/* A tile of queries of one sequence, and its keys. */
struct topk_keys {
  int64_t length; /* in tokens */
  int64_t first;  /* row of k */
  int64_t n;      /* compressed keys */
};
__device__ __forceinline__ topk_keys keys_of(const rgk_topk &p, int b) {
  topk_keys k;
  int64_t start = p.kseqs.starts[b];
  k.length = p.kseqs.starts[b + 1] - start;
  k.first = divide(start, p.stride);
  k.n = max(min(keys_before(k.length, p), p.S - k.first), (int64_t)0);
  return k;
}

/* Integers ordered as scores are, NaN below all. */
constexpr int LEAST_KEY = INT_MIN, NAN_KEY = INT_MIN + 1;
__device__ __forceinline__ int key_of(float s) {
  int i = __float_as_int(s + 0.0f);
  i ^= (i >> 31) & 0x7fffffff;
  return s != s ? NAN_KEY : i;
}

/* fp32 sums this small may lack terms that underflowed; infinite ones say nothing. */
__device__ __forceinline__ bool undecided(float least) {
  return least < 1e-25f || least == INFINITY;
}

/* A block's fp64 score, which is not negative, as a number that no other block has: 11 bits of
 * exponent and 22 of fraction tell scores apart; of equal ones the first is the largest. */
__device__ __forceinline__ uint64_t wide_entry(double score, int64_t b) {
  const uint64_t u = (uint64_t)__double_as_longlong(score + 0.0) >> 30;
  return (score != score ? 0 : u + 1) << 31 | (0x7fffffffu - (uint32_t)b);
}
__device__ __forceinline__ int32_t wide_block(uint64_t e) {
  return (int32_t)(0x7fffffffu - ((uint32_t)e & 0x7fffffffu));
}

} // namespace rgk
