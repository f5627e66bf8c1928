/* graph/ir.c: building, copying, ordering and tidying graphs; see ir.h. Inference is
 * in infer.c, checks in verify.c. */
#include "ir.h"
#include <stdio.h>
#include <string.h>

const char *rgi_region_name(rgi_region r) {
  static const char *const name[] = {"nowhere", "input", "output", "saved", "scratch", "host"};
  return name[r];
}

rg_status rgi_graph_create(const rg_context *ctx, const char *name, rgi_graph **out, rg_error *e) {
  *out = NULL;
  rgi_arena *a = rgi_arena_create(ctx);
  rgi_graph *g = a ? rgi_alloc(a, sizeof *g) : NULL;
  if (g) {
    *g = (rgi_graph){.arena = a, .ctx = ctx, .groups = 1};
    g->name = rgi_strdup(a, name);
  }
  if (!g || !g->name) {
    rgi_arena_destroy(a);
    return rgi_nomem(e);
  }
  *out = g;
  return RG_OK;
}

void rgi_graph_destroy(rgi_graph *g) {
  if (g) rgi_arena_destroy(g->arena);
}

/* Room for one more element of an arena-held array: doubles by copying (the old copy dies with the
 * arena). */
static bool grow(rgi_arena *a, void **array, int32_t count, int32_t *capacity, size_t size) {
  if (count < *capacity) return true;
  int32_t larger = *capacity ? *capacity * 2 : 32;
  void *fresh = rgi_alloc_n(a, (size_t)larger, size);
  if (!fresh) return false;
  if (count) memcpy(fresh, *array, (size_t)count * size);
  *array = fresh;
  *capacity = larger;
  return true;
}

int rgi_add_tensor(rgi_graph *g, const rgi_tensor *t) {
  void *array = g->tensor;
  if (!grow(g->arena, &array, g->ntensor, &g->tensor_capacity, sizeof *g->tensor)) return -1;
  g->tensor = array;
  rgi_tensor copy = *t;
  copy.name = rgi_strdup(g->arena, t->name);
  if (!copy.name) return -1;
  g->tensor[g->ntensor] = copy;
  return g->ntensor++;
}

const char *rgi_free_name(rgi_graph *g, const char *name) {
  const char *candidate = name;
  for (int k = 2, t = 0; candidate && t < g->ntensor; t++)
    if (strcmp(g->tensor[t].name, candidate) == 0) {
      candidate = rgi_format(g->arena, "%s~%d", name, k++);
      t = -1;
    }
  return candidate;
}

static bool copy_values(rgi_arena *a, const rg_op *op, const rg_value *from, rg_value *to) {
  for (int i = 0; i < op->nattr; i++) {
    to[i] = from[i];
    if (op->attrs[i].type == RG_ATTR_INTS && from[i].list) {
      to[i].list = rgi_alloc_n(a, (size_t)from[i].i, sizeof(int64_t));
      if (!to[i].list) return false;
      memcpy(to[i].list, from[i].list, (size_t)from[i].i * sizeof(int64_t));
    }
  }
  return true;
}

static int32_t *begins(rgi_arena *a, int nport, const int *count) {
  int32_t *begin = rgi_alloc_n(a, (size_t)nport + 1, sizeof *begin);
  if (begin)
    for (int p = 0; p < nport; p++) begin[p + 1] = begin[p] + count[p];
  return begin;
}

int rgi_add_node(rgi_graph *g, const char *name, const rg_op *op, const int *nin, const int *nout,
                 const rg_value *attr) {
  rgi_arena *a = g->arena;
  void *array = g->node;
  if (!grow(a, &array, g->nnode, &g->node_capacity, sizeof *g->node)) return -1;
  g->node = array;
  rgi_node n = {.op = op, .origin = -1, .group = -1, .after = -1, .rank = g->nnode};
  n.name = rgi_strdup(a, name);
  int32_t *in_begin = begins(a, op->nin, nin), *out_begin = begins(a, op->nout, nout);
  rg_value *values = rgi_alloc_n(a, (size_t)op->nattr, sizeof *values);
  if (!n.name || !in_begin || !out_begin || !values) return -1;
  n.in_begin = in_begin;
  n.out_begin = out_begin;
  n.in = rgi_alloc_n(a, (size_t)rgi_nin(&n), sizeof *n.in);
  n.out = rgi_alloc_n(a, (size_t)rgi_nout(&n), sizeof *n.out);
  if (!n.in || !n.out) return -1;
  for (int i = 0; i < rgi_nin(&n); i++) n.in[i] = -1;
  for (int i = 0; i < rgi_nout(&n); i++) n.out[i] = -1;
  if (attr) {
    if (!copy_values(a, op, attr, values)) return -1;
  } else {
    for (int i = 0; i < op->nattr; i++)
      values[i] =
          (rg_value){.i = op->attrs[i].type == RG_ATTR_FLOAT ? 0 : (int64_t)op->attrs[i].def,
                     .f = op->attrs[i].def};
    for (int i = 0; i < op->nattr; i++)
      if (op->attrs[i].type == RG_ATTR_INTS) values[i].i = 0;
  }
  n.attr = values;
  g->node[g->nnode] = n;
  return g->nnode++;
}

static int port_by_name(const rg_port *port, int n, const char *name) {
  for (int i = 0; i < n; i++)
    if (strcmp(port[i].name, name) == 0) return i;
  return -1;
}
int rgi_in_port(const rg_op *op, const char *name) {
  return port_by_name(op->in, op->nin, name);
}
int rgi_out_port(const rg_op *op, const char *name) {
  return port_by_name(op->out, op->nout, name);
}
int rgi_attribute(const rg_op *op, const char *name) {
  for (int i = 0; i < op->nattr; i++)
    if (strcmp(op->attrs[i].name, name) == 0) return i;
  return -1;
}

static const char FIRST[] = "first.";
const char *rgi_of_first(const char *port) {
  const size_t n = sizeof FIRST - 1;
  return strncmp(port, FIRST, n) == 0 ? port + n : NULL;
}
static int first_by_name(const rg_port *port, int n, const char *name) {
  for (int i = 0; i < n; i++) {
    const char *of = rgi_of_first(port[i].name);
    if (of && strcmp(of, name) == 0) return i;
  }
  return -1;
}
int rgi_first_in_port(const rg_op *op, const char *name) {
  return first_by_name(op->in, op->nin, name);
}
int rgi_first_out_port(const rg_op *op, const char *name) {
  return first_by_name(op->out, op->nout, name);
}

bool rgi_blocks_are_rows(const rgi_node *n) {
  const int stride = rgi_attribute(n->op, "stride");
  return stride >= 0 && n->attr[stride].i == 1;
}

static rgi_io *copy_io(rgi_arena *a, const rgi_io *from, int32_t n) {
  rgi_io *to = rgi_alloc_n(a, (size_t)n, sizeof *to);
  if (!to) return NULL;
  for (int32_t i = 0; i < n; i++) {
    to[i] = from[i];
    to[i].name = rgi_strdup(a, from[i].name);
    if (!to[i].name) return NULL;
  }
  return to;
}

static bool copy_dims(rgi_arena *a, rgi_tensor *t) {
  for (int i = 0; i < t->rank; i++) {
    rgi_dim *d = &t->dim[i];
    if (!d->nterm) continue;
    rgi_term *terms = rgi_alloc_n(a, (size_t)d->nterm, sizeof *terms);
    if (!terms) return false;
    for (int j = 0; j < d->nterm; j++) {
      terms[j] = (rgi_term){.coef = d->term[j].coef, .atom = rgi_strdup(a, d->term[j].atom)};
      if (!terms[j].atom) return false;
    }
    d->term = terms;
  }
  return true;
}

static bool copy_graph(const rgi_graph *from, rgi_graph *to) {
  rgi_arena *a = to->arena;
  to->bound = from->bound;
  to->groups = from->groups;
  for (int t = 0; t < from->ntensor; t++)
    if (rgi_add_tensor(to, &from->tensor[t]) < 0 || !copy_dims(a, &to->tensor[t])) return false;
  for (int n = 0; n < from->nnode; n++) {
    const rgi_node *old = &from->node[n];
    int nin[64], nout[64];
    if (old->op->nin > RGI_COUNT(nin) || old->op->nout > RGI_COUNT(nout)) return false;
    for (int p = 0; p < old->op->nin; p++) nin[p] = old->in_begin[p + 1] - old->in_begin[p];
    for (int p = 0; p < old->op->nout; p++) nout[p] = old->out_begin[p + 1] - old->out_begin[p];
    if (rgi_add_node(to, old->name, old->op, nin, nout, old->attr) < 0) return false;
    rgi_node *fresh = &to->node[n];
    memcpy(fresh->in, old->in, (size_t)rgi_nin(old) * sizeof *old->in);
    memcpy(fresh->out, old->out, (size_t)rgi_nout(old) * sizeof *old->out);
    fresh->origin = old->origin;
    fresh->group = old->group;
    fresh->after = old->after;
    fresh->rank = old->rank;
    fresh->backward = old->backward;
    fresh->kind = old->kind;
  }
  to->input = copy_io(a, from->input, from->ninput);
  to->output = copy_io(a, from->output, from->noutput);
  to->ninput = from->ninput;
  to->noutput = from->noutput;
  to->origin = rgi_alloc_n(a, (size_t)from->norigin, sizeof *to->origin);
  if (!to->input || !to->output || !to->origin) return false;
  to->norigin = from->norigin;
  for (int i = 0; i < from->norigin; i++) {
    to->origin[i] = from->origin[i];
    to->origin[i].name = rgi_strdup(a, from->origin[i].name);
    to->origin[i].pointer = rgi_strdup(a, from->origin[i].pointer ? from->origin[i].pointer : "");
    if (!to->origin[i].name || !to->origin[i].pointer) return false;
  }
  return true;
}

rg_status rgi_graph_clone(const rgi_graph *g, rgi_graph **out, rg_error *e) {
  rgi_graph *copy;
  *out = NULL;
  RGI_TRY(rgi_graph_create(g->ctx, g->name, &copy, e));
  if (!copy_graph(g, copy)) {
    rgi_graph_destroy(copy);
    return rgi_nomem(e);
  }
  *out = copy;
  return RG_OK;
}

/* ---- sizes ---- */

void rgi_dense_strides(rgi_tensor *t) {
  int64_t stride = 1;
  for (int i = t->rank - 1; i >= 0; i--) {
    t->stride[i] = stride;
    stride *= t->dim[i].c;
  }
}

void rgi_tensor_like(rgi_graph *g, int t, const rgi_tensor *like, const rgi_dim *rows) {
  rgi_tensor *y = &g->tensor[t];
  y->dtype = like->dtype;
  y->rank = like->rank;
  memcpy(y->dim, like->dim, sizeof y->dim);
  if (rows) y->dim[0] = *rows;
  y->base = -1;
  y->offset = 0;
  if (g->bound) rgi_dense_strides(y);
}

int64_t rgi_elements(const rgi_tensor *t) {
  int64_t n = 1;
  for (int i = 0; i < t->rank; i++) n *= t->dim[i].c;
  return n;
}

int64_t rgi_bytes(const rgi_tensor *t) {
  return rgi_elements(t) * (int64_t)rg_dtype_size(t->dtype);
}

/* ---- tidying ---- */

rg_status rgi_compact(rgi_graph *g, rg_error *e) {
  int32_t *id = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *id);
  if (!id) return rgi_nomem(e);
  /* mark */
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    for (int i = 0; i < rgi_nin(node); i++)
      if (node->in[i] >= 0) id[node->in[i]] = 1;
    for (int i = 0; i < rgi_nout(node); i++)
      if (node->out[i] >= 0) id[node->out[i]] = 1;
  }
  for (int i = 0; i < g->ninput; i++) {
    id[g->input[i].tensor] = 1;
    if (g->input[i].state) id[g->input[i].next] = 1;
    if (g->input[i].grad >= 0) id[g->input[i].grad] = 1;
  }
  for (int i = 0; i < g->noutput; i++) {
    id[g->output[i].tensor] = 1;
    if (g->output[i].grad >= 0) id[g->output[i].grad] = 1;
  }
  for (int t = 0; t < g->ntensor; t++)
    if (id[t] && g->tensor[t].base >= 0) id[g->tensor[t].base] = 1;
  /* renumber */
  int32_t count = 0;
  for (int t = 0; t < g->ntensor; t++) id[t] = id[t] ? count++ : -1;
  for (int t = 0; t < g->ntensor; t++) {
    if (id[t] < 0) continue;
    rgi_tensor moved = g->tensor[t];
    if (moved.base >= 0) moved.base = id[moved.base];
    if (moved.seqlens >= 0) moved.seqlens = id[moved.seqlens];
    if (moved.grad_of >= 0) moved.grad_of = id[moved.grad_of];
    g->tensor[id[t]] = moved;
  }
  g->ntensor = count;
  for (int n = 0; n < g->nnode; n++) {
    rgi_node *node = &g->node[n];
    for (int i = 0; i < rgi_nin(node); i++)
      if (node->in[i] >= 0) node->in[i] = id[node->in[i]];
    for (int i = 0; i < rgi_nout(node); i++)
      if (node->out[i] >= 0) node->out[i] = id[node->out[i]];
    if (node->after >= 0) node->after = id[node->after];
  }
  for (int i = 0; i < g->ninput; i++) {
    g->input[i].tensor = id[g->input[i].tensor];
    if (g->input[i].state) g->input[i].next = id[g->input[i].next];
    if (g->input[i].grad >= 0) g->input[i].grad = id[g->input[i].grad];
  }
  for (int i = 0; i < g->noutput; i++) {
    g->output[i].tensor = id[g->output[i].tensor];
    if (g->output[i].grad >= 0) g->output[i].grad = id[g->output[i].grad];
  }
  return RG_OK;
}

/* Will a backward that is still to be appended read out-port p of the node? */
static bool backward_reads(const rgi_graph *g, const rgi_node *n, int p) {
  char name[72];
  bool wanted = false;
  for (int i = 0; i < g->ninput; i++)
    wanted = wanted || (g->input[i].want != RGI_GRAD_NONE && g->input[i].grad < 0);
  const rg_op *backward = wanted && n->op->backward ? rgi_find_op(g->ctx, n->op->backward) : NULL;
  snprintf(name, sizeof name, "out.%s", n->op->out[p].name);
  return backward && rgi_in_port(backward, name) >= 0;
}

rg_status rgi_prune(rgi_graph *g, rg_error *e) {
  bool *read = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *read);
  int32_t *place = rgi_alloc_n(g->arena, (size_t)g->nnode, sizeof *place);
  if (!read || !place) return rgi_nomem(e);
  for (int i = 0; i < g->noutput; i++) read[g->output[i].tensor] = true;
  for (int t = 0; t < g->ntensor; t++) /* a backward still to be appended may ask for lengths */
    if (g->tensor[t].seqlens >= 0) read[g->tensor[t].seqlens] = true;
  for (int i = 0; i < g->ninput; i++) {
    if (g->input[i].grad >= 0) read[g->input[i].grad] = true;
    if (g->input[i].state) read[g->input[i].next] = true;
  }
  for (int n = g->nnode - 1; n >= 0; n--) {
    rgi_node *node = &g->node[n];
    bool needed = false;
    for (int i = 0; i < rgi_nout(node); i++)
      needed = needed || (node->out[i] >= 0 && read[node->out[i]]);
    place[n] = needed;
    if (!needed) continue;
    for (int i = 0; i < rgi_nin(node); i++)
      if (node->in[i] >= 0) read[node->in[i]] = true;
    for (int p = 0; p < node->op->nout; p++) {
      if (!(node->op->out[p].flags & RG_PORT_OPTIONAL) || backward_reads(g, node, p)) continue;
      for (int i = node->out_begin[p]; i < node->out_begin[p + 1]; i++)
        if (node->out[i] >= 0 && !read[node->out[i]]) node->out[i] = -1;
    }
  }
  int count = 0;
  for (int n = 0; n < g->nnode; n++) {
    if (!place[n]) continue;
    g->node[count] = g->node[n];
    for (int i = 0; i < rgi_nout(&g->node[count]); i++)
      if (g->node[count].out[i] >= 0) g->tensor[g->node[count].out[i]].producer = count;
    count++;
  }
  g->nnode = count;
  return rgi_compact(g, e);
}
