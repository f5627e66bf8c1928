/* device/softmax.cuh: a row's softmax in powers of two, and its end. A quad of lanes holds a row's
 * columns. */
#pragma once
#include "ptx.cuh"

namespace rgk {

/* Powers of two by which a row's maximum may exceed its reference before that moves. */
constexpr float LAZY = 8;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

/* c·tanh(s·scale / c), `to` = 2·scale / c in powers of two: 1 − 2 / (1 + e^2x) keeps the absolute
 * error near 1e-7 c. */
template <int n> __device__ __forceinline__ void cap(float (&s)[n], float to, float softcap) {
#pragma unroll
  for (int i = 0; i < n; i++) s[i] = softcap * (1 - __fdividef(2, 1 + exp2_fast(s[i] * to)));
}

/* What a row ends with: the factor that makes its sum of p v an average (0: it saw nothing), and
 * lse. */
struct row_end {
  float scale, lse;
};
/* l: the row's sum of powers of two above the reference m, 0 if it saw no key. sink: a logit, −inf
 * for none. Where the sink is all a row sees, lse is the sink to the bit. */
__device__ __forceinline__ row_end finish_row(float m, float l, float sink) {
  if (l == 0) return {0, sink};
  float f = 1;
  if (sink > -INFINITY) {
    const float top = fmaxf(m, sink * LOG2E);
    f = exp2f(m - top);
    l = l * f + exp2f(sink * LOG2E - top);
    m = top;
  }
  return {__fdividef(f, l), m * LN2 + logf(l)};
}

} // namespace rgk
