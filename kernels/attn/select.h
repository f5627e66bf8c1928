/* kernels/attn/select.h: attention over selected blocks, driven by the keys, on Hopper.

   The selection is inverted (csr.h), and a block's list of queries is cut into items. One thread
   block takes an item: it holds 64 keys of the block (a "part"; a longer block has several) in
   shared memory and gathers the rows (query, head of the group) of the item's queries, 64 at a
   time, into full tensor core tiles.

     forward   o and lse over these keys alone go to a partial store, one place per (query, entry of
               idx, part); `reduce` merges a query's partials in the order of its entries
     backward  d.q likewise. d.k and d.v accumulate over an item's rows in registers; a block's
               items add up in an fp32 sum in memory, each waiting for its turn

   Forward's partial store has room for a window of rows of the pack; windows follow one another.
   How rows fall into windows, items and tiles changes no bit of o and d.q, since each row of a tile
   is computed by itself.

   d.k and d.v are sums over items, so what an item is depends on its sequence alone: a sequence is
   cut into steps, a quarter of it each or `longest` rows, a list at the steps, and each piece into
   items of `length` queries, or, where short steps would have too few, of a sixteenth of a step,
   at least `least`. A block's items add to its sums in the order of its list.

   Backward is one launch of thread blocks that stay. Its jobs are taken in order, segment by
   segment:

     segment i   the items of window i (windows of a head, then of the next: whole steps, `rows`
                 rows at most), and among them jobs that merge partials of rows of earlier windows
     store       a ring of `store` rows, at least two windows: rows are numbered across heads, row r
                 is at r % store. Segment i merges what lies more than half a store back, so the
                 room it leaves is there in segment i + 1, and those who merge seldom wait for items
                 still on their way

   A job waits only for jobs that were taken before it: whatever runs, something can go on.
 */
#ifndef RGK_SELECT_H
#define RGK_SELECT_H

#include "attn.h"
#include "csr.h"

enum {
  RGK_SELECT_KEYS = 64,
  RGK_SELECT_THREADS = 128,
  RGK_SELECT_SCAN = 1024,
  RGK_SELECT_REDUCE = 256,
  RGK_SELECT_LANES = 16
};

/* Entries [first, first + count) of a head's rows are queries of block `slot`. */
typedef struct rgk_select_item {
  int32_t slot;
  uint32_t first;
  int32_t count;
  /* backward: */
  /* entries of its block's lists, of earlier heads too, that are added to its sums before it */
  int32_t before;
  int32_t is;
} rgk_select_item;

/* The first of its list; the last, which goes to d.k and d.v. */
enum { RGK_SELECT_FIRST = 1, RGK_SELECT_LAST = 2 };

typedef struct rgk_select {
  rgk_attn a;
  rgk_csr csr;
  int32_t parts;       /* of RGK_SELECT_KEYS keys in a block */
  int32_t head, heads; /* KV heads [head, head + heads) */
  /* forward: the window, rows of the pack; backward: rows of a window at most */
  int64_t row, rows;
  int64_t chunk, chunk_end; /* forward: these chunks of csr */
  int32_t length, least;    /* most queries of an item; backward: of one of a short step */
  int32_t along, across;    /* a tile's rows / G, and what is left over */
  int64_t cap;              /* of items per head; backward: and window */
  rgk_select_item *item;    /* [heads, cap]; backward: [heads, windows, cap] */
  int32_t *items;           /* [heads]; backward: [heads, windows] */
  /* backward */
  int64_t longest, store;  /* rows: of a step, of the partial store */
  int32_t window, windows; /* this launch is about windows [window, window + windows) */
  int32_t bounds;          /* windows there are */
  int64_t *bound;          /* [bounds + 1]: window w is rows [bound[w], bound[w + 1]) of the pack */
  uint32_t *begun;         /* [1]: jobs */
  uint32_t *done;          /* [heads, windows]: items */
  uint32_t *merged;        /* [heads * windows + 1]: jobs that merge, of a segment */
  uint32_t *turn;          /* [slots, parts]: entries that are added to a block's sums */
  float *sum_k, *sum_v;    /* [slots, parts, KEYS * D], * E, in the order of the accumulators */
  /* [heads, rows, N, parts, G, E] or [store, N, parts, G, D] in the order of the accumulators: o in
   * q's type; d.q in bf16, or fp32 where q is f16 */
  void *part;
  float *part_lse; /* [heads, rows, N, parts, G] base 2 */
  float *stat;     /* [T, H, 2]: lse in base 2, and rowsum(o * d_o) - d_lse */
} rgk_select;

RGK_GETTER(rgk_select_items(void))        /* grid heads, RGK_SELECT_SCAN threads */
RGK_GETTER(rgk_select_bwd_items(void))    /* grid windows, heads; RGK_SELECT_SCAN threads */
RGK_GETTER(rgk_select_reduce(rg_dtype t)) /* grid over rows * G * E / 8 threads, heads */
RGK_GETTER(rgk_select_sinks(void))        /* grid H, RGK_SELECT_SCAN threads */
/* Statistics of rows and the windows' bounds: one block, and blocks over T * H * RGK_SELECT_LANES
 * threads, or T * H where delta is given. */
RGK_GETTER(rgk_select_stat(rg_dtype t))
RGK_GETTER(rgk_select_stat_given(void))
/* Instances: NULL where there is none. Forward: grid cap, parts, heads. Backward: any grid, best as
 * many blocks as run at once */
RGK_GETTER(rgk_select_fwd(rg_dtype t, int32_t D, int32_t E))
RGK_GETTER(rgk_select_bwd(rg_dtype t, int32_t D, int32_t E))

/* Shared memory of the instances, which hold their structs against it: tiles are panels of 64
 * columns, rows of 128 bytes. */
RGK_BOTH uint32_t rgk_select_tile(int32_t rows, int32_t width) {
  return (uint32_t)(rows * 128 * ((width + 63) / 64));
}
/* Rows of a tile of backward, and warpgroups that share its columns: what the registers allow. */
RGK_BOTH int32_t rgk_select_bwd_rows(int32_t D, int32_t E) {
  return D > 128 && D + E < 512 ? 32 : 64;
}
RGK_BOTH int32_t rgk_select_bwd_groups(int32_t D, int32_t E) {
  return D + E >= 512 ? 2 : 1;
}
enum {
  RGK_SELECT_META = 8192 + 1024, /* row tables, and slack for alignment */
  RGK_SELECT_BWD_META = 6144     /* the same of backward, and barriers */
};
RGK_BOTH uint32_t rgk_select_shared_fwd(int32_t D, int32_t E) {
  return rgk_select_tile(64, D) * 3 + rgk_select_tile(64, E) + RGK_SELECT_META;
}
RGK_BOTH uint32_t rgk_select_shared_bwd(int32_t D, int32_t E) {
  const int32_t rows = rgk_select_bwd_rows(D, E);
  return rgk_select_tile(64, D) + rgk_select_tile(64, E) + rgk_select_tile(64, 64) +
         2 * (rgk_select_tile(rows, D) + rgk_select_tile(rows, E)) + RGK_SELECT_BWD_META;
}
/* Thread blocks of backward on a multiprocessor, and their threads: the last warpgroup loads. */
RGK_BOTH int32_t rgk_select_bwd_blocks(int32_t D, int32_t E) {
  return D + E > 320 ? 1 : 2;
}
RGK_BOTH uint32_t rgk_select_bwd_threads(int32_t D, int32_t E) {
  return (uint32_t)(RGK_SELECT_THREADS * (rgk_select_bwd_groups(D, E) + 1));
}

#endif
