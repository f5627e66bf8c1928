/* ops/cpu/blend.c: see blend.h. */
#include "blend.h"

void rgi_blend_row(const rg_call *c, int port, const float *weight, bool skip_zero,
                   const rg_arg *out, int64_t t, int64_t h) {
  float converted[RGI_PIECE], buffer[RGI_PIECE];
  const int count = rg_in_count(c, port);
  for (int64_t e = 0; e < out->dim[2]; e += RGI_PIECE) {
    const int64_t n = out->dim[2] - e < RGI_PIECE ? out->dim[2] - e : RGI_PIECE;
    float *sum = out->dtype == RG_F32 ? rgi_row_at(out, t, h, e) : converted;
    bool any = false;
    for (int k = 0; k < count; k++) {
      const float w = weight[k];
      if (skip_zero && w == 0) continue;
      const float *x = rgi_row_piece(c->isa, rgi_in_at(c, port, k), t, h, e, n, buffer);
      if (any)
        for (int64_t i = 0; i < n; i++) sum[i] += w * x[i];
      else
        for (int64_t i = 0; i < n; i++) sum[i] = w * x[i];
      any = true;
    }
    if (!any) memset(sum, 0, (size_t)n * sizeof *sum);
    if (sum == converted) rgi_store_by(c->isa, rgi_row_at(out, t, h, e), out->dtype, sum, n);
  }
}

/* x·y in eight sums side by side, added pairwise: rounds less than one long sum. */
static float dot(const float *x, const float *y, int64_t n) {
  typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
  v4 a = {0}, b = {0};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    a += *(const v4 *)(x + i) * *(const v4 *)(y + i);
    b += *(const v4 *)(x + i + 4) * *(const v4 *)(y + i + 4);
  }
  a += b;
  float s = (a[0] + a[2]) + (a[1] + a[3]);
  for (; i < n; i++) s += x[i] * y[i];
  return s;
}

void rgi_blend_row_backward(const rg_call *c, int port, const rg_arg *g, const float *weight,
                            int d_port, int acc_port, float *product, int64_t t, int64_t h) {
  float g_buffer[RGI_PIECE], buffer[RGI_PIECE];
  const int count = rg_in_count(c, port);
  const int64_t width = rgi_in_at(c, port, 0)->dim[2];
  for (int k = 0; k < count; k++) product[k] = 0;
  for (int64_t e = 0; e < width; e += RGI_PIECE) {
    const int64_t n = width - e < RGI_PIECE ? width - e : RGI_PIECE;
    const float *gp = g_buffer;
    if (g)
      gp = rgi_row_piece(c->isa, g, t, h, e, n, g_buffer);
    else
      memset(g_buffer, 0, (size_t)n * sizeof *g_buffer);
    for (int k = 0; k < count; k++) {
      if (g)
        product[k] += dot(gp, rgi_row_piece(c->isa, rgi_in_at(c, port, k), t, h, e, n, buffer), n);
      const rg_arg *d = rgi_out_at(c, d_port, k);
      if (!d) continue;
      const bool add = rgi_in_at(c, acc_port, k) != NULL;
      float *to = d->dtype == RG_F32 && !add ? rgi_row_at(d, t, h, e) : buffer;
      for (int64_t i = 0; i < n; i++) to[i] = weight[k] * gp[i];
      if (to == buffer) rgi_put_grad(c->isa, add, rgi_row_at(d, t, h, e), d->dtype, buffer, n);
    }
  }
}

void rgi_blend_dead(const rg_arg *a, const rg_arg *acc, int64_t t) {
  if (!a || acc) return;
  const size_t bytes = (size_t)(a->rank > 2 ? a->dim[2] : 1) * rg_dtype_size(a->dtype);
  for (int64_t h = 0; h < a->dim[1]; h++) memset(rgi_at(a, t, h), 0, bytes);
}
