/* kernels/flash.h: attention forward on Hopper, for keys that a query sees as one contiguous range (swa, cmp). */
#ifndef RGK_FLASH_H
#define RGK_FLASH_H

#include "attn.h"
#include "tma.h"

/* Instances, narrowest first: widths of q·k and of v, warpgroups (of 64 query rows each), keys of a tile. A call
 * takes the first that holds it; what its rows lack arrives as zeros. */
#define RGK_FLASH_INSTANCES(X)                                                                               \
  X(64, 64, 2, 128)                                                                                          \
  X(128, 128, 2, 128)

typedef struct rgk_flash_shape {
  int32_t D, E, rows, keys, threads;
  uint32_t shared; /* bytes */
} rgk_flash_shape;

enum { RGK_FLASH_BOX = 64 }; /* rows of q that one warpgroup owns, and its copies fetch */

static inline rgk_flash_shape rgk_flash_shape_of(int32_t D, int32_t E, int32_t groups, int32_t keys) {
  rgk_flash_shape s = {0, 0, 0, 0, 0, 0};
  const int32_t d = (D + 63) / 64 * 64, e = (E + 63) / 64 * 64;
  s.D = D, s.E = E, s.keys = keys;
  s.rows = groups * RGK_FLASH_BOX;
  s.threads = (groups + 1) * 128;
  s.shared = (uint32_t)(2 * (s.rows * d + 2 * keys * (d + e)) + 2048);
  return s;
}

typedef struct rgk_flash_params {
  rgk_map q, k, v;
  rgk_tensor o, lse, sinks; /* [T, H, E], [T, H], [H] */
  rgk_seqs seqs, kseqs;
  const int32_t *offset;
  int64_t S, window_left;
  int32_t mode, H, G, E, kernel, stride;
  uint32_t jobs; /* slots of rows, times H */
  float scale, softcap;
} rgk_flash_params;

/* NULL where there is no such instance. */
RGK_GETTER(rgk_flash_fwd(rg_dtype type, int32_t D, int32_t E))

#endif
