/* tests/unit/test_num_harness.c: the op harness finds what it is there to find. A made-up
 * op doubles its input and misbehaves on request; every kind of misbehaviour must be
 * reported, and none where there is none.
 */
#include "../harness/optest.h"
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

enum {
  GOOD,
  UNWRITTEN,
  OUTSIDE,
  HOLE,
  INPUT,
  WORKSPACE,
  DEAD_ROW,
  THREAD,
  OLD_CONTENTS,
  STATUS,
  NEEDS_DATA
};

typedef struct job {
  const rg_call *c;
  int mode;
} job;

static float *at(const rg_arg *a, int64_t row, int64_t column) {
  return (float *)a->data + row * a->stride[0] + column;
}

static void double_row(void *user, int64_t row, int thread) {
  (void)thread;
  const job *j = user;
  const rg_arg *x = rg_in(j->c, 0), *y = rg_out(j->c, 0);
  float *scratch = j->c->workspace;
  int64_t live = ((const int32_t *)rg_in(j->c, 1)->data)[1];
  for (int64_t k = 0; k < x->dim[1]; k++) {
    bool last = row == x->dim[0] - 1 && k == x->dim[1] - 1;
    if (last && j->mode == UNWRITTEN) continue;
    float v = row < live ? 2 * *at(x, row, k) : j->mode == DEAD_ROW ? 1 : 0;
    if (j->mode == THREAD && row == 0 && k == 0) v = (float)j->c->threads;
    if (j->mode == OLD_CONTENTS && row == 0 && k == 0) memcpy(&v, scratch, 4);
    *at(y, row, k) = v;
  }
}

static rg_status run(const rg_call *c) {
  const rg_arg *x = rg_in(c, 0), *y = rg_out(c, 0);
  job j = {c, (int)c->attr[0].i};
  if (j.mode == STATUS) return rg_op_fail(c->error, RG_E_VALUE, c, "as asked");
  c->parallel(c->pool, x->dim[0], double_row, &j);
  if (j.mode == OUTSIDE) *at(y, y->dim[0], 0) = 1;
  if (j.mode == HOLE) *at(y, 0, y->dim[1]) = 1;
  if (j.mode == INPUT) *at(x, 0, 0) += 1;
  if (j.mode == WORKSPACE) ((char *)c->workspace)[64] = 0;
  return RG_OK;
}

static size_t workspace(const rg_call *c) {
  return c->attr[0].i == NEEDS_DATA && rg_in(c, 0)->data ? 1 << 20 : 64;
}

static const rg_port in[] = {
    {"x", "T,D", RG_PORT_ROWS, RG_D(RG_F32), 0, -1, ""},
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, ""},
};
static const rg_port out[] = {{"y", "T,D", RG_PORT_ROWS, RG_D(RG_F32), 0, -1, ""}};
static const rg_attr attrs[] = {{"mode", RG_ATTR_INT, false, 0, 100, GOOD, NULL, ""}};
static const rg_op op = {.abi = RG_OP_ABI,
                         .name = "double",
                         .in = in,
                         .nin = 2,
                         .out = out,
                         .nout = 1,
                         .attrs = attrs,
                         .nattr = 1,
                         .workspace = workspace,
                         .run_cpu = run};

static ot_call *make(ot *t, int mode) {
  static const int64_t dim[] = {6, 5}, pad[] = {3, 0};
  static const int32_t cu[] = {0, 4};
  ot_tensor *x = ot_new(t, RG_F32, 2, dim, pad), *y = ot_new(t, RG_F32, 2, dim, pad),
            *s = OT_NEW(t, RG_I32, 2);
  ot_call *c = ot_call_new(t, &op);
  ot_fill_normal(t, x, 1);
  ot_poison_rows(x, 4, 6);
  ot_set_ints(s, cu);
  ot_in(c, "x", x);
  ot_in(c, "cu_seqlens", s);
  ot_out(c, "y", y);
  ot_int(c, "mode", mode);
  return c;
}

static void expect(int mode, const char *part) {
  ot *t = ot_begin(1);
  const char *text = ot_run_repeated(make(t, mode), 3);
  if (part)
    cr_assert(text && strstr(text, part), "mode %d: \"%s\"", mode, text ? text : "nothing found");
  else
    cr_assert_null(text, "mode %d: %s", mode, text);
  ot_end(t);
}

Test(harness, finds_misbehaviour) {
  expect(GOOD, NULL);
  expect(UNWRITTEN, "did not write element 29 of y");
  expect(OUTSIDE, "between or around");
  expect(HOLE, "between or around");
  expect(INPUT, "changed its input x");
  expect(WORKSPACE, "outside its workspace of 64");
  expect(DEAD_ROW, "dead rows");
  expect(THREAD, "other bits in y");
  expect(OLD_CONTENTS, "other bits in y");
  expect(STATUS, "as asked");
  expect(NEEDS_DATA, NULL); /* asked without data: 64 bytes it is */
}

Test(harness, finds_mistakes_in_calls) {
  ot *t = ot_begin(2);
  ot_call *c = make(t, GOOD);
  ot_in(c, "nothing", NULL);
  cr_assert(strstr(ot_run(c, 1), "no port nothing") != NULL);
  c = make(t, GOOD);
  ot_float(c, "weight", 1);
  cr_assert(strstr(ot_run(c, 1), "no attribute weight") != NULL);
  c = make(t, GOOD);
  ot_rebind_in(c, "cu_seqlens", NULL);
  cr_assert(strstr(ot_run(c, 1), "nothing bound to cu_seqlens") != NULL);
  ot_end(t);
}

Test(harness, measures) {
  ot *t = ot_begin(3);
  ot_tensor *x = OT_NEW(t, RG_F32, 4);
  double a[] = {1, 2, -INFINITY, 4}, b[] = {1, 2, -INFINITY, 5}, zero[4] = {0},
         tiny[] = {1e-9, 0, 0, 0};
  ot_set(x, a);
  cr_assert(ot_relrms(x, a, 0) == 0 && ot_lse_error(x, a) == 0);
  cr_assert_float_eq(ot_relrms(x, b, 0), 1 / sqrt(30), 1e-12);
  cr_assert_float_eq(ot_lse_error(x, b), 0.2, 1e-12);
  b[2] = 0;
  cr_assert(ot_relrms(x, b, 0) == INFINITY && ot_lse_error(x, b) == INFINITY);
  ot_set(x, tiny);
  cr_assert(ot_relrms(x, zero, 1e-3) < 1e-6 && ot_relrms(x, zero, 1e-12) > 100);
  tiny[1] = NAN;
  ot_set(x, tiny);
  cr_assert(ot_relrms(x, zero, 1) == INFINITY);
  ot_end(t);
}

Test(harness, near_ties_of_topk) {
  ot *t = ot_begin(4);
  ot_tensor *idx = OT_NEW(t, RG_I32, 1, 1, 3);
  const int32_t ref[] = {0, 2, 4}, swapped[] = {0, 3, 4}, falling[] = {2, 0, 4}, few[] = {0, 2, -1},
                forced[] = {1, 2, 3};
  double scores[] = {INFINITY, 1, 5, 5 - 1e-6, INFINITY, NAN};
  ot_set_ints(idx, ref);
  cr_assert_null(ot_check_topk(t, idx, 1, ref, scores, 6, 1, 0, 1));
  ot_set_ints(idx, swapped); /* a near-tie, but not exact */
  cr_assert_null(ot_check_topk(t, idx, 1, ref, scores, 6, 1, 0, 0.5));
  cr_assert(strstr(ot_check_topk(t, idx, 1, ref, scores, 6, 1, 0, 0.99), "agree") != NULL);
  scores[3] = 4.9;
  cr_assert(strstr(ot_check_topk(t, idx, 1, ref, scores, 6, 1, 0, 0.5), "left out") != NULL);
  ot_set_ints(idx, falling);
  cr_assert(strstr(ot_check_topk(t, idx, 1, ref, scores, 6, 1, 0, 0), "ascend") != NULL);
  ot_set_ints(idx, few);
  cr_assert(strstr(ot_check_topk(t, idx, 1, ref, scores, 6, 1, 0, 0), "number of indices") != NULL);
  ot_set_ints(idx, forced);
  cr_assert(strstr(ot_check_topk(t, idx, 1, ref, scores, 6, 1, 0, 0), "forced") != NULL);
  ot_end(t);
}
