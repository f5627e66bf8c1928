/* device/ptx.cuh: single instructions that CUDA has no name for.

     copies         cp.async, from global to shared memory, by each thread for itself. A group is
                    what was started since the last commit; a wait is for this thread's own copies:
                    a barrier shows them to others, a proxy fence before it to wgmma and the copy
                    engine
     matrices       8 x 8 tiles of two-byte elements between shared memory and the registers of a
                    warp, four at a time: lane l has columns 2(l % 4) and + 1 of row l / 4 of each,
                    and gives the address of row l % 8 of tile l / 8
     powers of two  of the special function unit: denormals, read or made, are zeros
 */
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace rgk {

__device__ __forceinline__ uint32_t smem_at(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

/* ---- clusters of blocks ---- */

/* All threads of the cluster meet; what was written before is seen after. */
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
/* Where block `rank` has what this block has at `at`. */
__device__ __forceinline__ uint32_t cluster_at(uint32_t at, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
__device__ __forceinline__ int cluster_load(uint32_t at) {
  int x;
  asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}

/* ---- copies ---- */

__device__ __forceinline__ void prefetch_l1(const void *p) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
}

/* Bytes on as many bytes; the 16 pass L1 by. */
__device__ __forceinline__ void copy16(uint32_t to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
/* Zeros where !real; `from` is not read then. */
__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(real ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy8(uint32_t to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy4(uint32_t to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Until at most n of this thread's groups are under way. */
template <int n> __device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
/* Until none is, also of those that are in no group yet. */
__device__ __forceinline__ void copies_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
/* What no copy can bring: four words. */
__device__ __forceinline__ void put16(uint32_t to, const uint32_t (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

/* ---- matrices ---- */

__device__ __forceinline__ void load_matrices(uint32_t at, uint32_t *x) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void store_matrices(uint32_t at, const uint32_t *x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

/* The same, each tile as its transpose: the address of column l % 8. */
__device__ __forceinline__ void store_transposed(uint32_t at, const uint32_t *x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

/* ---- powers of two ---- */

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

} // namespace rgk
