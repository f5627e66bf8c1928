/* kernels/index_loss_mma.cu: index_loss and its gradient by mma.sync, bf16, for any GPU since
   Ampere whose blocks have 160 KB of shared memory.

   rows   a block has a row of idx at a time, and heads in tiles of 64, which stay in shared memory
          while the row's keys come by in tiles of 128, 64 features at a time through a ring. Warps
          share a tile's products, two by heads and four by keys; what each key gives is summed over
          heads in fixed places. First the attention's exponentials, then the index's scores, to the
          block's own memory; index_loss.cuh makes the loss of them, or the scores' gradients f.
          Backward, for each tile of keys:

              Y = IQ IK^T    G = f w [Y > 0], heads by keys, bf16, through shared memory
              d.IQ += G IK   d.w += f Y       G^T IQ: the row's share of d.IK, to memory, rounded

   keys   sums the shares of a window of rows, key by key, rows ascending (attn/csr.h), in fp32: no
          bit depends on windows.
 */
#include "device/mma.cuh"
#include "device/scan.cuh"
#include "index_loss.cuh"

using namespace rgk;
using namespace rgk::index_loss;

namespace {

using T = __nv_bfloat16;

enum {
  THREADS = RGK_INDEX_LOSS_MMA_THREADS,
  WARPS = THREADS / 32,
  HEADS = 64,
  KEYS = 128,
  STAGES = 4,
  W = 64, /* features of a piece */
  PIECES = RGK_INDEX_LOSS_WIDTH / W,
  WIDTH = RGK_INDEX_LOSS_MMA_WIDTH,
  INDEX = WIDTH / W, /* pieces of the index */
  Q_PIECE = HEADS * 2 * W,
  K_PIECE = KEYS * 2 * W
};

struct alignas(128) shared {
  char q[PIECES][Q_PIECE];
  char k[STAGES][K_PIECE];
  char g[KEYS / W][Q_PIECE]; /* rows are heads, columns keys */
  double room[THREADS];
  float of_heads[2][KEYS]; /* sums over 32 heads */
  float dw[4][HEADS];      /* sums over 32 keys of each tile */
  int32_t of_warp[WARPS];
};
static_assert(sizeof(shared) + 128 <= RGK_INDEX_LOSS_MMA_BYTES, "fits wherever it starts");
static_assert(STAGES == 2 * INDEX, "a tile of the index is multiplied while the next one comes");

struct row {
  int64_t t;
  int head, end; /* of idx; behind its last place with a key */
  float *m, *s;
  int32_t *key; /* row of k of each place, -1: none */
};

/* This thread's part of a warp's 32 heads by 32 keys: x[i][…] has rows 16 i + lane / 4 and + 8, and
 * columns 8 j + 2 (lane % 4) and + 1. */
using part = float[2][16];

struct block {
  const rgk_index_loss &p;
  shared &s;
  const int lane, warp, by_heads, by_keys;
  row r;

  /* ---- the row ---- */

  __device__ __forceinline__ void list_keys(const int32_t *idx, int64_t first, int64_t limit) {
    int carry = -1, end = 0;
    for (int n0 = 0; n0 < p.N; n0 += THREADS) {
      const int n = n0 + (int)threadIdx.x, e = n < p.N ? idx[n] : -1, upto = prefix_max(e);
      if (lane == 31) s.of_warp[warp] = upto;
      const int other = __shfl_up_sync(~0u, upto, 1);
      __syncthreads();
      int before = carry;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        if (w < warp) before = max(before, s.of_warp[w]);
        carry = max(carry, s.of_warp[w]);
      }
      if (lane > 0) before = max(before, other);
      const bool counts = e > before && (int64_t)e * p.block < limit;
      for (int o = 0; n < p.N && o < p.block; o++) {
        const int64_t at = (int64_t)e * p.block + o;
        const int i = n * p.block + o;
        const bool there = counts && at < limit;
        r.key[i] = there ? (int32_t)(first + at) : -1;
        r.m[i] = 0, r.s[i] = -INFINITY;
        if (counts) end = i + 1; /* whole blocks: shares of all their keys are read */
      }
      __syncthreads();
    }
    r.end = (int)over_block<true, THREADS>(end, s.room);
  }

  /* ---- tiles ---- */

  /* Heads [head, head + n) of row r.t of x, all pieces of `width`. */
  __device__ __forceinline__ void bring_heads(const rgk_tensor &x, int head, int n, int width,
                                              int pieces) {
    const T *base = (const T *)x.data + r.t * x.row + head * x.head;
    for (int c = 0; c < pieces; c++)
      copy_rows<W, HEADS, THREADS>(smem_at(s.q[c]), threadIdx.x, width - c * W, x.data, [&](int h) {
        return h < n ? base + h * x.head + c * W : nullptr;
      });
    copies_commit();
  }
  __device__ __forceinline__ void bring_keys(const rgk_tensor &x, int head, int width, int tile,
                                             int c, int stage) {
    const T *base = (const T *)x.data + head * x.head + c * W;
    copy_rows<W, KEYS, THREADS>(smem_at(s.k[stage]), threadIdx.x, width - c * W, x.data,
                                [&](int k) -> const T * {
                                  const int i = tile * KEYS + k, at = i < r.end ? r.key[i] : -1;
                                  return at < 0 ? nullptr : base + at * x.row;
                                });
  }
  /* d += this warp's heads of a piece in q times its keys of one in k. */
  __device__ __forceinline__ void multiply(part &d, const char *q, const char *k) const {
    const uint32_t q_at = mma_at_rows<W>(smem_at(q)) + 32 * by_heads * pitch(W),
                   k_at = mma_at_columns<W>(smem_at(k)) + 32 * by_keys * pitch(W);
#pragma unroll
    for (int step = 0; step < W / 16; step++) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) load_matrices(on<W>(q_at, 2 * step) + 16 * i * pitch(W), a[i]);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        uint32_t b[4];
        load_matrices(on<W>(k_at, 2 * step) + 16 * j * pitch(W), b);
#pragma unroll
        for (int i = 0; i < 2; i++)
          mma<T>(d[i] + 8 * j, a[i], b), mma<T>(d[i] + 8 * j + 4, a[i], b + 2);
      }
    }
  }
  /* use(tile, products) for each tile of keys, with what is in q. */
  template <class F>
  __device__ __forceinline__ void each_tile(const rgk_tensor &x, int head, int width, F use) {
    const int pieces = (width + W - 1) / W, steps = (r.end + KEYS - 1) / KEYS * pieces;
    auto bring = [&](int step) {
      if (step < steps) bring_keys(x, head, width, step / pieces, step % pieces, step % STAGES);
      copies_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) bring(i);
    part d = {};
    for (int step = 0, c = 0; step < steps; step++) {
      copies_wait<STAGES - 2>();
      __syncthreads();
      bring(step + STAGES - 1);
      multiply(d, s.q[c], s.k[step % STAGES]);
      if (++c < pieces) continue;
      use(step / pieces, d);
      c = 0;
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 16; e++) d[i][e] = 0;
    }
    copies_wait<0>();
    __syncthreads();
  }
  /* Sums of a tile's terms over its heads: put(place, sum) for places with a key. */
  template <class F> __device__ __forceinline__ void over_heads(int tile, const part &d, F put) {
    float sum[8];
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const int e = c / 2 * 4 + c % 2;
      sum[c] = (d[0][e] + d[0][e + 2]) + (d[1][e] + d[1][e + 2]);
#pragma unroll
      for (int x = 4; x < 32; x *= 2) sum[c] += __shfl_xor_sync(~0u, sum[c], x);
    }
    if (lane < 4)
#pragma unroll
      for (int c = 0; c < 8; c++)
        s.of_heads[by_heads][32 * by_keys + c / 2 * 8 + 2 * lane + c % 2] = sum[c];
    __syncthreads();
    const int i = tile * KEYS + (int)threadIdx.x;
    if (threadIdx.x < KEYS && i < r.end && r.key[i] >= 0)
      put(i, s.of_heads[0][threadIdx.x] + s.of_heads[1][threadIdx.x]);
  }
  /* The tile's head that accumulator x of part i belongs to. */
  __device__ __forceinline__ int head_of(int i, int h) const {
    return 32 * by_heads + 16 * i + 8 * h + lane / 4;
  }

  /* ---- exponentials and scores ---- */

  __device__ __forceinline__ void attend() {
    const int group = p.H / p.I, per_kv = p.H / p.KH, last = (r.head + 1) * group;
    const float c = p.scale * LOG2E;
    for (int from = r.head * group, n; from < last; from += n) {
      const int kv = from / per_kv;
      n = min(min((int)HEADS, (kv + 1) * per_kv - from), last - from);
      bring_heads(p.q, from, n, p.D, (p.D + W - 1) / W);
      float lse[2][2];
#pragma unroll
      for (int x = 0; x < 4; x++) {
        const int h = head_of(x / 2, x % 2);
        lse[x / 2][x % 2] =
            h < n ? LOG2E * ((const float *)p.lse.data)[r.t * p.lse.row + (from + h) * p.lse.head]
                  : INFINITY;
      }
      each_tile(p.k, kv, p.D, [&](int tile, part &d) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int e = 0; e < 16; e++) d[i][e] = exp2_fast(fmaf(d[i][e], c, -lse[i][e / 2 % 2]));
        over_heads(tile, d, [&](int i, float x) { r.m[i] += x; });
      });
    }
  }
  __device__ __forceinline__ void read_weights(float (&w)[2][2], int from, int n) const {
#pragma unroll
    for (int x = 0; x < 4; x++) {
      const int h = head_of(x / 2, x % 2);
      w[x / 2][x % 2] = h < n ? weight_of(p, r.t, from + h) : 0;
    }
  }
  __device__ __forceinline__ void score() {
    const int heads = p.IH / p.I, last = (r.head + 1) * heads;
    for (int from = r.head * heads, n; from < last; from += n) {
      n = min((int)HEADS, last - from);
      const bool begins = from == r.head * heads;
      bring_heads(p.index_q, from, n, p.ID, (p.ID + W - 1) / W);
      float w[2][2];
      read_weights(w, from, n);
      each_tile(p.index_k, r.head, p.ID, [&](int tile, part &d) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int e = 0; e < 16; e++)
            d[i][e] = p.relu && d[i][e] < 0 ? 0 : w[i][e / 2 % 2] * d[i][e];
        over_heads(tile, d,
                   [&](int i, float x) { r.s[i] = p.index_scale * x + (begins ? 0 : r.s[i]); });
      });
    }
  }

  /* ---- gradients, of scores whose own stand in r.s ---- */

  /* G of products d, to shared memory; d.w's terms are added. */
  __device__ __forceinline__ void weigh(const part &d, int tile, const float (&w)[2][2],
                                        float (&dw)[2][2]) {
    float f[8];
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const int i = tile * KEYS + 32 * by_keys + c / 2 * 8 + 2 * (lane % 4) + c % 2;
      f[c] = i < r.end ? p.index_scale * r.s[i] : 0;
    }
    const uint32_t to = smem_at(s.g[by_keys / 2]);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float g[2];
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const float y = d[i][4 * j + 2 * h + c], of = f[2 * j + c];
            const bool on = of != 0 && !(p.relu && y <= 0);
            g[c] = on ? of * w[i][h] : 0;
            if (on) dw[i][h] = fmaf(of, y, dw[i][h]);
          }
          put_pair<W>(to, head_of(i, h), by_keys % 2 * 32 + 8 * j + 2 * (lane % 4),
                      pack(g[0], g[1], T()));
        }
  }
  /* dq += G IK, of this warp's heads and, by_keys, its 32 of the features. */
  __device__ __forceinline__ void add_queries(part &dq, const char (*k)[K_PIECE]) const {
    const uint32_t k_at = mma_at_rows<W>(smem_at(k[by_keys / 2]));
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
      const uint32_t g_at = mma_at_rows<W>(smem_at(s.g[step / 4])) + 32 * by_heads * pitch(W);
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++)
        load_matrices(on<W>(g_at, step % 4 * 2) + 16 * i * pitch(W), a[i]);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        uint32_t b[4];
        load_transposed(on<W>(k_at + 16 * step * pitch(W), by_keys % 2 * 4 + 2 * j), b);
#pragma unroll
        for (int i = 0; i < 2; i++)
          mma<T>(dq[i] + 8 * j, a[i], b), mma<T>(dq[i] + 8 * j + 4, a[i], b + 2);
      }
    }
  }
  /* Shares G^T IQ of the warp's 16 keys of a tile. A piece of a share lies as its lanes have it: 16
   * bytes of lane % 4 after those of the one before, first those of columns below 32. */
  __device__ __forceinline__ void put_shares(int tile) const {
    const int64_t keys = (int64_t)p.N * p.block;
    T *const to = (T *)p.share + ((r.t - p.row) * p.I + r.head) * keys * WIDTH;
    const uint32_t g_at = on<W>(mma_at_columns<W>(smem_at(s.g[warp / 4])), warp % 4 * 2);
#pragma unroll 1
    for (int c = 0; c < INDEX; c++) {
      float x[32] = {};
#pragma unroll
      for (int step = 0; step < HEADS / 16; step++) {
        uint32_t a[4];
        load_transposed(g_at + 16 * step * pitch(W), a);
        mma_by_columns<T, W>(x, a, mma_at_rows<W>(smem_at(s.q[c])) + 16 * step * pitch(W));
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int i = tile * KEYS + 16 * warp + lane / 4 + 8 * h;
        if (i >= r.end) continue;
        uint4 *at = (uint4 *)(to + (int64_t)i * WIDTH + c * W) + lane % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint32_t y[4];
#pragma unroll
          for (int k = 0; k < 4; k++)
            y[k] = pack(x[16 * half + 4 * k + 2 * h], x[16 * half + 4 * k + 2 * h + 1], T());
          __stcs(at + 4 * half, make_uint4(y[0], y[1], y[2], y[3]));
        }
      }
    }
  }
  __device__ __forceinline__ void differentiate() {
    const int heads = p.IH / p.I, from = r.head * heads, tiles = (r.end + KEYS - 1) / KEYS;
    float w[2][2], dw[2][2] = {};
    part dq = {};
    auto bring = [&](int tile) {
      for (int c = 0; c < INDEX && tile < tiles; c++)
        bring_keys(p.index_k, r.head, p.ID, tile, c, tile % 2 * INDEX + c);
      copies_commit();
    };
    read_weights(w, from, heads);
    bring_heads(p.index_q, from, heads, p.ID, INDEX);
    bring(0);
    for (int tile = 0; tile < tiles; tile++) {
      copies_wait<0>();
      __syncthreads();
      bring(tile + 1);
      const char(*const k)[K_PIECE] = s.k + tile % 2 * INDEX;
      part d = {};
#pragma unroll
      for (int c = 0; c < INDEX; c++) multiply(d, s.q[c], k[c]);
      weigh(d, tile, w, dw);
      __syncthreads();
      add_queries(dq, k);
      if (p.share) put_shares(tile);
    }
    copies_wait<0>();
#pragma unroll
    for (int x = 0; x < 4; x++) {
      float &sum = dw[x / 2][x % 2];
      sum += __shfl_xor_sync(~0u, sum, 1), sum += __shfl_xor_sync(~0u, sum, 2);
      const int h = head_of(x / 2, x % 2);
      if (lane % 4 == 0) s.dw[by_keys][h] = sum;
      if (h >= heads || !p.dq.data) continue;
      const int64_t at = r.t * p.dq.row + (from + h) * p.dq.head;
#pragma unroll
      for (int c = 0; c < 8; c++) {
        const int column = 32 * by_keys + c / 2 * 8 + 2 * (lane % 4) + c % 2;
        if (column < p.ID)
          put(p.dq, at + column, dq[x / 2][c / 2 * 4 + x % 2 * 2 + c % 2], p.add_q);
      }
    }
    __syncthreads();
    const int h = threadIdx.x;
    if (h < heads && p.dw.data)
      put(p.dw, r.t * p.dw.row + (from + h) * p.dw.head,
          (s.dw[0][h] + s.dw[1][h]) + (s.dw[2][h] + s.dw[3][h]), p.add_w);
  }
};

template <bool BACKWARD>
__global__ void __launch_bounds__(THREADS, 1) rows(const __grid_constant__ rgk_index_loss p) {
  extern __shared__ char memory[];
  shared &s = *(shared *)(memory + (-smem_at(memory) & 127));
  const int64_t keys = (int64_t)p.N * p.block;
  float *own = p.own + (int64_t)blockIdx.x * 3 * keys;
  const int warp = threadIdx.x / 32;
  block x{p, s, (int)threadIdx.x % 32, warp, warp / 4, warp % 4, {}};
  x.r.m = own, x.r.s = own + keys, x.r.key = (int32_t *)(own + 2 * keys);
  for (int64_t work = blockIdx.x; work < p.rows * p.I; work += gridDim.x) {
    const int64_t t = x.r.t = p.row + work / p.I;
    const int head = x.r.head = (int)(work % p.I);
    const row_keys r = find_keys(p, t);
    if (r.b >= p.seqs.n) {
      clear_row<BACKWARD, THREADS>(p, t, head);
      continue;
    }
    __syncthreads(); /* the row before is done with */
    x.list_keys((const int32_t *)p.idx.data + t * p.idx.row + head * p.idx.head, r.first, r.seen);
    x.attend();
    x.score();
    finish_row<BACKWARD, THREADS>(p, t, head, keys, x.r.m, x.r.s, x.r.end > 0, x.r.s, s.room);
    if (BACKWARD) x.differentiate();
  }
}

/* ---- sums of shares ---- */

/* Sixteen threads have a key and a head of idx, one of them eight neighbours of a share. */
__global__ void __launch_bounds__(RGK_INDEX_LOSS_THREADS)
    keys_of(const __grid_constant__ rgk_index_loss p) {
  enum { EACH = WIDTH / 8 };
  static_assert(EACH == 16);
  const int u = threadIdx.x % EACH;
  /* below 2^31, which divides more quickly */
  const int which = (int)(blockIdx.x * (RGK_INDEX_LOSS_THREADS / EACH) + threadIdx.x / EACH);
  const bool real = which < p.S * p.I;
  const int key = real ? which / p.I : 0, head = real ? which % p.I : 0, b = find_seq(p.kseqs, key);
  const int64_t until = p.row + p.rows;
  const bool live = real && b < p.kseqs.n, begins = p.row == 0, ends = until == p.T;
  int64_t at = 0, end = 0, within = 0;
  if (live) {
    const int first = (int)seq_start(p.kseqs, b),
              slot = first / p.block + b + (key - first) / p.block;
    const int64_t *start = p.start + head * (p.slots + 1) + slot;
    within = (key - first) % p.block;
    at = begins ? start[0] : p.cursor[which];
    end = start[1];
  }
  float x[8];
  float4 *const sum = (float4 *)(p.sum + (int64_t)which * WIDTH + 8 * u);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float4 y = real && !begins ? sum[i] : float4{};
    x[4 * i] = y.x, x[4 * i + 1] = y.y, x[4 * i + 2] = y.z, x[4 * i + 3] = y.w;
  }
  const int32_t *list = p.list + head * p.T * p.N;
  const uint16_t *places = p.places + head * p.T * p.N;
  for (bool more = true; __any_sync(~0u, more);) {
    const int64_t e = at + u;
    const int64_t row = e < end ? list[e] : until;
    const bool mine = row < until;
    const int64_t from =
        mine ? (((row - p.row) * p.I + head) * p.N + places[e]) * p.block + within : 0;
    const int n = __popc(__ballot_sync(~0u, mine) >> threadIdx.x % 32 / EACH * EACH & 0xffff);
#pragma unroll 8
    for (int i = 0; i < EACH; i++) {
      const int64_t place = __shfl_sync(~0u, from, i, EACH);
      if (i >= n) continue;
      const uint4 w = __ldcs((const uint4 *)((const T *)p.share + place * WIDTH) + u);
      const uint32_t word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const float2 v = unpack(word[c], T());
        x[2 * c] += v.x, x[2 * c + 1] += v.y;
      }
    }
    at += n;
    more = n == EACH;
  }
  if (!real) return;
  if (!ends) {
    if (u == 0) p.cursor[which] = at;
    sum[0] = make_float4(x[0], x[1], x[2], x[3]), sum[1] = make_float4(x[4], x[5], x[6], x[7]);
    return;
  }
  if (!live && p.add_k) return;
  const int column = u / 8 * W + u / 4 % 2 * 32 + u % 4 * 2; /* as put_shares leaves them */
  const int64_t to = key * p.dk.row + head * p.dk.head;
#pragma unroll
  for (int c = 0; c < 8; c++)
    if (column + c / 2 * 8 + c % 2 < p.ID)
      put(p.dk, to + column + c / 2 * 8 + c % 2, x[c], p.add_k);
}

} // namespace

const void *rgk_index_loss_mma_rows(bool backward) {
  return backward ? (const void *)rows<true> : (const void *)rows<false>;
}
const void *rgk_index_loss_mma_keys(void) {
  return (const void *)keys_of;
}
