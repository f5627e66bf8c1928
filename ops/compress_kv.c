/* ops/compress_kv.c: keys and values of overlapping token blocks become one key and value each.

       block j of a sequence = its tokens [j·stride, j·stride + kernel)      x_j = flatten of that,
                                                                             [kernel·D]
       mean         y_j = (1/kernel) Σ_p x[j·stride + p]
       linear       y_j = W x_j                              W [D, kernel·D]
       swiglu       y_j = silu(a) · b,     (a, b) = W x_j    W [2D, kernel·D]
       sigmoid_mul  y_j = sigmoid(a) · b

   Without v, keys alone are compressed. All heads share W. The blocks of a head are rows of a
   matrix that is never built: row j begins at a token and its columns run over tokens and features,
   so the product gathers them while packing.
 */
#include "cpu/compress.h"
#include "cuda/compress.h"

/* ---- shared with the backward ---- */

static const char *const methods[] = {"mean", "linear", "swiglu", "sigmoid_mul", NULL};

const rg_attr rgi_compress_attrs[RGI_CMP_NATTR] = {
    {"kernel", RG_ATTR_INT, true, 1, 1 << 20, 0, NULL, "tokens per block"},
    {"stride", RG_ATTR_INT, true, 1, 1 << 20, 0, NULL,
     "tokens from one block to the next; divides kernel"},
    {"k_method", RG_ATTR_ENUM, false, 0, 0, RGI_MEAN, methods, "how a block of keys becomes one"},
    {"v_method", RG_ATTR_ENUM, false, 0, 0, RGI_MEAN, methods, "how a block of values becomes one"},
};

int64_t rgi_compress_blocks(const int32_t *cu, int64_t nseq, int64_t kernel, int64_t stride,
                            int32_t *token, int32_t *row) {
  int64_t n = 0;
  for (int64_t b = 0; b < nseq; b++) {
    int64_t count = rgk_blocks_in(cu[b + 1] - cu[b], kernel, stride);
    for (int64_t j = 0; j < count; j++, n++) {
      token[n] = (int32_t)(cu[b] + j * stride);
      row[n] = (int32_t)(cu[b] / stride + j);
    }
  }
  return n;
}

static rg_status check_weight(const rg_call *c, rg_error *e, const char *side, int method,
                              const rg_arg *x, const rg_arg *w) {
  if (!x && w) return rg_op_fail(e, RG_E_USAGE, c, "%s_weight is given, but no %s", side, side);
  if (!x) return RG_OK;
  if (method == RGI_MEAN) {
    if (!w) return RG_OK;
    return rg_op_fail(e, RG_E_USAGE, c, "%s_weight is given, but %s_method mean takes none", side,
                      side);
  }
  if (!w)
    return rg_op_fail(e, RG_E_USAGE, c, "%s_method %s needs an input %s_weight", side,
                      methods[method], side);
  int64_t d = x->dim[2], kernel = c->attr[RGI_CMP_KERNEL].i;
  int64_t rows = rgi_compress_gated((rgi_compress_method)method) ? 2 * d : d, columns;
  if (d == RG_DIM_FREE) return RG_OK;
  if (!rgi_mul(kernel, d, &columns))
    return rg_op_fail(e, RG_E_OVERFLOW, c, "kernel %lld times %lld features overflows",
                      (long long)kernel, (long long)d);
  if ((w->dim[0] != rows && w->dim[0] != RG_DIM_FREE) ||
      (w->dim[1] != columns && w->dim[1] != RG_DIM_FREE))
    return rg_op_fail(e, RG_E_SHAPE, c,
                      "%s_weight is [%lld, %lld], expected [%lld, %lld] for %s over %lld features",
                      side, (long long)w->dim[0], (long long)w->dim[1], (long long)rows,
                      (long long)columns, methods[method], (long long)d);
  return RG_OK;
}

rg_status rgi_compress_check(const rg_call *c, rg_error *e, const rg_arg *k, const rg_arg *v,
                             const rg_arg *k_weight, const rg_arg *v_weight) {
  int64_t kernel = c->attr[RGI_CMP_KERNEL].i, stride = c->attr[RGI_CMP_STRIDE].i;
  if (kernel % stride)
    return rg_op_fail(e, RG_E_VALUE, c, "stride %lld does not divide kernel %lld",
                      (long long)stride, (long long)kernel);
  RGI_TRY(check_weight(c, e, "k", (int)c->attr[RGI_CMP_K_METHOD].i, k, k_weight));
  return check_weight(c, e, "v", (int)c->attr[RGI_CMP_V_METHOD].i, v, v_weight);
}

double rgi_compress_flops(const rg_call *c, const rg_arg *x, rgi_compress_method method) {
  int64_t kernel = c->attr[RGI_CMP_KERNEL].i;
  double blocks =
      (double)rgk_blocks_in(x->dim[0], kernel, c->attr[RGI_CMP_STRIDE].i) * (double)x->dim[1];
  double d = (double)x->dim[2], sums = blocks * d * (double)kernel;
  if (method == RGI_MEAN) return sums;
  return 2 * sums * d * (rgi_compress_gated(method) ? 2 : 1);
}

double rgi_compress_exps(const rg_call *c, const rg_arg *x, rgi_compress_method method) {
  if (!rgi_compress_gated(method)) return 0;
  int64_t blocks = rgk_blocks_in(x->dim[0], c->attr[RGI_CMP_KERNEL].i, c->attr[RGI_CMP_STRIDE].i);
  return (double)blocks * (double)x->dim[1] * (double)x->dim[2];
}

/* ---- forward ---- */

enum { IN_K, IN_V, IN_K_WEIGHT, IN_V_WEIGHT, IN_CU };
enum { OUT_K, OUT_V };

#define MEAN_ROWS 16 /* output rows per task */

typedef struct side {
  const rg_call *c;
  const rg_arg *x; /* [T, KH, D] */
  const rg_arg *w; /* [D or 2D, kernel·D] or NULL */
  const rg_arg *y; /* [T/stride, KH, D] */
  rgi_compress_method method;
  const int32_t *token, *row; /* the blocks */
  int64_t nblock;
  char *scratch; /* per thread: room for the product, then its result [tile, rows of W] */
  int64_t tile, tiles;
} side;

void rgi_compress_mean(const rg_call *c, const rg_arg *x, int64_t token, int64_t head, int64_t d,
                       int64_t width, float *sum) {
  const int64_t kernel = c->attr[RGI_CMP_KERNEL].i, stride = c->attr[RGI_CMP_STRIDE].i;
  float part[RGI_PIECE], term[RGI_PIECE];
  for (int64_t p = 0; p < kernel; p++) {
    const char *at = (const char *)rgi_at(x, token + p, head) + (size_t)d * rg_dtype_size(x->dtype);
    bool opens = p % stride == 0, closes = (p + 1) % stride == 0;
    rgi_load_by(c->isa, opens ? part : term, x->dtype, at, width);
    if (!opens) rgi_store_add(part, term, width);
    if (!closes) continue;
    if (p < stride)
      memcpy(sum, part, (size_t)width * 4);
    else
      rgi_store_add(sum, part, width);
  }
  float scale = 1.0f / (float)kernel;
  for (int64_t i = 0; i < width; i++) sum[i] *= scale;
}

/* Output rows without a block are zeroed; the others take the mean, or are left to product_task. */
static void rows_task(void *arg, int64_t task, int thread) {
  const side *s = arg;
  const rg_arg *y = s->y;
  (void)thread;
  int64_t first = task * MEAN_ROWS,
          end = first + MEAN_ROWS < y->dim[0] ? first + MEAN_ROWS : y->dim[0];
  int64_t low = 0, high = s->nblock; /* the first block in row `first` or later */
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (s->row[middle] < first)
      low = middle + 1;
    else
      high = middle;
  }
  for (int64_t r = first; r < end; r++) {
    bool live = low < s->nblock && s->row[low] == r;
    int64_t token = live ? s->token[low++] : 0;
    if (live && s->method != RGI_MEAN) continue;
    for (int64_t h = 0; h < y->dim[1]; h++) {
      char *to = rgi_at(y, r, h);
      size_t size = rg_dtype_size(y->dtype);
      if (!live) memset(to, 0, (size_t)y->dim[2] * size);
      for (int64_t d = 0; live && d < y->dim[2]; d += RGI_PIECE) {
        float sum[RGI_PIECE];
        int64_t width = y->dim[2] - d < RGI_PIECE ? y->dim[2] - d : RGI_PIECE;
        rgi_compress_mean(s->c, s->x, token, h, d, width, sum);
        rgi_store_by(s->c->isa, to + (size_t)d * size, y->dtype, sum, width);
      }
    }
  }
}

void rgi_compress_gate(rgi_compress_method method, float *a, int64_t d) {
  const float *b = a + d;
  if (method == RGI_SWIGLU)
    for (int64_t i = 0; i < d; i++) a[i] = a[i] * rgi_sigmoid(a[i]) * b[i];
  else if (method == RGI_SIGMOID_MUL)
    for (int64_t i = 0; i < d; i++) a[i] = rgi_sigmoid(a[i]) * b[i];
}

static size_t scratch_per_thread(const rg_arg *w) {
  return RGI_GEMM_WORK + RGI_ROUND256((size_t)RGI_GEMM_MC * (size_t)w->dim[0] * 4);
}

/* One tile of one head's blocks through W and the gate. */
static void product_task(void *arg, int64_t task, int thread) {
  const side *s = arg;
  const rg_arg *w = s->w, *y = s->y;
  int64_t head = task / s->tiles, first = task % s->tiles * s->tile, d = y->dim[2], n = w->dim[0];
  int64_t rows = s->nblock - first < s->tile ? s->nblock - first : s->tile;
  char *work = s->scratch + (size_t)thread * scratch_per_thread(w);
  float *out = (float *)(work + RGI_GEMM_WORK); /* [rows, n] */
  rgi_mat blocks = rgi_compress_flatten(s->x, head, s->token);
  rgi_mat weight = {.data = w->data, .type = w->dtype, .stride = w->stride[0]};
  blocks.row0 = first;
  rgi_gemm(s->c->isa, work, rows, n, w->dim[1], &blocks, &weight, out, n, false);
  for (int64_t r = 0; r < rows; r++) {
    rgi_compress_gate(s->method, out + r * n, d);
    rgi_store_by(s->c->isa, rgi_at(y, s->row[first + r], head), y->dtype, out + r * n, d);
  }
}

static int64_t table_bytes(const rg_call *c) {
  return (int64_t)RGI_ROUND256(rg_in(c, IN_K)->dim[0] / c->attr[RGI_CMP_STRIDE].i * 4);
}

static rg_status forward(const rg_call *c) {
  const rg_arg *cu = rg_in(c, IN_CU);
  rgi_cut at = {.base = c->workspace};
  int32_t *token = rgi_take(&at, (size_t)table_bytes(c)),
          *row = rgi_take(&at, (size_t)table_bytes(c));
  void *scratch = rgi_take(&at, 0);
  int64_t kernel = c->attr[RGI_CMP_KERNEL].i, stride = c->attr[RGI_CMP_STRIDE].i;
  int64_t nblock = rgi_compress_blocks(cu->data, cu->dim[0] - 1, kernel, stride, token, row);
  for (int i = 0; i < 2; i++) {
    side s = {.c = c,
              .x = rg_in(c, IN_K + i),
              .w = rg_in(c, IN_K_WEIGHT + i),
              .y = rg_out(c, OUT_K + i),
              .method = rgi_compress_method_of(c, i),
              .token = token,
              .row = row,
              .nblock = nblock,
              .scratch = scratch};
    if (!s.y) continue;
    c->parallel(c->pool, (s.y->dim[0] + MEAN_ROWS - 1) / MEAN_ROWS, rows_task, &s);
    if (s.method == RGI_MEAN) continue;
    s.tile = rgi_compress_tile(nblock, s.y->dim[1], c->threads);
    s.tiles = (nblock + s.tile - 1) / s.tile;
    c->parallel(c->pool, s.tiles * s.y->dim[1], product_task, &s);
  }
  return RG_OK;
}

static size_t workspace(const rg_call *c) {
  if (c->gpu) return rgi_cuda_compress_workspace(c);
  size_t most = 0;
  for (int i = 0; i < 2; i++) {
    const rg_arg *w = rg_in(c, IN_K_WEIGHT + i);
    if (w && scratch_per_thread(w) > most) most = scratch_per_thread(w);
  }
  return 2 * (size_t)table_bytes(c) + (size_t)c->threads * most;
}

static rg_status check(const rg_call *c, rg_error *e) {
  return rgi_compress_check(c, e, rg_in(c, IN_K), rg_in(c, IN_V), rg_in(c, IN_K_WEIGHT),
                            rg_in(c, IN_V_WEIGHT));
}

static void cost(const rg_call *c, rg_cost *out) {
  *out = (rg_cost){.bytes = rgi_call_bytes(c)};
  for (int i = 0; i < 2; i++) {
    rgi_compress_method m = rgi_compress_method_of(c, i);
    if (!rg_out(c, OUT_K + i)) continue;
    out->flops += rgi_compress_flops(c, rg_in(c, IN_K + i), m);
    out->exps += rgi_compress_exps(c, rg_in(c, IN_K + i), m);
  }
}

static const rg_port in[] = {
    {"k", "T,KH,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "keys"},
    {"v", "T,KH,E", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', 1,
     "values; absent: keys alone are compressed"},
    {"k_weight", "KM,KN", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1,
     "shared by all heads: [D, kernel*D] for linear, [2*D, kernel*D] for swiglu and sigmoid_mul, "
     "absent for "
     "mean"},
    {"v_weight", "VM,VN", RG_PORT_OPTIONAL, RG_D_FLOAT, 'F', -1, "the same for the values"},
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the sequences"},
};
static const rg_port out[] = {
    {"k", "T/stride,KH,D", RG_PORT_BLOCKS, RG_D_FLOAT, 'F', 1,
     "compressed keys; rows of sequence b start at cu_seqlens[b]/stride"},
    {"v", "T/stride,KH,E", RG_PORT_OPTIONAL | RG_PORT_BLOCKS, RG_D_FLOAT, 'F', 1,
     "compressed values, in the same rows"},
};

const rg_op rgi_op_compress_kv = {
    .abi = RG_OP_ABI,
    .name = "compress_kv",
    .doc = "one key and value per block of `kernel` tokens, a block every `stride` tokens",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_BLOCKWISE,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = rgi_compress_attrs,
    .nattr = RGI_CMP_NATTR,
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = forward,
    .cuda_steps = rgi_cuda_compress,
    .cuda_path = rgi_cuda_compress_path,
    .backward = "compress_kv.bwd",
};
