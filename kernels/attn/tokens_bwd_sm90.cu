/* kernels/attn/tokens_bwd_sm90.cu: backward of attention over tokens chosen one by one (see
   tokens.h).

   A thread block works on one query and 64 heads, as the forward does. Of a tile of 64 keys

     loaders  bring K; where V is not K's first columns, V before it, into the same room
     first    S = Q K^T    dP = dO V^T    P = exp2(S c - lse)    dS = P (dP - delta)
     first    dQ += dS K, columns below 256     P^T dO, this query's share of dV
     second   dQ += dS K, the others            dS^T Q, its share of dK

   Joined, the second makes most of what the first would, since the first goes on to the next tile's
   scores and weights meanwhile; those are put where the last ones were when both are done.

   Shares of a key's gradient come from all queries that chose it. Each is written to memory,
   rounded to the operands' type, in the order in which accumulators lie in registers; `sums` adds
   the shares of a window of queries to fp32 sums, key by key, queries ascending: so neither windows
   nor timing change a bit. K is fetched while shares are made of the tile before.
 */
#include "../device/mbarrier.cuh"
#include "../device/mma.cuh"
#include "../device/pages.cuh"
#include "gradient.cuh"
#include "tokens.cuh"

using namespace rgk;
using namespace rgk::tokens;

namespace {

enum {
  KEYS = RGK_TOKENS_KEYS,
  PANEL = RGK_TOKENS_PANEL,
  E = 512,
  EP = E / 64,
  FIRST = 4,  /* panels of dQ that the first warpgroup has … */
  SHARES = 2, /* … and of joined shares: scores and weights are its work besides */
  REGS = 224,
  LOADING_REGS = 56 /* of a thread */
};
/* A tile's panels arrive in three parts, each with a barrier of its own: products of the first ones
 * need not wait for the last. */
enum { THIRDS = 3, THIRD = 3 };
enum named : int { TAKEN = 1, READY };

template <int D> struct shared {
  static constexpr int DP = RGK_TOKENS_PANELS(D);
  alignas(1024) char k[DP * PANEL];
  char q[DP * PANEL], d_o[EP * PANEL];
  char p[PANEL], ds[PANEL]; /* rows are heads, columns keys */
  label y;
  uint64_t full[THIRDS], empty, q_full, q_empty; /* full: see THIRDS */
};

/* ---- loaders ---- */

template <class T, int D>
__device__ __forceinline__ void load(const rgk_tokens_bwd &p, shared<D> &s) {
  constexpr int DP = shared<D>::DP;
  const loader<T> x;
  uint32_t parity = 1, q_parity = 1;
  auto bring = [&](const rows4<T> &from, bool whole, const label &y) {
    bar_wait(&s.empty, parity);
    parity ^= 1;
    if (threadIdx.x % WARPGROUP == 0) {
      s.y = y;
      bar_ready(&s.full[0]);
    }
    x.template copy<0, THIRD>(s.k, from);
    copies_arrive(&s.full[0]);
    x.template copy<THIRD, 2 * THIRD>(s.k, from);
    copies_arrive(&s.full[1]);
    x.template copy<2 * THIRD, EP>(s.k, from);
    if (whole) x.template copy<EP, DP>(s.k, from);
    copies_arrive(&s.full[2]);
  };
  job j;
  for (int id = blockIdx.x; find_job(p.call, id, j); id += gridDim.x) {
    if (j.key < 0) continue;
    walk<T> w(p.call, j);
    label y = {};
    for (bool first = true; !y.last; first = false) {
      int chosen[4];
      y = w.next(x, chosen);
      const rows4<T> keys = x.find(p.call.a.k, j.key, j.kh, chosen);
      if (p.call.same)
        bring(keys, true, y);
      else
        bring(x.find(p.call.a.v, j.key, j.kh, chosen), false, y);
      if (first) {
        bar_wait(&s.q_empty, q_parity);
        q_parity ^= 1;
        x.template copy<0, DP>(s.q, x.find_heads(p.call.a.q, j));
        x.template copy<0, EP>(s.d_o, x.find_heads(p.call.a.d_o, j));
        copies_arrive(&s.q_full);
      }
      if (!p.call.same) bring(keys, true, y);
    }
  }
  copies_wait_all();
}

/* ---- what both warpgroups do ---- */

/* The thread's two rows of dQ, from panel `first` on. */
template <int n>
__device__ __forceinline__ void put_queries(const rgk_attn &a, const job &j, int first,
                                            const float (&x)[n], float scale) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (row + 8 * h >= j.rows) continue;
    const int64_t at =
        j.row * a.dq.row + (j.head + row + 8 * h) * a.dq.head + first * 64 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < n / 4; i++)
      put_pair(a.dq, a.acc_q, at + 8 * i, x[4 * i + 2 * h] * scale, x[4 * i + 2 * h + 1] * scale);
  }
}

/* Columns of panels [0, n / 32) of `b` from there on: x += dS B, for which the caller waits. */
template <class T, int n>
__device__ __forceinline__ void start_queries(float (&x)[n], uint64_t ds, uint64_t b) {
#pragma unroll
  for (int i = 0; i < KEYS / 16; i++)
    wgmma<T, 2 * n>::template ss<false, true>(x, desc_on(ds, i * 32), desc_on(b, i * 2048), 1);
}

/* Shares of the keys' gradients: the heads' weights `a`, transposed, times panel `b` of their rows,
 * and what `more` of the kind there is, to 64 columns of each entry from `to` on, `step` elements
 * apart; `left` entries are there. */
struct factors {
  uint64_t a, b;
  template <class T>
  __device__ __forceinline__ void multiply(float (&x)[KEYS / 2], int i, int add) const {
    wgmma<T, KEYS>::template ss<true, true>(x, desc_on(a, i * 2048), desc_on(b, i * 2048), add);
  }
};
struct held { /* a in registers */
  const uint32_t *a;
  uint64_t b;
  template <class T>
  __device__ __forceinline__ void multiply(float (&x)[KEYS / 2], int i, int add) const {
    wgmma<T, KEYS>::template rs<true>(x, a + 4 * i, desc_on(b, i * 2048), add);
  }
};
template <class T, class F, class... M>
__device__ __forceinline__ void put_share(T *to, int64_t step, int left, F one, M... more) {
  const int lane = threadIdx.x % 32, key = threadIdx.x / 32 % 4 * 16 + lane / 4;
  const F all[] = {one, more...};
  float x[KEYS / 2];
  wgmma_fence();
#pragma unroll
  for (int f = 0; f < (int)(1 + sizeof...(M)); f++)
#pragma unroll
    for (int i = 0; i < RGK_TOKENS_ROWS / 16; i++) all[f].template multiply<T>(x, i, f + i > 0);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_keep(x);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (key + 8 * h >= left) continue;
    /* 64 bytes of a key by its four lanes at once: memory is written in whole sectors */
    uint4 *at = (uint4 *)(to + (key + 8 * h) * step) + lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t w[4];
#pragma unroll
      for (int c = 0; c < 4; c++)
        w[c] = pack2<T>(x[16 * i + 4 * c + 2 * h], x[16 * i + 4 * c + 2 * h + 1]);
      __stcs(at + 4 * i, make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
}
/* This warp's 16 entries of weights `w`, by all heads, as operands of its products. */
__device__ __forceinline__ void read_weights(const char *w, uint32_t (&x)[16]) {
  const int lane = threadIdx.x % 32, tile = lane / 8, chunk = threadIdx.x / 32 % 4 * 2 + tile % 2;
#pragma unroll
  for (int i = 0; i < RGK_TOKENS_ROWS / 16; i++) {
    const int head = 16 * i + tile / 2 * 8 + lane % 8;
    load_transposed(smem_at(w) + head * 128 + (chunk ^ (head & 7)) * 16, x + 4 * i);
  }
}

template <int D> __device__ __forceinline__ int width_of(const rgk_tokens_bwd &p) {
  return p.joined ? D : D + E;
}
/* Where the shares of a row of the window begin that tile `across` of its heads makes. */
template <class T, int WIDTH>
__device__ __forceinline__ T *shares_at(const rgk_tokens_bwd &p, int64_t row, int64_t across) {
  const bool more = row >= p.split;
  const rgk_attn &a = p.call.a;
  return (T *)(more ? p.more : p.part) +
         ((row - (more ? p.split : 0)) * a.KH * p.call.parts + across) * a.N * WIDTH;
}
template <class T, int D>
__device__ __forceinline__ T *shares_of(const rgk_tokens_bwd &p, const job &j) {
  const int64_t row = j.row - p.call.row;
  return p.joined ? shares_at<T, D>(p, row, j.across) : shares_at<T, D + E>(p, row, j.across);
}

/* ---- the first warpgroup ---- */

template <class T, int D> struct first_group {
  using memory = shared<D>;
  const rgk_tokens_bwd &p;
  memory &s;
  const int lane, warp;
  const uint64_t q_at, k_at, o_at;   /* as operands of scores */
  const uint64_t ds_at, keys_at;     /* of dQ */
  const uint64_t p_rows, o_rows;     /* of shares of dV */
  const uint64_t ds_rows, q_rows;    /* of joined ones */
  uint32_t parity = 0, q_parity = 0; /* full, q_full */
  float lse[2], delta[2];

  __device__ __forceinline__ void read_rows(const job &j) {
    const rgk_attn &a = p.call.a;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = 16 * warp + lane / 4 + 8 * h;
      lse[h] = INFINITY, delta[h] = 0;
      if (row >= j.rows) continue;
      const float x = ((const float *)a.lse.data)[j.row * a.lse.row + (j.head + row) * a.lse.head];
      if (x != -INFINITY) lse[h] = x * LOG2E;
      delta[h] = p.delta[j.row * a.H + j.head + row];
    }
  }
  /* Of panels [first, end). */
  template <int first, int end>
  __device__ __forceinline__ void multiply(float (&z)[KEYS / 2], uint64_t rows) {
#pragma unroll
    for (int i = 4 * first; i < 4 * end; i++) {
      const uint32_t at = i / 4 * PANEL + i % 4 * 32;
      wgmma<T, KEYS>::template ss<>(z, desc_on(rows, at), desc_on(k_at, at), i > 0);
    }
  }
  /* Products of a third of what is in s.k: V's, K's. */
  template <int third, bool of_v, bool of_k>
  __device__ __forceinline__ void multiply_third(float (&dp)[KEYS / 2], float (&z)[KEYS / 2]) {
    constexpr int first = third * THIRD, end = first + THIRD;
    bar_wait(&s.full[third], parity);
    proxy_fence(); /* threads wrote what is to be multiplied */
    wgmma_fence();
    if (of_v) multiply<first, (end < EP ? end : EP)>(dp, o_at);
    if (of_k) multiply<first, (end < memory::DP ? end : memory::DP)>(z, q_at);
    wgmma_commit();
  }
  template <bool of_v, bool of_k>
  __device__ __forceinline__ void multiply_all(float (&dp)[KEYS / 2], float (&z)[KEYS / 2]) {
    static_assert(THIRDS * THIRD >= memory::DP);
    multiply_third<0, of_v, of_k>(dp, z);
    multiply_third<1, of_v, of_k>(dp, z);
    multiply_third<2, of_v, of_k>(dp, z);
    parity ^= 1;
  }
  /* Of scores z and products dp: P and dS. */
  __device__ __forceinline__ void weigh(float (&z)[KEYS / 2], float (&dp)[KEYS / 2], const label &y,
                                        float c) {
    const uint32_t low = y.low >> lane % 4 * 2, high = y.high >> lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
      const int h = i / 2 % 2, column = i / 4 * 8 + i % 2;
      const bool on = (column < 32 ? low : high) >> column % 32 & 1;
      const float w = on ? exp2_fast(fmaf(z[i], c, -lse[h])) : 0;
      dp[i] = w * p.of_ds * (dp[i] - delta[h]);
      z[i] = w * p.of_p;
    }
    wgmma_keep(dp);
    wgmma_keep(z);
  }
  __device__ __forceinline__ void put_weights(float (&z)[KEYS / 2], float (&dp)[KEYS / 2]) {
    /* four 8 x 8 tiles at a time: keys 16 i and on of rows 0 and 8 of the warp's */
    const int tile = lane / 8, row = 16 * warp + lane % 8 + tile % 2 * 8;
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
      const uint32_t at = row * 128 + ((2 * i + tile / 2) ^ (row & 7)) * 16;
      store_matrices<T>(smem_at(s.p) + at, z + 8 * i);
      store_matrices<T>(smem_at(s.ds) + at, dp + 8 * i);
    }
  }

  __device__ __forceinline__ void run() {
    const rgk_attn &a = p.call.a;
    const float c = a.scale * LOG2E;
    float dq[FIRST * 32], z[KEYS / 2], dp[KEYS / 2];
    job j;
    for (int id = blockIdx.x; find_job(p.call, id, j); id += gridDim.x) {
#pragma unroll
      for (int i = 0; i < FIRST * 32; i++) dq[i] = 0;
      if (j.key < 0) {
        if (a.dq.data && !a.acc_q) put_queries(a, j, 0, dq, 0);
        continue;
      }
      read_rows(j);
      const int width = width_of<D>(p);
      T *to = shares_of<T, D>(p, j) + (p.joined ? 0 : D);
      bar_wait(&s.q_full, q_parity);
      q_parity ^= 1;
      label y = {};
      for (int left = a.N; !y.last; left -= KEYS, to += KEYS * width) {
        if (p.call.same) {
          multiply_all<true, true>(dp, z);
        } else {
          multiply_all<true, false>(dp, z);
          const waited done = wgmma_wait<0>();
          warp_release(&s.empty, done);
          multiply_all<false, true>(dp, z);
        }
        wgmma_wait<0>();
        wgmma_keep(dp);
        wgmma_keep(z);
        y = read_label(s.y);
        weigh(z, dp, y, c);
        named_sync(TAKEN, 2 * WARPGROUP); /* the other's shares of the tile before have been made */
        put_weights(z, dp);
        proxy_fence();
        named_sync(READY, 2 * WARPGROUP);
        wgmma_fence();
        start_queries<T>(dq, ds_at, keys_at);
        wgmma_commit();
        const waited done = wgmma_wait<0>();
        wgmma_keep(dq);
        warp_release(&s.empty, done, y.last, y.low, y.high);
        if (!p.part) continue;
        if (p.joined) {
          uint32_t of_p[16], of_ds[16];
          read_weights(s.p, of_p), read_weights(s.ds, of_ds);
#pragma unroll 1
          for (int x = 0; x < SHARES; x++)
            put_share<T>(to + x * 64, width, left, held{of_ds, desc_on(q_rows, x * PANEL)},
                         held{of_p, desc_on(o_rows, x * PANEL)});
        } else {
#pragma unroll 1
          for (int x = 0; x < EP; x++)
            put_share<T>(to + x * 64, width, left, factors{p_rows, desc_on(o_rows, x * PANEL)});
        }
      }
      warp_release(&s.q_empty, waited::for_nothing());
      if (a.dq.data) put_queries(a, j, 0, dq, p.of_dq);
    }
    named_sync(TAKEN, 2 * WARPGROUP);
  }
};

/* ---- the second ---- */

template <class T, int D> struct second_group {
  using memory = shared<D>;
  static constexpr int MORE = memory::DP - 2 * FIRST; /* panels past eight */
  const rgk_tokens_bwd &p;
  memory &s;
  const uint64_t ds_at, keys_at;  /* of dQ */
  const uint64_t ds_rows, q_rows; /* of shares of dK */
  const uint64_t p_rows, o_rows;  /* of joined ones */
  uint32_t parity = 0, q_parity = 0;

  __device__ __forceinline__ void wait_full() {
#pragma unroll
    for (int i = 0; i < THIRDS; i++) bar_wait(&s.full[i], parity);
    parity ^= 1;
  }
  __device__ __forceinline__ void run() {
    const rgk_attn &a = p.call.a;
    float dq[FIRST * 32], more[MORE * 32];
    job j;
    for (int id = blockIdx.x; find_job(p.call, id, j); id += gridDim.x) {
#pragma unroll
      for (int i = 0; i < FIRST * 32; i++) dq[i] = 0;
#pragma unroll
      for (int i = 0; i < MORE * 32; i++) more[i] = 0;
      if (j.key < 0) {
        if (a.dq.data && !a.acc_q) {
          put_queries(a, j, FIRST, dq, 0);
          put_queries(a, j, 2 * FIRST, more, 0);
        }
        continue;
      }
      const int width = width_of<D>(p);
      T *to = shares_of<T, D>(p, j);
      bar_wait(&s.q_full, q_parity);
      q_parity ^= 1;
      label y = {};
      for (int left = a.N; !y.last; left -= KEYS, to += KEYS * width) {
        named_arrive(TAKEN, 2 * WARPGROUP);
        if (!p.call.same) {
          wait_full();
          warp_release(&s.empty, waited::for_nothing());
        }
        wait_full();
        proxy_fence();
        y = read_label(s.y);
        named_sync(READY, 2 * WARPGROUP);
        wgmma_fence();
        start_queries<T>(dq, ds_at, keys_at);
        start_queries<T>(more, ds_at, desc_on(keys_at, FIRST * PANEL));
        wgmma_commit();
        const waited done = wgmma_wait<0>();
        wgmma_keep(dq);
        wgmma_keep(more);
        warp_release(&s.empty, done, y.last, y.low, y.high);
        if (!p.part) continue;
        if (p.joined)
#pragma unroll 1
          for (int x = SHARES; x < EP; x++)
            put_share<T>(to + x * 64, width, left, factors{ds_rows, desc_on(q_rows, x * PANEL)},
                         factors{p_rows, desc_on(o_rows, x * PANEL)});
#pragma unroll 1
        for (int x = p.joined ? EP : 0; x < memory::DP; x++)
          put_share<T>(to + x * 64, width, left, factors{ds_rows, desc_on(q_rows, x * PANEL)});
      }
      warp_release(&s.q_empty, waited::for_nothing());
      if (a.dq.data) {
        put_queries(a, j, FIRST, dq, p.of_dq);
        put_queries(a, j, 2 * FIRST, more, p.of_dq);
      }
    }
    named_arrive(TAKEN, 2 * WARPGROUP);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(RGK_TOKENS_THREADS, 1)
    backward(const __grid_constant__ rgk_tokens_bwd p) {
  extern __shared__ char memory[];
  using layout = shared<D>;
  layout &s = *(layout *)(memory + (-smem_at(memory) & 1023));
  static_assert(sizeof(layout) + 1024 <= RGK_TOKENS_BWD_BYTES(D), "fits wherever it starts");
  if (threadIdx.x == 0) {
    for (int i = 0; i < THIRDS; i++) bar_init(&s.full[i], WARPGROUP + (i == 0));
    bar_init(&s.empty, 8 * WARP_ARRIVALS);
    bar_init(&s.q_full, WARPGROUP), bar_init(&s.q_empty, 8 * WARP_ARRIVALS);
    bar_init_done();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, (int)threadIdx.x / WARPGROUP, 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const uint64_t ds_at = desc_k(smem_at(s.ds)), keys_at = desc_mn(smem_at(s.k), PANEL);
  if (group == 0) {
    more_registers<REGS>();
    first_group<T, D> x{p,
                        s,
                        lane,
                        warp,
                        desc_k(smem_at(s.q)),
                        desc_k(smem_at(s.k)),
                        desc_k(smem_at(s.d_o)),
                        ds_at,
                        keys_at,
                        desc_mn(smem_at(s.p), PANEL),
                        desc_mn(smem_at(s.d_o), PANEL),
                        desc_mn(smem_at(s.ds), PANEL),
                        desc_mn(smem_at(s.q), PANEL)};
    x.run();
  } else if (group == 1) {
    more_registers<REGS>();
    second_group<T, D> x{p,
                         s,
                         ds_at,
                         desc_on(keys_at, FIRST * PANEL),
                         desc_mn(smem_at(s.ds), PANEL),
                         desc_mn(smem_at(s.q), PANEL),
                         desc_mn(smem_at(s.p), PANEL),
                         desc_mn(smem_at(s.d_o), PANEL)};
    x.run();
  } else {
    fewer_registers<LOADING_REGS>();
    load<T, D>(p, s);
  }
}

/* ---- sums of shares ---- */

/* A key's shares of this window: a block has a key, a thread eight neighbours of a share. */
template <class T, int D, bool JOINED>
__global__ void __launch_bounds__(rgk_tokens_sum_threads(JOINED))
    sums(const __grid_constant__ rgk_tokens_bwd p) {
  enum { WIDTH = JOINED ? D : D + E, CHUNKS = WIDTH / 8, THREADS = rgk_tokens_sum_threads(JOINED) };
  static_assert((int)CHUNKS <= (int)THREADS);
  __shared__ const T *share[THREADS];
  const rgk_attn &a = p.call.a;
  const int64_t key = blockIdx.x;
  const int kh = blockIdx.y, t = threadIdx.x, b = find_seq(a.kseqs, key), parts = p.call.parts,
            whole = THREADS / parts * parts;
  const bool live = b < a.kseqs.n, begins = p.call.row == 0, ends = p.call.row + p.call.rows == a.T;
  int64_t *cursor = p.cursor + kh * a.S + key;
  float *sum = p.sum + (kh * a.S + key) * WIDTH + 8 * t;
  int64_t at = 0, end = 0;
  if (live) {
    const int64_t *start = p.start + kh * (p.slots + 1) + key + b;
    at = begins ? start[0] : *cursor;
    end = start[1];
  }
  const int32_t *list = p.list + kh * a.T * a.N;
  const uint16_t *places = p.places + kh * a.T * a.N;
  float x[8];
  bool loaded = false;
  for (;;) {
    /* an entry's shares, one of each tile of heads, are neighbours: windows fall between entries */
    const int64_t e = at + t / parts;
    const int64_t row = t < whole && e < end ? list[e] - p.call.row : p.call.rows;
    const bool mine = row < p.call.rows;
    if (mine)
      share[t] = shares_at<T, WIDTH>(p, row, kh * parts + t % parts) + (int64_t)places[e] * WIDTH;
    const int n = __syncthreads_count(mine);
    if (n == 0 && !loaded && !begins && !ends) return;
    if (!loaded) {
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = begins || t >= CHUNKS ? 0 : sum[i];
      loaded = true;
    }
    if (t < CHUNKS) {
#pragma unroll 8
      for (int i = 0; i < n; i++) {
        const uint4 w = __ldcs((const uint4 *)(share[i] + 8 * t));
        const uint32_t word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const float2 v = unpack2<T>(word[c]);
          x[2 * c] += v.x, x[2 * c + 1] += v.y;
        }
      }
    }
    at += n / parts;
    if (n < whole) break;
    __syncthreads();
  }
  if (!ends) {
    if (t == 0) *cursor = at;
    if (t < CHUNKS)
      *(float4 *)sum = make_float4(x[0], x[1], x[2], x[3]),
               *(float4 *)(sum + 4) = make_float4(x[4], x[5], x[6], x[7]);
    return;
  }
  if (t >= CHUNKS) return;
  const bool of_k = JOINED || t < D / 8;
  const rgk_tensor &y = of_k ? a.dk : a.dv;
  const bool add = of_k ? a.acc_k : a.acc_v;
  if (!y.data || (add && !live)) return;
  /* pairs 4 (t / 4 % 2) and on of quad lane t % 4 (put_share) */
  const int column = (of_k ? t : t - D / 8) / 8 * 64 + t / 4 % 2 * 32 + t % 4 * 2;
  const int64_t to = key * y.row + kh * y.head + column;
  const float scale = JOINED ? p.of_dq : of_k ? a.scale : 1;
#pragma unroll
  for (int c = 0; c < 4; c++) put_pair(y, add, to + 8 * c, x[2 * c] * scale, x[2 * c + 1] * scale);
}

} // namespace

const void *rgk_tokens_bwd_main(rg_dtype t) {
  return t == RG_F16 ? (const void *)backward<__half, 576>
                     : (const void *)backward<__nv_bfloat16, 576>;
}
template <class T> static const void *sums_of(bool joined) {
  return joined ? (const void *)sums<T, 576, true> : (const void *)sums<T, 576, false>;
}
const void *rgk_tokens_bwd_sums(rg_dtype t, bool joined) {
  return t == RG_F16 ? sums_of<__half>(joined) : sums_of<__nv_bfloat16>(joined);
}
