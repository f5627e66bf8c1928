/* tests/ref/sums.c: see sums.h. Under the address sanitizer a row is looked at once, as a whole,
 * rather than each of its numbers at every use. */
#include "sums.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define WATCHED __attribute__((no_sanitize("address"), no_sanitize("undefined")))
/* Reads the first byte of the row that may not be, if there is one: the sanitizer reports that. */
static void watch(const double *x, int64_t n) {
  const volatile char *bad = __asan_region_is_poisoned((void *)x, (size_t)n * sizeof *x);
  if (bad) (void)*bad;
}
#else
#define WATCHED
static void watch(const double *x, int64_t n) {
  (void)x, (void)n;
}
#endif

WATCHED static double dot(const double *x, const double *y, int64_t n) {
  double a = 0, b = 0, c = 0, d = 0;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    a += x[i] * y[i];
    b += x[i + 1] * y[i + 1];
    c += x[i + 2] * y[i + 2];
    d += x[i + 3] * y[i + 3];
  }
  for (; i < n; i++) a += x[i] * y[i];
  return (a + b) + (c + d);
}
WATCHED static void add(double *sum, double f, const double *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) sum[i] += f * x[i];
}

double ref_dot(const double *x, const double *y, int64_t n) {
  watch(x, n);
  watch(y, n);
  return dot(x, y, n);
}
void ref_axpy(double *sum, double f, const double *x, int64_t n) {
  watch(sum, n);
  watch(x, n);
  add(sum, f, x, n);
}
