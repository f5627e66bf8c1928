/* kernels/attn/flash_bwd.h: attention's backward on Hopper's tensor cores, for swa_attn and
 * cmp_attn. */
#ifndef RGK_FLASH_BWD_H
#define RGK_FLASH_BWD_H

#include "attn.h"
#include "../tma.h"

enum {
  RGK_FLASH_BWD_ROWS = 64,   /* queries of one head in a tile */
  RGK_FLASH_BWD_CHUNKS = 64, /* most chunks of a sequence's queries */
  RGK_FLASH_BWD_HEADS = 8    /* heads of a block of prepare and of dq */
};

/* The work of one KV head is cut into items: a chunk of a sequence's queries against one tile of
 * its keys, for all heads of the group. Chunks are `chunk` queries long, longer where that would
 * make more than CHUNKS of them; chunk 0: one chunk a sequence. */
typedef struct rgk_flash_bwd {
  rgk_map q, d_o, k, v;
  rgk_attn a;
  int64_t chunk;
  int32_t keys;           /* in a tile */
  int32_t width, width_v; /* of rows in shared memory: D, E rounded up to an instance's */
  int32_t kh0, kh_n;      /* KV heads of this pass */
  int32_t pass;
  int64_t kv_tiles; /* capacity of kv, in tiles of one KV head */
  /* places for chunks in kv, one for each, which sum_kv adds up; 1: they add to one sum */
  int32_t parts;
  /* workspace */
  float *rows;        /* [slots of 64 queries, H, 2, 64] lse in base 2, then delta */
  double *sink;       /* [slots, H] each tile's part of d_sinks, or NULL */
  float *dq;          /* [heads of the pass, width / 64, T, 64] sums of dQ */
  float *kv;          /* [KH, kv_tiles, parts, ...] dK and dV of sequences of several chunks */
  uint32_t *dq_done;  /* [slots, H] key tiles summed up in a tile of dq */
  uint32_t *kv_done;  /* [KH, kv_tiles, 2] chunks summed up in each half of a tile of kv */
  uint32_t *ticket;   /* [passes] items begun */
  int32_t *items;     /* [n + 1] items before each sequence */
  int32_t *kv_before; /* [n + 1] tiles of kv before each sequence */
  int64_t slots, passes, zero_blocks;
} rgk_flash_bwd;

/* In this order; the middle two once a pass. */
RGK_GETTER(rgk_flash_bwd_prepare(rg_dtype type)) /* delta, counts, dead rows of dk and dv */
RGK_GETTER(rgk_flash_bwd_main(rg_dtype type, int32_t width))
RGK_GETTER(rgk_flash_bwd_wide(rg_dtype type, int32_t width)) /* main for widths above 128 */
RGK_GETTER(rgk_flash_bwd_dq(void))                           /* rounds dq */
RGK_GETTER(rgk_flash_bwd_kv(void))                           /* sums up kv's parts, if several */
RGK_GETTER(rgk_flash_bwd_sinks(void))                        /* sums up d_sinks */

enum { RGK_FLASH_BWD_THREADS = 384 }; /* of main and wide */
/* Bytes of their shared memory. */
RGK_BOTH uint32_t rgk_flash_bwd_shared(int32_t keys, int32_t width, int32_t width_v) {
  const uint32_t k = (uint32_t)keys, d = (uint32_t)width, e = (uint32_t)width_v,
                 stages = d == 256 ? 1 : 2;
  return k * (d + e) * 2 + stages * 64 * (d + e) * 2 + (k == 64 ? 4 : 2) * k * 128 +
         (k == 64 ? 1 : 2) * 64 * d * 4 + stages * 512 + 512;
}

#endif
