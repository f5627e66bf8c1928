/* tests/gpu/sanitizer_tma.cu: what compute-sanitizer makes of programs that are right. Built by
   hand (nvcc -arch=sm_90a); an argument picks one.

     0 … 3   memory is written by a bulk store, a bulk reduction, a tensor-map store, a tensor-map
             reduction, and then read by ordinary loads (a second argument: and set to zero before):
             for initcheck
     4, 5    a warp reads shared memory and hands it back through an mbarrier to a thread that
             writes it anew; in 4 every lane arrives, in 5 lane 0 after __syncwarp: for racecheck

   A finding names something that the tool does not follow, and that is no mistake where the library
   does it.
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
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "n"(N * 4)
                 : "memory");
  if (how == 1)
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
        "r"(from), "n"(N * 4)
        : "memory");
  if (how == 2)
    asm volatile(
        "cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%0, {%2}], [%1];" ::"l"(&map),
        "r"(from), "r"(0)
        : "memory");
  if (how == 3)
    asm volatile(
        "cp.reduce.async.bulk.tensor.1d.global.shared::cta.add.bulk_group [%0, {%2}], [%1];" ::"l"(
            &map),
        "r"(from), "r"(0)
        : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__global__ void read(const float *from, float *sum, int n) {
  float s = 0;
  for (int i = 0; i < n; i++) s += from[i];
  *sum = s;
}

__global__ void hand_back(float *out, int one_arrives) {
  __shared__ float box;
  __shared__ alignas(8) uint64_t full, empty;
  const uint32_t f = (uint32_t)__cvta_generic_to_shared(&full),
                 e = (uint32_t)__cvta_generic_to_shared(&empty);
  auto wait = [](uint32_t bar, uint32_t parity) {
    asm volatile("{\n .reg .pred p;\n again:\n mbarrier.try_wait.parity.shared::cta.b64 p, [%0], "
                 "%1;\n @!p bra again;\n}" ::"r"(bar),
                 "r"(parity)
                 : "memory");
  };
  auto arrive = [](uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
  };
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(f));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(e), "r"(one_arrives ? 1 : 32));
  }
  __syncthreads();
  float sum = 0;
  for (uint32_t i = 0; i < 8; i++) {
    if (threadIdx.x == 32) {
      if (i) wait(e, i - 1 & 1);
      box = (float)i;
      arrive(f);
    } else if (threadIdx.x < 32) {
      wait(f, i & 1);
      sum += *(volatile float *)&box;
      __syncwarp();
      if (!one_arrives || threadIdx.x == 0) arrive(e);
    }
  }
  if (threadIdx.x < 32) out[threadIdx.x] = sum;
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
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                   &found);
  const cuuint64_t size[1] = {N}, stride[1] = {N * 4};
  const cuuint32_t box[1] = {N}, one[1] = {1};
  auto encode = (decltype(&cuTensorMapEncodeTiled))entry;
  const int bad = encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 1, to, size, stride, box, one,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                         CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (how < 4)
    write<<<1, 32>>>(to, how, map);
  else
    hand_back<<<1, 64>>>(to, how == 5);
  read<<<1, 1>>>(to, sum, how < 4 ? N : 32);
  cudaMemcpy(&got, sum, 4, cudaMemcpyDeviceToHost);
  printf("way %d%s: map %d, sum %g, %s\n", how, argc > 2 ? " zeroed before" : "", bad, got,
         cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
