/* kernels/comm.h: rows on their way into and out of a comm block, and the sums of what came.

   Rows of axis 0 are cut into chunks, `order` says where the ranks' chunks, one rank after the
   other, have each (../ops/comm/comm.h); it is read on the device. Entries that name no chunk count
   as the nearest. A row's elements are walked over the trailing axes; in a comm block they are
   dense.
 */
#ifndef RGK_COMM_H
#define RGK_COMM_H

#include "rows.h"

typedef struct rgk_order {
  const int32_t *place; /* NULL: rank after rank */
  int64_t stride, n;    /* chunks */
} rgk_order;

/* Rows of a tensor: element i of a row's walk lies at row·(its stride) + at(i). */
typedef struct rgk_row {
  void *data;
  int64_t row, stride[RG_MAX_RANK];
  int32_t dtype, zero;
} rgk_row;

/* to's row = from's, in to's type: `scatter` moves chunk c of `from` to its place in `to`, else
 * chunk c of `to` comes from its place. Rows of `from` past the live ones count as zeros. */
typedef struct rgk_permute_params {
  rgk_walk w; /* of a row */
  rgk_row from, to;
  rgk_order order;
  rgk_seqs live; /* of from */
  int64_t rows, chunk;
  int32_t scatter, zero;
} rgk_permute_params;
RGK_GETTER(rgk_permute(bool vectors, rg_dtype from))

/* to[i] = Σ_r from[r·step + i], in fp32, by rank; from is dense. */
typedef struct rgk_sum_params {
  rgk_walk w;
  rgk_walked to;
  const void *from;
  int64_t step; /* elements */
  int32_t ranks, dtype;
} rgk_sum_params;
RGK_GETTER(rgk_sum_ranks(bool vectors, rg_dtype from))

/* to[i·stride] = Σ_r from[2n·r + i] + from[2n·r + n + i], in fp64, by rank. */
typedef struct rgk_pairs_params {
  const float *from;
  float *to;
  int64_t n, stride;
  int32_t ranks;
} rgk_pairs_params;
RGK_GETTER(rgk_sum_pairs(void))

/* ---- halo: ../ops/comm/halo.c says what is whose ---- */

enum { RGK_HALO_SLOTS = 8 };
enum { RGK_TO_PREVIOUS, RGK_TO_NEXT, RGK_FROM_PREVIOUS, RGK_FROM_NEXT, RGK_MESSAGES };

typedef struct rgk_halo_params {
  rgk_walk w; /* of a row */
  /* halo: x[0] the rank's chunks end to end; halo_add: each slot's chunk between its halos,
   * data NULL where there is none */
  rgk_row x[RGK_HALO_SLOTS], y; /* y: a slot's result */
  char *message[RGK_MESSAGES];
  rgk_order order;
  rgk_seqs live; /* of x[0] */
  int64_t chunk, left, right;
  int32_t slots, rank, slot, elements; /* elements: of a row */
} rgk_halo_params;
/* What slot `slot` owes the ranks before and after, into the messages; its own rows with what they
 * and other slots had for it. */
typedef const void *rgk_halo_kernel(bool vectors, rg_dtype type);
RGK_GETTER(rgk_halo_send(bool vectors, rg_dtype type))
RGK_GETTER(rgk_halo_take(bool vectors, rg_dtype type))
RGK_GETTER(rgk_halo_add_send(bool vectors, rg_dtype type))
RGK_GETTER(rgk_halo_add_take(bool vectors, rg_dtype type))

#endif
