/* graph/profile.h: device profiles: how fast a device multiplies, exponentiates and moves
 * bytes. JSON files; two are built in (the files under recompute/profiles). The one cost model
 * turns an op's rg_cost into milliseconds. */
#ifndef RGI_PROFILE_H
#define RGI_PROFILE_H

#include "base.h"
#include <regraph/op.h>

typedef struct rgi_efficiency {
  const char *op;
  double fraction; /* of the roofline that this op reaches, in (0, 1] */
} rgi_efficiency;

typedef struct rgi_profile {
  const char *name;
  bool cuda;
  int threads;                          /* cpu: the most; 0: all cores */
  double matrix_gflops[RG_DTYPE_COUNT]; /* by storage type */
  double special_gops;                  /* exponentials and the like, a second */
  double bandwidth_gbs;
  double link_gbs;   /* of what a rank sends to others; the memory's unless given */
  double step_us;    /* fixed cost of a step */
  int64_t memory;    /* bytes */
  rg_gpu gpu;        /* cuda */
  double efficiency; /* of ops not listed */
  rgi_efficiency *op;
  int nop;
  rgi_arena *arena;
} rgi_profile;

/* path NULL: the shipped profile of `device` ("cpu", "cuda"). */
rg_status rgi_profile_load(const rg_context *ctx, const char *path, const char *device,
                           rgi_profile **out, rg_error *e);
void rgi_profile_destroy(rgi_profile *p);
/* Milliseconds of one node: max(matrix, special, bytes) / efficiency + step. */
/* The same at 100 % and without the step: no run is faster, if the rates are right. */
double rgi_profile_roofline_ms(const rgi_profile *p, rg_dtype dtype, const rg_cost *cost);
double rgi_profile_ms(const rgi_profile *p, const rg_op *op, rg_dtype dtype, const rg_cost *cost);

#endif
