/* tests/unit/test_num_attn_exact.c: what attention promises bit for bit. Threads, repeats, the
 * workspace's old contents, strides, neighbours in the pack, NaN in a neighbour and cutting the
 * heads into groups change nothing. */
#include "../harness/num.h"
#include <criterion/criterion.h>

static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
static const int32_t some[] = {70, 0, 1, 130, 33};

/* Case n of each kind: dtypes and options take turns. */
static num_attn attn_case(int n) {
  num_attn kind[] = {{.kind = REF_CMP, .kernel = 32, .stride = 16},
                     {.kind = REF_SLC, .block = 32, .top_n = 3},
                     {.kind = REF_SWA, .window_left = 50},
                     {.kind = REF_SWA, .window_left = -1}};
  num_attn a = kind[n % 4];
  a.name = "exact";
  a.dtype = types[n / 4 % 3];
  a.B = 5;
  a.length = some;
  a.H = 4;
  a.KH = 2;
  a.D = 64;
  a.DV = n / 4 == 1 ? 128 : 64;
  a.sinks = n / 4 == 2;
  a.d_lse = n / 4 != 1;
  a.softcap = n / 4 == 1 ? 20 : 0;
  return a;
}
enum { CASES = 12 };

static void run_both(num_attn_run *r, int threads) {
  OT_OK(ot_run(r->forward, threads));
  OT_OK(ot_run(r->backward, threads));
}

static bool same_rows(const num_attn_run *x, int64_t row_x, int64_t key_x, const num_attn_run *y,
                      int64_t row_y, int64_t key_y, int64_t rows, int64_t keys) {
  return ot_same_rows(x->o, row_x, y->o, row_y, rows) &&
         ot_same_rows(x->lse, row_x, y->lse, row_y, rows) &&
         ot_same_rows(x->dq, row_x, y->dq, row_y, rows) &&
         ot_same_rows(x->dk, key_x, y->dk, key_y, keys) &&
         ot_same_rows(x->dv, key_x, y->dv, key_y, keys);
}

/* First row of k and number of rows that belong to sequence b. */
static int64_t keys_of(const num_attn_run *r, int64_t b, int64_t *first) {
  int64_t from = r->pack_k.cu[b], length = r->pack_k.cu[b + 1] - from;
  *first = r->a.kind == REF_CMP ? from / r->a.stride : from;
  return r->a.kind == REF_CMP ? ref_blocks(length, r->a.kernel, r->a.stride) : length;
}

Test(attn_exact, threads_and_repeats) {
  for (int n = 0; n < CASES; n++) {
    ot *t = ot_begin(1 + (uint64_t)n);
    num_attn_run r = num_attn_new(t, attn_case(n));
    num_attn_calls(t, &r);
    OT_OK(ot_run_repeated(r.forward, 6));
    OT_OK(ot_run_repeated(r.backward, 6));
    ot_end(t);
  }
}

Test(attn_exact, hundred_repeats) {
  static const int32_t few[] = {40, 33};
  for (int n = 0; n < 3; n++) {
    ot *t = ot_begin(20 + (uint64_t)n);
    num_attn a = attn_case(n);
    a.B = 2;
    a.length = few;
    a.H = a.KH = 1;
    num_attn_run r = num_attn_new(t, a);
    num_attn_calls(t, &r);
    OT_OK(ot_run_repeated(r.forward, 100));
    OT_OK(ot_run_repeated(r.backward, 100));
    ot_end(t);
  }
}

Test(attn_exact, gradients_wanted_and_summed) {
  for (int n = 0; n < CASES; n++) {
    ot *t = ot_begin(30 + (uint64_t)n);
    num_attn_run r = num_attn_new(t, attn_case(n));
    num_attn_calls(t, &r);
    OT_OK(ot_run(r.forward, 2));
    OT_OK(ot_check_sums(r.backward));
    ot_end(t);
  }
}

/* d.q that ends a sum: the fp32 term, which the call gives alone, added to the sum and rounded
 * once. What stands in the sum's dead rows is nobody's. */
static int end_of_sum(ot *t, num_attn a) {
  a.wide_grads = true;
  num_attn_run r = num_attn_new(t, a), last = r;
  num_attn_calls(t, &r);
  run_both(&r, 2);
  if (!ot_rounds(r.backward)) return 0;
  ot_tensor *sum = ot_like(t, r.dq, NULL), *want = ot_like_as(t, r.dq, a.dtype);
  ot_fill_normal(t, sum, 1);
  ot_fill_rows(sum, r.pack.live, r.pack.T, 0);
  double *x = ot_get(t, r.dq);
  const double *y = ot_get(t, sum);
  for (int64_t i = 0; i < sum->n; i++) x[i] = (float)y[i] + (float)x[i];
  ot_set(want, x);
  num_poison_dead(sum, &r.pack, 0, 0);
  last.a.wide_grads = false;
  num_attn_calls(t, &last);
  ot_in(last.backward, "sum.q", sum);
  OT_OK(ot_run(last.forward, 2));
  OT_OK(ot_run_repeated(last.backward, 1));
  cr_assert(ot_same_bits(last.dq, want), "d.q of %s, kind %d, width %d", rg_dtype_name(a.dtype),
            (int)a.kind, (int)a.D);
  return 1;
}

Test(attn_exact, d_q_ends_a_sum) {
  static const int64_t width[] = {16, 64, 96, 128, 192};
  int taken = 0, asked = 0;
  for (int n = 0; n < CASES; n++)
    for (int w = 0; w < 5; w++) {
      num_attn a = attn_case(n);
      a.D = width[w];
      a.DV = width[w] == 192 ? 128 : width[w];
      if (n % 3) a.softcap = 0;
      if (a.dtype == RG_F32) continue;
      ot *t = ot_begin(500 + (uint64_t)(5 * n + w));
      taken += end_of_sum(t, a);
      asked++;
      ot_end(t);
    }
  /* on a GPU the kernels for wgmma and mma.sync do, those there are in any build for bf16 */
  cr_assert(ot_on_gpu() ? taken >= 4 : taken == asked, "%d of %d took a sum", taken, asked);
}

Test(attn_exact, d_q_on_a_sum_is_rounded) {
  ot *t = ot_begin(600);
  num_attn a = attn_case(2);
  a.wide_grads = true;
  num_attn_run r = num_attn_new(t, a);
  num_attn_calls(t, &r);
  OT_OK(ot_run(r.forward, 2));
  ot_in(r.backward, "sum.q", ot_like(t, r.dq, NULL));
  cr_assert_not_null(ot_run(r.backward, 2));
  cr_assert_eq(ot_status(r.backward), RG_E_KEY);
  ot_end(t);
}

Test(attn_exact, strides) {
  for (int n = 0; n < CASES; n++) {
    ot *t = ot_begin(50 + (uint64_t)n);
    num_attn_run r = num_attn_new(t, attn_case(n)), q = num_attn_again(t, &r, true);
    num_attn_calls(t, &r);
    num_attn_calls(t, &q);
    run_both(&r, 2);
    run_both(&q, 2);
    cr_assert(same_rows(&r, 0, 0, &q, 0, 0, r.pack.T, r.TK), "case %d", n);
    ot_end(t);
  }
}

Test(attn_exact, alone_and_packed) {
  for (int n = 0; n < CASES; n++) {
    ot *t = ot_begin(70 + (uint64_t)n);
    num_attn a = attn_case(n);
    a.B = num_nlengths;
    a.length = num_lengths;
    a.H = 2;
    a.KH = 1;
    num_attn_run r = num_attn_new(t, a);
    num_attn_calls(t, &r);
    run_both(&r, 2);
    for (int64_t b = 0; b < a.B; b++) {
      num_attn_run one = num_attn_alone(t, &r, b);
      num_attn_calls(t, &one);
      run_both(&one, 1);
      int64_t key, keys = keys_of(&r, b, &key);
      cr_assert(same_rows(&one, 0, 0, &r, r.pack.cu[b], key, num_lengths[b], keys),
                "case %d, sequence %d of %d tokens", n, (int)b, num_lengths[b]);
    }
    ot_end(t);
  }
}

/* With lengths of keys and offsets of their own. */
Test(attn_exact, chunks_alone_and_packed) {
  static const int32_t keys_long[] = {200, 64, 65, 150, 33}, offset[] = {130, 64, 64, 20, 0};
  for (int n = 0; n < CASES; n++) {
    ot *t = ot_begin(90 + (uint64_t)n);
    num_attn a = attn_case(n);
    a.length_k = keys_long;
    a.offset = offset;
    num_attn_run r = num_attn_new(t, a);
    num_attn_calls(t, &r);
    run_both(&r, 2);
    for (int64_t b = 0; b < a.B; b++) {
      num_attn_run one = num_attn_alone(t, &r, b);
      num_attn_calls(t, &one);
      run_both(&one, 3);
      int64_t key, keys = keys_of(&r, b, &key);
      cr_assert(same_rows(&one, 0, 0, &r, r.pack.cu[b], key, some[b], keys), "case %d, sequence %d",
                n, (int)b);
    }
    ot_end(t);
  }
}

Test(attn_exact, nan_stays_in_its_sequence) {
  for (int n = 0; n < CASES; n++) {
    ot *t = ot_begin(110 + (uint64_t)n);
    num_attn_run r = num_attn_new(t, attn_case(n)), q = num_attn_again(t, &r, false);
    int64_t key, keys = keys_of(&q, 3, &key);
    ot_poison_rows(q.q, q.pack.cu[3], q.pack.cu[4]);
    ot_poison_rows(q.d_o, q.pack.cu[3], q.pack.cu[4]);
    ot_poison_rows(q.k, key, key + keys);
    ot_poison_rows(q.v, key, key + keys);
    if (q.idx) ot_poison_rows(q.idx, q.pack.cu[3], q.pack.cu[4]);
    num_attn_calls(t, &r);
    num_attn_calls(t, &q);
    run_both(&r, 2);
    run_both(&q, 2);
    for (int64_t b = 0; b < 5; b++) {
      if (b == 3) continue;
      keys = keys_of(&q, b, &key);
      cr_assert(same_rows(&r, r.pack.cu[b], key, &q, q.pack.cu[b], key, some[b], keys),
                "case %d, sequence %d", n, (int)b);
    }
    ot_end(t);
  }
}

/* A row that sees its sink alone: lse is the sink to the bit, in every family of kernels. */
Test(attn_exact, sink_alone) {
  static const int32_t none[] = {0, 0, 0, 0, 0};
  for (int n = 0; n < CASES; n++) {
    /* selected blocks: another family for wide groups */
    for (int heads = 4; heads <= 32; heads *= 8) {
      ot *t = ot_begin(170 + (uint64_t)n);
      num_attn a = attn_case(n);
      a.H = heads;
      a.sinks = true;
      if (a.kind == REF_SWA) a.length_k = none;
      num_attn_run r = num_attn_new(t, a);
      if (r.idx) ot_fill(r.idx, -1);
      num_attn_calls(t, &r);
      OT_OK(ot_run(r.forward, 2));
      int64_t alone = 0;
      for (int64_t b = 0; b < a.B; b++) {
        /* before its block's end a query sees no compressed key */
        int64_t from = r.pack.cu[b], rows = r.pack.cu[b + 1] - from;
        if (a.kind == REF_CMP && rows > a.kernel - 1) rows = a.kernel - 1;
        for (int64_t i = from * heads; i < (from + rows) * heads; i++, alone++) {
          float want = (float)ot_element(r.sinks, i % heads), got = (float)ot_element(r.lse, i);
          cr_assert(got == want, "case %d, %d heads, row %d: lse %.9g, sink %.9g", n, heads, (int)i,
                    (double)got, (double)want);
        }
      }
      cr_assert_gt(alone, 30 * heads);
      ot_end(t);
    }
  }
}

/* Whether a row's lse is summed again in double is decided by its own keys: long ones that come
 * later in the same tile change no bit of it. */
Test(attn_exact, later_keys) {
  static const int32_t one[] = {64};
  for (int n = 0; n < CASES; n++) {
    ot *t = ot_begin(190 + (uint64_t)n);
    num_attn a = attn_case(n);
    if (a.kind == REF_CMP) a.kernel = 8, a.stride = 4;
    a.B = 1;
    a.length = one;
    a.hot = 4;
    num_attn_run r = num_attn_new(t, a), q = num_attn_again(t, &r, false);
    /* no key of queries before 32 */
    const int64_t first = a.kind == REF_CMP ? 7 : 32, row = q.k->n / r.TK;
    double *k = ot_get(t, q.k);
    for (int64_t i = first * row; i < q.k->n; i++) k[i] *= 1024;
    ot_set(q.k, k);
    num_attn_calls(t, &r);
    num_attn_calls(t, &q);
    OT_OK(ot_run(r.forward, 2));
    OT_OK(ot_run(q.forward, 2));
    cr_assert(ot_same_rows(r.o, 0, q.o, 0, 32), "case %d: o", n);
    cr_assert(ot_same_rows(r.lse, 0, q.lse, 0, 32), "case %d: lse", n);
    ot_end(t);
  }
}

/* Heads [first, first + n) of a tensor [rows, heads, …] or [heads], as a view. */
static ot_tensor *heads_of(ot *t, const ot_tensor *a, int64_t first, int64_t n) {
  int axis = a->arg.rank == 1 ? 0 : 1;
  int64_t dim[3] = {a->arg.dim[0], a->arg.rank > 1 ? a->arg.dim[1] : 0,
                    a->arg.rank > 2 ? a->arg.dim[2] : 0};
  dim[axis] = n;
  char *data =
      (char *)a->arg.data + first * a->arg.stride[axis] * (int64_t)rg_dtype_size(a->arg.dtype);
  return ot_wrap(t, data, a->arg.dtype, a->arg.rank, dim, a->arg.stride);
}

/* Each KV head and its queries on their own, through views. */
Test(attn_exact, head_groups) {
  for (int n = 0; n < CASES; n++) {
    ot *t = ot_begin(130 + (uint64_t)n);
    num_attn_run r = num_attn_new(t, attn_case(n));
    num_attn_calls(t, &r);
    run_both(&r, 2);
    for (int64_t h = 0; h < 2; h++) {
      num_attn_run part = r;
      part.a.H = 2;
      part.a.KH = 1;
      part.q = heads_of(t, r.q, 2 * h, 2);
      part.k = heads_of(t, r.k, h, 1);
      part.v = heads_of(t, r.v, h, 1);
      if (r.idx) part.idx = heads_of(t, r.idx, h, 1);
      if (r.sinks) part.sinks = heads_of(t, r.sinks, 2 * h, 2);
      part.d_o = heads_of(t, r.d_o, 2 * h, 2);
      if (r.d_lse) {
        part.d_lse = OT_NEW(t, RG_F32, r.pack.T, 2);
        ot_copy(part.d_lse, heads_of(t, r.d_lse, 2 * h, 2));
      }
      num_attn_calls(t, &part);
      run_both(&part, 2);
      cr_assert(ot_same_bits(part.o, heads_of(t, r.o, 2 * h, 2)), "case %d: o", n);
      cr_assert(ot_same_bits(part.dq, heads_of(t, r.dq, 2 * h, 2)), "case %d: dq", n);
      cr_assert(ot_same_bits(part.dk, heads_of(t, r.dk, h, 1)), "case %d: dk", n);
      cr_assert(ot_same_bits(part.dv, heads_of(t, r.dv, h, 1)), "case %d: dv", n);
      if (r.dsinks)
        cr_assert(ot_same_bits(part.dsinks, heads_of(t, r.dsinks, 2 * h, 2)), "case %d: dsinks", n);
    }
    ot_end(t);
  }
}

/* Offsets past 2^31 elements, by strides. */
Test(attn_exact, far_rows) {
  static const int32_t two[] = {65, 33};
  if (!ot_far_possible()) cr_skip("no address space for sparse tensors");
  for (int n = 0; n < 4; n++) {
    ot *t = ot_begin(150 + (uint64_t)n);
    num_attn a = attn_case(n);
    a.dtype = RG_BF16;
    a.B = 2;
    a.length = two;
    num_attn_run r = num_attn_new(t, a);
    num_attn_calls(t, &r);
    OT_OK(ot_check_far(r.forward));
    OT_OK(ot_check_far(r.backward));
    ot_end(t);
  }
}
