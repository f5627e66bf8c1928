/* ops/nsa_step.c: paged_cmp_topk and paged_slc_swa, which reads what the first has chosen, as one
 * node: all of a layer's attention of single tokens in one launch, which the fuse pass makes where
 * there are enough of them for a GPU (kernels/attn/decode_layer_sm90.cuh): the same bits. With
 * split_kv for any number, and then sums of their own (kernels/attn/decode_split_sm90.cuh).
 *
 * kv_nsa is that and the kv_step before it: the launch puts the step's keys and values into their
 * pages, and what they complete, before it attends to them. */
#include "../kernels/paged.h"
#include "cuda/paged.h"
#include "nsa_step.h"

extern const rg_op rgi_op_paged_cmp_topk, rgi_op_paged_slc_swa, rgi_op_kv_append,
    rgi_op_kv_compress, rgi_op_kv_step;

/* Of both ops. "first.": of paged_cmp_topk, where the other has a port of this name. */
#define NSA_REST                                                                       \
  {"first.sinks", "H", RG_PORT_OPTIONAL, RG_D_FLOAT, 'S', -1, "as paged_cmp_attn's"},  \
      {"gate", "T,H,G", RG_PORT_ROWS, RG_D_FLOAT, 'G', -1, "gates of all branches"}, { \
    "o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST | RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, \
        "other branches"                                                               \
  }
#define NSA_OUT                                                                                  \
  {"o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "weighted sum of all branches"},             \
      {"first.o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "attention over compressed keys"}, \
      {"first.lse", "T,H", RG_PORT_ROWS, RG_D(RG_F32), 0, -1, "log-sum-exp of that"}, {          \
    "idx", "T,KH,top_n", RG_PORT_ROWS, RG_D(RG_I32), 0, -1, "chosen blocks"                      \
  }
static const rg_port in[] = {
    {"q", "T,H,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "queries; H a multiple of KH"},
    {"first.k_cache", "P,R,KH,D", 0, RG_D_FLOAT, 'C', -1, "compressed keys in pages"},
    {"first.v_cache", "P,R,KH,E", 0, RG_D_FLOAT, 'C', -1, "values of the same rows"},
    {"k_cache", "P,page,KH,D", 0, RG_D_FLOAT, 'C', -1, "keys in pages, this step's included"},
    {"v_cache", "P,page,KH,E", 0, RG_D_FLOAT, 'C', -1, "values of the same rows"},
    RGI_ATTN_IN_PAGED_SEQ,
    NSA_REST,
};
static const rg_port out[] = {
    NSA_OUT,
};
static const char *const acts[] = {"sigmoid", "softmax", "none", NULL};
static const rg_attr attrs[] = {
    RGI_ATTN_ATTRS,
    {"kernel", RG_ATTR_INT, true, 1, 65536, 0, NULL, "as paged_cmp_topk's"},
    {"stride", RG_ATTR_INT, true, 1, 65536, 0, NULL, "as paged_cmp_topk's"},
    {"block", RG_ATTR_INT, true, 1, 1 << 20, 0, NULL, "tokens of a block"},
    {"top_n", RG_ATTR_INT, true, 1, 1 << 16, 0, NULL, "blocks a query keeps at most"},
    {"init", RG_ATTR_INT, false, 0, 1 << 16, 1, NULL, "first blocks, always kept"},
    {"local", RG_ATTR_INT, false, 0, 1 << 16, 2, NULL, "last blocks, always kept"},
    {"window_left", RG_ATTR_INT, true, -1, 0x7fffffff, 0, NULL, "as paged_swa_attn's"},
    {"act", RG_ATTR_ENUM, false, 0, 0, 0, acts, "as combine's"},
    {"first", RG_ATTR_INT, true, 0, 65535, 0, NULL, "selected blocks' place"},
    {"second", RG_ATTR_INT, true, 0, 65535, 0, NULL, "the window's place"},
    {"own", RG_ATTR_INT, true, -1, 65535, 0, NULL, "first.o's place among other branches, or -1"},
    {"split_kv", RG_ATTR_BOOL, false, 0, 0, 0, NULL, "keys of a token are shared out: other sums"},
};

bool rgi_joins_nsa(const rg_call *choice, const rg_call *sum, bool split) {
  (void)sum;
  rgi_cmp_topk of;
  rgi_cmp_topk_view(choice, &of);
  return rgi_decode_takes_layer(&of.attn, choice->gpu, split);
}

/* The part of paged_cmp_topk; of kv_nsa its keys are those that kv_step leaves. */
static void choice_of(const rg_call *c, rgi_part *p) {
  static const char *const left[] = {"k_cmp", "v_cmp"}, *const read[] = {"k_cache", "v_cache"};
  rgi_part_of_first(c, &rgi_op_paged_cmp_topk, p);
  for (int i = 0; i < 2; i++) {
    const int made = rgi_out_port(c->op, left[i]);
    if (made >= 0)
      p->in[p->in_begin[rgi_in_port(&rgi_op_paged_cmp_topk, read[i])]] = *rg_out(c, made);
  }
}

static void cost(const rg_call *c, rg_cost *sum) {
  rgi_part p;
  choice_of(c, &p);
  rgi_part_cost(&p, sum);
  rgi_op_paged_slc_swa.cost(c, sum);
}

static void view_of(const rg_call *c, rgi_cmp_topk *of) {
  rgi_part p;
  choice_of(c, &p);
  rgi_cmp_topk_view(&p.call, of);
}

static bool splits(const rg_call *c) {
  return c->attr[rgi_attribute(c->op, "split_kv")].i != 0;
}

static size_t workspace(const rg_call *c) {
  rgi_cmp_topk of;
  view_of(c, &of);
  if (splits(c)) return rgi_decode_split_workspace(&of.attn, &of.pages, c->gpu);
  return rgi_decode_workspace(&of.attn, &of.pages, c->gpu);
}

static rg_status launch(const rg_call *c, const rgk_append_means *step, rg_cuda *x) {
  rgi_cmp_topk choice;
  rgi_slc_swa sum;
  view_of(c, &choice);
  const int own = (int)c->attr[rgi_attribute(c->op, "own")].i;
  rgi_slc_swa_view(c, own < 0 ? NULL : rg_out(c, rgi_out_port(c->op, "first.o")), own, &sum);
  if (splits(c))
    return rgi_decode_split(&choice.attn, &choice.topk, &choice.pages, &sum.selected, &sum.window,
                            &sum.pages, &sum.pair, c->gpu, c->workspace, x);
  return rgi_decode_layer(&choice.attn, &choice.topk, &choice.pages, &sum.selected, &sum.window,
                          &sum.pages, &sum.pair, step, c->gpu, c->workspace, x);
}
static rg_status steps(const rg_call *c, rg_cuda *x) {
  return launch(c, NULL, x);
}

static const char *path(const rg_call *c) {
  return splits(c) ? "mma, split_kv" : "wgmma";
}

/* One launch for both, where it takes a token whole. */
static bool joins_kv(const rg_call *step, const rg_call *c, bool split) {
  (void)split;
  return !splits(c) && rg_in(step, 0)->dim[0] == rg_in(c, 0)->dim[0];
}

const rg_op rgi_op_paged_nsa = {
    .abi = RG_OP_ABI,
    .name = "paged_nsa",
    .doc = "paged_cmp_topk and paged_slc_swa of what it chooses",
    .flags = RG_OP_INTERNAL | RG_OP_FORWARD_ONLY,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .cost = cost,
    .workspace = workspace,
    .cuda_steps = steps,
    .cuda_path = path,
    .rules = &(const rgi_rules){.fusing = &(const rgi_fusing){.with = "kv_step",
                                                              .link = "k_cache",
                                                              .list = "o",
                                                              .joined = "kv_nsa",
                                                              .joins = joins_kv}},
};

/* ---- with kv_step ---- */

static const rg_port kv_in[] = {
    {"q", "T,H,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "queries; H a multiple of KH"},
    {"k", "T,KH,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "keys of this step"},
    {"v", "T,KH,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "values of this step"},
    RGI_ATTN_IN_PAGED_SEQ,
    RGI_KV_STATE_IN,
    NSA_REST,
};
static const rg_port kv_out[] = {
    NSA_OUT,
    RGI_KV_STATE_OUT,
};

static void kv_cost(const rg_call *c, rg_cost *sum) {
  cost(c, sum);
  rgi_op_kv_step.cost(c, sum);
}

static rg_status kv_steps(const rg_call *c, rg_cuda *x) {
  rgi_part append, compress;
  rgk_append_means step;
  rgi_part_of(c, &rgi_op_kv_append, &append);
  rgi_part_of(c, &rgi_op_kv_compress, &compress);
  rgi_cuda_kv_step_view(&append.call, &compress.call, &step);
  return launch(c, &step, x);
}

const rg_op rgi_op_kv_nsa = {
    .abi = RG_OP_ABI,
    .name = "kv_nsa",
    .doc = "kv_step and paged_nsa over what it leaves",
    .flags = RG_OP_STATE | RG_OP_INTERNAL | RG_OP_FORWARD_ONLY,
    .in = kv_in,
    .nin = RGI_COUNT(kv_in),
    .out = kv_out,
    .nout = RGI_COUNT(kv_out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .cost = kv_cost,
    .workspace = workspace,
    .cuda_steps = kv_steps,
    .cuda_path = path,
};
