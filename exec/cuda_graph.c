/* exec/cuda_graph.c: see cuda_graph.h. */
#include "cuda_graph.h"

#include <string.h>

struct rgi_graph_item {
  cudaGraphNode_t node;
  const void *function; /* NULL: a library's child graph, or an empty step */
  void *params;         /* copy of the launch's struct */
  size_t size;
  rg_launch launch;
};

static rg_status add_item(rgi_cuda_graph *g, rgi_graph_item **out) {
  if (g->nitem == g->capacity) {
    int32_t capacity = g->capacity ? 2 * g->capacity : 64;
    rgi_graph_item *more = rgi_malloc(g->plan->ctx, (size_t)capacity * sizeof *more);
    if (!more) return rgi_nomem(g->base.error);
    if (g->nitem) memcpy(more, g->item, (size_t)g->nitem * sizeof *more);
    rgi_free(g->plan->ctx, g->item);
    g->item = more;
    g->capacity = capacity;
  }
  *out = &g->item[g->nitem++];
  memset(*out, 0, sizeof **out);
  return RG_OK;
}

/* The nodes that the step's next item waits for: its item before, or the last items of the steps before it.
 */
static size_t waits_for(const rgi_cuda_graph *g, cudaGraphNode_t *list) {
  if (g->step < 0 ? g->nitem > 0 : g->nitem > g->begin[g->step - g->first]) {
    list[0] = g->item[g->nitem - 1].node;
    return 1;
  }
  size_t n = 0;
  if (g->step < 0) return 0;
  for (const int32_t *p = g->plan->after[g->step]; *p >= 0; p++)
    list[n++] = g->item[g->begin[*p - g->first + 1] - 1].node;
  if (n == 0 && g->nhead > 0) list[n++] = g->item[g->nhead - 1].node;
  return n;
}

static cudaGraphNode_t *waiting_list(rgi_cuda_graph *g) {
  size_t n = 1;
  if (g->step >= 0)
    for (const int32_t *p = g->plan->after[g->step]; *p >= 0; p++) n++;
  return rgi_malloc(g->plan->ctx, n * sizeof(cudaGraphNode_t));
}

static struct cudaKernelNodeParams node_params(const rg_launch *l, void **args) {
  return (struct cudaKernelNodeParams){.func = (void *)(uintptr_t)l->function,
                                       .gridDim = {l->grid[0], l->grid[1], l->grid[2]},
                                       .blockDim = {l->block[0], l->block[1], l->block[2]},
                                       .sharedMemBytes = l->shared,
                                       .kernelParams = args};
}

static rg_status add_kernel(rgi_cuda_graph *g, const rg_launch *l) {
  rg_error *e = g->base.error;
  rgi_graph_item *item;
  void *params = rgi_malloc(g->plan->ctx, l->size ? l->size : 1), *args[1] = {(void *)(uintptr_t)l->params};
  cudaGraphNode_t *after = waiting_list(g), node;
  rg_status status = params && after ? rgi_cuda_prepare(l, e) : rgi_nomem(e);
  if (status == RG_OK) {
    size_t n = waits_for(g, after);
    struct cudaKernelNodeParams p = node_params(l, args);
    status = rgi_cuda_status(cudaGraphAddKernelNode(&node, g->graph, after, n, &p),
                             "adding a kernel to a graph", NULL, e);
  }
  if (status == RG_OK && l->cluster > 1) {
    union cudaKernelNodeAttrValue value = {.clusterDim = {l->cluster, 1, 1}};
    status =
        rgi_cuda_status(cudaGraphKernelNodeSetAttribute(node, cudaLaunchAttributeClusterDimension, &value),
                        "a cluster", NULL, e);
  }
  if (status == RG_OK) status = add_item(g, &item);
  rgi_free(g->plan->ctx, after);
  if (status != RG_OK) {
    rgi_free(g->plan->ctx, params);
    return status;
  }
  if (l->size) memcpy(params, l->params, l->size);
  *item = (rgi_graph_item){
      .node = node, .function = l->function, .params = params, .size = l->size, .launch = *l};
  return RG_OK;
}

static rg_status changed(rgi_cuda_graph *g) {
  const char *node = g->step < 0 ? NULL : g->plan->graph->node[g->plan->step[g->step].node].name;
  return rgi_fail(g->base.error, RG_E_INTERNAL, NULL, node,
                  "the launches of a step changed with its addresses");
}
/* Where the items of the step at work end. */
static int32_t items_end(const rgi_cuda_graph *g) {
  return g->step < 0 ? g->nhead : g->begin[g->step - g->first + 1];
}

static rg_status take_launch(rg_cuda *base, const rg_launch *l) {
  rgi_cuda_graph *g = (rgi_cuda_graph *)base;
  if (!l->grid[0] || !l->grid[1] || !l->grid[2]) return RG_OK;
  if (!g->updating) return add_kernel(g, l);
  if (g->at >= items_end(g)) return changed(g);
  rgi_graph_item *item = &g->item[g->at++];
  if (item->function != l->function || item->size != l->size) return changed(g);
  if (memcmp(item->params, l->params, l->size) == 0) return RG_OK;
  void *args[1] = {(void *)(uintptr_t)l->params};
  struct cudaKernelNodeParams p = node_params(l, args);
  RGI_TRY(rgi_cuda_status(cudaGraphExecKernelNodeSetParams(g->exec, item->node, &p), "rebinding a kernel",
                          NULL, base->error));
  memcpy(item->params, l->params, l->size);
  return RG_OK;
}

static rg_status record_child(rgi_cuda_graph *g, rg_status (*record)(void *arg, void *stream), void *arg,
                              cudaGraph_t *child) {
  rg_error *e = g->base.error;
  *child = NULL;
  RGI_TRY(rgi_cuda_status(cudaStreamBeginCapture(g->recorder, cudaStreamCaptureModeThreadLocal),
                          "recording a library call", NULL, e));
  rg_status status = record(arg, g->recorder);
  cudaError_t code = cudaStreamEndCapture(g->recorder, child);
  if (status != RG_OK) return rgi_fail(e, status, NULL, NULL, "a library call could not be recorded");
  return rgi_cuda_status(code, "recording a library call", NULL, e);
}

static rg_status take_library(rg_cuda *base, rg_status (*record)(void *arg, void *stream), void *arg) {
  rgi_cuda_graph *g = (rgi_cuda_graph *)base;
  rg_error *e = base->error;
  cudaGraph_t child = NULL;
  rg_status status = record_child(g, record, arg, &child);
  if (status == RG_OK && g->updating) {
    rgi_graph_item *item = g->at < items_end(g) ? &g->item[g->at++] : NULL;
    if (!item || item->function)
      status = changed(g);
    else
      status = rgi_cuda_status(cudaGraphExecChildGraphNodeSetParams(g->exec, item->node, child),
                               "rebinding a library call", NULL, e);
  } else if (status == RG_OK) {
    cudaGraphNode_t *after = waiting_list(g), node;
    rgi_graph_item *item;
    status =
        after
            ? rgi_cuda_status(cudaGraphAddChildGraphNode(&node, g->graph, after, waits_for(g, after), child),
                              "adding a library call to a graph", NULL, e)
            : rgi_nomem(e);
    if (status == RG_OK) status = add_item(g, &item);
    if (status == RG_OK) item->node = node;
    rgi_free(g->plan->ctx, after);
  }
  if (child) cudaGraphDestroy(child);
  return status;
}

/* A step without launches still stands between those before and after it. */
static rg_status add_empty(rgi_cuda_graph *g, rg_error *e) {
  cudaGraphNode_t *after = waiting_list(g), node;
  rgi_graph_item *item;
  rg_status status = after
                         ? rgi_cuda_status(cudaGraphAddEmptyNode(&node, g->graph, after, waits_for(g, after)),
                                           "adding an empty node", NULL, e)
                         : rgi_nomem(e);
  rgi_free(g->plan->ctx, after);
  if (status == RG_OK) status = add_item(g, &item);
  if (status == RG_OK) item->node = node;
  return status;
}

static rg_status build(rg_session *s, int32_t to, rgi_cuda_graph *g, rg_error *e) {
  RGI_TRY(rgi_cuda_status(cudaGraphCreate(&g->graph, 0), "creating a graph", NULL, e));
  RGI_TRY(rgi_cuda_status(cudaStreamCreateWithFlags(&g->recorder, cudaStreamNonBlocking), "creating a stream",
                          NULL, e));
  g->step = -1;
  if (g->first == 0) RGI_TRY(rgi_cuda_clean(s, &g->base));
  g->nhead = g->nitem;
  for (g->step = g->first; g->step < to; g->step++) {
    const rgi_node *node = &g->plan->graph->node[g->plan->step[g->step].node];
    g->begin[g->step - g->first] = g->begin[g->step - g->first + 1] = g->nitem;
    rg_call call = rgi_cuda_call(s, g->step, e);
    rg_status status = node->op->cuda_steps(&call, &g->base);
    if (status != RG_OK) return rgi_fail(e, status, NULL, node->name, "op \"%s\" failed", node->op->name);
    if (g->nitem == g->begin[g->step - g->first]) RGI_TRY(add_empty(g, e));
    g->begin[g->step - g->first + 1] = g->nitem;
  }
  return rgi_cuda_status(cudaGraphInstantiate(&g->exec, g->graph, 0), "instantiating a graph", NULL, e);
}

rg_status rgi_cuda_graph_create(rg_session *s, int32_t from, int32_t to, void *blas, rgi_cuda_graph *g,
                                rg_error *e) {
  *g = (rgi_cuda_graph){.base = {.launch = take_launch, .library = take_library, .blas = blas, .error = e},
                        .plan = s->plan,
                        .first = from};
  g->begin = rgi_alloc_n(s->arena, (size_t)(to - from) + 1, sizeof *g->begin);
  if (!g->begin) return rgi_nomem(e);
  rg_status status = build(s, to, g, e);
  if (status != RG_OK) rgi_cuda_graph_destroy(s, g);
  g->updating = true;
  return status;
}

rg_status rgi_cuda_graph_update(rg_session *s, rgi_cuda_graph *g, int32_t i, rg_error *e) {
  g->base.error = e;
  g->step = i;
  g->at = i < 0 ? 0 : g->begin[i - g->first];
  if (i < 0) return rgi_cuda_clean(s, &g->base);
  const rgi_node *node = &g->plan->graph->node[g->plan->step[i].node];
  rg_call call = rgi_cuda_call(s, i, e);
  rg_status status = node->op->cuda_steps(&call, &g->base);
  return status == RG_OK ? RG_OK : rgi_fail(e, status, NULL, node->name, "op \"%s\" failed", node->op->name);
}

void rgi_cuda_graph_destroy(rg_session *s, rgi_cuda_graph *g) {
  if (g->exec) cudaGraphExecDestroy(g->exec);
  if (g->graph) cudaGraphDestroy(g->graph);
  if (g->recorder) cudaStreamDestroy(g->recorder);
  for (int32_t i = 0; i < g->nitem; i++) rgi_free(s->plan->ctx, g->item[i].params);
  rgi_free(s->plan->ctx, g->item);
  g->exec = NULL;
  g->graph = NULL;
  g->recorder = NULL;
  g->item = NULL;
  g->nitem = g->capacity = 0;
}
