/* recompute/rewrite.c: clones chosen forward nodes into backward, each directly before its first
   reader there.

   A backward node that reads a forward tensor asks for its stand-in: the tensor itself if its node
   is kept, the clone's output if it is chosen. Views and joins have no bytes: they are cloned when
   what they look at has a stand-in. Declared outputs stand for themselves, since the caller keeps
   them anyway.
 */
#include "search.h"
#include <string.h>

typedef struct rewriter {
  const rgi_graph *from;
  rgi_graph *to;
  const bool *chosen;
  const rgi_profile *profile;
  const rg_op *offload, *fetch; /* NULL: chosen nodes are computed again, else brought back */
  bool *wanted;      /* offload: per tensor of from: backward reads it, perhaps by a view */
  int32_t *host;     /* offload: per tensor of from: its copy in the host's memory, or -1 */
  bool *is_output;   /* per tensor of from: owner is a declared output */
  int32_t *stand_in; /* per tensor of from: id in `to`; -1: not asked yet */
  int32_t *fetched;  /* else: per tensor of from: the node that brings it back, or -1 */
  bool *done;        /* … per node: such a one that has its place */
  /* what the backward node that is being copied waits for: its clones wait, too */
  int32_t after;
  double ms[2]; /* of what was added, forward and backward */
} rewriter;

/* Copies node n of `from` to the end of `to`, with inputs `in` (NULL: the same). */
static rg_status copy_node(rewriter *r, int n, const char *name, const int32_t *in, int *out,
                           rg_error *e) {
  const rgi_node *old = &r->from->node[n];
  int nin[64], nout[64];
  for (int p = 0; p < old->op->nin; p++) nin[p] = old->in_begin[p + 1] - old->in_begin[p];
  for (int p = 0; p < old->op->nout; p++) nout[p] = old->out_begin[p + 1] - old->out_begin[p];
  int m = rgi_add_node(r->to, name, old->op, nin, nout, old->attr);
  if (m < 0) return rgi_nomem(e);
  rgi_node *node = &r->to->node[m];
  memcpy(node->in, in ? in : old->in, (size_t)rgi_nin(old) * sizeof *node->in);
  memcpy(node->out, old->out, (size_t)rgi_nout(old) * sizeof *node->out);
  node->origin = old->origin;
  node->group = old->group;
  node->after = old->backward && !rgi_is_copy(r->from, n) ? old->after : r->after;
  node->rank = old->rank;
  node->backward = old->backward;
  node->kind = old->kind;
  for (int i = 0; i < rgi_nout(node); i++)
    if (node->out[i] >= 0) r->to->tensor[node->out[i]].producer = m;
  *out = m;
  return RG_OK;
}

static rg_status stand_in(rewriter *r, int t, int32_t *out, rg_error *e);

/* A node at the end of `to` that copies tensor `x` of it, for tensor t of from; its result is
 * like t, and called after it. */
static rg_status add_copy(rewriter *r, const rg_op *op, int t, int32_t x, bool backward,
                          int32_t *out, rg_error *e) {
  const rgi_tensor *old = &r->from->tensor[t];
  const rgi_node *producer = &r->from->node[old->producer];
  const int one = 1;
  char *name = rgi_format(r->to->arena, "%s.%s", old->name, op->name);
  int m = name ? rgi_add_node(r->to, name, op, &one, &one, NULL) : -1;
  if (m < 0) return rgi_nomem(e);
  rgi_tensor copy = *old;
  copy.name = rgi_format(r->to->arena, "%s.%s", old->name, backward ? "back" : "host");
  copy.base = -1;
  copy.producer = m;
  copy.host = !backward;
  const int32_t id = copy.name ? rgi_add_tensor(r->to, &copy) : -1;
  if (id < 0) return rgi_nomem(e);
  rgi_node *node = &r->to->node[m];
  node->in[0] = x;
  node->out[0] = id;
  node->origin = -1;
  node->group = producer->group;
  node->after = backward ? r->after : -1;
  node->rank = producer->rank;
  node->backward = backward;
  node->kind = RGI_GLUE;
  RGI_TRY(rgi_infer_node(r->to, m, NULL, e));
  double ms = 0;
  if (r->profile) RGI_TRY(rgi_node_ms(r->to, m, r->profile, r->to->arena, &ms, e));
  r->ms[backward] += ms;
  *out = id;
  return RG_OK;
}

/* Is it this node's bytes that are given up? */
static bool given_up(const rewriter *r, const rgi_node *node) {
  return rgi_repeatable(r->from, node) && r->chosen[node->origin];
}

static rg_status clone_node(rewriter *r, int n, rg_error *e) {
  const rgi_node *old = &r->from->node[n];
  rgi_graph *g = r->to;
  int32_t *in = rgi_alloc_n(g->arena, (size_t)rgi_nin(old) + 1, sizeof *in);
  const char *how = r->fetch ? "back" : "re"; /* a view of what comes back, or the node again */
  char *name = rgi_format(g->arena, "%s.%s", old->name, how);
  if (!in || !name) return rgi_nomem(e);
  for (int i = 0; i < rgi_nin(old); i++) {
    in[i] = -1;
    if (old->in[i] >= 0) RGI_TRY(stand_in(r, old->in[i], &in[i], e));
  }
  int m;
  RGI_TRY(copy_node(r, n, name, in, &m, e));
  g->node[m].backward = true;
  g->node[m].kind = RGI_CLONE;
  for (int i = 0; i < rgi_nout(old); i++) {
    if (old->out[i] < 0) continue;
    rgi_tensor copy = r->from->tensor[old->out[i]];
    copy.name = rgi_format(g->arena, "%s.%s", copy.name, how);
    copy.base = -1;
    copy.producer = m;
    int id = copy.name ? rgi_add_tensor(g, &copy) : -1;
    if (id < 0) return rgi_nomem(e);
    g->node[m].out[i] = id;
    r->stand_in[old->out[i]] = id;
  }
  for (int i = 0; i < rgi_nout(old); i++) /* copy_node pointed these at the clone */
    if (old->out[i] >= 0) g->tensor[old->out[i]].producer = n;
  RGI_TRY(rgi_infer_node(g, m, NULL, e));
  double ms = 0;
  if (r->profile) RGI_TRY(rgi_node_ms(g, m, r->profile, g->arena, &ms, e));
  r->ms[1] += ms;
  return RG_OK;
}

/* Brings tensor t back, if nobody did: for clones that read it, before backward itself does. */
static rg_status bring_back(rewriter *r, int t, int32_t *out, rg_error *e) {
  const int32_t n = r->fetched[t];
  int m;
  *out = r->from->node[n].out[0];
  if (r->done[n]) return RG_OK;
  r->done[n] = true;
  return copy_node(r, n, r->from->node[n].name, NULL, &m, e);
}

/* Would a view's inputs have stand-ins? For a join: all of them, or none counts. */
static bool looks_at_clones(const rewriter *r, int n) {
  const rgi_node *node = &r->from->node[n];
  for (int i = 0; i < rgi_nin(node); i++) {
    int t = node->in[i], p = t < 0 ? -1 : r->from->tensor[t].producer;
    bool again = false;
    if (p >= 0 && !r->is_output[t]) {
      const rgi_node *from = &r->from->node[p];
      again = from->op->flags & RG_OP_VIEW ? looks_at_clones(r, p) : given_up(r, from);
    }
    if (!again) return false;
  }
  return rgi_nin(node) > 0;
}

static rg_status stand_in(rewriter *r, int t, int32_t *out, rg_error *e) {
  const rgi_tensor *x = &r->from->tensor[t];
  *out = t;
  if (x->producer < 0 || r->from->node[x->producer].backward || r->is_output[t]) return RG_OK;
  if (r->stand_in[t] < 0) {
    const rgi_node *node = &r->from->node[x->producer];
    bool again;
    if (node->op->flags & RG_OP_VIEW)
      again = looks_at_clones(r, x->producer);
    else
      again = given_up(r, node);
    const bool back = !r->fetch && r->fetched[rgi_owner(r->from, t)] >= 0;
    if (again && r->fetch && !(node->op->flags & RG_OP_VIEW))
      RGI_TRY(add_copy(r, r->fetch, t, r->host[t], true, &r->stand_in[t], e));
    else if (!again && back && x->base < 0)
      RGI_TRY(bring_back(r, t, &r->stand_in[t], e));
    else if (!again && back)
      RGI_TRY(clone_node(r, x->producer, e)); /* a view of it */
    else if (again)
      RGI_TRY(clone_node(r, x->producer, e));
    else
      r->stand_in[t] = t;
  }
  *out = r->stand_in[t];
  return RG_OK;
}

/* Which tensors backward reads, itself or through views. */
static void find_wanted(const rgi_graph *g, bool *wanted) {
  for (int n = g->nnode - 1; n >= 0; n--) {
    const rgi_node *node = &g->node[n];
    bool reads = node->backward;
    for (int i = 0; i < rgi_nout(node) && node->op->flags & RG_OP_VIEW; i++)
      reads = reads || (node->out[i] >= 0 && wanted[node->out[i]]);
    for (int i = 0; i < rgi_nin(node) && reads; i++)
      if (node->in[i] >= 0) wanted[node->in[i]] = true;
  }
}

/* Behind node n of from: copies of what it makes and gives up. */
static rg_status offload_outputs(rewriter *r, int n, rg_error *e) {
  const rgi_node *node = &r->from->node[n];
  if (node->backward || node->op->flags & RG_OP_VIEW || !given_up(r, node)) return RG_OK;
  for (int i = 0; i < rgi_nout(node); i++) {
    const int t = node->out[i];
    if (t >= 0 && r->wanted[t] && !r->is_output[t])
      RGI_TRY(add_copy(r, r->offload, t, t, false, &r->host[t], e));
  }
  return RG_OK;
}

static rg_status find_fetched(rewriter *r, rg_error *e) {
  const rgi_graph *g = r->from;
  r->fetched = rgi_alloc_n(r->to->arena, (size_t)g->ntensor + 1, sizeof *r->fetched);
  r->done = rgi_alloc_n(r->to->arena, (size_t)g->nnode + 1, sizeof *r->done);
  if (!r->fetched || !r->done) return rgi_nomem(e);
  for (int t = 0; t < g->ntensor; t++) r->fetched[t] = -1;
  for (int n = 0; n < g->nnode; n++)
    if (rgi_brings_back(g, n) >= 0) r->fetched[rgi_brings_back(g, n)] = n;
  return RG_OK;
}

/* Of a GPU's copies, moved to their windows unless nodes that want them early are still to come:
 * what is waited for, resp. how much longer. */
static rg_status find_waits(rewriter *r, rgi_graph *to, bool offload, rg_error *e) {
  double before[2], now[2];
  if (offload) return rgi_copy_windows(to, r->profile, false, r->ms, e);
  RGI_TRY(rgi_copy_windows(to, r->profile, true, now, e));
  if (now[0] + now[1] == 0) return RG_OK;
  rgi_graph *from;
  RGI_TRY(rgi_graph_clone(r->from, &from, e));
  const rg_status status = rgi_copy_windows(from, r->profile, false, before, e);
  rgi_graph_destroy(from);
  const double longer = now[0] + now[1] - before[0] - before[1];
  if (longer > 0) r->ms[1] += longer;
  return status;
}

static rg_status rewrite(const rgi_graph *g, const bool *chosen, const rgi_profile *profile,
                         bool offload, rgi_graph **out, double ms[2], rg_error *e) {
  rgi_graph *to;
  *out = NULL;
  RGI_TRY(rgi_graph_clone(g, &to, e));
  rg_status status = RG_OK;
  rewriter r = {.from = g, .to = to, .chosen = chosen, .profile = profile};
  r.is_output = rgi_alloc_n(to->arena, (size_t)g->ntensor, sizeof *r.is_output);
  r.stand_in = rgi_alloc_n(to->arena, (size_t)g->ntensor, sizeof *r.stand_in);
  if (!r.is_output || !r.stand_in) {
    status = rgi_nomem(e);
    goto fail;
  }
  for (int t = 0; t < g->ntensor; t++) r.stand_in[t] = -1;
  if (offload) {
    r.offload = rgi_find_op(g->ctx, "offload");
    r.fetch = rgi_find_op(g->ctx, "fetch");
    r.wanted = rgi_alloc_n(to->arena, (size_t)g->ntensor, sizeof *r.wanted);
    r.host = rgi_alloc_n(to->arena, (size_t)g->ntensor, sizeof *r.host);
    if (!r.wanted || !r.host) {
      status = rgi_nomem(e);
      goto fail;
    }
    find_wanted(g, r.wanted);
  }
  for (int i = 0; i < g->noutput; i++)
    for (int t = 0; t < g->ntensor; t++)
      if (rgi_owner(g, t) == g->output[i].tensor) r.is_output[t] = true;
  if (!offload) RGI_GOTO(status, find_fetched(&r, e), fail);
  to->nnode = 0;
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    if (r.done && r.done[n]) continue;
    int32_t *in = NULL;
    r.after = node->backward ? node->after : -1;
    if (node->backward) {
      in = rgi_alloc_n(to->arena, (size_t)rgi_nin(node) + 1, sizeof *in);
      if (!in) {
        status = rgi_nomem(e);
        goto fail;
      }
      for (int i = 0; i < rgi_nin(node); i++) {
        in[i] = -1;
        if (node->in[i] >= 0) RGI_GOTO(status, stand_in(&r, node->in[i], &in[i], e), fail);
      }
    }
    int m;
    RGI_GOTO(status, copy_node(&r, n, node->name, in, &m, e), fail);
    if (r.done) r.done[n] = true;
    if (offload) RGI_GOTO(status, offload_outputs(&r, n, e), fail);
  }
  RGI_GOTO(status, rgi_prune(to, e), fail);
  if (profile && profile->cuda) RGI_GOTO(status, find_waits(&r, to, offload, e), fail);
  *out = to;
  memcpy(ms, r.ms, sizeof r.ms);
  return RG_OK;
fail:
  rgi_graph_destroy(to);
  return status;
}

rg_status rgi_rewrite(const rgi_graph *g, const bool *chosen, const rgi_profile *profile,
                      rgi_graph **out, double *extra_ms, rg_error *e) {
  double ms[2];
  const rg_status status = rewrite(g, chosen, profile, false, out, ms, e);
  if (status == RG_OK && extra_ms) *extra_ms = ms[1];
  return status;
}

rg_status rgi_offload(const rgi_graph *g, const bool *chosen, const rgi_profile *profile,
                      rgi_graph **out, double ms[2], rg_error *e) {
  return rewrite(g, chosen, profile, true, out, ms, e);
}

rg_status rgi_offload_bytes(const rgi_graph *g, int64_t *bytes, rg_error *e) {
  bool *wanted = rgi_malloc(g->ctx, (size_t)g->ntensor + 1);
  if (!wanted) return rgi_nomem(e);
  memset(wanted, 0, (size_t)g->ntensor + 1);
  find_wanted(g, wanted);
  for (int i = 0; i < g->noutput; i++) /* these the caller keeps anyway */
    for (int t = 0; t < g->ntensor; t++)
      if (rgi_owner(g, t) == g->output[i].tensor) wanted[t] = false;
  for (int t = 0; t < g->ntensor; t++) {
    const int p = g->tensor[t].producer;
    const bool may = p >= 0 && wanted[t] && !g->node[p].backward &&
                     !(g->node[p].op->flags & RG_OP_VIEW) && rgi_repeatable(g, &g->node[p]);
    bytes[t] = may ? rgi_bytes(&g->tensor[t]) : 0;
  }
  rgi_free(g->ctx, wanted);
  return RG_OK;
}
