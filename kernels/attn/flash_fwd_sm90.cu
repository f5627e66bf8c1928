/* kernels/attn/flash_fwd_sm90.cu: instances of flash_fwd_sm90.cuh. */
#include "flash_fwd_sm90.cuh"

using namespace rgk;

#ifdef RGK_DEV
constexpr bool dev = true;
#else
constexpr bool dev = false;
#endif

template <int D, int E, int GROUPS, int N> static const void *instance(rg_dtype type) {
  if constexpr (!dev || (D == E && (D == 64 || D == 128))) {
    if (type == RG_BF16)
      return (const void *)flash::forward<flash::config<__nv_bfloat16, D, E, GROUPS, N>>;
    if constexpr (!dev)
      if (type == RG_F16)
        return (const void *)flash::forward<flash::config<__half, D, E, GROUPS, N>>;
  }
  return nullptr;
}

const void *rgk_flash_fwd(rg_dtype type, int32_t D, int32_t E) {
#define GET(d, e, groups, keys) \
  if (D == d && E == e) return instance<d, e, groups, keys>(type);
  RGK_FLASH_INSTANCES(GET)
  return nullptr;
}
