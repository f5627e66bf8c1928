/* bench/gpu.h: what benchmarks of ops on a GPU share: options, tensors in its memory, calls
 * bound by the names of ports, and the time of a call. What fails ends the program.
 */
#ifndef BENCH_GPU_H
#define BENCH_GPU_H

#include "../exec/cuda.h"
#include "../ops/ops.h"
#include <stdio.h>
#include <stdlib.h>

static struct {
  rg_gpu gpu;
  rg_error error;
  cudaEvent_t from, to;
} here;

static inline void gpu_ok(cudaError_t code, const char *what) {
  if (code == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(code));
  exit(1);
}
#define GPU_OK(call) gpu_ok((call), #call)

static inline void gpu_open(void) {
  if (rgi_cuda_device(&here.gpu, &here.error) != RG_OK) {
    fprintf(stderr, "%s\n", here.error.message);
    exit(1);
  }
  const char *older = getenv("REGRAPH_TEST_CC"); /* kernels and tiles as on an older GPU: 80 */
  if (older) here.gpu.cc = atoi(older);
  GPU_OK(cudaEventCreate(&here.from));
  GPU_OK(cudaEventCreate(&here.to));
}

/* ---- options ---- */

/* One of text, number, yes is set. */
typedef struct gpu_flag {
  const char *flag;
  const char **text;
  int64_t *number;
  bool *yes;
} gpu_flag;

static inline void gpu_flags(int argc, char **argv, const gpu_flag *flags, int n) {
  for (int i = 1; i < argc; i++) {
    int f = 0;
    while (f < n && strcmp(argv[i], flags[f].flag) != 0) f++;
    if (f == n || (!flags[f].yes && i + 1 == argc)) {
      fprintf(stderr, "%s: unknown or incomplete option %s (see the source's head)\n", argv[0],
              argv[i]);
      exit(2);
    }
    if (flags[f].yes) *flags[f].yes = true;
    if (flags[f].text) *flags[f].text = argv[++i];
    if (flags[f].number) *flags[f].number = atoll(argv[++i]);
  }
}

static inline rg_dtype gpu_dtype(const char *name) {
  for (int t = 0; t < RG_I32; t++)
    if (strcmp(rg_dtype_name((rg_dtype)t), name) == 0) return (rg_dtype)t;
  return RG_BF16;
}

/* ---- tensors ---- */

/* Dense, without memory. */
static inline rg_arg gpu_shape(rg_dtype dtype, int rank, int64_t d0, int64_t d1, int64_t d2) {
  rg_arg a = {.dtype = dtype, .rank = rank, .dim = {d0, d1, d2}, .align = 16};
  int64_t n = 1;
  for (int i = rank - 1; i >= 0; i--) a.stride[i] = n, n *= a.dim[i];
  return a;
}
static inline size_t gpu_bytes(const rg_arg *a) {
  size_t n = rg_dtype_size(a->dtype);
  for (int i = 0; i < a->rank; i++) n *= (size_t)a->dim[i];
  return n;
}
/* Zeros. */
static inline rg_arg gpu_tensor(rg_dtype dtype, int rank, int64_t d0, int64_t d1, int64_t d2) {
  rg_arg a = gpu_shape(dtype, rank, d0, d1, d2);
  GPU_OK(cudaMalloc(&a.data, gpu_bytes(&a) + 256));
  GPU_OK(cudaMemset(a.data, 0, gpu_bytes(&a)));
  return a;
}
static inline rg_arg gpu_filled(rg_arg a, const void *from) {
  GPU_OK(cudaMemcpy(a.data, from, gpu_bytes(&a), cudaMemcpyHostToDevice));
  return a;
}

static inline uint64_t gpu_draw(void) {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}
/* About N(0, scale²). A draw of 2^20 numbers is repeated, shifted by an odd number of rows each
 * time. */
static inline rg_arg gpu_normal(rg_dtype dtype, int rank, int64_t d0, int64_t d1, int64_t d2,
                                float scale) {
  enum { DRAWN = 1 << 20 };
  rg_arg a = gpu_tensor(dtype, rank, d0, d1, d2);
  const size_t size = rg_dtype_size(dtype);
  const int64_t n = (int64_t)(gpu_bytes(&a) / size), last = a.dim[rank - 1];
  const int64_t step = DRAWN - 7 * last < last ? DRAWN : DRAWN - 7 * last;
  char *host = malloc((size_t)DRAWN * size);
  if (!host) exit(1);
  for (int64_t i = 0; i < DRAWN && i < n; i++) {
    float x = -6;
    for (int j = 0; j < 12; j++) x += (float)gpu_draw() * 0x1p-31f;
    x *= scale;
    rgi_store(host + (size_t)i * size, dtype, &x, 1);
  }
  for (int64_t i = 0; i < n; i += step)
    GPU_OK(cudaMemcpy((char *)a.data + (size_t)i * size, host,
                      (size_t)(n - i < step ? n - i : step) * size, cudaMemcpyHostToDevice));
  free(host);
  return a;
}

/* ---- calls ---- */

enum { GPU_ARGS = 24 };
typedef struct gpu_call {
  const rg_op *op;
  struct {
    const char *port;
    bool out;
    rg_arg a;
  } list[GPU_ARGS];
  int n;
  rg_value attr[16];
  rg_arg in[GPU_ARGS], out[GPU_ARGS];
  int32_t in_begin[GPU_ARGS], out_begin[GPU_ARGS];
  rg_call c;
  size_t workspace; /* bytes; of the last timing, as is `best` */
  float best;
} gpu_call;

/* Attributes are the op's defaults. */
static inline gpu_call gpu_begin(const rg_op *op) {
  gpu_call x = {.op = op};
  for (int i = 0; i < op->nattr; i++) {
    x.attr[i].f = op->attrs[i].def;
    x.attr[i].i = op->attrs[i].type == RG_ATTR_INTS ? 0 : (int64_t)op->attrs[i].def;
  }
  return x;
}
/* Where the op has such an attribute. */
static inline void gpu_int(gpu_call *x, const char *name, int64_t value) {
  for (int i = 0; i < x->op->nattr; i++)
    if (strcmp(x->op->attrs[i].name, name) == 0) x->attr[i].i = value;
}
/* Again on the same port appends. */
static inline rg_arg gpu_bind(gpu_call *x, bool out, const char *port, rg_arg a) {
  if (x->n == GPU_ARGS) exit(3);
  x->list[x->n].port = port;
  x->list[x->n].out = out;
  x->list[x->n++].a = a;
  return a;
}
static inline rg_arg gpu_in(gpu_call *x, const char *port, rg_arg a) {
  return gpu_bind(x, false, port, a);
}
static inline rg_arg gpu_out(gpu_call *x, const char *port, rg_arg a) {
  return gpu_bind(x, true, port, a);
}

static inline void gpu_flatten(gpu_call *x, bool out) {
  const rg_port *p = out ? x->op->out : x->op->in;
  rg_arg *to = out ? x->out : x->in;
  int32_t *at = out ? x->out_begin : x->in_begin, n = 0;
  const int ports = out ? x->op->nout : x->op->nin;
  for (int i = 0; i < ports; i++) {
    at[i] = n;
    for (int k = 0; k < x->n; k++)
      if (x->list[k].out == out && strcmp(x->list[k].port, p[i].name) == 0) to[n++] = x->list[k].a;
  }
  at[ports] = n;
}
/* Makes x->c what is bound; x then stays where it is. */
static inline rg_call *gpu_ready(gpu_call *x) {
  gpu_flatten(x, false);
  gpu_flatten(x, true);
  x->c = (rg_call){.op = x->op,
                   .node = x->op->name,
                   .attr = x->attr,
                   .in = x->in,
                   .in_begin = x->in_begin,
                   .out = x->out,
                   .out_begin = x->out_begin,
                   .threads = 1,
                   .error = &here.error,
                   .gpu = &here.gpu};
  return &x->c;
}

/* ---- time ---- */

static inline int gpu_by_time(const void *a, const void *b) {
  const float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}
/* Median of `runs` (at most 1000) after three, in ms; one run is not warmed up. */
static inline float gpu_median(void (*run)(void *arg), void *arg, int64_t runs, float *best) {
  enum { MOST = 1000, WARM = 3 };
  float ms[MOST];
  if (runs > MOST) runs = MOST;
  for (int64_t i = runs > 1 ? -WARM : 0; i < runs; i++) {
    GPU_OK(cudaEventRecord(here.from, 0));
    run(arg);
    GPU_OK(cudaEventRecord(here.to, 0));
    gpu_ok(cudaEventSynchronize(here.to), "a run");
    if (i >= 0) GPU_OK(cudaEventElapsedTime(&ms[i], here.from, here.to));
  }
  qsort(ms, (size_t)runs, sizeof *ms, gpu_by_time);
  if (best) *best = ms[0];
  return ms[runs / 2];
}

typedef struct gpu_run {
  gpu_call *call;
  rgi_cuda_eager eager;
  rgi_cuda_known known;
} gpu_run;
static inline void gpu_once(void *arg) {
  gpu_run *r = arg;
  if (r->call->op->cuda_steps(&r->call->c, &r->eager.base) == RG_OK) return;
  fprintf(stderr, "%s: %s\n", r->call->op->name, here.error.message);
  exit(1);
}
static inline float gpu_time(gpu_call *x, int64_t runs) {
  gpu_run r = {.call = x};
  rg_call *c = gpu_ready(x);
  x->workspace = x->op->workspace ? x->op->workspace(c) : 0;
  GPU_OK(cudaMalloc(&c->workspace, x->workspace + 256));
  rgi_cuda_eager_init(&r.eager, 0, &here.error);
  r.eager.known = &r.known;
  const float ms = gpu_median(gpu_once, &r, runs, &x->best);
  rgi_cuda_eager_done(&r.eager);
  GPU_OK(cudaFree(c->workspace));
  return ms;
}

#endif
