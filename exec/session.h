/* exec/session.h: what a session holds, for its two backends: cpu_session.c and cuda_session.c. */
#ifndef RGI_SESSION_H
#define RGI_SESSION_H

#include "plan.h"

/* 0xffa5 is a NaN in f16 and bf16, twice it is one in f32; no op writes it on purpose (idx tails
 * are -1). */
enum { RGI_GUARD = 256, RGI_GUARD_BYTE = 0xc5, RGI_POISON = 0xffa5, RGI_WINDOW = 1 << 16 };

/* What the caller's blocks start on where ops run on the host: a cache line, which frameworks'
 * allocators give. On a device it is RGI_ALIGN. */
enum { RGI_HOST_ALIGN = 64 };

/* A saved block that has been bound, and the forward whose values it holds. */
typedef struct rgi_saved_block {
  struct rgi_saved_block *next;
  char *data;
  char *host; /* what is offloaded; NULL: nothing is, or no block was named for it */
  bool forwarded;
  bool forgotten; /* the record may serve another block */
  void **at;      /* [nbindable]: inputs and outputs of that forward */
} rgi_saved_block;

typedef struct rgi_owned_block { /* memory the session asked for */
  void *memory;
  char *data; /* past the guard */
  int64_t size;
} rgi_owned_block;

/* Bytes that a run touches: a bound tensor's, or a block's. */
typedef struct rgi_span {
  uintptr_t begin, end;
  int32_t bind; /* or RGI_AT_… */
  bool written;
} rgi_span;

typedef struct rgi_backend {
  rg_allocator memory; /* where the caller names none */
  rg_allocator host;   /* for host blocks: memory that the device copies from and to by itself */
  /* RG_E_USAGE if a caller's host block is no such memory; NULL: any is. */
  rg_status (*check_host)(const rg_session *s, const void *host, rg_error *e);
  /* Sets session->device; after the arena's memory is there. */
  rg_status (*create)(rg_session *s, const rg_session_options *o, rg_error *e);
  void (*destroy)(rg_session *s);
  /* RG_E_DEVICE once the session is lost: nothing can be run or waited for any more. */
  rg_status (*alive)(const rg_session *s, rg_error *e);
  /* Before forward, of a live session: what can be said about bound contents (RG_E_DATA), or about
   * those of earlier runs. What is reported once is not reported again. */
  rg_status (*check)(rg_session *s, rg_error *e);
  /* Runs the steps of a direction; addresses come from rgi_session_resolve. */
  rg_status (*run)(rg_session *s, bool backward, rg_error *e);
  /* Memory of the session's device: fill with a byte, fill with RGI_POISON, copy to and from the
   * host. */
  rg_status (*fill)(rg_session *s, void *data, int byte, int64_t size, rg_error *e);
  rg_status (*poison)(rg_session *s, void *data, int64_t size, rg_error *e);
  rg_status (*read)(rg_session *s, void *host, const void *device, size_t size, rg_error *e);
  rg_status (*set_stream)(rg_session *s, void *stream, rg_error *e);
  rg_status (*synchronize)(rg_session *s, rg_error *e);
  /* The arena's allocator refused `bytes`. */
  rg_status (*no_memory)(const rg_session *s, int64_t bytes, rg_error *e);
  bool on_host; /* its memory is the host's: read in place */
  /* rg_memory_… without a session */
  rg_status (*copy)(void *dst, const void *src, size_t bytes, bool to_host, rg_error *e);
} rgi_backend;
extern const rgi_backend rgi_cpu_backend, rgi_cuda_backend;
/* RG_E_DEVICE where this build lacks the plan's. */
rg_status rgi_backend_of(const rg_plan *plan, const rgi_backend **out, rg_error *e);

struct rg_session {
  rgi_arena *arena;
  const rg_plan *plan;
  const rgi_backend *backend;
  void *device; /* the backend's own */
  bool poison;
  rg_allocator memory; /* of owned blocks */
  rgi_owned_block own_saved, own_scratch, own_comm, own_host;
  rg_comm *comm; /* NULL: one rank */
  char *scratch;
  rgi_saved_block *blocks, *current;
  void **bound;   /* [nbindable] */
  rg_arg *arg;    /* [nargs] */
  double *ms;     /* [nstep] */
  rgi_span *span; /* [nbindable + 3], for rgi_session_overlap */
  char *window;   /* debug_poison: RGI_WINDOW bytes of a block on their way to being looked at */
  int64_t touched_saved, touched_scratch;
};

/* RG_E_USAGE if what a run of this direction would write shares bytes with anything else it touches
 * (overlap.c). Before a forward, inputs and outputs are those bound; before a backward, the
 * forward's. */
rg_status rgi_session_overlap(rg_session *s, bool backward, rg_error *e);

/* Collective, where the plan has ranks: RG_E_COMM if they do not fit together (ranks.c). */
rg_status rgi_session_agree(rg_session *s, rg_error *e);
/* Hands on how a call went, `own` in words; a failure ends the other ranks' calls, which would wait
 * for this one otherwise. c may be NULL. */
rg_status rgi_ranks_told(rg_comm *c, rg_status status, const rg_error *own, rg_error *e);

/* ---- session_steps.c ---- */

/* Is it bound for the forward, whose backward reads it there? */
static inline bool rgi_role_forward(rg_role role) {
  return role != RG_GRAD_IN && role != RG_GRAD_OUT;
}

/* The address of a place now, or NULL. */
void *rgi_session_resolve(const rg_session *s, rgi_place at);
/* The call of step i with addresses filled in (arrays in s->arg). */
rg_call rgi_session_call(rg_session *s, int32_t i, rg_error *e);
/* RG_E_INTERNAL if a guard zone of an owned block was written to; notes a step's workspace as
 * touched. */
rg_status rgi_session_after_step(rg_session *s, int32_t i, rg_error *e);

#endif
