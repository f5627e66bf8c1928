/* ops/cpu/attn_avx512.c: attention's vector kernels for x86 with AVX-512 (F, BW, DQ, VL). */
#include "attn.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define W      16
#define NV     4
#define TABLE  rgi_attn_avx512
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

RGI_INLINE TARGET float s_fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
RGI_INLINE TARGET vf v_set(float x) {
  return (vf)_mm512_set1_ps(x);
}
RGI_INLINE TARGET vf v_fma(vf a, vf b, vf c) {
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
RGI_INLINE TARGET vf v_max(vf a, vf b) {
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
}
RGI_INLINE TARGET float v_hmax(vf a) {
  return _mm512_reduce_max_ps((__m512)a);
}
/* nearest even, quiet */
RGI_INLINE TARGET vf v_round(vf a) {
  return (vf)_mm512_roundscale_ps((__m512)a, 8);
}
RGI_INLINE TARGET vf v_exp2i(vf n) {
  return (vf)_mm512_scalef_ps(_mm512_set1_ps(1), (__m512)n);
}
RGI_INLINE TARGET vf v_load_half(const uint16_t *h, bool bf16) {
  __m256i x = _mm256_loadu_si256((const __m256i *)h);
  return bf16 ? (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16) : (vf)_mm512_cvtph_ps(x);
}

#include "attn_simd.h"
#else
typedef int rgi_attn_no_avx512;
#endif
