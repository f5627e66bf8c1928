/* ops/cuda/linear.c: see linear.h. y = x·Wᵀ + b is a forward product, dx = dy·W a backward one, dW
 * a sum over tokens; the kernels read how many tokens are live and leave the others out.
 *
 * Large y and dx come from cuBLASLt, over all rows: what dead rows of x give stays in dead rows of
 * y, which are zeroed after it. Into dW they would be mixed, so dW is never the library's; nor is a
 * dx that is added to a sum. */
#include "linear.h"
#include "../../kernels/blas.h"
#include "attn.h"
#include "gemm.h"

enum { IN_X, IN_W, IN_B, IN_CU, IN_GRAD, IN_ACC_X, IN_ACC_W, IN_ACC_B };
enum { OUT_X, OUT_W, OUT_B };
enum { ZERO_BLOCKS = 1024 };

/* Where the number of live rows is. */
static const int32_t *live(const rg_arg *cu) {
  return cu ? (const int32_t *)cu->data + cu->dim[0] - 1 : NULL;
}

/* By type and weight alone: whether the library is taken must not depend on how many rows there
 * are. */
enum { LIBRARY_WIDTH = 512 };
static bool large(const rg_call *c) {
  const rg_arg *w = rg_in(c, IN_W);
  return !c->attr[RGI_LINEAR_BATCH_INVARIANT].i && w->dtype != RG_F32 &&
         w->dim[0] >= LIBRARY_WIDTH && w->dim[1] >= LIBRARY_WIDTH && w->dim[0] % 8 == 0 &&
         w->dim[1] % 8 == 0;
}

static rg_status library(rg_cuda *x, const rgk_gemm *p, bool transposed) {
  rgk_product q = {.dtype = (rg_dtype)p->dtype,
                   .c_dtype = (rg_dtype)p->c_dtype,
                   .m = p->m,
                   .n = p->n,
                   .k = p->k,
                   .lda = p->lda,
                   .ldb = p->ldb,
                   .ldc = p->ldc,
                   .a = p->a,
                   .b = p->b,
                   .c = p->c,
                   .bias = p->bias,
                   .transposed = transposed};
  RGI_TRY(rgk_blas_product(x, &q));
  if (!p->live) return RG_OK;
  rgk_zero_tail t = {
      .x = p->c, .dtype = p->c_dtype, .ldx = p->ldc, .rows = p->m, .n = p->n, .live = p->live};
  return x->launch(x,
                   &(rg_launch){.function = rgk_zero_dead_rows(),
                                .grid = {(uint32_t)(p->m < ZERO_BLOCKS ? p->m : ZERO_BLOCKS), 1, 1},
                                .block = {256, 1, 1},
                                .params = &t,
                                .size = sizeof t});
}

const char *rgi_cuda_linear_path(const rg_call *c) {
  if (large(c)) return "cuBLASLt";
  return rgi_gemm_path(rg_in(c, IN_X)->dtype, c->gpu);
}

rg_status rgi_cuda_linear(const rg_call *c, rg_cuda *x) {
  const rg_arg *in = rg_in(c, IN_X), *w = rg_in(c, IN_W), *b = rg_in(c, IN_B), *y = rg_out(c, 0);
  const int64_t K = in->dim[1], N = w->dim[0];
  rgk_gemm p = {.mode = RGK_FORWARD,
                .dtype = (int32_t)in->dtype,
                .c_dtype = (int32_t)y->dtype,
                .m = in->dim[0],
                .n = N,
                .k = K,
                .part = (int32_t)K,
                .a = in->data,
                .b = w->data,
                .lda = in->stride[0],
                .ldb = w->stride[0],
                .c = y->data,
                .ldc = y->stride[0],
                .bias = b ? b->data : NULL,
                .va = rgi_gemm_vec(in, K),
                .vb = rgi_gemm_vec(w, K),
                .vc = rgi_gemm_vec(y, N),
                .live = live(rg_in(c, IN_CU))};
  if (large(c) && p.va && p.vb && p.vc && (!b || b->align >= 16)) return library(x, &p, true);
  return rgi_cuda_gemm(x, c->gpu, &p);
}

typedef struct parts {
  void *dw, *db;
  size_t bytes;
} parts;

static parts cut(const rg_call *c, void *work) {
  const rg_arg *x = rg_in(c, IN_X), *w = rg_in(c, IN_W), *dw = rg_out(c, OUT_W),
               *db = rg_out(c, OUT_B);
  rgi_cut at = {.base = work};
  parts p = {0};
  if (dw)
    p.dw = rgi_take(&at, rgi_gemm_sum_bytes(w->dim[0], w->dim[1], x->dim[0], 1, dw->dtype, c->gpu));
  if (db) p.db = rgi_take(&at, rgi_column_sums_bytes(db->dim[0]));
  p.bytes = at.used;
  return p;
}

size_t rgi_cuda_linear_bwd_workspace(const rg_call *c) {
  return cut(c, NULL).bytes;
}

rg_status rgi_cuda_linear_bwd(const rg_call *c, rg_cuda *x) {
  const rg_arg *in = rg_in(c, IN_X), *w = rg_in(c, IN_W), *dy = rg_in(c, IN_GRAD);
  const rg_arg *dx = rg_out(c, OUT_X), *dw = rg_out(c, OUT_W), *db = rg_out(c, OUT_B);
  const int64_t K = in->dim[1], N = w->dim[0];
  const int32_t *rows = live(rg_in(c, IN_CU));
  const parts work = cut(c, c->workspace);
  if (dx) {
    rgk_gemm p = {.mode = RGK_BACKWARD,
                  .dtype = (int32_t)dy->dtype,
                  .c_dtype = (int32_t)dx->dtype,
                  .m = in->dim[0],
                  .n = K,
                  .k = N,
                  .part = (int32_t)N,
                  .a = dy->data,
                  .b = w->data,
                  .lda = dy->stride[0],
                  .ldb = w->stride[0],
                  .c = dx->data,
                  .ldc = dx->stride[0],
                  .add = rg_in(c, IN_ACC_X) != NULL,
                  .va = rgi_gemm_vec(dy, N),
                  .vb = rgi_gemm_vec(w, K),
                  .vc = rgi_gemm_vec(dx, K),
                  .live = rows};
    RGI_TRY(large(c) && p.va && p.vb && p.vc && !p.add ? library(x, &p, false)
                                                       : rgi_cuda_gemm(x, c->gpu, &p));
  }
  if (dw) {
    rgi_gemm_sum s = {.p = {.mode = RGK_SUM,
                            .dtype = (int32_t)dy->dtype,
                            .m = N,
                            .n = K,
                            .k = in->dim[0],
                            .part = (int32_t)K,
                            .a = dy->data,
                            .b = in->data,
                            .lda = dy->stride[0],
                            .ldb = in->stride[0],
                            .va = rgi_gemm_vec(dy, N),
                            .vb = rgi_gemm_vec(in, K),
                            .live = rows},
                      .heads = 1,
                      .from = rg_in(c, IN_ACC_W) ? dw : NULL,
                      .to = dw};
    RGI_TRY(rgi_gemm_sum_steps(x, c->gpu, &s, work.dw));
  }
  if (db) RGI_TRY(rgi_column_sums(x, dy, rows, db, rg_in(c, IN_ACC_B) != NULL, work.db));
  return RG_OK;
}
