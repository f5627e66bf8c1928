/* ops/index_loss.c: how far an indexer is from the attention that it chooses keys for.

     p[s] = Σ_h exp(scale·q_h·k_s - lse_h), over the query heads of an idx head, made to sum to 1
     I[s] = index_scale · Σ_j weight_j·max(index_q_j·index_k_s, 0)      score relu; dot: without max
     loss = Σ_s p[s]·(log p[s] - log softmax(I)[s])                     0 where a query sees no key

   s: the keys up to the query's position in the blocks that its row of idx names, as in slc_attn.
   The gradient reaches the index alone: what attention does is the target.

     dI[s] = d_loss·(softmax(I)[s] - p[s])

   On the CPU a task is a row of idx. Everything is summed in double, one key after the other. The
   gradient of index_k goes through dI of all rows in the workspace and, per block, the list of
   those that chose it, in ascending order.
 */
#include "index_loss.h"
#include "cpu/rows.h"
#include "cpu/watch.h"
#include "cuda/index_loss.h"

enum {
  IN_Q,
  IN_K,
  IN_LSE,
  IN_INDEX_Q,
  IN_INDEX_K,
  IN_WEIGHT,
  IN_IDX,
  IN_CU,
  IN_CU_K,
  IN_OFFSET,
  IN_GRAD,
  IN_ACC_Q,
  IN_ACC_K,
  IN_ACC_W
};
enum { A_BLOCK, A_SCALE, A_INDEX_SCALE, A_SCORE };
enum { SCORE_RELU, SCORE_DOT };
extern const rg_op rgi_op_index_loss_bwd;

/* ---- ports and attributes ---- */

/* clang-format off */
#define INPUTS                                                                                     \
  {"q", "T,H,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "queries of the attention"},                    \
  {"k", "S,KH,D", RG_PORT_KROWS, RG_D_FLOAT, 'F', 1, "its keys"},                                  \
  {"lse", "T,H", RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "its log-sum-exp over the chosen keys"},        \
  {"index_q", "T,J,C", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "queries of the index"},                  \
  {"index_k", "S,I,C", RG_PORT_KROWS, RG_D_FLOAT, 'F', 1,                                          \
   "keys of the index: a head for all heads of the attention, or for each KV head"},               \
  {"weight", "T,J", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D_FLOAT, 'W', 1,                           \
   "factors of the index's heads in score relu; absent: 1"},                                       \
  {"idx", "T,I,N", RG_PORT_ROWS, RG_D(RG_I32), 0, 1, "chosen blocks, as topk leaves them"},        \
  {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the sequences"},           \
  {"cu_seqlens_k", "B1", RG_PORT_KSEQLENS | RG_PORT_OPTIONAL, RG_D(RG_I32), 0, -1,                 \
   "starts of the key sequences where they differ"},                                               \
  {"q_offset", "B1-1", RG_PORT_OFFSETS | RG_PORT_OPTIONAL, RG_D(RG_I32), 0, -1,                    \
   "position of each sequence's first query"}
/* clang-format on */

static const rg_port in[] = {INPUTS};
static const rg_port out[] = {
    {"loss", "T,I", RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "Kullback-Leibler divergence of each query"},
};
static const rg_port bwd_in[] = {
    INPUTS,
    {"grad.loss", "T,I", RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "gradient of loss"},
    {"acc.index_q", "T,J,C", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "sum so far"},
    {"acc.index_k", "S,I,C", RG_PORT_OPTIONAL | RG_PORT_KROWS, RG_D(RG_F32), 0, 1, "sum so far"},
    {"acc.weight", "T,J", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "sum so far"},
};
static const rg_port bwd_out[] = {
    {"d.index_q", "T,J,C", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', 1,
     "gradient of index_q"},
    {"d.index_k", "S,I,C", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_KROWS, RG_D_FLOAT, 'F', 1,
     "gradient of index_k"},
    {"d.weight", "T,J", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'W', 1,
     "gradient of weight"},
};

static const char *const scores[] = {"relu", "dot", NULL};
static const rg_attr attrs[] = {
    [A_BLOCK] = {"block", RG_ATTR_INT, true, 1, 1 << 20, 0, NULL, "keys in a block of idx"},
    [A_SCALE] = {"scale", RG_ATTR_FLOAT, false, 0, 0, 0, NULL,
                 "factor on the attention's logits; 0: 1/sqrt(D)"},
    [A_INDEX_SCALE] = {"index_scale", RG_ATTR_FLOAT, false, 0, 0, 1, NULL,
                       "factor on the index's scores"},
    [A_SCORE] = {"score", RG_ATTR_ENUM, false, 0, 0, SCORE_RELU, scores, "as in topk"},
};

static rg_status check(const rg_call *c, rg_error *e) {
  const int64_t H = rg_in(c, IN_Q)->dim[1], KH = rg_in(c, IN_K)->dim[1],
                J = rg_in(c, IN_INDEX_Q)->dim[1], I = rg_in(c, IN_INDEX_K)->dim[1],
                D = rg_in(c, IN_Q)->dim[2], C = rg_in(c, IN_INDEX_Q)->dim[2];
  const int64_t most = RGK_INDEX_LOSS_WIDTH;
  if (H != RG_DIM_FREE && KH != RG_DIM_FREE && (KH < 1 || H < 1 || H % KH))
    return rg_op_fail(e, RG_E_SHAPE, c,
                      "%lld query heads are not a positive multiple of %lld KV heads", (long long)H,
                      (long long)KH);
  if (I != RG_DIM_FREE && KH != RG_DIM_FREE && I != 1 && I != KH)
    return rg_op_fail(e, RG_E_SHAPE, c, "index_k has %lld heads, expected 1 or %lld as k",
                      (long long)I, (long long)KH);
  if (J != RG_DIM_FREE && I != RG_DIM_FREE && (J < 1 || J % I))
    return rg_op_fail(e, RG_E_SHAPE, c,
                      "%lld heads of index_q are not a positive multiple of %lld of index_k",
                      (long long)J, (long long)I);
  if ((D != RG_DIM_FREE && (D < 1 || D > most)) || (C != RG_DIM_FREE && (C < 1 || C > most)))
    return rg_op_fail(e, RG_E_SHAPE, c, "heads are %lld and %lld wide, expected 1 to %lld",
                      (long long)D, (long long)C, (long long)most);
  if (rg_in(c, IN_IDX)->dim[2] > 1 << 16) /* places of entries are kept in 16 bits */
    return rg_op_fail(e, RG_E_SHAPE, c, "idx has %lld places, expected at most %d",
                      (long long)rg_in(c, IN_IDX)->dim[2], 1 << 16);
  if (rg_in(c, IN_WEIGHT) && c->attr[A_SCORE].i != SCORE_RELU)
    return rg_op_fail(e, RG_E_VALUE, c, "weight goes with score relu, not dot");
  return RG_OK;
}

/* ---- one call ---- */

static rgi_index_loss describe(const rg_call *c) {
  rgi_index_loss a = {.backward = c->op == &rgi_op_index_loss_bwd,
                      .q = rg_in(c, IN_Q),
                      .k = rg_in(c, IN_K),
                      .lse = rg_in(c, IN_LSE),
                      .index_q = rg_in(c, IN_INDEX_Q),
                      .index_k = rg_in(c, IN_INDEX_K),
                      .weight = rg_in(c, IN_WEIGHT),
                      .idx = rg_in(c, IN_IDX),
                      .cu = rg_in(c, IN_CU),
                      .cu_k = rg_in(c, IN_CU_K),
                      .offset = rg_in(c, IN_OFFSET),
                      .block = c->attr[A_BLOCK].i,
                      .scale = c->attr[A_SCALE].f,
                      .index_scale = c->attr[A_INDEX_SCALE].f,
                      .relu = c->attr[A_SCORE].i == SCORE_RELU};
  a.T = a.q->dim[0], a.H = a.q->dim[1], a.D = a.q->dim[2];
  a.S = a.k->dim[0], a.KH = a.k->dim[1];
  a.IH = a.index_q->dim[1], a.ID = a.index_q->dim[2];
  a.I = a.idx->dim[1], a.N = a.idx->dim[2];
  a.B = a.cu->dim[0] - 1;
  if (a.scale == 0) a.scale = 1 / sqrt((double)(a.D > 0 ? a.D : 1));
  if (!a.backward) {
    a.loss = rg_out(c, 0);
    return a;
  }
  a.d_loss = rg_in(c, IN_GRAD);
  a.dq = rg_out(c, 0), a.dk = rg_out(c, 1), a.dw = rg_out(c, 2);
  a.add_q = rg_in(c, IN_ACC_Q), a.add_k = rg_in(c, IN_ACC_K), a.add_w = rg_in(c, IN_ACC_W);
  return a;
}

/* Every query is taken to have chosen its own block and N - 1 full ones, or all there are. */
static void cost(const rg_call *c, rg_cost *out) {
  const rgi_index_loss a = describe(c);
  const double T = (double)a.T, most = (double)a.N * (double)a.block, keys = most < T ? most : T,
               pairs = keys * (T - keys / 2);
  const double products = (double)a.H * (double)a.D, index = (double)a.IH * (double)a.ID;
  *out = (rg_cost){.flops = 2 * pairs * (products + index * (a.backward ? 4 : 1)),
                   .exps = pairs * (double)a.H,
                   .bytes = rgi_call_bytes(c)};
}

/* ---- on the CPU ---- */

typedef struct job {
  const rgi_index_loss *a;
  const int32_t *cu, *cu_k;
  int isa;
  int64_t blocks;
  float *slope;         /* [T, I, N · block] dI; backward */
  int64_t *first_block; /* [B]: number of each sequence's first block */
  int64_t *list_end;    /* [I, blocks]; a block's list starts where the one before ends */
  int64_t *list;        /* [I, T · N]: entries, row · N + place */
  char *scratch;
  size_t each; /* bytes of a thread's scratch: m, s, rows of q, index_q and two keys, sums */
} job;

typedef struct scratch {
  double *m, *s; /* [N · block] exp and scores; of keys that do not count 0 and -inf */
  double *sum;   /* [ID] */
  float *q, *iq, *w, *lse, *key, *ikey;
} scratch;

static scratch cut(const job *j, char *base, size_t *bytes) {
  const rgi_index_loss *a = j->a;
  const size_t n = (size_t)a->N * (size_t)a->block, g = (size_t)(a->H / a->I),
               h = (size_t)(a->IH / a->I);
  rgi_cut w = {.base = base};
  scratch x;
  x.m = rgi_take(&w, n * sizeof(double));
  x.s = rgi_take(&w, n * sizeof(double));
  x.sum = rgi_take(&w, (size_t)a->ID * sizeof(double));
  x.q = rgi_take(&w, g * (size_t)a->D * sizeof(float));
  x.iq = rgi_take(&w, h * (size_t)a->ID * sizeof(float));
  x.w = rgi_take(&w, h * sizeof(float));
  x.lse = rgi_take(&w, g * sizeof(float));
  x.key = rgi_take(&w, (size_t)a->D * sizeof(float));
  x.ikey = rgi_take(&w, (size_t)a->ID * sizeof(float));
  *bytes = w.used;
  return x;
}

static size_t lay_out(job *j, void *base, int threads) {
  const rgi_index_loss *a = j->a;
  const bool lists = a->backward && a->dk;
  rgi_cut w = {.base = base};
  cut(j, NULL, &j->each);
  j->blocks = lists ? rgi_tile_capacity(a->S, a->B, a->block) : 0;
  j->slope = rgi_take(&w, a->backward ? (size_t)a->T * (size_t)a->I * (size_t)a->N *
                                            (size_t)a->block * sizeof *j->slope
                                      : 0);
  j->first_block = rgi_take(&w, lists ? (size_t)a->B * sizeof *j->first_block : 0);
  j->list_end = rgi_take(&w, (size_t)(a->I * j->blocks) * sizeof *j->list_end);
  j->list = rgi_take(&w, lists ? (size_t)a->I * (size_t)a->T * (size_t)a->N * sizeof *j->list : 0);
  j->scratch = rgi_take(&w, j->each * (size_t)threads);
  return w.used;
}

static size_t workspace(const rg_call *c) {
  const rgi_index_loss a = describe(c);
  if (c->gpu) return rgi_cuda_index_loss_workspace(&a, c->gpu);
  job j = {.a = &a};
  return lay_out(&j, NULL, c->threads);
}

/* In eight chains, which vectors take. */
RGI_WATCHED RGI_UNCOUNTED static double eight_chains(const float *x, const float *y, int64_t n) {
  double sum[8] = {0}, all = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; l++) sum[l] += (double)x[i + l] * (double)y[i + l];
  for (int l = 0; i + l < n; l++) sum[l] += (double)x[i + l] * (double)y[i + l];
  for (int l = 0; l < 8; l++) all += sum[l];
  return all;
}
static double dot(const float *x, const float *y, int64_t n) {
  rgi_watch(x, n);
  rgi_watch(y, n);
  return eight_chains(x, y, n);
}

/* A row of idx: where its query stands and which keys there are. */
typedef struct row {
  const int32_t *idx;
  int64_t b, head, first, limit; /* keys: row of the first, and how many the query may see */
} row;

static row row_of(const job *j, int64_t t, int64_t head) {
  const rgi_index_loss *a = j->a;
  row r = {.idx = rgi_at(a->idx, t, head), .b = rgi_sequence_of(j->cu, a->B, t), .head = head};
  const int64_t offset = a->offset ? ((const int32_t *)a->offset->data)[r.b] : 0,
                position = t - j->cu[r.b] + offset;
  r.first = j->cu_k[r.b];
  r.limit = j->cu_k[r.b + 1] - r.first;
  if (position + 1 < r.limit) r.limit = position + 1;
  return r;
}

/* The entry at place n counts if its block comes after those before it, and begins before the
 * limit. */
static bool counts(const rgi_index_loss *a, const row *r, int64_t n, int64_t *before) {
  const int64_t e = r->idx[n];
  if (e <= *before) return false;
  *before =
      e * a->block < r->limit ? e : INT64_MAX; /* what follows is not larger, or further out */
  return *before == e;
}

/* A score of a key and, where wanted, of each head the product. */
static double score_of(const job *j, const scratch *x, const float *key) {
  const rgi_index_loss *a = j->a;
  double sum = 0;
  for (int64_t h = 0; h < a->IH / a->I; h++) {
    const double y = dot(x->iq + h * a->ID, key, a->ID);
    sum += a->relu && y < 0 ? 0 : (double)x->w[h] * y;
  }
  return a->index_scale * sum;
}

static void load_index_row(const job *j, int64_t t, int64_t head, const scratch *x) {
  const rgi_index_loss *a = j->a;
  const int64_t heads = a->IH / a->I;
  for (int64_t h = 0; h < heads; h++) {
    rgi_load_by(j->isa, x->iq + h * a->ID, a->index_q->dtype,
                rgi_at(a->index_q, t, head * heads + h), a->ID);
    x->w[h] = 1;
    if (a->weight) rgi_load(x->w + h, a->weight->dtype, rgi_at(a->weight, t, head * heads + h), 1);
  }
}

static void load_index_key(const job *j, int64_t row, int64_t head, float *key) {
  rgi_load_by(j->isa, key, j->a->index_k->dtype, rgi_at(j->a->index_k, row, head), j->a->ID);
}

/* Of a row: the sum of m, and log-sum-exp of s. */
typedef struct totals {
  double m, lse;
  bool any;
} totals;

static totals look_at(const job *j, const row *r, int64_t t, const scratch *x) {
  const rgi_index_loss *a = j->a;
  const int64_t group = a->H / a->I, per_kv = a->H / a->KH;
  totals all = {0, -INFINITY, false};
  double most = -INFINITY, sum = 0;
  int64_t before = -1;
  for (int64_t h = 0; h < group; h++) {
    rgi_load_by(j->isa, x->q + h * a->D, a->q->dtype, rgi_at(a->q, t, r->head * group + h), a->D);
    x->lse[h] = *(const float *)rgi_at(a->lse, t, r->head * group + h);
  }
  load_index_row(j, t, r->head, x);
  for (int64_t i = 0; i < a->N * a->block; i++) x->m[i] = 0, x->s[i] = -INFINITY;
  for (int64_t n = 0; n < a->N; n++) {
    if (!counts(a, r, n, &before)) continue;
    for (int64_t o = 0; o < a->block && before * a->block + o < r->limit; o++) {
      const int64_t key = r->first + before * a->block + o, i = n * a->block + o;
      for (int64_t h = 0; h < group; h++) {
        const int64_t kv = (r->head * group + h) / per_kv;
        if (h == 0 || kv * per_kv == r->head * group + h)
          rgi_load_by(j->isa, x->key, a->k->dtype, rgi_at(a->k, key, kv), a->D);
        x->m[i] += exp(a->scale * dot(x->q + h * a->D, x->key, a->D) - (double)x->lse[h]);
      }
      load_index_key(j, key, r->head, x->ikey);
      x->s[i] = score_of(j, x, x->ikey);
      all.m += x->m[i];
      if (x->s[i] > most || !all.any) most = x->s[i];
      all.any = true;
    }
  }
  for (int64_t i = 0; i < a->N * a->block && all.any; i++) sum += exp(x->s[i] - most);
  if (all.any) all.lse = most + log(sum);
  return all;
}

static void forward_task(void *arg, int64_t task, int thread) {
  const job *j = arg;
  const rgi_index_loss *a = j->a;
  const int64_t t = task / a->I, head = task % a->I;
  size_t bytes;
  const scratch x = cut(j, j->scratch + (size_t)thread * j->each, &bytes);
  const row r = row_of(j, t, head);
  const totals all = look_at(j, &r, t, &x);
  double loss = 0;
  for (int64_t i = 0; i < a->N * a->block && all.any; i++)
    if (x.m[i] != 0) loss += x.m[i] / all.m * (log(x.m[i]) - x.s[i]);
  if (all.any) loss += all.lse - log(all.m);
  *(float *)rgi_at(a->loss, t, head) = (float)loss;
}

static void put(const job *j, bool add, const rg_arg *to, int64_t i, int64_t h, const double *x,
                int64_t n) {
  float piece[RGI_PIECE];
  for (int64_t c = 0; c < n; c += RGI_PIECE) {
    const int64_t w = n - c < RGI_PIECE ? n - c : RGI_PIECE;
    for (int64_t k = 0; k < w; k++) piece[k] = (float)x[c + k];
    rgi_put_grad(j->isa, add, (char *)rgi_at(to, i, h) + (size_t)c * rg_dtype_size(to->dtype),
                 to->dtype, piece, w);
  }
}

/* dI of a row, and what goes to its own index_q and weight. */
static void backward_task(void *arg, int64_t task, int thread) {
  const job *j = arg;
  const rgi_index_loss *a = j->a;
  const int64_t t = task / a->I, head = task % a->I, heads = a->IH / a->I;
  size_t bytes;
  const scratch x = cut(j, j->scratch + (size_t)thread * j->each, &bytes);
  const row r = row_of(j, t, head);
  const totals all = look_at(j, &r, t, &x);
  const double up = *(const float *)rgi_at(a->d_loss, t, head);
  float *slope = j->slope + task * a->N * a->block;
  for (int64_t i = 0; i < a->N * a->block; i++)
    slope[i] = x.s[i] == -INFINITY ? 0 : (float)(up * (exp(x.s[i] - all.lse) - x.m[i] / all.m));
  for (int64_t h = 0; h < heads && (a->dq || a->dw); h++) {
    const float *iq = x.iq + h * a->ID;
    double weight = 0;
    memset(x.sum, 0, (size_t)a->ID * sizeof *x.sum);
    for (int64_t i = 0; i < a->N * a->block; i++) {
      if (slope[i] == 0) continue;
      load_index_key(j, r.first + (int64_t)r.idx[i / a->block] * a->block + i % a->block, head,
                     x.ikey);
      const double y = dot(iq, x.ikey, a->ID), f = a->index_scale * (double)slope[i];
      if (a->relu && y <= 0) continue;
      weight += f * y;
      for (int64_t c = 0; c < a->ID; c++) x.sum[c] += f * (double)x.w[h] * (double)x.ikey[c];
    }
    if (a->dq) put(j, a->add_q, a->dq, t, head * heads + h, x.sum, a->ID);
    if (a->dw) put(j, a->add_w, a->dw, t, head * heads + h, &weight, 1);
  }
}

/* The entries of one head's idx by the block they name, in order: count, sum up, fill. */
static void list_task(void *arg, int64_t head, int thread) {
  const job *j = arg;
  const rgi_index_loss *a = j->a;
  int64_t *count = j->list_end + head * j->blocks, sum = 0;
  int64_t *list = j->list + head * a->T * a->N;
  (void)thread;
  memset(count, 0, (size_t)j->blocks * sizeof *count);
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t t = j->cu[0]; t < j->cu[a->B]; t++) {
      const row r = row_of(j, t, head);
      int64_t before = -1;
      for (int64_t n = 0; n < a->N; n++) {
        if (!counts(a, &r, n, &before)) continue;
        int64_t *c = &count[j->first_block[r.b] + before];
        if (pass == 1) list[*c] = t * a->N + n;
        ++*c;
      }
    }
    for (int64_t i = 0; pass == 0 && i < j->blocks; i++) {
      const int64_t n = count[i];
      count[i] = sum;
      sum += n;
    }
  }
}

static void key_task(void *arg, int64_t task, int thread) {
  const job *j = arg;
  const rgi_index_loss *a = j->a;
  const int64_t key = task / a->I, head = task % a->I, heads = a->IH / a->I;
  size_t bytes;
  const scratch x = cut(j, j->scratch + (size_t)thread * j->each, &bytes);
  memset(x.sum, 0, (size_t)a->ID * sizeof *x.sum);
  if (key >= j->cu_k[0] && key < j->cu_k[a->B]) {
    const int64_t b = rgi_sequence_of(j->cu_k, a->B, key), at = key - j->cu_k[b],
                  block = j->first_block[b] + at / a->block;
    const int64_t *end = j->list_end + head * j->blocks + block;
    load_index_key(j, key, head, x.ikey);
    for (int64_t i = block ? end[-1] : 0; i < *end; i++) {
      const int64_t entry = j->list[head * a->T * a->N + i];
      const int64_t t = entry / a->N, place = entry % a->N * a->block + at % a->block;
      const double slope =
          a->index_scale * (double)j->slope[(t * a->I + head) * a->N * a->block + place];
      if (slope == 0) continue;
      load_index_row(j, t, head, &x);
      for (int64_t h = 0; h < heads; h++) {
        const float *iq = x.iq + h * a->ID;
        if (a->relu && dot(iq, x.ikey, a->ID) <= 0) continue;
        for (int64_t c = 0; c < a->ID; c++) x.sum[c] += slope * (double)x.w[h] * (double)iq[c];
      }
    }
  } else if (a->add_k) {
    return;
  }
  put(j, a->add_k, a->dk, key, head, x.sum, a->ID);
}

static void zero_rows(const rg_arg *x, int64_t from) {
  for (int64_t t = from; x && t < x->dim[0]; t++)
    for (int64_t h = 0; h < x->dim[1]; h++)
      memset(rgi_at(x, t, h), 0, (size_t)(x->rank > 2 ? x->dim[2] : 1) * rg_dtype_size(x->dtype));
}

static rg_status run_cpu(const rg_call *c) {
  const rgi_index_loss a = describe(c);
  job j = {.a = &a, .cu = a.cu->data, .cu_k = a.cu_k ? a.cu_k->data : a.cu->data, .isa = c->isa};
  lay_out(&j, c->workspace, c->threads);
  const int64_t live = j.cu[a.B];
  if (!a.backward) {
    zero_rows(a.loss, live);
    c->parallel(c->pool, live * a.I, forward_task, &j);
    return RG_OK;
  }
  if (!a.add_q) zero_rows(a.dq, live);
  if (!a.add_w) zero_rows(a.dw, live);
  c->parallel(c->pool, live * a.I, backward_task, &j);
  if (!a.dk) return RG_OK;
  for (int64_t b = 0, n = 0; b < a.B; b++) {
    j.first_block[b] = n;
    n += (j.cu_k[b + 1] - j.cu_k[b] + a.block - 1) / a.block;
  }
  c->parallel(c->pool, a.I, list_task, &j);
  c->parallel(c->pool, a.S * a.I, key_task, &j);
  return RG_OK;
}

/* ---- on a GPU ---- */

static rg_status steps(const rg_call *c, rg_cuda *x) {
  const rgi_index_loss a = describe(c);
  return rgi_cuda_index_loss_steps(&a, c->gpu, c->workspace, x);
}
static const char *path(const rg_call *c) {
  const rgi_index_loss a = describe(c);
  return rgi_cuda_index_loss_path(&a, c->gpu);
}

const rg_op rgi_op_index_loss = {
    .abi = RG_OP_ABI,
    .name = "index_loss",
    .doc = "divergence of an indexer's scores from the attention over the keys it chose",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_QUERYWISE,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = run_cpu,
    .cuda_steps = steps,
    .cuda_path = path,
    .backward = "index_loss.bwd",
};

const rg_op rgi_op_index_loss_bwd = {
    .abi = RG_OP_ABI,
    .name = "index_loss.bwd",
    .doc = "gradient of index_loss, to the index alone",
    .flags = RG_OP_INTERNAL,
    .in = bwd_in,
    .nin = RGI_COUNT(bwd_in),
    .out = bwd_out,
    .nout = RGI_COUNT(bwd_out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = run_cpu,
    .cuda_steps = steps,
    .cuda_path = path,
};
