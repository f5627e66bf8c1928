/* kernels/attn/decode_load_sm90.cuh: what a block of threads of decode_sm90.cuh has in shared
   memory, how twins hand on, and the producers: they find jobs, hand them out, and fetch keys and
   values.
 */
#pragma once
#include "../kv_step.cuh"
#include "decode.h"
#include "flash_fwd_sm90.cuh"
#include "topk.cuh"

namespace rgk {
namespace decode {

using namespace flash;

enum kind { RANKED, ALONE, SELECTED }; /* blocks are chosen besides; they are not; they were */

constexpr int HEADS = RGK_DECODE_HEADS, MOST = 32;
constexpr int RANKS = RGK_DECODE_RANKS, WARPS = RANKS / 32; /* of those who rank */
constexpr int ROWS16 = HEADS * 128;                         /* bytes of a panel of 16 rows */
constexpr int HELD_PITCH = RGK_DECODE_HELD + 4;             /* so that banks differ */
/* Bytes of what one twin tells the other of a tile; that they take. */
constexpr int SENT = 2 * ROWS16 + 4 * HEADS, SLOT = (SENT + 1023) / 1024 * 1024;

/* Where what is at a stage lies: slots of 64 keys, of which a tile of 128 takes two from an even
 * one on. A slot has a parity of its own. */
struct slots {
  int stage = 0;
  uint32_t used = 0, parity = 0; /* a bit a slot; that of `stage` */
};
template <int n, int keys> struct slot_ring : slots {
  __device__ __forceinline__ void take(const slots &x) {
    stage = x.stage;
    used = x.used;
    if (keys == 128 && (stage += stage & 1) == n) stage = 0;
    parity = used >> stage & 1;
  }
  __device__ __forceinline__ void next() {
    used ^= 1u << stage;
    if ((stage += keys / 64) == n) stage = 0;
    parity = used >> stage & 1;
  }
};
template <int n> __device__ __forceinline__ void wait_empty(uint64_t *empty, const ring<n> &r) {
  bar_wait(&empty[r.stage], r.parity ^ 1);
}
template <int n, int keys>
__device__ __forceinline__ void wait_empty(uint64_t *empty, const slot_ring<n, keys> &r) {
  bar_wait(&empty[r.stage], r.parity ^ 1);
  if (keys == 128) bar_wait(&empty[r.stage + 1], (r.used >> (r.stage + 1) & 1) ^ 1);
}

/* PAIRED: selected blocks and a window share a block of threads (decode_pair_sm90.cu). TWINS: two
 * share a token. NEAR: blocks are chosen nearly first (decode_near_sm90.cu). LAYER: one warpgroup
 * attends to compressed keys, window and selected blocks in turn (decode_layer_sm90.cuh), in the
 * memory of `whole`. HELD: products of a short context stay in shared memory. AHEAD: a block of
 * threads has many tokens, and where the next one's keys are is looked up early. */
template <class Type, int D, kind KIND_, bool PAIRED_ = false, bool TWINS_ = false,
          bool NEAR_ = false, bool LAYER_ = false>
struct setup : config<Type, D, D, 1, KIND_ == SELECTED ? 64 : RGK_DECODE_KEYS> {
  static constexpr kind KIND = KIND_;
  static constexpr bool PAIRED = PAIRED_, TWINS = TWINS_, NEAR = NEAR_ && KIND == RANKED,
                        LAYER = LAYER_;
  static constexpr int KEYS = KIND == SELECTED ? 64 : RGK_DECODE_KEYS, HALVES = KEYS / 64;
  static constexpr bool HELD = KIND == RANKED && !NEAR && !TWINS && !LAYER,
                        AHEAD = HELD || (PAIRED && !LAYER);
  static constexpr int STAGES = PAIRED && !LAYER ? RGK_PAIR_STAGES(D, KIND == SELECTED)
                                : HELD           ? RGK_DECODE_HELD_STAGES(D)
                                : TWINS_
                                    ? RGK_DECODE_TWIN_STAGES(D)
                                    : RGK_DECODE_STAGES(D) * RGK_DECODE_KEYS / (LAYER ? 64 : KEYS);
  static constexpr int SHARED = HELD ? RGK_DECODE_HELD_SHARED(D) : RGK_DECODE_SHARED(D);
  static constexpr bool BOXES = KIND != SELECTED && !PAIRED; /* keys come in boxes of eight rows */
  static constexpr int GROUP = KIND == SELECTED && !LAYER;   /* whose named barrier is its own */
  static constexpr int SUMS = KIND == SELECTED ? 4 : KEYS / 8;
  /* A tile's weights are made before it is known whether a reference moves. Held products leave no
   * room for a second tile's sums. */
  static constexpr bool GUESS = !HELD;
  using tile = tile_of<setup, BOXES>;
  using stages =
      std::conditional_t<LAYER, slot_ring<LAYER ? STAGES : 1, KEYS>, ring<LAYER ? 1 : STAGES>>;
  using whole =
      std::conditional_t<LAYER, setup<Type, D, RANKED, false, TWINS, NEAR_, LAYER>, setup>;
};

template <class P> constexpr kind kind_of = ALONE;
template <> inline constexpr kind kind_of<rgk_decode> = RANKED;
template <> inline constexpr kind kind_of<rgk_decode_selected> = SELECTED;
__device__ __forceinline__ const rgk_flash_paged &paged_of(const rgk_flash_paged &p) {
  return p;
}
template <class P> __device__ __forceinline__ const rgk_flash_paged &paged_of(const P &p) {
  return p.f;
}

struct ranked {
  job at;
  float lse[HEADS];   /* as the exponential wants it */
  int part[2][WARPS]; /* of a sum over all, two in turn */
  int count;
  int2 chosen[MOST];                  /* key, block */
  unsigned long long wide[2 * WARPS]; /* of fp64 sums, two in turn */
};

/* ---- chosen nearly first ---- */

constexpr int CANDIDATES = 96; /* that are ranked without a detour */
constexpr int PAIRS = 64;      /* of threads that rank */

/* A token whose tiles are through. */
struct near_token {
  job at;
  float lse[HEADS];   /* as the exponential wants it */
  float exact[HEADS]; /* of a layer: the same as it is */
};
/* What those who rank have to themselves. */
template <class C> struct near_ranks {
  alignas(1024) char q[C::DP * ROWS16];
  alignas(16) int top[PAIRS];          /* two threads' largest score, at least */
  alignas(16) int key[CANDIDATES + 4]; /* the candidates' */
  int block[CANDIDATES];
  float p[2 * 64];                /* of rows, summed over heads */
  int2 chosen[MOST];              /* key, block */
  int part[2][4];                 /* of a sum over all, two in turn */
  unsigned long long wide[2 * 4]; /* the same, of fp64 */
  int count, least;
};
/* A tile's weights, for those who sum them up: `at` is its number twice, and 1 where it is the last
 * of its token; -1: none follows. Of a layer also rows of o: ROWS - kind of the branch, and whose
 * they are. */
enum { ROWS = -2 };
struct weighed {
  float2 reference[HEADS]; /* in powers of two; what sums so far are multiplied by */
  int at, token, head;
};

template <class C> struct memory_of {
  static constexpr int ONCE = C::NEAR; /* fields of those alone */
  static constexpr int STAGE = C::DP * 128 * (C::LAYER ? 64 : C::KEYS);
  alignas(1024) char k[C::STAGES][STAGE]; /* of twins, the second's: v */
  char v[C::TWINS ? 0 : C::STAGES][STAGE];
  char slots[C::TWINS ? C::STAGES : 0][SLOT];
  char q[2][C::DP * ROWS16];
  char p[2][2 * ROWS16]; /* weights, head by head; o on its way out */
  near_ranks<C> choice[ONCE];
  alignas(16) float products[C::HELD ? HEADS * HELD_PITCH : 0];
  float sums[C::GUESS ? 2 : 1][C::SUMS][4 * HEADS + 4]; /* of two tiles in turn */
  alignas(16) int keys[C::KIND == RANKED && !C::NEAR ? RGK_DECODE_SCORES : 4]; /* of blocks */
  float top[4][HEADS];         /* a warp's largest products of a tile */
  alignas(16) int moved[2][4]; /* of two tiles in turn, a warp's: a reference has to move */
  float2 reference[2][HEADS];  /* the same: m; what sums so far are multiplied by */
  alignas(16) float end[HEADS];
  int first[C::STAGES]; /* of a selected block's keys */
  job jobs[2];
  int branch[2];                       /* of a layer's job */
  int late[2];                         /* of two tokens in turn: fp32 does not decide */
  int32_t ahead[C::AHEAD ? 3 : 0][32]; /* nobody reads it: look_ahead */
  ranked r;
  near_token token[2 * ONCE];
  weighed slot[2 * ONCE];
  uint64_t near_scored[2 * ONCE], near_taken[2 * ONCE]; /* token */
  uint64_t p_full[2 * ONCE], p_empty[2 * ONCE];         /* slot */
  uint64_t summed[2 * ONCE], used[2 * ONCE];            /* sums of a token's blocks */
  uint64_t q_full[2], q_empty[2], scored, taken;
  uint64_t chosen[2];           /* a layer's token has its row of idx */
  uint64_t stepped[C::LAYER];   /* rows of this step, and what they complete, are in their pages */
  uint64_t end_full, end_empty; /* twins: `end` of the second, of the first */
  uint64_t k_full[C::STAGES], k_empty[C::STAGES], v_full[C::STAGES], v_empty[C::STAGES];
};

template <class C> using memory = memory_of<typename C::whole>;

/* Of those that share tokens: number of the cluster, if it is one; how many. */
template <class C> __device__ __forceinline__ int sharer() {
  return C::TWINS ? blockIdx.x / 2 : blockIdx.x;
}
template <class C> __device__ __forceinline__ int sharers() {
  return C::TWINS ? gridDim.x / 2 : gridDim.x;
}
template <class C> __device__ __forceinline__ float *room_of(const rgk_decode &d) {
  return d.room + (int64_t)sharer<C>() * RGK_DECODE_ROWS_KEPT * d.pitch;
}
/* Where a token's products are put aside, head by head. */
struct aside {
  float *at;
  int64_t pitch;
};
template <class C>
__device__ __forceinline__ aside aside_of(const rgk_decode &d, memory<C> &s, const job &j) {
  if (C::HELD && j.end <= RGK_DECODE_HELD / C::KEYS) return {s.products, HELD_PITCH};
  return {room_of<C>(d), d.pitch};
}
/* What a block of threads keeps of two tokens in turn, where blocks are chosen nearly first; then
 * the blocks' scores. */
struct kept {
  char *sums;  /* [tile, block, head], bf16 */
  float *refs; /* [tile, head] */
};
template <class C> __device__ __forceinline__ char *near_room(const rgk_decode &d) {
  return (char *)d.room + sharer<C>() * (d.pitch / RGK_DECODE_KEYS) * RGK_DECODE_NEAR_KEPT;
}
template <class C> __device__ __forceinline__ kept kept_of(const rgk_decode &d, int turn) {
  const int64_t tiles = d.pitch / RGK_DECODE_KEYS;
  char *const room = near_room<C>(d);
  return {room + turn * tiles * RGK_DECODE_SUMS,
          (float *)(room + tiles * (2 * RGK_DECODE_SUMS + turn * RGK_DECODE_REFERENCES))};
}
template <class C> __device__ __forceinline__ float *scores_of(const rgk_decode &d) {
  return (float *)(near_room<C>(d) +
                   d.pitch / RGK_DECODE_KEYS * 2 * (RGK_DECODE_SUMS + RGK_DECODE_REFERENCES));
}
__device__ __forceinline__ int32_t *idx_of(const rgk_decode &d, const job &j) {
  return (int32_t *)d.topk.idx.data + (int64_t)j.token * d.topk.idx.row +
         (j.head >> d.f.f.pack) * d.topk.idx.head;
}

/* ---- twins ----
 *
 * Stages are of keys in the first, of values in the second, and each has as many slots for a tile's
 * weights and scales. Barriers of the stages that are not there say that a slot of the second is
 * full (K's), and, in the first (V's), that it is empty again, as the second's stage of V. */

template <class C> __device__ __forceinline__ bool has_keys() {
  return !C::TWINS || blockIdx.x % 2 == 0;
}
template <class C> __device__ __forceinline__ bool has_values() {
  return !C::TWINS || blockIdx.x % 2 == 1;
}
template <class C> __device__ __forceinline__ char *slot_of(memory<C> &s, int stage) {
  return s.slots[stage];
}
template <class C> __device__ __forceinline__ char *v_of(memory<C> &s, int stage) {
  if constexpr (C::TWINS)
    return s.k[stage];
  else
    return s.v[stage];
}
/* By one thread: bytes here to where `to` is in the second, whose barrier at `full` counts them. */
__device__ __forceinline__ void send(char *to, uint64_t *full, const char *from, uint32_t bytes) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];" ::"r"(cluster_at(smem_at(to), 1)),
               "r"(smem_at(from)), "r"(bytes), "r"(cluster_at(smem_at(full), 1))
               : "memory");
}
/* Room of the first is given back by a warp of the second, whose lanes all call it. */
template <class... X> __device__ __forceinline__ void give_first(uint64_t *bar, waited, X... read) {
  if (arrives()) release::arrive_at(cluster_at(smem_at(bar), 0), (release::word(read) ^ ... ^ 0u));
}

/* ---- load ---- */

/* find_seq_warp, where mostly each sequence has a row. */
__device__ __forceinline__ int find_own_seq(const rgk_seqs &s, int row) {
  if (s.starts && row < s.n && s.starts[row] == row && s.starts[row + 1] == row + 1) return row;
  return find_seq_warp(s, row);
}

/* By the thread that leads, its warp comes along. */
template <class C>
__device__ __forceinline__ void hand_out(const rgk_flash_params &p, memory<C> &s, ring<2> &q,
                                         const job &j, bool leads) {
  if (leads) {
    bar_wait(&s.q_empty[q.stage], q.parity ^ 1);
    s.jobs[q.stage] = j;
    if (C::LAYER) s.branch[q.stage] = C::KIND;
    if (j.first == j.end || (C::TWINS && blockIdx.x % 2)) {
      bar_ready(&s.q_full[q.stage]);
    } else {
      bar_expect(&s.q_full[q.stage], C::DP * ROWS16);
      for (int x = 0; x < C::DP; x++)
        tma_load(s.q[q.stage] + x * ROWS16, &p.q, &s.q_full[q.stage], x * 64, j.head, j.token,
                 l2::evict_first);
    }
  }
  __syncwarp();
  q.next();
}

/* The context that row `row` has if each sequence has a row: asked for before it is known whose the
 * row is, for else it would come from memory behind that. */
__device__ __forceinline__ void guess_context(const rgk_flash_paged &d, int row) {
  if (row < d.f.seqs.n)
    asm volatile("prefetch.global.L1 [%0];" ::"l"(d.pages.context + row * d.pages.context_step));
}

/* The r-th of a block's jobs; every other round goes backwards: sums of falling weights come out
 * even. */
template <class C> __device__ __forceinline__ int own_job(int r) {
  const int blocks = sharers<C>(), mine = sharer<C>();
  return r * blocks + (r & 1 ? blocks - 1 - mine : mine);
}
/* By whole warps: f(tile of one token, head) for each job. ahead(row, head): of the next one,
 * before f. */
template <class C, class A, class F>
__device__ __forceinline__ void each_token(const rgk_flash_params &p, A ahead, F f) {
  const int heads = p.H >> p.pack, jobs = p.slots * heads, blocks = sharers<C>(),
            mine = sharer<C>();
  auto at = [&](int r) { return r * blocks + (r & 1 ? blocks - 1 - mine : mine); };
  auto look = [&](int i) {
    const int slot = rgk_over(i, p.by_heads);
    if (i < jobs) ahead(p.slots - 1 - slot, (i - slot * heads) << p.pack);
  };
  look(mine);
  for (int r = 0; r * blocks < jobs; r++) {
    const int i = at(r), slot = rgk_over(i, p.by_heads);
    if (i >= jobs) continue;
    const int row = p.slots - 1 - slot,
              b = C::AHEAD ? find_own_seq(p.seqs, row) : find_seq_warp(p.seqs, row);
    const tile t = tile_at(p.seqs, b, (int64_t)row + b, 1);
    look(at(r + 1));
    f(t, (i - slot * heads) << p.pack);
  }
}
template <class C, class F>
__device__ __forceinline__ void each_token(const rgk_flash_params &p, F f) {
  each_token<C>(
      p, [](int, int) {}, f);
}
/* By a warp: what tells where row `row` has its keys is brought to L1, a job before it is looked at
 * (from memory one would come after the other, each behind all that the copy engine has asked for).
 * A guess that is right where each sequence has a row, of as many pages as lanes reach. */
template <class C>
__device__ __forceinline__ void look_ahead(const rgk_flash_paged &d, memory<C> &s, int row) {
  const rgk_seqs &q = d.f.seqs;
  const rgk_pages &g = d.pages;
  const int lane = threadIdx.x % 32;
  if (row >= q.n || !q.starts) return;
  copies_wait_all();
  const int32_t *const one = lane < 2 ? q.starts + row + lane : g.context + row * g.context_step;
  if (lane < 3) copy4(smem_at(&s.ahead[0][lane]), one);
  if (lane * 8 < g.most) copy4(smem_at(&s.ahead[1][lane]), g.table + row * g.table_row + lane * 8);
}
/* f(job, where its keys are). */
template <class C, class A, class F>
__device__ __forceinline__ void each_job(const rgk_flash_paged &d, A ahead, F f) {
  job j = {};
  in_pages at = {};
  each_token<C>(d.f, ahead, [&](const tile &t, int head) {
    j.head = head;
    place_job<C>(d, t, j, at);
    f(j, at);
  });
}
template <class C, class F>
__device__ __forceinline__ void each_job(const rgk_flash_paged &d, F f) {
  each_job<C>(
      d, [](int, int) {}, f);
}
template <class C>
__device__ __forceinline__ void hand_out_end(const rgk_flash_params &p, memory<C> &s, ring<2> &q,
                                             bool leads) {
  job j = {};
  j.kind = EXIT;
  hand_out<C>(p, s, q, j, leads);
}

/* A thread's box of eight rows of a tile, if it has one. */
struct box {
  int at, row, page; /* bytes in a panel; in the page */
};

/* By a warpgroup: a job's tiles of keys that follow on each other, from the last to the first. Four
 * warps take turns with boxes, a lane each: to start a copy takes long. ready(): returns when there
 * is what they fetch. */
template <class C, class F>
__device__ __forceinline__ void load_job(const rgk_flash_paged &d, memory<C> &s, const job &j,
                                         const in_pages &in, typename C::stages &k,
                                         typename C::stages &v, ring<2> &q, F ready) {
  const rgk_flash_params &p = d.f;
  const int i = (int)threadIdx.x % 32 * 4 + (int)threadIdx.x / 32,
            kv_head = rgk_over(j.head, p.by_group);
  const bool leads = threadIdx.x == 0;
  auto find_box = [&](int t) {
    box b = {i * 1024, 0, d.pages.count};
    const int row = t * C::KEYS + i * 8;
    if (i * 8 >= C::KEYS || t < j.first) return b;
    const int m = rgk_over(row, d.by_rows);
    b.row = row - m * d.pages.rows;
    if (row + 8 > in.low && row < in.rows) b.page = in.table[m];
    return b;
  };
  auto fetch = [&](char *to, const rgk_map *map, uint64_t *full, int panels, const box &b) {
    if (leads) bar_expect(full, (uint32_t)panels * C::KV);
    if (i * 8 < C::KEYS) /* nobody else wants them; products are to stay in L2 */
      tma_load(to + b.at * panels, map, full, 0, b.row, 0, kv_head, b.page, l2::evict_first);
  };
  auto load_k = [&](const box &b) {
    if (!has_keys<C>()) return;
    wait_empty(s.k_empty, k);
    fetch(s.k[k.stage], &p.k, &s.k_full[k.stage], C::DP, b);
    k.next();
  };
  auto load_v = [&](const box &b) {
    if (!has_values<C>()) return;
    wait_empty(s.v_empty, v);
    if (C::TWINS && leads) bar_expect(&s.k_full[v.stage], SENT); /* weights of this tile */
    fetch(v_of<C>(s, v.stage), &p.v, &s.v_full[v.stage], C::EP, b);
    v.next();
  };
  box now = find_box(j.end - 1), next = find_box(j.end - 2); /* pages are asked for early */
  ready();
  if (j.first < j.end) load_k(now);
  hand_out<C>(p, s, q, j, leads);
  for (int t = j.end - 1; t >= j.first; t--) {
    const box later = find_box(t - 2);
    if (t > j.first) load_k(next);
    load_v(now);
    now = next, next = later;
  }
}
template <class C>
__device__ __forceinline__ void load_tiles(const rgk_flash_paged &d, memory<C> &s) {
  typename C::stages k, v;
  ring<2> q;
  each_job<C>(
      d,
      [&](int row, int) {
        if constexpr (C::AHEAD)
          if (threadIdx.x < 32) look_ahead<C>(d, s, row);
      },
      [&](const job &j, const in_pages &in) { load_job<C>(d, s, j, in, k, v, q, []() {}); });
  hand_out_end<C>(d.f, s, q, threadIdx.x == 0);
}

/* By a warp: of selected blocks those that count, of which a lane has one. */
struct chosen_blocks {
  uint32_t left;    /* lanes that have one */
  int e, page, row; /* a lane's: block, where it begins */
};
/* An entry counts if it is larger than all before it, and its block begins among the keys that the
 * token sees; so none comes after one whose block does not. j: one of the token's; it is told how
 * many. */
template <class C>
__device__ __forceinline__ chosen_blocks find_chosen(const rgk_decode_selected &d,
                                                     const int32_t *table, job &j) {
  const int lane = threadIdx.x % 32, kv_head = rgk_over(j.head, d.f.f.by_group),
            seen = min(j.position + 1, j.keys);
  chosen_blocks c = {0, -1, 0, 0};
  if (j.kind == WORK && lane < d.top_n) {
    const int32_t *const e =
        (const int32_t *)d.idx.data + j.token * d.idx.row + kv_head * d.idx.head + lane;
    c.e = C::AHEAD ? *e : __ldcg(e); /* of a layer, chosen in the same launch */
  }
  int before = __shfl_up_sync(~0u, c.e, 1);
  if (lane == 0) before = -1;
#pragma unroll
  for (int n = 1; n < 32; n *= 2) {
    const int x = __shfl_up_sync(~0u, before, n);
    if (lane >= n) before = max(before, x);
  }
  const bool counts = c.e >= 0 && c.e > before && c.e < (seen + C::KEYS - 1) / C::KEYS;
  c.left = __ballot_sync(~0u, counts);
  if (counts) {
    const uint32_t m = (uint32_t)c.e * C::KEYS / (uint32_t)d.f.pages.rows;
    c.page = table[m];
    c.row = c.e * C::KEYS - (int)m * d.f.pages.rows;
  }
  j.first = 0;
  j.end = __popc(c.left);
  return c;
}

/* By a warp: selected blocks. keep(job, key): how long L2 should hold the block that begins there;
 * after(): a job's are asked for. */
template <class C, class F, class G>
__device__ __forceinline__ void load_selected(const rgk_decode_selected &d, memory<C> &s, F keep,
                                              G after) {
  const rgk_flash_params &p = d.f.f;
  const int lane = threadIdx.x % 32;
  ring<C::STAGES> r;
  ring<2> q;
  auto ahead = [&](int row, int head) {
    if constexpr (C::AHEAD) look_ahead<C>(d.f, s, row);
    if (C::AHEAD && lane < d.top_n)
      copy4(smem_at(&s.ahead[2][lane]), (const int32_t *)d.idx.data + row * d.idx.row +
                                            rgk_over(head, p.by_group) * d.idx.head + lane);
  };
  each_job<C>(d.f, ahead, [&](const job &found, const in_pages &at) {
    job j = found;
    const int kv_head = rgk_over(j.head, p.by_group);
    const chosen_blocks c = find_chosen<C>(d, at.table, j);
    hand_out<C>(p, s, q, j, lane == 0);
    for (uint32_t left = c.left; left; left &= left - 1, r.next()) {
      const int from = __ffs(left) - 1, first = __shfl_sync(~0u, c.e, from) * C::KEYS,
                in = __shfl_sync(~0u, c.page, from), at_row = __shfl_sync(~0u, c.row, from);
      if (lane == 0) {
        const l2 hint = keep(j, first);
        bar_wait(&s.k_empty[r.stage], r.parity ^ 1);
        s.first[r.stage] = first;
        bar_expect(&s.k_full[r.stage], C::DP * C::KV);
        for (int x = 0; x < C::DP; x++)
          tma_load(s.k[r.stage] + x * C::KV, &p.k, &s.k_full[r.stage], x * 64, kv_head, at_row, in,
                   hint);
        bar_wait(&s.v_empty[r.stage], r.parity ^ 1);
        bar_expect(&s.v_full[r.stage], C::EP * C::KV);
        for (int x = 0; x < C::EP; x++)
          tma_load(s.v[r.stage] + x * C::KV, &p.v, &s.v_full[r.stage], x * 64, kv_head, at_row, in,
                   hint);
      }
      __syncwarp();
    }
    after();
  });
  hand_out_end<C>(p, s, q, lane == 0);
}

} // namespace decode
} // namespace rgk
