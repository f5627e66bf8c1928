/* ops/cuda/attn_plain.c: attention of any shape and type on a GPU, without tensor cores
 * (kernels/attn/plain.h). Backward computes delta, then dQ and dK, dV apart; SLC inverts the
 * selection first. */
#include "attn_plain.h"

rgk_attn_plain rgi_attn_plain_rows(const rgk_attn *a, int32_t rows) {
  const int32_t G = a->G > 0 ? a->G : 1;
  rgk_attn_plain p = {.a = *a, .vec = a->aligned && a->D % 4 == 0 && a->E % 4 == 0};
  p.parts = (G + rows - 1) / rows;
  p.heads = (G + p.parts - 1) / p.parts;
  p.queries = rows / p.heads;
  p.slots = rgk_slots(a->T, a->seqs.n, p.queries);
  return p;
}

static rgk_attn_plain plan(const rgk_attn *a, const rg_gpu *gpu, int *width) {
  const int32_t wide = a->D > a->E ? a->D : a->E;
  const bool much = rgi_cuda_attn_much_shared(gpu);
  *width = wide <= 64    ? RGK_PLAIN_64
           : wide <= 128 ? (much ? RGK_PLAIN_128 : RGK_PLAIN_128_SMALL)
           : wide > 256  ? RGK_PLAIN_576
                         : (much ? RGK_PLAIN_256 : RGK_PLAIN_256_SMALL);
  return rgi_attn_plain_rows(a, rgk_plain_rows(*width));
}

void rgi_attn_plain_cut_blocks(rgk_attn_plain *p, int32_t most) {
  p->key_parts = (p->a.block - 1) / most + 1;
  p->keys = (p->a.block - 1) / p->key_parts + 1;
}

rg_status rgi_attn_plain_step(const rgk_attn_plain *p, rg_cuda *x, const void *function,
                              int64_t blocks, uint32_t threads, uint32_t shared) {
  if (blocks > INT32_MAX)
    return rgi_fail(x->error, RG_E_LIMIT, NULL, NULL, "attention needs too large a grid");
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)blocks, 1, 1},
                                   .block = {threads, 1, 1},
                                   .shared = shared,
                                   .params = p,
                                   .size = sizeof *p});
}

/* ---- forward ---- */

rg_status rgi_attn_plain_paged(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu,
                               rg_cuda *x) {
  int w;
  rgk_attn_plain p = plan(a, gpu, &w);
  if (pages) p.pages = *pages;
  if (a->mode == RGK_SLC) rgi_attn_plain_cut_blocks(&p, RGK_PLAIN_FWD_KEYS);
  return rgi_attn_plain_step(&p, x, rgk_plain_fwd(w), p.slots * a->KH * p.parts, RGK_PLAIN_THREADS,
                             rgk_plain_fwd_shared(w));
}

static rg_status forward_steps(const rgk_attn *a, const rg_gpu *gpu, void *workspace, rg_cuda *x) {
  (void)workspace;
  return rgi_attn_plain_paged(a, NULL, gpu, x);
}

const rgi_attn_family rgi_attn_plain_fwd = {.name = "plain", .steps = forward_steps};

/* ---- backward ---- */

enum { SINK_ROWS = 1024, LEAST_UNIT = 512 };

static bool wants_keys(const rgk_attn *a) {
  return a->dk.data || a->dv.data;
}

static void plan_keys(rgk_attn_plain *p, int32_t own, rgk_csr *csr, rgi_cut *cut) {
  const rgk_attn *a = &p->a;
  p->own = own;
  p->own_parts = 1;
  if (a->mode == RGK_SWA) {
    p->key_slots = rgk_slots(a->S, a->kseqs.n, p->own);
    return;
  }
  /* tiles counted in tokens, all of which may lie beyond S rows of keys */
  if (a->mode == RGK_CMP) {
    p->own_parts = RGK_PLAIN_PARTS;
    p->key_slots = a->S / p->own + a->kseqs.n + 2;
    p->part_rows = RGK_PLAIN_PARTS * a->S;
    const int64_t one = RGK_PLAIN_PART_MOST / a->stride + 1, most = one > a->S ? one : a->S;
    if (a->kseqs.n <= 1 && most < p->part_rows) p->part_rows = most;
  } else {
    *csr = rgi_csr_plan(a, cut);
    p->start = csr->start;
    p->rows = csr->rows;
    p->csr_slots = csr->slots;
    const int64_t mean = (int64_t)a->N * a->block; /* length of a list */
    p->unit = mean / 2 > LEAST_UNIT ? mean / 2 : LEAST_UNIT;
    const int64_t entries = a->T * a->N, tile = a->block < a->S ? a->block : a->S;
    p->own_parts = (int32_t)((tile + p->own - 1) / p->own);
    if (p->own_parts < 1) p->own_parts = 1;
    p->key_slots = entries / p->unit + p->csr_slots + 1;
    p->part_rows = a->T > 2 * p->unit ? entries / p->unit * a->block : 0;
  }
  if (a->dk.data) p->part_k = rgi_take(cut, (size_t)(a->KH * p->part_rows * a->D) * sizeof(float));
  if (a->dv.data) p->part_v = rgi_take(cut, (size_t)(a->KH * p->part_rows * a->E) * sizeof(float));
}

void rgi_attn_plain_backward(rgk_attn_plain *p, int32_t own, rgk_csr *csr, rgi_cut *cut) {
  const rgk_attn *a = &p->a;
  p->delta = rgi_take(cut, (size_t)a->T * (size_t)a->H * sizeof *p->delta);
  if (a->d_sinks.data) {
    p->sink_rows = SINK_ROWS;
    p->sink_chunks = (a->T + SINK_ROWS - 1) / SINK_ROWS;
    p->sink = rgi_take(cut, (size_t)(p->sink_chunks * a->H) * sizeof *p->sink);
  }
  if (wants_keys(a)) plan_keys(p, own, csr, cut);
}

static rgk_attn_plain plan_backward(const rgk_attn *a, const rg_gpu *gpu, rgk_csr *csr, int *width,
                                    rgi_cut *cut) {
  rgk_attn_plain p = plan(a, gpu, width);
  if (a->mode == RGK_SLC) rgi_attn_plain_cut_blocks(&p, rgk_plain_keys(*width));
  rgi_attn_plain_backward(&p, rgk_plain_rows(*width), csr, cut);
  return p;
}

static size_t backward_workspace(const rgk_attn *a, const rg_gpu *gpu) {
  int w;
  rgk_csr csr;
  rgi_cut cut = {0};
  plan_backward(a, gpu, &csr, &w, &cut);
  return cut.used;
}

rg_status rgi_attn_plain_backward_steps(const rgk_attn_plain *p, const rgk_csr *csr,
                                        const rgi_attn_plain_kernels *k, rg_cuda *x) {
  const rgk_attn *a = &p->a;
  const uint32_t n = RGK_PLAIN_THREADS;
  if (wants_keys(a) && a->mode == RGK_SLC) RGI_TRY(rgi_csr_steps(csr, x));
  RGI_TRY(rgi_attn_plain_step(p, x, k->delta, k->delta_blocks, k->delta_threads, 0));
  if (wants_keys(a)) {
    RGI_TRY(rgi_attn_plain_step(p, x, k->keys, p->key_slots * a->KH * p->own_parts, k->keys_threads,
                                k->keys_shared));
    if (a->mode == RGK_CMP)
      RGI_TRY(rgi_attn_plain_step(p, x, rgk_plain_reduce(), a->KH * a->S, n, 0));
    if (a->mode == RGK_SLC && p->part_rows > 0)
      RGI_TRY(rgi_attn_plain_step(p, x, rgk_plain_reduce(), a->KH * p->csr_slots, n, 0));
  }
  if (a->dq.data && k->queries_alone)
    RGI_TRY(x->launch(x, k->queries_alone));
  else if (a->dq.data)
    RGI_TRY(rgi_attn_plain_step(p, x, k->queries, p->slots * a->KH * p->parts, k->queries_threads,
                                k->queries_shared));
  if (a->d_sinks.data) {
    RGI_TRY(rgi_attn_plain_step(p, x, rgk_plain_sink(), p->sink_chunks * a->H, n, 0));
    RGI_TRY(rgi_attn_plain_step(p, x, rgk_plain_sink_sum(), rgk_blocks(a->H, n), n, 0));
  }
  return RG_OK;
}

static rg_status backward_steps(const rgk_attn *a, const rg_gpu *gpu, void *workspace, rg_cuda *x) {
  int w;
  rgk_csr csr;
  rgi_cut cut = {.base = workspace};
  const rgk_attn_plain p = plan_backward(a, gpu, &csr, &w, &cut);
  const rgi_attn_plain_kernels k = {.delta = rgk_plain_delta(),
                                    .keys = rgk_plain_dkv(w),
                                    .queries = rgk_plain_dq(w),
                                    .delta_blocks = rgk_blocks(a->T * a->H, RGK_PLAIN_DELTA_ROWS),
                                    .delta_threads = RGK_PLAIN_THREADS,
                                    .keys_threads = RGK_PLAIN_DKV_THREADS,
                                    .queries_threads = RGK_PLAIN_THREADS,
                                    .keys_shared = rgk_plain_dkv_shared(w),
                                    .queries_shared = rgk_plain_dq_shared(w)};
  return rgi_attn_plain_backward_steps(&p, &csr, &k, x);
}

const rgi_attn_family rgi_attn_plain_bwd = {.name = "plain",
                                            .workspace = backward_workspace,
                                            .steps = backward_steps,
                                            .delta = RGI_DELTA_CHAIN};
