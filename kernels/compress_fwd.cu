/* kernels/compress_fwd.cu: y_j = mean of tokens [j·stride, j·stride + kernel), and tables of
   blocks.

   Every token is read once: groups of `stride` tokens are summed into shared memory, and block j is
   the sum of groups j … j + kernel/stride − 1. Sums run in order, tokens within a group, then
   groups, so a block's mean does not depend on the tile it is in.
 */
#include "compress.h"
#include "gemm.cuh"
#include "device/seq.cuh"

using namespace rgk;

namespace {

/* A tile's share of the compressed rows: rows [row, end), the first n of which are blocks. */
struct share {
  int64_t token, row, end, n;
};
__device__ __forceinline__ share share_of(const rgk_mean &p) {
  const tile t = find_tile(p.seqs, blockIdx.x, p.tile * p.stride);
  const bool dead = t.b >= p.seqs.n;
  const int64_t first = t.first / p.stride;
  share s;
  s.token = t.begin + t.first;
  s.row = t.begin / p.stride + first;
  s.end = dead ? p.rows : (t.begin + t.length) / p.stride;
  if (s.end > s.row + p.tile) s.end = s.row + p.tile;
  s.n = dead ? 0 : rgk_blocks_in(t.length, p.kernel, p.stride) - first;
  if (s.n > p.tile) s.n = p.tile;
  return s;
}

struct place {
  int down, lanes; /* this thread's lane, how many there are */
  int64_t x, y;    /* where its eight features lie in a row */
  int count;       /* of them; 0: none */
};
__device__ __forceinline__ place place_of(const rgk_mean_side &s) {
  const int eights = (s.width + 7) / 8, at = blockIdx.y * s.across + threadIdx.x % s.across;
  const int head = at / eights, feature = at % eights * 8;
  place l;
  l.down = threadIdx.x / s.across;
  l.lanes = blockDim.x / s.across;
  l.x = head * s.x_head + feature;
  l.y = head * s.y_head + feature;
  l.count = head >= s.heads ? 0 : s.width - feature < 8 ? s.width - feature : 8;
  return l;
}

template <int DTYPE>
__global__ void __launch_bounds__(256, 4) mean_fwd(const __grid_constant__ rgk_mean p) {
  extern __shared__ float4 parts[]; /* [groups][across][2] */
  const rgk_mean_side &side = p.side[blockIdx.z];
  const share s = share_of(p);
  const place l = place_of(side);
  const int overlap = p.kernel / p.stride, column = threadIdx.x % side.across;
  const int groups = s.n > 0 ? (int)s.n + overlap - 1 : 0;
  if (l.count)
    for (int g = l.down; g < groups; g += l.lanes) {
      const int64_t at = (s.token + (int64_t)g * p.stride) * side.x_row + l.x;
      float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      int i = 0;
      for (; i + 8 <= p.stride; i += 8) { /* eight tokens on their way at once */
        float x[8][8];
#pragma unroll
        for (int u = 0; u < 8; u++) load8(side.x, DTYPE, at + (i + u) * side.x_row, true, 8, x[u]);
#pragma unroll
        for (int u = 0; u < 8; u++)
#pragma unroll
          for (int e = 0; e < 8; e++) sum[e] += x[u][e];
      }
      for (; i < p.stride; i++) {
        float x[8];
        load8(side.x, DTYPE, at + i * side.x_row, true, 8, x);
#pragma unroll
        for (int e = 0; e < 8; e++) sum[e] += x[e];
      }
      float4 *to = parts + (g * side.across + column) * 2;
      to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    }
  __syncthreads();
  if (!l.count) return;
  const float scale = 1.0f / (float)p.kernel;
  for (int j = l.down; s.row + j < s.end; j += l.lanes) {
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (j < s.n) {
      load8(parts, RG_F32, (j * side.across + column) * 8, true, 8, sum);
      for (int g = 1; g < overlap; g++) {
        float x[8];
        load8(parts, RG_F32, ((j + g) * side.across + column) * 8, true, 8, x);
#pragma unroll
        for (int e = 0; e < 8; e++) sum[e] += x[e];
      }
#pragma unroll
      for (int e = 0; e < 8; e++) sum[e] *= scale;
    }
    store8(side.y, side.y_dtype, (s.row + j) * side.y_row + l.y, true, 8, sum);
  }
}

__global__ void mean_direct(const __grid_constant__ rgk_mean p) {
  const rgk_mean_side &side = p.side[blockIdx.z];
  const share s = share_of(p);
  const place l = place_of(side);
  if (!l.count) return;
  const float scale = 1.0f / (float)p.kernel;
  for (int j = l.down; s.row + j < s.end; j += l.lanes) {
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0}, part[8], x[8];
    for (int i = 0; j < s.n && i < p.kernel; i++) {
      load8(side.x, p.dtype, (s.token + (int64_t)j * p.stride + i) * side.x_row + l.x, p.vec,
            l.count, x);
#pragma unroll
      for (int e = 0; e < 8; e++) part[e] = (i % p.stride == 0 ? 0.0f : part[e]) + x[e];
      if ((i + 1) % p.stride == 0)
#pragma unroll
        for (int e = 0; e < 8; e++) sum[e] = i < p.stride ? part[e] : sum[e] + part[e];
    }
    if (j < s.n)
#pragma unroll
      for (int e = 0; e < 8; e++) sum[e] *= scale;
    store8(side.y, side.y_dtype, (s.row + j) * side.y_row + l.y, p.vec, l.count, sum);
  }
}

/* ---- tables ---- */

/* Row r belongs to the last sequence whose rows begin at r or before: shorter ones have none. */
__device__ rgk_gemm_row block_row(const rgk_compress_tables &p, int64_t r) {
  int low = 0, high = p.seqs.n;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (seq_start(p.seqs, middle) / p.stride <= r)
      low = middle;
    else
      high = middle - 1;
  }
  rgk_gemm_row e = {-1, 0, 0, (int32_t)r, 1};
  if (low == p.seqs.n) return e;
  const int64_t begin = seq_start(p.seqs, low), j = r - begin / p.stride;
  if (j >= rgk_blocks_in(seq_start(p.seqs, low + 1) - begin, p.kernel, p.stride)) return e;
  e.row = (int32_t)(begin + j * p.stride);
  e.hi = INT32_MAX;
  return e;
}

__device__ rgk_gemm_row group_row(const rgk_compress_tables &p, int64_t slot) {
  const tile t = find_tile(p.seqs, slot, p.stride);
  const int overlap = p.kernel / p.stride;
  rgk_gemm_row e = {-1, 0, 0, (int32_t)(t.begin + t.first), t.n};
  if (t.b >= p.seqs.n || t.n == 0) return e;
  const int64_t m = t.first / p.stride, count = rgk_blocks_in(t.length, p.kernel, p.stride);
  e.row = (int32_t)(t.begin / p.stride + m);
  e.lo = m - count + 1 > 0 ? (int32_t)(m - count + 1) : 0;
  e.hi = m + 1 < overlap ? (int32_t)m + 1 : overlap;
  if (e.lo >= e.hi || count == 0) e.lo = e.hi = 0;
  return e;
}

__global__ void make_tables(const __grid_constant__ rgk_compress_tables p) {
  const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (p.blocks && i < p.nblocks) p.blocks[i] = block_row(p, i);
  if (p.groups && i < p.ngroups) p.groups[i] = group_row(p, i);
}

} // namespace

const void *rgk_mean_fwd(rg_dtype t) {
  if (t == RG_F32) return (const void *)mean_fwd<RG_F32>;
  if (t == RG_F16) return (const void *)mean_fwd<RG_F16>;
  return (const void *)mean_fwd<RG_BF16>;
}
const void *rgk_mean_direct(void) {
  return (const void *)mean_direct;
}
const void *rgk_make_tables(void) {
  return (const void *)make_tables;
}
