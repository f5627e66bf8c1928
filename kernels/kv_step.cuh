/* kernels/kv_step.cuh: where a step's tokens go in their pages, and the means of the blocks that
 * they complete (paged.h): for paged.cu, and for attention that sees to both itself. */
#pragma once
#include "device/ptx.cuh"
#include "device/seq.cuh"
#include "gemm.cuh"
#include "paged.h"

namespace rgk {

/* ---- tokens ---- */

struct token_place {
  int64_t page, slot; /* page −1: nowhere */
};
/* Of the token that stands `behind` behind the last of sequence b (0: that one, −1: the one
 * before). What paged_batch would have refused is not written. */
__device__ __forceinline__ token_place place_token(const rgk_pages &g, rgk_divisor by_tokens, int b,
                                                   int64_t behind) {
  const int64_t context = g.context[b * g.context_step], position = context - 1 + behind;
  if (context <= 0 || position < 0) return {-1, 0};
  const int m = rgk_over((int)position, by_tokens);
  if (m >= g.most) return {-1, 0};
  const int32_t page = g.table[b * g.table_row + m];
  if ((uint32_t)page >= (uint32_t)g.count) return {-1, 0};
  return {page, position - (int64_t)m * g.tokens};
}

/* ---- blocks ---- */

/* A block that a step completes. */
struct new_block {
  const int32_t *table;
  int64_t token; /* its first; -1: none */
  int64_t page;  /* of its last token: where its row goes */
  int row;       /* in that page */
  int64_t fresh; /* the first token of this step … */
  int64_t begin; /* … and its row */
};

/* The i-th of sequence b, whose rows are [begin, begin + length). */
__device__ __forceinline__ new_block new_block_of(const rgk_new_blocks &p, int b, int64_t begin,
                                                  int64_t length, int64_t i) {
  const rgk_pages &g = p.pages;
  const int64_t context = g.context[b * g.context_step];
  new_block n = {nullptr, -1, 0, 0, 0, 0};
  /* what paged_batch would have refused completes nothing */
  if (context < length || context > (int64_t)g.most * g.tokens) return n;
  auto blocks = [&](int of) { /* rgk_blocks_in */
                              return of < p.kernel ? 0 : rgk_over(of - p.kernel, p.by_stride) + 1;
  };
  const int64_t j = blocks((int)(context - length)) + i;
  if (j >= blocks((int)context)) return n;
  const int first = (int)j * p.stride, last = rgk_over(first + p.kernel - 1, p.by_tokens),
            row = (int)j + g.before;
  n.table = g.table + b * g.table_row;
#pragma unroll 1
  for (int m = rgk_over(first, p.by_tokens); m <= last; m++)
    if ((uint32_t)n.table[m] >= (uint32_t)g.count) return n;
  n.token = first;
  n.page = n.table[last];
  n.row = row - rgk_over(row, p.by_rows) * g.rows;
  n.fresh = context - length;
  n.begin = begin;
  return n;
}

__device__ __forceinline__ void widen(const uint4 &v, int32_t dtype, float (&x)[8]) {
  const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 half = __half22float2(*(const __half2 *)&w[i]);
    x[2 * i] = dtype == RG_BF16 ? __uint_as_float(w[i] << 16) : half.x;
    x[2 * i + 1] = dtype == RG_BF16 ? __uint_as_float(w[i] & 0xffff0000u) : half.y;
  }
}

/* The mean of a block of two groups, a thread each, neighbours: eight features of a head, from
 * `feature` on. `rows`: where tokens of this step are, if they are not in pages yet. In the order
 * of compress_fwd.cu: tokens within a group, then groups. */
__device__ __forceinline__ void mean_of_eight(const rgk_paged_mean &p, const rgk_paged_side &s,
                                              const new_block &n, const rgk_tensor *rows, int head,
                                              int feature) {
  constexpr int MOST = RGK_PAGED_MEAN_GROUP;
  const int stride = p.blocks.stride, tokens = p.blocks.pages.tokens, group = threadIdx.x & 1;
  const int64_t first = n.token + group * stride;
  /* in one page, whose tokens stride divides */
  const int64_t page = n.table[(uint32_t)first / (uint32_t)tokens],
                slot = (uint32_t)first % (uint32_t)tokens;
  const int old = rows ? (int)min(n.fresh - first, (int64_t)MOST) : MOST; /* before this step */
  const int64_t at = s.x_page * page + slot * s.x.row + head * s.x.head + feature;
  const uint16_t *const cached = (const uint16_t *)s.x.data + at, *fresh = cached;
  if (rows)
    fresh = (const uint16_t *)rows->data + (n.begin + first - n.fresh) * rows->row +
            head * rows->head + feature;
  uint4 raw[MOST];
  float sum[8];
#pragma unroll
  for (int u = 0; u < MOST; u++) {
    const int t = min(u, stride - 1);
    raw[u] = *(const uint4 *)(rows && t >= old ? fresh + t * rows->row : cached + t * s.x.row);
  }
#pragma unroll
  for (int u = 0; u < MOST; u++) {
    float x[8];
    widen(raw[u], s.x.dtype, x);
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (u < stride) sum[e] = (u == 0 ? 0.0f : sum[e]) + x[e];
  }
#pragma unroll
  for (int e = 0; e < 8; e++)
    sum[e] = (sum[e] + __shfl_xor_sync(3u << (threadIdx.x & 30), sum[e], 1)) * p.scale;
  if (group == 0)
    store8(s.y.data, s.y.dtype, n.page * s.y_page + n.row * s.y.row + head * s.y.head + feature,
           true, 8, sum);
}

/* ---- both, of one head's keys (side 0) or values (1): by a warp ----
 *
 * What sequence b has of what kv_append_means does, of rows of D features. `room`: shared memory
 * for a block's tokens. Short code, for it is run once and comes from memory; inlined, for else all
 * that `a` holds would come from there, too. */
template <rg_dtype TYPE, int D>
__device__ __forceinline__ void step_head(const rgk_append_means &a, int b, int side, int head,
                                          char *room) {
  constexpr int LANES = D / 8, ROWS = 32 / LANES, PITCH = 2 * D; /* of a row; at once; bytes */
  static_assert(LANES <= 16, "two threads for eight features");
  const rgk_append &p = a.append;
  const rgk_new_blocks &blocks = a.mean.blocks;
  const rgk_paged_side &s = a.mean.side[side];
  const rgk_tensor &from = side ? p.v : p.k;
  const int lane = (int)threadIdx.x % 32, own = lane / LANES, unit = lane % LANES * 8,
            stride = blocks.stride;
  const int64_t begin = seq_start(p.seqs, b), length = seq_start(p.seqs, b + 1) - begin;
  const uint16_t *const fresh = (const uint16_t *)from.data + begin * from.row + head * from.head;
  uint16_t *const cached = (uint16_t *)s.x.data + head * s.x.head;
  int64_t i = 0;
  do {
    const new_block n = new_block_of(blocks, b, begin, length, i);
    if (n.token >= 0) {
      auto row_before = [&](int of) { /* of a group, in one page, whose tokens stride divides */
                                      const int first = (int)n.token + of,
                                                m = rgk_over(first, blocks.by_tokens);
                                      return cached + n.table[m] * s.x_page +
                                             (first - m * blocks.pages.tokens - of) * s.x.row +
                                             unit;
      };
      const uint16_t *const one = row_before(0), *const two = row_before(stride);
#pragma unroll 1
      for (int r = own; r < 2 * stride; r += ROWS) {
        const int late = (int)(n.token + r - n.fresh);
        copy16(smem_at(room) + r * PITCH + 2 * unit,
               late >= 0 ? fresh + late * from.row + unit : (r < stride ? one : two) + r * s.x.row);
      }
    }
#pragma unroll 1
    for (int t = own; t < length && i == 0; t += ROWS) { /* meanwhile */
      const token_place x = place_token(p.pages, p.by_tokens, b, t + 1 - length);
      if (x.page >= 0)
        *(uint4 *)(cached + x.page * s.x_page + x.slot * s.x.row + unit) =
            *(const uint4 *)(fresh + t * from.row + unit);
    }
    if (n.token < 0) continue;
    copies_wait_all();
    __syncwarp();
    const int eight = lane / 2 % LANES; /* as mean_of_eight */
    const char *const tokens = room + (lane & 1) * stride * PITCH + eight * 16;
    float sum[8] = {};
#pragma unroll 1
    for (int u = 0; u < stride; u++) {
      float x[8];
      widen(*(const uint4 *)(tokens + u * PITCH), TYPE, x);
#pragma unroll
      for (int e = 0; e < 8; e++) sum[e] += x[e];
    }
#pragma unroll
    for (int e = 0; e < 8; e++) sum[e] = (sum[e] + __shfl_xor_sync(~0u, sum[e], 1)) * a.mean.scale;
    if (lane % 2 == 0 && lane < 2 * LANES)
      store8(s.y.data, TYPE, n.page * s.y_page + n.row * s.y.row + head * s.y.head + eight * 8,
             true, 8, sum);
    __syncwarp(); /* the room is written again */
  } while (++i * stride < length);
}
/* In each thread that has, before the barrier after which the copy engine fetches what is there,
 * and writes to the room. (One fence of both would be one of the whole GPU.) */
__device__ __forceinline__ void step_fence() {
  asm volatile("fence.proxy.async.global;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

} // namespace rgk
