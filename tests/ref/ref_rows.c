/* tests/ref/ref_rows.c: what works row by row or element by element, and the two ops that join
 * branches. */
#include "ref.h"
#include "sums.h"
#include <math.h>
#include <string.h>

static double sigmoid(double x) {
  return 1 / (1 + exp(-x));
}
static void clear(double *x, int64_t n) {
  if (x) memset(x, 0, (size_t)n * sizeof *x);
}

/* ---- combine ---- */

/* Branch m's weight from one gate row [n]. */
static double weight(ref_act act, const double *gate, int n, int m) {
  if (act == REF_NONE) return gate[m];
  if (act == REF_SIGMOID) return sigmoid(gate[m]);
  double max = gate[0], sum = 0;
  for (int k = 1; k < n; k++) max = fmax(max, gate[k]);
  for (int k = 0; k < n; k++) sum += exp(gate[k] - max);
  return exp(gate[m] - max) / sum;
}

/* d weight(m) / d gate[k] */
static double weight_slope(ref_act act, const double *gate, int n, int m, int k) {
  double wm = weight(act, gate, n, m);
  if (act == REF_SOFTMAX) return wm * ((m == k) - weight(act, gate, n, k));
  if (m != k) return 0;
  /* 1 − sigmoid(x) as sigmoid(−x): exact for large x */
  return act == REF_SIGMOID ? wm * sigmoid(-gate[m]) : 1;
}

void ref_combine_forward(ref_act act, int64_t T, int64_t rows, int64_t H, int64_t D, int n,
                         const double *const *o, const double *gate, double *out) {
  clear(out, T * H * D);
  for (int64_t r = 0; r < rows * H; r++)
    for (int m = 0; m < n; m++)
      ref_axpy(out + r * D, weight(act, gate + r * n, n, m), o[m] + r * D, D);
}

void ref_combine_backward(ref_act act, int64_t T, int64_t rows, int64_t H, int64_t D, int n,
                          const double *const *o, const double *gate, const double *dout,
                          double *const *d_o, double *dgate) {
  for (int m = 0; d_o && m < n; m++) clear(d_o[m], T * H * D);
  clear(dgate, T * H * n);
  for (int64_t r = 0; r < rows * H; r++)
    for (int m = 0; m < n; m++) {
      const double dot = ref_dot(dout + r * D, o[m] + r * D, D); /* of branch m's weight */
      if (d_o && d_o[m]) ref_axpy(d_o[m] + r * D, weight(act, gate + r * n, n, m), dout + r * D, D);
      for (int k = 0; dgate && k < n; k++)
        dgate[r * n + k] += dot * weight_slope(act, gate + r * n, n, m, k);
    }
}

/* ---- merge_lse ---- */

static double merged_lse(int n, const double *const *lse, int64_t r) {
  double max = -INFINITY, sum = 0;
  for (int m = 0; m < n; m++) max = fmax(max, lse[m][r]);
  if (max == -INFINITY) return -INFINITY;
  for (int m = 0; m < n; m++) sum += exp(lse[m][r] - max);
  return max + log(sum);
}

static double share(double lse, double total) {
  return lse == -INFINITY ? 0 : exp(lse - total);
}

void ref_merge_forward(int64_t T, int64_t rows, int64_t H, int64_t D, int n, const double *const *o,
                       const double *const *lse, double *out, double *out_lse) {
  clear(out, T * H * D);
  clear(out_lse, T * H);
  for (int64_t r = 0; r < rows * H; r++) {
    double total = merged_lse(n, lse, r);
    if (out_lse) out_lse[r] = total;
    for (int m = 0; m < n; m++) ref_axpy(out + r * D, share(lse[m][r], total), o[m] + r * D, D);
  }
}

void ref_merge_backward(int64_t T, int64_t rows, int64_t H, int64_t D, int n,
                        const double *const *o, const double *const *lse, const double *dout,
                        const double *dlse, double *const *d_o, double *const *d_lse) {
  for (int m = 0; m < n; m++) {
    if (d_o) clear(d_o[m], T * H * D);
    if (d_lse) clear(d_lse[m], T * H);
  }
  for (int64_t r = 0; r < rows * H; r++) {
    double total = merged_lse(n, lse, r), delta = 0;
    for (int m = 0; m < n; m++)
      delta += share(lse[m][r], total) * ref_dot(dout + r * D, o[m] + r * D, D);
    for (int m = 0; m < n; m++) {
      const double w = share(lse[m][r], total), dot = ref_dot(dout + r * D, o[m] + r * D, D);
      if (d_o && d_o[m]) ref_axpy(d_o[m] + r * D, w, dout + r * D, D);
      if (d_lse && d_lse[m]) d_lse[m][r] = w * (dot - delta + (dlse ? dlse[r] : 0));
    }
  }
}

/* ---- linear ---- */

void ref_linear_forward(int64_t T, int64_t rows, int64_t in, int64_t out, const double *x,
                        const double *w, const double *b, double *y) {
  clear(y, T * out);
  for (int64_t t = 0; t < rows; t++)
    for (int64_t o = 0; o < out; o++)
      y[t * out + o] = ref_dot(x + t * in, w + o * in, in) + (b ? b[o] : 0);
}

void ref_linear_backward(int64_t T, int64_t rows, int64_t in, int64_t out, const double *x,
                         const double *w, const double *dy, double *dx, double *dw, double *db) {
  clear(dx, T * in);
  clear(dw, out * in);
  clear(db, out);
  for (int64_t t = 0; t < rows; t++)
    for (int64_t o = 0; o < out; o++) {
      double g = dy[t * out + o];
      if (db) db[o] += g;
      if (dx) ref_axpy(dx + t * in, g, w + o * in, in);
      if (dw) ref_axpy(dw + o * in, g, x + t * in, in);
    }
}

/* ---- rope ---- */

void ref_rope(int64_t T, int64_t B, int64_t H, int64_t D, double theta, const int32_t *cu,
              const int32_t *q_offset, bool inverse, const double *x, double *y) {
  double angle[D / 2 + 1];
  for (int64_t c = 0; c < D / 2; c++) angle[c] = pow(theta, -2.0 * (double)c / (double)D);
  ref_rope_by(T, B, H, D, angle, 1, false, cu, q_offset, inverse, x, y);
}

void ref_rope_by(int64_t T, int64_t B, int64_t H, int64_t D, const double *angle, double length,
                 bool interleaved, const int32_t *cu, const int32_t *q_offset, bool inverse,
                 const double *x, double *y) {
  clear(y, T * H * D);
  for (int64_t b = 0; b < B; b++)
    for (int64_t t = cu[b]; t < cu[b + 1]; t++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t c = 0; c < D / 2; c++) {
          double position = (double)(t - cu[b] + (q_offset ? q_offset[b] : 0));
          double turn = position * angle[c] * (inverse ? -1 : 1);
          int64_t lo = (t * H + h) * D + (interleaved ? 2 * c : c),
                  hi = lo + (interleaved ? 1 : D / 2);
          y[lo] = length * (x[lo] * cos(turn) - x[hi] * sin(turn));
          y[hi] = length * (x[hi] * cos(turn) + x[lo] * sin(turn));
        }
}

double ref_yarn(int64_t D, double theta, double factor, double original, double beta_fast,
                double beta_slow, double attention, bool truncate, double *angle) {
  double per = 2 * acos(-1), first, last;
  /* pair c turns original · theta^(−2c/D) / 2π times; solved for c */
  first = log(original / per / beta_fast) / log(theta) * (double)D / 2;
  last = log(original / per / beta_slow) / log(theta) * (double)D / 2;
  if (truncate) first = floor(first), last = ceil(last);
  if (first < 0) first = 0;
  if (last > (double)(D - 1)) last = (double)(D - 1);
  if (first == last) last += 0.001;
  for (int64_t c = 0; c < D / 2; c++) {
    double slowed = fmin(1, fmax(0, ((double)c - first) / (last - first)));
    angle[c] = pow(theta, -2.0 * (double)c / (double)D) * (1 - slowed + slowed / factor);
  }
  return attention > 0 ? attention : 1 + 0.1 * log(factor);
}

/* ---- rmsnorm ---- */

static double inverse_rms(const double *x, int64_t D, double eps) {
  double sum = 0;
  for (int64_t c = 0; c < D; c++) sum += x[c] * x[c];
  return 1 / sqrt(sum / (double)D + eps);
}

void ref_rmsnorm_forward(int64_t n, int64_t live, int64_t D, double eps, const double *x,
                         const double *w, double *y) {
  clear(y, n * D);
  for (int64_t r = 0; r < live; r++) {
    double inv = inverse_rms(x + r * D, D, eps);
    for (int64_t c = 0; c < D; c++) y[r * D + c] = x[r * D + c] * inv * (w ? w[c] : 1);
  }
}

void ref_rmsnorm_backward(int64_t n, int64_t live, int64_t D, double eps, const double *x,
                          const double *w, const double *dy, double *dx, double *dw) {
  clear(dx, n * D);
  clear(dw, D);
  for (int64_t r = 0; r < live; r++) {
    const double *xr = x + r * D, *g = dy + r * D;
    double inv = inverse_rms(xr, D, eps), dot = 0;
    for (int64_t c = 0; c < D; c++) dot += g[c] * (w ? w[c] : 1) * xr[c];
    for (int64_t c = 0; c < D; c++) {
      if (dw) dw[c] += g[c] * xr[c] * inv;
      if (dx)
        dx[r * D + c] = inv * g[c] * (w ? w[c] : 1) - inv * inv * inv / (double)D * dot * xr[c];
    }
  }
}

/* ---- layernorm ---- */

static double mean_of(const double *x, int64_t D) {
  double sum = 0;
  for (int64_t c = 0; c < D; c++) sum += x[c];
  return sum / (double)D;
}
static double deviation(const double *x, int64_t D, double eps) {
  double mean = mean_of(x, D), sum = 0;
  for (int64_t c = 0; c < D; c++) sum += (x[c] - mean) * (x[c] - mean);
  return sqrt(sum / (double)D + eps);
}

void ref_layernorm_forward(int64_t n, int64_t live, int64_t D, double eps, const double *x,
                           const double *w, const double *b, double *y) {
  clear(y, n * D);
  for (int64_t r = 0; r < live; r++) {
    const double mean = mean_of(x + r * D, D), s = deviation(x + r * D, D, eps);
    for (int64_t c = 0; c < D; c++)
      y[r * D + c] = (x[r * D + c] - mean) / s * (w ? w[c] : 1) + (b ? b[c] : 0);
  }
}

/* dx_c = Σ_k g_k ∂n_k/∂x_c,  ∂n_k/∂x_c = ((k = c) − 1/D − n_k n_c / D) / s */
void ref_layernorm_backward(int64_t n, int64_t live, int64_t D, double eps, const double *x,
                            const double *w, const double *dy, double *dx, double *dw, double *db) {
  clear(dx, n * D);
  clear(dw, D);
  clear(db, D);
  for (int64_t r = 0; r < live; r++) {
    const double *xr = x + r * D, *g = dy + r * D;
    double mean = mean_of(xr, D), s = deviation(xr, D, eps), sum = 0, product = 0;
    for (int64_t c = 0; c < D; c++) {
      sum += g[c] * (w ? w[c] : 1);
      product += g[c] * (w ? w[c] : 1) * (xr[c] - mean) / s;
    }
    for (int64_t c = 0; c < D; c++) {
      double normal = (xr[c] - mean) / s;
      if (dw) dw[c] += g[c] * normal;
      if (db) db[c] += g[c];
      if (dx) dx[r * D + c] = (g[c] * (w ? w[c] : 1) - (sum + normal * product) / (double)D) / s;
    }
  }
}

/* ---- elements ---- */

void ref_add(int64_t n, int64_t live, const double *a, const double *b, double *y) {
  clear(y, n);
  for (int64_t i = 0; i < live; i++) y[i] = a[i] + b[i];
}

void ref_mul(int64_t n, int64_t live, const double *a, const double *b, double *y) {
  clear(y, n);
  for (int64_t i = 0; i < live; i++) y[i] = a[i] * b[i];
}

void ref_mul_backward(int64_t n, int64_t live, const double *a, const double *b, const double *dy,
                      double *da, double *db) {
  if (da) ref_mul(n, live, dy, b, da);
  if (db) ref_mul(n, live, dy, a, db);
}

void ref_silu(int64_t n, int64_t live, const double *x, double *y) {
  clear(y, n);
  for (int64_t i = 0; i < live; i++) y[i] = x[i] * sigmoid(x[i]);
}

void ref_silu_backward(int64_t n, int64_t live, const double *x, const double *dy, double *dx) {
  clear(dx, n);
  for (int64_t i = 0; i < live; i++) {
    double s = sigmoid(x[i]);
    dx[i] = dy[i] * (s + x[i] * s * sigmoid(-x[i]));
  }
}

void ref_relu(int64_t n, int64_t live, const double *x, double *y) {
  for (int64_t i = 0; i < n; i++) y[i] = i < live && x[i] > 0 ? x[i] : 0;
}

void ref_relu_backward(int64_t n, int64_t live, const double *x, const double *dy, double *dx) {
  for (int64_t i = 0; i < n; i++) dx[i] = i < live && x[i] > 0 ? dy[i] : 0;
}

void ref_sigmoid(int64_t n, int64_t live, const double *x, double *y) {
  clear(y, n);
  for (int64_t i = 0; i < live; i++) y[i] = sigmoid(x[i]);
}

void ref_sigmoid_backward(int64_t n, int64_t live, const double *x, const double *dy, double *dx) {
  clear(dx, n);
  for (int64_t i = 0; i < live; i++) dx[i] = dy[i] * sigmoid(x[i]) * sigmoid(-x[i]);
}

void ref_cast(int64_t n, int64_t live, const double *x, double *y) {
  clear(y, n);
  for (int64_t i = 0; i < live; i++) y[i] = x[i];
}

void ref_concat(int64_t outer, int64_t live, int n, const int64_t *width, const double *const *x,
                double *y) {
  int64_t total = 0, at = 0;
  for (int i = 0; i < n; i++) total += width[i];
  clear(y, outer * total);
  for (int i = 0; i < n; at += width[i], i++)
    for (int64_t r = 0; r < live; r++)
      for (int64_t c = 0; c < width[i]; c++) y[r * total + at + c] = x[i][r * width[i] + c];
}
