/* ops/cuda_rows.c: see cuda_rows.h. */
#include "cuda_rows.h"

void rgi_cuda_walk(rgk_walk *w, const rg_arg *const *tensor, int n) {
  *w = (rgk_walk){.n = n, .elements = 1};
  for (int t = 0; t < n; t++) w->data[t] = tensor[t]->data, w->dtype[t] = (int32_t)tensor[t]->dtype;
  for (int a = 0; a < tensor[0]->rank; a++) {
    int64_t dim = tensor[0]->dim[a];
    w->elements *= dim;
    bool fold = w->rank > 0;
    for (int t = 0; t < n && fold; t++) fold = w->stride[t][w->rank - 1] == dim * tensor[t]->stride[a];
    if (!fold) w->dim[w->rank++] = 1;
    w->dim[w->rank - 1] *= dim;
    for (int t = 0; t < n; t++) w->stride[t][w->rank - 1] = tensor[t]->stride[a];
  }
  if (w->rank == 0) w->dim[0] = w->rank = 1;
}

enum { THREADS = 256, BLOCKS = 4096 };

static uint32_t blocks_for(int64_t elements) {
  uint32_t n = rgk_blocks(elements, THREADS);
  return elements > (int64_t)THREADS * BLOCKS ? BLOCKS : n;
}

rg_status rgi_cuda_zero(const rg_call *c, rg_cuda *x) {
  const rg_arg *y = rg_out(c, 0);
  rgk_fill_params p = {.value = c->attr[1].i ? -0.0f : 0.0f};
  rgi_cuda_walk(&p.w, &y, 1);
  return x->launch(x, &(rg_launch){.function = rgk_fill(),
                                   .grid = {blocks_for(p.w.elements), 1, 1},
                                   .block = {THREADS, 1, 1},
                                   .params = &p,
                                   .size = sizeof p});
}
