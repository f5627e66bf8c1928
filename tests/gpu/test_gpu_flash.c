/* tests/gpu/test_gpu_flash.c: forward attention at every width that has kernels of its own, and
 * some that borrow them: gates, a sequence alone, and a neighbour full of NaN. Lengths end in the
 * middle of tiles. */
#include "../harness/num.h"
#include "../harness/optest_internal.h"
#include <criterion/criterion.h>

enum { POISONED = 2 };
static const int32_t lengths[] = {531, 3, 200, 0, 333}, keys_long[] = {600, 3, 200, 9, 400},
                     offset[] = {69, 0, 0, 4, 30};

static void check_one(ot *t, num_attn a) {
  num_attn_run r = num_attn_new(t, a);
  num_attn_calls(t, &r);
  OT_OK(ot_run(r.forward, 1));
  const ref_attn ref = num_attn_ref(t, &r);
  double *o = ot_doubles(t, r.o->n), *lse = ot_doubles(t, r.lse->n);
  ref_attn_forward(&ref, o, lse);
  const double err = ot_relrms(r.o, o, 1e-3), err_lse = ot_lse_error(r.lse, lse);
  cr_assert(err <= num_gate(a.dtype), "o: %g", err);
  cr_assert(err_lse <= 1e-5, "lse: %g", err_lse);
  num_attn_run q = num_attn_again(t, &r, false); /* rows off 16 bytes would go to other kernels */
  int64_t key = q.pack_k.cu[POISONED], keys = q.pack_k.cu[POISONED + 1] - key;
  if (a.kind == REF_CMP) key /= a.stride, keys = ref_blocks(keys, a.kernel, a.stride);
  ot_poison_rows(q.q, q.pack.cu[POISONED], q.pack.cu[POISONED + 1]);
  ot_poison_rows(q.k, key, key + keys);
  ot_poison_rows(q.v, key, key + keys);
  if (q.idx) ot_poison_rows(q.idx, q.pack.cu[POISONED], q.pack.cu[POISONED + 1]);
  num_attn_calls(t, &q);
  OT_OK(ot_run(q.forward, 1));
  for (int64_t b = 0; b < a.B; b++) {
    const int64_t row = r.pack.cu[b], n = r.pack.cu[b + 1] - row;
    num_attn_run one = num_attn_alone(t, &r, b);
    num_attn_calls(t, &one);
    OT_OK(ot_run(one.forward, 1));
    cr_assert(ot_same_rows(one.o, 0, r.o, row, n) && ot_same_rows(one.lse, 0, r.lse, row, n),
              "sequence %d alone", (int)b);
    if (b != POISONED)
      cr_assert(ot_same_rows(q.o, row, r.o, row, n) && ot_same_rows(q.lse, row, r.lse, row, n),
                "sequence %d beside NaN", (int)b);
  }
}

static void check_width(int64_t D, int64_t E) {
  static const num_attn kinds[] = {
      {.kind = REF_CMP, .kernel = 8, .stride = 4},
      {.kind = REF_CMP, .kernel = 3, .stride = 1, .softcap = 20, .sinks = true},
      {.kind = REF_SWA, .window_left = 150, .sinks = true},
      {.kind = REF_SWA, .window_left = -1}};
  if (!ot_on_gpu()) cr_skip_test("needs REGRAPH_TEST_DEVICE=cuda");
  for (int i = 0; i < 8; i++) {
    num_attn a = kinds[i / 2];
    ot *t = ot_begin((uint64_t)(D * 1000 + E + i));
    a.name = "width";
    a.dtype = i % 2 ? RG_F16 : RG_BF16;
    a.B = 5;
    a.length = lengths;
    if (i % 4 == 3) a.length_k = keys_long, a.offset = offset;
    a.H = 3;
    a.KH = 1;
    a.D = D;
    a.DV = E;
    check_one(t, a);
    ot_end(t);
  }
}

Test(gpu_flash, d64) {
  check_width(64, 64);
}
Test(gpu_flash, d64_128) {
  check_width(64, 128);
}
Test(gpu_flash, d96) {
  check_width(96, 96);
}
Test(gpu_flash, d128) {
  check_width(128, 128);
}
Test(gpu_flash, d192_128) {
  check_width(192, 128);
}
Test(gpu_flash, d256) {
  check_width(256, 256);
}
Test(gpu_flash, borrowed_widths) {
  check_width(40, 40);
  check_width(72, 48);
  check_width(128, 64);
}

/* Selected blocks with large groups: the queries' own kernels. */
static void check_gather(int64_t D, int64_t E) {
  static const int32_t few[] = {131, 3, 70, 0, 97}, few_keys[] = {200, 3, 70, 9, 164};
  static const int64_t group[] = {16, 32, 24, 40, 64, 200}, block[] = {64, 32, 128, 16, 200, 100};
  if (!ot_on_gpu()) cr_skip_test("needs REGRAPH_TEST_DEVICE=cuda");
  for (int i = 0; i < 12; i++) {
    ot *t = ot_begin((uint64_t)(D * 2000 + E + i));
    num_attn a = {.name = "group and width",
                  .kind = REF_SLC,
                  .B = 5,
                  .length = few,
                  .KH = 1,
                  .D = D,
                  .DV = E};
    a.block = block[i % 6];
    a.top_n = i % 3 == 2 ? 16 : 3;
    a.idx = (num_idx)(i % 5);
    a.dtype = i / 6 == i % 2 ? RG_F16 : RG_BF16;
    if (i % 4 == 3) a.length_k = few_keys, a.offset = offset;
    if (i % 3 == 1) a.sinks = true;
    if (i % 4 == 2) a.softcap = 20;
    if (i % 6 < 2) a.KH = 2;
    a.H = group[i % 6] * a.KH;
    check_one(t, a);
    ot_end(t);
  }
}

Test(gpu_gather, d64) {
  check_gather(64, 64);
}
Test(gpu_gather, d96) {
  check_gather(96, 96);
}
Test(gpu_gather, d128) {
  check_gather(128, 128);
}
Test(gpu_gather, d192_128) {
  check_gather(192, 128);
}
Test(gpu_gather, d256) {
  check_gather(256, 256);
}

/* More tiles than thread blocks. */
Test(gpu_gather, rounds) {
  static const int32_t many[] = {1800, 3, 400, 0, 397};
  if (!ot_on_gpu()) cr_skip_test("needs REGRAPH_TEST_DEVICE=cuda");
  for (int i = 0; i < 2; i++) {
    ot *t = ot_begin((uint64_t)(77 + i));
    check_one(t, (num_attn){.name = "rounds",
                            .kind = REF_SLC,
                            .B = 5,
                            .length = many,
                            .H = i ? 64 : 32,
                            .KH = i ? 1 : 2,
                            .D = 64,
                            .DV = 64,
                            .block = 64,
                            .top_n = 4,
                            .idx = i ? NUM_IDX_RANDOM : NUM_IDX_GARBAGE,
                            .dtype = RG_BF16});
    ot_end(t);
  }
}
