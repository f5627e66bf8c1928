/* ops/cuda/paged.h: a serving step's bookkeeping on a GPU: cuda_steps and cuda_path of the ops of
 * paged.c, kv_compress.c and page_copy.c, and how kernels are told where keys lie. */
#ifndef RGI_CUDA_PAGED_H
#define RGI_CUDA_PAGED_H

#include "../../kernels/pages.h"
#include "../../kernels/tma.h"
#include "../paged.h"

/* Keys in caches k and v (or NULL), each row of which stands for `stride` tokens; key j is row
 * j + before. */
rgk_pages rgi_cuda_pages(const rg_arg *context, const rg_arg *table, const rg_arg *k,
                         const rg_arg *v, int64_t stride, int64_t before);

/* A cache as axes (width, head, row of a page, page), in boxes of `box` rows; `page` elements from
 * page to page. A page that is none arrives as zeros. */
static inline rgk_map_of rgi_map_pages(rgk_tensor t, int64_t page, const rgk_pages *pages,
                                       int64_t heads, int64_t width, int32_t box) {
  rgk_map_of m = rgk_map_rows(t, pages->rows, heads, width, box);
  m.rank = 4;
  m.dim[3] = pages->count, m.stride[3] = page, m.box[3] = 1;
  return m;
}

rg_status rgi_cuda_paged_batch(const rg_call *c, rg_cuda *x);
rg_status rgi_cuda_kv_append(const rg_call *c, rg_cuda *x);
size_t rgi_cuda_kv_compress_workspace(const rg_call *c);
rg_status rgi_cuda_kv_compress(const rg_call *c, rg_cuda *x);
size_t rgi_cuda_page_copy_workspace(const rg_call *c);
rg_status rgi_cuda_page_copy(const rg_call *c, rg_cuda *x);

const char *rgi_cuda_paged_path(const rg_call *c);
const char *rgi_cuda_kv_append_path(const rg_call *c);
const char *rgi_cuda_kv_compress_path(const rg_call *c);

#endif
