/* ops/cpu/attn_base.c: attention's vector kernels in portable C, for any CPU with 128-bit
 * vectors. */
#include "attn.h"

#define TARGET
#define W     4
#define NV    2
#define TABLE rgi_attn_base
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

RGI_INLINE TARGET float s_fma(float a, float b, float c) {
  return a * b + c;
}
RGI_INLINE TARGET vf v_set(float x) {
  return (vf){x, x, x, x};
}
RGI_INLINE TARGET vf v_fma(vf a, vf b, vf c) {
  return a * b + c;
}
RGI_INLINE TARGET vf v_max(vf a, vf b) {
  vi m = (vi)(a > b);
  return (vf)((m & (vi)a) | (~m & (vi)b));
}
RGI_INLINE TARGET float v_hmax(vf a) {
  float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
/* Adding 1.5 * 2^23 leaves no room for a fraction. */
RGI_INLINE TARGET vf v_round(vf a) {
  return (a + 0x1.8p23f) - 0x1.8p23f;
}
RGI_INLINE TARGET vf v_exp2i(vf n) {
  /* a NaN has no integer; NOLINTNEXTLINE(misc-redundant-expression) */
  vf safe = (vf)((vi)(n == n) & (vi)n);
  return (vf)((__builtin_convertvector(safe, vi) + 127) << 23);
}
RGI_INLINE TARGET vf v_load_half(const uint16_t *h, bool bf16) {
  vf v;
  for (int i = 0; i < W; i++) v[i] = bf16 ? rgi_bf16_to_f32(h[i]) : rgi_f16_to_f32(h[i]);
  return v;
}

#include "attn_simd.h"
