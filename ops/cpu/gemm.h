/* ops/cpu/gemm.h: a small single-threaded fp32 matrix product over operands of any storage type,
 * strided or gathered.
 *
 *     C[m, n]  =  Σ_k A(m, k) · B(n, k)      or added to what is in C
 *
 * Promise: an element of C is summed in the order of k, in chunks of RGI_GEMM_KC that are added to
 * C one after another. So its bits depend on its own row of A and of B (and the CPU level), never
 * on where a tile begins or how large it is: callers may cut C among threads as they like.
 */
#ifndef RGI_CPU_GEMM_H
#define RGI_CPU_GEMM_H

#include "../ops.h"

#define RGI_GEMM_MC 192 /* rows of A packed at a time */
#define RGI_GEMM_NC 512 /* rows of B packed at a time */
#define RGI_GEMM_KC 256 /* terms summed before C is touched */
#define RGI_GEMM_NR 32  /* widest panel of B over all CPU levels */

/* A matrix as rows in memory. */
typedef struct rgi_mat {
  const void *data;
  rg_dtype type;
  int64_t stride;     /* elements from row to row */
  const int32_t *row; /* NULL, or: row i is stored at row[i] */
  /* 0: a row is contiguous. Else column c lies at (c / part) * part_stride + c % part */
  int64_t part;
  int64_t part_stride;
  int64_t row0, col0; /* where the operand starts in the matrix */
  bool k_rows;        /* false: rows are m (or n), columns k; true: rows are k, columns m (or n) */
} rgi_mat;

/* Bytes of scratch a call of rgi_gemm needs; `work` must be 64-aligned. */
#define RGI_GEMM_WORK \
  RGI_ROUND256((size_t)RGI_GEMM_KC *(RGI_GEMM_MC + RGI_GEMM_NC + RGI_GEMM_NR) * 4)

/* c: [m, n] f32, row stride ldc. add: C += A·B; otherwise C = A·B. */
void rgi_gemm(int isa, void *work, int64_t m, int64_t n, int64_t k, const rgi_mat *a,
              const rgi_mat *b, float *c, int64_t ldc, bool add);

/* A matrix [m, n] cut into tiles for the threads of a call: large enough to be
 * fast, small enough to go round. */
typedef struct rgi_tiling {
  int64_t m, n;          /* tile sizes; m <= RGI_GEMM_MC, n <= RGI_GEMM_NC */
  int64_t across, count; /* tiles per row of tiles; in all */
} rgi_tiling;
rgi_tiling rgi_gemm_tiling(int64_t m, int64_t n, int threads);

#endif
