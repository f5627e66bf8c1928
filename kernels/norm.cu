/* kernels/norm.cu: rmsnorm (norm.h).
 *
 *     r = 1 / sqrt(mean x² + eps)     n = x·r     g = dy·w
 *     y = n·w     dx = r·(g − n·mean(g·n))     dw = Σ over rows dy·n
 *
 * A row's sums: over a lane's elements in order, over lanes pairwise, over warps in order. The backward walks
 * a run of rows per block, the next row's loads under way while this one is worked on, and keeps its columns
 * of dw in registers (chunks past `held`: in its own row of `partial`); a second kernel adds the blocks up.
 */
#include "device/chunk.cuh"
#include "device/seq.cuh"
#include "norm.h"

using namespace rgk;

namespace {

enum { THREADS = RGK_NORM_THREADS, WARPS = THREADS / 32 };

__device__ __forceinline__ int64_t row_at(const rgk_walk &w, int t, int64_t i) {
  int64_t at = 0;
  for (int a = w.rank - 2; a > 0; a--) {
    const int64_t q = divide(i, w.dim[a]);
    at += (i - q * w.dim[a]) * w.stride[t][a];
    i = q;
  }
  return w.rank > 1 ? at + i * w.stride[t][0] : 0;
}

__device__ __forceinline__ int count(const rgk_norm_params &p, int64_t c) {
  return p.width - c < CHUNK ? (int)(p.width - c) : CHUNK;
}

/* Sums of a and b over the row's threads. `turn`: alternates from row to row, so that one barrier is enough. */
__device__ __forceinline__ float2 sum_group(float a, float b, int group, int turn) {
  __shared__ float2 part[2][WARPS];
  a = sum_lanes(a, group < 32 ? group : 32);
  b = sum_lanes(b, group < 32 ? group : 32);
  if (group <= 32) return make_float2(a, b);
  if (threadIdx.x % 32 == 0) part[turn][threadIdx.x / 32] = make_float2(a, b);
  __syncthreads();
  a = b = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) a += part[turn][i].x, b += part[turn][i].y;
  return make_float2(a, b);
}

/* Chunk i of a lane starts at column mine + i·step. */
template <class T, int HELD>
__device__ __forceinline__ void load_row(const rgk_norm_params &p, int t, int64_t row, int64_t mine, int64_t step,
                         chunk<T> (&raw)[HELD]) {
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int64_t c = mine + i * step;
    if (c < p.width) raw[i].load(p.w.data[t], p.w.dtype[t], row + c, count(p, c));
  }
}

/* One chunk of a row, from registers if it is held. */
template <class T, int HELD>
__device__ __forceinline__ void take(const rgk_norm_params &p, int t, int64_t row, int64_t c, const chunk<T> *held, float (&x)[CHUNK]) {
  chunk<T> raw;
  if (held)
    raw = *held;
  else
    raw.load(p.w.data[t], p.w.dtype[t], row + c, count(p, c));
  raw.get(x);
}

/* body(c, chunk index or -1): the held chunks with a constant index, then the others. */
template <int HELD, class F> __device__ __forceinline__ void each(int64_t mine, int64_t step, int64_t width, F body) {
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (mine + i * step < width) body(mine + i * step, i);
  for (int64_t c = mine + HELD * step; c < width; c += step) body(c, -1);
}

template <class T> __device__ __forceinline__ void weights(const rgk_norm_params &p, int64_t c, float (&w)[CHUNK]) {
  chunk<T> raw;
  raw.load(p.weight, p.w.dtype[0], c, count(p, c));
  raw.get(w);
}

template <class T, int HELD> __global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ rgk_norm_params p) {
  const int slot = threadIdx.x / p.group, lane = threadIdx.x - slot * p.group;
  const int64_t row = (int64_t)blockIdx.x * (THREADS / p.group) + slot;
  const int64_t mine = lane * CHUNK, step = (int64_t)p.group * CHUNK;
  const bool exists = row < p.rows, live = exists && row < live_rows(p.seqs) * p.per_token;
  const int64_t at = live ? row_at(p.w, 0, row) : 0, to = exists ? row_at(p.w, 1, row) : 0;
  chunk<T> x[HELD];
  float v[CHUNK], sum = 0;
  if (live) {
    load_row(p, 0, at, mine, step, x);
    each<HELD>(mine, step, p.width, [&](int64_t c, int i) {
      take<T, HELD>(p, 0, at, c, i < 0 ? nullptr : &x[i < 0 ? 0 : i], v);
#pragma unroll
      for (int e = 0; e < CHUNK; e++) sum = __fmaf_rn(v[e], v[e], sum);
    });
  }
  sum = sum_group(sum, 0, p.group, 0).x;
  if (!exists) return;
  const float r = 1.0f / sqrtf(sum / (float)p.width + p.eps);
  each<HELD>(mine, step, p.width, [&](int64_t c, int i) {
    float w[CHUNK];
    zero(v);
    if (live) {
      take<T, HELD>(p, 0, at, c, i < 0 ? nullptr : &x[i < 0 ? 0 : i], v);
#pragma unroll
      for (int e = 0; e < CHUNK; e++) v[e] *= r;
      if (p.weight) {
        weights<T>(p, c, w);
#pragma unroll
        for (int e = 0; e < CHUNK; e++) v[e] *= w[e];
      }
    }
    put<T>(p.w.data[1], p.w.dtype[1], to + c, v, count(p, c), false);
  });
}

/* ---- backward ---- */

/* The rows' shares of dw, [HELD][CHUNK] of each thread, into the block's row of `partial`. */
template <int HELD> __device__ __forceinline__ void put_partial(const rgk_norm_params &p, int64_t mine, int64_t step, float (&dw)[HELD][CHUNK]) {
  extern __shared__ float columns[]; /* [WARPS, width], where several warps have rows of their own */
  float *to = p.partial + (int64_t)blockIdx.x * p.width;
#pragma unroll
  for (int i = 0; i < HELD; i++)
#pragma unroll
    for (int e = 0; e < CHUNK; e++)
      for (int lanes = p.group; lanes < 32; lanes *= 2) dw[i][e] += __shfl_xor_sync(0xffffffffu, dw[i][e], lanes);
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int64_t c = mine + i * step;
    const int n = c < p.width ? count(p, c) : 0;
#pragma unroll
    for (int e = 0; e < CHUNK; e++) {
      if (e >= n) continue;
      if (p.group > 32)
        to[c + e] = dw[i][e];
      else if ((int)(threadIdx.x % 32) < p.group)
        columns[(threadIdx.x / 32) * p.width + c + e] = dw[i][e];
    }
  }
  if (p.group > 32) return;
  __syncthreads();
  for (int64_t c = threadIdx.x; c < p.width; c += THREADS) {
    float sum = 0;
    for (int i = 0; i < WARPS; i++) sum += columns[i * p.width + c];
    to[c] = sum;
  }
}

template <class T, int HELD> __global__ void __launch_bounds__(THREADS) backward(const __grid_constant__ rgk_norm_params p) {
  const int slot = threadIdx.x / p.group, lane = threadIdx.x - slot * p.group, slots = THREADS / p.group;
  const int64_t mine = lane * CHUNK, step = (int64_t)p.group * CHUNK;
  const int64_t first = blockIdx.x * p.per_block, live = live_rows(p.seqs) * p.per_token;
  const int64_t end = first + p.per_block < p.rows ? first + p.per_block : p.rows;
  float *far = p.partial ? p.partial + blockIdx.x * p.width : nullptr; /* dw past the held chunks */
  float dw[HELD][CHUNK] = {};
  chunk<T> x[HELD], dy[HELD];
  for (int64_t c = mine + HELD * step; c < p.width && far; c += step)
    for (int e = 0; e < count(p, c); e++) far[c + e] = 0;
  int64_t row = first + slot;
  int64_t at_x = 0, at_dy = 0;
  if (row < end && row < live) {
    load_row(p, 0, at_x = row_at(p.w, 0, row), mine, step, x);
    load_row(p, 1, at_dy = row_at(p.w, 1, row), mine, step, dy);
  }
  int turn = 0;
  for (int64_t base = first; base < end; base += slots, row += slots, turn ^= 1) { /* all threads in step */
    const bool exists = row < end, alive = exists && row < live, more = row + slots < end && row + slots < live;
    float squares = 0, products = 0;
    chunk<T> next_x[HELD], next_dy[HELD];
    int64_t next_at_x = 0, next_at_dy = 0;
    if (more) {
      load_row(p, 0, next_at_x = row_at(p.w, 0, row + slots), mine, step, next_x);
      load_row(p, 1, next_at_dy = row_at(p.w, 1, row + slots), mine, step, next_dy);
    }
    if (alive)
      each<HELD>(mine, step, p.width, [&](int64_t c, int i) {
        float v[CHUNK], g[CHUNK], w[CHUNK];
        take<T, HELD>(p, 0, at_x, c, i < 0 ? nullptr : &x[i < 0 ? 0 : i], v);
        take<T, HELD>(p, 1, at_dy, c, i < 0 ? nullptr : &dy[i < 0 ? 0 : i], g);
        if (p.weight) {
          weights<T>(p, c, w);
#pragma unroll
          for (int e = 0; e < CHUNK; e++) g[e] *= w[e];
        }
#pragma unroll
        for (int e = 0; e < CHUNK; e++) {
          squares = __fmaf_rn(v[e], v[e], squares);
          products = __fmaf_rn(v[e], g[e], products);
        }
      });
    const float2 sums = sum_group(squares, products, p.group, turn);
    const float r = 1.0f / sqrtf(sums.x / (float)p.width + p.eps);
    const float mean = sums.y * r / (float)p.width; /* of g·n */
    const bool put_dx = exists && p.w.data[2] && (alive || !p.add);
    const int64_t to = put_dx ? row_at(p.w, 2, row) : 0;
    if (alive || put_dx)
      each<HELD>(mine, step, p.width, [&](int64_t c, int i) {
        float v[CHUNK], g[CHUNK], w[CHUNK];
        zero(g);
        if (alive) {
          take<T, HELD>(p, 0, at_x, c, i < 0 ? nullptr : &x[i < 0 ? 0 : i], v);
          take<T, HELD>(p, 1, at_dy, c, i < 0 ? nullptr : &dy[i < 0 ? 0 : i], g);
#pragma unroll
          for (int e = 0; e < CHUNK; e++) v[e] *= r;
          if (i >= 0) {
#pragma unroll
            for (int e = 0; e < CHUNK; e++) dw[i < 0 ? 0 : i][e] = __fmaf_rn(g[e], v[e], dw[i < 0 ? 0 : i][e]);
          } else if (far) {
            const int n = count(p, c);
#pragma unroll
            for (int e = 0; e < CHUNK; e++)
              if (e < n) far[c + e] = __fmaf_rn(g[e], v[e], far[c + e]);
          }
          if (p.weight) {
            weights<T>(p, c, w);
#pragma unroll
            for (int e = 0; e < CHUNK; e++) g[e] *= w[e];
          }
#pragma unroll
          for (int e = 0; e < CHUNK; e++) g[e] = __fmul_rn(r, __fmaf_rn(-v[e], mean, g[e]));
        }
        if (put_dx) put<T>(p.w.data[2], p.w.dtype[2], to + c, g, count(p, c), p.add);
      });
    if (more) {
#pragma unroll
      for (int i = 0; i < HELD; i++) x[i] = next_x[i], dy[i] = next_dy[i];
      at_x = next_at_x, at_dy = next_at_dy;
    }
  }
  if (p.partial) put_partial<HELD>(p, mine, step, dw);
}

__global__ void __launch_bounds__(RGK_NORM_COLUMNS *RGK_NORM_SLICES) sum_partial(const __grid_constant__ rgk_norm_sum_params p) {
  __shared__ float part[RGK_NORM_SLICES][RGK_NORM_COLUMNS];
  const int64_t c = (int64_t)blockIdx.x * RGK_NORM_COLUMNS + threadIdx.x;
  float sum = 0;
  if (c < p.width) {
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < p.n; i += RGK_NORM_SLICES) sum += p.partial[i * p.width + c];
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || c >= p.width) return;
  for (int i = 1; i < RGK_NORM_SLICES; i++) sum += part[i][threadIdx.x];
  put_grad(p.to, p.dtype, c, sum, p.add);
}

} // namespace

const void *rgk_norm_fwd(bool vectors, rg_dtype x, int held) {
  if (!vectors) return held == 1 ? (const void *)forward<void, 1> : (const void *)forward<void, 4>;
  if (x == RG_F32) return held == 1 ? (const void *)forward<float, 1> : (const void *)forward<float, 4>;
  if (x == RG_F16) return held == 1 ? (const void *)forward<__half, 1> : (const void *)forward<__half, 4>;
  return held == 1 ? (const void *)forward<__nv_bfloat16, 1> : (const void *)forward<__nv_bfloat16, 4>;
}
const void *rgk_norm_bwd(bool vectors, rg_dtype x, int held) {
  if (!vectors) return held == 1 ? (const void *)backward<void, 1> : (const void *)backward<void, 4>;
  if (x == RG_F32) return held == 1 ? (const void *)backward<float, 1> : (const void *)backward<float, 4>;
  if (x == RG_F16) return held == 1 ? (const void *)backward<__half, 1> : (const void *)backward<__half, 4>;
  return held == 1 ? (const void *)backward<__nv_bfloat16, 1> : (const void *)backward<__nv_bfloat16, 4>;
}
const void *rgk_norm_sum(void) { return (const void *)sum_partial; }
