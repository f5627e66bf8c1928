/* kernels/attn/select.cuh: what the kernels over selected blocks share: an item's keys, the table
   of a tile's rows, and gathering rows into swizzled panels.

     tile t of an item   rows 64 t … of its list, a row being (query r / G, head r % G of the group)
     row table           made ahead by one thread a row, from list entries fetched a tile earlier
     gathering           cp.async, a tile ahead; in forward rows that do not exist become zeros,
                         in backward they repeat one that does
 */
#pragma once
#include "select.h"
#include "../device/element.cuh"
#include "../device/ptx.cuh"
#include "../device/seq.cuh"
#include "../device/softmax.cuh"
#include "../device/wgmma.cuh"

namespace rgk {

/* 16 bytes, 8 elements of 2, also where they do not start on 16 bytes; zeros where !real. */
__device__ __forceinline__ void copy_chunk(uint32_t to, const uint16_t *from, bool real,
                                           bool aligned) {
  if (aligned) {
    copy16(to, from, real);
    return;
  }
  uint32_t x[4] = {};
  if (real)
    for (int i = 0; i < 4; i++) x[i] = from[2 * i] | (uint32_t)from[2 * i + 1] << 16;
  put16(to, x);
}

/* Where 16-byte chunk c of row r of a tile of `rows` rows lies. */
template <int rows> __device__ __forceinline__ uint32_t chunk_at(int r, int c) {
  return (uint32_t)((c >> 3) * (rows * 128) + r * 128 + (((c & 7) ^ (r & 7)) << 4));
}

/* The keys of an item. */
struct select_keys {
  int b;              /* sequence; kseqs.n: dead rows */
  int64_t row, first; /* of the first key: row of k and v, position in the sequence */
  int n;              /* that exist */
};
__device__ __forceinline__ select_keys find_keys(const rgk_select &p, int64_t slot, int part) {
  tile t = find_tile(p.a.kseqs, slot, p.a.block);
  select_keys k;
  k.b = t.b;
  k.first = t.first + part * RGK_SELECT_KEYS;
  k.row = t.begin + k.first;
  int n = t.n - part * RGK_SELECT_KEYS;
  k.n = n < 0 ? 0 : n < RGK_SELECT_KEYS ? n : RGK_SELECT_KEYS;
  return k;
}

/* Keys of head h into a tile of 64 rows, zeros past the last; by `threads` threads, t of them. */
template <int W, int threads>
__device__ __forceinline__ void load_keys(uint32_t to, const rgk_tensor &x, const select_keys &k,
                                          int h, bool aligned, int t) {
  const uint16_t *from = (const uint16_t *)x.data + k.row * x.row + h * x.head;
#pragma unroll
  for (int i = t; i < 64 * W / 8; i += threads) {
    const int r = i / (W / 8), c = i % (W / 8);
    const bool real = r < k.n;
    copy_chunk(to + chunk_at<64>(r, c), from + (real ? r * x.row + c * 8 : 0), real, aligned);
  }
}

/* Rows of a tile of forward. */
template <int rows> struct row_table {
  /* elements into q, -1: no such row; into the partial store, in rows of it */
  int64_t q[rows], at[rows];
  int limit[rows]; /* keys of the item that the row sees */
};

/* Walks an item's list for one row of each tile. */
template <int rows> struct row_walk {
  const int32_t *list;
  const uint16_t *places;
  int64_t first; /* row at the position of the item's first key */
  int e, g_next, G, head, n, count;
  int row, place, g; /* fetched; row -1: there is none */

  __device__ __forceinline__ row_walk(const rgk_select &p, const rgk_select_item &item,
                                      const select_keys &k, int kh) {
    const int64_t base = kh * p.a.T * p.a.N + item.first;
    list = p.csr.rows + base;
    places = p.csr.places + base;
    first = k.first +
            (k.b < p.a.seqs.n ? seq_start(p.a.seqs, k.b) - (p.a.offset ? p.a.offset[k.b] : 0) : 0);
    G = p.a.G;
    e = threadIdx.x % rows / G;
    g_next = threadIdx.x % rows - e * G;
    head = kh * G;
    n = k.n;
    count = item.count;
  }
  __device__ __forceinline__ void fetch(const rgk_select &p) {
    g = g_next;
    row = -1;
    if (e < count) {
      row = list[e];
      place = places[e];
    }
    e += p.along;
    g_next += p.across;
    if (g_next >= G) g_next -= G, e++;
  }
  __device__ __forceinline__ int limit() const {
    const int64_t seen = row - first + 1;
    return seen < n ? (seen < 0 ? 0 : (int)seen) : n;
  }
};

/* Gathers 16-byte chunks of rows at offsets off[] (elements) of x. */
template <int rows, int W, int threads>
__device__ __forceinline__ void gather(uint32_t to, const void *x, const int64_t *off,
                                       bool aligned) {
#pragma unroll
  for (int i = threadIdx.x; i < rows * W / 8; i += threads) {
    const int r = i / (W / 8), c = i % (W / 8);
    const int64_t at = off[r];
    copy_chunk(to + chunk_at<rows>(r, c), (const uint16_t *)x + (at < 0 ? 0 : at + c * 8), at >= 0,
               aligned);
  }
}

/* d = A B^T over W columns: A a tile of 64 rows, B one of N rows. */
template <class T, int N, int W>
__device__ __forceinline__ void product_rows(float (&d)[N / 2], uint32_t a, uint32_t b) {
  const uint64_t x = desc_k(a), y = desc_k(b);
#pragma unroll
  for (int k = 0; k < W / 16; k++)
    wgmma<T, N>::ss(d, desc_on(x, (k / 4) * 8192 + (k % 4) * 32),
                    desc_on(y, (k / 4) * (N * 128) + (k % 4) * 32), k > 0);
}
/* d += A B: A in registers, 64 rows of K columns; B a tile of K rows, N of its columns. */
template <class T, int N, int K>
__device__ __forceinline__ void product_columns(float (&d)[N / 2], const uint32_t (&a)[K / 4],
                                                uint32_t b, bool add) {
  const uint64_t y = desc_mn(b, K * 128);
#pragma unroll
  for (int k = 0; k < K / 16; k++)
    wgmma<T, N>::template rs<true>(d, a + 4 * k, desc_on(y, 2048 * k), add || k > 0);
}

template <class T, int n>
__device__ __forceinline__ void pack_all(uint32_t (&a)[n], const float (&x)[2 * n]) {
#pragma unroll
  for (int i = 0; i < n; i++) a[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
}

/* ---- merging partials ---- */

/* A row of the pack as those who merge see it. */
struct merged_row {
  int64_t keys; /* it sees of its sequence */
  bool live;
  const int32_t *idx;
};
__device__ __forceinline__ merged_row find_merged(const rgk_select &p, int64_t row, int kh) {
  merged_row x = {0, false, nullptr};
  const int b = find_seq(p.a.seqs, row);
  if (b >= p.a.seqs.n) return x;
  const int64_t n = seq_start(p.a.kseqs, b + 1) - seq_start(p.a.kseqs, b);
  const int64_t seen = row - seq_start(p.a.seqs, b) + (p.a.offset ? p.a.offset[b] : 0) + 1;
  x.keys = seen < n ? seen : n;
  x.live = true;
  x.idx = (const int32_t *)p.a.idx.data + row * p.a.idx.row + kh * p.a.idx.head;
  return x;
}

} // namespace rgk

/* Types and widths there are instances of: X(dtype, D, E). */
#ifdef RGK_DEV
#define RGK_SELECT_WIDE(X)
#else
#define RGK_SELECT_WIDE(X) \
  X(RG_F16, 128, 128)      \
  X(RG_BF16, 96, 96)       \
  X(RG_F16, 96, 96)        \
  X(RG_BF16, 192, 128)     \
  X(RG_F16, 192, 128)      \
  X(RG_BF16, 256, 256)     \
  X(RG_F16, 256, 256)
#endif
#define RGK_SELECT_INSTANCES(X) \
  X(RG_BF16, 128, 128) X(RG_BF16, 64, 64) X(RG_F16, 64, 64) RGK_SELECT_WIDE(X)
