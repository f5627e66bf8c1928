/* graph/infer.c: from ports and attributes to shapes and dtypes, the same for every
 * op; see op.h for the notation. */
#include "ir.h"
#include <ctype.h>
#include <stdio.h>
#include <string.h>

enum { MOST_VARIABLES = 32, MOST_AXIS_TEXT = 64 };

typedef struct variable {
  char name[24];
  rgi_dim value;
  const char *port; /* that fixed it, for messages */
} variable;

typedef struct inference {
  rgi_graph *g;
  rgi_node *node;
  const char *pointer;
  rg_error *e;
  variable var[MOST_VARIABLES];
  int nvar;
  int ellipsis; /* a tensor on a "..." port, or -1 */
  const char *ellipsis_port;
  int dtype_of[128]; /* by type letter; -1: open */
  const char *dtype_port[128];
} inference;

static rg_status fail(inference *s, rg_status status, const char *side, const rg_port *port,
                      const char *text) {
  char where[256];
  snprintf(where, sizeof where, "%s%s%s%s%s", s->pointer ? s->pointer : "",
           s->pointer && port ? "/" : "", s->pointer && port ? side : "",
           s->pointer && port ? "/" : "", s->pointer && port ? port->name : "");
  return rgi_fail(s->e, status, where, s->node->name, "%s", text);
}

static const char *shape_text(const rgi_tensor *t, char *buffer, size_t size) {
  size_t n = (size_t)snprintf(buffer, size, "[");
  char axis[96];
  for (int i = 0; i < t->rank && n < size; i++)
    n += (size_t)snprintf(buffer + n, size - n, "%s%s", i ? ", " : "",
                          rgi_dim_text(t->dim[i], axis, sizeof axis));
  if (n < size) snprintf(buffer + n, size - n, "]");
  return buffer;
}

static variable *find(inference *s, const char *name) {
  for (int i = 0; i < s->nvar; i++)
    if (strcmp(s->var[i].name, name) == 0) return &s->var[i];
  return NULL;
}

static bool lookup(void *user, const char *name, rgi_dim *out) {
  inference *s = user;
  variable *v = find(s, name);
  if (v) {
    *out = v->value;
    return true;
  }
  const int i = rgi_attribute(s->node->op, name);
  if (i < 0 || s->node->op->attrs[i].type != RG_ATTR_INT) return false;
  *out = rgi_dim_of(s->node->attr[i].i);
  return true;
}

/* Copies axis `i` of a shape text such as "T,H,D" into buffer; false past the end. */
static bool axis_text(const char *shape, int i, char buffer[MOST_AXIS_TEXT]) {
  for (; i > 0; i--) {
    shape = strchr(shape, ',');
    if (!shape) return false;
    shape++;
  }
  if (!*shape) return false;
  size_t n = strcspn(shape, ",");
  if (n >= MOST_AXIS_TEXT) n = MOST_AXIS_TEXT - 1;
  memcpy(buffer, shape, n);
  buffer[n] = 0;
  return true;
}

static int axis_count(const char *shape) {
  int n = *shape ? 1 : 0;
  for (; *shape; shape++) n += *shape == ',';
  return n;
}

static bool plain_name(const char *text) {
  if (!isalpha((unsigned char)*text)) return false;
  for (; *text; text++)
    if (!isalnum((unsigned char)*text) && *text != '_') return false;
  return true;
}

static rg_status mismatch(inference *s, const rg_port *port, const rgi_tensor *t, int axis,
                          rgi_dim want, const char *because) {
  char text[512], shape[192], have[96], expected[96];
  snprintf(text, sizeof text,
           "'%s' has shape %s, port %s of %s takes [%s]: axis %d is %s, expected %s (%s)", t->name,
           shape_text(t, shape, sizeof shape), port->name, s->node->op->name, port->shape, axis,
           rgi_dim_text(t->dim[axis], have, sizeof have),
           rgi_dim_text(want, expected, sizeof expected), because);
  return fail(s, RG_E_SHAPE, "in", port, text);
}

static rg_status input_shape(inference *s, const rg_port *port, const rgi_tensor *t, int id,
                             bool expressions) {
  rgi_tensor values;
  if (strcmp(port->shape, "*") == 0) return RG_OK;
  if (t->paired && port->flags & RG_PORT_PAIR) {
    values = *t;
    values.dim[0] = rgi_dim_of(t->dim[0].c / 2);
    t = &values;
  }
  if (strcmp(port->shape, "...") == 0) {
    if (expressions) return RG_OK;
    if (s->ellipsis < 0) {
      s->ellipsis = id;
      s->ellipsis_port = port->name;
      return RG_OK;
    }
    const rgi_tensor *other = &s->g->tensor[s->ellipsis];
    char text[512], a[192], b[192];
    bool same = t->rank == other->rank;
    for (int i = 0; i < t->rank && same; i++)
      same = rgi_dim_equal(t->dim[i], other->dim[i]) ||
             !(rgi_dim_known(t->dim[i]) && rgi_dim_known(other->dim[i]));
    if (same) return RG_OK;
    snprintf(text, sizeof text,
             "'%s' has shape %s, but '%s' on port %s has %s; they must be the same", t->name,
             shape_text(t, a, sizeof a), other->name, s->ellipsis_port,
             shape_text(other, b, sizeof b));
    return fail(s, t->rank == other->rank ? RG_E_SHAPE : RG_E_RANK, "in", port, text);
  }
  int rank = axis_count(port->shape);
  if (t->rank != rank) {
    char text[512], a[192];
    snprintf(text, sizeof text, "'%s' has %d axes, %s; port %s of %s takes %d: [%s]", t->name,
             t->rank, shape_text(t, a, sizeof a), port->name, s->node->op->name, rank, port->shape);
    return fail(s, RG_E_RANK, "in", port, text);
  }
  for (int i = 0; i < rank; i++) {
    char axis[MOST_AXIS_TEXT];
    axis_text(port->shape, i, axis);
    if (plain_name(axis) == expressions) continue;
    if (expressions) {
      rgi_dim want;
      RGI_TRY(rgi_dim_parse(s->g->arena, axis, lookup, s, &want, s->e));
      if (rgi_dim_known(want) && rgi_dim_known(t->dim[i]) && want.c != t->dim[i].c) {
        char because[96];
        snprintf(because, sizeof because, "which is %s here", axis);
        return mismatch(s, port, t, i, want, because);
      }
      continue;
    }
    variable *v = find(s, axis);
    if (!v) {
      if (s->nvar == MOST_VARIABLES)
        return fail(s, RG_E_INTERNAL, "in", port, "the op has too many shape variables");
      v = &s->var[s->nvar++];
      snprintf(v->name, sizeof v->name, "%.23s", axis);
      v->value = t->dim[i];
      v->port = port->name;
    } else if (!rgi_dim_equal(v->value, t->dim[i])) {
      if (rgi_dim_known(v->value) && rgi_dim_known(t->dim[i])) {
        char because[96];
        snprintf(because, sizeof because, "%.24s as on port %.40s", axis, v->port);
        return mismatch(s, port, t, i, v->value, because);
      }
      if (rgi_dim_known(t->dim[i])) v->value = t->dim[i]; /* the known one says more */
    }
  }
  return RG_OK;
}

static const char *dtype_set(uint32_t set, char *buffer, size_t size) {
  size_t n = 0;
  buffer[0] = 0;
  for (int d = 0; d < RG_DTYPE_COUNT; d++)
    if (set & RG_D(d) && n < size)
      n += (size_t)snprintf(buffer + n, size - n, "%s%s", n ? ", " : "", rg_dtype_name(d));
  return buffer;
}

static rg_status input_dtype(inference *s, const rg_port *port, const rgi_tensor *t) {
  char text[512], set[64];
  if (!(port->dtypes & RG_D(t->dtype))) {
    snprintf(text, sizeof text, "'%s' is %s; port %s of %s takes %s", t->name,
             rg_dtype_name(t->dtype), port->name, s->node->op->name,
             dtype_set(port->dtypes, set, sizeof set));
    return fail(s, RG_E_DTYPE, "in", port, text);
  }
  int letter = port->type & 127;
  if (!letter) return RG_OK;
  if (s->dtype_of[letter] < 0) {
    s->dtype_of[letter] = (int)t->dtype;
    s->dtype_port[letter] = port->name;
  } else if (s->dtype_of[letter] != (int)t->dtype) {
    snprintf(text, sizeof text, "'%s' is %s, but port %s has %s; these ports must have one dtype",
             t->name, rg_dtype_name(t->dtype), s->dtype_port[letter],
             rg_dtype_name((rg_dtype)s->dtype_of[letter]));
    return fail(s, RG_E_DTYPE, "in", port, text);
  }
  return RG_OK;
}

static rg_status inputs(inference *s) {
  const rgi_node *n = s->node;
  const rg_op *op = n->op;
  for (int pass = 0; pass < 2; pass++) {
    for (int p = 0; p < op->nin; p++) {
      const rg_port *port = &op->in[p];
      int count = n->in_begin[p + 1] - n->in_begin[p];
      bool missing = count == 0 || (!(port->flags & RG_PORT_LIST) && n->in[n->in_begin[p]] < 0);
      if (missing && !(port->flags & RG_PORT_OPTIONAL)) {
        char text[256];
        snprintf(text, sizeof text, "%s needs an input on port '%s' [%s]", op->name, port->name,
                 port->shape);
        return fail(s, RG_E_KEY, "in", NULL, text);
      }
      for (int i = n->in_begin[p]; i < n->in_begin[p + 1]; i++) {
        if (n->in[i] < 0) continue;
        const rgi_tensor *t = &s->g->tensor[n->in[i]];
        if (pass == 0) RGI_TRY(input_dtype(s, port, t));
        RGI_TRY(input_shape(s, port, t, n->in[i], pass == 1));
      }
    }
  }
  return RG_OK;
}

static rg_status output_shape(inference *s, const rg_port *port, rgi_tensor *t) {
  if (strcmp(port->shape, "...") == 0) {
    if (s->ellipsis < 0)
      return fail(s, RG_E_INTERNAL, "out", port, "no input says this output's shape");
    const rgi_tensor *like = &s->g->tensor[s->ellipsis];
    t->rank = like->rank;
    memcpy(t->dim, like->dim, sizeof t->dim);
    return RG_OK;
  }
  t->rank = axis_count(port->shape);
  for (int i = 0; i < t->rank; i++) {
    char axis[MOST_AXIS_TEXT];
    axis_text(port->shape, i, axis);
    RGI_TRY(rgi_dim_parse(s->g->arena, axis, lookup, s, &t->dim[i], s->e));
  }
  return RG_OK;
}

/* The gradient of a pair is one. */
static void pair_up(const inference *s, const rg_port *port, rgi_tensor *t) {
  const int x = rgi_in_port(s->node->op, port->name + strlen("d."));
  const int32_t of = x < 0 ? -1 : rgi_in(s->node, x);
  t->paired = of >= 0 && s->g->tensor[of].paired;
  if (t->paired) t->dim[0] = rgi_dim_of(2 * t->dim[0].c);
}

static rg_status output_dtype(inference *s, const rg_port *port, rgi_tensor *t) {
  int letter = port->type & 127;
  int dtype = letter ? s->dtype_of[letter] : -1;
  /* chosen by autodiff: the tensor's own dtype, or fp32 for a sum */
  if (port->flags & RG_PORT_GRAD) {
    if (t->dtype != RG_F32 && dtype >= 0 && (int)t->dtype != dtype)
      return fail(s, RG_E_INTERNAL, "out", port,
                  "a gradient has neither its tensor's dtype nor fp32");
    return RG_OK;
  }
  if (dtype < 0) {
    dtype = 0;
    while (dtype < RG_DTYPE_COUNT && !(port->dtypes & RG_D(dtype))) dtype++;
  }
  t->dtype = (rg_dtype)dtype;
  return RG_OK;
}

static rg_status check_size(inference *s, const rgi_tensor *t) {
  int64_t elements = 1;
  for (int i = 0; i < t->rank; i++) {
    if (!rgi_dim_known(t->dim[i])) continue;
    if (t->dim[i].c < 0 || !rgi_mul(elements, t->dim[i].c, &elements) ||
        elements > RGI_MOST_ELEMENTS) {
      char text[384], shape[192];
      snprintf(text, sizeof text,
               "tensor '%s' would have shape %s; at most 2^40 elements and no negative extents fit",
               t->name, shape_text(t, shape, sizeof shape));
      return fail(s, t->dim[i].c < 0 ? RG_E_SHAPE : RG_E_OVERFLOW, "out", NULL, text);
    }
  }
  return RG_OK;
}

/* The tensor on "acc.NAME" for the gradient port "d.NAME", or -1; element i of a list goes with
 * element i. */
static int accumulator(const rgi_node *n, const rg_port *port, int element) {
  char name[64];
  snprintf(name, sizeof name, "acc.%s", port->name + 2);
  int p = rgi_in_port(n->op, name);
  if (p < 0 || n->in_begin[p] + element >= n->in_begin[p + 1]) return -1;
  return n->in[n->in_begin[p] + element];
}

/* Element i of the node's outputs is what becomes of the state that the in-port of its name reads:
 * the same bytes, seen alike. */
static rg_status next_version(inference *s, const rg_port *port, int i, rgi_tensor *t) {
  const rgi_node *n = s->node;
  for (int k = 0; k < rgi_nin(n); k++) {
    int p;
    if (rgi_next_in(n, k, &p) != n->out[i]) continue;
    const rgi_tensor *old = &s->g->tensor[n->in[k]];
    t->dtype = old->dtype;
    t->rank = old->rank;
    t->base = rgi_owner(s->g, n->in[k]);
    t->offset = old->base >= 0 ? old->offset : 0;
    memcpy(t->dim, old->dim, sizeof t->dim);
    memcpy(t->stride, old->stride, sizeof t->stride);
    return RG_OK;
  }
  return fail(s, RG_E_INTERNAL, "out", port, "no port says which state this is the next of");
}

static rg_status outputs(inference *s) {
  rgi_node *n = s->node;
  for (int p = 0; p < n->op->nout; p++) {
    const rg_port *port = &n->op->out[p];
    for (int i = n->out_begin[p]; i < n->out_begin[p + 1]; i++) {
      if (n->out[i] < 0) continue;
      rgi_tensor *t = &s->g->tensor[n->out[i]];
      if (port->flags & RG_PORT_STATE) {
        RGI_TRY(next_version(s, port, i, t));
        continue;
      }
      RGI_TRY(output_dtype(s, port, t));
      if (port->flags &
          RG_PORT_LIST) { /* element i has the shape of its forward input, element i of the list */
        char name[64];
        snprintf(name, sizeof name, "%s",
                 strncmp(port->name, "d.", 2) == 0 ? port->name + 2 : port->name);
        int q = rgi_in_port(n->op, name), e = i - n->out_begin[p];
        if (q < 0 || n->in_begin[q] + e >= n->in_begin[q + 1])
          return fail(s, RG_E_INTERNAL, "out", port, "a list output has no input list to follow");
        const rgi_tensor *like = &s->g->tensor[n->in[n->in_begin[q] + e]];
        t->rank = like->rank;
        memcpy(t->dim, like->dim, sizeof t->dim);
      } else {
        RGI_TRY(output_shape(s, port, t));
      }
      if (port->flags & RG_PORT_PAIR) pair_up(s, port, t);
      RGI_TRY(check_size(s, t));
      t->base = -1;
      t->offset = 0;
      if (s->g->bound) rgi_dense_strides(t);
      if (port->flags & RG_PORT_GRAD) {
        int acc = accumulator(n, port, i - n->out_begin[p]);
        if (acc >= 0) {
          const rgi_tensor *sum = &s->g->tensor[acc];
          t->base = rgi_owner(s->g, acc);
          t->offset = sum->offset;
          memcpy(t->stride, sum->stride, sizeof t->stride);
        }
      }
    }
  }
  return RG_OK;
}

rg_status rgi_node_call(const rgi_graph *g, int n, rgi_arena *a, rg_call *out, rg_error *e) {
  const rgi_node *node = &g->node[n];
  int nin = rgi_nin(node), nout = rgi_nout(node);
  rg_arg *arg = rgi_alloc_n(a, (size_t)(nin + nout), sizeof *arg);
  if (!arg) return rgi_nomem(e);
  for (int i = 0; i < nin + nout; i++) {
    int id = i < nin ? node->in[i] : node->out[i - nin];
    if (id < 0) {
      arg[i].rank = -1;
      continue;
    }
    const rgi_tensor *t = &g->tensor[id];
    arg[i].dtype = t->dtype;
    arg[i].rank = t->rank;
    int64_t inside = t->base >= 0 ? t->offset * (int64_t)rg_dtype_size(t->dtype) : 0;
    arg[i].align = (int32_t)(inside % 16 ? inside & -inside & 15 : 16);
    for (int d = 0; d < t->rank; d++) {
      arg[i].dim[d] = rgi_dim_known(t->dim[d]) ? t->dim[d].c : RG_DIM_FREE;
      arg[i].stride[d] = t->stride[d];
    }
  }
  *out = (rg_call){.op = node->op,
                   .node = node->name,
                   .attr = node->attr,
                   .in = arg,
                   .in_begin = node->in_begin,
                   .out = arg + nin,
                   .out_begin = node->out_begin,
                   .threads = 1,
                   .isa = g->ctx->isa,
                   .error = e};
  return RG_OK;
}

rg_status rgi_infer_node(rgi_graph *g, int n, const char *pointer, rg_error *e) {
  inference s = {.g = g, .node = &g->node[n], .pointer = pointer, .e = e, .ellipsis = -1};
  memset(s.dtype_of, -1, sizeof s.dtype_of);
  const rg_op *op = s.node->op;
  for (int i = 0; i < rgi_nout(s.node); i++)
    if (s.node->out[i] >= 0) g->tensor[s.node->out[i]].producer = n;
  rg_error local = {0};
  rg_error *outer = e;
  s.e = &local;
  rg_status status = inputs(&s);
  if (status == RG_OK && op->rules && op->rules->infer) {
    status = op->rules->infer(g, n, pointer, &local);
    for (int i = 0; i < rgi_nout(s.node) && status == RG_OK; i++)
      if (s.node->out[i] >= 0) status = check_size(&s, &g->tensor[s.node->out[i]]);
  } else if (status == RG_OK) {
    status = outputs(&s);
  }
  if (status == RG_OK && op->check) {
    rg_call call;
    status = rgi_node_call(g, n, g->arena, &call, &local);
    if (status == RG_OK) {
      call.error = &local;
      status = op->check(&call, &local);
    }
  }
  if (status == RG_OK || !outer || outer->status != RG_OK) return status;
  *outer = local; /* an op's own message lacks the place */
  if (!outer->pointer[0] && pointer) snprintf(outer->pointer, sizeof outer->pointer, "%s", pointer);
  if (!outer->node[0]) snprintf(outer->node, sizeof outer->node, "%.127s", s.node->name);
  return status;
}
