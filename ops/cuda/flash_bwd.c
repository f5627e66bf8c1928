/* ops/cuda/flash_bwd.c: the backward of swa_attn and cmp_attn on Hopper's tensor cores: which
   calls it takes, how the work is cut, and its launches (kernels/attn/flash_bwd.h).

   How a sequence's work is cut follows from its own lengths and the number of heads a KV head has,
   so that neither its neighbours nor other KV heads change a bit.
 */
#include "../../kernels/attn/flash_bwd.h"
#include "attn.h"
#include "hopper.h"

enum {
  /* least tiles of queries, over all heads of a group, in an item of a cut sequence */
  STEPS = 64,
  LONGEST_WINDOW = 4096 /* up to here a key tile's queries are not cut */
};
/* Sums of dQ of one pass; KV heads that do not fit go to the next one. */
static const int64_t DQ_BYTES = INT64_C(4608) << 20;
/* Up to here every chunk has a place of its own for dK and dV, and none waits for another. */
static const int64_t KV_BYTES = INT64_C(384) << 20;

/* Widths of an instance's rows, and keys in its tiles. */
static void instance(rgk_flash_bwd *p, const rgk_attn *a) {
  const int32_t most = a->D > a->E ? a->D : a->E;
  p->width = p->width_v = most <= 64 ? 64 : most <= 128 ? 128 : 256;
  if (most > 128 && a->D <= 192 && a->E <= 128) p->width = 192, p->width_v = 128;
  p->keys = most <= 128 ? 128 : 64;
}

static const void *main_kernel(const rgk_flash_bwd *p) {
  const rg_dtype type = (rg_dtype)p->a.dtype;
  return p->keys == 64 ? rgk_flash_bwd_wide(type, p->width) : rgk_flash_bwd_main(type, p->width);
}

static const char *refuses(const rgk_attn *a, const rg_gpu *gpu) {
  const char *no = rgi_hopper_refuses(gpu, a->dtype, a->aligned);
  if (no) return no;
  if (a->mode == RGK_SLC) return "plain: selected keys";
  if (a->softcap != 0) return "plain: softcap";
  if (a->D > 256 || a->E > 256 || a->D % 16 || a->E % 16) return "plain: head width";
  if (!a->d_o.data) return "plain: no gradient of o";
  if (a->T < 1 || a->S < 1 || a->seqs.n < 1) return "plain: nothing to do";
#ifdef REGRAPH_CUDA
  rgk_flash_bwd p = {.a = *a};
  instance(&p, a);
  if (!main_kernel(&p)) return "plain: not in this build";
#endif
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
static int64_t most_items(const rgk_flash_bwd *p) {
  const rgk_attn *a = &p->a;
  const int64_t full = a->S / p->keys, tiles = full + a->seqs.n;
  if (p->chunk == 0) return tiles;
  return least(RGK_FLASH_BWD_CHUNKS * tiles, a->T / p->chunk * (full + 1) + tiles);
}

/* Fills in p's cuts and, from `base` on, the workspace; its size is returned. */
static size_t layout(rgk_flash_bwd *p, const rgk_attn *a, void *base) {
  rgi_cut w = {.base = base};
  const int64_t n = a->seqs.n, H = a->H;
  *p = (rgk_flash_bwd){.a = *a, .chunk = least_chunk(a)};
  instance(p, a);
  if (a->acc_q) p->a.dq_sum = a->dq; /* in place is a sum like another */
  p->slots = rgk_slots(a->T, n, RGK_FLASH_BWD_ROWS);
  p->zero_blocks = least(1024, rgk_blocks(a->S, 64));
  const int64_t one_head = a->T * a->G * p->width * 4;
  p->kh_n = (int32_t)least(a->KH, one_head < DQ_BYTES ? DQ_BYTES / one_head : 1);
  p->passes = rgk_blocks(a->KH, p->kh_n);
  p->kv_tiles = p->chunk ? a->S / p->keys + least(n, a->T / p->chunk) : 0;
  p->rows = rgi_take(&w, (size_t)(p->slots * H) * 128 * sizeof(float));
  p->sink = a->sinks.data && a->d_sinks.data
                ? rgi_take(&w, (size_t)(p->slots * H) * sizeof *p->sink)
                : NULL;
  p->dq = rgi_take(&w, (size_t)(one_head * p->kh_n));
  const int64_t kv = a->KH * p->kv_tiles * p->keys * (p->width + p->width_v) * 4;
  const int64_t parts = p->chunk ? least(RGK_FLASH_BWD_CHUNKS, a->T / p->chunk + 1) : 1;
  p->parts = kv * parts <= KV_BYTES ? (int32_t)parts : 1;
  p->kv = rgi_take(&w, (size_t)(kv * p->parts));
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
                        int32_t rows, uint32_t threads, uint32_t shared) {
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)blocks, (uint32_t)rows, 1},
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
                   k = rgk_map_rows(a->k, a->S, a->KH, a->D, p.keys),
                   v = rgk_map_rows(a->v, a->S, a->KH, a->E, p.keys);
  RGI_TRY(rgk_map_make(&p.q, &q, x->error));
  RGI_TRY(rgk_map_make(&p.d_o, &d_o, x->error));
  RGI_TRY(rgk_map_make(&p.k, &k, x->error));
  RGI_TRY(rgk_map_make(&p.v, &v, x->error));
  RGI_TRY(launch(x, &p, rgk_flash_bwd_prepare((rg_dtype)a->dtype),
                 1 + p.zero_blocks + p.slots * head_groups(a->H), 1, 256, 0));
  const bool any = a->dq.data || a->dk.data || a->dv.data;
  const int32_t kh_n = p.kh_n;
  for (; any && p.pass < p.passes; p.pass++) {
    p.kh0 = p.pass * kh_n;
    p.kh_n = (int32_t)least(kh_n, a->KH - p.kh0);
    RGI_TRY(launch(x, &p, main_kernel(&p), most_items(&p) * p.kh_n, 1, RGK_FLASH_BWD_THREADS,
                   rgk_flash_bwd_shared(p.keys, p.width, p.width_v)));
    if (a->dq.data)
      RGI_TRY(launch(x, &p, rgk_flash_bwd_dq(), p.slots * head_groups((int64_t)p.kh_n * a->G), 1,
                     256, 0));
  }
  if ((a->dk.data || a->dv.data) && p.parts > 1 && p.kv_tiles > 0)
    RGI_TRY(launch(x, &p, rgk_flash_bwd_kv(), p.kv_tiles * 8, a->KH, 256, 0));
  if (p.sink) RGI_TRY(launch(x, &p, rgk_flash_bwd_sinks(), a->H, 1, 256, 0));
  return RG_OK;
}

const rgi_attn_family rgi_attn_flash_bwd = {.name = "wgmma",
                                            .modes = RGI_ATTN_DENSE,
                                            .refuses = refuses,
                                            .workspace = workspace,
                                            .steps = steps,
                                            .delta = RGI_DELTA_LANES,
                                            .rounds = true};
