/* tests/unit/test_num_delta.c: combine's gradient in parts, and attention's backward with the
 * sum that a part hands on: the same bits as of the ops that do it all at once.
 */
#include "../harness/num.h"
#include "graph/ir.h"
#include <criterion/criterion.h>
#include <string.h>

static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
static const char *const act_name[] = {"sigmoid", "softmax", "none"};
static const char *const order_name[] = {"none", "chain", "lanes"};
static const int32_t some[] = {70, 0, 1, 130, 33};
static const int64_t holes[] = {48, 16, 0};

enum { MOST = 4 };

/* A combine of n branches, whole and in parts. */
typedef struct blend {
  int act, n;
  rg_dtype dtype, gate_dtype;
  num_pack pack;
  ot_tensor *o[MOST], *gate, *grad, *d[MOST], *d_gate;
  ot_tensor *part_d[MOST], *product[MOST], *delta[MOST], *part_gate;
} blend;

static blend blend_new(ot *t, num_pack pack, int act, int n, rg_dtype dtype, rg_dtype gate_dtype,
                       rg_dtype grad, int64_t H, int64_t E, bool strided) {
  blend b = {.act = act, .n = n, .dtype = dtype, .gate_dtype = gate_dtype, .pack = pack};
  const int64_t dim[] = {pack.T, H, E}, gates[] = {pack.T, H, n};
  const int64_t *pad = strided ? holes : NULL;
  for (int k = 0; k < n; k++) {
    b.o[k] = ot_new(t, dtype, 3, dim, pad);
    b.d[k] = ot_new(t, grad, 3, dim, pad);
    b.part_d[k] = ot_new(t, grad, 3, dim, pad);
    b.product[k] = OT_NEW(t, RG_F32, pack.T, H);
    b.delta[k] = OT_NEW(t, RG_F32, pack.T, H);
    ot_fill_normal(t, b.o[k], 1);
    ot_poison_rows(b.o[k], pack.live, pack.T);
  }
  b.gate = ot_new(t, gate_dtype, 3, gates, pad);
  b.grad = ot_new(t, dtype, 3, dim, pad);
  b.d_gate = ot_new(t, gate_dtype, 3, gates, pad);
  b.part_gate = ot_new(t, gate_dtype, 3, gates, pad);
  ot_fill_normal(t, b.gate, 2);
  ot_fill_normal(t, b.grad, 1);
  ot_poison_rows(b.gate, pack.live, pack.T);
  ot_poison_rows(b.grad, pack.live, pack.T);
  return b;
}

static ot_call *whole(ot *t, const blend *b) {
  ot_call *c = ot_call_new(t, &rgi_op_combine_bwd);
  ot_choice(c, "act", act_name[b->act]);
  for (int k = 0; k < b->n; k++) ot_in(c, "o", b->o[k]);
  ot_in(c, "gate", b->gate);
  ot_in(c, "cu_seqlens", b->pack.tensor);
  ot_in(c, "grad.o", b->grad);
  for (int k = 0; k < b->n; k++) ot_out(c, "d.o", b->d[k]);
  ot_out(c, "d.gate", b->d_gate);
  return c;
}

static ot_call *branch(ot *t, const blend *b, int k, rgi_delta order) {
  ot_call *c = ot_call_new(t, &rgi_op_combine_branch_bwd);
  ot_choice(c, "act", act_name[b->act]);
  ot_int(c, "branch", k);
  ot_choice(c, "order", order_name[order]);
  ot_in(c, "o", b->o[k]);
  ot_in(c, "gate", b->gate);
  ot_in(c, "cu_seqlens", b->pack.tensor);
  ot_in(c, "grad.o", b->grad);
  ot_out(c, "d.o", b->part_d[k]);
  return c;
}

static ot_call *gates(ot *t, const blend *b) {
  ot_call *c = ot_call_new(t, &rgi_op_combine_gates_bwd);
  ot_choice(c, "act", act_name[b->act]);
  for (int k = 0; k < b->n; k++) ot_in(c, "product", b->product[k]);
  ot_in(c, "gate", b->gate);
  ot_in(c, "cu_seqlens", b->pack.tensor);
  ot_out(c, "d.gate", b->part_gate);
  return c;
}

/* delta against the definition; a chain rounds more than a tree. */
static void check_delta(ot *t, const blend *b, int k) {
  const double *o = ot_get(t, b->o[k]), *d = ot_get(t, b->part_d[k]);
  double *ref = ot_doubles(t, b->delta[k]->n);
  const int64_t E = b->o[k]->arg.dim[2], live = b->pack.live * b->o[k]->arg.dim[1];
  for (int64_t r = 0; r < live; r++)
    for (int64_t e = 0; e < E; e++) ref[r] += o[r * E + e] * d[r * E + e];
  const double off = ot_relrms(b->delta[k], ref, 1e-3);
  cr_assert_leq(off, 1e-5, "delta of width %d is off by %g", (int)E, off);
  cr_assert(ot_zero_rows(b->delta[k], b->pack.live, b->pack.T));
  cr_assert(ot_zero_rows(b->product[k], b->pack.live, b->pack.T));
}

static void in_parts(uint64_t seed, int act, int n, rg_dtype dtype, rg_dtype gate, rg_dtype grad,
                     int64_t E, bool strided) {
  ot *t = ot_begin(seed);
  num_pack pack = num_pack_new(t, 5, some, 9);
  blend b = blend_new(t, pack, act, n, dtype, gate, grad, 3, E, strided);
  OT_OK(ot_run(whole(t, &b), 2));
  for (int k = 0; k < n; k++) {
    ot_call *c = branch(t, &b, k, (rgi_delta)(1 + k % 2));
    ot_out(c, "product", b.product[k]);
    ot_out(c, "delta", b.delta[k]);
    OT_OK(ot_run_repeated(c, 2));
    cr_assert(ot_same_bits(b.d[k], b.part_d[k]), "d.o, %s, %s, width %d", act_name[act],
              rg_dtype_name(dtype), (int)E);
    check_delta(t, &b, k);
  }
  OT_OK(ot_run_repeated(gates(t, &b), 2));
  cr_assert(ot_same_bits(b.d_gate, b.part_gate), "d.gate, %s, %s, width %d", act_name[act],
            rg_dtype_name(dtype), (int)E);
  ot_end(t);
}

Test(parts, have_the_bits_of_the_whole) {
  static const int64_t width[] = {1, 7, 64, 100, 128, 192, 256};
  for (int act = 0; act < 3; act++)
    for (int i = 0; i < 3; i++)
      for (int w = 0; w < 7; w++) {
        const bool odd = w % 2;
        in_parts((uint64_t)(100 * act + 10 * i + w), act, 1 + (w + act) % MOST, types[i],
                 odd ? RG_F32 : types[i], w == 3 ? RG_F32 : types[i], width[w], odd && w < 4);
      }
}

/* What is wanted beside it changes no bit, and sums are added to. */
Test(parts, sums_and_absent_outputs) {
  for (int i = 0; i < 3; i++) {
    ot *t = ot_begin(500 + (uint64_t)i);
    blend b =
        blend_new(t, num_pack_new(t, 5, some, 9), i, 3, types[i], types[i], types[i], 3, 72, false);
    for (int k = 0; k < 3; k++) {
      ot_call *all = branch(t, &b, k, RGI_DELTA_LANES), *one = branch(t, &b, k, RGI_DELTA_LANES);
      ot_out(all, "product", b.product[k]);
      ot_out(all, "delta", b.delta[k]);
      OT_OK(ot_run(all, 2));
      ot_tensor *d = ot_like(t, b.part_d[k], NULL);
      ot_copy(d, b.part_d[k]);
      OT_OK(ot_run(one, 2));
      cr_assert(ot_same_bits(d, b.part_d[k]));
      OT_OK(ot_check_sums(one));
      ot_call *product = ot_call_new(t, &rgi_op_combine_branch_bwd);
      ot_choice(product, "act", act_name[i]);
      ot_int(product, "branch", k);
      ot_in(product, "o", b.o[k]);
      ot_in(product, "gate", b.gate);
      ot_in(product, "cu_seqlens", b.pack.tensor);
      ot_in(product, "grad.o", b.grad);
      ot_tensor *alone = ot_like(t, b.product[k], NULL);
      ot_out(product, "product", alone);
      OT_OK(ot_run(product, 2));
      cr_assert(ot_same_bits(alone, b.product[k]));
    }
    OT_OK(ot_run(gates(t, &b), 2));
    OT_OK(ot_check_sums(gates(t, &b)));
    ot_end(t);
  }
}

/* ---- attention ---- */

/* The backward with o and the one with delta. */
static void handed_on(uint64_t seed, num_attn a) {
  ot *t = ot_begin(seed);
  num_attn_run r = num_attn_new(t, a);
  num_attn_calls(t, &r);
  OT_OK(ot_run(r.forward, 2));
  blend b = blend_new(t, r.pack, (int)(seed % 3), 2, a.dtype, a.dtype, a.dtype, a.H, a.DV, false);
  b.o[1] = r.o;
  ot_call *c = branch(t, &b, 1, RGI_DELTA_CHAIN);
  OT_OK(ot_run(c, 2));
  r.d_o = b.part_d[1];
  num_attn_run with = r;
  num_attn_calls(t, &r);
  OT_OK(ot_run(r.forward, 2));
  OT_OK(ot_run(r.backward, 2));
  const int order = ot_delta(r.backward);
  cr_assert_neq(order, RGI_DELTA_NONE, "%s takes no delta", a.name);
  with.delta = b.delta[1];
  c = branch(t, &b, 1, (rgi_delta)order);
  ot_out(c, "delta", with.delta);
  OT_OK(ot_run(c, 2));
  num_attn_calls(t, &with);
  OT_OK(ot_run(with.forward, 2));
  OT_OK(ot_run_repeated(with.backward, 1));
  cr_assert(ot_same_bits(r.dq, with.dq), "%s, %s, width %d: d.q", a.name, rg_dtype_name(a.dtype),
            (int)a.DV);
  cr_assert(ot_same_bits(r.dk, with.dk), "%s, %s, width %d: d.k", a.name, rg_dtype_name(a.dtype),
            (int)a.DV);
  cr_assert(ot_same_bits(r.dv, with.dv), "%s, %s, width %d: d.v", a.name, rg_dtype_name(a.dtype),
            (int)a.DV);
  if (r.dsinks) cr_assert(ot_same_bits(r.dsinks, with.dsinks), "%s: d.sinks", a.name);
  ot_end(t);
}

static void kinds(uint64_t seed, num_attn a) {
  static const int32_t lengths[] = {70, 0, 1, 230, 33};
  a.B = 5;
  a.length = lengths;
  num_attn kind[] = {a, a, a, a};
  kind[0].name = "cmp", kind[0].kind = REF_CMP, kind[0].kernel = 32, kind[0].stride = 16;
  kind[1].name = "slc", kind[1].kind = REF_SLC, kind[1].block = 64, kind[1].top_n = 3;
  kind[2].name = "swa", kind[2].kind = REF_SWA, kind[2].window_left = 40;
  kind[3].name = "dense", kind[3].kind = REF_SWA, kind[3].window_left = -1;
  for (int i = 0; i < 4; i++) handed_on(seed + (uint64_t)i, kind[i]);
}

Test(delta, stands_in_for_o) {
  static const int64_t width[][2] = {{16, 16},   {64, 64}, {128, 128},
                                     {192, 128}, {72, 40}, {256, 256}};
  for (int i = 0; i < 3; i++)
    for (int w = 0; w < 6; w++) {
      num_attn a = {.dtype = types[i], .H = 4, .KH = 2, .D = width[w][0], .DV = width[w][1]};
      kinds((uint64_t)(600 + 50 * i + 7 * w), a);
    }
}

Test(delta, with_sinks_and_gradients_of_lse) {
  for (int i = 0; i < 3; i++) {
    num_attn a = {
        .dtype = types[i], .H = 4, .KH = 1, .D = 128, .DV = 128, .sinks = true, .d_lse = true};
    kinds((uint64_t)(800 + 10 * i), a);
    a.softcap = 20;
    a.sinks = false;
    a.wide_grads = true;
    kinds((uint64_t)(840 + 10 * i), a);
    a.d_lse = false;
    a.softcap = 0;
    a.sinks = true;
    kinds((uint64_t)(880 + 10 * i), a);
  }
}
