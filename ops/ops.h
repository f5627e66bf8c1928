/* ops/ops.h: what op files share on the CPU: element conversion, strided rows, tiles of packed
 * sequences. */
#ifndef RGI_OPS_H
#define RGI_OPS_H

#include "../graph/base.h"
#include <math.h>
#include <string.h>

/* ---- elements ---- */

static inline float rgi_bf16_to_f32(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t rgi_f32_to_bf16(float f) { /* nearest even; NaN stays a quiet NaN */
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
float rgi_f16_to_f32(uint16_t h);
uint16_t rgi_f32_to_f16(float f);

/* n contiguous elements to and from float; float to float is a copy. */
void rgi_load(float *dst, rg_dtype type, const void *src, int64_t n);
void rgi_store(void *dst, rg_dtype type, const float *src, int64_t n);
/* dst (f32) += src */
void rgi_store_add(float *dst, const float *src, int64_t n);

/* Address of element (i, j) of a tensor of rank >= 2, of (i) otherwise; the last axis is
 * contiguous. */
static inline void *rgi_at(const rg_arg *a, int64_t i, int64_t j) {
  int64_t e = i * a->stride[0] + (a->rank > 1 ? j * a->stride[1] : 0);
  return (char *)a->data + e * (int64_t)rg_dtype_size(a->dtype);
}

/* What covers [start, start + extent) of an axis. While nothing but shapes is asked about there is
 * no address, and there is none of the part. */
static inline rg_arg rgi_slice(const rg_arg *a, int axis, int64_t start, int64_t extent) {
  rg_arg part = *a;
  const int64_t bytes = start * a->stride[axis] * (int64_t)rg_dtype_size(a->dtype);
  if (a->data) part.data = (char *)a->data + bytes;
  part.dim[axis] = extent;
  while (part.align > 1 && bytes % part.align) part.align /= 2;
  return part;
}

/* Element i of a list port, or NULL if absent. */
static inline const rg_arg *rgi_in_at(const rg_call *c, int port, int i) {
  const rg_arg *a = i < rg_in_count(c, port) ? &c->in[c->in_begin[port] + i] : NULL;
  return a && a->rank >= 0 ? a : NULL;
}
static inline const rg_arg *rgi_out_at(const rg_call *c, int port, int i) {
  const rg_arg *a = i < rg_out_count(c, port) ? &c->out[c->out_begin[port] + i] : NULL;
  return a && a->rank >= 0 ? a : NULL;
}

/* ---- sequences ---- */

/* A tile: rows [row, row + n) of the pack, which are positions [first, first + n) of sequence b. */
typedef struct rgi_tile {
  int32_t b;
  int32_t n;
  int64_t row, first;
} rgi_tile;

/* Most tiles any lengths can give: what a workspace must hold. */
static inline int64_t rgi_tile_capacity(int64_t rows, int64_t sequences, int64_t tile) {
  int64_t c = rows / tile + sequences; /* one ragged tile per sequence */
  return c < rows ? c : rows;
}
/* Fills tiles (relative to each sequence's start) and returns their number. cu [nseq+1]. */
int64_t rgi_fill_tiles(rgi_tile *tiles, const int32_t *cu, int64_t nseq, int64_t tile);

/* ---- workspaces ---- */

#define RGI_ROUND256(n) (((size_t)(n) + 255) & ~(size_t)255)

/* Cuts a workspace into 256-byte aligned pieces; with base NULL only counts. */
typedef struct rgi_cut {
  char *base;
  size_t used;
} rgi_cut;
static inline void *rgi_take(rgi_cut *w, size_t bytes) {
  void *p = w->base ? w->base + w->used : NULL;
  w->used += RGI_ROUND256(bytes);
  return p;
}

#endif
