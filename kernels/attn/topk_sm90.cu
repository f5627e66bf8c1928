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
   sums p go through shared memory (two buffers) to the warp that owns the query, which chooses
   (topk_choice.cuh). Where a block has one consumer (APART) these are four warps beside it, of
   which one also starts the copies, so that the consumer goes on; elsewhere they are the consumer's
   own, one barrier a step. Over pages, where sequences are few, a cluster of blocks shares out a
   tile's steps (each begins one early, for what is carried), and the first takes the others'
   candidates.
 */
#include "../device/element.cuh"
#include "../device/pages.cuh"
#include "../device/ptx.cuh"
#include "../device/softmax.cuh"
#include "topk_sm90.cuh"
#include "../device/tma.cuh"
#include "../device/wgmma.cuh"
#include <stddef.h>

using namespace rgk;
using namespace rgk::topk90;

namespace {

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
  int before;       /* rows that come before the first key */
  int carried;      /* keys that a step hands to the next */
  int step0, tiles; /* tiles of keys from step0 on; their number is even */
  int lowest;       /* block that may be chosen */
  const int32_t *table;
};
template <int HEADS>
__device__ __forceinline__ void find_keys(const rgk_topk90_paged &x, job &j, int part) {
  using P = plan<HEADS>;
  const rgk_topk &p = x.call;
  const rgk_pages &g = x.pages;
  const int64_t n = g.context[j.t.b * g.context_step];
  const bool bad = n < j.t.length || n > (int64_t)g.most * g.tokens;
  j.keys.length = bad ? 0 : n;
  j.keys.first = 0;
  j.keys.n = keys_before(j.keys.length, p);
  j.position = j.t.first + (bad ? 0 : n - j.t.length);
  j.table = g.table + j.t.b * g.table_row;
  j.bs = p.block / p.stride, j.reach = p.kernel / p.stride - 1;
  j.before = g.before;
  j.carried = j.bs;
  const rgk_topk_choice last = choice_of(p, j.position + j.t.n - 1);
  const bool ranks = rgk_topk_ranks(last);
  /* blocks [init, free1) by steps [from, to): of a step's the first is the last before it */
  const int blocks = P::STEP / j.bs, from = (p.init + 1) / blocks,
            to = ranks ? (int)(last.free1 / blocks) + 1 : from,
            each = (to - from + x.parts - 1) / x.parts, mine = min(from + part * each, to),
            end = min(mine + each, to);
  j.step0 = max(mine - 1, 0);
  j.lowest = max(p.init, mine * blocks - 1);
  j.tiles = mine < end ? (end - j.step0) * P::HALVES : 0;
  j.tiles += j.tiles & 1;
}
template <int HEADS>
__device__ __forceinline__ void find_keys(const rgk_topk90_params &x, job &j, int) {
  using P = plan<HEADS>;
  const rgk_topk &p = x.call;
  j.keys = keys_of(p, j.t.b);
  j.position = j.t.first + (p.offset ? p.offset[j.t.b] : 0);
  j.bs = p.block / p.stride, j.reach = p.kernel / p.stride - 1;
  j.before = 0;
  j.carried = j.reach;
  j.lowest = p.init;
  j.table = nullptr;
  /* The last row sees and ranks most. Steps [step0, step1) hold all that any row ranks. */
  const rgk_topk_choice last = choice_of(p, j.position + j.t.n - 1);
  j.step0 = max(p.init * j.bs - j.reach, 0) / P::STEP;
  const int step1 =
      rgk_topk_ranks(last) ? (int)((last.free1 * j.bs + P::STEP - 1) / P::STEP) : j.step0;
  j.tiles = ((step1 - j.step0) * P::HALVES + 1) / 2 * 2;
}

template <int HEADS, int D>
__device__ __forceinline__ memory find_memory(const rgk_topk &p, int carried, char *shared,
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
  m.summed = (uint64_t *)(at + offsetof(layout, summed));
  m.taken = (uint64_t *)(at + offsetof(layout, taken));
  m.carry = (float *)(at + sizeof(layout)) + side * P::QUERIES * carried;
  return m;
}

/* ---- load: one thread starts the copies of keys; over pages a warpgroup copies ---- */

template <int HEADS, int D>
__device__ __forceinline__ void load_keys(const rgk_topk90_paged &x, const job &j,
                                          const memory &m) {
  constexpr int PANELS = (D + 63) / 64;
  const paged_rows from = paged_head(x.call.k, x.pages.k_page, j.kh, D);
  const int end = (int)j.keys.n + j.before;
  int stage = 0;
  uint32_t parity = 1;
  for (int i = 0; i < j.tiles; i++) {
    const int first = j.step0 * plan<HEADS>::STEP + i * TILE;
    const paged_four four = find_four(x.pages, j.table, first, j.before, end);
    bar_wait(m.empty + stage, parity);
    copy_rows<TILE, PANELS * 8>(from, four, smem_at(m.k + stage * PANELS * TILE * 128), TILE * 128,
                                first, j.before, end, (int)threadIdx.x % 128);
    copies_arrive(m.full + stage);
    if (++stage == x.call.stages) stage = 0, parity ^= 1;
  }
  copies_wait_all();
}
struct key_loader {
  int tile = 0, stage = 0;
  uint32_t parity = 1;
  /* Tiles up to `end`. */
  template <int HEADS, int D>
  __device__ __forceinline__ void load(const rgk_topk90_params &x, const job &j, const memory &m,
                                       int end) {
    constexpr int PANELS = (D + 63) / 64;
    const int64_t from = j.keys.first + (int64_t)j.step0 * plan<HEADS>::STEP;
    for (; tile < end; tile++) {
      bar_wait(m.empty + stage, parity);
      bar_expect(m.full + stage, PANELS * TILE * 128);
      for (int y = 0; y < PANELS; y++)
        tma_load(m.k + (stage * PANELS + y) * TILE * 128, &x.k, m.full + stage, 64 * y, j.kh,
                 (int)(from + tile * TILE));
      if (++stage == x.call.stages) stage = 0, parity ^= 1;
    }
  }
};
template <int HEADS, int D>
__device__ __forceinline__ void load_keys(const rgk_topk90_params &x, const job &j,
                                          const memory &m) {
  key_loader().load<HEADS, D>(x, j, m, j.tiles);
}

/* ---- a consumer warpgroup ---- */

template <class T, int HEADS, int D, bool DOT, bool PAGED> struct consumer {
  using P = plan<HEADS>;
  static constexpr int PANELS = (D + 63) / 64;
  static constexpr bool APART = !PAGED && RGK_TOPK90_GROUPS(HEADS, D) == 1;
  const rgk_topk &p;
  const job &j;
  const memory &m;
  const int group, tid, warp, lane;
  const int first, n; /* of the block's queries, this warpgroup's */

  /* The queries' state before any key. */
  __device__ __forceinline__ void begin() const {
    for (int q = tid; q < P::QUERIES; q += 128) {
      const rgk_topk_choice c = choice_of(p, j.position + first + q);
      m.visible[q] = q < n ? (int)min(keys_before(j.position + first + q + 1, p), j.keys.n) +
                                 (PAGED ? j.before : 0)
                           : INT_MAX;
      m.state[q] = make_int4(LEAST_KEY, 0,
                             q < n && rgk_topk_ranks(c) ? (PAGED ? max((int)c.free1 - j.lowest, 0)
                                                                 : (int)(c.free1 - p.init))
                                                        : 0,
                             (int)c.keep);
      for (int i = 0; i < j.carried; i++) m.carry[q * j.carried + i] = 0;
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

  /* By the warp that owns the queries. */
  __device__ __forceinline__ void
  choose_step(int step, typename carried<PAGED>::type (&carry)[P::MINE]) const {
    const int lowest = PAGED ? j.lowest : p.init;
    if (!DOT && P::STEP == 128 && j.bs == 4 && j.reach == 1)
      choose_4_1<P, PAGED>(m, warp, step, lowest, carry);
    else if (DOT && p.max)
      choose_best<P>(p, m, warp, step, lowest);
    else
      choose<P, PAGED>(p, m, warp, step, lowest, DOT);
  }
  /* Apart: chooses as sums come, and has keys copied. A step's sums come after its products, so
   * the keys of as many tiles as it has may go; with three stages or more the consumer has tiles
   * left to begin the next step with. */
  __device__ __forceinline__ void choose_all(const rgk_topk90_params &x) const {
    static_assert(P::HALVES == 2, "tiles are whole steps");
    typename carried<PAGED>::type carry[P::MINE] = {};
    const bool loads = warp == 0 && lane == 0;
    key_loader keys;
    if (loads) keys.load<HEADS, D>(x, j, m, min(p.stages, j.tiles));
    __syncwarp();
    for (int n = 0; n < j.tiles / P::HALVES; n++) {
      const int step = j.step0 + n;
      bar_wait(m.summed + (step & 1), n / 2 % 2);
      if (loads) keys.load<HEADS, D>(x, j, m, min(p.stages + P::HALVES * (n + 1), j.tiles));
      __syncwarp();
      choose_step(step, carry);
      warp_ready(m.taken + (step & 1)); /* all reads went into votes */
    }
    __syncwarp();
    write();
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
    const int before = PAGED ? j.before : 0,
              least_visible = (int)min(keys_before(j.position + first + 1, p), j.keys.n) + before;
    const float scale = p.scale * LOG2E;
    const uint64_t q_at = desc_k(smem_at(mine));
    const uint32_t k_at = smem_at(m.k);
    float acc[2][P::N / 2];
    typename carried<PAGED>::type carry[P::MINE] = {};
    int stage = 0, freed = 0;
    uint32_t parity = 0;

    auto product = [&](float(&d)[P::N / 2], bool there) {
      bar_wait(m.full + stage, there ? parity : parity ^ 1);
      if (PAGED) proxy_fence(); /* threads wrote what is to be multiplied */
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
    auto release = [&](waited done, bool gives) {
      if (arrives() && gives) bar_release(m.empty + freed, done);
      if (++freed == p.stages) freed = 0;
    };
    const int my_row = 16 * warp + lane / 4;
    auto sums = [&](float(&d)[P::N / 2], int i) {
      const int step = j.step0 + i / P::HALVES, in_step = i % P::HALVES * TILE + my_row;
      if (APART && i % P::HALVES == 0) bar_wait(m.taken + (step & 1), i / P::HALVES / 2 % 2 ^ 1);
      weigh<HEADS, DOT, PAGED>(d, lse, scale, m.p + (step & 1) * P::QUERIES * P::PITCH + in_step,
                               step * P::STEP + in_step, before, least_visible, m.visible);
      if (i % P::HALVES < P::HALVES - 1) return;
      if (APART) {
        warp_ready(m.summed + (step & 1));
      } else {
        named_sync(EACH + group, WARPGROUP);
        choose_step(step, carry);
      }
    };

    /* One product runs while the one before is exponentiated. The last turn also starts one, of
     * whatever is in the ring: a branch around products would serialise them. Nothing is given back
     * for it (`gives`; tiles are even in number, so that the first of two turns need not ask). */
    auto turn = [&](float(&ready)[P::N / 2], float(&next)[P::N / 2], int i, bool gives) {
      product(next, i + 1 < j.tiles);
      sums(ready, i);
      const waited done = wgmma_wait<0>();
      wgmma_keep(next);
      release(done, gives);
    };
    product(acc[0], true);
    const waited done = wgmma_wait<0>();
    wgmma_keep(acc[0]);
    release(done, true);
    for (int i = 0; i < j.tiles; i += 2) {
      turn(acc[0], acc[1], i, true);
      turn(acc[1], acc[0], i + 1, i + 2 < j.tiles);
    }
    __syncwarp(); /* before the choice is looked at */
  }

  /* What the other blocks of the cluster have for query q; their blocks come after all that are
   * here. */
  __device__ __forceinline__ void absorb(int q, int parts) const {
    for (int r = 1; r < parts; r++) {
      const int there = cluster_load(cluster_at(smem_at(&m.state[q].y), r));
      for (int from = 0; from < there; from += 32) {
        int2 x = make_int2(LEAST_KEY, INT_MAX);
        const bool mine = from + lane < there;
        if (mine) {
          const uint32_t at = cluster_at(smem_at(m.candidate + q * P::ROOM + from + lane), r);
          x = make_int2(cluster_load(at), cluster_load(at + 4));
        }
        const int4 s = m.state[q];
        /* of equals the lower blocks stay, whoever came first */
        const uint32_t passed = __ballot_sync(~0u, mine && x.x >= s.x);
        if (passed >> lane & 1)
          m.candidate[q * P::ROOM + s.y + __popc(passed & ((1u << lane) - 1))] = x;
        __syncwarp();
        if (lane == 0) m.state[q].y = s.y + __popc(passed);
        __syncwarp();
        if (s.y + __popc(passed) > P::ROOM - 32) drop<P>(m, q);
        __syncwarp();
      }
    }
  }

  __device__ __forceinline__ void write() const {
    for (int i = 0; i < P::MINE; i++) {
      const int q = warp * P::MINE + i;
      if (q >= n) break;
      finish<P::PER_LANE>(p, m, q, choice_of(p, j.position + first + q),
                          m.visible[q] > (PAGED ? j.before : 0),
                          j.idx + (j.row0 + first + q) * p.idx.row, P::ROOM);
    }
  }
  __device__ __forceinline__ void run(int part, int parts) const {
    if (j.tiles > 0) rank();
    if (APART) return;
    if (parts > 1) {
      __syncwarp();
      cluster_sync();
      for (int i = 0; i < P::MINE && part == 0; i++)
        if (warp * P::MINE + i < n) absorb(warp * P::MINE + i, parts);
      __syncwarp();
      cluster_sync();
      if (part > 0) return;
    }
    write();
  }
};

/* ---- the kernel ---- */

__device__ __forceinline__ int parts_of(const rgk_topk90_params &) {
  return 1;
}
__device__ __forceinline__ int parts_of(const rgk_topk90_paged &x) {
  return x.parts;
}
template <class X> constexpr bool in_pages = false;
template <> constexpr bool in_pages<rgk_topk90_paged> = true;

template <class T, int HEADS, int D, bool DOT, class X>
__global__ void __launch_bounds__(RGK_TOPK90_THREADS(HEADS, D),
                                  RGK_TOPK90_GROUPS(HEADS, D) == 1 ? 2 : 1)
    topk(const __grid_constant__ X x) {
  const rgk_topk &p = x.call;
  using P = plan<HEADS>;
  constexpr bool PAGED = in_pages<X>;
  constexpr int GROUPS = RGK_TOPK90_GROUPS(HEADS, D);
  extern __shared__ __align__(1024) char shared[];
  const int parts = parts_of(x), part = PAGED ? (int)blockIdx.x % parts : 0,
            at = PAGED ? (int)blockIdx.x / parts : (int)blockIdx.x;
  job j;
  j.kh = at % p.KH;
  j.t = find_tile(p.seqs, p.slots - 1 - at / p.KH, GROUPS * P::QUERIES);
  j.row0 = j.t.begin + j.t.first;
  j.idx = (int32_t *)p.idx.data + j.kh * p.idx.head;
  if (j.t.n == 0) return;
  if (j.t.b == p.seqs.n) {
    for (int i = threadIdx.x; i < j.t.n * p.top_n && part == 0; i += RGK_TOPK90_THREADS(HEADS, D))
      j.idx[(j.row0 + i / p.top_n) * p.idx.row + i % p.top_n] = 0;
    return;
  }
  find_keys<HEADS>(x, j, part);
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const memory m = find_memory<HEADS, D>(p, j.carried, shared, GROUPS == 1 ? 0 : group & 1);
  using worker = consumer<T, HEADS, D, DOT, PAGED>;
  const int first = GROUPS == 1 ? 0 : group * P::QUERIES;
  const worker mine{p,
                    j,
                    m,
                    GROUPS == 1 ? 0 : group,
                    (int)(threadIdx.x % 128),
                    warp,
                    lane,
                    first,
                    max(0, min(P::QUERIES, j.t.n - first))};
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < p.stages; i++)
      bar_init(m.full + i, PAGED ? 128 : 1), bar_init(m.empty + i, 4 * GROUPS * WARP_ARRIVALS);
    for (int i = 0; i < 2 && worker::APART; i++)
      bar_init(m.summed + i, 4 * WARP_ARRIVALS), bar_init(m.taken + i, 4 * WARP_ARRIVALS);
    bar_init_done();
  }
  if (group < GROUPS) mine.begin();
  __syncthreads();
  if (group < GROUPS) {
    more_registers<worker::APART ? 176 : GROUPS == 1 ? 208 : PAGED ? 232 : 240>();
    mine.run(part, PAGED ? parts : 1);
    return;
  }
  fewer_registers<worker::APART ? 80 : GROUPS == 1 || PAGED ? 40 : 24>(); /* all threads lend */
  if constexpr (worker::APART) {
    mine.choose_all(x);
  } else {
    if (PAGED || threadIdx.x % 128 == 0) load_keys<HEADS, D>(x, j, m);
    if (PAGED && parts > 1) {
      __syncwarp();
      cluster_sync();
      cluster_sync();
    }
  }
}

/* MoBA's dot products come with one head a KV head, or few. */
template <class T, int D> const void *instance(int heads, bool dot) {
  using X = rgk_topk90_params;
  if (dot) return heads == 4 ? (const void *)topk<T, 4, D, true, X> : nullptr;
  return heads == 4    ? (const void *)topk<T, 4, D, false, X>
         : heads == 8  ? (const void *)topk<T, 8, D, false, X>
         : heads == 16 ? (const void *)topk<T, 16, D, false, X>
                       : nullptr;
}
template <class T, int D> const void *over_pages(int heads, bool) {
  using X = rgk_topk90_paged;
  return heads == 4    ? (const void *)topk<T, 4, D, false, X>
         : heads == 8  ? (const void *)topk<T, 8, D, false, X>
         : heads == 16 ? (const void *)topk<T, 16, D, false, X>
                       : nullptr;
}
#ifdef RGK_DEV
#define OF_WIDTH(get) \
  width == 64 ? get<T, 64>(heads, dot) : width == 128 ? get<T, 128>(heads, dot) : nullptr
#else
#define OF_WIDTH(get)                      \
  width == 64    ? get<T, 64>(heads, dot)  \
  : width == 96  ? get<T, 96>(heads, dot)  \
  : width == 128 ? get<T, 128>(heads, dot) \
  : width == 192 ? get<T, 192>(heads, dot) \
  : width == 256 ? get<T, 256>(heads, dot) \
                 : nullptr
#endif
template <class T> const void *instance(int heads, int width, bool dot, bool paged) {
  return paged ? OF_WIDTH(over_pages) : OF_WIDTH(instance);
}

} // namespace

static const void *of_type(rg_dtype type, int heads, int width, bool dot, bool paged) {
#ifndef RGK_DEV
  if (type == RG_F16) return instance<__half>(heads, width, dot, paged);
#endif
  return type == RG_BF16 ? instance<__nv_bfloat16>(heads, width, dot, paged) : nullptr;
}
const void *rgk_topk90(rg_dtype type, int heads, int width, bool dot) {
  return of_type(type, heads, width, dot, false);
}
const void *rgk_topk90_over_pages(rg_dtype type, int heads, int width) {
  return of_type(type, heads, width, false, true);
}
