/* tests/harness/num.c: gates, packs, and the attention cases of the numerics tests. */
#include "num.h"
#include <math.h>
#include <string.h>

/* ---- gates ---- */

double num_gate(rg_dtype dtype) {
  return dtype == RG_F32 ? 2e-6 : dtype == RG_BF16 ? 4e-3 : 5e-4;
}

double num_grad_gate(rg_dtype dtype, double hot) {
  if (dtype == RG_F32) return hot >= 64 ? 3e-5 : hot >= 8 ? 1e-5 : 5e-6;
  /* In 16 bits the page stops at × 8. At × 64 a row is nearly one key, and what is left of d_o·v −
   * d_o·o after the rounding of o is relatively less still: twice the gate. */
  double more = hot >= 64 ? 2 : 1;
  if (dtype == RG_BF16) return hot >= 8 ? 1e-2 * more : 6e-3;
  return hot >= 8 ? 1.2e-3 * more : 8e-4;
}

const int32_t num_lengths[] = {1, 31, 0, 32, 33, 63, 64, 65, 0, 507, 15, 17, 2};
const int num_nlengths = 13;

/* ---- packs ---- */

ot_tensor *num_ints(ot *t, int64_t n, const int32_t *x) {
  ot_tensor *a = OT_NEW(t, RG_I32, n);
  ot_set_ints(a, x);
  return a;
}

num_pack num_pack_new(ot *t, int64_t B, const int32_t *length, int64_t slack) {
  num_pack p = {.B = B, .cu = ot_ints(t, B + 1)};
  for (int64_t b = 0; b < B; b++) p.cu[b + 1] = p.cu[b] + length[b];
  p.live = p.cu[B];
  p.T = p.live + slack;
  p.tensor = num_ints(t, B + 1, p.cu);
  return p;
}

/* First row at or after `from` that belongs to no block; its run of such rows ends before *to. */
static int64_t next_gap(const num_pack *p, int64_t b, int64_t kernel, int64_t stride, int64_t rows,
                        int64_t *to) {
  if (stride == 0) {
    *to = rows;
    return b == p->B ? p->live : rows;
  }
  int64_t from =
      b == 0 ? 0 : p->cu[b - 1] / stride + ref_blocks(p->cu[b] - p->cu[b - 1], kernel, stride);
  *to = b == p->B ? rows : p->cu[b] / stride;
  return from;
}

void num_poison_dead(ot_tensor *a, const num_pack *p, int64_t kernel, int64_t stride) {
  for (int64_t b = 0; b <= p->B; b++) {
    int64_t to, from = next_gap(p, b, kernel, stride, a->arg.dim[0], &to);
    if (from < to) ot_poison_rows(a, from, to);
  }
}

bool num_dead_is_zero(const ot_tensor *a, const num_pack *p, int64_t kernel, int64_t stride) {
  for (int64_t b = 0; b <= p->B; b++) {
    int64_t to, from = next_gap(p, b, kernel, stride, a->arg.dim[0], &to);
    if (from < to && !ot_zero_rows(a, from, to)) return false;
  }
  return true;
}

/* ---- attention: inputs ---- */

const rg_op *num_attn_op(ref_kind kind) {
  return kind == REF_CMP ? &rgi_op_cmp_attn : kind == REF_SLC ? &rgi_op_slc_attn : &rgi_op_swa_attn;
}
const rg_op *num_attn_bwd_op(ref_kind kind) {
  return kind == REF_CMP   ? &rgi_op_cmp_attn_bwd
         : kind == REF_SLC ? &rgi_op_slc_attn_bwd
                           : &rgi_op_swa_attn_bwd;
}

static ot_tensor *tensor3(ot *t, rg_dtype dtype, int64_t n, int64_t h, int64_t d, int holes) {
  const int64_t dim[] = {n, h, d}, pad[] = {5 * holes, 3 * holes, 0};
  return ot_new(t, dtype, 3, dim, holes ? pad : NULL);
}

/* The first d columns of x, in its memory. */
static ot_tensor *first_columns(ot *t, const ot_tensor *x, int64_t d) {
  const int64_t dim[] = {x->arg.dim[0], x->arg.dim[1], d};
  ot_tensor *y = ot_wrap(t, x->arg.data, x->arg.dtype, 3, dim, x->arg.stride);
  y->block = x->block;
  y->bytes = x->bytes;
  return y;
}

static void fill_idx_row(ot *t, const num_attn *a, int64_t i, int64_t length_k, int64_t row,
                         int32_t *idx) {
  int64_t own = i / a->block, last = (length_k - 1) / a->block, n = 0;
  if (last > own) last = own;
  for (int64_t c = 0; c < a->top_n; c++) idx[c] = -1;
  if (length_k == 0 || (a->idx == NUM_IDX_SHORT && row % 5 == 0)) return;
  if (a->idx == NUM_IDX_SAME) {
    idx[n++] = 0;
    if (last > 0 && a->top_n > 1) idx[n++] = (int32_t)last;
    return;
  }
  if (a->idx == NUM_IDX_FUTURE && row % 3 == 0) {
    idx[0] = (int32_t)own + 1;
    return;
  }
  int64_t want = a->idx == NUM_IDX_SHORT ? 1 + ot_below(t, a->top_n) : a->top_n;
  for (int64_t b = 0; b <= last && n < want;
       b++) { /* each with the odds that leave room for all still wanted */
    int64_t left = last - b + 1;
    if (b == last || ot_below(t, left) < want - n) idx[n++] = (int32_t)b;
  }
  if (a->idx != NUM_IDX_GARBAGE) return;
  for (int64_t c = 1; c < a->top_n; c++) /* repeat the one before, which does not count */
    if (idx[c] >= 0 && row % 2 == 0 && ot_below(t, 3) == 0) idx[c] = idx[c - 1];
  if (n < a->top_n)
    idx[n++] = (int32_t)(row % 3 == 0 ? own + 1 : row % 3 == 1 ? last + 1000000 : INT32_MAX);
  if (n < a->top_n) idx[n++] = row % 2 ? -7 : INT32_MIN;
}

static ot_tensor *make_idx(ot *t, const num_attn *a, const num_pack *p, const num_pack *pk) {
  const int64_t heads = a->one_idx ? 1 : a->KH;
  ot_tensor *x = OT_NEW(t, RG_I32, p->T, heads, a->top_n);
  int32_t *idx = ot_ints(t, x->n);
  for (int64_t b = 0; b < p->B; b++)
    for (int64_t r = p->cu[b]; r < p->cu[b + 1]; r++)
      for (int64_t h = 0; h < heads; h++)
        fill_idx_row(t, a, r - p->cu[b] + (a->offset ? a->offset[b] : 0), pk->cu[b + 1] - pk->cu[b],
                     r, idx + (r * heads + h) * a->top_n);
  ot_set_ints(x, idx);
  return x;
}

static void fill(ot *t, const num_attn *a, ot_tensor *x, double times) {
  if (a->outliers)
    ot_fill_outliers(t, x);
  else
    ot_fill_normal(t, x, times);
}

/* Everything but contents. */
static num_attn_run shell(ot *t, num_attn a, int64_t slack) {
  num_attn_run r = {.a = a};
  r.pack = num_pack_new(t, a.B, a.length, slack);
  r.pack_k = a.length_k ? num_pack_new(t, a.B, a.length_k, slack) : r.pack;
  r.TK = a.kind == REF_CMP ? r.pack_k.T / a.stride : r.pack_k.T;
  r.q = tensor3(t, a.dtype, r.pack.T, a.H, a.D, a.strided);
  r.k = tensor3(t, a.dtype, r.TK, a.KH, a.D, a.strided);
  r.v = a.latent ? first_columns(t, r.k, a.DV) : tensor3(t, a.dtype, r.TK, a.KH, a.DV, a.strided);
  r.d_o = tensor3(t, a.dtype, r.pack.T, a.H, a.DV, a.strided);
  r.d_lse = a.d_lse ? OT_NEW(t, RG_F32, r.pack.T, a.H) : NULL;
  r.sinks = a.sinks ? OT_NEW(t, a.dtype, a.H) : NULL;
  r.offset = a.offset ? num_ints(t, a.B, a.offset) : NULL;
  return r;
}

static void poison_dead(num_attn_run *r) {
  int64_t kernel = r->a.kind == REF_CMP ? r->a.kernel : 0,
          stride = r->a.kind == REF_CMP ? r->a.stride : 0;
  num_poison_dead(r->q, &r->pack, 0, 0);
  num_poison_dead(r->d_o, &r->pack, 0, 0);
  if (r->d_lse) num_poison_dead(r->d_lse, &r->pack, 0, 0);
  num_poison_dead(r->k, &r->pack_k, kernel, stride);
  num_poison_dead(r->v, &r->pack_k, kernel, stride);
  if (r->idx) num_poison_dead(r->idx, &r->pack, 0, 0);
}

num_attn_run num_attn_new(ot *t, num_attn a) {
  num_attn_run r = shell(t, a, 9);
  fill(t, &a, r.q, a.hot != 0 ? a.hot : 1);
  fill(t, &a, r.k, 1);
  fill(t, &a, r.v, 1);
  fill(t, &a, r.d_o, 1);
  if (r.d_lse) ot_fill_normal(t, r.d_lse, 1);
  if (r.sinks) ot_fill_normal(t, r.sinks, 1);
  if (a.kind == REF_SLC) r.idx = make_idx(t, &r.a, &r.pack, &r.pack_k);
  poison_dead(&r);
  return r;
}

num_attn_run num_attn_again(ot *t, const num_attn_run *from, bool strided) {
  num_attn a = from->a;
  a.strided = strided ? 8 : 0; /* aligned still: the same kernels, hence the same bits */
  num_attn_run r = shell(t, a, 9);
  ot_copy(r.q, from->q);
  ot_copy(r.k, from->k);
  ot_copy(r.v, from->v);
  ot_copy(r.d_o, from->d_o);
  if (r.d_lse) ot_copy(r.d_lse, from->d_lse);
  if (r.sinks) ot_copy(r.sinks, from->sinks);
  if (from->idx) {
    const int64_t pad[] = {3, 2, 0};
    r.idx = ot_like(t, from->idx, strided ? pad : NULL);
    ot_copy(r.idx, from->idx);
  }
  return r;
}

/* Rows [from, from + n) of x become the first rows of y. */
static void copy_rows(ot_tensor *y, const ot_tensor *x, int64_t from, int64_t n) {
  ot_tensor to = *y, part = *x;
  part.arg.data =
      (char *)x->arg.data + from * x->arg.stride[0] * (int64_t)rg_dtype_size(x->arg.dtype);
  to.n = x->arg.dim[0] ? x->n / x->arg.dim[0] * n : 0;
  ot_copy(&to, &part);
}

/* Queries [first, first + n) of sequence b, as a says for one sequence. */
static num_attn_run take_queries(ot *t, const num_attn_run *from, num_attn a, int64_t b,
                                 int64_t first, int64_t n) {
  a.B = 1;
  num_attn_run r = shell(t, a, 0);
  const int64_t row = from->pack.cu[b] + first, key = from->pack_k.cu[b],
                row_k = a.kind == REF_CMP ? key / a.stride : key;
  copy_rows(r.q, from->q, row, n);
  copy_rows(r.d_o, from->d_o, row, n);
  if (r.d_lse) copy_rows(r.d_lse, from->d_lse, row, n);
  copy_rows(r.k, from->k, row_k, r.TK);
  copy_rows(r.v, from->v, row_k, r.TK);
  if (r.sinks) ot_copy(r.sinks, from->sinks);
  if (from->idx) {
    r.idx = OT_NEW(t, RG_I32, r.pack.T, from->idx->arg.dim[1], a.top_n);
    copy_rows(r.idx, from->idx, row, n);
  }
  poison_dead(&r);
  return r;
}

num_attn_run num_attn_alone(ot *t, const num_attn_run *from, int64_t b) {
  num_attn a = from->a;
  int32_t *length = ot_ints(t, 3);
  const num_pack *p = &from->pack, *pk = &from->pack_k;
  length[0] = p->cu[b + 1] - p->cu[b];
  length[1] = pk->cu[b + 1] - pk->cu[b];
  length[2] = a.offset ? a.offset[b] : 0;
  a.length = length;
  a.length_k = a.length_k ? length + 1 : NULL;
  a.offset = a.offset ? length + 2 : NULL;
  return take_queries(t, from, a, b, 0, length[0]);
}

num_attn_run num_attn_queries(ot *t, const num_attn_run *from, int64_t b, int64_t first,
                              int64_t n) {
  num_attn a = from->a;
  int32_t *length = ot_ints(t, 3);
  const num_pack *pk = &from->pack_k;
  length[0] = (int32_t)n;
  length[1] = pk->cu[b + 1] - pk->cu[b];
  length[2] = (a.offset ? a.offset[b] : 0) + (int32_t)first;
  a.length = length;
  a.length_k = length + 1;
  a.offset = length + 2;
  return take_queries(t, from, a, b, first, n);
}

/* ---- attention: calls ---- */

static void common(ot_call *c, const num_attn_run *r) {
  const num_attn *a = &r->a;
  if (a->isa > 0) ot_set_isa(c, a->isa - 1);
  ot_in(c, "q", r->q);
  ot_in(c, "k", r->k);
  ot_in(c, "v", r->v);
  if (r->idx) ot_in(c, "idx", r->idx);
  ot_in(c, "cu_seqlens", r->pack.tensor);
  if (a->length_k) ot_in(c, "cu_seqlens_k", r->pack_k.tensor);
  if (r->offset) ot_in(c, "q_offset", r->offset);
  if (r->sinks) ot_in(c, "sinks", r->sinks);
  if (a->scale != 0) ot_float(c, "scale", a->scale);
  if (a->softcap != 0) ot_float(c, "softcap", a->softcap);
  if (a->kind == REF_CMP) {
    ot_int(c, "kernel", a->kernel);
    ot_int(c, "stride", a->stride);
  } else if (a->kind == REF_SLC) {
    ot_int(c, "block", a->block);
  } else {
    ot_int(c, "window_left", a->window_left);
  }
}

void num_attn_calls(ot *t, num_attn_run *r) {
  const num_attn *a = &r->a;
  rg_dtype grad = a->wide_grads ? RG_F32 : a->dtype;
  r->o = tensor3(t, a->dtype, r->pack.T, a->H, a->DV, a->strided);
  r->lse = OT_NEW(t, RG_F32, r->pack.T, a->H);
  r->forward = ot_call_new(t, num_attn_op(a->kind));
  common(r->forward, r);
  ot_out(r->forward, "o", r->o);
  ot_out(r->forward, "lse", r->lse);

  r->dq = tensor3(t, grad, r->pack.T, a->H, a->D, a->strided);
  r->dk = tensor3(t, grad, r->TK, a->KH, a->D, a->strided);
  r->dv = a->joined ? NULL : tensor3(t, grad, r->TK, a->KH, a->DV, a->strided);
  r->dsinks = a->sinks ? OT_NEW(t, grad, a->H) : NULL;
  r->backward = ot_call_new(t, num_attn_bwd_op(a->kind));
  common(r->backward, r);
  if (r->delta)
    ot_in(r->backward, "delta.o", r->delta);
  else
    ot_in_if(r->backward, "out.o", r->o);
  ot_in_if(r->backward, "out.lse", r->lse);
  ot_in(r->backward, "grad.o", r->d_o);
  if (r->d_lse) ot_in(r->backward, "grad.lse", r->d_lse);
  ot_out(r->backward, "d.q", r->dq);
  ot_out(r->backward, "d.k", r->dk);
  if (a->joined)
    ot_int(r->backward, "joined", 1);
  else
    ot_out(r->backward, "d.v", r->dv);
  if (r->dsinks) ot_out(r->backward, "d.sinks", r->dsinks);
}

ref_attn num_attn_ref(ot *t, const num_attn_run *r) {
  const num_attn *a = &r->a;
  return (ref_attn){.kind = a->kind,
                    .T = r->pack.T,
                    .TK = r->TK,
                    .B = a->B,
                    .H = a->H,
                    .KH = a->KH,
                    .D = a->D,
                    .DV = a->DV,
                    .q = ot_get(t, r->q),
                    .k = ot_get(t, r->k),
                    .v = ot_get(t, r->v),
                    .cu = r->pack.cu,
                    .cu_k = a->length_k ? r->pack_k.cu : NULL,
                    .q_offset = a->offset,
                    .sinks = r->sinks ? ot_get(t, r->sinks) : NULL,
                    .scale = a->scale,
                    .softcap = a->softcap,
                    .kernel = a->kernel,
                    .stride = a->stride,
                    .idx = r->idx ? ot_get_ints(t, r->idx) : NULL,
                    .one_idx = a->one_idx,
                    .block = a->block,
                    .top_n = a->top_n,
                    .window_left = a->window_left};
}

/* ---- attention: gates ---- */

static const char *gate(ot *t, const num_attn *a, const char *what, double got, double limit) {
  if (got <= limit) return NULL; /* a NaN fails */
  return ot_text(t, "%s (%s, D %d, DV %d, H %d/%d): %s is off by %.3g, gate %.3g", a->name,
                 rg_dtype_name(a->dtype), (int)a->D, (int)a->DV, (int)a->H, (int)a->KH, what, got,
                 limit);
}

const char *num_attn_check(ot *t, num_attn a) {
  num_attn_run r = num_attn_new(t, a);
  num_attn_calls(t, &r);
  ref_attn ref = num_attn_ref(t, &r);
  const char *bad = ot_run(r.forward, 2);
  if (!bad) bad = ot_run(r.backward, 2);
  if (bad) return ot_text(t, "%s: %s", a.name, bad);

  double floor = a.floor != 0 ? a.floor : 1e-3,
         floor_grad = a.floor_grad != 0 ? a.floor_grad : 1e-3;
  double limit = a.o_gate != 0 ? a.o_gate : num_gate(a.dtype),
         limit_grad = num_grad_gate(a.dtype, a.hot);
  double *o = ot_doubles(t, r.o->n), *lse = ot_doubles(t, r.lse->n);
  ref_attn_forward(&ref, o, lse);
  if ((bad = gate(t, &a, "o", ot_relrms(r.o, o, floor), limit)) != NULL) return bad;
  if ((bad = gate(t, &a, "lse", ot_lse_error(r.lse, lse), NUM_LSE_GATE)) != NULL) return bad;

  const int64_t keys = r.TK * a.KH;
  double *dq = ot_doubles(t, r.dq->n), *dk = ot_doubles(t, r.dk->n),
         *dv = ot_doubles(t, keys * a.DV);
  double *dsinks = ot_doubles(t, a.H);
  ref_attn_backward(&ref, ot_get(t, r.d_o), r.d_lse ? ot_get(t, r.d_lse) : NULL, dq, dk, dv,
                    dsinks);
  for (int64_t i = 0; a.joined && i < keys; i++)
    for (int64_t e = 0; e < a.DV; e++) dk[i * a.D + e] += dv[i * a.DV + e];
  if ((bad = gate(t, &a, "dq", ot_relrms(r.dq, dq, floor_grad), limit_grad)) != NULL) return bad;
  if ((bad = gate(t, &a, "dk", ot_relrms(r.dk, dk, floor_grad), limit_grad)) != NULL) return bad;
  if (r.dv && (bad = gate(t, &a, "dv", ot_relrms(r.dv, dv, floor_grad), limit_grad)) != NULL)
    return bad;
  if (r.dsinks &&
      (bad = gate(t, &a, "dsinks", ot_relrms(r.dsinks, dsinks, floor_grad), limit_grad)) != NULL)
    return bad;

  int64_t kernel = a.kind == REF_CMP ? a.kernel : 0, stride = a.kind == REF_CMP ? a.stride : 0;
  if (!num_dead_is_zero(r.dk, &r.pack_k, kernel, stride) ||
      (r.dv && !num_dead_is_zero(r.dv, &r.pack_k, kernel, stride)))
    return ot_text(t, "%s: dk or dv is not zero in rows without a key", a.name);
  return NULL;
}
