/* exec/cuda_graph.c: see cuda_graph.h. */
#include "cuda_graph.h"

#include <string.h>

struct rgi_graph_item {
  cudaGraphNode_t node;
  rg_launch launch; /* function NULL: a library's child graph, a copy, or an empty step */
  bool copy, rows;  /* a copy; one of several rows, which the driver refuses to patch */
  CUfunction loaded;
  void *params; /* copy of the launch's struct */
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

/* The nodes that the step's next item waits for: its item before, or the last
 * items of the steps before it. */
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

/* ---- priorities: kernels that fill the GPU would keep those waiting that others wait for ---- */

static bool sends(const rgi_cuda_graph *g) {
  return g->step >= 0 && g->plan->step[g->step].comm_size > 0;
}

/* Of what the step at work launches: collectives and what is copied for them first; then what the
 * dear ones wait for, so that there is something left to hide them behind; then the rest. */
static int priority(const rgi_cuda_graph *g) {
  if (sends(g)) return g->urgency;
  if (g->step < 0) return 0;
  return rgi_leads_first(g->leads[g->step - g->first], g->dearest) ? g->urgency / 2 : 0;
}

static rg_status add_kernel(rgi_cuda_graph *g, const rg_launch *l) {
  rg_error *e = g->base.error;
  rgi_graph_item *item;
  void *params = rgi_malloc(g->plan->ctx, l->size ? l->size : 1),
       *args[1] = {(void *)(uintptr_t)l->params};
  cudaGraphNode_t *after = waiting_list(g), node;
  CUfunction loaded = NULL;
  rg_status status = params && after ? rgi_cuda_prepare(l, e) : rgi_nomem(e);
  if (status == RG_OK) {
    size_t n = waits_for(g, after);
    struct cudaKernelNodeParams p = node_params(l, args);
    status = rgi_cuda_status(cudaGraphAddKernelNode(&node, g->graph, after, n, &p),
                             "adding a kernel to a graph", NULL, e);
  }
  if (status == RG_OK)
    status =
        rgi_cuda_status(cudaGetFuncBySymbol(&loaded, l->function), "finding a kernel", NULL, e);
  if (status == RG_OK && l->cluster > 1) {
    union cudaKernelNodeAttrValue value = {.clusterDim = {l->cluster, 1, 1}};
    status = rgi_cuda_status(
        cudaGraphKernelNodeSetAttribute(node, cudaLaunchAttributeClusterDimension, &value),
        "a cluster", NULL, e);
  }
  if (status == RG_OK && g->dearest > 0) {
    const union cudaKernelNodeAttrValue value = {.priority = priority(g)};
    status =
        rgi_cuda_status(cudaGraphKernelNodeSetAttribute(node, cudaLaunchAttributePriority, &value),
                        "a priority", NULL, e);
  }
  if (status == RG_OK) status = add_item(g, &item);
  rgi_free(g->plan->ctx, after);
  if (status != RG_OK) {
    rgi_free(g->plan->ctx, params);
    return status;
  }
  if (l->size) memcpy(params, l->params, l->size);
  *item = (rgi_graph_item){.node = node, .launch = *l, .loaded = loaded, .params = params};
  item->launch.params = params;
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

/* All but what the parameters hold. */
static bool same_launch(const rg_launch *a, const rg_launch *b) {
  return a->function == b->function && a->size == b->size && a->shared == b->shared &&
         a->cluster == b->cluster && memcmp(a->grid, b->grid, sizeof a->grid) == 0 &&
         memcmp(a->block, b->block, sizeof a->block) == 0;
}

static rg_status take_launch(rg_cuda *base, const rg_launch *l) {
  rgi_cuda_graph *g = (rgi_cuda_graph *)base;
  if (!l->grid[0] || !l->grid[1] || !l->grid[2]) return RG_OK;
  if (!g->updating) return add_kernel(g, l);
  if (g->next >= items_end(g)) return changed(g);
  rgi_graph_item *item = &g->item[g->next++];
  if (!same_launch(&item->launch, l)) return changed(g);
  if (memcmp(item->params, l->params, l->size) == 0) return RG_OK;
  void *args[1] = {(void *)(uintptr_t)l->params};
  const CUDA_KERNEL_NODE_PARAMS p = {.func = item->loaded,
                                     .gridDimX = l->grid[0],
                                     .gridDimY = l->grid[1],
                                     .gridDimZ = l->grid[2],
                                     .blockDimX = l->block[0],
                                     .blockDimY = l->block[1],
                                     .blockDimZ = l->block[2],
                                     .sharedMemBytes = l->shared,
                                     .kernelParams = args};
  const CUresult code = g->patch(g->exec, item->node, &p);
  if (code != CUDA_SUCCESS)
    return rgi_fail(base->error, RG_E_DEVICE, NULL, NULL,
                    "rebinding a kernel: error %d of the driver", (int)code);
  memcpy(item->params, l->params, l->size);
  return RG_OK;
}

static rg_status record_child(rgi_cuda_graph *g, rg_status (*record)(void *arg, void *stream),
                              void *arg, cudaGraph_t *child) {
  rg_error *e = g->base.error;
  const cudaStream_t stream = sends(g) ? g->sender : g->recorder;
  *child = NULL;
  RGI_TRY(rgi_cuda_status(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
                          "recording a library call", NULL, e));
  rg_status status = record(arg, stream);
  cudaError_t code = cudaStreamEndCapture(stream, child);
  if (status != RG_OK)
    return rgi_fail(e, status, NULL, NULL, "a library call could not be recorded");
  return rgi_cuda_status(code, "recording a library call", NULL, e);
}

static rg_status take_library(rg_cuda *base, rg_status (*record)(void *arg, void *stream),
                              void *arg) {
  rgi_cuda_graph *g = (rgi_cuda_graph *)base;
  rg_error *e = base->error;
  cudaGraph_t child = NULL;
  rg_status status = record_child(g, record, arg, &child);
  if (status == RG_OK && g->updating) {
    rgi_graph_item *item = g->next < items_end(g) ? &g->item[g->next++] : NULL;
    if (!item || item->launch.function)
      status = changed(g);
    else
      status = rgi_cuda_status(cudaGraphExecChildGraphNodeSetParams(g->exec, item->node, child),
                               "rebinding a library call", NULL, e);
  } else if (status == RG_OK) {
    cudaGraphNode_t *after = waiting_list(g), node;
    rgi_graph_item *item;
    status = after ? rgi_cuda_status(cudaGraphAddChildGraphNode(&node, g->graph, after,
                                                                waits_for(g, after), child),
                                     "adding a library call to a graph", NULL, e)
                   : rgi_nomem(e);
    if (status == RG_OK) status = add_item(g, &item);
    if (status == RG_OK) item->node = node;
    rgi_free(g->plan->ctx, after);
  }
  if (child) cudaGraphDestroy(child);
  return status;
}

static rg_status take_collective(rg_cuda *base, rg_status (*record)(void *arg, void *stream),
                                 void *arg) {
  rgi_cuda_graph *g = (rgi_cuda_graph *)base;
  if (!g->updating) return take_library(base, record, arg);
  const rgi_graph_item *item = g->next < items_end(g) ? &g->item[g->next++] : NULL;
  return item && !item->launch.function ? RG_OK : changed(g);
}

static rg_status take_copy(rg_cuda *base, const rg_copy *c) {
  rgi_cuda_graph *g = (rgi_cuda_graph *)base;
  rg_error *e = base->error;
  if (g->updating) {
    const rgi_graph_item *item = g->next < items_end(g) ? &g->item[g->next++] : NULL;
    if (!item || !item->copy || item->rows || c->rows != 1) return changed(g);
    return rgi_cuda_status(cudaGraphExecMemcpyNodeSetParams1D(g->exec, item->node, c->to, c->from,
                                                              c->width, rgi_cuda_kind(c)),
                           "rebinding a copy", NULL, e);
  }
  const struct cudaMemcpy3DParms p = {
      .srcPtr = {(void *)(uintptr_t)c->from, c->from_pitch, c->width, c->rows},
      .dstPtr = {c->to, c->to_pitch, c->width, c->rows},
      .extent = {c->width, c->rows, 1},
      .kind = rgi_cuda_kind(c)};
  cudaGraphNode_t *after = waiting_list(g), node;
  rgi_graph_item *item;
  rg_status status = after ? RG_OK : rgi_nomem(e);
  if (status == RG_OK) {
    const size_t n = waits_for(g, after);
    status =
        rgi_cuda_status(c->rows == 1 ? cudaGraphAddMemcpyNode1D(&node, g->graph, after, n, c->to,
                                                                c->from, c->width, p.kind)
                                     : cudaGraphAddMemcpyNode(&node, g->graph, after, n, &p),
                        "adding a copy to a graph", NULL, e);
  }
  rgi_free(g->plan->ctx, after);
  if (status == RG_OK) status = add_item(g, &item);
  if (status == RG_OK) item->node = node, item->copy = true, item->rows = c->rows > 1;
  return status;
}

/* A step without launches still stands between those before and after it. */
static rg_status add_empty(rgi_cuda_graph *g, rg_error *e) {
  cudaGraphNode_t *after = waiting_list(g), node;
  rgi_graph_item *item;
  rg_status status =
      after ? rgi_cuda_status(cudaGraphAddEmptyNode(&node, g->graph, after, waits_for(g, after)),
                              "adding an empty node", NULL, e)
            : rgi_nomem(e);
  rgi_free(g->plan->ctx, after);
  if (status == RG_OK) status = add_item(g, &item);
  if (status == RG_OK) item->node = node;
  return status;
}

static rg_status build(rg_session *s, rgi_cuda_graph *g, rg_error *e) {
  RGI_TRY(rgi_cuda_status(cudaGraphCreate(&g->graph, 0), "creating a graph", NULL, e));
  RGI_TRY(rgi_cuda_status(cudaDeviceGetStreamPriorityRange(NULL, &g->urgency),
                          "asking for priorities", NULL, e));
  RGI_TRY(rgi_cuda_status(cudaStreamCreateWithFlags(&g->recorder, cudaStreamNonBlocking),
                          "creating a stream", NULL, e));
  RGI_TRY(
      rgi_cuda_status(cudaStreamCreateWithPriority(&g->sender, cudaStreamNonBlocking, g->urgency),
                      "creating a stream", NULL, e));
  g->step = -1;
  if (!g->backward) RGI_TRY(rgi_cuda_clean(s, g->flag, &g->base));
  g->nhead = g->nitem;
  for (g->step = g->first; g->step < g->end; g->step++) {
    const rgi_node *node = &g->plan->graph->node[g->plan->step[g->step].node];
    g->begin[g->step - g->first] = g->begin[g->step - g->first + 1] = g->nitem;
    rg_call call = rgi_cuda_call(s, g->step, g->flag, e);
    rg_status status = node->op->cuda_steps(&call, &g->base);
    if (status != RG_OK)
      return rgi_fail(e, status, NULL, node->name, "op \"%s\" failed", node->op->name);
    if (g->nitem == g->begin[g->step - g->first]) RGI_TRY(add_empty(g, e));
    g->begin[g->step - g->first + 1] = g->nitem;
  }
  return rgi_cuda_status(
      cudaGraphInstantiate(&g->exec, g->graph,
                           g->dearest > 0 ? cudaGraphInstantiateFlagUseNodePriority : 0),
      "instantiating a graph", NULL, e);
}

rg_status rgi_cuda_graph_create(rg_session *s, bool backward, void *blas, int32_t *flag,
                                rgi_cuda_graph *g, rg_error *e) {
  const rg_plan *plan = s->plan;
  enum cudaDriverEntryPointQueryResult query;
  void **at = g->at, *found = NULL;
  int32_t *begin = g->begin;
  double *leads = g->leads;
  if (!at) at = rgi_alloc_n(s->arena, (size_t)rgi_cuda_addresses(plan), sizeof *at);
  if (!begin) begin = rgi_alloc_n(s->arena, (size_t)plan->nstep + 1, sizeof *begin);
  if (!leads) leads = rgi_alloc_n(s->arena, (size_t)plan->nstep + 1, sizeof *leads);
  *g = (rgi_cuda_graph){.base = {.launch = take_launch,
                                 .library = take_library,
                                 .collective = take_collective,
                                 .copy = take_copy,
                                 .blas = blas,
                                 .error = e},
                        .plan = plan,
                        .flag = flag,
                        .backward = backward,
                        .first = backward ? plan->nforward : 0,
                        .end = backward ? plan->nstep : plan->nforward,
                        .begin = begin,
                        .leads = leads,
                        .at = at};
  if (!at || !begin || !leads) return rgi_nomem(e);
  g->dearest = rgi_plan_leads(plan, g->first, g->end, leads);
  rg_status status =
      rgi_cuda_status(cudaGetDriverEntryPointByVersion("cuGraphExecKernelNodeSetParams", &found,
                                                       12000, cudaEnableDefault, &query),
                      "looking for cuGraphExecKernelNodeSetParams", NULL, e);
  g->patch = (PFN_cuGraphExecKernelNodeSetParams_v12000)(uintptr_t)found;
  if (status == RG_OK) status = build(s, g, e);
  if (status != RG_OK) rgi_cuda_graph_destroy(s, g);
  rgi_cuda_addresses_now(s, backward, at);
  g->updating = true;
  return status;
}

void rgi_cuda_addresses_now(const rg_session *s, bool backward, void **at) {
  for (int32_t i = 0; i < s->plan->nbindable; i++) {
    const bool forward = rgi_role_forward(s->plan->bindable[i].info.role);
    at[i] = forward ? s->current->at[i] : backward ? s->bound[i] : NULL;
  }
  at[rgi_cuda_address(s->plan, RGI_AT_SAVED)] = s->current->data;
  at[rgi_cuda_address(s->plan, RGI_AT_SCRATCH)] = s->scratch;
  at[rgi_cuda_address(s->plan, RGI_AT_HOST)] = s->current->host;
}

/* Is the place, in a graph made for g->at, another one now? */
static bool moved(const rgi_cuda_graph *g, void *const *at, int32_t bind) {
  if (bind == RGI_AT_NOTHING) return false;
  const int32_t i = rgi_cuda_address(g->plan, bind);
  return g->broken || g->at[i] != at[i];
}
static bool moved_step(const rgi_cuda_graph *g, void *const *at, int32_t i) {
  const rgi_step *step = &g->plan->step[i];
  bool any = step->workspace_size && moved(g, at, RGI_AT_SCRATCH);
  for (int32_t k = 0; k < step->nin + step->nout && !any; k++)
    any = moved(g, at, step->place[k].bind);
  return any;
}

int32_t rgi_cuda_graph_moved(const rgi_cuda_graph *g, void *const *at) {
  int32_t n = 0;
  if (!g->broken && memcmp(g->at, at, (size_t)rgi_cuda_addresses(g->plan) * sizeof *at) == 0)
    return -1;
  for (int32_t i = g->first; i < g->end; i++) {
    if (!moved_step(g, at, i)) continue;
    for (int32_t k = g->begin[i - g->first]; k < g->begin[i - g->first + 1]; k++)
      if (g->item[k].rows) return RGI_NOT_THERE;
    n++;
  }
  return n;
}

rg_status rgi_cuda_graph_update(rg_session *s, rgi_cuda_graph *g, void *const *at, rg_error *e) {
  rg_status status = RG_OK;
  bool head = false;
  g->base.error = e;
  g->step = -1;
  g->next = 0;
  for (int32_t i = 0; i < g->plan->nclean && g->nhead; i++)
    head = head || moved(g, at, g->plan->clean[i].bind) || moved(g, at, RGI_AT_SAVED);
  if (head) status = rgi_cuda_clean(s, g->flag, &g->base);
  for (int32_t i = g->first; i < g->end && status == RG_OK; i++) {
    if (!moved_step(g, at, i)) continue;
    const rgi_node *node = &g->plan->graph->node[g->plan->step[i].node];
    g->step = i;
    g->next = g->begin[i - g->first];
    rg_call call = rgi_cuda_call(s, i, g->flag, e);
    status = node->op->cuda_steps(&call, &g->base);
    if (status != RG_OK) rgi_fail(e, status, NULL, node->name, "op \"%s\" failed", node->op->name);
  }
  g->broken = status != RG_OK;
  memcpy(g->at, at, (size_t)rgi_cuda_addresses(g->plan) * sizeof *at);
  return status;
}

void rgi_cuda_graph_destroy(rg_session *s, rgi_cuda_graph *g) {
  if (g->exec) cudaGraphExecDestroy(g->exec);
  if (g->graph) cudaGraphDestroy(g->graph);
  if (g->recorder) cudaStreamDestroy(g->recorder);
  if (g->sender) cudaStreamDestroy(g->sender);
  for (int32_t i = 0; i < g->nitem; i++) rgi_free(s->plan->ctx, g->item[i].params);
  rgi_free(s->plan->ctx, g->item);
  g->exec = NULL;
  g->graph = NULL;
  g->recorder = g->sender = NULL;
  g->item = NULL;
  g->nitem = g->capacity = 0;
  g->used = 0;
}
