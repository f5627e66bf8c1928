/* ops/rope.c: rotary position embedding, and its gradient (the rotation backwards).

       y[c]       = x[c]·cos − x[c+h]·sin        h = dim / 2,   c = 0 … h-1
       y[c + h]   = x[c+h]·cos + x[c]·sin        angle = position · frequency(c)
       features past dim: copied                 frequency(c) = theta^(−c/h)

   Interleaved, a pair is 2c and 2c + 1 in place of c and c + h. YaRN makes frequencies slower by
   `factor`, those below beta_slow turns in the original length whole, those above beta_fast not at
   all, between them by a ramp over c, and multiplies cosine and sine by attention_factor.

   Angles must stay exact at long positions, so they live in double until sine and cosine are known:
   position = 64·u + r, and the angle's sine and cosine follow from those of 64·u and r by the
   addition theorem. The table of r = 0 … 63 is made once per call, that of u once per 64 positions.
 */
#include "cpu/rows.h"
#include "cuda/norm.h"
#include "rope.h"

#define STEP      64 /* positions per u */
#define TASK_ROWS 64

#define TURN 6.283185307179586477

enum {
  ATTR_THETA,
  ATTR_DIM,
  ATTR_INTERLEAVED,
  ATTR_TYPE,
  ATTR_FACTOR,
  ATTR_ORIGINAL,
  ATTR_BETA_FAST,
  ATTR_BETA_SLOW,
  ATTR_ATTENTION,
  ATTR_TRUNCATE,
  ATTR_COUNT
};
enum { TYPE_DEFAULT, TYPE_YARN };
static const char *const types[] = {"default", "yarn", NULL};

static const rg_attr attrs[ATTR_COUNT] = {
    {"theta", RG_ATTR_FLOAT, false, 1e-3, 1e12, 10000, NULL, "base of the frequencies"},
    {"dim", RG_ATTR_INT, false, 0, 1 << 20, 0, NULL,
     "leading features that are rotated, even; 0: all of them"},
    {"interleaved", RG_ATTR_BOOL, false, 0, 1, 0, NULL,
     "pairs are neighbours (2c, 2c+1) instead of half of dim apart"},
    {"rope_type", RG_ATTR_ENUM, false, 0, 0, TYPE_DEFAULT, types,
     "yarn: frequencies for longer contexts, by the attributes below, which nothing else reads"},
    {"factor", RG_ATTR_FLOAT, false, 1, 1e6, 1, NULL, "times the original length"},
    {"original_max_position_embeddings", RG_ATTR_INT, false, 0, 1LL << 40, 0, NULL,
     "the original length, in tokens; yarn needs it"},
    {"beta_fast", RG_ATTR_FLOAT, false, 1e-6, 1e12, 32, NULL,
     "pairs with more turns than this in the original length stay as they are"},
    {"beta_slow", RG_ATTR_FLOAT, false, 1e-6, 1e12, 1, NULL,
     "pairs with fewer turns than this are slowed by the whole factor"},
    {"attention_factor", RG_ATTR_FLOAT, false, 0, 1e6, 0, NULL,
     "what cosine and sine are multiplied by; 0: 0.1·ln(factor) + 1"},
    {"truncate", RG_ATTR_BOOL, false, 0, 1, 1, NULL,
     "the ramp between the betas begins and ends at whole pairs"},
};

static int64_t rotated(const rg_call *c, const rg_arg *x) {
  return c->attr[ATTR_DIM].i ? c->attr[ATTR_DIM].i : x->dim[2];
}

/* The pair, as a fraction, that makes so many turns in the original length. */
static double pair_of(const rg_call *c, int64_t dim, double turns) {
  double length = (double)c->attr[ATTR_ORIGINAL].i;
  return (double)dim * log(length / (turns * TURN)) / (2 * log(c->attr[ATTR_THETA].f));
}

static rgi_rope_scale scale_of(const rg_call *c, const rg_arg *x) {
  int64_t dim = rotated(c, x);
  rgi_rope_scale s = {.theta = c->attr[ATTR_THETA].f,
                      .magnitude = 1,
                      .half = dim / 2,
                      .yarn = c->attr[ATTR_TYPE].i == TYPE_YARN,
                      .interleaved = c->attr[ATTR_INTERLEAVED].i != 0};
  if (!s.yarn) return s;
  s.factor = c->attr[ATTR_FACTOR].f;
  s.low = pair_of(c, dim, c->attr[ATTR_BETA_FAST].f);
  s.high = pair_of(c, dim, c->attr[ATTR_BETA_SLOW].f);
  if (c->attr[ATTR_TRUNCATE].i) s.low = floor(s.low), s.high = ceil(s.high);
  s.low = fmax(s.low, 0);
  s.high = fmin(s.high, (double)dim - 1);
  if (s.low == s.high) s.high += 0.001; /* a step */
  double magnitude = c->attr[ATTR_ATTENTION].f;
  s.magnitude = magnitude > 0 ? magnitude : 0.1 * log(s.factor) + 1;
  return s;
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
  rgi_rope_scale scale;
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

/* Elements [0, 2n) of neighbouring pairs, in place. */
static void rotate_pairs(float *x, const float *cosine, const float *sine, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosine[i] - b * sine[i];
    x[2 * i + 1] = b * cosine[i] + a * sine[i];
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
  for (int64_t c = 0; c < h && j->scale.interleaved; c += RGI_PIECE / 2) {
    int64_t n = h - c < RGI_PIECE / 2 ? h - c : RGI_PIECE / 2;
    rgi_load_by(isa, a, x->dtype, from + (size_t)(2 * c) * in, 2 * n);
    rotate_pairs(a, cosine + c, sine + c, n);
    rgi_put_grad(isa, j->add, to + (size_t)(2 * c) * out, y->dtype, a, 2 * n);
  }
  for (int64_t c = 0; c < h && !j->scale.interleaved; c += RGI_PIECE) {
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
      double cosine = large[i] * small[i] - large[h + i] * small[h + i],
             sine = large[h + i] * small[i] + large[i] * small[h + i];
      angle[i] = (float)(j->scale.magnitude * cosine);
      angle[h + i] = (float)(j->scale.magnitude * (j->inverse ? -sine : sine));
    }
    for (int64_t n = 0; n < j->y->dim[1]; n++) rotate(j, row, n, angle, angle + h);
  }
}

static rg_status run(job *j) {
  const rg_call *c = j->c;
  double *frequency = c->workspace;
  j->scale = scale_of(c, j->x);
  j->half = j->scale.half;
  for (int64_t i = 0; i < j->half; i++) frequency[i] = rgi_rope_frequency(&j->scale, i);
  j->frequency = frequency;
  j->small = frequency + j->half;
  c->parallel(c->pool, STEP, table_task, j);
  c->parallel(c->pool, (j->y->dim[0] + TASK_ROWS - 1) / TASK_ROWS, rows_task, j);
  return RG_OK;
}

static rg_status check_attrs(const rg_call *c, rg_error *e, const rg_arg *x) {
  int64_t d = x->dim[2], dim = rotated(c, x);
  if (c->attr[ATTR_TYPE].i == TYPE_YARN) {
    if (c->attr[ATTR_ORIGINAL].i < 1)
      return rg_op_fail(e, RG_E_VALUE, c,
                        "rope_type yarn needs original_max_position_embeddings, in tokens");
    if (c->attr[ATTR_THETA].f <= 1)
      return rg_op_fail(e, RG_E_VALUE, c, "theta %g: yarn needs more than 1",
                        c->attr[ATTR_THETA].f);
    if (c->attr[ATTR_BETA_FAST].f < c->attr[ATTR_BETA_SLOW].f)
      return rg_op_fail(e, RG_E_VALUE, c, "beta_fast %g is below beta_slow %g",
                        c->attr[ATTR_BETA_FAST].f, c->attr[ATTR_BETA_SLOW].f);
  }
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
  return check_attrs(c, e, rg_in(c, IN_X));
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
  return check_attrs(c, e, rg_in(c, BW_GRAD));
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
                    .scale = scale_of(c, x)};
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
                    .scale = scale_of(c, dy),
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
    .doc =
        "rotary embedding, YaRN too: pairs half of `dim` apart or interleaved, positions from the "
        "start of each sequence",
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
