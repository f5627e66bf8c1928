/* kernels/attn/mma_fwd_96.cu: instances of mma_fwd.cuh. */
#include "mma_fwd.cuh"

const void *rgk_mma_fwd_96(rg_dtype type, int shape, bool selected) {
  return rgk::mma_fwd::instance<96, 96>(type, shape, selected);
}
