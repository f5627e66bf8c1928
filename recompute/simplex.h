/* recompute/simplex.h: linear programs that grow while they are solved, for rows.c.

   Minimize what the columns cost, each between its bounds, so that every row is at least its right
   hand side. Rows and columns may be added, and bounds changed, at any time: the next solution goes
   on from the last.
 */
#ifndef RGI_RECOMPUTE_SIMPLEX_H
#define RGI_RECOMPUTE_SIMPLEX_H

#include "basis.h"

typedef struct rgi_simplex rgi_simplex;

/* For so many columns and rows at most; in the arena. */
rg_status rgi_simplex_open(int columns, int rows, rgi_arena *a, rgi_simplex **out, rg_error *e);
/* A column within lo … hi, of rows that are there; its number, or -1: no room. */
int rgi_simplex_column(rgi_simplex *s, double cost, double lo, double hi, const rgi_weight *in,
                       int n);
/* A row of columns that are there; its number, or -1: no room. */
int rgi_simplex_row(rgi_simplex *s, const rgi_weight *of, int n, double least);
void rgi_simplex_bounds(rgi_simplex *s, int column, double lo, double hi);
/* How many solutions in a row have had that row to spare; such a row may be dropped. */
int rgi_simplex_idle(const rgi_simplex *s, int row);
void rgi_simplex_drop(rgi_simplex *s, int row);
/* What no solution beats, by the prices that it comes to, whatever rounding did to them; one that
 * reaches `most` is enough, and so are so many pivots; 0: all it takes. */
double rgi_simplex_solve(rgi_simplex *s, int pivots, double most);
/* The same with the column within other bounds; what was found before is found again after it. */
double rgi_simplex_try(rgi_simplex *s, int column, double lo, double hi, int pivots, double most);
double rgi_simplex_value(const rgi_simplex *s, int column);
/* By the same prices: what a unit of the column adds. */
double rgi_simplex_reduced(const rgi_simplex *s, int column);
/* For programs whose columns are 0 or 1 in whole numbers: adds up to `most` rows that all such
 * choices keep and what was found last does not; their numbers, and how many. term: room for all
 * columns. */
int rgi_simplex_cuts(rgi_simplex *s, int most, rgi_weight *term, int *row);
int rgi_simplex_rows(const rgi_simplex *s);
/* Work done so far, in steps of some 10 ns. */
int64_t rgi_simplex_work(const rgi_simplex *s);

#endif
