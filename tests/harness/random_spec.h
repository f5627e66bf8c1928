/* tests/harness/random_spec.h: random specs over linear, silu, mul and add, with weights and two
 * outputs, all with gradients: the shapes of graph that planners get wrong (values read again
 * late, twice by one node, by nobody). */
#ifndef RGI_RANDOM_SPEC_H
#define RGI_RANDOM_SPEC_H

#include <regraph/regraph.h>

/* Uniform in 0 … n - 1. */
int rgi_draw(uint64_t *state, int n);
/* At least 2 nodes; the free dimension is T. A value that neither output needs is no candidate: of
 * 100 nodes some 12 are, of 1,600 some 55. */
rg_status rgi_random_spec(rg_context *ctx, uint64_t *state, int nodes, rg_spec **out, rg_error *e);
/* Each node reads of the `reach` newest values: with a short reach most nodes are needed. */
rg_status rgi_random_spec_near(rg_context *ctx, uint64_t *state, int nodes, int reach,
                               rg_spec **out, rg_error *e);

#endif
