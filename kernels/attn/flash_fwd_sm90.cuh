/* kernels/attn/flash_fwd_sm90.cuh: attention forward on Hopper for swa and cmp.

       s = scale · q kᵀ (capped), masked to lo(row) … hi(row)     p = exp(s − m)     o = Σ p v / Σ p

   A job is one tile of query rows of one head; its warpgroups own 64 rows each. Blocks stay and
   take jobs by a fixed rule. A producer thread finds them, hands them out beside their q, and
   copies K and V tiles through rings of two stages, from the last key tile to the first; it runs
   ahead into the next job while one ends.

     warpgroup, per key tile j:
       start  s' = q k[j]ᵀ,  o += p v[j+1]   (asynchronous, in this order)
       await s'; mask; m, p from s'          (while o += p v runs, and the tensor cores
       await o; rescale it where m moved     serve the other warpgroups)

   A baton of named barriers has the warpgroups start their products in turn, so that one does its
   softmax while another multiplies. Each warp's 16 rows of o leave through shared memory by the
   copy engine.

   m is a reference rather than the maximum: it moves only when a row's maximum exceeds it by LAZY
   powers of two, which almost never happens after the first tile; p then stays below 2^LAZY.
   Whether it moves depends on that row alone, so neighbours change no bit.

   Compressed keys are counted as they lie in pages (docs/serving.md): row r = j + before of a
   sequence is the page row of its block's last token, and key tiles begin at multiples of N of r. A
   first tile then has `before` rows of whatever lies before the sequence.

   Shared memory: panels of 64 elements by the tile's rows, 128-byte swizzle (device/wgmma.cuh):
       | q: warpgroup, panel | K: stage, panel | V: stage, panel | o: warpgroup, panel | jobs |
       | barriers |
   Where o does not fit, it goes through q's room (width 256). A first K/V tile may hang over the
   sequence's beginning, a last one over its end. Keys there are masked; rows of V there are cleared
   by each warpgroup before it multiplies, since 0 · NaN would spread.
 */
#pragma once
#include "../device/element.cuh"
#include "../device/ptx.cuh"
#include "../device/seq.cuh"
#include "../device/softmax.cuh"
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
  static constexpr int BOX = RGK_FLASH_BOX, ROWS = GROUPS * BOX, STAGES = 2;
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
  int token, rows; /* first row in q and o; how many the sequence has */
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

/* Job i of `p.jobs`: heads run fastest, row tiles from the last to the first (the heavy ones of a
 * sequence come first). False: nothing to do. */
template <class C>
__device__ __forceinline__ bool find_job(const rgk_flash_params &p, int i, job &j, int &key_row) {
  const int slot = rgk_over(i, p.by_heads);
  const tile t = find_tile(p.seqs, p.slots - 1 - slot, C::ROWS);
  j.head = i - slot * p.H;
  j.kind = t.b == p.seqs.n ? DEAD_ROWS : WORK;
  j.token = (int)(t.begin + t.first);
  j.rows = t.n;
  j.position = j.keys = j.first = j.end = 0;
  if (t.n == 0) return false;
  if (j.kind == DEAD_ROWS) return true;
  int begin = (int)seq_start(p.kseqs, t.b), n = (int)seq_start(p.kseqs, t.b + 1) - begin;
  if (p.mode == RGK_CMP) {
    n = n < p.kernel ? 0 : rgk_over(n - p.kernel, p.by_stride) + 1;
    begin = rgk_over(begin, p.by_stride);
  }
  n = min(n, (int)p.S - begin);
  if (n <= 0) return true;
  n += p.before;
  key_row = begin - p.before;
  j.keys = n;
  j.position = (int)min(t.first + (p.offset ? p.offset[t.b] : 0), (int64_t)INT32_MAX - C::ROWS);
  const int last = last_key(p, n, j.position + t.n - 1), lowest = first_key(p, j.position);
  if (last < lowest) return true;
  j.first = lowest / C::N;
  j.end = last / C::N + 1;
  return true;
}

/* ---- load ---- */

template <class C>
__device__ __forceinline__ void produce(const rgk_flash_params &p, shared<C> &s) {
  ring<C::STAGES> k, v;
  uint32_t q_parity = 0;
  job j;
  int key_row = 0, kv_head = 0;
  auto load_k = [&](int t) {
    bar_wait(&s.k_empty[k.stage], k.parity ^ 1);
    bar_expect(&s.k_full[k.stage], C::DP * C::KV);
    for (int x = 0; x < C::DP; x++)
      tma_load(s.k[k.stage] + x * C::KV, &p.k, &s.k_full[k.stage], x * 64, kv_head,
               key_row + t * C::N);
    k.next();
  };
  auto load_v = [&](int t) {
    bar_wait(&s.v_empty[v.stage], v.parity ^ 1);
    bar_expect(&s.v_full[v.stage], C::EP * C::KV);
    for (int x = 0; x < C::EP; x++)
      tma_load(s.v[v.stage] + x * C::KV, &p.v, &s.v_full[v.stage], x * 64, kv_head,
               key_row + t * C::N);
    v.next();
  };
  auto hand_out = [&]() {
    for (int g = 0; g < C::GROUPS; g++) {
      bar_wait(&s.q_empty[g], q_parity ^ 1);
      s.jobs[g] = j;
      if (j.first == j.end) {
        bar_ready(&s.q_full[g]);
        continue;
      }
      bar_expect(&s.q_full[g], C::DP * C::Q);
      for (int x = 0; x < C::DP; x++)
        tma_load(s.q[g] + x * C::Q, &p.q, &s.q_full[g], x * 64, j.head, j.token + g * C::BOX,
                 l2::evict_first);
    }
    q_parity ^= 1;
  };
  /* Every other round goes backwards: sums of falling weights come out even. */
  const int jobs = p.slots * p.H, blocks = (int)gridDim.x;
  for (int r = 0; r * blocks < jobs; r++) {
    const int i = r * blocks + (r & 1 ? blocks - 1 - (int)blockIdx.x : (int)blockIdx.x);
    if (i >= jobs || !find_job<C>(p, i, j, key_row)) continue;
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

/* ---- compute ---- */

/* The rows of q that a thread multiplies: where a warpgroup's are in shared memory, or, where
 * registers allow, its warp's 16 rows as the A of D / 16 steps. That saves a third of the traffic
 * of q kᵀ, and q's room is free for the next job. */
template <class C, bool = C::Q_REGS> struct query_of { using type = uint32_t; };
template <class C> struct query_of<C, true> { using type = uint32_t[C::D / 4]; };
template <class C> using query = typename query_of<C>::type;

/* `q`: where the warp's rows of the first panel are. */
template <class C> __device__ __forceinline__ void load_q(uint32_t (&a)[C::D / 4], uint32_t q) {
  const int lane = (int)threadIdx.x % 32, row = lane % 16;
#pragma unroll
  for (int x = 0; x < C::D / 16; x++)
    load_matrices(q + x / 4 * C::Q + row * 128 + ((x % 4 * 2 + lane / 16) ^ (row & 7)) * 16,
                  a + 4 * x);
}
/* s = q kᵀ */
template <class C>
__device__ __forceinline__ void start_qk(float (&s)[C::N / 2], const query<C> &q, uint32_t k) {
#pragma unroll
  for (int x = 0; x < C::D / 16; x++) {
    const uint64_t at = desc_k(k + x / 4 * C::KV + x % 4 * 32);
    if constexpr (C::Q_REGS)
      wgmma<typename C::type, C::N>::template rs<>(s, q + 4 * x, at, x > 0);
    else
      wgmma<typename C::type, C::N>::template ss<>(s, desc_k(q + x / 4 * C::Q + x % 4 * 32), at,
                                                   x > 0);
  }
  wgmma_commit();
}
/* o += p v */
template <class C>
__device__ __forceinline__ void start_pv(float (&o)[C::E / 2], const uint32_t (&p)[C::N / 4],
                                         uint32_t v) {
#pragma unroll
  for (int x = 0; x < C::N / 16; x++)
    wgmma<typename C::type, C::E>::template rs<true>(o, p + 4 * x, desc_mn(v + x * 2048, C::KV), 1);
  wgmma_commit();
}

/* The two rows that a thread holds of each product. */
struct thread_rows {
  int lo[2], hi[2];      /* keys they see, relative to the thread's first column */
  int lo_last, hi_first; /* what all rows of the warp see, absolute */
  float m[2], l[2];      /* reference, raw; this thread's share of the sum */
};

/* Columns outside lo … hi become −inf. Blocks of 32 columns that all rows of the warp see, or none,
 * go quickly. */
template <int n>
__device__ __forceinline__ void mask(float (&s)[n], const thread_rows &r, int key) {
  const int lo[2] = {r.lo[0] - key, r.lo[1] - key}, hi[2] = {r.hi[0] - key, r.hi[1] - key};
  const int lo_last = r.lo_last - key, hi_first = r.hi_first - key;
#pragma unroll
  for (int b = 0; b < 2 * n; b += 32) {
    const int end = b + 32 < 2 * n ? b + 32 : 2 * n; /* columns */
    if (b < lo_last || end - 1 > hi_first) {
#pragma unroll
      for (int i = b / 2; i < end / 2; i++)
        if (i / 4 * 8 + i % 2 > hi[i / 2 % 2] || i / 4 * 8 + i % 2 < lo[i / 2 % 2])
          s[i] = -INFINITY;
    }
  }
}

/* s → p, unrounded; l grows; scale: what o must be multiplied by. `c`: s to powers of two. */
template <class C, bool first>
__device__ __forceinline__ void softmax(float (&s)[C::N / 2], thread_rows &r, float (&scale)[2],
                                        float c, int key) {
  if (key < r.lo_last || key + C::N - 1 > r.hi_first) mask(s, r, key);
#pragma unroll
  for (int y = 0; y < 2; y++) {
    float a = s[2 * y], b = s[2 * y + 1];
#pragma unroll
    for (int i = 1; i < C::N / 8; i++)
      a = fmaxf(a, s[4 * i + 2 * y]), b = fmaxf(b, s[4 * i + 2 * y + 1]);
    const float top = quad_max(fmaxf(a, b)), old = r.m[y];
    if (first) {
      r.m[y] = top;
    } else {
      const bool move = (top - old) * c > LAZY; /* −inf − −inf: no */
      r.m[y] = move ? top : old;
      scale[y] = move ? exp2_fast((old - top) * c) : 1;
      r.l[y] *= scale[y];
    }
  }
#pragma unroll
  for (int y = 0; y < 2; y++) {
    const float minus = r.m[y] == -INFINITY ? 0 : -r.m[y] * c;
    float sum = first ? 0 : r.l[y];
#pragma unroll
    for (int i = 0; i < C::N / 8; i++) {
      float &a = s[4 * i + 2 * y], &b = s[4 * i + 2 * y + 1];
      a = exp2_fast(fmaf(a, c, minus));
      b = exp2_fast(fmaf(b, c, minus));
      sum += a + b;
    }
    r.l[y] = sum;
  }
}

template <class C>
__device__ __forceinline__ void pack(uint32_t (&p)[C::N / 4], const float (&s)[C::N / 2]) {
#pragma unroll
  for (int i = 0; i < C::N / 4; i++) p[i] = pack2<typename C::type>(s[2 * i], s[2 * i + 1]);
}

/* Rows [from, to) of a V tile are zeroed, by this warpgroup for itself. */
template <class C>
__device__ __forceinline__ void clear_keys(char *v, int from, int to, int group) {
#pragma unroll 1
  for (int x = 0; x < C::EP; x++)
#pragma unroll 1
    for (int i = from * 8 + (int)(threadIdx.x % 128); i < to * 8; i += 128)
      *(uint4 *)(v + x * C::KV + i * 16) = make_uint4(0, 0, 0, 0);
  proxy_fence();
  named_sync(EACH + group, WARPGROUP);
}

/* ---- epilogue ---- */

/* Turns sums into averages, with the sink, and finds lse. */
template <class C>
__device__ __forceinline__ void average(const rgk_flash_params &p, const job &j,
                                        float (&o)[C::E / 2], const thread_rows &r, float c,
                                        float (&lse)[2]) {
  const float sink =
      p.sinks.data ? load(p.sinks.data, p.sinks.dtype, j.head * p.sinks.row) : -INFINITY;
#pragma unroll
  for (int y = 0; y < 2; y++) {
    const row_end end = finish_row(r.m[y] * c, quad_sum(r.l[y]), sink);
    lse[y] = end.lse;
#pragma unroll
    for (int x = 0; x < C::E / 4; x++) {
      float &a = o[x / 2 * 4 + 2 * y + x % 2];
      a = end.scale == 0 ? 0 : a * end.scale;
    }
  }
}

/* `row`: of the thread's first row, inside the tile. */
__device__ __forceinline__ void write_lse(const rgk_flash_params &p, const job &j, int row,
                                          const float (&lse)[2]) {
  if (!p.lse.data || threadIdx.x % 4 != 0) return;
#pragma unroll
  for (int y = 0; y < 2; y++)
    if (row + 8 * y < j.rows)
      ((float *)p.lse.data)[(int64_t)(j.token + row + 8 * y) * p.lse.row + j.head * p.lse.head] =
          lse[y];
}

/* A warp's 16 rows go through shared memory: whole ones by the copy engine, the last ones of a
 * sequence row by row. `at`: the warp's rows of the first panel of C::Q bytes. Returns what depends
 * on all that this thread read there. */
template <class C>
__device__ __forceinline__ uint32_t write(const rgk_flash_params &p, const job &j, int first,
                                          float (&o)[C::E / 2], char *at) {
  const int lane = (int)threadIdx.x % 32, row = lane % 16, rows = j.rows - first;
  uint32_t copied = 0;
  if (rows <= 0) return copied;
#pragma unroll
  for (int x = 0; x < C::E / 16; x++)
    store_matrices<typename C::type>(smem_at(at) + x / 4 * C::Q + row * 128 +
                                         ((x % 4 * 2 + lane / 16) ^ (row & 7)) * 16,
                                     o + 8 * x);
  if (rows >= 16) {
    proxy_fence();
    __syncwarp();
    if (lane == 0) {
      for (int x = 0; x < C::EP; x++)
        tma_store(&p.o_map, at + x * C::Q, x * 64, j.head, j.token + first);
      store_commit();
    }
    return copied;
  }
  if (!C::OWN_O) proxy_fence(); /* the copy engine will write there */
  __syncwarp();
  const int pieces = p.E / 8;
  for (int i = lane; i < rows * pieces; i += 32) {
    const int y = i / pieces, x = i - y * pieces;
    typename C::type *out =
        (typename C::type *)p.o.data + (int64_t)(j.token + first + y) * p.o.row + j.head * p.o.head;
    const uint4 piece = *(const uint4 *)(at + x / 8 * C::Q + y * 128 + (x % 8 ^ (y & 7)) * 16);
    *(uint4 *)(out + x * 8) = piece;
    copied ^= piece.x;
  }
  return copied;
}

/* A tile of dead rows. */
template <class C>
__device__ __forceinline__ void clear_rows(const rgk_flash_params &p, const job &j) {
  const int pieces = p.E / 8;
  for (int i = (int)threadIdx.x - 128; i < j.rows * pieces; i += C::GROUPS * 128) {
    const int y = i / pieces, x = i - y * pieces;
    const int64_t token = j.token + y;
    *(uint4 *)((typename C::type *)p.o.data + token * p.o.row + j.head * p.o.head + x * 8) =
        make_uint4(0, 0, 0, 0);
    if (x == 0 && p.lse.data) ((float *)p.lse.data)[token * p.lse.row + j.head * p.lse.head] = 0;
  }
}

/* ---- kernel ---- */

/* Which keys of its tiles the thread's rows see, `row` being the first of them. */
__device__ __forceinline__ void find_keys(const rgk_flash_params &p, const job &j, int row,
                                          int lane, thread_rows &r) {
  for (int y = 0; y < 2; y++) {
    r.lo[y] = first_key(p, j.position + row + 8 * y) - 2 * (lane & 3);
    r.hi[y] = last_key(p, j.keys, j.position + row + 8 * y) - 2 * (lane & 3);
  }
  const int top = j.position + row - lane / 4;
  r.lo_last = first_key(p, top + 15), r.hi_first = last_key(p, j.keys, top);
}

/* A job's end: its rows of o and lse leave, and q's room is given back where o goes through it. */
template <class C>
__device__ __forceinline__ void finish(const rgk_flash_params &p, shared<C> &s, const job &j,
                                       int group, int warp, int lane, int row, float c,
                                       float (&o)[C::E / 2], thread_rows &r) {
  float lse[2];
  average<C>(p, j, o, r, c, lse);
  if (C::OWN_O) { /* the copy engine has read the last job's rows */
    if (lane == 0) store_wait_read<0>();
    __syncwarp();
  } else { /* all warps are done with q */
    named_sync(EACH + group, WARPGROUP);
  }
  const uint32_t copied =
      write<C>(p, j, row - lane / 4, o, (C::OWN_O ? s.o[group] : s.q[group]) + warp * 2048);
  /* last: the fence before the copy engine waits for stores before it */
  write_lse(p, j, row, lse);
  if (!C::OWN_O) {
    const waited stored = lane == 0 ? store_wait_read<0>() : waited::for_nothing();
    __syncwarp();
    bar_release(&s.q_empty[group], stored, copied, j.head, j.keys);
  }
}

template <class C>
__device__ __forceinline__ void consume(const rgk_flash_params &p, shared<C> &s, int group) {
  const int warp = (int)threadIdx.x / 32 % 4, lane = (int)threadIdx.x % 32;
  /* of the thread's first row, inside the tile */
  const int row = group * C::BOX + warp * 16 + lane / 4;
  const float c = p.softcap > 0 ? LOG2E : p.scale * LOG2E, to = p.scale / p.softcap * 2 * LOG2E;
  auto baton_wait = [&]() { named_sync(BATON + group, 2 * WARPGROUP); };
  auto baton_pass = [&]() { named_arrive(BATON + (group + 1) % C::GROUPS, 2 * WARPGROUP); };
  ring<C::STAGES> k, v;
  if (group == C::GROUPS - 1) baton_pass();

  for (uint32_t q_parity = 0;; q_parity ^= 1) {
    bar_wait(&s.q_full[group], q_parity);
    const job j = s.jobs[group];
    if (j.kind == EXIT) break;
    if (j.kind == DEAD_ROWS) {
      bar_release(&s.q_empty[group], j.head, j.keys);
      clear_rows<C>(p, j);
      continue;
    }
    float o[C::E / 2];
    thread_rows r;
#pragma unroll
    for (int x = 0; x < C::E / 2; x++) o[x] = 0;
    for (int y = 0; y < 2; y++) r.m[y] = -INFINITY, r.l[y] = 0;

    if (j.first < j.end) {
      uint32_t pr[C::N / 4];
      float scale[2];
      query<C> q;
      waited scored = waited::for_nothing();
      if constexpr (C::Q_REGS)
        load_q<C>(q, smem_at(s.q[group]) + warp * 2048);
      else
        q = smem_at(s.q[group]);
      find_keys(p, j, row, lane, r);
      auto clear = [&](int t) {
        const int at = t * C::N;
        if (at < p.before) clear_keys<C>(s.v[v.stage], 0, min(p.before - at, C::N), group);
        if (at + C::N > j.keys) clear_keys<C>(s.v[v.stage], j.keys - at, C::N, group);
      };

      int t = j.end - 1;
      {
        float x[C::N / 2];
        bar_wait(&s.k_full[k.stage], k.parity);
        baton_wait();
        wgmma_fence();
        start_qk<C>(x, q, smem_at(s.k[k.stage]));
        baton_pass();
        scored = wgmma_wait<0>();
        wgmma_keep(x);
        /* Not before: the product has taken what ldmatrix read. */
        if (C::Q_REGS) bar_release(&s.q_empty[group], x[0], j.head, j.keys);
        warp_release(&s.k_empty[k.stage], scored);
        k.next();
        if (p.softcap > 0) cap(x, to, p.softcap);
        softmax<C, true>(x, r, scale, c, t * C::N);
        pack<C>(pr, x);
      }
      if (t > j.first) bar_wait(&s.k_full[k.stage], k.parity);
      for (t--; t >= j.first; t--) {
        float x[C::N / 2];
        baton_wait();
        wgmma_fence();
        start_qk<C>(x, q, smem_at(s.k[k.stage]));
        bar_wait(&s.v_full[v.stage], v.parity);
        clear(t + 1);
        wgmma_fence();
        start_pv<C>(o, pr, smem_at(s.v[v.stage]));
        baton_pass();
        scored = wgmma_wait<1>();
        wgmma_keep(x);
        warp_release(&s.k_empty[k.stage], scored);
        k.next();
        if (p.softcap > 0) cap(x, to, p.softcap);
        softmax<C, false>(x, r, scale, c, t * C::N);
        wgmma_keep(x);
        /* This wait's loop also keeps the compiler from pulling the next one up before the
         * softmax. */
        if (t > j.first) bar_wait(&s.k_full[k.stage], k.parity);
        const waited added = wgmma_wait<0>();
        wgmma_keep(o);
        wgmma_keep(pr);
        warp_release(&s.v_empty[v.stage], added);
        v.next();
        if (__any_sync(~0u, scale[0] != 1 || scale[1] != 1))
          each(o, [&](float &a, int i, int) { a *= scale[i]; });
        pack<C>(pr, x);
      }
      if (C::OWN_O && !C::Q_REGS) bar_release(&s.q_empty[group], scored, j.head, j.keys);
      bar_wait(&s.v_full[v.stage], v.parity);
      clear(j.first);
      wgmma_fence();
      start_pv<C>(o, pr, smem_at(s.v[v.stage]));
      const waited added = wgmma_wait<0>();
      wgmma_keep(o);
      warp_release(&s.v_empty[v.stage], added);
      v.next();
    } else if (C::OWN_O) {
      bar_release(&s.q_empty[group], j.head, j.keys);
    }
    finish<C>(p, s, j, group, warp, lane, row, c, o, r);
  }
  if (lane == 0) store_wait_read<0>();
  if (group == 0) baton_wait();
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1)
    forward(const __grid_constant__ rgk_flash_params p) {
  extern __shared__ char memory[];
  static_assert(sizeof(shared<C>) + 1024 <= RGK_FLASH_BYTES(C::D, C::E, C::GROUPS, C::N),
                "fits wherever it starts");
  shared<C> &s = *(shared<C> *)(memory + (-smem_at(memory) & 1023));
  if (threadIdx.x == 0) {
    for (int g = 0; g < C::GROUPS; g++) bar_init(&s.q_full[g], 1), bar_init(&s.q_empty[g], 128);
    for (int i = 0; i < C::STAGES; i++) {
      bar_init(&s.k_full[i], 1), bar_init(&s.k_empty[i], 4 * C::GROUPS * WARP_ARRIVALS);
      bar_init(&s.v_full[i], 1), bar_init(&s.v_empty[i], 4 * C::GROUPS * WARP_ARRIVALS);
    }
    bar_init_done();
    map_prefetch(&p.q), map_prefetch(&p.k), map_prefetch(&p.v), map_prefetch(&p.o_map);
  }
  __syncthreads();
  const int part = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
  if (part == 0) {
    fewer_registers<C::PRODUCER_REGS>();
    if (threadIdx.x == 0) produce<C>(p, s);
  } else {
    more_registers<C::REGS>();
    consume<C>(p, s, part - 1);
  }
}

} // namespace flash
} // namespace rgk
