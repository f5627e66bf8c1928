/* ops/add.c: the sum of any number of tensors of one shape, in list order, in fp32. */
#include "../graph/autodiff.h"
#include "cpu/rows.h"
#include "cuda/rows.h"

static void cost(const rg_call *c, rg_cost *out) {
  double n = (double)rgi_arg_elements(rg_out(c, 0)),
         size = (double)rg_dtype_size(rg_out(c, 0)->dtype);
  *out =
      (rg_cost){.flops = n * (rg_in_count(c, 0) - 1), .bytes = n * size * (rg_in_count(c, 0) + 1)};
}

static size_t workspace(const rg_call *c) {
  return c->gpu ? rgi_cuda_add_workspace(c) : 0;
}

static rg_status backward(rgi_backward *b, int node, rg_error *e) {
  const rgi_node *n = &rgi_bwd_graph(b)->node[node];
  int gradient = rgi_bwd_gradient(b, node, 0), parts = n->in_begin[1];
  for (int i = 0; i < parts && gradient >= 0; i++)
    if (rgi_bwd_wants(b, node, i)) RGI_TRY(rgi_bwd_give(b, node, i, gradient, -1, 0, e));
  return RG_OK;
}

static const rg_port in[] = {
    {"a", "...", RG_PORT_LIST | RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "the summands"},
    {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
     "sequence starts"},
};
static const rg_port out[] = {
    {"y", "...", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "their sum"},
};
static const rgi_rules rules = {.backward = backward};
const rg_op rgi_op_add = {.abi = RG_OP_ABI,
                          .name = "add",
                          .doc = "sum of tensors of one shape",
                          .flags = RG_OP_RECOMPUTABLE | RG_OP_INPLACE | RG_OP_ROWWISE,
                          .in = in,
                          .nin = RGI_COUNT(in),
                          .out = out,
                          .nout = RGI_COUNT(out),
                          .cost = cost,
                          .workspace = workspace,
                          .run_cpu = rgi_run_add,
                          .cuda_steps = rgi_cuda_add,
                          .cuda_path = rgi_cuda_add_path,
                          .rules = &rules};
