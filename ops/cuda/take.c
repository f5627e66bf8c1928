/* ops/cuda/take.c: see take.h. */
#include "take.h"
#include "../../kernels/take.h"
#include "rows.h"

static rgk_take take_of(const rg_call *c) {
  const rg_arg *x = rg_in(c, 0), *y = rg_out(c, 0);
  const int64_t size = (int64_t)rg_dtype_size(x->dtype), each = 16 / size;
  rg_arg row[2] = {rgi_cuda_row(x), rgi_cuda_row(y)};
  rgk_take p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  rgi_cuda_walk(&p.w, p.t, (const rg_arg *const[]){&row[0], &row[1]}, 2, false);
  p.x_row = x->stride[0], p.y_row = y->stride[0];
  p.unit = (int32_t)size;
  const int last = p.w.rank - 1;
  bool wide = p.w.dim[last] % each == 0;
  for (int t = 0; t < 2; t++) {
    const rg_arg *a = t ? y : x;
    wide = wide && a->align >= 16 && a->stride[0] % each == 0 && p.t[t].stride[last] == 1;
    for (int i = 0; i < last; i++) wide = wide && p.t[t].stride[i] % each == 0;
  }
  if (!wide) return p;
  p.unit = 16;
  p.x_row /= each, p.y_row /= each, p.w.elements /= each, p.w.dim[last] /= each;
  for (int t = 0; t < 2; t++)
    for (int i = 0; i < last; i++) p.t[t].stride[i] /= each;
  return p;
}

rg_status rgi_cuda_take(const rg_call *c, rg_cuda *x, const rg_arg *cu, int32_t least) {
  const rg_arg *rows = rg_in(c, 1);
  rgk_take p = take_of(c);
  p.rows = rows->data;
  p.seqs = rgk_seqs_of(cu, rows->dim[0]);
  p.count = rg_in(c, 0)->dim[0];
  p.least = least;
  p.fault = rgk_fault_of(c);
  if (rows->dim[0] == 0) return RG_OK;
  return x->launch(x, &(rg_launch){.function = rgk_take_rows(),
                                   .grid = {(uint32_t)rows->dim[0], 1, 1},
                                   .block = {RGK_TAKE_THREADS, 1, 1},
                                   .params = &p,
                                   .size = sizeof p});
}

const char *rgi_cuda_take_path(const rg_call *c) {
  return take_of(c).unit == 16 ? "16-byte vectors" : "plain: alignment";
}

rg_status rgi_cuda_argmax(const rg_call *c, rg_cuda *x) {
  const rg_arg *a = rg_in(c, 0);
  rgk_argmax p = {.x = a->data,
                  .y = rg_out(c, 0)->data,
                  .seqs = rgk_seqs_of(rg_in(c, 1), a->dim[0]),
                  .x_row = a->stride[0],
                  .width = a->dim[1],
                  .dtype = (int32_t)a->dtype};
  if (a->dim[0] == 0) return RG_OK;
  return x->launch(x, &(rg_launch){.function = rgk_find_largest(),
                                   .grid = {(uint32_t)a->dim[0], 1, 1},
                                   .block = {RGK_ARGMAX_THREADS, 1, 1},
                                   .params = &p,
                                   .size = sizeof p});
}

const char *rgi_cuda_argmax_path(const rg_call *c) {
  (void)c;
  return "plain";
}
