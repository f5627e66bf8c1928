/* kernels/flash_fwd_sm90.cuh: attention forward on Hopper for swa and cmp.
 *
 *     s = scale · q kᵀ (capped), masked to lo(row) … hi(row)     p = exp(s − m)     o = Σ p v / Σ p
 *
 * A job is one tile of query rows of one head; its warpgroups own 64 rows each. A producer warp copies q, and
 * K and V tiles through rings of two stages; key tiles are walked from the last to the first. Blocks stay
 * and take jobs by a fixed rule, so the producer runs ahead into the next job while this one ends.
 *
 *   warpgroup, per key tile j:   start  s' = q k[j]ᵀ,  o += p v[j+1]   (asynchronous, in this order)
 *                                await s'; mask; m, p from s'          (while o += p v runs, and the tensor
 *                                await o; rescale it where m moved     cores serve the other warpgroups)
 *
 * A baton of named barriers has the warpgroups start their products in turn, so that one does its softmax
 * while another multiplies.
 *
 * m is a reference rather than the maximum: it moves only when a row's maximum exceeds it by LAZY powers of
 * two, which almost never happens after the first tile; p then stays below 2^LAZY. Whether it moves depends on
 * that row alone, so neighbours change no bit.
 *
 * Shared memory: panels of 64 elements by the tile's rows, 128-byte swizzle (device/wgmma.cuh):
 *     | q: warpgroup, panel | K: stage, panel | V: stage, panel | barriers |
 * A last K/V tile may hang over the sequence's end. Keys there are masked; rows of V there are cleared by each
 * warpgroup before it multiplies, since 0 · NaN would spread.
 */
#pragma once
#include "device/element.cuh"
#include "device/seq.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "flash.h"

namespace rgk {
namespace flash {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f, LAZY = 8;

template <class Type, int D_, int E_, int GROUPS_, int N_> struct config {
  using type = Type;
  static constexpr int D = D_, E = E_, GROUPS = GROUPS_, N = N_;
  static constexpr int BOX = RGK_FLASH_BOX, ROWS = GROUPS * BOX, STAGES = 2;
  static constexpr int THREADS = (GROUPS + 1) * 128;
  static constexpr int DP = (D + 63) / 64, EP = (E + 63) / 64; /* panels */
  static constexpr uint32_t Q = BOX * 128, KV = N * 128;        /* bytes of a panel */
  static constexpr int PRODUCER_REGS = GROUPS == 2 ? 24 : 32, REGS = GROUPS == 2 ? 240 : 160;
};

template <class C> struct shared {
  alignas(1024) char q[C::GROUPS][C::DP * C::Q];
  char k[C::STAGES][C::DP * C::KV];
  char v[C::STAGES][C::EP * C::KV];
  uint64_t q_full[C::GROUPS], q_empty[C::GROUPS];
  uint64_t k_full[C::STAGES], k_empty[C::STAGES], v_full[C::STAGES], v_empty[C::STAGES];
};

/* ---- jobs ---- */

struct job {
  tile rows;
  int head;
  int position;   /* of the tile's first row, at most 2^31 − 2^20 */
  int keys;       /* of the sequence */
  int key_row;    /* row of its first key in k and v */
  int first, end; /* key tiles [first, end) */
};

/* Last and first key that position x sees; monotone in x. */
__device__ __forceinline__ int last_key(const rgk_flash_params &p, int keys, int x) {
  if (p.mode == RGK_CMP) x = x < p.kernel - 1 ? -1 : (x - p.kernel + 1) / p.stride;
  return min(x, keys - 1);
}
__device__ __forceinline__ int first_key(const rgk_flash_params &p, int x) {
  return p.mode == RGK_CMP || p.window_left < 0 || x <= p.window_left ? 0 : x - (int)p.window_left;
}

/* Job i of `p.jobs`: heads run fastest, row tiles from the last to the first (the heavy ones of a sequence come
 * first). False: nothing to do. */
template <class C> __device__ __forceinline__ bool find_job(const rgk_flash_params &p, uint32_t i, job &j) {
  const uint32_t slot = i / (uint32_t)p.H;
  j.head = (int)(i - slot * (uint32_t)p.H);
  j.rows = find_tile(p.seqs, p.jobs / (uint32_t)p.H - 1 - slot, C::ROWS);
  j.first = j.end = j.keys = j.key_row = j.position = 0;
  if (j.rows.n == 0) return false;
  if (j.rows.b == p.seqs.n) return true;
  int64_t begin = seq_start(p.kseqs, j.rows.b), n = seq_start(p.kseqs, j.rows.b + 1) - begin;
  if (p.mode == RGK_CMP) {
    n = n < p.kernel ? 0 : (n - p.kernel) / p.stride + 1;
    begin /= p.stride;
  }
  n = min(n, p.S - begin);
  if (n <= 0) return true;
  j.keys = (int)n;
  j.key_row = (int)begin;
  const int64_t at = j.rows.first + (p.offset ? p.offset[j.rows.b] : 0);
  j.position = (int)min(at, (int64_t)INT32_MAX - (1 << 20));
  const int last = last_key(p, j.keys, j.position + j.rows.n - 1), lowest = first_key(p, j.position);
  if (last < lowest) return true;
  j.first = lowest / C::N;
  j.end = last / C::N + 1;
  return true;
}

/* Blocks take jobs in rounds, every other round backwards: sums of falling weights come out even. */
__device__ __forceinline__ uint32_t job_of_round(uint32_t round) {
  return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

/* ---- load ---- */

template <class C> __device__ __forceinline__ void produce(const rgk_flash_params &p, shared<C> &s) {
  ring<C::STAGES> k, v;
  uint32_t q_parity = 0;
  auto load_k = [&](const job &j, int t) {
    bar_wait(&s.k_empty[k.stage], k.parity ^ 1);
    bar_expect(&s.k_full[k.stage], C::DP * C::KV);
    for (int x = 0; x < C::DP; x++)
      tma_load(s.k[k.stage] + x * C::KV, &p.k, &s.k_full[k.stage], x * 64, j.head / p.G, j.key_row + t * C::N);
    k.next();
  };
  auto load_v = [&](const job &j, int t) {
    bar_wait(&s.v_empty[v.stage], v.parity ^ 1);
    bar_expect(&s.v_full[v.stage], C::EP * C::KV);
    for (int x = 0; x < C::EP; x++)
      tma_load(s.v[v.stage] + x * C::KV, &p.v, &s.v_full[v.stage], x * 64, j.head / p.G, j.key_row + t * C::N);
    v.next();
  };
  for (uint32_t r = 0, i; (uint32_t)r * gridDim.x < p.jobs; r++) {
    job j;
    if ((i = job_of_round(r)) >= p.jobs || !find_job<C>(p, i, j) || j.first == j.end) continue;
    load_k(j, j.end - 1);
    for (int g = 0; g < C::GROUPS; g++) {
      bar_wait(&s.q_empty[g], q_parity ^ 1);
      bar_expect(&s.q_full[g], C::DP * C::Q);
      for (int x = 0; x < C::DP; x++)
        tma_load(s.q[g] + x * C::Q, &p.q, &s.q_full[g], x * 64, j.head,
                 (int)(j.rows.begin + j.rows.first) + g * C::BOX, l2::evict_first);
    }
    q_parity ^= 1;
    for (int t = j.end - 2; t >= j.first; t--) {
      load_k(j, t);
      load_v(j, t + 1);
    }
    load_v(j, j.first);
  }
}

/* ---- compute ---- */

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

/* s = q kᵀ */
template <class C> __device__ __forceinline__ void start_qk(float (&s)[C::N / 2], uint32_t q, uint32_t k) {
#pragma unroll
  for (int x = 0; x < C::D / 16; x++)
    wgmma<typename C::type, C::N>::template ss<>(s, desc_k(q + x / 4 * C::Q + x % 4 * 32),
                                                 desc_k(k + x / 4 * C::KV + x % 4 * 32), x > 0);
  wgmma_commit();
}
/* o += p v */
template <class C>
__device__ __forceinline__ void start_pv(float (&o)[C::E / 2], const uint32_t (&p)[C::N / 4], uint32_t v) {
#pragma unroll
  for (int x = 0; x < C::N / 16; x++)
    wgmma<typename C::type, C::E>::template rs<true>(o, p + 4 * x, desc_mn(v + x * 2048, C::KV), 1);
  wgmma_commit();
}

/* The two rows that a thread holds of each product. */
struct thread_rows {
  int lo[2], hi[2];   /* keys they see, relative to the thread's first column */
  float m[2], l[2];   /* reference, raw; this thread's share of the sum */
};

/* s → p, unrounded; l grows; scale: what o must be multiplied by. `c`: s to powers of two. */
template <class C, bool first>
__device__ __forceinline__ void softmax(float (&s)[C::N / 2], thread_rows &r, float (&scale)[2], float c, int key,
                                        bool mask_hi, bool mask_lo) {
  if (mask_hi) {
#pragma unroll
    for (int i = 0; i < C::N / 2; i++)
      if (i / 4 * 8 + i % 2 > r.hi[i / 2 % 2] - key) s[i] = -INFINITY;
  }
  if (mask_lo) {
#pragma unroll
    for (int i = 0; i < C::N / 2; i++)
      if (i / 4 * 8 + i % 2 < r.lo[i / 2 % 2] - key) s[i] = -INFINITY;
  }
#pragma unroll
  for (int y = 0; y < 2; y++) {
    float a = s[2 * y], b = s[2 * y + 1];
#pragma unroll
    for (int i = 1; i < C::N / 8; i++) a = fmaxf(a, s[4 * i + 2 * y]), b = fmaxf(b, s[4 * i + 2 * y + 1]);
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

/* c·tanh(s·scale / c), `to` = 2·scale / c in powers of two: 1 − 2 / (1 + e^2x) keeps the absolute error near
 * 1e-7 c. */
template <int n> __device__ __forceinline__ void cap(float (&s)[n], float to, float softcap) {
#pragma unroll
  for (int i = 0; i < n; i++) s[i] = softcap * (1 - __fdividef(2, 1 + exp2_fast(s[i] * to)));
}

template <class C>
__device__ __forceinline__ void pack(uint32_t (&p)[C::N / 4], const float (&s)[C::N / 2]) {
#pragma unroll
  for (int i = 0; i < C::N / 4; i++) p[i] = pack2<typename C::type>(s[2 * i], s[2 * i + 1]);
}

/* Rows of a V tile from `from` on are zeroed, by this warpgroup for itself. */
template <class C> __device__ __forceinline__ void clear_tail(char *v, int from, int group) {
#pragma unroll 1
  for (int x = 0; x < C::EP; x++)
#pragma unroll 1
    for (int i = from * 8 + (int)(threadIdx.x % 128); i < C::N * 8; i += 128)
      *(uint4 *)(v + x * C::KV + i * 16) = make_uint4(0, 0, 0, 0);
  proxy_fence();
  named_sync(8 + group, 128);
}

/* ---- epilogue ---- */

/* Lane t of a quad holds word t of four 16-byte pieces; afterwards all four words of piece t. */
__device__ __forceinline__ void quad_transpose(uint32_t (&w)[4]) {
  const bool a = threadIdx.x & 1, b = threadIdx.x & 2;
  uint32_t x = __shfl_xor_sync(~0u, a ? w[0] : w[1], 1), y = __shfl_xor_sync(~0u, a ? w[2] : w[3], 1);
  if (a) w[0] = x, w[2] = y;
  else w[1] = x, w[3] = y;
  x = __shfl_xor_sync(~0u, b ? w[0] : w[2], 2), y = __shfl_xor_sync(~0u, b ? w[1] : w[3], 2);
  if (b) w[0] = x, w[1] = y;
  else w[2] = x, w[3] = y;
}

/* o·f and lse of the thread's rows. `row`: of the first of them, inside the tile. */
template <class C>
__device__ __forceinline__ void finish(const rgk_flash_params &p, const job &j, int row, float (&o)[C::E / 2],
                                       thread_rows &r, float c) {
  const float sink = p.sinks.data ? load(p.sinks.data, p.sinks.dtype, j.head * p.sinks.row) * LOG2E : -INFINITY;
  const int t = (int)threadIdx.x & 3;
#pragma unroll
  for (int y = 0; y < 2; y++) {
    const int at = row + 8 * y;
    float l = quad_sum(r.l[y]), m = l == 0 ? -INFINITY : r.m[y] * c, f = l == 0 ? 0 : 1;
    if (sink > -INFINITY) {
      const float top = fmaxf(m, sink);
      f = exp2f(m - top);
      l = l * f + exp2f(sink - top);
      m = top;
    }
    f = f == 0 ? 0 : f / l;
    const bool live = at < j.rows.n, seen = f != 0;
    const int64_t token = j.rows.begin + j.rows.first + at;
    if (live && t == 0 && p.lse.data)
      ((float *)p.lse.data)[token * p.lse.row + j.head * p.lse.head] =
          l == 0 ? -INFINITY : m * LN2 + logf(l);
    typename C::type *out = (typename C::type *)p.o.data + token * p.o.row + j.head * p.o.head;
#pragma unroll
    for (int x = 0; x < C::E / 32; x++) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float *a = &o[16 * x + 4 * i + 2 * y];
        w[i] = seen ? pack2<typename C::type>(a[0] * f, a[1] * f) : 0;
      }
      quad_transpose(w);
      const int column = 32 * x + 8 * t;
      if (live && column < p.E) *(uint4 *)(out + column) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

/* A tile of dead rows. */
template <class C> __device__ __forceinline__ void clear_rows(const rgk_flash_params &p, const job &j) {
  const int pieces = p.E / 8;
  for (int i = (int)threadIdx.x - 128; i < j.rows.n * pieces; i += C::GROUPS * 128) {
    const int64_t token = j.rows.begin + j.rows.first + i / pieces;
    typename C::type *out = (typename C::type *)p.o.data + token * p.o.row + j.head * p.o.head;
    *(uint4 *)(out + i % pieces * 8) = make_uint4(0, 0, 0, 0);
    if (i % pieces == 0 && p.lse.data) ((float *)p.lse.data)[token * p.lse.row + j.head * p.lse.head] = 0;
  }
}

/* ---- kernel ---- */

template <class C> __device__ __forceinline__ void consume(const rgk_flash_params &p, shared<C> &s, int group) {
  const int warp = (int)threadIdx.x / 32 % 4, lane = (int)threadIdx.x % 32;
  const int row = group * C::BOX + warp * 16 + lane / 4; /* of the thread's first row, inside the tile */
  const float c = p.softcap > 0 ? LOG2E : p.scale * LOG2E,
              to = p.scale / p.softcap * 2 * LOG2E;
  const uint32_t q = smem_at(s.q[group]);
  auto baton_wait = [&]() { named_sync(1 + group, 256); };
  auto baton_pass = [&]() { named_arrive(1 + (group + 1) % C::GROUPS, 256); };
  auto release = [&](uint64_t *bar) {
    __syncwarp();
    if (lane == 0) bar_arrive(bar);
  };
  ring<C::STAGES> k, v;
  uint32_t q_parity = 0;
  if (group == C::GROUPS - 1) baton_pass();

  for (uint32_t round = 0, i; round * gridDim.x < p.jobs; round++) {
    job j;
    if ((i = job_of_round(round)) >= p.jobs || !find_job<C>(p, i, j)) continue;
    if (j.rows.b == p.seqs.n) {
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
      for (int y = 0; y < 2; y++) {
        r.lo[y] = first_key(p, j.position + row + 8 * y) - 2 * (lane & 3);
        r.hi[y] = last_key(p, j.keys, j.position + row + 8 * y) - 2 * (lane & 3);
      }
      /* tiles from here on need masking; below it too */
      const int hi_all = last_key(p, j.keys, j.position + group * C::BOX) + 1,
                lo_all = first_key(p, j.position + group * C::BOX + C::BOX - 1);
      auto masks_hi = [&](int t) { return (t + 1) * C::N > hi_all; };
      auto masks_lo = [&](int t) { return t * C::N < lo_all; };
      auto tail = [&](int t) {
        if ((t + 1) * C::N > j.keys) clear_tail<C>(s.v[v.stage], j.keys - t * C::N, group);
      };

      int t = j.end - 1;
      {
        float x[C::N / 2];
        bar_wait(&s.q_full[group], q_parity);
        q_parity ^= 1;
        bar_wait(&s.k_full[k.stage], k.parity);
        baton_wait();
        wgmma_fence();
        start_qk<C>(x, q, smem_at(s.k[k.stage]));
        baton_pass();
        wgmma_wait<0>();
        wgmma_keep(x);
        release(&s.k_empty[k.stage]);
        k.next();
        if (p.softcap > 0) cap(x, to, p.softcap);
        softmax<C, true>(x, r, scale, c, t * C::N, masks_hi(t), masks_lo(t));
        pack<C>(pr, x);
      }
      for (t--; t >= j.first; t--) {
        float x[C::N / 2];
        bar_wait(&s.k_full[k.stage], k.parity);
        baton_wait();
        wgmma_fence();
        start_qk<C>(x, q, smem_at(s.k[k.stage]));
        bar_wait(&s.v_full[v.stage], v.parity);
        tail(t + 1);
        wgmma_fence();
        start_pv<C>(o, pr, smem_at(s.v[v.stage]));
        baton_pass();
        wgmma_wait<1>();
        wgmma_keep(x);
        release(&s.k_empty[k.stage]);
        k.next();
        if (p.softcap > 0) cap(x, to, p.softcap);
        softmax<C, false>(x, r, scale, c, t * C::N, masks_hi(t), masks_lo(t));
        /* The branch keeps the compiler from pulling the wait up before the softmax. */
        const bool moved = __any_sync(~0u, scale[0] != 1 || scale[1] != 1);
        wgmma_keep(x);
        if (moved) {
          wgmma_wait<0>();
          wgmma_keep(o);
#pragma unroll
          for (int e = 0; e < C::E / 2; e++) o[e] *= scale[e / 2 % 2];
        } else {
          wgmma_wait<0>();
          wgmma_keep(o);
        }
        wgmma_keep(pr);
        release(&s.v_empty[v.stage]);
        v.next();
        pack<C>(pr, x);
      }
      release(&s.q_empty[group]);
      bar_wait(&s.v_full[v.stage], v.parity);
      tail(j.first);
      wgmma_fence();
      start_pv<C>(o, pr, smem_at(s.v[v.stage]));
      wgmma_wait<0>();
      wgmma_keep(o);
      release(&s.v_empty[v.stage]);
      v.next();
    }
    finish<C>(p, j, row, o, r, c);
  }
  if (group == 0) baton_wait();
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) forward(const __grid_constant__ rgk_flash_params p) {
  extern __shared__ char memory[];
  shared<C> &s = *(shared<C> *)(memory + (-smem_at(memory) & 1023));
  if (threadIdx.x == 0) {
    for (int g = 0; g < C::GROUPS; g++) bar_init(&s.q_full[g], 1), bar_init(&s.q_empty[g], 4);
    for (int i = 0; i < C::STAGES; i++) {
      bar_init(&s.k_full[i], 1), bar_init(&s.k_empty[i], 4 * C::GROUPS);
      bar_init(&s.v_full[i], 1), bar_init(&s.v_empty[i], 4 * C::GROUPS);
    }
    bar_init_done();
    map_prefetch(&p.q), map_prefetch(&p.k), map_prefetch(&p.v);
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
