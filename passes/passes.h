/* passes/passes.h: the rewrites, each a pure function from a graph to a new, verified one. Fusing
 * has more to say: fuse.h. */
#ifndef RGI_PASSES_H
#define RGI_PASSES_H

#include "../graph/ir.h"

/* ---- split (split.c): cut into groups of `heads` KV heads by views; 0 copies ---- */
rg_status rgi_split_heads(const rgi_graph *g, int heads, rgi_graph **out, rg_error *e);

/* ---- autodiff (autodiff.c): append the backward nodes that the requested gradients need ---- */
rg_status rgi_autodiff(const rgi_graph *g, rgi_graph **out, rg_error *e);

#endif
