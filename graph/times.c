/* graph/times.c: the cost model; see profile.h.

   An efficiency depends on how much there is to do and of what kind, and smoothly so: products,
   exponentials and bytes are compared as logarithms, in which all three together are the size and
   what is left are ratios, the kind. Between measured points the logarithm of (time ÷ roofline) is
   their mean, weighted by 1/distance⁴: exact at a point, and next to one hardly anything else
   counts. Past the last point the efficiency stays about what it was there.

   A step's fixed cost is taken off before and added again after, so that a small call costs that
   and not a share of a large one.
 */
#include "profile.h"
#include <math.h>
#include <string.h>

/* A ratio counts so many times as much as size: efficiency differs more from shape to shape than
 * from length to length. Of 10 … 400, held against lengths left out (tests/unit/test_profile.c). */
#define KIND 200.0
/* Points this near, squared, are one. */
#define SAME 1e-4

/* Below this a roofline says nothing: an op without a cost. */
#define LEAST_MS 1e-7

double rgi_profile_roofline_ms(const rgi_profile *p, rg_dtype dtype, const rg_cost *cost) {
  double ms = cost->flops / (p->matrix_gflops[dtype] * 1e6),
         special = cost->exps / (p->special_gops * 1e6),
         moved = cost->bytes / (p->bandwidth_gbs * 1e6), sent = cost->wire / (p->link_gbs * 1e6);
  if (special > ms) ms = special;
  if (sent > ms) ms = sent;
  if (cost->host / (p->host_gbs * 1e6) > ms) ms = cost->host / (p->host_gbs * 1e6);
  return moved > ms ? moved : ms;
}

static void place(const rg_cost *cost, double at[RGI_POINT_AXES]) {
  at[0] = log1p(cost->flops);
  at[1] = log1p(cost->exps);
  at[2] = log1p(cost->bytes);
}

void rgi_profile_point(const rgi_profile *p, rg_dtype dtype, const rg_cost *cost, double ms,
                       rgi_point *out) {
  const double step = p->step_us / 1e3, least = ms / 4,
               roofline = rgi_profile_roofline_ms(p, dtype, cost);
  place(cost, out->at);
  out->slower = log((ms - step > least ? ms - step : least) / fmax(roofline, LEAST_MS));
}

/* Squared. */
static double distance(const double *x, const double *y) {
  double size = 0, kind = 0;
  for (int a = 0; a < RGI_POINT_AXES; a++) size += (x[a] - y[a]) / RGI_POINT_AXES;
  for (int a = 0; a < RGI_POINT_AXES; a++) kind += (x[a] - y[a] - size) * (x[a] - y[a] - size);
  return RGI_POINT_AXES * size * size + KIND * kind;
}

static bool same_family(const char *known, const char *kernels) {
  const size_t n = kernels ? strcspn(kernels, ":") : 0;
  return strlen(known) == n && (n == 0 || memcmp(known, kernels, n) == 0);
}

/* How well m fits: 3 same family and type, 2 same family, 1 the op alone, 0 not at all. */
static int fit(const rgi_measured *m, const char *op, const char *kernels, rg_dtype dtype) {
  if (strcmp(m->op, op) != 0) return 0;
  if (!same_family(m->kernels, kernels)) return 1;
  return m->dtype < 0 || m->dtype == (int)dtype ? 3 : 2;
}

/* log(ms / roofline) of a call of this cost; false: the op was never measured. */
static bool interpolate(const rgi_profile *p, const char *op, const char *kernels, rg_dtype dtype,
                        const rg_cost *cost, double *out) {
  double at[RGI_POINT_AXES], sum = 0, weights = 0;
  int best = 0;
  for (int i = 0; i < p->nmeasured; i++) {
    const int f = fit(&p->measured[i], op, kernels, dtype);
    if (f > best) best = f;
  }
  if (!best) return false;
  place(cost, at);
  for (int i = 0; i < p->nmeasured; i++) {
    const rgi_measured *m = &p->measured[i];
    if (fit(m, op, kernels, dtype) != best) continue;
    for (int k = 0; k < m->npoint; k++) {
      const double d = distance(at, m->point[k].at) + SAME, weight = 1 / (d * d);
      sum += weight * m->point[k].slower;
      weights += weight;
    }
  }
  *out = sum / weights;
  return true;
}

double rgi_profile_ms(const rgi_profile *p, const char *op, const char *kernels, rg_dtype dtype,
                      const rg_cost *cost) {
  const double roofline = rgi_profile_roofline_ms(p, dtype, cost), step = p->step_us / 1e3;
  double slower, efficiency = p->efficiency;
  if (cost->host > 0) return roofline + step; /* the rate of copies is one that they reach */
  if (interpolate(p, op, kernels, dtype, cost, &slower))
    return fmax(roofline, LEAST_MS) * exp(slower) + step;
  for (int i = 0; i < p->nop; i++)
    if (strcmp(p->op[i].op, op) == 0) efficiency = p->op[i].fraction;
  /* So is the wire's; what is copied for it comes before and after. */
  rg_cost here = *cost;
  here.wire = 0;
  return cost->wire / (p->link_gbs * 1e6) + rgi_profile_roofline_ms(p, dtype, &here) / efficiency +
         step;
}

/* The element type the cost model counts by: the first float among the arguments. */
static rg_dtype model_dtype(const rg_call *c) {
  const int nin = c->in_begin[c->op->nin], nout = c->out_begin[c->op->nout];
  for (int i = 0; i < nin; i++)
    if (c->in[i].rank >= 0 && c->in[i].dtype != RG_I32) return c->in[i].dtype;
  for (int i = 0; i < nout; i++)
    if (c->out[i].rank >= 0 && c->out[i].dtype != RG_I32) return c->out[i].dtype;
  return RG_F32;
}

void rgi_model_call(const rgi_profile *p, const rg_call *call, rgi_modelled *out) {
  const rg_op *op = call->op;
  *out = (rgi_modelled){.dtype = model_dtype(call)};
  if (op->cost) op->cost(call, &out->cost);
  out->roofline_ms = rgi_profile_roofline_ms(p, out->dtype, &out->cost);
  out->ms = rgi_profile_ms(p, op->name, call->gpu && op->cuda_path ? op->cuda_path(call) : NULL,
                           out->dtype, &out->cost);
}
