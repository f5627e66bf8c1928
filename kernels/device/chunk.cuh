/* device/chunk.cuh: eight consecutive elements at a time.

   chunk<T> holds eight elements of type T as they lie in memory, read 16 bytes at a time.
   chunk<void> reads memory of any alignment and a type known at run time, element by element, and
   may hold fewer than eight (the rest counts as 0). A kernel written over chunks gives the same
   bits with either: which lane owns which elements, and so the order of every sum, stays the same.
 */
#pragma once
#include "element.cuh"

namespace rgk {

enum { CHUNK = 8 };

/* Two 16-bit elements of a word, the lower first. */
__device__ __forceinline__ float2 unpack(uint32_t u, __nv_bfloat16) {
  return make_float2(__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack(uint32_t u, __half) {
  return __half22float2(*reinterpret_cast<const __half2 *>(&u));
}
__device__ __forceinline__ uint32_t pack(float lo, float hi, __nv_bfloat16) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t *>(&v);
}
__device__ __forceinline__ uint32_t pack(float lo, float hi, __half) {
  __half2 v = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t *>(&v);
}

template <class T> struct chunk {
  uint4 q[sizeof(T) / 2];

  __device__ __forceinline__ void load(const void *p, int, int64_t at, int) {
    const uint4 *from = reinterpret_cast<const uint4 *>((const T *)p + at);
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) q[i] = from[i];
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) q[i] = make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void get(float (&x)[CHUNK]) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        x[4 * i] = __uint_as_float(q[i].x), x[4 * i + 1] = __uint_as_float(q[i].y);
        x[4 * i + 2] = __uint_as_float(q[i].z), x[4 * i + 3] = __uint_as_float(q[i].w);
      }
    } else {
      const uint32_t word[4] = {q[0].x, q[0].y, q[0].z, q[0].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float2 v = unpack(word[i], T());
        x[2 * i] = v.x, x[2 * i + 1] = v.y;
      }
    }
  }
};

template <> struct chunk<void> {
  float v[CHUNK];

  __device__ __forceinline__ void load(const void *p, int dtype, int64_t at, int n) {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) v[i] = i < n ? rgk::load(p, dtype, at + i) : 0.0f;
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) v[i] = 0;
  }
  __device__ __forceinline__ void get(float (&x)[CHUNK]) const {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) x[i] = v[i];
  }
};

template <class T>
__device__ __forceinline__ void store16(void *p, int64_t at, const float (&x)[CHUNK]) {
  *reinterpret_cast<uint4 *>((T *)p + at) = make_uint4(
      pack(x[0], x[1], T()), pack(x[2], x[3], T()), pack(x[4], x[5], T()), pack(x[6], x[7], T()));
}

/* Stores a chunk in the type `dtype`, or adds it to the fp32 sums that are there. T void: n
 * elements, one by one; else eight, on 16 bytes. */
template <class T>
__device__ __forceinline__ void put(void *p, int dtype, int64_t at, const float (&x)[CHUNK], int n,
                                    bool add) {
  if constexpr (std::is_void_v<T>) {
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
      if (i < n) put_grad(p, dtype, at + i, x[i], add);
  } else if (dtype == RG_F32) {
    float4 *to = reinterpret_cast<float4 *>((float *)p + at);
    float4 a = make_float4(x[0], x[1], x[2], x[3]), b = make_float4(x[4], x[5], x[6], x[7]);
    if (add) {
      const float4 c = to[0], d = to[1];
      a.x = __fadd_rn(c.x, a.x), a.y = __fadd_rn(c.y, a.y), a.z = __fadd_rn(c.z, a.z),
      a.w = __fadd_rn(c.w, a.w);
      b.x = __fadd_rn(d.x, b.x), b.y = __fadd_rn(d.y, b.y), b.z = __fadd_rn(d.z, b.z),
      b.w = __fadd_rn(d.w, b.w);
    }
    to[0] = a, to[1] = b;
  } else if (dtype == RG_F16) {
    store16<__half>(p, at, x);
  } else {
    store16<__nv_bfloat16>(p, at, x);
  }
}

__device__ __forceinline__ void zero(float (&x)[CHUNK]) {
#pragma unroll
  for (int i = 0; i < CHUNK; i++) x[i] = 0;
}

/* Sum over groups of `lanes` (a power of two, at most 32) neighbouring lanes; every lane gets it,
 * with the same bits. All lanes of the warp take part. */
__device__ __forceinline__ float sum_lanes(float x, int lanes) {
  for (int step = lanes >> 1; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

/* n / d for n >= 0, d > 0: in 32 bits where both fit. */
__device__ __forceinline__ int64_t divide(int64_t n, int64_t d) {
  return (uint64_t)(n | d) >> 32 ? n / d : (int64_t)((uint32_t)n / (uint32_t)d);
}

} // namespace rgk
