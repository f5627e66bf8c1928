/* tests/unit/test_take.c: embed, gather_rows and argmax against what anyone would write; what
 * they make of numbers that are no rows, of dead rows, NaN and ties. */
#include "../harness/num.h"
#include "run_util.h"
#include <math.h>

static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};

Test(take, embed_and_gather) {
  for (int k = 0; k < 12; k++) {
    ot *t = ot_begin((uint64_t)(40 + k));
    const rg_dtype type = types[k % 3];
    const bool embed = k < 6, strided = k & 1;
    enum { V = 37, T = 29, LIVE = 23 };
    const int64_t x_dim[] = {V, 3, 5}, y_dim[] = {T, 3, 5}, w_dim[] = {V, 17}, e_dim[] = {T, 17};
    const int64_t pad[] = {7, 2, 0}, pad2[] = {9, 0};
    ot_tensor *x = embed ? ot_new(t, type, 2, w_dim, strided ? pad2 : NULL)
                         : ot_new(t, type, 3, x_dim, strided ? pad : NULL);
    ot_tensor *y = embed ? ot_new(t, type, 2, e_dim, strided ? pad2 : NULL)
                         : ot_new(t, type, 3, y_dim, strided ? pad : NULL);
    const int64_t row = embed ? 17 : 15, live = embed ? LIVE : T;
    int32_t rows[T];
    for (int i = 0; i < T; i++) rows[i] = (int32_t)ot_below(t, V);
    if (!embed) rows[4] = rows[T - 1] = -1;
    if (embed) rows[LIVE] = INT32_MAX; /* dead, so nobody looks */
    ot_fill_normal(t, x, 1);
    ot_call *c = ot_call_new(t, embed ? &rgi_op_embed : &rgi_op_gather_rows);
    ot_in(c, embed ? "w" : "x", x);
    ot_in(c, embed ? "tokens" : "rows", num_ints(t, T, rows));
    if (embed) ot_in(c, "cu_seqlens", num_ints(t, 3, (const int32_t[]){0, 11, LIVE}));
    ot_out(c, "y", y);
    OT_OK(ot_run_repeated(c, 2));
    for (int64_t i = 0; i < T * row; i++) {
      const int32_t from = i / row < live ? rows[i / row] : -1;
      const double want = from < 0 ? 0 : ot_element(x, from * row + i % row);
      cr_assert_eq(ot_element(y, i), want, "case %d, element %lld", k, (long long)i);
    }
    ot_end(t);
  }
}

Test(take, argmax) {
  for (int k = 0; k < 6; k++) {
    ot *t = ot_begin((uint64_t)(60 + k));
    enum { T = 9, LIVE = 8, V = 601 };
    const int64_t dim[] = {T, V}, pad[] = {5, 0};
    ot_tensor *x = ot_new(t, types[k % 3], 2, dim, k < 3 ? NULL : pad),
              *y = ot_new(t, RG_I32, 1, dim, NULL);
    double *v = ot_doubles(t, T * V);
    int32_t want[T] = {0, V - 1, 255, 256, -1, 3, 7, 0, 0};
    for (int i = 0; i < T * V; i++) v[i] = -1 - ot_uniform(t);
    v[0] = 5;
    v[V + V - 1] = 5;
    v[2 * V + 255] = v[2 * V + 256] = v[2 * V + 600] = 2; /* the first of equals */
    v[3 * V + 256] = 0;
    for (int i = 0; i < V; i++) v[4 * V + i] = NAN;
    for (int i = 0; i < V; i++) v[5 * V + i] = i < 3 ? NAN : -INFINITY;
    for (int i = 0; i < V; i++) v[6 * V + i] = i == 7 ? -30000 : NAN;
    v[7 * V] = INFINITY;
    v[7 * V + 9] = NAN;
    v[8 * V + 1] = 9; /* dead */
    ot_set(x, v);
    ot_call *c = ot_call_new(t, &rgi_op_argmax);
    ot_in(c, "x", x);
    ot_in(c, "cu_seqlens", num_ints(t, 3, (const int32_t[]){0, 3, LIVE}));
    ot_out(c, "y", y);
    OT_OK(ot_run_repeated(c, 2));
    const int32_t *got = ot_get_ints(t, y);
    for (int i = 0; i < T; i++) cr_assert_eq(got[i], want[i], "row %d: %d", i, got[i]);
    ot_end(t);
  }
}

/* A token that is none makes zeros, its neighbours are served, and the run says so at its end. */
Test(take, a_wrong_number_harms_its_row_alone) {
  static const char text[] =
      "{\"regraph\": 1, \"inputs\": {\"w\": {\"shape\": [5, 4], \"dtype\": \"f32\"},\n"
      "  \"tokens\": {\"shape\": [\"T\"], \"dtype\": \"i32\"}, \"last\": {\"shape\": [\"R\"], "
      "\"dtype\": \"i32\"}},\n"
      " \"nodes\": [{\"name\": \"embed\", \"op\": \"embed\", \"in\": {\"w\": \"w\", \"tokens\": "
      "\"tokens\"}, \"out\": {\"y\": \"x\"}},\n"
      "  {\"name\": \"ends\", \"op\": \"gather_rows\", \"in\": {\"x\": \"x\", \"rows\": \"last\"}, "
      "\"out\": {\"y\": \"ends\"}},\n"
      "  {\"name\": \"next\", \"op\": \"argmax\", \"in\": {\"x\": \"ends\"}, \"out\": {\"y\": "
      "\"next\"}}],\n"
      " \"outputs\": {\"x\": \"x\", \"next\": \"next\"}}";
  rg_error e = {0};
  rg_context *ctx;
  rg_plan *plan;
  rg_session *s;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_spec *spec = load_spec(ctx, text);
  const rg_binding set[] = {{"T", 4, NULL}, {"R", 3, NULL}};
  rg_plan_options o = {.set = set, .nset = 2, .device = test_device()};
  buffers io;
  CR_OK(rg_plan_create(spec, NULL, &o, &plan, &e), &e);
  CR_OK(rg_session_create(plan, &(rg_session_options){.debug_poison = true}, &s, &e), &e);
  make_buffers(plan, 1, 0, NULL, &io);
  float *w = buffer(&io, RG_INPUT, "w");
  const float *x = buffer(&io, RG_OUTPUT, "x");
  int32_t *tokens = buffer(&io, RG_INPUT, "tokens"), *last = buffer(&io, RG_INPUT, "last");
  const int32_t *next = buffer(&io, RG_OUTPUT, "next");
  for (int i = 0; i < 20; i++) w[i] = (float)(i / 4 * 10 + (i + i / 4) % 4 + 1);
  memcpy(tokens, (const int32_t[]){3, 1, 5, 2}, 4 * sizeof *tokens);
  memcpy(last, (const int32_t[]){0, -1, 3}, 3 * sizeof *last);
  bind_all(s, &io);
  for (int bad = 1; bad >= 0; bad--) {
    tokens[2] = bad ? 5 : 4;
    if (bad)
      FAILS(try_forward(s, &io, &e), RG_E_DATA, "tokens[2] is 5; expected 0 to 4");
    else
      CR_OK(try_forward(s, &io, &e), &e);
    for (int i = 0; i < 16; i++)
      cr_assert_eq(x[i], bad && i / 4 == 2 ? 0 : w[tokens[i / 4] * 4 + i % 4]);
    cr_assert_eq(next[0], 0);
    cr_assert_eq(next[1], 0);
    cr_assert_eq(next[2], 1);
  }
  last[1] = -2;
  FAILS(try_forward(s, &io, &e), RG_E_DATA, "rows[1] is -2");
  free_buffers(&io);
  rg_session_destroy(s);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}
