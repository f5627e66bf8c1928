/* recompute/layers.c: a bound from below for layers upon layers.

   Candidates in the graph's order are cut into blocks, where names begin to come again: a layer
   each, if it has no more than `width`. Of a block, and of one candidate before it, the border
   (what the layer starts from), every choice is looked at, with everything else kept:

       ms, saved   what it takes, and what it leaves in saved memory
       before      the most scratch at the block's own part of backward, before the border's clone
                   is there (all of it, if the border is kept)
       after       the same, from then on
       spill       if the block's end is recomputed: bytes of the block that are made with it, while
                   backward is still with the next block, and live until backward is with this one
       pulls       … and so is what the border before spills

   More recomputed elsewhere takes nothing of this away: clones then come earlier, and are counted
   until backward itself reads them last, no further. So what two blocks need at one place adds up,
   and with a price on saved bytes the best choices of all blocks are found one block after the
   other, in a table of what the last one spills. Blocks that are made alike, the layers of a model,
   share one list of choices.

   Where candidates may also leave for the host's memory (rgi_chooser.moved), alone or beside a
   clone that other clones read, moved bytes have a price, too. What leaves is in scratch from its
   first reader on, clone or not; with a clone beside it, from backward's own first. Four to the
   power of fifteen is too much to look at: of small values only the cheapest fate is counted, by
   itself.

   Backward goes through the blocks from the last to the first:

       rows     0 ......... start[2] .......... start[1] ............ start[0] ...... nt
       block         3          |        2          |         1           |     0
 */
#include "bound.h"
#include <math.h>
#include <stdlib.h>

enum {
  GRID = 640,            /* steps in which spills are told apart; rounded down */
  PRICES = 24,           /* of saved bytes, tried one after the other */
  MOST_DEPS = 16,        /* of a unit; without the others the bound is lower, no less a bound */
  MOST_CHOICES = 300000, /* of a block from which candidates may leave */
  WIDEST_CHOICE = 8,     /* so wide is a block of which all may leave */
  MOVED_PRICES = 10      /* that are tried, each with those of saved bytes */
};

typedef struct option {
  double ms, saved, moved, before, after, spill;
  uint8_t in, out; /* the border's and the end's fate */
  bool pulls;
} option;

typedef struct choice {
  uint32_t again, away; /* bits */
} choice;

/* A node that a choice clones. */
typedef struct unit {
  int bit, ndep, dep[MOST_DEPS]; /* units whose values it reads */
  int32_t node, made;            /* row, in the choice at hand */
} unit;

typedef struct held {
  int unit;
  int32_t first, last; /* rows that read it */
  double bytes;
} held;

typedef struct reading {
  int32_t row;
  int unit;
} reading;

/* Bytes that are saved if a reader is recomputed, and `by` not. */
typedef struct lack {
  int by; /* bit, or -1 */
  uint32_t readers;
  double bytes;
} lack;

/* In numbers of its own: rows count from where it starts, bits are its candidates and the border
 * behind them. */
typedef struct block {
  int of[RGI_WIDEST_LAYER + 1], n, border, end; /* the last two: bits, or -1 */
  int small[RGI_WIDEST_LAYER], nsmall;          /* candidates that are none of these */
  int32_t start, rows;
  unit *unit;
  held *held;
  reading *reading;
  lack *lack;
  int nunit, nheld, nreading, nlack;
  double *signature; /* all that its options depend on */
  size_t nsignature;
  option *option;
  int noption;
} block;

struct rgi_layers {
  const rgi_parts *p;
  rgi_model *m;
  rgi_arena *a;
  block *block;
  int nblock;
  int *block_of;   /* per candidate, or -1 */
  int32_t *row_of; /* per node: of those that move bytes in backward, or -1 */
  double *alive;   /* [nt + 1] */
  double price;    /* of a moved byte, the last that was best */
};

/* ---- blocks ---- */

/* How many free candidates from the i-th on until one of its kind comes again; 0: none does. */
static int layer_at(const rgi_layers *l, int i) {
  const rgi_chooser *c = l->p->c;
  for (int k = i + 1; k < c->nfree; k++)
    if (l->m->kind[c->free[k]] == l->m->kind[c->free[i]]) return k - i;
  return 0;
}

/* Of the free candidates from the i-th on, those of the next block: whole layers, as many as fit,
 * or a part of one; or what comes before the first layer. */
static int width_at(const rgi_layers *l, int i, int width) {
  const int left = l->p->c->nfree - i, layer = layer_at(l, i);
  if (l->p->c->moved && layer <= WIDEST_CHOICE && width > WIDEST_CHOICE) width = WIDEST_CHOICE;
  int n = width;
  if (layer > width)
    n = layer / ((layer + width - 1) / width);
  else if (layer > 0)
    n = width / layer * layer;
  else
    for (int k = 1; k < left && k < n; k++)
      if (layer_at(l, i + k)) n = k;
  return n < left ? n : left;
}

static int bit_of(const block *x, int candidate) {
  for (int i = 0; i < x->n; i++)
    if (x->of[i] == candidate) return i;
  return x->border >= 0 && x->of[x->border] == candidate ? x->border : -1;
}

/* The node that makes the bytes of t by itself, or -1. */
static int32_t maker(const rgi_layers *l, int32_t t) {
  const rgi_graph *g = l->m->g;
  if (t < 0 || l->p->by[t] < 0) return -1;
  const int32_t p = g->tensor[rgi_owner(g, t)].producer;
  if (p < 0 || g->node[p].backward || g->node[p].op->flags & RG_OP_VIEW) return -1;
  return p;
}

static int candidate_at(const rgi_layers *l, int32_t node) {
  const rgi_node *n = &l->m->g->node[node];
  if (n->backward || n->op->flags & RG_OP_VIEW || n->kind != RGI_PRIMAL || n->origin < 0) return -1;
  return l->m->candidate_of[n->origin];
}

/* Of the block before x, the candidate with the most bytes that x reads, if one node makes it. */
static void find_border(const rgi_layers *l, int index) {
  const rgi_graph *g = l->m->g;
  block *x = &l->block[index], *before = x - 1;
  int best = -1;
  x->border = x->end = before->end = -1;
  for (int32_t k = 0; k < g->nnode; k++) {
    const int reader = candidate_at(l, k);
    if (reader < 0 || l->block_of[reader] != index) continue;
    for (int i = 0; i < rgi_nin(&g->node[k]); i++) {
      const int32_t node = maker(l, g->node[k].in[i]);
      const int c = node < 0 ? -1 : candidate_at(l, node);
      if (c < 0 || l->block_of[c] != index - 1) continue;
      if (best < 0 || l->p->bytes[c] > l->p->bytes[best]) best = c;
    }
  }
  if (best < 0) return;
  int nodes = 0;
  for (int32_t k = 0; k < g->nnode; k++) nodes += candidate_at(l, k) == best;
  if (nodes != 1) return;
  before->end = bit_of(before, best);
  if (before->end < 0) return; /* a small one */
  x->border = x->n;
  x->of[x->border] = best;
}

/* Where backward begins to read what a block makes, but for its end. */
static void find_rows(const rgi_layers *l) {
  const rgi_graph *g = l->m->g;
  for (int i = 0; i < l->nblock; i++) l->block[i].start = l->p->nt;
  for (int32_t k = 0; k < g->nnode; k++)
    for (int i = 0; i < rgi_nin(&g->node[k]) && l->row_of[k] >= 0; i++) {
      const int32_t t = g->node[k].in[i];
      const int c = t < 0 ? -1 : l->p->by[t], b = c < 0 ? -1 : l->block_of[c];
      if (b < 0) continue;
      block *x = &l->block[b];
      if (x->end >= 0 && x->of[x->end] == c) continue;
      if (l->row_of[k] < x->start) x->start = l->row_of[k];
    }
  l->block[l->nblock - 1].start = 0;
  for (int i = l->nblock - 2; i >= 0; i--)
    if (l->block[i].start < l->block[i + 1].start) l->block[i].start = l->block[i + 1].start;
  for (int i = 0; i < l->nblock; i++)
    l->block[i].rows = (i ? l->block[i - 1].start : l->p->nt) - l->block[i].start;
}

static double moved_of(const rgi_layers *l, int candidate) {
  return l->p->c->moved ? l->p->c->moved[candidate] : 0;
}

/* Leaves those with the most bytes, as many as have MOST_CHOICES choices. */
static void set_small_apart(const rgi_layers *l, block *x) {
  int order[RGI_WIDEST_LAYER], n = 0;
  bool large[RGI_WIDEST_LAYER];
  for (int i = 0; i < x->n; i++) {
    int k = i;
    for (; k > 0 && l->m->kept_bytes[x->of[order[k - 1]]] < l->m->kept_bytes[x->of[i]]; k--)
      order[k] = order[k - 1];
    order[k] = i;
  }
  for (int64_t i = 0, choices = RGI_FATES; i < x->n; i++) {
    choices *= moved_of(l, x->of[order[i]]) > 0 ? RGI_FATES : 2;
    large[order[i]] = choices <= MOST_CHOICES;
  }
  for (int i = 0; i < x->n; i++)
    if (large[i])
      x->of[n++] = x->of[i];
    else
      x->small[x->nsmall++] = x->of[i];
  x->n = n;
}

static void cut(rgi_layers *l, int width) {
  const rgi_chooser *c = l->p->c;
  for (int i = 0; i < c->nfree;) {
    block *x = &l->block[l->nblock];
    x->n = width_at(l, i, width);
    x->border = x->end = -1;
    for (int k = 0; k < x->n; k++) {
      x->of[k] = c->free[i++];
      l->block_of[x->of[k]] = l->nblock;
    }
    if (c->moved) set_small_apart(l, x);
    l->nblock++;
  }
  for (int i = 1; i < l->nblock; i++) find_border(l, i);
  find_rows(l);
}

/* ---- what a block is made of ---- */

static int unit_at(const block *x, int32_t node) {
  for (int u = 0; u < x->nunit; u++)
    if (x->unit[u].node == node) return u;
  return -1;
}

static void add_units(const rgi_layers *l, block *x) {
  const rgi_graph *g = l->m->g;
  for (int32_t k = 0; k < g->nnode; k++) {
    const int c = candidate_at(l, k), bit = c < 0 ? -1 : bit_of(x, c);
    if (bit < 0) continue;
    unit *u = &x->unit[x->nunit];
    *u = (unit){.bit = bit, .node = k};
    for (int i = 0; i < rgi_nin(&g->node[k]) && u->ndep < MOST_DEPS; i++) {
      const int32_t from = maker(l, g->node[k].in[i]);
      const int dep = from < 0 ? -1 : unit_at(x, from);
      if (dep >= 0) u->dep[u->ndep++] = dep;
    }
    x->nunit++;
  }
}

static void add_readings(const rgi_layers *l, block *x) {
  const rgi_graph *g = l->m->g;
  for (int32_t k = 0; k < g->nnode; k++) {
    if (l->row_of[k] < 0 || l->row_of[k] >= x->start + x->rows) continue;
    for (int i = 0; i < rgi_nin(&g->node[k]); i++) {
      const int32_t from = maker(l, g->node[k].in[i]);
      const int u = from < 0 ? -1 : unit_at(x, from);
      if (u >= 0) x->reading[x->nreading++] = (reading){l->row_of[k] - x->start, u};
    }
  }
}

/* What only clones read is counted where its first reader is, by its readers in that block. */
static void add_lacks(const rgi_layers *l, block *x) {
  const rgi_parts *p = l->p;
  const int index = (int)(x - l->block);
  for (int i = 0, j; i < p->nneed; i = j) {
    int first = l->nblock;
    for (j = i; j < p->nneed && p->need[j].tensor == p->need[i].tensor; j++) {
      const int b = l->block_of[p->need[j].reader];
      if (b >= 0 && b < first) first = b;
    }
    const int by = p->need[i].by, bit = by < 0 ? -1 : bit_of(x, by);
    if (first != index || (by >= 0 && bit < 0)) continue;
    lack y = {.by = bit, .bytes = p->need[i].bytes};
    for (int k = i; k < j; k++) {
      const int reader = bit_of(x, p->need[k].reader);
      if (reader >= 0) y.readers |= 1u << reader;
    }
    if (y.readers) x->lack[x->nlack++] = y;
  }
}

static bool makes(const rgi_layers *l, const block *x, int32_t t) {
  const int32_t from = maker(l, t);
  const int c = from < 0 ? -1 : candidate_at(l, from);
  return c >= 0 && bit_of(x, c) >= 0;
}

static rg_status describe(const rgi_layers *l, block *x, rg_error *e) {
  const rgi_graph *g = l->m->g;
  const rgi_parts *p = l->p;
  size_t nodes = 1, edges = 1, values = 1, lacks = 1;
  for (int32_t k = 0; k < g->nnode; k++) {
    const int c = candidate_at(l, k);
    nodes += c >= 0 && bit_of(x, c) >= 0;
    if (l->row_of[k] < 0 || l->row_of[k] >= x->start + x->rows) continue;
    for (int i = 0; i < rgi_nin(&g->node[k]); i++) edges += makes(l, x, g->node[k].in[i]);
  }
  for (int i = 0; i < p->nvalue; i++) values += makes(l, x, p->value[i].tensor);
  for (int i = 0; i < p->nneed; i++) lacks += bit_of(x, p->need[i].reader) >= 0;
  x->unit = rgi_alloc_n(l->a, nodes, sizeof *x->unit);
  x->reading = rgi_alloc_n(l->a, edges, sizeof *x->reading);
  x->held = rgi_alloc_n(l->a, values, sizeof *x->held);
  x->lack = rgi_alloc_n(l->a, lacks, sizeof *x->lack);
  if (!x->unit || !x->reading || !x->held || !x->lack) return rgi_nomem(e);
  add_units(l, x);
  add_readings(l, x);
  for (int i = 0; i < p->nvalue; i++) {
    const int32_t from = maker(l, p->value[i].tensor);
    const int u = from < 0 ? -1 : unit_at(x, from);
    if (u >= 0)
      x->held[x->nheld++] =
          (held){u, p->value[i].first - x->start, p->value[i].last - x->start, p->value[i].bytes};
  }
  add_lacks(l, x);
  return RG_OK;
}

/* One number after the other, whatever it is. */
static rg_status sign(const rgi_layers *l, block *x, rg_error *e) {
  const size_t most = 8 + 3 * (size_t)x->n + (size_t)x->rows + 2 * (size_t)x->nreading +
                      4 * (size_t)x->nheld + 3 * (size_t)x->nlack +
                      (2 + MOST_DEPS) * (size_t)x->nunit;
  double *s = x->signature = rgi_alloc_n(l->a, most, sizeof *s);
  if (!s) return rgi_nomem(e);
  const int counts[] = {x->n,     x->border, x->end,      x->rows,
                        x->nunit, x->nheld,  x->nreading, x->nlack};
  for (int i = 0; i < RGI_COUNT(counts); i++) *s++ = counts[i];
  for (int i = 0; i < x->n; i++) {
    *s++ = l->m->ms[x->of[i]], *s++ = l->p->bytes[x->of[i]];
    *s++ = moved_of(l, x->of[i]);
  }
  for (int i = 0; i < x->rows; i++) *s++ = l->p->base[x->start + i];
  for (int i = 0; i < x->nreading; i++) *s++ = x->reading[i].row, *s++ = x->reading[i].unit;
  for (int i = 0; i < x->nheld; i++)
    *s++ = x->held[i].unit, *s++ = x->held[i].first, *s++ = x->held[i].last,
    *s++ = x->held[i].bytes;
  for (int i = 0; i < x->nlack; i++)
    *s++ = x->lack[i].by, *s++ = x->lack[i].readers, *s++ = x->lack[i].bytes;
  for (int i = 0; i < x->nunit; i++) {
    *s++ = x->unit[i].bit, *s++ = x->unit[i].ndep;
    for (int k = 0; k < x->unit[i].ndep; k++) *s++ = x->unit[i].dep[k];
  }
  x->nsignature = (size_t)(s - x->signature);
  return RG_OK;
}

/* ---- its choices ---- */

static rgi_fate fate_of(choice set, int bit) {
  return bit < 0 ? RGI_KEPT : (rgi_fate)((set.again >> bit & 1) | (set.away >> bit & 1) << 1);
}

/* Also: brings back. */
static void make(block *x, choice set, int u, int32_t row) {
  unit *y = &x->unit[u];
  const rgi_fate f = fate_of(set, y->bit);
  if (f == RGI_KEPT || y->made <= row) return;
  y->made = row;
  for (int i = 0; i < y->ndep && f != RGI_AWAY; i++) make(x, set, y->dep[i], row);
}

static void needs_of(const rgi_layers *l, block *x, choice set, option *o) {
  for (int i = 0; i < x->nunit; i++) x->unit[i].made = INT32_MAX;
  for (int i = 0; i < x->nreading; i++)
    if (fate_of(set, x->unit[x->reading[i].unit].bit) != RGI_BOTH)
      make(x, set, x->reading[i].unit, x->reading[i].row);
  double *alive = l->alive;
  for (int32_t t = 0; t <= x->rows; t++) alive[t] = 0;
  for (int i = 0; i < x->nheld; i++) {
    const unit *u = &x->unit[x->held[i].unit];
    const int32_t made = fate_of(set, u->bit) == RGI_BOTH ? x->held[i].first : u->made,
                  from = made > 0 ? made : 0;
    const int32_t to = x->held[i].last < x->rows ? x->held[i].last + 1 : x->rows;
    if (from >= to) continue;
    alive[from] += x->held[i].bytes;
    alive[to] -= x->held[i].bytes;
  }
  int32_t there = INT32_MAX;
  for (int i = 0; i < x->nunit && o->in == RGI_AGAIN; i++)
    if (x->unit[i].bit == x->border) there = x->unit[i].made;
  double sum = 0;
  for (int32_t t = 0; t < x->rows; t++) {
    sum += alive[t];
    double *most = t < there ? &o->before : &o->after;
    if (l->p->base[x->start + t] + sum > *most) *most = l->p->base[x->start + t] + sum;
  }
}

/* What comes with the block's end. */
static void spill_of(block *x, choice set, option *o) {
  for (int i = 0; i < x->nunit; i++) x->unit[i].made = INT32_MAX;
  for (int i = 0; i < x->nunit; i++)
    if (x->unit[i].bit == x->end) make(x, set, i, -1);
  for (int i = 0; i < x->nunit; i++)
    if (x->unit[i].bit == x->border && x->unit[i].made < 0) o->pulls = o->in == RGI_AGAIN;
  for (int i = 0; i < x->nheld; i++) {
    const unit *u = &x->unit[x->held[i].unit];
    if (u->made < 0 && u->bit != x->end && x->held[i].last >= -1 &&
        fate_of(set, u->bit) != RGI_BOTH)
      o->spill += x->held[i].bytes;
  }
}

static option option_of(const rgi_layers *l, block *x, choice set) {
  option o = {.in = (uint8_t)fate_of(set, x->border), .out = (uint8_t)fate_of(set, x->end)};
  for (int i = 0; i < x->n; i++) {
    const rgi_fate f = fate_of(set, i);
    if (f & RGI_AGAIN) o.ms += l->m->ms[x->of[i]];
    if (f & RGI_AWAY) o.moved += moved_of(l, x->of[i]);
    if (f == RGI_KEPT) o.saved += l->p->bytes[x->of[i]];
  }
  for (int i = 0; i < x->nlack; i++) {
    const lack *y = &x->lack[i];
    if (set.again & y->readers && !(fate_of(set, y->by) & RGI_AGAIN)) o.saved += y->bytes;
  }
  needs_of(l, x, set, &o);
  if (o.out == RGI_AGAIN) spill_of(x, set, &o);
  return o;
}

static int compare(const void *p, const void *q) {
  const option *a = p, *b = q;
  const double x[] = {a->ms, a->saved, a->moved, a->after, a->before, a->spill, a->pulls},
               y[] = {b->ms, b->saved, b->moved, b->after, b->before, b->spill, b->pulls};
  if (a->in != b->in) return a->in - b->in;
  if (a->out != b->out) return a->out - b->out;
  for (int i = 0; i < RGI_COUNT(x); i++)
    if (x[i] != y[i]) return x[i] < y[i] ? -1 : 1;
  return 0;
}

static bool no_worse(const option *a, const option *b) {
  return a->ms <= b->ms && a->saved <= b->saved && a->moved <= b->moved && a->after <= b->after &&
         a->before <= b->before && a->spill <= b->spill && a->pulls <= b->pulls;
}

/* The next choice of a block, as numbers are counted; false: that was the last. */
static bool next_choice(const rgi_layers *l, const block *x, choice *set) {
  const int bits = x->n + (x->border >= 0);
  for (int i = 0; i < bits; i++) {
    const uint32_t bit = 1u << i;
    set->again ^= bit;
    if (set->again & bit) return true;
    if (!(moved_of(l, x->of[i]) > 0)) continue;
    set->away ^= bit;
    if (set->away & bit) return true;
  }
  return false;
}

/* All choices but those that another one is no worse than. */
static rg_status list_options(const rgi_layers *l, block *x, rg_error *e) {
  choice set = {0};
  size_t most = 1, n = 0, kept = 0, from = 0;
  for (int i = 0; i < x->n + (x->border >= 0); i++)
    most *= moved_of(l, x->of[i]) > 0 ? RGI_FATES : 2;
  option *all = rgi_malloc(l->m->g->ctx, sizeof *all * most);
  if (!all) return rgi_nomem(e);
  do {
    all[n++] = option_of(l, x, set);
  } while (next_choice(l, x, &set));
  qsort(all, n, sizeof *all, compare);
  for (size_t i = 0; i < n; i++) {
    if (i && (all[i].in != all[kept - 1].in || all[i].out != all[kept - 1].out)) from = kept;
    bool worse = false;
    for (size_t k = from; k < kept && !worse; k++) worse = no_worse(&all[k], &all[i]);
    if (!worse) all[kept++] = all[i];
  }
  x->noption = (int)kept;
  x->option = rgi_alloc_n(l->a, kept + 1, sizeof *all);
  if (x->option) memcpy(x->option, all, kept * sizeof *all);
  rgi_free(l->m->g->ctx, all);
  return x->option ? RG_OK : rgi_nomem(e);
}

static rg_status fill(rgi_layers *l, rg_error *e) {
  for (int i = 0; i < l->nblock; i++) {
    block *x = &l->block[i];
    RGI_TRY(describe(l, x, e));
    RGI_TRY(sign(l, x, e));
    for (int k = 0; k < i && !x->option; k++) {
      const block *y = &l->block[k];
      if (x->nsignature != y->nsignature ||
          memcmp(x->signature, y->signature, x->nsignature * sizeof(double)) != 0)
        continue;
      x->option = y->option;
      x->noption = y->noption;
    }
    if (!x->option) RGI_TRY(list_options(l, x, e));
  }
  return RG_OK;
}

rg_status rgi_layers_open(const rgi_parts *p, int width, rgi_layers **out, rg_error *e) {
  rgi_arena *a = p->c->m->arena;
  const rgi_graph *g = p->c->m->g;
  const size_t n = (size_t)p->c->m->ncandidate + 1;
  rgi_layers *l = *out = rgi_alloc(a, sizeof *l);
  if (!l) return rgi_nomem(e);
  *l = (rgi_layers){.p = p, .m = p->c->m, .a = a};
  l->block = rgi_alloc_n(a, n, sizeof *l->block);
  l->block_of = rgi_alloc_n(a, n, sizeof *l->block_of);
  l->row_of = rgi_alloc_n(a, (size_t)g->nnode + 1, sizeof *l->row_of);
  l->alive = rgi_alloc_n(a, (size_t)p->nt + 1, sizeof *l->alive);
  if (!l->block || !l->block_of || !l->row_of || !l->alive) return rgi_nomem(e);
  for (size_t i = 0; i < n; i++) l->block_of[i] = -1;
  for (int32_t k = 0, row = 0; k < g->nnode; k++) l->row_of[k] = rgi_takes_row(g, k) ? row++ : -1;
  if (p->c->nfree == 0) return RG_OK;
  l->price = p->c->moved ? p->c->moved_ms / 4 : 0;
  cut(l, width);
  return fill(l, e);
}

/* ---- the best of all blocks ---- */

typedef struct way {
  double cost, saved, moved;
} way;

/* By the fate of the last block's end; again[i]: it spills i steps or more. */
typedef struct table {
  way plain[RGI_FATES], again[GRID + 1];
} table;

typedef struct prices {
  double saved, moved; /* of a byte */
} prices;

static void take(way *x, way from, const option *o, prices p) {
  const double cost = from.cost + o->ms + p.saved * o->saved + p.moved * o->moved;
  if (cost < x->cost) *x = (way){cost, from.saved + o->saved, from.moved + o->moved};
}

static void add(way *x, way y) {
  *x = (way){x->cost + y.cost, x->saved + y.saved, x->moved + y.moved};
}

/* The cheapest that small values come to. */
static way small_ones(const rgi_layers *l, const block *x, prices p) {
  way sum = {0, 0, 0};
  for (int i = 0; i < x->nsmall; i++) {
    const int c = x->small[i];
    const double bytes = l->p->bytes[c], moved = moved_of(l, c);
    const option fates[] = {{.saved = bytes}, {.ms = l->m->ms[c]}, {.moved = moved}};
    way best = {INFINITY, 0, 0};
    for (int f = 0; f < (moved > 0 ? RGI_COUNT(fates) : RGI_AWAY); f++)
      take(&best, (way){0, 0, 0}, &fates[f], p);
    add(&sum, best);
  }
  return sum;
}

static int steps_of(double bytes, double step) {
  return bytes < step * GRID ? (int)(bytes / step) : GRID;
}

static table pass(const block *x, const table *t, double room, prices price) {
  const double step = room / GRID;
  table next;
  way upto[GRID + 1]; /* the best that spills no more */
  for (int f = 0; f < RGI_FATES; f++) next.plain[f].cost = INFINITY;
  for (int i = 0; i <= GRID; i++) {
    next.again[i].cost = INFINITY;
    upto[i] = t->again[i];
    if (i > 0 && upto[i - 1].cost <= upto[i].cost) upto[i] = upto[i - 1];
  }
  for (int i = 0; i < x->noption; i++) {
    const option *o = &x->option[i];
    if (o->before > room || o->after > room) continue;
    const int spill = steps_of(o->spill, step), most = steps_of(room - o->after, step);
    way *to = o->out == RGI_AGAIN ? &next.again[spill] : &next.plain[o->out];
    if (o->in != RGI_AGAIN || !o->pulls) {
      take(to, o->in == RGI_AGAIN ? upto[most] : t->plain[o->in], o, price);
      continue;
    }
    for (int k = 0; k <= most; k++)
      if (k == 0 || t->again[k].cost < upto[k - 1].cost)
        take(&next.again[spill + k < GRID ? spill + k : GRID], t->again[k], o, price);
  }
  return next;
}

static way cheapest(const rgi_layers *l, double room, prices price) {
  table t;
  way small = {0, 0, 0};
  for (int f = 0; f < RGI_FATES; f++) t.plain[f].cost = INFINITY;
  for (int i = 0; i <= GRID; i++) t.again[i].cost = INFINITY;
  t.plain[RGI_KEPT] = small;
  for (int i = 0; i < l->nblock; i++) {
    t = pass(&l->block[i], &t, room, price);
    add(&small, small_ones(l, &l->block[i], price));
  }
  add(&small, t.plain[RGI_KEPT]);
  return small;
}

/* The Lagrangian is the least of lines, one for each way through; where the best known one of those
 * that save too much meets the best of the others, a better price is. *moved: at the best. */
static double at_price(const rgi_layers *l, double room, double cap, double of_moved, double most,
                       double *moved) {
  prices price = {0, of_moved};
  const double paid = of_moved > 0 ? of_moved * l->p->c->movable : 0;
  way much = cheapest(l, room, price);
  double much_ms = much.cost, best = much_ms - paid;
  *moved = much.moved;
  if (much.saved <= cap) return best;
  price.saved = l->m->all_ms + 1; /* a byte: no time is worth one */
  way little = cheapest(l, room, price);
  if (!(little.saved <= cap)) return INFINITY;
  double little_ms = little.cost - price.saved * little.saved;
  for (int i = 0; i < PRICES && best < most; i++) {
    price.saved = (little_ms - much_ms) / (much.saved - little.saved);
    const way x = cheapest(l, room, price);
    const double ms = x.cost - price.saved * x.saved, now = x.cost - price.saved * cap - paid;
    const double meet = much_ms + price.saved * (much.saved - cap) - paid;
    if (now > best) best = now;
    if (now >= meet - 1e-9 * fabs(meet)) break;
    if (x.saved > cap)
      much = x, much_ms = ms;
    else
      little = x, little_ms = ms;
  }
  /* the two that meet, by such parts that they save just that */
  const double part = (cap - little.saved) / (much.saved - little.saved);
  *moved = part * much.moved + (1 - part) * little.moved;
  return best;
}

double rgi_layers_ms(rgi_layers *l, double room, double s1, double most) {
  const double cap = s1 - l->p->fixed;
  double moved;
  room += 1; /* what sums of doubles may be off by */
  if (!l->p->c->moved) return at_price(l, room, cap, 0, most, &moved);
  /* As a function of the price of moved bytes the least is a hill of lines: from where it was
   * highest last, uphill until the top lies between two prices, then to where their lines meet. */
  const double limit = l->p->c->moved_ms, movable = l->p->c->movable;
  prices low = {-INFINITY, 0}, high = {-INFINITY, 0}; /* saved: slopes; */
  double low_ms = INFINITY, high_ms = INFINITY, best = -INFINITY, price = l->price;
  for (int i = 0; i < MOVED_PRICES && best < most; i++) {
    const double now = at_price(l, room, cap, price, most, &moved), slope = moved - movable;
    if (now > best) best = now, l->price = price;
    if (slope > 0)
      low = (prices){slope, price}, low_ms = now;
    else
      high = (prices){slope, price}, high_ms = now;
    if (slope == 0 || (price >= limit && slope > 0) || (price <= 0 && slope < 0)) break;
    if (high_ms == INFINITY) {
      price = price > 0 ? fmin(1.5 * price, limit) : limit / 64;
    } else if (low_ms == INFINITY) {
      price = price > limit / 64 ? price / 1.5 : 0;
    } else {
      price = (low_ms - high_ms + high.saved * high.moved - low.saved * low.moved) /
              (high.saved - low.saved);
      if (low_ms + low.saved * (price - low.moved) <= best + 1e-4 * fabs(best)) break;
    }
  }
  return best;
}
