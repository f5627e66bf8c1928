/* tests/unit/test_num_rowwise.c: linear, rope, rmsnorm, silu, mul, add, cast, concat and the
 * internal sums against the oracle; strides, threads, dead rows and neighbours as everywhere. */
#include "../harness/num.h"
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
static const int32_t some[] = {70, 0, 1, 130, 33};
static const int64_t holes[] = {9, 4, 2, 0};

static ot_tensor *shaped(ot *t, rg_dtype dtype, int rank, const int64_t *dim, bool strided) {
  return ot_new(t, dtype, rank, dim, strided ? holes + 4 - rank : NULL);
}

static void near(const char *what, const ot_tensor *x, const double *ref, double gate) {
  double off = ot_relrms(x, ref, 1e-3);
  cr_assert(off <= gate, "%s (%s) is off by %.3g, gate %.3g", what, rg_dtype_name(x->arg.dtype),
            off, gate);
}

static void fill(ot *t, ot_tensor *a, bool outliers) {
  if (outliers)
    ot_fill_outliers(t, a);
  else
    ot_fill_normal(t, a, 1);
}

/* ---- linear ---- */

typedef struct linear_case {
  rg_dtype dtype;
  int64_t in, out;
  bool bias, outliers, wide, strided, no_lengths;
  int64_t B;
  const int32_t *length; /* NULL: some */
  int isa;               /* level + 1; 0: best */
} linear_case;

typedef struct linear_run {
  linear_case a;
  num_pack pack;
  ot_tensor *x, *w, *b, *y, *dy, *dx, *dw, *db;
  ot_call *forward, *backward;
} linear_run;

static linear_run linear_shell(ot *t, linear_case a, int64_t slack) {
  linear_run r = {.a = a};
  rg_dtype grad = a.wide ? RG_F32 : a.dtype;
  r.pack = a.length ? num_pack_new(t, a.B, a.length, slack) : num_pack_new(t, 5, some, slack);
  const int64_t x[] = {r.pack.T, a.in}, w[] = {a.out, a.in}, y[] = {r.pack.T, a.out};
  r.x = shaped(t, a.dtype, 2, x, a.strided);
  r.w = shaped(t, a.dtype, 2, w, a.strided);
  r.b = a.bias ? shaped(t, a.dtype, 1, &a.out, false) : NULL;
  r.y = shaped(t, a.dtype, 2, y, a.strided);
  r.dy = shaped(t, a.dtype, 2, y, a.strided);
  r.dx = shaped(t, grad, 2, x, a.strided);
  r.dw = shaped(t, grad, 2, w, a.strided);
  r.db = a.bias ? shaped(t, grad, 1, &a.out, false) : NULL;
  return r;
}

static void linear_calls(ot *t, linear_run *r) {
  ot_call *c[2] = {ot_call_new(t, &rgi_op_linear), ot_call_new(t, &rgi_op_linear_bwd)};
  for (int i = 0; i < 2; i++) {
    if (r->a.isa > 0) ot_set_isa(c[i], r->a.isa - 1);
    ot_in(c[i], "x", r->x);
    ot_in(c[i], "w", r->w);
    if (r->b) ot_in(c[i], "b", r->b);
    if (!r->a.no_lengths) ot_in(c[i], "cu_seqlens", r->pack.tensor);
  }
  ot_out(c[0], "y", r->y);
  ot_in(c[1], "grad.y", r->dy);
  ot_out(c[1], "d.x", r->dx);
  ot_out(c[1], "d.w", r->dw);
  if (r->db) ot_out(c[1], "d.b", r->db);
  r->forward = c[0];
  r->backward = c[1];
}

static linear_run linear_new(ot *t, linear_case a) {
  linear_run r = linear_shell(t, a, a.no_lengths ? 0 : 9);
  fill(t, r.x, a.outliers);
  fill(t, r.dy, a.outliers);
  ot_fill_normal(t, r.w, 1);
  if (r.b) ot_fill_normal(t, r.b, 1);
  num_poison_dead(r.x, &r.pack, 0, 0);
  num_poison_dead(r.dy, &r.pack, 0, 0);
  linear_calls(t, &r);
  return r;
}

static void linear_check(uint64_t seed, linear_case a) {
  ot *t = ot_begin(seed);
  linear_run r = linear_new(t, a);
  OT_OK(ot_run(r.forward, 2));
  OT_OK(ot_run(r.backward, 2));
  double *x = ot_get(t, r.x), *w = ot_get(t, r.w), *y = ot_doubles(t, r.y->n);
  double *dx = ot_doubles(t, r.dx->n), *dw = ot_doubles(t, r.dw->n), *db = ot_doubles(t, a.out);
  ref_linear_forward(r.pack.T, r.pack.live, a.in, a.out, x, w, r.b ? ot_get(t, r.b) : NULL, y);
  ref_linear_backward(r.pack.T, r.pack.live, a.in, a.out, x, w, ot_get(t, r.dy), dx, dw, db);
  near("linear y", r.y, y, num_gate(a.dtype));
  near("linear dx", r.dx, dx, num_grad_gate(a.dtype, 1));
  near("linear dw", r.dw, dw, num_grad_gate(a.dtype, 1));
  if (r.db) near("linear db", r.db, db, num_grad_gate(a.dtype, 1));
  ot_end(t);
}

Test(linear, shapes_and_types) {
  static const int64_t in[] = {64, 1, 7, 100, 33, 257}, out[] = {48, 5, 1, 65, 130, 16};
  for (int k = 0; k < 6; k++)
    for (int i = 0; i < 3; i++) {
      linear_case a = {.dtype = types[i], .in = in[k], .out = out[k], .bias = k % 2 == 0};
      linear_check((uint64_t)(10 * k + i), a);
      a.wide = a.strided = a.bias = true;
      a.outliers = k > 2;
      linear_check((uint64_t)(10 * k + i + 3), a);
    }
  linear_check(70, (linear_case){.in = 40, .out = 30, .bias = true, .no_lengths = true});
}

Test(linear, empty_long_and_levels) {
  static const int32_t none[2] = {0}, many[] = {1100, 31};
  linear_check(71, (linear_case){.in = 16, .out = 8, .bias = true, .B = 2, .length = none});
  linear_check(72, (linear_case){.in = 16, .out = 8, .bias = true, .B = 0, .length = none});
  linear_check(73, (linear_case){.in = 16, .out = 8, .bias = true, .B = 2, .length = many});
  for (int level = 0; level < ot_isa(); level++)
    for (int i = 0; i < 3; i++)
      linear_check(
          (uint64_t)(80 + 3 * level + i),
          (linear_case){.dtype = types[i], .in = 65, .out = 50, .bias = true, .isa = level + 1});
}

Test(linear, exactness) {
  for (int i = 0; i < 3; i++) {
    ot *t = ot_begin(90 + (uint64_t)i);
    linear_case a = {.dtype = types[i], .in = 65, .out = 50, .bias = true};
    linear_run r = linear_new(t, a);
    OT_OK(ot_run_repeated(r.forward, 20));
    OT_OK(ot_run_repeated(r.backward, 20));
    a.strided = true;
    linear_run q = linear_shell(t, a, 9); /* other strides; the first 70 rows are NaN */
    ot_copy(q.x, r.x);
    ot_copy(q.dy, r.dy);
    ot_copy(q.w, r.w);
    ot_copy(q.b, r.b);
    linear_calls(t, &q);
    OT_OK(ot_run(q.backward, 2));
    cr_assert(ot_same_bits(q.dw, r.dw) && ot_same_bits(q.db, r.db));
    ot_poison_rows(q.x, 0, 70);
    ot_poison_rows(q.dy, 0, 70);
    OT_OK(ot_run(q.forward, 2));
    OT_OK(ot_run(q.backward, 2));
    cr_assert(ot_same_rows(q.y, 70, r.y, 70, r.pack.T - 70) &&
              ot_same_rows(q.dx, 70, r.dx, 70, r.pack.T - 70));
    a.strided = false;
    a.B = 1;
    a.length = &some[3];
    linear_run one = linear_shell(t, a, 0); /* sequence 3 on its own */
    ot_set(one.x, ot_get(t, r.x) + 71 * a.in);
    ot_set(one.dy, ot_get(t, r.dy) + 71 * a.out);
    ot_copy(one.w, r.w);
    ot_copy(one.b, r.b);
    linear_calls(t, &one);
    OT_OK(ot_run(one.forward, 1));
    OT_OK(ot_run(one.backward, 1));
    cr_assert(ot_same_rows(one.y, 0, r.y, 71, 130) && ot_same_rows(one.dx, 0, r.dx, 71, 130));
    OT_OK(ot_check_sums(r.backward));
    ot_end(t);
  }
}

Test(linear, far_rows) {
  if (!ot_far_possible()) cr_skip("no address space for sparse tensors");
  ot *t = ot_begin(95);
  linear_run r = linear_new(t, (linear_case){.dtype = RG_BF16, .in = 65, .out = 50, .bias = true});
  OT_OK(ot_check_far(r.forward));
  OT_OK(ot_check_far(r.backward));
  ot_end(t);
}

/* ---- rope ---- */

typedef struct rope_case {
  rg_dtype dtype;
  int64_t D, dim; /* dim 0: all */
  double theta;
  const int32_t *offset;
  bool strided, interleaved;
  int isa;                          /* level + 1; 0: best */
  double factor, attention, slowed; /* YaRN where the factor isn't 0; slowed: beta_slow */
  bool fractions;                   /* not truncated */
} rope_case;

enum { ORIGINAL = 256, FAST = 24 };

/* The oracle turns all features; `dim` of them are cut out for it, the rest stay. */
static double *rope_ref(ot *t, const num_pack *p, int64_t H, const rope_case *a, bool inverse,
                        const double *x) {
  int64_t D = a->D, dim = a->dim ? a->dim : D;
  double *y = ot_doubles(t, p->T * H * D), *angle = ot_doubles(t, D), length = 1;
  double *part = ot_doubles(t, p->T * H * dim), *turned = ot_doubles(t, p->T * H * dim);
  for (int64_t r = 0; r < p->live * H; r++) {
    memcpy(y + r * D, x + r * D, (size_t)D * sizeof *y);
    memcpy(part + r * dim, x + r * D, (size_t)dim * sizeof *y);
  }
  for (int64_t c = 0; c < dim / 2; c++) angle[c] = pow(a->theta, -2.0 * (double)c / (double)dim);
  if (a->factor > 0)
    length = ref_yarn(dim, a->theta, a->factor, ORIGINAL, FAST, a->slowed, a->attention,
                      !a->fractions, angle);
  ref_rope_by(p->T, p->B, H, dim, angle, length, a->interleaved, p->cu, a->offset, inverse, part,
              turned);
  for (int64_t r = 0; r < p->live * H; r++)
    memcpy(y + r * D, turned + r * dim, (size_t)dim * sizeof *y);
  return y;
}

static void rope_attrs(ot_call *c, const rope_case *a) {
  ot_float(c, "theta", a->theta);
  if (a->dim) ot_int(c, "dim", a->dim);
  if (a->interleaved) ot_int(c, "interleaved", 1);
  if (a->factor <= 0) return;
  ot_choice(c, "rope_type", "yarn");
  ot_float(c, "factor", a->factor);
  ot_int(c, "original_max_position_embeddings", ORIGINAL);
  ot_float(c, "beta_fast", FAST);
  ot_float(c, "beta_slow", a->slowed);
  ot_float(c, "attention_factor", a->attention);
  ot_int(c, "truncate", !a->fractions);
}

static void rope_check(uint64_t seed, rope_case a) {
  ot *t = ot_begin(seed);
  num_pack p = num_pack_new(t, 5, some, 7);
  const int64_t shape[] = {p.T, 3, a.D};
  ot_tensor *x = shaped(t, a.dtype, 3, shape, a.strided);
  ot_tensor *y = shaped(t, a.dtype, 3, shape, a.strided);
  ot_tensor *dy = shaped(t, a.dtype, 3, shape, a.strided);
  ot_tensor *dx = shaped(t, a.dtype, 3, shape, a.strided);
  ot_call *c[2] = {ot_call_new(t, &rgi_op_rope), ot_call_new(t, &rgi_op_rope_bwd)};
  fill(t, x, false);
  fill(t, dy, false);
  num_poison_dead(x, &p, 0, 0);
  num_poison_dead(dy, &p, 0, 0);
  for (int i = 0; i < 2; i++) {
    if (a.isa > 0) ot_set_isa(c[i], a.isa - 1);
    ot_in(c[i], "cu_seqlens", p.tensor);
    if (a.offset) ot_in(c[i], "q_offset", num_ints(t, 5, a.offset));
    rope_attrs(c[i], &a);
  }
  ot_in(c[0], "x", x);
  ot_out(c[0], "y", y);
  ot_in(c[1], "grad.y", dy);
  ot_out(c[1], "d.x", dx);
  OT_OK(ot_run_repeated(c[0], 2));
  OT_OK(ot_run_repeated(c[1], 2));
  near("rope y", y, rope_ref(t, &p, 3, &a, false, ot_get(t, x)), num_gate(a.dtype));
  if (a.dtype == RG_BF16 && ot_far_possible()) {
    OT_OK(ot_check_far(c[0]));
    OT_OK(ot_check_far(c[1]));
    ot_rebind_out(c[1], "d.x", dx);
  }
  near("rope dx", dx, rope_ref(t, &p, 3, &a, true, ot_get(t, dy)), num_grad_gate(a.dtype, 1));
  OT_OK(ot_check_sums(c[1]));
  ot_end(t);
}

static const int32_t far[] = {1000000, 5, 2000000000, 123456789, 63};

Test(rope, types_and_positions) {
  for (int i = 0; i < 3; i++) {
    rope_case a = {.dtype = types[i], .D = 64, .theta = 10000};
    rope_check(100 + (uint64_t)i, a);
    rope_check(103 + (uint64_t)i, (rope_case){types[i], 128, 0, 1e6, far, .strided = true});
    rope_check(106 + (uint64_t)i, (rope_case){types[i], 50, 22, 500, far, .isa = 0});
  }
  rope_check(109, (rope_case){RG_F32, 2, 0, 10000, NULL, .isa = 0});
  for (int level = 0; level < ot_isa(); level++)
    rope_check(110, (rope_case){RG_BF16, 64, 0, 10000, far, .isa = level + 1});
}

Test(rope, interleaved) {
  for (int i = 0; i < 3; i++) {
    rope_case a = {types[i], 64, 0, 10000, far, .interleaved = true};
    rope_check(120 + (uint64_t)i, a);
    a.D = 50, a.dim = 22, a.strided = true;
    rope_check(123 + (uint64_t)i, a);
    a.D = a.dim = 1028; /* more pairs than a piece of the row holds, and no round number */
    rope_check(126 + (uint64_t)i, a);
  }
  for (int level = 0; level < ot_isa(); level++)
    rope_check(130, (rope_case){RG_F16, 24, 0, 10000, NULL, .interleaved = true, .isa = level + 1});
}

Test(rope, yarn) {
  for (int i = 0; i < 3; i++) {
    rope_case a = {types[i], 64, 0, 150000, far, .factor = 32, .slowed = 1};
    rope_check(140 + (uint64_t)i, a);
    a.fractions = true;
    rope_check(143 + (uint64_t)i, a);
    a.interleaved = a.strided = true, a.dim = 40, a.attention = 1.5;
    rope_check(146 + (uint64_t)i, a);
    a.slowed = FAST; /* a step instead of a ramp */
    rope_check(149 + (uint64_t)i, a);
  }
}

/* ---- rmsnorm, layernorm ---- */

typedef struct norm_case {
  rg_dtype dtype;
  int rank;
  int64_t D;
  bool layer, weight, bias, outliers, strided, wide;
  double mean; /* of each row */
  int isa;     /* level + 1; 0: best */
} norm_case;

static void norm_check(uint64_t seed, norm_case a) {
  ot *t = ot_begin(seed);
  const double eps = 1e-5;
  num_pack p = num_pack_new(t, 5, some, 7);
  int64_t heads = a.rank == 3 ? 3 : 1, rows = p.T * heads, live = p.live * heads, D = a.D;
  const int64_t shape3[] = {p.T, 3, D}, shape2[] = {p.T, D}, *shape = a.rank == 3 ? shape3 : shape2;
  ot_tensor *x = shaped(t, a.dtype, a.rank, shape, a.strided),
            *y = shaped(t, a.dtype, a.rank, shape, a.strided);
  ot_tensor *dy = shaped(t, a.dtype, a.rank, shape, a.strided);
  ot_tensor *dx = shaped(t, a.wide ? RG_F32 : a.dtype, a.rank, shape, a.strided);
  ot_tensor *w = OT_NEW(t, a.dtype, D), *dw = OT_NEW(t, a.wide ? RG_F32 : a.dtype, D);
  ot_tensor *b = OT_NEW(t, a.dtype, D), *db = OT_NEW(t, a.wide ? RG_F32 : a.dtype, D);
  ot_call *c[2] = {ot_call_new(t, a.layer ? &rgi_op_layernorm : &rgi_op_rmsnorm),
                   ot_call_new(t, a.layer ? &rgi_op_layernorm_bwd : &rgi_op_rmsnorm_bwd)};
  fill(t, x, a.outliers);
  fill(t, dy, a.outliers);
  if (a.mean != 0) {
    double *v = ot_get(t, x);
    for (int64_t i = 0; i < x->n; i++) v[i] += a.mean;
    ot_set(x, v);
  }
  ot_fill_rows(x, 3, 4, 0); /* 0 / sqrt(eps) */
  ot_fill_normal(t, w, 1);
  ot_fill_normal(t, b, 1);
  num_poison_dead(x, &p, 0, 0);
  num_poison_dead(dy, &p, 0, 0);
  for (int i = 0; i < 2; i++) {
    if (a.isa > 0) ot_set_isa(c[i], a.isa - 1);
    ot_in(c[i], "x", x);
    if (a.weight) ot_in(c[i], "w", w);
    if (a.bias) ot_in(c[i], "b", b);
    ot_in(c[i], "cu_seqlens", p.tensor);
    ot_float(c[i], "eps", eps);
  }
  ot_out(c[0], "y", y);
  ot_in(c[1], "grad.y", dy);
  ot_out(c[1], "d.x", dx);
  if (a.weight) ot_out(c[1], "d.w", dw);
  if (a.bias) ot_out(c[1], "d.b", db);
  OT_OK(ot_run_repeated(c[0], 2));
  OT_OK(ot_run_repeated(c[1], 2));
  double *ry = ot_doubles(t, y->n), *rdx = ot_doubles(t, dx->n), *rdw = ot_doubles(t, D),
         *rdb = ot_doubles(t, D), *xs = ot_get(t, x);
  double *ws = a.weight ? ot_get(t, w) : NULL, *bs = a.bias ? ot_get(t, b) : NULL;
  if (a.layer) {
    ref_layernorm_forward(rows, live, D, eps, xs, ws, bs, ry);
    ref_layernorm_backward(rows, live, D, eps, xs, ws, ot_get(t, dy), rdx, rdw, rdb);
  } else {
    ref_rmsnorm_forward(rows, live, D, eps, xs, ws, ry);
    ref_rmsnorm_backward(rows, live, D, eps, xs, ws, ot_get(t, dy), rdx, rdw);
  }
  near("norm y", y, ry, num_gate(a.dtype));
  near("norm dx", dx, rdx, num_grad_gate(a.dtype, 1));
  if (a.dtype == RG_BF16 && ot_far_possible()) {
    OT_OK(ot_check_far(c[0]));
    OT_OK(ot_check_far(c[1]));
  }
  if (a.weight) near("norm dw", dw, rdw, num_grad_gate(a.dtype, 1));
  if (a.bias) near("norm db", db, rdb, num_grad_gate(a.dtype, 1));
  OT_OK(ot_check_sums(c[1]));
  ot_end(t);
}

static void norm_cases(bool layer) {
  static const int64_t d[] = {64, 7, 300};
  for (int i = 0; i < 3; i++)
    for (int k = 0; k < 3; k++) {
      norm_case a = {types[i], 2, d[k], layer, .weight = true, .outliers = k == 1};
      a.bias = layer && k != 1;
      norm_check((uint64_t)(200 + 10 * k + i), a);
      a = (norm_case){types[i], 3, d[k], layer, .weight = k != 0, .outliers = k == 2};
      a.strided = a.wide = true;
      a.bias = layer && k != 2;
      norm_check((uint64_t)(203 + 10 * k + i), a);
    }
  for (int level = 0; level < ot_isa(); level++)
    for (int i = 0; i < 3; i++)
      norm_check(240, (norm_case){types[i], 3, 65, layer, true, layer, .isa = level + 1});
}

Test(rmsnorm, types_and_shapes) {
  norm_cases(false);
}

/* Rows far from zero: variance is of what is left when the mean is gone. */
Test(layernorm, types_and_shapes) {
  norm_cases(true);
  norm_check(250, (norm_case){RG_F32, 2, 300, true, true, true, .mean = 8});
  norm_check(251, (norm_case){RG_BF16, 2, 64, true, true, true, .mean = 100});
}

/* ---- elementwise ---- */

typedef struct pointwise {
  const rg_op *op, *bwd;
  const char *in[2], *grad[2];
  int nin;
  /* of one input; NULL: mul's */
  void (*ref)(int64_t n, int64_t live, const double *x, double *y);
  void (*ref_bwd)(int64_t n, int64_t live, const double *x, const double *dy, double *dx);
} pointwise;

static void pointwise_check(uint64_t seed, const pointwise *f, rg_dtype dtype, int rank,
                            const int64_t *dim, int scale, bool strided, int isa) {
  ot *t = ot_begin(seed);
  const int64_t live = dim[0] - dim[0] / 4;
  const int32_t cu[] = {0, (int32_t)(live / 2), (int32_t)live};
  int64_t n = 1, row = 1;
  for (int k = 1; k < rank; k++) row *= dim[k];
  n = row * dim[0];
  ot_tensor *x[2], *d[2], *y = shaped(t, dtype, rank, dim, strided),
                          *dy = shaped(t, dtype, rank, dim, strided);
  ot_call *c[2] = {ot_call_new(t, f->op), ot_call_new(t, f->bwd)};
  ot_fill_normal(t, dy, 1);
  ot_poison_rows(dy, live, dim[0]);
  for (int m = 0; m < f->nin; m++) {
    x[m] = shaped(t, dtype, rank, dim, strided);
    d[m] = shaped(t, dtype, rank, dim, strided);
    ot_fill_normal(t, x[m], scale);
    ot_poison_rows(x[m], live, dim[0]);
    for (int i = 0; i < 2; i++) ot_in(c[i], f->in[m], x[m]);
    ot_out(c[1], f->grad[m], d[m]);
  }
  for (int i = 0; i < 2; i++) {
    ot_in(c[i], "cu_seqlens", num_ints(t, 3, cu));
    if (isa > 0) ot_set_isa(c[i], isa - 1);
  }
  ot_out(c[0], "y", y);
  ot_in(c[1], "grad.y", dy);
  OT_OK(ot_run_repeated(c[0], 2));
  OT_OK(ot_run_repeated(c[1], 2));
  double *ry = ot_doubles(t, n), *rd[2] = {ot_doubles(t, n), ot_doubles(t, n)},
         *a = ot_get(t, x[0]);
  double *g = ot_get(t, dy);
  if (f->nin == 2) {
    ref_mul(n, live * row, a, ot_get(t, x[1]), ry);
    ref_mul_backward(n, live * row, a, ot_get(t, x[1]), g, rd[0], rd[1]);
  } else {
    f->ref(n, live * row, a, ry);
    f->ref_bwd(n, live * row, a, g, rd[0]);
  }
  near(f->op->name, y, ry, num_gate(dtype));
  for (int m = 0; m < f->nin; m++) near(f->grad[m], d[m], rd[m], num_grad_gate(dtype, 1));
  OT_OK(ot_check_sums(c[1]));
  ot_end(t);
}

Test(pointwise, silu_sigmoid_relu_and_mul) {
  static const pointwise op[] = {{.op = &rgi_op_silu,
                                  .bwd = &rgi_op_silu_bwd,
                                  .in = {"x"},
                                  .grad = {"d.x"},
                                  .nin = 1,
                                  .ref = ref_silu,
                                  .ref_bwd = ref_silu_backward},
                                 {.op = &rgi_op_sigmoid,
                                  .bwd = &rgi_op_sigmoid_bwd,
                                  .in = {"x"},
                                  .grad = {"d.x"},
                                  .nin = 1,
                                  .ref = ref_sigmoid,
                                  .ref_bwd = ref_sigmoid_backward},
                                 {.op = &rgi_op_relu,
                                  .bwd = &rgi_op_relu_bwd,
                                  .in = {"x"},
                                  .grad = {"d.x"},
                                  .nin = 1,
                                  .ref = ref_relu,
                                  .ref_bwd = ref_relu_backward},
                                 {.op = &rgi_op_mul,
                                  .bwd = &rgi_op_mul_bwd,
                                  .in = {"a", "b"},
                                  .grad = {"d.a", "d.b"},
                                  .nin = 2}};
  static const int64_t dim[3][4] = {{40, 5, 33, 0}, {1000, 0, 0, 0}, {9, 2, 3, 50}};
  static const int rank[] = {3, 1, 4}, scale[] = {1, 10, 30};
  for (int f = 0; f < 4; f++)
    for (int i = 0; i < 3; i++)
      for (int k = 0; k < 3; k++)
        pointwise_check((uint64_t)(300 + 100 * f + 10 * i + k), &op[f], types[i], rank[k], dim[k],
                        scale[(i + k) % 3], k != 1 && i == 1, 0);
  for (int level = 0; level < ot_isa(); level++)
    for (int f = 0; f < 4; f++)
      pointwise_check(500, &op[f], types[level + 1], 3, dim[0], 3, true, level + 1);
}

Test(pointwise, add) {
  for (int i = 0; i < 3; i++)
    for (int n = 1; n <= 4; n++) {
      ot *t = ot_begin((uint64_t)(510 + 10 * i + n));
      const int64_t dim[] = {50, 3, 21};
      const int32_t cu[] = {0, 12, 44};
      ot_call *c = ot_call_new(t, &rgi_op_add);
      ot_tensor *y = shaped(t, types[i], 3, dim, n == 3);
      double *sum = ot_doubles(t, y->n);
      for (int m = 0; m < n; m++) {
        ot_tensor *x = shaped(t, types[i], 3, dim, (n + m) % 2);
        ot_fill_normal(t, x, 1);
        double *more = ot_doubles(t, y->n);
        ref_add(y->n, 44 * 63, sum, ot_get(t, x), more);
        sum = more;
        ot_poison_rows(x, 44, 50);
        ot_in(c, "a", x);
      }
      ot_in(c, "cu_seqlens", num_ints(t, 3, cu));
      ot_out(c, "y", y);
      OT_OK(ot_run_repeated(c, 2));
      near("add", y, sum, num_gate(types[i]));
      ot_end(t);
    }
}

/* ---- cast, concat, sums ---- */

Test(rows, cast_rounds_to_nearest_even) {
  static const char *const to[] = {"f32", "bf16", "f16"};
  for (int i = 0; i < 3; i++)
    for (int k = 0; k < 3; k++)
      for (int level = 0; level <= ot_isa(); level++) {
        ot *t = ot_begin((uint64_t)(600 + 10 * i + k));
        const int64_t dim[] = {60, 2, 37};
        const int32_t cu[] = {0, 55};
        ot_tensor *x = shaped(t, types[i], 3, dim, k == 1),
                  *y = shaped(t, types[k], 3, dim, i == 1);
        double *v = ot_doubles(t, x->n), *want = ot_doubles(t, x->n);
        for (int64_t e = 0; e < x->n; e++) v[e] = ldexp(ot_normal(t), (int)ot_below(t, 44) - 30);
        v[0] = INFINITY;
        v[1] = -0.0;
        v[2] = 1 + 0x1p-8; /* half way in bf16: to the even neighbour */
        v[3] = 1 + 3 * 0x1p-8;
        v[4] = 1 + 0x1p-11;
        v[5] = 65520; /* infinite in f16 */
        ot_set(x, v);
        ref_cast(x->n, 55 * 74, ot_get(t, x), want);
        ot_poison_rows(x, 55, 60);
        ot_call *c = ot_call_new(t, &rgi_op_cast);
        ot_set_isa(c, level);
        ot_in(c, "x", x);
        ot_in(c, "cu_seqlens", num_ints(t, 2, cu));
        ot_choice(c, "to", to[k]);
        ot_out(c, "y", y);
        OT_OK(ot_run_repeated(c, 1));
        ot_tensor *exact = ot_like(t, y, NULL);
        ot_set(exact, want); /* rounds */
        cr_assert(ot_same_bits(exact, y), "%s to %s", rg_dtype_name(types[i]), to[k]);
        ot_end(t);
      }
}

Test(rows, cast_copies_integers) {
  ot *t = ot_begin(640);
  ot_tensor *x = OT_NEW(t, RG_I32, 30, 7), *y = OT_NEW(t, RG_I32, 30, 7);
  int32_t *v = ot_ints(t, 210);
  for (int i = 0; i < 210; i++) v[i] = (int32_t)ot_random(t);
  ot_set_ints(x, v);
  ot_call *c = ot_call_new(t, &rgi_op_cast);
  ot_in(c, "x", x);
  ot_out(c, "y", y);
  OT_OK(ot_run(c, 2));
  cr_assert(ot_same_bits(x, y));
  ot_end(t);
}

Test(rows, concat) {
  for (int i = 0; i < 3; i++)
    for (int axis = 1; axis <= 2; axis++) {
      ot *t = ot_begin((uint64_t)(650 + 10 * axis + i));
      enum { T = 40, LIVE = 31, PARTS = 3 };
      const int32_t cu[] = {0, 31};
      int64_t size[] = {3, 1, 5}, whole[] = {T, 4, 6}, width[PARTS], other = axis == 1 ? 6 : 4;
      const double *part[PARTS];
      whole[axis] = 9;
      ot_tensor *y = shaped(t, types[i], 3, whole, i == 1);
      ot_call *c = ot_call_new(t, &rgi_op_concat);
      for (int m = 0; m < PARTS; m++) {
        int64_t dim[] = {T, 4, 6};
        dim[axis] = size[m];
        ot_tensor *x = shaped(t, types[i], 3, dim, m == 2);
        ot_fill_normal(t, x, 1);
        ot_poison_rows(x, LIVE, T);
        part[m] = ot_get(t, x);
        width[m] = axis == 1 ? size[m] * other : size[m];
        ot_in(c, "x", x);
      }
      ot_in(c, "cu_seqlens", num_ints(t, 2, cu));
      ot_int(c, "axis", axis);
      ot_out(c, "y", y);
      OT_OK(ot_run_repeated(c, 1));
      double *want = ot_doubles(t, y->n);
      int64_t outer = axis == 1 ? T : T * other, live = axis == 1 ? LIVE : LIVE * other;
      ref_concat(outer, live, PARTS, width, part, want);
      ot_tensor *exact = ot_like(t, y, NULL);
      ot_set(exact, want);
      cr_assert(ot_same_bits(exact, y), "axis %d", axis);
      ot_end(t);
    }
}

Test(rows, accumulate_into_a_slice) {
  for (int i = 0; i < 3; i++)
    for (int axis = 0; axis < 3; axis++) {
      ot *t = ot_begin((uint64_t)(680 + 10 * axis + i));
      const int64_t whole[] = {20, 6, 9};
      int64_t dim[] = {20, 6, 9}, start = 2;
      dim[axis] = 3;
      ot_tensor *acc = shaped(t, RG_F32, 3, whole, i == 1),
                *x = shaped(t, types[i], 3, dim, i == 2);
      ot_fill_normal(t, acc, 1);
      ot_fill_normal(t, x, 1);
      ot_tensor *want = ot_like(t, acc, NULL);
      double *sum = ot_get(t, acc), *add = ot_get(t, x);
      for (int64_t e = 0; e < x->n; e++) {
        int64_t at[3] = {e / (dim[1] * dim[2]), e / dim[2] % dim[1], e % dim[2]};
        at[axis] += start;
        int64_t to = (at[0] * 6 + at[1]) * 9 + at[2];
        /* one fp32 addition: exact in double, rounded once */
        sum[to] = (double)(float)(sum[to] + add[e]);
      }
      ot_set(want, sum);
      ot_call *c = ot_call_new(t, &rgi_op_accumulate);
      ot_in(c, "acc", acc);
      ot_in(c, "x", x);
      ot_int(c, "axis", axis);
      ot_int(c, "start", start);
      ot_out(c, "y", acc);
      OT_OK(ot_run_repeated(c, 3));
      cr_assert(ot_same_bits(want, acc), "axis %d", axis);
      ot_end(t);
    }
}
