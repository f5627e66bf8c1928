/* ops/cmp_topk.c: paged_cmp_attn and paged_topk of the same queries and keys as one node, which the
 * fuse pass makes of them for a step of single tokens on a GPU (kernels/attn/decode.h): the same
 * bits. */
#include "nsa_step.h"

extern const rg_op rgi_op_paged_cmp_attn, rgi_op_paged_topk;

/* Ports and attributes begin with paged_cmp_attn's. */
static const rg_port in[] = {
    RGI_ATTN_IN_PAGED_QKV("R", "compressed keys in pages of R = page/stride rows, as kv_compress "
                               "leaves them"),
    RGI_ATTN_IN_PAGED_SEQ,
};
static const rg_port out[] = {
    RGI_ATTN_OUT_PAGED,
    {"idx", "T,KH,top_n", RG_PORT_ROWS, RG_D(RG_I32), 0, -1, "chosen blocks"},
};
static const rg_attr attrs[] = {
    RGI_ATTN_ATTRS,
    {"kernel", RG_ATTR_INT, true, 1, 65536, 0, NULL, "tokens that a compressed key stands for"},
    {"stride", RG_ATTR_INT, true, 1, 65536, 0, NULL, "tokens from one to the next"},
    {"block", RG_ATTR_INT, true, 1, 1 << 20, 0, NULL, "tokens of a block to choose"},
    {"top_n", RG_ATTR_INT, true, 1, 1 << 16, 0, NULL, "blocks a query keeps at most"},
    {"init", RG_ATTR_INT, false, 0, 1 << 16, 1, NULL, "first blocks, always kept"},
    {"local", RG_ATTR_INT, false, 0, 1 << 16, 2, NULL, "last blocks, always kept"},
};

/* The two calls of which this one is made. */
typedef struct pair {
  rgi_part attn, topk;
} pair;

static void take_apart(const rg_call *c, pair *p) {
  rgi_part_of(c, &rgi_op_paged_cmp_attn, &p->attn);
  rgi_part_of(c, &rgi_op_paged_topk, &p->topk);
}

static void cost(const rg_call *c, rg_cost *sum) {
  pair p;
  rg_cost one = {0};
  take_apart(c, &p);
  rgi_op_paged_cmp_attn.cost(&p.attn.call, sum);
  rgi_op_paged_topk.cost(&p.topk.call, &one);
  sum->flops += one.flops / 2; /* its products are there already */
  sum->exps += one.exps;
}

void rgi_cmp_topk_view(const rg_call *c, rgi_cmp_topk *of) {
  pair p;
  rgk_pages again;
  take_apart(c, &p);
  const rgi_attn a = rgi_attn_describe(&p.attn.call);
  of->attn = rgi_cuda_paged_view(&a, &of->pages);
  of->topk = rgi_paged_topk_view(&p.topk.call, &again);
}

static size_t workspace(const rg_call *c) {
  rgi_cmp_topk of;
  rgi_cmp_topk_view(c, &of);
  return rgi_decode_workspace(&of.attn, &of.pages, c->gpu);
}

static rg_status steps(const rg_call *c, rg_cuda *x) {
  rgi_cmp_topk of;
  rgi_cmp_topk_view(c, &of);
  return rgi_decode_step(&of.attn, &of.topk, &of.pages, c->gpu, c->workspace, x);
}

static const char *path(const rg_call *c) {
  (void)c;
  return "wgmma";
}

const rg_op rgi_op_paged_cmp_topk = {
    .abi = RG_OP_ABI,
    .name = "paged_cmp_topk",
    .doc = "paged_cmp_attn and paged_topk of the same queries and keys",
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
};
