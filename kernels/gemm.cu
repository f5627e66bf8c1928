/* kernels/gemm.cu: the products of gemm.h without tensor cores (any type, stride and alignment),
   and the sums of partial results.

   A block of 256 threads computes 128 x 128 of C, each thread 8 x 8: rows 4·ty + 0 … 3 and 64 more,
   columns likewise with tx. Tiles of A and B, 16 deep, lie in shared memory as floats, depth first,
   twice: while one is used the next is on its way through registers.

       A [16][128+4] | B [16][128+4] | the same again        overlaid at the end by C [128][128+4]

   Products are summed in runs of 256, then run by run.
 */
#include "gemm.cuh"

using namespace rgk;

namespace {

enum { DEPTH = 16, RUN = 256, LD = 128 + 4, TILE = DEPTH * LD };

/* 16 bytes of consecutive elements; at(e) is where element e lies, NULL: zero. */
template <class T> struct chunk {
  static const int N = 16 / sizeof(T);
  union {
    uint4 raw;
    T x[N];
  };
  __device__ __forceinline__ chunk() : raw(make_uint4(0, 0, 0, 0)) {}
  template <class F> __device__ __forceinline__ void fetch(bool vec, F at) {
    raw = make_uint4(0, 0, 0, 0);
    if (vec) {
      const T *from = at(0);
      if (from) raw = *(const uint4 *)from;
    } else {
#pragma unroll
      for (int e = 0; e < N; e++) {
        const T *from = at(e);
        if (from) x[e] = *from;
      }
    }
  }
};

template <class T> struct plain {
  /* chunks of a thread */
  static const int N = chunk<T>::N, EACH = DEPTH * 128 / N / RGK_GEMM_THREADS;
  chunk<T> a[EACH], b[EACH];

  /* Along the rows of a tile: chunk j of this thread is row `row`, depth `depth`; across them:
   * depth `deep`, column `column`. */
  __device__ __forceinline__ static int row(int j) {
    return (threadIdx.x + j * RGK_GEMM_THREADS) % 128;
  }
  __device__ __forceinline__ static int depth(int j) {
    return (threadIdx.x + j * RGK_GEMM_THREADS) / 128 * N;
  }
  __device__ __forceinline__ static int column(int j) {
    return (threadIdx.x + j * RGK_GEMM_THREADS) % (128 / N) * N;
  }
  __device__ __forceinline__ static int deep(int j) {
    return (threadIdx.x + j * RGK_GEMM_THREADS) / (128 / N);
  }

  __device__ __forceinline__ void load(const rgk_gemm &p, const gemm_row *rows, gemm_tile t,
                                       int64_t head, int64_t k0, int64_t end) {
    const gemm_step s = gemm_step_at(p, (int)k0);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      if (p.mode == RGK_SUM) {
        const int64_t r = k0 + deep(j), m = (int64_t)t.m * 128 + column(j),
                      n = (int64_t)t.n * 128 + column(j);
        const int64_t from = gemm_sum_row(p, r, end);
        const T *pa = (const T *)p.a + head * p.a_head + r * p.lda;
        const T *pb = (const T *)p.b + head * p.b_head + from * p.ldb;
        a[j].fetch(p.va, [&](int e) { return from >= 0 && m + e < p.m ? pa + m + e : nullptr; });
        b[j].fetch(p.vb, [&](int e) {
          return from >= 0 && n + e < p.n ? pb + gemm_sum_column(p, n + e) : nullptr;
        });
        continue;
      }
      const gemm_row r = rows[row(j)];
      a[j].fetch(p.va, [&](int e) { return gemm_a<T>(p, r, s, (int)k0 + depth(j) + e); });
      if (p.mode == RGK_FORWARD) {
        const int64_t c = gemm_column(p, t.n, 128, row(j));
        b[j].fetch(p.vb, [&](int e) { return gemm_b_forward<T>(p, c, (int)k0 + depth(j) + e); });
      } else {
        const int64_t n = (int64_t)t.n * 128 + column(j);
        b[j].fetch(p.vb, [&](int e) { return gemm_b_backward<T>(p, s, (int)k0 + deep(j), n + e); });
      }
    }
  }

  __device__ __forceinline__ static void along(float *to, const chunk<T> &c, int j) {
#pragma unroll
    for (int e = 0; e < N; e++) to[(depth(j) + e) * LD + row(j)] = to_float(c.x[e]);
  }
  __device__ __forceinline__ static void across(float *to, const chunk<T> &c, int j) {
#pragma unroll
    for (int e = 0; e < N; e++) to[deep(j) * LD + column(j) + e] = to_float(c.x[e]);
  }
  __device__ __forceinline__ void put(const rgk_gemm &p, float *to) const {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      if (p.mode == RGK_SUM)
        across(to, a[j], j);
      else
        along(to, a[j], j);
      if (p.mode == RGK_FORWARD)
        along(to + TILE, b[j], j);
      else
        across(to + TILE, b[j], j);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(RGK_GEMM_THREADS) gemm_plain(const __grid_constant__ rgk_gemm p) {
  extern __shared__ __align__(16) float shared[];
  __shared__ gemm_row rows[128];
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const gemm_tile t = gemm_find_tile(p);
  const bool sum = p.mode == RGK_SUM;
  const int64_t m0 = (int64_t)t.m * 128, head = blockIdx.z / p.split;
  int64_t k = sum ? blockIdx.z % p.split * p.chunk : 0, end = p.k;
  if (sum) {
    const int64_t live = gemm_live(p);
    end = k + p.chunk < live ? k + p.chunk : live;
  }
  bool any = sum;
  if (threadIdx.x < 128) {
    rows[threadIdx.x] = gemm_find_row(p, m0 + threadIdx.x);
    any |= rows[threadIdx.x].lo < rows[threadIdx.x].hi;
  }
  if (!__syncthreads_or(any)) end = k; /* nothing but zeros */

  float c[8][8], run[8][8];
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) c[i][j] = run[i][j] = 0.0f;

  plain<T> next;
  int buffer = 0, step = 0;
  if (k < end) {
    next.load(p, rows, t, head, k, end);
    next.put(p, shared);
  }
  __syncthreads();
  for (; k < end; k += DEPTH) {
    const bool more = k + DEPTH < end;
    const float *a = shared + buffer * 2 * TILE + ty * 4,
                *b = shared + buffer * 2 * TILE + TILE + tx * 4;
    if (more) next.load(p, rows, t, head, k + DEPTH, end);
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      float x[8], y[8];
      *(float4 *)x = *(const float4 *)(a + d * LD);
      *(float4 *)(x + 4) = *(const float4 *)(a + d * LD + 64);
      *(float4 *)y = *(const float4 *)(b + d * LD);
      *(float4 *)(y + 4) = *(const float4 *)(b + d * LD + 64);
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) run[i][j] = fmaf(x[i], y[j], run[i][j]);
    }
    if (++step % (RUN / DEPTH) == 0) {
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) c[i][j] += run[i][j], run[i][j] = 0.0f;
    }
    buffer ^= 1;
    if (more) next.put(p, shared + buffer * 2 * TILE);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 8; j += 4)
      *(float4 *)(shared + ((i & 4) * 16 + ty * 4 + (i & 3)) * LD + (j & 4) * 16 + tx * 4) =
          make_float4(c[i][j] + run[i][j], c[i][j + 1] + run[i][j + 1], c[i][j + 2] + run[i][j + 2],
                      c[i][j + 3] + run[i][j + 3]);
  __syncthreads();
  char *to = (char *)p.c + (sum ? (int64_t)blockIdx.z * p.c_split * 4 : 0);
  gemm_finish<128, 128, LD, RGK_GEMM_THREADS>(p, shared, rows, t.n, to);
}

__global__ void reduce_partials(const __grid_constant__ rgk_reduce p) {
  const int64_t size = p.m * p.n;
  for (int64_t at = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; at < size;
       at += (int64_t)gridDim.x * blockDim.x) {
    const int64_t i = at / p.n, j = at - i * p.n;
    bool begun = p.from != nullptr;
    float sum = begun ? p.from[i * p.from_row + j] : 0.0f;
    for (int h = p.heads - 1; h >= 0; h--) {
      const float *x = p.partial + h * p.split * size + at;
      float one = x[0];
#pragma unroll 4
      for (int s = 1; s < p.split; s++) one += x[s * size];
      sum = begun ? sum + one : one;
      begun = true;
    }
    store(p.to, p.dtype, i * p.to_row + j, sum);
  }
}

__global__ void sum_columns(const __grid_constant__ rgk_column_sums p) {
  __shared__ float part[8][32];
  const int64_t n = blockIdx.x * 32ll + threadIdx.x, first = blockIdx.y * p.chunk;
  int64_t end = first + p.chunk, live = p.live && *p.live < p.rows ? *p.live : p.rows;
  if (end > live) end = live;
  float sum = 0.0f;
  if (n < p.n)
#pragma unroll 8
    for (int64_t t = first + threadIdx.y; t < end; t += 8) sum += load(p.x, p.dtype, t * p.ldx + n);
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || n >= p.n) return;
  for (int i = 1; i < 8; i++) sum += part[i][threadIdx.x];
  p.partial[blockIdx.y * p.n + n] = sum;
}

__global__ void zero_dead_rows(const __grid_constant__ rgk_zero_tail p) {
  for (int64_t r = *p.live + blockIdx.x; r < p.rows; r += gridDim.x)
    for (int64_t n = threadIdx.x; n < p.n; n += blockDim.x)
      store(p.x, p.dtype, r * p.ldx + n, 0.0f);
}

} // namespace

const void *rgk_gemm_plain(rg_dtype t) {
  if (t == RG_F32) return (const void *)gemm_plain<float>;
  if (t == RG_F16) return (const void *)gemm_plain<__half>;
  return (const void *)gemm_plain<__nv_bfloat16>;
}
const void *rgk_zero_dead_rows(void) {
  return (const void *)zero_dead_rows;
}
const void *rgk_reduce_partials(void) {
  return (const void *)reduce_partials;
}
const void *rgk_sum_columns(void) {
  return (const void *)sum_columns;
}
