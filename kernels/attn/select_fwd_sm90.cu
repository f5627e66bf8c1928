/* kernels/attn/select_fwd_sm90.cu: forward of attention over selected blocks (see select.h).

     S [64 rows, 64 keys] = Q K^T    p = exp2(S c - m)
     O [64 rows, E] = p V, over its row's sum of p

   One warpgroup; several blocks on a multiprocessor hide each other's waiting.
 */
#include "select.cuh"

using namespace rgk;

namespace {

constexpr int ROWS = 64, THREADS = RGK_SELECT_THREADS;

template <int D, int E> struct shared {
  alignas(1024) char k[(D + 63) / 64][RGK_SELECT_KEYS * 128];
  char v[(E + 63) / 64][RGK_SELECT_KEYS * 128];
  char q[2][(D + 63) / 64 * ROWS * 128];
  row_table<ROWS> table[3];
};

template <class T, int D, int E>
__global__ void __launch_bounds__(RGK_SELECT_THREADS, D + E > 320 ? 1
                                                      : D > 128   ? 2
                                                                  : 3)
    forward(const __grid_constant__ rgk_select p) {
  extern __shared__ __align__(1024) char raw[];
  static_assert(sizeof(shared<D, E>) <= rgk_select_shared_fwd(D, E), "as the host counts");
  shared<D, E> &sh = *(shared<D, E> *)raw;
  const int z = blockIdx.z, kh = p.head + z, part = blockIdx.y;
  if (blockIdx.x >= p.items[z]) return;
  const rgk_select_item item = p.item[z * p.cap + blockIdx.x];
  const select_keys keys = find_keys(p, item.slot, part);
  if (keys.n == 0) return;

  const uint32_t at_k = smem_at(sh.k), at_v = smem_at(sh.v);
  const int rows = item.count * p.a.G, tiles = (rows + ROWS - 1) / ROWS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t places = (int64_t)p.a.N * p.parts * p.a.G;

  load_keys<D, THREADS>(at_k, p.a.k, keys, kh, p.a.aligned, threadIdx.x);
  load_keys<E, THREADS>(at_v, p.a.v, keys, kh, p.a.aligned, threadIdx.x);

  row_walk<ROWS> walk(p, item, keys, kh);
  auto write_table = [&](int t) {
    row_table<ROWS> &x = sh.table[t % 3];
    const int r = threadIdx.x;
    const bool real = walk.row >= 0;
    x.q[r] = real ? walk.row * p.a.q.row + (walk.head + walk.g) * p.a.q.head : -1;
    x.at[r] =
        (z * p.rows + walk.row - p.row) * places + (walk.place * p.parts + part) * p.a.G + walk.g;
    x.limit[r] = real ? walk.limit() : 0;
    walk.fetch(p);
  };
  if (threadIdx.x < ROWS) {
    walk.fetch(p);
    write_table(0);
    write_table(1);
  }
  __syncthreads();
  gather<ROWS, D, THREADS>(smem_at(sh.q[0]), p.a.q.data, sh.table[0].q, p.a.aligned);
  copies_commit();

  const float c = p.a.scale * LOG2E;
  for (int t = 0; t < tiles; t++) {
    copies_wait<0>();
    proxy_fence();
    __syncthreads();
    if (threadIdx.x < ROWS) write_table(t + 2);
    if (t + 1 < tiles)
      gather<ROWS, D, THREADS>(smem_at(sh.q[(t + 1) & 1]), p.a.q.data, sh.table[(t + 1) % 3].q,
                               p.a.aligned);
    copies_commit();

    const row_table<ROWS> &mine = sh.table[t % 3];
    float s[32], o[E / 2];
    wgmma_fence();
    product_rows<T, 64, D>(s, smem_at(sh.q[t & 1]), at_k);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_keep(s);

    const int r0 = warp * 16 + lane / 4;
    int limit[2] = {mine.limit[r0], mine.limit[r0 + 8]};
    if (__any_sync(~0u, limit[0] < 64 || limit[1] < 64)) {
      const int seen[2] = {limit[0] - lane % 4 * 2, limit[1] - lane % 4 * 2};
      each(s, [&](float &x, int i, int column) {
        if (column >= seen[i]) x = -INFINITY;
      });
    }
    float m[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    each(s, [&](float &x, int i, int) { m[i] = fmaxf(m[i], x); });
#pragma unroll
    for (int i = 0; i < 2; i++) {
      m[i] = fmaxf(m[i], __shfl_xor_sync(~0u, m[i], 1));
      m[i] = fmaxf(m[i], __shfl_xor_sync(~0u, m[i], 2)) * c;
      if (m[i] == -INFINITY) m[i] = 0;
    }
    each(s, [&](float &x, int i, int) {
      x = exp2f(fmaf(x, c, -m[i]));
      sum[i] += x;
    });
    uint32_t a[16];
    pack_all<T>(a, s);
    wgmma_fence();
    product_columns<T, E, 64>(o, a, at_v, false);
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
      sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    }
    wgmma_wait<0>();
    wgmma_keep(o);

#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (limit[i] <= 0) continue;
      const int64_t at = mine.at[r0 + 8 * i];
      const float x = 1 / sum[i];
      uint4 *to = (uint4 *)((T *)p.part + at * E) + lane % 4;
#pragma unroll
      for (int j = 0; j < E / 32; j++)
        to[4 * j] = make_uint4(pack2<T>(o[16 * j + 2 * i] * x, o[16 * j + 2 * i + 1] * x),
                               pack2<T>(o[16 * j + 4 + 2 * i] * x, o[16 * j + 5 + 2 * i] * x),
                               pack2<T>(o[16 * j + 8 + 2 * i] * x, o[16 * j + 9 + 2 * i] * x),
                               pack2<T>(o[16 * j + 12 + 2 * i] * x, o[16 * j + 13 + 2 * i] * x));
      if (lane % 4 == 0) p.part_lse[at] = m[i] + log2f(sum[i]);
    }
  }
}

} // namespace

#define INSTANCE(dtype, d, e) \
  if (t == dtype && D == d && E == e) return (const void *)forward<element<dtype>::type, d, e>;

const void *rgk_select_fwd(rg_dtype t, int32_t D, int32_t E) {
  RGK_SELECT_INSTANCES(INSTANCE)
  return nullptr;
}
