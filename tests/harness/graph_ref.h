/* tests/harness/graph_ref.h: a whole graph in fp64: forward with the oracle's ops, backward with a
   tape of its own.

   Takes an elaborated forward graph (before any pass) for its shapes, wiring and attributes, and
   nothing else from the library: no strides, no offsets, no pass. Every tensor, views included, is
   a dense array of double of its own. Gradients are summed in double. Rows past the last live token
   of an input may hold anything.
 */
#ifndef GRAPH_REF_H
#define GRAPH_REF_H

#include "../../graph/ir.h"
#include "../ref/ref.h"
#include "optest.h"

typedef struct gref gref;

/* Borrows both until ot_end. `rounded`: every result of a node is rounded to its storage type. */
gref *gref_new(ot *t, const rgi_graph *forward, bool rounded);

/* Contents of a graph input, or of a top-k result that is to be taken as given (copied). */
void gref_set(gref *r, int tensor, const double *x);
void gref_set_ints(gref *r, int tensor, const int32_t *x);
/* NULL, or the node the oracle does not know. */
const char *gref_forward(gref *r);
const double *gref_value(const gref *r, int tensor);
const int32_t *gref_ints(const gref *r, int tensor);
/* Rows of axis 0 that are live, by the lengths the graph ties to it. */
int64_t gref_live(const gref *r, int tensor);
/* Most arithmetic nodes on any path from an input to this tensor. */
int gref_depth(const gref *r, int tensor);
/* Share of given top-k indices that the oracle would have chosen too; 1 if there are none. */
double gref_topk_overlap(const gref *r);
/* What the attributes of a node topk say. */
void gref_topk_attrs(const rgi_node *node, ref_topk *a);

/* Adds an incoming gradient; its dead rows are not read. */
void gref_seed(gref *r, int tensor, const double *d);
void gref_backward(gref *r);
/* NULL: no gradient reaches it. */
const double *gref_gradient(const gref *r, int tensor);

#endif
