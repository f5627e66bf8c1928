/* tests/unit/test_num_combine.c: combine and merge_lse, the ops that join branches, against the
 * oracle. */
#include "../harness/num.h"
#include <criterion/criterion.h>
#include <math.h>

enum { MOST = 5 }; /* branches */

static const char *const act_name[] = {"sigmoid", "softmax", "none"};
static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
static const int32_t some[] = {20, 0, 1, 37};
static const int64_t holes[] = {6, 3, 0};

typedef struct branch_case {
  bool merge;
  ref_act act;
  rg_dtype dtype, gate_dtype;
  int64_t H, D;
  int n;
  bool saturated, wide, strided;
  int64_t B;
  const int32_t *length; /* NULL: some */
  int isa;               /* level + 1; 0: best */
} branch_case;

typedef struct branch_run {
  branch_case a;
  num_pack pack;
  ot_tensor *o[MOST], *lse[MOST], *gate, *out, *out_lse, *dout, *dout_lse, *d_o[MOST], *d_lse[MOST],
      *dgate;
  ot_call *forward, *backward;
} branch_run;

static ot_tensor *tensor(ot *t, const branch_run *r, rg_dtype dtype, int64_t width) {
  const int64_t dim[] = {r->pack.T, r->a.H, width};
  return ot_new(t, dtype, 3, dim, r->a.strided ? holes : NULL);
}

static branch_run shell(ot *t, branch_case a, int64_t slack) {
  branch_run r = {.a = a};
  rg_dtype grad = a.wide ? RG_F32 : a.dtype;
  r.pack = a.length ? num_pack_new(t, a.B, a.length, slack) : num_pack_new(t, 4, some, slack);
  for (int m = 0; m < a.n; m++) {
    r.o[m] = tensor(t, &r, a.dtype, a.D);
    r.d_o[m] = tensor(t, &r, grad, a.D);
    r.lse[m] = OT_NEW(t, RG_F32, r.pack.T, a.H);
    r.d_lse[m] = OT_NEW(t, RG_F32, r.pack.T, a.H);
  }
  r.gate = tensor(t, &r, a.gate_dtype, a.n);
  r.dgate = tensor(t, &r, a.wide ? RG_F32 : a.gate_dtype, a.n);
  r.out = tensor(t, &r, a.dtype, a.D);
  r.dout = tensor(t, &r, a.dtype, a.D);
  r.out_lse = OT_NEW(t, RG_F32, r.pack.T, a.H);
  r.dout_lse = OT_NEW(t, RG_F32, r.pack.T, a.H);
  return r;
}

static void make_calls(ot *t, branch_run *r) {
  const branch_case *a = &r->a;
  ot_call *c[2] = {ot_call_new(t, a->merge ? &rgi_op_merge_lse : &rgi_op_combine),
                   ot_call_new(t, a->merge ? &rgi_op_merge_lse_bwd : &rgi_op_combine_bwd)};
  r->forward = c[0];
  r->backward = c[1];
  for (int i = 0; i < 2; i++) {
    if (a->isa > 0) ot_set_isa(c[i], a->isa - 1);
    for (int m = 0; m < a->n; m++) ot_in(c[i], "o", r->o[m]);
    for (int m = 0; a->merge && m < a->n; m++) ot_in(c[i], "lse", r->lse[m]);
    if (!a->merge) {
      ot_in(c[i], "gate", r->gate);
      ot_choice(c[i], "act", act_name[a->act]);
    }
    ot_in(c[i], "cu_seqlens", r->pack.tensor);
  }
  ot_out(r->forward, "o", r->out);
  ot_in(r->backward, "grad.o", r->dout);
  for (int m = 0; m < a->n; m++) ot_out(r->backward, "d.o", r->d_o[m]);
  if (!a->merge) {
    ot_out(r->backward, "d.gate", r->dgate);
    return;
  }
  ot_out(r->forward, "lse", r->out_lse);
  ot_in_if(r->backward, "out.o", r->out);
  ot_in_if(r->backward, "out.lse", r->out_lse);
  ot_in(r->backward, "grad.lse", r->dout_lse);
  for (int m = 0; m < a->n; m++) ot_out(r->backward, "d.lse", r->d_lse[m]);
}

/* Rows of branches that saw nothing: o = 0, lse = −inf; every seventh row in all branches. */
static void fill_lse(ot *t, branch_run *r) {
  for (int m = 0; m < r->a.n; m++) {
    double *lse = ot_doubles(t, r->lse[m]->n), *o = ot_get(t, r->o[m]);
    for (int64_t i = 0; i < r->lse[m]->n; i++) {
      bool none = i % 7 == 0 || ot_below(t, 5) == 0;
      lse[i] = none ? -INFINITY : 4 * ot_normal(t);
      for (int64_t c = 0; none && c < r->a.D; c++) o[i * r->a.D + c] = 0;
    }
    ot_set(r->lse[m], lse);
    ot_set(r->o[m], o);
  }
}

static void poison_dead(branch_run *r) {
  ot_tensor *all[] = {r->gate, r->dout, r->dout_lse};
  for (int i = 0; i < 3; i++) num_poison_dead(all[i], &r->pack, 0, 0);
  for (int m = 0; m < r->a.n; m++) {
    num_poison_dead(r->o[m], &r->pack, 0, 0);
    num_poison_dead(r->lse[m], &r->pack, 0, 0);
  }
}

static branch_run make(ot *t, branch_case a) {
  static const double extreme[] = {0, 20, -20, 88, -88, 104, -104, 1000, -1000, 30000, -30000, 5};
  branch_run r = shell(t, a, 5);
  for (int m = 0; m < a.n; m++) ot_fill_normal(t, r.o[m], 1);
  ot_fill_normal(t, r.gate, 1);
  if (a.saturated) {
    double *g = ot_doubles(t, r.gate->n);
    for (int64_t i = 0; i < r.gate->n; i++) g[i] = extreme[ot_below(t, 12)];
    ot_set(r.gate, g);
  }
  ot_fill_normal(t, r.dout, 1);
  ot_fill_normal(t, r.dout_lse, 1);
  fill_lse(t, &r);
  poison_dead(&r);
  make_calls(t, &r);
  return r;
}

static void near(const branch_run *r, const char *what, const ot_tensor *x, const double *ref,
                 double gate) {
  double off = ot_relrms(x, ref, 1e-3);
  cr_assert(off <= gate, "%s %s, %s, %d branches%s: %s is off by %.3g, gate %.3g",
            r->a.merge ? "merge" : "combine", act_name[r->a.act], rg_dtype_name(r->a.dtype), r->a.n,
            r->a.saturated ? ", saturated" : "", what, off, gate);
}

static void check(uint64_t seed, branch_case a) {
  ot *t = ot_begin(seed);
  branch_run r = make(t, a);
  int64_t T = r.pack.T, live = r.pack.live;
  double *o[MOST], *lse[MOST], *d_o[MOST], *d_lse[MOST];
  double *out = ot_doubles(t, r.out->n), *out_lse = ot_doubles(t, r.out_lse->n),
         *dgate = ot_doubles(t, r.dgate->n);
  double gate = num_gate(a.dtype), grad_gate = num_grad_gate(a.dtype, 1);
  OT_OK(ot_run(r.forward, 2));
  OT_OK(ot_run(r.backward, 2));
  for (int m = 0; m < a.n; m++) {
    o[m] = ot_get(t, r.o[m]);
    lse[m] = ot_get(t, r.lse[m]);
    d_o[m] = ot_doubles(t, r.o[m]->n);
    d_lse[m] = ot_doubles(t, r.lse[m]->n);
  }
  const double *const *co = (const double *const *)o, *const *cl = (const double *const *)lse;
  double *dout = ot_get(t, r.dout);
  if (a.merge) {
    ref_merge_forward(T, live, a.H, a.D, a.n, co, cl, out, out_lse);
    ref_merge_backward(T, live, a.H, a.D, a.n, co, cl, dout, ot_get(t, r.dout_lse), d_o, d_lse);
    double off = ot_lse_error(r.out_lse, out_lse);
    cr_assert(off <= NUM_LSE_GATE, "merged lse is off by %.3g", off);
    for (int m = 0; m < a.n; m++) near(&r, "d.lse", r.d_lse[m], d_lse[m], grad_gate);
  } else {
    double *g = ot_get(t, r.gate);
    ref_combine_forward(a.act, T, live, a.H, a.D, a.n, co, g, out);
    ref_combine_backward(a.act, T, live, a.H, a.D, a.n, co, g, dout, d_o, dgate);
    near(&r, "d.gate", r.dgate, dgate, grad_gate);
  }
  near(&r, "o", r.out, out, gate);
  for (int m = 0; m < a.n; m++) near(&r, "d.o", r.d_o[m], d_o[m], grad_gate);
  ot_end(t);
}

Test(combine, activations_and_types) {
  for (int act = 0; act < 3; act++)
    for (int i = 0; i < 3; i++)
      for (int n = 1; n <= MOST; n += 2) {
        branch_case a = {.act = (ref_act)act,
                         .dtype = types[i],
                         .gate_dtype = types[i],
                         .H = 3,
                         .D = 64,
                         .n = n};
        check((uint64_t)(100 * act + 10 * i + n), a);
        a.gate_dtype = RG_F32;
        a.wide = a.strided = true;
        check((uint64_t)(100 * act + 10 * i + n + 1), a);
      }
}

Test(combine, saturated_gates) {
  for (int act = 0; act < 2; act++)
    for (int i = 0; i < 3; i++)
      check((uint64_t)(400 + 10 * act + i), (branch_case){.act = (ref_act)act,
                                                          .dtype = types[i],
                                                          .gate_dtype = types[i],
                                                          .H = 4,
                                                          .D = 40,
                                                          .n = 3,
                                                          .saturated = true});
}

Test(combine, head_sizes_and_levels) {
  static const int64_t d[] = {1, 7, 100, 256, 1000};
  /* of one element, d.gate is a product: an error of its own, not of a sum */
  for (int i = 0; i < 5; i++)
    check(450 + (uint64_t)i,
          (branch_case){
              .dtype = types[i % 3], .gate_dtype = types[i % 3], .H = 2, .D = d[i], .n = 3});
  for (int level = 0; level < ot_isa(); level++)
    for (int i = 0; i < 6; i++)
      check(460 + (uint64_t)(6 * level + i), (branch_case){.merge = i >= 3,
                                                           .dtype = types[i % 3],
                                                           .gate_dtype = types[i % 3],
                                                           .H = 2,
                                                           .D = 64,
                                                           .n = 3,
                                                           .isa = level + 1});
}

Test(combine, empty_and_many_sequences) {
  ot *t = ot_begin(470);
  int32_t *ones = ot_ints(t, 10000), zeros[2] = {0};
  for (int i = 0; i < 10000; i++) ones[i] = 1;
  for (int merge = 0; merge < 2; merge++) {
    branch_case a = {.merge = merge, .H = 1, .D = 8, .n = 2, .B = 10000, .length = ones};
    check(471, a);
    a.B = 2;
    a.length = zeros;
    check(472, a);
    a.B = 0;
    check(473, a);
  }
  ot_end(t);
}

Test(merge_lse, types_and_branches) {
  for (int i = 0; i < 3; i++)
    for (int n = 1; n <= MOST; n++) {
      branch_case a = {.merge = true, .dtype = types[i], .H = 3, .D = 64, .n = n};
      check((uint64_t)(500 + 10 * i + n), a);
      a.wide = a.strided = true;
      a.D = 24;
      check((uint64_t)(550 + 10 * i + n), a);
    }
}

/* ---- bit-equality ---- */

Test(combine, repeats_threads_and_sums) {
  for (int i = 0; i < 6; i++) {
    ot *t = ot_begin(600 + (uint64_t)i);
    branch_run r = make(t, (branch_case){.merge = i >= 3,
                                         .act = (ref_act)(i % 3),
                                         .dtype = types[i % 3],
                                         .gate_dtype = types[i % 3],
                                         .H = 3,
                                         .D = 40,
                                         .n = 3});
    OT_OK(ot_run_repeated(r.forward, 100));
    OT_OK(ot_run_repeated(r.backward, 100));
    OT_OK(ot_check_sums(r.backward));
    ot_end(t);
  }
}

/* Neither holes between rows nor the neighbours in the pack, NaN among them, change a bit. */
Test(combine, neighbours_and_strides_change_no_bit) {
  for (int i = 0; i < 6; i++) {
    ot *t = ot_begin(620 + (uint64_t)i);
    branch_case a = {.merge = i >= 3,
                     .act = (ref_act)(i % 3),
                     .dtype = types[i % 3],
                     .gate_dtype = types[i % 3],
                     .H = 3,
                     .D = 40,
                     .n = 3};
    branch_run r = make(t, a);
    a.strided = true;
    branch_run q = shell(t, a, 5);
    for (int m = 0; m < a.n; m++) {
      ot_copy(q.o[m], r.o[m]);
      ot_copy(q.lse[m], r.lse[m]);
      ot_poison_rows(q.o[m], 0, 20);
      ot_poison_rows(q.lse[m], 0, 20);
    }
    ot_copy(q.gate, r.gate);
    ot_copy(q.dout, r.dout);
    ot_copy(q.dout_lse, r.dout_lse);
    ot_poison_rows(q.gate, 0, 20);
    ot_poison_rows(q.dout, 0, 20);
    make_calls(t, &q);
    OT_OK(ot_run(r.forward, 2));
    OT_OK(ot_run(r.backward, 2));
    OT_OK(ot_run(q.forward, 3));
    OT_OK(ot_run(q.backward, 3));
    int64_t rows = r.pack.T - 20;
    cr_assert(ot_same_rows(r.out, 20, q.out, 20, rows));
    for (int m = 0; m < a.n; m++) {
      cr_assert(ot_same_rows(r.d_o[m], 20, q.d_o[m], 20, rows));
      if (a.merge) cr_assert(ot_same_rows(r.d_lse[m], 20, q.d_lse[m], 20, rows));
    }
    if (!a.merge) cr_assert(ot_same_rows(r.dgate, 20, q.dgate, 20, rows));
    ot_end(t);
  }
}

Test(combine, far_rows) {
  if (!ot_far_possible()) cr_skip("no address space for sparse tensors");
  for (int i = 0; i < 4; i++) {
    ot *t = ot_begin(640 + (uint64_t)i);
    branch_run r = make(t, (branch_case){.merge = i == 3,
                                         .act = (ref_act)(i % 3),
                                         .dtype = RG_BF16,
                                         .gate_dtype = RG_BF16,
                                         .H = 3,
                                         .D = 40,
                                         .n = 3});
    OT_OK(ot_check_far(r.forward));
    OT_OK(ot_check_far(r.backward));
    ot_end(t);
  }
}
