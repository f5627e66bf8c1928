/* ops/attn.c: see attn.h. What a call of attention is; attn_calls.c answers what is asked of it. */
#include "attn.h"
#include "cuda/attn.h"

static const rgi_attn_kind *kind_of(const rg_call *c) {
  return c->op->rules->kind;
}
/* The op that has no backward of its own is one, but for those over pages. */
static bool is_backward(const rg_call *c) {
  return !c->op->backward && !kind_of(c)->paged;
}
/* idx stands after v and moves the later ports up by one. */
static int moved(const rg_call *c) {
  return kind_of(c)->mode == RGI_ATTN_SLC;
}

/* ---- checks ---- */

rg_status rgi_attn_check_rows(const rg_call *c, rg_error *e) {
  const int64_t T = rg_in(c, 0)->dim[0], S = rg_in(c, 1)->dim[0];
  if (rg_in(c, RGI_ATTN_CU_K + moved(c)) || T == RG_DIM_FREE || S == RG_DIM_FREE || T == S)
    return RG_OK;
  return rg_op_fail(e, RG_E_SHAPE, c,
                    "k has %lld rows and q %lld, expected the same without cu_seqlens_k",
                    (long long)S, (long long)T);
}

rg_status rgi_attn_check(const rg_call *c, rg_error *e) {
  const int x = moved(c);
  const rg_arg *q = rg_in(c, 0), *k = rg_in(c, 1), *v = rg_in(c, 2),
               *cu = rg_in(c, RGI_ATTN_CU + x);
  const int64_t H = q->dim[1], KH = k->dim[k->rank - 2], D = q->dim[2], E = v->dim[v->rank - 1];
  if (is_backward(c) && !rg_in(c, RGI_ATTN_OUT_O + x) == !rg_in(c, RGI_ATTN_DELTA + x))
    return rg_op_fail(e, RG_E_KEY, c, "backward needs one of out.o and delta.o");
  if (is_backward(c) && rg_in(c, RGI_ATTN_SUM_Q + x) &&
      (!rg_out(c, 0) || rg_out(c, 0)->dtype == RG_F32))
    return rg_op_fail(e, RG_E_KEY, c, "sum.q is of a d.q that is rounded, in place of acc.q");
  if (H != RG_DIM_FREE && KH != RG_DIM_FREE && (KH < 1 || H < 1 || H % KH != 0))
    return rg_op_fail(e, RG_E_SHAPE, c,
                      "%lld query heads are not a positive multiple of %lld KV heads", (long long)H,
                      (long long)KH);
  const int64_t I = x ? rg_in(c, 3)->dim[1] : 1;
  if (I != RG_DIM_FREE && KH != RG_DIM_FREE && I != 1 && I != KH)
    return rg_op_fail(e, RG_E_SHAPE, c, "idx has %lld heads, expected %lld as k, or 1 for all",
                      (long long)I, (long long)KH);
  if (D != RG_DIM_FREE && (D < 1 || D > RGI_ATTN_MAX_D))
    return rg_op_fail(e, RG_E_SHAPE, c, "head width %lld of q and k is not in 1 to %d",
                      (long long)D, RGI_ATTN_MAX_D);
  if (E != RG_DIM_FREE && (E < 1 || E > RGI_ATTN_MAX_D))
    return rg_op_fail(e, RG_E_SHAPE, c, "head width %lld of v is not in 1 to %d", (long long)E,
                      RGI_ATTN_MAX_D);
  if (c->gpu && (D > 256 || E > 256) && !rgi_cuda_attn_much_shared(c->gpu))
    return rg_op_fail(
        e, RG_E_LIMIT, c,
        "heads %lld wide need a GPU of compute capability 9 to 11; this one takes 256",
        (long long)(D > E ? D : E));
  if (cu->dim[0] != RG_DIM_FREE && cu->dim[0] < 1)
    return rg_op_fail(e, RG_E_SHAPE, c, "cu_seqlens is empty, expected at least its leading 0");
  return kind_of(c)->check(c, e);
}

/* ---- one call ---- */

rgi_attn rgi_attn_describe(const rg_call *c) {
  const int x = moved(c);
  rgi_attn a = {.mode = kind_of(c)->mode, .backward = is_backward(c)};
  kind_of(c)->own(&a, c->attr + RGI_ATTN_OWN);
  a.q = rg_in(c, 0), a.k = rg_in(c, 1), a.v = rg_in(c, 2), a.idx = x ? rg_in(c, 3) : NULL;
  a.cu = rg_in(c, RGI_ATTN_CU + x), a.sinks = rg_in(c, RGI_ATTN_SINKS + x);
  a.T = a.q->dim[0], a.H = a.q->dim[1], a.D = a.q->dim[2];
  a.KH = a.k->dim[a.k->rank - 2], a.E = a.v->dim[a.v->rank - 1];
  a.B = a.cu->dim[0] - 1;
  a.paged = kind_of(c)->paged;
  if (a.paged) {
    const int64_t tokens = a.mode == RGI_ATTN_CMP ? a.stride : 1; /* of a row */
    a.pages = (rgi_paged){.cu = a.cu->data,
                          .context = rg_in(c, RGI_ATTN_CONTEXT + x),
                          .pages = rg_in(c, RGI_ATTN_PAGES + x),
                          .page = a.k->dim[1] * tokens,
                          .P = a.k->dim[0]};
    a.S = a.pages.pages->dim[1] * a.k->dim[1];
  } else {
    a.cu_k = rg_in(c, RGI_ATTN_CU_K + x), a.offset = rg_in(c, RGI_ATTN_OFFSET + x);
    a.S = a.k->dim[0];
  }
  a.N = a.idx ? a.idx->dim[2] : 0;
  a.G = a.KH > 0 ? a.H / a.KH : 0;
  const double scale = c->attr[RGI_ATTN_SCALE].f;
  a.scale = (float)(scale != 0 ? scale : a.D > 0 ? 1 / sqrt((double)a.D) : 1);
  a.softcap = (float)c->attr[RGI_ATTN_SOFTCAP].f;
  if (!a.backward) {
    a.o = rg_out(c, 0), a.lse = rg_out(c, 1);
    return a;
  }
  a.o = rg_in(c, RGI_ATTN_OUT_O + x), a.lse = rg_in(c, RGI_ATTN_OUT_LSE + x);
  a.d_o = rg_in(c, RGI_ATTN_GRAD_O + x), a.d_lse = rg_in(c, RGI_ATTN_GRAD_LSE + x);
  a.delta = rg_in(c, RGI_ATTN_DELTA + x);
  a.dq = rg_out(c, 0), a.dk = rg_out(c, 1), a.dv = rg_out(c, 2), a.dsinks = rg_out(c, 3);
  a.joined = a.joined && a.dk;
  a.acc_q = rg_in(c, RGI_ATTN_ACC_Q + x), a.acc_k = rg_in(c, RGI_ATTN_ACC_K + x);
  a.acc_v = rg_in(c, RGI_ATTN_ACC_V + x), a.acc_sinks = rg_in(c, RGI_ATTN_ACC_SINKS + x);
  a.sum_q = rg_in(c, RGI_ATTN_SUM_Q + x);
  return a;
}
