/* kernels/gemm.h: matrix products that gather their rows, and the sums that go with them.

   One struct describes three products. h is a head, p a part of a long row, valid(r, p) says
   whether row r has part p; what is not valid counts as zero and is never read.

     RGK_FORWARD   C[r, h, n] = Σ_p Σ_q  A[row r, h, p, q] · B[n, p·part + q]
     RGK_BACKWARD  C[r, h, n] = Σ_p Σ_q  A[row r, h, p, q] · B[q, p, n]
     RGK_SUM       C[i, n]    = Σ_r      A[r, h, i] · B[row r, h, n / part, n % part]

   A[r, h, p, q] lies at a + row·lda + h·a_head + p·a_part + q, and likewise B where it has those
   indices. With kernel·D as depth, part D and a_part the stride of a token, A's rows are blocks of
   tokens that were never copied together; with part the rows of W and a_part minus one row, they
   are the R blocks that hold a token.

   The sum over the depth runs in order, whatever the tile a row falls into: a row's result does not
   depend on its place. Which kernel runs follows from types and GPU alone, so strides and addresses
   change no bit.
 */
#ifndef RGK_GEMM_H
#define RGK_GEMM_H

#include "kernels.h"

enum { RGK_FORWARD, RGK_BACKWARD, RGK_SUM };
enum { RGK_STORE, RGK_SWIGLU, RGK_SIGMOID_MUL, RGK_SWIGLU_BWD, RGK_SIGMOID_MUL_BWD };

/* Where row r comes from and goes. Parts [lo, hi) are valid. */
typedef struct rgk_gemm_row {
  int32_t row;    /* of A (RGK_SUM: of B); −1: dead, its result is zero */
  int32_t lo, hi; /* valid parts */
  /* columns [q·c_part, (q+1)·c_part) of the result are row crow + q of C, if q < cn */
  int32_t crow, cn;
} rgk_gemm_row;

typedef struct rgk_gemm {
  int32_t mode, dtype, c_dtype; /* dtype: of a, b, bias, up */
  int32_t gate;                 /* what is done to the product; see below */
  /* rows without heads; RGK_SUM: C is [m, n], the sum runs over k rows */
  int64_t m, n, k;
  int32_t heads, part;
  const void *a, *b;
  int64_t lda, a_head, a_part, ldb, b_head, b_part;
  void *c;
  int64_t ldc, c_head, c_part;
  const void *bias;          /* [n] or NULL */
  bool add;                  /* onto the fp32 sum that is there; dead rows stay */
  bool va, vb, vc;           /* moves of 16 bytes are legal */
  const rgk_gemm_row *table; /* [m], RGK_SUM: [k]; NULL: row r is row r */
  const int32_t *live;       /* rows from *live / live_div on are dead; NULL: none */
  int32_t live_div;
  /* Gates: the product is (a, b) = columns (i, half + i), n = 2·half. Forward C = act(a)·b [..,
   * half]; backward reads up, the gradient of that, and writes the gradients of a and b. */
  int64_t half;
  const void *up;
  int64_t up_row, up_head;
  bool vu;
  /* RGK_SUM: rows in `split` chunks of `chunk`, each head and chunk to a [m, n] of its own, c_split
   * apart */
  int32_t split;
  int64_t chunk, c_split;
  uint32_t tiles_m, tiles_n;
} rgk_gemm;

enum { RGK_GEMM_THREADS = 256, RGK_GEMM_M = 128, RGK_PLAIN_N = 128 };
/* Tiles are RGK_GEMM_M by RGK_PLAIN_N, or by `width` (128 or 256) with wgmma. */
RGK_GETTER(rgk_gemm_plain(rg_dtype t))
/* 16-bit types. `any` takes what does not move 16 bytes at a time, in tiles of 128, with the same
 * results. */
RGK_GETTER(rgk_gemm_wgmma(rg_dtype t, int mode, int width, bool any))
/* Does a call move single elements? Where 16 bytes can't be moved, or parts are shorter than a step
 * through them. */
RGK_BOTH bool rgk_gemm_any(const rgk_gemm *p) {
  return !p->va || !p->vb || (p->mode == RGK_BACKWARD && p->part < 64 && p->part < p->k);
}
enum { RGK_PLAIN_SHARED = RGK_GEMM_M * (RGK_PLAIN_N + 4) * 4 };
static inline uint32_t rgk_gemm_stages(int mode, int width) {
  return width == 256 ? 4 : mode == RGK_BACKWARD ? 3 : 6;
}
static inline uint32_t rgk_gemm_shared(int mode, int width) {
  return rgk_gemm_stages(mode, width) * (uint32_t)(RGK_GEMM_M + width) * 128 + 1024;
}

/* The same by mma.sync, in square tiles: large ones, or small ones that take any addresses. The
 * result does not depend on which. */
RGK_GETTER(rgk_gemm_mma_bf16(int mode, bool large))
RGK_GETTER(rgk_gemm_mma_f16(int mode, bool large))
/* Two blocks fit in 100 KB: three stages, and a KiB that says where rows are. */
enum { RGK_GEMM_MMA_THREADS = 128, RGK_GEMM_MMA_STAGES = 3, RGK_GEMM_MMA_SHARED = 49 << 10 };
RGK_BOTH int32_t rgk_gemm_mma_tile(bool large) {
  return large ? 128 : 64;
}

/* to[i, j] = from[i, j] + Σ_heads (last to first) Σ_split partial[head][split][i, j]. */
typedef struct rgk_reduce {
  const float *partial; /* [heads, split, m, n] */
  int32_t heads, split;
  int64_t m, n;
  const float *from; /* or NULL: begin with the last head's */
  int64_t from_row;
  void *to;
  int64_t to_row;
  int32_t dtype, zero;
} rgk_reduce;
RGK_GETTER(rgk_reduce_partials(void))

/* partial[s][n] = Σ x[t, n] over the live rows t of chunk s. Blocks of 32 columns by 8 rows. */
typedef struct rgk_column_sums {
  const void *x;
  int32_t dtype, zero;
  int64_t ldx, rows, n, chunk;
  const int32_t *live;
  float *partial;
} rgk_column_sums;
RGK_GETTER(rgk_sum_columns(void))

/* Rows of x [rows, n] from *live on := 0. */
typedef struct rgk_zero_tail {
  void *x;
  int32_t dtype, zero;
  int64_t ldx, rows, n;
  const int32_t *live;
} rgk_zero_tail;
RGK_GETTER(rgk_zero_dead_rows(void))

#endif
