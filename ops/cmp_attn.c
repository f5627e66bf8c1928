/* ops/cmp_attn.c: attention over compressed keys, each of which stands for `kernel` tokens. The
 * work is attn.c's; this file says which compressed keys a query sees: those whose tokens all lie
 * at or before its position. */
#include "attn.h"

enum { KERNEL = RGI_ATTN_OWN, STRIDE };

static const rg_attr attrs[] = {
    RGI_ATTN_ATTRS,
    {"kernel", RG_ATTR_INT, true, 1, 65536, 0, NULL, "tokens that a compressed key stands for"},
    {"stride", RG_ATTR_INT, true, 1, 65536, 0, NULL,
     "tokens from one compressed key to the next; divides kernel"},
};

static const rg_port in[] = {
    RGI_ATTN_IN_QKV(RG_PORT_BLOCKS,
                    "compressed keys, S = T/stride rows unless cu_seqlens_k is bound; "
                    "b's from cu_seqlens_k[b]/stride on"),
    RGI_ATTN_IN_SEQ,
};
static const rg_port out[] = {RGI_ATTN_OUT};

static const rg_port in_bwd[] = {
    RGI_ATTN_IN_QKV(RG_PORT_BLOCKS,
                    "compressed keys, S = T/stride rows unless cu_seqlens_k is bound; "
                    "b's from cu_seqlens_k[b]/stride on"),
    RGI_ATTN_IN_SEQ,
    RGI_ATTN_IN_BWD(0),
};
static const rg_port out_bwd[] = {RGI_ATTN_OUT_BWD(0)};

static void own(rgi_attn *a, const rg_value *attr) {
  a->kernel = attr[0].i;
  a->stride = attr[1].i;
}

static rg_status check(const rg_call *c, rg_error *e) {
  const int64_t kernel = c->attr[KERNEL].i, stride = c->attr[STRIDE].i;
  if (kernel % stride != 0)
    return rg_op_fail(e, RG_E_VALUE, c, "stride %lld does not divide kernel %lld",
                      (long long)stride, (long long)kernel);
  const int64_t T = rg_in(c, 0)->dim[0], S = rg_in(c, 1)->dim[0];
  if (!rg_in(c, RGI_ATTN_CU_K) && T != RG_DIM_FREE && S != RG_DIM_FREE && S != T / stride)
    return rg_op_fail(e, RG_E_SHAPE, c,
                      "k has %lld rows, expected %lld tokens / stride %lld = %lld", (long long)S,
                      (long long)T, (long long)stride, (long long)(T / stride));
  return RG_OK;
}

/* Each compressed key is seen by every position from its last token on. */
static double pairs(const rgi_attn *a) {
  const double keys = (double)(a->S * a->stride);
  const double first = (a->offset || a->paged) && keys > (double)a->T ? keys - (double)a->T : 0,
               end = first + (double)a->T;
  /* counted key by key */
  double n = floor((end - (double)a->kernel) / (double)a->stride) + 1, before = 0;
  if (n > (double)a->S) n = (double)a->S;
  if (n <= 0) return 0;
  if (first >= (double)a->kernel)
    before = floor((first - (double)a->kernel) / (double)a->stride) + 1;
  if (before > n) before = n;
  /* keys seen by all T queries, then those seen from position j * stride + kernel - 1 on */
  const double sum_j = (n * (n - 1) - before * (before - 1)) / 2;
  return before * (double)a->T + (n - before) * (end - (double)a->kernel + 1) -
         sum_j * (double)a->stride;
}

static const rgi_attn_kind kind = {
    .mode = RGI_ATTN_CMP, .own = own, .check = check, .pairs = pairs};

const rg_op rgi_op_cmp_attn = {
    .name = "cmp_attn",
    .doc = "attention over compressed keys: position i sees key j iff i >= j*stride + kernel - 1",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_QUERYWISE,
    RGI_ATTN_OP(in, out),
    .backward = "cmp_attn.bwd",
    .rules = &(const rgi_rules){.kind = &kind},
};

const rg_op rgi_op_cmp_attn_bwd = {
    .name = "cmp_attn.bwd",
    .doc = "gradient of cmp_attn",
    .flags = RG_OP_INTERNAL,
    RGI_ATTN_OP(in_bwd, out_bwd),
    .rules = &(const rgi_rules){.fusing = &rgi_attn_fusing, .kind = &kind},
};

/* ---- over pages ---- */

static const rg_port in_paged[] = {
    RGI_ATTN_IN_PAGED_QKV("R", "compressed keys in pages of R = page/stride rows, as kv_compress "
                               "leaves them"),
    RGI_ATTN_IN_PAGED_SEQ,
};
static const rg_port out_paged[] = {RGI_ATTN_OUT_PAGED};

static rg_status check_paged(const rg_call *c, rg_error *e) {
  const int64_t kernel = c->attr[KERNEL].i, stride = c->attr[STRIDE].i;
  return kernel % stride == 0
             ? RG_OK
             : rg_op_fail(e, RG_E_VALUE, c, "stride %lld does not divide kernel %lld",
                          (long long)stride, (long long)kernel);
}

static const rgi_attn_kind paged_kind = {
    .mode = RGI_ATTN_CMP, .paged = true, .own = own, .check = check_paged, .pairs = pairs};

const rg_op rgi_op_paged_cmp_attn = {
    .name = "paged_cmp_attn",
    .doc = "cmp_attn over keys in pages, forward only",
    .flags = RG_OP_FORWARD_ONLY,
    RGI_ATTN_OP(in_paged, out_paged),
    .rules = &(const rgi_rules){.kind = &paged_kind},
};
