/* device/mma.cuh: the matrix product of every GPU since Ampere, of one warp: D [16, 8] f32 +=
   A [16, 16] B [16, 8], bf16 or f16, and shared memory laid out for it. (compute_80; what Hopper
   alone has is in wgmma.cuh.)

   Lane l = 4g + t of the warp, g = l / 4, t = l % 4, holds

       A: four words of two elements        B: two words             D: four floats

               k  2t 2t+1   2t+8 2t+9           n = g                   n  2t   2t+1
         row g     a[0]       a[2]       k 2t, 2t+1   b[0]        row g    d[0]  d[1]
         row g+8   a[1]       a[3]       k 2t+8, +9   b[1]        row g+8  d[2]  d[3]

   N columns are N / 8 products side by side: d[4j …] has columns 8j …, as wgmma's D has them for
   one warp (`each` of wgmma.cuh). So the accumulators of columns 16k … 16k + 15 of one product,
   packed in pairs in their order, are the A of step k of the next: pack_a.

   Tiles in shared memory are rows of W elements (a multiple of 32), with no padding: 16 bytes
   ("chunk") c of row r stand in place c ^ r % 8 of the row (W an odd multiple of 32: the rows
   themselves are half a line apart, so c ^ r / 2 % 4), which puts chunk c of any eight neighbouring
   rows in different banks. A tile starts on 128 bytes (of an odd multiple of 32: 64).

       W = 64, row 0 |0|1|2|3|4|5|6|7|      W = 96, row 0 |0|1|2|3|4|5|6|7|8|9|a|b|
               row 1 |1|0|3|2|5|4|7|6|              row 1 |0|1|2|3| …
               row 2 |2|3|0|1|6|7|4|5|              row 2 |1|0|3|2| …

   Fragments come by ldmatrix, 16 x 16 elements a time. Whose rows in shared memory are

       M, with k along them   A = Q of Q K^T           mma_at_rows    load_matrices     a[0 … 3]
       k, with N along them   B = V of P V             mma_at_rows    load_transposed   two B
       N, with k along them   B = K of Q K^T           mma_at_columns load_matrices     two B
       k, with M along them   A = dS^T, stored as dS   mma_at_columns load_transposed   a[0 … 3]

   mma_at_…(tile) is the lane's address of the first 16 x 16; on<W>(it, c) is the same c chunks
   further along the row (c even, known to the compiler), + 16 * pitch(W) sixteen rows further down.
   "Two B" are b[0 … 1] of the first 8 columns and b[2 … 3] of the next.

   Copies are cp.async (ptx.cuh): copy16(to, from, real) writes zeros where !real, copies_commit()
   ends a group, copies_wait<n>() leaves n groups under way; then __syncthreads() shows them to
   others. Before a buffer is filled again: __syncthreads() after the last reads.
 */
#pragma once
#include "chunk.cuh"
#include "ptx.cuh"

namespace rgk {

/* ---- tiles ---- */

/* Bytes of a row. */
constexpr __host__ __device__ uint32_t pitch(int W) {
  return (uint32_t)W * 2;
}
/* Bits of a chunk's byte offset that a row's number turns over. */
constexpr __host__ __device__ uint32_t turned(int W) {
  return W % 64 ? 0x30u : 0x70u;
}
/* The bits it turns over in row `row`. */
template <int W> __device__ __forceinline__ uint32_t turn(int row) {
  return (uint32_t)(W % 64 ? row / 2 % 4 : row % 8) * 16;
}
/* Offset of chunk `chunk` of row `row`. */
template <int W> __device__ __forceinline__ uint32_t place(int row, int chunk) {
  return (uint32_t)row * pitch(W) + (((uint32_t)chunk * 16) ^ turn<W>(row));
}
/* From an address of an even chunk 0 or 1 (below: of a lane) to that `chunks` further, an even
 * number. */
template <int W> __device__ __forceinline__ uint32_t on(uint32_t at, int chunks) {
  const uint32_t bytes = (uint32_t)chunks * 16;
  return (at ^ (bytes & turned(W))) + (bytes & ~turned(W));
}

/* Copies rows [0, ROWS) of a tile, by THREADS threads of which this is number `thread`: row r from
 * from(r), a pointer to its first element, NULL for zeros; columns from `width` (a multiple of 8)
 * on are zeros. `some`: any address that may be read. The caller commits. */
template <int W, int ROWS, int THREADS, class From>
__device__ __forceinline__ void copy_rows(uint32_t to, int thread, int width, const void *some,
                                          From from) {
  /* chunks of a row, and rows, at a time */
  constexpr int CHUNKS = W % 64 ? 4 : 8, STEP = THREADS / CHUNKS;
  static_assert(STEP % 8 == 0 || (STEP == 4 && W % 64 == 0), "rows of a thread turn as it says");
  const int c = thread % CHUNKS, r0 = thread / CHUNKS;
  const uint32_t at = to + place<W>(r0, c);
#pragma unroll
  for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++) {
    const int r = r0 + i * STEP;
    if (ROWS % STEP == 0 || r < ROWS) {
      const char *const row = (const char *)from(r);
      const uint32_t here = (at ^ (uint32_t)(i * STEP % 8 * 16)) + i * STEP * pitch(W);
#pragma unroll
      for (int g = 0; g < W / 8 / CHUNKS; g++) {
        const bool real = row && (g * CHUNKS + c) * 8 < width;
        copy16(here + g * CHUNKS * 16, real ? row + (g * CHUNKS + c) * 16 : (const char *)some,
               real);
      }
    }
  }
}

/* ---- fragments ---- */

template <int W>
__device__ __forceinline__ uint32_t mma_at_rows(uint32_t tile, int lane = (int)threadIdx.x % 32) {
  return tile + place<W>(lane % 16, lane / 16);
}
template <int W>
__device__ __forceinline__ uint32_t mma_at_columns(uint32_t tile,
                                                   int lane = (int)threadIdx.x % 32) {
  return tile + place<W>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
/* load_matrices with each 8 x 8 transposed: lane l has rows 2(l % 4) and + 1 of column l / 4. */
__device__ __forceinline__ void load_transposed(uint32_t at, uint32_t *x) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
/* Two accumulators of a lane, columns `column` (even) and the next of row `row` of a tile; stmatrix
 * is Hopper's. No two lanes of a warp meet in a bank. */
template <int W>
__device__ __forceinline__ void put_pair(uint32_t tile, int row, int column, uint32_t x) {
  const uint32_t at = tile + place<W>(row, column / 8) + column % 8 * 2;
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
/* Accumulators of columns 16k … 16k + 15 as the A of step k. */
template <class T> __device__ __forceinline__ void pack_a(uint32_t *a, const float *d) {
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = pack(d[2 * i], d[2 * i + 1], T());
}

/* ---- products ---- */

/* d += a b */
template <class T>
__device__ __forceinline__ void mma(float *d, const uint32_t *a, const uint32_t *b) {
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* d [16, N] += a [16, 16] of one step of k, times B whose rows in shared memory (W wide) are
 *   N: `b` = on<W>(mma_at_columns<W>(tile), 2 * step);  every 16 columns are 16 rows further down
 *   k: `b` = mma_at_rows<W>(tile) + 16 * step * pitch(W);  every 16 columns are two chunks on */
template <class T, int W, int n>
__device__ __forceinline__ void mma_by_rows(float (&d)[n], const uint32_t *a, uint32_t b) {
#pragma unroll
  for (int j = 0; j < n / 8; j++) {
    uint32_t x[4];
    load_matrices(b + j * 16 * pitch(W), x);
    mma<T>(d + 8 * j, a, x);
    mma<T>(d + 8 * j + 4, a, x + 2);
  }
}
template <class T, int W, int n>
__device__ __forceinline__ void mma_by_columns(float (&d)[n], const uint32_t *a, uint32_t b) {
#pragma unroll
  for (int j = 0; j < n / 8; j++) {
    uint32_t x[4];
    load_transposed(on<W>(b, 2 * j), x);
    mma<T>(d + 8 * j, a, x);
    mma<T>(d + 8 * j + 4, a, x + 2);
  }
}

} // namespace rgk
