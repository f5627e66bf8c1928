/* kernels/attn/decode_split_sm90.cuh: keys of one token of a KV head shared out among the warps of
   a cluster: what they have in common, the copies, and a warp's part of attention.

   Sums are cut where keys stand, and nowhere else:

     compressed keys   chunks of RGK_SPLIT_CHUNK rows, of which warp w takes tiles of 16, every
                       eighth from its own on; the chunk's eight sums become one, in order
     window, blocks    64 keys a sum

   Block r of a cluster of n takes chunks r, r + n … and of the others sums r + n · warp … . What
   each ends with (m, l, o) is put aside in memory that stays in L2, and added up in order when all
   is there. So n, which the number of tokens gives, moves work and no bit.

   A warp has 16 heads as the rows of its products (mma.sync), its own two tiles of keys and values
   in shared memory, which its lanes ask the copy engine for, and nobody to wait for between them.
 */
#pragma once
#include "../device/mma.cuh"
#include "decode_split.h"
#include "decode_sum_sm90.cuh"

namespace rgk {
namespace split {

using namespace decode;

constexpr int WARPS = RGK_SPLIT_WARPS, THREADS = 32 * WARPS, CHUNK_ROWS = RGK_SPLIT_CHUNK;
constexpr int KEYS = RGK_SPLIT_KEYS, GROUP = 64; /* keys of a tile; of a sum that is no chunk's */
constexpr int RING = 2;                          /* tiles of a warp in shared memory */
constexpr int TILES = CHUNK_ROWS / KEYS / WARPS; /* of a warp's share of a chunk */
static_assert(2 * TILES <= 32 && GROUP / KEYS * 2 <= 32, "a lane for each box of eight rows");

constexpr int CANDIDATES = 96, PAIRS = THREADS / 2;

template <class Type, int D_> struct sizes {
  using type = Type;
  static constexpr int D = D_, E = D_, PANELS = D / 64;
  static constexpr int BOX = 1024 * PANELS,
                       SLOT = 4 * BOX; /* bytes: eight rows; a tile's K and V */
  static constexpr int PITCH = D + 8;  /* floats of a row of o, no banks met */
  static constexpr int PIECES = HEADS * D / 4, ROUNDS = (PIECES + THREADS - 1) / THREADS;
  using place = setup<Type, D, RANKED>; /* as place_job counts tiles: not looked at */
};

/* A sum in memory: o [head, feature], m and l of each head. m in powers of two. */
template <class S> struct part { float o[HEADS][S::D], m[HEADS], l[HEADS]; };

template <class S> struct memory {
  alignas(1024) char ring[WARPS][RING][S::SLOT];
  alignas(16) float o[WARPS][HEADS][S::PITCH];
  float m[WARPS][HEADS], l[WARPS][HEADS];
  float minus[HEADS]; /* −lse in powers of two */
  alignas(16) int top[PAIRS];
  alignas(16) int key[CANDIDATES + 4];
  int block[CANDIDATES];
  int2 chosen[MOST];
  int idx[MOST];
  int count, least, late;
  float4 weight[HEADS]; /* of branches */
  int sums[2][WARPS];
  unsigned long long wide[2 * WARPS];
  uint64_t full[WARPS][RING];
};

/* What a cluster has put aside. */
template <class S> struct room {
  part<S> *chunk, *near; /* of chunks; of a window, then of selected blocks */
  uint4 *record;         /* [tile, head]: nearly the weights of its blocks */
  float4 *score;         /* [tile] */
  float *first;          /* [tile]: what its first key adds to the block before */
  unsigned long long *entry;

  __device__ __forceinline__ room(const rgk_decode_split &d, int cluster) {
    const int64_t tiles = d.d.pitch / KEYS, chunks = d.d.pitch / CHUNK_ROWS;
    char *at = (char *)d.d.room + cluster * d.room_bytes;
    chunk = (part<S> *)at, at += chunks * sizeof(part<S>);
    near = (part<S> *)at, at += RGK_SPLIT_NEAR * sizeof(part<S>);
    record = (uint4 *)at, at += tiles * HEADS * sizeof(uint4);
    score = (float4 *)at, at += tiles * sizeof(float4);
    entry = (unsigned long long *)at, at += tiles * 4 * sizeof *entry;
    first = (float *)at;
  }
};

/* ---- a warp's tiles ---- */

/* Tiles that follow on each other: rows first + k step …, KEYS of each. tiles < 0: none follows. */
struct run {
  int first, step, tiles;
};

/* Where rows are found, and which are seen. */
struct keys_at {
  const rgk_flash_paged *p;
  const int32_t *table;
  int lo, hi; /* rows [lo, hi] */
};

/* A token of a KV head, as all threads have it. */
struct token {
  job j;
  keys_at compressed, window, selected;
  int chunks, of_chunks, groups, first_group, blocks; /* of_chunks: this block of threads' */
};

/* 0, once what was read is there: for what is written over with no barrier between. */
__device__ __forceinline__ uint32_t after(uint32_t read) {
  uint32_t x;
  asm volatile("{\n\tmad.lo.u32 %0, %1, %1, %1;\n\tand.b32 %0, %0, 1;\n\t}"
               : "=r"(x)
               : "r"(read)
               : "memory");
  return x;
}

/* Asks for tiles, two ahead of who takes them. runs(i): a warp's i-th run, and where its keys are
 * (a lane's boxes are asked for a run ahead). */
template <class S, class F> struct feed {
  memory<S> &s;
  const int warp, lane, kv_head;
  F runs;
  struct where {
    run r;
    const rgk_flash_paged *p;
    int page, row;
  } now, next;
  int at, k;

  __device__ __forceinline__ where find(int i) const {
    keys_at of = {};
    where w;
    w.r = runs(i, of);
    w.p = of.p, w.page = 0, w.row = 0;
    if (lane / 2 < w.r.tiles) {
      const int row = w.r.first + lane / 2 * w.r.step + lane % 2 * 8,
                m = rgk_over(row, of.p->by_rows);
      w.page = of.p->pages.count;
      w.row = row - m * of.p->pages.rows;
      if (row + 8 > of.lo && row <= of.hi) w.page = of.table[m];
    }
    return w;
  }
  __device__ __forceinline__ feed(memory<S> &s, int warp, int lane, int kv_head, F runs)
      : s(s), warp(warp), lane(lane), kv_head(kv_head), runs(runs), at(0), k(0) {
    now = find(0);
    next = find(1);
  }
  /* The next tile, if there is one, to where what `read` was made of has been. */
  __device__ __forceinline__ void ask(uint32_t &asked, uint32_t read) {
    while (now.r.tiles >= 0 && k >= now.r.tiles) {
      now = next, k = 0, at++;
      next = find(at + 1);
    }
    if (now.r.tiles < 0) return;
    const int slot = asked++ % RING;
    uint64_t *const full = &s.full[warp][slot];
    char *const to = s.ring[warp][slot] + after(read);
    if (lane == 0) bar_expect(full, S::SLOT);
    __syncwarp();
    if (lane / 2 == k) {
      const int x = lane % 2 * S::BOX;
      tma_load(to + x, &now.p->f.k, full, 0, now.row, 0, kv_head, now.page, l2::evict_first);
      tma_load(to + 2 * S::BOX + x, &now.p->f.v, full, 0, now.row, 0, kv_head, now.page,
               l2::evict_first);
    }
    __syncwarp();
    k++;
  }
};

/* ---- a warp's sums ---- */

template <class S> struct sums {
  using T = typename S::type;
  uint32_t q[S::D / 16][4];
  float o[S::D / 8][4], m[2], l[2]; /* m in powers of two */

  __device__ __forceinline__ void load_q(const rgk_tensor &from, const job &j, int lane) {
    const T *const x = (const T *)from.data + (int64_t)j.token * from.row +
                       (j.head + lane / 4) * from.head + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < S::D / 16; k++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        q[k][i] = *(const uint32_t *)(x + i % 2 * 8 * from.head + 16 * k + i / 2 * 8);
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < S::D / 2; i++) o[i / 4][i % 4] = 0;
    m[0] = m[1] = -INFINITY, l[0] = l[1] = 0;
  }

  /* Adds the tile at `at`, whose keys are rows `first` …, of which [lo, hi] are seen. aside(x): its
   * weights. What it has read is told in the end. */
  template <class F>
  __device__ __forceinline__ uint32_t add(uint32_t at, int first, int lo, int hi, float c, int lane,
                                          F aside) {
    const int t = lane % 4, row = lane % 8;
    float x[8] = {};
    const uint32_t k_at = at + lane / 16 * S::BOX + row * 128 + ((lane / 8 % 2) ^ row) * 16,
                   v_at = at + (2 + lane / 8 % 2) * S::BOX + row * 128 + ((lane / 16) ^ row) * 16;
#pragma unroll
    for (int k = 0; k < S::D / 16; k++) {
      uint32_t b[4];
      load_matrices((k_at ^ (k % 4 * 32)) + k / 4 * 1024, b);
      mma<T>(x, q[k], b);
      mma<T>(x + 4, q[k], b + 2);
    }
    const bool cut = first < lo || first + KEYS - 1 > hi;
    uint32_t seen[2] = {~0u, ~0u}; /* of words of two keys' values */
    if (cut) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int key = first + i / 4 * 8 + 2 * t + i % 2;
        if (key >= lo && key <= hi) continue;
        x[i] = -INFINITY;
        if (i % 4 < 2) seen[i / 4] &= i % 2 ? 0xffffu : 0xffff0000u;
      }
    }
    float scale[2];
    bool moves = false;
#pragma unroll
    for (int y = 0; y < 2; y++) {
      const float top =
          quad_max(fmaxf(fmaxf(x[2 * y], x[2 * y + 1]), fmaxf(x[4 + 2 * y], x[5 + 2 * y]))) * c;
      const bool move = top - m[y] > LAZY; /* −inf − −inf: no */
      scale[y] = move ? exp2_fast(m[y] - top) : 1;
      m[y] = move ? top : m[y];
      moves = moves || move;
      const float minus = m[y] == -INFINITY ? 0 : -m[y];
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float &e = x[i / 2 * 4 + 2 * y + i % 2];
        e = exp2_fast(fmaf(e, c, minus));
        sum += e;
      }
      l[y] = fmaf(l[y], scale[y], sum);
    }
    if (__any_sync(~0u, moves))
#pragma unroll
      for (int i = 0; i < S::D / 2; i++) o[i / 4][i % 4] *= scale[i / 2 % 2];
    aside(x);
    uint32_t p[4], read = 0;
    pack_a<T>(p, x);
#pragma unroll
    for (int n = 0; n < S::D / 16; n++) {
      uint32_t b[4];
      load_transposed((v_at ^ (n % 4 * 32)) + n / 4 * 1024, b);
      read ^= b[0] ^ b[1] ^ b[2] ^ b[3];
      if (cut) b[0] &= seen[0], b[1] &= seen[1], b[2] &= seen[0], b[3] &= seen[1];
      mma<T>(o[2 * n], p, b);
      mma<T>(o[2 * n + 1], p, b + 2);
    }
    return read ^ p[0] ^ p[1] ^ p[2] ^ p[3];
  }

  template <int PITCH>
  __device__ __forceinline__ void put(float (&to)[HEADS][PITCH], float (&to_m)[HEADS],
                                      float (&to_l)[HEADS], int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int y = 0; y < 2; y++) {
      const float sum = quad_sum(l[y]);
#pragma unroll
      for (int n = 0; n < S::D / 8; n++)
        *(float2 *)&to[g + 8 * y][8 * n + 2 * t] = make_float2(o[n][2 * y], o[n][2 * y + 1]);
      if (t == 0) to_m[g + 8 * y] = m[y], to_l[g + 8 * y] = sum;
    }
  }
};

/* Weights of a tile, block by block and head by head, beside what they are above: of blocks 0 and 2
 * with m, of 1 and 3 with the first key's, which ends the block before. */
template <class S>
__device__ __forceinline__ void put_record(uint4 *tile, const float (&x)[8], const float (&m)[2],
                                           int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int y = 0; y < 2; y++) {
    const float a = x[2 * y], b = x[2 * y + 1], c = x[4 + 2 * y], d = x[5 + 2 * y];
    float low = t % 2 ? 2 * (a + b) : fmaf(2, b, a), high = t % 2 ? 2 * (c + d) : fmaf(2, d, c);
    low += __shfl_xor_sync(~0u, low, 1);
    high += __shfl_xor_sync(~0u, high, 1);
    const float next = __shfl_xor_sync(~0u, t < 2 ? c : a, 2),
                far = __shfl_xor_sync(~0u, t < 2 ? a : c, 2);
    low += next;
    if (t % 2) continue;
    uint2 *const to = (uint2 *)(tile + g + 8 * y) + t / 2;
    *to = t == 0 ? make_uint2(pack2<__nv_bfloat16>(low, high + far), __float_as_uint(m[y]))
                 : make_uint2(pack2<__nv_bfloat16>(low, high), pack2<__nv_bfloat16>(far, 0));
  }
}

/* A chunk's eight sums as one. By all threads, when all have put theirs. */
template <class S> __device__ __forceinline__ void merge(const memory<S> &s, part<S> &to) {
  const int tid = threadIdx.x, head = tid / (S::D / 8), unit = tid % (S::D / 8);
  if (head >= HEADS) return;
  float most = -INFINITY, l = 0, o[8] = {};
#pragma unroll
  for (int w = 0; w < WARPS; w++) most = fmaxf(most, s.m[w][head]);
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const float f = most == -INFINITY ? 0 : exp2_fast(s.m[w][head] - most);
    const float4 *const from = (const float4 *)&s.o[w][head][8 * unit], a = from[0], b = from[1];
    const float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    l = fmaf(s.l[w][head], f, l);
#pragma unroll
    for (int i = 0; i < 8; i++) o[i] = fmaf(x[i], f, o[i]);
  }
  float4 *const at = (float4 *)&to.o[head][8 * unit];
  at[0] = make_float4(o[0], o[1], o[2], o[3]), at[1] = make_float4(o[4], o[5], o[6], o[7]);
  if (unit == 0) to.m[head] = most, to.l[head] = l;
}

/* ---- what is put aside, added up ---- */

constexpr int AT_ONCE = 4; /* of a lane's sums, asked for together */
__device__ __forceinline__ float sink_of(const rgk_flash_params &p, int head) {
  return p.sinks.data ? rgk::load(p.sinks.data, p.sinks.dtype, head * p.sinks.row) : -INFINITY;
}

/* lse of head threadIdx.x / 16 of n sums. By all threads, 16 lanes a head. */
template <class S>
__device__ __forceinline__ float find_lse(const part<S> *from, int n, float sink) {
  const int head = threadIdx.x / 16, at = threadIdx.x % 16;
  float m[AT_ONCE], of[AT_ONCE], l = 0;
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++) {
    m[i] = -INFINITY, of[i] = 0;
    if (at + 16 * i >= n) continue;
    m[i] = __ldcg(&from[at + 16 * i].m[head]), of[i] = __ldcg(&from[at + 16 * i].l[head]);
  }
  float most = fmaxf(fmaxf(m[0], m[1]), fmaxf(m[2], m[3]));
  for (int i = at + 16 * AT_ONCE; i < n; i += 16) most = fmaxf(most, __ldcg(&from[i].m[head]));
#pragma unroll
  for (int x = 8; x > 0; x /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, x));
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++)
    if (most > -INFINITY) l = fmaf(of[i], exp2_fast(m[i] - most), l);
  for (int i = at + 16 * AT_ONCE; i < n && most > -INFINITY; i += 16)
    l = fmaf(__ldcg(&from[i].l[head]), exp2_fast(__ldcg(&from[i].m[head]) - most), l);
#pragma unroll
  for (int x = 8; x > 0; x /= 2) l += __shfl_xor_sync(~0u, l, x);
  return finish_row(most, l, sink).lse;
}
/* Four of a head's values of all sums, rounded. */
template <class S>
__device__ __forceinline__ uint2 add_up(const part<S> *from, int n, const rgk_flash_params &p,
                                        int first_head, int piece) {
  using T = typename S::type;
  constexpr int ROUND = 16; /* sums asked for together */
  const int head = piece / (S::D / 4), unit = piece % (S::D / 4);
  float most = -INFINITY, l = 0, o[4] = {};
#pragma unroll 1
  for (int first = 0; first < n; first += ROUND) {
    float4 v[ROUND];
    float m[ROUND], of[ROUND], now = most;
#pragma unroll
    for (int i = 0; i < ROUND; i++) {
      m[i] = -INFINITY, of[i] = 0, v[i] = make_float4(0, 0, 0, 0);
      if (first + i >= n) continue;
      const part<S> &x = from[first + i];
      m[i] = __ldcg(&x.m[head]), of[i] = __ldcg(&x.l[head]);
      v[i] = __ldcg((const float4 *)&x.o[head][4 * unit]);
    }
#pragma unroll
    for (int i = 0; i < ROUND; i++) now = fmaxf(now, m[i]);
    const float f = most == -INFINITY ? 0 : exp2_fast(most - now);
    l *= f;
#pragma unroll
    for (int k = 0; k < 4; k++) o[k] *= f;
#pragma unroll
    for (int i = 0; i < ROUND; i++) {
      const float g = m[i] == -INFINITY ? 0 : exp2_fast(m[i] - now);
      l = fmaf(of[i], g, l);
      o[0] = fmaf(v[i].x, g, o[0]), o[1] = fmaf(v[i].y, g, o[1]);
      o[2] = fmaf(v[i].z, g, o[2]), o[3] = fmaf(v[i].w, g, o[3]);
    }
    most = now;
  }
  const float scale = finish_row(most, l, sink_of(p, first_head + head)).scale;
  return scale == 0 ? make_uint2(0, 0)
                    : make_uint2(pack2<T>(o[0] * scale, o[1] * scale),
                                 pack2<T>(o[2] * scale, o[3] * scale));
}

/* ---- the gated sum ---- */

template <class S>
__device__ __forceinline__ void put_sum(const rgk_decode_pair &d, const float4 &weights,
                                        const job &j, int piece, const void *own, uint2 compressed,
                                        uint2 window, uint2 selected) {
  using T = typename S::type;
  const int head = j.head + piece / (S::D / 4), at = piece % (S::D / 4) * 4;
  const float w[RGK_PAIR_BRANCHES] = {weights.x, weights.y, weights.z, weights.w};
  float sum[4] = {-0.0f, -0.0f, -0.0f, -0.0f}; /* as blend.cu */
#pragma unroll
  for (int k = 0; k < RGK_PAIR_BRANCHES; k++) {
    if (k >= d.n) continue;
    const rgk_pair_branch &b = d.branch[k];
    uint2 x = k == d.at_selected ? selected : k == d.at_window ? window : compressed;
    if (b.o && b.o != own)
      x = *(const uint2 *)((const T *)b.o + (int64_t)j.token * b.row + head * b.head + at);
    const float2 low = unpack2<T>(x.x), high = unpack2<T>(x.y);
    sum[0] = __fmaf_rn(w[k], low.x, sum[0]), sum[1] = __fmaf_rn(w[k], low.y, sum[1]);
    sum[2] = __fmaf_rn(w[k], high.x, sum[2]), sum[3] = __fmaf_rn(w[k], high.y, sum[3]);
  }
  const rgk_tensor &o = d.window.f.o;
  *(uint2 *)((T *)o.data + (int64_t)j.token * o.row + head * o.head + at) =
      make_uint2(pack2<T>(sum[0], sum[1]), pack2<T>(sum[2], sum[3]));
}

} // namespace split
} // namespace rgk
