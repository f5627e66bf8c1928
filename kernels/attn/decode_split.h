/* kernels/attn/decode_split.h: rgk_decode_layer (decode.h) of few tokens, whose keys are shared out
 * among a cluster of blocks of threads each. */
#ifndef RGK_DECODE_SPLIT_H
#define RGK_DECODE_SPLIT_H

#include "decode.h"

/* Other sums than rgk_decode_layer's (decode_split_sm90.cuh). k and v of selected blocks are not
 * looked at: window's are theirs. Cuts of sums: rows of compressed keys to a chunk; sums of a
 * window and of selected blocks. */
enum {
  RGK_SPLIT_WARPS = 8,
  RGK_SPLIT_KEYS = 16, /* of a tile */
  RGK_SPLIT_CHUNK = 1024,
  RGK_SPLIT_WINDOW = 18, /* 64 keys each, of windows of up to 1024 */
  RGK_SPLIT_NEAR = RGK_SPLIT_WINDOW + 32,
  RGK_SPLIT_MOST = 8 /* blocks of a cluster */
};
typedef struct rgk_decode_split {
  rgk_decode d; /* pitch: a multiple of a chunk */
  rgk_decode_pair pair;
  int64_t room_bytes;   /* of a cluster */
  int32_t blocks, zero; /* of a cluster */
} rgk_decode_split;
RGK_GETTER(rgk_decode_split_sm90(rg_dtype type, int32_t width))
/* Its room: a sum; what goes with a tile of compressed keys. */
#define RGK_SPLIT_PART(D) (4 * RGK_DECODE_HEADS * ((D) + 2))
#define RGK_SPLIT_TILE    (16 * RGK_DECODE_HEADS + 16 + 32 + 4)
#define RGK_SPLIT_ROOM(D, pitch)                                               \
  ((int64_t)RGK_SPLIT_PART(D) * ((pitch) / RGK_SPLIT_CHUNK + RGK_SPLIT_NEAR) + \
   (pitch) / RGK_SPLIT_KEYS * RGK_SPLIT_TILE)
#define RGK_SPLIT_SHARED(D)                                                                      \
  (RGK_SPLIT_WARPS * (2 * 4 * 1024 * ((D) / 64) + 4 * RGK_DECODE_HEADS * ((D) + 8 + 2)) + 4096 + \
   1024)

#endif
