/* ops/cuda/attn_plain.h: how the work of attention is cut without regard to a GPU's own
 * instructions (kernels/attn/plain.h), for all families that take it so. */
#ifndef RGI_CUDA_ATTN_PLAIN_H
#define RGI_CUDA_ATTN_PLAIN_H

#include "../../kernels/attn/plain.h"
#include "csr.h"

/* Row tiles of at most `rows` rows (query, head). */
rgk_attn_plain rgi_attn_plain_rows(const rgk_attn *a, int32_t rows);
/* SLC: cuts a block evenly into key tiles of at most so many keys. */
void rgi_attn_plain_cut_blocks(rgk_attn_plain *p, int32_t most);
/* Of a backward: delta, key tiles of `own` keys and partial sums of dK and dV, what a part of a
 * tile's queries gave; their memory from cut. */
void rgi_attn_plain_backward(rgk_attn_plain *p, int32_t own, rgk_csr *csr, rgi_cut *cut);

/* What a family puts in place of the kernels between which all others are the same. */
typedef struct rgi_attn_plain_kernels {
  const void *delta, *keys, *queries;
  int64_t delta_blocks;
  uint32_t delta_threads, keys_threads, queries_threads, keys_shared, queries_shared;
  const rg_launch *queries_alone; /* dQ by this instead, or NULL */
} rgi_attn_plain_kernels;
rg_status rgi_attn_plain_backward_steps(const rgk_attn_plain *p, const rgk_csr *csr,
                                        const rgi_attn_plain_kernels *k, rg_cuda *x);
rg_status rgi_attn_plain_step(const rgk_attn_plain *p, rg_cuda *x, const void *function,
                              int64_t blocks, uint32_t threads, uint32_t shared);

#endif
