/* tests/ref/sums.h: the two loops that nearly all of the oracle's time is spent in. */
#ifndef REF_SUMS_H
#define REF_SUMS_H

#include <stdint.h>

/* Σ x_i y_i, in four chains. */
double ref_dot(const double *x, const double *y, int64_t n);
/* sum_i += f · x_i */
void ref_axpy(double *sum, double f, const double *x, int64_t n);

#endif
