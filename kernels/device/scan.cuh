/* device/scan.cuh: running maxima of a warp. */
#pragma once
#include <cuda_runtime.h>

namespace rgk {

/* The largest x of this lane and those before it. */
__device__ __forceinline__ int prefix_max(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    int y = __shfl_up_sync(~0u, x, d);
    if (lane >= d) x = max(x, y);
  }
  return x;
}

} // namespace rgk
