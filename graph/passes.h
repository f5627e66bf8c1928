/* graph/passes.h: the rewrites of graph/, each a pure function from a graph to a new, verified one. */
#ifndef RGI_PASSES_H
#define RGI_PASSES_H

#include "ir.h"

/* ---- load (spec.c): text → spec → graph ---- */

/* Elaborates the parsed spec with bindings in force. Unbound extents stay symbolic unless `bind_all`. */
rg_status rgi_spec_elaborate(const rg_spec *spec, const rg_binding *set, size_t nset, bool bind_all,
                             rgi_graph **out, rg_error *e);
const rg_context *rgi_spec_context(const rg_spec *spec);
const char *rgi_spec_file(const rg_spec *spec);

/* ---- policy (policy.c) ---- */

typedef enum rgi_preset { RGI_PRESET_NONE, RGI_PRESET_ALL, RGI_PRESET_LIST, RGI_PRESET_BUDGET } rgi_preset;
struct rg_policy {
  rgi_arena *arena;
  const rg_context *ctx;
  const char *file;
  rgi_preset preset;
  const char **recompute; /* RGI_PRESET_LIST: spec node names */
  const char **pointer;   /* … and where each stands */
  int nrecompute;
  int64_t budget;       /* RGI_PRESET_BUDGET: bytes */
  bool budget_of_saved; /* of saved bytes rather than of the peak */
  int split_heads;      /* KV heads per group; 0: not split */
};
/* Names exist and are recomputable; split_heads divides. */
rg_status rgi_policy_check(const rg_policy *policy, const rgi_graph *forward, rg_error *e);

/* ---- split (split.c): cut into groups of `heads` KV heads by views; 0 copies ---- */
rg_status rgi_split_heads(const rgi_graph *g, int heads, rgi_graph **out, rg_error *e);

/* ---- autodiff (autodiff.c): append the backward nodes that the requested gradients need ---- */
rg_status rgi_autodiff(const rgi_graph *g, rgi_graph **out, rg_error *e);

#endif
