/* kernels/take.cu: rows by number, and the largest of a row (take.h). */
#include "device/chunk.cuh"
#include "device/fault.cuh"
#include "device/seq.cuh"
#include "take.h"

using namespace rgk;

namespace {

template <class T> __device__ void take_row(const rgk_take &p, int64_t from, int64_t to) {
  for (int64_t i = threadIdx.x; i < p.w.elements; i += RGK_TAKE_THREADS) {
    int64_t x = from * p.x_row, y = to * p.y_row, rest = i;
    for (int a = p.w.rank - 1; a > 0; a--) {
      const int64_t q = divide(rest, p.w.dim[a]), r = rest - q * p.w.dim[a];
      x += r * p.t[0].stride[a], y += r * p.t[1].stride[a];
      rest = q;
    }
    x += rest * p.t[0].stride[0], y += rest * p.t[1].stride[0];
    ((T *)p.t[1].data)[y] = from < 0 ? T() : ((const T *)p.t[0].data)[x];
  }
}

/* The first number that is wrong is named: one block looks at all of them. */
__device__ void look_at_all(const rgk_take &p, int64_t live) {
  __shared__ unsigned long long first;
  if (threadIdx.x == 0) first = ~0ull;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < live; i += RGK_TAKE_THREADS)
    if (p.rows[i] < p.least || p.rows[i] >= p.count) {
      atomicMin(&first, (unsigned long long)i);
      break;
    }
  __syncthreads();
  if (threadIdx.x == 0 && first != ~0ull) report(p.fault, (int32_t)first, p.rows[first]);
}

__global__ void __launch_bounds__(RGK_TAKE_THREADS) take(const __grid_constant__ rgk_take p) {
  const int64_t row = blockIdx.x, live = live_rows(p.seqs);
  if (row == 0) look_at_all(p, live);
  int64_t from = row < live ? p.rows[row] : -1;
  if (from >= p.count) from = -1;
  if (p.unit == 16)
    take_row<uint4>(p, from, row);
  else if (p.unit == 4)
    take_row<uint32_t>(p, from, row);
  else
    take_row<uint16_t>(p, from, row);
}

struct found {
  float value;
  int64_t at; /* -1: nothing */
};
__device__ __forceinline__ found better(found a, found b) {
  if (b.at < 0) return a;
  if (a.at < 0 || b.value > a.value || (b.value == a.value && b.at < a.at)) return b;
  return a;
}

__global__ void __launch_bounds__(RGK_ARGMAX_THREADS)
    find_largest(const __grid_constant__ rgk_argmax p) {
  __shared__ found of_warp[RGK_ARGMAX_THREADS / 32];
  const int64_t row = blockIdx.x;
  if (row >= live_rows(p.seqs)) {
    if (threadIdx.x == 0) p.y[row] = 0;
    return;
  }
  found best = {0, -1};
  for (int64_t i = threadIdx.x; i < p.width; i += RGK_ARGMAX_THREADS) {
    const float x = load(p.x, p.dtype, row * p.x_row + i);
    if (x == x) best = better(best, {x, i});
  }
  for (int d = 16; d > 0; d /= 2)
    best = better(best, {__shfl_xor_sync(~0u, best.value, d), __shfl_xor_sync(~0u, best.at, d)});
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < RGK_ARGMAX_THREADS / 32; w++) best = better(best, of_warp[w]);
  p.y[row] = (int32_t)best.at;
}

} // namespace

const void *rgk_take_rows(void) {
  return (const void *)take;
}
const void *rgk_find_largest(void) {
  return (const void *)find_largest;
}
