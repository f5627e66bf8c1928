/* kernels/attn/decode_sm90.cu: see decode.h.

   Attention is flash_fwd_sm90.cuh's: a tile's first 16 rows are the heads of one token. The
   products that it takes the softmax of are those that topk ranks by (q kᵀ has the bits of
   k qᵀ), so they are put aside, in memory that stays in L2; when lse is known, the same warpgroup
   makes of them

       p[r] = Σ heads exp(s − lse)      score[block] = its rows' p, ascending, times overlap

   in the order of topk_sm90.cu, finds by bisection which score `keep` blocks reach, and writes idx.
   Rows count as in pages: block b has rows 4b … 4b + 4, of which the first and the last half.
 */
#include "decode.h"
#include "flash_fwd_sm90.cuh"
#include "topk.cuh"

using namespace rgk;
using namespace rgk::flash;

namespace {

constexpr int HEADS = RGK_DECODE_HEADS, BLOCK = RGK_DECODE_BLOCK, MOST = 32;

struct ranked {
  float lse[HEADS]; /* as the exponential wants it */
  int part[2][4];   /* of a sum over the warpgroup, two in turn */
  int count;
  int2 chosen[MOST]; /* key, block */
};

/* Sum, or largest, of x over the warpgroup. */
struct counter {
  ranked &r;
  int turn;
  __device__ __forceinline__ void put(int x) {
    turn ^= 1;
    if (threadIdx.x % 32 == 0) r.part[turn][threadIdx.x / 32 % 4] = x;
    named_sync(EACH, WARPGROUP);
  }
  __device__ __forceinline__ int sum(int x) {
    put(__reduce_add_sync(~0u, x));
    const int *p = r.part[turn];
    return p[0] + p[1] + p[2] + p[3];
  }
  __device__ __forceinline__ int most(int x) {
    put(__reduce_max_sync(~0u, x));
    const int *p = r.part[turn];
    return max(max(p[0], p[1]), max(p[2], p[3]));
  }
};

template <class C> struct rank_blocks {
  const rgk_decode &d;
  ranked &r;

  __device__ __forceinline__ float *room() const {
    return d.room + blockIdx.x * RGK_DECODE_ROWS_KEPT * d.pitch;
  }
  __device__ __forceinline__ int32_t *idx_of(const job &j) const {
    return (int32_t *)d.topk.idx.data + (int64_t)j.token * d.topk.idx.row +
           (j.head >> d.f.f.pack) * d.topk.idx.head;
  }

  __device__ __forceinline__ void products(const float (&x)[C::N / 2], const job &j, int t,
                                           int row) const {
    if (row >= j.rows) return;
    float *to = room() + row * d.pitch + t * C::N + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < C::N / 8; i++) {
      *(float2 *)(to + 8 * i) = make_float2(x[4 * i], x[4 * i + 1]);
      *(float2 *)(to + 8 * d.pitch + 8 * i) = make_float2(x[4 * i + 2], x[4 * i + 3]);
    }
  }

  __device__ __forceinline__ void dead(const job &j) const {
    const int i = (int)threadIdx.x - 128;
    if (i < d.topk.top_n) idx_of(j)[i] = 0;
  }

  /* Scores of blocks [c.free0, c.free1) as keys; this thread's largest. */
  __device__ __forceinline__ int score(const rgk_topk_choice &c, int visible, int *keys) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const float scale = d.topk.scale * LOG2E;
    const float *const from = room();
    int top = LEAST_KEY;
    /* a warp's last lane only lends its first row */
    for (int first = (int)c.free0 + warp * 31; first < c.free1; first += 4 * 31) {
      const int b = first + lane;
      float part[2][BLOCK], sum[BLOCK];
      float4 s[HEADS];
#pragma unroll
      for (int h = 0; h < HEADS; h++) s[h] = *(const float4 *)(from + h * d.pitch + BLOCK * b);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const float lse = r.lse[h], x[BLOCK] = {s[h].x, s[h].y, s[h].z, s[h].w};
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
          const float e = exp2_fast(fmaf(x[i], scale, lse));
          part[h % 2][i] = h < 2 ? e : part[h % 2][i] + e;
        }
      }
#pragma unroll
      for (int i = 0; i < BLOCK; i++) {
        const int row = BLOCK * b + i;
        sum[i] = row < d.f.f.before || row >= visible ? 0 : part[0][i] + part[1][i];
      }
      const float next = __shfl_down_sync(~0u, sum[0], 1);
      float score = sum[0];
      score = fmaf(2, sum[1], score);
      score = fmaf(2, sum[2], score);
      score = fmaf(2, sum[3], score) + next;
      if (lane < 31 && b < c.free1) {
        const int key = key_of(score);
        keys[b - c.free0] = key;
        top = max(top, key);
      }
    }
    return top;
  }

  /* The `keep` best of n keys, into r.chosen; equal ones by lower block. */
  __device__ __forceinline__ void select(const int *keys, int n, int keep, int first, int top,
                                         counter &all) const {
    const int tid = (int)threadIdx.x - 128;
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
    for (int i = tid; i < n; i += WARPGROUP)
      if (keys[i] > lo || (keys[i] == lo && i <= last))
        r.chosen[atomicAdd(&r.count, 1)] = make_int2(keys[i], first + i);
    named_sync(EACH, WARPGROUP);
  }

  /* By one warp: the row of idx. */
  __device__ __forceinline__ void write(const job &j, const rgk_topk_choice &c, bool ranks,
                                        bool seen) const {
    const int lane = threadIdx.x % 32, top_n = d.topk.top_n;
    int32_t *const idx = idx_of(j);
    if (!ranks) {
      const int64_t b = lane < c.free0 || c.keep > 0 ? lane : lane - c.free0 + c.free1;
      if (lane < top_n) idx[lane] = b < c.count ? (int32_t)b : -1;
      return;
    }
    const int keep = (int)c.keep;
    const int2 mine = lane < keep ? r.chosen[lane] : make_int2(INT_MAX, INT_MAX);
    int place = (int)c.free0;
    for (int i = 0; i < keep; i++) place += __shfl_sync(~0u, mine.y, i) < mine.y;
    const int least = __reduce_min_sync(~0u, mine.x);
    if (seen && least != NAN_KEY && undecided(__int_as_float(least))) {
      if (lane == 0) idx[0] = RGK_TOPK_UNDECIDED;
      return;
    }
    if (lane < c.free0) idx[lane] = lane;
    if (lane < keep) idx[place] = mine.y;
    const int n = (int)(c.free0 + keep);
    if (lane >= n && lane < top_n) {
      const int64_t b = c.free1 + lane - n;
      idx[lane] = b < c.count ? (int32_t)b : -1;
    }
  }

  __device__ __forceinline__ void end(shared<C> &s, const job &j, int row,
                                      const float (&lse)[2]) const {
    const rgk_topk_choice c = choice_of(d.topk, j.position);
    const bool ranks = rgk_topk_ranks(c);
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int visible = last_key(d.f.f, j.keys, j.position) + 1, n = (int)(c.free1 - c.free0);
    if (ranks) {
      int *const keys = n <= (int)sizeof s.o / 4
                            ? (int *)&s.o
                            : (int *)(room() + (RGK_DECODE_ROWS_KEPT - 1) * d.pitch);
      counter all = {r, 0};
      if (warp == 0 && lane % 4 == 0)
        for (int y = 0; y < 2; y++) r.lse[row + 8 * y] = -LOG2E * lse[y];
      if (warp == 0 && lane == 0) {
        r.count = 0;
        store_wait_read<0>(); /* o has left its room */
      }
      named_sync(EACH, WARPGROUP);
      const int top = score(c, visible, keys);
      select(keys, n, (int)c.keep, (int)c.free0, top, all);
    }
    if (warp == 0) write(j, c, ranks, visible > d.f.f.before);
    named_sync(EACH, WARPGROUP); /* all this is written again */
  }
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) decode(const __grid_constant__ rgk_decode d) {
  __shared__ ranked r;
  static_assert(sizeof(ranked) + RGK_FLASH_SHARED(C::D, C::E, 1, C::N) <= 227 * 1024, "fits");
  run<C>(d.f, rank_blocks<C>{d, r});
}

} // namespace

const void *rgk_decode_sm90(rg_dtype type, int32_t width) {
#define GET(t, D)              \
  if (type == t && width == D) \
    return (const void *)decode<config<element<t>::type, D, D, 1, RGK_DECODE_KEYS>>;
  GET(RG_BF16, 128)
  GET(RG_BF16, 64)
#ifndef RGK_DEV
  GET(RG_F16, 128)
  GET(RG_F16, 64)
#endif
  return nullptr;
}
