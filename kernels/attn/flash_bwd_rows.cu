/* kernels/attn/flash_bwd_rows.cu: what surrounds flash_bwd's main kernel: delta = rowsum(o d_o) -
   d_lse and lse in base 2, laid out by tiles; dQ's rounding; d_sinks = - sum of exp(sink - lse)
   delta; zeros for dead rows.
 */
#include "../device/element.cuh"
#include "../device/ptx.cuh"
#include "../device/wgmma.cuh"
#include "attn.cuh"
#include "flash_bwd.cuh"

using namespace rgk;

namespace {

constexpr int ROWS = RGK_FLASH_BWD_ROWS, HEADS = RGK_FLASH_BWD_HEADS;

/* ---- prepare: block 0 counts items, the next `zero_blocks` clear, the others do a tile of queries
 * each */

__device__ void count_items(const rgk_flash_bwd &p) {
  __shared__ int items[256], tiles[256];
  __shared__ int before[2];
  const int t = threadIdx.x, n = p.a.seqs.n;
  if (t < 2) before[t] = 0;
  for (int64_t i = t; i < p.passes; i += 256) p.ticket[i] = 0;
  if (t == 0) p.items[0] = p.kv_before[0] = 0;
  for (int b0 = 0; b0 < n; b0 += 256) {
    int x = 0, y = 0;
    if (b0 + t < n) {
      const bwd_seq s = bwd_sequence(p, b0 + t);
      x = bwd_items(p.a, s);
      y = s.chunks > 1 ? s.tiles : 0;
    }
    __syncthreads();
    items[t] = x, tiles[t] = y;
    __syncthreads();
    for (int d = 1; d < 256; d *= 2) {
      const int u = t >= d ? items[t - d] : 0, v = t >= d ? tiles[t - d] : 0;
      __syncthreads();
      items[t] += u, tiles[t] += v;
      __syncthreads();
    }
    if (b0 + t < n)
      p.items[b0 + t + 1] = before[0] + items[t], p.kv_before[b0 + t + 1] = before[1] + tiles[t];
    __syncthreads();
    if (t == 255) before[0] += items[t], before[1] += tiles[t];
  }
}

/* Is row r a key of some sequence? Those before the first one (in a halo: context parallelism) are
 * of none, as those behind the last. */
__device__ bool key_row_live(const rgk_attn &a, int64_t r) {
  if (a.mode != RGK_CMP) return r >= seq_start(a.kseqs, 0) && r < seq_start(a.kseqs, a.kseqs.n);
  int lo = 0, hi = a.kseqs.n - 1; /* the last b that starts at or before r */
  while (lo < hi) {
    int mid = (lo + hi + 1) >> 1;
    if (seq_start(a.kseqs, mid) / a.stride <= r)
      lo = mid;
    else
      hi = mid - 1;
  }
  if (hi < 0) return false;
  const int64_t begin = seq_start(a.kseqs, lo), n = seq_start(a.kseqs, lo + 1) - begin;
  const int64_t at = r - begin / a.stride;
  return at >= 0 && at < rgk_blocks_in(n, a.kernel, a.stride);
}

__device__ void zero_row(const rgk_tensor &x, int64_t r, int heads, int width) {
  if (!x.data) return;
  for (int i = threadIdx.x % 32; i < heads * width; i += 32)
    store(x.data, x.dtype, r * x.row + i / width * x.head + i % width, 0);
}

__device__ void clear(const rgk_flash_bwd &p, int64_t block) {
  const int64_t i = block * 256 + threadIdx.x, step = p.zero_blocks * 256;
  for (int64_t j = i; j < p.a.KH * p.kv_tiles * 2; j += step) p.kv_done[j] = 0;
  for (int64_t r = i / 32; r < p.a.S; r += step / 32) {
    if (key_row_live(p.a, r)) continue;
    if (!p.a.acc_k) zero_row(p.a.dk, r, p.a.KH, p.a.D);
    if (!p.a.acc_v) zero_row(p.a.dv, r, p.a.KH, p.a.E);
  }
}

/* Sum of 8 products of 16-byte chunks. */
template <class T> __device__ __forceinline__ float dot8(const T *x, const T *y) {
  const uint4 u = *(const uint4 *)x, v = *(const uint4 *)y;
  const T *a = (const T *)&u, *b = (const T *)&v;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) sum = fmaf(to_float(a[i]), to_float(b[i]), sum);
  return sum;
}

/* Row r of a tile of n: its lse, which is returned, and what is left of `sum` without d_lse. */
__device__ __forceinline__ float put_row(const rgk_attn &a, float *lse2, float *delta, int r, int n,
                                         int64_t row, int h, float sum) {
  float lse = -INFINITY;
  if (r < n) {
    lse = ((const float *)a.lse.data)[row * a.lse.row + h * a.lse.head];
    if (a.d_lse.data) sum -= ((const float *)a.d_lse.data)[row * a.d_lse.row + h * a.d_lse.head];
  }
  const bool none = lse == -INFINITY; /* sees nothing: P becomes exp2(-inf) */
  lse2[r] = none ? INFINITY : lse * LOG2E;
  delta[r] = none ? 0 : sum;
  return lse;
}

/* A warp a head; half a warp a row, or with delta given a thread. */
template <class T> __device__ void delta(const rgk_flash_bwd &p, int64_t slot, int group) {
  const rgk_attn &a = p.a;
  const int lane = threadIdx.x % 32, h = group * HEADS + threadIdx.x / 32;
  if (h >= a.H) return;
  const tile x = find_tile(a.seqs, slot, ROWS);
  const bool live = x.b < a.seqs.n && x.n > 0;
  float *lse2 = p.rows + (slot * a.H + h) * 128, *out = lse2 + 64;
  double sink_sum = 0;
  const float sink = p.sink ? load(a.sinks.data, a.sinks.dtype, h * a.sinks.row) : 0;
  if (lane == 0) p.dq_done[slot * a.H + h] = 0;
  const int64_t row = x.begin + x.first;
  const float *given = (const float *)a.delta.data + row * a.delta.row + h * a.delta.head;
  if (a.delta.data && !p.sink) {
    for (int r = lane; r < ROWS && live; r += 32)
      put_row(a, lse2, out, r, x.n, row + r, h, r < x.n ? given[r * a.delta.row] : 0);
    return;
  }
#pragma unroll 4
  for (int r = lane / 16; r < ROWS && live; r += 2) {
    float sum = 0;
    if (r < x.n && !a.delta.data) {
      const T *o = (const T *)a.o.data + (row + r) * a.o.row + h * a.o.head,
              *d_o = (const T *)a.d_o.data + (row + r) * a.d_o.row + h * a.d_o.head;
      for (int c = lane % 16 * 8; c < a.E; c += 128) sum += dot8(o + c, d_o + c);
    }
#pragma unroll
    for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane % 16 == 0) {
      if (a.delta.data && r < x.n) sum = given[r * a.delta.row];
      const float lse = put_row(a, lse2, out, r, x.n, row + r, h, sum);
      if (p.sink && lse != -INFINITY) sink_sum += (double)(expf(sink - lse) * out[r]);
    }
  }
  sink_sum += __shfl_down_sync(~0u, sink_sum, 16);
  if (p.sink && lane == 0) p.sink[slot * a.H + h] = sink_sum;
}

template <class T>
__global__ void __launch_bounds__(256) prepare(const __grid_constant__ rgk_flash_bwd p) {
  const int64_t block = blockIdx.x;
  if (block == 0) {
    count_items(p);
  } else if (block <= p.zero_blocks) {
    clear(p, block - 1);
  } else {
    const int groups = (p.a.H + HEADS - 1) / HEADS;
    delta<T>(p, (block - 1 - p.zero_blocks) / groups, (int)((block - 1 - p.zero_blocks) % groups));
  }
}

/* ---- dQ: a block a tile and HEADS heads ---- */

/* Some rows of a head of a tile: four lanes have 16 columns, a lane 16 bytes of sums, and memory is
 * read and written in whole sectors. */
struct dq_rows {
  tile x;
  int head, from, upto; /* head of the pass */
  bool seen;            /* by the main kernel: is any of the tile's keys seen? */
};

/* A warp's lanes side by side in a row, in as many rows as they fill. ADD: to dq_sum. */
template <class T, bool ADD>
__device__ __forceinline__ void round_rows(const rgk_flash_bwd &p, const dq_rows &rows) {
  enum { MOST = 4 }; /* loads under way */
  const rgk_attn &a = p.a;
  const rgk_tensor &sums = a.dq_sum;
  const int lane = threadIdx.x % 32, odd = lane & 1, of_row = a.D / 4, side = min(of_row, 32),
            step = 32 / side, head = p.kh0 * a.G + rows.head;
  const float scale = rows.seen ? a.scale : 0;
  for (int first = 0; first < of_row; first += 32) {
    const int unit = first + lane % side, group = unit / 4 % 4 * 16,
              column = unit / 4 * 16 + odd * 8 + (unit & 2) * 2,
              upto = lane < step * side && unit < of_row ? rows.upto : 0;
    int r = rows.from + lane / side;
    const int64_t row = rows.x.begin + rows.x.first + r,
                  panel = (int64_t)rows.head * (p.width / 64) + unit / 16;
    const float *from = p.dq + (panel * a.T + row) * 64 + unit % 4 * 4,
                *sum_at = (const float *)sums.data + row * sums.row + head * sums.head + column;
    T *to = (T *)a.dq.data + row * a.dq.row + head * a.dq.head + column;
    /* the same number of turns for all lanes */
    for (int turn = rows.from; turn < rows.upto; turn += step * MOST) {
      float4 v[MOST], sum[MOST];
#pragma unroll
      for (int i = 0; i < MOST; i++) {
        const int at = r + i * step;
        v[i] = make_float4(0, 0, 0, 0);
        if (at < upto && rows.seen)
          v[i] = __ldcs((const float4 *)(from + i * step * 64 + (group ^ (at & 1) * 16)));
        if (ADD && at < upto) sum[i] = *(const float4 *)(sum_at + i * step * sums.row);
      }
#pragma unroll
      for (int i = 0; i < MOST; i++) {
        /* A lane has columns 2j, 2j + 1, 2j + 8, 2j + 9; of two neighbours one takes the lower, one
         * the upper four. */
        float2 mine = make_float2(scale * v[i].x, scale * v[i].y),
               other = make_float2(scale * v[i].z, scale * v[i].w);
        if (odd) {
          const float2 t = mine;
          mine = other, other = t;
        }
        other.x = __shfl_xor_sync(~0u, other.x, 1);
        other.y = __shfl_xor_sync(~0u, other.y, 1);
        float4 y = odd ? make_float4(other.x, other.y, mine.x, mine.y)
                       : make_float4(mine.x, mine.y, other.x, other.y);
        if (r + i * step >= upto) continue;
        if (ADD) /* y is one term: its product is never fused with the sum */
          y = make_float4(__fadd_rn(sum[i].x, y.x), __fadd_rn(sum[i].y, y.y),
                          __fadd_rn(sum[i].z, y.z), __fadd_rn(sum[i].w, y.w));
        if constexpr (sizeof(T) == 4)
          *(float4 *)(to + i * step * a.dq.row) = y;
        else
          *(uint2 *)(to + i * step * a.dq.row) = make_uint2(pack2<T>(y.x, y.y), pack2<T>(y.z, y.w));
      }
      r += step * MOST;
      from += step * MOST * 64, sum_at += step * MOST * sums.row, to += step * MOST * a.dq.row;
    }
  }
}

__global__ void __launch_bounds__(256, 4) round_dq(const __grid_constant__ rgk_flash_bwd p) {
  enum { WARPS = 8 };
  const rgk_attn &a = p.a;
  const int heads = p.kh_n * a.G, groups = (heads + HEADS - 1) / HEADS;
  const int64_t slot = blockIdx.x / groups;
  const int h0 = (int)(blockIdx.x % groups) * HEADS, hn = min(heads - h0, HEADS);
  dq_rows rows = {find_tile(a.seqs, slot, ROWS)};
  const tile &x = rows.x;
  if (x.n == 0) return;
  if (x.b < a.seqs.n) {
    const bwd_seq s = bwd_sequence(p, x.b);
    const int64_t keys = bwd_seen(a, s, x.first + x.n - 1);
    rows.seen = keys > 0;
    if (bwd_windowed(a)) {
      const int64_t end = min((keys + s.tile - 1) / s.tile * s.tile, s.keys);
      rows.seen = rows.seen && end - 1 + a.window_left - s.offset >= x.first;
    }
  } else if (a.acc_q) {
    return; /* dead; to what sees nothing 0 is added like any term: -0 becomes 0 */
  }
  const int pieces = (WARPS + hn - 1) / hn, each = (x.n + pieces - 1) / pieces;
  /* the same for a warp's threads, and known to be */
  for (int i = __shfl_sync(~0u, threadIdx.x / 32, 0); i < hn * pieces; i += WARPS) {
    rows.head = h0 + i % hn;
    rows.from = min(i / hn * each, x.n);
    rows.upto = min(rows.from + each, x.n);
    const bool add = a.dq_sum.data && x.b < a.seqs.n;
    if (a.dq.dtype == RG_F32)
      add ? round_rows<float, true>(p, rows) : round_rows<float, false>(p, rows);
    else if (a.dq.dtype == RG_F16)
      add ? round_rows<__half, true>(p, rows) : round_rows<__half, false>(p, rows);
    else
      add ? round_rows<__nv_bfloat16, true>(p, rows) : round_rows<__nv_bfloat16, false>(p, rows);
  }
}

/* ---- dK and dV of sequences of several chunks: a block an eighth of a tile ---- */

/* Where quad j of thread t of warpgroup wg stands in a tile of dK (of `width` columns) or dV: row
 * `key` and 8 rows on, columns c, c + 1. */
__device__ void place(int keys, int width, int wg, int j, int t, int *key, int *c) {
  *key = 16 * (t / 32) + t % 32 / 4 + (keys == 128 ? 64 * wg : 0);
  const int panels = width / 64, whole = panels / 2;
  int column = 8 * j;
  if (keys == 64) { /* halves of the columns: see flash_bwd_wide_sm90.cu */
    column += j < 8 * whole ? (wg ? panels - whole : 0) * 64 : wg * 32;
  }
  *c = column + 2 * (t % 4);
}

__device__ void put_pair(const rgk_tensor &x, int64_t at, float a, float b, bool add) {
  put_grad(x.data, x.dtype, at, a, add);
  put_grad(x.data, x.dtype, at + 1, b, add);
}

__global__ void __launch_bounds__(256) sum_kv(const __grid_constant__ rgk_flash_bwd p) {
  const rgk_attn &a = p.a;
  const int eighth = blockIdx.x % 8, kh = blockIdx.y, n = a.seqs.n;
  const int64_t z = blockIdx.x / 8;
  if (z >= p.kv_before[n]) return;
  int lo = 0, hi = n - 1; /* the last b with kv_before[b] <= z */
  while (lo < hi) {
    int mid = (lo + hi + 1) >> 1;
    if (p.kv_before[mid] <= z)
      lo = mid;
    else
      hi = mid - 1;
  }
  const bwd_seq s = bwd_sequence(p, lo);
  const int tile = (int)(z - p.kv_before[lo]),
            keys = (int)min(s.keys - (int64_t)tile * s.tile, (int64_t)s.tile);
  int64_t first, last;
  if (!bwd_seen_by(a, s, tile, &first, &last)) return;
  const int turns = (int)(last / s.chunk - first / s.chunk) + 1;
  if (turns == 1) return; /* the main kernel wrote it */
  const int half = p.keys * (p.width + p.width_v) / 8, k_quads = p.keys * p.width / 8 / 128;
  const float4 *part = (const float4 *)p.kv + (kh * p.kv_tiles + z) * p.parts * 2 * half;
  const int64_t row = s.k_begin + (int64_t)tile * s.tile;
  for (int i = eighth * half / 4 + threadIdx.x; i < (eighth + 1) * half / 4; i += 256) {
    float4 sum = part[i];
#pragma unroll 4
    for (int turn = 1; turn < turns; turn++) {
      const float4 v = part[(int64_t)turn * 2 * half + i];
      sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    const int j = i % half / 128;
    const bool is_v = j >= k_quads;
    const rgk_tensor &y = is_v ? a.dv : a.dk;
    int key, c;
    place(p.keys, is_v ? p.width_v : p.width, i / half, is_v ? j - k_quads : j, i % 128, &key, &c);
    if (!y.data || c >= (is_v ? a.E : a.D)) continue;
    const float scale = is_v ? 1 : a.scale;
    const bool add = is_v ? a.acc_v : a.acc_k;
    const int64_t at = (row + key) * y.row + kh * y.head + c;
    if (key < keys) put_pair(y, at, scale * sum.x, scale * sum.y, add);
    if (key + 8 < keys) put_pair(y, at + 8 * y.row, scale * sum.z, scale * sum.w, add);
  }
}

/* ---- d_sinks: a block a head ---- */

__global__ void __launch_bounds__(256) sum_sinks(const __grid_constant__ rgk_flash_bwd p) {
  __shared__ double part[256];
  const int h = blockIdx.x, t = threadIdx.x;
  const int64_t slots = p.slots;
  double sum = 0;
  for (int64_t i = t; i < slots; i += 256) sum += p.sink[i * p.a.H + h];
  part[t] = sum;
  __syncthreads();
  for (int d = 128; d > 0; d /= 2) {
    if (t < d) part[t] += part[t + d];
    __syncthreads();
  }
  if (t == 0) put_sink(p.a, h, -part[0]);
}

} // namespace

const void *rgk_flash_bwd_prepare(rg_dtype type) {
  return type == RG_F16 ? (const void *)prepare<__half> : (const void *)prepare<__nv_bfloat16>;
}
const void *rgk_flash_bwd_dq(void) {
  return (const void *)round_dq;
}
const void *rgk_flash_bwd_kv(void) {
  return (const void *)sum_kv;
}
const void *rgk_flash_bwd_sinks(void) {
  return (const void *)sum_sinks;
}
