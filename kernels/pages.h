/* kernels/pages.h: where keys lie that stand in pages: what every kernel over pages is told. */
#ifndef RGK_PAGES_H
#define RGK_PAGES_H

#include "kernels.h"

/* Row r of sequence b is row r % rows of page table[b, r / rows]; key j stands in row j + before.
 * Numbers that come as tensors are not believed: a sequence whose context, length and table don't
 * go together has no tokens. */
typedef struct rgk_pages {
  const int32_t *context; /* [n]: tokens so far, those of this step included */
  const int32_t *table;   /* [n, most]; NULL: keys are not in pages */
  int64_t context_step, table_row;
  int32_t tokens, rows; /* of a page */
  int32_t most, count;  /* pages of a sequence, pages there are */
  int32_t before, zero;
  int64_t k_page, v_page; /* from page to page of the two caches, in elements */
} rgk_pages;

/* Of a cache [P, rows, heads, width]; a page apart it is a tensor [rows, heads, width]. */
static inline rgk_tensor rgk_page_of(const rg_arg *a) {
  rgk_tensor t = {a->data, a->stride[1], a->stride[2], (int32_t)a->dtype, 0};
  return t;
}

#endif
