/* ops/cuda/csr.h: the queries that selected each block, as a step of attention's GPU paths
 * (kernels/attn/csr.h). */
#ifndef RGI_CUDA_CSR_H
#define RGI_CUDA_CSR_H

#include "../../kernels/attn/csr.h"
#include "attn.h"

/* Plans the inversion of a->idx (mode RGK_SLC), taking its memory from w: lists [KH, T * N] i32,
 * half as much again for counts, and starts. */
rgk_csr rgi_csr_plan(const rgk_attn *a, rgi_cut *w);
/* Hands over the launches; after them p->start and p->rows are filled. */
rg_status rgi_csr_steps(const rgk_csr *p, rg_cuda *x);

#endif
