/* attn/topk_choice.cuh: the best `keep` blocks of a query, chosen by a warp while scores come in.

   A query's warp gets the sums p of a step of keys in shared memory; its lanes are blocks:

       score[lane] = p of the block's keys, ascending, times overlap; what the last keys of the step
                     before reach over is carried
       scores above the query's threshold are appended to its candidates; when those get many, a
       bisection on their scores raises the threshold and drops what cannot be among the best `keep`
       any more

   So the choice is exact: a dropped score has `keep` better ones, or equal ones of lower index,
   beside it.

   Over pages (PAGED) keys come by rows r of pages, key j in row j + before, and before is what a
   block reaches over: block b has rows b·bs … b·bs + bs + before − 1, the last ones of the next
   block's. So lanes are a block late there, and a step's last bs rows are carried. Sums run over
   the same keys in the same order.

   P, of the kernel: MINE queries a warp, QUERIES of those that share a memory, STEP keys a step,
   PITCH floats of a query's sums of one, of which BUFFERS (1 or 2) take turns; ROOM places for a
   query's candidates, PER_LANE = ROOM / 32.
 */
#pragma once
#include "topk.cuh"
#include <limits.h>

namespace rgk {

/* Where queries have theirs. */
struct topk_memory {
  float *p;        /* [BUFFERS, QUERIES, PITCH] */
  float *carry;    /* [QUERIES, reach] */
  int4 *state;     /* [QUERIES]: threshold, candidates, blocks that may be chosen, keep */
  int2 *candidate; /* [QUERIES, ROOM]: key, block */
};

/* ---- candidates of one query, by one warp ---- */

template <int PER_LANE> struct pool {
  int key[PER_LANE], block[PER_LANE]; /* LEAST_KEY: none */

  __device__ __forceinline__ void load(const int2 *from, int n) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      int2 x = lane + 32 * i < n ? from[lane + 32 * i] : make_int2(LEAST_KEY, INT_MAX);
      key[i] = x.x, block[i] = x.y;
    }
  }
  __device__ __forceinline__ int from(int least) const {
    int n = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) n += __popc(__ballot_sync(~0u, key[i] >= least));
    return n;
  }
  /* Drops what is not among the best `keep` of the n candidates; up to `slack` others may stay.
   * Returns how many are left, *least is raised to a key that keep of them reach. */
  __device__ __forceinline__ int reduce(int n, int keep, int slack, int *least) {
    int top = key[0];
#pragma unroll
    for (int i = 1; i < PER_LANE; i++) top = max(top, key[i]);
    int lo = max(*least, NAN_KEY);
    int64_t hi = (int64_t)__reduce_max_sync(~0u, top) + 1;
    while (n > keep + slack && hi - lo > 1) {
      const int middle = (int)(lo + (hi - lo) / 2), m = from(middle);
      if (m >= keep)
        lo = middle, n = m;
      else
        hi = middle;
    }
    *least = lo;
    int last = INT_MAX - 1; /* of those equal to lo, the blocks up to here stay */
    if (n > keep + slack) {
      const int ties = keep - (hi > INT_MAX ? 0 : from((int)hi));
      int below = -1;
      while (last - below > 1) {
        const int middle = below + (last - below) / 2;
        int m = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
          m += __popc(__ballot_sync(~0u, key[i] == lo && block[i] <= middle));
        if (m >= ties)
          last = middle;
        else
          below = middle;
      }
      n = keep;
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (key[i] < lo || (key[i] == lo && block[i] > last)) key[i] = LEAST_KEY;
    return n;
  }
  /* The same in few steps where it can: of 32 candidates or more, a key that `keep` lanes reach
   * with their best candidate is reached by `keep` candidates, and seldom by many more. At most 32
   * are left. */
  __device__ __forceinline__ int sift(int n, int keep, int *least) {
    int best = key[0];
#pragma unroll
    for (int i = 1; i < PER_LANE; i++) best = max(best, key[i]);
    int lo = __reduce_min_sync(~0u, best), lanes = 32;
    int64_t hi = (int64_t)__reduce_max_sync(~0u, best) + 1;
    while (lanes > keep + 2 && hi - lo > 1) {
      const int middle = (int)(lo + (hi - lo) / 2), m = __popc(__ballot_sync(~0u, best >= middle));
      if (m >= keep)
        lo = middle, lanes = m;
      else
        hi = middle;
    }
    *least = lo;
    const int left = from(lo);
    if (left > 32) return reduce(left, keep, min(4, 32 - keep), least);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (key[i] < lo) key[i] = LEAST_KEY;
    return left;
  }
  __device__ __forceinline__ void store(int2 *to) const {
    const uint32_t before = (1u << threadIdx.x % 32) - 1;
    int n = 0;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const uint32_t there = __ballot_sync(~0u, key[i] != LEAST_KEY);
      if (key[i] != LEAST_KEY) to[n + __popc(there & before)] = make_int2(key[i], block[i]);
      n += __popc(there);
    }
    __syncwarp();
  }
};

/* ---- scores of one step, by the warp that owns the queries ---- */

/* Appends the scores of the lanes in `passed`, for block b of each lane, to query q's candidates;
 * s: its state. True: there are many now. Others may look after the step's next barrier. */
template <class P>
__device__ __forceinline__ bool take(const topk_memory &m, int q, const int4 &s, uint32_t passed,
                                     float score, int b) {
  const int lane = threadIdx.x % 32, key = key_of(score);
  const bool mine = (passed >> lane & 1) && key > s.x;
  passed = __ballot_sync(~0u, mine);
  if (mine)
    m.candidate[q * P::ROOM + s.y + __popc(passed & ((1u << lane) - 1))] = make_int2(key, b);
  const int n = s.y + __popc(passed);
  if (lane == 0) m.state[q].y = n;
  return n > P::ROOM - 32;
}
/* Raises query q's threshold and drops candidates. */
template <class P> __device__ __forceinline__ void drop(const topk_memory &m, int q) {
  __syncwarp();
  int4 s = m.state[q];
  pool<P::PER_LANE> x;
  x.load(m.candidate + q * P::ROOM, s.y);
  s.y = x.sift(s.y, s.w, &s.x);
  x.store(m.candidate + q * P::ROOM);
  if (threadIdx.x % 32 == 0) m.state[q] = s;
}

/* Blocks of four keys that reach over one key of the block before, 32 of them a step, from block
 * `lowest` on. carry: lane 0's last key of the step before; over pages its last four rows. */
template <bool PAGED> struct carried { using type = float; };
template <> struct carried<true> { using type = float4; };
template <class P, bool PAGED>
__device__ __forceinline__ void choose_4_1(const topk_memory &m, int warp, int step, int lowest,
                                           typename carried<PAGED>::type (&carry)[P::MINE]) {
  const int lane = threadIdx.x % 32, b = step * 32 + lane - (PAGED ? 1 : 0);
  float score[P::MINE];
  int4 s[P::MINE];
  uint32_t passed[P::MINE], many = 0;
#pragma unroll
  for (int i = 0; i < P::MINE; i++) {
    const int q = warp * P::MINE + i;
    const int at = (step & (P::BUFFERS - 1)) * P::QUERIES + q;
    const float4 v = *(const float4 *)(m.p + at * P::PITCH + 4 * lane);
    s[i] = m.state[q];
    const float before = __shfl_sync(~0u, v.w, (lane + 31) % 32);
    if constexpr (PAGED) {
      const float4 w = {__shfl_sync(~0u, v.x, (lane + 31) % 32),
                        __shfl_sync(~0u, v.y, (lane + 31) % 32),
                        __shfl_sync(~0u, v.z, (lane + 31) % 32), before};
      const float4 mine = lane == 0 ? carry[i] : w;
      carry[i] = w;
      score[i] = mine.x;
      score[i] = fmaf(2, mine.y, score[i]);
      score[i] = fmaf(2, mine.z, score[i]);
      score[i] = fmaf(2, mine.w, score[i]) + v.x;
    } else {
      score[i] = lane == 0 ? carry[i] : before;
      carry[i] = before;
      score[i] = fmaf(2, v.x, score[i]);
      score[i] = fmaf(2, v.y, score[i]);
      score[i] = fmaf(2, v.z, score[i]) + v.w;
    }
    passed[i] = __ballot_sync(~0u, (uint32_t)(b - lowest) < (uint32_t)s[i].z &&
                                       __float_as_int(score[i]) > s[i].x);
  }
  __syncwarp(); /* states are read before lane 0 writes one */
#pragma unroll
  for (int i = 0; i < P::MINE; i++)
    if (passed[i] && take<P>(m, warp * P::MINE + i, s[i], passed[i], score[i], b)) many |= 1u << i;
#pragma unroll 1
  for (; many; many &= many - 1) drop<P>(m, warp * P::MINE + __ffs(many) - 1);
}

/* Any blocks. */
template <class P, bool PAGED>
__device__ __forceinline__ void choose(const rgk_topk &p, const topk_memory &m, int warp, int step,
                                       int lowest, bool dot) {
  const int lane = threadIdx.x % 32, bs = p.block / p.stride, reach = p.kernel / p.stride - 1;
  const int blocks = P::STEP / bs, keep = PAGED ? bs : reach; /* carried */
  const int late = PAGED ? 1 : 0, shift = PAGED ? 0 : reach;
#pragma unroll 1
  for (int i = 0; i < P::MINE; i++) {
    const int q = warp * P::MINE + i;
    const float *row = m.p + ((step & (P::BUFFERS - 1)) * P::QUERIES + q) * P::PITCH;
    float *carry = m.carry + q * keep;
#pragma unroll 1
    for (int first = 0; first < blocks; first += 32) {
      const int mine = first + lane, b = step * blocks + mine - late;
      float score = 0;
      if (mine < blocks) {
        if (dot) score = row[mine];
        for (int from = -reach; from < bs && !dot; from++) {
          const int at = (mine - late) * bs + from + reach - shift;
          const float x = at < 0 ? carry[keep + at] : row[at];
          score = fmaf((float)(min(from + reach + 1, bs) - max(from, 0)), x, score);
        }
      }
      const int4 s = m.state[q];
      const uint32_t passed = __ballot_sync(
          ~0u, mine < blocks && (uint32_t)(b - lowest) < (uint32_t)s.z && key_of(score) > s.x);
      __syncwarp(); /* the state is read before lane 0 writes it */
      if (passed && take<P>(m, q, s, passed, score, b)) drop<P>(m, q);
      __syncwarp();
    }
    for (int j = lane; j < keep; j += 32) carry[j] = row[P::STEP - keep + j];
    __syncwarp();
  }
}

/* Blocks of 4 to 128 keys that score their best key; a few lanes have a block, four keys each. A
 * key that is NaN counts as unseen. */
template <class P>
__device__ __forceinline__ void choose_best(const rgk_topk &p, const topk_memory &m, int warp,
                                            int step, int lowest) {
  static_assert(P::STEP == 128, "a lane has four keys");
  const int lane = threadIdx.x % 32, bs = p.block / p.stride, lanes = bs / 4,
            b = step * (P::STEP / bs) + lane / lanes;
  float score[P::MINE];
  int4 s[P::MINE];
  uint32_t passed[P::MINE], many = 0;
#pragma unroll
  for (int i = 0; i < P::MINE; i++) {
    const int q = warp * P::MINE + i;
    const int at = (step & (P::BUFFERS - 1)) * P::QUERIES + q;
    const float4 v = *(const float4 *)(m.p + at * P::PITCH + 4 * lane);
    score[i] = fmaxf(fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)), -INFINITY);
    s[i] = m.state[q];
  }
#pragma unroll 1
  for (int far = 1; far < lanes; far *= 2)
#pragma unroll
    for (int i = 0; i < P::MINE; i++)
      score[i] = fmaxf(score[i], __shfl_xor_sync(~0u, score[i], far));
  const bool first = lane % lanes == 0;
#pragma unroll
  for (int i = 0; i < P::MINE; i++)
    passed[i] = __ballot_sync(~0u, first && (uint32_t)(b - lowest) < (uint32_t)s[i].z &&
                                       key_of(score[i]) > s[i].x);
  __syncwarp(); /* states are read before lane 0 writes one */
#pragma unroll
  for (int i = 0; i < P::MINE; i++)
    if (passed[i] && take<P>(m, warp * P::MINE + i, s[i], passed[i], score[i], b)) many |= 1u << i;
#pragma unroll 1
  for (; many; many &= many - 1) drop<P>(m, warp * P::MINE + __ffs(many) - 1);
}

/* ---- output ---- */

template <int PER_LANE>
__device__ void finish(const rgk_topk &p, const topk_memory &m, int q, const rgk_topk_choice &c,
                       bool seen, int32_t *idx, int room) {
  const int lane = threadIdx.x % 32;
  if (!rgk_topk_ranks(c)) {
    const int64_t b = lane < c.free0 || c.keep > 0 ? lane : lane - c.free0 + c.free1;
    if (lane < p.top_n) idx[lane] = b < c.count ? (int32_t)b : -1;
    return;
  }
  const int keep = (int)c.keep;
  int4 s = m.state[q];
  int2 *const list = m.candidate + q * room;
  if (s.y > 32) {
    pool<PER_LANE> x;
    x.load(list, s.y);
    s.y = x.sift(s.y, keep, &s.x);
    x.store(list);
  }
  const int2 mine = lane < s.y ? list[lane] : make_int2(LEAST_KEY, INT_MAX);
  int rank = 0, place = (int)c.free0;
  for (int j = 0; j < s.y; j++) {
    const int key = __shfl_sync(~0u, mine.x, j), b = __shfl_sync(~0u, mine.y, j);
    rank += key > mine.x || (key == mine.x && b < mine.y);
  }
  const bool kept = lane < s.y && rank < keep;
  const uint32_t all_kept = __ballot_sync(~0u, kept);
  for (int j = 0; j < s.y; j++)
    place += __shfl_sync(~0u, mine.y, j) < mine.y && (all_kept >> j & 1);
  const int least = __reduce_min_sync(~0u, kept ? mine.x : INT_MAX);
  const bool fp64 = p.score == RGK_TOPK_BY_SOFTMAX && seen && least != NAN_KEY &&
                    undecided(__int_as_float(least));
  if (fp64) {
    if (lane == 0) idx[0] = RGK_TOPK_UNDECIDED;
    return;
  }
  if (lane < c.free0) idx[lane] = lane;
  if (kept) idx[place] = mine.y;
  const int n = (int)(c.free0 + keep);
  if (lane >= n && lane < p.top_n) {
    const int64_t b = c.free1 + lane - n;
    idx[lane] = b < c.count ? (int32_t)b : -1;
  }
}

} // namespace rgk
