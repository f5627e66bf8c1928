/* tests/gpu/test_gpu_linear.c: linear at sizes where a GPU changes kernels: the library's, wide
 * tiles, sums cut into chunks. Strides, neighbours and capacity must change no bit there either. */
#include "../harness/num.h"
#include "../harness/optest_internal.h"
#include <criterion/criterion.h>

static const int32_t lengths[] = {100, 0, 1, 213, 86};

typedef struct linear_run {
  num_pack pack;
  ot_tensor *x, *w, *b, *y, *dy, *dx, *dw;
  ot_call *forward, *backward;
} linear_run;

static ot_tensor *matrix(ot *t, rg_dtype dtype, int64_t rows, int64_t columns, int64_t hole) {
  const int64_t dim[] = {rows, columns}, pad[] = {hole, 0};
  return ot_new(t, dtype, 2, dim, pad);
}

static linear_run shell(ot *t, rg_dtype dtype, int64_t K, int64_t N, int64_t B,
                        const int32_t *length, int64_t slack, int64_t hole) {
  linear_run r = {.pack = num_pack_new(t, B, length, slack)};
  const int64_t T = r.pack.T;
  r.x = matrix(t, dtype, T, K, hole), r.w = matrix(t, dtype, N, K, hole), r.b = OT_NEW(t, dtype, N);
  r.y = matrix(t, dtype, T, N, hole), r.dy = matrix(t, dtype, T, N, hole);
  r.dx = matrix(t, dtype, T, K, hole), r.dw = matrix(t, dtype, N, K, hole);
  return r;
}

static void calls(ot *t, linear_run *r) {
  num_poison_dead(r->x, &r->pack, 0, 0);
  num_poison_dead(r->dy, &r->pack, 0, 0);
  ot_call *c[2] = {ot_call_new(t, &rgi_op_linear), ot_call_new(t, &rgi_op_linear_bwd)};
  for (int i = 0; i < 2; i++) {
    ot_in(c[i], "x", r->x);
    ot_in(c[i], "w", r->w);
    ot_in(c[i], "b", r->b);
    ot_in(c[i], "cu_seqlens", r->pack.tensor);
  }
  ot_out(c[0], "y", r->y);
  ot_in(c[1], "grad.y", r->dy);
  ot_out(c[1], "d.x", r->dx);
  ot_out(c[1], "d.w", r->dw);
  r->forward = c[0], r->backward = c[1];
  OT_OK(ot_run(r->forward, 1));
  OT_OK(ot_run(r->backward, 1));
}

static void check(uint64_t seed, rg_dtype dtype, int64_t K, int64_t N) {
  ot *t = ot_begin(seed);
  linear_run r = shell(t, dtype, K, N, 5, lengths, 40, 0);
  ot_fill_normal(t, r.x, 1);
  ot_fill_normal(t, r.dy, 1);
  ot_fill_normal(t, r.w, 0.05);
  ot_fill_normal(t, r.b, 1);
  calls(t, &r);
  double *y = ot_doubles(t, r.y->n), *dx = ot_doubles(t, r.dx->n), *dw = ot_doubles(t, r.dw->n);
  double *db = ot_doubles(t, N), *x = ot_get(t, r.x), *w = ot_get(t, r.w);
  ref_linear_forward(r.pack.T, r.pack.live, K, N, x, w, ot_get(t, r.b), y);
  ref_linear_backward(r.pack.T, r.pack.live, K, N, x, w, ot_get(t, r.dy), dx, dw, db);
  cr_assert(ot_relrms(r.y, y, 1e-3) <= num_gate(dtype));
  cr_assert(ot_relrms(r.dx, dx, 1e-3) <= num_grad_gate(dtype, 1));
  cr_assert(ot_relrms(r.dw, dw, 1e-3) <= num_grad_gate(dtype, 1));
  OT_OK(ot_run_repeated(r.forward, 1));
  OT_OK(ot_run_repeated(r.backward, 1));
  for (int64_t hole = 5; hole <= 8; hole += 3) { /* off and on multiples of 16 bytes */
    linear_run q = shell(t, dtype, K, N, 5, lengths, 40, hole);
    ot_copy(q.x, r.x), ot_copy(q.dy, r.dy), ot_copy(q.w, r.w), ot_copy(q.b, r.b);
    calls(t, &q);
    cr_assert(ot_same_bits(q.y, r.y), "y, rows %d further apart", (int)hole);
    cr_assert(ot_same_bits(q.dx, r.dx), "dx, rows %d further apart", (int)hole);
    cr_assert(ot_same_bits(q.dw, r.dw), "dw, rows %d further apart", (int)hole);
  }
  linear_run one = shell(t, dtype, K, N, 1, &lengths[3], 0, 0);
  ot_set(one.x, ot_get(t, r.x) + 101 * K);
  ot_set(one.dy, ot_get(t, r.dy) + 101 * N);
  ot_copy(one.w, r.w), ot_copy(one.b, r.b);
  calls(t, &one);
  cr_assert(ot_same_rows(one.y, 0, r.y, 101, 213), "y alone");
  cr_assert(ot_same_rows(one.dx, 0, r.dx, 101, 213), "dx alone");
  ot_end(t);
}

Test(gpu_linear, library_sizes) {
  if (!ot_on_gpu()) cr_skip_test("needs a GPU");
  check(1, RG_BF16, 512, 768);
  check(2, RG_F16, 768, 512);
  check(3, RG_BF16, 1024, 520);
}

Test(gpu_linear, own_kernels) {
  if (!ot_on_gpu()) cr_skip_test("needs a GPU");
  check(11, RG_BF16, 1024, 256);
  check(12, RG_F16, 200, 600);
  check(13, RG_F32, 300, 264);
  check(14, RG_F16, 200, 4224); /* a large tile for each of 132 multiprocessors, and holes' small */
  check(15, RG_BF16, 4224, 200);
}

/* Rows alone, and among so many others that the library would take, or we, other tiles. */
Test(gpu_linear, batch_invariant) {
  if (!ot_on_gpu()) cr_skip_test("needs a GPU");
  enum { K = 1024, N = 1536, MOST = 4096 };
  static const int32_t rows[] = {1, 2, 17, 128, 511, MOST};
  ot *t = ot_begin(21);
  ot_tensor *w = matrix(t, RG_BF16, N, K, 0), *x = matrix(t, RG_BF16, MOST, K, 0), *whole = NULL;
  ot_fill_normal(t, x, 1);
  ot_fill_normal(t, w, 0.05);
  for (int i = RGI_COUNT(rows) - 1; i >= 0; i--) {
    ot_tensor *some = matrix(t, RG_BF16, rows[i], K, 0), *y = matrix(t, RG_BF16, rows[i], N, 0);
    ot_set(some, ot_get(t, x) + (MOST - rows[i]) * (int64_t)K);
    ot_call *c = ot_call_new(t, &rgi_op_linear);
    ot_in(c, "x", some);
    ot_in(c, "w", w);
    ot_int(c, "batch_invariant", 1);
    ot_out(c, "y", y);
    OT_OK(ot_run(c, 1));
    if (!whole) whole = y;
    cr_assert(ot_same_rows(y, 0, whole, MOST - rows[i], rows[i]), "the last %d rows", rows[i]);
  }
  ot_end(t);
}
