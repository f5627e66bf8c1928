/* ops/cpu/attn.h: attention on the CPU, one core for all three ops.
 *
 * Everything works on tiles of packed sequences, relative to each sequence's start:
 *
 *   row tile   up to RGI_ATTN_ROWS rows, each a (query, head) pair of one KV head, heads running
 *              fastest
 *   key tile   up to RGI_ATTN_KEYS keys, one per vector lane; never across a sequence's end or a
 *              slc block's end
 *
 *              lanes = keys ->
 *   rows  Q [rows, d]  x  KT [d, keys]    = S [rows, keys]    softmax along the lanes, row by row
 *         P [rows, keys] x V [keys, e]    = O [rows, e]
 *   backward       dO x VT = dP,  dS x K = dQ,  P^T x dO = dV,  dS^T x Q = dK
 *
 * K and V are converted to f32 and transposed once per call into the workspace, densely: the tile
 * at key row r and kv head h holds [d, n] floats from (h * S + r) * d on, so ragged packs cost no
 * more than K itself. Of keys in pages a tile is packed into the thread's own room when a walk
 * comes to it: all that the tables have room for would be B times the context.
 *
 * Every product sums along one chain per tile and adds tiles in order: no result depends on how
 * rows fall into register tiles, on threads, or on other sequences.
 */
#ifndef RGI_CPU_ATTN_H
#define RGI_CPU_ATTN_H

#include "../../kernels/kernels.h"
#include "../attn.h"
#include "watch.h"

enum { RGI_ATTN_ROWS = 64, RGI_ATTN_KEYS = 64 };

/* Terms of a logit summed in one chain. A single chain of d terms would err by about d/2 roundings
 * of the sum, which the softmax of large logits shows. */
enum { RGI_ATTN_STEP = 16 };

/* Features that a thread's rows have room for: of all but the widest heads the same. */
static inline int64_t rgi_attn_room(const rgi_attn *a) {
  return a->dp > 256 || a->ep > 256 ? RGI_ATTN_MAX_D : 256;
}

#define RGI_INLINE static inline __attribute__((always_inline))

/* ---- the vector kernels, once per CPU level ---- */

/* One key tile's share of an online softmax. Columns [c0, c1) of s, multiples of 16, hold raw
 * products; row r sees columns [lo[r], hi[r]) of them. */
typedef struct rgi_attn_softmax {
  float *s;               /* [rows, RGI_ATTN_KEYS]: products in, probabilities relative to m out */
  const int32_t *lo, *hi; /* [rows] */
  int r0, r1, c0, c1;
  float scale, softcap;
  float *m; /* [rows] largest logit so far */
  float *l; /* [rows, 16] sum of exponentials so far, in 16 lanes */
  float *o; /* [rows, ldo] values so far, rescaled where m moves */
  int64_t ldo;
} rgi_attn_softmax;

/* Probabilities and the gradient of the logits' products (not yet times scale). */
typedef struct rgi_attn_dsoftmax {
  float *s;  /* [rows, RGI_ATTN_KEYS]: products in, probabilities out */
  float *dp; /* same: gradient of the probabilities in, of the products out; NULL: not wanted */
  const int32_t *lo, *hi;
  int r0, r1, c0, c1;
  float scale, softcap;
  const float *lse, *delta; /* [rows] */
} rgi_attn_dsoftmax;

/* C[m, n] = or += sum over k of A(m, k) * B[k, n]; A(m, k) is a[m * a_row + k * a_col]. Sums chains
 * of `step` terms, then the chains, in order. Works on whole groups of 16 columns: B and C have
 * room for that. */
typedef struct rgi_attn_gemm {
  int64_t m, n, k, step;
  const float *a;
  int64_t a_row, a_col;
  const float *b;
  int64_t ldb;
  float *c;
  int64_t ldc;
  bool add;
} rgi_attn_gemm;

typedef struct rgi_attn_isa {
  void (*gemm)(const rgi_attn_gemm *g);
  void (*softmax)(const rgi_attn_softmax *x);
  void (*dsoftmax)(const rgi_attn_dsoftmax *x);
  void (*load)(float *dst, rg_dtype type, const void *src, int64_t n);
  /* out [rows] = sum of a * b over rows [rows, ld] of n terms, in one chain as gemm has it with
   * step >= n */
  void (*dots)(int64_t rows, int64_t n, const float *a, const float *b, int64_t ld, float *out);
  /* out [rows] = sum of squares over rows [rows, ld] of n terms, in 16 lanes */
  void (*squares)(int64_t rows, int64_t n, const float *a, int64_t ld, float *out);
} rgi_attn_isa;

extern const rgi_attn_isa rgi_attn_base;
#if defined(__x86_64__) && defined(__GNUC__)
extern const rgi_attn_isa rgi_attn_avx2, rgi_attn_avx512;
#endif

/* ---- one call ---- */

/* Fills in how the call is cut into tiles, for a CPU level (rg_call.isa). */
void rgi_attn_cut(rgi_attn *a, int isa);

/* The vector kernels of a CPU level (rg_call.isa). */
const rgi_attn_isa *rgi_attn_level(int isa);

size_t rgi_cpu_attn_fwd_workspace(const rg_call *c, const rgi_attn *a);
rg_status rgi_cpu_attn_fwd(const rg_call *c, const rgi_attn *a);
size_t rgi_cpu_attn_bwd_workspace(const rg_call *c, const rgi_attn *a);
rg_status rgi_cpu_attn_bwd(const rg_call *c, const rgi_attn *a);

/* ---- shared by forward and backward ---- */

/* A key tile: n keys from position `first` of sequence b, at row `row` of k and v; `block` numbers
 * the blocks of all sequences of the pack in order. */
typedef struct rgi_attn_keys {
  int32_t b, n;
  int64_t row, first, block;
} rgi_attn_keys;

static inline int64_t rgi_attn_start(const rg_arg *cu, int64_t b) {
  return *(const int32_t *)rgi_at(cu, b, 0);
}
/* Position of sequence b's first query; negative where it has no tokens in its pages. */
static inline int64_t rgi_attn_offset(const rgi_attn *a, int64_t b) {
  if (a->paged) return rgi_paged_tokens(&a->pages, b) - (a->pages.cu[b + 1] - a->pages.cu[b]);
  return a->offset ? rgi_attn_start(a->offset, b) : 0;
}
/* Where sequence b's keys are: first row and number; in pages its rows are counted from 0. */
void rgi_attn_key_rows(const rgi_attn *a, int64_t b, int64_t *row, int64_t *n);

/* Keys [*lo, *hi) that the query at position `pos` may see of n; none: *lo >= *hi. */
static inline void rgi_attn_visible(const rgi_attn *a, int64_t pos, int64_t n, int64_t *lo,
                                    int64_t *hi) {
  *lo = 0;
  *hi = pos + 1;
  if (a->mode == RGI_ATTN_CMP) *hi = rgk_blocks_in(pos + 1, a->kernel, a->stride);
  if (a->mode == RGI_ATTN_SWA && a->window_left >= 0 && pos > a->window_left)
    *lo = pos - a->window_left;
  if (*hi > n) *hi = n;
}

int64_t
/* most row tiles of the pack, per KV head and part of its heads */
rgi_attn_row_tiles(const rgi_attn *a);
int64_t rgi_attn_key_tiles(const rgi_attn *a);  /* most key tiles, per KV head */
int64_t rgi_attn_key_blocks(const rgi_attn *a); /* most blocks */
int64_t rgi_attn_fill_rows(const rgi_attn *a, rgi_tile *tiles);
/* first_block [B], may be NULL: number of each sequence's first block. */
int64_t rgi_attn_fill_keys(const rgi_attn *a, rgi_attn_keys *tiles, int64_t *first_block);

/* Packed copies of K or V in the workspace, row r and KV head h: transposed tiles without
 * padding (a tile's rows may be read up to RGI_ATTN_KEYS past its end), and natural rows
 * padded with zeros to a multiple of 16. */
static inline size_t rgi_attn_packed(const rgi_attn *a, int64_t width) {
  return ((size_t)a->KH * (size_t)a->S * (size_t)width + RGI_ATTN_KEYS) * sizeof(float);
}
static inline float *rgi_attn_at(const rgi_attn *a, float *packed, int64_t h, int64_t row,
                                 int64_t width) {
  return packed + (h * a->S + row) * width;
}
/* Packs tile t of x [S, KH, width], or of a cache, for KV head h: where rgi_attn_at has it. Either
 * target may be NULL. */
void rgi_attn_pack(const rgi_attn *a, const rgi_attn_keys *t, int64_t h, const rg_arg *x,
                   float *transposed, float *natural);
/* The same to a place of its own. */
void rgi_attn_pack_tile(const rgi_attn *a, const rgi_attn_keys *t, int64_t h, const rg_arg *x,
                        float *transposed, float *natural);

/* The rows of a row tile: queries [row, row + nq) of the pack, heads [head, head + heads) of KV
 * head h. */
typedef struct rgi_attn_rows {
  int64_t row, h, head;
  int nq, heads, n; /* n = nq * heads */
} rgi_attn_rows;
/* Task number -> rows; tasks run over the parts of a head's queries' heads, then tiles, then KV
 * heads. */
rgi_attn_rows rgi_attn_task_rows(const rgi_attn *a, const rgi_tile *tiles, int64_t ntile,
                                 int64_t task, const rgi_tile **tile);
/* dst [rows, ld] <- x [T, H, width] as f32 */
void rgi_attn_load_rows(const rgi_attn *a, const rgi_attn_rows *r, const rg_arg *x, float *dst,
                        int64_t ld);

/* Walks the key tiles that a row tile's queries see, in order, with the runs of queries that see
 * them. */
typedef struct rgi_attn_walk {
  const rgi_attn *a;
  int64_t h, query; /* KV head, row of the first query */
  int nq;
  int64_t key_row, n;                           /* the sequence's keys */
  int64_t lo[RGI_ATTN_ROWS], hi[RGI_ATTN_ROWS]; /* keys each query may see */
  /* slc: block its list is at, INT64_MAX at its end */
  int64_t next[RGI_ATTN_ROWS];
  int32_t at[RGI_ATTN_ROWS]; /* slc: place in the list after that */
  int64_t block, end, part;
  /* the tile: keys [first, first + keys) of the sequence; queries that see any, as runs
   * [from, to) */
  int64_t first;
  int keys, runs;
  int run[RGI_ATTN_ROWS][2];
  /* columns [c0, c1) of the tile that some query sees, in multiples of 16; seen: c1 cut to
   * the keys */
  int c0, c1, seen;
} rgi_attn_walk;
void rgi_attn_walk_begin(rgi_attn_walk *w, const rgi_attn *a, const rgi_tile *t, int64_t h);
bool rgi_attn_walk_next(rgi_attn_walk *w);

/* Next entry of a slc selection row that counts, from place *at on (moved past it): one that is
 * larger than all before it (`seen`, -1 at first) and whose block starts before key n. INT64_MAX
 * where none is left. */
int64_t rgi_attn_next_block(const rgi_attn *a, const int32_t *list, int32_t *at, int64_t seen,
                            int64_t n);

/* Columns [*lo, *hi) of a tile at `first` with `keys` keys, of the range of keys [from, to). */
static inline void rgi_attn_columns(int64_t first, int keys, int64_t from, int64_t to, int32_t *lo,
                                    int32_t *hi) {
  *lo = from <= first ? 0 : from - first >= keys ? keys : (int32_t)(from - first);
  *hi = to <= first ? 0 : to - first >= keys ? keys : (int32_t)(to - first);
}

/* Sets rows of x that belong to no sequence to zero. */
void rgi_attn_zero_query_rows(const rgi_attn *a, const rg_arg *x);
void rgi_attn_zero_key_rows(const rgi_attn *a, const rg_arg *x);

#endif
