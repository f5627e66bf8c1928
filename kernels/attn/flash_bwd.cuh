/* kernels/attn/flash_bwd.cuh: which queries and keys an item of flash_bwd's work is about. */
#pragma once
#include "flash_bwd.h"
#include "../device/seq.cuh"

namespace rgk {

/* A sequence: its queries, its keys, and how its queries are cut. */
struct bwd_seq {
  int64_t q_begin, k_begin; /* rows in the pack */
  int64_t offset, chunk;
  int64_t length, keys;
  int chunks, tiles; /* of queries, of keys */
  int tile;          /* keys in a tile */
};

__device__ __forceinline__ bwd_seq bwd_sequence(const rgk_flash_bwd &p, int b) {
  const rgk_attn &a = p.a;
  const int64_t least = p.chunk;
  bwd_seq s;
  s.q_begin = seq_start(a.seqs, b);
  s.length = seq_start(a.seqs, b + 1) - s.q_begin;
  s.k_begin = seq_start(a.kseqs, b);
  s.keys = seq_start(a.kseqs, b + 1) - s.k_begin;
  if (a.mode == RGK_CMP) {
    s.k_begin /= a.stride;
    s.keys = rgk_blocks_in(s.keys, a.kernel, a.stride);
  }
  if (s.k_begin > a.S) s.k_begin = a.S;
  if (s.keys > a.S - s.k_begin) s.keys = a.S - s.k_begin;
  s.offset = a.offset ? a.offset[b] : 0;
  const int64_t even = (s.length + RGK_FLASH_BWD_CHUNKS - 1) / RGK_FLASH_BWD_CHUNKS;
  s.chunk = least == 0 ? s.length : least > even ? least : even;
  s.chunk = (s.chunk + RGK_FLASH_BWD_ROWS - 1) / RGK_FLASH_BWD_ROWS * RGK_FLASH_BWD_ROWS;
  s.chunks = s.length <= s.chunk ? 1 : (int)((s.length + s.chunk - 1) / s.chunk);
  s.tile = p.keys;
  s.tiles = (int)((s.keys + s.tile - 1) / s.tile);
  return s;
}

/* How many keys, from the first on, the query in row i of the sequence may see (the window left
 * aside). */
__device__ __forceinline__ int64_t bwd_seen(const rgk_attn &a, const bwd_seq &s, int64_t i) {
  const int64_t p = i + s.offset,
                n = a.mode == RGK_CMP ? rgk_blocks_in(p + 1, a.kernel, a.stride) : p + 1;
  return n < s.keys ? n : s.keys;
}
/* The position from which key k is seen. */
__device__ __forceinline__ int64_t bwd_from(const rgk_attn &a, int64_t k) {
  return a.mode != RGK_CMP ? k : k * a.stride + a.kernel - 1;
}
__device__ __forceinline__ int bwd_tiles_seen(const rgk_attn &a, const bwd_seq &s, int64_t i) {
  return (int)((bwd_seen(a, s, i) + s.tile - 1) / s.tile);
}
__device__ __forceinline__ bool bwd_windowed(const rgk_attn &a) {
  return a.mode == RGK_SWA && a.window_left >= 0;
}

/* The key tiles [*lo, *hi) of chunk c's items. The last chunk takes all tiles, so that every tile
 * has an item, seen or not. */
__device__ __forceinline__ void bwd_chunk_tiles(const rgk_attn &a, const bwd_seq &s, int c, int *lo,
                                                int *hi) {
  if (c == s.chunks - 1) {
    *lo = 0, *hi = s.tiles;
    return;
  }
  const int64_t first = c * s.chunk + s.offset - a.window_left;
  *lo = bwd_windowed(a) && first > 0 ? (int)min(first / s.tile, (int64_t)s.tiles) : 0;
  *hi = bwd_tiles_seen(a, s, (c + 1) * s.chunk - 1);
  if (*hi < *lo) *hi = *lo;
}

__device__ __forceinline__ int bwd_items(const rgk_attn &a, const bwd_seq &s) {
  int n = 0, lo, hi;
  for (int c = 0; c < s.chunks; c++) {
    bwd_chunk_tiles(a, s, c, &lo, &hi);
    n += hi - lo;
  }
  return n;
}

/* The first and the last query of the sequence that see any of a tile's keys; false: none does. */
__device__ __forceinline__ bool bwd_seen_by(const rgk_attn &a, const bwd_seq &s, int tile,
                                            int64_t *first, int64_t *last) {
  const int64_t k0 = (int64_t)tile * s.tile, k1 = min(k0 + s.tile, s.keys) - 1;
  *first = max((int64_t)0, bwd_from(a, k0) - s.offset), *last = s.length - 1;
  if (bwd_windowed(a)) *last = min(*last, k1 + a.window_left - s.offset);
  return *first <= *last;
}

struct bwd_item {
  bwd_seq s;
  int b, kh, chunk, tile;
  int turn, turns; /* this chunk's place among those that see the tile; turns 0: nothing sees it */
  int m0, m1;      /* tiles of queries [m0, m1); none: nothing to do unless turns == 0 */
};

/* Items go chunk by chunk, in each chunk from the last key tile to the first: item (c, t) waits
 * only for (c, t + 1) and (c - 1, t), which have earlier numbers. */
__device__ __forceinline__ bool bwd_find_item(const rgk_flash_bwd &p, uint32_t ticket,
                                              bwd_item *x) {
  const int n = p.a.seqs.n;
  const uint32_t all = n > 0 ? (uint32_t)p.items[n] : 0;
  if (ticket >= all * (uint32_t)p.kh_n) return false;
  x->kh = p.kh0 + (int)(ticket % p.kh_n);
  int w = (int)(ticket / p.kh_n);
  int lo = 0, hi = n - 1; /* the last b with items[b] <= w */
  while (lo < hi) {
    int mid = (lo + hi + 1) >> 1;
    if (p.items[mid] <= w)
      lo = mid;
    else
      hi = mid - 1;
  }
  x->b = lo;
  w -= p.items[lo];
  const bwd_seq s = bwd_sequence(p, lo);
  x->s = s;
  int c = 0;
  for (;; c++) {
    bwd_chunk_tiles(p.a, s, c, &lo, &hi);
    if (w < hi - lo || c == s.chunks - 1) break;
    w -= hi - lo;
  }
  x->chunk = c;
  x->tile = hi - 1 - w;
  int64_t first, last;
  x->turns = x->turn = x->m0 = x->m1 = 0;
  if (!bwd_seen_by(p.a, s, x->tile, &first, &last)) return true;
  x->turn = c - (int)(first / s.chunk);
  x->turns = (int)(last / s.chunk) - (int)(first / s.chunk) + 1;
  first = max(first, c * s.chunk);
  last = min(last, (c + 1) * s.chunk - 1);
  if (first > last) return true;
  x->m0 = (int)(first / RGK_FLASH_BWD_ROWS);
  x->m1 = (int)(last / RGK_FLASH_BWD_ROWS) + 1;
  return true;
}

} // namespace rgk
