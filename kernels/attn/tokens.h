/* kernels/attn/tokens.h: attention over tokens chosen one by one (blocks of one key), on Hopper:
   wide latent heads, keys of D = 576 features whose first E = 512 may be the values.

   A thread block works on one query and 64 of its KV head's query heads: all of them want the same
   keys, which are rows scattered over memory. Entries of its row of idx go by in tiles of 64; an
   entry that does not count leaves a row of zeros and is masked. So what a row computes depends on
   its own row of idx alone.
 */
#ifndef RGK_TOKENS_H
#define RGK_TOKENS_H

#include "attn.h"

enum {
  RGK_TOKENS_ROWS = 64, /* heads of a tile */
  RGK_TOKENS_KEYS = 64,
  RGK_TOKENS_STAGES = 2,
  RGK_TOKENS_THREADS = 384,
  RGK_TOKENS_PANEL = 128 * RGK_TOKENS_KEYS,
  RGK_TOKENS_EXTRA = 3072 /* labels, barriers, alignment */
};

typedef struct rgk_tokens {
  rgk_attn a;
  int32_t parts, jobs; /* tiles of heads of a KV head; times KV heads and rows */
  int32_t same;        /* v is the first columns of k, and is not fetched */
  int64_t row, rows;   /* of q, that this launch works on */
} rgk_tokens;

/* Shared memory: stages of keys and a tile of q, as panels of 64 columns, and one of weights. */
#define RGK_TOKENS_PANELS(d) (((d) + 63) / 64)
#define RGK_TOKENS_BYTES(D) \
  (RGK_TOKENS_PANEL * ((RGK_TOKENS_STAGES + 1) * RGK_TOKENS_PANELS(D) + 1) + RGK_TOKENS_EXTRA)

/* NULL where there is no such instance. */
RGK_GETTER(rgk_tokens_fwd(rg_dtype t, int32_t D, int32_t E))

/* Backward, of widths 576 and 512 alone: for a window of rows of q the main kernel, which
 * leaves each query's share of its keys' gradients in memory, then that of the sums. At most
 * RGK_TOKENS_PARTS tiles of heads to a KV head. */
enum { RGK_TOKENS_PARTS = 32 };
RGK_BOTH int rgk_tokens_sum_threads(bool joined) {
  return joined ? 96 : 160;
}
typedef struct rgk_tokens_bwd {
  rgk_tokens call;
  const float *delta; /* [T, H], of plain.h's kernel */
  /* shares [rows, KH * parts, N, width]: of d_k and d_v apart D + E numbers, joined D; NULL: none
   * is wanted. Those of the window's rows from `split` on begin at `more`. */
  void *part, *more;
  int64_t split;
  float *sum;        /* [KH, S, width] between windows */
  bool joined;       /* d_k + [d_v, 0] is wanted, not d_k and d_v */
  float of_ds, of_p; /* factors of weights as they are multiplied with q, k and d_o … */
  float of_dq;       /* … and of what comes out as d_q and as joined shares */
  int64_t *cursor;   /* [KH, S]: how far a key's list has been summed */
  /* of csr.h */
  const int64_t *start;
  const int32_t *list;
  const uint16_t *places;
  int64_t slots;
} rgk_tokens_bwd;

/* Keys, q, d_o, P and dS. */
#define RGK_TOKENS_BWD_BYTES(D) \
  (RGK_TOKENS_PANEL * (2 * RGK_TOKENS_PANELS(D) + 10) + RGK_TOKENS_EXTRA)

RGK_GETTER(rgk_tokens_bwd_main(rg_dtype t))              /* RGK_TOKENS_THREADS */
RGK_GETTER(rgk_tokens_bwd_sums(rg_dtype t, bool joined)) /* grid S, KH; rgk_tokens_sum_threads */

#endif
