/* ops/rope.c: rotary position embedding with rotate-half pairs, and its gradient (the rotation
   backwards).

       y[c]       = x[c]·cos − x[c+h]·sin        h = dim / 2,   c = 0 … h-1
       y[c + h]   = x[c+h]·cos + x[c]·sin        angle = position · theta^(−c/h)
       features past dim: copied

   Angles must stay exact at long positions, so they live in double until sine and cosine are known:
   position = 64·u + r, and the angle's sine and cosine follow from those of 64·u and r by the
   addition theorem. The table of r = 0 … 63 is made once per call, that of u once per 64 positions.
 */
#include "cpu/rows.h"
#include "cuda/norm.h"

#define STEP      64 /* positions per u */
#define TASK_ROWS 64

enum { ATTR_THETA, ATTR_DIM, ATTR_COUNT };

static const rg_attr attrs[ATTR_COUNT] = {
    {"theta", RG_ATTR_FLOAT, false, 1e-3, 1e12, 10000, NULL, "base of the frequencies"},
    {"dim", RG_ATTR_INT, false, 0, 1 << 20, 0, NULL,
     "leading features that are rotated, even; 0: all of them"},
};

static int64_t rotated(const rg_call *c, const rg_arg *x) {
  return c->attr[ATTR_DIM].i ? c->attr[ATTR_DIM].i : x->dim[2];
}

/* The workspace, in order:
 *
 *   | frequency [h] | cos, sin of r [STEP, 2, h] |
 *   | per thread: cos, sin of u [2, h] double, of a token [2, h] f32 | */
static size_t shared_bytes(int64_t half) {
  return RGI_ROUND256((size_t)half * (1 + 2 * STEP) * sizeof(double));
}
static size_t thread_bytes(int64_t half) {
  return RGI_ROUND256((size_t)half * 2 * (sizeof(double) + sizeof(float)));
}

typedef struct job {
  const rg_call *c;
  const rg_arg *x, *y;         /* [T, H, D] */
  const rg_arg *cu, *q_offset; /* [B+1], [B] or NULL */
  bool inverse, add;
  int64_t half;
  const double *frequency, *small; /* [h], [STEP, 2, h] */
} job;

static void table_task(void *arg, int64_t r, int thread) {
  const job *j = arg;
  double *row = (double *)j->small + r * 2 * j->half;
  (void)thread;
  for (int64_t i = 0; i < j->half; i++) {
    row[i] = cos((double)r * j->frequency[i]);
    row[j->half + i] = sin((double)r * j->frequency[i]);
  }
}

/* One head of one token; cosine and sine [h]. */
static void rotate(const job *j, int64_t row, int64_t head, const float *cosine,
                   const float *sine) {
  const rg_arg *x = j->x, *y = j->y;
  const char *from = rgi_at(x, row, head);
  char *to = rgi_at(y, row, head);
  size_t in = rg_dtype_size(x->dtype), out = rg_dtype_size(y->dtype);
  int64_t h = j->half, d = x->dim[2];
  int isa = j->c->isa;
  float a[RGI_PIECE], b[RGI_PIECE], u[RGI_PIECE], v[RGI_PIECE];
  for (int64_t c = 0; c < h; c += RGI_PIECE) {
    int64_t n = h - c < RGI_PIECE ? h - c : RGI_PIECE;
    rgi_load_by(isa, a, x->dtype, from + (size_t)c * in, n);
    rgi_load_by(isa, b, x->dtype, from + (size_t)(c + h) * in, n);
    for (int64_t i = 0; i < n; i++) {
      u[i] = a[i] * cosine[c + i] - b[i] * sine[c + i];
      v[i] = b[i] * cosine[c + i] + a[i] * sine[c + i];
    }
    rgi_put_grad(isa, j->add, to + (size_t)c * out, y->dtype, u, n);
    rgi_put_grad(isa, j->add, to + (size_t)(c + h) * out, y->dtype, v, n);
  }
  for (int64_t c = 2 * h; c < d; c += RGI_PIECE) {
    int64_t n = d - c < RGI_PIECE ? d - c : RGI_PIECE;
    rgi_load_by(isa, a, x->dtype, from + (size_t)c * in, n);
    rgi_put_grad(isa, j->add, to + (size_t)c * out, y->dtype, a, n);
  }
}

static void rows_task(void *arg, int64_t task, int thread) {
  const job *j = arg;
  const int32_t *cu = j->cu->data, *offset = j->q_offset ? j->q_offset->data : NULL;
  int64_t nseq = j->cu->dim[0] - 1, live = cu[nseq], h = j->half;
  int64_t row = task * TASK_ROWS,
          end = row + TASK_ROWS < j->y->dim[0] ? row + TASK_ROWS : j->y->dim[0];
  char *own = (char *)j->c->workspace + shared_bytes(h) + (size_t)thread * thread_bytes(h);
  double *large = (double *)own; /* [2, h] of position 64·at */
  float *angle = (float *)(large + 2 * h);
  int64_t at = -1, b = row < live ? rgi_sequence_of(cu, nseq, row) : 0;
  for (; row < end; row++) {
    if (row >= live) {
      for (int64_t n = 0; n < j->y->dim[1] && !j->add; n++)
        memset(rgi_at(j->y, row, n), 0, (size_t)j->y->dim[2] * rg_dtype_size(j->y->dtype));
      continue;
    }
    while (cu[b + 1] <= row) b++;
    int64_t position = row - cu[b] + (offset ? offset[b] : 0);
    if (position / STEP != at) {
      at = position / STEP;
      for (int64_t i = 0; i < h; i++) {
        large[i] = cos((double)(at * STEP) * j->frequency[i]);
        large[h + i] = sin((double)(at * STEP) * j->frequency[i]);
      }
    }
    const double *small = j->small + position % STEP * 2 * h;
    for (int64_t i = 0; i < h; i++) {
      double sine = large[h + i] * small[i] + large[i] * small[h + i];
      angle[i] = (float)(large[i] * small[i] - large[h + i] * small[h + i]);
      angle[h + i] = (float)(j->inverse ? -sine : sine);
    }
    for (int64_t n = 0; n < j->y->dim[1]; n++) rotate(j, row, n, angle, angle + h);
  }
}

static rg_status run(job *j) {
  const rg_call *c = j->c;
  double *frequency = c->workspace;
  j->half = rotated(c, j->x) / 2;
  for (int64_t i = 0; i < j->half; i++)
    frequency[i] = pow(c->attr[ATTR_THETA].f, -(double)i / (double)j->half);
  j->frequency = frequency;
  j->small = frequency + j->half;
  c->parallel(c->pool, STEP, table_task, j);
  c->parallel(c->pool, (j->y->dim[0] + TASK_ROWS - 1) / TASK_ROWS, rows_task, j);
  return RG_OK;
}

static rg_status check_dim(const rg_call *c, rg_error *e, const rg_arg *x) {
  int64_t d = x->dim[2], dim = rotated(c, x);
  if (d == RG_DIM_FREE) return RG_OK;
  if (dim % 2 || dim > d)
    return rg_op_fail(e, RG_E_VALUE, c,
                      "dim %lld of %lld features: expected an even number, at most all of them",
                      (long long)dim, (long long)d);
  return RG_OK;
}

static size_t bytes_for(const rg_call *c, const rg_arg *x) {
  int64_t half = rotated(c, x) / 2;
  return c->gpu ? 0 : shared_bytes(half) + (size_t)c->threads * thread_bytes(half);
}

static void cost_for(const rg_call *c, const rg_arg *x, rg_cost *out) {
  int64_t half = rotated(c, x) / 2;
  double pairs = (double)x->dim[0] * (double)x->dim[1] * (double)half;
  *out = (rg_cost){.flops = 6 * pairs, .bytes = rgi_call_bytes(c)};
}

/* ---- forward ---- */

enum { IN_X, IN_CU, IN_OFFSET };

static rg_status forward(const rg_call *c) {
  job j = {.c = c,
           .x = rg_in(c, IN_X),
           .y = rg_out(c, 0),
           .cu = rg_in(c, IN_CU),
           .q_offset = rg_in(c, IN_OFFSET)};
  return run(&j);
}
static rg_status check(const rg_call *c, rg_error *e) {
  return check_dim(c, e, rg_in(c, IN_X));
}
static size_t workspace(const rg_call *c) {
  return bytes_for(c, rg_in(c, IN_X));
}
static void cost(const rg_call *c, rg_cost *out) {
  cost_for(c, rg_in(c, IN_X), out);
}

/* ---- backward ---- */

enum { BW_CU, BW_OFFSET, BW_GRAD, BW_ACC };

static rg_status backward(const rg_call *c) {
  job j = {.c = c,
           .x = rg_in(c, BW_GRAD),
           .y = rg_out(c, 0),
           .cu = rg_in(c, BW_CU),
           .q_offset = rg_in(c, BW_OFFSET),
           .inverse = true,
           .add = rg_in(c, BW_ACC) != NULL};
  return j.y ? run(&j) : RG_OK;
}
static rg_status backward_check(const rg_call *c, rg_error *e) {
  return check_dim(c, e, rg_in(c, BW_GRAD));
}
static size_t backward_workspace(const rg_call *c) {
  return bytes_for(c, rg_in(c, BW_GRAD));
}
static void backward_cost(const rg_call *c, rg_cost *out) {
  cost_for(c, rg_in(c, BW_GRAD), out);
}

/* ---- CUDA ---- */

static rgi_rope forward_rope(const rg_call *c) {
  const rg_arg *x = rg_in(c, IN_X);
  return (rgi_rope){.x = x,
                    .y = rg_out(c, 0),
                    .cu = rg_in(c, IN_CU),
                    .offset = rg_in(c, IN_OFFSET),
                    .theta = c->attr[ATTR_THETA].f,
                    .dim = rotated(c, x)};
}
static rg_status forward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_rope r = forward_rope(c);
  return rgi_cuda_rope(&r, x);
}
static const char *forward_path(const rg_call *c) {
  rgi_rope r = forward_rope(c);
  return rgi_cuda_rope_path(&r);
}

static rgi_rope backward_rope(const rg_call *c) {
  const rg_arg *dy = rg_in(c, BW_GRAD);
  return (rgi_rope){.x = dy,
                    .y = rg_out(c, 0),
                    .cu = rg_in(c, BW_CU),
                    .offset = rg_in(c, BW_OFFSET),
                    .theta = c->attr[ATTR_THETA].f,
                    .dim = rotated(c, dy),
                    .back = true,
                    .add = rg_in(c, BW_ACC) != NULL};
}
static rg_status backward_cuda(const rg_call *c, rg_cuda *x) {
  rgi_rope r = backward_rope(c);
  return rgi_cuda_rope(&r, x);
}
static const char *backward_path(const rg_call *c) {
  rgi_rope r = backward_rope(c);
  return rgi_cuda_rope_path(&r);
}

/* ---- descriptors ---- */

static const rg_port in[] = {
    {"x", "T,H,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "queries or keys"},
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the sequences"},
    {"q_offset", "B1-1", RG_PORT_OPTIONAL | RG_PORT_OFFSETS, RG_D(RG_I32), 0, -1,
     "position of each sequence's first row; absent: 0"},
};
static const rg_port out[] = {
    {"y", "T,H,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "x, rotated by position"}};

static const rg_port bwd_in[] = {
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the sequences"},
    {"q_offset", "B1-1", RG_PORT_OPTIONAL | RG_PORT_OFFSETS, RG_D(RG_I32), 0, -1,
     "position of each sequence's first row"},
    {"grad.y", "T,H,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "gradient of y"},
    {"acc.x", "T,H,D", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "sum so far"},
};
static const rg_port bwd_out[] = {{"d.x", "T,H,D", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS,
                                   RG_D_FLOAT, 'F', 1, "gradient of x"}};

const rg_op rgi_op_rope = {
    .abi = RG_OP_ABI,
    .name = "rope",
    .doc = "rotary embedding: pairs half of `dim` apart, positions from the start of each sequence",
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
    .backward = "rope.bwd",
};

const rg_op rgi_op_rope_bwd = {
    .abi = RG_OP_ABI,
    .name = "rope.bwd",
    .doc = "gradient of rope: the rotation backwards",
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
