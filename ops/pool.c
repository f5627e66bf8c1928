/* ops/pool.c: a row for every `stride` tokens, each feature a mean that a softmax of z weighs, or
   the largest or smallest.

     row j of a sequence, feature d:   tokens t = (j+1)·stride - kernel … (j+1)·stride - 1, none
                                       before the sequence's first
     y[j, d] = Σ_t softmax_t(z[t, c] + bias[t mod stride, c])·x[t, c]      c = p·W + d

   W is the width of y, and x has kernel/stride parts of so many columns: of a token in the row's
   p-th stretch of `stride` tokens, part p is read. Where kernel is stride there is one part, and c
   is d. So every x[t, c] goes into one row at most, and the gradient scatters nothing:

     w = softmax      dx = w·dy      dz = w·dy·(x - y)      dbias = Σ of dz over tokens and heads

   A row is there once its last token is: queries see it from (j+1)·stride - 1 on, as cmp_attn has
   it with kernel = stride. Max and min give a feature's gradient to the first token that has it.

   A task is a row. The gradient of bias takes the rows' log-sum-exps and means from the workspace,
   a task for every row of bias, heads from the last to the first.
 */
#include "pool.h"
#include "compress.h"
#include "cpu/compress.h"
#include "cuda/pool.h"
#include "../graph/ir.h"

enum { IN_X, IN_Z, IN_BIAS, IN_CU, IN_GRAD, IN_ACC_X, IN_ACC_Z, IN_ACC_BIAS };
enum { A_KERNEL, A_STRIDE, A_METHOD };
extern const rg_op rgi_op_pool_bwd;

/* clang-format off */
#define INPUTS                                                                                     \
  {"x", "T,KH,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1,                                                \
   "kernel/stride parts, one for each stretch of `stride` tokens of a row"},                       \
  {"z", "T,KH,D", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D_FLOAT, 'Z', 1,                             \
   "logits of the weights; method softmax alone, which needs them"},                               \
  {"bias", "stride,D", RG_PORT_OPTIONAL, RG_D_FLOAT, 'B', -1,                                      \
   "added to z by a token's place in its stretch; of all heads"},                                  \
  {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the sequences"}
/* clang-format on */
static const rg_port in[] = {INPUTS};
static const rg_port out[] = {
    {"y", "T/stride,KH,D/(kernel/stride)", RG_PORT_BLOCKS, RG_D_FLOAT, 'F', 1,
     "a row for every `stride` tokens; those of sequence b start at cu_seqlens[b]/stride"},
};
static const rg_port bwd_in[] = {
    INPUTS,
    {"grad.y", "T/stride,KH,D/(kernel/stride)", 0, RG_D_FLOAT, 'F', 1, "gradient of y"},
    {"acc.x", "T,KH,D", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "sum so far"},
    {"acc.z", "T,KH,D", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "sum so far"},
    {"acc.bias", "stride,D", RG_PORT_OPTIONAL, RG_D(RG_F32), 0, -1, "sum so far"},
};
static const rg_port bwd_out[] = {
    {"d.x", "T,KH,D", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', 1,
     "gradient of x"},
    {"d.z", "T,KH,D", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'Z', 1,
     "gradient of z"},
    {"d.bias", "stride,D", RG_PORT_GRAD | RG_PORT_OPTIONAL, RG_D_FLOAT, 'B', -1,
     "gradient of bias"},
};
static const char *const methods[] = {"softmax", "max", "min", NULL}; /* RGK_POOL_… */
static const rg_attr attrs[] = {
    [A_KERNEL] = {"kernel", RG_ATTR_INT, true, 1, 1 << 16, 0, NULL, "tokens that make a row"},
    [A_STRIDE] = {"stride", RG_ATTR_INT, true, 1, 1 << 16, 0, NULL,
                  "tokens from one row to the next; divides kernel"},
    [A_METHOD] = {"method", RG_ATTR_ENUM, false, 0, 0, RGK_POOL_SOFTMAX, methods,
                  "how tokens become a row"},
};

static rg_status check(const rg_call *c, rg_error *e) {
  const int64_t kernel = c->attr[A_KERNEL].i, stride = c->attr[A_STRIDE].i,
                D = rg_in(c, IN_X)->dim[2];
  const bool softmax = c->attr[A_METHOD].i == RGK_POOL_SOFTMAX;
  if (kernel % stride)
    return rg_op_fail(e, RG_E_VALUE, c, "stride %lld does not divide kernel %lld",
                      (long long)stride, (long long)kernel);
  if (D != RG_DIM_FREE && D % (kernel / stride))
    return rg_op_fail(e, RG_E_SHAPE, c, "%lld features are not %lld equal parts", (long long)D,
                      (long long)(kernel / stride));
  if (softmax && !rg_in(c, IN_Z))
    return rg_op_fail(e, RG_E_USAGE, c, "method softmax needs an input z");
  if (!softmax && (rg_in(c, IN_Z) || rg_in(c, IN_BIAS)))
    return rg_op_fail(e, RG_E_USAGE, c, "z and bias go with method softmax, not %s",
                      methods[c->attr[A_METHOD].i]);
  return RG_OK;
}

static rgi_pool describe(const rg_call *c) {
  rgi_pool a = {.backward = c->op == &rgi_op_pool_bwd,
                .x = rg_in(c, IN_X),
                .z = rg_in(c, IN_Z),
                .bias = rg_in(c, IN_BIAS),
                .cu = rg_in(c, IN_CU),
                .kernel = c->attr[A_KERNEL].i,
                .stride = c->attr[A_STRIDE].i,
                .method = (int)c->attr[A_METHOD].i};
  a.parts = a.kernel / a.stride;
  a.T = a.x->dim[0], a.KH = a.x->dim[1], a.W = a.x->dim[2] / a.parts;
  a.rows = a.T / a.stride;
  if (!a.backward) {
    a.y = rg_out(c, 0);
    return a;
  }
  a.dy = rg_in(c, IN_GRAD);
  a.dx = rg_out(c, 0), a.dz = rg_out(c, 1), a.db = rg_out(c, 2);
  a.add_x = rg_in(c, IN_ACC_X), a.add_z = rg_in(c, IN_ACC_Z), a.add_b = rg_in(c, IN_ACC_BIAS);
  return a;
}

static void cost(const rg_call *c, rg_cost *out) {
  const rgi_pool a = describe(c);
  const double n = rgi_arg_elements(a.x);
  const bool softmax = a.method == RGK_POOL_SOFTMAX;
  *out = (rg_cost){.flops = (softmax ? a.backward ? 8 : 4 : 1) * n,
                   .exps = softmax ? n : 0,
                   .bytes = rgi_call_bytes(c)};
}

/* ---- on the CPU ---- */

typedef struct job {
  const rgi_pool *a;
  const int32_t *cu;
  int isa;
  int32_t *token;    /* [rows] the first token of a row's last stretch, or -1: no row */
  float *lse, *mean; /* [rows, KH, W] */
} job;

static size_t lay_out(job *j, void *base) {
  const rgi_pool *a = j->a;
  const size_t n = a->db ? (size_t)(a->rows * a->KH * a->W) : 0;
  rgi_cut w = {.base = base};
  j->token = rgi_take(&w, (size_t)a->rows * sizeof *j->token);
  j->lse = rgi_take(&w, n * sizeof *j->lse);
  j->mean = rgi_take(&w, n * sizeof *j->mean);
  return w.used;
}

static size_t workspace(const rg_call *c) {
  const rgi_pool a = describe(c);
  if (c->gpu) return rgi_cuda_pool_workspace(&a);
  job j = {.a = &a};
  return lay_out(&j, NULL);
}

static void fill_rows(const job *j) {
  const rgi_pool *a = j->a;
  for (int64_t r = 0; r < a->rows; r++) j->token[r] = -1;
  for (int64_t b = 0; b + 1 < a->cu->dim[0]; b++)
    for (int64_t t = j->cu[b], r = t / a->stride; t + a->stride <= j->cu[b + 1]; t += a->stride)
      j->token[r++] = (int32_t)t;
}

/* n columns of a row's token at `place` (of kernel) from column d of its part on. */
static const char *columns(const job *j, const rg_arg *x, int64_t t, int64_t head, int64_t place,
                           int64_t d) {
  return (const char *)rgi_at(x, t, head) +
         (size_t)(place / j->a->stride * j->a->W + d) * rg_dtype_size(x->dtype);
}

/* The weights' logits, likewise. */
static void logits(const job *j, int64_t t, int64_t head, int64_t place, int64_t d, int64_t n,
                   float *z) {
  const rgi_pool *a = j->a;
  float bias[RGI_PIECE];
  rgi_load_by(j->isa, z, a->z->dtype, columns(j, a->z, t, head, place, d), n);
  if (!a->bias) return;
  const size_t at = (size_t)(place / a->stride * a->W + d) * rg_dtype_size(a->bias->dtype);
  rgi_load_by(j->isa, bias, a->bias->dtype,
              (const char *)rgi_at(a->bias, place % a->stride, 0) + at, n);
  for (int64_t i = 0; i < n; i++) z[i] += bias[i];
}

/* A piece of a row: its tokens are first + place, places [from, kernel). */
typedef struct piece {
  int64_t first, from, head, d, n;
  float lse[RGI_PIECE], y[RGI_PIECE];
  int32_t best[RGI_PIECE]; /* max, min: place */
} piece;

static void softmax_piece(const job *j, piece *p) {
  const int64_t kernel = j->a->kernel;
  float z[RGI_PIECE], x[RGI_PIECE], most[RGI_PIECE] = {0}, sum[RGI_PIECE] = {0};
  memset(p->y, 0, sizeof p->y);
  for (int64_t k = p->from; k < kernel; k++) {
    logits(j, p->first + k, p->head, k, p->d, p->n, z);
    for (int64_t i = 0; i < p->n; i++) most[i] = k == p->from || z[i] > most[i] ? z[i] : most[i];
  }
  for (int64_t k = p->from; k < kernel; k++) {
    logits(j, p->first + k, p->head, k, p->d, p->n, z);
    rgi_load_by(j->isa, x, j->a->x->dtype, columns(j, j->a->x, p->first + k, p->head, k, p->d),
                p->n);
    for (int64_t i = 0; i < p->n; i++) {
      const float e = rgi_exp(z[i] - most[i]);
      sum[i] += e;
      p->y[i] += e * x[i];
    }
  }
  for (int64_t i = 0; i < p->n; i++) {
    p->y[i] /= sum[i];
    p->lse[i] = most[i] + logf(sum[i]);
  }
}

static void best_piece(const job *j, piece *p) {
  float x[RGI_PIECE];
  for (int64_t k = p->from; k < j->a->kernel; k++) {
    rgi_load_by(j->isa, x, j->a->x->dtype, columns(j, j->a->x, p->first + k, p->head, k, p->d),
                p->n);
    for (int64_t i = 0; i < p->n; i++) {
      const bool better = j->a->method == RGK_POOL_MAX ? x[i] > p->y[i] : x[i] < p->y[i];
      if (k != p->from && !better) continue;
      p->y[i] = x[i];
      p->best[i] = (int32_t)k;
    }
  }
}

static void put(const job *j, const rg_arg *to, bool add, const piece *p, int64_t k,
                const float *x) {
  rgi_put_grad(j->isa, add, (char *)columns(j, to, p->first + k, p->head, k, p->d), to->dtype, x,
               p->n);
}

/* What a piece gives to the gradients of its tokens. */
static void spread(const job *j, const piece *p, const float *dy) {
  const rgi_pool *a = j->a;
  float z[RGI_PIECE], x[RGI_PIECE], dx[RGI_PIECE], dz[RGI_PIECE];
  for (int64_t k = p->from; k < a->kernel; k++) {
    if (a->method == RGK_POOL_SOFTMAX) {
      logits(j, p->first + k, p->head, k, p->d, p->n, z);
      rgi_load_by(j->isa, x, a->x->dtype, columns(j, a->x, p->first + k, p->head, k, p->d), p->n);
    }
    for (int64_t i = 0; i < p->n; i++) {
      const float w =
          a->method == RGK_POOL_SOFTMAX ? rgi_exp(z[i] - p->lse[i]) : (float)(p->best[i] == k);
      dx[i] = w * dy[i];
      if (a->dz) dz[i] = dx[i] * (x[i] - p->y[i]);
    }
    if (a->dx) put(j, a->dx, a->add_x, p, k, dx);
    if (a->dz) put(j, a->dz, a->add_z, p, k, dz);
  }
}

static void row_task(void *arg, int64_t row, int thread) {
  const job *j = arg;
  const rgi_pool *a = j->a;
  const int64_t last = j->token[row];
  (void)thread;
  if (last < 0) {
    for (int64_t h = 0; h < a->KH && a->y; h++)
      memset(rgi_at(a->y, row, h), 0, (size_t)a->W * rg_dtype_size(a->y->dtype));
    return;
  }
  const int64_t start = j->cu[rgi_sequence_of(j->cu, a->cu->dim[0] - 1, last)];
  piece p = {.first = last + a->stride - a->kernel};
  p.from = p.first < start ? start - p.first : 0;
  for (p.head = 0; p.head < a->KH; p.head++)
    for (p.d = 0; p.d < a->W; p.d += RGI_PIECE) {
      p.n = a->W - p.d < RGI_PIECE ? a->W - p.d : RGI_PIECE;
      if (a->method == RGK_POOL_SOFTMAX)
        softmax_piece(j, &p);
      else
        best_piece(j, &p);
      if (a->y) {
        rgi_store_by(j->isa,
                     (char *)rgi_at(a->y, row, p.head) + (size_t)p.d * rg_dtype_size(a->y->dtype),
                     a->y->dtype, p.y, p.n);
        continue;
      }
      float dy[RGI_PIECE];
      rgi_load_by(j->isa, dy, a->dy->dtype,
                  (char *)rgi_at(a->dy, row, p.head) + (size_t)p.d * rg_dtype_size(a->dy->dtype),
                  p.n);
      if (a->dx || a->dz) spread(j, &p, dy);
      if (!a->db) continue;
      memcpy(j->lse + (row * a->KH + p.head) * a->W + p.d, p.lse, (size_t)p.n * sizeof(float));
      memcpy(j->mean + (row * a->KH + p.head) * a->W + p.d, p.y, (size_t)p.n * sizeof(float));
    }
}

/* Row q of the gradient of bias. */
static void bias_task(void *arg, int64_t q, int thread) {
  const job *j = arg;
  const rgi_pool *a = j->a;
  (void)thread;
  for (int64_t part = 0; part < a->parts; part++)
    for (int64_t d = 0; d < a->W; d += RGI_PIECE) {
      const int64_t n = a->W - d < RGI_PIECE ? a->W - d : RGI_PIECE, place = part * a->stride + q;
      const size_t at = (size_t)(part * a->W + d) * rg_dtype_size(a->db->dtype);
      float total[RGI_PIECE] = {0}, z[RGI_PIECE], x[RGI_PIECE], dy[RGI_PIECE];
      if (a->add_b) memcpy(total, (char *)rgi_at(a->db, q, 0) + at, (size_t)n * sizeof(float));
      for (int64_t h = a->KH; h-- > 0;) {
        double sum[RGI_PIECE] = {0};
        for (int64_t r = 0; r < a->rows; r++) {
          const int64_t last = j->token[r], t = last + a->stride - a->kernel + place;
          if (last < 0 || t < j->cu[rgi_sequence_of(j->cu, a->cu->dim[0] - 1, last)]) continue;
          const float *lse = j->lse + (r * a->KH + h) * a->W + d,
                      *mean = j->mean + (r * a->KH + h) * a->W + d;
          logits(j, t, h, place, d, n, z);
          rgi_load_by(j->isa, x, a->x->dtype, columns(j, a->x, t, h, place, d), n);
          rgi_load_by(j->isa, dy, a->dy->dtype,
                      (char *)rgi_at(a->dy, r, h) + (size_t)d * rg_dtype_size(a->dy->dtype), n);
          for (int64_t i = 0; i < n; i++)
            sum[i] += (double)(rgi_exp(z[i] - lse[i]) * dy[i] * (x[i] - mean[i]));
        }
        for (int64_t i = 0; i < n; i++) total[i] += (float)sum[i];
      }
      rgi_store_by(j->isa, (char *)rgi_at(a->db, q, 0) + at, a->db->dtype, total, n);
    }
}

static void clear(const rg_arg *x, bool add) {
  for (int64_t t = 0; x && !add && t < x->dim[0]; t++)
    for (int64_t h = 0; h < x->dim[1]; h++)
      memset(rgi_at(x, t, h), 0, (size_t)x->dim[2] * rg_dtype_size(x->dtype));
}

static rg_status run_cpu(const rg_call *c) {
  const rgi_pool a = describe(c);
  job j = {.a = &a, .cu = a.cu->data, .isa = c->isa};
  lay_out(&j, c->workspace);
  fill_rows(&j);
  clear(a.dx, a.add_x); /* what no row takes */
  clear(a.dz, a.add_z);
  c->parallel(c->pool, a.rows, row_task, &j);
  if (a.db) c->parallel(c->pool, a.stride, bias_task, &j);
  return RG_OK;
}

/* ---- on a GPU ---- */

static rg_status steps(const rg_call *c, rg_cuda *x) {
  const rgi_pool a = describe(c);
  return rgi_cuda_pool_steps(&a, c->workspace, x);
}
static const char *path(const rg_call *c) {
  (void)c;
  return "plain";
}

const rg_op rgi_op_pool = {
    .abi = RG_OP_ABI,
    .name = "pool",
    .doc = "a row for every `stride` tokens: a weighted mean, the largest or the smallest",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_BLOCKWISE,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = run_cpu,
    .cuda_steps = steps,
    .cuda_path = path,
    .backward = "pool.bwd",
    .rules = &(const rgi_rules){.block_ends = true},
};

const rg_op rgi_op_pool_bwd = {
    .abi = RG_OP_ABI,
    .name = "pool.bwd",
    .doc = "gradients of pool",
    .flags = RG_OP_INTERNAL,
    .in = bwd_in,
    .nin = RGI_COUNT(bwd_in),
    .out = bwd_out,
    .nout = RGI_COUNT(bwd_out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = run_cpu,
    .cuda_steps = steps,
    .cuda_path = path,
};
