/* ops/attn_calls.c: what is asked of a call of attention: workspace, cost, a run, launches. A file
 * of its own, since the static analyzer takes each answer through all of rgi_attn_describe where it
 * sees that. */
#include "attn.h"
#include "cpu/attn.h"
#include "cuda/attn.h"

size_t rgi_attn_workspace(const rg_call *c) {
  rgi_attn a = rgi_attn_describe(c);
  if (c->gpu) return rgi_cuda_attn_workspace(c, &a);
  rgi_attn_cut(&a, c->isa);
  return a.backward ? rgi_cpu_attn_bwd_workspace(c, &a) : rgi_cpu_attn_fwd_workspace(c, &a);
}
rg_status rgi_attn_run(const rg_call *c) {
  rgi_attn a = rgi_attn_describe(c);
  rgi_attn_cut(&a, c->isa);
  return a.backward ? rgi_cpu_attn_bwd(c, &a) : rgi_cpu_attn_fwd(c, &a);
}
rg_status rgi_attn_steps(const rg_call *c, rg_cuda *x) {
  rgi_attn a = rgi_attn_describe(c);
  return rgi_cuda_attn_steps(c, &a, x);
}
const char *rgi_attn_path(const rg_call *c) {
  rgi_attn a = rgi_attn_describe(c);
  return rgi_cuda_attn_path(c, &a);
}
static rgi_delta delta(const rg_call *c) {
  rgi_attn a = rgi_attn_describe(c);
  return c->gpu ? rgi_cuda_attn_delta(c, &a) : RGI_DELTA_CHAIN;
}
static bool rounds(const rg_call *c) {
  rgi_attn a = rgi_attn_describe(c);
  return !c->gpu || rgi_cuda_attn_rounds(c, &a);
}
const rgi_fusing rgi_attn_fusing = {.delta = delta, .rounds = rounds};

/* ---- cost ---- */

double rgi_attn_pairs(const rgi_attn *a, int64_t most) {
  const double T = (double)a->T, keys = (double)a->S;
  const double first = (a->offset || a->paged) && a->S > a->T ? keys - T : 0, end = first + T;
  double limit = most < 0 || (double)most > keys ? keys : (double)most, ramp = limit;
  if (ramp > end) ramp = end;
  if (ramp < first) ramp = first;
  return (ramp * (ramp + 1) - first * (first + 1)) / 2 + (end - ramp) * limit;
}

void rgi_attn_cost(const rg_call *c, rg_cost *out) {
  const rgi_attn a = rgi_attn_describe(c);
  const rgi_attn_kind *kind = c->op->rules->kind;
  const double D = (double)a.D, E = (double)a.E, pairs = kind->pairs(&a) * (double)a.H;
  out->flops = pairs * 2 * (a.backward ? 3 * D + 2 * E : D + E);
  out->exps = pairs * (a.softcap > 0 ? 2 : 1);
  out->bytes = 0;
  const rg_arg *arg[] = {c->in, c->out};
  const int32_t n[] = {c->in_begin[c->op->nin], c->out_begin[c->op->nout]};
  for (int side = 0; side < 2; side++)
    for (int32_t i = 0; i < n[side]; i++) {
      const rg_arg *x = &arg[side][i];
      double size = x->rank < 0 ? 0 : (double)rg_dtype_size(x->dtype);
      for (int j = 0; j < x->rank; j++) size *= (double)x->dim[j];
      if (a.paged && (x == a.k || x == a.v)) { /* a pool is larger than what is read of it */
        const double seen = kind->pairs(&a) * (double)a.KH * (double)(x == a.k ? a.D : a.E) *
                            (double)rg_dtype_size(x->dtype);
        if (seen < size) size = seen;
      }
      out->bytes += size;
    }
}
