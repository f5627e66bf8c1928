/* recompute/simplex_parts.h: what simplex.c and cuts.c share. */
#ifndef RGI_RECOMPUTE_SIMPLEX_PARTS_H
#define RGI_RECOMPUTE_SIMPLEX_PARTS_H

#include "simplex.h"

/* A column, or a row: what it is above its right hand side, which is not negative. */
typedef struct rgi_line {
  rgi_vector of; /* rows of a column, columns of a row */
  double lo, hi, cost, least;
  double tilted; /* cost, a little less, so that no two are alike */
  double reduced;
  int where; /* i: the i-th that is basic; -1: it is not */
  int idle;
  bool high;  /* not basic, at hi */
  bool there; /* a row that was not dropped */
  bool whole; /* a row: in whole numbers of the columns, it is one itself */
} rgi_line;

struct rgi_simplex {
  rgi_arena *arena;
  int most_columns, most_rows;
  int m, n, nspare, nentry;
  rgi_line *column, *row;
  rgi_basis *basis;
  int *basic;                           /* per place: a column, or ~r: a row's own */
  double *value, *norm, *least, *most;  /* per place; the latter: its bounds */
  double *along, *across, *edge, *move; /* scratch: a column's or row's; per row or place */
  double *by_column, *by_row;           /* the tableau's row that leaves */
  double *weight, *of_cut;              /* of a cut: per row, per column */
  int *touched, ntouched, *used, nused; /* … and what it has there: columns, rows */
  int *enter, *spare, *lost, *lost_row; /* spare: numbers of dropped rows */
  const rgi_vector **factored;
  rgi_vector *own; /* per row: its own column */
  rgi_weight *own_weight, *term;
  /* what a trial starts from */
  int *kept_basic;
  double *kept_norm;
  double cost;
  bool stale, trying, broken; /* stale: what is basic has to be taken apart */
  int64_t work;
};

#endif
