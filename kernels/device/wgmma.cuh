/* device/wgmma.cuh: Hopper's warpgroup matrix product: D [64, N] f32 += A [64, 16] B [16, N], bf16
   or f16.

   Four warps of a warpgroup run it together. D lies in registers: warp w of the group owns rows 16w
   … 16w+15, and its lane l holds

       d[4j], d[4j + 1]      row l/4,      columns 8j + 2(l%4), + 1
       d[4j + 2], d[4j + 3]  row l/4 + 8,  the same columns

   A comes from shared memory or from registers: four words of two elements each, columns (k) 2(l%4)
   and + 1 of row l/4, row l/4 + 8, then columns + 8 of both rows. So the accumulators of columns
   16k … 16k+15 of one product, packed in pairs in their order, are the A of step k of the next.

   Shared memory holds 128-byte rows in the copy engine's 128-byte swizzle ("panels" of 64 elements,
   on 1024 byte boundaries). Of a panel whose rows are

       the M or N axis (64 elements of k in a row):  desc_k(at + 32·step), further rows follow at
                                                     once; k + 64 is in the next panel
       the k axis (64 elements of M or N in a row):  desc_mn(at + 2048·step, panel), `panel` the
                                                     bytes from one panel of 64 columns to the next;
                                                     product with mn = true

   Products are asynchronous: wgmma_fence() before the first one (after registers they read or add
   to were written by others), wgmma_commit() closes a batch, wgmma_wait<n>() leaves n batches
   running; then wgmma_keep(d) of what was awaited, so that the compiler does not read the registers
   earlier. What the awaited ones read of shared memory may be given back.
 */
#pragma once
#include "mbarrier.cuh"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

namespace rgk {

__device__ __forceinline__ uint64_t desc_make(uint32_t at, uint32_t leading, uint32_t stride) {
  return (uint64_t)1 << 62 | (uint64_t)(stride >> 4) << 32 | (uint64_t)(leading >> 4) << 16 |
         (at & 0x3ffff) >> 4;
}
__device__ __forceinline__ uint64_t desc_k(uint32_t at) {
  return desc_make(at, 16, 1024);
}
__device__ __forceinline__ uint64_t desc_mn(uint32_t at, uint32_t panel) {
  return desc_make(at, panel, 1024);
}
/* The same, `bytes` further on. */
__device__ __forceinline__ uint64_t desc_on(uint64_t d, uint32_t bytes) {
  return (d & 0xffffffff00000000u) | ((uint32_t)d + (bytes >> 4));
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int n> __device__ __forceinline__ waited wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
  return {};
}
template <int n> __device__ __forceinline__ void wgmma_keep(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int n> __device__ __forceinline__ void wgmma_keep(uint32_t (&a)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) asm volatile("" : "+r"(a[i])::"memory");
}

/* f(x, i, column) for each accumulator: i is 0 or 1, the first or the second of the thread's rows;
 * columns count from the thread's first, 2(l%4), and are known to the compiler. */
template <int n, class F> __device__ __forceinline__ void each(float (&d)[n], F f) {
#pragma unroll
  for (int x = 0; x < n; x++) f(d[x], x / 2 % 2, x / 4 * 8 + x % 2);
}

/* Two floats in one word, the first in the low half. */
template <class T> __device__ __forceinline__ uint32_t pack2(float x, float y);
template <> __device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float x, float y) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
  return r;
}
template <> __device__ __forceinline__ uint32_t pack2<__half>(float x, float y) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
  return r;
}

/* Eight neighbouring accumulators, four 8 x 8 tiles of T, to shared memory. */
template <class T> __device__ __forceinline__ void store_matrices(uint32_t at, const float *x) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
  store_matrices(at, w);
}

template <class T> __device__ __forceinline__ float2 unpack2(uint32_t x) {
  if constexpr (std::is_same_v<T, __half>) return __half22float2(*(const __half2 *)&x);
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}

/* wgmma<T, N>::ss<mn of A, mn of B>(d, desc A, desc B, add) and ::rs<mn of B>(d, A, desc B, add);
 * add false: D = A B. */
template <class T, int N> struct wgmma;

/* Operand lists: ten registers a line. */
#define RGK_D10(t)                                                                                 \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9"
#define RGK_D0     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9"
#define RGK_D30    RGK_D0 ", " RGK_D10(1) ", " RGK_D10(2)
#define RGK_D60    RGK_D30 ", " RGK_D10(3) ", " RGK_D10(4) ", " RGK_D10(5)
#define RGK_D80    RGK_D60 ", " RGK_D10(6) ", " RGK_D10(7)
#define RGK_D120   RGK_D80 ", " RGK_D10(8) ", " RGK_D10(9) ", " RGK_D10(10) ", " RGK_D10(11)
#define RGK_F4(i)  "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define RGK_F8(i)  RGK_F4(i), RGK_F4((i) + 4)
#define RGK_F16(i) RGK_F8(i), RGK_F8((i) + 8)
#define RGK_F32(i) RGK_F16(i), RGK_F16((i) + 16)
#define RGK_F64(i) RGK_F32(i), RGK_F32((i) + 32)

/* N, "its registers", their constraints, and the numbers of the seven operands after them. */
#define RGK_WGMMA_OF(T, name, N, REGS, D, o0, o1, o2, o3, o4, o5, o6)                           \
  template <> struct wgmma<T, N> {                                                              \
    template <bool a_mn = false, bool b_mn = false>                                             \
    static __device__ __forceinline__ void ss(float (&d)[N / 2], uint64_t a, uint64_t b,        \
                                              int add) {                                        \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #o2 ", 0;\n\t"                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" REGS    \
                   "}, %" #o0 ", %" #o1 ", p, 1, 1, %" #o3 ", %" #o4 ";\n\t}"                   \
                   : RGK_PASS D                                                                 \
                   : "l"(a), "l"(b), "r"(add), "n"((int)a_mn), "n"((int)b_mn));                 \
    }                                                                                           \
    template <bool b_mn = false>                                                                \
    static __device__ __forceinline__ void rs(float (&d)[N / 2], const uint32_t *a, uint64_t b, \
                                              int add) {                                        \
      asm volatile(                                                                             \
          "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #o5 ", 0;\n\t"                               \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" REGS "}, {%" #o0 \
          ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, %" #o6 ";\n\t}"                  \
          : RGK_PASS D                                                                          \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"((int)b_mn));      \
    }                                                                                           \
  };
#define RGK_PASS(...) __VA_ARGS__
#define RGK_WGMMA(N, REGS, D, ...)                             \
  RGK_WGMMA_OF(__nv_bfloat16, "bf16", N, REGS, D, __VA_ARGS__) \
  RGK_WGMMA_OF(__half, "f16", N, REGS, D, __VA_ARGS__)

RGK_WGMMA(16, "%0, %1, %2, %3, %4, %5, %6, %7", (RGK_F8(0)), 8, 9, 10, 11, 12, 13, 14)
RGK_WGMMA(32, RGK_D0 ", %10, %11, %12, %13, %14, %15", (RGK_F16(0)), 16, 17, 18, 19, 20, 21, 22)
RGK_WGMMA(64, RGK_D30 ", %30, %31", (RGK_F32(0)), 32, 33, 34, 35, 36, 37, 38)
RGK_WGMMA(80, RGK_D30 ", " RGK_D10(3), (RGK_F32(0), RGK_F8(32)), 40, 41, 42, 43, 44, 45, 46)
RGK_WGMMA(96, RGK_D30 ", " RGK_D10(3) ", %40, %41, %42, %43, %44, %45, %46, %47",
          (RGK_F32(0), RGK_F16(32)), 48, 49, 50, 51, 52, 53, 54)
RGK_WGMMA(112, RGK_D30 ", " RGK_D10(3) ", " RGK_D10(4) ", %50, %51, %52, %53, %54, %55",
          (RGK_F32(0), RGK_F16(32), RGK_F8(48)), 56, 57, 58, 59, 60, 61, 62)
RGK_WGMMA(128, RGK_D60 ", %60, %61, %62, %63", (RGK_F64(0)), 64, 65, 66, 67, 68, 69, 70)
RGK_WGMMA(160, RGK_D80, (RGK_F64(0), RGK_F16(64)), 80, 81, 82, 83, 84, 85, 86)
RGK_WGMMA(176, RGK_D80 ", %80, %81, %82, %83, %84, %85, %86, %87",
          (RGK_F64(0), RGK_F16(64), RGK_F8(80)), 88, 89, 90, 91, 92, 93, 94)
RGK_WGMMA(192, RGK_D80 ", " RGK_D10(8) ", %90, %91, %92, %93, %94, %95", (RGK_F64(0), RGK_F32(64)),
          96, 97, 98, 99, 100, 101, 102)
RGK_WGMMA(256, RGK_D120 ", %120, %121, %122, %123, %124, %125, %126, %127",
          (RGK_F64(0), RGK_F64(64)), 128, 129, 130, 131, 132, 133, 134)

#undef RGK_WGMMA
#undef RGK_WGMMA_OF
#undef RGK_PASS
#undef RGK_D10
#undef RGK_D0
#undef RGK_D30
#undef RGK_D60
#undef RGK_D80
#undef RGK_D120
#undef RGK_F4
#undef RGK_F8
#undef RGK_F16
#undef RGK_F32
#undef RGK_F64
} // namespace rgk
