/* kernels/select_dq_sm90.cu: gradient of the queries of attention over selected blocks (see select.h).
 *
 *   S [64 rows, 64 keys] = Q K^T    dP = dO V^T    dS = p (dP - delta), p = exp2(S c - lse)    dQ = dS K
 *
 * Shared memory: K, V; Q and dO twice; row tables and statistics.
 */
#include "device/select.cuh"

using namespace rgk;

namespace {

/* Partials: see select.h. */
template <class T> struct partial { using type = T; };
template <> struct partial<__half> { using type = float; };

template <class T, int D, int E>
__global__ void __launch_bounds__(RGK_SELECT_THREADS, D + E > 320 ? 1 : 2)
    gradient(const __grid_constant__ rgk_select p) {
  enum { ROWS = 64, THREADS = RGK_SELECT_THREADS };
  using P = typename partial<T>::type;
  extern __shared__ char raw[];
  const int z = blockIdx.z, kh = p.head + z, part = blockIdx.y;
  if (blockIdx.x >= p.items[z]) return;
  const rgk_select_item item = p.item[z * p.cap + blockIdx.x];
  const select_keys keys = find_keys(p, item.slot, part);
  if (keys.n == 0) return;

  constexpr uint32_t size_q = 8192 * ((D + 63) / 64), size_o = 8192 * ((E + 63) / 64);
  const uint32_t at_k = (smem_at(raw) + 1023) & ~1023u, at_v = at_k + size_q, at_q = at_v + size_o,
                 at_o = at_q + 2 * size_q, at_stat = at_o + 2 * size_o;
  const float2 *stat = (const float2 *)(raw + (at_stat - smem_at(raw)));
  row_table<ROWS> *table = (row_table<ROWS> *)(stat + 2 * ROWS);
  int64_t(*stat_row)[ROWS] = (int64_t(*)[ROWS])(table + 3);
  const int rows = item.count * p.a.G, tiles = (rows + ROWS - 1) / ROWS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t places = (int64_t)p.a.N * p.parts * p.a.G;

  load_keys<D, THREADS>(at_k, p.a.k, keys, kh, p.a.aligned);
  load_keys<E, THREADS>(at_v, p.a.v, keys, kh, p.a.aligned);

  row_walk<ROWS> walk(p, item, keys, kh);
  auto write_table = [&](int t) {
    row_table<ROWS> &x = table[t % 3];
    const int r = threadIdx.x, head = walk.head + walk.g;
    const bool real = walk.row >= 0;
    x.q[r] = real ? walk.row * p.a.q.row + head * p.a.q.head : -1;
    x.d_o[r] = real ? walk.row * p.a.d_o.row + head * p.a.d_o.head : -1;
    x.at[r] = (z * p.rows + walk.row - p.row) * places + (walk.place * p.parts + part) * p.a.G + walk.g;
    x.limit[r] = real ? walk.limit() : 0;
    stat_row[t % 3][r] = real ? (int64_t)walk.row * p.a.H + head : -1;
    walk.fetch();
  };
  auto gather_tile = [&](int t) {
    const row_table<ROWS> &x = table[t % 3];
    gather<ROWS, D, THREADS>(at_q + (t & 1) * size_q, p.a.q.data, x.q, p.a.aligned);
    gather<ROWS, E, THREADS>(at_o + (t & 1) * size_o, p.a.d_o.data, x.d_o, p.a.aligned);
    if (threadIdx.x < ROWS) {
      const int64_t at = stat_row[t % 3][threadIdx.x];
      copy8(at_stat + ((t & 1) * ROWS + threadIdx.x) * 8, p.stat + (at < 0 ? 0 : 2 * at), at >= 0);
    }
  };
  if (threadIdx.x < ROWS) {
    walk.fetch();
    write_table(0);
    write_table(1);
  }
  __syncthreads();
  gather_tile(0);
  copies_commit();

  const float c = p.a.scale * LOG2E;
  for (int t = 0; t < tiles; t++) {
    copies_wait();
    proxy_fence();
    __syncthreads();
    if (threadIdx.x < ROWS) write_table(t + 2);
    if (t + 1 < tiles) gather_tile(t + 1);
    copies_commit();

    float s[32], dp[32], dq[D / 2];
    wgmma_fence();
    product_rows<T, 64, D>(s, at_q + (t & 1) * size_q, at_k);
    wgmma_commit();
    product_rows<T, 64, E>(dp, at_o + (t & 1) * size_o, at_v);
    wgmma_commit();
    const int r0 = warp * 16 + lane / 4;
    const row_table<ROWS> &mine = table[t % 3];
    const int limit[2] = {mine.limit[r0], mine.limit[r0 + 8]};
    const float2 row[2] = {stat[(t & 1) * ROWS + r0], stat[(t & 1) * ROWS + r0 + 8]};
    wgmma_wait<1>();
    wgmma_keep(s);
#pragma unroll
    for (int i = 0; i < 32; i++) s[i] = exp2f(fmaf(s[i], c, -row[i / 2 % 2].x));
    wgmma_wait<0>();
    wgmma_keep(dp);
#pragma unroll
    for (int i = 0; i < 32; i++)
      s[i] = i / 4 * 8 + lane % 4 * 2 + i % 2 < limit[i / 2 % 2] ? s[i] * (dp[i] - row[i / 2 % 2].y) : 0;
    uint32_t a[16];
    pack_all<T>(a, s);
    wgmma_fence();
    product_columns<T, D, 64>(dq, a, at_k, false);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_keep(dq);

#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (limit[i] <= 0) continue;
      P *const to = (P *)p.part + mine.at[r0 + 8 * i] * D;
      enum { PAIRS = 8 / sizeof(P) };
#pragma unroll
      for (int j = 0; j < D / (8 * PAIRS); j++) {
        float x[2 * PAIRS];
#pragma unroll
        for (int k = 0; k < 2 * PAIRS; k++)
          x[k] = dq[4 * (PAIRS * j + k / 2) + 2 * i + k % 2] * p.a.scale;
        uint4 v;
        if constexpr (sizeof(P) == 4)
          v = make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                         __float_as_uint(x[3]));
        else
          v = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                         pack2<T>(x[6], x[7]));
        ((uint4 *)to)[4 * j + lane % 4] = v;
      }
    }
  }
}

} // namespace

#define INSTANCE(dtype, d, e)                                                                                \
  if (t == dtype && D == d && E == e) return (const void *)gradient<element<dtype>::type, d, e>;

const void *rgk_select_dq(rg_dtype t, int32_t D, int32_t E) {
  RGK_SELECT_INSTANCES(INSTANCE)
  return nullptr;
}
