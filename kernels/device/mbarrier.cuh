/* device/mbarrier.cuh: who waits for whom inside a block on Hopper.

     mbarrier       counts arrivals and bytes of the copy engine; a phase ends when both are
                    complete. bar_wait(bar, parity) returns once the phase of that parity has ended:
                    a fresh barrier's first phase has parity 0, and waiting for parity 1 on a fresh
                    barrier returns at once (so producers start with parity 1 on "empty" barriers).
                    A "full" barrier says that something is there (bar_expect, bar_ready), an
                    "empty" one gives its room back (bar_release). Each thread arrives for itself,
                    or one lane for its warp (warp_ready, warp_release; counted as WARP_ARRIVALS).
     ring           the stage and parity of a pipeline's next step
     named barrier  among a given number of threads, ids 1 to 15; `sync` waits, `arrive` only counts
     registers      setmaxnreg moves registers between warpgroups; every warp of the warpgroup runs
                    it
     proxy fence    shared memory written by ordinary stores is shown to wgmma and the copy engine

   A release comes after what was read has been used or waited for. Arriving waits for nothing: a
   load (ldmatrix, ld.shared) may still be under way when the phase ends, and the copy engine, which
   the arrive does not order behind it, then writes what it is about to read. So a release takes
   what was read:

     ordinary loads                   registers loaded, or something computed from all of them
     products, the copy engine        the `waited` of wgmma_wait or store_wait_read

   Ordinary writes want the proxy fence besides, where the copy engine or wgmma comes next, be it to
   read or to write. tests/releases.py looks in machine code for arrives that come before the data
   of a load; docs/gpu.md lists every hand-over.
 */
#pragma once
#include "ptx.cuh"

namespace rgk {

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
/* What the barrier guards is there, by ordinary stores. */
__device__ __forceinline__ void bar_ready(uint64_t *bar) {
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

/* Proof that what reads by itself, products or the copy engine, is done reading. */
class waited;
template <int n> __device__ __forceinline__ waited wgmma_wait();
template <int n> __device__ __forceinline__ waited store_wait_read();
class waited {
  __device__ __forceinline__ waited() {}
  template <int n> friend __device__ __forceinline__ waited wgmma_wait();
  template <int n> friend __device__ __forceinline__ waited store_wait_read();

public:
  /* Where a thread, or a step, started nothing that reads. */
  __device__ __forceinline__ static waited for_nothing() { return {}; }
};

namespace release {
__device__ __forceinline__ uint32_t word(uint32_t x) {
  return x;
}
__device__ __forceinline__ uint32_t word(int x) {
  return (uint32_t)x;
}
__device__ __forceinline__ uint32_t word(float x) {
  return __float_as_uint(x);
}

/* The address is made to depend on `read` in machine code too: x² + x is even, which ptxas does not
 * see. (Naming a register in an asm makes the compiler keep it, not wait for it.) */
__device__ __forceinline__ void arrive(uint64_t *bar, uint32_t read) {
  asm volatile("{\n\t.reg .b32 x;\n\t"
               "mad.lo.u32 x, %1, %1, %1;\n\t"
               "and.b32 x, x, 1;\n\t"
               "add.u32 x, x, %0;\n\t"
               "mbarrier.arrive.shared::cta.b64 _, [x];\n\t}" ::"r"(smem_at(bar)),
               "r"(read)
               : "memory");
}
/* In the cluster's window. */
__device__ __forceinline__ void arrive_at(uint32_t bar, uint32_t read) {
  asm volatile("{\n\t.reg .b32 x;\n\t"
               "mad.lo.u32 x, %1, %1, %1;\n\t"
               "and.b32 x, x, 1;\n\t"
               "add.u32 x, x, %0;\n\t"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [x];\n\t}" ::"r"(bar),
               "r"(read)
               : "memory");
}
} // namespace release

/* Gives room back: every thread that read it. */
__device__ __forceinline__ void bar_release(uint64_t *bar, waited) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_at(bar)) : "memory");
}
template <class... X> __device__ __forceinline__ void bar_release(uint64_t *bar, X... read) {
  static_assert(sizeof...(X) > 0, "what was read?");
  release::arrive(bar, (release::word(read) ^ ...));
}
template <class... X>
__device__ __forceinline__ void bar_release(uint64_t *bar, waited, X... read) {
  bar_release(bar, read...);
}

/* The same by one lane for its warp, all of whose lanes call it. racecheck does not follow the
 * order that __syncwarp makes between the others' accesses and lane 0's arrive, so RGK_EVERY_LANE
 * has each lane arrive for itself (tests/gpu_sanitize.sh). */
#ifdef RGK_EVERY_LANE
enum { WARP_ARRIVALS = 32 };
__device__ __forceinline__ bool arrives() {
  return true;
}
#else
enum { WARP_ARRIVALS = 1 };
__device__ __forceinline__ bool arrives() {
  __syncwarp();
  return threadIdx.x % 32 == 0;
}
#endif
__device__ __forceinline__ void warp_ready(uint64_t *bar) {
  if (arrives()) bar_ready(bar);
}
template <class... X> __device__ __forceinline__ void warp_release(uint64_t *bar, X... read) {
  if (arrives()) bar_release(bar, read...);
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

/* ---- named barriers: each kernel's enum `named` lists its ids ---- */

enum { WARPGROUP = 128 }; /* threads */

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
