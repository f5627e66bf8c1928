/* tests/gpu/test_gpu_attn_long.c: attention on sequences of a few thousand tokens. GPU schedules
 * cut long lists of queries and long sequences into parts; shorter tests never meet those. Gates,
 * and the same bits for a sequence alone and inside a pack. */
#include "../harness/num.h"
#include "../harness/optest_internal.h"
#include <criterion/criterion.h>

static const int32_t longer[] = {2600, 7, 1300}, keys_long[] = {2700, 7, 1500},
                     offset[] = {100, 0, 200};

static num_attn with(num_attn a, rg_dtype dtype) {
  a.name = "long";
  a.dtype = dtype;
  a.B = 3;
  a.length = longer;
  if (a.H == 0) a.H = 3, a.KH = 1;
  if (a.D == 0) a.D = a.DV = 64;
  a.d_lse = true;
  return a;
}

static void check(uint64_t seed, num_attn a) {
  if (!ot_on_gpu()) cr_skip_test("needs REGRAPH_TEST_DEVICE=cuda");
  ot *t = ot_begin(seed);
  OT_OK(num_attn_check(t, a));
  ot_end(t);
}

static void run_both(num_attn_run *r) {
  OT_OK(ot_run(r->forward, 1));
  OT_OK(ot_run(r->backward, 1));
}

static void check_alone(uint64_t seed, num_attn a) {
  if (!ot_on_gpu()) cr_skip_test("needs REGRAPH_TEST_DEVICE=cuda");
  ot *t = ot_begin(seed);
  num_attn_run r = num_attn_new(t, a);
  num_attn_calls(t, &r);
  run_both(&r);
  for (int64_t b = 0; b < a.B; b++) {
    num_attn_run one = num_attn_alone(t, &r, b);
    num_attn_calls(t, &one);
    run_both(&one);
    const int64_t row = r.pack.cu[b], n = r.pack.cu[b + 1] - row;
    int64_t key = r.pack_k.cu[b], keys = r.pack_k.cu[b + 1] - key;
    if (a.kind == REF_CMP) key /= a.stride, keys = ref_blocks(keys, a.kernel, a.stride);
    cr_assert(ot_same_rows(one.o, 0, r.o, row, n) && ot_same_rows(one.lse, 0, r.lse, row, n),
              "forward, %d", (int)b);
    cr_assert(ot_same_rows(one.dq, 0, r.dq, row, n), "dq, %d", (int)b);
    cr_assert(ot_same_rows(one.dk, 0, r.dk, key, keys) && ot_same_rows(one.dv, 0, r.dv, key, keys),
              "dk or dv, %d", (int)b);
  }
  ot_end(t);
}

#define CASES(suite_name, x)                    \
  Test(gpu_attn_long, suite_name##_f32) {       \
    check(1, with((num_attn)x, RG_F32));        \
    check_alone(2, with((num_attn)x, RG_F32));  \
  }                                             \
  Test(gpu_attn_long, suite_name##_bf16) {      \
    check(3, with((num_attn)x, RG_BF16));       \
    check_alone(4, with((num_attn)x, RG_BF16)); \
  }
#define LIST(...) \
  { __VA_ARGS__ }

CASES(cmp, LIST(.kind = REF_CMP, .kernel = 32, .stride = 16))
CASES(cmp_chunk,
      LIST(.kind = REF_CMP, .kernel = 16, .stride = 8, .length_k = keys_long, .offset = offset))
CASES(slc, LIST(.kind = REF_SLC, .block = 64, .top_n = 8))
CASES(slc_same, LIST(.kind = REF_SLC, .block = 64, .top_n = 4, .idx = NUM_IDX_SAME))
CASES(slc_wide_blocks, LIST(.kind = REF_SLC, .block = 160, .top_n = 3, .D = 72, .DV = 128))
CASES(slc_chunk,
      LIST(.kind = REF_SLC, .block = 32, .top_n = 16, .length_k = keys_long, .offset = offset))
CASES(swa, LIST(.kind = REF_SWA, .window_left = 300, .D = 128, .DV = 128))
CASES(dense, LIST(.kind = REF_SWA, .window_left = -1))

/* Enough tiles for large ones in the pack (mma_bwd.c), too few for them alone. */
#define TILES(type, dtype, heads, width)                                                           \
  Test(gpu_attn_long, large_tiles_##type##_##heads##_##width) {                                    \
    check_alone(                                                                                   \
        5,                                                                                         \
        with(                                                                                      \
            (num_attn){                                                                            \
                .kind = REF_SWA, .window_left = -1, .H = heads, .KH = 8, .D = width, .DV = width}, \
            dtype));                                                                               \
  }
TILES(bf16, RG_BF16, 8, 128)
TILES(bf16, RG_BF16, 16, 104)
TILES(f16, RG_F16, 16, 128)
