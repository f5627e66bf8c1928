/* ops/cuda/flash_fwd.c: forward of swa_attn and cmp_attn on Hopper's tensor cores; see
 * kernels/attn/flash_fwd_sm90.cuh. */
#include "../../kernels/attn/flash.h"
#include "../../kernels/paged.h"
#include "attn.h"
#include "hopper.h"

#define ROW(D, E, groups, keys) {D, E, groups, keys},
static const struct { int32_t D, E, groups, keys; } instance[] = {RGK_FLASH_INSTANCES(ROW)};

static const void *kernel(const rgk_attn *a, int i) {
  return rgk_flash_fwd((rg_dtype)a->dtype, instance[i].D, instance[i].E);
}

/* A build may lack instances; one without nvcc has none at all and plans as if it had them. */
static int choose(const rgk_attn *a) {
  const bool built = rgk_flash_fwd(RG_BF16, 128, 128) != NULL;
  for (int i = 0; i < RGI_COUNT(instance); i++)
    if (a->D <= instance[i].D && a->E <= instance[i].E && (!built || kernel(a, i))) return i;
  return -1;
}

int64_t rgi_cuda_key_tile(int64_t D, int64_t E) {
  const int64_t backward = D <= 128 && E <= 128 ? 128 : 64; /* flash_bwd.c; plain: 64, 32 … */
  for (int i = 0; i < RGI_COUNT(instance); i++)
    if (D <= instance[i].D && E <= instance[i].E) {
      int64_t tile = backward;
      while (tile % instance[i].keys) tile += backward;
      return tile;
    }
  return backward;
}

static int64_t slots(const rgk_attn *a, int i) {
  return rgk_slots(a->T, a->seqs.n, instance[i].groups * RGK_FLASH_BOX);
}

static const char *refuses(const rgk_attn *a, const rg_gpu *gpu) {
  const char *no = rgi_hopper_refuses(gpu, a->dtype, a->aligned);
  if (no) return no;
  if (a->mode == RGK_SLC) return "plain: selected keys";
  if (a->D <= 0 || a->E <= 0 || a->E % 8 != 0) return "plain: d_v not a multiple of 8";
  if (!(a->scale > 0)) return "plain: scale not positive";
  if (a->T == 0 || a->S == 0 || a->H == 0) return "plain: nothing to do";
  const int i = choose(a);
  if (i < 0) return "plain: heads this wide have no wgmma kernel";
  if (slots(a, i) * a->H > INT32_MAX / 2) return "plain: too many tiles";
  return NULL;
}

static size_t workspace(const rgk_attn *a, const rg_gpu *gpu) {
  (void)a, (void)gpu;
  return 0;
}

/* All but the maps of k and v. */
static rg_status fill(const rgk_attn *a, int i, rgk_flash_params *p, rg_error *e) {
  *p = (rgk_flash_params){
      .o = a->o,
      .lse = a->lse,
      .sinks = a->sinks,
      .seqs = a->seqs,
      .kseqs = a->kseqs,
      .offset = a->offset,
      .S = a->S,
      .window_left = a->window_left,
      .mode = a->mode,
      .slots = (int32_t)slots(a, i),
      .H = a->H,
      .E = a->E,
      .kernel = a->kernel,
      .before = a->mode == RGK_CMP ? a->kernel / a->stride - 1 : 0,
      .by_heads = rgk_divide_by(a->H),
      .by_group = rgk_divide_by(a->G),
      .by_stride = rgk_divide_by(a->mode == RGK_CMP ? a->stride : 1),
      .scale = a->scale,
      .softcap = a->softcap,
  };
  const rgk_map_of q = rgk_map_rows(a->q, a->T, a->H, a->D, RGK_FLASH_BOX),
                   o = rgk_map_rows(a->o, a->T, a->H, a->E, 16);
  RGI_TRY(rgk_map_make(&p->q, &q, e));
  return rgk_map_make(&p->o_map, &o, e);
}

static rg_status launch(const rgk_attn *a, int i, const rg_gpu *gpu, const void *function,
                        const void *params, size_t size, rg_cuda *x) {
  const int jobs = (int)(slots(a, i) * a->H), groups = instance[i].groups;
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)(jobs < gpu->sms ? jobs : gpu->sms), 1, 1},
                                   .block = {(uint32_t)(groups + 1) * 128, 1, 1},
                                   .shared = (uint32_t)RGK_FLASH_BYTES(instance[i].D, instance[i].E,
                                                                       groups, instance[i].keys),
                                   .params = params,
                                   .size = size});
}

static rg_status steps(const rgk_attn *a, const rg_gpu *gpu, void *unused, rg_cuda *x) {
  (void)unused;
  const int i = choose(a), keys = instance[i].keys;
  rgk_flash_params p;
  RGI_TRY(fill(a, i, &p, x->error));
  const rgk_map_of k = rgk_map_rows(a->k, a->S, a->KH, a->D, keys),
                   v = rgk_map_rows(a->v, a->S, a->KH, a->E, keys);
  RGI_TRY(rgk_map_make(&p.k, &k, x->error));
  RGI_TRY(rgk_map_make(&p.v, &v, x->error));
  return launch(a, i, gpu, kernel(a, i), &p, sizeof p, x);
}

/* ---- over pages ---- */

/* Rows that lie together in a page and in a tile, wherever either begins. */
static int32_t box_of(const rgk_attn *a, const rgk_pages *pages) {
  int32_t x = instance[choose(a)].keys, y = pages->rows;
  while (y) {
    const int32_t rest = x % y;
    x = y, y = rest;
  }
  return x;
}

const char *rgi_flash_paged_refuses(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu) {
  const char *no = a->mode == RGK_SLC ? "plain: selected keys" : refuses(a, gpu);
  if (no) return no;
  if (a->k.dtype != a->dtype || a->v.dtype != a->dtype) return "plain: caches of another type";
  /* swizzled rows come by eights */
  return box_of(a, pages) % 8 ? "plain: rows of a page are no multiple of 8" : NULL;
}

size_t rgi_flash_paged_workspace(const rgk_attn *a) {
  return 2 * RGI_ROUND256((size_t)a->seqs.n * sizeof(int32_t));
}

static rgk_map_of page_map(rgk_tensor t, int64_t page, const rgk_pages *pages, int64_t heads,
                           int64_t width, int32_t box) {
  rgk_map_of m = rgk_map_rows(t, pages->rows, heads, width, box);
  m.rank = 4;
  m.dim[3] = pages->count, m.stride[3] = page, m.box[3] = 1;
  return m;
}

rg_status rgi_flash_paged_steps(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu,
                                void *workspace, rg_cuda *x) {
  const int i = choose(a);
  rgi_cut at = {.base = workspace};
  rgk_held held = {.seqs = a->seqs, .pages = *pages};
  held.tokens = rgi_take(&at, (size_t)a->seqs.n * sizeof(int32_t));
  held.offset = rgi_take(&at, (size_t)a->seqs.n * sizeof(int32_t));
  if (a->seqs.n > 0)
    RGI_TRY(x->launch(x, &(rg_launch){.function = rgk_paged_held(),
                                      .grid = {(uint32_t)a->seqs.n, 1, 1},
                                      .block = {RGK_HELD_THREADS, 1, 1},
                                      .params = &held,
                                      .size = sizeof held}));
  rgk_flash_paged p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  RGI_TRY(fill(a, i, &p.f, x->error));
  p.f.offset = held.offset;
  p.tokens = held.tokens, p.table = pages->table, p.table_row = pages->table_row;
  p.rows = pages->rows, p.box = box_of(a, pages), p.count = pages->count;
  p.by_rows = rgk_divide_by(pages->rows);
  const rgk_map_of k = page_map(a->k, pages->k_page, pages, a->KH, a->D, p.box),
                   v = page_map(a->v, pages->v_page, pages, a->KH, a->E, p.box);
  RGI_TRY(rgk_map_make(&p.f.k, &k, x->error));
  RGI_TRY(rgk_map_make(&p.f.v, &v, x->error));
  return launch(a, i, gpu, rgk_flash_fwd_paged((rg_dtype)a->dtype, instance[i].D, instance[i].E),
                &p, sizeof p, x);
}

const rgi_attn_family rgi_attn_flash_fwd = {.name = "wgmma",
                                            .modes = RGI_ATTN_DENSE,
                                            .refuses = refuses,
                                            .workspace = workspace,
                                            .steps = steps};
