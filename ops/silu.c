/* ops/silu.c: y = x·s and y = s, s = sigmoid(x), and their gradients dx = dy·s·(1 + x·(1 − s)) and
 * dx = dy·s·(1 − s). y may take x's bytes. */
#include "cpu/rows.h"
#include "cuda/rows.h"

enum { IN_X, IN_CU };
enum { BW_X, BW_CU, BW_GRAD, BW_ACC };

typedef struct job {
  const rg_arg *x, *dy, *to; /* dy NULL: forward */
  bool sigmoid;              /* alone */
  bool add;
  int isa;
} job;

/* v becomes what it is for, n elements of it; g [n]: dy, or NULL forward. */
static void sigmoid_of(float *v, const float *g, int64_t n) {
  for (int64_t k = 0; k < n; k++) {
    float s = rgi_sigmoid(v[k]);
    v[k] = g ? g[k] * s * rgi_sigmoid(-v[k]) : s; /* 1 − s: exact where s is near 1 */
  }
}

static void silu_of(float *v, const float *g, int64_t n) {
  for (int64_t k = 0; k < n; k++) {
    float s = rgi_sigmoid(v[k]);
    v[k] = g ? g[k] * s * (1.0f + v[k] * (1.0f - s)) : v[k] * s;
  }
}

static void act_run(void *user, const rgi_run *r) {
  const job *j = user;
  size_t xs = rg_dtype_size(j->x->dtype), ts = rg_dtype_size(j->to->dtype);
  char *to = rgi_run_at(r, j->to);
  if (!r->live) {
    if (!j->add) memset(to, 0, (size_t)r->n * ts);
    return;
  }
  const char *x = rgi_run_at(r, j->x), *dy = j->dy ? rgi_run_at(r, j->dy) : NULL;
  float v[RGI_PIECE], g[RGI_PIECE];
  for (int64_t i = 0; i < r->n; i += RGI_PIECE) {
    int64_t n = r->n - i < RGI_PIECE ? r->n - i : RGI_PIECE;
    rgi_load_by(j->isa, v, j->x->dtype, x + (size_t)i * xs, n);
    if (dy) rgi_load_by(j->isa, g, j->dy->dtype, dy + (size_t)i * rg_dtype_size(j->dy->dtype), n);
    (j->sigmoid ? sigmoid_of : silu_of)(v, dy ? g : NULL, n);
    rgi_put_grad(j->isa, j->add, to + (size_t)i * ts, j->to->dtype, v, n);
  }
}

static rg_status run(const rg_call *c, const rg_arg *cu, const job *j) {
  rgi_walk w;
  if (!j->to) return RG_OK;
  rgi_walk_begin(&w, j->to, rgi_live_rows(cu, j->to->rank ? j->to->dim[0] : 1));
  rgi_walk_with(&w, j->x);
  if (j->dy) rgi_walk_with(&w, j->dy);
  rgi_walk_run(c, &w, act_run, (void *)(uintptr_t)j);
  return RG_OK;
}

static job forward_job(const rg_call *c, bool sigmoid) {
  return (job){.x = rg_in(c, IN_X), .to = rg_out(c, 0), .sigmoid = sigmoid, .isa = c->isa};
}
static rg_status forward(const rg_call *c) {
  job j = forward_job(c, false);
  return run(c, rg_in(c, IN_CU), &j);
}
static rg_status sigmoid_forward(const rg_call *c) {
  job j = forward_job(c, true);
  return run(c, rg_in(c, IN_CU), &j);
}

static job backward_job(const rg_call *c, bool sigmoid) {
  return (job){.x = rg_in(c, BW_X),
               .dy = rg_in(c, BW_GRAD),
               .to = rg_out(c, 0),
               .sigmoid = sigmoid,
               .add = rg_in(c, BW_ACC) != NULL,
               .isa = c->isa};
}
static rg_status backward(const rg_call *c) {
  job j = backward_job(c, false);
  return run(c, rg_in(c, BW_CU), &j);
}
static rg_status sigmoid_backward(const rg_call *c) {
  job j = backward_job(c, true);
  return run(c, rg_in(c, BW_CU), &j);
}

/* ---- CUDA ---- */

static rgi_map forward_map(const rg_call *c, rgk_map map) {
  return (rgi_map){.map = map, .cu = rg_in(c, IN_CU), .tensor = {rg_in(c, IN_X), rg_out(c, 0)}};
}
static rg_status forward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_map m = forward_map(c, RGK_SILU);
  return rgi_cuda_map(x, &m);
}
static rg_status sigmoid_forward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_map m = forward_map(c, RGK_SIGMOID);
  return rgi_cuda_map(x, &m);
}
static const char *forward_path(const rg_call *c) {
  rgi_map m = forward_map(c, RGK_SILU);
  return rgi_cuda_map_path(&m);
}

static rgi_map backward_map(const rg_call *c, rgk_map map) {
  return (rgi_map){.map = map,
                   .cu = rg_in(c, BW_CU),
                   .tensor = {rg_in(c, BW_X), rg_in(c, BW_GRAD), rg_out(c, 0)},
                   .add = {rg_in(c, BW_ACC) != NULL}};
}
static rg_status backward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_map m = backward_map(c, RGK_SILU_BWD);
  return rg_out(c, 0) ? rgi_cuda_map(x, &m) : RG_OK;
}
static rg_status sigmoid_backward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_map m = backward_map(c, RGK_SIGMOID_BWD);
  return rg_out(c, 0) ? rgi_cuda_map(x, &m) : RG_OK;
}
static const char *backward_path(const rg_call *c) {
  rgi_map m = backward_map(c, RGK_SILU_BWD);
  return rg_out(c, 0) ? rgi_cuda_map_path(&m) : "nothing wanted";
}

static void cost(const rg_call *c, rg_cost *out) {
  double n = rgi_arg_elements(rg_in(c, IN_X));
  *out = (rg_cost){.flops = 3 * n, .exps = n, .bytes = rgi_call_bytes(c)};
}
static void backward_cost(const rg_call *c, rg_cost *out) {
  double n = rgi_arg_elements(rg_in(c, BW_X));
  *out = (rg_cost){.flops = 7 * n, .exps = n, .bytes = rgi_call_bytes(c)};
}

static void sigmoid_cost(const rg_call *c, rg_cost *out) {
  double n = rgi_arg_elements(rg_in(c, IN_X));
  *out = (rg_cost){.flops = 2 * n, .exps = n, .bytes = rgi_call_bytes(c)};
}
static void sigmoid_backward_cost(const rg_call *c, rg_cost *out) {
  double n = rgi_arg_elements(rg_in(c, BW_X));
  *out = (rg_cost){.flops = 6 * n, .exps = n, .bytes = rgi_call_bytes(c)};
}

/* ---- descriptors ---- */

static const rg_port in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "any tensor"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences; absent: all rows are live"},
};
static const rg_port out[] = {{"y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "x·sigmoid(x)"}};
static const rg_port sigmoid_out[] = {
    {"y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "1 / (1 + exp(-x))"}};

static const rg_port bwd_in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "as forward"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences"},
    {"grad.y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "gradient of y"},
    {"acc.x", "...", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, -1, "sum so far"},
};
static const rg_port bwd_out[] = {{"d.x", "...", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS,
                                   RG_D_FLOAT, 'F', -1, "gradient of x"}};

const rg_op rgi_op_silu = {
    .abi = RG_OP_ABI,
    .name = "silu",
    .doc = "x·sigmoid(x), elementwise",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_INPLACE | RG_OP_ROWWISE,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .cost = cost,
    .run_cpu = forward,
    .cuda_steps = forward_cuda,
    .cuda_path = forward_path,
    .backward = "silu.bwd",
};

const rg_op rgi_op_silu_bwd = {
    .abi = RG_OP_ABI,
    .name = "silu.bwd",
    .doc = "gradient of silu",
    .flags = RG_OP_INTERNAL,
    .in = bwd_in,
    .nin = RGI_COUNT(bwd_in),
    .out = bwd_out,
    .nout = RGI_COUNT(bwd_out),
    .cost = backward_cost,
    .run_cpu = backward,
    .cuda_steps = backward_cuda,
    .cuda_path = backward_path,
};

const rg_op rgi_op_sigmoid = {
    .abi = RG_OP_ABI,
    .name = "sigmoid",
    .doc = "1 / (1 + exp(-x)), elementwise",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_INPLACE | RG_OP_ROWWISE,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = sigmoid_out,
    .nout = RGI_COUNT(sigmoid_out),
    .cost = sigmoid_cost,
    .run_cpu = sigmoid_forward,
    .cuda_steps = sigmoid_forward_cuda,
    .cuda_path = forward_path, /* by layout, as silu's */
    .backward = "sigmoid.bwd",
};

const rg_op rgi_op_sigmoid_bwd = {
    .abi = RG_OP_ABI,
    .name = "sigmoid.bwd",
    .doc = "gradient of sigmoid",
    .flags = RG_OP_INTERNAL,
    .in = bwd_in,
    .nin = RGI_COUNT(bwd_in),
    .out = bwd_out,
    .nout = RGI_COUNT(bwd_out),
    .cost = sigmoid_backward_cost,
    .run_cpu = sigmoid_backward,
    .cuda_steps = sigmoid_backward_cuda,
    .cuda_path = backward_path,
};
