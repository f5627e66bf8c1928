/* recompute/rows.c: a bound for choices that are made in part.

   At every row of backward, one node that moves bytes, there are

       saved      what is kept, and what only clones read
       scratch    gradients alive there, and each clone from the row of its first reader, which may
                  be a clone itself, to backward's own last

   and together no more than the budget. For what is decided both are known. A candidate that is
   still open frees its bytes in saved memory, and

       holds      them in scratch from where what is decided has its clone made
       pulls      clones that it reads, and those that they read, to its own first row: of several
                  that may pull one clone each is charged a share, which together are no more than
                  what the first of them comes to
       lacks      what it reads of what is kept, by shares as well

   With a price on the bytes of each row each open candidate costs its time, less what it frees and
   more what it holds, pulls and lacks; those that cost less than nothing are taken. That is a bound
   from below at any prices, and some subgradient steps find good ones.
 */
#include "rows.h"
#include <math.h>

static const double ROUNDING = 1e-9; /* units; what sums of doubles may be off by */
enum {
  SHARE_STEPS = 10,  /* prices that are tried with the same shares */
  LONGEST_TERMS = 64 /* of a candidate, on average: what comes beyond is left out */
};

struct rgi_row_unit {
  int by;
  int dep, ndep, held, nheld;
  int32_t first; /* row at which backward reads of it, or nt */
};
struct rgi_row_held {
  int32_t last;
  double bytes;
};
struct rgi_row_need {
  int by, reader, nreader;
  double bytes;
  bool asks; /* it may be saved or not */
};
/* Bytes in scratch at rows from … to - 1 if the candidate is computed again. */
struct rgi_row_term {
  int by;
  int32_t from, to;
  double bytes;
};

/* Open unit `by` pulls unit `of`, if that is computed again, too. */
struct rgi_row_pull {
  int by, of, next; /* of the same `of`: one that pulls as far or farther; -1: none does */
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
      r->reader[j] = p->need[j].reader;
    x->nreader = j - i;
  }
}

rg_status rgi_rows_open(const rgi_parts *p, rgi_arena *a, rgi_rows **out, rg_error *e) {
  const rgi_graph *g = p->c->m->g;
  rgi_rows *r = *out = rgi_alloc(a, sizeof *r);
  if (!r) return rgi_nomem(e);
  *r = (rgi_rows){
      .p = p, .n = p->c->m->ncandidate, .nt = p->c->of_saved ? 1 : p->nt, .unit = 1, .rate = 0.1};
  const size_t n = (size_t)r->n + 1, nt = (size_t)r->nt + 2, nn = (size_t)g->nnode + 1;
  size_t edges = 1;
  for (int32_t k = 0; k < g->nnode; k++) edges += (size_t)rgi_nin(&g->node[k]);
  for (int i = 0; i < r->n; i++) r->unit = fmax(r->unit, p->bytes[i]);
  int *unit_at = rgi_alloc_n(a, nn, sizeof *unit_at);
  r->most_terms = LONGEST_TERMS * r->n + p->nvalue;
  r->node = rgi_alloc_n(a, nn, sizeof *r->node);
  r->dep = rgi_alloc_n(a, edges, sizeof *r->dep);
  r->held = rgi_alloc_n(a, (size_t)p->nvalue + 1, sizeof *r->held);
  r->need = rgi_alloc_n(a, (size_t)p->nneed + 1, sizeof *r->need);
  r->reader = rgi_alloc_n(a, (size_t)p->nneed + 1, sizeof *r->reader);
  r->term = rgi_alloc_n(a, (size_t)r->most_terms + 1, sizeof *r->term);
  r->pull = rgi_alloc_n(a, (size_t)r->most_terms + 1, sizeof *r->pull);
  r->made = rgi_alloc_n(a, nn, sizeof *r->made);
  r->seen = rgi_alloc_n(a, nn, sizeof *r->seen);
  r->head = rgi_alloc_n(a, nn, sizeof *r->head);
  r->list = rgi_alloc_n(a, n, sizeof *r->list);
  r->frees = rgi_alloc_n(a, n, sizeof *r->frees);
  r->mean = rgi_alloc_n(a, n, sizeof *r->mean);
  r->exceeds = rgi_alloc_n(a, nt, sizeof *r->exceeds);
  const size_t prices = nt + (size_t)p->nneed;
  r->price = rgi_alloc_n(a, prices, sizeof *r->price);
  if (r->price) r->lack = r->price + r->nt;
  r->excess = rgi_alloc_n(a, nt, sizeof *r->excess);
  r->sum = rgi_alloc_n(a, nt, sizeof *r->sum);
  r->slope = rgi_alloc_n(a, prices, sizeof *r->slope);
  r->way = rgi_alloc_n(a, prices, sizeof *r->way);
  r->best = rgi_alloc_n(a, prices, sizeof *r->best);
  r->cost = rgi_alloc_n(a, n, sizeof *r->cost);
  if (!unit_at || !r->node || !r->dep || !r->held || !r->need || !r->reader || !r->term ||
      !r->pull || !r->made || !r->seen || !r->head || !r->list || !r->frees || !r->mean ||
      !r->exceeds || !r->price || !r->excess || !r->sum || !r->slope || !r->way || !r->best ||
      !r->cost)
    return rgi_nomem(e);
  find_units(r, unit_at);
  find_needs(r);
  uint64_t *read = rgi_model_set(p->c->m);
  if (!read) return rgi_nomem(e);
  rgi_replay_run(p->c->m->replay, p->c->always, read);
  r->unread = rgi_model_ms(p->c->m, p->c->always) - rgi_model_ms(p->c->m, read);
  return RG_OK;
}

/* ---- what is decided ---- */

static void add_term(rgi_rows *r, int by, int32_t from, int32_t to, double bytes) {
  if (from < to && r->nterm < r->most_terms)
    r->term[r->nterm++] = (rgi_row_term){by, from, to, bytes};
}

/* The row at which each clone is made, if nothing more than itself is computed again. */
static void find_made(rgi_rows *r) {
  for (int u = 0; u < r->nnode; u++) r->made[u] = r->node[u].first;
  for (int u = r->nnode - 1; u >= 0; u--) {
    const rgi_row_unit *x = &r->node[u];
    if (!rgi_has(r->again, x->by)) continue;
    for (int i = x->dep; i < x->dep + x->ndep; i++)
      if (r->made[r->dep[i]] > r->made[u]) r->made[r->dep[i]] = r->made[u];
  }
}

/* What is saved if nothing open is computed again, and what each open candidate frees of it. */
static void find_saved(rgi_rows *r, double *saved) {
  const rgi_parts *p = r->p;
  *saved = p->fixed / r->unit;
  r->ms = -r->unread;
  r->nlist = 0;
  for (int i = 0; i < r->n; i++) {
    const bool again = rgi_has(r->again, i);
    r->frees[i] = p->bytes[i] / r->unit;
    if (again) r->ms += p->c->m->ms[i];
    if (!again && (p->is_free[i] || rgi_has(p->c->always, i))) *saved += r->frees[i];
    if (rgi_has(r->open, i)) r->list[r->nlist++] = i;
  }
  for (int k = 0; k < r->nneed; k++) {
    rgi_row_need *x = &r->need[k];
    bool charged = false, open = false;
    for (int i = x->reader; i < x->reader + x->nreader; i++) {
      charged |= rgi_has(r->again, r->reader[i]);
      open |= rgi_has(r->open, r->reader[i]);
      if (!rgi_has(r->open, r->reader[i])) r->lack[i] = 0;
    }
    const bool gone = x->by >= 0 && rgi_has(r->again, x->by);
    x->asks = open && !charged && !gone;
    if (!charged || gone) continue;
    *saved += x->bytes;
    if (x->by >= 0) r->frees[x->by] += x->bytes;
  }
}

static void add_pull(rgi_rows *r, int u, int d) {
  if (r->npull == r->most_terms) return;
  int *at = &r->head[d];
  while (*at >= 0 && r->made[r->pull[*at].by] < r->made[u]) at = &r->pull[*at].next;
  r->pull[r->npull] = (rgi_row_pull){u, d, *at};
  *at = r->npull++;
}

/* Clones that unit u reads, and those that they read, come with open unit `by` to its row; those
 * that are open themselves may. */
static void pull(rgi_rows *r, int u, int by) {
  const rgi_row_unit *x = &r->node[u];
  for (int i = x->dep; i < x->dep + x->ndep; i++) {
    const int d = r->dep[i], c = r->node[d].by;
    if (r->made[d] <= r->made[by] || r->seen[d] == by) continue;
    const bool again = rgi_has(r->again, c);
    if (!again && (u != by || !rgi_has(r->open, c))) continue;
    r->seen[d] = by;
    add_pull(r, by, d);
    if (again) pull(r, d, by);
  }
}

static void find_pulls(rgi_rows *r) {
  for (int u = 0; u < r->nnode; u++) r->head[u] = r->seen[u] = -1;
  r->npull = 0;
  for (int u = 0; u < r->nnode; u++)
    if (rgi_has(r->open, r->node[u].by) && r->made[u] < r->nt) pull(r, u, u);
}

/* ---- shares ---- */

/* How far both are taken, on the way so far: 0 … 1. */
static double both(const rgi_rows *r, const rgi_row_pull *x) {
  const double by = r->mean[r->node[x->by].by];
  const int of = r->node[x->of].by;
  return rgi_has(r->again, of) ? by : by + r->mean[of] - 1;
}

/* Of rows from … to - 1 the clone `of` is there for `by`, by that share. */
static void charge(rgi_rows *r, const rgi_row_pull *x, int32_t from, int32_t to, double share) {
  const rgi_row_unit *of = &r->node[x->of];
  const bool again = rgi_has(r->again, of->by);
  for (int i = of->held; i < of->held + of->nheld; i++) {
    const int32_t end = to <= r->held[i].last ? to : r->held[i].last + 1;
    const double bytes = share * r->held[i].bytes;
    if (from >= end) continue;
    add_term(r, r->node[x->by].by, from, end, bytes);
    if (again) continue;
    add_term(r, of->by, from, end, bytes);
    r->sum[from] -= bytes;
    r->sum[end] += bytes;
  }
}

static double fourth(double x) {
  return x > 0 ? x * x * x * x : 0;
}

/* All that may pull a clone, the farthest first: each row is charged to those that reach it. */
static void share_pulls(rgi_rows *r, int d) {
  double sum = 0, most = 0;
  int n = 0;
  for (int k = r->head[d]; k >= 0; k = r->pull[k].next) {
    const rgi_row_pull *x = &r->pull[k];
    const double way = both(r, x);
    sum += fourth(way);
    most = fmax(most, way);
    const int32_t from = r->made[x->by],
                  to = x->next < 0 ? r->made[d] : r->made[r->pull[x->next].by];
    n++;
    if (from >= to || sum <= 0) continue;
    const double all = fmin(1, 4 * most) / sum;
    for (int i = r->head[d], m = 0; m < n; i = r->pull[i].next, m++) {
      const double part = fourth(both(r, &r->pull[i])) * all;
      if (part > 0.01) charge(r, &r->pull[i], from, to, part);
    }
  }
}

void rgi_rows_share(rgi_rows *r) {
  r->nterm = r->nown;
  for (int32_t t = 0; t <= r->nt; t++) r->sum[t] = 0;
  for (int d = 0; d < r->nnode; d++)
    if (r->head[d] >= 0) share_pulls(r, d);
  double alive = 0;
  for (int32_t t = 0; t < r->nt; t++) {
    alive += r->sum[t];
    r->excess[t] = r->exceeds[t] + alive;
  }
  r->work += (r->nterm - r->nown + r->nneed + r->nnode + r->n) / 4;
}

void rgi_rows_decide(rgi_rows *r, const uint64_t *again, const uint64_t *open) {
  const rgi_parts *p = r->p;
  double saved, alive = 0;
  r->again = again;
  r->open = open;
  r->nterm = 0;
  find_made(r);
  find_saved(r, &saved);
  for (int32_t t = 0; t <= r->nt; t++) r->sum[t] = 0;
  for (int u = 0; u < r->nnode; u++) {
    const rgi_row_unit *x = &r->node[u];
    const bool is = rgi_has(again, x->by);
    if (!is && !rgi_has(open, x->by)) continue;
    for (int i = x->held; i < x->held + x->nheld; i++) {
      const int32_t to = r->held[i].last + 1;
      if (!is) {
        add_term(r, x->by, r->made[u], to, r->held[i].bytes);
      } else if (r->made[u] < to) {
        r->sum[r->made[u]] += r->held[i].bytes;
        r->sum[to] -= r->held[i].bytes;
      }
    }
  }
  const double room =
      ((double)p->c->budget - (p->c->of_saved ? 0 : (double)p->c->m->mem.comm)) / r->unit +
      ROUNDING;
  r->over = -INFINITY;
  for (int32_t t = 0; t < r->nt; t++) {
    alive += r->sum[t];
    r->exceeds[t] = saved + alive + (p->c->of_saved ? 0 : p->base[t] / r->unit) - room;
    r->over = fmax(r->over, r->exceeds[t]);
  }
  r->nown = r->nterm;
  find_pulls(r);
  rgi_rows_share(r);
  r->work += (r->nnode * 8 + r->nt) / 4;
}

/* ---- prices ---- */

double rgi_rows_bound(rgi_rows *r) {
  double total = r->ms;
  r->sum[0] = 0;
  for (int32_t t = 0; t < r->nt; t++) {
    total += r->price[t] * r->excess[t];
    r->sum[t + 1] = r->sum[t] + r->price[t];
  }
  for (int k = 0; k < r->nlist; k++) {
    const int i = r->list[k];
    r->cost[i] = r->p->c->m->ms[i] - r->sum[r->nt] * r->frees[i];
  }
  for (int k = 0; k < r->nterm; k++) {
    const rgi_row_term *x = &r->term[k];
    r->cost[x->by] += x->bytes * (r->sum[x->to] - r->sum[x->from]);
  }
  for (int k = 0; k < r->nneed; k++) {
    const rgi_row_need *x = &r->need[k];
    if (!x->asks) continue;
    double sum = 0;
    for (int i = x->reader; i < x->reader + x->nreader; i++) sum += r->lack[i];
    const double most = r->sum[r->nt] * x->bytes, part = sum > most ? most / sum : 1;
    for (int i = x->reader; i < x->reader + x->nreader; i++) {
      r->lack[i] *= part;
      r->cost[r->reader[i]] += r->lack[i];
    }
    if (x->by >= 0) r->cost[x->by] -= sum * part;
  }
  for (int k = 0; k < r->nlist; k++) total += fmin(r->cost[r->list[k]], 0);
  r->work += (r->nterm + r->nlist + r->nt) / 8 + 1;
  return total;
}

static void find_slope(rgi_rows *r) {
  double alive = 0;
  for (int32_t t = 0; t <= r->nt; t++) r->sum[t] = 0;
  for (int k = 0; k < r->nlist; k++) {
    const int i = r->list[k];
    const bool taken = r->cost[i] < 0;
    if (taken) alive -= r->frees[i];
    r->mean[i] += r->rate * ((taken ? 1 : 0) - r->mean[i]);
  }
  for (int k = 0; k < r->nterm; k++) {
    const rgi_row_term *x = &r->term[k];
    if (!(r->cost[x->by] < 0)) continue;
    r->sum[x->from] += x->bytes;
    r->sum[x->to] -= x->bytes;
  }
  for (int32_t t = 0; t < r->nt; t++) {
    alive += r->sum[t];
    r->slope[t] = r->excess[t] + alive;
  }
  for (int k = 0; k < r->nneed; k++) {
    const rgi_row_need *x = &r->need[k];
    if (!x->asks) continue;
    const bool gone = x->by >= 0 && rgi_has(r->open, x->by) && r->cost[x->by] < 0;
    for (int i = x->reader; i < x->reader + x->nreader; i++)
      if (rgi_has(r->open, r->reader[i])) r->slope[r->nt + i] = (r->cost[r->reader[i]] < 0) - gone;
  }
  r->work += (r->nterm + r->nlist + r->nt) / 8 + 1;
}

double rgi_rows_best(rgi_rows *r, int steps, double most) {
  const int all = r->nt + r->p->nneed;
  double best = -INFINITY, theta = 1;
  int since = 0;
  for (int t = 0; t < all; t++) r->way[t] = r->slope[t] = 0;
  for (int step = 0; step < steps; step++) {
    if (step > 0 && step % SHARE_STEPS == 0) rgi_rows_share(r);
    const double now = rgi_rows_bound(r);
    if (now > best) {
      if (now > best + 1e-4 * fabs(best)) since = 0;
      best = now;
      memcpy(r->best, r->price, (size_t)all * sizeof *r->best);
    }
    if (best >= most || step + 1 == steps) break;
    if (++since > 4) theta *= 0.6, since = 0;
    find_slope(r);
    double length = 0, steep = 0;
    for (int t = 0; t < all; t++) {
      r->way[t] = r->slope[t] + 0.5 * r->way[t];
      if (r->price[t] <= 0 && r->way[t] < 0) r->way[t] = 0;
      length += r->way[t] * r->way[t];
      if (r->price[t] > 0 || r->slope[t] > 0) steep = fmax(steep, fabs(r->slope[t]));
    }
    if (length <= 1e-18 || steep <= 2 * ROUNDING) break;
    const double size = theta * (most - now) / length;
    for (int t = 0; t < all; t++) r->price[t] = fmax(r->price[t] + size * r->way[t], 0);
  }
  memcpy(r->price, r->best, (size_t)all * sizeof *r->best);
  r->last = rgi_rows_bound(r);
  return fmax(best, r->last);
}
