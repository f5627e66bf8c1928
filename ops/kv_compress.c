/* ops/kv_compress.c: the compressed rows of all blocks that a step completes.

       s0 = kernel/stride − 1, R = page/stride        block j of a sequence: tokens
       row r = j + s0 of page pages[b][r / R]         [j·stride, j·stride + kernel)

   So a block's row lies in the page of its last token, which is of this step, while its first
   tokens may be old: they are read through the table, whatever pages they are in. The numbers are
   compress_kv's to the bit, for each block is gathered and then goes the same way.
 */
#include "cpu/compress.h"
#include "../graph/ir.h"
#include "cuda/paged.h"

typedef struct side {
  const rg_call *c;
  const rg_arg *x; /* [P, page, KH, D] */
  const rg_arg *w; /* [D or 2D, kernel·D] or NULL */
  const rg_arg *y; /* [P, page/stride, KH, D] */
  rgi_compress_method method;
  const int64_t *first; /* [B + 1]: how many blocks the sequences before b complete */
  char *scratch;        /* per thread: product, its result [tile, rows of W], tile blocks */
  size_t each;
  int64_t tile, tiles;
} side;

static int64_t context_of(const rg_call *c, int64_t b) {
  const rg_arg *a = rg_in(c, RGI_KVC_CONTEXT);
  return ((const int32_t *)a->data)[b * a->stride[0]];
}

/* Blocks of sequence b that were there before this step. */
static int64_t old_blocks(const rg_call *c, int64_t b) {
  const int32_t *cu = rg_in(c, RGI_KVC_CU)->data;
  return rgk_blocks_in(context_of(c, b) - (cu[b + 1] - cu[b]), c->attr[RGI_CMP_KERNEL].i,
                       c->attr[RGI_CMP_STRIDE].i);
}

/* What paged_batch would have refused completes nothing. */
static int64_t new_blocks(const rg_call *c, int64_t b) {
  const int32_t *cu = rg_in(c, RGI_KVC_CU)->data;
  const int64_t context = context_of(c, b),
                most = rg_in(c, RGI_KVC_PAGES)->dim[1] * rg_in(c, RGI_KVC_K_CACHE)->dim[1];
  if (context < cu[b + 1] - cu[b] || context > most) return 0;
  return rgk_blocks_in(context, c->attr[RGI_CMP_KERNEL].i, c->attr[RGI_CMP_STRIDE].i) -
         old_blocks(c, b);
}

static int64_t page_of(const rg_call *c, int64_t b, int64_t m) {
  const rg_arg *pages = rg_in(c, RGI_KVC_PAGES);
  return ((const int32_t *)pages->data)[b * pages->stride[0] + m];
}

static char *element(const rg_arg *a, int64_t page, int64_t row, int64_t head) {
  return (char *)a->data + (page * a->stride[0] + row * a->stride[1] + head * a->stride[2]) *
                               (int64_t)rg_dtype_size(a->dtype);
}

/* Tokens of block j of sequence b, one head: to [kernel, D]. Where its row goes, or NULL if the
 * table has no page for some of it. */
static char *gather(const side *s, int64_t b, int64_t j, int64_t head, char *to) {
  const rg_call *c = s->c;
  const int64_t kernel = c->attr[RGI_CMP_KERNEL].i, stride = c->attr[RGI_CMP_STRIDE].i,
                page = s->x->dim[1], r = j + kernel / stride - 1;
  const size_t bytes = (size_t)s->x->dim[3] * rg_dtype_size(s->x->dtype);
  int64_t at = -1;
  for (int64_t t = 0; t < kernel; t++) {
    const int64_t p = j * stride + t;
    at = page_of(c, b, p / page);
    if (at < 0 || at >= s->x->dim[0]) return NULL;
    memcpy(to + (size_t)t * bytes, element(s->x, at, p % page, head), bytes);
  }
  return element(s->y, at, r % s->y->dim[1], head);
}

static size_t block_bytes(const rg_call *c, const rg_arg *x) {
  return (size_t)c->attr[RGI_CMP_KERNEL].i * (size_t)x->dim[3] * rg_dtype_size(x->dtype);
}

/* Room for `rows` blocks of one head, or for one where they are only averaged. */
static size_t scratch_of(const rg_call *c, const rg_arg *x, const rg_arg *w) {
  if (!w) return RGI_ROUND256(block_bytes(c, x));
  return RGI_GEMM_WORK + RGI_ROUND256((size_t)RGI_GEMM_MC * (size_t)w->dim[0] * 4) +
         RGI_ROUND256((size_t)RGI_GEMM_MC * sizeof(char *)) +
         RGI_ROUND256((size_t)RGI_GEMM_MC * block_bytes(c, x));
}

static void mean_block(const side *s, const char *block, char *to) {
  const int64_t D = s->x->dim[3], size = (int64_t)rg_dtype_size(s->y->dtype);
  const rg_arg x = {.data = (void *)block,
                    .dtype = s->x->dtype,
                    .rank = 3,
                    .dim = {s->c->attr[RGI_CMP_KERNEL].i, 1, D},
                    .stride = {D, D, 1}};
  for (int64_t d = 0; d < D; d += RGI_PIECE) {
    float sum[RGI_PIECE];
    const int64_t width = D - d < RGI_PIECE ? D - d : RGI_PIECE;
    rgi_compress_mean(s->c, &x, 0, 0, d, width, sum);
    rgi_store_by(s->c->isa, to + d * size, s->y->dtype, sum, width);
  }
}

/* A tile of one head's blocks, counted over all sequences. */
static void tile_task(void *arg, int64_t task, int thread) {
  const side *s = arg;
  const rg_call *c = s->c;
  const int64_t head = task / s->tiles, from = task % s->tiles * s->tile,
                B = rg_in(c, RGI_KVC_CONTEXT)->dim[0], D = s->x->dim[3],
                n = s->w ? s->w->dim[0] : 0;
  int64_t rows = s->first[B] - from < s->tile ? s->first[B] - from : s->tile, b = 0, got = 0;
  rgi_cut cut = {.base = s->scratch + (size_t)thread * s->each};
  char *work = n ? rgi_take(&cut, RGI_GEMM_WORK) : NULL;
  float *out = n ? rgi_take(&cut, (size_t)RGI_GEMM_MC * (size_t)n * 4) : NULL;
  char **to = n ? rgi_take(&cut, (size_t)RGI_GEMM_MC * sizeof *to) : NULL;
  char *block = rgi_take(&cut, 0);
  for (int64_t i = from; i < from + rows; i++) {
    while (s->first[b + 1] <= i) b++;
    char *at = block + (size_t)got * block_bytes(c, s->x);
    char *row = gather(s, b, old_blocks(c, b) + i - s->first[b], head, at);
    if (!row) continue;
    if (n)
      to[got++] = row;
    else
      mean_block(s, at, row);
  }
  if (!got) return;
  const int64_t width = c->attr[RGI_CMP_KERNEL].i * D;
  rgi_mat blocks = {.data = block, .type = s->x->dtype, .stride = width};
  rgi_mat weight = {.data = s->w->data, .type = s->w->dtype, .stride = s->w->stride[0]};
  rgi_gemm(c->isa, work, got, n, width, &blocks, &weight, out, n, false);
  for (int64_t r = 0; r < got; r++) {
    rgi_compress_gate(s->method, out + r * n, D);
    rgi_store_by(c->isa, to[r], s->y->dtype, out + r * n, D);
  }
}

static size_t first_bytes(const rg_call *c) {
  return RGI_ROUND256((size_t)(rg_in(c, RGI_KVC_CONTEXT)->dim[0] + 1) * sizeof(int64_t));
}

static rg_status run(const rg_call *c) {
  const int64_t B = rg_in(c, RGI_KVC_CONTEXT)->dim[0];
  int64_t *first = c->workspace;
  first[0] = 0;
  for (int64_t b = 0; b < B; b++) first[b + 1] = first[b] + new_blocks(c, b);
  for (int i = 0; i < 2; i++) {
    side s = {.c = c,
              .x = rg_in(c, RGI_KVC_K_CACHE + i),
              .w = rg_in(c, RGI_KVC_K_WEIGHT + i),
              .y = rg_out(c, i),
              .method = rgi_compress_method_of(c, i),
              .first = first,
              .scratch = (char *)c->workspace + first_bytes(c)};
    s.each = scratch_of(c, s.x, s.w);
    s.tile = rgi_compress_tile(first[B], s.x->dim[2], c->threads);
    s.tiles = (first[B] + s.tile - 1) / s.tile;
    c->parallel(c->pool, s.tiles * s.x->dim[2], tile_task, &s);
  }
  return RG_OK;
}

static size_t workspace(const rg_call *c) {
  size_t most = 0;
  if (c->gpu) return rgi_cuda_kv_compress_workspace(c);
  for (int i = 0; i < 2; i++) {
    const size_t each =
        scratch_of(c, rg_in(c, RGI_KVC_K_CACHE + i), rg_in(c, RGI_KVC_K_WEIGHT + i));
    if (each > most) most = each;
  }
  return first_bytes(c) + (size_t)c->threads * most;
}

static rg_status check(const rg_call *c, rg_error *e) {
  const int64_t stride = c->attr[RGI_CMP_STRIDE].i, page = rg_in(c, RGI_KVC_K_CACHE)->dim[1],
                rows = rg_in(c, RGI_KVC_K_CMP)->dim[1];
  rg_arg x[2]; /* as compress_kv would see them */
  for (int i = 0; i < 2; i++) {
    x[i] = *rg_in(c, RGI_KVC_K_CACHE + i);
    x[i].rank = 3;
    x[i].dim[2] = x[i].dim[3];
  }
  RGI_TRY(rgi_compress_check(c, e, &x[0], &x[1], rg_in(c, RGI_KVC_K_WEIGHT),
                             rg_in(c, RGI_KVC_V_WEIGHT)));
  for (int i = 0; i < 2 && c->gpu; i++) { /* whose products take one type */
    const rg_arg *w = rg_in(c, RGI_KVC_K_WEIGHT + i);
    if (w && w->dtype != x[i].dtype)
      return rg_op_fail(e, RG_E_DTYPE, c,
                        "%s_weight is %s, expected %s, the caches' type, on a GPU", i ? "v" : "k",
                        rg_dtype_name(w->dtype), rg_dtype_name(x[i].dtype));
  }
  if (page == RG_DIM_FREE) return RG_OK;
  if (page % stride)
    return rg_op_fail(e, RG_E_VALUE, c, "stride %lld does not divide pages of %lld tokens",
                      (long long)stride, (long long)page);
  if (rows != RG_DIM_FREE && rows != page / stride)
    return rg_op_fail(e, RG_E_SHAPE, c,
                      "k_cmp has pages of %lld rows; expected %lld, one for every %lld of %lld "
                      "tokens",
                      (long long)rows, (long long)(page / stride), (long long)stride,
                      (long long)page);
  return RG_OK;
}

/* For a step of one token a sequence; how many there are, only the device knows. */
static void cost(const rg_call *c, rg_cost *out) {
  const double steps =
      (double)rg_in(c, RGI_KVC_CONTEXT)->dim[0] / (double)c->attr[RGI_CMP_STRIDE].i;
  *out = (rg_cost){0};
  for (int i = 0; i < 2; i++) {
    const rg_arg *x = rg_in(c, RGI_KVC_K_CACHE + i), *w = rg_in(c, RGI_KVC_K_WEIGHT + i);
    const double n =
        steps * (double)x->dim[2] * (double)c->attr[RGI_CMP_KERNEL].i * (double)x->dim[3];
    out->flops += w ? 2 * n * (double)w->dim[0] : n;
    out->bytes += n * (double)rg_dtype_size(x->dtype);
  }
}

static const rg_port in[] = {
    {"k_cache", "P,page,KH,D", 0, RG_D_FLOAT, 'C', -1, "keys in pages, this step's included"},
    {"v_cache", "P,page,KH,E", 0, RG_D_FLOAT, 'C', -1, "values in pages, this step's included"},
    {"k_weight", "KM,KN", RG_PORT_OPTIONAL, RG_D_FLOAT, 'W', -1, "as compress_kv's"},
    {"v_weight", "VM,VN", RG_PORT_OPTIONAL, RG_D_FLOAT, 'W', -1, "as compress_kv's"},
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the sequences"},
    RGI_PAGED_IN,
    {"k_cmp", "P,R,KH,D", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "compressed keys, R = page/stride"},
    {"v_cmp", "P,R,KH,E", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "compressed values"},
    {"rows", "*", RG_PORT_OPTIONAL, RG_D_FLOAT | RG_D(RG_I32), 0, -1,
     "any tensor with a row for each token of the step: on a GPU learned methods then need memory "
     "for so many tokens, else for all that the tables have room for"},
};
static const rg_port out[] = {
    {"k_cmp", "P,R,KH,D", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "the same with the new blocks"},
    {"v_cmp", "P,R,KH,E", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "the same with the new blocks"},
};
const rg_op rgi_op_kv_compress = {
    .abi = RG_OP_ABI,
    .name = "kv_compress",
    .doc = "compressed keys and values of the blocks that a step completes",
    .flags = RG_OP_STATE,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = rgi_compress_attrs,
    .nattr = RGI_CMP_NATTR,
    .check = check,
    .cost = cost,
    .workspace = workspace,
    .run_cpu = run,
    .cuda_steps = rgi_cuda_kv_compress,
    .cuda_path = rgi_cuda_kv_compress_path,
    .rules = &(const rgi_rules){.fusing = &(const rgi_fusing){.with = "kv_append",
                                                              .link = "k_cache",
                                                              .joined = "kv_step",
                                                              .joins = rgi_cuda_kv_step_takes}},
};
