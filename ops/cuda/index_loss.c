/* ops/cuda/index_loss.c: see index_loss.h. */
#include "index_loss.h"
#include "csr.h"

typedef struct plan {
  rgk_index_loss p;
  rgk_csr csr;
  bool mma, lists;
  int64_t grid, window; /* window: rows of a launch, mma */
} plan;

/* Bytes of a window's shares of d.index_k, at most, if one row needs no more. */
static const int64_t SHARES = INT64_C(512) << 20;

static bool by_16(const rg_arg *x) {
  bool even = x->dtype == RG_BF16 && x->align >= 16 && x->dim[2] % 8 == 0;
  for (int i = 0; i < 2; i++) even = even && x->stride[i] % 8 == 0;
  return even;
}

static const char *mma_refuses(const rgi_index_loss *a, const rg_gpu *gpu) {
  if (gpu->cc < 80) return "plain: before Ampere";
  if (rgi_cuda_block_kb(gpu) * 1024 < RGK_INDEX_LOSS_MMA_BYTES) return "plain: shared memory";
  if (a->q->dtype != RG_BF16) return "plain: type";
  if (!by_16(a->q) || !by_16(a->k) || !by_16(a->index_q) || !by_16(a->index_k))
    return "plain: a tensor off 16 bytes";
  if (a->ID > RGK_INDEX_LOSS_MMA_WIDTH || a->IH / a->I > RGK_INDEX_LOSS_MMA_HEADS)
    return "plain: heads of the index";
  if (a->S * a->I > INT32_MAX / 2 || a->N * a->block > INT32_MAX / 2) return "plain: too many keys";
  return NULL;
}

/* No bit depends on windows; four at least, so that short calls take them too. */
static void plan_windows(plan *s, const rgi_index_loss *a, const rg_gpu *gpu, rgi_cut *w) {
  const int64_t row = a->I * a->N * a->block * RGK_INDEX_LOSS_MMA_WIDTH * 2,
                most = row > 0 && SHARES / row > 0 ? SHARES / row : 1,
                whole = most * a->I / gpu->sms * gpu->sms / a->I;
  s->window = (a->T + 3) / 4;
  if (s->window > most) s->window = whole > 0 ? whole : most;
  s->p.share = rgi_take(w, (size_t)(s->window * row));
  s->p.sum = rgi_take(w, (size_t)(a->S * a->I * RGK_INDEX_LOSS_MMA_WIDTH) * sizeof *s->p.sum);
  s->p.cursor = rgi_take(w, (size_t)(a->S * a->I) * sizeof *s->p.cursor);
}

static plan plan_call(const rgi_index_loss *a, const rg_gpu *gpu, rgi_cut *w) {
  plan s;
  memset(&s, 0, sizeof s); /* holes too: launches are compared byte by byte */
  s.p = (rgk_index_loss){.q = rgk_of(a->q),
                         .k = rgk_of(a->k),
                         .lse = rgk_of(a->lse),
                         .index_q = rgk_of(a->index_q),
                         .index_k = rgk_of(a->index_k),
                         .weight = rgk_of(a->weight),
                         .idx = rgk_of(a->idx),
                         .loss = rgk_of(a->loss),
                         .d_loss = rgk_of(a->d_loss),
                         .dq = rgk_of(a->dq),
                         .dk = rgk_of(a->dk),
                         .dw = rgk_of(a->dw),
                         .seqs = rgk_seqs_of(a->cu, a->T),
                         .kseqs = rgk_seqs_of(a->cu_k ? a->cu_k : a->cu, a->S),
                         .offset = a->offset ? a->offset->data : NULL,
                         .T = a->T,
                         .S = a->S,
                         .H = (int32_t)a->H,
                         .KH = (int32_t)a->KH,
                         .D = (int32_t)a->D,
                         .IH = (int32_t)a->IH,
                         .I = (int32_t)a->I,
                         .ID = (int32_t)a->ID,
                         .N = (int32_t)a->N,
                         .block = (int32_t)a->block,
                         .scale = (float)a->scale,
                         .index_scale = (float)a->index_scale,
                         .relu = a->relu,
                         .add_q = a->add_q,
                         .add_k = a->add_k,
                         .add_w = a->add_w};
  s.mma = !mma_refuses(a, gpu);
  const int64_t rows = a->T * a->I, keys = a->N * a->block,
                most = (s.mma ? 1 : 8) * (int64_t)gpu->sms;
  s.grid = rows < most ? rows : most;
  s.window = a->T;
  s.p.own = rgi_take(w, (size_t)(s.grid * (s.mma ? 3 : 2) * keys) * sizeof *s.p.own);
  if (!a->backward) return s;
  if (!s.mma) s.p.slope = rgi_take(w, (size_t)(rows * keys) * sizeof *s.p.slope);
  s.lists = a->dk && rows > 0;
  if (!s.lists) return s;
  if (s.mma) plan_windows(&s, a, gpu, w);
  const rgk_attn selection = {.mode = RGK_SLC,
                              .KH = s.p.I,
                              .N = s.p.N,
                              .block = s.p.block,
                              .T = a->T,
                              .S = a->S,
                              .idx = s.p.idx,
                              .seqs = s.p.seqs,
                              .kseqs = s.p.kseqs,
                              .offset = s.p.offset};
  s.csr = rgi_csr_plan(&selection, w);
  s.csr.places = rgi_take(w, (size_t)(rows * a->N) * sizeof *s.csr.places);
  s.p.slots = s.csr.slots;
  s.p.start = s.csr.start;
  s.p.list = s.csr.rows;
  s.p.places = s.csr.places;
  return s;
}

static rg_status step(const plan *s, rg_cuda *x, const void *function, int64_t blocks,
                      uint32_t threads, uint32_t shared) {
  if (blocks > INT32_MAX)
    return rgi_fail(x->error, RG_E_LIMIT, NULL, NULL, "index_loss needs too large a grid");
  if (blocks == 0) return RG_OK;
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)blocks, 1, 1},
                                   .block = {threads, 1, 1},
                                   .shared = shared,
                                   .params = &s->p,
                                   .size = sizeof s->p});
}

static rg_status steps_by_mma(plan *s, const rgi_index_loss *a, rg_cuda *x) {
  if (s->lists) RGI_TRY(rgi_csr_steps(&s->csr, x));
  for (s->p.row = 0; s->p.row < a->T; s->p.row += s->window) {
    s->p.rows = a->T - s->p.row < s->window ? a->T - s->p.row : s->window;
    RGI_TRY(step(s, x, rgk_index_loss_mma_rows(a->backward), s->grid, RGK_INDEX_LOSS_MMA_THREADS,
                 RGK_INDEX_LOSS_MMA_BYTES));
    if (s->lists)
      RGI_TRY(step(s, x, rgk_index_loss_mma_keys(),
                   rgk_blocks(a->S * a->I * 16, RGK_INDEX_LOSS_THREADS), RGK_INDEX_LOSS_THREADS,
                   0));
  }
  return RG_OK;
}

const char *rgi_cuda_index_loss_path(const rgi_index_loss *a, const rg_gpu *gpu) {
  const char *no = mma_refuses(a, gpu);
  return no ? no : "mma";
}

size_t rgi_cuda_index_loss_workspace(const rgi_index_loss *a, const rg_gpu *gpu) {
  rgi_cut w = {0};
  plan_call(a, gpu, &w);
  return w.used;
}

rg_status rgi_cuda_index_loss_steps(const rgi_index_loss *a, const rg_gpu *gpu, void *workspace,
                                    rg_cuda *x) {
  rgi_cut w = {.base = workspace};
  plan s = plan_call(a, gpu, &w);
  if (s.mma) return steps_by_mma(&s, a, x);
  RGI_TRY(step(&s, x, rgk_index_loss_rows(a->backward), s.grid, RGK_INDEX_LOSS_THREADS, 0));
  if (!s.lists) return RG_OK;
  RGI_TRY(rgi_csr_steps(&s.csr, x));
  return step(&s, x, rgk_index_loss_keys(), s.p.slots * s.p.block * s.p.I, RGK_INDEX_LOSS_THREADS,
              0);
}
