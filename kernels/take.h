/* kernels/take.h: rows by number, and the largest of a row. */
#ifndef RGK_TAKE_H
#define RGK_TAKE_H

#include "kernels.h"
#include "rows.h"

/* Row i of y is row rows[i] of x; zeros past the live rows and where there is no such row, which
 * below `least` and past x is a fault: {i, the number}. A block of threads for each row. w walks
 * the axes of a row, in t x and y, in units of `unit` bytes. */
enum { RGK_TAKE_THREADS = 128 };
typedef struct rgk_take {
  rgk_walk w;
  rgk_walked t[2];
  const int32_t *rows;
  rgk_seqs seqs;
  int64_t x_row, y_row, count; /* from row to row, in units; rows of x */
  int32_t least, unit;
  rgk_fault fault;
} rgk_take;
RGK_GETTER(rgk_take_rows(void))

/* y[i]: where row i of x [T, width] is largest, the first of equals; NaN is no value, −1: none;
 * dead rows 0. A block of threads for each row. */
enum { RGK_ARGMAX_THREADS = 256 };
typedef struct rgk_argmax {
  const void *x;
  int32_t *y;
  rgk_seqs seqs;
  int64_t x_row, width;
  int32_t dtype, zero;
} rgk_argmax;
RGK_GETTER(rgk_find_largest(void))

#endif
