/* kernels/select_dkv_sm90.cu: gradients of keys and values of attention over selected blocks (see select.h).
 *
 *   S^T [64 keys, ROWS] = K Q^T    dP^T = V dO^T    p = exp2(S^T c - lse)    dS^T = p (dP^T - delta)
 *   dV [64 keys, E] += p dO        dK [64 keys, D] += dS^T Q
 *
 * Everything of a warp stays in its registers. Two warpgroups, where the widths need them, compute the same S^T
 * and dP^T and take half of the columns of dK and dV each.
 * Shared memory: K, V; Q and dO twice; row tables and statistics.
 */
#include "device/select.cuh"

using namespace rgk;

namespace {

/* This thread's accumulators x of columns [first, first + W) of a key gradient, to their rows. */
template <int W>
__device__ __forceinline__ void put_keys(const rgk_tensor &y, bool add, const select_keys &k, int kh, int first,
                                         const float (&x)[W / 2], float scale, bool aligned) {
  if (!y.data) return;
  const int key = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (key + 8 * i >= k.n) continue;
    const int64_t at = (k.row + key + 8 * i) * y.row + kh * y.head + first + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < W / 8; j++) {
      const float v0 = x[4 * j + 2 * i] * scale, v1 = x[4 * j + 2 * i + 1] * scale;
      if (!aligned) {
        put_grad(y.data, y.dtype, at + 8 * j, v0, add);
        put_grad(y.data, y.dtype, at + 8 * j + 1, v1, add);
      } else if (add || y.dtype == RG_F32) {
        float2 *to = (float2 *)((float *)y.data + at + 8 * j);
        const float2 old = add ? *to : make_float2(0, 0);
        *to = make_float2(old.x + v0, old.y + v1);
      } else if (y.dtype == RG_F16) {
        *(uint32_t *)((__half *)y.data + at + 8 * j) = pack2<__half>(v0, v1);
      } else {
        *(uint32_t *)((__nv_bfloat16 *)y.data + at + 8 * j) = pack2<__nv_bfloat16>(v0, v1);
      }
    }
  }
}
/* The same as an fp32 sum, 64 rows of `width` columns. */
template <int W>
__device__ __forceinline__ float4 *sum_at(float *sums, int64_t which, int width, int first) {
  return (float4 *)(sums + which * RGK_SELECT_KEYS * width + RGK_SELECT_KEYS * first) + threadIdx.x % 128;
}

template <class T, int D, int E> struct shape {
  static constexpr int GROUPS = D + E >= 512 ? 2 : 1, ROWS = D > 128 && GROUPS == 1 ? 32 : 64;
  static constexpr int THREADS = GROUPS * RGK_SELECT_THREADS, DK = D / GROUPS, EV = E / GROUPS;
};

template <class T, int D, int E>
__global__ void __launch_bounds__(shape<T, D, E>::THREADS, D + E > 320 ? 1 : 2)
    gradient(const __grid_constant__ rgk_select p) {
  using X = shape<T, D, E>;
  constexpr int ROWS = X::ROWS, THREADS = X::THREADS, DK = X::DK, EV = X::EV;
  extern __shared__ char raw[];
  const int z = blockIdx.z, kh = p.head + z, part = blockIdx.y;
  if (blockIdx.x >= p.items[z]) return;
  const rgk_select_item item = p.item[z * p.cap + blockIdx.x];
  const select_keys keys = find_keys(p, item.slot, part);
  if (keys.n == 0) return;

  constexpr uint32_t size_q = ROWS * 128 * ((D + 63) / 64), size_o = ROWS * 128 * ((E + 63) / 64);
  const uint32_t at_k = (smem_at(raw) + 1023) & ~1023u, at_v = at_k + 8192 * ((D + 63) / 64),
                 at_q = at_v + 8192 * ((E + 63) / 64), at_o = at_q + 2 * size_q, at_stat = at_o + 2 * size_o;
  const float2 *stat = (const float2 *)(raw + (at_stat - smem_at(raw)));
  row_table<ROWS> *table = (row_table<ROWS> *)(stat + 2 * ROWS);
  const int rows = item.count * p.a.G, tiles = (rows + ROWS - 1) / ROWS;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;

  load_keys<D, THREADS>(at_k, p.a.k, keys, kh, p.a.aligned);
  load_keys<E, THREADS>(at_v, p.a.v, keys, kh, p.a.aligned);

  row_walk<ROWS> walk(p, item, keys, kh);
  auto write_table = [&](int t) {
    row_table<ROWS> &x = table[t % 3];
    const int r = threadIdx.x, head = walk.head + walk.g;
    const bool real = walk.row >= 0;
    x.q[r] = real ? walk.row * p.a.q.row + head * p.a.q.head : -1;
    x.d_o[r] = real ? walk.row * p.a.d_o.row + head * p.a.d_o.head : -1;
    x.at[r] = real ? (int64_t)walk.row * p.a.H + head : -1;
    x.limit[r] = real ? walk.limit() : 0;
    walk.fetch();
  };
  auto gather_tile = [&](int t) {
    const row_table<ROWS> &x = table[t % 3];
    gather<ROWS, D, THREADS>(at_q + (t & 1) * size_q, p.a.q.data, x.q, p.a.aligned);
    gather<ROWS, E, THREADS>(at_o + (t & 1) * size_o, p.a.d_o.data, x.d_o, p.a.aligned);
    if (threadIdx.x < ROWS) {
      const int64_t at = x.at[threadIdx.x];
      copy8(at_stat + ((t & 1) * ROWS + threadIdx.x) * 8, p.stat + (at < 0 ? 0 : 2 * at), at >= 0);
    }
  };
  float dk[DK / 2] = {}, dv[EV / 2] = {};
  if (tiles > 0) {
    if (threadIdx.x < ROWS) {
      walk.fetch();
      write_table(0);
      write_table(1);
    }
    __syncthreads();
    gather_tile(0);
  }
  copies_commit();

  const float c = p.a.scale * LOG2E;
  const int key = warp * 16 + lane / 4;
  for (int t = 0; t < tiles; t++) {
    copies_wait();
    proxy_fence();
    __syncthreads();
    if (threadIdx.x < ROWS) write_table(t + 2);
    if (t + 1 < tiles) gather_tile(t + 1);
    copies_commit();

    const uint32_t q = at_q + (t & 1) * size_q, d_o = at_o + (t & 1) * size_o;
    float s[ROWS / 2], dp[ROWS / 2];
    wgmma_fence();
    product_rows<T, ROWS, D>(s, at_k, q);
    wgmma_commit();
    product_rows<T, ROWS, E>(dp, at_v, d_o);
    wgmma_commit();
    wgmma_wait<1>();
    wgmma_keep(s);
    const int *limit = table[t % 3].limit;
    const float4 *two = (const float4 *)(stat + (t & 1) * ROWS);
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++) {
      const float4 r = two[4 * j + lane % 4]; /* of columns 8j + 2(lane % 4) and + 1 */
      const int2 n = ((const int2 *)limit)[4 * j + lane % 4];
      s[4 * j] = key < n.x ? exp2f(fmaf(s[4 * j], c, -r.x)) : 0;
      s[4 * j + 1] = key < n.y ? exp2f(fmaf(s[4 * j + 1], c, -r.z)) : 0;
      s[4 * j + 2] = key + 8 < n.x ? exp2f(fmaf(s[4 * j + 2], c, -r.x)) : 0;
      s[4 * j + 3] = key + 8 < n.y ? exp2f(fmaf(s[4 * j + 3], c, -r.z)) : 0;
    }
    uint32_t a[ROWS / 4];
    pack_all<T>(a, s);
    wgmma_wait<0>();
    wgmma_keep(dp);
    wgmma_fence();
    product_columns<T, EV, ROWS>(dv, a, d_o + group * (EV / 64) * (ROWS * 128), true);
    wgmma_commit();
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++) {
      const float4 r = two[4 * j + lane % 4];
      dp[4 * j] = s[4 * j] * (dp[4 * j] - r.y);
      dp[4 * j + 1] = s[4 * j + 1] * (dp[4 * j + 1] - r.w);
      dp[4 * j + 2] = s[4 * j + 2] * (dp[4 * j + 2] - r.y);
      dp[4 * j + 3] = s[4 * j + 3] * (dp[4 * j + 3] - r.w);
    }
    uint32_t b[ROWS / 4];
    pack_all<T>(b, dp);
    wgmma_fence();
    product_columns<T, DK, ROWS>(dk, b, q + group * (DK / 64) * (ROWS * 128), true);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_keep(dv);
    wgmma_keep(dk);
  }

  if (item.sum < 0) {
    put_keys<DK>(p.a.dk, p.a.acc_k, keys, kh, group * DK, dk, p.a.scale, p.a.aligned);
    put_keys<EV>(p.a.dv, p.a.acc_v, keys, kh, group * EV, dv, 1, p.a.aligned);
    return;
  }
  const int64_t which = (z * p.sums + item.sum) * p.parts + part;
  float4 *to = sum_at<DK>(p.sum_k, which, D, group * DK);
#pragma unroll
  for (int i = 0; i < DK / 8; i++)
    to[128 * i] = make_float4(dk[4 * i], dk[4 * i + 1], dk[4 * i + 2], dk[4 * i + 3]);
  to = sum_at<EV>(p.sum_v, which, E, group * EV);
#pragma unroll
  for (int i = 0; i < EV / 8; i++)
    to[128 * i] = make_float4(dv[4 * i], dv[4 * i + 1], dv[4 * i + 2], dv[4 * i + 3]);
}

template <int W>
__device__ __forceinline__ void add_sums(float (&x)[W / 2], float *sums, int64_t first, int64_t step, int n,
                                         int width, int column) {
  for (int s = 0; s < n; s++) {
    const float4 *from = sum_at<W>(sums, first + s * step, width, column);
#pragma unroll
    for (int i = 0; i < W / 8; i++) {
      const float4 v = from[128 * i];
      x[4 * i] += v.x, x[4 * i + 1] += v.y, x[4 * i + 2] += v.z, x[4 * i + 3] += v.w;
    }
  }
}

/* Adds up the sums of a list of several items, first to last. */
template <class T, int D, int E>
__global__ void __launch_bounds__(shape<T, D, E>::THREADS) keys_sum(const __grid_constant__ rgk_select p) {
  using X = shape<T, D, E>;
  constexpr int DK = X::DK, EV = X::EV;
  const int z = blockIdx.z, kh = p.head + z, part = blockIdx.y, group = threadIdx.x / 128;
  const int64_t slot = blockIdx.x, *start = p.csr.start + kh * (p.csr.slots + 1) + slot;
  const int first = p.sum[z * p.csr.slots + slot];
  if (first < 0) return;
  const select_keys keys = find_keys(p, slot, part);
  if (keys.n == 0) return;
  const int n = (int)((start[1] - start[0] + p.length - 1) / p.length);
  const int64_t which = (z * p.sums + first) * p.parts + part;
  float dk[DK / 2] = {};
  add_sums<DK>(dk, p.sum_k, which, p.parts, n, D, group * DK);
  put_keys<DK>(p.a.dk, p.a.acc_k, keys, kh, group * DK, dk, p.a.scale, p.a.aligned);
  float dv[EV / 2] = {};
  add_sums<EV>(dv, p.sum_v, which, p.parts, n, E, group * EV);
  put_keys<EV>(p.a.dv, p.a.acc_v, keys, kh, group * EV, dv, 1, p.a.aligned);
}

} // namespace

#define INSTANCE(dtype, d, e)                                                                                \
  if (t == dtype && D == d && E == e)                                                                        \
    return sum ? (const void *)keys_sum<element<dtype>::type, d, e>                                          \
               : (const void *)gradient<element<dtype>::type, d, e>;

static const void *instance(rg_dtype t, int32_t D, int32_t E, bool sum) {
  RGK_SELECT_INSTANCES(INSTANCE)
  return nullptr;
}

const void *rgk_select_dkv(rg_dtype t, int32_t D, int32_t E) { return instance(t, D, E, false); }
const void *rgk_select_keys_sum(rg_dtype t, int32_t D, int32_t E) { return instance(t, D, E, true); }
