/* ops/cuda/attn.c: see attn.h. */
#include "attn.h"
#include "../cpu/attn.h"

/* In order of preference, per direction; every list ends with plain. */
static const rgi_attn_family *const forward[] = {&rgi_attn_flash_fwd, &rgi_attn_gather_fwd,
                                                 &rgi_attn_select_fwd, &rgi_attn_plain_fwd};
static const rgi_attn_family *const backward_[] = {&rgi_attn_flash_bwd, &rgi_attn_select_bwd,
                                                   &rgi_attn_plain_bwd};

static rgk_tensor tensor(const rg_arg *a) {
  static char bound; /* stands for an address while planning */
  rgk_tensor t = rgk_of(a);
  if (a && !t.data) t.data = &bound;
  return t;
}

static bool aligned(const rg_arg *a) {
  if (!a) return true;
  const int64_t unit = 16 / (int64_t)rg_dtype_size(a->dtype);
  return a->align >= 16 && a->stride[0] % unit == 0 && a->stride[1] % unit == 0;
}

static void fill(const rg_call *c, rgk_attn *a, bool backward) {
  const int x = a->mode == RGK_SLC;
  const rg_arg *q = rg_in(c, 0), *k = rg_in(c, 1), *v = rg_in(c, 2), *idx = x ? rg_in(c, 3) : NULL;
  const rg_arg *cu = rg_in(c, RGI_ATTN_CU + x), *cu_k = rg_in(c, RGI_ATTN_CU_K + x),
               *offset = rg_in(c, RGI_ATTN_OFFSET + x);
  const rg_arg *o = backward ? rg_in(c, RGI_ATTN_OUT_O + x) : rg_out(c, 0);
  a->dtype = (int32_t)q->dtype;
  a->T = q->dim[0], a->H = (int32_t)q->dim[1], a->D = (int32_t)q->dim[2];
  a->S = k->dim[0], a->KH = (int32_t)k->dim[1], a->E = (int32_t)v->dim[2];
  a->G = a->KH > 0 ? a->H / a->KH : 0;
  a->N = idx ? (int32_t)idx->dim[2] : 0;
  a->seqs = rgk_seqs_of(cu, a->T);
  a->kseqs = rgk_seqs_of(cu_k ? cu_k : cu, a->S);
  a->offset = offset ? (const int32_t *)offset->data : NULL;
  double scale = c->attr[RGI_ATTN_SCALE].f;
  a->scale = (float)(scale != 0 ? scale : a->D > 0 ? 1 / sqrt((double)a->D) : 1);
  a->softcap = (float)c->attr[RGI_ATTN_SOFTCAP].f;
  a->q = tensor(q), a->k = tensor(k), a->v = tensor(v), a->idx = tensor(idx);
  a->sinks = tensor(rg_in(c, RGI_ATTN_SINKS + x));
  a->o = tensor(o);
  a->lse = tensor(backward ? rg_in(c, RGI_ATTN_OUT_LSE + x) : rg_out(c, 1));
  a->aligned = aligned(q) && aligned(k) && aligned(v) && aligned(o);
  if (!backward) return;
  const rg_arg *d_o = rg_in(c, RGI_ATTN_GRAD_O + x), *dq = rg_out(c, 0), *dk = rg_out(c, 1),
               *dv = rg_out(c, 2);
  a->d_o = tensor(d_o), a->d_lse = tensor(rg_in(c, RGI_ATTN_GRAD_LSE + x));
  a->dq = tensor(dq), a->dk = tensor(dk), a->dv = tensor(dv), a->d_sinks = tensor(rg_out(c, 3));
  a->delta = tensor(rg_in(c, RGI_ATTN_DELTA + x));
  a->acc_q = rg_in(c, RGI_ATTN_ACC_Q + x), a->acc_k = rg_in(c, RGI_ATTN_ACC_K + x);
  a->acc_v = rg_in(c, RGI_ATTN_ACC_V + x), a->acc_sinks = rg_in(c, RGI_ATTN_ACC_SINKS + x);
  a->aligned = a->aligned && aligned(d_o) && aligned(dq) && aligned(dk) && aligned(dv);
}

static const rgi_attn_family *choose(const rgk_attn *a, const rg_gpu *gpu, bool backward, const char **why) {
  const rgi_attn_family *const *list = backward ? backward_ : forward;
  const int n = backward ? RGI_COUNT(backward_) : RGI_COUNT(forward);
  *why = NULL;
  for (int i = 0; i < n - 1; i++) {
    if (!(list[i]->modes >> a->mode & 1)) continue;
    const char *no = list[i]->refuses(a, gpu);
    if (!no) return list[i];
    if (!*why) *why = no;
  }
  return list[n - 1];
}

size_t rgi_cuda_attn_workspace(const rg_call *c, rgk_attn *a, bool backward) {
  const char *why;
  fill(c, a, backward);
  return choose(a, c->gpu, backward, &why)->workspace(a, c->gpu);
}

rg_status rgi_cuda_attn_steps(const rg_call *c, rgk_attn *a, bool backward, rg_cuda *x) {
  const char *why;
  fill(c, a, backward);
  return choose(a, c->gpu, backward, &why)->steps(a, c->gpu, c->workspace, x);
}

rgi_delta rgi_cuda_attn_delta(const rg_call *c, rgk_attn *a) {
  const char *why;
  fill(c, a, true);
  const rgi_attn_family *f = choose(a, c->gpu, true, &why);
  /* Without o only its alignment no longer counts. */
  return f->delta == RGI_DELTA_LANES || aligned(rg_in(c, RGI_ATTN_OUT_O + (a->mode == RGK_SLC)))
             ? f->delta
             : RGI_DELTA_NONE;
}

/* The preferred family's refusal says why the preferred kernels were not taken. */
const char *rgi_cuda_attn_path(const rg_call *c, rgk_attn *a, bool backward) {
  const char *why;
  fill(c, a, backward);
  const rgi_attn_family *f = choose(a, c->gpu, backward, &why);
  return why && f == (backward ? &rgi_attn_plain_bwd : &rgi_attn_plain_fwd) ? why : f->name;
}
