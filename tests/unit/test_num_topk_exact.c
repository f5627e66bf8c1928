/* tests/unit/test_num_topk_exact.c: what topk promises exactly: ties, permutations, NaN; and the
   same bits whatever the threads, packs, strides and CPU. */
#include "topk_case.h"

/* ---- exact answers ---- */

/* Equal keys: every compressed block has the same p, whole blocks tie, the lower index wins. */
Test(topk, equal_scores) {
  for (int i = 0; i < 6; i++) {
    ot *t = ot_begin(130 + (uint64_t)i);
    topk_run r = shell(t,
                       (topk_case){.name = "equal scores",
                                   LONG,
                                   HEADS,
                                   .kernel = 32,
                                   .stride = i < 3 ? 16 : 32,
                                   .block = 32,
                                   .top_n = 5,
                                   .init = i % 2,
                                   .local = 2,
                                   .dtype = types[i % 3],
                                   .dot = i >= 3},
                       11);
    ot_fill(r.q, 0.5);
    ot_fill(r.k, i % 2 ? 0 : 0.25);
    fill_lse(t, &r);
    poison_dead(&r);
    make_call(t, &r);
    OT_OK(ot_run(r.call, 2));
    OT_OK(compare(t, &r, 1));
    ot_end(t);
  }
}

/* Logits are a permutation of well-separated numbers: nothing is a near-tie. */
Test(topk, permutations) {
  for (int i = 0; i < 6; i++) {
    ot *t = ot_begin(140 + (uint64_t)i);
    topk_run r = shell(t,
                       (topk_case){.name = "permutation",
                                   LONG,
                                   .H = 2,
                                   .KH = 1,
                                   .D = 8,
                                   .scale = 1,
                                   .kernel = 32,
                                   .stride = 32,
                                   .block = 32,
                                   .top_n = 6,
                                   .init = i % 2,
                                   .local = 1,
                                   .dtype = types[i % 3],
                                   .dot = i >= 3},
                       11);
    int64_t n = r.k->arg.dim[0];
    double *q = ot_doubles(t, r.q->n), *k = ot_doubles(t, r.k->n);
    int *place = ot_alloc(t, (size_t)n * sizeof *place);
    for (int64_t j = 0; j < n; j++) {
      int64_t other = ot_below(t, j + 1);
      place[j] = place[other];
      place[other] = (int)j;
    }
    for (int64_t j = 0; j < n; j++) k[j * 8 + 3] = 0.25 * place[j];
    for (int64_t j = 0; j < r.q->n / 8; j++) q[j * 8 + 3] = 1;
    ot_set(r.q, q);
    ot_set(r.k, k);
    fill_lse(t, &r);
    poison_dead(&r);
    make_call(t, &r);
    OT_OK(ot_run(r.call, 2));
    OT_OK(compare(t, &r, 1));
    ot_end(t);
  }
}

/* A NaN key ranks last where it is weighed; a NaN lse makes all of a row's scores NaN, and
 * equal. */
Test(topk, nan_ranks_last) {
  for (int i = 0; i < 4; i++) {
    ot *t = ot_begin(150 + (uint64_t)i);
    topk_run r = make(t, (topk_case){.name = "NaN",
                                     LONG,
                                     HEADS,
                                     .kernel = 32,
                                     .stride = 32,
                                     .block = 32,
                                     .top_n = 4,
                                     .init = 0,
                                     .local = 1,
                                     .dtype = types[i % 3],
                                     .dot = i == 3});
    ot_poison_rows(r.k, 3, 4);
    ot_poison_rows(r.k, 9, 11);
    if (i == 1) ot_poison_rows(r.lse, 400, 500);
    if (i == 2) ot_poison_rows(r.q, 400, 500);
    OT_OK(ot_run(r.call, 2));
    ref_topk ref = oracle(t, &r);
    int32_t *want = ot_ints(t, r.idx->n), *got = ot_get_ints(t, r.idx);
    ref_topk_forward(&ref, want, NULL, 0, NULL);
    int64_t differ = 0;
    for (int64_t n = 0; n < r.idx->n; n++) differ += want[n] != got[n];
    cr_assert(differ == 0, "case %d: %lld indices differ", i, (long long)differ);
    ot_end(t);
  }
}

static bool valid_rows(const int32_t *idx, int64_t from, int64_t to, const topk_run *r) {
  int64_t w = r->a.top_n, heads = r->a.KH;
  for (int64_t row = from * heads; row < to * heads; row++) {
    int64_t i = row / heads - from, last = -1, n = 0;
    for (; n < w && idx[row * w + n] >= 0; n++) {
      if (idx[row * w + n] <= last || idx[row * w + n] > i / r->a.block) return false;
      last = idx[row * w + n];
    }
    if (n != (w < i / r->a.block + 1 ? w : i / r->a.block + 1)) return false;
    for (; n < w; n++)
      if (idx[row * w + n] != -1) return false;
  }
  return true;
}

/* NaN in one sequence changes nothing elsewhere and gives indices in range where it is. */
Test(topk, nan_stays_in_its_sequence) {
  static const int32_t three[] = {150, 300, 200};
  for (int i = 0; i < 4; i++) {
    ot *t = ot_begin(160 + (uint64_t)i);
    topk_run r = make(t, (topk_case){.name = "NaN",
                                     .B = 3,
                                     .length = three,
                                     HEADS,
                                     .kernel = 32,
                                     .stride = i < 3 ? 16 : 32,
                                     .block = 32,
                                     .top_n = 4,
                                     .init = 1,
                                     .local = 2,
                                     .dtype = types[i % 3],
                                     .dot = i == 3});
    OT_OK(ot_run(r.call, 2));
    ot_tensor *clean = ot_like(t, r.idx, NULL);
    ot_copy(clean, r.idx);
    ot_poison_rows(r.q, 150, 450);
    ot_poison_rows(r.lse, 150, 450);
    num_poison_dead(r.k, &r.pack_k, r.a.kernel, r.a.stride);
    int64_t first = 150 / r.a.stride;
    ot_poison_rows(r.k, first, first + ref_blocks(300, r.a.kernel, r.a.stride));
    OT_OK(ot_run(r.call, 2));
    cr_assert(ot_same_rows(clean, 0, r.idx, 0, 150) && ot_same_rows(clean, 450, r.idx, 450, 200));
    cr_assert(valid_rows(ot_get_ints(t, r.idx), 150, 450, &r));
    ot_end(t);
  }
}

/* ---- bit-equality ---- */

Test(topk, repeats_and_threads) {
  for (int i = 0; i < 4; i++) {
    ot *t = ot_begin(170 + (uint64_t)i);
    topk_run r = make(
        t,
        (topk_case){.name = "repeats", SOME, HEADS, NSA, .dtype = types[i % 3], .hot = 1 + 7 * i});
    OT_OK(ot_run_repeated(r.call, i == 0 ? 100 : 10));
    ot_end(t);
  }
}

Test(topk, alone_and_packed) {
  for (int i = 0; i < 4; i++) {
    ot *t = ot_begin(180 + (uint64_t)i);
    topk_run r = make(t, (topk_case){.name = "packed",
                                     LENGTHS,
                                     HEADS,
                                     .kernel = 32,
                                     .stride = i < 3 ? 16 : 32,
                                     .block = 32,
                                     .top_n = 4,
                                     .init = 1,
                                     .local = 1,
                                     .dtype = types[i % 3],
                                     .dot = i == 3});
    OT_OK(ot_run(r.call, 2));
    for (int64_t b = 0; b < r.a.B; b++) {
      topk_case a = r.a;
      a.B = 1;
      a.length = &num_lengths[b];
      topk_run s = shell(t, a, 0);
      int64_t row = r.pack.cu[b], row_k = row / a.stride, length = num_lengths[b];
      ot_set(s.q, ot_get(t, r.q) + row * a.H * a.D);
      ot_set(s.k, ot_get(t, r.k) + row_k * a.KH * a.D);
      ot_set(s.lse, ot_get(t, r.lse) + row * a.H);
      make_call(t, &s);
      OT_OK(ot_run(s.call, 1));
      cr_assert(ot_same_rows(s.idx, 0, r.idx, row, length), "sequence %lld", (long long)b);
    }
    ot_end(t);
  }
}

Test(topk, strides) {
  for (int i = 0; i < 3; i++) {
    ot *t = ot_begin(190 + (uint64_t)i);
    topk_case a = {.name = "strides", SOME, HEADS, NSA, .dtype = types[i]};
    topk_run r = make(t, a);
    a.strided = true;
    topk_run s = shell(t, a, 11);
    ot_copy(s.q, r.q);
    ot_copy(s.k, r.k);
    ot_copy(s.lse, r.lse);
    make_call(t, &s);
    OT_OK(ot_run(r.call, 2));
    OT_OK(ot_run(s.call, 2));
    cr_assert(ot_same_bits(r.idx, s.idx));
    ot_end(t);
  }
}

Test(topk, far_rows) {
  if (!ot_far_possible()) cr_skip("no address space for sparse tensors");
  for (int i = 0; i < 2; i++) {
    ot *t = ot_begin(195 + (uint64_t)i);
    topk_run r = make(t, (topk_case){.name = "far",
                                     SOME,
                                     HEADS,
                                     .kernel = 32,
                                     .stride = 32,
                                     .block = 32,
                                     .top_n = 4,
                                     .init = 1,
                                     .local = 2,
                                     .dtype = RG_BF16,
                                     .dot = i == 1});
    OT_OK(ot_check_far(r.call));
    ot_end(t);
  }
}

Test(topk, cpu_levels) {
  for (int level = 0; level < ot_isa(); level++)
    for (int i = 0; i < 6; i++)
      check(200 + (uint64_t)(6 * level + i), (topk_case){.name = "CPU level",
                                                         LONG,
                                                         HEADS,
                                                         .kernel = 32,
                                                         .stride = i < 3 ? 16 : 32,
                                                         .block = 32,
                                                         .top_n = 4,
                                                         .init = 1,
                                                         .local = 2,
                                                         .dtype = types[i % 3],
                                                         .dot = i >= 3,
                                                         .isa = level + 1});
  for (int level = 0; level < ot_isa(); level++)
    for (int i = 0; i < 3; i++)
      check(290 + (uint64_t)(3 * level + i), (topk_case){.name = "CPU level, relu and best",
                                                         LONG,
                                                         HEADS,
                                                         .kernel = 16,
                                                         .stride = 16,
                                                         .block = 32,
                                                         .top_n = 4,
                                                         .relu = i < 2,
                                                         .weighted = i < 2,
                                                         .max = true,
                                                         .tail = i == 0,
                                                         .dtype = types[i % 3],
                                                         .isa = level + 1});
}
