/* kernels/cp.h: who owns which rows of a batch shared out among ranks, and what that makes of
 * sequence starts: the arithmetic of ../cp/tables.h, entry by entry, for the host and for kernels,
 * and the kernels that fill whole tables with it. */
#ifndef RGK_CP_H
#define RGK_CP_H

#include "kernels.h"

enum { RGK_CP_MOST_RANKS = 1024 };

RGK_BOTH int64_t rgk_cp_chunk(int mode, int64_t ranks, int64_t rank, int64_t slot) {
  return mode == RG_CP_ZIGZAG && slot ? 2 * ranks - 1 - rank
         : mode == RG_CP_ZIGZAG       ? rank
                                      : 2 * rank + slot;
}
RGK_BOTH int64_t rgk_cp_place(int mode, int64_t ranks, int64_t chunk) {
  if (mode != RG_CP_ZIGZAG) return chunk;
  return chunk < ranks ? 2 * chunk : 2 * (2 * ranks - 1 - chunk) + 1;
}

RGK_BOTH int64_t rgk_clamp(int64_t x, int64_t least, int64_t most) {
  return x < least ? least : x > most ? most : x;
}

/* A query's work: the keys that it can see, and this much for its share of everything that does not
 * grow with the sequence (selected blocks, windows, projections). */
enum { RGK_CP_TOKEN_LOAD = 1024 };

/* Of positions first … first + n - 1 of a sequence: position i sees i + 1 keys. */
RGK_BOTH int64_t rgk_cp_work(int64_t first, int64_t n) {
  return n * first + n * (n + 1) / 2 + n * RGK_CP_TOKEN_LOAD;
}

/* cp_pieces: start of an entry, and position of the first row of a sequence that starts at `begin`,
 * in rows [lo, hi). */
RGK_BOTH int32_t rgk_cp_piece(int64_t begin, int64_t lo, int64_t hi) {
  return (int32_t)(rgk_clamp(begin, lo, hi) - lo);
}
RGK_BOTH int32_t rgk_cp_position(int64_t begin, int64_t lo) {
  return begin < lo ? (int32_t)(lo - begin) : 0;
}

/* cp_blocks, of rows [first, last): the gap before the next block of a sequence [begin, end) that
 * runs at `first`, and the start of an entry behind it. */
RGK_BOTH int64_t rgk_cp_gap(int64_t begin, int64_t end, int64_t first, int64_t stride) {
  const int64_t past = (first - begin) % stride;
  return rgk_clamp(past ? stride - past : 0, 0, end - first);
}
RGK_BOTH int32_t rgk_cp_block(int64_t begin, int64_t gap, int64_t first, int64_t last) {
  return (int32_t)(begin < first + gap ? gap : rgk_clamp(begin, first, last) - first);
}

/* cp_window: where keys of a sequence [begin, end) that runs at `first` are read from; an entry's
 * start counted from `first`; the position of the first query of a sequence whose keys start at row
 * `from`. */
RGK_BOTH int64_t rgk_cp_keys(int64_t begin, int64_t end, int64_t first, int64_t tile) {
  return rgk_clamp(begin + (first - begin + tile - 1) / tile * tile, first, end);
}
RGK_BOTH int32_t rgk_cp_key(int64_t begin, int64_t from, int64_t hi, int64_t first) {
  return (int32_t)(rgk_clamp(begin, from, hi > from ? hi : from) - first);
}
RGK_BOTH int32_t rgk_cp_query(int64_t end, int64_t from, int64_t lo) {
  return end > lo && from < lo ? (int32_t)(lo - from) : 0;
}

/* ---- kernels: one block of RGK_CP_THREADS each ---- */

enum { RGK_CP_THREADS = 1024, RGK_CP_SLOTS = 2 };

/* cu [nseq + 1] as bound: entries past `rows` count as `rows`. mode 0: the one whose busiest rank
 * has less to do. starts, pos: of slot 0, slot 1, both. */
typedef struct rgk_cp_rows_params {
  const int32_t *cu;
  int64_t nseq, rows;
  int32_t ranks, rank, mode, zero;
  int32_t *order, *starts[RGK_CP_SLOTS + 1], *pos[RGK_CP_SLOTS + 1];
} rgk_cp_rows_params;
RGK_GETTER(rgk_cp_rows(void))

/* For the chunks whose places in `order` are this rank's, with `left` rows before and `right` after
 * them: what ../cp/tables.h says. Blocks: pos NULL, unit is their stride; windows: a tile. */
typedef struct rgk_cp_chunks_params {
  const int32_t *cu, *order;
  int64_t nseq, rows, left, right, unit;
  int32_t ranks, rank;
  int32_t *starts[RGK_CP_SLOTS], *pos[RGK_CP_SLOTS];
} rgk_cp_chunks_params;
RGK_GETTER(rgk_cp_blocks(void))
RGK_GETTER(rgk_cp_window(void))

/* Counts a collective as begun or ended, for the host: stamp {begun, ended, name of the last}. One
 * thread. */
typedef struct rgk_cp_stamp_params {
  int32_t *stamp;
  int32_t ends, name;
} rgk_cp_stamp_params;
RGK_GETTER(rgk_cp_stamp(void))

#endif
