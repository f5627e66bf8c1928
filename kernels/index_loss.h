/* kernels/index_loss.h: one call of index_loss or of its gradient, as its kernels see it. */
#ifndef RGK_INDEX_LOSS_H
#define RGK_INDEX_LOSS_H

#include "kernels.h"

enum {
  RGK_INDEX_LOSS_THREADS = 128,
  RGK_INDEX_LOSS_WIDTH = 576,
  /* by mma.sync: bf16, index heads of up to so many features, up to so many to a head of idx */
  RGK_INDEX_LOSS_MMA_THREADS = 256,
  RGK_INDEX_LOSS_MMA_WIDTH = 128,
  RGK_INDEX_LOSS_MMA_HEADS = 64,
  RGK_INDEX_LOSS_MMA_BYTES = 160000
};

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
  float *own;   /* [grid, 2, N · block]: a block's probabilities and scores; mma: 3, keys as int */
  float *slope; /* [T, I, N · block]: gradients of the scores; backward, not mma */
  int64_t slots;
  const int64_t *start;
  const int32_t *list;
  const uint16_t *places;
  /* mma: the rows of a launch; backward's shares of d.index_k */
  int64_t row, rows;
  void *share;     /* [rows, I, N · block, RGK_INDEX_LOSS_MMA_WIDTH] bf16; NULL: not wanted */
  float *sum;      /* [S, I, RGK_INDEX_LOSS_MMA_WIDTH] between windows of rows */
  int64_t *cursor; /* [S, I]: how far a key's list has been summed */
} rgk_index_loss;

RGK_GETTER(rgk_index_loss_rows(bool backward)) /* any grid, THREADS */
RGK_GETTER(rgk_index_loss_keys(void))          /* grid slots · block · I, THREADS */

/* any grid, RGK_INDEX_LOSS_MMA_THREADS, RGK_INDEX_LOSS_MMA_BYTES */
RGK_GETTER(rgk_index_loss_mma_rows(bool backward))
/* 16 threads a key and head of idx: grid over S * I * 16, RGK_INDEX_LOSS_THREADS */
RGK_GETTER(rgk_index_loss_mma_keys(void))

#endif
