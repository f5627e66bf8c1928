/* ops/offload.c: the two copies that rgi_offload (recompute/rewrite.c) makes: a tensor's bytes to
   the host's memory in forward, and back in backward. On the CPU both blocks are the host's, so
   both copy.
 */
#include "../graph/autodiff.h"
#include "cpu/rows.h"

static void cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.bytes = rgi_call_bytes(c)};
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

static const rg_port in[] = {
    {"x", "...", RG_PORT_ROWS, RG_D_FLOAT | RG_D(RG_I32), 0, -1, "any tensor"}};
static const rg_port out[] = {
    {"y", "...", RG_PORT_ROWS, RG_D_FLOAT | RG_D(RG_I32), 0, -1, "the same elsewhere"}};
static const rgi_rules rules = {.infer = infer};

#define COPY(text, about)                                                                  \
  {                                                                                        \
    .abi = RG_OP_ABI, .name = text, .doc = about, .flags = RG_OP_INTERNAL | RG_OP_ROWWISE, \
    .in = in, .nin = RGI_COUNT(in), .out = out, .nout = RGI_COUNT(out), .cost = cost,      \
    .run_cpu = run, .rules = &rules                                                        \
  }
const rg_op rgi_op_offload = COPY("offload", "a copy in the host's memory, for the backward");
const rg_op rgi_op_fetch = COPY("fetch", "what was offloaded, back again");
