/* recompute/simplex.c: the dual simplex algorithm with bounds on columns, on a dense tableau.

   What is basic is written as a sum of what is not: a row each, of as many numbers as there are
   columns. Programs here have a few hundred of both at a time, since rows.c adds what is violated
   alone, so a pivot is some ten microseconds and a program needs a few hundred. Whatever stands at
   a bound may go to the other one on the way (long steps), so bounds may change without losing what
   was found: every solution goes on from the last. The bound that is given out is computed from the
   rows as they were added and the prices found, so it holds even if the tableau has drifted; where
   both differ it is built anew.
 */
#include "simplex.h"
#include <math.h>
#include <string.h>

enum {
  MOST_PIVOTS = 4,
  SPARE_PIVOTS = 200, /* of a solution: a row, and beside that */
  MOST_DEAD = 64,
  FORGOTTEN = -1,
  LANES = 8,
  MOST_CUTS = 64,
  FEW_TERMS = 16
};
static const double NEAR = 1e-7, TINY = 1e-9, ZERO = 1e-12, DRIFT = 1e-4, TILT = 1e-5;
/* Of cuts: parts of one that are no rounding, numbers that are too large, or so small beside the
 * largest that they are left out; what is spared for sums of doubles; and how deep it has to be. */
static const double LEAST_PART = 0.01, MOST_WEIGHT = 1e4, SMALLEST = 1e-6, SPARE = 1e-7,
                    LEAST_CUT = 1e-3, ALIKE = 0.9, MOST_TERMS = 0.2;

/* A column, or a row: what it is above its right hand side, which is not negative. */
typedef struct variable {
  double lo, hi, cost, least;
  double tilted; /* cost, a little less, so that no two are alike */
  double value;  /* if it is not basic */
  double reduced;
  int where; /* i: the i-th that is basic, ~j: the j-th that is not */
  int idle;
  bool row, dead;
  bool whole; /* a row: in whole numbers of the columns, it is one itself */
} variable;

typedef struct entry {
  int row, column;
  double by;
} entry;

struct rgi_simplex {
  rgi_arena *arena;
  int most_columns, most_rows;
  int m, n, nvariable, nspare;
  variable *of;
  double **at, **room; /* [m] of [n]; rows that are free again */
  int nroom;
  double *value, *norm, *price; /* [m], [m], [n]: the latter is what is added by a unit of each */
  int *basic, *other;           /* variables */
  int *spare;                   /* numbers of dropped rows */
  int *enter;
  double *column;
  double *weight, *of_cut; /* per variable */
  entry *entry;
  int nentry, most_entries, ndead;
  double cost;
  bool drifted;
  int64_t work;
};

rg_status rgi_simplex_open(int columns, int rows, rgi_arena *a, rgi_simplex **out, rg_error *e) {
  rgi_simplex *s = *out = rgi_alloc(a, sizeof *s);
  if (!s) return rgi_nomem(e);
  *s = (rgi_simplex){.arena = a, .most_columns = columns, .most_rows = rows};
  const size_t n = (size_t)columns + 1, m = (size_t)rows + 1;
  s->of = rgi_alloc_n(a, n + m + MOST_DEAD, sizeof *s->of);
  s->at = rgi_alloc_n(a, m, sizeof *s->at);
  s->room = rgi_alloc_n(a, m, sizeof *s->room);
  s->value = rgi_alloc_n(a, m, sizeof *s->value);
  s->norm = rgi_alloc_n(a, m, sizeof *s->norm);
  s->price = rgi_alloc_n(a, n, sizeof *s->price);
  s->basic = rgi_alloc_n(a, m, sizeof *s->basic);
  s->other = rgi_alloc_n(a, n, sizeof *s->other);
  s->spare = rgi_alloc_n(a, m + MOST_DEAD, sizeof *s->spare);
  s->enter = rgi_alloc_n(a, n, sizeof *s->enter);
  s->column = rgi_alloc_n(a, m, sizeof *s->column);
  s->weight = rgi_alloc_n(a, n + m + MOST_DEAD, sizeof *s->weight);
  s->of_cut = rgi_alloc_n(a, n + m + MOST_DEAD, sizeof *s->of_cut);
  if (!s->of || !s->at || !s->room || !s->value || !s->norm || !s->price || !s->basic ||
      !s->other || !s->spare || !s->enter || !s->column || !s->weight || !s->of_cut)
    return rgi_nomem(e);
  return RG_OK;
}

int rgi_simplex_rows(const rgi_simplex *s) {
  return s->m;
}

int64_t rgi_simplex_work(const rgi_simplex *s) {
  return s->work;
}

double rgi_simplex_value(const rgi_simplex *s, int column) {
  const variable *v = &s->of[column];
  return v->where >= 0 ? s->value[v->where] : v->value;
}

double rgi_simplex_reduced(const rgi_simplex *s, int column) {
  return s->of[column].reduced;
}

int rgi_simplex_idle(const rgi_simplex *s, int row) {
  return s->of[row].idle;
}

/* ---- rows and columns ---- */

static bool more_entries(rgi_simplex *s, int n) {
  if (s->nentry + n <= s->most_entries) return true;
  const int most = 2 * (s->nentry + n) + 1024;
  entry *next = rgi_alloc_n(s->arena, (size_t)most, sizeof *next);
  if (!next) return false;
  if (s->nentry) memcpy(next, s->entry, (size_t)s->nentry * sizeof *next);
  s->entry = next;
  s->most_entries = most;
  return true;
}

static void move(rgi_simplex *s, int j, double by) {
  for (int i = 0; i < s->m; i++) s->value[i] += s->at[i][j] * by;
}

/* Stands at the bound that its price says. */
static void stand(rgi_simplex *s, int j) {
  variable *v = &s->of[s->other[j]];
  const double to = s->price[j] >= 0 || isinf(v->hi) ? v->lo : v->hi;
  if (to != v->value) move(s, j, to - v->value);
  v->value = to;
}

int rgi_simplex_column(rgi_simplex *s, double cost, double lo, double hi, const rgi_weight *in,
                       int n) {
  if (s->n == s->most_columns || !more_entries(s, n)) return -1;
  const int v = s->nvariable++, j = s->n++;
  const double tilted = cost * (1 - TILT * ((unsigned)v * 2654435761u >> 16) / (1 << 16));
  s->of[v] =
      (variable){.lo = lo, .hi = hi, .cost = cost, .tilted = tilted, .value = lo, .where = ~j};
  s->other[j] = v;
  s->price[j] = tilted;
  for (int i = 0; i < s->m; i++) s->at[i][j] = 0;
  for (int k = 0; k < n; k++) {
    const int at = s->of[in[k].of].where;
    s->entry[s->nentry++] = (entry){in[k].of, v, in[k].by};
    s->of[in[k].of].whole &= in[k].by == floor(in[k].by);
    if (at >= 0) {
      s->at[at][j] += in[k].by;
      s->value[at] += in[k].by * lo;
      continue;
    }
    s->price[j] -= in[k].by * s->price[~at];
    for (int i = 0; i < s->m; i++) {
      const double by = in[k].by * s->at[i][~at];
      s->at[i][j] -= by;
      s->value[i] -= by * lo;
    }
  }
  stand(s, j);
  return v;
}

/* x += f row, both zero from n to a multiple of LANES; the sum of squares then. */
static double add(double *x, const double *row, double f, int n) {
  double sum[LANES] = {0}, all = 0;
  for (int j = 0; j < n; j += LANES)
    for (int l = 0; l < LANES; l++) {
      const double next = x[j + l] + f * row[j + l];
      x[j + l] = next;
      sum[l] += next * next;
    }
  for (int l = 0; l < LANES; l++) all += sum[l];
  return all;
}

static double *new_row(rgi_simplex *s) {
  if (s->nroom) return s->room[--s->nroom];
  return rgi_alloc_n(s->arena, (size_t)s->most_columns + LANES, sizeof(double));
}

static void fill_row(rgi_simplex *s, double *row, double *value, int column, double by) {
  const int at = s->of[column].where;
  *value += by * rgi_simplex_value(s, column);
  if (at < 0) {
    row[~at] += by;
    return;
  }
  for (int j = 0; j < s->n; j++) row[j] += by * s->at[at][j];
}

int rgi_simplex_row(rgi_simplex *s, const rgi_weight *of, int n, double least) {
  if (s->m == s->most_rows || !more_entries(s, n)) return -1;
  double *row = new_row(s), value = -least;
  if (!row) return -1;
  const int v = s->nspare ? s->spare[--s->nspare] : s->nvariable++, i = s->m;
  bool whole = least == floor(least);
  memset(row, 0, ((size_t)s->most_columns + LANES) * sizeof *row);
  for (int k = 0; k < n; k++) {
    fill_row(s, row, &value, of[k].of, of[k].by);
    whole &= of[k].by == floor(of[k].by);
    s->entry[s->nentry++] = (entry){v, of[k].of, of[k].by};
  }
  s->of[v] = (variable){.hi = INFINITY, .least = least, .where = i, .row = true, .whole = whole};
  s->at[i] = row;
  s->value[i] = value;
  s->norm[i] = 1 + add(row, row, 0, s->n);
  s->basic[i] = v;
  s->m++;
  s->work += (int64_t)n * s->n / 8;
  return v;
}

void rgi_simplex_bounds(rgi_simplex *s, int column, double lo, double hi) {
  variable *v = &s->of[column];
  if (v->lo == lo && v->hi == hi) return;
  v->lo = lo;
  v->hi = hi;
  if (v->where < 0) stand(s, ~v->where);
}

/* The entries of dropped rows, whose numbers are free again after that. */
static void forget(rgi_simplex *s) {
  int n = 0;
  for (int k = 0; k < s->nentry; k++)
    if (!s->of[s->entry[k].row].dead) s->entry[n++] = s->entry[k];
  s->nentry = n;
  for (int v = 0; v < s->nvariable; v++)
    if (s->of[v].dead && s->of[v].where != FORGOTTEN) {
      s->of[v].where = FORGOTTEN;
      s->spare[s->nspare++] = v;
    }
  s->ndead = 0;
}

void rgi_simplex_drop(rgi_simplex *s, int row) {
  const int i = s->of[row].where, last = s->m - 1;
  if (i < 0) return;
  s->room[s->nroom++] = s->at[i];
  s->at[i] = s->at[last];
  s->value[i] = s->value[last];
  s->norm[i] = s->norm[last];
  s->basic[i] = s->basic[last];
  s->of[s->basic[i]].where = i;
  s->m--;
  s->of[row].dead = true;
  s->of[row].where = s->of[row].idle = 0;
  if (++s->ndead == MOST_DEAD) forget(s);
}

/* Nothing but rows is basic again. */
static void build_anew(rgi_simplex *s) {
  int m = 0, n = 0;
  for (int v = 0; v < s->nvariable; v++) {
    variable *x = &s->of[v];
    if (x->dead) continue;
    if (x->row) {
      s->basic[m] = v;
      s->value[m] = -x->least;
      s->norm[m] = 1;
      memset(s->at[m], 0, (size_t)s->n * sizeof(double));
      x->where = m++;
    } else {
      s->other[n] = v;
      s->price[n] = x->tilted;
      x->value = x->tilted >= 0 ? x->lo : x->hi;
      x->where = ~n++;
    }
  }
  for (int k = 0; k < s->nentry; k++) {
    const entry *x = &s->entry[k];
    if (s->of[x->row].dead) continue;
    const int i = s->of[x->row].where, j = ~s->of[x->column].where;
    s->at[i][j] += x->by;
    s->norm[i] += x->by * x->by;
    s->value[i] += x->by * s->of[x->column].value;
  }
  s->drifted = false;
  s->work += (int64_t)s->m * s->n / 8;
}

/* ---- pivots ---- */

/* How far the i-th that is basic is out of its bounds: < 0 below. */
static double outside(const rgi_simplex *s, int i) {
  const variable *v = &s->of[s->basic[i]];
  if (s->value[i] < v->lo - NEAR) return s->value[i] - v->lo;
  return s->value[i] > v->hi + NEAR ? s->value[i] - v->hi : 0;
}

/* The farthest out, as seen from where everything stands; -1: none is. */
static int leaves(const rgi_simplex *s) {
  int best = -1;
  double most = 0;
  for (int i = 0; i < s->m; i++) {
    const double out = outside(s, i), far = out * out / s->norm[i];
    if (far > most) most = far, best = i;
  }
  return best;
}

/* Which may move so that the i-th comes in, where `out` says how far it is out. */
static int may_enter(rgi_simplex *s, int i, double out) {
  const double *row = s->at[i];
  int n = 0;
  for (int j = 0; j < s->n; j++) {
    const variable *v = &s->of[s->other[j]];
    const double by = out < 0 ? row[j] : -row[j];
    if (fabs(by) <= TINY || v->lo == v->hi) continue;
    if (v->value == v->lo ? by > 0 : by < 0) s->enter[n++] = j;
  }
  return n;
}

/* The one to enter for the i-th; those that come before go to their other bounds and end in
 * s->enter[*passed …]. -1: none, the rows contradict each other. */
static int enters(rgi_simplex *s, int i, double out, int n, int *passed) {
  const double *row = s->at[i];
  double left = fabs(out);
  *passed = n;
  while (n > 0) {
    int best = -1;
    double least = INFINITY;
    for (int k = 0; k < n; k++) {
      const double by = fabs(row[s->enter[k]]), ratio = fabs(s->price[s->enter[k]]) / by;
      if (ratio < least - ZERO || (ratio <= least + ZERO && by > fabs(row[s->enter[best]])))
        least = fmin(least, ratio), best = k;
    }
    const int j = s->enter[best];
    const variable *v = &s->of[s->other[j]];
    left -= fabs(row[j]) * (v->hi - v->lo);
    if (left <= NEAR) return j;
    s->enter[best] = s->enter[--n];
    s->enter[n] = j;
    *passed = n;
  }
  return -1;
}

static void pivot(rgi_simplex *s, int i, int q, double to) {
  double *row = s->at[i];
  const double by = 1 / row[q], step = (to - s->value[i]) * by, price = s->price[q] * by;
  const int out = s->basic[i], in = s->other[q];
  for (int k = 0; k < s->m; k++) s->value[k] += s->at[k][q] * step;
  s->cost += s->price[q] * step;
  for (int j = 0; j < s->n; j++) s->price[j] -= price * row[j];
  s->price[q] = price;
  for (int j = 0; j < s->n; j++) row[j] *= -by;
  row[q] = by;
  for (int k = 0; k < s->m; k++) {
    double *x = s->at[k];
    const double f = x[q];
    if (k == i || fabs(f) <= ZERO) {
      if (k != i) x[q] = 0;
      continue;
    }
    x[q] = 0;
    s->norm[k] = 1 + add(x, row, f, s->n);
    s->work += s->n / 16;
  }
  s->norm[i] = 1 + add(row, row, 0, s->n);
  s->value[i] = s->of[in].value + step;
  s->basic[i] = in;
  s->of[in].where = i;
  s->other[q] = out;
  s->of[out].where = ~q;
  s->of[out].value = to;
  s->work += (s->m + 4 * s->n) / 10 + 1;
}

/* What is at a bound with a price that wants it at the other one, by rounding. */
static void right_prices(rgi_simplex *s) {
  for (int j = 0; j < s->n; j++) {
    const variable *v = &s->of[s->other[j]];
    if (v->lo == v->hi) continue;
    if (v->value == v->lo ? s->price[j] < 0 : s->price[j] > 0) s->price[j] = 0;
  }
}

/* ---- the whole ---- */

/* By the i-th row, which nothing can bring in: prices that go up along it without end, so far that
 * they come to `most`. */
static void go_up(rgi_simplex *s, int i, double out, int n, double most) {
  double gain = fabs(out);
  for (int k = 0; k < n; k++) {
    const variable *v = &s->of[s->other[s->enter[k]]];
    gain -= fabs(s->at[i][s->enter[k]]) * (v->hi - v->lo);
  }
  if (gain < NEAR) return;
  const double step = (1.001 * (most - s->cost) + 1e-3) / gain, price = out < 0 ? step : -step;
  for (int j = 0; j < s->n; j++) {
    variable *v = &s->of[s->other[j]];
    if (v->row) v->reduced -= price * s->at[i][j];
  }
  if (s->of[s->basic[i]].row) s->of[s->basic[i]].reduced = price;
}

/* The prices of rows, as they are. */
static void take_prices(rgi_simplex *s) {
  for (int i = 0; i < s->m; i++) s->of[s->basic[i]].reduced = 0;
  for (int j = 0; j < s->n; j++) s->of[s->other[j]].reduced = s->price[j];
}

static void run(rgi_simplex *s, int pivots, double most) {
  s->cost = 0;
  for (int v = 0; v < s->nvariable; v++)
    if (!s->of[v].row) s->cost += s->of[v].tilted * rgi_simplex_value(s, v);
  for (int left = pivots; left > 0 && s->cost < most; left--) {
    const int i = leaves(s);
    if (i < 0) break;
    const double out = outside(s, i);
    const variable *v = &s->of[s->basic[i]];
    const double to = out < 0 ? v->lo : v->hi;
    int n = may_enter(s, i, out), passed;
    const int q = enters(s, i, out, n, &passed);
    s->work += (s->m + 2 * s->n + n) / 8;
    if (q < 0) {
      take_prices(s);
      go_up(s, i, out, n, most);
      return;
    }
    for (int k = passed; k < n; k++) {
      const int j = s->enter[k];
      variable *x = &s->of[s->other[j]];
      const double next = x->value == x->lo ? x->hi : x->lo;
      move(s, j, next - x->value);
      s->cost += s->price[j] * (next - x->value);
      x->value = next;
    }
    pivot(s, i, q, to);
    right_prices(s);
  }
  take_prices(s);
}

/* The Lagrangian at the prices of rows, as they were added. */
static double lagrangian(rgi_simplex *s) {
  double total = 0;
  for (int v = 0; v < s->nvariable; v++) {
    variable *x = &s->of[v];
    if (x->row && !x->dead) {
      x->reduced = fmax(x->reduced, 0);
      total += x->least * x->reduced;
    } else {
      x->reduced = x->row ? 0 : x->cost;
    }
  }
  for (int k = 0; k < s->nentry; k++)
    s->of[s->entry[k].column].reduced -= s->entry[k].by * s->of[s->entry[k].row].reduced;
  for (int v = 0; v < s->nvariable; v++) {
    const variable *x = &s->of[v];
    if (!x->row) total += x->reduced * (x->reduced > 0 ? x->lo : x->hi);
  }
  s->work += (s->nentry + s->nvariable) / 4;
  return total;
}

double rgi_simplex_solve(rgi_simplex *s, int pivots, double most) {
  if (s->drifted) build_anew(s);
  run(s, pivots ? pivots : MOST_PIVOTS * s->m + SPARE_PIVOTS, most + TILT * fabs(most));
  const double least = lagrangian(s);
  s->drifted = fabs(s->cost - least) > DRIFT * (1 + fabs(least));
  for (int v = 0; v < s->nvariable && !pivots; v++) {
    variable *x = &s->of[v];
    if (x->row && !x->dead)
      x->idle = x->where >= 0 && (s->value[x->where] > NEAR) ? x->idle + 1 : 0;
  }
  return least;
}

/* ---- cuts ---- */

/* The least that a whole number of a unit of `by` adds, where all together miss a whole number by
 * `part`. */
static double cut_by(double by, double part) {
  const double f = by - floor(by);
  return f <= part ? f : part * (1 - f) / (1 - part);
}

/* Gomory's mixed cut of what the i-th that is basic is made of, as of_cut[columns] and its right
 * hand side. The rows it comes from are added up anew as they were added, by the tableau's weights,
 * whatever those are: so it holds, but for what sums of doubles are off by, for every choice in
 * whole numbers from 0 to 1. NAN: there is none. */
static double make_cut(rgi_simplex *s, int i) {
  double sum = 0, least, most = 0;
  memset(s->weight, 0, (size_t)s->nvariable * sizeof *s->weight);
  memset(s->of_cut, 0, (size_t)s->nvariable * sizeof *s->of_cut);
  s->work += s->nentry / 2 + s->nvariable / 2;
  for (int j = 0; j < s->n; j++) {
    const double w = s->at[i][j];
    if (!s->of[s->other[j]].row || fabs(w) < TINY) continue;
    s->weight[s->other[j]] = w;
    sum += w * s->of[s->other[j]].least;
    most = fmax(most, fabs(w));
  }
  for (int k = 0; k < s->nentry; k++)
    s->of_cut[s->entry[k].column] += s->entry[k].by * s->weight[s->entry[k].row];
  for (int v = 0; v < s->nvariable; v++) {
    const variable *x = &s->of[v];
    most = fmax(most, fabs(s->of_cut[v]));
    if (!x->row && x->where < 0 && x->value > 0.5) sum -= s->of_cut[v];
  }
  const double part = least = sum - floor(sum);
  if (part < LEAST_PART || part > 1 - LEAST_PART || most > MOST_WEIGHT) return NAN;
  for (int v = 0; v < s->nvariable; v++) {
    const variable *x = &s->of[v];
    const double by = s->weight[v];
    if (x->row && by != 0) {
      s->weight[v] = x->whole ? cut_by(-by, part) : by < 0 ? -by : by * part / (1 - part);
      least += s->weight[v] * x->least;
    } else if (!x->row && s->of_cut[v] != 0) {
      const bool high = x->where < 0 && x->value > 0.5;
      const double g = cut_by(high ? -s->of_cut[v] : s->of_cut[v], part);
      s->of_cut[v] = high ? -g : g;
      if (high) least -= g;
    }
  }
  for (int k = 0; k < s->nentry; k++)
    s->of_cut[s->entry[k].column] += s->entry[k].by * s->weight[s->entry[k].row];
  return least;
}

/* The cut in handy numbers, without its smallest, and a little less than it is; returns how far
 * what the program has found is outside it, 0: not at all. */
static double finish_cut(rgi_simplex *s, rgi_weight *of, int *n, double *least) {
  double most = 0, square = 0, out;
  for (int v = 0; v < s->nvariable; v++) most = fmax(most, fabs(s->of_cut[v]));
  *n = 0;
  if (!(most > 0 && most < MOST_WEIGHT)) return 0;
  *least = *least / most - SPARE;
  out = *least;
  for (int v = 0; v < s->nvariable; v++) {
    const double by = s->of_cut[v] / most;
    if (by == 0) continue;
    if (fabs(by) < SMALLEST) {
      *least -= fmax(by, 0);
      continue;
    }
    of[(*n)++] = (rgi_weight){v, by};
    square += by * by;
    out -= by * rgi_simplex_value(s, v);
  }
  return square > 0 ? out / sqrt(square) : 0;
}

/* Does one of these rows, the last that were added, go nearly the same way? */
static bool much_alike(rgi_simplex *s, const rgi_weight *term, int n, const int *row, int nrow) {
  double *x = s->of_cut, own = 0;
  memset(x, 0, (size_t)s->nvariable * sizeof *x);
  for (int i = 0; i < n; i++) x[term[i].of] = term[i].by, own += term[i].by * term[i].by;
  int k = s->nentry;
  for (int r = nrow - 1; r >= 0; r--) {
    double both = 0, square = 0;
    for (; k > 0 && s->entry[k - 1].row == row[r]; k--) {
      const double by = s->entry[k - 1].by;
      both += by * x[s->entry[k - 1].column];
      square += by * by;
    }
    if (both > ALIKE * sqrt(own * square)) return true;
  }
  return false;
}

int rgi_simplex_cuts(rgi_simplex *s, int most, rgi_weight *term, int *row) {
  int best[MOST_CUTS], n = 0, count, added = 0;
  double by[MOST_CUTS], least;
  for (int i = 0; i < s->m; i++) {
    const double x = s->value[i];
    if (s->of[s->basic[i]].row || x < LEAST_PART || x > 1 - LEAST_PART) continue;
    if (isnan(least = make_cut(s, i))) continue;
    const double out = finish_cut(s, term, &count, &least);
    if (out < LEAST_CUT || count > fmax(FEW_TERMS, MOST_TERMS * s->n)) continue;
    int k = n < MOST_CUTS ? n++ : MOST_CUTS;
    for (; k > 0 && by[k - 1] < out; k--)
      if (k < MOST_CUTS) best[k] = best[k - 1], by[k] = by[k - 1];
    if (k < MOST_CUTS) best[k] = i, by[k] = out;
  }
  for (int k = 0; k < n && added < most; k++) {
    least = make_cut(s, best[k]);
    finish_cut(s, term, &count, &least);
    if (much_alike(s, term, count, row, added)) continue;
    const int v = rgi_simplex_row(s, term, count, least);
    if (v < 0) break;
    row[added++] = v;
  }
  return added;
}
