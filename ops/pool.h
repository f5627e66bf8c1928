/* ops/pool.h: a call of pool or its gradient, whatever device runs it. */
#ifndef RGI_POOL_H
#define RGI_POOL_H

#include "../kernels/pool.h"
#include "ops.h"

typedef struct rgi_pool {
  const rg_arg *x, *z, *bias, *cu;
  const rg_arg *y;                 /* forward */
  const rg_arg *dy, *dx, *dz, *db; /* backward; NULL: zero, or not wanted */
  bool backward, add_x, add_z, add_b;
  int64_t T, KH, W, rows; /* W: width of y; x has parts · W columns */
  int64_t kernel, stride, parts;
  int method; /* RGK_POOL_… */
} rgi_pool;

#endif
