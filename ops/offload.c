/* ops/offload.c: the two copies that rgi_offload (recompute/rewrite.c) makes: a tensor's bytes to
   the host's memory in forward, and back in backward. On the CPU both blocks are the host's, and a
   thread copies; on a GPU the copy engine does, beside what is computed.
 */
#include "../graph/autodiff.h"
#include "cpu/rows.h"

static void cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.bytes = rgi_call_bytes(c)};
  if (c->gpu) out->host = out->bytes /= 2; /* either memory sees them once */
}

static rg_status infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  (void)pointer, (void)e;
  rgi_tensor_like(g, rgi_out(n, 0), &g->tensor[rgi_in(n, 0)], NULL);
  return RG_OK;
}

/* Dead rows are copied, too, and are zero. */
static rg_status run(const rg_call *c) {
  const int32_t begin[] = {0, 1, 1};
  rg_call copy = *c;
  copy.in_begin = begin; /* cast may be given lengths; here there are none */
  return rgi_run_cast(&copy);
}

/* Elements from axis `axis` on, if they lie without holes in both; else 0. */
static int64_t dense_from(const rg_arg *x, const rg_arg *y, int axis) {
  int64_t n = 1;
  for (int i = x->rank - 1; i >= axis; i--) {
    if (x->dim[i] > 1 && (x->stride[i] != n || y->stride[i] != n)) return 0;
    n *= x->dim[i];
  }
  return n;
}

/* As few copies as rows of equal distance allow: one for a whole tensor, one for the part of each
 * row that a head group is. */
static rg_status hand_over(rg_cuda *x, bool to_host, const rg_arg *from, const rg_arg *to, int axis,
                           const char *src, char *dst) {
  const int64_t size = (int64_t)rg_dtype_size(from->dtype), all = dense_from(from, to, axis);
  rg_copy copy = {.to = dst, .from = src, .rows = 1, .to_host = to_host};
  if (all) {
    copy.width = copy.to_pitch = copy.from_pitch = (size_t)(all * size);
    return x->copy(x, &copy);
  }
  const int64_t row = dense_from(from, to, axis + 1), from_step = from->stride[axis] * size,
                to_step = to->stride[axis] * size;
  if (row && from_step >= row * size && to_step >= row * size) {
    copy.width = (size_t)(row * size);
    copy.rows = (size_t)from->dim[axis];
    copy.from_pitch = (size_t)from_step;
    copy.to_pitch = (size_t)to_step;
    return x->copy(x, &copy);
  }
  for (int64_t i = 0; i < from->dim[axis]; i++) {
    const rg_status status =
        hand_over(x, to_host, from, to, axis + 1, src + i * from_step, dst + i * to_step);
    if (status != RG_OK) return status;
  }
  return RG_OK;
}

static rg_status copies(const rg_call *c, rg_cuda *x, bool to_host) {
  const rg_arg *from = rg_in(c, 0), *to = rg_out(c, 0);
  for (int i = 0; i < from->rank; i++)
    if (from->dim[i] == 0) return RG_OK;
  return hand_over(x, to_host, from, to, 0, from->data, to->data);
}
static rg_status leave(const rg_call *c, rg_cuda *x) {
  return copies(c, x, true);
}
static rg_status come_back(const rg_call *c, rg_cuda *x) {
  return copies(c, x, false);
}

static const rg_port in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT | RG_D(RG_I32), 0, -1, "any tensor"}};
static const rg_port out[] = {
    {"y", "...", RG_PORT_ROWS, RG_D_FLOAT | RG_D(RG_I32), 0, -1, "the same elsewhere"}};
static const rgi_rules rules = {.infer = infer};

#define COPY(text, about, steps)                                                           \
  {                                                                                        \
    .abi = RG_OP_ABI, .name = text, .doc = about, .flags = RG_OP_INTERNAL | RG_OP_ROWWISE, \
    .in = in, .nin = RGI_COUNT(in), .out = out, .nout = RGI_COUNT(out), .cost = cost,      \
    .run_cpu = run, .cuda_steps = steps, .rules = &rules                                   \
  }
const rg_op rgi_op_offload =
    COPY("offload", "a copy in the host's memory, for the backward", leave);
const rg_op rgi_op_fetch = COPY("fetch", "what was offloaded, back again", come_back);
