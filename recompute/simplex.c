/* recompute/simplex.c: the dual simplex algorithm with bounds on columns, revised: of the tableau
   only the row that leaves and the column that enters are made, from what is basic (basis.c).

   Whatever stands at a bound may go to the other one on the way (long steps), so bounds may change
   without losing what was found: every solution goes on from the last. Rows are added with their
   own columns basic, and dropped only so, which bends what is basic instead of changing it. Which
   row leaves is decided by steepest edges, what enters by the largest number among those whose
   prices end within a hair of each other (Harris), and no two costs are quite alike. The bound that
   is given out is computed from the rows as they were added and the prices found, with the costs as
   they are: so it holds whatever rounding, tilts and tolerances did.
 */
#include "simplex_parts.h"
#include <math.h>
#include <string.h>

enum { MOST_PIVOTS = 4, SPARE_PIVOTS = 200 /* of a solution: a row, and beside that */ };
static const double NEAR = 1e-7, TINY = 1e-9, ZERO = 1e-13, TILT = 1e-5, LIFT = 1e-7, OFF = 1e-6,
                    SLACK = 1e-9, LEAST_NORM = 1e-4, LISTED = 1e-300;
/* Of a row that nothing can bring in, how far it is out at least: prices go up by what they are to
 * come to over that, and with them what rounding makes of their sum. */
static const double LEAST_GAIN = 1e-5;
/* What stands for no bound at all, and a price that is none beside it. */
static const double FAR = 1e7, NO_PRICE = 1e-9;

rg_status rgi_simplex_open(int columns, int rows, rgi_arena *a, rgi_simplex **out, rg_error *e) {
  rgi_simplex *s = *out = rgi_alloc(a, sizeof *s);
  if (!s) return rgi_nomem(e);
  *s = (rgi_simplex){.arena = a, .most_columns = columns, .most_rows = rows};
  const size_t n = (size_t)columns + 1, m = (size_t)rows + 1;
  s->column = rgi_alloc_n(a, n, sizeof *s->column);
  s->row = rgi_alloc_n(a, m, sizeof *s->row);
  s->basic = rgi_alloc_n(a, m, sizeof *s->basic);
  s->kept_basic = rgi_alloc_n(a, m, sizeof *s->kept_basic);
  s->spare = rgi_alloc_n(a, m, sizeof *s->spare);
  s->used = rgi_alloc_n(a, m, sizeof *s->used);
  s->touched = rgi_alloc_n(a, n, sizeof *s->touched);
  s->lost = rgi_alloc_n(a, m, sizeof *s->lost);
  s->lost_row = rgi_alloc_n(a, m, sizeof *s->lost_row);
  s->enter = rgi_alloc_n(a, n + m, sizeof *s->enter);
  double **const of[] = {&s->value, &s->norm,   &s->kept_norm, &s->along, &s->across, &s->edge,
                         &s->move,  &s->by_row, &s->weight,    &s->least, &s->most};
  bool all = true;
  for (int i = 0; i < RGI_COUNT(of); i++)
    all &= (*of[i] = rgi_alloc_n(a, m, sizeof(double))) != NULL;
  s->by_column = rgi_alloc_n(a, n, sizeof *s->by_column);
  if (s->by_column) memset(s->by_column, 0, n * sizeof *s->by_column);
  s->of_cut = rgi_alloc_n(a, n, sizeof *s->of_cut);
  s->factored = rgi_alloc_n(a, m, sizeof *s->factored);
  s->own = rgi_alloc_n(a, m, sizeof *s->own);
  s->own_weight = rgi_alloc_n(a, m, sizeof *s->own_weight);
  if (!s->column || !s->row || !s->basic || !s->kept_basic || !s->spare || !s->used ||
      !s->touched || !s->lost || !s->lost_row || !s->enter || !all || !s->by_column || !s->of_cut ||
      !s->factored || !s->own || !s->own_weight)
    return rgi_nomem(e);
  return rgi_basis_open(rows, a, &s->basis, e);
}

int rgi_simplex_rows(const rgi_simplex *s) {
  return s->m - s->nspare;
}

int64_t rgi_simplex_work(const rgi_simplex *s) {
  return s->work + rgi_basis_work(s->basis) / 8;
}

static double stands(const rgi_line *x) {
  return x->high ? fmin(x->hi, FAR) : fmax(x->lo, -FAR);
}

double rgi_simplex_value(const rgi_simplex *s, int column) {
  const rgi_line *x = &s->column[column];
  return x->where >= 0 ? s->value[x->where] : stands(x);
}

double rgi_simplex_reduced(const rgi_simplex *s, int column) {
  return s->column[column].reduced;
}

int rgi_simplex_idle(const rgi_simplex *s, int row) {
  return s->row[row].idle;
}

/* What is basic there, or moves: a column, or ~r for what row r is above its right hand side. */
static rgi_line *line_of(rgi_simplex *s, int v) {
  return v >= 0 ? &s->column[v] : &s->row[~v];
}

/* ---- rows and columns ---- */

/* Between 0 and 1, never the same. */
static double part_of(int v) {
  return ((unsigned)v * 2654435761u >> 16) / (double)(1 << 16);
}

/* No memory for all of a row or column: nothing is said any more. */
static int broken(rgi_simplex *s) {
  s->broken = true;
  return -1;
}

int rgi_simplex_column(rgi_simplex *s, double cost, double lo, double hi, const rgi_weight *in,
                       int n) {
  if (s->n == s->most_columns) return -1;
  const int v = s->n;
  rgi_line *x = &s->column[v];
  *x = (rgi_line){.lo = lo, .hi = hi, .cost = cost, .where = -1};
  x->tilted = cost * (1 - TILT * part_of(v)) + LIFT * part_of(v);
  for (int k = 0; k < n; k++) {
    rgi_line *row = &s->row[in[k].of];
    if (!rgi_vector_add(&x->of, s->arena, in[k].of, in[k].by) ||
        !rgi_vector_add(&row->of, s->arena, v, in[k].by))
      return broken(s);
    row->whole &= in[k].by == floor(in[k].by);
  }
  s->nentry += n;
  s->n++;
  return v;
}

/* A row's own column: basic, and of nothing else. */
static int new_row(rgi_simplex *s) {
  if (s->nspare) return s->spare[--s->nspare];
  const int r = s->m++;
  s->basic[r] = ~r;
  s->row[r].where = r;
  s->own_weight[r] = (rgi_weight){r, -1};
  s->own[r] = (rgi_vector){.at = &s->own_weight[r], .n = 1, .room = 1};
  s->norm[r] = 1;
  rgi_basis_extend(s->basis);
  return r;
}

/* Bends what is basic to what the row has, or back. */
static void bend(rgi_simplex *s, int r, double sign) {
  const rgi_line *row = &s->row[r];
  int n = 0;
  for (int k = 0; k < row->of.n; k++) {
    const int at = s->column[row->of.at[k].of].where;
    if (at >= 0) s->term[n++] = (rgi_weight){at, sign * row->of.at[k].by};
  }
  if (n && !rgi_basis_bend(s->basis, row->where, s->term, n)) s->stale = true;
}

int rgi_simplex_row(rgi_simplex *s, const rgi_weight *of, int n, double least) {
  if (s->m == s->most_rows && !s->nspare) return -1;
  if (!s->term) s->term = rgi_alloc_n(s->arena, (size_t)s->most_columns + 1, sizeof *s->term);
  if (!s->term) return -1;
  const int r = new_row(s), where = s->row[r].where;
  rgi_line *x = &s->row[r];
  *x = (rgi_line){.hi = INFINITY,
                  .least = least,
                  .where = where,
                  .there = true,
                  .whole = least == floor(least),
                  .of = {x->of.at, 0, x->of.room}};
  for (int k = 0; k < s->ntouched; k++) s->by_column[s->touched[k]] = 0;
  s->ntouched = 0;
  for (int k = 0; k < n; k++) s->by_column[of[k].of] += of[k].by;
  for (int k = 0; k < n; k++) {
    const int v = of[k].of;
    const double by = s->by_column[v]; /* whoever is named twice has one number */
    s->by_column[v] = 0;
    if (by == 0) continue;
    x->whole &= by == floor(by);
    if (!rgi_vector_add(&x->of, s->arena, v, by) ||
        !rgi_vector_add(&s->column[v].of, s->arena, r, by))
      return broken(s);
  }
  s->nentry += x->of.n;
  s->norm[where] = 0; /* not known yet */
  bend(s, r, 1);
  s->work += n / 4;
  return r;
}

void rgi_simplex_bounds(rgi_simplex *s, int column, double lo, double hi) {
  s->column[column].lo = lo;
  s->column[column].hi = hi;
}

void rgi_simplex_drop(rgi_simplex *s, int row) {
  rgi_line *x = &s->row[row];
  if (x->where < 0 || !x->there) return;
  bend(s, row, -1);
  for (int k = 0; k < x->of.n; k++) {
    rgi_vector *c = &s->column[x->of.at[k].of].of;
    for (int i = c->n - 1; i >= 0; i--)
      if (c->at[i].of == row) c->at[i] = c->at[--c->n];
    s->work += c->n / 8;
  }
  s->nentry -= x->of.n;
  s->norm[x->where] = 1;
  x->of.n = 0;
  x->there = false;
  x->least = x->idle = 0;
  s->spare[s->nspare++] = row;
}

/* ---- from scratch ---- */

/* += by times the column, by rows. */
static void add_column(const rgi_simplex *s, double *x, int v, double by) {
  if (v < 0) {
    x[~v] -= by;
    return;
  }
  const rgi_vector *of = &s->column[v].of;
  for (int k = 0; k < of->n; k++) x[of->at[k].of] += by * of->at[k].by;
}

/* Takes apart what is basic. */
static bool factor(rgi_simplex *s) {
  for (int i = 0; i < s->m; i++)
    s->factored[i] = s->basic[i] < 0 ? &s->own[~s->basic[i]] : &s->column[s->basic[i]].of;
  const int n = rgi_basis_factor(s->basis, s->factored, s->m, s->lost, s->lost_row);
  for (int k = 0; k < n; k++) {
    line_of(s, s->basic[s->lost[k]])->where = -1;
    s->basic[s->lost[k]] = ~s->lost_row[k];
  }
  for (int k = 0; k < n; k++) s->row[s->lost_row[k]].where = s->lost[k];
  for (int i = 0; i < s->m && n > 0; i++) s->norm[i] = 1;
  s->stale = n < 0;
  return n >= 0;
}

/* Of all rows and columns by the prices of rows: what a unit adds, of rows nothing. */
static void reduce(rgi_simplex *s, const double *price, bool tilted) {
  for (int v = 0; v < s->n; v++) {
    rgi_line *x = &s->column[v];
    x->reduced = tilted ? x->tilted : x->cost;
  }
  for (int r = 0; r < s->m; r++) {
    const double by = s->row[r].reduced = price[r];
    const rgi_vector *of = &s->row[r].of;
    if (by == 0) continue;
    for (int k = 0; k < of->n; k++) s->column[of->at[k].of].reduced -= by * of->at[k].by;
    s->work += of->n / 8;
  }
  s->work += (s->n + s->m) / 8;
}

static void find_prices(rgi_simplex *s, double *price, bool tilted) {
  for (int i = 0; i < s->m; i++) {
    const int v = s->basic[i];
    price[i] = v < 0 ? 0 : tilted ? s->column[v].tilted : s->column[v].cost;
  }
  rgi_basis_price(s->basis, price);
}

/* The norms of rows that are new. */
static void find_norms(rgi_simplex *s) {
  for (int i = 0; i < s->m; i++) {
    if (s->norm[i] > 0) continue;
    double sum = 0;
    memset(s->edge, 0, (size_t)s->m * sizeof *s->edge);
    s->edge[i] = 1;
    rgi_basis_price(s->basis, s->edge);
    for (int r = 0; r < s->m; r++) sum += s->edge[r] * s->edge[r];
    s->norm[i] = fmax(sum, LEAST_NORM);
    s->work += s->m / 4;
  }
}

/* What everything is worth by what is basic. What stands at the wrong bound goes to the other. */
static void begin(rgi_simplex *s) {
  find_prices(s, s->along, true);
  reduce(s, s->along, true);
  for (int r = 0; r < s->m; r++) {
    s->value[r] = s->row[r].least;
    s->row[r].reduced = s->row[r].where >= 0 ? 0 : fmax(s->row[r].reduced, 0);
  }
  s->cost = 0;
  for (int v = 0; v < s->n; v++) {
    rgi_line *x = &s->column[v];
    if (x->where >= 0) {
      x->reduced = 0;
      continue;
    }
    if (fabs(x->reduced) > SLACK)
      x->high = x->reduced < 0;
    else
      x->reduced = 0;
    const double at = stands(x);
    s->cost += x->tilted * at;
    if (at != 0) add_column(s, s->value, v, -at);
  }
  rgi_basis_solve(s->basis, s->value);
  for (int i = 0; i < s->m; i++) {
    const rgi_line *x = line_of(s, s->basic[i]);
    s->cost += x->tilted * s->value[i];
    s->least[i] = x->lo;
    s->most[i] = x->hi;
  }
  s->work += (s->nentry + s->n) / 8;
}

/* ---- pivots ---- */

/* How far what is basic there is out of its bounds: < 0 below. */
static double outside(const rgi_simplex *s, int i) {
  if (s->value[i] < s->least[i] - NEAR) return s->value[i] - s->least[i];
  return s->value[i] > s->most[i] + NEAR ? s->value[i] - s->most[i] : 0;
}

/* The farthest out, as seen along its edge; -1: none is. */
static int leaves(rgi_simplex *s) {
  int best = -1;
  double most = 0;
  for (int i = 0; i < s->m; i++) {
    const double out = outside(s, i);
    if (out * out > most * s->norm[i]) most = out * out / s->norm[i], best = i;
  }
  s->work += s->m / 4;
  return best;
}

/* The tableau's row of what is basic at i: s->across by rows, then by_column and by_row of what is
 * not, and which have any. */
static void look_across(rgi_simplex *s, int i) {
  int64_t touched = s->m / 2;
  for (int k = 0; k < s->ntouched; k++) s->by_column[s->touched[k]] = 0;
  s->ntouched = s->nused = 0;
  memset(s->across, 0, (size_t)s->m * sizeof *s->across);
  s->across[i] = 1;
  rgi_basis_price(s->basis, s->across);
  for (int r = 0; r < s->m; r++) {
    const double by = s->across[r];
    if (by == 0) continue;
    if (fabs(by) < ZERO) {
      s->across[r] = 0;
      continue;
    }
    const rgi_line *row = &s->row[r];
    s->used[s->nused++] = r;
    s->by_row[r] = row->where < 0 ? -by : 0;
    for (int k = 0; k < row->of.n; k++) {
      double *x = &s->by_column[row->of.at[k].of];
      if (*x == 0) s->touched[s->ntouched++] = row->of.at[k].of;
      *x += by * row->of.at[k].by;
      if (*x == 0) *x = LISTED;
    }
    touched += row->of.n + 4;
  }
  s->work += touched / 8;
}

static double across(const rgi_simplex *s, int v) {
  return v < 0 ? s->by_row[~v] : s->by_column[v];
}

static double width(rgi_simplex *s, int v) {
  const rgi_line *x = line_of(s, v);
  return v < 0 ? INFINITY : fmin(x->hi, FAR) - fmax(x->lo, -FAR);
}

/* Which may move so that what is out by so much comes in. */
static int may_enter(rgi_simplex *s, double out) {
  const double sign = out < 0 ? -1 : 1;
  int n = 0;
  for (int k = 0; k < s->ntouched; k++) {
    const int v = s->touched[k];
    const rgi_line *x = &s->column[v];
    const double by = sign * s->by_column[v];
    if (x->where < 0 && (x->high ? by < -TINY : by > TINY) && x->lo < x->hi) s->enter[n++] = v;
  }
  for (int k = 0; k < s->nused; k++)
    if (sign * s->by_row[s->used[k]] > TINY) s->enter[n++] = ~s->used[k];
  s->work += (s->ntouched + s->nused) / 4;
  return n;
}

/* What is to enter; what comes before goes to its other bound and ends in s->enter[*passed …].
 * *left: how far it is out after that. Of those whose prices end first, within a hair, the one with
 * the largest number. None: *none, the rows contradict each other. */
static int enters(rgi_simplex *s, int n, int *passed, double *left, bool *none) {
  *passed = n;
  *none = false;
  while (n > 0) {
    double end = INFINITY, sum = 0, most = 0;
    int best = -1, m = n;
    for (int k = 0; k < n; k++) {
      const double by = fabs(across(s, s->enter[k]));
      end = fmin(end, (fabs(line_of(s, s->enter[k])->reduced) + SLACK) / by);
    }
    for (int k = 0; k < m;) { /* those to the end of the list */
      const int v = s->enter[k];
      const double by = fabs(across(s, v));
      if (fabs(line_of(s, v)->reduced) > end * by) {
        k++;
        continue;
      }
      sum += by * width(s, v);
      s->enter[k] = s->enter[--m];
      s->enter[m] = v;
      if (by > most) most = by, best = v;
    }
    s->work += n / 4;
    if (*left - sum <= NEAR) return best;
    *left -= sum;
    *passed = n = m;
  }
  *none = true;
  return 0;
}

/* Those that were passed are at their other bounds. */
static void flip(rgi_simplex *s, int from, int to) {
  if (from == to) return;
  memset(s->move, 0, (size_t)s->m * sizeof *s->move);
  for (int k = from; k < to; k++) {
    const int v = s->enter[k];
    rgi_line *x = &s->column[v];
    const double by = x->high ? -width(s, v) : width(s, v);
    add_column(s, s->move, v, by);
    s->cost += x->reduced * by;
    x->high = !x->high;
    s->work += x->of.n / 8;
  }
  rgi_basis_solve(s->basis, s->move);
  for (int i = 0; i < s->m; i++) s->value[i] -= s->move[i];
  s->work += s->m / 8;
}

/* v, with so much of each that is basic in s->along, comes in at i for what leaves to that
 * bound. */
static bool pivot(rgi_simplex *s, int i, int v, double to) {
  rgi_line *in = line_of(s, v), *out = line_of(s, s->basic[i]);
  const double by = s->along[i], step = (s->value[i] - to) / by, price = in->reduced / across(s, v);
  const double at = v < 0 ? 0 : stands(in);
  s->cost += in->reduced * step;
  double norm = 0;
  for (int k = 0; k < s->nused; k++) norm += s->across[s->used[k]] * s->across[s->used[k]];
  memcpy(s->edge, s->across, (size_t)s->m * sizeof *s->edge);
  rgi_basis_solve(s->basis, s->edge);
  for (int k = 0; k < s->m; k++) {
    if (s->along[k] == 0) continue;
    const double f = s->along[k] / by;
    s->value[k] -= s->along[k] * step;
    s->norm[k] = fmax(s->norm[k] + f * (f * norm - 2 * s->edge[k]), LEAST_NORM);
  }
  s->norm[i] = fmax(norm / (by * by), LEAST_NORM);
  s->value[i] = at + step;
  for (int k = 0; k < s->ntouched; k++) {
    rgi_line *x = &s->column[s->touched[k]];
    if (x->where >= 0) continue;
    x->reduced -= price * s->by_column[s->touched[k]];
    if (x->lo < x->hi && (x->high ? x->reduced > 0 : x->reduced < 0)) x->reduced = 0;
  }
  for (int k = 0; k < s->nused; k++) {
    const int r = s->used[k];
    double *reduced = &s->row[r].reduced;
    if (s->by_row[r] != 0) *reduced = fmax(*reduced - price * s->by_row[r], 0);
  }
  out->high = to == out->hi;
  out->reduced = -price;
  out->where = -1;
  in->reduced = 0;
  in->where = i;
  s->basic[i] = v;
  s->least[i] = in->lo;
  s->most[i] = in->hi;
  s->work += s->m / 4 + (s->ntouched + s->nused) / 2;
  return rgi_basis_replace(s->basis, i, s->along);
}

/* ---- the whole ---- */

/* The Lagrangian at prices of rows, as they were added, none below zero. */
static double lagrangian(rgi_simplex *s, double *price) {
  double total = 0;
  for (int r = 0; r < s->m; r++) {
    price[r] = s->row[r].there && price[r] > 0 ? price[r] : 0;
    total += s->row[r].least * price[r];
  }
  reduce(s, price, false);
  for (int v = 0; v < s->n; v++) {
    const rgi_line *x = &s->column[v];
    const double to = x->reduced > 0 ? x->lo : x->hi;
    if (isinf(to) && fabs(x->reduced) <= NO_PRICE) continue;
    if (x->reduced != 0) total += x->reduced * to;
  }
  return total;
}

/* By the row that nothing can bring in: prices that go up along it without end, so far that they
 * come to `most`. */
static double go_up(rgi_simplex *s, double out, double gain, double most) {
  const double way = out < 0 ? -1 : 1;
  double best = -INFINITY, step = (1.001 * (most - s->cost) + 1e-3) / gain;
  for (int r = 0; r < s->m; r++) s->edge[r] = s->row[r].reduced;
  for (int k = 0; k < 2 && best < most; k++, step *= 16) {
    for (int r = 0; r < s->m; r++) s->along[r] = s->edge[r] + way * step * s->across[r];
    best = fmax(best, lagrangian(s, s->along));
  }
  return best;
}

/* Pivots until nothing is out, or that is enough; the bound that it comes to. */
static double run(rgi_simplex *s, int pivots, double most) {
  bool again = false; /* what is basic was taken apart for this very pivot */
  for (int left = pivots; left > 0 && s->cost < most;) {
    if (rgi_basis_worn(s->basis) && !s->trying) {
      if (!factor(s)) break;
      begin(s);
    }
    const int i = leaves(s);
    if (i < 0) break;
    const double out = outside(s, i);
    const double to = out < 0 ? s->least[i] : s->most[i];
    look_across(s, i);
    const int n = may_enter(s, out);
    int passed;
    double gain = fabs(out);
    bool none;
    const int q = enters(s, n, &passed, &gain, &none);
    if (none && gain > LEAST_GAIN) return go_up(s, out, gain, most);
    if (none) break;
    memset(s->along, 0, (size_t)s->m * sizeof *s->along);
    add_column(s, s->along, q, 1);
    rgi_basis_solve(s->basis, s->along);
    if (fabs(s->along[i] - across(s, q)) > OFF * (1 + fabs(s->along[i])) ||
        fabs(s->along[i]) < TINY) {
      if (again || s->trying) break;
      again = true;
      if (!factor(s)) break;
      begin(s);
      continue;
    }
    again = false;
    flip(s, passed, n);
    left--;
    if (!pivot(s, i, q, to)) {
      s->stale = true;
      break;
    }
  }
  if (s->stale && !factor(s)) return -INFINITY;
  find_prices(s, s->along, false);
  return lagrangian(s, s->along);
}

static bool ready(rgi_simplex *s) {
  if (s->broken) return false;
  if ((s->stale || rgi_basis_worn(s->basis)) && !factor(s)) return false;
  find_norms(s);
  begin(s);
  return true;
}

double rgi_simplex_solve(rgi_simplex *s, int pivots, double most) {
  if (!ready(s)) return -INFINITY;
  const double least =
      run(s, pivots ? pivots : MOST_PIVOTS * s->m + SPARE_PIVOTS, most + TILT * fabs(most));
  for (int r = 0; r < s->m && !pivots; r++) {
    rgi_line *x = &s->row[r];
    x->idle = x->where >= 0 && s->value[x->where] > NEAR ? x->idle + 1 : 0;
  }
  return least;
}

double rgi_simplex_try(rgi_simplex *s, int column, double lo, double hi, int pivots, double most) {
  rgi_line *const x = &s->column[column];
  const double lo_before = x->lo, hi_before = x->hi;
  if (s->stale || rgi_basis_worn(s->basis)) {
    if (!factor(s)) return -INFINITY;
  }
  find_norms(s);
  const int mark = rgi_basis_mark(s->basis);
  memcpy(s->kept_basic, s->basic, (size_t)s->m * sizeof *s->basic);
  memcpy(s->kept_norm, s->norm, (size_t)s->m * sizeof *s->norm);
  s->trying = true;
  rgi_simplex_bounds(s, column, lo, hi);
  const double least = rgi_simplex_solve(s, pivots, most);
  s->trying = false;
  rgi_simplex_bounds(s, column, lo_before, hi_before);
  if (s->stale) return least;
  for (int i = 0; i < s->m; i++) line_of(s, s->basic[i])->where = -1;
  memcpy(s->basic, s->kept_basic, (size_t)s->m * sizeof *s->basic);
  memcpy(s->norm, s->kept_norm, (size_t)s->m * sizeof *s->norm);
  for (int i = 0; i < s->m; i++) line_of(s, s->basic[i])->where = i;
  rgi_basis_back(s->basis, mark);
  s->work += s->m / 4;
  return least;
}
