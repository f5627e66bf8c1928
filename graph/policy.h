/* graph/policy.h: a loaded policy: what to recompute, as said by the user. */
#ifndef RGI_POLICY_H
#define RGI_POLICY_H

#include "ir.h"

typedef enum rgi_preset {
  RGI_PRESET_NONE,
  RGI_PRESET_ALL,
  RGI_PRESET_LIST,
  RGI_PRESET_BUDGET
} rgi_preset;
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

#endif
