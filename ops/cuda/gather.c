/* ops/cuda/gather.c: forward of attention over selected blocks on Hopper where the groups of
 * heads are large, driven by the queries (kernels/attn/gather.h): which shapes it takes, and
 * the launch. */
#include "../../kernels/attn/gather.h"
#include "attn.h"
#include "hopper.h"

/* Smaller groups leave rows of the tensor cores' tiles empty: the keys' kernels are faster
 * there. */
enum { LEAST_GROUP = 16 };
static const int64_t KEPT = INT64_C(20) << 20; /* bytes of K and V that surely stay in L2 */

static rgk_gather plan(const rgk_attn *a) {
  rgk_gather p = {.a = *a};
  const int32_t groups = (int32_t)rgk_blocks(a->G, RGK_GATHER_ROWS); /* units of a query */
  p.parts = (int32_t)rgk_blocks(groups, RGK_GATHER_UNITS);
  p.per = p.parts > 1 ? RGK_GATHER_UNITS : groups;
  p.queries = RGK_GATHER_UNITS / p.per;
  p.slots = (int32_t)rgk_slots(a->T, a->seqs.n, p.queries);
  p.tiles = p.slots * a->KH * p.parts;
  /* as many heads at once as L2 holds: then the light tiles of all come last */
  const int64_t most = KEPT / (a->S * (a->D + a->E) * 2 + 1);
  for (p.side = a->KH * p.parts; p.side > 1 && (p.side > most || a->KH * p.parts % p.side != 0);)
    p.side--;
  return p;
}

static const char *refuses(const rgk_attn *a, const rg_gpu *gpu) {
  const char *no = rgi_hopper_refuses(gpu, a->dtype, a->aligned);
  if (no) return no;
  if (!((a->D == a->E && (a->D == 64 || a->D == 96 || a->D == 128)) ||
        (a->D == 192 && a->E == 128)))
    return "plain: head width";
  if (!(a->scale > 0)) return "plain: scale not positive";
  if (a->T == 0 || a->S == 0) return "plain: nothing to do";
  if (a->S > INT32_MAX || (a->T + a->seqs.n + 1) * a->H > INT32_MAX / 2)
    return "plain: too many rows";
  if (a->G < LEAST_GROUP) return "plain: fewer than 16 query heads to a KV head";
#ifdef REGRAPH_CUDA
  if (!rgk_gather_fwd((rg_dtype)a->dtype, a->D, a->E)) return "plain: not in this build";
#endif
  return NULL;
}

static size_t workspace(const rgk_attn *a, const rg_gpu *gpu) {
  (void)a, (void)gpu;
  return 0;
}

static rg_status steps(const rgk_attn *a, const rg_gpu *gpu, void *unused, rg_cuda *x) {
  (void)unused;
  rgk_gather p = plan(a);
  rgk_map_of q = rgk_map_rows(a->q, a->T, a->H, a->D, 1);
  q.box[1] = RGK_GATHER_ROWS;
  const rgk_map_of k = rgk_map_rows(a->k, a->S, a->KH, a->D, RGK_GATHER_KEYS),
                   v = rgk_map_rows(a->v, a->S, a->KH, a->E, RGK_GATHER_KEYS);
  RGI_TRY(rgk_map_make(&p.q, &q, x->error));
  RGI_TRY(rgk_map_make(&p.k, &k, x->error));
  RGI_TRY(rgk_map_make(&p.v, &v, x->error));
  return x->launch(x,
                   &(rg_launch){.function = rgk_gather_fwd((rg_dtype)a->dtype, a->D, a->E),
                                .grid = {(uint32_t)(p.tiles < gpu->sms ? p.tiles : gpu->sms), 1, 1},
                                .block = {RGK_GATHER_THREADS, 1, 1},
                                .shared = (uint32_t)RGK_GATHER_BYTES(a->D, a->E),
                                .params = &p,
                                .size = sizeof p});
}

const rgi_attn_family rgi_attn_gather_fwd = {.name = "selected blocks, by queries",
                                             .modes = RGI_ATTN_SELECTED,
                                             .refuses = refuses,
                                             .workspace = workspace,
                                             .steps = steps};
