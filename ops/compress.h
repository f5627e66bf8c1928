/* ops/compress.h: what the two directions of compress_kv share whatever device runs them:
 * attributes, checks, cost. */
#ifndef RGI_COMPRESS_H
#define RGI_COMPRESS_H

#include "../kernels/kernels.h"
#include "ops.h"

enum { RGI_CMP_KERNEL, RGI_CMP_STRIDE, RGI_CMP_K_METHOD, RGI_CMP_V_METHOD, RGI_CMP_NATTR };
extern const rg_attr rgi_compress_attrs[RGI_CMP_NATTR];

typedef enum rgi_compress_method {
  RGI_MEAN,
  RGI_LINEAR,
  RGI_SWIGLU,
  RGI_SIGMOID_MUL
} rgi_compress_method;

/* Of keys (side 0) or values (1). */
static inline rgi_compress_method rgi_compress_method_of(const rg_call *c, int side) {
  return (rgi_compress_method)c->attr[RGI_CMP_K_METHOD + side].i;
}
static inline bool rgi_compress_learned(const rg_call *c, int side) {
  return rgi_compress_method_of(c, side) != RGI_MEAN;
}
static inline bool rgi_compress_gated(rgi_compress_method m) {
  return m == RGI_SWIGLU || m == RGI_SIGMOID_MUL;
}

/* Checks of one side's weight; shared by both directions. */
rg_status rgi_compress_check(const rg_call *c, rg_error *e, const rg_arg *k, const rg_arg *v,
                             const rg_arg *k_weight, const rg_arg *v_weight);

/* Multiply-adds, counted two each, of one pass over x: sums for the mean, the product with W
 * otherwise. */
double rgi_compress_flops(const rg_call *c, const rg_arg *x, rgi_compress_method method);
/* Exponentials of one pass. */
double rgi_compress_exps(const rg_call *c, const rg_arg *x, rgi_compress_method method);

#endif
