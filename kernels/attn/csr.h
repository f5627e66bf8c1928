/* kernels/attn/csr.h: for each block of keys the queries that selected it: idx inverted by a
 * counting sort. */
#ifndef RGK_CSR_H
#define RGK_CSR_H

#include "../kernels.h"

/* Block j of sequence b has number floor(kseqs.starts[b] / block) + b + j, as rgk_slots counts. A
 * block's list holds the rows of the pack whose row of idx has the block as an entry that counts
 * (see attn.h) and that stand at or after the block's first key, in ascending order. */
typedef struct rgk_csr {
  rgk_tensor idx; /* [T, KH, N] i32 */
  rgk_seqs seqs, kseqs;
  const int32_t *offset; /* [n] or NULL */
  int64_t T;
  int32_t KH, N, block;
  int64_t slots; /* rgk_slots(kseqs.rows, kseqs.n, block) */
  /* out */
  /* [KH, slots + 1]: head h's list of block s is [start[s], start[s + 1]) of its rows */
  int64_t *start;
  int32_t *rows;    /* [KH, T * N] */
  uint16_t *places; /* the same shape: which entry of its row it was; NULL: not wanted */
  /* between the steps */
  int32_t chunk;  /* rows of a chunk, a multiple of 32 */
  int64_t chunks; /* of all T rows */
  /* [KH, chunks, slots]: entries of a chunk, then of all chunks before it, after scatter of both */
  int32_t *count;
  /* rows of more than RGK_CSR_FEW entries: parts of 2^part slots */
  int32_t *bound; /* [KH, T, parts + 1] */
  int32_t parts, part;
} rgk_csr;

enum {
  RGK_CSR_THREADS = 256,
  RGK_CSR_SCAN_THREADS = 1024,
  RGK_CSR_FEW = 32,
  RGK_CSR_MANY_ROWS = 256, /* of a chunk, and threads */
  RGK_CSR_RANGE = 8,       /* 2^that slots at a time */
  RGK_CSR_PARTS = 32       /* at most, if rows have no more than 16 entries for each */
};

/* Few entries: count, columns, starts, scatter. Many: bounds, tally, columns, starts, put. */
RGK_GETTER(rgk_csr_count(void))   /* grid KH * chunks, RGK_CSR_THREADS */
RGK_GETTER(rgk_csr_columns(void)) /* grid over KH * slots lanes, 32 a block, RGK_CSR_SCAN_THREADS */
RGK_GETTER(rgk_csr_starts(void))  /* grid KH, RGK_CSR_SCAN_THREADS */
RGK_GETTER(rgk_csr_scatter(void)) /* grid over KH * chunks warps, 32 threads */
RGK_GETTER(rgk_csr_bounds(void))  /* a warp a row: grid over KH * T, RGK_CSR_THREADS */
RGK_GETTER(rgk_csr_tally(void))   /* grid KH * parts * chunks, RGK_CSR_MANY_ROWS */
RGK_GETTER(rgk_csr_put(void))     /* the same */

#endif
