/* kernels/attn/topk_plain.cu: topk of any shape and type, without tensor cores.

   A block of threads takes 64 queries of a sequence and a KV head at a time, late ones first. It
   walks the candidates `chunk` blocks at a time: the keys that touch them go by in pieces of 64,

       p[row][key] = sum over heads of exp(q.k - lse)       4 x 4 of them a thread, fp32 products
       score[row][block] += p * overlap / stride            keys ascending, so no border shows in
                                                            the sum; pool max: the largest p

   and one thread a row puts finished scores on a heap of the best `keep`. A heap's entry is one
   number, the score's rank above the complement of the block's index: entries are all different and
   in total order.
 */
#include "../device/element.cuh"
#include "../device/pages.cuh"
#include "topk.cuh"

using namespace rgk;

namespace {

constexpr int ROWS = RGK_TOPK_ROWS, KEYS = RGK_TOPK_KEYS, THREADS = RGK_TOPK_THREADS;
/* of q and k in shared memory, transposed: [WIDTH, PITCH] */
constexpr int WIDTH = 32, PITCH = ROWS + 4;

template <int MODE> struct sum_of { using type = float; };
template <> struct sum_of<RGK_TOPK_WIDE> { using type = double; };

/* Shared memory: these, then [chunk, ROWS] scores and, where they fit, heaps. */
template <class S> struct tiles {
  float q[WIDTH * PITCH], k[WIDTH * PITCH];
  S p[ROWS * (KEYS + 1)];
};

/* ---- entries of heaps ---- */

__device__ __forceinline__ uint64_t entry(float score, int64_t b) {
  uint32_t u = __float_as_uint(score + 0.0f);
  u = score != score ? 0 : u >> 31 ? ~u : u | 0x80000000u;
  return (uint64_t)u << 32 | (0xffffffffu - (uint32_t)b);
}
__device__ __forceinline__ int32_t block_of(uint64_t e, float) {
  return (int32_t)(0xffffffffu - (uint32_t)e);
}

__device__ __forceinline__ uint64_t entry(double score, int64_t b) {
  return wide_entry(score, b);
}
__device__ __forceinline__ int32_t block_of(uint64_t e, double) {
  return wide_block(e);
}

/* Smallest on top; entry i of a row's heap is heap[i * ROWS]. */
__device__ void sift_down(uint64_t *heap, int64_t n, int64_t i, uint64_t x) {
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    uint64_t y = heap[child * ROWS];
    if (child + 1 < n && heap[(child + 1) * ROWS] < y) y = heap[++child * ROWS];
    if (y >= x) break;
    heap[i * ROWS] = y;
  }
  heap[i * ROWS] = x;
}
__device__ void heapify(uint64_t *heap, int64_t n) {
  for (int64_t i = n / 2 - 1; i >= 0; i--) sift_down(heap, n, i, heap[i * ROWS]);
}

/* Writes a row; its heap, if it has one, is full. */
template <class S>
__device__ void write_row(int32_t *idx, int top_n, rgk_topk_choice c, uint64_t *heap) {
  int64_t n = 0;
  for (; n < c.free0; n++) idx[n] = (int32_t)n;
  if (rgk_topk_ranks(c)) {
    for (int64_t i = 0; i < c.keep; i++) {
      int32_t b = block_of(heap[i * ROWS], S());
      heap[i * ROWS] = 0xffffffffu - (uint32_t)b;
    }
    heapify(heap, c.keep);
    for (int64_t left = c.keep; left > 0; left--) { /* the highest index comes off first */
      idx[n + left - 1] = (int32_t)(0xffffffffu - (uint32_t)heap[0]);
      sift_down(heap, left - 1, 0, heap[(left - 1) * ROWS]);
    }
    n += c.keep;
  } else if (c.keep > 0) {
    for (int64_t b = c.free0; b < c.free1; b++) idx[n++] = (int32_t)b;
  }
  for (int64_t b = c.free1; b < c.count; b++) idx[n++] = (int32_t)b;
  for (; n < top_n; n++) idx[n] = -1;
}

/* ---- products ---- */

/* Rows [0, n) of a matrix, row r at element at(r), columns [c0, c0 + WIDTH), transposed into out;
 * zero where there is nothing. */
template <class At>
__device__ __forceinline__ void load_tile(float *out, const rgk_tensor &t, int n, int c0, int width,
                                          At at) {
  int c = threadIdx.x % WIDTH;
  for (int r = threadIdx.x / WIDTH; r < ROWS; r += THREADS / WIDTH)
    out[c * PITCH + r] = r < n && c0 + c < width ? load(t.data, t.dtype, at(r) + c0 + c) : 0.0f;
}

/* A tile's keys; table NULL: rows [first, …) of k. */
struct tile_keys {
  topk_keys k;
  int64_t offset; /* position of the sequence's first query */
  const int32_t *table;
};
/* All threads of the block. */
__device__ __forceinline__ tile_keys keys_of(const rgk_topk_any &p, const tile &t) {
  const rgk_topk &c = p.call;
  if (!p.pages.table) return {rgk::keys_of(c, t.b), c.offset ? c.offset[t.b] : 0, nullptr};
  const int64_t tokens = paged_tokens(p.pages, t.b, t.length);
  return {{tokens, 0, min(keys_before(tokens, c), c.S)},
          tokens ? tokens - t.length : 0,
          p.pages.table + t.b * p.pages.table_row};
}
__device__ __forceinline__ int64_t key_at(const rgk_topk_any &p, const tile_keys &k, int64_t j) {
  return k.table ? paged_key(p.pages, k.table, p.pages.k_page, p.call.k.row, j)
                 : (k.k.first + j) * p.call.k.row;
}

/* acc += q.k for this thread's rows 4 * ty + i and keys 4 * tx + j. */
__device__ void products(const rgk_topk_any &any, float *qs, float *ks, int64_t row, int head,
                         int rows, const tile_keys &of, int64_t key, int kv_head, int keys,
                         float acc[4][4]) {
  const rgk_topk &p = any.call;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  for (int c0 = 0; c0 < p.D; c0 += WIDTH) {
    __syncthreads();
    load_tile(qs, p.q, rows, c0, p.D, [&](int r) { return (row + r) * p.q.row + head * p.q.head; });
    load_tile(ks, p.k, keys, c0, p.D,
              [&](int r) { return key_at(any, of, key + r) + kv_head * p.k.head; });
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < WIDTH; c++) {
      float4 a = *(const float4 *)(qs + c * PITCH + 4 * ty),
             b = *(const float4 *)(ks + c * PITCH + 4 * tx);
      const float x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] = fmaf(x[i], y[j], acc[i][j]);
    }
  }
}

__device__ __forceinline__ void add_exp(float &sum, float s, float lse) {
  sum += expf(s - lse);
}
/* times e^300: good for what lies far below fp32's range, and above */
__device__ __forceinline__ void add_exp(double &sum, float s, float lse) {
  sum += exp((double)s - (double)lse + 300.0);
}

/* The score of a block that no key touches. */
template <int MODE, class S> __device__ __forceinline__ S unscored() {
  return MODE == RGK_TOPK_DOT || MODE == RGK_TOPK_RELU ? (S)-INFINITY : (S)0;
}

/* What keys [key, key + keys) count for each of the tile's queries. */
template <int MODE>
__device__ __forceinline__ void weights(const rgk_topk_any &any, float *qs, float *ks, int64_t row,
                                        int rows, int kh, const tile_keys &of, int64_t key,
                                        int keys, const int32_t *visible,
                                        typename sum_of<MODE>::type *ps) {
  const rgk_topk &p = any.call;
  using S = typename sum_of<MODE>::type;
  const S nothing = unscored<MODE, S>();
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  S sum[4][4] = {};
  float acc[4][4] = {};
  for (int h = kh * p.G; h < (kh + 1) * p.G; h++) {
    products(any, qs, ks, row, h, rows, of, key, kh, keys, acc);
    if constexpr (MODE == RGK_TOPK_RELU) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = 4 * ty + i;
        const float w = p.weight.data && r < rows
                            ? load(p.weight.data, p.weight.dtype, (row + r) * p.weight.row + h)
                            : 1.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          sum[i][j] = fmaf(w, acc[i][j] < 0 ? 0.0f : acc[i][j], sum[i][j]);
          acc[i][j] = 0;
        }
      }
    } else if constexpr (MODE != RGK_TOPK_DOT) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = 4 * ty + i;
        const float lse = r < rows ? ((const float *)p.lse.data)[(row + r) * p.lse.row + h] : 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float s = acc[i][j] * p.scale;
          if (p.softcap > 0) s = p.softcap * tanhf(s / p.softcap);
          add_exp(sum[i][j], s, lse);
          acc[i][j] = 0;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      ps[(4 * ty + i) * (KEYS + 1) + 4 * tx + j] =
          key + 4 * tx + j < visible[4 * ty + i] ? MODE == RGK_TOPK_DOT ? (S)acc[i][j] : sum[i][j]
                                                 : nothing;
}

/* Adds them to the scores of `blocks` blocks from block0 on. */
template <int MODE, class S>
__device__ __forceinline__ void add_scores(const S *ps, int64_t block0, int blocks, int64_t key,
                                           int keys, int bs, int reach, bool largest, S *score) {
  for (int i = threadIdx.x; i < blocks * ROWS; i += THREADS) {
    const int64_t b = block0 + i / ROWS;
    const S *pr = ps + i % ROWS * (KEYS + 1);
    if (!largest && (MODE == RGK_TOPK_DOT || MODE == RGK_TOPK_RELU)) { /* keys are blocks */
      if (b >= key && b < key + keys) score[i] = pr[b - key];
      continue;
    }
    S sum_b = score[i];
    const int64_t last = min((b + 1) * bs, key + keys);
    for (int64_t j = max(b * bs - reach, key); j < last; j++) {
      const int64_t from = j - b * bs, to = from + reach + 1;
      if (largest) {
        sum_b = pr[j - key] > sum_b ? pr[j - key] : sum_b;
        continue;
      }
      sum_b += pr[j - key] * (S)(int)(min(to, (int64_t)bs) - max(from, (int64_t)0));
    }
    score[i] = sum_b;
  }
}

template <int MODE>
__global__ void __launch_bounds__(THREADS) topk(const __grid_constant__ rgk_topk_any any) {
  const rgk_topk &p = any.call;
  using S = typename sum_of<MODE>::type;
  extern __shared__ __align__(16) char memory[];
  static_assert(sizeof(tiles<S>) == rgk_topk_plain_tiles(MODE), "as the host counts");
  tiles<S> &at = *(tiles<S> *)memory;
  float *qs = at.q, *ks = at.k;
  S *ps = at.p, *score = (S *)(memory + sizeof at);
  uint64_t *heaps = p.heap
                        ? p.heap + blockIdx.x * p.most_keep * ROWS
                        : (uint64_t *)(((uintptr_t)(score + p.chunk * ROWS) + 7) & ~(uintptr_t)7);
  __shared__ int32_t visible[ROWS];
  __shared__ unsigned long long least_block, most_block;
  const int tid = threadIdx.x;
  const int bs = p.block / p.stride, reach = p.kernel / p.stride - 1; /* in keys */
  const S nothing = unscored<MODE, S>();
  auto undecided_row = [&](int64_t row, int kh) {
    return ((const int32_t *)p.idx.data)[row * p.idx.row + kh * p.idx.head] == RGK_TOPK_UNDECIDED;
  };
  if (MODE == RGK_TOPK_WIDE && p.T * p.KH <= 16 * THREADS) { /* few rows: is there any? */
    bool there = false;
    for (int i = tid; i < p.T * p.KH; i += THREADS) there |= undecided_row(i / p.KH, i % p.KH);
    if (!__syncthreads_or(there)) return;
  }

  for (int64_t work = blockIdx.x; work < p.slots * p.KH; work += gridDim.x) {
    const int kh = (int)(work % p.KH);
    const tile t = find_tile(p.seqs, p.slots - 1 - work / p.KH, ROWS);
    const int64_t row0 = t.begin + t.first;
    if (t.n == 0) continue;
    if (t.b == p.seqs.n) {
      for (int i = tid; MODE != RGK_TOPK_WIDE && i < t.n * p.top_n; i += THREADS)
        ((int32_t *)p.idx.data)[(row0 + i / p.top_n) * p.idx.row + kh * p.idx.head + i % p.top_n] =
            0;
      continue;
    }
    if (MODE == RGK_TOPK_WIDE && !__syncthreads_or(tid < t.n && undecided_row(row0 + tid, kh)))
      continue;
    const tile_keys of = keys_of(any, t);
    const topk_keys &k = of.k;
    const int64_t position = t.first + of.offset + tid;
    /* of thread tid's row */
    int32_t *idx = (int32_t *)p.idx.data + (row0 + tid) * p.idx.row + kh * p.idx.head;
    uint64_t *heap = heaps + tid;
    rgk_topk_choice mine = {0, 0, 0, 0};
    bool ranks = false;
    int64_t held = 0;

    /* The blocks that some row has to rank. */
    __syncthreads();
    if (tid == 0) least_block = ~0ull, most_block = 0;
    __syncthreads();
    if (tid < ROWS) {
      int64_t seen = 0;
      if (tid < t.n) {
        mine = choice_of(p, position);
        seen = min(keys_before(position + 1, p), k.n);
        ranks = rgk_topk_ranks(mine) && (MODE != RGK_TOPK_WIDE || idx[0] == RGK_TOPK_UNDECIDED);
      }
      visible[tid] = (int32_t)seen;
      if (ranks) {
        atomicMin(&least_block, (unsigned long long)mine.free0);
        atomicMax(&most_block, (unsigned long long)mine.free1);
      }
    }
    __syncthreads();
    const int64_t block1 = (int64_t)most_block, key_end = visible[t.n - 1];

    for (int64_t c0 = (int64_t)least_block; (unsigned long long)c0 < most_block; c0 += p.chunk) {
      const int nb = (int)min((int64_t)p.chunk, block1 - c0);
      for (int i = tid; i < nb * ROWS; i += THREADS) score[i] = nothing;
      const int64_t end = min((c0 + nb) * bs, key_end);
      for (int64_t key = max(c0 * bs - reach, (int64_t)0); key < end; key += KEYS) {
        const int n = (int)min((int64_t)KEYS, end - key);
        weights<MODE>(any, qs, ks, row0, t.n, kh, of, key, n, visible, ps);
        __syncthreads();
        add_scores<MODE>(ps, c0, nb, key, n, bs, reach, p.max, score);
      }
      __syncthreads();
      if (ranks)
        for (int i = 0; i < nb; i++) {
          const int64_t b = c0 + i;
          if (b < mine.free0 || b >= mine.free1) continue;
          const uint64_t e = entry(score[i * ROWS + tid], b);
          if (held < mine.keep) {
            heap[held++ * ROWS] = e;
            if (held == mine.keep) heapify(heap, held);
          } else if (e > heap[0]) {
            sift_down(heap, held, 0, e);
          }
        }
      __syncthreads();
    }

    if (tid < t.n && (MODE != RGK_TOPK_WIDE || ranks)) {
      if (MODE == RGK_TOPK_FAST && ranks && visible[tid] > 0) {
        /* of a score that is not negative, or 0 for NaN */
        const uint32_t u = (uint32_t)(heap[0] >> 32);
        if (u && undecided(__uint_as_float(u & 0x7fffffffu))) {
          idx[0] = RGK_TOPK_UNDECIDED;
          continue;
        }
      }
      write_row<S>(idx, p.top_n, mine, heap);
    }
  }
}

/* What queries that choose alike are ranked by: the sum of them all. */
__global__ void __launch_bounds__(THREADS) share(const __grid_constant__ rgk_topk p) {
  const int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
  if (i >= p.T * p.KH * p.D) return;
  const int c = (int)(i % p.D), kh = (int)(i / p.D % p.KH);
  const int64_t row = i / p.D / p.KH;
  const int b = find_seq(p.seqs, row);
  double sum = 0;
  if (b < p.seqs.n) {
    const int64_t start = seq_start(p.seqs, b), from = start + (row - start) / p.share * p.share,
                  last = min(from + p.share, seq_start(p.seqs, b + 1));
    for (int64_t r = from; r < last; r++)
      for (int h = kh * p.G; h < (kh + 1) * p.G; h++)
        sum += (double)load(p.q.data, p.q.dtype, r * p.q.row + h * p.q.head + c);
  }
  p.sums[i] = (float)sum;
}

} // namespace

const void *rgk_topk_share(void) {
  return (const void *)share;
}
const void *rgk_topk_plain(int mode) {
  return mode == RGK_TOPK_WIDE   ? (const void *)topk<RGK_TOPK_WIDE>
         : mode == RGK_TOPK_DOT  ? (const void *)topk<RGK_TOPK_DOT>
         : mode == RGK_TOPK_RELU ? (const void *)topk<RGK_TOPK_RELU>
                                 : (const void *)topk<RGK_TOPK_FAST>;
}
