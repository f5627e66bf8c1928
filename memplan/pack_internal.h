/* memplan/pack_internal.h: what the packer's parts share: the reduced problem, its heuristics, its
   exact search.

   pack.c reduces buffers to a packing per connected stretch of time and drives the parts;
   pack_heuristic.c finds good packings quickly; pack_repair.c betters one piece by piece;
   pack_search.c decides whether a packing within a capacity exists.

   Reduced problem. Time is cut into sections: the maximal sets of buffers that are alive together.
   A piece is a buffer that matters; it covers the sections first … last. Sizes count units of
   `unit` bytes; `pad` is what rounding up to whole units added, in bytes, which the topmost piece
   need not have.
 */
#ifndef RGI_PACK_INTERNAL_H
#define RGI_PACK_INTERNAL_H

#include "pack.h"
#include <time.h>

typedef struct rgi_piece {
  int32_t first, last; /* sections, both included */
  int32_t id;          /* index of the caller's buffer */
  int64_t size;        /* units */
  int64_t pad;         /* bytes */
} rgi_piece;

typedef struct rgi_packing {
  const rg_context *ctx;
  int32_t n, m;     /* pieces (sorted by first section), sections */
  rgi_piece *piece; /* [n] */
  int32_t *near; /* pieces that overlap piece i in time: near[near_begin[i] … near_begin[i+1]) */
  int64_t *near_begin;
  int64_t *load; /* [m] units alive */
  int64_t *pad;  /* [m] largest pad */
  int64_t unit;
} rgi_packing;

static inline int64_t rgi_piece_bytes(const rgi_packing *p, int i) {
  return p->piece[i].size * p->unit - p->piece[i].pad;
}

/* splitmix64: its step and its stream. */
static inline uint64_t rgi_mix(uint64_t z) {
  z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
  return z ^ (z >> 31);
}

static inline uint64_t rgi_next_random(uint64_t *state) {
  return rgi_mix(*state += UINT64_C(0x9e3779b97f4a7c15));
}

static inline double rgi_pack_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* When to stop: at a time, or, where `work` is not NULL, when nothing is left of that. Work is
 * counted in nodes and rounds, each at what one takes in nanoseconds or so. */
typedef struct rgi_stop {
  double deadline;
  int64_t *work;
} rgi_stop;
/* Is it time, `work` later than when this was last asked? */
static inline bool rgi_stops(const rgi_stop *s, int64_t work) {
  if (!s->work) return rgi_pack_now() > s->deadline;
  *s->work -= work;
  return *s->work <= 0;
}

/* ---- heuristics ---- */

typedef struct rgi_heuristic rgi_heuristic;
rg_status rgi_heuristic_create(const rgi_packing *p, rgi_heuristic **out, rg_error *e);
void rgi_heuristic_destroy(rgi_heuristic *h);
/* First fit of the pieces in `order`; returns the peak in bytes. */
int64_t rgi_first_fit(rgi_heuristic *h, const int32_t *order, int64_t *offset);
/* Improves `offset` and *peak: a batch of reorderings, until the peak is at most `target`, `rounds`
 * are through or it is time to stop. */
void rgi_heuristic_improve(rgi_heuristic *h, int64_t target, int64_t rounds, const rgi_stop *stop,
                           int64_t *offset, int64_t *peak);

/* ---- exact search ---- */

typedef enum rgi_verdict { RGI_FOUND, RGI_NONE, RGI_STOPPED, RGI_NO_MEMORY } rgi_verdict;
typedef struct rgi_search rgi_search;
rg_status rgi_search_create(const rgi_packing *p, rgi_search **out, rg_error *e);
void rgi_search_destroy(rgi_search *s);
enum { RGI_SEARCH_CYCLE = 14 }; /* attempts before a way of exploring comes around again */
/* Is there a packing of at most `capacity` bytes? Fills offset[n] (units) when FOUND; NONE is a
 * proof. Explores at most `budget` nodes; `attempt` varies the order of exploration. */
rgi_verdict rgi_search_run(rgi_search *s, int64_t capacity, int64_t budget, uint32_t attempt,
                           const rgi_stop *stop, int64_t *offset, int64_t *explored);

/* ---- beam search ---- */

typedef struct rgi_beam rgi_beam;
rg_status rgi_beam_create(const rgi_packing *p, rgi_beam **out, rg_error *e);
void rgi_beam_destroy(rgi_beam *b);
/* Looks for a packing of at most `capacity` bytes; never NONE: failing proves nothing. */
rgi_verdict rgi_beam_run(rgi_beam *b, int64_t capacity, int32_t width, uint32_t attempt,
                         const rgi_stop *stop, int64_t *offset, int64_t *explored);

/* ---- local repair ---- */

typedef struct rgi_repair rgi_repair;
rg_status rgi_repair_create(const rgi_packing *p, rgi_repair **out, rg_error *e);
void rgi_repair_destroy(rgi_repair *h);
/* Looks for a packing of at most `capacity` bytes, in `steps` steps from the packing `from`; NONE
 * only if a piece alone is larger: failing proves nothing. */
rgi_verdict rgi_repair_run(rgi_repair *h, int64_t capacity, int64_t steps, const rgi_stop *stop,
                           const int64_t *from, int64_t *offset, int64_t *explored);

#endif
