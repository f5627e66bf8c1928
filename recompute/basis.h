/* recompute/basis.h: the columns that are basic, taken apart so that equations by them are solved
   in about as many steps as there are numbers other than zero; for simplex.c.
 */
#ifndef RGI_RECOMPUTE_BASIS_H
#define RGI_RECOMPUTE_BASIS_H

#include "../graph/base.h"
#include <stdbool.h>
#include <stdint.h>

typedef struct rgi_weight {
  int of; /* a column of a row, or a row of a column */
  double by;
} rgi_weight;
/* Grows in an arena. */
typedef struct rgi_vector {
  rgi_weight *at;
  int n, room;
} rgi_vector;
/* false: no memory. */
bool rgi_vector_add(rgi_vector *v, rgi_arena *a, int of, double by);

typedef struct rgi_basis rgi_basis;
/* Of at most so many columns and rows. */
rg_status rgi_basis_open(int most, rgi_arena *a, rgi_basis **out, rg_error *e);
/* column[i], i < m, stands at place i. One that the others give already makes room for a row's own
 * column, -1 there: lost[k] is such a place and row[k] the row, k < what is returned; -1: no
 * memory. */
int rgi_basis_factor(rgi_basis *b, const rgi_vector *const *column, int m, int *lost, int *row);
/* Row and place `m` more: its own column. */
void rgi_basis_extend(rgi_basis *b);
/* The row whose own column stands at `place` has `by` more of the columns at places `of`. The next
 * two: false if there is no memory. */
bool rgi_basis_bend(rgi_basis *b, int place, const rgi_weight *more, int n);
/* At `place` stands another column, which is x[i] of those that did. */
bool rgi_basis_replace(rgi_basis *b, int place, const double *x);
/* x by rows → y by places: y of the columns add up to x. */
void rgi_basis_solve(rgi_basis *b, double *x);
/* x by places → y by rows: of y, the column at each place has x. */
void rgi_basis_price(rgi_basis *b, double *x);
/* What has changed since it was taken apart; back to where that was `mark`. */
int rgi_basis_mark(const rgi_basis *b);
void rgi_basis_back(rgi_basis *b, int mark);
/* Is it better taken apart anew? */
bool rgi_basis_worn(const rgi_basis *b);
/* Numbers touched so far. */
int64_t rgi_basis_work(const rgi_basis *b);

#endif
