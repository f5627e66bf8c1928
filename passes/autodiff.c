/* passes/autodiff.c: appends the backward nodes that the requested gradients need.
 *
 * Forward nodes are walked last to first. A node that a gradient reaches gets its backward op
 * (ports matched by name, see regraph/op.h) or runs its structural rule (autodiff.h). What arrives
 * at a tensor is one of its *slots*; how many will arrive is counted beforehand, because it decides
 * how they are summed:
 *
 *   single   one slot: it is the gradient, in the tensor's dtype
 *   chain    several, arriving in the order of the forward graph, last reader first: the first is
 *            stored in fp32, each later op adds to it in place ("acc.x"), one cast at the end
 *   parts    anything else. Slices that tile the tensor are joined where they were written; other
 *            mixtures are kept apart in fp32 and added up at the end in order of rank
 *
 * Rank is a node's place before a head split, so all three add the terms of an element in the same
 * order whether the graph is split or not: the bits agree. A weight that several heads share is
 * summed by its op head by head, last head first; if several nodes use it, each has a sum of its
 * own first (parts).
 *
 * Where a head split left a tensor in two forms that are both read, one form holds the sum and the
 * other relays what arrives, term by term (a sum of sums would round differently):
 *
 *   read whole and in slices                  slice -> whole
 *   made in parts, read in parts and joined   whole -> parts
 */
#include "gradients.h"
#include "passes.h"
#include <limits.h>
#include <string.h>

/* ---- which slots exist ---- */

static bool is_float(const rgi_graph *g, int t) {
  return g->tensor[t].dtype != RG_I32;
}

static bool differentiable(const rgi_graph *g, const rgi_node *n, int i) {
  if (n->in[i] < 0 || !is_float(g, n->in[i])) return false;
  if (n->op->rules && n->op->rules->backward) return true;
  if (!n->op->backward) return false;
  const rg_op *backward = rgi_find_op(g->ctx, n->op->backward);
  return backward && rgi_gradient_port(backward, n->op, rgi_port_of(n->in_begin, i)) >= 0;
}

static void count_slot(rgi_sum *s, int node, int rank, bool partial, bool shared) {
  if (s->slots > 0) {
    if (node == s->last_node || rank > s->last_rank) s->disorder = true;
    if (rank != s->last_rank) s->several_ranks = true;
  }
  s->slots++;
  s->last_node = node;
  s->last_rank = rank;
  s->partial = s->partial || partial;
  s->shared = s->shared || shared;
}

/* Does input i of node n carry a gradient back, if one reaches the node? */
static bool gives(const rgi_backward *b, int n, int i) {
  const rgi_node *node = &b->g->node[n];
  return node->in[i] >= 0 && b->needs[node->in[i]] && differentiable(b->g, node, i) &&
         !rgi_joined_gradient(b->g, b->needs, n, i);
}

static bool active(const rgi_backward *b, int n) {
  const rgi_node *node = &b->g->node[n];
  for (int i = 0; i < rgi_nout(node); i++)
    if (node->out[i] >= 0 && b->flows[node->out[i]]) return true;
  return false;
}

/* Fills needs and flows. */
static void find_flows(rgi_backward *b) {
  const rgi_graph *g = b->g;
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].want != RGI_GRAD_NONE) b->needs[g->input[i].tensor] = true;
  for (int n = 0; n < b->nforward; n++) {
    const rgi_node *node = &g->node[n];
    bool any = false;
    for (int i = 0; i < rgi_nin(node); i++) any = any || gives(b, n, i);
    for (int i = 0; i < rgi_nout(node) && any; i++)
      if (node->out[i] >= 0 && is_float(g, node->out[i])) b->needs[node->out[i]] = true;
  }
  for (int i = 0; i < g->noutput; i++)
    if (b->needs[g->output[i].tensor]) b->flows[g->output[i].tensor] = true;
  for (int n = b->nforward - 1; n >= 0; n--)
    for (int i = 0; i < rgi_nin(&g->node[n]) && active(b, n); i++)
      if (gives(b, n, i)) b->flows[g->node[n].in[i]] = true;
}

static rg_status refuse_forward_only(const rgi_backward *b, rg_error *e) {
  for (int n = 0; n < b->nforward; n++) {
    const rgi_node *node = &b->g->node[n];
    for (int i = 0; i < rgi_nin(node) && node->op->flags & RG_OP_FORWARD_ONLY; i++)
      if (node->in[i] >= 0 && b->needs[node->in[i]])
        return rgi_fail(e, RG_E_VALUE, NULL, node->name,
                        "'%s' is %s, which has no gradient; one is asked for of \"%s\", which it "
                        "reads",
                        node->name, node->op->name, b->g->tensor[node->in[i]].name);
  }
  return RG_OK;
}

/* Decides which slices and joins of a head split relay. */
static rg_status choose_relays(rgi_backward *b, rg_error *e) {
  const rgi_graph *g = b->g;
  bool *met =
      /* a gradient that no split made arrives here */
      rgi_alloc_n(g->arena, (size_t)b->nprimal, sizeof *met);
  if (!met) return rgi_nomem(e);
  for (int t = 0; t < b->nprimal; t++) {
    b->sums[t].whole = b->sums[t].join = -1;
    met[t] = b->sums[t].initial >= 0;
  }
  for (int i = 0; i < g->noutput; i++) met[g->output[i].tensor] = true;
  for (int n = 0; n < b->nforward; n++)
    for (int i = 0; i < rgi_nin(&g->node[n]) && g->node[n].kind != RGI_GLUE && active(b, n); i++)
      if (gives(b, n, i)) met[g->node[n].in[i]] = true;
  for (int n = 0; n < b->nforward; n++) {
    const rgi_node *node = &g->node[n];
    if (node->kind != RGI_GLUE || !active(b, n)) continue;
    rgi_sum *s = &b->sums[node->out[0]];
    if (!node->op->rules->partial) {
      for (int i = 0; i < rgi_nin(node); i++)
        if (met[node->in[i]]) s->join = n;
    } else if (met[node->in[0]]) {
      s->whole = node->in[0];
      s->whole_axis = (int)node->attr[0].i;
      s->whole_start = node->attr[1].i;
    }
  }
  return RG_OK;
}

/* A gradient will arrive at t. */
static void count(rgi_backward *b, int t, int n, int rank, bool partial, bool shared) {
  rgi_sum *s = &b->sums[t];
  if (s->whole >= 0) {
    count_slot(&b->sums[s->whole], n, rank, true, shared);
  } else if (s->join >= 0) {
    const rgi_node *join = &b->g->node[s->join];
    for (int i = 0; i < rgi_nin(join); i++)
      count_slot(&b->sums[join->in[i]], n, rank, partial, shared);
  } else {
    count_slot(s, n, rank, partial, shared);
  }
}

/* Fills needs, flows and the sums' strategies. */
static rg_status survey(rgi_backward *b, rg_error *e) {
  const rgi_graph *g = b->g;
  find_flows(b);
  RGI_TRY(refuse_forward_only(b, e));
  RGI_TRY(choose_relays(b, e));
  for (int i = 0; i < g->noutput; i++)
    if (b->needs[g->output[i].tensor]) count(b, g->output[i].tensor, -1, INT_MAX, false, false);
  for (int n = b->nforward - 1; n >= 0; n--) {
    const rgi_node *node = &g->node[n];
    if (node->kind == RGI_GLUE && rgi_relays(&b->sums[node->out[0]])) continue;
    for (int i = 0; i < rgi_nin(node) && active(b, n); i++) {
      if (!gives(b, n, i)) continue;
      bool partial = node->op->rules && node->op->rules->partial;
      bool shared = rgi_shared_weight(node->op, rgi_port_of(node->in_begin, i));
      int gifts = partial ? 0 : 1; /* a split gives one part per output that a gradient reaches */
      for (int o = 0; partial && o < rgi_nout(node); o++)
        gifts += node->out[o] >= 0 && b->flows[node->out[o]];
      for (int k = 0; k < gifts; k++) count(b, node->in[i], n, node->rank, partial, shared);
    }
  }
  for (int t = 0; t < b->nprimal; t++) {
    rgi_sum *s = &b->sums[t];
    if (rgi_relays(s) || s->partial || s->disorder || (s->shared && s->several_ranks))
      s->how = RGI_PARTS;
    else
      s->how = s->slots > 1 || s->initial >= 0 ? RGI_CHAIN : RGI_SINGLE;
  }
  return RG_OK;
}

/* ---- the pass ---- */

/* Incoming gradients of outputs, and the callers' buffers that gradients accumulate into: graph
 * inputs. */
static rg_status add_sources(rgi_backward *b, rg_error *e) {
  rgi_graph *g = b->g;
  for (int t = 0; t < b->nprimal; t++)
    b->sums[t].initial = b->sums[t].tensor = b->sums[t].result = -1;
  for (int i = 0; i < g->ninput; i++) {
    if (g->input[i].want != RGI_GRAD_ACCUMULATE) continue;
    int of = g->input[i].tensor;
    char *name = rgi_format(g->arena, "main.%s", g->input[i].name);
    int t = name ? rgi_add_gradient(b, name, of, RG_F32) : -1;
    if (t < 0) return rgi_nomem(e);
    g->tensor[t].rank = g->tensor[of].rank;
    memcpy(g->tensor[t].dim, g->tensor[of].dim, sizeof g->tensor[t].dim);
    rgi_dense_strides(&g->tensor[t]);
    b->sums[of].initial = t;
  }
  return RG_OK;
}

static rg_status add_incoming(rgi_backward *b, rg_error *e) {
  rgi_graph *g = b->g;
  for (int i = 0; i < g->noutput; i++) {
    int of = g->output[i].tensor;
    g->output[i].grad = -1;
    if (!b->needs[of]) continue;
    char *name = rgi_format(g->arena, "grad.%s", g->output[i].name);
    int t = name ? rgi_add_gradient(b, name, of, g->tensor[of].dtype) : -1;
    if (t < 0) return rgi_nomem(e);
    g->tensor[t].rank = g->tensor[of].rank;
    memcpy(g->tensor[t].dim, g->tensor[of].dim, sizeof g->tensor[t].dim);
    rgi_dense_strides(&g->tensor[t]);
    g->output[i].grad = t;
    RGI_TRY(rgi_sum_arrive(b, of, t, -1, -1, 0, e));
  }
  return RG_OK;
}

/* Gradients of inputs are the caller's memory: each needs dense bytes of its own. */
static rg_status deliver(rgi_backward *b, rgi_io *io, rg_error *e) {
  rgi_graph *g = b->g;
  int t;
  RGI_TRY(rgi_sum_finish(b, io->tensor, &t, e));
  rgi_sum *s = &b->sums[io->tensor];
  if (s->initial >= 0) {
    io->grad = t >= 0 ? t : s->initial;
    return RG_OK;
  }
  const rgi_tensor *x = &g->tensor[io->tensor];
  char *name = rgi_format(g->arena, "d.%s.out", io->name);
  if (!name) return rgi_nomem(e);
  if (t < 0) {
    RGI_TRY(rgi_add_zero(b, io->tensor, false, x->dtype, name, io->tensor, &t, e));
  } else {
    const rgi_tensor *d = &g->tensor[t];
    int owner = rgi_owner(g, t); /* another tensor where t is the last version of a rgi_sum */
    bool own = g->tensor[owner].producer >= 0 && rgi_is_dense(d) && d->offset == 0 &&
               rgi_elements(d) == rgi_elements(&g->tensor[owner]) &&
               g->tensor[owner].seqlens == x->seqlens; /* else its dead rows may hold anything */
    for (int i = 0; i < g->ninput; i++)
      own = own && (g->input[i].grad < 0 || rgi_owner(g, g->input[i].grad) != owner);
    for (int i = 0; i < g->noutput; i++) own = own && rgi_owner(g, g->output[i].tensor) != owner;
    if (!own) RGI_TRY(rgi_add_cast(b, t, x->dtype, name, io->tensor, &t, e));
  }
  io->grad = t;
  return RG_OK;
}

static rg_status differentiate(rgi_backward *b, rg_error *e) {
  rgi_graph *g = b->g;
  RGI_TRY(add_sources(b, e));
  RGI_TRY(survey(b, e));
  RGI_TRY(add_incoming(b, e));
  for (int n = b->nforward - 1; n >= 0; n--) {
    bool reached = false;
    for (int i = 0; i < rgi_nout(&g->node[n]); i++) {
      int t = g->node[n].out[i], done;
      if (t < 0 || !b->flows[t]) continue;
      RGI_TRY(rgi_sum_finish(b, t, &done, e));
      reached = reached || done >= 0;
    }
    bool wanted = false;
    for (int i = 0; i < rgi_nin(&g->node[n]); i++)
      wanted = wanted || (differentiable(g, &g->node[n], i) && b->flows[g->node[n].in[i]]);
    if (!reached || !wanted) continue;
    const rgi_rules *rules = g->node[n].op->rules;
    if (rules && rules->backward)
      RGI_TRY(rules->backward(b, n, e));
    else
      RGI_TRY(rgi_append_backward(b, n, e));
  }
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].want != RGI_GRAD_NONE) RGI_TRY(deliver(b, &g->input[i], e));
  return RG_OK;
}

rg_status rgi_autodiff(const rgi_graph *forward, rgi_graph **out, rg_error *e) {
  rgi_graph *g;
  *out = NULL;
  RGI_TRY(rgi_graph_clone(forward, &g, e));
  rg_status status = RG_OK;
  for (int i = 0; i < g->ninput; i++) g->input[i].grad = -1;
  for (int i = 0; i < g->noutput; i++) g->output[i].grad = -1;
  RGI_GOTO(status, rgi_prune(g, e), fail);
  rgi_backward b = {.g = g, .nforward = g->nnode, .nprimal = g->ntensor};
  b.sums = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *b.sums);
  b.needs = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *b.needs);
  b.flows = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *b.flows);
  if (!b.sums || !b.needs || !b.flows) {
    status = rgi_nomem(e);
    goto fail;
  }
  bool any = false;
  for (int i = 0; i < g->ninput; i++) any = any || g->input[i].want != RGI_GRAD_NONE;
  if (any) RGI_GOTO(status, differentiate(&b, e), fail);
  RGI_GOTO(status, rgi_prune(g, e), fail);
  RGI_GOTO(status, rgi_verify(g, "autodiff", e), fail);
  *out = g;
  return RG_OK;
fail:
  rgi_graph_destroy(g);
  return status;
}
