/* kernels/attn/topk_sm90.cuh: what Hopper's topk makes of products, query by query: the sums p of a
   tile over heads, scores of blocks, candidates and their thresholds, and the row of idx. Which
   keys go by, and when, is topk_sm90.cu's.
 */
#pragma once
#include "../device/element.cuh"
#include "../device/ptx.cuh"
#include "../device/softmax.cuh"
#include "topk.cuh"

namespace rgk {
namespace topk90 {

constexpr int TILE = RGK_TOPK90_TILE;
enum named : int { EACH = 1 }; /* first id, of one for each consumer */

/* Of one warpgroup: */
template <int HEADS> struct plan {
  /* of a quad lane, a warp */
  static constexpr int N = RGK_TOPK90_COLUMNS, QUERIES = N / HEADS, MINE = QUERIES / 4;
  static constexpr int HALVES = RGK_TOPK90_HALVES(QUERIES), STEP = TILE * HALVES,
                       PITCH = RGK_TOPK90_PITCH(QUERIES);
  /* candidates of a query */
  static constexpr int ROOM = RGK_TOPK90_ROOM(QUERIES), PER_LANE = ROOM / 32;
};

/* ---- shared memory ----
 *
 *   q [GROUPS, panels, N]   k [stages, panels, TILE]   tables   carry [GROUPS, QUERIES, reach]
 *
 * q and k as panels of 64 columns, of N and TILE rows. */

template <int HEADS, int GROUPS> struct tables {
  using P = plan<HEADS>;
  float p[GROUPS][2][P::QUERIES][P::PITCH];
  int2 candidate[GROUPS][P::QUERIES][P::ROOM]; /* key, block */
  int4 state[GROUPS][P::QUERIES];  /* threshold, candidates, blocks that may be chosen, keep */
  int visible[GROUPS][P::QUERIES]; /* keys that the query sees */
  uint64_t full[RGK_TOPK90_STAGES], empty[RGK_TOPK90_STAGES];
};

/* Where a warpgroup finds its part. */
struct memory {
  char *q, *k;            /* of all */
  float *p;               /* [2, QUERIES, PITCH] */
  float *carry;           /* [QUERIES, reach] */
  int4 *state;            /* [QUERIES] */
  int2 *candidate;        /* [QUERIES, ROOM] */
  int *visible;           /* [QUERIES] */
  uint64_t *full, *empty; /* [stages] */
};

/* Byte of row r's 16-byte unit u in panels of `rows` rows. */
__device__ __forceinline__ uint32_t panel_at(int r, int u, int rows) {
  return (uint32_t)((u >> 3) * rows * 128 + r * 128 + ((u ^ r) & 7) * 16);
}

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
template <int HEADS>
__device__ __forceinline__ bool take(const memory &m, int q, const int4 &s, uint32_t passed,
                                     float score, int b) {
  using P = plan<HEADS>;
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
template <int HEADS> __device__ __forceinline__ void drop(const memory &m, int q) {
  using P = plan<HEADS>;
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
template <int HEADS, bool PAGED>
__device__ __forceinline__ void
choose_4_1(const memory &m, int warp, int step, int lowest,
           typename carried<PAGED>::type (&carry)[plan<HEADS>::MINE]) {
  using P = plan<HEADS>;
  const int lane = threadIdx.x % 32, b = step * 32 + lane - (PAGED ? 1 : 0);
  float score[P::MINE];
  int4 s[P::MINE];
  uint32_t passed[P::MINE], many = 0;
#pragma unroll
  for (int i = 0; i < P::MINE; i++) {
    const int q = warp * P::MINE + i;
    const float4 v = *(const float4 *)(m.p + ((step & 1) * P::QUERIES + q) * P::PITCH + 4 * lane);
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
    if (passed[i] && take<HEADS>(m, warp * P::MINE + i, s[i], passed[i], score[i], b))
      many |= 1u << i;
#pragma unroll 1
  for (; many; many &= many - 1) drop<HEADS>(m, warp * P::MINE + __ffs(many) - 1);
}

/* Any blocks. */
template <int HEADS, bool DOT, bool PAGED>
__device__ __forceinline__ void choose(const rgk_topk &p, const memory &m, int warp, int step,
                                       int lowest) {
  using P = plan<HEADS>;
  const int lane = threadIdx.x % 32, bs = p.block / p.stride, reach = p.kernel / p.stride - 1;
  const int blocks = P::STEP / bs, keep = PAGED ? bs : reach; /* carried */
  const int late = PAGED ? 1 : 0, shift = PAGED ? 0 : reach;
#pragma unroll 1
  for (int i = 0; i < P::MINE; i++) {
    const int q = warp * P::MINE + i;
    const float *row = m.p + ((step & 1) * P::QUERIES + q) * P::PITCH;
    float *carry = m.carry + q * keep;
#pragma unroll 1
    for (int first = 0; first < blocks; first += 32) {
      const int mine = first + lane, b = step * blocks + mine - late;
      float score = 0;
      if (mine < blocks) {
        if (DOT) score = row[mine];
        for (int from = -reach; from < bs && !DOT; from++) {
          const int at = (mine - late) * bs + from + reach - shift;
          const float x = at < 0 ? carry[keep + at] : row[at];
          score = fmaf((float)(min(from + reach + 1, bs) - max(from, 0)), x, score);
        }
      }
      const int4 s = m.state[q];
      const uint32_t passed = __ballot_sync(
          ~0u, mine < blocks && (uint32_t)(b - lowest) < (uint32_t)s.z && key_of(score) > s.x);
      __syncwarp(); /* the state is read before lane 0 writes it */
      if (passed && take<HEADS>(m, q, s, passed, score, b)) drop<HEADS>(m, q);
      __syncwarp();
    }
    for (int j = lane; j < keep; j += 32) carry[j] = row[P::STEP - keep + j];
    __syncwarp();
  }
}

/* Blocks of 4 to 128 keys that score their best key; a few lanes have a block, four keys each. A
 * key that is NaN counts as unseen. */
template <int HEADS>
__device__ __forceinline__ void choose_best(const rgk_topk &p, const memory &m, int warp, int step,
                                            int lowest) {
  using P = plan<HEADS>;
  static_assert(P::STEP == 128, "a lane has four keys");
  const int lane = threadIdx.x % 32, bs = p.block / p.stride, lanes = bs / 4,
            b = step * (P::STEP / bs) + lane / lanes;
  float score[P::MINE];
  int4 s[P::MINE];
  uint32_t passed[P::MINE], many = 0;
#pragma unroll
  for (int i = 0; i < P::MINE; i++) {
    const int q = warp * P::MINE + i;
    const float4 v = *(const float4 *)(m.p + ((step & 1) * P::QUERIES + q) * P::PITCH + 4 * lane);
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
    if (passed[i] && take<HEADS>(m, warp * P::MINE + i, s[i], passed[i], score[i], b))
      many |= 1u << i;
#pragma unroll 1
  for (; many; many &= many - 1) drop<HEADS>(m, warp * P::MINE + __ffs(many) - 1);
}

/* ---- p of one tile: exponentials and the sum over heads ---- */

/* Over pages keys below `before` are none. */
template <int HEADS, bool DOT, bool PAGED>
__device__ __forceinline__ void
weigh(const float (&acc)[plan<HEADS>::N / 2], const float (&lse)[plan<HEADS>::N / 4], float scale,
      float *out, int key, int before, int least_visible, const int *visible) {
  using P = plan<HEADS>;
  const int c = threadIdx.x % 4;
  constexpr int PARTS = HEADS >= 4 ? 2 : 1;
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int q = 0; q < P::MINE; q++) {
      float part[PARTS];
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const int m = q * HEADS + h;
        const float s = acc[4 * (m / 2) + 2 * r + m % 2];
        const float x = DOT ? s : exp2_fast(fmaf(s, scale, lse[m]));
        part[h % PARTS] = h < PARTS ? x : part[h % PARTS] + x;
      }
      float sum = PARTS == 2 ? part[0] + part[PARTS - 1] : part[0];
      if (key + 8 * r >= least_visible && key + 8 * r >= visible[4 * q + c])
        sum = DOT ? -INFINITY : 0.0f;
      if (PAGED && key + 8 * r < before) sum = 0;
      out[(4 * q + c) * P::PITCH + 8 * r] = sum;
    }
}

/* ---- output ---- */

template <int PER_LANE>
__device__ void finish(const rgk_topk &p, const memory &m, int q, const rgk_topk_choice &c,
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

} // namespace topk90
} // namespace rgk
