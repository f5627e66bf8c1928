/* kernels/attn/flash_bwd_sm90.cu: dQ, dK, dV of swa_attn and cmp_attn on Hopper.

     S = Q K^T    P = exp(scale S - lse)    dP = dO V^T    dS = P (dP - delta)
     dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K

   A block has one item (flash_bwd.cuh): 128 keys, against a chunk of queries, 64 of one head at a
   time. Scores are formed transposed: each of two warpgroups owns 64 keys, so that P^T and dS^T are
   in the registers from which dV += P^T dO and dK += dS^T Q take them. dS^T also goes to shared
   memory: dQ = dS K sums over the keys of both, each forms half of its columns, a step late, so
   that neither waits for the other. A third warpgroup lends its registers to them; one of its
   threads loads, two have the copy engine add dQ to memory.

   Every sum has a fixed order. dK and dV are summed over heads and queries in registers; the chunks
   of a sequence add them up in fp32 in memory, each waiting for the one before (kv_done). dQ is
   summed over key tiles in memory by the copy engine, each tile waiting for its right neighbour
   (dq_done). Items begin in an order in which nobody waits for one that has not begun.

     dQ's rows       four groups of 16 columns, group i at i ^ (row & 1); in a group the columns
                     stand as lanes hold them: 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15
 */
#include "flash_bwd_parts.cuh"

using namespace rgk;

namespace {

constexpr int KEYS = 128;
template <int W> using plan = bwd_plan<KEYS, W, W>;

/* One of the two warpgroups that compute. */
template <class T, int W> struct worker {
  using L = plan<W>;
  const rgk_flash_bwd &p;
  const bwd_item &x;
  bwd_barriers *bar;
  int wg, t, lane, warp;
  uint32_t base, K, V;

  /* S^T = K Q^T */
  __device__ __forceinline__ void scores(float (&s)[32], int stage) const {
    const uint32_t Q = base + L::q + stage * L::k_panels * L::q_panel;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < W / 16; i++)
      wgmma<T, 64>::ss(s, desc_k(K + i / 4 * L::k_panel + i % 4 * 32),
                       desc_k(Q + i / 4 * L::q_panel + i % 4 * 32), i > 0);
    wgmma_commit();
  }

  /* dP^T = V dO^T */
  __device__ __forceinline__ void slopes(float (&dp)[32], uint32_t dO) const {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < W / 16; k++)
      wgmma<T, 64>::ss(dp, desc_k(V + k / 4 * L::k_panel + k % 4 * 32),
                       desc_k(dO + k / 4 * L::q_panel + k % 4 * 32), k > 0);
    wgmma_commit();
  }

  /* dV += P^T dO, dK += dS^T Q: a in registers, `rows` the queries' */
  __device__ __forceinline__ void add(float (&d)[W / 2], uint32_t (&a)[16], uint32_t rows) const {
    wgmma_keep(a);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++)
      wgmma<T, W>::template rs<true>(d, a + 4 * k, desc_mn(rows + k * 2048, L::q_panel), 1);
    wgmma_commit();
  }

  /* dQ = dS K of step i, this warpgroup's half of the columns */
  __device__ __forceinline__ void queries(float (&dq)[W / 4], int i) const {
    const uint32_t dS = base + L::ds + (i & 1) * KEYS * 128,
                   part = base + L::k + (W == 64 ? wg * 64 : wg * L::k_panel);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++)
      wgmma<T, W / 2>::template ss<true, true>(dq, desc_mn(dS + k * 2048, 8192),
                                               desc_mn(part + k * 2048, L::k_panel), k > 0);
    wgmma_commit();
  }
  __device__ __forceinline__ void give(const float (&dq)[W / 4], int i) const {
    const int panel = W == 64 ? 0 : wg;
    const uint32_t row = base + L::dq + ((i & 1) * L::k_panels + panel) * ROWS * 256 +
                         (16 * warp + lane / 4) * 256 + (lane & 3) * 16;
    bar_wait(&bar->dq_empty[(i & 1) * 2 + panel], i >> 1 & 1 ^ 1);
#pragma unroll
    for (int j = 0; j < W / 32; j++) {
      const uint32_t to = row + ((W == 64 ? 2 * wg + j : j) ^ (lane / 4 & 1)) * 64;
      write4(to, dq[8 * j], dq[8 * j + 1], dq[8 * j + 4], dq[8 * j + 5]);
      write4(to + 8 * 256, dq[8 * j + 2], dq[8 * j + 3], dq[8 * j + 6], dq[8 * j + 7]);
    }
    proxy_fence();
    warp_ready(&bar->dq_full[(i & 1) * 2 + panel]);
  }

  /* dS^T for dQ, where both warpgroups read it */
  __device__ __forceinline__ void show(const uint32_t (&ds)[16], int stage) const {
    const int row = 64 * wg + 16 * warp + (lane & 15);
    const uint32_t dS = base + L::ds + stage * KEYS * 128,
                   to = dS + row * 128 + ((lane >> 4) ^ (row & 7)) * 16;
#pragma unroll
    for (int k = 0; k < 4; k++) store_matrices(to ^ (k * 32), ds + 4 * k);
    proxy_fence();
    warp_ready(&bar->ds_full[stage]);
  }

  /* All steps; s holds the scores of the next. `key`: the thread's first, of `keys`. */
  __device__ __forceinline__ void walk(float (&dk)[W / 2], float (&dv)[W / 2], int steps, int key,
                                       int keys) const {
    const float scale2 = p.a.scale * LOG2E;
    float s[32];
    bar_wait(&bar->q_full[0], 0);
    scores(s, 0);
    wgmma_wait<0>();
    wgmma_keep(s);

    for (int i = 0; i < steps; i++) {
      const uint32_t stage = i & 1, parity = i >> 1 & 1;
      const uint32_t Q = base + L::q + stage * L::k_panels * L::q_panel,
                     dO = base + L::d_o + stage * L::k_panels * L::q_panel;
      const uint32_t lse = base + L::rows + stage * 512 + (lane & 3) * 8, delta = lse + 256;
      const bool masked = bar->steps[stage].masked;

      bar_wait(&bar->o_full[stage], parity);
      if (masked) {
        const int n = bar->steps[stage].n;
        if (n < ROWS) clear_queries<L>(stage, n, 128 * wg + t);
      }
      float dp[32];
      slopes(dp, dO);
      weigh(s, lse, scale2);
      if (masked) mask(s, p.a, bar->steps[stage], key, keys, 2 * (lane & 3));
      uint32_t pt[16];
#pragma unroll
      for (int j = 0; j < 16; j++) pt[j] = pack2<T>(s[2 * j], s[2 * j + 1]);
      add(dv, pt, dO);

      float dq[W / 4];
      if (i > 0) bar_wait(&bar->ds_full[stage ^ 1], (i - 1) >> 1 & 1);
      /* of step i - 1; before the first step: of whatever is there, for nothing */
      queries(dq, i + 1);

      wgmma_wait<2>();
      wgmma_keep(dp);
      uint32_t ds[16];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float2 l = read2(delta + 32 * j), p0 = unpack2<T>(pt[2 * j]),
                     p1 = unpack2<T>(pt[2 * j + 1]);
        ds[2 * j] = pack2<T>(p0.x * (dp[4 * j] - l.x), p0.y * (dp[4 * j + 1] - l.y));
        ds[2 * j + 1] = pack2<T>(p1.x * (dp[4 * j + 2] - l.x), p1.y * (dp[4 * j + 3] - l.y));
      }
      add(dk, ds, Q);

      wgmma_wait<1>(); /* dV and dQ are done */
      wgmma_keep(dv);
      wgmma_keep(pt);
      wgmma_keep(dq);
      if (i > 0) give(dq, i - 1);
      show(ds, stage);

      if (i + 1 < steps) bar_wait(&bar->q_full[stage ^ 1], (i + 1) >> 1 & 1);
      scores(s, stage ^ 1); /* after the last step: of whatever is there, for nothing */
      const waited done = wgmma_wait<1>();
      wgmma_keep(dk);
      warp_release(&bar->q_empty[stage], done, dk[0]); /* lse, delta and `steps` went into dK */
      warp_release(&bar->o_empty[stage], done);
      wgmma_wait<0>();
      wgmma_keep(s);
    }
    float dq[W / 4];
    bar_wait(&bar->ds_full[(steps - 1) & 1], (steps - 1) >> 1 & 1);
    queries(dq, steps - 1);
    wgmma_wait<0>();
    wgmma_keep(dq);
    give(dq, steps - 1);
  }

  __device__ __forceinline__ void run() const {
    const rgk_attn &a = p.a;
    const int64_t k0 = (int64_t)x.tile * KEYS;
    const int keys = (int)min(x.s.keys - k0, (int64_t)KEYS), key = 64 * wg + 16 * warp + lane / 4;
    float dk[W / 2], dv[W / 2];
#pragma unroll
    for (int i = 0; i < W / 2; i++) dk[i] = dv[i] = 0;

    const int steps = (x.m1 - x.m0) * a.G;
    if (steps > 0) {
      await_keys<L>(bar, keys, 128 * wg + t);
      walk(dk, dv, steps, key, keys);
    } else if (x.turns > 0) {
      return;
    }

    if (x.turns > 1) {
      const bwd_sum sum = bwd_sum_of(p, x, wg);
      const bool add = p.parts == 1 && x.turn > 0, leave = p.parts > 1 || x.turn < x.turns - 1;
      bwd_await_turn(p, x, sum, wg, t);
      hand_on(dk, sum.at, add, leave, t);
      hand_on(dv, sum.at + W / 8 * 128, add, leave, t);
      if (bwd_handed(p, x, sum, wg, t)) return;
    }
    const int64_t row = x.s.k_begin + k0;
    const bool seen = steps > 0; /* else there is nothing to add */
    if (a.dk.data && (seen || !a.acc_k))
      put_keys<true>(a.dk, a.acc_k, row, x.kh, key, keys, 0, a.D, dk, a.scale);
    if (a.dv.data && (seen || !a.acc_v))
      put_keys<true>(a.dv, a.acc_v, row, x.kh, key, keys, 0, a.E, dv, 1);
  }
};

template <class T, int W>
__global__ void __launch_bounds__(RGK_FLASH_BWD_THREADS, 1)
    flash_bwd(const __grid_constant__ rgk_flash_bwd p) {
  using L = plan<W>;
  bwd_barriers *bar = (bwd_barriers *)(bwd_smem + L::bars);
  if (!bwd_begin(p, bar, W == 64 ? 8 : 4)) return;
  const bwd_item &x = bar->item;
  const int wg = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (wg == 2) {
    fewer_registers<24>();
    bwd_serve<L, 1>(p, x, bar);
  } else {
    more_registers<240>();
    const int t = threadIdx.x % 128;
    const uint32_t base = smem_at(bwd_smem);
    worker<T, W>{
        p, x, bar, wg, t, t & 31, t >> 5, base, base + L::k + wg * 8192, base + L::v + wg * 8192}
        .run();
  }
}

} // namespace

const void *rgk_flash_bwd_main(rg_dtype type, int32_t width) {
#define INSTANCE(t, T, w) \
  if (type == t && width == w) return (const void *)flash_bwd<T, w>;
  INSTANCE(RG_BF16, __nv_bfloat16, 128)
  INSTANCE(RG_BF16, __nv_bfloat16, 64)
#ifndef RGK_DEV
  INSTANCE(RG_F16, __half, 128)
  INSTANCE(RG_F16, __half, 64)
#endif
  return nullptr;
}
