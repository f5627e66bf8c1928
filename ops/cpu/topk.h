/* ops/cpu/topk.h: block scores of one tile of queries, the arithmetic heart of the op topk on the
   CPU.

   A tile is 32 queries of one sequence for one KV head. Queries lie across vector lanes, so that no
   result depends on where in its tile a query lies, nor on the tiles' borders:

       lane:          q0   q1   …   q31
       key j          s    s        s       one register row per key: Σ_d k[j][d]·q[d][lane],
                                            d ascending

   Promises: writes scores and scratch of the tile only; every score is a function of its own query,
   the sequence's keys and the attributes. Leaves to topk.c: which blocks are candidates, and
   choosing among them.
 */
#ifndef RGI_CPU_TOPK_H
#define RGI_CPU_TOPK_H

#include "../paged.h"

enum {
  RGI_TOPK_LANES = 32, /* queries of a tile */
  RGI_TOPK_KEYS = 60   /* keys looked at together; whole register tiles at every CPU level */
};

typedef struct rgi_topk_tile {
  int64_t d, heads;              /* of a query; query heads in the group */
  int64_t n;                     /* live lanes */
  int64_t kernel, stride, block; /* in tokens */
  bool max;                      /* a block scores its best key instead of the sum */
  /* dot: as many queries of the sequence, from a multiple on, share the sum of theirs; lane 0 is
   * number `first` of `queries` */
  int64_t share, first, queries;
  float scale, softcap; /* softcap 0: off */
  /* q[lane][head][d], through strides in elements */
  const void *q;
  int64_t q_row, q_head;
  rg_dtype dtype, k_dtype;
  /* k[key][d]: the sequence's compressed keys; in pages, key j is row `before` + j of its rows */
  const void *k;
  int64_t k_row;
  const rg_arg *cache; /* or NULL; then head `head` of these pages is read and k is not */
  const int32_t *table;
  int64_t before, head;
  const float *lse; /* [lane][head], NULL for dot */
  int64_t lse_row;
  int64_t key0, key1;                           /* the keys that matter to any choice */
  _Alignas(64) int32_t visible[RGI_TOPK_LANES]; /* lane sees keys 0 … visible-1 */
  /* scratch, 64-byte aligned */
  float *pack_q;   /* [heads, d, LANES]; dot: [d, LANES] doubles */
  float *pack_lse; /* [heads, LANES]; relu: weights of the heads */
  float *pack_k;   /* [KEYS, d] */
  float *row;      /* [4, d] */
  void *score;     /* [blocks, LANES] floats (fast) or doubles (wide, dot, relu) */
} rgi_topk_tile;

/* Scores of the blocks that keys [key0, key1) touch; blocks [block0, block1) are zeroed first.
 *   fast  float: Σ p·overlap/stride. p below e^-87 counts as nothing, above e^88 is infinite
 *   wide  double: the same times e^300, good for p from e^-1000 to e^400. After fast, of the same
 *         tile
 *   dot   double: Σ over heads of q·k for a key that the lane sees, -inf for one it does not see;
 *         keys are blocks, or a block has its best key's
 *   relu  double: the same of Σ over heads of weight·max(q·k, 0)
 * Of max, a key that is NaN counts as unseen. */
typedef struct rgi_topk_scores {
  void (*fast)(const rgi_topk_tile *t, int64_t block0, int64_t block1);
  void (*wide)(const rgi_topk_tile *t, int64_t block0, int64_t block1);
  void (*dot)(const rgi_topk_tile *t, int64_t block0, int64_t block1);
  void (*relu)(const rgi_topk_tile *t, int64_t block0, int64_t block1);
} rgi_topk_scores;

rgi_topk_scores rgi_topk_scores_for(int isa);

#endif
