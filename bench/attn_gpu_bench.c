/* bench/attn_gpu_bench.c: times attention on a GPU through the ops' cuda_steps.
 *
 *   attn_gpu_bench [--op cmp|slc|swa] [--dir fwd|bwd|both] [-T n] [-H n] [--kh n] [-D n] [-E n]
 *                  [--dtype f32|f16|bf16] [--pack n] [--kernel n] [--stride n] [--block n] [--top n]
 *                  [--window n] [--select random|local] [--runs n] [--no-dq] [--no-dkv]
 *
 * --pack n cuts the T tokens into n sequences of uneven lengths. Selections hold the first block, the last
 * two and, for the rest, blocks drawn at random among all before (random) or mostly among the nearest 32
 * (local). Prints per call the path taken, the median of the runs and the rate of useful operations (of one
 * sequence of full length where packs are asked for, so read ms there), and the workspace.
 */
#include "../exec/cuda.h"
#include "../ops/ops.h"
#include <stdio.h>
#include <stdlib.h>

extern const rg_op rgi_op_cmp_attn, rgi_op_cmp_attn_bwd, rgi_op_slc_attn, rgi_op_slc_attn_bwd,
    rgi_op_swa_attn, rgi_op_swa_attn_bwd;

typedef struct options {
  const char *op, *dir, *dtype, *select;
  int64_t T, H, KH, D, E, pack, kernel, stride, block, top, window, runs;
  bool no_dq, no_dkv;
} options;

static uint64_t state = 1;
static uint64_t draw(void) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}

static void cuda(cudaError_t code, const char *what) {
  if (code == cudaSuccess) return;
  fprintf(stderr, "attn_gpu_bench: %s: %s\n", what, cudaGetErrorString(code));
  exit(1);
}
static void *device(size_t bytes) {
  void *p;
  cuda(cudaMalloc(&p, bytes ? bytes : 256), "cudaMalloc");
  return p;
}

static rg_arg tensor(rg_dtype dtype, int rank, int64_t d0, int64_t d1, int64_t d2) {
  rg_arg a = {.dtype = dtype, .rank = rank, .dim = {d0, d1, d2}, .align = 16};
  int64_t n = 1;
  for (int i = rank - 1; i >= 0; i--) {
    a.stride[i] = n;
    n *= a.dim[i];
  }
  a.data = device((size_t)n * rg_dtype_size(dtype));
  return a;
}

/* About N(0, 1). A draw of 2^20 numbers is repeated, shifted by an odd number of rows each time. */
static rg_arg normal(rg_dtype dtype, int64_t d0, int64_t d1, int64_t d2) {
  enum { DRAWN = 1 << 20 };
  rg_arg a = tensor(dtype, 3, d0, d1, d2);
  const size_t size = rg_dtype_size(dtype);
  const int64_t n = d0 * d1 * d2;
  char *host = malloc((size_t)DRAWN * size);
  if (!host) exit(1);
  for (int64_t i = 0; i < DRAWN && i < n; i++) {
    float x = -6;
    for (int j = 0; j < 12; j++) x += (float)draw() * 0x1p-31f;
    rgi_store(host + (size_t)i * size, dtype, &x, 1);
  }
  int64_t step = DRAWN - 7 * d2 < d2 ? DRAWN : DRAWN - 7 * d2;
  for (int64_t i = 0; i < n; i += step)
    cuda(cudaMemcpy((char *)a.data + (size_t)i * size, host, (size_t)(n - i < step ? n - i : step) * size,
                    cudaMemcpyHostToDevice),
         "copy");
  free(host);
  return a;
}

static int ascending(const void *a, const void *b) {
  return *(const int32_t *)a - *(const int32_t *)b;
}

static void select_row(const options *x, int64_t pos, int32_t *row) {
  const int64_t own = pos / x->block, far = 32;
  int64_t n = 0;
  for (int64_t i = 0; i < x->top; i++) row[i] = -1;
  if (own < x->top) {
    for (; n <= own; n++) row[n] = (int32_t)n;
    return;
  }
  const int64_t forced[] = {own, own - 1, 0};
  for (int i = 0; i < 3 && n < x->top; i++) row[n++] = (int32_t)forced[i];
  while (n < x->top) {
    int64_t pick = (int64_t)(draw() % (uint64_t)own);
    if (*x->select == 'l' && own > far && x->top <= far / 2 && draw() % 4)
      pick = own - (int64_t)(draw() % far);
    bool have = false;
    for (int64_t i = 0; i < n; i++) have = have || row[i] == pick;
    if (!have) row[n++] = (int32_t)pick;
  }
  qsort(row, (size_t)n, sizeof *row, ascending);
}

static rg_arg selection(const options *x, const int32_t *cu) {
  rg_arg a = tensor(RG_I32, 3, x->T, x->KH, x->top);
  int32_t *host = malloc((size_t)(x->T * x->KH * x->top) * sizeof *host + 1);
  if (!host) exit(1);
  for (int64_t b = 0; b < x->pack; b++)
    for (int64_t t = cu[b]; t < cu[b + 1]; t++)
      for (int64_t h = 0; h < x->KH; h++) select_row(x, t - cu[b], host + (t * x->KH + h) * x->top);
  cuda(cudaMemcpy(a.data, host, (size_t)(x->T * x->KH * x->top) * sizeof *host, cudaMemcpyHostToDevice),
       "copy");
  free(host);
  return a;
}

/* ---- one call ---- */

enum { MAX_ARGS = 24 };
typedef struct call {
  rg_call c;
  rg_arg in[MAX_ARGS], out[MAX_ARGS];
  int32_t in_begin[MAX_ARGS + 1], out_begin[MAX_ARGS + 1];
  rg_value attr[8];
} call;

static int port(const rg_port *p, int n, const char *name) {
  for (int i = 0; i < n; i++)
    if (strcmp(p[i].name, name) == 0) return i;
  return -1;
}

static void prepare(const options *o, call *x, const rg_op *op, const rg_gpu *gpu, rg_error *e) {
  *x = (call){.c = {.op = op, .node = op->name, .threads = 1, .gpu = gpu, .error = e}};
  for (int i = 0; i < MAX_ARGS; i++) {
    x->in[i].rank = x->out[i].rank = -1;
    x->in_begin[i] = x->out_begin[i] = i;
  }
  const char *name[] = {"kernel", "stride", "block", "window_left"};
  const int64_t value[] = {o->kernel, o->stride, o->block, o->window};
  for (int i = 0; i < op->nattr; i++) {
    x->attr[i].f = op->attrs[i].def;
    for (int j = 0; j < 4; j++)
      if (strcmp(op->attrs[i].name, name[j]) == 0) x->attr[i].i = value[j];
  }
  x->c.attr = x->attr;
  x->c.in = x->in;
  x->c.in_begin = x->in_begin;
  x->c.out = x->out;
  x->c.out_begin = x->out_begin;
}
static void bind_in(call *x, const char *name, rg_arg a) {
  int i = port(x->c.op->in, x->c.op->nin, name);
  if (i >= 0) x->in[i] = a;
}
static void bind_out(call *x, const char *name, rg_arg a) {
  x->out[port(x->c.op->out, x->c.op->nout, name)] = a;
}

static int by_time(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static void report(const options *o, call *x, bool timed) {
  enum { MOST = 1000 };
  float ms[MOST];
  const int runs = timed ? (int)(o->runs < MOST ? o->runs : MOST) : 1;
  size_t size = x->c.op->workspace(&x->c);
  rgi_cuda_eager eager;
  cudaEvent_t from, to;
  cudaEventCreate(&from);
  cudaEventCreate(&to);
  x->c.workspace = device(size);
  rgi_cuda_eager_init(&eager, 0, x->c.error);
  for (int i = timed ? -3 : 0; i < runs; i++) {
    cudaEventRecord(from, 0);
    if (x->c.op->cuda_steps(&x->c, &eager.base) != RG_OK) {
      fprintf(stderr, "attn_gpu_bench: %s: %s\n", x->c.op->name, x->c.error->message);
      exit(1);
    }
    cudaEventRecord(to, 0);
    cuda(cudaEventSynchronize(to), x->c.op->name);
    if (i >= 0) cudaEventElapsedTime(&ms[i], from, to);
  }
  rgi_cuda_eager_done(&eager);
  cudaFree(x->c.workspace);
  qsort(ms, (size_t)runs, sizeof *ms, by_time);
  rg_cost cost;
  x->c.op->cost(&x->c, &cost);
  if (timed)
    printf(
        "%-12s T %-7lld H %lld/%lld d %lld/%lld %-4s %10.3f ms (best %.3f) %8.2f TFLOP/s  ws %.1f MB  %s\n",
        x->c.op->name, (long long)o->T, (long long)o->H, (long long)o->KH, (long long)o->D, (long long)o->E,
        o->dtype, ms[runs / 2], ms[0], cost.flops / ms[runs / 2] * 1e-9, (double)size * 1e-6,
        x->c.op->cuda_path(&x->c));
  fflush(stdout);
}

static void measure(const options *o, rg_dtype dtype, const rg_gpu *gpu) {
  const bool cmp = *o->op == 'c', slc = o->op[1] == 'l';
  const int64_t S = cmp ? o->T / o->stride : o->T;
  rg_error e = {0};
  int32_t *cu = calloc((size_t)o->pack + 1, sizeof *cu);
  if (!cu) exit(1);
  double sum = 0, all = (double)(o->pack * (o->pack + 3));
  for (int64_t b = 0; b < o->pack; b++)
    cu[b + 1] = (int32_t)((double)o->T * (sum += (double)(2 * b + 4)) / all);
  cu[o->pack] = (int32_t)o->T;
  rg_arg starts = tensor(RG_I32, 1, o->pack + 1, 0, 0);
  cuda(cudaMemcpy(starts.data, cu, (size_t)(o->pack + 1) * 4, cudaMemcpyHostToDevice), "copy");

  const rg_arg q = normal(dtype, o->T, o->H, o->D), k = normal(dtype, S, o->KH, o->D),
               v = normal(dtype, S, o->KH, o->E), d_o = normal(dtype, o->T, o->H, o->E);
  rg_arg idx = {0};
  if (slc) idx = selection(o, cu);
  const rg_op *op[] = {cmp   ? &rgi_op_cmp_attn
                       : slc ? &rgi_op_slc_attn
                             : &rgi_op_swa_attn,
                       cmp   ? &rgi_op_cmp_attn_bwd
                       : slc ? &rgi_op_slc_attn_bwd
                             : &rgi_op_swa_attn_bwd};
  call x[2];
  for (int i = 0; i < 2; i++) {
    prepare(o, &x[i], op[i], gpu, &e);
    bind_in(&x[i], "q", q);
    bind_in(&x[i], "k", k);
    bind_in(&x[i], "v", v);
    if (slc) bind_in(&x[i], "idx", idx);
    bind_in(&x[i], "cu_seqlens", starts);
  }
  const rg_arg out = tensor(dtype, 3, o->T, o->H, o->E), lse = tensor(RG_F32, 2, o->T, o->H, 0);
  bind_out(&x[0], "o", out);
  bind_out(&x[0], "lse", lse);
  bind_in(&x[1], "out.o", out);
  bind_in(&x[1], "out.lse", lse);
  bind_in(&x[1], "grad.o", d_o);
  if (!o->no_dq) bind_out(&x[1], "d.q", tensor(dtype, 3, o->T, o->H, o->D));
  if (!o->no_dkv) {
    bind_out(&x[1], "d.k", tensor(dtype, 3, S, o->KH, o->D));
    bind_out(&x[1], "d.v", tensor(dtype, 3, S, o->KH, o->E));
  }
  report(o, &x[0], *o->dir == 'f' || o->dir[1] == 'o');
  if (*o->dir == 'b') report(o, &x[1], true);
  free(cu);
}

int main(int argc, char **argv) {
  options o = {"slc", "both", "bf16", "random", 8192, 16,  1,  128,   0,
               1,     32,     16,     64,       16,   512, 11, false, false};
  const struct {
    const char *flag;
    const char **text;
    int64_t *number;
    bool *yes;
  } flags[] = {{"--op", &o.op, 0, 0},
               {"--dir", &o.dir, 0, 0},
               {"--dtype", &o.dtype, 0, 0},
               {"--select", &o.select, 0, 0},
               {"-T", 0, &o.T, 0},
               {"-H", 0, &o.H, 0},
               {"--kh", 0, &o.KH, 0},
               {"-D", 0, &o.D, 0},
               {"-E", 0, &o.E, 0},
               {"--pack", 0, &o.pack, 0},
               {"--kernel", 0, &o.kernel, 0},
               {"--stride", 0, &o.stride, 0},
               {"--block", 0, &o.block, 0},
               {"--top", 0, &o.top, 0},
               {"--window", 0, &o.window, 0},
               {"--runs", 0, &o.runs, 0},
               {"--no-dq", 0, 0, &o.no_dq},
               {"--no-dkv", 0, 0, &o.no_dkv}};
  for (int i = 1; i < argc; i++) {
    int f = 0;
    while (f < RGI_COUNT(flags) && strcmp(argv[i], flags[f].flag) != 0) f++;
    if (f == RGI_COUNT(flags) || (!flags[f].yes && i + 1 == argc)) {
      fprintf(stderr, "attn_gpu_bench: unknown or incomplete option %s (see the file's head)\n", argv[i]);
      return 2;
    }
    if (flags[f].yes) *flags[f].yes = true;
    if (flags[f].text) *flags[f].text = argv[++i];
    if (flags[f].number) *flags[f].number = atoll(argv[++i]);
  }
  if (o.E == 0) o.E = o.D;
  rg_dtype dtype = RG_BF16;
  for (int t = 0; t < RG_I32; t++)
    if (strcmp(rg_dtype_name((rg_dtype)t), o.dtype) == 0) dtype = (rg_dtype)t;
  rg_error e = {0};
  rg_gpu gpu;
  if (rgi_cuda_device(&gpu, &e) != RG_OK) {
    fprintf(stderr, "attn_gpu_bench: %s\n", e.message);
    return 1;
  }
  measure(&o, dtype, &gpu);
  return 0;
}
