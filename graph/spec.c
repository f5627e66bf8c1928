/* graph/spec.c: specs as the public header sees them: load, ask for tensors, solve, write.

   A spec keeps its JSON tree, so a plan can elaborate it again with more names bound, and the graph
   that the bindings at load gave. Nothing is written after loading: threads share a spec freely.
 */
#include "spec.h"
#include <stdio.h>
#include <string.h>

const rg_context *rgi_spec_context(const rg_spec *spec) {
  return spec->ctx;
}

/* ---- loading ---- */

static rg_status member(const rgi_json *root, const char *key, rgi_json_type type,
                        const rgi_json **out, rg_error *e) {
  rgi_pointer p;
  *out = rgi_json_get(root, key);
  return *out ? rgi_json_expect(*out, type, rgi_pointer_key(&p, "", key), NULL, e) : RG_OK;
}

rg_status rgi_spec_limit(int n, const char *pointer, const char *what, int most, rg_error *e) {
  if (n <= most) return RG_OK;
  return rgi_fail(e, RG_E_LIMIT, pointer, NULL, "%d %s; at most %d are possible", n, what, most);
}

static rg_status check_texts(const rgi_json *root, const rgi_json *name, rg_error *e) {
  const rgi_json *v;
  if (name) RGI_TRY(rgi_check_identifier(name->text, "spec", "/name", e));
  RGI_TRY(member(root, "doc", RGI_JSON_STRING, &v, e));
  return member(root, "$schema", RGI_JSON_STRING, &v, e); /* an editor's business */
}

/* The top level: which members there are and what JSON type they have. */
static rg_status read_root(rg_spec *s, rgi_errors *all, rg_error *e) {
  static const char *const keys[] = {"regraph", "inputs", "nodes",   "outputs", "name",
                                     "params",  "doc",    "$schema", "state"};
  const rgi_json *v;
  rg_status wrong = RG_OK, harmless = RG_OK; /* to what follows */
  RGI_TRY(rgi_json_is(s->root, "regraph", e));
  RGI_TRY(rgi_json_keys(s->root, "a spec", keys, RGI_COUNT(keys), 4, "", NULL, e));
  RGI_TRY(member(s->root, "regraph", RGI_JSON_INT, &v, e));
  if (v->i != 1)
    return rgi_fail(e, RG_E_VALUE, "/regraph", NULL,
                    "format version %lld; this library reads version 1", (long long)v->i);
  RGI_TRY(member(s->root, "name", RGI_JSON_STRING, &v, e));
  s->name = v ? v->text : "graph";
  RGI_KEEP(all, harmless, check_texts(s->root, v, e), e);
  RGI_KEEP(all, wrong, member(s->root, "params", RGI_JSON_OBJECT, &s->params, e), e);
  RGI_KEEP(all, wrong, member(s->root, "inputs", RGI_JSON_OBJECT, &s->inputs, e), e);
  RGI_KEEP(all, wrong, member(s->root, "state", RGI_JSON_OBJECT, &s->state, e), e);
  RGI_KEEP(all, wrong, member(s->root, "nodes", RGI_JSON_ARRAY, &s->nodes, e), e);
  RGI_KEEP(all, wrong, member(s->root, "outputs", RGI_JSON_OBJECT, &s->outputs, e), e);
  (void)harmless;
  if (wrong) return wrong;
  if (s->params) RGI_TRY(rgi_spec_limit(s->params->n, "/params", "parameters", RGI_MOST_NAMES, e));
  RGI_TRY(rgi_spec_limit(s->inputs->n, "/inputs", "inputs", RGI_MOST_NAMES, e));
  RGI_TRY(rgi_spec_limit(s->nodes->n, "/nodes", "nodes", RGI_MOST_NODES, e));
  return rgi_spec_limit(s->outputs->n, "/outputs", "outputs", RGI_MOST_NAMES, e);
}

static rg_status keep_bindings(rg_spec *s, const rg_binding *set, size_t nset, rg_error *e) {
  rg_binding *copy = rgi_alloc_n(s->arena, nset, sizeof *copy);
  if (!copy) return rgi_nomem(e);
  for (size_t i = 0; i < nset; i++) {
    if (!set[i].name) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "binding %zu has no name", i);
    copy[i] = set[i];
    copy[i].name = rgi_strdup(s->arena, set[i].name);
    if (set[i].text) copy[i].text = rgi_strdup(s->arena, set[i].text);
    if (!copy[i].name || (set[i].text && !copy[i].text)) return rgi_nomem(e);
  }
  s->set = copy;
  s->nset = nset;
  return RG_OK;
}

/* ---- what the caller binds ---- */

static void describe_tensor(const rgi_tensor *t, const char *name, rg_role role,
                            rg_tensor_info *out) {
  int64_t bytes = (int64_t)rg_dtype_size(t->dtype);
  *out = (rg_tensor_info){
      .name = name, .role = role, .dtype = t->dtype, .rank = t->rank, .alignment = -1};
  for (int i = 0; i < t->rank; i++) {
    out->dim[i] = rgi_dim_known(t->dim[i]) ? t->dim[i].c : -1;
    /* at most 2^42: checked by inference */
    bytes = bytes < 0 || out->dim[i] < 0 ? -1 : bytes * out->dim[i];
  }
  out->bytes = bytes;
}

/* Which tensors does a gradient flow through: does some input that wants one reach them? */
static bool *differentiable(const rgi_graph *g, rgi_arena *a) {
  bool *live = rgi_alloc_n(a, (size_t)g->ntensor, sizeof *live);
  if (!live) return NULL;
  for (int i = 0; i < g->ninput; i++) live[g->input[i].tensor] = g->input[i].want != RGI_GRAD_NONE;
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    bool any = false;
    if (!node->op->backward && !(node->op->rules && node->op->rules->backward)) continue;
    for (int i = 0; i < rgi_nin(node); i++) any = any || (node->in[i] >= 0 && live[node->in[i]]);
    for (int i = 0; i < rgi_nout(node); i++)
      if (node->out[i] >= 0) live[node->out[i]] = any && g->tensor[node->out[i]].dtype != RG_I32;
  }
  return live;
}

static void mark_ports(const rgi_graph *g, rg_tensor_info *info) {
  for (int i = 0; i < g->ninput; i++)
    for (int n = 0; n < g->nnode; n++) {
      const rgi_node *node = &g->node[n];
      for (int p = 0; p < node->op->nin; p++) {
        if (rgi_in(node, p) != g->input[i].tensor) continue;
        uint32_t flags = node->op->in[p].flags;
        if (flags & (RG_PORT_SEQLENS | RG_PORT_KSEQLENS)) info[i].seqlens = true;
        if (flags & RG_PORT_OFFSETS) info[i].offsets = true;
      }
    }
}

static rg_status list_tensors(rg_spec *s, rg_error *e) {
  const rgi_graph *g = s->graph;
  size_t most = 2 * ((size_t)g->ninput + (size_t)g->noutput);
  const bool *live = differentiable(g, s->arena);
  rg_tensor_info *info = rgi_alloc_n(s->arena, most, sizeof *info);
  if (!live || !info) return rgi_nomem(e);
  size_t n = 0;
  for (int i = 0; i < g->ninput; i++)
    describe_tensor(&g->tensor[g->input[i].tensor], g->input[i].name,
                    g->input[i].state ? RG_STATE : RG_INPUT, &info[n++]);
  for (int i = 0; i < g->noutput; i++)
    describe_tensor(&g->tensor[g->output[i].tensor], g->output[i].name, RG_OUTPUT, &info[n++]);
  for (int i = 0; i < g->noutput; i++)
    if (live[g->output[i].tensor])
      describe_tensor(&g->tensor[g->output[i].tensor], g->output[i].name, RG_GRAD_IN, &info[n++]);
  for (int i = 0; i < g->ninput; i++) {
    if (g->input[i].want == RGI_GRAD_NONE) continue;
    rgi_tensor t = g->tensor[g->input[i].tensor];
    bool accumulate = g->input[i].want == RGI_GRAD_ACCUMULATE;
    if (accumulate) t.dtype = RG_F32;
    describe_tensor(&t, g->input[i].name, RG_GRAD_OUT, &info[n]);
    info[n++].accumulates = accumulate;
  }
  mark_ports(g, info);
  s->info = info;
  s->ninfo = n;
  return RG_OK;
}

static bool same_words(const rg_error *a, const rg_error *b) {
  return a->status == b->status && strcmp(a->message, b->message) == 0;
}

static rg_status load(const rg_context *ctx, const rgi_source *source, const rgi_json *tree,
                      const rg_binding *set, size_t nset, rg_spec **out, rgi_errors *all,
                      rg_error *e);

/* What one binding does wrong shows wherever the spec uses it. Of places of which the same is said,
 * and which are right without the bindings, the first stays. */
static void tell_bindings_once(const rg_context *ctx, const rgi_source *source,
                               const rgi_json *tree, rgi_errors *all) {
  rg_error e = {0};
  rg_spec *without = NULL;
  rgi_errors own = {rgi_malloc(ctx, all->n * sizeof *own.item), all->n, 0};
  if (!own.item) return; /* then each place is listed */
  load(ctx, source, tree, NULL, 0, &without, &own, &e);
  rg_spec_destroy(without);
  size_t n = 0;
  for (size_t i = 0; i < all->n; i++) {
    bool again = false, regardless = false;
    for (size_t k = 0; k < n && !again; k++) again = same_words(&all->item[k], &all->item[i]);
    for (size_t k = 0; k < own.n && !regardless; k++)
      regardless = same_words(&own.item[k], &all->item[i]) &&
                   strcmp(own.item[k].pointer, all->item[i].pointer) == 0;
    if (!again || regardless) all->item[n++] = all->item[i];
  }
  all->n = n;
  rgi_free(ctx, own.item);
}

/* From the source's text, or from `tree` where there is none. */
static rg_status load(const rg_context *ctx, const rgi_source *source, const rgi_json *tree,
                      const rg_binding *set, size_t nset, rg_spec **out, rgi_errors *all,
                      rg_error *e) {
  rg_status before = rgi_error_before(e), status;
  rgi_arena *a = rgi_arena_create(ctx);
  rg_spec *s = a ? rgi_alloc(a, sizeof *s) : NULL;
  if (!s) {
    rgi_arena_destroy(a);
    return rgi_nomem(e);
  }
  *s = (rg_spec){.arena = a, .ctx = ctx};
  if (tree)
    RGI_GOTO(status, rgi_json_copy(a, tree, &s->root, e), fail);
  else
    RGI_GOTO(status, rgi_json_parse(a, source->text, source->size, &s->root, e), fail);
  RGI_GOTO(status, rgi_source_copy(a, source, &s->source) ? RG_OK : rgi_nomem(e), fail);
  RGI_GOTO(status, read_root(s, all, e), fail);
  RGI_GOTO(status, keep_bindings(s, set, nset, e), fail);
  RGI_GOTO(status, rgi_spec_repeat(s, e), fail);
  RGI_GOTO(status, rgi_scope_collect(s, all, e), fail);
  RGI_GOTO(status, rgi_spec_elaborate_all(s, all, &s->graph, e), fail);
  RGI_GOTO(status, list_tensors(s, e), fail);
  *out = s;
  return RG_OK;
fail:
  if (all && all->n > 1 && nset) tell_bindings_once(ctx, source, tree, all);
  for (size_t i = 0; all && i < all->n; i++) rgi_error_place(&all->item[i], RG_OK, source);
  rgi_error_place(e, before, source);
  rg_spec_destroy(s);
  return status;
}

rg_status rgi_spec_from(const rg_context *ctx, const rgi_json *tree, const char *name,
                        const rg_binding *set, size_t nset, rg_spec **out, rg_error *e) {
  const rgi_source source = {.name = name};
  return load(ctx, &source, tree, set, nset, out, NULL, e);
}

/* Collects in `all` where that is given, and then e is its own. */
static rg_status load_text(rg_context *ctx, const char *text, size_t size, const char *name,
                           const rg_binding *set, size_t nset, rg_spec **out, rgi_errors *all,
                           rg_error *e) {
  if (out) *out = NULL;
  if (!ctx || !text || !out || (nset && !set))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_spec_load_text needs a context, a text and a place for the spec");
  const rgi_source source = {name ? name : "spec", text, size};
  return load(ctx, &source, NULL, set, nset, out, all, e);
}

static rg_status load_file(rg_context *ctx, const char *path, const rg_binding *set, size_t nset,
                           rg_spec **out, rgi_errors *all, rg_error *e) {
  char *text;
  size_t size;
  if (out) *out = NULL;
  if (!ctx || !path || !out || (nset && !set))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_spec_load_file needs a context, a path and a place for the spec");
  rg_status before = rgi_error_before(e);
  rg_status status = rgi_read_file(ctx, path, &text, &size, e);
  if (status == RG_OK) {
    const rgi_source source = {path, text, size};
    status = load(ctx, &source, NULL, set, nset, out, all, e);
    rgi_free(ctx, text);
  }
  rgi_error_file(e, before, path);
  return status;
}

rg_status rg_spec_load_text(rg_context *ctx, const char *text, size_t size, const char *name,
                            const rg_binding *set, size_t nset, rg_spec **out, rg_error *error) {
  return load_text(ctx, text, size, name, set, nset, out, NULL, error);
}

rg_status rg_spec_load_file(rg_context *ctx, const char *path, const rg_binding *set, size_t nset,
                            rg_spec **out, rg_error *error) {
  return load_file(ctx, path, set, nset, out, NULL, error);
}

rg_status rg_spec_load_text_all(rg_context *ctx, const char *text, size_t size, const char *name,
                                const rg_binding *set, size_t nset, rg_spec **out, rg_error *errors,
                                size_t most, size_t *n) {
  rgi_errors all = {errors, most, 0};
  rg_error last = {0};
  if (n) *n = 0;
  if (!errors || !most || !n) return RG_E_USAGE;
  return rgi_kept(&all, load_text(ctx, text, size, name, set, nset, out, &all, &last), &last, n);
}

rg_status rg_spec_load_file_all(rg_context *ctx, const char *path, const rg_binding *set,
                                size_t nset, rg_spec **out, rg_error *errors, size_t most,
                                size_t *n) {
  rgi_errors all = {errors, most, 0};
  rg_error last = {0};
  if (n) *n = 0;
  if (!errors || !most || !n) return RG_E_USAGE;
  return rgi_kept(&all, load_file(ctx, path, set, nset, out, &all, &last), &last, n);
}

void rg_spec_destroy(rg_spec *spec) {
  if (!spec) return;
  rgi_graph_destroy(spec->graph);
  rgi_arena_destroy(spec->arena);
}

rg_status rg_spec_tensor(const rg_spec *spec, size_t i, rg_tensor_info *out) {
  if (!spec || !out || i >= spec->ninfo) return RG_E_USAGE;
  *out = spec->info[i];
  return RG_OK;
}

/* ---- solving ---- */

/* One axis of the given shape. *progress when a name got its value. */
static rg_status solve_axis(const rg_spec *spec, rgi_scope *scope, const rgi_json *axis,
                            int64_t extent, const char *pointer, rg_binding *solved,
                            size_t capacity, size_t *n, bool *progress, rg_error *e) {
  rgi_dim d;
  rgi_shown shown;
  char text[128];
  RGI_TRY(rgi_scope_dim(scope, axis, pointer, NULL, &d, e));
  if (rgi_dim_known(d)) {
    if (d.c == extent) return RG_OK;
    if (axis->type == RGI_JSON_STRING)
      return rgi_fail(e, RG_E_SHAPE, pointer, NULL, "the array has %lld here, but %s is %lld",
                      (long long)extent, rgi_show(&shown, axis->text), (long long)d.c);
    return rgi_fail(e, RG_E_SHAPE, pointer, NULL, "the array has %lld here; expected %lld",
                    (long long)extent, (long long)d.c);
  }
  int name = d.nterm == 1 ? rgi_names_get(&spec->free_index, d.term[0].atom) : -1;
  if (name < 0) return RG_OK; /* several unknowns, or a quotient: other axes may settle it */
  int64_t rest, coef = d.term[0].coef;
  if (!rgi_add(extent, d.c == INT64_MIN ? INT64_MAX : -d.c, &rest) ||
      (rest == INT64_MIN && coef == -1) || rest % coef != 0 || rest / coef < 0)
    return rgi_fail(e, RG_E_SHAPE, pointer, NULL,
                    "the array has %lld here, which no '%s' in %s can give", (long long)extent,
                    spec->free_name[name], rgi_dim_text(d, text, sizeof text));
  if (*n >= capacity)
    return rgi_fail(e, RG_E_USAGE, pointer, NULL, "no room for another solved dimension past %zu",
                    capacity);
  solved[(*n)++] = (rg_binding){.name = spec->free_name[name], .value = rest / coef};
  scope->known[name] = *progress = true;
  scope->value[name] = rest / coef;
  return RG_OK;
}

static rg_status solve(const rg_spec *spec, const rgi_json *shape, const char *pointer, int rank,
                       const int64_t *dim, rg_binding *solved, size_t capacity, size_t *n,
                       rgi_arena *a, rg_error *e) {
  rgi_scope scope;
  if (shape->n != rank)
    return rgi_fail(e, RG_E_RANK, pointer, NULL, "the array has %d axes; expected %d", rank,
                    shape->n);
  RGI_TRY(rgi_scope_open(spec, solved, *n, a, &scope, e));
  for (bool progress = true; progress;) {
    progress = false;
    for (int i = 0; i < rank; i++) {
      rgi_pointer p;
      RGI_TRY(solve_axis(spec, &scope, &shape->item[i], dim[i], rgi_pointer_index(&p, pointer, i),
                         solved, capacity, n, &progress, e));
    }
  }
  return RG_OK;
}

rg_status rg_spec_solve(const rg_spec *spec, const char *input, int rank, const int64_t *dim,
                        rg_binding *solved, size_t capacity, size_t *nsolved, rg_error *error) {
  if (!spec || !input || !nsolved || (rank > 0 && !dim) || (*nsolved && !solved) ||
      (capacity && !solved))
    return rgi_fail(error, RG_E_USAGE, NULL, NULL,
                    "rg_spec_solve needs a spec, an input, its shape and a place");
  rgi_shown shown, hint;
  rgi_pointer at, p;
  rg_status before = rgi_error_before(error), status;
  const rgi_json *in = rgi_json_get(spec->inputs, input);
  if (!in) {
    return rgi_fail(error, RG_E_NAME, NULL, NULL, "the spec has no input '%s'%s",
                    rgi_show(&shown, input),
                    rgi_hint(&hint, input, spec->inputs->key, spec->inputs->n));
  }
  rgi_arena *a = rgi_arena_create(spec->ctx);
  if (!a) return rgi_nomem(error);
  rgi_spec_input_at(spec, (int)(in - spec->inputs->item), &at);
  status = solve(spec, rgi_json_get(in, "shape"), rgi_pointer_key(&p, at.text, "shape"), rank, dim,
                 solved, capacity, nsolved, a, error);
  rgi_error_place(error, before, &spec->source);
  rgi_arena_destroy(a);
  return status;
}

/* ---- writing ---- */

static void write_shape(rgi_buf *b, const rgi_tensor *t) {
  char axis[128];
  rgi_buf_printf(b, "%s [", rg_dtype_name(t->dtype));
  for (int i = 0; i < t->rank; i++)
    rgi_buf_printf(b, "%s%s", i ? ", " : "", rgi_dim_text(t->dim[i], axis, sizeof axis));
  rgi_buf_printf(b, "]");
}

static bool is_set(const rg_spec *spec, const char *name) {
  for (size_t k = 0; k < spec->nset; k++)
    if (strcmp(spec->set[k].name, name) == 0) return true;
  return false;
}

static void write_summary(const rg_spec *spec, rgi_buf *b) {
  static const char *const grad[] = {"", ", gradient", ", gradient added to an fp32 buffer"};
  const rgi_graph *g = spec->graph;
  rgi_buf_printf(b, "%s: %d node%s, ", spec->name, g->nnode, g->nnode == 1 ? "" : "s");
  if (g->bound) rgi_buf_printf(b, "all dimensions bound");
  for (int i = 0, n = 0; i < spec->nfree && !g->bound; i++) /* those that are still free */
    if (!is_set(spec, spec->free_name[i]))
      rgi_buf_printf(b, "%s%s", n++ ? ", " : "free: ", spec->free_name[i]);
  rgi_buf_printf(b, "\n");
  if (spec->nfree) {
    rgi_buf_printf(b, "dimensions");
    for (int i = 0; i < spec->nfree; i++) {
      const char *value = NULL;
      char number[32];
      for (size_t k = 0; k < spec->nset; k++) {
        if (strcmp(spec->set[k].name, spec->free_name[i]) != 0) continue;
        snprintf(number, sizeof number, "%lld", (long long)spec->set[k].value);
        value = spec->set[k].text ? spec->set[k].text : number;
      }
      rgi_buf_printf(b, " %s%s%s", spec->free_name[i], value ? "=" : "", value ? value : "");
    }
    rgi_buf_printf(b, "\n");
  }
  for (int i = 0; spec->params && i < spec->params->n; i++)
    rgi_buf_printf(b, "param  %s\n", spec->params->key[i]);
  for (int i = 0; i < g->ninput; i++) {
    rgi_buf_printf(b, "%s %-16s ", g->input[i].state ? "state " : "input ", g->input[i].name);
    write_shape(b, &g->tensor[g->input[i].tensor]);
    rgi_buf_printf(b, "%s\n", grad[g->input[i].want]);
  }
  for (int n = 0; n < g->nnode; n++)
    rgi_buf_printf(b, "node   %-16s %s%s\n", g->node[n].name, g->node[n].op->name,
                   g->node[n].op->flags & RG_OP_VIEW ? " (view)" : "");
  for (int i = 0; i < g->noutput; i++) {
    rgi_buf_printf(b, "output %-16s ", g->output[i].name);
    write_shape(b, &g->tensor[g->output[i].tensor]);
    rgi_buf_printf(b, "\n");
  }
}

rg_status rg_spec_write(const rg_spec *spec, const char *format, rg_text *out, rg_error *error) {
  static const char *const formats[] = {"text", "dot", "summary", "json"};
  if (out) *out = (rg_text){0};
  if (!spec || !format || !out)
    return rgi_fail(error, RG_E_USAGE, NULL, NULL,
                    "rg_spec_write needs a spec, a format and a place for the text");
  rgi_buf b;
  rgi_shown shown, hint;
  rgi_buf_init(&b, spec->ctx);
  if (strcmp(format, "text") == 0)
    rgi_dump_text(spec->graph, &b);
  else if (strcmp(format, "dot") == 0)
    rgi_dump_dot(spec->graph, &b);
  else if (strcmp(format, "summary") == 0)
    write_summary(spec, &b);
  else if (strcmp(format, "json") == 0)
    rgi_json_write(spec->root, &b);
  else
    return rgi_fail(error, RG_E_USAGE, NULL, NULL, "there is no spec format '%s'%s",
                    rgi_show(&shown, format), rgi_hint(&hint, format, formats, RGI_COUNT(formats)));
  return rgi_buf_finish(&b, out, error);
}
