/* recompute/bound.h: what the two bounds from below are made of: bound.c's linear program for any
   graph, and layers.c's chain of blocks, which is tighter where layers stand upon layers.
 */
#ifndef RGI_RECOMPUTE_BOUND_H
#define RGI_RECOMPUTE_BOUND_H

#include "search.h"

/* A value that backward reads, made by candidate `by`. */
typedef struct rgi_direct {
  int by;
  int32_t tensor;
  double bytes;
  /* backward nodes between which it lives if recomputed; empty: last < first */
  int32_t first, last;
} rgi_direct;

/* Candidate `reader`, recomputed, reads a value that backward itself does not: it is saved unless
 * `by` is recomputed, too. */
typedef struct rgi_need {
  int reader, by; /* by -1: saved in any case */
  double bytes;
  int32_t tensor;
} rgi_need;

typedef struct rgi_parts {
  rgi_chooser *c;
  int32_t nt;   /* backward nodes that move bytes, copies left out */
  double *base; /* [nt]: scratch bytes alive there with everything kept */
  rgi_direct *value;
  int nvalue;
  rgi_need *need; /* those of one value next to each other */
  int nneed;
  double fixed;  /* saved whatever is chosen */
  int *by;       /* per tensor: its candidate; -1: none, -2: several, -3: it is an output */
  bool *is_free; /* per candidate */
  double *bytes; /* per candidate: of its values */
  double *alone; /* per candidate: scratch that it needs at least, recomputed */
} rgi_parts;

/* What becomes of a candidate's values, as bits: computed again, away. Both: what comes back is for
 * backward itself, the clone for clones. */
typedef enum rgi_fate { RGI_KEPT, RGI_AGAIN, RGI_AWAY, RGI_BOTH, RGI_FATES } rgi_fate;

/* Is node k one of these? */
static inline bool rgi_takes_row(const rgi_graph *g, int32_t k) {
  return g->node[k].backward && !(g->node[k].op->flags & RG_OP_VIEW) && !rgi_is_copy(g, k);
}
const rgi_parts *rgi_bound_parts(const rgi_bound *b);

/* ---- layers.c ---- */

enum { RGI_WIDEST_LAYER = 15 };
typedef struct rgi_layers rgi_layers;
/* Blocks of at most `width` candidates; in the model's arena. */
rg_status rgi_layers_open(const rgi_parts *p, int width, rgi_layers **out, rg_error *e);
/* A time that no choice beats which saves at most s1 bytes and needs at most `room` of scratch at
 * backward's own nodes; not the largest that it could find, where one of `most` is. INFINITY: there
 * is no such choice. */
double rgi_layers_ms(rgi_layers *l, double room, double s1, double most);

#endif
