/* kernels/pool.cu: pool and its gradient (ops/pool.c has the formulas), for any GPU: a thread for a
   feature of a row. Neighbouring threads have neighbouring features, so every token is read whole.

   bwd gives a row's tokens their gradients: each feature of a token belongs to one row at most, and
   what belongs to none, clear makes zero. bias walks the rows, heads from the last to the first. */
#include "pool.h"
#include "device/element.cuh"
#include "device/seq.cuh"

using namespace rgk;

namespace {

/* A row's tokens are first + place, places [from, kernel). */
struct row {
  int64_t first;
  int from; /* kernel: there is no row */
};

__device__ __forceinline__ row find_row(const rgk_pool &p, int64_t r) {
  int lo = 0, hi = p.seqs.n - 1; /* the last b with floor(start / stride) <= r */
  row none = {0, p.kernel};
  if (p.seqs.n < 1) return none;
  while (lo < hi) {
    const int mid = (lo + hi + 1) >> 1;
    if (seq_start(p.seqs, mid) / p.stride <= r)
      lo = mid;
    else
      hi = mid - 1;
  }
  const int64_t start = seq_start(p.seqs, lo), end = seq_start(p.seqs, lo + 1),
                last = start + (r - start / p.stride) * p.stride; /* its last stretch */
  if (last < start || last + p.stride > end) return none;
  const int64_t first = last + p.stride - p.kernel;
  return {first, first < start ? (int)(start - first) : 0};
}

__device__ __forceinline__ int64_t at(const rgk_pool &p, const rgk_tensor &t, int64_t token,
                                      int head, int place, int d) {
  return token * t.row + head * t.head + place / p.stride * p.W + d;
}
__device__ __forceinline__ float value(const rgk_pool &p, int64_t token, int head, int place,
                                       int d) {
  return load(p.x.data, p.x.dtype, at(p, p.x, token, head, place, d));
}
__device__ __forceinline__ float logit(const rgk_pool &p, int64_t token, int head, int place,
                                       int d) {
  const float z = load(p.z.data, p.z.dtype, at(p, p.z, token, head, place, d));
  if (!p.bias.data) return z;
  return z + load(p.bias.data, p.bias.dtype,
                  place % p.stride * p.bias.row + place / p.stride * p.W + d);
}

__device__ __forceinline__ void put(const rgk_tensor &t, int64_t i, float x, bool add) {
  if (add)
    ((float *)t.data)[i] += x;
  else
    store(t.data, t.dtype, i, x);
}

/* A feature of a row: its value and the log-sum-exp of its weights, or the place it comes from. */
struct pooled {
  float y, lse;
  int best;
};

__device__ __forceinline__ pooled look(const rgk_pool &p, row r, int head, int d) {
  pooled o = {0, 0, r.from};
  if (p.method != RGK_POOL_SOFTMAX) {
    for (int k = r.from; k < p.kernel; k++) {
      const float x = value(p, r.first + k, head, k, d);
      if (k != r.from && !(p.method == RGK_POOL_MAX ? x > o.y : x < o.y)) continue;
      o.y = x;
      o.best = k;
    }
    return o;
  }
  float most = 0, sum = 0;
  for (int k = r.from; k < p.kernel; k++) {
    const float z = logit(p, r.first + k, head, k, d);
    if (k == r.from || z > most) most = z;
  }
  for (int k = r.from; k < p.kernel; k++) {
    const float e = expf(logit(p, r.first + k, head, k, d) - most);
    sum += e;
    o.y = fmaf(e, value(p, r.first + k, head, k, d), o.y);
  }
  o.y /= sum;
  o.lse = most + logf(sum);
  return o;
}

__global__ void __launch_bounds__(RGK_POOL_THREADS) fwd(const __grid_constant__ rgk_pool p) {
  const int64_t i = blockIdx.x * (int64_t)RGK_POOL_THREADS + threadIdx.x;
  if (i >= p.rows * p.KH * p.W) return;
  const int d = (int)(i % p.W), head = (int)(i / p.W % p.KH);
  const int64_t n = i / p.W / p.KH;
  const row r = find_row(p, n);
  store(p.y.data, p.y.dtype, n * p.y.row + head * p.y.head + d,
        r.from < p.kernel ? look(p, r, head, d).y : 0.0f);
}

__global__ void __launch_bounds__(RGK_POOL_THREADS) bwd(const __grid_constant__ rgk_pool p) {
  const int64_t i = blockIdx.x * (int64_t)RGK_POOL_THREADS + threadIdx.x;
  if (i >= p.rows * p.KH * p.W) return;
  const int d = (int)(i % p.W), head = (int)(i / p.W % p.KH);
  const int64_t n = i / p.W / p.KH;
  const row r = find_row(p, n);
  if (r.from >= p.kernel) return;
  const pooled o = look(p, r, head, d);
  if (p.lse) p.lse[i] = o.lse, p.mean[i] = o.y;
  if (!p.dx.data && !p.dz.data) return;
  const float dy = load(p.dy.data, p.dy.dtype, n * p.dy.row + head * p.dy.head + d);
  for (int k = r.from; k < p.kernel; k++) {
    const int64_t token = r.first + k;
    const float w = p.method == RGK_POOL_SOFTMAX ? expf(logit(p, token, head, k, d) - o.lse)
                                                 : (float)(o.best == k);
    if (p.dx.data) put(p.dx, at(p, p.dx, token, head, k, d), w * dy, p.add_x);
    if (p.dz.data)
      put(p.dz, at(p, p.dz, token, head, k, d), w * dy * (value(p, token, head, k, d) - o.y),
          p.add_z);
  }
}

/* Does a row take column c of the token? */
__device__ __forceinline__ bool taken(const rgk_pool &p, int64_t token, int c) {
  const int b = find_seq(p.seqs, token);
  if (b >= p.seqs.n) return false;
  const int64_t start = seq_start(p.seqs, b), length = seq_start(p.seqs, b + 1) - start;
  return (token - start) / p.stride + p.parts - 1 - c / p.W < length / p.stride;
}

__global__ void __launch_bounds__(RGK_POOL_THREADS) clear(const __grid_constant__ rgk_pool p) {
  const int64_t i = blockIdx.x * (int64_t)RGK_POOL_THREADS + threadIdx.x, D = p.parts * p.W;
  if (i >= p.T * p.KH * D) return;
  const int c = (int)(i % D), head = (int)(i / D % p.KH);
  const int64_t token = i / D / p.KH;
  if (taken(p, token, c)) return;
  if (p.dx.data && !p.add_x)
    store(p.dx.data, p.dx.dtype, token * p.dx.row + head * p.dx.head + c, 0.0f);
  if (p.dz.data && !p.add_z)
    store(p.dz.data, p.dz.dtype, token * p.dz.row + head * p.dz.head + c, 0.0f);
}

__global__ void __launch_bounds__(RGK_POOL_THREADS) bias(const __grid_constant__ rgk_pool p) {
  const int i = blockIdx.x * RGK_POOL_THREADS + threadIdx.x, D = p.parts * p.W;
  if (i >= p.stride * D) return;
  const int q = i / D, c = i % D, place = c / p.W * p.stride + q, d = c % p.W;
  const int64_t to = q * p.db.row + c;
  float total = p.add_b ? ((const float *)p.db.data)[to] : 0.0f;
  for (int head = p.KH - 1; head >= 0; head--) {
    double sum = 0;
    for (int64_t n = 0; n < p.rows; n++) {
      const row r = find_row(p, n);
      if (place < r.from || r.from >= p.kernel) continue;
      const int64_t token = r.first + place, own = (n * p.KH + head) * p.W + d;
      const float w = expf(logit(p, token, head, place, d) - p.lse[own]),
                  dy = load(p.dy.data, p.dy.dtype, n * p.dy.row + head * p.dy.head + d);
      sum += (double)(w * dy * (value(p, token, head, place, d) - p.mean[own]));
    }
    total += (float)sum;
  }
  store(p.db.data, p.db.dtype, to, total);
}

} // namespace

const void *rgk_pool_fwd(void) {
  return (const void *)fwd;
}
const void *rgk_pool_bwd(void) {
  return (const void *)bwd;
}
const void *rgk_pool_clear(void) {
  return (const void *)clear;
}
const void *rgk_pool_bias(void) {
  return (const void *)bias;
}
