/* graph/plugin.c: loads ops from shared libraries; see plugin.h.

   Stock ops are right because tests say so; a plugin's tables come from outside, and everything
   later (inference, autodiff, the schema) trusts them. So they are checked here, once, as far as
   tables can be: names, ports, shapes, attributes, and whether a backward op fits its forward op.
   What an op computes is the plugin's business.
 */
#include "plugin.h"
#include "ir.h"
#include "json.h"
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct rgi_plugin_handle {
  struct rgi_plugin_handle *next;
  void *library;
};

enum {
  MOST_PORTS = 48,
  MOST_ATTRS = 48,
  LONGEST_NAME = 40,
  LONGEST_AXIS = 60,
  LONGEST_VARIABLE = 20
};
#define KNOWN_PORT_FLAGS                                                              \
  (RG_PORT_OPTIONAL | RG_PORT_LIST | RG_PORT_ROWS | RG_PORT_KROWS | RG_PORT_SEQLENS | \
   RG_PORT_KSEQLENS | RG_PORT_GRAD | RG_PORT_OFFSETS)
#define KNOWN_OP_FLAGS (RG_OP_INTERNAL | RG_OP_RECOMPUTABLE | RG_OP_INPLACE | RG_OP_ROWWISE)

/* What is being checked, for messages. */
typedef struct checking {
  const rg_context *ctx;
  const rg_plugin *plugin;
  const rg_op *op;
  rg_error *e;
} checking;

static rg_status bad(const checking *k, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static rg_status bad(const checking *k, const char *format, ...) {
  char text[400];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  return rgi_fail(k->e, RG_E_PLUGIN, NULL, NULL,
                  "plugin \"%.60s\", op \"%.60s\": %s; correct the plugin's table", k->plugin->name,
                  k->op && k->op->name ? k->op->name : "?", text);
}

/* A letter, then letters, digits, _ and (in ops and their backward ports) dots. */
static bool good_name(const char *name) {
  if (!name || !isalpha((unsigned char)*name) || strlen(name) > LONGEST_NAME) return false;
  for (const char *p = name; *p; p++)
    if (!isalnum((unsigned char)*p) && *p != '_' && *p != '.') return false;
  return true;
}

/* ---- ports ---- */

static const rg_port *find_port(const rg_port *port, int n, const char *name) {
  for (int i = 0; i < n; i++)
    if (strcmp(port[i].name, name) == 0) return &port[i];
  return NULL;
}

static bool plain(const char *axis) {
  if (!isalpha((unsigned char)*axis)) return false;
  for (; *axis; axis++)
    if (!isalnum((unsigned char)*axis) && *axis != '_') return false;
  return true;
}

/* Copies the axis at *shape, moves *shape past it and its comma; false if it is too long. */
static bool next_axis(const char **shape, char axis[LONGEST_AXIS + 1]) {
  size_t n = strcspn(*shape, ",");
  if (n > LONGEST_AXIS) return false;
  memcpy(axis, *shape, n);
  axis[n] = 0;
  *shape += n + ((*shape)[n] == ',');
  return true;
}

/* A name in an axis expression: an integer attribute, or a plain axis of some in-port. */
typedef struct scope {
  const rg_op *op;
  rgi_arena *arena;
} scope;

static bool in_scope(void *user, const char *name, rgi_dim *out) {
  const scope *s = user;
  *out = rgi_dim_of(1); /* an attribute; its value does not matter, and 1 divides everything */
  for (int i = 0; i < s->op->nattr; i++)
    if (s->op->attrs[i].type == RG_ATTR_INT && strcmp(s->op->attrs[i].name, name) == 0) return true;
  for (int p = 0; p < s->op->nin; p++) {
    char axis[LONGEST_AXIS + 1];
    for (const char *shape = s->op->in[p].shape; *shape;) {
      if (!next_axis(&shape, axis)) break;
      if (strcmp(axis, name) != 0) continue;
      *out = rgi_dim_symbol(s->arena, name);
      return true;
    }
  }
  return false;
}

/* An in-port's plain axes are variables; any other axis must be an expression
 * over them and the attributes. */
static rg_status check_shape(const checking *k, const rg_port *port, bool output, rgi_arena *arena,
                             int *rank) {
  char axis[LONGEST_AXIS + 1];
  scope s = {.op = k->op, .arena = arena};
  *rank = 0;
  if (strcmp(port->shape, "...") == 0) {
    *rank = RG_MAX_RANK;
    for (int p = 0; p < k->op->nin; p++)
      if (strcmp(k->op->in[p].shape, "...") == 0) return RG_OK;
    return bad(k, "out-port \"%s\" has shape \"...\", but no in-port has", port->name);
  }
  for (const char *shape = port->shape; *shape; ++*rank) {
    if (*rank == RG_MAX_RANK)
      return bad(k, "port \"%s\" has more than %d axes", port->name, RG_MAX_RANK);
    if (!next_axis(&shape, axis))
      return bad(k, "an axis of port \"%s\" is longer than %d characters", port->name,
                 LONGEST_AXIS);
    if (plain(axis) && strlen(axis) > LONGEST_VARIABLE)
      return bad(k, "axis \"%s\" of port \"%s\" has a name longer than %d characters", axis,
                 port->name, LONGEST_VARIABLE);
    if (!output && plain(axis)) continue;
    rgi_dim ignored;
    rg_error why = {0};
    rg_status status = rgi_dim_parse(arena, axis, in_scope, &s, &ignored, &why);
    if (status == RG_E_NOMEM) return rgi_nomem(k->e);
    if (status != RG_OK)
      return bad(k,
                 "axis \"%s\" of port \"%s\" does not follow from the in-ports and integer "
                 "attributes: %.200s",
                 axis, port->name, why.message);
  }
  return RG_OK;
}

static rg_status check_ports(const checking *k, const rg_port *port, int n, bool output) {
  const char *side = output ? "out" : "in";
  if (n < 0 || n > MOST_PORTS || (n > 0 && !port))
    return bad(k, "has %d %s-ports; 0 to %d and a table are expected", n, side, MOST_PORTS);
  if (output && n == 0) return bad(k, "has no out-port");
  for (int i = 0; i < n; i++) {
    const rg_port *p = &port[i];
    if (!good_name(p->name))
      return bad(
          k, "%s-port %d is named \"%.60s\"; a letter, then letters, digits, _ and . are expected",
          side, i, p->name ? p->name : "(null)");
    if (find_port(port, i, p->name)) return bad(k, "%s-port \"%s\" occurs twice", side, p->name);
    if (!p->shape || !p->doc)
      return bad(k, "%s-port \"%s\" lacks a shape or a doc line", side, p->name);
    if (p->flags & ~(uint32_t)KNOWN_PORT_FLAGS)
      return bad(k, "%s-port \"%s\" has unknown flags 0x%x", side, p->name,
                 (unsigned)(p->flags & ~(uint32_t)KNOWN_PORT_FLAGS));
    if (!p->dtypes || p->dtypes >> RG_DTYPE_COUNT)
      return bad(k, "%s-port \"%s\" has the dtype set 0x%x; a set of RG_D() values is expected",
                 side, p->name, (unsigned)p->dtypes);
    if (p->type && !isalpha((unsigned char)p->type))
      return bad(k, "%s-port \"%s\" has dtype variable %d; a letter or 0 is expected", side,
                 p->name, p->type);
    if (p->flags & (RG_PORT_SEQLENS | RG_PORT_KSEQLENS | RG_PORT_OFFSETS) &&
        (output || p->dtypes != RG_D(RG_I32)))
      return bad(k, "%s-port \"%s\" is said to hold lengths or offsets; only i32 in-ports may",
                 side, p->name);
  }
  return RG_OK;
}

/* Needs names and attributes checked before. */
static rg_status check_shapes(const checking *k, const rg_port *port, int n, bool output,
                              rgi_arena *arena) {
  for (int i = 0; i < n; i++) {
    int rank;
    RGI_TRY(check_shape(k, &port[i], output, arena, &rank));
    if (port[i].head_axis < -1 || port[i].head_axis >= rank)
      return bad(k, "port \"%s\" [%s] has head_axis %d; -1 or one of its axes is expected",
                 port[i].name, port[i].shape, port[i].head_axis);
    const bool list = port[i].flags & RG_PORT_LIST;
    /* a list of outputs follows a list of inputs, element by element */
    const char *of = port[i].name + 2;
    const rg_port *follows =
        strncmp(port[i].name, "d.", 2) == 0 ? find_port(k->op->in, k->op->nin, of) : NULL;
    if (output && list && !(follows && follows->flags & RG_PORT_LIST))
      return bad(k,
                 "out-port \"%s\" is a list, which only \"d.NAME\" of an in-list \"NAME\" may be",
                 port[i].name);
  }
  return RG_OK;
}

/* ---- attributes ---- */

static rg_status check_attrs(const checking *k) {
  const rg_op *op = k->op;
  if (op->nattr < 0 || op->nattr > MOST_ATTRS || (op->nattr > 0 && !op->attrs))
    return bad(k, "has %d attributes; 0 to %d and a table are expected", op->nattr, MOST_ATTRS);
  for (int i = 0; i < op->nattr; i++) {
    const rg_attr *a = &op->attrs[i];
    if (!good_name(a->name))
      return bad(
          k,
          "attribute %d is named \"%.60s\"; a letter, then letters, digits, _ and . are expected",
          i, a->name ? a->name : "(null)");
    for (int j = 0; j < i; j++)
      if (strcmp(op->attrs[j].name, a->name) == 0)
        return bad(k, "attribute \"%s\" occurs twice", a->name);
    if (!a->doc) return bad(k, "attribute \"%s\" lacks a doc line", a->name);
    if (a->type < RG_ATTR_INT || a->type > RG_ATTR_INTS)
      return bad(k, "attribute \"%s\" has the unknown type %d", a->name, (int)a->type);
    if (!(a->min <= a->max))
      return bad(k, "attribute \"%s\" has min %g above max %g", a->name, a->min, a->max);
    bool bounded = a->min < a->max && (a->type == RG_ATTR_INT || a->type == RG_ATTR_FLOAT);
    if (bounded && !a->required && !(a->def >= a->min && a->def <= a->max))
      return bad(k, "attribute \"%s\" has default %g outside %g … %g", a->name, a->def, a->min,
                 a->max);
    if (a->type != RG_ATTR_ENUM) continue;
    int n = 0;
    while (a->choices && a->choices[n]) n++;
    if (n == 0 || !(a->def >= 0 && a->def < n))
      return bad(k, "attribute \"%s\" has %d choices and default %g", a->name, n, a->def);
  }
  return RG_OK;
}

/* ---- backward ---- */

static const rg_op *find_op(const checking *k, const char *name) {
  for (int i = 0; i < k->plugin->nop; i++)
    if (strcmp(k->plugin->ops[i]->name, name) == 0) return k->plugin->ops[i];
  return rgi_find_op(k->ctx, name);
}

/* The port of the forward op that a backward port speaks of, by its name. */
static const rg_port *forward_port(const rg_op *op, const char *name) {
  if (strncmp(name, "out.", 4) == 0) return find_port(op->out, op->nout, name + 4);
  if (strncmp(name, "grad.", 5) == 0) return find_port(op->out, op->nout, name + 5);
  if (strncmp(name, "delta.", 6) == 0) return find_port(op->out, op->nout, name + 6);
  if (strncmp(name, "acc.", 4) == 0) return find_port(op->in, op->nin, name + 4);
  return find_port(op->in, op->nin, name);
}

static rg_status check_backward(const checking *k) {
  const rg_op *op = k->op;
  if (!op->backward) return RG_OK;
  const rg_op *b = find_op(k, op->backward);
  if (!b)
    return bad(k, "its backward op \"%.60s\" is neither in the plugin nor known", op->backward);
  bool same = b->nattr == op->nattr;
  for (int i = 0; i < op->nattr && same; i++)
    same =
        strcmp(op->attrs[i].name, b->attrs[i].name) == 0 && op->attrs[i].type == b->attrs[i].type;
  if (!same)
    return bad(k, "its backward op \"%s\" has other attributes; both must have the same table",
               b->name);
  for (int i = 0; i < b->nin; i++) {
    const rg_port *f = forward_port(op, b->in[i].name);
    if (!f || (f->flags ^ b->in[i].flags) & RG_PORT_LIST)
      return bad(
          k,
          "in-port \"%s\" of its backward op is none of NAME, out.NAME, grad.NAME, delta.NAME, "
          "acc.NAME for a port of "
          "the same kind here",
          b->in[i].name);
  }
  for (int i = 0; i < b->nout; i++) {
    const rg_port *d = &b->out[i];
    const rg_port *f =
        strncmp(d->name, "d.", 2) == 0 ? find_port(op->in, op->nin, d->name + 2) : NULL;
    if (!f || (f->flags ^ d->flags) & RG_PORT_LIST || !(d->flags & RG_PORT_GRAD))
      return bad(k,
                 "out-port \"%s\" of its backward op is not d.NAME, flagged RG_PORT_GRAD, for an "
                 "in-port here",
                 d->name);
  }
  return RG_OK;
}

/* ---- ops ---- */

static rg_status check_op(const checking *k, int i, rgi_arena *arena) {
  const rg_op *op = k->op;
  if (op->abi != RG_OP_ABI)
    return bad(k,
               "has op ABI %u, this regraph has %u: rebuild it against this version's regraph/op.h",
               op->abi, RG_OP_ABI);
  if (!good_name(op->name))
    return bad(k, "op %d is named \"%.60s\"; a letter, then letters, digits, _ and . are expected",
               i, op->name ? op->name : "(null)");
  if (rgi_find_op(k->ctx, op->name))
    return rgi_fail(k->e, RG_E_PLUGIN, NULL, NULL,
                    "plugin \"%.60s\" brings an op \"%s\", but there is one of that name already; "
                    "rename the plugin's, "
                    "or load the plugin only once",
                    k->plugin->name, op->name);
  for (int j = 0; j < i; j++)
    if (strcmp(k->plugin->ops[j]->name, op->name) == 0) return bad(k, "occurs twice in the plugin");
  if (!op->doc || !op->run_cpu || !op->cost) return bad(k, "lacks a doc line, run_cpu or cost");
  if (op->flags & ~(uint32_t)KNOWN_OP_FLAGS || op->rules)
    return bad(k, "has flags 0x%x%s; views and structural rules are the graph's own",
               (unsigned)op->flags, op->rules ? " and rules" : "");
  RGI_TRY(check_ports(k, op->in, op->nin, false));
  RGI_TRY(check_ports(k, op->out, op->nout, true));
  RGI_TRY(check_attrs(k));
  RGI_TRY(check_shapes(k, op->in, op->nin, false, arena));
  return check_shapes(k, op->out, op->nout, true, arena);
}

static rg_status check_plugin(const rg_context *ctx, const rg_plugin *plugin, rgi_arena *arena,
                              rg_error *e) {
  if (plugin->abi != RG_OP_ABI)
    return rgi_fail(e, RG_E_PLUGIN, NULL, NULL,
                    "the plugin has op ABI %u, this regraph has %u: rebuild it against this "
                    "version's regraph/op.h",
                    plugin->abi, RG_OP_ABI);
  if (!plugin->name || plugin->nop < 1 || !plugin->ops)
    return rgi_fail(e, RG_E_PLUGIN, NULL, NULL,
                    "the plugin has %d ops; a name and at least one op are expected", plugin->nop);
  checking k = {.ctx = ctx, .plugin = plugin, .e = e};
  for (int i = 0; i < plugin->nop; i++) {
    k.op = plugin->ops[i];
    if (!k.op) return bad(&k, "op %d is NULL", i);
    RGI_TRY(check_op(&k, i, arena));
  }
  for (int i = 0; i < plugin->nop; i++) { /* once all of them have sound tables */
    k.op = plugin->ops[i];
    RGI_TRY(check_backward(&k));
  }
  return RG_OK;
}

rg_status rgi_plugin_add(rg_context *ctx, const rg_plugin *plugin, rg_error *e) {
  rgi_arena *arena = rgi_arena_create(ctx);
  if (!arena) return rgi_nomem(e);
  rg_status status = check_plugin(ctx, plugin, arena, e);
  rgi_arena_destroy(arena);
  if (status != RG_OK) return status;
  const rg_op **table = rgi_malloc(ctx, (size_t)(ctx->nop + plugin->nop) * sizeof *table);
  if (!table) return rgi_nomem(e);
  int n = ctx->nop;
  memcpy(table, ctx->op, (size_t)n * sizeof *table);
  for (int i = 0; i < plugin->nop; i++, n++) { /* each into its place: the table stays sorted */
    int at = n;
    for (; at > 0 && strcmp(plugin->ops[i]->name, table[at - 1]->name) < 0; at--)
      table[at] = table[at - 1];
    table[at] = plugin->ops[i];
  }
  rgi_free(ctx, ctx->op);
  ctx->op = table;
  ctx->nop = n;
  return RG_OK;
}

/* ---- files ---- */

/* Makes the names this library exports visible to plugins also where the host program loaded it
 * privately (Python does). In a program that has regraph linked into it there is nothing to do, and
 * nothing happens. */
static void show_own_names(void) {
  Dl_info self;
  if (!dladdr((void *)(uintptr_t)&rg_plugin_load, &self) || !self.dli_fname) return;
  void *library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
  if (library) dlclose(library); /* the names stay visible */
}

static rg_status open_library(const rg_context *ctx, const char *path, void **library,
                              rg_error *e) {
  if (access(path, R_OK) != 0)
    return rgi_fail(e, RG_E_IO, NULL, NULL,
                    "can't open the plugin: %s; the path of a shared library is expected",
                    strerror(errno));
  char *local = NULL; /* dlopen would look for a bare name among the system's libraries */
  if (!strchr(path, '/')) {
    local = rgi_malloc(ctx, strlen(path) + 3);
    if (!local) return rgi_nomem(e);
    sprintf(local, "./%s", path);
  }
  show_own_names();
  *library = dlopen(local ? local : path, RTLD_NOW | RTLD_LOCAL);
  rgi_free(ctx, local);
  if (*library) return RG_OK;
  const char *why = dlerror();
  return rgi_fail(e, RG_E_PLUGIN, NULL, NULL,
                  "can't load the plugin: %.300s; a shared library built for this machine and this "
                  "regraph is expected",
                  why ? why : "no reason given");
}

rg_status rg_plugin_load(rg_context *ctx, const char *path, rg_error *error) {
  if (!ctx || !path)
    return rgi_fail(error, RG_E_USAGE, NULL, NULL, "rg_plugin_load needs a context and a path");
  rg_status before = error ? error->status : RG_OK, status;
  void *library = NULL;
  struct rgi_plugin_handle *handle = rgi_malloc(ctx, sizeof *handle);
  if (!handle) return rgi_nomem(error);
  RGI_GOTO(status, open_library(ctx, path, &library, error), fail);
  const rg_plugin *plugin = dlsym(library, "regraph_plugin");
  if (!plugin) {
    status = rgi_fail(
        error, RG_E_PLUGIN, NULL, NULL,
        "the library does not export \"regraph_plugin\"; a plugin defines it as a const rg_plugin");
    goto fail;
  }
  RGI_GOTO(status, rgi_plugin_add(ctx, plugin, error), fail);
  *handle = (struct rgi_plugin_handle){.next = ctx->plugins, .library = library};
  ctx->plugins = handle;
  return RG_OK;
fail:
  rgi_error_file(error, before, path);
  if (library) dlclose(library);
  rgi_free(ctx, handle);
  return status;
}

void rgi_plugins_unload(rg_context *ctx) {
  while (ctx->plugins) {
    struct rgi_plugin_handle *handle = ctx->plugins;
    ctx->plugins = handle->next;
    dlclose(handle->library);
    rgi_free(ctx, handle);
  }
}
