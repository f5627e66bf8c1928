/* kernels/attn/mma_bwd_keys.cuh: dK and dV on the tensor cores of any GPU since Ampere.

     S^T = K Q^T    P = exp(scale S - lse)    dV = P^T dO
     dP^T = V dO^T  dS = P (dP - delta)       dK = scale dS^T Q

   A block has a tile of 64 keys (key_tiles.cuh) and walks the rows (query, head) that see it, a
   batch at a time. Half of its warps have the first line, half the second, so that a warp's sums
   are one gradient's and leave registers for 32 keys, where widths are up to 128: what it reads of
   Q and dO serves two products each. Scores are formed transposed: P^T and dS^T lie in the
   registers from which the second product of a line takes them. P crosses over in shared memory, as
   it lies there, from a warp to the one that has the same keys, 16 rows at a time:

       for dV   S^T   exp ┐       exp, dV ┐       dV
                          │ all of P's 16 rows    │ next batch
       for dK   dP^T      └ dS, dK        └ dS, dK

   The whole block waits there, though two warps each would do: to racecheck a barrier of some warps
   orders too little now and then, and bar.arrive nothing, not even what other barriers do.

   What rows there are is found out for as many batches at a time as there are warps, each by one,
   so that none waits for another's divisions and lists.

   The order of a tile's rows: of one head after another where there is a window, else from the last
   query to the first, all heads of each. So tiles at work at the same time read the same rows, or
   rows that others read a little earlier.
 */
#pragma once
#include "key_tiles.cuh"
#include "mma_bwd.cuh"

namespace rgk {
namespace mma_bwd {

using namespace rgk::plain;

constexpr int KEYS = RGK_MMA_BWD_KEYS;

/* Rows of a batch, looked up before it is copied. */
template <int N> struct batch {
  uint32_t q[N], d_o[N]; /* where they begin, in 16 bytes */
  float lse[N], delta[N];
  /* the first of the tile's keys that it sees, the end of them times 2^16; 0: zeros stand for the
   * row, if there is one */
  uint32_t seen[N];
};
__device__ __forceinline__ int first_of(uint32_t seen) {
  return (int)(seen & 0xffff);
}
__device__ __forceinline__ int end_of(uint32_t seen) {
  return (int)(seen >> 16);
}

/* Of key_tile, for those who look up rows: registers are for others. */
struct looked_up {
  const int32_t *list; /* or rows from `begin` on */
  int begin, queries, first, keys, n, head, origin;
  int skip_query, skip_head; /* from a thread's row to its next, all heads of a query in turn */
};

template <int W, int E, bool SMALL> struct memory {
  static constexpr int BATCH = rgk_mma_bwd_batch(W, SMALL), LOOKS = rgk_mma_bwd_looks(W, SMALL),
                       KNOWN = LOOKS + 2, /* batches: this, the next, and those looked up */
      THREADS = (int)rgk_mma_bwd_keys_threads(W), GROUPS = THREADS / 64,
                       M = KEYS / GROUPS / 16, /* of 16 keys, of a warp */
      STEPS = BATCH / 16;
  char k[KEYS * W * 2], v[KEYS * E * 2];
  char q[2][BATCH * W * 2], d_o[2][BATCH * E * 2];
  uint4 p[GROUPS][M][STEPS][32]; /* as the lanes hold it */
  batch<BATCH> rows[KNOWN];      /* batch i in place i % KNOWN */
  /* of each, bit 0: a row sees some keys; 1 + g: one does not see all of group g's */
  uint32_t todo[KNOWN];
  looked_up tile;
};

/* In powers of two; of a row that saw nothing such that its P is 0. */
__device__ __forceinline__ float base2(float lse) {
  return lse == -INFINITY ? INFINITY : lse * LOG2E;
}

/* Looks up the rows of every LOOKS-th batch: lane i of a warp row i. lse and delta are copies under
 * way. */
template <int BATCH, int LOOKS, int GROUPS> struct lookup {
  int query, head; /* of the row after next */
  int row, of;     /* the next row of the pack, -1: none, and its head */
  static __device__ __forceinline__ bool by_head(const rgk_attn &a) {
    return a.mode == RGK_SWA && a.window_left >= 0;
  }
  __device__ __forceinline__ void fetch(const rgk_attn &a, const looked_up &t) {
    const bool apart = by_head(a);
    if (apart)
      for (; query >= t.queries && head < a.G; head++) query -= t.queries;
    row = -1;
    of = t.head + head;
    if (query < t.queries && head < a.G) {
      const int at = apart ? query : t.queries - 1 - query;
      row = t.list ? t.list[at] : t.begin + at;
    }
    query += apart ? LOOKS * BATCH : t.skip_query;
    if (!apart) head += t.skip_head;
    if (!apart && head >= a.G) head -= a.G, query++;
  }
  __device__ __forceinline__ lookup() {}
  __device__ __forceinline__ lookup(const rgk_attn &a, const looked_up &t, int warp) {
    const int i = threadIdx.x % 32 + BATCH * warp;
    query = by_head(a) ? i : i / a.G;
    head = by_head(a) ? 0 : i % a.G;
    fetch(a, t);
  }
  /* Columns of the tile that the row sees, as visible() and columns() have it, in 32 bits. */
  __device__ __forceinline__ uint32_t seen(const rgk_attn &a, const looked_up &t) const {
    const int pos = row - t.origin;
    int hi = pos + 1, lo = -t.first;
    if (a.mode == RGK_CMP)
      hi = hi < a.kernel ? 0 : (int)((uint32_t)(hi - a.kernel) / (uint32_t)a.stride) + 1;
    hi = min(hi, t.keys) - t.first;
    if (by_head(a) && a.window_left < pos) lo += pos - (int)a.window_left;
    return (uint32_t)min(max(lo, 0), t.n) | (uint32_t)min(max(hi, 0), t.n) << 16;
  }
  static __device__ __forceinline__ uint32_t place_of(const rgk_tensor &x, int row, int head) {
    return (uint32_t)row * (uint32_t)(x.row >> 3) + (uint32_t)head * (uint32_t)(x.head >> 3);
  }
  /* All lanes of the warp. */
  __device__ __forceinline__ void next(const rgk_attn_plain &p, const looked_up &t, batch<BATCH> &x,
                                       uint32_t &todo) {
    const rgk_attn &a = p.a;
    const int i = threadIdx.x % 32;
    uint32_t sees = row >= 0 ? seen(a, t) : 0;
    if (i < BATCH) {
      x.seen[i] = sees;
      if (row >= 0) {
        x.q[i] = place_of(a.q, row, of), x.d_o[i] = place_of(a.d_o, row, of);
        copy4(smem_at(&x.lse[i]), (const float *)a.lse.data + (uint32_t)row * (uint32_t)a.lse.row +
                                      (uint32_t)of * (uint32_t)a.lse.head);
        copy4(smem_at(&x.delta[i]), p.delta + (uint32_t)row * (uint32_t)a.H + (uint32_t)of);
      } else {
        x.q[i] = x.d_o[i] = 0;
        x.lse[i] = x.delta[i] = 0;
      }
    }
    if (BATCH < 32) sees = __shfl_sync(~0u, sees, i % BATCH);
    const int lo = first_of(sees), hi = end_of(sees);
    uint32_t some = __any_sync(~0u, lo < hi);
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
      some |= (uint32_t)__any_sync(~0u, lo > g * (KEYS / GROUPS) ||
                                            hi < min((g + 1) * (KEYS / GROUPS), t.n))
              << (1 + g);
    if (i == 0) todo = some;
    fetch(a, t);
  }
};

/* A batch's rows of Q and of dO, as copy_rows does. Few instructions stand between a barrier and
 * the products behind it: all is looked up before the first copy, past which no load moves. */
template <int W, int E, int BATCH, int THREADS>
__device__ __forceinline__ void copy_batch(uint32_t to_q, uint32_t to_o, const rgk_attn &a,
                                           const batch<BATCH> &x) {
  constexpr int CHUNKS = W % 64 ? 4 : 8, STEP = THREADS / CHUNKS, N = (BATCH + STEP - 1) / STEP;
  static_assert(STEP % 8 == 0 && (E % 64 == 0) == (W % 64 == 0), "a thread's rows turn alike");
  const uint32_t c = threadIdx.x % CHUNKS;
  const int r0 = (int)threadIdx.x / CHUNKS;
  if (BATCH < STEP && r0 >= BATCH) return;
  uint32_t q[N], d_o[N];
  bool real[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    q[i] = x.q[r0 + i * STEP] + c, d_o[i] = x.d_o[r0 + i * STEP] + c;
    real[i] = x.seen[r0 + i * STEP] != 0;
  }
  to_q += place<W>(r0, (int)c), to_o += place<E>(r0, (int)c);
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int g = 0; g < W / 8 / CHUNKS; g++)
      copy16(to_q + i * STEP * pitch(W) + g * CHUNKS * 16,
             (const char *)a.q.data + (uint64_t)q[i] * 16 + g * CHUNKS * 16,
             real[i] && (int)(g * CHUNKS + c) * 8 < a.D);
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int g = 0; g < E / 8 / CHUNKS; g++)
      copy16(to_o + i * STEP * pitch(E) + g * CHUNKS * 16,
             (const char *)a.d_o.data + (uint64_t)d_o[i] * 16 + g * CHUNKS * 16,
             real[i] && (int)(g * CHUNKS + c) * 8 < a.E);
}

template <class T, int W, int E, bool SMALL>
__global__ void __launch_bounds__((int)rgk_mma_bwd_keys_threads(W), W <= 128 ? 2 : 1)
    keys(const __grid_constant__ rgk_attn_plain p) {
  using sh_t = memory<W, E, SMALL>;
  constexpr int BATCH = sh_t::BATCH, THREADS = sh_t::THREADS, GROUPS = sh_t::GROUPS, M = sh_t::M,
                STEPS = sh_t::STEPS, OWN = 16 * M, LOOKS = sh_t::LOOKS, KNOWN = sh_t::KNOWN;
  static_assert(sizeof(sh_t) == rgk_mma_bwd_keys_shared(W, E, SMALL), "as the host counts");
  extern __shared__ __align__(1024) char mma_bwd_memory[];
  sh_t &sh = *(sh_t *)mma_bwd_memory;
  const rgk_attn &a = p.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp % GROUPS;
  const bool for_dv = warp < GROUPS;

  key_tile t;
  gap<THREADS>(p);
  if (!find_keys(p, t)) return;
  if (t.dead) {
    clear_keys<THREADS>(a, t);
    return;
  }
  const uint16_t *const k = (const uint16_t *)a.k.data + t.key * a.k.row + t.kh * a.k.head,
                        *const v = (const uint16_t *)a.v.data + t.key * a.v.row + t.kh * a.v.head;
  copy_rows<W, KEYS, THREADS>(smem_at(sh.k), threadIdx.x, a.D, k,
                              [&](int r) { return r < t.n ? k + r * a.k.row : nullptr; });
  copy_rows<E, KEYS, THREADS>(smem_at(sh.v), threadIdx.x, a.E, v,
                              [&](int r) { return r < t.n ? v + r * a.v.row : nullptr; });
  auto load_batch = [&](const batch<BATCH> &x, int stage) {
    copy_batch<W, E, BATCH, THREADS>(smem_at(sh.q[stage]), smem_at(sh.d_o[stage]), a, x);
  };
  const int batches = (int)((t.queries * a.G + BATCH - 1) / BATCH);
  if (threadIdx.x == 0)
    sh.tile = {t.list, (int)t.row, (int)t.queries, (int)t.first,        (int)t.keys,
               t.n,    t.kh * a.G, (int)t.origin,  LOOKS * BATCH / a.G, LOOKS * BATCH % a.G};
  __syncthreads();
  lookup<BATCH, LOOKS, GROUPS> look;
  if (warp < LOOKS) {
    look = lookup<BATCH, LOOKS, GROUPS>(a, sh.tile, warp);
    look.next(p, sh.tile, sh.rows[warp], sh.todo[warp]);
    if (LOOKS == 1) look.next(p, sh.tile, sh.rows[1], sh.todo[1]);
  }
  __syncthreads();
  if (batches > 0) load_batch(sh.rows[0], 0);
  copies_commit();

  const int own = group * OWN, key = own + lane / 4, c0 = lane % 4 * 2;
  const float scale2 = a.scale * LOG2E;
  const bool dk = a.dk.data != nullptr, wanted = for_dv ? a.dv.data != nullptr : dk;
  const uint32_t own_at = for_dv ? mma_at_rows<W>(smem_at(sh.k)) + own * pitch(W)
                                 : mma_at_rows<E>(smem_at(sh.v)) + own * pitch(E);
  float sum[M][(W > E ? W : E) / 2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < (W > E ? W : E) / 2; i++) sum[m][i] = 0;

  int stage = 0, at = 0; /* of two and of KNOWN */
  for (int i = 0; i < batches; i++, stage ^= 1, at = at == KNOWN - 1 ? 0 : at + 1) {
    const batch<BATCH> &x = sh.rows[at];
    copies_wait<0>();
    __syncthreads();
    if (i + 1 < batches) load_batch(sh.rows[at == KNOWN - 1 ? 0 : at + 1], stage ^ 1);
    if (warp < LOOKS && (i + 2) % LOOKS == 0) { /* batches i + 2 … i + 1 + LOOKS */
      const int ahead = at + 2 + warp, to = ahead < KNOWN ? ahead : ahead - KNOWN;
      look.next(p, sh.tile, sh.rows[to], sh.todo[to]);
    }
    copies_commit();

    const uint32_t todo = sh.todo[at];
    if (!(todo & 1)) continue;
    const bool cut = todo >> (1 + group) & 1;
    float s[M][BATCH / 2];
    auto exponentiate = [&](int step) {
#pragma unroll
      for (int j = 2 * step; j < 2 * step + 2; j++) {
        float2 lse = *(const float2 *)&x.lse[8 * j + c0];
        lse = make_float2(base2(lse.x), base2(lse.y));
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            s[m][4 * j + i] = exp2_fast(fmaf(s[m][4 * j + i], scale2, i % 2 ? -lse.y : -lse.x));
      }
    };
    if (for_dv) {
      scores<T, W>(s, own_at, mma_at_columns<W>(smem_at(sh.q[stage])));
      exponentiate(0);
    } else if (dk) {
      scores<T, E>(s, own_at, mma_at_columns<E>(smem_at(sh.d_o[stage])));
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      uint32_t y[M][4];
      if (for_dv) {
        if (cut) {
#pragma unroll
          for (int j = 2 * step; j < 2 * step + 2; j++) {
            const uint2 seen = *(const uint2 *)&x.seen[8 * j + c0];
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
              for (int i = 0; i < 4; i++) {
                const int n = key + 16 * m + i / 2 * 8;
                const uint32_t of = i % 2 ? seen.y : seen.x;
                if (n < first_of(of) || n >= end_of(of)) s[m][4 * j + i] = 0;
              }
          }
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
          pack_a<T>(y[m], s[m] + 8 * step);
          sh.p[group][m][step][lane] = make_uint4(y[m][0], y[m][1], y[m][2], y[m][3]);
        }
      }
      __syncthreads(); /* P is there */
      if (for_dv) {
        /* beside each other: powers while the tensor cores work */
        if (step + 1 < STEPS) exponentiate(step + 1);
        add_product<T, E, 1>(sum, y, mma_at_rows<E>(smem_at(sh.d_o[stage])) + step * 16 * pitch(E));
      } else if (dk) {
#pragma unroll
        for (int m = 0; m < M; m++) {
          const uint4 w = sh.p[group][m][step][lane];
          const uint32_t word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const float2 delta = *(const float2 *)&x.delta[16 * step + j / 2 * 8 + c0],
                         prob = unpack(word[j], T());
            const float *const dp = s[m] + 8 * step + 2 * j;
            y[m][j] = pack(prob.x * (dp[0] - delta.x), prob.y * (dp[1] - delta.y), T());
          }
        }
        add_product<T, W, 1>(sum, y, mma_at_rows<W>(smem_at(sh.q[stage])) + step * 16 * pitch(W));
      }
    }
  }
  copies_wait<0>(); /* of keys that no row sees */
  if (!wanted) return;

  const int width = for_dv ? a.E : a.D;
  const bool part = t.part >= 0, add = !part && (for_dv ? a.acc_v : a.acc_k);
  const float factor = for_dv || part ? 1 : a.scale; /* parts are scaled when added up */
  rgk_tensor to = for_dv ? a.dv : a.dk;
  int64_t row = t.key * to.row + t.kh * to.head;
  if (part) {
    to = {for_dv ? p.part_v : p.part_k, width, 0, RG_F32, 0};
    row = (t.kh * p.part_rows + t.part) * width;
  }
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = key + 16 * m + 8 * i;
      if (r >= t.n) continue;
#pragma unroll
      for (int j = 0; j < (W > E ? W : E) / 8; j++)
        if (8 * j < width)
          put_two(to, add, row + r * to.row + 8 * j + c0, sum[m][4 * j + 2 * i] * factor,
                  sum[m][4 * j + 2 * i + 1] * factor);
    }
}

} // namespace mma_bwd
} // namespace rgk
