/* ops/compress_kv_bwd.c: gradients of compress_kv.

   Blocks overlap, so a token gathers from all blocks that hold it. Cut a sequence into groups of
   `stride` tokens, and let R = kernel / stride. Block j covers groups j … j+R-1, so with g_j the
   gradient of W x_j (before the gate),

       d group m  =  Σ_s  W_sᵀ g_{m-s},   s = 0 … R-1,
       W_s = the columns [s·stride·D, (s+1)·stride·D) of W

   which is R plain products, no scatter. The g of one head are stored with R-1 zero rows before
   each sequence's and R-1 after the last, and group number i of the pack, counting only groups that
   a block covers, needs exactly rows i + R-1-s:

       rows    0 0 g g g g g 0 0 g g 0 0        R = 3, sequences of 5 and 2 blocks
       groups      0 1 2 3 4 5 6 7 8 9 10       group i at row i + R-1, reaching back to row i

   dW = Σ over heads, last to first, of Σ over blocks g xᵀ, head by head onto what is there: cutting
   the heads into groups walked last to first changes no bit. The mean has no W: its d group m is
   Σ_j dy_j / kernel.
 */
#include "cpu/compress.h"
#include "cuda/compress.h"

enum {
  IN_K,
  IN_V,
  IN_K_WEIGHT,
  IN_V_WEIGHT,
  IN_CU,
  IN_GRAD_K,
  IN_GRAD_V,
  IN_ACC_K,
  IN_ACC_V,
  IN_ACC_K_WEIGHT,
  IN_ACC_V_WEIGHT
};
enum { OUT_K, OUT_V, OUT_K_WEIGHT, OUT_V_WEIGHT };

#define MEAN_TOKENS 64 /* per task */

/* The workspace, in order:
 *
 *   | token | row | padded | group | g | sum of dW, if it is not f32 |
 *   | per thread: product's room, a tile | */
typedef struct layout {
  size_t table;  /* bytes of one table of T/stride numbers */
  size_t g;      /* [T/stride + R-1, rows of W] f32 */
  size_t sum;    /* [rows of W, kernel·D] f32, or none */
  size_t thread; /* per thread */
} layout;

typedef struct side {
  const rg_call *c;
  const rg_arg *x;  /* [T, KH, D] */
  const rg_arg *w;  /* [D or 2D, kernel·D] or NULL */
  const rg_arg *dy; /* [T/stride, KH, D] or NULL: zero */
  const rg_arg *dx, *dw;
  const rg_arg *cu; /* [B+1] */
  bool add_x, add_w;
  rgi_compress_method method;
  int64_t kernel, stride, overlap; /* overlap: R */
  const int32_t *token, *row;      /* of each block */
  int32_t *padded;                 /* where g of each block is stored */
  int32_t *group;                  /* first token of each covered group */
  int64_t nblock, ngroup;
  float *g;   /* of one head */
  float *sum; /* where dW is summed, row stride ldsum */
  int64_t ldsum;
  char *scratch;
  size_t per_thread;
  int64_t head, tile;
  rgi_tiling tiling;
  bool first; /* the first head summed into dW overwrites, unless add_w */
} side;

static layout layout_of(const rg_call *c, int i) {
  const rg_arg *w = rg_in(c, IN_K_WEIGHT + i), *dw = rg_out(c, OUT_K_WEIGHT + i);
  int64_t stride = c->attr[RGI_CMP_STRIDE].i, blocks = rg_in(c, IN_K)->dim[0] / stride;
  layout l = {.table = RGI_ROUND256(blocks * 4)};
  if (!w) return l;
  int64_t overlap = c->attr[RGI_CMP_KERNEL].i / stride,
          widest = w->dim[0] > RGI_GEMM_NC ? w->dim[0] : RGI_GEMM_NC;
  l.g = RGI_ROUND256((size_t)(blocks + overlap - 1) * (size_t)w->dim[0] * 4);
  if (dw && dw->dtype != RG_F32) l.sum = RGI_ROUND256((size_t)w->dim[0] * (size_t)w->dim[1] * 4);
  l.thread = RGI_GEMM_WORK + RGI_ROUND256((size_t)RGI_GEMM_MC * (size_t)widest * 4);
  return l;
}

/* ---- the mean ---- */

/* Tokens [row, end) of one group receive the same value: blocks [j0, j1) of the
 * sequence whose rows start at `base`. */
static void mean_group(const side *s, int64_t row, int64_t end, int64_t base, int64_t j0,
                       int64_t j1) {
  const rg_arg *dx = s->dx, *dy = s->dy;
  float scale = 1.0f / (float)s->kernel, sum[RGI_PIECE], term[RGI_PIECE];
  for (int64_t h = 0; h < dx->dim[1]; h++)
    for (int64_t d = 0; d < dx->dim[2]; d += RGI_PIECE) {
      int64_t width = dx->dim[2] - d < RGI_PIECE ? dx->dim[2] - d : RGI_PIECE;
      memset(sum, 0, (size_t)width * 4);
      for (int64_t j = j0; j < j1; j++) {
        const char *at =
            (const char *)rgi_at(dy, base + j, h) + (size_t)d * rg_dtype_size(dy->dtype);
        rgi_load_by(s->c->isa, term, dy->dtype, at, width);
        rgi_store_add(sum, term, width);
      }
      for (int64_t i = 0; i < width; i++) sum[i] *= scale;
      for (int64_t t = row; t < end; t++) {
        char *to = (char *)rgi_at(dx, t, h) + (size_t)d * rg_dtype_size(dx->dtype);
        rgi_put_grad(s->c->isa, s->add_x, to, dx->dtype, sum, width);
      }
    }
}

/* All tokens of the mean; of a learned method only those that no block holds. */
static void mean_task(void *arg, int64_t task, int thread) {
  const side *s = arg;
  const int32_t *cu = s->cu->data;
  (void)thread;
  int64_t nseq = s->cu->dim[0] - 1, live = cu[nseq], row = task * MEAN_TOKENS,
          end = row + MEAN_TOKENS;
  if (end > live) end = live;
  if (row >= end) return;
  for (int64_t b = rgi_sequence_of(cu, nseq, row); row < end;) {
    while (cu[b + 1] <= row) b++;
    int64_t m = (row - cu[b]) / s->stride, stop = cu[b] + (m + 1) * s->stride;
    if (stop > cu[b + 1]) stop = cu[b + 1];
    if (stop > end) stop = end;
    int64_t count = rgk_blocks_in(cu[b + 1] - cu[b], s->kernel, s->stride);
    int64_t j0 = m - s->overlap + 1 > 0 ? m - s->overlap + 1 : 0,
            j1 = m + 1 < count ? m + 1 : count;
    bool covered =
        /* by a block; without one the gradient is +0, which still has to be added to a sum of -0 */
        j0 < j1;
    if (covered ? s->method == RGI_MEAN : s->add_x)
      mean_group(s, row, stop, cu[b] / s->stride, j0, j1);
    row = stop;
  }
}

/* ---- learned compression, one head ---- */

/* dy through the gate: g = d(W x) of a tile of blocks. */
static void gate_task(void *arg, int64_t task, int thread) {
  const side *s = arg;
  const rg_arg *w = s->w, *dy = s->dy;
  int64_t first = task * s->tile, d = s->x->dim[2], n = w->dim[0];
  int64_t rows = s->nblock - first < s->tile ? s->nblock - first : s->tile;
  char *work = s->scratch + (size_t)thread * s->per_thread;
  float *pre = (float *)(work + RGI_GEMM_WORK); /* [rows, 2D]: a and b again */
  if (rgi_compress_gated(s->method)) {
    rgi_mat blocks = rgi_compress_flatten(s->x, s->head, s->token);
    rgi_mat weight = {.data = w->data, .type = w->dtype, .stride = w->stride[0]};
    blocks.row0 = first;
    rgi_gemm(s->c->isa, work, rows, n, w->dim[1], &blocks, &weight, pre, n, false);
  }
  for (int64_t r = 0; r < rows; r++) {
    float *g = s->g + s->padded[first + r] * n, *a = pre + r * n, *b = a + d;
    rgi_load_by(s->c->isa, g, dy->dtype, rgi_at(dy, s->row[first + r], s->head), d);
    if (s->method == RGI_LINEAR) continue;
    for (int64_t i = 0; i < d; i++) {
      float p = rgi_sigmoid(a[i]), up = g[i];
      bool silu = s->method == RGI_SWIGLU;
      g[i] = up * b[i] * p * (silu ? 1.0f + a[i] * (1.0f - p) : 1.0f - p);
      g[d + i] = up * p * (silu ? a[i] : 1.0f);
    }
  }
}

/* dx of a tile of covered groups × whole tokens of a group. */
static void token_task(void *arg, int64_t task, int thread) {
  const side *s = arg;
  const rg_arg *w = s->w, *dx = s->dx;
  int64_t d = dx->dim[2], n = w->dim[0], per = s->tiling.n; /* tokens per tile */
  int64_t i0 = task / s->tiling.across * s->tiling.m, p0 = task % s->tiling.across * per;
  int64_t rows = s->ngroup - i0 < s->tiling.m ? s->ngroup - i0 : s->tiling.m;
  int64_t tokens = s->stride - p0 < per ? s->stride - p0 : per;
  char *work = s->scratch + (size_t)thread * s->per_thread;
  float *out = (float *)(work + RGI_GEMM_WORK); /* [rows, tokens·D] */
  for (int64_t o = 0; o < s->overlap; o++) {
    rgi_mat g = {.data = s->g, .type = RG_F32, .stride = n, .row0 = i0 + s->overlap - 1 - o};
    rgi_mat weight = {.data = w->data,
                      .type = w->dtype,
                      .stride = w->stride[0],
                      .col0 = (o * s->stride + p0) * d,
                      .k_rows = true};
    rgi_gemm(s->c->isa, work, rows, tokens * d, n, &g, &weight, out, tokens * d, o > 0);
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t p = 0; p < tokens; p++)
      rgi_put_grad(s->c->isa, s->add_x, rgi_at(dx, s->group[i0 + r] + p0 + p, s->head), dx->dtype,
                   out + (r * tokens + p) * d, d);
}

/* A tile of dW. */
static void weight_task(void *arg, int64_t task, int thread) {
  const side *s = arg;
  const rgi_tiling *t = &s->tiling;
  int64_t i0 = task / t->across * t->m, j0 = task % t->across * t->n;
  int64_t m = s->w->dim[0] - i0 < t->m ? s->w->dim[0] - i0 : t->m;
  int64_t n = s->w->dim[1] - j0 < t->n ? s->w->dim[1] - j0 : t->n;
  rgi_mat g = {.data = s->g,
               .type = RG_F32,
               .stride = s->w->dim[0],
               .row = s->padded,
               .col0 = i0,
               .k_rows = true};
  rgi_mat blocks = rgi_compress_flatten(s->x, s->head, s->token);
  blocks.col0 = j0;
  blocks.k_rows = true;
  rgi_gemm(s->c->isa, s->scratch + (size_t)thread * s->per_thread, m, n, s->nblock, &g, &blocks,
           s->sum + i0 * s->ldsum + j0, s->ldsum, s->add_w || !s->first);
}

/* Numbers the covered groups and places each block's g among zero rows (see the top). */
static void place(side *s) {
  const int32_t *cu = s->cu->data;
  int64_t q = 0;
  s->ngroup = 0;
  for (int64_t b = 0; b + 1 < s->cu->dim[0]; b++) {
    int64_t count = rgk_blocks_in(cu[b + 1] - cu[b], s->kernel, s->stride);
    if (count == 0) continue;
    for (int64_t j = 0; j < count; j++) s->padded[q++] = (int32_t)(s->ngroup + s->overlap - 1 + j);
    for (int64_t m = 0; m < count + s->overlap - 1; m++)
      s->group[s->ngroup++] = (int32_t)(cu[b] + m * s->stride);
  }
  memset(s->g, 0, (size_t)(s->ngroup + s->overlap - 1) * (size_t)s->w->dim[0] * 4);
}

static void learned(side *s) {
  const rg_call *c = s->c;
  int64_t heads = s->x->dim[1], d = s->x->dim[2];
  place(s);
  s->first = true;
  for (s->head = heads - 1; s->head >= 0; s->head--) {
    s->tile = rgi_compress_tile(s->nblock, 1, c->threads);
    c->parallel(c->pool, (s->nblock + s->tile - 1) / s->tile, gate_task, s);
    if (s->dx) {
      s->tiling = rgi_gemm_tiling(s->ngroup, s->stride * d, c->threads);
      /* in tokens: a tile is at most max(NC, D) wide */
      s->tiling.n = s->tiling.n > d ? s->tiling.n / d : 1;
      s->tiling.across = (s->stride + s->tiling.n - 1) / s->tiling.n;
      c->parallel(c->pool, s->tiling.across * ((s->ngroup + s->tiling.m - 1) / s->tiling.m),
                  token_task, s);
    }
    if (s->dw) {
      s->tiling = rgi_gemm_tiling(s->w->dim[0], s->w->dim[1], c->threads);
      c->parallel(c->pool, s->tiling.count, weight_task, s);
    }
    s->first = false;
  }
}

/* ---- both ---- */

static void zero_run(void *user, const rgi_run *r) {
  const rg_arg *a = user;
  memset(rgi_run_at(r, a), 0, (size_t)r->n * rg_dtype_size(a->dtype));
}

static void zero(const rg_call *c, const rg_arg *a) {
  rgi_walk w;
  rgi_walk_begin(&w, a, 0);
  rgi_walk_run(c, &w, zero_run, (void *)(uintptr_t)a);
}

/* dW from the fp32 sum to its own type. */
static void store_weight(const side *s) {
  for (int64_t i = 0; i < s->dw->dim[0]; i++)
    rgi_store_by(s->c->isa, rgi_at(s->dw, i, 0), s->dw->dtype, s->sum + i * s->ldsum,
                 s->dw->dim[1]);
}

static rg_status backward(const rg_call *c) {
  const rg_arg *cu = rg_in(c, IN_CU);
  int64_t kernel = c->attr[RGI_CMP_KERNEL].i, stride = c->attr[RGI_CMP_STRIDE].i;
  size_t table = layout_of(c, 0).table;
  char *at = c->workspace;
  int32_t *token = (int32_t *)at, *row = (int32_t *)(at + table);
  int64_t nblock = rgi_compress_blocks(cu->data, cu->dim[0] - 1, kernel, stride, token, row);
  for (int i = 0; i < 2; i++) {
    layout l = layout_of(c, i);
    char *g = at + 4 * table, *sum = g + l.g;
    side s = {.c = c,
              .x = rg_in(c, IN_K + i),
              .w = rg_in(c, IN_K_WEIGHT + i),
              .dy = rg_in(c, IN_GRAD_K + i),
              .dx = rg_out(c, OUT_K + i),
              .dw = rg_out(c, OUT_K_WEIGHT + i),
              .cu = cu,
              .add_x = rg_in(c, IN_ACC_K + i) != NULL,
              .add_w = rg_in(c, IN_ACC_K_WEIGHT + i) != NULL,
              .method = rgi_compress_method_of(c, i),
              .kernel = kernel,
              .stride = stride,
              .overlap = kernel / stride,
              .token = token,
              .row = row,
              .padded = (int32_t *)(at + 2 * table),
              .group = (int32_t *)(at + 3 * table),
              .nblock = nblock,
              .g = (float *)g,
              .scratch = sum + l.sum,
              .per_thread = l.thread};
    if (s.dx && !s.add_x) zero(c, s.dx);
    if (!s.dy) {
      if (s.dw && !s.add_w) zero(c, s.dw);
      continue;
    }
    if (s.dx && (s.method == RGI_MEAN || s.add_x))
      c->parallel(c->pool, (s.dx->dim[0] + MEAN_TOKENS - 1) / MEAN_TOKENS, mean_task, &s);
    if (s.method == RGI_MEAN || (!s.dx && !s.dw)) continue;
    if (s.dw) {
      bool direct = s.dw->dtype == RG_F32;
      s.sum = direct ? s.dw->data : (float *)sum;
      s.ldsum = direct ? s.dw->stride[0] : s.dw->dim[1];
    }
    learned(&s);
    if (s.dw && s.dw->dtype != RG_F32) store_weight(&s);
  }
  return RG_OK;
}

static size_t workspace(const rg_call *c) {
  if (c->gpu) return rgi_cuda_compress_bwd_workspace(c);
  size_t most = 0;
  for (int i = 0; i < 2; i++) {
    layout l = layout_of(c, i);
    size_t bytes = l.g + l.sum + (size_t)c->threads * l.thread;
    if (bytes > most) most = bytes;
  }
  return 4 * layout_of(c, 0).table + most;
}

static rg_status check(const rg_call *c, rg_error *e) {
  return rgi_compress_check(c, e, rg_in(c, IN_K), rg_in(c, IN_V), rg_in(c, IN_K_WEIGHT),
                            rg_in(c, IN_V_WEIGHT));
}

static void cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.bytes = rgi_call_bytes(c)};
  for (int i = 0; i < 2; i++) {
    const rg_arg *x = rg_in(c, IN_K + i);
    rgi_compress_method m = rgi_compress_method_of(c, i);
    bool dx = rg_out(c, OUT_K + i) != NULL, dw = rg_out(c, OUT_K_WEIGHT + i) != NULL;
    if (!rg_in(c, IN_GRAD_K + i) || (!dx && !dw)) continue;
    out->flops += rgi_compress_flops(c, x, m) * (dx + dw + rgi_compress_gated(m));
    out->exps += rgi_compress_exps(c, x, m);
  }
}

static const rg_port in[] = {
    {"k", "T,KH,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "keys"},
    {"v", "T,KH,E", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "values"},
    {"k_weight", "KM,KN", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "as forward"},
    {"v_weight", "VM,VN", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "as forward"},
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the sequences"},
    {"grad.k", "T/stride,KH,D", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', 1,
     "gradient of the compressed keys"},
    {"grad.v", "T/stride,KH,E", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', 1,
     "gradient of the compressed values"},
    {"acc.k", "T,KH,D", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "sum so far"},
    {"acc.v", "T,KH,E", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "sum so far"},
    {"acc.k_weight", "KM,KN", RG_PORT_OPTIONAL, RG_D(RG_F32), 0, -1, "sum so far"},
    {"acc.v_weight", "VM,VN", RG_PORT_OPTIONAL, RG_D(RG_F32), 0, -1, "sum so far"},
};
static const rg_port out[] = {
    {"d.k", "T,KH,D", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', 1,
     "gradient of k"},
    {"d.v", "T,KH,E", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', 1,
     "gradient of v"},
    {"d.k_weight", "KM,KN", RG_PORT_GRAD | RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1,
     "gradient of k_weight"},
    {"d.v_weight", "VM,VN", RG_PORT_GRAD | RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1,
     "gradient of v_weight"},
};

const rg_op rgi_op_compress_kv_bwd = {
    .abi = RG_OP_ABI,
    .name = "compress_kv.bwd",
    .doc = "gradients of compress_kv",
    .flags = RG_OP_INTERNAL,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = rgi_compress_attrs,
    .nattr = RGI_CMP_NATTR,
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = backward,
    .cuda_steps = rgi_cuda_compress_bwd,
    .cuda_path = rgi_cuda_compress_path,
};
