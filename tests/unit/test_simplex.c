/* tests/unit/test_simplex.c: linear programs of a few columns that are 0 or 1, against all their
 * choices: bounds and cuts hold for each.
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
