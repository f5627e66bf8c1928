/* kernels/compress.h: means over blocks of tokens, and where blocks of a pack lie. Learned
 * compression is a product of gemm.h over the tables made here. */
#ifndef RGK_COMPRESS_H
#define RGK_COMPRESS_H

#include "gemm.h"

/* blocks[r]: row r of the compressed tensor: the token its block begins at, or dead. groups:
 * `stride` tokens each, of all slots (rgk_slots of `stride`), dead tokens included; row is that of
 * block m for group m of a sequence, part s the block m − s, C the group's tokens. Either may be
 * NULL. */
typedef struct rgk_compress_tables {
  rgk_seqs seqs;
  int32_t kernel, stride;
  int64_t nblocks, ngroups;
  rgk_gemm_row *blocks, *groups;
} rgk_compress_tables;
RGK_GETTER(rgk_make_tables(void))

/* K or V. */
typedef struct rgk_mean_side {
  const void *x; /* forward [T, heads, width]; backward dy [T/stride, heads, width], NULL: zero */
  void *y;       /* forward [T/stride, heads, width]; backward dx [T, heads, width] */
  int64_t x_row, x_head, y_row, y_head;
  int32_t heads, width, y_dtype;
  int32_t across; /* threads of a block that stand side by side, 8 features each: a power of two */
  bool add;
} rgk_mean_side;

/* A block of 256 threads takes a tile of `tile` · stride tokens (a slot, see kernels.h), 8 · across
 * features of side blockIdx.z. */
typedef struct rgk_mean {
  rgk_seqs seqs;
  int64_t rows; /* T / stride */
  int32_t kernel, stride, dtype, tile;
  bool vec; /* moves of 16 bytes are legal */
  rgk_mean_side side[2];
} rgk_mean;
RGK_GETTER(
    /* vec; (tile + kernel/stride − 1) · across · 32 bytes of shared memory */
    rgk_mean_fwd(rg_dtype t))
RGK_GETTER(rgk_mean_direct(void)) /* any shape, strides and kernel */
RGK_GETTER(rgk_mean_bwd(void))

#endif
