/* ops/cuda/mma_bwd.c: attention's backward on the tensor cores of any GPU since Ampere
 * (kernels/attn/mma_bwd.h): which calls it takes, and its kernels. Work is cut as for the plain
 * ones, whose memory it needs and no more. */
#include "../../kernels/attn/mma_bwd.h"
#include "attn_mma.h"
#include "attn_plain.h"

/* The instance that holds the call, by its width; 0: there is none. */
static int32_t instance(const rgk_attn *a, int32_t *width_v) {
#define X(w, e) \
  if (a->D <= (w) && a->E <= (e)) return *width_v = (e), (w);
  RGK_MMA_BWD_INSTANCES(X)
#undef X
  return 0;
}

static const char *refuses(const rgk_attn *a, const rg_gpu *gpu) {
  int32_t E;
  if (gpu->cc < 80) return "plain: older than Ampere";
  if (a->dtype != RG_BF16 && a->dtype != RG_F16) return "plain: f32";
  if (!a->aligned) return "plain: a tensor off 16 bytes";
  if (a->softcap != 0) return "plain: softcap";
  if (a->D % 8 || a->E % 8 || !instance(a, &E)) return "plain: head width";
  if (!a->d_o.data) return "plain: no gradient of o";
  /* the kernels count in 32 bits: rows in steps of 16 bytes, lse and delta in floats */
  if (a->T * a->q.row >> 35 || a->T * a->d_o.row >> 35 || a->T * a->lse.row >> 32 ||
      a->T * a->H >> 32)
    return "plain: rows of q over 64 GiB";
#ifdef REGRAPH_CUDA
  const int32_t W = instance(a, &E);
  if (!rgk_mma_bwd_keys((rg_dtype)a->dtype, W, rgi_cuda_attn_little_shared(gpu), RGK_MMA_BWD_KEYS))
    return "plain: not in this build";
#endif
  return NULL;
}

/* dQ of selected blocks by warps that have queries of their own. */
static bool alone(const rgk_attn *a, int32_t W) {
  return a->mode == RGK_SLC && W <= RGK_MMA_BWD_HELD && a->G <= rgk_mma_rows(RGK_MMA_ONE) &&
         a->T > 0 && a->S > 0 && a->H > 0 && rgi_attn_mma_counts(a);
}

/* Keys of a tile of dK and dV. Many: rows are read half as often. That gains nothing where a window
 * ends them, nor where there are no more tiles than multiprocessors. A key's sums have one order in
 * either: from the sequence's last query on. */
static int32_t tile_keys(const rgk_attn *a, const rg_gpu *gpu, int32_t W) {
  enum { MANY = RGK_MMA_BWD_MANY_KEYS, LONG = 1024 };
  const bool many = a->mode == RGK_SWA && a->window_left < 0 && W == RGK_MMA_BWD_MANY_WIDTH &&
                    !rgi_cuda_attn_little_shared(gpu) && a->S / LONG >= a->seqs.n &&
                    2 * (a->S / MANY * a->KH) >= 3 * (int64_t)gpu->sms;
  return many ? MANY : RGK_MMA_BWD_KEYS;
}

static rgk_attn_plain plan(const rgk_attn *a, const rg_gpu *gpu, rgk_csr *csr, rgi_cut *cut) {
  int32_t E;
  rgk_attn_plain p = rgi_attn_plain_rows(a, RGK_MMA_BWD_ROWS);
  if (a->mode == RGK_SLC)
    rgi_attn_plain_cut_blocks(&p,
                              rgk_mma_bwd_step(instance(a, &E), rgi_cuda_attn_little_shared(gpu)));
  rgi_attn_plain_backward(&p, tile_keys(a, gpu, instance(a, &E)), csr, cut);
  return p;
}

static size_t workspace(const rgk_attn *a, const rg_gpu *gpu) {
  rgk_csr csr;
  rgi_cut cut = {0};
  plan(a, gpu, &csr, &cut);
  return cut.used;
}

static rg_status steps(const rgk_attn *a, const rg_gpu *gpu, void *workspace_, rg_cuda *x) {
  rgk_csr csr;
  rgi_cut cut = {.base = workspace_};
  const rgk_attn_plain p = plan(a, gpu, &csr, &cut);
  const rg_dtype t = (rg_dtype)a->dtype;
  const bool s = rgi_cuda_attn_little_shared(gpu);
  int32_t E = 0;
  const int32_t W = instance(a, &E), n = tile_keys(a, gpu, W);
  const int64_t lanes = a->T * a->H * RGK_MMA_BWD_LANES;
  rgk_mma_bwd_alone_params one;
  rg_launch by_one;
  const bool own = alone(a, W), pairs = a->mode != RGK_SLC && W <= RGK_MMA_BWD_HELD;
  if (own) {
    memset(&one, 0, sizeof one); /* holes too: launches are compared byte by byte */
    one.m = rgi_attn_mma_teams(a, RGK_MMA_ONE);
    one.delta = p.delta;
    const int64_t groups = (one.m.slots - 1) / rgk_mma_teams(RGK_MMA_ONE, W) + 1;
    by_one = (rg_launch){.function = rgk_mma_bwd_alone(t, W),
                         .grid = {(uint32_t)(groups * a->KH * one.m.parts), 1, 1},
                         .block = {(uint32_t)rgk_mma_threads(RGK_MMA_ONE, W), 1, 1},
                         .shared = rgk_mma_shared(RGK_MMA_ONE, true, W, E),
                         .params = &one,
                         .size = sizeof one};
  }
  const rgi_attn_plain_kernels k = {.delta = rgk_mma_bwd_delta(t),
                                    .keys = rgk_mma_bwd_keys(t, W, s, n),
                                    .queries = pairs ? rgk_mma_bwd_pairs(t, W)
                                                     : rgk_mma_bwd_queries(t, W, s),
                                    .delta_blocks = rgk_blocks(lanes, RGK_MMA_BWD_THREADS),
                                    .delta_threads = RGK_MMA_BWD_THREADS,
                                    .keys_threads = rgk_mma_bwd_keys_threads(W, n),
                                    .queries_threads = RGK_MMA_BWD_THREADS,
                                    .keys_shared = rgk_mma_bwd_keys_shared(W, E, s, n),
                                    .queries_shared = pairs ? rgk_mma_bwd_pairs_shared(W, E)
                                                            : rgk_mma_bwd_queries_shared(W, E, s),
                                    .queries_alone = own ? &by_one : NULL};
  return rgi_attn_plain_backward_steps(&p, &csr, &k, x);
}

const rgi_attn_family rgi_attn_mma_bwd = {.name = "mma",
                                          .modes = RGI_ATTN_DENSE | RGI_ATTN_SELECTED,
                                          .refuses = refuses,
                                          .workspace = workspace,
                                          .steps = steps,
                                          .delta = RGI_DELTA_LANES,
                                          .rounds = true};
