/* ops/live.c: what graph/lengths.c puts before views behind which nobody could tell dead rows: a
 * copy in which they are zero, and lengths of rows that are several for each of other rows. / */
#include "../graph/autodiff.h"
#include "cpu/rows.h"
#include "cuda/rows.h"

static void cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.bytes = rgi_call_bytes(c)};
}

/* ---- live: dead rows := 0, forward as backward ---- */

static rg_status live_backward(rgi_backward *b, int node, rg_error *e) {
  int gradient = rgi_bwd_gradient(b, node, 0);
  if (gradient < 0) return RG_OK;
  RGI_TRY(rgi_bwd_masked(b, gradient, rgi_in(&rgi_bwd_graph(b)->node[node], 1), &gradient, e));
  return rgi_bwd_give(b, node, 0, gradient, -1, 0, e);
}

static const rg_port live_in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT | RG_D(RG_I32), 'X', -1, "any tensor with sequences"},
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "sequence starts"},
};
static const rg_port live_out[] = {
    {"y", "...", RG_PORT_ROWS, RG_D_FLOAT | RG_D(RG_I32), 'X', -1,
     "a dense copy, zero past the last token"},
};
static const rgi_rules live_rules = {.backward = live_backward};
const rg_op rgi_op_live = {.abi = RG_OP_ABI,
                           .name = "live",
                           .doc = "dense copy whose rows past the last token are zero",
                           .flags = RG_OP_RECOMPUTABLE | RG_OP_INTERNAL | RG_OP_ROWWISE,
                           .in = live_in,
                           .nin = RGI_COUNT(live_in),
                           .out = live_out,
                           .nout = RGI_COUNT(live_out),
                           .cost = cost,
                           .run_cpu = rgi_run_cast,
                           .cuda_steps = rgi_cuda_cast,
                           .cuda_path = rgi_cuda_cast_path,
                           .rules = &live_rules};

/* ---- scale_lengths ---- */

enum { A_TIMES, A_ROWS };

static rg_status run_scale(const rg_call *c) {
  const rg_arg *x = rg_in(c, 0), *y = rg_out(c, 0);
  const int64_t most = c->attr[A_ROWS].i;
  for (int64_t i = 0; i < x->dim[0]; i++) {
    const int64_t start = ((const int32_t *)x->data)[i] * c->attr[A_TIMES].i;
    ((int32_t *)y->data)[i] = (int32_t)(start < most ? start : most);
  }
  return RG_OK;
}

/* ---- block_starts ---- */

static rg_status run_starts(const rg_call *c) {
  const rg_arg *x = rg_in(c, 0), *y = rg_out(c, 0);
  for (int64_t i = 0; i < x->dim[0]; i++)
    ((int32_t *)y->data)[i] = (int32_t)(((const int32_t *)x->data)[i] / c->attr[0].i);
  return RG_OK;
}

static const rg_port scale_in[] = {
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "sequence starts"},
};
static const rg_port scale_out[] = {
    {"y", "B1", 0, RG_D(RG_I32), 0, -1, "starts in rows of which each row has `times`"},
};
static const rg_attr scale_attrs[] = {
    {"times", RG_ATTR_INT, true, 1, INT32_MAX, 1, NULL, "rows for each"},
    {"rows", RG_ATTR_INT, true, 0, INT32_MAX, 0, NULL, "rows there are: no start is past them"},
};
const rg_op rgi_op_scale_lengths = {.abi = RG_OP_ABI,
                                    .name = "scale_lengths",
                                    .doc = "sequence starts, counted in parts of rows",
                                    .flags = RG_OP_INTERNAL, /* B + 1 numbers: kept */
                                    .in = scale_in,
                                    .nin = RGI_COUNT(scale_in),
                                    .out = scale_out,
                                    .nout = RGI_COUNT(scale_out),
                                    .attrs = scale_attrs,
                                    .nattr = RGI_COUNT(scale_attrs),
                                    .cost = cost,
                                    .run_cpu = run_scale,
                                    .cuda_steps = rgi_cuda_scale_lengths,
                                    .cuda_path = rgi_cuda_scale_lengths_path};

static const rg_port starts_out[] = {
    {"y", "B1", 0, RG_D(RG_I32), 0, -1,
     "where each sequence's compressed rows start: cu_seqlens_k for attention over such rows"},
};
static const rg_attr starts_attrs[] = {
    {"stride", RG_ATTR_INT, true, 1, INT32_MAX, 1, NULL,
     "tokens from one compressed row to the next"},
};
const rg_op rgi_op_block_starts = {.abi = RG_OP_ABI,
                                   .name = "block_starts",
                                   .doc = "sequence starts, counted in compressed rows",
                                   .in = scale_in,
                                   .nin = RGI_COUNT(scale_in),
                                   .out = starts_out,
                                   .nout = RGI_COUNT(starts_out),
                                   .attrs = starts_attrs,
                                   .nattr = RGI_COUNT(starts_attrs),
                                   .cost = cost,
                                   .run_cpu = run_starts,
                                   .cuda_steps = rgi_cuda_block_starts,
                                   .cuda_path = rgi_cuda_scale_lengths_path,
                                   .rules = &(const rgi_rules){.counts_blocks = true}};
