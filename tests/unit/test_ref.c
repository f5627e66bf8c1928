/* tests/unit/test_ref.c: trust in the oracle. Every backward agrees with central differences of
 * its forward (indices frozen), and forwards agree with each other where their definitions meet
 * and with cases worked out by hand. */
#include "../../ops/ops.h"
#include "../harness/optest.h"
#include "../ref/ref.h"
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

static double *normals(ot *t, int64_t n) {
  double *x = ot_doubles(t, n);
  for (int64_t i = 0; i < n; i++) x[i] = ot_normal(t);
  return x;
}

static double dot(const double *a, const double *b, int64_t n) {
  double sum = 0;
  /* an lse of −inf does not move */
  for (int64_t i = 0; i < n; i++) sum += isfinite(a[i]) ? a[i] * b[i] : 0;
  return sum;
}

/* Compares gradient g of loss(user) with central differences in x [n]. */
static void check_gradient(const char *what, double (*loss)(void *user), void *user, double *x,
                           const double *g, int64_t n) {
  const double h = 1e-5;
  for (int64_t i = 0; i < n; i++) {
    double keep = x[i], up, down;
    x[i] = keep + h;
    up = loss(user);
    x[i] = keep - h;
    down = loss(user);
    x[i] = keep;
    double slope = (up - down) / (2 * h);
    cr_assert(fabs(slope - g[i]) <= 1e-7 * fmax(1, fabs(slope)),
              "%s[%lld]: %.12g, differences give %.12g", what, (long long)i, g[i], slope);
  }
}

/* ---- attention ---- */

struct attn_case {
  ref_attn a;
  double *o, *lse, *d_o, *d_lse;
};

static double attn_loss(void *user) {
  struct attn_case *c = user;
  ref_attn_forward(&c->a, c->o, c->lse);
  return dot(c->o, c->d_o, c->a.T * c->a.H * c->a.DV) + dot(c->lse, c->d_lse, c->a.T * c->a.H);
}

static void attn_gradients(ot *t, ref_attn a) {
  struct attn_case c = {.a = a};
  int64_t nq = a.T * a.H * a.D, nk = a.TK * a.KH * a.D, nv = a.TK * a.KH * a.DV;
  double *q = normals(t, nq), *k = normals(t, nk), *v = normals(t, nv), *sinks = normals(t, a.H);
  double *dq = ot_doubles(t, nq), *dk = ot_doubles(t, nk), *dv = ot_doubles(t, nv),
         *ds = ot_doubles(t, a.H);
  c.a.q = q;
  c.a.k = k;
  c.a.v = v;
  c.a.sinks = a.sinks ? sinks : NULL;
  c.o = ot_doubles(t, a.T * a.H * a.DV);
  c.lse = ot_doubles(t, a.T * a.H);
  c.d_o = normals(t, a.T * a.H * a.DV);
  c.d_lse = normals(t, a.T * a.H);
  ref_attn_backward(&c.a, c.d_o, c.d_lse, dq, dk, dv, ds);
  check_gradient("dq", attn_loss, &c, q, dq, nq);
  check_gradient("dk", attn_loss, &c, k, dk, nk);
  check_gradient("dv", attn_loss, &c, v, dv, nv);
  if (a.sinks) check_gradient("dsinks", attn_loss, &c, sinks, ds, a.H);
}

static const int32_t cu[] = {0, 5, 5, 16}, cu_keys[] = {0, 9, 10, 22}, offset[] = {4, 1, 0};
#define ATTN .T = 17, .TK = 23, .B = 3, .H = 4, .KH = 2, .D = 4, .DV = 3, .cu = cu
static const double some_sinks[4]; /* only says that there are any */

Test(ref, swa_gradients) {
  ot *t = ot_begin(1);
  attn_gradients(t, (ref_attn){ATTN, .kind = REF_SWA, .window_left = -1});
  attn_gradients(
      t, (ref_attn){ATTN, .kind = REF_SWA, .window_left = 3, .sinks = some_sinks, .softcap = 1.5});
  attn_gradients(
      t, (ref_attn){ATTN, .kind = REF_SWA, .window_left = 2, .cu_k = cu_keys, .q_offset = offset});
  ot_end(t);
}

Test(ref, cmp_gradients) {
  ot *t = ot_begin(2);
  attn_gradients(t, (ref_attn){ATTN, .kind = REF_CMP, .kernel = 4, .stride = 2, .scale = 0.7});
  attn_gradients(t, (ref_attn){ATTN, .kind = REF_CMP, .kernel = 4, .stride = 2, .cu_k = cu_keys,
                               .q_offset = offset, .sinks = some_sinks});
  ot_end(t);
}

Test(ref, slc_gradients) {
  ot *t = ot_begin(3);
  int32_t *idx = ot_ints(t, 17 * 2 * 3);
  for (int64_t r = 0; r < 34; r++) { /* short rows, rows of −1, out of range, doubled */
    idx[r * 3] = (int32_t)ot_below(t, 3) - 1;
    idx[r * 3 + 1] = idx[r * 3] + (int32_t)ot_below(t, 2);
    idx[r * 3 + 2] = r % 5 == 0 ? 77 : -1;
  }
  attn_gradients(t, (ref_attn){ATTN, .kind = REF_SLC, .block = 4, .top_n = 3, .idx = idx});
  ot_end(t);
}

/* One query and one key: o = v, lse = s; a sink takes its share. */
Test(ref, attention_by_hand) {
  const int32_t one[] = {0, 1};
  double q = 2, k = 3, v = 5, sink = 6, o, lse;
  ref_attn a = {.kind = REF_SWA,
                .T = 1,
                .TK = 1,
                .B = 1,
                .H = 1,
                .KH = 1,
                .D = 1,
                .DV = 1,
                .q = &q,
                .k = &k,
                .v = &v,
                .cu = one,
                .window_left = 0};
  ref_attn_forward(&a, &o, &lse);
  cr_assert(o == 5 && lse == 6);
  a.sinks = &sink;
  ref_attn_forward(&a, &o, &lse);
  cr_assert_float_eq(o, 2.5, 1e-15);
  cr_assert_float_eq(lse, 6 + log(2), 1e-15);
  a.kind = REF_CMP;
  a.kernel = a.stride = 2; /* no block is complete */
  ref_attn_forward(&a, &o, &lse);
  cr_assert(o == 0 && lse == 6);
  a.sinks = NULL;
  ref_attn_forward(&a, &o, &lse);
  cr_assert(o == 0 && lse == -INFINITY);
}

/* Three definitions that meet: blocks of one token, all blocks selected, no window. */
Test(ref, attention_kinds_agree) {
  ot *t = ot_begin(4);
  ref_attn a = {ATTN,        .kind = REF_SWA, .window_left = -1, .kernel = 1,
                .stride = 1, .block = 4,      .top_n = 3};
  int32_t *idx = ot_ints(t, 17 * 2 * 3);
  double *x = normals(t, 17 * 4 * 4), *y = normals(t, 23 * 2 * 4), *z = normals(t, 23 * 2 * 3);
  double *o[3], *lse[3];
  for (int64_t i = 0; i < 17 * 2 * 3; i++) idx[i] = (int32_t)(i % 3);
  a.q = x;
  a.k = y;
  a.v = z;
  a.idx = idx;
  for (int n = 0; n < 3; n++) {
    const ref_kind kind[] = {REF_SWA, REF_CMP, REF_SLC};
    o[n] = ot_doubles(t, 17 * 4 * 3);
    lse[n] = ot_doubles(t, 17 * 4);
    a.kind = kind[n];
    ref_attn_forward(&a, o[n], lse[n]);
    for (int i = 0; i < 17 * 4 * 3; i++) cr_assert_float_eq(o[n][i], o[0][i], 1e-14);
    for (int i = 0; i < 17 * 4; i++) cr_assert_float_eq(lse[n][i], lse[0][i], 1e-14);
  }
  ot_end(t);
}

/* Branches over disjoint keys (the last three keys, the rest) merge into attention over all
 * keys. */
Test(ref, merge_of_disjoint_keys) {
  ot *t = ot_begin(5);
  enum { L = 12, D = 4 };
  const int32_t seq[] = {0, L};
  ref_attn a = {.kind = REF_SWA,
                .T = L,
                .TK = L,
                .B = 1,
                .H = 1,
                .KH = 1,
                .D = D,
                .DV = D,
                .cu = seq,
                .window_left = -1,
                .block = 1,
                .top_n = L};
  int32_t *idx = ot_ints(t, L * L);
  double *o[3], *lse[3], *out = ot_doubles(t, L * D), *out_lse = ot_doubles(t, L);
  for (int n = 0; n < 3; n++) {
    o[n] = ot_doubles(t, L * D);
    lse[n] = ot_doubles(t, L);
  }
  a.q = normals(t, L * D);
  a.k = normals(t, L * D);
  a.v = normals(t, L * D);
  ref_attn_forward(&a, o[0], lse[0]);
  a.window_left = 2;
  ref_attn_forward(&a, o[1], lse[1]);
  for (int i = 0; i < L; i++)
    for (int n = 0; n < L; n++) idx[i * L + n] = n < i - 2 ? n : -1;
  a.kind = REF_SLC;
  a.idx = idx;
  ref_attn_forward(&a, o[2], lse[2]);
  ref_merge_forward(L, L, 1, D, 2, (const double *const *)&o[1], (const double *const *)&lse[1],
                    out, out_lse);
  for (int i = 0; i < L * D; i++) cr_assert_float_eq(out[i], o[0][i], 1e-14);
  for (int i = 0; i < L; i++) cr_assert_float_eq(out_lse[i], lse[0][i], 1e-14);
  ot_end(t);
}

/* ---- compress ---- */

struct compress_case {
  ref_compress a;
  double *y, *dy;
};
static double compress_loss(void *user) {
  struct compress_case *c = user;
  ref_compress_forward(&c->a, c->y);
  return dot(c->y, c->dy, c->a.T / c->a.stride * c->a.KH * c->a.D);
}

Test(ref, compress_gradients) {
  ot *t = ot_begin(6);
  for (ref_method m = REF_MEAN; m <= REF_SIGMOID_MUL; m++) {
    struct compress_case c = {
        .a = {.method = m, .T = 17, .B = 3, .KH = 2, .D = 3, .kernel = 4, .stride = 2, .cu = cu}};
    double *x = normals(t, 17 * 2 * 3), *w = normals(t, 6 * 12), *dx = ot_doubles(t, 17 * 2 * 3);
    double *dw = ot_doubles(t, 6 * 12);
    c.a.x = x;
    c.a.w = w;
    c.y = ot_doubles(t, 8 * 2 * 3);
    c.dy = normals(t, 8 * 2 * 3);
    ref_compress_backward(&c.a, c.dy, dx, dw);
    check_gradient("dx", compress_loss, &c, x, dx, 17 * 2 * 3);
    if (m != REF_MEAN)
      check_gradient("dw", compress_loss, &c, w, dw, (m == REF_LINEAR ? 3 : 6) * 12);
  }
  ot_end(t);
}

Test(ref, compress_by_hand) {
  const int32_t starts[] = {0, 3, 8};
  double x[8] = {1, 2, 3, 4, 5, 6, 7, 8}, y[4], w[8] = {0, 0, 0, 1, 1, 0, 0, 0};
  ref_compress a = {.method = REF_MEAN,
                    .T = 8,
                    .B = 2,
                    .KH = 1,
                    .D = 1,
                    .kernel = 4,
                    .stride = 2,
                    .x = x,
                    .w = w,
                    .cu = starts};
  /* 3 tokens: no block; 5 tokens: one block, in row floor(3 / 2) = 1 */
  ref_compress_forward(&a, y);
  cr_assert(y[0] == 0 && y[1] == 5.5 && y[2] == 0 && y[3] == 0);
  a.method = REF_SIGMOID_MUL; /* a = last token, b = first */
  ref_compress_forward(&a, y);
  cr_assert_float_eq(y[1], 4 / (1 + exp(-7)), 1e-15);
  a.method = REF_SWIGLU;
  ref_compress_forward(&a, y);
  cr_assert_float_eq(y[1], 4 * 7 / (1 + exp(-7)), 1e-14);
  cr_assert(ref_blocks(3, 4, 2) == 0 && ref_blocks(4, 4, 2) == 1 && ref_blocks(6, 4, 2) == 2);
}

/* ---- topk ---- */

Test(ref, topk_by_hand) {
  /* One sequence of 10 tokens, D = 1, selection blocks of 2, compressed blocks
   * likewise; keys rise to block 1. */
  const int32_t seq[] = {0, 10};
  double q[10], k[5] = {1, 4, 3, 2, 0}, lse[10], scores[50], logit;
  int32_t idx[40];
  ref_topk a = {.T = 10,
                .TK = 5,
                .B = 1,
                .H = 1,
                .KH = 1,
                .D = 1,
                .q = q,
                .k = k,
                .lse = lse,
                .cu = seq,
                .kernel = 2,
                .stride = 2,
                .block = 2,
                .top_n = 4,
                .init = 1,
                .local = 1};
  for (int i = 0; i < 10; i++) {
    q[i] = 1;
    lse[i] = 0;
  }
  ref_topk_forward(&a, idx, scores, 5, &logit);
  const int32_t first[] = {0, -1, -1, -1}, middle[] = {0, 1, 2, -1}, last[] = {0, 1, 2, 4};
  cr_assert(memcmp(idx, first, 16) == 0);
  cr_assert(memcmp(idx + 4 * 4, middle, 16) == 0);
  cr_assert(memcmp(idx + 9 * 4, last, 16) == 0);
  cr_assert_float_eq(scores[9 * 5 + 1], exp(4), 1e-12);
  cr_assert(scores[9 * 5] == INFINITY && scores[9 * 5 + 4] == INFINITY && isnan(scores[1]));
  cr_assert(logit == 4);
  for (int i = 0; i < 5; i++) k[i] = 1; /* equal scores: lower index */
  a.init = 0;
  ref_topk_forward(&a, idx, NULL, 0, NULL);
  const int32_t equal[] = {0, 1, 2, 4};
  cr_assert(memcmp(idx + 9 * 4, equal, 16) == 0);
  k[1] = NAN; /* ranks last */
  ref_topk_forward(&a, idx, NULL, 0, NULL);
  const int32_t without[] = {0, 2, 3, 4};
  cr_assert(memcmp(idx + 9 * 4, without, 16) == 0);
  k[1] = 1;
  a.dot = true;
  k[3] = 9;
  a.top_n = 2;
  ref_topk_forward(&a, idx, NULL, 0, NULL);
  cr_assert(idx[9 * 2] == 3 && idx[9 * 2 + 1] == 4);
}

/* Overlapping compressed blocks count towards each selection block by the tokens they share with
 * it. */
Test(ref, topk_overlap_weights) {
  const int32_t seq[] = {0, 8};
  double q[8] = {0}, k[4] = {0}, lse[8] = {0}, scores[8 * 2];
  int32_t idx[8];
  ref_topk a = {.T = 8,
                .TK = 4,
                .B = 1,
                .H = 1,
                .KH = 1,
                .D = 1,
                .q = q,
                .k = k,
                .lse = lse,
                .cu = seq,
                .kernel = 4,
                .stride = 2,
                .block = 4,
                .top_n = 1,
                .init = 0,
                .local = 1};
  /* token 7 sees blocks [0,4), [2,6), [4,8), each with p = 1: block 0 shares 4 + 2
   * tokens, in units of the stride */
  ref_topk_forward(&a, idx, scores, 2, NULL);
  cr_assert_float_eq(scores[7 * 2], 3, 1e-15);
  cr_assert(idx[7] == 1); /* forced */
}

/* ---- the rest ---- */

struct branch_case {
  int64_t T, rows, H, D;
  int n;
  ref_act act;
  double *o[3], *lse[3], *gate, *out, *out_lse, *dout, *dlse;
};
static double combine_loss(void *user) {
  struct branch_case *c = user;
  ref_combine_forward(c->act, c->T, c->rows, c->H, c->D, c->n, (const double *const *)c->o, c->gate,
                      c->out);
  return dot(c->out, c->dout, c->T * c->H * c->D);
}
static double merge_loss(void *user) {
  struct branch_case *c = user;
  ref_merge_forward(c->T, c->rows, c->H, c->D, c->n, (const double *const *)c->o,
                    (const double *const *)c->lse, c->out, c->out_lse);
  return dot(c->out, c->dout, c->T * c->H * c->D) + dot(c->out_lse, c->dlse, c->T * c->H);
}

static struct branch_case branches(ot *t) {
  struct branch_case c = {.T = 5, .rows = 4, .H = 2, .D = 3, .n = 3};
  for (int m = 0; m < 3; m++) {
    c.o[m] = normals(t, 5 * 2 * 3);
    c.lse[m] = normals(t, 5 * 2);
  }
  c.gate = normals(t, 5 * 2 * 3);
  c.out = ot_doubles(t, 5 * 2 * 3);
  c.out_lse = ot_doubles(t, 5 * 2);
  c.dout = normals(t, 5 * 2 * 3);
  c.dlse = normals(t, 5 * 2);
  return c;
}

Test(ref, combine_gradients) {
  ot *t = ot_begin(7);
  for (ref_act act = REF_SIGMOID; act <= REF_NONE; act++) {
    struct branch_case c = branches(t);
    double *d_o[3], *dgate = ot_doubles(t, 5 * 2 * 3);
    c.act = act;
    for (int m = 0; m < 3; m++) d_o[m] = ot_doubles(t, 5 * 2 * 3);
    ref_combine_backward(act, c.T, c.rows, c.H, c.D, c.n, (const double *const *)c.o, c.gate,
                         c.dout, d_o, dgate);
    for (int m = 0; m < 3; m++) check_gradient("d_o", combine_loss, &c, c.o[m], d_o[m], 5 * 2 * 3);
    check_gradient("dgate", combine_loss, &c, c.gate, dgate, 5 * 2 * 3);
  }
  ot_end(t);
}

Test(ref, merge_gradients) {
  ot *t = ot_begin(8);
  struct branch_case c = branches(t);
  double *d_o[3], *d_lse[3];
  c.lse[1][3] = -INFINITY; /* a branch that saw nothing; a row that saw nothing */
  for (int m = 0; m < 3; m++) {
    c.lse[m][5] = -INFINITY;
    d_o[m] = ot_doubles(t, 5 * 2 * 3);
    d_lse[m] = ot_doubles(t, 5 * 2);
  }
  ref_merge_backward(c.T, c.rows, c.H, c.D, c.n, (const double *const *)c.o,
                     (const double *const *)c.lse, c.dout, c.dlse, d_o, d_lse);
  for (int m = 0; m < 3; m++) {
    check_gradient("d_o", merge_loss, &c, c.o[m], d_o[m], 5 * 2 * 3);
    for (int64_t i = 0; i < 5 * 2; i++)
      if (isfinite(c.lse[m][i]))
        check_gradient("d_lse", merge_loss, &c, &c.lse[m][i], &d_lse[m][i], 1);
  }
  ot_end(t);
}

struct rows_case {
  int64_t T, rows, in, out;
  double *x, *w, *b, *y, *dy;
  int what;
};
static double rows_loss(void *user) {
  struct rows_case *c = user;
  static const int32_t seqs[] = {0, 2, 5};
  switch (c->what) {
  case 0: ref_linear_forward(c->T, c->rows, c->in, c->out, c->x, c->w, c->b, c->y); break;
  case 1: ref_rmsnorm_forward(c->T, c->rows, c->in, 1e-3, c->x, c->w, c->y); break;
  case 2: ref_rope(c->T, 2, 1, c->in, 100, seqs, NULL, false, c->x, c->y); break;
  case 3: ref_silu(c->T * c->in, c->rows * c->in, c->x, c->y); break;
  case 4: ref_mul(c->T * c->in, c->rows * c->in, c->x, c->w, c->y); break;
  case 6: ref_sigmoid(c->T * c->in, c->rows * c->in, c->x, c->y); break;
  case 7: ref_layernorm_forward(c->T, c->rows, c->in, 1e-3, c->x, c->w, c->w + c->in, c->y); break;
  case 5: {
    double yarn[2], length = ref_yarn(4, 100, 8, 60, 8, 0.5, 0, true, yarn);
    ref_rope_by(c->T, 2, 1, c->in, yarn, length, true, seqs, NULL, false, c->x, c->y);
    break;
  }
  }
  return dot(c->y, c->dy, c->T * (c->what == 0 ? c->out : c->in));
}

Test(ref, rowwise_gradients) {
  ot *t = ot_begin(9);
  static const int32_t seqs[] = {0, 2, 5};
  struct rows_case c = {.T = 6, .rows = 5, .in = 4, .out = 3};
  c.x = normals(t, 24);
  c.w = normals(t, 24);
  c.b = normals(t, 3);
  c.y = ot_doubles(t, 24);
  c.dy = normals(t, 24);
  double *dx = ot_doubles(t, 24), *dw = ot_doubles(t, 24), *db = ot_doubles(t, 3);
  double *db4 = ot_doubles(t, 4);
  ref_linear_backward(6, 5, 4, 3, c.x, c.w, c.dy, dx, dw, db);
  check_gradient("linear dx", rows_loss, &c, c.x, dx, 24);
  check_gradient("linear dw", rows_loss, &c, c.w, dw, 12);
  check_gradient("linear db", rows_loss, &c, c.b, db, 3);
  c.what = 1;
  ref_rmsnorm_backward(6, 5, 4, 1e-3, c.x, c.w, c.dy, dx, dw);
  check_gradient("rmsnorm dx", rows_loss, &c, c.x, dx, 24);
  check_gradient("rmsnorm dw", rows_loss, &c, c.w, dw, 4);
  c.what = 2;
  ref_rope(6, 2, 1, 4, 100, seqs, NULL, true, c.dy, dx);
  check_gradient("rope dx", rows_loss, &c, c.x, dx, 24);
  double yarn[2], length = ref_yarn(4, 100, 8, 60, 8, 0.5, 0, true, yarn);
  c.what = 5;
  ref_rope_by(6, 2, 1, 4, yarn, length, true, seqs, NULL, true, c.dy, dx);
  check_gradient("yarn dx", rows_loss, &c, c.x, dx, 24);
  c.what = 3;
  ref_silu_backward(24, 20, c.x, c.dy, dx);
  check_gradient("silu dx", rows_loss, &c, c.x, dx, 24);
  c.what = 7;
  ref_layernorm_backward(6, 5, 4, 1e-3, c.x, c.w, c.dy, dx, dw, db4);
  check_gradient("layernorm dx", rows_loss, &c, c.x, dx, 24);
  check_gradient("layernorm dw", rows_loss, &c, c.w, dw, 4);
  check_gradient("layernorm db", rows_loss, &c, c.w + 4, db4, 4);
  c.what = 6;
  ref_sigmoid_backward(24, 20, c.x, c.dy, dx);
  check_gradient("sigmoid dx", rows_loss, &c, c.x, dx, 24);
  c.what = 4;
  ref_mul_backward(24, 20, c.x, c.w, c.dy, dx, dw);
  check_gradient("mul da", rows_loss, &c, c.x, dx, 24);
  check_gradient("mul db", rows_loss, &c, c.w, dw, 24);
  ot_end(t);
}

Test(ref, rope_by_hand) {
  const int32_t seqs[] = {0, 1, 3}, off[] = {0, 7};
  double x[12] = {1, 2, 3, 4, 1, 0, 0, 0, 0, 1, 0, 0}, y[12];
  ref_rope(3, 2, 1, 4, 10000, seqs, off, false, x, y);
  cr_assert(y[0] == 1 && y[3] == 4); /* position 0 */
  cr_assert_float_eq(y[4], cos(7), 1e-15);
  cr_assert_float_eq(y[6], sin(7), 1e-15);
  cr_assert_float_eq(y[9], cos(8 * 0.01), 1e-15);
  cr_assert_float_eq(y[11], sin(8 * 0.01), 1e-15);
}

/* gpt-oss: head_dim 64, rope_theta 150000, factor 32, 4096 positions, betas 32 and 1; frequencies
   by the formulas of transformers, in another language. */
Test(ref, yarn_of_gpt_oss) {
  double angle[32];
  cr_assert_float_eq(ref_yarn(64, 150000, 32, 4096, 32, 1, 0, false, angle), 1.3465735902799727,
                     1e-15);
  cr_assert_float_eq(angle[8], 0.050813274815461475, 1e-15); /* as it was */
  cr_assert_float_eq(angle[9], 0.03170569618466377, 1e-15);
  cr_assert_float_eq(angle[12], 0.006794959489732219, 1e-15);
  cr_assert_float_eq(angle[18], 3.8308812373753384e-05, 1e-16); /* by the whole factor */
  ref_yarn(64, 150000, 32, 4096, 32, 1, 0, true, angle);
  cr_assert_float_eq(angle[9], 0.031620752275346484, 1e-15);
  cr_assert_float_eq(angle[12], 0.007015713910504388, 1e-15);
}

Test(ref, concat_and_dead_rows) {
  const double a[] = {1, 2, 3, 4}, b[] = {5, 6};
  const double *x[] = {a, b};
  const int64_t width[] = {2, 1};
  double y[6];
  ref_concat(2, 1, 2, width, x, y);
  cr_assert(y[0] == 1 && y[1] == 2 && y[2] == 5 && y[3] == 0 && y[5] == 0);
}

/* ---- the harness' own conversions, against the library's ---- */

Test(harness, rounding) {
  ot *t = ot_begin(10);
  enum { N = 20000 };
  float *x = ot_alloc(t, N * sizeof *x);
  const rg_dtype types[] = {RG_F32, RG_F16, RG_BF16};
  for (int i = 0; i < N; i++) {
    uint32_t u = (uint32_t)ot_random(t);
    memcpy(&x[i], &u, 4);
    if (i % 2) x[i] = (float)ldexp(ot_normal(t), (int)ot_below(t, 40) - 28);
    if (isnan(x[i])) x[i] = 0;
  }
  for (int k = 0; k < 3; k++) {
    ot_tensor *a = OT_NEW(t, types[k], N), *b = OT_NEW(t, types[k], N);
    for (int i = 0; i < N; i++) {
      double r = ot_round(types[k], x[i]);
      ot_set(&(ot_tensor){.arg = {.data = (char *)a->arg.data + (size_t)i * rg_dtype_size(types[k]),
                                  .dtype = types[k],
                                  .rank = 1,
                                  .dim = {1},
                                  .stride = {1}},
                          .n = 1},
             &r);
      cr_assert(ot_element(a, i) == r, "%d: %a reads back as %a", i, r, ot_element(a, i));
    }
    rgi_store(b->arg.data, types[k], x, N);
    cr_assert(ot_same_bits(a, b), "%s", rg_dtype_name(types[k]));
  }
  ot_end(t);
}
