/* kernels/index_loss.h: one call of index_loss or of its gradient, as its kernels see it. */
#ifndef RGK_INDEX_LOSS_H
#define RGK_INDEX_LOSS_H

#include "kernels.h"

enum { RGK_INDEX_LOSS_THREADS = 128, RGK_INDEX_LOSS_WIDTH = 576 };

/* Query head h belongs to idx head h / (H / I) and KV head h / (H / KH), index head j to idx head
 * j / (IH / I). `slots`, `start`, `list`, `places`: attn/csr.h, of I heads. */
typedef struct rgk_index_loss {
  rgk_tensor q, k, lse, index_q, index_k, weight, idx, loss, d_loss, dq, dk, dw;
  rgk_seqs seqs, kseqs;
  const int32_t *offset;
  int64_t T, S;
  int32_t H, KH, D, IH, I, ID, N, block;
  float scale, index_scale;
  int32_t relu, add_q, add_k, add_w;
  float *own;   /* [grid, 2, N · block]: a block's probabilities and scores */
  float *slope; /* [T, I, N · block]: gradients of the scores; backward */
  int64_t slots;
  const int64_t *start;
  const int32_t *list;
  const uint16_t *places;
} rgk_index_loss;

RGK_GETTER(rgk_index_loss_rows(bool backward)) /* any grid, THREADS */
RGK_GETTER(rgk_index_loss_keys(void))          /* grid slots · block · I, THREADS */

#endif
