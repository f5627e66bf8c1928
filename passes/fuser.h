/* passes/fuser.h: what fuse.c, fuse_apart.c and fuse_join.c have in common. */
#ifndef RGI_FUSER_H
#define RGI_FUSER_H

#include "../graph/order.h"
#include "fuse.h"

typedef struct rgi_fuser {
  const rgi_graph *g;
  rgi_graph *to;
  const rg_gpu *gpu;
  bool lanes, split_kv;
  bool again; /* nodes that are joint already are joined, nothing else */
  int joints;
  /* per node of `to`: the node of `g` that it goes before (rank among equals: age) */
  int32_t *before;
  bool *gone;      /* per node of g */
  rgi_order order; /* of g, with lanes */
  rgi_arena *scratch;
  rgi_fusions *report;
} rgi_fuser;

enum { RGI_FUSE_PORTS = 16, RGI_FUSE_ATTRS = 16 }; /* at most, of a node that is added */

const rgi_fusing *rgi_fusing_of(const rg_op *op); /* NULL: nothing may be done with it */
/* First node after n that reads t; *count: how often t is read, outputs of the graph included. */
int32_t rgi_fuse_readers(const rgi_graph *g, int32_t n, int32_t t, int *count);
/* Adds what node n of g moves to *sum. */
rg_status rgi_fuse_bytes(const rgi_fuser *f, const rgi_graph *g, int32_t n, double *sum,
                         rg_error *e);

/* The tensor on the port of this name, element k of a list, else -1. */
int32_t rgi_fuse_in(const rgi_node *n, const char *name, int k);
int32_t rgi_fuse_out(const rgi_node *n, const char *name, int k);

/* Appends a node of `op`, its ports filled from the arrays, to stand before node `place` of g,
 * with the place in the spec, group and rank of node `like`. Copies all it is given. */
rg_status rgi_fuse_add(rgi_fuser *f, int32_t like, const char *suffix, const rg_op *op,
                       const rg_value *attr, const int32_t *in, const int *nin, const int32_t *out,
                       const int *nout, int32_t place, int32_t after, rg_error *e);
/* Node n of `to` reads t on port `on`, and nothing on port `off` any more. */
rg_status rgi_fuse_move(rgi_fuser *f, int32_t n, int off, int on, int32_t t, rg_error *e);

/* Takes node n of g apart, if that spares more than it costs, and reports it. */
rg_status rgi_fuse_apart(rgi_fuser *f, int32_t n, const rgi_fusing *fusing, rg_error *e);
/* Puts node n of g together with those whose outputs it reads, if its op says so. */
rg_status rgi_fuse_join(rgi_fuser *f, int32_t n, const rgi_fusing *fusing, rg_error *e);

#endif
