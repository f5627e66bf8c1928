/* ops/cpu_attn_avx512.c: attention's vector kernels for x86 with AVX-512 (F, BW, DQ, VL). */
#include "cpu_attn.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include <immintrin.h>

#define W     16
#define NV    4
#define TABLE rgi_attn_avx512
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

static inline float s_fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
static inline vf v_set(float x) {
  return (vf)_mm512_set1_ps(x);
}
static inline vf v_fma(vf a, vf b, vf c) {
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
static inline vf v_max(vf a, vf b) {
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
}
static inline float v_hmax(vf a) {
  return _mm512_reduce_max_ps((__m512)a);
}
static inline vf v_round(vf a) {
  return (vf)_mm512_roundscale_ps((__m512)a, 8);
} /* nearest even, quiet */
static inline vf v_exp2i(vf n) {
  return (vf)_mm512_scalef_ps(_mm512_set1_ps(1), (__m512)n);
}
static inline vf v_load_half(const uint16_t *h, bool bf16) {
  __m256i x = _mm256_loadu_si256((const __m256i *)h);
  return bf16 ? (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16) : (vf)_mm512_cvtph_ps(x);
}

#include "cpu_attn_simd.h"
#else
typedef int rgi_attn_no_avx512;
#endif
