/* ops/cpu/compress.h: what the two directions of compress_kv share on the CPU: block tables, and
 * blocks as rows of a matrix. */
#ifndef RGI_CPU_COMPRESS_H
#define RGI_CPU_COMPRESS_H

#include "../compress.h"
#include "gemm.h"
#include "rows.h"

/* Lists all blocks of the pack in order: token[n] is where a block begins, row[n] (ascending) where
 * its output goes. Returns n <= T / stride. */
int64_t rgi_compress_blocks(const int32_t *cu, int64_t nseq, int64_t kernel, int64_t stride,
                            int32_t *token, int32_t *row);

/* Rows of W·flatten a task takes: enough tasks for the threads, else large. */
static inline int64_t rgi_compress_tile(int64_t rows, int64_t heads, int threads) {
  int64_t tile = RGI_GEMM_MC;
  while (tile > 48 && (rows + tile - 1) / tile * heads < 2 * (int64_t)threads) tile /= 2;
  return tile;
}

/* The mean of the block that starts at `token`, of features [d, d + width) of one head (width at
 * most RGI_PIECE): summed chunk by chunk of `stride` tokens, then over chunks. */
void rgi_compress_mean(const rg_call *c, const rg_arg *x, int64_t token, int64_t head, int64_t d,
                       int64_t width, float *sum);
/* a [d], b [d] behind it, halves of W·flatten: a := what the method makes of both; linear: a. */
void rgi_compress_gate(rgi_compress_method method, float *a, int64_t d);

/* The blocks of one head as rows of kernel·D elements: a view into x [T, KH, D]. */
static inline rgi_mat rgi_compress_flatten(const rg_arg *x, int64_t head, const int32_t *token) {
  return (rgi_mat){.data = (const char *)x->data +
                           head * x->stride[1] * (int64_t)rg_dtype_size(x->dtype),
                   .type = x->dtype,
                   .stride = x->stride[0],
                   .row = token,
                   .part = x->dim[2],
                   .part_stride = x->stride[0]};
}

#endif
