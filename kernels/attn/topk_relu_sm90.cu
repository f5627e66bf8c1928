/* kernels/attn/topk_relu_sm90.cu: scores of topk by weighted positive products, on Hopper.

       score [query, key] = sum over heads h of weight [query, h] · max(0, q [query, h] · k [key])

   A block has two groups of queries, whose heads are the columns of

       D [64 keys, 256] = K [64, d] · Qᵀ [d, 256]

   and a chunk of their sequence's keys, which a third warpgroup brings in tiles of 64. So one group
   multiplies while the other adds its columns up: each thread has two keys and every fourth pair of
   heads, and a quad's lanes add what they have. Scores go to memory, where topk_rank.cu chooses.
   Queries of several sequences take their turns with the same block.
 */
#include "../device/element.cuh"
#include "../device/pages.cuh"
#include "../device/wgmma.cuh"
#include "topk.cuh"

using namespace rgk;

namespace {

enum {
  COLUMNS = RGK_TOPK_RELU_COLUMNS,
  TILE = 64,
  STAGES = 4,
  K_PANEL = TILE * 128,
  Q_PANEL = COLUMNS * 128,
  REGS = 216,
  LOADING_REGS = 56 /* of a thread */
};

template <int D> struct shared {
  static constexpr int PANELS = D / 64;
  alignas(1024) char q[2][PANELS * Q_PANEL];
  char k[STAGES][PANELS * K_PANEL];
  float weight[2][COLUMNS];
  uint64_t full[STAGES], empty[STAGES], q_full;
};

/* Rows of a block's queries that are of one sequence, and the keys of its chunk that any sees. */
struct part {
  int64_t row, end; /* of q */
  int64_t first;    /* row of k */
  int key, keys;    /* from `key` to `keys` */
};
/* The part that begins with row `row` of those below `last`; row == end: there is none. */
__device__ __forceinline__ part find_part(const rgk_topk_scored &p, int64_t row, int64_t last) {
  part x = {row, row, 0, 0, 0};
  if (row >= last) return x;
  const rgk_topk &c = p.call;
  const int b = find_seq(c.seqs, row);
  if (b == c.seqs.n) return x;
  x.end = min(last, seq_start(c.seqs, b + 1));
  const topk_keys k = keys_of(c, b);
  const int64_t position = x.end - 1 - seq_start(c.seqs, b) + (c.offset ? (int64_t)c.offset[b] : 0);
  x.first = k.first;
  if (!rgk_topk_ranks(choice_of(c, position))) return x; /* none before it does */
  const int64_t from = (int64_t)blockIdx.y * RGK_TOPK_RELU_CHUNK;
  x.key = (int)from;
  x.keys = (int)min(min(keys_before(position + 1, c), k.n), from + RGK_TOPK_RELU_CHUNK);
  return x;
}

template <class T, int D, int HEADS>
__device__ __forceinline__ void load(const rgk_topk_scored &p, shared<D> &s, int kh, int64_t row,
                                     int64_t last) {
  constexpr int PANELS = D / 64;
  const rgk_topk &c = p.call;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  auto place = [&](int r) { return r * 128 + ((lane ^ r) & 7) * 16; };
  for (int i = 0; i < 2 * COLUMNS / 16; i++) { /* four rows a warp */
    const int m = 16 * i + 4 * warp + lane / 8, group = m / COLUMNS, r = m % COLUMNS;
    const int64_t at = row + m / HEADS;
    const bool real = at < last && m % HEADS < c.G;
    const T *from = (const T *)c.q.data + (real ? at : row) * c.q.row +
                    (kh * c.G + (real ? m % HEADS : 0)) * c.q.head + lane % 8 * 8;
#pragma unroll
    for (int x = 0; x < PANELS; x++)
      copy16(smem_at(s.q[group]) + x * Q_PANEL + place(r), from + x * 64, real);
  }
  copies_arrive(&s.q_full);
  ring<STAGES> at;
  for (part w = find_part(p, row, last); w.row < w.end; w = find_part(p, w.end, last)) {
    const T *base = (const T *)c.k.data + w.first * c.k.row + kh * c.k.head + lane % 8 * 8;
    for (int key = w.key; key < w.keys; key += TILE, at.next()) {
      bar_wait(&s.empty[at.stage], at.parity ^ 1);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = 16 * warp + 4 * i + lane / 8;
        const bool real = key + r < w.keys;
        const T *from = base + (real ? key + r : 0) * c.k.row;
#pragma unroll
        for (int x = 0; x < PANELS; x++)
          copy16(smem_at(s.k[at.stage]) + x * K_PANEL + place(r), from + x * 64, real);
      }
      copies_arrive(&s.full[at.stage]);
    }
  }
  copies_wait_all();
}

/* max(x, 0); NaN stays. */
__device__ __forceinline__ float positive(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

/* Sums of a query's columns of rows l/4 and l/4 + 8, of which a lane has a fourth. */
template <int HEADS>
__device__ __forceinline__ void add_up(const float (&d)[COLUMNS / 2], int query,
                                       const float *weight, float (&sum)[2]) {
  constexpr int TILES = HEADS / 8;
  float x[2][2] = {};
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const int n = query * TILES + i;
    const float2 w = *(const float2 *)(weight + 8 * n);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      x[h][0] = fmaf(w.x, positive(d[4 * n + 2 * h]), x[h][0]);
      x[h][1] = fmaf(w.y, positive(d[4 * n + 2 * h + 1]), x[h][1]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    sum[h] = x[h][0] + x[h][1];
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
  }
}

template <class T, int D, int HEADS>
__device__ __forceinline__ void score(const rgk_topk_scored &p, shared<D> &s, int group, int kh,
                                      int64_t row, int64_t last) {
  constexpr int QUERIES = COLUMNS / HEADS;
  static_assert(QUERIES % 4 == 0);
  const rgk_topk &c = p.call;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int64_t mine = row + group * QUERIES; /* the group's first */
  for (int m = threadIdx.x % WARPGROUP; m < COLUMNS; m += WARPGROUP) {
    const int64_t at = mine + m / HEADS;
    const int head = m % HEADS;
    float w = at < last && head < c.G;
    if (w != 0 && c.weight.data)
      w = rgk::load(c.weight.data, c.weight.dtype, at * c.weight.row + kh * c.G + head);
    s.weight[group][m] = w;
  }
  named_sync(1 + group, WARPGROUP);
  bar_wait(&s.q_full, 0);
  const float *weight = s.weight[group] + lane % 4 * 2;
  const uint64_t q_at = desc_k(smem_at(s.q[group]));
  float d[COLUMNS / 2];
  ring<STAGES> at;
  for (part w = find_part(p, row, last); w.row < w.end; w = find_part(p, w.end, last)) {
    for (int key = w.key; key < w.keys; key += TILE, at.next()) {
      bar_wait(&s.full[at.stage], at.parity);
      proxy_fence(); /* threads wrote what is to be multiplied */
      const uint64_t k_at = desc_k(smem_at(s.k[at.stage]));
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < D / 16; i++)
        wgmma<T, COLUMNS>::template ss<>(d, desc_on(k_at, i / 4 * K_PANEL + i % 4 * 32),
                                         desc_on(q_at, i / 4 * Q_PANEL + i % 4 * 32), i > 0);
      wgmma_commit();
      const waited done = wgmma_wait<0>();
      wgmma_keep(d);
      warp_release(&s.empty[at.stage], done);
      const int k0 = key + 16 * warp + lane / 4;
#pragma unroll
      for (int y = 0; y < QUERIES; y += 4) { /* a lane of a quad stores one of four queries */
        float sum[4][2];
#pragma unroll
        for (int i = 0; i < 4; i++) add_up<HEADS>(d, y + i, weight, sum[i]);
        const int64_t to = mine + y + lane % 4;
        if (to < w.row || to >= w.end) continue;
        float *out = p.score + ((to - p.row) * c.KH + kh) * p.pitch + k0;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float a = lane & 1 ? sum[1][h] : sum[0][h], b = lane & 1 ? sum[3][h] : sum[2][h];
          if (k0 + 8 * h < w.keys) out[8 * h] = lane & 2 ? b : a;
        }
      }
    }
  }
}

template <class T, int D, int HEADS>
__global__ void __launch_bounds__(RGK_TOPK_RELU_THREADS, 1)
    scores(const __grid_constant__ rgk_topk_scored p) {
  extern __shared__ char memory[];
  using layout = shared<D>;
  layout &s = *(layout *)(memory + (-smem_at(memory) & 1023));
  static_assert(sizeof(layout) + 1024 <= RGK_TOPK_RELU_BYTES(D), "fits wherever it starts");
  const int kh = (int)(blockIdx.x % p.call.KH);
  const int64_t row = p.row + blockIdx.x / p.call.KH * (2 * COLUMNS / HEADS),
                last = min(p.row + p.rows, row + 2 * COLUMNS / HEADS);
  bool keys = false;
  for (part w = find_part(p, row, last); w.row < w.end; w = find_part(p, w.end, last))
    keys |= w.key < w.keys;
  if (!keys) return;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++)
      bar_init(&s.full[i], WARPGROUP), bar_init(&s.empty[i], 8 * WARP_ARRIVALS);
    bar_init(&s.q_full, WARPGROUP);
    bar_init_done();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, (int)threadIdx.x / WARPGROUP, 0);
  if (group < 2) {
    more_registers<REGS>();
    score<T, D, HEADS>(p, s, group, kh, row, last);
  } else {
    fewer_registers<LOADING_REGS>();
    load<T, D, HEADS>(p, s, kh, row, last);
  }
}

template <class T, int D> const void *of_heads(int heads) {
  switch (heads) {
#ifndef RGK_DEV
  case 16: return (const void *)scores<T, D, 16>;
  case 32: return (const void *)scores<T, D, 32>;
#endif
  case 8: return (const void *)scores<T, D, 8>;
  case 64: return (const void *)scores<T, D, 64>;
  }
  return nullptr;
}

} // namespace

const void *rgk_topk_relu(rg_dtype type, int heads, int width) {
  if (type == RG_BF16 && width == 128) return of_heads<__nv_bfloat16, 128>(heads);
#ifndef RGK_DEV
  if (type == RG_BF16 && width == 64) return of_heads<__nv_bfloat16, 64>(heads);
  if (type == RG_F16 && width == 128) return of_heads<__half, 128>(heads);
  if (type == RG_F16 && width == 64) return of_heads<__half, 64>(heads);
#endif
  return nullptr;
}
