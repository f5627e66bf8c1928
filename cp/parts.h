/* cp/parts.h: the forms in which a rank has a tensor of the whole graph, each made when a node
 * first asks for it.
 *
 *     own      this rank's rows: slot 0's, then slot 1's   [2L, …]  inputs, outputs, row-wise nodes
 *     slot s   those of one slot                           [L, …]   attention, what follows it
 *     all      the rows of all ranks                       [T, …]   keys
 *     halo s   a slot's, and rows before or after them              blocks, windows
 *
 * A tensor without tokens has one form, itself. `own` keeps the tensor's id; the others are new
 * tensors. Views are looked at in the form that is asked for, so that heads cut by a split are cut
 * in every form alike.
 */
#ifndef RGI_CP_PARTS_H
#define RGI_CP_PARTS_H

#include "../graph/policy.h"

enum { RGI_SLOTS = 2 };

typedef enum rgi_axis { RGI_WHOLE, RGI_TOKENS, RGI_BLOCKS } rgi_axis; /* what axis 0 counts */

typedef struct rgi_form {
  rgi_axis axis;
  bool made;                    /* own */
  bool slotted;                 /* its node runs once a slot */
  int32_t self;                 /* a tensor without tokens: what stands for it */
  int32_t pair;                 /* … where its gradient is two floats for each number, or -1 */
  int32_t slot[RGI_SLOTS], all; /* or -1 */
} rgi_form;

/* Something made once for each slot, and what it was asked for by: sequences for blocks (left,
 * right, stride), a tensor's halo (left, right), keys' sequences in a halo (left, tile). */
typedef struct rgi_asked {
  int32_t tensor;
  int64_t a, b, c;
  int32_t slot[RGI_SLOTS], pos[RGI_SLOTS];
} rgi_asked;

typedef struct rgi_window { /* keys that a node reads out of a halo; left -1: all keys */
  int64_t left, tile;
} rgi_window;

typedef struct rgi_parts {
  const rgi_graph *from;
  rgi_graph *to; /* has the tensors of `from`, ids unchanged */
  const rgi_cp_policy *policy;
  const rg_gpu *gpu;                                        /* NULL: for the CPU */
  int64_t rows, chunk;                                      /* T, L */
  int32_t cu;                                               /* the batch's sequence starts */
  int32_t order, starts[RGI_SLOTS + 1], pos[RGI_SLOTS + 1]; /* tables: slot 0, slot 1, both */
  rgi_form *form;                                           /* per tensor of from */
  rgi_window *window;                                       /* per node of from */
  rgi_asked *blocks, *halo, *keys;
  int nblocks, nhalo, nkeys;
  int at; /* the node of `from` that asks */
} rgi_parts;

/* The tables, and sums for what all ranks have. form[] is there. */
rg_status rgi_parts_begin(rgi_parts *p, rg_error *e);

rg_status rgi_part_own(rgi_parts *p, int32_t t, int32_t *out, rg_error *e);
rg_status rgi_part_slot(rgi_parts *p, int32_t t, int slot, int32_t *out, rg_error *e);
/* A weight for a port with RG_PORT_PAIR: as a pair, if it is an input whose gradient is wanted, or
 * a view of one. */
rg_status rgi_part_pair(rgi_parts *p, int32_t t, int32_t *out, rg_error *e);
rg_status rgi_part_all(rgi_parts *p, int32_t t, int32_t *out, rg_error *e);
rg_status rgi_part_halo(rgi_parts *p, int32_t t, int64_t left, int64_t right, int slot,
                        int32_t *out, rg_error *e);
/* Sequence starts of a slot's keys in a halo, and the positions of its queries among them. */
rg_status rgi_part_keys(rgi_parts *p, rgi_window w, int slot, int32_t *starts, int32_t *pos,
                        rg_error *e);
/* What the blocks of a block-wise node are made of, besides the rows in which they start. */
typedef struct rgi_reach {
  int64_t left, right, stride;
} rgi_reach;
rgi_reach rgi_part_reach(const rgi_node *n);
/* Sequence starts for the blocks of a slot. */
rg_status rgi_part_blocks(rgi_parts *p, rgi_reach r, int slot, int32_t *out, rg_error *e);

/* A tensor that a node is about to make; -1 on NOMEM. */
int32_t rgi_part_tensor(rgi_parts *p, const char *name, const char *suffix, int32_t seqlens);
/* Appends a node of `op` for node p->at; counts per port, tensors flat. suffix NULL: by its own
 * name. origin -1: none. */
rg_status rgi_part_node(rgi_parts *p, const char *name, const rg_op *op, const rg_value *attr,
                        int origin, const int *nin, const int32_t *in, const int *nout,
                        const int32_t *out, rg_error *e);
/* Rows [first, first + n) of t. */
rg_status rgi_part_rows(rgi_parts *p, int32_t t, int64_t first, int64_t n, int32_t seqlens,
                        const char *suffix, int32_t *out, rg_error *e);

#endif
