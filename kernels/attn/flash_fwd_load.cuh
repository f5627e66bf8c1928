/* kernels/attn/flash_fwd_load.cuh: what a block of threads of flash_fwd_sm90.cuh works on, shared
   memory, and the producer: it finds jobs, hands them out beside their q, and fetches tiles of K
   and V, from rows or from pages.
 */
#pragma once
#include "../device/ptx.cuh"
#include "../device/seq.cuh"
#include "../device/tma.cuh"
#include "../device/wgmma.cuh"
#include "flash.h"

namespace rgk {
namespace flash {

/* First ids, of one for each warpgroup: who has the baton; its own threads. */
enum named : int { BATON = 1, EACH = 8 };

template <class Type, int D_, int E_, int GROUPS_, int N_> struct config {
  using type = Type;
  static constexpr int D = D_, E = E_, GROUPS = GROUPS_, N = N_;
  static constexpr int BOX = RGK_FLASH_BOX, ROWS = GROUPS * BOX;
  static constexpr int STAGES = RGK_FLASH_STAGES(D, E, GROUPS, N);
  static constexpr int THREADS = (GROUPS + 1) * 128;
  static constexpr int DP = (D + 63) / 64, EP = (E + 63) / 64; /* panels */
  static constexpr uint32_t Q = BOX * 128, KV = N * 128;       /* bytes of a panel */
  static constexpr bool OWN_O = RGK_FLASH_OWN_O(D, E, GROUPS, N);
  /* s, o, p and q of a thread */
  static constexpr bool Q_REGS = N / 2 + E / 2 + N / 4 + D / 4 <= 200;
  static constexpr int PRODUCER_REGS = GROUPS == 2 ? 24 : 32, REGS = GROUPS == 2 ? 240 : 160;
};

/* One tile of query rows of one head, as the producer hands it out. */
enum job_kind : int { WORK, DEAD_ROWS, EXIT };
struct alignas(16) job {
  int kind, head;
  int token, rows; /* first row in q and o; rows of the tile that the sequence has */
  int position;    /* of the first row */
  int keys;        /* rows up to the sequence's last key */
  int first, end;  /* key tiles [first, end) */
};

template <class C> struct shared {
  alignas(1024) char q[C::GROUPS][C::DP * C::Q];
  char k[C::STAGES][C::DP * C::KV];
  char v[C::STAGES][C::EP * C::KV];
  char o[C::OWN_O ? C::GROUPS : 0][C::EP * C::Q];
  job jobs[C::GROUPS];
  uint64_t q_full[C::GROUPS], q_empty[C::GROUPS];
  uint64_t k_full[C::STAGES], k_empty[C::STAGES], v_full[C::STAGES], v_empty[C::STAGES];
};

/* ---- jobs ---- */

/* Rows of the last and first key that position x sees; monotone in x. None: last < first. */
__device__ __forceinline__ int last_key(const rgk_flash_params &p, int keys, int x) {
  if (p.mode == RGK_CMP) x = x < p.kernel - 1 ? -1 : rgk_over(x - p.kernel + 1, p.by_stride);
  return min(x + p.before, keys - 1);
}
__device__ __forceinline__ int first_key(const rgk_flash_params &p, int x) {
  if (p.mode == RGK_CMP) return p.before;
  return p.window_left < 0 || x <= p.window_left ? 0 : x - (int)p.window_left;
}

/* Where keys are: number of a sequence, in tokens, and what load_tile needs to find its rows. */
struct in_rows {
  int row; /* of k and v at which tiles are counted from */
};
__device__ __forceinline__ int find_rows(const rgk_flash_params &p, int b, in_rows &at) {
  const int begin = (int)seq_start(p.kseqs, b);
  at.row = begin;
  return (int)seq_start(p.kseqs, b + 1) - begin;
}
struct in_pages {
  const int32_t *table;
  int low, rows; /* of the sequence's, [low, rows) are seen by some row of the tile */
};
__device__ __forceinline__ int find_rows(const rgk_flash_paged &p, int b, in_pages &at) {
  const rgk_pages &g = p.pages;
  const int n = g.context[b * g.context_step];
  at.table = g.table + b * g.table_row;
  return n > (int64_t)g.most * g.tokens ? 0 : n;
}

/* Position of the first query of a sequence of `length` rows that has n keys, in tokens. */
__device__ __forceinline__ int64_t first_query(const rgk_flash_params &p, int b, int64_t, int) {
  return p.offset ? p.offset[b] : 0;
}
__device__ __forceinline__ int64_t first_query(const rgk_flash_paged &, int, int64_t length,
                                               int n) {
  return n - length; /* below 0: the numbers don't go together */
}

/* In blocks, where they are compressed; cut at the rows there are. */
__device__ __forceinline__ int count_keys(const rgk_flash_params &p, int n, in_rows &at) {
  if (p.mode == RGK_CMP) {
    n = n < p.kernel ? 0 : rgk_over(n - p.kernel, p.by_stride) + 1;
    at.row = rgk_over(at.row, p.by_stride);
  }
  n = min(n, (int)p.S - at.row);
  at.row -= p.before;
  return n;
}
__device__ __forceinline__ int count_keys(const rgk_flash_paged &paged, int n, in_pages &at) {
  const rgk_flash_params &p = paged.f;
  if (p.mode == RGK_CMP) n = n < p.kernel ? 0 : rgk_over(n - p.kernel, p.by_stride) + 1;
  at.low = p.before;
  at.rows = n + p.before;
  return n;
}

/* Rows outside [low, end) need not be fetched. */
__device__ __forceinline__ void see_rows(in_rows &, int, int) {}
__device__ __forceinline__ void see_rows(in_pages &at, int low, int end) {
  at.low = low, at.rows = end;
}

__device__ __forceinline__ const rgk_flash_params &flash_of(const rgk_flash_params &p) {
  return p;
}
__device__ __forceinline__ const rgk_flash_params &flash_of(const rgk_flash_paged &p) {
  return p.f;
}
template <class P> struct place_of { using type = in_rows; };
template <> struct place_of<rgk_flash_paged> { using type = in_pages; };
template <class P> using place = typename place_of<P>::type;
template <class P> constexpr bool in_pages_of = false;
template <> inline constexpr bool in_pages_of<rgk_flash_paged> = true;

/* A tile's rows: heads of one token side by side over pages, else tokens of one head. */
template <bool paged> __device__ __forceinline__ int pack_of(const rgk_flash_params &p) {
  return paged ? p.pack : 0;
}
struct row_place {
  int token, head; /* from the tile's first */
};
template <bool paged>
__device__ __forceinline__ row_place place_row(const rgk_flash_params &p, int row) {
  const int pack = pack_of<paged>(p);
  return {row >> pack, row & ((1 << pack) - 1)};
}

/* What a tile of rows and heads from j.head on have to do. False: nothing. */
template <class C, class P>
__device__ __forceinline__ bool place_job(const P &all, const tile &t, job &j, place<P> &at) {
  const rgk_flash_params &p = flash_of(all);
  constexpr bool PAGED = in_pages_of<P>;
  j.kind = t.b == p.seqs.n ? DEAD_ROWS : WORK;
  j.token = (int)(t.begin + t.first);
  j.rows = t.n << pack_of<PAGED>(p);
  j.position = j.keys = j.first = j.end = 0;
  if (t.n == 0) return false;
  if (j.kind == DEAD_ROWS) return true;
  const int tokens = find_rows(all, t.b, at);
  const int64_t position = first_query(all, t.b, t.length, tokens) + t.first;
  int n = count_keys(all, tokens, at);
  j.position = (int)min(max(position, t.first), (int64_t)INT32_MAX - C::ROWS);
  if (n <= 0 || (PAGED && position < t.first)) return true;
  n += p.before;
  j.keys = n;
  const int last = last_key(p, n, j.position + t.n - 1), lowest = first_key(p, j.position);
  if (last < lowest) return true;
  j.first = lowest / C::N;
  j.end = last / C::N + 1;
  see_rows(at, lowest, last + 1);
  return true;
}

/* Job i: heads (their groups, over pages) run fastest, row tiles from the last to the first (the
 * heavy ones of a sequence come first). False: nothing to do. */
template <class C, class P>
__device__ __forceinline__ bool find_job(const P &all, int i, job &j, place<P> &at) {
  const rgk_flash_params &p = flash_of(all);
  constexpr bool PAGED = in_pages_of<P>;
  const int pack = pack_of<PAGED>(p), heads = p.H >> pack;
  const int slot = rgk_over(i, p.by_heads);
  j.head = (i - slot * heads) << pack;
  return place_job<C>(all, find_tile(p.seqs, p.slots - 1 - slot, PAGED ? p.tokens : C::ROWS), j,
                      at);
}

/* ---- load ---- */

/* Where in a tile of K or V panels and eight rows follow on the one before. */
template <class C, bool PAGED> struct tile_of {
  static constexpr uint32_t K_PANEL = PAGED ? 1024 : C::KV, K_EIGHT = PAGED ? 1024 * C::DP : 1024;
  static constexpr uint32_t V_PANEL = PAGED ? 1024 : C::KV, V_EIGHT = PAGED ? 1024 * C::EP : 1024;
};

/* Key tile t. */
template <class C, int PANELS>
__device__ __forceinline__ void load_tile(const rgk_flash_params &, const in_rows &at, char *to,
                                          const rgk_map *map, uint64_t *bar, int head, int t) {
  for (int x = 0; x < PANELS; x++)
    tma_load(to + x * C::KV, map, bar, x * 64, head, at.row + t * C::N);
}
/* Four warps take turns with boxes, a lane each: to start a copy takes long. */
template <class C, int PANELS>
__device__ __forceinline__ void load_tile(const rgk_flash_paged &p, const in_pages &at, char *to,
                                          const rgk_map *map, uint64_t *bar, int head, int t) {
  const int i = (int)threadIdx.x % 32 * 4 + (int)threadIdx.x / 32, row = t * C::N + i * 8;
  if (i * 8 >= C::N) return;
  const int m = rgk_over(row, p.by_rows);
  const int page = row + 8 > at.low && row < at.rows ? at.table[m] : p.pages.count;
  tma_load(to + i * 1024 * PANELS, map, bar, 0, row - m * p.pages.rows, 0, head, page);
}

/* By one thread; over pages by a warpgroup, whose first thread hands out. */
template <class C, class P> __device__ __forceinline__ void produce(const P &all, shared<C> &s) {
  constexpr bool PAGED = in_pages_of<P>;
  const rgk_flash_params &p = flash_of(all);
  const bool leads = threadIdx.x == 0;
  ring<C::STAGES> k, v;
  uint32_t q_parity = 0;
  job j;
  place<P> at = {};
  int kv_head = 0;
  auto load_k = [&](int t) {
    bar_wait(&s.k_empty[k.stage], k.parity ^ 1);
    if (leads) bar_expect(&s.k_full[k.stage], C::DP * C::KV);
    load_tile<C, C::DP>(all, at, s.k[k.stage], &p.k, &s.k_full[k.stage], kv_head, t);
    k.next();
  };
  auto load_v = [&](int t) {
    bar_wait(&s.v_empty[v.stage], v.parity ^ 1);
    if (leads) bar_expect(&s.v_full[v.stage], C::EP * C::KV);
    load_tile<C, C::EP>(all, at, s.v[v.stage], &p.v, &s.v_full[v.stage], kv_head, t);
    v.next();
  };
  auto hand_out = [&]() {
    const int pack = pack_of<PAGED>(p);
    for (int g = 0; g < C::GROUPS && leads; g++) {
      bar_wait(&s.q_empty[g], q_parity ^ 1);
      s.jobs[g] = j;
      if (j.first == j.end) {
        bar_ready(&s.q_full[g]);
        continue;
      }
      bar_expect(&s.q_full[g], C::DP * C::Q);
      for (int x = 0; x < C::DP; x++)
        tma_load(s.q[g] + x * C::Q, &p.q, &s.q_full[g], x * 64, j.head,
                 j.token + (g * C::BOX >> pack), l2::evict_first);
    }
    if (PAGED) __syncwarp();
    q_parity ^= 1;
  };
  /* Every other round goes backwards: sums of falling weights come out even. */
  const int jobs = p.slots * (p.H >> pack_of<PAGED>(p)), blocks = (int)gridDim.x;
  for (int r = 0; r * blocks < jobs; r++) {
    const int i = r * blocks + (r & 1 ? blocks - 1 - (int)blockIdx.x : (int)blockIdx.x);
    if (i >= jobs || !find_job<C>(all, i, j, at)) continue;
    kv_head = rgk_over(j.head, p.by_group);
    if (j.first < j.end) load_k(j.end - 1);
    hand_out();
    for (int t = j.end - 1; t >= j.first; t--) {
      if (t > j.first) load_k(t - 1);
      load_v(t);
    }
  }
  j.kind = EXIT;
  j.first = j.end = 0;
  hand_out();
}

} // namespace flash
} // namespace rgk
