/* tests/ref/ref_pool.c: pool in fp64, from the definition. */
#include "ref.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Column of x that feature d of a row takes from its n-th token. */
static int64_t column(const ref_pool *a, int64_t n, int64_t d) {
  return n / a->stride * a->W + d;
}
static int64_t place(const ref_pool *a, int64_t t, int64_t h, int64_t c) {
  return (t * a->KH + h) * (a->kernel / a->stride * a->W) + c;
}

/* The weights [kernel] of a feature; tokens before the sequence have none. */
static void weights(const ref_pool *a, int64_t b, int64_t first, int64_t h, int64_t d, double *w) {
  const int64_t D = a->kernel / a->stride * a->W;
  double most = -INFINITY, sum = 0;
  int64_t best = -1;
  for (int64_t n = 0; n < a->kernel; n++) {
    const int64_t t = first + n, c = column(a, n, d);
    w[n] = -INFINITY;
    if (t < a->cu[b]) continue;
    if (a->method == REF_POOL_SOFTMAX)
      w[n] = a->z[place(a, t, h, c)] + (a->bias ? a->bias[n % a->stride * D + c] : 0);
    else
      w[n] = (a->method == REF_POOL_MAX ? 1 : -1) * a->x[place(a, t, h, c)];
    if (best < 0 || w[n] > most) most = w[n], best = n;
  }
  for (int64_t n = 0; n < a->kernel; n++) sum += w[n] = exp(w[n] - most);
  for (int64_t n = 0; n < a->kernel; n++)
    w[n] = a->method == REF_POOL_SOFTMAX ? w[n] / sum : n == best;
}

static void each(const ref_pool *a, double *y, const double *dy, double *dx, double *dz,
                 double *dbias) {
  double *w = calloc((size_t)a->kernel, sizeof *w);
  if (!w) abort();
  for (int64_t b = 0; b < a->B; b++)
    for (int64_t j = 0; (j + 1) * a->stride <= a->cu[b + 1] - a->cu[b]; j++)
      for (int64_t h = 0; h < a->KH; h++)
        for (int64_t d = 0; d < a->W; d++) {
          const int64_t row = ((a->cu[b] / a->stride + j) * a->KH + h) * a->W + d,
                        first = a->cu[b] + (j + 1) * a->stride - a->kernel;
          double mean = 0;
          weights(a, b, first, h, d, w);
          for (int64_t n = 0; n < a->kernel; n++)
            if (w[n] != 0) mean += w[n] * a->x[place(a, first + n, h, column(a, n, d))];
          if (y) y[row] = mean;
          for (int64_t n = 0; dy && n < a->kernel; n++) {
            if (w[n] == 0) continue;
            const int64_t c = column(a, n, d), at = place(a, first + n, h, c);
            const double g = w[n] * dy[row] * (a->x[at] - mean);
            dx[at] += w[n] * dy[row];
            if (a->method != REF_POOL_SOFTMAX) continue;
            dz[at] += g;
            if (dbias) dbias[n % a->stride * (a->kernel / a->stride * a->W) + c] += g;
          }
        }
  free(w);
}

void ref_pool_forward(const ref_pool *a, double *y) {
  memset(y, 0, (size_t)(a->T / a->stride * a->KH * a->W) * sizeof *y);
  each(a, y, NULL, NULL, NULL, NULL);
}

void ref_pool_backward(const ref_pool *a, const double *dy, double *dx, double *dz, double *dbias) {
  const size_t D = (size_t)(a->kernel / a->stride * a->W), n = (size_t)(a->T * a->KH) * D;
  memset(dx, 0, n * sizeof *dx);
  memset(dz, 0, n * sizeof *dz);
  if (dbias) memset(dbias, 0, (size_t)a->stride * D * sizeof *dbias);
  each(a, NULL, dy, dx, dz, dbias);
}
