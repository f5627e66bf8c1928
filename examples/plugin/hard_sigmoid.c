/* examples/plugin/hard_sigmoid.c: a gate activation as a plugin: y = x·slope + 1/2, kept within [0,
   1].

   A gate that saturates exactly: a branch can be switched off altogether, which no sigmoid does.
   The plugin uses the public headers only, and is linked to nothing: the names it needs
   (rg_convert) come from the regraph that loads it.

       regraph run examples/plugin/hard_gate.json --plugin build/plugin/hard_sigmoid.so --set T=1024

   It shows all that an op needs to take part in everything: ports and attributes as data (shapes,
   checks, `regraph ops`, the schema), cost (the planner's choices), a backward op (autodiff), and
   the promises O1 … O5 of op.h.
 */
#include <regraph/op.h>
#include <string.h>

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

enum { SLOPE };
enum { IN_X, IN_CU };
enum { BW_X, BW_CU, BW_GRAD, BW_ACC };
enum { TOKENS = 64, PIECE = 64 }; /* of a task; floats converted at a time */

static const rg_attr attrs[] = {
    [SLOPE] = {"slope", RG_ATTR_FLOAT, false, 1e-6, 1e6, 1.0 / 6, NULL,
               "steepness: 0 and 1 are reached at ∓1/(2·slope)"},
};

/* head_axis 1: where heads are computed group by group, the gates of a group are all that is
 * touched. */
#define X_PORT \
  { "x", "T,H,N", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "gates before the activation" }
#define CU_PORT                                                                  \
  {                                                                              \
    "cu_seqlens", "B1", RG_PORT_SEQLENS | RG_PORT_OPTIONAL, RG_D(RG_I32), 0, -1, \
        "starts of the sequences"                                                \
  }

static const rg_port in[] = {[IN_X] = X_PORT, [IN_CU] = CU_PORT};
static const rg_port out[] = {{"y", "T,H,N", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "gates in [0, 1]"}};
static const rg_port bwd_in[] = {
    [BW_X] = X_PORT,
    [BW_CU] = CU_PORT,
    [BW_GRAD] = {"grad.y", "T,H,N", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "gradient of y"},
    [BW_ACC] = {"acc.x", "T,H,N", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D(RG_F32), 0, 1,
                "gradient of x so far"},
};
static const rg_port bwd_out[] = {
    {"d.x", "T,H,N", RG_PORT_ROWS | RG_PORT_GRAD, RG_D_FLOAT, 'F', 1, "gradient of x"},
};

/* Row (t, h) of a [T, H, N] tensor, from element i on. Only the last axis is sure to be
 * contiguous. */
static void *at(const rg_arg *a, int64_t t, int64_t h, int64_t i) {
  return (char *)a->data +
         (t * a->stride[0] + h * a->stride[1] + i) * (int64_t)rg_dtype_size(a->dtype);
}

/* Rows from here on are dead: nothing in them is read, zeros are written. */
static int64_t live_rows(const rg_call *c, const rg_arg *cu) {
  return cu ? ((const int32_t *)cu->data)[cu->dim[0] - 1] : rg_in(c, IN_X)->dim[0];
}

static void forward_tokens(void *arg, int64_t task, int thread) {
  const rg_call *c = arg;
  const rg_arg *x = rg_in(c, IN_X), *y = rg_out(c, 0); /* [T, H, N] */
  const float slope = (float)c->attr[SLOPE].f;
  const int64_t live = live_rows(c, rg_in(c, IN_CU)), end = (task + 1) * TOKENS;
  (void)thread;
  for (int64_t t = task * TOKENS; t < end && t < x->dim[0]; t++)
    for (int64_t h = 0; h < x->dim[1]; h++)
      for (int64_t i = 0; i < x->dim[2]; i += PIECE) {
        float v[PIECE] = {0};
        int64_t n = x->dim[2] - i < PIECE ? x->dim[2] - i : PIECE;
        if (t < live) {
          rg_convert(RG_F32, v, x->dtype, at(x, t, h, i), (size_t)n);
          for (int64_t k = 0; k < n; k++) {
            v[k] = v[k] * slope + 0.5f;
            v[k] = v[k] < 0 ? 0 : v[k] > 1 ? 1 : v[k]; /* NaN stays NaN */
          }
        }
        rg_convert(y->dtype, at(y, t, h, i), RG_F32, v, (size_t)n);
      }
}

/* dx = slope·dy where the line is not cut off, else 0. A bound acc.x is d.x's own
 * bytes: add to what is there. */
static void backward_tokens(void *arg, int64_t task, int thread) {
  const rg_call *c = arg;
  const rg_arg *x = rg_in(c, BW_X), *dy = rg_in(c, BW_GRAD), *dx = rg_out(c, 0); /* [T, H, N] */
  const bool add = rg_in(c, BW_ACC) != NULL;
  const float slope = (float)c->attr[SLOPE].f;
  const int64_t live = live_rows(c, rg_in(c, BW_CU)), end = (task + 1) * TOKENS;
  (void)thread;
  for (int64_t t = task * TOKENS; t < end && t < x->dim[0]; t++)
    for (int64_t h = 0; h < x->dim[1]; h++)
      for (int64_t i = 0; i < x->dim[2]; i += PIECE) {
        float v[PIECE], g[PIECE] = {0};
        int64_t n = x->dim[2] - i < PIECE ? x->dim[2] - i : PIECE;
        if (t < live) {
          rg_convert(RG_F32, v, x->dtype, at(x, t, h, i), (size_t)n);
          rg_convert(RG_F32, g, dy->dtype, at(dy, t, h, i), (size_t)n);
          for (int64_t k = 0; k < n; k++) {
            float y = v[k] * slope + 0.5f;
            g[k] = y <= 0 || y >= 1 ? 0 : slope * g[k];
          }
        }
        float *to = at(dx, t, h, i);
        if (!add)
          rg_convert(dx->dtype, to, RG_F32, g, (size_t)n);
        else
          for (int64_t k = 0; k < n; k++) to[k] += g[k];
      }
}

static int64_t tasks(const rg_call *c) {
  return (rg_in(c, IN_X)->dim[0] + TOKENS - 1) / TOKENS;
}

static rg_status forward(const rg_call *c) {
  c->parallel(c->pool, tasks(c), forward_tokens, (void *)c);
  return RG_OK;
}
static rg_status backward(const rg_call *c) {
  c->parallel(c->pool, tasks(c), backward_tokens, (void *)c);
  return RG_OK;
}

/* Two flops an element; each tensor of x's shape moves once (2 forward, 3 backward). */
static void cost_of(const rg_call *c, int tensors, rg_cost *out) {
  const rg_arg *x = rg_in(c, IN_X);
  double n = (double)x->dim[0] * (double)x->dim[1] * (double)x->dim[2];
  *out = (rg_cost){.flops = 2 * n, .bytes = n * tensors * (double)rg_dtype_size(x->dtype)};
}
static void cost(const rg_call *c, rg_cost *out) {
  cost_of(c, 2, out);
}
static void backward_cost(const rg_call *c, rg_cost *out) {
  cost_of(c, 3, out);
}

static const rg_op hard_sigmoid = {
    .abi = RG_OP_ABI,
    .name = "hard_sigmoid",
    .doc = "gate activation: x·slope + 1/2, kept within [0, 1]",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_ROWWISE,
    .in = in,
    .nin = COUNT(in),
    .out = out,
    .nout = COUNT(out),
    .attrs = attrs,
    .nattr = COUNT(attrs),
    .cost = cost,
    .run_cpu = forward,
    .backward = "hard_sigmoid.bwd",
};

static const rg_op hard_sigmoid_bwd = {
    .abi = RG_OP_ABI,
    .name = "hard_sigmoid.bwd",
    .doc = "gradient of hard_sigmoid",
    .flags = RG_OP_INTERNAL,
    .in = bwd_in,
    .nin = COUNT(bwd_in),
    .out = bwd_out,
    .nout = COUNT(bwd_out),
    .attrs = attrs,
    .nattr = COUNT(attrs),
    .cost = backward_cost,
    .run_cpu = backward,
};

static const rg_op *const ops[] = {&hard_sigmoid, &hard_sigmoid_bwd};
RG_API const rg_plugin regraph_plugin;
const rg_plugin regraph_plugin = {
    .abi = RG_OP_ABI, .name = "hard_sigmoid", .ops = ops, .nop = COUNT(ops)};
