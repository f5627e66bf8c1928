/* recompute/basis.c: what is basic as a product of two triangles, L and U, and what has changed
   since as factors behind them.

   Most of what is basic here are rows' own columns and columns of few numbers, so nearly all of it
   is a triangle as it stands, once rows and columns are in a good order: a column with one number
   left, or a row. Only what is left then, a tenth or so, is eliminated, column by column, the
   sparsest first, by the largest number or one near that in a sparser row. A column that is
   replaced is one factor more (the product form), so to go back is to forget factors: what is tried
   for some pivots needs no copy.
 */
#include "basis.h"
#include <math.h>
#include <string.h>

enum { FEW_FACTORS = 16 };
static const double TINY = 1e-9, ZERO = 1e-14, NEAR = 0.1, WORN = 0.4;

/* The identity, but for a column: what is there is x[place] / by, the others lose it times their
 * numbers; or, bent, but for a row: what is there gains the others times its numbers. */
typedef struct factor {
  int place, first, n;
  double by; /* 0: bent */
} factor;

struct rgi_basis {
  rgi_arena *arena;
  int m, taken; /* rows; … when it was taken apart */
  /* by steps: row and place of the pivot, its number, where its column of U begins */
  int *row, *place, *u;
  double *pivot;
  /* columns of L that have any numbers */
  int nl, *l, *l_row;
  rgi_vector lower, upper, changed, one;
  /* U by its rows, of places: at[turned_at[k] …] for step k's row */
  rgi_weight *turned;
  int *turned_at, most_turned;
  factor *factor;
  int nfactor, most_factors;
  /* scratch, by rows or places */
  int *row_n, *column_n, *row_at, *of_row, *stack, *active_row, *active_column;
  int most_entries;
  bool *row_done, *column_done;
  double *x;
  int64_t work;
};

bool rgi_vector_add(rgi_vector *v, rgi_arena *a, int of, double by) {
  if (v->n == v->room) {
    const int room = 2 * v->room + 8;
    rgi_weight *next = rgi_alloc_n(a, (size_t)room, sizeof *next);
    if (!next) return false;
    if (v->n) memcpy(next, v->at, (size_t)v->n * sizeof *next);
    v->at = next;
    v->room = room;
  }
  v->at[v->n++] = (rgi_weight){of, by};
  return true;
}

rg_status rgi_basis_open(int most, rgi_arena *a, rgi_basis **out, rg_error *e) {
  rgi_basis *b = *out = rgi_alloc(a, sizeof *b);
  if (!b) return rgi_nomem(e);
  *b = (rgi_basis){.arena = a};
  const size_t n = (size_t)most + 2;
  int **const of[] = {&b->row,           &b->place,    &b->u,        &b->l,     &b->l_row,
                      &b->row_n,         &b->row_at,   &b->column_n, &b->stack, &b->active_row,
                      &b->active_column, &b->turned_at};
  bool all = true;
  for (int i = 0; i < RGI_COUNT(of); i++) all &= (*of[i] = rgi_alloc_n(a, n, sizeof(int))) != NULL;
  b->pivot = rgi_alloc_n(a, n, sizeof *b->pivot);
  b->x = rgi_alloc_n(a, n, sizeof *b->x);
  b->row_done = rgi_alloc_n(a, n, sizeof *b->row_done);
  b->column_done = rgi_alloc_n(a, n, sizeof *b->column_done);
  return all && b->pivot && b->x && b->row_done && b->column_done ? RG_OK : rgi_nomem(e);
}

int64_t rgi_basis_work(const rgi_basis *b) {
  return b->work;
}

int rgi_basis_mark(const rgi_basis *b) {
  return b->nfactor;
}

void rgi_basis_back(rgi_basis *b, int mark) {
  b->nfactor = mark;
  b->changed.n = mark ? b->factor[mark - 1].first + b->factor[mark - 1].n : 0;
}

bool rgi_basis_worn(const rgi_basis *b) {
  return b->nfactor > FEW_FACTORS && b->changed.n > WORN * (b->upper.n + b->lower.n + b->m);
}

/* ---- taking it apart ---- */

/* Places that have a number in each row, of_row[row_at[r] …]. */
static bool turn(rgi_basis *b, const rgi_vector *const *column) {
  int n = 0;
  memset(b->row_n, 0, (size_t)b->m * sizeof *b->row_n);
  for (int i = 0; i < b->m; i++) {
    b->column_n[i] = column[i]->n;
    n += column[i]->n;
    for (int k = 0; k < column[i]->n; k++) b->row_n[column[i]->at[k].of]++;
  }
  if (n > b->most_entries) {
    b->most_entries = 2 * n;
    b->of_row = rgi_alloc_n(b->arena, (size_t)b->most_entries, sizeof *b->of_row);
    if (!b->of_row) b->most_entries = 0;
    if (!b->of_row) return false;
  }
  b->row_at[0] = 0;
  for (int r = 0; r < b->m; r++) b->row_at[r + 1] = b->row_at[r] + b->row_n[r];
  for (int i = 0; i < b->m; i++)
    for (int k = 0; k < column[i]->n; k++) {
      const int r = column[i]->at[k].of;
      b->of_row[b->row_at[r + 1] - b->row_n[r]--] = i;
    }
  for (int r = 0; r < b->m; r++) b->row_n[r] = b->row_at[r + 1] - b->row_at[r];
  b->work += 4 * n + 4 * b->m;
  return true;
}

/* The step's pivot; what its column has in rows of earlier steps is U's, in later ones L's. */
static bool step(rgi_basis *b, const rgi_weight *at, int n, int r, int i, double pivot) {
  const int k = b->taken++, lower = b->lower.n;
  bool room = true;
  b->row[k] = r;
  b->place[k] = i;
  b->pivot[k] = pivot;
  for (int q = 0; q < n && room; q++) {
    if (at[q].of == r) continue;
    room = b->row_done[at[q].of] ? rgi_vector_add(&b->upper, b->arena, at[q].of, at[q].by)
                                 : rgi_vector_add(&b->lower, b->arena, at[q].of, at[q].by / pivot);
  }
  b->u[k + 1] = b->upper.n;
  if (b->lower.n > lower) {
    b->l_row[b->nl++] = r;
    b->l[b->nl] = b->lower.n;
  }
  b->row_done[r] = b->column_done[i] = true;
  b->work += n;
  return room;
}

/* The pivot that is alone in its column or row. */
static bool single(rgi_basis *b, const rgi_vector *column, int r, int i) {
  for (int k = 0; k < column->n; k++)
    if (column->at[k].of == r) {
      /* too small: the rest may still have better */
      if (fabs(column->at[k].by) < TINY) return true;
      return step(b, column->at, column->n, r, i, column->at[k].by);
    }
  return true;
}

static bool triangles(rgi_basis *b, const rgi_vector *const *column) {
  int n = 0;
  for (int i = 0; i < b->m; i++)
    if (b->column_n[i] == 1) b->stack[n++] = i;
  while (n > 0) { /* columns with one number left */
    const int i = b->stack[--n];
    int r = -1;
    if (b->column_done[i]) continue;
    for (int k = 0; k < column[i]->n && r < 0; k++)
      if (!b->row_done[column[i]->at[k].of]) r = column[i]->at[k].of;
    if (r < 0) continue;
    if (!single(b, column[i], r, i)) return false;
    for (int k = b->row_at[r]; k < b->row_at[r + 1] && b->row_done[r]; k++)
      if (--b->column_n[b->of_row[k]] == 1 && !b->column_done[b->of_row[k]])
        b->stack[n++] = b->of_row[k];
    b->work += b->row_at[r + 1] - b->row_at[r] + column[i]->n;
  }
  for (int r = 0; r < b->m; r++) {
    if (b->row_done[r]) continue;
    int left = 0;
    for (int k = b->row_at[r]; k < b->row_at[r + 1]; k++) left += !b->column_done[b->of_row[k]];
    b->row_n[r] = left;
    b->work += b->row_at[r + 1] - b->row_at[r];
    if (left == 1) b->stack[n++] = r;
  }
  while (n > 0) { /* rows with one left */
    const int r = b->stack[--n];
    int i = -1;
    for (int k = b->row_at[r]; k < b->row_at[r + 1] && i < 0 && !b->row_done[r]; k++)
      if (!b->column_done[b->of_row[k]]) i = b->of_row[k];
    b->work += b->row_at[r + 1] - b->row_at[r];
    if (i < 0) continue;
    if (!single(b, column[i], r, i)) return false;
    for (int k = 0; k < column[i]->n && b->column_done[i]; k++) {
      const int q = column[i]->at[k].of;
      if (!b->row_done[q] && --b->row_n[q] == 1) b->stack[n++] = q;
    }
  }
  return true;
}

/* What L makes of the column in b->x, from there on. */
static void eliminate(rgi_basis *b, int first) {
  for (int k = first; k < b->nl; k++) {
    const double x = b->x[b->l_row[k]];
    if (x == 0) continue;
    for (int q = b->l[k]; q < b->l[k + 1]; q++) b->x[b->lower.at[q].of] -= b->lower.at[q].by * x;
    b->work += b->l[k + 1] - b->l[k];
  }
  b->work += b->nl - first;
}

/* Of the largest numbers left the one in the sparsest row; -1: none. */
static int best_row(const rgi_basis *b, int nrow) {
  double most = 0;
  int best = -1;
  for (int k = 0; k < nrow; k++) {
    const int r = b->active_row[k];
    if (!b->row_done[r]) most = fmax(most, fabs(b->x[r]));
  }
  if (most < TINY) return -1;
  for (int k = 0; k < nrow; k++) {
    const int r = b->active_row[k];
    if (b->row_done[r] || fabs(b->x[r]) < NEAR * most) continue;
    if (best < 0 || b->row_n[r] < b->row_n[best]) best = r;
  }
  return best;
}

/* What is left to do, columns of few numbers first. */
static int by_size(rgi_basis *b) {
  int *at = b->row_at, n = 0;
  memset(at, 0, ((size_t)b->m + 2) * sizeof *at);
  for (int i = 0; i < b->m; i++)
    if (!b->column_done[i]) at[b->column_n[i] + 1]++, n++;
  for (int k = 1; k <= b->m; k++) at[k] += at[k - 1];
  for (int i = 0; i < b->m; i++)
    if (!b->column_done[i]) b->active_column[at[b->column_n[i]]++] = i;
  b->work += 3 * b->m;
  return n;
}

/* The same of what no triangle has; columns that come to nothing stay. */
static bool nucleus(rgi_basis *b, const rgi_vector *const *column) {
  const int first = b->nl, ncolumn = by_size(b);
  int nrow = 0;
  for (int r = 0; r < b->m; r++)
    if (!b->row_done[r]) b->active_row[nrow++] = r;
  for (int c = 0; c < ncolumn; c++) {
    const int i = b->active_column[c];
    rgi_vector *one = &b->one;
    bool room = true;
    one->n = 0;
    for (int k = 0; k < column[i]->n; k++) b->x[column[i]->at[k].of] = column[i]->at[k].by;
    eliminate(b, first);
    const int r = best_row(b, nrow);
    const double pivot = r >= 0 ? b->x[r] : 0;
    for (int k = 0; k < nrow; k++) {
      const int q = b->active_row[k];
      if (fabs(b->x[q]) > ZERO) room &= rgi_vector_add(one, b->arena, q, b->x[q]);
      b->x[q] = 0;
    }
    for (int k = 0; k < column[i]->n; k++) { /* and rows of the triangles */
      const int q = column[i]->at[k].of;
      if (b->x[q] != 0) room &= rgi_vector_add(one, b->arena, q, b->x[q]);
      b->x[q] = 0;
    }
    b->work += 3 * nrow;
    if (!room || (r >= 0 && !step(b, one->at, one->n, r, i, pivot))) return false;
  }
  return true;
}

/* U by its rows. */
static bool turn_upper(rgi_basis *b) {
  int *at = b->turned_at, *step_of = b->row_at;
  if (b->upper.n > b->most_turned) {
    b->most_turned = 2 * b->upper.n;
    b->turned = rgi_alloc_n(b->arena, (size_t)b->most_turned, sizeof *b->turned);
    if (!b->turned) b->most_turned = 0;
    if (!b->turned) return false;
  }
  for (int k = 0; k < b->m; k++) step_of[b->row[k]] = k;
  memset(at, 0, ((size_t)b->m + 1) * sizeof *at);
  for (int q = 0; q < b->upper.n; q++) at[step_of[b->upper.at[q].of] + 1]++;
  for (int k = 0; k < b->m; k++) at[k + 1] += at[k];
  for (int k = b->m - 1; k >= 0; k--)
    for (int q = b->u[k]; q < b->u[k + 1]; q++) {
      const int row = step_of[b->upper.at[q].of];
      b->turned[--at[row + 1]] = (rgi_weight){b->place[k], b->upper.at[q].by};
    }
  /* at[k + 1] is where k's begin now */
  for (int k = 0; k < b->m; k++) at[k] = at[k + 1];
  at[b->m] = b->upper.n;
  b->work += 3 * b->upper.n + 2 * b->m;
  return true;
}

int rgi_basis_factor(rgi_basis *b, const rgi_vector *const *column, int m, int *lost, int *row) {
  int n = 0, r = 0;
  b->m = m;
  b->taken = b->nl = b->nfactor = 0;
  b->lower.n = b->upper.n = b->changed.n = 0;
  b->u[0] = b->l[0] = 0;
  memset(b->row_done, 0, (size_t)m * sizeof *b->row_done);
  memset(b->column_done, 0, (size_t)m * sizeof *b->column_done);
  memset(b->x, 0, (size_t)m * sizeof *b->x);
  if (!turn(b, column) || !triangles(b, column) || !nucleus(b, column)) return -1;
  for (int i = 0; i < m; i++) {
    if (b->column_done[i]) continue;
    while (b->row_done[r]) r++;
    lost[n] = i;
    row[n++] = r;
    step(b, &(rgi_weight){r, -1}, 1, r, i, -1);
  }
  return turn_upper(b) ? n : -1;
}

void rgi_basis_extend(rgi_basis *b) {
  b->m++;
}

/* ---- what has changed since ---- */

static factor *new_factor(rgi_basis *b) {
  if (b->nfactor == b->most_factors) {
    const int most = 2 * b->most_factors + 64;
    factor *next = rgi_alloc_n(b->arena, (size_t)most, sizeof *next);
    if (!next) return NULL;
    if (b->nfactor) memcpy(next, b->factor, (size_t)b->nfactor * sizeof *next);
    b->factor = next;
    b->most_factors = most;
  }
  return &b->factor[b->nfactor++];
}

bool rgi_basis_bend(rgi_basis *b, int place, const rgi_weight *more, int n) {
  factor *f = new_factor(b);
  if (!f) return false;
  *f = (factor){.place = place, .first = b->changed.n, .n = n};
  for (int k = 0; k < n; k++)
    if (!rgi_vector_add(&b->changed, b->arena, more[k].of, more[k].by)) return false;
  b->work += n;
  return true;
}

bool rgi_basis_replace(rgi_basis *b, int place, const double *x) {
  factor *f = new_factor(b);
  if (!f) return false;
  *f = (factor){.place = place, .first = b->changed.n, .by = x[place]};
  for (int i = 0; i < b->m; i++)
    if (fabs(x[i]) > ZERO && i != place && !rgi_vector_add(&b->changed, b->arena, i, x[i]))
      return false;
  f->n = b->changed.n - f->first;
  b->work += b->m / 4 + f->n;
  return true;
}

/* ---- equations ---- */

void rgi_basis_solve(rgi_basis *b, double *x) {
  double *y = b->x;
  int64_t work = b->nl;
  for (int k = 0; k < b->nl; k++) {
    const double by = x[b->l_row[k]];
    if (by == 0) continue;
    for (int q = b->l[k]; q < b->l[k + 1]; q++) x[b->lower.at[q].of] -= b->lower.at[q].by * by;
    work += b->l[k + 1] - b->l[k];
  }
  for (int k = b->taken - 1; k >= 0; k--) {
    double by = x[b->row[k]];
    if (by != 0) {
      by /= b->pivot[k];
      for (int q = b->u[k]; q < b->u[k + 1]; q++) x[b->upper.at[q].of] -= b->upper.at[q].by * by;
      work += b->u[k + 1] - b->u[k];
    }
    y[b->place[k]] = by;
  }
  for (int i = b->taken; i < b->m; i++) y[i] = -x[i];
  memcpy(x, y, (size_t)b->m * sizeof *x);
  for (int k = 0; k < b->nfactor; k++) {
    const factor *f = &b->factor[k];
    const rgi_weight *at = b->changed.at + f->first;
    if (f->by == 0) {
      double sum = 0;
      for (int q = 0; q < f->n; q++) sum += at[q].by * x[at[q].of];
      x[f->place] += sum;
      work += f->n;
    } else if (x[f->place] != 0) {
      const double by = x[f->place] /= f->by;
      for (int q = 0; q < f->n; q++) x[at[q].of] -= at[q].by * by;
      work += f->n;
    }
  }
  b->work += work + b->m / 2 + b->nfactor;
}

void rgi_basis_price(rgi_basis *b, double *x) {
  double *y = b->x;
  int64_t work = b->nl;
  for (int k = b->nfactor - 1; k >= 0; k--) {
    const factor *f = &b->factor[k];
    const rgi_weight *at = b->changed.at + f->first;
    if (f->by == 0) {
      const double by = x[f->place];
      if (by == 0) continue;
      for (int q = 0; q < f->n; q++) x[at[q].of] += at[q].by * by;
    } else {
      double sum = x[f->place];
      for (int q = 0; q < f->n; q++) sum -= at[q].by * x[at[q].of];
      x[f->place] = sum / f->by;
    }
    work += f->n;
  }
  for (int k = 0; k < b->taken; k++) {
    double by = x[b->place[k]];
    if (by != 0) {
      by /= b->pivot[k];
      for (int q = b->turned_at[k]; q < b->turned_at[k + 1]; q++)
        x[b->turned[q].of] -= b->turned[q].by * by;
      work += b->turned_at[k + 1] - b->turned_at[k];
    }
    y[b->row[k]] = by;
  }
  for (int i = b->taken; i < b->m; i++) y[i] = -x[i];
  for (int k = b->nl - 1; k >= 0; k--) {
    double sum = y[b->l_row[k]];
    for (int q = b->l[k]; q < b->l[k + 1]; q++) sum -= b->lower.at[q].by * y[b->lower.at[q].of];
    y[b->l_row[k]] = sum;
  }
  memcpy(x, y, (size_t)b->m * sizeof *x);
  b->work += work + b->lower.n + b->m / 2 + b->nfactor;
}
