/* bench/rows_bench.c: elementwise and row-wise ops on a GPU against its memory: what they must
   move, per second.

     rows_bench [T [name]]      default: 131072 and 32768 tokens, all ops; bf16, 64 heads (4 KV
                                heads) of 128

   A row per case: bytes (each input read once, each output written once), median time of REPEATS
   runs, rate. `copy` is cudaMemcpy on the device, for comparison. Only in builds with nvcc.
 */
#include <stdio.h>

#ifndef REGRAPH_CUDA
int main(void) {
  fprintf(stderr, "rows_bench: this build has no CUDA\n");
  return 77;
}
#else
#include "gpu.h"

extern const rg_op rgi_op_combine, rgi_op_combine_bwd, rgi_op_merge_lse, rgi_op_merge_lse_bwd,
    rgi_op_rmsnorm, rgi_op_rmsnorm_bwd, rgi_op_rope, rgi_op_rope_bwd, rgi_op_silu, rgi_op_silu_bwd,
    rgi_op_mul, rgi_op_mul_bwd, rgi_op_add, rgi_op_cast, rgi_op_concat, rgi_op_zero,
    rgi_op_accumulate;

enum { REPEATS = 15, BUFFERS = 9 };

static struct {
  char *buffer[BUFFERS];
  size_t room;
  int32_t *cu; /* on the device: four sequences */
  int used;    /* buffers */
  const char *only;
} b;

/* ---- tensors: each call of `tensor` takes the next buffer ---- */

static rg_arg tensor(rg_dtype dtype, int64_t d0, int64_t d1, int64_t d2) {
  rg_arg a = gpu_shape(dtype, d2 ? 3 : d1 ? 2 : 1, d0, d1, d2);
  a.data = b.buffer[b.used++ % BUFFERS];
  if (gpu_bytes(&a) > b.room) exit(3);
  return a;
}
static rg_arg lengths(void) {
  return (rg_arg){.data = b.cu, .dtype = RG_I32, .rank = 1, .dim = {5}, .stride = {1}, .align = 16};
}
/* A part of the last axis of a wider tensor: [from, from + width). */
static rg_arg part(rg_arg a, int64_t from, int64_t width) {
  a.data = (char *)a.data + from * (int64_t)rg_dtype_size(a.dtype);
  a.dim[a.rank - 1] = width;
  while (from * (int64_t)rg_dtype_size(a.dtype) % a.align) a.align /= 2;
  return a;
}

/* ---- calls ---- */

static gpu_call *begin(const rg_op *op) {
  static gpu_call x;
  x = gpu_begin(op);
  b.used = 0;
  return &x;
}

static void report(const char *name, const char *shape, const char *path, double bytes, float ms) {
  const double s = ms * 1e-3;
  printf("%-16s %-26s %7.3f GB %9.1f us %6.3f TB/s  %s\n", name, shape, bytes * 1e-9, s * 1e6,
         bytes / s * 1e-12, path);
}

static void end(gpu_call *x, const char *shape) {
  rg_cost cost = {0};
  if (b.only && !strstr(x->op->name, b.only)) return;
  const float ms = gpu_time(x, REPEATS);
  x->op->cost(&x->c, &cost);
  report(x->op->name, shape, x->op->cuda_path(&x->c), cost.bytes, ms);
}

static void copy_once(void *bytes) {
  GPU_OK(cudaMemcpyAsync(b.buffer[1], b.buffer[0], *(const size_t *)bytes, cudaMemcpyDeviceToDevice,
                         0));
}
static void copy(int64_t bytes) {
  size_t n = (size_t)bytes;
  report("copy", "", "cudaMemcpy", 2.0 * (double)bytes, gpu_median(copy_once, &n, REPEATS, NULL));
}

/* ---- cases ---- */

enum { H = 64, KH = 4, D = 128, N = 3 };

static void blends(int64_t T) {
  char shape[64];
  snprintf(shape, sizeof shape, "3 x [%lld, %d, %d]", (long long)T, H, D);
  for (int backward = 0; backward < 2; backward++)
    for (int merge = 0; merge < 2; merge++) {
      gpu_call *x = begin(merge ? (backward ? &rgi_op_merge_lse_bwd : &rgi_op_merge_lse)
                                : (backward ? &rgi_op_combine_bwd : &rgi_op_combine));
      for (int k = 0; k < N; k++) gpu_in(x, "o", tensor(RG_BF16, T, H, D));
      rg_arg small = tensor(RG_F32, T, H, 0), gate = tensor(RG_BF16, T, H, N);
      small.data = gate.data = (char *)b.buffer[BUFFERS - 1]; /* shared: a few bytes of each row */
      b.used = N;
      for (int k = 0; k < N && merge; k++) gpu_in(x, "lse", small);
      if (!merge) gpu_in(x, "gate", gate);
      gpu_in(x, "cu_seqlens", lengths());
      if (!backward) {
        gpu_out(x, "o", tensor(RG_BF16, T, H, D));
        end(x, shape);
        continue;
      }
      gpu_in(x, "grad.o", tensor(RG_BF16, T, H, D));
      for (int k = 0; k < N; k++) gpu_out(x, "d.o", tensor(RG_BF16, T, H, D));
      small.data = gate.data = (char *)b.buffer[BUFFERS - 2];
      for (int k = 0; k < N && merge; k++) gpu_out(x, "d.lse", small);
      if (!merge) gpu_out(x, "d.gate", gate);
      end(x, shape);
    }
}

static void norm(int64_t T, int64_t heads, int64_t width) {
  char shape[64];
  snprintf(shape, sizeof shape, heads ? "[%lld, %lld, %lld]" : "[%lld, %.0lld%lld]", (long long)T,
           (long long)heads, (long long)width);
  for (int backward = 0; backward < 2; backward++) {
    gpu_call *x = begin(backward ? &rgi_op_rmsnorm_bwd : &rgi_op_rmsnorm);
    x->attr[0].f = 1e-6;
    rg_arg like = heads ? gpu_in(x, "x", tensor(RG_BF16, T, heads, width))
                        : gpu_in(x, "x", tensor(RG_BF16, T, width, 0));
    gpu_in(x, "w", tensor(RG_BF16, width, 0, 0));
    gpu_in(x, "cu_seqlens", lengths());
    rg_arg other = like, third = like;
    other.data = b.buffer[2];
    third.data = b.buffer[3];
    if (backward) {
      gpu_in(x, "grad.y", other);
      gpu_out(x, "d.x", third);
      b.used = 4;
      gpu_out(x, "d.w", tensor(RG_BF16, width, 0, 0));
    } else {
      gpu_out(x, "y", other);
    }
    end(x, shape);
  }
}

static void ropes(int64_t T, int64_t heads) {
  char shape[64];
  snprintf(shape, sizeof shape, "[%lld, %lld, %d]", (long long)T, (long long)heads, D);
  for (int backward = 0; backward < 2; backward++) {
    gpu_call *x = begin(backward ? &rgi_op_rope_bwd : &rgi_op_rope);
    x->attr[0].f = 10000;
    gpu_in(x, backward ? "grad.y" : "x", tensor(RG_BF16, T, heads, D));
    gpu_in(x, "cu_seqlens", lengths());
    gpu_out(x, backward ? "d.x" : "y", tensor(RG_BF16, T, heads, D));
    end(x, shape);
  }
}

static void elementwise(int64_t T) {
  const int64_t W = H * D;
  char shape[64];
  snprintf(shape, sizeof shape, "[%lld, %lld]", (long long)T, (long long)W);
  gpu_call *x = begin(&rgi_op_silu);
  gpu_in(x, "x", tensor(RG_BF16, T, W, 0));
  gpu_in(x, "cu_seqlens", lengths());
  gpu_out(x, "y", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_silu_bwd);
  gpu_in(x, "x", tensor(RG_BF16, T, W, 0));
  gpu_in(x, "grad.y", tensor(RG_BF16, T, W, 0));
  gpu_out(x, "d.x", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_mul);
  gpu_in(x, "a", tensor(RG_BF16, T, W, 0));
  gpu_in(x, "b", tensor(RG_BF16, T, W, 0));
  gpu_out(x, "y", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_mul_bwd);
  gpu_in(x, "a", tensor(RG_BF16, T, W, 0));
  gpu_in(x, "b", tensor(RG_BF16, T, W, 0));
  gpu_in(x, "grad.y", tensor(RG_BF16, T, W, 0));
  gpu_out(x, "d.a", tensor(RG_BF16, T, W, 0));
  gpu_out(x, "d.b", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_add);
  for (int k = 0; k < 2; k++) gpu_in(x, "a", tensor(RG_BF16, T, W, 0));
  gpu_out(x, "y", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_cast);
  gpu_in(x, "x", tensor(RG_F32, T, W / 2, 0));
  gpu_out(x, "y", tensor(RG_BF16, T, W / 2, 0));
  end(x, "f32, half as wide");
  x = begin(&rgi_op_cast);
  gpu_in(x, "x", part(tensor(RG_BF16, T, W, 0), 1024, W / 2));
  gpu_out(x, "y", tensor(RG_BF16, T, W / 2, 0));
  end(x, "a slice made dense");
  x = begin(&rgi_op_cast);
  gpu_in(x, "x", part(tensor(RG_BF16, T, W, 0), 1, W / 2));
  gpu_out(x, "y", tensor(RG_BF16, T, W / 2, 0));
  end(x, "a slice off by one");
  x = begin(&rgi_op_concat);
  x->attr[0].i = 1;
  for (int k = 0; k < 2; k++) gpu_in(x, "x", tensor(RG_BF16, T, W / 2, 0));
  gpu_out(x, "y", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_zero);
  gpu_out(x, "y", tensor(RG_F32, T, W / 2, 0));
  end(x, "f32, half as wide");
  x = begin(&rgi_op_accumulate);
  rg_arg sum = gpu_in(x, "acc", tensor(RG_F32, T, W / 2, 0));
  gpu_in(x, "x", tensor(RG_BF16, T, W / 2, 0));
  gpu_out(x, "y", sum);
  end(x, "f32 += bf16, half as wide");
}

static void all(int64_t T) {
  const int32_t cu[5] = {0, (int32_t)(T / 3), (int32_t)(T / 2), (int32_t)(T - 7), (int32_t)T};
  GPU_OK(cudaMemcpy(b.cu, cu, sizeof cu, cudaMemcpyHostToDevice));
  if (!b.only) copy(T * H * D * 2);
  blends(T);
  norm(T, H, D);
  norm(T, KH, D);
  norm(T, 0, H * D);
  norm(T, 0, 4096);
  ropes(T, H);
  ropes(T, KH);
  elementwise(T);
}

int main(int argc, char **argv) {
  int64_t T = argc > 1 ? atoll(argv[1]) : 131072;
  b.only = argc > 2 ? argv[2] : NULL;
  gpu_open();
  b.room = (size_t)T * H * D * 2;
  GPU_OK(cudaMalloc((void **)&b.cu, 256));
  for (int i = 0; i < BUFFERS; i++) {
    GPU_OK(cudaMalloc((void **)&b.buffer[i], b.room));
    GPU_OK(cudaMemset(b.buffer[i], 0x3f, b.room)); /* about 0.75 in any float type */
  }
  all(T);
  if (argc <= 1) all(32768);
  return 0;
}
#endif
