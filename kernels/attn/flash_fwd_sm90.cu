/* kernels/attn/flash_fwd_sm90.cu: instances of flash_fwd_sm90.cuh. */
#include "flash_fwd_sm90.cuh"

using namespace rgk;

const void *rgk_flash_fwd(rg_dtype type, int32_t D, int32_t E) {
#define GET(d, e, groups, keys) \
  if (D == d && E == e) return flash::instance<rgk_flash_params, d, e, groups, keys>(type);
  RGK_FLASH_INSTANCES(GET)
  return nullptr;
}
