/* kernels/attn/flash_fwd_paged_sm90.cu: instances of flash_fwd_sm90.cuh for keys in pages. */
#include "flash_fwd_sm90.cuh"

using namespace rgk;

const void *rgk_flash_fwd_paged(rg_dtype type, int32_t D, int32_t E, int groups) {
#define GET(d, e, most, keys)                                                  \
  if (D == d && E == e)                                                        \
    return groups == 1 ? flash::instance<rgk_flash_paged, d, e, 1, keys>(type) \
                       : flash::instance<rgk_flash_paged, d, e, most, keys>(type);
  RGK_FLASH_INSTANCES(GET)
  return nullptr;
}
