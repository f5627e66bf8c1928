/* tests/unit/test_cp_seed.c: what goes wrong in the Triton library that regraph was asked to
 * succeed (mdy666/Scalable-Flash-Native-Sparse-Attention) when sequences are shared out among
 * ranks, a test for each. */
#include "cp_case.h"

#include "cp/tables.h"

static rg_context *ctx;
static void setup(void) {
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
}
static void teardown(void) {
  rg_context_destroy(ctx);
}

static rg_plan *plan_of(int ranks, int64_t T, int64_t B, bool weights, const char *more) {
  char text[8192], policy_text[256];
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  const rg_plan_options o = {.set = set, .nset = 2, .threads = 1, .pack_seconds = 0.2, .cp = ranks};
  snprintf(policy_text, sizeof policy_text, "{ \"regraph_policy\": 1%s }", more);
  rg_spec *spec = load_spec(ctx, nsa_spec("f32", weights, text, sizeof text));
  rg_policy *policy = load_policy(ctx, policy_text);
  rg_plan *plan = NULL;
  rg_error e = {0};
  CR_OK(rg_plan_create(spec, policy, &o, &plan, &e), &e);
  rg_spec_destroy(spec);
  rg_policy_destroy(policy);
  return plan;
}

static void compare(int ranks, int64_t T, int64_t B, const int *lengths, bool weights,
                    const char *what) {
  static const char *const modes[] = {"\"auto\"", "1", "2"};
  for (int mode = 0; mode < 3; mode++) {
    char more[64], name[128];
    snprintf(more, sizeof more, ", \"cp\": { \"mode\": %s }", modes[mode]);
    snprintf(name, sizeof name, "%s, %d ranks, mode %s", what, ranks, modes[mode]);
    rg_plan *one = plan_of(1, T, B, weights, ""), *many = plan_of(ranks, T, B, weights, more);
    cp_compare(ctx, one, many, 3, T, lengths, "q gate", 2e-6, name);
    rg_plan_destroy(one);
    rg_plan_destroy(many);
  }
}

/* Ranks of `plan` run one batch; memory is poisoned before every node. */
static void run(const rg_plan *plan, int ranks, int64_t T, const int *lengths, uint64_t seed,
                a_rank *rank) {
  buffers whole;
  rg_cp_info cp;
  rg_plan *one = plan_of(1, T, 3, false, "");
  rg_plan_cp(plan, &cp);
  make_buffers(one, seed, T, lengths, &whole);
  for (int r = 0; r < ranks; r++) {
    rank[r] = (a_rank){.rank = r, .plan = plan, .backward = true, .poison = true};
    make_buffers(plan, seed, T, lengths, &rank[r].b);
    cp_copy(&whole, &rank[r], &cp, false);
  }
  run_ranks(ctx, rank, ranks, 20);
  for (int r = 0; r < ranks; r++) cr_assert_eq(rank[r].status, RG_OK, "%s", rank[r].e.message);
  free_buffers(&whole);
  rg_plan_destroy(one);
}

static void same(const a_rank *x, const a_rank *y, int ranks, const char *what) {
  for (int r = 0; r < ranks; r++)
    for (int i = 0; i < x[r].b.n; i++) {
      const rg_tensor_info *t = &x[r].b.info[i];
      if (t->role != RG_OUTPUT && t->role != RG_GRAD_OUT) continue;
      cr_assert_eq(memcmp(x[r].b.data[i], buffer(&y[r].b, t->role, t->name), (size_t)t->bytes), 0,
                   "%s: %s of rank %d", what, t->name, r);
    }
}

static void free_ranks(a_rank *rank, int ranks) {
  for (int r = 0; r < ranks; r++) free_buffers(&rank[r].b);
}

/* With all heads in one group (kv_head_stride = KH) it returns d.k and d.v as they were allocated.
 * Here they are those of one head after the other. */
Test(cp_seed, gradients_of_all_heads_at_once, .init = setup, .fini = teardown) {
  const int lengths[] = {30, 1, 60};
  a_rank at_once[MOST_RANKS], one_by_one[MOST_RANKS];
  for (int ranks = 2; ranks <= 4; ranks++) {
    const int64_t T = 48 * ranks;
    rg_plan *all = plan_of(ranks, T, 3, false, ""),
            *each = plan_of(ranks, T, 3, false, ", \"split_heads\": 1");
    run(all, ranks, T, lengths, 4, at_once);
    run(each, ranks, T, lengths, 4, one_by_one);
    same(at_once, one_by_one, ranks, "heads at once");
    free_ranks(at_once, ranks);
    free_ranks(one_by_one, ranks);
    rg_plan_destroy(all);
    rg_plan_destroy(each);
    compare(ranks, T, 3, lengths, false, "heads at once");
  }
}

/* Its batch builder fails for a batch of one. */
Test(cp_seed, a_batch_of_one, .init = setup, .fini = teardown) {
  const int32_t cu[] = {0, 96};
  rg_error e = {0};
  bool owned[96] = {false};
  for (int r = 0; r < 4; r++) {
    rg_range at[2];
    int64_t rows[24];
    CR_OK(rg_cp_rows(cu, 2, 96, 4, RG_CP_AUTO, r, at, &e), &e);
    CR_OK(rg_cp_document_rows(cu, 2, 4, r, rows, 24, &e), &e);
    for (int s = 0, n = 0; s < 2; s++)
      for (int64_t i = at[s].begin; i < at[s].end; i++, n++) {
        cr_assert(!owned[i]);
        owned[i] = true;
        cr_assert_eq(rows[n], i, "one document is cut as one sequence is");
      }
  }
  for (int i = 0; i < 96; i++) cr_assert(owned[i]);
  compare(2, 96, 1, (const int[]){96}, false, "a batch of one");
  compare(4, 96, 1, (const int[]){91}, false, "a batch of one and dead rows");
}

/* Its test prints differences and asserts none. One number of one rank's keys is wrong here, and
 * what the tests of this folder compare by says so. */
Test(cp_seed, a_comparison_that_can_fail, .init = setup, .fini = teardown) {
  const int lengths[] = {90, 1, 50}, ranks = 3;
  const int64_t T = 144;
  a_rank right[MOST_RANKS], wrong[MOST_RANKS];
  rg_plan *plan = plan_of(ranks, T, 3, false, "");
  run(plan, ranks, T, lengths, 4, right);
  for (int r = 0; r < ranks; r++) {
    wrong[r] = (a_rank){.plan = plan, .backward = true};
    make_buffers(plan, 4, T, lengths, &wrong[r].b);
    for (int i = 0; i < right[r].b.n; i++)
      memcpy(wrong[r].b.data[i], right[r].b.data[i], (size_t)right[r].b.info[i].bytes);
  }
  float *k = buffer(&wrong[0].b, RG_INPUT, "k");
  k[0] += 1e-3F;
  run_ranks(ctx, wrong, ranks, 20);
  int bytes = 0, gradients = 0;
  for (int r = 0; r < ranks; r++)
    for (int i = 0; i < right[r].b.n; i++) {
      const rg_tensor_info *t = &right[r].b.info[i];
      if (t->role == RG_OUTPUT)
        bytes += memcmp(right[r].b.data[i], wrong[r].b.data[i], (size_t)t->bytes) != 0;
      if (t->role == RG_GRAD_OUT && strcmp(t->name, "k") == 0)
        gradients += cp_error(t, wrong[r].b.data[i], right[r].b.data[i], NULL) > 2e-6;
    }
  cr_assert_gt(bytes, 0);
  cr_assert_gt(gradients, 0);
  free_ranks(right, ranks);
  free_ranks(wrong, ranks);
  rg_plan_destroy(plan);
}

/* ---- batch after batch through one session ---- */

typedef struct again {
  a_rank first;
  const buffers *then;
} again;

static void *run_two_batches(void *arg) {
  again *x = arg;
  a_rank *r = &x->first;
  rg_session *s = NULL;
  const rg_session_options o = {.size = sizeof o, .comm = r->comm};
  r->status = rg_session_create(r->plan, &o, &s, &r->e);
  for (int i = 0; i < r->b.n && r->status == RG_OK; i++)
    r->status = rg_session_bind(s, r->b.info[i].role, r->b.info[i].name, r->b.data[i],
                                (size_t)r->b.info[i].bytes, &r->e);
  for (int batch = 0; batch < 2 && r->status == RG_OK; batch++) {
    for (int i = 0; i < r->b.n && batch; i++) /* at the addresses that are bound */
      memcpy(r->b.data[i], x->then->data[i], (size_t)r->b.info[i].bytes);
    r->status = rg_session_forward(s, &r->e);
    if (r->status == RG_OK) r->status = rg_session_backward(s, &r->e);
  }
  rg_session_destroy(s);
  rg_comm_destroy(r->comm, r->status == RG_OK ? NULL : &r->e);
  return NULL;
}

/* The second batch of a session gives what it gives a session of its own. */
static void batch_after_batch(const int *first, const int *then, const char *what) {
  enum { RANKS = 4, T = 192 };
  again rank[RANKS];
  a_rank alone[MOST_RANKS], before[MOST_RANKS], results[MOST_RANKS];
  pthread_t thread[RANKS];
  rg_comm *comm[RANKS];
  rg_error e = {0};
  rg_plan *plan = plan_of(RANKS, T, 3, false, "");
  run(plan, RANKS, T, first, 4, before);
  run(plan, RANKS, T, then, 5, alone);
  CR_OK(rg_comm_threads(ctx, RANKS, 20, comm, &e), &e);
  for (int r = 0; r < RANKS; r++) {
    rank[r] =
        (again){.first = {.plan = plan, .comm = comm[r], .b = before[r].b}, .then = &alone[r].b};
    cr_assert_eq(pthread_create(&thread[r], NULL, run_two_batches, &rank[r]), 0);
  }
  for (int r = 0; r < RANKS; r++) {
    pthread_join(thread[r], NULL);
    cr_assert_eq(rank[r].first.status, RG_OK, "%s", rank[r].first.e.message);
    results[r] = rank[r].first;
  }
  same(results, alone, RANKS, what);
  free_ranks(alone, RANKS);
  free_ranks(before, RANKS);
  rg_plan_destroy(plan);
}

/* Its caches compare tensors on the device at every call, or else would serve old ones. Nothing
 * here is kept from call to call: lengths may change where they stand. */
Test(cp_seed, lengths_that_change_in_place, .init = setup, .fini = teardown) {
  batch_after_batch((const int[]){100, 1, 60}, (const int[]){3, 130, 0}, "other lengths");
  batch_after_batch((const int[]){0, 0, 0}, (const int[]){64, 64, 64}, "after an empty batch");
}

/* It reads lengths back from the device to choose how to share out. Here the graph chooses, so that
 * a session takes a batch of either kind after one of the other. */
Test(cp_seed, the_mode_changes_with_the_batch, .init = setup, .fini = teardown) {
  const int32_t one[] = {0, 192, 192, 192}, many[] = {0, 48, 96, 144};
  cr_assert_eq(rgi_cp_choose(RG_CP_AUTO, one, 3, 192, 4), RG_CP_ZIGZAG);
  cr_assert_eq(rgi_cp_choose(RG_CP_AUTO, many, 3, 192, 4), RG_CP_BLOCKS);
  batch_after_batch((const int[]){192, 0, 0}, (const int[]){48, 48, 48}, "one, then many");
  batch_after_batch((const int[]){48, 48, 48}, (const int[]){192, 0, 0}, "many, then one");
}

/* ---- what it asks of its callers ---- */

/* A power of two, of ranks. */
Test(cp_seed, ranks_that_are_no_power_of_two, .init = setup, .fini = teardown) {
  for (int ranks = 3; ranks <= 7; ranks += ranks == 3 ? 2 : 1)
    compare(ranks, 24 * ranks, 3, (const int[]){10 * ranks, 5, 8 * ranks}, false, "any number");
}

/* To sum gradients of weights over the ranks. */
Test(cp_seed, gradients_of_weights_are_whole, .init = setup, .fini = teardown) {
  compare(4, 192, 3, (const int[]){100, 1, 60}, true, "weights");
}
