/* ops/cuda/hopper.h: what the kernels that are made for Hopper ask of every call. */
#ifndef RGI_CUDA_HOPPER_H
#define RGI_CUDA_HOPPER_H

#include <regraph/op.h>

static inline bool rgi_hopper(const rg_gpu *gpu) {
  return gpu->cc == 90;
}

/* Why such a kernel does not take the call, a path's text, or NULL. aligned: tensors start on, and
 * step by, multiples of 16 bytes. */
static inline const char *rgi_hopper_refuses(const rg_gpu *gpu, int32_t dtype, bool aligned) {
  if (!rgi_hopper(gpu)) return "plain: not Hopper";
  if (dtype != RG_BF16 && dtype != RG_F16) return "plain: f32";
  return aligned ? NULL : "plain: a tensor off 16 bytes";
}

#endif
