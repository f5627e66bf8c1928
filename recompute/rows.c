/* recompute/rows.c: a bound for choices that are made in part.

   At every row of backward, one node that moves bytes, there are

       saved      what is kept, and what only clones read
       scratch    gradients alive there, and each clone from the row of its first reader, which may
                  be a clone itself, to backward's own last

   and together no more than the budget. With x how far a candidate is computed again, and y how far
   its clone is made up to a row, that is a linear program:

       row        saved and scratch by x and y are at most the budget
       cause      a clone that an earlier one reads is made as early: y of the clone that is read is
                  at least y of its reader plus its own x less 1
       lack       what only clones read is saved as far as any of them is there: at least x of a
                  reader less x of its own

   Of these only what its solutions violate is in the program (simplex.c): a few hundred lines at a
   time of many thousands.
 */
#include "rows.h"
#include <math.h>

/* units; what sums of doubles may be off by, and what is violated */
static const double ROUNDING = 1e-9, LITTLE = 1e-6;
static const double VAIN = 0.015;
enum {
  MOST_MADE = 40000,   /* (clone, row) */
  MOST_UNITS = 64,     /* that a candidate's bytes are counted in */
  MOST_COLUMNS = 2048, /* of the program */
  MOST_LINES = 2048,   /* … and of its rows */
  TRY_PIVOTS = 15,
  ROWS_A_ROUND = 16, /* that are added */
  CUTS_A_ROUND = 16,
  MOST_CUTS = 256,
  IDLE = 16,
  IDLE_CUT = 40
};

struct rgi_row_unit {
  int by;
  int dep, ndep, held, nheld;
  int made, nmade;
  int32_t first; /* row at which backward reads of it, or nt */
};
struct rgi_row_held {
  int32_t last;
  double bytes;
};
struct rgi_row_need {
  int by, reader, nreader, column;
  double bytes;
};
/* A unit's clone is there from row `at`, if that is why it is made first. */
struct rgi_row_made {
  int unit, cause, ncause;
  int32_t at, until; /* until: the next of the same unit */
  int column;        /* of the program; -1: not in it */
  double level;      /* in its last solution, as far as that says */
  int worst;         /* the cause that says so; -1: what is in the program does */
  bool sure, wanted; /* sure: by what is decided */
};
/* The clone is made that early because `by` is. */
struct rgi_row_cause {
  int by, line; /* line: of the program; -1: not in it */
};

/* ---- what the graph is made of ---- */

/* The node that makes the bytes of t by itself, and is computed again if its candidate is; or
 * -1. */
static int32_t maker(const rgi_parts *p, int32_t t) {
  const rgi_graph *g = p->c->m->g;
  if (t < 0 || p->by[t] < 0) return -1;
  const int32_t k = g->tensor[rgi_owner(g, t)].producer;
  if (k < 0 || g->node[k].backward || g->node[k].op->flags & RG_OP_VIEW) return -1;
  return k;
}

static int candidate_at(const rgi_parts *p, int32_t node) {
  const rgi_node *n = &p->c->m->g->node[node];
  if (n->backward || n->op->flags & RG_OP_VIEW || n->kind != RGI_PRIMAL || n->origin < 0) return -1;
  return p->c->m->candidate_of[n->origin];
}

static int unit_of(const int *unit_at, const rgi_parts *p, int32_t t) {
  const int32_t k = maker(p, t);
  return k < 0 ? -1 : unit_at[k];
}

static void find_units(rgi_rows *r, int *unit_at) {
  const rgi_graph *g = r->p->c->m->g;
  int ndep = 0, nheld = 0;
  for (int32_t k = 0; k < g->nnode; k++) {
    const int c = candidate_at(r->p, k);
    unit_at[k] = c < 0 ? -1 : r->nnode;
    if (c < 0) continue;
    rgi_row_unit *u = &r->node[r->nnode++];
    *u = (rgi_row_unit){.by = c, .dep = ndep, .first = r->nt};
    for (int i = 0; i < rgi_nin(&g->node[k]); i++) {
      const int d = unit_of(unit_at, r->p, g->node[k].in[i]);
      if (d >= 0) r->dep[ndep++] = d;
    }
    u->ndep = ndep - u->dep;
  }
  if (r->p->c->of_saved) return;
  for (int32_t k = 0, row = 0; k < g->nnode; k++) {
    if (!rgi_takes_row(g, k)) continue;
    for (int i = 0; i < rgi_nin(&g->node[k]); i++) {
      const int u = unit_of(unit_at, r->p, g->node[k].in[i]);
      if (u >= 0 && row < r->node[u].first) r->node[u].first = row;
    }
    row++;
  }
  for (int u = 0; u < r->nnode; u++) { /* a few values each: it need not be fast */
    r->node[u].held = nheld;
    for (int i = 0; i < r->p->nvalue; i++) {
      const rgi_direct *v = &r->p->value[i];
      if (unit_of(unit_at, r->p, v->tensor) == u)
        r->held[nheld++] = (rgi_row_held){v->last, v->bytes / r->unit};
    }
    r->node[u].nheld = nheld - r->node[u].held;
  }
}

static void find_needs(rgi_rows *r) {
  const rgi_parts *p = r->p;
  for (int i = 0, j; i < p->nneed; i = j) {
    rgi_row_need *x = &r->need[r->nneed++];
    *x = (rgi_row_need){.by = p->need[i].by, .reader = i, .bytes = p->need[i].bytes / r->unit};
    for (j = i; j < p->nneed && p->need[j].tensor == p->need[i].tensor; j++)
      r->reader[j] = p->need[j].reader, r->lacks[j] = -1;
    x->nreader = j - i;
    x->column = -1;
  }
}

/* Rows at which each unit's clone may be made first, as bits: backward's own, and earlier ones of
 * clones that read it. */
static void find_rows(const rgi_rows *r, uint64_t *bits, int words) {
  int64_t count = 0;
  for (int u = r->nnode - 1; u >= 0; u--) {
    const rgi_row_unit *x = &r->node[u];
    uint64_t *own = bits + (size_t)u * words;
    const bool may = r->p->is_free[x->by] || rgi_has(r->p->c->always, x->by);
    for (int32_t t = 0; t < r->nt; t++)
      if (!may || t >= x->first) rgi_drop(own, t);
    if (may && x->first < r->nt) rgi_put(own, x->first);
    int n = 0;
    for (int w = 0; w < words; w++) n += __builtin_popcountll(own[w]);
    if (count + n > MOST_MADE) memset(own, 0, (size_t)words * sizeof *own);
    if (count + n <= MOST_MADE) count += n;
    for (int i = x->dep; i < x->dep + x->ndep; i++)
      for (int w = 0; w < words; w++) bits[(size_t)r->dep[i] * words + w] |= own[w];
  }
}

/* What the clone is made for at the latest by then; -1: it is not made. */
static int made_by(const rgi_rows *r, int u, int32_t t) {
  for (int i = r->node[u].made + r->node[u].nmade - 1; i >= r->node[u].made; i--)
    if (r->made[i].at <= t) return i;
  return -1;
}

/* What each unit's clone is made for, and why that early. */
static rg_status find_made(rgi_rows *r, const uint64_t *bits, int words, rgi_arena *a,
                           rg_error *e) {
  size_t n = 1, causes = 1, reads = 1;
  for (int u = 0; u < r->nnode; u++) reads += (size_t)r->node[u].ndep;
  int *head = rgi_alloc_n(a, (size_t)r->nnode + 1, sizeof *head);
  int *next = rgi_alloc_n(a, reads, sizeof *next), *reader = rgi_alloc_n(a, reads, sizeof *reader);
  if (!head || !next || !reader) return rgi_nomem(e);
  for (int u = 0; u < r->nnode; u++) head[u] = -1;
  int nread = 0;
  for (int u = 0; u < r->nnode; u++)
    for (int i = r->node[u].dep; i < r->node[u].dep + r->node[u].ndep; i++) {
      if (head[r->dep[i]] >= 0 && reader[head[r->dep[i]]] == u) continue;
      reader[nread] = u;
      next[nread] = head[r->dep[i]];
      head[r->dep[i]] = nread++;
    }
  for (int u = 0; u < r->nnode; u++) {
    size_t own = 0, readers = 0;
    for (int w = 0; w < words; w++)
      own += (size_t)__builtin_popcountll(bits[(size_t)u * words + w]);
    for (int k = head[u]; k >= 0; k = next[k]) readers++;
    n += own;
    causes += own * readers;
  }
  r->made = rgi_alloc_n(a, n, sizeof *r->made);
  r->cause = rgi_alloc_n(a, causes, sizeof *r->cause);
  if (!r->made || !r->cause) return rgi_nomem(e);
  for (int u = r->nnode - 1; u >= 0; u--) {
    rgi_row_unit *x = &r->node[u];
    x->made = r->nmade;
    for (int32_t t = 0; t < r->nt; t++) {
      if (!rgi_has(bits + (size_t)u * words, t)) continue;
      rgi_row_made *y = &r->made[r->nmade++];
      *y = (rgi_row_made){.unit = u, .cause = r->ncause, .at = t, .until = r->nt, .column = -1};
      if (x->nmade > 0) y[-1].until = t;
      x->nmade++;
      for (int k = head[u]; k >= 0 && t < x->first; k = next[k]) {
        const int by = made_by(r, reader[k], t);
        if (by >= 0) r->cause[r->ncause++] = (rgi_row_cause){by, -1};
      }
      y->ncause = r->ncause - y->cause;
    }
  }
  return RG_OK;
}

static int64_t common(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

static rg_status open_program(rgi_rows *r, rgi_arena *a, rg_error *e) {
  const rgi_parts *p = r->p;
  int columns = r->n + r->nneed + r->nmade;
  if (columns > MOST_COLUMNS) columns = MOST_COLUMNS > r->n ? MOST_COLUMNS : r->n;
  RGI_TRY(rgi_simplex_open(columns, MOST_LINES, a, &r->program, e));
  r->saved = p->fixed / r->unit;
  for (int i = 0; i < r->n; i++) {
    const bool may = p->is_free[i] || rgi_has(p->c->always, i);
    r->column[i] =
        may ? rgi_simplex_column(r->program, p->c->m->ms[i] / r->unit_ms, 0, 1, NULL, 0) : -1;
    if (may) r->saved += p->bytes[i] / r->unit;
  }
  for (int i = 0; i < r->nmade; i++) {
    const rgi_row_unit *u = &r->node[r->made[i].unit];
    if (r->made[i].at == u->first) r->made[i].column = r->column[u->by];
  }
  for (int32_t t = 0; t < r->nt; t++) r->full[t] = -1;
  return RG_OK;
}

/* Bytes by which what a choice takes goes up or down, so that rows are in whole numbers; or, if
 * that is too little to count in, the most that a candidate has. */
static double find_unit(const rgi_parts *p, bool *whole) {
  double most = 1;
  int64_t all = 0;
  for (int i = 0; i < p->c->m->ncandidate; i++)
    most = fmax(most, p->bytes[i]), all = common(all, (int64_t)p->bytes[i]);
  for (int i = 0; i < p->nvalue; i++) all = common(all, (int64_t)p->value[i].bytes);
  for (int i = 0; i < p->nneed; i++) all = common(all, (int64_t)p->need[i].bytes);
  *whole = all > 0 && most <= MOST_UNITS * (double)all;
  return *whole ? (double)all : most;
}

rg_status rgi_rows_open(const rgi_parts *p, rgi_arena *a, rgi_rows **out, rg_error *e) {
  const rgi_graph *g = p->c->m->g;
  rgi_rows *r = *out = rgi_alloc(a, sizeof *r);
  if (!r) return rgi_nomem(e);
  *r = (rgi_rows){.p = p, .n = p->c->m->ncandidate, .nt = p->c->of_saved ? 1 : p->nt, .unit = 1};
  const size_t n = (size_t)r->n + 1, nt = (size_t)r->nt + 2, nn = (size_t)g->nnode + 1;
  size_t edges = 1;
  for (int32_t k = 0; k < g->nnode; k++) edges += (size_t)rgi_nin(&g->node[k]);
  r->unit = find_unit(p, &r->whole);
  for (int i = 0; i < r->n; i++) {
    r->unit_ms = fmax(r->unit_ms, p->c->m->ms[i]);
  }
  if (!(r->unit_ms > 0)) r->unit_ms = 1;
  int *unit_at = rgi_alloc_n(a, nn, sizeof *unit_at);
  r->node = rgi_alloc_n(a, nn, sizeof *r->node);
  r->dep = rgi_alloc_n(a, edges, sizeof *r->dep);
  r->held = rgi_alloc_n(a, (size_t)p->nvalue + 1, sizeof *r->held);
  r->need = rgi_alloc_n(a, (size_t)p->nneed + 1, sizeof *r->need);
  r->reader = rgi_alloc_n(a, (size_t)p->nneed + 1, sizeof *r->reader);
  r->lacks = rgi_alloc_n(a, (size_t)p->nneed + 1, sizeof *r->lacks);
  r->value = rgi_alloc_n(a, n, sizeof *r->value);
  r->cost = rgi_alloc_n(a, n, sizeof *r->cost);
  r->column = rgi_alloc_n(a, n, sizeof *r->column);
  r->full = rgi_alloc_n(a, nt, sizeof *r->full);
  r->over = rgi_alloc_n(a, nt, sizeof *r->over);
  if (!unit_at || !r->node || !r->dep || !r->held || !r->need || !r->reader || !r->lacks ||
      !r->value || !r->cost || !r->column || !r->full || !r->over)
    return rgi_nomem(e);
  find_units(r, unit_at);
  find_needs(r);
  const int words = rgi_words(r->nt);
  uint64_t *bits = rgi_alloc_n(a, (size_t)words * ((size_t)r->nnode + 1), sizeof *bits);
  if (!bits) return rgi_nomem(e);
  find_rows(r, bits, words);
  RGI_TRY(find_made(r, bits, words, a, e));
  r->term =
      rgi_alloc_n(a, n + (size_t)r->nneed + (size_t)r->nmade + (size_t)r->nt, sizeof *r->term);
  uint64_t *read = rgi_model_set(p->c->m);
  if (!r->term || !read) return rgi_nomem(e);
  rgi_replay_run(p->c->m->replay, p->c->always, read);
  r->unread = rgi_model_ms(p->c->m, p->c->always) - rgi_model_ms(p->c->m, read);
  r->cut = rgi_alloc_n(a, MOST_CUTS, sizeof *r->cut);
  r->cut_term = rgi_alloc_n(a, MOST_COLUMNS + n, sizeof *r->cut_term);
  if (!r->cut || !r->cut_term) return rgi_nomem(e);
  return open_program(r, a, e);
}

/* ---- what the program has ---- */

/* Bytes of the clone at row t, in units. */
static double held_at(const rgi_rows *r, const rgi_row_made *y, int32_t t) {
  const rgi_row_unit *u = &r->node[y->unit];
  double bytes = 0;
  if (t < y->at || t >= y->until) return 0;
  for (int i = u->held; i < u->held + u->nheld; i++)
    if (t <= r->held[i].last) bytes += r->held[i].bytes;
  return bytes;
}

static double least_at(const rgi_rows *r, int32_t t) {
  const rgi_parts *p = r->p;
  const double room = ((double)p->c->budget - (p->c->of_saved ? 0 : (double)p->c->m->mem.comm));
  const double least = r->saved + ((p->c->of_saved ? 0 : p->base[t]) - room) / r->unit - ROUNDING;
  return r->whole ? ceil(least) : least;
}

/* The budget at row t. */
static bool add_row(rgi_rows *r, int32_t t) {
  int n = 0;
  for (int i = 0; i < r->n; i++)
    if (r->column[i] >= 0) r->term[n++] = (rgi_weight){r->column[i], r->p->bytes[i] / r->unit};
  for (int k = 0; k < r->nneed; k++)
    if (r->need[k].column >= 0) r->term[n++] = (rgi_weight){r->need[k].column, -r->need[k].bytes};
  for (int i = 0; i < r->nmade; i++) {
    const rgi_row_made *y = &r->made[i];
    const double bytes = y->column >= 0 ? held_at(r, y, t) : 0;
    if (bytes > 0) r->term[n++] = (rgi_weight){y->column, -bytes};
  }
  r->full[t] = rgi_simplex_row(r->program, r->term, n, least_at(r, t));
  return r->full[t] >= 0;
}

static bool add_made(rgi_rows *r, rgi_row_made *y) {
  int n = 0;
  if (y->column >= 0) return true;
  for (int32_t t = y->at; t < y->until; t++) {
    const double bytes = r->full[t] >= 0 ? held_at(r, y, t) : 0;
    if (bytes > 0) r->term[n++] = (rgi_weight){r->full[t], -bytes};
  }
  y->column = rgi_simplex_column(r->program, 0, y->sure, 1, r->term, n);
  return y->column >= 0;
}

static bool add_cause(rgi_rows *r, rgi_row_made *y) {
  rgi_row_cause *c = &r->cause[y->worst];
  rgi_row_made *by = &r->made[c->by];
  if (c->line >= 0 || !add_made(r, by) || !add_made(r, y)) return false;
  const int x = r->column[r->node[y->unit].by];
  const rgi_weight term[] = {{y->column, 1}, {by->column, -1}, {x, -1}};
  c->line = rgi_simplex_row(r->program, term, 3, -1);
  return c->line >= 0;
}

static bool add_lack(rgi_rows *r, rgi_row_need *x, int reader) {
  int n = 0;
  if (r->lacks[reader] >= 0) return false;
  for (int32_t t = 0; t < r->nt && x->column < 0; t++)
    if (r->full[t] >= 0) r->term[n++] = (rgi_weight){r->full[t], -x->bytes};
  if (x->column < 0) x->column = rgi_simplex_column(r->program, 0, 0, 1, r->term, n);
  if (x->column < 0) return false;
  const int own = x->by >= 0 ? r->column[x->by] : -1;
  const rgi_weight term[] = {{x->column, 1}, {r->column[r->reader[reader]], -1}, {own, 1}};
  r->lacks[reader] = rgi_simplex_row(r->program, term, own >= 0 ? 3 : 2, 0);
  return r->lacks[reader] >= 0;
}

/* ---- what its solution violates ---- */

static double value_of(const rgi_rows *r, int column) {
  return column >= 0 ? rgi_simplex_value(r->program, column) : 0;
}

/* How far each clone is made at the least, by all causes. */
static void find_levels(rgi_rows *r) {
  for (int i = 0; i < r->nmade; i++) { /* readers come first */
    rgi_row_made *y = &r->made[i];
    const double x = r->value[r->node[y->unit].by];
    y->level = y->sure ? 1 : value_of(r, y->column);
    y->worst = -1;
    y->wanted = false;
    if (x <= LITTLE || y->sure) continue;
    for (int k = y->cause; k < y->cause + y->ncause; k++) {
      const rgi_row_made *by = &r->made[r->cause[k].by];
      const double level = by->level + x - 1;
      if (level > y->level + LITTLE) y->level = level, y->worst = k;
    }
  }
}

static int add_lacks(rgi_rows *r, double *saved) {
  int n = 0;
  for (int k = 0; k < r->nneed; k++) {
    rgi_row_need *x = &r->need[k];
    double most = 0;
    int worst = -1;
    for (int i = x->reader; i < x->reader + x->nreader; i++)
      if (r->value[r->reader[i]] > most) most = r->value[r->reader[i]], worst = i;
    if (x->by >= 0) most -= r->value[x->by];
    const double now = value_of(r, x->column);
    *saved += fmax(fmax(most, now), 0) * x->bytes;
    if (most > now + LITTLE) n += add_lack(r, x, worst);
  }
  return n;
}

/* By how much each row is over the budget. */
static void find_over(rgi_rows *r, double saved) {
  for (int32_t t = 0; t <= r->nt; t++) r->over[t] = 0;
  for (int i = 0; i < r->n; i++) saved -= r->value[i] * r->p->bytes[i] / r->unit;
  for (int i = 0; i < r->nmade; i++) {
    const rgi_row_made *y = &r->made[i];
    const rgi_row_unit *u = &r->node[y->unit];
    if (y->level <= 0) continue;
    for (int k = u->held; k < u->held + u->nheld; k++) {
      const int32_t end = y->until <= r->held[k].last ? y->until : r->held[k].last + 1;
      if (y->at >= end) continue;
      r->over[y->at] += y->level * r->held[k].bytes;
      r->over[end] -= y->level * r->held[k].bytes;
    }
  }
  double alive = saved;
  for (int32_t t = 0; t < r->nt; t++) {
    alive += r->over[t];
    r->over[t] = alive + least_at(r, t);
  }
}

static int add_rows(rgi_rows *r) {
  int n = 0;
  for (int32_t t = 0; t < r->nt && n < ROWS_A_ROUND; t++) {
    if (r->full[t] >= 0 || r->over[t] <= LITTLE) continue;
    if (t > 0 && r->over[t - 1] > r->over[t]) continue;
    if (t + 1 < r->nt && r->over[t + 1] >= r->over[t]) continue;
    n += add_row(r, t);
  }
  return n;
}

/* Causes of clones that rows of the program have, or that such clones are made for. */
static int add_causes(rgi_rows *r) {
  int n = 0;
  for (int i = r->nmade - 1; i >= 0; i--) {
    rgi_row_made *y = &r->made[i];
    if (y->worst < 0 && (!y->sure || y->column >= 0)) continue;
    for (int32_t t = y->at; t < y->until && !y->wanted; t++)
      y->wanted = r->full[t] >= 0 && held_at(r, y, t) > 0;
    if (!y->wanted) continue;
    if (y->sure) {
      n += add_made(r, y);
      continue;
    }
    r->made[r->cause[y->worst].by].wanted = true;
    n += add_cause(r, y);
  }
  return n;
}

/* What whole choices keep, where the program has all that it lacked. */
static int add_cuts(rgi_rows *r) {
  int most = MOST_CUTS - r->ncut;
  if (most > CUTS_A_ROUND) most = CUTS_A_ROUND;
  const int n = rgi_simplex_cuts(r->program, most, r->cut_term, r->cut + r->ncut);
  r->ncut += n;
  return n;
}

/* Lines that nothing came of for long. */
static void drop_idle(rgi_rows *r) {
  for (int32_t t = 0; t < r->nt; t++)
    if (r->full[t] >= 0 && rgi_simplex_idle(r->program, r->full[t]) > IDLE) {
      rgi_simplex_drop(r->program, r->full[t]);
      r->full[t] = -1;
    }
  for (int k = 0; k < r->ncause; k++)
    if (r->cause[k].line >= 0 && rgi_simplex_idle(r->program, r->cause[k].line) > IDLE) {
      rgi_simplex_drop(r->program, r->cause[k].line);
      r->cause[k].line = -1;
    }
  for (int k = 0; k < r->ncut; k++)
    if (rgi_simplex_idle(r->program, r->cut[k]) > IDLE_CUT) {
      rgi_simplex_drop(r->program, r->cut[k]);
      r->cut[k--] = r->cut[--r->ncut];
    }
  for (int k = 0; k < r->p->nneed; k++)
    if (r->lacks[k] >= 0 && rgi_simplex_idle(r->program, r->lacks[k]) > IDLE) {
      rgi_simplex_drop(r->program, r->lacks[k]);
      r->lacks[k] = -1;
    }
}

/* Clones that are made that early by what is computed again in any case. */
static void find_sure(rgi_rows *r, const uint64_t *again) {
  for (int i = 0; i < r->nmade; i++) {
    rgi_row_made *y = &r->made[i];
    const rgi_row_unit *u = &r->node[y->unit];
    y->sure = y->at == u->first;
    for (int k = y->cause; k < y->cause + y->ncause && !y->sure; k++)
      y->sure = r->made[r->cause[k].by].sure;
    y->sure &= rgi_has(again, u->by);
    if (y->column >= 0 && y->at < u->first) rgi_simplex_bounds(r->program, y->column, y->sure, 1);
  }
}

/* Rounds of cuts, which end where two in a row add next to nothing to what all have. */
typedef struct cutting {
  int left, vain;
  bool any;
  double first, before;
} cutting;

static bool go_on(cutting *c, double now) {
  const bool vain = c->any && now - c->before < VAIN * (now - c->first);
  if (!c->any) c->first = now;
  c->any = true;
  c->before = now;
  c->vain = vain ? c->vain + 1 : 0;
  return c->vain < 2 && c->left-- > 0;
}

double rgi_rows_bound(rgi_rows *r, const uint64_t *again, const uint64_t *open, int rounds,
                      int cuts, double most) {
  const int64_t before = rgi_simplex_work(r->program);
  for (int i = 0; i < r->n; i++)
    if (r->column[i] >= 0)
      rgi_simplex_bounds(r->program, r->column[i], rgi_has(again, i),
                         rgi_has(again, i) || rgi_has(open, i));
  find_sure(r, again);
  drop_idle(r);
  r->last = -INFINITY;
  cutting c = {.left = cuts};
  for (int round = 0; round < rounds; round++) {
    const double now =
        rgi_simplex_solve(r->program, 0, (most + r->unread) / r->unit_ms) * r->unit_ms - r->unread;
    for (int i = 0; i < r->n; i++) r->value[i] = value_of(r, r->column[i]);
    if (now >= r->last) {
      r->last = now;
      for (int i = 0; i < r->n; i++)
        r->cost[i] =
            r->column[i] >= 0 ? rgi_simplex_reduced(r->program, r->column[i]) * r->unit_ms : 0;
    }
    if (now >= most) break;
    double saved = 0;
    find_levels(r);
    int n = add_lacks(r, &saved);
    find_over(r, saved);
    n += add_rows(r);
    n += add_causes(r);
    r->work += (r->nmade * 4 + r->ncause + r->nt) / 8;
    if (n == 0 && go_on(&c, now)) n = add_cuts(r);
    if (n == 0) break;
  }
  r->work += rgi_simplex_work(r->program) - before;
  return r->last;
}

double rgi_rows_try(rgi_rows *r, int candidate, bool again, double most) {
  const int64_t before = rgi_simplex_work(r->program);
  const double ms = rgi_simplex_try(r->program, r->column[candidate], again, again, TRY_PIVOTS,
                                    (most + r->unread) / r->unit_ms) *
                        r->unit_ms -
                    r->unread;
  r->work += rgi_simplex_work(r->program) - before;
  return ms;
}
