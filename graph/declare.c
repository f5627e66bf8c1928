/* graph/declare.c: what a spec declares: inputs and state, nodes with their attributes, their ports
 * and the tensors they make. What nodes read is left to elaborate.c: node order in a file is
 * free. */
#include "elaborate.h"
#include <stdio.h>
#include <string.h>

static const rgi_tensor blank = {.base = -1, .producer = -1, .seqlens = -1, .grad_of = -1};

static const char *op_name(const void *list, int i) {
  const rg_op *op = ((const rg_op *const *)list)[i];
  return op->flags & RG_OP_INTERNAL ? NULL : op->name;
}

rg_status rgi_no_such(rgi_builder *b, rg_status code, const char *pointer, const char *node,
                      const char *owner, const char *kind, const char *got,
                      const char *(*name)(const void *list, int i), const void *list, int n) {
  rgi_shown shown, hint;
  const char **known = rgi_alloc_n(b->g->arena, (size_t)n, sizeof *known);
  int count = 0;
  if (!known) return rgi_nomem(b->e);
  for (int i = 0; i < n; i++)
    if ((known[count] = name(list, i))) count++;
  return rgi_fail(b->e, code, pointer, node, "%s%s %s '%s'%s%s", owner ? owner : "there is",
                  owner ? " has no" : " no", kind, rgi_show(&shown, got),
                  rgi_hint(&hint, got, known, count),
                  name == op_name ? "; `regraph ops` lists them, --plugin brings more" : "");
}
static const char *attr_name(const void *list, int i) {
  return ((const rg_attr *)list)[i].name;
}
static const char *port_name(const void *list, int i) {
  return ((const rg_port *)list)[i].name;
}

/* ---- what errors took away ---- */

static void add_broken(rgi_builder *b, const rgi_json *name) {
  if (name && name->type == RGI_JSON_STRING) rgi_names_add(&b->broken, name->text, 0);
}

void rgi_break_node(rgi_builder *b, int i) {
  const rgi_json *v = &b->spec->nodes->item[i];
  b->wrong[i] = true;
  if (v->type != RGI_JSON_OBJECT) return;
  add_broken(b, rgi_json_get(v, "name"));
  const rgi_json *out = rgi_json_get(v, "out");
  for (int k = 0; out && out->type == RGI_JSON_OBJECT && k < out->n; k++)
    for (int j = 0; j < rgi_listed(&out->item[k]); j++)
      add_broken(b, rgi_listed_at(&out->item[k], j));
}

/* ---- inputs ---- */

static rg_status parse_dtype(rgi_builder *b, const rgi_json *v, const char *pointer,
                             rg_dtype *out) {
  const char *known[RG_DTYPE_COUNT];
  rgi_shown shown, hint;
  RGI_TRY(rgi_scope_value(&b->scope, v, pointer, NULL, &v, b->e));
  RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, pointer, NULL, b->e));
  for (int d = 0; d < RG_DTYPE_COUNT; d++) {
    known[d] = rg_dtype_name((rg_dtype)d);
    if (strcmp(known[d], v->text) == 0) {
      *out = (rg_dtype)d;
      return RG_OK;
    }
  }
  return rgi_fail(b->e, RG_E_VALUE, pointer, NULL,
                  "'%s' is no dtype; expected f32, f16, bf16 or i32%s", rgi_show(&shown, v->text),
                  rgi_near(&hint, v->text, known, RG_DTYPE_COUNT));
}

static rg_status parse_shape(rgi_builder *b, const rgi_json *v, const char *pointer,
                             rgi_tensor *t) {
  int64_t elements = 1;
  RGI_TRY(rgi_json_expect(v, RGI_JSON_ARRAY, pointer, NULL, b->e));
  if (v->n > RG_MAX_RANK)
    return rgi_fail(b->e, RG_E_RANK, pointer, NULL, "%d axes; at most %d are possible", v->n,
                    RG_MAX_RANK);
  t->rank = v->n;
  for (int i = 0; i < v->n; i++) {
    rgi_pointer p;
    rgi_dim *d = &t->dim[i];
    RGI_TRY(
        rgi_scope_dim(&b->scope, &v->item[i], rgi_pointer_index(&p, pointer, i), NULL, d, b->e));
    if (!rgi_dim_known(*d)) continue;
    if (d->c < 1)
      return rgi_fail(b->e, RG_E_VALUE, p.text, NULL,
                      "axis %d has extent %lld; an input's extents are at least 1", i,
                      (long long)d->c);
    if (!rgi_mul(elements, d->c, &elements) || elements > RGI_MOST_ELEMENTS)
      return rgi_fail(b->e, RG_E_LIMIT, p.text, NULL,
                      "axis %d has extent %lld, which takes the tensor past 2^40 elements", i,
                      (long long)d->c);
  }
  return RG_OK;
}

static rg_status parse_grad(rgi_builder *b, const rgi_json *v, const char *pointer, rg_dtype dtype,
                            rgi_grad *out) {
  rgi_shown shown;
  *out = RGI_GRAD_NONE;
  if (!v) return RG_OK;
  if (v->type == RGI_JSON_BOOL) {
    *out = v->i ? RGI_GRAD_PLAIN : RGI_GRAD_NONE;
  } else if (v->type != RGI_JSON_STRING) {
    return rgi_fail(b->e, RG_E_TYPE, pointer, NULL,
                    "expected true, false or \"accumulate\", not %s", rgi_json_kind(&shown, v));
  } else if (strcmp(v->text, "accumulate") == 0) {
    *out = RGI_GRAD_ACCUMULATE;
  } else {
    return rgi_fail(b->e, RG_E_VALUE, pointer, NULL,
                    "'%s' is no kind of gradient; expected true, false or \"accumulate\"",
                    rgi_show(&shown, v->text));
  }
  if (*out != RGI_GRAD_NONE && dtype == RG_I32)
    return rgi_fail(b->e, RG_E_DTYPE, pointer, NULL, "an i32 input has no gradient");
  return RG_OK;
}

/* Text for people, which nothing reads. */
static rg_status check_doc(const rgi_json *object, const char *pointer, rg_error *e) {
  rgi_pointer p;
  const rgi_json *doc = rgi_json_get(object, "doc");
  return doc ? rgi_json_expect(doc, RGI_JSON_STRING, rgi_pointer_key(&p, pointer, "doc"), NULL, e)
             : RG_OK;
}

static rg_status add_input(rgi_builder *b, int i) {
  static const char *const keys[] = {"shape", "dtype", "grad", "doc"}, *const state_keys[] = {
                                                                           "shape", "dtype", "next",
                                                                           "doc"};
  const rgi_json *in = &b->spec->inputs->item[i];
  const bool state = b->spec->is_state && b->spec->is_state[i];
  rgi_graph *g = b->g;
  rgi_pointer at, p;
  rgi_tensor t = blank;
  rgi_grad want = RGI_GRAD_NONE;
  rg_status wrong = RG_OK;
  t.name = b->spec->inputs->key[i];
  t.region = RGI_R_INPUT;
  rgi_spec_input_at(b->spec, i, &at);
  RGI_TRY(rgi_check_identifier(t.name, state ? "state" : "input", at.text, b->e));
  RGI_TRY(rgi_json_keys(in, state ? "state" : "an input", state ? state_keys : keys,
                        RGI_COUNT(keys), state ? 3 : 2, at.text, NULL, b->e));
  RGI_TRY(check_doc(in, at.text, b->e));
  rgi_pointer_key(&p, at.text, "dtype");
  RGI_KEEP(b->all, wrong, parse_dtype(b, rgi_json_get(in, "dtype"), p.text, &t.dtype), b->e);
  rgi_pointer_key(&p, at.text, "shape");
  RGI_KEEP(b->all, wrong, parse_shape(b, rgi_json_get(in, "shape"), p.text, &t), b->e);
  rgi_pointer_key(&p, at.text, "grad");
  RGI_KEEP(b->all, wrong, parse_grad(b, rgi_json_get(in, "grad"), p.text, t.dtype, &want), b->e);
  if (wrong) return wrong;
  if (want != RGI_GRAD_NONE && b->spec->state)
    return rgi_fail(b->e, RG_E_VALUE, p.text, NULL,
                    "'%s' asks for a gradient, but a graph with state has none", t.name);
  if (g->bound) rgi_dense_strides(&t);
  int id = rgi_add_tensor(g, &t);
  if (id < 0) return rgi_nomem(b->e);
  rgi_names_add(&b->tensors, g->tensor[id].name, id);
  rgi_names_add(&b->input_place, g->tensor[id].name, i);
  g->input[g->ninput++] =
      (rgi_io){.name = g->tensor[id].name, .tensor = id, .want = want, .grad = -1, .state = state};
  return RG_OK;
}

rg_status rgi_declare_inputs(rgi_builder *b) {
  const rgi_json *inputs = b->spec->inputs;
  rgi_graph *g = b->g;
  g->input = rgi_alloc_n(g->arena, (size_t)inputs->n, sizeof *g->input);
  if (!g->input || !rgi_names_init(&b->input_place, g->arena, (size_t)inputs->n))
    return rgi_nomem(b->e);
  for (int i = 0; i < inputs->n; i++) {
    rg_status wrong = RG_OK;
    RGI_KEEP(b->all, wrong, add_input(b, i), b->e);
    if (wrong) rgi_names_add(&b->broken, inputs->key[i], 0);
  }
  return RG_OK;
}

/* ---- attributes ---- */

static rg_status out_of_range(rgi_builder *b, const rg_attr *attr, double v, const char *pointer,
                              const char *node) {
  return rgi_fail(b->e, RG_E_VALUE, pointer, node,
                  "attribute '%s' is %.17g; expected %.17g to %.17g", attr->name, v, attr->min,
                  attr->max);
}

static rg_status parse_choice(rgi_builder *b, const rg_attr *attr, const rgi_json *v,
                              const char *pointer, const char *node, rg_value *out) {
  rgi_shown shown, hint;
  int n = 0;
  char list[256] = "";
  RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, pointer, node, b->e));
  for (; attr->choices[n]; n++) {
    size_t used = strlen(list);
    snprintf(list + used, sizeof list - used, "%s%s", n ? ", " : "", attr->choices[n]);
    if (strcmp(attr->choices[n], v->text) == 0) {
      out->i = n;
      return RG_OK;
    }
  }
  return rgi_fail(b->e, RG_E_VALUE, pointer, node, "attribute '%s' is '%s'; expected one of %s%s",
                  attr->name, rgi_show(&shown, v->text), list,
                  rgi_near(&hint, v->text, attr->choices, n));
}

static rg_status parse_attr(rgi_builder *b, const rg_attr *attr, const rgi_json *v,
                            const char *pointer, const char *node, rg_value *out) {
  bool ranged = attr->min != attr->max;
  out->set = true;
  if (attr->type == RG_ATTR_INTS) {
    RGI_TRY(rgi_json_expect(v, RGI_JSON_ARRAY, pointer, node, b->e));
    out->i = v->n;
    out->list = rgi_alloc_n(b->g->arena, (size_t)v->n, sizeof *out->list);
    if (!out->list) return rgi_nomem(b->e);
    for (int i = 0; i < v->n; i++) {
      rgi_pointer p;
      RGI_TRY(rgi_scope_int(&b->scope, &v->item[i], rgi_pointer_index(&p, pointer, i), node,
                            &out->list[i], b->e));
      if (ranged && ((double)out->list[i] < attr->min || (double)out->list[i] > attr->max))
        return out_of_range(b, attr, (double)out->list[i], p.text, node);
    }
    return RG_OK;
  }
  if (attr->type == RG_ATTR_INT) {
    RGI_TRY(rgi_scope_int(&b->scope, v, pointer, node, &out->i, b->e));
    if (ranged && ((double)out->i < attr->min || (double)out->i > attr->max))
      return out_of_range(b, attr, (double)out->i, pointer, node);
    return RG_OK;
  }
  rgi_shown shown;
  RGI_TRY(rgi_scope_value(&b->scope, v, pointer, node, &v, b->e));
  if (attr->type == RG_ATTR_BOOL) {
    RGI_TRY(rgi_json_expect(v, RGI_JSON_BOOL, pointer, node, b->e));
    out->i = v->i;
    return RG_OK;
  }
  if (attr->type == RG_ATTR_ENUM) return parse_choice(b, attr, v, pointer, node, out);
  if (v->type != RGI_JSON_INT && v->type != RGI_JSON_REAL)
    return rgi_fail(b->e, RG_E_TYPE, pointer, node, "expected a number, not %s",
                    rgi_json_kind(&shown, v));
  out->f = v->type == RGI_JSON_INT ? (double)v->i : v->f;
  if (ranged && (out->f < attr->min || out->f > attr->max))
    return out_of_range(b, attr, out->f, pointer, node);
  return RG_OK;
}

static rg_status parse_attrs(rgi_builder *b, const rg_op *op, const rgi_json *attrs, const char *at,
                             const char *node, rg_value *value) {
  rgi_pointer where, p;
  rg_status wrong = RG_OK;
  rgi_pointer_key(&where, at, "attrs");
  for (int i = 0; i < op->nattr; i++) {
    const rg_attr *attr = &op->attrs[i];
    value[i] = (rg_value){0};
    if (attr->type == RG_ATTR_FLOAT)
      value[i].f = attr->def;
    else if (attr->type != RG_ATTR_INTS)
      value[i].i = (int64_t)attr->def;
  }
  if (attrs) RGI_TRY(rgi_json_expect(attrs, RGI_JSON_OBJECT, where.text, node, b->e));
  for (int k = 0; attrs && k < attrs->n; k++) {
    const int i = rgi_attribute(op, attrs->key[k]);
    rgi_pointer_key(&p, where.text, attrs->key[k]);
    RGI_KEEP(b->all, wrong,
             i < 0 ? rgi_no_such(b, RG_E_KEY, p.text, node, op->name, "attribute", attrs->key[k],
                                 attr_name, op->attrs, op->nattr)
                   : parse_attr(b, &op->attrs[i], &attrs->item[k], p.text, node, &value[i]),
             b->e);
  }
  if (wrong) return wrong; /* what is missing may be what is misspelt */
  for (int i = 0; i < op->nattr; i++)
    if (op->attrs[i].required && !value[i].set)
      return rgi_fail(b->e, RG_E_KEY, attrs ? where.text : at, node,
                      "%s needs the attribute '%s': %s", op->name, op->attrs[i].name,
                      op->attrs[i].doc);
  return RG_OK;
}

/* ---- nodes ---- */

static bool backward_reads(rgi_builder *b, const rg_op *op, const char *output) {
  char name[72];
  const rg_op *backward = op->backward ? rgi_find_op(b->spec->ctx, op->backward) : NULL;
  snprintf(name, sizeof name, "out.%s", output);
  return backward && rgi_in_port(backward, name) >= 0;
}

/* Is a node's optional output made though the spec does not name it? Where a backward may read it,
 * and where it stands beside an input of its name; what nothing reads is dropped later. */
static bool made_unasked(rgi_builder *b, const rg_op *op, const rg_port *out, const int *in_count) {
  const int same = rgi_in_port(op, out->name);
  if (out->flags & RG_PORT_LIST) return false;
  return backward_reads(b, op, out->name) || (same >= 0 && in_count[same] > 0);
}

/* All required inputs that are not connected, in one sentence. */
static rg_status missing_inputs(rgi_builder *b, const rg_op *op, const int *count,
                                const char *where, const char *node) {
  char names[256];
  const char *doc = "";
  int n = 0;
  size_t at = 0;
  for (int p = 0; p < op->nin; p++) {
    if (count[p] || op->in[p].flags & (RG_PORT_OPTIONAL | RG_PORT_SEQLENS)) continue;
    if (at < sizeof names)
      at +=
          (size_t)snprintf(names + at, sizeof names - at, "%s'%s'", n ? ", " : "", op->in[p].name);
    if (n++ == 0 && op->in[p].doc) doc = op->in[p].doc;
  }
  if (n > 1)
    return rgi_fail(b->e, RG_E_KEY, where, node, "%s needs inputs on its ports %s", op->name,
                    names);
  return rgi_fail(b->e, RG_E_KEY, where, node, "%s needs an input on port %s: %s", op->name, names,
                  doc);
}

/* Member k of "in" or "out". */
static rg_status match_port(rgi_builder *b, const rg_op *op, const rg_port *port, int nport,
                            const rgi_json *v, int k, const char *where, const char *node,
                            const rgi_json **given, int *count) {
  const rgi_json *value = &v->item[k];
  int p = 0;
  rgi_pointer at;
  rgi_shown shown;
  while (p < nport && strcmp(port[p].name, v->key[k]) != 0) p++;
  rgi_pointer_key(&at, where, v->key[k]);
  if (p == nport)
    return rgi_no_such(b, RG_E_KEY, at.text, node, op->name,
                       port == op->in ? "input port" : "output port", v->key[k], port_name, port,
                       nport);
  const bool list = port[p].flags & RG_PORT_LIST;
  if (value->type != RGI_JSON_STRING && !(list && value->type == RGI_JSON_ARRAY))
    return rgi_fail(b->e, RG_E_TYPE, at.text, node, "expected the name of a tensor%s, not %s",
                    list ? " or an array of names" : "", rgi_json_kind(&shown, value));
  if (rgi_listed(value) == 0)
    return rgi_fail(b->e, RG_E_VALUE, at.text, node,
                    "an empty list; port '%s' takes one tensor or more", port[p].name);
  given[p] = value;
  count[p] = rgi_listed(value);
  return RG_OK;
}

/* Checks "in" or "out" against the op's ports and fills `count` and, per port, the JSON value;
 * those of "out" stand behind those of "in". */
static rg_status match_ports(rgi_builder *b, const rg_op *op, const rg_port *port, int nport,
                             const rgi_json *v, const char *where, const char *node,
                             const rgi_json **given, int *count) {
  rg_status wrong = RG_OK;
  if (v) RGI_TRY(rgi_json_expect(v, RGI_JSON_OBJECT, where, node, b->e));
  for (int k = 0; v && k < v->n; k++)
    RGI_KEEP(b->all, wrong, match_port(b, op, port, nport, v, k, where, node, given, count), b->e);
  if (wrong) return wrong; /* what is missing may be what is misspelt */
  for (int p = 0; p < nport; p++) {
    if (count[p]) continue;
    if (port[p].flags & RG_PORT_OPTIONAL) {
      count[p] = port == op->out && made_unasked(b, op, &port[p], count - op->nin);
      continue;
    }
    if (port == op->in && port[p].flags & RG_PORT_SEQLENS) {
      count[p] = 1; /* connect knows what the spec's lengths are */
      continue;
    }
    if (port == op->in) return missing_inputs(b, op, count, where, node);
    if (port[p].flags & RG_PORT_LIST)
      return rgi_fail(b->e, RG_E_KEY, where, node,
                      "%s makes a list on port '%s'; name its tensors here", op->name,
                      port[p].name);
    count[p] = 1; /* named after node and port */
  }
  return RG_OK;
}

static rg_status find_op(rgi_builder *b, const rgi_json *v, const char *pointer, const char *node,
                         const rg_op **out) {
  const rg_context *ctx = b->spec->ctx;
  RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, pointer, node, b->e));
  *out = rgi_find_op(ctx, v->text);
  if (*out && !((*out)->flags & RG_OP_INTERNAL)) return RG_OK;
  if (*out)
    return rgi_fail(b->e, RG_E_NAME, pointer, node,
                    "the op '%s' is inserted by regraph; a spec can't name it", (*out)->name);
  return rgi_no_such(b, RG_E_NAME, pointer, node, NULL, "op", v->text, op_name, ctx->op, ctx->nop);
}

rg_status rgi_declare_output(rgi_builder *b, int n, int slot, const char *name,
                             const char *pointer) {
  rgi_tensor t = blank;
  t.name = name;
  t.producer = n;
  int id = rgi_add_tensor(b->g, &t);
  if (id < 0) return rgi_nomem(b->e);
  int other = rgi_names_add(&b->tensors, b->g->tensor[id].name, id);
  if (other >= 0) {
    int from = b->g->tensor[other].producer;
    return rgi_fail(b->e, RG_E_NAME, pointer, b->g->node[n].name,
                    "the tensor '%s' is already made by %s%s%s", name,
                    from < 0 ? "an input" : "node '", from < 0 ? "" : b->g->node[from].name,
                    from < 0 ? "" : "'");
  }
  b->g->node[n].out[slot] = id;
  return RG_OK;
}

rg_status rgi_declare_node(rgi_builder *b, int i) {
  static const char *const keys[] = {"name", "op", "in", "out", "attrs", "doc"};
  const rgi_json *v = &b->spec->nodes->item[i];
  rgi_graph *g = b->g;
  rgi_pointer at, where, p;
  const rg_op *op;
  rgi_spec_node_at(b->spec, i, &at);
  RGI_TRY(rgi_json_keys(v, "a node", keys, RGI_COUNT(keys), 2, at.text, NULL, b->e));
  RGI_TRY(check_doc(v, at.text, b->e));
  const rgi_json *name_v = rgi_json_get(v, "name");
  rgi_pointer_key(&where, at.text, "name");
  RGI_TRY(rgi_json_expect(name_v, RGI_JSON_STRING, where.text, NULL, b->e));
  const char *name = name_v->text;
  RGI_TRY(rgi_check_identifier(name, "node", where.text, b->e));
  int other = rgi_names_add(&b->nodes, name, i);
  if (other >= 0)
    return rgi_fail(b->e, RG_E_NAME, where.text, name, "the name '%s' is already taken by %s", name,
                    rgi_spec_node_at(b->spec, other, &p));
  RGI_TRY(find_op(b, rgi_json_get(v, "op"), rgi_pointer_key(&p, at.text, "op"), name, &op));

  size_t nport = (size_t)(op->nin + op->nout);
  const rgi_json **given = rgi_alloc_n(g->arena, nport, sizeof *given);
  int *count = rgi_alloc_n(g->arena, nport, sizeof *count);
  rg_value *value = rgi_alloc_n(g->arena, (size_t)op->nattr, sizeof *value);
  if (!given || !count || !value) return rgi_nomem(b->e);
  const rgi_json *in = rgi_json_get(v, "in"), *out = rgi_json_get(v, "out");
  rg_status wrong = RG_OK;
  rgi_pointer_key(&where, at.text, "in");
  RGI_KEEP(b->all, wrong,
           match_ports(b, op, op->in, op->nin, in, in ? where.text : at.text, name, given, count),
           b->e);
  rgi_pointer_key(&where, at.text, "out");
  RGI_KEEP(b->all, wrong,
           match_ports(b, op, op->out, op->nout, out, out ? where.text : at.text, name,
                       given + op->nin, count + op->nin),
           b->e);
  RGI_KEEP(b->all, wrong, parse_attrs(b, op, rgi_json_get(v, "attrs"), at.text, name, value), b->e);
  if (wrong) return wrong;

  int n = rgi_add_node(g, name, op, count, count + op->nin, value);
  if (n < 0) return rgi_nomem(b->e);
  g->node[n].origin = i;
  g->origin[i] =
      (rgi_origin){.name = g->node[n].name, .op = op, .pointer = rgi_strdup(g->arena, at.text)};
  if (!g->origin[i].pointer) return rgi_nomem(b->e);
  for (int port = 0; port < op->nout; port++) {
    const rgi_json *names = given[op->nin + port];
    for (int k = 0; k < count[op->nin + port]; k++) {
      rgi_pointer port_at;
      int slot = g->node[n].out_begin[port] + k;
      if (!names) {
        char *automatic = rgi_format(g->arena, "%s.%s", name, op->out[port].name);
        if (!automatic) return rgi_nomem(b->e);
        RGI_TRY(rgi_declare_output(b, n, slot, automatic, at.text));
        continue;
      }
      const rgi_json *one = rgi_listed_at(names, k);
      rgi_pointer_key(&port_at, where.text, op->out[port].name);
      if (names->type == RGI_JSON_ARRAY) rgi_pointer_index(&port_at, port_at.text, k);
      RGI_TRY(rgi_json_expect(one, RGI_JSON_STRING, port_at.text, name, b->e));
      RGI_TRY(rgi_check_identifier(one->text, "tensor", port_at.text, b->e));
      RGI_TRY(rgi_declare_output(b, n, slot, one->text, port_at.text));
    }
  }
  return RG_OK;
}
