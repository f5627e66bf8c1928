/* exec/steps.c: lowers a planned graph to steps: one per node that moves bytes, every address
   resolved to a place.

   Also lists what the caller binds, and the rules that the host checks on bound contents before
   each forward. Views and joins are addresses only and give no step.
 */
#include "plan.h"

#include <string.h>

static rg_status broken(rg_error *e, const char *node, const char *what, const char *name) {
  return rgi_fail(e, RG_E_INTERNAL, NULL, node, "%s: \"%s\"", what, name);
}

/* ---- what the caller binds ---- */

/* The caller's memory is dense and holds the whole tensor, so a bindable tensor is
 * its owner's bytes, all of them. */
static bool dense_whole(const rgi_graph *g, int32_t t) {
  const rgi_tensor *x = &g->tensor[t];
  if (x->base < 0) return true;
  rgi_tensor dense = *x;
  rgi_dense_strides(&dense);
  for (int a = 0; a < x->rank; a++)
    if (x->dim[a].c > 1 && x->stride[a] != dense.stride[a]) return false;
  return x->offset == 0 && rgi_bytes(x) == rgi_bytes(&g->tensor[x->base]);
}

static rg_status add_bindable(rg_plan *plan, const char *name, int32_t t, rg_role role,
                              bool sharded, bool accumulates, rg_error *e) {
  const rgi_graph *g = plan->graph;
  const rgi_tensor *x = &g->tensor[t];
  if (!dense_whole(g, t)) return broken(e, NULL, "a bindable tensor looks into other bytes", name);
  rgi_bindable *b = &plan->bindable[plan->nbindable++];
  *b = (rgi_bindable){.tensor = t, .owner = rgi_owner(g, t)};
  rgi_region region = g->tensor[b->owner].region;
  if (region != RGI_R_INPUT && region != RGI_R_OUTPUT)
    return broken(e, NULL, "a bindable tensor is not the caller's", name);
  b->info = (rg_tensor_info){.name = name,
                             .role = role,
                             .dtype = x->dtype,
                             .rank = x->rank,
                             .alignment = plan->cuda ? RGI_GPU_ALIGN : (int)rg_dtype_size(x->dtype),
                             .bytes = rgi_bytes(x),
                             .sharded = sharded,
                             .accumulates = accumulates};
  for (int a = 0; a < x->rank; a++) b->info.dim[a] = x->dim[a].c;
  return RG_OK;
}

static rg_status list_bindable(rg_plan *plan, rg_error *e) {
  const rgi_graph *g = plan->graph;
  plan->bindable =
      rgi_alloc_n(plan->arena, 2 * (size_t)(g->ninput + g->noutput) + 1, sizeof *plan->bindable);
  if (!plan->bindable) return rgi_nomem(e);
  for (int i = 0; i < g->ninput; i++)
    RGI_TRY(add_bindable(plan, g->input[i].name, g->input[i].tensor,
                         g->input[i].state ? RG_STATE : RG_INPUT, g->input[i].sharded, false, e));
  for (int i = 0; i < g->noutput; i++)
    RGI_TRY(add_bindable(plan, g->output[i].name, g->output[i].tensor, RG_OUTPUT,
                         g->output[i].sharded, false, e));
  for (int i = 0; i < g->noutput; i++)
    if (g->output[i].grad >= 0)
      RGI_TRY(add_bindable(plan, g->output[i].name, g->output[i].grad, RG_GRAD_IN,
                           g->output[i].sharded, false, e));
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].grad >= 0)
      RGI_TRY(add_bindable(plan, g->input[i].name, g->input[i].grad, RG_GRAD_OUT,
                           g->input[i].sharded, g->input[i].want == RGI_GRAD_ACCUMULATE, e));
  for (int i = 0; i < plan->nbindable; i++)
    for (int k = 0; k < g->ninput; k++)
      if (plan->bindable[i].info.role == RG_GRAD_OUT &&
          plan->bindable[i].tensor == g->input[k].grad)
        plan->bindable[i].info.partial = g->input[k].partial;
  for (int i = 0; i < plan->nbindable; i++)
    for (int j = 0; j < i; j++)
      if (plan->bindable[i].owner == plan->bindable[j].owner)
        return broken(e, NULL, "two bindable tensors share bytes", plan->bindable[i].info.name);
  for (int role = 0; role < RGI_ROLES; role++)
    if (!rgi_names_init(&plan->by_name[role], plan->arena, (size_t)plan->nbindable + 1))
      return rgi_nomem(e);
  for (int i = 0; i < plan->nbindable; i++) {
    const rg_tensor_info *t = &plan->bindable[i].info;
    rgi_names_add(&plan->by_name[t->role], t->name, i);
  }
  return RG_OK;
}

rg_status rgi_plan_place(const rg_plan *plan, int32_t t, rgi_place *out, rg_error *e) {
  const rgi_graph *g = plan->graph;
  const rgi_tensor *x = &g->tensor[t], *owner = &g->tensor[rgi_owner(g, t)];
  int64_t inside = x->base >= 0 ? x->offset * (int64_t)rg_dtype_size(owner->dtype) : 0;
  switch (owner->region) {
  case RGI_R_SAVED: *out = (rgi_place){RGI_AT_SAVED, owner->address + inside}; return RG_OK;
  case RGI_R_HOST: *out = (rgi_place){RGI_AT_HOST, owner->address + inside}; return RG_OK;
  case RGI_R_SCRATCH: *out = (rgi_place){RGI_AT_SCRATCH, owner->address + inside}; return RG_OK;
  default: break;
  }
  for (int i = 0; i < plan->nbindable; i++)
    if (plan->bindable[i].owner == rgi_owner(g, t)) {
      *out = (rgi_place){i, inside};
      return RG_OK;
    }
  return broken(e, NULL, "a tensor has no bytes", x->name);
}

/* ---- steps ---- */

static rg_status add_step(rg_plan *plan, int32_t n, rg_error *e) {
  const rgi_graph *g = plan->graph;
  const rgi_node *node = &g->node[n];
  rgi_step *s = &plan->step[plan->nstep++];
  s->node = n;
  s->nin = rgi_nin(node);
  s->nout = rgi_nout(node);
  s->first_arg = plan->nargs;
  plan->nargs += s->nin + s->nout;
  RGI_TRY(rgi_node_call(g, n, plan->arena, &s->call, e));
  s->call.threads = plan->threads;
  s->call.isa = plan->ctx->isa;
  s->call.gpu = plan->cuda ? &plan->gpu : NULL;
  s->place = rgi_alloc_n(plan->arena, (size_t)(s->nin + s->nout) + 1, sizeof *s->place);
  if (!s->place) return rgi_nomem(e);
  for (int i = 0; i < s->nin + s->nout; i++) {
    int32_t t = i < s->nin ? node->in[i] : node->out[i - s->nin];
    s->place[i] = (rgi_place){RGI_AT_NOTHING, 0};
    if (t >= 0) RGI_TRY(rgi_plan_place(plan, t, &s->place[i], e));
  }
  s->workspace = plan->memory->workspace[n];
  s->workspace_size = s->workspace >= 0 ? plan->memory->workspace_size[n] : 0;
  if (node->op->comm_bytes) s->comm_size = (int64_t)node->op->comm_bytes(&s->call);
  /* The run hands out what the op asks for now; memplan asked the same question. */
  int64_t asked = node->op->workspace ? (int64_t)node->op->workspace(&s->call) : 0;
  if (asked > s->workspace_size)
    return broken(e, node->name, "the workspace planned is too small", node->name);
  if (plan->cuda ? !node->op->cuda_steps : !node->op->run_cpu)
    return rgi_fail(e, RG_E_DEVICE, NULL, node->name, "op \"%s\" has no %s implementation",
                    node->op->name, plan->cuda ? "CUDA" : "CPU");
  if (plan->cuda && node->op->check) RGI_TRY(node->op->check(&s->call, e));
  rgi_modelled m;
  rgi_model_call(plan->profile, &s->call, &m);
  s->cost = m.cost;
  s->dtype = m.dtype;
  s->ms = m.ms;
  s->roofline_ms = m.roofline_ms;
  return RG_OK;
}

static rg_status list_steps(rg_plan *plan, rg_error *e) {
  const rgi_graph *g = plan->graph;
  plan->step = rgi_alloc_n(plan->arena, (size_t)g->nnode + 1, sizeof *plan->step);
  if (!plan->step) return rgi_nomem(e);
  for (int32_t n = 0; n < g->nnode; n++) {
    if (g->node[n].op->flags & RG_OP_VIEW) continue;
    RGI_TRY(add_step(plan, n, e));
    if (!g->node[n].backward) plan->nforward = plan->nstep;
  }
  for (int32_t i = 0; i < plan->nstep; i++)
    if (g->node[plan->step[i].node].backward != (i >= plan->nforward))
      return broken(e, NULL, "a backward node stands before a forward one",
                    g->node[plan->step[i].node].name);
  return RG_OK;
}

/* ---- rules for bound contents ---- */

/* The check for the input behind tensor t, new or known; -1 if the host cannot read it
 * before a run (a node makes it). */
static rg_status find_check(rg_plan *plan, int32_t t, bool starts, int32_t *out, rg_error *e) {
  *out = -1;
  rgi_place at;
  const rgi_tensor *x = &plan->graph->tensor[t];
  RGI_TRY(rgi_plan_place(plan, t, &at, e));
  if (at.bind < 0 || plan->bindable[at.bind].info.role != RG_INPUT) return RG_OK;
  rg_tensor_info *info = &plan->bindable[at.bind].info;
  if (starts)
    info->seqlens = true;
  else
    info->offsets = true;
  for (int32_t i = 0; i < plan->ncheck; i++) {
    const rgi_check *c = &plan->check[i];
    if (c->bind == at.bind && c->offset == at.offset && c->starts == starts &&
        c->n == x->dim[0].c && c->stride == x->stride[0]) {
      *out = i;
      return RG_OK;
    }
  }
  *out = plan->ncheck++;
  plan->check[*out] = (rgi_check){.bind = at.bind,
                                  .offset = at.offset,
                                  .n = x->dim[0].c,
                                  .stride = x->stride[0],
                                  .starts = starts,
                                  .capacity = plan->cp.capacity > 0 ? plan->cp.capacity : INT32_MAX,
                                  .lengths = -1};
  return RG_OK;
}

/* Fewest rows on the ports of node n that carry `flag`. */
static int64_t fewest_rows(const rgi_graph *g, const rgi_node *n, uint32_t flag) {
  int64_t rows = INT32_MAX;
  for (int out = 0; out < 2; out++) {
    const rg_port *port = out ? n->op->out : n->op->in;
    const int32_t *begin = out ? n->out_begin : n->in_begin, *id = out ? n->out : n->in;
    for (int p = 0; p < (out ? n->op->nout : n->op->nin); p++)
      for (int32_t i = begin[p]; i < begin[p + 1]; i++)
        if (port[p].flags & flag && id[i] >= 0 && g->tensor[id[i]].dim[0].c < rows)
          rows = g->tensor[id[i]].dim[0].c;
  }
  return rows;
}

static rg_status list_checks(rg_plan *plan, rg_error *e) {
  const rgi_graph *g = plan->graph;
  size_t most = 1;
  for (int32_t n = 0; n < g->nnode; n++)
    for (int p = 0; p < g->node[n].op->nin; p++)
      most += (g->node[n].op->in[p].flags & RGI_LENGTH_PORTS) != 0;
  plan->check = rgi_alloc_n(plan->arena, most, sizeof *plan->check);
  if (!plan->check) return rgi_nomem(e);
  for (int32_t i = 0; i < g->nnode; i++) {
    const rgi_node *n = &g->node[i];
    int32_t starts = -1;
    for (int pass = 0; pass < 2; pass++) /* starts first: positions refer to them */
      for (int p = 0; p < n->op->nin; p++) {
        uint32_t flags = n->op->in[p].flags;
        int32_t t = rgi_in(n, p), c;
        if (t < 0) continue;
        if (pass == 0 && flags & (RG_PORT_SEQLENS | RG_PORT_KSEQLENS)) {
          RGI_TRY(find_check(plan, t, true, &c, e));
          if (c < 0) continue;
          int64_t rows = fewest_rows(g, n, flags & RG_PORT_SEQLENS ? RG_PORT_ROWS : RG_PORT_KROWS);
          if (rows < plan->check[c].capacity) plan->check[c].capacity = rows;
          if (flags & RG_PORT_SEQLENS) starts = c;
        } else if (pass == 1 && flags & RG_PORT_OFFSETS) {
          RGI_TRY(find_check(plan, t, false, &c, e));
          if (c >= 0) plan->check[c].lengths = starts;
        }
      }
  }
  return RG_OK;
}

/* Gives every checked input a clean copy at the start of saved, and points the steps at it. */
static rg_status list_clean(rg_plan *plan, rg_error *e) {
  int64_t end = 0;
  plan->clean = rgi_alloc_n(plan->arena, (size_t)plan->ncheck + 1, sizeof *plan->clean);
  if (!plan->clean) return rgi_nomem(e);
  for (int32_t i = 0; i < plan->ncheck; i++) {
    const int32_t bind = plan->check[i].bind;
    bool known = false;
    for (int32_t k = 0; k < plan->nclean && !known; k++) known = plan->clean[k].bind == bind;
    if (known) continue;
    const int64_t bytes = plan->bindable[bind].info.bytes;
    end = rgi_aligned(end);
    plan->clean[plan->nclean++] = (rgi_clean){bind, end, bytes / 4};
    end += bytes;
    if (end > plan->memory->reserved)
      return broken(e, NULL, "no bytes are left for a copy of lengths",
                    plan->bindable[bind].info.name);
  }
  for (int32_t i = 0; i < plan->nstep; i++)
    for (int32_t k = 0; k < plan->step[i].nin; k++)
      for (int32_t c = 0; c < plan->nclean; c++)
        if (plan->step[i].place[k].bind == plan->clean[c].bind)
          plan->step[i].place[k] =
              (rgi_place){RGI_AT_SAVED, plan->clean[c].offset + plan->step[i].place[k].offset};
  return RG_OK;
}

/* What happens to the caller's tensors in either direction. */
static void note_uses(rg_plan *plan) {
  for (int32_t i = 0; i < plan->nclean; i++) plan->bindable[plan->clean[i].bind].read[0] = true;
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *step = &plan->step[i];
    for (int32_t k = 0; k < step->nin + step->nout; k++) {
      if (step->place[k].bind < 0) continue;
      rgi_bindable *b = &plan->bindable[step->place[k].bind];
      (k < step->nin ? b->read : b->written)[i >= plan->nforward] = true;
    }
  }
}

rg_status rgi_plan_steps(rg_plan *plan, rg_error *e) {
  RGI_TRY(list_bindable(plan, e));
  RGI_TRY(list_steps(plan, e));
  RGI_TRY(list_checks(plan, e));
  if (plan->memory->reserved) RGI_TRY(list_clean(plan, e));
  note_uses(plan);
  return RG_OK;
}
