/* device/softmax.cuh: a row's softmax in powers of two, and its end. */
#pragma once
#include "ptx.cuh"

namespace rgk {

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
