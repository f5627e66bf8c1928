/* ops/cuda/flash_fwd.c: forward of swa_attn and cmp_attn on Hopper's tensor cores; see
 * kernels/attn/flash_fwd_sm90.cuh. */
#include "../../kernels/attn/flash.h"
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

static rg_status steps(const rgk_attn *a, const rg_gpu *gpu, void *unused, rg_cuda *x) {
  (void)unused;
  const int i = choose(a), keys = instance[i].keys, groups = instance[i].groups;
  rgk_flash_params p = {
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
                   k = rgk_map_rows(a->k, a->S, a->KH, a->D, keys),
                   v = rgk_map_rows(a->v, a->S, a->KH, a->E, keys),
                   o = rgk_map_rows(a->o, a->T, a->H, a->E, 16);
  RGI_TRY(rgk_map_make(&p.q, &q, x->error));
  RGI_TRY(rgk_map_make(&p.k, &k, x->error));
  RGI_TRY(rgk_map_make(&p.v, &v, x->error));
  RGI_TRY(rgk_map_make(&p.o_map, &o, x->error));
  const int jobs = p.slots * a->H, D = instance[i].D, E = instance[i].E;
  return x->launch(x, &(rg_launch){.function = kernel(a, i),
                                   .grid = {(uint32_t)(jobs < gpu->sms ? jobs : gpu->sms), 1, 1},
                                   .block = {(uint32_t)(groups + 1) * 128, 1, 1},
                                   .shared = (uint32_t)RGK_FLASH_BYTES(D, E, groups, keys),
                                   .params = &p,
                                   .size = sizeof p});
}

const rgi_attn_family rgi_attn_flash_fwd = {.name = "wgmma",
                                            .modes = RGI_ATTN_DENSE,
                                            .refuses = refuses,
                                            .workspace = workspace,
                                            .steps = steps};
