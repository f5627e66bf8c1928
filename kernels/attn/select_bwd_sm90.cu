/* kernels/attn/select_bwd_sm90.cu: gradients of attention over selected blocks (see select.h).
 *
 *   S^T [64 keys, ROWS] = K Q^T    dP^T = V dO^T    p = exp2(S^T c - lse)    dS^T = p (dP^T - delta)
 *   dV [64 keys, E] += p dO        dK [64 keys, D] += dS^T Q                 dQ [ROWS, D] = dS K
 *
 * dV and dK take p and dS^T from the registers they were formed in; dS^T also goes to shared memory, for dQ.
 * Two warpgroups, where the widths need them, compute the same S^T and dP^T and take half of the columns of
 * dK, dV and dQ each.
 *
 * Items take tickets, so that they begin in the order of the table: one that has to wait for its turn to add to
 * a block's sums waits for items that have begun.
 * Shared memory: K, V; Q and dO twice; dS^T; row tables and statistics.
 */
#include "select.cuh"
#include "../device/tma.cuh"

using namespace rgk;

namespace {

/* Partials of dQ: see select.h. */
template <class T> struct partial { using type = T; };
template <> struct partial<__half> { using type = float; };

/* This thread's accumulators x of columns [first, first + W) of a key gradient, to their rows. */
template <int W>
__device__ __forceinline__ void put_keys(const rgk_tensor &y, bool add, const select_keys &k, int kh, int first,
                                         const float (&x)[W / 2], float scale, bool aligned) {
  if (!y.data) return;
  const int key = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (key + 8 * i >= k.n) continue;
    const int64_t at = (k.row + key + 8 * i) * y.row + kh * y.head + first + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < W / 8; j++) {
      const float v0 = x[4 * j + 2 * i] * scale, v1 = x[4 * j + 2 * i + 1] * scale;
      if (!aligned) {
        put_grad(y.data, y.dtype, at + 8 * j, v0, add);
        put_grad(y.data, y.dtype, at + 8 * j + 1, v1, add);
      } else if (add || y.dtype == RG_F32) {
        float2 *to = (float2 *)((float *)y.data + at + 8 * j);
        const float2 old = add ? *to : make_float2(0, 0);
        *to = make_float2(old.x + v0, old.y + v1);
      } else if (y.dtype == RG_F16) {
        *(uint32_t *)((__half *)y.data + at + 8 * j) = pack2<__half>(v0, v1);
      } else {
        *(uint32_t *)((__nv_bfloat16 *)y.data + at + 8 * j) = pack2<__nv_bfloat16>(v0, v1);
      }
    }
  }
}

/* A sum is KEYS rows of all columns, in the order of the accumulators: where this thread's, of columns from `first`
 * on, begin, and what it adds there. */
__device__ __forceinline__ float4 *sum_at(void *sum, int first) {
  return (float4 *)sum + RGK_SELECT_KEYS / 4 * first + threadIdx.x % 128;
}
template <int W> __device__ __forceinline__ void add_sum(float (&x)[W / 2], const float4 *from) {
#pragma unroll
  for (int i = 0; i < W / 8; i++) {
    const float4 v = __ldcg(from + 128 * i);
    x[4 * i] += v.x, x[4 * i + 1] += v.y, x[4 * i + 2] += v.z, x[4 * i + 3] += v.w;
  }
}
template <int W> __device__ __forceinline__ void put_sum(const float (&x)[W / 2], float4 *to) {
#pragma unroll
  for (int i = 0; i < W / 8; i++) to[128 * i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

__device__ __forceinline__ void put_matrix4(uint32_t at, const uint32_t *x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

template <class T, int D, int E> struct shape {
  static constexpr int GROUPS = D + E >= 512 ? 2 : 1, ROWS = D > 128 && GROUPS == 1 ? 32 : 64;
  static constexpr int THREADS = GROUPS * RGK_SELECT_THREADS, DK = D / GROUPS, EV = E / GROUPS;
  static constexpr int DQ = DK > 96 ? 64 : DK; /* columns of dQ at a time */
};

/* This thread's rows of dQ, columns [first, first + N), to the partial store. */
template <class T, int N>
__device__ __forceinline__ void put_queries(void *part, const int64_t (&row)[2], int width, int first,
                                            const float (&dq)[N / 2]) {
  using P = typename partial<T>::type;
  enum { PAIRS = 8 / sizeof(P) };
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (row[i] < 0) continue;
    uint4 *const to = (uint4 *)((P *)part + row[i] * width + first) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < N / (8 * PAIRS); j++) {
      float x[2 * PAIRS];
#pragma unroll
      for (int k = 0; k < 2 * PAIRS; k++) x[k] = dq[4 * (PAIRS * j + k / 2) + 2 * i + k % 2];
      uint4 v;
      if constexpr (sizeof(P) == 4)
        v = make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
      else
        v = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
      to[4 * j] = v;
    }
  }
}

__device__ __forceinline__ float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* Rows of a tile; those past the item's last repeat it, with limit 0. */
template <int rows> struct bwd_table {
  const char *from[rows][2]; /* q, d_o */
  int64_t at[rows];          /* into the partial store, in rows of it; -1: none */
  const float *stat[rows];
  int limit[rows]; /* keys of the item that the row sees */
};

template <class T, int D, int E>
__global__ void __launch_bounds__(shape<T, D, E>::THREADS, D + E > 320 ? 1 : 2)
    gradient(const __grid_constant__ rgk_select p) {
  using X = shape<T, D, E>;
  constexpr int ROWS = X::ROWS, THREADS = X::THREADS, DK = X::DK, EV = X::EV, DQ = X::DQ;
  extern __shared__ char raw[];
  const int z = blockIdx.z, kh = p.head + z, part = blockIdx.y;
  constexpr uint32_t size_q = ROWS * 128 * ((D + 63) / 64), size_o = ROWS * 128 * ((E + 63) / 64);
  const uint32_t at_k = (smem_at(raw) + 1023) & ~1023u, at_v = at_k + 8192 * ((D + 63) / 64),
                 at_q = at_v + 8192 * ((E + 63) / 64), at_o = at_q + 2 * size_q, at_ds = at_o + 2 * size_o,
                 at_stat = at_ds + 8192;
  const float *stat = (const float *)(raw + (at_stat - smem_at(raw))); /* [2, lse and delta, ROWS] */
  bwd_table<ROWS> *table = (bwd_table<ROWS> *)(stat + 4 * ROWS);
  volatile int32_t *ticket = (volatile int32_t *)(table + 3);
  if (threadIdx.x == 0) *ticket = atomicAdd(p.ticket + z * p.parts + part, 1);
  const int items = p.items[z];
  __syncthreads();
  if (*ticket >= items) return;
  const rgk_select_item item = p.item[z * p.cap + *ticket];
  const select_keys keys = find_keys(p, item.slot, part);
  if (keys.n == 0) return;
  const int rows = item.count * p.a.G, tiles = (rows + ROWS - 1) / ROWS;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int first_row = (int)(p.bound[p.window] - z * p.rows); /* of the partial store */

  row_walk<ROWS> walk(p, item, keys, kh);
  if (tiles > 0) walk.template fetch<true>(p);
  load_keys<D, THREADS>(at_k, p.a.k, keys, kh, p.a.aligned);
  load_keys<E, THREADS>(at_v, p.a.v, keys, kh, p.a.aligned);
  const int row_of = threadIdx.x % ROWS, half = threadIdx.x / ROWS; /* two threads make a row */
  auto write_table = [&](int t) {
    bwd_table<ROWS> &x = table[t % 3];
    const int head = walk.head + walk.g;
    if (half == 0) {
      x.from[row_of][0] = (const char *)p.a.q.data + (walk.row * p.a.q.row + head * p.a.q.head) * sizeof(T);
      x.limit[row_of] = walk.real ? walk.limit() : 0;
      x.stat[row_of] = p.stat + 2 * ((int64_t)walk.row * p.a.H + head);
    } else {
      x.from[row_of][1] = (const char *)p.a.d_o.data + (walk.row * p.a.d_o.row + head * p.a.d_o.head) * sizeof(T);
      const int64_t place = (int64_t)(walk.row - first_row) * p.a.N + walk.place;
      x.at[row_of] = walk.real && p.a.dq.data ? (place * p.parts + part) * p.a.G + walk.g : -1;
    }
    walk.template fetch<true>(p);
  };
  auto gather_tile = [&](int t) {
    const bwd_table<ROWS> &x = table[t % 3];
    const uint32_t q = at_q + (t & 1) * size_q, d_o = at_o + (t & 1) * size_o;
    if (p.a.aligned) {
      gather_fast<ROWS, D, THREADS>(q, x.from, 0);
      gather_fast<ROWS, E, THREADS>(d_o, x.from, 1);
    } else {
      for (int i = threadIdx.x; i < ROWS * (D + E) / 8; i += THREADS) {
        const int r = i / ((D + E) / 8), c = i % ((D + E) / 8), o = c >= D / 8, w = c - o * (D / 8);
        copy_chunk((o ? d_o : q) + chunk_at<ROWS>(r, w), (const uint16_t *)x.from[r][o] + w * 8, true, false);
      }
    }
    if (threadIdx.x < ROWS) {
      const uint32_t to = at_stat + ((t & 1) * 2 * ROWS + threadIdx.x) * 4;
      const float *from = x.stat[threadIdx.x];
      copy4(to, from);
      copy4(to + ROWS * 4, from + 1);
    }
  };
  float dk[DK / 2] = {}, dv[EV / 2] = {};
  if (tiles > 0) {
    if (half < 2) write_table(0);
    __syncthreads();
    gather_tile(0);
    if (half < 2) write_table(1);
  }
  copies_commit();

  const float c = p.a.scale * LOG2E;
  const int key = warp * 16 + lane / 4;
  for (int t = 0; t < tiles; t++) {
    copies_wait();
    proxy_fence();
    __syncthreads();
    const uint32_t q = at_q + (t & 1) * size_q, d_o = at_o + (t & 1) * size_o;
    float s[ROWS / 2], dp[ROWS / 2];
    wgmma_fence();
    product_rows<T, ROWS, D>(s, at_k, q);
    wgmma_commit();
    product_rows<T, ROWS, E>(dp, at_v, d_o);
    wgmma_commit();
    if (t + 1 < tiles) gather_tile(t + 1);
    copies_commit();
    if (half < 2) write_table(t + 2);
    /* A thread's columns are 8j + 2(lane % 4) and + 1. */
    const int2 *limit = (const int2 *)table[t % 3].limit + lane % 4;
    const float2 *lse = (const float2 *)(stat + (t & 1) * 2 * ROWS) + lane % 4, *delta = lse + ROWS / 2;
    const bool masked = (t + 1) * ROWS > rows || table[t % 3].limit[0] < RGK_SELECT_KEYS;
    float2 lse_[ROWS / 8];
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++) lse_[j] = lse[4 * j];
    wgmma_wait<1>();
    wgmma_keep(s);
    auto probabilities = [&](auto mask) {
#pragma unroll
      for (int j = 0; j < ROWS / 8; j++) {
        const float2 l = lse_[j];
        int2 n = make_int2(64, 64);
        if (mask) n = limit[4 * j];
        s[4 * j] = mask && key >= n.x ? 0 : exp2_(fmaf(s[4 * j], c, -l.x));
        s[4 * j + 1] = mask && key >= n.y ? 0 : exp2_(fmaf(s[4 * j + 1], c, -l.y));
        s[4 * j + 2] = mask && key + 8 >= n.x ? 0 : exp2_(fmaf(s[4 * j + 2], c, -l.x));
        s[4 * j + 3] = mask && key + 8 >= n.y ? 0 : exp2_(fmaf(s[4 * j + 3], c, -l.y));
      }
    };
    if (masked)
      probabilities(std::true_type());
    else
      probabilities(std::false_type());
    uint32_t a[ROWS / 4];
    pack_all<T>(a, s);
    wgmma_wait<0>();
    wgmma_keep(dp);
    wgmma_fence();
    product_columns<T, EV, ROWS>(dv, a, d_o + group * (EV / 64) * (ROWS * 128), true);
    wgmma_commit();
    auto differences = [&](auto mask) {
#pragma unroll
      for (int j = 0; j < ROWS / 8; j++) {
        const float2 l = delta[4 * j];
        int2 n = make_int2(64, 64);
        if (mask) n = limit[4 * j];
        dp[4 * j] = mask && key >= n.x ? 0 : s[4 * j] * (dp[4 * j] - l.x);
        dp[4 * j + 1] = mask && key >= n.y ? 0 : s[4 * j + 1] * (dp[4 * j + 1] - l.y);
        dp[4 * j + 2] = mask && key + 8 >= n.x ? 0 : s[4 * j + 2] * (dp[4 * j + 2] - l.x);
        dp[4 * j + 3] = mask && key + 8 >= n.y ? 0 : s[4 * j + 3] * (dp[4 * j + 3] - l.y);
      }
    };
    if (masked)
      differences(std::true_type());
    else
      differences(std::false_type());
    uint32_t b[ROWS / 4];
    pack_all<T>(b, dp);
    /* Four matrices of 8 x 8: keys, keys + 8, then the next 8 rows; a lane points at one row of one of them. */
    const int line = warp * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < ROWS / 8; j += 2)
      if (group == j / 2 % X::GROUPS)
        put_matrix4(at_ds + line * 128 + (((j + lane / 16) ^ (line & 7)) << 4), b + 2 * j);
    proxy_fence();
    wgmma_fence();
    product_columns<T, DK, ROWS>(dk, b, q + group * (DK / 64) * (ROWS * 128), true);
    wgmma_commit();
    __syncthreads();
    const int64_t *at = table[t % 3].at + key; /* as a row of the tile now */
    const int64_t row[2] = {key < ROWS ? at[0] : -1, key < ROWS ? at[8] : -1};
    const uint64_t ds = desc_mn(at_ds, 8192);
#pragma unroll
    for (int first = 0; first < DK; first += DQ) {
      const uint64_t k = desc_mn(at_k + (group * DK + first) / 64 * 8192, 8192);
      float dq[DQ / 2];
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; i++)
        wgmma<T, DQ>::template ss<true, true>(dq, desc_on(ds, 2048 * i), desc_on(k, 2048 * i), i > 0);
      wgmma_commit();
      wgmma_wait<0>();
      if (first == 0) {
        wgmma_keep(dv);
        wgmma_keep(dk);
      }
      wgmma_keep(dq);
      put_queries<T, DQ>(p.part, row, D, group * DK + first, dq);
    }
  }

  if (!p.a.dk.data && !p.a.dv.data) return;
  const rgk_select_item done = p.item[z * p.cap + *ticket]; /* read again: registers are scarce */
  const int64_t which = ((int64_t)z * p.sums + done.sum) * p.parts + part;
  float *sum_k = p.sum_k + which * RGK_SELECT_KEYS * D, *sum_v = p.sum_v + which * RGK_SELECT_KEYS * E;
  const uint32_t *turn = (const uint32_t *)p.turn + which;
  if (done.is & RGK_SELECT_LAST) {
    if (done.turn > 0) {
      if (threadIdx.x == 0) await(turn, done.turn);
      __syncthreads();
      proxy_fence_all();
    }
    if (!(done.is & RGK_SELECT_FIRST)) {
      add_sum<DK>(dk, sum_at(sum_k, group * DK));
      add_sum<EV>(dv, sum_at(sum_v, group * EV));
    }
    const select_keys keys = find_keys(p, done.slot, part);
    put_keys<DK>(p.a.dk, p.a.acc_k, keys, kh, group * DK, dk, p.a.scale, p.a.aligned);
    put_keys<EV>(p.a.dv, p.a.acc_v, keys, kh, group * EV, dv, 1, p.a.aligned);
    return;
  }
  /* The copy engine adds, from where the tiles were. */
  char *const k_at = raw + (at_k - smem_at(raw)), *const v_at = k_at + RGK_SELECT_KEYS * D * sizeof(float);
  __syncthreads();
  put_sum<DK>(dk, sum_at(k_at, group * DK));
  put_sum<EV>(dv, sum_at(v_at, group * EV));
  proxy_fence();
  __syncthreads();
  if (threadIdx.x > 0) return;
  if (done.turn > 0) {
    await(turn, done.turn);
    proxy_fence_all();
  }
  auto put = [](float *to, const void *from, int width, bool add) {
    if (add)
      bulk_add(to, from, RGK_SELECT_KEYS * sizeof(float) * width);
    else
      bulk_store(to, from, RGK_SELECT_KEYS * sizeof(float) * width);
  };
  put(sum_k, k_at, D, !(done.is & RGK_SELECT_FIRST));
  put(sum_v, v_at, E, !(done.is & RGK_SELECT_FIRST));
  store_commit();
  if (done.is & RGK_SELECT_MORE) {
    store_wait<0>();
    proxy_fence_all();
    publish((uint32_t *)turn, done.turn + 1);
  } else {
    store_wait_read<0>();
  }
}

} // namespace

#define INSTANCE(dtype, d, e)                                                                                \
  if (t == dtype && D == d && E == e) return (const void *)gradient<element<dtype>::type, d, e>;

const void *rgk_select_bwd(rg_dtype t, int32_t D, int32_t E) {
  RGK_SELECT_INSTANCES(INSTANCE)
  return nullptr;
}
