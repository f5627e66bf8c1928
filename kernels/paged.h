/* kernels/paged.h: what a serving step does to its caches: its numbers looked at, rows into pages,
 * blocks compressed, pages copied. */
#ifndef RGK_PAGED_H
#define RGK_PAGED_H

#include "attn/attn.h"
#include "gemm.h"
#include "pages.h"

/* ---- paged_batch: a block of threads for each sequence, one at least ---- */

enum { RGK_BATCH_THREADS = 256 };
/* Faults: {which, sequence, number, another}. */
enum {
  RGK_BATCH_CONTEXT = 1, /* the context */
  RGK_BATCH_LENGTH,      /* the length, the context */
  RGK_BATCH_ROWS,        /* the length, the rows left */
  RGK_BATCH_PAGE         /* the page's number, where in the table */
};
typedef struct rgk_batch {
  rgk_pages pages; /* as they are given; caches are not looked at */
  const int32_t *lengths;
  int64_t lengths_step, rows, n; /* rows there are, sequences */
  int32_t *starts, *offset, *context, *last, *table;
  int64_t table_row;
  rgk_fault fault;
} rgk_batch;
RGK_GETTER(rgk_paged_batch(void))

/* ---- kv_append: a warp for each row ---- */

enum { RGK_APPEND_THREADS = 256 };
typedef struct rgk_append {
  rgk_seqs seqs;
  rgk_pages pages; /* of the caches */
  rgk_tensor k, v, k_cache, v_cache;
  int32_t heads, D, E;
  rgk_divisor by_tokens; /* a page's */
  bool k_vec, v_vec;     /* 16 bytes at a time, and of one type */
} rgk_append;
RGK_GETTER(rgk_kv_append(void))

/* ---- kv_compress ----
 *
 * A sequence's new blocks are found at slots of `stride` rows of the step (rgk_slots): i-th slot of
 * a sequence, i-th block, for n new tokens complete n / stride blocks, rounded up, at most. */

typedef struct rgk_new_blocks {
  rgk_seqs seqs;
  rgk_pages pages; /* of the tokens; `before` is that of the compressed rows, R = page / stride */
  int32_t kernel, stride;
  rgk_divisor by_stride, by_tokens, by_rows;
} rgk_new_blocks;

/* Means: blocks of threads take turns with the slots there are; side blockIdx.y, eight features a
 * thread. */
enum { RGK_PAGED_MEAN_THREADS = 128, RGK_PAGED_MEAN_GROUP = 16 };
typedef struct rgk_paged_side {
  rgk_tensor x, y;        /* pages of tokens, of compressed rows */
  int64_t x_page, y_page; /* from page to page */
  int32_t heads, width;
} rgk_paged_side;
typedef struct rgk_paged_mean {
  rgk_new_blocks blocks;
  bool vec;
  float scale; /* 1/kernel */
  rgk_paged_side side[2];
} rgk_paged_mean;
RGK_GETTER(rgk_paged_means(void))
/* kv_append and these in one launch: this step's tokens are read from its rows. Grid: as means,
 * side 2 appends. Of 16-bit types, two groups of RGK_PAGED_MEAN_GROUP tokens at most a block, all
 * in vectors. */
typedef struct rgk_append_means {
  rgk_append append;
  rgk_paged_mean mean;
} rgk_append_means;
RGK_GETTER(rgk_kv_append_means(void))

/* A learned method: the tokens of each slot's block, side by side, and a row of the product's
 * table; afterwards what the product gave to its page. Head blockIdx.y. */
enum { RGK_MOVE_THREADS = 128 };
typedef struct rgk_paged_move {
  rgk_new_blocks blocks;
  rgk_paged_side side;
  int64_t slots;       /* that there is room for */
  void *room;          /* [slots, heads, kernel, width]; on the way back [slots, heads, width] */
  rgk_gemm_row *table; /* [slots] */
  bool vec, back;
} rgk_paged_move;
RGK_GETTER(rgk_paged_move_blocks(void))

/* ---- page_copy ----
 *
 * A long list is looked at by one block of threads, which writes how many pages there are to copy,
 * and which: none where anything is wrong. A short one is looked at by all blocks that copy. */

enum { RGK_COPY_THREADS = 256, RGK_COPY_CACHES = 16, RGK_COPY_SHORT = 64 };
/* Faults: {which, entry, number, …}; none is paged_batch's. */
enum {
  RGK_COPY_PAGE = RGK_BATCH_PAGE + 1, /* the page's number, and which of the two it is */
  RGK_COPY_WRITES,                    /* the page, another entry that writes it */
  RGK_COPY_READS                      /* the page, another entry that reads it */
};
typedef struct rgk_copy_list {
  const int32_t *pages;  /* [n, 2] */
  int64_t row, n, count; /* from entry to entry, entries, pages there are */
  int32_t *list;         /* {number, 0, from, to, from, to, …}; NULL: `pages` is short */
  rgk_fault fault;
} rgk_copy_list;
RGK_GETTER(rgk_check_copies(void))

/* Grid: parts of a page, pages (in turns), caches. A page's elements are walked over its axes, the
 * last one dense, in units of `unit` bytes. */
typedef struct rgk_copied {
  void *data;
  int64_t page, elements; /* from page to page, of a page; in units */
  int32_t rank, unit;
  int64_t dim[RG_MAX_RANK - 1], stride[RG_MAX_RANK - 1];
} rgk_copied;
typedef struct rgk_copies {
  rgk_copy_list list;
  rgk_copied cache[RGK_COPY_CACHES];
} rgk_copies;
RGK_GETTER(rgk_copy_pages(void))

/* Both of a short list and paged_batch in one launch. Grid: a block of threads for each sequence,
 * then parts × turns × caches as above, parts fastest. */
typedef struct rgk_copy_batch {
  rgk_batch batch;
  rgk_copies copies;
  int32_t parts, turns;
} rgk_copy_batch;
RGK_GETTER(rgk_copy_and_batch(void))

#endif
