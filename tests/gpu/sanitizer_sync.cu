/* tests/gpu/sanitizer_sync.cu: what compute-sanitizer's synccheck makes of programs that are right.
   Built by hand (nvcc -arch=sm_90a); an argument picks one.

     0 … 3   warps with a loop each meet at a named barrier, from two places of the program: by
             bar.sync, barrier.sync.aligned, bar.sync at barrier 0, barrier.sync
     4       the same in one loop, by one bar.sync
     5 … 7   two threads arrive at an mbarrier and never wait, others wait for each phase; 0, 1, 2
             phases more that nobody waits for

   0 to 2 are found, "divergent thread(s) in block", 3 and 4 are not: PTX asks of an aligned barrier
   that all of a warp run the same instruction, synccheck that all of the block do. 7 is found,
   "missing wait", 5 and 6 are not. The library does nothing of what is found, so that all findings
   count (compute-sanitizer 2025.3.1, H200).
 */
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>

constexpr int THREADS = 128, HALF = THREADS / 2, STEPS = 9;

template <int HOW> __device__ __forceinline__ void meet() {
  if (HOW == 0) asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
  if (HOW == 1) asm volatile("barrier.sync.aligned 1, %0;" ::"n"(THREADS) : "memory");
  if (HOW == 2) asm volatile("bar.sync 0, %0;" ::"n"(THREADS) : "memory");
  if (HOW == 3) asm volatile("barrier.sync 1, %0;" ::"n"(THREADS) : "memory");
}

/* The second half of the threads adds up what the first hands over. */
template <int HOW> __global__ void two_loops(float *out) {
  __shared__ float box[2][HALF];
  const int t = threadIdx.x;
  float sum = 0;
  if (t < HALF) {
#pragma unroll 1
    for (int i = 0; i < STEPS; i++) {
      box[i & 1][t] = (float)i;
      meet<HOW>();
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < STEPS; i++) {
      meet<HOW>();
      sum += box[i & 1][t - HALF];
    }
  }
  out[t] = sum;
}
__global__ void one_loop(float *out) {
  __shared__ float box[2][HALF];
  const int t = threadIdx.x;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < STEPS; i++) {
    if (t < HALF) box[i & 1][t] = (float)i;
    meet<0>();
    if (t >= HALF) sum += box[i & 1][t - HALF];
  }
  out[t] = sum;
}

__global__ void phases(float *out, int unwaited) {
  __shared__ alignas(8) uint64_t bar;
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(&bar);
  const int t = threadIdx.x;
  if (t == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(at) : "memory");
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < STEPS + unwaited; i++) {
    if (t == 0 || t == 32)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
    if (t >= HALF && i < STEPS) {
      asm volatile("{\n .reg .pred p;\n again:\n mbarrier.try_wait.parity.shared::cta.b64 p, [%0], "
                   "%1;\n @!p bra again;\n}" ::"r"(at),
                   "r"(i & 1)
                   : "memory");
      sum += (float)i;
    }
    __syncthreads();
  }
  out[t] = sum;
}

int main(int argc, char **argv) {
  const int how = argc > 1 ? atoi(argv[1]) : 0;
  float *out, got[2] = {};
  cudaMalloc(&out, THREADS * sizeof *out);
  if (how == 0) two_loops<0><<<1, THREADS>>>(out);
  if (how == 1) two_loops<1><<<1, THREADS>>>(out);
  if (how == 2) two_loops<2><<<1, THREADS>>>(out);
  if (how == 3) two_loops<3><<<1, THREADS>>>(out);
  if (how == 4) one_loop<<<1, THREADS>>>(out);
  if (how >= 5) phases<<<1, THREADS>>>(out, how - 5);
  cudaMemcpy(got, out, sizeof *out, cudaMemcpyDeviceToHost);
  cudaMemcpy(got + 1, out + THREADS - 1, sizeof *out, cudaMemcpyDeviceToHost);
  const bool right = got[0] == 0 && got[1] == STEPS * (STEPS - 1) / 2;
  printf("way %d: %s, %s\n", how, right ? "right" : "WRONG",
         cudaGetErrorString(cudaDeviceSynchronize()));
  return !right;
}
