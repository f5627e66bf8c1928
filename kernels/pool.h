/* kernels/pool.h: one call of pool or of its gradient, as its kernels see it. */
#ifndef RGK_POOL_H
#define RGK_POOL_H

#include "kernels.h"

enum { RGK_POOL_SOFTMAX, RGK_POOL_MAX, RGK_POOL_MIN }; /* as pool's choices */
enum { RGK_POOL_THREADS = 256 };

typedef struct rgk_pool {
  rgk_tensor x, z, bias, y, dy, dx, dz, db;
  rgk_seqs seqs;
  int64_t T, rows;
  int32_t KH, W, kernel, stride, parts, method;
  int32_t add_x, add_z, add_b, zero;
  float *lse, *mean; /* [rows, KH, W] of every row, or NULL: no gradient of bias */
} rgk_pool;

RGK_GETTER(rgk_pool_fwd(void))   /* grid over rows · KH · W threads */
RGK_GETTER(rgk_pool_bwd(void))   /* the same */
RGK_GETTER(rgk_pool_clear(void)) /* grid over T · KH · parts · W threads */
RGK_GETTER(rgk_pool_bias(void))  /* grid over stride · parts · W threads */

#endif
