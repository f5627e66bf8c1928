/* bench/gemm_bench.c: linear and compress_kv on a GPU, and cuBLASLt on the same products.

     gemm_bench [tokens of linear, tokens of compress_kv …]      default 8192 131072; 0: none

   linear: [T, 4096] · [4096, 4096], bf16, also batch_invariant, without the library. compress_kv:
   one sequence, 4 KV heads, d 128, blocks 32/16, bf16. Each line is the median of 20 runs after 3:
   milliseconds, TFLOP/s of useful products and TB/s of bytes read and written once.
 */
#include <stdio.h>

#ifndef REGRAPH_CUDA
int main(void) {
  puts("gemm_bench: built without CUDA");
  return 0;
}
#else
#include "gpu.h"
#include <cublasLt.h>

extern const rg_op rgi_op_linear, rgi_op_linear_bwd, rgi_op_compress_kv, rgi_op_compress_kv_bwd;

enum { RUNS = 20, KH = 4, D = 128, KERNEL = 32, STRIDE = 16 };

static rg_arg lengths(int32_t total) {
  const int32_t cu[2] = {0, total};
  return gpu_filled(gpu_tensor(RG_I32, 1, 2, 0, 0), cu);
}

/* Ports in order; NULL: absent. */
static gpu_call fill(const rg_op *op, const rg_arg *const *in, const rg_arg *const *out) {
  gpu_call k = gpu_begin(op);
  for (int i = 0; i < op->nin; i++)
    if (in[i]) gpu_in(&k, op->in[i].name, *in[i]);
  for (int i = 0; i < op->nout; i++)
    if (out[i]) gpu_out(&k, op->out[i].name, *out[i]);
  return k;
}

static void report(const char *what, float ms, double flops, double bytes, size_t workspace) {
  const double s = ms * 1e-3;
  printf("%-28s %8.3f ms %7.1f TFLOP/s %6.2f TB/s  workspace %6.1f MiB\n", what, s * 1e3,
         flops / s * 1e-12, bytes / s * 1e-12, (double)workspace / (1 << 20));
}

static void bench(const char *what, gpu_call k, double flops, double bytes) {
  const float ms = gpu_time(&k, RUNS);
  report(what, ms, flops, bytes, k.workspace);
}

/* ---- cuBLASLt ---- */

enum { ROOM = 32 << 20 };
typedef struct product {
  cublasLtHandle_t handle;
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t a, b, c;
  cublasLtMatmulHeuristicResult_t found;
  const rg_arg *x, *y, *z;
  void *work;
} product;
static void multiply(void *arg) {
  const product *p = arg;
  const float one = 1, zero = 0;
  cublasLtMatmul(p->handle, p->op, &one, p->y->data, p->b, p->x->data, p->a, &zero, p->z->data,
                 p->c, p->z->data, p->c, &p->found.algo, p->work, ROOM, 0);
}

/* Row-major C [m, n] = A·B, A [m, k] or its transpose [k, m], B [k, n] or [n, k]. */
static void library(const char *what, const rg_arg *c, const rg_arg *a, bool ta, const rg_arg *b,
                    bool tb) {
  product p = {.x = a, .y = b, .z = c};
  cublasLtMatmulPreference_t wish;
  const size_t room = ROOM;
  int n = 0;
  const cublasOperation_t opa = ta ? CUBLAS_OP_T : CUBLAS_OP_N,
                          opb = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
  GPU_OK(cudaMalloc(&p.work, ROOM));
  cublasLtCreate(&p.handle);
  cublasLtMatmulDescCreate(&p.op, CUBLAS_COMPUTE_32F, CUDA_R_32F); /* column-major: Cᵀ = Bᵀ·Aᵀ */
  cublasLtMatmulDescSetAttribute(p.op, CUBLASLT_MATMUL_DESC_TRANSA, &opb, sizeof opb);
  cublasLtMatmulDescSetAttribute(p.op, CUBLASLT_MATMUL_DESC_TRANSB, &opa, sizeof opa);
  cublasLtMatrixLayoutCreate(&p.a, CUDA_R_16BF, (uint64_t)a->dim[1], (uint64_t)a->dim[0],
                             a->stride[0]);
  cublasLtMatrixLayoutCreate(&p.b, CUDA_R_16BF, (uint64_t)b->dim[1], (uint64_t)b->dim[0],
                             b->stride[0]);
  cublasLtMatrixLayoutCreate(&p.c, CUDA_R_16BF, (uint64_t)c->dim[1], (uint64_t)c->dim[0],
                             c->stride[0]);
  cublasLtMatmulPreferenceCreate(&wish);
  cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room,
                                       sizeof room);
  cublasLtMatmulAlgoGetHeuristic(p.handle, p.op, p.b, p.a, p.c, p.c, wish, 1, &p.found, &n);
  if (n > 0)
    report(what, gpu_median(multiply, &p, RUNS, NULL),
           2.0 * (double)c->dim[0] * (double)c->dim[1] * (double)a->dim[ta ? 0 : 1], 0, ROOM);
  else
    printf("%-28s refused\n", what);
  cublasLtMatmulPreferenceDestroy(wish);
  cublasLtMatrixLayoutDestroy(p.c);
  cublasLtMatrixLayoutDestroy(p.b);
  cublasLtMatrixLayoutDestroy(p.a);
  cublasLtMatmulDescDestroy(p.op);
  cublasLtDestroy(p.handle);
  GPU_OK(cudaFree(p.work));
}

/* ---- the benchmarks ---- */

/* Rows computed in a short call must have the bits they have in a long one. */
static void same_rows(const rg_arg *y, const rg_arg *x, const rg_arg *w) {
  enum { ROWS = 200 };
  rg_arg part = *x, short_y = gpu_tensor(RG_BF16, 2, ROWS, y->dim[1], 1);
  const int64_t first = x->dim[0] - ROWS - 7, bytes = ROWS * y->dim[1] * 2;
  char *a = malloc((size_t)bytes), *b = malloc((size_t)bytes);
  if (!a || !b) exit(1);
  part.data = (char *)x->data + first * x->stride[0] * 2;
  part.dim[0] = ROWS;
  gpu_call k =
      fill(&rgi_op_linear, (const rg_arg *[]){&part, w, NULL, NULL}, (const rg_arg *[]){&short_y});
  gpu_time(&k, 1);
  GPU_OK(cudaMemcpy(a, (char *)y->data + first * y->stride[0] * 2, (size_t)bytes,
                    cudaMemcpyDeviceToHost));
  GPU_OK(cudaMemcpy(b, short_y.data, (size_t)bytes, cudaMemcpyDeviceToHost));
  printf("rows of a short call: %s\n", memcmp(a, b, (size_t)bytes) ? "OTHER BITS" : "same bits");
  free(a), free(b);
  GPU_OK(cudaFree(short_y.data));
}

static void linear(int64_t T) {
  const int64_t K = 4096, N = 4096;
  rg_arg x = gpu_normal(RG_BF16, 2, T, K, 1, 1), w = gpu_normal(RG_BF16, 2, N, K, 1, 0.02f);
  rg_arg y = gpu_normal(RG_BF16, 2, T, N, 1, 1), dx = gpu_tensor(RG_BF16, 2, T, K, 1);
  rg_arg dw = gpu_tensor(RG_BF16, 2, N, K, 1), db = gpu_tensor(RG_BF16, 1, N, 1, 1);
  rg_arg cu = lengths((int32_t)T);
  const double flops = 2.0 * (double)T * (double)K * (double)N;
  const double bytes = 2.0 * ((double)(T * K) + (double)(N * K) + (double)(T * N));
  printf("linear %lld x %lld x %lld bf16\n", (long long)T, (long long)N, (long long)K);
  gpu_call own =
      fill(&rgi_op_linear, (const rg_arg *[]){&x, &w, NULL, &cu}, (const rg_arg *[]){&y});
  gpu_int(&own, "batch_invariant", 1);
  bench("  forward, batch_invariant", own, flops, bytes);
  bench("  forward",
        fill(&rgi_op_linear, (const rg_arg *[]){&x, &w, NULL, &cu}, (const rg_arg *[]){&y}), flops,
        bytes);
  if (T > 207) same_rows(&y, &x, &w);
  const rg_arg *in[] = {&x, &w, NULL, &cu, &y, NULL, NULL, NULL};
  own = fill(&rgi_op_linear_bwd, in, (const rg_arg *[]){&dx, NULL, NULL});
  gpu_int(&own, "batch_invariant", 1);
  bench("  d x, batch_invariant", own, flops, bytes);
  bench("  d x", fill(&rgi_op_linear_bwd, in, (const rg_arg *[]){&dx, NULL, NULL}), flops, bytes);
  bench("  d w", fill(&rgi_op_linear_bwd, in, (const rg_arg *[]){NULL, &dw, NULL}), flops, bytes);
  rg_arg sum = gpu_tensor(RG_F32, 2, T, K, 1);
  in[5] = &sum;
  bench("  d x onto a sum", fill(&rgi_op_linear_bwd, in, (const rg_arg *[]){&sum, NULL, NULL}),
        flops, bytes + 6.0 * (double)(T * K));
  in[5] = NULL;
  bench("  d b", fill(&rgi_op_linear_bwd, in, (const rg_arg *[]){NULL, NULL, &db}), 0,
        2.0 * (double)(T * N));
  library("  cuBLASLt forward", &y, &x, false, &w, true);
  library("  cuBLASLt d x", &dx, &y, false, &w, false);
  library("  cuBLASLt d w", &dw, &y, true, &x, false);
  rg_arg *all[] = {&x, &w, &y, &dx, &dw, &db, &sum, &cu};
  for (int i = 0; i < RGI_COUNT(all); i++) GPU_OK(cudaFree(all[i]->data));
}

static void compress(int64_t T, int method, const char *name) {
  const int64_t rows = T / STRIDE, wide = method > 1 ? 2 * D : D;
  rg_arg x[2], y[2], dx[2], w[2], dw[2], cu = lengths((int32_t)T);
  char text[64];
  for (int i = 0; i < 2; i++) {
    x[i] = gpu_normal(RG_BF16, 3, T, KH, D, 1), dx[i] = gpu_tensor(RG_BF16, 3, T, KH, D);
    y[i] = gpu_normal(RG_BF16, 3, rows, KH, D, 1);
    w[i] = gpu_normal(RG_BF16, 2, wide, KERNEL * D, 1, 0.02f),
    dw[i] = gpu_tensor(RG_BF16, 2, wide, KERNEL * D, 1);
  }
  const bool learned = method > 0;
  const rg_arg *w0 = learned ? &w[0] : NULL, *w1 = learned ? &w[1] : NULL;
  const double bytes = 2.0 * 2.0 * (double)(T + rows) * KH * D;
  const double flops =
      learned ? 2.0 * 2.0 * (double)(rows - 1) * KH * (double)wide * KERNEL * D : 0;
  const rg_value attr[] = {{.i = KERNEL}, {.i = STRIDE}, {.i = method}, {.i = method}};
  gpu_call k = fill(&rgi_op_compress_kv, (const rg_arg *[]){&x[0], &x[1], w0, w1, &cu},
                    (const rg_arg *[]){&y[0], &y[1]});
  memcpy(k.attr, attr, sizeof attr);
  snprintf(text, sizeof text, "  %s forward", name);
  bench(text, k, flops, bytes);
  const rg_arg *in[] = {&x[0], &x[1], w0, w1, &cu, &y[0], &y[1], NULL, NULL, NULL, NULL};
  for (int part = learned ? 0 : 1; part < 3; part++) { /* all, dx, dW */
    bool want_x = part != 2, want_w = learned && part != 1;
    if (!want_x && !want_w) continue;
    k = fill(&rgi_op_compress_kv_bwd, in,
             (const rg_arg *[]){want_x ? &dx[0] : NULL, want_x ? &dx[1] : NULL,
                                want_w ? &dw[0] : NULL, want_w ? &dw[1] : NULL});
    memcpy(k.attr, attr, sizeof attr);
    snprintf(text, sizeof text, "  %s backward%s", name,
             part == 0   ? ""
             : part == 1 ? ", d x"
                         : ", d w");
    bench(text, k, flops * (want_x + want_w + (method > 1)), bytes);
  }
  for (int i = 0; i < 2; i++) {
    rg_arg *all[] = {&x[i], &dx[i], &y[i], &w[i], &dw[i]};
    for (int n = 0; n < RGI_COUNT(all); n++) GPU_OK(cudaFree(all[n]->data));
  }
  GPU_OK(cudaFree(cu.data));
}

static void both(int64_t T, int64_t TC) {
  if (T > 0) linear(T);
  if (TC == 0) return;
  printf("compress_kv %lld tokens, K and V, %d heads, d %d, blocks %d/%d, bf16\n", (long long)TC,
         KH, D, KERNEL, STRIDE);
  compress(TC, 0, "mean");
  compress(TC, 1, "linear");
  compress(TC, 2, "swiglu");
  compress(TC, 3, "sigmoid_mul");
}

int main(int argc, char **argv) {
  gpu_open();
  if (argc == 1) both(8192, 131072);
  for (int i = 1; i < argc; i += 2) both(atoll(argv[i]), i + 1 < argc ? atoll(argv[i + 1]) : 0);
  return 0;
}
#endif
