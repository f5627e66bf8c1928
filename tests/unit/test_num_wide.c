/* tests/unit/test_num_wide.c: row-wise ops past their usual sizes (wide rows, many summands,
 * many branches), and layouts: rows with holes and rows off alignment must give the bits of
 * dense ones. */
#include "../harness/num.h"
#include <criterion/criterion.h>
#include <math.h>

static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
static const int32_t some[] = {20, 0, 1, 37};

static void near(const char *what, const ot_tensor *x, const double *ref, double gate) {
  double off = ot_relrms(x, ref, 1e-3);
  cr_assert(off <= gate, "%s (%s) is off by %.3g, gate %.3g", what, rg_dtype_name(x->arg.dtype),
            off, gate);
}

static ot_tensor *filled(ot *t, const num_pack *p, rg_dtype dtype, int rank, const int64_t *dim) {
  ot_tensor *a = ot_new(t, dtype, rank, dim, NULL);
  ot_fill_normal(t, a, 1);
  num_poison_dead(a, p, 0, 0);
  return a;
}

/* ---- the same call over other layouts ---- */

enum { MOST = 12 };
typedef struct layout_case {
  const rg_op *op;
  ot_tensor *in[MOST], *out[MOST]; /* tensors without an axis of rows are shared by all layouts */
  const char *in_port[MOST], *out_port[MOST];
  int nin, nout;
  const char *attr;
  double value;
} layout_case;

static void bind_in(layout_case *l, const char *port, ot_tensor *a) {
  l->in[l->nin] = a;
  l->in_port[l->nin++] = port;
}
static void bind_out(layout_case *l, const char *port, ot_tensor *a) {
  l->out[l->nout] = a;
  l->out_port[l->nout++] = port;
}

/* Holes of 8 elements keep rows on 16 bytes, holes of 1 and 3 do not. */
static void same_bits_in_any_layout(ot *t, const layout_case *l) {
  static const int64_t pad[][3] = {{0, 0, 0}, {16, 8, 0}, {3, 1, 0}};
  ot_tensor *first[MOST];
  for (int k = 0; k < 3; k++) {
    ot_tensor *out[MOST];
    ot_call *c = ot_call_new(t, l->op);
    for (int i = 0; i < l->nin; i++) {
      ot_tensor *a = l->in[i];
      if (a->arg.rank > 1) {
        a = ot_like(t, l->in[i], pad[k] + 3 - a->arg.rank);
        ot_copy(a, l->in[i]);
      }
      ot_in(c, l->in_port[i], a);
    }
    for (int i = 0; i < l->nout; i++) {
      out[i] = l->out[i]->arg.rank > 1 ? ot_like(t, l->out[i], pad[k] + 3 - l->out[i]->arg.rank)
                                       : ot_like(t, l->out[i], NULL);
      ot_out(c, l->out_port[i], out[i]);
    }
    if (l->attr) ot_float(c, l->attr, l->value);
    OT_OK(ot_run(c, 2));
    for (int i = 0; i < l->nout; i++) {
      if (k == 0) first[i] = out[i];
      cr_assert(ot_same_bits(first[i], out[i]), "%s: other bits in %s (layout %d)", l->op->name,
                l->out_port[i], k);
    }
  }
}

Test(wide, layouts_change_no_bit) {
  for (int i = 0; i < 3; i++) {
    ot *t = ot_begin(700 + (uint64_t)i);
    num_pack p = num_pack_new(t, 4, some, 5);
    const int64_t dim[] = {p.T, 3, 64}, width[] = {64};
    ot_tensor *x = filled(t, &p, types[i], 3, dim), *y = filled(t, &p, types[i], 3, dim);
    ot_tensor *z = filled(t, &p, types[i], 3, dim), *w = ot_new(t, types[i], 1, width, NULL);
    ot_tensor *wide = ot_like_as(t, x, RG_F32);
    ot_fill_normal(t, w, 1);
    layout_case norm = {.op = &rgi_op_rmsnorm, .attr = "eps", .value = 1e-6};
    bind_in(&norm, "x", x);
    bind_in(&norm, "w", w);
    bind_in(&norm, "cu_seqlens", p.tensor);
    bind_out(&norm, "y", y);
    same_bits_in_any_layout(t, &norm);
    layout_case norm_bwd = {.op = &rgi_op_rmsnorm_bwd, .attr = "eps", .value = 1e-6};
    bind_in(&norm_bwd, "x", x);
    bind_in(&norm_bwd, "w", w);
    bind_in(&norm_bwd, "cu_seqlens", p.tensor);
    bind_in(&norm_bwd, "grad.y", y);
    bind_out(&norm_bwd, "d.x", wide);
    bind_out(&norm_bwd, "d.w", w);
    same_bits_in_any_layout(t, &norm_bwd);
    layout_case rope = {.op = &rgi_op_rope, .attr = "theta", .value = 5000};
    bind_in(&rope, "x", x);
    bind_in(&rope, "cu_seqlens", p.tensor);
    bind_out(&rope, "y", y);
    same_bits_in_any_layout(t, &rope);
    layout_case silu = {.op = &rgi_op_silu_bwd};
    bind_in(&silu, "x", x);
    bind_in(&silu, "grad.y", y);
    bind_in(&silu, "cu_seqlens", p.tensor);
    bind_out(&silu, "d.x", wide);
    same_bits_in_any_layout(t, &silu);
    layout_case mul = {.op = &rgi_op_mul_bwd};
    bind_in(&mul, "a", x);
    bind_in(&mul, "b", y);
    bind_in(&mul, "grad.y", z);
    bind_in(&mul, "cu_seqlens", p.tensor);
    bind_out(&mul, "d.a", x);
    bind_out(&mul, "d.b", wide);
    same_bits_in_any_layout(t, &mul);
    layout_case add = {.op = &rgi_op_add};
    for (int k = 0; k < 5; k++) bind_in(&add, "a", k % 2 ? x : k % 3 ? y : z);
    bind_in(&add, "cu_seqlens", p.tensor);
    bind_out(&add, "y", x);
    same_bits_in_any_layout(t, &add);
    ot_end(t);
  }
}

/* ---- many ---- */

Test(wide, forty_summands) {
  for (int i = 0; i < 3; i++)
    for (int n = 16; n <= 40; n += 12) {
      ot *t = ot_begin((uint64_t)(710 + 50 * i + n));
      num_pack p = num_pack_new(t, 4, some, 5);
      const int64_t dim[] = {p.T, 3, 5};
      ot_call *c = ot_call_new(t, &rgi_op_add);
      ot_tensor *y = ot_new(t, types[i], 3, dim, NULL);
      double *sum = ot_doubles(t, y->n);
      for (int k = 0; k < n; k++) {
        ot_tensor *x = filled(t, &p, types[i], 3, dim);
        double *more = ot_doubles(t, y->n);
        ref_add(y->n, p.live * 15, sum, ot_get(t, x), more);
        sum = more;
        ot_in(c, "a", x);
      }
      ot_in(c, "cu_seqlens", p.tensor);
      ot_out(c, "y", y);
      OT_OK(ot_run_repeated(c, 2));
      near("add", y, sum, num_gate(types[i]));
      ot_end(t);
    }
}

static void many_branches(uint64_t seed, bool merge, int n, rg_dtype dtype, int64_t D) {
  enum { BRANCHES = 12 };
  ot *t = ot_begin(seed);
  num_pack p = num_pack_new(t, 4, some, 5);
  const int64_t dim[] = {p.T, 2, D}, gates[] = {p.T, 2, n}, lses[] = {p.T, 2};
  ot_tensor *out = ot_new(t, dtype, 3, dim, NULL), *dout = filled(t, &p, dtype, 3, dim),
            *d_o[BRANCHES], *d_lse[BRANCHES];
  ot_tensor *gate = filled(t, &p, dtype, 3, gates), *d_gate = ot_like(t, gate, NULL),
            *out_lse = ot_new(t, RG_F32, 2, lses, NULL);
  double *o[BRANCHES], *lse[BRANCHES], *rd_o[BRANCHES], *rd_lse[BRANCHES];
  ot_call *f = ot_call_new(t, merge ? &rgi_op_merge_lse : &rgi_op_combine),
          *b = ot_call_new(t, merge ? &rgi_op_merge_lse_bwd : &rgi_op_combine_bwd);
  for (int k = 0; k < n; k++) {
    ot_tensor *x = filled(t, &p, dtype, 3, dim), *y = filled(t, &p, RG_F32, 2, lses);
    o[k] = ot_get(t, x);
    lse[k] = ot_get(t, y);
    rd_o[k] = ot_doubles(t, x->n);
    rd_lse[k] = ot_doubles(t, y->n);
    d_o[k] = k % 3 == 2 ? NULL : ot_like(t, x, NULL); /* not all are wanted */
    d_lse[k] = ot_like(t, y, NULL);
    ot_in(f, "o", x);
    ot_in(b, "o", x);
    ot_out(b, "d.o", d_o[k]);
    if (!merge) continue;
    ot_in(f, "lse", y);
    ot_in(b, "lse", y);
    ot_out(b, "d.lse", d_lse[k]);
  }
  ot_in(f, "cu_seqlens", p.tensor);
  ot_in(b, "cu_seqlens", p.tensor);
  ot_in(b, "grad.o", dout);
  ot_out(f, "o", out);
  if (merge) {
    ot_out(f, "lse", out_lse);
  } else {
    ot_in(f, "gate", gate);
    ot_in(b, "gate", gate);
    ot_choice(f, "act", "softmax");
    ot_choice(b, "act", "softmax");
    ot_out(b, "d.gate", d_gate);
  }
  OT_OK(ot_run_repeated(f, 2));
  OT_OK(ot_run_repeated(b, 2));
  const double *const *co = (const double *const *)o, *const *cl = (const double *const *)lse;
  double *want = ot_doubles(t, out->n), *want_lse = ot_doubles(t, out_lse->n), *g = ot_get(t, dout),
         grad_gate = num_grad_gate(dtype, 1);
  if (merge) {
    ref_merge_forward(p.T, p.live, 2, D, n, co, cl, want, want_lse);
    ref_merge_backward(p.T, p.live, 2, D, n, co, cl, g, ot_doubles(t, out_lse->n), rd_o, rd_lse);
    for (int k = 0; k < n; k++) near("d.lse", d_lse[k], rd_lse[k], grad_gate);
  } else {
    double *want_gate = ot_doubles(t, gate->n), *x = ot_get(t, gate);
    ref_combine_forward(REF_SOFTMAX, p.T, p.live, 2, D, n, co, x, want);
    ref_combine_backward(REF_SOFTMAX, p.T, p.live, 2, D, n, co, x, g, rd_o, want_gate);
    near("d.gate", d_gate, want_gate, grad_gate);
  }
  near("o", out, want, num_gate(dtype));
  for (int k = 0; k < n; k++)
    if (d_o[k]) near("d.o", d_o[k], rd_o[k], grad_gate);
  ot_end(t);
}

Test(wide, many_branches) {
  for (int i = 0; i < 3; i++)
    for (int merge = 0; merge < 2; merge++) {
      many_branches((uint64_t)(760 + 10 * i + merge), merge, 9, types[i], 64);
      many_branches((uint64_t)(764 + 10 * i + merge), merge, 12, types[i], 515);
      many_branches((uint64_t)(766 + 10 * i + merge), merge, 6, types[i], 520);
    }
}

/* ---- wide rows ---- */

static void wide_norm(uint64_t seed, rg_dtype dtype, int64_t T, int64_t W) {
  ot *t = ot_begin(seed);
  const int32_t length[] = {(int32_t)(T / 3), (int32_t)(T - T / 3)};
  num_pack p = num_pack_new(t, 2, length, 3);
  const int64_t dim[] = {p.T, W}, width[] = {W};
  ot_tensor *x = filled(t, &p, dtype, 2, dim), *dy = filled(t, &p, dtype, 2, dim);
  ot_tensor *w = ot_new(t, dtype, 1, width, NULL), *dw = ot_like(t, w, NULL);
  ot_tensor *y = ot_like(t, x, NULL), *dx = ot_like(t, x, NULL);
  ot_call *f = ot_call_new(t, &rgi_op_rmsnorm), *b = ot_call_new(t, &rgi_op_rmsnorm_bwd);
  ot_fill_normal(t, w, 1);
  ot_in(f, "x", x);
  ot_in(b, "x", x);
  ot_in(f, "w", w);
  ot_in(b, "w", w);
  ot_in(f, "cu_seqlens", p.tensor);
  ot_in(b, "cu_seqlens", p.tensor);
  ot_in(b, "grad.y", dy);
  ot_out(f, "y", y);
  ot_out(b, "d.x", dx);
  ot_out(b, "d.w", dw);
  ot_float(f, "eps", 1e-5);
  ot_float(b, "eps", 1e-5);
  OT_OK(ot_run_repeated(f, 1));
  OT_OK(ot_run_repeated(b, 1));
  double *xs = ot_get(t, x), *ws = ot_get(t, w), *ry = ot_doubles(t, x->n),
         *rdx = ot_doubles(t, x->n), *rdw = ot_doubles(t, W);
  ref_rmsnorm_forward(p.T, p.live, W, 1e-5, xs, ws, ry);
  ref_rmsnorm_backward(p.T, p.live, W, 1e-5, xs, ws, ot_get(t, dy), rdx, rdw);
  near("y", y, ry, num_gate(dtype));
  near("dx", dx, rdx, num_grad_gate(dtype, 1));
  near("dw", dw, rdw, num_grad_gate(dtype, 1));
  OT_OK(ot_check_sums(b));
  ot_end(t);
}

Test(wide, rmsnorm) {
  static const int64_t width[] = {8, 256, 264, 1024, 1032, 2048, 2056, 8192, 9000, 10001};
  for (int k = 0; k < 10; k++)
    for (int i = 0; i < 3; i++)
      wide_norm((uint64_t)(800 + 10 * k + i), types[i], k < 4 ? 70 : 21, width[k]);
  wide_norm(890, RG_F32, 5000, 16); /* many blocks of rows */
}

static void wide_rope(uint64_t seed, rg_dtype dtype, int64_t D) {
  ot *t = ot_begin(seed);
  num_pack p = num_pack_new(t, 4, some, 5);
  const int64_t dim[] = {p.T, 2, D};
  ot_tensor *x = filled(t, &p, dtype, 3, dim), *y = ot_like(t, x, NULL);
  ot_call *c = ot_call_new(t, &rgi_op_rope);
  double *want = ot_doubles(t, x->n);
  ot_in(c, "x", x);
  ot_in(c, "cu_seqlens", p.tensor);
  ot_out(c, "y", y);
  OT_OK(ot_run_repeated(c, 1));
  ref_rope(p.T, p.B, 2, D, 10000, p.cu, NULL, false, ot_get(t, x), want);
  near("y", y, want, num_gate(dtype));
  ot_end(t);
}

Test(wide, rope) {
  for (int i = 0; i < 3; i++) {
    wide_rope(900 + (uint64_t)i, types[i], 1200);
    wide_rope(903 + (uint64_t)i, types[i], 514);
  }
}
