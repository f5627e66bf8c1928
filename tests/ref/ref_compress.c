/* tests/ref/ref_compress.c: block compression of keys or values, and its gradients. */
#include "ref.h"
#include "sums.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

int64_t ref_blocks(int64_t length, int64_t kernel, int64_t stride) {
  return length < kernel ? 0 : (length - kernel) / stride + 1;
}

static double sigmoid(double x) {
  return 1 / (1 + exp(-x));
}

/* f(a) and f'(a) of the gate half: silu for swiglu, sigmoid for sigmoid_mul. */
static double gate(ref_method m, double a) {
  return m == REF_SWIGLU ? a * sigmoid(a) : sigmoid(a);
}
static double gate_slope(ref_method m, double a) {
  double s = sigmoid(a);
  return m == REF_SWIGLU ? s + a * s * (1 - s) : s * (1 - s);
}

static bool gated(ref_method m) {
  return m == REF_SWIGLU || m == REF_SIGMOID_MUL;
}

/* Row `o` of W times the flattened block that starts at token t. */
static double project(const ref_compress *a, int64_t t, int64_t h, int64_t o) {
  double sum = 0;
  for (int64_t n = 0; n < a->kernel; n++)
    sum += ref_dot(a->w + (o * a->kernel + n) * a->D, a->x + ((t + n) * a->KH + h) * a->D, a->D);
  return sum;
}

static double compress_one(const ref_compress *a, int64_t t, int64_t h, int64_t c) {
  if (a->method == REF_MEAN) {
    double sum = 0;
    for (int64_t n = 0; n < a->kernel; n++) sum += a->x[((t + n) * a->KH + h) * a->D + c];
    return sum / (double)a->kernel;
  }
  if (a->method == REF_LINEAR) return project(a, t, h, c);
  return gate(a->method, project(a, t, h, c)) * project(a, t, h, a->D + c);
}

void ref_compress_forward(const ref_compress *a, double *y) {
  memset(y, 0, (size_t)(a->T / a->stride * a->KH * a->D) * sizeof *y);
  for (int64_t b = 0; b < a->B; b++)
    for (int64_t j = 0; j < ref_blocks(a->cu[b + 1] - a->cu[b], a->kernel, a->stride); j++)
      for (int64_t h = 0; h < a->KH; h++)
        for (int64_t c = 0; c < a->D; c++)
          y[((a->cu[b] / a->stride + j) * a->KH + h) * a->D + c] =
              compress_one(a, a->cu[b] + j * a->stride, h, c);
}

/* Sends gradient g of project(t, h, o) to W and x. */
static void project_backward(const ref_compress *a, int64_t t, int64_t h, int64_t o, double g,
                             double *dx, double *dw) {
  for (int64_t n = 0; n < a->kernel; n++) {
    int64_t wi = (o * a->kernel + n) * a->D, xi = ((t + n) * a->KH + h) * a->D;
    if (dx) ref_axpy(dx + xi, g, a->w + wi, a->D);
    if (dw) ref_axpy(dw + wi, g, a->x + xi, a->D);
  }
}

static void compress_one_backward(const ref_compress *a, int64_t t, int64_t h, int64_t c, double g,
                                  double *dx, double *dw) {
  if (a->method == REF_MEAN) {
    for (int64_t n = 0; dx && n < a->kernel; n++)
      dx[((t + n) * a->KH + h) * a->D + c] += g / (double)a->kernel;
  } else if (a->method == REF_LINEAR) {
    project_backward(a, t, h, c, g, dx, dw);
  } else {
    double u = project(a, t, h, c), z = project(a, t, h, a->D + c);
    project_backward(a, t, h, c, g * z * gate_slope(a->method, u), dx, dw);
    project_backward(a, t, h, a->D + c, g * gate(a->method, u), dx, dw);
  }
}

void ref_compress_backward(const ref_compress *a, const double *dy, double *dx, double *dw) {
  int64_t out = gated(a->method) ? 2 * a->D : a->D;
  if (dx) memset(dx, 0, (size_t)(a->T * a->KH * a->D) * sizeof *dx);
  if (dw) memset(dw, 0, (size_t)(out * a->kernel * a->D) * sizeof *dw);
  for (int64_t b = 0; b < a->B; b++)
    for (int64_t j = 0; j < ref_blocks(a->cu[b + 1] - a->cu[b], a->kernel, a->stride); j++)
      for (int64_t h = 0; h < a->KH; h++)
        for (int64_t c = 0; c < a->D; c++)
          compress_one_backward(a, a->cu[b] + j * a->stride, h, c,
                                dy[((a->cu[b] / a->stride + j) * a->KH + h) * a->D + c], dx, dw);
}
