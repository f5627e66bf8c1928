/* ops/cuda/select.c: attention over selected blocks on Hopper, driven by the keys
 * (kernels/attn/select.h): which shapes it takes, windows, workspace and launches. */
#include "../../kernels/attn/select.h"
#include "attn.h"
#include "csr.h"
#include "hopper.h"

/* Bytes of the partial store: forward's of a launch, at least one chunk of rows, one head;
 * backward's at most, at least twice 64 rows. */
static const int64_t PARTIALS = INT64_C(288) << 20, BWD_PARTIALS = INT64_C(512) << 20;
enum {
  FWD_ROWS = 1024, /* rows (query, head) of an item */
  BWD_ROWS = 2048,
  BWD_SEGMENTS = 64, /* of a launch at most */
  MAX_BLOCK = 1024,
  MAX_N = 4096
};

typedef struct select_plan {
  rgk_select p;
  int64_t window; /* forward: rows */
} select_plan;

static const char *refuses(const rgk_attn *a, const rg_gpu *gpu, bool backward) {
  if (a->mode != RGK_SLC) return "not selected blocks";
  const char *no = rgi_hopper_refuses(gpu, a->dtype, a->aligned || !backward);
  if (no) return no;
  if (!((a->D == a->E && (a->D == 64 || a->D == 96 || a->D == 128 || a->D == 256)) ||
        (a->D == 192 && a->E == 128)))
    return "plain: head width";
  if (a->block % 16 || a->block > MAX_BLOCK)
    return "plain: block is not a multiple of 16 up to 1024";
  if (a->N < 1 || a->N > MAX_N) return "plain: entries in a row of idx";
  if (a->softcap != 0) return "plain: softcap";
  if (a->T * a->N > UINT32_MAX) return "plain: more than 2^32 entries of idx";
  if (backward && !a->d_o.data) return "plain: no gradient of o";
#ifdef REGRAPH_CUDA
  if (!rgk_select_fwd((rg_dtype)a->dtype, a->D, a->E)) return "plain: not in this build";
#endif
  return NULL;
}

static int64_t least(int64_t x, int64_t y) {
  return x < y ? x : y;
}

/* Windows of rows whose partials of `bytes` each fit, in whole chunks. */
static void plan_windows(select_plan *s, const rgk_attn *a, int64_t bytes, rgi_cut *w) {
  rgk_select *p = &s->p;
  const int64_t store = (int64_t)a->G * a->N * p->parts * (bytes + (int64_t)sizeof(float));
  int64_t chunks = PARTIALS / store / p->csr.chunk;
  if (chunks < 1) chunks = 1;
  const int64_t count = (p->csr.chunks + chunks - 1) / chunks; /* of windows, then made alike */
  if (count > 0) chunks = (p->csr.chunks + count - 1) / count;
  s->window = least(chunks * p->csr.chunk, a->T);
  p->length = FWD_ROWS / a->G > 0 ? FWD_ROWS / a->G : 1;
  p->heads = 1;
  if (s->window == a->T && a->T > 0) p->heads = (int32_t)least(a->KH, PARTIALS / (store * a->T));
  if (p->heads < 1) p->heads = 1;
  p->cap = s->window * a->N / p->length + p->csr.slots;
  p->part = rgi_take(w, (size_t)(p->heads * s->window * a->G * a->N * p->parts * bytes));
  p->part_lse =
      rgi_take(w, (size_t)(p->heads * s->window * a->G * a->N * p->parts) * sizeof(float));
  p->item = rgi_take(w, (size_t)(p->heads * p->cap) * sizeof *p->item);
  p->items = rgi_take(w, (size_t)p->heads * sizeof *p->items);
}

static select_plan plan(const rgk_attn *a, int32_t rows, rgi_cut *w) {
  select_plan s = {.p = {.a = *a,
                         .parts = (a->block + RGK_SELECT_KEYS - 1) / RGK_SELECT_KEYS,
                         .along = rows / a->G,
                         .across = rows % a->G}};
  s.p.csr = rgi_csr_plan(a, w);
  s.p.csr.places =
      rgi_take(w, (size_t)a->KH * (size_t)a->T * (size_t)a->N * sizeof *s.p.csr.places);
  return s;
}

static rg_status launch(const rgk_select *p, rg_cuda *x, const void *function, int64_t gx,
                        int64_t gy, int64_t gz, uint32_t threads, uint32_t shared) {
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)gx, (uint32_t)gy, (uint32_t)gz},
                                   .block = {threads, 1, 1},
                                   .shared = shared,
                                   .params = p,
                                   .size = sizeof *p});
}

/* `main` over all windows and heads, each followed by `reduce` with so many threads a row. */
static rg_status windows(select_plan *s, rg_cuda *x, const void *main, uint32_t shared,
                         const void *reduce, int64_t pieces) {
  rgk_select *p = &s->p;
  const rgk_attn *a = &p->a;
  for (p->head = 0; p->head < a->KH; p->head += p->heads) {
    const int64_t heads = least(p->heads, a->KH - p->head);
    for (p->row = 0; p->row < a->T; p->row += s->window) {
      p->rows = least(s->window, a->T - p->row);
      p->chunk = p->row / p->csr.chunk;
      p->chunk_end = (p->row + p->rows + p->csr.chunk - 1) / p->csr.chunk;
      RGI_TRY(launch(p, x, rgk_select_items(), heads, 1, 1, RGK_SELECT_SCAN, 0));
      RGI_TRY(launch(p, x, main, p->cap, p->parts, heads, RGK_SELECT_THREADS, shared));
      RGI_TRY(launch(p, x, reduce, rgk_blocks(p->rows * a->G * pieces, RGK_SELECT_REDUCE), heads, 1,
                     RGK_SELECT_REDUCE, 0));
    }
  }
  return RG_OK;
}

/* ---- forward ---- */

static const char *fwd_refuses(const rgk_attn *a, const rg_gpu *gpu) {
  return refuses(a, gpu, false);
}
static select_plan fwd_plan(const rgk_attn *a, rgi_cut *w) {
  select_plan s = plan(a, 64, w);
  plan_windows(&s, a, (int64_t)a->E * 2, w);
  return s;
}
static size_t fwd_workspace(const rgk_attn *a, const rg_gpu *gpu) {
  (void)gpu;
  rgi_cut w = {0};
  fwd_plan(a, &w);
  return w.used;
}
static rg_status fwd_steps(const rgk_attn *a, const rg_gpu *gpu, void *workspace, rg_cuda *x) {
  (void)gpu;
  rgi_cut w = {.base = workspace};
  const rg_dtype t = (rg_dtype)a->dtype;
  select_plan s = fwd_plan(a, &w);
  if (a->T == 0) return RG_OK;
  RGI_TRY(rgi_csr_steps(&s.p.csr, x));
  return windows(&s, x, rgk_select_fwd(t, a->D, a->E), rgk_select_shared_fwd(a->D, a->E),
                 rgk_select_reduce(t), a->E / 8);
}
const rgi_attn_family rgi_attn_select_fwd = {.name = "selected blocks, by keys",
                                             .modes = RGI_ATTN_SELECTED,
                                             .refuses = fwd_refuses,
                                             .workspace = fwd_workspace,
                                             .steps = fwd_steps};

/* ---- backward ---- */

static const char *bwd_refuses(const rgk_attn *a, const rg_gpu *gpu) {
  return refuses(a, gpu, true);
}

static int64_t most(int64_t x, int64_t y) {
  return x > y ? x : y;
}

/* What decides about the bits of d.k and d.v (`longest`, `length`, `least`) looks at the shape of
 * one group alone. */
static rgk_select bwd_plan(const rgk_attn *a, rgi_cut *w) {
  rgk_select p = plan(a, rgk_select_bwd_rows(a->D, a->E), w).p;
  const int64_t slots = p.csr.slots, keys = p.parts * RGK_SELECT_KEYS,
                place = (int64_t)a->G * a->N * p.parts * a->D * (a->dtype == RG_F16 ? 4 : 2),
                quarter = ((a->T + 3) / 4 + 63) / 64 * 64;
  p.longest = most(BWD_PARTIALS / place / 128 * 64, 64);
  p.length = (int32_t)most(BWD_ROWS / a->G, 1);
  /* enough of them at small groups too */
  p.least = (int32_t)most((a->G < 8 ? BWD_ROWS / 2 : BWD_ROWS) / a->G, 1);
  p.rows = most(least(quarter, p.longest), 64);
  p.store = most(2 * p.rows, least(2 * p.longest, a->T));
  /* two neighbours hold more than p.rows rows */
  p.bounds = (int32_t)(2 * (a->T / (p.rows + 1)) + 1);
  p.windows = (int32_t)least(p.bounds, BWD_SEGMENTS);
  p.heads = (int32_t)most(least(a->KH, BWD_SEGMENTS / p.bounds), 1);
  /* Whole items, and a last one of each list and step; a sequence of several steps in a window has
   * at most four. */
  p.cap = p.rows * a->N / p.least + slots +
          4 * (p.rows / a->block + p.rows / 64 + least(a->seqs.n, p.rows) + 1);
  p.stat = rgi_take(w, (size_t)a->T * (size_t)a->H * 2 * sizeof(float));
  p.bound = rgi_take(w, (size_t)(p.bounds + 1) * sizeof *p.bound);
  p.begun = rgi_take(w, sizeof *p.begun);
  p.done = rgi_take(w, (size_t)(p.heads * p.windows) * sizeof *p.done);
  p.merged = rgi_take(w, (size_t)(p.heads * p.windows + 1) * sizeof *p.merged);
  p.turn = rgi_take(w, (size_t)(slots * p.parts) * sizeof *p.turn);
  p.item = rgi_take(w, (size_t)(p.heads * p.windows * p.cap) * sizeof *p.item);
  p.items = rgi_take(w, (size_t)(p.heads * p.windows) * sizeof *p.items);
  if (a->dq.data) p.part = rgi_take(w, (size_t)(p.store * place));
  if (a->dk.data || a->dv.data) {
    p.sum_k = rgi_take(w, (size_t)(slots * keys * a->D) * sizeof *p.sum_k);
    p.sum_v = rgi_take(w, (size_t)(slots * keys * a->E) * sizeof *p.sum_v);
  }
  return p;
}
static size_t bwd_workspace(const rgk_attn *a, const rg_gpu *gpu) {
  (void)gpu;
  rgi_cut w = {0};
  bwd_plan(a, &w);
  return w.used;
}
static rg_status bwd_steps(const rgk_attn *a, const rg_gpu *gpu, void *workspace, rg_cuda *x) {
  rgi_cut w = {.base = workspace};
  const rg_dtype t = (rg_dtype)a->dtype;
  const rgk_select all = bwd_plan(a, &w);
  rgk_select plan = all, *p = &plan;
  RGI_TRY(rgi_csr_steps(&p->csr, x));
  const int64_t threads = a->T * a->H * (a->delta.data ? 1 : RGK_SELECT_LANES);
  RGI_TRY(launch(p, x, a->delta.data ? rgk_select_stat_given() : rgk_select_stat(t),
                 1 + rgk_blocks(threads, RGK_SELECT_REDUCE), 1, 1, RGK_SELECT_REDUCE, 0));
  if (a->d_sinks.data) RGI_TRY(launch(p, x, rgk_select_sinks(), a->H, 1, 1, RGK_SELECT_SCAN, 0));
  if (!a->dq.data && !a->dk.data && !a->dv.data) return RG_OK;
  for (p->head = 0; p->head < a->KH; p->head += all.heads) {
    p->heads = (int32_t)least(all.heads, a->KH - p->head);
    for (p->window = 0; p->window < p->bounds; p->window += all.windows) {
      p->windows = (int32_t)least(all.windows, p->bounds - p->window);
      RGI_TRY(launch(p, x, rgk_select_bwd_items(), p->windows, p->heads, 1, RGK_SELECT_SCAN, 0));
      RGI_TRY(launch(p, x, rgk_select_bwd(t, a->D, a->E),
                     rgk_select_bwd_blocks(a->D, a->E) * gpu->sms, 1, 1,
                     rgk_select_bwd_threads(a->D, a->E), rgk_select_shared_bwd(a->D, a->E)));
    }
  }
  return RG_OK;
}
const rgi_attn_family rgi_attn_select_bwd = {.name = "selected blocks, by keys",
                                             .modes = RGI_ATTN_SELECTED,
                                             .refuses = bwd_refuses,
                                             .workspace = bwd_workspace,
                                             .steps = bwd_steps,
                                             .delta = RGI_DELTA_LANES};
