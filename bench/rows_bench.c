/* bench/rows_bench.c: elementwise and row-wise ops on a GPU against its memory: what they must move, per
 * second.
 *
 *   rows_bench [T [name]]      default: 131072 and 32768 tokens, all ops; bf16, 64 heads (4 KV heads) of 128
 *
 * A row per case: bytes (each input read once, each output written once), median time of REPEATS runs, rate.
 * `copy` is cudaMemcpy on the device, for comparison. Only in builds with nvcc.
 */
#include "../ops/ops.h"
#include <stdio.h>
#include <stdlib.h>

#ifndef REGRAPH_CUDA
int main(void) {
  fprintf(stderr, "rows_bench: this build has no CUDA\n");
  return 77;
}
#else
#include "../exec/cuda.h"

extern const rg_op rgi_op_combine, rgi_op_combine_bwd, rgi_op_merge_lse, rgi_op_merge_lse_bwd, rgi_op_rmsnorm,
    rgi_op_rmsnorm_bwd, rgi_op_rope, rgi_op_rope_bwd, rgi_op_silu, rgi_op_silu_bwd, rgi_op_mul,
    rgi_op_mul_bwd, rgi_op_add, rgi_op_cast, rgi_op_concat, rgi_op_zero, rgi_op_accumulate;

enum { REPEATS = 15, MOST = 24, BUFFERS = 9 };

#define CUDA(call)                                                                                           \
  do {                                                                                                       \
    cudaError_t code_ = (call);                                                                              \
    if (code_ != cudaSuccess) {                                                                              \
      fprintf(stderr, "rows_bench: %s: %s\n", #call, cudaGetErrorString(code_));                             \
      exit(1);                                                                                               \
    }                                                                                                        \
  } while (0)

static struct {
  rg_gpu gpu;
  rg_error error;
  cudaStream_t stream;
  cudaEvent_t start, stop;
  char *buffer[BUFFERS], *workspace;
  size_t room, workspace_room;
  int32_t *cu; /* on the device: four sequences */
  int used;    /* buffers */
  const char *only;
} b;

/* ---- tensors: each call of `tensor` takes the next buffer ---- */

static rg_arg tensor(rg_dtype dtype, int64_t d0, int64_t d1, int64_t d2) {
  rg_arg a = {.dtype = dtype, .dim = {d0, d1, d2}, .align = 16};
  a.rank = d2 ? 3 : d1 ? 2 : 1;
  int64_t n = 1;
  for (int i = a.rank - 1; i >= 0; i--) a.stride[i] = n, n *= a.dim[i];
  a.data = b.buffer[b.used++ % BUFFERS];
  if ((size_t)n * rg_dtype_size(dtype) > b.room) exit(3);
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

typedef struct bound {
  const char *port;
  bool out;
  rg_arg a;
} bound;

typedef struct bench_call {
  const rg_op *op;
  bound list[MOST];
  int n;
  rg_value attr[8];
  rg_arg in[MOST], out[MOST];
  int32_t in_begin[MOST], out_begin[MOST];
  rg_call c;
} bench_call;

static bench_call *begin(const rg_op *op) {
  static bench_call x;
  x = (bench_call){.op = op};
  b.used = 0;
  for (int i = 0; i < op->nattr; i++) {
    x.attr[i].f = op->attrs[i].def;
    x.attr[i].i = op->attrs[i].type == RG_ATTR_INTS ? 0 : (int64_t)op->attrs[i].def;
  }
  return &x;
}
static rg_arg in(bench_call *x, const char *port, rg_arg a) {
  x->list[x->n++] = (bound){port, false, a};
  return a;
}
static rg_arg out(bench_call *x, const char *port, rg_arg a) {
  x->list[x->n++] = (bound){port, true, a};
  return a;
}

static void flatten(bench_call *x, bool outs) {
  const rg_port *p = outs ? x->op->out : x->op->in;
  rg_arg *to = outs ? x->out : x->in;
  int32_t *at = outs ? x->out_begin : x->in_begin;
  int n = 0, ports = outs ? x->op->nout : x->op->nin;
  for (int i = 0; i < ports; i++) {
    at[i] = n;
    for (int k = 0; k < x->n; k++)
      if (x->list[k].out == outs && strcmp(x->list[k].port, p[i].name) == 0) to[n++] = x->list[k].a;
  }
  at[ports] = n;
}

static int by_time(const void *a, const void *c) {
  float x = *(const float *)a, y = *(const float *)c;
  return (x > y) - (x < y);
}

static void report(const char *name, const char *shape, const char *path, double bytes, float *ms) {
  qsort(ms, REPEATS, sizeof *ms, by_time);
  double s = ms[REPEATS / 2] * 1e-3;
  printf("%-16s %-26s %7.3f GB %9.1f us %6.3f TB/s  %s\n", name, shape, bytes * 1e-9, s * 1e6,
         bytes / s * 1e-12, path);
}

static void end(bench_call *x, const char *shape) {
  float ms[REPEATS];
  rg_cost cost = {0};
  rgi_cuda_eager eager;
  if (b.only && !strstr(x->op->name, b.only)) return;
  flatten(x, false);
  flatten(x, true);
  x->c = (rg_call){.op = x->op,
                   .node = x->op->name,
                   .attr = x->attr,
                   .in = x->in,
                   .in_begin = x->in_begin,
                   .out = x->out,
                   .out_begin = x->out_begin,
                   .threads = 1,
                   .error = &b.error,
                   .gpu = &b.gpu};
  size_t need = x->op->workspace ? x->op->workspace(&x->c) : 0;
  if (need > b.workspace_room) exit(3);
  x->c.workspace = b.workspace;
  x->op->cost(&x->c, &cost);
  rgi_cuda_eager_init(&eager, b.stream, &b.error);
  for (int i = -3; i < REPEATS; i++) {
    CUDA(cudaEventRecord(b.start, b.stream));
    if (x->op->cuda_steps(&x->c, &eager.base) != RG_OK) {
      fprintf(stderr, "rows_bench: %s: %s\n", x->op->name, b.error.message);
      exit(1);
    }
    CUDA(cudaEventRecord(b.stop, b.stream));
    CUDA(cudaEventSynchronize(b.stop));
    if (i >= 0) CUDA(cudaEventElapsedTime(&ms[i], b.start, b.stop));
  }
  rgi_cuda_eager_done(&eager);
  report(x->op->name, shape, x->op->cuda_path(&x->c), cost.bytes, ms);
}

static void copy(int64_t bytes) {
  float ms[REPEATS];
  for (int i = -3; i < REPEATS; i++) {
    CUDA(cudaEventRecord(b.start, b.stream));
    CUDA(cudaMemcpyAsync(b.buffer[1], b.buffer[0], (size_t)bytes, cudaMemcpyDeviceToDevice, b.stream));
    CUDA(cudaEventRecord(b.stop, b.stream));
    CUDA(cudaEventSynchronize(b.stop));
    if (i >= 0) CUDA(cudaEventElapsedTime(&ms[i], b.start, b.stop));
  }
  report("copy", "", "cudaMemcpy", 2.0 * (double)bytes, ms);
}

/* ---- cases ---- */

enum { H = 64, KH = 4, D = 128, N = 3 };

static void blends(int64_t T) {
  char shape[64];
  snprintf(shape, sizeof shape, "3 x [%lld, %d, %d]", (long long)T, H, D);
  for (int backward = 0; backward < 2; backward++)
    for (int merge = 0; merge < 2; merge++) {
      bench_call *x = begin(merge ? (backward ? &rgi_op_merge_lse_bwd : &rgi_op_merge_lse)
                                  : (backward ? &rgi_op_combine_bwd : &rgi_op_combine));
      for (int k = 0; k < N; k++) in(x, "o", tensor(RG_BF16, T, H, D));
      rg_arg small = tensor(RG_F32, T, H, 0), gate = tensor(RG_BF16, T, H, N);
      small.data = gate.data = (char *)b.buffer[BUFFERS - 1]; /* shared: a few bytes of each row */
      b.used = N;
      for (int k = 0; k < N && merge; k++) in(x, "lse", small);
      if (!merge) in(x, "gate", gate);
      in(x, "cu_seqlens", lengths());
      if (!backward) {
        out(x, "o", tensor(RG_BF16, T, H, D));
        end(x, shape);
        continue;
      }
      in(x, "grad.o", tensor(RG_BF16, T, H, D));
      for (int k = 0; k < N; k++) out(x, "d.o", tensor(RG_BF16, T, H, D));
      small.data = gate.data = (char *)b.buffer[BUFFERS - 2];
      for (int k = 0; k < N && merge; k++) out(x, "d.lse", small);
      if (!merge) out(x, "d.gate", gate);
      end(x, shape);
    }
}

static void norm(int64_t T, int64_t heads, int64_t width) {
  char shape[64];
  snprintf(shape, sizeof shape, heads ? "[%lld, %lld, %lld]" : "[%lld, %.0lld%lld]", (long long)T,
           (long long)heads, (long long)width);
  for (int backward = 0; backward < 2; backward++) {
    bench_call *x = begin(backward ? &rgi_op_rmsnorm_bwd : &rgi_op_rmsnorm);
    x->attr[0].f = 1e-6;
    rg_arg like =
        heads ? in(x, "x", tensor(RG_BF16, T, heads, width)) : in(x, "x", tensor(RG_BF16, T, width, 0));
    in(x, "w", tensor(RG_BF16, width, 0, 0));
    in(x, "cu_seqlens", lengths());
    rg_arg other = like, third = like;
    other.data = b.buffer[2];
    third.data = b.buffer[3];
    if (backward) {
      in(x, "grad.y", other);
      out(x, "d.x", third);
      b.used = 4;
      out(x, "d.w", tensor(RG_BF16, width, 0, 0));
    } else {
      out(x, "y", other);
    }
    end(x, shape);
  }
}

static void ropes(int64_t T, int64_t heads) {
  char shape[64];
  snprintf(shape, sizeof shape, "[%lld, %lld, %d]", (long long)T, (long long)heads, D);
  for (int backward = 0; backward < 2; backward++) {
    bench_call *x = begin(backward ? &rgi_op_rope_bwd : &rgi_op_rope);
    x->attr[0].f = 10000;
    in(x, backward ? "grad.y" : "x", tensor(RG_BF16, T, heads, D));
    in(x, "cu_seqlens", lengths());
    out(x, backward ? "d.x" : "y", tensor(RG_BF16, T, heads, D));
    end(x, shape);
  }
}

static void elementwise(int64_t T) {
  const int64_t W = H * D;
  char shape[64];
  snprintf(shape, sizeof shape, "[%lld, %lld]", (long long)T, (long long)W);
  bench_call *x = begin(&rgi_op_silu);
  in(x, "x", tensor(RG_BF16, T, W, 0));
  in(x, "cu_seqlens", lengths());
  out(x, "y", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_silu_bwd);
  in(x, "x", tensor(RG_BF16, T, W, 0));
  in(x, "grad.y", tensor(RG_BF16, T, W, 0));
  out(x, "d.x", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_mul);
  in(x, "a", tensor(RG_BF16, T, W, 0));
  in(x, "b", tensor(RG_BF16, T, W, 0));
  out(x, "y", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_mul_bwd);
  in(x, "a", tensor(RG_BF16, T, W, 0));
  in(x, "b", tensor(RG_BF16, T, W, 0));
  in(x, "grad.y", tensor(RG_BF16, T, W, 0));
  out(x, "d.a", tensor(RG_BF16, T, W, 0));
  out(x, "d.b", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_add);
  for (int k = 0; k < 2; k++) in(x, "a", tensor(RG_BF16, T, W, 0));
  out(x, "y", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_cast);
  in(x, "x", tensor(RG_F32, T, W / 2, 0));
  out(x, "y", tensor(RG_BF16, T, W / 2, 0));
  end(x, "f32, half as wide");
  x = begin(&rgi_op_cast);
  in(x, "x", part(tensor(RG_BF16, T, W, 0), 1024, W / 2));
  out(x, "y", tensor(RG_BF16, T, W / 2, 0));
  end(x, "a slice made dense");
  x = begin(&rgi_op_cast);
  in(x, "x", part(tensor(RG_BF16, T, W, 0), 1, W / 2));
  out(x, "y", tensor(RG_BF16, T, W / 2, 0));
  end(x, "a slice off by one");
  x = begin(&rgi_op_concat);
  x->attr[0].i = 1;
  for (int k = 0; k < 2; k++) in(x, "x", tensor(RG_BF16, T, W / 2, 0));
  out(x, "y", tensor(RG_BF16, T, W, 0));
  end(x, shape);
  x = begin(&rgi_op_zero);
  out(x, "y", tensor(RG_F32, T, W / 2, 0));
  end(x, "f32, half as wide");
  x = begin(&rgi_op_accumulate);
  rg_arg sum = in(x, "acc", tensor(RG_F32, T, W / 2, 0));
  in(x, "x", tensor(RG_BF16, T, W / 2, 0));
  out(x, "y", sum);
  end(x, "f32 += bf16, half as wide");
}

static void all(int64_t T) {
  const int32_t cu[5] = {0, (int32_t)(T / 3), (int32_t)(T / 2), (int32_t)(T - 7), (int32_t)T};
  CUDA(cudaMemcpy(b.cu, cu, sizeof cu, cudaMemcpyHostToDevice));
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
  if (rgi_cuda_device(&b.gpu, &b.error) != RG_OK) {
    fprintf(stderr, "rows_bench: %s\n", b.error.message);
    return 1;
  }
  b.room = (size_t)T * H * D * 2;
  b.workspace_room = (size_t)64 << 20;
  CUDA(cudaStreamCreate(&b.stream));
  CUDA(cudaEventCreate(&b.start));
  CUDA(cudaEventCreate(&b.stop));
  CUDA(cudaMalloc((void **)&b.cu, 256));
  CUDA(cudaMalloc((void **)&b.workspace, b.workspace_room));
  for (int i = 0; i < BUFFERS; i++) {
    CUDA(cudaMalloc((void **)&b.buffer[i], b.room));
    CUDA(cudaMemset(b.buffer[i], 0x3f, b.room)); /* about 0.75 in any float type */
  }
  all(T);
  if (argc <= 1) all(32768);
  return 0;
}
#endif
