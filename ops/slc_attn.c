/* ops/slc_attn.c: attention over the blocks of keys that each query selected. The work is
 * attn.c's; this file says which keys a query sees: those of the blocks in its row of idx, up to
 * its own position. */
#include "attn.h"

#define BLOCK \
  { "block", RG_ATTR_INT, true, 1, 0x7fffffff, 0, NULL, "keys in a block" }
static const rg_attr attrs[] = {RGI_ATTN_ATTRS, BLOCK};
static const rg_attr attrs_bwd[] = {
    RGI_ATTN_ATTRS,
    BLOCK,
    {"joined", RG_ATTR_BOOL, false, 0, 1, 0, NULL,
     "v is the first columns of k, and d.k the gradient of both"},
};

#define SELECTION                                                                             \
  {                                                                                           \
    "idx", "T,I,N", RG_PORT_ROWS, RG_D(RG_I32), 0, 1,                                         \
        "selected blocks, ascending, padded with -1: of each KV head, or with I = 1 of all; " \
        "entries negative, past the keys or not larger than all before them are ignored"      \
  }

static const rg_port in[] = {
    RGI_ATTN_IN_QKV(RG_PORT_KROWS, "keys, S = T rows unless cu_seqlens_k is bound"),
    SELECTION,
    RGI_ATTN_IN_SEQ,
};
static const rg_port out[] = {RGI_ATTN_OUT};

static const rg_port in_bwd[] = {
    RGI_ATTN_IN_QKV(RG_PORT_KROWS, "keys, S = T rows unless cu_seqlens_k is bound"),
    SELECTION,
    RGI_ATTN_IN_SEQ,
    RGI_ATTN_IN_BWD(RG_PORT_KROWS),
};
static const rg_port out_bwd[] = {RGI_ATTN_OUT_BWD(RG_PORT_KROWS)};

static void own(rgi_attn *a, const rg_value *attr) {
  a->block = attr->i;
}
static void own_bwd(rgi_attn *a, const rg_value *attr) {
  a->block = attr->i;
  a->joined = attr[1].i;
}

/* Every query is taken to have selected its own block and N - 1 full ones, or all there are. On
 * average it has passed half of its own. */
static double pairs(const rgi_attn *a) {
  const double most = (double)a->N * (double)a->block - ((double)a->block - 1) / 2;
  return a->N == 0 ? 0 : rgi_attn_pairs(a, most < 1e18 ? (int64_t)most : -1);
}

static const rgi_attn_kind kind = {
    .mode = RGI_ATTN_SLC, .own = own, .check = rgi_attn_check_rows, .pairs = pairs};

static rg_status check_bwd(const rg_call *c, rg_error *e) {
  const int64_t D = rg_in(c, 1)->dim[2], E = rg_in(c, 2)->dim[2];
  if (c->attr[RGI_ATTN_OWN + 1].i &&
      (!rg_out(c, 1) || rg_out(c, 2) || (D != RG_DIM_FREE && E != RG_DIM_FREE && E > D)))
    return rg_op_fail(e, RG_E_KEY, c, "joined is of a d.k that takes d.v's place");
  return rgi_attn_check_rows(c, e);
}
static const rgi_attn_kind kind_bwd = {
    .mode = RGI_ATTN_SLC, .own = own_bwd, .check = check_bwd, .pairs = pairs};

const rg_op rgi_op_slc_attn = {
    .name = "slc_attn",
    .doc = "causal attention over selected blocks of keys",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_QUERYWISE,
    RGI_ATTN_OP(in, out),
    .backward = "slc_attn.bwd",
    .rules = &(const rgi_rules){.kind = &kind},
};

const rg_op rgi_op_slc_attn_bwd = {
    .name = "slc_attn.bwd",
    .doc = "gradient of slc_attn",
    .flags = RG_OP_INTERNAL,
    RGI_ATTN_OP_OF(in_bwd, out_bwd, attrs_bwd),
    .rules = &(const rgi_rules){.fusing = &rgi_attn_fusing,
                                .kind = &kind_bwd,
                                .joined = {.part = "v", .whole = "k"}},
};

/* ---- over pages ---- */

static const rg_port in_paged[] = {
    RGI_ATTN_IN_PAGED_QKV("page", "keys in pages, this step's included"),
    SELECTION,
    RGI_ATTN_IN_PAGED_SEQ,
};
static const rg_port out_paged[] = {RGI_ATTN_OUT_PAGED};

static rg_status check_paged(const rg_call *c, rg_error *e) {
  const int64_t page = rg_in(c, 1)->dim[1], block = c->attr[RGI_ATTN_OWN].i;
  if (page == RG_DIM_FREE || (page > 0 && (page % block == 0 || block % page == 0))) return RG_OK;
  return rg_op_fail(e, RG_E_VALUE, c,
                    "neither of block %lld and pages of %lld tokens divides the other",
                    (long long)block, (long long)page);
}

static const rgi_attn_kind paged_kind = {
    .mode = RGI_ATTN_SLC, .paged = true, .own = own, .check = check_paged, .pairs = pairs};

const rg_op rgi_op_paged_slc_attn = {
    .name = "paged_slc_attn",
    .doc = "slc_attn over keys in pages, forward only",
    .flags = RG_OP_FORWARD_ONLY,
    RGI_ATTN_OP(in_paged, out_paged),
    .rules = &(const rgi_rules){.kind = &paged_kind},
};
