/* ops/cuda/rows.h: elementwise ops on a GPU: fills kernels/rows.h's structs from calls. */
#ifndef RGI_CUDA_ROWS_H
#define RGI_CUDA_ROWS_H

#include "../../kernels/rows.h"
#include "../ops.h"

/* A walk over n tensors of one shape, axes folded where they lie densely in all; keep_last: the
 * last axis stays on its own. */
void rgi_cuda_walk(rgk_walk *w, rgk_walked *x, const rg_arg *const *tensor, int n, bool keep_last);
/* A row of a tensor: the first, without axis 0. */
rg_arg rgi_cuda_row(const rg_arg *a);
/* May every tensor of the walk be read and written 16 bytes at a time? */
bool rgi_cuda_vectors(const rgk_walk *w, const rgk_walked *x, const rg_arg *const *tensor, int n);
/* Is every row (t, h) of [T, H, D] on 16 bytes? Absent tensors are. */
bool rgi_cuda_row_vectors(const rg_arg *a);

/* One elementwise op: inputs, then outputs (rows.h says how many); `add` for its outputs. */
typedef struct rgi_map {
  rgk_map map;
  const rg_arg *cu;
  const rg_arg *tensor[5];
  bool add[2];
  float value;
} rgi_map;
rg_status rgi_cuda_map(rg_cuda *x, const rgi_map *m);
const char *rgi_cuda_map_path(const rgi_map *m);

/* cuda_steps, cuda_path and workspace of the structural ops; ports as in cpu/rows.h. */
rg_status rgi_cuda_zero(const rg_call *c, rg_cuda *x);
rg_status rgi_cuda_cast(const rg_call *c, rg_cuda *x);
rg_status rgi_cuda_add(const rg_call *c, rg_cuda *x);
rg_status rgi_cuda_concat(const rg_call *c, rg_cuda *x);
rg_status rgi_cuda_accumulate(const rg_call *c, rg_cuda *x);
const char *rgi_cuda_zero_path(const rg_call *c);
const char *rgi_cuda_cast_path(const rg_call *c);
const char *rgi_cuda_add_path(const rg_call *c);
const char *rgi_cuda_concat_path(const rg_call *c);
const char *rgi_cuda_accumulate_path(const rg_call *c);
size_t rgi_cuda_add_workspace(const rg_call *c);

/* ops/live.c's */
rg_status rgi_cuda_scale_lengths(const rg_call *c, rg_cuda *x);
rg_status rgi_cuda_block_starts(const rg_call *c, rg_cuda *x);
const char *rgi_cuda_scale_lengths_path(const rg_call *c);

#endif
