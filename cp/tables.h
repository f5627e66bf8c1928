/* cp/tables.h: which tokens a rank owns, and what that makes of sequence starts.
 *
 * T rows (the plan's capacity) are cut into 2W chunks of L = T/2W. A rank owns two of them, its
 * slots; slot 0 is the earlier one:
 *
 *     mode 1   rank r: chunks 2r, 2r + 1               0 0 1 1 2 2 3 3
 *     mode 2   rank r: chunks r, 2W - 1 - r            0 1 2 3 3 2 1 0
 *
 * A chunk's place is its index in rank-major order: 2·rank + slot. Live tokens are a prefix of the
 * rows, so a rank's slot 1 has live ones only where its slot 0 is full: both slots end to end are a
 * pack, too.
 *
 * Pure functions of sequence starts that obey the rules; they allocate nothing. The arithmetic of
 * an entry is in kernels/cp.h, which fills the same tables on a device.
 */
#ifndef RGI_CP_TABLES_H
#define RGI_CP_TABLES_H

#include "../graph/base.h"
#include "../kernels/cp.h"

enum { RGI_CP_MOST_RANKS = RGK_CP_MOST_RANKS };

/* Load of the busiest rank. cu [nseq+1]; capacity is a multiple of 2·ranks. */
int64_t rgi_cp_load(rg_cp_mode mode, const int32_t *cu, int64_t nseq, int64_t capacity, int ranks);
/* `mode` itself, or for RG_CP_AUTO the one whose busiest rank has less to do (mode 1 where
 * equal). */
rg_cp_mode rgi_cp_choose(rg_cp_mode mode, const int32_t *cu, int64_t nseq, int64_t capacity,
                         int ranks);

/* The pieces of sequences in rows [lo, hi): their starts, counted from lo, in starts [nseq+1], and
 * the position of each one's first token in pos [nseq] (0 where the sequence begins here or
 * later). */
void rgi_cp_pieces(const int32_t *cu, int64_t nseq, int64_t lo, int64_t hi, int32_t *starts,
                   int32_t *pos);

/* What a block-wise op takes for the blocks that start in a chunk, out of rows [first, last), which
 * are those of the chunk and those before and after it that its blocks reach: starts [nseq+2],
 * counted from `first`. Piece 0 are tokens before the first block of the sequence that runs at
 * `first`, fewer than `stride`, or rows before the batch's first; piece b+1 is of sequence b.
 * `first` is a multiple of stride, and may lie below 0. */
void rgi_cp_blocks(const int32_t *cu, int64_t nseq, int64_t first, int64_t last, int64_t stride,
                   int32_t *starts);

/* Keys for the queries in rows [lo, hi), out of rows [lo - left, hi): starts [nseq+1] of the
 * sequences there, counted from lo - left, and in pos [nseq] the position of each one's first query
 * among those keys. A sequence that runs at lo - left begins at its next multiple of `tile`. */
void rgi_cp_window(const int32_t *cu, int64_t nseq, int64_t lo, int64_t hi, int64_t left,
                   int64_t tile, int32_t *starts, int32_t *pos);

#endif
