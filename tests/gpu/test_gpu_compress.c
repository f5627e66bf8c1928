/* tests/gpu/test_gpu_compress.c: compress_kv at sizes where a GPU changes its ways: wide tiles,
 * more heads than the partial sums of dW have room for, sums cut into chunks. */
#include "../harness/num.h"
#include "../harness/optest_internal.h"
#include <criterion/criterion.h>
#include <math.h>

enum { KERNEL = 32, STRIDE = 16 };

static void check(uint64_t seed, const char *method, ref_method m, int64_t KH, int64_t D, int64_t B,
                  const int32_t *length) {
  ot *t = ot_begin(seed);
  num_pack pack = num_pack_new(t, B, length, 5);
  const int64_t rows = pack.T / STRIDE, wide = m == REF_LINEAR ? D : 2 * D;
  ot_tensor *x = OT_NEW(t, RG_BF16, pack.T, KH, D), *w = OT_NEW(t, RG_BF16, wide, KERNEL * D);
  ot_tensor *y = OT_NEW(t, RG_BF16, rows, KH, D), *dy = OT_NEW(t, RG_BF16, rows, KH, D);
  ot_tensor *dx = OT_NEW(t, RG_BF16, pack.T, KH, D), *dw = OT_NEW(t, RG_BF16, wide, KERNEL * D);
  ot_tensor *v = OT_NEW(t, RG_BF16, pack.T, 1, 8), *v_out = OT_NEW(t, RG_BF16, rows, 1, 8);
  ot_fill_normal(t, x, 1);
  ot_fill_normal(t, dy, 1);
  ot_fill_normal(t, v, 1);
  ot_fill_normal(t, w, 1 / sqrt((double)(KERNEL * D)));
  num_poison_dead(x, &pack, 0, 0);
  num_poison_dead(dy, &pack, KERNEL, STRIDE);
  ot_call *c[2] = {ot_call_new(t, &rgi_op_compress_kv), ot_call_new(t, &rgi_op_compress_kv_bwd)};
  for (int i = 0; i < 2; i++) {
    ot_in(c[i], "k", x);
    ot_in(c[i], "v", v);
    ot_in(c[i], "k_weight", w);
    ot_in(c[i], "cu_seqlens", pack.tensor);
    ot_int(c[i], "kernel", KERNEL);
    ot_int(c[i], "stride", STRIDE);
    ot_choice(c[i], "k_method", method);
  }
  ot_out(c[0], "k", y);
  ot_out(c[0], "v", v_out);
  ot_in(c[1], "grad.k", dy);
  ot_out(c[1], "d.k", dx);
  ot_out(c[1], "d.k_weight", dw);
  OT_OK(ot_run(c[0], 1));
  OT_OK(ot_run(c[1], 1));
  ref_compress ref = {.method = m,
                      .T = pack.T,
                      .B = B,
                      .KH = KH,
                      .D = D,
                      .kernel = KERNEL,
                      .stride = STRIDE,
                      .x = ot_get(t, x),
                      .w = ot_get(t, w),
                      .cu = pack.cu};
  double *want_y = ot_doubles(t, y->n), *want_x = ot_doubles(t, dx->n),
         *want_w = ot_doubles(t, dw->n);
  ref_compress_forward(&ref, want_y);
  ref_compress_backward(&ref, ot_get(t, dy), want_x, want_w);
  cr_assert(ot_relrms(y, want_y, 1e-3) <= num_gate(RG_BF16), "y");
  cr_assert(ot_relrms(dx, want_x, 1e-3) <= num_grad_gate(RG_BF16, 1), "dx");
  cr_assert(ot_relrms(dw, want_w, 1e-3) <= num_grad_gate(RG_BF16, 1), "dw");
  OT_OK(ot_check_sums(c[1]));
  ot_end(t);
}

Test(gpu_compress, more_heads_than_a_round) {
  static const int32_t lengths[] = {70, 20, 33};
  if (!ot_on_gpu()) cr_skip_test("needs a GPU");
  check(1, "linear", REF_LINEAR, 26, 128, 3, lengths);
  check(2, "swiglu", REF_SWIGLU, 13, 128, 3, lengths);
}

Test(gpu_compress, long_sequences) {
  static const int32_t lengths[] = {3000, 31, 9011};
  if (!ot_on_gpu()) cr_skip_test("needs a GPU");
  check(3, "linear", REF_LINEAR, 1, 32, 3, lengths);
  check(4, "sigmoid_mul", REF_SIGMOID_MUL, 2, 24, 3, lengths);
}
