/* kernels/attn/select.h: attention over selected blocks, driven by the keys, on Hopper.
 *
 * The selection is inverted (csr.h), and a block's list of queries is cut into items. One thread block takes
 * an item: it holds 64 keys of the block (a "part"; a longer block has several) in shared memory and gathers
 * the rows (query, head of the group) of the item's queries, 64 at a time, into full tensor core tiles.
 *
 *   forward   o and lse over these keys alone go to a partial store, one place per (query, entry of idx,
 *             part); `reduce` merges a query's partials in the order of its entries
 *   backward  d.q likewise. d.k and d.v accumulate over an item's rows in registers; a block's items add up
 *             in an fp32 sum in memory, each waiting for its turn. Many items of one list and window would
 *             wait long: they add to several sums, which `bwd_reduce` adds to the block's
 *
 * The partial store has room for a window of rows of the pack; windows follow one another. How rows fall into
 * windows, items and tiles changes no bit of o and d.q, since each row of a tile is computed by itself.
 *
 * d.k and d.v are sums over items, so what an item is depends on its sequence alone: a sequence is cut into
 * steps of `step` rows, a list at the steps, and each piece into items of `length` queries. A window of
 * backward (`bound`) holds one step of a sequence, or as many short sequences as fit. Items begin in an order
 * in which all lists are worked off evenly: rows gathered for one are then found in L2 by others.
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
  int32_t sum;  /* that it adds to */
  int32_t turn; /* items of the window that add to it before */
  int32_t is;
} rgk_select_item;

/* The first thing added to its sum; the end of its list, which goes to d.k and d.v; others wait to add. */
enum { RGK_SELECT_FIRST = 1, RGK_SELECT_LAST = 2, RGK_SELECT_MORE = 4 };

/* What a list has in a window of backward: entries [first, first + count), and so many items. Up to CHAIN
 * items add to the list's own sum; more of them to sums `extra` …, each CHAIN items to one. */
typedef struct rgk_select_span {
  int32_t first, count, items, extra;
} rgk_select_span;
enum { RGK_SELECT_CHAIN = 8 };

typedef struct rgk_select {
  rgk_attn a;
  rgk_csr csr;
  int32_t parts;            /* of RGK_SELECT_KEYS keys in a block */
  int32_t head, heads;      /* KV heads [head, head + heads) */
  int64_t row, rows;        /* forward: the window, rows of the pack; backward: rows is its capacity */
  int64_t chunk, chunk_end; /* forward: these chunks of csr */
  int32_t length;           /* most queries of an item */
  int32_t along, across;    /* a tile's rows / G, and what is left over */
  int64_t cap;              /* of items per head */
  rgk_select_item *item;    /* [heads, cap] */
  int32_t *items;           /* [heads] */
  /* backward */
  int64_t step;
  int32_t window, windows;
  int64_t *bound;        /* [windows + 1]: rows [bound[w], bound[w + 1]) of the pack */
  rgk_select_span *span; /* [heads, slots] */
  int32_t *ticket;       /* [heads, parts]: items begun */
  int64_t key_blocks;    /* slots * parts, or 0: no d.k and d.v */
  int64_t sums;          /* per head: one a slot, then the extra ones */
  int32_t *turn;         /* [heads, sums, parts]: items of the window that have added to it */
  float *sum_k, *sum_v;  /* [heads, sums, parts, KEYS * D], * E, in the order of the accumulators */
  /* [heads, rows, N, parts, G, E or D] in the order of the accumulators: o in q's type; d.q in bf16, or fp32
   * where q is f16 */
  void *part;
  float *part_lse; /* [heads, rows, N, parts, G] base 2 */
  float *stat;     /* [T, H, 2]: lse in base 2, and rowsum(o * d_o) - d_lse */
} rgk_select;

RGK_GETTER(rgk_select_items(void))        /* grid heads, RGK_SELECT_SCAN threads */
RGK_GETTER(rgk_select_bounds(void))       /* one thread */
RGK_GETTER(rgk_select_bwd_items(void))    /* grid heads, RGK_SELECT_SCAN threads */
RGK_GETTER(rgk_select_reduce(rg_dtype t)) /* grid over rows * G * E / 8 threads, heads */
/* grid key_blocks, and blocks over rows * G * D / (16 bytes of part) threads; heads */
RGK_GETTER(rgk_select_bwd_reduce(rg_dtype t))
RGK_GETTER(rgk_select_sinks(void))      /* grid H, RGK_SELECT_SCAN threads */
RGK_GETTER(rgk_select_stat(rg_dtype t)) /* grid over T * H * RGK_SELECT_LANES threads */
RGK_GETTER(rgk_select_stat_given(void)) /* grid over T * H threads; delta is given */
/* Instances: NULL where there is none. grid cap, parts, heads */
RGK_GETTER(rgk_select_fwd(rg_dtype t, int32_t D, int32_t E))
RGK_GETTER(rgk_select_bwd(rg_dtype t, int32_t D, int32_t E))

/* Shared memory of the instances: tiles are panels of 64 columns, rows of 128 bytes. */
static inline uint32_t rgk_select_tile(int32_t rows, int32_t width) {
  return (uint32_t)(rows * 128 * ((width + 63) / 64));
}
/* Rows of a tile of backward, and warpgroups that share its columns: what the registers allow. */
static inline int32_t rgk_select_bwd_rows(int32_t D, int32_t E) {
  return D > 128 && D + E < 512 ? 32 : 64;
}
static inline int32_t rgk_select_bwd_groups(int32_t D, int32_t E) {
  return D + E >= 512 ? 2 : 1;
}
enum { RGK_SELECT_META = 8192 + 1024 }; /* row tables, and slack for alignment */
static inline uint32_t rgk_select_shared_fwd(int32_t D, int32_t E) {
  return rgk_select_tile(64, D) * 3 + rgk_select_tile(64, E) + RGK_SELECT_META;
}
static inline uint32_t rgk_select_shared_bwd(int32_t D, int32_t E) {
  const int32_t rows = rgk_select_bwd_rows(D, E);
  return rgk_select_tile(64, D) + rgk_select_tile(64, E) + rgk_select_tile(64, 64) +
         2 * (rgk_select_tile(rows, D) + rgk_select_tile(rows, E)) + RGK_SELECT_META;
}

#endif
