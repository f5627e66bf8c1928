/* bench/attn_bench.c: the three attention ops on the CPU against sgemm doing as many useful
 * floating-point operations.
 *
 *   attn_bench [threads [T [isa [f32|bf16|f16]]]]
 *
 * default: 1 thread, 8192 tokens, this machine's level, f32
 *
 * Shape: one sequence, 16 query heads on 1 KV head, d 128; compressed blocks 32/16, 16 selected
 * blocks of 64 (the first, the last two, the rest drawn at random), window 512. Prints the median
 * of five runs each. Compiled with HAVE_OPENBLAS it times OpenBLAS' sgemm on the same number of
 * threads; otherwise the last columns are left out.
 */
#include "../exec/pool.h"
#include "../ops/ops.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#ifdef HAVE_OPENBLAS
#include <cblas.h>
#endif

enum {
  H = 16,
  D = 128,
  KERNEL = 32,
  STRIDE = 16,
  BLOCK = 64,
  TOP_N = 16,
  WINDOW = 512,
  RUNS = 5,
  MAX_ARGS = 24
};

extern const rg_op rgi_op_cmp_attn, rgi_op_cmp_attn_bwd, rgi_op_slc_attn, rgi_op_slc_attn_bwd,
    rgi_op_swa_attn, rgi_op_swa_attn_bwd;

typedef struct bench {
  int threads, isa;
  int64_t T;
  rg_dtype dtype;
  rgi_pool *pool;
  uint64_t random;
} bench;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *need(size_t bytes) {
  void *p = aligned_alloc(256, RGI_ROUND256(bytes + 1));
  if (!p) {
    fprintf(stderr, "attn_bench: out of memory (%zu bytes)\n", bytes);
    exit(1);
  }
  memset(p, 0, bytes);
  return p;
}

static uint64_t draw(bench *b) {
  b->random = b->random * 6364136223846793005u + 1442695040888963407u;
  return b->random >> 33;
}

static rg_arg tensor(rg_dtype dtype, int rank, int64_t d0, int64_t d1, int64_t d2) {
  rg_arg a = {.dtype = dtype, .rank = rank, .dim = {d0, d1, d2}};
  int64_t n = 1;
  for (int i = rank - 1; i >= 0; i--) {
    a.stride[i] = n;
    n *= a.dim[i];
  }
  a.data = need((size_t)n * rg_dtype_size(dtype));
  return a;
}

/* About N(0, 1): a sum of twelve uniforms. */
static rg_arg normal(bench *b, int64_t d0, int64_t d1, int64_t d2) {
  rg_arg a = tensor(b->dtype, 3, d0, d1, d2);
  for (int64_t i = 0; i < d0 * d1 * d2; i++) {
    float x = -6;
    for (int j = 0; j < 12; j++) x += (float)draw(b) * 0x1p-31f;
    rgi_store((char *)a.data + (size_t)i * rg_dtype_size(a.dtype), a.dtype, &x, 1);
  }
  return a;
}

static int ascending(const void *a, const void *b) {
  return *(const int32_t *)a - *(const int32_t *)b;
}

static rg_arg selection(bench *b) {
  rg_arg a = tensor(RG_I32, 3, b->T, 1, TOP_N);
  for (int64_t t = 0; t < b->T; t++) {
    int32_t *row = (int32_t *)a.data + t * TOP_N;
    int own = (int)(t / BLOCK), n = 0;
    for (int i = 0; i < TOP_N; i++) row[i] = -1;
    for (; own < TOP_N && n <= own; n++) row[n] = n;
    if (n > 0) continue;
    row[n++] = 0;
    row[n++] = own - 1;
    row[n++] = own;
    while (n < TOP_N) {
      int32_t pick = 1 + (int32_t)(draw(b) % (uint64_t)(own - 2));
      bool have = false;
      for (int i = 0; i < n; i++) have = have || row[i] == pick;
      if (!have) row[n++] = pick;
    }
    qsort(row, TOP_N, sizeof *row, ascending);
  }
  return a;
}

/* ---- one call ---- */

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

static void prepare(bench *b, call *x, const rg_op *op) {
  *x = (call){.c = {.op = op, .node = op->name, .threads = b->threads, .isa = b->isa}};
  for (int i = 0; i < MAX_ARGS; i++) {
    x->in[i].rank = x->out[i].rank = -1;
    x->in_begin[i] = x->out_begin[i] = i;
  }
  const char *name[] = {"kernel", "stride", "block", "window_left"};
  const int64_t value[] = {KERNEL, STRIDE, BLOCK, WINDOW};
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
  x->c.parallel = rgi_pool_run;
  x->c.pool = b->pool;
}
static void bind_in(call *x, const char *name, rg_arg a) {
  int i = port(x->c.op->in, x->c.op->nin, name);
  if (i >= 0) x->in[i] = a;
}
static void bind_out(call *x, const char *name, rg_arg a) {
  x->out[port(x->c.op->out, x->c.op->nout, name)] = a;
}

static int by_time(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double time_call(call *x) {
  double t[RUNS];
  x->c.workspace = need(x->c.op->workspace(&x->c));
  for (int i = 0; i < RUNS; i++) {
    t[i] = now();
    if (x->c.op->run_cpu(&x->c) != RG_OK) exit(1);
    t[i] = now() - t[i];
  }
  free(x->c.workspace);
  qsort(t, RUNS, sizeof *t, by_time);
  return t[RUNS / 2];
}

/* Seconds that sgemm takes per operation: square, large enough to be at its best. */
static double sgemm_rate(int threads) {
#ifdef HAVE_OPENBLAS
  enum { N = 2048 };
  float *a = need(sizeof(float) * N * N), *b = need(sizeof(float) * N * N),
        *c = need(sizeof(float) * N * N);
  double t[RUNS];
  openblas_set_num_threads(threads);
  for (int i = 0; i < N * N; i++) a[i] = b[i] = (float)(i % 7) * 0.125f;
  for (int i = 0; i < RUNS; i++) {
    t[i] = now();
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, N, N, N, 1, a, N, b, N, 0, c, N);
    t[i] = now() - t[i];
  }
  free(a);
  free(b);
  free(c);
  qsort(t, RUNS, sizeof *t, by_time);
  printf("sgemm (%s, %d threads): %.1f GFLOP/s\n", openblas_get_corename(), threads,
         2e-9 * N * N * (double)N / t[RUNS / 2]);
  return t[RUNS / 2] / (2.0 * N * N * N);
#else
  (void)threads;
  return 0;
#endif
}

static double total[2], work[2];

static void report(call *x, bool backward, double sgemm) {
  double s = time_call(x);
  rg_cost cost;
  x->c.op->cost(&x->c, &cost);
  total[backward] += s;
  work[backward] += cost.flops;
  printf("%-14s %9.2f GFLOP %9.1f ms %8.1f GFLOP/s", x->c.op->name, cost.flops * 1e-9, s * 1e3,
         cost.flops / s * 1e-9);
  if (sgemm > 0)
    printf("   sgemm %8.1f ms   ratio %.2f", cost.flops * sgemm * 1e3, s / (cost.flops * sgemm));
  printf("\n");
}

static void measure(bench *b, const rg_op *forward, const rg_op *backward, rg_arg q, rg_arg k,
                    rg_arg v, rg_arg idx, rg_arg cu, rg_arg d_o, double sgemm) {
  call f, g;
  rg_arg o = tensor(b->dtype, 3, b->T, H, D), lse = tensor(RG_F32, 2, b->T, H, 0);
  rg_arg dq = tensor(b->dtype, 3, b->T, H, D), dk = tensor(b->dtype, 3, k.dim[0], 1, D);
  rg_arg dv = tensor(b->dtype, 3, k.dim[0], 1, D);
  call *both[] = {&f, &g};
  prepare(b, &f, forward);
  prepare(b, &g, backward);
  for (int i = 0; i < 2; i++) {
    bind_in(both[i], "q", q);
    bind_in(both[i], "k", k);
    bind_in(both[i], "v", v);
    bind_in(both[i], "idx", idx);
    bind_in(both[i], "cu_seqlens", cu);
  }
  bind_out(&f, "o", o);
  bind_out(&f, "lse", lse);
  bind_in(&g, "out.o", o);
  bind_in(&g, "out.lse", lse);
  bind_in(&g, "grad.o", d_o);
  bind_out(&g, "d.q", dq);
  bind_out(&g, "d.k", dk);
  bind_out(&g, "d.v", dv);
  report(&f, false, sgemm);
  report(&g, true, sgemm);
  rg_arg *own[] = {&o, &lse, &dq, &dk, &dv};
  for (int i = 0; i < RGI_COUNT(own); i++) free(own[i]->data);
}

int main(int argc, char **argv) {
  rg_context *ctx;
  rg_error e = {0};
  bench b = {
      .threads = argc > 1 ? atoi(argv[1]) : 1, .T = argc > 2 ? atoll(argv[2]) : 8192, .random = 1};
  for (int t = 0; argc > 4 && t < RG_I32; t++)
    if (strcmp(rg_dtype_name((rg_dtype)t), argv[4]) == 0) b.dtype = (rg_dtype)t;
  if (b.threads < 1 || b.T < 1 || rg_context_create(NULL, &ctx, &e) != RG_OK ||
      rgi_pool_create(ctx, b.threads, &b.pool, &e) != RG_OK) {
    fprintf(stderr, "attn_bench: %s\n",
            e.status ? e.message : "threads and T are positive numbers");
    return 2;
  }
  b.isa = argc > 3 ? atoi(argv[3]) : ctx->isa;
  if (b.isa > ctx->isa) b.isa = ctx->isa;

  rg_arg q = normal(&b, b.T, H, D), k = normal(&b, b.T, 1, D), v = normal(&b, b.T, 1, D),
         d_o = normal(&b, b.T, H, D);
  rg_arg ck = normal(&b, b.T / STRIDE, 1, D), cv = normal(&b, b.T / STRIDE, 1, D),
         idx = selection(&b);
  rg_arg cu = tensor(RG_I32, 1, 2, 0, 0);
  ((int32_t *)cu.data)[1] = (int32_t)b.T;
  printf("T %lld, H %d, KH 1, d %d, %s, CPU level %d, %d threads\n", (long long)b.T, H, D,
         rg_dtype_name(b.dtype), b.isa, b.threads);
  double sgemm = sgemm_rate(b.threads);
  measure(&b, &rgi_op_cmp_attn, &rgi_op_cmp_attn_bwd, q, ck, cv, idx, cu, d_o, sgemm);
  measure(&b, &rgi_op_slc_attn, &rgi_op_slc_attn_bwd, q, k, v, idx, cu, d_o, sgemm);
  measure(&b, &rgi_op_swa_attn, &rgi_op_swa_attn_bwd, q, k, v, idx, cu, d_o, sgemm);
  for (int i = 0; i < 2; i++) {
    printf("%-14s %9.2f GFLOP %9.1f ms %8.1f GFLOP/s", i ? "all backward" : "all forward",
           work[i] * 1e-9, total[i] * 1e3, work[i] / total[i] * 1e-9);
    if (sgemm > 0)
      printf("   sgemm %8.1f ms   ratio %.2f", work[i] * sgemm * 1e3, total[i] / (work[i] * sgemm));
    printf("\n");
  }
  rg_arg *own[] = {&q, &k, &v, &d_o, &ck, &cv, &idx, &cu};
  for (int i = 0; i < RGI_COUNT(own); i++) free(own[i]->data);
  rgi_pool_destroy(b.pool);
  rg_context_destroy(ctx);
  return 0;
}
