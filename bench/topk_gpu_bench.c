/* bench/topk_gpu_bench.c: times topk on a GPU through its cuda_steps.
 *
 *   topk_gpu_bench [-T n] [-H n] [--kh n] [-D n] [--dtype f32|f16|bf16] [--kernel n] [--stride n] [--block n]
 *                  [--top n] [--init n] [--local n] [--dot] [--runs n] [--plain] [--check]
 *
 * One sequence, standard normal q and k, lse as uniform attention would have it. Prints the path taken, the
 * median of the runs, the rate of useful operations and the workspace. --plain times the plain path,
 * --check says how many indices differ from the plain path's (ties and rounding make a few).
 */
#include "../exec/cuda.h"
#include "../ops/ops.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

extern const rg_op rgi_op_topk;

typedef struct options {
  const char *dtype;
  int64_t T, H, KH, D, kernel, stride, block, top, init, local, runs;
  bool dot, plain, check;
} options;

static uint64_t state = 1;
static uint64_t draw(void) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}

static void cuda(cudaError_t code, const char *what) {
  if (code == cudaSuccess) return;
  fprintf(stderr, "topk_gpu_bench: %s: %s\n", what, cudaGetErrorString(code));
  exit(1);
}

static rg_arg tensor(rg_dtype dtype, int rank, int64_t d0, int64_t d1, int64_t d2, const void *from) {
  rg_arg a = {.dtype = dtype, .rank = rank, .dim = {d0, d1, d2}, .align = 16};
  int64_t n = 1;
  for (int i = rank - 1; i >= 0; i--) {
    a.stride[i] = n;
    n *= a.dim[i];
  }
  const size_t bytes = (size_t)n * rg_dtype_size(dtype);
  cuda(cudaMalloc(&a.data, bytes ? bytes : 256), "cudaMalloc");
  if (from) cuda(cudaMemcpy(a.data, from, bytes, cudaMemcpyHostToDevice), "copy");
  return a;
}

/* About N(0, 1). At most 2^23 numbers are drawn; more are repeats, shifted by rows. */
static rg_arg normal(rg_dtype dtype, int64_t d0, int64_t d1, int64_t d2) {
  enum { MOST = 1 << 23 };
  rg_arg a = tensor(dtype, 3, d0, d1, d2, NULL);
  const size_t size = rg_dtype_size(dtype);
  const int64_t n = d0 * d1 * d2, drawn = n < MOST ? n : MOST, step = n < MOST ? n : MOST - 7 * d2;
  char *host = malloc((size_t)drawn * size + 1);
  if (!host) exit(1);
  for (int64_t i = 0; i < drawn; i++) {
    float x = -3;
    for (int j = 0; j < 3; j++) {
      uint64_t bits = draw();
      x += (float)(bits & 0xffff) * 0x1p-16f + (float)(bits >> 15) * 0x1p-16f;
    }
    x *= 1.4142f;
    rgi_store(host + (size_t)i * size, dtype, &x, 1);
  }
  for (int64_t i = 0; i < n; i += step)
    cuda(cudaMemcpy((char *)a.data + (size_t)i * size, host, (size_t)(n - i < step ? n - i : step) * size,
                    cudaMemcpyHostToDevice),
         "copy");
  free(host);
  return a;
}

static int by_time(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static void time_call(const options *o, rg_call *c, int runs) {
  enum { MOST = 1000 };
  float ms[MOST];
  const size_t size = rgi_op_topk.workspace(c);
  rgi_cuda_eager eager;
  cudaEvent_t from, to;
  cudaEventCreate(&from);
  cudaEventCreate(&to);
  cuda(cudaMalloc(&c->workspace, size ? size : 256), "cudaMalloc");
  rgi_cuda_eager_init(&eager, 0, c->error);
  if (runs > MOST) runs = MOST;
  for (int i = runs > 1 ? -3 : 0; i < runs; i++) {
    cudaEventRecord(from, 0);
    if (rgi_op_topk.cuda_steps(c, &eager.base) != RG_OK) {
      fprintf(stderr, "topk_gpu_bench: %s\n", c->error->message);
      exit(1);
    }
    cudaEventRecord(to, 0);
    cuda(cudaEventSynchronize(to), "topk");
    if (i >= 0) cudaEventElapsedTime(&ms[i], from, to);
  }
  rgi_cuda_eager_done(&eager);
  cudaFree(c->workspace);
  qsort(ms, (size_t)runs, sizeof *ms, by_time);
  rg_cost cost;
  rgi_op_topk.cost(c, &cost);
  printf(
      "topk T %-7lld H %lld/%lld d %lld %-4s %lld/%lld/%lld top %lld%s %10.3f ms (best %.3f) %7.1f TFLOP/s  "
      "ws %.1f MB  %s\n",
      (long long)o->T, (long long)o->H, (long long)o->KH, (long long)o->D, o->dtype, (long long)o->kernel,
      (long long)o->stride, (long long)o->block, (long long)o->top, o->dot ? " dot" : "", ms[runs / 2], ms[0],
      cost.flops / ms[runs / 2] * 1e-9, (double)size * 1e-6, rgi_op_topk.cuda_path(c));
  fflush(stdout);
}

static int32_t *fetch(const rg_arg *a) {
  const size_t n = (size_t)(a->dim[0] * a->dim[1] * a->dim[2]);
  int32_t *host = malloc(n * sizeof *host + 1);
  if (!host) exit(1);
  cuda(cudaMemcpy(host, a->data, n * sizeof *host, cudaMemcpyDeviceToHost), "copy");
  return host;
}

static void measure(const options *o, rg_dtype dtype, const rg_gpu *gpu) {
  enum { Q, K, LSE, CU, CU_K, OFFSET, INPUTS };
  const int32_t cu[] = {0, (int32_t)o->T}, begin[INPUTS + 1] = {0, 1, 2, 3, 4, 5, 6}, out_begin[] = {0, 1};
  rg_error e = {0};
  float *lse = malloc((size_t)(o->T * o->H) * sizeof *lse);
  if (!lse) exit(1);
  for (int64_t t = 0; t < o->T; t++)
    for (int64_t h = 0; h < o->H; h++) lse[t * o->H + h] = logf((float)(t / o->stride + 1)) + 0.5f;
  rg_arg in[INPUTS], out = tensor(RG_I32, 3, o->T, o->KH, o->top, NULL);
  for (int i = 0; i < INPUTS; i++) in[i] = (rg_arg){.rank = -1};
  in[Q] = normal(dtype, o->T, o->H, o->D);
  in[K] = normal(dtype, o->T / o->stride, o->KH, o->D);
  if (!o->dot) in[LSE] = tensor(RG_F32, 2, o->T, o->H, 0, lse);
  in[CU] = tensor(RG_I32, 1, 2, 0, 0, cu);
  if (o->plain) in[Q].align = 4;
  free(lse);

  rg_value attr[16] = {{0}};
  const struct {
    const char *name;
    int64_t value;
  } given[] = {{"kernel", o->kernel}, {"stride", o->stride}, {"block", o->block}, {"top_n", o->top},
               {"init", o->init},     {"local", o->local},   {"score", o->dot}};
  for (int i = 0; i < rgi_op_topk.nattr; i++)
    for (int j = 0; j < RGI_COUNT(given); j++)
      if (strcmp(rgi_op_topk.attrs[i].name, given[j].name) == 0) attr[i].i = given[j].value;
  rg_call c = {.op = &rgi_op_topk,
               .node = "topk",
               .threads = 1,
               .gpu = gpu,
               .error = &e,
               .attr = attr,
               .in = in,
               .in_begin = begin,
               .out = &out,
               .out_begin = out_begin};
  cudaMemset(out.data, 0xff, (size_t)(o->T * o->KH * o->top) * 4);
  time_call(o, &c, (int)o->runs);
  if (!o->check) return;
  int32_t *mine = fetch(&out);
  in[Q].align = 4;
  time_call(o, &c, 1);
  int32_t *plain = fetch(&out);
  int64_t rows = 0, entries = 0;
  for (int64_t r = 0; r < o->T * o->KH; r++) {
    const int32_t *a = mine + r * o->top, *b = plain + r * o->top;
    int64_t n = 0;
    for (int64_t i = 0; i < o->top; i++) {
      int64_t j = 0;
      while (j < o->top && b[j] != a[i]) j++;
      n += j == o->top;
    }
    rows += n > 0, entries += n;
  }
  printf("  differs from plain in %lld of %lld rows, %lld entries\n", (long long)rows,
         (long long)(o->T * o->KH), (long long)entries);
  free(mine);
  free(plain);
}

int main(int argc, char **argv) {
  options o = {"bf16", 8192, 64, 4, 128, 32, 16, 64, 16, 1, 2, 11, false, false, false};
  const struct {
    const char *flag;
    int64_t *number;
    bool *yes;
  } flags[] = {{"-T", &o.T, 0},
               {"-H", &o.H, 0},
               {"--kh", &o.KH, 0},
               {"-D", &o.D, 0},
               {"--kernel", &o.kernel, 0},
               {"--stride", &o.stride, 0},
               {"--block", &o.block, 0},
               {"--top", &o.top, 0},
               {"--init", &o.init, 0},
               {"--local", &o.local, 0},
               {"--runs", &o.runs, 0},
               {"--dot", 0, &o.dot},
               {"--plain", 0, &o.plain},
               {"--check", 0, &o.check},
               {"--dtype", 0, 0}};
  for (int i = 1; i < argc; i++) {
    int f = 0;
    while (f < RGI_COUNT(flags) && strcmp(argv[i], flags[f].flag) != 0) f++;
    if (f == RGI_COUNT(flags) || (!flags[f].yes && i + 1 == argc)) {
      fprintf(stderr, "topk_gpu_bench: unknown or incomplete option %s (see the file's head)\n", argv[i]);
      return 2;
    }
    if (flags[f].yes)
      *flags[f].yes = true;
    else if (flags[f].number)
      *flags[f].number = atoll(argv[++i]);
    else
      o.dtype = argv[++i];
  }
  rg_dtype dtype = RG_BF16;
  for (int t = 0; t < RG_I32; t++)
    if (strcmp(rg_dtype_name((rg_dtype)t), o.dtype) == 0) dtype = (rg_dtype)t;
  rg_error e = {0};
  rg_gpu gpu;
  if (rgi_cuda_device(&gpu, &e) != RG_OK) {
    fprintf(stderr, "topk_gpu_bench: %s\n", e.message);
    return 1;
  }
  measure(&o, dtype, &gpu);
  return 0;
}
