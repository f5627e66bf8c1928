/* ops/cpu/compress.h: what the two directions of compress_kv share: attributes, block
 * tables, the gate's mathematics. */
#ifndef RGI_CPU_COMPRESS_H
#define RGI_CPU_COMPRESS_H

#include "gemm.h"
#include "rows.h"

enum { RGI_CMP_KERNEL, RGI_CMP_STRIDE, RGI_CMP_K_METHOD, RGI_CMP_V_METHOD, RGI_CMP_NATTR };
extern const rg_attr rgi_compress_attrs[RGI_CMP_NATTR];

typedef enum rgi_compress_method { RGI_MEAN, RGI_LINEAR, RGI_SWIGLU, RGI_SIGMOID_MUL } rgi_compress_method;

static inline bool rgi_compress_gated(rgi_compress_method m) {
  return m == RGI_SWIGLU || m == RGI_SIGMOID_MUL;
}

static inline int64_t rgi_compress_count(int64_t length, int64_t kernel, int64_t stride) {
  return length < kernel ? 0 : (length - kernel) / stride + 1;
}

/* Lists all blocks of the pack in order: token[n] is where a block begins, row[n] (ascending) where its
 * output goes. Returns n <= T / stride. */
int64_t rgi_compress_blocks(const int32_t *cu, int64_t nseq, int64_t kernel, int64_t stride, int32_t *token,
                            int32_t *row);

/* Checks of one side's weight; shared by both directions. */
rg_status rgi_compress_check(const rg_call *c, rg_error *e, const rg_arg *k, const rg_arg *v,
                             const rg_arg *k_weight, const rg_arg *v_weight);

/* Multiply-adds, counted two each, of one pass over x: sums for the mean, the product with W otherwise. */
double rgi_compress_flops(const rg_call *c, const rg_arg *x, rgi_compress_method method);
/* Exponentials of one pass. */
double rgi_compress_exps(const rg_call *c, const rg_arg *x, rgi_compress_method method);

/* Rows of W·flatten a task takes: enough tasks for the threads, else large. */
static inline int64_t rgi_compress_tile(int64_t rows, int64_t heads, int threads) {
  int64_t tile = RGI_GEMM_MC;
  while (tile > 48 && (rows + tile - 1) / tile * heads < 2 * (int64_t)threads) tile /= 2;
  return tile;
}

/* The blocks of one head as rows of kernel·D elements: a view into x [T, KH, D]. */
static inline rgi_mat rgi_compress_flatten(const rg_arg *x, int64_t head, const int32_t *token) {
  return (rgi_mat){.data = (const char *)x->data + head * x->stride[1] * (int64_t)rg_dtype_size(x->dtype),
                   .type = x->dtype,
                   .stride = x->stride[0],
                   .row = token,
                   .part = x->dim[2],
                   .part_stride = x->stride[0]};
}

#endif
