/* kernels/gather_fwd_sm90.cu: forward of attention over selected blocks, driven by the queries (see gather.h).
 *
 *   producer     one warp: merges the queries' rows of idx (a lane holds one unit's place in its row), has the
 *                copy engine fetch each block of the union into the next stage, and labels it: which keys, for
 *                which units. A tile begins with stages that hold its rows of q, one for each warpgroup.
 *   warpgroups   take each stage in turn, work on it if one of their units is among those, and give it back:
 *                S = Q K^T    p = exp2(S c - m)    O += p V    with q, p and O in registers
 *
 * Blocks of threads stay and take tiles in turn; the producer runs ahead into the next tile while the
 * warpgroups finish. Tiles of one KV head come together: its K and V then share L2.
 *
 * m is a reference rather than the maximum: it moves only when a row's maximum exceeds it by LAZY powers of
 * two. Keys past a sequence's end are masked; their rows of V are cleared, since 0 · NaN would spread.
 */
#include "device/attn.cuh"
#include "device/element.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "gather.h"

using namespace rgk;

namespace {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f, LAZY = 8;

enum {
  KEYS = RGK_GATHER_KEYS,
  ROWS = RGK_GATHER_ROWS,
  GROUPS = RGK_GATHER_GROUPS,
  UNITS = RGK_GATHER_UNITS,
  PANEL = 128 * KEYS,
  PRODUCER_REGS = 72,
  REGS = 216,
  NONE = 0x7fffffff
};
static_assert(ROWS * 4 == KEYS, "a warpgroup's rows of q fill a stage's panels");

/* A tile: queries of one sequence, heads of one KV head. */
struct job {
  int row, n;      /* first row of q; how many */
  int kh, part;
  int keys;        /* of the sequence */
  int64_t position; /* of the first query */
};

/* What a stage holds. KEYS_OF: keys [first, first + KEYS) of the sequence, for the units in `mask`. */
enum label_kind : int { KEYS_OF, QUERIES, DEAD_ROWS, EXIT };
struct alignas(16) label {
  int kind;
  uint32_t mask;
  int first;
  int end;  /* of the selected block, in keys */
  int last; /* of the tile */
  job j;    /* not with KEYS_OF */
};

template <int D, int E> struct shared {
  static constexpr int STAGES = RGK_GATHER_STAGES(D, E), DP = (D + 63) / 64, EP = (E + 63) / 64;
  alignas(1024) char data[STAGES][(DP + EP) * PANEL];
  label labels[STAGES];
  uint64_t full[STAGES], empty[STAGES];
};

/* ---- the producer ---- */

/* A tile and, of each lane's unit, the place in its row of idx. */
struct walk {
  job j;
  bool dead;
  int64_t key_row, hi; /* first key of the sequence in k and v; how many of its keys the unit's query sees */
  const int32_t *idx;
  int at, next, ahead; /* ahead: entry `at`, fetched early */
};

/* Tile `id`: heads side by side run fastest, then queries from the last to the first (the heavy tiles of a
 * sequence come first). False: it is empty. */
__device__ __forceinline__ bool find_tile_of(const rgk_gather &p, int64_t id, walk &w) {
  const int64_t turn = id / (p.slots * p.side), in = id - turn * p.slots * p.side, slot = in / p.side,
                hp = turn * p.side + (in - slot * p.side);
  const tile t = find_tile(p.a.seqs, p.slots - 1 - slot, p.queries);
  if (t.n == 0) return false;
  w.j.row = (int)(t.begin + t.first);
  w.j.n = t.n;
  w.j.kh = (int)(hp / p.parts);
  w.j.part = (int)(hp % p.parts);
  w.j.keys = 0;
  w.j.position = 0;
  w.dead = t.b >= p.a.seqs.n;
  if (w.dead) return true;
  const key_span span = keys_of(p.a, t.b);
  const int lane = threadIdx.x % 32, query = lane / p.per;
  w.j.keys = (int)max(span.n, (int64_t)0);
  w.j.position = t.first + first_position(p.a, t.b);
  w.key_row = span.row;
  w.hi = visible(p.a, w.j.position + query, span.n).hi;
  w.at = lane < UNITS && query < t.n &&
                 (w.j.part * UNITS + lane % p.per) * ROWS < p.a.G
             ? 0
             : p.a.N;
  w.idx = (const int32_t *)p.a.idx.data + (w.j.row + (int64_t)query) * p.a.idx.row + w.j.kh * p.a.idx.head;
  w.ahead = w.at < p.a.N ? w.idx[0] : -1;
  return true;
}

/* The next entry that counts. */
__device__ __forceinline__ int next_block(const rgk_gather &p, walk &w, int before) {
  while (w.at < p.a.N) {
    const int e = w.ahead;
    if (++w.at < p.a.N) w.ahead = w.idx[w.at];
    if (e <= before) continue;
    if ((int64_t)e * p.a.block < w.hi) return e;
    w.at = p.a.N; /* what follows is further out, or not larger */
  }
  return NONE;
}

template <int D, int E> struct producer {
  using memory = shared<D, E>;
  const rgk_gather &p;
  memory &s;
  ring<memory::STAGES> r;
  int64_t round;
  int lane;

  __device__ __forceinline__ bool find_next(walk &w) {
    for (;; round++) {
      const int64_t base = round * gridDim.x,
                    id = base + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
      if (base >= p.tiles) return false;
      if (id < p.tiles && find_tile_of(p, id, w)) {
        round++;
        return true;
      }
    }
  }
  /* The next stage gets its label; `bytes` will be copied into it. */
  __device__ __forceinline__ void open(const label &y, uint32_t bytes) {
    bar_wait(&s.empty[r.stage], r.parity ^ 1);
    if (lane == 0) {
      s.labels[r.stage] = y;
      if (bytes)
        bar_expect(&s.full[r.stage], bytes);
      else
        bar_arrive(&s.full[r.stage]);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void load_queries(const walk &w, int group, bool last) {
    label y = {QUERIES, 15u << 4 * group, 0, 0, last, w.j};
    open(y, memory::DP * PANEL);
    if (lane < 4 * memory::DP) {
      const int unit = group * 4 + lane % 4, x = lane / 4;
      tma_load(s.data[r.stage] + x * PANEL + lane % 4 * ROWS * 128, &p.q, &s.full[r.stage], x * 64,
               w.j.kh * p.a.G + (w.j.part * UNITS + unit % p.per) * ROWS, w.j.row + unit / p.per,
               l2::evict_first);
    }
    r.next();
  }
  __device__ __forceinline__ void load_keys(const walk &w, uint32_t mask, int64_t first, int64_t end, bool last) {
    label y;
    y.kind = KEYS_OF, y.mask = mask, y.first = (int)first, y.end = (int)end, y.last = last;
    bar_wait(&s.empty[r.stage], r.parity ^ 1);
    if (lane == 0) {
      label &to = s.labels[r.stage];
      to.kind = y.kind, to.mask = y.mask, to.first = y.first, to.end = y.end, to.last = y.last;
      bar_expect(&s.full[r.stage], (memory::DP + memory::EP) * PANEL);
    }
    __syncwarp();
    if (lane < memory::DP + memory::EP) {
      const bool v = lane >= memory::DP;
      tma_load(s.data[r.stage] + lane * PANEL, v ? &p.v : &p.k, &s.full[r.stage],
               (v ? lane - memory::DP : lane) * 64, w.j.kh, (int)(w.key_row + first));
    }
    r.next();
  }

  __device__ __forceinline__ void run() {
    walk w, coming;
    round = 0;
    bool more = find_next(coming);
    while (more) {
      w = coming;
      if (w.dead) {
        open({DEAD_ROWS, 0, 0, 0, 1, w.j}, 0);
        r.next();
        more = find_next(coming);
        continue;
      }
      w.next = next_block(p, w, -1);
      int block = __reduce_min_sync(~0u, w.next);
      for (int g = 0; g < GROUPS; g++) load_queries(w, g, g == GROUPS - 1 && block == NONE);
      more = find_next(coming);
      while (block != NONE) {
        const bool mine = w.next == block;
        const uint32_t mask = __ballot_sync(~0u, mine);
        const int64_t first = (int64_t)block * p.a.block, end = min(first + p.a.block, (int64_t)w.j.keys);
        const int seen = __reduce_max_sync(~0u, mine ? (int)(min(w.hi, end) - first) : 0);
        if (mine) w.next = next_block(p, w, block);
        block = __reduce_min_sync(~0u, w.next);
        for (int from = 0; from < seen; from += KEYS)
          load_keys(w, mask, first + from, end, block == NONE && from + KEYS >= seen);
      }
    }
    open({EXIT, 0, 0, 0, 1, {}}, 0);
  }
};

/* ---- the warpgroups ---- */

__device__ __forceinline__ float power2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* A thread's two rows of its warpgroup's 64: reference (raw) and this thread's share of the sum. */
struct rows2 {
  float m[2], l[2];
};

/* s, of which the first `limit` columns are seen, becomes p; true: o must be multiplied by `scale`. */
__device__ __forceinline__ bool softmax(float (&s)[KEYS / 2], rows2 &x, float (&scale)[2], float c, int limit) {
  const int t = threadIdx.x % 4;
  if (limit < KEYS) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
      if (i / 4 * 8 + t * 2 + i % 2 >= limit) s[i] = -INFINITY;
  }
  bool moved = false;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float a = s[2 * h], b = s[2 * h + 1];
#pragma unroll
    for (int i = 1; i < KEYS / 8; i++) a = fmaxf(a, s[4 * i + 2 * h]), b = fmaxf(b, s[4 * i + 2 * h + 1]);
    a = fmaxf(a, b);
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 2));
    const bool move = (a - x.m[h]) * c > LAZY; /* −inf − −inf: no */
    scale[h] = move ? power2((x.m[h] - a) * c) : 1;
    x.m[h] = move ? a : x.m[h];
    x.l[h] *= scale[h];
    moved |= move;
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float minus = x.m[h] == -INFINITY ? 0 : -x.m[h] * c;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) {
      float &a = s[4 * i + 2 * h], &b = s[4 * i + 2 * h + 1];
      a = power2(fmaf(a, c, minus));
      b = power2(fmaf(b, c, minus));
      sum += a + b;
    }
    x.l[h] += sum;
  }
  return __any_sync(~0u, moved);
}

/* Rows of V from `from` on are zeroed, by this warpgroup for itself. */
template <int E> __device__ __forceinline__ void clear_tail(char *v, int from, int group) {
#pragma unroll 1
  for (int x = 0; x < (E + 63) / 64; x++)
#pragma unroll 1
    for (int i = from * 8 + (int)(threadIdx.x % 128); i < KEYS * 8; i += 128)
      *(uint4 *)(v + x * PANEL + i * 16) = make_uint4(0, 0, 0, 0);
  proxy_fence();
  named_sync(1 + group, 128);
}

/* Where a warp's unit lies. */
struct place {
  int64_t row, head; /* of q: its query and first head */
  int rows;          /* 0: there is none */
};
__device__ __forceinline__ place find_unit(const rgk_gather &p, const job &j, int unit) {
  place u;
  const int query = unit / p.per, from = (j.part * UNITS + unit % p.per) * ROWS;
  u.row = j.row + query;
  u.head = (int64_t)j.kh * p.a.G + from;
  u.rows = query < j.n && query < p.queries ? max(0, min((int)ROWS, p.a.G - from)) : 0;
  return u;
}

template <class T, int E> __device__ __forceinline__ void clear_rows(const rgk_gather &p, const place &u) {
  const int lane = threadIdx.x % 32;
  T *o = (T *)p.a.o.data + u.row * p.a.o.row + u.head * p.a.o.head;
  for (int i = lane; i < u.rows * (E / 8); i += 32)
    *(uint4 *)(o + i / (E / 8) * p.a.o.head + i % (E / 8) * 8) = make_uint4(0, 0, 0, 0);
  if (p.a.lse.data && lane < u.rows)
    ((float *)p.a.lse.data)[u.row * p.a.lse.row + (u.head + lane) * p.a.lse.head] = 0;
}

/* Sums become averages, with the sink; o and lse are written. */
template <class T, int E>
__device__ __forceinline__ void finish(const rgk_gather &p, const place &u, float (&o)[E / 2], rows2 &x, float c) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float l = x.l[h];
    l += __shfl_xor_sync(~0u, l, 1);
    l += __shfl_xor_sync(~0u, l, 2);
    const int row = g + 8 * h;
    if (row >= u.rows) continue;
    float m = l == 0 ? -INFINITY : x.m[h] * c, f = l == 0 ? 0 : 1;
    const float sink =
        p.a.sinks.data ? load(p.a.sinks.data, p.a.sinks.dtype, (u.head + row) * p.a.sinks.row) * LOG2E : -INFINITY;
    if (sink > -INFINITY) {
      const float top = fmaxf(m, sink);
      f = exp2f(m - top);
      l = l * f + exp2f(sink - top);
      m = top;
    }
    if (f != 0) f = __fdividef(f, l);
    T *to = (T *)p.a.o.data + u.row * p.a.o.row + (u.head + row) * p.a.o.head + 2 * t;
#pragma unroll
    for (int i = 0; i < E / 8; i++)
      *(uint32_t *)(to + 8 * i) =
          f == 0 ? 0 : pack2<T>(o[4 * i + 2 * h] * f, o[4 * i + 2 * h + 1] * f);
    if (p.a.lse.data && t == 0)
      ((float *)p.a.lse.data)[u.row * p.a.lse.row + (u.head + row) * p.a.lse.head] =
          l == 0 ? -INFINITY : m * LN2 + logf(l);
  }
}

/* Whether all threads of a warpgroup say so. */
__device__ __forceinline__ bool all_of(int group, bool x) {
  uint32_t ok;
  asm volatile("{\n\t.reg .pred p, q;\n\tsetp.ne.u32 p, %1, 0;\n\t"
               "barrier.red.and.pred q, %2, 128, p;\n\t"
               "selp.u32 %0, 1, 0, q;\n\t}"
               : "=r"(ok)
               : "r"((uint32_t)x), "r"(1 + group)
               : "memory");
  return ok;
}

template <class T, int D, int E> struct consumer {
  using memory = shared<D, E>;
  const rgk_gather &p;
  memory &s;
  const int group, lane, warp, unit;
  const float softcap, c, to; /* scores to powers of two, without and with a cap */
  int64_t position;           /* of the unit's query */
  int keys;                   /* of the sequence */
  rows2 x;

  __device__ __forceinline__ bool is_mine(const label &y) { return __shfl_sync(~0u, y.kind == KEYS_OF && y.mask >> 4 * group & 15, 0); }
  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (lane == 0) bar_arrive(&s.empty[stage]);
  }
  /* z = q kᵀ */
  __device__ __forceinline__ void start_scores(float (&z)[KEYS / 2], const uint32_t (&q)[D / 4], int stage) {
    const uint32_t k = smem_at(s.data[stage]);
#pragma unroll
    for (int i = 0; i < D / 16; i++)
      wgmma<T, KEYS>::template rs<>(z, q + 4 * i, desc_k(k + i / 4 * PANEL + i % 4 * 32), i > 0);
    wgmma_commit();
  }
  /* o += a v */
  __device__ __forceinline__ void start_sums(float (&o)[E / 2], const uint32_t (&a)[KEYS / 4], int stage) {
    const uint32_t v = smem_at(s.data[stage]) + memory::DP * PANEL;
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++)
      wgmma<T, E>::template rs<true>(o, a + 4 * i, desc_mn(v + i * 2048, PANEL), 1);
    wgmma_commit();
  }
  /* z becomes p; true: o must be multiplied by `scale`. */
  __device__ __forceinline__ bool weigh(float (&z)[KEYS / 2], float (&scale)[2], const label &y) {
    const int limit = y.mask >> unit & 1 ? (int)min(position + 1 - y.first, (int64_t)min(y.end - y.first, (int)KEYS)) : 0;
    if (limit <= 0) {
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++) z[i] = 0;
      return false;
    }
    if (softcap > 0) {
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++) z[i] = softcap * (1 - __fdividef(2, 1 + power2(z[i] * to)));
    }
    return softmax(z, x, scale, c, limit);
  }
  __device__ __forceinline__ void clean(int stage) {
    const int n = keys - s.labels[stage].first;
    if (n < KEYS) clear_tail<E>(s.data[stage] + memory::DP * PANEL, n, group);
  }

  __device__ __forceinline__ void run() {
    ring<memory::STAGES> r;
    uint32_t q[D / 4];
    float o[E / 2];
    place u;
    for (;;) {
      bar_wait(&s.full[r.stage], r.parity);
      const label &y = s.labels[r.stage];
      const int kind = y.kind;
      int last = y.last;
      if (kind == EXIT) break;
      if (is_mine(y)) {
        float z[KEYS / 2], scale[2];
        uint32_t a[KEYS / 4];
        wgmma_fence();
        start_scores(z, q, r.stage);
        clean(r.stage);
        wgmma_wait<0>();
        wgmma_keep(z);
        if (weigh(z, scale, y)) {
#pragma unroll
          for (int i = 0; i < E / 2; i++) o[i] *= scale[i / 2 % 2];
        }
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) a[i] = pack2<T>(z[2 * i], z[2 * i + 1]);
        /* While the next stage is there and for this warpgroup: its scores beside this one's sums. */
        for (;;) {
          ring<memory::STAGES> ahead = r;
          ahead.next();
          if (last || !all_of(group, bar_try(&s.full[ahead.stage], ahead.parity))) break;
          const label &next = s.labels[ahead.stage];
          if (!is_mine(next)) break;
          last = next.last;
          clean(ahead.stage);
          wgmma_fence();
          start_scores(z, q, ahead.stage);
          start_sums(o, a, r.stage);
          wgmma_wait<1>();
          wgmma_keep(z);
          const bool moved = weigh(z, scale, next);
          wgmma_keep(z);
          wgmma_wait<0>();
          wgmma_keep(o);
          wgmma_keep(a);
          release(r.stage);
          r = ahead;
          if (moved) {
#pragma unroll
            for (int i = 0; i < E / 2; i++) o[i] *= scale[i / 2 % 2];
          }
#pragma unroll
          for (int i = 0; i < KEYS / 4; i++) a[i] = pack2<T>(z[2 * i], z[2 * i + 1]);
        }
        wgmma_fence();
        start_sums(o, a, r.stage);
        wgmma_wait<0>();
        wgmma_keep(o);
      } else if (kind == QUERIES && y.mask >> 4 * group & 15) {
        const job j = y.j;
        u = find_unit(p, j, unit);
        keys = j.keys;
        position = j.position + unit / p.per;
        const int row = lane % 16;
#pragma unroll
        for (int i = 0; i < D / 16; i++)
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                       : "=r"(q[4 * i]), "=r"(q[4 * i + 1]), "=r"(q[4 * i + 2]), "=r"(q[4 * i + 3])
                       : "r"(smem_at(s.data[r.stage]) + i / 4 * PANEL + (warp * 16 + row) * 128 +
                             ((i % 4 * 2 + lane / 16) ^ (row & 7)) * 16)
                       : "memory");
#pragma unroll
        for (int i = 0; i < E / 2; i++) o[i] = 0;
#pragma unroll
        for (int h = 0; h < 2; h++) x.m[h] = -INFINITY, x.l[h] = 0;
      } else if (kind == DEAD_ROWS) {
        clear_rows<T, E>(p, find_unit(p, y.j, unit));
      }
      release(r.stage);
      r.next();
      if (last && kind != DEAD_ROWS) finish<T, E>(p, u, o, x, c);
    }
  }
};

template <class T, int D, int E>
__global__ void __launch_bounds__(RGK_GATHER_THREADS, 1) forward(const __grid_constant__ rgk_gather p) {
  extern __shared__ char memory[];
  using layout = shared<D, E>;
  layout &s = *(layout *)(memory + (-smem_at(memory) & 1023));
  static_assert(sizeof(layout) + 1024 <= RGK_GATHER_BYTES(D, E), "fits wherever it starts");
  if (threadIdx.x == 0) {
    for (int i = 0; i < layout::STAGES; i++) bar_init(&s.full[i], 1), bar_init(&s.empty[i], UNITS);
    bar_init_done();
    map_prefetch(&p.q), map_prefetch(&p.k), map_prefetch(&p.v);
  }
  __syncthreads();
  const int role = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
  if (role == 0) {
    fewer_registers<PRODUCER_REGS>();
    if (threadIdx.x < 32) {
      producer<D, E> x{p, s, {}, 0, (int)threadIdx.x};
      x.run();
    }
  } else {
    more_registers<REGS>();
    const int warp = threadIdx.x / 32 % 4, group = role - 1;
    consumer<T, D, E> x{p, s, group, (int)threadIdx.x % 32, warp, 4 * group + warp, p.a.softcap,
                        p.a.softcap > 0 ? LOG2E : p.a.scale * LOG2E, p.a.scale / p.a.softcap * 2 * LOG2E};
    x.run();
  }
}

} // namespace

#define INSTANCE(dtype, d, e)                                                                                \
  if (t == dtype && D == d && E == e) return (const void *)forward<element<dtype>::type, d, e>;

const void *rgk_gather_fwd(rg_dtype t, int32_t D, int32_t E) {
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
