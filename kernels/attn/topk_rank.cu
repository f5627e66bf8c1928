/* kernels/attn/topk_rank.cu: topk's choice among scores that lie in memory (topk_relu_sm90.cu), for
   rows of idx of any length.

   A block has one row. Scores become integers in their order; three passes over them count how many
   have each value of the next 11, 11, 10 bits, until it is known which bits the last one to be kept
   begins with and how many of those that begin so are kept: the first ones. A last pass writes them
   down, ascending. No two rows know of each other.
 */
#include "topk.cuh"

using namespace rgk;

namespace {

enum { THREADS = RGK_TOPK_RANK_THREADS, EACH = 4, BINS = THREADS * EACH, WARPS = THREADS / 32 };

struct state {
  int count[BINS];
  int of_warp[WARPS];
  uint32_t bin;
  int need, there; /* of the bin's scores: how many are kept, how many there are */
};

/* Sums of x over the threads before this one; *all: over all of them. */
__device__ __forceinline__ int before(state &s, int x, int *all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = x;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int y = __shfl_up_sync(~0u, sum, i);
    if (lane >= i) sum += y;
  }
  __syncthreads();
  if (lane == 31) s.of_warp[warp] = sum;
  __syncthreads();
  int base = 0, total = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) {
    base += i < warp ? s.of_warp[i] : 0;
    total += s.of_warp[i];
  }
  *all = total;
  return base + sum - x;
}

struct row_scores {
  const float *score;
  int first, end, seen; /* what may be chosen, and what of it has a score */

  /* Scores from j0 on as integers in their order. */
  __device__ __forceinline__ void read(int j0, uint32_t (&u)[EACH]) const {
    const float4 x = j0 < seen ? *(const float4 *)(score + j0) : make_float4(0, 0, 0, 0);
    const float v[EACH] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < EACH; i++)
      u[i] = (uint32_t)key_of(j0 + i < seen ? v[i] : -INFINITY) ^ 0x80000000u;
  }
  __device__ __forceinline__ bool there(int j) const {
    return j >= first && j < end;
  }
};

/* The bin that the `need`-th score from the top is in. */
__device__ __forceinline__ void find_bin(state &s, int need) {
  int n[EACH], mine = 0, all;
#pragma unroll
  for (int i = 0; i < EACH; i++) mine += n[i] = s.count[BINS - 1 - EACH * (int)threadIdx.x - i];
  int above = before(s, mine, &all);
  if (above < need && need <= above + mine) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      if (above < need && need <= above + n[i]) {
        s.bin = (uint32_t)(BINS - 1 - EACH * (int)threadIdx.x - i);
        s.need = need - above;
        s.there = n[i];
      }
      above += n[i];
    }
  }
  __syncthreads();
}

/* Those of x that are kept, to idx, ascending. */
__device__ __forceinline__ void choose(state &s, const row_scores &x, int keep, int32_t *idx) {
  const int begin = x.first / EACH * EACH;
  uint32_t known = 0, bits = 0; /* which bits are known, and they */
  int need = keep;
  for (int shift = 21; shift >= 0; shift = shift > 10 ? shift - 11 : shift - 10) {
    const uint32_t bins = shift > 0 ? BINS : 1024;
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.count[i] = 0;
    __syncthreads();
    for (int j = begin + EACH * (int)threadIdx.x; j < x.end; j += BINS) {
      uint32_t u[EACH];
      x.read(j, u);
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (x.there(j + i) && (u[i] & known) == bits)
          atomicAdd(&s.count[u[i] >> shift & (bins - 1)], 1);
    }
    __syncthreads();
    find_bin(s, need);
    bits |= s.bin << shift;
    known |= (bins - 1) << shift;
    need = s.need;
    if (need == s.there) break;
  }
  int above = 0, ties = 0; /* so far */
  for (int j0 = begin; j0 < x.end; j0 += BINS) {
    const int j = j0 + EACH * (int)threadIdx.x;
    uint32_t u[EACH];
    x.read(j, u);
    int mine = 0, all;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const bool there = x.there(j + i);
      mine += there && (u[i] & known) > bits ? 1 : 0;
      mine += there && (u[i] & known) == bits ? 1 << 16 : 0;
    }
    const int earlier = before(s, mine, &all);
    int a = above + (earlier & 0xffff), t = ties + (earlier >> 16);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      if (!x.there(j + i)) continue;
      const bool over = (u[i] & known) > bits, tie = (u[i] & known) == bits;
      if (over || (tie && t < need)) idx[a + min(t, need)] = j + i;
      a += over, t += tie;
    }
    above += all & 0xffff, ties += all >> 16;
  }
}

__global__ void __launch_bounds__(THREADS) rank(const __grid_constant__ rgk_topk_scored p) {
  __shared__ state s;
  const rgk_topk &c = p.call;
  const int64_t row = p.row + blockIdx.x;
  const int kh = blockIdx.y, b = find_seq(c.seqs, row), t = threadIdx.x;
  int32_t *idx = (int32_t *)c.idx.data + row * c.idx.row + kh * c.idx.head;
  if (b == c.seqs.n) {
    for (int i = t; i < c.top_n; i += THREADS) idx[i] = 0;
    return;
  }
  const int64_t position = row - seq_start(c.seqs, b) + (c.offset ? (int64_t)c.offset[b] : 0);
  const rgk_topk_choice of = choice_of(c, position);
  const int free0 = (int)of.free0, kept = (int)of.keep, n = free0 + kept;
  if (rgk_topk_ranks(of)) {
    const topk_keys k = keys_of(c, b);
    const row_scores x = {p.score + ((row - p.row) * c.KH + kh) * p.pitch, free0, (int)of.free1,
                          (int)min(keys_before(position + 1, c), k.n)};
    choose(s, x, kept, idx + free0);
  } else {
    for (int i = t; i < kept; i += THREADS) idx[free0 + i] = free0 + i;
  }
  for (int i = t; i < free0; i += THREADS) idx[i] = i;
  for (int i = n + t; i < c.top_n; i += THREADS) {
    const int64_t y = of.free1 + i - n;
    idx[i] = y < of.count ? (int32_t)y : -1;
  }
}

} // namespace

const void *rgk_topk_rank(void) {
  return (const void *)rank;
}
