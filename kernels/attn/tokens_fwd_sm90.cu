/* kernels/attn/tokens_fwd_sm90.cu: forward of attention over tokens chosen one by one (see
   tokens.h).

     loaders  find which entries count, and copy the rows of q, K and V to shared memory
     scorers  S = Q K^T    p = exp2(S c - m)    first 256 columns of O += p V
     adders   the other columns, with the scorers' p and what O is to be multiplied by

   A warpgroup each. Scorers' and adders' threads own the same rows, so p goes from registers to
   registers by way of shared memory as it lies. The scores of a tile are multiplied while the tile
   before is added, weights are made while the adders still add.

   A stage is given back in two parts: panels 4 … 7 by the adders, who are the last to read them,
   the others by the scorers. Where V is not K's first columns it takes a stage of its own. Thread
   blocks stay and take jobs in turn; loaders run ahead into the next.
 */
#include "../device/mbarrier.cuh"
#include "../device/pages.cuh"
#include "../device/softmax.cuh"
#include "../device/wgmma.cuh"
#include "gather.cuh"
#include "tokens.cuh"

using namespace rgk;
using namespace rgk::by_queries;
using namespace rgk::tokens;

namespace {

enum {
  STAGES = RGK_TOKENS_STAGES,
  PANEL = RGK_TOKENS_PANEL,
  E = 512,
  HALF = E / 2, /* columns of O that a warpgroup owns */
  SPLIT = 4,    /* the panels [SPLIT, 2 SPLIT) are the second part of a stage */
  SCORING_REGS = 240,
  ADDING_REGS = 176,
  LOADING_REGS = 88 /* of a thread */
};
static_assert((int)KEYS == (int)RGK_TOKENS_KEYS);

template <int D> struct shared {
  static constexpr int DP = RGK_TOKENS_PANELS(D);
  alignas(1024) char k[STAGES][DP * PANEL];
  char q[DP * PANEL];
  uint4 weights[4][WARPGROUP]; /* of a thread, its p; and its two rows' factors */
  float2 factors[WARPGROUP];
  label labels[STAGES];
  int last; /* there is no tile after the one handed over */
  uint64_t full[STAGES][2], empty[STAGES][2];
  uint64_t q_full, q_empty, handed, taken;
};

/* ---- loaders ---- */

template <class T, int D> __device__ __forceinline__ void load(const rgk_tokens &p, shared<D> &s) {
  constexpr int DP = shared<D>::DP;
  const loader<T> x;
  ring<STAGES> r;
  uint32_t q_parity = 1;
  auto stage = [&](const rows4<T> &from, bool whole, const label &y) {
    char *const to = s.k[r.stage];
    bar_wait(&s.empty[r.stage][0], r.parity ^ 1);
    x.template copy<0, SPLIT>(to, from);
    if (whole) x.template copy<2 * SPLIT, DP>(to, from);
    copies_arrive(&s.full[r.stage][0]);
    bar_wait(&s.empty[r.stage][1], r.parity ^ 1);
    x.template copy<SPLIT, 2 * SPLIT>(to, from);
    if (threadIdx.x % WARPGROUP == 0) {
      s.labels[r.stage] = y;
      bar_ready(&s.full[r.stage][1]);
    }
    copies_arrive(&s.full[r.stage][1]);
    r.next();
  };
  job j;
  for (int id = blockIdx.x; find_job(p, id, j); id += gridDim.x) {
    if (j.key < 0) continue;
    walk<T> w(p, j);
    label y = {};
    for (bool first = true; !y.last; first = false) {
      int chosen[4];
      y = w.next(x, chosen);
      stage(x.find(p.a.k, j.key, j.kh, chosen), true, y);
      if (first) {
        const rows4<T> q = x.find_heads(p.a.q, j);
        bar_wait(&s.q_empty, q_parity);
        x.template copy<0, DP>(s.q, q);
        copies_arrive(&s.q_full);
        q_parity ^= 1;
      }
      if (!p.same) stage(x.find(p.a.v, j.key, j.kh, chosen), false, y);
    }
  }
  copies_wait_all();
}

/* ---- what scorers and adders do with their columns of O ---- */

/* The thread's two rows of o, `column` on, times their factors; a factor of 0 makes zeros of
 * anything. */
template <class T>
__device__ __forceinline__ void store_o(const rgk_tokens &p, const job &j, int column,
                                        const float (&o)[HALF / 2], const float (&f)[2]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (row + 8 * h >= j.rows) continue;
    T *to = (T *)p.a.o.data + j.row * p.a.o.row + (j.head + row + 8 * h) * p.a.o.head + column +
            lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < HALF / 8; i++)
      *(uint32_t *)(to + 8 * i) =
          f[h] == 0 ? 0 : pack2<T>(o[4 * i + 2 * h] * f[h], o[4 * i + 2 * h + 1] * f[h]);
  }
}
template <int n> __device__ __forceinline__ void clear(float (&o)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) o[i] = 0;
}
/* o += p v, for which the caller waits. v: the first key of the columns. */
template <class T>
__device__ __forceinline__ void start_adding(float (&o)[HALF / 2], const uint32_t (&a)[KEYS / 4],
                                             uint64_t v) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < KEYS / 16; i++)
    wgmma<T, HALF>::template rs<true>(o, a + 4 * i, desc_on(v, i * 2048), 1);
  wgmma_commit();
}

/* ---- scorers ---- */

template <class T, int D> struct scorer {
  using memory = shared<D>;
  const rgk_tokens &p;
  memory &s;
  const int lane, thread;
  const float c, to; /* scores to powers of two; the same to a cap's */
  const uint64_t q_at, k_at, v_at;
  ring<STAGES> r;
  uint32_t mail = 1; /* parity by which the adders have taken what was handed over last */
  rows2 x;

  /* z = q kᵀ, of panels [first, end); `add`: to what is there. */
  template <int first, int end>
  __device__ __forceinline__ void multiply(float (&z)[KEYS / 2], uint64_t k, bool add) {
#pragma unroll
    for (int i = 4 * first; i < 4 * end; i++) {
      const uint32_t at = i / 4 * PANEL + i % 4 * 32;
      wgmma<T, KEYS>::template ss<>(z, desc_on(q_at, at), desc_on(k, at), add || i > 4 * first);
    }
  }
  __device__ __forceinline__ void start_scores(float (&z)[KEYS / 2]) {
    const uint64_t k = desc_on(k_at, r.stage * sizeof s.k[0]);
    bar_wait(&s.full[r.stage][0], r.parity);
    bar_wait(&s.full[r.stage][1], r.parity);
    proxy_fence(); /* threads wrote what is to be multiplied */
    wgmma_fence();
    multiply<0, memory::DP>(z, k, false);
    wgmma_commit();
  }
  __device__ __forceinline__ void hand_over(const uint32_t (&a)[KEYS / 4], const float (&factor)[2],
                                            int last) {
    bar_wait(&s.taken, mail);
    mail ^= 1;
#pragma unroll
    for (int i = 0; i < 4; i++)
      s.weights[i][thread] = make_uint4(a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]);
    s.factors[thread] = make_float2(factor[0], factor[1]);
    if (thread == 0) s.last = last;
    warp_ready(&s.handed);
  }
  /* Weights of scores z, to the adders too; o is made to fit. */
  __device__ __forceinline__ void weigh(float (&z)[KEYS / 2], float (&o)[HALF / 2],
                                        uint32_t (&a)[KEYS / 4], const label &y) {
    if (p.a.softcap > 0) cap(z, p.a.softcap, to);
    if ((y.low & y.high) != ~0u) {
      const uint32_t low = y.low >> lane % 4 * 2, high = y.high >> lane % 4 * 2;
      each(z, [&](float &v, int, int column) {
        if (!((column < 32 ? low : high) >> column % 32 & 1)) v = -INFINITY;
      });
    }
    float scale[2], minus[2];
    if (refer(z, x, scale, c)) each(o, [&](float &v, int i, int) { v *= scale[i]; });
#pragma unroll
    for (int h = 0; h < 2; h++) minus[h] = x.m[h] == -INFINITY ? 0 : -x.m[h] * c;
    weigh16<T, 0>(z, a, x, c, minus);
    weigh16<T, 1>(z, a, x, c, minus);
    weigh16<T, 2>(z, a, x, c, minus);
    weigh16<T, 3>(z, a, x, c, minus);
    hand_over(a, scale, y.last);
  }
  /* Where V is apart: K's stage is done with, V's is waited for. */
  __device__ __forceinline__ void turn_to_values(waited done, const label &y) {
    warp_release(&s.empty[r.stage][0], done, y.last, y.low, y.high);
    r.next();
    bar_wait(&s.full[r.stage][0], r.parity);
    proxy_fence();
  }
  /* The rows' sums of weights are complete: what O is to be multiplied by; lse is written. */
  __device__ __forceinline__ void finish(const job &j, float (&f)[2]) {
    const int row = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float l = x.l[h];
      l += __shfl_xor_sync(~0u, l, 1);
      l += __shfl_xor_sync(~0u, l, 2);
      const int64_t head = j.head + row + 8 * h;
      const bool there = row + 8 * h < j.rows;
      const float sink = there && p.a.sinks.data
                             ? rgk::load(p.a.sinks.data, p.a.sinks.dtype, head * p.a.sinks.row)
                             : -INFINITY;
      const row_end end = finish_row(x.m[h] * c, l, sink);
      f[h] = end.scale;
      if (there && p.a.lse.data && lane % 4 == 0)
        ((float *)p.a.lse.data)[j.row * p.a.lse.row + head * p.a.lse.head] = end.lse;
    }
  }
  __device__ __forceinline__ void clear_rows(const job &j, const float (&o)[HALF / 2]) {
    const float none[2] = {0, 0};
    store_o<T>(p, j, 0, o, none);
    if (p.a.lse.data && thread < j.rows)
      ((float *)p.a.lse.data)[j.row * p.a.lse.row + (j.head + thread) * p.a.lse.head] = 0;
  }

  __device__ __forceinline__ void run() {
    float o[HALF / 2], z[KEYS / 2], f[2];
    uint32_t a[KEYS / 4];
    uint32_t q_parity = 0;
    job j;
    for (int id = blockIdx.x; find_job(p, id, j); id += gridDim.x) {
      clear(o);
      if (j.key < 0) {
        clear_rows(j, o);
        continue;
      }
#pragma unroll
      for (int h = 0; h < 2; h++) x.m[h] = -INFINITY, x.l[h] = 0;
      bar_wait(&s.q_full, q_parity);
      q_parity ^= 1;
      start_scores(z);
      waited done = wgmma_wait<0>();
      wgmma_keep(z);
      label y = read_label(s.labels[r.stage]);
      while (!y.last) {
        weigh(z, o, a, y);
        if (!p.same) turn_to_values(done, y);
        const int stage = r.stage;
        r.next();
        start_adding<T>(o, a, desc_on(v_at, stage * sizeof s.k[0]));
        start_scores(z);
        done = wgmma_wait<1>();
        wgmma_keep(o);
        wgmma_keep(a);
        warp_release(&s.empty[stage][0], done, y.last, y.low, y.high);
        done = wgmma_wait<0>();
        wgmma_keep(z);
        y = read_label(s.labels[r.stage]);
      }
      warp_release(&s.q_empty, done);
      weigh(z, o, a, y);
      if (!p.same) turn_to_values(done, y);
      start_adding<T>(o, a, desc_on(v_at, r.stage * sizeof s.k[0]));
      finish(j, f);
      done = wgmma_wait<0>();
      wgmma_keep(o);
      wgmma_keep(a);
      warp_release(&s.empty[r.stage][0], done, y.last, y.low, y.high);
      r.next();
      hand_over(a, f, 1);
      store_o<T>(p, j, 0, o, f);
    }
  }
};

/* ---- adders ---- */

template <class T, int D> struct adder {
  using memory = shared<D>;
  const rgk_tokens &p;
  memory &s;
  const int thread;
  const uint64_t v_at;
  ring<STAGES> r;
  uint32_t mail = 0;

  __device__ __forceinline__ int take(uint32_t (&a)[KEYS / 4], float (&factor)[2]) {
    bar_wait(&s.handed, mail);
    mail ^= 1;
    uint32_t read = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint4 w = s.weights[i][thread];
      a[4 * i] = w.x, a[4 * i + 1] = w.y, a[4 * i + 2] = w.z, a[4 * i + 3] = w.w;
      read ^= w.x ^ w.w;
    }
    const float2 f = s.factors[thread];
    factor[0] = f.x, factor[1] = f.y;
    const int last = __shfl_sync(~0u, s.last, 0);
    warp_release(&s.taken, read, f.x, f.y, last);
    return last;
  }
  __device__ __forceinline__ void run() {
    float o[HALF / 2], f[2];
    uint32_t a[KEYS / 4];
    job j;
    for (int id = blockIdx.x; find_job(p, id, j); id += gridDim.x) {
      clear(o);
      if (j.key < 0) {
        f[0] = f[1] = 0;
        store_o<T>(p, j, HALF, o, f);
        continue;
      }
      for (int last = 0; !last; r.next()) {
        last = take(a, f);
        if (!p.same) {
          warp_release(&s.empty[r.stage][1], f[0], f[1], last);
          r.next();
        }
        bar_wait(&s.full[r.stage][1], r.parity);
        proxy_fence();
        if (__any_sync(~0u, f[0] != 1 || f[1] != 1))
          each(o, [&](float &v, int i, int) { v *= f[i]; });
        start_adding<T>(o, a, desc_on(v_at, r.stage * sizeof s.k[0]));
        const waited done = wgmma_wait<0>();
        wgmma_keep(o);
        wgmma_keep(a);
        warp_release(&s.empty[r.stage][1], done);
      }
      take(a, f);
      store_o<T>(p, j, HALF, o, f);
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(RGK_TOKENS_THREADS, 1)
    forward(const __grid_constant__ rgk_tokens p) {
  extern __shared__ char memory[];
  using layout = shared<D>;
  layout &s = *(layout *)(memory + (-smem_at(memory) & 1023));
  static_assert(sizeof(layout) + 1024 <= RGK_TOKENS_BYTES(D), "fits wherever it starts");
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      bar_init(&s.full[i][0], WARPGROUP), bar_init(&s.full[i][1], WARPGROUP + 1);
      bar_init(&s.empty[i][0], 4 * WARP_ARRIVALS), bar_init(&s.empty[i][1], 4 * WARP_ARRIVALS);
    }
    bar_init(&s.q_full, WARPGROUP), bar_init(&s.q_empty, 4 * WARP_ARRIVALS);
    bar_init(&s.handed, 4 * WARP_ARRIVALS), bar_init(&s.taken, 4 * WARP_ARRIVALS);
    bar_init_done();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, (int)threadIdx.x / WARPGROUP, 0);
  const int lane = threadIdx.x % 32, thread = threadIdx.x % WARPGROUP;
  const uint64_t v_at = desc_mn(smem_at(s.k[0]), PANEL);
  if (group == 0) {
    more_registers<SCORING_REGS>();
    scorer<T, D> x{p,
                   s,
                   lane,
                   thread,
                   p.a.softcap > 0 ? LOG2E : p.a.scale * LOG2E,
                   p.a.scale / p.a.softcap * 2 * LOG2E,
                   desc_k(smem_at(s.q)),
                   desc_k(smem_at(s.k[0])),
                   v_at};
    x.run();
  } else if (group == 1) {
    more_registers<ADDING_REGS>();
    adder<T, D> x{p, s, thread, desc_on(v_at, SPLIT * PANEL)};
    x.run();
  } else {
    fewer_registers<LOADING_REGS>();
    load<T, D>(p, s);
  }
}

} // namespace

#define INSTANCE(dtype, d, e) \
  if (t == dtype && D == d && E == e) return (const void *)forward<element<dtype>::type, d>;

const void *rgk_tokens_fwd(rg_dtype t, int32_t D, int32_t E) {
  INSTANCE(RG_BF16, 576, 512)
#ifndef RGK_DEV
  INSTANCE(RG_F16, 576, 512)
#endif
  return nullptr;
}
