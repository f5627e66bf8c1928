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
  if (!rgk_gather_fwd((rg_dtype)a->dtype, a->D, a->E, false)) return "plain: not in this build";
#endif
  return NULL;
}

static rg_status launch(const rgk_gather *p, const rg_gpu *gpu, const void *params, size_t size,
                        bool paged, rg_cuda *x) {
  const rgk_attn *a = &p->a;
  return x->launch(
      x, &(rg_launch){.function = rgk_gather_fwd((rg_dtype)a->dtype, a->D, a->E, paged),
                      .grid = {(uint32_t)(p->tiles < gpu->sms ? p->tiles : gpu->sms), 1, 1},
                      .block = {RGK_GATHER_THREADS, 1, 1},
                      .shared = (uint32_t)RGK_GATHER_BYTES(a->D, a->E),
                      .params = params,
                      .size = size});
}

static rg_status map_queries(rgk_gather *p, rg_error *e) {
  rgk_map_of q = rgk_map_rows(p->a.q, p->a.T, p->a.H, p->a.D, 1);
  q.box[1] = RGK_GATHER_ROWS;
  return rgk_map_make(&p->q, &q, e);
}

static rg_status steps(const rgk_attn *a, const rg_gpu *gpu, void *unused, rg_cuda *x) {
  (void)unused;
  rgk_gather p = plan(a);
  const rgk_map_of k = rgk_map_rows(a->k, a->S, a->KH, a->D, RGK_GATHER_KEYS),
                   v = rgk_map_rows(a->v, a->S, a->KH, a->E, RGK_GATHER_KEYS);
  RGI_TRY(map_queries(&p, x->error));
  RGI_TRY(rgk_map_make(&p.k, &k, x->error));
  RGI_TRY(rgk_map_make(&p.v, &v, x->error));
  return launch(&p, gpu, &p, sizeof p, false, x);
}

/* ---- over pages ---- */

/* A cache as axes (width, head, row of a page, page); `page` elements from page to page. A page
 * that is none arrives as zeros. */
static rgk_map_of map_pages(rgk_tensor t, int64_t page, const rgk_pages *pages, int64_t heads,
                            int64_t width) {
  rgk_map_of m = rgk_map_rows(t, pages->rows, heads, width, RGK_GATHER_KEYS);
  m.rank = 4;
  m.dim[3] = pages->count, m.stride[3] = page, m.box[3] = 1;
  return m;
}

static const char *paged_refuses(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu) {
  const char *no = refuses(a, gpu);
  if (no) return no;
  if (a->k.dtype != a->dtype || a->v.dtype != a->dtype) return "plain: caches of another type";
  if (pages->rows % RGK_GATHER_KEYS || a->block % RGK_GATHER_KEYS)
    return "plain: page or block no multiple of 64";
  return NULL;
}

static rg_status paged_steps(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu,
                             rg_cuda *x) {
  if (rgi_decode_takes_selected(a, pages)) return rgi_decode_selected(a, pages, gpu, x);
  rgk_gather_paged p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  p.g = plan(a);
  p.g.side = a->KH * p.g.parts; /* what a step reads of the pool fits no cache anyhow */
  p.pages = *pages;
  const rgk_map_of k = map_pages(a->k, pages->k_page, pages, a->KH, a->D),
                   v = map_pages(a->v, pages->v_page, pages, a->KH, a->E);
  RGI_TRY(map_queries(&p.g, x->error));
  RGI_TRY(rgk_map_make(&p.g.k, &k, x->error));
  RGI_TRY(rgk_map_make(&p.g.v, &v, x->error));
  return launch(&p.g, gpu, &p, sizeof p, true, x);
}

const rgi_paged_family rgi_paged_gather_fwd = {"selected blocks, by queries", paged_refuses,
                                               paged_steps};

const rgi_attn_family rgi_attn_gather_fwd = {.name = "selected blocks, by queries",
                                             .modes = RGI_ATTN_SELECTED,
                                             .refuses = refuses,
                                             .steps = steps};
