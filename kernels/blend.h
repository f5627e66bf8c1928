/* kernels/blend.h: combine and merge_lse: weighted sums of branches [T, H, E], and their
 * gradients. */
#ifndef RGK_BLEND_H
#define RGK_BLEND_H

#include "kernels.h"

enum { RGK_BLEND_BRANCHES = 32, RGK_BLEND_THREADS = 256 };

typedef struct rgk_branch {
  const void *o;
  int64_t o_row, o_head;
  void *d; /* gradient of o, or NULL */
  int64_t d_row, d_head;
  const float *lse; /* [T, H]; merge_lse only */
  int64_t lse_row;
  float *d_lse; /* its gradient, or NULL */
  int64_t d_lse_row;
  int32_t d_dtype;
  bool add, lse_add; /* gradients that are added to */
} rgk_branch;

/* A row is one (token, head). `lanes` neighbouring threads (a power of two, at most 32) work on a
 * row. */
typedef struct rgk_blend_params {
  rgk_seqs seqs;
  int64_t tokens, heads, width;
  int32_t n, lanes, dtype; /* branches; type of o */
  int32_t act;             /* combine's attribute: 0 sigmoid, 1 softmax, 2 none */
  rgk_tensor row;          /* forward: the output o; backward: its gradient, data NULL for zeros */
  float *row_lse;          /* merge_lse: the output lse, or its gradient; NULL: none */
  int64_t row_lse_row;
  rgk_tensor gate, d_gate; /* combine */
  bool gate_add;
  bool products; /* backward: someone wants gradients of gates or of log-sum-exps */
  rgk_branch branch[RGK_BLEND_BRANCHES];
} rgk_blend_params;

/* One branch of combine's backward. */
typedef struct rgk_branch_params {
  rgk_seqs seqs;
  int64_t tokens, heads, width;
  int32_t n, lanes, dtype, act; /* n: columns of the gates */
  int32_t column, zero;         /* zero: in place of a hole */
  rgk_tensor row, gate, o;      /* row: gradient of the sum */
  rgk_tensor d;                 /* gradient of o; data NULL: not wanted, as the next two [T, H] */
  rgk_tensor product, delta;
  int32_t add;   /* to the sum in d */
  int32_t chain; /* delta is one chain of terms; else as `product` is summed */
} rgk_branch_params;

enum {
  RGK_BRANCH_ROWS = 2,  /* of a thread, one after another RGK_BLEND_THREADS / lanes apart */
  RGK_BRANCH_TOKENS = 4 /* of a thread of the whole kind, neighbours */
};

enum { RGK_BLEND_TOKENS = 2 /* of a thread, neighbours */, RGK_BLEND_FEW = 4 /* branches */ };

/* Dynamic shared memory: floats per row and branch, RGK_BLEND_THREADS / lanes rows. */
enum { RGK_BLEND_KINDS_FWD = 2, RGK_BLEND_KINDS_BWD = 3 };

/* vectors: every row of every tensor [T, H, E] on 16 bytes, o in the type `x`. */
RGK_GETTER(rgk_blend_fwd(bool merge, bool vectors, rg_dtype x))
RGK_GETTER(rgk_blend_bwd(bool merge, bool vectors, rg_dtype x))
/* combine; vectors, x of 2 bytes, width 8 * lanes, at most RGK_BLEND_FEW branches; no shared
 * memory. NULL: no such instance */
RGK_GETTER(rgk_blend_fwd_whole(rg_dtype x, int32_t lanes))
RGK_GETTER(rgk_blend_branch(bool vectors, rg_dtype x)) /* no shared memory; rgk_branch_params */
/* vectors, x of 2 bytes, width 8 * lanes; d in type x, d, product and delta wanted, add and chain
 * 0. NULL: no such instance */
RGK_GETTER(rgk_blend_branch_whole(rg_dtype x, int32_t lanes))
/* a thread a row, no shared memory; branch[k].lse is the product */
RGK_GETTER(rgk_blend_gates(void))

#endif
