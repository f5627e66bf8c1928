/* kernels/rows.cu: elementwise and row-wise ops. */
#include "device/element.cuh"
#include "rows.h"

using namespace rgk;

namespace {

/* Offset of element i of the walk in tensor t. */
__device__ __forceinline__ int64_t walk_at(const rgk_walk &w, int t, int64_t i) {
  int64_t at = 0;
  for (int a = w.rank - 1; a > 0; a--) {
    int64_t q = i / w.dim[a];
    at += (i - q * w.dim[a]) * w.stride[t][a];
    i = q;
  }
  return at + i * w.stride[t][0];
}

__global__ void fill(const __grid_constant__ rgk_fill_params p) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < p.w.elements;
       i += (int64_t)gridDim.x * blockDim.x)
    store(p.w.data[0], p.w.dtype[0], walk_at(p.w, 0, i), p.value);
}

} // namespace

const void *rgk_fill(void) { return (const void *)fill; }
