/* graph/ir.h: the intermediate representation that every pass borrows and returns.
 *
 * A graph is a list of tensors and a list of nodes in execution order, all in one arena. A pass
 * takes a const graph and returns a new one (usually rgi_graph_clone, then edits); nothing later
 * writes to something earlier.
 *
 * Bytes. A tensor with base == -1 owns its bytes; any other looks into its base's (base is always
 * an owner: chains are flattened). Three things make aliases:
 *   view      slice, split, reshape, transpose: the output looks into the input
 *   join      the inputs look into the output: parts that together cover it, each written by its
 *             own node
 *   in place  d.x on a bound acc.x (RG_PORT_GRAD): same bytes, the next version of the sum;
 *             an out-port that carries state (RG_PORT_STATE): the next version of what the in-port
 *             of its name reads (state.c)
 * Regions say who supplies an owner's bytes; (region, offset) is filled in by memplan.
 *
 * Invariants, checked by rgi_verify after every stage (numbers appear in its messages):
 *   I1  ids are in range; every single required port is bound; names are unique among tensors and
 *       among nodes
 *   I2  every tensor has exactly one producer, or is a graph input and has none
 *   I3  nodes stand in execution order: producers (and what a node waits for) before readers,
 *       forward nodes before backward nodes
 *   I4  shapes, dtypes follow from the op's ports and attributes; sizes stay within the limits
 *   I5  base is an owner; a view stays inside its base; join parts tile their output; acc and d
 *       agree
 *   I6  inputs that are no state are never written; an in-place sum has no reader between versions
 *   I7  every declared output and every requested gradient has a tensor of the declared type
 *   I8  rows: tensors tied by ROWS ports share one lengths tensor
 *   I9  "delta.x" stands in for "out.x" and comes from the node that wrote "grad.x"; "sum.x" stands
 *       in for "acc.x"
 *   I10 state is written through RG_PORT_STATE ports alone, as a whole, by forward nodes; a version
 *       has at most one next, and no reader behind the node that makes it; `next` of a declared
 *       state is its last version
 * After memplan (rgi_verify_memory, by its own checker): no two live owners overlap, all inside
 * their region.
 */
#ifndef RGI_IR_H
#define RGI_IR_H

#include "base.h"

/* ---- extents: integer polynomials over unbound names ---- */

/* c + Σ coef·atom. An atom is canonical text such as "T", "B*T" or
 * "((T+1)/16)". After binding, nterm == 0. */
typedef struct rgi_term {
  int64_t coef;
  const char *atom;
} rgi_term;
typedef struct rgi_dim {
  int64_t c;
  const rgi_term *term; /* sorted by atom */
  int32_t nterm;
} rgi_dim;

static inline rgi_dim rgi_dim_of(int64_t c) {
  return (rgi_dim){.c = c};
}
static inline bool rgi_dim_known(rgi_dim d) {
  return d.nterm == 0;
}
bool rgi_dim_equal(rgi_dim a, rgi_dim b);
/* op is one of + - * /; RG_E_OVERFLOW, RG_E_VALUE (division by zero or of/by what
 * cannot be divided), RG_E_NOMEM. */
rg_status rgi_dim_binary(rgi_arena *a, char op, rgi_dim x, rgi_dim y, rgi_dim *out, rg_error *e);
/* Parses an integer expression; `lookup` gives names their value (returns false if unknown). */
typedef bool (*rgi_dim_lookup)(void *user, const char *name, rgi_dim *out);
rg_status rgi_dim_parse(rgi_arena *a, const char *text, rgi_dim_lookup lookup, void *user,
                        rgi_dim *out, rg_error *e);
rgi_dim rgi_dim_symbol(rgi_arena *a, const char *name); /* nterm -1 on NOMEM */
/* "T/16" style text into buffer; returns buffer. */
const char *rgi_dim_text(rgi_dim d, char *buffer, size_t size);

/* ---- tensors and nodes ---- */

typedef enum rgi_region {
  RGI_NOWHERE,
  RGI_R_INPUT,
  RGI_R_OUTPUT,
  RGI_R_SAVED,
  RGI_R_SCRATCH,
  RGI_R_HOST
} rgi_region;
const char *rgi_region_name(rgi_region r);

#define RGI_MOST_ELEMENTS (INT64_C(1) << 40) /* of a tensor */

typedef struct rgi_tensor {
  const char *name;
  rg_dtype dtype;
  int32_t rank;
  rgi_dim dim[RG_MAX_RANK];
  int64_t stride[RG_MAX_RANK]; /* elements; valid once bound */
  int64_t offset;              /* elements from the start of base; valid once bound */
  int32_t base;                /* owner of the bytes, or -1: this one */
  int32_t producer;            /* node, or -1 for a graph input */
  int32_t seqlens;             /* lengths tensor of axis 0, or -1 */
  int32_t grad_of;             /* the tensor this is a gradient of, or -1 */
  rgi_region region;           /* of an owner; set by memplan (inputs and outputs earlier) */
  int64_t address;             /* byte offset in the region; set by memplan */
  bool host;                   /* an owner that waits for the backward in the host's memory */
  bool paired;                 /* axis 0 is two halves, values and their rests: RG_PORT_PAIR */
} rgi_tensor;

typedef enum rgi_kind { RGI_PRIMAL, RGI_GRADIENT, RGI_CLONE, RGI_GLUE } rgi_kind;

/* in and out are flat; port p owns [begin[p], begin[p+1]); -1 stands for an absent element of a
 * list. */
typedef struct rgi_node {
  const char *name;
  const rg_op *op;
  const rg_value *attr;
  int32_t *in, *out;
  const int32_t *in_begin, *out_begin;
  int32_t origin; /* index of the spec node it stems from */
  int32_t group;  /* head group, or -1 */
  int32_t rank;   /* place in the forward order before a head split: sums are ordered by it */
  /* a tensor whose node must be over first though this one does not read it, or -1 */
  int32_t after;
  bool backward; /* runs in the backward direction */
  rgi_kind kind;
} rgi_node;

static inline int rgi_nin(const rgi_node *n) {
  return n->in_begin[n->op->nin];
}
static inline int rgi_nout(const rgi_node *n) {
  return n->out_begin[n->op->nout];
}
/* Tensor on a single port, -1 if absent. */
static inline int rgi_in(const rgi_node *n, int port) {
  return n->in_begin[port + 1] > n->in_begin[port] ? n->in[n->in_begin[port]] : -1;
}
static inline int rgi_out(const rgi_node *n, int port) {
  return n->out_begin[port + 1] > n->out_begin[port] ? n->out[n->out_begin[port]] : -1;
}

typedef enum rgi_grad { RGI_GRAD_NONE, RGI_GRAD_PLAIN, RGI_GRAD_ACCUMULATE } rgi_grad;

/* A declared input or output. */
typedef struct rgi_io {
  const char *name;
  int32_t tensor;
  rgi_grad want; /* inputs */
  bool sharded;  /* axis 0 is this rank's share of the rows */
  bool partial;  /* an input of which each rank makes terms of the gradient, not summed */
  bool state;    /* an input whose bytes the graph writes: `next` is their last version */
  int32_t next;
  /* input: the tensor holding its gradient after autodiff; output: its incoming gradient; or -1 */
  int32_t grad;
} rgi_io;

/* A node of the spec, which policies name: what the clones and groups of a node have in common. */
typedef struct rgi_origin {
  const char *name;
  const rg_op *op;
  const char *pointer; /* "/nodes/3" */
} rgi_origin;

typedef struct rgi_graph {
  rgi_arena *arena; /* owns everything below */
  const rg_context *ctx;
  const char *name;
  bool bound; /* all extents known */
  rgi_tensor *tensor;
  int32_t ntensor, tensor_capacity;
  rgi_node *node;
  int32_t nnode, node_capacity;
  rgi_io *input, *output;
  int32_t ninput, noutput;
  rgi_origin *origin;
  int32_t norigin;
  int32_t groups; /* head groups, 1 if not split */
} rgi_graph;

/* ---- building ---- */

/* An empty graph with its own arena; destroy frees all of it. */
rg_status rgi_graph_create(const rg_context *ctx, const char *name, rgi_graph **out, rg_error *e);
void rgi_graph_destroy(rgi_graph *g);
/* A deep copy (ops and context are borrowed). */
rg_status rgi_graph_clone(const rgi_graph *g, rgi_graph **out, rg_error *e);

/* Appends a tensor (copy of *t, name duplicated); returns its id or -1 on NOMEM. */
int rgi_add_tensor(rgi_graph *g, const rgi_tensor *t);
/* `name` for a new tensor, or name~2, name~3 … where it is taken; NULL on NOMEM. */
const char *rgi_free_name(rgi_graph *g, const char *name);
/* Appends a node with room for the given counts per port (arrays of op->nin and op->nout), all -1;
 * attributes take their defaults unless `attr` is given (copied). Returns its index or -1 on NOMEM.
 * The node's outputs are created by rgi_infer_node. */
int rgi_add_node(rgi_graph *g, const char *name, const rg_op *op, const int *nin, const int *nout,
                 const rg_value *attr);
/* Port or attribute by name: its index, or -1. */
int rgi_in_port(const rg_op *op, const char *name);
int rgi_out_port(const rg_op *op, const char *name);
int rgi_attribute(const rg_op *op, const char *name);
/* Where a node stands for several (rgi_fusing.joined), "first.NAME" is what the first of them has
 * as NAME: the NAME of such a port, or NULL; and that port, or -1. */
const char *rgi_of_first(const char *port);
int rgi_first_in_port(const rg_op *op, const char *name);
int rgi_first_out_port(const rg_op *op, const char *name);
/* Do the node's blocks have a row each, so that tokens serve where its ports take blocks? */
bool rgi_blocks_are_rows(const rgi_node *n);

/* Applies the op's port tables, structural rule and check to node n: fills shape, dtype, stride,
 * base, offset of its outputs (tensor ids must be set; names too). pointer goes into error
 * messages. */
rg_status rgi_infer_node(rgi_graph *g, int n, const char *pointer, rg_error *e);
/* Dense row-major strides for a bound tensor. */
void rgi_dense_strides(rgi_tensor *t);
/* Tensor t gets the type and the shape of `like`, on axis 0 *rows unless that is NULL: dense, in
 * memory of its own. */
void rgi_tensor_like(rgi_graph *g, int t, const rgi_tensor *like, const rgi_dim *rows);
/* Elements and bytes of a bound tensor (dense). */
int64_t rgi_elements(const rgi_tensor *t);
int64_t rgi_bytes(const rgi_tensor *t);
/* The owner of t's bytes. */
static inline int rgi_owner(const rgi_graph *g, int t) {
  return g->tensor[t].base >= 0 ? g->tensor[t].base : t;
}
/* Does node n copy to or from the host's memory? */
static inline bool rgi_is_copy(const rgi_graph *g, int n) {
  const rgi_node *node = &g->node[n];
  if (rgi_nin(node) != 1 || rgi_nout(node) != 1 || node->in[0] < 0 || node->out[0] < 0)
    return false;
  return g->tensor[node->in[0]].host || g->tensor[node->out[0]].host;
}
/* Stable topological order by producers (order.c); RG_E_CYCLE names the nodes in it. Renumbers
 * nodes. */
rg_status rgi_sort_nodes(rgi_graph *g, rg_error *e);
/* Drops tensors that nothing mentions any more; renumbers tensors. */
rg_status rgi_compact(rgi_graph *g, rg_error *e);
/* Drops forward nodes that no declared output needs, and optional outputs that neither a node nor a
 * backward still to be appended reads. */
rg_status rgi_prune(rgi_graph *g, rg_error *e);
/* Checks I1 … I10. `stage` goes into the message. */
rg_status rgi_verify(const rgi_graph *g, const char *stage, rg_error *e);

/* An rg_call for node n, with shapes and no data; arrays live in `a`. RG_DIM_FREE for unbound
 * extents. */
rg_status rgi_node_call(const rgi_graph *g, int n, rgi_arena *a, rg_call *out, rg_error *e);

/* ---- state (state.c) ---- */

/* The version that tensor t is, or that it is a view of; sets *partial (unless NULL) if some view
 * on the way shows a part only. */
int rgi_version(const rgi_graph *g, int t, bool *partial);
/* The tensor that node n makes of the state it reads as its input i (flat), or -1 if that is on no
 * port for state; *port (unless NULL) is that port. */
int rgi_next_in(const rgi_node *n, int i, int *port);
/* The next version of version t, and the node that makes it; or -1. */
int rgi_next_version(const rgi_graph *g, int t, int *node);
/* A node not yet placed that reads a version of which node n makes the next, or -1. */
int rgi_state_waits(const rgi_graph *g, int n, const bool *placed);
/* The state declared as tensor t (-1: the first there is), or NULL. */
const rgi_io *rgi_state_of(const rgi_graph *g, int t);

/* ---- structural rules: what the graph's own ops (views, join, add, cast, …) do beyond tables */

/* In which order a node sums what "delta.x" holds: the part that hands it over must do the same. */
typedef enum rgi_delta { RGI_DELTA_NONE, RGI_DELTA_CHAIN, RGI_DELTA_LANES } rgi_delta;

/* What the fuse pass may do with a backward op's nodes. */
typedef struct rgi_fusing {
  /* Of an op whose node may be taken apart: `part` does the work of one element of the lists "x"
   * and "d.x", where x is `list`. It has ports of the same names, which hold the element, and
   * out-ports "delta" (what "delta.y" of d.x's only reader wants) and "product" (what `rest` needs
   * to make the other outputs; absent if nobody wants those). Attributes of `part`: this op's, the
   * element's number, an rgi_delta. `rest` has this op's attributes, a list "product" and ports of
   * the same names. */
  const char *part, *list, *rest;
  /* Of an op with a port "delta.y": does this call take it? With or without it, the bits are the
   * same. */
  rgi_delta (*delta)(const rg_call *c);
  /* Of an op with ports "sum.x": may this call be given the sum there instead of on "acc.x", and
   * write d.x in x's type? It then rounds what a cast behind it would. */
  bool (*rounds)(const rg_call *c);
  /* Of an op whose node may run as one with that of op `with` which makes what is on its in-port
   * `link`: as a node of `joined`, whose ports and attributes have the names of theirs. What both
   * have must be the same, and what `joined` has not must be absent, or its default. `joins`: is
   * there a kernel for the two? split_kv: one that may share out a row's keys (an attribute of that
   * name is what `joined` is told). A list that `joined` has is the first one's of that name, its
   * attribute "own" where in it `link` was. */
  const char *with, *link, *joined;
  bool (*joins)(const rg_call *first, const rg_call *c, bool split_kv);
  /* With `list`, a list of the second one's: what the first makes is no element of it in `joined`,
   * whose attribute "own" says where it was, or -1. The node stands where the second one did. Where
   * ports of both have one name but not the same, `joined` has the first one's as "first.NAME"
   * (rgi_of_first). */
  /* With `and_with`, link is a list: `with` makes one element, `and_with` another, neither for
   * anybody else. `joined` has what is left of the list, and attributes "first" and "second" for
   * where the two were in it. */
  const char *and_with;
  bool (*joins_both)(const rg_call *first, const rg_call *second, const rg_call *c, bool split_kv);
} rgi_fusing;

struct rgi_backward;
typedef struct rgi_rules {
  /* Views: base, offset, strides (if bound) and shape of the outputs. */
  rg_status (*infer)(rgi_graph *g, int node, const char *pointer, rg_error *e);
  /* Appends what carries gradients to the inputs, through graph/autodiff.h. */
  rg_status (*backward)(struct rgi_backward *b, int node, rg_error *e);
  bool partial; /* each output covers only a part of the input */
  bool wide;    /* gradients of the outputs are summed and handed to `backward` in fp32 */
  bool ordered; /* a view of the same elements in the same order */
  /* Of a backward op whose last attribute, which the forward op has not, is a flag: it is set, and
   * no d.part made, where the forward node's input `part` is the first columns of input `whole`, in
   * its memory. d.whole is the gradient of both then. */
  struct {
    const char *part, *whole;
  } joined;
  const rgi_fusing *fusing;
  /* Of a QUERYWISE op: true if a query sees the *left keys before its own and no others. Its bits
   * do not change where keys begin a multiple of *tile later, as long as it sees no fewer. */
  bool (*window)(const rg_call *c, int64_t *left, int64_t *tile);
  /* Of a BLOCKWISE op: row r is made of the block whose last `stride` tokens start in [r·stride,
   * (r+1)·stride), not of the one that starts there. */
  bool block_ends;
  bool counts_blocks; /* makes starts counted in compressed rows out of starts counted in tokens */
  /* Says what kernels have found (rg_call.fault) in the words in which run_cpu says it. */
  rg_status (*fault)(const rg_call *c, const int32_t *number);
  const void *kind; /* what tells ops of one family apart, for their own files (ops/attn.h) */
} rgi_rules;

/* ---- dumps ---- */

void rgi_dump_text(const rgi_graph *g, rgi_buf *out);
void rgi_dump_dot(const rgi_graph *g, rgi_buf *out);

#endif
