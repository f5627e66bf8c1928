/* memplan/pack.h: the packer alone: intervals with sizes in, offsets out. Knows nothing of
 * graphs. */
#ifndef RGI_PACK_H
#define RGI_PACK_H

#include "../graph/base.h"

/* Exact branch and bound with a time limit, from a greedy start. Never worse than greedy by
 * size. */
rg_status rgi_pack(const rg_context *ctx, rg_buffer *b, size_t n, const rg_pack_options *o,
                   rg_pack_result *r, rg_error *e);
/* First fit in order of decreasing size: the baseline. */
rg_status rgi_pack_greedy(const rg_context *ctx, rg_buffer *b, size_t n, int64_t align,
                          int64_t *peak, rg_error *e);

#endif
