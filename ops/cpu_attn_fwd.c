/* ops/cpu_attn_fwd.c: attention's forward on the CPU: an online softmax over the key tiles each row tile
 * sees. */
#include "cpu_attn.h"

typedef struct scratch {
  _Alignas(64) float q[RGI_ATTN_ROWS * RGI_ATTN_MAX_D];
  float o[RGI_ATTN_ROWS * RGI_ATTN_MAX_D];
  float s[RGI_ATTN_ROWS * RGI_ATTN_KEYS];
  float l[RGI_ATTN_ROWS * 16], m[RGI_ATTN_ROWS];
  int32_t lo[RGI_ATTN_ROWS], hi[RGI_ATTN_ROWS];
} scratch;

typedef struct job {
  const rgi_attn *a;
  const rg_arg *o, *lse;
  rgi_tile *rows;
  rgi_attn_keys *keys;
  int64_t nrow, nkey;
  float *kt; /* [KH, S, D] transposed tiles */
  float *v;  /* [KH, S, ep] */
  scratch *scratch;
} job;

static size_t layout(job *j, void *base, int threads) {
  const rgi_attn *a = j->a;
  rgi_attn_cut w = {.base = base};
  j->rows = rgi_attn_take(&w, (size_t)rgi_attn_row_tiles(a) * sizeof *j->rows);
  j->keys = rgi_attn_take(&w, (size_t)rgi_attn_key_tiles(a) * sizeof *j->keys);
  j->kt = rgi_attn_take(&w, rgi_attn_packed(a, a->D));
  j->v = rgi_attn_take(&w, rgi_attn_packed(a, a->ep));
  j->scratch = rgi_attn_take(&w, (size_t)threads * sizeof *j->scratch);
  return w.used;
}

static void pack_task(void *arg, int64_t task, int thread) {
  (void)thread;
  const job *j = arg;
  const rgi_attn_keys *t = &j->keys[task % j->nkey];
  int64_t h = task / j->nkey;
  rgi_attn_pack(j->a, t, h, j->a->k, j->kt, NULL);
  rgi_attn_pack(j->a, t, h, j->a->v, NULL, j->v);
}

/* A sink counts as a key that every row has already seen. */
static void start(const job *j, const rgi_attn_rows *r, scratch *x) {
  const rgi_attn *a = j->a;
  memset(x->o, 0, (size_t)(r->n * a->ep) * sizeof(float));
  memset(x->l, 0, (size_t)r->n * 16 * sizeof(float));
  for (int i = 0; i < r->n; i++) {
    float sink = -INFINITY;
    if (a->sinks) rgi_load(&sink, a->sinks->dtype, rgi_at(a->sinks, r->head + i % r->heads, 0), 1);
    x->m[i] = sink;
    if (sink > -INFINITY) x->l[i * 16] = 1;
  }
}

static void finish(const job *j, const rgi_attn_rows *r, scratch *x) {
  const rgi_attn *a = j->a;
  for (int i = 0; i < r->n; i++) {
    int64_t t = r->row + i / r->heads, h = r->head + i % r->heads;
    float sum = 0, *o = x->o + i * a->ep;
    for (int l = 0; l < 16; l++) sum += x->l[i * 16 + l];
    if (sum != 0) { /* otherwise o is 0 already */
      float f = 1 / sum;
      for (int64_t e = 0; e < a->E; e++) o[e] *= f;
    }
    rgi_store(rgi_at(j->o, t, h), j->o->dtype, o, a->E);
    if (j->lse) *(float *)rgi_at(j->lse, t, h) = sum != 0 ? x->m[i] + logf(sum) : -INFINITY;
  }
}

static void row_task(void *arg, int64_t task, int thread) {
  const job *j = arg;
  const rgi_attn *a = j->a;
  scratch *x = &j->scratch[thread];
  const rgi_tile *tile;
  const rgi_attn_rows r = rgi_attn_task_rows(a, j->rows, j->nrow, task, &tile);
  rgi_attn_load_rows(a, &r, a->q, x->q, a->dp);
  start(j, &r, x);

  rgi_attn_softmax p = {.s = x->s, .lo = x->lo, .hi = x->hi, .scale = a->scale, .softcap = a->softcap};
  p.m = x->m, p.l = x->l, p.o = x->o, p.ldo = a->ep;
  rgi_attn_walk w;
  rgi_attn_walk_begin(&w, a, tile, r.h);
  while (rgi_attn_walk_next(&w)) {
    const float *kt = rgi_attn_at(a, j->kt, r.h, w.key_row + w.first, a->D);
    const float *v = rgi_attn_at(a, j->v, r.h, w.key_row + w.first, a->ep);
    p.c0 = w.c0, p.c1 = w.c1;
    for (int i = 0; i < w.runs; i++) {
      for (int q = w.run[i][0]; q < w.run[i][1]; q++) {
        int32_t lo, hi;
        rgi_attn_columns(w.first, w.keys, w.lo[q], w.hi[q], &lo, &hi);
        for (int g = 0; g < r.heads; g++) x->lo[q * r.heads + g] = lo, x->hi[q * r.heads + g] = hi;
      }
      p.r0 = w.run[i][0] * r.heads, p.r1 = w.run[i][1] * r.heads;
      const int64_t rows = p.r1 - p.r0;
      float *s = x->s + p.r0 * RGI_ATTN_KEYS + w.c0;
      a->isa->gemm(&(rgi_attn_gemm){.m = rows,
                                    .n = w.c1 - w.c0,
                                    .k = a->D,
                                    .step = RGI_ATTN_STEP,
                                    .a = x->q + p.r0 * a->dp,
                                    .a_row = a->dp,
                                    .a_col = 1,
                                    .b = kt + w.c0,
                                    .ldb = w.keys,
                                    .c = s,
                                    .ldc = RGI_ATTN_KEYS});
      a->isa->softmax(&p);
      a->isa->gemm(&(rgi_attn_gemm){.m = rows,
                                    .n = a->E,
                                    .k = w.seen - w.c0,
                                    .step = RGI_ATTN_KEYS,
                                    .a = s,
                                    .a_row = RGI_ATTN_KEYS,
                                    .a_col = 1,
                                    .b = v + w.c0 * a->ep,
                                    .ldb = a->ep,
                                    .c = x->o + p.r0 * a->ep,
                                    .ldc = a->ep,
                                    .add = true});
    }
  }
  finish(j, &r, x);
}

size_t rgi_attn_workspace(const rg_call *c, const rgi_attn *a) {
  job j = {.a = a};
  return layout(&j, NULL, c->threads);
}

rg_status rgi_attn_run(const rg_call *c, const rgi_attn *a) {
  job j = {.a = a, .o = rg_out(c, 0), .lse = rg_out(c, 1)};
  layout(&j, c->workspace, c->threads);
  rgi_attn_zero_query_rows(a, j.o);
  if (j.lse) rgi_attn_zero_query_rows(a, j.lse);
  j.nrow = rgi_attn_fill_rows(a, j.rows);
  j.nkey = rgi_attn_fill_keys(a, j.keys, NULL);
  if (j.nkey > 0) c->parallel(c->pool, j.nkey * a->KH, pack_task, &j);
  if (j.nrow > 0) c->parallel(c->pool, j.nrow * a->KH * a->chunks, row_task, &j);
  return RG_OK;
}
