/* kernels/attn/topk_sm90.cu: topk on Hopper's tensor cores, scores and choice in one pass.

   A consumer warpgroup works on QUERIES queries of one sequence and KV head, with the keys in a
   ring of tiles of 64 that the copy engine fills. A block has one consumer, and two blocks share a
   multiprocessor, so that one block's beginning and end hide behind the other's products; or, where
   that much shared memory is not to be had, two consumers of one ring. The product is taken
   transposed,

       D [64 keys, N = QUERIES x HEADS] = K [64, d] . Q^T [d, N]

   with Q's rows permuted so that a thread's columns are all heads of a few queries: the sum over
   heads stays in the thread.

       column n = 8i + 2c + e belongs to quad lane c, as its m-th, m = 2i + e: head m % HEADS of
       query 4 * (m / HEADS) + c

   Two accumulators take turns: one is filled while the other is exponentiated. Every STEP keys the
   sums p go through shared memory (two buffers, one barrier a step) to the warp that owns the
   query, which chooses (topk_choice.cuh).
 */
#include "../device/element.cuh"
#include "../device/ptx.cuh"
#include "../device/softmax.cuh"
#include "topk_choice.cuh"
#include "../device/tma.cuh"
#include "../device/wgmma.cuh"
#include <stddef.h>

using namespace rgk;

namespace {

constexpr int TILE = RGK_TOPK90_TILE;
enum named : int { EACH = 1 }; /* first id, of one for each consumer */

/* Of one warpgroup: */
template <int HEADS> struct plan {
  /* of a quad lane, a warp */
  static constexpr int N = RGK_TOPK90_COLUMNS, QUERIES = N / HEADS, MINE = QUERIES / 4;
  static constexpr int BUFFERS = 2, HALVES = RGK_TOPK90_HALVES(QUERIES), STEP = TILE * HALVES,
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
struct memory : topk_memory {
  char *q, *k;            /* of all */
  int *visible;           /* [QUERIES] */
  uint64_t *full, *empty; /* [stages] */
};

/* Byte of row r's 16-byte unit u in panels of `rows` rows. */
__device__ __forceinline__ uint32_t panel_at(int r, int u, int rows) {
  return (uint32_t)((u >> 3) * rows * 128 + r * 128 + ((u ^ r) & 7) * 16);
}

/* ---- p of one tile: exponentials and the sum over heads ---- */

template <int HEADS, bool DOT>
__device__ __forceinline__ void weigh(const float (&acc)[plan<HEADS>::N / 2],
                                      const float (&lse)[plan<HEADS>::N / 4], float scale,
                                      float *out, int key, int least_visible, const int *visible) {
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
      out[(4 * q + c) * P::PITCH + 8 * r] = sum;
    }
}

/* ---- what a block works on ---- */

/* Queries of one sequence and KV head, and the keys that any of them ranks. */
struct job {
  tile t;
  int kh;
  int64_t row0; /* the first query's row of q */
  int32_t *idx; /* of row 0 */
  /* of live rows: */
  topk_keys keys;
  int64_t position; /* of the first query */
  int bs, reach;    /* keys of a block; those that it reaches over of the block before */
  int step0, tiles; /* tiles of keys from step0 on; their number is even */
};
template <int HEADS> __device__ __forceinline__ void find_keys(const rgk_topk &p, job &j) {
  using P = plan<HEADS>;
  j.keys = keys_of(p, j.t.b);
  j.position = j.t.first + (p.offset ? p.offset[j.t.b] : 0);
  j.bs = p.block / p.stride, j.reach = p.kernel / p.stride - 1;
  /* The last row sees and ranks most. Steps [step0, step1) hold all that any row ranks. */
  const rgk_topk_choice last = choice_of(p, j.position + j.t.n - 1);
  j.step0 = max(p.init * j.bs - j.reach, 0) / P::STEP;
  const int step1 =
      rgk_topk_ranks(last) ? (int)((last.free1 * j.bs + P::STEP - 1) / P::STEP) : j.step0;
  j.tiles = ((step1 - j.step0) * P::HALVES + 1) / 2 * 2;
}

template <int HEADS, int D>
__device__ __forceinline__ memory find_memory(const rgk_topk &p, int reach, char *shared,
                                              int side) {
  using P = plan<HEADS>;
  constexpr int GROUPS = RGK_TOPK90_GROUPS(HEADS, D), PANELS = (D + 63) / 64;
  using layout = tables<HEADS, GROUPS>;
  static_assert(sizeof(layout) == rgk_topk90_tables(HEADS, D), "as the host counts");
  memory m;
  m.q = shared;
  m.k = m.q + GROUPS * PANELS * P::N * 128;
  char *const at = m.k + p.stages * PANELS * TILE * 128;
  m.p = (float *)(at + offsetof(layout, p)) + side * 2 * P::QUERIES * P::PITCH;
  m.candidate = (int2 *)(at + offsetof(layout, candidate)) + side * P::QUERIES * P::ROOM;
  m.state = (int4 *)(at + offsetof(layout, state)) + side * P::QUERIES;
  m.visible = (int *)(at + offsetof(layout, visible)) + side * P::QUERIES;
  m.full = (uint64_t *)(at + offsetof(layout, full));
  m.empty = (uint64_t *)(at + offsetof(layout, empty));
  m.carry = (float *)(at + sizeof(layout)) + side * P::QUERIES * reach;
  return m;
}

/* ---- load: one thread starts the copies of keys ---- */

template <int HEADS, int D>
__device__ __forceinline__ void load_keys(const rgk_topk90_params &x, const job &j,
                                          const memory &m) {
  constexpr int PANELS = (D + 63) / 64;
  const int64_t from = j.keys.first + (int64_t)j.step0 * plan<HEADS>::STEP;
  int stage = 0;
  uint32_t parity = 1;
  for (int i = 0; i < j.tiles; i++) {
    bar_wait(m.empty + stage, parity);
    bar_expect(m.full + stage, PANELS * TILE * 128);
    for (int y = 0; y < PANELS; y++)
      tma_load(m.k + (stage * PANELS + y) * TILE * 128, &x.k, m.full + stage, 64 * y, j.kh,
               (int)(from + i * TILE));
    if (++stage == x.call.stages) stage = 0, parity ^= 1;
  }
}

/* ---- a consumer warpgroup ---- */

template <class T, int HEADS, int D, bool DOT> struct consumer {
  using P = plan<HEADS>;
  static constexpr int PANELS = (D + 63) / 64;
  const rgk_topk &p;
  const job &j;
  const memory &m;
  const int group, tid, warp, lane;
  const int first, n; /* of the block's queries, this warpgroup's */

  /* The queries' state before any key. */
  __device__ __forceinline__ void begin() const {
    for (int q = tid; q < P::QUERIES; q += 128) {
      const rgk_topk_choice c = choice_of(p, j.position + first + q);
      m.visible[q] =
          q < n ? (int)min(keys_before(j.position + first + q + 1, p), j.keys.n) : INT_MAX;
      m.state[q] = make_int4(LEAST_KEY, 0, q < n && rgk_topk_ranks(c) ? (int)(c.free1 - p.init) : 0,
                             (int)c.keep);
      for (int i = 0; i < j.reach; i++) m.carry[q * j.reach + i] = 0;
    }
  }

  /* To shared memory, in the order of the product's columns. */
  __device__ __forceinline__ void load_queries(char *to) const {
    constexpr int UNITS = D / 8, ROWS = 128 / UNITS;
    const int u = tid % UNITS;
    if (tid / UNITS < ROWS)
      for (int r = tid / UNITS; r < P::N; r += ROWS) {
        const int i = r / 8 * 2 + r % 2, q = i / HEADS * 4 + r % 8 / 2, h = i % HEADS;
        const bool there = q < n && h < p.G;
        const T *from = (const T *)p.q.data + u * 8;
        if (there) from += (j.row0 + first + q) * p.q.row + (j.kh * p.G + h) * p.q.head;
        copy16(smem_at(to) + panel_at(r, u, P::N), from, there);
      }
    copies_commit();
  }
  /* Of this thread's columns, as the exponential wants it. */
  __device__ __forceinline__ void load_lse(float (&lse)[P::N / 4]) const {
#pragma unroll
    for (int i = 0; i < P::N / 4; i++) {
      const int q = i / HEADS * 4 + lane % 4, h = i % HEADS;
      lse[i] = -INFINITY;
      if (!DOT && q < n && h < p.G)
        lse[i] =
            -LOG2E * ((const float *)p.lse.data)[(j.row0 + first + q) * p.lse.row + j.kh * p.G + h];
    }
  }

  /* Scores all keys, and chooses. */
  __device__ __forceinline__ void rank() const {
    char *const mine = m.q + group * PANELS * P::N * 128;
    float lse[P::N / 4];
    load_queries(mine);
    load_lse(lse);
    copies_wait<0>();
    proxy_fence();
    named_sync(EACH + group, WARPGROUP);
    const int least_visible = (int)min(keys_before(j.position + first + 1, p), j.keys.n);
    const float scale = p.scale * LOG2E;
    const uint64_t q_at = desc_k(smem_at(mine));
    const uint32_t k_at = smem_at(m.k);
    float acc[2][P::N / 2], carry[P::MINE] = {};
    int stage = 0, freed = 0;
    uint32_t parity = 0;

    auto product = [&](float(&d)[P::N / 2], bool there) {
      bar_wait(m.full + stage, there ? parity : parity ^ 1);
      const uint64_t k_tile = desc_k(k_at + stage * PANELS * TILE * 128);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < D / 16; i++)
        wgmma<T, P::N>::ss(d, k_tile + i / 4 * (TILE * 8) + i % 4 * 2,
                           q_at + i / 4 * (P::N * 8) + i % 4 * 2, i > 0);
      wgmma_commit();
      /* returns at once; keeps exponentials behind products */
      bar_wait(m.full + stage, there ? parity : parity ^ 1);
      if (++stage == p.stages) stage = 0, parity ^= 1;
    };
    auto release = [&](waited done) {
      warp_release(m.empty + freed, done);
      if (++freed == p.stages) freed = 0;
    };
    const int my_row = 16 * warp + lane / 4;
    auto sums = [&](float(&d)[P::N / 2], int i) {
      const int step = j.step0 + i / P::HALVES, in_step = i % P::HALVES * TILE + my_row;
      weigh<HEADS, DOT>(d, lse, scale, m.p + (step & 1) * P::QUERIES * P::PITCH + in_step,
                        step * P::STEP + in_step, least_visible, m.visible);
      if (i % P::HALVES == P::HALVES - 1) {
        named_sync(EACH + group, WARPGROUP);
        if (!DOT && P::STEP == 128 && j.bs == 4 && j.reach == 1)
          choose_4_1<P>(p, m, warp, step, carry);
        else
          choose<P>(p, m, warp, step, DOT);
      }
    };

    /* One product runs while the one before is exponentiated. The last turn also starts one, of
     * whatever is in the ring: a branch around products would serialise them. */
    auto turn = [&](float(&ready)[P::N / 2], float(&next)[P::N / 2], int i) {
      product(next, i + 1 < j.tiles);
      sums(ready, i);
      const waited done = wgmma_wait<0>();
      wgmma_keep(next);
      release(done);
    };
    product(acc[0], true);
    const waited done = wgmma_wait<0>();
    wgmma_keep(acc[0]);
    release(done);
    for (int i = 0; i < j.tiles; i += 2) {
      turn(acc[0], acc[1], i);
      turn(acc[1], acc[0], i + 1);
    }
    __syncwarp(); /* before the choice is looked at */
  }

  __device__ __forceinline__ void run() const {
    begin();
    if (j.tiles > 0)
      rank();
    else
      named_sync(EACH + group, WARPGROUP);
    for (int i = 0; i < P::MINE; i++) {
      const int q = warp * P::MINE + i;
      if (q >= n) break;
      finish<P::PER_LANE>(p, m, q, choice_of(p, j.position + first + q), m.visible[q] > 0,
                          j.idx + (j.row0 + first + q) * p.idx.row, P::ROOM);
    }
  }
};

/* ---- the kernel ---- */

template <class T, int HEADS, int D, bool DOT>
__global__ void __launch_bounds__(RGK_TOPK90_THREADS(HEADS, D),
                                  RGK_TOPK90_GROUPS(HEADS, D) == 1 ? 2 : 1)
    topk(const __grid_constant__ rgk_topk90_params x) {
  const rgk_topk &p = x.call;
  using P = plan<HEADS>;
  constexpr int GROUPS = RGK_TOPK90_GROUPS(HEADS, D);
  extern __shared__ __align__(1024) char shared[];
  job j;
  j.kh = (int)(blockIdx.x % p.KH);
  j.t = find_tile(p.seqs, p.slots - 1 - blockIdx.x / p.KH, GROUPS * P::QUERIES);
  j.row0 = j.t.begin + j.t.first;
  j.idx = (int32_t *)p.idx.data + j.kh * p.idx.head;
  if (j.t.n == 0) return;
  if (j.t.b == p.seqs.n) {
    for (int i = threadIdx.x; i < j.t.n * p.top_n; i += RGK_TOPK90_THREADS(HEADS, D))
      j.idx[(j.row0 + i / p.top_n) * p.idx.row + i % p.top_n] = 0;
    return;
  }
  find_keys<HEADS>(p, j);
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const memory m = find_memory<HEADS, D>(p, j.reach, shared, GROUPS == 1 ? 0 : group & 1);
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < p.stages; i++)
      bar_init(m.full + i, 1), bar_init(m.empty + i, 4 * GROUPS * WARP_ARRIVALS);
    bar_init_done();
  }
  __syncthreads();
  if (group == GROUPS) {
    fewer_registers<GROUPS == 1 ? 40 : 24>(); /* all threads lend theirs */
    if (threadIdx.x % 128 == 0) load_keys<HEADS, D>(x, j, m);
  } else {
    more_registers<GROUPS == 1 ? 208 : 240>();
    const int first = group * P::QUERIES;
    consumer<T, HEADS, D, DOT>{p,
                               j,
                               m,
                               group,
                               (int)(threadIdx.x % 128),
                               warp,
                               lane,
                               first,
                               max(0, min(P::QUERIES, j.t.n - first))}
        .run();
  }
}

/* MoBA's dot products come with one head a KV head, or few. */
template <class T, int D> const void *instance(int heads, bool dot) {
  if (dot) return heads == 4 ? (const void *)topk<T, 4, D, true> : nullptr;
  return heads == 4    ? (const void *)topk<T, 4, D, false>
         : heads == 8  ? (const void *)topk<T, 8, D, false>
         : heads == 16 ? (const void *)topk<T, 16, D, false>
                       : nullptr;
}
template <class T> const void *instance(int heads, int width, bool dot) {
#ifndef RGK_DEV
  if (width == 96) return instance<T, 96>(heads, dot);
  if (width == 192) return instance<T, 192>(heads, dot);
  if (width == 256) return instance<T, 256>(heads, dot);
#endif
  return width == 64    ? instance<T, 64>(heads, dot)
         : width == 128 ? instance<T, 128>(heads, dot)
                        : nullptr;
}

} // namespace

const void *rgk_topk90(rg_dtype type, int heads, int width, bool dot) {
#ifndef RGK_DEV
  if (type == RG_F16) return instance<__half>(heads, width, dot);
#endif
  return type == RG_BF16 ? instance<__nv_bfloat16>(heads, width, dot) : nullptr;
}
