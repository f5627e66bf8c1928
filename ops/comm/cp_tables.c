/* ops/comm/cp_tables.c: what the cp pass puts at a graph's start: which chunks this rank has and
 * the sequence starts there, all out of the batch's cu_seqlens (../cp/tables.h). Both ops read the
 * rank off the communicator, so one graph serves all ranks. */
#include "../../cp/tables.h"
#include "comm.h"

enum { A_RANKS, A_ROWS, A_OWN };
enum { A_MODE = A_OWN };
enum { A_LEFT = A_OWN, A_RIGHT, A_STRIDE };
enum { A_TILE = A_LEFT + 1 };
enum { SLOTS = 2 };

#define RANKS_AND_ROWS                                                              \
  {"ranks", RG_ATTR_INT, true, 1, RGI_CP_MOST_RANKS, 1, NULL, "ranks there are"}, { \
    "rows", RG_ATTR_INT, true, 1, INT32_MAX, 1, NULL, "rows of all ranks together"  \
  }

static int64_t chunk_rows(const rg_call *c) {
  return c->attr[A_ROWS].i / (SLOTS * (int64_t)rgi_ranks(c, A_RANKS));
}

static void set(rgi_graph *g, int t, int64_t n) {
  rgi_tensor *y = &g->tensor[t];
  y->dtype = RG_I32;
  y->rank = 1;
  y->dim[0] = rgi_dim_of(n);
  y->base = -1;
  y->offset = 0;
  rgi_dense_strides(y);
}

static void cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.bytes = rgi_call_bytes(c)};
}

/* ---- cp_rows ---- */

enum { OUT_ORDER, OUT_CU, OUT_POS };
enum { BOTH = SLOTS, SIDES }; /* of cu and pos: slot 0, slot 1, both end to end */

static rg_status rows_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  (void)pointer, (void)e;
  const rgi_node *n = &g->node[node];
  const int64_t nseq = g->tensor[n->in[0]].dim[0].c - 1;
  set(g, n->out[n->out_begin[OUT_ORDER]], SLOTS * n->attr[A_RANKS].i);
  for (int side = 0; side < SIDES; side++) {
    const int64_t pieces = side == BOTH ? SLOTS * nseq : nseq;
    set(g, n->out[n->out_begin[OUT_CU] + side], pieces + 1);
    set(g, n->out[n->out_begin[OUT_POS] + side], pieces);
  }
  return RG_OK;
}

static rg_status rows_run(const rg_call *c) {
  const rg_arg *cu = rg_in(c, 0);
  const int64_t nseq = cu->dim[0] - 1, chunk = chunk_rows(c), rows = c->attr[A_ROWS].i;
  const int ranks = rgi_ranks(c, A_RANKS);
  const int32_t *at = cu->data;
  if (at[nseq] > rows)
    return rg_op_fail(c->error, RG_E_DATA, c, "the sequences end at %d; there are %lld rows",
                      at[nseq], (long long)rows);
  const rg_cp_mode mode = rgi_cp_choose((rg_cp_mode)c->attr[A_MODE].i, at, nseq, rows, ranks);
  int32_t *order = rgi_out_at(c, OUT_ORDER, 0)->data;
  for (int i = 0; i < SLOTS * ranks; i++) order[i] = (int32_t)rgk_cp_place(mode, ranks, i);
  int32_t *both = rgi_out_at(c, OUT_CU, BOTH)->data, *both_pos = rgi_out_at(c, OUT_POS, BOTH)->data;
  both[0] = 0;
  for (int slot = 0; slot < SLOTS; slot++) {
    int32_t *starts = rgi_out_at(c, OUT_CU, slot)->data, *pos = rgi_out_at(c, OUT_POS, slot)->data;
    const int64_t lo = rgk_cp_chunk(mode, ranks, rgi_rank(c), slot) * chunk, first = slot * nseq;
    rgi_cp_pieces(at, nseq, lo, lo + chunk, starts, pos);
    for (int64_t b = 0; b < nseq; b++) {
      both[first + b + 1] = both[first] + starts[b + 1];
      both_pos[first + b] = pos[b];
    }
  }
  return RG_OK;
}

static rg_status rows_cuda(const rg_call *c, rg_cuda *x) {
  const rg_arg *cu = rg_in(c, 0);
  rgk_cp_rows_params p = {.cu = cu->data,
                          .nseq = cu->dim[0] - 1,
                          .rows = c->attr[A_ROWS].i,
                          .ranks = rgi_ranks(c, A_RANKS),
                          .rank = rgi_rank(c),
                          .mode = (int32_t)c->attr[A_MODE].i,
                          .order = rgi_out_at(c, OUT_ORDER, 0)->data};
  for (int side = 0; side < SIDES; side++) {
    p.starts[side] = rgi_out_at(c, OUT_CU, side)->data;
    p.pos[side] = rgi_out_at(c, OUT_POS, side)->data;
  }
  return x->launch(x, &(rg_launch){.function = rgk_cp_rows(),
                                   .grid = {1, 1, 1},
                                   .block = {RGK_CP_THREADS, 1, 1},
                                   .params = &p,
                                   .size = sizeof p});
}

/* cp_blocks, cp_window */
static rg_status chunks_cuda(const rg_call *c, rg_cuda *x, const void *kernel, int64_t right,
                             int64_t unit, bool positions) {
  const rg_arg *cu = rg_in(c, 0);
  rgk_cp_chunks_params p = {.cu = cu->data,
                            .order = rg_in(c, 1)->data,
                            .nseq = cu->dim[0] - 1,
                            .rows = c->attr[A_ROWS].i,
                            .left = c->attr[A_LEFT].i,
                            .right = right,
                            .unit = unit,
                            .ranks = rgi_ranks(c, A_RANKS),
                            .rank = rgi_rank(c)};
  for (int slot = 0; slot < SLOTS; slot++) {
    p.starts[slot] = rgi_out_at(c, 0, slot)->data;
    if (positions) p.pos[slot] = rgi_out_at(c, 1, slot)->data;
  }
  return x->launch(x, &(rg_launch){.function = kernel,
                                   .grid = {1, 1, 1},
                                   .block = {RGK_CP_THREADS, 1, 1},
                                   .params = &p,
                                   .size = sizeof p});
}

static const rg_port cu_in[] = {
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the batch's sequences"},
};
static const rg_port rows_out[] = {
    [OUT_ORDER] = {"order", "*", 0, RG_D(RG_I32), 0, -1, "place of each chunk, rank by rank"},
    [OUT_CU] = {"cu", "*", RG_PORT_LIST, RG_D(RG_I32), 0, -1,
                "starts of the pieces in slot 0, in slot 1, in both"},
    [OUT_POS] = {"pos", "*", RG_PORT_LIST, RG_D(RG_I32), 0, -1, "positions of their first tokens"},
};
static const char *const modes[] = {"auto", "1", "2", NULL};
static const rg_attr rows_attrs[] = {
    RANKS_AND_ROWS,
    {"mode", RG_ATTR_ENUM, false, 0, 0, RG_CP_AUTO, modes, "shard mode"},
};
const rg_op rgi_op_cp_rows = {.abi = RG_OP_ABI,
                              .name = "cp_rows",
                              .doc = "which rows of a batch this rank has, and their sequences",
                              .flags = RG_OP_INTERNAL | RG_OP_COMM, /* B + 1 numbers: kept */
                              .in = cu_in,
                              .nin = RGI_COUNT(cu_in),
                              .out = rows_out,
                              .nout = RGI_COUNT(rows_out),
                              .attrs = rows_attrs,
                              .nattr = RGI_COUNT(rows_attrs),
                              .cost = cost,
                              .run_cpu = rows_run,
                              .cuda_steps = rows_cuda,
                              .rules = &(const rgi_rules){.infer = rows_infer}};

/* ---- cp_blocks ---- */

static rg_status blocks_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  (void)pointer, (void)e;
  const rgi_node *n = &g->node[node];
  for (int slot = 0; slot < SLOTS; slot++) set(g, n->out[slot], g->tensor[n->in[0]].dim[0].c + 1);
  return RG_OK;
}

static rg_status blocks_run(const rg_call *c) {
  const rg_arg *cu = rg_in(c, 0), *order = rg_in(c, 1);
  const int64_t chunk = chunk_rows(c);
  for (int64_t i = 0; i < order->dim[0]; i++) {
    const int64_t slot = rgi_place(order, i) - SLOTS * (int64_t)rgi_rank(c);
    if (slot < 0 || slot >= SLOTS) continue;
    rgi_cp_blocks(cu->data, cu->dim[0] - 1, i * chunk - c->attr[A_LEFT].i,
                  (i + 1) * chunk + c->attr[A_RIGHT].i, c->attr[A_STRIDE].i,
                  rgi_out_at(c, 0, (int)slot)->data);
  }
  return RG_OK;
}

static rg_status blocks_cuda(const rg_call *c, rg_cuda *x) {
  return chunks_cuda(c, x, rgk_cp_blocks(), c->attr[A_RIGHT].i, c->attr[A_STRIDE].i, false);
}

static const rg_port blocks_in[] = {
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the batch's sequences"},
    {"order", "C", 0, RG_D(RG_I32), 0, -1, "as cp_rows makes it"},
};
static const rg_port blocks_out[] = {
    {"cu", "*", RG_PORT_LIST, RG_D(RG_I32), 0, -1,
     "for each slot, starts of what its blocks are made of: a gap, then the sequences"},
};
static const rg_attr blocks_attrs[] = {
    RANKS_AND_ROWS,
    {"left", RG_ATTR_INT, true, 0, 1 << 20, 0, NULL, "rows before a chunk that are there"},
    {"right", RG_ATTR_INT, true, 0, 1 << 20, 0, NULL, "rows after it"},
    {"stride", RG_ATTR_INT, true, 1, 1 << 20, 0, NULL, "tokens from one block to the next"},
};
const rg_op rgi_op_cp_blocks = {.abi = RG_OP_ABI,
                                .name = "cp_blocks",
                                .doc =
                                    "sequences as block-wise ops take them for this rank's blocks",
                                .flags = RG_OP_INTERNAL | RG_OP_COMM,
                                .in = blocks_in,
                                .nin = RGI_COUNT(blocks_in),
                                .out = blocks_out,
                                .nout = RGI_COUNT(blocks_out),
                                .attrs = blocks_attrs,
                                .nattr = RGI_COUNT(blocks_attrs),
                                .cost = cost,
                                .run_cpu = blocks_run,
                                .cuda_steps = blocks_cuda,
                                .rules = &(const rgi_rules){.infer = blocks_infer}};

/* ---- cp_window ---- */

static rg_status window_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  (void)pointer, (void)e;
  const rgi_node *n = &g->node[node];
  const int64_t nseq = g->tensor[n->in[0]].dim[0].c - 1;
  for (int slot = 0; slot < SLOTS; slot++) {
    set(g, n->out[n->out_begin[0] + slot], nseq + 1);
    set(g, n->out[n->out_begin[1] + slot], nseq);
  }
  return RG_OK;
}

static rg_status window_run(const rg_call *c) {
  const rg_arg *cu = rg_in(c, 0), *order = rg_in(c, 1);
  const int64_t chunk = chunk_rows(c);
  for (int64_t i = 0; i < order->dim[0]; i++) {
    const int64_t slot = rgi_place(order, i) - SLOTS * (int64_t)rgi_rank(c);
    if (slot < 0 || slot >= SLOTS) continue;
    rgi_cp_window(cu->data, cu->dim[0] - 1, i * chunk, (i + 1) * chunk, c->attr[A_LEFT].i,
                  c->attr[A_TILE].i, rgi_out_at(c, 0, (int)slot)->data,
                  rgi_out_at(c, 1, (int)slot)->data);
  }
  return RG_OK;
}

static rg_status window_cuda(const rg_call *c, rg_cuda *x) {
  return chunks_cuda(c, x, rgk_cp_window(), 0, c->attr[A_TILE].i, true);
}

static const rg_port window_out[] = {
    {"cu", "*", RG_PORT_LIST, RG_D(RG_I32), 0, -1,
     "for each slot, starts of the keys that its queries' windows may reach"},
    {"pos", "*", RG_PORT_LIST, RG_D(RG_I32), 0, -1, "positions of the first queries among them"},
};
static const rg_attr window_attrs[] = {
    RANKS_AND_ROWS,
    {"left", RG_ATTR_INT, true, 0, INT32_MAX, 0, NULL, "rows before a chunk that are there"},
    {"tile", RG_ATTR_INT, true, 1, INT32_MAX, 0, NULL, "keys begin at a multiple of this"},
};
const rg_op rgi_op_cp_window = {.abi = RG_OP_ABI,
                                .name = "cp_window",
                                .doc = "sequences of keys in a chunk and the rows before it",
                                .flags = RG_OP_INTERNAL | RG_OP_COMM,
                                .in = blocks_in,
                                .nin = RGI_COUNT(blocks_in),
                                .out = window_out,
                                .nout = RGI_COUNT(window_out),
                                .attrs = window_attrs,
                                .nattr = RGI_COUNT(window_attrs),
                                .cost = cost,
                                .run_cpu = window_run,
                                .cuda_steps = window_cuda,
                                .rules = &(const rgi_rules){.infer = window_infer}};
