/* kernels/attn/mma_bwd.h: attention's backward on the tensor cores of any GPU since Ampere
   (device/mma.cuh). Work is cut as for the kernels without tensor cores, whose parameters these
   take too (plain.h): dK and dV by tiles of keys, dQ by tiles of rows (query, head), each with
   scores of its own, so that every sum has one order and nothing is added to in memory.
 */
#ifndef RGK_MMA_BWD_H
#define RGK_MMA_BWD_H

#include "mma.h"
#include "plain.h"

/* Instances, narrowest first: widths of q·k and of v. A call takes the first that holds it; what
 * its rows lack arrives as zeros. */
#define RGK_MMA_BWD_INSTANCES(X) X(64, 64) X(96, 96) X(128, 128) X(192, 128) X(256, 256)

enum {
  RGK_MMA_BWD_KEYS = 64,        /* of a key tile, */
  RGK_MMA_BWD_MANY_KEYS = 128,  /* and where there are many, at */
  RGK_MMA_BWD_MANY_WIDTH = 128, /* this width */
  RGK_MMA_BWD_ROWS = 64,        /* of a row tile */
  RGK_MMA_BWD_LANES = 16,       /* that sum a row's delta */
  RGK_MMA_BWD_THREADS = 128,
  RGK_MMA_BWD_PAIR_STEP = 32, /* keys of a step where pairs of warps share rows */
  RGK_MMA_BWD_HELD = 128      /* widths at which a warp holds 16 rows of Q and of dO in registers */
};

/* Rows of a batch in dK and dV, keys of a step in dQ. SMALL: within 99 KB of shared memory, all
 * that some GPUs have; the others, within 163 KB. */
RGK_BOTH int32_t rgk_mma_bwd_batch(int32_t W, bool small) {
  return W == 256 && small ? 16 : 32;
}
RGK_BOTH int32_t rgk_mma_bwd_step(int32_t W, bool small) {
  return W <= 128 ? 64 : rgk_mma_bwd_batch(W, small);
}
/* Warps of dK and dV: half of them per product, each with 32 keys where registers allow. */
RGK_BOTH uint32_t rgk_mma_bwd_keys_threads(int32_t W, int32_t keys) {
  return W <= 128 ? 2 * (uint32_t)keys : 256;
}

/* Batches whose rows are looked up at a time, each by a warp; a power of two. */
RGK_BOTH int32_t rgk_mma_bwd_looks(int32_t W, bool small, int32_t keys) {
  return W == 256 && small ? 1 : (int32_t)rgk_mma_bwd_keys_threads(W, keys) / 32;
}
/* Batches whose rows are known: those looked up, this and the next; where there are three stages,
 * also the one before and the one after the next: a power of two. */
RGK_BOTH int32_t rgk_mma_bwd_known(int32_t W, bool small, int32_t keys) {
  const int32_t looks = rgk_mma_bwd_looks(W, small, keys);
  return W <= 128 ? 2 * looks : looks + 2;
}
/* Columns of K and of V that are in registers before the first stage is filled again; the third
 * stage comes in their place. 0: there are two. */
RGK_BOTH int32_t rgk_mma_bwd_near(int32_t W) {
  return W > 128 ? 0 : W == 96 ? 64 : W / 2;
}

/* Bytes of shared memory; the kernels' structs are checked against these. */
RGK_BOTH uint32_t rgk_mma_bwd_keys_shared(int32_t W, int32_t E, bool small, int32_t keys) {
  const uint32_t w = (uint32_t)(W + E) * 2, n = (uint32_t)rgk_mma_bwd_batch(W, small),
                 looks = (uint32_t)rgk_mma_bwd_looks(W, small, keys),
                 known = (uint32_t)rgk_mma_bwd_known(W, small, keys), k = (uint32_t)keys;
  return (k + 2 * n) * w + (W <= 128 ? 2 : 1) * k * n * 2 +
         (known * (20 * n + 4) + (looks > 1 ? 112 + 768 * looks : 1) + 24 + 15) / 16 * 16;
}
RGK_BOTH uint32_t rgk_mma_bwd_queries_shared(int32_t W, int32_t E, bool small) {
  const uint32_t w = (uint32_t)(W + E) * 2, n = (uint32_t)rgk_mma_bwd_step(W, small);
  return (W <= 128 ? 2 * n : RGK_MMA_BWD_ROWS + 2 * n) * w;
}
RGK_BOTH uint32_t rgk_mma_bwd_pairs_shared(int32_t W, int32_t E) {
  const uint32_t n = RGK_MMA_BWD_PAIR_STEP, rows = RGK_MMA_BWD_ROWS;
  return 2 * n * (4 * (uint32_t)W + 2 * (uint32_t)E) + 2 * rows * n * (4 + 2) + 64;
}
/* delta = rowsum(o d_o) - d_lse: grid over T * H * RGK_MMA_BWD_LANES threads of
 * RGK_MMA_BWD_THREADS */
RGK_GETTER(rgk_mma_bwd_delta(rg_dtype type))
/* NULL where there is no such instance. Grid key_slots * KH * own_parts, tiles of `keys`; slots *
 * KH * parts, of RGK_MMA_BWD_THREADS */
RGK_GETTER(rgk_mma_bwd_keys(rg_dtype type, int32_t W, bool small, int32_t keys))
RGK_GETTER(rgk_mma_bwd_queries(rg_dtype type, int32_t W, bool small))
/* dQ of dense calls, W up to RGK_MMA_BWD_HELD; as rgk_mma_bwd_queries. */
RGK_GETTER(rgk_mma_bwd_pairs(rg_dtype type, int32_t W))

/* dQ of selected blocks, in teams RGK_MMA_ONE of mma.h (grid, threads, shared memory as there), W
 * up to RGK_MMA_BWD_HELD. */
typedef struct rgk_mma_bwd_alone_params {
  rgk_mma m;
  const float *delta;
} rgk_mma_bwd_alone_params;
RGK_GETTER(rgk_mma_bwd_alone(rg_dtype type, int32_t W))

#endif
