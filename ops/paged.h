/* ops/paged.h: what ops over pages take from paged_batch, and how they find a row in its page.
 *
 * paged_batch has looked at all of it, but an op believes no numbers that come as a tensor: a
 * sequence that paged_batch would have refused has no tokens here either.
 */
#ifndef RGI_PAGED_H
#define RGI_PAGED_H

#include "ops.h"

/* Sequences in pages. */
typedef struct rgi_paged {
  const int32_t *cu;             /* [B+1]: rows of this step */
  const rg_arg *context, *pages; /* [B] tokens so far; [B, M] */
  int64_t page, P;               /* tokens of a page, pages there are */
} rgi_paged;

static inline const int32_t *rgi_paged_table(const rgi_paged *p, int64_t b) {
  return (const int32_t *)p->pages->data + b * p->pages->stride[0];
}

/* Tokens of sequence b so far; 0 where length, context and table don't go together. */
static inline int64_t rgi_paged_tokens(const rgi_paged *p, int64_t b) {
  const int64_t tokens = *(const int32_t *)rgi_at(p->context, b, 0), M = p->pages->dim[1];
  const int32_t *table = rgi_paged_table(p, b);
  if (tokens > M * p->page || tokens < p->cu[b + 1] - p->cu[b]) return 0;
  for (int64_t m = 0; m * p->page < tokens; m++)
    if (table[m] < 0 || table[m] >= p->P) return 0;
  return tokens;
}

/* Row r of a sequence's rows in cache [P, rows of a page, KH, width], head h. */
static inline char *rgi_paged_row(const rg_arg *cache, const int32_t *table, int64_t r, int64_t h) {
  const int64_t page = table[r / cache->dim[1]];
  return (char *)cache->data +
         (page * cache->stride[0] + r % cache->dim[1] * cache->stride[1] + h * cache->stride[2]) *
             (int64_t)rg_dtype_size(cache->dtype);
}

/* Ports of what a step does to its caches. */
enum { RGI_BATCH_ROWS, RGI_BATCH_CACHE, RGI_BATCH_LENGTHS, RGI_BATCH_CONTEXT, RGI_BATCH_PAGES };
enum { RGI_BATCH_STARTS, RGI_BATCH_OFFSET, RGI_BATCH_CHECKED, RGI_BATCH_TABLE, RGI_BATCH_LAST };
enum {
  RGI_APPEND_K,
  RGI_APPEND_V,
  RGI_APPEND_STARTS,
  RGI_APPEND_CONTEXT,
  RGI_APPEND_PAGES,
  RGI_APPEND_K_CACHE,
  RGI_APPEND_V_CACHE
};
enum {
  RGI_KVC_K_CACHE,
  RGI_KVC_V_CACHE,
  RGI_KVC_K_WEIGHT,
  RGI_KVC_V_WEIGHT,
  RGI_KVC_CU,
  RGI_KVC_CONTEXT,
  RGI_KVC_PAGES,
  RGI_KVC_K_CMP,
  RGI_KVC_V_CMP,
  RGI_KVC_ROWS
};
enum { RGI_COPY_CACHE, RGI_COPY_PAGES };

/* The last ports of an op over pages. */
#define RGI_PAGED_IN                                                                               \
  {"context", "B1-1", 0, RG_D(RG_I32), 0, -1, "tokens of each sequence so far, these included"}, { \
    "pages", "B1-1,M", 0, RG_D(RG_I32), 0, -1, "each sequence's pages, in order"                   \
  }

/* The state of a step that appends and compresses: before, and after. */
/* clang-format off */
#define RGI_KV_STATE_IN                                                                            \
  {"k_cache", "P,page,KH,D", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "keys in pages"},                 \
  {"v_cache", "P,page,KH,E", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "values in pages"},               \
  {"k_cmp", "P,R,KH,D", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "compressed keys, R = page/stride"},   \
  {"v_cmp", "P,R,KH,E", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "compressed values"},                  \
  {"rows", "*", RG_PORT_OPTIONAL, RG_D_FLOAT | RG_D(RG_I32), 0, -1, "as kv_compress's"}
#define RGI_KV_STATE_OUT                                                                           \
  {"k_cache", "P,page,KH,D", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "the same with this step's"},     \
  {"v_cache", "P,page,KH,E", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "the same with this step's"},     \
  {"k_cmp", "P,R,KH,D", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "the same with the new blocks"},       \
  {"v_cmp", "P,R,KH,E", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "the same with the new blocks"}
/* clang-format on */

#endif
