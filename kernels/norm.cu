/* kernels/norm.cu: rmsnorm, then layernorm (norm.h).

       r = 1 / sqrt(mean x² + eps)     n = x·r     g = dy·w
       y = n·w     dx = r·(g − n·mean(g·n))     dw = Σ over rows dy·n

   A row's sums: over a lane's elements in order, over lanes pairwise, over warps in order. The
   backward walks a run of rows per block, the next rows' copies to shared memory under way while
   one is worked on, and keeps its columns of dw in registers (chunks past `held`: in its own row of
   `partial`); a second kernel adds the blocks up.

       layernorm: m = mean x, r = 1 / sqrt(mean (x − m)² + eps), n = (x − m)·r
       y = n·w + b     dx = r·(g − mean g − n·mean(g·n))     db = Σ over rows dy

   Plain: a warp reads its row once for the mean, once for the squares, once to write.
 */
#include "device/chunk.cuh"
#include "device/ptx.cuh"
#include "device/seq.cuh"
#include "norm.h"

using namespace rgk;

namespace {

enum { THREADS = RGK_NORM_THREADS, WARPS = THREADS / 32 };

__device__ __forceinline__ int64_t row_at(const rgk_walk &w, const rgk_walked &x, int64_t i) {
  int64_t at = 0;
  for (int a = w.rank - 2; a > 0; a--) {
    const int64_t q = divide(i, w.dim[a]);
    at += (i - q * w.dim[a]) * x.stride[a];
    i = q;
  }
  return w.rank > 1 ? at + i * x.stride[0] : 0;
}

__device__ __forceinline__ int count(const rgk_norm_params &p, int64_t c) {
  return p.width - c < CHUNK ? (int)(p.width - c) : CHUNK;
}

/* Sums of a and b over the row's threads. `turn`: alternates from row to row, so that one barrier
 * is enough. */
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
__device__ __forceinline__ void load_row(const rgk_norm_params &p, int t, int64_t row, int64_t mine,
                                         int64_t step, chunk<T> (&raw)[HELD]) {
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int64_t c = mine + i * step;
    if (c < p.width) raw[i].load(p.t[t].data, p.t[t].dtype, row + c, count(p, c));
  }
}

/* One chunk of a row, from registers if it is held. */
template <class T, int HELD>
__device__ __forceinline__ void take(const rgk_norm_params &p, int t, int64_t row, int64_t c,
                                     const chunk<T> *held, float (&x)[CHUNK]) {
  chunk<T> raw;
  if (held)
    raw = *held;
  else
    raw.load(p.t[t].data, p.t[t].dtype, row + c, count(p, c));
  raw.get(x);
}

/* body(c, chunk index or -1): the held chunks with a constant index, then the others. */
template <int HELD, class F>
__device__ __forceinline__ void each(int64_t mine, int64_t step, int64_t width, F body) {
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (mine + i * step < width) body(mine + i * step, i);
  for (int64_t c = mine + HELD * step; c < width; c += step) body(c, -1);
}

template <class T>
__device__ __forceinline__ void weights(const rgk_norm_params &p, int64_t c, float (&w)[CHUNK]) {
  chunk<T> raw;
  raw.load(p.weight, p.t[0].dtype, c, count(p, c));
  raw.get(w);
}

/* Rows slot, slot + slots, … of a block's run, loads of all of them first. */
template <class T, int HELD, int ROWS>
__global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ rgk_norm_params p) {
  const int slot = threadIdx.x / p.group, lane = threadIdx.x - slot * p.group,
            slots = THREADS / p.group;
  const int64_t first = (int64_t)blockIdx.x * slots * ROWS + slot;
  const int64_t mine = lane * CHUNK, step = (int64_t)p.group * CHUNK,
                live = live_rows(p.seqs) * p.per_token;
  chunk<T> x[ROWS][HELD];
  int64_t at[ROWS];
#pragma unroll
  for (int k = 0; k < ROWS; k++) {
    const int64_t row = first + k * slots;
    if (row < p.rows && row < live)
      load_row(p, 0, at[k] = row_at(p.w, p.t[0], row), mine, step, x[k]);
  }
#pragma unroll
  for (int k = 0; k < ROWS; k++) {
    const int64_t row = first + k * slots;
    const bool exists = row < p.rows, alive = exists && row < live;
    float v[CHUNK], sum = 0;
    if (alive)
      each<HELD>(mine, step, p.width, [&](int64_t c, int i) {
        take<T, HELD>(p, 0, at[k], c, i < 0 ? nullptr : &x[k][i < 0 ? 0 : i], v);
#pragma unroll
        for (int e = 0; e < CHUNK; e++) sum = __fmaf_rn(v[e], v[e], sum);
      });
    sum = sum_group(sum, 0, p.group, k % 2).x;
    if (!exists) continue;
    const float r = rsqrtf(__fmaf_rn(sum, p.per_width, p.eps));
    const int64_t to = row_at(p.w, p.t[1], row);
    each<HELD>(mine, step, p.width, [&](int64_t c, int i) {
      float w[CHUNK];
      zero(v);
      if (alive) {
        take<T, HELD>(p, 0, at[k], c, i < 0 ? nullptr : &x[k][i < 0 ? 0 : i], v);
#pragma unroll
        for (int e = 0; e < CHUNK; e++) v[e] *= r;
        if (p.weight) {
          weights<T>(p, c, w);
#pragma unroll
          for (int e = 0; e < CHUNK; e++) v[e] *= w[e];
        }
      }
      put<T>(p.t[1].data, p.t[1].dtype, to + c, v, count(p, c), false);
    });
  }
}

/* ---- backward ---- */

/* The rows' shares of dw, [HELD][CHUNK] of each thread, into the block's row of `partial`. */
template <int HELD>
__device__ __forceinline__ void put_partial(const rgk_norm_params &p, int64_t mine, int64_t step,
                                            float (&dw)[HELD][CHUNK]) {
  extern __shared__ uint4 shared[];
  /* [WARPS, width], where warps have rows of their own */
  float *columns = reinterpret_cast<float *>(shared);
  float *to = p.partial + (int64_t)blockIdx.x * p.width;
  __syncthreads(); /* the rows' stages are done with */
#pragma unroll
  for (int i = 0; i < HELD; i++)
#pragma unroll
    for (int e = 0; e < CHUNK; e++)
      for (int lanes = p.group; lanes < 32; lanes *= 2)
        dw[i][e] += __shfl_xor_sync(0xffffffffu, dw[i][e], lanes);
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

/* Rows under way: a thread's chunks of x and dy are copied to shared memory ahead of their turn,
 * and read by that thread alone, so no barrier is needed. [STAGES][x, dy][HELD][16-byte
 * parts][THREADS] */
template <class T, int HELD> struct stages {
  static constexpr int PARTS = sizeof(T) / 2, ROW = 2 * HELD * PARTS,
                       AHEAD = RGK_NORM_STAGES(HELD, sizeof(T));

  __device__ static void start(const rgk_norm_params &p, int stage, bool wanted,
                               const int64_t (&at)[2], int64_t mine, int64_t step) {
    extern __shared__ uint4 shared[];
    const uint32_t base = smem_at(shared + stage * ROW * THREADS + threadIdx.x);
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int i = 0; i < HELD; i++) {
        const int64_t c = mine + i * step;
        if (!wanted || c >= p.width) continue;
        const T *from = (const T *)p.t[t].data + at[t] + c;
#pragma unroll
        for (int q = 0; q < PARTS; q++)
          copy16(base + (uint32_t)(((t * HELD + i) * PARTS + q) * THREADS * 16),
                 from + q * (16 / sizeof(T)));
      }
    copies_commit();
  }
  __device__ static void wait() {
    copies_wait<AHEAD - 1>();
  }
  __device__ static void get(int stage, int t, int i, float (&x)[CHUNK]) {
    extern __shared__ uint4 shared[];
    chunk<T> raw;
#pragma unroll
    for (int q = 0; q < PARTS; q++)
      raw.q[q] = shared[(stage * ROW + (t * HELD + i) * PARTS + q) * THREADS + threadIdx.x];
    raw.get(x);
  }
};
template <int HELD> struct stages<void, HELD> { /* none: chunks are read when needed */
  static constexpr int AHEAD = 1;
  __device__ static void start(const rgk_norm_params &, int, bool, const int64_t (&)[2], int64_t,
                               int64_t) {}
  __device__ static void wait() {}
  __device__ static void get(int, int, int, float (&)[CHUNK]) {}
};

/* Chunk i (-1: not held) of x (t 0) or dy (t 1). */
template <class T, int HELD>
__device__ __forceinline__ void get(const rgk_norm_params &p, int stage, int t, int i, int64_t at,
                                    float (&x)[CHUNK], int64_t c) {
  if (!std::is_void_v<T> && i >= 0) {
    stages<T, HELD>::get(stage, t, i, x);
  } else {
    chunk<T> raw;
    raw.load(p.t[t].data, p.t[t].dtype, at + c, count(p, c));
    raw.get(x);
  }
}

template <class T, int HELD>
__global__ void __launch_bounds__(THREADS) backward(const __grid_constant__ rgk_norm_params p) {
  constexpr int AHEAD = stages<T, HELD>::AHEAD;
  const int slot = threadIdx.x / p.group, lane = threadIdx.x - slot * p.group,
            slots = THREADS / p.group;
  const int64_t mine = lane * CHUNK, step = (int64_t)p.group * CHUNK;
  const int64_t first = blockIdx.x * p.per_block, live = live_rows(p.seqs) * p.per_token;
  const int64_t end = first + p.per_block < p.rows ? first + p.per_block : p.rows;
  float *far = p.partial ? p.partial + blockIdx.x * p.width : nullptr; /* dw past the held chunks */
  float dw[HELD][CHUNK] = {}, kept[CHUNK]; /* kept: the weights, where a thread has one chunk */
  for (int64_t c = mine + HELD * step; c < p.width && far; c += step)
    for (int e = 0; e < count(p, c); e++) far[c + e] = 0;
  if (HELD == 1 && p.weight && mine < p.width) weights<T>(p, mine, kept);
  const auto scale = [&](float(&g)[CHUNK], int64_t c, int i) {
    float w[CHUNK];
    if (!p.weight) return;
    if (HELD > 1 || i < 0) weights<T>(p, c, w);
#pragma unroll
    for (int e = 0; e < CHUNK; e++) g[e] *= HELD > 1 || i < 0 ? w[e] : kept[e];
  };
  const auto start = [&](int stage, int64_t row) {
    const bool wanted = row < end && row < live;
    const int64_t at[2] = {wanted ? row_at(p.w, p.t[0], row) : 0,
                           wanted ? row_at(p.w, p.t[1], row) : 0};
    stages<T, HELD>::start(p, stage, wanted, at, mine, step);
  };
  int64_t row = first + slot;
#pragma unroll
  for (int s = 0; s < AHEAD - 1; s++) start(s, row + s * slots);
  int stage = 0, turn = 0;
  /* all threads in step */
  for (int64_t base = first; base < end; base += slots, row += slots, turn ^= 1) {
    const bool exists = row < end, alive = exists && row < live;
    const bool put_dx = exists && p.t[2].data && (alive || !p.add);
    const int64_t x = alive ? row_at(p.w, p.t[0], row) : 0,
                  dy = alive ? row_at(p.w, p.t[1], row) : 0;
    float squares = 0, products = 0;
    start(stage ? stage - 1 : AHEAD - 1, row + (AHEAD - 1) * slots);
    stages<T, HELD>::wait();
    if (alive)
      each<HELD>(mine, step, p.width, [&](int64_t c, int i) {
        float v[CHUNK], g[CHUNK];
        get<T, HELD>(p, stage, 0, i, x, v, c);
        get<T, HELD>(p, stage, 1, i, dy, g, c);
        scale(g, c, i);
#pragma unroll
        for (int e = 0; e < CHUNK; e++) {
          squares = __fmaf_rn(v[e], v[e], squares);
          products = __fmaf_rn(v[e], g[e], products);
        }
      });
    const float2 sums = sum_group(squares, products, p.group, turn);
    const float r = rsqrtf(__fmaf_rn(sums.x, p.per_width, p.eps));
    const float mean = __fmul_rn(__fmul_rn(sums.y, r), p.per_width); /* of g·n */
    const int64_t to = put_dx ? row_at(p.w, p.t[2], row) : 0;
    if (alive || put_dx)
      each<HELD>(mine, step, p.width, [&](int64_t c, int i) {
        float v[CHUNK], g[CHUNK];
        zero(g);
        if (alive) {
          get<T, HELD>(p, stage, 0, i, x, v, c);
          get<T, HELD>(p, stage, 1, i, dy, g, c);
#pragma unroll
          for (int e = 0; e < CHUNK; e++) v[e] = __fmul_rn(v[e], r);
          if (i >= 0) {
#pragma unroll
            for (int e = 0; e < CHUNK; e++)
              dw[i < 0 ? 0 : i][e] = __fmaf_rn(g[e], v[e], dw[i < 0 ? 0 : i][e]);
          } else if (far) {
            const int n = count(p, c);
#pragma unroll
            for (int e = 0; e < CHUNK; e++)
              if (e < n) far[c + e] = __fmaf_rn(g[e], v[e], far[c + e]);
          }
          scale(g, c, i);
#pragma unroll
          for (int e = 0; e < CHUNK; e++) g[e] = __fmul_rn(r, __fmaf_rn(-v[e], mean, g[e]));
        }
        if (put_dx) put<T>(p.t[2].data, p.t[2].dtype, to + c, g, count(p, c), p.add);
      });
    stage = stage + 1 == AHEAD ? 0 : stage + 1;
  }
  if (p.partial) put_partial<HELD>(p, mine, step, dw);
}

__global__ void __launch_bounds__(RGK_NORM_COLUMNS *RGK_NORM_SLICES)
    sum_partial(const __grid_constant__ rgk_norm_sum_params p) {
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

/* ---- layernorm ---- */

/* f(column) for each of a lane's columns. */
template <class F> __device__ __forceinline__ void columns_of(const rgk_layer_params &p, F f) {
  for (int64_t c = threadIdx.x % 32; c < p.width; c += 32) f(c);
}

__device__ __forceinline__ float element(const rgk_walked &x, int64_t row, int64_t c) {
  return load(x.data, x.dtype, row + c);
}

/* Mean and r of the row at `at`; all lanes of the warp. */
__device__ __forceinline__ float2 stats_of(const rgk_layer_params &p, int64_t at) {
  float sum = 0, squares = 0;
  columns_of(p, [&](int64_t c) { sum += element(p.t[0], at, c); });
  const float mean = __fmul_rn(sum_lanes(sum, 32), p.per_width);
  columns_of(p, [&](int64_t c) {
    const float d = element(p.t[0], at, c) - mean;
    squares = __fmaf_rn(d, d, squares);
  });
  return make_float2(mean, rsqrtf(__fmaf_rn(sum_lanes(squares, 32), p.per_width, p.eps)));
}

__device__ __forceinline__ float weight_of(const rgk_layer_params &p, int64_t c) {
  return p.weight ? load(p.weight, p.t[0].dtype, c) : 1.0f;
}

__global__ void __launch_bounds__(THREADS)
    layer_forward(const __grid_constant__ rgk_layer_params p) {
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32,
                live = live_rows(p.seqs) * p.per_token;
  if (row >= p.rows) return;
  const int64_t to = row_at(p.w, p.t[1], row);
  if (row >= live) {
    columns_of(p, [&](int64_t c) { store(p.t[1].data, p.t[1].dtype, to + c, 0.0f); });
    return;
  }
  const int64_t at = row_at(p.w, p.t[0], row);
  const float2 s = stats_of(p, at);
  columns_of(p, [&](int64_t c) {
    const float n = __fmul_rn(element(p.t[0], at, c) - s.x, s.y),
                b = p.bias ? load(p.bias, p.t[0].dtype, c) : 0.0f;
    store(p.t[1].data, p.t[1].dtype, to + c, __fmaf_rn(n, weight_of(p, c), b));
  });
}

__global__ void __launch_bounds__(THREADS)
    layer_backward(const __grid_constant__ rgk_layer_params p) {
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32,
                live = live_rows(p.seqs) * p.per_token;
  if (row >= p.rows) return;
  const int64_t to = p.t[2].data ? row_at(p.w, p.t[2], row) : 0;
  if (row >= live) {
    if (p.t[2].data && !p.add)
      columns_of(p, [&](int64_t c) { store(p.t[2].data, p.t[2].dtype, to + c, 0.0f); });
    return;
  }
  const int64_t at = row_at(p.w, p.t[0], row), dy = row_at(p.w, p.t[1], row);
  const float2 s = stats_of(p, at);
  if (p.stats && threadIdx.x % 32 == 0) p.stats[2 * row] = s.x, p.stats[2 * row + 1] = s.y;
  if (!p.t[2].data) return;
  float sum = 0, products = 0;
  columns_of(p, [&](int64_t c) { sum += __fmul_rn(element(p.t[1], dy, c), weight_of(p, c)); });
  const float mean = __fmul_rn(sum_lanes(sum, 32), p.per_width);
  const auto centred = [&](int64_t c) {
    return __fmul_rn(element(p.t[1], dy, c), weight_of(p, c)) - mean;
  };
  const auto normal = [&](int64_t c) { return __fmul_rn(element(p.t[0], at, c) - s.x, s.y); };
  columns_of(p, [&](int64_t c) { products = __fmaf_rn(centred(c), normal(c), products); });
  const float along = __fmul_rn(sum_lanes(products, 32), p.per_width);
  columns_of(p, [&](int64_t c) {
    put_grad(p.t[2].data, p.t[2].dtype, to + c,
             __fmul_rn(s.y, __fmaf_rn(-normal(c), along, centred(c))), p.add);
  });
}

__global__ void __launch_bounds__(RGK_NORM_COLUMNS *RGK_LAYER_SLICES)
    layer_columns(const __grid_constant__ rgk_layer_params p) {
  __shared__ float2 part[RGK_LAYER_SLICES][RGK_NORM_COLUMNS];
  const int64_t c = (int64_t)blockIdx.x * RGK_NORM_COLUMNS + threadIdx.x,
                live = live_rows(p.seqs) * p.per_token, first = blockIdx.y * p.per_block;
  int64_t end = first + p.per_block < p.rows ? first + p.per_block : p.rows;
  if (end > live) end = live;
  float2 sum = make_float2(0, 0);
  if (c < p.width)
    for (int64_t row = first + threadIdx.y; row < end; row += RGK_LAYER_SLICES) {
      const float g = element(p.t[1], row_at(p.w, p.t[1], row), c),
                  n = __fmul_rn(element(p.t[0], row_at(p.w, p.t[0], row), c) - p.stats[2 * row],
                                p.stats[2 * row + 1]);
      sum.x = __fmaf_rn(g, n, sum.x);
      sum.y += g;
    }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || c >= p.width) return;
  for (int i = 1; i < RGK_LAYER_SLICES; i++)
    sum.x += part[i][threadIdx.x].x, sum.y += part[i][threadIdx.x].y;
  const int64_t to = blockIdx.y * p.width + c;
  p.partial[to] = sum.x;
  p.partial[gridDim.y * p.width + to] = sum.y;
}

template <class T> const void *forward_of(int held) {
  if (held == 1) return (const void *)forward<T, 1, RGK_NORM_ROWS(1)>;
  if (held == 2) return (const void *)forward<T, 2, RGK_NORM_ROWS(2)>;
  return (const void *)forward<T, 4, RGK_NORM_ROWS(4)>;
}
template <class T> const void *backward_of(int held) {
  return held == 1 ? (const void *)backward<T, 1> : (const void *)backward<T, 4>;
}

} // namespace

const void *rgk_norm_fwd(bool vectors, rg_dtype x, int held) {
  if (!vectors) return forward_of<void>(held);
  if (x == RG_F32) return forward_of<float>(held);
  return x == RG_F16 ? forward_of<__half>(held) : forward_of<__nv_bfloat16>(held);
}
const void *rgk_norm_bwd(bool vectors, rg_dtype x, int held) {
  if (!vectors) return backward_of<void>(held);
  if (x == RG_F32) return backward_of<float>(held);
  return x == RG_F16 ? backward_of<__half>(held) : backward_of<__nv_bfloat16>(held);
}
const void *rgk_norm_sum(void) {
  return (const void *)sum_partial;
}
const void *rgk_layer_fwd(void) {
  return (const void *)layer_forward;
}
const void *rgk_layer_bwd(void) {
  return (const void *)layer_backward;
}
const void *rgk_layer_columns(void) {
  return (const void *)layer_columns;
}
