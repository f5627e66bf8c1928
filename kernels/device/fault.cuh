/* device/fault.cuh: how a kernel says what is wrong with contents (see rgk_fault in kernels.h). */
#pragma once
#include "../kernels.h"

namespace rgk {

/* The first to come is heard; the host looks at word 0, which is written last. */
__device__ __forceinline__ void report(const rgk_fault &f, int32_t a, int32_t b, int32_t c = 0,
                                       int32_t d = 0) {
  if (!f.word || atomicCAS_system(&f.word[RGK_FAULT_TAKEN], 0, 1) != 0) return;
  f.word[1] = a, f.word[2] = b, f.word[3] = c, f.word[4] = d;
  __threadfence_system();
  *(volatile int32_t *)f.word = f.what;
}

} // namespace rgk
