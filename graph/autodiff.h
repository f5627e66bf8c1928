/* graph/autodiff.h: what a structural op's backward rule may do (rgi_rules.backward).

   Ops that name a backward op need none of this: autodiff matches ports by name (see regraph/op.h).
   A rule runs once per node that a gradient reaches, after the gradients of all its outputs are
   complete.
 */
#ifndef RGI_AUTODIFF_H
#define RGI_AUTODIFF_H

#include "ir.h"

typedef struct rgi_backward rgi_backward;

/* The graph being appended to. Pointers into its arrays do not survive additions. */
rgi_graph *rgi_bwd_graph(rgi_backward *b);
/* Gradient of the node's i-th output (flat), or -1: none arrives. */
int rgi_bwd_gradient(rgi_backward *b, int node, int i);
/* Does the node's i-th input (flat) need a gradient? */
bool rgi_bwd_wants(const rgi_backward *b, int node, int i);
/* Hands tensor `gradient` (any float dtype) to the node's i-th input: for all of it (axis -1), or
 * for the slice that starts at `start` on `axis`. */
rg_status rgi_bwd_give(rgi_backward *b, int node, int i, int gradient, int axis, int64_t start,
                       rg_error *e);
/* The same, for all of it, where nobody else has `gradient` or will have it: a sum may go on in its
 * bytes. */
rg_status rgi_bwd_hand_over(rgi_backward *b, int node, int i, int gradient, rg_error *e);
/* Appends a backward node of a one-input, one-output op whose name is
 * tensor's name + suffix; returns the output. */
rg_status rgi_bwd_unary(rgi_backward *b, const char *op, const rg_value *attr, int input,
                        const char *suffix, int *output, rg_error *e);
/* Appends a backward node of any op: tensors on its ports (in, flat; per port count[p], -1 for an
 * absent element of a list), `nout` outputs, all on port 0, which are created. */
rg_status rgi_bwd_node(rgi_backward *b, int node, const char *op, const rg_value *attr,
                       const int *in, const int *count, const char *suffix, int nout, int *out,
                       rg_error *e);
/* The whole rule of ops that lay their first port's list end to end along
 * attribute 0: each part gets its slice. */
rg_status rgi_bwd_cut(rgi_backward *b, int node, rg_error *e);
/* A dense copy if `tensor` is not dense; else itself. */
rg_status rgi_bwd_dense(rgi_backward *b, int tensor, int *out, rg_error *e);
/* A copy whose dead rows are zero if `tensor` is the caller's, where they may hold anything; else
 * itself. Needed before axis 0 is moved or merged, behind which nobody could tell dead rows. */
rg_status rgi_bwd_live(rgi_backward *b, int tensor, int *out, rg_error *e);
/* A copy whose rows past the last token of `lengths` are zero. */
rg_status rgi_bwd_masked(rgi_backward *b, int tensor, int lengths, int *out, rg_error *e);

#endif
