/* passes/split.c: cuts the forward graph into groups of KV heads by views.

   A node is cut if its op's port table names head axes and every one of them divides by the number
   of groups. Nodes are taken in runs: whatever can run uncut first, then all cut nodes that can
   follow without an uncut one between, group after group, so that memory of one group serves the
   next. Tensors that come from outside a run are sliced, those that leave it are joined: neither
   moves a byte.
 */
#include "passes.h"
#include <stdio.h>
#include <string.h>

typedef struct splitter {
  const rgi_graph *from;
  rgi_graph *to; /* starts with the tensors of `from`, ids unchanged */
  int groups;
  bool *cut;    /* per node of from */
  bool *placed; /* per node of from */
  int *axis;    /* per tensor of from: the head axis its parts are cut on, or -1: no parts yet */
  int *part;    /* [tensor][group]: id in `to`, or -1 */
  bool *whole;  /* per tensor: exists in `to` as one piece */
} splitter;

static bool has_heads(const rg_port *port) {
  return port->head_axis >= 0;
}

static int smallest_head_extent(const rgi_graph *g) {
  int64_t least = 0;
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    for (int p = 0; p < node->op->nin; p++) {
      if (!has_heads(&node->op->in[p])) continue;
      for (int i = node->in_begin[p]; i < node->in_begin[p + 1]; i++) {
        if (node->in[i] < 0) continue;
        int64_t extent = g->tensor[node->in[i]].dim[node->op->in[p].head_axis].c;
        if (least == 0 || extent < least) least = extent;
      }
    }
  }
  return (int)least;
}

static bool divides(const rgi_graph *g, const rgi_node *node, int groups) {
  bool any = false;
  for (int p = 0; p < node->op->nin; p++) {
    if (!has_heads(&node->op->in[p])) continue;
    for (int i = node->in_begin[p]; i < node->in_begin[p + 1]; i++) {
      if (node->in[i] < 0) continue;
      any = true;
      if (g->tensor[node->in[i]].dim[node->op->in[p].head_axis].c % groups) return false;
    }
  }
  for (int p = 0; p < node->op->nout; p++)
    if (!has_heads(&node->op->out[p])) return false; /* an output all heads would write */
  return any;
}

static int part_of(const splitter *s, int t, int group) {
  return s->part[(int64_t)t * s->groups + group];
}

/* A node of `op` with its ids filled in; its outputs (created here, named `names`) get their
 * shapes. */
static int add_view(splitter *s, const char *op_name, const rg_value *attr, const int *in, int nin,
                    int out, rg_error *e, rg_status *status) {
  rgi_graph *g = s->to;
  char *name = rgi_format(g->arena, "%s.%s", g->tensor[out].name, op_name);
  int n = name ? rgi_add_node(g, name, rgi_find_op(g->ctx, op_name), &nin, &(int){1}, attr) : -1;
  if (n < 0) {
    *status = rgi_nomem(e);
    return -1;
  }
  rgi_node *node = &g->node[n];
  memcpy(node->in, in, (size_t)nin * sizeof *in);
  node->out[0] = out;
  node->kind = RGI_GLUE;
  *status = rgi_infer_node(g, n, NULL, e);
  return n;
}

static int add_part(splitter *s, int t, int group) {
  rgi_tensor copy = s->from->tensor[t];
  copy.name = rgi_format(s->to->arena, "%s.g%d", copy.name, group);
  copy.base = -1;
  copy.producer = -1;
  int id = copy.name ? rgi_add_tensor(s->to, &copy) : -1;
  s->part[(int64_t)t * s->groups + group] = id;
  return id;
}

/* The parts of t along `axis`, joined into t itself. */
static rg_status make_whole(splitter *s, int t, rg_error *e) {
  if (s->whole[t]) return RG_OK;
  rg_value axis = {.i = s->axis[t], .set = true};
  rg_status status;
  s->whole[t] = true;
  add_view(s, "join", &axis, &s->part[(int64_t)t * s->groups], s->groups, t, e, &status);
  return status;
}

/* The slice of t for one group; made once. */
static rg_status make_part(splitter *s, int t, int axis, int group, int *out, rg_error *e) {
  rgi_graph *g = s->to;
  if (s->axis[t] == axis && part_of(s, t, group) >= 0) {
    *out = part_of(s, t, group);
    return RG_OK;
  }
  if (s->axis[t] >= 0 && s->axis[t] != axis)
    return rgi_fail(e, RG_E_POLICY, "/split_heads", g->tensor[t].name,
                    "\"%s\" is read with its heads on axis %d and on axis %d; such a graph cannot "
                    "be cut by heads",
                    g->tensor[t].name, s->axis[t], axis);
  s->axis[t] = axis;
  int id = add_part(s, t, group);
  if (id < 0) return rgi_nomem(e);
  int64_t size = g->tensor[t].dim[axis].c / s->groups;
  rg_value attr[] = {{.i = axis, .set = true},
                     {.i = group * size, .set = true},
                     {.i = (group + 1) * size, .set = true}};
  rg_status status;
  add_view(s, "slice", attr, &t, 1, id, e, &status);
  *out = id;
  return status;
}

/* A copy of node n of `from`; with group >= 0 for that group. */
static rg_status place(splitter *s, int n, int group, rg_error *e) {
  const rgi_node *old = &s->from->node[n];
  rgi_graph *g = s->to;
  int nin[64], nout[64];
  for (int p = 0; p < old->op->nin; p++) nin[p] = old->in_begin[p + 1] - old->in_begin[p];
  for (int p = 0; p < old->op->nout; p++) nout[p] = old->out_begin[p + 1] - old->out_begin[p];
  int32_t *in = rgi_alloc_n(g->arena, (size_t)rgi_nin(old) + 1, sizeof *in);
  if (!in) return rgi_nomem(e);
  for (int p = 0; p < old->op->nin; p++)
    for (int i = old->in_begin[p]; i < old->in_begin[p + 1]; i++) {
      in[i] = old->in[i];
      if (in[i] < 0) continue;
      if (group >= 0 && has_heads(&old->op->in[p]))
        RGI_TRY(make_part(s, in[i], old->op->in[p].head_axis, group, &in[i], e));
      else
        RGI_TRY(make_whole(s, in[i], e));
    }
  char *name = group < 0 ? rgi_strdup(g->arena, old->name)
                         : rgi_format(g->arena, "%s.g%d", old->name, group);
  int m = name ? rgi_add_node(g, name, old->op, nin, nout, old->attr) : -1;
  if (m < 0) return rgi_nomem(e);
  rgi_node *node = &g->node[m];
  memcpy(node->in, in, (size_t)rgi_nin(old) * sizeof *in);
  node->origin = old->origin;
  node->group = group;
  node->rank = n;
  node->kind = old->kind;
  for (int p = 0; p < old->op->nout; p++)
    for (int i = old->out_begin[p]; i < old->out_begin[p + 1]; i++) {
      int t = old->out[i];
      if (t >= 0 && group >= 0) {
        s->axis[t] = old->op->out[p].head_axis;
        t = add_part(s, t, group);
        if (t < 0) return rgi_nomem(e);
      } else if (t >= 0) {
        s->whole[t] = true;
      }
      g->node[m].out[i] = t;
    }
  RGI_TRY(rgi_infer_node(g, m, NULL, e));
  return RG_OK;
}

/* All producers placed, or cut nodes of the run being gathered (in_run may be NULL). */
static bool ready(const splitter *s, int n, const bool *in_run) {
  const rgi_node *node = &s->from->node[n];
  for (int i = 0; i < rgi_nin(node); i++) {
    int from = node->in[i] < 0 ? -1 : s->from->tensor[node->in[i]].producer;
    if (from >= 0 && !s->placed[from] && !(in_run && in_run[from])) return false;
  }
  return true;
}

static rg_status place_all(splitter *s, rg_error *e) {
  int left = s->from->nnode;
  bool *in_run = rgi_alloc_n(s->to->arena, (size_t)s->from->nnode, sizeof *in_run);
  if (!in_run) return rgi_nomem(e);
  while (left > 0) {
    for (int n = 0; n < s->from->nnode;
         n++) { /* nodes are sorted: one sweep takes all uncut ones that are ready */
      if (s->placed[n] || s->cut[n] || !ready(s, n, NULL)) continue;
      RGI_TRY(place(s, n, -1, e));
      s->placed[n] = true;
      left--;
    }
    memset(in_run, 0, (size_t)s->from->nnode * sizeof *in_run);
    for (int n = 0; n < s->from->nnode; n++)
      in_run[n] = !s->placed[n] && s->cut[n] && ready(s, n, in_run);
    for (int group = 0; group < s->groups; group++)
      for (int n = 0; n < s->from->nnode; n++)
        if (in_run[n]) RGI_TRY(place(s, n, group, e));
    for (int n = 0; n < s->from->nnode; n++)
      if (in_run[n]) s->placed[n] = true, left--;
  }
  for (int i = 0; i < s->from->noutput; i++) RGI_TRY(make_whole(s, s->from->output[i].tensor, e));
  return RG_OK;
}

rg_status rgi_split_heads(const rgi_graph *forward, int heads, rgi_graph **out, rg_error *e) {
  *out = NULL;
  rgi_graph *from = NULL, *g = NULL;
  RGI_TRY(rgi_graph_clone(forward, &from, e));
  rg_status status;
  RGI_GOTO(status, rgi_prune(from, e), done);
  if (heads == 0) {
    *out = from;
    return RG_OK;
  }
  const rgi_io *state = rgi_state_of(from, -1);
  if (state) {
    status = rgi_fail(e, RG_E_POLICY, "/split_heads", NULL,
                      "a graph with state ('%s') is not cut into groups of heads", state->name);
    goto done;
  }
  int kv = smallest_head_extent(from);
  if (kv == 0) {
    status = rgi_fail(e, RG_E_POLICY, "/split_heads", NULL,
                      "the graph has no node that works head by head");
    goto done;
  }
  if (heads < 1 || kv % heads) {
    status = rgi_fail(e, RG_E_POLICY, "/split_heads", NULL,
                      "%d KV heads do not divide into groups of %d; give a divisor of %d", kv,
                      heads, kv);
    goto done;
  }
  RGI_GOTO(status, rgi_graph_clone(from, &g, e), done);
  g->nnode = 0; /* tensors, inputs, outputs and origins stay; nodes are placed anew */
  g->groups = kv / heads;
  splitter s = {.from = from, .to = g, .groups = kv / heads};
  size_t nt = (size_t)from->ntensor;
  s.cut = rgi_alloc_n(g->arena, (size_t)from->nnode, sizeof *s.cut);
  s.placed = rgi_alloc_n(g->arena, (size_t)from->nnode, sizeof *s.placed);
  s.axis = rgi_alloc_n(g->arena, nt, sizeof *s.axis);
  s.part = rgi_alloc_n(g->arena, nt * (size_t)s.groups, sizeof *s.part);
  s.whole = rgi_alloc_n(g->arena, nt, sizeof *s.whole);
  if (!s.cut || !s.placed || !s.axis || !s.part || !s.whole) {
    status = rgi_nomem(e);
    goto done;
  }
  for (int n = 0; n < from->nnode; n++)
    s.cut[n] = s.groups > 1 && divides(from, &from->node[n], s.groups);
  for (int t = 0; t < from->ntensor; t++) {
    s.axis[t] = -1;
    s.whole[t] = from->tensor[t].producer < 0;
    for (int i = 0; i < s.groups; i++) s.part[t * s.groups + i] = -1;
  }
  RGI_GOTO(status, place_all(&s, e), done);
  RGI_GOTO(status, rgi_compact(g, e), done);
  RGI_GOTO(status, rgi_verify(g, "split", e), done);
  *out = g;
  g = NULL;
done:
  rgi_graph_destroy(g);
  rgi_graph_destroy(from);
  return status;
}
