/* ops/cuda/attn.c: see attn.h. */
#include "attn.h"
#include "hopper.h"
#include "paged.h"

/* In order of preference, per direction; every list ends with plain. */
static const rgi_attn_family *const forward[] = {&rgi_attn_flash_fwd,  &rgi_attn_tokens_fwd,
                                                 &rgi_attn_gather_fwd, &rgi_attn_select_fwd,
                                                 &rgi_attn_mma_fwd,    &rgi_attn_plain_fwd};
static const rgi_attn_family *const backward_[] = {&rgi_attn_flash_bwd, &rgi_attn_tokens_bwd,
                                                   &rgi_attn_select_bwd, &rgi_attn_mma_bwd,
                                                   &rgi_attn_plain_bwd};

static rgk_tensor tensor(const rg_arg *a) {
  static char bound; /* stands for an address while planning */
  rgk_tensor t = rgk_of(a);
  if (a && !t.data) t.data = &bound;
  return t;
}

/* A page's rows. */
static rgk_tensor page(const rg_arg *a) {
  rgk_tensor t = tensor(a);
  t.row = a->stride[1], t.head = a->stride[2];
  return t;
}

static bool aligned(const rg_arg *a) {
  if (!a) return true;
  const int64_t unit = 16 / (int64_t)rg_dtype_size(a->dtype);
  bool ok = a->align >= 16;
  for (int i = 0; i + 1 < a->rank; i++) ok = ok && a->stride[i] % unit == 0;
  return ok;
}

_Static_assert((int)RGI_ATTN_SWA == RGK_SWA && (int)RGI_ATTN_CMP == RGK_CMP &&
                   (int)RGI_ATTN_SLC == RGK_SLC,
               "kernels number the modes alike");

static rgk_attn kernels_view(const rgi_attn *a) {
  rgk_attn k;
  memset(&k, 0, sizeof k); /* holes too: launches are compared byte by byte */
  k.mode = (int32_t)a->mode;
  k.dtype = (int32_t)a->q->dtype;
  k.H = (int32_t)a->H, k.KH = (int32_t)a->KH, k.G = (int32_t)a->G;
  k.D = (int32_t)a->D, k.E = (int32_t)a->E, k.N = (int32_t)a->N;
  k.T = a->T, k.S = a->S;
  k.seqs = rgk_seqs_of(a->cu, a->T);
  k.kseqs = rgk_seqs_of(a->cu_k ? a->cu_k : a->cu, a->S);
  k.offset = a->offset ? (const int32_t *)a->offset->data : NULL;
  k.scale = a->scale, k.softcap = a->softcap;
  k.window_left = a->window_left;
  k.kernel = (int32_t)a->kernel, k.stride = (int32_t)a->stride;
  k.block = a->block > INT32_MAX ? INT32_MAX : (int32_t)a->block;
  k.q = tensor(a->q), k.k = tensor(a->k), k.v = tensor(a->v), k.idx = tensor(a->idx);
  if (a->idx && a->idx->dim[1] == 1) k.idx.head = 0; /* for all KV heads */
  k.sinks = tensor(a->sinks);
  if (a->paged) k.k = page(a->k), k.v = page(a->v);
  k.o = tensor(a->o), k.lse = tensor(a->lse);
  k.d_o = tensor(a->d_o), k.d_lse = tensor(a->d_lse), k.delta = tensor(a->delta);
  k.dq = tensor(a->dq), k.dk = tensor(a->dk), k.dv = tensor(a->dv), k.d_sinks = tensor(a->dsinks);
  k.dq_sum = tensor(a->sum_q);
  k.pair_sinks = a->dsinks && a->dsinks->dim[0] > a->H;
  k.acc_q = a->acc_q, k.acc_k = a->acc_k, k.acc_v = a->acc_v, k.acc_sinks = a->acc_sinks;
  k.aligned = aligned(a->q) && aligned(a->k) && aligned(a->v) && aligned(a->o) && aligned(a->d_o) &&
              aligned(a->dq) && aligned(a->dk) && aligned(a->dv) && aligned(a->sum_q);
  return k;
}

static rgk_pages pages_view(const rgi_attn *a) {
  const bool cmp = a->mode == RGI_ATTN_CMP;
  return rgi_cuda_pages(a->pages.context, a->pages.pages, a->k, a->v, cmp ? a->stride : 1,
                        cmp ? a->kernel / a->stride - 1 : 0);
}

/* NULL: plain, *why says why. */
static const rgi_paged_family *choose_paged(const rgk_attn *a, const rgk_pages *pages,
                                            const rg_gpu *gpu, const char **why) {
  const rgi_paged_family *f = a->mode == RGK_SLC ? &rgi_paged_gather_fwd : &rgi_paged_flash_fwd;
  *why = f->refuses(a, pages, gpu);
  return *why ? NULL : f;
}

rgk_attn rgi_cuda_paged_view(const rgi_attn *a, rgk_pages *pages) {
  *pages = pages_view(a);
  return kernels_view(a);
}

static const rgi_attn_family *choose(const rgk_attn *a, const rg_gpu *gpu, bool backward,
                                     const char **why) {
  const rgi_attn_family *const *list = backward ? backward_ : forward;
  const int n = backward ? RGI_COUNT(backward_) : RGI_COUNT(forward);
  *why = NULL;
  for (int i = 0; i < n - 1; i++) {
    if (!(list[i]->modes >> a->mode & 1) || (list[i]->tokens && a->block != 1)) continue;
    const char *no = list[i]->refuses(a, gpu);
    if (!no) return list[i];
    if (!*why || !rgi_hopper(gpu)) *why = no;
  }
  return list[n - 1];
}

size_t rgi_cuda_attn_workspace(const rg_call *c, const rgi_attn *a) {
  const char *why;
  const rgk_attn k = kernels_view(a);
  if (a->paged) return 0;
  const rgi_attn_family *f = choose(&k, c->gpu, a->backward, &why);
  return f->workspace ? f->workspace(&k, c->gpu) : 0;
}

rg_status rgi_cuda_attn_steps(const rg_call *c, const rgi_attn *a, rg_cuda *x) {
  const char *why;
  const rgk_attn k = kernels_view(a);
  if (a->paged) {
    const rgk_pages pages = pages_view(a);
    const rgi_paged_family *f = choose_paged(&k, &pages, c->gpu, &why);
    return f ? f->steps(&k, &pages, c->gpu, x) : rgi_attn_plain_paged(&k, &pages, c->gpu, x);
  }
  return choose(&k, c->gpu, a->backward, &why)->steps(&k, c->gpu, c->workspace, x);
}

rgi_delta rgi_cuda_attn_delta(const rg_call *c, const rgi_attn *a) {
  const char *why;
  const rgk_attn k = kernels_view(a);
  const rgi_attn_family *f = choose(&k, c->gpu, true, &why);
  /* Without o only its alignment no longer counts. */
  return f->delta == RGI_DELTA_LANES || aligned(a->o) ? f->delta : RGI_DELTA_NONE;
}

bool rgi_cuda_attn_rounds(const rg_call *c, const rgi_attn *a) {
  const char *why;
  const rgk_attn k = kernels_view(a);
  return choose(&k, c->gpu, true, &why)->rounds;
}

/* The refusal of the family that is preferred on this GPU says why its kernels were not taken. */
const char *rgi_cuda_attn_path(const rg_call *c, const rgi_attn *a) {
  const char *why;
  const rgk_attn k = kernels_view(a);
  if (a->paged) {
    const rgk_pages pages = pages_view(a);
    const rgi_paged_family *f = choose_paged(&k, &pages, c->gpu, &why);
    return f ? f->name : why;
  }
  const rgi_attn_family *f = choose(&k, c->gpu, a->backward, &why);
  if (f == (a->backward ? &rgi_attn_mma_bwd : &rgi_attn_mma_fwd))
    return rgi_hopper(c->gpu) ? "mma: no wgmma kernel" : "mma: not Hopper";
  return why && f == (a->backward ? &rgi_attn_plain_bwd : &rgi_attn_plain_fwd) ? why : f->name;
}
