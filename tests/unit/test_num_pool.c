/* tests/unit/test_num_pool.c: pool and its gradients against the oracle, the oracle against finite
 * differences; exactness: threads, repeats, packs, sums. */
#include "../harness/num.h"
#include <criterion/criterion.h>
#include <math.h>

typedef struct pool_case {
  const char *name;
  rg_dtype dtype;
  ref_pool_method method;
  int64_t KH, W, B;
  const int32_t *length;
  int64_t kernel, stride;
  bool bias, wide, strided;
  double deviation; /* of z; 0: 1 */
} pool_case;

typedef struct pool_run {
  pool_case a;
  num_pack pack;
  int64_t D;
  ot_tensor *x, *z, *bias, *y, *dy, *dx, *dz, *db;
  ot_call *forward, *backward;
} pool_run;

static const char *const method[] = {"softmax", "max", "min"};

static void add_inputs(ot_call *c, const pool_run *r) {
  ot_in(c, "x", r->x);
  if (r->z) ot_in(c, "z", r->z);
  if (r->bias) ot_in(c, "bias", r->bias);
  ot_in(c, "cu_seqlens", r->pack.tensor);
  ot_int(c, "kernel", r->a.kernel), ot_int(c, "stride", r->a.stride);
  ot_choice(c, "method", method[r->a.method]);
}

static pool_run shell(ot *t, pool_case a, int64_t slack) {
  pool_run r = {.a = a, .D = a.W * (a.kernel / a.stride)};
  const rg_dtype grad = a.wide ? RG_F32 : a.dtype;
  r.pack = num_pack_new(t, a.B, a.length, slack);
  const int64_t tokens[] = {r.pack.T, a.KH, r.D}, rows[] = {r.pack.T / a.stride, a.KH, a.W},
                pad[] = {7, 2, 0}, *hole = a.strided ? pad : NULL;
  r.x = ot_new(t, a.dtype, 3, tokens, hole);
  r.dx = ot_new(t, grad, 3, tokens, hole);
  r.y = ot_new(t, a.dtype, 3, rows, hole);
  r.dy = ot_new(t, a.dtype, 3, rows, hole);
  if (a.method != REF_POOL_SOFTMAX) return r;
  r.z = ot_new(t, a.dtype, 3, tokens, hole);
  r.dz = ot_new(t, grad, 3, tokens, hole);
  if (!a.bias) return r;
  r.bias = OT_NEW(t, a.dtype, a.stride, r.D);
  r.db = OT_NEW(t, grad, a.stride, r.D);
  return r;
}

static void make_calls(ot *t, pool_run *r) {
  r->forward = ot_call_new(t, &rgi_op_pool);
  add_inputs(r->forward, r);
  ot_out(r->forward, "y", r->y);
  r->backward = ot_call_new(t, &rgi_op_pool_bwd);
  add_inputs(r->backward, r);
  ot_in(r->backward, "grad.y", r->dy);
  ot_out(r->backward, "d.x", r->dx);
  if (r->dz) ot_out(r->backward, "d.z", r->dz);
  if (r->db) ot_out(r->backward, "d.bias", r->db);
}

static pool_run make(ot *t, pool_case a) {
  pool_run r = shell(t, a, 13);
  ot_fill_normal(t, r.x, 1), ot_fill_normal(t, r.dy, 1);
  if (r.z) ot_fill_normal(t, r.z, a.deviation != 0 ? a.deviation : 1);
  if (r.bias) ot_fill_normal(t, r.bias, 1);
  num_poison_dead(r.x, &r.pack, 0, 0);
  if (r.z) num_poison_dead(r.z, &r.pack, 0, 0);
  num_poison_dead(r.dy, &r.pack, a.stride, a.stride);
  make_calls(t, &r);
  return r;
}

static ref_pool oracle(ot *t, const pool_run *r) {
  return (ref_pool){.method = r->a.method,
                    .T = r->pack.T,
                    .B = r->a.B,
                    .KH = r->a.KH,
                    .W = r->a.W,
                    .kernel = r->a.kernel,
                    .stride = r->a.stride,
                    .x = ot_get(t, r->x),
                    .z = r->z ? ot_get(t, r->z) : NULL,
                    .bias = r->bias ? ot_get(t, r->bias) : NULL,
                    .cu = r->pack.cu};
}

static void near(const pool_run *r, const char *what, const ot_tensor *x, const double *ref,
                 double gate) {
  const double off = ot_relrms(x, ref, 1e-3);
  cr_assert(off <= gate, "%s (%s, %s): %s is off by %.3g, gate %.3g", r->a.name,
            rg_dtype_name(r->a.dtype), method[r->a.method], what, off, gate);
}

static void check(uint64_t seed, pool_case a) {
  ot *t = ot_begin(seed);
  pool_run r = make(t, a);
  ref_pool ref = oracle(t, &r);
  double *y = ot_doubles(t, r.y->n), *dx = ot_doubles(t, r.dx->n), *dz = ot_doubles(t, r.dx->n),
         *db = ot_doubles(t, a.stride * r.D);
  OT_OK(ot_run(r.forward, 2));
  OT_OK(ot_run(r.backward, 2));
  ref_pool_forward(&ref, y);
  near(&r, "y", r.y, y, num_gate(a.dtype));
  cr_assert(num_dead_is_zero(r.y, &r.pack, a.stride, a.stride), "rows of no tokens are not zero");
  ref_pool_backward(&ref, ot_get(t, r.dy), dx, dz, db);
  near(&r, "d.x", r.dx, dx, num_grad_gate(a.dtype, a.deviation));
  if (r.dz) near(&r, "d.z", r.dz, dz, num_grad_gate(a.dtype, a.deviation));
  if (r.db) near(&r, "d.bias", r.db, db, num_grad_gate(a.dtype, a.deviation));
  ot_end(t);
}

static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
static const int32_t some[] = {70, 0, 1, 130, 33};
#define LENGTHS .B = 13, .length = num_lengths
#define SOME    .B = 5, .length = some
#define CSA     .kernel = 8, .stride = 4

Test(pool, methods_and_types) {
  for (int m = 0; m < 3; m++)
    for (int i = 0; i < 3; i++)
      check(1 + (uint64_t)(3 * m + i), (pool_case){.name = "methods",
                                                   LENGTHS,
                                                   CSA,
                                                   .KH = 2,
                                                   .W = 20,
                                                   .method = (ref_pool_method)m,
                                                   .bias = m == 0 && i < 2,
                                                   .dtype = types[i]});
}

Test(pool, geometry) {
  static const int64_t kernel[] = {1, 4, 128, 12, 64, 16}, stride[] = {1, 4, 128, 4, 32, 2};
  for (int i = 0; i < 6; i++)
    for (int m = 0; m < 3; m++)
      check(20 + (uint64_t)(3 * i + m), (pool_case){.name = "geometry",
                                                    LENGTHS,
                                                    .kernel = kernel[i],
                                                    .stride = stride[i],
                                                    .KH = 1 + i % 2,
                                                    .W = i == 1 ? 512 : 5,
                                                    .method = (ref_pool_method)m,
                                                    .bias = m == 0,
                                                    .dtype = types[(i + m) % 3]});
}

Test(pool, hot_weights) {
  for (int i = 0; i < 3; i++)
    check(50 + (uint64_t)i, (pool_case){.name = "hot",
                                        SOME,
                                        CSA,
                                        .KH = 2,
                                        .W = 16,
                                        .bias = true,
                                        .deviation = 64,
                                        .dtype = types[i]});
}

Test(pool, wide_gradients_and_strides) {
  for (int i = 0; i < 6; i++)
    check(60 + (uint64_t)i, (pool_case){.name = "wide",
                                        SOME,
                                        CSA,
                                        .KH = 3,
                                        .W = 9,
                                        .method = (ref_pool_method)(i % 3),
                                        .bias = i % 3 == 0,
                                        .wide = i<3, .strided = i> 1,
                                        .dtype = types[i % 3]});
}

Test(pool, no_rows) {
  static const int32_t zeros[3] = {0}, ones[] = {1, 3, 2};
  check(70, (pool_case){.name = "none", .B = 0, .length = zeros, CSA, .KH = 1, .W = 8});
  check(71, (pool_case){.name = "empty", .B = 3, .length = zeros, CSA, .KH = 1, .W = 8});
  check(72,
        (pool_case){.name = "short", .B = 3, .length = ones, CSA, .KH = 1, .W = 8, .bias = true});
}

Test(pool, repeats_threads_and_sums) {
  for (int m = 0; m < 3; m++) {
    ot *t = ot_begin(80 + (uint64_t)m);
    pool_run r = make(t, (pool_case){.name = "repeats",
                                     SOME,
                                     CSA,
                                     .KH = 3,
                                     .W = 12,
                                     .method = (ref_pool_method)m,
                                     .bias = m == 0,
                                     .dtype = types[m]});
    OT_OK(ot_run_repeated(r.forward, 10));
    OT_OK(ot_run_repeated(r.backward, 10));
    OT_OK(ot_check_sums(r.backward));
    ot_end(t);
  }
}

Test(pool, alone_and_packed) {
  for (int m = 0; m < 3; m++) {
    ot *t = ot_begin(90 + (uint64_t)m);
    pool_run r = make(t, (pool_case){.name = "packed",
                                     LENGTHS,
                                     CSA,
                                     .KH = 2,
                                     .W = 12,
                                     .method = (ref_pool_method)m,
                                     .dtype = types[m]});
    OT_OK(ot_run(r.forward, 2));
    OT_OK(ot_run(r.backward, 2));
    for (int64_t b = 0; b < r.a.B; b++) {
      pool_case a = r.a;
      a.B = 1;
      a.length = &num_lengths[b];
      pool_run one = shell(t, a, 0);
      const int64_t row = r.pack.cu[b], n = num_lengths[b], y = row / a.stride;
      ot_set(one.x, ot_get(t, r.x) + row * a.KH * r.D);
      if (one.z) ot_set(one.z, ot_get(t, r.z) + row * a.KH * r.D);
      ot_set(one.dy, ot_get(t, r.dy) + y * a.KH * a.W);
      make_calls(t, &one);
      OT_OK(ot_run(one.forward, 1));
      OT_OK(ot_run(one.backward, 1));
      cr_assert(ot_same_rows(one.y, 0, r.y, y, n / a.stride) &&
                    ot_same_rows(one.dx, 0, r.dx, row, n) &&
                    (!one.dz || ot_same_rows(one.dz, 0, r.dz, row, n)),
                "sequence %lld", (long long)b);
    }
    ot_end(t);
  }
}

/* The oracle's gradient along a direction, against differences of its output. */
Test(pool, oracle_by_finite_differences) {
  ot *t = ot_begin(100);
  pool_run r = make(t, (pool_case){.name = "oracle", SOME, CSA, .KH = 2, .W = 3, .bias = true});
  ref_pool a = oracle(t, &r);
  double *moved[] = {ot_get(t, r.x), ot_get(t, r.z), ot_get(t, r.bias)},
         *grad[] = {ot_doubles(t, r.x->n), ot_doubles(t, r.x->n), ot_doubles(t, r.bias->n)},
         *y = ot_doubles(t, r.y->n), *dy = ot_get(t, r.dy);
  const int64_t size[] = {r.x->n, r.z->n, r.bias->n};
  a.x = moved[0], a.z = moved[1], a.bias = moved[2];
  ref_pool_backward(&a, dy, grad[0], grad[1], grad[2]);
  for (int k = 0; k < 3; k++) {
    const double step = 1e-6;
    double *way = ot_doubles(t, size[k]), slope = 0, difference = 0, scale = 0;
    for (int64_t n = 0; n < size[k]; n++) {
      way[n] = grad[k][n] == 0 ? 0 : 2 * ot_uniform(t) - 1; /* dead rows are not numbers */
      slope += way[n] * grad[k][n];
      scale += pow(way[n] * grad[k][n], 2);
    }
    for (int side = 1; side >= -1; side -= 2) {
      for (int64_t n = 0; n < size[k]; n++)
        if (way[n] != 0) moved[k][n] += side * step * way[n];
      ref_pool_forward(&a, y);
      for (int64_t n = 0; n < r.y->n; n++)
        if (y[n] != 0) difference += side * dy[n] * y[n] / (2 * step);
      for (int64_t n = 0; n < size[k]; n++)
        if (way[n] != 0) moved[k][n] -= side * step * way[n];
    }
    cr_assert_float_eq(slope, difference, 1e-5 * sqrt(scale), "input %d: %g, should be %g", k,
                       slope, difference);
  }
  ot_end(t);
}

/* Where the rows of a sequence start. */
Test(pool, block_starts) {
  ot *t = ot_begin(110);
  num_pack pack = num_pack_new(t, 13, num_lengths, 5);
  ot_tensor *y = OT_NEW(t, RG_I32, 14);
  ot_call *c = ot_call_new(t, &rgi_op_block_starts);
  ot_in(c, "cu_seqlens", pack.tensor);
  ot_int(c, "stride", 4);
  ot_out(c, "y", y);
  OT_OK(ot_run_repeated(c, 2));
  for (int b = 0; b <= 13; b++) cr_assert_eq(ot_get_ints(t, y)[b], pack.cu[b] / 4);
  ot_end(t);
}
