/* tests/unit/test_num_topk.c: topk against the oracle's fp64 scores: lengths, geometry, scores of
   all kinds. What it promises exactly: test_num_topk_exact.c. */
#include "topk_case.h"

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
