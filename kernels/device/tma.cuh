/* device/tma.cuh: Hopper's copy engine. One thread starts a copy of a whole box; see ../tma.h for
   the maps.

   Loads complete on an mbarrier, which must have been told the bytes (bar_expect; a box counts in
   full, also where it hangs over the tensor's edge). Coordinates are in elements, axis 0 (the dense
   one) first. With a 128-byte swizzle, row r's 16-byte chunk c lands at chunk c ^ (r & 7) of its
   128 bytes; the box must start on a multiple of 1024 bytes of shared memory. Stores read shared
   memory until store_wait_read; they are bulk groups of the thread that started them.
 */
#pragma once
#include "../tma.h"
#include "mbarrier.cuh"

namespace rgk {

/* How long L2 should keep what passes through: the engine's cache policies. */
enum class l2 : uint64_t {
  normal = 0x1000000000000000ull,
  evict_first = 0x12f0000000000000ull,
  evict_last = 0x14f0000000000000ull
};

__device__ __forceinline__ void map_prefetch(const rgk_map *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load(void *to, const rgk_map *map, uint64_t *bar, int c0,
                                         int c1, l2 hint = l2::normal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem_at(to)),
      "l"(map), "r"(smem_at(bar)), "r"(c0), "r"(c1), "l"((uint64_t)hint)
      : "memory");
}
__device__ __forceinline__ void tma_load(void *to, const rgk_map *map, uint64_t *bar, int c0,
                                         int c1, int c2, l2 hint = l2::normal) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem_at(to)),
      "l"(map), "r"(smem_at(bar)), "r"(c0), "r"(c1), "r"(c2), "l"((uint64_t)hint)
      : "memory");
}
__device__ __forceinline__ void tma_load(void *to, const rgk_map *map, uint64_t *bar, int c0,
                                         int c1, int c2, int c3, l2 hint = l2::normal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem_at(to)),
      "l"(map), "r"(smem_at(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"((uint64_t)hint)
      : "memory");
}

__device__ __forceinline__ void tma_load(void *to, const rgk_map *map, uint64_t *bar, int c0,
                                         int c1, int c2, int c3, int c4, l2 hint = l2::normal) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem_at(to)),
      "l"(map), "r"(smem_at(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"((uint64_t)hint)
      : "memory");
}

/* Plain bytes: addresses and size are multiples of 16. */
__device__ __forceinline__ void bulk_load(void *to, const void *from, uint32_t bytes,
                                          uint64_t *bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem_at(to)),
      "l"(from), "r"(bytes), "r"(smem_at(bar))
      : "memory");
}

/* Writes a box; whatever of it lies outside the tensor is dropped. */
__device__ __forceinline__ void tma_store(const rgk_map *map, const void *from, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(smem_at(from)), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void tma_store(const rgk_map *map, const void *from, int c0, int c1,
                                          int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(smem_at(from)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* Until at most n groups still read shared memory; store_wait: until their writes are done. */
template <int n> __device__ __forceinline__ waited store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory");
  return {};
}
template <int n> __device__ __forceinline__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(n) : "memory");
}

/* ---- counters in memory that order the sums of blocks ---- */

__device__ __forceinline__ void await(const uint32_t *count, uint32_t n) {
  uint32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
  } while (now < n);
}
__device__ __forceinline__ void publish(uint32_t *count, uint32_t n) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(count), "r"(n) : "memory");
}

/* Ordinary and copy-engine accesses of global memory, in this order. */
__device__ __forceinline__ void proxy_fence_all() {
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void bulk_store(void *to, const void *from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(smem_at(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_add(float *to, const void *from, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(smem_at(from)), "r"(bytes)
      : "memory");
}

} // namespace rgk
