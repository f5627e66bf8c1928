/* kernels/attn/mma_fwd_256.cu: instances of mma_fwd.cuh. */
#include "mma_fwd.cuh"

const void *rgk_mma_fwd_256(rg_dtype type, int shape, bool selected) {
  return rgk::mma_fwd::instance<256, 256>(type, shape, selected);
}
