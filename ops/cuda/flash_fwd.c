/* ops/cuda/flash_fwd.c: forward of swa_attn and cmp_attn on Hopper's tensor cores, the same over
 * pages, and attention with choice of single tokens; see kernels/attn/flash_fwd_sm90.cuh and
 * decode.h. */
#include "../../kernels/attn/decode_split.h"
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

static int64_t slots(const rgk_attn *a, int rows) {
  return rgk_slots(a->T, a->seqs.n, rows);
}
static int rows_of(int i) {
  return instance[i].groups * RGK_FLASH_BOX;
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
  if (slots(a, rows_of(i)) * a->H > INT32_MAX / 2) return "plain: too many tiles";
  return NULL;
}

/* Over pages a tile's rows are 2^pack heads of a token side by side; else 0. */
typedef struct tiling {
  int instance, groups, pack, tokens; /* tokens of a tile */
} tiling;

static int64_t jobs_of(const rgk_attn *a, tiling t) {
  return slots(a, t.tokens) * (a->H >> t.pack);
}

/* All but the maps of k and v. */
static rg_status fill(const rgk_attn *a, tiling t, rgk_flash_params *p, rg_error *e) {
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
      .slots = (int32_t)slots(a, t.tokens),
      .H = a->H,
      .E = a->E,
      .kernel = a->kernel,
      .before = a->mode == RGK_CMP ? a->kernel / a->stride - 1 : 0,
      .pack = t.pack,
      .tokens = t.tokens,
      .by_heads = rgk_divide_by(a->H >> t.pack),
      .by_group = rgk_divide_by(a->G),
      .by_stride = rgk_divide_by(a->mode == RGK_CMP ? a->stride : 1),
      .scale = a->scale,
      .softcap = a->softcap,
  };
  rgk_map_of q = rgk_map_rows(a->q, a->T, a->H, a->D, RGK_FLASH_BOX >> t.pack),
             o = rgk_map_rows(a->o, a->T, a->H, a->E, t.pack < 4 ? 16 >> t.pack : 1);
  q.box[1] = 1 << t.pack;
  o.box[1] = t.pack < 4 ? 1 << t.pack : 16;
  RGI_TRY(rgk_map_make(&p->q, &q, e));
  return rgk_map_make(&p->o_map, &o, e);
}

static rg_status launch(const rgk_attn *a, tiling t, const rg_gpu *gpu, const void *function,
                        const void *params, size_t size, rg_cuda *x) {
  const int jobs = (int)jobs_of(a, t), i = t.instance;
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)(jobs < gpu->sms ? jobs : gpu->sms), 1, 1},
                                   .block = {(uint32_t)(t.groups + 1) * 128, 1, 1},
                                   .shared = (uint32_t)RGK_FLASH_SHARED(
                                       instance[i].D, instance[i].E, t.groups, instance[i].keys),
                                   .params = params,
                                   .size = size});
}

static rg_status steps(const rgk_attn *a, const rg_gpu *gpu, void *unused, rg_cuda *x) {
  (void)unused;
  const int i = choose(a), keys = instance[i].keys;
  const tiling t = {i, instance[i].groups, 0, rows_of(i)};
  rgk_flash_params p;
  RGI_TRY(fill(a, t, &p, x->error));
  const rgk_map_of k = rgk_map_rows(a->k, a->S, a->KH, a->D, keys),
                   v = rgk_map_rows(a->v, a->S, a->KH, a->E, keys);
  RGI_TRY(rgk_map_make(&p.k, &k, x->error));
  RGI_TRY(rgk_map_make(&p.v, &v, x->error));
  return launch(a, t, gpu, kernel(a, i), &p, sizeof p, x);
}

/* ---- over pages ---- */

static const char *paged_refuses(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu) {
  const char *no = refuses(a, gpu);
  if (no) return no;
  if (a->k.dtype != a->dtype || a->v.dtype != a->dtype) return "plain: caches of another type";
  if (a->D % 64 || a->E % 64) return "plain: head width no multiple of 64";
  return pages->rows % 8 ? "plain: rows of a page are no multiple of 8" : NULL;
}

/* Where no sequence need have more than a warpgroup's rows, one is enough: the same bits. */
static tiling paged_tiling(const rgk_attn *a) {
  tiling t = {choose(a), 0, 0, 0};
  while (t.pack < 6 && 2 << t.pack <= a->G) t.pack++;
  if (1 << t.pack != a->G) t.pack = 0;
  t.groups =
      a->T <= (int64_t)a->seqs.n * (RGK_FLASH_BOX >> t.pack) ? 1 : instance[t.instance].groups;
  t.tokens = t.groups * RGK_FLASH_BOX >> t.pack;
  return t;
}

/* In boxes of eight rows and all panels of the kernel; `page` elements from page to page. */
static rgk_map_of map_pages(rgk_tensor t, int64_t page, const rgk_pages *pages, int64_t heads,
                            int64_t width, int32_t panels) {
  const rgk_map_of m = {.data = t.data,
                        .dtype = t.dtype,
                        .rank = 5,
                        .dim = {64, pages->rows, width / 64, heads, pages->count},
                        .stride = {1, t.row, 64, t.head, page},
                        .box = {64, 8, panels, 1, 1},
                        .swizzle = 128};
  return m;
}

static rg_status fill_paged(const rgk_attn *a, const rgk_pages *pages, tiling t, rgk_flash_paged *p,
                            rg_error *e) {
  RGI_TRY(fill(a, t, &p->f, e));
  p->pages = *pages;
  p->by_rows = rgk_divide_by(pages->rows);
  const rgk_map_of k = map_pages(a->k, pages->k_page, pages, a->KH, a->D,
                                 RGK_FLASH_PANELS(instance[t.instance].D)),
                   v = map_pages(a->v, pages->v_page, pages, a->KH, a->E,
                                 RGK_FLASH_PANELS(instance[t.instance].E));
  RGI_TRY(rgk_map_make(&p->f.k, &k, e));
  return rgk_map_make(&p->f.v, &v, e);
}

/* ---- single tokens ---- */

/* Steps of no more rows than sequences, of heads as their kernels want them (decode_sm90.cuh). */
static bool of_single_tokens(const rgk_attn *a) {
  return a->T <= a->seqs.n && a->G == RGK_DECODE_HEADS && a->D == a->E &&
         (a->D == 64 || a->D == 128) && a->softcap == 0;
}

static tiling decode_tiling(const rgk_attn *a) {
  const tiling t = {choose(a), 1, 4, 1};
  return t;
}

static int64_t decode_blocks(const rgk_attn *a, const rg_gpu *gpu) {
  const int64_t jobs = a->T * a->KH;
  return jobs < gpu->sms ? jobs : gpu->sms;
}

/* Floats of a row: those of all that a sequence has room for in its table, for a context may say
 * so whatever stands there (pages that are none, or one several times). */
static int64_t decode_pitch(const rgk_pages *pages) {
  return ((int64_t)pages->most * pages->rows / RGK_DECODE_KEYS + 2) * RGK_DECODE_KEYS;
}

bool rgi_decode_takes(const rgk_attn *a, const rgk_topk *p, const rgk_pages *pages,
                      const rg_gpu *gpu, bool split) {
  if (paged_refuses(a, pages, gpu)) return false;
  /* would want more room than there are keys; split, where no bit may hang on capacities, less */
  if (pages->most > pages->count && !split) return false;
#ifdef REGRAPH_CUDA
  if (!rgk_decode_sm90((rg_dtype)a->dtype, a->D, false)) return false;
#endif
  return of_single_tokens(a) && a->D == p->D && p->score == RGK_TOPK_BY_SOFTMAX &&
         p->softcap == 0 && p->local > 0 && p->top_n <= 32 && p->share <= 1 && !p->max &&
         p->block == RGK_DECODE_BLOCK * p->stride && p->kernel == 2 * p->stride && a->lse.data &&
         a->scale == p->scale;
}

/* Of more tokens the memory keeps all waiting, and two blocks of threads for each are slower. */
enum { TWINS = 4 };
static bool decodes_twins(const rgk_attn *a, const rg_gpu *gpu) {
  return TWINS * a->T * a->KH <= gpu->sms;
}
/* Of more tokens ranking goes beside attention, and takes the shorter way. */
enum { FEW = 3 };
static bool decodes_few(const rgk_attn *a, const rg_gpu *gpu) {
  return !decodes_twins(a, gpu) && a->T * a->KH < FEW * (int64_t)gpu->sms;
}

size_t rgi_decode_workspace(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu) {
  const int64_t blocks = decode_blocks(a, gpu), pitch = decode_pitch(pages);
  if (decodes_few(a, gpu))
    return RGI_ROUND256((size_t)(blocks * (pitch / RGK_DECODE_KEYS)) * RGK_DECODE_NEAR_KEPT);
  return RGI_ROUND256((size_t)(blocks * RGK_DECODE_ROWS_KEPT * pitch) * sizeof(float));
}

static rg_status decode_fill(const rgk_attn *a, const rgk_pages *pages, rgk_flash_paged *p,
                             rg_error *e) {
  RGI_TRY(fill_paged(a, pages, decode_tiling(a), p, e));
  p->f.slots = (int32_t)a->T;
  rgk_map_of q = rgk_map_rows(a->q, a->T, a->H, a->D, 1);
  q.box[1] = RGK_DECODE_HEADS;
  return rgk_map_make(&p->f.q, &q, e);
}

static rg_status decode_launch(const rgk_attn *a, const rg_gpu *gpu, const void *function,
                               uint32_t cluster, uint32_t threads, uint32_t shared,
                               const void *params, size_t size, rg_cuda *x) {
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)decode_blocks(a, gpu) * cluster, 1, 1},
                                   .block = {threads, 1, 1},
                                   .cluster = cluster,
                                   .shared = shared,
                                   .params = params,
                                   .size = size});
}

static rg_status choice_fill(const rgk_attn *a, const rgk_topk *topk, const rgk_pages *pages,
                             void *workspace, rgk_decode *p, rg_error *e) {
  RGI_TRY(decode_fill(a, pages, &p->f, e));
  p->topk = *topk;
  p->room = workspace;
  p->pitch = decode_pitch(pages);
  return RG_OK;
}

rg_status rgi_decode_step(const rgk_attn *a, const rgk_topk *topk, const rgk_pages *pages,
                          const rg_gpu *gpu, void *workspace, rg_cuda *x) {
  rgk_decode p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  RGI_TRY(choice_fill(a, topk, pages, workspace, &p, x->error));
  const bool twins = decodes_twins(a, gpu), few = decodes_few(a, gpu);
  const rg_dtype type = (rg_dtype)a->dtype;
  return decode_launch(
      a, gpu, few ? rgk_decode_near(type, a->D) : rgk_decode_sm90(type, a->D, twins), twins ? 2 : 1,
      RGK_DECODE_THREADS, few || twins ? RGK_DECODE_SHARED(a->D) : RGK_DECODE_HELD_SHARED(a->D), &p,
      sizeof p, x);
}

bool rgi_decode_takes_selected(const rgk_attn *a, const rgk_pages *pages) {
#ifdef REGRAPH_CUDA
  if (!rgk_decode_slc((rg_dtype)a->dtype, a->D)) return false;
#endif
  return of_single_tokens(a) && a->block == 64 && pages->rows % 64 == 0 && a->N <= 32;
}

/* A cache as axes (width, head, row of a page, page). */
static rg_status map_blocks(rgk_map *map, rgk_tensor t, int64_t page, const rgk_pages *pages,
                            const rgk_attn *a, rg_error *e) {
  rgk_map_of m = rgk_map_rows(t, pages->rows, a->KH, a->D, 64);
  m.rank = 4;
  m.dim[3] = pages->count, m.stride[3] = page, m.box[3] = 1;
  return rgk_map_make(map, &m, e);
}

static rg_status selected_fill(const rgk_attn *a, const rgk_pages *pages, rgk_decode_selected *p,
                               rg_error *e) {
  RGI_TRY(decode_fill(a, pages, &p->f, e));
  RGI_TRY(map_blocks(&p->f.f.k, a->k, pages->k_page, pages, a, e));
  RGI_TRY(map_blocks(&p->f.f.v, a->v, pages->v_page, pages, a, e));
  p->f.f.window_left = -1;
  p->idx = a->idx;
  p->top_n = a->N;
  return RG_OK;
}

rg_status rgi_decode_selected(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu,
                              rg_cuda *x) {
  rgk_decode_selected p;
  memset(&p, 0, sizeof p); /* holes too */
  RGI_TRY(selected_fill(a, pages, &p, x->error));
  return decode_launch(a, gpu, rgk_decode_slc((rg_dtype)a->dtype, a->D), 1, 256,
                       RGK_DECODE_SHARED(a->D), &p, sizeof p, x);
}

bool rgi_decode_takes_pair(const rgk_attn *selected, const rgk_attn *window, const rgk_pages *pages,
                           const rg_gpu *gpu, bool split) {
#ifdef REGRAPH_CUDA
  if (!rgk_decode_pair_sm90((rg_dtype)window->dtype, window->D)) return false;
#endif
  return (split || !decodes_twins(window, gpu)) && !paged_refuses(window, pages, gpu) &&
         of_single_tokens(window) && !rgi_paged_gather_fwd.refuses(selected, pages, gpu) &&
         rgi_decode_takes_selected(selected, pages) && !selected->lse.data && !window->lse.data;
}

static rg_status pair_fill(const rgk_attn *selected, const rgk_attn *window, const rgk_pages *pages,
                           rgk_decode_pair *p, rg_error *e) {
  RGI_TRY(selected_fill(selected, pages, &p->selected, e));
  RGI_TRY(decode_fill(window, pages, &p->window, e));
  p->window.f.k = p->selected.f.f.k;
  p->window.f.v = p->selected.f.f.v;
  return RG_OK;
}

rg_status rgi_decode_pair(const rgk_attn *selected, const rgk_attn *window, const rgk_pages *pages,
                          const rg_gpu *gpu, rgk_decode_pair *p, rg_cuda *x) {
  RGI_TRY(pair_fill(selected, window, pages, p, x->error));
  return decode_launch(window, gpu, rgk_decode_pair_sm90((rg_dtype)window->dtype, window->D), 1,
                       RGK_PAIR_THREADS, RGK_PAIR_SHARED, p, sizeof *p, x);
}

bool rgi_decode_takes_layer(const rgk_attn *compressed, const rg_gpu *gpu, bool split) {
#ifdef REGRAPH_CUDA
  const rg_dtype type = (rg_dtype)compressed->dtype;
  if (!(split ? rgk_decode_split_sm90(type, compressed->D)
              : rgk_decode_layer_sm90(type, compressed->D)))
    return false;
#endif
  return split || decodes_few(compressed, gpu);
}

rg_status rgi_decode_layer(const rgk_attn *compressed, const rgk_topk *topk,
                           const rgk_pages *compressed_pages, const rgk_attn *selected,
                           const rgk_attn *window, const rgk_pages *pages,
                           const rgk_decode_pair *pair, const rgk_append_means *step,
                           const rg_gpu *gpu, void *workspace, rg_cuda *x) {
  rgk_decode_layer p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  p.pair = *pair;
  if (step) p.step = *step, p.steps = 1;
  RGI_TRY(choice_fill(compressed, topk, compressed_pages, workspace, &p.d, x->error));
  RGI_TRY(pair_fill(selected, window, pages, &p.pair, x->error));
  return decode_launch(compressed, gpu,
                       rgk_decode_layer_sm90((rg_dtype)compressed->dtype, compressed->D), 1,
                       RGK_DECODE_THREADS, RGK_DECODE_SHARED(compressed->D), &p, sizeof p, x);
}

/* ---- single tokens, each shared out among a cluster ---- */

/* Clusters of n blocks of threads that run at once, at least: those of more than two find their
 * multiprocessors among some 16 to 18 neighbours. */
static int64_t clusters_at_once(int32_t n, const rg_gpu *gpu) {
  return n <= 2 ? gpu->sms / n : (int64_t)(gpu->sms / 18) * (16 / n);
}
/* As many blocks of threads as there is room for at once: sums do not depend on it. */
static int32_t split_blocks(const rgk_attn *a, const rg_gpu *gpu) {
  int32_t n = RGK_SPLIT_MOST;
  while (n > 1 && a->T * a->KH > clusters_at_once(n, gpu)) n = n > 4 ? n / 2 : n - 1;
  return n;
}
static int64_t split_clusters(const rgk_attn *a, const rg_gpu *gpu) {
  const int64_t jobs = a->T * a->KH, most = clusters_at_once(split_blocks(a, gpu), gpu);
  return jobs < most ? jobs : most;
}
static int64_t split_pitch(const rgk_pages *pages) {
  return ((int64_t)pages->most * pages->rows / RGK_SPLIT_CHUNK + 2) * RGK_SPLIT_CHUNK;
}
static int64_t split_room(const rgk_attn *a, const rgk_pages *pages) {
  return (int64_t)RGI_ROUND256(RGK_SPLIT_ROOM(a->D, split_pitch(pages)));
}

size_t rgi_decode_split_workspace(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu) {
  return (size_t)(split_clusters(a, gpu) * split_room(a, pages));
}

rg_status rgi_decode_split(const rgk_attn *compressed, const rgk_topk *topk,
                           const rgk_pages *compressed_pages, const rgk_attn *selected,
                           const rgk_attn *window, const rgk_pages *pages,
                           const rgk_decode_pair *pair, const rg_gpu *gpu, void *workspace,
                           rg_cuda *x) {
  rgk_decode_split p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  p.pair = *pair;
  RGI_TRY(choice_fill(compressed, topk, compressed_pages, workspace, &p.d, x->error));
  RGI_TRY(decode_fill(selected, pages, &p.pair.selected.f, x->error));
  RGI_TRY(decode_fill(window, pages, &p.pair.window, x->error));
  p.d.pitch = split_pitch(compressed_pages);
  p.room_bytes = split_room(compressed, compressed_pages);
  p.blocks = split_blocks(compressed, gpu);
  return x->launch(
      x, &(rg_launch){.function = rgk_decode_split_sm90((rg_dtype)compressed->dtype, compressed->D),
                      .grid = {(uint32_t)(split_clusters(compressed, gpu) * p.blocks), 1, 1},
                      .block = {32 * RGK_SPLIT_WARPS, 1, 1},
                      .cluster = (uint32_t)p.blocks,
                      .shared = RGK_SPLIT_SHARED(compressed->D),
                      .params = &p,
                      .size = sizeof p});
}

/* ---- any lengths ---- */

static rg_status paged_steps(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu,
                             rg_cuda *x) {
  const tiling t = paged_tiling(a);
  const int i = t.instance;
  const void *const single =
      of_single_tokens(a) ? rgk_decode_alone((rg_dtype)a->dtype, a->D) : NULL;
  rgk_flash_paged p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  if (single) {
    RGI_TRY(decode_fill(a, pages, &p, x->error));
    return decode_launch(a, gpu, single, 1, 256, RGK_DECODE_SHARED(a->D), &p, sizeof p, x);
  }
  RGI_TRY(fill_paged(a, pages, t, &p, x->error));
  return launch(a, t, gpu,
                rgk_flash_fwd_paged((rg_dtype)a->dtype, instance[i].D, instance[i].E, t.groups), &p,
                sizeof p, x);
}

const rgi_paged_family rgi_paged_flash_fwd = {"wgmma", paged_refuses, paged_steps};

const rgi_attn_family rgi_attn_flash_fwd = {
    .name = "wgmma", .modes = RGI_ATTN_DENSE, .refuses = refuses, .steps = steps};
