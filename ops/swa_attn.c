/* ops/swa_attn.c: sliding-window attention, and with window_left -1 dense causal attention.
 * The work is attn.c's; this file says which keys a query sees: window_left + 1 of them up to
 * its own. */
#include "attn.h"
#include "cpu/attn.h"
#include "cuda/attn.h"

static const rg_attr attrs[] = {
    RGI_ATTN_ATTRS,
    {"window_left", RG_ATTR_INT, true, -1, 0x7fffffff, 0, NULL,
     "keys before the query's own that it sees; -1: all of them (dense causal)"},
};

static const rg_port in[] = {
    RGI_ATTN_IN_QKV(RG_PORT_KROWS, "keys, S = T rows unless cu_seqlens_k is bound"),
    RGI_ATTN_IN_SEQ,
};
static const rg_port out[] = {RGI_ATTN_OUT};

static const rg_port in_bwd[] = {
    RGI_ATTN_IN_QKV(RG_PORT_KROWS, "keys, S = T rows unless cu_seqlens_k is bound"),
    RGI_ATTN_IN_SEQ,
    RGI_ATTN_IN_BWD(RG_PORT_KROWS),
};
static const rg_port out_bwd[] = {RGI_ATTN_OUT_BWD(RG_PORT_KROWS)};

static void own(rgi_attn *a, const rg_value *attr) {
  a->window_left = attr->i;
}

static double pairs(const rgi_attn *a) {
  return rgi_attn_pairs(a, a->window_left < 0 ? -1 : a->window_left + 1);
}

static bool window(const rg_call *c, int64_t *left, int64_t *tile) {
  *left = c->attr[RGI_ATTN_OWN].i;
  const rg_arg *q = rg_in(c, 0), *v = rg_in(c, 2);
  *tile = c->gpu ? rgi_cuda_key_tile(q->dim[2], v->dim[2]) : RGI_ATTN_KEYS;
  return *left >= 0;
}

static const rgi_attn_kind kind = {
    .mode = RGI_ATTN_SWA, .own = own, .check = rgi_attn_check_rows, .pairs = pairs};

const rg_op rgi_op_swa_attn = {
    .name = "swa_attn",
    .doc = "causal attention over the last window_left + 1 keys",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_QUERYWISE,
    RGI_ATTN_OP(in, out),
    .backward = "swa_attn.bwd",
    .rules = &(const rgi_rules){.window = window, .kind = &kind},
};

const rg_op rgi_op_swa_attn_bwd = {
    .name = "swa_attn.bwd",
    .doc = "gradient of swa_attn",
    .flags = RG_OP_INTERNAL,
    RGI_ATTN_OP(in_bwd, out_bwd),
    .rules = &(const rgi_rules){.fusing = &rgi_attn_fusing, .kind = &kind},
};

/* ---- over pages ---- */

static const rg_port in_paged[] = {
    RGI_ATTN_IN_PAGED_QKV("page", "keys in pages, this step's included"),
    RGI_ATTN_IN_PAGED_SEQ,
};
static const rg_port out_paged[] = {RGI_ATTN_OUT_PAGED};

static rg_status check_paged(const rg_call *c, rg_error *e) {
  (void)c, (void)e;
  return RG_OK;
}

static const rgi_attn_kind paged_kind = {
    .mode = RGI_ATTN_SWA, .paged = true, .own = own, .check = check_paged, .pairs = pairs};

const rg_op rgi_op_paged_swa_attn = {
    .name = "paged_swa_attn",
    .doc = "swa_attn over keys in pages, forward only",
    .flags = RG_OP_FORWARD_ONLY,
    RGI_ATTN_OP(in_paged, out_paged),
    .rules = &(const rgi_rules){.kind = &paged_kind},
};
