/* kernels/gemm.cuh: what every product kernel of gemm.h shares: addresses of operands, and what
 * happens to a finished tile. */
#pragma once
#include "gemm.h"
#include "device/element.cuh"

namespace rgk {

/* A row of the tile: where it begins in A, and its valid parts; where in C and `up`. */
struct gemm_place {
  int64_t a;
  int32_t lo, hi;
};
struct gemm_row : gemm_place {
  int64_t c, up;
  int32_t cn;
  bool live;
};

__device__ __forceinline__ int64_t gemm_live(const rgk_gemm &p) {
  const int64_t rows = p.mode == RGK_SUM ? p.k : p.m;
  if (!p.live) return rows;
  const int64_t live = *p.live / p.live_div;
  return live < rows ? live : rows;
}

__device__ __forceinline__ gemm_row gemm_find_row(const rgk_gemm &p, int64_t m) {
  gemm_row r = {{0, 0, 0}, 0, 0, 0, false};
  if (p.mode == RGK_SUM) {
    r.c = m * p.ldc;
    r.cn = m < p.m;
    r.live = true;
    return r;
  }
  if (m >= p.m * p.heads) return r;
  const int64_t i = m / p.heads, h = m - i * p.heads;
  rgk_gemm_row e = {(int32_t)i, 0, 1, (int32_t)i, 1};
  if (p.table)
    e = p.table[i];
  else if (i >= gemm_live(p))
    e.row = -1, e.hi = 0;
  r.live = e.row >= 0;
  r.lo = e.lo, r.hi = e.hi;
  r.a = e.row * p.lda + h * p.a_head;
  r.c = e.crow * p.ldc + h * p.c_head;
  r.up = i * p.up_row + h * p.up_head;
  r.cn = p.add && !r.live ? 0 : e.cn;
  return r;
}

/* A step through the depth begins at k0, inside part p, which begins at `base`. */
struct gemm_step {
  int k0, part, base;
};
__device__ __forceinline__ gemm_step gemm_step_at(const rgk_gemm &p, int k0) {
  gemm_step s;
  s.k0 = k0;
  s.part = p.mode == RGK_SUM ? 0 : k0 / p.part;
  s.base = s.part * p.part;
  return s;
}
struct gemm_at {
  int part, in;
};
__device__ __forceinline__ gemm_at gemm_part(const rgk_gemm &p, const gemm_step &s, int k) {
  gemm_at at = {s.part, k - s.base};
  while (at.in >= p.part) at.in -= p.part, at.part++;
  return at;
}

/* Element (row r of the tile, depth k) of A; NULL: zero. */
template <class T>
__device__ __forceinline__ const T *gemm_a(const rgk_gemm &p, const gemm_place &r,
                                           const gemm_step &s, int k) {
  const gemm_at at = gemm_part(p, s, k);
  if (k >= p.k || at.part < r.lo || at.part >= r.hi) return nullptr;
  return (const T *)p.a + r.a + at.part * p.a_part + at.in;
}

/* Row of B that column `n` of a tile of `width` belongs to: gates keep a's and b's columns in one
 * tile. */
__device__ __forceinline__ int64_t gemm_column(const rgk_gemm &p, int64_t tile, int width, int n) {
  if (p.gate == RGK_STORE) {
    const int64_t at = tile * width + n;
    return at < p.n ? at : -1;
  }
  const int inside = n & (width / 2 - 1);
  const int64_t at = tile * (width / 2) + inside;
  return at >= p.half ? -1 : n == inside ? at : p.half + at;
}

/* RGK_FORWARD: element (column, depth k) of B. */
template <class T>
__device__ __forceinline__ const T *gemm_b_forward(const rgk_gemm &p, int64_t column, int k) {
  return column < 0 || k >= p.k ? nullptr : (const T *)p.b + column * p.ldb + k;
}
/* RGK_BACKWARD: element (depth k, column n) of B. */
template <class T>
__device__ __forceinline__ const T *gemm_b_backward(const rgk_gemm &p, const gemm_step &s, int k,
                                                    int64_t n) {
  const gemm_at at = gemm_part(p, s, k);
  if (k >= p.k || n >= p.n) return nullptr;
  return (const T *)p.b + at.in * p.ldb + at.part * p.b_part + n;
}

/* RGK_SUM: row r of B, −1 if it does not count. */
__device__ __forceinline__ int64_t gemm_sum_row(const rgk_gemm &p, int64_t r, int64_t end) {
  return r >= end ? -1 : p.table ? p.table[r].row : r;
}
/* Where column n of B's rows lies in them. */
__device__ __forceinline__ int64_t gemm_sum_column(const rgk_gemm &p, int64_t n) {
  const int64_t part = n / p.part;
  return part * p.b_part + (n - part * p.part);
}

/* ---- eight values at a time ---- */

__device__ __forceinline__ void load8(const void *x, int dtype, int64_t at, bool vec, int n,
                                      float v[8]) {
  if (!vec) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = i < n ? load(x, dtype, at + i) : 0.0f;
  } else if (dtype == RG_F32) {
    const float4 a = *(const float4 *)((const float *)x + at),
                 b = *(const float4 *)((const float *)x + at + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else {
    const uint4 raw = *(const uint4 *)((const uint16_t *)x + at);
    const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (dtype == RG_BF16) {
        v[2 * i] = __uint_as_float(w[i] << 16);
        v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
      } else {
        const float2 f = __half22float2(*(const __half2 *)&w[i]);
        v[2 * i] = f.x, v[2 * i + 1] = f.y;
      }
    }
  }
}

__device__ __forceinline__ void store8(void *x, int dtype, int64_t at, bool vec, int n,
                                       const float v[8]) {
  if (!vec) {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < n) store(x, dtype, at + i, v[i]);
  } else if (dtype == RG_F32) {
    *(float4 *)((float *)x + at) = make_float4(v[0], v[1], v[2], v[3]);
    *(float4 *)((float *)x + at + 4) = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (dtype == RG_BF16) {
        const __nv_bfloat162 b = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
        w[i] = *(const uint32_t *)&b;
      } else {
        const __half2 h = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
        w[i] = *(const uint32_t *)&h;
      }
    }
    *(uint4 *)((uint16_t *)x + at) = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

/* ---- a finished tile ---- */

__device__ __forceinline__ float gemm_sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}

/* Eight columns of a row to their places in C. */
__device__ __forceinline__ void gemm_put(const rgk_gemm &p, char *c, const gemm_row &r, int64_t n,
                                         int count, float v[8]) {
  const uint32_t part = (uint32_t)p.c_part;
  const int64_t q = (uint32_t)n / part;
  if (p.vc && count == 8) {
    if (q >= r.cn) return;
    const int64_t at = r.c + q * p.ldc + (n - q * part);
    if (p.add) {
      float old[8];
      load8(c, RG_F32, at, true, 8, old);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = old[i] + v[i];
    }
    store8(c, p.c_dtype, at, true, 8, v);
    return;
  }
  for (int i = 0; i < count; i++) {
    const int64_t qi = (uint32_t)(n + i) / part;
    if (qi < r.cn) put_grad(c, p.c_dtype, r.c + qi * p.ldc + (n + i - qi * part), v[i], p.add);
  }
}

/* The tile (shared memory, rows LD apart) of column tile `column_tile` goes through the gate
 * to C. */
template <int BM, int BN, int LD, int THREADS>
__device__ __forceinline__ void gemm_finish(const rgk_gemm &p, const float *tile,
                                            const gemm_row *rows, int64_t column_tile, char *c) {
  const bool gated = p.gate != RGK_STORE;
  const int eights = gated ? BN / 16 : BN / 8;
  const int64_t columns = gated ? p.half : p.n, n0 = column_tile * eights * 8;
  for (int i = threadIdx.x; i < BM * eights; i += THREADS) {
    const int row = gated ? i / (BN / 16) : i / (BN / 8), at = (i & (eights - 1)) * 8;
    const gemm_row &r = rows[row];
    const int64_t n = n0 + at, left = columns - n;
    const int count = left < 8 ? (int)left : 8;
    if (r.cn == 0 || count <= 0) continue;
    float a[8], b[8];
#pragma unroll
    for (int e = 0; e < 8; e++) a[e] = r.live ? tile[row * LD + at + e] : 0.0f;
    if (!gated) {
      if (p.bias && r.live)
        for (int e = 0; e < count; e++) a[e] += load(p.bias, p.dtype, n + e);
      gemm_put(p, c, r, n, count, a);
      continue;
    }
#pragma unroll
    for (int e = 0; e < 8; e++) b[e] = r.live ? tile[row * LD + at + BN / 2 + e] : 0.0f;
    if (p.gate == RGK_SWIGLU || p.gate == RGK_SIGMOID_MUL) {
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const float s = gemm_sigmoid(a[e]);
        a[e] = p.gate == RGK_SWIGLU ? a[e] * s * b[e] : s * b[e];
      }
      gemm_put(p, c, r, n, count, a);
      continue;
    }
    float up[8];
#pragma unroll
    for (int e = 0; e < 8; e++) up[e] = 0.0f;
    if (r.live) load8(p.up, p.dtype, r.up + n, p.vu && count == 8, count, up);
    const bool silu = p.gate == RGK_SWIGLU_BWD;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const float s = gemm_sigmoid(a[e]),
                  slope = silu ? s * (1.0f + a[e] * (1.0f - s)) : s * (1.0f - s);
      const float act = silu ? a[e] * s : s;
      a[e] = up[e] * b[e] * slope;
      b[e] = up[e] * act;
    }
    gemm_put(p, c, r, n, count, a);
    gemm_put(p, c, r, p.half + n, count, b);
  }
}

/* Which tile a block has: columns of eight row tiles, so that a wave of blocks shares rows and
 * columns. */
struct gemm_tile {
  uint32_t m, n;
};
__device__ __forceinline__ gemm_tile gemm_find_tile(const rgk_gemm &p) {
  const uint32_t group = blockIdx.x / (8 * p.tiles_n), first = group * 8;
  const uint32_t height = p.tiles_m - first < 8 ? p.tiles_m - first : 8,
                 in = blockIdx.x - first * p.tiles_n;
  gemm_tile t = {first + in % height, in / height};
  return t;
}

} // namespace rgk
