/* bench/gemm_bench.c: linear and compress_kv on a GPU, and cuBLASLt on the same products.
 *
 *   gemm_bench [tokens of linear [tokens of compress_kv]]      default 8192, 131072
 *
 * linear: [T, 4096] · [4096, 4096], bf16. compress_kv: one sequence, 4 KV heads, d 128, blocks 32/16, bf16.
 * Each line is the median of 20 runs after 3: milliseconds, TFLOP/s of useful products and TB/s of bytes read
 * and written once.
 */
#include "../graph/base.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef REGRAPH_CUDA
int main(void) {
  puts("gemm_bench: built without CUDA");
  return 0;
}
#else
#include "../exec/cuda.h"
#include <cublasLt.h>

extern const rg_op rgi_op_linear, rgi_op_linear_bwd, rgi_op_compress_kv, rgi_op_compress_kv_bwd;

enum { RUNS = 20, WARM = 3, PORTS = 16, KH = 4, D = 128, KERNEL = 32, STRIDE = 16 };

#define CUDA(x)                                                                                              \
  do {                                                                                                       \
    cudaError_t code_ = (x);                                                                                 \
    if (code_ != cudaSuccess) {                                                                              \
      fprintf(stderr, "gemm_bench: %s: %s\n", #x, cudaGetErrorString(code_));                                \
      exit(1);                                                                                               \
    }                                                                                                        \
  } while (0)

static rg_gpu gpu;
static rg_error error;
static cudaEvent_t begin, end;

/* ---- tensors ---- */

/* Values about N(0, scale²), a megabyte of them over and over. */
static rg_arg tensor(rg_dtype dtype, int rank, int64_t d0, int64_t d1, int64_t d2, float scale) {
  enum { MOST = 1 << 20 };
  static uint16_t host[MOST / 2];
  static uint32_t state = 1;
  rg_arg a = {.dtype = dtype, .rank = rank, .dim = {d0, d1, d2}, .align = 16};
  int64_t n = 1;
  for (int i = rank - 1; i >= 0; i--) {
    a.stride[i] = n;
    n *= a.dim[i];
  }
  size_t bytes = (size_t)n * rg_dtype_size(dtype);
  CUDA(cudaMalloc(&a.data, bytes + 256));
  CUDA(cudaMemset(a.data, 0, bytes));
  if (dtype != RG_BF16) return a;
  for (int i = 0; i < MOST / 2; i++) {
    float x = -6;
    uint32_t u;
    for (int k = 0; k < 12; k++) x += (float)((state = state * 1664525u + 1013904223u) >> 8) / 16777216.0f;
    x *= scale;
    memcpy(&u, &x, 4);
    host[i] = (uint16_t)(u >> 16);
  }
  for (size_t at = 0; at < bytes; at += MOST)
    CUDA(
        cudaMemcpy((char *)a.data + at, host, bytes - at < MOST ? bytes - at : MOST, cudaMemcpyHostToDevice));
  return a;
}

static rg_arg lengths(int32_t total) {
  rg_arg a = {.dtype = RG_I32, .rank = 1, .dim = {2}, .stride = {1}, .align = 16};
  int32_t cu[2] = {0, total};
  CUDA(cudaMalloc(&a.data, sizeof cu));
  CUDA(cudaMemcpy(a.data, cu, sizeof cu, cudaMemcpyHostToDevice));
  return a;
}

/* ---- calls ---- */

typedef struct call {
  rg_call c;
  rg_arg in[PORTS], out[PORTS];
  int32_t in_begin[PORTS + 1], out_begin[PORTS + 1];
  rg_value attr[PORTS];
  rgi_cuda_eager x;
} call;

/* Ports in order; NULL: absent. */
static void fill(call *k, const rg_op *op, const rg_arg *const *in, const rg_arg *const *out) {
  *k = (call){.c = {.op = op, .node = "bench", .gpu = &gpu, .error = &error}};
  for (int i = 0, n = 0; i <= op->nin; i++) {
    k->in_begin[i] = n;
    if (i < op->nin && in[i]) k->in[n++] = *in[i];
  }
  for (int i = 0, n = 0; i <= op->nout; i++) {
    k->out_begin[i] = n;
    if (i < op->nout && out[i]) k->out[n++] = *out[i];
  }
  k->c.in = k->in, k->c.in_begin = k->in_begin, k->c.out = k->out, k->c.out_begin = k->out_begin;
  k->c.attr = k->attr;
  rgi_cuda_eager_init(&k->x, 0, &error);
}

static void once(call *k) {
  if (k->c.op->cuda_steps(&k->c, &k->x.base) != RG_OK) {
    fprintf(stderr, "gemm_bench: %s: %s\n", k->c.op->name, error.message);
    exit(1);
  }
}

static int by_size(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static void report(const char *what, float *ms, double flops, double bytes, size_t workspace) {
  qsort(ms, RUNS, sizeof *ms, by_size);
  double s = ms[RUNS / 2] * 1e-3;
  printf("%-28s %8.3f ms %7.1f TFLOP/s %6.2f TB/s  workspace %6.1f MiB\n", what, s * 1e3, flops / s * 1e-12,
         bytes / s * 1e-12, (double)workspace / (1 << 20));
}

static void bench(const char *what, call *k, double flops, double bytes) {
  float ms[RUNS];
  size_t size = k->c.op->workspace ? k->c.op->workspace(&k->c) : 0;
  CUDA(cudaMalloc(&k->c.workspace, size + 256));
  for (int i = -WARM; i < RUNS; i++) {
    CUDA(cudaEventRecord(begin, 0));
    once(k);
    CUDA(cudaEventRecord(end, 0));
    CUDA(cudaEventSynchronize(end));
    if (i >= 0) CUDA(cudaEventElapsedTime(&ms[i], begin, end));
  }
  report(what, ms, flops, bytes, size);
  CUDA(cudaFree(k->c.workspace));
}

/* ---- cuBLASLt ---- */

/* Row-major C [m, n] = A·B, A [m, k] or its transpose [k, m], B [k, n] or [n, k]. */
static void library(const char *what, const rg_arg *c, const rg_arg *a, bool ta, const rg_arg *b, bool tb) {
  enum { ROOM = 32 << 20 };
  cublasLtHandle_t handle;
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t la, lb, lc;
  cublasLtMatmulPreference_t wish;
  cublasLtMatmulHeuristicResult_t found;
  size_t room = ROOM;
  int n = 0;
  float one = 1, zero = 0, ms[RUNS];
  void *work;
  cublasOperation_t opa = ta ? CUBLAS_OP_T : CUBLAS_OP_N, opb = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
  CUDA(cudaMalloc(&work, ROOM));
  cublasLtCreate(&handle);
  cublasLtMatmulDescCreate(&op, CUBLAS_COMPUTE_32F, CUDA_R_32F); /* column-major: Cᵀ = Bᵀ·Aᵀ */
  cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &opb, sizeof opb);
  cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSB, &opa, sizeof opa);
  cublasLtMatrixLayoutCreate(&la, CUDA_R_16BF, (uint64_t)a->dim[1], (uint64_t)a->dim[0], a->stride[0]);
  cublasLtMatrixLayoutCreate(&lb, CUDA_R_16BF, (uint64_t)b->dim[1], (uint64_t)b->dim[0], b->stride[0]);
  cublasLtMatrixLayoutCreate(&lc, CUDA_R_16BF, (uint64_t)c->dim[1], (uint64_t)c->dim[0], c->stride[0]);
  cublasLtMatmulPreferenceCreate(&wish);
  cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room);
  cublasLtMatmulAlgoGetHeuristic(handle, op, lb, la, lc, lc, wish, 1, &found, &n);
  for (int i = -WARM; n > 0 && i < RUNS; i++) {
    CUDA(cudaEventRecord(begin, 0));
    cublasLtMatmul(handle, op, &one, b->data, lb, a->data, la, &zero, c->data, lc, c->data, lc, &found.algo,
                   work, ROOM, 0);
    CUDA(cudaEventRecord(end, 0));
    CUDA(cudaEventSynchronize(end));
    if (i >= 0) CUDA(cudaEventElapsedTime(&ms[i], begin, end));
  }
  if (n > 0)
    report(what, ms, 2.0 * (double)c->dim[0] * (double)c->dim[1] * (double)a->dim[ta ? 0 : 1], 0, ROOM);
  else
    printf("%-28s refused\n", what);
  cublasLtMatmulPreferenceDestroy(wish);
  cublasLtMatrixLayoutDestroy(lc);
  cublasLtMatrixLayoutDestroy(lb);
  cublasLtMatrixLayoutDestroy(la);
  cublasLtMatmulDescDestroy(op);
  cublasLtDestroy(handle);
  CUDA(cudaFree(work));
}

/* ---- the benchmarks ---- */

/* Rows computed in a short call must have the bits they have in a long one. */
static void same_rows(const rg_arg *y, const rg_arg *x, const rg_arg *w) {
  enum { ROWS = 200 };
  rg_arg part = *x, short_y = tensor(RG_BF16, 2, ROWS, y->dim[1], 1, 0);
  call k;
  const int64_t first = x->dim[0] - ROWS - 7, bytes = ROWS * y->dim[1] * 2;
  char *a = malloc((size_t)bytes), *b = malloc((size_t)bytes);
  if (!a || !b) exit(1);
  part.data = (char *)x->data + first * x->stride[0] * 2;
  part.dim[0] = ROWS;
  fill(&k, &rgi_op_linear, (const rg_arg *[]){&part, w, NULL, NULL}, (const rg_arg *[]){&short_y});
  once(&k);
  CUDA(cudaMemcpy(a, (char *)y->data + first * y->stride[0] * 2, (size_t)bytes, cudaMemcpyDeviceToHost));
  CUDA(cudaMemcpy(b, short_y.data, (size_t)bytes, cudaMemcpyDeviceToHost));
  printf("rows of a short call: %s\n", memcmp(a, b, (size_t)bytes) ? "OTHER BITS" : "same bits");
  free(a), free(b);
  CUDA(cudaFree(short_y.data));
}

static void linear(int64_t T) {
  const int64_t K = 4096, N = 4096;
  rg_arg x = tensor(RG_BF16, 2, T, K, 1, 1), w = tensor(RG_BF16, 2, N, K, 1, 0.02f);
  rg_arg y = tensor(RG_BF16, 2, T, N, 1, 1), dx = tensor(RG_BF16, 2, T, K, 1, 0);
  rg_arg dw = tensor(RG_BF16, 2, N, K, 1, 0), db = tensor(RG_BF16, 1, N, 1, 1, 0);
  rg_arg cu = lengths((int32_t)T);
  const double flops = 2.0 * (double)T * (double)K * (double)N;
  const double bytes = 2.0 * ((double)(T * K) + (double)(N * K) + (double)(T * N));
  call k;
  printf("linear %lld x %lld x %lld bf16\n", (long long)T, (long long)N, (long long)K);
  fill(&k, &rgi_op_linear, (const rg_arg *[]){&x, &w, NULL, &cu}, (const rg_arg *[]){&y});
  bench("  forward", &k, flops, bytes);
  same_rows(&y, &x, &w);
  const rg_arg *in[] = {&x, &w, NULL, &cu, &y, NULL, NULL, NULL};
  fill(&k, &rgi_op_linear_bwd, in, (const rg_arg *[]){&dx, NULL, NULL});
  bench("  d x", &k, flops, bytes);
  fill(&k, &rgi_op_linear_bwd, in, (const rg_arg *[]){NULL, &dw, NULL});
  bench("  d w", &k, flops, bytes);
  rg_arg sum = tensor(RG_F32, 2, T, K, 1, 0);
  in[5] = &sum;
  fill(&k, &rgi_op_linear_bwd, in, (const rg_arg *[]){&sum, NULL, NULL});
  bench("  d x onto a sum", &k, flops, bytes + 6.0 * (double)(T * K));
  in[5] = NULL;
  fill(&k, &rgi_op_linear_bwd, in, (const rg_arg *[]){NULL, NULL, &db});
  bench("  d b", &k, 0, 2.0 * (double)(T * N));
  library("  cuBLASLt forward", &y, &x, false, &w, true);
  library("  cuBLASLt d x", &dx, &y, false, &w, false);
  library("  cuBLASLt d w", &dw, &y, true, &x, false);
  rg_arg *all[] = {&x, &w, &y, &dx, &dw, &db, &sum, &cu};
  for (int i = 0; i < RGI_COUNT(all); i++) CUDA(cudaFree(all[i]->data));
}

static void compress(int64_t T, int method, const char *name) {
  const int64_t rows = T / STRIDE, wide = method > 1 ? 2 * D : D;
  rg_arg x[2], y[2], dx[2], w[2], dw[2], cu = lengths((int32_t)T);
  char text[64];
  call k;
  for (int i = 0; i < 2; i++) {
    x[i] = tensor(RG_BF16, 3, T, KH, D, 1), dx[i] = tensor(RG_BF16, 3, T, KH, D, 0);
    y[i] = tensor(RG_BF16, 3, rows, KH, D, 1);
    w[i] = tensor(RG_BF16, 2, wide, KERNEL * D, 1, 0.02f), dw[i] = tensor(RG_BF16, 2, wide, KERNEL * D, 1, 0);
  }
  const bool learned = method > 0;
  const rg_arg *w0 = learned ? &w[0] : NULL, *w1 = learned ? &w[1] : NULL;
  const double bytes = 2.0 * 2.0 * (double)(T + rows) * KH * D;
  const double flops = learned ? 2.0 * 2.0 * (double)(rows - 1) * KH * (double)wide * KERNEL * D : 0;
  const rg_value attr[] = {{.i = KERNEL}, {.i = STRIDE}, {.i = method}, {.i = method}};
  fill(&k, &rgi_op_compress_kv, (const rg_arg *[]){&x[0], &x[1], w0, w1, &cu},
       (const rg_arg *[]){&y[0], &y[1]});
  memcpy(k.attr, attr, sizeof attr);
  snprintf(text, sizeof text, "  %s forward", name);
  bench(text, &k, flops, bytes);
  const rg_arg *in[] = {&x[0], &x[1], w0, w1, &cu, &y[0], &y[1], NULL, NULL, NULL, NULL};
  for (int part = learned ? 0 : 1; part < 3; part++) { /* all, dx, dW */
    bool want_x = part != 2, want_w = learned && part != 1;
    if (!want_x && !want_w) continue;
    fill(&k, &rgi_op_compress_kv_bwd, in,
         (const rg_arg *[]){want_x ? &dx[0] : NULL, want_x ? &dx[1] : NULL, want_w ? &dw[0] : NULL,
                            want_w ? &dw[1] : NULL});
    memcpy(k.attr, attr, sizeof attr);
    snprintf(text, sizeof text, "  %s backward%s", name, part == 0 ? "" : part == 1 ? ", d x" : ", d w");
    bench(text, &k, flops * (want_x + want_w + (method > 1)), bytes);
  }
  for (int i = 0; i < 2; i++) {
    rg_arg *all[] = {&x[i], &dx[i], &y[i], &w[i], &dw[i]};
    for (int n = 0; n < RGI_COUNT(all); n++) CUDA(cudaFree(all[n]->data));
  }
  CUDA(cudaFree(cu.data));
}

int main(int argc, char **argv) {
  int64_t T = argc > 1 ? atoll(argv[1]) : 8192, TC = argc > 2 ? atoll(argv[2]) : 131072;
  if (rgi_cuda_device(&gpu, &error) != RG_OK) {
    fprintf(stderr, "gemm_bench: %s\n", error.message);
    return 1;
  }
  CUDA(cudaEventCreate(&begin));
  CUDA(cudaEventCreate(&end));
  if (T > 0) linear(T);
  printf("compress_kv %lld tokens, K and V, %d heads, d %d, blocks %d/%d, bf16\n", (long long)TC, KH, D,
         KERNEL, STRIDE);
  compress(TC, 0, "mean");
  compress(TC, 1, "linear");
  compress(TC, 2, "swiglu");
  compress(TC, 3, "sigmoid_mul");
  return 0;
}
#endif
