/* ops/ops.c: element conversion and tiles; see ops.h. */
#include "ops.h"

float rgi_f16_to_f32(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu,
           u;
  if (exponent == 31) {
    u = sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0);
  } else if (exponent) {
    u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    float f = (float)mantissa * 0x1p-24f; /* zero and subnormals are exact */
    memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}

uint16_t rgi_f32_to_f16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((a >> 13) & 0x1ffu));
  if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds to 65536 or more: infinity */
  /* subnormal half: let the FPU round at 2^-24 */
  if (a < 0x38800000u) {
    float scaled;
    memcpy(&scaled, &a, 4);
    scaled += 0.5f; /* 0.5 has ulp 2^-24 */
    memcpy(&a, &scaled, 4);
    return (uint16_t)(sign | (a - 0x3f000000u));
  }
  a += 0xfffu + ((a >> 13) & 1u);
  return (uint16_t)(sign | ((a - 0x38000000u) >> 13));
}

void rgi_load(float *dst, rg_dtype type, const void *src, int64_t n) {
  const uint16_t *h = src;
  switch (type) {
  case RG_F32: memcpy(dst, src, (size_t)n * 4); break;
  case RG_BF16:
    for (int64_t i = 0; i < n; i++) dst[i] = rgi_bf16_to_f32(h[i]);
    break;
  default:
    for (int64_t i = 0; i < n; i++) dst[i] = rgi_f16_to_f32(h[i]);
    break;
  }
}

void rgi_store(void *dst, rg_dtype type, const float *src, int64_t n) {
  uint16_t *h = dst;
  switch (type) {
  case RG_F32: memcpy(dst, src, (size_t)n * 4); break;
  case RG_BF16:
    for (int64_t i = 0; i < n; i++) h[i] = rgi_f32_to_bf16(src[i]);
    break;
  default:
    for (int64_t i = 0; i < n; i++) h[i] = rgi_f32_to_f16(src[i]);
    break;
  }
}

void rgi_store_add(float *dst, const float *src, int64_t n) {
  for (int64_t i = 0; i < n; i++) dst[i] += src[i];
}

void rg_convert(rg_dtype to, void *dst, rg_dtype from, const void *src, size_t n) {
  if (to == from) {
    memcpy(dst, src, n * rg_dtype_size(to));
  } else if (from == RG_F32 && to != RG_I32) {
    rgi_store(dst, to, src, (int64_t)n);
  } else if (to == RG_F32 && from != RG_I32) {
    rgi_load(dst, from, src, (int64_t)n);
  }
}

int64_t rgi_fill_tiles(rgi_tile *tiles, const int32_t *cu, int64_t nseq, int64_t tile) {
  int64_t count = 0;
  for (int64_t b = 0; b < nseq; b++) {
    int64_t length = cu[b + 1] - cu[b];
    for (int64_t first = 0; first < length; first += tile) {
      int64_t n = length - first < tile ? length - first : tile;
      tiles[count++] =
          (rgi_tile){.b = (int32_t)b, .n = (int32_t)n, .row = cu[b] + first, .first = first};
    }
  }
  return count;
}
