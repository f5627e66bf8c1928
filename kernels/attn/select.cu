/* kernels/attn/select.cu: around the products of select.h: cutting lists into items, merging
   forward's partials, and the row statistics that backward needs.

   A partial row lies in the order of the accumulators of a 64-row product, 16 bytes of one lane
   after another: with U elements in 16 bytes, piece i of lane c of four holds columns 8 (i U/2 + j)
   + 2c and + 1 for j = 0 … U/2 - 1, and stands at piece 4 i + c. Backward's, where groups are whole
   eights of heads: a lane's piece of head 8 h + r stands at 32 i + 4 r + c of the eight heads'.
 */
#include "attn.cuh"
#include "select.cuh"

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

__device__ __forceinline__ int64_t step_of(const rgk_select &p, int64_t length) {
  const int64_t quarter = ((length + 3) / 4 + 63) / 64 * 64;
  return quarter < 64 ? 64 : quarter < p.longest ? quarter : p.longest;
}

/* As many steps as fit into p.rows rows, again and again; one thread. Dead rows may be cut
 * anywhere. */
__device__ void put_bounds(const rgk_select &p) {
  int64_t row = 0;
  p.bound[0] = 0;
  for (int w = 1; w <= p.bounds; w++) {
    row += p.rows;
    if (row < p.a.T) {
      const int b = find_seq(p.a.seqs, row);
      if (b < p.a.seqs.n) {
        const int64_t from = seq_start(p.a.seqs, b),
                      step = step_of(p, seq_start(p.a.seqs, b + 1) - from);
        row = from + (row - from) / step * step;
      }
    } else {
      row = p.a.T;
    }
    p.bound[w] = row;
  }
}

/* How many entries of block s's list are rows before `row`. */
__device__ __forceinline__ int32_t entries_before(const rgk_csr &c, int kh, int64_t s,
                                                  int64_t row) {
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

/* Calls use(entry, count) for the items that block s's list has among rows [from, to). One of an
 * empty list clears d.k and d.v. */
template <class F>
__device__ __forceinline__ void each_item(const rgk_select &p, int kh, int64_t s, int64_t from,
                                          int64_t to, F use) {
  const int64_t *start = p.csr.start + kh * (p.csr.slots + 1) + s;
  if (start[0] == start[1]) {
    if (from == 0) use(0, 0);
    return;
  }
  const int b = find_tile(p.a.kseqs, s, p.a.block).b;
  const int64_t begin = seq_start(p.a.seqs, b), end = seq_start(p.a.seqs, b + 1),
                step = step_of(p, end - begin);
  if (to > end) to = end;
  if (from < begin) from = begin;
  if (from >= to) return;
  const int32_t length = max((int32_t)min((int64_t)p.length, step / 16), p.least);
  int32_t e = entries_before(p.csr, kh, s, from);
  while (from < to) {
    from = begin + ((from - begin) / step + 1) * step;
    const int32_t upto = entries_before(p.csr, kh, s, from < to ? from : to);
    for (; e < upto; e += length) use(e, min(upto - e, length));
    e = upto;
  }
}

/* A window's items, sorted by the 64th of its rows they begin in; within it their order is any, but
 * a list's own is kept. A thread has a list. */
__global__ void __launch_bounds__(RGK_SELECT_SCAN, 1)
    bwd_items(const __grid_constant__ rgk_select p) {
  enum { BINS = 64 };
  __shared__ int32_t of_bin[BINS]; /* items, then where the next one goes */
  const int w = blockIdx.x, z = blockIdx.y, kh = p.head + z, lane = threadIdx.x % 32,
            which = z * p.windows + w;
  const int64_t slots = p.csr.slots, from = p.bound[p.window + w], to = p.bound[p.window + w + 1];
  rgk_select_item *item = p.item + which * p.cap;
  if (threadIdx.x == 0) p.done[which] = p.merged[which] = 0;
  if (which == 0 && threadIdx.x == 0) p.begun[0] = p.merged[p.heads * p.windows] = 0;
  if (which == 0 && p.window == 0)
    for (int64_t i = threadIdx.x; i < slots * p.parts; i += RGK_SELECT_SCAN) p.turn[i] = 0;
  if (threadIdx.x < BINS) of_bin[threadIdx.x] = 0;
  __syncthreads();
  auto bin = [&](int64_t s, int32_t e, int32_t n) {
    const int64_t base = kh * p.a.T * p.a.N + p.csr.start[kh * (slots + 1) + s];
    return n > 0 ? (int)((p.csr.rows[base + e] - from) * BINS / (to - from)) : 0;
  };
  for (int64_t s = threadIdx.x; s < slots; s += RGK_SELECT_SCAN)
    each_item(p, kh, s, from, to,
              [&](int32_t e, int32_t n) { atomicAdd(&of_bin[bin(s, e, n)], 1); });
  __syncthreads();
  if (threadIdx.x < 32) {
    const int first = of_bin[2 * lane], second = of_bin[2 * lane + 1];
    int sum = first + second;
    for (int d = 1; d < 32; d *= 2) {
      const int y = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += y;
    }
    if (lane == 31) p.items[which] = sum;
    of_bin[2 * lane] = sum - second - first;
    of_bin[2 * lane + 1] = sum - second;
  }
  __syncthreads();
  for (int64_t s = threadIdx.x; s < slots; s += RGK_SELECT_SCAN) {
    const int64_t *start = p.csr.start + kh * (slots + 1) + s;
    int64_t earlier = 0;
    for (int h = p.head; h < kh; h++) {
      const int64_t *of = p.csr.start + h * (slots + 1) + s;
      earlier += of[1] - of[0];
    }
    each_item(p, kh, s, from, to, [&](int32_t e, int32_t n) {
      rgk_select_item y;
      y.slot = (int32_t)s;
      y.first = (uint32_t)(start[0] + e);
      y.count = n;
      y.before = (int32_t)(earlier + e);
      y.is = (e == 0 ? RGK_SELECT_FIRST : 0) | (start[0] + e + n == start[1] ? RGK_SELECT_LAST : 0);
      item[atomicAdd(&of_bin[bin(s, e, n)], 1)] = y;
    });
  }
}

template <class T> __device__ __forceinline__ void unpack8(float (&x)[8], uint4 v) {
  const T *t = (const T *)&v;
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = to_float(t[i]);
}

template <class T>
__device__ __forceinline__ void load8(float (&x)[8], const T *from, bool aligned) {
  if (aligned)
    unpack8<T>(x, *(const uint4 *)from);
  else
    for (int i = 0; i < 8; i++) x[i] = to_float(from[i]);
}

/* Calls use(place, real) for every place of the row's part of the partial store, in order: real
 * where an entry counts and the part has a key that the row sees. */
template <class F>
__device__ __forceinline__ void each_place(const rgk_select &p, const merged_row &x, F use) {
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

template <class T>
__global__ void __launch_bounds__(RGK_SELECT_REDUCE) reduce(const __grid_constant__ rgk_select p) {
  const int E = p.a.E, pieces = E / 8, z = blockIdx.y;
  const int64_t i = blockIdx.x * (int64_t)RGK_SELECT_REDUCE + threadIdx.x, r = i / pieces / p.a.G,
                row = p.row + r;
  const int piece = (int)(i % pieces), g = (int)(i / pieces % p.a.G),
            head = (p.head + z) * p.a.G + g;
  if (r >= p.rows) return;
  const merged_row x = find_merged(p, row, p.head + z);
  const int64_t step = p.a.G, at = (z * p.rows + r) * p.a.N * p.parts * step + g;
  const float *lse = p.part_lse + at;
  const uint4 *o = (const uint4 *)p.part + at * pieces + piece;

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
  const row_end end = finish_row(
      m, sum,
      p.a.sinks.data ? load(p.a.sinks.data, p.a.sinks.dtype, head * p.a.sinks.row) : -INFINITY);
  T *to = (T *)p.a.o.data + row * p.a.o.row + head * p.a.o.head + piece / 4 * 32 + piece % 4 * 2;
#pragma unroll
  for (int k = 0; k < 8; k += 2) {
    T pair[2] = {from_float<T>(y[k] * end.scale), from_float<T>(y[k + 1] * end.scale)};
    if (p.a.aligned)
      *(uint32_t *)(to + 4 * k) = *(uint32_t *)pair;
    else
      to[4 * k] = pair[0], to[4 * k + 1] = pair[1];
  }
  if (piece == 0 && p.a.lse.data)
    ((float *)p.a.lse.data)[row * p.a.lse.row + head * p.a.lse.head] = x.live ? end.lse : 0;
}

__device__ __forceinline__ void put_stat(const rgk_select &p, int64_t i, int64_t row, int head,
                                         float sum) {
  if (p.a.d_lse.data)
    sum -= ((const float *)p.a.d_lse.data)[row * p.a.d_lse.row + head * p.a.d_lse.head];
  const float lse = ((const float *)p.a.lse.data)[row * p.a.lse.row + head * p.a.lse.head];
  ((float2 *)p.stat)[i] = make_float2(lse == -INFINITY ? INFINITY : lse * LOG2E, sum);
}

/* Block 0 finds the windows' bounds beside what the others do: one thread, from one bound to the
 * next. The thread's number among those of the others, or -1. */
__device__ __forceinline__ int64_t after_bounds(const rgk_select &p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) put_bounds(p);
  return blockIdx.x == 0 ? -1 : (blockIdx.x - 1) * (int64_t)RGK_SELECT_REDUCE + threadIdx.x;
}

/* RGK_SELECT_LANES lanes a row. */
template <class T>
__global__ void __launch_bounds__(RGK_SELECT_REDUCE) stat(const __grid_constant__ rgk_select p) {
  enum { LANES = RGK_SELECT_LANES };
  const int64_t thread = after_bounds(p), i = thread / LANES, row = i / p.a.H;
  if (thread < 0) return;
  const int lane = threadIdx.x % LANES, head = (int)(i - row * p.a.H);
  const bool live = row < p.a.T && row < live_rows(p.a.seqs);
  const T *o = (const T *)p.a.o.data + row * p.a.o.row + head * p.a.o.head;
  const T *d_o = (const T *)p.a.d_o.data + row * p.a.d_o.row + head * p.a.d_o.head;
  float sum = 0;
  for (int c = lane; live && c < p.a.E / 8; c += LANES) {
    float x[8], y[8];
    load8<T>(x, o + 8 * c, p.a.aligned);
    load8<T>(y, d_o + 8 * c, p.a.aligned);
    float part = 0; /* on its own, as combine's backward sums it */
#pragma unroll
    for (int k = 0; k < 8; k++) part = fmaf(x[k], y[k], part);
    sum += part;
  }
  for (int d = LANES / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (live && lane == 0) put_stat(p, i, row, head, sum);
}

/* One thread a row, its sum is given. */
__global__ void __launch_bounds__(RGK_SELECT_REDUCE)
    stat_given(const __grid_constant__ rgk_select p) {
  const int64_t i = after_bounds(p), row = i / p.a.H;
  const int head = (int)(i - row * p.a.H);
  if (i < 0 || row >= p.a.T || row >= live_rows(p.a.seqs)) return;
  put_stat(p, i, row, head,
           ((const float *)p.a.delta.data)[row * p.a.delta.row + head * p.a.delta.head]);
}

/* One block a head: minus the sink's probability times delta, summed over all rows. */
__global__ void __launch_bounds__(RGK_SELECT_SCAN) sinks(const __grid_constant__ rgk_select p) {
  __shared__ double of_warp[RGK_SELECT_SCAN / 32];
  const int head = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float sink = load(p.a.sinks.data, p.a.sinks.dtype, head) * LOG2E;
  const int64_t rows = live_rows(p.a.seqs);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += RGK_SELECT_SCAN) {
    const float2 x = ((const float2 *)p.stat)[row * p.a.H + head];
    sum -= (double)(exp2f(sink - x.x) * x.y);
  }
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < RGK_SELECT_SCAN / 32; w++) sum += of_warp[w];
  put_sink(p.a, head, sum);
}

} // namespace

const void *rgk_select_sinks(void) {
  return (const void *)sinks;
}
const void *rgk_select_items(void) {
  return (const void *)items;
}
const void *rgk_select_bwd_items(void) {
  return (const void *)bwd_items;
}
const void *rgk_select_reduce(rg_dtype t) {
  return t == RG_F16 ? (const void *)reduce<__half> : (const void *)reduce<__nv_bfloat16>;
}
const void *rgk_select_stat_given(void) {
  return (const void *)stat_given;
}
const void *rgk_select_stat(rg_dtype t) {
  return t == RG_F16 ? (const void *)stat<__half> : (const void *)stat<__nv_bfloat16>;
}
