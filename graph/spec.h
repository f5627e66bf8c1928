/* graph/spec.h: a loaded spec, shared by spec.c (the public side), scope.c (parameters and
 * dimensions), declare.c and elaborate.c (from JSON to graph). Immutable once rg_spec_load_…
 * has returned it. */
#ifndef RGI_SPEC_H
#define RGI_SPEC_H

#include "ir.h"
#include "json.h"

enum { RGI_MOST_NODES = 16384, RGI_MOST_NAMES = 4096, RGI_MOST_TENSORS = 1 << 17 };

/* A count of copies that a parameter gave. */
typedef struct rgi_repeat {
  const char *param;
  int64_t count;
} rgi_repeat;

/* A name that a block's first copy reads where its nodes have the carried one. */
typedef struct rgi_first {
  const struct rgi_first *next;
  const char *name, *pointer; /* the name itself, by which it is known, not its letters */
} rgi_first;

struct rg_spec {
  rgi_arena *arena; /* owns everything below but the graph */
  const rg_context *ctx;
  rgi_source source;
  const char *name;
  const rgi_json *root;
  const rgi_json *params, *inputs, *nodes,
      *outputs;                     /* members of root, blocks written out; params may be NULL */
  const rgi_json *state;            /* as it stands in root, or NULL */
  const char **node_at, **input_at; /* where each stands in the file; NULL without blocks, … */
  bool *is_state;                   /* … which of `inputs` are state (which joins them there) */
  rgi_repeat *repeat;
  int nrepeat;
  const rgi_first *first;
  const char **free_name; /* names in input shapes that are no parameters, in order of appearance */
  int nfree;
  rgi_names param_index, free_index;
  rg_binding *set; /* given at load */
  size_t nset;
  rgi_graph *graph; /* elaborated with `set` alone */
  rg_tensor_info *info;
  size_t ninfo;
};

/* Writes out the blocks that the nodes repeat, and puts state behind the inputs (repeat.c). */
rg_status rgi_spec_repeat(rg_spec *spec, rg_error *e);
/* Where an input or state, resp. a node stands in the file; each returns p->text. */
static inline const char *rgi_spec_input_at(const rg_spec *spec, int i, rgi_pointer *p) {
  return spec->input_at ? rgi_pointer_set(p, spec->input_at[i])
                        : rgi_pointer_key(p, "/inputs", spec->inputs->key[i]);
}
static inline const char *rgi_spec_node_at(const rg_spec *spec, int i, rgi_pointer *p) {
  return spec->node_at ? rgi_pointer_set(p, spec->node_at[i]) : rgi_pointer_index(p, "/nodes", i);
}

/* Elaborates the parsed spec with bindings in force. Unbound extents stay symbolic unless
 * `bind_all`. */
rg_status rgi_spec_elaborate(const rg_spec *spec, const rg_binding *set, size_t nset, bool bind_all,
                             rgi_graph **out, rg_error *e);
/* What loading does with it, collecting errors in `all` (NULL: the first is the last). */
rg_status rgi_spec_elaborate_all(const rg_spec *spec, rgi_errors *all, rgi_graph **out,
                                 rg_error *e);
const rg_context *rgi_spec_context(const rg_spec *spec);

/* The spec that a document says: what loading does after parsing. The tree (borrowed) keeps what
 * json.h promises of one; `name` stands for the file in messages. */
rg_status rgi_spec_from(const rg_context *ctx, const rgi_json *tree, const char *name,
                        const rg_binding *set, size_t nset, rg_spec **out, rg_error *e);
/* RG_E_LIMIT if n things are more than `most`; `what` names them. */
rg_status rgi_spec_limit(int n, const char *pointer, const char *what, int most, rg_error *e);

/* Fills in every tensor's `seqlens` and the lengths ports that the spec left open (lengths.c). */
rg_status rgi_fill_lengths(rgi_graph *g, rg_error *e);

/* ---- names in force: parameters after overrides, free dimensions as far as they are bound ---- */

typedef struct rgi_scope {
  const rg_spec *spec;
  rgi_arena *arena; /* of the dims it makes; borrowed */
  rgi_json *param;  /* one per spec parameter: a scalar */
  int64_t *value;   /* one per free name … */
  bool *known;      /* … valid where true */
  bool constant;    /* attributes: only parameters, and only integers */
  const char *odd;  /* a known name that the last lookup could not use … */
  char missing[65]; /* … or the name it did not know */
} rgi_scope;

/* Finds the names of input shapes; fills spec->free_name, free_index, param_index. */
rg_status rgi_scope_collect(rg_spec *spec, rgi_errors *all, rg_error *e);
/* Applies spec->set, then `set`. Unknown names are RG_E_USAGE. */
rg_status rgi_scope_open(const rg_spec *spec, const rg_binding *set, size_t nset, rgi_arena *a,
                         rgi_scope *out, rg_error *e);
/* An integer or an expression string → extent. `pointer` and `node` go into errors. */
rg_status rgi_scope_dim(rgi_scope *s, const rgi_json *v, const char *pointer, const char *node,
                        rgi_dim *out, rg_error *e);
/* The same for attributes: must come out as a number. "$name" is accepted too. */
rg_status rgi_scope_int(rgi_scope *s, const rgi_json *v, const char *pointer, const char *node,
                        int64_t *out, rg_error *e);
/* Replaces a string "$name" by the parameter it names; anything else is itself. */
rg_status rgi_scope_value(const rgi_scope *s, const rgi_json *v, const char *pointer,
                          const char *node, const rgi_json **out, rg_error *e);

#endif
