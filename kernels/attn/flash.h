/* kernels/attn/flash.h: attention forward on Hopper, for keys that a query sees as one
 * contiguous range (swa, cmp). */
#ifndef RGK_FLASH_H
#define RGK_FLASH_H

#include "attn.h"
#include "../pages.h"
#include "../tma.h"

/* Instances, narrowest first: widths of q·k and of v, warpgroups (of 64 query rows each), keys of a
 * tile. A call takes the first that holds it; what its rows lack arrives as zeros. */
#define RGK_FLASH_INSTANCES(X) \
  X(64, 64, 2, 128)            \
  X(64, 128, 2, 128)           \
  X(96, 96, 2, 128)            \
  X(128, 128, 2, 128)          \
  X(192, 128, 2, 112)          \
  X(256, 256, 2, 80)

enum { RGK_FLASH_BOX = 64 }; /* rows of q that one warpgroup owns, and its copies fetch */

/* Shared memory: q, two stages of K and V, and, where it fits, o on its way out
 * (else it goes through q's). */
#define RGK_FLASH_PANELS(d) (((d) + 63) / 64)
#define RGK_FLASH_NO_O(D, E, groups, keys) \
  ((groups)*8192 * RGK_FLASH_PANELS(D) +   \
   256 * (keys) * (RGK_FLASH_PANELS(D) + RGK_FLASH_PANELS(E)) + 2048)
#define RGK_FLASH_O(E, groups) ((groups)*8192 * RGK_FLASH_PANELS(E))
#define RGK_FLASH_OWN_O(D, E, groups, keys) \
  (RGK_FLASH_NO_O(D, E, groups, keys) + RGK_FLASH_O(E, groups) <= 227 * 1024)
#define RGK_FLASH_BYTES(D, E, groups, keys) \
  (RGK_FLASH_NO_O(D, E, groups, keys) +     \
   (RGK_FLASH_OWN_O(D, E, groups, keys) ? RGK_FLASH_O(E, groups) : 0))

typedef struct rgk_flash_params {
  rgk_map q, k, v, o_map;
  rgk_tensor o, lse, sinks; /* [T, H, E], [T, H], [H] */
  rgk_seqs seqs, kseqs;
  const int32_t *offset;
  int64_t S, window_left;
  int32_t mode, slots, H, E, kernel; /* slots of row tiles, see kernels.h */
  /* cmp: rows that key tiles begin before a sequence's first key, kernel/stride − 1 */
  int32_t before;
  /* over pages: rows of a tile are 2^pack heads of each of so many tokens, side by side */
  int32_t pack, tokens;
  rgk_divisor by_heads, by_group, by_stride; /* H (over pages: H / 2^pack), G, stride */
  float scale, softcap;
} rgk_flash_params;

/* The same over pages: row r of a sequence, the `before` rows of cmp counted, is row r % rows of
 * page table[b, r / rows]. k and v are maps of (64 columns, row of a page, panel, head, page) in
 * boxes of eight rows and all panels, so a tile lies eight rows by eight rows. Of numbers that
 * don't go together the lengths count as no tokens; a page that is none has rows of zeros. */
typedef struct rgk_flash_paged {
  rgk_flash_params f; /* kseqs, offset and S are not looked at */
  rgk_pages pages;
  rgk_divisor by_rows;
} rgk_flash_paged;

/* Steps of single tokens take one warpgroup, and a third stage where it fits. */
#define RGK_FLASH_STAGES(D, E, groups, keys)                                     \
  ((groups) == 1 && RGK_FLASH_OWN_O(D, E, groups, keys) &&                       \
           RGK_FLASH_NO_O(D, E, groups, keys) + RGK_FLASH_O(E, groups) +         \
                   128 * (keys) * (RGK_FLASH_PANELS(D) + RGK_FLASH_PANELS(E)) <= \
               227 * 1024                                                        \
       ? 3                                                                       \
       : 2)
#define RGK_FLASH_SHARED(D, E, groups, keys)                                                \
  (RGK_FLASH_BYTES(D, E, groups, keys) + (RGK_FLASH_STAGES(D, E, groups, keys) - 2) * 128 * \
                                             (keys) * (RGK_FLASH_PANELS(D) + RGK_FLASH_PANELS(E)))

/* NULL where there is no such instance. */
RGK_GETTER(rgk_flash_fwd(rg_dtype type, int32_t D, int32_t E))
RGK_GETTER(rgk_flash_fwd_paged(rg_dtype type, int32_t D, int32_t E, int groups))

#endif
