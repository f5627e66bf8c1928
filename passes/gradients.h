/* passes/gradients.h: what the three files of autodiff share.

       autodiff.c         the walk: which gradients are wanted, how each is summed, last node to
                          first
       gradient_ops.c     the backward op of a node: which tensors its ports take, what it makes
       gradient_sums.c    the sums that gradients meet in, and what rules may append

   Each calls those below it. How sums work is said at the top of autodiff.c.
 */
#ifndef RGI_GRADIENTS_H
#define RGI_GRADIENTS_H

#include "../graph/autodiff.h"

typedef enum rgi_strategy { RGI_SINGLE, RGI_CHAIN, RGI_PARTS } rgi_strategy;

typedef struct rgi_part {
  int rank, tensor, node; /* node: forward node that gave it, -1: the incoming gradient */
  int axis;               /* slice axis, or -1: the whole tensor */
  int64_t start;
  int serial;  /* order of arrival */
  bool shared; /* a weight's sum that later head groups add to … */
  int slot;    /* … on the same flat input */
} rgi_part;

typedef struct rgi_sum {
  rgi_strategy how;
  int slots, arrived;
  int last_rank, last_node; /* while counting */
  bool partial, disorder, shared, several_ranks;
  int initial; /* the caller's fp32 buffer to add to, or -1 */
  int tensor;  /* single, chain: what there is so far, or -1 */
  rgi_part *parts;
  int nparts;
  bool done;
  int result; /* the finished gradient, or -1 */
  /* relays what arrives to this tensor, as the slice that starts at whole_start on whole_axis; or
   * -1 */
  int whole;
  int whole_axis;
  int64_t whole_start;
  int join; /* relays what arrives to the parts that this node joins, or -1 */
} rgi_sum;

struct rgi_backward {
  rgi_graph *g;
  int nforward;  /* forward nodes */
  int nprimal;   /* forward tensors */
  rgi_sum *sums; /* per forward tensor */
  bool *needs;   /* its gradient is wanted, for itself or for something before it */
  bool *flows;   /* a gradient reaches it */
};

/* What the backward op of `node` gives to input `slot` of the node (flat): a term of a sum. */
typedef struct rgi_grad_term {
  int node, slot;
  int tensor;     /* the input, or -1: absent, or no gradient of it is wanted */
  bool shared;    /* a weight that heads share: its op sums it, head group by head group */
  rg_dtype dtype; /* what the op writes */
  int so_far;     /* the sum that it would be added to in place, or -1 … */
  bool apart;     /* … and the op has no port for that: it arrives as a term of its own */
} rgi_grad_term;

/* ---- gradient_sums.c ---- */

/* Passes on what arrives: to a whole, or to the parts of a join. */
static inline bool rgi_relays(const rgi_sum *s) {
  return s->whole >= 0 || s->join >= 0;
}
/* A finished tensor arrives at t, from forward node `node` (-1: from outside): for all of it (axis
 * -1) or for the slice that starts at `start` on `axis`. */
rg_status rgi_sum_arrive(rgi_backward *b, int t, int gradient, int node, int axis, int64_t start,
                         rg_error *e);
/* Fills in dtype and so_far of a term whose other members are set. */
void rgi_sum_prepare(const rgi_backward *b, rgi_grad_term *x);
/* The name of what an op writes for x on port "d.PORT"; NULL on NOMEM. */
char *rgi_sum_name(rgi_backward *b, const rgi_grad_term *x, const char *port);
/* `made`, which an op wrote for x, joins its sum. */
rg_status rgi_sum_book(rgi_backward *b, const rgi_grad_term *x, int made, rg_error *e);
/* The finished gradient of forward tensor t in *out, or -1 if none arrived. */
rg_status rgi_sum_finish(rgi_backward *b, int t, int *out, rg_error *e);

bool rgi_is_dense(const rgi_tensor *t);
/* A tensor for a gradient of `of` (-1: of nothing). -1 on NOMEM. */
int rgi_add_gradient(rgi_backward *b, const char *name, int of, rg_dtype dtype);
/* A dense copy in `dtype`; rows past the live ones become zero. */
rg_status rgi_add_cast(rgi_backward *b, int x, rg_dtype dtype, const char *name, int of, int *out,
                       rg_error *e);
/* Zeros in the shape of `like`; begin_sum: -0.0, to which a term may be added without a trace. */
rg_status rgi_add_zero(rgi_backward *b, int like, bool begin_sum, rg_dtype dtype, const char *name,
                       int of, int *out, rg_error *e);

/* ---- gradient_ops.c ---- */

/* The port that element `flat` belongs to. */
int rgi_port_of(const int32_t *begin, int flat);
/* Port of the backward op that carries the gradient of in-port p, or -1. */
int rgi_gradient_port(const rg_op *backward, const rg_op *op, int p);
/* Does input i of forward node n have its gradient within another's (rgi_rules.joined)? i < 0: any
 * of them. */
bool rgi_joined_gradient(const rgi_graph *g, const bool *needs, int n, int i);
/* Does in-port p carry a weight that heads share? */
bool rgi_shared_weight(const rg_op *op, int p);
/* Appends the backward op of forward node n, whose outputs' gradients are finished. */
rg_status rgi_append_backward(rgi_backward *b, int n, rg_error *e);

#endif
