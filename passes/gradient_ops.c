/* passes/gradient_ops.c: the backward op of a node: ports matched by name (regraph/op.h),
 * gradients handed in and made. See gradients.h. */
#include "gradients.h"
#include <stdio.h>
#include <string.h>

int rgi_port_of(const int32_t *begin, int flat) {
  int p = 0;
  while (begin[p + 1] <= flat) p++;
  return p;
}

int rgi_gradient_port(const rg_op *backward, const rg_op *op, int p) {
  char name[72];
  snprintf(name, sizeof name, "d.%s", op->in[p].name);
  return rgi_out_port(backward, name);
}

/* Is x the first columns of y, in the same memory? */
static bool first_columns(const rgi_graph *g, int x, int y) {
  const rgi_tensor *a = &g->tensor[x], *b = &g->tensor[y];
  bool same = rgi_owner(g, x) == rgi_owner(g, y) && a->offset == b->offset && a->rank == b->rank &&
              a->rank > 0 && a->dtype == b->dtype;
  for (int d = 0; same && d < a->rank; d++)
    same = a->stride[d] == b->stride[d] &&
           (d + 1 < a->rank ? a->dim[d].c == b->dim[d].c : a->dim[d].c <= b->dim[d].c);
  return same;
}

bool rgi_joined_gradient(const rgi_graph *g, const bool *needs, int n, int i) {
  const rgi_node *f = &g->node[n];
  const rg_op *op = f->op->backward ? rgi_find_op(g->ctx, f->op->backward) : NULL;
  if (!op || !op->rules || !op->rules->joined.part) return false;
  const int part = f->in_begin[rgi_in_port(f->op, op->rules->joined.part)],
            whole = f->in_begin[rgi_in_port(f->op, op->rules->joined.whole)];
  return (i < 0 || i == part) && needs[f->in[part]] && needs[f->in[whole]] &&
         first_columns(g, f->in[part], f->in[whole]);
}

static bool cut_by_heads(const rg_op *op) {
  for (int p = 0; p < op->nin; p++)
    if (op->in[p].head_axis >= 0) return true;
  return false;
}

bool rgi_shared_weight(const rg_op *op, int p) {
  return cut_by_heads(op) && op->in[p].head_axis < 0;
}

enum { MOST_ATTRS = 16 };

typedef struct gradient_node {
  int forward; /* node */
  const rg_op *op;
  int nin[64], nout[64];
  int32_t *in, *out;
  rgi_grad_term *term; /* per flat input of the forward node */
} gradient_node;

/* How many elements a port of the backward op has, and which tensor is element k: by the port's
 * name. */
/* Those of inputs come first. FUSED_…: bound by fuse.c, if at all. */
typedef enum source {
  FROM_INPUT,
  FROM_SUM,
  FUSED_SUM,
  FROM_OUTPUT,
  FROM_GRADIENT,
  FUSED_DELTA
} source;

static source source_of(const char *port, const char **rest) {
  static const struct {
    const char *prefix;
    source from;
  } table[] = {{"out.", FROM_OUTPUT},
               {"grad.", FROM_GRADIENT},
               {"acc.", FROM_SUM},
               {"sum.", FUSED_SUM},
               {"delta.", FUSED_DELTA}};
  for (int i = 0; i < RGI_COUNT(table); i++)
    if (strncmp(port, table[i].prefix, strlen(table[i].prefix)) == 0) {
      *rest = port + strlen(table[i].prefix);
      return table[i].from;
    }
  *rest = port;
  return FROM_INPUT;
}

static rg_status fill_inputs(rgi_backward *b, const rgi_node *f, gradient_node *gn, rg_error *e) {
  const rgi_graph *g = b->g;
  int total = 0;
  for (int p = 0; p < gn->op->nin; p++) {
    const char *name;
    source from = source_of(gn->op->in[p].name, &name);
    const bool input = from < FROM_OUTPUT;
    int q = input ? rgi_in_port(f->op, name) : rgi_out_port(f->op, name);
    if (q < 0)
      return rgi_fail(e, RG_E_INTERNAL, NULL, f->name, "port \"%s\" of %s matches nothing of %s",
                      gn->op->in[p].name, gn->op->name, f->op->name);
    const int32_t *begin = input ? f->in_begin : f->out_begin;
    const int32_t *ids = input ? f->in : f->out;
    int count = begin[q + 1] - begin[q], kept = 0;
    for (int k = 0; k < count; k++) {
      int t = ids[begin[q] + k], id = t;
      if (from == FUSED_SUM || from == FUSED_DELTA) {
        id = -1;
      } else if (from == FROM_GRADIENT) {
        id = t < 0 ? -1 : b->sums[t].result;
        if (t >= 0 && id < 0 && !(gn->op->in[p].flags & RG_PORT_OPTIONAL)) {
          char *zero = rgi_format(g->arena, "d.%s.zero", g->tensor[t].name);
          if (!zero) return rgi_nomem(e);
          RGI_TRY(rgi_add_zero(b, t, false, g->tensor[t].dtype, zero, t, &id, e));
        }
      } else if (from == FROM_SUM) {
        const rgi_grad_term *x = &gn->term[begin[q] + k];
        id = x->tensor >= 0 && rgi_gradient_port(gn->op, f->op, q) >= 0 ? x->so_far : -1;
      }
      gn->in[total + k] = id;
      kept += id >= 0;
    }
    if (!kept) count = 0; /* an absent port */
    gn->nin[p] = count;
    total += count;
  }
  return RG_OK;
}

/* Creates the output tensors; slot_input[i]: flat forward input that output i is the gradient
 * of. */
static rg_status fill_outputs(rgi_backward *b, const rgi_node *f, gradient_node *gn,
                              int *slot_input, rg_error *e) {
  int total = 0;
  for (int p = 0; p < gn->op->nout; p++) {
    const char *port = gn->op->out[p].name + 2;
    int q = rgi_in_port(f->op, port);
    if (q < 0)
      return rgi_fail(e, RG_E_INTERNAL, NULL, f->name, "port \"%s\" of %s matches nothing of %s",
                      gn->op->out[p].name, gn->op->name, f->op->name);
    gn->nout[p] = f->in_begin[q + 1] - f->in_begin[q];
    for (int k = 0; k < gn->nout[p]; k++) {
      const rgi_grad_term *x = &gn->term[f->in_begin[q] + k];
      gn->out[total + k] = -1;
      slot_input[total + k] = x->slot;
      if (x->tensor < 0) continue;
      char *name = rgi_sum_name(b, x, port);
      gn->out[total + k] = name ? rgi_add_gradient(b, name, x->tensor, x->dtype) : -1;
      if (gn->out[total + k] < 0) return rgi_nomem(e);
    }
    total += gn->nout[p];
  }
  return RG_OK;
}

/* What the op gives to input i of its forward node. */
static rgi_grad_term term_of(const rgi_backward *b, const gradient_node *gn, int i) {
  const rgi_node *f = &b->g->node[gn->forward];
  const int p = rgi_port_of(f->in_begin, i), t = f->in[i];
  rgi_grad_term x = {.node = gn->forward, .slot = i, .tensor = -1, .so_far = -1};
  if (t < 0 || !b->flows[t] || rgi_joined_gradient(b->g, b->needs, gn->forward, i)) return x;
  x.tensor = t;
  x.shared = rgi_shared_weight(f->op, p);
  rgi_sum_prepare(b, &x);
  char acc[72];
  snprintf(acc, sizeof acc, "acc.%s", f->op->in[p].name);
  x.apart = x.so_far >= 0 && rgi_in_port(gn->op, acc) < 0;
  return x;
}

rg_status rgi_append_backward(rgi_backward *b, int n, rg_error *e) {
  rgi_graph *g = b->g;
  const rg_op *forward_op = g->node[n].op;
  const rg_op *op = rgi_find_op(g->ctx, forward_op->backward);
  if (!op)
    return rgi_fail(e, RG_E_INTERNAL, NULL, g->node[n].name,
                    "%s names a backward op \"%s\" that does not exist", forward_op->name,
                    forward_op->backward);
  gradient_node gn = {.forward = n, .op = op};
  /* lists on any port are no longer than the node's own; 4 kinds of ports may repeat them */
  size_t room = 8 * (size_t)(rgi_nin(&g->node[n]) + rgi_nout(&g->node[n])) + 64;
  gn.in = rgi_alloc_n(g->arena, room, sizeof *gn.in);
  gn.out = rgi_alloc_n(g->arena, room, sizeof *gn.out);
  int *slot_input = rgi_alloc_n(g->arena, room, sizeof *slot_input);
  gn.term = rgi_alloc_n(g->arena, (size_t)rgi_nin(&g->node[n]) + 1, sizeof *gn.term);
  if (!gn.in || !gn.out || !slot_input || !gn.term) return rgi_nomem(e);
  if (op->nin > RGI_COUNT(gn.nin) || op->nout > RGI_COUNT(gn.nout))
    return rgi_fail(e, RG_E_INTERNAL, NULL, g->node[n].name, "%s has too many ports", op->name);
  rgi_node f = g->node[n]; /* a copy: the array may move; its lists do not */
  for (int i = 0; i < rgi_nin(&f); i++) gn.term[i] = term_of(b, &gn, i);
  RGI_TRY(fill_inputs(b, &f, &gn, e));
  RGI_TRY(fill_outputs(b, &f, &gn, slot_input, e));
  char *name = rgi_format(g->arena, "%s.bwd", f.name);
  const rg_value *attr = op->nattr == forward_op->nattr ? f.attr : NULL;
  rg_value own[MOST_ATTRS];
  if (op->rules && op->rules->joined.part) {
    if (op->nattr != forward_op->nattr + 1 || op->nattr > MOST_ATTRS)
      return rgi_fail(e, RG_E_INTERNAL, NULL, f.name, "%s has no flag of its own", op->name);
    memcpy(own, f.attr, (size_t)forward_op->nattr * sizeof *own);
    const bool joined = rgi_joined_gradient(g, b->needs, n, -1);
    own[forward_op->nattr] = (rg_value){.i = joined, .set = joined};
    attr = own;
  }
  int m = name ? rgi_add_node(g, name, op, gn.nin, gn.nout, attr) : -1;
  if (m < 0) return rgi_nomem(e);
  rgi_node *node = &g->node[m];
  memcpy(node->in, gn.in, (size_t)rgi_nin(node) * sizeof *node->in);
  memcpy(node->out, gn.out, (size_t)rgi_nout(node) * sizeof *node->out);
  node->backward = true;
  node->kind = RGI_GRADIENT;
  node->origin = f.origin;
  node->group = f.group;
  node->rank = f.rank;
  RGI_TRY(rgi_infer_node(g, m, NULL, e));
  for (int i = 0; i < rgi_nout(&g->node[m]); i++) {
    const int made = g->node[m].out[i];
    if (made >= 0) RGI_TRY(rgi_sum_book(b, &gn.term[slot_input[i]], made, e));
  }
  return RG_OK;
}
