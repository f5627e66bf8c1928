/* kernels/attn/mma_fwd_64.cu: instances of mma_fwd.cuh. */
#include "mma_fwd.cuh"

const void *rgk_mma_fwd_64(rg_dtype type, int shape, bool selected) {
  return rgk::mma_fwd::instance<64, 64>(type, shape, selected);
}
