/* device/pages.cuh: keys in pages (see pages.h). */
#pragma once
#include "../pages.h"

namespace rgk {

/* Tokens of sequence b, `length` of them of this step; 0 where the numbers don't go together. All
 * threads of the block meet here. */
__device__ __forceinline__ int64_t paged_tokens(const rgk_pages &p, int b, int64_t length) {
  const int64_t n = p.context[b * p.context_step];
  const int32_t *table = p.table + b * p.table_row;
  bool bad = n > (int64_t)p.most * p.tokens || n < length;
  for (int m = threadIdx.x; !bad && (int64_t)m * p.tokens < n; m += blockDim.x)
    bad = (uint32_t)table[m] >= (uint32_t)p.count;
  return __syncthreads_or(bad) ? 0 : n;
}

/* Element at which key j begins in a cache whose pages lie `page` and whose rows lie `row` apart,
 * without its head. */
__device__ __forceinline__ int64_t paged_key(const rgk_pages &p, const int32_t *table, int64_t page,
                                             int64_t row, int64_t j) {
  const uint32_t r = (uint32_t)j + (uint32_t)p.before, m = r / (uint32_t)p.rows;
  return table[m] * page + (int64_t)(r - m * (uint32_t)p.rows) * row;
}

} // namespace rgk
