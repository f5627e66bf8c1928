/* kernels/attn/mma_bwd.cu: delta, and which instance takes what (mma_bwd.h). */
#include "mma_bwd.cuh"
#include "attn.cuh"

using namespace rgk;

namespace {

/* RGK_MMA_BWD_LANES lanes a row, in combine's order (RGI_DELTA_LANES). */
template <class T>
__global__ void __launch_bounds__(RGK_MMA_BWD_THREADS)
    delta(const __grid_constant__ rgk_attn_plain p) {
  enum { LANES = RGK_MMA_BWD_LANES };
  const rgk_attn &a = p.a;
  const int64_t i = (blockIdx.x * (int64_t)RGK_MMA_BWD_THREADS + threadIdx.x) / LANES,
                row = i / a.H;
  const int lane = threadIdx.x % LANES, h = (int)(i - row * a.H);
  const bool live = row < live_rows(a.seqs);
  float sum = 0;
  if (live && !a.delta.data) {
    const int64_t o = row * a.o.row + h * a.o.head, d_o = row * a.d_o.row + h * a.d_o.head;
    for (int c = lane; c < a.E / CHUNK; c += LANES) {
      chunk<T> x, y;
      float u[CHUNK], v[CHUNK], part = 0;
      x.load(a.o.data, 0, o + CHUNK * c, CHUNK), y.load(a.d_o.data, 0, d_o + CHUNK * c, CHUNK);
      x.get(u), y.get(v);
#pragma unroll
      for (int j = 0; j < CHUNK; j++) part = fmaf(u[j], v[j], part);
      sum += part;
    }
  }
  sum = sum_lanes(sum, LANES);
  if (!live || lane > 0) return;
  if (a.delta.data) sum = ((const float *)a.delta.data)[row * a.delta.row + h * a.delta.head];
  if (a.d_lse.data) sum -= ((const float *)a.d_lse.data)[row * a.d_lse.row + h * a.d_lse.head];
  p.delta[i] = sum;
}

rgk_mma_bwd_kernels kernels_of(rg_dtype type, int32_t width, bool small) {
#define X(W, E) \
  if (width == W) return rgk_mma_bwd_##W(type, small);
  RGK_MMA_BWD_INSTANCES(X)
#undef X
  return {};
}

} // namespace

const void *rgk_mma_bwd_keys(rg_dtype type, int32_t width, bool small, int32_t keys) {
  const rgk_mma_bwd_kernels k = kernels_of(type, width, small);
  return keys == RGK_MMA_BWD_MANY_KEYS ? k.many_keys : k.keys;
}
const void *rgk_mma_bwd_queries(rg_dtype type, int32_t width, bool small) {
  return kernels_of(type, width, small).queries;
}
const void *rgk_mma_bwd_pairs(rg_dtype type, int32_t width) {
  return kernels_of(type, width, false).pairs;
}
const void *rgk_mma_bwd_alone(rg_dtype type, int32_t width) {
  return kernels_of(type, width, false).alone;
}
const void *rgk_mma_bwd_delta(rg_dtype type) {
  return type == RG_F16 ? (const void *)delta<__half> : (const void *)delta<__nv_bfloat16>;
}
