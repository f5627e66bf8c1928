/* kernels/flash_bwd_sm90.cu: dQ, dK, dV of swa_attn and cmp_attn on Hopper.
 *
 *   S = Q K^T    P = exp(scale S - lse)    dP = dO V^T    dS = P (dP - delta)
 *   dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K
 *
 * A block has one item (device/flash_bwd.cuh): 128 keys, against a chunk of queries, 64 of one head at a time.
 * Scores are formed transposed: each of two warpgroups owns 64 keys, so that P^T and dS^T are in the registers
 * from which dV += P^T dO and dK += dS^T Q take them. dS^T also goes to shared memory, where a third warpgroup
 * finds it, forms dQ = dS K of both, and has the copy engine add it to memory. A fourth lends its registers to
 * the others; one of its threads loads.
 *
 * Every sum has a fixed order. dK and dV are summed over heads and queries in registers; the chunks of a
 * sequence add them up in fp32 in memory, each waiting for the one before (kv_done). dQ is summed over key
 * tiles in memory by the copy engine, each tile waiting for its right neighbour (dq_done). Items begin in an
 * order in which nobody waits for one that has not begun.
 *
 *   shared memory   K [128, W]  V [128, W]  Q 2 x [64, W]  dO 2 x [64, W]  dS^T 2 x [128 keys, 64]
 *                   dQ W/64 x [64, 64] f32  rows 2 x (lse, delta)            all but the last two in panels of
 *                   128-byte rows, swizzled
 *   dQ's rows       four groups of 16 columns, group i at i ^ (row & 1); in a group the columns stand as lanes
 *                   hold them: 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15
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

template <class T> __device__ __forceinline__ float2 unpack2(uint32_t x) {
  if constexpr (std::is_same_v<T, __half>) return __half22float2(*(const __half2 *)&x);
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
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
/* What a step's queries are, for those who mask: columns of S^T, that is queries, [from, upto) see key 0 of the
 * tile, of n; later keys add to that (compute). */
struct step {
  int masked, n, from, upto;
};
struct barriers {
  uint64_t kv, q_full[2], q_empty[2], o_full[2], o_empty[2], ds_full[2], dq_full[2], dq_empty[2];
  step steps[2];
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

/* The steps of an item: every tile of queries of every head of the group. With a window heads are the outer
 * loop, so that neighbouring key tiles, which lie a little apart in time, find queries and dQ in L2. */
struct walk {
  int m, h, m0, m1, G;
  bool by_head;
  __device__ __forceinline__ walk(const rgk_attn &a, const bwd_item &x)
      : m(x.m0), h(0), m0(x.m0), m1(x.m1), G(a.G), by_head(bwd_windowed(a)) {}
  __device__ __forceinline__ bool more() const { return m < m1 && h < G; }
  __device__ __forceinline__ void next() {
    if (by_head) {
      if (++m == m1) {
        if (++h < G) m = m0;
      }
    } else if (++h == G) {
      if (++m < m1) h = 0;
    }
  }
};

__device__ __forceinline__ step find_step(const rgk_attn &a, const bwd_item &x, int m) {
  const int64_t first = (int64_t)m * ROWS, p0 = first + x.s.offset, k0 = (int64_t)x.tile * KEYS, far = 1 << 20;
  step s;
  s.n = (int)min(x.s.length - first, (int64_t)ROWS);
  s.from = (int)max(bwd_from(a, k0) - p0, -far * 64);
  s.upto = bwd_windowed(a) ? (int)min(k0 + a.window_left - p0 + 1, far) : (int)far;
  s.masked = s.n < ROWS || x.s.keys < k0 + KEYS || bwd_from(a, k0 + KEYS - 1) > p0 || s.upto < ROWS;
  return s;
}

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
  walk w(p.a, x);
  const int64_t slot0 = x.s.q_begin / ROWS + x.b;
  for (; w.more(); w.next(), at.next()) {
    const int head = x.kh * p.a.G + w.h, row = (int)(x.s.q_begin + (int64_t)w.m * ROWS);
    char *q = smem + L::q + at.stage * L::panels * L::q_panel,
         *d_o = smem + L::d_o + at.stage * L::panels * L::q_panel;
    bar_wait(&bar->q_empty[at.stage], at.parity ^ 1);
    bar->steps[at.stage] = find_step(p.a, x, w.m);
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

/* One thread: has the copy engine add dQ to memory when it is this tile's turn, and tells of a step's sum when
 * the next one's is under way. */
template <int W> __device__ __forceinline__ void add_dq(const rgk_flash_bwd &p, const bwd_item &x, barriers *bar) {
  using L = plan<W>;
  const int64_t slot0 = x.s.q_begin / ROWS + x.b;
  uint32_t *tell = nullptr, told = 0, parity = 0;
  for (walk w(p.a, x); w.more(); w.next(), parity ^= 1) {
    const int64_t i = (int64_t)w.m * ROWS, left = x.s.length - i;
    const int head = x.kh * p.a.G + w.h, n = left < ROWS ? (int)left : ROWS;
    const int turn = bwd_tiles_seen(p.a, x.s, i + n - 1) - 1 - x.tile;
    uint32_t *done = p.dq_done + (slot0 + w.m) * p.a.H + head;
    if (turn > 0) await(done, (uint32_t)turn), proxy_fence_all();
#pragma unroll
    for (int j = 0; j < L::panels; j++) {
      float *to = p.dq + (((int64_t)(head - p.kh0 * p.a.G) * L::panels + j) * p.a.T + x.s.q_begin + i) * 64;
      bar_wait(&bar->dq_full[j], parity);
      if (turn > 0)
        bulk_add(to, smem + L::dq + j * ROWS * 256, n * 256);
      else
        bulk_store(to, smem + L::dq + j * ROWS * 256, n * 256);
      store_commit();
    }
    if (tell) store_wait<L::panels>(), publish(tell, told);
#pragma unroll
    for (int j = 0; j < L::panels; j++) {
      if (j + 1 < L::panels)
        store_wait_read<1>();
      else
        store_wait_read<0>();
      bar_arrive(&bar->dq_empty[j]);
    }
    tell = x.tile > 0 ? done : nullptr, told = (uint32_t)turn + 1;
  }
  store_wait<0>();
  if (tell) publish(tell, told);
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

  const int steps = (x.m1 - x.m0) * a.G;
  if (steps > 0) {
    float s[32];
    auto scores = [&](int stage) { /* S^T = K Q^T */
      const uint32_t Q = base + L::q + stage * L::panels * L::q_panel;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < W / 16; i++)
        wgmma<T, 64>::ss(s, desc_k(K + i / 4 * L::k_panel + i % 4 * 32),
                         desc_k(Q + i / 4 * L::q_panel + i % 4 * 32), i > 0);
      wgmma_commit();
    };

    /* dQ = dS K of step i, this warpgroup's half of the columns */
    auto queries = [&](float(&dq)[W / 4], int i) {
      const uint32_t dS = base + L::ds + (i & 1) * KEYS * 128,
                     part = base + L::k + (W == 64 ? wg * 64 : wg * L::k_panel);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < KEYS / 16; k++)
        wgmma<T, W / 2>::template ss<true, true>(dq, desc_mn(dS + k * 2048, 8192),
                                                 desc_mn(part + k * 2048, L::k_panel), k > 0);
      wgmma_commit();
    };
    auto give = [&](const float(&dq)[W / 4], int i) {
      const int panel = W == 64 ? 0 : wg;
      const uint32_t row = base + L::dq + panel * ROWS * 256 + (16 * warp + lane / 4) * 256 + (lane & 3) * 16;
      bar_wait(&bar->dq_empty[panel], i & 1 ^ 1);
#pragma unroll
      for (int j = 0; j < W / 32; j++) {
        const uint32_t to = row + ((W == 64 ? 2 * wg + j : j) ^ (lane / 4 & 1)) * 64;
        write4(to, dq[8 * j], dq[8 * j + 1], dq[8 * j + 4], dq[8 * j + 5]);
        write4(to + 8 * 256, dq[8 * j + 2], dq[8 * j + 3], dq[8 * j + 6], dq[8 * j + 7]);
      }
      proxy_fence();
      __syncwarp();
      if (lane == 0) bar_arrive(&bar->dq_full[panel]);
    };

    bar_wait(&bar->kv, 0);
    if (keys < KEYS) {
      zero_rows<L::panels, KEYS>(smem + L::k, keys, both);
      zero_rows<L::panels, KEYS>(smem + L::v, keys, both);
      proxy_fence();
      named_sync(1, 256);
    }
    bar_wait(&bar->q_full[0], 0);
    scores(0);
    wgmma_wait<0>();
    wgmma_keep(s);

    for (int i = 0; i < steps; i++) {
      const uint32_t stage = i & 1, parity = i >> 1 & 1;
      const uint32_t Q = base + L::q + stage * L::panels * L::q_panel,
                     dO = base + L::d_o + stage * L::panels * L::q_panel, dS = base + L::ds + stage * KEYS * 128;
      const uint32_t lse = base + L::rows + stage * 512 + (lane & 3) * 8, delta = lse + 256;
      const bool masked = bar->steps[stage].masked;

      bar_wait(&bar->o_full[stage], parity);
      if (masked) {
        const int n = bar->steps[stage].n;
        if (n < ROWS) {
          zero_rows<L::panels, ROWS>(smem + (Q - base), n, both);
          zero_rows<L::panels, ROWS>(smem + (dO - base), n, both);
          proxy_fence();
          named_sync(1, 256);
        }
      }
      float dp[32]; /* dP^T = V dO^T */
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < W / 16; k++)
        wgmma<T, 64>::ss(dp, desc_k(V + k / 4 * L::k_panel + k % 4 * 32),
                         desc_k(dO + k / 4 * L::q_panel + k % 4 * 32), k > 0);
      wgmma_commit();

      uint32_t pt[16];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float2 l = read2(lse + 32 * j);
        s[4 * j] = exp2_fast(s[4 * j] * scale2 - l.x);
        s[4 * j + 1] = exp2_fast(s[4 * j + 1] * scale2 - l.y);
        s[4 * j + 2] = exp2_fast(s[4 * j + 2] * scale2 - l.x);
        s[4 * j + 3] = exp2_fast(s[4 * j + 3] * scale2 - l.y);
      }
      if (masked) {
        const step x = bar->steps[stage];
        const int apart = a.mode == RGK_CMP ? a.stride : 1;
#pragma unroll
        for (int g = 0; g < 2; g++) { /* keys `key` and key + 8 */
          const int k = key + 8 * g, c0 = 2 * (lane & 3), from = (k < keys ? x.from + k * apart : ROWS) - c0,
                    upto = min(x.n, x.upto + k) - c0;
#pragma unroll
          for (int j = 0; j < 8; j++) {
            if (8 * j < from || 8 * j >= upto) s[4 * j + 2 * g] = 0;
            if (8 * j + 1 < from || 8 * j + 1 >= upto) s[4 * j + 2 * g + 1] = 0;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 16; j++) pt[j] = pack2<T>(s[2 * j], s[2 * j + 1]);
      wgmma_keep(pt);
      wgmma_fence(); /* dV += P^T dO */
#pragma unroll
      for (int k = 0; k < 4; k++)
        wgmma<T, W>::template rs<true>(dv, pt + 4 * k, desc_mn(dO + k * 2048, L::q_panel), 1);
      wgmma_commit();

      float dq[W / 4];
      if (i > 0) bar_wait(&bar->ds_full[stage ^ 1], (i - 1) >> 1 & 1);
      queries(dq, i + 1); /* of step i - 1; before the first step: of whatever is there, for nothing */

      wgmma_wait<2>();
      wgmma_keep(dp);
      uint32_t ds[16];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float2 l = read2(delta + 32 * j), p0 = unpack2<T>(pt[2 * j]), p1 = unpack2<T>(pt[2 * j + 1]);
        ds[2 * j] = pack2<T>(p0.x * (dp[4 * j] - l.x), p0.y * (dp[4 * j + 1] - l.y));
        ds[2 * j + 1] = pack2<T>(p1.x * (dp[4 * j + 2] - l.x), p1.y * (dp[4 * j + 3] - l.y));
      }
      wgmma_keep(ds);
      wgmma_fence(); /* dK += dS^T Q */
#pragma unroll
      for (int k = 0; k < 4; k++)
        wgmma<T, W>::template rs<true>(dk, ds + 4 * k, desc_mn(Q + k * 2048, L::q_panel), 1);
      wgmma_commit();

      wgmma_wait<1>(); /* dV and dQ are done */
      wgmma_keep(dv);
      wgmma_keep(pt);
      wgmma_keep(dq);
      if (i > 0) give(dq, i - 1);
      {
        const int row = 64 * wg + 16 * warp + (lane & 15);
        const uint32_t to = dS + row * 128 + ((lane >> 4) ^ (row & 7)) * 16;
#pragma unroll
        for (int k = 0; k < 4; k++)
          asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to ^ (k * 32)),
                       "r"(ds[4 * k]), "r"(ds[4 * k + 1]), "r"(ds[4 * k + 2]), "r"(ds[4 * k + 3])
                       : "memory");
      }
      proxy_fence();
      __syncwarp();
      if (lane == 0) bar_arrive(&bar->ds_full[stage]);

      if (i + 1 < steps) bar_wait(&bar->q_full[stage ^ 1], (i + 1) >> 1 & 1);
      scores(stage ^ 1); /* after the last step: of whatever is there, for nothing */
      wgmma_wait<1>();   /* dK is done */
      wgmma_keep(dk);
      if (lane == 0) bar_arrive(&bar->q_empty[stage]), bar_arrive(&bar->o_empty[stage]);
      wgmma_wait<0>();
      wgmma_keep(s);
    }
    float dq[W / 4];
    bar_wait(&bar->ds_full[(steps - 1) & 1], (steps - 1) >> 1 & 1);
    queries(dq, steps - 1);
    wgmma_wait<0>();
    wgmma_keep(dq);
    give(dq, steps - 1);
  } else if (x.turns > 0) {
    return;
  }

  if (x.turns > 1) {
    const int64_t tile = x.kh * p.kv_tiles + p.kv_before[x.b] + x.tile;
    float4 *sum = (float4 *)p.kv + (tile * 2 + wg) * (W / 4) * 128;
    uint32_t *done = p.kv_done + tile * 2 + wg;
    if (x.turn > 0) {
      if (t == 0) await(done, (uint32_t)x.turn);
      named_sync(3 + wg, 128);
    }
    hand_on(dk, sum, x.turn, x.turns, t);
    hand_on(dv, sum + W / 8 * 128, x.turn, x.turns, t);
    if (x.turn < x.turns - 1) {
      __threadfence();
      named_sync(3 + wg, 128);
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
      bar_init(&bar->q_empty[i], 8);
      bar_init(&bar->o_full[i], 1);
      bar_init(&bar->o_empty[i], 8);
    }
    for (int i = 0; i < 2; i++) {
      bar_init(&bar->ds_full[i], 8);
      bar_init(&bar->dq_full[i], W == 64 ? 8 : 4);
      bar_init(&bar->dq_empty[i], 1);
    }
    bar_init_done();
  }
  __syncthreads();
  if (!bar->got) return;
  const bwd_item &x = bar->item;
  const int wg = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (wg == 2) {
    fewer_registers<24>();
    if (x.m0 < x.m1) {
      if (threadIdx.x % 128 == 0) load<W>(p, x, bar);
      if (threadIdx.x % 128 == 32) add_dq<W>(p, x, bar);
    }
  } else {
    more_registers<240>();
    compute<T, W>(p, x, bar, wg, threadIdx.x % 128);
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
