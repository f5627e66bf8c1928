/* bench/topk_gpu_bench.c: times topk on a GPU through its cuda_steps.

     topk_gpu_bench [-T n] [-H n] [--kh n] [-D n] [--dtype f32|f16|bf16] [--kernel n]
                    [--stride n] [--block n] [--top n] [--init n] [--local n]
                    [--dot] [--relu] [--max] [--runs n] [--plain] [--check]

   One sequence, standard normal q and k, lse as uniform attention would have it. Prints the path
   taken, the median of the runs, the rate of useful operations and the workspace. --plain times the
   plain path, --check says how many indices differ from the plain path's (ties and rounding make a
   few).
 */
#include "../kernels/attn/topk.h"
#include "gpu.h"
#include <math.h>

extern const rg_op rgi_op_topk;

typedef struct options {
  const char *dtype;
  int64_t T, H, KH, D, kernel, stride, block, top, init, local, runs;
  bool dot, relu, max, plain, check;
} options;

static void time_call(const options *o, gpu_call *x, int64_t runs) {
  const float ms = gpu_time(x, runs);
  rg_cost cost;
  rgi_op_topk.cost(&x->c, &cost);
  printf("topk T %-7lld H %lld/%lld d %lld %-4s %lld/%lld/%lld top %lld%s %10.3f ms (best %.3f) "
         "%7.1f TFLOP/s  "
         "ws %.1f MB  %s\n",
         (long long)o->T, (long long)o->H, (long long)o->KH, (long long)o->D, o->dtype,
         (long long)o->kernel, (long long)o->stride, (long long)o->block, (long long)o->top,
         o->dot    ? " dot"
         : o->relu ? " relu"
                   : "",
         ms, x->best, cost.flops / ms * 1e-9, (double)x->workspace * 1e-6,
         rgi_op_topk.cuda_path(&x->c));
  fflush(stdout);
}

static int32_t *fetch(const rg_arg *a) {
  const size_t n = (size_t)(a->dim[0] * a->dim[1] * a->dim[2]);
  int32_t *host = malloc(n * sizeof *host + 1);
  if (!host) exit(1);
  GPU_OK(cudaMemcpy(host, a->data, n * sizeof *host, cudaMemcpyDeviceToHost));
  return host;
}

static void measure(const options *o, rg_dtype dtype) {
  const int32_t cu[] = {0, (int32_t)o->T};
  float *lse = malloc((size_t)(o->T * o->H) * sizeof *lse);
  if (!lse) exit(1);
  for (int64_t t = 0; t < o->T; t++)
    for (int64_t h = 0; h < o->H; h++) lse[t * o->H + h] = logf((float)(t / o->stride + 1)) + 0.5f;
  gpu_call x = gpu_begin(&rgi_op_topk);
  rg_arg q = gpu_normal(dtype, 3, o->T, o->H, o->D, 1);
  if (o->plain) q.align = 4;
  gpu_in(&x, "q", q);
  gpu_in(&x, "k", gpu_normal(dtype, 3, o->T / o->stride, o->KH, o->D, 1));
  if (o->relu) gpu_in(&x, "weight", gpu_normal(dtype, 2, o->T, o->H, 0, 1));
  if (!o->dot && !o->relu) gpu_in(&x, "lse", gpu_filled(gpu_tensor(RG_F32, 2, o->T, o->H, 0), lse));
  gpu_in(&x, "cu_seqlens", gpu_filled(gpu_tensor(RG_I32, 1, 2, 0, 0), cu));
  const rg_arg out = gpu_out(&x, "idx", gpu_tensor(RG_I32, 3, o->T, o->KH, o->top));
  free(lse);
  gpu_int(&x, "kernel", o->kernel);
  gpu_int(&x, "stride", o->stride);
  gpu_int(&x, "block", o->block);
  gpu_int(&x, "top_n", o->top);
  gpu_int(&x, "init", o->init);
  gpu_int(&x, "local", o->local);
  gpu_int(&x, "score", o->relu ? RGK_TOPK_BY_RELU : o->dot);
  gpu_int(&x, "pool", o->max);
  time_call(o, &x, o->runs);
  if (!o->check) return;
  int32_t *mine = fetch(&out);
  x.list[0].a.align = 4;
  time_call(o, &x, 1);
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
  options o = {"bf16", 8192, 64, 4,     128,   32,    16,    64,   16,
               1,      2,    11, false, false, false, false, false};
  const gpu_flag flags[] = {{"-T", 0, &o.T, 0},
                            {"-H", 0, &o.H, 0},
                            {"--kh", 0, &o.KH, 0},
                            {"-D", 0, &o.D, 0},
                            {"--kernel", 0, &o.kernel, 0},
                            {"--stride", 0, &o.stride, 0},
                            {"--block", 0, &o.block, 0},
                            {"--top", 0, &o.top, 0},
                            {"--init", 0, &o.init, 0},
                            {"--local", 0, &o.local, 0},
                            {"--runs", 0, &o.runs, 0},
                            {"--dot", 0, 0, &o.dot},
                            {"--relu", 0, 0, &o.relu},
                            {"--max", 0, 0, &o.max},
                            {"--plain", 0, 0, &o.plain},
                            {"--check", 0, 0, &o.check},
                            {"--dtype", &o.dtype, 0, 0}};
  gpu_flags(argc, argv, flags, RGI_COUNT(flags));
  gpu_open();
  measure(&o, gpu_dtype(o.dtype));
  return 0;
}
