/* kernels/attn/plain.cuh: what the any-shape attention kernels share: rows to shared memory as
   floats, small products out of shared memory, and the walk of a row tile over the key tiles it
   sees.

   A warp owns 4 * RL rows of the left operand. Lane (y, x), x in 0 … 7, holds of a product
     scores [rows, keys]    rows y + 4i, keys x + 8j
     sums   [rows, width]   rows y + 4i, columns 4x + 32j … + 3
   Shared rows are LD = width + 4 floats apart: eight neighbouring rows then lie in different banks.
 */
#pragma once
#include "plain.h"
#include "attn.cuh"
#include "../device/chunk.cuh"
#include "../device/pages.cuh"
#include "../device/ptx.cuh"

namespace rgk {
namespace plain {

/* ---- rows in and out ---- */

/* Four elements of 16 bits, those from n on as zeros. */
__device__ __forceinline__ uint2 load4(const uint16_t *p, int n, bool vec) {
  if (vec) return *(const uint2 *)p;
  const uint32_t x = p[0], y = n > 1 ? p[1] : 0, z = n > 2 ? p[2] : 0, w = n > 3 ? p[3] : 0;
  return make_uint2(x | y << 16, z | w << 16);
}

/* Rows [0, rows) of dst, columns [0, width rounded up to 16): element at(r) of t and those after
 * it; zeros past the width and where at(r) is negative. copies_wait_all() and a barrier must
 * follow. */
template <int LD, int THREADS, class At>
__device__ __forceinline__ void load_rows(float *dst, int rows, int width, const rgk_tensor &t,
                                          bool vec, At at) {
  enum { LANES = LD < 100 ? 16 : 32, STEP = THREADS / LANES, AHEAD = 4 /* loads under way */ };
  const int padded = (width + 15) & ~15, r0 = threadIdx.x / LANES, c0 = threadIdx.x % LANES * 4;
  if (t.dtype == RG_F32) {
#pragma unroll 1
    for (int r = r0; r < rows; r += STEP) {
      const int64_t from = at(r);
#pragma unroll 1
      for (int c = c0; c < padded; c += LANES * 4) {
        float *to = dst + r * LD + c, x[4] = {0, 0, 0, 0};
        if (vec && from >= 0 && c < width) {
          const float *const source = (const float *)t.data + from + c;
          copy16(smem_at(to), source);
          continue;
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (from >= 0 && c + i < width) x[i] = ((const float *)t.data)[from + c + i];
        *(float4 *)to = make_float4(x[0], x[1], x[2], x[3]);
      }
    }
    return;
  }
#pragma unroll 1
  for (int c = c0; c < padded; c += LANES * 4)
#pragma unroll 1
    for (int r1 = r0; r1 < rows; r1 += AHEAD * STEP) {
      uint2 raw[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int r = r1 + i * STEP;
        const int64_t from = r < rows ? at(r) : -1;
        raw[i] = make_uint2(0, 0); /* zeros in either type */
        if (from >= 0 && c < width)
          raw[i] = load4((const uint16_t *)t.data + from + c, width - c, vec);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int r = r1 + i * STEP;
        const bool half = t.dtype == RG_F16;
        const float2 lo = half ? unpack(raw[i].x, __half()) : unpack(raw[i].x, __nv_bfloat16());
        const float2 hi = half ? unpack(raw[i].y, __half()) : unpack(raw[i].y, __nv_bfloat16());
        if (r < rows) *(float4 *)(dst + r * LD + c) = make_float4(lo.x, lo.y, hi.x, hi.y);
      }
    }
}

/* The first `width` columns of a row in shared memory to the row at element `row` of t, by one
 * warp. */
__device__ __forceinline__ void store_row(const rgk_tensor &t, int64_t row, const float *src,
                                          int width, bool vec, bool add) {
#pragma unroll 1
  for (int c = threadIdx.x % 32 * 4; c < width; c += 128) {
    const float4 x = *(const float4 *)(src + c);
    if (!vec) {
#pragma unroll 1
      for (int i = c; i < min(c + 4, width); i++) put_grad(t.data, t.dtype, row + i, src[i], add);
    } else if (t.dtype == RG_F32) {
      float4 *p = (float4 *)((float *)t.data + row + c), y = x;
      if (add) {
        y = *p;
        y = make_float4(__fadd_rn(y.x, x.x), __fadd_rn(y.y, x.y), __fadd_rn(y.z, x.z),
                        __fadd_rn(y.w, x.w));
      }
      *p = y;
    } else {
      const bool half = t.dtype == RG_F16;
      *(uint2 *)((uint16_t *)t.data + row + c) =
          half ? make_uint2(pack(x.x, x.y, __half()), pack(x.z, x.w, __half()))
               : make_uint2(pack(x.x, x.y, __nv_bfloat16()), pack(x.z, x.w, __nv_bfloat16()));
    }
  }
}

template <int LANES>
__device__ __forceinline__ void zero_row(const rgk_tensor &t, int64_t row, int width, int lane) {
  for (int c = lane; c < width; c += LANES) store(t.data, t.dtype, row + c, 0.0f);
}

/* ---- products ---- */

__device__ __forceinline__ float part(const float4 &x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

/* s[i][j] = row y + 4i of a times row x + 8j of b; a and b point at the lane's first row. CHAIN
 * terms are summed in one chain, then the chains: long sums of large terms would lose digits that
 * exp shows. CHAIN 0: one chain, as `delta` sums, so that where a row sees one key (and o is its v)
 * dP - delta is 0. */
template <int RL, int NJ, int LD, int CHAIN>
__device__ __forceinline__ void scores(const float *a, const float *b, int width,
                                       float (&s)[RL][NJ]) {
  const int padded = (width + 15) & ~15;
#pragma unroll
  for (int i = 0; i < RL; i++)
#pragma unroll
    for (int j = 0; j < NJ; j++) s[i][j] = 0;
#pragma unroll 1
  for (int d = 0; d < padded; d += 16) {
    float c[RL][NJ];
    if (CHAIN) {
#pragma unroll
      for (int i = 0; i < RL; i++)
#pragma unroll
        for (int j = 0; j < NJ; j++) c[i][j] = 0;
    }
    float(&sum)[RL][NJ] = CHAIN ? c : s;
#pragma unroll
    for (int e = 0; e < 16; e += 4) {
      float4 av[RL], bv[NJ];
#pragma unroll
      for (int i = 0; i < RL; i++) av[i] = *(const float4 *)(a + 4 * i * LD + d + e);
#pragma unroll
      for (int j = 0; j < NJ; j++) bv[j] = *(const float4 *)(b + 8 * j * LD + d + e);
#pragma unroll
      for (int f = 0; f < 4; f++) /* neighbouring instructions add to different sums */
#pragma unroll
        for (int j = 0; j < NJ; j++)
#pragma unroll
          for (int i = 0; i < RL; i++) sum[i][j] = fmaf(part(av[i], f), part(bv[j], f), sum[i][j]);
    }
    if (CHAIN) {
#pragma unroll
      for (int i = 0; i < RL; i++)
#pragma unroll
        for (int j = 0; j < NJ; j++) s[i][j] += c[i][j];
    }
  }
}

/* c = p [rows, n] times v [n, width]; p points at the lane's first row, v at its first column; n a
 * multiple of
 * 4. ALL: the width takes all NE columns of 32. */
template <int RL, int NE, int LDP, int LD, bool ALL>
__device__ __forceinline__ void sums_of(const float *p, const float *v, int n, int width,
                                        float4 (&c)[RL][NE]) {
#pragma unroll
  for (int i = 0; i < RL; i++)
#pragma unroll
    for (int j = 0; j < NE; j++) c[i][j] = make_float4(0, 0, 0, 0);
#pragma unroll 1
  for (int k = 0; k < n; k += 4) {
    float4 pv[RL];
#pragma unroll
    for (int i = 0; i < RL; i++) pv[i] = *(const float4 *)(p + 4 * i * LDP + k);
#pragma unroll
    for (int j = 0; j < NE; j++) {
      if (!ALL && 32 * j >= width) break;
#pragma unroll
      for (int kk = 0; kk < 4; kk++) {
        const float4 vv = *(const float4 *)(v + (k + kk) * LD + 32 * j);
#pragma unroll
        for (int i = 0; i < RL; i++) {
          const float w = part(pv[i], kk);
          c[i][j].x = fmaf(w, vv.x, c[i][j].x);
          c[i][j].y = fmaf(w, vv.y, c[i][j].y);
          c[i][j].z = fmaf(w, vv.z, c[i][j].z);
          c[i][j].w = fmaf(w, vv.w, c[i][j].w);
        }
      }
    }
  }
}
template <int RL, int NE, int LDP, int LD>
__device__ __forceinline__ void sums(const float *p, const float *v, int n, int width,
                                     float4 (&c)[RL][NE]) {
  if (width > 32 * (NE - 1))
    sums_of<RL, NE, LDP, LD, true>(p, v, n, width, c);
  else
    sums_of<RL, NE, LDP, LD, false>(p, v, n, width, c);
}

__device__ __forceinline__ float4 scaled(float4 x, float f) {
  return make_float4(x.x * f, x.y * f, x.z * f, x.w * f);
}
__device__ __forceinline__ float4 added(float4 x, float4 y) {
  return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
}

/* A lane's sums, each row times its factor, into rows that the warp alone uses, where to point at
 * the lane's first row and column. Adding to a gradient happens after that, so the product is
 * rounded first. */
template <int RL, int NE, int LD>
__device__ __forceinline__ void put_sums(float *to, const float4 (&sum)[RL][NE],
                                         const float (&factor)[RL]) {
#pragma unroll
  for (int i = 0; i < RL; i++)
#pragma unroll
    for (int j = 0; j < NE; j++)
      *(float4 *)(to + 4 * i * LD + 32 * j) = scaled(sum[i][j], factor[i]);
  __syncwarp();
}

/* Logits of products of q and k. */
template <int RL, int NJ>
__device__ __forceinline__ void to_logits(const rgk_attn &a, float (&s)[RL][NJ]) {
#pragma unroll
  for (int i = 0; i < RL; i++)
#pragma unroll
    for (int j = 0; j < NJ; j++) s[i][j] *= a.scale;
  if (a.softcap > 0) { /* apart: it is long, and rarely asked for */
    const float inverse = 1 / a.softcap;
#pragma unroll
    for (int i = 0; i < RL; i++)
#pragma unroll
      for (int j = 0; j < NJ; j++) s[i][j] = tanhf(s[i][j] * inverse) * a.softcap;
  }
}
/* x times the softcap's slope at a logit. */
__device__ __forceinline__ float times_slope(const rgk_attn &a, float x, float logit) {
  if (!(a.softcap > 0)) return x;
  const float t = logit * (1 / a.softcap);
  return x * ((1 - t) * (1 + t));
}

/* Columns [lo, hi) of a tile at `first` with `keys` keys, of the keys [r.lo, r.hi). */
__device__ __forceinline__ int2 columns(key_range r, int64_t first, int keys) {
  const int64_t lo = r.lo - first, hi = r.hi - first;
  return make_int2(lo <= 0      ? 0
                   : lo >= keys ? keys
                                : (int)lo,
                   hi <= 0      ? 0
                   : hi >= keys ? keys
                                : (int)hi);
}

/* ---- row tiles ---- */

/* A block's rows: queries [row, row + nq) of the pack, heads [head, head + heads) of KV head kh;
 * row r is query r / heads, head r % heads. */
struct row_tile {
  tile t;
  int64_t row;
  int kh, head, heads, n;
};

__device__ __forceinline__ row_tile find_rows(const rgk_attn_plain &p) {
  const rgk_attn &a = p.a;
  const int64_t per = (int64_t)a.KH * p.parts, hp = blockIdx.x % per;
  row_tile r;
  r.t = find_tile(a.seqs, p.slots - 1 - blockIdx.x / per, p.queries); /* the longest rows first */
  r.row = r.t.begin + r.t.first;
  r.kh = (int)(hp / p.parts);
  const int skip = (int)(hp % p.parts) * p.heads;
  r.head = r.kh * a.G + skip;
  r.heads = min(p.heads, a.G - skip);
  r.n = r.t.n * r.heads;
  return r;
}

/* Element at which row r of the tile starts in x; -1: no such row. */
__device__ __forceinline__ int64_t row_at(const row_tile &t, const rgk_tensor &x, int r) {
  if (r >= t.n) return -1;
  return (t.row + r / t.heads) * x.row + (t.head + r % t.heads) * x.head;
}

/* Where a row tile's keys are, and the position of its sequence's first query. */
struct tile_keys {
  key_span span;
  int64_t offset;
  const int32_t *table; /* NULL: in rows [span.row, …) of k and v */
};
__device__ __forceinline__ tile_keys keys_of(const rgk_attn &a, const row_tile &t) {
  return {rgk::keys_of(a, t.t.b), first_position(a, t.t.b), nullptr};
}
/* The same where they may be in pages; all threads of the block. */
__device__ __forceinline__ tile_keys keys_of(const rgk_attn_plain &p, const row_tile &t) {
  if (!p.pages.table) return keys_of(p.a, t);
  const int64_t tokens = paged_tokens(p.pages, t.t.b, t.t.length);
  tile_keys k = {{0, tokens}, tokens ? tokens - t.t.length : 0, nullptr};
  if (p.a.mode == RGK_CMP) k.span.n = rgk_blocks_in(tokens, p.a.kernel, p.a.stride);
  k.span.n = min(k.span.n, p.a.S);
  k.table = p.pages.table + t.t.b * p.pages.table_row;
  return k;
}
/* Element at which key j of the tile's sequence begins in x, whose pages lie `page` apart. */
__device__ __forceinline__ int64_t key_at(const rgk_attn_plain &p, const tile_keys &k,
                                          const row_tile &t, const rgk_tensor &x, int64_t page,
                                          int64_t j) {
  const int64_t row =
      k.table ? paged_key(p.pages, k.table, page, x.row, j) : (k.span.row + j) * x.row;
  return row + t.kh * x.head;
}

template <int M> struct walk_shared {
  int lo[M], hi[M]; /* columns each query sees of the tile */
  int least[RGK_PLAIN_THREADS / 32];
};

/* Walks the key tiles that some query of a row tile sees, in order: N keys each, SLC: parts of
 * blocks. Thread i looks after query i. */
template <int M, int N> struct walk {
  static constexpr int NONE = 0x7fffffff;
  key_span span;
  key_range seen; /* of this thread's query */
  const int32_t *idx;
  /* SLC: place in this thread's list, and the block before it, which is still to come */
  int at, next;
  int64_t block, end;
  int part;
  /* the tile */
  int64_t first;
  int keys;

  __device__ __forceinline__ void find_next(const rgk_attn &a) {
    const int before = next;
    next = NONE;
    while (at < a.N) {
      const int e = idx[at++];
      if (e <= before) continue;
      if ((int64_t)e * a.block < seen.hi)
        next = e;
      else
        at = a.N; /* what follows is further out, or not larger */
      return;
    }
  }

  __device__ __forceinline__ walk(const rgk_attn &a, const row_tile &t, const tile_keys &k) {
    const int64_t pos = t.t.first + k.offset;
    span = k.span;
    seen = {0, 0};
    if (threadIdx.x < t.t.n) seen = visible(a, pos + threadIdx.x, span.n);
    part = 0;
    if (a.mode == RGK_SLC) {
      next = NONE;
      if (threadIdx.x < t.t.n) {
        idx = (const int32_t *)a.idx.data + (t.row + threadIdx.x) * a.idx.row + t.kh * a.idx.head;
        at = 0;
        next = -1;
        find_next(a);
      }
    } else { /* both ends grow with the position */
      first = visible(a, pos, span.n).lo / N * N - N;
      end = visible(a, pos + t.t.n - 1, span.n).hi;
    }
  }

  /* Moves on; all threads of the block have left the tile before when it returns. sh.lo and sh.hi
   * are there after the next barrier. */
  __device__ __forceinline__ bool step(const rgk_attn_plain &p, const row_tile &t,
                                       walk_shared<M> &sh) {
    bool mine = threadIdx.x < t.t.n;
    if (p.a.mode == RGK_SLC) {
      if (part == 0) {
        const int least = __reduce_min_sync(~0u, next);
        if (threadIdx.x % 32 == 0) sh.least[threadIdx.x / 32] = least;
      }
      __syncthreads();
      if (part == 0) {
        block = min(min(sh.least[0], sh.least[1]), min(sh.least[2], sh.least[3]));
        if (block == NONE) return false;
      }
      first = block * p.a.block + (int64_t)part * p.keys;
      const int64_t stop = min(span.n, min(first + p.keys, (block + 1) * p.a.block));
      keys = (int)(stop - first);
      mine = mine && next == block;
      if (++part == p.key_parts || stop == span.n) {
        if (mine) find_next(p.a);
        part = 0;
      }
    } else {
      first += N;
      __syncthreads();
      if (first >= end) return false;
      keys = (int)min((int64_t)N, span.n - first);
    }
    if (threadIdx.x < t.t.n) {
      const int2 c = columns(seen, first, keys);
      sh.lo[threadIdx.x] = mine ? c.x : 0;
      sh.hi[threadIdx.x] = mine ? c.y : 0;
    }
    return true;
  }
};

} // namespace plain
} // namespace rgk
