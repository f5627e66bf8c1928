/* kernels/flash_bwd_sm90.cu: dQ, dK, dV of swa_attn and cmp_attn on Hopper.
 *
 *   S = Q K^T    P = exp(scale S - lse)    dP = dO V^T    dS = P (dP - delta)
 *   dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K
 *
 * A block has one item (device/flash_bwd.cuh): 128 keys, against a chunk of queries, 64 of one head at a time.
 * Scores are formed transposed: each of two warpgroups owns 64 keys, so that P^T and dS^T are in the registers
 * from which dV += P^T dO and dK += dS^T Q take them; dS^T also goes through shared memory, since dQ = dS K
 * sums over the keys of both (each warpgroup computes half of its columns). A third warpgroup lends its
 * registers to them: its first warp loads, its second adds dQ to memory.
 *
 * Every sum has a fixed order. dK and dV are summed over heads and queries in registers; the chunks of a
 * sequence add them up in fp32 in memory, each waiting for the one before (kv_done). dQ is summed over key
 * tiles in memory by the copy engine, each tile waiting for its right neighbour (dq_done). Items begin in an
 * order in which nobody waits for one that has not begun.
 *
 *   shared memory   K [128, W]  V [128, W]  Q 2 x [64, W]  dO 2 x [64, W]  dS^T 2 x [128 keys, 64]
 *                   dQ [64, W] f32  rows 2 x (lse, delta)                    all but the last two in panels of
 *                   128-byte rows, swizzled
 *   dQ's rows       64-byte groups of 16 columns, group i at i ^ (row & 1); in a group the columns stand as
 *                   lanes hold them: 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15
 */
#include "device/element.cuh"
#include "device/flash_bwd.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"

using namespace rgk;

namespace {

constexpr int ROWS = RGK_FLASH_BWD_ROWS, KEYS = RGK_FLASH_BWD_KEYS;
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* ---- counters in memory that order the sums of blocks ---- */

__device__ __forceinline__ void await(const uint32_t *count, uint32_t n) {
  uint32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
  } while (now < n);
}
__device__ __forceinline__ void publish(uint32_t *count, uint32_t n) {
  __threadfence();
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(count), "r"(n) : "memory");
}

/* Ordinary and copy-engine accesses of global memory, in this order. */
__device__ __forceinline__ void proxy_fence_all() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void bulk_store(void *to, const void *from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(smem_at(from)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_add(float *to, const void *from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(smem_at(from)), "r"(bytes)
               : "memory");
}

/* ---- main ---- */

template <int W> struct plan {
  static constexpr int panels = W / 64;
  static constexpr uint32_t k_panel = KEYS * 128, q_panel = ROWS * 128;
  static constexpr uint32_t k = 0, v = k + panels * k_panel, q = v + panels * k_panel,
                            d_o = q + 2 * panels * q_panel, ds = d_o + 2 * panels * q_panel,
                            dq = ds + 2 * KEYS * 128, rows = dq + ROWS * W * 4, bars = rows + 2 * 512;
};
struct barriers {
  uint64_t kv, q_full[2], q_empty[2], o_full[2], o_empty[2], dq_full, dq_empty;
  int got;
  bwd_item item;
};
extern __shared__ __align__(1024) char smem[];

__device__ __forceinline__ float2 read2(uint32_t at) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at));
  return x;
}
__device__ __forceinline__ void write4(uint32_t at, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

/* The steps of an item: query tiles, for each the heads of the group. */
struct walk {
  int m, h, G;
  __device__ __forceinline__ void next() {
    if (++h == G) h = 0, m++;
  }
};

template <int W>
__device__ __forceinline__ void load(const rgk_flash_bwd &p, const bwd_item &x, barriers *bar) {
  using L = plan<W>;
  const int64_t k_row = x.s.k_begin + (int64_t)x.tile * KEYS;
  bar_expect(&bar->kv, 2 * L::panels * L::k_panel);
  for (int i = 0; i < L::panels; i++) {
    tma_load(smem + L::k + i * L::k_panel, &p.k, &bar->kv, 64 * i, x.kh, (int)k_row);
    tma_load(smem + L::v + i * L::k_panel, &p.v, &bar->kv, 64 * i, x.kh, (int)k_row);
  }
  ring<2> at;
  walk w{x.m0, 0, p.a.G};
  const int64_t slot0 = x.s.q_begin / ROWS + x.b;
  for (; w.m < x.m1; w.next(), at.next()) {
    const int head = x.kh * p.a.G + w.h, row = (int)(x.s.q_begin + (int64_t)w.m * ROWS);
    char *q = smem + L::q + at.stage * L::panels * L::q_panel,
         *d_o = smem + L::d_o + at.stage * L::panels * L::q_panel;
    bar_wait(&bar->q_empty[at.stage], at.parity ^ 1);
    bar_expect(&bar->q_full[at.stage], L::panels * L::q_panel + 512);
    for (int i = 0; i < L::panels; i++)
      tma_load(q + i * L::q_panel, &p.q, &bar->q_full[at.stage], 64 * i, head, row);
    bulk_load(smem + L::rows + at.stage * 512, p.rows + ((slot0 + w.m) * p.a.H + head) * 128, 512,
              &bar->q_full[at.stage]);
    bar_wait(&bar->o_empty[at.stage], at.parity ^ 1);
    bar_expect(&bar->o_full[at.stage], L::panels * L::q_panel);
    for (int i = 0; i < L::panels; i++)
      tma_load(d_o + i * L::q_panel, &p.d_o, &bar->o_full[at.stage], 64 * i, head, row);
  }
}

template <int W>
__device__ __forceinline__ void add_dq(const rgk_flash_bwd &p, const bwd_item &x, barriers *bar) {
  using L = plan<W>;
  walk w{x.m0, 0, p.a.G};
  uint32_t parity = 0;
  const int64_t slot0 = x.s.q_begin / ROWS + x.b;
  for (; w.m < x.m1; w.next(), parity ^= 1) {
    const int64_t i = (int64_t)w.m * ROWS, left = x.s.length - i;
    const int head = x.kh * p.a.G + w.h, n = left < ROWS ? (int)left : ROWS;
    const int turns = bwd_tiles_seen(p.a, x.s, i + n - 1), turn = turns - 1 - x.tile;
    uint32_t *done = p.dq_done + (slot0 + w.m) * p.a.H + head;
    float *to = p.dq + ((int64_t)(head - p.kh0 * p.a.G) * p.a.T + x.s.q_begin + i) * W;
    if (turn > 0) await(done, (uint32_t)turn);
    bar_wait(&bar->dq_full, parity);
    proxy_fence_all();
    if (turn > 0)
      bulk_add(to, smem + L::dq, n * W * 4);
    else
      bulk_store(to, smem + L::dq, n * W * 4);
    store_commit();
    store_wait_read<0>();
    bar_arrive(&bar->dq_empty);
    store_wait<0>();
    proxy_fence_all();
    if (x.tile > 0) publish(done, (uint32_t)turn + 1);
  }
}

/* Rows [n, count) of a tile of `panels` panels become zero: they belong to others, and 0 * NaN is NaN. */
template <int panels, int count> __device__ __forceinline__ void zero_rows(char *at, int n, int t) {
  for (int i = t; i < panels * (count - n) * 8; i += 256) {
    const int row = n + i / 8 % (count - n), panel = i / 8 / (count - n);
    *(uint4 *)(at + panel * count * 128 + row * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ void put2(const rgk_tensor &x, int64_t at, float a, float b, bool add) {
  if (x.dtype == RG_F32) {
    float2 *p = (float2 *)((float *)x.data + at);
    if (add) {
      const float2 old = *p;
      a = old.x + a, b = old.y + b;
    }
    *p = make_float2(a, b);
  } else {
    *(uint32_t *)((uint16_t *)x.data + at) =
        x.dtype == RG_F16 ? pack2<__half>(a, b) : pack2<__nv_bfloat16>(a, b);
  }
}

/* A warpgroup's sum of dK or dV [64 keys, W] onto the one of earlier chunks (turn > 0), then on to the next or,
 * rounded, to its place. */
template <int N>
__device__ __forceinline__ void hand_on(float (&d)[N], float4 *sum, int turn, int turns, int t) {
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    float4 *at = sum + j * 128 + t;
    if (turn > 0) {
      const float4 old = __ldcg(at);
      d[4 * j] = old.x + d[4 * j], d[4 * j + 1] = old.y + d[4 * j + 1];
      d[4 * j + 2] = old.z + d[4 * j + 2], d[4 * j + 3] = old.w + d[4 * j + 3];
    }
    if (turn < turns - 1) __stcg(at, make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]));
  }
}
template <int N>
__device__ __forceinline__ void put_keys(const float (&d)[N], const rgk_tensor &x, int64_t row, int kh, int keys,
                                         int key, int width, float scale, bool add, int t) {
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    const int c = 8 * j + 2 * (t & 3);
    if (c >= width) continue;
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (key + 8 * i < keys)
        put2(x, (row + key + 8 * i) * x.row + kh * x.head + c, scale * d[4 * j + 2 * i],
             scale * d[4 * j + 2 * i + 1], add);
  }
}

template <class T, int W>
__device__ __forceinline__ void compute(const rgk_flash_bwd &p, const bwd_item &x, barriers *bar, int wg, int t) {
  using L = plan<W>;
  const rgk_attn &a = p.a;
  const int lane = t & 31, warp = t >> 5, both = 128 * wg + t;
  const uint32_t base = smem_at(smem), K = base + L::k + wg * 8192, V = base + L::v + wg * 8192;
  const float scale2 = a.scale * LOG2E;
  const int64_t k0 = (int64_t)x.tile * KEYS;
  const int keys = (int)min(x.s.keys - k0, (int64_t)KEYS), key = 64 * wg + 16 * warp + lane / 4;
  float dk[W / 2], dv[W / 2];
#pragma unroll
  for (int i = 0; i < W / 2; i++) dk[i] = dv[i] = 0;

  if (x.m0 < x.m1) {
    float s[32];
    ring<2> at;
    walk w{x.m0, 0, a.G};
    uint32_t dq_parity = 1;

    auto scores = [&](int stage) { /* S^T = K Q^T */
      const uint32_t Q = base + L::q + stage * L::panels * L::q_panel;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < W / 16; i++)
        wgmma<T, 64>::ss(s, desc_k(K + i / 4 * L::k_panel + i % 4 * 32),
                         desc_k(Q + i / 4 * L::q_panel + i % 4 * 32), i > 0);
      wgmma_commit();
    };

    bar_wait(&bar->kv, 0);
    if (keys < KEYS) {
      zero_rows<L::panels, KEYS>(smem + L::k, keys, both);
      zero_rows<L::panels, KEYS>(smem + L::v, keys, both);
      proxy_fence();
      named_sync(1, 256);
    }
    bar_wait(&bar->q_full[0], 0);
    scores(0); wgmma_wait<0>(); wgmma_keep(s);

    for (;;) {
      const uint32_t Q = base + L::q + at.stage * L::panels * L::q_panel,
                     dO = base + L::d_o + at.stage * L::panels * L::q_panel,
                     dS = base + L::ds + at.stage * KEYS * 128;
      const int64_t left = x.s.length - (int64_t)w.m * ROWS, p0 = (int64_t)w.m * ROWS + x.s.offset;
      const int n = left < ROWS ? (int)left : ROWS;
      const uint32_t lse = base + L::rows + at.stage * 512 + (lane & 3) * 8, delta = lse + 256;

      bar_wait(&bar->o_full[at.stage], at.parity);
      if (n < ROWS) {
        zero_rows<L::panels, ROWS>(smem + (Q - base), n, both);
        zero_rows<L::panels, ROWS>(smem + (dO - base), n, both);
        proxy_fence();
        named_sync(1, 256);
      }
      float dp[32]; /* dP^T = V dO^T */
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < W / 16; i++)
        wgmma<T, 64>::ss(dp, desc_k(V + i / 4 * L::k_panel + i % 4 * 32),
                         desc_k(dO + i / 4 * L::q_panel + i % 4 * 32), i > 0);
      wgmma_commit();

      const bool masked = n < ROWS || keys < KEYS || bwd_from(a, k0 + KEYS - 1) > p0 ||
                          (bwd_windowed(a) && k0 + a.window_left < p0 + ROWS - 1);
      int from[2] = {0, 0}, to[2] = {ROWS, ROWS}; /* columns that see key, key + 8 */
      if (masked) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int64_t k = k0 + key + 8 * i;
          from[i] = key + 8 * i < keys ? (int)min(max(bwd_from(a, k) - p0, (int64_t)0), (int64_t)ROWS) : ROWS;
          to[i] = n;
          if (bwd_windowed(a)) to[i] = (int)max(min(k + a.window_left - p0 + 1, (int64_t)n), (int64_t)0);
        }
      }
      uint32_t pt[16], ds[16];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float2 l = read2(lse + 32 * j);
        s[4 * j] = exp2_fast(s[4 * j] * scale2 - l.x);
        s[4 * j + 1] = exp2_fast(s[4 * j + 1] * scale2 - l.y);
        s[4 * j + 2] = exp2_fast(s[4 * j + 2] * scale2 - l.x);
        s[4 * j + 3] = exp2_fast(s[4 * j + 3] * scale2 - l.y);
        if (masked) {
          const int c = 8 * j + 2 * (lane & 3);
          s[4 * j] = c >= from[0] && c < to[0] ? s[4 * j] : 0;
          s[4 * j + 1] = c + 1 >= from[0] && c + 1 < to[0] ? s[4 * j + 1] : 0;
          s[4 * j + 2] = c >= from[1] && c < to[1] ? s[4 * j + 2] : 0;
          s[4 * j + 3] = c + 1 >= from[1] && c + 1 < to[1] ? s[4 * j + 3] : 0;
        }
        pt[2 * j] = pack2<T>(s[4 * j], s[4 * j + 1]);
        pt[2 * j + 1] = pack2<T>(s[4 * j + 2], s[4 * j + 3]);
      }
      wgmma_keep(pt);
      wgmma_fence(); /* dV += P^T dO */
#pragma unroll
      for (int i = 0; i < 4; i++) wgmma<T, W>::template rs<true>(dv, pt + 4 * i, desc_mn(dO + i * 2048, L::q_panel), 1);
      wgmma_commit();

      wgmma_wait<1>();
      wgmma_keep(dp);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float2 l = read2(delta + 32 * j);
        dp[4 * j] = s[4 * j] * (dp[4 * j] - l.x);
        dp[4 * j + 1] = s[4 * j + 1] * (dp[4 * j + 1] - l.y);
        dp[4 * j + 2] = s[4 * j + 2] * (dp[4 * j + 2] - l.x);
        dp[4 * j + 3] = s[4 * j + 3] * (dp[4 * j + 3] - l.y);
        ds[2 * j] = pack2<T>(dp[4 * j], dp[4 * j + 1]);
        ds[2 * j + 1] = pack2<T>(dp[4 * j + 2], dp[4 * j + 3]);
      }
      wgmma_keep(ds);
      wgmma_fence(); /* dK += dS^T Q */
#pragma unroll
      for (int i = 0; i < 4; i++) wgmma<T, W>::template rs<true>(dk, ds + 4 * i, desc_mn(Q + i * 2048, L::q_panel), 1);
      wgmma_commit();
      {
        const int row = 64 * wg + 16 * warp + (lane & 15);
#pragma unroll
        for (int i = 0; i < 4; i++)
          asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                           dS + row * 128 + ((2 * i + (lane >> 4)) ^ (row & 7)) * 16),
                       "r"(ds[4 * i]), "r"(ds[4 * i + 1]), "r"(ds[4 * i + 2]), "r"(ds[4 * i + 3])
                       : "memory");
      }
      proxy_fence();
      named_sync(1, 256);

      float dq[W / 4]; /* dQ = dS K, this warpgroup's half of the columns */
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < KEYS / 16; i++)
        wgmma<T, W / 2>::template ss<true, true>(
            dq, desc_mn(dS + i * 2048, 8192),
            desc_mn(base + L::k + (W == 64 ? wg * 64 : wg * (W / 128) * L::k_panel) + i * 2048, L::k_panel), i > 0);
      wgmma_commit();

      wgmma_wait<1>(); /* dV and dK are done */
      wgmma_keep(dk);
      wgmma_keep(dv);
      bar_arrive(&bar->q_empty[at.stage]);
      bar_arrive(&bar->o_empty[at.stage]);
      w.next();
      at.next();
      const bool more = w.m < x.m1;
      if (more) bar_wait(&bar->q_full[at.stage], at.parity);
      scores(at.stage); /* after the last step: of whatever is there, for nothing */
      wgmma_wait<1>();
      wgmma_keep(dq);
      bar_wait(&bar->dq_empty, dq_parity);
      dq_parity ^= 1;
      {
        const uint32_t row = base + L::dq + (16 * warp + lane / 4) * W * 4 + (lane & 3) * 16;
#pragma unroll
        for (int j = 0; j < W / 32; j++) {
          const uint32_t to = row + ((wg * (W / 32) + j) ^ (lane / 4 & 1)) * 64;
          write4(to, dq[8 * j], dq[8 * j + 1], dq[8 * j + 4], dq[8 * j + 5]);
          write4(to + 8 * W * 4, dq[8 * j + 2], dq[8 * j + 3], dq[8 * j + 6], dq[8 * j + 7]);
        }
      }
      proxy_fence();
      bar_arrive(&bar->dq_full);
      wgmma_wait<0>();wgmma_keep(s);
      if (!more) break;
    }

  } else if (x.turns > 0) {
    return;
  }

  if (x.turns > 1) {
    const int64_t tile = x.kh * p.kv_tiles + p.kv_before[x.b] + x.tile;
    float4 *sum = (float4 *)p.kv + (tile * 2 + wg) * (W / 4) * 128;
    uint32_t *done = p.kv_done + tile * 2 + wg;
    if (x.turn > 0) {
      if (t == 0) await(done, (uint32_t)x.turn);
      named_sync(2 + wg, 128);
    }
    hand_on(dk, sum, x.turn, x.turns, t);
    hand_on(dv, sum + W / 8 * 128, x.turn, x.turns, t);
    if (x.turn < x.turns - 1) {
      __threadfence();
      named_sync(2 + wg, 128);
      if (t == 0) publish(done, (uint32_t)x.turn + 1);
      return;
    }
  }
  const int64_t row = x.s.k_begin + k0;
  if (a.dk.data) put_keys(dk, a.dk, row, x.kh, keys, key, a.D, a.scale, a.acc_k, t);
  if (a.dv.data) put_keys(dv, a.dv, row, x.kh, keys, key, a.E, 1, a.acc_v, t);
}

template <class T, int W>
__global__ void __launch_bounds__(RGK_FLASH_BWD_THREADS, 1) flash_bwd(const __grid_constant__ rgk_flash_bwd p) {
  barriers *bar = (barriers *)(smem + plan<W>::bars);
  if (threadIdx.x == 0) {
    bar->got = bwd_find_item(p, atomicAdd(p.ticket + p.pass, 1u), &bar->item);
    bar_init(&bar->kv, 1);
    for (int i = 0; i < 2; i++) {
      bar_init(&bar->q_full[i], 1);
      bar_init(&bar->q_empty[i], 256);
      bar_init(&bar->o_full[i], 1);
      bar_init(&bar->o_empty[i], 256);
    }
    bar_init(&bar->dq_full, 256);
    bar_init(&bar->dq_empty, 1);
    bar_init_done();
  }
  __syncthreads();
  if (!bar->got) return;
  const bwd_item &x = bar->item;
  const int wg = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (wg == 0) {
    fewer_registers<24>();
    if (x.m0 < x.m1) {
      if (threadIdx.x == 0) load<W>(p, x, bar);
      if (threadIdx.x == 32) add_dq<W>(p, x, bar);
    }
  } else {
    more_registers<240>();
    compute<T, W>(p, x, bar, wg - 1, threadIdx.x % 128);
  }
}

} // namespace

const void *rgk_flash_bwd_main(rg_dtype type, int32_t width) {
#define INSTANCE(t, T, w)                                                                                    \
  if (type == t && width == w) return (const void *)flash_bwd<T, w>;
  INSTANCE(RG_BF16, __nv_bfloat16, 128)
  INSTANCE(RG_BF16, __nv_bfloat16, 64)
#ifndef RGK_DEV
  INSTANCE(RG_F16, __half, 128)
  INSTANCE(RG_F16, __half, 64)
#endif
  return nullptr;
}
