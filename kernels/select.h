/* kernels/select.h: attention over selected blocks, driven by the keys, on Hopper.
 *
 * The selection is inverted (csr.h), and a block's list of queries is cut into items. One thread block takes
 * an item: it holds 64 keys of the block (a "part"; a longer block has several) in shared memory and gathers
 * the rows (query, head of the group) of the item's queries, 64 at a time, into full tensor core tiles.
 *
 *   forward   o and lse over these keys alone go to a partial store, one place per (query, entry of idx,
 * part); `reduce` merges a query's partials in the order of its entries. d.q       the same, summed. d.k, d.v
 * accumulate over an item's rows in registers. A list of several items leaves fp32 sums that `keys_sum` adds
 * in order.
 *
 * The partial store has room for a window of rows of the pack; windows follow one another. How rows fall into
 * windows, items and tiles changes no bit of o and d.q, since each row of a tile is computed by itself; items
 * of d.k and d.v start at fixed places of a block's own list. So nothing depends on other sequences.
 */
#ifndef RGK_SELECT_H
#define RGK_SELECT_H

#include "attn.h"
#include "csr.h"

enum { RGK_SELECT_KEYS = 64, RGK_SELECT_THREADS = 128, RGK_SELECT_SCAN = 1024, RGK_SELECT_REDUCE = 256 };

/* Entries [first, first + count) of a head's rows are queries of block `slot`. */
typedef struct rgk_select_item {
  int32_t slot;
  uint32_t first;
  int32_t count;
  int32_t sum; /* d.k, d.v: which fp32 sum it leaves, -1: it is the only item of its list */
} rgk_select_item;

typedef struct rgk_select {
  rgk_attn a;
  rgk_csr csr;
  int32_t parts;            /* of RGK_SELECT_KEYS keys in a block */
  int32_t head, heads;      /* KV heads [head, head + heads) */
  int64_t row, rows;        /* the window, rows of the pack: */
  int64_t chunk, chunk_end; /* … these chunks of csr */
  int32_t length;           /* most queries of an item */
  bool all;                 /* items of lists that are empty too, and sums */
  int64_t cap;              /* of items per head */
  rgk_select_item *item;    /* [heads, cap] */
  int32_t *items;           /* [heads] */
  int32_t *sum;             /* [heads, slots]: first sum of a list of several items, else -1 */
  int64_t sums;             /* capacity per head */
  float *sum_k, *sum_v;     /* [heads, sums, parts, KEYS * D], * E, in the order of the accumulators */
  /* [heads, rows, N, parts, G, E or D] in the order of the accumulators: o in q's type; d.q in bf16, or fp32
   * where q is f16 */
  void *part;
  float *part_lse; /* [heads, rows, N, parts, G] base 2 */
  float *stat;     /* [T, H, 2]: lse in base 2, and rowsum(o * d_o) - d_lse */
} rgk_select;

RGK_GETTER(rgk_select_items(void))           /* grid heads */
RGK_GETTER(rgk_select_reduce(rg_dtype t))    /* grid over rows * G * E / 8 threads, heads */
RGK_GETTER(rgk_select_reduce_dq(rg_dtype t)) /* rows * G * D / (16 bytes of part), heads */
RGK_GETTER(rgk_select_sinks(void))           /* grid H, RGK_SELECT_SCAN threads */
RGK_GETTER(rgk_select_stat(rg_dtype t))      /* grid over T * H warps */
RGK_GETTER(rgk_select_stat_given(void))      /* grid over T * H threads; delta is given */
/* Instances: NULL where there is none. grid cap, parts, heads */
RGK_GETTER(rgk_select_fwd(rg_dtype t, int32_t D, int32_t E))
RGK_GETTER(rgk_select_dq(rg_dtype t, int32_t D, int32_t E))
RGK_GETTER(rgk_select_dkv(rg_dtype t, int32_t D, int32_t E))
RGK_GETTER(rgk_select_keys_sum(rg_dtype t, int32_t D, int32_t E)) /* grid slots, parts, heads */

/* Shared memory of the instances: tiles are panels of 64 columns, rows of 128 bytes. */
static inline uint32_t rgk_select_tile(int32_t rows, int32_t width) {
  return (uint32_t)(rows * 128 * ((width + 63) / 64));
}
/* Rows of a tile of d.k and d.v, and warpgroups that share its columns: what the registers allow. */
static inline int32_t rgk_select_dkv_rows(int32_t D, int32_t E) {
  return D > 128 && D + E < 512 ? 32 : 64;
}
static inline int32_t rgk_select_dkv_groups(int32_t D, int32_t E) {
  return D + E >= 512 ? 2 : 1;
}
enum { RGK_SELECT_META = 8192 + 1024 }; /* row tables, and slack for alignment */
static inline uint32_t rgk_select_shared_fwd(int32_t D, int32_t E) {
  return rgk_select_tile(64, D) * 3 + rgk_select_tile(64, E) + RGK_SELECT_META;
}
static inline uint32_t rgk_select_shared_dq(int32_t D, int32_t E) {
  return (rgk_select_tile(64, D) + rgk_select_tile(64, E)) * 3 + RGK_SELECT_META;
}
static inline uint32_t rgk_select_shared_dkv(int32_t D, int32_t E) {
  const int32_t rows = rgk_select_dkv_rows(D, E);
  return rgk_select_tile(64, D) + rgk_select_tile(64, E) +
         2 * (rgk_select_tile(rows, D) + rgk_select_tile(rows, E)) + RGK_SELECT_META;
}

#endif
