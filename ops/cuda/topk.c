/* ops/cuda/topk.c: see topk.h.
 *
 * Softmax scores take two launches: one ranks by fp32 sums and marks the rows that those cannot
 * decide, the other ranks the marked rows by fp64 sums; where no row is marked, it only looks. */
#include "hopper.h"
#include "topk.h"

/* ---- the plain kernels ---- */

enum {
  HEAP_SHARED = 64, /* places of a row's heap that are kept in shared memory */
  CHUNK = 64        /* most blocks scored together */
};

static uint32_t plain_grid(const rgk_topk *p, const rg_gpu *gpu) {
  int64_t work = rgk_slots(p->T, p->seqs.n, RGK_TOPK_ROWS) * p->KH, most = 2 * (int64_t)gpu->sms;
  return (uint32_t)(work < most ? work : most);
}

/* As few blocks as make whole pieces of keys, CHUNK at most. */
static int32_t plain_chunk(const rgk_topk *p) {
  int64_t keys = p->block / p->stride, reach = p->kernel / p->stride - 1, n;
  for (int64_t piece = RGK_TOPK_KEYS; (n = (piece - reach) / keys) < 1; piece += RGK_TOPK_KEYS)
    if (reach + keys > (int64_t)CHUNK * RGK_TOPK_KEYS) return CHUNK;
  return (int32_t)(n < CHUNK ? n : CHUNK);
}

/* Places of heaps, and sums of queries that choose alike. */
static size_t plain_workspace(const rgk_topk *p, const rg_gpu *gpu, void *base, uint64_t **heap,
                              float **sums) {
  rgi_cut w = {.base = base};
  const size_t places = (size_t)plain_grid(p, gpu) * RGK_TOPK_ROWS * (size_t)p->most_keep;
  *heap = rgi_take(&w, p->most_keep <= HEAP_SHARED ? 0 : places * sizeof **heap);
  if (p->most_keep <= HEAP_SHARED) *heap = NULL;
  *sums = rgi_take(&w, p->share > 1 ? (size_t)(p->T * p->KH * p->D) * sizeof **sums : 0);
  return w.used;
}

static rg_status share_step(rgk_topk *p, rg_cuda *x) {
  const int64_t n = p->T * p->KH * p->D;
  if (n == 0) return RG_OK;
  RGI_TRY(x->launch(x, &(rg_launch){.function = rgk_topk_share(),
                                    .grid = {rgk_blocks(n, RGK_TOPK_THREADS), 1, 1},
                                    .block = {RGK_TOPK_THREADS, 1, 1},
                                    .params = p,
                                    .size = sizeof *p}));
  p->q = (rgk_tensor){.data = p->sums, .row = (int64_t)p->KH * p->D, .head = p->D, .dtype = RG_F32};
  p->H = p->KH;
  p->G = 1;
  return RG_OK;
}

static rg_status plain_step(const rgk_topk *call, const rgk_pages *pages, const rg_gpu *gpu,
                            void *workspace, rg_cuda *x, int mode) {
  rgk_topk_any any;
  memset(&any, 0, sizeof any); /* holes too: launches are compared byte by byte */
  rgk_topk *p = &any.call;
  *p = *call;
  if (pages) any.pages = *pages;
  p->slots = rgk_slots(p->T, p->seqs.n, RGK_TOPK_ROWS);
  p->chunk = plain_chunk(p);
  plain_workspace(call, gpu, workspace, &p->heap, &p->sums);
  if (p->share > 1) RGI_TRY(share_step(p, x));
  return x->launch(
      x, &(rg_launch){.function = rgk_topk_plain(mode),
                      .grid = {plain_grid(p, gpu), 1, 1},
                      .block = {RGK_TOPK_THREADS, 1, 1},
                      .shared = rgk_topk_plain_shared(mode, p->chunk, p->heap ? 0 : p->most_keep),
                      .params = &any,
                      .size = sizeof any});
}

/* ---- on tensor cores ---- */

static int padded_heads(int group) {
  int heads = 4;
  while (heads < group) heads *= 2;
  return heads;
}

/* As many as there is room for, or 0. A multiprocessor has 228 KiB, and takes 1 KiB a block for
 * itself. Warps apart that choose want three (choose_all in topk_sm90.cu). */
static int sm90_stages(const rgk_topk *p, const rgk_pages *pages) {
  const int heads = padded_heads(p->G),
            reach = pages ? p->block / p->stride : p->kernel / p->stride - 1;
  const bool apart = RGK_TOPK90_GROUPS(heads, p->D) == 1;
  const uint32_t room = (228u << 10) / (apart ? 2 : 1) - 1024;
  for (int stages = RGK_TOPK90_STAGES; stages >= (apart ? 3 : 2); stages--)
    if (rgk_topk90_shared(heads, p->D, reach, stages) <= room) return stages;
  return 0;
}

/* What neither Hopper's kernels nor those of all since Ampere do, or NULL. */
static const char *both_refuse(const rgk_topk *p) {
  const int heads = padded_heads(p->G), bs = p->block / p->stride,
            reach = p->kernel / p->stride - 1;
  if (p->dtype != RG_BF16 && p->dtype != RG_F16) return "plain: f32";
  if (!p->aligned) return "plain: a tensor off 16 bytes";
  if (p->D != 64 && p->D != 96 && p->D != 128 && p->D != 192 && p->D != 256)
    return "plain: head width";
  if (p->score == RGK_TOPK_BY_RELU) return "plain: score relu";
  if (p->max && p->score != RGK_TOPK_BY_DOT) return "plain: pool max";
  if (p->local == 0) return "plain: local 0";
  if (p->share > 1) return "plain: query_block";
  if (heads > (p->score == RGK_TOPK_BY_DOT ? 4 : 16)) return "plain: group";
  if (p->top_n > 32) return "plain: top_n";
  if (p->S == 0) return "plain: no compressed keys";
  if (p->softcap != 0) return "plain: softcap";
  if (bs > (p->max ? 2 : 1) * RGK_TOPK90_TILE || (bs & (bs - 1)) || reach > 8)
    return "plain: kernel, stride, block";
  if (p->max && (bs < 4 || reach > 0)) return "plain: kernel, stride, block";
  return NULL;
}

/* Why not, or NULL. */
static const char *sm90_refuses(const rgk_topk *p, const rgk_pages *pages, const rg_gpu *gpu) {
  const int reach = p->kernel / p->stride - 1;
  const bool dot = p->score == RGK_TOPK_BY_DOT;
  if (!rgi_hopper(gpu)) return "plain: not Hopper";
  const char *no = both_refuse(p);
  if (no) return no;
  if (pages && dot) return "plain: score dot over pages";
  if (pages && p->k.dtype != p->dtype) return "plain: caches of another type";
  if (pages && reach > p->block / p->stride) return "plain: kernel, stride, block";
  if (pages && pages->rows % 4) return "plain: rows of a page are no multiple of 4";
  if (!sm90_stages(p, pages)) return "plain: shared memory";
#ifdef REGRAPH_CUDA
  const int heads = padded_heads(p->G);
  if (!(pages ? rgk_topk90_over_pages((rg_dtype)p->dtype, heads, p->D)
              : rgk_topk90((rg_dtype)p->dtype, heads, p->D, dot)))
    return "plain: not in this build";
#endif
  return NULL;
}
static const char *mma_refuses(const rgk_topk *p, const rgk_pages *pages, const rg_gpu *gpu) {
  if (gpu->cc < 80) return "plain: older than Ampere";
  if (pages) return "plain: pages";
  if (p->max) return "plain: pool max";
  const char *no = both_refuse(p);
  if (no) return no;
#ifdef REGRAPH_CUDA
  if (!rgk_topk80((rg_dtype)p->dtype, padded_heads(p->G), p->D)) return "plain: not in this build";
#endif
  return NULL;
}

static rg_status sm90_step(const rgk_topk *call, rg_cuda *x) {
  const int heads = padded_heads(call->G);
  const rgk_map_of k = rgk_map_rows(call->k, call->S, call->KH, call->D, RGK_TOPK90_TILE);
  rgk_topk90_params p = {.call = *call};
  p.call.stages = sm90_stages(call, NULL);
  p.call.slots = rgk_slots(call->T, call->seqs.n,
                           RGK_TOPK90_GROUPS(heads, call->D) * RGK_TOPK90_COLUMNS / heads);
  RGI_TRY(rgk_map_make(&p.k, &k, x->error));
  return x->launch(
      x, &(rg_launch){.function = rgk_topk90((rg_dtype)call->dtype, heads, call->D,
                                             call->score == RGK_TOPK_BY_DOT),
                      .grid = {(uint32_t)(p.call.slots * call->KH), 1, 1},
                      .block = {(uint32_t)RGK_TOPK90_THREADS(heads, call->D), 1, 1},
                      .shared = rgk_topk90_shared(heads, call->D, call->kernel / call->stride - 1,
                                                  p.call.stages),
                      .params = &p,
                      .size = sizeof p});
}

/* Blocks that share out a tile's keys: as many as there is room for beside the other tiles, of
 * which sequences with a token each have one. */
static int32_t sm90_parts(const rgk_topk *p, int64_t queries, const rg_gpu *gpu) {
  const int64_t most = p->T < p->seqs.n ? p->T : p->seqs.n,
                tiles = p->KH * (p->T / queries > most ? p->T / queries : most);
  int32_t parts = 1;
  while (parts < 8 && 2 * parts * tiles <= 2 * (int64_t)gpu->sms) parts *= 2;
  return parts;
}

static rg_status sm90_paged_step(const rgk_topk *call, const rgk_pages *pages, const rg_gpu *gpu,
                                 rg_cuda *x) {
  const int heads = padded_heads(call->G);
  const int64_t queries = RGK_TOPK90_GROUPS(heads, call->D) * RGK_TOPK90_COLUMNS / heads;
  rgk_topk90_paged p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  p.call = *call;
  p.pages = *pages;
  p.parts = sm90_parts(call, queries, gpu);
  p.call.stages = sm90_stages(call, pages);
  p.call.slots = rgk_slots(call->T, call->seqs.n, queries);
  return x->launch(
      x, &(rg_launch){
             .function = rgk_topk90_over_pages((rg_dtype)call->dtype, heads, call->D),
             .grid = {(uint32_t)(p.call.slots * call->KH * p.parts), 1, 1},
             .block = {(uint32_t)RGK_TOPK90_THREADS(heads, call->D), 1, 1},
             .cluster = (uint32_t)p.parts,
             .shared = rgk_topk90_shared(heads, call->D, call->block / call->stride, p.call.stages),
             .params = &p,
             .size = sizeof p});
}

static rg_status mma_step(const rgk_topk *call, rg_cuda *x) {
  const int heads = padded_heads(call->G);
  rgk_topk p = *call;
  p.slots = rgk_slots(p.T, p.seqs.n, RGK_TOPK80_WARPS * RGK_TOPK80_COLUMNS / heads);
  return x->launch(x, &(rg_launch){.function = rgk_topk80((rg_dtype)p.dtype, heads, p.D),
                                   .grid = {(uint32_t)(p.slots * p.KH), 1, 1},
                                   .block = {32 * RGK_TOPK80_WARPS, 1, 1},
                                   .shared = rgk_topk80_shared(heads, p.D, p.kernel / p.stride - 1),
                                   .params = &p,
                                   .size = sizeof p});
}

/* ---- score relu on Hopper: scores to memory, then the choice ---- */

/* Bytes of the scores of a window of rows, if a tile needs no more. */
static const int64_t SCORES = INT64_C(256) << 20;

static int relu_heads(int group) {
  int heads = 8;
  while (heads < group) heads *= 2;
  return heads;
}

static const char *relu_refuses(const rgk_topk *p, const rgk_pages *pages, const rg_gpu *gpu) {
  if (p->score != RGK_TOPK_BY_RELU) return "plain: not score relu";
  const char *no = rgi_hopper_refuses(gpu, p->dtype, p->aligned);
  if (no) return no;
  if (pages) return "plain: score relu over pages";
  if (p->D != 64 && p->D != 128) return "plain: head width";
  if (p->G > 64) return "plain: group";
  if (p->kernel != p->stride || p->block != p->stride || p->max || p->share > 1)
    return "plain: kernel, stride, block";
  if (p->T == 0 || p->S == 0) return "plain: nothing to do";
  if (p->S > (int64_t)UINT16_MAX * RGK_TOPK_RELU_CHUNK || p->KH > UINT16_MAX)
    return "plain: too many keys";
#ifdef REGRAPH_CUDA
  if (!rgk_topk_relu((rg_dtype)p->dtype, relu_heads(p->G), p->D)) return "plain: not in this build";
#endif
  return NULL;
}

/* No bit depends on windows. */
static rgk_topk_scored relu_plan(const rgk_topk *call, void *base, size_t *bytes) {
  const int64_t tile = 2 * RGK_TOPK_RELU_COLUMNS / relu_heads(call->G);
  rgi_cut w = {.base = base};
  rgk_topk_scored p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  p.call = *call;
  p.pitch = (call->S + 3) / 4 * 4;
  p.rows = SCORES / (call->KH * p.pitch * (int64_t)sizeof *p.score) / tile * tile;
  if (p.rows < tile) p.rows = tile;
  if (p.rows > call->T) p.rows = call->T;
  p.score = rgi_take(&w, (size_t)(p.rows * call->KH * p.pitch) * sizeof *p.score);
  *bytes = w.used;
  return p;
}

static rg_status relu_step(const rgk_topk *call, void *workspace, rg_cuda *x) {
  size_t unused;
  rgk_topk_scored p = relu_plan(call, workspace, &unused);
  const int heads = relu_heads(call->G);
  const int64_t window = p.rows;
  for (p.row = 0; p.row < call->T; p.row += window) {
    if (p.rows > call->T - p.row) p.rows = call->T - p.row;
    RGI_TRY(
        x->launch(x, &(rg_launch){.function = rgk_topk_relu((rg_dtype)call->dtype, heads, call->D),
                                  .grid = {rgk_blocks(p.rows, 2 * RGK_TOPK_RELU_COLUMNS / heads) *
                                               (uint32_t)call->KH,
                                           rgk_blocks(call->S, RGK_TOPK_RELU_CHUNK), 1},
                                  .block = {RGK_TOPK_RELU_THREADS, 1, 1},
                                  .shared = RGK_TOPK_RELU_BYTES(call->D),
                                  .params = &p,
                                  .size = sizeof p}));
    RGI_TRY(x->launch(x, &(rg_launch){.function = rgk_topk_rank(),
                                      .grid = {(uint32_t)p.rows, (uint32_t)call->KH, 1},
                                      .block = {RGK_TOPK_RANK_THREADS, 1, 1},
                                      .params = &p,
                                      .size = sizeof p}));
  }
  return RG_OK;
}

/* ---- which take a call ---- */

size_t rgi_cuda_topk_workspace(const rgk_topk *p, bool paged, const rg_gpu *gpu) {
  uint64_t *heap;
  float *sums;
  size_t bytes;
  if (!paged && !relu_refuses(p, NULL, gpu)) {
    relu_plan(p, NULL, &bytes);
    return bytes;
  }
  return plain_workspace(p, gpu, NULL, &heap, &sums);
}

rg_status rgi_cuda_topk_steps(const rgk_topk *p, const rgk_pages *pages, const rg_gpu *gpu,
                              void *workspace, rg_cuda *x) {
  static const int modes[] = {[RGK_TOPK_BY_SOFTMAX] = RGK_TOPK_FAST,
                              [RGK_TOPK_BY_DOT] = RGK_TOPK_DOT,
                              [RGK_TOPK_BY_RELU] = RGK_TOPK_RELU};
  if (!sm90_refuses(p, pages, gpu))
    RGI_TRY(pages ? sm90_paged_step(p, pages, gpu, x) : sm90_step(p, x));
  else if (!mma_refuses(p, pages, gpu))
    RGI_TRY(mma_step(p, x));
  else if (!relu_refuses(p, pages, gpu))
    RGI_TRY(relu_step(p, workspace, x));
  else
    RGI_TRY(plain_step(p, pages, gpu, workspace, x, modes[p->score]));
  return p->score == RGK_TOPK_BY_SOFTMAX ? plain_step(p, pages, gpu, workspace, x, RGK_TOPK_WIDE)
                                         : RG_OK;
}

const char *rgi_cuda_topk_path(const rgk_topk *p, const rgk_pages *pages, const rg_gpu *gpu) {
  const char *why = sm90_refuses(p, pages, gpu);
  if (p->score == RGK_TOPK_BY_RELU) why = relu_refuses(p, pages, gpu);
  if (!why) return "wgmma";
  if (pages) return why;
  why = mma_refuses(p, pages, gpu);
  return why ? why : rgi_hopper(gpu) ? "mma: no wgmma kernel" : "mma: not Hopper";
}
