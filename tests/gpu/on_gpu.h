/* tests/gpu/on_gpu.h: what tests that need a GPU begin with: without one asked for they are
   skipped, visibly; and a call of the runtime that must succeed.
 */
#ifndef ON_GPU_H
#define ON_GPU_H

#define CUDA_OK(call) cr_assert_eq((call), cudaSuccess, #call)
#define NEEDS_GPU() \
  if (!test_on_gpu()) cr_skip_test("no GPU asked for (REGRAPH_TEST_DEVICE=cuda)")

#endif
