/* recompute/rows.h: what a choice made in part takes at least, by bytes at every row; for prove.c.
 */
#ifndef RGI_RECOMPUTE_ROWS_H
#define RGI_RECOMPUTE_ROWS_H

#include "bound.h"

typedef struct rgi_row_unit rgi_row_unit;
typedef struct rgi_row_held rgi_row_held;
typedef struct rgi_row_need rgi_row_need;
typedef struct rgi_row_term rgi_row_term;
typedef struct rgi_row_pull rgi_row_pull;

typedef struct rgi_rows {
  const rgi_parts *p;
  int n;         /* candidates */
  int32_t nt;    /* rows */
  double unit;   /* bytes that make numbers handy */
  double *price; /* [nt]: ms of a unit at each row */
  double *lack;  /* … behind them, per reader of a need: ms */
  double *cost; /* per open candidate: at these prices, of computing it again, less what it frees */
  double last;  /* the bound that goes with `cost` */
  double over;  /* units above the budget at the fullest row if nothing open is computed again */
  int64_t work; /* done so far, in steps of some 10 ns */
  /* what the graph is made of */
  rgi_row_unit *node;
  int *dep;
  rgi_row_held *held;
  rgi_row_need *need;
  int *reader, nnode, nneed;
  double unread; /* ms of what is chosen in any case, and may be read by nobody */
  /* what is decided */
  const uint64_t *again, *open;
  double ms, *exceeds, *excess, *frees; /* exceeds: without shares */
  double *mean, rate; /* per candidate: how far it was taken, 0 … 1; what a step adds to that */
  rgi_row_term *term;
  rgi_row_pull *pull;
  int nown, nterm, npull, most_terms;
  /* room of its own */
  int *made, *seen, *head, *list, nlist;
  double *sum, *slope, *way, *best;
} rgi_rows;

rg_status rgi_rows_open(const rgi_parts *p, rgi_arena *a, rgi_rows **out, rg_error *e);
/* Those of `again` are computed again, those of `open` may be, the others are kept. */
void rgi_rows_decide(rgi_rows *r, const uint64_t *again, const uint64_t *open);
/* Shares what may be there for several out anew, by `mean`. */
void rgi_rows_share(rgi_rows *r);
/* What no choice beats that goes on from there, whatever the prices are. Fills `cost`. */
double rgi_rows_bound(rgi_rows *r);
/* The same at the best of so many prices, which it leaves; one that reaches `most` is enough. */
double rgi_rows_best(rgi_rows *r, int steps, double most);

#endif
