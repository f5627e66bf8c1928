/* passes/fuse.c: see fuse.h.

   Works on a copy: nodes are appended, then laid into the old order. Nodes are taken apart
   (fuse_apart.c) or joined (fuse_join.c) first, then casts taken over.
 */
#include "fuser.h"
#include <stdio.h>
#include <string.h>

/* ---- looking ---- */

int32_t rgi_fuse_readers(const rgi_graph *g, int32_t n, int32_t t, int *count) {
  int32_t first = g->nnode;
  *count = 0;
  for (int32_t k = g->nnode - 1; k > n; k--)
    for (int i = 0; i < rgi_nin(&g->node[k]); i++)
      if (g->node[k].in[i] == t) first = k, ++*count;
  for (int i = 0; i < g->ninput; i++) *count += g->input[i].grad == t;
  return first;
}

const rgi_fusing *rgi_fusing_of(const rg_op *op) {
  return op->rules ? op->rules->fusing : NULL;
}

rg_status rgi_fuse_bytes(const rgi_fuser *f, const rgi_graph *g, int32_t n, double *sum,
                         rg_error *e) {
  rg_call call;
  rg_cost cost = {0};
  RGI_TRY(rgi_node_call(g, n, f->scratch, &call, e));
  if (g->node[n].op->cost) g->node[n].op->cost(&call, &cost);
  *sum += cost.bytes;
  return RG_OK;
}

/* ---- building ---- */

rg_status rgi_fuse_add(rgi_fuser *f, int32_t like, const char *suffix, const rg_op *op,
                       const rg_value *attr, const int32_t *in, const int *nin, const int32_t *out,
                       const int *nout, int32_t place, int32_t after, rg_error *e) {
  rgi_graph *g = f->to;
  const rgi_node *old = &f->g->node[like];
  char *name = rgi_format(g->arena, "%s.%s", old->name, suffix);
  int m = name ? rgi_add_node(g, name, op, nin, nout, attr) : -1;
  if (m < 0) return rgi_nomem(e);
  rgi_node *node = &g->node[m];
  memcpy(node->in, in, (size_t)rgi_nin(node) * sizeof *in);
  memcpy(node->out, out, (size_t)rgi_nout(node) * sizeof *out);
  node->origin = old->origin;
  node->group = old->group;
  node->rank = old->rank;
  node->backward = old->backward;
  node->kind = old->kind;
  node->after = after;
  f->before[m] = place;
  return rgi_infer_node(g, m, NULL, e);
}

int32_t rgi_fuse_in(const rgi_node *n, const char *name, int k) {
  const int p = rgi_in_port(n->op, name);
  if (p < 0) return -1;
  if (!(n->op->in[p].flags & RG_PORT_LIST)) k = 0;
  return n->in_begin[p] + k < n->in_begin[p + 1] ? n->in[n->in_begin[p] + k] : -1;
}
int32_t rgi_fuse_out(const rgi_node *n, const char *name, int k) {
  const int p = rgi_out_port(n->op, name);
  if (p < 0) return -1;
  return n->out_begin[p] + k < n->out_begin[p + 1] ? n->out[n->out_begin[p] + k] : -1;
}

rg_status rgi_fuse_move(rgi_fuser *f, int32_t n, int off, int on, int32_t t, rg_error *e) {
  rgi_node *node = &f->to->node[n];
  int32_t *in = rgi_alloc_n(f->to->arena, (size_t)rgi_nin(node) + 1, sizeof *in);
  int32_t *begin = rgi_alloc_n(f->to->arena, (size_t)node->op->nin + 1, sizeof *begin);
  if (!in || !begin) return rgi_nomem(e);
  int32_t at = 0;
  for (int q = 0; q < node->op->nin; q++) {
    begin[q] = at;
    if (q == off) continue;
    if (q == on) in[at++] = t;
    for (int i = node->in_begin[q]; i < node->in_begin[q + 1] && q != on; i++)
      in[at++] = node->in[i];
  }
  begin[node->op->nin] = at;
  node->in = in;
  node->in_begin = begin;
  return RG_OK;
}

/* ---- casts ---- */

/* The port NAME of an in-port "sum.NAME", else NULL. */
static const char *summed(const rg_port *port) {
  return strncmp(port->name, "sum.", 4) == 0 ? port->name + 4 : NULL;
}

static int named_port(const rgi_node *n, const char *kind, const char *name) {
  char text[64];
  snprintf(text, sizeof text, "%s.%s", kind, name);
  return strcmp(kind, "d") == 0 ? rgi_out_port(n->op, text) : rgi_in_port(n->op, text);
}

static bool callers(const rgi_graph *g, int32_t t) {
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].grad == t) return g->tensor[t].base < 0;
  return false;
}

/* Cast c of a sum whose last term node n adds in place: n takes it over. */
static rg_status take_cast(rgi_fuser *f, int32_t c, rg_error *e) {
  const rgi_graph *g = f->g;
  const rgi_node *cast = &g->node[c];
  if (strcmp(cast->op->name, "cast") != 0 || !cast->backward) return RG_OK;
  const int32_t sum = rgi_in(cast, 0), to = cast->out[0], n = g->tensor[sum].producer;
  int count;
  rgi_fuse_readers(g, n < 0 ? 0 : n, sum, &count);
  if (n < 0 || count != 1 || to < 0 || !callers(g, to) || g->tensor[to].dtype == RG_F32)
    return RG_OK;
  const rgi_node *old = &g->node[n];
  const rgi_fusing *fusing = rgi_fusing_of(old->op);
  if (!fusing || !fusing->rounds) return RG_OK;
  for (int q = 0; q < old->op->nin; q++) {
    const char *name = summed(&old->op->in[q]);
    if (!name) continue;
    const int acc = named_port(old, "acc", name), d = named_port(old, "d", name);
    if (acc < 0 || d < 0 || rgi_in(old, acc) < 0 || rgi_out(old, d) != sum) continue;
    rg_call call;
    RGI_TRY(rgi_node_call(g, n, f->scratch, &call, e));
    call.gpu = f->gpu;
    if (!fusing->rounds(&call)) continue;
    RGI_TRY(rgi_fuse_bytes(f, g, n, &f->report->cast_before, e));
    RGI_TRY(rgi_fuse_bytes(f, g, c, &f->report->cast_before, e));
    RGI_TRY(rgi_fuse_move(f, n, acc, q, rgi_in(old, acc), e));
    rgi_node *node = &f->to->node[n];
    node->out[node->out_begin[d]] = to;
    for (int32_t m = 0; m < f->to->nnode; m++)
      if (f->to->node[m].after == sum) f->to->node[m].after = to;
    f->gone[c] = true;
    f->report->casts++;
    RGI_TRY(rgi_infer_node(f->to, n, NULL, e));
    return rgi_fuse_bytes(f, f->to, n, &f->report->cast_after, e);
  }
  return RG_OK;
}

/* ---- the pass ---- */

/* Lays the new nodes into the old order. */
static rg_status reorder(rgi_fuser *f, rg_error *e) {
  rgi_graph *to = f->to;
  const int32_t old = f->g->nnode;
  rgi_node *node = rgi_alloc_n(to->arena, (size_t)to->nnode + 1, sizeof *node);
  if (!node) return rgi_nomem(e);
  int32_t count = 0;
  for (int32_t n = 0; n <= old; n++) {
    for (int32_t m = old; m < to->nnode; m++)
      if (f->before[m] == n) node[count++] = to->node[m];
    if (n < old && !f->gone[n]) node[count++] = to->node[n];
  }
  to->node = node;
  to->nnode = to->node_capacity = count;
  /* producers; parts of joins */
  for (int32_t n = 0; n < count; n++) RGI_TRY(rgi_infer_node(to, n, NULL, e));
  return rgi_prune(to, e);
}

static rg_status fuse_all(rgi_fuser *f, rg_error *e) {
  const rgi_graph *g = f->g;
  int32_t room = g->nnode;
  for (int32_t n = 0; n < g->nnode; n++)
    if (rgi_fusing_of(g->node[n].op) && rgi_fusing_of(g->node[n].op)->part)
      room += rgi_nin(&g->node[n]) + 1;
    else if (rgi_fusing_of(g->node[n].op) && rgi_fusing_of(g->node[n].op)->joined)
      room++;
  f->gone = rgi_alloc_n(f->scratch, (size_t)g->nnode + 1, sizeof *f->gone);
  f->before = rgi_alloc_n(f->scratch, (size_t)room + 1, sizeof *f->before);
  if (!f->again)
    f->report->at = rgi_alloc_n(f->report->arena, (size_t)g->nnode + 1, sizeof *f->report->at);
  if (!f->gone || !f->before || !f->report->at) return rgi_nomem(e);
  if (f->lanes && !f->again) RGI_TRY(rgi_order_find(g, f->scratch, &f->order, e));
  for (int32_t n = 0; n < g->nnode; n++) {
    const rgi_fusing *fusing = rgi_fusing_of(g->node[n].op);
    if (fusing && fusing->part && !f->again) RGI_TRY(rgi_fuse_apart(f, n, fusing, e));
    if (fusing && fusing->joined) RGI_TRY(rgi_fuse_join(f, n, fusing, e));
  }
  for (int32_t n = 0; n < g->nnode && !f->again; n++) RGI_TRY(take_cast(f, n, e));
  return reorder(f, e);
}

rg_status rgi_fuse(const rgi_graph *g, const rg_gpu *gpu, bool lanes, bool split_kv,
                   rgi_graph **out, rgi_fusions **report, rg_error *e) {
  *out = NULL;
  *report = NULL;
  rgi_arena *arena = rgi_arena_create(g->ctx);
  rgi_fuser f = {.g = g,
                 .gpu = gpu,
                 .lanes = lanes,
                 .split_kv = split_kv,
                 .scratch = rgi_arena_create(g->ctx)};
  f.report = arena ? rgi_alloc(arena, sizeof *f.report) : NULL;
  if (f.report) *f.report = (rgi_fusions){.arena = arena};
  rg_status status = f.report && f.scratch ? rgi_graph_clone(g, &f.to, e) : rgi_nomem(e);
  if (status == RG_OK) status = fuse_all(&f, e);
  while (status == RG_OK && f.joints > 0) {
    rgi_graph *once = f.to;
    rgi_fuser more = {.g = once,
                      .gpu = gpu,
                      .split_kv = split_kv,
                      .again = true,
                      .scratch = f.scratch,
                      .report = f.report};
    status = rgi_graph_clone(once, &more.to, e);
    if (status == RG_OK) status = fuse_all(&more, e);
    f.to = more.to;
    f.joints = more.joints;
    rgi_graph_destroy(once);
  }
  if (status == RG_OK) status = rgi_verify(f.to, "fuse", e);
  rgi_arena_destroy(f.scratch);
  if (status != RG_OK) {
    rgi_graph_destroy(f.to);
    rgi_arena_destroy(arena);
    return status;
  }
  *out = f.to;
  *report = f.report;
  return RG_OK;
}

void rgi_fusions_destroy(rgi_fusions *f) {
  if (f) rgi_arena_destroy(f->arena);
}
