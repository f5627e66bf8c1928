/* ops/cuda/attn.c: see attn.h. */
#include "attn.h"
#include "columns.h"
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

/* How a call runs. Where no family makes the gradient of k and v in one, d.k and d.v are made apart
 * in fp32 and summed behind that, before the sum so far is added: as where both are one. */
typedef struct plan {
  const rgi_attn_family *f;
  const char *why;
  rgk_attn k;
  bool apart;
  rg_arg dk, dv; /* apart */
  void *family;  /* its workspace */
  size_t used;   /* in all */
} plan;

static rg_arg sums(const rgi_attn *a, int64_t width, rgi_cut *w) {
  rg_arg x = {.dtype = RG_F32, .rank = 3, .dim = {a->S, a->KH, width}, .align = 16};
  x.stride[0] = a->KH * width, x.stride[1] = width, x.stride[2] = 1;
  x.data = rgi_take(w, (size_t)(a->S * a->KH * width) * sizeof(float));
  return x;
}

static plan plan_of(const rg_call *c, const rgi_attn *a) {
  rgi_cut w = {.base = c->workspace};
  plan p = {.k = kernels_view(a)};
  if (a->joined && a->block == 1) {
    p.f = &rgi_attn_tokens_joined;
    if (p.f->refuses(&p.k, c->gpu)) p.f = NULL;
  }
  p.apart = a->joined && !p.f;
  if (p.apart) {
    rgi_attn b = *a;
    p.dk = a->dk->dtype == RG_F32 && !a->acc_k ? *a->dk : sums(a, a->D, &w);
    p.dv = sums(a, a->E, &w);
    b.dk = &p.dk, b.dv = &p.dv, b.acc_k = false;
    p.k = kernels_view(&b);
  }
  if (!p.f) p.f = choose(&p.k, c->gpu, a->backward, &p.why);
  p.family = rgi_take(&w, p.f->workspace ? p.f->workspace(&p.k, c->gpu) : 0);
  p.used = w.used;
  return p;
}

size_t rgi_cuda_attn_workspace(const rg_call *c, const rgi_attn *a) {
  return a->paged ? 0 : plan_of(c, a).used;
}

rg_status rgi_cuda_attn_steps(const rg_call *c, const rgi_attn *a, rg_cuda *x) {
  if (a->paged) {
    const char *why;
    const rgk_attn k = kernels_view(a);
    const rgk_pages pages = pages_view(a);
    const rgi_paged_family *f = choose_paged(&k, &pages, c->gpu, &why);
    return f ? f->steps(&k, &pages, c->gpu, x) : rgi_attn_plain_paged(&k, &pages, c->gpu, x);
  }
  const plan p = plan_of(c, a);
  RGI_TRY(p.f->steps(&p.k, c->gpu, p.family, x));
  return p.apart ? rgi_cuda_add_columns(&p.dk, &p.dv, a->dk, a->acc_k, x) : RG_OK;
}

rgi_delta rgi_cuda_attn_delta(const rg_call *c, const rgi_attn *a) {
  const rgi_attn_family *f = plan_of(c, a).f;
  /* Without o only its alignment no longer counts. */
  return f->delta == RGI_DELTA_LANES || aligned(a->o) ? f->delta : RGI_DELTA_NONE;
}

bool rgi_cuda_attn_rounds(const rg_call *c, const rgi_attn *a) {
  return plan_of(c, a).f->rounds;
}

/* The refusal of the family that is preferred on this GPU says why its kernels were not taken. */
const char *rgi_cuda_attn_path(const rg_call *c, const rgi_attn *a) {
  const char *why;
  if (a->paged) {
    const rgk_attn k = kernels_view(a);
    const rgk_pages pages = pages_view(a);
    const rgi_paged_family *f = choose_paged(&k, &pages, c->gpu, &why);
    return f ? f->name : why;
  }
  const plan p = plan_of(c, a);
  const rgi_attn_family *f = p.f;
  why = p.why;
  if (f == (a->backward ? &rgi_attn_mma_bwd : &rgi_attn_mma_fwd))
    return rgi_hopper(c->gpu) ? "mma: no wgmma kernel" : "mma: not Hopper";
  return why && f == (a->backward ? &rgi_attn_plain_bwd : &rgi_attn_plain_fwd) ? why : f->name;
}
