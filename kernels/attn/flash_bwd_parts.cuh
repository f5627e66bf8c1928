/* kernels/attn/flash_bwd_parts.cuh: what flash_bwd's two main kernels share: the walk over an
 * item's queries, masks, and the ordered sums in memory. */
#pragma once
#include "flash_bwd.cuh"
#include "gradient.cuh"
#include "../device/softmax.cuh"
#include "../device/tma.cuh"
#include "../device/wgmma.cuh"
#include <stddef.h>

namespace rgk {

constexpr int ROWS = RGK_FLASH_BWD_ROWS;
/* Barriers of both warpgroups that compute; of one of them, the first of two ids. */
enum named : int { BOTH = 1, EACH = 3 };

__device__ __forceinline__ float2 read2(uint32_t at) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at));
  return x;
}
__device__ __forceinline__ void write4(uint32_t at, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

/* ---- the walk ---- */

/* The steps of an item: every tile of queries of every head of the group. With a window heads are
 * the outer loop, so that neighbouring key tiles, which lie a little apart in time, find queries
 * and dQ in L2. */
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

/* What a step's queries are, for those who mask: columns of S^T, that is queries, [from, upto) see
 * key 0 of the tile, of n; later keys add to that (compute). */
struct step {
  int masked, n, from, upto;
};
__device__ __forceinline__ step find_step(const rgk_attn &a, const bwd_item &x, int m) {
  const int64_t first = (int64_t)m * ROWS, p0 = first + x.s.offset, k0 = (int64_t)x.tile * x.s.tile,
                far = 1 << 20;
  step s;
  s.n = (int)min(x.s.length - first, (int64_t)ROWS);
  s.from = (int)max(bwd_from(a, k0) - p0, -far * 64);
  s.upto = bwd_windowed(a) ? (int)min(k0 + a.window_left - p0 + 1, far) : (int)far;
  s.masked = s.n < ROWS || x.s.keys < k0 + x.s.tile || bwd_from(a, k0 + x.s.tile - 1) > p0 ||
             s.upto < ROWS;
  return s;
}

/* ---- shared memory of a block ---- */

struct bwd_barriers {
  uint64_t kv, q_full[2], q_empty[2], o_full[2], o_empty[2], ds_full[2], dq_full[4], dq_empty[4];
  step steps[2];
  int got;
  bwd_item item;
};
/* For tiles of `keys` keys and rows of W and E elements. Up to dS^T in panels of 128-byte rows,
 * swizzled. */
template <int keys, int W, int E> struct bwd_plan {
  static constexpr int key_rows = keys, k_panels = W / 64, v_panels = E / 64,
                       stages = W == 256 ? 1 : 2, dq_buffers = keys == 64 ? 1 : 2;
  static constexpr uint32_t k_panel = keys * 128, q_panel = ROWS * 128;
  struct memory {
    alignas(1024) char k[k_panels][k_panel];
    char v[v_panels][k_panel];
    char q[stages][k_panels][q_panel], d_o[stages][v_panels][q_panel];
    char p[keys == 64 ? 2 : 0][keys * 128]; /* P^T, where it does not stay in registers */
    char ds[2][keys * 128];                 /* dS^T */
    float dq[dq_buffers][k_panels][ROWS * 64];
    float rows[stages][2][ROWS]; /* lse, delta */
    bwd_barriers bars;
  };
  static constexpr uint32_t k = offsetof(memory, k), v = offsetof(memory, v),
                            q = offsetof(memory, q), d_o = offsetof(memory, d_o),
                            p = offsetof(memory, p), ds = offsetof(memory, ds),
                            dq = offsetof(memory, dq), rows = offsetof(memory, rows),
                            bars = offsetof(memory, bars);
  static_assert(bars + sizeof(bwd_barriers) <= rgk_flash_bwd_shared(keys, W, E),
                "as the host counts");
};
extern __shared__ __align__(1024) char bwd_smem[];

/* Takes an item and makes the barriers, `givers` warps to each of dQ's. False: there is none
 * left. */
__device__ __forceinline__ bool bwd_begin(const rgk_flash_bwd &p, bwd_barriers *bar, int givers) {
  if (threadIdx.x == 0) {
    bar->got = bwd_find_item(p, atomicAdd(p.ticket + p.pass, 1u), &bar->item);
    bar_init(&bar->kv, 1);
    for (int i = 0; i < 2; i++) {
      bar_init(&bar->q_full[i], 1);
      bar_init(&bar->q_empty[i], 8 * WARP_ARRIVALS);
      bar_init(&bar->o_full[i], 1);
      bar_init(&bar->o_empty[i], 8 * WARP_ARRIVALS);
      bar_init(&bar->ds_full[i], 8 * WARP_ARRIVALS);
    }
    for (int i = 0; i < 4; i++) {
      bar_init(&bar->dq_full[i], givers * WARP_ARRIVALS);
      bar_init(&bar->dq_empty[i], 1);
    }
    bar_init_done();
  }
  __syncthreads();
  return bar->got;
}

/* One thread: loads the keys, then the queries step by step. */
template <class L>
__device__ __forceinline__ void bwd_load(const rgk_flash_bwd &p, const bwd_item &x,
                                         bwd_barriers *bar) {
  const int k_row = (int)(x.s.k_begin + (int64_t)x.tile * L::key_rows);
  bar_expect(&bar->kv, (L::k_panels + L::v_panels) * L::k_panel);
  for (int i = 0; i < L::k_panels; i++)
    tma_load(bwd_smem + L::k + i * L::k_panel, &p.k, &bar->kv, 64 * i, x.kh, k_row);
  for (int i = 0; i < L::v_panels; i++)
    tma_load(bwd_smem + L::v + i * L::k_panel, &p.v, &bar->kv, 64 * i, x.kh, k_row);
  ring<L::stages> at;
  const int64_t slot0 = x.s.q_begin / ROWS + x.b;
  for (walk w(p.a, x); w.more(); w.next(), at.next()) {
    const int head = x.kh * p.a.G + w.h, row = (int)(x.s.q_begin + (int64_t)w.m * ROWS);
    char *q = bwd_smem + L::q + at.stage * L::k_panels * L::q_panel,
         *d_o = bwd_smem + L::d_o + at.stage * L::v_panels * L::q_panel;
    bar_wait(&bar->q_empty[at.stage], at.parity ^ 1);
    bar->steps[at.stage] = find_step(p.a, x, w.m);
    bar_expect(&bar->q_full[at.stage], L::k_panels * L::q_panel + 512);
    for (int i = 0; i < L::k_panels; i++)
      tma_load(q + i * L::q_panel, &p.q, &bar->q_full[at.stage], 64 * i, head, row);
    bulk_load(bwd_smem + L::rows + at.stage * 512, p.rows + ((slot0 + w.m) * p.a.H + head) * 128,
              512, &bar->q_full[at.stage]);
    bar_wait(&bar->o_empty[at.stage], at.parity ^ 1);
    bar_expect(&bar->o_full[at.stage], L::v_panels * L::q_panel);
    for (int i = 0; i < L::v_panels; i++)
      tma_load(d_o + i * L::q_panel, &p.d_o, &bar->o_full[at.stage], 64 * i, head, row);
  }
}

/* ---- dQ ---- */

/* Two threads, for even and odd steps, have the copy engine add dQ, `panels` of 64 columns, to
 * memory when it is this tile's turn, and tell when that is done. Panels of a step share a barrier
 * by `each`; its barriers are full[2 odd + panel / each]. */
template <int panels, int each>
__device__ __forceinline__ void add_dq(const rgk_flash_bwd &p, const bwd_item &x, const char *from,
                                       uint64_t *full, uint64_t *empty, int odd) {
  const int64_t slot0 = x.s.q_begin / ROWS + x.b;
  uint32_t parity = 0;
  walk w(p.a, x);
  if (odd) w.next();
  for (; w.more(); w.next(), parity ^= 1) {
    const int64_t i = (int64_t)w.m * ROWS, left = x.s.length - i;
    const int head = x.kh * p.a.G + w.h, n = left < ROWS ? (int)left : ROWS;
    const int turn = bwd_tiles_seen(p.a, x.s, i + n - 1) - 1 - x.tile;
    uint32_t *done = p.dq_done + (slot0 + w.m) * p.a.H + head;
    if (turn > 0) await(done, (uint32_t)turn), proxy_fence_all();
#pragma unroll
    for (int j = 0; j < panels; j++) {
      float *to =
          p.dq + (((int64_t)(head - p.kh0 * p.a.G) * panels + j) * p.a.T + x.s.q_begin + i) * 64;
      if (j % each == 0) bar_wait(&full[2 * odd + j / each], parity);
      if (turn > 0)
        bulk_add(to, from + j * ROWS * 256, n * 256);
      else
        bulk_store(to, from + j * ROWS * 256, n * 256);
      store_commit();
    }
#pragma unroll
    for (int j = each - 1; j < panels; j += each)
      bar_release(&empty[2 * odd + j / each],
                  j + 1 < panels ? store_wait_read<1>() : store_wait_read<0>());
    store_wait<0>();
    if (x.tile > 0) publish(done, (uint32_t)turn + 1);
    w.next();
    if (!w.more()) break;
  }
}

/* What the warpgroup does that does not compute: three of its threads load and add. */
template <class L, int each>
__device__ __forceinline__ void bwd_serve(const rgk_flash_bwd &p, const bwd_item &x,
                                          bwd_barriers *bar) {
  const int t = threadIdx.x % 128;
  if (x.m0 >= x.m1) return;
  if (t == 0) bwd_load<L>(p, x, bar);
  if (t == 32 || t == 64)
    add_dq<L::k_panels, each>(
        p, x, bwd_smem + L::dq + (t == 64 ? L::dq_buffers - 1 : 0) * L::k_panels * ROWS * 256,
        bar->dq_full, bar->dq_empty, t == 64);
}

/* ---- tiles ---- */

/* Rows [n, count) of a tile of `panels` panels become zero: they belong to others, and 0 * NaN is
 * NaN. */
template <int panels, int count> __device__ __forceinline__ void zero_rows(char *at, int n, int t) {
  for (int i = t; i < panels * (count - n) * 8; i += 256) {
    const int row = n + i / 8 % (count - n), panel = i / 8 / (count - n);
    *(uint4 *)(at + panel * count * 128 + row * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
}

/* The item's keys are there; rows past the last become zeros, by both warpgroups together. */
template <class L>
__device__ __forceinline__ void await_keys(bwd_barriers *bar, int keys, int both) {
  bar_wait(&bar->kv, 0);
  if (keys == L::key_rows) return;
  zero_rows<L::k_panels, L::key_rows>(bwd_smem + L::k, keys, both);
  zero_rows<L::v_panels, L::key_rows>(bwd_smem + L::v, keys, both);
  proxy_fence();
  named_sync(BOTH, 2 * WARPGROUP);
}
/* The same of a step's queries, n of them. */
template <class L> __device__ __forceinline__ void clear_queries(int stage, int n, int both) {
  zero_rows<L::k_panels, ROWS>(bwd_smem + L::q + stage * L::k_panels * L::q_panel, n, both);
  zero_rows<L::v_panels, ROWS>(bwd_smem + L::d_o + stage * L::v_panels * L::q_panel, n, both);
  proxy_fence();
  named_sync(BOTH, 2 * WARPGROUP);
}

/* ---- weights ---- */

/* P^T of N / 4 groups of columns from scores; `lse`: those of the thread's first two columns. */
template <int N> __device__ __forceinline__ void weigh(float (&s)[N], uint32_t lse, float scale2) {
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    const float2 l = read2(lse + 32 * j);
    s[4 * j] = exp2_fast(s[4 * j] * scale2 - l.x);
    s[4 * j + 1] = exp2_fast(s[4 * j + 1] * scale2 - l.y);
    s[4 * j + 2] = exp2_fast(s[4 * j + 2] * scale2 - l.x);
    s[4 * j + 3] = exp2_fast(s[4 * j + 3] * scale2 - l.y);
  }
}

/* Clears weights of keys `key` and key + 8 of the tile's `keys` where a query does not see them;
 * the thread's columns begin at `first`. */
template <int N>
__device__ __forceinline__ void mask(float (&s)[N], const rgk_attn &a, const step &x, int key,
                                     int keys, int first) {
  const int apart = a.mode == RGK_CMP ? a.stride : 1;
  int from[2], upto[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int k = key + 8 * i;
    from[i] = (k < keys ? x.from + k * apart : ROWS) - first;
    upto[i] = min(x.n, x.upto + k) - first;
  }
  each(s, [&](float &p, int i, int column) {
    if (column < from[i] || column >= upto[i]) p = 0;
  });
}

/* ---- dK and dV ---- */

/* A warpgroup's place in kv, and whose turn it is there. */
struct bwd_sum {
  float4 *at;
  uint32_t *done;
};
__device__ __forceinline__ bwd_sum bwd_sum_of(const rgk_flash_bwd &p, const bwd_item &x, int wg) {
  const int64_t tile = x.kh * p.kv_tiles + p.kv_before[x.b] + x.tile;
  const int64_t half = (int64_t)p.keys * (p.width + p.width_v) / 8; /* in float4 */
  return {(float4 *)p.kv + ((tile * p.parts + (p.parts > 1 ? x.turn : 0)) * 2 + wg) * half,
          p.kv_done + tile * 2 + wg};
}

/* A warpgroup's sum of dK or dV: `add`s what is there, `leave`s the sum there. */
template <int N>
__device__ __forceinline__ void hand_on(float (&d)[N], float4 *sum, bool add, bool leave, int t) {
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    float4 *at = sum + j * 128 + t;
    if (add) {
      const float4 old = __ldcg(at);
      d[4 * j] = old.x + d[4 * j], d[4 * j + 1] = old.y + d[4 * j + 1];
      d[4 * j + 2] = old.z + d[4 * j + 2], d[4 * j + 3] = old.w + d[4 * j + 3];
    }
    if (leave) __stcg(at, make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]));
  }
}

/* Before and after a warpgroup's hand_on of a tile of several chunks. bwd_handed: was that all? */
__device__ __forceinline__ void bwd_await_turn(const rgk_flash_bwd &p, const bwd_item &x,
                                               const bwd_sum &sum, int wg, int t) {
  if (p.parts > 1 || x.turn == 0) return;
  if (t == 0) await(sum.done, (uint32_t)x.turn);
  named_sync(EACH + wg, WARPGROUP);
}
__device__ __forceinline__ bool bwd_handed(const rgk_flash_bwd &p, const bwd_item &x,
                                           const bwd_sum &sum, int wg, int t) {
  if (p.parts > 1) return true;
  if (x.turn == x.turns - 1) return false;
  __threadfence();
  named_sync(EACH + wg, WARPGROUP);
  if (t == 0) publish(sum.done, (uint32_t)x.turn + 1);
  return true;
}

} // namespace rgk
