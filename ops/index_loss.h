/* ops/index_loss.h: a call of index_loss or its gradient, whatever device runs it. */
#ifndef RGI_INDEX_LOSS_H
#define RGI_INDEX_LOSS_H

#include "ops.h"

typedef struct rgi_index_loss {
  const rg_arg *q, *k, *lse, *index_q, *index_k, *weight, *idx, *cu, *cu_k, *offset;
  const rg_arg *loss;                  /* forward writes it */
  const rg_arg *d_loss, *dq, *dk, *dw; /* backward; of index_q, index_k, weight, NULL: not wanted */
  bool backward, add_q, add_k, add_w;
  /* heads: of queries and keys, of the index's queries, of idx */
  int64_t T, S, H, KH, D, IH, I, ID, N, B, block;
  double scale, index_scale;
  bool relu;
} rgi_index_loss;

#endif
