/* ops/relu.c: the part of x on one side of 0, max(x, 0) or min(x, 0), and its gradient: dy there, 0
 * elsewhere and at 0. NaN stays. y may take x's bytes. */
#include "cpu/rows.h"
#include "cuda/rows.h"

enum { IN_X, IN_CU };
enum { BW_X, BW_CU, BW_GRAD, BW_ACC };
enum { A_SIDE };

typedef struct job {
  const rg_arg *x, *dy, *to; /* dy NULL: forward */
  float sign;
  bool add;
  int isa;
} job;

static void run_piece(void *user, const rgi_run *r) {
  const job *j = user;
  const rg_arg *from = j->dy ? j->dy : j->x;
  const size_t xs = rg_dtype_size(j->x->dtype), fs = rg_dtype_size(from->dtype),
               ts = rg_dtype_size(j->to->dtype);
  char *to = rgi_run_at(r, j->to);
  if (!r->live) {
    if (!j->add) memset(to, 0, (size_t)r->n * ts);
    return;
  }
  const char *x = rgi_run_at(r, j->x), *y = rgi_run_at(r, from);
  float v[RGI_PIECE], g[RGI_PIECE];
  for (int64_t i = 0; i < r->n; i += RGI_PIECE) {
    const int64_t n = r->n - i < RGI_PIECE ? r->n - i : RGI_PIECE;
    rgi_load_by(j->isa, v, j->x->dtype, x + (size_t)i * xs, n);
    rgi_load_by(j->isa, g, from->dtype, y + (size_t)i * fs, n);
    for (int64_t k = 0; k < n; k++) g[k] = j->sign * v[k] <= 0 ? 0 : g[k];
    rgi_put_grad(j->isa, j->add, to + (size_t)i * ts, j->to->dtype, g, n);
  }
}

static rg_status run(const rg_call *c, const rg_arg *cu, const job *j) {
  rgi_walk w;
  if (!j->to) return RG_OK;
  rgi_walk_begin(&w, j->to, rgi_live_rows(cu, j->to->rank ? j->to->dim[0] : 1));
  rgi_walk_with(&w, j->x);
  if (j->dy) rgi_walk_with(&w, j->dy);
  rgi_walk_run(c, &w, run_piece, (void *)(uintptr_t)j);
  return RG_OK;
}

static float sign(const rg_call *c) {
  return c->attr[A_SIDE].i ? -1.0f : 1.0f;
}

static rg_status forward(const rg_call *c) {
  const job j = {.x = rg_in(c, IN_X), .to = rg_out(c, 0), .sign = sign(c), .isa = c->isa};
  return run(c, rg_in(c, IN_CU), &j);
}
static rg_status backward(const rg_call *c) {
  const job j = {.x = rg_in(c, BW_X),
                 .dy = rg_in(c, BW_GRAD),
                 .to = rg_out(c, 0),
                 .sign = sign(c),
                 .add = rg_in(c, BW_ACC) != NULL,
                 .isa = c->isa};
  return run(c, rg_in(c, BW_CU), &j);
}

static rgi_map forward_map(const rg_call *c) {
  return (rgi_map){.map = RGK_RELU,
                   .cu = rg_in(c, IN_CU),
                   .tensor = {rg_in(c, IN_X), rg_out(c, 0)},
                   .value = sign(c)};
}
static rgi_map backward_map(const rg_call *c) {
  return (rgi_map){.map = RGK_RELU_BWD,
                   .cu = rg_in(c, BW_CU),
                   .tensor = {rg_in(c, BW_X), rg_in(c, BW_GRAD), rg_out(c, 0)},
                   .add = {rg_in(c, BW_ACC) != NULL},
                   .value = sign(c)};
}
static rg_status forward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_map m = forward_map(c);
  return rgi_cuda_map(x, &m);
}
static const char *forward_path(const rg_call *c) {
  rgi_map m = forward_map(c);
  return rgi_cuda_map_path(&m);
}
static rg_status backward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_map m = backward_map(c);
  return rg_out(c, 0) ? rgi_cuda_map(x, &m) : RG_OK;
}
static const char *backward_path(const rg_call *c) {
  rgi_map m = backward_map(c);
  return rg_out(c, 0) ? rgi_cuda_map_path(&m) : "nothing wanted";
}

static void cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.flops = rgi_arg_elements(rg_in(c, IN_X)), .bytes = rgi_call_bytes(c)};
}

static const rg_port in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "any tensor"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences; absent: all rows are live"},
};
static const rg_port out[] = {{"y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "max(x, 0), or min"}};
static const rg_port bwd_in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "as forward"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences"},
    {"grad.y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "gradient of y"},
    {"acc.x", "...", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, -1, "sum so far"},
};
static const rg_port bwd_out[] = {{"d.x", "...", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS,
                                   RG_D_FLOAT, 'F', -1, "gradient of x"}};
static const char *const sides[] = {"positive", "negative", NULL};
static const rg_attr attrs[] = {
    [A_SIDE] = {"side", RG_ATTR_ENUM, false, 0, 0, 0, sides, "which side of 0 is kept"},
};

const rg_op rgi_op_relu = {
    .abi = RG_OP_ABI,
    .name = "relu",
    .doc = "max(x, 0), or min(x, 0), elementwise",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_INPLACE | RG_OP_ROWWISE,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .cost = cost,
    .run_cpu = forward,
    .cuda_steps = forward_cuda,
    .cuda_path = forward_path,
    .backward = "relu.bwd",
};

const rg_op rgi_op_relu_bwd = {
    .abi = RG_OP_ABI,
    .name = "relu.bwd",
    .doc = "gradient of relu",
    .flags = RG_OP_INTERNAL,
    .in = bwd_in,
    .nin = RGI_COUNT(bwd_in),
    .out = bwd_out,
    .nout = RGI_COUNT(bwd_out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .cost = cost,
    .run_cpu = backward,
    .cuda_steps = backward_cuda,
    .cuda_path = backward_path,
};
