/* kernels/attn/select.cu: around the products of select.h: cutting lists into items, merging partials, and the
 * row statistics that backward needs.
 *
 * A partial row lies in the order of the accumulators of a 64-row product, 16 bytes of one lane after
 * another: with U elements in 16 bytes, piece i of lane c of four holds columns 8 (i U/2 + j) + 2c and + 1 for
 * j = 0 … U/2 - 1, and stands at piece 4 i + c.
 */
#include "../device/element.cuh"
#include "../device/seq.cuh"
#include "../device/softmax.cuh"
#include "select.h"

using namespace rgk;

namespace {

__global__ void __launch_bounds__(RGK_SELECT_SCAN) items(const __grid_constant__ rgk_select p) {
  enum { WARPS = RGK_SELECT_SCAN / 32 };
  __shared__ int64_t of_warp[WARPS];
  const int z = blockIdx.x, kh = p.head + z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t slots = p.csr.slots, *start = p.csr.start + kh * (slots + 1);
  const int32_t *count = p.csr.count + kh * p.csr.chunks * slots;
  int64_t carry = 0;
  for (int64_t s0 = 0; s0 < slots; s0 += RGK_SELECT_SCAN) {
    const int64_t s = s0 + threadIdx.x;
    int64_t begin = 0, n = 0, pieces = 0;
    if (s < slots) {
      const int64_t from = p.chunk > 0 ? count[(p.chunk - 1) * slots + s] : 0;
      begin = start[s] + from;
      n = p.chunk_end > 0 ? count[(p.chunk_end - 1) * slots + s] - from : 0;
      pieces = (n + p.length - 1) / p.length;
    }
    int64_t sum = pieces;
    for (int d = 1; d < 32; d *= 2) {
      int64_t x = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += x;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    int64_t before = carry + sum - pieces;
    for (int w = 0; w < WARPS; w++) {
      if (w < warp) before += of_warp[w];
      carry += of_warp[w];
    }
    rgk_select_item *item = p.item + z * p.cap + before;
    for (int64_t i = 0; i < pieces; i++) {
      const int64_t left = n - i * p.length;
      item[i].slot = (int32_t)s;
      item[i].first = (uint32_t)(begin + i * p.length);
      item[i].count = (int32_t)(left < p.length ? left : p.length);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) p.items[z] = (int32_t)carry;
}

/* ---- windows and items of backward ---- */

/* As many steps as fit into p.rows rows, again and again; one thread. Dead rows may be cut anywhere. */
__global__ void bounds(const __grid_constant__ rgk_select p) {
  int64_t row = 0;
  p.bound[0] = 0;
  for (int w = 1; w <= p.windows; w++) {
    row += p.rows;
    if (row < p.a.T) {
      const int b = find_seq(p.a.seqs, row);
      if (b < p.a.seqs.n) {
        const int64_t from = seq_start(p.a.seqs, b);
        row = from + (row - from) / p.step * p.step;
      }
    } else {
      row = p.a.T;
    }
    p.bound[w] = row;
  }
}

/* How many entries of block s's list are rows before `row`. */
__device__ __forceinline__ int32_t entries_before(const rgk_csr &c, int kh, int64_t s, int64_t row) {
  const int32_t *count = c.count + kh * c.chunks * c.slots + s; /* of a chunk and all before it */
  const int64_t chunk = row / c.chunk;
  int32_t lo = chunk > 0 ? count[(chunk - 1) * c.slots] : 0;
  if (row == chunk * c.chunk || chunk >= c.chunks) return lo;
  int32_t hi = count[chunk * c.slots];
  const int32_t *rows = c.rows + kh * c.T * c.N + c.start[kh * (c.slots + 1) + s];
  while (lo < hi) {
    const int32_t mid = lo + (hi - lo) / 2;
    if (rows[mid] < row)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

/* A place in bin `bin` for this lane if `wanted`; the lanes of a warp together. */
__device__ __forceinline__ int32_t take_place(int32_t *bin, bool wanted) {
  const unsigned lanes = __ballot_sync(~0u, wanted);
  int32_t first = 0;
  if (threadIdx.x % 32 == 0 && lanes) first = atomicAdd(bin, __popc(lanes));
  return __shfl_sync(~0u, first, 0) + __popc(lanes & ((1u << threadIdx.x % 32) - 1));
}

/* Items are sorted by the 64th of their list they begin in; within it their order is any, but a list's own is
 * kept. A thread has a list; every list's first item is in the first bin. */
__global__ void __launch_bounds__(RGK_SELECT_SCAN, 1) bwd_items(const __grid_constant__ rgk_select p) {
  enum { BINS = 64 };
  __shared__ int32_t of_bin[BINS], extra; /* items, then where the next one goes */
  const int z = blockIdx.x, kh = p.head + z, lane = threadIdx.x % 32;
  const int64_t slots = p.csr.slots, *start = p.csr.start + kh * (slots + 1);
  const int64_t from = p.bound[p.window], to = p.bound[p.window + 1];
  rgk_select_span *span = p.span + z * slots;
  rgk_select_item *item = p.item + z * p.cap;
  if (threadIdx.x < p.parts) p.ticket[z * p.parts + threadIdx.x] = 0;
  if (threadIdx.x < BINS) of_bin[threadIdx.x] = 0;
  if (threadIdx.x == 0) extra = (int32_t)slots;
  for (int64_t i = threadIdx.x; i < p.sums * p.parts; i += RGK_SELECT_SCAN) p.turn[z * p.sums * p.parts + i] = 0;
  __syncthreads();
  for (int64_t s0 = 0; s0 < slots; s0 += RGK_SELECT_SCAN) {
    const int64_t s = s0 + threadIdx.x;
    rgk_select_span x = {0, 0, 0, -1};
    if (s < slots) {
      x.first = entries_before(p.csr, kh, s, from);
      x.count = entries_before(p.csr, kh, s, to) - x.first;
      x.items = (x.count + p.length - 1) / p.length;
      if (p.window == 0 && start[s] == start[s + 1]) x.items = 1;
      if (x.items > RGK_SELECT_CHAIN)
        x.extra = atomicAdd(&extra, (x.items + RGK_SELECT_CHAIN - 1) / RGK_SELECT_CHAIN);
      span[s] = x;
    }
    take_place(of_bin, x.items > 0);
    for (int i = 1; i < x.items; i++) atomicAdd(&of_bin[i * BINS / x.items], 1);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int first = of_bin[2 * lane], second = of_bin[2 * lane + 1];
    int sum = first + second;
    for (int d = 1; d < 32; d *= 2) {
      const int y = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += y;
    }
    if (lane == 31) p.items[z] = sum;
    of_bin[2 * lane] = sum - second - first;
    of_bin[2 * lane + 1] = sum - second;
  }
  __syncthreads();
  for (int64_t s0 = 0; s0 < slots; s0 += RGK_SELECT_SCAN) {
    const int64_t s = s0 + threadIdx.x;
    rgk_select_span x = {0, 0, 0, -1};
    if (s < slots) x = span[s];
    int32_t at = take_place(of_bin, x.items > 0);
    for (int i = 0; i < x.items; i++) {
      if (i > 0) at = atomicAdd(&of_bin[i * BINS / x.items], 1);
      const int32_t left = x.count - i * p.length;
      rgk_select_item y;
      y.slot = (int32_t)s;
      y.first = (uint32_t)(start[s] + x.first + i * p.length);
      y.count = left < p.length ? left : p.length;
      if (x.extra < 0) {
        y.sum = (int32_t)s;
        y.turn = i;
        y.is = (y.first == start[s] ? RGK_SELECT_FIRST : 0) | (y.first + y.count == start[s + 1] ? RGK_SELECT_LAST : 0);
      } else {
        y.sum = x.extra + i / RGK_SELECT_CHAIN;
        y.turn = i % RGK_SELECT_CHAIN;
        y.is = y.turn == 0 ? RGK_SELECT_FIRST : 0;
      }
      if (i + 1 < x.items && (x.extra < 0 || y.turn + 1 < RGK_SELECT_CHAIN)) y.is |= RGK_SELECT_MORE;
      item[at] = y;
    }
  }
}

/* Adds a list's extra sums to its own, four numbers of two keys in a thread; at its end writes d.k and d.v. */
__device__ __forceinline__ void keys_sum(const rgk_select &p, int64_t slot, int part, int z) {
  const int kh = p.head + z;
  const int64_t *start = p.csr.start + kh * (p.csr.slots + 1) + slot;
  const rgk_select_span x = p.span[z * p.csr.slots + slot];
  if (x.extra < 0) return;
  const tile keys = find_tile(p.a.kseqs, slot, p.a.block);
  const int n = (x.items + RGK_SELECT_CHAIN - 1) / RGK_SELECT_CHAIN;
  const bool first = x.first == 0, last = start[0] + x.first + x.count == start[1];
  const int64_t own = (z * p.sums + slot) * p.parts + part, extra = (z * p.sums + x.extra) * p.parts + part;
  for (int c = threadIdx.x; c < 16 * (p.a.D + p.a.E); c += RGK_SELECT_REDUCE) {
    const bool of_v = c >= 16 * p.a.D;
    const int64_t size = 16 * (of_v ? p.a.E : p.a.D);
    const int at = of_v ? c - 16 * p.a.D : c, t = at % 128;
    float4 *sum = (float4 *)(of_v ? p.sum_v : p.sum_k) + at;
    float4 y = first ? make_float4(0, 0, 0, 0) : sum[own * size];
#pragma unroll 8
    for (int i = 0; i < n; i++) {
      const float4 v = sum[(extra + i * p.parts) * size];
      y.x += v.x, y.y += v.y, y.z += v.z, y.w += v.w;
    }
    if (!last) {
      sum[own * size] = y;
      continue;
    }
    const rgk_tensor &to = of_v ? p.a.dv : p.a.dk;
    const bool acc = of_v ? p.a.acc_v : p.a.acc_k;
    const float scale = of_v ? 1 : p.a.scale, v[2][2] = {{y.x, y.y}, {y.z, y.w}};
    for (int i = 0; i < 2 && to.data; i++) {
      const int key = part * RGK_SELECT_KEYS + t / 32 * 16 + t % 32 / 4 + 8 * i;
      if (key >= keys.n) continue;
      const int64_t e = (keys.begin + keys.first + key) * to.row + kh * to.head + at / 128 * 8 + t % 4 * 2;
      put_grad(to.data, to.dtype, e, v[i][0] * scale, acc);
      put_grad(to.data, to.dtype, e + 1, v[i][1] * scale, acc);
    }
  }
}

/* What a thread of a reduction works on: a piece of a row of the window, and the row's entries. */
struct reduced {
  int64_t r, row;
  int z, g, piece;
  int64_t keys; /* the row sees of its sequence */
  bool any;     /* there is such a row */
  const int32_t *idx;
};
__device__ __forceinline__ reduced find_reduced(const rgk_select &p, int64_t block, int pieces, int64_t from,
                                                int64_t to) {
  reduced x;
  const int64_t i = block * (int64_t)RGK_SELECT_REDUCE + threadIdx.x;
  x.piece = (int)(i % pieces);
  x.g = (int)(i / pieces % p.a.G);
  x.r = i / pieces / p.a.G;
  x.row = from + x.r;
  x.z = blockIdx.y;
  x.any = x.row < to;
  x.keys = 0;
  x.idx = nullptr;
  if (!x.any) return x;
  const int b = find_seq(p.a.seqs, x.row);
  if (b < p.a.seqs.n) {
    const int64_t n = seq_start(p.a.kseqs, b + 1) - seq_start(p.a.kseqs, b);
    const int64_t seen = x.row - seq_start(p.a.seqs, b) + (p.a.offset ? p.a.offset[b] : 0) + 1;
    x.keys = seen < n ? seen : n;
    x.idx = (const int32_t *)p.a.idx.data + x.row * p.a.idx.row + (p.head + x.z) * p.a.idx.head;
  }
  return x;
}
/* Calls use(place, real) for every place of the row's part of the partial store, in order: real where an entry
 * counts and the part has a key that the row sees. */
template <class F> __device__ __forceinline__ void each_place(const rgk_select &p, const reduced &x, F use) {
  const int n = x.keys > 0 ? p.a.N * p.parts : 0;
  int64_t before = -1;
#pragma unroll 8
  for (int i = 0; i < n; i++) {
    const int e = p.parts == 1 ? i : i / p.parts, part = p.parts == 1 ? 0 : i - e * p.parts;
    const int64_t v = x.idx[e];
    const bool real = v > before && v * p.a.block + part * RGK_SELECT_KEYS < x.keys;
    if (part == p.parts - 1) before = v > before ? v : before;
    use(i, real);
  }
}

template <class T> __device__ __forceinline__ void unpack8(float (&x)[8], uint4 v) {
  const T *t = (const T *)&v;
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = to_float(t[i]);
}

template <class T> __device__ __forceinline__ void load8(float (&x)[8], const T *from, bool aligned) {
  if (aligned)
    unpack8<T>(x, *(const uint4 *)from);
  else
    for (int i = 0; i < 8; i++) x[i] = to_float(from[i]);
}

template <class T> __global__ void __launch_bounds__(RGK_SELECT_REDUCE) reduce(const __grid_constant__ rgk_select p) {
  const int E = p.a.E, pieces = E / 8;
  const reduced x = find_reduced(p, blockIdx.x, pieces, p.row, p.row + p.rows);
  if (!x.any) return;
  const int head = (p.head + x.z) * p.a.G + x.g;
  const int64_t step = p.a.G, at = (x.z * p.rows + x.r) * p.a.N * p.parts * step + x.g;
  const float *lse = p.part_lse + at;
  const uint4 *o = (const uint4 *)p.part + at * pieces + x.piece;

  float m = -INFINITY, sum = 0;
  each_place(p, x, [&](int i, bool real) { m = fmaxf(m, real ? lse[i * step] : -INFINITY); });
  const float m0 = m == -INFINITY ? 0 : m;
  float y[8] = {};
  each_place(p, x, [&](int i, bool real) {
    if (real) {
      const float w = exp2f(lse[i * step] - m0);
      float v[8];
      unpack8<T>(v, __ldcs(o + i * step * pieces));
      sum += w;
#pragma unroll
      for (int k = 0; k < 8; k++) y[k] = fmaf(w, v[k], y[k]);
    }
  });
  const row_end end =
      finish_row(m, sum, p.a.sinks.data ? load(p.a.sinks.data, p.a.sinks.dtype, head * p.a.sinks.row) : -INFINITY);
  const bool live = x.idx != nullptr;
  T *to = (T *)p.a.o.data + x.row * p.a.o.row + head * p.a.o.head + x.piece / 4 * 32 + x.piece % 4 * 2;
#pragma unroll
  for (int k = 0; k < 8; k += 2) {
    T pair[2] = {from_float<T>(y[k] * end.scale), from_float<T>(y[k + 1] * end.scale)};
    if (p.a.aligned)
      *(uint32_t *)(to + 4 * k) = *(uint32_t *)pair;
    else
      to[4 * k] = pair[0], to[4 * k + 1] = pair[1];
  }
  if (x.piece == 0 && p.a.lse.data)
    ((float *)p.a.lse.data)[x.row * p.a.lse.row + head * p.a.lse.head] = live ? end.lse : 0;
}

/* The sums of keys first. S: type of the partials. */
template <class S>
__global__ void __launch_bounds__(RGK_SELECT_REDUCE) bwd_reduce(const __grid_constant__ rgk_select p) {
  enum { U = 16 / sizeof(S) };
  const int64_t block = blockIdx.x - p.key_blocks;
  if (block < 0) {
    keys_sum(p, blockIdx.x / p.parts, blockIdx.x % p.parts, blockIdx.y);
    return;
  }
  const int pieces = p.a.D / U;
  const reduced x = find_reduced(p, block, pieces, p.bound[p.window], p.bound[p.window + 1]);
  if (!x.any) return;
  const int head = (p.head + x.z) * p.a.G + x.g;
  const int64_t step = p.a.G, at = (x.z * p.rows + x.r) * p.a.N * p.parts * step + x.g;
  const uint4 *from = (const uint4 *)p.part + at * pieces + x.piece;
  float y[U] = {};
  each_place(p, x, [&](int i, bool real) {
    if (real) {
      const uint4 v = __ldcs(from + i * step * pieces);
      const S *t = (const S *)&v;
#pragma unroll
      for (int k = 0; k < U; k++) y[k] += to_float(t[k]);
    }
  });
  const int64_t to = x.row * p.a.dq.row + head * p.a.dq.head + x.piece / 4 * 4 * U + x.piece % 4 * 2;
#pragma unroll
  for (int k = 0; k < U; k++)
    put_grad(p.a.dq.data, p.a.dq.dtype, to + k / 2 * 8 + k % 2, y[k] * p.a.scale, p.a.acc_q);
}

__device__ __forceinline__ void put_stat(const rgk_select &p, int64_t i, int64_t row, int head, float sum) {
  if (p.a.d_lse.data) sum -= ((const float *)p.a.d_lse.data)[row * p.a.d_lse.row + head * p.a.d_lse.head];
  const float lse = ((const float *)p.a.lse.data)[row * p.a.lse.row + head * p.a.lse.head];
  ((float2 *)p.stat)[i] = make_float2(lse == -INFINITY ? INFINITY : lse * LOG2E, sum);
}

/* RGK_SELECT_LANES lanes a row. */
template <class T> __global__ void __launch_bounds__(RGK_SELECT_REDUCE) stat(const __grid_constant__ rgk_select p) {
  enum { LANES = RGK_SELECT_LANES };
  const int64_t i = (blockIdx.x * (int64_t)RGK_SELECT_REDUCE + threadIdx.x) / LANES, row = i / p.a.H;
  const int lane = threadIdx.x % LANES, head = (int)(i - row * p.a.H);
  const bool live = row < p.a.T && row < live_rows(p.a.seqs);
  const T *o = (const T *)p.a.o.data + row * p.a.o.row + head * p.a.o.head;
  const T *d_o = (const T *)p.a.d_o.data + row * p.a.d_o.row + head * p.a.d_o.head;
  float sum = 0;
  for (int c = lane; live && c < p.a.E / 8; c += LANES) {
    float x[8], y[8];
    load8<T>(x, o + 8 * c, p.a.aligned);
    load8<T>(y, d_o + 8 * c, p.a.aligned);
#pragma unroll
    for (int k = 0; k < 8; k++) sum = fmaf(x[k], y[k], sum);
  }
  for (int d = LANES / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (live && lane == 0) put_stat(p, i, row, head, sum);
}

/* One thread a row, its sum is given. */
__global__ void __launch_bounds__(RGK_SELECT_REDUCE) stat_given(const __grid_constant__ rgk_select p) {
  const int64_t i = blockIdx.x * (int64_t)RGK_SELECT_REDUCE + threadIdx.x, row = i / p.a.H;
  const int head = (int)(i - row * p.a.H);
  if (row >= p.a.T || row >= live_rows(p.a.seqs)) return;
  put_stat(p, i, row, head, ((const float *)p.a.delta.data)[row * p.a.delta.row + head * p.a.delta.head]);
}

/* One block a head: minus the sink's probability times delta, summed over all rows. */
__global__ void __launch_bounds__(RGK_SELECT_SCAN) sinks(const __grid_constant__ rgk_select p) {
  __shared__ float of_warp[RGK_SELECT_SCAN / 32];
  const int head = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float sink = load(p.a.sinks.data, p.a.sinks.dtype, head) * LOG2E;
  const int64_t rows = live_rows(p.a.seqs);
  float sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += RGK_SELECT_SCAN) {
    const float2 x = ((const float2 *)p.stat)[row * p.a.H + head];
    sum -= exp2f(sink - x.x) * x.y;
  }
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < RGK_SELECT_SCAN / 32; w++) sum += of_warp[w];
  put_grad(p.a.d_sinks.data, p.a.d_sinks.dtype, head, sum, p.a.acc_sinks);
}

} // namespace

const void *rgk_select_sinks(void) { return (const void *)sinks; }
const void *rgk_select_items(void) { return (const void *)items; }
const void *rgk_select_bounds(void) { return (const void *)bounds; }
const void *rgk_select_bwd_items(void) { return (const void *)bwd_items; }
const void *rgk_select_reduce(rg_dtype t) {
  return t == RG_F16 ? (const void *)reduce<__half> : (const void *)reduce<__nv_bfloat16>;
}
const void *rgk_select_bwd_reduce(rg_dtype t) {
  return t == RG_F16 ? (const void *)bwd_reduce<float> : (const void *)bwd_reduce<__nv_bfloat16>;
}
const void *rgk_select_stat_given(void) { return (const void *)stat_given; }
const void *rgk_select_stat(rg_dtype t) {
  return t == RG_F16 ? (const void *)stat<__half> : (const void *)stat<__nv_bfloat16>;
}
