/* ops/cuda_flash_bwd.c: the backward of swa_attn and cmp_attn on Hopper's tensor cores: which calls it takes,
 * how the work is cut, and its launches (kernels/flash_bwd.h).
 *
 * How a sequence's work is cut follows from its own lengths and the number of heads a KV head has, so that
 * neither its neighbours nor other KV heads change a bit.
 */
#include "../kernels/flash_bwd.h"
#include "cuda_attn.h"

enum {
  STEPS = 64,           /* least tiles of queries, over all heads of a group, in an item of a cut sequence */
  LONGEST_WINDOW = 4096 /* up to here a key tile's queries are not cut */
};
/* Sums of dQ of one pass; KV heads that do not fit go to the next one. */
static const int64_t DQ_BYTES = INT64_C(4608) << 20;

static int32_t padded(const rgk_attn *a) {
  return a->D <= 64 ? 64 : 128;
}

static const char *refuses(const rgk_attn *a, const rg_gpu *gpu) {
  if (gpu->cc != 90) return "plain: not Hopper";
  if (a->mode == RGK_SLC) return "plain: selected keys";
  if (a->dtype == RG_F32) return "plain: f32";
  if (a->softcap != 0) return "plain: softcap";
  if (a->D != a->E) return "plain: d_qk is not d_v";
  if (a->D != 64 && a->D != 96 && a->D != 128) return "plain: head width";
  if (!a->aligned) return "plain: not aligned to 16 bytes";
  if (!a->d_o.data) return "plain: no gradient of o";
  if (a->T < 1 || a->S < 1 || a->seqs.n < 1) return "plain: nothing to do";
  if (!rgk_flash_bwd_main((rg_dtype)a->dtype, padded(a))) {
#ifdef REGRAPH_CUDA
    return "plain: not in this build";
#endif
  }
  return NULL;
}

/* Queries of the shortest chunk, 0: sequences are not cut. */
static int64_t least_chunk(const rgk_attn *a) {
  if (a->mode == RGK_SWA && a->window_left >= 0 && a->window_left <= LONGEST_WINDOW) return 0;
  return RGK_FLASH_BWD_ROWS * (STEPS > a->G ? (STEPS + a->G - 1) / a->G : 1);
}

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* Most items of one KV head: the sum over sequences of chunks times key tiles. */
static int64_t most_items(const rgk_attn *a, int64_t chunk) {
  const int64_t n = a->seqs.n, tiles = a->S / RGK_FLASH_BWD_KEYS + n;
  if (chunk == 0) return tiles;
  return least(RGK_FLASH_BWD_CHUNKS * tiles, a->T / chunk * (a->S / RGK_FLASH_BWD_KEYS + 1) + tiles);
}

/* Fills in p's cuts and, from `base` on, the workspace; its size is returned. */
static size_t layout(rgk_flash_bwd *p, const rgk_attn *a, void *base) {
  rgi_cut w = {.base = base};
  const int64_t n = a->seqs.n, H = a->H;
  *p = (rgk_flash_bwd){.a = *a, .chunk = least_chunk(a), .width = padded(a)};
  p->slots = rgk_slots(a->T, n, RGK_FLASH_BWD_ROWS);
  p->zero_blocks = least(1024, rgk_blocks(a->S, 64));
  const int64_t one_head = a->T * a->G * p->width * 4;
  p->kh_n = (int32_t)least(a->KH, one_head < DQ_BYTES ? DQ_BYTES / one_head : 1);
  p->passes = rgk_blocks(a->KH, p->kh_n);
  p->kv_tiles = p->chunk ? a->S / RGK_FLASH_BWD_KEYS + least(n, a->T / p->chunk) : 0;
  p->rows = rgi_take(&w, (size_t)(p->slots * H) * 128 * sizeof(float));
  p->sink = a->sinks.data && a->d_sinks.data ? rgi_take(&w, (size_t)(p->slots * H) * sizeof(float)) : NULL;
  p->dq = rgi_take(&w, (size_t)(one_head * p->kh_n));
  p->kv = rgi_take(&w, (size_t)(a->KH * p->kv_tiles * RGK_FLASH_BWD_KEYS * 2 * p->width) * sizeof(float));
  p->dq_done = rgi_take(&w, (size_t)(p->slots * H) * sizeof(uint32_t));
  p->kv_done = rgi_take(&w, (size_t)(a->KH * p->kv_tiles * 2) * sizeof(uint32_t));
  p->ticket = rgi_take(&w, (size_t)p->passes * sizeof(uint32_t));
  p->items = rgi_take(&w, (size_t)(n + 1) * sizeof(int32_t));
  p->kv_before = rgi_take(&w, (size_t)(n + 1) * sizeof(int32_t));
  return w.used;
}

static size_t workspace(const rgk_attn *a, const rg_gpu *gpu) {
  rgk_flash_bwd p;
  (void)gpu;
  return layout(&p, a, NULL);
}

static rg_status launch(rg_cuda *x, const rgk_flash_bwd *p, const void *function, int64_t blocks,
                        uint32_t threads, uint32_t shared) {
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)blocks, 1, 1},
                                   .block = {threads, 1, 1},
                                   .shared = shared,
                                   .params = p,
                                   .size = sizeof *p});
}

static int64_t head_groups(int64_t heads) {
  return (heads + RGK_FLASH_BWD_HEADS - 1) / RGK_FLASH_BWD_HEADS;
}

static rg_status steps(const rgk_attn *a, const rg_gpu *gpu, void *workspace_, rg_cuda *x) {
  rgk_flash_bwd p;
  (void)gpu;
  layout(&p, a, workspace_);
  const rgk_map_of q = rgk_map_rows(a->q, a->T, a->H, a->D, RGK_FLASH_BWD_ROWS),
                   d_o = rgk_map_rows(a->d_o, a->T, a->H, a->E, RGK_FLASH_BWD_ROWS),
                   k = rgk_map_rows(a->k, a->S, a->KH, a->D, RGK_FLASH_BWD_KEYS),
                   v = rgk_map_rows(a->v, a->S, a->KH, a->E, RGK_FLASH_BWD_KEYS);
  RGI_TRY(rgk_map_make(&p.q, &q, x->error));
  RGI_TRY(rgk_map_make(&p.d_o, &d_o, x->error));
  RGI_TRY(rgk_map_make(&p.k, &k, x->error));
  RGI_TRY(rgk_map_make(&p.v, &v, x->error));
  RGI_TRY(launch(x, &p, rgk_flash_bwd_prepare((rg_dtype)a->dtype),
                 1 + p.zero_blocks + p.slots * head_groups(a->H), 256, 0));
  const bool any = a->dq.data || a->dk.data || a->dv.data;
  const int32_t kh_n = p.kh_n;
  for (; any && p.pass < p.passes; p.pass++) {
    p.kh0 = p.pass * kh_n;
    p.kh_n = (int32_t)least(kh_n, a->KH - p.kh0);
    RGI_TRY(launch(x, &p, rgk_flash_bwd_main((rg_dtype)a->dtype, p.width), most_items(a, p.chunk) * p.kh_n,
                   RGK_FLASH_BWD_THREADS, rgk_flash_bwd_shared(p.width)));
    if (a->dq.data)
      RGI_TRY(launch(x, &p, rgk_flash_bwd_dq(), p.slots * head_groups((int64_t)p.kh_n * a->G), 256, 0));
  }
  if (p.sink) RGI_TRY(launch(x, &p, rgk_flash_bwd_sinks(), a->H, 256, 0));
  return RG_OK;
}

const rgi_attn_family rgi_attn_flash_bwd = {
    .name = "wgmma", .modes = RGI_ATTN_DENSE, .refuses = refuses, .workspace = workspace, .steps = steps};
