/* ops/slc_swa.c: paged_slc_attn, paged_swa_attn and the combine of what they make with other
 * branches as one node, which the fuse pass makes of them for a step of single tokens on a GPU
 * (kernels/attn/decode_pair_sm90.cu): the same bits. */
#include "nsa_step.h"
#include <string.h>

extern const rg_op rgi_op_paged_slc_attn, rgi_op_paged_swa_attn;

/* Longer windows have more to do than selected blocks, and wait for each tile of keys. */
enum { MOST_WINDOW = 1024 };

static const rg_port in[] = {
    RGI_ATTN_IN_PAGED_QKV("page", "keys in pages, this step's included"),
    {"idx", "T,I,N", RG_PORT_ROWS, RG_D(RG_I32), 0, -1, "selected blocks"},
    RGI_ATTN_IN_PAGED_SEQ,
    {"gate", "T,H,G", RG_PORT_ROWS, RG_D_FLOAT, 'G', -1, "gates of all branches"},
    {"o", "T,H,E", RG_PORT_ROWS | RG_PORT_LIST | RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1,
     "other branches"},
};
static const rg_port out[] = {
    {"o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "weighted sum of all branches"}};

static const char *const acts[] = {"sigmoid", "softmax", "none", NULL};
static const rg_attr attrs[] = {
    RGI_ATTN_ATTRS,
    {"block", RG_ATTR_INT, true, 1, 0x7fffffff, 0, NULL, "keys in a selected block"},
    {"window_left", RG_ATTR_INT, true, -1, 0x7fffffff, 0, NULL, "as paged_swa_attn's"},
    {"act", RG_ATTR_ENUM, false, 0, 0, 0, acts, "as combine's"},
    {"first", RG_ATTR_INT, true, 0, 65535, 0, NULL, "selected blocks' place"},
    {"second", RG_ATTR_INT, true, 0, 65535, 0, NULL, "the window's place"},
};

typedef struct views {
  rgk_attn selected, window;
  rgk_pages pages;
} views;

static int32_t attr_named(const rg_call *c, const char *name) {
  return (int32_t)c->attr[rgi_attribute(c->op, name)].i;
}

static views view_of(const rg_call *selected, const rg_call *window) {
  views v;
  const rgi_attn a = rgi_attn_describe(selected), b = rgi_attn_describe(window);
  v.selected = rgi_cuda_paged_view(&a, &v.pages);
  v.window = rgi_cuda_paged_view(&b, &v.pages);
  return v;
}

bool rgi_joins_slc_swa(const rg_call *selected, const rg_call *window, int branches, bool split) {
  const views v = view_of(selected, window);
  return branches <= RGK_PAIR_BRANCHES && v.window.window_left >= 0 &&
         v.window.window_left <= MOST_WINDOW &&
         rgi_decode_takes_pair(&v.selected, &v.window, &v.pages, window->gpu, split);
}

static void cost(const rg_call *c, rg_cost *sum) {
  rgi_part p;
  rgi_part_of(c, &rgi_op_paged_slc_attn, &p);
  rgi_part_cost(&p, sum);
  rgi_part_of(c, &rgi_op_paged_swa_attn, &p);
  rgi_part_cost(&p, sum);
}

void rgi_slc_swa_view(const rg_call *c, const rg_arg *own, int own_at, rgi_slc_swa *of) {
  rgi_part selected, window;
  rgi_part_of(c, &rgi_op_paged_slc_attn, &selected);
  rgi_part_of(c, &rgi_op_paged_swa_attn, &window);
  const views v = view_of(&selected.call, &window.call);
  memset(of, 0, sizeof *of); /* holes too: launches are compared byte by byte */
  of->selected = v.selected, of->window = v.window, of->pages = v.pages;
  rgk_decode_pair *const p = &of->pair;
  const rg_arg *const gate = rg_in(c, rgi_in_port(c->op, "gate"));
  const int others = rgi_in_port(c->op, "o");
  p->gate = rgk_of(gate);
  p->n = (int32_t)gate->dim[2];
  p->act = attr_named(c, "act");
  p->at_selected = attr_named(c, "first");
  p->at_window = attr_named(c, "second");
  for (int k = 0, place = 0, from = 0; k < p->n; k++) {
    if (k == p->at_selected || k == p->at_window) continue;
    const bool is_own = own && place++ == own_at;
    const rgk_tensor o = rgk_of(is_own ? own : rgi_in_at(c, others, from++));
    p->branch[k] = (rgk_pair_branch){.o = o.data, .row = o.row, .head = o.head};
  }
}

static rg_status steps(const rg_call *c, rg_cuda *x) {
  rgi_slc_swa of;
  rgi_slc_swa_view(c, NULL, -1, &of);
  return rgi_decode_pair(&of.selected, &of.window, &of.pages, c->gpu, &of.pair, x);
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
    .rules = &(const rgi_rules){.fusing = &(const rgi_fusing){.with = "paged_cmp_topk",
                                                              .link = "idx",
                                                              .list = "o",
                                                              .joined = "paged_nsa",
                                                              .joins = rgi_joins_nsa}},
};
