/* kernels/blend.cu: combine and merge_lse (blend.h; the formulas stand in ops/combine.c and
   ops/merge_lse.c).

       warp | row: lanes 0 … L-1 | row … |     lane l owns elements 8·l … 8·l+7, then those 8·L
                                               further, …

   The row's gates (or log-sum-exps) are read by one lane each while the first branches are under
   way; weights go to all lanes through shared memory. The backward reads each branch and the
   gradient once: products dout · o_n are summed over a lane's elements in order, then over lanes
   pairwise.
 */
#include "blend.h"
#include "device/chunk.cuh"
#include "device/seq.cuh"

using namespace rgk;

namespace {

enum { THREADS = RGK_BLEND_THREADS, ABREAST = 4 /* branches loaded at once */ };
enum { SIGMOID, SOFTMAX, NONE };

/* ---- weights of gates, and their gradients: additions never fused with what expf ends with, so
 * that every kernel here gets the same bits ---- */

/* The larger one; a NaN stays, and then every weight is one. */
__device__ __forceinline__ float more_gate(float most, float x) {
  return x > most || x != x ? x : most;
}
__device__ __forceinline__ float gate_sum_add(float sum, float x, float most) {
  return __fadd_rn(sum, expf(x - most));
}
/* most, sum: for softmax */
__device__ __forceinline__ float gate_weight(int act, float x, float most, float sum) {
  if (act == SOFTMAX) return expf(x - most) / sum;
  return act == SIGMOID ? 1.0f / __fadd_rn(1.0f, expf(-x)) : x;
}
/* rest: minus the mean of the products, for softmax. 1 - w is formed as sigmoid(-x): exact where w
 * is near 1. */
__device__ __forceinline__ float gate_gradient(int act, float x, float w, float product,
                                               float rest) {
  if (act == SOFTMAX) return w * __fadd_rn(product, rest);
  return act == SIGMOID ? product * (w * (1.0f / __fadd_rn(1.0f, expf(x)))) : product;
}

struct place {
  int64_t t, h;
  int lane, slot; /* of the row; row in the block */
  bool exists, live;
};

template <class P> __device__ __forceinline__ place find_place(const P &p) {
  place at;
  at.slot = threadIdx.x / p.lanes;
  at.lane = threadIdx.x - at.slot * p.lanes;
  const int64_t r = (int64_t)blockIdx.x * (THREADS / p.lanes) + at.slot;
  at.exists = r < p.tokens * p.heads;
  at.t = at.exists ? divide(r, p.heads) : 0;
  at.h = at.exists ? r - at.t * p.heads : 0;
  at.live = at.exists && at.t < live_rows(p.seqs);
  return at;
}

/* x [n]: gates or log-sum-exps of the row, w [n]: weights. Returns the merged log-sum-exp. */
template <bool MERGE, class P>
__device__ __forceinline__ float weigh(const P &p, const place &at, float *x, float *w) {
  float most = -INFINITY, sum = 0;
  for (int k = at.lane; k < p.n && at.live; k += p.lanes) {
    if constexpr (MERGE)
      x[k] = p.branch[k].lse[at.t * p.branch[k].lse_row + at.h];
    else
      x[k] = load(p.gate.data, p.gate.dtype, at.t * p.gate.row + at.h * p.gate.head + k);
  }
  __syncwarp();
  if (at.live && (MERGE || p.act == SOFTMAX)) {
    for (int k = 0; k < p.n; k++) most = more_gate(most, x[k]);
    for (int k = 0; k < p.n; k++) sum = gate_sum_add(sum, x[k], most);
  }
  for (int k = at.lane; k < p.n && at.live; k += p.lanes) {
    if constexpr (MERGE)
      w[k] = most == -INFINITY ? 0 : gate_weight(SOFTMAX, x[k], most, sum);
    else
      w[k] = gate_weight(p.act, x[k], most, sum);
  }
  __syncwarp();
  return most == -INFINITY ? most : most + logf(sum);
}

/* Elements [c, …) of branches k … k + ABREAST - 1. */
template <class T>
__device__ __forceinline__ void fetch(const rgk_blend_params &p, const place &at, int k, int64_t c,
                                      int n, chunk<T> (&raw)[ABREAST]) {
#pragma unroll
  for (int j = 0; j < ABREAST; j++)
    if (k + j < p.n) {
      const rgk_branch &b = p.branch[k + j];
      raw[j].load(b.o, p.dtype, at.t * b.o_row + at.h * b.o_head + c, n);
    }
}

template <class P> __device__ __forceinline__ int count(const P &p, int64_t c) {
  return p.width - c < CHUNK ? (int)(p.width - c) : CHUNK;
}

template <bool MERGE, class T>
__global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ rgk_blend_params p) {
  extern __shared__ float shared[];
  const place at = find_place(p);
  const int64_t mine = at.lane * CHUNK, step = p.lanes * CHUNK;
  float *x = shared + (int64_t)at.slot * RGK_BLEND_KINDS_FWD * p.n, *w = x + p.n;
  chunk<T> raw[ABREAST];
  if (at.live && mine < p.width) fetch(p, at, 0, mine, count(p, mine), raw);
  const float lse = weigh<MERGE>(p, at, x, w);
  if (!at.exists) return;
  if (MERGE && p.row_lse && at.lane == 0)
    p.row_lse[at.t * p.row_lse_row + at.h] = at.live ? lse : 0;
  for (int64_t c = mine; c < p.width; c += step) {
    const int n = count(p, c);
    bool any = false;
    float sum[CHUNK], v[CHUNK];
#pragma unroll
    for (int e = 0; e < CHUNK; e++) sum[e] = -0.0f; /* x + -0 is x */
    for (int k = 0; k < p.n && at.live; k += ABREAST) {
      if (k || c != mine) fetch(p, at, k, c, n, raw);
#pragma unroll
      for (int j = 0; j < ABREAST; j++) {
        if (k + j >= p.n) continue;
        const float a = w[k + j];
        if (MERGE && a == 0) continue; /* saw no key: its o is not looked at */
        raw[j].get(v);
#pragma unroll
        for (int e = 0; e < CHUNK; e++) sum[e] = __fmaf_rn(a, v[e], sum[e]);
        any = true;
      }
    }
    if (!any) zero(sum);
    put<T>(p.row.data, p.row.dtype, at.t * p.row.row + at.h * p.row.head + c, sum, n, false);
  }
}

/* ---- backward ---- */

/* From products to gradients of the row's gates or log-sum-exps. x, w, product [n] */
template <bool MERGE>
__device__ __forceinline__ void small_gradients(const rgk_blend_params &p, const place &at,
                                                const float *x, const float *w,
                                                const float *product) {
  float mean = 0;
  for (int k = 0; k < p.n && at.live && (MERGE || p.act == SOFTMAX); k++)
    if (!MERGE || w[k] != 0) mean = __fmaf_rn(w[k], product[k], mean);
  const float rest =
      MERGE && p.row_lse && at.live ? p.row_lse[at.t * p.row_lse_row + at.h] - mean : -mean;
  for (int k = at.lane; k < p.n; k += p.lanes) {
    float v = 0;
    if (at.live) {
      if (MERGE)
        v = w[k] != 0 ? w[k] * (product[k] + rest) : 0;
      else
        v = gate_gradient(p.act, x[k], w[k], product[k], rest);
    }
    if (MERGE) {
      const rgk_branch &b = p.branch[k];
      if (b.d_lse && (at.live || !b.lse_add))
        put_grad(b.d_lse, RG_F32, at.t * b.d_lse_row + at.h, v, b.lse_add);
    } else if (at.live || !p.gate_add) {
      put_grad(p.d_gate.data, p.d_gate.dtype, at.t * p.d_gate.row + at.h * p.d_gate.head + k, v,
               p.gate_add);
    }
  }
}

template <bool MERGE, class T>
__global__ void __launch_bounds__(THREADS) backward(const __grid_constant__ rgk_blend_params p) {
  extern __shared__ float shared[];
  const place at = find_place(p);
  const int64_t mine = at.lane * CHUNK, step = p.lanes * CHUNK;
  float *x = shared + (int64_t)at.slot * RGK_BLEND_KINDS_BWD * p.n, *w = x + p.n,
        *product = w + p.n;
  const int64_t row = at.t * p.row.row + at.h * p.row.head;
  const bool given = at.live && p.row.data, products = given && p.products;
  chunk<T> raw[ABREAST], grad;
  grad.clear();
  if (given && mine < p.width) grad.load(p.row.data, p.dtype, row + mine, count(p, mine));
  if (products && mine < p.width) fetch(p, at, 0, mine, count(p, mine), raw);
  weigh<MERGE>(p, at, x, w);
  for (int k = 0; k < p.n; k += ABREAST) {
    float sum[ABREAST] = {};
    for (int64_t c = mine; c < p.width && at.exists; c += step) {
      const int n = count(p, c);
      float g[CHUNK], v[CHUNK];
      if (given && (c != mine || p.width > step)) grad.load(p.row.data, p.dtype, row + c, n);
      if (products && (k || c != mine)) fetch(p, at, k, c, n, raw);
      grad.get(g);
#pragma unroll
      for (int j = 0; j < ABREAST; j++) {
        if (k + j >= p.n) continue;
        const rgk_branch &b = p.branch[k + j];
        if (products) {
          raw[j].get(v);
#pragma unroll
          for (int e = 0; e < CHUNK; e++) sum[j] = __fmaf_rn(g[e], v[e], sum[j]);
        }
        if (b.d && (at.live || !b.add)) {
          const float a = at.live ? w[k + j] : 0;
#pragma unroll
          for (int e = 0; e < CHUNK; e++) v[e] = __fmul_rn(a, g[e]);
          put<T>(b.d, b.d_dtype, at.t * b.d_row + at.h * b.d_head + c, v, n, b.add);
        }
      }
    }
    if (!p.products) continue;
#pragma unroll
    for (int j = 0; j < ABREAST; j++) {
      sum[j] = sum_lanes(sum[j], p.lanes);
      if (at.lane == 0 && k + j < p.n) product[k + j] = sum[j];
    }
  }
  if (!p.products) return;
  __syncwarp();
  if (at.exists) small_gradients<MERGE>(p, at, x, w, product);
}

/* ---- backward in parts ---- */

/* x as it reads once stored in type T. */
template <class T> __device__ __forceinline__ void as_stored(float (&x)[CHUNK]) {
#pragma unroll
  for (int i = 0; i < CHUNK; i += 2) {
    const float2 v = unpack(pack(x[i], x[i + 1], T()), T());
    x[i] = v.x, x[i + 1] = v.y;
  }
}

/* Elements at[i] + k of x where `on`, all of them under way before the first is looked at. */
template <int N>
__device__ __forceinline__ void load_each(const rgk_tensor &x, const int64_t (&at)[N], int k,
                                          const bool (&on)[N], float (&v)[N]) {
  if (x.dtype == RG_F32) {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = on[i] ? ((const float *)x.data)[at[i] + k] : 0;
    return;
  }
  uint16_t raw[N];
#pragma unroll
  for (int i = 0; i < N; i++) raw[i] = on[i] ? ((const uint16_t *)x.data)[at[i] + k] : 0;
#pragma unroll
  for (int i = 0; i < N; i++)
    v[i] = x.dtype == RG_F16 ? __half2float(__ushort_as_half(raw[i]))
                             : __bfloat162float(__ushort_as_bfloat16(raw[i]));
}
/* Weights of the rows' gates in one column, x: those gates, which begin at at[i]; every thread
 * finds them for itself. */
template <int N>
__device__ __forceinline__ void weights_of(const rgk_tensor &gate, int act, int n,
                                           const int64_t (&at)[N], const bool (&on)[N],
                                           const float (&x)[N], float (&w)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    float most = -INFINITY, sum = 0;
    if (act == SOFTMAX && on[i]) {
      for (int k = 0; k < n; k++) most = more_gate(most, load(gate.data, gate.dtype, at[i] + k));
      for (int k = 0; k < n; k++)
        sum = gate_sum_add(sum, load(gate.data, gate.dtype, at[i] + k), most);
    }
    w[i] = on[i] ? gate_weight(act, x[i], most, sum) : 0;
  }
}

/* Products and d as in `backward`. delta: of d as stored, either summed like a product or as
 * one chain, which is handed from lane to lane. RGK_BRANCH_ROWS rows of a thread are under
 * way at once. */
template <class T>
__global__ void __launch_bounds__(THREADS, sizeof(chunk<T>) > 16 ? 2 : 4)
    branch(const __grid_constant__ rgk_branch_params p) {
  enum { ROWS = RGK_BRANCH_ROWS };
  const int slot = threadIdx.x / p.lanes, lane = threadIdx.x - slot * p.lanes,
            slots = THREADS / p.lanes;
  const int64_t mine = lane * CHUNK, step = p.lanes * CHUNK, end = live_rows(p.seqs);
  const bool sums = p.product.data || p.delta.data;
  int32_t t[ROWS], h[ROWS];
  chunk<T> raw[ROWS], grad[ROWS];
  bool exists[ROWS], live[ROWS];
  float a[ROWS], gate[ROWS];
  int64_t gates[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int64_t r = ((int64_t)blockIdx.x * ROWS + i) * slots + slot;
    exists[i] = r < p.tokens * p.heads;
    t[i] = exists[i] ? (int32_t)divide(r, p.heads) : 0;
    h[i] = exists[i] ? (int32_t)(r - t[i] * p.heads) : 0;
    live[i] = exists[i] && t[i] < end;
    gates[i] = t[i] * p.gate.row + h[i] * p.gate.head;
    raw[i].clear();
    grad[i].clear();
    if (live[i] && mine < p.width) {
      grad[i].load(p.row.data, p.dtype, t[i] * p.row.row + h[i] * p.row.head + mine,
                   count(p, mine));
      if (sums)
        raw[i].load(p.o.data, p.dtype, t[i] * p.o.row + h[i] * p.o.head + mine, count(p, mine));
    }
  }
  load_each(p.gate, gates, p.column, live, gate);
  weights_of(p.gate, p.act, p.n, gates, live, gate, a);
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    float product = 0, delta = 0;
    for (int64_t c0 = 0; c0 < p.width; c0 += step) {
      const int64_t c = c0 + mine;
      const bool here = exists[i] && c < p.width;
      const int n = here ? count(p, c) : 0;
      float g[CHUNK], v[CHUNK], d[CHUNK];
      if (c0 > 0) {
        raw[i].clear();
        grad[i].clear();
        if (here && live[i]) {
          grad[i].load(p.row.data, p.dtype, t[i] * p.row.row + h[i] * p.row.head + c, n);
          if (sums) raw[i].load(p.o.data, p.dtype, t[i] * p.o.row + h[i] * p.o.head + c, n);
        }
      }
      grad[i].get(g);
      raw[i].get(v);
#pragma unroll
      for (int e = 0; e < CHUNK; e++) product = __fmaf_rn(g[e], v[e], product);
      if (!p.d.data) continue;
#pragma unroll
      for (int e = 0; e < CHUNK; e++) d[e] = __fmul_rn(a[i], g[e]);
      if (here && (live[i] || !p.add))
        put<T>(p.d.data, p.d.dtype, t[i] * p.d.row + h[i] * p.d.head + c, d, n, p.add);
      if (!p.delta.data) continue;
      if (p.d.dtype == RG_F16) as_stored<__half>(d);
      if (p.d.dtype == RG_BF16) as_stored<__nv_bfloat16>(d);
#pragma unroll
      for (int e = 0; e < CHUNK; e++) d[e] = e < n ? d[e] : 0;
      if (!p.chain) {
#pragma unroll
        for (int e = 0; e < CHUNK; e++) delta = __fmaf_rn(v[e], d[e], delta);
        continue;
      }
      for (int l = 0; l < p.lanes; l++) {
        if (here && l == lane)
#pragma unroll
          for (int e = 0; e < CHUNK; e++) delta = __fmaf_rn(v[e], d[e], delta);
        delta = __shfl_sync(0xffffffffu, delta, l, p.lanes);
      }
    }
    if (p.product.data) {
      product = sum_lanes(product, p.lanes);
      if (exists[i] && lane == 0)
        ((float *)p.product.data)[t[i] * p.product.row + h[i] * p.product.head] =
            live[i] ? product : 0;
    }
    if (p.delta.data) {
      if (!p.chain) delta = sum_lanes(delta, p.lanes);
      if (exists[i] && lane == 0)
        ((float *)p.delta.data)[t[i] * p.delta.row + h[i] * p.delta.head] = live[i] ? delta : 0;
    }
  }
}

/* x[i] summed over LANES lanes, in the order of sum_lanes: lane l is given that of i = l / (LANES /
 * N). A step at a time half of the lanes go on with half of the sums each. */
template <int LANES, int N>
__device__ __forceinline__ float sum_each(const float (&x)[N], int lane) {
  static_assert(N <= LANES);
  if constexpr (N == 1) {
    return sum_lanes(x[0], LANES);
  } else {
    const bool upper = lane & LANES / 2;
    float y[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++)
      y[i] = (upper ? x[i + N / 2] : x[i]) +
             __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + N / 2], LANES / 2);
    return sum_each<LANES / 2>(y, lane);
  }
}

/* `branch` where all is wanted, d in o's type, and a lane has one chunk of a row: then what counts
 * is how little stands between load and store. A thread has a head of neighbouring tokens; each
 * lane finds the weight of one of them. */
template <class T, int LANES>
__global__ void __launch_bounds__(THREADS, 4)
    branch_whole(const __grid_constant__ rgk_branch_params p) {
  enum { TOKENS = RGK_BRANCH_TOKENS };
  const int lane = threadIdx.x % LANES;
  const int64_t r = (int64_t)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES,
                group = divide(r, p.heads), h = r - group * p.heads, t0 = group * TOKENS,
                end = min(live_rows(p.seqs), p.tokens);
  const int64_t row = t0 * p.row.row + h * p.row.head + lane * CHUNK,
                o = t0 * p.o.row + h * p.o.head + lane * CHUNK,
                to = t0 * p.d.row + h * p.d.head + lane * CHUNK;
  chunk<T> raw[TOKENS], grad[TOKENS];
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    raw[i].clear();
    grad[i].clear();
    if (t0 + i < end) {
      grad[i].load(p.row.data, p.dtype, row + i * p.row.row, CHUNK);
      raw[i].load(p.o.data, p.dtype, o + i * p.o.row, CHUNK);
    }
  }
  const int64_t mine = t0 + lane % TOKENS, gates[1] = {mine * p.gate.row + h * p.gate.head};
  const bool on[1] = {mine < end};
  float gate[1], weight[1], sums[2 * TOKENS];
  load_each(p.gate, gates, p.column, on, gate);
  weights_of(p.gate, p.act, p.n, gates, on, gate, weight);
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    const float a = __shfl_sync(0xffffffffu, weight[0], i, LANES);
    float g[CHUNK], v[CHUNK], d[CHUNK], product = 0, delta = 0;
    grad[i].get(g);
    raw[i].get(v);
#pragma unroll
    for (int e = 0; e < CHUNK; e++) {
      product = __fmaf_rn(g[e], v[e], product);
      d[e] = __fmul_rn(a, g[e]);
    }
    chunk<T> stored;
    stored.q[0] = make_uint4(pack(d[0], d[1], T()), pack(d[2], d[3], T()), pack(d[4], d[5], T()),
                             pack(d[6], d[7], T()));
    if (t0 + i < p.tokens) __stcg((uint4 *)((T *)p.d.data + to + i * p.d.row), stored.q[0]);
    stored.get(d);
#pragma unroll
    for (int e = 0; e < CHUNK; e++) delta = __fmaf_rn(v[e], d[e], delta);
    sums[2 * i] = product, sums[2 * i + 1] = delta;
  }
  enum { EACH = LANES / (2 * TOKENS) }; /* lanes that have the same sum */
  const float sum = sum_each<LANES>(sums, lane);
  const int64_t t = t0 + lane / EACH / 2;
  const rgk_tensor &y = lane / EACH % 2 ? p.delta : p.product;
  if (lane % EACH == 0 && t < p.tokens) ((float *)y.data)[t * y.row + h * y.head] = sum;
}

/* `forward` of combine for a few branches where a lane has one chunk of a row: as above, all of a
 * thread's chunks are under way before a gate is looked at, and each lane finds the weight of one
 * branch of one token. */
template <class T, int LANES>
__global__ void __launch_bounds__(THREADS, 4)
    forward_whole(const __grid_constant__ rgk_blend_params p) {
  enum { TOKENS = RGK_BLEND_TOKENS, FEW = RGK_BLEND_FEW };
  static_assert(TOKENS * FEW <= LANES);
  const int lane = threadIdx.x % LANES;
  const int64_t r = (int64_t)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES,
                group = divide(r, p.heads), h = r - group * p.heads, t0 = group * TOKENS,
                end = min(live_rows(p.seqs), p.tokens);
  chunk<T> raw[FEW][TOKENS];
#pragma unroll
  for (int k = 0; k < FEW; k++) {
    const bool has = k < p.n;
    const rgk_branch &b = p.branch[k];
    const int64_t at = has ? t0 * b.o_row + h * b.o_head + lane * CHUNK : 0;
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
      raw[k][i].clear();
      if (has && t0 + i < end) raw[k][i].load(b.o, p.dtype, at + i * b.o_row, CHUNK);
    }
  }
  const int64_t mine = t0 + lane / FEW % TOKENS, gates[1] = {mine * p.gate.row + h * p.gate.head};
  const bool on[1] = {mine < end && lane % FEW < p.n};
  float gate[1], weight[1];
  load_each(p.gate, gates, lane % FEW, on, gate);
  weights_of(p.gate, p.act, p.n, gates, on, gate, weight);
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    float sum[CHUNK], v[CHUNK];
#pragma unroll
    for (int e = 0; e < CHUNK; e++) sum[e] = -0.0f;
#pragma unroll
    for (int k = 0; k < FEW; k++) {
      const float a = __shfl_sync(0xffffffffu, weight[0], i * FEW + k, LANES);
      if (k >= p.n) continue;
      raw[k][i].get(v);
#pragma unroll
      for (int e = 0; e < CHUNK; e++) sum[e] = __fmaf_rn(a, v[e], sum[e]);
    }
    if (t0 + i >= end) zero(sum);
    if (t0 + i < p.tokens)
      put<T>(p.row.data, p.row.dtype, (t0 + i) * p.row.row + h * p.row.head + lane * CHUNK, sum,
             CHUNK, false);
  }
}

/* The gates' gradients of the branches' products, a thread a row; sums in the order of
 * small_gradients. */
__global__ void __launch_bounds__(THREADS) gates(const __grid_constant__ rgk_blend_params p) {
  const int64_t r = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (r >= p.tokens * p.heads) return;
  const int64_t t = divide(r, p.heads), h = r - t * p.heads, at = t * p.gate.row + h * p.gate.head;
  const bool live = t < live_rows(p.seqs);
  if (!live && p.gate_add) return;
  float most = -INFINITY, sum = 0, mean = 0;
  if (live && p.act == SOFTMAX) {
    for (int k = 0; k < p.n; k++) most = more_gate(most, load(p.gate.data, p.gate.dtype, at + k));
    for (int k = 0; k < p.n; k++)
      sum = gate_sum_add(sum, load(p.gate.data, p.gate.dtype, at + k), most);
    for (int k = 0; k < p.n; k++)
      mean = __fmaf_rn(gate_weight(p.act, load(p.gate.data, p.gate.dtype, at + k), most, sum),
                       p.branch[k].lse[t * p.branch[k].lse_row + h], mean);
  }
  for (int k = 0; k < p.n; k++) {
    float v = 0;
    if (live) {
      const float x = load(p.gate.data, p.gate.dtype, at + k);
      v = gate_gradient(p.act, x, gate_weight(p.act, x, most, sum),
                        p.branch[k].lse[t * p.branch[k].lse_row + h], -mean);
    }
    put_grad(p.d_gate.data, p.d_gate.dtype, t * p.d_gate.row + h * p.d_gate.head + k, v,
             p.gate_add);
  }
}

template <bool MERGE> const void *forward_of(bool vectors, rg_dtype x) {
  if (!vectors) return (const void *)forward<MERGE, void>;
  if (x == RG_F32) return (const void *)forward<MERGE, float>;
  if (x == RG_F16) return (const void *)forward<MERGE, __half>;
  return (const void *)forward<MERGE, __nv_bfloat16>;
}
template <bool MERGE> const void *backward_of(bool vectors, rg_dtype x) {
  if (!vectors) return (const void *)backward<MERGE, void>;
  if (x == RG_F32) return (const void *)backward<MERGE, float>;
  if (x == RG_F16) return (const void *)backward<MERGE, __half>;
  return (const void *)backward<MERGE, __nv_bfloat16>;
}

} // namespace

const void *rgk_blend_fwd(bool merge, bool vectors, rg_dtype x) {
  return merge ? forward_of<true>(vectors, x) : forward_of<false>(vectors, x);
}
/* For the types of two bytes and the widths that have one. */
#define WHOLE(kernel)  \
  INSTANCE(kernel, 8)  \
  INSTANCE(kernel, 16) \
  INSTANCE(kernel, 32) \
  return nullptr;
#define INSTANCE(kernel, n) \
  if (lanes == n)           \
    return x == RG_F16 ? (const void *)kernel<__half, n> : (const void *)kernel<__nv_bfloat16, n>;
const void *rgk_blend_fwd_whole(rg_dtype x, int32_t lanes) {
  WHOLE(forward_whole)
}
const void *rgk_blend_branch(bool vectors, rg_dtype x) {
  if (!vectors) return (const void *)branch<void>;
  if (x == RG_F32) return (const void *)branch<float>;
  if (x == RG_F16) return (const void *)branch<__half>;
  return (const void *)branch<__nv_bfloat16>;
}
const void *rgk_blend_branch_whole(rg_dtype x, int32_t lanes) {
  WHOLE(branch_whole)
}
const void *rgk_blend_gates(void) {
  return (const void *)gates;
}
const void *rgk_blend_bwd(bool merge, bool vectors, rg_dtype x) {
  return merge ? backward_of<true>(vectors, x) : backward_of<false>(vectors, x);
}
