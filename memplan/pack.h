/* memplan/pack.h: the packer alone: intervals with sizes in, offsets out. Knows nothing of
 * graphs. */
#ifndef RGI_PACK_H
#define RGI_PACK_H

#include "../graph/base.h"

/* Exact branch and bound, from a greedy start. Never worse than greedy by size. It is limited by
 * o->seconds or, where `work` is not NULL, by what is left of *work, which it takes from: in
 * nanoseconds of some core, but the same packing on every machine, however busy. */
rg_status rgi_pack(const rg_context *ctx, rg_buffer *b, size_t n, const rg_pack_options *o,
                   int64_t *work, rg_pack_result *r, rg_error *e);
/* First fit in order of decreasing size: the baseline. */
rg_status rgi_pack_greedy(const rg_context *ctx, rg_buffer *b, size_t n, int64_t align,
                          int64_t *peak, rg_error *e);

#endif
