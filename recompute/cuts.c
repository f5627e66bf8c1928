/* recompute/cuts.c: rows that all choices in whole numbers keep, of what a program has found. */
#include "simplex_parts.h"
#include <math.h>
#include <string.h>

enum { MOST_CUTS = 256, FEW_TERMS = 16 };
/* Parts of a cut that are no rounding, numbers that are too large, or so small beside the largest
 * that they are left out; what is spared for sums of doubles; how deep it has to be, how much like
 * another it may be, and how many columns it may have, of all. */
static const double TINY = 1e-9, LEAST_PART = 0.01, MOST_WEIGHT = 1e4, SMALLEST = 1e-6,
                    SPARE = 1e-7, LEAST_CUT = 1e-3, ALIKE = 0.9, MOST_TERMS = 0.5;

/* The least that a whole number of a unit of `by` adds, where all together miss a whole number by
 * `part`. */
static double cut_by(double by, double part) {
  const double f = by - floor(by);
  return f <= part ? f : part * (1 - f) / (1 - part);
}

/* += times each row's weight what it has. */
static void add_rows(rgi_simplex *s) {
  for (int r = 0; r < s->m; r++) {
    const double by = s->weight[r];
    const rgi_vector *of = &s->row[r].of;
    if (by == 0) continue;
    for (int k = 0; k < of->n; k++) s->of_cut[of->at[k].of] += of->at[k].by * by;
    s->work += of->n / 8;
  }
}

/* Gomory's mixed cut of what is basic at i, as of_cut[columns] and its right hand side. The rows it
 * comes from are added up anew as they were added, by the tableau's weights, whatever those are: so
 * it holds, but for what sums of doubles are off by, for every choice in whole numbers from 0 to 1.
 * NAN: there is none. */
static double make_cut(rgi_simplex *s, int i) {
  double sum = 0, least, most = 0;
  memset(s->weight, 0, (size_t)s->m * sizeof *s->weight);
  memset(s->of_cut, 0, (size_t)s->n * sizeof *s->of_cut);
  memset(s->across, 0, (size_t)s->m * sizeof *s->across);
  s->across[i] = 1;
  rgi_basis_price(s->basis, s->across);
  s->work += (s->m + s->n) / 2;
  for (int r = 0; r < s->m; r++) {
    const double w = s->across[r];
    if (s->row[r].where >= 0 || fabs(w) < TINY) continue;
    s->weight[r] = w;
    sum += w * s->row[r].least;
    most = fmax(most, fabs(w));
  }
  add_rows(s);
  for (int v = 0; v < s->n; v++) {
    const rgi_line *x = &s->column[v];
    most = fmax(most, fabs(s->of_cut[v]));
    if (x->where < 0 && rgi_simplex_value(s, v) > 0.5) sum -= s->of_cut[v];
  }
  const double part = least = sum - floor(sum);
  if (part < LEAST_PART || part > 1 - LEAST_PART || most > MOST_WEIGHT) return NAN;
  for (int r = 0; r < s->m; r++) {
    const double by = s->weight[r];
    if (by == 0) continue;
    s->weight[r] = s->row[r].whole ? cut_by(-by, part) : by < 0 ? -by : by * part / (1 - part);
    least += s->weight[r] * s->row[r].least;
  }
  for (int v = 0; v < s->n; v++) {
    const rgi_line *x = &s->column[v];
    if (s->of_cut[v] == 0) continue;
    const bool high = x->where < 0 && rgi_simplex_value(s, v) > 0.5;
    const double g = cut_by(high ? -s->of_cut[v] : s->of_cut[v], part);
    s->of_cut[v] = high ? -g : g;
    if (high) least -= g;
  }
  add_rows(s);
  return least;
}

/* The cut in handy numbers, without its smallest, and a little less than it is; returns how far
 * what the program has found is outside it, 0: not at all. */
static double finish_cut(rgi_simplex *s, rgi_weight *of, int *n, double *least) {
  double most = 0, square = 0, out;
  for (int v = 0; v < s->n; v++) most = fmax(most, fabs(s->of_cut[v]));
  *n = 0;
  if (!(most > 0 && most < MOST_WEIGHT)) return 0;
  *least = *least / most - SPARE;
  out = *least;
  for (int v = 0; v < s->n; v++) {
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
  s->work += s->n / 2;
  return square > 0 ? out / sqrt(square) : 0;
}

/* Does one of these rows go nearly the same way? */
static bool much_alike(rgi_simplex *s, const rgi_weight *term, int n, const int *row, int nrow) {
  double *x = s->of_cut, own = 0;
  bool alike = false;
  memset(x, 0, (size_t)s->n * sizeof *x);
  for (int i = 0; i < n; i++) x[term[i].of] = term[i].by, own += term[i].by * term[i].by;
  for (int k = 0; k < nrow && !alike; k++) {
    const rgi_vector *of = &s->row[row[k]].of;
    double both = 0, square = 0;
    for (int i = 0; i < of->n; i++) {
      both += of->at[i].by * x[of->at[i].of];
      square += of->at[i].by * of->at[i].by;
    }
    s->work += of->n / 8;
    alike = both > ALIKE * sqrt(own * square);
  }
  return alike;
}

int rgi_simplex_cuts(rgi_simplex *s, int most, rgi_weight *term, int *row) {
  int best[MOST_CUTS], n = 0, count, added = 0;
  double by[MOST_CUTS], least;
  for (int i = 0; i < s->m; i++) {
    if (s->basic[i] < 0) continue;
    const double x = s->value[i];
    if (x < LEAST_PART || x > 1 - LEAST_PART || isnan(least = make_cut(s, i))) continue;
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
    const int r = rgi_simplex_row(s, term, count, least);
    if (r < 0) break;
    row[added++] = r;
  }
  return added;
}
