/* cp/shard.h: the pass that shares a graph's tokens out among ranks. */
#ifndef RGI_CP_SHARD_H
#define RGI_CP_SHARD_H

#include "../graph/policy.h"

/* A forward graph with the inputs and outputs of one rank of policy->ranks, the same on all of
 * them: axis 0 of what has tokens is T/ranks, collectives bring what other ranks have. Borrows g.
 * *rows: T. RG_E_SHAPE, with a pointer, if the capacity does not divide as it must; RG_E_POLICY if
 * a node mixes rows and its op does not say how. */
rg_status rgi_cp_shard(const rgi_graph *g, const rgi_cp_policy *policy, const rg_gpu *gpu,
                       rgi_graph **out, int64_t *rows, rg_error *e);

#endif
