/* ops/comm/comm.h: what the ops that communicate share: all_gather and its like (gather.c), halo
 * (halo.c).
 *
 * Rows of axis 0 are cut into chunks, the same number on every rank. A chunk's place is where the
 * ranks' chunks, one rank after the other, have it; `order` [chunks] gives the place of each chunk.
 * Without it chunks stand in rank order.
 */
#ifndef RGI_COMM_H
#define RGI_COMM_H

#include "../../graph/autodiff.h"
#include "../cpu/rows.h"

enum { RGI_MOST_RANKS = 1024 };
enum { RGI_WIRE_F32, RGI_WIRE_BF16 };

static inline int rgi_ranks(const rg_call *c, int attr) {
  return (int)c->attr[attr].i;
}
static inline int rgi_rank(const rg_call *c) {
  return c->comm ? c->comm->rank : 0;
}

/* order as bound, or places in rank order */
static inline int64_t rgi_place(const rg_arg *order, int64_t chunk) {
  return order ? ((const int32_t *)order->data)[chunk * order->stride[0]] : chunk;
}
/* RG_E_DATA unless each place occurs once. */
rg_status rgi_check_order(const rg_call *c, const rg_arg *order);

/* Rows [first, first + n) of a. */
rg_arg rgi_rows(const rg_arg *a, int64_t first, int64_t n);
/* A dense tensor of x's shape with n rows at `data`. */
rg_arg rgi_dense_rows(const rg_arg *x, int64_t n, void *data, rg_dtype dtype);
/* to := from, of one shape; rows past `live` become zero. From or to f32, or both of one dtype. */
void rgi_copy_rows(const rg_call *c, const rg_arg *to, const rg_arg *from, int64_t live);

/* Over the wire; one rank alone copies. */
rg_status rgi_all_gather(const rg_call *c, const void *send, void *recv, size_t bytes);
rg_status rgi_all_to_all(const rg_call *c, const void *send, void *recv, size_t bytes);

int64_t rgi_row_elements(const rg_arg *a);

#endif
