/* device/mbarrier.cuh: who waits for whom inside a block on Hopper.

     mbarrier       counts arrivals and bytes of the copy engine; a phase ends when both are
                    complete. bar_wait(bar, parity) returns once the phase of that parity has ended:
                    a fresh barrier's first phase has parity 0, and waiting for parity 1 on a fresh
                    barrier returns at once (so producers start with parity 1 on "empty" barriers).
     ring           the stage and parity of a pipeline's next step
     named barrier  among a given number of threads, ids 1 to 15; `sync` waits, `arrive` only counts
     registers      setmaxnreg moves registers between warpgroups; every warp of the warpgroup runs
                    it
     proxy fence    shared memory written by ordinary stores is shown to wgmma and the copy
                    engine
 */
#pragma once
#include <stdint.h>

namespace rgk {

__device__ __forceinline__ uint32_t smem_at(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

/* ---- mbarrier: 8 bytes of shared memory ---- */

__device__ __forceinline__ void bar_init(uint64_t *bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_at(bar)), "r"(arrivals)
               : "memory");
}
/* After the inits, by the thread that made them, before the block's __syncthreads. */
__device__ __forceinline__ void bar_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::
                   : "memory");
}
__device__ __forceinline__ void bar_arrive(uint64_t *bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_at(bar)) : "memory");
}
/* Arrives, and makes the phase wait for that many more bytes. */
__device__ __forceinline__ void bar_expect(uint64_t *bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_at(bar)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ bool bar_try(uint64_t *bar, uint32_t parity) {
  uint32_t ok;
  asm volatile("{\n\t.reg .pred p;\n\t"
               "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
               "selp.u32 %0, 1, 0, p;\n\t}"
               : "=r"(ok)
               : "r"(smem_at(bar)), "r"(parity)
               : "memory");
  return ok;
}
__device__ __forceinline__ void bar_wait(uint64_t *bar, uint32_t parity) {
  while (!bar_try(bar, parity)) {
  }
}

/* Consumers wait for `parity` on "full", producers for `parity ^ 1` on "empty". */
template <int stages> struct ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/* ---- named barriers ---- */

__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* ---- registers a thread may use: a multiple of 8, 24 to 240 ---- */

template <int n> __device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n> __device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}

/* In each writing thread, before the barrier after which wgmma or the copy engine reads. */
__device__ __forceinline__ void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

} // namespace rgk
