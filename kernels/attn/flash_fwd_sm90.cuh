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

   Over pages a tile's rows are all heads of a KV head, token by token, where their number is a
   power of two: the tokens of a step are few, and a row's bits do not depend on its neighbours. A
   warpgroup fetches tiles there, in boxes of eight rows, and steps of single tokens take one that
   computes.

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
#include "../device/softmax.cuh"
#include "../device/wgmma.cuh"
#include "flash_fwd_load.cuh"

namespace rgk {
namespace flash {

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
template <class C, bool PAGED>
__device__ __forceinline__ void start_qk(float (&s)[C::N / 2], const query<C> &q, uint32_t k) {
#pragma unroll
  for (int x = 0; x < C::D / 16; x++) {
    using T = tile_of<C, PAGED>;
    const uint64_t at = desc_make(k + x / 4 * T::K_PANEL + x % 4 * 32, 16, T::K_EIGHT);
    if constexpr (C::Q_REGS)
      wgmma<typename C::type, C::N>::template rs<>(s, q + 4 * x, at, x > 0);
    else
      wgmma<typename C::type, C::N>::template ss<>(s, desc_k(q + x / 4 * C::Q + x % 4 * 32), at,
                                                   x > 0);
  }
  wgmma_commit();
}
/* o += p v */
template <class C, bool PAGED>
__device__ __forceinline__ void start_pv(float (&o)[C::E / 2], const uint32_t (&p)[C::N / 4],
                                         uint32_t v) {
  using T = tile_of<C, PAGED>;
#pragma unroll
  for (int x = 0; x < C::N / 16; x++)
    wgmma<typename C::type, C::E>::template rs<true>(
        o, p + 4 * x, desc_make(v + 2 * x * T::V_EIGHT, T::V_PANEL, T::V_EIGHT), 1);
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
template <class C, bool PAGED>
__device__ __forceinline__ void clear_keys(char *v, int from, int to, int group) {
  using T = tile_of<C, PAGED>;
#pragma unroll 1
  for (int x = 0; x < C::EP; x++)
#pragma unroll 1
    for (int i = from * 8 + (int)(threadIdx.x % 128); i < to * 8; i += 128)
      *(uint4 *)(v + x * T::V_PANEL + i / 64 * T::V_EIGHT + i % 64 * 16) = make_uint4(0, 0, 0, 0);
  proxy_fence();
  named_sync(EACH + group, WARPGROUP);
}

/* ---- epilogue ---- */

/* Turns sums into averages, with the sink, and finds lse. `row`: of the thread's first row, inside
 * the tile. */
template <class C, bool PAGED>
__device__ __forceinline__ void average(const rgk_flash_params &p, const job &j, int row,
                                        float (&o)[C::E / 2], const thread_rows &r, float c,
                                        float (&lse)[2]) {
#pragma unroll
  for (int y = 0; y < 2; y++) {
    const int head = j.head + place_row<PAGED>(p, row + 8 * y).head;
    const float sink =
        p.sinks.data ? load(p.sinks.data, p.sinks.dtype, head * p.sinks.row) : -INFINITY;
    const row_end end = finish_row(r.m[y] * c, quad_sum(r.l[y]), sink);
    lse[y] = end.lse;
#pragma unroll
    for (int x = 0; x < C::E / 4; x++) {
      float &a = o[x / 2 * 4 + 2 * y + x % 2];
      a = end.scale == 0 ? 0 : a * end.scale;
    }
  }
}

template <bool PAGED>
__device__ __forceinline__ void write_lse(const rgk_flash_params &p, const job &j, int row,
                                          const float (&lse)[2]) {
  if (!p.lse.data || threadIdx.x % 4 != 0) return;
#pragma unroll
  for (int y = 0; y < 2; y++) {
    const row_place at = place_row<PAGED>(p, row + 8 * y);
    if (row + 8 * y < j.rows)
      ((float *)p.lse
           .data)[(int64_t)(j.token + at.token) * p.lse.row + (j.head + at.head) * p.lse.head] =
          lse[y];
  }
}

/* A warp's 16 rows go through shared memory: whole ones by the copy engine, the last ones of a
 * sequence row by row. `at`: the warp's rows of the first panel of C::Q bytes. Returns what depends
 * on all that this thread read there. */
template <class C, bool PAGED>
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
      const row_place to = place_row<PAGED>(p, first);
      for (int x = 0; x < C::EP; x++)
        tma_store(&p.o_map, at + x * C::Q, x * 64, j.head + to.head, j.token + to.token);
      store_commit();
    }
    return copied;
  }
  if (!C::OWN_O) proxy_fence(); /* the copy engine will write there */
  __syncwarp();
  const int pieces = p.E / 8;
  for (int i = lane; i < rows * pieces; i += 32) {
    const int y = i / pieces, x = i - y * pieces;
    const row_place to = place_row<PAGED>(p, first + y);
    typename C::type *out = (typename C::type *)p.o.data + (int64_t)(j.token + to.token) * p.o.row +
                            (j.head + to.head) * p.o.head;
    const uint4 piece = *(const uint4 *)(at + x / 8 * C::Q + y * 128 + (x % 8 ^ (y & 7)) * 16);
    *(uint4 *)(out + x * 8) = piece;
    copied ^= piece.x;
  }
  return copied;
}

/* A tile of dead rows. */
template <class C, bool PAGED>
__device__ __forceinline__ void clear_rows(const rgk_flash_params &p, const job &j) {
  const int pieces = p.E / 8;
  for (int i = (int)threadIdx.x - 128; i < j.rows * pieces; i += C::GROUPS * 128) {
    const int y = i / pieces, x = i - y * pieces;
    const row_place at = place_row<PAGED>(p, y);
    const int64_t token = j.token + at.token;
    const int head = j.head + at.head;
    *(uint4 *)((typename C::type *)p.o.data + token * p.o.row + head * p.o.head + x * 8) =
        make_uint4(0, 0, 0, 0);
    if (x == 0 && p.lse.data) ((float *)p.lse.data)[token * p.lse.row + head * p.lse.head] = 0;
  }
}

/* ---- kernel ---- */

/* Which keys of its tiles the thread's rows see, `row` being the first of them. */
template <bool PAGED>
__device__ __forceinline__ void find_keys(const rgk_flash_params &p, const job &j, int row,
                                          int lane, thread_rows &r) {
  auto position = [&](int x) { return j.position + place_row<PAGED>(p, x).token; };
  for (int y = 0; y < 2; y++) {
    r.lo[y] = first_key(p, position(row + 8 * y)) - 2 * (lane & 3);
    r.hi[y] = last_key(p, j.keys, position(row + 8 * y)) - 2 * (lane & 3);
  }
  const int top = row - lane / 4;
  r.lo_last = first_key(p, position(top + 15)), r.hi_first = last_key(p, j.keys, position(top));
}

/* A job's end: its rows of o and lse leave, and q's room is given back where o goes through it. */
template <class C, bool PAGED>
__device__ __forceinline__ void finish(const rgk_flash_params &p, shared<C> &s, const job &j,
                                       int group, int warp, int lane, int row, float c,
                                       float (&o)[C::E / 2], thread_rows &r, float (&lse)[2]) {
  average<C, PAGED>(p, j, row, o, r, c, lse);
  if (C::OWN_O) { /* the copy engine has read the last job's rows */
    if (lane == 0) store_wait_read<0>();
    __syncwarp();
  } else { /* all warps are done with q */
    named_sync(EACH + group, WARPGROUP);
  }
  const uint32_t copied =
      write<C, PAGED>(p, j, row - lane / 4, o, (C::OWN_O ? s.o[group] : s.q[group]) + warp * 2048);
  /* last: the fence before the copy engine waits for stores before it */
  write_lse<PAGED>(p, j, row, lse);
  if (!C::OWN_O) {
    const waited stored = lane == 0 ? store_wait_read<0>() : waited::for_nothing();
    __syncwarp();
    bar_release(&s.q_empty[group], stored, copied, j.head, j.keys);
  }
}

/* What else is made of a job, by the warpgroup that has it (decode_sm90.cu): the products of a tile
 * of keys, before anything is done to them; the end; a tile of dead rows. */
template <class C> struct nothing_else {
  __device__ __forceinline__ void products(const float (&)[C::N / 2], const job &, int, int) const {
  }
  __device__ __forceinline__ void end(shared<C> &, const job &, int, const float (&)[2]) const {}
  __device__ __forceinline__ void dead(const job &) const {}
};

template <class C, bool PAGED, class X>
__device__ __forceinline__ void consume(const rgk_flash_params &p, shared<C> &s, int group,
                                        const X &also) {
  const int warp = (int)threadIdx.x / 32 % 4, lane = (int)threadIdx.x % 32;
  /* of the thread's first row, inside the tile */
  const int row = group * C::BOX + warp * 16 + lane / 4;
  const float c = p.softcap > 0 ? LOG2E : p.scale * LOG2E, to = p.scale / p.softcap * 2 * LOG2E;
  auto baton_wait = [&]() {
    if (C::GROUPS > 1) named_sync(BATON + group, 2 * WARPGROUP);
  };
  auto baton_pass = [&]() {
    if (C::GROUPS > 1) named_arrive(BATON + (group + 1) % C::GROUPS, 2 * WARPGROUP);
  };
  ring<C::STAGES> k, v;
  if (group == C::GROUPS - 1) baton_pass();

  for (uint32_t q_parity = 0;; q_parity ^= 1) {
    bar_wait(&s.q_full[group], q_parity);
    const job j = s.jobs[group];
    if (j.kind == EXIT) break;
    if (j.kind == DEAD_ROWS) {
      bar_release(&s.q_empty[group], j.head, j.keys);
      clear_rows<C, PAGED>(p, j);
      also.dead(j);
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
      find_keys<PAGED>(p, j, row, lane, r);
      auto clear = [&](int t) {
        const int at = t * C::N;
        if (at < p.before) clear_keys<C, PAGED>(s.v[v.stage], 0, min(p.before - at, C::N), group);
        if (at + C::N > j.keys) clear_keys<C, PAGED>(s.v[v.stage], j.keys - at, C::N, group);
      };

      int t = j.end - 1;
      {
        float x[C::N / 2];
        bar_wait(&s.k_full[k.stage], k.parity);
        baton_wait();
        wgmma_fence();
        start_qk<C, PAGED>(x, q, smem_at(s.k[k.stage]));
        baton_pass();
        scored = wgmma_wait<0>();
        wgmma_keep(x);
        /* Not before: the product has taken what ldmatrix read. */
        if (C::Q_REGS) bar_release(&s.q_empty[group], x[0], j.head, j.keys);
        warp_release(&s.k_empty[k.stage], scored);
        k.next();
        also.products(x, j, t, row);
        if (p.softcap > 0) cap(x, to, p.softcap);
        softmax<C, true>(x, r, scale, c, t * C::N);
        pack<C>(pr, x);
      }
      if (t > j.first) bar_wait(&s.k_full[k.stage], k.parity);
      for (t--; t >= j.first; t--) {
        float x[C::N / 2];
        baton_wait();
        wgmma_fence();
        start_qk<C, PAGED>(x, q, smem_at(s.k[k.stage]));
        bar_wait(&s.v_full[v.stage], v.parity);
        clear(t + 1);
        wgmma_fence();
        start_pv<C, PAGED>(o, pr, smem_at(s.v[v.stage]));
        baton_pass();
        scored = wgmma_wait<1>();
        wgmma_keep(x);
        warp_release(&s.k_empty[k.stage], scored);
        k.next();
        also.products(x, j, t, row);
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
      start_pv<C, PAGED>(o, pr, smem_at(s.v[v.stage]));
      const waited added = wgmma_wait<0>();
      wgmma_keep(o);
      warp_release(&s.v_empty[v.stage], added);
      v.next();
    } else if (C::OWN_O) {
      bar_release(&s.q_empty[group], j.head, j.keys);
    }
    float lse[2];
    finish<C, PAGED>(p, s, j, group, warp, lane, row, c, o, r, lse);
    also.end(s, j, row, lse);
  }
  if (lane == 0) store_wait_read<0>();
  if (group == 0) baton_wait();
}

template <class C, class P, class X>
__device__ __forceinline__ void run(const P &all, const X &also) {
  const rgk_flash_params &p = flash_of(all);
  extern __shared__ char memory[];
  static_assert(sizeof(shared<C>) + 1024 <= RGK_FLASH_SHARED(C::D, C::E, C::GROUPS, C::N),
                "fits wherever it starts");
  shared<C> &s = *(shared<C> *)(memory + (-smem_at(memory) & 1023));
  constexpr bool PAGED = in_pages_of<P>;
  constexpr int loaders = PAGED ? 128 : 1; /* threads */
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
    if constexpr (C::GROUPS > 1) fewer_registers<C::PRODUCER_REGS>();
    if (threadIdx.x < loaders) produce<C>(all, s);
  } else {
    if constexpr (C::GROUPS > 1) more_registers<C::REGS>();
    consume<C, PAGED>(p, s, part - 1, also);
  }
}

template <class C, class P>
__global__ void __launch_bounds__(C::THREADS, 1) forward(const __grid_constant__ P all) {
  run<C>(all, nothing_else<C>{});
}

/* ---- instances ---- */

#ifdef RGK_DEV
constexpr bool DEV = true;
#else
constexpr bool DEV = false;
#endif

template <class P, int D, int E, int GROUPS, int N> const void *instance(rg_dtype type) {
  if constexpr (!DEV || (D == E && (D == 64 || D == 128))) {
    if (type == RG_BF16) return (const void *)forward<config<__nv_bfloat16, D, E, GROUPS, N>, P>;
    if constexpr (!DEV)
      if (type == RG_F16) return (const void *)forward<config<__half, D, E, GROUPS, N>, P>;
  }
  return nullptr;
}

} // namespace flash
} // namespace rgk
