/* tests/unit/test_num_compress.c: compress_kv forward and backward against the oracle, all methods
 * for K and V apart, and its exactness: threads, packs, strides, head groups. */
#include "../harness/num.h"
#include <criterion/criterion.h>
#include <math.h>

typedef struct compress_case {
  const char *name;
  rg_dtype dtype;
  ref_method k_method, v_method;
  int64_t KH, D, DV, B;
  const int32_t *length;
  int64_t kernel, stride;
  bool outliers, wide, strided, keys; /* keys: without values */
  /* of k and v; 0: 1. Slopes of the gates are as sensitive to it as hot softmaxes are */
  double deviation;
  int isa; /* level + 1; 0: best */
} compress_case;

typedef struct compress_run {
  compress_case a;
  num_pack pack;
  ot_tensor *x[2], *w[2], *y[2], *dy[2], *dx[2], *dw[2]; /* K, V */
  ot_call *forward, *backward;
} compress_run;

static const char *const method_name[] = {"mean", "linear", "swiglu", "sigmoid_mul"};
static const char *const port[2] = {"k", "v"}, *const w_port[2] = {"k_weight", "v_weight"};
static const char *const grad_port[2] = {"grad.k", "grad.v"}, *const d_port[2] = {"d.k", "d.v"};
static const char *const dw_port[2] = {"d.k_weight", "d.v_weight"};

static ref_method method_of(const compress_case *a, int side) {
  return side ? a->v_method : a->k_method;
}

static int sides(const compress_case *a) {
  return a->keys ? 1 : 2;
}

static ot_tensor *tensor(ot *t, const compress_case *a, rg_dtype dtype, int64_t rows, int side) {
  const int64_t dim[] = {rows, a->KH, side ? a->DV : a->D}, pad[] = {7, 2, 0};
  return ot_new(t, dtype, 3, dim, a->strided ? pad : NULL);
}

/* All tensors, weights and inputs still empty. */
static compress_run shell(ot *t, compress_case a, int64_t slack) {
  compress_run r = {.a = a};
  rg_dtype grad = a.wide ? RG_F32 : a.dtype;
  r.pack = num_pack_new(t, a.B, a.length, slack);
  for (int s = 0; s < 2; s++) {
    int64_t d = s ? a.DV : a.D;
    ref_method m = method_of(&a, s);
    r.x[s] = tensor(t, &a, a.dtype, r.pack.T, s);
    r.y[s] = tensor(t, &a, a.dtype, r.pack.T / a.stride, s);
    r.dy[s] = tensor(t, &a, a.dtype, r.pack.T / a.stride, s);
    r.dx[s] = tensor(t, &a, grad, r.pack.T, s);
    if (m == REF_MEAN) continue;
    const int64_t dim[] = {m == REF_LINEAR ? d : 2 * d, a.kernel * d}, pad[] = {5, 0};
    r.w[s] = ot_new(t, a.dtype, 2, dim, a.strided ? pad : NULL);
    r.dw[s] = ot_new(t, grad, 2, dim, a.strided ? pad : NULL);
  }
  return r;
}

static void poison_dead(compress_run *r) {
  for (int s = 0; s < 2; s++) {
    num_poison_dead(r->x[s], &r->pack, 0, 0);
    num_poison_dead(r->dy[s], &r->pack, r->a.kernel, r->a.stride);
  }
}

static ot_call *make_call(ot *t, const rg_op *op, const compress_run *r) {
  ot_call *c = ot_call_new(t, op);
  if (r->a.isa > 0) ot_set_isa(c, r->a.isa - 1);
  for (int s = 0; s < sides(&r->a); s++) {
    ot_in(c, port[s], r->x[s]);
    if (r->w[s]) ot_in(c, w_port[s], r->w[s]);
  }
  ot_in(c, "cu_seqlens", r->pack.tensor);
  ot_int(c, "kernel", r->a.kernel);
  ot_int(c, "stride", r->a.stride);
  ot_choice(c, "k_method", method_name[r->a.k_method]);
  ot_choice(c, "v_method", method_name[r->a.v_method]);
  return c;
}

static void make_calls(ot *t, compress_run *r) {
  r->forward = make_call(t, &rgi_op_compress_kv, r);
  r->backward = make_call(t, &rgi_op_compress_kv_bwd, r);
  for (int s = 0; s < sides(&r->a); s++) {
    ot_out(r->forward, port[s], r->y[s]);
    ot_in(r->backward, grad_port[s], r->dy[s]);
    ot_out(r->backward, d_port[s], r->dx[s]);
    if (r->dw[s]) ot_out(r->backward, dw_port[s], r->dw[s]);
  }
}

static compress_run make(ot *t, compress_case a) {
  compress_run r = shell(t, a, 13);
  for (int s = 0; s < 2; s++) {
    if (a.outliers)
      ot_fill_outliers(t, r.x[s]);
    else
      ot_fill_normal(t, r.x[s], a.deviation != 0 ? a.deviation : 1);
    ot_fill_normal(t, r.dy[s], 1);
    if (r.w[s]) ot_fill_normal(t, r.w[s], 1 / sqrt((double)r.w[s]->arg.dim[1]));
  }
  poison_dead(&r);
  make_calls(t, &r);
  return r;
}

static void near(const compress_run *r, const char *what, const ot_tensor *x, const double *ref,
                 double gate) {
  double off = ot_relrms(x, ref, 1e-3);
  cr_assert(off <= gate, "%s (%s, %s/%s): %s is off by %.3g, gate %.3g", r->a.name,
            rg_dtype_name(r->a.dtype), method_name[r->a.k_method], method_name[r->a.v_method], what,
            off, gate);
}

static void check(uint64_t seed, compress_case a) {
  ot *t = ot_begin(seed);
  compress_run r = make(t, a);
  OT_OK(ot_run(r.forward, 2));
  OT_OK(ot_run(r.backward, 2));
  for (int s = 0; s < sides(&a); s++) {
    ref_compress ref = {.method = method_of(&a, s),
                        .T = r.pack.T,
                        .B = a.B,
                        .KH = a.KH,
                        .D = s ? a.DV : a.D,
                        .kernel = a.kernel,
                        .stride = a.stride,
                        .x = ot_get(t, r.x[s]),
                        .w = r.w[s] ? ot_get(t, r.w[s]) : NULL,
                        .cu = r.pack.cu};
    double *y = ot_doubles(t, r.y[s]->n), *dx = ot_doubles(t, r.dx[s]->n);
    double *dw = r.dw[s] ? ot_doubles(t, r.dw[s]->n) : NULL;
    ref_compress_forward(&ref, y);
    near(&r, port[s], r.y[s], y, num_gate(a.dtype));
    cr_assert(num_dead_is_zero(r.y[s], &r.pack, a.kernel, a.stride),
              "rows of no block are not zero");
    ref_compress_backward(&ref, ot_get(t, r.dy[s]), dx, dw);
    near(&r, d_port[s], r.dx[s], dx, num_grad_gate(a.dtype, a.deviation));
    if (dw) near(&r, dw_port[s], r.dw[s], dw, num_grad_gate(a.dtype, a.deviation));
  }
  ot_end(t);
}

static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
static const int32_t some[] = {70, 0, 1, 130, 33};

#define LENGTHS .B = 13, .length = num_lengths
#define SOME    .B = 5, .length = some
#define NSA     .kernel = 32, .stride = 16

Test(compress, methods_and_types) {
  for (int m = 0; m < 4; m++)
    for (int i = 0; i < 3; i++)
      check(1 + (uint64_t)(4 * i + m), (compress_case){.name = "methods",
                                                       LENGTHS,
                                                       NSA,
                                                       .KH = 2,
                                                       .D = 16,
                                                       .DV = 24,
                                                       .k_method = (ref_method)m,
                                                       .v_method = (ref_method)((m + i + 1) % 4),
                                                       .dtype = types[i]});
}

Test(compress, geometry) {
  static const int64_t kernel[] = {16, 8, 32, 64, 32, 1, 64, 6},
                       stride[] = {16, 8, 8, 32, 32, 1, 16, 3};
  for (int i = 0; i < 8; i++)
    for (int m = 0; m < 4; m++)
      check(20 + (uint64_t)(4 * i + m), (compress_case){.name = "geometry",
                                                        LENGTHS,
                                                        .kernel = kernel[i],
                                                        .stride = stride[i],
                                                        .KH = 1,
                                                        .D = 8,
                                                        .DV = 8,
                                                        .k_method = (ref_method)m,
                                                        .v_method = (ref_method)(3 - m),
                                                        .dtype = types[(i + m) % 3]});
}

Test(compress, head_sizes) {
  static const int64_t d[] = {64, 96, 128, 1, 7, 33}, dv[] = {64, 128, 64, 5, 1, 20};
  for (int i = 0; i < 6; i++)
    check(60 + (uint64_t)i, (compress_case){.name = "head sizes",
                                            .B = 2,
                                            .length = some + 2,
                                            .kernel = 16,
                                            .stride = 16,
                                            .KH = 1,
                                            .D = d[i],
                                            .DV = dv[i],
                                            .k_method = i % 2 ? REF_LINEAR : REF_SWIGLU,
                                            .v_method = i % 2 ? REF_SIGMOID_MUL : REF_LINEAR,
                                            .dtype = types[i % 3]});
  check(70, (compress_case){
                .name = "wide mean", LENGTHS, NSA, .KH = 3, .D = 192, .DV = 128, .dtype = RG_BF16});
}

Test(compress, magnitudes) {
  for (int m = 0; m < 4; m++)
    for (int i = 0; i < 3; i++) {
      compress_case a = {.name = "outliers",
                         SOME,
                         NSA,
                         .KH = 2,
                         .D = 16,
                         .DV = 16,
                         .k_method = (ref_method)m,
                         .v_method = (ref_method)((m + 2) % 4),
                         .dtype = types[i],
                         .outliers = true};
      check(80 + (uint64_t)(4 * i + m), a);
      a.name = "saturated gates"; /* silu and sigmoid at ±30 and beyond */
      a.outliers = false;
      a.deviation = 40;
      check(100 + (uint64_t)(4 * i + m), a);
    }
}

Test(compress, wide_gradients_and_strides) {
  for (int i = 0; i < 3; i++) {
    compress_case a = {.name = "wide",
                       SOME,
                       NSA,
                       .KH = 2,
                       .D = 16,
                       .DV = 16,
                       .k_method = REF_SWIGLU,
                       .v_method = REF_MEAN,
                       .dtype = types[i],
                       .wide = true};
    check(120 + (uint64_t)i, a);
    a.strided = true;
    check(123 + (uint64_t)i, a);
    a.wide = false;
    a.k_method = REF_LINEAR;
    a.v_method = REF_SIGMOID_MUL;
    check(126 + (uint64_t)i, a);
  }
}

Test(compress, ten_thousand_sequences_of_one_and_none) {
  ot *t = ot_begin(130);
  int32_t *ones = ot_ints(t, 10000), zeros[3] = {0};
  for (int i = 0; i < 10000; i++) ones[i] = 1;
  compress_case a = {.name = "ten thousand",
                     .B = 10000,
                     .length = ones,
                     NSA,
                     .KH = 1,
                     .D = 8,
                     .DV = 8,
                     .v_method = REF_SWIGLU};
  check(131, a);
  a.kernel = a.stride = 1;
  check(132, a);
  a.kernel = 32;
  a.stride = 16;
  a.B = 3;
  a.length = zeros;
  check(133, a);
  a.B = 0;
  check(134, a);
  ot_end(t);
}

Test(compress, cpu_levels) {
  for (int level = 0; level < ot_isa(); level++)
    for (int i = 0; i < 3; i++)
      for (int m = 0; m < 2; m++)
        check(140 + (uint64_t)(6 * level + 2 * i + m),
              (compress_case){.name = "CPU level",
                              SOME,
                              NSA,
                              .KH = 2,
                              .D = 16,
                              .DV = 24,
                              .k_method = (ref_method)m,
                              .v_method = (ref_method)(2 + m),
                              .dtype = types[i],
                              .isa = level + 1});
}

Test(compress, keys_alone) {
  for (int m = 0; m < 4; m++)
    check(150 + (uint64_t)m, (compress_case){.name = "keys alone",
                                             SOME,
                                             NSA,
                                             .KH = 2,
                                             .D = 24,
                                             .DV = 8,
                                             .k_method = (ref_method)m,
                                             .dtype = types[m % 3],
                                             .keys = true});
}

/* ---- bit-equality ---- */

Test(compress, repeats_threads_and_sums) {
  for (int m = 0; m < 4; m++) {
    ot *t = ot_begin(160 + (uint64_t)m);
    compress_run r = make(t, (compress_case){.name = "repeats",
                                             SOME,
                                             NSA,
                                             .KH = 3,
                                             .D = 16,
                                             .DV = 24,
                                             .k_method = (ref_method)m,
                                             .v_method = (ref_method)((m + 1) % 4),
                                             .dtype = types[m % 3]});
    OT_OK(ot_run_repeated(r.forward, m == 0 ? 100 : 10));
    OT_OK(ot_run_repeated(r.backward, m == 0 ? 100 : 10));
    OT_OK(ot_check_sums(r.backward));
    ot_end(t);
  }
}

Test(compress, alone_and_packed) {
  for (int m = 0; m < 4; m++) {
    ot *t = ot_begin(170 + (uint64_t)m);
    compress_run r = make(t, (compress_case){.name = "packed",
                                             LENGTHS,
                                             NSA,
                                             .KH = 2,
                                             .D = 16,
                                             .DV = 24,
                                             .k_method = (ref_method)m,
                                             .v_method = (ref_method)((m + 1) % 4),
                                             .dtype = types[m % 3]});
    OT_OK(ot_run(r.forward, 2));
    OT_OK(ot_run(r.backward, 2));
    for (int64_t b = 0; b < r.a.B; b++) {
      compress_case a = r.a;
      a.B = 1;
      a.length = &num_lengths[b];
      compress_run one = shell(t, a, 0);
      int64_t row = r.pack.cu[b], rows = num_lengths[b], row_y = row / a.stride;
      int64_t blocks = ref_blocks(rows, a.kernel, a.stride);
      for (int s = 0; s < 2; s++) {
        int64_t width = a.KH * (s ? a.DV : a.D);
        ot_set(one.x[s], ot_get(t, r.x[s]) + row * width);
        ot_set(one.dy[s], ot_get(t, r.dy[s]) + row_y * width);
        if (r.w[s]) ot_copy(one.w[s], r.w[s]);
      }
      poison_dead(&one);
      make_calls(t, &one);
      OT_OK(ot_run(one.forward, 1));
      OT_OK(ot_run(one.backward, 1));
      for (int s = 0; s < 2; s++) {
        cr_assert(ot_same_rows(one.y[s], 0, r.y[s], row_y, blocks), "%s of sequence %d", port[s],
                  (int)b);
        cr_assert(ot_same_rows(one.dx[s], 0, r.dx[s], row, rows), "%s of sequence %d", d_port[s],
                  (int)b);
      }
    }
    ot_end(t);
  }
}

Test(compress, strides_change_no_bit) {
  for (int m = 0; m < 4; m++) {
    ot *t = ot_begin(180 + (uint64_t)m);
    compress_case a = {.name = "strides",
                       SOME,
                       NSA,
                       .KH = 2,
                       .D = 16,
                       .DV = 24,
                       .k_method = (ref_method)m,
                       .v_method = (ref_method)((m + 1) % 4),
                       .dtype = types[m % 3]};
    compress_run r = make(t, a);
    a.strided = true;
    compress_run q = shell(t, a, 13);
    for (int s = 0; s < 2; s++) {
      ot_copy(q.x[s], r.x[s]);
      ot_copy(q.dy[s], r.dy[s]);
      if (q.w[s]) ot_copy(q.w[s], r.w[s]);
    }
    make_calls(t, &q);
    OT_OK(ot_run(r.forward, 2));
    OT_OK(ot_run(q.forward, 2));
    OT_OK(ot_run(r.backward, 2));
    OT_OK(ot_run(q.backward, 2));
    for (int s = 0; s < 2; s++) {
      cr_assert(ot_same_bits(r.y[s], q.y[s]) && ot_same_bits(r.dx[s], q.dx[s]));
      if (r.dw[s]) cr_assert(ot_same_bits(r.dw[s], q.dw[s]));
    }
    ot_end(t);
  }
}

Test(compress, far_rows) {
  if (!ot_far_possible()) cr_skip("no address space for sparse tensors");
  for (int m = 0; m < 4; m++) {
    ot *t = ot_begin(185 + (uint64_t)m);
    compress_run r = make(t, (compress_case){.name = "far",
                                             SOME,
                                             NSA,
                                             .KH = 2,
                                             .D = 16,
                                             .DV = 24,
                                             .k_method = (ref_method)m,
                                             .v_method = (ref_method)((m + 1) % 4),
                                             .dtype = RG_BF16});
    OT_OK(ot_check_far(r.forward));
    OT_OK(ot_check_far(r.backward));
    ot_end(t);
  }
}

/* A view of heads [first, first + n) of a tensor [rows, KH, d]. */
static ot_tensor *heads_of(ot *t, const ot_tensor *a, int64_t first, int64_t n) {
  const int64_t dim[] = {a->arg.dim[0], n, a->arg.dim[2]};
  char *data =
      (char *)a->arg.data + first * a->arg.stride[1] * (int64_t)rg_dtype_size(a->arg.dtype);
  return ot_wrap(t, data, a->arg.dtype, 3, dim, a->arg.stride);
}

/* Weight gradients in fp32: groups of heads, walked from the last to the first onto one sum, give
 * the bits of all heads at once. */
Test(compress, head_groups_change_no_bit) {
  for (int m = 1; m < 4; m++)
    for (int64_t group = 1; group <= 2; group++) {
      ot *t = ot_begin(190 + (uint64_t)m);
      compress_run r = make(t, (compress_case){.name = "groups",
                                               LENGTHS,
                                               NSA,
                                               .KH = 4,
                                               .D = 16,
                                               .DV = 24,
                                               .wide = true,
                                               .k_method = (ref_method)m,
                                               .v_method = (ref_method)(m % 3 + 1),
                                               .dtype = types[m % 3]});
      OT_OK(ot_run(r.backward, 2));
      ot_tensor *sum[2] = {ot_like(t, r.dw[0], NULL), ot_like(t, r.dw[1], NULL)};
      for (int64_t h = r.a.KH - group; h >= 0; h -= group) {
        compress_run part = r;
        for (int s = 0; s < 2; s++) {
          part.x[s] = heads_of(t, r.x[s], h, group);
          part.dy[s] = heads_of(t, r.dy[s], h, group);
          part.dx[s] = heads_of(t, r.dx[s], h, group);
          part.y[s] = heads_of(t, r.y[s], h, group);
          part.dw[s] = sum[s];
        }
        make_calls(t, &part);
        if (h != r.a.KH - group) {
          ot_in(part.backward, "acc.k_weight", sum[0]);
          ot_in(part.backward, "acc.v_weight", sum[1]);
        }
        OT_OK(ot_run(part.backward, 2));
      }
      cr_assert(ot_same_bits(sum[0], r.dw[0]) && ot_same_bits(sum[1], r.dw[1]),
                "%s, %d heads a group", method_name[m], (int)group);
      ot_end(t);
    }
}

/* NaN in one sequence's tokens stays in its blocks and its tokens. */
Test(compress, nan_stays_in_its_sequence) {
  static const int32_t three[] = {70, 100, 90};
  for (int m = 0; m < 4; m++) {
    ot *t = ot_begin(200 + (uint64_t)m);
    compress_run r = make(t, (compress_case){.name = "NaN",
                                             .B = 3,
                                             .length = three,
                                             NSA,
                                             .KH = 2,
                                             .D = 16,
                                             .DV = 24,
                                             .k_method = (ref_method)m,
                                             .v_method = (ref_method)m,
                                             .dtype = types[m % 3]});
    OT_OK(ot_run(r.forward, 2));
    OT_OK(ot_run(r.backward, 2));
    for (int s = 0; s < 2; s++) {
      ot_tensor *y = ot_like(t, r.y[s], NULL), *dx = ot_like(t, r.dx[s], NULL);
      ot_copy(y, r.y[s]);
      ot_copy(dx, r.dx[s]);
      ot_poison_rows(r.x[s], 70, 170);
      ot_poison_rows(r.dy[s], 70 / 16, 70 / 16 + ref_blocks(100, 32, 16));
      OT_OK(ot_run(r.forward, 2));
      OT_OK(ot_run(r.backward, 2));
      int64_t first = 170 / 16;
      cr_assert(ot_same_rows(y, 0, r.y[s], 0, ref_blocks(70, 32, 16)));
      cr_assert(ot_same_rows(y, first, r.y[s], first, ref_blocks(90, 32, 16)));
      cr_assert(ot_same_rows(dx, 0, r.dx[s], 0, 70) && ot_same_rows(dx, 170, r.dx[s], 170, 90));
    }
    ot_end(t);
  }
}
