/* ops/cast.c: a dense copy, in another float dtype if asked. */
#include "../graph/autodiff.h"
#include "cpu/rows.h"
#include "cuda/rows.h"

enum { A_TO };
enum { SAME, F32, F16, BF16 };

static void cost(const rg_call *c, rg_cost *out) {
  double n = (double)rgi_arg_elements(rg_in(c, 0));
  size_t each = rg_dtype_size(rg_in(c, 0)->dtype) + rg_dtype_size(rg_out(c, 0)->dtype);
  *out = (rg_cost){.bytes = n * (double)each};
}

static rg_status infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  static const rg_dtype target[] = {[F32] = RG_F32, [F16] = RG_F16, [BF16] = RG_BF16};
  const rgi_node *n = &g->node[node];
  const rgi_tensor *x = &g->tensor[rgi_in(n, 0)];
  if (x->dtype == RG_I32 && n->attr[A_TO].i != SAME)
    return rgi_fail(e, RG_E_DTYPE, pointer, n->name,
                    "\"%s\" is i32, which cannot become a float; leave \"to\" out to copy it",
                    x->name);
  rgi_tensor_like(g, rgi_out(n, 0), x, NULL);
  if (n->attr[A_TO].i != SAME) g->tensor[rgi_out(n, 0)].dtype = target[n->attr[A_TO].i];
  return RG_OK;
}

static rg_status backward(rgi_backward *b, int node, rg_error *e) {
  int gradient = rgi_bwd_gradient(b, node, 0);
  return gradient < 0 ? RG_OK : rgi_bwd_give(b, node, 0, gradient, -1, 0, e);
}

static const rg_port in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT | RG_D(RG_I32), 0, -1, "any tensor"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "sequence starts"},
};
static const rg_port out[] = {
    {"y", "...", RG_PORT_ROWS, RG_D_FLOAT | RG_D(RG_I32), 0, -1, "a dense copy"},
};
static const char *const targets[] = {"same", "f32", "f16", "bf16", NULL};
static const rg_attr attrs[] = {
    {"to", RG_ATTR_ENUM, false, 0, 0, SAME, targets,
     "dtype of the copy; \"same\" only makes it dense"},
};
static const rgi_rules rules = {.infer = infer, .backward = backward};
const rg_op rgi_op_cast = {.abi = RG_OP_ABI,
                           .name = "cast",
                           .doc = "dense copy, rounded to nearest even",
                           .flags = RG_OP_RECOMPUTABLE | RG_OP_ROWWISE,
                           .in = in,
                           .nin = RGI_COUNT(in),
                           .out = out,
                           .nout = RGI_COUNT(out),
                           .attrs = attrs,
                           .nattr = RGI_COUNT(attrs),
                           .cost = cost,
                           .run_cpu = rgi_run_cast,
                           .cuda_steps = rgi_cuda_cast,
                           .cuda_path = rgi_cuda_cast_path,
                           .rules = &rules};
