/* kernels/attn/decode_sm90.cu: attention of single tokens over compressed keys (decode_sm90.cuh),
   and the choice of blocks by its scores.

   The products that attention takes the softmax of are those that topk ranks by (q kᵀ has the bits
   of k qᵀ), so they are put aside, in memory that stays in L2. When lse is known, other warps make
   of them

       p[r] = Σ heads exp(s − lse)      score[block] = its rows' p, ascending, times overlap

   in the order of topk_sm90.cu, find which blocks are the best, and write idx, while attention goes
   on with the next job as soon as they have read the products. Rows count as in pages: block b has
   rows 4b … 4b + 4, of which the first and the last half.
 */
#include "decode_sm90.cuh"
#include "decode_wide_sm90.cuh"

using namespace rgk;
using namespace rgk::decode;

namespace {

constexpr int BLOCK = RGK_DECODE_BLOCK;
enum { RANKING = EACH + 1 }; /* named barrier of those who rank */

/* ---- rank: two warpgroups ---- */

/* Sum, or largest, of x over all that rank. */
struct counter {
  ranked &r;
  int turn;
  __device__ __forceinline__ void put(int x) {
    turn ^= 1;
    if (threadIdx.x % 32 == 0) r.part[turn][threadIdx.x / 32 % WARPS] = x;
    named_sync(RANKING, RANKS);
  }
  __device__ __forceinline__ int sum(int x) {
    put(__reduce_add_sync(~0u, x));
    int n = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) n += r.part[turn][w];
    return n;
  }
  __device__ __forceinline__ int most(int x) {
    put(__reduce_max_sync(~0u, x));
    int n = r.part[turn][0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) n = max(n, r.part[turn][w]);
    return n;
  }
};

struct ranking {
  const rgk_decode &d;
  ranked &r;
  const int tid, warp, lane;

  /* Scores of blocks [c.free0, c.free1) as keys; this thread's largest. */
  template <class C>
  __device__ __forceinline__ int score(const rgk_topk_choice &c, const aside &room, int visible,
                                       int *keys) const {
    const float scale = d.topk.scale * LOG2E;
    int top = LEAST_KEY;
    /* a warp's last lane only lends its first row */
#pragma unroll 1
    for (int first = (int)c.free0 + warp * 31; first < c.free1; first += WARPS * 31) {
      const int b = first + lane;
      const float *const from = room.at + BLOCK * (C::HELD ? min(b, (int)c.free1) : b);
      float part[2][BLOCK], sum[BLOCK];
      float4 s[HEADS];
#pragma unroll
      for (int h = 0; h < HEADS; h++) s[h] = *(const float4 *)(from + h * room.pitch);
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

  /* The `keep` best of n keys, no more than threads, into r.chosen: one thread counts for each how
   * many come before it. Equal ones by place; key i is of block(i). */
  template <class F>
  __device__ __forceinline__ void count_before(const int *keys, int n, int keep, F block) const {
    if (tid < n) {
      const int mine = keys[tid];
      int before = 0;
#pragma unroll 4
      for (int i = 0; i < n; i += 4) {
        const int4 x = *(const int4 *)(keys + i);
        before += (x.x > mine) + (x.y > mine) + (x.z > mine) + (x.w > mine);
        before += (x.x == mine && i < tid) + (x.y == mine && i + 1 < tid) +
                  (x.z == mine && i + 2 < tid) + (x.w == mine && i + 3 < tid);
      }
      if (before < keep) r.chosen[before] = make_int2(mine, block(tid));
    }
    named_sync(RANKING, RANKS);
  }
  __device__ __forceinline__ void select_few(int *keys, int n, int keep, int first) const {
    if (tid < 4 && n + tid < RANKS) keys[n + tid] = LEAST_KEY;
    named_sync(RANKING, RANKS);
    count_before(keys, n, keep, [&](int i) { return first + i; });
  }

  /* The same of all that shared memory has room for: first each warp's best of a run of keys that
   * its lanes hold. */
  __device__ __forceinline__ void select_many(int *keys, int n, int keep, int first) const {
    constexpr int HELD = RGK_DECODE_SCORES / RANKS;
    int key[HELD] = {}, top, at;
    auto find = [&]() {
      top = key[0], at = 0;
#pragma unroll
      for (int i = 1; i < HELD; i++)
        if (key[i] > top) top = key[i], at = i;
    };
    named_sync(RANKING, RANKS);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      const int x = (warp * HELD + i) * 32 + lane;
      key[i] = x < n ? keys[x] : LEAST_KEY;
    }
    find();
    int2 mine = make_int2(LEAST_KEY, 0);
    for (int k = 0; k < keep; k++) {
      const int x = (warp * HELD + at) * 32 + lane, best = __reduce_max_sync(~0u, top),
                who = __reduce_min_sync(~0u, top == best ? x : INT_MAX);
      if (lane == k) mine = make_int2(best, who);
      if (who == x) {
#pragma unroll
        for (int i = 0; i < HELD; i++) key[i] = i == at ? LEAST_KEY : key[i];
        find();
      }
    }
    named_sync(RANKING, RANKS); /* all have read */
    int *const block = keys + RANKS;
    if (lane < keep) keys[warp * keep + lane] = mine.x, block[warp * keep + lane] = mine.y;
    named_sync(RANKING, RANKS);
    count_before(keys, WARPS * keep, keep, [&](int i) { return first + block[i]; });
  }

  /* The same of any number, by bisection. */
  __device__ __forceinline__ void select(const int *keys, int n, int keep, int first,
                                         int top) const {
    counter all = {r, 0};
    auto from = [&](int least) {
      int m = 0;
      for (int i = tid; i < n; i += RANKS) m += keys[i] >= least;
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
        for (int i = tid; i <= middle; i += RANKS) m += keys[i] == lo;
        if (all.sum(m) >= ties)
          last = middle;
        else
          below = middle;
      }
    }
    for (int i = tid; i < n; i += RANKS)
      if (keys[i] > lo || (keys[i] == lo && i <= last))
        r.chosen[atomicAdd(&r.count, 1)] = make_int2(keys[i], first + i);
    named_sync(RANKING, RANKS);
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

  template <class C> __device__ __forceinline__ void run(memory<C> &s) const {
    for (uint32_t parity = 0;; parity ^= 1) {
      bar_wait(&s.scored, parity);
      const job j = r.at;
      if (j.kind == EXIT) break;
      const rgk_topk_choice c = choice_of(d.topk, j.position);
      const bool ranks = rgk_topk_ranks(c);
      const int visible = last_key(d.f.f, j.keys, j.position) + 1, n = (int)(c.free1 - c.free0);
      int *const kept = (int *)(room_of<C>(d) + (RGK_DECODE_ROWS_KEPT - 1) * d.pitch),
                 *const keys = n <= RGK_DECODE_SCORES ? s.keys : kept;
      int top = 0;
      if (ranks) top = score<C>(c, aside_of<C>(d, s, j), visible, keys);
      if (tid == 0) r.count = 0;
      bar_release(&s.taken, top, j.head, j.keys);
      if (ranks && n <= RANKS)
        select_few(keys, n, (int)c.keep, (int)c.free0);
      else if (ranks && n <= RGK_DECODE_SCORES)
        select_many(keys, n, (int)c.keep, (int)c.free0);
      else if (ranks)
        select(keys, n, (int)c.keep, (int)c.free0, top);
      if (warp == 0) {
        const bool late = write(j, c, ranks, visible > d.f.f.before);
        if (lane == 0) s.late[parity] = late;
      }
      named_sync(RANKING, RANKS); /* all this is written again */
      if (s.late[parity]) {
        choose_wide<typename C::type, RANKS>(d, &j, &c, visible, (unsigned long long *)kept, r.wide,
                                             r.chosen, RANKING);
        if (warp == 0) write(j, c, true, false);
        named_sync(RANKING, RANKS);
      }
    }
  }
};

/* ---- kernel ---- */

template <class C>
__global__ void __launch_bounds__(RGK_DECODE_THREADS, 1)
    choose(const __grid_constant__ rgk_decode d) {
  extern __shared__ char bytes[];
  memory<C> &s = begin<C>(d.f.f, bytes);
  const int part = warpgroup();
  if (part == 0) {
    load_tiles<C>(d.f, s);
  } else if (part == 1) {
    attend<C>(d, s);
  } else if (has_keys<C>()) {
    const int rank = (int)threadIdx.x - 256;
    ranking{d, s.r, rank, rank / 32, rank % 32}.run<C>(s);
  }
  if (C::TWINS) { /* both stay while one may write to the other's memory */
    __syncwarp();
    cluster_sync();
  }
}

} // namespace

template <bool TWINS> static const void *instance(rg_dtype type, int32_t width) {
#define GET(t, D)              \
  if (type == t && width == D) \
    return (const void *)choose<setup<element<t>::type, D, RANKED, false, TWINS>>;
  GET(RG_BF16, 128)
  GET(RG_BF16, 64)
#ifndef RGK_DEV
  GET(RG_F16, 128)
  GET(RG_F16, 64)
#endif
  return nullptr;
}

const void *rgk_decode_sm90(rg_dtype type, int32_t width, bool twins) {
  return twins ? instance<true>(type, width) : instance<false>(type, width);
}
