/* kernels/attn/decode_attn_sm90.cu: attention of single tokens over pages, and over selected blocks
   of them (decode_sm90.cuh). */
#include "decode_sm90.cuh"

using namespace rgk;
using namespace rgk::decode;

namespace {

template <class C, class P>
__global__ void __launch_bounds__(256, 1) alone(const __grid_constant__ P d) {
  extern __shared__ char bytes[];
  memory<C> &s = begin<C>(paged_of(d).f, bytes);
  if (warpgroup() == 1) {
    attend<C>(d, s);
  } else if constexpr (C::KIND == ALONE) {
    load_tiles<C>(d, s);
  } else if (threadIdx.x < 32) {
    load_selected<C>(
        d, s, [](const job &, int) { return l2::normal; }, [] {});
  }
}

template <class P, int D> const void *instance(rg_dtype type) {
  if (type == RG_BF16) return (const void *)alone<setup<__nv_bfloat16, D, kind_of<P>>, P>;
#ifndef RGK_DEV
  if (type == RG_F16) return (const void *)alone<setup<__half, D, kind_of<P>>, P>;
#endif
  return nullptr;
}

} // namespace

const void *rgk_decode_alone(rg_dtype type, int32_t width) {
  return width == 128  ? instance<rgk_flash_paged, 128>(type)
         : width == 64 ? instance<rgk_flash_paged, 64>(type)
                       : nullptr;
}
const void *rgk_decode_slc(rg_dtype type, int32_t width) {
  return width == 128  ? instance<rgk_decode_selected, 128>(type)
         : width == 64 ? instance<rgk_decode_selected, 64>(type)
                       : nullptr;
}
