/* exec/plan.c: spec and policy in, plan out: the passes in their order, each result verified, and
   the numbers.

       elaborate → check policy → split heads → autodiff → fuse → recompute → memplan
                 → memory check → steps

   rg_check goes as far as autodiff, rg_pareto as far as fuse. Leaves to others: what each pass
   does, the steps themselves (steps.c), reports (report.c).
 */
#include "plan.h"
#include "../cp/shard.h"
#include "../graph/spec.h"
#include "../passes/passes.h"
#ifdef REGRAPH_CUDA
#include "cuda.h"
#endif

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { MOST_THREADS = 1024 };

/* Everything before the recompute choice: profile, graph, gradients, fusing. */
typedef struct prepared {
  const rg_context *ctx;
  bool cuda;
  rg_gpu gpu;
  int threads;
  rgi_profile *profile;
  rgi_memory_options mem;
  rgi_progress progress;
  rgi_cp_policy cp;
  int64_t rows;         /* of all ranks */
  rgi_graph *graph;     /* after fuse */
  rgi_graph *unfused;   /* before, NULL where nothing was fused */
  rgi_fusions *fusions; /* NULL: switched off */
  double offload_ms[2];
} prepared;

static int cores(void) {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
#endif
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  return n > 0 ? (int)n : 1;
}

/* Bytes for the copies of lengths and positions that forwards make (rgi_clean). */
static rg_status length_copies(const rgi_graph *g, int64_t *out, rg_error *e) {
  bool *known = rgi_malloc(g->ctx, (size_t)g->ntensor + 1);
  rg_status status = known ? RG_OK : rgi_nomem(e);
  if (known) memset(known, 0, (size_t)g->ntensor + 1);
  *out = 0;
  for (int32_t i = 0; i < g->nnode && status == RG_OK; i++)
    for (int p = 0; p < g->node[i].op->nin && status == RG_OK; p++) {
      const int32_t t = rgi_in(&g->node[i], p), owner = t < 0 ? -1 : rgi_owner(g, t);
      if (!(g->node[i].op->in[p].flags & RGI_LENGTH_PORTS) || owner < 0) continue;
      if (known[owner] || g->tensor[owner].producer >= 0) continue;
      known[owner] = true;
      const int64_t bytes = rgi_bytes(&g->tensor[owner]);
      if (bytes > INT64_MAX / 4 || *out > INT64_MAX / 4)
        status =
            rgi_fail(e, RG_E_OVERFLOW, NULL, NULL, "the plan's bytes add up to more than 64 bits");
      else
        *out = rgi_aligned(*out) + bytes;
    }
  rgi_free(g->ctx, known);
  return status;
}

static bool goes_back(const rgi_graph *g) {
  return g->nnode > 0 && g->node[g->nnode - 1].backward;
}

static void report(const prepared *p, const char *stage, double done) {
  if (p->progress.fn) p->progress.fn(p->progress.user, stage, done, 1);
}

/* Replaces *g by `next` after checking it. */
static rg_status advance(rgi_graph **g, rgi_graph *next, const char *stage, rg_error *e) {
  rgi_graph_destroy(*g);
  *g = next;
  return rgi_verify(next, stage, e);
}

RGI_NO_TAIL(rg_plan_options, cp);

static rg_status read_options(const rg_plan_options *given, rg_plan_options *o, rg_error *e) {
  RGI_TRY(RGI_OPTIONS(rg_plan_options, cp, given, o, e));
  const bool cuda = o->device && strcmp(o->device, "cuda") == 0;
  if (o->device && !cuda && strcmp(o->device, "cpu") != 0)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "unknown device \"%s\"; expected \"cpu\" or \"cuda\"", o->device);
  if (o->threads < 0 || o->threads > MOST_THREADS)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "threads is %d; expected 0 (all cores) to %d",
                    o->threads, MOST_THREADS);
  if (!(o->pack_seconds >= 0))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "pack_seconds is %g; expected 0 or more",
                    o->pack_seconds);
  if (o->cp < 0 || o->cp > RGI_MOST_CP_RANKS)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "cp is %lld; expected 0 (the policy's) to %d ranks",
                    (long long)o->cp, RGI_MOST_CP_RANKS);
  if (o->nset && !o->set)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "nset is %zu but set is NULL", o->nset);
  return RG_OK;
}

/* Where a pass finds fault with the policy, the place is in the policy's file. */
static void name_policy(const rg_policy *policy, rg_status status, rg_status before, rg_error *e) {
  if (policy && (status == RG_E_POLICY || status == RG_E_INFEASIBLE))
    rgi_error_place(e, before, &policy->source);
}

static void free_prepared(prepared *p) {
  rgi_graph_destroy(p->graph);
  rgi_graph_destroy(p->unfused);
  rgi_fusions_destroy(p->fusions);
  rgi_profile_destroy(p->profile);
  memset(p, 0, sizeof *p);
}

/* May the budget be met by offloading, too? */
static bool chooses_offload(const rg_policy *policy) {
  return policy && policy->preset == RGI_PRESET_BUDGET && policy->host_bound && policy->host > 0;
}

static bool offloads(const rg_policy *policy) {
  for (int i = 0; policy && i < policy->nrule; i++)
    if (policy->rule[i].action == RGI_OFFLOAD) return true;
  return false;
}

/* What the policy names leaves both graphs' saved memory. */
static rg_status offload(prepared *p, const rg_policy *policy, rg_error *e) {
  rgi_graph *next;
  if (!offloads(policy) || chooses_offload(policy)) return RG_OK;
  bool *chosen = rgi_malloc(p->ctx, (size_t)p->graph->norigin + 1);
  rg_status status = chosen ? RG_OK : rgi_nomem(e);
  report(p, "offload", 0);
  if (status != RG_OK || !rgi_offloaded(p->graph, policy, chosen)) goto done;
  if (p->unfused) {
    RGI_GOTO(status, rgi_offload(p->unfused, chosen, p->profile, &next, p->offload_ms, e), done);
    RGI_GOTO(status, advance(&p->unfused, next, "offload", e), done);
  }
  RGI_GOTO(status, rgi_offload(p->graph, chosen, p->profile, &next, p->offload_ms, e), done);
  status = advance(&p->graph, next, "offload", e);
done:
  rgi_free(p->ctx, chosen);
  return status;
}

/* What is computed again, and where the budget may, what is offloaded. */
static rg_status choose(prepared *p, rg_plan *plan, const rg_policy *policy, rgi_graph **next,
                        rg_error *e) {
  if (!chooses_offload(policy))
    return rgi_recompute(plan->graph, policy, plan->profile, &p->mem, p->progress, next,
                         &plan->choice, e);
  rgi_graph *unfused = NULL;
  double ms[2];
  bool *chosen = rgi_malloc(p->ctx, (size_t)plan->graph->norigin + 1);
  if (!chosen) return rgi_nomem(e);
  rgi_offloaded(plan->graph, policy, chosen);
  rg_status status = rgi_recompute_offload(plan->graph, policy, plan->profile, &p->mem, p->progress,
                                           chosen, plan->offload_ms, next, &plan->choice, e);
  if (status == RG_OK && p->unfused) {
    status = rgi_offload(p->unfused, chosen, p->profile, &unfused, ms, e);
    if (status == RG_OK) status = advance(&p->unfused, unfused, "offload", e);
  }
  rgi_free(p->ctx, chosen);
  return status;
}

static rg_status prepare(const rg_spec *spec, const rg_policy *policy, const rg_plan_options *o,
                         prepared *p, rg_error *e) {
  memset(p, 0, sizeof *p);
  if (!spec) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the spec is NULL");
  const rg_status before = rgi_error_before(e);
  rg_status status;
  rgi_graph *next = NULL;
  p->cuda = o->device && strcmp(o->device, "cuda") == 0;
  p->ctx = rgi_spec_context(spec);
  p->progress = (rgi_progress){o->progress, o->progress_user};
  RGI_GOTO(status,
           rgi_profile_load(p->ctx, o->profile_path, p->cuda ? "cuda" : "cpu", &p->profile, e),
           failed);
  if (p->profile->cuda != p->cuda) {
    status = rgi_fail(e, RG_E_VALUE, NULL, NULL,
                      "profile \"%s\" describes a %s device; expected one for %s", p->profile->name,
                      p->profile->cuda ? "cuda" : "cpu", p->cuda ? "cuda" : "cpu");
    goto failed;
  }
  /* A plan for another machine must not depend on this one's cores. */
  int most = p->cuda ? 1 : cores();
  if (p->profile->threads > 0 && p->profile->threads < most) most = p->profile->threads;
  p->threads = o->threads ? o->threads : most;
  p->gpu = p->profile->gpu;
#ifdef REGRAPH_CUDA
  /* Schedules are made for the GPU that is there, unless another machine's profile was asked
   * for. */
  rg_gpu here;
  if (p->cuda && !rgi_profile_asked(o->profile_path) && rgi_cuda_device(&here, NULL) == RG_OK)
    p->gpu = here;
#endif
  p->profile->elsewhere = p->profile->gpu.cc != p->gpu.cc || p->profile->gpu.sms != p->gpu.sms;
  p->profile->gpu = p->gpu; /* whose kernels the cost model asks for */
  p->mem = (rgi_memory_options){.gpu = p->cuda ? &p->gpu : NULL,
                                .no_reuse = o->no_reuse,
                                .no_inplace = o->no_inplace,
                                .seconds = o->pack_seconds,
                                .alone = o->plan_alone,
                                .threads = p->threads};
  /* Branches side by side need bytes of their own: not where the policy asks for less memory.
   * Copies run beside one lane that computes. */
  p->mem.lanes = p->cuda && !o->no_lanes && !offloads(policy) &&
                 !(policy && (policy->split_heads || policy->preset == RGI_PRESET_BUDGET));

  report(p, "load", 0);
  RGI_GOTO(status, rgi_spec_elaborate(spec, o->set, o->nset, true, &p->graph, e), failed);
  if (o->no_grad)
    for (int i = 0; i < p->graph->ninput; i++) p->graph->input[i].want = RGI_GRAD_NONE;
  RGI_GOTO(status, rgi_verify(p->graph, "load", e), failed);
  if (policy) RGI_GOTO(status, rgi_policy_check(policy, p->graph, NULL, e), failed);

  if (policy && policy->split_heads) {
    report(p, "split", 0);
    status = rgi_split_heads(p->graph, policy->split_heads, &next, e);
    if (status != RG_OK) {
      name_policy(policy, status, before, e);
      goto failed;
    }
    RGI_GOTO(status, advance(&p->graph, next, "split", e), failed);
  }
  if (policy) p->cp = policy->cp;
  if (o->cp) p->cp.ranks = (int)o->cp;
  if (p->cp.ranks > 1) {
    report(p, "cp", 0);
    status = rgi_cp_shard(p->graph, &p->cp, p->mem.gpu, &next, &p->rows, e);
    rgi_error_place(e, before, &spec->source);
    if (status != RG_OK) goto failed;
    RGI_GOTO(status, advance(&p->graph, next, "cp", e), failed);
  }
  report(p, "autodiff", 0);
  RGI_GOTO(status, rgi_autodiff(p->graph, &next, e), failed);
  RGI_GOTO(status, advance(&p->graph, next, "autodiff", e), failed);
  if (p->cuda || goes_back(p->graph))
    RGI_GOTO(status, length_copies(p->graph, &p->mem.reserved, e), failed);
  RGI_GOTO(status, rgi_comm_bytes(p->graph, &p->mem.comm, e), failed);
  if (o->no_fuse) {
    RGI_GOTO(status, offload(p, policy, e), failed);
    return RG_OK;
  }
  report(p, "fuse", 0);
  const bool split_kv = policy && policy->split_kv;
  RGI_GOTO(status, rgi_fuse(p->graph, p->mem.gpu, p->mem.lanes, split_kv, &next, &p->fusions, e),
           failed);
  p->unfused = p->graph;
  p->graph = next;
  if (p->fusions->fused == 0) {
    rgi_graph_destroy(p->unfused);
    p->unfused = NULL;
  }
  RGI_GOTO(status, offload(p, policy, e), failed);
  return RG_OK;

failed:
  free_prepared(p);
  return status;
}

static void fill_sizes(rg_plan *plan) {
  const rgi_memory *m = plan->memory;
  int64_t bound = m->forward_bound > m->backward_bound ? m->forward_bound : m->backward_bound;
  plan->sizes = (rg_sizes){.saved = m->saved,
                           .scratch = m->scratch,
                           .forward_scratch = m->forward_scratch,
                           .backward_scratch = m->backward_scratch,
                           .lower_bound = m->saved + bound + plan->sizes.comm,
                           .predicted_peak = m->saved + m->scratch + plan->sizes.comm,
                           .comm = plan->sizes.comm,
                           .host = m->host};
}

/* Names and values of the dimensions that the spec left free, for reports. */
static rg_status note_capacity(rg_plan *plan, const rg_spec *spec, const rg_plan_options *o,
                               rg_error *e) {
  rgi_scope scope;
  RGI_TRY(rgi_scope_open(spec, o->set, o->nset, plan->arena, &scope, e));
  plan->free_name = rgi_alloc_n(plan->arena, (size_t)spec->nfree + 1, sizeof *plan->free_name);
  plan->free_value = rgi_alloc_n(plan->arena, (size_t)spec->nfree + 1, sizeof *plan->free_value);
  if (!plan->free_name || !plan->free_value) return rgi_nomem(e);
  for (int i = 0; i < spec->nfree; i++) {
    plan->free_name[i] = rgi_strdup(plan->arena, spec->free_name[i]);
    plan->free_value[i] = scope.value[i];
    if (!plan->free_name[i]) return rgi_nomem(e);
    plan->nfree++;
  }
  return RG_OK;
}

static rg_status check_host(int64_t host, const rg_policy *policy, rg_error *e) {
  const rg_status before = rgi_error_before(e);
  char need[32], most[32];
  if (!policy || !policy->host_bound || host <= policy->host) return RG_OK;
  rgi_fail(e, RG_E_INFEASIBLE, "/host", NULL,
           "what is offloaded takes %s (%lld bytes) of the host's memory; the policy allows %s",
           rg_human_bytes(host, need), (long long)host, rg_human_bytes(policy->host, most));
  name_policy(policy, RG_E_INFEASIBLE, before, e);
  return RG_E_INFEASIBLE;
}

rg_status rg_plan_create(const rg_spec *spec, const rg_policy *policy,
                         const rg_plan_options *options, rg_plan **out, rg_error *e) {
  if (!out) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the out-pointer for the plan is NULL");
  *out = NULL;
  prepared p;
  rg_plan_options o;
  const rg_status before = rgi_error_before(e);
  rg_status status;
  rgi_graph *next = NULL;
  RGI_TRY(read_options(options, &o, e));
  RGI_TRY(prepare(spec, policy, &o, &p, e));
  rgi_arena *arena = rgi_arena_create(p.ctx);
  rg_plan *plan = arena ? rgi_alloc(arena, sizeof *plan) : NULL;
  if (!plan) {
    rgi_arena_destroy(arena);
    free_prepared(&p);
    return rgi_nomem(e);
  }
  plan->arena = arena;
  plan->ctx = p.ctx;
  plan->cuda = p.cuda;
  plan->gpu = p.gpu;
  plan->threads = p.threads;
  plan->profile = p.profile;
  plan->cp =
      (rg_cp_info){.ranks = p.cp.ranks > 1 ? p.cp.ranks : 1, .mode = p.cp.mode, .capacity = p.rows};
  plan->graph = p.graph; /* each is replaced by what the next pass makes of it */
  plan->fusions = p.fusions;
  memcpy(plan->offload_ms, p.offload_ms, sizeof p.offload_ms);
  plan->split_heads = policy ? policy->split_heads : 0;
  plan->split_kv = policy && policy->split_kv;

  RGI_GOTO(status, note_capacity(plan, spec, &o, e), failed);
  report(&p, "recompute", 0);
  status = choose(&p, plan, policy, &next, e);
  if (status != RG_OK) {
    name_policy(policy, status, before, e);
    goto failed;
  }
  RGI_GOTO(status, advance(&plan->graph, next, "recompute", e), failed);
  if (p.unfused) {
    plan->fusions->peak_after = plan->choice->peak_after;
    RGI_GOTO(
        status,
        rgi_choice_peak(plan->choice, p.unfused, p.profile, &p.mem, &plan->fusions->peak_before, e),
        failed);
  }
  report(&p, "memplan", 0);
  p.mem.capacity = plan->choice->budget_of_saved ? 0 : plan->choice->budget;
  RGI_GOTO(status, rgi_memplan(plan->graph, &p.mem, &next, &plan->memory, e), failed);
  RGI_GOTO(status, advance(&plan->graph, next, "memplan", e), failed);
  RGI_GOTO(status, rgi_memory_check(plan->graph, plan->memory, e), failed);
  RGI_GOTO(status, check_host(plan->memory->host, policy, e), failed);
  report(&p, "steps", 0);
  RGI_GOTO(status, rgi_plan_steps(plan, e), failed);
  if (plan->cuda) RGI_GOTO(status, rgi_plan_edges(plan, e), failed);
  RGI_GOTO(status, rgi_plan_ranks(plan, e), failed);
  RGI_GOTO(status, rgi_plan_hash(plan, spec->graph, policy, e), failed);
  fill_sizes(plan);
  report(&p, "steps", 1);
  rgi_graph_destroy(p.unfused);
  *out = plan;
  return RG_OK;

failed:
  rgi_graph_destroy(p.unfused);
  rg_plan_destroy(plan);
  return status;
}

void rg_plan_destroy(rg_plan *plan) {
  if (!plan) return;
  rgi_choice_destroy(plan->choice);
  rgi_fusions_destroy(plan->fusions);
  rgi_graph_destroy(plan->graph);
  rgi_profile_destroy(plan->profile);
  rgi_arena_destroy(plan->arena);
}

rg_status rg_plan_sizes(const rg_plan *plan, rg_sizes *out) {
  if (!plan || !out) return RG_E_USAGE;
  *out = plan->sizes;
  return RG_OK;
}

const char *rgi_role_name(rg_role role) {
  static const char *const name[] = {"input", "output", "gradient of output", "gradient of input",
                                     "state"};
  return (unsigned)role < RGI_ROLES ? name[role] : "tensor of unknown role";
}

rg_status rg_plan_tensor(const rg_plan *plan, size_t i, rg_tensor_info *out) {
  if (!plan || !out || i >= (size_t)plan->nbindable) return RG_E_USAGE;
  *out = plan->bindable[i].info;
  return RG_OK;
}

rg_status rg_plan_cp(const rg_plan *plan, rg_cp_info *out) {
  if (!plan || !out) return RG_E_USAGE;
  *out = plan->cp;
  return RG_OK;
}

/* ---- answers that need no whole plan ---- */

/* What a plan would do first: cut heads, append the backward. Both need every extent. */
static rg_status check_bound(const rg_spec *spec, const rg_policy *policy, rg_error *e) {
  rgi_graph *split = NULL, *whole = NULL;
  rg_status status = rgi_split_heads(spec->graph, policy ? policy->split_heads : 0, &split, e);
  if (status == RG_OK) status = rgi_autodiff(split, &whole, e);
  rgi_graph_destroy(whole);
  rgi_graph_destroy(split);
  return status;
}

static rg_status check(const rg_spec *spec, const rg_policy *policy, rgi_errors *all,
                       rg_error *error) {
  if (!spec) return rgi_fail(error, RG_E_USAGE, NULL, NULL, "rg_check needs a spec");
  rg_status before = rgi_error_before(error);
  rg_status status = rgi_verify(spec->graph, "load", error);
  if (status == RG_OK && policy) status = rgi_policy_check(policy, spec->graph, all, error);
  if (status == RG_OK && spec->graph->bound) {
    status = check_bound(spec, policy, error);
    if (status == RG_E_POLICY && policy) rgi_error_place(error, before, &policy->source);
  }
  rgi_error_place(error, before, &spec->source);
  return status;
}

rg_status rg_check(const rg_spec *spec, const rg_policy *policy, rg_error *error) {
  return check(spec, policy, NULL, error);
}

rg_status rg_check_all(const rg_spec *spec, const rg_policy *policy, rg_error *errors, size_t most,
                       size_t *n) {
  rgi_errors all = {errors, most, 0};
  rg_error last = {0};
  if (n) *n = 0;
  if (!errors || !most || !n) return RG_E_USAGE;
  return rgi_kept(&all, check(spec, policy, &all, &last), &last, n);
}

/* What is offloaded by name, whatever is computed again: within the policy's bytes? */
static rg_status check_named(const prepared *p, const rg_policy *policy, rg_error *e) {
  rgi_graph *g, *named = NULL;
  rgi_memory *m;
  rgi_memory_options mem = p->mem;
  double ms[2];
  mem.no_reuse = true; /* nothing to be packed */
  if (!policy || !policy->host_bound) return RG_OK;
  bool *chosen = rgi_malloc(p->ctx, (size_t)p->graph->norigin + 1);
  if (!chosen) return rgi_nomem(e);
  rg_status status = RG_OK;
  if (policy->host > 0 && rgi_offloaded(p->graph, policy, chosen)) /* prepare() left it to us */
    status = rgi_offload(p->graph, chosen, p->profile, &named, ms, e);
  rgi_free(p->ctx, chosen);
  RGI_TRY(status);
  status = rgi_memplan(named ? named : p->graph, &mem, &g, &m, e);
  if (status == RG_OK) {
    status = check_host(m->host, policy, e);
    rgi_graph_destroy(g);
  }
  rgi_graph_destroy(named);
  return status;
}

rg_status rg_pareto(const rg_spec *spec, const rg_policy *policy, const rg_plan_options *options,
                    const char *format, rg_text *out, rg_error *e) {
  if (!out) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the out-pointer for the text is NULL");
  *out = (rg_text){0};
  if (!format) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the format is NULL");
  prepared p;
  rg_plan_options o;
  RGI_TRY(read_options(options, &o, e));
  o.no_lanes = true; /* the front is about memory */
  /* … and about what is computed again, beside what is offloaded by name; with host bytes to be
   * had, about both */
  rg_policy front = {0};
  const bool both = policy && policy->host_bound && policy->host > 0;
  if (policy) {
    front = *policy;
    front.preset = both ? RGI_PRESET_BUDGET : policy->preset;
    front.host_bound = both;
  }
  RGI_TRY(prepare(spec, policy ? &front : NULL, &o, &p, e));
  rgi_buf b;
  rgi_buf_init(&b, p.ctx);
  rg_status status = check_named(&p, policy, e);
  if (status == RG_OK)
    status =
        rgi_pareto(p.graph, both ? &front : NULL, p.profile, &p.mem, p.progress, format, &b, e);
  if (status == RG_OK)
    status = rgi_buf_finish(&b, out, e);
  else
    rgi_buf_free(&b);
  free_prepared(&p);
  return status;
}
