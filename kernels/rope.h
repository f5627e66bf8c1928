/* kernels/rope.h: rotary embedding: y = x turned by position, pairs (c, c + half), or (2c, 2c + 1)
 * if interleaved. */
#ifndef RGK_ROPE_H
#define RGK_ROPE_H

#include "kernels.h"

enum { RGK_ROPE_THREADS = 256, RGK_ROPE_PAIRS = 256, RGK_ROPE_ANGLES = 2048, RGK_ROPE_TOKENS = 32 };

/* One launch turns pairs [first, first + pairs); a block takes `tokens` tokens, all heads. */
typedef struct rgk_rope_params {
  rgk_seqs seqs;
  const int32_t *offset; /* [B]: position of a sequence's first row, or NULL */
  rgk_tensor x, y;
  int64_t rows, heads, half, first;
  /* of a block; tokens <= RGK_ROPE_TOKENS, tokens · pairs <= RGK_ROPE_ANGLES */
  int32_t pairs, tokens;
  bool back, add;               /* turn the other way; add to y */
  float magnitude;              /* of cosine and sine */
  double turns[RGK_ROPE_PAIRS]; /* full turns per position of pair first + i */
} rgk_rope_params;
/* vectors: rows, `half` and `first` on 16 bytes, x of type `x`. */
RGK_GETTER(rgk_rope(bool vectors, rg_dtype x, bool interleaved))

#endif
