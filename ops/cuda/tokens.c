/* ops/cuda/tokens.c: attention over tokens chosen one by one, with wide latent heads, on Hopper
 * (kernels/attn/tokens.h): which shapes it takes, and the launches. */
#include "../../kernels/attn/plain.h"
#include "../../kernels/attn/tokens.h"
#include "attn.h"
#include "csr.h"
#include "hopper.h"
#include <math.h>

/* Smaller groups leave most of a tile's 64 rows empty. */
enum { LEAST_GROUP = 16 };

static rgk_tokens plan(const rgk_attn *a) {
  rgk_tokens p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  p.a = *a;
  p.parts = (int32_t)rgk_blocks(a->G, RGK_TOKENS_ROWS);
  p.rows = a->T;
  p.jobs = (int32_t)(a->T * a->KH * p.parts);
  p.same = a->v.data == a->k.data && a->v.row == a->k.row && a->v.head == a->k.head;
  return p;
}

static const char *refuses(const rgk_attn *a, const rg_gpu *gpu) {
  const char *no = rgi_hopper_refuses(gpu, a->dtype, a->aligned);
  if (no) return no;
  if (a->D != 576 || a->E != 512) return "plain: head width";
  if (!(a->scale > 0)) return "plain: scale not positive";
  if (a->T == 0 || a->S == 0) return "plain: nothing to do";
  if (a->S > INT32_MAX || a->T * a->H > INT32_MAX / 2) return "plain: too many rows";
  if (a->G < LEAST_GROUP) return "plain: fewer than 16 query heads to a KV head";
#ifdef REGRAPH_CUDA
  if (!rgk_tokens_fwd((rg_dtype)a->dtype, a->D, a->E)) return "plain: not in this build";
#endif
  return NULL;
}

/* ---- forward ---- */

static rg_status steps(const rgk_attn *a, const rg_gpu *gpu, void *unused, rg_cuda *x) {
  (void)unused;
  const rgk_tokens p = plan(a);
  return x->launch(x,
                   &(rg_launch){.function = rgk_tokens_fwd((rg_dtype)a->dtype, a->D, a->E),
                                .grid = {(uint32_t)(p.jobs < gpu->sms ? p.jobs : gpu->sms), 1, 1},
                                .block = {RGK_TOKENS_THREADS, 1, 1},
                                .shared = (uint32_t)RGK_TOKENS_BYTES(a->D),
                                .params = &p,
                                .size = sizeof p});
}

const rgi_attn_family rgi_attn_tokens_fwd = {.name = "selected tokens, by queries",
                                             .modes = RGI_ATTN_SELECTED,
                                             .tokens = true,
                                             .refuses = refuses,
                                             .steps = steps};

/* ---- backward ---- */

/* Bytes of a window's shares of d.k and d.v, at most, if one row needs no more. */
static const int64_t SHARES = INT64_C(1200) << 20;

typedef struct bwd_plan {
  rgk_tokens_bwd p;
  rgk_csr csr;
  rgk_attn_plain plain; /* what its delta takes */
  int64_t window;       /* rows of q */
} bwd_plan;

static const char *bwd_refuses(const rgk_attn *a, const rg_gpu *gpu) {
  const char *no = refuses(a, gpu);
  if (no) return no;
  if (a->softcap != 0) return "plain: softcap";
  if (a->d_sinks.data) return "plain: gradient of sinks";
  if (!a->d_o.data) return "plain: no gradient of o";
  if (a->N < 1 || a->N > UINT16_MAX) return "plain: entries in a row of idx";
  if (a->G > RGK_TOKENS_PARTS * RGK_TOKENS_ROWS) return "plain: query heads to a KV head";
  return NULL;
}

static const char *joined_refuses(const rgk_attn *a, const rg_gpu *gpu) {
  return a->dk.data ? bwd_refuses(a, gpu) : "plain: no gradient of k";
}

/* Weights are rounded to the operands' type as they are; joined, scale · dS^T Q + P^T dO is one
 * product, and its scale is shared out between dS and P so that neither leaves fp16's range. */
static void share_scale(rgk_tokens_bwd *p, float scale, bool joined) {
  const float of_p = joined ? ldexpf(1, (int)lrintf(-log2f(scale) / 2)) : 1;
  p->joined = joined;
  p->of_p = of_p;
  p->of_ds = joined ? scale * of_p : 1;
  p->of_dq = joined ? 1 / of_p : scale;
}

static int64_t share_row(const rgk_tokens_bwd *p) { /* bytes of a row's */
  const rgk_attn *a = &p->call.a;
  return a->KH * p->call.parts * a->N * (p->joined ? a->D : a->D + a->E) * 2;
}
/* As many whole rounds of jobs as `most` rows of q hold, if they hold one. */
static int64_t whole_rounds(const rgk_tokens_bwd *p, const rg_gpu *gpu, int64_t most) {
  const int64_t across = p->call.a.KH * p->call.parts,
                whole = most * across / gpu->sms * gpu->sms / across;
  return whole > 0 ? whole : most;
}

/* No bit depends on windows; four at least, so that short calls take them too. */
static bwd_plan plan_backward(const rgk_attn *a, const rg_gpu *gpu, bool joined, rgi_cut *w) {
  bwd_plan s;
  memset(&s, 0, sizeof s); /* holes too: launches are compared byte by byte */
  rgk_tokens_bwd *p = &s.p;
  p->call = plan(a);
  share_scale(p, a->scale, joined);
  p->delta = s.plain.delta = rgi_take(w, (size_t)(a->T * a->H) * sizeof(float));
  s.plain.a = *a;
  s.window = a->T;
  if (!a->dk.data && !a->dv.data) return s;
  const int64_t row = share_row(p), most = SHARES / row > 0 ? SHARES / row : 1,
                width = joined ? a->D : a->D + a->E;
  s.window = (a->T + 3) / 4;
  if (s.window > most) s.window = whole_rounds(p, gpu, most);
  s.csr = rgi_csr_plan(a, w);
  s.csr.places = rgi_take(w, (size_t)(a->KH * a->T * a->N) * sizeof *s.csr.places);
  p->part = rgi_take(w, (size_t)(s.window * row));
  p->sum = rgi_take(w, (size_t)(a->KH * a->S * width) * sizeof *p->sum);
  p->cursor = rgi_take(w, (size_t)(a->KH * a->S) * sizeof *p->cursor);
  p->start = s.csr.start, p->list = s.csr.rows, p->places = s.csr.places;
  p->slots = s.csr.slots;
  return s;
}

/* The window from `row` on. Rows of d.q behind it are still to be written, and until then hold
 * shares too: the longer windows are, the fewer times sums are read and written. */
static void set_window(bwd_plan *s, const rg_gpu *gpu, int64_t row) {
  rgk_tokens_bwd *p = &s->p;
  const rgk_attn *a = &p->call.a;
  const int64_t left = a->T - row, query = a->H * a->D * (a->dq.dtype == RG_F32 ? 4 : 2);
  p->call.row = row;
  p->call.rows = p->split = left < s->window ? left : s->window;
  p->more = NULL;
  if (left > s->window && p->part && a->dq.data && !a->acc_q && a->dq.head == a->D &&
      a->dq.row == a->H * a->D) {
    const int64_t share = share_row(p), most = (s->window * share + left * query) / (share + query),
                  whole = whole_rounds(p, gpu, most);
    p->call.rows = whole >= s->window ? whole : most;
    if (p->call.rows > p->split) p->more = (char *)a->dq.data + (row + p->call.rows) * query;
  }
  p->call.jobs = (int32_t)(p->call.rows * a->KH * p->call.parts);
}

static rg_status launch(const rgk_attn *a, const rg_gpu *gpu, bool joined, void *workspace_,
                        rg_cuda *x) {
  rgi_cut w = {.base = workspace_};
  bwd_plan s = plan_backward(a, gpu, joined, &w);
  rgk_tokens_bwd *p = &s.p;
  RGI_TRY(x->launch(x, &(rg_launch){.function = rgk_plain_delta(),
                                    .grid = {rgk_blocks(a->T * a->H, RGK_PLAIN_DELTA_ROWS), 1, 1},
                                    .block = {RGK_PLAIN_THREADS, 1, 1},
                                    .params = &s.plain,
                                    .size = sizeof s.plain}));
  const bool keys = a->dk.data || a->dv.data;
  if (keys) RGI_TRY(rgi_csr_steps(&s.csr, x));
  for (int64_t row = 0; row < a->T; row += p->call.rows) {
    set_window(&s, gpu, row);
    const int32_t jobs = p->call.jobs;
    RGI_TRY(x->launch(x, &(rg_launch){.function = rgk_tokens_bwd_main((rg_dtype)a->dtype),
                                      .grid = {(uint32_t)(jobs < gpu->sms ? jobs : gpu->sms), 1, 1},
                                      .block = {RGK_TOKENS_THREADS, 1, 1},
                                      .shared = (uint32_t)RGK_TOKENS_BWD_BYTES(a->D),
                                      .params = p,
                                      .size = sizeof *p}));
    if (!keys) continue;
    RGI_TRY(x->launch(x, &(rg_launch){.function = rgk_tokens_bwd_sums((rg_dtype)a->dtype, joined),
                                      .grid = {(uint32_t)a->S, (uint32_t)a->KH, 1},
                                      .block = {(uint32_t)rgk_tokens_sum_threads(joined), 1, 1},
                                      .params = p,
                                      .size = sizeof *p}));
  }
  return RG_OK;
}

static size_t bwd_workspace(const rgk_attn *a, const rg_gpu *gpu) {
  rgi_cut w = {0};
  plan_backward(a, gpu, false, &w);
  return w.used;
}
static rg_status bwd_steps(const rgk_attn *a, const rg_gpu *gpu, void *workspace_, rg_cuda *x) {
  return launch(a, gpu, false, workspace_, x);
}
static size_t joined_workspace(const rgk_attn *a, const rg_gpu *gpu) {
  rgi_cut w = {0};
  plan_backward(a, gpu, true, &w);
  return w.used;
}
static rg_status joined_steps(const rgk_attn *a, const rg_gpu *gpu, void *workspace_, rg_cuda *x) {
  return launch(a, gpu, true, workspace_, x);
}

const rgi_attn_family rgi_attn_tokens_bwd = {.name = "selected tokens, by queries",
                                             .modes = RGI_ATTN_SELECTED,
                                             .tokens = true,
                                             .refuses = bwd_refuses,
                                             .workspace = bwd_workspace,
                                             .steps = bwd_steps,
                                             .delta = RGI_DELTA_CHAIN};
const rgi_attn_family rgi_attn_tokens_joined = {.name = "selected tokens, by queries",
                                                .modes = RGI_ATTN_SELECTED,
                                                .tokens = true,
                                                .refuses = joined_refuses,
                                                .workspace = joined_workspace,
                                                .steps = joined_steps,
                                                .delta = RGI_DELTA_CHAIN};
