/* exec/cuda_graph.h: one direction's steps as one CUDA graph.
 *
 *     create    for each step: its launches become nodes, a chain per step, chains joined as
 *               plan->after says; what cleans lengths (forward) comes before all of them
 *     update    steps that touch what is bound elsewhere now are asked again; nodes whose
 *               parameters differ are patched
 */
#ifndef RGI_CUDA_GRAPH_H
#define RGI_CUDA_GRAPH_H

#include "cuda_steps.h"
#include <cudaTypedefs.h>

typedef struct rgi_graph_item rgi_graph_item;
typedef struct rgi_cuda_graph {
  rg_cuda base; /* takes launches while building or updating */
  const rg_plan *plan;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaStream_t recorder; /* library calls are captured on it */
  cudaStream_t sender;   /* collectives on this one, of the highest priority */
  int urgency;           /* that priority */
  double *leads;         /* per step: bytes that the dearest collective behind it sends */
  double dearest;        /* of all */
  int32_t *flag;         /* for cleaning lengths (cuda_steps.h); borrowed */
  rgi_graph_item *item;  /* in the order in which steps hand them over */
  int32_t nitem, capacity;
  bool backward;
  int32_t first, end; /* its steps: [first, end) */
  int32_t *begin;     /* begin[i - first]: first item of step i */
  int32_t nhead;      /* items that clean lengths; the other steps' come after */
  int32_t step, next; /* at work on; while updating: the item expected next. step -1: the head */
  bool updating;
  /* the runtime's own looks up the kernel each time */
  PFN_cuGraphExecKernelNodeSetParams_v12000 patch;
  void **at;     /* [rgi_cuda_addresses]: what the nodes' parameters were made for */
  bool broken;   /* an update failed: every node is to be patched */
  uint64_t used; /* when it was last launched; 0: there is no graph */
} rgi_cuda_graph;

/* The addresses that parameters of a direction come from: what is bound (the backward's inputs and
 * outputs where the forward had them), the saved block, scratch, the host block. rgi_cuda_address:
 * the place of one in a list of them. */
static inline int32_t rgi_cuda_address(const rg_plan *plan, int32_t bind) {
  if (bind >= 0) return bind;
  return plan->nbindable + (bind == RGI_AT_SCRATCH ? 1 : bind == RGI_AT_HOST ? 2 : 0);
}
static inline int32_t rgi_cuda_addresses(const rg_plan *plan) {
  return plan->nbindable + 3;
}
void rgi_cuda_addresses_now(const rg_session *s, bool backward, void **at);

/* Builds and instantiates from what rgi_session_call says now. g is all zeros, or was a graph
 * before. */
rg_status rgi_cuda_graph_create(rg_session *s, bool backward, void *blas, int32_t *flag,
                                rgi_cuda_graph *g, rg_error *e);
/* Steps that would be asked again for addresses `at`; -1: nothing at all has moved. RGI_NOT_THERE:
 * one of them can't be patched, so the graph is of no use for these addresses. */
enum { RGI_NOT_THERE = INT32_MAX };
int32_t rgi_cuda_graph_moved(const rgi_cuda_graph *g, void *const *at);
rg_status rgi_cuda_graph_update(rg_session *s, rgi_cuda_graph *g, void *const *at, rg_error *e);
void rgi_cuda_graph_destroy(rg_session *s, rgi_cuda_graph *g);

#endif
