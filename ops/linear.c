/* ops/linear.c: y = x·Wᵀ + b, and its gradients.

       x [T, K]   W [N, K]   b [N]   y [T, N]
       dx = dy·W      dW = dyᵀ·x      db = Σ_t dy

   Only live rows count: y is zero past them (bias or not), and dy there is ignored. Sums over
   tokens run in chunks of RGI_GEMM_KC, chunk after chunk onto what is there.
 */
#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "cuda/linear.h"

static const rg_attr attrs[RGI_LINEAR_ATTRS] = {
    [RGI_LINEAR_BATCH_INVARIANT] =
        {"batch_invariant", RG_ATTR_BOOL, false, 0, 0, 0, NULL,
         "a row's bits do not depend on how many rows there are, on a GPU either: no library's "
         "product, whose order of sums may"},
};

static rgi_mat matrix(const rg_arg *a) {
  return (rgi_mat){.data = a->data, .type = a->dtype, .stride = a->stride[0]};
}

/* Per thread: the product's room, then a tile of the result. */
#define PER_THREAD (RGI_GEMM_WORK + RGI_ROUND256(RGI_GEMM_MC * RGI_GEMM_NC * 4))

static size_t workspace(const rg_call *c) {
  return c->gpu ? 0 : (size_t)c->threads * PER_THREAD;
}
static size_t backward_workspace(const rg_call *c) {
  return c->gpu ? rgi_cuda_linear_bwd_workspace(c) : workspace(c);
}

/* One product cut into tiles: C = A·Bᵀ over the first m rows, stored as `out` (+ bias), or added to
 * it. */
typedef struct product {
  const rg_call *c;
  rgi_mat a, b;
  const rg_arg *out, *bias;
  bool add;
  int64_t m, n, k;
  rgi_tiling tiling;
} product;

static void product_task(void *arg, int64_t task, int thread) {
  const product *p = arg;
  const rgi_tiling *t = &p->tiling;
  int isa = p->c->isa;
  int64_t i0 = task / t->across * t->m, j0 = task % t->across * t->n;
  int64_t m = p->m - i0 < t->m ? p->m - i0 : t->m, n = p->n - j0 < t->n ? p->n - j0 : t->n;
  char *work = (char *)p->c->workspace + (size_t)thread * PER_THREAD;
  float *tile = (float *)(work + RGI_GEMM_WORK), bias[RGI_GEMM_NC]; /* [m, n] */
  rgi_mat a = p->a, b = p->b;
  a.k_rows ? (a.col0 = i0) : (a.row0 = i0);
  b.k_rows ? (b.col0 = j0) : (b.row0 = j0);
  if (p->out->dtype == RG_F32 && !p->bias) { /* nothing to convert: straight into place */
    rgi_gemm(isa, work, m, n, p->k, &a, &b, (float *)p->out->data + i0 * p->out->stride[0] + j0,
             p->out->stride[0], p->add);
    return;
  }
  rgi_gemm(isa, work, m, n, p->k, &a, &b, tile, n, false);
  size_t size = rg_dtype_size(p->out->dtype);
  if (p->bias)
    rgi_load_by(isa, bias, p->bias->dtype,
                (const char *)p->bias->data + (size_t)j0 * rg_dtype_size(p->bias->dtype), n);
  for (int64_t r = 0; r < m; r++) {
    float *row = tile + r * n;
    if (p->bias) rgi_store_add(row, bias, n);
    rgi_store_by(isa, (char *)rgi_at(p->out, i0 + r, 0) + (size_t)j0 * size, p->out->dtype, row, n);
  }
}

static void run_product(product *p) {
  p->tiling = rgi_gemm_tiling(p->m, p->n, p->c->threads);
  p->c->parallel(p->c->pool, p->tiling.count, product_task, p);
}

/* Rows [live, rows) of a [rows, n] := 0. */
typedef struct tail {
  const rg_arg *a;
  int64_t live;
} tail;
#define TAIL_ROWS 64
static void tail_task(void *arg, int64_t task, int thread) {
  const tail *t = arg;
  int64_t first = t->live + task * TAIL_ROWS,
          end = first + TAIL_ROWS < t->a->dim[0] ? first + TAIL_ROWS : t->a->dim[0];
  (void)thread;
  for (int64_t r = first; r < end; r++)
    memset(rgi_at(t->a, r, 0), 0, (size_t)t->a->dim[1] * rg_dtype_size(t->a->dtype));
}
static void zero_tail(const rg_call *c, const rg_arg *a, int64_t live) {
  tail t = {a, live};
  c->parallel(c->pool, (a->dim[0] - live + TAIL_ROWS - 1) / TAIL_ROWS, tail_task, &t);
}

/* ---- forward ---- */

enum { IN_X, IN_W, IN_B, IN_CU };

static rg_status forward(const rg_call *c) {
  const rg_arg *x = rg_in(c, IN_X), *w = rg_in(c, IN_W), *y = rg_out(c, 0);
  product p = {.c = c,
               .a = matrix(x),
               .b = matrix(w),
               .out = y,
               .bias = rg_in(c, IN_B),
               .n = w->dim[0],
               .k = x->dim[1]};
  p.m = rgi_live_rows(rg_in(c, IN_CU), x->dim[0]);
  run_product(&p);
  zero_tail(c, y, p.m);
  return RG_OK;
}

static void cost(const rg_call *c, rg_cost *out) {
  const rg_arg *x = rg_in(c, IN_X), *w = rg_in(c, IN_W);
  *out = (rg_cost){.flops = 2.0 * (double)x->dim[0] * (double)x->dim[1] * (double)w->dim[0],
                   .bytes = rgi_call_bytes(c)};
}

/* ---- backward ---- */

enum { BW_X, BW_W, BW_B, BW_CU, BW_GRAD, BW_ACC_X, BW_ACC_W, BW_ACC_B };
enum { BW_D_X, BW_D_W, BW_D_B };

#define BIAS_COLS 128 /* columns of dy a task sums */

typedef struct bias_job {
  const rg_call *c;
  const rg_arg *dy, *db; /* [T, N], [N] */
  bool add;
  int64_t live;
} bias_job;

static void bias_task(void *arg, int64_t task, int thread) {
  const bias_job *j = arg;
  const rg_arg *dy = j->dy, *db = j->db;
  int64_t first = task * BIAS_COLS,
          n = db->dim[0] - first < BIAS_COLS ? db->dim[0] - first : BIAS_COLS;
  float sum[BIAS_COLS], chunk[BIAS_COLS], row[BIAS_COLS];
  char *to = (char *)db->data + (size_t)first * rg_dtype_size(db->dtype);
  (void)thread;
  for (int64_t i = 0; i < n; i++) sum[i] = -0.0f; /* what sums begin with: x + -0 is x */
  if (j->add) memcpy(sum, to, (size_t)n * 4);
  int64_t t0 = 0;
  do { /* at least once: an empty sum is +0 */
    memset(chunk, 0, sizeof chunk);
    for (int64_t t = t0; t < j->live && t < t0 + RGI_GEMM_KC; t++) {
      rgi_load_by(j->c->isa, row, dy->dtype,
                  (const char *)rgi_at(dy, t, 0) + (size_t)first * rg_dtype_size(dy->dtype), n);
      rgi_store_add(chunk, row, n);
    }
    rgi_store_add(sum, chunk, n);
    t0 += RGI_GEMM_KC;
  } while (t0 < j->live);
  rgi_store_by(j->c->isa, to, db->dtype, sum, n);
}

static rg_status backward(const rg_call *c) {
  const rg_arg *x = rg_in(c, BW_X), *w = rg_in(c, BW_W), *dy = rg_in(c, BW_GRAD);
  const rg_arg *dx = rg_out(c, BW_D_X), *dw = rg_out(c, BW_D_W), *db = rg_out(c, BW_D_B);
  int64_t live = rgi_live_rows(rg_in(c, BW_CU), x->dim[0]);
  if (dx) {
    product p = {
        .c = c, .a = matrix(dy), .b = matrix(w), .out = dx, .add = rg_in(c, BW_ACC_X) != NULL};
    p.b.k_rows = true;
    p.m = live, p.n = x->dim[1], p.k = w->dim[0];
    run_product(&p);
    if (!p.add) zero_tail(c, dx, live);
  }
  if (dw) {
    product p = {
        .c = c, .a = matrix(dy), .b = matrix(x), .out = dw, .add = rg_in(c, BW_ACC_W) != NULL};
    p.a.k_rows = p.b.k_rows = true;
    p.m = w->dim[0], p.n = w->dim[1], p.k = live;
    run_product(&p);
  }
  if (db) {
    bias_job j = {c, dy, db, rg_in(c, BW_ACC_B) != NULL, live};
    c->parallel(c->pool, (db->dim[0] + BIAS_COLS - 1) / BIAS_COLS, bias_task, &j);
  }
  return RG_OK;
}

static void backward_cost(const rg_call *c, rg_cost *out) {
  int products = (rg_out(c, BW_D_X) != NULL) + (rg_out(c, BW_D_W) != NULL);
  cost(c, out);
  out->flops *= products;
  if (rg_out(c, BW_D_B)) out->flops += rgi_arg_elements(rg_in(c, BW_GRAD));
}

/* ---- descriptors ---- */

static const rg_port in[] = {
    {"x", "T,K", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "rows"},
    {"w", "N,K", 0, RG_D_FLOAT, 'F', -1, "weight"},
    {"b", "N", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "bias"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences; absent: all rows are live"},
};
static const rg_port out[] = {{"y", "T,N", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "x·Wᵀ + b"}};

static const rg_port bwd_in[] = {
    {"x", "T,K", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "rows"},
    {"w", "N,K", 0, RG_D_FLOAT, 'F', -1, "weight"},
    {"b", "N", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "bias; not read"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences"},
    {"grad.y", "T,N", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "gradient of y"},
    {"acc.x", "T,K", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, -1, "sum so far"},
    {"acc.w", "N,K", RG_PORT_OPTIONAL, RG_D(RG_F32), 0, -1, "sum so far"},
    {"acc.b", "N", RG_PORT_OPTIONAL, RG_D(RG_F32), 0, -1, "sum so far"},
};
static const rg_port bwd_out[] = {
    {"d.x", "T,K", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', -1,
     "gradient of x"},
    {"d.w", "N,K", RG_PORT_GRAD | RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "gradient of w"},
    {"d.b", "N", RG_PORT_GRAD | RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "gradient of b"},
};

const rg_op rgi_op_linear = {
    .abi = RG_OP_ABI,
    .name = "linear",
    .doc = "x·Wᵀ (+ b), as torch's linear",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_ROWWISE,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = attrs,
    .nattr = RGI_LINEAR_ATTRS,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = forward,
    .cuda_steps = rgi_cuda_linear,
    .cuda_path = rgi_cuda_linear_path,
    .backward = "linear.bwd",
};

const rg_op rgi_op_linear_bwd = {
    .abi = RG_OP_ABI,
    .name = "linear.bwd",
    .doc = "gradients of linear",
    .flags = RG_OP_INTERNAL,
    .in = bwd_in,
    .nin = RGI_COUNT(bwd_in),
    .out = bwd_out,
    .nout = RGI_COUNT(bwd_out),
    .attrs = attrs,
    .nattr = RGI_LINEAR_ATTRS,
    .cost = backward_cost,
    .workspace = backward_workspace,
    .run_cpu = backward,
    .cuda_steps = rgi_cuda_linear_bwd,
    .cuda_path = rgi_cuda_linear_path,
};
