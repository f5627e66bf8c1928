/* kernels/attn/decode_choice_sm90.cuh: what those who choose among few candidates do alike
   (decode_near_sm90.cu, decode_split_sm90.cu). */
#pragma once
#include "decode_load_sm90.cuh"

namespace rgk {
namespace decode {

/* How many of n candidates come before one: by larger keys, of equal ones by lower blocks. Keys are
 * aligned and go on, up to a multiple of four, with such as come before nothing. */
__device__ __forceinline__ int come_before(const int *keys, const int *blocks, int n, int key,
                                           int block) {
  int before = 0;
#pragma unroll 1
  for (int i = 0; i < n; i += 4) {
    const int4 x = *(const int4 *)(keys + i);
    before += (x.x > key) + (x.y > key) + (x.z > key) + (x.w > key);
    if (x.x == key) before += blocks[i] < block;
    if (x.y == key) before += blocks[i + 1] < block;
    if (x.z == key) before += blocks[i + 2] < block;
    if (x.w == key) before += blocks[i + 3] < block;
  }
  return before;
}

} // namespace decode
} // namespace rgk
