/* ops/cpu/attn_fwd.c: attention's forward on the CPU: an online softmax over the key tiles each
   row tile sees.

   A logit summed in f32 errs by some roundings of |q| |k| scale, however small the logit itself is.
   Where that could show in lse (large q and k, lse near 0), lse is summed again in double. What
   decides is the row's q, the longest key it sees and its lse, so the choice is a function of the
   row alone.
 */
#include "attn.h"

/* lse is to be right to LSE_ERROR * max(1, |lse|). A logit whose terms cancel has been seen to err
 * by 3 * 2^-24 of |q| |k| scale; one that a few large terms carry by more, but then it and lse are
 * as large. */
#define LSE_ERROR 1e-5f
#define ROUNDING  0x1p-22f

typedef struct scratch {
  _Alignas(64) float s[RGI_ATTN_ROWS * RGI_ATTN_KEYS];
  float l[RGI_ATTN_ROWS * 16], m[RGI_ATTN_ROWS];
  int32_t lo[RGI_ATTN_ROWS], hi[RGI_ATTN_ROWS];
  float q_error[RGI_ATTN_ROWS]; /* [rows] ROUNDING * scale * |q| */
  /* [queries] |k| of the longest key seen, at least one that is harmless */
  float longest[RGI_ATTN_ROWS];
  bool again[RGI_ATTN_ROWS]; /* [rows] lse is to be summed in double */
  double wide_m[RGI_ATTN_ROWS], wide_l[RGI_ATTN_ROWS];
  float *q, *o; /* [RGI_ATTN_ROWS, rgi_attn_room] */
} scratch;

typedef struct job {
  const rgi_attn *a;
  const rg_arg *o, *lse;
  rgi_tile *rows;
  rgi_attn_keys *keys;
  int64_t nrow, nkey;
  float *kt;     /* [KH, S, D] transposed tiles */
  float *v;      /* [KH, S, ep] */
  float *length; /* [KH, S] of the keys; only for lse */
  size_t each;   /* of keys in pages: floats of a thread's room for a tile, which the three share */
  scratch *scratch;
} job;

static size_t layout(job *j, void *base, int threads) {
  const rgi_attn *a = j->a;
  rgi_cut w = {.base = base};
  j->rows = rgi_take(&w, (size_t)rgi_attn_row_tiles(a) * sizeof *j->rows);
  if (a->paged) {
    j->each = (size_t)(a->D + a->ep + 2) * RGI_ATTN_KEYS; /* 2: length, and what kt is read past */
    j->kt = rgi_take(&w, (size_t)threads * j->each * sizeof *j->kt);
  } else {
    j->keys = rgi_take(&w, (size_t)rgi_attn_key_tiles(a) * sizeof *j->keys);
    j->kt = rgi_take(&w, rgi_attn_packed(a, a->D));
    j->v = rgi_take(&w, rgi_attn_packed(a, a->ep));
    j->length = rgi_take(&w, j->lse ? rgi_attn_packed(a, 1) : 0);
  }
  j->scratch = rgi_take(&w, (size_t)threads * sizeof *j->scratch);
  const size_t room = (size_t)(RGI_ATTN_ROWS * rgi_attn_room(a));
  float *rows = rgi_take(&w, 2 * (size_t)threads * room * sizeof *rows);
  for (int t = 0; base && t < threads; t++, rows += 2 * room)
    j->scratch[t].q = rows, j->scratch[t].o = rows + room;
  return w.used;
}

/* kt [d, n] -> length [n]; in double, where squares of f32 don't overflow. */
static void key_lengths(const float *kt, int64_t d, int n, float *length) {
  double sum[RGI_ATTN_KEYS] = {0};
  for (int64_t i = 0; i < d; i++)
    for (int k = 0; k < n; k++) sum[k] += (double)kt[i * n + k] * kt[i * n + k];
  for (int k = 0; k < n; k++) length[k] = (float)sqrt(sum[k]);
}

static void pack_task(void *arg, int64_t task, int thread) {
  (void)thread;
  const job *j = arg;
  const rgi_attn_keys *t = &j->keys[task % j->nkey];
  int64_t h = task / j->nkey;
  rgi_attn_pack(j->a, t, h, j->a->k, j->kt, NULL);
  rgi_attn_pack(j->a, t, h, j->a->v, NULL, j->v);
  if (j->lse)
    key_lengths(rgi_attn_at(j->a, j->kt, h, t->row, j->a->D), j->a->D, t->n,
                rgi_attn_at(j->a, j->length, h, t->row, 1));
}

/* A packed tile: kt [D, n], v [n, ep], length [n] or NULL. */
typedef struct packed {
  const float *kt, *v, *length;
} packed;

/* The tile that a walk is at. In pages it is packed now: kt, what is read past it, v, length. */
static packed tile_of(const job *j, const rgi_attn_walk *w, int64_t b, int thread, bool logits) {
  const rgi_attn *a = j->a;
  const int64_t row = w->key_row + w->first;
  if (!a->paged)
    return (packed){rgi_attn_at(a, j->kt, w->h, row, a->D), rgi_attn_at(a, j->v, w->h, row, a->ep),
                    j->lse ? rgi_attn_at(a, j->length, w->h, row, 1) : NULL};
  float *kt = j->kt + (size_t)thread * j->each, *v = kt + (a->D + 1) * RGI_ATTN_KEYS,
        *length = v + a->ep * RGI_ATTN_KEYS;
  const rgi_attn_keys t = {.b = (int32_t)b, .n = w->keys, .row = row, .first = w->first};
  rgi_attn_pack_tile(a, &t, w->h, a->k, kt, NULL);
  if (logits) return (packed){kt, NULL, NULL};
  rgi_attn_pack_tile(a, &t, w->h, a->v, NULL, v);
  if (j->lse) key_lengths(kt, a->D, t.n, length);
  return (packed){kt, v, j->lse ? length : NULL};
}

/* ---- lse again ---- */

/* A key that is harmless for all heads of a query is as good as none: it saves looking at the
 * others. A NaN is ignored here and below; it is in lse already. */
static void start_lengths(const job *j, const rgi_attn_rows *r, scratch *x) {
  const rgi_attn *a = j->a;
  a->isa->squares(r->n, a->D, x->q, a->dp, x->q_error);
  for (int q = 0; q < r->nq; q++) {
    float worst = 0;
    for (int i = q * r->heads; i < (q + 1) * r->heads; i++) {
      x->q_error[i] = ROUNDING * fabsf(a->scale) * sqrtf(x->q_error[i]);
      if (x->q_error[i] > worst) worst = x->q_error[i];
    }
    x->longest[q] = 0.99f * LSE_ERROR / worst;
  }
}

static float largest(const float *x, int n) {
  float lane[16] = {0}, top = 0;
  for (; n >= 16; n -= 16, x += 16)
    for (int i = 0; i < 16; i++) lane[i] = x[i] > lane[i] ? x[i] : lane[i];
  for (int i = 0; i < n; i++) lane[i] = x[i] > lane[i] ? x[i] : lane[i];
  for (int i = 0; i < 16; i++) top = lane[i] > top ? lane[i] : top;
  return top;
}

static bool in_doubt(const scratch *x, int query, int row, float lse) {
  float size = fabsf(lse);
  return size < INFINITY && x->q_error[row] * x->longest[query] > LSE_ERROR * (size > 1 ? size : 1);
}

/* One row's logits of keys [lo, hi) of a tile of n, added to its sum in double. */
static void add_logits(const rgi_attn *a, const float *q, const float *kt, int n, int lo, int hi,
                       double *m, double *l) {
  double s[RGI_ATTN_KEYS] = {0};
  for (int64_t i = 0; i < a->D; i++)
    for (int k = lo; k < hi; k++) s[k] += (double)q[i] * kt[i * n + k];
  for (int k = lo; k < hi; k++) {
    double y = s[k] * a->scale;
    if (a->softcap > 0) y = a->softcap * tanh(y / a->softcap);
    if (y > *m) {
      *l = *l * exp(*m - y) + 1;
      *m = y;
    } else if (y > -INFINITY) {
      *l += exp(y - *m);
    }
  }
}

static void lse_again(const job *j, const rgi_attn_rows *r, const rgi_tile *tile, int thread) {
  scratch *x = &j->scratch[thread];
  const rgi_attn *a = j->a;
  rgi_attn_walk w;
  rgi_attn_walk_begin(&w, a, tile, r->h);
  while (rgi_attn_walk_next(&w)) {
    const float *kt = tile_of(j, &w, tile->b, thread, true).kt;
    for (int i = 0; i < w.runs; i++)
      for (int row = w.run[i][0] * r->heads; row < w.run[i][1] * r->heads; row++) {
        const int q = row / r->heads;
        int32_t lo, hi;
        if (!x->again[row]) continue;
        rgi_attn_columns(w.first, w.keys, w.lo[q], w.hi[q], &lo, &hi);
        add_logits(a, x->q + row * a->dp, kt, w.keys, lo, hi, &x->wide_m[row], &x->wide_l[row]);
      }
  }
  for (int i = 0; i < r->n; i++)
    if (x->again[i])
      *(float *)rgi_at(j->lse, r->row + i / r->heads, r->head + i % r->heads) =
          (float)(x->wide_m[i] + log(x->wide_l[i]));
}

/* ---- rows ---- */

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
    x->wide_m[i] = sink;
    x->wide_l[i] = x->l[i * 16];
  }
  if (j->lse) start_lengths(j, r, x);
}

static void finish(const job *j, const rgi_attn_rows *r, const rgi_tile *tile, int thread) {
  scratch *x = &j->scratch[thread];
  const rgi_attn *a = j->a;
  bool again = false;
  for (int i = 0; i < r->n; i++) {
    int64_t t = r->row + i / r->heads, h = r->head + i % r->heads;
    float sum = 0, *o = x->o + i * a->ep;
    for (int l = 0; l < 16; l++) sum += x->l[i * 16 + l];
    if (sum != 0) { /* otherwise o is 0 already */
      float f = 1 / sum;
      for (int64_t e = 0; e < a->E; e++) o[e] *= f;
    }
    rgi_store(rgi_at(j->o, t, h), j->o->dtype, o, a->E);
    if (!j->lse) continue;
    float lse = sum != 0 ? x->m[i] + logf(sum) : -INFINITY;
    *(float *)rgi_at(j->lse, t, h) = lse;
    x->again[i] = in_doubt(x, i / r->heads, i, lse);
    again = again || x->again[i];
  }
  if (again) lse_again(j, r, tile, thread);
}

static void row_task(void *arg, int64_t task, int thread) {
  const job *j = arg;
  const rgi_attn *a = j->a;
  scratch *x = &j->scratch[thread];
  const rgi_tile *tile;
  const rgi_attn_rows r = rgi_attn_task_rows(a, j->rows, j->nrow, task, &tile);
  rgi_attn_load_rows(a, &r, a->q, x->q, a->dp);
  start(j, &r, x);

  rgi_attn_softmax p = {
      .s = x->s, .lo = x->lo, .hi = x->hi, .scale = a->scale, .softcap = a->softcap};
  p.m = x->m, p.l = x->l, p.o = x->o, p.ldo = a->ep;
  rgi_attn_walk w;
  rgi_attn_walk_begin(&w, a, tile, r.h);
  while (rgi_attn_walk_next(&w)) {
    const packed k = tile_of(j, &w, tile->b, thread, false);
    const float longest = k.length ? largest(k.length, w.seen) : 0;
    p.c0 = w.c0, p.c1 = w.c1;
    for (int i = 0; i < w.runs; i++) {
      for (int q = w.run[i][0]; q < w.run[i][1]; q++) {
        int32_t lo, hi;
        rgi_attn_columns(w.first, w.keys, w.lo[q], w.hi[q], &lo, &hi);
        for (int g = 0; g < r.heads; g++) x->lo[q * r.heads + g] = lo, x->hi[q * r.heads + g] = hi;
        if (!k.length || !(longest > x->longest[q])) continue;
        const float own = largest(k.length + lo, hi - lo);
        if (own > x->longest[q]) x->longest[q] = own;
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
                                    .b = k.kt + w.c0,
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
                                    .b = k.v + w.c0 * a->ep,
                                    .ldb = a->ep,
                                    .c = x->o + p.r0 * a->ep,
                                    .ldc = a->ep,
                                    .add = true});
    }
  }
  finish(j, &r, tile, thread);
}

size_t rgi_cpu_attn_fwd_workspace(const rg_call *c, const rgi_attn *a) {
  job j = {.a = a, .lse = rg_out(c, 1)};
  return layout(&j, NULL, c->threads);
}

rg_status rgi_cpu_attn_fwd(const rg_call *c, const rgi_attn *a) {
  job j = {.a = a, .o = rg_out(c, 0), .lse = rg_out(c, 1)};
  layout(&j, c->workspace, c->threads);
  rgi_attn_zero_query_rows(a, j.o);
  if (j.lse) rgi_attn_zero_query_rows(a, j.lse);
  j.nrow = rgi_attn_fill_rows(a, j.rows);
  if (!a->paged) j.nkey = rgi_attn_fill_keys(a, j.keys, NULL);
  if (j.nkey > 0) c->parallel(c->pool, j.nkey * a->KH, pack_task, &j);
  if (j.nrow > 0) c->parallel(c->pool, j.nrow * a->KH * a->chunks, row_task, &j);
  return RG_OK;
}
