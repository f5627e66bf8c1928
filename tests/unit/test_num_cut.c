/* tests/unit/test_num_cut.c: a sequence's queries in two calls, of which q_offset tells the second
 * where it begins, have one call's bits, by every family of kernels: the plain ones and mma.sync's
 * run where they are asked for (REGRAPH_TEST_CC, other types). */
#include "../harness/num.h"
#include <criterion/criterion.h>

/* Fewer where no GPU makes it quick. */
static int32_t tokens(void) {
  return ot_on_gpu() ? 700 : 230;
}
/* Near the ends, on and beside tiles of 64 and twelve queries, anywhere. */
static const int32_t cuts[] = {1, 75, 192, 229, 333, 448, 699};

typedef struct part {
  int32_t first, n;
} part;
/* The i-th of 2 · ncuts() parts. */
static part part_of(int i) {
  const int32_t at = cuts[i / 2];
  return i % 2 ? (part){at, tokens() - at} : (part){0, at};
}
static int ncuts(void) {
  int n = 0;
  while (n < (int)(sizeof cuts / sizeof *cuts) && cuts[n] < tokens()) n++;
  return n;
}

static void cut_attn(uint64_t seed, num_attn a) {
  static const rg_dtype types[] = {RG_BF16, RG_F16, RG_F32};
  a.B = 1;
  const int32_t length = tokens();
  a.length = &length;
  a.d_lse = true;
  for (int i = 0; i < 3; i++) {
    ot *t = ot_begin(seed + (uint64_t)i);
    a.dtype = types[i];
    num_attn_run r = num_attn_new(t, a);
    num_attn_calls(t, &r);
    OT_OK(ot_run(r.forward, 2));
    OT_OK(ot_run(r.backward, 2));
    for (int c = 0; c < 2 * ncuts(); c++) {
      const int64_t row = part_of(c).first, n = part_of(c).n;
      num_attn_run one = num_attn_queries(t, &r, 0, row, n);
      num_attn_calls(t, &one);
      OT_OK(ot_run(one.forward, 1));
      OT_OK(ot_run(one.backward, 1));
      cr_assert(ot_same_rows(one.o, 0, r.o, row, n), "%s: o of %d from %d on",
                rg_dtype_name(a.dtype), (int)n, (int)row);
      cr_assert(ot_same_rows(one.lse, 0, r.lse, row, n), "%s: lse of %d from %d on",
                rg_dtype_name(a.dtype), (int)n, (int)row);
      cr_assert(ot_same_rows(one.dq, 0, r.dq, row, n), "%s: dq of %d from %d on",
                rg_dtype_name(a.dtype), (int)n, (int)row);
    }
    ot_end(t);
  }
}

Test(attn_exact, cut_compressed) {
  cut_attn(300,
           (num_attn){
               .kind = REF_CMP, .H = 4, .KH = 2, .D = 128, .DV = 128, .kernel = 32, .stride = 16});
  cut_attn(
      303,
      (num_attn){.kind = REF_CMP, .H = 3, .KH = 1, .D = 192, .DV = 128, .kernel = 8, .stride = 4});
}

Test(attn_exact, cut_windows) {
  cut_attn(310,
           (num_attn){.kind = REF_SWA, .H = 4, .KH = 2, .D = 128, .DV = 128, .window_left = 150});
  cut_attn(
      313,
      (num_attn){
          .kind = REF_SWA, .H = 3, .KH = 1, .D = 64, .DV = 64, .window_left = -1, .sinks = true});
}

/* Groups of 16 go by queries on Hopper, of 4 by keys. */
Test(attn_exact, cut_selected) {
  cut_attn(
      320,
      (num_attn){.kind = REF_SLC, .H = 16, .KH = 1, .D = 128, .DV = 128, .block = 64, .top_n = 4});
  cut_attn(
      323,
      (num_attn){.kind = REF_SLC, .H = 8, .KH = 2, .D = 128, .DV = 128, .block = 64, .top_n = 4});
  cut_attn(326, (num_attn){.kind = REF_SLC,
                           .H = 4,
                           .KH = 1,
                           .D = 64,
                           .DV = 64,
                           .block = 32,
                           .top_n = 5,
                           .idx = NUM_IDX_SHORT});
}

Test(attn_exact, cut_tokens) {
  cut_attn(330, (num_attn){.kind = REF_SLC,
                           .H = 4,
                           .KH = 2,
                           .D = 64,
                           .DV = 64,
                           .block = 1,
                           .top_n = 40,
                           .one_idx = true});
}

Test(attn_exact, cut_latent_tokens) {
  const int cc = ot_capability();
  if (cc > 0 && (cc < 90 || cc >= 120))
    cr_skip_test("heads wider than 256 are refused at %d.%d (attn/wide_heads)", cc / 10, cc % 10);
  cut_attn(340, (num_attn){.kind = REF_SLC,
                           .H = 16,
                           .KH = 1,
                           .D = 576,
                           .DV = 512,
                           .block = 1,
                           .top_n = 70,
                           .latent = true});
}

/* ---- topk ---- */

typedef struct cut_topk {
  int64_t H, KH, D, kernel, stride, block, top_n;
  const char *score;
  bool max;
} cut_topk;

/* idx of n queries from `first` on. */
static ot_tensor *choice(ot *t, const cut_topk *a, rg_dtype dtype, ot_tensor *const x[4],
                         int32_t first, int32_t n) {
  const int32_t keys = tokens();
  const num_pack pack = num_pack_new(t, 1, &n, 0), pack_k = num_pack_new(t, 1, &keys, 0);
  ot_tensor *q = OT_NEW(t, dtype, n, a->H, a->D), *lse = OT_NEW(t, RG_F32, n, a->H),
            *weight = OT_NEW(t, dtype, n, a->H), *idx = OT_NEW(t, RG_I32, n, a->KH, a->top_n);
  ot_set(q, ot_get(t, x[0]) + first * a->H * a->D);
  ot_set(lse, ot_get(t, x[2]) + first * a->H);
  ot_set(weight, ot_get(t, x[3]) + first * a->H);
  ot_call *c = ot_call_new(t, &rgi_op_topk);
  ot_in(c, "q", q);
  ot_in(c, "k", x[1]);
  if (!a->score) ot_in(c, "lse", lse);
  if (a->score && a->score[0] == 'r') ot_in(c, "weight", weight);
  ot_in(c, "cu_seqlens", pack.tensor);
  ot_in(c, "cu_seqlens_k", pack_k.tensor);
  ot_in(c, "q_offset", num_ints(t, 1, &first));
  ot_int(c, "kernel", a->kernel);
  ot_int(c, "stride", a->stride);
  ot_int(c, "block", a->block);
  ot_int(c, "top_n", a->top_n);
  ot_int(c, "init", 1);
  ot_int(c, "local", 1);
  if (a->score) ot_choice(c, "score", a->score);
  if (a->max) ot_choice(c, "pool", "max");
  ot_out(c, "idx", idx);
  OT_OK(ot_run(c, 2));
  return idx;
}

Test(topk, cut) {
  static const cut_topk kind[] = {
      {.H = 16, .KH = 1, .D = 128, .kernel = 32, .stride = 16, .block = 64, .top_n = 6},
      {.H = 16, .KH = 2, .D = 64, .kernel = 8, .stride = 4, .block = 16, .top_n = 12},
      {.H = 4, .KH = 1, .D = 192, .kernel = 16, .stride = 8, .block = 16, .top_n = 9},
      {.H = 2,
       .KH = 2,
       .D = 64,
       .kernel = 32,
       .stride = 32,
       .block = 32,
       .top_n = 5,
       .score = "dot"},
      {.H = 4,
       .KH = 2,
       .D = 128,
       .kernel = 1,
       .stride = 1,
       .block = 64,
       .top_n = 4,
       .score = "dot",
       .max = true},
      {.H = 16,
       .KH = 1,
       .D = 128,
       .kernel = 1,
       .stride = 1,
       .block = 1,
       .top_n = 40,
       .score = "relu"},
      {.H = 6,
       .KH = 2,
       .D = 40,
       .kernel = 16,
       .stride = 16,
       .block = 16,
       .top_n = 7,
       .score = "relu"}};
  static const rg_dtype types[] = {RG_BF16, RG_F16, RG_F32};
  for (int i = 0; i < 3 * (int)(sizeof kind / sizeof *kind); i++) {
    ot *t = ot_begin(400 + (uint64_t)i);
    const cut_topk *a = kind + i / 3;
    const rg_dtype dtype = types[i % 3];
    ot_tensor *x[] = {OT_NEW(t, dtype, tokens(), a->H, a->D),
                      OT_NEW(t, dtype, tokens() / a->stride, a->KH, a->D),
                      OT_NEW(t, RG_F32, tokens(), a->H), OT_NEW(t, dtype, tokens(), a->H)};
    for (int j = 0; j < 4; j++) ot_fill_normal(t, x[j], 1);
    const ot_tensor *const whole = choice(t, a, dtype, x, 0, tokens());
    for (int c = 0; c < 2 * ncuts(); c++) {
      const int32_t row = part_of(c).first, n = part_of(c).n;
      cr_assert(ot_same_rows(choice(t, a, dtype, x, row, n), 0, whole, row, n),
                "case %d, %s: %d from %d on", i / 3, rg_dtype_name(dtype), (int)n, (int)row);
    }
    ot_end(t);
  }
}
