/* tests/unit/test_num_index.c: index_loss and its gradient against the oracle, the oracle against
 * finite differences; exactness: threads, repeats, packs, strides. */
#include "../harness/num.h"
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

typedef struct index_case {
  const char *name;
  num_attn a; /* the attention and what was chosen for it */
  int64_t J, C;
  bool dot, weighted, wide, strided;
} index_case;

typedef struct index_run {
  index_case x;
  num_attn_run at;
  int64_t I;
  ot_tensor *lse, *iq, *ik, *w, *loss, *dloss, *dq, *dk, *dw;
  ot_call *forward, *backward;
} index_run;

static ot_tensor *tensor(ot *t, rg_dtype dtype, int64_t n, int64_t h, int64_t d, bool strided) {
  const int64_t dim[] = {n, h, d}, pad[] = {6, 3, 0};
  return ot_new(t, dtype, 3, dim, strided ? pad : NULL);
}

static void add_inputs(ot_call *c, const index_run *r) {
  const num_attn *a = &r->at.a;
  ot_in(c, "q", r->at.q), ot_in(c, "k", r->at.k), ot_in(c, "lse", r->lse);
  ot_in(c, "index_q", r->iq), ot_in(c, "index_k", r->ik);
  if (r->x.weighted) ot_in(c, "weight", r->w);
  ot_in(c, "idx", r->at.idx), ot_in(c, "cu_seqlens", r->at.pack.tensor);
  if (a->length_k) ot_in(c, "cu_seqlens_k", r->at.pack_k.tensor);
  if (r->at.offset) ot_in(c, "q_offset", r->at.offset);
  ot_int(c, "block", a->block);
  ot_float(c, "index_scale", 0.7);
  if (r->x.dot) ot_choice(c, "score", "dot");
}

static void make_calls(ot *t, index_run *r) {
  r->forward = ot_call_new(t, &rgi_op_index_loss);
  add_inputs(r->forward, r);
  ot_out(r->forward, "loss", r->loss);
  r->backward = ot_call_new(t, &rgi_op_index_loss_bwd);
  add_inputs(r->backward, r);
  ot_in(r->backward, "grad.loss", r->dloss);
  ot_out(r->backward, "d.index_q", r->dq), ot_out(r->backward, "d.index_k", r->dk);
  if (r->x.weighted) ot_out(r->backward, "d.weight", r->dw);
}

static void shell(ot *t, index_run *r) {
  const num_attn *a = &r->at.a;
  const rg_dtype grad = r->x.wide ? RG_F32 : a->dtype;
  const int64_t T = r->at.pack.T;
  r->I = a->one_idx ? 1 : a->KH;
  r->lse = OT_NEW(t, RG_F32, T, a->H);
  r->iq = tensor(t, a->dtype, T, r->x.J, r->x.C, r->x.strided);
  r->ik = tensor(t, a->dtype, r->at.TK, r->I, r->x.C, r->x.strided);
  r->w = OT_NEW(t, a->dtype, T, r->x.J);
  r->loss = OT_NEW(t, RG_F32, T, r->I), r->dloss = OT_NEW(t, RG_F32, T, r->I);
  r->dq = tensor(t, grad, T, r->x.J, r->x.C, r->x.strided);
  r->dk = tensor(t, grad, r->at.TK, r->I, r->x.C, r->x.strided);
  r->dw = OT_NEW(t, grad, T, r->x.J);
}

static index_run make(ot *t, index_case x) {
  index_run r = {.x = x};
  r.at = num_attn_new(t, x.a);
  shell(t, &r);
  ref_attn ref = num_attn_ref(t, &r.at);
  double *lse = ot_doubles(t, r.lse->n);
  ref_attn_forward(&ref, ot_doubles(t, r.at.pack.T * x.a.H * x.a.DV + 1), lse);
  ot_set(r.lse, lse);
  ot_fill_normal(t, r.iq, 1), ot_fill_normal(t, r.ik, 1), ot_fill_normal(t, r.w, 1);
  ot_fill_normal(t, r.dloss, 1);
  ot_tensor *rows[] = {r.lse, r.iq, r.w, r.dloss};
  for (int i = 0; i < 4; i++) num_poison_dead(rows[i], &r.at.pack, 0, 0);
  num_poison_dead(r.ik, &r.at.pack_k, 0, 0);
  make_calls(t, &r);
  return r;
}

static ref_index oracle(ot *t, const index_run *r) {
  const num_attn *a = &r->at.a;
  return (ref_index){.T = r->at.pack.T,
                     .TK = r->at.TK,
                     .B = a->B,
                     .H = a->H,
                     .KH = a->KH,
                     .D = a->D,
                     .J = r->x.J,
                     .I = r->I,
                     .C = r->x.C,
                     .q = ot_get(t, r->at.q),
                     .k = ot_get(t, r->at.k),
                     .lse = ot_get(t, r->lse),
                     .index_q = ot_get(t, r->iq),
                     .index_k = ot_get(t, r->ik),
                     .weight = r->x.weighted ? ot_get(t, r->w) : NULL,
                     .idx = ot_get_ints(t, r->at.idx),
                     .cu = r->at.pack.cu,
                     .cu_k = a->length_k ? r->at.pack_k.cu : NULL,
                     .q_offset = a->offset,
                     .block = a->block,
                     .top_n = a->top_n,
                     .index_scale = 0.7,
                     .relu = !r->x.dot};
}

static void near(const index_run *r, const char *what, const ot_tensor *x, const double *ref,
                 double gate) {
  const double off = ot_relrms(x, ref, 1e-3);
  cr_assert(off <= gate, "%s (%s): %s is off by %.3g, gate %.3g", r->x.name,
            rg_dtype_name(r->at.a.dtype), what, off, gate);
}

static void check(uint64_t seed, index_case x) {
  ot *t = ot_begin(seed);
  index_run r = make(t, x);
  ref_index ref = oracle(t, &r);
  double *loss = ot_doubles(t, r.loss->n), *dq = ot_doubles(t, r.dq->n),
         *dk = ot_doubles(t, r.dk->n), *dw = ot_doubles(t, r.dw->n);
  OT_OK(ot_run(r.forward, 2));
  OT_OK(ot_run(r.backward, 2));
  ref_index_forward(&ref, loss);
  ref_index_backward(&ref, ot_get(t, r.dloss), dq, dk, dw);
  /* the loss is a difference of logarithms, as lse is one: on a GPU its gate */
  near(&r, "loss", r.loss, loss, ot_on_gpu() ? NUM_LSE_GATE : num_gate(RG_F32));
  near(&r, "d.index_q", r.dq, dq, num_grad_gate(x.a.dtype, 0));
  near(&r, "d.index_k", r.dk, dk, num_grad_gate(x.a.dtype, 0));
  if (x.weighted) near(&r, "d.weight", r.dw, dw, num_grad_gate(x.a.dtype, 0));
  ot_end(t);
}

static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
static const int32_t some[] = {70, 0, 1, 130, 33};
#define ATTENTION .kind = REF_SLC, .B = 5, .length = some, .D = 32, .DV = 8
#define SOME      ATTENTION, .H = 4, .KH = 2

Test(index_loss, tokens_for_all_heads) {
  for (int i = 0; i < 6; i++)
    check(1 + (uint64_t)i,
          (index_case){.name = "tokens",
                       .a = {SOME, .block = 1, .top_n = 20, .one_idx = true, .dtype = types[i % 3]},
                       .J = 6,
                       .C = 24,
                       .weighted = i >= 3});
}

Test(index_loss, blocks_for_each_head) {
  for (int i = 0; i < 6; i++)
    check(11 + (uint64_t)i,
          (index_case){.name = "blocks",
                       .a = {SOME, .block = 16, .top_n = 3, .dtype = types[i % 3]},
                       .J = 2 + 2 * (i % 2),
                       .C = 40,
                       .dot = i < 3,
                       .weighted = i >= 3,
                       .wide = i % 2});
}

Test(index_loss, lengths_and_rows) {
  for (num_idx x = NUM_IDX_RANDOM; x <= NUM_IDX_FUTURE; x++) {
    check(20 + x, (index_case){.name = "rows of idx",
                               .a = {SOME, .block = 8, .top_n = 5, .idx = x, .one_idx = true},
                               .J = 3,
                               .C = 16,
                               .weighted = true});
    check(30 + x, (index_case){.name = "lengths",
                               .a = {.kind = REF_SLC,
                                     .B = 13,
                                     .length = num_lengths,
                                     .D = 16,
                                     .DV = 8,
                                     .H = 2,
                                     .KH = 1,
                                     .block = 32,
                                     .top_n = 2,
                                     .idx = x},
                               .J = 1,
                               .C = 7});
  }
}

Test(index_loss, chunks_and_strides) {
  static const int32_t keys[] = {200, 64, 65, 150, 33}, offset[] = {130, 64, 64, 20, 0};
  index_case x = {.name = "chunks",
                  .a = {SOME, .length_k = keys, .offset = offset, .block = 16, .top_n = 4},
                  .J = 4,
                  .C = 24,
                  .weighted = true};
  check(41, x);
  x.strided = true, x.a.strided = 1, x.a.dtype = RG_BF16;
  check(42, x);
}

Test(index_loss, wide_heads) {
  check(43, (index_case){.name = "wide",
                         .a = {.kind = REF_SLC,
                               .B = 5,
                               .length = some,
                               .D = 576,
                               .DV = 8,
                               .H = 3,
                               .KH = 1,
                               .block = 1,
                               .top_n = 9,
                               .one_idx = true,
                               .dtype = RG_BF16},
                         .J = 2,
                         .C = 128});
}

/* More heads and keys than a tile has, lists of keys longer than are read at once. */
Test(index_loss, tiles) {
  const num_attn wide = {ATTENTION, .block = 1, .top_n = 150, .one_idx = true, .dtype = RG_BF16};
  index_case x = {.name = "tiles", .a = wide, .J = 64, .C = 128, .weighted = true};
  x.a.D = 576, x.a.H = 70, x.a.KH = 1;
  check(80, x);
  x.a.D = 72, x.a.H = 8, x.a.KH = 2, x.a.idx = NUM_IDX_GARBAGE;
  x.J = 33, x.C = 56, x.wide = true;
  check(81, x);
  x.a.one_idx = false, x.a.block = 16, x.a.top_n = 9, x.a.idx = NUM_IDX_RANDOM;
  x.J = 6, x.weighted = false, x.dot = true;
  check(82, x);
}

Test(index_loss, repeats_threads_and_sums) {
  for (int i = 0; i < 3; i++) {
    ot *t = ot_begin(50 + (uint64_t)i);
    index_run r = make(
        t, (index_case){.name = "repeats",
                        .a = {SOME, .block = 8, .top_n = 4, .one_idx = i == 1, .dtype = types[i]},
                        .J = 4,
                        .C = 24,
                        .weighted = true});
    OT_OK(ot_run_repeated(r.forward, 10));
    OT_OK(ot_run_repeated(r.backward, 10));
    OT_OK(ot_check_sums(r.backward));
    ot_end(t);
  }
}

Test(index_loss, alone_and_packed) {
  ot *t = ot_begin(60);
  index_run r = make(t, (index_case){.name = "packed",
                                     .a = {SOME, .block = 8, .top_n = 4, .dtype = RG_BF16},
                                     .J = 4,
                                     .C = 24,
                                     .weighted = true});
  OT_OK(ot_run(r.forward, 2));
  OT_OK(ot_run(r.backward, 2));
  for (int64_t b = 0; b < r.at.a.B; b++) {
    const int64_t row = r.at.pack.cu[b], n = some[b];
    index_run one = {.x = r.x};
    one.at = num_attn_alone(t, &r.at, b);
    shell(t, &one);
    ot_set(one.lse, ot_get(t, r.lse) + row * 4);
    ot_set(one.iq, ot_get(t, r.iq) + row * 4 * 24);
    ot_set(one.ik, ot_get(t, r.ik) + row * r.I * 24);
    ot_set(one.w, ot_get(t, r.w) + row * 4);
    ot_set(one.dloss, ot_get(t, r.dloss) + row * r.I);
    make_calls(t, &one);
    OT_OK(ot_run(one.forward, 1));
    OT_OK(ot_run(one.backward, 1));
    cr_assert(ot_same_rows(one.loss, 0, r.loss, row, n) && ot_same_rows(one.dq, 0, r.dq, row, n) &&
                  ot_same_rows(one.dk, 0, r.dk, row, n) && ot_same_rows(one.dw, 0, r.dw, row, n),
              "sequence %lld", (long long)b);
  }
  ot_end(t);
}

/* The oracle's gradient along a direction, against differences of its loss. */
Test(index_loss, oracle_by_finite_differences) {
  for (int i = 0; i < 2; i++) {
    ot *t = ot_begin(70 + (uint64_t)i);
    index_run r = make(t, (index_case){.name = "oracle",
                                       .a = {SOME, .block = 8, .top_n = 3},
                                       .J = 4,
                                       .C = 6,
                                       .dot = i == 1,
                                       .weighted = i == 0});
    ref_index a = oracle(t, &r);
    const double *up = ot_get(t, r.dloss);
    double *moved[] = {ot_get(t, r.iq), ot_get(t, r.ik), ot_get(t, r.w)},
           *grad[] = {ot_doubles(t, r.dq->n), ot_doubles(t, r.dk->n), ot_doubles(t, r.dw->n)},
           *loss = ot_doubles(t, r.loss->n);
    const int64_t size[] = {r.iq->n, r.ik->n, r.w->n};
    a.index_q = moved[0], a.index_k = moved[1];
    if (a.weight) a.weight = moved[2];
    ref_index_backward(&a, up, grad[0], grad[1], grad[2]);
    for (int k = 0; k < (a.weight ? 3 : 2); k++) {
      const double step = 1e-6;
      double *way = ot_doubles(t, size[k]), slope = 0, difference = 0, scale = 0;
      for (int64_t n = 0; n < size[k]; n++) {
        way[n] = 2 * ot_uniform(t) - 1;
        if (grad[k][n] == 0) way[n] = 0; /* dead rows are not numbers */
        slope += way[n] * grad[k][n];
        scale += pow(way[n] * grad[k][n], 2);
      }
      for (int side = 1; side >= -1; side -= 2) {
        for (int64_t n = 0; n < size[k]; n++)
          if (way[n] != 0) moved[k][n] += side * step * way[n];
        ref_index_forward(&a, loss);
        for (int64_t n = 0; n < r.at.pack.live * r.I; n++)
          difference += side * up[n] * loss[n] / (2 * step);
        for (int64_t n = 0; n < size[k]; n++)
          if (way[n] != 0) moved[k][n] -= side * step * way[n];
      }
      cr_assert_float_eq(slope, difference, 1e-5 * sqrt(scale), "input %d: %g, should be %g", k,
                         slope, difference);
    }
    ot_end(t);
  }
}
