/* kernels/rows.h: elementwise and row-wise ops. */
#ifndef RGK_ROWS_H
#define RGK_ROWS_H

#include "kernels.h"

/* Tensors of one shape, walked together; axes that lie densely in all of them are folded into one. */
enum { RGK_WALK_TENSORS = 4 };
typedef struct rgk_walk {
  int32_t rank, n;          /* axes after folding (>= 1), tensors */
  int64_t dim[RG_MAX_RANK]; /* the last one is walked by consecutive threads */
  int64_t stride[RGK_WALK_TENSORS][RG_MAX_RANK];
  void *data[RGK_WALK_TENSORS];
  int32_t dtype[RGK_WALK_TENSORS];
  int64_t elements;
} rgk_walk;

typedef struct rgk_fill_params {
  rgk_walk w;
  float value;
} rgk_fill_params;
RGK_GETTER(rgk_fill(void))

#endif
