/* cp/nccl.h: collectives on GPUs, one process a GPU, by NCCL, which is loaded at run time: the copy
 * that the process has already (a framework's), else the system's. All of them chain on the stream
 * given, captured or not, and touch nothing but the buffers given. */
#ifndef RGI_CP_NCCL_H
#define RGI_CP_NCCL_H

#include "../graph/base.h"

typedef struct rgi_nccl rgi_nccl;
typedef void rgi_stuck(rg_comm *meeting, const char *collective);

#ifdef REGRAPH_CUDA
/* Collective, over `meeting`, whose host memory carries rank 0's id, and which hears by `stuck` of
 * a collective that does not end. RG_E_COMM if the library is missing or too old, or not the same
 * on all ranks. */
rg_status rgi_nccl_open(rg_comm *meeting, rgi_stuck *stuck, const rg_context *ctx, double deadline,
                        rgi_nccl **out, rg_error *e);
rg_status rgi_nccl_all_gather(rgi_nccl *n, const char *node, const void *send, void *recv,
                              size_t bytes, void *stream, rg_error *e);
rg_status rgi_nccl_all_to_all(rgi_nccl *n, const char *node, const void *send, void *recv,
                              size_t bytes, void *stream, rg_error *e);
rg_status rgi_nccl_halo(rgi_nccl *n, const char *node, const rg_halo *h, size_t bytes, void *stream,
                        rg_error *e);
/* Ends what is under way on this rank's GPU, from any thread. NULL is fine, as for close. */
void rgi_nccl_abort(rgi_nccl *n);
void rgi_nccl_close(rgi_nccl *n);
#else
static inline rg_status rgi_nccl_none(rg_error *e) {
  return rgi_fail(e, RG_E_DEVICE, NULL, NULL, "this build has no GPU backend");
}
static inline rg_status rgi_nccl_open(rg_comm *meeting, rgi_stuck *stuck, const rg_context *ctx,
                                      double deadline, rgi_nccl **out, rg_error *e) {
  (void)meeting, (void)stuck, (void)ctx, (void)deadline, (void)out;
  return rgi_nccl_none(e);
}
static inline rg_status rgi_nccl_all_gather(rgi_nccl *n, const char *node, const void *send,
                                            void *recv, size_t bytes, void *stream, rg_error *e) {
  (void)n, (void)node, (void)send, (void)recv, (void)bytes, (void)stream;
  return rgi_nccl_none(e);
}
#define rgi_nccl_all_to_all rgi_nccl_all_gather
static inline rg_status rgi_nccl_halo(rgi_nccl *n, const char *node, const rg_halo *h, size_t bytes,
                                      void *stream, rg_error *e) {
  (void)n, (void)node, (void)h, (void)bytes, (void)stream;
  return rgi_nccl_none(e);
}
static inline void rgi_nccl_abort(rgi_nccl *n) {
  (void)n;
}
static inline void rgi_nccl_close(rgi_nccl *n) {
  (void)n;
}
#endif

#endif
