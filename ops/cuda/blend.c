/* ops/cuda/blend.c: see blend.h. */
#include "blend.h"
#include "rows.h"

enum { CHUNK = 8 };

static const rg_arg *in_at(const rg_call *c, int port, int k) {
  return port == RGI_NO_PORT ? NULL : rgi_in_at(c, port, k);
}
static const rg_arg *out_at(const rg_call *c, int port, int k) {
  return port == RGI_NO_PORT ? NULL : rgi_out_at(c, port, k);
}

static void fill_branch(const rg_call *c, const rgi_blend *b, int k, rgk_branch *to) {
  rgk_tensor o = rgk_of(in_at(c, b->o, k)), d = rgk_of(out_at(c, b->d_o, k));
  rgk_tensor lse = rgk_of(in_at(c, b->lse, k)), d_lse = rgk_of(out_at(c, b->d_lse, k));
  *to = (rgk_branch){.o = o.data,
                     .o_row = o.row,
                     .o_head = o.head,
                     .d = d.data,
                     .d_row = d.row,
                     .d_head = d.head,
                     .lse = lse.data,
                     .lse_row = lse.row,
                     .d_lse = d_lse.data,
                     .d_lse_row = d_lse.row,
                     .d_dtype = d.dtype,
                     .add = in_at(c, b->acc_o, k) != NULL,
                     .lse_add = in_at(c, b->acc_lse, k) != NULL};
}

static bool vectors(const rg_call *c, const rgi_blend *b) {
  bool all = rgi_cuda_row_vectors(b->row);
  for (int k = 0; k < rg_in_count(c, b->o) && all; k++)
    all = rgi_cuda_row_vectors(in_at(c, b->o, k)) && rgi_cuda_row_vectors(out_at(c, b->d_o, k));
  return all;
}

/* Someone wants a gradient; *small: of gates or log-sum-exps. */
static bool wanted(const rg_call *c, const rgi_blend *b, bool *small) {
  bool any = false;
  *small = b->d_gate != NULL;
  for (int k = 0; k < rg_in_count(c, b->o); k++) {
    any = any || out_at(c, b->d_o, k);
    *small = *small || out_at(c, b->d_lse, k);
  }
  return any || *small;
}

/* combine's common case, which has a kernel that does nothing else. */
static const void *forward_whole(const rgi_blend *b, const rgk_blend_params *p) {
  if (b->backward || b->merge || p->dtype == RG_F32 || p->n > RGK_BLEND_FEW ||
      p->width != p->lanes * CHUNK)
    return NULL;
  return rgk_blend_fwd_whole((rg_dtype)p->dtype, p->lanes);
}

rg_status rgi_cuda_blend_check(const rg_call *c, int o, const char *remedy, rg_error *e) {
  const int n = rg_in_count(c, o);
  if (!c->gpu || n <= RGK_BLEND_BRANCHES) return RG_OK;
  return rg_op_fail(e, RG_E_LIMIT, c, "%d branches; on a GPU at most %d fit: %s", n,
                    RGK_BLEND_BRANCHES, remedy);
}

rg_status rgi_cuda_blend(const rg_call *c, const rgi_blend *b, rg_cuda *x) {
  const rg_arg *o = in_at(c, b->o, 0);
  rgk_blend_params p = {.seqs = rgk_seqs_of(b->cu, o->dim[0]),
                        .tokens = o->dim[0],
                        .heads = o->dim[1],
                        .width = o->dim[2],
                        .n = rg_in_count(c, b->o),
                        .lanes = 1,
                        .dtype = (int32_t)o->dtype,
                        .act = b->act,
                        .row = rgk_of(b->row),
                        .row_lse = b->row_lse ? b->row_lse->data : NULL,
                        .row_lse_row = rgk_of(b->row_lse).row,
                        .gate = rgk_of(b->gate),
                        .d_gate = rgk_of(b->d_gate),
                        .gate_add = b->acc_gate != NULL};
  RGI_TRY(rgi_cuda_blend_check(c, b->o, "plans refuse this", c->error));
  if (b->backward && !wanted(c, b, &p.products)) return RG_OK;
  if (p.tokens * p.heads == 0) return RG_OK;
  while (p.lanes < 32 && p.lanes * CHUNK < p.width) p.lanes *= 2;
  for (int k = 0; k < p.n; k++) fill_branch(c, b, k, &p.branch[k]);
  const int64_t rows = RGK_BLEND_THREADS / p.lanes; /* at a time */
  const bool fast = vectors(c, b);
  const void *whole = fast ? forward_whole(b, &p) : NULL;
  if (whole)
    return x->launch(
        x, &(rg_launch){
               .function = whole,
               .grid = {rgk_blocks(rgk_blocks(p.tokens, RGK_BLEND_TOKENS) * p.heads, rows), 1, 1},
               .block = {RGK_BLEND_THREADS, 1, 1},
               .params = &p,
               .size = sizeof p});
  const int kinds = b->backward ? RGK_BLEND_KINDS_BWD : RGK_BLEND_KINDS_FWD;
  return x->launch(x,
                   &(rg_launch){.function = b->backward ? rgk_blend_bwd(b->merge, fast, o->dtype)
                                                        : rgk_blend_fwd(b->merge, fast, o->dtype),
                                .grid = {rgk_blocks(p.tokens * p.heads, rows), 1, 1},
                                .block = {RGK_BLEND_THREADS, 1, 1},
                                .shared = (uint32_t)((size_t)(rows * kinds * p.n) * sizeof(float)),
                                .params = &p,
                                .size = sizeof p});
}

const char *rgi_cuda_blend_path(const rg_call *c, const rgi_blend *b) {
  bool small;
  if (b->backward && !wanted(c, b, &small)) return "nothing wanted";
  return vectors(c, b) ? "16-byte vectors" : "plain: alignment";
}

/* ---- combine's gradient in parts ---- */

static bool branch_vectors(const rgi_blend *b) {
  return rgi_cuda_row_vectors(b->row) && rgi_cuda_row_vectors(b->one.o) &&
         rgi_cuda_row_vectors(b->one.d);
}

/* The common case, which has a kernel that does nothing else. */
static bool is_whole(const rgi_blend *b, const rgk_branch_params *p) {
  return branch_vectors(b) && p->dtype != RG_F32 && p->width == p->lanes * CHUNK && p->d.data &&
         p->d.dtype == p->dtype && p->product.data && p->delta.data && !p->add && !p->chain;
}

static rg_status too_many(const rg_call *c, int n) {
  if (n <= RGK_BLEND_BRANCHES) return RG_OK;
  return rg_op_fail(c->error, RG_E_LIMIT, c, "%d branches; on a GPU at most %d fit", n,
                    RGK_BLEND_BRANCHES);
}

rg_status rgi_cuda_blend_branch(const rg_call *c, const rgi_blend *b, rg_cuda *x) {
  const rg_arg *o = b->one.o;
  rgk_branch_params p = {.seqs = rgk_seqs_of(b->cu, o->dim[0]),
                         .tokens = o->dim[0],
                         .heads = o->dim[1],
                         .width = o->dim[2],
                         .n = (int32_t)b->gate->dim[2],
                         .lanes = 1,
                         .dtype = (int32_t)o->dtype,
                         .act = b->act,
                         .column = b->one.column,
                         .row = rgk_of(b->row),
                         .gate = rgk_of(b->gate),
                         .o = rgk_of(o),
                         .d = rgk_of(b->one.d),
                         .product = rgk_of(b->one.product),
                         .delta = rgk_of(b->one.delta),
                         .add = b->one.add,
                         .chain = b->one.chain};
  RGI_TRY(too_many(c, p.n));
  if (p.tokens * p.heads == 0 || (!b->one.d && !b->one.product)) return RG_OK;
  while (p.lanes < 32 && p.lanes * CHUNK < p.width) p.lanes *= 2;
  const int64_t rows = RGK_BLEND_THREADS / p.lanes; /* at a time */
  const void *whole = is_whole(b, &p) ? rgk_blend_branch_whole(o->dtype, p.lanes) : NULL;
  return x->launch(
      x, &(rg_launch){
             .function = whole ? whole : rgk_blend_branch(branch_vectors(b), o->dtype),
             .grid = {whole ? rgk_blocks(rgk_blocks(p.tokens, RGK_BRANCH_TOKENS) * p.heads, rows)
                            : rgk_blocks(p.tokens * p.heads, rows * RGK_BRANCH_ROWS),
                      1, 1},
             .block = {RGK_BLEND_THREADS, 1, 1},
             .params = &p,
             .size = sizeof p});
}

const char *rgi_cuda_blend_branch_path(const rgi_blend *b) {
  return branch_vectors(b) ? "16-byte vectors" : "plain: alignment";
}

rg_status rgi_cuda_blend_gates(const rg_call *c, const rgi_blend *b, rg_cuda *x) {
  rgk_blend_params p = {.seqs = rgk_seqs_of(b->cu, b->gate->dim[0]),
                        .tokens = b->gate->dim[0],
                        .heads = b->gate->dim[1],
                        .n = rg_in_count(c, b->lse),
                        .act = b->act,
                        .gate = rgk_of(b->gate),
                        .d_gate = rgk_of(b->d_gate),
                        .gate_add = b->acc_gate != NULL};
  RGI_TRY(too_many(c, p.n));
  if (p.tokens * p.heads == 0 || !b->d_gate) return RG_OK;
  for (int k = 0; k < p.n; k++) {
    rgk_tensor product = rgk_of(in_at(c, b->lse, k));
    p.branch[k] = (rgk_branch){.lse = product.data, .lse_row = product.row};
  }
  return x->launch(x,
                   &(rg_launch){.function = rgk_blend_gates(),
                                .grid = {rgk_blocks(p.tokens * p.heads, RGK_BLEND_THREADS), 1, 1},
                                .block = {RGK_BLEND_THREADS, 1, 1},
                                .params = &p,
                                .size = sizeof p});
}
