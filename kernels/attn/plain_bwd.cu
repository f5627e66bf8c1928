/* kernels/attn/plain_bwd.cu: attention's backward for any shape and type, in fp32 without tensor
   cores.

     delta = sum of o d_o, minus d_lse      P = exp(s - lse)
     dS = P (d_o Vt - delta), times the softcap's slope
     dQ = scale dS K        per row tile, walking the key tiles it sees, as forward does
     dV = P^T d_o           per key tile, walking the rows (query, head) that see it, a batch at a
                            time
     dK = scale dS^T Q

   S and dP are formed in both passes: that costs two products of seven and needs no atomics and no
   buffer. In the key pass eight warps share a tile: warps 0 … 3 form P and own dV, warps 4 … 7 form
   dP and own dK, a quarter of the keys each; P, times the softcap's slope, crosses over in shared
   memory. The next rows are copied in meanwhile. A batch's product is summed apart and then added,
   so chains stay short.

   Key tiles that very many queries see are cut into parts of their queries, the same for a sequence
   alone or packed: partial sums go to the workspace and `reduce` adds them in order (SLC: long
   lists; CMP: always).
 */
#include "key_tiles.cuh"

using namespace rgk;
using namespace rgk::plain;

namespace {

/* Sizes of an instance: widths, rows of the tile (a lane has RL of them) and keys, or rows of a
 * batch. */
template <int TILE> struct sizes {
  static constexpr int W = rgk_plain_width(TILE), M = rgk_plain_rows(TILE),
                       KEYS = rgk_plain_keys(TILE);
  static constexpr int RL = M / 16, NE = W / 32, NJ = KEYS / 8, LD = W + 4, LDP = KEYS + 8;
};

/* ---- dQ ---- */

template <int TILE> struct dq_shared : sizes<TILE> {
  using z = sizes<TILE>;
  static constexpr int M = z::M, KEYS = z::KEYS, LD = z::LD, LDP = z::LDP;
  float q[M * LD], d_o[M * LD]; /* at the end, dq in place of q */
  float k[KEYS * LD], v[KEYS * LD];
  float ds[M * LDP];
  walk_shared<M> walk;
};

template <int TILE>
__global__ void __launch_bounds__(RGK_PLAIN_THREADS, TILE == RGK_PLAIN_64    ? 3
                                                     : TILE == RGK_PLAIN_576 ? 1
                                                                             : 2)
    dq(const __grid_constant__ rgk_attn_plain p) {
  using sh_t = dq_shared<TILE>;
  static_assert(sizeof(sh_t) == rgk_plain_dq_shared(TILE), "as the host counts");
  constexpr int LD = sh_t::LD, LDP = sh_t::LDP, M = sh_t::M, KEYS = sh_t::KEYS, RL = sh_t::RL,
                NE = sh_t::NE, NJ = sh_t::NJ, THREADS = RGK_PLAIN_THREADS;
  extern __shared__ __align__(16) char memory[];
  sh_t &sh = *(sh_t *)memory;
  const rgk_attn &a = p.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, y = lane / 8, cx = lane % 8;

  const row_tile t = find_rows(p);
  if (t.t.n == 0) return;
  if (t.t.b >= a.seqs.n) { /* dead rows */
    for (int r = warp; r < t.n && !a.acc_q; r += THREADS / 32)
      zero_row<32>(a.dq, row_at(t, a.dq, r), a.D, lane);
    return;
  }
  load_rows<LD, THREADS>(sh.q, M, a.D, a.q, p.vec, [&](int r) { return row_at(t, a.q, r); });
  const bool given = a.d_o.data != nullptr;
  load_rows<LD, THREADS>(sh.d_o, M, a.E, given ? a.d_o : a.q, p.vec,
                         [&](int r) { return given ? row_at(t, a.d_o, r) : -1; });

  const int r0 = warp * 4 * RL + y; /* this lane's first row */
  int query[RL];
  float lse[RL], delta[RL];
  float4 sum[RL][NE];
#pragma unroll
  for (int i = 0; i < RL; i++) {
    const int r = r0 + 4 * i;
    query[i] = -1;
    lse[i] = delta[i] = 0;
    if (r < t.n) {
      lse[i] = ((const float *)a.lse.data)[row_at(t, a.lse, r)];
      delta[i] = p.delta[(t.row + r / t.heads) * a.H + t.head + r % t.heads];
      if (lse[i] != -INFINITY) query[i] = r / t.heads; /* otherwise it saw nothing */
    }
#pragma unroll
    for (int j = 0; j < NE; j++) sum[i][j] = make_float4(0, 0, 0, 0);
  }

  walk<M, KEYS> w(a, t, keys_of(a, t));
  while (w.step(p, t, sh.walk)) {
    const int64_t key = w.span.row + w.first;
    load_rows<LD, THREADS>(sh.k, KEYS, a.D, a.k, p.vec, [&](int r) {
      return r < w.keys ? (key + r) * a.k.row + t.kh * a.k.head : -1;
    });
    load_rows<LD, THREADS>(sh.v, KEYS, a.E, a.v, p.vec, [&](int r) {
      return r < w.keys ? (key + r) * a.v.row + t.kh * a.v.head : -1;
    });
    copies_wait_all();
    __syncthreads();
    int lo[RL], hi[RL];
    bool any = false;
#pragma unroll
    for (int i = 0; i < RL; i++) {
      lo[i] = query[i] < 0 ? 0 : sh.walk.lo[query[i]];
      hi[i] = query[i] < 0 ? 0 : sh.walk.hi[query[i]];
      any |= lo[i] < hi[i];
    }
    if (!__any_sync(~0u, any)) continue;
    float s[RL][NJ], dp[RL][NJ];
    scores<RL, NJ, LD, 16>(sh.q + r0 * LD, sh.k + cx * LD, a.D, s);
    scores<RL, NJ, LD, 0>(sh.d_o + r0 * LD, sh.v + cx * LD, a.E, dp);
    to_logits(a, s);
#pragma unroll
    for (int i = 0; i < RL; i++)
#pragma unroll
      for (int j = 0; j < NJ; j++) {
        const int c = cx + 8 * j;
        const float prob = times_slope(a, expf(s[i][j] - lse[i]), s[i][j]),
                    ds = prob * (dp[i][j] - delta[i]);
        sh.ds[(r0 + 4 * i) * LDP + c] = c >= lo[i] && c < hi[i] ? ds : 0;
      }
    __syncwarp();
    float4 c[RL][NE];
    sums<RL, NE, LDP, LD>(sh.ds + r0 * LDP, sh.k + 4 * cx, (w.keys + 3) & ~3, a.D, c);
#pragma unroll
    for (int i = 0; i < RL; i++)
#pragma unroll
      for (int j = 0; j < NE; j++) sum[i][j] = added(sum[i][j], c[i][j]);
  }
  copies_wait_all();
  __syncthreads(); /* a tile that sees no key has not met its q yet */
  float factor[RL];
#pragma unroll
  for (int i = 0; i < RL; i++) factor[i] = a.scale;
  put_sums<RL, NE, LD>(sh.q + r0 * LD + 4 * cx, sum, factor);
#pragma unroll 1
  for (int r = warp * 4 * RL; r < min(t.n, (warp + 1) * 4 * RL); r++)
    store_row(a.dq, row_at(t, a.dq, r), sh.q + r * LD, a.D, p.vec, a.acc_q);
}

/* ---- dK and dV ---- */

/* Rows of a batch. */
template <int KEYS> struct batch_rows {
  int row[KEYS], head[KEYS]; /* row of the pack, query head; row -1: none */
  float lse[KEYS], delta[KEYS];
  int lo[KEYS], hi[KEYS]; /* columns of the key tile they see */
};

template <int TILE> struct dkv_shared : sizes<TILE> {
  using z = sizes<TILE>;
  static constexpr int M = z::M, KEYS = z::KEYS, LD = z::LD, LDP = z::LDP;
  /* at the end, dv in place of k and dk in place of v: the rows of the same warp */
  float k[M * LD], v[M * LD];
  float q[2][KEYS * LD], d_o[2][KEYS * LD];
  float p[M * LDP], ds[M * LDP];
  batch_rows<KEYS> rows[3]; /* of this batch, the next and the one after */
};

/* One warp looks up the rows of the batches, thread i row i, of all (query, head) pairs in order,
 * heads running fastest. Their addresses hang on one another, so each load is asked for a batch
 * before it is needed: `begin` once and for every batch, `finish` when there was other work in
 * between. */
template <int KEYS> struct row_lookup {
  int query, head; /* of the row after next */
  int row, of;     /* the next row of the pack, -1: none, and its head */
  float lse, delta;
  int mine, mine_of; /* the row that lse and delta are being read for */

  __device__ __forceinline__ void fetch(const rgk_attn &a, const key_tile &t) {
    row = -1;
    of = t.kh * a.G + head;
    if (query < t.queries) row = t.list ? t.list[query] : (int)t.row + query;
    head += KEYS % a.G;
    query += KEYS / a.G;
    if (head >= a.G) head -= a.G, query++;
  }
  __device__ __forceinline__ row_lookup(const rgk_attn &a, const key_tile &t) {
    const int i = threadIdx.x % KEYS; /* further lanes do the same again */
    query = i / a.G;
    head = i % a.G;
    fetch(a, t);
  }
  __device__ __forceinline__ void begin(const rgk_attn_plain &p, const key_tile &t) {
    const rgk_attn &a = p.a;
    mine = row;
    mine_of = of;
    lse = delta = 0;
    if (mine >= 0) {
      lse = ((const float *)a.lse.data)[mine * a.lse.row + mine_of * a.lse.head];
      delta = p.delta[(int64_t)mine * a.H + mine_of];
    }
    fetch(a, t);
  }
  __device__ __forceinline__ void finish(const rgk_attn &a, const key_tile &t,
                                         batch_rows<KEYS> &x) {
    const int i = threadIdx.x % KEYS;
    int2 c = make_int2(0, 0);
    if (mine >= 0 && lse == -INFINITY) mine = -1; /* it saw nothing */
    if (mine >= 0) c = columns(visible(a, mine - t.origin, t.keys), t.first, t.n);
    x.row[i] = mine;
    x.head[i] = mine_of;
    x.lse[i] = lse;
    x.delta[i] = delta;
    x.lo[i] = c.x;
    x.hi[i] = c.y;
  }
};

template <int LD, int KEYS>
__device__ __forceinline__ void load_batch(const rgk_attn_plain &p, const batch_rows<KEYS> &x,
                                           float *q, float *d_o) {
  const rgk_attn &a = p.a;
  constexpr int THREADS = RGK_PLAIN_DKV_THREADS;
  load_rows<LD, THREADS>(q, KEYS, a.D, a.q, p.vec, [&](int r) {
    return x.row[r] < 0 ? -1 : x.row[r] * a.q.row + x.head[r] * a.q.head;
  });
  const bool given = a.d_o.data != nullptr;
  load_rows<LD, THREADS>(d_o, KEYS, a.E, given ? a.d_o : a.q, p.vec, [&](int r) {
    return x.row[r] < 0 || !given ? -1 : x.row[r] * a.d_o.row + x.head[r] * a.d_o.head;
  });
}

template <int TILE>
__global__ void __launch_bounds__(RGK_PLAIN_DKV_THREADS, 1)
    dkv(const __grid_constant__ rgk_attn_plain p) {
  using sh_t = dkv_shared<TILE>;
  static_assert(sizeof(sh_t) == rgk_plain_dkv_shared(TILE), "as the host counts");
  constexpr int LD = sh_t::LD, LDP = sh_t::LDP, M = sh_t::M, KEYS = sh_t::KEYS, RL = sh_t::RL,
                NE = sh_t::NE, NJ = sh_t::NJ, THREADS = RGK_PLAIN_DKV_THREADS;
  extern __shared__ __align__(16) char memory[];
  sh_t &sh = *(sh_t *)memory;
  const rgk_attn &a = p.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, y = lane / 8, cx = lane % 8;

  key_tile t;
  gap<THREADS>(p);
  if (!find_keys(p, t)) return;
  if (t.dead) {
    clear_keys<THREADS>(a, t);
    return;
  }
  load_rows<LD, THREADS>(sh.k, M, a.D, a.k, p.vec, [&](int r) {
    return r < t.n ? (t.key + r) * a.k.row + t.kh * a.k.head : -1;
  });
  load_rows<LD, THREADS>(sh.v, M, a.E, a.v, p.vec, [&](int r) {
    return r < t.n ? (t.key + r) * a.v.row + t.kh * a.v.head : -1;
  });
  const int64_t rows = t.queries * a.G;
  row_lookup<KEYS> look(a, t); /* only the last warp's counts */
  const bool looks = warp == THREADS / 32 - 1;
  if (looks) {
    look.begin(p, t);
    look.finish(a, t, sh.rows[0]);
    look.begin(p, t);
    look.finish(a, t, sh.rows[1]);
  }
  __syncthreads();
  if (rows > 0) load_batch<LD, KEYS>(p, sh.rows[0], sh.q[0], sh.d_o[0]);

  const bool for_dv = warp < 4;
  const int w0 = warp % 4 * 4 * RL, k0 = w0 + y; /* the warp's and this lane's first key */
  const bool wanted = for_dv ? a.dv.data != nullptr : a.dk.data != nullptr;
  float4 sum[RL][NE];
#pragma unroll
  for (int i = 0; i < RL; i++)
#pragma unroll
    for (int j = 0; j < NE; j++) sum[i][j] = make_float4(0, 0, 0, 0);

  int turn = 0, at = 0; /* of two and of three */
  for (int64_t first = 0; first < rows; first += KEYS, turn ^= 1, at = at == 2 ? 0 : at + 1) {
    const batch_rows<KEYS> &x = sh.rows[at];
    copies_wait_all();
    __syncthreads();
    if (first + KEYS < rows)
      load_batch<LD, KEYS>(p, sh.rows[at == 2 ? 0 : at + 1], sh.q[turn ^ 1], sh.d_o[turn ^ 1]);
    if (looks) look.begin(p, t);

    const int of = lane % KEYS;
    const bool any =
        __any_sync(~0u, x.lo[of] < x.hi[of] && x.lo[of] < w0 + 4 * RL && x.hi[of] > w0);
    float s[RL][NJ];
    if (any && for_dv) {
      scores<RL, NJ, LD, 16>(sh.k + k0 * LD, sh.q[turn] + cx * LD, a.D, s);
      to_logits(a, s);
#pragma unroll
      for (int i = 0; i < RL; i++)
#pragma unroll
        for (int j = 0; j < NJ; j++) {
          const int r = cx + 8 * j, key = k0 + 4 * i;
          const float prob = key >= x.lo[r] && key < x.hi[r] ? expf(s[i][j] - x.lse[r]) : 0;
          sh.p[key * LDP + r] = prob;
          sh.ds[key * LDP + r] = times_slope(a, prob, s[i][j]);
        }
    } else if (any && wanted) {
      scores<RL, NJ, LD, 0>(sh.v + k0 * LD, sh.d_o[turn] + cx * LD, a.E, s);
    }
    __syncthreads();
    if (looks) look.finish(a, t, sh.rows[at == 0 ? 2 : at - 1]);
    if (!any || !wanted) continue;
    if (!for_dv) {
#pragma unroll
      for (int i = 0; i < RL; i++)
#pragma unroll
        for (int j = 0; j < NJ; j++) {
          const int r = cx + 8 * j, key = k0 + 4 * i;
          float *ds = sh.ds + key * LDP + r;
          *ds = key >= x.lo[r] && key < x.hi[r] ? *ds * (s[i][j] - x.delta[r]) : 0;
        }
      __syncwarp();
    }
    float4 c[RL][NE];
    sums<RL, NE, LDP, LD>((for_dv ? sh.p : sh.ds) + k0 * LDP,
                          (for_dv ? sh.d_o : sh.q)[turn] + 4 * cx, KEYS, for_dv ? a.E : a.D, c);
#pragma unroll
    for (int i = 0; i < RL; i++)
#pragma unroll
      for (int j = 0; j < NE; j++) sum[i][j] = added(sum[i][j], c[i][j]);
  }
  copies_wait_all();
  __syncthreads(); /* keys that no row sees have not met their tile yet */
  if (!wanted) return;

  const int width = for_dv ? a.E : a.D;
  const rgk_tensor &d = for_dv ? a.dv : a.dk;
  const bool add = for_dv ? a.acc_v : a.acc_k;
  float *result = for_dv ? sh.k : sh.v, factor[RL];
#pragma unroll
  /* parts are scaled when added up */
  for (int i = 0; i < RL; i++) factor[i] = for_dv || t.part >= 0 ? 1 : a.scale;
  put_sums<RL, NE, LD>(result + k0 * LD + 4 * cx, sum, factor);
#pragma unroll 1
  for (int key = w0; key < min(t.n, w0 + 4 * RL); key++) {
    const int64_t partial = (t.kh * p.part_rows + t.part + key) * width;
    if (t.part < 0)
      store_row(d, (t.key + key) * d.row + t.kh * d.head, result + key * LD, width, p.vec, add);
    else
      store_row(rgk_tensor{for_dv ? p.part_v : p.part_k, 0, 0, RG_F32}, partial, result + key * LD,
                width, p.vec, false);
  }
}

/* Row `row` of dk and dv from n partial sums, `step` rows apart. */
__device__ __forceinline__ void add_parts(const rgk_attn_plain &p, int kh, int64_t row, int64_t at,
                                          int64_t step, int n) {
  const rgk_attn &a = p.a;
  for (int which = 0; which < 2; which++) {
    const rgk_tensor &d = which ? a.dv : a.dk;
    const bool add = which ? a.acc_v : a.acc_k;
    if (!d.data || (n == 0 && add)) continue;
    const int width = which ? a.E : a.D;
    const float *part = (which ? p.part_v : p.part_k) + (kh * p.part_rows + at) * width;
    for (int c = threadIdx.x; c < width; c += RGK_PLAIN_THREADS) {
      float sum = 0;
      for (int i = 0; i < n; i++) sum += part[i * step * width + c];
      if (which == 0 && n > 0) sum *= a.scale;
      put_grad(d.data, d.dtype, row * d.row + kh * d.head + c, sum, add);
    }
  }
}

__global__ void __launch_bounds__(RGK_PLAIN_THREADS)
    reduce(const __grid_constant__ rgk_attn_plain p) {
  const rgk_attn &a = p.a;
  if (a.mode == RGK_SLC) {
    const int kh = (int)(blockIdx.x / p.csr_slots);
    const int64_t s = blockIdx.x % p.csr_slots;
    const int64_t *start = p.start + kh * (p.csr_slots + 1) + s;
    const int64_t parts = list_parts(p, start[1] - start[0]);
    if (parts == 1) return;
    const tile k = find_tile(a.kseqs, s, a.block);
    for (int r = 0; r < k.n; r++)
      add_parts(p, kh, k.begin + k.first + r, start[0] / p.unit * a.block + r, a.block, (int)parts);
    return;
  }
  const int kh = (int)(blockIdx.x / a.S);
  const int64_t row = blockIdx.x % a.S;
  /* the last sequence whose keys start at or before the row, if any */
  int lo = 0, hi = a.kseqs.n - 1;
  while (lo < hi) {
    const int mid = (lo + hi + 1) >> 1;
    if (seq_start(a.kseqs, mid) / a.stride <= row)
      lo = mid;
    else
      hi = mid - 1;
  }
  key_span span = {0, 0};
  if (a.kseqs.n > 0) span = keys_of(a, lo);
  const int64_t key = row - span.row;
  const bool live = key >= 0 && key < span.n;
  add_parts(p, kh, row, live ? RGK_PLAIN_PARTS * span.row + key : 0, span.n,
            live ? (int)query_parts(a, lo) : 0);
}

/* ---- delta and sinks ---- */

/* A block's rows, some columns of each, are read by all of it and summed from shared memory: a row
 * by a thread, in one chain. */
enum { DELTA_COLS = 32, DELTA_LD = DELTA_COLS + 1 };

/* Two-byte elements, 16 bytes of them at a time, 128 bytes of a row, since memory gives those for
 * the time of 64: a thread has eight columns of every 16th row, and a word has two. */
template <class T>
__device__ __forceinline__ float delta16(const rgk_attn &a, int64_t first, int64_t end, uint32_t *o,
                                         uint32_t *d_o) {
  enum { ROWS = RGK_PLAIN_DELTA_ROWS, COLS = 2 * DELTA_COLS, LD = DELTA_LD, STEP = 16 };
  static_assert(RGK_PLAIN_THREADS == STEP * COLS / 8 && ROWS % STEP == 0);
  const int own = threadIdx.x / 8, column = threadIdx.x % 8 * 8;
  int64_t o_at[ROWS / STEP], d_o_at[ROWS / STEP]; /* below 0: no such row */
#pragma unroll
  for (int k = 0; k < ROWS / STEP; k++) {
    const int64_t at = first + own + STEP * k, row = at / a.H, h = at % a.H;
    o_at[k] = at < end ? row * a.o.row + h * a.o.head + column : -1;
    d_o_at[k] = at < end ? row * a.d_o.row + h * a.d_o.head + column : -1;
  }
  auto stage = [&](uint32_t *to, const void *x, const int64_t(&at)[ROWS / STEP], int c0) {
    uint4 w[ROWS / STEP];
#pragma unroll
    for (int k = 0; k < ROWS / STEP; k++)
      w[k] = at[k] >= 0 && c0 + column < a.E ? __ldcs((const uint4 *)((const T *)x + at[k] + c0))
                                             : uint4{};
    to += own * LD + column / 2;
#pragma unroll
    for (int k = 0; k < ROWS / STEP; k++, to += STEP * LD)
      to[0] = w[k].x, to[1] = w[k].y, to[2] = w[k].z, to[3] = w[k].w;
  };
  float sum = 0;
  for (int c0 = 0; c0 < a.E; c0 += COLS) {
    __syncthreads();
    stage(o, a.o.data, o_at, c0);
    stage(d_o, a.d_o.data, d_o_at, c0);
    __syncthreads();
    const int words = min((int)COLS, a.E - c0) / 2;
#pragma unroll 8
    for (int c = 0; c < words; c++) {
      const float2 x = unpack(o[threadIdx.x * LD + c], T()),
                   y = unpack(d_o[threadIdx.x * LD + c], T());
      sum = fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
    }
  }
  return sum;
}

__global__ void __launch_bounds__(RGK_PLAIN_THREADS)
    delta(const __grid_constant__ rgk_attn_plain p) {
  enum { ROWS = RGK_PLAIN_DELTA_ROWS, COLS = DELTA_COLS, LD = DELTA_LD };
  static_assert((int)ROWS == (int)RGK_PLAIN_THREADS, "a thread sums a row");
  __shared__ float o[ROWS * LD], d_o[ROWS * LD];
  const rgk_attn &a = p.a;
  const int64_t first = blockIdx.x * (int64_t)ROWS, end = live_rows(a.seqs) * a.H,
                mine = first + threadIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (first >= end) return;
  float sum = 0;
  const bool wanted = a.d_o.data && !a.delta.data,
             sixteen = a.aligned && a.dtype != RG_F32 && a.E % 8 == 0;
  if (wanted && sixteen)
    sum = a.dtype == RG_F16 ? delta16<__half>(a, first, end, (uint32_t *)o, (uint32_t *)d_o)
                            : delta16<__nv_bfloat16>(a, first, end, (uint32_t *)o, (uint32_t *)d_o);
  for (int c0 = 0; c0 < a.E && wanted && !sixteen; c0 += COLS) {
    __syncthreads();
    for (int r = warp; r < ROWS; r += ROWS / 32) {
      const int64_t row = (first + r) / a.H, h = (first + r) % a.H;
      const bool there = first + r < end && c0 + lane < a.E;
      o[r * LD + lane] =
          there ? load(a.o.data, a.o.dtype, row * a.o.row + h * a.o.head + c0 + lane) : 0;
      d_o[r * LD + lane] =
          there ? load(a.d_o.data, a.d_o.dtype, row * a.d_o.row + h * a.d_o.head + c0 + lane) : 0;
    }
    __syncthreads();
    for (int c = 0; c < COLS; c++)
      sum = fmaf(o[threadIdx.x * LD + c], d_o[threadIdx.x * LD + c], sum);
  }
  if (mine >= end) return;
  const int64_t row = mine / a.H, h = mine % a.H;
  if (a.delta.data) sum = ((const float *)a.delta.data)[row * a.delta.row + h * a.delta.head];
  if (a.d_lse.data) sum -= ((const float *)a.d_lse.data)[row * a.d_lse.row + h * a.d_lse.head];
  p.delta[mine] = sum;
}

/* A chunk's share of d_sinks of one head: - sum of exp(sink - lse) delta. */
__global__ void __launch_bounds__(RGK_PLAIN_THREADS)
    sink(const __grid_constant__ rgk_attn_plain p) {
  __shared__ double of_warp[RGK_PLAIN_THREADS / 32];
  const rgk_attn &a = p.a;
  const int64_t chunk = blockIdx.x / a.H, from = chunk * p.sink_rows;
  const int h = (int)(blockIdx.x % a.H);
  const int64_t to = min(from + p.sink_rows, live_rows(a.seqs));
  const float logit = a.sinks.data ? load(a.sinks.data, a.sinks.dtype, h * a.sinks.row) : -INFINITY;
  double sum = 0;
  for (int64_t t = from + threadIdx.x; t < to; t += RGK_PLAIN_THREADS) {
    const float lse = ((const float *)a.lse.data)[t * a.lse.row + h * a.lse.head];
    if (lse != -INFINITY) sum -= (double)(expf(logit - lse) * p.delta[t * a.H + h]);
  }
  for (int d = 16; d > 0; d /= 2) sum += __shfl_down_sync(~0u, sum, d);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < RGK_PLAIN_THREADS / 32; i++) sum += of_warp[i];
  p.sink[chunk * a.H + h] = sum;
}

__global__ void __launch_bounds__(RGK_PLAIN_THREADS)
    sink_sum(const __grid_constant__ rgk_attn_plain p) {
  const rgk_attn &a = p.a;
  const int h = blockIdx.x * RGK_PLAIN_THREADS + threadIdx.x;
  if (h >= a.H) return;
  double sum = 0;
  for (int64_t c = 0; c < p.sink_chunks; c++) sum += p.sink[c * a.H + h];
  put_sink(a, h, sum);
}

} // namespace

const void *rgk_plain_dq(int w) {
  switch (w) {
  case RGK_PLAIN_64: return (const void *)dq<RGK_PLAIN_64>;
  case RGK_PLAIN_128: return (const void *)dq<RGK_PLAIN_128>;
  case RGK_PLAIN_256: return (const void *)dq<RGK_PLAIN_256>;
  case RGK_PLAIN_576: return (const void *)dq<RGK_PLAIN_576>;
  case RGK_PLAIN_128_SMALL: return (const void *)dq<RGK_PLAIN_128_SMALL>;
  default: return (const void *)dq<RGK_PLAIN_256_SMALL>;
  }
}
const void *rgk_plain_dkv(int w) {
  switch (w) {
  case RGK_PLAIN_64: return (const void *)dkv<RGK_PLAIN_64>;
  case RGK_PLAIN_128: return (const void *)dkv<RGK_PLAIN_128>;
  case RGK_PLAIN_256: return (const void *)dkv<RGK_PLAIN_256>;
  case RGK_PLAIN_576: return (const void *)dkv<RGK_PLAIN_576>;
  case RGK_PLAIN_128_SMALL: return (const void *)dkv<RGK_PLAIN_128_SMALL>;
  default: return (const void *)dkv<RGK_PLAIN_256_SMALL>;
  }
}
const void *rgk_plain_delta(void) {
  return (const void *)delta;
}
const void *rgk_plain_reduce(void) {
  return (const void *)reduce;
}
const void *rgk_plain_sink(void) {
  return (const void *)sink;
}
const void *rgk_plain_sink_sum(void) {
  return (const void *)sink_sum;
}
