/* tests/gpu/test_flash_bwd.c: sequences that flash_bwd cuts into chunks of queries, which the op
 * tests' lengths are too short for: against the oracle, and both ways of adding up dK and dV
 * against each other. */
#include "../harness/num.h"
#include "../harness/optest_internal.h"
#include <criterion/criterion.h>
#include <stdlib.h>

static const int32_t lengths[] = {700, 0, 300};
enum { HEADS = 16, WIDTH = 64, LIVE = 1000, ROOMY = 60000 };

Test(flash_bwd, chunks) {
  if (!ot_on_gpu()) cr_skip_test("REGRAPH_TEST_DEVICE is not cuda");
  static const num_attn kind[] = {{.kind = REF_CMP, .kernel = 32, .stride = 16},
                                  {.kind = REF_CMP, .kernel = 2, .stride = 1},
                                  {.kind = REF_SWA, .window_left = -1},
                                  {.kind = REF_SWA, .window_left = 150}};
  for (int i = 0; i < 8; i++) {
    ot *t = ot_begin(900 + (uint64_t)i);
    num_attn a = kind[i % 4];
    a.name = "chunks of queries";
    a.dtype = RG_BF16;
    a.B = 3;
    a.length = lengths;
    a.H = HEADS;
    a.KH = 1;
    a.D = a.DV = i / 4 ? 128 : 64;
    a.wide_grads = i % 2;
    OT_OK(num_attn_check(t, a));
    ot_end(t);
  }
}

#ifdef REGRAPH_CUDA
#include "../../exec/cuda.h"
#include "../../ops/cuda/attn.h"

/* ---- the same sequences in tight and in roomy tensors: chunks add to one sum in the latter */

static void *device(size_t bytes, int fill) {
  void *p = NULL;
  cr_assert_eq(cudaMalloc(&p, bytes), cudaSuccess);
  cr_assert_eq(cudaMemset(p, fill, bytes), cudaSuccess);
  return p;
}
static uint16_t *random_rows(ot *t, int64_t rows, int64_t capacity, int64_t heads) {
  const int64_t n = rows * heads * WIDTH;
  uint16_t *host = malloc((size_t)n * 2), *p = device((size_t)(capacity * heads * WIDTH) * 2, 0xff);
  if (!host) abort();
  for (int64_t i = 0; i < n; i++) host[i] = rgi_f32_to_bf16((float)ot_normal(t));
  cr_assert_eq(cudaMemcpy(p, host, (size_t)n * 2, cudaMemcpyHostToDevice), cudaSuccess);
  free(host);
  return p;
}
static rgk_tensor rows_of(void *data, int64_t heads, rg_dtype dtype) {
  const bool flat = dtype == RG_F32;
  return (rgk_tensor){.data = data,
                      .row = flat ? heads : heads * WIDTH,
                      .head = flat ? 1 : WIDTH,
                      .dtype = (int32_t)dtype};
}

Test(flash_bwd, one_sum_or_a_place_each) {
  if (!ot_on_gpu()) cr_skip_test("REGRAPH_TEST_DEVICE is not cuda");
  rg_error error = {0};
  rg_gpu gpu;
  if (rgi_cuda_device(&gpu, &error) != RG_OK || gpu.cc != 90) cr_skip_test("no Hopper GPU");
  ot *t = ot_begin(950);
  const int32_t starts[] = {0, 700, 700, LIVE};
  int32_t *cu = device(sizeof starts, 0);
  cudaMemcpy(cu, starts, sizeof starts, cudaMemcpyHostToDevice);
  float lse[LIVE * HEADS];
  for (int i = 0; i < LIVE * HEADS; i++) lse[i] = 9;
  float *lse_at = device((size_t)ROOMY * HEADS * 4, 0xff);
  cudaMemcpy(lse_at, lse, sizeof lse, cudaMemcpyHostToDevice);
  rgk_attn a = {
      .mode = RGK_SWA, .dtype = RG_BF16, .H = HEADS, .KH = 1, .G = HEADS, .D = WIDTH, .E = WIDTH};
  a.window_left = -1;
  a.scale = 0.125f;
  a.aligned = true;
  a.q = rows_of(random_rows(t, LIVE, ROOMY, HEADS), HEADS, RG_BF16);
  a.o = rows_of(random_rows(t, LIVE, ROOMY, HEADS), HEADS, RG_BF16);
  a.d_o = rows_of(random_rows(t, LIVE, ROOMY, HEADS), HEADS, RG_BF16);
  a.k = rows_of(random_rows(t, LIVE, ROOMY, 1), 1, RG_BF16);
  a.v = rows_of(random_rows(t, LIVE, ROOMY, 1), 1, RG_BF16);
  a.lse = rows_of(lse_at, HEADS, RG_F32);
  static uint16_t out[2][3][LIVE * HEADS * WIDTH];
  for (int i = 0; i < 2; i++) {
    a.T = a.S = i ? ROOMY : LIVE;
    a.seqs = a.kseqs = (rgk_seqs){.starts = cu, .n = 3, .rows = a.T};
    void *grad[3];
    for (int g = 0; g < 3; g++)
      grad[g] = device((size_t)(ROOMY * (g ? 1 : HEADS) * WIDTH) * 2, 0xff);
    a.dq = rows_of(grad[0], HEADS, RG_BF16);
    a.dk = rows_of(grad[1], 1, RG_BF16);
    a.dv = rows_of(grad[2], 1, RG_BF16);
    cr_assert_null(rgi_attn_flash_bwd.refuses(&a, &gpu));
    void *work = device(rgi_attn_flash_bwd.workspace(&a, &gpu), 0xff);
    rgi_cuda_eager x;
    rgi_cuda_eager_init(&x, 0, &error);
    cr_assert_eq(rgi_attn_flash_bwd.steps(&a, &gpu, work, &x.base), RG_OK, "%s", error.message);
    cr_assert_eq(cudaDeviceSynchronize(), cudaSuccess);
    rgi_cuda_eager_done(&x);
    for (int g = 0; g < 3; g++)
      cudaMemcpy(out[i][g], grad[g], (size_t)(LIVE * (g ? 1 : HEADS) * WIDTH) * 2,
                 cudaMemcpyDeviceToHost);
    cudaFree(work);
    for (int g = 0; g < 3; g++) cudaFree(grad[g]);
  }
  for (int g = 0; g < 3; g++) {
    const size_t n = (size_t)(LIVE * (g ? 1 : HEADS) * WIDTH);
    cr_assert_eq(memcmp(out[0][g], out[1][g], n * 2), 0, "gradient %d", g);
    for (size_t i = 0; i < n; i++)
      cr_assert((out[0][g][i] & 0x7f80) != 0x7f80, "gradient %d is not finite", g);
  }
  ot_end(t);
}
#endif
