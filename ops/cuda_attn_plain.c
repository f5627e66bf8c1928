/* ops/cuda_attn_plain.c: attention of any shape and type on a GPU, without tensor cores. */
#include "cuda_attn.h"

static size_t none(const rgk_attn *a, const rg_gpu *gpu) {
  (void)a, (void)gpu;
  return 0;
}
static rg_status steps(const rgk_attn *a, const rg_gpu *gpu, void *workspace, rg_cuda *x) {
  (void)a, (void)gpu, (void)workspace;
  return rgi_fail(x->error, RG_E_DEVICE, NULL, NULL, "no kernel yet");
}
const rgi_attn_family rgi_attn_plain_fwd = {.name = "plain", .workspace = none, .steps = steps};
const rgi_attn_family rgi_attn_plain_bwd = {.name = "plain", .workspace = none, .steps = steps};
