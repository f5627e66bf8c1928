/* graph/elaborate.h: what the two halves of elaboration share: declare.c makes inputs, nodes and
 * the tensors they name; elaborate.c connects them and does the rest. Private to these two. */
#ifndef RGI_ELABORATE_H
#define RGI_ELABORATE_H

#include "spec.h"

typedef struct rgi_builder {
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
} rgi_builder;

/* Tensors a spec lists on a port: v is one name or, on a list port, an array of them. */
static inline int rgi_listed(const rgi_json *v) {
  return v->type == RGI_JSON_ARRAY ? v->n : 1;
}
static inline const rgi_json *rgi_listed_at(const rgi_json *v, int i) {
  return v->type == RGI_JSON_ARRAY ? &v->item[i] : v;
}

/* Fails because `owner` (NULL: the spec) has no `kind` called `got`, with the nearest name there
 * is. `name` gives the i-th of n in `list`, or NULL for one that a spec can't name. */
rg_status rgi_no_such(rgi_builder *b, rg_status code, const char *pointer, const char *node,
                      const char *owner, const char *kind, const char *got,
                      const char *(*name)(const void *list, int i), const void *list, int n);

/* All inputs and state. */
rg_status rgi_declare_inputs(rgi_builder *b);
/* Everything about node i of the spec but what it reads. */
rg_status rgi_declare_node(rgi_builder *b, int i);
/* The tensor that node n makes on its flat output slot. `name` as given, or NODE.PORT. */
rg_status rgi_declare_output(rgi_builder *b, int n, int slot, const char *name,
                             const char *pointer);
/* An error took away node i of the spec, whatever it is. */
void rgi_break_node(rgi_builder *b, int i);

#endif
