/* recompute/rows.h: what a choice made in part takes at least, by bytes at every row; for prove.c.
 */
#ifndef RGI_RECOMPUTE_ROWS_H
#define RGI_RECOMPUTE_ROWS_H

#include "bound.h"
#include "simplex.h"

typedef struct rgi_row_unit rgi_row_unit;
typedef struct rgi_row_held rgi_row_held;
typedef struct rgi_row_need rgi_row_need;
typedef struct rgi_row_made rgi_row_made;
typedef struct rgi_row_cause rgi_row_cause;

typedef struct rgi_rows {
  const rgi_parts *p;
  int n;          /* candidates */
  int32_t nt;     /* rows */
  double unit;    /* bytes that make numbers handy … */
  bool whole;     /* all rows have whole numbers of them */
  double unit_ms; /* … and ms */
  /* per candidate, of the last program: how far it is computed again, 0 … 1; what deciding it
   * the other way adds to `last`, < 0: to keep it */
  double *value, *cost;
  double last;  /* the bound that goes with them */
  int64_t work; /* done so far, in steps of some 10 ns */
  /* what the graph is made of */
  rgi_row_unit *node;
  int *dep;
  rgi_row_held *held;
  rgi_row_need *need;
  int *reader, *lacks, nnode, nneed; /* lacks: the program's rows, or -1 */
  rgi_row_made *made;
  rgi_row_cause *cause;
  int nmade, ncause;
  double unread; /* ms of what is chosen in any case, and may be read by nobody */
  double saved;  /* units, if nothing is computed again */
  /* the program */
  rgi_simplex *program;
  int *column;  /* per candidate; -1: kept in any case */
  int *full;    /* [nt]: the program's row; -1: not in it */
  double *over; /* [nt + 1] */
  rgi_weight *term, *cut_term;
  int *cut, ncut; /* the program's rows */
} rgi_rows;

rg_status rgi_rows_open(const rgi_parts *p, rgi_arena *a, rgi_rows **out, rg_error *e);
/* What no choice beats in which those of `again` are computed again, those of `open` may be, and
 * the others are kept; one that reaches `most` is enough, and so are so many rounds, of which so
 * many add cuts where nothing else is missing. */
double rgi_rows_bound(rgi_rows *r, const uint64_t *again, const uint64_t *open, int rounds,
                      int cuts, double most);
/* The same for one of `open` that is decided, by a few pivots; `value` and `cost` stay. */
double rgi_rows_try(rgi_rows *r, int candidate, bool again, double most);

#endif
