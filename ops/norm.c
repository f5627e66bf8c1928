/* ops/norm.c: rmsnorm and layernorm over the last axis, and their gradients.

       rmsnorm      r = 1 / sqrt(mean x² + eps)             n = x·r          y = n·w
       layernorm    r = 1 / sqrt(mean (x − m)² + eps)       n = (x − m)·r    y = n·w + b
                    m = mean x
       both         dx = r·(g − n·mean(g·n))    g = dy·w, for layernorm without its mean
                    dw = Σ over rows dy·n       db = Σ over rows dy

   The axes between the tokens and the last count as heads. dw, db: partial sums over chunks of
   CHUNK tokens of one head, then chunks in order, then heads from last to first, head by head onto
   what is there.
 */
#include "cpu/rows.h"
#include "cpu/watch.h"
#include "cuda/norm.h"

enum { ATTR_EPS, ATTR_COUNT };
static const rg_attr attrs[ATTR_COUNT] = {
    {"eps", RG_ATTR_FLOAT, false, 0, 1, 1e-6, NULL, "added to the mean square, or to the variance"},
};

#define CHUNK 128 /* tokens */
#define LANES 16  /* partial sums of a row, so that adding vectorises in a fixed order */

/* A tensor as rows: [tokens, heads, width]. */
typedef struct rows {
  int64_t tokens, heads, width;
} rows;

static rows rows_of(const rg_arg *x) {
  rows r = {1, 1, x->dim[x->rank - 1]};
  if (x->rank > 1) r.tokens = x->dim[0];
  for (int i = 1; i + 1 < x->rank; i++) r.heads *= x->dim[i];
  return r;
}

static char *row_at(const rg_arg *x, int64_t token, int64_t head) {
  int64_t e = x->rank > 1 ? token * x->stride[0] : 0;
  for (int i = x->rank - 2; i > 0; i--) {
    e += head % x->dim[i] * x->stride[i];
    head /= x->dim[i];
  }
  return (char *)x->data + e * (int64_t)rg_dtype_size(x->dtype);
}

static float sum_lanes(float *lane) {
  for (int width = LANES / 2; width; width /= 2)
    for (int k = 0; k < width; k++) lane[k] += lane[k + width];
  return lane[0];
}

/* Σ a·b */
RGI_UNCOUNTED static float dot(const float *a, const float *b, int64_t n) {
  float lane[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int k = 0; k < LANES; k++) lane[k] += a[i + k] * b[i + k];
  for (int k = 0; i + k < n; k++) lane[k] += a[i + k] * b[i + k];
  return sum_lanes(lane);
}

/* a without its mean. */
static void centre(float *a, int64_t n) {
  float lane[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int k = 0; k < LANES; k++) lane[k] += a[i + k];
  for (int k = 0; i + k < n; k++) lane[k] += a[i + k];
  float mean = sum_lanes(lane) / (float)n;
  for (i = 0; i < n; i++) a[i] -= mean;
}

typedef struct job {
  const rg_call *c;
  const rg_arg *x, *w, *b, *dy, *y; /* y: the output, or d.x (may be NULL in the backward) */
  bool layer;
  rows shape;
  int64_t live, chunks;
  bool add;
  float *partial; /* [chunks, heads, terms, width] or NULL */
  char *scratch;
  size_t per_thread;
} job;

/* Sums over rows: dw, and of layernorm db. */
static int terms(bool layer) {
  return layer ? 2 : 1;
}

/* Per thread: rows of x, w, dy and b in f32. */
static size_t thread_bytes(int64_t width, bool layer) {
  return RGI_ROUND256((size_t)width * (layer ? 4 : 3) * 4);
}

static void task(void *arg, int64_t number, int thread) {
  const job *j = arg;
  const rg_arg *y = j->y;
  int isa = j->c->isa;
  int64_t chunk = number / j->shape.heads, head = number % j->shape.heads, n = j->shape.width;
  int64_t first = chunk * CHUNK,
          end = first + CHUNK < j->shape.tokens ? first + CHUNK : j->shape.tokens;
  float *x = (float *)(j->scratch + (size_t)thread * j->per_thread), *w = x + n, *g = w + n,
        *b = j->b ? g + n : NULL;
  float *partial = j->partial ? j->partial + number * terms(j->layer) * n : NULL,
        eps = (float)j->c->attr[ATTR_EPS].f;
  if (partial) memset(partial, 0, (size_t)(terms(j->layer) * n) * 4);
  if (j->w) rgi_load_by(isa, w, j->w->dtype, j->w->data, n);
  if (b) rgi_load_by(isa, b, j->b->dtype, j->b->data, n);
  for (int64_t t = first; t < end; t++) {
    if (t >= j->live) {
      if (y && !j->add) memset(row_at(y, t, head), 0, (size_t)n * rg_dtype_size(y->dtype));
      continue;
    }
    rgi_load_by(isa, x, j->x->dtype, row_at(j->x, t, head), n);
    if (j->layer) centre(x, n);
    float scale = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) x[i] *= scale;
    if (!j->dy) {
      for (int64_t i = 0; j->w && i < n; i++) x[i] *= w[i];
      if (b) rgi_store_add(x, b, n);
      rgi_store_by(isa, row_at(y, t, head), y->dtype, x, n);
      continue;
    }
    rgi_load_by(isa, g, j->dy->dtype, row_at(j->dy, t, head), n);
    for (int64_t i = 0; partial && i < n; i++) partial[i] += g[i] * x[i];
    if (partial && j->layer) rgi_store_add(partial + n, g, n);
    if (!y) continue;
    for (int64_t i = 0; j->w && i < n; i++) g[i] *= w[i];
    if (j->layer) centre(g, n);
    float mean = dot(g, x, n) / (float)n;
    for (int64_t i = 0; i < n; i++) g[i] = scale * (g[i] - x[i] * mean);
    rgi_put_grad(isa, j->add, row_at(y, t, head), y->dtype, g, n);
  }
}

static void run(job *j) {
  j->shape = rows_of(j->x);
  if (j->live > j->shape.tokens) j->live = j->shape.tokens; /* rank 1: one row */
  j->chunks = (j->shape.tokens + CHUNK - 1) / CHUNK;
  j->per_thread = thread_bytes(j->shape.width, j->layer);
  j->c->parallel(j->c->pool, j->chunks * j->shape.heads, task, j);
}

static rg_status check_width(const rg_call *c, rg_error *e, const rg_arg *x, const char *name,
                             const rg_arg *w) {
  int64_t n = x->dim[x->rank - 1];
  if (w && n != RG_DIM_FREE && w->dim[0] != RG_DIM_FREE && w->dim[0] != n)
    return rg_op_fail(e, RG_E_SHAPE, c, "%s has %lld elements, expected %lld, the last axis of x",
                      name, (long long)w->dim[0], (long long)n);
  return RG_OK;
}

static rg_status check_shape(const rg_call *c, rg_error *e, const rg_arg *x, const rg_arg *w,
                             const rg_arg *cu) {
  if (x->rank < 1)
    return rg_op_fail(e, RG_E_RANK, c, "x is a scalar; expected an axis to normalise");
  if (x->rank == 1 && cu)
    return rg_op_fail(e, RG_E_RANK, c, "x has one axis, which can't be both tokens and features");
  return check_width(c, e, x, "w", w);
}

/* ---- forward ---- */

enum { IN_X, IN_W, IN_CU };
enum { LAYER_X, LAYER_W, LAYER_B, LAYER_CU };

static rg_status forward(const rg_call *c) {
  const rg_arg *x = rg_in(c, IN_X);
  job j = {.c = c, .x = x, .w = rg_in(c, IN_W), .y = rg_out(c, 0), .scratch = c->workspace};
  j.live = rgi_live_rows(rg_in(c, IN_CU), x->dim[0]);
  run(&j);
  return RG_OK;
}
static rg_status layer_forward(const rg_call *c) {
  const rg_arg *x = rg_in(c, LAYER_X);
  job j = {.c = c,
           .x = x,
           .w = rg_in(c, LAYER_W),
           .b = rg_in(c, LAYER_B),
           .layer = true,
           .y = rg_out(c, 0),
           .scratch = c->workspace};
  j.live = rgi_live_rows(rg_in(c, LAYER_CU), x->dim[0]);
  run(&j);
  return RG_OK;
}
static rg_status check(const rg_call *c, rg_error *e) {
  return check_shape(c, e, rg_in(c, IN_X), rg_in(c, IN_W), rg_in(c, IN_CU));
}
static rg_status layer_check(const rg_call *c, rg_error *e) {
  RGI_TRY(check_shape(c, e, rg_in(c, LAYER_X), rg_in(c, LAYER_W), rg_in(c, LAYER_CU)));
  return check_width(c, e, rg_in(c, LAYER_X), "b", rg_in(c, LAYER_B));
}
static size_t workspace(const rg_call *c) {
  return c->gpu ? 0 : (size_t)c->threads * thread_bytes(rows_of(rg_in(c, IN_X)).width, false);
}
static size_t layer_workspace(const rg_call *c) {
  return c->gpu ? 0 : (size_t)c->threads * thread_bytes(rows_of(rg_in(c, LAYER_X)).width, true);
}
static void cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.flops = 4 * rgi_arg_elements(rg_in(c, IN_X)), .bytes = rgi_call_bytes(c)};
}
static void layer_cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.flops = 7 * rgi_arg_elements(rg_in(c, LAYER_X)), .bytes = rgi_call_bytes(c)};
}

/* ---- backward ---- */

enum { BW_X, BW_W, BW_CU, BW_GRAD, BW_ACC_X, BW_ACC_W };
enum {
  LAYER_BW_X,
  LAYER_BW_W,
  LAYER_BW_B,
  LAYER_BW_CU,
  LAYER_BW_GRAD,
  LAYER_BW_ACC_X,
  LAYER_BW_ACC_W,
  LAYER_BW_ACC_B
};

/* Columns [first, first + n) of a sum over rows: chunks in order, heads from last to first. */
typedef struct weight_job {
  const job *rows;
  const rg_arg *dw; /* or db */
  int term;         /* 0: dw, 1: db */
  bool add;
} weight_job;

static void weight_task(void *arg, int64_t number, int thread) {
  const weight_job *j = arg;
  const rows *s = &j->rows->shape;
  int64_t first = number * RGI_PIECE,
          n = s->width - first < RGI_PIECE ? s->width - first : RGI_PIECE;
  char *to = (char *)j->dw->data + (size_t)first * rg_dtype_size(j->dw->dtype);
  float sum[RGI_PIECE], head[RGI_PIECE];
  (void)thread;
  for (int64_t i = 0; i < n; i++) sum[i] = -0.0f; /* what sums begin with: x + -0 is x */
  for (int64_t h = s->heads - 1; h >= 0; h--) {
    memset(head, 0, sizeof head);
    for (int64_t chunk = 0; chunk < j->rows->chunks; chunk++)
      rgi_store_add(head,
                    j->rows->partial +
                        ((chunk * s->heads + h) * terms(j->rows->layer) + j->term) * s->width +
                        first,
                    n);
    rgi_store_add(sum, head, n);
  }
  rgi_put_grad(j->rows->c->isa, j->add, to, j->dw->dtype, sum,
               n); /* as one term: sums may come in another order */
}

static size_t partial_bytes(rows s, bool layer) {
  return RGI_ROUND256((size_t)((s.tokens + CHUNK - 1) / CHUNK * s.heads * terms(layer) * s.width) *
                      4);
}

/* dw, db: NULL if not wanted */
static rg_status run_backward(job *j, const rg_arg *dw, bool add_w, const rg_arg *db, bool add_b) {
  const rg_call *c = j->c;
  j->scratch = c->workspace;
  if (dw || db) {
    j->partial = c->workspace;
    j->scratch += partial_bytes(rows_of(j->x), j->layer);
  }
  if (j->y || dw || db) run(j);
  weight_job sums[2] = {{j, dw, 0, add_w}, {j, db, 1, add_b}};
  for (int i = 0; i < 2; i++)
    if (sums[i].dw)
      c->parallel(c->pool, (j->shape.width + RGI_PIECE - 1) / RGI_PIECE, weight_task, &sums[i]);
  return RG_OK;
}

static rg_status backward(const rg_call *c) {
  const rg_arg *x = rg_in(c, BW_X);
  job j = {.c = c,
           .x = x,
           .w = rg_in(c, BW_W),
           .dy = rg_in(c, BW_GRAD),
           .y = rg_out(c, 0),
           .live = rgi_live_rows(rg_in(c, BW_CU), x->dim[0]),
           .add = rg_in(c, BW_ACC_X) != NULL};
  return run_backward(&j, rg_out(c, 1), rg_in(c, BW_ACC_W) != NULL, NULL, false);
}
static rg_status layer_backward(const rg_call *c) {
  const rg_arg *x = rg_in(c, LAYER_BW_X);
  job j = {.c = c,
           .x = x,
           .w = rg_in(c, LAYER_BW_W),
           .dy = rg_in(c, LAYER_BW_GRAD),
           .layer = true,
           .y = rg_out(c, 0),
           .live = rgi_live_rows(rg_in(c, LAYER_BW_CU), x->dim[0]),
           .add = rg_in(c, LAYER_BW_ACC_X) != NULL};
  return run_backward(&j, rg_out(c, 1), rg_in(c, LAYER_BW_ACC_W) != NULL, rg_out(c, 2),
                      rg_in(c, LAYER_BW_ACC_B) != NULL);
}
static rg_status backward_check(const rg_call *c, rg_error *e) {
  return check_shape(c, e, rg_in(c, BW_X), rg_in(c, BW_W), rg_in(c, BW_CU));
}
static rg_status layer_backward_check(const rg_call *c, rg_error *e) {
  RGI_TRY(check_shape(c, e, rg_in(c, LAYER_BW_X), rg_in(c, LAYER_BW_W), rg_in(c, LAYER_BW_CU)));
  return check_width(c, e, rg_in(c, LAYER_BW_X), "b", rg_in(c, LAYER_BW_B));
}

/* ---- CUDA ---- */

static rgi_norm forward_norm(const rg_call *c) {
  return (rgi_norm){.x = rg_in(c, IN_X),
                    .weight = rg_in(c, IN_W),
                    .cu = rg_in(c, IN_CU),
                    .y = rg_out(c, 0),
                    .eps = c->attr[ATTR_EPS].f};
}
static rg_status forward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_norm n = forward_norm(c);
  return rgi_cuda_norm(c, &n, x);
}
static const char *forward_path(const rg_call *c) {
  rgi_norm n = forward_norm(c);
  return rgi_cuda_norm_path(&n);
}

static rgi_norm backward_norm(const rg_call *c) {
  return (rgi_norm){.x = rg_in(c, BW_X),
                    .weight = rg_in(c, BW_W),
                    .cu = rg_in(c, BW_CU),
                    .y = rg_out(c, 0),
                    .dy = rg_in(c, BW_GRAD),
                    .dw = rg_out(c, 1),
                    .add = rg_in(c, BW_ACC_X) != NULL,
                    .add_w = rg_in(c, BW_ACC_W) != NULL,
                    .eps = c->attr[ATTR_EPS].f};
}
static rg_status backward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_norm n = backward_norm(c);
  return rgi_cuda_norm(c, &n, x);
}
static const char *backward_path(const rg_call *c) {
  rgi_norm n = backward_norm(c);
  return rgi_cuda_norm_path(&n);
}

static rgi_layer layer_of(const rg_call *c) {
  return (rgi_layer){.x = rg_in(c, LAYER_X),
                     .weight = rg_in(c, LAYER_W),
                     .bias = rg_in(c, LAYER_B),
                     .cu = rg_in(c, LAYER_CU),
                     .y = rg_out(c, 0),
                     .eps = c->attr[ATTR_EPS].f};
}
static rg_status layer_forward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_layer l = layer_of(c);
  return rgi_cuda_layer(c, &l, x);
}
static const char *layer_forward_path(const rg_call *c) {
  rgi_layer l = layer_of(c);
  return rgi_cuda_layer_path(&l);
}

static rgi_layer layer_bwd_of(const rg_call *c) {
  return (rgi_layer){.x = rg_in(c, LAYER_BW_X),
                     .weight = rg_in(c, LAYER_BW_W),
                     .cu = rg_in(c, LAYER_BW_CU),
                     .y = rg_out(c, 0),
                     .dy = rg_in(c, LAYER_BW_GRAD),
                     .dw = rg_out(c, 1),
                     .db = rg_out(c, 2),
                     .add = rg_in(c, LAYER_BW_ACC_X) != NULL,
                     .add_w = rg_in(c, LAYER_BW_ACC_W) != NULL,
                     .add_b = rg_in(c, LAYER_BW_ACC_B) != NULL,
                     .eps = c->attr[ATTR_EPS].f};
}
static rg_status layer_backward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_layer l = layer_bwd_of(c);
  return rgi_cuda_layer(c, &l, x);
}
static const char *layer_backward_path(const rg_call *c) {
  rgi_layer l = layer_bwd_of(c);
  return rgi_cuda_layer_path(&l);
}

static size_t backward_workspace(const rg_call *c) {
  if (c->gpu) {
    rgi_norm n = backward_norm(c);
    return rgi_cuda_norm_workspace(&n);
  }
  rows s = rows_of(rg_in(c, BW_X));
  return (size_t)c->threads * thread_bytes(s.width, false) +
         (rg_out(c, 1) ? partial_bytes(s, false) : 0);
}
static size_t layer_backward_workspace(const rg_call *c) {
  if (c->gpu) {
    rgi_layer l = layer_bwd_of(c);
    return rgi_cuda_layer_workspace(&l);
  }
  rows s = rows_of(rg_in(c, LAYER_BW_X));
  return (size_t)c->threads * thread_bytes(s.width, true) +
         (rg_out(c, 1) || rg_out(c, 2) ? partial_bytes(s, true) : 0);
}
static void backward_cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.flops = 11 * rgi_arg_elements(rg_in(c, BW_X)), .bytes = rgi_call_bytes(c)};
}
static void layer_backward_cost(const rg_call *c, rg_cost *out) {
  *out =
      (rg_cost){.flops = 16 * rgi_arg_elements(rg_in(c, LAYER_BW_X)), .bytes = rgi_call_bytes(c)};
}

/* ---- descriptors ---- */

static const rg_port in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "normalised over its last axis"},
    {"w", "W", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "scale per feature"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences; absent: all rows are live"},
};
static const rg_port out[] = {
    {"y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "x / sqrt(mean x² + eps) · w"}};

static const rg_port bwd_in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "as forward"},
    {"w", "W", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "as forward"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences"},
    {"grad.y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "gradient of y"},
    {"acc.x", "...", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, -1, "sum so far"},
    {"acc.w", "W", RG_PORT_OPTIONAL, RG_D(RG_F32), 0, -1, "sum so far"},
};
static const rg_port bwd_out[] = {
    {"d.x", "...", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', -1,
     "gradient of x"},
    {"d.w", "W", RG_PORT_GRAD | RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "gradient of w"},
};

const rg_op rgi_op_rmsnorm = {
    .abi = RG_OP_ABI,
    .name = "rmsnorm",
    .doc = "root-mean-square normalisation over the last axis",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_ROWWISE,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = attrs,
    .nattr = ATTR_COUNT,
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = forward,
    .cuda_steps = forward_cuda,
    .cuda_path = forward_path,
    .backward = "rmsnorm.bwd",
};

const rg_op rgi_op_rmsnorm_bwd = {
    .abi = RG_OP_ABI,
    .name = "rmsnorm.bwd",
    .doc = "gradients of rmsnorm",
    .flags = RG_OP_INTERNAL,
    .in = bwd_in,
    .nin = RGI_COUNT(bwd_in),
    .out = bwd_out,
    .nout = RGI_COUNT(bwd_out),
    .attrs = attrs,
    .nattr = ATTR_COUNT,
    .check = backward_check,
    .cost = backward_cost,
    .workspace = backward_workspace,
    .run_cpu = backward,
    .cuda_steps = backward_cuda,
    .cuda_path = backward_path,
};

static const rg_port layer_in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "normalised over its last axis"},
    {"w", "W", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "scale per feature"},
    {"b", "W", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "added per feature"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences; absent: all rows are live"},
};
static const rg_port layer_out[] = {
    {"y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "(x - mean) / sqrt(variance + eps) · w + b"}};

static const rg_port layer_bwd_in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "as forward"},
    {"w", "W", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "as forward"},
    {"b", "W", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "as forward; not read"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "starts of the sequences"},
    {"grad.y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "gradient of y"},
    {"acc.x", "...", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, -1, "sum so far"},
    {"acc.w", "W", RG_PORT_OPTIONAL, RG_D(RG_F32), 0, -1, "sum so far"},
    {"acc.b", "W", RG_PORT_OPTIONAL, RG_D(RG_F32), 0, -1, "sum so far"},
};
static const rg_port layer_bwd_out[] = {
    {"d.x", "...", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', -1,
     "gradient of x"},
    {"d.w", "W", RG_PORT_GRAD | RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "gradient of w"},
    {"d.b", "W", RG_PORT_GRAD | RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "gradient of b"},
};

const rg_op rgi_op_layernorm = {
    .abi = RG_OP_ABI,
    .name = "layernorm",
    .doc = "normalisation by mean and variance over the last axis",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_ROWWISE,
    .in = layer_in,
    .nin = RGI_COUNT(layer_in),
    .out = layer_out,
    .nout = RGI_COUNT(layer_out),
    .attrs = attrs,
    .nattr = ATTR_COUNT,
    .check = layer_check,
    .cost = layer_cost,
    .workspace = layer_workspace,
    .run_cpu = layer_forward,
    .cuda_steps = layer_forward_cuda,
    .cuda_path = layer_forward_path,
    .backward = "layernorm.bwd",
};

const rg_op rgi_op_layernorm_bwd = {
    .abi = RG_OP_ABI,
    .name = "layernorm.bwd",
    .doc = "gradients of layernorm",
    .flags = RG_OP_INTERNAL,
    .in = layer_bwd_in,
    .nin = RGI_COUNT(layer_bwd_in),
    .out = layer_bwd_out,
    .nout = RGI_COUNT(layer_bwd_out),
    .attrs = attrs,
    .nattr = ATTR_COUNT,
    .check = layer_backward_check,
    .cost = layer_backward_cost,
    .workspace = layer_backward_workspace,
    .run_cpu = layer_backward,
    .cuda_steps = layer_backward_cuda,
    .cuda_path = layer_backward_path,
};
