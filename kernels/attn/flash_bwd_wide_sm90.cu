/* kernels/attn/flash_bwd_wide_sm90.cu: flash_bwd for heads wider than 128, whose sums do not fit
   flash_bwd_sm90.cu's cut: tiles of 64 keys, and both warpgroups work on all of them.

     S^T, dP^T, dS^T [64 keys, 64 queries]   each warpgroup forms 32 queries' columns; P^T and dS^T
                                             go to shared memory
     dV, dK, dQ                              each warpgroup sums half of the columns: panels of
                                             64, of an odd number the middle one is shared
 */
#include "flash_bwd_parts.cuh"

using namespace rgk;

#ifndef RGK_DEV
namespace {

constexpr int KEYS = 64;

/* Half of the columns of a matrix of `panels` panels, as accumulators: whole panels, and half of
 * the middle one. */
template <class T, int panels> struct half {
  static constexpr int whole = panels / 2, odd = panels % 2;
  float a[32 * whole], b[odd ? 16 : 4];

  __device__ __forceinline__ void zero() {
    for (float &x : a) x = 0;
    for (float &x : b) x = 0;
  }
  __device__ __forceinline__ static int first(int wg) { return wg ? panels - whole : 0; }

  /* += A B over 64 of k; A: `a_mn` or not, B: rows of k, panels of 8192 bytes. */
  template <bool a_mn>
  __device__ __forceinline__ void add(uint32_t A, uint32_t B, int wg, bool fresh) {
    const uint32_t at = B + first(wg) * 8192, mid = B + whole * 8192 + wg * 64;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint64_t x = a_mn ? desc_mn(A + k * 2048, 8192) : desc_k(A + k * 32);
      wgmma<T, 64 * whole>::template ss<a_mn, true>(a, x, desc_mn(at + k * 2048, 8192),
                                                    !fresh || k > 0);
      if constexpr (odd)
        wgmma<T, 32>::template ss<a_mn, true>(b, x, desc_mn(mid + k * 2048, 8192), !fresh || k > 0);
    }
  }
  __device__ __forceinline__ void keep() {
    wgmma_keep(a);
    wgmma_keep(b);
  }
  /* Registers of a thread, in units of four. */
  __device__ __forceinline__ static constexpr int quads() {
    return 8 * whole + 4 * odd;
  }
  __device__ __forceinline__ void hand(float4 *sum, bool add_to, bool leave, int t) {
    hand_on(a, sum, add_to, leave, t);
    if constexpr (odd) hand_on(b, sum + 8 * whole * 128, add_to, leave, t);
  }
  __device__ __forceinline__ void put(const rgk_tensor &y, int64_t row, int kh, int keys, int key,
                                      int width, float scale, bool add_to, int wg) const {
    put_keys<true>(y, add_to, row, kh, key, keys, first(wg) * 64, width, a, scale);
    if constexpr (odd)
      put_keys<true>(y, add_to, row, kh, key, keys, whole * 64 + wg * 32, width, b, scale);
  }
};

/* 16 columns a time of dQ [64, 64 of a panel] from group g on. */
template <int N>
__device__ __forceinline__ void give(const float (&d)[N], uint32_t panel, int g, int lane,
                                     int warp) {
  const uint32_t row = panel + (16 * warp + lane / 4) * 256 + (lane & 3) * 16;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const uint32_t to = row + (g + j) / 4 * ROWS * 256 + ((g + j) % 4 ^ (lane / 4 & 1)) * 64;
    write4(to, d[8 * j], d[8 * j + 1], d[8 * j + 4], d[8 * j + 5]);
    write4(to + 8 * 256, d[8 * j + 2], d[8 * j + 3], d[8 * j + 6], d[8 * j + 7]);
  }
}

template <class T, class L>
__device__ __forceinline__ void compute(const rgk_flash_bwd &p, const bwd_item &x,
                                        bwd_barriers *bar, int wg, int t) {
  const rgk_attn &a = p.a;
  const int lane = t & 31, warp = t >> 5, both = 128 * wg + t;
  const uint32_t base = smem_at(bwd_smem), K = base + L::k, V = base + L::v;
  const float scale2 = a.scale * LOG2E;
  const int64_t k0 = (int64_t)x.tile * KEYS;
  const int keys = (int)min(x.s.keys - k0, (int64_t)KEYS), key = 16 * warp + lane / 4;
  half<T, L::k_panels> dk;
  half<T, L::v_panels> dv;
  dk.zero();
  dv.zero();

  const int steps = (x.m1 - x.m0) * a.G;
  if (steps > 0) {
    await_keys<L>(bar, keys, both);
  } else if (x.turns > 0) {
    return;
  }
  ring<L::stages> at;
  for (int i = 0; i < steps; i++, at.next()) {
    const uint32_t Q = base + L::q + at.stage * L::k_panels * L::q_panel,
                   dO = base + L::d_o + at.stage * L::v_panels * L::q_panel,
                   P = base + L::p + (i & 1) * 8192, dS = base + L::ds + (i & 1) * 8192;
    const uint32_t lse = base + L::rows + at.stage * 512 + wg * 128 + (lane & 3) * 8,
                   delta = lse + 256;
    bar_wait(&bar->q_full[at.stage], at.parity);
    bar_wait(&bar->o_full[at.stage], at.parity);
    const step st = bar->steps[at.stage];
    if (st.n < ROWS) clear_queries<L>(at.stage, st.n, both);
    float s[16], dp[16];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4 * L::k_panels; k++)
      wgmma<T, 32>::ss(s, desc_k(K + k / 4 * 8192 + k % 4 * 32),
                       desc_k(Q + wg * 4096 + k / 4 * 8192 + k % 4 * 32), k > 0);
    wgmma_commit();
#pragma unroll
    for (int k = 0; k < 4 * L::v_panels; k++)
      wgmma<T, 32>::ss(dp, desc_k(V + k / 4 * 8192 + k % 4 * 32),
                       desc_k(dO + wg * 4096 + k / 4 * 8192 + k % 4 * 32), k > 0);
    wgmma_commit();
    wgmma_wait<1>();
    wgmma_keep(s);
    weigh(s, lse, scale2);
    if (st.masked) mask(s, a, st, key, keys, 32 * wg + 2 * (lane & 3));
    wgmma_wait<0>();
    wgmma_keep(dp);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 l = read2(delta + 32 * j);
      dp[4 * j] = s[4 * j] * (dp[4 * j] - l.x);
      dp[4 * j + 1] = s[4 * j + 1] * (dp[4 * j + 1] - l.y);
      dp[4 * j + 2] = s[4 * j + 2] * (dp[4 * j + 2] - l.x);
      dp[4 * j + 3] = s[4 * j + 3] * (dp[4 * j + 3] - l.y);
    }
    {
      const int row = 16 * warp + (lane & 15);
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const uint32_t to = row * 128 + ((4 * wg + 2 * k + (lane >> 4)) ^ (row & 7)) * 16;
        store_matrices<T>(P + to, s + 8 * k);
        store_matrices<T>(dS + to, dp + 8 * k);
      }
    }
    proxy_fence();
    named_sync(BOTH, 2 * WARPGROUP);

    half<T, L::k_panels> dq;
    wgmma_fence();
    dv.template add<false>(P, dO, wg, false);
    dk.template add<false>(dS, Q, wg, false);
    dq.template add<true>(dS, K, wg, true);
    wgmma_commit();
    const waited done = wgmma_wait<0>();
    dv.keep();
    dk.keep();
    dq.keep();
    warp_release(&bar->q_empty[at.stage], done, dk.a[0]); /* lse, delta, `steps` went into dK */
    warp_release(&bar->o_empty[at.stage], done);
    if (i > 0) bar_wait(&bar->dq_empty[((i - 1) & 1) * 2], (i - 1) >> 1 & 1);
    give(dq.a, base + L::dq, dq.first(wg) * 4, lane, warp);
    if constexpr (dq.odd) give(dq.b, base + L::dq, dq.whole * 4 + wg * 2, lane, warp);
    proxy_fence();
    warp_ready(&bar->dq_full[(i & 1) * 2]);
  }

  if (x.turns > 1) {
    const bwd_sum sum = bwd_sum_of(p, x, wg);
    const bool add = p.parts == 1 && x.turn > 0, leave = p.parts > 1 || x.turn < x.turns - 1;
    bwd_await_turn(p, x, sum, wg, t);
    dk.hand(sum.at, add, leave, t);
    dv.hand(sum.at + dk.quads() * 128, add, leave, t);
    if (bwd_handed(p, x, sum, wg, t)) return;
  }
  const int64_t row = x.s.k_begin + k0;
  const bool seen = steps > 0; /* else there is nothing to add */
  if (a.dk.data && (seen || !a.acc_k))
    dk.put(a.dk, row, x.kh, keys, key, a.D, a.scale, a.acc_k, wg);
  if (a.dv.data && (seen || !a.acc_v)) dv.put(a.dv, row, x.kh, keys, key, a.E, 1, a.acc_v, wg);
}

template <class T, class L>
__global__ void __launch_bounds__(RGK_FLASH_BWD_THREADS, 1)
    flash_bwd_wide(const __grid_constant__ rgk_flash_bwd p) {
  bwd_barriers *bar = (bwd_barriers *)(bwd_smem + L::bars);
  if (!bwd_begin(p, bar, 8)) return;
  const bwd_item &x = bar->item;
  const int wg = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (wg == 2) {
    fewer_registers<24>();
    bwd_serve<L, L::k_panels>(p, x, bar);
  } else {
    more_registers<240>();
    compute<T, L>(p, x, bar, wg, threadIdx.x % 128);
  }
}

} // namespace
#endif

const void *rgk_flash_bwd_wide(rg_dtype type, int32_t width) {
#define INSTANCE(t, T, w, e) \
  if (type == t && width == w) return (const void *)flash_bwd_wide<T, bwd_plan<KEYS, w, e>>;
#ifndef RGK_DEV
  INSTANCE(RG_BF16, __nv_bfloat16, 192, 128)
  INSTANCE(RG_BF16, __nv_bfloat16, 256, 256)
  INSTANCE(RG_F16, __half, 192, 128)
  INSTANCE(RG_F16, __half, 256, 256)
#endif
  (void)type, (void)width;
  return nullptr;
}
