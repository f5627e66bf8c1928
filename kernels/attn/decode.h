/* kernels/attn/decode.h: a step of single tokens over pages on Hopper: attention over compressed
 * keys, and the choice of blocks by its scores, in one launch. */
#ifndef RGK_DECODE_H
#define RGK_DECODE_H

#include "../paged.h"
#include "flash.h"
#include "topk.h"

enum {
  RGK_DECODE_HEADS = 16,    /* of a KV head */
  RGK_DECODE_BLOCK = 4,     /* compressed keys of a block, which reaches over one more */
  RGK_DECODE_KEYS = 128,    /* of a tile */
  RGK_DECODE_SCORES = 2560, /* of a token, that shared memory has room for */
  RGK_DECODE_RANKS = 256,   /* threads that rank, beside 128 that load and 128 that attend */
  RGK_DECODE_THREADS = 256 + RGK_DECODE_RANKS,
  RGK_DECODE_ROWS_KEPT = 17, /* rows of `pitch` floats that a block of threads has to itself */
  RGK_DECODE_HELD = 1024,    /* compressed keys whose products shared memory has room for */
  /* The same where blocks are chosen nearly first, bytes for each tile: twice sums of each block
   * and head in bf16 and what they are above, once the blocks' scores, in fp64. */
  RGK_DECODE_BLOCKS = RGK_DECODE_KEYS / RGK_DECODE_BLOCK,
  RGK_DECODE_SUMS = 2 * RGK_DECODE_BLOCKS * RGK_DECODE_HEADS,
  RGK_DECODE_REFERENCES = 4 * RGK_DECODE_HEADS,
  RGK_DECODE_NEAR_KEPT = 2 * (RGK_DECODE_SUMS + RGK_DECODE_REFERENCES) + 8 * RGK_DECODE_BLOCKS
};

/* Shared memory: stages of K and V, q of two tokens, weights twice, sums of pairs, scores, the rest
 * and what aligns it. */
#define RGK_DECODE_STAGES(D) RGK_FLASH_STAGES(D, D, 1, RGK_DECODE_KEYS)
#define RGK_DECODE_SHARED(D)                                                                       \
  (RGK_FLASH_PANELS(D) *                                                                           \
       (256 * RGK_DECODE_KEYS * RGK_DECODE_STAGES(D) + 2 * 128 * RGK_DECODE_HEADS) +               \
   RGK_DECODE_HEADS * 4 * RGK_DECODE_KEYS + RGK_DECODE_KEYS / 8 * (4 * RGK_DECODE_HEADS + 4) * 4 + \
   4 * RGK_DECODE_SCORES + 4608)
/* Where two blocks of threads share a token, each has keys or values alone, and weights on their
 * way from one to the other. */
#define RGK_DECODE_TWIN_STAGES(D) (2 * RGK_DECODE_STAGES(D) - ((D) == 128 ? 1 : 2))
/* Where products are held: of width 128 they take a stage's place. */
#define RGK_DECODE_HELD_STAGES(D) (RGK_DECODE_STAGES(D) - ((D) == 128))
#define RGK_DECODE_HELD_SHARED(D) \
  (RGK_DECODE_SHARED(D) + ((D) == 128 ? 0 : RGK_DECODE_HEADS * 4 * (RGK_DECODE_HELD + 4)))

/* A job is a token of a KV head; slots are rows of q.
 *
 * `room`: per block of threads the products of its token with each row of the sequence, head by
 * head, where they are more than RGK_DECODE_HELD or twins share it; then places for the blocks'
 * scores. */
typedef struct rgk_decode {
  rgk_flash_paged f; /* tiles of one token */
  rgk_topk topk;
  float *room;
  int64_t pitch; /* a multiple of a tile */
} rgk_decode;
/* In RGK_DECODE_HELD_SHARED. Twins: a cluster of two blocks of threads for a token of a KV head, to
 * the same bits, in RGK_DECODE_SHARED. */
RGK_GETTER(rgk_decode_sm90(rg_dtype type, int32_t width, bool twins))
/* The same, to the same bits, where a block of threads has few tokens: blocks are chosen nearly
 * first (decode_near_sm90.cu). */
RGK_GETTER(rgk_decode_near(rg_dtype type, int32_t width))

/* Attention alone: to the bit flash.h's over pages, without a cap; and gather.h's, of blocks of 64
 * keys, at most 32 of them. k and v are maps of (width, head, row, page) in boxes of 64 rows and
 * columns there. Tiles of one token. */
typedef struct rgk_decode_selected {
  rgk_flash_paged f;
  rgk_tensor idx;
  int32_t top_n, zero;
} rgk_decode_selected;
RGK_GETTER(rgk_decode_alone(rg_dtype type, int32_t width))
RGK_GETTER(rgk_decode_slc(rg_dtype type, int32_t width))

/* Selected blocks, a window and combine's sum of both with other branches, in one launch: the bits
 * of the three. Stages of the one and of the other. */
enum {
  RGK_PAIR_BRANCHES = 4,
  RGK_PAIR_THREADS = 3 * 128,
  RGK_PAIR_SHARED = 216 * 1024,
  RGK_PAIR_KEEPS = 8 /* a context's windows at most, for what is in both to be kept in L2 */
};
#define RGK_PAIR_STAGES(D, selected) (2 / RGK_FLASH_PANELS(D) * ((selected) ? 3 : 1))
typedef struct rgk_pair_branch {
  const void *o; /* [T, H, E]; NULL: made here */
  int64_t row, head;
} rgk_pair_branch;
/* k and v are selected's maps in both; window.f.o is the sum. */
typedef struct rgk_decode_pair {
  rgk_decode_selected selected;
  rgk_flash_paged window;
  rgk_tensor gate;                        /* [T, H, n] */
  int32_t n, act, at_selected, at_window; /* branches, combine's attribute, places among them */
  rgk_pair_branch branch[RGK_PAIR_BRANCHES];
} rgk_decode_pair;
RGK_GETTER(rgk_decode_pair_sm90(rg_dtype type, int32_t width))

/* All of these, and the choice of blocks, in one launch (decode_layer_sm90.cuh). With `steps` what
 * kv_append_means does, too: each block of threads what its tokens want. */
typedef struct rgk_decode_layer {
  rgk_decode d;
  rgk_decode_pair pair;
  rgk_append_means step;
  int32_t steps, zero;
} rgk_decode_layer;
RGK_GETTER(rgk_decode_layer_sm90(rg_dtype type, int32_t width))

#endif
