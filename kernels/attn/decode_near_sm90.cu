/* kernels/attn/decode_near_sm90.cu: what decode_sm90.cu does, to the same bits, for few tokens.

   Which blocks are the best is first found nearly, of weights that attention has made anyway, then
   to the bit for the few that can be meant. A warpgroup sums up a tile's weights, as they were
   rounded for the product, block by block and head by head, while attention goes on:

       sum[block, h] = Σ its rows, at their overlaps, exp(s − m of the tile)        in bf16

   When lse is known, another makes of those

       score[block] ≈ Σ heads sum[block, h] exp(m of the tile − lse)

   within bounds (NEAR). Only blocks that may score as much as `keep` others can be chosen. Their
   keys are fetched once more and multiplied anew, to the same bits (a row's product does not depend
   on its place in a tile), and scored as decode_sm90.cu does. Where too many can be meant, as where
   blocks tie, all are scored so.

   The loops of those who attend and of those who sum up run side by side on each quarter of a
   multiprocessor. They are kept to some 750 instructions together.
 */
#include "decode_choice_sm90.cuh"
#include "decode_layer_sm90.cuh"
#include "decode_wide_sm90.cuh"

using namespace rgk;
using namespace rgk::decode;

namespace {

constexpr int BLOCK = RGK_DECODE_BLOCK, BLOCKS = RGK_DECODE_BLOCKS;
enum { RANKING = EACH + 1 }; /* named barrier of those who rank */

/* ---- sum up: a warpgroup ---- */

/* A thread has four heads of a block. */
template <class C, class P> __device__ __forceinline__ void sum_up(const P &all, memory<C> &s) {
  using T = typename C::type;
  const rgk_decode &d = step_of(all);
  const int tid = (int)threadIdx.x % WARPGROUP, b = tid / 4, head = tid % 4 * 4,
            after = (b + 1) % BLOCKS; /* the block whose first key ends this one's reach */
  ring<2> w;
  ring<2> r;
  bool begins = true;
  float last[4] = {}; /* weight of the key behind the tile, as the tile behind it had it */
  for (;; w.next()) {
    bar_wait(&s.p_full[w.stage], w.parity);
    const weighed &x = s.slot[w.stage];
    const int at = x.at;
    if (at == -1) break;
    if (C::LAYER && at < 0) {
      take_rows<C>(all, s, w);
      continue;
    }
    const char *const p = s.p[w.stage];
    auto keys_at = [&](int block, int h) { /* four weights */
                                           return p + block / 16 * ROWS16 + h * 128 +
                                                  ((block / 2 ^ h) & 7) * 16 + block % 2 * 8;
    };
    float sum[4];
    uint32_t read = (uint32_t)at;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint2 four = *(const uint2 *)keys_at(b, head + i);
      const uint32_t edge = *(const uint16_t *)keys_at(after, head + i);
      const float scale = x.reference[head + i].y, first = unpack2<T>(edge).x;
      const float2 low = unpack2<T>(four.x), high = unpack2<T>(four.y);
      sum[i] = low.x + 2 * (low.y + high.x + high.y) + (after ? first : last[i] * scale);
      last[i] = first;
      read ^= four.x ^ four.y ^ edge ^ release::word(scale);
    }
    const float reference = tid < HEADS ? x.reference[tid].x : 0;
    warp_release(&s.p_empty[w.stage], read, reference);
    if (begins) bar_wait(&s.used[r.stage], r.parity ^ 1);
    const kept to = kept_of<C>(d, r.stage);
    const int64_t tile = at / 2;
    *(uint2 *)(to.sums + tile * RGK_DECODE_SUMS + (b * HEADS + head) * 2) =
        make_uint2(pack2<__nv_bfloat16>(sum[0], sum[1]), pack2<__nv_bfloat16>(sum[2], sum[3]));
    if (tid < HEADS) to.refs[tile * HEADS + tid] = reference;
    begins = at % 2;
    if (begins) {
      bar_ready(&s.summed[r.stage]);
      r.next();
#pragma unroll
      for (int i = 0; i < 4; i++) last[i] = 0;
    }
  }
}

/* ---- rank: a warpgroup ---- */

/* What a score may be off by: weights and sums are rounded to eight bits each, 2^−9 and 2^−9; the
 * exponents' roundings are below 2^−14. fp16 loses up to 2^−25 of each of a block's weights, eight
 * in all, too; and what underflows is less than TINY. */
constexpr float NEAR = 0.0042f, TINY = 1e-30f;
template <class T> constexpr float LOST = std::is_same_v<T, __half> ? 9 * 0x1p-25f : 0;

/* Sum, or largest, of x over all that rank. */
template <class C> struct counter {
  near_ranks<C> &r;
  int turn;
  __device__ __forceinline__ void put(int x) {
    turn ^= 1;
    if (threadIdx.x % 32 == 0) r.part[turn][threadIdx.x / 32 % 4] = x;
    named_sync(RANKING, WARPGROUP);
  }
  __device__ __forceinline__ int sum(int x) {
    put(__reduce_add_sync(~0u, x));
    const int *const n = r.part[turn];
    return n[0] + n[1] + n[2] + n[3];
  }
  __device__ __forceinline__ int most(int x) {
    put(__reduce_max_sync(~0u, x));
    const int *const n = r.part[turn];
    return max(max(n[0], n[1]), max(n[2], n[3]));
  }
};

template <class C> struct ranking {
  using T = typename C::type;
  static constexpr int GROUP = 12, ROUND = 2 * GROUP; /* blocks of a product of 64 rows; of two */
  static constexpr int AT_ONCE = 8;                   /* tiles that a warp reads */
  const rgk_decode &d;
  memory<C> &s;
  near_ranks<C> &r;
  const int tid, warp, lane;

  /* Warps take turns with tiles. */
  __device__ __forceinline__ int first_tile(const rgk_topk_choice &c) const {
    return (int)c.free0 / BLOCKS + warp;
  }
  __device__ __forceinline__ int end_tile(const rgk_topk_choice &c) const {
    return (int)(c.free1 - 1) / BLOCKS + 1;
  }

  /* More than a warp reads at once? */
  __device__ __forceinline__ bool many(const rgk_topk_choice &c) const {
    return end_tile(c) - (int)c.free0 / BLOCKS > 4 * AT_ONCE;
  }

  /* q in the copy engine's swizzle, for products; there after q_there() and a barrier. */
  __device__ __forceinline__ void fetch_q(const job &j) const {
    const rgk_tensor &t = d.topk.q;
    const T *const from =
        (const T *)t.data + (int64_t)j.token * t.row + (j.head + tid / 8) * t.head + tid % 8 * 8;
#pragma unroll
    for (int x = 0; x < C::DP; x++)
      copy16(smem_at(r.q) + x * ROWS16 + tid / 8 * 128 + ((tid ^ tid / 8) & 7) * 16, from + 64 * x);
  }
  __device__ __forceinline__ void q_there() const {
    copies_wait_all();
    proxy_fence();
  }

  /* The most that blocks of [c.free0, c.free1) can score: `most` of this thread's, to scores_of
   * where they are more; the most that one of this thread's does at least, as a key. */
  __device__ __forceinline__ int estimate(const job &j, const rgk_topk_choice &c, const kept &from,
                                          float lse, float (&most)[AT_ONCE]) const {
    const int first = first_tile(c), end = end_tile(c);
    float *const to = scores_of<C>(d);
    int top = LEAST_KEY;
#pragma unroll 1
    for (int tile = first; tile < end; tile += 4 * AT_ONCE) {
      uint4 sum[AT_ONCE][2];
      float reference[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int64_t t = tile + 4 * i;
        const bool there = t < end && t >= j.first && t < j.end;
        const uint4 *const x = (const uint4 *)(from.sums + t * RGK_DECODE_SUMS) + 2 * lane;
        sum[i][0] = sum[i][1] = make_uint4(0, 0, 0, 0);
        reference[i] = -INFINITY;
        if (there) sum[i][0] = x[0], sum[i][1] = x[1];
        if (there) reference[i] = from.refs[t * HEADS + lane % HEADS];
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int t = tile + 4 * i, b = t * BLOCKS + lane;
        if (t >= end) break;
        const float own = exp2_fast(reference[i] + lse);
        const uint32_t word[HEADS / 2] = {sum[i][0].x, sum[i][0].y, sum[i][0].z, sum[i][0].w,
                                          sum[i][1].x, sum[i][1].y, sum[i][1].z, sum[i][1].w};
        float score = 0, all = 0;
#pragma unroll
        for (int h = 0; h < HEADS; h += 2) {
          const float2 x = unpack2<__nv_bfloat16>(word[h / 2]);
          const float f0 = __shfl_sync(~0u, own, h), f1 = __shfl_sync(~0u, own, h + 1);
          score = fmaf(x.y, f1, fmaf(x.x, f0, score));
          if (LOST < T >> 0) all += f0 + f1;
        }
        const float off = fmaf(LOST<T>, all, TINY);
        if (t < j.first || t >= j.end) score = 0;
        most[i] = fmaf(score, 1 + NEAR, off);
        if (b >= c.free0 && b < c.free1) {
          if (many(c)) to[b] = most[i];
          top = max(top, key_of(fmaf(score, 1 - NEAR, -off)));
        }
      }
    }
    return top;
  }

  /* At least `keep` blocks score as much, as far as two threads' largest tell; where too few have
   * any, a number that is none. */
  __device__ __forceinline__ float find_least(int top, int keep) const {
    top = max(top, __shfl_xor_sync(~0u, top, 1));
    if (tid % 2 == 0) r.top[tid / 2] = top;
    named_sync(RANKING, WARPGROUP);
    int more = 0;
#pragma unroll
    for (int i = 0; i < PAIRS / 8; i++) {
      const int4 x = *(const int4 *)(r.top + (2 * i + tid % 2) * 4);
      more += (x.x > top) + (x.y > top) + (x.z > top) + (x.w > top);
    }
    more += __shfl_xor_sync(~0u, more, 1);
    const int least = __reduce_min_sync(~0u, more < keep ? top : INT_MAX);
    if (lane == 0) atomicMin(&r.least, least);
    named_sync(RANKING, WARPGROUP);
    const int key = r.least;
    return __int_as_float(key < 0 ? key ^ 0x7fffffff : key);
  }

  /* Blocks that may score as much: how many; the first CANDIDATES of them to r.block. */
  __device__ __forceinline__ int find_candidates(const rgk_topk_choice &c, float least,
                                                 float (&most)[AT_ONCE]) const {
    const int first = first_tile(c), end = end_tile(c);
    const float *const from = scores_of<C>(d);
    auto is_among = [&](int b) { return b >= c.free0 && b < c.free1; };
#pragma unroll 1
    for (int tile = first; tile < end; tile += 4 * AT_ONCE) {
      if (many(c))
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
          const int b = (tile + 4 * i) * BLOCKS + lane;
          if (is_among(b)) most[i] = from[b]; /* written by this thread */
        }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int b = (tile + 4 * i) * BLOCKS + lane;
        if (!is_among(b) || (most[i] < least && least < INFINITY)) continue;
        const int n = atomicAdd(&r.count, 1);
        if (n < CANDIDATES) r.block[n] = b;
      }
    }
    named_sync(RANKING, WARPGROUP);
    return r.count;
  }

  /* Scores of blocks block(0) … block(n − 1), n ≤ ROUND, as keys: put(i, key). */
  template <class F, class G>
  __device__ __forceinline__ void score(const job &j, const int32_t *table, int visible,
                                        const float *lse, int n, F block, G put) const {
    constexpr int K = C::D / 16; /* steps of a product */
    const rgk_flash_params &p = d.f.f;
    const rgk_pages &g = d.f.pages;
    const int at = lane / 4, t = lane % 4;
    const T *const head =
        (const T *)d.topk.k.data + (int64_t)rgk_over(j.head, p.by_group) * d.topk.k.head + 2 * t;
    const T *from[2][2];
    bool seen[2][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int u = i / 2, y = i % 2, local = 16 * warp + at + 8 * y, of = local / (BLOCK + 1),
                number = u * GROUP + of;
      int row = -1;
      if (of < GROUP && number < n) row = BLOCK * block(number) + local - of * (BLOCK + 1);
      seen[u][y] = row >= p.before && row < visible;
      const int m = seen[u][y] ? rgk_over(row, d.f.by_rows) : 0;
      const uint32_t page = seen[u][y] ? (uint32_t)table[m] : ~0u;
      from[u][y] = page < (uint32_t)g.count
                       ? head + (int64_t)page * g.k_page + (row - m * g.rows) * d.topk.k.row
                       : nullptr;
    }
    uint32_t a[2][K][4];
#pragma unroll
    for (int i = 0; i < 4 * K; i++) {
      const int u = i / (2 * K), k = i / 2 % K, y = i % 2;
      a[u][k][y] = a[u][k][2 + y] = 0; /* a page that is none */
      if (from[u][y]) {
        a[u][k][y] = *(const uint32_t *)(from[u][y] + 16 * k);
        a[u][k][2 + y] = *(const uint32_t *)(from[u][y] + 16 * k + 8);
      }
    }
    float x[2][8];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
      for (int u = 0; u < 2; u++)
        wgmma<T, 16>::template rs<>(x[u], a[u][k],
                                    desc_k(smem_at(r.q) + k / 4 * ROWS16 + k % 4 * 32), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_keep(x[0]), wgmma_keep(x[1]);
    const float scale = d.topk.scale * LOG2E;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int u = i / 2, y = i % 2;
      float part[2];
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        /* of the quad's lane that has head h */
        float &own = x[u][h / 8 * 4 + 2 * y + h % 2];
        if (h % 8 < 2) own = exp2_fast(fmaf(own, scale, lse[h / 8 * 8 + 2 * t + h % 2]));
        const float e = __shfl_sync(~0u, own, h % 8 / 2, 4);
        part[h % 2] = h < 2 ? e : part[h % 2] + e;
      }
      if (t == 0) r.p[64 * u + 16 * warp + at + 8 * y] = seen[u][y] ? part[0] + part[1] : 0;
    }
    named_sync(RANKING, WARPGROUP);
    if (tid < n) {
      const float *const row = r.p + tid / GROUP * 64 + tid % GROUP * (BLOCK + 1);
      float score = row[0];
      score = fmaf(2, row[1], score);
      score = fmaf(2, row[2], score);
      score = fmaf(2, row[3], score) + row[4];
      put(tid, key_of(score));
    }
    named_sync(RANKING, WARPGROUP); /* r.p is written again; keys are there */
  }

  /* The `keep` best of n candidates into r.chosen: one thread counts for each how many come before
   * it. Equal ones by place. */
  __device__ __forceinline__ void select_few(int n, int keep) const {
    if (tid < 4) r.key[n + tid] = LEAST_KEY;
    named_sync(RANKING, WARPGROUP);
    if (tid < n) {
      const int mine = r.key[tid], block = r.block[tid];
      const int before = come_before(r.key, r.block, n, mine, block);
      if (before < keep) r.chosen[before] = make_int2(mine, block);
    }
    named_sync(RANKING, WARPGROUP);
  }

  /* The same of any number, by bisection; the largest of this thread's is `top`. */
  __device__ __forceinline__ void select(const int *keys, int n, int keep, int first,
                                         int top) const {
    counter<C> all = {r, 0};
    auto from = [&](int least) {
      int m = 0;
      for (int i = tid; i < n; i += WARPGROUP) m += keys[i] >= least;
      return all.sum(m);
    };
    int lo = NAN_KEY, reach = n, last = n;
    int64_t hi = (int64_t)all.most(top) + 1;
    while (reach != keep && hi - lo > 1) {
      const int middle = (int)(lo + (hi - lo) / 2), m = from(middle);
      if (m >= keep)
        lo = middle, reach = m;
      else
        hi = middle;
    }
    if (reach > keep) { /* of those equal to lo, the first ones */
      const int ties = keep - (hi > INT_MAX ? 0 : from((int)hi));
      int below = -1;
      last = n - 1;
      while (last - below > 1) {
        const int middle = below + (last - below) / 2;
        int m = 0;
        for (int i = tid; i <= middle; i += WARPGROUP) m += keys[i] == lo;
        if (all.sum(m) >= ties)
          last = middle;
        else
          below = middle;
      }
    }
    if (tid == 0) r.count = 0;
    named_sync(RANKING, WARPGROUP);
    for (int i = tid; i < n; i += WARPGROUP)
      if (keys[i] > lo || (keys[i] == lo && i <= last))
        r.chosen[atomicAdd(&r.count, 1)] = make_int2(keys[i], first + i);
    named_sync(RANKING, WARPGROUP);
  }

  /* By one warp: the row of idx. True: fp32 does not decide. */
  __device__ __forceinline__ bool write(const job &j, const rgk_topk_choice &c, bool ranks,
                                        bool seen) const {
    const int top_n = d.topk.top_n;
    int32_t *const idx = idx_of(d, j);
    if (!ranks) {
      const int64_t b = lane < c.free0 || c.keep > 0 ? lane : lane - c.free0 + c.free1;
      if (lane < top_n) idx[lane] = b < c.count ? (int32_t)b : -1;
      return false;
    }
    const int keep = (int)c.keep;
    const int2 mine = lane < keep ? r.chosen[lane] : make_int2(INT_MAX, INT_MAX);
    int place = (int)c.free0;
    for (int i = 0; i < keep; i++) place += __shfl_sync(~0u, mine.y, i) < mine.y;
    const int least = __reduce_min_sync(~0u, mine.x);
    if (seen && least != NAN_KEY && undecided(__int_as_float(least))) return true;
    if (lane < c.free0) idx[lane] = lane;
    if (lane < keep) idx[place] = mine.y;
    const int n = (int)(c.free0 + keep);
    if (lane >= n && lane < top_n) {
      const int64_t b = c.free1 + lane - n;
      idx[lane] = b < c.count ? (int32_t)b : -1;
    }
    return false;
  }

  __device__ __forceinline__ void choose(const job &j, const rgk_topk_choice &c,
                                         const int32_t *table, int visible, const float *lse,
                                         int top, float (&most)[AT_ONCE]) const {
    const int first = (int)c.free0, all = (int)c.free1 - first, keep = (int)c.keep,
              n = find_candidates(c, find_least(top, keep), most);
    if (n <= CANDIDATES) {
      for (int i = 0; i < n; i += ROUND)
        score(
            j, table, visible, lse, min(n - i, ROUND), [&](int k) { return r.block[i + k]; },
            [&](int k, int key) { r.key[i + k] = key; });
      select_few(n, keep);
      return;
    }
    int *const keys = (int *)scores_of<C>(d);
    top = LEAST_KEY;
    for (int i = 0; i < all; i += ROUND)
      score(
          j, table, visible, lse, min(all - i, ROUND), [&](int k) { return first + i + k; },
          [&](int k, int key) {
            keys[i + k] = key;
            top = max(top, key);
          });
    select(keys, all, keep, first, top);
  }

  __device__ __forceinline__ void run() const {
    const rgk_flash_params &p = d.f.f;
    const rgk_pages &g = d.f.pages;
    ring<2> q, m;
    for (;; q.next()) {
      bar_wait(&s.near_scored[q.stage], q.parity);
      const job j = s.token[q.stage].at;
      if (j.kind == EXIT) break;
      const rgk_topk_choice c = choice_of(d.topk, j.position);
      const bool ranks = rgk_topk_ranks(c), summed = j.first < j.end;
      const int visible = last_key(p, j.keys, j.position) + 1;
      const float *const lse = s.token[q.stage].lse;
      const rgk_tensor &to = p.lse;
      if (C::LAYER && to.data && tid < HEADS)
        ((float *)to.data)[(int64_t)j.token * to.row + (j.head + tid) * to.head] =
            s.token[q.stage].exact[tid];
      float most[AT_ONCE];
      int top = 0;
      /* A shuffle waits for what it is given: where nothing is to be weighed, nobody else does. */
      float own = 0; /* lse of a head */
      if (ranks) fetch_q(j), own = __shfl_sync(~0u, lse[lane % HEADS], lane);
      if (tid == 0) r.count = 0, r.least = INT_MAX;
      if (summed) bar_wait(&s.summed[m.stage], m.parity);
      if (ranks) top = estimate(j, c, kept_of<C>(d, m.stage), own, most);
      if (summed) {
        bar_release(&s.used[m.stage], top, j.head, j.keys);
        m.next();
      }
      if (ranks) {
        q_there();
        const int32_t *const table = g.table + find_seq_warp(p.seqs, j.token) * g.table_row;
        choose(j, c, table, visible, lse, top, most);
      }
      if (warp == 0) {
        const bool late = write(j, c, ranks, visible > p.before);
        if (lane == 0) s.late[q.stage] = late;
        if (C::LAYER && !late) warp_ready(&s.chosen[q.stage]);
      }
      named_sync(RANKING, WARPGROUP); /* all this is written again */
      if (__shfl_sync(~0u, s.late[q.stage], 0)) {
        choose_wide<T, WARPGROUP>(d, &j, &c, visible, (unsigned long long *)scores_of<C>(d), r.wide,
                                  r.chosen, RANKING);
        if (warp == 0) {
          write(j, c, true, false);
          if (C::LAYER) warp_ready(&s.chosen[q.stage]);
        }
        named_sync(RANKING, WARPGROUP);
      }
      bar_release(&s.near_taken[q.stage], j.head, j.keys);
    }
  }
};

/* ---- kernel ---- */

template <class C, class P>
__global__ void __launch_bounds__(RGK_DECODE_THREADS, 1) choose(const __grid_constant__ P all) {
  extern __shared__ char bytes[];
  const rgk_decode &d = step_of(all);
  memory<C> &s = begin<C>(d.f.f, bytes);
  const int part = warpgroup();
  if (part == 0) {
    load_all<C>(all, s);
  } else if (part == 1) {
    attend_all<C>(all, s);
  } else if (part == 2) {
    step_all<C>(all, s);
    sum_up<C>(all, s);
  } else {
    const int tid = (int)threadIdx.x % WARPGROUP;
    ranking<C>{d, s, s.choice[0], tid, tid / 32, tid % 32}.run();
  }
}

} // namespace

template <bool LAYER, class P> static const void *instance(rg_dtype type, int32_t width) {
#define GET(t, D)              \
  if (type == t && width == D) \
    return (const void *)choose<setup<element<t>::type, D, RANKED, false, false, true, LAYER>, P>;
  GET(RG_BF16, 128)
  GET(RG_BF16, 64)
#ifndef RGK_DEV
  GET(RG_F16, 128)
  GET(RG_F16, 64)
#endif
  return nullptr;
}

const void *rgk_decode_near(rg_dtype type, int32_t width) {
  return instance<false, rgk_decode>(type, width);
}
const void *rgk_decode_layer_sm90(rg_dtype type, int32_t width) {
  return instance<true, rgk_decode_layer>(type, width);
}
