/* kernels/attn/mma.h: attention forward on the tensor cores of any GPU since Ampere
 * (device/mma.cuh), all three modes. */
#ifndef RGK_ATTN_MMA_H
#define RGK_ATTN_MMA_H

#include "attn.h"

/* Widths of q·k and of v that have instances, narrowest first. A call takes the first that holds
 * it; what its rows lack counts as zeros. Each is a file of its own, mma_fwd_D.cu, and for each
 * type: drivers compile what they are given whole. */
#define RGK_MMA_WIDTHS(X) X(64, 64) X(96, 96) X(128, 128) X(192, 128) X(256, 256)

/* A team of warps has rows of its own, `queries` queries of a sequence times `heads` of a KV head's
 * G query heads, which are cut into `parts`, and tiles of keys of its own.
 *
 *           warps   rows   keys of a tile
 *   LARGE     4     128         64         dense; none at width 256
 *   SMALL     4      64         64         dense at width 256 or with 100 KB of shared memory a
 *                                          multiprocessor; selected blocks, groups of more than 16
 *   ONE       1      16         32         selected blocks
 *
 * A row is computed for itself, whatever rows share its team. LARGE and SMALL have the same tiles
 * of keys, and give the same bits. */
enum { RGK_MMA_LARGE, RGK_MMA_SMALL, RGK_MMA_ONE };
RGK_BOTH int32_t rgk_mma_rows(int shape) {
  return shape == RGK_MMA_LARGE ? 128 : shape == RGK_MMA_SMALL ? 64 : 16;
}
RGK_BOTH int32_t rgk_mma_keys(int shape) {
  return shape == RGK_MMA_ONE ? 32 : 64;
}
/* of a block: one of four warps, or so many of one that blocks of them fill 100 KB */
RGK_BOTH int32_t rgk_mma_teams(int shape, int32_t D) {
  return shape != RGK_MMA_ONE ? 1 : D > 96 ? 2 : 4;
}
RGK_BOTH int32_t rgk_mma_threads(int shape, int32_t D) {
  return shape == RGK_MMA_ONE ? 32 * rgk_mma_teams(shape, D) : 128;
}
/* Of a block: a tile of K, one of V and, where a warp's registers don't hold it or four share the
 * room, q; dense: what rows see. */
RGK_BOTH uint32_t rgk_mma_shared(int shape, bool selected, int32_t D, int32_t E) {
  const int32_t rows = rgk_mma_rows(shape);
  return (uint32_t)(2 * rgk_mma_teams(shape, D) *
                        (rgk_mma_keys(shape) * (D + E) +
                         (shape == RGK_MMA_ONE && D <= 192 ? 0 : rows * D)) +
                    (selected ? 0 : 8 * rows + 64));
}

typedef struct rgk_mma {
  rgk_attn a;
  rgk_divisor by_heads; /* of a team's rows */
  int32_t queries, heads, parts;
  /* KV heads times parts that are worked on side by side, a divisor of their number */
  int32_t side;
  int32_t slots;     /* tiles of queries, rgk_slots(T, n, queries) */
  int32_t key_parts; /* selected blocks: tiles of keys of one */
} rgk_mma;

/* Grid ceil(slots / teams) * KH * parts. NULL where there is no such instance. */
#define RGK_MMA_GETTER(D, E) RGK_GETTER(rgk_mma_fwd_##D(rg_dtype type, int shape, bool selected))
RGK_MMA_WIDTHS(RGK_MMA_GETTER)
#undef RGK_MMA_GETTER

#endif
