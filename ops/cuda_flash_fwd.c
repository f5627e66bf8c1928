/* ops/cuda_flash_fwd.c: forward of swa_attn and cmp_attn on Hopper's tensor cores; see
 * kernels/flash_fwd_sm90.cuh. */
#include "../kernels/flash.h"
#include "cuda_attn.h"

#define ROW(D, E, groups, keys) {D, E, groups, keys},
static const struct {
  int32_t D, E, groups, keys;
} instance[] = {RGK_FLASH_INSTANCES(ROW)};

/* A build may lack instances; one without nvcc has none at all and plans as if it had them. */
static int choose(const rgk_attn *a) {
  const bool built = rgk_flash_fwd(RG_BF16, 128, 128) != NULL;
  for (int i = 0; i < RGI_COUNT(instance); i++)
    if (a->D <= instance[i].D && a->E <= instance[i].E &&
        (!built || rgk_flash_fwd((rg_dtype)a->dtype, instance[i].D, instance[i].E)))
      return i;
  return -1;
}

static rgk_flash_shape shape(int i) {
  return rgk_flash_shape_of(instance[i].D, instance[i].E, instance[i].groups, instance[i].keys);
}

static int64_t jobs(const rgk_attn *a, const rgk_flash_shape *s) {
  return rgk_slots(a->T, a->seqs.n, s->rows) * a->H;
}

static const char *refuses(const rgk_attn *a, const rg_gpu *gpu) {
  if (gpu->cc != 90) return "plain: not a Hopper GPU";
  if (a->mode == RGK_SLC) return "plain: selected keys";
  if (a->dtype != RG_BF16 && a->dtype != RG_F16) return "plain: f32";
  if (!a->aligned) return "plain: a tensor off 16 bytes";
  if (a->D <= 0 || a->E <= 0 || a->E % 8 != 0) return "plain: d_v not a multiple of 8";
  if (!(a->scale > 0)) return "plain: scale not positive";
  if (a->T == 0 || a->S == 0 || a->H == 0) return "plain: nothing to do";
  const int i = choose(a);
  if (i < 0) return "plain: heads this wide have no wgmma kernel";
  const rgk_flash_shape s = shape(i);
  if (jobs(a, &s) > INT32_MAX) return "plain: too many tiles";
  return NULL;
}

static size_t workspace(const rgk_attn *a, const rg_gpu *gpu) {
  (void)a, (void)gpu;
  return 0;
}

static rg_status steps(const rgk_attn *a, const rg_gpu *gpu, void *unused, rg_cuda *x) {
  (void)unused;
  const int i = choose(a);
  const rgk_flash_shape s = shape(i);
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
      .H = a->H,
      .G = a->G,
      .E = a->E,
      .kernel = a->kernel,
      .stride = a->stride,
      .jobs = (uint32_t)jobs(a, &s),
      .scale = a->scale,
      .softcap = a->softcap,
  };
  rgk_map_of q = rgk_map_rows(a->q, a->T, a->H, a->D, RGK_FLASH_BOX),
             k = rgk_map_rows(a->k, a->S, a->KH, a->D, s.keys),
             v = rgk_map_rows(a->v, a->S, a->KH, a->E, s.keys);
  RGI_TRY(rgk_map_make(&p.q, &q, x->error));
  RGI_TRY(rgk_map_make(&p.k, &k, x->error));
  RGI_TRY(rgk_map_make(&p.v, &v, x->error));
  const uint32_t blocks = p.jobs < (uint32_t)gpu->sms ? p.jobs : (uint32_t)gpu->sms;
  return x->launch(x, &(rg_launch){.function = rgk_flash_fwd((rg_dtype)a->dtype, s.D, s.E),
                                   .grid = {blocks, 1, 1},
                                   .block = {(uint32_t)s.threads, 1, 1},
                                   .shared = s.shared,
                                   .params = &p,
                                   .size = sizeof p});
}

const rgi_attn_family rgi_attn_flash_fwd = {
    .name = "wgmma", .refuses = refuses, .workspace = workspace, .steps = steps};
