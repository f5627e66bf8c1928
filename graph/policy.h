/* graph/policy.h: a loaded policy: what to recompute, as said by the user. */
#ifndef RGI_POLICY_H
#define RGI_POLICY_H

#include "ir.h"
#include "json.h"

typedef enum rgi_preset {
  RGI_PRESET_NONE,
  RGI_PRESET_ALL,
  RGI_PRESET_LIST,
  RGI_PRESET_BUDGET
} rgi_preset;
typedef enum rgi_action { RGI_AUTO, RGI_KEEP, RGI_RECOMPUTE, RGI_OFFLOAD } rgi_action;

/* What a policy says of single nodes. */
typedef struct rgi_rule {
  const char *name; /* of a spec node, or a pattern in which '*' stands for any characters */
  const char *pointer;
  rgi_action action;
} rgi_rule;

enum { RGI_MOST_CP_RANKS = 1024 };

/* How tokens are shared out among ranks. */
typedef struct rgi_cp_policy {
  int ranks; /* 0: not said */
  rg_cp_mode mode;
  bool local_weights; /* gradients of what all ranks have are left unsummed */
  bool wire_bf16;     /* terms of gradients travel as bf16 */
} rgi_cp_policy;

struct rg_policy {
  rgi_arena *arena;
  const rg_context *ctx;
  rgi_source source;
  rgi_preset preset;
  const char **recompute; /* RGI_PRESET_LIST: spec node names, or patterns */
  const char **pointer;   /* … and where each stands */
  int nrecompute;
  rgi_rule *rule; /* before anything else; the last that fits a node decides */
  int nrule;
  int64_t budget;        /* RGI_PRESET_BUDGET: bytes … */
  bool least;            /* … or the least that can be met */
  const char *budget_at; /* where it stands */
  bool budget_of_saved;  /* of saved bytes rather than of the peak */
  int split_heads;       /* KV heads per group; 0: not split */
  bool split_kv;         /* keys of a single token may be shared out: other bits */
  bool host_bound;       /* what is offloaded may take … */
  int64_t host;          /* … so many bytes */
  rgi_cp_policy cp;
};
/* What the rules say of a node; RGI_AUTO: nothing. */
rgi_action rgi_policy_action(const rg_policy *policy, const char *name);
/* Is the node listed? */
bool rgi_policy_lists(const rg_policy *policy, const char *name);
/* Names exist, patterns fit something, what is to be recomputed can be; split_heads divides.
 * Errors are collected in `all`, if that is not NULL. */
rg_status rgi_policy_check(const rg_policy *policy, const rgi_graph *forward, rgi_errors *all,
                           rg_error *e);

#endif
