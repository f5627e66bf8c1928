/* ops/cuda/compress.c: see compress.h.

   Means have kernels of their own. A learned method is a forward product whose rows are blocks of
   tokens, with the gate done on the finished tile. Backward, per round of heads (as many as
   RGI_ROUND_BYTES hold):

       g       gradient of W x: dy itself, or for gates the product again, and dy through the gate
       d x     a backward product: the rows of a group of `stride` tokens are the blocks that hold
               it
       d W     a sum over blocks; rounds walk from the last head to the first

   workspace | table of blocks | table of groups | g of a round | partial sums of dW |
 */
#include "compress.h"
#include "../../kernels/compress.h"
#include "../compress.h"
#include "attn.h"
#include "gemm.h"

#define ROUND_BYTES ((int64_t)64 << 20)

enum { IN_K, IN_V, IN_K_WEIGHT, IN_V_WEIGHT, IN_CU };
enum { BW_GRAD_K = 5, BW_GRAD_V, BW_ACC_K, BW_ACC_V, BW_ACC_K_WEIGHT, BW_ACC_V_WEIGHT };
enum { OUT_K, OUT_V, OUT_K_WEIGHT, OUT_V_WEIGHT };

static int64_t stride_of(const rg_call *c) {
  return c->attr[RGI_CMP_STRIDE].i;
}
static int64_t kernel_of(const rg_call *c) {
  return c->attr[RGI_CMP_KERNEL].i;
}

const char *rgi_cuda_compress_path(const rg_call *c) {
  return rgi_compress_learned(c, 0) || rgi_compress_learned(c, 1)
             ? rgi_gemm_path(rg_in(c, IN_K)->dtype, c->gpu)
             : "mean";
}

/* ---- tables ---- */

typedef struct tables {
  rgk_compress_tables p;
  const int32_t *live;
} tables;

static tables tables_of(const rg_call *c, rgi_cut *at, bool groups) {
  const rg_arg *cu = rg_in(c, IN_CU);
  const int64_t T = rg_in(c, IN_K)->dim[0], stride = stride_of(c);
  tables t = {.p = {.seqs = rgk_seqs_of(cu, T),
                    .kernel = (int32_t)kernel_of(c),
                    .stride = (int32_t)stride,
                    .nblocks = T / stride}};
  t.live = t.p.seqs.starts ? t.p.seqs.starts + t.p.seqs.n : NULL;
  if (!rgi_compress_learned(c, 0) && !rgi_compress_learned(c, 1)) return t;
  if (groups) t.p.ngroups = rgk_slots(T, t.p.seqs.n, stride);
  t.p.blocks = rgi_take(at, (size_t)t.p.nblocks * sizeof(rgk_gemm_row));
  t.p.groups = groups ? rgi_take(at, (size_t)t.p.ngroups * sizeof(rgk_gemm_row)) : NULL;
  return t;
}

static rg_status make_tables(rg_cuda *x, tables *t) {
  if (!t->p.blocks && !t->p.groups) return RG_OK;
  int64_t n = t->p.ngroups > t->p.nblocks ? t->p.ngroups : t->p.nblocks;
  return x->launch(x, &(rg_launch){.function = rgk_make_tables(),
                                   .grid = {rgk_blocks(n, 128), 1, 1},
                                   .block = {128, 1, 1},
                                   .params = &t->p,
                                   .size = sizeof t->p});
}

/* ---- the mean ---- */

enum { MEAN_THREADS = 256, MEAN_ROWS = 16, MEAN_GROUPS = 8, MOST_OVERLAP = 16 };

static int32_t across_of(const rg_arg *x) {
  int64_t eights = x->dim[1] * ((x->dim[2] + 7) / 8);
  for (int32_t a = 64; a > 8; a /= 2)
    if (eights % a == 0) return a;
  return eights > 32 ? 64 : 8;
}

static rgk_mean_side side_of(const rg_arg *x, const rg_arg *y) {
  const rg_arg *shape = x ? x : y;
  return (rgk_mean_side){.x = x ? x->data : NULL,
                         .y = y->data,
                         .x_row = x ? x->stride[0] : 0,
                         .x_head = x ? x->stride[1] : 0,
                         .y_row = y->stride[0],
                         .y_head = y->stride[1],
                         .heads = (int32_t)shape->dim[1],
                         .width = (int32_t)shape->dim[2],
                         .y_dtype = (int32_t)y->dtype,
                         .across = across_of(shape)};
}

static rgk_mean mean_of(const rg_call *c) {
  const rg_arg *k = rg_in(c, IN_K);
  return (rgk_mean){.seqs = rgk_seqs_of(rg_in(c, IN_CU), k->dim[0]),
                    .rows = k->dim[0] / stride_of(c),
                    .kernel = (int32_t)kernel_of(c),
                    .stride = (int32_t)stride_of(c),
                    .dtype = (int32_t)k->dtype,
                    .vec = true};
}

static rg_status mean_launch(rg_cuda *x, rgk_mean *p, int n, const void *function,
                             uint32_t shared) {
  uint32_t y = 1;
  for (int i = 0; i < n; i++) {
    const rgk_mean_side *s = &p->side[i];
    uint32_t across = rgk_blocks((int64_t)s->heads * ((s->width + 7) / 8), s->across);
    if (across > y) y = across;
  }
  int64_t slots = rgk_slots(p->seqs.rows, p->seqs.n, (int64_t)p->tile * p->stride);
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)slots, y, (uint32_t)n},
                                   .block = {MEAN_THREADS, 1, 1},
                                   .shared = shared,
                                   .params = p,
                                   .size = sizeof *p});
}

static rg_status mean_fwd(const rg_call *c, rg_cuda *x) {
  rgk_mean p = mean_of(c);
  const int32_t overlap = p.kernel / p.stride;
  int32_t n = 0, across = 0;
  for (int i = 0; i < 2; i++) {
    const rg_arg *in = rg_in(c, IN_K + i), *out = rg_out(c, OUT_K + i);
    if (rgi_compress_learned(c, i) || !out) continue;
    p.vec = p.vec && rgi_gemm_vec(in, in->dim[2]) && rgi_gemm_vec(out, in->dim[2]);
    p.side[n++] = side_of(in, out);
    if (p.side[n - 1].across > across) across = p.side[n - 1].across;
  }
  if (n == 0 || p.rows == 0) return RG_OK;
  p.tile = MEAN_ROWS;
  if (!p.vec || overlap > MOST_OVERLAP) return mean_launch(x, &p, n, rgk_mean_direct(), 0);
  return mean_launch(x, &p, n, rgk_mean_fwd((rg_dtype)p.dtype),
                     (uint32_t)((p.tile + overlap - 1) * across * 32));
}

/* Sides whose d x is no product: means, and what has no gradient at all (then dx is zero). */
static rg_status mean_bwd(const rg_call *c, rg_cuda *x) {
  rgk_mean p = mean_of(c);
  int n = 0;
  for (int i = 0; i < 2; i++) {
    const rg_arg *dy = rg_in(c, BW_GRAD_K + i), *dx = rg_out(c, OUT_K + i);
    const bool add = rg_in(c, BW_ACC_K + i) != NULL;
    if (!dx || (dy && rgi_compress_learned(c, i)) || (!dy && add)) continue;
    p.vec = p.vec && rgi_gemm_vec(dy, dx->dim[2]) && rgi_gemm_vec(dx, dx->dim[2]);
    p.side[n] = side_of(dy, dx);
    p.side[n++].add = add;
  }
  if (n == 0) return RG_OK;
  p.tile = MEAN_GROUPS;
  return mean_launch(x, &p, n, rgk_mean_bwd(), 0);
}

/* ---- learned compression ---- */

/* Every window of `in`, flattened, times the weight's rows, into y. */
static rgk_gemm windows_product(const tables *t, const rg_arg *in, const rg_arg *w, const rg_arg *y,
                                int gate) {
  const int64_t d = in->dim[2];
  return (rgk_gemm){.mode = RGK_FORWARD,
                    .dtype = (int32_t)in->dtype,
                    .c_dtype = (int32_t)y->dtype,
                    .gate = gate,
                    .m = t->p.nblocks,
                    .n = w->dim[0],
                    .k = w->dim[1],
                    .heads = (int32_t)in->dim[1],
                    .part = (int32_t)d,
                    .a = in->data,
                    .b = w->data,
                    .lda = in->stride[0],
                    .a_head = in->stride[1],
                    .a_part = in->stride[0],
                    .ldb = w->stride[0],
                    .c = y->data,
                    .ldc = y->stride[0],
                    .c_head = y->stride[1],
                    .va = rgi_gemm_vec(in, d),
                    .vb = rgi_gemm_vec(w, w->dim[1]),
                    .vc = rgi_gemm_vec(y, d),
                    .table = t->p.blocks,
                    .half = d};
}

static rg_status learned_fwd(const rg_call *c, rg_cuda *x, const tables *t, int i) {
  static const int gate[] = {RGK_STORE, RGK_STORE, RGK_SWIGLU, RGK_SIGMOID_MUL};
  rgk_gemm p = windows_product(t, rg_in(c, IN_K + i), rg_in(c, IN_K_WEIGHT + i),
                               rg_out(c, OUT_K + i), gate[rgi_compress_method_of(c, i)]);
  return rgi_cuda_gemm(x, c->gpu, &p);
}

/* What the backward of one side needs beyond the tables. */
typedef struct room {
  int64_t heads; /* of a round */
  void *g;       /* [T/stride, heads, 2D], gates only */
  void *partial; /* of dW */
  float *sum;    /* of dW between rounds, where it is not fp32 */
} room;

static room room_of(const rg_call *c, int i, rgi_cut *at) {
  const rg_arg *x = rg_in(c, IN_K + i), *w = rg_in(c, IN_K_WEIGHT + i),
               *dw = rg_out(c, OUT_K_WEIGHT + i);
  const int64_t rows = x->dim[0] / stride_of(c), KH = x->dim[1];
  room r = {.heads = KH};
  if (rgi_compress_gated(rgi_compress_method_of(c, i))) {
    const int64_t head = rows * w->dim[0] * (int64_t)rg_dtype_size(x->dtype);
    if (head * KH > ROUND_BYTES) r.heads = ROUND_BYTES / head > 0 ? ROUND_BYTES / head : 1;
    r.g = rgi_take(at, (size_t)(head * r.heads));
  }
  if (dw)
    r.partial = rgi_take(at, rgi_gemm_sum_bytes(w->dim[0], w->dim[1], rows, KH, dw->dtype, c->gpu));
  if (dw && dw->dtype != RG_F32 && r.heads < KH)
    r.sum = rgi_take(at, (size_t)(w->dim[0] * w->dim[1] * 4));
  return r;
}

/* Is there a product to do for this side? */
static bool has_product(const rg_call *c, int i) {
  return rgi_compress_learned(c, i) && rg_in(c, BW_GRAD_K + i) &&
         (rg_out(c, OUT_K + i) || rg_out(c, OUT_K_WEIGHT + i));
}

static rg_status round_g(const rg_call *c, rg_cuda *x, const tables *t, int i, const rg_arg *in,
                         const rg_arg *dy, const rg_arg *g) {
  const bool swiglu = rgi_compress_method_of(c, i) == RGI_SWIGLU;
  rgk_gemm p = windows_product(t, in, rg_in(c, IN_K_WEIGHT + i), g,
                               swiglu ? RGK_SWIGLU_BWD : RGK_SIGMOID_MUL_BWD);
  p.up = dy->data;
  p.up_row = dy->stride[0];
  p.up_head = dy->stride[1];
  p.vu = rgi_gemm_vec(dy, in->dim[2]);
  return rgi_cuda_gemm(x, c->gpu, &p);
}

static rg_status round_x(const rg_call *c, rg_cuda *x, const tables *t, int i, const rg_arg *g,
                         const rg_arg *dx) {
  const rg_arg *w = rg_in(c, IN_K_WEIGHT + i);
  const int64_t d = dx->dim[2], n = w->dim[0], stride = stride_of(c);
  rgk_gemm p = {.mode = RGK_BACKWARD,
                .dtype = (int32_t)g->dtype,
                .c_dtype = (int32_t)dx->dtype,
                .m = t->p.ngroups,
                .n = stride * d,
                .k = kernel_of(c) / stride * n,
                .heads = (int32_t)dx->dim[1],
                .part = (int32_t)n,
                .a = g->data,
                .b = w->data,
                .lda = g->stride[0],
                .a_head = g->stride[1],
                .a_part = -g->stride[0],
                .ldb = w->stride[0],
                .b_part = stride * d,
                .c = dx->data,
                .ldc = dx->stride[0],
                .c_head = dx->stride[1],
                .c_part = d,
                .add = rg_in(c, BW_ACC_K + i) != NULL,
                .va = rgi_gemm_vec(g, n),
                .vb = rgi_gemm_vec(w, d),
                .vc = rgi_gemm_vec(dx, d),
                .table = t->p.groups};
  return rgi_cuda_gemm(x, c->gpu, &p);
}

static rg_status round_w(const rg_call *c, rg_cuda *x, const tables *t, int i, const rg_arg *g,
                         const rg_arg *in, const rg_arg *from, const rg_arg *to, void *work) {
  const rg_arg *w = rg_in(c, IN_K_WEIGHT + i);
  const int64_t d = in->dim[2];
  rgi_gemm_sum s = {.p = {.mode = RGK_SUM,
                          .dtype = (int32_t)g->dtype,
                          .m = w->dim[0],
                          .n = w->dim[1],
                          .k = t->p.nblocks,
                          .part = (int32_t)d,
                          .a = g->data,
                          .b = in->data,
                          .lda = g->stride[0],
                          .a_head = g->stride[1],
                          .ldb = in->stride[0],
                          .b_head = in->stride[1],
                          .b_part = in->stride[0],
                          .va = rgi_gemm_vec(g, w->dim[0]),
                          .vb = rgi_gemm_vec(in, d),
                          .table = t->p.blocks,
                          .live = t->live,
                          .live_div = (int32_t)stride_of(c)},
                    .heads = in->dim[1],
                    .from = from,
                    .to = to};
  return rgi_gemm_sum_steps(x, c->gpu, &s, work);
}

static rg_status learned_bwd(const rg_call *c, rg_cuda *x, const tables *t, int i, const room *r) {
  const rg_arg *k = rg_in(c, IN_K + i), *dy = rg_in(c, BW_GRAD_K + i), *dx = rg_out(c, OUT_K + i);
  const rg_arg *w = rg_in(c, IN_K_WEIGHT + i), *dw = rg_out(c, OUT_K_WEIGHT + i);
  const rg_arg *from = rg_in(c, BW_ACC_K_WEIGHT + i) ? dw : NULL;
  rg_arg sum = dw ? *dw : (rg_arg){0}; /* of the rounds so far */
  if (r->sum) sum.data = r->sum, sum.dtype = RG_F32, sum.stride[0] = w->dim[1];
  for (int64_t left = k->dim[1]; left > 0;) {
    const int64_t n = left < r->heads ? left : r->heads;
    left -= n;
    const rg_arg in = rgi_slice(k, 1, left, n), up = rgi_slice(dy, 1, left, n);
    rg_arg g = up;
    if (r->g) {
      g = (rg_arg){.data = r->g, .dtype = k->dtype, .rank = 3, .align = 16};
      g.dim[0] = t->p.nblocks, g.dim[1] = n, g.dim[2] = w->dim[0];
      g.stride[0] = n * w->dim[0], g.stride[1] = w->dim[0], g.stride[2] = 1;
      RGI_TRY(round_g(c, x, t, i, &in, &up, &g));
    }
    if (dx) {
      const rg_arg to = rgi_slice(dx, 1, left, n);
      RGI_TRY(round_x(c, x, t, i, &g, &to));
    }
    if (dw) RGI_TRY(round_w(c, x, t, i, &g, &in, from, left ? &sum : dw, r->partial));
    from = &sum;
  }
  return RG_OK;
}

/* ---- the op ---- */

size_t rgi_cuda_compress_workspace(const rg_call *c) {
  rgi_cut at = {0};
  tables_of(c, &at, false);
  return at.used;
}

rg_status rgi_cuda_compress(const rg_call *c, rg_cuda *x) {
  rgi_cut at = {.base = c->workspace};
  tables t = tables_of(c, &at, false);
  RGI_TRY(make_tables(x, &t));
  RGI_TRY(mean_fwd(c, x));
  for (int i = 0; i < 2; i++)
    if (rgi_compress_learned(c, i) && rg_out(c, OUT_K + i)) RGI_TRY(learned_fwd(c, x, &t, i));
  return RG_OK;
}

size_t rgi_cuda_compress_bwd_workspace(const rg_call *c) {
  rgi_cut at = {0};
  size_t most = 0;
  tables_of(c, &at, true);
  for (int i = 0; i < 2; i++) {
    rgi_cut one = {0};
    if (has_product(c, i)) room_of(c, i, &one);
    if (one.used > most) most = one.used;
  }
  return at.used + most;
}

/* A weight that no gradient reaches. */
static rg_status no_weight(const rg_call *c, rg_cuda *x, int i) {
  const rg_arg *dw = rg_out(c, OUT_K_WEIGHT + i);
  if (!dw || rg_in(c, BW_GRAD_K + i) || rg_in(c, BW_ACC_K_WEIGHT + i)) return RG_OK;
  rgk_reduce r = {.m = dw->dim[0],
                  .n = dw->dim[1],
                  .to = dw->data,
                  .to_row = dw->stride[0],
                  .dtype = (int32_t)dw->dtype};
  return rgi_gemm_reduce(x, &r);
}

rg_status rgi_cuda_compress_bwd(const rg_call *c, rg_cuda *x) {
  rgi_cut at = {.base = c->workspace};
  tables t = tables_of(c, &at, true);
  RGI_TRY(make_tables(x, &t));
  RGI_TRY(mean_bwd(c, x));
  for (int i = 0; i < 2; i++) {
    RGI_TRY(no_weight(c, x, i));
    if (!has_product(c, i)) continue;
    rgi_cut rest = at;
    room r = room_of(c, i, &rest);
    RGI_TRY(learned_bwd(c, x, &t, i, &r));
  }
  return RG_OK;
}
