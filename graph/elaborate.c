/* graph/elaborate.c: from a loaded spec's JSON to a checked forward graph.
 *
 * In order: inputs and state, and nodes with the tensors they make (declare.c); the tensors they
 * read (node order in a file is free, so names are resolved only now); who writes state;
 * topological order; inference; declared outputs; row lengths (lengths.c); what no output needs is
 * dropped. Every error carries the JSON pointer of what is wrong.
 *
 * Where errors are collected, inputs and nodes with one are left out, and so is all that reads from
 * them: their tensors' names are `broken`, and a reader of those fails without an error of its own.
 */
#include "elaborate.h"
#include <stdio.h>
#include <string.h>

static const char *tensor_name(const void *list, int i) {
  return ((const rgi_tensor *)list)[i].name;
}

/* Is it a tensor, or a port of a node, that an error took away? */
static bool is_broken(const rgi_builder *b, const char *name) {
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
static rg_status resolve(rgi_builder *b, const rgi_json *v, const char *pointer, const char *node,
                         int32_t *out) {
  rgi_shown shown;
  if (v->type != RGI_JSON_STRING)
    return rgi_fail(b->e, RG_E_TYPE, pointer, node, "expected the name of a tensor, not %s",
                    rgi_json_kind(&shown, v));
  if (is_broken(b, v->text)) return RG_E_NAME; /* follows from another error */
  *out = rgi_names_get(&b->tensors, v->text);
  if (*out >= 0) return RG_OK;
  for (const rgi_first *f = b->spec->first; f; f = f->next)
    if (f->name == v->text) pointer = f->pointer; /* where it stands in the file */
  return rgi_no_such(b, RG_E_NAME, pointer, node, NULL, "tensor", v->text, tensor_name,
                     b->g->tensor, b->g->ntensor);
}

/* ---- the lengths that nodes need not name ---- */

enum { LENGTH_PORTS = RG_PORT_SEQLENS | RG_PORT_KSEQLENS };

static void add_lengths(rgi_builder *b, int32_t t) {
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
static rg_status find_lengths(rgi_builder *b) {
  rgi_graph *g = b->g;
  const rgi_json *outputs = b->spec->outputs;
  bool *read = rgi_alloc_n(g->arena, (size_t)g->ntensor, sizeof *read);
  if (!read) return rgi_nomem(b->e);
  for (int n = 0; n < g->nnode; n++) {
    const rgi_json *in = rgi_json_get(&b->spec->nodes->item[g->node[n].origin], "in");
    for (int k = 0; in && k < in->n; k++) {
      const int p = rgi_in_port(g->node[n].op, in->key[k]);
      for (int i = 0; i < rgi_listed(&in->item[k]); i++) {
        const rgi_json *name = rgi_listed_at(&in->item[k], i);
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
static rg_status fill_lengths(rgi_builder *b, const rg_op *op, const rg_port *port,
                              const char *where, const char *node, int32_t *out) {
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

static rg_status connect(rgi_builder *b, int n) {
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
    for (int k = 0; v && k < rgi_listed(v); k++) {
      rgi_pointer_key(&port_at, at.text, node->op->in[port].name);
      if (v->type == RGI_JSON_ARRAY) rgi_pointer_index(&port_at, port_at.text, k);
      RGI_KEEP(b->all, wrong, resolve(b, rgi_listed_at(v, k), port_at.text, node->name, &slot[k]),
               b->e);
    }
  }
  return wrong;
}

/* ---- state ---- */

/* Before nodes have an order: what node n reads as its input i, on a port for state, is state that
 * no node before it in the file (first[version]) writes. */
static rg_status check_writer(rgi_builder *b, int n, int i, int32_t *first) {
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

static rg_status check_writers(rgi_builder *b) {
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
      if (wrong) rgi_break_node(b, g->node[n].origin);
    }
  return RG_OK;
}

/* What the declaration of state k names as its next version. */
static rg_status find_next(rgi_builder *b, int k) {
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
static rg_status infer_nodes(rgi_builder *b) {
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
    if (wrong) rgi_break_node(b, origin);
  }
  return RG_OK;
}

static rg_status add_nodes(rgi_builder *b) {
  const rgi_json *nodes = b->spec->nodes;
  rgi_graph *g = b->g;
  /* besides: copies of outputs, and what lengths.c adds, at most one of each kind for a view */
  size_t capacity = 3 * (size_t)nodes->n + (size_t)b->spec->outputs->n;
  g->origin = rgi_alloc_n(g->arena, capacity, sizeof *g->origin);
  if (!g->origin || !rgi_names_init(&b->nodes, g->arena, (size_t)nodes->n)) return rgi_nomem(b->e);
  for (int i = 0; i < nodes->n; i++) {
    rg_status wrong = RG_OK;
    RGI_KEEP(b->all, wrong, rgi_declare_node(b, i), b->e);
    if (wrong) rgi_break_node(b, i);
    g->norigin = i + 1;
  }
  RGI_TRY(find_lengths(b));
  for (int n = 0; n < g->nnode; n++) {
    rg_status wrong = RG_OK;
    RGI_KEEP(b->all, wrong, connect(b, n), b->e);
    if (wrong) rgi_break_node(b, g->node[n].origin);
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
static rg_status add_copy(rgi_builder *b, const char *output, int t, const char *pointer,
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
  RGI_TRY(rgi_declare_output(b, n, 0, name, pointer));
  *out = g->node[n].out[0];
  return rgi_infer_node(g, n, pointer, b->e);
}

/* Every declared output gets a tensor of its own that owns its bytes. */
static rg_status add_outputs(rgi_builder *b) {
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

static rg_status check_bound(rgi_builder *b, bool bind_all) {
  const rg_spec *spec = b->spec;
  char names[200] = "", flags[200] = "";
  int count = 0;
  for (int i = 0; i < spec->nfree; i++) {
    const char *name = spec->free_name[i];
    if (b->scope.known[i]) continue;
    const size_t n = strlen(names), f = strlen(flags);
    snprintf(names + n, sizeof names - n, "%s'%s'", count ? ", " : "", name);
    snprintf(flags + f, sizeof flags - f, " --set %s=VALUE", name);
    count++;
  }
  b->g->bound = count == 0;
  if (b->g->bound || !bind_all) return RG_OK;
  return rgi_fail(b->e, RG_E_USAGE, NULL, NULL,
                  count > 1 ? "the dimensions %s have no value; bind them:%s"
                            : "the dimension %s has no value; bind it:%s",
                  names, flags);
}

/* Blocks are written out when a spec is loaded, by the parameters given then. */
static rg_status check_repeats(rgi_builder *b) {
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
static rg_status count_tensors(rgi_builder *b, size_t *out) {
  const rg_spec *spec = b->spec;
  size_t widest = 0, n = (size_t)spec->inputs->n + (size_t)spec->outputs->n;
  for (int i = 0; i < spec->ctx->nop; i++) { /* of those that a spec can name */
    const rg_op *op = spec->ctx->op[i];
    if (!(op->flags & RG_OP_INTERNAL) && (size_t)op->nout > widest) widest = (size_t)op->nout;
  }
  n += widest * (size_t)spec->nodes->n;
  for (int i = 0; i < spec->nodes->n; i++) {
    const rgi_json *node = &spec->nodes->item[i];
    const rgi_json *made = node->type == RGI_JSON_OBJECT ? rgi_json_get(node, "out") : NULL;
    for (int k = 0; made && made->type == RGI_JSON_OBJECT && k < made->n; k++)
      n += (size_t)rgi_listed(&made->item[k]);
  }
  *out = n;
  if (n > RGI_MOST_TENSORS)
    return rgi_fail(b->e, RG_E_LIMIT, "/nodes", NULL, "the nodes make more than %d tensors",
                    RGI_MOST_TENSORS);
  return RG_OK;
}

static rg_status build(rgi_builder *b, const rg_binding *set, size_t nset, bool bind_all) {
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
  RGI_TRY(rgi_declare_inputs(b));
  RGI_TRY(add_nodes(b));
  RGI_TRY(add_outputs(b));
  if (b->all && b->all->n) return b->all->item[0].status;
  RGI_TRY(rgi_fill_lengths(g, b->e));
  RGI_TRY(rgi_prune(g, b->e));
  for (int n = 0; n < g->nnode; n++) g->node[n].rank = n;
  return rgi_verify(g, "load", b->e);
}

static rg_status elaborate(rgi_builder *b, const rg_binding *set, size_t nset, bool bind_all,
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
  rgi_builder b = {.spec = spec, .e = e};
  return elaborate(&b, set, nset, bind_all, out);
}

rg_status rgi_spec_elaborate_all(const rg_spec *spec, rgi_errors *all, rgi_graph **out,
                                 rg_error *e) {
  rgi_builder b = {.spec = spec, .all = all, .e = e};
  return elaborate(&b, NULL, 0, false, out);
}
