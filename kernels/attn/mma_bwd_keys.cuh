/* kernels/attn/mma_bwd_keys.cuh: dK and dV on the tensor cores of any GPU since Ampere.

     S^T = K Q^T    P = exp(scale S - lse)    dV = P^T dO
     dP^T = V dO^T  dS = P (dP - delta)       dK = scale dS^T Q

   A block has a tile of 64 or 128 keys (key_tiles.cuh) and walks the rows (query, head) that see
   it, a batch at a time. Half of its warps have the first line, half the second, so that a warp's
   sums are one gradient's and leave registers for 32 keys, where widths are up to 128: what it
   reads of Q and dO serves two products each. Scores are formed transposed: P^T and dS^T lie in the
   registers from which the second product of a line takes them. P crosses over in shared memory, as
   it lies there, from a warp to the one that has the same keys. That one is a batch behind, so that
   all warps meet once a batch:

       for dV   │ S^T, exp, dV of i          │ S^T, exp, dV of i + 1 │
       for dK   │ dP^T, dS, dK of i - 1      │ dP^T, dS, dK of i     │

   The batches before, at work and on their way have a stage each. Warps hold a part of their keys'
   rows of K or V in registers, as many as do not spill, and the third stage comes where columns of
   these lay: so two blocks of 64 keys have room in 163 KB. With 128 rows are read half as often.

   Wider ones (rgk_mma_bwd_near) have two stages. Who takes P is half a batch behind, and all meet
   twice a batch, each with a product of its own between:

       for dV   │ S^T of i        │ exp, dV of i   │ S^T of i + 1 │
       for dK   │ dS, dK of i - 1 │ dP^T of i      │ dS, dK of i  │

   Each half of the warps has a loop of its own, since branches cost more than their instructions.

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

/* Rows of a batch, looked up before it is copied. */
template <int N> struct batch {
  /* where they begin in Q and in dO, in 16 bytes; NOWHERE: zeros stand for the row, if there is
   * one */
  uint2 at[N];
  float lse[N]; /* in powers of two and negative: scores have it added */
  float delta[N];
  uint32_t seen[N]; /* the first of the tile's keys that it sees, the end of them times 2^16 */
};
constexpr uint32_t NOWHERE = ~0u;
__device__ __forceinline__ int first_of(uint32_t seen) {
  return (int)(seen & 0xffff);
}
__device__ __forceinline__ int end_of(uint32_t seen) {
  return (int)(seen >> 16);
}

/* Of key_tile and of the call, for those who look up rows: registers are for others. */
struct alignas(16) looked_up {
  const int32_t *list; /* or rows from `begin` on */
  const float *lse, *delta;
  int begin, queries, first, keys, n, head, origin;
  int skip_query, skip_head; /* from a thread's row to its next, all heads of a query in turn */
  int heads;                 /* of the KV head */
  uint32_t q_row, q_head, d_o_row, d_o_head; /* in 16 bytes */
  uint32_t lse_row, lse_head, delta_row;
  int window; /* keys before its own that a query sees; -1: all, and no head apart */
  int kernel; /* CMP, else 0 */
  rgk_divisor by_stride;
  __device__ __forceinline__ bool by_head() const { return window >= 0; }
};

/* The same row of the next call is STRIDE rows further. */
template <int STRIDE>
__device__ __forceinline__ looked_up look_at(const rgk_attn_plain &p, const key_tile &t) {
  const rgk_attn &a = p.a;
  looked_up x;
  x.list = t.list, x.lse = (const float *)a.lse.data, x.delta = p.delta;
  x.begin = (int)t.row, x.queries = (int)t.queries;
  x.first = (int)t.first, x.keys = (int)t.keys, x.n = t.n;
  x.head = t.kh * a.G, x.origin = (int)t.origin, x.heads = a.G;
  x.window = a.mode == RGK_SWA ? (int)min(a.window_left, (int64_t)0x7fffffff) : -1;
  x.skip_query = x.by_head() ? STRIDE : STRIDE / a.G, x.skip_head = STRIDE % a.G;
  x.q_row = (uint32_t)(a.q.row >> 3), x.q_head = (uint32_t)(a.q.head >> 3);
  x.d_o_row = (uint32_t)(a.d_o.row >> 3), x.d_o_head = (uint32_t)(a.d_o.head >> 3);
  x.lse_row = (uint32_t)a.lse.row, x.lse_head = (uint32_t)a.lse.head;
  x.delta_row = (uint32_t)a.H;
  x.kernel = a.mode == RGK_CMP ? a.kernel : 0;
  x.by_stride = rgk_divide_by(a.mode == RGK_CMP ? a.stride : 1);
  return x;
}

/* In powers of two and negative; of a row that saw nothing such that its P is 0. */
__device__ __forceinline__ float less(float lse) {
  return lse == -INFINITY ? -INFINITY : -(lse * LOG2E);
}

/* Looks up the rows of every LOOKS-th batch: lane i of a warp row i. A row's number, from a list,
 * and its lse are asked for a call ahead each; delta is a copy under way. */
struct lookup {
  int row, of;     /* of the next call, -1: none */
  int query, head; /* of the one after */
  int later;       /* its row, or where it is */
  const int32_t *later_at;
  float lse; /* of the next call's row, or where it is */
  const float *lse_at;

  __device__ __forceinline__ void ask(const looked_up &t) {
    if (t.by_head())
      for (; query >= t.queries && head < t.heads; head++) query -= t.queries;
    later = -1, later_at = nullptr;
    if (query < t.queries && head < t.heads) {
      const int at = t.by_head() ? query : t.queries - 1 - query;
      later = t.begin + at;
      if (t.list) later_at = t.list + at;
    }
  }
  __device__ __forceinline__ void begin(const looked_up &t, int i) {
    query = t.by_head() ? i : i / t.heads;
    head = t.by_head() ? 0 : i % t.heads;
    lse_at = nullptr;
    ask(t);
    fetch();
    advance(t);
  }
  __device__ __forceinline__ void advance(const looked_up &t) {
    row = later, of = t.head + head, lse = 0, lse_at = nullptr;
    if (row >= 0) lse_at = t.lse + ((uint32_t)row * t.lse_row + (uint32_t)of * t.lse_head);
    query += t.skip_query;
    if (!t.by_head()) {
      head += t.skip_head;
      if (head >= t.heads) head -= t.heads, query++;
    }
    ask(t);
  }
  /* What was asked for, into registers. */
  __device__ __forceinline__ void fetch() {
    if (later_at) later = *later_at;
    if (lse_at) lse = *lse_at;
  }
  /* All lanes of the warp. */
  template <int BATCH, int GROUPS, int OWN>
  __device__ __forceinline__ void next(const looked_up &t, batch<BATCH> &x, uint32_t &todo) {
    const int i = threadIdx.x % 32, pos = row - t.origin;
    /* as visible() and columns() have it, in 32 bits */
    int hi = pos + 1, lo = 0;
    if (t.kernel) hi = hi < t.kernel ? 0 : rgk_over(hi - t.kernel, t.by_stride) + 1;
    if (t.by_head()) lo = max(pos - t.window - t.first, 0);
    hi = max(min(min(hi, t.keys) - t.first, t.n), 0), lo = min(lo, t.n);
    if (row < 0) hi = lo = 0;
    if (i < BATCH) {
      x.seen[i] = (uint32_t)lo | (uint32_t)hi << 16;
      x.at[i] = lo < hi ? make_uint2((uint32_t)row * t.q_row + (uint32_t)of * t.q_head,
                                     (uint32_t)row * t.d_o_row + (uint32_t)of * t.d_o_head)
                        : make_uint2(NOWHERE, NOWHERE);
      x.lse[i] = less(lse);
      if (row >= 0)
        copy4(smem_at(&x.delta[i]), t.delta + ((uint32_t)row * t.delta_row + (uint32_t)of));
      else
        x.delta[i] = 0;
    }
    if (BATCH < 32) lo = __shfl_sync(~0u, lo, i % BATCH), hi = __shfl_sync(~0u, hi, i % BATCH);
    uint32_t some = __any_sync(~0u, lo < hi);
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
      some |= (uint32_t)__any_sync(~0u, lo > g * OWN || hi < min((g + 1) * OWN, t.n)) << (1 + g);
    if (i == 0) todo = some;
    advance(t);
  }
};

/* The tile, and lookups under way: kept by those who look up where there is one warp of them, for
 * want of room. */
template <int LOOKS> struct looks_memory {
  looked_up tile;
  uint2 way[3][LOOKS][32];
  __device__ __forceinline__ void get(lookup &x) const {
    uint2 y[3];
#pragma unroll
    for (int i = 0; i < 3; i++) y[i] = way[i][threadIdx.x / 32][threadIdx.x % 32];
    x.row = (int)y[0].x, x.of = (int)y[0].y, x.lse = __uint_as_float(y[1].x);
    x.later = (int)y[1].y, x.query = (int)y[2].x, x.head = (int)y[2].y;
  }
  /* What was asked for is a copy under way. */
  __device__ __forceinline__ void put(const lookup &x) {
    const int w = threadIdx.x / 32, i = threadIdx.x % 32;
    way[0][w][i] = make_uint2((uint32_t)x.row, (uint32_t)x.of);
    way[2][w][i] = make_uint2((uint32_t)x.query, (uint32_t)x.head);
    uint2 &y = way[1][w][i];
    if (x.lse_at)
      copy4(smem_at(&y.x), x.lse_at);
    else
      y.x = __float_as_uint(x.lse);
    if (x.later_at)
      copy4(smem_at(&y.y), x.later_at);
    else
      y.y = (uint32_t)x.later;
  }
};
template <> struct looks_memory<1> {};

/* Of key_tile, for the end. */
struct whose {
  int64_t key, part;
  int kh, n;
};

/* Stages of Q, and the first NEAR columns of K, where the third stage comes; or of dO, and V's. */
template <int W, int KEYS, int BATCH, int NEAR> struct stages {
  char two[2][BATCH * W * 2];
  char near[KEYS * NEAR * 2];
  static_assert(sizeof near >= BATCH * W * 2, "a stage has room there");
};
template <int W, int KEYS, int BATCH> struct stages<W, KEYS, BATCH, 0> {
  char two[2][BATCH * W * 2];
};

template <int W, int E, bool SMALL, int KEYS> struct memory {
  static constexpr int BATCH = rgk_mma_bwd_batch(W, SMALL),
                       LOOKS = rgk_mma_bwd_looks(W, SMALL, KEYS),
                       KNOWN = rgk_mma_bwd_known(W, SMALL, KEYS), NEAR = rgk_mma_bwd_near(W),
                       THREADS = (int)rgk_mma_bwd_keys_threads(W, KEYS), GROUPS = THREADS / 64,
                       OWN = KEYS / GROUPS, M = OWN / 16, /* of 16 keys, of a warp */
      STEPS = BATCH / 16;
  /* the other columns */
  char k[KEYS * (W - NEAR) * 2], v[KEYS * (E - NEAR) * 2];
  stages<W, KEYS, BATCH, NEAR> q;
  stages<E, KEYS, BATCH, NEAR> d_o;
  uint4 p[W <= 128 ? 2 : 1][GROUPS][M][STEPS][32]; /* as the lanes hold it */
  looks_memory<LOOKS> looks;
  whose sums;
  batch<BATCH> rows[KNOWN]; /* batch i in place i % KNOWN */
  /* of each, bit 0: a row sees some keys; 1 + g: one does not see all of group g's */
  uint32_t todo[KNOWN];
  __device__ __forceinline__ uint32_t q_at(int stage) const {
    return smem_at(q.two) + stage * BATCH * pitch(W);
  }
  __device__ __forceinline__ uint32_t d_o_at(int stage) const {
    return smem_at(d_o.two) + stage * BATCH * pitch(E);
  }
};

/* A batch's rows of Q and of dO, as copy_rows does. Few instructions stand between a meeting and
 * the products behind it: all is looked up before. */
template <int W, int E, int BATCH, int THREADS> struct batch_copies {
  static constexpr int CHUNKS = W % 64 ? 4 : 8, STEP = THREADS / CHUNKS,
                       N = (BATCH + STEP - 1) / STEP;
  static_assert(STEP % 8 == 0 && (E % 64 == 0) == (W % 64 == 0), "a thread's rows turn alike");
  bool in_q[W / 8 / CHUNKS], in_o[E / 8 / CHUNKS]; /* rows have this thread's chunks */
  uint2 at[N];
  __device__ __forceinline__ batch_copies(const rgk_attn &a) {
    const int c = (int)(threadIdx.x % CHUNKS);
#pragma unroll
    for (int g = 0; g < W / 8 / CHUNKS; g++) in_q[g] = (g * CHUNKS + c) * 8 < a.D;
#pragma unroll
    for (int g = 0; g < E / 8 / CHUNKS; g++) in_o[g] = (g * CHUNKS + c) * 8 < a.E;
  }
  static __device__ __forceinline__ bool idle() {
    return BATCH < STEP && threadIdx.x / CHUNKS >= BATCH;
  }
  __device__ __forceinline__ void look(const batch<BATCH> &x) {
    if (idle()) return;
#pragma unroll
    for (int i = 0; i < N; i++) at[i] = x.at[threadIdx.x / CHUNKS + i * STEP];
  }
  template <int L, class In>
  __device__ __forceinline__ void row(uint32_t to, const void *from, int i, uint32_t row,
                                      const In &in) const {
    const uint32_t r = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS;
    const char *const x = (const char *)from + c * 16 + (uint64_t)row * 16;
    to += place<L>((int)r, (int)c) + i * STEP * pitch(L);
#pragma unroll
    for (int g = 0; g < L / 8 / CHUNKS; g++)
      copy16(to + g * CHUNKS * 16, x + g * CHUNKS * 16, at[i].x != NOWHERE && in[g]);
  }
  __device__ __forceinline__ void q(uint32_t to, const rgk_attn &a) const {
    if (idle()) return;
#pragma unroll
    for (int i = 0; i < N; i++) row<W>(to, a.q.data, i, at[i].x, in_q);
  }
  __device__ __forceinline__ void d_o(uint32_t to, const rgk_attn &a) const {
    if (idle()) return;
#pragma unroll
    for (int i = 0; i < N; i++) row<E>(to, a.d_o.data, i, at[i].y, in_o);
  }
};

/* K's or V's rows of a warp as the A of scores: the first HELD steps of k in registers, the others
 * from shared memory. Columns from NEAR on are a tile of their own. */
template <int W, int HELD, int M, int NEAR> struct own_rows {
  uint32_t far, x[HELD ? HELD : 1][M][4];
  static_assert(16 * HELD >= NEAR, "their room is another's then");
  template <class Stages>
  __device__ __forceinline__ own_rows(const char *rest, const Stages &stages, int own) {
    constexpr int FAR = W - NEAR;
    far = mma_at_rows<FAR>(smem_at(rest)) + own * pitch(FAR);
    if constexpr (NEAR > 0) {
      const uint32_t near = mma_at_rows<NEAR>(smem_at(stages.near)) + own * pitch(NEAR);
#pragma unroll
      for (int k = 0; k < NEAR / 16; k++)
#pragma unroll
        for (int m = 0; m < M; m++)
          load_matrices(on<NEAR>(near, 2 * k) + m * 16 * pitch(NEAR), x[k][m]);
    }
#pragma unroll
    for (int k = NEAR / 16; k < HELD; k++)
#pragma unroll
      for (int m = 0; m < M; m++) load(k, m, x[k][m]);
  }
  __device__ __forceinline__ void load(int k, int m, uint32_t *to) const {
    constexpr int FAR = W - NEAR;
    load_matrices(on<FAR>(far, 2 * k - NEAR / 8) + m * 16 * pitch(FAR), to);
  }
};
/* s [16 m, N] = A B^T: rows of B in shared memory, at a lane's address mma_at_columns. */
template <class T, int W, int HELD, int M, int NEAR, int n>
__device__ __forceinline__ void scores(float (&s)[M][n], const own_rows<W, HELD, M, NEAR> &a,
                                       uint32_t b) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < n; i++) s[m][i] = 0;
#pragma unroll
  for (int k = 0; k < W / 16; k++) {
    uint32_t x[M][4], y[4];
#pragma unroll
    for (int m = 0; m < M; m++)
      if (k < HELD)
#pragma unroll
        for (int i = 0; i < 4; i++) x[m][i] = a.x[k < HELD ? k : 0][m][i];
      else
        a.load(k, m, x[m]);
#pragma unroll
    for (int j = 0; j < n / 8; j++) {
      load_matrices(on<W>(b, 2 * k) + j * 16 * pitch(W), y);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma<T>(s[m] + 8 * j, x[m], y);
        mma<T>(s[m] + 8 * j + 4, x[m], y + 2);
      }
    }
  }
}

/* Copies a tile's rows of K or of V. */
template <int W, int NEAR, int KEYS, int THREADS, class Stages>
__device__ __forceinline__ void copy_tile(const char *rest, const Stages &stages, const uint16_t *x,
                                          int64_t step, int n, int width) {
  if constexpr (NEAR > 0)
    copy_rows<NEAR, KEYS, THREADS>(smem_at(stages.near), threadIdx.x, width, x,
                                   [&](int r) { return r < n ? x + r * step : nullptr; });
  copy_rows<W - NEAR, KEYS, THREADS>(smem_at(rest), threadIdx.x, width - NEAR, x,
                                     [&](int r) { return r < n ? x + r * step + NEAR : nullptr; });
}

template <class T, int W, int E, bool SMALL, int KEYS>
__global__ void __launch_bounds__((int)rgk_mma_bwd_keys_threads(W, KEYS),
                                  W <= 128 ? 256 / (int)rgk_mma_bwd_keys_threads(W, KEYS) : 1)
    keys(const __grid_constant__ rgk_attn_plain p) {
  using sh_t = memory<W, E, SMALL, KEYS>;
  constexpr int BATCH = sh_t::BATCH, THREADS = sh_t::THREADS, GROUPS = sh_t::GROUPS, M = sh_t::M,
                STEPS = sh_t::STEPS, OWN = sh_t::OWN, LOOKS = sh_t::LOOKS, KNOWN = sh_t::KNOWN,
                HELD = W > 128    ? 0
                       : W == 128 ? 5
                                  : W / 16; /* more spill */
  constexpr int NEAR = sh_t::NEAR;
  constexpr bool THREE = NEAR > 0; /* stages */
  static_assert(sizeof(sh_t) == rgk_mma_bwd_keys_shared(W, E, SMALL, KEYS), "as the host counts");
  extern __shared__ __align__(1024) char mma_bwd_memory[];
  sh_t &sh = *(sh_t *)mma_bwd_memory;
  const rgk_attn &a = p.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp % GROUPS;

  key_tile t;
  gap<THREADS>(p);
  if (!find_keys(p, t)) return;
  if (t.dead) {
    clear_keys<THREADS>(a, t);
    return;
  }
  const uint16_t *const k = (const uint16_t *)a.k.data + t.key * a.k.row + t.kh * a.k.head,
                        *const v = (const uint16_t *)a.v.data + t.key * a.v.row + t.kh * a.v.head;
  copy_tile<W, NEAR, KEYS, THREADS>(sh.k, sh.q, k, a.k.row, t.n, a.D);
  copy_tile<E, NEAR, KEYS, THREADS>(sh.v, sh.d_o, v, a.v.row, t.n, a.E);
  const int batches = (int)((t.queries * a.G + BATCH - 1) / BATCH);
  const looked_up whole = look_at<LOOKS * BATCH>(p, t);
  lookup look;
  if (threadIdx.x == 0) {
    sh.sums = {t.key, t.part, t.kh, t.n};
    if constexpr (LOOKS > 1) sh.looks.tile = whole;
  }
  if (warp < LOOKS) {
    look.begin(whole, threadIdx.x % 32 + BATCH * warp);
    look.fetch();
    look.template next<BATCH, GROUPS, OWN>(whole, sh.rows[warp], sh.todo[warp]);
    if constexpr (LOOKS == 1) {
      look.fetch();
      look.template next<BATCH, GROUPS, OWN>(whole, sh.rows[1], sh.todo[1]);
      look.fetch();
    } else {
      sh.looks.put(look);
    }
  }
  __syncthreads();
  batch_copies<W, E, BATCH, THREADS> copies(a);
  if (batches > 0) {
    copies.look(sh.rows[0]);
    copies.q(sh.q_at(0), a), copies.d_o(sh.d_o_at(0), a);
  }
  copies_commit();
  copies_wait<0>();
  __syncthreads();

  const int own = group * OWN, key = own + lane / 4, c0 = lane % 4 * 2;
  const float scale2 = a.scale * LOG2E;

  auto work = [&](auto half) {
    constexpr bool DV = decltype(half)::value;
    constexpr int IN = DV ? W : E, OUT = DV ? E : W; /* widths of the two products */
    const own_rows<IN, HELD, M, NEAR> rows = [&]() {
      if constexpr (DV)
        return own_rows<IN, HELD, M, NEAR>(sh.k, sh.q, own);
      else
        return own_rows<IN, HELD, M, NEAR>(sh.v, sh.d_o, own);
    }();
    float sum[M][OUT / 2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < OUT / 2; i++) sum[m][i] = 0;

    float s[M][BATCH / 2]; /* S^T of the batch; dP^T - delta */
    auto exponentiate = [&](const batch<BATCH> &x, int step) {
#pragma unroll
      for (int j = 2 * step; j < 2 * step + 2; j++) {
        const float2 lse = *(const float2 *)&x.lse[8 * j + c0];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            s[m][4 * j + i] = exp2_fast(fmaf(s[m][4 * j + i], scale2, i % 2 ? lse.y : lse.x));
      }
    };
    /* Of scores whose first step is exponentiated; P to where it crosses over. */
    auto add_dv = [&](const batch<BATCH> &x, bool cut, uint32_t rows_at, int side) {
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
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
        uint32_t y[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
          pack_a<T>(y[m], s[m] + 8 * step);
          sh.p[side][group][m][step][lane] = make_uint4(y[m][0], y[m][1], y[m][2], y[m][3]);
        }
        /* beside each other: powers while the tensor cores work */
        if (step + 1 < STEPS) exponentiate(x, step + 1);
        add_product<T, OUT, 1>(sum, y, mma_at_rows<OUT>(rows_at) + step * 16 * pitch(OUT));
      }
    };
    auto less_delta = [&](const batch<BATCH> &x, int step) {
#pragma unroll
      for (int j = 2 * step; j < 2 * step + 2; j++) {
        const float2 delta = *(const float2 *)&x.delta[8 * j + c0];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 4; i++) s[m][4 * j + i] -= i % 2 ? delta.y : delta.x;
      }
    };
    auto add_dk = [&](int step, uint32_t rows_at, int side) {
      uint32_t y[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) {
        const uint4 w = sh.p[side][group][m][step][lane];
        const uint32_t word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float2 prob = unpack(word[j], T());
          const float *const dp = s[m] + 8 * step + 2 * j;
          y[m][j] = pack(prob.x * dp[0], prob.y * dp[1], T());
        }
      }
      add_product<T, OUT, 1>(sum, y, mma_at_rows<OUT>(rows_at) + step * 16 * pitch(OUT));
    };
    /* A warp's batch of those to come. */
    auto look_up = [&](int to) {
      if constexpr (LOOKS > 1) {
        lookup mine;
        sh.looks.get(mine);
        mine.template next<BATCH, GROUPS, OWN>(sh.looks.tile, sh.rows[to], sh.todo[to]);
        sh.looks.put(mine);
      } else {
        look.template next<BATCH, GROUPS, OWN>(whole, sh.rows[to], sh.todo[to]);
        look.fetch();
      }
    };

    if constexpr (THREE) {
      static_assert((KNOWN & (KNOWN - 1)) == 0 && KNOWN >= LOOKS + 4);
      int stage = 0; /* of batch i */
#pragma unroll 1
      for (int i = 0; i <= batches; i++) {
        const int next = stage == 2 ? 0 : stage + 1, last = stage == 0 ? 2 : stage - 1;
        const int here = i & (KNOWN - 1), mine = DV ? here : (i - 1) & (KNOWN - 1);
        const batch<BATCH> &x = sh.rows[mine];
        const uint32_t todos = sh.todo[mine];
        const bool todo = (DV ? i < batches : i > 0) && todos & 1, cut = todos >> (1 + group) & 1;
        copies.look(sh.rows[(i + 1) & (KNOWN - 1)]);
        copies_wait<0>();
        meet<THREADS>(); /* rows of i are there, P of i - 1; what was at i - 2 is done with */
        if (i + 1 < batches) copies.q(sh.q_at(next), a), copies.d_o(sh.d_o_at(next), a);
        if (warp < LOOKS && (i + 3) % LOOKS == 0) look_up((i + 3 + warp) & (KNOWN - 1));
        copies_commit();
        if (!todo) {
        } else if constexpr (DV) {
          scores<T, IN>(s, rows, mma_at_columns<IN>(sh.q_at(stage)));
          exponentiate(x, 0);
          add_dv(x, cut, sh.d_o_at(stage), i & 1);
        } else {
          scores<T, IN>(s, rows, mma_at_columns<IN>(sh.d_o_at(last)));
#pragma unroll
          for (int step = 0; step < STEPS; step++) {
            less_delta(x, step);
            add_dk(step, sh.q_at(last), (i & 1) ^ 1);
          }
        }
        stage = next;
      }
    } else {
      int at = 0;          /* of KNOWN */
      bool before = false; /* P of the batch before is there */
      auto add_dk_of = [&](int stage) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) add_dk(step, sh.q_at(stage), 0);
      };
#pragma unroll 1
      for (int i = 0; i < batches; i++) {
        const int stage = i & 1;
        const batch<BATCH> &x = sh.rows[at], &next = sh.rows[at == KNOWN - 1 ? 0 : at + 1];
        const uint32_t todo = sh.todo[at];
        copies.look(next);
        copies_wait<0>();
        meet<THREADS>(); /* rows are there, and P of the batch before */
        copies.d_o(sh.d_o_at(stage ^ 1), a);
        if (warp < LOOKS && (i + 2) % LOOKS == 0) {
          const int ahead = at + 2 + warp;
          look_up(ahead < KNOWN ? ahead : ahead - KNOWN);
        }
        copies_commit();
        if constexpr (DV) {
          if (todo & 1) {
            scores<T, IN>(s, rows, mma_at_columns<IN>(sh.q_at(stage)));
            exponentiate(x, 0);
          }
        } else if (before) {
          add_dk_of(stage ^ 1);
        }
        meet<THREADS>(); /* P and Q of the batch before are done with */
        copies.q(sh.q_at(stage ^ 1), a);
        copies_commit();
        before = todo & 1;
        if (before) {
          if constexpr (DV) {
            add_dv(x, todo >> (1 + group) & 1, sh.d_o_at(stage), 0);
          } else {
            scores<T, IN>(s, rows, mma_at_columns<IN>(sh.d_o_at(stage)));
#pragma unroll
            for (int step = 0; step < STEPS; step++) less_delta(x, step);
          }
        }
        at = at == KNOWN - 1 ? 0 : at + 1;
      }
      copies_wait<0>();
      meet<THREADS>();
      if constexpr (!DV)
        if (before) add_dk_of(batches - 1 & 1);
    }

    rgk_tensor to = DV ? a.dv : a.dk;
    if (!to.data) return;
    const whose t = sh.sums;
    const int key = own + (int)threadIdx.x % 32 / 4, c0 = (int)threadIdx.x % 4 * 2;
    const int width = DV ? a.E : a.D;
    const bool part = t.part >= 0, add = !part && (DV ? a.acc_v : a.acc_k);
    const float factor = DV || part ? 1 : a.scale; /* parts are scaled when added up */
    int64_t row = t.key * to.row + t.kh * to.head;
    if (part) {
      to = {DV ? p.part_v : p.part_k, width, 0, RG_F32, 0};
      row = (t.kh * p.part_rows + t.part) * width;
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int r = key + 16 * m + 8 * i;
        if (r >= t.n) continue;
#pragma unroll
        for (int j = 0; j < OUT / 8; j++)
          if (8 * j < width)
            put_two(to, add, row + r * to.row + 8 * j + c0, sum[m][4 * j + 2 * i] * factor,
                    sum[m][4 * j + 2 * i + 1] * factor);
      }
  };
  if (warp < GROUPS)
    work(std::true_type());
  else
    work(std::false_type());
}

} // namespace mma_bwd
} // namespace rgk
