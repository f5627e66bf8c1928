/* ops/cuda/mma_fwd.c: forward of attention on the tensor cores of any GPU since Ampere
 * (kernels/attn/mma.h): which shapes it takes, and the launch. */
#include "attn_mma.h"

static const int64_t KEPT = INT64_C(20) << 20; /* bytes of K and V that surely stay in L2 */

#define ROW(D, E) {D, E, rgk_mma_fwd_##D},
static const struct {
  int32_t D, E;
  const void *(*get)(rg_dtype type, int shape, bool selected);
} instance[] = {RGK_MMA_WIDTHS(ROW)};

static int shape_of(const rgk_attn *a, const rg_gpu *gpu, int i) {
  if (a->mode == RGK_SLC) return a->G > rgk_mma_rows(RGK_MMA_ONE) ? RGK_MMA_SMALL : RGK_MMA_ONE;
  return rgi_cuda_attn_little_shared(gpu) || instance[i].D > 192 ? RGK_MMA_SMALL : RGK_MMA_LARGE;
}

static const void *kernel(const rgk_attn *a, const rg_gpu *gpu, int i) {
  return instance[i].get((rg_dtype)a->dtype, shape_of(a, gpu, i), a->mode == RGK_SLC);
}

/* A build may lack instances; one without nvcc has none at all and plans as if it had them. */
static int choose(const rgk_attn *a, const rg_gpu *gpu) {
  const bool built = rgk_mma_fwd_128(RG_BF16, RGK_MMA_LARGE, false) != NULL;
  for (int i = 0; i < RGI_COUNT(instance); i++)
    if (a->D <= instance[i].D && a->E <= instance[i].E && (!built || kernel(a, gpu, i))) return i;
  return -1;
}

/* Dense: the least number of parts that fills most rows. Selected blocks: whole groups, since what
 * one query chose is of no use to another. */
static void share_rows(rgk_mma *p, int32_t rows) {
  const int32_t G = p->a.G, first = (G + rows - 1) / rows;
  int32_t best = 0;
  for (int32_t parts = first; parts <= G && (parts == first || p->a.mode != RGK_SLC); parts++) {
    const int32_t heads = (G + parts - 1) / parts, queries = rows / heads,
                  filled = queries * G * 64 / parts;
    if (filled <= best) continue;
    best = filled;
    p->parts = parts, p->heads = heads, p->queries = queries;
  }
  p->by_heads = rgk_divide_by(p->heads);
}

rgk_mma rgi_attn_mma_teams(const rgk_attn *a, int shape) {
  rgk_mma p = {.a = *a, .key_parts = 1};
  share_rows(&p, rgk_mma_rows(shape));
  p.slots = (int32_t)rgk_slots(a->T, a->seqs.n, p.queries);
  p.side = a->KH * p.parts;
  if (a->mode == RGK_SLC) {
    p.key_parts = (a->block - 1) / rgk_mma_keys(shape) + 1;
    /* as many heads at once as L2 holds */
    const int64_t most = KEPT / (a->S * (a->D + a->E) * 2 + 1);
    while (p.side > 1 && (p.side > most || a->KH * p.parts % p.side != 0)) p.side--;
  }
  return p;
}

bool rgi_attn_mma_counts(const rgk_attn *a) {
  return a->S <= INT32_MAX / 2 && (a->T + a->seqs.n + 1) * a->H <= INT32_MAX / 2;
}

static const char *refuses(const rgk_attn *a, const rg_gpu *gpu) {
  if (gpu->cc < 80) return "plain: older than Ampere";
  if (a->dtype != RG_BF16 && a->dtype != RG_F16) return "plain: f32";
  if (!a->aligned) return "plain: a tensor off 16 bytes";
  if (a->D <= 0 || a->E <= 0 || a->D % 8 != 0 || a->E % 8 != 0)
    return "plain: heads not a multiple of 8 wide";
  if (!(a->scale > 0)) return "plain: scale not positive";
  if (a->T == 0 || a->S == 0 || a->H == 0) return "plain: nothing to do";
  if (!rgi_attn_mma_counts(a)) return "plain: too many rows";
  if (choose(a, gpu) < 0) return "plain: heads this wide have no mma kernel";
  return NULL;
}

static rg_status steps(const rgk_attn *a, const rg_gpu *gpu, void *unused, rg_cuda *x) {
  (void)unused;
  const int i = choose(a, gpu), shape = shape_of(a, gpu, i);
  const int32_t D = instance[i].D, E = instance[i].E;
  const rgk_mma p = rgi_attn_mma_teams(a, shape);
  const int64_t groups = (p.slots - 1) / rgk_mma_teams(shape, D) + 1;
  return x->launch(x, &(rg_launch){.function = kernel(a, gpu, i),
                                   .grid = {(uint32_t)(groups * a->KH * p.parts), 1, 1},
                                   .block = {(uint32_t)rgk_mma_threads(shape, D), 1, 1},
                                   .shared = rgk_mma_shared(shape, a->mode == RGK_SLC, D, E),
                                   .params = &p,
                                   .size = sizeof p});
}

const rgi_attn_family rgi_attn_mma_fwd = {
    .name = "mma", .modes = RGI_ATTN_DENSE | RGI_ATTN_SELECTED, .refuses = refuses, .steps = steps};
