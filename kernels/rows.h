/* kernels/rows.h: elementwise ops. */
#ifndef RGK_ROWS_H
#define RGK_ROWS_H

#include "kernels.h"

/* Tensors of one shape, walked together; axes that lie densely in all of them are folded into
 * one. The tensors follow in an array that is as long as a kernel can need: a graph's node
 * takes time by the size of its struct. */
typedef struct rgk_walk {
  int32_t rank, n;          /* axes after folding (>= 1), tensors */
  int64_t dim[RG_MAX_RANK]; /* the last one is walked by consecutive threads */
  int64_t elements;
} rgk_walk;
typedef struct rgk_walked {
  void *data;
  int64_t stride[RG_MAX_RANK];
  int32_t dtype, zero;
} rgk_walked;
enum { RGK_MAP_TENSORS = 5, RGK_ADD_TENSORS = 17 };

/* What is done to each element: inputs first, then outputs. */
typedef enum rgk_map {
  RGK_FILL,        /* to = value */
  RGK_COPY,        /* x, to */
  RGK_MUL,         /* x, y, to */
  RGK_MUL_BWD,     /* a, b, dy, da = dy·b, db = dy·a */
  RGK_SILU,        /* x, to */
  RGK_SILU_BWD,    /* x, dy, dx */
  RGK_SIGMOID,     /* x, to */
  RGK_SIGMOID_BWD, /* x, dy, dx */
  RGK_RELU,        /* x, to: where value·x > 0, else 0 */
  RGK_RELU_BWD,    /* x, dy, dx */
  RGK_MAPS
} rgk_map;

/* A thread's share: 8 consecutive elements of the walk read and written 16
 * bytes at a time, or one element. */
typedef struct rgk_map_params {
  rgk_walk w;
  rgk_walked t[RGK_MAP_TENSORS];
  rgk_seqs seqs;
  int64_t row; /* elements per row of `seqs` */
  bool add[2]; /* outputs that are added to */
  float value;
} rgk_map_params;
/* x: type of the inputs if `vectors`; else types are looked up at run time. */
RGK_GETTER(rgk_map_kernel(rgk_map map, bool vectors, rg_dtype x))

/* Tensor 0 = start + tensor 1 + …, in this order, in fp32. */
typedef struct rgk_add_params {
  rgk_walk w;
  rgk_walked t[RGK_ADD_TENSORS];
  rgk_seqs seqs;
  int64_t row;
  const float *start; /* dense, or NULL */
} rgk_add_params;
RGK_GETTER(rgk_add_kernel(bool vectors, rg_dtype x))

/* to[i] = from[i]·times / divisor, at most `rows`; one thread for each. */
typedef struct rgk_scale_lengths_params {
  const int32_t *from;
  int32_t *to;
  int64_t n;
  int32_t times, divisor, rows, zero;
} rgk_scale_lengths_params;
RGK_GETTER(rgk_scale_lengths(void))

#endif
