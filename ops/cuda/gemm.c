/* ops/cuda/gemm.c: see gemm.h. */
#include "gemm.h"
#include "hopper.h"

enum {
  DEPTH = 64,      /* of a step; chunks are multiples of it */
  SUM_CHUNKS = 64, /* of column sums */
  REDUCE_BLOCKS = 2048
};
#define PARTIAL_BYTES \
  ((int64_t)48 << 20) /* most that partial sums take, where one head allows it */

/* Kernels for a type on a GPU. */
enum { PLAIN, MMA, WGMMA };
static int family(rg_dtype t, const rg_gpu *gpu) {
  if (t == RG_F32 || gpu->cc < 80) return PLAIN;
  return rgi_hopper(gpu) ? WGMMA : MMA;
}

const char *rgi_gemm_path(rg_dtype t, const rg_gpu *gpu) {
  static const char *const path[] = {[MMA] = "mma: not Hopper", [WGMMA] = "wgmma"};
  const int f = family(t, gpu);
  return f != PLAIN ? path[f] : t == RG_F32 ? "plain: f32" : "plain: older than Ampere";
}

bool rgi_gemm_vec(const rg_arg *a, int64_t width) {
  if (!a) return true;
  bool ok = a->align >= 16 && width % 8 == 0;
  for (int i = 0; i + 1 < a->rank; i++) ok = ok && a->stride[i] % 8 == 0;
  return ok;
}

static uint32_t tiles(rgk_gemm *p, int64_t rows, int height, int width) {
  p->tiles_m = rgk_blocks(rows, height);
  p->tiles_n = rgk_blocks(p->gate == RGK_STORE ? p->n : 2 * p->half, width);
  return p->tiles_m * p->tiles_n;
}

/* Large tiles where there is one for each multiprocessor. */
static rg_launch by_mma(const rg_gpu *gpu, rgk_gemm *p, int64_t rows, int64_t z) {
  const int most = rgk_gemm_mma_tile(true);
  const bool large = !rgk_gemm_any(p) && tiles(p, rows, most, most) * z >= gpu->sms;
  const int size = rgk_gemm_mma_tile(large);
  return (rg_launch){.function = p->dtype == RG_F16 ? rgk_gemm_mma_f16(p->mode, large)
                                                    : rgk_gemm_mma_bf16(p->mode, large),
                     .grid = {tiles(p, rows, size, size), 1, (uint32_t)z},
                     .block = {RGK_GEMM_MMA_THREADS, 1, 1},
                     .shared = RGK_GEMM_MMA_SHARED};
}

static rg_launch by_wgmma(const rg_gpu *gpu, rgk_gemm *p, int64_t rows, int64_t z) {
  const bool any = rgk_gemm_any(p);
  int width = RGK_PLAIN_N;
  /* the wide tile, where there are enough of them and its end is worth its beginning */
  if (!any) {
    int64_t wide = (rows + RGK_GEMM_M - 1) / RGK_GEMM_M * ((p->n + 255) / 256) * z;
    if (p->n > 128 && wide >= gpu->sms && (p->mode != RGK_BACKWARD || p->k > 1024)) width = 256;
  }
  return (rg_launch){.function = rgk_gemm_wgmma((rg_dtype)p->dtype, p->mode, width, any),
                     .grid = {tiles(p, rows, RGK_GEMM_M, width), 1, (uint32_t)z},
                     .block = {RGK_GEMM_THREADS, 1, 1},
                     .shared = rgk_gemm_shared(p->mode, width)};
}

static rg_status launch(rg_cuda *x, const rg_gpu *gpu, rgk_gemm *p, int64_t rows, int64_t z) {
  const int f = family((rg_dtype)p->dtype, gpu);
  rg_launch l;
  if (f == PLAIN)
    l = (rg_launch){.function = rgk_gemm_plain((rg_dtype)p->dtype),
                    .grid = {tiles(p, rows, RGK_GEMM_M, RGK_PLAIN_N), 1, (uint32_t)z},
                    .block = {RGK_GEMM_THREADS, 1, 1},
                    .shared = RGK_PLAIN_SHARED};
  else
    l = f == MMA ? by_mma(gpu, p, rows, z) : by_wgmma(gpu, p, rows, z);
  l.params = p, l.size = sizeof *p;
  return x->launch(x, &l);
}

rg_status rgi_cuda_gemm(rg_cuda *x, const rg_gpu *gpu, rgk_gemm *p) {
  if (p->heads == 0) p->heads = 1;
  if (p->c_part == 0) p->c_part = p->n;
  if (p->live_div == 0) p->live_div = 1;
  p->split = 1;
  return launch(x, gpu, p, p->m * p->heads, 1);
}

rg_status rgi_gemm_reduce(rg_cuda *x, rgk_reduce *r) {
  uint32_t blocks = rgk_blocks(r->m * r->n, 256);
  return x->launch(x, &(rg_launch){.function = rgk_reduce_partials(),
                                   .grid = {blocks < REDUCE_BLOCKS ? blocks : REDUCE_BLOCKS, 1, 1},
                                   .block = {256, 1, 1},
                                   .params = r,
                                   .size = sizeof *r});
}

/* ---- sums over rows ---- */

typedef struct cut {
  int64_t split, chunk; /* chunks of a head */
  int64_t heads;        /* of one round */
  size_t partial, sum;  /* bytes; sum: fp32 between rounds, where `to` is not fp32 */
  bool direct;          /* one chunk of one head: straight into place */
} cut;

static cut cut_of(int64_t m, int64_t n, int64_t k, int64_t heads, rg_dtype to, bool in_place,
                  const rg_gpu *gpu) {
  int64_t blocks = ((m + 127) / 128) * ((n + 127) / 128), size = m * n * 4;
  cut c = {.split = blocks > 0 ? (gpu->sms + blocks / 2) / blocks : 1};
  if (c.split > (k + 511) / 512) c.split = (k + 511) / 512;
  if (size > 0 && c.split > PARTIAL_BYTES / size) c.split = PARTIAL_BYTES / size;
  if (c.split < 1) c.split = 1;
  c.chunk = ((k + c.split - 1) / c.split + DEPTH - 1) / DEPTH * DEPTH;
  c.direct = in_place && heads == 1 && c.split == 1;
  if (c.direct) return c;
  c.heads = size > 0 ? PARTIAL_BYTES / (c.split * size) : heads;
  if (c.heads < 1) c.heads = 1;
  if (c.heads > heads) c.heads = heads;
  c.partial = RGI_ROUND256(c.heads * c.split * size);
  if (c.heads < heads && to != RG_F32) c.sum = RGI_ROUND256(size);
  return c;
}

size_t rgi_gemm_sum_bytes(int64_t m, int64_t n, int64_t k, int64_t heads, rg_dtype to,
                          const rg_gpu *gpu) {
  cut c = cut_of(m, n, k, heads, to, true, gpu);
  return c.partial + c.sum;
}

rg_status rgi_gemm_sum_steps(rg_cuda *x, const rg_gpu *gpu, rgi_gemm_sum *s, void *work) {
  rgk_gemm *p = &s->p;
  const rg_arg *to = s->to;
  const int64_t m = p->m, n = p->n, size = (int64_t)rg_dtype_size((rg_dtype)p->dtype);
  cut c = cut_of(m, n, p->k, s->heads, to->dtype, !s->from || s->from->data == to->data, gpu);
  if (m == 0 || n == 0) return RG_OK;
  p->heads = 1;
  p->c_part = n;
  if (p->live_div == 0) p->live_div = 1;
  p->split = (int32_t)c.split, p->chunk = c.chunk, p->c_split = m * n;
  if (c.direct) {
    p->c = to->data, p->c_dtype = (int32_t)to->dtype, p->ldc = to->stride[0];
    p->vc = rgi_gemm_vec(to, n), p->add = s->from != NULL;
    return launch(x, gpu, p, m, 1);
  }
  p->c = work, p->c_dtype = RG_F32, p->ldc = n, p->vc = n % 8 == 0, p->add = false;
  rg_arg sum = *to;
  if (to->dtype != RG_F32) sum.data = (char *)work + c.partial, sum.stride[0] = n;
  const void *a = p->a, *b = p->b;
  const rg_arg *from = s->from;
  for (int64_t left = s->heads; left > 0;) { /* heads [left − round, left) */
    int64_t round = left < c.heads ? left : c.heads;
    left -= round;
    p->a = (const char *)a + left * p->a_head * size;
    p->b = (const char *)b + left * p->b_head * size;
    RGI_TRY(launch(x, gpu, p, m, round * c.split));
    const bool last = left == 0;
    rgk_reduce r = {.partial = work,
                    .heads = (int32_t)round,
                    .split = p->split,
                    .m = m,
                    .n = n,
                    .from = from ? from->data : NULL,
                    .from_row = from ? from->stride[0] : 0,
                    .to = last ? to->data : sum.data,
                    .to_row = last ? to->stride[0] : sum.stride[0],
                    .dtype = last ? (int32_t)to->dtype : RG_F32};
    RGI_TRY(rgi_gemm_reduce(x, &r));
    from = &sum;
  }
  return RG_OK;
}

size_t rgi_column_sums_bytes(int64_t n) {
  return RGI_ROUND256(SUM_CHUNKS * n * 4);
}

rg_status rgi_column_sums(rg_cuda *x, const rg_arg *from, const int32_t *live, const rg_arg *to,
                          bool add, void *work) {
  int64_t n = to->dim[0];
  rgk_column_sums p = {.x = from->data,
                       .dtype = (int32_t)from->dtype,
                       .ldx = from->stride[0],
                       .rows = from->dim[0],
                       .n = n,
                       .chunk = (from->dim[0] + SUM_CHUNKS - 1) / SUM_CHUNKS,
                       .live = live,
                       .partial = work};
  RGI_TRY(x->launch(x, &(rg_launch){.function = rgk_sum_columns(),
                                    .grid = {rgk_blocks(n, 32), SUM_CHUNKS, 1},
                                    .block = {32, 8, 1},
                                    .params = &p,
                                    .size = sizeof p}));
  rgk_reduce r = {.partial = work,
                  .heads = 1,
                  .split = SUM_CHUNKS,
                  .m = 1,
                  .n = n,
                  .from = add ? to->data : NULL,
                  .to = to->data,
                  .dtype = (int32_t)to->dtype};
  return rgi_gemm_reduce(x, &r);
}
