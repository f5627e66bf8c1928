/* ops/comm/gather.c: rows of all ranks on each (all_gather), sums over the ranks of what each has
 * for all rows (reduce_scatter) or for one tensor (all_reduce).
 *
 *     all_gather      y[chunk c] = the ranks' x[place order[c]]
 *     reduce_scatter  y[own chunk] = Σ_r x_r[that chunk]          the other way round
 *     all_reduce      y = Σ_r x_r
 *
 * Sums are taken here, in fp32 and in rank order, of what an all-to-all brought: as many bytes on
 * the wire as a ring takes, and the same bits on every run, rank and machine. What is gathered is
 * differentiated in fp32: readers on several ranks add to a sum that is cast once.
 *
 * A comm block is | to send | received |. What reduce_scatter sends would often be the largest
 * there is, so it goes in rounds, some columns (of the last axis) at a time, where it is more than
 * `room`.
 */
#include "comm.h"
#include "../cuda/comm.h"

enum { A_RANKS, A_WIRE, A_ROOM };
enum { IN_X, IN_ORDER, IN_CU };

static const char *const wires[] = {"f32", "bf16", NULL};
#define RANKS \
  { "ranks", RG_ATTR_INT, true, 1, RGI_MOST_RANKS, 1, NULL, "ranks there are" }
#define WIRE                                                                                      \
  {                                                                                               \
    "wire", RG_ATTR_ENUM, false, 0, 0, RGI_WIRE_F32, wires,                                       \
        "type in which terms of the sum (all_gather: of the gradient) travel; sums are taken in " \
        "fp32"                                                                                    \
  }
#define ORDER                                                                                     \
  {                                                                                               \
    "order", "C", RG_PORT_OPTIONAL, RG_D(RG_I32), 0, -1,                                          \
        "place of each of C chunks among the ranks' chunks, rank by rank; absent: one after the " \
        "other"                                                                                   \
  }

enum { ROOM = 256 << 20 };
#define ROOM_ATTR                                                                               \
  {                                                                                             \
    "room", RG_ATTR_INT, false, 1, INT32_MAX, ROOM, NULL,                                       \
        "bytes that are sent at once; more are sent in rounds, as far as the last axis can be " \
        "cut into powers of two"                                                                \
  }

static rg_dtype wire_type(const rg_call *c) {
  return c->attr[A_WIRE].i == RGI_WIRE_BF16 ? RG_BF16 : RG_F32;
}

/* ---- shapes ---- */

/* Axis 0 of the rows of one rank, and of all, divide as they must. */
static rg_status check_rows(const rgi_graph *g, int node, rgi_dim own, rgi_dim all,
                            const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  const int64_t ranks = n->attr[A_RANKS].i;
  const int order = rgi_in(n, IN_ORDER);
  if (rgi_dim_known(all) && all.c % ranks)
    return rgi_fail(e, RG_E_SHAPE, pointer, n->name, "%lld rows do not divide among %lld ranks",
                    (long long)all.c, (long long)ranks);
  if (order < 0 || !rgi_dim_known(g->tensor[order].dim[0])) return RG_OK;
  const int64_t chunks = g->tensor[order].dim[0].c;
  if (chunks < 1 || chunks % ranks)
    return rgi_fail(e, RG_E_SHAPE, pointer, n->name,
                    "order has %lld chunks; expected a multiple of %lld ranks", (long long)chunks,
                    (long long)ranks);
  if (rgi_dim_known(own) && own.c % (chunks / ranks))
    return rgi_fail(e, RG_E_SHAPE, pointer, n->name,
                    "%lld rows do not divide into a rank's %lld chunks", (long long)own.c,
                    (long long)(chunks / ranks));
  return RG_OK;
}

static rg_status needs_rows(const rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_tensor *x = &g->tensor[g->node[node].in[0]];
  if (x->rank > 0) return RG_OK;
  return rgi_fail(e, RG_E_RANK, pointer, g->node[node].name,
                  "\"%s\" is a scalar; expected rows on axis 0", x->name);
}

/* y has the rows of all ranks where x has one's (gather), or the other way round. */
static rg_status rows_infer(rgi_graph *g, int node, bool gather, const char *pointer, rg_error *e) {
  RGI_TRY(needs_rows(g, node, pointer, e));
  const rgi_node *n = &g->node[node];
  const rgi_dim x = g->tensor[n->in[0]].dim[0], ranks = rgi_dim_of(n->attr[A_RANKS].i);
  rgi_dim y;
  RGI_TRY(rgi_dim_binary(g->arena, gather ? '*' : '/', x, ranks, &y, e));
  RGI_TRY(check_rows(g, node, gather ? x : y, gather ? y : x, pointer, e));
  rgi_tensor_like(g, n->out[0], &g->tensor[n->in[0]], &y);
  return RG_OK;
}

static rg_status gather_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  return rows_infer(g, node, true, pointer, e);
}

static rg_status scatter_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  return rows_infer(g, node, false, pointer, e);
}

static rg_status reduce_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  (void)pointer, (void)e;
  rgi_tensor_like(g, n->out[0], &g->tensor[n->in[0]], NULL);
  return RG_OK;
}

/* ---- all_gather ---- */

static int64_t bytes_of(const rg_arg *a) {
  return (int64_t)rgi_arg_elements(a) * (int64_t)rg_dtype_size(a->dtype);
}

static size_t gather_comm(const rg_call *c) {
  return RGI_ROUND256(bytes_of(rg_in(c, IN_X))) + RGI_ROUND256(bytes_of(rg_out(c, 0)));
}

static rg_status gather_run(const rg_call *c) {
  const rg_arg *x = rg_in(c, IN_X), *y = rg_out(c, 0), *order = rg_in(c, IN_ORDER),
               *cu = rg_in(c, IN_CU);
  const int64_t bytes = bytes_of(x), chunks = order ? order->dim[0] : rgi_ranks(c, A_RANKS);
  char *send = c->comm_block, *recv = send + RGI_ROUND256(bytes);
  RGI_TRY(rgi_check_order(c, order));
  const rg_arg dense = rgi_dense_rows(x, x->dim[0], send, x->dtype);
  rgi_copy_rows(c, &dense, x, rgi_live_rows(cu, x->dim[0]));
  RGI_TRY(rgi_all_gather(c, send, recv, (size_t)bytes));
  const int64_t rows = y->dim[0] / chunks;
  const rg_arg all = rgi_dense_rows(y, y->dim[0], recv, y->dtype);
  for (int64_t i = 0; i < chunks; i++) {
    const rg_arg to = rgi_rows(y, i * rows, rows),
                 from = rgi_rows(&all, rgi_place(order, i) * rows, rows);
    rgi_copy_rows(c, &to, &from, rows);
  }
  return RG_OK;
}

static rg_status gather_cuda(const rg_call *c, rg_cuda *k) {
  const rg_arg *x = rg_in(c, IN_X), *y = rg_out(c, 0);
  const int64_t bytes = bytes_of(x);
  int64_t recv = RGI_ROUND256(bytes);
  const rg_arg dense = rgi_cuda_dense(c, x, x->dim[0], 0, x->dtype);
  RGI_TRY(rgi_cuda_copy(k, x, &dense, rg_in(c, IN_CU)));
  RGI_TRY(rgi_cuda_all_gather(c, k, rgi_ranks(c, A_RANKS), 0, &recv, bytes));
  const rg_arg all = rgi_cuda_dense(c, y, y->dim[0], recv, y->dtype);
  return rgi_cuda_permute(k, &all, y, rg_in(c, IN_ORDER), false);
}

static void gather_cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.bytes = rgi_call_bytes(c),
                   .wire = (double)(rgi_ranks(c, A_RANKS) - 1) * (double)bytes_of(rg_in(c, IN_X))};
}

/* The node whose gradient arrives, turned round: op `back` on it and on the order. */
static rg_status turn_round(rgi_backward *b, int node, const char *back, const char *suffix,
                            bool order, rg_error *e) {
  int gradient = rgi_bwd_gradient(b, node, 0), made;
  if (gradient < 0) return RG_OK;
  const rgi_node *n = &rgi_bwd_graph(b)->node[node];
  const rg_value wire = n->op->nattr > A_WIRE ? n->attr[A_WIRE] : (rg_value){0};
  const rg_value attr[] = {n->attr[A_RANKS], wire, {.i = ROOM}};
  const int in[] = {gradient, order ? rgi_in(n, IN_ORDER) : -1}, count[] = {1, in[1] >= 0, 0};
  RGI_TRY(rgi_bwd_node(b, node, back, attr, in, count, suffix, 1, &made, e));
  return rgi_bwd_hand_over(b, node, 0, made, e);
}

static rg_status gather_backward(rgi_backward *b, int node, rg_error *e) {
  return turn_round(b, node, "reduce_scatter", ".scatter", true, e);
}

static const rg_port gather_in[] = {
    [IN_X] = {"x", "*", RG_PORT_ROWS, RG_D_FLOAT | RG_D(RG_I32), 'X', -1, "this rank's rows"},
    [IN_ORDER] = ORDER,
    [IN_CU] = {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
               "starts of the sequences in x; rows past them are gathered as zeros"},
};
static const rg_port gather_out[] = {
    {"y", "*", 0, RG_D_FLOAT | RG_D(RG_I32), 'X', -1, "the rows of all ranks"},
};
static const rg_attr gather_attrs[] = {RANKS, WIRE};
static const rgi_rules gather_rules = {
    .infer = gather_infer, .backward = gather_backward, .wide = true};
const rg_op rgi_op_all_gather = {.abi = RG_OP_ABI,
                                 .name = "all_gather",
                                 .doc = "the rows of all ranks",
                                 .flags = RG_OP_RECOMPUTABLE | RG_OP_COMM,
                                 .in = gather_in,
                                 .nin = RGI_COUNT(gather_in),
                                 .out = gather_out,
                                 .nout = RGI_COUNT(gather_out),
                                 .attrs = gather_attrs,
                                 .nattr = RGI_COUNT(gather_attrs),
                                 .cost = gather_cost,
                                 .comm_bytes = gather_comm,
                                 .run_cpu = gather_run,
                                 .cuda_steps = gather_cuda,
                                 .rules = &gather_rules};

/* ---- ordered sums ---- */

typedef struct sum {
  const rg_arg *y,
      *first; /* the first rank's terms, dense; the next rank's are `step` bytes further */
  int64_t step;
  int ranks, isa;
} sum;

static void sum_run(void *user, const rgi_run *run) {
  const sum *w = user;
  char *to = rgi_run_at(run, w->y);
  const char *from = rgi_run_at(run, w->first);
  const size_t size = rg_dtype_size(w->first->dtype), wide = rg_dtype_size(w->y->dtype);
  float total[RGI_PIECE], term[RGI_PIECE];
  for (int64_t at = 0; at < run->n; at += RGI_PIECE) {
    const int64_t n = run->n - at < RGI_PIECE ? run->n - at : RGI_PIECE;
    rgi_load_by(w->isa, total, w->first->dtype, from + (size_t)at * size, n);
    for (int r = 1; r < w->ranks; r++) {
      rgi_load_by(w->isa, term, w->first->dtype, from + r * w->step + (int64_t)((size_t)at * size),
                  n);
      rgi_store_add(total, term, n);
    }
    rgi_store_by(w->isa, to + (size_t)at * wide, w->y->dtype, total, n);
  }
}

/* y := Σ_r of what stands at recv + r·step, dense in `wire` */
static void sum_ranks(const rg_call *c, const rg_arg *y, void *recv, int64_t step, rg_dtype wire) {
  const rg_arg first = rgi_dense_rows(y, y->rank ? y->dim[0] : 1, recv, wire);
  sum user = {.y = y, .first = &first, .step = step, .ranks = rgi_ranks(c, A_RANKS), .isa = c->isa};
  rgi_walk w;
  rgi_walk_begin(&w, y, INT64_MAX);
  rgi_walk_with(&w, &first);
  rgi_walk_run(c, &w, sum_run, &user);
}

/* ---- reduce_scatter ---- */

static int64_t wire_bytes(const rg_call *c) {
  return (int64_t)rgi_arg_elements(rg_in(c, IN_X)) * (int64_t)rg_dtype_size(wire_type(c));
}

static int64_t rounds(const rg_call *c) {
  const rg_arg *x = rg_in(c, IN_X);
  const int64_t columns = x->rank > 1 ? x->dim[x->rank - 1] : 1;
  int64_t n = 1;
  while (wire_bytes(c) / n > c->attr[A_ROOM].i && columns % (2 * n) == 0) n *= 2;
  return n;
}

/* The columns of round i. */
static rg_arg columns_of(const rg_arg *a, int64_t n, int64_t i) {
  const int last = a->rank - 1;
  const int64_t each = n == 1 ? 0 : a->dim[last] / n;
  return n == 1 ? *a : rgi_slice(a, last, i * each, each);
}

static size_t scatter_comm(const rg_call *c) {
  return 2 * RGI_ROUND256(wire_bytes(c) / rounds(c));
}

static rg_status scatter_run(const rg_call *c) {
  const rg_arg *order = rg_in(c, IN_ORDER);
  const int ranks = rgi_ranks(c, A_RANKS);
  const int64_t n = rounds(c), bytes = wire_bytes(c) / n, chunks = order ? order->dim[0] : ranks;
  char *send = c->comm_block, *recv = send + RGI_ROUND256(bytes);
  RGI_TRY(rgi_check_order(c, order));
  for (int64_t round = 0; round < n; round++) {
    const rg_arg x = columns_of(rg_in(c, IN_X), n, round), y = columns_of(rg_out(c, 0), n, round);
    const rg_arg all = rgi_dense_rows(&x, x.dim[0], send, wire_type(c));
    const int64_t rows = x.dim[0] / chunks;
    for (int64_t i = 0; i < chunks; i++) {
      const rg_arg from = rgi_rows(&x, i * rows, rows),
                   to = rgi_rows(&all, rgi_place(order, i) * rows, rows);
      rgi_copy_rows(c, &to, &from, rows);
    }
    RGI_TRY(rgi_all_to_all(c, send, recv, (size_t)(bytes / ranks)));
    sum_ranks(c, &y, recv, bytes / ranks, wire_type(c));
  }
  return RG_OK;
}

static rg_status scatter_cuda(const rg_call *c, rg_cuda *k) {
  const int ranks = rgi_ranks(c, A_RANKS);
  const int64_t n = rounds(c), bytes = wire_bytes(c) / n;
  for (int64_t round = 0; round < n; round++) {
    const rg_arg x = columns_of(rg_in(c, IN_X), n, round), y = columns_of(rg_out(c, 0), n, round);
    const rg_arg all = rgi_cuda_dense(c, &x, x.dim[0], 0, wire_type(c));
    int64_t recv = RGI_ROUND256(bytes);
    RGI_TRY(rgi_cuda_permute(k, &x, &all, rg_in(c, IN_ORDER), true));
    RGI_TRY(rgi_cuda_all_to_all(c, k, ranks, 0, &recv, bytes / ranks));
    const char *came = (const char *)c->comm_block + recv;
    RGI_TRY(rgi_cuda_sum(k, &y, came, bytes / ranks, ranks, wire_type(c)));
  }
  return RG_OK;
}

static void scatter_cost(const rg_call *c, rg_cost *out) {
  const double ranks = rgi_ranks(c, A_RANKS);
  *out = (rg_cost){.flops = (double)rgi_arg_elements(rg_in(c, IN_X)),
                   .bytes = rgi_call_bytes(c),
                   .wire = (ranks - 1) / ranks * (double)wire_bytes(c)};
}

static rg_status scatter_backward(rgi_backward *b, int node, rg_error *e) {
  return turn_round(b, node, "all_gather", ".gather", true, e);
}

static const rg_port scatter_in[] = {
    [IN_X] = {"x", "*", 0, RG_D_FLOAT, 'X', -1, "terms for the rows of all ranks"},
    [IN_ORDER] = ORDER,
};
static const rg_port scatter_out[] = {
    {"y", "*", 0, RG_D_FLOAT, 'X', -1, "sums over the ranks, for this rank's rows"},
};
static const rg_attr scatter_attrs[] = {RANKS, WIRE, ROOM_ATTR};
static const rgi_rules scatter_rules = {
    .infer = scatter_infer, .backward = scatter_backward, .wide = true};
const rg_op rgi_op_reduce_scatter = {.abi = RG_OP_ABI,
                                     .name = "reduce_scatter",
                                     .doc =
                                         "sums over the ranks, in rank order, of this rank's rows",
                                     .flags = RG_OP_COMM,
                                     .in = scatter_in,
                                     .nin = RGI_COUNT(scatter_in),
                                     .out = scatter_out,
                                     .nout = RGI_COUNT(scatter_out),
                                     .attrs = scatter_attrs,
                                     .nattr = RGI_COUNT(scatter_attrs),
                                     .cost = scatter_cost,
                                     .comm_bytes = scatter_comm,
                                     .run_cpu = scatter_run,
                                     .cuda_steps = scatter_cuda,
                                     .rules = &scatter_rules};

/* ---- all_reduce: each rank sums a part, then all parts are gathered ---- */

static int64_t part_bytes(const rg_call *c) {
  const int64_t n = (int64_t)rgi_arg_elements(rg_in(c, IN_X)), ranks = rgi_ranks(c, A_RANKS);
  return (n + ranks - 1) / ranks * (int64_t)rg_dtype_size(wire_type(c));
}

static size_t reduce_comm(const rg_call *c) {
  return 2 * RGI_ROUND256(part_bytes(c) * rgi_ranks(c, A_RANKS));
}

static rg_status reduce_run(const rg_call *c) {
  const rg_arg *x = rg_in(c, IN_X), *y = rg_out(c, 0);
  const rg_dtype wire = wire_type(c);
  const int64_t part = part_bytes(c), bytes = part * rgi_ranks(c, A_RANKS);
  const int64_t used = wire_bytes(c), rows = x->rank ? x->dim[0] : 1;
  char *send = c->comm_block, *recv = send + RGI_ROUND256(bytes);
  rg_arg dense = rgi_dense_rows(x, rows, send, wire);
  rgi_copy_rows(c, &dense, x, INT64_MAX);
  memset(send + used, 0, (size_t)(bytes - used)); /* the last part may be shorter */
  RGI_TRY(rgi_all_to_all(c, send, recv, (size_t)part));
  const rg_arg sums = {.data = send,
                       .dtype = wire,
                       .rank = 1,
                       .dim = {part / (int64_t)rg_dtype_size(wire)},
                       .stride = {1}};
  sum_ranks(c, &sums, recv, part, wire);
  RGI_TRY(rgi_all_gather(c, send, recv, (size_t)part));
  dense = rgi_dense_rows(y, rows, recv, wire);
  rgi_copy_rows(c, y, &dense, INT64_MAX);
  return RG_OK;
}

static rg_status reduce_cuda(const rg_call *c, rg_cuda *k) {
  const rg_arg *x = rg_in(c, IN_X), *y = rg_out(c, 0);
  const rg_dtype wire = wire_type(c);
  const int ranks = rgi_ranks(c, A_RANKS);
  const int64_t part = part_bytes(c), bytes = part * ranks, used = wire_bytes(c);
  const int64_t rows = x->rank ? x->dim[0] : 1;
  int64_t recv = RGI_ROUND256(bytes);
  rg_arg dense = rgi_cuda_dense(c, x, rows, 0, wire);
  RGI_TRY(rgi_cuda_copy(k, x, &dense, NULL));
  RGI_TRY(rgi_cuda_clear(k, (char *)c->comm_block + used, bytes - used, wire));
  RGI_TRY(rgi_cuda_all_to_all(c, k, ranks, 0, &recv, part));
  const rg_arg flat = {.rank = 1, .dim = {part / (int64_t)rg_dtype_size(wire)}};
  const rg_arg sums = rgi_cuda_dense(c, &flat, flat.dim[0], 0, wire);
  RGI_TRY(rgi_cuda_sum(k, &sums, (const char *)c->comm_block + recv, part, ranks, wire));
  recv = RGI_ROUND256(bytes);
  RGI_TRY(rgi_cuda_all_gather(c, k, ranks, 0, &recv, part));
  dense = rgi_cuda_dense(c, y, rows, recv, wire);
  return rgi_cuda_copy(k, &dense, y, NULL);
}

static void reduce_cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.flops = (double)rgi_arg_elements(rg_in(c, IN_X)),
                   .bytes = rgi_call_bytes(c),
                   .wire = 2.0 * (double)(rgi_ranks(c, A_RANKS) - 1) * (double)part_bytes(c)};
}

static rg_status reduce_backward(rgi_backward *b, int node, rg_error *e) {
  return turn_round(b, node, "all_reduce", ".reduce", false, e);
}

static const rg_attr reduce_attrs[] = {RANKS, WIRE};
static const rg_port reduce_in[] = {{"x", "*", 0, RG_D_FLOAT, 'X', -1, "this rank's terms"}};
static const rg_port reduce_out[] = {{"y", "*", 0, RG_D_FLOAT, 'X', -1, "sums over the ranks"}};
static const rgi_rules reduce_rules = {
    .infer = reduce_infer, .backward = reduce_backward, .wide = true};
const rg_op rgi_op_all_reduce = {.abi = RG_OP_ABI,
                                 .name = "all_reduce",
                                 .doc = "sums over the ranks, in rank order",
                                 .flags = RG_OP_COMM,
                                 .in = reduce_in,
                                 .nin = RGI_COUNT(reduce_in),
                                 .out = reduce_out,
                                 .nout = RGI_COUNT(reduce_out),
                                 .attrs = reduce_attrs,
                                 .nattr = RGI_COUNT(reduce_attrs),
                                 .cost = reduce_cost,
                                 .comm_bytes = reduce_comm,
                                 .run_cpu = reduce_run,
                                 .cuda_steps = reduce_cuda,
                                 .rules = &reduce_rules};

/* ---- a weight that all ranks have: a look at it, whose gradient is summed over the ranks ---- */

static rg_status shared_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  (void)pointer, (void)e;
  const int x = g->node[node].in[0];
  const rgi_tensor *from = &g->tensor[x];
  rgi_tensor *to = &g->tensor[g->node[node].out[0]];
  to->dtype = from->dtype;
  to->rank = from->rank;
  memcpy(to->dim, from->dim, sizeof to->dim);
  memcpy(to->stride, from->stride, sizeof to->stride);
  to->offset = from->offset;
  to->base = rgi_owner(g, x);
  return RG_OK;
}

static const rgi_rules shared_rules = {
    .infer = shared_infer, .backward = reduce_backward, .wide = true};
const rg_op rgi_op_shared_weight = {
    .abi = RG_OP_ABI,
    .name = "shared_weight",
    .doc = "view of what all ranks have; its gradient is the sum of theirs",
    .flags = RG_OP_VIEW | RG_OP_INTERNAL,
    .in = reduce_in,
    .nin = RGI_COUNT(reduce_in),
    .out = reduce_out,
    .nout = RGI_COUNT(reduce_out),
    .attrs = reduce_attrs,
    .nattr = RGI_COUNT(reduce_attrs),
    .rules = &shared_rules};
