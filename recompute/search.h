/* recompute/search.h: what the parts of recompute/ share: the rewrite for a given choice, and a
   cheap model of choices.

   A choice is one bool per spec node (graph origin): compute it again in backward. The model looks
   at the graph once and then bounds the memory of any choice from below in microseconds; whether a
   choice fits is decided by memplan alone.
 */
#ifndef RGI_RECOMPUTE_SEARCH_H
#define RGI_RECOMPUTE_SEARCH_H

#include "../graph/bits.h"
#include "recompute.h"

/* The graph with the chosen nodes cloned into backward. *extra_ms: model time of the clones. Not
 * verified. */
rg_status rgi_rewrite(const rgi_graph *g, const bool *chosen, const rgi_profile *profile,
                      rgi_graph **out, double *extra_ms, rg_error *e);
/* May a policy name this origin at all? */
bool rgi_recomputable(const rgi_origin *o);
/* May this node be computed again? Not one that makes lengths: few numbers, and all who count by
 * them must find the same tensor (I8). */
bool rgi_repeatable(const rgi_graph *g, const rgi_node *node);
/* Model time of one node. */
rg_status rgi_node_ms(const rgi_graph *g, int n, const rgi_profile *profile, rgi_arena *a,
                      double *ms, rg_error *e);

enum { RGI_EXACT_LIMIT = 20 };

/* Sets of candidates (bits.h). All functions take sets of rgi_model.words words. */

/* A forward owner that backward may need. */
typedef struct rgi_value {
  int64_t bytes;
  int candidate;     /* that makes it, or -1: not to be recomputed */
  bool direct;       /* a backward node reads it */
  uint64_t *readers; /* candidates that read it when recomputed */
} rgi_value;

/* One backward node: what it needs at once. */
typedef struct rgi_moment {
  int64_t base; /* bytes of gradients alive, whatever the choice */
  int *reads;   /* values */
  int nreads;
} rgi_moment;

typedef struct rgi_model {
  rgi_arena *arena;
  const rgi_graph *g;
  const rgi_profile *profile;
  rgi_memory_options mem;
  int ncandidate, *origin; /* candidate → origin */
  double *ms;              /* candidate → model time of all its nodes */
  /* candidate → saved bytes of its outputs if it alone is kept among the chosen */
  int64_t *kept_bytes;
  rgi_value *value;
  int nvalue;
  rgi_moment *moment;
  int nmoment;
  int words;        /* in a set */
  uint64_t *feeds;  /* [ncandidate][words]: candidates that a candidate's clone reads */
  uint64_t *wanted; /* candidates whose outputs a backward node reads */
} rgi_model;

rg_status rgi_model_create(const rgi_graph *g, const rgi_profile *profile,
                           const rgi_memory_options *mem, rgi_model **out, rg_error *e);
void rgi_model_destroy(rgi_model *m);
/* An empty set; NULL on NOMEM. */
uint64_t *rgi_model_set(const rgi_model *m);
/* Keeps of `set` the candidates that something would read: the rest changes
 * nothing. True if none was dropped. */
bool rgi_model_needed(const rgi_model *m, const uint64_t *set, uint64_t *needed);
/* All candidates, most memory freed per millisecond first. */
void rgi_model_order(const rgi_model *m, int *order);
/* Where packing after every added candidate would take too long: one in so many, some 64 in all. */
static inline int rgi_model_stride(const rgi_model *m) {
  return m->ncandidate / 64 + 1;
}
int64_t rgi_model_saved(const rgi_model *m, const uint64_t *set);
/* No more than the peak that memplan finds for it. */
int64_t rgi_model_peak_bound(const rgi_model *m, const uint64_t *set);
/* Memplan's own word: saved bytes and peak. The packing is left out (peak is its lower
 * bound) if that exceeds `limit`. */
rg_status rgi_model_measure(const rgi_model *m, const uint64_t *set, int64_t limit, int64_t *saved,
                            int64_t *peak, double *ms, rg_error *e);

/* Visits the subsets of cost[0 … n), n <= RGI_EXACT_LIMIT, in order of their sum, until it returns
 * false. */
typedef struct rgi_subsets rgi_subsets;
/* NULL on NOMEM */
rgi_subsets *rgi_subsets_create(const rg_context *ctx, const double *cost, int n);
void rgi_subsets_destroy(rgi_subsets *s);
/* false at the end; *failed on NOMEM */
bool rgi_subsets_next(rgi_subsets *s, uint64_t *mask, double *cost, bool *failed);

#endif
