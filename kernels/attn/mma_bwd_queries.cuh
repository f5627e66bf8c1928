/* kernels/attn/mma_bwd_queries.cuh: dQ on the tensor cores of any GPU since Ampere.

     S = Q K^T    P = exp(scale S - lse)    dP = dO V^T    dS = P (dP - delta)    dQ = scale dS K

   A block has a tile of 64 rows (query, head), a warp 16 of them, and walks the tiles of keys that
   some row sees. A warp passes over keys that none of its own sees, 32 at a time. Q and dO stay in
   registers where these suffice, at widths up to 128. There dense calls have kernels of their own
   (mma_bwd_pairs.cuh), and so have selected blocks of groups of up to 16 heads (mma_bwd_alone.cuh);
   larger groups are left.
 */
#pragma once
#include "mma_bwd.cuh"
#include "plain.cuh"

namespace rgk {
namespace mma_bwd {

using namespace rgk::plain;

constexpr int ROWS = RGK_MMA_BWD_ROWS, THREADS = RGK_MMA_BWD_THREADS;

/* Walks the key tiles that some query of a row tile sees, in order: STEP keys each, SLC: parts of
 * blocks. Every warp for itself: lane i looks after queries i and i + 32. */
template <int STEP> struct key_walk {
  static constexpr int NONE = 0x7fffffff;
  int n;            /* keys of the sequence */
  int lo[2], hi[2]; /* that the lane's queries see of them */
  int mine;         /* bit i: query i sees the tile's block */
  /* SLC: the first query's list; place in both, and the blocks before it, which are to come */
  const int32_t *idx;
  int at[2], next[2];
  int block, part; /* else block is where the tiles end */
  /* the tile */
  int first, keys;

  __device__ __forceinline__ void find_next(const rgk_attn &a, int i) {
    const int before = next[i];
    next[i] = NONE;
    while (at[i] < a.N) {
      const int e = idx[i * 32 * a.idx.row + at[i]++];
      if (e <= before) continue;
      if ((int64_t)e * a.block < hi[i])
        next[i] = e;
      else
        at[i] = a.N; /* what follows is further out, or not larger */
      return;
    }
  }

  __device__ __forceinline__ key_walk(const rgk_attn &a, const row_tile &t, int64_t keys_of_all,
                                      int64_t offset) {
    const int64_t pos = t.t.first + offset;
    n = (int)keys_of_all;
    part = 0;
    mine = 3;
    idx = (const int32_t *)a.idx.data + (t.row + threadIdx.x % 32) * a.idx.row + t.kh * a.idx.head;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int query = threadIdx.x % 32 + 32 * i;
      const bool real = query < t.t.n;
      const key_range r = real ? visible(a, pos + query, n) : key_range{0, 0};
      lo[i] = (int)r.lo, hi[i] = (int)r.hi;
      next[i] = NONE;
      at[i] = a.N;
      if (a.mode == RGK_SLC && real && a.N > 0) {
        at[i] = 0, next[i] = -1;
        find_next(a, i);
      }
    }
    /* both ends grow with the position */
    first = (int)(visible(a, pos, n).lo / STEP * STEP) - STEP;
    block = (int)visible(a, pos + t.t.n - 1, n).hi;
  }

  __device__ __forceinline__ bool step(const rgk_attn_plain &p) {
    if (p.a.mode == RGK_SLC) {
      if (part == 0) {
        block = __reduce_min_sync(~0u, min(next[0], next[1]));
        if (block == NONE) return false;
      }
      const int64_t start = (int64_t)block * p.a.block;
      first = (int)start + part * p.keys;
      const int stop = (int)min((int64_t)n, min((int64_t)first + p.keys, start + p.a.block));
      keys = stop - first;
      part++;
      const bool last = part == p.key_parts || stop == n;
      if (last) part = 0;
      mine = (next[0] == block) + 2 * (next[1] == block);
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (last && mine >> i & 1) find_next(p.a, i);
    } else {
      first += STEP;
      if (first >= block) return false;
      keys = min(STEP, n - first);
    }
    return true;
  }

  /* Of the tile's keys, those that query `query` sees: the first, and the end times 2^16; all lanes
   * of the warp. */
  __device__ __forceinline__ uint32_t of(int query, bool many) const {
    uint32_t r = of_lane(0, query);
    if (many) {
      const uint32_t further = of_lane(1, query);
      if (query >= 32) r = further;
    }
    return r;
  }
  __device__ __forceinline__ uint32_t of_lane(int i, int query) const {
    const uint32_t seen = mine >> i & 1 ? (uint32_t)min(max(lo[i] - first, 0), keys) |
                                              (uint32_t)min(max(hi[i] - first, 0), keys) << 16
                                        : 0;
    return __shfl_sync(~0u, seen, query % 32);
  }
};

/* Q's or dO's rows of a warp as the A of products, from registers or from shared memory. */
template <int W, bool HELD> struct fragments {
  uint32_t at, x[HELD ? W / 16 : 1][4];
  __device__ __forceinline__ void hold() {
    if constexpr (HELD)
#pragma unroll
      for (int k = 0; k < W / 16; k++) load_matrices(on<W>(at, 2 * k), x[k]);
  }
  /* s [16, N] = A B^T */
  template <class T, int n> __device__ __forceinline__ void scores(float (&s)[n], uint32_t b) {
#pragma unroll
    for (int i = 0; i < n; i++) s[i] = 0;
#pragma unroll
    for (int k = 0; k < W / 16; k++) {
      if constexpr (!HELD) load_matrices(on<W>(at, 2 * k), x[0]);
      mma_by_rows<T, W>(s, x[HELD ? k : 0], on<W>(b, 2 * k));
    }
  }
};

/* copy_rows of `n` rows `step` elements apart: few instructions stand between a barrier and the
 * products behind it. */
template <int W, int ROWS>
__device__ __forceinline__ void copy_keys(uint32_t to, int width, const uint16_t *from,
                                          int64_t step, int n) {
  constexpr int CHUNKS = W % 64 ? 4 : 8, STRIDE = THREADS / CHUNKS;
  static_assert(STRIDE % 8 == 0, "a thread's rows turn alike");
  const int c = (int)threadIdx.x % CHUNKS, r0 = (int)threadIdx.x / CHUNKS;
  const uint32_t here = to + place<W>(r0, c);
  from += 8 * c;
  const uint16_t *row = from + r0 * step;
#pragma unroll
  for (int i = 0; i < (ROWS + STRIDE - 1) / STRIDE; i++, row += STRIDE * step) {
    const int r = r0 + i * STRIDE;
    if (ROWS % STRIDE && r >= ROWS) break;
    const bool real = r < n;
    const uint16_t *const x = real ? row : from;
#pragma unroll
    for (int g = 0; g < W / 8 / CHUNKS; g++)
      copy16(here + i * STRIDE * pitch(W) + g * CHUNKS * 16, x + g * CHUNKS * 8,
             real && (g * CHUNKS + c) * 8 < width);
  }
}

/* Begins to copy a block's rows of Q and dO; false: nothing to do, dead rows have their zeros. */
template <int W, int E>
__device__ __forceinline__ bool take_rows(const rgk_attn_plain &p, row_tile &t, uint32_t to_q,
                                          uint32_t to_o) {
  const rgk_attn &a = p.a;
  t = find_rows(p);
  if (t.t.n == 0) return false;
  if (t.t.b >= a.seqs.n) {
    for (int r = threadIdx.x / 32; r < t.n && !a.acc_q; r += THREADS / 32)
      zero_row<32>(a.dq, row_at(t, a.dq, r), a.D, threadIdx.x % 32);
    return false;
  }
  const uint16_t *const q = (const uint16_t *)a.q.data, *const d_o = (const uint16_t *)a.d_o.data;
  copy_rows<W, ROWS, THREADS>(to_q, threadIdx.x, a.D, q,
                              [&](int r) { return r < t.n ? q + row_at(t, a.q, r) : nullptr; });
  copy_rows<E, ROWS, THREADS>(to_o, threadIdx.x, a.E, d_o,
                              [&](int r) { return r < t.n ? d_o + row_at(t, a.d_o, r) : nullptr; });
  return true;
}

template <class T, int W, int E, bool SMALL>
__global__ void __launch_bounds__(THREADS, 2) queries(const __grid_constant__ rgk_attn_plain p) {
  constexpr int STEP = rgk_mma_bwd_step(W, SMALL), SUB = W == 256 ? 16 : 32;
  constexpr bool HELD = W <= 128;
  /* stages of K, stages of V, Q and dO; Q and dO begin in the second stages where they are held */
  constexpr uint32_t K = STEP * pitch(W), V = STEP * pitch(E), AT_V = 2 * K,
                     AT_Q = HELD ? K : AT_V + 2 * V,
                     AT_O = HELD ? AT_V + V : AT_Q + ROWS * pitch(W);
  static_assert(AT_O + (HELD ? V : ROWS * pitch(E)) == rgk_mma_bwd_queries_shared(W, E, SMALL) &&
                    (!HELD || STEP == ROWS) && ROWS * pitch(W) <= AT_V + 2 * V,
                "as the host counts");
  extern __shared__ __align__(1024) char mma_bwd_memory[];
  const uint32_t base = smem_at(mma_bwd_memory);
  const rgk_attn &a = p.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  row_tile t;
  if (!take_rows<W, E>(p, t, base + AT_Q, base + AT_O)) return;
  const key_span span = rgk::keys_of(a, t.t.b);
  const uint16_t *const k = (const uint16_t *)a.k.data + span.row * a.k.row + t.kh * a.k.head,
                        *const v =
                            (const uint16_t *)a.v.data + span.row * a.v.row + t.kh * a.v.head;
  key_walk<STEP> w(a, t, span.n, first_position(a, t.t.b));
  auto load = [&](int stage) {
    copy_keys<W, STEP>(base + stage * K, a.D, k + w.first * a.k.row, a.k.row, w.keys);
    copy_keys<E, STEP>(base + AT_V + stage * V, a.E, v + w.first * a.v.row, a.v.row, w.keys);
  };

  /* this lane's rows */
  const int row = 16 * warp + lane / 4, c0 = lane % 4 * 2;
  int query[2];
  float lse[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int r = row + 8 * i;
    query[i] = 0;
    lse[i] = delta[i] = 0;
    bool sees = false;
    if (r < t.n) {
      lse[i] = ((const float *)a.lse.data)[row_at(t, a.lse, r)];
      delta[i] = p.delta[(t.row + r / t.heads) * a.H + t.head + r % t.heads];
      sees = lse[i] != -INFINITY;
      query[i] = r / t.heads;
    }
    lse[i] *= LOG2E;
    if (!sees) query[i] = -1;
  }
  const float scale2 = a.scale * LOG2E;
  const bool many = p.queries > 32;

  bool more = w.step(p);
  if (more) load(0);
  copies_commit();
  fragments<W, HELD> qs;
  fragments<E, HELD> os;
  qs.at = mma_at_rows<W>(base + AT_Q) + warp * 16 * pitch(W);
  os.at = mma_at_rows<E>(base + AT_O) + warp * 16 * pitch(E);
  if (HELD) {
    copies_wait<0>();
    __syncthreads();
    qs.hold();
    os.hold();
  }
  float sum[1][W / 2];
#pragma unroll
  for (int i = 0; i < W / 2; i++) sum[0][i] = 0;

  for (int stage = 0; more; stage ^= 1) {
    uint32_t seen[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      seen[i] = w.of(max(query[i], 0), many);
      if (query[i] < 0) seen[i] = 0;
    }
    more = w.step(p);
    copies_wait<0>();
    __syncthreads();
    if (more) load(stage ^ 1);
    copies_commit();
    const uint32_t k_rows = mma_at_rows<W>(base + stage * K),
                   k_columns = mma_at_columns<W>(base + stage * K),
                   v_columns = mma_at_columns<E>(base + AT_V + stage * V);
#pragma unroll
    for (int c = 0; c < STEP; c += SUB) {
      bool any = false, cut = false;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int from = (int)(seen[i] & 0xffff), upto = (int)(seen[i] >> 16);
        any |= from < upto && from < c + SUB && upto > c;
        cut |= from > c || upto < c + SUB;
      }
      if (!__any_sync(~0u, any)) continue;
      float s[SUB / 2], dp[SUB / 2];
      qs.template scores<T>(s, k_columns + c * pitch(W));
      os.template scores<T>(dp, v_columns + c * pitch(E));
#pragma unroll
      for (int j = 0; j < SUB / 2; j++) {
        const int i = j / 2 % 2;
        const float prob = exp2_fast(fmaf(s[j], scale2, -lse[i]));
        s[j] = prob * (dp[j] - delta[i]);
      }
      if (__any_sync(~0u, cut)) {
#pragma unroll
        for (int j = 0; j < SUB / 2; j++) {
          const int i = j / 2 % 2, column = c + j / 4 * 8 + j % 2 + c0;
          if (column < (int)(seen[i] & 0xffff) || column >= (int)(seen[i] >> 16)) s[j] = 0;
        }
      }
      uint32_t ds[1][SUB / 4];
#pragma unroll
      for (int i = 0; i < SUB / 16; i++) pack_a<T>(ds[0] + 4 * i, s + 8 * i);
      add_product<T, W, SUB / 16>(sum, ds, k_rows + c * pitch(W));
    }
  }
  copies_wait<0>();
  __syncthreads(); /* before dQ takes the place of keys */

  put_dq<T, W, W>(a, sum[0], 0, base + warp * 16 * pitch(W), mma_bwd_memory + warp * 16 * pitch(W),
                  [&](const rgk_tensor &x, int r) { return row_at(t, x, 16 * warp + r); });
}

} // namespace mma_bwd
} // namespace rgk
