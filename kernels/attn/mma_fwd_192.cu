/* kernels/attn/mma_fwd_192.cu: instances of mma_fwd.cuh. */
#include "mma_fwd.cuh"

const void *rgk_mma_fwd_192(rg_dtype type, int shape, bool selected) {
  return rgk::mma_fwd::instance<192, 128>(type, shape, selected);
}
