/* kernels/session.cu: see session.h. */
#include "session.h"
#include "device/fault.cuh"
#include <cuda_runtime.h>

namespace {

__device__ unsigned long long turn;

__device__ void report(const rgk_lengths_params &p, int rule, int64_t entry, int32_t value) {
  const rgk_fault f = {p.flag, 1 + p.rule[rule].id, 0};
  rgk::report(f, (int32_t)entry, value);
}

/* One block. Starts: each thread owns a stretch of entries; a running maximum is scanned over the
 * threads. */
__global__ void lengths(const __grid_constant__ rgk_lengths_params p) {
  __shared__ int32_t most[RGK_LENGTHS_THREADS];
  const int t = threadIdx.x;
  for (int64_t i = t; i < p.n; i += RGK_LENGTHS_THREADS) p.to[i] = p.from[i];
  for (int r = 0; r < p.nrule; r++) {
    const rgk_lengths_rule &rule = p.rule[r];
    __syncthreads();
    if (!rule.starts) {
      for (int64_t i = t; i < rule.n; i += RGK_LENGTHS_THREADS) {
        int32_t x = p.from[rule.offset + i * rule.stride], y = x < 0 ? 0 : x;
        int64_t length = 0;
        if (p.starts[r] && i + 1 < p.starts_n[r])
          length = (int64_t)p.starts[r][(i + 1) * p.starts_stride[r]] -
                   p.starts[r][i * p.starts_stride[r]];
        if (y + length > 0x7fffffff) y = (int32_t)(0x7fffffff - length);
        if (y != x) report(p, r, i, x);
        p.to[rule.offset + i * rule.stride] = y;
      }
      continue;
    }
    const int64_t each = (rule.n + RGK_LENGTHS_THREADS - 1) / RGK_LENGTHS_THREADS, from = t * each;
    const int64_t end = from + each < rule.n ? from + each : rule.n;
    const int32_t cap = rule.capacity > 0x7fffffff ? 0x7fffffff : (int32_t)rule.capacity;
    int32_t high = 0;
    for (int64_t i = from; i < end; i++) {
      int32_t x = i == 0 ? 0 : p.from[rule.offset + i * rule.stride];
      high = max(high, min(x, cap));
    }
    most[t] = high;
    __syncthreads();
    for (int d = 1; d < RGK_LENGTHS_THREADS; d *= 2) {
      int32_t other = t >= d ? most[t - d] : 0;
      __syncthreads();
      most[t] = max(most[t], other);
      __syncthreads();
    }
    int32_t run = t > 0 ? most[t - 1] : 0;
    for (int64_t i = from; i < end; i++) {
      int32_t x = p.from[rule.offset + i * rule.stride];
      if (i > 0) run = max(run, min(x, cap));
      if (x != run) report(p, r, i, x);
      p.to[rule.offset + i * rule.stride] = run;
    }
  }
}

__global__ void poison(const __grid_constant__ rgk_poison_params p) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < p.bytes / 2;
       i += (int64_t)gridDim.x * blockDim.x)
    p.data[i] = p.pattern;
  if (p.bytes & 1 && blockIdx.x == 0 && threadIdx.x == 0)
    ((uint8_t *)p.data)[p.bytes - 1] = (uint8_t)p.pattern;
}

} // namespace

const void *rgk_lengths(void) {
  return (const void *)lengths;
}
const void *rgk_turn(void) {
  void *at = nullptr;
  return cudaGetSymbolAddress(&at, turn) == cudaSuccess ? at : nullptr;
}
const void *rgk_poison(void) {
  return (const void *)poison;
}
