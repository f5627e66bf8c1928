/* kernels/attn/gather_fwd_sm90.cu: forward of attention over selected blocks, driven by the queries
   (see gather.h).

     warp of queries  hands each warpgroup its part of the next tile, and has the copy engine fetch
                      its rows of q
     warp of plans    merges the queries' rows of idx (a lane holds one unit's place in its row):
                      which keys come next, for which units; PLANS of them ahead
     thread of keys   has each plan's keys fetched into the next stage, and labels it
     warpgroups       take each stage in turn, work on it if one of their units is among those, and
                      give it back:
                      S = Q K^T    p = exp2(S c - m)    O += p V    with p and O in registers

   To find the next block takes a warp several hundred cycles, which is as long as its keys take on
   their way; so one warp finds, another fetches. Thread blocks stay and take tiles in turn; those
   who load run ahead into the next tile while the warpgroups finish. Weights are multiplied with V
   in two steps, the second made while the first is multiplied.

   Keys past a sequence's end are masked; their rows of V are cleared, since 0 · NaN would spread.
   (A NaN in V can reach a query beside one that selected it, of the same sequence.)
 */
#include "attn.cuh"
#include "../device/element.cuh"
#include "../device/softmax.cuh"
#include "../device/tma.cuh"
#include "../device/wgmma.cuh"
#include "gather.cuh"
#include "gather.h"

using namespace rgk;
using namespace rgk::by_queries;

namespace {

enum named : int { EACH = 1 }; /* first id, of one for each warpgroup */

enum {
  ROWS = RGK_GATHER_ROWS,
  GROUPS = RGK_GATHER_GROUPS,
  UNITS = RGK_GATHER_UNITS,
  PANEL = RGK_GATHER_PANEL,
  PLANS = 16,
  LOADING_REGS = 56, /* of a thread */
  REGS = 152,
  NONE = 0x7fffffff
};
static_assert((int)KEYS == (int)RGK_GATHER_KEYS);
static_assert((int)ROWS * 4 == (int)KEYS, "a warpgroup's rows of q fill panels like a stage's");

/* A tile: queries of one sequence, heads of one KV head. */
enum job_kind : int { WORK, DEAD_ROWS, EXIT };
struct alignas(16) job {
  int kind;
  int row, n; /* first row of q; how many */
  int kh, part;
  int keys;         /* of the sequence */
  int64_t position; /* of the first query */
};

/* What a stage holds: keys [first, end) of a selected block, KEYS at most, for the units in
 * `mask`. */
struct alignas(16) label {
  uint32_t mask;
  int first, end, last; /* last: of the tile */
};

/* What to fetch: with a label, keys of head kh from row `row` on (of page `page`). */
enum plan_kind : int { KEYS_OF_SOME, NOTHING, NO_MORE };
struct alignas(16) plan {
  label to;
  int row, kh, kind, page;
};

template <int D, int E> struct shared {
  static constexpr int STAGES = RGK_GATHER_STAGES(D, E), DP = (D + 63) / 64, EP = (E + 63) / 64;
  alignas(1024) char data[STAGES][(DP + EP) * PANEL];
  char q[GROUPS][DP * PANEL];
  label labels[STAGES];
  job jobs[GROUPS];
  plan plans[PLANS];
  uint64_t planned[PLANS], taken[PLANS]; /* the plan is there; read */
  uint64_t full[STAGES], empty[STAGES];  /* label and keys are there; given back */
  uint64_t q_full[GROUPS], q_empty[GROUPS];
};

/* ---- tiles ---- */

/* Where a sequence's keys are: their first row, or its table. */
struct in_rows {
  int row;
};
struct in_pages {
  const int32_t *table;
};
__device__ __forceinline__ const rgk_gather &gather_of(const rgk_gather &p) {
  return p;
}
__device__ __forceinline__ const rgk_gather &gather_of(const rgk_gather_paged &p) {
  return p.g;
}
__device__ __forceinline__ void find_rows(const rgk_gather &p, const tile &t, job &j, in_rows &at) {
  const key_span span = keys_of(p.a, t.b);
  j.keys = (int)max(span.n, (int64_t)0);
  j.position = t.first + first_position(p.a, t.b);
  at.row = (int)span.row;
}
__device__ __forceinline__ void find_rows(const rgk_gather_paged &p, const tile &t, job &j,
                                          in_pages &at) {
  const rgk_pages &g = p.pages;
  const int64_t n = g.context[t.b * g.context_step];
  const bool bad = n < t.length || n > (int64_t)g.most * g.tokens;
  j.keys = bad ? 0 : (int)n;
  j.position = t.first + (bad ? 0 : n - t.length);
  at.table = g.table + t.b * g.table_row;
}
template <class P> struct place_of { using type = in_rows; };
template <> struct place_of<rgk_gather_paged> { using type = in_pages; };
template <class P> using place_in = typename place_of<P>::type;

/* Says where key `first` is, and those after it in a stage. */
__device__ __forceinline__ void find_key(const rgk_gather &, const in_rows &at, int first,
                                         plan &x) {
  x.row = at.row + first;
  x.page = 0;
}
__device__ __forceinline__ void find_key(const rgk_gather_paged &p, const in_pages &at, int first,
                                         plan &x) {
  const int m = (int)((uint32_t)first / (uint32_t)p.pages.rows);
  x.row = first - m * p.pages.rows;
  x.page = at.table[m];
}
__device__ __forceinline__ void fetch(const rgk_gather &, void *to, const rgk_map *map,
                                      uint64_t *bar, int column, const plan &x) {
  tma_load(to, map, bar, column, x.kh, x.row);
}
__device__ __forceinline__ void fetch(const rgk_gather_paged &, void *to, const rgk_map *map,
                                      uint64_t *bar, int column, const plan &x) {
  tma_load(to, map, bar, column, x.kh, x.row, x.page);
}

/* Tile `id`: heads side by side run fastest, then queries from the last to the first (the heavy
 * tiles of a sequence come first). False: it is empty. */
template <class P>
__device__ __forceinline__ bool find_job(const P &all, int id, job &j, place_in<P> &at) {
  const rgk_gather &p = gather_of(all);
  const int turn = id / (p.slots * p.side), in = id - turn * p.slots * p.side, slot = in / p.side,
            hp = turn * p.side + (in - slot * p.side);
  const tile t = find_tile(p.a.seqs, p.slots - 1 - slot, p.queries);
  if (t.n == 0) return false;
  j.kind = t.b < p.a.seqs.n ? WORK : DEAD_ROWS;
  j.row = (int)(t.begin + t.first);
  j.n = t.n;
  j.kh = hp / p.parts;
  j.part = hp % p.parts;
  j.keys = 0;
  j.position = 0;
  if (j.kind == WORK) find_rows(all, t, j, at);
  return true;
}

/* Goes through a thread block's tiles; every other round goes backwards, so that sums of falling
 * weights come out even. */
template <class P>
__device__ __forceinline__ bool next_job(const P &all, int &round, job &j, place_in<P> &where) {
  const rgk_gather &p = gather_of(all);
  for (;;) {
    const int base = round * (int)gridDim.x, at = (int)blockIdx.x,
              id = base + (round & 1 ? (int)gridDim.x - 1 - at : at);
    if (base >= p.tiles) return false;
    round++;
    if (id < p.tiles && find_job(all, id, j, where)) return true;
  }
}

/* Where a unit lies. */
struct place {
  int64_t row, head; /* of q: its query and first head */
  int rows;          /* 0: there is none */
};
__device__ __forceinline__ place find_unit(const rgk_gather &p, const job &j, int unit) {
  place u;
  const int query = unit / p.per, from = (j.part * UNITS + unit % p.per) * ROWS;
  u.row = j.row + query;
  u.head = (int64_t)j.kh * p.a.G + from;
  u.rows = query < j.n ? max(0, min((int)ROWS, p.a.G - from)) : 0;
  return u;
}

/* ---- queries ---- */

template <int D, int E, class P>
__device__ __forceinline__ void load_queries(const P &all, shared<D, E> &s) {
  using memory = shared<D, E>;
  const rgk_gather &p = gather_of(all);
  const int lane = threadIdx.x % 32;
  int round = 0;
  place_in<P> at;
  uint32_t parity = 1;
  bool more = true;
  for (job j; more; parity ^= 1) {
    more = next_job(all, round, j, at);
    if (!more) j.kind = EXIT;
    for (int g = 0; g < GROUPS; g++) {
      bar_wait(&s.q_empty[g], parity);
      if (lane == 0) {
        s.jobs[g] = j;
        if (j.kind == WORK)
          bar_expect(&s.q_full[g], memory::DP * PANEL);
        else
          bar_ready(&s.q_full[g]);
      }
      __syncwarp();
      if (j.kind == WORK && lane < 4 * memory::DP) {
        const int y = lane % 4, x = lane / 4;
        const place u = find_unit(p, j, 4 * g + y);
        tma_load(s.q[g] + x * PANEL + y * ROWS * 128, &p.q, &s.q_full[g], x * 64, (int)u.head,
                 (int)u.row, l2::evict_first);
      }
    }
  }
}

/* ---- keys ---- */

/* A lane's place in the row of idx of its unit's query. */
struct walk {
  const int32_t *idx;
  int hi, blocks;      /* keys that the query sees; blocks that begin among them */
  int at, next, ahead; /* ahead: entry `at`, fetched early; NONE past the last */
};
__device__ __forceinline__ void begin(const rgk_gather &p, const job &j, walk &w) {
  const int lane = threadIdx.x % 32;
  const place u = find_unit(p, j, lane);
  const int query = lane / p.per;
  w.at = lane < UNITS && u.rows > 0 && j.kind == WORK ? 0 : p.a.N;
  w.hi = (int)visible(p.a, j.position + query, j.keys).hi;
  w.blocks = w.hi > 0 ? (w.hi - 1) / p.a.block + 1 : 0;
  w.idx = (const int32_t *)p.a.idx.data + u.row * p.a.idx.row + j.kh * p.a.idx.head;
  for (int i = w.at + 8; i < p.a.N + 7; i += 8) prefetch_l1(w.idx + min(i, p.a.N - 1));
  w.ahead = w.at < p.a.N ? w.idx[0] : NONE;
}
/* The next entry that counts. */
__device__ __forceinline__ int next_block(const rgk_gather &p, walk &w, int before) {
  int e;
  do {
    e = w.ahead;
    w.ahead = ++w.at < p.a.N ? w.idx[w.at] : NONE;
  } while (e <= before);
  if (e < w.blocks) return e;
  w.at = p.a.N; /* what follows is further out, or not larger */
  w.ahead = NONE;
  return NONE;
}

template <int D, int E, class P>
__device__ __forceinline__ void plan_keys(const P &all, shared<D, E> &s) {
  const rgk_gather &p = gather_of(all);
  const int lane = threadIdx.x % 32;
  ring<PLANS> r;
  auto hand_over = [&](const plan &x) {
    if (lane == 0) { /* one that looks after the plan was taken would wait for good */
      bar_wait(&s.taken[r.stage], r.parity ^ 1);
      s.plans[r.stage] = x;
      bar_ready(&s.planned[r.stage]);
    }
    r.next();
  };
  int round = 0;
  place_in<P> coming_at;
  job coming;
  walk w;
  bool more = next_job(all, round, coming, coming_at);
  if (more) begin(p, coming, w);
  while (more) {
    const job j = coming;
    const place_in<P> at = coming_at;
    walk x = w;
    more = next_job(all, round, coming, coming_at);
    if (more) begin(p, coming, w);
    if (j.kind != WORK) continue;
    x.next = next_block(p, x, -1);
    int block = __reduce_min_sync(~0u, x.next);
    do { /* at least one stage, perhaps for nobody */
      const bool any = block != NONE, mine = any && x.next == block;
      const uint32_t mask = __ballot_sync(~0u, mine);
      const int first = any ? block * p.a.block : 0, end = first + min(p.a.block, j.keys - first);
      int seen = 1; /* of the block's keys, by those who chose it: says how many stages */
      if (p.a.block > KEYS) seen = __reduce_max_sync(~0u, mine ? min(x.hi, end) - first : 1);
      if (mine) x.next = next_block(p, x, block);
      block = __reduce_min_sync(~0u, x.next);
      for (int from = 0; from < seen; from += KEYS) {
        plan y = {{mask, first + from, end, block == NONE && from + KEYS >= seen},
                  0,
                  j.kh,
                  any ? KEYS_OF_SOME : NOTHING,
                  0};
        if (any) find_key(all, at, first + from, y);
        hand_over(y);
      }
    } while (block != NONE);
  }
  hand_over({{}, 0, 0, NO_MORE, 0});
}

/* By one thread. */
template <int D, int E, class P>
__device__ __forceinline__ void load_keys(const P &all, shared<D, E> &s) {
  using memory = shared<D, E>;
  const rgk_gather &p = gather_of(all);
  ring<PLANS> at;
  ring<memory::STAGES> r;
  for (;; at.next(), r.next()) {
    bar_wait(&s.planned[at.stage], at.parity);
    const plan x = s.plans[at.stage];
    bar_release(&s.taken[at.stage], x.to.last, x.kind);
    if (x.kind == NO_MORE) break;
    bar_wait(&s.empty[r.stage], r.parity ^ 1);
    s.labels[r.stage] = x.to;
    if (x.kind == NOTHING) {
      bar_ready(&s.full[r.stage]);
      continue;
    }
    bar_expect(&s.full[r.stage], (memory::DP + memory::EP) * PANEL);
#pragma unroll
    for (int i = 0; i < memory::DP; i++)
      fetch(all, s.data[r.stage] + i * PANEL, &p.k, &s.full[r.stage], i * 64, x);
#pragma unroll
    for (int i = 0; i < memory::EP; i++)
      fetch(all, s.data[r.stage] + (memory::DP + i) * PANEL, &p.v, &s.full[r.stage], i * 64, x);
  }
}

/* ---- the warpgroups ---- */

/* Of s the first `limit` columns are seen. */
__device__ __forceinline__ void mask(float (&s)[KEYS / 2], int limit) {
  if (limit >= KEYS) return;
  const int seen = limit - (int)threadIdx.x % 4 * 2;
  each(s, [&](float &z, int, int column) {
    if (column >= seen) z = -INFINITY;
  });
}

/* Rows of V from `from` on are zeroed, by this warpgroup for itself. */
template <int E> __device__ __forceinline__ void clear_tail(char *v, int from, int group) {
#pragma unroll 1
  for (int x = 0; x < (E + 63) / 64; x++)
#pragma unroll 1
    for (int i = from * 8 + (int)(threadIdx.x % 128); i < KEYS * 8; i += 128)
      *(uint4 *)(v + x * PANEL + i * 16) = make_uint4(0, 0, 0, 0);
  proxy_fence();
  named_sync(EACH + group, WARPGROUP);
}

template <class T, int E>
__device__ __forceinline__ void clear_rows(const rgk_gather &p, const place &u) {
  const int lane = threadIdx.x % 32;
  T *o = (T *)p.a.o.data + u.row * p.a.o.row + u.head * p.a.o.head;
  for (int i = lane; i < u.rows * (E / 8); i += 32)
    *(uint4 *)(o + i / (E / 8) * p.a.o.head + i % (E / 8) * 8) = make_uint4(0, 0, 0, 0);
  if (p.a.lse.data && lane < u.rows)
    ((float *)p.a.lse.data)[u.row * p.a.lse.row + (u.head + lane) * p.a.lse.head] = 0;
}

/* Sums become averages, with the sink; o and lse are written. */
template <class T, int E>
__device__ __forceinline__ void finish(const rgk_gather &p, const place &u, float (&o)[E / 2],
                                       rows2 &x, float c) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float l = x.l[h];
    l += __shfl_xor_sync(~0u, l, 1);
    l += __shfl_xor_sync(~0u, l, 2);
    const int row = g + 8 * h;
    if (row >= u.rows) continue;
    const float sink = p.a.sinks.data
                           ? load(p.a.sinks.data, p.a.sinks.dtype, (u.head + row) * p.a.sinks.row)
                           : -INFINITY;
    const row_end end = finish_row(x.m[h] * c, l, sink);
    const float f = end.scale;
    T *to = (T *)p.a.o.data + u.row * p.a.o.row + (u.head + row) * p.a.o.head + 2 * t;
#pragma unroll
    for (int i = 0; i < E / 8; i++)
      *(uint32_t *)(to + 8 * i) =
          f == 0 ? 0 : pack2<T>(o[4 * i + 2 * h] * f, o[4 * i + 2 * h + 1] * f);
    if (p.a.lse.data && t == 0)
      ((float *)p.a.lse.data)[u.row * p.a.lse.row + (u.head + row) * p.a.lse.head] = end.lse;
  }
}

template <class T, int D, int E> struct consumer {
  using memory = shared<D, E>;
  const rgk_gather &p;
  memory &s;
  const int group, lane, warp, unit;
  const float softcap, c, to;      /* scores to powers of two, without and with a cap */
  const uint64_t q_at, k_at, v_at; /* of the warpgroup's q, of the first stage */
  ring<memory::STAGES> r;
  int64_t position; /* of the unit's query */
  int keys;         /* of the sequence */
  rows2 x;

  /* z = q kᵀ */
  __device__ __forceinline__ void start_scores(float (&z)[KEYS / 2], int stage) {
    const uint64_t k = desc_on(k_at, stage * sizeof s.data[0]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      const uint32_t at = i / 4 * PANEL + i % 4 * 32;
      wgmma<T, KEYS>::template ss<>(z, desc_on(q_at, at), desc_on(k, at), i > 0);
    }
    wgmma_commit();
  }
  /* Steps i and i + 1 of o += p v. */
  template <int i>
  __device__ __forceinline__ void add32(float (&o)[E / 2], const float (&z)[KEYS / 2],
                                        uint32_t (&a)[KEYS / 4], uint64_t v, bool on,
                                        const float (&minus)[2]) {
    if (on) {
      weigh16<T, i>(z, a, x, c, minus);
      weigh16<T, i + 1>(z, a, x, c, minus);
    } else {
#pragma unroll
      for (int j = 0; j < 8; j++) a[4 * i + j] = 0;
    }
    wgmma_fence();
    wgmma<T, E>::template rs<true>(o, a + 4 * i, desc_on(v, i * 2048), 1);
    wgmma<T, E>::template rs<true>(o, a + 4 * i + 4, desc_on(v, i * 2048 + 2048), 1);
    wgmma_commit();
  }
  /* The stage's label, read by the thread that gives the stage back. */
  __device__ __forceinline__ label read_label() {
    label y = {};
    if (lane == 0) y = s.labels[r.stage];
    y.mask = __shfl_sync(~0u, y.mask, 0);
    y.first = __shfl_sync(~0u, y.first, 0);
    y.end = __shfl_sync(~0u, y.end, 0);
    y.last = __shfl_sync(~0u, y.last, 0);
    return y;
  }

  /* Adds the stage's keys. */
  __device__ __forceinline__ waited add(float (&o)[E / 2], const label &y) {
    char *at_v = s.data[r.stage] + memory::DP * PANEL;
    const uint64_t v = desc_on(v_at, r.stage * sizeof s.data[0]);
    const int limit = y.mask >> unit & 1 ? (int)min(position + 1 - y.first,
                                                    (int64_t)min(y.end - y.first, (int)KEYS))
                                         : 0;
    const bool on = limit > 0;
    float z[KEYS / 2], minus[2] = {0, 0};
    uint32_t a[KEYS / 4];
    if (keys - y.first < KEYS) clear_tail<E>(at_v, keys - y.first, group);
    start_scores(z, r.stage);
    wgmma_wait<0>();
    wgmma_keep(z);
    if (on) {
      if (softcap > 0) cap(z, softcap, to);
      mask(z, limit);
      float scale[2];
      if (refer(z, x, scale, c)) each(o, [&](float &a, int i, int) { a *= scale[i]; });
#pragma unroll
      for (int h = 0; h < 2; h++) minus[h] = x.m[h] == -INFINITY ? 0 : -x.m[h] * c;
    }
    add32<0>(o, z, a, v, on, minus);
    add32<2>(o, z, a, v, on, minus);
    const waited done = wgmma_wait<0>();
    wgmma_keep(o);
    wgmma_keep(a);
    return done;
  }

  __device__ __forceinline__ void run() {
    for (uint32_t parity = 0;; parity ^= 1) {
      bar_wait(&s.q_full[group], parity);
      const job j = s.jobs[group];
      if (j.kind == EXIT) break;
      const place u = find_unit(p, j, unit);
      if (j.kind == DEAD_ROWS) {
        bar_release(&s.q_empty[group], j.n, j.keys);
        clear_rows<T, E>(p, u);
        continue;
      }
      keys = j.keys;
      position = j.position + unit / p.per;
      float o[E / 2];
#pragma unroll
      for (int i = 0; i < E / 2; i++) o[i] = 0;
#pragma unroll
      for (int h = 0; h < 2; h++) x.m[h] = -INFINITY, x.l[h] = 0;
      waited done = waited::for_nothing();
      for (bool last = false; !last; r.next()) {
        bar_wait(&s.full[r.stage], r.parity);
        const label y = read_label();
        if (y.mask >> 4 * group & 15) done = add(o, y);
        last = y.last;
        warp_release(&s.empty[r.stage], done, y.last);
      }
      bar_release(&s.q_empty[group], done, j.n, j.keys);
      finish<T, E>(p, u, o, x, c);
    }
  }
};

template <class T, int D, int E, class P>
__global__ void __launch_bounds__(RGK_GATHER_THREADS, 1) forward(const __grid_constant__ P all) {
  const rgk_gather &p = gather_of(all);
  extern __shared__ char memory[];
  using layout = shared<D, E>;
  layout &s = *(layout *)(memory + (-smem_at(memory) & 1023));
  static_assert(sizeof(layout) + 1024 <= RGK_GATHER_BYTES(D, E), "fits wherever it starts");
  if (threadIdx.x == 0) {
    for (int i = 0; i < layout::STAGES; i++)
      bar_init(&s.full[i], 1), bar_init(&s.empty[i], UNITS * WARP_ARRIVALS);
    for (int i = 0; i < PLANS; i++) bar_init(&s.planned[i], 1), bar_init(&s.taken[i], 1);
    for (int g = 0; g < GROUPS; g++) bar_init(&s.q_full[g], 1), bar_init(&s.q_empty[g], 128);
    bar_init_done();
    map_prefetch(&p.q), map_prefetch(&p.k), map_prefetch(&p.v);
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0), warp = threadIdx.x / 32 % 4;
  if (group < GROUPS) {
    more_registers<REGS>();
    consumer<T, D, E> x{p,
                        s,
                        group,
                        (int)threadIdx.x % 32,
                        warp,
                        4 * group + warp,
                        p.a.softcap,
                        p.a.softcap > 0 ? LOG2E : p.a.scale * LOG2E,
                        p.a.scale / p.a.softcap * 2 * LOG2E,
                        desc_k(smem_at(s.q[group])),
                        desc_k(smem_at(s.data[0])),
                        desc_mn(smem_at(s.data[0] + layout::DP * PANEL), PANEL)};
    x.run();
  } else {
    fewer_registers<LOADING_REGS>();
    if (threadIdx.x % 128 == 0) load_keys<D, E>(all, s);
    if (warp == 1) load_queries<D, E>(all, s);
    if (warp == 2) plan_keys<D, E>(all, s);
  }
}

} // namespace

#define INSTANCE(dtype, d, e)                                                          \
  if (t == dtype && D == d && E == e)                                                  \
    return paged ? (const void *)forward<element<dtype>::type, d, e, rgk_gather_paged> \
                 : (const void *)forward<element<dtype>::type, d, e, rgk_gather>;

const void *rgk_gather_fwd(rg_dtype t, int32_t D, int32_t E, bool paged) {
  INSTANCE(RG_BF16, 128, 128)
  INSTANCE(RG_BF16, 64, 64)
  INSTANCE(RG_F16, 64, 64)
#ifndef RGK_DEV
  INSTANCE(RG_F16, 128, 128)
  INSTANCE(RG_BF16, 96, 96)
  INSTANCE(RG_F16, 96, 96)
  INSTANCE(RG_BF16, 192, 128)
  INSTANCE(RG_F16, 192, 128)
#endif
  return nullptr;
}
