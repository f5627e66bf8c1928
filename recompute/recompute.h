/* recompute/recompute.h: decides what backward computes again instead of reading it from saved
   memory, and rewrites the graph accordingly.

   Takes a differentiated graph; a policy names spec nodes, presets or a budget. A recomputed node
   is cloned into the backward direction (name `x.re`), at most once, directly before the clone's
   first reader there; the clone's values are bit-equal. Judges every choice by what memplan makes
   of it. Leaves lifetimes and packing to memplan.
 */
#ifndef RGI_RECOMPUTE_H
#define RGI_RECOMPUTE_H

#include "../graph/policy.h"
#include "../graph/profile.h"
#include "../memplan/memplan.h"

/* Called now and then; fn may be NULL. */
typedef struct rgi_progress {
  void (*fn)(void *user, const char *stage, double done, double total);
  void *user;
} rgi_progress;

/* What became of one spec node (all head groups together). */
typedef struct rgi_choice_node {
  const char *name; /* of the spec node */
  const char *op;   /* its op's name */
  bool recomputable;
  bool candidate; /* recomputable, and backward reads what it makes */
  bool recomputed;
  bool offloaded; /* by the policy */
  /* bytes of its outputs that stay in saved memory while it is kept alone among the recomputed */
  int64_t saved_bytes;
  double extra_ms; /* model time of computing it again (spent if recomputed, spared if kept) */
  /* one clause: "named by the policy", "backward reads nothing of it", "not worth its time" … */
  const char *why;
} rgi_choice_node;

typedef struct rgi_choice {
  rgi_arena *arena; /* owns this struct and all it points to */
  rgi_preset preset;
  int64_t budget; /* RGI_PRESET_BUDGET: bytes, else 0 */
  bool least;     /* … which are the least that can be met */
  bool budget_of_saved;
  int named;             /* candidates that the policy says itself what to do with */
  rgi_choice_node *node; /* per graph origin, same order */
  int nnode;
  double all_ms;   /* model time of everything with nothing recomputed */
  double extra_ms; /* model time of everything recomputed */
  double wait_ms;  /* model time of offloading, where the budget chose what is offloaded, too */
  /* no choice within the budget takes less than this of both; == their sum where optimal */
  double bound_ms;
  double gap; /* (extra_ms + wait_ms - bound_ms) by all_ms, 0 where optimal */
  bool optimal;
  int64_t explored;                  /* choices looked at; 0 where the policy left none */
  int64_t saved_before, peak_before; /* bytes with everything kept */
  int64_t saved_after, peak_after;   /* bytes with this choice */
} rgi_choice;

/* policy NULL recomputes nothing. *out is a verified graph; *report (may be NULL to do without) has
 * its own arena. RG_E_INFEASIBLE says the least bytes any choice reaches. */
rg_status rgi_recompute(const rgi_graph *g, const rg_policy *policy, const rgi_profile *profile,
                        const rgi_memory_options *mem, rgi_progress progress, rgi_graph **out,
                        rgi_choice **report, rg_error *e);
/* Before that, where the policy says so: what chosen nodes (of chosen[norigin]) make and backward
 * reads is copied to tensors in the host's memory (rgi_tensor.host) as soon as it is there, and
 * back right before backward's first reader, for whatever is computed again from it, too;
 * rgi_recompute then moves a GPU's copies to where they run beside the rest. ms[2]: the copies'
 * model time in either direction, of a GPU's what is waited for them. */
rg_status rgi_offload(const rgi_graph *g, const bool *chosen, const rgi_profile *profile,
                      rgi_graph **out, double ms[2], rg_error *e);
/* A budget that may be met by offloading, too: policy->host_bound. chosen[norigin]: what is
 * offloaded in any case, and then all that is; ms as above. The rest as rgi_recompute, of the graph
 * with the copies (offload.c). */
rg_status rgi_recompute_offload(const rgi_graph *g, const rg_policy *policy,
                                const rgi_profile *profile, const rgi_memory_options *mem,
                                rgi_progress progress, bool *chosen, double ms[2], rgi_graph **out,
                                rgi_choice **report, rg_error *e);
/* Into chosen[norigin]: what the policy offloads. false: nothing. */
bool rgi_offloaded(const rgi_graph *g, const rg_policy *policy, bool *chosen);
/* The most bytes alive at once, saved and scratch, if g (of the same spec) had this choice made. */
rg_status rgi_choice_peak(const rgi_choice *c, const rgi_graph *g, const rgi_profile *profile,
                          const rgi_memory_options *mem, int64_t *peak, rg_error *e);
void rgi_choice_destroy(rgi_choice *c); /* NULL is fine */

/* A few lines, resp. one JSON object (no trailing newline); report.c. */
void rgi_choice_text(const rgi_choice *c, rgi_buf *out);
void rgi_choice_json(const rgi_choice *c, rgi_buf *out);

/* The front of (peak bytes, extra milliseconds) over all choices; `format` "text", "json" or
 * "svg". `host`: NULL, or a policy whose host bytes choices may take, too; g then has no copies
 * yet. */
rg_status rgi_pareto(const rgi_graph *g, const rg_policy *host, const rgi_profile *profile,
                     const rgi_memory_options *mem, rgi_progress progress, const char *format,
                     rgi_buf *out, rg_error *e);

#endif
