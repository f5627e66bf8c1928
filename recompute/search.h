/* recompute/search.h: what the parts of recompute/ share: the rewrite for a given choice, and a
   cheap model of choices.

   A choice is one bool per spec node (graph origin): compute it again in backward. The model looks
   at the graph once and then bounds the memory of any choice from below in microseconds; whether a
   choice fits is decided by memplan alone.
 */
#ifndef RGI_RECOMPUTE_SEARCH_H
#define RGI_RECOMPUTE_SEARCH_H

#include "../graph/bits.h"
#include "recompute.h"
#include <string.h>

/* The graph with the chosen nodes cloned into backward. *extra_ms: model time of the clones, and
 * what copies are waited for longer than without. A clone that reads an offloaded tensor reads what
 * comes back, which comes as early as that needs; a GPU's copies are moved to their windows. Not
 * verified. */
rg_status rgi_rewrite(const rgi_graph *g, const bool *chosen, const rgi_profile *profile,
                      rgi_graph **out, double *extra_ms, rg_error *e);
/* May a policy name this origin at all? */
bool rgi_recomputable(const rgi_origin *o);
/* May this node be computed again? Not one that makes lengths: few numbers, and all who count by
 * them must find the same tensor (I8). */
bool rgi_repeatable(const rgi_graph *g, const rgi_node *node);
/* The tensor with bytes of its own that node n copies back from the host's memory, or -1. */
int rgi_brings_back(const rgi_graph *g, int n);
/* Model time of one node. */
rg_status rgi_node_ms(const rgi_graph *g, int n, const rgi_profile *profile, rgi_arena *a,
                      double *ms, rg_error *e);

/* Into bytes[ntensor]: what offloading tensor t would move, alone; 0: nothing does. */
rg_status rgi_offload_bytes(const rgi_graph *g, int64_t *bytes, rg_error *e);
/* Moves a GPU's copies, which stand right behind what they copy and right before their readers, to
 * where they begin or end, so that they run beside what computes; or leaves them, without `move`.
 * wait[2]: what either direction waits for them. (windows.c, like the rest of this part) */
rg_status rgi_copy_windows(rgi_graph *g, const rgi_profile *profile, bool move, double wait[2],
                           rg_error *e);
/* One direction's steps, whoever keeps them. */
typedef struct rgi_lane {
  int32_t n;
  double *ms; /* per step; 0: computed again */
  bool *copy;
  double *start;  /* when, by what computes */
  double *at;     /* per copy: when its window ends (forward) or begins (backward) */
  double *latest; /* … of the way back: when it has to begin at the latest */
  int32_t *next;  /* per place in the new order: the step */
} rgi_lane;
rg_status rgi_lane_open(rgi_lane *w, size_t n, rgi_arena *a, rg_error *e);
/* Fills `next` from n, ms and copy; returns what is waited for. */
double rgi_lane_place(rgi_lane *w, bool backward);

/* Candidates: up to so many, all choices are looked at; of up to so many it may be proved that
 * none is better. */
enum { RGI_EXACT_LIMIT = 20, RGI_PROOF_LIMIT = 256 };

/* ---- replay.c: what a choice takes, as an array of numbers says ---- */

typedef struct rgi_taken {
  /* bytes; the peak is memplan's lower bound for the packer, or up to RGI_ALIGN less */
  int64_t saved, peak;
  int32_t crowd;  /* places as full as the fullest */
  double wait_ms; /* for copies, longer than if nothing is computed again */
} rgi_taken;
typedef struct rgi_replay rgi_replay;
/* candidate_of: per origin, or -1. The replay lives in `a`, which it fills with scratch of
 * its own. */
rg_status rgi_replay_create(const rgi_graph *g, const rgi_profile *profile,
                            const rgi_memory_options *mem, const int *candidate_of, int ncandidate,
                            rgi_arena *a, rgi_replay **out, rg_error *e);
/* *used (may be NULL): the candidates of `set` that something reads; the rest changes nothing. */
rgi_taken rgi_replay_run(rgi_replay *r, const uint64_t *set, uint64_t *used);

/* The most scratch bytes that one of backward's own nodes needs, in the choice run last, or up to
 * RGI_ALIGN less. Clones are counted until backward itself reads them last: what other clones read
 * later may be read earlier if more is recomputed. Nor is what comes back counted before backward
 * itself needs it to: clones for which it comes earlier may have a clone of it instead. So,
 * recomputing more never takes any away. */
int64_t rgi_replay_scratch(rgi_replay *r);
/* Scratch bytes alive at backward's t-th node that moves bytes, copies left out, in the choice run
 * last, or up to RGI_ALIGN less. */
int64_t rgi_replay_alive(const rgi_replay *r, int32_t t);
/* By how much places of the choice run last are above so many bytes of scratch, all together. */
int64_t rgi_replay_excess(const rgi_replay *r, int64_t scratch);

/* ---- model.c: candidates, their costs, memplan's verdict ---- */

/* Sets of candidates (bits.h). All functions take sets of rgi_model.words words. */
typedef struct rgi_model {
  rgi_arena *arena;
  const rgi_graph *g;
  const rgi_profile *profile;
  rgi_memory_options mem;
  int ncandidate, *origin; /* candidate → origin */
  int *candidate_of;       /* origin → candidate, or -1 */
  double *ms;              /* candidate → model time of all its nodes */
  double all_ms;           /* model time of everything, with nothing recomputed */
  /* candidate → saved bytes of its outputs if it alone is kept among the chosen */
  int64_t *kept_bytes;
  /* candidate → those that are named alike, but for numbers, have one kind */
  int *kind, nkind;
  int *op, nop; /* … those of one op */
  int words;    /* in a set */
  rgi_replay *replay;
  int64_t spent; /* work that searching and packing took, in steps of some 10 ns */
} rgi_model;

rg_status rgi_model_create(const rgi_graph *g, const rgi_profile *profile,
                           const rgi_memory_options *mem, rgi_model **out, rg_error *e);
void rgi_model_destroy(rgi_model *m);
/* The work of a choice's replay, in such steps. */
static inline int64_t rgi_replay_work(const rgi_model *m) {
  return 2 * (int64_t)m->g->nnode;
}
/* An empty set; NULL on NOMEM. */
uint64_t *rgi_model_set(const rgi_model *m);
static inline bool rgi_model_same(const rgi_model *m, const uint64_t *a, const uint64_t *b) {
  return memcmp(a, b, (size_t)m->words * sizeof *a) == 0;
}
double rgi_model_ms(const rgi_model *m, const uint64_t *set);
/* Memplan's own word: saved bytes and peak. The packing is left out (peak is its lower bound) if
 * that exceeds `limit`, and ends at the first within the limit if that is `enough`. */
rg_status rgi_model_measure(rgi_model *m, const uint64_t *set, int64_t limit, bool enough,
                            int64_t *saved, int64_t *peak, double *ms, rg_error *e);

/* ---- what a budget asks for ---- */

/* For one of many searches over graphs that are much alike. */
typedef struct rgi_start {
  const bool *start; /* per origin: recomputed in a choice that may fit; NULL: none is known */
  bool brief;        /* a shorter search, and nothing about how good it is */
  int64_t least;     /* of a refusal: the least that any choice reaches */
} rgi_start;
/* rgi_recompute; hint: NULL, or as it says. */
rg_status rgi_recompute_by(const rgi_graph *g, const rg_policy *policy, const rgi_profile *profile,
                           const rgi_memory_options *mem, rgi_progress progress, rgi_start *hint,
                           rgi_graph **out, rgi_choice **report, rg_error *e);

typedef struct rgi_chooser {
  rgi_model *m;
  int64_t budget;
  const char *budget_at; /* of the policy, for messages */
  bool of_saved;
  rgi_progress progress;
  int *free, nfree; /* candidates that may be chosen or not … */
  uint64_t *always; /* … those that are chosen in any case; the others are kept */
  bool brief;       /* rgi_choose_many: search a while, and bound nothing */
  /* For bounds alone: candidates may also leave, of which backward then reads what comes back; this
   * moves so many bytes of each (0: it can't leave; NULL: none can). `movable` bytes in all take no
   * time, each that is more `moved_ms`. */
  const double *moved;
  double movable, moved_ms;
  /* the answer */
  bool found;
  /* among the sets within the budget, one of the least model time that was found */
  uint64_t *best;
  double best_ms;  /* of it */
  double bound_ms; /* no set within the budget takes less */
  bool optimal;
  /* candidates that are kept, and computed again, in some set of less time than best_ms, for all
   * that rgi_bound_find() knows; NULL: nobody asks */
  uint64_t *may[2];
  int64_t explored;          /* sets that were packed */
  struct rgi_beside *beside; /* who looks for better choices while this is proved, or NULL */
} rgi_chooser;

static inline int64_t rgi_figure(const rgi_chooser *c, rgi_taken x) {
  return c->of_saved ? x.saved : x.peak;
}
/* The chooser's starting point: nothing forced either way, nothing found. */
rg_status rgi_chooser_init(rgi_chooser *c, rgi_model *m, rg_error *e);
/* The same with what the policy forces, and its budget. */
rg_status rgi_chooser_by(rgi_chooser *c, rgi_model *m, const rg_policy *policy, rg_error *e);
/* Memplan's verdict on a set: how far above the budget it is, by the n-th part of the packer's
 * work, by all for 0 (model.c). */
rg_status rgi_chooser_ask(rgi_chooser *c, const uint64_t *set, int part, int64_t *over,
                          rg_error *e);
rg_status rgi_chooser_fits(rgi_chooser *c, const uint64_t *set, bool *yes, rg_error *e);
/* The least time within the budget, or !c->found. */
rg_status rgi_choose_exact(rgi_chooser *c, rg_error *e);
/* The least bytes that any set takes: that budget is met, one byte less is not. */
rg_status rgi_least_exact(rgi_chooser *c, uint64_t *set, int64_t *least, rg_error *e);
/* The same for many candidates, as far as the search goes: the same answer whatever the budget. */
rg_status rgi_least_many(rgi_chooser *c, uint64_t *set, int64_t *least, rg_error *e);
/* `least`: a set that is within the budget, or NULL: c->found only if a starting point is, and has
 * room to spare. */
rg_status rgi_choose_many(rgi_chooser *c, const uint64_t *least, rg_error *e);
/* What bounds are made of, whatever the budget; in the model's arena. */
typedef struct rgi_bound rgi_bound;
rg_status rgi_bound_open(rgi_chooser *c, rgi_bound **out, rg_error *e);
/* Fills in the chooser's bound_ms, at most best_ms, and optimal, for its budget. */
rg_status rgi_bound_find(rgi_bound *b, rg_error *e);
/* Betters best_ms or raises bound_ms to it, if all choices can be gone through with so much work,
 * and where it is far from that so much more. */
rg_status rgi_prove(rgi_chooser *c, const rgi_bound *bound, int64_t work, int64_t more,
                    rg_error *e);

/* One of 0 … n − 1, n > 0, the same on every machine. */
static inline int rgi_draw(uint64_t *state, int n) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (int)((*state >> 33) % (uint64_t)n);
}

/* ---- mend.c: from a choice to one that has room ---- */

typedef struct rgi_mender {
  rgi_chooser *c;
  rgi_model *m;
  int64_t room; /* what a choice may take as the replay sees it */
  double best;  /* what takes so long is no good */
  int64_t work; /* done */
  uint64_t random, *used;
} rgi_mender;
/* Flips until there is room, then keeps what can be; false: there is none, below the best. */
bool rgi_mend(rgi_mender *x, uint64_t *set);

/* ---- beside.c: better choices while a proof is at work ---- */

typedef struct rgi_beside rgi_beside;
/* On a thread of its own, unless mem.alone or the host's allocator is the caller's; the choice is
 * the same. NULL where nothing is free. */
rg_status rgi_beside_open(const rgi_chooser *c, rgi_beside **out, rg_error *e);
void rgi_beside_close(rgi_beside *b); /* NULL is fine */
/* The proof has done so much work: where that is as much as is done beside it between two meetings,
 * both go on from the better of their choices. `last`: only what was begun is done. */
rg_status rgi_beside_meet(rgi_beside *b, rgi_chooser *c, int64_t work, bool last, rg_error *e);
/* A choice from which to look, from the next meeting on. */
void rgi_beside_offer(rgi_beside *b, const uint64_t *set);

/* Visits the subsets of cost[0 … n), n <= RGI_EXACT_LIMIT, in order of their sum, until it returns
 * false. */
typedef struct rgi_subsets rgi_subsets;
/* NULL on NOMEM */
rgi_subsets *rgi_subsets_create(const rg_context *ctx, const double *cost, int n);
void rgi_subsets_destroy(rgi_subsets *s);
/* false at the end; *failed on NOMEM */
bool rgi_subsets_next(rgi_subsets *s, uint64_t *mask, double *cost, bool *failed);

/* ---- front.c: what pareto found, as text, JSON or a picture ---- */

typedef struct rgi_point_of_front {
  const uint64_t *set, *away; /* recomputed; offloaded, or NULL */
  int64_t saved, peak, host;
  double ms; /* that recomputing and copies take */
} rgi_point_of_front;

typedef struct rgi_front {
  rgi_point_of_front *at; /* in ascending order of ms, descending of peak */
  int count, capacity;
  bool exact, offloads; /* … chosen among, too */
  int64_t explored;
  double gap_ms; /* most that a point is above the front */
} rgi_front;
void rgi_front_text(const rgi_model *m, const rgi_front *f, rgi_buf *out);
void rgi_front_json(const rgi_model *m, const rgi_front *f, rgi_buf *out);
void rgi_front_svg(const rgi_model *m, const rgi_front *f, rgi_buf *out);

#endif
