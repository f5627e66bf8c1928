/* graph/profile.h: device profiles: how fast a device multiplies, exponentiates and moves bytes,
   and what `regraph tune` measured on one. JSON files; two are built in (recompute/profiles).

   The one cost model (times.c) turns a call into milliseconds: the roofline of what the op says it
   costs, divided by an efficiency. Where ops were measured the efficiency is interpolated between
   the measured points of the same op, type and kernel family; elsewhere it is a number of the
   profile's.
 */
#ifndef RGI_PROFILE_H
#define RGI_PROFILE_H

#include "base.h"
#include <regraph/op.h>

typedef struct rgi_efficiency {
  const char *op;
  double fraction; /* of the roofline that this op reaches, in (0, 1] */
} rgi_efficiency;

/* One measured call: what it cost, as logarithms, and by what its time exceeded the roofline. */
enum { RGI_POINT_AXES = 3 };
typedef struct rgi_point {
  double at[RGI_POINT_AXES]; /* of flops, exps, bytes */
  double slower;             /* log(ms / roofline) */
} rgi_point;

/* All points of one op, kernel family and type. */
typedef struct rgi_measured {
  const char *op;
  const char *kernels; /* a family as rg_op.cuda_path names it, up to ':'; "" where there is none */
  int dtype;           /* -1: any */
  rgi_point *point;
  int npoint;
} rgi_measured;

typedef struct rgi_profile {
  const char *name;
  const char *source; /* where the times come from: "measured at …"; NULL: nobody measured any */
  const char *found;  /* "shipped", or the file it was read from */
  uint64_t id;        /* of the file's text */
  bool cuda;
  int threads;                          /* cpu: the most; 0: all cores */
  double matrix_gflops[RG_DTYPE_COUNT]; /* by storage type */
  double special_gops;                  /* exponentials and the like, a second */
  double bandwidth_gbs;
  double link_gbs;   /* of what a rank sends to others; the memory's unless given */
  double host_gbs;   /* cuda: of copies between the GPU's memory and the host's, either way */
  double step_us;    /* fixed cost of a step */
  int64_t memory;    /* bytes */
  rg_gpu gpu;        /* cuda: what plans are made for */
  bool elsewhere;    /* cuda: which is not the GPU that the times are of */
  double efficiency; /* of ops neither listed nor measured */
  rgi_efficiency *op;
  int nop;
  rgi_measured *measured;
  int nmeasured;
  rgi_arena *arena;
} rgi_profile;

/* `which` is NULL, "shipped", a file (a path with a '/' or ending in ".json") or the name of a file
 * in the cache folder (rgi_profile_path). NULL: what REGRAPH_PROFILE says; without it this
 * machine's own, where tune has left one (cpu.json, cuda.json in the cache folder), else the
 * shipped one of `device` ("cpu", "cuda"; NULL: cpu). */
rg_status rgi_profile_load(const rg_context *ctx, const char *which, const char *device,
                           rgi_profile **out, rg_error *e);
/* Of a text; `file` stands for it in errors, `found` in reports. */
rg_status rgi_profile_parse(const rg_context *ctx, const char *text, size_t size, const char *file,
                            const char *found, rgi_profile **out, rg_error *e);
void rgi_profile_destroy(rgi_profile *p);
/* "$XDG_CACHE_HOME/regraph/NAME.json" (without that variable: ~/.cache); false where there is no
 * such folder to name, or no room. */
bool rgi_profile_path(const char *name, char *buffer, size_t size);
/* Is a profile asked for by file or name, so that it stands for a machine of its own? */
bool rgi_profile_asked(const char *which);

/* ---- the cost model ---- */

typedef struct rgi_modelled {
  rg_cost cost;
  rg_dtype dtype;     /* whose rate of products counts: of the first float among the arguments */
  double roofline_ms; /* no run is faster, if the rates are right */
  double ms;
} rgi_modelled;
/* Of a call with shapes, attributes and, for a GPU, call->gpu. */
void rgi_model_call(const rgi_profile *p, const rg_call *call, rgi_modelled *out);
double rgi_profile_roofline_ms(const rgi_profile *p, rg_dtype dtype, const rg_cost *cost);
double rgi_profile_ms(const rgi_profile *p, const char *op, const char *kernels, rg_dtype dtype,
                      const rg_cost *cost);
/* Fills in a point from what was measured. */
void rgi_profile_point(const rgi_profile *p, rg_dtype dtype, const rg_cost *cost, double ms,
                       rgi_point *out);

#endif
