/* ops/cpu/blend.h: weighted sums of a list of tensors [T, H, E], row by row: what combine and
   merge_lse share.

   A row is the E elements of one (token, head). Work is cut into runs of tokens; every row is
   summed by itself, in list order, in fp32, so how the runs lie changes no bit.
 */
#ifndef RGI_CPU_BLEND_H
#define RGI_CPU_BLEND_H

#include "rows.h"

enum { RGI_BLEND_TOKENS = 16 }; /* of a task */

static inline int64_t rgi_blend_tasks(const rg_arg *rows) {
  return (rows->dim[0] + RGI_BLEND_TOKENS - 1) / RGI_BLEND_TOKENS;
}
/* Floats of workspace per thread for n weights of k kinds. */
static inline size_t rgi_blend_bytes(int n, int k) {
  return RGI_ROUND256((size_t)n * (size_t)k * sizeof(float));
}

/* n floats of row (t, h) from element e on: in place if they are stored as such, else converted
   into buffer.
 */
static inline const float *rgi_row_piece(int isa, const rg_arg *a, int64_t t, int64_t h, int64_t e,
                                         int64_t n, float *buffer) {
  const char *src = (const char *)rgi_at(a, t, h) + e * (int64_t)rg_dtype_size(a->dtype);
  if (a->dtype == RG_F32) return (const float *)(const void *)src;
  rgi_load_by(isa, buffer, a->dtype, src, n);
  return buffer;
}
static inline void *rgi_row_at(const rg_arg *a, int64_t t, int64_t h, int64_t e) {
  return (char *)rgi_at(a, t, h) + e * (int64_t)rg_dtype_size(a->dtype);
}

/* Row (t, h) of out = Σ_n weight[n] · row (t, h) of the list on `port`,
 * skipping weights of 0 if skip_zero. */
void rgi_blend_row(const rg_call *c, int port, const float *weight, bool skip_zero,
                   const rg_arg *out, int64_t t, int64_t h);
/* product[n] = row (t, h) of g · row (t, h) of element n of the list; and where d (a list of
 * outputs on d_port, sums so far on acc_port) is wanted, d_n (+)= weight[n] · g. g NULL stands for
 * zeros. */
void rgi_blend_row_backward(const rg_call *c, int port, const rg_arg *g, const float *weight,
                            int d_port, int acc_port, float *product, int64_t t, int64_t h);
/* Zeros in row t of a, all heads; nothing if the row holds a sum (acc). */
void rgi_blend_dead(const rg_arg *a, const rg_arg *acc, int64_t t);

#endif
