/* kernels/attn/decode.h: a step of single tokens over pages on Hopper: attention over compressed
 * keys, and the choice of blocks by its scores, in one launch. */
#ifndef RGK_DECODE_H
#define RGK_DECODE_H

#include "flash.h"
#include "topk.h"

enum {
  RGK_DECODE_HEADS = 16,    /* of a KV head */
  RGK_DECODE_BLOCK = 4,     /* compressed keys of a block, which reaches over one more */
  RGK_DECODE_KEYS = 128,    /* of a tile */
  RGK_DECODE_ROWS_KEPT = 17 /* rows of `pitch` floats that a block of threads has to itself */
};

/* `room`: per block of threads the products of its token with each row of the sequence, head by
 * head, then places for the blocks' scores. */
typedef struct rgk_decode {
  rgk_flash_paged f; /* tiles of one token */
  rgk_topk topk;
  float *room;
  int64_t pitch; /* a multiple of a tile */
} rgk_decode;
RGK_GETTER(rgk_decode_sm90(rg_dtype type, int32_t width))

#endif
