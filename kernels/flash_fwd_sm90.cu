/* kernels/flash_fwd_sm90.cu: instances of flash_fwd_sm90.cuh. */
#include "flash_fwd_sm90.cuh"

using namespace rgk;

template <int D, int E, int GROUPS, int N> static const void *instance(rg_dtype type) {
#ifdef RGK_DEV
  return type == RG_BF16 ? (const void *)flash::forward<flash::config<__nv_bfloat16, D, E, GROUPS, N>> : nullptr;
#else
  return type == RG_BF16  ? (const void *)flash::forward<flash::config<__nv_bfloat16, D, E, GROUPS, N>>
         : type == RG_F16 ? (const void *)flash::forward<flash::config<__half, D, E, GROUPS, N>>
                          : nullptr;
#endif
}

const void *rgk_flash_fwd(rg_dtype type, int32_t D, int32_t E) {
#define GET(d, e, groups, keys)                                                                              \
  if (D == d && E == e) return instance<d, e, groups, keys>(type);
  RGK_FLASH_INSTANCES(GET)
  return nullptr;
}
