/* tests/unit/test_num_attn.c: the three attention ops, forward and backward, against the oracle on
 * every case that broke others. Each case runs with all gates (o, lse, all gradients); fresh inputs
 * for each. */
#include "../harness/num.h"
#include <criterion/criterion.h>
#include <string.h>

static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};

#define LENGTHS .B = 13, .length = num_lengths
#define HEADS   .H = 2, .KH = 1, .D = 64, .DV = 64
#define CMP     .kind = REF_CMP, .kernel = 32, .stride = 16
#define SLC     .kind = REF_SLC, .block = 64, .top_n = 4
#define SWA     .kind = REF_SWA, .window_left = 100
#define DENSE   .kind = REF_SWA, .window_left = -1

/* A shorter pack for cases whose point is not the lengths. */
static const int32_t some[] = {70, 0, 1, 130, 33};
#define SOME .B = 5, .length = some

static void check(uint64_t seed, num_attn a) {
  ot *t = ot_begin(seed);
  OT_OK(num_attn_check(t, a));
  ot_end(t);
}

static void check_types(uint64_t seed, num_attn a) {
  for (int i = 0; i < 3; i++) {
    a.dtype = types[i];
    check(seed + (uint64_t)i, a);
  }
}

static void check_kinds(uint64_t seed, num_attn a) {
  num_attn kind[] = {{CMP}, {SLC}, {SWA}};
  for (int i = 0; i < 3; i++) {
    a.kind = kind[i].kind;
    a.kernel = kind[i].kernel;
    a.stride = kind[i].stride;
    a.block = kind[i].block;
    a.top_n = kind[i].top_n;
    a.window_left = kind[i].window_left;
    check(seed + 10 * (uint64_t)i, a);
  }
}

/* ---- lengths ---- */

Test(attn, cmp_lengths) {
  check_types(1, (num_attn){.name = "lengths", CMP, LENGTHS, HEADS});
}
Test(attn, slc_lengths) {
  check_types(4, (num_attn){.name = "lengths", SLC, LENGTHS, HEADS});
}
Test(attn, swa_lengths) {
  check_types(7, (num_attn){.name = "lengths", SWA, LENGTHS, HEADS});
}
Test(attn, dense_lengths) {
  check_types(10, (num_attn){.name = "dense", DENSE, LENGTHS, HEADS});
}

Test(attn, ten_thousand_sequences_of_one) {
  ot *t = ot_begin(13);
  int32_t *ones = ot_ints(t, 10000);
  for (int i = 0; i < 10000; i++) ones[i] = 1;
  /* with a single key dq and dk vanish: measured against gradients of ordinary size */
  num_attn a = {.name = "ten thousand",
                .B = 10000,
                .length = ones,
                .H = 1,
                .KH = 1,
                .D = 64,
                .DV = 64,
                .floor = 0.1,
                .floor_grad = 0.1};
  check_kinds(14, a);
  a.dtype = RG_BF16;
  check_kinds(15, a);
  ot_end(t);
}

Test(attn, empty_batch) {
  const int32_t zeros[4] = {0};
  check_kinds(50, (num_attn){.name = "no sequences", .B = 0, .length = zeros, HEADS});
  check_kinds(51, (num_attn){.name = "empty sequences", .B = 4, .length = zeros, HEADS});
}

/* ---- rows that see nothing ---- */

Test(attn, no_complete_block) {
  const int32_t shorter[] = {31, 1, 20};
  check_types(60, (num_attn){.name = "no block", CMP, .B = 3, .length = shorter, HEADS});
  check_types(63, (num_attn){.name = "no block but a sink",
                             CMP,
                             .B = 3,
                             .length = shorter,
                             HEADS,
                             .sinks = true,
                             .d_lse = true,
                             .floor_grad = 0.05});
}

Test(attn, selection_rows) {
  for (num_idx x = NUM_IDX_RANDOM; x <= NUM_IDX_FUTURE; x++) {
    check_types(70 + 10 * x, (num_attn){.name = "selection rows", SLC, SOME, HEADS, .idx = x});
    check(75 + 10 * x, (num_attn){.name = "selection rows",
                                  .kind = REF_SLC,
                                  .block = 32,
                                  .top_n = 3,
                                  .H = 6,
                                  .KH = 3,
                                  .D = 64,
                                  .DV = 64,
                                  SOME,
                                  .idx = x,
                                  .sinks = true,
                                  .d_lse = true});
  }
}

/* Queries far past the last key: whole tiles, then whole rows, see nothing. */
Test(attn, masked_tiles) {
  static const int32_t keys[] = {40, 3, 1, 200, 0}, offset[] = {10, 0, 5, 150, 3};
  num_attn a = {.name = "masked tiles", SOME, .length_k = keys, .offset = offset, HEADS};
  check_kinds(120, a);
  a.kind = REF_SWA;
  a.window_left = 15;
  check_types(150, a);
  a.window_left = 0;
  a.floor_grad = 0.1; /* one key: dq and dk vanish but for rounding */
  check_types(153, a);
  a.sinks = a.d_lse = true;
  check_types(156, a);
}

/* Chunks of longer sequences: fewer queries than keys, the last of which they are. */
Test(attn, chunks) {
  static const int32_t keys[] = {200, 64, 65, 150, 33}, offset[] = {130, 64, 64, 20, 0};
  num_attn a = {.name = "chunks",
                SOME,
                .length_k = keys,
                .offset = offset,
                .H = 4,
                .KH = 2,
                .D = 64,
                .DV = 64};
  check_kinds(160, a);
  a.dtype = RG_BF16;
  a.wide_grads = true;
  a.strided = 1;
  check_kinds(170, a);
}

/* ---- magnitudes ---- */

Test(attn, outliers) {
  num_attn a = {.name = "outliers", SOME, HEADS, .outliers = true};
  for (int i = 0; i < 3; i++) {
    a.dtype = types[i];
    check_kinds(200 + (uint64_t)i, a);
  }
}

Test(attn, hot_logits) {
  num_attn a = {.name = "hot", SOME, HEADS};
  for (int i = 0; i < 3; i++)
    for (a.hot = 8; a.hot <= 64; a.hot *= 8) {
      a.dtype = types[i];
      check_kinds(300 + (uint64_t)i, a);
    }
}

/* Terms in the hundreds that cancel: rows that see few keys, and rows whose many keys are all the
 * same. */
Test(attn, hot_rows_with_lse_near_zero) {
  enum { N = 1000 };
  int32_t length[N];
  for (int i = 0; i < N; i++) length[i] = 1 + i % 3;
  num_attn a[] = {{SWA}, {SLC}};
  for (int i = 0; i < 2; i++) {
    a[i].name = "hot, few keys", a[i].B = N, a[i].length = length, a[i].hot = 64;
    a[i].H = 2, a[i].KH = 1, a[i].D = 256, a[i].DV = 64;
    for (a[i].isa = 1; a[i].isa <= 1 + ot_isa(); a[i].isa++) check(320, a[i]);
  }
}

Test(attn, hot_rows_of_equal_keys) {
  static const int32_t length[] = {3, 400};
  num_attn kind[] = {{CMP}, {SLC}, {DENSE}};
  for (int i = 0; i < 9; i++) {
    ot *t = ot_begin(330 + (uint64_t)i);
    num_attn a = kind[i % 3];
    a.B = 2, a.length = length, a.H = 16, a.KH = 1, a.D = a.DV = 64, a.hot = 64;
    a.sinks = i >= 3, a.softcap = i >= 6 ? 50 : 0;
    num_attn_run r = num_attn_new(t, a);
    double *k = ot_get(t, r.k);
    for (int64_t j = 1; j < r.TK; j++) memcpy(k + j * a.D, k, (size_t)a.D * sizeof *k);
    ot_set(r.k, k);
    num_attn_calls(t, &r);
    OT_OK(ot_run(r.forward, 2));
    ref_attn ref = num_attn_ref(t, &r);
    double *o = ot_doubles(t, r.o->n), *lse = ot_doubles(t, r.lse->n), off;
    ref_attn_forward(&ref, o, lse);
    off = ot_lse_error(r.lse, lse);
    cr_assert(off <= NUM_LSE_GATE, "case %d: lse is off by %.3g", i, off);
    ot_end(t);
  }
}

/* ---- options ---- */

Test(attn, softcap_and_scale) {
  num_attn a = {.name = "softcap", SOME, HEADS, .softcap = 2, .scale = 0.3};
  check_kinds(400, a);
  a.dtype = RG_BF16;
  a.softcap = 30;
  check_kinds(401, a);
}

Test(attn, sinks) {
  num_attn a = {.name = "sinks", SOME, .H = 4, .KH = 2, .D = 64, .DV = 64, .sinks = true};
  check_kinds(410, a);
  a.softcap = 3;
  a.d_lse = true;
  for (int i = 0; i < 3; i++) {
    a.dtype = types[i];
    check_kinds(411 + (uint64_t)i, a);
  }
}

Test(attn, gradient_of_lse) {
  num_attn a = {.name = "dlse", SOME, HEADS, .d_lse = true};
  for (int i = 0; i < 3; i++) {
    a.dtype = types[i];
    check_kinds(420 + (uint64_t)i, a);
  }
}

Test(attn, wide_gradients) {
  num_attn a = {.name = "f32 gradients", SOME, HEADS, .wide_grads = true, .dtype = RG_BF16};
  check_kinds(430, a);
  a.dtype = RG_F16;
  check_kinds(431, a);
}

Test(attn, strides) {
  num_attn a = {.name = "strided", SOME, .H = 4, .KH = 2, .D = 64, .DV = 64, .strided = true};
  for (int i = 0; i < 3; i++) {
    a.dtype = types[i];
    check_kinds(440 + (uint64_t)i, a);
  }
}

/* ---- shapes ---- */

Test(attn, groups) {
  static const int32_t few[] = {67, 1, 40};
  static const int64_t group[] = {1, 2, 3, 4, 8, 16, 64};
  for (int g = 0; g < 7; g++)
    for (int i = 0; i < 2; i++) {
      num_attn a = {.name = "group", .B = 3, .length = few, .dtype = types[i], .D = 64, .DV = 64};
      a.KH = group[g] < 4 ? 2 : 1;
      a.H = group[g] * a.KH;
      check_kinds(500 + (uint64_t)g, a);
    }
}

Test(attn, head_sizes) {
  static const int32_t few[] = {67, 1, 40};
  static const int64_t d[] = {64, 96, 128, 192, 256}, dv[] = {64, 128};
  for (int i = 0; i < 5; i++)
    for (int j = 0; j < 2; j++) {
      num_attn a = {
          .name = "head size", .B = 3, .length = few, .H = 2, .KH = 1, .D = d[i], .DV = dv[j]};
      check_kinds(600 + (uint64_t)i, a);
      a.dtype = j ? RG_BF16 : RG_F16;
      check_kinds(620 + (uint64_t)i, a);
    }
}

/* Latent attention's: all heads read one wide key. Tiles of it need more shared memory than GPUs
 * but those of 9.0 to 11.0 have; a call on the others says so. */
static bool wide_heads_fit(int cc) {
  return cc == 0 || (cc >= 90 && cc < 120); /* 0: no GPU */
}

Test(attn, wide_heads) {
  static const int32_t few[] = {67, 1, 40};
  static const int64_t d[] = {576, 257, 576, 72}, dv[] = {512, 64, 512, 300};
  const int cc = ot_capability();
  for (int i = 0; i < 4; i++) {
    num_attn a = {.name = "wide head",
                  .B = 3,
                  .length = few,
                  .H = i == 2 ? 20 : 2,
                  .KH = 1,
                  .D = d[i],
                  .DV = dv[i],
                  .dtype = types[i % 3]};
    if (wide_heads_fit(cc)) {
      check_kinds(660 + (uint64_t)i, a);
      continue;
    }
    a.kind = REF_SWA, a.window_left = -1;
    ot *t = ot_begin(660);
    num_attn_run r = num_attn_new(t, a);
    num_attn_calls(t, &r);
    const char *said = ot_run(r.forward, 2);
    cr_assert(said && ot_status(r.forward) == RG_E_LIMIT, "%s", said ? said : "taken");
    cr_assert(strstr(said, ot_text(t, "heads %d wide", (int)(d[i] > dv[i] ? d[i] : dv[i]))) &&
                  strstr(said, "need a GPU of compute capability 9 to 11"),
              "%s", said);
    ot_end(t);
  }
  if (!wide_heads_fit(cc))
    cr_skip_test("heads wider than 256 are refused at %d.%d, as they were", cc / 10, cc % 10);
}

/* Tokens selected one by one, for all KV heads alike. */
Test(attn, selected_tokens) {
  for (int i = 0; i < 3; i++) {
    num_attn a = {.name = "tokens",
                  .kind = REF_SLC,
                  SOME,
                  .H = 6,
                  .KH = 3,
                  .D = 64,
                  .DV = 32,
                  .block = 1,
                  .top_n = 40,
                  .one_idx = true,
                  .dtype = types[i]};
    check(690 + (uint64_t)i, a);
    a.block = 16, a.top_n = 4, a.idx = NUM_IDX_GARBAGE, a.sinks = true;
    check(693 + (uint64_t)i, a);
  }
}

/* Tokens one by one for the many heads of latent attention, whose values lie in the keys or apart:
 * heads that fill tiles of 64 and don't, rows of idx longer than a tile, shorter and cut short. */
Test(attn, selected_latent_tokens) {
  static const int32_t few[] = {9, 0, 1, 70}, keys[] = {75, 3, 1, 70}, offset[] = {66, 0, 0, 0};
  static const num_attn kind[] = {
      {.H = 20, .KH = 1, .top_n = 100, .idx = NUM_IDX_GARBAGE, .sinks = true},
      {.H = 70, .KH = 1, .top_n = 7, .latent = true, .idx = NUM_IDX_SHORT},
      {.H = 34, .KH = 2, .top_n = 67, .latent = true, .strided = 8, .one_idx = true, .d_lse = true},
      {.H = 16, .KH = 1, .top_n = 65, .idx = NUM_IDX_FUTURE, .length_k = keys, .offset = offset},
      {.H = 16, .KH = 1, .top_n = 65, .latent = true}};
  const int cc = ot_capability();
  if (!wide_heads_fit(cc))
    cr_skip_test("heads wider than 256 are refused at %d.%d (attn/wide_heads)", cc / 10, cc % 10);
  for (int i = 0; i < 5; i++) {
    num_attn a = kind[i];
    a.name = "latent tokens";
    a.kind = REF_SLC;
    a.B = 4, a.length = few;
    a.D = 576, a.DV = 512;
    a.block = 1;
    a.softcap = i == 0 ? 20 : 0;
    a.dtype = i == 4 ? RG_F16 : RG_BF16;
    check(850 + (uint64_t)i, a);
    if (!a.latent) continue;
    a.name = "latent tokens, joined";
    a.joined = true;
    a.wide_grads = i == 2;
    check(855 + (uint64_t)i, a);
  }
}

/* Values in the keys, of widths and blocks that have no kernel of their own. */
Test(attn, selected_joined) {
  check_types(870, (num_attn){.name = "joined",
                              SLC,
                              SOME,
                              .H = 4,
                              .KH = 2,
                              .D = 40,
                              .DV = 24,
                              .latent = true,
                              .joined = true});
  num_attn a = {.name = "joined, tokens",
                .kind = REF_SLC,
                .block = 1,
                .top_n = 9,
                SOME,
                .H = 16,
                .KH = 1,
                .D = 64,
                .DV = 64,
                .latent = true,
                .joined = true,
                .softcap = 20};
  check_types(873, a);
  a.wide_grads = true;
  a.strided = 8;
  check_types(876, a);
}

/* Sizes no tile likes. */
Test(attn, odd_head_sizes) {
  static const int32_t few[] = {67, 1, 40};
  static const int64_t d[] = {1, 3, 7, 17, 40}, dv[] = {5, 1, 33, 8, 100};
  for (int i = 0; i < 5; i++)
    check_kinds(640 + (uint64_t)i, (num_attn){.name = "odd head size",
                                              .B = 3,
                                              .length = few,
                                              .H = 3,
                                              .KH = 1,
                                              .D = d[i],
                                              .DV = dv[i],
                                              .floor = 0.01,
                                              .floor_grad = 0.02});
}

Test(attn, compressed_blocks) {
  static const int32_t longer[] = {70, 0, 1, 300, 33};
  static const int64_t kernel[] = {16, 8, 32, 64, 32, 4, 1, 128},
                       stride[] = {16, 8, 8, 32, 32, 2, 1, 32};
  for (int i = 0; i < 8; i++)
    check_types(700 + 3 * (uint64_t)i, (num_attn){.name = "kernel and stride",
                                                  .kind = REF_CMP,
                                                  .B = 5,
                                                  .length = longer,
                                                  HEADS,
                                                  .kernel = kernel[i],
                                                  .stride = stride[i]});
}

Test(attn, selected_blocks) {
  static const int64_t block[] = {32, 64, 128, 16, 5}, top[] = {1, 4, 16, 32};
  for (int i = 0; i < 5; i++)
    for (int j = 0; j < 4; j++)
      check(740 + (uint64_t)(4 * i + j), (num_attn){.name = "block and top_n",
                                                    .kind = REF_SLC,
                                                    SOME,
                                                    HEADS,
                                                    .block = block[i],
                                                    .top_n = top[j],
                                                    .dtype = types[(i + j) % 3]});
}

Test(attn, windows) {
  static const int64_t window[] = {0, 1, 15, 63, 64, 65, 127, 512, 1000000};
  for (int i = 0; i < 9; i++)
    check(780 + (uint64_t)i, (num_attn){.name = "window",
                                        .kind = REF_SWA,
                                        SOME,
                                        HEADS,
                                        .window_left = window[i],
                                        .dtype = types[i % 3],
                                        .floor_grad = window[i] == 0 ? 0.1 : 0});
}

/* Every level of the CPU passes the same gates. */
Test(attn, cpu_levels) {
  num_attn kind[] = {{CMP}, {SLC}, {SWA}};
  for (int level = 0; level < ot_isa(); level++)
    for (int i = 0; i < 9; i++) {
      ot *t = ot_begin(800 + (uint64_t)(10 * level + i));
      num_attn a = kind[i % 3];
      a.dtype = types[i / 3];
      a.name = "CPU level";
      a.B = 5;
      a.length = some;
      a.H = 2;
      a.KH = 1;
      a.D = a.DV = 64;
      a.isa = level + 1;
      OT_OK(num_attn_check(t, a));
      ot_end(t);
    }
}
