/* kernels/attn/decode_sm90.cuh: attention of single tokens over pages on Hopper, see decode.h.

   A job is one token of one KV head, 16 heads. To the bit it is flash_fwd_sm90.cuh's, or, over
   selected blocks, gather_fwd_sm90.cu's, but the products are transposed, so that keys fill the 64
   rows of a tensor core tile which 16 heads leave empty:

       sᵀ = k qᵀ   [key, head]      oᵀ += vᵀ pᵀ   [feature, head]

   A thread holds four heads of four keys of a tile of 128, of two of a selected block. What runs
   over keys in those kernels runs over lanes, warps and shared memory here: the reference m is a
   maximum, which has no order; the sum of weights has one, which 64 threads follow, a tile behind
   (`sums`: what a thread there adds up before it adds to the row's sum comes added up).

     warpgroup   0 loads    1 attends    2, 3 rank, where blocks are chosen (decode_sm90.cu)

   Twins: where tokens are few, two blocks of threads of a cluster share one, for the copy engine of
   a multiprocessor takes its time with boxes of eight rows. The first has keys: it makes weights, a
   tile at a time, ranks, and finds what o must be multiplied by. The second has values, and o.
   Weights cross by a bulk copy, with what o must be multiplied by first: the same sums in the same
   order.
 */
#pragma once
#include "decode.h"
#include "flash_fwd_sm90.cuh"
#include "topk.cuh"

namespace rgk {
namespace decode {

using namespace flash;

enum kind { RANKED, ALONE, SELECTED }; /* blocks are chosen besides; they are not; they were */

constexpr int HEADS = RGK_DECODE_HEADS, MOST = 32;
constexpr int RANKS = RGK_DECODE_RANKS, WARPS = RANKS / 32; /* of those who rank */
constexpr int ROWS16 = HEADS * 128;                         /* bytes of a panel of 16 rows */

/* PAIRED: selected blocks and a window share a block of threads (decode_pair_sm90.cu). TWINS: two
 * share a token. */
template <class Type, int D, kind KIND_, bool PAIRED_ = false, bool TWINS_ = false>
struct setup : config<Type, D, D, 1, KIND_ == SELECTED ? 64 : RGK_DECODE_KEYS> {
  static constexpr kind KIND = KIND_;
  static constexpr bool PAIRED = PAIRED_, TWINS = TWINS_;
  static constexpr int KEYS = KIND == SELECTED ? 64 : RGK_DECODE_KEYS, HALVES = KEYS / 64;
  static constexpr int STAGES =
      PAIRED ? RGK_PAIR_STAGES(D, KIND == SELECTED) : RGK_DECODE_STAGES(D) * RGK_DECODE_KEYS / KEYS;
  static constexpr bool BOXES = KIND != SELECTED && !PAIRED; /* keys come in boxes of eight rows */
  static constexpr int GROUP = KIND == SELECTED;             /* whose named barrier is its own */
  static constexpr int SUMS = KIND == SELECTED ? 4 : KEYS / 8;
  using tile = tile_of<setup, BOXES>;
};

template <class P> constexpr kind kind_of = ALONE;
template <> inline constexpr kind kind_of<rgk_decode> = RANKED;
template <> inline constexpr kind kind_of<rgk_decode_selected> = SELECTED;
__device__ __forceinline__ const rgk_flash_paged &paged_of(const rgk_flash_paged &p) {
  return p;
}
template <class P> __device__ __forceinline__ const rgk_flash_paged &paged_of(const P &p) {
  return p.f;
}

struct ranked {
  job at;
  float lse[HEADS];   /* as the exponential wants it */
  int part[2][WARPS]; /* of a sum over all, two in turn */
  int count;
  int2 chosen[MOST]; /* key, block */
};

template <class C> struct memory {
  alignas(1024) char k[C::STAGES][C::DP * C::KV];
  char v[C::STAGES][C::EP * C::KV];
  char q[2][C::DP * ROWS16];
  char p[2][2 * ROWS16]; /* weights, head by head; o on its way out */
  float sums[C::SUMS][4 * HEADS + 4];
  alignas(16) int keys[C::KIND == RANKED ? RGK_DECODE_SCORES : 4]; /* of blocks */
  float top[4][HEADS];     /* a warp's largest products of a tile */
  float2 reference[HEADS]; /* m; what sums so far are multiplied by */
  alignas(16) float end[HEADS];
  int first[C::STAGES]; /* of a selected block's keys */
  job jobs[2];
  ranked r;
  uint64_t q_full[2], q_empty[2], scored, taken;
  uint64_t end_full, end_empty; /* twins: `end` of the second, of the first */
  uint64_t k_full[C::STAGES], k_empty[C::STAGES], v_full[C::STAGES], v_empty[C::STAGES];
};

/* Of those that share tokens: number of the cluster, if it is one; how many. */
template <class C> __device__ __forceinline__ int sharer() {
  return C::TWINS ? blockIdx.x / 2 : blockIdx.x;
}
template <class C> __device__ __forceinline__ int sharers() {
  return C::TWINS ? gridDim.x / 2 : gridDim.x;
}
template <class C> __device__ __forceinline__ float *room_of(const rgk_decode &d) {
  return d.room + (int64_t)sharer<C>() * RGK_DECODE_ROWS_KEPT * d.pitch;
}
__device__ __forceinline__ int32_t *idx_of(const rgk_decode &d, const job &j) {
  return (int32_t *)d.topk.idx.data + (int64_t)j.token * d.topk.idx.row +
         (j.head >> d.f.f.pack) * d.topk.idx.head;
}

/* ---- twins ----
 *
 * A tile's weights and scales lie in a slot: of the first, where V's stages would be, of the
 * second, where K's would. Barriers of those stages say that a slot of the second is full, and, in
 * the first, that it is empty again, with the second's stage of V. */

constexpr int SLOT = 8192, SENT = 2 * ROWS16 + 4 * HEADS; /* bytes: apart; of them in use */

template <class C> __device__ __forceinline__ bool has_keys() {
  return !C::TWINS || blockIdx.x % 2 == 0;
}
template <class C> __device__ __forceinline__ bool has_values() {
  return !C::TWINS || blockIdx.x % 2 == 1;
}
template <class C> __device__ __forceinline__ char *slot_of(memory<C> &s, int stage) {
  static_assert(!C::TWINS || (SENT <= SLOT && C::STAGES * SLOT <= (int)sizeof s.k), "fits");
  return (has_values<C>() ? s.k[0] : s.v[0]) + stage * SLOT;
}
/* By one thread: bytes here to where `to` is in the second, whose barrier at `full` counts them. */
__device__ __forceinline__ void send(char *to, uint64_t *full, const char *from, uint32_t bytes) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];" ::"r"(cluster_at(smem_at(to), 1)),
               "r"(smem_at(from)), "r"(bytes), "r"(cluster_at(smem_at(full), 1))
               : "memory");
}
/* Room of the first is given back by a warp of the second, whose lanes all call it. */
template <class... X> __device__ __forceinline__ void give_first(uint64_t *bar, waited, X... read) {
  if (arrives()) release::arrive_at(cluster_at(smem_at(bar), 0), (release::word(read) ^ ... ^ 0u));
}

/* ---- load ---- */

/* By the thread that leads, its warp comes along. */
template <class C>
__device__ __forceinline__ void hand_out(const rgk_flash_params &p, memory<C> &s, ring<2> &q,
                                         const job &j, bool leads) {
  if (leads) {
    bar_wait(&s.q_empty[q.stage], q.parity ^ 1);
    s.jobs[q.stage] = j;
    if (j.first == j.end || (C::TWINS && blockIdx.x % 2)) {
      bar_ready(&s.q_full[q.stage]);
    } else {
      bar_expect(&s.q_full[q.stage], C::DP * ROWS16);
      for (int x = 0; x < C::DP; x++)
        tma_load(s.q[q.stage] + x * ROWS16, &p.q, &s.q_full[q.stage], x * 64, j.head, j.token,
                 l2::evict_first);
    }
  }
  __syncwarp();
  q.next();
}

/* By whole warps: f(job, where its keys are) for each; every other round goes backwards: sums of
 * falling weights come out even. */
template <class C, class F>
__device__ __forceinline__ void each_job(const rgk_flash_paged &d, F f) {
  const rgk_flash_params &p = d.f;
  const int heads = p.H >> p.pack, jobs = p.slots * heads, blocks = sharers<C>(),
            mine = sharer<C>();
  job j = {};
  in_pages at = {};
  for (int r = 0; r * blocks < jobs; r++) {
    const int i = r * blocks + (r & 1 ? blocks - 1 - mine : mine), slot = rgk_over(i, p.by_heads);
    if (i >= jobs) continue;
    const int row = p.slots - 1 - slot, b = find_seq_warp(p.seqs, row);
    j.head = (i - slot * heads) << p.pack;
    place_job<C>(d, tile_at(p.seqs, b, (int64_t)row + b, 1), j, at); /* of one token */
    f(j, at);
  }
}
template <class C>
__device__ __forceinline__ void hand_out_end(const rgk_flash_params &p, memory<C> &s, ring<2> &q,
                                             bool leads) {
  job j = {};
  j.kind = EXIT;
  hand_out<C>(p, s, q, j, leads);
}

/* A thread's box of eight rows of a tile, if it has one. */
struct box {
  int at, row, page; /* bytes in a panel; in the page */
};

/* By a warpgroup: tiles of keys that follow on each other, from the last to the first. Four warps
 * take turns with boxes, a lane each: to start a copy takes long. */
template <class C>
__device__ __forceinline__ void load_tiles(const rgk_flash_paged &d, memory<C> &s) {
  const rgk_flash_params &p = d.f;
  const int i = (int)threadIdx.x % 32 * 4 + (int)threadIdx.x / 32;
  const bool leads = threadIdx.x == 0;
  ring<C::STAGES> k, v;
  ring<2> q;
  each_job<C>(d, [&](const job &j, const in_pages &in) {
    const int kv_head = rgk_over(j.head, p.by_group);
    auto find_box = [&](int t) {
      box b = {i * 1024, 0, d.pages.count};
      const int row = t * C::KEYS + i * 8;
      if (i * 8 >= C::KEYS || t < j.first) return b;
      const int m = rgk_over(row, d.by_rows);
      b.row = row - m * d.pages.rows;
      if (row + 8 > in.low && row < in.rows) b.page = in.table[m];
      return b;
    };
    auto fetch = [&](char *to, const rgk_map *map, uint64_t *full, int panels, const box &b) {
      if (leads) bar_expect(full, (uint32_t)panels * C::KV);
      if (i * 8 < C::KEYS) /* nobody else wants them; products are to stay in L2 */
        tma_load(to + b.at * panels, map, full, 0, b.row, 0, kv_head, b.page, l2::evict_first);
    };
    auto load_k = [&](const box &b) {
      if (!has_keys<C>()) return;
      bar_wait(&s.k_empty[k.stage], k.parity ^ 1);
      fetch(s.k[k.stage], &p.k, &s.k_full[k.stage], C::DP, b);
      k.next();
    };
    auto load_v = [&](const box &b) {
      if (!has_values<C>()) return;
      bar_wait(&s.v_empty[v.stage], v.parity ^ 1);
      if (C::TWINS && leads) bar_expect(&s.k_full[v.stage], SENT); /* weights of this tile */
      fetch(s.v[v.stage], &p.v, &s.v_full[v.stage], C::EP, b);
      v.next();
    };
    box now = find_box(j.end - 1), next = find_box(j.end - 2); /* pages are asked for early */
    if (j.first < j.end) load_k(now);
    hand_out<C>(p, s, q, j, leads);
    for (int t = j.end - 1; t >= j.first; t--) {
      const box later = find_box(t - 2);
      if (t > j.first) load_k(next);
      load_v(now);
      now = next, next = later;
    }
  });
  hand_out_end<C>(p, s, q, leads);
}

/* By a warp: selected blocks. An entry counts if it is larger than all before it, and its block
 * begins among the keys that the token sees; so none comes after one whose block does not.
 * keep(job, key): how long L2 should hold the block that begins there; after(): a job's are asked
 * for. */
template <class C, class F, class G>
__device__ __forceinline__ void load_selected(const rgk_decode_selected &d, memory<C> &s, F keep,
                                              G after) {
  const rgk_flash_params &p = d.f.f;
  const int lane = threadIdx.x % 32;
  ring<C::STAGES> r;
  ring<2> q;
  each_job<C>(d.f, [&](const job &found, const in_pages &at) {
    job j = found;
    const int kv_head = rgk_over(j.head, p.by_group), seen = min(j.position + 1, j.keys);
    int e = -1, page = 0, row = 0;
    if (j.kind == WORK && lane < d.top_n)
      e = ((const int32_t *)d.idx.data)[j.token * d.idx.row + kv_head * d.idx.head + lane];
    int before = __shfl_up_sync(~0u, e, 1);
    if (lane == 0) before = -1;
#pragma unroll
    for (int n = 1; n < 32; n *= 2) {
      const int x = __shfl_up_sync(~0u, before, n);
      if (lane >= n) before = max(before, x);
    }
    const bool counts = e >= 0 && e > before && e < (seen + C::KEYS - 1) / C::KEYS;
    uint32_t left = __ballot_sync(~0u, counts);
    if (counts) {
      const uint32_t m = (uint32_t)e * C::KEYS / (uint32_t)d.f.pages.rows;
      page = at.table[m];
      row = e * C::KEYS - (int)m * d.f.pages.rows;
    }
    j.first = 0;
    j.end = __popc(left);
    hand_out<C>(p, s, q, j, lane == 0);
    for (; left; left &= left - 1, r.next()) {
      const int from = __ffs(left) - 1, first = __shfl_sync(~0u, e, from) * C::KEYS,
                in = __shfl_sync(~0u, page, from), at_row = __shfl_sync(~0u, row, from);
      if (lane == 0) {
        const l2 hint = keep(j, first);
        bar_wait(&s.k_empty[r.stage], r.parity ^ 1);
        s.first[r.stage] = first;
        bar_expect(&s.k_full[r.stage], C::DP * C::KV);
        for (int x = 0; x < C::DP; x++)
          tma_load(s.k[r.stage] + x * C::KV, &p.k, &s.k_full[r.stage], x * 64, kv_head, at_row, in,
                   hint);
        bar_wait(&s.v_empty[r.stage], r.parity ^ 1);
        bar_expect(&s.v_full[r.stage], C::EP * C::KV);
        for (int x = 0; x < C::EP; x++)
          tma_load(s.v[r.stage] + x * C::KV, &p.v, &s.v_full[r.stage], x * 64, kv_head, at_row, in,
                   hint);
      }
      __syncwarp();
    }
    after();
  });
  hand_out_end<C>(p, s, q, lane == 0);
}

/* ---- attend: a warpgroup ---- */

/* Of 16 rows of o, head by head, where eight values are: number i of them all. */
template <class C> __device__ __forceinline__ int unit_at(int i) {
  const int head = i / (C::E / 8), unit = i % (C::E / 8);
  return head * 2 * C::E + (unit ^ (head & 7)) * 16;
}

/* x[u][4i + 2y + z]: key 64u + 16 warp + lane/4 + 8y of the tile, head 8i + 2(lane % 4) + z. */
template <class C>
__device__ __forceinline__ void start_scores(float (&x)[C::HALVES][8], uint32_t k, uint32_t q) {
  using T = typename C::tile;
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < C::D / 16; i++)
#pragma unroll
    for (int u = 0; u < C::HALVES; u++)
      wgmma<typename C::type, 16>::template ss<>(
          x[u], desc_make(k + u * 8 * T::K_EIGHT + i / 4 * T::K_PANEL + i % 4 * 32, 16, T::K_EIGHT),
          desc_k(q + i / 4 * ROWS16 + i % 4 * 32), i > 0);
  wgmma_commit();
}
/* o[m][4i + 2y + z]: feature 64m + 16 warp + lane/4 + 8y, the same head. */
template <class C>
__device__ __forceinline__ void start_values(float (&o)[C::EP][8], uint32_t v, uint32_t p) {
  using T = typename C::tile;
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < C::KEYS / 16; i++)
#pragma unroll
    for (int m = 0; m < C::EP; m++)
      wgmma<typename C::type, 16>::template ss<true>(
          o[m], desc_make(v + m * T::V_PANEL + 2 * i * T::V_EIGHT, T::V_PANEL, T::V_EIGHT),
          desc_k(p + i / 4 * ROWS16 + i % 4 * 32), 1);
  wgmma_commit();
}

/* Eight of a thread's values, of 16 rows of the warp's from unit `unit` of eight on, to where head
 * by head `row` bytes are, whose units of a panel are swizzled. */
template <class T>
__device__ __forceinline__ void store_heads(uint32_t at, int row, int unit, const float *x) {
  const int lane = threadIdx.x % 32, head = lane / 16 * 8 + lane % 8;
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
  store_transposed(at + head * row + ((unit + lane / 8 % 2) ^ (head & 7)) * 16, w);
}

/* Where o goes, which is in `room` head by head (store_heads). */
template <class C> struct to_memory {
  static constexpr bool GIVES = false; /* its room to others, who do the rest */
  __device__ __forceinline__ void write(const rgk_flash_params &p, const job &j, const char *room,
                                        int tid) const {
#pragma unroll
    for (int i = tid; i < HEADS * C::E / 8; i += WARPGROUP) {
      const int head = i / (C::E / 8), unit = i % (C::E / 8);
      *(uint4 *)((typename C::type *)p.o.data + (int64_t)j.token * p.o.row +
                 (j.head + head) * p.o.head + unit * 8) = *(const uint4 *)(room + unit_at<C>(i));
    }
  }
};

template <class C, class P, class X> struct attention {
  using T = typename C::type;
  static constexpr kind KIND = C::KIND;
  const P &d;
  memory<C> &s;
  const int tid, warp, lane, g, t;
  const float c;
  X &to;
  ring<C::STAGES> k, v;
  int turn;              /* of p */
  uint32_t taken, ended; /* parities; ended: of end_full or end_empty */

  __device__ __forceinline__ void wait_taken() {
    if (KIND != RANKED) return;
    bar_wait(&s.taken, taken);
    taken ^= 1;
  }

  __device__ __forceinline__ void products(const float (&x)[C::HALVES][8], int tile) const {
    if constexpr (KIND == RANKED) {
      float *const to = room_of<C>(d) + 2 * t * d.pitch + tile * C::KEYS + 16 * warp + g;
#pragma unroll
      for (int i = 0; i < 8 * C::HALVES; i++) {
        const int head = i / 4 % 2 * 8 + i % 2;
        to[head * d.pitch + i / 8 * 64 + i / 2 % 2 * 8] = x[i / 8][i % 8];
      }
    }
  }

  /* A copy that ptxas does not take for the accumulators, which the next products want. */
  __device__ __forceinline__ void keep(float (&to)[C::HALVES][8],
                                       const float (&x)[C::HALVES][8]) const {
    if constexpr (KIND == RANKED)
#pragma unroll
      for (int n = 0; n < 8 * C::HALVES; n++)
        asm volatile("mov.b32 %0, %1;" : "=f"(to[n / 8][n % 8]) : "f"(x[n / 8][n % 8]));
  }

  /* Adds up a tile's weights in the other kernel's order: thread 4h + i does what the threads that
   * have head h's columns 2i and 2i + 1 of every eight do there, and rounds where the compiler has
   * them round. */
  __device__ __forceinline__ void add_up(float &l, float &m) const {
    if (tid >= 4 * HEADS) return;
    const float2 r = s.reference[tid / 4];
    m = r.x;
    if constexpr (KIND == SELECTED)
      l = __fadd_rn(__fmul_rn(l, r.y), s.sums[0][tid]);
    else
      l = fmaf(l, r.y, s.sums[0][tid]);
#pragma unroll
    for (int i = 1; i < C::SUMS; i++) l += s.sums[i][tid];
  }

  /* What add_up adds, of weights x. */
  __device__ __forceinline__ void put_sums(const float (&x)[C::HALVES][8]) const {
    /* Of two neighbours each adds up half: the rows y = g & 1. */
    const int odd = g & 1;
#pragma unroll
    for (int i = 0; i < 4 * C::HALVES; i++) {
      const int u = i / 4, at = i / 2 % 2 * 4 + i % 2, head = i / 2 % 2 * 8 + 2 * t + i % 2;
      const float mine = odd ? x[u][at + 2] : x[u][at], other = odd ? x[u][at] : x[u][at + 2];
      const float pair = mine + __shfl_xor_sync(~0u, other, 4);
      if constexpr (KIND == SELECTED) {
        const float both = pair + __shfl_xor_sync(~0u, pair, 4);
        if (!odd) s.sums[warp][4 * head + g / 2] = both;
      } else {
        s.sums[8 * u + 2 * warp + odd][4 * head + g / 2] = pair;
      }
    }
  }

  /* x → weights, in p[turn], of which keys [lo, hi] of the tile are seen; what o must be multiplied
   * by. */
  __device__ __forceinline__ void softmax(float (&x)[C::HALVES][8], float (&m)[4],
                                          float (&scale)[4], int lo, int hi) {
    if (lo > 0 || hi < C::KEYS - 1) {
#pragma unroll
      for (int i = 0; i < 8 * C::HALVES; i++) {
        const int at = i / 8 * 64 + 16 * warp + g + i / 2 % 2 * 8;
        if (at < lo || at > hi) x[i / 8][i % 8] = -INFINITY;
      }
    }
    float top[4], minus[4];
#pragma unroll
    for (int h = 0; h < 4; h++) {
      const int i = h / 2 * 4 + h % 2;
      top[h] = fmaxf(x[0][i], x[0][i + 2]);
      if constexpr (C::HALVES == 2) top[h] = fmaxf(top[h], fmaxf(x[1][i], x[1][i + 2]));
    }
#pragma unroll
    for (int n = 4; n < 32; n *= 2)
#pragma unroll
      for (int h = 0; h < 4; h++) top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], n));
    if (g == 0)
#pragma unroll
      for (int i = 0; i < 2; i++)
        *(float2 *)&s.top[warp][8 * i + 2 * t] = make_float2(top[2 * i], top[2 * i + 1]);
    named_sync(EACH + C::GROUP, WARPGROUP);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float2 a = *(const float2 *)&s.top[0][8 * i + 2 * t];
#pragma unroll
      for (int w = 1; w < 4; w++) {
        const float2 b = *(const float2 *)&s.top[w][8 * i + 2 * t];
        a.x = fmaxf(a.x, b.x), a.y = fmaxf(a.y, b.y);
      }
      top[2 * i] = a.x, top[2 * i + 1] = a.y;
    }
#pragma unroll
    for (int h = 0; h < 4; h++) {
      const bool move = (top[h] - m[h]) * c > LAZY; /* −inf − −inf: no */
      scale[h] = move ? exp2_fast((m[h] - top[h]) * c) : 1;
      m[h] = move ? top[h] : m[h];
      minus[h] = m[h] == -INFINITY ? 0 : -m[h] * c;
    }
    char *const slot = C::TWINS ? slot_of(s, v.stage) : nullptr;
    if (C::TWINS) bar_wait(&s.v_empty[v.stage], v.parity ^ 1);
    if (warp == 0 && g == 0)
#pragma unroll
      for (int h = 0; h < 4; h++) {
        const int head = h / 2 * 8 + 2 * t + h % 2;
        s.reference[head] = make_float2(m[h], scale[h]);
        if (C::TWINS) ((float *)(slot + 2 * ROWS16))[head] = scale[h];
      }
#pragma unroll
    for (int i = 0; i < 8 * C::HALVES; i++) {
      float &e = x[i / 8][i % 8];
      e = exp2_fast(fmaf(e, c, minus[i / 4 % 2 * 2 + i % 2]));
    }
    put_sums(x);
    turn ^= 1;
#pragma unroll
    for (int u = 0; u < C::HALVES; u++)
      store_heads<T>(smem_at(C::TWINS ? slot : s.p[turn]) + u * ROWS16, 128, 2 * warp, x[u]);
    proxy_fence();
  }

  /* Twins: the tile's weights are in their slot, all warps know. */
  __device__ __forceinline__ void send_weights() {
    if (tid == 0) send(s.k[0] + v.stage * SLOT, &s.k_full[v.stage], slot_of(s, v.stage), SENT);
    __syncwarp();
    v.next();
  }

  __device__ __forceinline__ void values_done(float (&o)[C::EP][8]) {
    const waited added = wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < C::EP; i++) wgmma_keep(o[i]);
    warp_release(&s.v_empty[v.stage], added);
    v.next();
  }

  /* All tiles of a job: sums in o, and of 64 threads a share of the sum of weights and m. */
  __device__ __forceinline__ void run_tiles(const job &j, uint32_t q, uint64_t *q_empty,
                                            float (&o)[C::EP][8], float &l, float &reference) {
    const rgk_flash_params &p = paged_of(d).f;
    const int lo = KIND == SELECTED ? 0 : first_key(p, j.position),
              hi = KIND == SELECTED ? min(j.position, j.keys - 1) : last_key(p, j.keys, j.position);
    waited scored = waited::for_nothing();
    float m[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    int key = 0; /* first of the tile whose weights are in p */
    auto start_added = [&]() {
      bar_wait(&s.v_full[v.stage], v.parity);
      if (KIND != SELECTED && key < p.before)
        clear_keys<C, C::BOXES>(s.v[v.stage], 0, min(p.before - key, (int)C::KEYS), C::GROUP);
      if (key + C::KEYS > j.keys)
        clear_keys<C, C::BOXES>(s.v[v.stage], j.keys - key, C::KEYS, C::GROUP);
      start_values<C>(o, smem_at(s.v[v.stage]), smem_at(s.p[turn]));
    };
    auto step = [&](auto first, int i) {
      float x[C::HALVES][8], scale[4];
      bar_wait(&s.k_full[k.stage], k.parity);
      int at = (j.end - 1 - i) * C::KEYS;
      if constexpr (KIND == SELECTED) {
        if (lane == 0) at = s.first[k.stage]; /* read by the lane that gives back */
        at = __shfl_sync(~0u, at, 0);
      }
      start_scores<C>(x, smem_at(s.k[k.stage]), q);
      if constexpr (decltype(first)::value) {
        wait_taken();
        scored = wgmma_wait<0>();
      } else {
        if (!C::TWINS) start_added();
        add_up(l, reference);
        scored = wgmma_wait<!C::TWINS>();
      }
#pragma unroll
      for (int u = 0; u < C::HALVES; u++) wgmma_keep(x[u]);
      warp_release(&s.k_empty[k.stage], scored, at);
      k.next();
      key = at;
      /* Softmax's fence waits for stores in front of it, so they come later; not where weights are
       * sent by then (measured). */
      float kept[C::HALVES][8];
      if (C::TWINS)
        products(x, key / C::KEYS);
      else
        keep(kept, x);
      softmax(x, m, scale, lo - key, hi - key);
      if (C::TWINS) {
        named_sync(EACH + C::GROUP, WARPGROUP);
        send_weights();
        return;
      }
      if constexpr (!decltype(first)::value) values_done(o);
      if (__any_sync(~0u, scale[0] != 1 || scale[1] != 1 || scale[2] != 1 || scale[3] != 1))
#pragma unroll
        for (int n = 0; n < 8 * C::EP; n++) o[n / 8][n % 8] *= scale[n / 4 % 2 * 2 + n % 2];
      named_sync(EACH + C::GROUP, WARPGROUP);
      products(kept, key / C::KEYS);
    };
    step(std::true_type{}, 0);
    for (int i = 1; i < j.end - j.first; i++) step(std::false_type{}, i);
    bar_release(q_empty, scored, j.head, j.keys);
    if (!C::TWINS) start_added();
    add_up(l, reference);
    if (!C::TWINS) values_done(o);
  }

  /* The second's: weights come, o grows. */
  __device__ __forceinline__ void add_values(const job &j, float (&o)[C::EP][8]) {
    const rgk_flash_params &p = paged_of(d).f;
    for (int i = j.end - 1; i >= j.first; i--) {
      const int key = i * C::KEYS;
      const char *const slot = slot_of(s, v.stage);
      bar_wait(&s.k_full[v.stage], v.parity);
      float scale[4];
#pragma unroll
      for (int h = 0; h < 4; h++)
        scale[h] = ((const float *)(slot + 2 * ROWS16))[h / 2 * 8 + 2 * t + h % 2];
      if (__any_sync(~0u, scale[0] != 1 || scale[1] != 1 || scale[2] != 1 || scale[3] != 1))
#pragma unroll
        for (int n = 0; n < 8 * C::EP; n++) o[n / 8][n % 8] *= scale[n / 4 % 2 * 2 + n % 2];
      bar_wait(&s.v_full[v.stage], v.parity);
      if (key < p.before)
        clear_keys<C, C::BOXES>(s.v[v.stage], 0, min(p.before - key, (int)C::KEYS), C::GROUP);
      if (key + C::KEYS > j.keys)
        clear_keys<C, C::BOXES>(s.v[v.stage], j.keys - key, C::KEYS, C::GROUP);
      start_values<C>(o, smem_at(s.v[v.stage]), smem_at(slot));
      const waited added = wgmma_wait<0>();
#pragma unroll
      for (int n = 0; n < C::EP; n++) wgmma_keep(o[n]);
      give_first(&s.v_empty[v.stage], added, scale[0], scale[1], scale[2], scale[3]);
      warp_release(&s.v_empty[v.stage], added, scale[0], scale[1], scale[2], scale[3]);
      v.next();
    }
  }

  /* What o must be multiplied by goes to the second. By all, `end` written. */
  __device__ __forceinline__ void send_end() {
    proxy_fence();
    named_sync(EACH + C::GROUP, WARPGROUP);
    if (tid == 0) send((char *)s.end, &s.end_full, (const char *)s.end, sizeof s.end);
    __syncwarp();
  }

  __device__ __forceinline__ void run_second(const job &j, uint64_t *q_empty) {
    const rgk_flash_params &p = paged_of(d).f;
    float o[C::EP][8], end[4];
    if (tid == 0) bar_expect(&s.end_full, sizeof s.end);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8 * C::EP; i++) o[i / 8][i % 8] = 0;
    add_values(j, o);
    bar_release(q_empty, j.head, j.keys);
    bar_wait(&s.end_full, ended);
    ended ^= 1;
#pragma unroll
    for (int h = 0; h < 4; h++) end[h] = s.end[h / 2 * 8 + 2 * t + h % 2];
    give_first(&s.end_empty, waited::for_nothing(), end[0], end[1], end[2], end[3]);
    char *const room = s.p[0];
    store_o(o, end, room);
    named_sync(EACH + C::GROUP, WARPGROUP);
    to.write(p, j, room, tid);
    named_sync(EACH + C::GROUP, WARPGROUP); /* the next job's rows go there too */
  }

  __device__ __forceinline__ void store_o(float (&o)[C::EP][8], const float (&end)[4],
                                          char *room) const {
#pragma unroll
    for (int x = 0; x < C::EP; x++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float f = end[i / 4 * 2 + i % 2];
        o[x][i] = f == 0 ? 0 : o[x][i] * f;
      }
      store_heads<T>(smem_at(room), 2 * C::E, 8 * x + 2 * warp, o[x]);
    }
  }

  __device__ __forceinline__ void run_job(const job &j, uint32_t q, uint64_t *q_empty) {
    const rgk_flash_params &p = paged_of(d).f;
    float o[C::EP][8], l = 0, reference = -INFINITY;
#pragma unroll
    for (int i = 0; i < 8 * C::EP; i++) o[i / 8][i % 8] = 0;
    if (j.first < j.end) {
      run_tiles(j, q, q_empty, o, l, reference);
    } else {
      bar_release(q_empty, j.head, j.keys);
      wait_taken();
    }

    if (KIND == RANKED && tid == 0) s.r.at = j;
    if (C::TWINS) { /* the second has the last one's */
      bar_wait(&s.end_empty, ended ^ 1);
      ended ^= 1;
    }
    if (tid < 4 * HEADS) {
      const int head = j.head + tid / 4;
      const float sink =
          p.sinks.data ? rgk::load(p.sinks.data, p.sinks.dtype, head * p.sinks.row) : -INFINITY;
      const row_end end = finish_row(reference * c, quad_sum(l), sink);
      if (t == 0) {
        s.end[tid / 4] = end.scale;
        if (KIND == RANKED) s.r.lse[tid / 4] = -LOG2E * end.lse;
        if (p.lse.data)
          ((float *)p.lse.data)[(int64_t)j.token * p.lse.row + head * p.lse.head] = end.lse;
      }
    }
    if (KIND == RANKED) bar_ready(&s.scored);
    if (C::TWINS) {
      send_end();
      return;
    }
    named_sync(EACH + C::GROUP, WARPGROUP);
    /* p[turn] was read by the last product, the other by none that other warps may still run */
    char *room = s.p[turn ^ 1];
    if constexpr (X::GIVES) room = to.room();
    float end[4];
#pragma unroll
    for (int h = 0; h < 4; h++) end[h] = s.end[h / 2 * 8 + 2 * t + h % 2];
    store_o(o, end, room);
    if constexpr (X::GIVES) to.give();
    named_sync(EACH + C::GROUP, WARPGROUP);
    if constexpr (!X::GIVES) to.write(p, j, room, tid);
  }

  __device__ __forceinline__ void run() {
    for (ring<2> q;; q.next()) {
      bar_wait(&s.q_full[q.stage], q.parity);
      const job j = s.jobs[q.stage];
      if (j.kind == EXIT) break;
      if constexpr (C::TWINS)
        if (!has_keys<C>()) {
          if (j.kind == DEAD_ROWS)
            bar_release(&s.q_empty[q.stage], j.head, j.keys);
          else
            run_second(j, &s.q_empty[q.stage]);
          continue;
        }
      if (j.kind == DEAD_ROWS) {
        bar_release(&s.q_empty[q.stage], j.head, j.keys);
        if constexpr (!X::GIVES) clear_rows<C, true>(paged_of(d).f, j);
        if constexpr (KIND == RANKED)
          if (tid < d.topk.top_n) idx_of(d, j)[tid] = 0;
        continue;
      }
      run_job(j, smem_at(s.q[q.stage]), &s.q_empty[q.stage]);
    }
    if (!has_keys<C>()) return;
    wait_taken();
    if (KIND == RANKED) {
      if (tid == 0) s.r.at.kind = EXIT;
      bar_ready(&s.scored);
    }
  }
};

/* By one thread. */
template <class C> __device__ __forceinline__ void init(const rgk_flash_params &p, memory<C> &s) {
  for (int i = 0; i < 2; i++) bar_init(&s.q_full[i], 1), bar_init(&s.q_empty[i], WARPGROUP);
  bar_init(&s.scored, WARPGROUP), bar_init(&s.taken, RANKS);
  bar_init(&s.end_full, 1), bar_init(&s.end_empty, 4 * WARP_ARRIVALS);
  for (int i = 0; i < C::STAGES; i++) {
    bar_init(&s.k_full[i], 1), bar_init(&s.k_empty[i], 4 * WARP_ARRIVALS);
    bar_init(&s.v_full[i], 1), bar_init(&s.v_empty[i], 4 * WARP_ARRIVALS);
  }
  bar_init_done();
  map_prefetch(&p.q), map_prefetch(&p.k), map_prefetch(&p.v);
}
/* By all threads: the block's memory, its barriers ready. */
template <class C>
__device__ __forceinline__ memory<C> &begin(const rgk_flash_params &p, char *bytes) {
  static_assert(sizeof(memory<C>) + 1024 <= RGK_DECODE_SHARED(C::D), "fits wherever it starts");
  static_assert(RGK_DECODE_SHARED(C::D) <= 227 * 1024, "fits");
  memory<C> &s = *(memory<C> *)(bytes + (-smem_at(bytes) & 1023));
  if (threadIdx.x == 0) init(p, s);
  __syncthreads();
  if (C::TWINS) cluster_sync();
  return s;
}
template <class C, class P, class X>
__device__ __forceinline__ void attend(const P &d, memory<C> &s, X &to) {
  const int tid = (int)threadIdx.x % 128, lane = tid % 32;
  attention<C, P, X> x{
      d,  s,  tid, tid / 32, lane, lane / 4,   lane % 4, paged_of(d).f.scale * LOG2E,
      to, {}, {},  0,        1,    (uint32_t)0};
  x.run();
}
template <class C, class P> __device__ __forceinline__ void attend(const P &d, memory<C> &s) {
  to_memory<C> to;
  attend<C>(d, s, to);
}
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
}

} // namespace decode
} // namespace rgk
