/* kernels/attn/mma_bwd_keys.cuh: dK and dV on the tensor cores of any GPU since Ampere.

     S^T = K Q^T    P = exp(scale S - lse)    dV = P^T dO
     dP^T = V dO^T  dS = P (dP - delta)       dK = scale dS^T Q

   A block has a tile of 64 keys (key_tiles.cuh) and walks the rows (query, head) that see it, a
   batch at a time. Half of its warps have the first line, half the second, so that a warp's sums
   are one gradient's and leave registers for 32 keys, where widths are up to 128: what it reads of
   Q and dO serves two products each. Scores are formed transposed: P^T and dS^T lie in the
   registers from which the second product of a line takes them. P crosses over in shared memory, as
   it lies there, from a warp to the one that has the same keys.

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

/* Rows of a batch. */
template <int N> struct batch {
  int row[N], head[N]; /* row of the pack, query head; row -1: none */
  float lse[N], delta[N];
  uint32_t seen[N]; /* the first of the tile's keys that it sees, the end of them times 2^16 */
};
__device__ __forceinline__ int first_of(uint32_t seen) {
  return (int)(seen & 0xffff);
}
__device__ __forceinline__ int end_of(uint32_t seen) {
  return (int)(seen >> 16);
}

/* Of key_tile, for the warp that looks up rows: registers are for others. */
struct looked_up {
  const int32_t *list; /* or rows from `begin` on */
  int begin, queries, first, keys, n, head, origin;
};

template <int W, int E, bool SMALL> struct memory {
  static constexpr int BATCH = rgk_mma_bwd_batch(W, SMALL),
                       THREADS = (int)rgk_mma_bwd_keys_threads(W), GROUPS = THREADS / 64,
                       M = KEYS / GROUPS / 16, /* of 16 keys, of a warp */
      STEPS = BATCH / 16;
  char k[KEYS * W * 2], v[KEYS * E * 2];
  char q[2][BATCH * W * 2], d_o[2][BATCH * E * 2];
  uint4 p[GROUPS][M][STEPS][32]; /* as the lanes hold it */
  batch<BATCH> rows[3];          /* of this batch, the next and the one after */
  looked_up tile;
};

/* In powers of two; of a row that saw nothing such that its P is 0. */
__device__ __forceinline__ float base2(float lse) {
  return lse == -INFINITY ? INFINITY : lse * LOG2E;
}

/* From the warp that made P to the one with the same keys; of 64 threads. */
__device__ __forceinline__ void hand_over(int group) {
  asm volatile("bar.arrive %0, 64;" ::"r"(1 + group) : "memory");
}
__device__ __forceinline__ void take_over(int group) {
  asm volatile("bar.sync %0, 64;" ::"r"(1 + group) : "memory");
}

/* Looks up the rows of batches, one after another: lane i of one warp row i. lse and delta are
 * copies under way. */
template <int BATCH> struct lookup {
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
    query += apart ? BATCH : BATCH / a.G;
    if (!apart) head += BATCH % a.G;
    if (!apart && head >= a.G) head -= a.G, query++;
  }
  __device__ __forceinline__ lookup() {}
  __device__ __forceinline__ lookup(const rgk_attn &a, const looked_up &t) {
    const int i = threadIdx.x % 32;
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
  __device__ __forceinline__ void next(const rgk_attn_plain &p, const looked_up &t,
                                       batch<BATCH> &x) {
    const rgk_attn &a = p.a;
    const int i = threadIdx.x % 32;
    if (i < BATCH) {
      x.row[i] = row;
      x.head[i] = of;
      x.seen[i] = row >= 0 ? seen(a, t) : 0;
      if (row >= 0) {
        copy4(smem_at(&x.lse[i]), (const float *)a.lse.data + row * a.lse.row + of * a.lse.head);
        copy4(smem_at(&x.delta[i]), p.delta + (int64_t)row * a.H + of);
      } else {
        x.lse[i] = x.delta[i] = 0;
      }
    }
    fetch(a, t);
  }
};

template <class T, int W, int E, bool SMALL>
__global__ void __launch_bounds__((int)rgk_mma_bwd_keys_threads(W), W <= 128 ? 2 : 1)
    keys(const __grid_constant__ rgk_attn_plain p) {
  using sh_t = memory<W, E, SMALL>;
  constexpr int BATCH = sh_t::BATCH, THREADS = sh_t::THREADS, GROUPS = sh_t::GROUPS, M = sh_t::M,
                STEPS = sh_t::STEPS, OWN = 16 * M;
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
    const uint16_t *const q = (const uint16_t *)a.q.data, *const d_o = (const uint16_t *)a.d_o.data;
    copy_rows<W, BATCH, THREADS>(smem_at(sh.q[stage]), threadIdx.x, a.D, q, [&](int r) {
      return x.row[r] < 0 ? nullptr : q + (x.row[r] * a.q.row + x.head[r] * a.q.head);
    });
    copy_rows<E, BATCH, THREADS>(smem_at(sh.d_o[stage]), threadIdx.x, a.E, d_o, [&](int r) {
      return x.row[r] < 0 ? nullptr : d_o + (x.row[r] * a.d_o.row + x.head[r] * a.d_o.head);
    });
  };
  const int batches = (int)((t.queries * a.G + BATCH - 1) / BATCH);
  lookup<BATCH> look;
  const bool looks = warp == THREADS / 32 - 1;
  if (looks) {
    if (lane == 0)
      sh.tile = {t.list,      (int)t.row, (int)t.queries, (int)t.first,
                 (int)t.keys, t.n,        t.kh * a.G,     (int)t.origin};
    __syncwarp();
    look = lookup<BATCH>(a, sh.tile);
    look.next(p, sh.tile, sh.rows[0]);
    look.next(p, sh.tile, sh.rows[1]);
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

  int stage = 0, at = 0; /* of two and of three */
  for (int left = batches; left > 0; left--, stage ^= 1, at = at == 2 ? 0 : at + 1) {
    const batch<BATCH> &x = sh.rows[at];
    copies_wait<0>();
    __syncthreads();
    if (left > 1) load_batch(sh.rows[at == 2 ? 0 : at + 1], stage ^ 1);
    if (looks) look.next(p, sh.tile, sh.rows[at == 0 ? 2 : at - 1]);
    copies_commit();

    const int lo = first_of(x.seen[lane % BATCH]), hi = end_of(x.seen[lane % BATCH]),
              end = min(own + OWN, t.n);
    const bool any = __any_sync(~0u, lo < hi && lo < end && hi > own),
               cut = __any_sync(~0u, lo > own || hi < end);
    float s[M][BATCH / 2];
    uint32_t y[M][4 * STEPS];
    if (any && for_dv) {
      scores<T, W>(s, own_at, mma_at_columns<W>(smem_at(sh.q[stage])));
#pragma unroll
      for (int j = 0; j < BATCH / 8; j++) {
        const int r = 8 * j + c0;
        float2 lse = *(const float2 *)&x.lse[r];
        lse = make_float2(base2(lse.x), base2(lse.y));
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            s[m][4 * j + i] = exp2_fast(fmaf(s[m][4 * j + i], scale2, i % 2 ? -lse.y : -lse.x));
        if (cut) {
          const uint2 seen = *(const uint2 *)&x.seen[r];
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
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
          pack_a<T>(y[m] + 4 * i, s[m] + 8 * i);
          if (dk)
            sh.p[group][m][i][lane] =
                make_uint4(y[m][4 * i], y[m][4 * i + 1], y[m][4 * i + 2], y[m][4 * i + 3]);
        }
      if (dk) hand_over(group);
      if (wanted) add_product<T, E, STEPS>(sum, y, mma_at_rows<E>(smem_at(sh.d_o[stage])));
    } else if (any && wanted) {
      scores<T, E>(s, own_at, mma_at_columns<E>(smem_at(sh.d_o[stage])));
      take_over(group);
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
          const uint4 w = sh.p[group][m][i][lane];
          const uint32_t word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const float2 delta = *(const float2 *)&x.delta[16 * i + j / 2 * 8 + c0],
                         prob = unpack(word[j], T());
            float *const dp = s[m] + 8 * i + 2 * j;
            y[m][4 * i + j] = pack(prob.x * (dp[0] - delta.x), prob.y * (dp[1] - delta.y), T());
          }
        }
      add_product<T, W, STEPS>(sum, y, mma_at_rows<W>(smem_at(sh.q[stage])));
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
