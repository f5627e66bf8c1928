/* exec/plan.h: what a plan holds, for the files of exec/.

   A plan is immutable once rg_plan_create returns: sessions on any number of threads read it
   without locks. It keeps nothing of spec, policy or options.

       step[0 … nforward)          forward, in order
       step[nforward … nstep)      backward, in order

   Every address a step needs is a place: either an offset into memory the caller binds (place.bind
   is the index into bindable[]) or into the saved or scratch block. A run only adds base pointers.
 */
#ifndef RGI_PLAN_H
#define RGI_PLAN_H

#include "../cp/comm.h"
#include "../graph/json.h"
#include "../graph/profile.h"
#include "../memplan/memplan.h"
#include "../passes/fuse.h"
#include "../recompute/recompute.h"

/* In-ports whose contents obey rules (rgi_check). */
enum { RGI_LENGTH_PORTS = RG_PORT_SEQLENS | RG_PORT_KSEQLENS | RG_PORT_OFFSETS };

enum { RGI_ROLES = RG_STATE + 1 };
/* "input", "gradient of output" … */
const char *rgi_role_name(rg_role role);

enum { RGI_AT_SAVED = -1, RGI_AT_SCRATCH = -2, RGI_AT_NOTHING = -3, RGI_AT_HOST = -4 };

typedef struct rgi_place {
  int32_t bind;   /* index into bindable[], or RGI_AT_… */
  int64_t offset; /* bytes */
} rgi_place;

typedef struct rgi_step {
  int32_t node;
  /* template: args without data, no pool, no error; arrays live in the plan's arena */
  rg_call call;
  rgi_place *place; /* [nin + nout], inputs first */
  int32_t nin, nout;
  int32_t first_arg; /* where a session's copy of the args stands; inputs first */
  int64_t workspace; /* byte offset in scratch, or -1 */
  int64_t workspace_size;
  int64_t comm_size; /* from the start of the comm block: collectives run one by one */
  rg_cost cost;
  rg_dtype dtype;         /* whose rate of products the cost model takes */
  double ms, roofline_ms; /* the cost model's */
} rgi_step;

/* What kernels on a GPU may take for granted of every bound address (rg_arg.align is never more). A
 * CPU needs what elements need. */
enum { RGI_GPU_ALIGN = 16 };

typedef struct rgi_bindable {
  rg_tensor_info info;
  int32_t tensor;           /* as declared */
  int32_t owner;            /* whose bytes are the caller's */
  bool read[2], written[2]; /* by steps of the forward, of the backward */
} rgi_bindable;

/* A rule for the contents of an input that the host reads before each forward. */
typedef struct rgi_check {
  int32_t bind;
  int64_t offset; /* bytes */
  int64_t n;      /* entries */
  int64_t stride; /* elements */
  /* sequence starts: begin at 0, never fall, last <= capacity; else positions: >= 0 */
  bool starts;
  int64_t capacity; /* rows they govern */
  int32_t lengths;  /* positions: index of the check of the starts they go with, or -1 */
} rgi_check;

/* Each forward begins by copying lengths and positions into the saved block, rules enforced, and
 * steps read the copy: the host cannot look at a GPU's memory, and on either device the backward
 * must go by the forward's lengths, whatever the caller's memory holds by then. Forwards without a
 * backward on the CPU need none. */
typedef struct rgi_clean {
  int32_t bind;
  int64_t offset; /* bytes into saved */
  int64_t n;      /* entries */
} rgi_clean;

struct rg_plan {
  rgi_arena *arena; /* owns this struct and the arrays below */
  const rg_context *ctx;
  bool cuda;
  rg_gpu gpu; /* cuda: what the plan is made for */
  int threads;
  rgi_profile *profile;
  rgi_graph *graph;   /* differentiated, rewritten, with addresses */
  rgi_memory *memory; /* lives in graph */
  rgi_choice *choice;
  double offload_ms[2]; /* what copies to the host's memory and back add to either direction */
  int split_heads;      /* the policy's: KV heads in a group; 0: not split */
  bool split_kv;        /* the policy's, whether or not a node takes it */
  rgi_fusions *fusions; /* NULL: switched off */
  rgi_step *step;
  int32_t nstep, nforward, nargs;
  rgi_bindable *bindable;
  int32_t nbindable;
  rgi_names by_name[RGI_ROLES]; /* name → index into bindable[] */
  rgi_check *check;
  int32_t ncheck;
  rgi_clean *clean;
  int32_t nclean;
  /* per step: the steps that must have run before it (nearest ones), ended by -1 */
  int32_t **after;
  /* per step: chains of steps that run one after another, numbered per direction */
  int32_t *lane;
  rg_sizes sizes;
  rg_cp_info cp; /* as the policy has it; collectives of the spec's own count as ranks, too */
  rgi_cp_field field[RGI_CP_FIELDS]; /* what all ranks must have in common */
  int nfield;
  const char **free_name; /* the spec's free dimensions … */
  int64_t *free_value;    /* … and what they are bound to: the plan's capacity */
  int nfree;
};

/* Fills step[], bindable[], check[], clean[] of a plan whose graph and memory are set (steps.c). */
rg_status rgi_plan_steps(rg_plan *plan, rg_error *e);
/* Fills cp.ranks and sizes.comm from the steps: all collectives have the same number of ranks
 * (ranks.c). */
rg_status rgi_plan_ranks(rg_plan *plan, rg_error *e);
/* The bytes of the comm block that nodes of g need. */
rg_status rgi_comm_bytes(const rgi_graph *g, int64_t *out, rg_error *e);
/* Fills field[]: hashes of spec, policy and what became of them. The policy may be NULL. */
rg_status rgi_plan_hash(rg_plan *plan, const rgi_graph *spec, const rg_policy *policy, rg_error *e);
/* Fills after[]: which steps wait for which, from the bytes they touch (edges.c). */
rg_status rgi_plan_edges(rg_plan *plan, rg_error *e);
/* leads[i - from] of steps from … to: the bytes that the dearest collective behind step i sends;
 * returns the most of them. What the dear ones wait for goes before the rest (edges.c). */
double rgi_plan_leads(const rg_plan *plan, int32_t from, int32_t to, double *leads);
bool rgi_leads_first(double leads, double dearest);
/* Which kernels step i takes: "wgmma", "plain: d_v 40", or NULL where there is but one way. */
const char *rgi_plan_path(const rg_plan *plan, int32_t i);
/* RG_E_DEVICE, with both by name: a GPU that is not the plan's lacks its kernels, or the shared
 * memory for its tiles. */
rg_status rgi_plan_runs_on(const rg_plan *plan, const rg_gpu *here, rg_error *e);
/* RG_E_DEVICE: a block of `bytes` was refused; says what is free and which tensors are largest. */
rg_status rgi_plan_no_memory(const rg_plan *plan, int64_t bytes, int64_t have, int64_t all,
                             rg_error *e);
/* Where tensor t starts. */
rg_status rgi_plan_place(const rg_plan *plan, int32_t t, rgi_place *out, rg_error *e);

#endif
