/* tests/unit/test_simplex.c: linear programs of a few columns that are 0 or 1, against all their
 * choices: bounds and cuts hold for each. Others against every corner that they have; and larger
 * ones, that change, against what makes a solution the best: it keeps the rows and costs no more
 * than the bound.
 */
#include "recompute/simplex.h"
#include "../harness/random_spec.h"
#include "must.h"
#include <criterion/criterion.h>
#include <math.h>

enum { MOST_COLUMNS = 9, MOST_ROWS = 8, SPARE = 400 };

typedef struct program {
  int n, m;
  double cost[MOST_COLUMNS], by[MOST_ROWS][MOST_COLUMNS], least[MOST_ROWS];
} program;

/* Rows as rows.c has them: bytes that have to go, in thirds, and what follows from what, in whole
 * numbers. */
static program draw_program(uint64_t *state) {
  program p = {.n = 3 + rgi_draw(state, MOST_COLUMNS - 2), .m = 1 + rgi_draw(state, MOST_ROWS)};
  for (int i = 0; i < p.n; i++) p.cost[i] = rgi_draw(state, 4) ? 1 + rgi_draw(state, 100) / 99. : 0;
  for (int r = 0; r < p.m; r++) {
    const bool bytes = r == 0 || rgi_draw(state, 2);
    double sum = 0;
    for (int i = 0; i < p.n; i++) {
      if (rgi_draw(state, 4) == 0) continue;
      p.by[r][i] = bytes ? (rgi_draw(state, 9) - 2) / 3. : rgi_draw(state, 3) - 1;
      sum += p.by[r][i];
    }
    p.least[r] = bytes ? sum / 2 - 1e-9 : -1;
  }
  return p;
}

static bool holds(const program *p, int set) {
  for (int r = 0; r < p->m; r++) {
    double sum = -p->least[r];
    for (int i = 0; i < p->n; i++) sum += set >> i & 1 ? p->by[r][i] : 0;
    if (sum < 0) return false;
  }
  return true;
}

static double costs(const program *p, int set) {
  double sum = 0;
  for (int i = 0; i < p->n; i++) sum += set >> i & 1 ? p->cost[i] : 0;
  return sum;
}

/* Solves and cuts, a few times; then every choice that the rows allow must still be one. Returns
 * how many cuts there were; *raised: they made the bound larger. */
static int check(const program *p, uint64_t *state, bool *raised) {
  rg_context *ctx;
  rgi_simplex *s;
  rgi_weight term[MOST_COLUMNS];
  int column[MOST_COLUMNS], row[SPARE], ncut = 0;
  double best = INFINITY, first = 0, last = 0;
  must(rg_context_create(NULL, &ctx, &err), "context");
  rgi_arena *a = rgi_arena_create(ctx);
  must(rgi_simplex_open(p->n, SPARE, a, &s, &err), "simplex");
  for (int i = 0; i < p->n; i++) column[i] = rgi_simplex_column(s, p->cost[i], 0, 1, NULL, 0);
  for (int r = 0; r < p->m; r++) {
    int n = 0;
    for (int i = 0; i < p->n; i++)
      if (p->by[r][i] != 0) term[n++] = (rgi_weight){column[i], p->by[r][i]};
    rgi_simplex_row(s, term, n, p->least[r]);
  }
  for (int set = 0; set < 1 << p->n; set++)
    if (holds(p, set)) best = fmin(best, costs(p, set));
  for (int round = 0; round < 6; round++) {
    last = rgi_simplex_solve(s, 0, 1000);
    if (round == 0) first = last;
    cr_assert_leq(last, best + 1e-6, "%d cuts: %.9g is said to be the least, %.9g is", ncut, last,
                  best);
    if (last >= 1000) break;
    if (rgi_draw(state, 3) == 0) { /* cuts of what is decided in part hold everywhere, too */
      const int i = rgi_draw(state, p->n), at = rgi_draw(state, 2);
      rgi_simplex_bounds(s, column[i], at, at);
      rgi_simplex_solve(s, 0, 1000);
      ncut += rgi_simplex_cuts(s, 8, term, row);
      rgi_simplex_bounds(s, column[i], 0, 1);
    } else {
      ncut += rgi_simplex_cuts(s, 8, term, row);
    }
  }
  *raised = last > first + 1e-6;
  for (int set = 0; set < 1 << p->n; set++) {
    if (!holds(p, set)) continue;
    for (int i = 0; i < p->n; i++) rgi_simplex_bounds(s, column[i], set >> i & 1, set >> i & 1);
    const double now = rgi_simplex_solve(s, 0, 1000);
    cr_assert_leq(now, costs(p, set) + 1e-6, "choice %x is cut off by one of %d cuts", set, ncut);
  }
  rgi_arena_destroy(a);
  rg_context_destroy(ctx);
  return ncut;
}

Test(simplex, cuts) {
  uint64_t state = 11;
  int ncut = 0, nraised = 0;
  for (int k = 0; k < 3000; k++) {
    const program p = draw_program(&state);
    bool raised;
    ncut += check(&p, &state, &raised);
    nraised += raised;
  }
  cr_assert_geq(ncut, 1000, "only %d cuts", ncut); /* else nothing was tested */
  cr_assert_geq(nraised, 300, "only %d bounds went up", nraised);
}

/* ---- against every corner ---- */

enum { CORNERS = 4, CORNER_ROWS = 5 };
static const double BOX = 1000, TOP = 1e6;

typedef struct corners {
  int n, m;
  double cost[CORNERS], lo[CORNERS], hi[CORNERS], by[CORNER_ROWS][CORNERS], least[CORNER_ROWS];
} corners;

/* Small whole numbers: many corners are one, some programs have none, some no end. */
static corners draw_corners(uint64_t *state) {
  corners p = {.n = 1 + rgi_draw(state, CORNERS), .m = rgi_draw(state, CORNER_ROWS + 1)};
  for (int i = 0; i < p.n; i++) {
    p.cost[i] = rgi_draw(state, 9) - 3;
    p.lo[i] = rgi_draw(state, 6) ? rgi_draw(state, 4) - 2 : -INFINITY;
    p.hi[i] = rgi_draw(state, 6) ? fmax(p.lo[i], -3) + rgi_draw(state, 5) : INFINITY;
  }
  for (int r = 0; r < p.m; r++) {
    for (int i = 0; i < p.n; i++) p.by[r][i] = rgi_draw(state, 3) ? rgi_draw(state, 7) - 3 : 0;
    p.least[r] = rgi_draw(state, 9) - 5;
  }
  return p;
}

/* The plane k: rows, then lower and upper bounds; none farther than the box. */
static double plane(const corners *p, int k, double *by) {
  memset(by, 0, CORNERS * sizeof *by);
  if (k < p->m) {
    memcpy(by, p->by[k], CORNERS * sizeof *by);
    return p->least[k];
  }
  k -= p->m;
  by[k / 2] = k % 2 ? -1 : 1;
  return k % 2 ? -fmin(p->hi[k / 2], BOX) : fmax(p->lo[k / 2], -BOX);
}

/* Where n planes meet; false: nowhere, or not in one point. */
static bool meet(const corners *p, const int *of, double *x) {
  double at[CORNERS][CORNERS + 1];
  for (int i = 0; i < p->n; i++) {
    double by[CORNERS];
    at[i][p->n] = plane(p, of[i], by);
    memcpy(at[i], by, (size_t)p->n * sizeof *by);
  }
  for (int c = 0; c < p->n; c++) {
    int best = c;
    for (int i = c; i < p->n; i++)
      if (fabs(at[i][c]) > fabs(at[best][c])) best = i;
    if (fabs(at[best][c]) < 1e-9) return false;
    for (int k = 0; k <= p->n; k++) {
      const double x0 = at[c][k];
      at[c][k] = at[best][k];
      at[best][k] = x0;
    }
    for (int i = 0; i < p->n; i++) {
      const double f = at[i][c] / at[c][c];
      for (int k = 0; k <= p->n && i != c; k++) at[i][k] -= f * at[c][k];
    }
  }
  for (int i = 0; i < p->n; i++) x[i] = at[i][p->n] / at[i][i];
  return true;
}

/* The least cost of all corners within the box; INFINITY: there is none. */
static double least_corner(const corners *p) {
  const int all = p->m + 2 * p->n;
  double best = INFINITY;
  for (int set = 0; set < 1 << all; set++) {
    if (__builtin_popcount((unsigned)set) != p->n) continue;
    int of[CORNERS], n = 0;
    double x[CORNERS] = {0}, cost = 0;
    for (int k = 0; k < all; k++)
      if (set >> k & 1) of[n++] = k;
    if (!meet(p, of, x)) continue;
    bool in = true;
    for (int k = 0; k < all && in; k++) {
      double by[CORNERS], sum = -plane(p, k, by);
      for (int i = 0; i < p->n; i++) sum += by[i] * x[i];
      in = sum > -1e-7;
    }
    for (int i = 0; i < p->n; i++) cost += p->cost[i] * x[i];
    if (in) best = fmin(best, cost);
  }
  return best;
}

static rgi_simplex *make(const corners *p, rgi_arena *a, int *column) {
  rgi_simplex *s;
  rgi_weight term[CORNERS];
  must(rgi_simplex_open(p->n, CORNER_ROWS, a, &s, &err), "simplex");
  for (int i = 0; i < p->n; i++)
    column[i] = rgi_simplex_column(s, p->cost[i], p->lo[i], p->hi[i], NULL, 0);
  for (int r = 0; r < p->m; r++) {
    for (int i = 0; i < p->n; i++) term[i] = (rgi_weight){column[i], p->by[r][i]};
    cr_assert_eq(rgi_simplex_row(s, term, p->n, p->least[r]), r);
  }
  return s;
}

/* What the bound has to be, by all corners; how far a box reaches says whether there is an end. */
static double expected(const corners *p) {
  corners wider = *p;
  const double best = least_corner(p);
  if (isinf(best)) return TOP;
  for (int i = 0; i < p->n; i++) { /* half the box */
    if (isinf(p->lo[i])) wider.lo[i] = -BOX / 2;
    if (isinf(p->hi[i])) wider.hi[i] = BOX / 2;
  }
  return least_corner(&wider) > best + 1 ? -INFINITY : best;
}

static bool has_ends(const corners *p) {
  bool all = true;
  for (int i = 0; i < p->n; i++) all &= !isinf(p->lo[i]) && !isinf(p->hi[i]);
  return all;
}

/* Of programs with no end on some side nothing may be said where no corner is left. */
static void expect(const corners *p, double now, const char *when, int k) {
  const double want = expected(p);
  if (want == TOP)
    cr_assert(now >= TOP || (isinf(now) && !has_ends(p)), "%d %s: %.9g, but nothing keeps the rows",
              k, when, now);
  else if (isinf(want))
    cr_assert_lt(now, -1e9, "%d %s: %.9g, but there is no end", k, when, now);
  else
    cr_assert(fabs(now - want) < 1e-3, "%d %s: %.9g instead of %.9g", k, when, now, want);
}

Test(simplex, corners) {
  uint64_t state = 5;
  int none = 0, endless = 0;
  rg_context *ctx;
  must(rg_context_create(NULL, &ctx, &err), "context");
  for (int k = 0; k < 4000; k++) {
    corners p = draw_corners(&state);
    int column[CORNERS];
    rgi_arena *a = rgi_arena_create(ctx);
    rgi_simplex *s = make(&p, a, column);
    const double first = expected(&p);
    none += first == TOP && has_ends(&p);
    endless += first < -BOX * CORNERS * 10;
    expect(&p, rgi_simplex_solve(s, 0, TOP), "at first", k);
    /* a trial is what it is with those bounds, and leaves what there was */
    corners other = p;
    const int i = rgi_draw(&state, p.n);
    other.lo[i] = other.hi[i] = rgi_draw(&state, 5) - 2;
    expect(&other, rgi_simplex_try(s, column[i], other.lo[i], other.hi[i], 100, TOP), "tried", k);
    expect(&p, rgi_simplex_solve(s, 0, TOP), "again", k);
    /* other bounds, and a row less where one is to spare */
    for (int r = p.m - 1; r >= 0; r--)
      if (rgi_simplex_idle(s, r) > 0 && r == p.m - 1) {
        rgi_simplex_drop(s, r);
        other.m = --p.m;
      }
    rgi_simplex_bounds(s, column[i], other.lo[i], other.hi[i]);
    expect(&other, rgi_simplex_solve(s, 0, TOP), "changed", k);
    rgi_arena_destroy(a);
  }
  rg_context_destroy(ctx);
  cr_assert(none > 200 && endless > 100, "%d have no corner, %d no end", none, endless);
}

/* ---- large and changing ---- */

enum { WIDE = 120, LONG = 160 };

typedef struct wide {
  rgi_simplex *s;
  int n;
  double cost[WIDE], lo[WIDE], hi[WIDE];
  rgi_weight at[LONG][8];
  int length[LONG], number[LONG], m; /* number: of the simplex; -1: dropped */
  double least[LONG];
} wide;

static void add_row(wide *w, uint64_t *state) {
  double sum = 0;
  const int r = w->m++, n = w->length[r] = 1 + rgi_draw(state, 8);
  for (int i = 0; i < n; i++) {
    w->at[r][i] = (rgi_weight){rgi_draw(state, w->n), (rgi_draw(state, 7) - 2) / 3.};
    sum += fmax(w->at[r][i].by, 0);
  }
  w->least[r] = sum * rgi_draw(state, 100) / 400;
  w->number[r] = rgi_simplex_row(w->s, w->at[r], n, w->least[r]);
  cr_assert_geq(w->number[r], 0, "no room for row %d", r);
}

/* Nothing costs less than the bound: so if this solution costs no more, and is one, it is the
 * best. */
static bool check_best(const wide *w, double bound, int round) {
  double cost = 0;
  if (bound >= TOP) return false;
  for (int i = 0; i < w->n; i++) {
    const double x = rgi_simplex_value(w->s, i);
    cost += w->cost[i] * x;
    cr_assert(x > w->lo[i] - 1e-5 && x < w->hi[i] + 1e-5, "%d: column %d is %.9g", round, i, x);
  }
  for (int r = 0; r < w->m; r++) {
    double sum = 0;
    if (w->number[r] < 0) continue;
    for (int k = 0; k < w->length[r]; k++)
      sum += w->at[r][k].by * rgi_simplex_value(w->s, w->at[r][k].of);
    cr_assert_geq(sum, w->least[r] - 1e-5, "%d: row %d is %.9g of %.9g", round, r, sum,
                  w->least[r]);
  }
  cr_assert(fabs(cost - bound) < 1e-3 * (1 + fabs(cost)),
            "%d: the bound is %.9g, but %.9g is found", round, bound, cost);
  return true;
}

Test(simplex, changes) {
  uint64_t state = 3;
  int solved = 0, none = 0, dropped = 0;
  rg_context *ctx;
  must(rg_context_create(NULL, &ctx, &err), "context");
  for (int k = 0; k < 60; k++) {
    rgi_arena *a = rgi_arena_create(ctx);
    wide w = {.n = 20 + rgi_draw(&state, WIDE - 20)};
    must(rgi_simplex_open(w.n, LONG, a, &w.s, &err), "simplex");
    for (int i = 0; i < w.n; i++) {
      w.cost[i] = rgi_draw(&state, 3) ? 1 + rgi_draw(&state, 50) / 10. : 0;
      w.hi[i] = 1;
      rgi_simplex_column(w.s, w.cost[i], 0, 1, NULL, 0);
    }
    for (int round = 0; round < 25; round++) {
      for (int r = rgi_draw(&state, 8); r > 0 && w.m < LONG; r--) add_row(&w, &state);
      const double bound = rgi_simplex_solve(w.s, 0, TOP);
      if (check_best(&w, bound, round)) {
        const int i = rgi_draw(&state, w.n);
        solved++;
        rgi_simplex_try(w.s, i, 1, 1, 3, TOP);
        const double again = rgi_simplex_solve(w.s, 0, TOP);
        cr_assert(fabs(again - bound) < 1e-3 * (1 + bound), "%.9g after a trial, before %.9g",
                  again, bound);
        check_best(&w, again, round);
      } else {
        none++;
      }
      for (int r = 0; r < w.m; r++)
        if (w.number[r] >= 0 && rgi_simplex_idle(w.s, w.number[r]) > 2) {
          rgi_simplex_drop(w.s, w.number[r]);
          w.number[r] = -1;
          dropped++;
        }
      const int i = rgi_draw(&state, w.n);
      w.lo[i] = rgi_draw(&state, 4) == 0;
      w.hi[i] = w.lo[i] > 0 || rgi_draw(&state, 3);
      rgi_simplex_bounds(w.s, i, w.lo[i], w.hi[i]);
    }
    rgi_arena_destroy(a);
  }
  rg_context_destroy(ctx);
  cr_assert(solved > 300 && none > 20 && dropped > 300, "%d solved, %d not, %d rows dropped",
            solved, none, dropped);
}
