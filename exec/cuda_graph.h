/* exec/cuda_graph.h: one direction's steps as one CUDA graph.
 *
 *     create ── for each step: its launches become nodes, a chain per step, chains joined as plan->after
 * says; what cleans lengths (forward) comes before all of them update ── the same launches again with other
 * addresses: nodes whose parameters differ are patched
 */
#ifndef RGI_CUDA_GRAPH_H
#define RGI_CUDA_GRAPH_H

#include "cuda.h"
#include "session.h"

typedef struct rgi_graph_item rgi_graph_item;
typedef struct rgi_cuda_graph {
  rg_cuda base; /* takes launches while building or updating */
  const rg_plan *plan;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaStream_t recorder; /* library calls are captured on it */
  rgi_graph_item *item;  /* in the order in which steps hand them over */
  int32_t nitem, capacity;
  int32_t first, *begin; /* begin[i - first]: first item of step i */
  int32_t nhead;         /* items that clean lengths; the other steps' come after */
  int32_t step, at;      /* at work on; while updating: the item expected next. step -1: the head */
  bool updating;
} rgi_cuda_graph;

/* The call of step i with addresses filled in; what is of no bytes and unbound gets some address all the
 * same. */
rg_call rgi_cuda_call(rg_session *s, int32_t i, rg_error *e);
/* Hands over the launches that copy and clean lengths. */
rg_status rgi_cuda_clean(rg_session *s, rg_cuda *x);

/* Builds and instantiates from what rgi_session_call says now. */
rg_status rgi_cuda_graph_create(rg_session *s, int32_t from, int32_t to, void *blas, rgi_cuda_graph *g,
                                rg_error *e);
/* Patches step i; -1: the head. */
rg_status rgi_cuda_graph_update(rg_session *s, rgi_cuda_graph *g, int32_t i, rg_error *e);
void rgi_cuda_graph_destroy(rg_session *s, rgi_cuda_graph *g);

#endif
