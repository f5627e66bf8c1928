/* kernels/attn/gather.h: attention over selected blocks, driven by the queries, on Hopper: forward
   for large groups of heads.

   A thread block takes a tile: a few neighbouring queries of one KV head. A "unit" is 16 heads of
   one query, the rows that one warp owns of a tensor core tile. The union of the queries' blocks
   passes through a ring of stages in ascending order, each block fetched once, 64 keys a stage. A
   warpgroup works on what one of its four units selected; for the others its probabilities are
   zero. So what a row computes depends on its own blocks alone.
 */
#ifndef RGK_GATHER_H
#define RGK_GATHER_H

#include "attn.h"
#include "../pages.h"
#include "../tma.h"

enum {
  RGK_GATHER_ROWS = 16, /* of a unit */
  RGK_GATHER_KEYS = 64, /* of a stage */
  RGK_GATHER_GROUPS = 3,
  RGK_GATHER_UNITS = 4 * RGK_GATHER_GROUPS,
  RGK_GATHER_THREADS = 128 * (RGK_GATHER_GROUPS + 1),
  RGK_GATHER_MOST_STAGES = 14
};

typedef struct rgk_gather {
  rgk_map q, k, v;
  rgk_attn a;
  int32_t slots, tiles; /* tiles of queries; times KV heads and parts */
  int32_t queries, per; /* of a tile; units a query has in it */
  int32_t parts;        /* tiles a query is cut into */
  /* KV heads (times parts) that are worked on side by side, a divisor of their number */
  int32_t side;
} rgk_gather;

/* The same over pages: a stage's keys lie in one page. k, v are maps of (width, head, row, page);
 * kseqs and offset are not looked at. Of numbers that don't go together the lengths count as no
 * tokens; a page that is none has rows of zeros. */
typedef struct rgk_gather_paged {
  rgk_gather g;
  rgk_pages pages;
} rgk_gather_paged;

/* Shared memory: stages of K and V, each warpgroup's rows of q, as panels of 64
 * columns; labels and barriers. */
enum {
  RGK_GATHER_EXTRA = 3072,
  RGK_GATHER_SHARED = 227 * 1024,
  RGK_GATHER_PANEL = 128 * RGK_GATHER_KEYS
};
#define RGK_GATHER_PANELS(d)   (((d) + 63) / 64)
#define RGK_GATHER_STAGE(D, E) (RGK_GATHER_PANEL * (RGK_GATHER_PANELS(D) + RGK_GATHER_PANELS(E)))
#define RGK_GATHER_Q(D)        (RGK_GATHER_GROUPS * RGK_GATHER_PANEL * RGK_GATHER_PANELS(D))
#define RGK_GATHER_FIT(D, E) \
  ((RGK_GATHER_SHARED - RGK_GATHER_EXTRA - RGK_GATHER_Q(D)) / RGK_GATHER_STAGE(D, E))
#define RGK_GATHER_STAGES(D, E) \
  (RGK_GATHER_FIT(D, E) < RGK_GATHER_MOST_STAGES ? RGK_GATHER_FIT(D, E) : RGK_GATHER_MOST_STAGES)
#define RGK_GATHER_BYTES(D, E) \
  (RGK_GATHER_STAGES(D, E) * RGK_GATHER_STAGE(D, E) + RGK_GATHER_Q(D) + RGK_GATHER_EXTRA)

/* NULL where there is no such instance. */
RGK_GETTER(rgk_gather_fwd(rg_dtype t, int32_t D, int32_t E, bool paged))

#endif
