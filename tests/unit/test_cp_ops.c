/* tests/unit/test_cp_ops.c: the ops that communicate, written by hand in a spec: what each rank
 * gets, forward and backward, against loops over all ranks' arrays; wrong uses refused. */
#include "ranks_util.h"

/* One node `op` on x [rows, 3, 2], perhaps with an order; outputs as the node makes them. */
typedef struct kase {
  const char *op, *attrs, *out, *outputs;
  int rows;   /* of x, on each rank */
  int slots;  /* chunks of a rank */
  bool order; /* mode 2's */
  bool lists; /* x is a list of `slots` */
  const char *dtype;
} kase;

static rg_plan *plan_of(rg_context *ctx, const kase *k, int ranks, rg_error *e) {
  char text[4096], in[256] = "\"x\"", inputs[512] = "";
  size_t n = 0;
  for (int s = 0; s < (k->lists ? k->slots : 1); s++)
    n += (size_t)snprintf(
        inputs + n, sizeof inputs - n,
        "\"x%s\": { \"shape\": [\"R\", 3, 2], \"dtype\": \"%s\", \"grad\": true }, ",
        k->lists ? (s ? "1" : "0") : "", k->dtype ? k->dtype : "f32");
  if (k->lists) snprintf(in, sizeof in, k->slots == 2 ? "[\"x0\", \"x1\"]" : "[\"x0\"]");
  snprintf(
      text, sizeof text,
      "{ \"regraph\": 1, \"params\": { \"W\": %d }, \"inputs\": { %s \"order\": { \"shape\": [%d], "
      "\"dtype\": \"i32\" } },\n \"nodes\": [ { \"name\": \"n\", \"op\": \"%s\", \"in\": { \"x\": "
      "%s%s }, "
      "\"out\": { \"y\": %s }, \"attrs\": { \"ranks\": \"$W\"%s } } ],\n \"outputs\": { %s } }",
      ranks, inputs, ranks * k->slots, k->op, in, k->order ? ", \"order\": \"order\"" : "", k->out,
      k->attrs, k->outputs);
  rg_spec *spec = NULL;
  rg_plan *plan = NULL;
  rg_binding set[] = {{"R", k->rows, NULL}};
  rg_plan_options o = {.set = set, .nset = 1, .device = "cpu", .threads = 1, .pack_seconds = 0.2};
  if (rg_spec_load_text(ctx, text, strlen(text), "spec", NULL, 0, &spec, e) == RG_OK)
    rg_plan_create(spec, NULL, &o, &plan, e);
  rg_spec_destroy(spec);
  return plan;
}

enum { ROW = 6 };
static int64_t place_of(const kase *k, int ranks, int64_t chunk) {
  if (!k->order) return chunk;
  return chunk < ranks ? 2 * chunk : 2 * (2 * ranks - 1 - chunk) + 1;
}

static void set_up(const kase *k, const rg_plan *plan, a_rank *r, int ranks) {
  for (int i = 0; i < ranks; i++) {
    r[i] = (a_rank){.plan = plan, .backward = true, .poison = true, .repeats = 1};
    make_buffers(plan, (uint64_t)(100 + i), 0, NULL, &r[i].b);
    int32_t *order = buffer(&r[i].b, RG_INPUT, "order");
    for (int c = 0; c < ranks * k->slots && k->order; c++)
      order[c] = (int32_t)place_of(k, ranks, c);
  }
}

static rg_plan *planned_and_run(rg_context *ctx, const kase *k, a_rank *r, int ranks) {
  rg_error e = {0};
  rg_plan *plan = plan_of(ctx, k, ranks, &e);
  cr_assert(plan, "%s", e.message);
  set_up(k, plan, r, ranks);
  run_ranks(ctx, r, ranks, 20);
  return plan;
}

static void finish(rg_plan *plan, a_rank *r, int ranks) {
  rg_sizes z;
  rg_plan_sizes(plan, &z);
  cr_assert_gt(z.comm, 0);
  for (int i = 0; i < ranks; i++) {
    cr_assert_eq(r[i].status, RG_OK, "%s", r[i].e.message);
    free_buffers(&r[i].b);
  }
  rg_plan_destroy(plan);
}

static const float *floats(const a_rank *r, rg_role role, const char *name) {
  return buffer(&r->b, role, name);
}

/* Row `row` of chunk c in what ranks have end to end. */
static const float *row_at(const kase *k, const a_rank *r, rg_role role, const char *name,
                           int ranks, int64_t c, int64_t row) {
  const int64_t chunk = k->rows / k->slots, place = place_of(k, ranks, c);
  return floats(&r[place / k->slots], role, name) + (place % k->slots * chunk + row) * ROW;
}

static void same_row(const float *got, const float *want, const char *what) {
  cr_assert_eq(memcmp(got, want, ROW * sizeof *got), 0, "%s: %g, not %g", what, got[0], want[0]);
}

static rg_context *context(void) {
  rg_context *ctx = NULL;
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  return ctx;
}

/* Σ over the ranks, in rank order. */
static void sum_rows(float *sum, const a_rank *r, int ranks, rg_role role, const char *name,
                     int64_t row) {
  for (int j = 0; j < ROW; j++) {
    sum[j] = floats(&r[0], role, name)[row * ROW + j];
    for (int i = 1; i < ranks; i++) sum[j] += floats(&r[i], role, name)[row * ROW + j];
  }
}

/* One column at a time where there is room for no more. */
Test(cp_ops, gathers_and_scattered_sums) {
  rg_context *ctx = context();
  for (int how = 0; how < 3; how++)
    for (int ranks = 1; ranks <= 5; ranks++)
      for (int order = 0; order < 2; order++) {
        const bool gather = how == 0;
        kase k = {.op = gather ? "all_gather" : "reduce_scatter",
                  .attrs = how == 2 ? ", \"room\": 1" : "",
                  .out = "\"y\"",
                  .outputs = "\"y\": \"y\"",
                  .rows = 8,
                  .slots = 2,
                  .order = order};
        const int64_t chunk = k.rows / k.slots;
        kase whole = k;
        whole.rows *= gather ? 1 : ranks;
        a_rank r[MOST_RANKS];
        rg_error e = {0};
        rg_plan *plan = plan_of(ctx, &whole, ranks, &e);
        cr_assert(plan, "%s", e.message);
        set_up(&k, plan, r, ranks);
        run_ranks(ctx, r, ranks, 20);
        const rg_role all_role = gather ? RG_OUTPUT : RG_GRAD_OUT,
                      part_role = gather ? RG_INPUT : RG_GRAD_IN;
        const rg_role term_role = gather ? RG_GRAD_IN : RG_INPUT,
                      sum_role = gather ? RG_GRAD_OUT : RG_OUTPUT;
        const char *all = gather ? "y" : "x", *part = gather ? "x" : "y";
        for (int64_t c = 0; c < 2 * ranks; c++)
          for (int64_t row = 0; row < chunk; row++) {
            float sum[ROW];
            for (int i = 0; i < ranks; i++)
              same_row(floats(&r[i], all_role, all) + (c * chunk + row) * ROW,
                       row_at(&k, r, part_role, part, ranks, c, row), "gathered");
            sum_rows(sum, r, ranks, term_role, all, c * chunk + row);
            same_row(row_at(&k, r, sum_role, part, ranks, c, row), sum, "scattered");
          }
        finish(plan, r, ranks);
      }
  rg_context_destroy(ctx);
}

Test(cp_ops, sums_on_every_rank) {
  rg_context *ctx = context();
  for (int ranks = 1; ranks <= 5; ranks++) {
    kase k = {.op = "all_reduce",
              .attrs = "",
              .out = "\"y\"",
              .outputs = "\"y\": \"y\"",
              .rows = 7,
              .slots = 1};
    a_rank r[MOST_RANKS];
    rg_plan *plan = planned_and_run(ctx, &k, r, ranks);
    for (int64_t row = 0; row < k.rows; row++)
      for (int i = 0; i < ranks; i++) {
        float sum[ROW];
        sum_rows(sum, r, ranks, RG_INPUT, "x", row);
        same_row(floats(&r[i], RG_OUTPUT, "y") + row * ROW, sum, "sum");
        sum_rows(sum, r, ranks, RG_GRAD_IN, "y", row);
        same_row(floats(&r[i], RG_GRAD_OUT, "x") + row * ROW, sum, "sum of gradients");
      }
    finish(plan, r, ranks);
  }
  rg_context_destroy(ctx);
}

/* Terms that travel in bf16 are rounded once each; what a rank has itself, too, so that all get the
 * same. */
Test(cp_ops, terms_in_bf16) {
  rg_context *ctx = context();
  const int ranks = 3;
  kase k = {.op = "all_reduce",
            .attrs = ", \"wire\": \"bf16\"",
            .out = "\"y\"",
            .outputs = "\"y\": \"y\"",
            .rows = 5,
            .slots = 1};
  a_rank r[MOST_RANKS];
  rg_plan *plan = planned_and_run(ctx, &k, r, ranks);
  for (int j = 0; j < k.rows * ROW; j++) {
    float sum = 0;
    uint16_t half;
    for (int i = 0; i < ranks; i++) {
      float term = floats(&r[i], RG_INPUT, "x")[j];
      rg_convert(RG_BF16, &half, RG_F32, &term, 1);
      rg_convert(RG_F32, &term, RG_BF16, &half, 1);
      sum = i ? sum + term : term;
    }
    rg_convert(RG_BF16, &half, RG_F32, &sum, 1);
    rg_convert(RG_F32, &sum, RG_BF16, &half, 1);
    for (int i = 0; i < ranks; i++) cr_assert_eq(floats(&r[i], RG_OUTPUT, "y")[j], sum);
  }
  finish(plan, r, ranks);
  rg_context_destroy(ctx);
}

static void check_halo(rg_context *ctx, int ranks, int slots, bool order, int left, int right) {
  char attrs[64];
  const int64_t chunk = 4, all = (int64_t)ranks * slots, width = left + chunk + right;
  snprintf(attrs, sizeof attrs, ", \"left\": %d, \"right\": %d", left, right);
  kase k = {.op = "halo",
            .attrs = attrs,
            .out = slots == 2 ? "[\"y0\", \"y1\"]" : "[\"y0\"]",
            .outputs = slots == 2 ? "\"y0\": \"y0\", \"y1\": \"y1\"" : "\"y0\": \"y0\"",
            .rows = 4 * slots,
            .slots = slots,
            .order = order};
  a_rank r[MOST_RANKS];
  rg_plan *plan = planned_and_run(ctx, &k, r, ranks);
  static const char *const name[] = {"y0", "y1"};
  for (int64_t c = 0; c < all; c++) {
    const int64_t place = place_of(&k, ranks, c);
    const float *y = floats(&r[place / slots], RG_OUTPUT, name[place % slots]);
    static const float zero[ROW];
    for (int64_t i = 0; i < width; i++) { /* row i is row c·chunk - left + i of all */
      const int64_t at = c * chunk - left + i;
      const bool there = at >= 0 && at < all * chunk;
      same_row(y + i * ROW,
               there ? row_at(&k, r, RG_INPUT, "x", ranks, at / chunk, at % chunk) : zero, "halo");
    }
    for (int64_t row = 0; row < chunk; row++) {
      float sum[ROW];
      bool begun = false;
      for (int64_t from = c - 1; from <= c + 1; from++) {
        const int64_t i = (c - from) * chunk + left + row, p = place_of(&k, ranks, from);
        if (from < 0 || from >= all || i < 0 || i >= width) continue;
        const float *term = floats(&r[p / slots], RG_GRAD_IN, name[p % slots]) + i * ROW;
        for (int j = 0; j < ROW; j++) sum[j] = begun ? sum[j] + term[j] : term[j];
        begun = true;
      }
      same_row(row_at(&k, r, RG_GRAD_OUT, "x", ranks, c, row), sum, "gradient of halo");
    }
  }
  if (left + right == 0) {
    for (int i = 0; i < ranks; i++) free_buffers(&r[i].b);
    rg_plan_destroy(plan);
  } else {
    finish(plan, r, ranks);
  }
}

Test(cp_ops, rows_of_neighbours) {
  rg_context *ctx = context();
  for (int ranks = 1; ranks <= 5; ranks++)
    for (int left = 0; left <= 4; left += 2)
      for (int right = 0; right <= 4; right++) {
        check_halo(ctx, ranks, 1, false, left, right);
        check_halo(ctx, ranks, 2, false, left, right);
        check_halo(ctx, ranks, 2, true, left, right);
      }
  rg_context_destroy(ctx);
}

/* halo_add by hand, and its gradient: the halo of what arrives. */
Test(cp_ops, halves_that_meet) {
  rg_context *ctx = context();
  const int ranks = 3, slots = 2, left = 2, right = 1, chunk = 3;
  kase k = {.op = "halo_add",
            .attrs = ", \"left\": 2, \"right\": 1",
            .out = "\"y\"",
            .outputs = "\"y\": \"y\"",
            .rows = left + chunk + right,
            .slots = slots,
            .order = true,
            .lists = true};
  a_rank r[MOST_RANKS];
  rg_plan *plan = planned_and_run(ctx, &k, r, ranks);
  kase out = k;
  out.rows = slots * chunk;
  static const char *const name[] = {"x0", "x1"};
  for (int64_t c = 0; c < ranks * slots; c++) {
    const int64_t place = place_of(&k, ranks, c);
    for (int64_t row = 0; row < k.rows; row++) {
      static const float zero[ROW];
      const int64_t at = c * chunk - left + row;
      const bool there = at >= 0 && at < ranks * slots * chunk;
      same_row(floats(&r[place / slots], RG_GRAD_OUT, name[place % slots]) + row * ROW,
               there ? row_at(&out, r, RG_GRAD_IN, "y", ranks, at / chunk, at % chunk) : zero,
               "gradient");
    }
    for (int64_t row = 0; row < chunk; row++) {
      float sum[ROW] = {0};
      bool begun = false;
      for (int64_t from = c - 1; from <= c + 1; from++) {
        const int64_t i = (c - from) * chunk + left + row;
        if (from < 0 || from >= ranks * slots || i < 0 || i >= k.rows) continue;
        const int64_t p = place_of(&k, ranks, from);
        const float *term = floats(&r[p / slots], RG_INPUT, name[p % slots]) + i * ROW;
        for (int j = 0; j < ROW; j++) sum[j] = begun ? sum[j] + term[j] : term[j];
        begun = true;
      }
      same_row(row_at(&out, r, RG_OUTPUT, "y", ranks, c, row), sum, "sum");
    }
  }
  finish(plan, r, ranks);
  rg_context_destroy(ctx);
}

/* ---- refusals ---- */

Test(cp_ops, shapes_that_do_not_fit) {
  static const struct {
    kase k;
    int ranks;
    const char *say;
  } bad[] = {
      {{"reduce_scatter", "", "\"y\"", "\"y\": \"y\"", 7, 1, false, false, NULL},
       2,
       "do not divide among 2 ranks"},
      {{"all_gather", "", "\"y\"", "\"y\": \"y\"", 7, 2, true, false, NULL},
       2,
       "a rank's 2 chunks"},
      {{"halo", ", \"left\": 4", "[\"y0\", \"y1\"]", "\"y0\": \"y0\"", 6, 2, false, false, NULL},
       2,
       "chunks have 3, expected no more"},
      {{"halo", ", \"left\": 1", "[\"y0\", \"y1\"]", "\"y0\": \"y0\"", 7, 2, false, false, NULL},
       2,
       "does not divide into 2 chunks"},
  };
  rg_context *ctx = context();
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    rg_error e = {0};
    cr_assert_null(plan_of(ctx, &bad[i].k, bad[i].ranks, &e));
    cr_assert_eq(e.status, RG_E_SHAPE, "%s", e.message);
    cr_assert(strstr(e.message, bad[i].say), "%s", e.message);
    cr_assert_str_eq(e.pointer, "/nodes/0");
  }
  rg_context_destroy(ctx);
}

Test(cp_ops, a_plan_for_ranks_needs_them) {
  rg_context *ctx = context();
  kase k = {.op = "all_gather",
            .attrs = "",
            .out = "\"y\"",
            .outputs = "\"y\": \"y\"",
            .rows = 8,
            .slots = 2};
  a_rank r[MOST_RANKS];
  rg_error e = {0};
  rg_session *s = NULL;
  rg_plan *plan = plan_of(ctx, &k, 2, &e);
  cr_assert(plan, "%s", e.message);
  FAILS(rg_session_create(plan, NULL, &s, &e), RG_E_USAGE, "one of 2 ranks");
  set_up(&k, plan, r, 3);
  run_ranks(ctx, r, 3, 5);
  for (int i = 0; i < 3; i++) {
    cr_assert_eq(r[i].status, RG_E_COMM, "%s", r[i].e.message);
    cr_assert(strstr(r[i].e.message, "made for 2 ranks, the communicator has 3"), "%s",
              r[i].e.message);
    free_buffers(&r[i].b);
  }
  rg_plan_destroy(plan);
  rg_context_destroy(ctx);
}

/* One rank has another order, which its op refuses: it says why, and so do the others. */
Test(cp_ops, a_rank_whose_node_fails_ends_all) {
  rg_context *ctx = context();
  const int ranks = 3;
  kase k = {.op = "all_gather",
            .attrs = "",
            .out = "\"y\"",
            .outputs = "\"y\": \"y\"",
            .rows = 8,
            .slots = 2,
            .order = true};
  a_rank r[MOST_RANKS];
  rg_error e = {0};
  rg_plan *plan = plan_of(ctx, &k, ranks, &e);
  cr_assert(plan, "%s", e.message);
  set_up(&k, plan, r, ranks);
  ((int32_t *)buffer(&r[1].b, RG_INPUT, "order"))[2] = 9;
  run_ranks(ctx, r, ranks, 5);
  for (int i = 0; i < ranks; i++) {
    cr_assert_eq(r[i].status, i == 1 ? RG_E_DATA : RG_E_COMM, "%s", r[i].e.message);
    cr_assert(strstr(r[i].e.message, "order[2] is 9"), "%s", r[i].e.message);
    cr_assert(i == 1 || strstr(r[i].e.message, "rank 1 failed"), "%s", r[i].e.message);
    free_buffers(&r[i].b);
  }
  rg_plan_destroy(plan);
  rg_context_destroy(ctx);
}
