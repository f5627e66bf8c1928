/* kernels/attn/select_bwd_sm90.cu: gradients of attention over selected blocks (see select.h).

     S^T [64 keys, ROWS] = K Q^T    p = exp2(S^T c - lse)      dV [64 keys, E] += p dO
     dP^T = V dO^T                  dS^T = p (dP^T - delta)    dK [64 keys, D] += dS^T Q
                                                               dQ [ROWS, D] = dS K

   A thread block stays and takes job after job. Its last warpgroup takes them, and brings an item's
   keys, then its rows tile by tile, a tile ahead; the others compute, or merge partials of dQ.

   dV and dK take p and dS^T from the registers they were formed in; dS^T also goes to shared
   memory, for dQ, which is formed and stored a few columns at a time while the next tile's S^T is
   under way. Two computing warpgroups, where the widths need them, compute the same S^T and dP^T
   and take half of the columns of dK, dV and dQ each. Two thread blocks on a multiprocessor fill
   each other's gaps.

     shared memory   K   V   Q twice   dO twice   dS^T   row tables twice   jobs twice   barriers
 */
#include "../device/tma.cuh"
#include "gradient.cuh"
#include "select.cuh"

using namespace rgk;

namespace {

constexpr int KEYS = RGK_SELECT_KEYS, MERGE = 4; /* rows of a job that merges */
enum named : int { COMPUTING = 1, LOADING };

/* Partials of dQ: see select.h. */
template <class T> struct partial { using type = T; };
template <> struct partial<__half> { using type = float; };

template <class T, int D, int E> struct shape {
  static constexpr int GROUPS = rgk_select_bwd_groups(D, E), ROWS = rgk_select_bwd_rows(D, E),
                       BLOCKS = rgk_select_bwd_blocks(D, E);
  static constexpr int COMPUTE = 128 * GROUPS, THREADS = COMPUTE + 128, DK = D / GROUPS,
                       EV = E / GROUPS;
  /* columns of dQ at a time */
  static constexpr int DQ = DK == 192 ? 32 : DK > 96 ? 64 : DK, PIECES = DK / DQ;
  static constexpr int REGS = BLOCKS == 1 ? 232 : 224, LOADING_REGS = BLOCKS == 1 ? 40 : 32;
};

/* ---- shared memory ---- */

enum job_kind : int { ITEM, MERGING, EXIT };
struct job {
  int kind, part;
  uint32_t *done; /* what to count when it is */
  /* ITEM */
  rgk_select_item item;
  select_keys keys;
  int kh, tiles;
  int64_t list; /* its first entry, across heads */
  int first;    /* the row at the position of its first key */
  /* of row 0 of the pack in the partial store, were the window's rows before it there too */
  int place;
  /* MERGING: rows, numbered across heads */
  int64_t from, upto;
};

/* Rows of a tile; those past the item's last repeat it, with limit 0. */
template <int rows> struct tile_rows {
  float2 stat[rows];         /* lse, delta */
  const char *from[rows][2]; /* q, d_o */
  int at[rows];              /* into the partial store, in rows of it; -1: none */
  int limit[rows];           /* keys of the item that the row sees */
};

/* Where a thread block stands among the segments: tickets [begin, begin + items + merging) are this
 * one's, and it merges the rows of windows [from, upto). */
struct order {
  int segment, from, upto, known; /* known: the items of windows before are done */
  uint32_t begin, items, merging;
};

template <class T, int D, int E> struct shared {
  using X = shape<T, D, E>;
  alignas(1024) char k[(D + 63) / 64][KEYS * 128];
  char v[(E + 63) / 64][KEYS * 128];
  char q[2][(D + 63) / 64 * X::ROWS * 128], d_o[2][(E + 63) / 64 * X::ROWS * 128];
  char ds[KEYS * 128];
  alignas(16) tile_rows<X::ROWS> rows[2];
  /* of each that loads: row of its entry of the next tile, and two places, of which one is its */
  uint32_t next[128][2];
  job jobs[2];
  order at;
  uint64_t job_full[2], job_empty[2], full[2], empty[2], keys_empty, ds_empty;
};
extern __shared__ __align__(1024) char raw[];

/* ---- jobs ---- */

/* Rows of the windows before window j of this launch. */
__device__ __forceinline__ int64_t rows_before(const rgk_select &p, int j) {
  const int64_t *bound = p.bound + p.window;
  const int z = j / p.windows;
  return z * (bound[p.windows] - bound[0]) + bound[j - z * p.windows] - bound[0];
}

__device__ __forceinline__ void enter(const rgk_select &p, order &x, int segment) {
  const int n = p.heads * p.windows;
  x.segment = segment;
  x.items = segment < n ? (uint32_t)(p.items[segment] * p.parts) : 0;
  x.merging = 0;
  if (!p.part) return;
  x.from = x.upto;
  if (segment == n) {
    x.upto = n;
  } else {
    const int64_t end = rows_before(p, segment + 1) - p.store / 2;
    while (x.upto < segment && rows_before(p, x.upto) < end) x.upto++;
  }
  x.merging = (uint32_t)((rows_before(p, x.upto) - rows_before(p, x.from) + MERGE - 1) / MERGE);
}

/* Takes the next job, of tiles of `rows` rows; waits for what it needs, which others began
 * before. */
template <int rows>
__device__ __forceinline__ void next_job(const rgk_select &p, order &x, job &j) {
  const uint32_t ticket = atomicAdd(p.begun, 1u);
  while (ticket - x.begin >= x.items + x.merging) {
    if (x.segment == p.heads * p.windows) {
      j.kind = EXIT;
      return;
    }
    await(p.merged + x.segment, x.merging);
    x.begin += x.items + x.merging;
    enter(p, x, x.segment + 1);
  }
  /* Merging starts when some of the segment's items are taken, since those of the window before are
   * still at work, and ends before the last are, since the next segment needs the room. */
  uint32_t i = ticket - x.begin, before = x.items / 8 * 3, merges = 0;
  const uint32_t among = x.items - before - x.items / 8 + x.merging;
  bool merging = false;
  if (i >= before + among) {
    merges = x.merging;
  } else if (i >= before) {
    merges = (uint32_t)((uint64_t)(i - before) * x.merging / among);
    merging = (uint32_t)((uint64_t)(i - before + 1) * x.merging / among) > merges;
  }
  if (merging) {
    for (; x.known < x.upto; x.known++)
      await(p.done + x.known, (uint32_t)(p.items[x.known] * p.parts));
    j.kind = MERGING;
    j.done = p.merged + x.segment;
    j.from = rows_before(p, x.from) + (int64_t)merges * MERGE;
    j.upto = min(j.from + MERGE, rows_before(p, x.upto));
  } else {
    i -= merges;
    j.kind = ITEM;
    j.done = p.done + x.segment;
    j.part = (int)i % p.parts;
    j.item = p.item[x.segment * p.cap + i / p.parts];
    j.keys = find_keys(p, j.item.slot, j.part);
    j.kh = p.head + x.segment / p.windows;
    j.tiles = j.keys.n > 0 ? (j.item.count * p.a.G + rows - 1) / rows : 0;
    j.list = j.kh * p.a.T * p.a.N + j.item.first;
    const int b = j.keys.b;
    j.first =
        (int)(j.keys.first +
              (b < p.a.seqs.n ? seq_start(p.a.seqs, b) - (p.a.offset ? p.a.offset[b] : 0) : 0));
    j.place =
        (int)(rows_before(p, x.segment) % p.store - p.bound[p.window + x.segment % p.windows]);
  }
}

/* ---- loading ---- */

/* Gathers rows that all exist, row r from row[r][which] on. A thread keeps its chunk of a row, so
 * that little is computed. */
template <int rows, int W, int first = 0>
__device__ __forceinline__ void gather_fast(uint32_t to, const char *const (*row)[2], int which,
                                            int t) {
  constexpr int PART = W >= 128 ? 128 : W >= 64 ? 64 : W, C = PART / 8, R = 128 / C, MOST = 4;
  static_assert(R % 8 == 0 && rows % R == 0);
  const int c = t % C, r = t / C;
  const uint32_t at = to + chunk_at<rows>(r, first / 8 + c);
#pragma unroll
  for (int i0 = 0; i0 < rows; i0 += MOST * R) {
    const char *from[MOST];
#pragma unroll
    for (int i = 0; i < MOST && i0 + i * R < rows; i++)
      from[i] = row[r + i0 + i * R][which] + (first / 8 + c) * 16;
#pragma unroll
    for (int i = 0; i < MOST && i0 + i * R < rows; i++) copy16(at + (i0 + i * R) * 128, from[i]);
  }
  if constexpr (W > PART) gather_fast<rows, W - PART, first + PART>(to, row, which, t);
}

template <class T, int D, int E>
__device__ __forceinline__ void load(const rgk_select &p, shared<T, D, E> &s, int t) {
  using X = shape<T, D, E>;
  constexpr int ROWS = X::ROWS;
  const int r = t % ROWS, half = t / ROWS; /* two threads make a row of the table */
  uint32_t tile = 0, items = 0;
  if (t == 0) {
    s.at.upto = s.at.known = 0;
    s.at.begin = 0;
    enter(p, s.at, 0);
  }
  for (uint32_t n = 0;; n++) {
    job &j = s.jobs[n & 1];
    if (t == 0) {
      bar_wait(&s.job_empty[n & 1], n >> 1 & 1 ^ 1);
      next_job<ROWS>(p, s.at, j);
      bar_ready(&s.job_full[n & 1]);
    }
    named_sync(LOADING, WARPGROUP);
    if (j.kind == EXIT) return;
    if (j.kind == MERGING || j.tiles == 0) continue;

    /* What an item's tiles share is read from the job again and again: registers are few, and the
     * cache behind spilled ones is slow. */
    int e = r / p.a.G, g = r - e * p.a.G; /* entry and head of the next tile */
    auto entry = [&] { return j.list + min(e, (int)j.item.count - 1); };
    auto fetch = [&] {
      const int64_t at = entry();
      copy4(smem_at(&s.next[t][0]), p.csr.rows + at);
      copy4(smem_at(&s.next[t][1]), p.csr.places + (at & ~INT64_C(1)));
    };
    if (half < 2) fetch();
    copies_commit();
    bar_wait(&s.keys_empty, items++ & 1 ^ 1);
    load_keys<D, 128>(smem_at(s.k), p.a.k, j.keys, j.kh, true, t);
    load_keys<E, 128>(smem_at(s.v), p.a.v, j.keys, j.kh, true, t);
    copies_commit();
    copies_wait<1>();
    for (int i = 0; i < j.tiles; i++, tile++) {
      const uint32_t stage = tile & 1, q = smem_at(s.q[stage]), d_o = smem_at(s.d_o[stage]);
      tile_rows<ROWS> &x = s.rows[stage];
      bar_wait(&s.empty[stage], tile >> 1 & 1 ^ 1);
      if (half < 2) {
        const rgk_tensor &from = half ? p.a.d_o : p.a.q;
        const int row = *(volatile int *)&s.next[t][0];
        const int head = j.kh * p.a.G + g;
        x.from[r][half] = (const char *)from.data + (row * from.row + head * from.head) * sizeof(T);
        const bool real = e < j.item.count;
        if (half == 0) {
          x.limit[r] = real ? max(0, min(row - j.first + 1, j.keys.n)) : 0;
          copy8(smem_at(&x.stat[r]), p.stat + 2 * ((int64_t)row * p.a.H + head));
        } else {
          const int in = j.place + row, at = in < (int)p.store ? in : in - (int)p.store;
          const uint32_t place = *(volatile uint32_t *)&s.next[t][1] >> (entry() & 1) * 16 & 0xffff;
          x.at[r] =
              real && p.part ? ((at * p.a.N + (int)place) * p.parts + j.part) * p.a.G + g : -1;
        }
        e += p.along;
        g += p.across;
        if (g >= p.a.G) g -= p.a.G, e++;
        fetch();
      }
      named_sync(LOADING, WARPGROUP);
      gather_fast<ROWS, D>(q, x.from, 0, t);
      gather_fast<ROWS, E>(d_o, x.from, 1, t);
      copies_commit();
      copies_wait<0>();
      proxy_fence();
      warp_ready(&s.full[stage]);
    }
  }
}

/* ---- the ends of dQ, dK and dV ---- */

/* A sum is KEYS rows of all columns, in the order of the accumulators: where this thread's, of
 * columns from `first` on, begin; what is there, added to them; and what the next finds there.
 * Nobody else has it meanwhile. */
__device__ __forceinline__ float4 *sum_at(float *sum, int first) {
  return (float4 *)sum + KEYS / 4 * first + threadIdx.x % 128;
}
template <int W> __device__ __forceinline__ void add_sum(float (&x)[W / 2], const float4 *from) {
#pragma unroll
  for (int i = 0; i < W / 8; i++) {
    const float4 v = __ldcg(from + 128 * i);
    x[4 * i] += v.x, x[4 * i + 1] += v.y, x[4 * i + 2] += v.z, x[4 * i + 3] += v.w;
  }
}
template <int W>
__device__ __forceinline__ void put_sum(const float (&x)[W / 2], float4 *to, bool add) {
#pragma unroll
  for (int i = 0; i < W / 8; i++) {
    if (add)
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + 128 * i),
                   "f"(x[4 * i]), "f"(x[4 * i + 1]), "f"(x[4 * i + 2]), "f"(x[4 * i + 3])
                   : "memory");
    else
      __stcg(to + 128 * i, make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]));
  }
}

/* This thread's rows of dQ, columns [first, first + N), to the partial store; `eights`: groups are
 * whole eights of heads, and what a warp writes of eight rows is one piece of memory. */
template <class T, int N>
__device__ __forceinline__ void put_queries(void *part, const int (&row)[2], int width, int first,
                                            bool eights, const float (&dq)[N / 2]) {
  using P = typename partial<T>::type;
  enum { PAIRS = 8 / sizeof(P) };
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (row[i] < 0) continue;
    const int lane = threadIdx.x % 32, step = eights ? 32 : 4;
    uint4 *const to = (uint4 *)((P *)part + (int64_t)(eights ? row[i] - lane / 4 : row[i]) * width +
                                (eights ? 8 * first : first)) +
                      lane % step;
#pragma unroll
    for (int j = 0; j < N / (8 * PAIRS); j++) {
      float x[2 * PAIRS];
#pragma unroll
      for (int k = 0; k < 2 * PAIRS; k++) x[k] = dq[4 * (PAIRS * j + k / 2) + 2 * i + k % 2];
      uint4 v;
      if constexpr (sizeof(P) == 4)
        v = make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                       __float_as_uint(x[3]));
      else
        v = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                       pack2<T>(x[6], x[7]));
      __stcs(to + step * j, v);
    }
  }
}

/* ---- an item ---- */

/* S^T of a tile becomes p; keys past a row's limit, where there are any, have 0. A thread's
 * columns, which are rows of the tile, are 8j + 2(lane % 4) and + 1; its keys are `key` and key +
 * 8. */
template <int ROWS>
__device__ __forceinline__ void probabilities(float (&s)[ROWS / 2], const tile_rows<ROWS> &x,
                                              int key, float c, bool masked) {
  const int2 *limit = (const int2 *)x.limit + threadIdx.x % 4;
  const float4 *stat = (const float4 *)x.stat + threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < ROWS / 8; j++) {
    const float4 y = stat[4 * j];
    s[4 * j] = exp2_fast(fmaf(s[4 * j], c, -y.x));
    s[4 * j + 1] = exp2_fast(fmaf(s[4 * j + 1], c, -y.z));
    s[4 * j + 2] = exp2_fast(fmaf(s[4 * j + 2], c, -y.x));
    s[4 * j + 3] = exp2_fast(fmaf(s[4 * j + 3], c, -y.z));
  }
  if (!masked) return;
#pragma unroll
  for (int j = 0; j < ROWS / 8; j++) {
    const int2 n = limit[4 * j];
    if (key >= n.x) s[4 * j] = 0;
    if (key >= n.y) s[4 * j + 1] = 0;
    if (key + 8 >= n.x) s[4 * j + 2] = 0;
    if (key + 8 >= n.y) s[4 * j + 3] = 0;
  }
}

/* dS^T in pairs, of p in pairs and dP^T. Past a row's limit it is not 0 times what there is: the
 * row's own keys may be anything there. */
template <class T, int ROWS>
__device__ __forceinline__ void differences(uint32_t (&ds)[ROWS / 4], const uint32_t (&p)[ROWS / 4],
                                            const float (&dp)[ROWS / 2], const tile_rows<ROWS> &x,
                                            int key, bool masked) {
  const int2 *limit = (const int2 *)x.limit + threadIdx.x % 4;
  const float4 *stat = (const float4 *)x.stat + threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < ROWS / 8; j++) {
    const float4 y = stat[4 * j];
    const float2 p0 = unpack2<T>(p[2 * j]), p1 = unpack2<T>(p[2 * j + 1]);
    ds[2 * j] = pack2<T>(p0.x * (dp[4 * j] - y.y), p0.y * (dp[4 * j + 1] - y.w));
    ds[2 * j + 1] = pack2<T>(p1.x * (dp[4 * j + 2] - y.y), p1.y * (dp[4 * j + 3] - y.w));
  }
  if (!masked) return;
#pragma unroll
  for (int j = 0; j < ROWS / 8; j++) {
    const int2 n = limit[4 * j];
    if (key >= n.x) ds[2 * j] &= 0xffff0000u;
    if (key >= n.y) ds[2 * j] &= 0xffffu;
    if (key + 8 >= n.x) ds[2 * j + 1] &= 0xffff0000u;
    if (key + 8 >= n.y) ds[2 * j + 1] &= 0xffffu;
  }
}

/* The tiles of an item, from `tile` of the thread block on: this warpgroup's columns of dk
 * and dv. */
template <class T, int D, int E>
__device__ __forceinline__ void gradients(const rgk_select &p, shared<T, D, E> &sh, int rows,
                                          uint32_t &tile,
                                          float (&dk)[D / shape<T, D, E>::GROUPS / 2],
                                          float (&dv)[E / shape<T, D, E>::GROUPS / 2]) {
  using X = shape<T, D, E>;
  constexpr int ROWS = X::ROWS, DK = X::DK, EV = X::EV, DQ = X::DQ, PIECES = X::PIECES;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int key = warp * 16 + lane / 4;
  const uint32_t at_k = smem_at(sh.k), at_v = smem_at(sh.v), at_ds = smem_at(sh.ds);
  const float c = p.a.scale * LOG2E;
  float s[ROWS / 2];
  auto scores = [&] {
    wgmma_fence();
    product_rows<T, ROWS, D>(s, at_k, smem_at(sh.q[tile & 1]));
    wgmma_commit();
  };
  bar_wait(&sh.full[tile & 1], tile >> 1 & 1);
  scores();
  waited all = wgmma_wait<0>();
  wgmma_keep(s);
  for (int left = rows; left > 0; left -= ROWS) {
    const uint32_t stage = tile & 1, q = smem_at(sh.q[stage]), d_o = smem_at(sh.d_o[stage]);
    const tile_rows<ROWS> &x = sh.rows[stage];
    const bool masked = left < ROWS || x.limit[0] < KEYS;
    float dp[ROWS / 2];
    wgmma_fence();
    product_rows<T, ROWS, E>(dp, at_v, d_o);
    wgmma_commit();

    uint32_t a[ROWS / 4];
    probabilities<ROWS>(s, x, key, c, masked);
    pack_all<T>(a, s);
    wgmma_keep(a);
    wgmma_fence();
    product_columns<T, EV, ROWS>(dv, a, d_o + group * (EV / 64) * (ROWS * 128), true);
    wgmma_commit();

    wgmma_wait<1>();
    wgmma_keep(dp);
    uint32_t b[ROWS / 4];
    differences<T, ROWS>(b, a, dp, x, key, masked);
    wgmma_keep(b);
    bar_wait(&sh.ds_empty, tile & 1 ^ 1);
    /* Four matrices of 8 x 8: keys, keys + 8, then the next 8 rows; a lane points at one row of one
     * of them. */
    const int line = warp * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < ROWS / 8; j += 2)
      if (group == j / 2 % X::GROUPS)
        store_matrices(at_ds + line * 128 + (((j + lane / 16) ^ (line & 7)) << 4), b + 2 * j);
    proxy_fence();
    wgmma_fence();
    product_columns<T, DK, ROWS>(dk, b, q + group * (DK / 64) * (ROWS * 128), true);
    wgmma_commit();
    const int row[2] = {key < ROWS ? x.at[key] : -1, key < ROWS ? x.at[key + 8] : -1};
    named_sync(COMPUTING, X::COMPUTE);

    const uint64_t ds = desc_mn(at_ds, 8192);
    float dq[DQ / 2];
    auto queries = [&](int i) {
      const uint64_t k =
          desc_mn(at_k + (group * DK + i * DQ) / 64 * 8192 + (group * DK + i * DQ) % 64 * 2, 8192);
      wgmma_fence();
#pragma unroll
      for (int y = 0; y < 4; y++)
        wgmma<T, DQ>::template ss<true, true>(dq, desc_on(ds, 2048 * y), desc_on(k, 2048 * y),
                                              y > 0);
      wgmma_commit();
    };
    queries(0);
    const waited done = wgmma_wait<1>();
    wgmma_keep(dv);
    wgmma_keep(dk);
    wgmma_keep(a);
    wgmma_keep(b);
    /* All else that was read of the row table went into a and b, which these products took. */
    warp_release(&sh.empty[stage], done, row[0], row[1]);
    tile++;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      if (i > 0) queries(i);
      if (i + 1 < PIECES) {
        wgmma_wait<0>();
      } else {
        if (left > ROWS) bar_wait(&sh.full[tile & 1], tile >> 1 & 1);
        scores(); /* after the last tile: of whatever is there, for nothing */
        warp_release(&sh.ds_empty, wgmma_wait<1>());
      }
      wgmma_keep(dq);
      put_queries<T, DQ>(p.part, row, D, group * DK + i * DQ, p.a.G % 8 == 0, dq);
    }
    all = wgmma_wait<0>();
    wgmma_keep(s);
  }
  warp_release(&sh.keys_empty, all);
}

/* dk and dv in their turn, to the block's sums or, from the last item, to d.k and d.v. */
template <class T, int D, int E>
__device__ __forceinline__ void put_gradients(const rgk_select &p, const job &j,
                                              float (&dk)[D / shape<T, D, E>::GROUPS / 2],
                                              float (&dv)[E / shape<T, D, E>::GROUPS / 2]) {
  using X = shape<T, D, E>;
  constexpr int DK = X::DK, EV = X::EV;
  const int group = threadIdx.x / 128, first = j.item.is & RGK_SELECT_FIRST;
  const int64_t which = (int64_t)j.item.slot * p.parts + j.part;
  float4 *sum_k = sum_at(p.sum_k + which * KEYS * D, group * DK),
         *sum_v = sum_at(p.sum_v + which * KEYS * E, group * EV);
  if (j.item.before > 0) {
    if (threadIdx.x == 0) await(p.turn + which, (uint32_t)j.item.before);
    named_sync(COMPUTING, X::COMPUTE);
  }
  if (j.item.is & RGK_SELECT_LAST) {
    if (!first) {
      add_sum<DK>(dk, sum_k);
      add_sum<EV>(dv, sum_v);
    }
    const int key = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    if (p.a.dk.data)
      put_keys<false>(p.a.dk, p.a.acc_k, j.keys.row, j.kh, key, j.keys.n, group * DK, D, dk,
                      p.a.scale);
    if (p.a.dv.data)
      put_keys<false>(p.a.dv, p.a.acc_v, j.keys.row, j.kh, key, j.keys.n, group * EV, E, dv, 1);
  } else {
    put_sum<DK>(dk, sum_k, !first);
    put_sum<EV>(dv, sum_v, !first);
  }
}

/* ---- merging ---- */

/* Places [first, first + 32) of a row's part of the partial store that count, as bits: an entry
 * larger than all before it, and a part with a key that the row sees. Lanes have a place each.
 * before: the largest entry so far; counts: the entry of this lane's place does. */
__device__ __forceinline__ uint32_t places_that_count(const rgk_select &p, const merged_row &x,
                                                      int first, int &before, bool &counts) {
  const int lane = threadIdx.x % 32, at = first + lane, e = p.parts == 1 ? at : at / p.parts;
  const int v = x.keys > 0 && e < p.a.N ? x.idx[e] : -1, part = at - e * p.parts;
  int most = v; /* of the entries up to this lane's */
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int y = __shfl_up_sync(~0u, most, d);
    if (lane >= d) most = max(most, y);
  }
  /* The lane before the entry's first part has what came before the entry. */
  const int y = __shfl_sync(~0u, most, max(lane - part - 1, 0)),
            earlier = lane > part ? max(y, before) : before;
  /* of an entry that began in the 32 places before */
  const bool split = __shfl_sync(~0u, counts, 31);
  counts = lane < part ? split : v > earlier;
  const uint32_t bits = __ballot_sync(~0u, counts && (int64_t)v * p.a.block + part * KEYS < x.keys);
  before = max(before, __shfl_sync(~0u, most, 31));
  return bits;
}

/* 16 bytes that another block wrote and nobody needs again, or zeros. */
__device__ __forceinline__ uint4 load16_if(const uint4 *from, bool real) {
  uint4 v;
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
               "mov.u32 %0, 0;\n\tmov.u32 %1, 0;\n\tmov.u32 %2, 0;\n\tmov.u32 %3, 0;\n\t"
               "@p ld.relaxed.gpu.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %6;\n\t}"
               : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
               : "l"(from), "r"((uint32_t)real), "l"((uint64_t)l2::evict_first)
               : "memory");
  return v;
}

/* A warp has a row. A lane sums 16 bytes of a place, of a few heads at once, over 16 places at a
 * time: as much under way as registers hold. What does not count adds 0, which changes no bit. */
template <class T, int D, int E>
__device__ __forceinline__ void merge(const rgk_select &p, const job &j) {
  using P = typename partial<T>::type;
  enum { U = 16 / sizeof(P), PIECES = D / U, PLACES = 16, UNITS = 2 };
  const int64_t rows = p.bound[p.window + p.windows] - p.bound[p.window];
  const int lane = threadIdx.x % 32, units = p.a.G * PIECES, places = p.a.N * p.parts;
  for (int64_t r = j.from + threadIdx.x / 32; r < j.upto; r += shape<T, D, E>::COMPUTE / 32) {
    const int kh = p.head + (int)(r / rows);
    const int64_t row = p.bound[p.window] + r % rows;
    const merged_row x = find_merged(p, row, kh);
    const uint4 *part = (const uint4 *)p.part + r % p.store * places * units + lane;
    int before = -1;
    bool counts = false;
    uint32_t bits = places_that_count(p, x, 0, before, counts);
    for (int i = 0; i < units; i += 32 * UNITS) {
      float y[UNITS][U] = {};
      for (int first = 0; first < places; first += PLACES) {
        if (places > 32 && first % 32 == 0) {
          if (first == 0) before = -1;
          bits = places_that_count(p, x, first, before, counts);
        }
        const uint32_t these = bits >> first % 32;
        uint4 v[PLACES][UNITS];
#pragma unroll
        for (int k = 0; k < PLACES; k++) {
          const uint4 *from = part + (int64_t)(first + k) * units + i;
#pragma unroll
          for (int u = 0; u < UNITS; u++)
            v[k][u] = load16_if(from + 32 * u, (these >> k & 1) && i + 32 * u + lane < units);
        }
#pragma unroll
        for (int k = 0; k < PLACES; k++)
#pragma unroll
          for (int u = 0; u < UNITS; u++) {
            const P *t = (const P *)&v[k][u];
#pragma unroll
            for (int l = 0; l < U; l++) y[u][l] += to_float(t[l]);
          }
      }
#pragma unroll
      for (int u = 0; u < UNITS; u++) {
        const int unit = i + 32 * u + lane, eight = unit / (8 * PIECES), in = unit % (8 * PIECES);
        if (unit >= units) continue;
        const bool eights = p.a.G % 8 == 0;
        const int g = eights ? 8 * eight + lane / 4 : unit / PIECES,
                  block = eights ? in / 32 : unit % PIECES / 4;
        const int64_t to =
            row * p.a.dq.row + (kh * p.a.G + g) * p.a.dq.head + block * 4 * U + lane % 4 * 2;
#pragma unroll
        for (int l = 0; l < U; l += 2)
          put_pair(p.a.dq, p.a.acc_q, to + l / 2 * 8, y[u][l] * p.a.scale, y[u][l + 1] * p.a.scale);
      }
    }
  }
}

/* ---- the kernel ---- */

/* The compiler does not know of what is read from shared memory that a warp's threads read the
 * same, and keeps wgmma from overlapping behind branches that may part them. */
__device__ __forceinline__ int uniform(int x) {
  return __shfl_sync(~0u, x, 0);
}

template <class T, int D, int E>
__device__ __forceinline__ void compute(const rgk_select &p, shared<T, D, E> &s) {
  using X = shape<T, D, E>;
  uint32_t tile = 0;
  for (uint32_t n = 0;; n++) {
    const job &j = s.jobs[n & 1];
    bar_wait(&s.job_full[n & 1], n >> 1 & 1);
    const int kind = uniform(j.kind), rows = uniform(j.keys.n > 0 ? j.item.count * p.a.G : -1);
    if (kind == EXIT) return;
    if (kind == MERGING) {
      merge<T, D, E>(p, j);
    } else if (rows >= 0) {
      float dk[X::DK / 2] = {}, dv[X::EV / 2] = {};
      if (rows > 0) gradients<T, D, E>(p, s, rows, tile, dk, dv);
      if (p.sum_k) put_gradients<T, D, E>(p, j, dk, dv);
    }
    uint32_t *const turn = p.turn + (int64_t)j.item.slot * p.parts + j.part, *const done = j.done;
    const uint32_t upto = j.kind == ITEM && p.sum_k ? (uint32_t)(j.item.before + j.item.count) : 0;
    __threadfence();
    named_sync(COMPUTING, X::COMPUTE);
    if (threadIdx.x == 0) {
      if (upto > 0) publish(turn, upto);
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(done) : "memory");
      bar_release(&s.job_empty[n & 1], upto);
    }
  }
}

template <class T, int D, int E>
__global__ void __launch_bounds__(shape<T, D, E>::THREADS, shape<T, D, E>::BLOCKS)
    gradient(const __grid_constant__ rgk_select p) {
  using X = shape<T, D, E>;
  shared<T, D, E> &s = *(shared<T, D, E> *)raw;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      bar_init(&s.job_full[i], 1);
      bar_init(&s.job_empty[i], 1);
      bar_init(&s.full[i], 4 * WARP_ARRIVALS);
      bar_init(&s.empty[i], 4 * X::GROUPS * WARP_ARRIVALS);
    }
    bar_init(&s.keys_empty, 4 * X::GROUPS * WARP_ARRIVALS);
    bar_init(&s.ds_empty, 4 * X::GROUPS * WARP_ARRIVALS);
    bar_init_done();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == X::GROUPS) {
    fewer_registers<X::LOADING_REGS>();
    load<T, D, E>(p, s, threadIdx.x - X::COMPUTE);
  } else {
    more_registers<X::REGS>();
    compute<T, D, E>(p, s);
  }
}

template <class T, int D, int E> const void *instance() {
  static_assert(sizeof(shared<T, D, E>) <= rgk_select_shared_bwd(D, E), "as the host counts");
  static_assert(shape<T, D, E>::THREADS == rgk_select_bwd_threads(D, E), "as the host counts");
  return (const void *)gradient<T, D, E>;
}

} // namespace

#define INSTANCE(dtype, d, e) \
  if (t == dtype && D == d && E == e) return instance<element<dtype>::type, d, e>();

const void *rgk_select_bwd(rg_dtype t, int32_t D, int32_t E) {
  RGK_SELECT_INSTANCES(INSTANCE)
  return nullptr;
}
