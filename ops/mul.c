/* ops/mul.c: y = a·b, elementwise, and its gradients da = dy·b, db = dy·a. y may take a's bytes. */
#include "cpu/rows.h"
#include "cuda/rows.h"

enum { IN_A, IN_B, IN_CU };
enum { BW_A, BW_B, BW_CU, BW_GRAD, BW_ACC_A, BW_ACC_B };

/* to (+)= x·y, elementwise; shapes agree. */
typedef struct job {
  const rg_arg *x, *y, *to;
  bool add;
  int isa;
} job;

static void multiply_run(void *user, const rgi_run *r) {
  const job *j = user;
  size_t xs = rg_dtype_size(j->x->dtype), ys = rg_dtype_size(j->y->dtype),
         ts = rg_dtype_size(j->to->dtype);
  char *to = rgi_run_at(r, j->to);
  if (!r->live) {
    if (!j->add) memset(to, 0, (size_t)r->n * ts);
    return;
  }
  const char *x = rgi_run_at(r, j->x), *y = rgi_run_at(r, j->y);
  float p[RGI_PIECE], q[RGI_PIECE];
  for (int64_t i = 0; i < r->n; i += RGI_PIECE) {
    int64_t n = r->n - i < RGI_PIECE ? r->n - i : RGI_PIECE;
    rgi_load_by(j->isa, p, j->x->dtype, x + (size_t)i * xs, n);
    rgi_load_by(j->isa, q, j->y->dtype, y + (size_t)i * ys, n);
    for (int64_t k = 0; k < n; k++) p[k] *= q[k];
    rgi_put_grad(j->isa, j->add, to + (size_t)i * ts, j->to->dtype, p, n);
  }
}

static void multiply(const rg_call *c, const rg_arg *cu, const rg_arg *x, const rg_arg *y,
                     const rg_arg *to, bool add) {
  job j = {x, y, to, add, c->isa};
  rgi_walk w;
  rgi_walk_begin(&w, to, rgi_live_rows(cu, to->rank ? to->dim[0] : 1));
  rgi_walk_with(&w, x);
  rgi_walk_with(&w, y);
  rgi_walk_run(c, &w, multiply_run, &j);
}

static rg_status forward(const rg_call *c) {
  multiply(c, rg_in(c, IN_CU), rg_in(c, IN_A), rg_in(c, IN_B), rg_out(c, 0), false);
  return RG_OK;
}

static rg_status backward(const rg_call *c) {
  const rg_arg *cu = rg_in(c, BW_CU), *dy = rg_in(c, BW_GRAD), *da = rg_out(c, 0),
               *db = rg_out(c, 1);
  if (da) multiply(c, cu, dy, rg_in(c, BW_B), da, rg_in(c, BW_ACC_A) != NULL);
  if (db) multiply(c, cu, dy, rg_in(c, BW_A), db, rg_in(c, BW_ACC_B) != NULL);
  return RG_OK;
}

static rgi_map forward_map(const rg_call *c) {
  return (rgi_map){.map = RGK_MUL,
                   .cu = rg_in(c, IN_CU),
                   .tensor = {rg_in(c, IN_A), rg_in(c, IN_B), rg_out(c, 0)}};
}
static rg_status forward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_map m = forward_map(c);
  return rgi_cuda_map(x, &m);
}
static const char *forward_path(const rg_call *c) {
  rgi_map m = forward_map(c);
  return rgi_cuda_map_path(&m);
}

/* Both gradients in one pass, or the one that is wanted (d.a or d.b). */
static rgi_map backward_map(const rg_call *c) {
  const rg_arg *a = rg_in(c, BW_A), *b = rg_in(c, BW_B), *dy = rg_in(c, BW_GRAD);
  const rg_arg *da = rg_out(c, 0), *db = rg_out(c, 1);
  bool add_a = rg_in(c, BW_ACC_A) != NULL, add_b = rg_in(c, BW_ACC_B) != NULL;
  if (da && db)
    return (rgi_map){.map = RGK_MUL_BWD,
                     .cu = rg_in(c, BW_CU),
                     .tensor = {a, b, dy, da, db},
                     .add = {add_a, add_b}};
  return (rgi_map){.map = RGK_MUL,
                   .cu = rg_in(c, BW_CU),
                   .tensor = {dy, da ? b : a, da ? da : db},
                   .add = {da ? add_a : add_b}};
}
static rg_status backward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_map m = backward_map(c);
  return rg_out(c, 0) || rg_out(c, 1) ? rgi_cuda_map(x, &m) : RG_OK;
}
static const char *backward_path(const rg_call *c) {
  rgi_map m = backward_map(c);
  return rg_out(c, 0) || rg_out(c, 1) ? rgi_cuda_map_path(&m) : "nothing wanted";
}

static void cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.flops = rgi_arg_elements(rg_in(c, IN_A)), .bytes = rgi_call_bytes(c)};
}
static void backward_cost(const rg_call *c, rg_cost *out) {
  int products = (rg_out(c, 0) != NULL) + (rg_out(c, 1) != NULL);
  *out = (rg_cost){.flops = products * rgi_arg_elements(rg_in(c, BW_GRAD)),
                   .bytes = rgi_call_bytes(c)};
}

static const rg_port in[] = {
    {"a", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "one factor"},
    {"b", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "the other"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences; absent: all rows are live"},
};
static const rg_port out[] = {{"y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "a·b"}};

static const rg_port bwd_in[] = {
    {"a", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "one factor"},
    {"b", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "the other"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences"},
    {"grad.y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "gradient of y"},
    {"acc.a", "...", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, -1, "sum so far"},
    {"acc.b", "...", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, -1, "sum so far"},
};
static const rg_port bwd_out[] = {
    {"d.a", "...", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', -1,
     "gradient of a"},
    {"d.b", "...", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', -1,
     "gradient of b"},
};

const rg_op rgi_op_mul = {
    .abi = RG_OP_ABI,
    .name = "mul",
    .doc = "elementwise product",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_INPLACE | RG_OP_ROWWISE,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .cost = cost,
    .run_cpu = forward,
    .cuda_steps = forward_cuda,
    .cuda_path = forward_path,
    .backward = "mul.bwd",
};

const rg_op rgi_op_mul_bwd = {
    .abi = RG_OP_ABI,
    .name = "mul.bwd",
    .doc = "gradients of mul",
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
