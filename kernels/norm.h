/* kernels/norm.h: rmsnorm, layernorm and their gradients (the formulas stand in ops/norm.c). */
#ifndef RGK_NORM_H
#define RGK_NORM_H

#include "rows.h"

enum { RGK_NORM_THREADS = 256, RGK_NORM_COLUMNS = 32, RGK_NORM_SLICES = 32 };

/* `group` neighbouring threads work on a row: a power of two up to 32, or all of a block. A
 * thread's elements are 8·lane … 8·lane+7, then those 8·group further, …: `held` such chunks stay
 * in registers (forward 1, 2 or 4, backward 1 or 4). */
/* Rows of the forward that a group takes at once. */
#define RGK_NORM_ROWS(held) (4 / (held))
/* Rows of the backward under way at once, and bytes of dynamic shared memory for them; `size`:
 * of an element of x. At least 32 * width bytes where a group is at most a warp and dw is
 * wanted; none of it if not `vectors`. */
#define RGK_NORM_STAGES(held, size) ((size) == 2 ? ((held) == 1 ? 4 : 3) : 2)
#define RGK_NORM_STAGE_BYTES(held, size) \
  (RGK_NORM_STAGES(held, size) * 16 * (held) * (size)*RGK_NORM_THREADS)

typedef struct rgk_norm_params {
  rgk_walk w;      /* last axis on its own */
  rgk_walked t[3]; /* forward: x, y; backward: x, dy, dx (data NULL: not wanted) */
  rgk_seqs seqs;
  int64_t rows, width;
  int64_t per_token; /* rows of a token */
  int32_t group;
  const void *weight;   /* [width] in x's type, or NULL */
  float eps, per_width; /* 1 / width */
  bool add;             /* to dx */
  int64_t per_block;    /* backward: rows of a block */
  float *partial;       /* [blocks, width]: a block's share of dw, or NULL */
} rgk_norm_params;
RGK_GETTER(rgk_norm_fwd(bool vectors, rg_dtype x, int held))
RGK_GETTER(rgk_norm_bwd(bool vectors, rg_dtype x, int held))

/* layernorm, one warp to a row, element by element. The backward puts mean and r of each live row
 * into `stats`, by which a second kernel sums the columns: RGK_LAYER_ROWS rows or more to a block
 * of RGK_NORM_COLUMNS x RGK_LAYER_SLICES threads. */
enum { RGK_LAYER_SLICES = 8, RGK_LAYER_ROWS = 256 };
typedef struct rgk_layer_params {
  rgk_walk w;      /* last axis on its own */
  rgk_walked t[3]; /* forward: x, y; backward: x, dy, dx (data NULL: not wanted) */
  rgk_seqs seqs;
  int64_t rows, width;
  int64_t per_token;         /* rows of a token */
  const void *weight, *bias; /* [width] in x's type, or NULL */
  float eps, per_width;      /* 1 / width */
  int64_t add;               /* to dx */
  int64_t per_block;         /* rows of a block that sums columns */
  float *stats;              /* [rows, 2], or NULL */
  float *partial;            /* [2, blocks, width]: shares of dw, db */
} rgk_layer_params;
RGK_GETTER(rgk_layer_fwd(void))
RGK_GETTER(rgk_layer_bwd(void))
RGK_GETTER(rgk_layer_columns(void))

/* to (+)= Σ over n partial rows, in a fixed order. Blocks of RGK_NORM_COLUMNS x RGK_NORM_SLICES
 * threads. */
typedef struct rgk_norm_sum_params {
  const float *partial; /* [n, width] */
  int64_t n, width;
  void *to;
  int32_t dtype, add;
} rgk_norm_sum_params;
RGK_GETTER(rgk_norm_sum(void))

#endif
