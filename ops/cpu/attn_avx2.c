/* ops/cpu/attn_avx2.c: attention's vector kernels for x86 with AVX2, FMA and F16C. */
#include "attn.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define W      8
#define NV     2
#define TABLE  rgi_attn_avx2
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));

RGI_INLINE TARGET float s_fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
RGI_INLINE TARGET vf v_set(float x) {
  return (vf)_mm256_set1_ps(x);
}
RGI_INLINE TARGET vf v_fma(vf a, vf b, vf c) {
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
RGI_INLINE TARGET vf v_max(vf a, vf b) {
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
}
RGI_INLINE TARGET float v_hmax(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
/* nearest even, quiet */
RGI_INLINE TARGET vf v_round(vf a) {
  return (vf)_mm256_round_ps((__m256)a, 8);
}
RGI_INLINE TARGET vf v_exp2i(vf n) {
  return (vf)_mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32((__m256)n), _mm256_set1_epi32(127)), 23);
}
RGI_INLINE TARGET vf v_load_half(const uint16_t *h, bool bf16) {
  __m128i x = _mm_loadu_si128((const __m128i *)h);
  return bf16 ? (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16) : (vf)_mm256_cvtph_ps(x);
}

#include "attn_simd.h"
#else
typedef int rgi_attn_no_avx2;
#endif
