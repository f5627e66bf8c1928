/* kernels/tma.h: tensor maps, which tell Hopper's copy engine (device/tma.cuh) how a tensor lies in
   memory.

   A map is made on the host from an address, extents and strides, and travels inside a kernel's
   parameters. A box of it is copied at a time; what a box holds outside the extents arrives as
   zeros.
 */
#ifndef RGK_TMA_H
#define RGK_TMA_H

#include "kernels.h"

enum { RGK_MAP_RANK = 5 };

/* The 128 bytes of a CUtensorMap. The copy engine wants them on a 64-byte boundary. */
typedef struct rgk_map {
#ifdef __cplusplus
  alignas(64)
#else
  _Alignas(64)
#endif
      uint64_t opaque[16];
} rgk_map;

/* What a map describes; axis 0 is the dense one. With `swizzle` of 32, 64 or 128 bytes, box[0]
 * elements must be at most that long. The address and the strides are multiples of 16 bytes. */
typedef struct rgk_map_of {
  const void *data;
  int32_t dtype, rank;
  int64_t dim[RGK_MAP_RANK];
  int64_t stride[RGK_MAP_RANK]; /* in elements; stride[0] is 1, not looked at */
  int32_t box[RGK_MAP_RANK];    /* at most 256 each */
  int32_t swizzle;              /* bytes; 0: none */
} rgk_map_of;

/* A tensor [rows, heads, width] as axes (width, head, row), in boxes of 128 bytes of one head by
 * `rows`. */
static inline rgk_map_of rgk_map_rows(rgk_tensor t, int64_t n, int64_t heads, int64_t width,
                                      int32_t box) {
  rgk_map_of m = {0, 0, 3, {0}, {0}, {0}, 128};
  m.data = t.data;
  m.dtype = t.dtype;
  m.dim[0] = width, m.dim[1] = heads, m.dim[2] = n;
  m.stride[0] = 1, m.stride[1] = t.head, m.stride[2] = t.row;
  m.box[0] = 128 / (int32_t)(t.dtype == RG_F32 ? 4 : 2), m.box[1] = 1, m.box[2] = box;
  return m;
}

#ifdef REGRAPH_CUDA
RGK_EXTERN rg_status rgk_map_make(rgk_map *map, const rgk_map_of *of, rg_error *e);
#else
static inline rg_status rgk_map_make(rgk_map *map, const rgk_map_of *of, rg_error *e) {
  (void)map, (void)of, (void)e;
  return RG_E_DEVICE;
}
#endif

#endif
