/* tests/unit/topk_case.h: one call of topk, its pack and arrays, and the gate of the oracle. */
#ifndef TOPK_CASE_H
#define TOPK_CASE_H

#include "../harness/num.h"
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

typedef struct topk_case {
  const char *name;
  rg_dtype dtype;
  int64_t H, KH, D, B;
  const int32_t *length, *length_k, *offset;
  int64_t kernel, stride, block, top_n, init, local, share;
  double hot, softcap, scale;
  bool outliers, dot, relu, max, tail, weighted, strided;
  int isa; /* level + 1; 0: best */
} topk_case;

typedef struct topk_run {
  topk_case a;
  num_pack pack, pack_k;
  ot_tensor *q, *k, *lse, *weight, *idx;
  ot_call *call;
} topk_run;

static inline ot_tensor *tensor(ot *t, rg_dtype dtype, int64_t n, int64_t h, int64_t d,
                                bool strided) {
  const int64_t dim[] = {n, h, d}, pad[] = {4, 3, 0};
  return ot_new(t, dtype, 3, dim, strided ? pad : NULL);
}

static inline topk_run shell(ot *t, topk_case a, int64_t slack) {
  topk_run r = {.a = a};
  r.pack = num_pack_new(t, a.B, a.length, slack);
  r.pack_k = a.length_k ? num_pack_new(t, a.B, a.length_k, slack) : r.pack;
  r.q = tensor(t, a.dtype, r.pack.T, a.H, a.D, a.strided);
  r.k = tensor(t, a.dtype, r.pack_k.T / a.stride, a.KH, a.D, a.strided);
  r.lse = OT_NEW(t, RG_F32, r.pack.T, a.H);
  r.weight = OT_NEW(t, a.dtype, r.pack.T, a.H);
  r.idx = tensor(t, RG_I32, r.pack.T, a.KH, a.top_n, a.strided);
  return r;
}

static inline void make_call(ot *t, topk_run *r) {
  const topk_case *a = &r->a;
  ot_call *c = r->call = ot_call_new(t, &rgi_op_topk);
  if (a->isa > 0) ot_set_isa(c, a->isa - 1);
  ot_in(c, "q", r->q);
  ot_in(c, "k", r->k);
  if (!a->dot && !a->relu) ot_in(c, "lse", r->lse);
  ot_in(c, "cu_seqlens", r->pack.tensor);
  if (a->length_k) ot_in(c, "cu_seqlens_k", r->pack_k.tensor);
  if (a->offset) ot_in(c, "q_offset", num_ints(t, a->B, a->offset));
  if (a->weighted) ot_in(c, "weight", r->weight);
  ot_int(c, "kernel", a->kernel);
  ot_int(c, "stride", a->stride);
  ot_int(c, "block", a->block);
  ot_int(c, "top_n", a->top_n);
  ot_int(c, "init", a->init);
  ot_int(c, "local", a->local);
  if (a->dot || a->relu) ot_choice(c, "score", a->dot ? "dot" : "relu");
  if (a->max) ot_choice(c, "pool", "max");
  if (a->tail) ot_int(c, "tail", 1);
  if (a->share) ot_int(c, "query_block", a->share);
  if (a->scale != 0) ot_float(c, "scale", a->scale);
  if (a->softcap != 0) ot_float(c, "softcap", a->softcap);
  ot_out(c, "idx", r->idx);
}

/* The lse that attention over the compressed keys would hand over. */
static inline void fill_lse(ot *t, topk_run *r) {
  const topk_case *a = &r->a;
  ref_attn ref = {.kind = REF_CMP,
                  .T = r->pack.T,
                  .TK = r->k->arg.dim[0],
                  .B = a->B,
                  .H = a->H,
                  .KH = a->KH,
                  .D = a->D,
                  .DV = a->D,
                  .q = ot_get(t, r->q),
                  .k = ot_get(t, r->k),
                  .v = ot_get(t, r->k),
                  .cu = r->pack.cu,
                  .cu_k = r->pack_k.cu,
                  .q_offset = a->offset,
                  .scale = a->scale,
                  .softcap = a->softcap,
                  .kernel = a->kernel,
                  .stride = a->stride};
  double *lse = ot_doubles(t, r->lse->n);
  ref_attn_forward(&ref, ot_doubles(t, r->q->n), lse);
  ot_set(r->lse, lse);
}

static inline void poison_dead(topk_run *r) {
  num_poison_dead(r->q, &r->pack, 0, 0);
  num_poison_dead(r->lse, &r->pack, 0, 0);
  num_poison_dead(r->weight, &r->pack, 0, 0);
  num_poison_dead(r->k, &r->pack_k, r->a.kernel, r->a.stride);
}

static inline topk_run make(ot *t, topk_case a) {
  topk_run r = shell(t, a, 11);
  if (a.outliers) {
    ot_fill_outliers(t, r.q);
    ot_fill_outliers(t, r.k);
  } else {
    ot_fill_normal(t, r.q, a.hot != 0 ? a.hot : 1);
    ot_fill_normal(t, r.k, 1);
  }
  if (a.weighted) ot_fill_normal(t, r.weight, 1);
  poison_dead(&r);
  fill_lse(t, &r);
  poison_dead(&r);
  make_call(t, &r);
  return r;
}

static inline ref_topk oracle(ot *t, const topk_run *r) {
  const topk_case *a = &r->a;
  return (ref_topk){.T = r->pack.T,
                    .TK = r->k->arg.dim[0],
                    .B = a->B,
                    .H = a->H,
                    .KH = a->KH,
                    .D = a->D,
                    .q = ot_get(t, r->q),
                    .k = ot_get(t, r->k),
                    .lse = ot_get(t, r->lse),
                    .cu = r->pack.cu,
                    .cu_k = r->pack_k.cu,
                    .q_offset = a->offset,
                    .kernel = a->kernel,
                    .stride = a->stride,
                    .block = a->block,
                    .top_n = a->top_n,
                    .init = a->init,
                    .local = a->local,
                    .scale = a->scale,
                    .softcap = a->softcap,
                    .weight = a->weighted ? ot_get(t, r->weight) : NULL,
                    .dot = a->dot,
                    .relu = a->relu,
                    .max = a->max,
                    .share = a->share,
                    .tail = a->tail};
}

/* The gate; `overlap` is the share of indices that must agree with the oracle's. */
static inline const char *compare(ot *t, topk_run *r, double overlap) {
  ref_topk ref = oracle(t, r);
  int64_t nblock = r->pack_k.T / r->a.block + 1;
  for (int64_t b = 0; r->a.offset && b < r->a.B; b++) { /* a query may lie past the keys */
    int64_t end = (r->a.offset[b] + r->a.length[b]) / r->a.block + 1;
    if (end > nblock) nblock = end;
  }
  int32_t *idx = ot_ints(t, r->idx->n);
  double *scores = ot_doubles(t, r->pack.T * r->a.KH * nblock + 1), logit;
  ref_topk_forward(&ref, idx, scores, nblock, &logit);
  const char *bad = ot_check_topk(t, r->idx, r->pack.live, idx, scores, nblock, logit, 0, overlap);
  return bad ? ot_text(t, "%s (%s): %s", r->a.name, rg_dtype_name(r->a.dtype), bad) : NULL;
}

static inline void check_overlap(uint64_t seed, topk_case a, double overlap) {
  ot *t = ot_begin(seed);
  topk_run r = make(t, a);
  OT_OK(ot_run(r.call, 2));
  OT_OK(compare(t, &r, overlap));
  ot_end(t);
}
static inline void check(uint64_t seed, topk_case a) {
  check_overlap(seed, a, 0.99);
}

static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
static const int32_t some[] = {70, 0, 1, 330, 33}, one_long[] = {1, 1100};

#define NSA     .kernel = 32, .stride = 16, .block = 64, .top_n = 4, .init = 1, .local = 2
#define HEADS   .H = 4, .KH = 2, .D = 64
#define LENGTHS .B = 13, .length = num_lengths
#define SOME    .B = 5, .length = some
#define LONG    .B = 2, .length = one_long

#endif
