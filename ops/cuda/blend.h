/* ops/cuda/blend.h: combine and merge_lse on a GPU: fills kernels/blend.h's struct from a call. */
#ifndef RGI_CUDA_BLEND_H
#define RGI_CUDA_BLEND_H

#include "../../kernels/blend.h"
#include "../ops.h"

/* What an op says about its call; ports it does not have are NO_PORT, tensors NULL. */
enum { RGI_NO_PORT = -1 };
typedef struct rgi_blend {
  bool merge, backward;
  int o, lse;                     /* in-ports (lists) */
  int d_o, acc_o, d_lse, acc_lse; /* backward: out-ports and in-ports (lists) */
  const rg_arg *cu, *row;         /* row: the output o, or its gradient */
  const rg_arg *row_lse;          /* the output lse, or its gradient */
  const rg_arg *gate, *d_gate, *acc_gate;
  int act;
  struct { /* the one branch of rgi_cuda_blend_branch */
    const rg_arg *o, *d, *product, *delta;
    bool add, chain;
    int column;
  } one;
} rgi_blend;

/* RG_E_LIMIT if the call is for a GPU and joins more branches (in-port o) than
 * fit; `remedy` ends the sentence. */
rg_status rgi_cuda_blend_check(const rg_call *c, int o, const char *remedy, rg_error *e);
rg_status rgi_cuda_blend(const rg_call *c, const rgi_blend *b, rg_cuda *x);
const char *rgi_cuda_blend_path(const rg_call *c, const rgi_blend *b);
/* Are rows of all that it reads and writes on 16 bytes? */
bool rgi_cuda_blend_vectors(const rg_call *c, const rgi_blend *b);
/* Combine's gradient in parts: of one branch; of the gates, where `lse` are products. */
rg_status rgi_cuda_blend_branch(const rg_call *c, const rgi_blend *b, rg_cuda *x);
const char *rgi_cuda_blend_branch_path(const rgi_blend *b);
rg_status rgi_cuda_blend_gates(const rg_call *c, const rgi_blend *b, rg_cuda *x);

#endif
