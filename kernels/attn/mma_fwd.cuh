/* kernels/attn/mma_fwd.cuh: attention's forward on the tensor cores of any GPU since Ampere.

       s = scale · q kᵀ (capped), masked     p = exp(s − m)     o = Σ p v / Σ p

   A team (mma.h) has its rows of q in shared memory, or in registers where those are enough, and
   room for one tile of K and one of V. Per tile of keys, C the copies under way:

       K is there │ S = q kᵀ          │ V is there │ p = softmax(S)   o += p V    │ next tile
       C: V       └ all done with K ─▶│ C: K of the next tile                     │ C: V
                                      all done with V before the next tile ───────┘

   Two or three blocks, or many teams of one warp, share a multiprocessor, so one multiplies while
   another waits. S, p and o stay in registers: the accumulators of S, packed, are the A of p V.

   Dense keys are walked from the last tile to the first, tiles beginning at multiples of N;
   selected blocks upwards, the union of what the team's queries chose, each in parts of N keys.
   What a row does not see counts as −inf. A warp passes over tiles of which its rows see nothing,
   and such a tile would change no bit: m stays, p is 0.

   m is a reference rather than the maximum: it moves only when a row's maximum exceeds it by LAZY
   powers of two. Whether it moves depends on that row alone, so neighbours change no bit.

   Keys past a tile's end arrive as zeros. (A NaN in V can reach a query of the same sequence that
   does not see it, beside one that does.)
 */
#include "../device/mma.cuh"
#include "../device/softmax.cuh"
#include "attn.cuh"
#include "mma.h"

namespace rgk {
namespace mma_fwd {

template <class Type, int D_, int E_, int SHAPE_, bool SELECTED_> struct config {
  using type = Type;
  static constexpr int D = D_, E = E_, SHAPE = SHAPE_;
  static constexpr bool SELECTED = SELECTED_, ALONE = SHAPE == RGK_MMA_ONE;
  static constexpr int ROWS = rgk_mma_rows(SHAPE), N = rgk_mma_keys(SHAPE),
                       TEAMS = rgk_mma_teams(SHAPE, D), THREADS = rgk_mma_threads(SHAPE, D),
                       TEAM = THREADS / TEAMS; /* threads */
  static constexpr int X = ROWS / (TEAM / 2);  /* tiles of 16 rows of a warp */
  static constexpr bool Q_REGS = D * X <= (ALONE ? 192 : 128);
  static constexpr uint32_t Q = ALONE && Q_REGS ? 0 : ROWS * pitch(D), K = N * pitch(D),
                            V = N * pitch(E), SEEN = SELECTED ? 0 : ROWS * 8 + TEAM / 32 * 16;
  /* s, o, q and some for the rest; blocks for which a multiprocessor has registers, a quarter of
   * them for each fourth warp, and room */
  static constexpr int REGS = X * (N + E) / 2 + (Q_REGS ? X * D / 4 : 0) + 56,
                       FIT = 65536 / 4 / (32 * ((REGS + 7) / 8 * 8)) * 128 / THREADS,
                       ROOM = (ALONE ? 228 : 164) * 1024 /
                              (rgk_mma_shared(SHAPE, SELECTED, D, E) + 1024),
                       BLOCKS = FIT < ROOM ? FIT : ROOM;
  static_assert(TEAMS * (Q + K + V) + SEEN == rgk_mma_shared(SHAPE, SELECTED, D, E),
                "as the host counts");
};

/* ---- which rows ---- */

/* Row r is query r / heads, of the pack's from `row` on, and head `head` + r % heads. */
struct team_rows {
  tile t;
  int64_t row;
  int kh, head, heads, n;
};

template <class C> __device__ __forceinline__ team_rows find_rows(const rgk_mma &p) {
  const rgk_attn &a = p.a;
  const int groups = (p.slots + C::TEAMS - 1) / C::TEAMS, many = groups * p.side;
  const int base = (int)blockIdx.x / many * p.side, i = (int)blockIdx.x % many;
  const int hp = base + i % p.side, kh = hp / p.parts, skip = (hp - kh * p.parts) * p.heads;
  const int slot = i / p.side * C::TEAMS + (int)threadIdx.x / C::TEAM;
  team_rows r;
  r.n = 0;
  if (slot >= p.slots) return r;
  r.t = find_tile(a.seqs, p.slots - 1 - slot, p.queries); /* the longest rows first */
  r.row = r.t.begin + r.t.first;
  r.kh = kh;
  r.head = kh * a.G + skip;
  r.heads = min(p.heads, a.G - skip);
  /* rows are counted p.heads to a query; a last part has fewer */
  r.n = r.t.n * p.heads;
  return r;
}

/* Row r of the team: query and head, or none. */
struct row_of {
  int query, head;
  bool there;
};
__device__ __forceinline__ row_of row_at(const rgk_mma &p, const team_rows &t, int r) {
  const int query = rgk_over(r, p.by_heads), head = r - query * p.heads;
  return {query, head, r < t.n && head < t.heads};
}
template <class T>
__device__ __forceinline__ T *element_at(const rgk_tensor &x, const team_rows &t, row_of r) {
  return (T *)x.data + (t.row + r.query) * x.row + (t.head + r.head) * x.head;
}

template <class C>
__device__ __forceinline__ void clear_rows(const rgk_mma &p, const team_rows &t, int thread) {
  constexpr int CHUNKS = C::E / 8;
  for (int i = thread; i < t.n * CHUNKS; i += C::TEAM) {
    const row_of r = row_at(p, t, i / CHUNKS);
    const int c = i % CHUNKS;
    if (!r.there) continue;
    if (c * 8 < p.a.E)
      *(uint4 *)(element_at<typename C::type>(p.a.o, t, r) + c * 8) = make_uint4(0, 0, 0, 0);
    if (c == 0 && p.a.lse.data) *element_at<float>(p.a.lse, t, r) = 0;
  }
}

/* ---- which keys ---- */

struct key_tile {
  int key, n; /* first of the sequence's keys, how many there are */
};

/* What the rows of a warp see, as keys of the sequence: what every row does, and what any. */
struct seen_keys {
  int lo_all, hi_all, lo_any, hi_any;

  __device__ __forceinline__ void of_warp() {
    lo_all = __reduce_max_sync(~0u, lo_all), lo_any = __reduce_min_sync(~0u, lo_any);
    hi_all = __reduce_min_sync(~0u, hi_all), hi_any = __reduce_max_sync(~0u, hi_any);
  }
};

/* Contiguous keys: tiles from the last to the first. What rows see is in shared memory: few tiles
 * ask. */
template <class C> struct dense_walk {
  int at, first, n;

  /* `table`: room for what each of the team's rows sees, then for each warp's seen_keys; `mine`:
   * the thread's first row. */
  __device__ __forceinline__ dense_walk(const rgk_mma &p, const team_rows &t, key_span span,
                                        int2 *table, int mine) {
    const int64_t position = t.t.first + first_position(p.a, t.t.b);
    seen_keys seen = {0, INT_MAX, INT_MAX, 0};
#pragma unroll
    for (int i = 0; i < 2 * C::X; i++) {
      const row_of r = row_at(p, t, mine + i * 8);
      const key_range k = r.there ? visible(p.a, position + r.query, span.n) : key_range{0, 0};
      const int lo = (int)min(k.lo, span.n), hi = (int)k.hi;
      if (threadIdx.x % 4 == 0) table[mine + i * 8] = make_int2(lo, hi);
      seen.lo_all = max(seen.lo_all, lo), seen.lo_any = min(seen.lo_any, lo);
      seen.hi_all = min(seen.hi_all, hi), seen.hi_any = max(seen.hi_any, hi);
    }
    seen.of_warp();
    if (threadIdx.x % 32 == 0) *of_warp(table) = seen;
    __syncwarp();
    n = (int)span.n;
    const key_range low = visible(p.a, position, span.n),
                    high = visible(p.a, position + t.t.n - 1, span.n);
    first = (int)min(low.lo, span.n) / C::N * C::N;
    at = low.lo < high.hi ? ((int)high.hi + C::N - 1) / C::N * C::N : first;
  }
  static __device__ __forceinline__ seen_keys *of_warp(int2 *table) {
    return (seen_keys *)(table + C::ROWS) + threadIdx.x / 32;
  }
  __device__ __forceinline__ bool step(const rgk_mma &, key_tile &k) {
    at -= C::N;
    k = {at, min(C::N, n - at)};
    return at >= first;
  }
  __device__ __forceinline__ seen_keys enter(const rgk_mma &, int2 *table, int, int) {
    return *of_warp(table);
  }
  /* What the thread's row mine + 8i sees. */
  __device__ __forceinline__ int2 of_row(int2 *table, int mine, int i) const {
    return table[mine + i * 8];
  }
};

/* Selected blocks: lane i looks after query i, whose list it goes through; every warp of a team
 * does. A step is taken before the tile before it is worked on. */
template <class C> struct selected_walk {
  static constexpr int NONE = 0x7fffffff;
  int to[2 * C::X]; /* of the thread's rows, in the tile entered */
  int n;
  const int32_t *idx; /* of this lane's query */
  int at, ahead;      /* entries taken; the one after them, already loaded */
  int next, hi;       /* its block that is still to come; the query's keys */
  int block, part;
  int lane_to; /* end of what this lane's query sees of the tile stepped to; 0: nothing */

  __device__ __forceinline__ void find_next(const rgk_attn &a) {
    const int before = next;
    next = NONE;
    while (at < a.N) {
      const int e = ahead;
      at++;
      ahead = at < a.N ? idx[at] : 0;
      if (e <= before) continue;
      if ((int64_t)e * a.block < hi)
        next = e;
      else
        at = a.N; /* what follows is further out, or not larger */
      return;
    }
  }

  __device__ __forceinline__ selected_walk(const rgk_mma &p, const team_rows &t, key_span span,
                                           int2 *, int) {
    const int lane = (int)threadIdx.x % 32;
    n = (int)span.n, part = 0;
    next = NONE;
    hi = 0;
    if (lane < t.t.n) {
      const int64_t position = t.t.first + lane + first_position(p.a, t.t.b);
      hi = (int)visible(p.a, position, span.n).hi;
      idx = (const int32_t *)p.a.idx.data + (t.row + lane) * p.a.idx.row + t.kh * p.a.idx.head;
      at = 0;
      ahead = p.a.N > 0 ? idx[0] : 0;
      next = -1;
      find_next(p.a);
    }
  }

  __device__ __forceinline__ bool step(const rgk_mma &p, key_tile &k) {
    if (part == 0) {
      block = __reduce_min_sync(~0u, next);
      if (block == NONE) return false;
    }
    const int64_t begin = (int64_t)block * p.a.block;
    k.key = (int)begin + part * C::N;
    k.n = (int)min((int64_t)min(C::N, n - k.key), begin + p.a.block - k.key);
    const bool mine = next == block;
    lane_to = mine ? min(hi, k.key + k.n) : 0;
    part++;
    if (!__any_sync(~0u, mine && part < p.key_parts && hi > k.key + C::N)) {
      if (mine) find_next(p.a);
      part = 0;
    }
    return true;
  }
  /* The team has `rows` rows, of which the thread's first is `mine`. */
  __device__ __forceinline__ seen_keys enter(const rgk_mma &p, int2 *, int rows, int mine) {
    seen_keys seen = {0, INT_MAX, 0, 0};
#pragma unroll
    for (int i = 0; i < 2 * C::X; i++) {
      const int r = mine + i * 8, end = __shfl_sync(~0u, lane_to, rgk_over(r, p.by_heads));
      to[i] = r < rows ? end : 0;
      seen.hi_all = min(seen.hi_all, to[i]), seen.hi_any = max(seen.hi_any, to[i]);
    }
    seen.hi_all = __reduce_min_sync(~0u, seen.hi_all);
    seen.hi_any = __reduce_max_sync(~0u, seen.hi_any);
    return seen;
  }
  __device__ __forceinline__ int2 of_row(int2 *, int, int i) const {
    return make_int2(0, to[i]);
  }
};

template <class C, bool = C::SELECTED> struct walk_of { using type = dense_walk<C>; };
template <class C> struct walk_of<C, true> { using type = selected_walk<C>; };

/* ---- load ---- */

template <class C> __device__ __forceinline__ void team_sync() {
  if (C::ALONE)
    __syncwarp();
  else
    __syncthreads();
}

/* A tile of K or V, W wide, of the sequence whose keys begin at row `row`. */
template <class C, int W>
__device__ __forceinline__ void copy_keys(uint32_t to, const rgk_tensor &x, int row, int kh,
                                          int width, key_tile k, int thread) {
  const int64_t step = x.row * 2;
  const char *const base = (const char *)x.data + (int64_t)(row + k.key) * step + kh * x.head * 2;
  copy_rows<W, C::N, C::TEAM>(to, thread, width, base, [&](int r) {
    return r < k.n ? base + r * step : (const char *)nullptr;
  });
}

/* ---- compute ---- */

/* Rows of q as the A of D / 16 steps: in registers, or loaded for each tile of keys anew. `at`:
 * mma_at_rows of the warp's. */
template <class C> struct queries {
  uint32_t reg[C::Q_REGS ? C::X : 1][C::Q_REGS ? C::D / 4 : 1];

  __device__ __forceinline__ void load(uint32_t at) {
    if constexpr (C::Q_REGS) {
#pragma unroll
      for (int x = 0; x < C::X; x++)
#pragma unroll
        for (int k = 0; k < C::D / 16; k++)
          load_matrices(on<C::D>(at + x * 16 * pitch(C::D), 2 * k), reg[x] + 4 * k);
    }
  }
  __device__ __forceinline__ void step(uint32_t at, int x, int k, uint32_t (&a)[4]) const {
    if constexpr (C::Q_REGS) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = reg[x][4 * k + i];
    } else {
      load_matrices(on<C::D>(at + x * 16 * pitch(C::D), 2 * k), a);
    }
  }
};

/* s = q kᵀ; `k`: mma_at_columns of the tile. */
template <class C>
__device__ __forceinline__ void products(float (&s)[C::X][C::N / 2], const queries<C> &q,
                                         uint32_t q_at, uint32_t k) {
#pragma unroll
  for (int x = 0; x < C::X; x++)
#pragma unroll
    for (int i = 0; i < C::N / 2; i++) s[x][i] = 0;
#pragma unroll
  for (int d = 0; d < C::D / 16; d++) {
    uint32_t a[C::X][4];
#pragma unroll
    for (int x = 0; x < C::X; x++) q.step(q_at, x, d, a[x]);
#pragma unroll
    for (int j = 0; j < C::N / 16; j++) {
      uint32_t b[4];
      load_matrices(on<C::D>(k, 2 * d) + j * 16 * pitch(C::D), b);
#pragma unroll
      for (int x = 0; x < C::X; x++) {
        mma<typename C::type>(s[x] + 8 * j, a[x], b);
        mma<typename C::type>(s[x] + 8 * j + 4, a[x], b + 2);
      }
    }
  }
}
/* o += p v; `v`: mma_at_rows of the tile. */
template <class C>
__device__ __forceinline__ void add_values(float (&o)[C::X][C::E / 2],
                                           const float (&p)[C::X][C::N / 2], uint32_t v) {
#pragma unroll
  for (int k = 0; k < C::N / 16; k++) {
    uint32_t a[C::X][4];
#pragma unroll
    for (int x = 0; x < C::X; x++) pack_a<typename C::type>(a[x], p[x] + 8 * k);
#pragma unroll
    for (int j = 0; j < C::E / 16; j++) {
      uint32_t b[4];
      load_transposed(on<C::E>(v + k * 16 * pitch(C::E), 2 * j), b);
#pragma unroll
      for (int x = 0; x < C::X; x++) {
        mma<typename C::type>(o[x] + 8 * j, a[x], b);
        mma<typename C::type>(o[x] + 8 * j + 4, a[x], b + 2);
      }
    }
  }
}

/* Columns outside lo … hi − 1 of the thread's row y become −inf; both count from its first
 * column. */
template <int n> __device__ __forceinline__ void mask(float (&s)[n], int y, int lo, int hi) {
#pragma unroll
  for (int i = 0; i < n / 4; i++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (8 * i + e < lo || 8 * i + e >= hi) s[4 * i + 2 * y + e] = -INFINITY;
}

/* Of a thread's two rows of 16: reference, raw; this thread's share of the sum. */
struct row_state {
  float m[2], l[2];
};

/* s → p, unrounded; l grows; scale: what o must be multiplied by. `c`: s to powers of two. */
template <int n>
__device__ __forceinline__ void softmax(float (&s)[n], row_state &r, float (&scale)[2], float c) {
#pragma unroll
  for (int y = 0; y < 2; y++) {
    float a = s[2 * y], b = s[2 * y + 1];
#pragma unroll
    for (int i = 1; i < n / 4; i++)
      a = fmaxf(a, s[4 * i + 2 * y]), b = fmaxf(b, s[4 * i + 2 * y + 1]);
    const float top = quad_max(fmaxf(a, b)), old = r.m[y];
    const bool move = (top - old) * c > LAZY; /* −inf − −inf: no */
    r.m[y] = move ? top : old;
    scale[y] = move ? exp2_fast((old - top) * c) : 1;
    const float minus = r.m[y] == -INFINITY ? 0 : -r.m[y] * c;
    float sum = r.l[y] * scale[y];
#pragma unroll
    for (int i = 0; i < n / 4; i++) {
      float &u = s[4 * i + 2 * y], &v = s[4 * i + 2 * y + 1];
      u = exp2_fast(fmaf(u, c, minus));
      v = exp2_fast(fmaf(v, c, minus));
      sum += u + v;
    }
    r.l[y] = sum;
  }
}

/* ---- epilogue ---- */

/* Turns sums into averages, with the sink; o and lse leave. `at`: room for the warp's rows, its
 * own; `first`: the first of them in the team. */
template <class C>
__device__ __forceinline__ void write(const rgk_mma &p, const team_rows &t,
                                      float (&o)[C::X][C::E / 2], row_state (&r)[C::X], float c,
                                      uint32_t at, int first) {
  const int lane = (int)threadIdx.x % 32;
  __syncwarp(); /* rows of q that others of the warp loaded: without keys, no barrier came since */
#pragma unroll
  for (int i = 0; i < 2 * C::X; i++) {
    const int x = i / 2, y = i % 2, row = i * 8 + lane / 4;
    const row_of of = row_at(p, t, first + row);
    const float sink = p.a.sinks.data && of.there ? load(p.a.sinks.data, p.a.sinks.dtype,
                                                         (t.head + of.head) * p.a.sinks.row)
                                                  : -INFINITY;
    const row_end end = finish_row(r[x].m[y] * c, quad_sum(r[x].l[y]), sink);
    if (p.a.lse.data && of.there && lane % 4 == 0) *element_at<float>(p.a.lse, t, of) = end.lse;
#pragma unroll
    for (int j = 0; j < C::E / 8; j++) {
      const float u = o[x][4 * j + 2 * y], v = o[x][4 * j + 2 * y + 1];
      put_pair<C::E>(at, row, 8 * j + 2 * (lane % 4),
                     end.scale == 0 ? 0 : pack(u * end.scale, v * end.scale, typename C::type()));
    }
  }
  __syncwarp();
  constexpr int CHUNKS = C::E / 8;
#pragma unroll 4
  for (int i = lane; i < 16 * C::X * CHUNKS; i += 32) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const row_of of = row_at(p, t, first + row);
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(at + place<C::E>(row, chunk))
                 : "memory");
    if (of.there && chunk * 8 < p.a.E)
      *(uint4 *)(element_at<typename C::type>(p.a.o, t, of) + chunk * 8) = x;
  }
}

/* ---- kernel ---- */

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS)
    forward(const __grid_constant__ rgk_mma p) {
  using type = typename C::type;
  extern __shared__ __align__(128) char memory[];
  const rgk_attn &a = p.a;
  const int thread = (int)threadIdx.x % C::TEAM, warp = thread / 32, lane = thread % 32;
  const uint32_t room = smem_at(memory) + (int)threadIdx.x / C::TEAM * (C::Q + C::K + C::V),
                 k_room = room + C::Q, v_room = k_room + C::K;
  const team_rows t = find_rows<C>(p);
  if (t.n == 0) return;
  if (t.t.b == a.seqs.n) { /* dead rows */
    clear_rows<C>(p, t, thread);
    return;
  }
  const key_span span = keys_of(a, t.t.b);
  int key_row = (int)span.row, kh = t.kh;
  const int first = warp * 16 * C::X; /* the warp's rows in the team */
  /* q that one warp takes to registers goes through V's room */
  const uint32_t q_room = C::Q ? room : v_room;
  copy_rows<C::D, C::ROWS, C::TEAM>(q_room, thread, a.D, a.q.data, [&](int r) {
    const row_of of = row_at(p, t, r);
    return of.there ? element_at<const type>(a.q, t, of) : (const type *)nullptr;
  });
  int2 *const table = (int2 *)(memory + C::TEAMS * (C::Q + C::K + C::V));
  typename walk_of<C>::type walk(p, t, span, table, first + lane / 4);
  key_tile now, next;
  bool more = walk.step(p, now);
  if (more) copy_keys<C, C::D>(k_room, a.k, key_row, kh, a.D, now, thread);
  copies_commit();
  copies_wait<0>();
  team_sync<C>();

  queries<C> q;
  q.load(mma_at_rows<C::D>(q_room + first * pitch(C::D)));
  if (!C::Q) __syncwarp(); /* V comes where q was */
  float o[C::X][C::E / 2];
  row_state r[C::X];
#pragma unroll
  for (int x = 0; x < C::X; x++) {
    r[x] = {{-INFINITY, -INFINITY}, {0, 0}};
#pragma unroll
    for (int i = 0; i < C::E / 2; i++) o[x][i] = 0;
  }
  const float c = a.softcap > 0 ? LOG2E : a.scale * LOG2E, to = a.scale / a.softcap * 2 * LOG2E;

#pragma unroll 1
  while (more) {
    /* What follows from these is made anew in each turn: there are no registers to keep it in. */
    int here = thread;
    asm volatile("" : "+r"(key_row), "+r"(kh), "+r"(here));
    copies_wait<0>();
    team_sync<C>();
    copy_keys<C, C::E>(v_room, a.v, key_row, kh, a.E, now, here);
    copies_commit();
    const int mine = here / 32 * 16 * C::X + here % 32 / 4;
    const seen_keys seen = walk.enter(p, table, t.n, mine);
    const bool any = now.key < seen.hi_any && now.key + C::N > seen.lo_any;
    /* the list's entries take a while; dense tiles would only take registers */
    if (C::SELECTED) more = walk.step(p, next);
    float s[C::X][C::N / 2];
    if (any)
      products<C>(s, q, mma_at_rows<C::D>(q_room + here / 32 * 16 * C::X * pitch(C::D), here % 32),
                  mma_at_columns<C::D>(k_room, here % 32));
    if (!C::SELECTED) more = walk.step(p, next);
    asm volatile("" : "+r"(key_row), "+r"(kh), "+r"(here));
    copies_wait<0>();
    team_sync<C>();
    if (more) copy_keys<C, C::D>(k_room, a.k, key_row, kh, a.D, next, here);
    copies_commit();
    if (any) {
      if (a.softcap > 0)
#pragma unroll
        for (int x = 0; x < C::X; x++) cap(s[x], to, a.softcap);
      if (now.key < seen.lo_all || now.key + C::N > seen.hi_all) {
        const int from = now.key + here % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2 * C::X; i++) {
          const int2 keys = walk.of_row(table, mine, i);
          mask(s[i / 2], i % 2, keys.x - from, keys.y - from);
        }
      }
      float scale[C::X][2];
      bool moved = false;
#pragma unroll
      for (int x = 0; x < C::X; x++) {
        softmax(s[x], r[x], scale[x], c);
        moved |= scale[x][0] != 1 || scale[x][1] != 1;
      }
      if (__any_sync(~0u, moved))
#pragma unroll
        for (int x = 0; x < C::X; x++)
#pragma unroll
          for (int i = 0; i < C::E / 2; i++) o[x][i] *= scale[x][i / 2 % 2];
      add_values<C>(o, s, mma_at_rows<C::E>(v_room, here % 32));
    }
    now = next;
  }
  write<C>(p, find_rows<C>(p), o, r, c,
           (C::ALONE ? k_room : room) + (C::ALONE ? 0 : first * pitch(C::D)), first);
}

/* ---- instances ---- */

#ifdef RGK_DEV
constexpr bool dev = true;
#else
constexpr bool dev = false;
#endif

template <class T, int D, int E> const void *instance(int shape, bool selected) {
  if (shape == RGK_MMA_ONE)
    return selected ? (const void *)forward<config<T, D, E, RGK_MMA_ONE, true>> : nullptr;
  if (shape == RGK_MMA_SMALL)
    return selected ? (const void *)forward<config<T, D, E, RGK_MMA_SMALL, true>>
                    : (const void *)forward<config<T, D, E, RGK_MMA_SMALL, false>>;
  if constexpr (D <= 192)
    if (!selected) return (const void *)forward<config<T, D, E, RGK_MMA_LARGE, false>>;
  return nullptr;
}

template <int D, int E> const void *instance(rg_dtype type, int shape, bool selected) {
  if (type == RG_BF16 && (!dev || D == 64 || D == 128))
    return instance<__nv_bfloat16, D, E>(shape, selected);
  if constexpr (!dev)
    if (type == RG_F16) return instance<__half, D, E>(shape, selected);
  return nullptr;
}

} // namespace mma_fwd
} // namespace rgk
