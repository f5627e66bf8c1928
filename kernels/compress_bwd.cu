/* kernels/compress_bwd.cu: gradient of the mean: a token of group m receives Σ_j dy_j / kernel over
 * the blocks j = m − kernel/stride + 1 … m that exist. One sum serves the `stride` tokens of the
 * group. */
#include "compress.h"
#include "gemm.cuh"
#include "device/seq.cuh"

using namespace rgk;

namespace {

__global__ void __launch_bounds__(256) mean_bwd(const __grid_constant__ rgk_mean p) {
  const rgk_mean_side &side = p.side[blockIdx.z];
  const tile t = find_tile(p.seqs, blockIdx.x, p.tile * p.stride);
  const bool dead = t.b >= p.seqs.n;
  const int eights = (side.width + 7) / 8,
            at = blockIdx.y * side.across + threadIdx.x % side.across;
  const int head = at / eights, feature = at % eights * 8, left = side.width - feature;
  if (t.n == 0 || head >= side.heads || (dead && side.add)) return;
  const int features = left < 8 ? left : 8, overlap = p.kernel / p.stride;
  const int64_t blocks = dead || !side.x ? 0 : rgk_blocks_in(t.length, p.kernel, p.stride);
  const int64_t first = t.first / p.stride;
  const float scale = 1.0f / (float)p.kernel;
  for (int g = threadIdx.x / side.across; g * p.stride < t.n; g += blockDim.x / side.across) {
    const int64_t m = first + g, begin = m - overlap + 1 > 0 ? m - overlap + 1 : 0;
    const int64_t end = m + 1 < blocks ? m + 1 : blocks;
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int64_t j = begin; j < end; j++) {
      float x[8];
      load8(side.x, p.dtype, (t.begin / p.stride + j) * side.x_row + head * side.x_head + feature,
            p.vec, features, x);
#pragma unroll
      for (int e = 0; e < 8; e++) sum[e] += x[e];
    }
#pragma unroll
    for (int e = 0; e < 8; e++) sum[e] *= scale;
    const int tokens = t.n - g * p.stride < p.stride ? t.n - g * p.stride : p.stride;
    int64_t to =
        (t.begin + t.first + (int64_t)g * p.stride) * side.y_row + head * side.y_head + feature;
    if (p.vec && !side.add && side.y_dtype != RG_F32) { /* packed once, stored often */
      uint4 packed;
      store8(&packed, side.y_dtype, 0, true, 8, sum);
#pragma unroll 4
      for (int i = 0; i < tokens; i++, to += side.y_row)
        __stcs((uint4 *)((uint16_t *)side.y + to), packed);
      continue;
    }
    for (int i = 0; i < tokens; i++, to += side.y_row) {
      if (side.add) {
        float old[8];
        load8(side.y, RG_F32, to, p.vec, features, old);
#pragma unroll
        for (int e = 0; e < 8; e++) old[e] += sum[e];
        store8(side.y, RG_F32, to, p.vec, features, old);
      } else {
        store8(side.y, side.y_dtype, to, p.vec, features, sum);
      }
    }
  }
}

} // namespace

const void *rgk_mean_bwd(void) {
  return (const void *)mean_bwd;
}
