/* ops/cuda/gemm.h: products on a GPU: which kernel takes one, its grid, and sums cut into
 * chunks. */
#ifndef RGI_CUDA_GEMM_H
#define RGI_CUDA_GEMM_H

#include "../../kernels/gemm.h"
#include "../ops.h"

/* "wgmma", "mma: not Hopper" or "plain: …": from the type and the GPU alone, so that strides and
 * alignment change no bit. */
const char *rgi_gemm_path(rg_dtype t, const rg_gpu *gpu);

/* May a [.., width] tensor whose rows and heads lie that far apart be moved 16 bytes at a time? */
bool rgi_gemm_vec(const rg_arg *a, int64_t width);

/* RGK_FORWARD and RGK_BACKWARD: sets `heads`, c_part, live_div and split where they are 0, and
 * launches. */
rg_status rgi_cuda_gemm(rg_cuda *x, const rg_gpu *gpu, rgk_gemm *p);

/* RGK_SUM over `heads` heads, last to first, of C [m, n] onto `from` (fp32, may be `to`; NULL:
 * nothing). Work is rgi_gemm_sum_bytes long. How rows are cut into chunks depends on m, n and k,
 * never on the heads. */
typedef struct rgi_gemm_sum {
  rgk_gemm p; /* c and what belongs to it is filled in */
  int64_t heads;
  const rg_arg *from, *to; /* [m, n] */
} rgi_gemm_sum;
size_t rgi_gemm_sum_bytes(int64_t m, int64_t n, int64_t k, int64_t heads, rg_dtype to,
                          const rg_gpu *gpu);
rg_status rgi_gemm_sum_steps(rg_cuda *x, const rg_gpu *gpu, rgi_gemm_sum *s, void *work);

/* to [n] = what is there (add) + Σ over the live rows of x [rows, n]. */
size_t rgi_column_sums_bytes(int64_t n);
rg_status rgi_column_sums(rg_cuda *x, const rg_arg *from, const int32_t *live, const rg_arg *to,
                          bool add, void *work);
rg_status rgi_gemm_reduce(rg_cuda *x, rgk_reduce *r);

#endif
