/* device/pages.cuh: keys in pages (see pages.h). */
#pragma once
#include "../pages.h"
#include "ptx.cuh"

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

/* ---- tiles of 16-bit rows, for wgmma ----
 *
 * A page's compressed rows are few, and to start a copy of eight takes the copy engine's thread as
 * long as one of 128. So 128 threads copy 16 bytes each, and arrive at an mbarrier when what they
 * copied is there; whoever then multiplies puts a proxy fence between. */

/* A cache's rows of one head; lengths in 16 bytes. */
struct paged_rows {
  const char *data;   /* of page 0 */
  uint32_t page, row; /* from one to the next */
  int units;          /* of a row */
};
__device__ __forceinline__ paged_rows paged_head(const rgk_tensor &t, int64_t page, int head,
                                                 int width) {
  return {(const char *)t.data + 2 * head * t.head, (uint32_t)(page / 8), (uint32_t)(t.row / 8),
          width / 8};
}

/* Where four rows of a tile are, by lanes: a page, and the first of them in it; page −1: none. */
struct paged_four {
  int page, row;
};
__device__ __forceinline__ paged_four find_four(const rgk_pages &g, const int32_t *table, int first,
                                                int low, int end) {
  const int mine = first + (int)threadIdx.x % 32 * 4;
  paged_four x = {-1, 0};
  if (mine + 3 < low || mine >= end) return x;
  const uint32_t m = (uint32_t)mine / (uint32_t)g.rows;
  x.page = table[m];
  x.row = mine - (int)m * g.rows;
  if ((uint32_t)x.page >= (uint32_t)g.count) x.page = -1;
  return x;
}

/* Rows [first, first + ROWS) of a sequence, as panels of 64 columns in the copy engine's swizzle,
 * `panel` bytes apart; zeros for those outside [low, end) and of a page that is none. A page has a
 * multiple of four rows. Thread `id` of 128, whole warps. */
template <int ROWS, int UNITS>
__device__ __forceinline__ void copy_rows(const paged_rows &from, const paged_four &four,
                                          uint32_t to, uint32_t panel, int first, int low, int end,
                                          int id) {
  static_assert(ROWS % 4 == 0 && ROWS <= 128 && ROWS * UNITS % 128 == 0, "four rows a lane");
  constexpr int TURNS = ROWS * UNITS / 128, STEP = 128 / UNITS; /* rows of a turn */
  const uint32_t at = (uint32_t)four.page * from.page + (uint32_t)four.row * from.row;
  const bool all = first >= low && first + ROWS <= end && from.units == UNITS &&
                   !__any_sync(~0u, id % 32 < ROWS / 4 && four.page < 0);
  if (128 % UNITS == 0 && STEP % 4 == 0 && all) {
    const int row = id / UNITS, unit = id % UNITS;
    const char *const data = from.data + (uint64_t)(row % 4 * from.row + unit) * 16;
    const uint32_t begin = to + unit / 8 * panel + row * 128;
#pragma unroll
    for (int i = 0; i < TURNS; i++)
      copy16(begin + i * STEP * 128 + ((unit ^ (row + i * STEP)) & 7) * 16,
             data + (uint64_t)__shfl_sync(~0u, at, row / 4 + i * STEP / 4) * 16);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < TURNS; i++) {
    const int x = id + i * 128, row = x / UNITS, unit = x % UNITS;
    const uint32_t base = __shfl_sync(~0u, at, row / 4);
    const int page = __shfl_sync(~0u, four.page, row / 4);
    const bool real = page >= 0 && first + row >= low && first + row < end && unit < from.units;
    copy16(to + unit / 8 * panel + row * 128 + ((unit ^ row) & 7) * 16,
           from.data + (real ? (uint64_t)(base + row % 4 * from.row + unit) * 16 : 0), real);
  }
}
/* One arrival, once all copies that this thread has started are done. */
__device__ __forceinline__ void copies_arrive(uint64_t *bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_at(bar))
               : "memory");
}

} // namespace rgk
