/* ops/take.c: rows looked up by number, and the number of the largest: the two ends of a model's
 * step. embed takes rows of a table by token, gather_rows rows of a tensor (each sequence's last,
 * say), argmax turns logits into tokens.
 *
 * A number that is no row makes a row of zeros, and the run ends with RG_E_DATA (op.h); -1 does so
 * quietly in gather_rows, for sequences that have no row. */
#include "../graph/ir.h"
#include "cpu/rows.h"
#include "cuda/take.h"

enum { P_TABLE, P_ROWS, P_SEQLENS };

/* ---- rows by number ---- */

typedef struct taking {
  const rg_arg *x, *rows, *y;
  int64_t live;
} taking;

static void copy(const rg_arg *x, const rg_arg *y, int axis, const char *from, char *to) {
  const size_t size = rg_dtype_size(x->dtype);
  if (axis >= x->rank - 1) {
    memcpy(to, from, (axis < x->rank ? (size_t)x->dim[axis] : 1) * size);
    return;
  }
  for (int64_t i = 0; i < x->dim[axis]; i++)
    copy(x, y, axis + 1, from + i * x->stride[axis] * (int64_t)size,
         to + i * y->stride[axis] * (int64_t)size);
}
static void clear(const rg_arg *y, int axis, char *to) {
  const size_t size = rg_dtype_size(y->dtype);
  if (axis >= y->rank - 1) {
    memset(to, 0, (axis < y->rank ? (size_t)y->dim[axis] : 1) * size);
    return;
  }
  for (int64_t i = 0; i < y->dim[axis]; i++)
    clear(y, axis + 1, to + i * y->stride[axis] * (int64_t)size);
}

static void take_row(void *arg, int64_t i, int thread) {
  const taking *k = arg;
  const int64_t size = (int64_t)rg_dtype_size(k->y->dtype);
  const int64_t row = i < k->live ? ((const int32_t *)k->rows->data)[i] : -1;
  char *to = (char *)k->y->data + i * k->y->stride[0] * size;
  (void)thread;
  if (row < 0 || row >= k->x->dim[0])
    clear(k->y, 1, to);
  else
    copy(k->x, k->y, 1, (const char *)k->x->data + row * k->x->stride[0] * size, to);
}

/* What is wrong with the list: where, and the number. */
static rg_status tell(const rg_call *c, const int32_t *n, int least, const char *what) {
  return rg_op_fail(c->error, RG_E_DATA, c, "%s[%d] is %d; expected %d to %lld", what, n[0], n[1],
                    least, (long long)rg_in(c, P_TABLE)->dim[0] - 1);
}
static rg_status tell_embed(const rg_call *c, const int32_t *n) {
  return tell(c, n, 0, "tokens");
}
static rg_status tell_gather(const rg_call *c, const int32_t *n) {
  return tell(c, n, -1, "rows");
}

static rg_status take(const rg_call *c, int64_t live, int32_t least,
                      rg_status (*say)(const rg_call *c, const int32_t *n)) {
  taking k = {rg_in(c, P_TABLE), rg_in(c, P_ROWS), rg_out(c, 0), live};
  const int32_t *rows = k.rows->data;
  for (int64_t i = 0; i < live; i++)
    if (rows[i] < least || rows[i] >= k.x->dim[0]) {
      say(c, (const int32_t[]){(int32_t)i, rows[i]});
      break;
    }
  c->parallel(c->pool, k.y->dim[0], take_row, &k);
  return RG_OK;
}

static rg_status run_embed(const rg_call *c) {
  return take(c, rgi_live_rows(rg_in(c, P_SEQLENS), rg_in(c, P_ROWS)->dim[0]), 0, tell_embed);
}
static rg_status run_gather(const rg_call *c) {
  return take(c, rg_in(c, P_ROWS)->dim[0], -1, tell_gather);
}

static rg_status steps_embed(const rg_call *c, rg_cuda *x) {
  return rgi_cuda_take(c, x, rg_in(c, P_SEQLENS), 0);
}
static rg_status steps_gather(const rg_call *c, rg_cuda *x) {
  return rgi_cuda_take(c, x, NULL, -1);
}

static void cost_take(const rg_call *c, rg_cost *out) {
  const rg_arg *y = rg_out(c, 0);
  double bytes = 2 * (double)rg_dtype_size(y->dtype);
  for (int a = 0; a < y->rank; a++) bytes *= (double)y->dim[a];
  *out = (rg_cost){.bytes = bytes + 4 * (double)y->dim[0]};
}

/* Like the first input, with as many rows as there are numbers. */
static rg_status infer_gather(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  const rgi_tensor *x = &g->tensor[rgi_in(n, P_TABLE)];
  rgi_tensor *y = &g->tensor[rgi_out(n, 0)];
  if (x->rank < 1)
    return rgi_fail(e, RG_E_RANK, pointer, n->name, "\"%s\" is a scalar; expected rows", x->name);
  y->dtype = x->dtype;
  y->rank = x->rank;
  memcpy(y->dim, x->dim, sizeof y->dim);
  y->dim[0] = g->tensor[rgi_in(n, P_ROWS)].dim[0];
  y->base = -1;
  y->offset = 0;
  if (g->bound) rgi_dense_strides(y);
  return RG_OK;
}

static const rg_port embed_in[] = {
    {"w", "V,M", 0, RG_D_FLOAT, 'F', -1, "a row for every token there is"},
    {"tokens", "T", RG_PORT_ROWS, RG_D(RG_I32), 0, -1, "tokens, 0 to V-1"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "sequence starts"},
};
static const rg_port embed_out[] = {
    {"y", "T,M", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "the tokens' rows"},
};
const rg_op rgi_op_embed = {.abi = RG_OP_ABI,
                            .name = "embed",
                            .doc = "rows of a table, by token (no gradient)",
                            .flags = RG_OP_RECOMPUTABLE | RG_OP_ROWWISE | RG_OP_FORWARD_ONLY,
                            .in = embed_in,
                            .nin = RGI_COUNT(embed_in),
                            .out = embed_out,
                            .nout = RGI_COUNT(embed_out),
                            .cost = cost_take,
                            .run_cpu = run_embed,
                            .cuda_steps = steps_embed,
                            .cuda_path = rgi_cuda_take_path,
                            .rules = &(const rgi_rules){.fault = tell_embed}};

static const rg_port gather_in[] = {
    {"x", "*", 0, RG_D_FLOAT | RG_D(RG_I32), 0, -1, "rows of any shape"},
    {"rows", "R", 0, RG_D(RG_I32), 0, -1, "numbers of rows; -1: none, zeros"},
};
static const rg_port gather_out[] = {
    {"y", "*", 0, RG_D_FLOAT | RG_D(RG_I32), 0, -1, "those rows, in that order"},
};
static const rgi_rules gather_rules = {.infer = infer_gather, .fault = tell_gather};
const rg_op rgi_op_gather_rows = {.abi = RG_OP_ABI,
                                  .name = "gather_rows",
                                  .doc = "rows of a tensor, by number (no gradient)",
                                  .flags = RG_OP_RECOMPUTABLE | RG_OP_FORWARD_ONLY,
                                  .in = gather_in,
                                  .nin = RGI_COUNT(gather_in),
                                  .out = gather_out,
                                  .nout = RGI_COUNT(gather_out),
                                  .cost = cost_take,
                                  .run_cpu = run_gather,
                                  .cuda_steps = steps_gather,
                                  .cuda_path = rgi_cuda_take_path,
                                  .rules = &gather_rules};

/* ---- the largest ---- */

typedef struct finding {
  const rg_arg *x;
  int32_t *y;
  int64_t live;
} finding;

enum { AT_ONCE = 256 };

static void find_row(void *arg, int64_t i, int thread) {
  const finding *f = arg;
  float value[AT_ONCE], best = 0;
  int32_t at = -1;
  (void)thread;
  for (int64_t from = 0; i < f->live && from < f->x->dim[1]; from += AT_ONCE) {
    const int64_t n = f->x->dim[1] - from < AT_ONCE ? f->x->dim[1] - from : AT_ONCE;
    rgi_load(value, f->x->dtype, rgi_at(f->x, i, from), n);
    for (int64_t k = 0; k < n; k++)
      if (!isnan(value[k]) && (at < 0 || value[k] > best)) {
        best = value[k];
        at = (int32_t)(from + k);
      }
  }
  f->y[i] = i < f->live ? at : 0;
}

static rg_status run_argmax(const rg_call *c) {
  const rg_arg *x = rg_in(c, 0);
  finding f = {x, rg_out(c, 0)->data, rgi_live_rows(rg_in(c, 1), x->dim[0])};
  c->parallel(c->pool, x->dim[0], find_row, &f);
  return RG_OK;
}

static void cost_argmax(const rg_call *c, rg_cost *out) {
  const rg_arg *x = rg_in(c, 0);
  const double n = (double)x->dim[0] * (double)x->dim[1];
  *out =
      (rg_cost){.flops = n, .bytes = n * (double)rg_dtype_size(x->dtype) + 4 * (double)x->dim[0]};
}

static const rg_port argmax_in[] = {
    {"x", "T,V", RG_PORT_ROWS, RG_D_FLOAT, 0, -1, "logits"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "sequence starts"},
};
static const rg_port argmax_out[] = {
    {"y", "T", RG_PORT_ROWS, RG_D(RG_I32), 0, -1,
     "where each row is largest, first of equals; NaN is no value, a row without values gives -1"},
};
const rg_op rgi_op_argmax = {.abi = RG_OP_ABI,
                             .name = "argmax",
                             .doc = "index of each row's largest element",
                             .flags = RG_OP_RECOMPUTABLE | RG_OP_ROWWISE,
                             .in = argmax_in,
                             .nin = RGI_COUNT(argmax_in),
                             .out = argmax_out,
                             .nout = RGI_COUNT(argmax_out),
                             .cost = cost_argmax,
                             .run_cpu = run_argmax,
                             .cuda_steps = rgi_cuda_argmax,
                             .cuda_path = rgi_cuda_argmax_path};
