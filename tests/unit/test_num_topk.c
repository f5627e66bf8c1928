/* tests/unit/test_num_topk.c: topk against the oracle's fp64 scores, and its exactness: ties,
 * permutations, NaN, threads, packs, strides. */
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

static ot_tensor *tensor(ot *t, rg_dtype dtype, int64_t n, int64_t h, int64_t d, bool strided) {
  const int64_t dim[] = {n, h, d}, pad[] = {4, 3, 0};
  return ot_new(t, dtype, 3, dim, strided ? pad : NULL);
}

static topk_run shell(ot *t, topk_case a, int64_t slack) {
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

static void make_call(ot *t, topk_run *r) {
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
static void fill_lse(ot *t, topk_run *r) {
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

static void poison_dead(topk_run *r) {
  num_poison_dead(r->q, &r->pack, 0, 0);
  num_poison_dead(r->lse, &r->pack, 0, 0);
  num_poison_dead(r->weight, &r->pack, 0, 0);
  num_poison_dead(r->k, &r->pack_k, r->a.kernel, r->a.stride);
}

static topk_run make(ot *t, topk_case a) {
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

static ref_topk oracle(ot *t, const topk_run *r) {
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
static const char *compare(ot *t, topk_run *r, double overlap) {
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

static void check_overlap(uint64_t seed, topk_case a, double overlap) {
  ot *t = ot_begin(seed);
  topk_run r = make(t, a);
  OT_OK(ot_run(r.call, 2));
  OT_OK(compare(t, &r, overlap));
  ot_end(t);
}
static void check(uint64_t seed, topk_case a) {
  check_overlap(seed, a, 0.99);
}

static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
static const int32_t some[] = {70, 0, 1, 330, 33}, one_long[] = {1, 1100};

#define NSA     .kernel = 32, .stride = 16, .block = 64, .top_n = 4, .init = 1, .local = 2
#define HEADS   .H = 4, .KH = 2, .D = 64
#define LENGTHS .B = 13, .length = num_lengths
#define SOME    .B = 5, .length = some
#define LONG    .B = 2, .length = one_long

Test(topk, lengths) {
  for (int i = 0; i < 3; i++) {
    check(1 + (uint64_t)i, (topk_case){.name = "lengths", LENGTHS, HEADS, NSA, .dtype = types[i]});
    check(4 + (uint64_t)i, (topk_case){.name = "lengths",
                                       LENGTHS,
                                       HEADS,
                                       .kernel = 32,
                                       .stride = 16,
                                       .block = 32,
                                       .top_n = 3,
                                       .init = 0,
                                       .local = 1,
                                       .dtype = types[i]});
  }
}

Test(topk, counts) {
  static const int64_t top[] = {1, 4, 16, 32, 64}, init[] = {0, 1, 3};
  for (int i = 0; i < 5; i++)
    for (int k = 0; k < 3; k++) {
      topk_case a = {.name = "counts",
                     LONG,
                     .H = 2,
                     .KH = 1,
                     .D = 32,
                     .kernel = 32,
                     .stride = 16,
                     .block = 32,
                     .top_n = top[i],
                     .init = init[k],
                     .local = 1,
                     .dtype = types[k]};
      if (a.init + a.local > a.top_n) continue;
      check(10 + (uint64_t)(3 * i + k), a);
    }
  check(30, (topk_case){.name = "all forced",
                        LONG,
                        .H = 2,
                        .KH = 1,
                        .D = 32,
                        .kernel = 32,
                        .stride = 16,
                        .block = 64,
                        .top_n = 4,
                        .init = 1,
                        .local = 3});
}

Test(topk, geometry) {
  static const int64_t kernel[] = {16, 64, 8, 32, 32, 64, 32, 128},
                       stride[] = {16, 64, 8, 8, 16, 32, 16, 32};
  static const int64_t block[] = {32, 64, 128, 32, 64, 128, 16, 32};
  for (int i = 0; i < 8; i++)
    check(40 + (uint64_t)i, (topk_case){.name = "geometry",
                                        LENGTHS,
                                        HEADS,
                                        .kernel = kernel[i],
                                        .stride = stride[i],
                                        .block = block[i],
                                        .top_n = 3,
                                        .init = i % 2,
                                        .local = 1 + i % 2,
                                        .dtype = types[i % 3]});
}

Test(topk, groups) {
  static const int64_t group[] = {1, 2, 3, 4, 8, 16, 64};
  for (int g = 0; g < 7; g++)
    check(60 + (uint64_t)g, (topk_case){.name = "group",
                                        SOME,
                                        .KH = group[g] < 8 ? 2 : 1,
                                        .H = group[g] * (group[g] < 8 ? 2 : 1),
                                        .D = 64,
                                        NSA,
                                        .dtype = types[g % 3]});
}

Test(topk, head_sizes) {
  static const int64_t d[] = {1, 7, 96, 128, 192, 256};
  for (int i = 0; i < 6; i++)
    check(70 + (uint64_t)i,
          (topk_case){
              .name = "head size", SOME, .H = 3, .KH = 1, .D = d[i], NSA, .dtype = types[i % 3]});
}

Test(topk, magnitudes) {
  for (int i = 0; i < 3; i++) {
    topk_case a = {.name = "magnitudes",
                   .B = 2,
                   .length = one_long,
                   HEADS,
                   .kernel = 32,
                   .stride = 16,
                   .block = 32,
                   .top_n = 6,
                   .init = 1,
                   .local = 2,
                   .dtype = types[i]};
    a.hot = 8;
    check(80 + (uint64_t)i, a);
    a.hot = 64;
    check(83 + (uint64_t)i, a);
    a.hot = 0;
    a.outliers = true;
    check(86 + (uint64_t)i, a);
    a.softcap = 5;
    a.scale = 0.5;
    check(89 + (uint64_t)i, a);
  }
}

Test(topk, dot) {
  for (int i = 0; i < 3; i++) {
    topk_case a = {.name = "dot",
                   LONG,
                   .H = 4,
                   .KH = 4,
                   .D = 64,
                   .kernel = 32,
                   .stride = 32,
                   .block = 32,
                   .top_n = 4,
                   .init = 0,
                   .local = 1,
                   .dot = true,
                   .dtype = types[i]};
    check(100 + (uint64_t)i, a);
    a.KH = 2;
    a.init = 1;
    a.local = 2;
    a.outliers = true;
    check(103 + (uint64_t)i, a);
    a.length = num_lengths;
    a.B = 13;
    check(106 + (uint64_t)i, a);
  }
}

/* Scores of an indexer: heads weighed by the query, whole blocks. */
Test(topk, relu) {
  for (int i = 0; i < 6; i++) {
    topk_case a = {.name = "relu",
                   LONG,
                   .H = 8,
                   .KH = 1 + i % 2,
                   .D = 32,
                   .kernel = 32,
                   .stride = 32,
                   .block = 32,
                   .top_n = 5,
                   .init = i % 2,
                   .local = 2,
                   .relu = true,
                   .weighted = i > 2,
                   .dtype = types[i % 3]};
    check(210 + (uint64_t)i, a);
    a.local = 0;
    a.tail = i % 2;
    a.length = num_lengths;
    a.B = 13;
    check(220 + (uint64_t)i, a);
  }
}

/* Tokens instead of blocks, none forced: the query's own has to win its place. */
Test(topk, tokens) {
  for (int i = 0; i < 3; i++) {
    topk_case a = {.name = "tokens",
                   SOME,
                   .H = 4,
                   .KH = 1,
                   .D = 32,
                   .kernel = 1,
                   .stride = 1,
                   .block = 1,
                   .top_n = 100,
                   .init = 0,
                   .local = 0,
                   .relu = true,
                   .weighted = true,
                   .dtype = types[i]};
    check(230 + (uint64_t)i, a);
    a.top_n = 250;
    check(236 + (uint64_t)i, a);
    a.top_n = 2048; /* more than there are */
    check(233 + (uint64_t)i, a);
  }
}

/* The same in heads and widths as indexers have them, and blocks of several keys. */
Test(topk, indexer) {
  static const int64_t heads[] = {64, 50, 8, 5, 16, 64}, width[] = {128, 128, 128, 128, 64, 128};
  static const int32_t longer[] = {130, 0, 1, 170, 40}, keys[] = {140, 2, 1, 170, 300},
                       offset[] = {10, 2, 0, 0, 260};
  for (int i = 0; i < 6; i++) {
    topk_case a = {.name = "indexer",
                   .B = 5,
                   .length = longer,
                   .KH = i == 2 ? 2 : 1,
                   .H = heads[i] * (i == 2 ? 2 : 1),
                   .D = width[i],
                   .kernel = i == 3 ? 4 : 1,
                   .stride = i == 3 ? 4 : 1,
                   .block = i == 3 ? 4 : 1,
                   .top_n = i == 3 ? 20 : 64,
                   .init = i == 2,
                   .local = i == 2,
                   .tail = i == 3,
                   .relu = true,
                   .weighted = i != 1,
                   .dtype = i == 4 ? RG_F16 : RG_BF16};
    if (i == 5) a.length_k = keys, a.offset = offset;
    check(290 + (uint64_t)i, a);
  }
}

/* The best key of a block: of raw products over tokens, and of probabilities where keys reach over
 * blocks. */
Test(topk, best_key) {
  static const int64_t kernel[] = {1, 1, 32, 32}, stride[] = {1, 1, 16, 16},
                       block[] = {128, 32, 64, 32};
  for (int i = 0; i < 12; i++) {
    topk_case a = {.name = "best key",
                   .B = 13,
                   .length = num_lengths,
                   .H = i % 4 == 3 ? 2 : 4, /* hot heads of a group are sure of two keys alike */
                   .KH = 2,
                   .D = 64,
                   .kernel = kernel[i % 4],
                   .stride = stride[i % 4],
                   .block = block[i % 4],
                   .top_n = 3,
                   .init = i % 2,
                   .local = i % 3,
                   .max = true,
                   .dot = i % 4 == 0,
                   .relu = i % 4 == 1,
                   .hot = i % 4 == 3 ? 64 : 1,
                   .dtype = types[i / 4]};
    check(240 + (uint64_t)i, a);
    a.length = some, a.B = 5;
    check(255 + (uint64_t)i, a);
  }
}

/* Without local only complete blocks are chosen, and the tail until it is one. */
Test(topk, partial_tail) {
  for (int i = 0; i < 9; i++) {
    topk_case a = {.name = "tail",
                   LENGTHS,
                   HEADS,
                   .kernel = i < 6 ? 32 : 4,
                   .stride = i < 3   ? 16
                             : i < 6 ? 32
                                     : 4,
                   .block = i < 6 ? 32 : 4,
                   .top_n = 1 + i % 3 * 2,
                   .init = i % 3 == 2,
                   .local = 0,
                   .tail = i % 2,
                   .dot = i >= 3,
                   .dtype = types[i % 3]};
    check(270 + (uint64_t)i, a);
  }
}

/* Queries of a block choose alike. */
Test(topk, query_blocks) {
  static const int64_t share[] = {16, 32, 8, 64, 2, 32};
  for (int i = 0; i < 6; i++) {
    topk_case a = {.name = "query blocks",
                   LENGTHS,
                   HEADS,
                   .kernel = i < 3 ? 32 : 16,
                   .stride = i < 3 ? 32 : 16,
                   .block = i < 3 ? 32 : 64,
                   .top_n = 3,
                   .init = i % 2,
                   .local = 1,
                   .share = share[i],
                   .max = i >= 3,
                   .dot = true,
                   .dtype = types[i % 3]};
    check(310 + (uint64_t)i, a);
    a.length = some, a.B = 5, a.top_n = 70;
    check(320 + (uint64_t)i, a);
  }
}

/* Raw keys, of which a block scores its best. */
Test(topk, best_tokens) {
  static const int64_t block[] = {128, 16, 4, 64};
  for (int i = 0; i < 4; i++)
    check(330 + (uint64_t)i, (topk_case){.name = "best tokens",
                                         LONG,
                                         .H = i == 3 ? 6 : 2,
                                         .KH = 2,
                                         .D = i % 2 ? 64 : 128,
                                         .kernel = 1,
                                         .stride = 1,
                                         .block = block[i],
                                         .top_n = i == 0 ? 3 : 6,
                                         .init = i % 2,
                                         .local = 1,
                                         .max = true,
                                         .dot = true,
                                         .dtype = RG_BF16});
}

Test(topk, chunks) {
  static const int32_t queries[] = {60, 1, 0, 33}, keys[] = {500, 40, 17, 33},
                       offset[] = {440, 39, 3, 0};
  topk_case a = {
      .name = "chunks", .B = 4, .length = queries, .length_k = keys, .offset = offset, HEADS, NSA};
  check(110, a);
  a.block = a.kernel = a.stride = 32;
  a.dot = true;
  check(111, a);
}

/* Queries past the last key count the blocks up to their own, as all do: those without keys score
 * nothing. */
Test(topk, past_the_last_key) {
  static const int32_t queries[] = {60, 3, 9, 33, 20, 40}, keys[] = {100, 0, 10, 33, 200, 300},
                       offset[] = {300, 2000, 5000, 0, 190, 280};
  for (int i = 0; i < 6; i++) {
    topk_case a = {
        .name = "past", .B = 6, .length = queries, .length_k = keys, .offset = offset, HEADS, NSA};
    a.dtype = types[i % 3];
    if (i >= 3) a.top_n = 24, a.init = 2, a.local = 3;
    check(121 + (uint64_t)i, a);
    a.block = a.kernel = a.stride = 32;
    a.dot = true;
    check(127 + (uint64_t)i, a);
  }
}

/* Many more blocks than places: candidates are dropped on the way. */
Test(topk, many_blocks) {
  static const int32_t long_one[] = {20, 2900};
  for (int i = 0; i < 3; i++) {
    topk_case a = {.name = "many blocks",
                   .B = 2,
                   .length = long_one,
                   .H = 16,
                   .KH = 1,
                   .D = 64,
                   .kernel = 32,
                   .stride = 16,
                   .block = 64,
                   .top_n = 12,
                   .init = 1,
                   .local = 2,
                   .dtype = types[i]};
    check(112 + (uint64_t)i, a);
    a.H = 2;
    a.D = 128;
    a.block = 16;
    a.init = i;
    a.hot = 3;
    check(115 + (uint64_t)i, a);
    a.kernel = a.stride = a.block;
    a.dot = true;
    a.KH = 2;
    check(118 + (uint64_t)i, a);
  }
}

Test(topk, ten_thousand_sequences_of_one_and_none) {
  ot *t = ot_begin(120);
  int32_t *ones = ot_ints(t, 10000), zeros[3] = {0};
  for (int i = 0; i < 10000; i++) ones[i] = 1;
  topk_case a = {.name = "ten thousand", .B = 10000, .length = ones, .H = 1, .KH = 1, .D = 64, NSA};
  check_overlap(121, a, 1);
  a.B = 3;
  a.length = zeros;
  check(122, a);
  a.B = 0;
  check(123, a);
  ot_end(t);
}

/* ---- exact answers ---- */

/* Equal keys: every compressed block has the same p, whole blocks tie, the lower index wins. */
Test(topk, equal_scores) {
  for (int i = 0; i < 6; i++) {
    ot *t = ot_begin(130 + (uint64_t)i);
    topk_run r = shell(t,
                       (topk_case){.name = "equal scores",
                                   LONG,
                                   HEADS,
                                   .kernel = 32,
                                   .stride = i < 3 ? 16 : 32,
                                   .block = 32,
                                   .top_n = 5,
                                   .init = i % 2,
                                   .local = 2,
                                   .dtype = types[i % 3],
                                   .dot = i >= 3},
                       11);
    ot_fill(r.q, 0.5);
    ot_fill(r.k, i % 2 ? 0 : 0.25);
    fill_lse(t, &r);
    poison_dead(&r);
    make_call(t, &r);
    OT_OK(ot_run(r.call, 2));
    OT_OK(compare(t, &r, 1));
    ot_end(t);
  }
}

/* Logits are a permutation of well-separated numbers: nothing is a near-tie. */
Test(topk, permutations) {
  for (int i = 0; i < 6; i++) {
    ot *t = ot_begin(140 + (uint64_t)i);
    topk_run r = shell(t,
                       (topk_case){.name = "permutation",
                                   LONG,
                                   .H = 2,
                                   .KH = 1,
                                   .D = 8,
                                   .scale = 1,
                                   .kernel = 32,
                                   .stride = 32,
                                   .block = 32,
                                   .top_n = 6,
                                   .init = i % 2,
                                   .local = 1,
                                   .dtype = types[i % 3],
                                   .dot = i >= 3},
                       11);
    int64_t n = r.k->arg.dim[0];
    double *q = ot_doubles(t, r.q->n), *k = ot_doubles(t, r.k->n);
    int *place = ot_alloc(t, (size_t)n * sizeof *place);
    for (int64_t j = 0; j < n; j++) {
      int64_t other = ot_below(t, j + 1);
      place[j] = place[other];
      place[other] = (int)j;
    }
    for (int64_t j = 0; j < n; j++) k[j * 8 + 3] = 0.25 * place[j];
    for (int64_t j = 0; j < r.q->n / 8; j++) q[j * 8 + 3] = 1;
    ot_set(r.q, q);
    ot_set(r.k, k);
    fill_lse(t, &r);
    poison_dead(&r);
    make_call(t, &r);
    OT_OK(ot_run(r.call, 2));
    OT_OK(compare(t, &r, 1));
    ot_end(t);
  }
}

/* A NaN key ranks last where it is weighed; a NaN lse makes all of a row's scores NaN, and
 * equal. */
Test(topk, nan_ranks_last) {
  for (int i = 0; i < 4; i++) {
    ot *t = ot_begin(150 + (uint64_t)i);
    topk_run r = make(t, (topk_case){.name = "NaN",
                                     LONG,
                                     HEADS,
                                     .kernel = 32,
                                     .stride = 32,
                                     .block = 32,
                                     .top_n = 4,
                                     .init = 0,
                                     .local = 1,
                                     .dtype = types[i % 3],
                                     .dot = i == 3});
    ot_poison_rows(r.k, 3, 4);
    ot_poison_rows(r.k, 9, 11);
    if (i == 1) ot_poison_rows(r.lse, 400, 500);
    if (i == 2) ot_poison_rows(r.q, 400, 500);
    OT_OK(ot_run(r.call, 2));
    ref_topk ref = oracle(t, &r);
    int32_t *want = ot_ints(t, r.idx->n), *got = ot_get_ints(t, r.idx);
    ref_topk_forward(&ref, want, NULL, 0, NULL);
    int64_t differ = 0;
    for (int64_t n = 0; n < r.idx->n; n++) differ += want[n] != got[n];
    cr_assert(differ == 0, "case %d: %lld indices differ", i, (long long)differ);
    ot_end(t);
  }
}

static bool valid_rows(const int32_t *idx, int64_t from, int64_t to, const topk_run *r) {
  int64_t w = r->a.top_n, heads = r->a.KH;
  for (int64_t row = from * heads; row < to * heads; row++) {
    int64_t i = row / heads - from, last = -1, n = 0;
    for (; n < w && idx[row * w + n] >= 0; n++) {
      if (idx[row * w + n] <= last || idx[row * w + n] > i / r->a.block) return false;
      last = idx[row * w + n];
    }
    if (n != (w < i / r->a.block + 1 ? w : i / r->a.block + 1)) return false;
    for (; n < w; n++)
      if (idx[row * w + n] != -1) return false;
  }
  return true;
}

/* NaN in one sequence changes nothing elsewhere and gives indices in range where it is. */
Test(topk, nan_stays_in_its_sequence) {
  static const int32_t three[] = {150, 300, 200};
  for (int i = 0; i < 4; i++) {
    ot *t = ot_begin(160 + (uint64_t)i);
    topk_run r = make(t, (topk_case){.name = "NaN",
                                     .B = 3,
                                     .length = three,
                                     HEADS,
                                     .kernel = 32,
                                     .stride = i < 3 ? 16 : 32,
                                     .block = 32,
                                     .top_n = 4,
                                     .init = 1,
                                     .local = 2,
                                     .dtype = types[i % 3],
                                     .dot = i == 3});
    OT_OK(ot_run(r.call, 2));
    ot_tensor *clean = ot_like(t, r.idx, NULL);
    ot_copy(clean, r.idx);
    ot_poison_rows(r.q, 150, 450);
    ot_poison_rows(r.lse, 150, 450);
    num_poison_dead(r.k, &r.pack_k, r.a.kernel, r.a.stride);
    int64_t first = 150 / r.a.stride;
    ot_poison_rows(r.k, first, first + ref_blocks(300, r.a.kernel, r.a.stride));
    OT_OK(ot_run(r.call, 2));
    cr_assert(ot_same_rows(clean, 0, r.idx, 0, 150) && ot_same_rows(clean, 450, r.idx, 450, 200));
    cr_assert(valid_rows(ot_get_ints(t, r.idx), 150, 450, &r));
    ot_end(t);
  }
}

/* ---- bit-equality ---- */

Test(topk, repeats_and_threads) {
  for (int i = 0; i < 4; i++) {
    ot *t = ot_begin(170 + (uint64_t)i);
    topk_run r = make(
        t,
        (topk_case){.name = "repeats", SOME, HEADS, NSA, .dtype = types[i % 3], .hot = 1 + 7 * i});
    OT_OK(ot_run_repeated(r.call, i == 0 ? 100 : 10));
    ot_end(t);
  }
}

Test(topk, alone_and_packed) {
  for (int i = 0; i < 4; i++) {
    ot *t = ot_begin(180 + (uint64_t)i);
    topk_run r = make(t, (topk_case){.name = "packed",
                                     LENGTHS,
                                     HEADS,
                                     .kernel = 32,
                                     .stride = i < 3 ? 16 : 32,
                                     .block = 32,
                                     .top_n = 4,
                                     .init = 1,
                                     .local = 1,
                                     .dtype = types[i % 3],
                                     .dot = i == 3});
    OT_OK(ot_run(r.call, 2));
    for (int64_t b = 0; b < r.a.B; b++) {
      topk_case a = r.a;
      a.B = 1;
      a.length = &num_lengths[b];
      topk_run s = shell(t, a, 0);
      int64_t row = r.pack.cu[b], row_k = row / a.stride, length = num_lengths[b];
      ot_set(s.q, ot_get(t, r.q) + row * a.H * a.D);
      ot_set(s.k, ot_get(t, r.k) + row_k * a.KH * a.D);
      ot_set(s.lse, ot_get(t, r.lse) + row * a.H);
      make_call(t, &s);
      OT_OK(ot_run(s.call, 1));
      cr_assert(ot_same_rows(s.idx, 0, r.idx, row, length), "sequence %lld", (long long)b);
    }
    ot_end(t);
  }
}

Test(topk, strides) {
  for (int i = 0; i < 3; i++) {
    ot *t = ot_begin(190 + (uint64_t)i);
    topk_case a = {.name = "strides", SOME, HEADS, NSA, .dtype = types[i]};
    topk_run r = make(t, a);
    a.strided = true;
    topk_run s = shell(t, a, 11);
    ot_copy(s.q, r.q);
    ot_copy(s.k, r.k);
    ot_copy(s.lse, r.lse);
    make_call(t, &s);
    OT_OK(ot_run(r.call, 2));
    OT_OK(ot_run(s.call, 2));
    cr_assert(ot_same_bits(r.idx, s.idx));
    ot_end(t);
  }
}

Test(topk, far_rows) {
  if (!ot_far_possible()) cr_skip("no address space for sparse tensors");
  for (int i = 0; i < 2; i++) {
    ot *t = ot_begin(195 + (uint64_t)i);
    topk_run r = make(t, (topk_case){.name = "far",
                                     SOME,
                                     HEADS,
                                     .kernel = 32,
                                     .stride = 32,
                                     .block = 32,
                                     .top_n = 4,
                                     .init = 1,
                                     .local = 2,
                                     .dtype = RG_BF16,
                                     .dot = i == 1});
    OT_OK(ot_check_far(r.call));
    ot_end(t);
  }
}

Test(topk, cpu_levels) {
  for (int level = 0; level < ot_isa(); level++)
    for (int i = 0; i < 6; i++)
      check(200 + (uint64_t)(6 * level + i), (topk_case){.name = "CPU level",
                                                         LONG,
                                                         HEADS,
                                                         .kernel = 32,
                                                         .stride = i < 3 ? 16 : 32,
                                                         .block = 32,
                                                         .top_n = 4,
                                                         .init = 1,
                                                         .local = 2,
                                                         .dtype = types[i % 3],
                                                         .dot = i >= 3,
                                                         .isa = level + 1});
  for (int level = 0; level < ot_isa(); level++)
    for (int i = 0; i < 3; i++)
      check(290 + (uint64_t)(3 * level + i), (topk_case){.name = "CPU level, relu and best",
                                                         LONG,
                                                         HEADS,
                                                         .kernel = 16,
                                                         .stride = 16,
                                                         .block = 32,
                                                         .top_n = 4,
                                                         .relu = i < 2,
                                                         .weighted = i < 2,
                                                         .max = true,
                                                         .tail = i == 0,
                                                         .dtype = types[i % 3],
                                                         .isa = level + 1});
}
