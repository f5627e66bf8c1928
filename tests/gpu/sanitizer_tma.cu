/* tests/gpu/sanitizer_tma.cu: what does initcheck see of bulk copies? Built by hand (nvcc -arch=sm_90a) and
 * run under compute-sanitizer --tool initcheck: memory is written by a bulk store, by a bulk reduction, by a
 * tensor-map store and reduction, and then read by ordinary loads. All of it is written; a finding names a
 * way of writing that the tool does not follow. An argument picks one of the four.
 */
#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

constexpr int N = 256;

__global__ void write(float *to, int how, const __grid_constant__ CUtensorMap map) {
  __shared__ alignas(128) float part[N];
  for (int i = threadIdx.x; i < N; i += blockDim.x) part[i] = (float)i;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x) return;
  const uint32_t from = (uint32_t)__cvta_generic_to_shared(part);
  if (how == 0)
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "n"(N * 4)
                 : "memory");
  if (how == 1)
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "n"(N * 4)
                 : "memory");
  if (how == 2)
    asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%0, {%2}], [%1];" ::"l"(&map), "r"(from),
                 "r"(0)
                 : "memory");
  if (how == 3)
    asm volatile("cp.reduce.async.bulk.tensor.1d.global.shared::cta.add.bulk_group [%0, {%2}], [%1];" ::"l"(&map),
                 "r"(from), "r"(0)
                 : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__global__ void read(const float *from, float *sum) {
  float s = 0;
  for (int i = 0; i < N; i++) s += from[i];
  *sum = s;
}

int main(int argc, char **argv) {
  const int how = argc > 1 ? atoi(argv[1]) : 0;
  float *to, *sum, got;
  cudaMalloc(&to, N * 4);
  cudaMalloc(&sum, 4);
  if (argc > 2) cudaMemset(to, 0, N * 4); /* what a reduction adds to was written before */
  CUtensorMap map;
  void *entry;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  const cuuint64_t size[1] = {N}, stride[1] = {N * 4};
  const cuuint32_t box[1] = {N}, one[1] = {1};
  auto encode = (decltype(&cuTensorMapEncodeTiled))entry;
  const int bad = encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 1, to, size, stride, box, one,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  write<<<1, 32>>>(to, how, map);
  read<<<1, 1>>>(to, sum);
  cudaMemcpy(&got, sum, 4, cudaMemcpyDeviceToHost);
  printf("way %d%s: map %d, sum %g, %s\n", how, argc > 2 ? " zeroed before" : "", bad, got,
         cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
