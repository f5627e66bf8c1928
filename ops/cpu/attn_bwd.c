/* ops/cpu/attn_bwd.c: attention's backward on the CPU.
 *
 *   P = exp(S - lse)    dS = P * (dP - delta)    delta_r = sum over e of o * d_o, minus d_lse
 *
 *   dQ = scale * dS K     one task per row tile, walking the key tiles it sees, as forward does
 *   dK = scale * dS^T Q   one task per key tile, walking the queries that see it, in order; for slc
 *   dV = P^T dO           those are listed per block first, by a counting sort; joined: dK is the
 *                         sum of both
 *   d_sink_h = - sum over rows of exp(sink - lse) * delta
 *
 * S and dP are formed twice, once per direction of the sum: that costs two products of seven, and
 * every sum keeps one fixed order without a buffer per thread.
 */
#include "attn.h"

typedef struct scratch {
  _Alignas(64) float s[RGI_ATTN_ROWS * RGI_ATTN_KEYS], dp[RGI_ATTN_ROWS * RGI_ATTN_KEYS];
  float lse[RGI_ATTN_ROWS], delta[RGI_ATTN_ROWS];
  int32_t lo[RGI_ATTN_ROWS], hi[RGI_ATTN_ROWS];
  /* [RGI_ATTN_ROWS, rgi_attn_room]; dqk: sum for dQ or dK. dv [RGI_ATTN_KEYS, …] */
  float *q, *d_o, *dqk, *dv;
} scratch;

typedef struct job {
  const rgi_attn *a;
  bool need_ds;
  rgi_tile *rows;
  rgi_attn_keys *keys;
  int64_t nrow, nkey;
  float *kt, *vt;       /* [KH, S, D], [KH, S, E] transposed tiles */
  float *k;             /* [KH, S, dp]; only for dQ */
  float *delta;         /* [T, H] */
  int64_t *first_block; /* slc [B] */
  /* slc [KH, blocks]: end of each block's list; it starts where the one before ends */
  int64_t *list_end;
  int32_t *list; /* slc [KH, T * N]: rows in the pack of the queries that chose a block */
  int64_t blocks;
  scratch *scratch;
} job;

static size_t layout(job *j, void *base, int threads) {
  const rgi_attn *a = j->a;
  const bool lists = a->idx && (j->a->dk || j->a->dv);
  rgi_cut w = {.base = base};
  j->blocks = lists ? rgi_attn_key_blocks(a) : 0;
  j->rows = rgi_take(&w, (size_t)rgi_attn_row_tiles(a) * sizeof *j->rows);
  j->keys = rgi_take(&w, (size_t)rgi_attn_key_tiles(a) * sizeof *j->keys);
  j->kt = rgi_take(&w, rgi_attn_packed(a, a->D));
  j->vt = rgi_take(&w, j->need_ds ? rgi_attn_packed(a, a->E) : 0);
  j->k = rgi_take(&w, j->a->dq ? rgi_attn_packed(a, a->dp) : 0);
  j->delta = rgi_take(&w, (size_t)a->T * (size_t)a->H * sizeof(float));
  j->first_block = rgi_take(&w, lists ? (size_t)a->B * sizeof *j->first_block : 0);
  j->list_end = rgi_take(&w, (size_t)(a->KH * j->blocks) * sizeof *j->list_end);
  j->list = rgi_take(&w, lists ? (size_t)a->KH * (size_t)a->T * (size_t)a->N * sizeof *j->list : 0);
  j->scratch = rgi_take(&w, (size_t)threads * sizeof *j->scratch);
  _Static_assert((int)RGI_ATTN_KEYS == RGI_ATTN_ROWS, "dv has as much room as the others");
  const size_t room = (size_t)(RGI_ATTN_ROWS * rgi_attn_room(a));
  float *rows = rgi_take(&w, 4 * (size_t)threads * room * sizeof *rows);
  for (int t = 0; base && t < threads; t++, rows += 4 * room) {
    scratch *x = &j->scratch[t];
    x->q = rows, x->d_o = rows + room, x->dqk = rows + 2 * room, x->dv = rows + 3 * room;
  }
  return w.used;
}

/* ---- preparation: packing, delta, lists ---- */

static void pack(const job *j, int64_t task) {
  const rgi_attn_keys *t = &j->keys[task % j->nkey];
  int64_t h = task / j->nkey;
  rgi_attn_pack(j->a, t, h, j->a->k, j->kt, j->a->dq ? j->k : NULL);
  if (j->need_ds) rgi_attn_pack(j->a, t, h, j->a->v, j->vt, NULL);
}

/* Summed in the order of dP's products, so that where a row sees one key (and o is its v) dP -
 * delta is 0. */
static void fill_delta(const job *j, const rgi_tile *t, scratch *x) {
  const rgi_attn *a = j->a;
  const rgi_attn_rows all = {.row = t->row, .nq = 1, .heads = 1, .n = 1};
  for (int64_t i = 0; i < t->n; i++)
    for (int64_t h = 0; h < a->H; h += RGI_ATTN_ROWS) {
      rgi_attn_rows r = all;
      float *delta = j->delta + (t->row + i) * a->H + h;
      r.row += i;
      r.head = h;
      r.n = r.heads = (int)(a->H - h < RGI_ATTN_ROWS ? a->H - h : RGI_ATTN_ROWS);
      if (j->a->delta) {
        for (int g = 0; g < r.n; g++) delta[g] = *(const float *)rgi_at(j->a->delta, r.row, h + g);
      } else if (j->a->d_o) {
        rgi_attn_load_rows(a, &r, j->a->o, x->q, a->ep);
        rgi_attn_load_rows(a, &r, j->a->d_o, x->d_o, a->ep);
        a->isa->dots(r.n, a->E, x->q, x->d_o, a->ep, delta);
      } else {
        memset(delta, 0, (size_t)r.n * sizeof *delta);
      }
      for (int g = 0; j->a->d_lse && g < r.n; g++)
        delta[g] -= *(const float *)rgi_at(j->a->d_lse, r.row, h + g);
    }
}

/* The queries of one KV head that chose each block, in order: count, sum up, fill. Filling moves
 * each block's start to its end. */
static void fill_lists(const job *j, int64_t h) {
  const rgi_attn *a = j->a;
  int64_t *count = j->list_end + h * j->blocks, sum = 0;
  int32_t *list = j->list + h * a->T * a->N;
  memset(count, 0, (size_t)j->blocks * sizeof *count);
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t b = 0; b < a->B; b++) {
      int64_t from = rgi_attn_start(a->cu, b), to = rgi_attn_start(a->cu, b + 1), key, n;
      int64_t pos = rgi_attn_offset(a, b);
      if (from == to) continue;
      rgi_attn_key_rows(a, b, &key, &n);
      for (int64_t i = from; i < to; i++, pos++) {
        const int32_t *idx = rgi_attn_idx(a, i, h);
        int64_t lo, hi, block = -1;
        int32_t at = 0;
        rgi_attn_visible(a, pos, n, &lo, &hi);
        while ((block = rgi_attn_next_block(a, idx, &at, block, hi)) < INT64_MAX) {
          int64_t *c = &count[j->first_block[b] + block];
          if (pass == 1) list[*c] = (int32_t)i;
          ++*c;
        }
      }
    }
    for (int64_t i = 0; pass == 0 && i < j->blocks; i++) {
      int64_t n = count[i];
      count[i] = sum;
      sum += n;
    }
  }
}

static void prepare_task(void *arg, int64_t task, int thread) {
  const job *j = arg;
  const int64_t npack = j->nkey * j->a->KH;
  if (j->blocks > 0) {
    if (task < j->a->KH) {
      fill_lists(j, task);
      return;
    }
    task -= j->a->KH;
  }
  if (task < npack) {
    pack(j, task);
  } else {
    fill_delta(j, &j->rows[task - npack], &j->scratch[thread]);
  }
}

/* ---- shared by both directions ---- */

/* lse, delta and d_o of rows. */
static void load_gradients(const job *j, const rgi_attn_rows *r, scratch *x, int at) {
  const rgi_attn *a = j->a;
  for (int i = 0; i < r->n; i++) {
    int64_t t = r->row + i / r->heads, h = r->head + i % r->heads;
    x->lse[at + i] = *(const float *)rgi_at(j->a->lse, t, h);
    x->delta[at + i] = j->delta[t * a->H + h];
  }
  if (j->a->d_o) rgi_attn_load_rows(a, r, j->a->d_o, x->d_o + at * a->ep, a->ep);
}

/* Rows that saw nothing have no finite lse to subtract. */
static void set_columns(const scratch *x, int32_t *lo, int32_t *hi, int row, int n, int32_t from,
                        int32_t to) {
  for (int i = row; i < row + n; i++) {
    lo[i] = from;
    hi[i] = x->lse[i] == -INFINITY ? 0 : to;
  }
}

/* P and dS of rows [r0, r1), columns [c0, c1) of a key tile of n keys. */
static void probabilities(const job *j, scratch *x, int r0, int r1, int c0, int c1, const float *kt,
                          const float *vt, int n, bool want_ds) {
  const rgi_attn *a = j->a;
  const int64_t at = r0 * RGI_ATTN_KEYS + c0;
  rgi_attn_gemm g = {.m = r1 - r0, .n = c1 - c0, .a_col = 1, .ldb = n, .ldc = RGI_ATTN_KEYS};
  g.k = a->D, g.step = RGI_ATTN_STEP, g.a = x->q + r0 * a->dp, g.a_row = a->dp, g.b = kt + c0,
  g.c = x->s + at;
  a->isa->gemm(&g);
  if (want_ds) {
    g.k = g.step = a->E, g.a = x->d_o + r0 * a->ep, g.a_row = a->ep, g.b = vt + c0,
    g.c = x->dp + at;
    a->isa->gemm(&g);
  }
  rgi_attn_dsoftmax p = {
      .s = x->s, .lo = x->lo, .hi = x->hi, .scale = a->scale, .softcap = a->softcap};
  p.dp = want_ds ? x->dp : NULL;
  p.r0 = r0, p.r1 = r1, p.c0 = c0, p.c1 = c1;
  p.lse = x->lse, p.delta = x->delta;
  a->isa->dsoftmax(&p);
}

/* sum: fp32 that x is added to first, or NULL. */
static void store(const rg_arg *d, const rg_arg *sum, bool add, int64_t row, int64_t h, float *x,
                  float scale) {
  const int64_t n = d->dim[2];
  void *to = rgi_at(d, row, h);
  for (int64_t i = 0; i < n; i++) x[i] *= scale;
  if (sum) rgi_store_add(x, rgi_at(sum, row, h), n);
  if (add) {
    rgi_store_add(to, x, n);
  } else {
    rgi_store(to, d->dtype, x, n);
  }
}

/* The columns of Q and d_o that pad a row to 16 meet real zeros only if they are zero
 * themselves. */
static void clear_buffers(const job *j, scratch *x) {
  const rgi_attn *a = j->a;
  if (a->D < a->dp) memset(x->q, 0, (size_t)(RGI_ATTN_ROWS * a->dp) * sizeof(float));
  if (a->E < a->ep || !j->a->d_o)
    memset(x->d_o, 0, (size_t)(RGI_ATTN_ROWS * a->ep) * sizeof(float));
}

/* ---- dQ ---- */

static void row_task(const job *j, int64_t task, scratch *x) {
  const rgi_attn *a = j->a;
  const rgi_tile *tile;
  const rgi_attn_rows r = rgi_attn_task_rows(a, j->rows, j->nrow, task, &tile);
  clear_buffers(j, x);
  rgi_attn_load_rows(a, &r, a->q, x->q, a->dp);
  load_gradients(j, &r, x, 0);
  memset(x->dqk, 0, (size_t)(r.n * a->dp) * sizeof(float));

  rgi_attn_walk w;
  rgi_attn_walk_begin(&w, a, tile, r.h);
  while (rgi_attn_walk_next(&w)) {
    const int64_t key = w.key_row + w.first;
    const float *kt = rgi_attn_at(a, j->kt, r.h, key, a->D),
                *vt = rgi_attn_at(a, j->vt, r.h, key, a->E);
    const float *k = rgi_attn_at(a, j->k, r.h, key, a->dp);
    for (int i = 0; i < w.runs; i++) {
      for (int q = w.run[i][0]; q < w.run[i][1]; q++) {
        int32_t lo, hi;
        rgi_attn_columns(w.first, w.keys, w.lo[q], w.hi[q], &lo, &hi);
        set_columns(x, x->lo, x->hi, q * r.heads, r.heads, lo, hi);
      }
      const int r0 = w.run[i][0] * r.heads, r1 = w.run[i][1] * r.heads;
      probabilities(j, x, r0, r1, w.c0, w.c1, kt, vt, w.keys, true);
      a->isa->gemm(&(rgi_attn_gemm){.m = r1 - r0,
                                    .n = a->D,
                                    .k = w.seen - w.c0,
                                    .step = RGI_ATTN_KEYS,
                                    .a = x->dp + r0 * RGI_ATTN_KEYS + w.c0,
                                    .a_row = RGI_ATTN_KEYS,
                                    .a_col = 1,
                                    .b = k + w.c0 * a->dp,
                                    .ldb = a->dp,
                                    .c = x->dqk + r0 * a->dp,
                                    .ldc = a->dp,
                                    .add = true});
    }
  }
  for (int i = 0; i < r.n; i++)
    store(j->a->dq, j->a->sum_q, j->a->acc_q, r.row + i / r.heads, r.head + i % r.heads,
          x->dqk + i * a->dp, a->scale);
}

/* ---- dK and dV ---- */

/* Queries that may see a key tile: those of a range of rows, or of a list of rows. */
typedef struct readers {
  const int32_t *list; /* NULL: a range */
  int64_t from, to;    /* rows, or places in the list */
} readers;

static readers readers_of(const job *j, const rgi_attn_keys *t, int64_t h) {
  const rgi_attn *a = j->a;
  if (a->idx) {
    const int64_t *end = j->list_end + h * j->blocks + t->block;
    return (readers){j->list + h * a->T * a->N, t->block > 0 ? end[-1] : 0, end[0]};
  }
  const int64_t start = rgi_attn_start(a->cu, t->b), stop = rgi_attn_start(a->cu, t->b + 1);
  int64_t from = t->first, to = INT64_MAX; /* positions */
  if (a->mode == RGI_ATTN_CMP) from = t->first * a->stride + a->kernel - 1;
  if (a->mode == RGI_ATTN_SWA && a->window_left >= 0) to = t->first + t->n + a->window_left;
  const int64_t skip = start - rgi_attn_offset(a, t->b); /* row of position 0 */
  from = from + skip > start ? from + skip : start;
  to = to < stop - skip ? to + skip : stop;
  return (readers){NULL, from, to};
}

/* Asks for what the batch at `at` will load, while another is being worked on: the
 * queries of a slc list lie anywhere. */
static void prefetch_batch(const job *j, const readers *d, int64_t at, int64_t head, int heads) {
  const rg_arg *arg[] = {j->a->q, j->a->d_o};
  for (int64_t end = at + j->a->queries; at < end && at < d->to; at++)
    for (int i = 0; i < 2 && arg[i]; i++)
      for (int h = 0; h < heads; h++) {
        const char *p = rgi_at(arg[i], d->list ? d->list[at] : at, head + h);
        const char *stop = p + (size_t)arg[i]->dim[2] * rg_dtype_size(arg[i]->dtype);
        for (; p < stop; p += 64) __builtin_prefetch(p, 0, 2);
      }
}

/* One batch of at most a->queries readers, as rows of the scratch; returns their number. */
static int load_batch(const job *j, const rgi_attn_keys *t, int64_t h, const readers *d, int64_t at,
                      int64_t head, int heads, scratch *x, int *c0, int *c1) {
  const rgi_attn *a = j->a;
  const int64_t skip = rgi_attn_start(a->cu, t->b) - rgi_attn_offset(a, t->b);
  int64_t key_row, n;
  int rows = 0, from = RGI_ATTN_KEYS, to = 0;
  rgi_attn_key_rows(a, t->b, &key_row, &n);
  for (int64_t end = at + a->queries; at < end && at < d->to; at++, rows += heads) {
    int64_t row = d->list ? d->list[at] : at, lo, hi;
    rgi_attn_rows r = {.row = row, .h = h, .head = head, .nq = 1, .heads = heads, .n = heads};
    int32_t first, last;
    rgi_attn_visible(a, row - skip, n, &lo, &hi);
    rgi_attn_columns(t->first, t->n, lo, hi, &first, &last);
    if (first < last) {
      if (first < from) from = first;
      if (last > to) to = last;
    }
    rgi_attn_load_rows(a, &r, a->q, x->q + rows * a->dp, a->dp);
    load_gradients(j, &r, x, rows);
    set_columns(x, x->lo, x->hi, rows, heads, first, last);
  }
  *c0 = from;
  *c1 = to;
  return rows;
}

/* Sum [keys, width] += columns [from, to) of p [rows, keys], transposed, times x [rows, width]. */
static void add_outer(const rgi_attn *a, const float *p, int from, int to, int rows, const float *x,
                      int64_t width, float *sum) {
  const int64_t ld = (width + 15) / 16 * 16;
  a->isa->gemm(&(rgi_attn_gemm){.m = to - from,
                                .n = width,
                                .k = rows,
                                .step = RGI_ATTN_ROWS,
                                .a = p + from,
                                .a_row = 1,
                                .a_col = RGI_ATTN_KEYS,
                                .b = x,
                                .ldb = ld,
                                .c = sum + from * ld,
                                .ldc = ld,
                                .add = true});
}

static void key_task(const job *j, int64_t task, scratch *x) {
  const rgi_attn *a = j->a;
  const rgi_attn_keys *t = &j->keys[task % j->nkey];
  const int64_t h = task / j->nkey;
  const float *kt = rgi_attn_at(a, j->kt, h, t->row, a->D),
              *vt = rgi_attn_at(a, j->vt, h, t->row, a->E);
  const readers d = readers_of(j, t, h);
  clear_buffers(j, x);
  if (j->a->dk) memset(x->dqk, 0, (size_t)(t->n * a->dp) * sizeof(float));
  const bool values = a->dv || a->joined;
  if (values) memset(x->dv, 0, (size_t)(t->n * a->ep) * sizeof(float));

  for (int64_t at = d.from; at < d.to; at += a->queries)
    for (int64_t g = 0; g < a->G; g += a->heads) {
      int heads = (int)(a->G - g < a->heads ? a->G - g : a->heads), from, to;
      int rows = load_batch(j, t, h, &d, at, h * a->G + g, heads, x, &from, &to);
      if (from >= to) continue;
      prefetch_batch(j, &d, at + a->queries, h * a->G + g, heads);
      const int c0 = from / 16 * 16, c1 = (to + 15) / 16 * 16;
      probabilities(j, x, 0, rows, c0, c1, kt, vt, t->n, j->a->dk != NULL);
      if (values) add_outer(a, x->s, from, to, rows, x->d_o, a->E, x->dv);
      if (j->a->dk) add_outer(a, x->dp, from, to, rows, x->q, a->D, x->dqk);
    }
  for (int64_t i = 0; i < t->n && a->joined; i++) {
    float *to = x->dqk + i * a->dp;
    for (int64_t y = 0; y < a->D; y++) to[y] *= a->scale;
    rgi_store_add(to, x->dv + i * a->ep, a->E);
  }
  for (int64_t i = 0; i < t->n; i++) {
    if (j->a->dk)
      store(j->a->dk, NULL, j->a->acc_k, t->row + i, h, x->dqk + i * a->dp,
            a->joined ? 1 : a->scale);
    if (j->a->dv) store(j->a->dv, NULL, j->a->acc_v, t->row + i, h, x->dv + i * a->ep, 1);
  }
}

/* ---- sinks ---- */

static void sink_task(const job *j, int64_t h) {
  const rgi_attn *a = j->a;
  const int64_t live = rgi_attn_start(a->cu, a->B);
  double sum = 0;
  float sink = -INFINITY;
  if (a->sinks) rgi_load(&sink, a->sinks->dtype, rgi_at(a->sinks, h, 0), 1);
  for (int64_t t = 0; t < live; t++) {
    float lse = *(const float *)rgi_at(j->a->lse, t, h);
    if (lse > -INFINITY || lse != lse) sum -= (double)(expf(sink - lse) * j->delta[t * a->H + h]);
  }
  if (a->dsinks->dim[0] > a->H) { /* a pair */
    float *value = (float *)rgi_at(a->dsinks, h, 0),
          *rest = (float *)rgi_at(a->dsinks, a->H + h, 0);
    if (a->acc_sinks) sum += (double)*value + (double)*rest;
    *value = (float)sum;
    *rest = (float)(sum - (double)*value);
    return;
  }
  float d = (float)sum;
  if (j->a->acc_sinks) {
    rgi_store_add(rgi_at(j->a->dsinks, h, 0), &d, 1);
  } else {
    rgi_store(rgi_at(j->a->dsinks, h, 0), j->a->dsinks->dtype, &d, 1);
  }
}

/* ---- the whole ---- */

/* Key tiles come first: with causal masks the first of them are the longest tasks. */
static void main_task(void *arg, int64_t task, int thread) {
  const job *j = arg;
  const int64_t nkey = j->a->dk || j->a->dv ? j->nkey * j->a->KH : 0;
  const int64_t nrow = j->a->dq ? j->nrow * j->a->KH * j->a->chunks : 0;
  if (task < nkey) {
    key_task(j, task, &j->scratch[thread]);
  } else if (task < nkey + nrow) {
    row_task(j, task - nkey, &j->scratch[thread]);
  } else {
    sink_task(j, task - nkey - nrow);
  }
}

size_t rgi_cpu_attn_bwd_workspace(const rg_call *c, const rgi_attn *a) {
  job j = {.a = a, .need_ds = a->dq || a->dk};
  return layout(&j, NULL, c->threads);
}

rg_status rgi_cpu_attn_bwd(const rg_call *c, const rgi_attn *a) {
  job j = {.a = a, .need_ds = a->dq || a->dk};
  layout(&j, c->workspace, c->threads);
  if (a->dq && !a->acc_q) rgi_attn_zero_query_rows(a, a->dq);
  if (a->dk && !a->acc_k) rgi_attn_zero_key_rows(a, a->dk);
  if (a->dv && !a->acc_v) rgi_attn_zero_key_rows(a, a->dv);
  const bool keys = a->dk || a->dv, any = keys || a->dq, delta = j.need_ds || a->dsinks;
  j.nrow = rgi_attn_fill_rows(a, j.rows);
  j.nkey = any ? rgi_attn_fill_keys(a, j.keys, j.blocks > 0 ? j.first_block : NULL) : 0;

  int64_t tasks = j.nkey * a->KH + (delta ? j.nrow : 0) + (j.blocks > 0 ? a->KH : 0);
  if (tasks > 0) c->parallel(c->pool, tasks, prepare_task, &j);
  tasks = (keys ? j.nkey * a->KH : 0) + (a->dq ? j.nrow * a->KH * a->chunks : 0) +
          (a->dsinks ? a->H : 0);
  if (tasks > 0) c->parallel(c->pool, tasks, main_task, &j);
  return RG_OK;
}
