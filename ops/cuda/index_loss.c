/* ops/cuda/index_loss.c: see index_loss.h. */
#include "index_loss.h"
#include "csr.h"

typedef struct plan {
  rgk_index_loss p;
  rgk_csr csr;
  bool lists;
  int64_t grid;
} plan;

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
  const int64_t rows = a->T * a->I, keys = a->N * a->block, most = 8 * (int64_t)gpu->sms;
  s.grid = rows < most ? rows : most;
  s.p.own = rgi_take(w, (size_t)(s.grid * 2 * keys) * sizeof *s.p.own);
  if (!a->backward) return s;
  s.p.slope = rgi_take(w, (size_t)(rows * keys) * sizeof *s.p.slope);
  s.lists = a->dk && rows > 0;
  if (!s.lists) return s;
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

static rg_status step(const plan *s, rg_cuda *x, const void *function, int64_t blocks) {
  if (blocks > INT32_MAX)
    return rgi_fail(x->error, RG_E_LIMIT, NULL, NULL, "index_loss needs too large a grid");
  if (blocks == 0) return RG_OK;
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)blocks, 1, 1},
                                   .block = {RGK_INDEX_LOSS_THREADS, 1, 1},
                                   .params = &s->p,
                                   .size = sizeof s->p});
}

size_t rgi_cuda_index_loss_workspace(const rgi_index_loss *a, const rg_gpu *gpu) {
  rgi_cut w = {0};
  plan_call(a, gpu, &w);
  return w.used;
}

rg_status rgi_cuda_index_loss_steps(const rgi_index_loss *a, const rg_gpu *gpu, void *workspace,
                                    rg_cuda *x) {
  rgi_cut w = {.base = workspace};
  const plan s = plan_call(a, gpu, &w);
  RGI_TRY(step(&s, x, rgk_index_loss_rows(a->backward), s.grid));
  if (!s.lists) return RG_OK;
  RGI_TRY(rgi_csr_steps(&s.csr, x));
  return step(&s, x, rgk_index_loss_keys(), s.p.slots * s.p.block * s.p.I);
}
