/* bench/attn_gpu_bench.c: times attention on a GPU through the ops' cuda_steps.

     attn_gpu_bench [--op cmp|slc|swa] [--dir fwd|bwd|both] [-T n] [-H n] [--kh n] [-D n] [-E n]
                    [--dtype f32|f16|bf16] [--pack n] [--kernel n] [--stride n] [--block n]
                    [--top n] [--window n] [--select random|local|correlated|shared] [--runs n]
                    [--no-dq] [--no-dkv] [--add] [--latent] [--joined] [--again n]

   --pack n cuts the T tokens into n sequences of uneven lengths. Selections hold the first block,
   the last two and, for the rest, blocks drawn at random among all before (random) or mostly among
   the nearest 32 (local); or nine of ten are those of the query before (correlated), or all but for
   one query of 64 (shared). Prints per call the path taken, the median of the runs and the rate of
   useful operations (of one sequence of full length where packs are asked for, so read ms there),
   and the workspace. With --add gradients go to fp32 sums that are there, as they do in a graph
   whose branches share q, k and v. --latent: V is K's first columns; --joined, too: one gradient
   takes both.
 */
#include "gpu.h"

extern const rg_op rgi_op_cmp_attn, rgi_op_cmp_attn_bwd, rgi_op_slc_attn, rgi_op_slc_attn_bwd,
    rgi_op_swa_attn, rgi_op_swa_attn_bwd;

typedef struct options {
  const char *op, *dir, *dtype, *select;
  int64_t T, H, KH, D, E, pack, kernel, stride, block, top, window, runs, again;
  bool no_dq, no_dkv, add, latent, joined;
} options;

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
  if (x->top > 256) {
    for (; n < x->top; n++)
      row[n] = (int32_t)((own * n + (int64_t)(gpu_draw() % (uint64_t)own)) / x->top);
    return;
  }
  const int64_t forced[] = {own, own - 1, 0};
  for (int i = 0; i < 3 && n < x->top; i++) row[n++] = (int32_t)forced[i];
  const bool shared = *x->select == 's' && pos % x->block != 0, keeps = shared || *x->select == 'c';
  const int32_t *before = row - x->KH * x->top;
  for (int64_t i = 0; keeps && i < x->top && n < x->top; i++)
    if (before[i] > 0 && before[i] < own - 1 && (shared || gpu_draw() % 10 > 0))
      row[n++] = before[i];
  while (n < x->top) {
    int64_t pick = (int64_t)(gpu_draw() % (uint64_t)own);
    if (*x->select == 'l' && own > far && x->top <= far / 2 && gpu_draw() % 4)
      pick = own - (int64_t)(gpu_draw() % far);
    bool have = false;
    for (int64_t i = 0; i < n; i++) have = have || row[i] == pick;
    if (!have) row[n++] = (int32_t)pick;
  }
  qsort(row, (size_t)n, sizeof *row, ascending);
}

static rg_arg selection(const options *x, const int32_t *cu) {
  rg_arg a = gpu_tensor(RG_I32, 3, x->T, x->KH, x->top);
  int32_t *host = malloc(gpu_bytes(&a) + 1);
  if (!host) exit(1);
  for (int64_t b = 0; b < x->pack; b++)
    for (int64_t t = cu[b]; t < cu[b + 1]; t++)
      for (int64_t h = 0; h < x->KH; h++) select_row(x, t - cu[b], host + (t * x->KH + h) * x->top);
  gpu_filled(a, host);
  free(host);
  return a;
}

static void report(const options *o, gpu_call *x, bool timed) {
  const float ms = gpu_time(x, timed ? o->runs : 1);
  rg_cost cost;
  x->op->cost(&x->c, &cost);
  if (timed)
    printf("%-12s T %-7lld H %lld/%lld d %lld/%lld %-4s %10.3f ms (best %.3f) %8.2f TFLOP/s  ws "
           "%.1f MB  %s\n",
           x->op->name, (long long)o->T, (long long)o->H, (long long)o->KH, (long long)o->D,
           (long long)o->E, o->dtype, ms, x->best, cost.flops / ms * 1e-9,
           (double)x->workspace * 1e-6, x->op->cuda_path(&x->c));
  fflush(stdout);
}

/* Another run's outputs are compared with what stands in `host`, or fetched into it. */
static bool same_bits(gpu_call *x, char *host[], bool compare) {
  bool same = true;
  for (int i = 0, n = 0; i < x->n; i++) {
    if (!x->list[i].out) continue;
    const size_t bytes = gpu_bytes(&x->list[i].a);
    char *now = malloc(bytes);
    if (!now) exit(1);
    GPU_OK(cudaMemcpy(now, x->list[i].a.data, bytes, cudaMemcpyDeviceToHost));
    if (compare) {
      same = same && memcmp(now, host[n], bytes) == 0;
      free(now);
    } else {
      host[n] = now;
    }
    n++;
  }
  return same;
}
static void repeat(const options *o, gpu_call *x) {
  char *host[GPU_ARGS] = {0};
  int64_t others = 0;
  if (o->again == 0) return;
  same_bits(x, host, false);
  for (int64_t i = 0; i < o->again; i++) {
    for (int k = 0; k < x->n; k++)
      if (x->list[k].out) GPU_OK(cudaMemset(x->list[k].a.data, 0xff, gpu_bytes(&x->list[k].a)));
    gpu_time(x, 1);
    others += !same_bits(x, host, true);
  }
  printf("  %lld of %lld runs had other bits\n", (long long)others, (long long)o->again);
  for (int i = 0; i < GPU_ARGS; i++) free(host[i]);
}

static void measure(const options *o, rg_dtype dtype) {
  const bool cmp = *o->op == 'c', slc = o->op[1] == 'l';
  const int64_t S = cmp ? o->T / o->stride : o->T;
  int32_t *cu = calloc((size_t)o->pack + 1, sizeof *cu);
  if (!cu) exit(1);
  double sum = 0, all = (double)(o->pack * (o->pack + 3));
  for (int64_t b = 0; b < o->pack; b++)
    cu[b + 1] = (int32_t)((double)o->T * (sum += (double)(2 * b + 4)) / all);
  cu[o->pack] = (int32_t)o->T;
  const rg_arg starts = gpu_filled(gpu_tensor(RG_I32, 1, o->pack + 1, 0, 0), cu);
  const rg_arg q = gpu_normal(dtype, 3, o->T, o->H, o->D, 1),
               k = gpu_normal(dtype, 3, S, o->KH, o->D, 1),
               d_o = gpu_normal(dtype, 3, o->T, o->H, o->E, 1);
  rg_arg v = k;
  v.dim[2] = o->E;
  if (!o->latent) v = gpu_normal(dtype, 3, S, o->KH, o->E, 1);
  rg_arg idx = {0};
  if (slc) idx = selection(o, cu);
  gpu_call x[] = {gpu_begin(cmp   ? &rgi_op_cmp_attn
                            : slc ? &rgi_op_slc_attn
                                  : &rgi_op_swa_attn),
                  gpu_begin(cmp   ? &rgi_op_cmp_attn_bwd
                            : slc ? &rgi_op_slc_attn_bwd
                                  : &rgi_op_swa_attn_bwd)};
  for (int i = 0; i < 2; i++) {
    gpu_int(&x[i], "kernel", o->kernel);
    gpu_int(&x[i], "stride", o->stride);
    gpu_int(&x[i], "block", o->block);
    gpu_int(&x[i], "window_left", o->window);
    gpu_in(&x[i], "q", q);
    gpu_in(&x[i], "k", k);
    gpu_in(&x[i], "v", v);
    if (slc) gpu_in(&x[i], "idx", idx);
    gpu_in(&x[i], "cu_seqlens", starts);
  }
  const rg_arg out = gpu_tensor(dtype, 3, o->T, o->H, o->E),
               lse = gpu_tensor(RG_F32, 2, o->T, o->H, 0);
  gpu_out(&x[0], "o", out);
  gpu_out(&x[0], "lse", lse);
  gpu_int(&x[1], "joined", o->joined);
  gpu_in(&x[1], "out.o", out);
  gpu_in(&x[1], "out.lse", lse);
  gpu_in(&x[1], "grad.o", d_o);
  const struct {
    const char *name, *sum;
    int64_t rows, heads, width;
  } d[] = {{"d.q", "acc.q", o->T, o->H, o->D},
           {"d.k", "acc.k", S, o->KH, o->D},
           {"d.v", "acc.v", S, o->KH, o->E}};
  for (int i = 0; i < 3; i++) {
    if ((i == 0 ? o->no_dq : o->no_dkv) || (i == 2 && o->joined)) continue;
    const rg_arg y = gpu_tensor(o->add ? RG_F32 : dtype, 3, d[i].rows, d[i].heads, d[i].width);
    gpu_out(&x[1], d[i].name, y);
    if (o->add) gpu_in(&x[1], d[i].sum, y);
  }
  report(o, &x[0], *o->dir == 'f' || o->dir[1] == 'o');
  if (*o->dir != 'b' || o->dir[1] == 'o') repeat(o, &x[0]);
  if (*o->dir == 'b') {
    report(o, &x[1], true);
    repeat(o, &x[1]);
  }
  free(cu);
}

int main(int argc, char **argv) {
  options o = {"slc", "both", "bf16", "random", 8192, 16, 1,     128,   0,     1,     32,
               16,    64,     16,     512,      11,   0,  false, false, false, false, false};
  const gpu_flag flags[] = {{"--op", &o.op, 0, 0},
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
                            {"--again", 0, &o.again, 0},
                            {"--latent", 0, 0, &o.latent},
                            {"--joined", 0, 0, &o.joined},
                            {"--no-dq", 0, 0, &o.no_dq},
                            {"--no-dkv", 0, 0, &o.no_dkv},
                            {"--add", 0, 0, &o.add}};
  gpu_flags(argc, argv, flags, RGI_COUNT(flags));
  if (o.E == 0) o.E = o.D;
  o.latent = o.latent || o.joined;
  gpu_open();
  measure(&o, gpu_dtype(o.dtype));
  return 0;
}
