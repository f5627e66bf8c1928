/* kernels/attn/topk.h: one call of the op topk, as its kernels see it. */
#ifndef RGK_TOPK_H
#define RGK_TOPK_H

#include "../pages.h"
#include "../tma.h"

/* Sequences, compressed keys and positions as in attn.h's CMP. A row [t, kh] of idx: the first
 * `init` and the last `local` blocks up to the query's own and the best of those between,
 * ascending, then -1; rows past the last live token 0. Kernels that rank by fp32 sums mark a row
 * whose choice fp32 cannot decide with RGK_TOPK_UNDECIDED in its first entry; the plain kernel's
 * `wide` pass, which must follow, ranks those by fp64 sums. */
typedef struct rgk_topk {
  int32_t dtype, H, KH, G, D;
  rgk_seqs seqs, kseqs; /* of queries; of keys, in tokens */
  const int32_t *offset;
  int64_t T, S; /* rows of q, of k */
  float scale, softcap;
  int32_t kernel, stride, block;
  int32_t top_n, init, local, score; /* RGK_TOPK_BY_… */
  int32_t share;                     /* queries that choose alike, of score dot */
  bool max, tail;                    /* pool is max; the own block is kept while partial */
  rgk_tensor q, k, lse, weight, idx; /* weight [T, H], of score relu; absent: all 1 */
  bool aligned;                      /* q and k start on, and step by, multiples of 16 bytes */
  int64_t slots;                     /* of tiles, whose size is the kernel's own */
  int32_t stages;                    /* Hopper: tiles of keys in flight */
  int32_t chunk;                     /* plain: blocks whose scores are made together */
  int64_t most_keep;                 /* no row ranks for more places than this */
  float *sums;                       /* plain: [T, KH, D] that take the place of q, share > 1 */
  uint64_t *heap; /* plain: [grid, most_keep, RGK_TOPK_ROWS], or NULL: in shared memory */
} rgk_topk;

enum { RGK_TOPK_BY_SOFTMAX, RGK_TOPK_BY_DOT, RGK_TOPK_BY_RELU }; /* as topk's choices */
enum { RGK_TOPK_UNDECIDED = -2 };

/* What the query at `position`, in block `own`, may choose from, on any device: blocks [0, free0)
 * and [free1, count) are kept anyhow, `keep` of those between. Without `local` the own block is a
 * candidate once it is complete; `tail` keeps it until then. */
typedef struct rgk_topk_choice {
  int64_t free0, free1, count, keep;
} rgk_topk_choice;
RGK_BOTH rgk_topk_choice rgk_topk_choose(int64_t position, int64_t own, int32_t block, int32_t init,
                                         int32_t local, bool tail, int32_t top_n) {
  const bool partial = local == 0 && position + 1 < (own + 1) * block;
  const int64_t count = own + (partial && !tail ? 0 : 1),
                first = count - (partial && tail ? 1 : local), free0 = init < count ? init : count,
                free1 = first > free0 ? first : free0, kept = top_n < count ? top_n : count;
  const rgk_topk_choice c = {free0, free1, count, kept - free0 - (count - free1)};
  return c;
}
/* Do scores matter? */
RGK_BOTH bool rgk_topk_ranks(rgk_topk_choice c) {
  return c.keep > 0 && c.keep < c.free1 - c.free0;
}

/* ---- any shape ---- */
/* of the plain kernel's tiles */
enum { RGK_TOPK_ROWS = 64, RGK_TOPK_KEYS = 64, RGK_TOPK_THREADS = 256 };
enum { RGK_TOPK_FAST, RGK_TOPK_WIDE, RGK_TOPK_DOT, RGK_TOPK_RELU };
typedef struct rgk_topk_any {
  rgk_topk call;
  rgk_pages pages; /* where keys are, if there is a table; k is a page's then */
} rgk_topk_any;
RGK_GETTER(rgk_topk_plain(int mode))
RGK_GETTER(rgk_topk_share(void)) /* grid over T · KH · D threads */
/* Its bytes of dynamic shared memory: of tiles of q, k and sums; of all, with `heap` places of a
 * heap a row. */
RGK_BOTH uint32_t rgk_topk_plain_tiles(int mode) {
  return 2 * 32 * (RGK_TOPK_ROWS + 4) * 4 +
         RGK_TOPK_ROWS * (RGK_TOPK_KEYS + 1) * (mode == RGK_TOPK_WIDE ? 8 : 4);
}
static inline uint32_t rgk_topk_plain_shared(int mode, int chunk, int64_t heap) {
  const uint32_t size = mode == RGK_TOPK_WIDE ? 8 : 4;
  return rgk_topk_plain_tiles(mode) + RGK_TOPK_ROWS * (uint32_t)chunk * size + 8 +
         RGK_TOPK_ROWS * 8 * (uint32_t)heap;
}

/* ---- Hopper: bf16 and f16, widths that are multiples of 16 up to 256 ----
 *
 * G is padded to `heads`, a power of two. */
enum {
  RGK_TOPK90_COLUMNS = 128, /* queries times heads of a consumer warpgroup */
  RGK_TOPK90_TILE = 64,     /* keys of a product */
  RGK_TOPK90_STAGES = 8     /* at most */
};
/* Consumer warpgroups of a block, and its threads. */
#define RGK_TOPK90_GROUPS(heads, width)  ((width) <= 128 && (heads) >= 8 ? 1 : 2)
#define RGK_TOPK90_THREADS(heads, width) (128 * RGK_TOPK90_GROUPS(heads, width) + 128)
/* For so many queries a warpgroup: tiles of a step, floats of a query's sums of one, and places for
 * its candidates. */
#define RGK_TOPK90_HALVES(queries) ((queries) <= 32 ? 2 : 1)
#define RGK_TOPK90_PITCH(queries)  (RGK_TOPK90_TILE * RGK_TOPK90_HALVES(queries) + 8)
#define RGK_TOPK90_ROOM(queries)   ((queries) <= 8 ? 128 : 64)
typedef struct rgk_topk90_params {
  rgk_topk call;
  rgk_map k; /* in boxes of TILE rows */
} rgk_topk90_params;
RGK_GETTER(rgk_topk90(rg_dtype type, int heads, int width, bool dot))
/* Over pages, of score softmax: steps of keys are counted by the rows of pages, `before` of which
 * come before the first key. A cluster of `parts` blocks (1 to 8) shares out a tile's steps. Of
 * numbers that don't go together the lengths count as no tokens; a page that is none has rows of
 * zeros. */
typedef struct rgk_topk90_paged {
  rgk_topk call; /* k is a page's */
  rgk_pages pages;
  int32_t parts, zero;
} rgk_topk90_paged;
RGK_GETTER(rgk_topk90_over_pages(rg_dtype type, int heads, int width))
/* Its bytes of dynamic shared memory: all but q, the ring of keys and what blocks reach over; all
 * of them. Over pages `reach` counts the keys of a block, which are carried. */
RGK_BOTH uint32_t rgk_topk90_tables(int heads, int width) {
  const uint32_t queries = RGK_TOPK90_COLUMNS / (uint32_t)heads;
  const uint32_t pitch = RGK_TOPK90_PITCH(queries);
  const uint32_t query = 2 * pitch * 4 + RGK_TOPK90_ROOM(queries) * 8 + 16 + 4;
  return RGK_TOPK90_GROUPS(heads, width) * queries * query + (2 * RGK_TOPK90_STAGES + 4) * 8;
}
static inline uint32_t rgk_topk90_shared(int heads, int width, int reach, int stages) {
  const uint32_t panels = ((uint32_t)width + 63) / 64, groups = RGK_TOPK90_GROUPS(heads, width),
                 queries = RGK_TOPK90_COLUMNS / (uint32_t)heads;
  return panels * 128 * (groups * RGK_TOPK90_COLUMNS + (uint32_t)stages * RGK_TOPK90_TILE) +
         rgk_topk90_tables(heads, width) + groups * queries * (uint32_t)reach * 4;
}

/* ---- any GPU since Ampere: types, widths and padding of G as on Hopper ----
 *
 * A warp owns COLUMNS / heads queries, a block four times that. */
enum {
  RGK_TOPK80_COLUMNS = 32, /* queries times heads of a warp */
  RGK_TOPK80_TILE = 64,
  RGK_TOPK80_STEP = 128, /* keys scored before queries choose */
  RGK_TOPK80_PITCH = RGK_TOPK80_STEP + 8,
  RGK_TOPK80_ROOM = 64, /* places for a query's candidates */
  RGK_TOPK80_WARPS = 4
};
/* Its bytes of dynamic shared memory: two tiles of keys; of a warp's queries sums, candidates,
 * state, keys seen and what blocks reach over. */
RGK_BOTH uint32_t rgk_topk80_shared(int heads, int width, int reach) {
  const uint32_t queries = RGK_TOPK80_WARPS * RGK_TOPK80_COLUMNS / (uint32_t)heads;
  return 4 * RGK_TOPK80_TILE * (uint32_t)width +
         queries * (RGK_TOPK80_PITCH * 4 + RGK_TOPK80_ROOM * 8 + 16 + 4 + (uint32_t)reach * 4);
}
RGK_GETTER(rgk_topk80(rg_dtype type, int heads, int width)) /* takes an rgk_topk */

/* ---- Hopper, score relu: bf16 and f16, widths 64 and 128, up to 64 heads, blocks of one key ----
 *
 * For a window of rows of q scores go to memory, and from there into idx. G is padded to `heads`, a
 * power of two from 8 on. */
enum {
  RGK_TOPK_RELU_COLUMNS = 256, /* queries times heads of a consumer warpgroup, of two */
  RGK_TOPK_RELU_CHUNK = 4096,  /* keys of a block */
  RGK_TOPK_RELU_THREADS = 384,
  RGK_TOPK_RANK_THREADS = 512
};
typedef struct rgk_topk_scored {
  rgk_topk call;
  int64_t row, rows; /* of q, that this launch works on */
  float *score;      /* [rows, KH, pitch]: of a row, those of the keys that it sees */
  int64_t pitch;     /* a multiple of 4 */
} rgk_topk_scored;
/* Two groups of queries, four tiles of 64 keys; weights, barriers, alignment. */
#define RGK_TOPK_RELU_BYTES(width) \
  ((uint32_t)(width)*2 * (2 * RGK_TOPK_RELU_COLUMNS + 4 * 64) + 4096)
/* Grid: KH times blocks of 2 · 256 / heads rows; chunks of S. */
RGK_GETTER(rgk_topk_relu(rg_dtype type, int heads, int width))
RGK_GETTER(rgk_topk_rank(void)) /* grid rows, KH */

#endif
