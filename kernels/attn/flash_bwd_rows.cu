/* kernels/attn/flash_bwd_rows.cu: what surrounds flash_bwd's main kernel: delta = rowsum(o d_o) -
   d_lse and lse in base 2, laid out by tiles; dQ's rounding; d_sinks = - sum of exp(sink - lse)
   delta; zeros for dead rows.
 */
#include "../device/element.cuh"
#include "../device/ptx.cuh"
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

/* ---- dQ: a block a tile and HEADS heads, a thread 16 columns of a row at a time ---- */

__global__ void __launch_bounds__(256) round_dq(const __grid_constant__ rgk_flash_bwd p) {
  const rgk_attn &a = p.a;
  const int heads = p.kh_n * a.G, groups = (heads + HEADS - 1) / HEADS;
  const int64_t slot = blockIdx.x / groups;
  const int h0 = (int)(blockIdx.x % groups) * HEADS, hn = min(heads - h0, HEADS);
  const tile x = find_tile(a.seqs, slot, ROWS);
  if (x.n == 0) return;
  bool seen = false; /* by the main kernel: is any of its keys seen? */
  if (x.b < a.seqs.n) {
    const bwd_seq s = bwd_sequence(p, x.b);
    const int64_t keys = bwd_seen(a, s, x.first + x.n - 1);
    seen = keys > 0;
    if (bwd_windowed(a)) {
      const int64_t end = min((keys + s.tile - 1) / s.tile * s.tile, s.keys);
      seen = seen && end - 1 + a.window_left - s.offset >= x.first;
    }
  }
  const int parts = a.D / 16;
  for (int i = threadIdx.x; i < x.n * hn * parts; i += 256) {
    const int part = i % parts, h = h0 + i / parts % hn, r = i / parts / hn;
    const int64_t row = x.begin + x.first + r,
                  at = row * a.dq.row + (int64_t)(p.kh0 * a.G + h) * a.dq.head + part * 16;
    float y[16] = {};
    if (seen) {
      const int64_t panel = (int64_t)h * (p.width / 64) + part / 4;
      const float4 *from =
          (const float4 *)(p.dq + (panel * a.T + row) * 64 + (part % 4 ^ (r & 1)) * 16);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float4 v = __ldcs(from + j);
        y[2 * j] = a.scale * v.x, y[2 * j + 1] = a.scale * v.y;
        y[2 * j + 8] = a.scale * v.z, y[2 * j + 9] = a.scale * v.w;
      }
    } else if (a.acc_q && x.b >= a.seqs.n) {
      continue; /* dead; to what sees nothing 0 is added like any term: -0 becomes 0 */
    }
    if (a.dq.dtype == RG_F32) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float4 *to = (float4 *)((float *)a.dq.data + at) + j;
        float4 v = make_float4(y[4 * j], y[4 * j + 1], y[4 * j + 2], y[4 * j + 3]);
        if (a.acc_q) {
          const float4 old = *to;
          v = make_float4(old.x + v.x, old.y + v.y, old.z + v.z, old.w + v.w);
        }
        *to = v;
      }
    } else {
      uint4 v[2];
#pragma unroll
      for (int j = 0; j < 16; j++) {
        if (a.dq.dtype == RG_F16)
          ((__half *)v)[j] = __float2half_rn(y[j]);
        else
          ((__nv_bfloat16 *)v)[j] = __float2bfloat16_rn(y[j]);
      }
      uint4 *to = (uint4 *)((uint16_t *)a.dq.data + at);
      to[0] = v[0], to[1] = v[1];
    }
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
