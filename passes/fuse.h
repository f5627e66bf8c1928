/* passes/fuse.h: takes gradients of lists apart, so that each is made when it is needed and what
   its reader would compute from it first is handed on; and joins nodes that one kernel serves.

     before   x.bwd -> d.a, d.b, d.c, d.w        a.bwd(d.a, a)      b.bwd(d.b, b)      c.bwd(d.c, c)
     after    x.bwd.0 -> d.a, delta.a            a.bwd(d.a, delta.a)
              x.bwd.1 -> d.b, delta.b            b.bwd(d.b, delta.b)      …      x.bwd.rest -> d.w

   One of d.a, d.b, d.c is alive at a time, and a.bwd no longer reads a: the sum over a · d.a that
   it begins with comes along. What can be taken apart and who takes such a sum is said by the ops
   (rgi_fusing, "delta.x"). No bit changes: every number is computed as before, in the same order.

   Then casts of sums: where an op adds the last term of a gradient in place, and a cast alone reads
   the sum, the op rounds what it has summed instead (rgi_fusing, "sum.x"), if the gradient is the
   caller's memory: elsewhere both would be alive beside the op's workspace.

     before   a.bwd(acc.q = s) -> s', cast(s') -> d.q          after   a.bwd(sum.q = s) -> d.q

   And puts two nodes together where an op says that one kernel does the work of both on the GPU
   there is (rgi_fusing.joined): the first one's readers find its outputs where they were.

   Stands before the recompute choice, which so sees fused graphs only: clones go directly before
   the first part that reads them. A node is left whole where less than its own traffic would be
   spared.
 */
#ifndef RGI_FUSE_H
#define RGI_FUSE_H

#include "../graph/ir.h"

/* What became of nodes that could be taken apart: of all groups of one spec node that fared
 * alike. */
typedef struct rgi_fusion {
  const char *name; /* of the spec node */
  int32_t origin;
  int nodes, parts, deltas; /* parts and deltas of each node */
  const char *why;          /* not fused: one clause; else NULL */
  double before, after;     /* bytes that these nodes and the readers of their gradients move */
} rgi_fusion;

typedef struct rgi_fusions {
  rgi_arena *arena; /* owns this struct and all it points to */
  rgi_fusion *at;
  int count;
  int fused;                      /* nodes taken apart, pairs joined */
  int split;                      /* of those, nodes that share out a row's keys */
  int casts;                      /* taken over */
  double cast_before, cast_after; /* bytes that those and the nodes that took them over move */
  /* of the plan, most bytes alive at once; filled in by the plan */
  int64_t peak_before, peak_after;
} rgi_fusions;

/* Borrows a differentiated graph; gpu NULL: for the CPU. `lanes`: nodes may run side by side. A
 * part then waits for the reader of the one before, else all parts would be made at once.
 * `split_kv`: nodes that share out a row's keys are wanted where there are such (rg_plan_options):
 * these have other bits. *report has its own arena. */
rg_status rgi_fuse(const rgi_graph *g, const rg_gpu *gpu, bool lanes, bool split_kv,
                   rgi_graph **out, rgi_fusions **report, rg_error *e);
void rgi_fusions_destroy(rgi_fusions *f); /* NULL is fine */

#endif
