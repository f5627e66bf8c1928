/* device/element.cuh: storage types: loads and stores through float, 16 bytes at a time where they
 * fit. */
#pragma once
#include "../kernels.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <type_traits>

namespace rgk {

template <rg_dtype> struct element;
template <> struct element<RG_F32> { using type = float; };
template <> struct element<RG_F16> { using type = __half; };
template <> struct element<RG_BF16> { using type = __nv_bfloat16; };

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/* Element i of memory of a type known at run time. */
__device__ __forceinline__ float load(const void *p, int dtype, int64_t i) {
  if (dtype == RG_F32) return ((const float *)p)[i];
  if (dtype == RG_F16) return __half2float(((const __half *)p)[i]);
  return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}
__device__ __forceinline__ void store(void *p, int dtype, int64_t i, float x) {
  if (dtype == RG_F32)
    ((float *)p)[i] = x;
  else if (dtype == RG_F16)
    ((__half *)p)[i] = __float2half_rn(x);
  else
    ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(x);
}
/* A gradient's value: added to the fp32 sum that is there, or overwriting. */
__device__ __forceinline__ void put_grad(void *p, int dtype, int64_t i, float x, bool add) {
  if (add)
    ((float *)p)[i] = __fadd_rn(((float *)p)[i], x); /* not fused with what made x: x is one term */
  else
    store(p, dtype, i, x);
}

} // namespace rgk
