/* ops/cuda_topk.c: see cuda_topk.h.
 *
 * Softmax scores take two launches: one ranks by fp32 sums and marks the rows that those cannot decide, the
 * other ranks the marked rows by fp64 sums; where no row is marked, it only looks. */
#include "cuda_topk.h"

/* ---- the plain kernels ---- */

enum {
  HEAP_SHARED = 64, /* places of a row's heap that are kept in shared memory */
  CHUNK = 64        /* most blocks scored together */
};

static uint32_t plain_grid(const rgk_topk *p, const rg_gpu *gpu) {
  int64_t work = rgk_slots(p->T, p->seqs.n, RGK_TOPK_ROWS) * p->KH, most = 2 * (int64_t)gpu->sms;
  return (uint32_t)(work < most ? work : most);
}

/* As few blocks as make whole pieces of keys, CHUNK at most. */
static int32_t plain_chunk(const rgk_topk *p) {
  int64_t keys = p->block / p->stride, reach = p->kernel / p->stride - 1, n;
  for (int64_t piece = RGK_TOPK_KEYS; (n = (piece - reach) / keys) < 1; piece += RGK_TOPK_KEYS)
    if (reach + keys > (int64_t)CHUNK * RGK_TOPK_KEYS) return CHUNK;
  return (int32_t)(n < CHUNK ? n : CHUNK);
}

static size_t plain_workspace(const rgk_topk *p, const rg_gpu *gpu) {
  if (p->most_keep <= HEAP_SHARED) return 0;
  return (size_t)plain_grid(p, gpu) * RGK_TOPK_ROWS * (size_t)p->most_keep * sizeof(uint64_t);
}

static rg_status plain_step(const rgk_topk *call, const rg_gpu *gpu, void *workspace, rg_cuda *x, int mode) {
  rgk_topk p = *call;
  p.slots = rgk_slots(p.T, p.seqs.n, RGK_TOPK_ROWS);
  p.chunk = plain_chunk(&p);
  p.heap = p.most_keep > HEAP_SHARED ? workspace : NULL;
  return x->launch(x, &(rg_launch){.function = rgk_topk_plain(mode),
                                   .grid = {plain_grid(&p, gpu), 1, 1},
                                   .block = {RGK_TOPK_THREADS, 1, 1},
                                   .shared = rgk_topk_plain_shared(mode, p.chunk, p.heap ? 0 : p.most_keep),
                                   .params = &p,
                                   .size = sizeof p});
}

/* ---- which take a call ---- */

size_t rgi_cuda_topk_workspace(const rgk_topk *p, const rg_gpu *gpu) {
  return plain_workspace(p, gpu);
}

rg_status rgi_cuda_topk_steps(rgk_topk *p, const rg_gpu *gpu, void *workspace, rg_cuda *x) {
  if (p->dot) return plain_step(p, gpu, workspace, x, RGK_TOPK_DOT);
  RGI_TRY(plain_step(p, gpu, workspace, x, RGK_TOPK_FAST));
  return plain_step(p, gpu, workspace, x, RGK_TOPK_WIDE);
}

const char *rgi_cuda_topk_path(const rgk_topk *p, const rg_gpu *gpu) {
  (void)p, (void)gpu;
  return "plain";
}
