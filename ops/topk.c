/* ops/topk.c: which blocks each query attends to.

     p[j]     = Σ_h exp(s_hj - lse_h)    over the query heads of the KV head; compressed keys j that
                                         i sees
     score[b] = Σ_j p[j]·|[j·stride, j·stride + kernel) ∩ [b·block, (b+1)·block)| / stride
     idx[i]   = the first `init` blocks, the last `local` up to the query's own, and the best of the
                others, ascending

   With pool "max" a block scores the largest p[j] of the keys that reach into it instead.
   Candidates are all b <= i / block; without `local`, which the own block is one of, only complete
   ones, and with `tail` the own one, which then is kept. min(top_n, candidates) are kept, the rest
   of the row is -1.
   Those past the last key (a query may lie beyond it) score nothing: 0, or -inf where blocks not
   complete do. Equal scores: the lower index. NaN ranks last. score "dot" ranks by Σ_h q_h·k
   instead, "relu" by Σ_h weight_h·max(q_h·k, 0), both of whole blocks or of a block's best key. No
   gradient. Queries of a query_block rank by the sum of their scores: they choose alike.

   One task is a tile of 32 queries of a sequence and a KV head. Blocks are ranked twice at most: by
   fp32 sums, and where the last block chosen has so little probability that fp32 underflows (or
   overflows, for an lse that does not belong to these keys), by fp64 sums of the same logits. Which
   of the two depends on the query's own scores alone. Rows whose candidates are all kept compute
   nothing.

   paged_topk is the same with compressed keys in pages, its queries at the end of the context.
 */
#include "attn.h"
#include "compress.h"
#include "cpu/topk.h"
#include "cpu/rows.h"
#include "cuda/attn.h"
#include "cuda/paged.h"
#include "cuda/topk.h"

enum { IN_Q, IN_K, IN_LSE, IN_CU, IN_CU_K, IN_OFFSET, IN_WEIGHT, IN_COUNT };
/* paged_topk has these instead of the two before weight */
enum { IN_CONTEXT = IN_CU_K, IN_PAGES };
enum {
  A_KERNEL,
  A_STRIDE,
  A_BLOCK,
  A_TOP_N,
  A_INIT,
  A_LOCAL,
  A_SCORE,
  A_SCALE,
  A_SOFTCAP,
  A_POOL,
  A_TAIL,
  A_QUERY_BLOCK,
  A_COUNT
};
enum { POOL_SUM, POOL_MAX };
static int64_t score_of(const rg_call *c) {
  return c->attr[A_SCORE].i;
}
static bool by_softmax(const rg_call *c) {
  return score_of(c) == RGK_TOPK_BY_SOFTMAX;
}
extern const rg_op rgi_op_paged_topk;
static bool is_paged(const rg_call *c) {
  return c->op == &rgi_op_paged_topk;
}
static int64_t kv_heads_of(const rg_call *c) {
  const rg_arg *k = rg_in(c, IN_K);
  return k->dim[k->rank - 2];
}
/* Compressed rows that there are, or that a sequence has room for in its pages. */
static int64_t key_rows(const rg_call *c) {
  const rg_arg *k = rg_in(c, IN_K);
  return is_paged(c) ? rg_in(c, IN_PAGES)->dim[1] * k->dim[1] : k->dim[0];
}
static rgi_paged paged_of(const rg_call *c) {
  const rg_arg *k = rg_in(c, IN_K);
  return (rgi_paged){.cu = rg_in(c, IN_CU)->data,
                     .context = rg_in(c, IN_CONTEXT),
                     .pages = rg_in(c, IN_PAGES),
                     .page = k->dim[1] * c->attr[A_STRIDE].i,
                     .P = k->dim[0]};
}

/* idx past a row's choices; idx of rows past the last live token */
enum { NO_BLOCK = -1, DEAD_ROW = 0 };

static const rg_port in_ports[IN_COUNT] = {
    [IN_Q] = {"q", "T,H,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "queries"},
    [IN_K] = {"k", "S,KH,D", RG_PORT_BLOCKS, RG_D_FLOAT, 'F', 1,
              "compressed keys; those of sequence b start in row floor(cu_seqlens_k[b] / stride)"},
    [IN_LSE] = {"lse", "T,H", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D(RG_F32), 0, 1,
                "log-sum-exp of the attention over the compressed keys; needed by score softmax"},
    [IN_CU] = {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the sequences"},
    [IN_CU_K] = {"cu_seqlens_k", "B1", RG_PORT_KSEQLENS | RG_PORT_OPTIONAL, RG_D(RG_I32), 0, -1,
                 "starts of the key sequences, in tokens, where they differ"},
    [IN_OFFSET] = {"q_offset", "B1-1", RG_PORT_OFFSETS | RG_PORT_OPTIONAL, RG_D(RG_I32), 0, -1,
                   "position of each sequence's first query"},
    [IN_WEIGHT] = {"weight", "T,H", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D_FLOAT, 'W', 1,
                   "factors of the heads in score relu; absent: 1"},
};
static const rg_port out_ports[] = {
    {"idx", "T,KH,top_n", RG_PORT_ROWS, RG_D(RG_I32), 0, 1,
     "chosen blocks, ascending, then -1; rows past the last live token are 0"},
};

static const char *const scores[] = {"softmax", "dot", "relu", NULL}; /* RGK_TOPK_BY_… */
static const char *const pools[] = {"sum", "max", NULL};
static const rg_attr attrs[A_COUNT] = {
    [A_KERNEL] = {"kernel", RG_ATTR_INT, true, 1, 1 << 20, 0, NULL,
                  "tokens that a compressed key stands for"},
    [A_STRIDE] = {"stride", RG_ATTR_INT, true, 1, 1 << 20, 0, NULL,
                  "tokens from one compressed key to the next"},
    [A_BLOCK] = {"block", RG_ATTR_INT, true, 1, 1 << 20, 0, NULL, "tokens of a block to choose"},
    [A_TOP_N] = {"top_n", RG_ATTR_INT, true, 1, 1 << 16, 0, NULL, "blocks a query keeps at most"},
    [A_INIT] = {"init", RG_ATTR_INT, false, 0, 1 << 16, 1, NULL, "first blocks, always kept"},
    [A_LOCAL] =
        {"local", RG_ATTR_INT, false, 0, 1 << 16, 2, NULL,
         "last blocks up to the query's own, always kept; 0: none, and only complete blocks "
         "are chosen"},
    [A_SCORE] =
        {"score", RG_ATTR_ENUM, false, 0, 0, RGK_TOPK_BY_SOFTMAX, scores,
         "softmax: probability mass of a block; dot: product with its pooled key, summed "
         "over the group; relu: the sum of weight times the product where that is positive"},
    [A_SCALE] = {"scale", RG_ATTR_FLOAT, false, 0, 1e6, 0, NULL,
                 "factor on q·k; 0: 1/sqrt(D). Unused by dot and relu"},
    [A_SOFTCAP] = {"softcap", RG_ATTR_FLOAT, false, 0, 1e6, 0, NULL,
                   "c: logits become c·tanh(logit/c), as in cmp_attn; 0: off"},
    [A_POOL] = {"pool", RG_ATTR_ENUM, false, 0, 0, POOL_SUM, pools,
                "how keys that reach into a block make its score: sum, each by its share of the "
                "block, or max, the largest"},
    [A_TAIL] = {"tail", RG_ATTR_BOOL, false, 0, 0, 0, NULL,
                "with local 0: the query's own block is kept while it is not complete"},
    [A_QUERY_BLOCK] =
        {"query_block", RG_ATTR_INT, false, 1, 1 << 16, 1, NULL,
         "queries that share a choice, by the sum of their scores; divides block, and "
         "goes with score dot"},
};

static rg_status check(const rg_call *c, rg_error *e) {
  const rg_value *a = c->attr;
  int64_t kernel = a[A_KERNEL].i, stride = a[A_STRIDE].i, block = a[A_BLOCK].i;
  int64_t heads = rg_in(c, IN_Q)->dim[1], kv_heads = kv_heads_of(c);
  const bool softmax = by_softmax(c);
  const char *score = scores[score_of(c)];
  if (kernel % stride)
    return rg_op_fail(e, RG_E_VALUE, c, "stride %lld does not divide kernel %lld",
                      (long long)stride, (long long)kernel);
  if (block % stride)
    return rg_op_fail(e, RG_E_VALUE, c, "stride %lld does not divide block %lld", (long long)stride,
                      (long long)block);
  if (a[A_TAIL].i && (a[A_LOCAL].i > 0 || a[A_INIT].i >= a[A_TOP_N].i))
    return rg_op_fail(e, RG_E_VALUE, c,
                      a[A_LOCAL].i > 0
                          ? "tail goes with local 0, not %lld: local keeps the own block anyhow"
                          : "init %lld leaves tail no place",
                      (long long)(a[A_LOCAL].i > 0 ? a[A_LOCAL].i : a[A_INIT].i));
  if (a[A_INIT].i + a[A_LOCAL].i > a[A_TOP_N].i)
    return rg_op_fail(e, RG_E_VALUE, c,
                      "init %lld + local %lld blocks are always kept, but top_n is %lld",
                      (long long)a[A_INIT].i, (long long)a[A_LOCAL].i, (long long)a[A_TOP_N].i);
  if (!softmax && a[A_POOL].i == POOL_SUM && (kernel != stride || stride != block))
    return rg_op_fail(e, RG_E_VALUE, c,
                      "score %s needs kernel = stride = block or pool max, not %lld, %lld, %lld",
                      score, (long long)kernel, (long long)stride, (long long)block);
  if (!softmax && a[A_SOFTCAP].f != 0)
    return rg_op_fail(e, RG_E_VALUE, c,
                      "softcap %g does not go with score %s, which ranks the raw product",
                      a[A_SOFTCAP].f, score);
  const int64_t share = a[A_QUERY_BLOCK].i;
  if (share > 1 && (block % share || a[A_LOCAL].i == 0 || score_of(c) != RGK_TOPK_BY_DOT))
    return rg_op_fail(e, RG_E_VALUE, c,
                      "query_block %lld needs score dot, local blocks, and a block (%lld) that it "
                      "divides",
                      (long long)share, (long long)block);
  /* of a key that ends in the own block the first queries see nothing */
  if (share > 1 && kernel - stride > (a[A_LOCAL].i - 1) * block)
    return rg_op_fail(e, RG_E_VALUE, c,
                      "query_block %lld with kernel %lld, stride %lld: keys reach from blocks that "
                      "are ranked into the query's own; expected local %lld or more",
                      (long long)share, (long long)kernel, (long long)stride,
                      (long long)((kernel - stride + block - 1) / block + 1));
  if (share > 1 && (is_paged(c) || rg_in(c, IN_OFFSET)))
    return rg_op_fail(e, RG_E_VALUE, c, "query_block %lld needs whole sequences of queries",
                      (long long)share);
  if (score_of(c) != RGK_TOPK_BY_RELU && rg_in(c, IN_WEIGHT))
    return rg_op_fail(e, RG_E_KEY, c, "weight goes with score relu, not %s", score);
  if (softmax && !rg_in(c, IN_LSE))
    return rg_op_fail(e, RG_E_KEY, c,
                      "score softmax needs the input lse, the attention's over the same keys");
  if (heads != RG_DIM_FREE && kv_heads != RG_DIM_FREE && (kv_heads == 0 || heads % kv_heads))
    return rg_op_fail(e, RG_E_SHAPE, c, "%lld query heads can't be shared out among %lld KV heads",
                      (long long)heads, (long long)kv_heads);
  return RG_OK;
}

/* (query, compressed key) pairs with the key seen, over the first `length` queries: `stride`
 * queries see 1 key, as many see 2, … */
static double seen_pairs(int64_t length, int64_t kernel, int64_t stride) {
  if (length < kernel) return 0;
  double u = (double)(length - kernel + 1), full = floor(u / (double)stride),
         rest = u - full * (double)stride;
  return (double)stride * full * (full + 1) / 2 + rest * (full + 1);
}

static void cost(const rg_call *c, rg_cost *out) {
  const rg_arg *q = rg_in(c, IN_Q), *k = rg_in(c, IN_K);
  int64_t kernel = c->attr[A_KERNEL].i, stride = c->attr[A_STRIDE].i;
  int64_t nseq = rg_in(c, IN_CU)->dim[0] - 1, length = q->dim[0] / (nseq > 0 ? nseq : 1);
  /* the first queries keep every candidate: nothing to score */
  int64_t free = c->attr[A_TOP_N].i > length / c->attr[A_BLOCK].i
                     ? length
                     : c->attr[A_TOP_N].i * c->attr[A_BLOCK].i;
  double pairs = is_paged(c)
                     ? (double)q->dim[0] * (double)key_rows(c) /* at the end of a full context */
                     : (seen_pairs(length, kernel, stride) - seen_pairs(free, kernel, stride)) *
                           (double)(nseq > 0 ? nseq : 1);
  const bool dot = score_of(c) == RGK_TOPK_BY_DOT;
  double products = pairs * (double)(dot ? kv_heads_of(c) : q->dim[1]);
  out->flops = 2 * products * (double)q->dim[2] + (dot ? rgi_arg_elements(q) : 0);
  out->exps = by_softmax(c) ? pairs * (double)q->dim[1] : 0;
  out->bytes = rgi_call_bytes(c);
  if (is_paged(c)) { /* a pool is larger than what is read of it */
    const double pool = rgi_arg_elements(k) * (double)rg_dtype_size(k->dtype),
                 seen = (double)nseq * (double)key_rows(c) * (double)kv_heads_of(c) *
                        (double)q->dim[2] * (double)rg_dtype_size(k->dtype);
    if (seen < pool) out->bytes -= pool - seen;
  }
}

/* ---- memory ----
 *
 *   | tiles | thread 0: q | lse | keys | rows | scores | rank | heap | thread 1: …
 */

typedef struct layout {
  int64_t tiles, blocks; /* most there can be */
  size_t tile_bytes;
  size_t q, lse, keys, row, score, rank, heap, thread_bytes; /* offsets from the thread's part */
} layout;

static layout lay_out(const rg_call *c) {
  const rg_arg *q = rg_in(c, IN_Q), *cu = rg_in(c, IN_CU);
  const bool dot = score_of(c) == RGK_TOPK_BY_DOT;
  int64_t stride = c->attr[A_STRIDE].i, d = q->dim[2],
          group = kv_heads_of(c) ? q->dim[1] / kv_heads_of(c) : 0;
  layout l = {0};
  l.tiles = rgi_tile_capacity(q->dim[0], cu->dim[0] > 0 ? cu->dim[0] - 1 : 0, RGI_TOPK_LANES);
  /* n compressed keys mean fewer than kernel + n·stride tokens */
  l.blocks = (c->attr[A_KERNEL].i + key_rows(c) * stride - 1) / c->attr[A_BLOCK].i + 1;
  l.tile_bytes = RGI_ROUND256((size_t)l.tiles * sizeof(rgi_tile));
  l.lse =
      l.q + RGI_ROUND256((size_t)(dot ? 2 : group) * (size_t)d * RGI_TOPK_LANES * sizeof(float));
  l.keys = l.lse + RGI_ROUND256((size_t)(dot ? 0 : group) * RGI_TOPK_LANES * sizeof(float));
  l.row = l.keys + RGI_ROUND256((size_t)d * RGI_TOPK_KEYS * sizeof(float));
  l.score = l.row + RGI_ROUND256((size_t)d * 4 * sizeof(float));
  l.rank = l.score + RGI_ROUND256((size_t)l.blocks * RGI_TOPK_LANES * sizeof(double));
  l.heap = l.rank + RGI_ROUND256((size_t)l.blocks * sizeof(uint64_t));
  l.thread_bytes = l.heap + RGI_ROUND256((size_t)c->attr[A_TOP_N].i * sizeof(uint64_t));
  return l;
}

static rgk_topk on_gpu(const rg_call *c);

static size_t workspace(const rg_call *c) {
  if (c->gpu) {
    rgk_topk p = on_gpu(c);
    return rgi_cuda_topk_workspace(&p, is_paged(c), c->gpu);
  }
  layout l = lay_out(c);
  return l.tile_bytes + l.thread_bytes * (size_t)c->threads;
}

/* ---- choosing ---- */

/* Order of scores as an order of integers: NaN lowest, -0 equal to 0. */
static uint64_t rank_of(double score) {
  uint64_t u;
  score += 0.0;
  if (score != score) return 0;
  memcpy(&u, &score, 8);
  return u >> 63 ? ~u : u | UINT64_C(1) << 63;
}

static void sift_down(uint64_t *heap, int64_t n, int64_t i) {
  uint64_t x = heap[i];
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && heap[child + 1] < heap[child]) child++;
    if (heap[child] >= x) break;
    heap[i] = heap[child];
  }
  heap[i] = x;
}

/* The keep-th largest of n ranks, 1 <= keep <= n; heap has room for keep. */
static uint64_t threshold(const uint64_t *rank, int64_t n, uint64_t *heap, int64_t keep) {
  memcpy(heap, rank, (size_t)keep * sizeof *heap);
  for (int64_t i = keep / 2 - 1; i >= 0; i--) sift_down(heap, keep, i);
  for (int64_t i = keep; i < n; i++)
    if (rank[i] > heap[0]) {
      heap[0] = rank[i];
      sift_down(heap, keep, 0);
    }
  return heap[0];
}

/* What one query may choose from; keys can only score blocks below `scored`. */
typedef struct choice {
  rgk_topk_choice of;
  int64_t scored;
} choice;

static choice choice_of(const rg_value *a, int64_t position, int64_t key_length) {
  const int64_t block = a[A_BLOCK].i, exist = (key_length + block - 1) / block;
  choice r = {rgk_topk_choose(position, position / block, (int32_t)block, (int32_t)a[A_INIT].i,
                              (int32_t)a[A_LOCAL].i, a[A_TAIL].i, (int32_t)a[A_TOP_N].i),
              exist};
  if (r.scored > r.of.free1) r.scored = r.of.free1;
  if (r.scored < r.of.free0) r.scored = r.of.free0;
  return r;
}

/* The least rank that is kept: the keep-th largest of those in rank and of the unscored blocks'
 * `nothing`. */
static uint64_t least_kept(const uint64_t *rank, choice r, uint64_t nothing, uint64_t *heap) {
  int64_t n = r.scored - r.of.free0, unscored = r.of.free1 - r.scored, over = 0;
  for (int64_t i = 0; i < n && unscored; i++) over += rank[i] >= nothing;
  if (!unscored || r.of.keep <= over) return threshold(rank, n, heap, r.of.keep);
  return r.of.keep <= over + unscored ? nothing : threshold(rank, n, heap, r.of.keep - unscored);
}

/* Writes a row. Where scores matter, rank[b - free0] are those of the scored blocks and `nothing`
 * that of the others; those above `least` are kept, then the first of those equal to it. */
static void write_row(int32_t *idx, int64_t top_n, choice r, const uint64_t *rank, uint64_t nothing,
                      uint64_t least) {
  int64_t n = 0, ties = r.of.keep, scored = r.scored - r.of.free0, unscored = r.of.free1 - r.scored;
  bool ranked = rgk_topk_ranks(r.of);
  for (int64_t b = 0; b < r.of.free0; b++) idx[n++] = (int32_t)b;
  if (ranked) {
    for (int64_t b = 0; b < scored; b++) ties -= rank[b] > least;
    if (nothing > least) ties -= unscored;
  }
  for (int64_t b = 0; b < scored && r.of.keep > 0; b++) {
    if (ranked && (rank[b] < least || (rank[b] == least && ties-- <= 0))) continue;
    idx[n++] = (int32_t)(r.of.free0 + b);
  }
  int64_t more = r.of.keep <= 0 || (ranked && nothing < least) ? 0 : unscored;
  if (ranked && nothing == least && more > ties) more = ties > 0 ? ties : 0;
  for (int64_t b = 0; b < more; b++) idx[n++] = (int32_t)(r.scored + b);
  for (int64_t b = r.of.free1; b < r.of.count; b++) idx[n++] = (int32_t)b;
  while (n < top_n) idx[n++] = NO_BLOCK;
}

/* ---- running ---- */

typedef struct job {
  const rg_call *c;
  layout l;
  rgi_topk_scores scores;
  const rgi_tile *tiles;
  const int32_t *cu, *cu_k, *offset;
  bool in_pages;
  rgi_paged paged; /* instead of the two */
  int64_t ntile, kv_heads, group;
  double scale;
} job;

/* Enough for what an fp32 sum flushes (each term below 1e-37, some thousands of them) not to
 * matter. */
#define FAST_LEAST 1e-25

/* Position of sequence b's first query. One that has no tokens in its pages is at the start of
 * nothing: it keeps what a query without keys keeps. */
static int64_t offset_of(const job *w, int64_t b, int64_t tokens) {
  if (!w->in_pages) return w->offset ? w->offset[b] : 0;
  return tokens ? tokens - (w->paged.cu[b + 1] - w->paged.cu[b]) : 0;
}

static void run_tile(void *arg, int64_t task, int thread) {
  const job *w = arg;
  const rg_call *c = w->c;
  const rg_value *a = c->attr;
  const rg_arg *q = rg_in(c, IN_Q), *k = rg_in(c, IN_K), *lse = rg_in(c, IN_LSE),
               *out = rg_out(c, 0);
  const bool softmax = by_softmax(c), dot = score_of(c) == RGK_TOPK_BY_DOT;
  const rg_arg *weight = rg_in(c, IN_WEIGHT);
  const int64_t kernel = a[A_KERNEL].i, stride = a[A_STRIDE].i, block = a[A_BLOCK].i,
                top_n = a[A_TOP_N].i;
  const rgi_tile *tile =
      &w->tiles[w->ntile - 1 - task / w->kv_heads]; /* late queries see more: they go first */
  const int64_t kh = task % w->kv_heads;
  const int64_t key_length =
      w->in_pages ? rgi_paged_tokens(&w->paged, tile->b) : w->cu_k[tile->b + 1] - w->cu_k[tile->b];
  const int64_t position = tile->first + offset_of(w, tile->b, key_length);
  const int64_t nkey = rgk_blocks_in(key_length, kernel, stride);
  char *mine = (char *)c->workspace + w->l.tile_bytes + (size_t)thread * w->l.thread_bytes;
  uint64_t *rank = (uint64_t *)(void *)(mine + w->l.rank),
           *heap = (uint64_t *)(void *)(mine + w->l.heap);
  const uint64_t nothing = rank_of(softmax ? 0 : -INFINITY);

  rgi_topk_tile t = {.d = q->dim[2],
                     .heads = w->group,
                     .n = tile->n,
                     .kernel = kernel,
                     .stride = stride,
                     .block = block,
                     .max = a[A_POOL].i == POOL_MAX,
                     .share = a[A_QUERY_BLOCK].i,
                     .first = tile->first,
                     .queries = w->cu[tile->b + 1] - w->cu[tile->b],
                     .scale = (float)w->scale,
                     .softcap = (float)a[A_SOFTCAP].f,
                     .q = rgi_at(q, tile->row, kh * w->group),
                     .q_row = q->stride[0],
                     .q_head = q->stride[1],
                     .dtype = q->dtype,
                     .k_dtype = k->dtype,
                     .pack_q = (float *)(void *)(mine + w->l.q),
                     .pack_lse = (float *)(void *)(mine + w->l.lse),
                     .pack_k = (float *)(void *)(mine + w->l.keys),
                     .row = (float *)(void *)(mine + w->l.row),
                     .score = mine + w->l.score};
  if (w->in_pages) {
    t.cache = k, t.head = kh, t.before = kernel / stride - 1;
    t.table = rgi_paged_table(&w->paged, tile->b);
  } else if (nkey) {
    t.k = rgi_at(k, w->cu_k[tile->b] / stride, kh);
    t.k_row = k->stride[0];
  }

  /* The blocks [block0, block1) that some row has to rank, and the keys that touch them. */
  int64_t block0 = INT64_MAX, block1 = 0;
  for (int64_t lane = 0; lane < RGI_TOPK_LANES; lane++) {
    t.visible[lane] = 0;
    if (lane >= tile->n) continue;
    choice r = choice_of(a, position + lane, key_length);
    int64_t seen = rgk_blocks_in(position + lane + 1, kernel, stride);
    t.visible[lane] = (int32_t)(seen < nkey ? seen : nkey);
    if (!rgk_topk_ranks(r.of)) continue;
    if (r.of.free0 < block0) block0 = r.of.free0;
    if (r.scored > block1) block1 = r.scored;
  }
  if (block0 < block1) {
    /* the first that ends after block0 begins */
    t.key0 = rgk_blocks_in(block0 * block, kernel, stride);
    t.key1 = block1 * block / stride;
    if (t.key1 > t.visible[tile->n - 1]) t.key1 = t.visible[tile->n - 1];
    if (dot) {
      w->scores.dot(&t, block0, block1);
    } else if (!softmax) {
      for (int64_t h = 0; h < w->group; h++)
        for (int64_t lane = 0; lane < RGI_TOPK_LANES; lane++) {
          float *to = &t.pack_lse[h * RGI_TOPK_LANES + lane];
          *to = 1;
          if (weight && lane < tile->n)
            rgi_load(to, weight->dtype, rgi_at(weight, tile->row + lane, kh * w->group + h), 1);
        }
      w->scores.relu(&t, block0, block1);
    } else {
      for (int64_t h = 0; h < w->group; h++)
        for (int64_t lane = 0; lane < RGI_TOPK_LANES; lane++)
          t.pack_lse[h * RGI_TOPK_LANES + lane] =
              lane < tile->n ? *(const float *)rgi_at(lse, tile->row + lane, kh * w->group + h)
                             : 0.0f;
      w->scores.fast(&t, block0, block1);
    }
  }

  bool wide[RGI_TOPK_LANES] = {false}, any_wide = false;
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t lane = 0; lane < tile->n; lane++) {
      if (pass == 1 && !wide[lane]) continue;
      choice r = choice_of(a, position + lane, key_length);
      uint64_t least = 0;
      if (rgk_topk_ranks(r.of)) {
        for (int64_t b = r.of.free0; b < r.scored; b++) {
          double s = !softmax || pass ? ((const double *)t.score)[b * RGI_TOPK_LANES + lane]
                                      : (double)((const float *)t.score)[b * RGI_TOPK_LANES + lane];
          rank[b - r.of.free0] = rank_of(s);
        }
        least = least_kept(rank, r, nothing, heap);
        if (softmax && pass == 0 && t.visible[lane] > 0 && least != 0 &&
            (least < rank_of(FAST_LEAST) || least == rank_of(INFINITY))) {
          wide[lane] = any_wide = true;
          continue;
        }
      }
      write_row(rgi_at(out, tile->row + lane, kh), top_n, r, rank, nothing, least);
    }
    if (!any_wide) return;
    if (pass == 0 && block0 < block1) w->scores.wide(&t, block0, block1);
  }
}

static rg_status run_cpu(const rg_call *c) {
  const rg_arg *q = rg_in(c, IN_Q), *k = rg_in(c, IN_K), *cu = rg_in(c, IN_CU),
               *cu_k = is_paged(c) ? NULL : rg_in(c, IN_CU_K);
  const rg_arg *offset = is_paged(c) ? NULL : rg_in(c, IN_OFFSET), *out = rg_out(c, 0);
  const int64_t nseq = cu->dim[0] - 1, stride = c->attr[A_STRIDE].i;
  const int32_t *starts = cu->data;
  job w = {.c = c,
           .l = lay_out(c),
           .scores = rgi_topk_scores_for(c->isa),
           .tiles = c->workspace,
           .cu = starts,
           .cu_k = cu_k ? cu_k->data : starts,
           .offset = offset ? offset->data : NULL,
           .in_pages = is_paged(c),
           .kv_heads = kv_heads_of(c),
           .group = q->dim[1] / kv_heads_of(c),
           .scale = c->attr[A_SCALE].f != 0 ? c->attr[A_SCALE].f : 1 / sqrt((double)q->dim[2])};
  if (w.in_pages) w.paged = paged_of(c);
  for (int64_t b = 0; b < nseq && !w.in_pages; b++) {
    int64_t n = rgk_blocks_in(w.cu_k[b + 1] - w.cu_k[b], c->attr[A_KERNEL].i, stride);
    if (n > 0 && w.cu_k[b] / stride + n > k->dim[0])
      return rg_op_fail(c->error, RG_E_DATA, c,
                        "sequence %lld has compressed keys up to row %lld, but k has %lld",
                        (long long)b, (long long)(w.cu_k[b] / stride + n), (long long)k->dim[0]);
  }
  w.ntile = rgi_fill_tiles(c->workspace, starts, nseq, RGI_TOPK_LANES);
  c->parallel(c->pool, w.ntile * w.kv_heads, run_tile, &w);
  for (int64_t row = starts[nseq]; row < q->dim[0]; row++)
    for (int64_t kh = 0; kh < w.kv_heads; kh++) {
      int32_t *idx = rgi_at(out, row, kh);
      for (int64_t n = 0; n < c->attr[A_TOP_N].i; n++) idx[n] = DEAD_ROW;
    }
  return RG_OK;
}

/* ---- on a GPU ---- */

static bool steps_by_16(const rg_arg *a) {
  const int64_t unit = 16 / (int64_t)rg_dtype_size(a->dtype);
  bool even = a->align >= 16;
  for (int i = 0; i + 1 < a->rank; i++) even = even && a->stride[i] % unit == 0;
  return even;
}

static rgk_topk on_gpu(const rg_call *c) {
  const bool paged = is_paged(c);
  const rg_arg *q = rg_in(c, IN_Q), *k = rg_in(c, IN_K), *cu = rg_in(c, IN_CU),
               *cu_k = paged ? NULL : rg_in(c, IN_CU_K),
               *offset = paged ? NULL : rg_in(c, IN_OFFSET);
  const rg_value *a = c->attr;
  rgk_topk p = {.dtype = (int32_t)q->dtype,
                .H = (int32_t)q->dim[1],
                .KH = (int32_t)kv_heads_of(c),
                .D = (int32_t)q->dim[2],
                .seqs = rgk_seqs_of(cu, q->dim[0]),
                .kseqs = rgk_seqs_of(cu_k ? cu_k : cu, k->dim[0]),
                .offset = offset ? offset->data : NULL,
                .T = q->dim[0],
                .S = key_rows(c),
                .softcap = (float)a[A_SOFTCAP].f,
                .kernel = (int32_t)a[A_KERNEL].i,
                .stride = (int32_t)a[A_STRIDE].i,
                .block = (int32_t)a[A_BLOCK].i,
                .top_n = (int32_t)a[A_TOP_N].i,
                .init = (int32_t)a[A_INIT].i,
                .local = (int32_t)a[A_LOCAL].i,
                .score = (int32_t)score_of(c),
                .max = a[A_POOL].i == POOL_MAX,
                .tail = a[A_TAIL].i,
                .share = (int32_t)a[A_QUERY_BLOCK].i,
                .q = rgk_of(q),
                .k = paged ? rgk_page_of(k) : rgk_of(k),
                .lse = rgk_of(rg_in(c, IN_LSE)),
                .weight = rgk_of(rg_in(c, IN_WEIGHT)),
                .idx = rgk_of(rg_out(c, 0)),
                .aligned = steps_by_16(q) && steps_by_16(k)};
  p.G = p.KH > 0 ? p.H / p.KH : 0;
  p.scale = (float)(a[A_SCALE].f != 0 ? a[A_SCALE].f : 1 / sqrt((double)(p.D > 0 ? p.D : 1)));
  /* a query's own block is the last */
  p.most_keep = paged || offset || p.T == 0 ? p.top_n : (p.T - 1) / p.block + 1;
  if (p.most_keep > p.top_n) p.most_keep = p.top_n;
  return p;
}
/* NULL where keys are not in pages. */
static const rgk_pages *pages_on_gpu(const rg_call *c, rgk_pages *room) {
  const int64_t stride = c->attr[A_STRIDE].i;
  if (!is_paged(c)) return NULL;
  *room = rgi_cuda_pages(rg_in(c, IN_CONTEXT), rg_in(c, IN_PAGES), rg_in(c, IN_K), NULL, stride,
                         c->attr[A_KERNEL].i / stride - 1);
  return room;
}
static rg_status steps(const rg_call *c, rg_cuda *x) {
  rgk_pages pages;
  rgk_topk p = on_gpu(c);
  return rgi_cuda_topk_steps(&p, pages_on_gpu(c, &pages), c->gpu, c->workspace, x);
}
static const char *path(const rg_call *c) {
  rgk_pages pages;
  rgk_topk p = on_gpu(c);
  return rgi_cuda_topk_path(&p, pages_on_gpu(c, &pages), c->gpu);
}

rgk_topk rgi_paged_topk_view(const rg_call *c, rgk_pages *pages) {
  pages_on_gpu(c, pages);
  return on_gpu(c);
}

const rg_op rgi_op_topk = {
    .abi = RG_OP_ABI,
    .name = "topk",
    .doc = "chooses the blocks of keys that each query attends to",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_QUERYWISE,
    .in = in_ports,
    .nin = IN_COUNT,
    .out = out_ports,
    .nout = 1,
    .attrs = attrs,
    .nattr = A_COUNT,
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = run_cpu,
    .cuda_steps = steps,
    .cuda_path = path,
};

/* ---- over pages ---- */

static const rg_port in_paged[] = {
    {"q", "T,H,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "queries"},
    {"k_cache", "P,R,KH,D", 0, RG_D_FLOAT, 'C', -1,
     "compressed keys in pages of R = page/stride rows, as kv_compress leaves them"},
    {"lse", "T,H", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D(RG_F32), 0, -1,
     "log-sum-exp of the attention over the compressed keys; needed by score softmax"},
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the sequences"},
    RGI_PAGED_IN,
    {"weight", "T,H", RG_PORT_ROWS | RG_PORT_OPTIONAL, RG_D_FLOAT, 'W', -1,
     "factors of the heads in score relu; absent: 1"},
};
static const rg_port out_paged[] = {
    {"idx", "T,KH,top_n", RG_PORT_ROWS, RG_D(RG_I32), 0, -1,
     "chosen blocks, ascending, then -1; rows past the last live token are 0"},
};

static bool joins(const rg_call *first, const rg_call *c, bool split) {
  rgk_pages pages, same;
  const rgi_attn a = rgi_attn_describe(first);
  const rgk_attn k = rgi_cuda_paged_view(&a, &pages);
  const rgk_topk p = rgi_paged_topk_view(c, &same);
  return rgi_decode_takes(&k, &p, &pages, c->gpu, split);
}

const rg_op rgi_op_paged_topk = {
    .abi = RG_OP_ABI,
    .name = "paged_topk",
    .doc = "topk over compressed keys in pages",
    .in = in_paged,
    .nin = RGI_COUNT(in_paged),
    .out = out_paged,
    .nout = 1,
    .attrs = attrs,
    .nattr = A_COUNT,
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = run_cpu,
    .cuda_steps = steps,
    .cuda_path = path,
    .rules = &(const rgi_rules){.fusing = &(const rgi_fusing){.with = "paged_cmp_attn",
                                                              .link = "lse",
                                                              .joined = "paged_cmp_topk",
                                                              .joins = joins}},
};
