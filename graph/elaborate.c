/* graph/elaborate.c: from a loaded spec's JSON to a checked forward graph.
 *
 * In order: inputs and state; nodes with the tensors they make; the tensors they read (node order
 * in a file is free, so names are resolved only now); who writes state; topological order;
 * inference; declared outputs; row lengths (lengths.c); what no output needs is dropped. Every
 * error carries the JSON pointer of what is wrong.
 *
 * Where errors are collected, inputs and nodes with one are left out, and so is all that reads from
 * them: their tensors' names are `broken`, and a reader of those fails without an error of its own.
 */
#include "spec.h"
#include <stdio.h>
#include <string.h>

typedef struct builder {
  const rg_spec *spec;
  rgi_graph *g;
  rgi_scope scope;
  rgi_names tensors, nodes;
  rgi_names input_place; /* of inputs, their index in the spec */
  int32_t lengths[2];    /* the first lengths tensors of the spec … */
  int nlengths;          /* … of how many; one alone is read wherever a node names none */
  rgi_errors *all;       /* NULL: the first error is the last */
  rgi_names broken;      /* tensors, and nodes as "NODE", that an error took away */
  bool *wrong;           /* nodes of the spec that an error took away */
  rg_error *e;
} builder;

static const rgi_tensor blank = {.base = -1, .producer = -1, .seqlens = -1, .grad_of = -1};

/* Fails because `owner` (NULL: the spec) has no `kind` called `got`, with the nearest name there
 * is. `name` gives the i-th of n in `list`, or NULL for one that a spec can't name. */
static const char *op_name(const void *list, int i) {
  const rg_op *op = ((const rg_op *const *)list)[i];
  return op->flags & RG_OP_INTERNAL ? NULL : op->name;
}

static rg_status no_such(builder *b, rg_status code, const char *pointer, const char *node,
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
static const char *tensor_name(const void *list, int i) {
  return ((const rgi_tensor *)list)[i].name;
}
static const char *attr_name(const void *list, int i) {
  return ((const rg_attr *)list)[i].name;
}
static const char *port_name(const void *list, int i) {
  return ((const rg_port *)list)[i].name;
}

/* Tensors a spec lists on a port: v is one name or, on a list port, an array of them. */
static int listed(const rgi_json *v) {
  return v->type == RGI_JSON_ARRAY ? v->n : 1;
}
static const rgi_json *element(const rgi_json *v, int i) {
  return v->type == RGI_JSON_ARRAY ? &v->item[i] : v;
}

/* ---- what errors took away ---- */

static void add_broken(builder *b, const rgi_json *name) {
  if (name && name->type == RGI_JSON_STRING) rgi_names_add(&b->broken, name->text, 0);
}

/* Node i of the spec, whatever it is. */
static void break_node(builder *b, int i) {
  const rgi_json *v = &b->spec->nodes->item[i];
  b->wrong[i] = true;
  if (v->type != RGI_JSON_OBJECT) return;
  add_broken(b, rgi_json_get(v, "name"));
  const rgi_json *out = rgi_json_get(v, "out");
  for (int k = 0; out && out->type == RGI_JSON_OBJECT && k < out->n; k++)
    for (int j = 0; j < listed(&out->item[k]); j++) add_broken(b, element(&out->item[k], j));
}

/* Is it a tensor, or a port of a node, that an error took away? */
static bool is_broken(const builder *b, const char *name) {
  char node[72];
  const size_t n = strcspn(name, ".");
  if (!b->all) return false;
  if (rgi_names_get(&b->broken, name) >= 0) return true;
  if (!name[n] || n >= sizeof node) return false;
  memcpy(node, name, n);
  node[n] = 0;
  return rgi_names_get(&b->broken, node) >= 0;
}

/* The tensor a spec names, or an error with the nearest name. */
static rg_status resolve(builder *b, const rgi_json *v, const char *pointer, const char *node,
                         int32_t *out) {
  rgi_shown shown;
  if (v->type != RGI_JSON_STRING)
    return rgi_fail(b->e, RG_E_TYPE, pointer, node, "expected the name of a tensor, not %s",
                    rgi_json_kind(&shown, v));
  if (is_broken(b, v->text)) return RG_E_NAME; /* follows from another error */
  *out = rgi_names_get(&b->tensors, v->text);
  if (*out >= 0) return RG_OK;
  return no_such(b, RG_E_NAME, pointer, node, NULL, "tensor", v->text, tensor_name, b->g->tensor,
                 b->g->ntensor);
}

/* ---- inputs ---- */

static rg_status parse_dtype(builder *b, const rgi_json *v, const char *pointer, rg_dtype *out) {
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

static rg_status parse_shape(builder *b, const rgi_json *v, const char *pointer, rgi_tensor *t) {
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

static rg_status parse_grad(builder *b, const rgi_json *v, const char *pointer, rg_dtype dtype,
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

static rg_status add_input(builder *b, int i) {
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

static rg_status add_inputs(builder *b) {
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

static rg_status out_of_range(builder *b, const rg_attr *attr, double v, const char *pointer,
                              const char *node) {
  return rgi_fail(b->e, RG_E_VALUE, pointer, node,
                  "attribute '%s' is %.17g; expected %.17g to %.17g", attr->name, v, attr->min,
                  attr->max);
}

static rg_status parse_choice(builder *b, const rg_attr *attr, const rgi_json *v,
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

static rg_status parse_attr(builder *b, const rg_attr *attr, const rgi_json *v, const char *pointer,
                            const char *node, rg_value *out) {
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

static rg_status parse_attrs(builder *b, const rg_op *op, const rgi_json *attrs, const char *at,
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
    int i = 0;
    while (i < op->nattr && strcmp(op->attrs[i].name, attrs->key[k]) != 0) i++;
    rgi_pointer_key(&p, where.text, attrs->key[k]);
    RGI_KEEP(b->all, wrong,
             i == op->nattr
                 ? no_such(b, RG_E_KEY, p.text, node, op->name, "attribute", attrs->key[k],
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

static bool backward_reads(builder *b, const rg_op *op, const char *output) {
  char name[72];
  const rg_op *backward = op->backward ? rgi_find_op(b->spec->ctx, op->backward) : NULL;
  snprintf(name, sizeof name, "out.%s", output);
  return backward && rgi_in_port(backward, name) >= 0;
}

/* All required inputs that are not connected, in one sentence. */
static rg_status missing_inputs(builder *b, const rg_op *op, const int *count, const char *where,
                                const char *node) {
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
static rg_status match_port(builder *b, const rg_op *op, const rg_port *port, int nport,
                            const rgi_json *v, int k, const char *where, const char *node,
                            const rgi_json **given, int *count) {
  const rgi_json *value = &v->item[k];
  int p = 0;
  rgi_pointer at;
  rgi_shown shown;
  while (p < nport && strcmp(port[p].name, v->key[k]) != 0) p++;
  rgi_pointer_key(&at, where, v->key[k]);
  if (p == nport)
    return no_such(b, RG_E_KEY, at.text, node, op->name,
                   port == op->in ? "input port" : "output port", v->key[k], port_name, port,
                   nport);
  const bool list = port[p].flags & RG_PORT_LIST;
  if (value->type != RGI_JSON_STRING && !(list && value->type == RGI_JSON_ARRAY))
    return rgi_fail(b->e, RG_E_TYPE, at.text, node, "expected the name of a tensor%s, not %s",
                    list ? " or an array of names" : "", rgi_json_kind(&shown, value));
  if (listed(value) == 0)
    return rgi_fail(b->e, RG_E_VALUE, at.text, node,
                    "an empty list; port '%s' takes one tensor or more", port[p].name);
  given[p] = value;
  count[p] = listed(value);
  return RG_OK;
}

/* Checks "in" or "out" against the op's ports and fills `count` and, per port, the JSON value. */
static rg_status match_ports(builder *b, const rg_op *op, const rg_port *port, int nport,
                             const rgi_json *v, const char *where, const char *node,
                             const rgi_json **given, int *count) {
  rg_status wrong = RG_OK;
  if (v) RGI_TRY(rgi_json_expect(v, RGI_JSON_OBJECT, where, node, b->e));
  for (int k = 0; v && k < v->n; k++)
    RGI_KEEP(b->all, wrong, match_port(b, op, port, nport, v, k, where, node, given, count), b->e);
  if (wrong) return wrong; /* what is missing may be what is misspelt */
  for (int p = 0; p < nport; p++) {
    if (count[p]) continue;
    if (port[p].flags &
        RG_PORT_OPTIONAL) { /* what a backward may read is made, and dropped if there is none */
      count[p] =
          port == op->out && !(port[p].flags & RG_PORT_LIST) && backward_reads(b, op, port[p].name);
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

static rg_status find_op(builder *b, const rgi_json *v, const char *pointer, const char *node,
                         const rg_op **out) {
  const rg_context *ctx = b->spec->ctx;
  RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, pointer, node, b->e));
  *out = rgi_find_op(ctx, v->text);
  if (*out && !((*out)->flags & RG_OP_INTERNAL)) return RG_OK;
  if (*out)
    return rgi_fail(b->e, RG_E_NAME, pointer, node,
                    "the op '%s' is inserted by regraph; a spec can't name it", (*out)->name);
  return no_such(b, RG_E_NAME, pointer, node, NULL, "op", v->text, op_name, ctx->op, ctx->nop);
}

/* Creates the tensor that node n makes on its flat output slot. `name` as given, or NODE.PORT. */
static rg_status add_output(builder *b, int n, int slot, const char *name, const char *pointer) {
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

/* Everything about a node but what it reads. */
static rg_status add_node(builder *b, int i) {
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
        RGI_TRY(add_output(b, n, slot, automatic, at.text));
        continue;
      }
      const rgi_json *one = element(names, k);
      rgi_pointer_key(&port_at, where.text, op->out[port].name);
      if (names->type == RGI_JSON_ARRAY) rgi_pointer_index(&port_at, port_at.text, k);
      RGI_TRY(rgi_json_expect(one, RGI_JSON_STRING, port_at.text, name, b->e));
      RGI_TRY(rgi_check_identifier(one->text, "tensor", port_at.text, b->e));
      RGI_TRY(add_output(b, n, slot, one->text, port_at.text));
    }
  }
  return RG_OK;
}

/* ---- the lengths that nodes need not name ---- */

enum { LENGTH_PORTS = RG_PORT_SEQLENS | RG_PORT_KSEQLENS };

static void add_lengths(builder *b, int32_t t) {
  for (int i = 0; i < b->nlengths && i < 2; i++)
    if (b->lengths[i] == t) return;
  if (b->nlengths < 2) b->lengths[b->nlengths] = t;
  b->nlengths++;
}

/* Is an extent written as starts have it, of which there is one more than sequences: "B+1", or in
 * numbers? Others ("T") count rows, say. */
static bool counts_starts(const rgi_json *extent) {
  char text[64];
  size_t n = 0;
  if (extent->type != RGI_JSON_STRING) return extent->type == RGI_JSON_INT;
  for (const char *p = extent->text; *p; p++) {
    if (*p == ' ') continue;
    if (n + 1 == sizeof text) return false;
    text[n++] = *p;
  }
  text[n] = 0;
  return (n > 2 && strcmp(text + n - 2, "+1") == 0) || strncmp(text, "1+", 2) == 0;
}

/* A spec's lengths tensors: what it names on ports for them, and int32 inputs of one axis that
 * nothing else reads and that are as long as starts are. */
static rg_status find_lengths(builder *b) {
  rgi_graph *g = b->g;
  const rgi_json *outputs = b->spec->outputs;
  bool *read = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *read);
  if (!read) return rgi_nomem(b->e);
  for (int n = 0; n < g->nnode; n++) {
    const rgi_json *in = rgi_json_get(&b->spec->nodes->item[g->node[n].origin], "in");
    for (int k = 0; in && k < in->n; k++) {
      const int p = rgi_in_port(g->node[n].op, in->key[k]);
      for (int i = 0; i < listed(&in->item[k]); i++) {
        const rgi_json *name = element(&in->item[k], i);
        const int32_t t =
            name->type == RGI_JSON_STRING ? rgi_names_get(&b->tensors, name->text) : -1;
        if (t < 0 || p < 0) continue;
        if (g->node[n].op->in[p].flags & LENGTH_PORTS) add_lengths(b, t);
        read[t] = true;
      }
    }
  }
  for (int i = 0; i < outputs->n; i++) {
    const rgi_json *name = &outputs->item[i];
    const int32_t t = name->type == RGI_JSON_STRING ? rgi_names_get(&b->tensors, name->text) : -1;
    if (t >= 0) read[t] = true;
  }
  for (int i = 0; i < g->ninput; i++) {
    const int32_t t = g->input[i].tensor;
    const rgi_json *in = rgi_json_get(b->spec->inputs, g->input[i].name);
    if (!read[t] && g->tensor[t].dtype == RG_I32 && g->tensor[t].rank == 1 &&
        counts_starts(&rgi_json_get(in, "shape")->item[0]))
      add_lengths(b, t);
  }
  return RG_OK;
}

/* The spec's one lengths tensor for a port that must have it and names none. */
static rg_status fill_lengths(builder *b, const rg_op *op, const rg_port *port, const char *where,
                              const char *node, int32_t *out) {
  const rgi_tensor *tensor = b->g->tensor;
  if (b->nlengths == 1) {
    *out = b->lengths[0];
    return RG_OK;
  }
  if (b->all && b->all->n) return RG_E_KEY; /* what took others away may have taken them, too */
  if (b->nlengths == 0)
    return rgi_fail(b->e, RG_E_KEY, where, node,
                    "%s needs sequence starts on port '%s', and the spec has none; an input "
                    "\"%s\": {\"shape\": [\"B+1\"], \"dtype\": \"i32\"} serves all nodes",
                    op->name, port->name, port->name);
  return rgi_fail(b->e, RG_E_KEY, where, node,
                  "%s needs an input on port '%s': %s. The spec has several ('%s', '%s'%s), so "
                  "name the one that is meant",
                  op->name, port->name, port->doc ? port->doc : "sequence starts",
                  tensor[b->lengths[0]].name, tensor[b->lengths[1]].name,
                  b->nlengths > 2 ? ", …" : "");
}

static rg_status connect(builder *b, int n) {
  rgi_node *node = &b->g->node[n];
  const char *where = b->g->origin[node->origin].pointer;
  const rgi_json *in = rgi_json_get(&b->spec->nodes->item[node->origin], "in");
  rgi_pointer at, port_at;
  rg_status wrong = RG_OK;
  rgi_pointer_key(&at, where, "in");
  for (int port = 0; port < node->op->nin; port++) {
    const rgi_json *v = in ? rgi_json_get(in, node->op->in[port].name) : NULL;
    const uint32_t flags = node->op->in[port].flags;
    int32_t *slot = &node->in[node->in_begin[port]];
    if (!v && (flags & (RG_PORT_SEQLENS | RG_PORT_OPTIONAL)) == RG_PORT_SEQLENS)
      RGI_KEEP(
          b->all, wrong,
          fill_lengths(b, node->op, &node->op->in[port], in ? at.text : where, node->name, slot),
          b->e);
    for (int k = 0; v && k < listed(v); k++) {
      rgi_pointer_key(&port_at, at.text, node->op->in[port].name);
      if (v->type == RGI_JSON_ARRAY) rgi_pointer_index(&port_at, port_at.text, k);
      RGI_KEEP(b->all, wrong, resolve(b, element(v, k), port_at.text, node->name, &slot[k]), b->e);
    }
  }
  return wrong;
}

/* ---- state ---- */

/* Before nodes have an order: what node n reads as its input i, on a port for state, is state that
 * no node before it in the file (first[version]) writes. */
static rg_status check_writer(builder *b, int n, int i, int32_t *first) {
  rgi_graph *g = b->g;
  const rgi_node *node = &g->node[n];
  rgi_pointer in, at;
  int port = -1;
  bool partial = false;
  rgi_next_in(node, i, &port);
  if (port < 0 || node->in[i] < 0) return RG_OK;
  const int out = rgi_out_port(node->op, node->op->in[port].name);
  const char *shown = g->tensor[node->in[i]].name;
  const int version = rgi_version(g, node->in[i], &partial), from = g->tensor[version].producer;
  rgi_pointer_key(&in, g->origin[node->origin].pointer, "in");
  rgi_pointer_key(&at, in.text, node->op->in[port].name);
  if (node->in_begin[port + 1] - node->in_begin[port] !=
      node->out_begin[out + 1] - node->out_begin[out])
    return rgi_fail(
        b->e, RG_E_KEY, at.text, node->name,
        "%s makes a new version of everything on port '%s'; name as many tensors on the "
        "out-port '%s'",
        node->op->name, node->op->in[port].name, node->op->in[port].name);
  if (partial)
    return rgi_fail(b->e, RG_E_VALUE, at.text, node->name,
                    "'%s' is a part of '%s'; state is written as a whole, so declare the parts as "
                    "state of their own",
                    shown, g->tensor[version].name);
  bool state = from < 0 && rgi_state_of(g, version);
  for (int k = 0; from >= 0 && k < rgi_nin(&g->node[from]); k++)
    state = state || rgi_next_in(&g->node[from], k, NULL) == version;
  if (!state)
    return rgi_fail(b->e, RG_E_NAME, at.text, node->name,
                    "'%s' is no state, and %s writes there; declare it under \"state\"", shown,
                    node->op->name);
  if (first[version] >= 0)
    return rgi_fail(b->e, RG_E_NAME, at.text, node->name,
                    "'%s' is written by '%s' already; write the version that this one makes", shown,
                    g->node[first[version]].name);
  first[version] = n;
  return RG_OK;
}

static rg_status check_writers(builder *b) {
  rgi_graph *g = b->g;
  if (!b->spec->is_state) {
    bool writes = false;
    for (int n = 0; n < g->nnode; n++) writes = writes || g->node[n].op->flags & RG_OP_STATE;
    if (!writes) return RG_OK;
  }
  int32_t *first = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *first);
  if (!first) return rgi_nomem(b->e);
  for (int t = 0; t < g->ntensor; t++) first[t] = -1;
  for (int n = 0; n < g->nnode; n++)
    for (int i = 0; i < rgi_nin(&g->node[n]); i++) {
      rg_status wrong = RG_OK;
      RGI_KEEP(b->all, wrong, check_writer(b, n, i, first), b->e);
      if (wrong) break_node(b, g->node[n].origin);
    }
  return RG_OK;
}

/* What the declaration of state k names as its next version. */
static rg_status find_next(builder *b, int k) {
  rgi_graph *g = b->g;
  rgi_io *io = &g->input[k];
  rgi_pointer at, p;
  int last = io->tensor, t = -1;
  const int place = rgi_names_get(&b->input_place, io->name);
  rgi_spec_input_at(b->spec, place, &at);
  rgi_pointer_key(&p, at.text, "next");
  RGI_TRY(resolve(b, rgi_json_get(&b->spec->inputs->item[place], "next"), p.text, NULL, &io->next));
  if (b->all && b->all->n) return RG_OK;
  while ((t = rgi_next_version(g, last, NULL)) >= 0) last = t;
  if (last == io->tensor)
    return rgi_fail(b->e, RG_E_NAME, p.text, NULL,
                    "no node writes '%s'; what is only read is an input", io->name);
  if (rgi_version(g, io->next, NULL) != last || rgi_owner(g, io->next) != io->tensor)
    return rgi_fail(b->e, RG_E_NAME, p.text, NULL, "'%s' is not the last version of '%s': '%s' is",
                    g->tensor[io->next].name, io->name, g->tensor[last].name);
  return RG_OK;
}

/* In order: a node that reads what an error took away is left out, too. */
static rg_status infer_nodes(builder *b) {
  rgi_graph *g = b->g;
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    const int origin = node->origin;
    rg_status wrong = b->all && b->wrong[origin] ? RG_E_NAME : RG_OK;
    for (int i = 0; i < rgi_nin(node) && !wrong && b->all; i++) {
      const int from = node->in[i] < 0 ? -1 : g->tensor[node->in[i]].producer;
      if (from >= 0 && b->wrong[g->node[from].origin]) wrong = RG_E_NAME;
    }
    if (!wrong)
      RGI_KEEP(b->all, wrong, rgi_infer_node(g, n, g->origin[origin].pointer, b->e), b->e);
    if (wrong) break_node(b, origin);
  }
  return RG_OK;
}

static rg_status add_nodes(builder *b) {
  const rgi_json *nodes = b->spec->nodes;
  rgi_graph *g = b->g;
  /* besides: copies of outputs, and what lengths.c adds, at most one of each kind for a view */
  size_t capacity = 3 * (size_t)nodes->n + (size_t)b->spec->outputs->n;
  g->origin = rgi_alloc_n(g->arena, capacity, sizeof *g->origin);
  if (!g->origin || !rgi_names_init(&b->nodes, g->arena, (size_t)nodes->n)) return rgi_nomem(b->e);
  for (int i = 0; i < nodes->n; i++) {
    rg_status wrong = RG_OK;
    RGI_KEEP(b->all, wrong, add_node(b, i), b->e);
    if (wrong) break_node(b, i);
    g->norigin = i + 1;
  }
  RGI_TRY(find_lengths(b));
  for (int n = 0; n < g->nnode; n++) {
    rg_status wrong = RG_OK;
    RGI_KEEP(b->all, wrong, connect(b, n), b->e);
    if (wrong) break_node(b, g->node[n].origin);
  }
  RGI_TRY(check_writers(b));
  RGI_TRY(rgi_sort_nodes(g, b->e));
  RGI_TRY(infer_nodes(b));
  for (int i = 0; i < g->ninput; i++) {
    rg_status wrong = RG_OK;
    if (g->input[i].state) RGI_KEEP(b->all, wrong, find_next(b, i), b->e);
    (void)wrong;
  }
  return RG_OK;
}

/* ---- outputs ---- */

/* Appends OUTPUT.copy, a cast of tensor t to its own dtype; returns the new tensor in *out. */
static rg_status add_copy(builder *b, const char *output, int t, const char *pointer,
                          int32_t *out) {
  rgi_graph *g = b->g;
  const rg_op *cast = rgi_find_op(b->spec->ctx, "cast");
  if (!cast) return rgi_fail(b->e, RG_E_INTERNAL, pointer, NULL, "there is no cast to copy with");
  char *name = rgi_format(g->arena, "%s.copy", output);
  int *nin = rgi_alloc_n(g->arena, (size_t)cast->nin, sizeof *nin);
  int *nout = rgi_alloc_n(g->arena, (size_t)cast->nout, sizeof *nout);
  rgi_origin *origin = &g->origin[g->norigin];
  if (!name || !nin || !nout) return rgi_nomem(b->e);
  nin[0] = nout[0] = 1;
  int n = rgi_add_node(g, name, cast, nin, nout, NULL);
  if (n < 0) return rgi_nomem(b->e);
  *origin =
      (rgi_origin){.name = g->node[n].name, .op = cast, .pointer = rgi_strdup(g->arena, pointer)};
  if (!origin->pointer) return rgi_nomem(b->e);
  g->node[n].origin = g->norigin++;
  g->node[n].in[0] = t;
  RGI_TRY(add_output(b, n, 0, name, pointer));
  *out = g->node[n].out[0];
  return rgi_infer_node(g, n, pointer, b->e);
}

/* Every declared output gets a tensor of its own that owns its bytes. */
static rg_status add_outputs(builder *b) {
  const rgi_json *outputs = b->spec->outputs;
  rgi_graph *g = b->g;
  if (outputs->n == 0)
    return rgi_fail(b->e, RG_E_VALUE, "/outputs", NULL, "no outputs: nothing to compute");
  g->output = rgi_alloc_n(g->arena, (size_t)outputs->n, sizeof *g->output);
  bool *taken = rgi_alloc_n(g->arena, (size_t)(g->ntensor + outputs->n), sizeof *taken);
  if (!g->output || !taken) return rgi_nomem(b->e);
  for (int i = 0; i < outputs->n; i++) {
    rgi_pointer at;
    int32_t t = -1;
    rg_status wrong = RG_OK;
    rgi_pointer_key(&at, "/outputs", outputs->key[i]);
    RGI_KEEP(b->all, wrong, rgi_check_identifier(outputs->key[i], "output", at.text, b->e), b->e);
    RGI_KEEP(b->all, wrong, resolve(b, &outputs->item[i], at.text, NULL, &t), b->e);
    if (wrong || (b->all && b->all->n)) continue; /* nothing will come of it */
    int writer = -1;
    if (b->spec->is_state && rgi_next_version(g, rgi_version(g, t, NULL), &writer) >= 0)
      return rgi_fail(
          b->e, RG_E_VALUE, at.text, NULL,
          "'%s' is overwritten by '%s'; of state, only the last version can be an output",
          g->tensor[t].name, g->node[writer].name);
    if (g->tensor[t].producer < 0 || g->tensor[t].base >= 0 || taken[t])
      RGI_TRY(add_copy(b, outputs->key[i], t, at.text, &t));
    taken[t] = true;
    g->tensor[t].region = RGI_R_OUTPUT;
    const char *name = rgi_strdup(g->arena, outputs->key[i]);
    if (!name) return rgi_nomem(b->e);
    g->output[g->noutput++] =
        (rgi_io){.name = name, .tensor = t, .want = RGI_GRAD_NONE, .grad = -1};
  }
  return RG_OK;
}

/* ---- all of it ---- */

static rg_status check_bound(builder *b, bool bind_all) {
  const rg_spec *spec = b->spec;
  b->g->bound = true;
  for (int i = 0; i < spec->nfree; i++) {
    if (b->scope.known[i]) continue;
    b->g->bound = false;
    if (bind_all)
      return rgi_fail(b->e, RG_E_USAGE, NULL, NULL,
                      "the dimension '%s' has no value; bind it: --set %s=VALUE",
                      spec->free_name[i], spec->free_name[i]);
  }
  return RG_OK;
}

/* Blocks are written out when a spec is loaded, by the parameters given then. */
static rg_status check_repeats(builder *b) {
  for (int i = 0; i < b->spec->nrepeat; i++) {
    const rgi_repeat *r = &b->spec->repeat[i];
    const rgi_json *now = &b->scope.param[rgi_names_get(&b->spec->param_index, r->param)];
    if (now->i != r->count)
      return rgi_fail(b->e, RG_E_USAGE, NULL, NULL,
                      "%s is %lld, but the spec was loaded with %lld; a number of copies must be "
                      "set when it is loaded",
                      r->param, (long long)now->i, (long long)r->count);
  }
  return RG_OK;
}

/* How many tensors the spec can name at most; also bounds the graph. */
static rg_status count_tensors(builder *b, size_t *out) {
  const rg_spec *spec = b->spec;
  size_t widest = 0, n = (size_t)spec->inputs->n + (size_t)spec->outputs->n;
  for (int i = 0; i < spec->ctx->nop; i++)
    if ((size_t)spec->ctx->op[i]->nout > widest) widest = (size_t)spec->ctx->op[i]->nout;
  n += widest * (size_t)spec->nodes->n;
  for (int i = 0; i < spec->nodes->n; i++) {
    const rgi_json *node = &spec->nodes->item[i];
    const rgi_json *made = node->type == RGI_JSON_OBJECT ? rgi_json_get(node, "out") : NULL;
    for (int k = 0; made && made->type == RGI_JSON_OBJECT && k < made->n; k++)
      n += (size_t)listed(&made->item[k]);
  }
  *out = n;
  if (n > RGI_MOST_TENSORS)
    return rgi_fail(b->e, RG_E_LIMIT, "/nodes", NULL, "the nodes make more than %d tensors",
                    RGI_MOST_TENSORS);
  return RG_OK;
}

static rg_status build(builder *b, const rg_binding *set, size_t nset, bool bind_all) {
  rgi_graph *g = b->g;
  size_t most;
  RGI_TRY(rgi_scope_open(b->spec, set, nset, g->arena, &b->scope, b->e));
  RGI_TRY(check_bound(b, bind_all));
  RGI_TRY(check_repeats(b));
  RGI_TRY(count_tensors(b, &most));
  if (!rgi_names_init(&b->tensors, g->arena, most)) return rgi_nomem(b->e);
  const size_t nodes = (size_t)b->spec->nodes->n;
  if (b->all && (!rgi_names_init(&b->broken, g->arena, most + nodes) ||
                 !(b->wrong = rgi_alloc_n(g->arena, nodes, sizeof *b->wrong))))
    return rgi_nomem(b->e);
  RGI_TRY(add_inputs(b));
  RGI_TRY(add_nodes(b));
  RGI_TRY(add_outputs(b));
  if (b->all && b->all->n) return b->all->item[0].status;
  RGI_TRY(rgi_fill_lengths(g, b->e));
  RGI_TRY(rgi_prune(g, b->e));
  for (int n = 0; n < g->nnode; n++) g->node[n].rank = n;
  return rgi_verify(g, "load", b->e);
}

static rg_status elaborate(builder *b, const rg_binding *set, size_t nset, bool bind_all,
                           rgi_graph **out) {
  const rg_status before = rgi_error_before(b->e);
  *out = NULL;
  rg_status status = rgi_graph_create(b->spec->ctx, b->spec->name, &b->g, b->e);
  if (status == RG_OK) status = build(b, set, nset, bind_all);
  if (status != RG_OK) {
    rgi_error_place(b->e, before, &b->spec->source);
    rgi_graph_destroy(b->g);
    return status;
  }
  *out = b->g;
  return RG_OK;
}

rg_status rgi_spec_elaborate(const rg_spec *spec, const rg_binding *set, size_t nset, bool bind_all,
                             rgi_graph **out, rg_error *e) {
  builder b = {.spec = spec, .e = e};
  return elaborate(&b, set, nset, bind_all, out);
}

rg_status rgi_spec_elaborate_all(const rg_spec *spec, rgi_errors *all, rgi_graph **out,
                                 rg_error *e) {
  builder b = {.spec = spec, .all = all, .e = e};
  return elaborate(&b, NULL, 0, false, out);
}
