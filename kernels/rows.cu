/* kernels/rows.cu: elementwise ops over walks (rows.h).

   An element's index in the walk says where it lies in every tensor and whether its row is live.
   Threads take a chunk of eight, all loads before the first use, or one element each where memory
   is not laid out for 16-byte vectors; elements do not depend on each other, so both give the same
   bits. Dead rows: zeros, or nothing where the output is a sum. y may be x: each thread reads its
   elements before it writes them.
 */
#include "device/chunk.cuh"
#include "device/ptx.cuh"
#include "device/seq.cuh"
#include "rows.h"

using namespace rgk;

namespace {

enum { THREADS = 256 };

/* Offsets of element i of the walk in N tensors. */
template <int N>
__device__ __forceinline__ void walk_at(const rgk_walk &w, const rgk_walked *x, int64_t i,
                                        int64_t (&at)[N]) {
#pragma unroll
  for (int t = 0; t < N; t++) at[t] = 0;
  for (int a = w.rank - 1; a > 0; a--) {
    const int64_t q = divide(i, w.dim[a]), rest = i - q * w.dim[a];
#pragma unroll
    for (int t = 0; t < N; t++) at[t] += rest * x[t].stride[a];
    i = q;
  }
#pragma unroll
  for (int t = 0; t < N; t++) at[t] += i * x[t].stride[0];
}

/* e^-x, at most 2^126, so that 1 / (1 + it) is no denormal. */
__device__ __forceinline__ float exp_minus(float x) {
  return exp2_fast(fminf(x * -LOG2E, 126.0f));
}
__device__ __forceinline__ float inverse(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

template <int MAP>
constexpr int inputs =
    MAP == RGK_FILL                                                               ? 0
    : MAP == RGK_COPY || MAP == RGK_SILU || MAP == RGK_SIGMOID || MAP == RGK_RELU ? 1
    : MAP == RGK_MUL_BWD                                                          ? 3
                                                                                  : 2;
template <int MAP> constexpr int outputs = MAP == RGK_MUL_BWD ? 2 : 1;

template <int MAP> __device__ __forceinline__ void apply(const float *x, float *y, float value) {
  if (MAP == RGK_FILL) y[0] = value;
  if (MAP == RGK_COPY) y[0] = x[0];
  if (MAP == RGK_MUL) y[0] = __fmul_rn(x[0], x[1]);
  if (MAP == RGK_MUL_BWD) {
    y[0] = __fmul_rn(x[2], x[1]);
    y[1] = __fmul_rn(x[2], x[0]);
  }
  if (MAP == RGK_SILU) y[0] = __fmul_rn(x[0], inverse(1.0f + exp_minus(x[0])));
  /* dy·s·(1 + x·(1 - s)), 1 - s formed as e^-x·s: exact where s is near 1 */
  if (MAP == RGK_SILU_BWD) {
    const float e = exp_minus(x[0]), s = inverse(1.0f + e);
    y[0] = __fmul_rn(__fmul_rn(x[1], s), __fmaf_rn(x[0], __fmul_rn(e, s), 1.0f));
  }
  if (MAP == RGK_SIGMOID) y[0] = inverse(1.0f + exp_minus(x[0]));
  if (MAP == RGK_RELU) y[0] = value * x[0] <= 0 ? 0.0f : x[0];
  if (MAP == RGK_RELU_BWD) y[0] = value * x[0] <= 0 ? 0.0f : x[1];
  if (MAP == RGK_SIGMOID_BWD) {
    const float e = exp_minus(x[0]), s = inverse(1.0f + e);
    y[0] = __fmul_rn(__fmul_rn(x[1], s), __fmul_rn(e, s));
  }
}

template <int MAP> __device__ void one(const rgk_map_params &p, int64_t i, int64_t live) {
  constexpr int IN = inputs<MAP>, OUT = outputs<MAP>;
  int64_t at[IN + OUT];
  float x[IN + 1], y[OUT] = {};
  walk_at(p.w, p.t, i, at);
  if (i < live) {
#pragma unroll
    for (int t = 0; t < IN; t++) x[t] = load(p.t[t].data, p.t[t].dtype, at[t]);
    apply<MAP>(x, y, p.value);
  }
#pragma unroll
  for (int t = 0; t < OUT; t++)
    if (i < live || !p.add[t])
      put_grad(p.t[IN + t].data, p.t[IN + t].dtype, at[IN + t], y[t], p.add[t]);
}

template <int MAP, class T>
__global__ void __launch_bounds__(THREADS) map(const __grid_constant__ rgk_map_params p) {
  constexpr int IN = inputs<MAP>, OUT = outputs<MAP>;
  const int64_t n = p.w.elements, live = live_rows(p.seqs) * p.row;
  int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
  if constexpr (std::is_void_v<T>) {
    if (i < n) one<MAP>(p, i, live);
  } else {
    i *= CHUNK;
    const int64_t end = i + CHUNK;
    if (i >= n) return;
    if (end > n || (i < live && end > live)) {
      for (; i < end && i < n; i++) one<MAP>(p, i, live);
      return;
    }
    if constexpr (MAP == RGK_FILL) {
      const int64_t lane = threadIdx.x % 32, first = i - lane * CHUNK; /* of the warp */
      /* whole sectors per store */
      if (p.w.rank == 1 && p.t[0].dtype == RG_F32 && first + 32 * CHUNK <= n) {
        float4 *to = reinterpret_cast<float4 *>((float *)p.t[0].data + first) + lane;
        to[0] = to[32] = make_float4(p.value, p.value, p.value, p.value);
        return;
      }
    }
    int64_t at[IN + OUT];
    float x[IN + 1][CHUNK], y[OUT][CHUNK];
    chunk<T> raw[IN + 1];
    walk_at(p.w, p.t, i, at);
    if (i < live) {
#pragma unroll
      for (int t = 0; t < IN; t++) raw[t].load(p.t[t].data, 0, at[t], CHUNK);
#pragma unroll
      for (int t = 0; t < IN; t++) raw[t].get(x[t]);
#pragma unroll
      for (int k = 0; k < CHUNK; k++) {
        float from[IN + 1], to[OUT];
#pragma unroll
        for (int t = 0; t < IN; t++) from[t] = x[t][k];
        apply<MAP>(from, to, p.value);
#pragma unroll
        for (int t = 0; t < OUT; t++) y[t][k] = to[t];
      }
    } else {
#pragma unroll
      for (int t = 0; t < OUT; t++) zero(y[t]);
    }
#pragma unroll
    for (int t = 0; t < OUT; t++)
      if (i < live || !p.add[t])
        put<T>(p.t[IN + t].data, p.t[IN + t].dtype, at[IN + t], y[t], CHUNK, p.add[t]);
  }
}

/* ---- sums of many ---- */

enum { ABREAST = 4 }; /* summands loaded at once */

__device__ void add_one(const rgk_add_params &p, int64_t i, int64_t live) {
  bool first = !p.start;
  float sum = 0;
  int64_t at[1];
  if (i < live) {
    if (p.start) sum = p.start[i];
    for (int k = 1; k < p.w.n; k++, first = false) {
      walk_at(p.w, p.t + k, i, at);
      const float x = load(p.t[k].data, p.t[k].dtype, at[0]);
      sum = first ? x : sum + x;
    }
  }
  walk_at(p.w, p.t, i, at);
  store(p.t[0].data, p.t[0].dtype, at[0], sum);
}

template <class T>
__global__ void __launch_bounds__(THREADS) add(const __grid_constant__ rgk_add_params p) {
  const int64_t n = p.w.elements, live = live_rows(p.seqs) * p.row;
  int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
  if constexpr (std::is_void_v<T>) {
    if (i < n) add_one(p, i, live);
  } else {
    i *= CHUNK;
    const int64_t end = i + CHUNK;
    if (i >= n) return;
    if (end > n || (i < live && end > live)) {
      for (; i < end && i < n; i++) add_one(p, i, live);
      return;
    }
    float sum[CHUNK], x[CHUNK];
    bool first = !p.start;
    zero(sum);
    if (p.start && i < live) {
      chunk<float> raw;
      raw.load(p.start, 0, i, CHUNK);
      raw.get(sum);
    }
    for (int k = 1; k < p.w.n && i < live; k += ABREAST) {
      int64_t at[ABREAST];
      chunk<T> raw[ABREAST];
      walk_at(p.w, p.t + k, i, at);
#pragma unroll
      for (int j = 0; j < ABREAST; j++)
        if (k + j < p.w.n) raw[j].load(p.t[k + j].data, 0, at[j], CHUNK);
#pragma unroll
      for (int j = 0; j < ABREAST; j++) {
        if (k + j >= p.w.n) continue;
        raw[j].get(x);
#pragma unroll
        for (int e = 0; e < CHUNK; e++) sum[e] = first ? x[e] : sum[e] + x[e];
        first = false;
      }
    }
    int64_t at[1];
    walk_at(p.w, p.t, i, at);
    put<T>(p.t[0].data, p.t[0].dtype, at[0], sum, CHUNK, false);
  }
}

__global__ void __launch_bounds__(THREADS)
    scale_lengths(const __grid_constant__ rgk_scale_lengths_params p) {
  const int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
  if (i >= p.n) return;
  const int64_t start = (int64_t)p.from[i] * p.times / p.divisor;
  p.to[i] = start < p.rows ? (int32_t)start : p.rows;
}

template <int MAP> const void *map_of(bool vectors, rg_dtype x) {
  if (!vectors) return (const void *)map<MAP, void>;
  if (x == RG_F32) return (const void *)map<MAP, float>;
  if (inputs<MAP> == 0) return (const void *)map<MAP, float>; /* no type of its own */
  if (x == RG_F16) return (const void *)map<MAP, __half>;
  return (const void *)map<MAP, __nv_bfloat16>;
}

} // namespace

const void *rgk_map_kernel(rgk_map m, bool vectors, rg_dtype x) {
  switch (m) {
  case RGK_FILL: return map_of<RGK_FILL>(vectors, RG_F32);
  case RGK_COPY: return map_of<RGK_COPY>(vectors, x);
  case RGK_MUL: return map_of<RGK_MUL>(vectors, x);
  case RGK_MUL_BWD: return map_of<RGK_MUL_BWD>(vectors, x);
  case RGK_SILU: return map_of<RGK_SILU>(vectors, x);
  case RGK_SILU_BWD: return map_of<RGK_SILU_BWD>(vectors, x);
  case RGK_SIGMOID: return map_of<RGK_SIGMOID>(vectors, x);
  case RGK_RELU: return map_of<RGK_RELU>(vectors, x);
  case RGK_RELU_BWD: return map_of<RGK_RELU_BWD>(vectors, x);
  default: return map_of<RGK_SIGMOID_BWD>(vectors, x);
  }
}

const void *rgk_add_kernel(bool vectors, rg_dtype x) {
  if (!vectors) return (const void *)add<void>;
  if (x == RG_F32) return (const void *)add<float>;
  if (x == RG_F16) return (const void *)add<__half>;
  return (const void *)add<__nv_bfloat16>;
}

const void *rgk_scale_lengths(void) {
  return (const void *)scale_lengths;
}
