/* kernels/gemm_fill.cuh: how tiles of A and B come into shared memory, for the products of gemm.h
   on tensor cores, 16-bit types.

   Both operands are kept the way memory holds them, rows whose 16-byte pieces are swapped by the
   row's number, as device/mma.cuh has them (for rows of 128 bytes that is wgmma's swizzle, too):
       depth along memory   row = a row of the tile, DEPTH deep           A forward, backward;
                                                                          B forward
       depth across memory  row = a depth, 64 columns; panels of 64       A, B of sums; B backward
                            columns side by side

   All threads fill a stage, A and then B, with cp.async, which zeroes what is not valid by itself
   and takes any gather of 16-byte pieces; where addresses do not allow that (gemm_load_any), pieces
   are put together from single elements, and the products stay the same bit for bit.

   A tile S is S::M x S::N of C, S::DEPTH a stage, by S::THREADS threads.
 */
#pragma once
#include "gemm.cuh"
#include "device/mma.cuh"

namespace rgk {

template <class S> constexpr uint32_t gemm_a_bytes = S::M *S::DEPTH * 2;
template <class S> constexpr uint32_t gemm_bytes = (S::M + S::N) * S::DEPTH * 2;
template <class S> constexpr uint32_t gemm_panel = S::DEPTH * 128;

/* Depth along memory: this thread's pieces are of depth 8·along, of rows along_row, + ROWS … */
template <class S> struct gemm_along {
  enum { PIECES = S::DEPTH / 8, ROWS = S::THREADS / PIECES };
  static __device__ __forceinline__ int piece() { return threadIdx.x & (PIECES - 1); }
  static __device__ __forceinline__ int row() { return threadIdx.x / PIECES; }
  static __device__ __forceinline__ uint32_t at(int row) { return place<S::DEPTH>(row, piece()); }
};
/* Depth across memory, W columns: this thread's pieces have columns 8·piece … and depths deep,
 * deep + STEP … */
template <class S, int W> struct gemm_across {
  enum { PIECES = W / 8, STEP = S::THREADS / PIECES };
  static __device__ __forceinline__ int piece() { return threadIdx.x & (PIECES - 1); }
  static __device__ __forceinline__ int deep() { return threadIdx.x / PIECES; }
  static __device__ __forceinline__ uint32_t at(int depth) {
    return piece() / 8 * gemm_panel<S> + place<64>(depth, piece() & 7);
  }
};

/* What fills stages. begin() once, then load() for every step in turn. Sums look their rows up in
 * `row`, which is filled a step ahead. */
template <class T, int MODE, class S> struct gemm_fill {
  enum { M = S::M, N = S::N, DEPTH = S::DEPTH };
  using along = gemm_along<S>;
  using across = gemm_across<S, N>;
  enum { ROWS = along::ROWS, STEP = across::STEP, EACH_A = M / ROWS, EACH = N / ROWS };
  static_assert(ROWS % 8 == 0 && STEP % 8 == 0 && EACH % 2 == 0, "pieces of a thread turn alike");
  const T *a[EACH_A], *b[2];
  int lo[EACH_A], hi[EACH_A];
  int64_t b_step, wrap; /* from one piece of B to the next; from a part's end to the next part */
  int k, part, in;      /* of A; k is this thread's depth */
  int bk, b_part, b_in;
  uint32_t a_at, b_at, columns; /* columns: bit j: piece j of B has a column */

  __device__ __forceinline__ void begin(const rgk_gemm &p, const gemm_row *rows, gemm_tile t) {
    k = along::piece() * 8;
    part = 0, in = k;
    while (in >= p.part) in -= p.part, part++;
    a_at = along::at(along::row());
#pragma unroll
    for (int j = 0; j < EACH_A; j++) {
      const gemm_row &r = rows[along::row() + ROWS * j];
      a[j] = (const T *)p.a + r.a;
      lo[j] = r.lo, hi[j] = r.hi;
    }
    columns = 0;
    if constexpr (MODE == RGK_FORWARD) {
      b_at = along::at(along::row());
      b_step = ROWS * p.ldb;
#pragma unroll
      for (int j = 0; j < EACH; j++)
        if (gemm_column(p, t.n, N, along::row() + ROWS * j) >= 0) columns |= 1u << j;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int64_t c = gemm_column(p, t.n, N, along::row() + i * N / 2);
        b[i] = (const T *)p.b + (c < 0 ? 0 : c) * p.ldb + k;
      }
    } else {
      const int64_t n = (int64_t)t.n * N + across::piece() * 8;
      b_at = across::at(across::deep());
      b_step = STEP * p.ldb;
      wrap = p.b_part - p.part * p.ldb;
      bk = across::deep();
      b_part = 0, b_in = bk;
      while (b_in >= p.part) b_in -= p.part, b_part++;
      columns = n < p.n;
      b[0] = (const T *)p.b + n;
    }
  }

  __device__ __forceinline__ void load(const rgk_gemm &p, uint32_t stage) {
    const int64_t off = part * p.a_part + in;
    const bool inside = k < p.k;
#pragma unroll
    for (int j = 0; j < EACH_A; j++) {
      const bool there = inside && part >= lo[j] && part < hi[j];
      copy16(stage + a_at + j * ROWS * pitch(DEPTH), there ? a[j] + off : (const T *)p.a, there);
    }
    const uint32_t to = stage + gemm_a_bytes<S> + b_at;
    if constexpr (MODE == RGK_FORWARD) {
      const T *from[2] = {b[0], b[1]};
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const bool there = inside && (columns >> j & 1);
        copy16(to + j * ROWS * pitch(DEPTH), there ? from[j / (EACH / 2)] : (const T *)p.b, there);
        from[j / (EACH / 2)] += b_step;
      }
      b[0] += DEPTH, b[1] += DEPTH;
    } else {
      const T *from = b[0] + b_in * p.ldb + b_part * p.b_part;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const bool there = columns && bk + STEP * j < p.k;
        const T *at = b_in + STEP * j < p.part ? from : from + wrap;
        copy16(to + j * STEP * 128, there ? at : (const T *)p.b, there);
        from += b_step;
      }
      bk += DEPTH, b_in += DEPTH;
      while (b_in >= p.part) b_in -= p.part, b_part++;
    }
    k += DEPTH, in += DEPTH;
    while (in >= p.part) in -= p.part, part++;
  }
};

template <class T, class S> struct gemm_fill<T, RGK_SUM, S> {
  using of_a = gemm_across<S, S::M>;
  using of_b = gemm_across<S, S::N>;
  static const int EACH_A = S::DEPTH / of_a::STEP, EACH = S::DEPTH / of_b::STEP;
  const T *a, *b;
  bool a_there, b_there;
  uint32_t a_at, b_at;

  __device__ __forceinline__ void begin(const rgk_gemm &p, gemm_tile t, int64_t head, int64_t k0) {
    const int64_t m = (int64_t)t.m * S::M + of_a::piece() * 8;
    const int64_t n = (int64_t)t.n * S::N + of_b::piece() * 8;
    a = (const T *)p.a + head * p.a_head + m + (k0 + of_a::deep()) * p.lda;
    b = (const T *)p.b + head * p.b_head + gemm_sum_column(p, n);
    a_there = m < p.m, b_there = n < p.n;
    a_at = of_a::at(of_a::deep());
    b_at = of_b::at(of_b::deep());
  }
  __device__ __forceinline__ void load(const rgk_gemm &p, uint32_t stage, const int *row) {
    const T *from = a;
#pragma unroll
    for (int j = 0; j < EACH_A; j++) {
      const bool there = a_there && row[of_a::deep() + of_a::STEP * j] >= 0;
      copy16(stage + a_at + j * of_a::STEP * 128, there ? from : (const T *)p.a, there);
      from += of_a::STEP * p.lda;
    }
    a += S::DEPTH * p.lda;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int r = row[of_b::deep() + of_b::STEP * j];
      const bool there = b_there && r >= 0;
      copy16(stage + gemm_a_bytes<S> + b_at + j * of_b::STEP * 128,
             there ? b + r * p.ldb : (const T *)p.b, there);
    }
  }
};

/* The same for any addresses: pieces are put together from elements; at(e) is where element e lies,
 * NULL: zero. */
template <class T, class F> __device__ __forceinline__ void gemm_put_piece(uint32_t to, F at) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint16_t *x = (const uint16_t *)at(2 * i), *y = (const uint16_t *)at(2 * i + 1);
    w[i] = (x ? *x : 0u) | (y ? (uint32_t)*y : 0u) << 16;
  }
  put16(to, w);
}

template <class T, int MODE, class S, class Row>
__device__ __forceinline__ void gemm_load_any(const rgk_gemm &p, const Row *rows, gemm_tile t,
                                              int64_t head, uint32_t a, int64_t k0, int64_t end) {
  using along = gemm_along<S>;
  using of_b = gemm_across<S, S::N>;
  const uint32_t b = a + gemm_a_bytes<S>;
  if constexpr (MODE == RGK_SUM) {
    using of_a = gemm_across<S, S::M>;
    const int64_t m = (int64_t)t.m * S::M + of_a::piece() * 8;
    const int64_t n = (int64_t)t.n * S::N + of_b::piece() * 8;
#pragma unroll 1
    for (int d = of_a::deep(); d < S::DEPTH; d += of_a::STEP) {
      const bool there = gemm_sum_row(p, k0 + d, end) >= 0;
      const T *row = (const T *)p.a + head * p.a_head + (k0 + d) * p.lda;
      gemm_put_piece<T>(a + of_a::at(d),
                        [&](int e) { return there && m + e < p.m ? row + m + e : nullptr; });
    }
#pragma unroll 1
    for (int d = of_b::deep(); d < S::DEPTH; d += of_b::STEP) {
      const int64_t from = gemm_sum_row(p, k0 + d, end);
      const T *row = (const T *)p.b + head * p.b_head + from * p.ldb;
      gemm_put_piece<T>(b + of_b::at(d), [&](int e) {
        return from >= 0 && n + e < p.n ? row + gemm_sum_column(p, n + e) : nullptr;
      });
    }
  } else {
    const gemm_step s = gemm_step_at(p, (int)k0);
    const int k = (int)k0 + along::piece() * 8;
#pragma unroll 1
    for (int row = along::row(); row < S::M; row += along::ROWS)
      gemm_put_piece<T>(a + along::at(row),
                        [&](int e) { return gemm_a<T>(p, rows[row], s, k + e); });
    if constexpr (MODE == RGK_FORWARD) {
#pragma unroll 1
      for (int row = along::row(); row < S::N; row += along::ROWS) {
        const int64_t c = gemm_column(p, t.n, S::N, row);
        gemm_put_piece<T>(b + along::at(row),
                          [&](int e) { return gemm_b_forward<T>(p, c, k + e); });
      }
    } else {
      const int64_t n = (int64_t)t.n * S::N + of_b::piece() * 8;
#pragma unroll 1
      for (int d = of_b::deep(); d < S::DEPTH; d += of_b::STEP)
        gemm_put_piece<T>(b + of_b::at(d),
                          [&](int e) { return gemm_b_backward<T>(p, s, (int)k0 + d, n + e); });
    }
  }
}

} // namespace rgk
