/* ops/cuda/paged.h: a serving step's bookkeeping on a GPU: cuda_steps and cuda_path of the ops of
 * paged.c, kv_compress.c and page_copy.c, and how kernels are told where keys lie. */
#ifndef RGI_CUDA_PAGED_H
#define RGI_CUDA_PAGED_H

#include "../../kernels/pages.h"
#include "../paged.h"

/* Keys in caches k and v (or NULL), each row of which stands for `stride` tokens; key j is row
 * j + before. */
rgk_pages rgi_cuda_pages(const rg_arg *context, const rg_arg *table, const rg_arg *k,
                         const rg_arg *v, int64_t stride, int64_t before);

rg_status rgi_cuda_paged_batch(const rg_call *c, rg_cuda *x);
rg_status rgi_cuda_kv_append(const rg_call *c, rg_cuda *x);
size_t rgi_cuda_kv_compress_workspace(const rg_call *c);
rg_status rgi_cuda_kv_compress(const rg_call *c, rg_cuda *x);
/* Both in one launch, the bits of the two. */
bool rgi_cuda_kv_step_takes(const rg_call *append, const rg_call *compress, bool split);
rg_status rgi_cuda_kv_step(const rg_call *append, const rg_call *compress, rg_cuda *x);
/* What its kernel is told: for attention that sees to it, too. */
struct rgk_append_means;
void rgi_cuda_kv_step_view(const rg_call *append, const rg_call *compress,
                           struct rgk_append_means *p);
size_t rgi_cuda_page_copy_workspace(const rg_call *c);
rg_status rgi_cuda_page_copy(const rg_call *c, rg_cuda *x);
/* page_copy and paged_batch in one launch: neither waits for the other. */
bool rgi_cuda_copy_batch_takes(const rg_call *copy, const rg_call *batch, bool split);
rg_status rgi_cuda_copy_batch(const rg_call *copy, const rg_call *batch, rg_cuda *x);

const char *rgi_cuda_paged_path(const rg_call *c);
const char *rgi_cuda_kv_append_path(const rg_call *c);
const char *rgi_cuda_kv_compress_path(const rg_call *c);

#endif
