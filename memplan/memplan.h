/* memplan/memplan.h: gives every tensor its bytes.

   Takes a bound graph in execution order, returns a copy whose owners carry (region, address), plus
   a report. Saved memory holds what forward writes and backward reads; it all lives at once at the
   turn, so it is laid end to end. Scratch of forward and of backward are packed apart and share one
   block (its size is the larger). A node's workspace is a scratch block that lives during that node
   only. Every block starts on a multiple of RGI_ALIGN; a region ends with its last block's last
   byte.
 */
#ifndef RGI_MEMPLAN_H
#define RGI_MEMPLAN_H

#include "../graph/ir.h"

#define RGI_ALIGN 256
static inline int64_t rgi_aligned(int64_t bytes) {
  return (bytes + RGI_ALIGN - 1) / RGI_ALIGN * RGI_ALIGN;
}

typedef struct rgi_memory_options {
  bool no_reuse;   /* every block gets bytes of its own */
  bool no_inplace; /* no output takes a dying input's bytes */
  /* For the exact search, both directions together; 0: so much work, the same on every machine */
  double seconds;
  int part;          /* of that work, the n-th; 0: all */
  int64_t *taken;    /* where what was done of it is added, in ns; or NULL */
  int threads;       /* for workspaces: rg_call.threads */
  const rg_gpu *gpu; /* likewise: rg_call.gpu */
  int64_t comm;      /* bytes beside saved and scratch, which count in peaks: the collectives' */
  int64_t reserved;  /* bytes at the start of saved that are not the graph's */
  int64_t capacity;  /* a peak that will do, 0: the smaller, the better */
  bool bound_only;   /* choices are judged by the packer's lower bound */
  /* nodes that do not wait for each other may run at once: no reuse between them */
  bool lanes;
  bool alone; /* whoever looks for a choice starts no thread */
} rgi_memory_options;

/* Owners that share bytes by in-place reuse form one block: `tensor` is the first, `next` chains
 * blocks[]. */
typedef struct rgi_block {
  int32_t tensor;      /* owner, or -1: the workspace of `first` */
  int32_t first, last; /* nodes: alive from the first writer to the last reader, both included */
  rgi_region region;
  int64_t size, address;
  int32_t shares; /* index of the block whose bytes this one took over, or -1 */
} rgi_block;

typedef struct rgi_memory {
  int64_t saved, scratch, forward_scratch, backward_scratch;
  int64_t host;     /* what waits there for the backward, end to end */
  int64_t reserved; /* of saved, at its start */
  /* most scratch bytes alive at once: no packing does better */
  int64_t forward_bound, backward_bound;
  bool forward_optimal, backward_optimal;
  int64_t explored; /* search nodes */
  double seconds;
  int64_t no_reuse;     /* scratch bytes if every block had its own */
  int64_t inplace_gain; /* bytes of blocks that in-place reuse spared */
  rgi_block *block;
  int32_t nblock;
  int64_t *workspace; /* per node: address of its workspace in scratch, or -1 */
  int64_t *workspace_size;
} rgi_memory;

/* *mem lives in (*out)->arena. Looks for the least peak; where that search ends above a capacity,
 * once more for anything within it. */
rg_status rgi_memplan(const rgi_graph *g, const rgi_memory_options *o, rgi_graph **out,
                      rgi_memory **mem, rg_error *e);
/* Peak alone, for the recompute chooser: saved, and both scratch sizes as rgi_memplan would find
 * them (with a capacity: as the first packing within it has them), or (bound_only) their lower
 * bounds, which is fast. */
rg_status rgi_memory_peak(const rgi_graph *g, const rgi_memory_options *o, bool bound_only,
                          int64_t *saved, int64_t *forward, int64_t *backward, rg_error *e);
/* Bytes of every node's workspace, into size[nnode]. */
rg_status rgi_memory_workspaces(const rgi_graph *g, const rgi_memory_options *o, int64_t *size,
                                rg_error *e);
/* May node k's first output take over its first input's bytes, if that dies there? Element by
 * element the op then reads and writes the same place, so both sides must be laid out alike. */
bool rgi_memory_alike(const rgi_graph *g, int32_t k);
/* The independent checker: shares nothing with the planner, recomputes lifetimes from the graph. */
rg_status rgi_memory_check(const rgi_graph *g, const rgi_memory *m, rg_error *e);

/* timeline */
void rgi_memory_text(const rgi_graph *g, const rgi_memory *m, int columns, rgi_buf *out);
void rgi_memory_svg(const rgi_graph *g, const rgi_memory *m, rgi_buf *out);

#endif
