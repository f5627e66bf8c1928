/* ops/cuda/pool.c: see pool.h. */
#include "pool.h"

static rgk_pool plan_call(const rgi_pool *a, rgi_cut *w) {
  rgk_pool p = {.x = rgk_of(a->x),
                .z = rgk_of(a->z),
                .bias = rgk_of(a->bias),
                .y = rgk_of(a->y),
                .dy = rgk_of(a->dy),
                .dx = rgk_of(a->dx),
                .dz = rgk_of(a->dz),
                .db = rgk_of(a->db),
                .seqs = rgk_seqs_of(a->cu, a->T),
                .T = a->T,
                .rows = a->rows,
                .KH = (int32_t)a->KH,
                .W = (int32_t)a->W,
                .kernel = (int32_t)a->kernel,
                .stride = (int32_t)a->stride,
                .parts = (int32_t)a->parts,
                .method = a->method,
                .add_x = a->add_x,
                .add_z = a->add_z,
                .add_b = a->add_b};
  if (!a->db) return p;
  p.lse = rgi_take(w, (size_t)(a->rows * a->KH * a->W) * sizeof *p.lse);
  p.mean = rgi_take(w, (size_t)(a->rows * a->KH * a->W) * sizeof *p.mean);
  return p;
}

static rg_status step(const rgk_pool *p, rg_cuda *x, const void *function, int64_t threads) {
  const int64_t blocks = (threads + RGK_POOL_THREADS - 1) / RGK_POOL_THREADS;
  if (blocks > INT32_MAX)
    return rgi_fail(x->error, RG_E_LIMIT, NULL, NULL, "pool needs too large a grid");
  if (blocks == 0) return RG_OK;
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)blocks, 1, 1},
                                   .block = {RGK_POOL_THREADS, 1, 1},
                                   .params = p,
                                   .size = sizeof *p});
}

size_t rgi_cuda_pool_workspace(const rgi_pool *a) {
  rgi_cut w = {0};
  plan_call(a, &w);
  return w.used;
}

rg_status rgi_cuda_pool_steps(const rgi_pool *a, void *workspace, rg_cuda *x) {
  rgi_cut w = {.base = workspace};
  const rgk_pool p = plan_call(a, &w);
  const int64_t out = a->rows * a->KH * a->W;
  if (!a->backward) return step(&p, x, rgk_pool_fwd(), out);
  if ((a->dx && !a->add_x) || (a->dz && !a->add_z))
    RGI_TRY(step(&p, x, rgk_pool_clear(), a->T * a->KH * a->parts * a->W));
  RGI_TRY(step(&p, x, rgk_pool_bwd(), out));
  return a->db ? step(&p, x, rgk_pool_bias(), a->stride * a->parts * a->W) : RG_OK;
}
