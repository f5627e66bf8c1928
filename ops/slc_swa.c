/* ops/slc_swa.c: paged_slc_attn, paged_swa_attn and the combine of what they make with other
 * branches as one node, which the fuse pass makes of them for a step of single tokens on a GPU
 * (kernels/attn/decode_pair_sm90.cu): the same bits. */
#include "../kernels/attn/decode.h"
#include "attn.h"
#include "cuda/attn.h"
#include "part.h"
#include <string.h>

extern const rg_op rgi_op_paged_slc_attn, rgi_op_paged_swa_attn;

/* Longer windows have more to do than selected blocks, and wait for each tile of keys. */
enum { MOST_WINDOW = 1024 };

enum { IN_GATE = 8, IN_O };
static const rg_port in[] = {
    RGI_ATTN_IN_PAGED_QKV("page", "keys in pages, this step's included"),
    {"idx", "T,I,N", RG_PORT_ROWS, RG_D(RG_I32), 0, -1, "selected blocks"},
    RGI_ATTN_IN_PAGED_SEQ,
    [IN_GATE] = {"gate", "T,H,G", RG_PORT_ROWS, RG_D_FLOAT, 'G', -1, "gates of all branches"},
    [IN_O] = {"o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST | RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1,
              "other branches"},
};
static const rg_port out[] = {
    {"o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "weighted sum of all branches"}};

static const char *const acts[] = {"sigmoid", "softmax", "none", NULL};
enum { A_ACT = 4, A_FIRST, A_SECOND };
static const rg_attr attrs[] = {
    RGI_ATTN_ATTRS,
    {"block", RG_ATTR_INT, true, 1, 0x7fffffff, 0, NULL, "keys in a selected block"},
    {"window_left", RG_ATTR_INT, true, -1, 0x7fffffff, 0, NULL, "as paged_swa_attn's"},
    [A_ACT] = {"act", RG_ATTR_ENUM, false, 0, 0, 0, acts, "as combine's"},
    [A_FIRST] = {"first", RG_ATTR_INT, true, 0, 65535, 0, NULL, "selected blocks' place"},
    [A_SECOND] = {"second", RG_ATTR_INT, true, 0, 65535, 0, NULL, "the window's place"},
};

typedef struct views {
  rgk_attn selected, window;
  rgk_pages pages;
} views;

static views view_of(const rg_call *selected, const rg_call *window) {
  views v;
  const rgi_attn a = rgi_attn_describe(selected), b = rgi_attn_describe(window);
  v.selected = rgi_cuda_paged_view(&a, &v.pages);
  v.window = rgi_cuda_paged_view(&b, &v.pages);
  return v;
}

bool rgi_joins_slc_swa(const rg_call *selected, const rg_call *window, int branches) {
  const views v = view_of(selected, window);
  return branches <= RGK_PAIR_BRANCHES && v.window.window_left >= 0 &&
         v.window.window_left <= MOST_WINDOW &&
         rgi_decode_takes_pair(&v.selected, &v.window, &v.pages, window->gpu);
}

static void cost(const rg_call *c, rg_cost *sum) {
  rgi_part p;
  rg_cost one = {0};
  rgi_part_of(c, &rgi_op_paged_slc_attn, &p);
  p.call.op->cost(&p.call, sum);
  rgi_part_of(c, &rgi_op_paged_swa_attn, &p);
  p.call.op->cost(&p.call, &one);
  sum->flops += one.flops;
  sum->exps += one.exps;
  sum->bytes += one.bytes;
}

static rg_status steps(const rg_call *c, rg_cuda *x) {
  rgi_part selected, window;
  rgi_part_of(c, &rgi_op_paged_slc_attn, &selected);
  rgi_part_of(c, &rgi_op_paged_swa_attn, &window);
  const views v = view_of(&selected.call, &window.call);
  rgk_decode_pair p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  p.gate = rgk_of(rg_in(c, IN_GATE));
  p.n = (int32_t)rg_in(c, IN_GATE)->dim[2];
  p.act = (int32_t)c->attr[A_ACT].i;
  p.at_selected = (int32_t)c->attr[A_FIRST].i;
  p.at_window = (int32_t)c->attr[A_SECOND].i;
  for (int k = 0, from = 0; k < p.n; k++) {
    if (k == p.at_selected || k == p.at_window) continue;
    const rgk_tensor o = rgk_of(rgi_in_at(c, IN_O, from++));
    p.branch[k] = (rgk_pair_branch){.o = o.data, .row = o.row, .head = o.head};
  }
  return rgi_decode_pair(&v.selected, &v.window, &v.pages, c->gpu, &p, x);
}

static const char *path(const rg_call *c) {
  (void)c;
  return "wgmma";
}

const rg_op rgi_op_paged_slc_swa = {
    .abi = RG_OP_ABI,
    .name = "paged_slc_swa",
    .doc = "paged_slc_attn, paged_swa_attn and the combine of both with other branches",
    .flags = RG_OP_INTERNAL | RG_OP_FORWARD_ONLY,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .cost = cost,
    .cuda_steps = steps,
    .cuda_path = path,
};
