/* tests/gpu/serve_gpu.h: a layer as models have it, and the choice of blocks of one token held
 * against the fp64 oracle.
 */
#ifndef SERVE_GPU_H
#define SERVE_GPU_H

#include "tests/harness/num.h"
#include "tests/unit/serve_case.h"

static const layer wide = {.H = 32,
                           .KH = 2,
                           .D = 128,
                           .DV = 128,
                           .page = 128,
                           .kernel = 32,
                           .stride = 16,
                           .block = 64,
                           .top_n = 16,
                           .init = 1,
                           .local = 2,
                           .window = 512,
                           .q = RG_BF16,
                           .kv = RG_BF16};

static inline int below(uint64_t *seed, int n) {
  return (int)(next_random(seed) % (uint32_t)n);
}

static inline void to_doubles(double *y, rg_dtype dtype, const char *x, int n) {
  float value;
  for (int i = 0; i < n; i++) {
    rg_convert(RG_F32, &value, dtype, x + (size_t)i * rg_dtype_size(dtype), 1);
    y[i] = (double)value;
  }
}

/* Row t of idx, whose sequence ends there with `context` tokens, in `pages` or (NULL) in a pack, is
 * the oracle's, but where blocks kept and left are near-ties, not equal. Returns how many KV heads
 * of the others are undecided: the last of the best scores too little for fp32 sums, by a factor of
 * ten (kernels/attn/topk.cuh). */
static inline int oracle_chooses(const layer *l, const buffers *io, int t, int context,
                                 const int32_t *pages, const char *what) {
  const int rows = l->page / l->stride, n = (int)ref_blocks(context, l->kernel, l->stride),
            blocks = (context - 1) / l->block + 1, wide_k = l->KH * l->D, wide_q = l->H * l->D;
  const int32_t cu[] = {0, 1}, cu_k[] = {0, context}, offset = context - 1,
                *idx = (int32_t *)buffer(io, RG_OUTPUT, "idx") + t * l->KH * l->top_n;
  const char *keys = pages ? buffer(io, RG_STATE, "ck") : buffer(io, RG_OUTPUT, "cmp_k"),
             *queries = buffer(io, RG_INPUT, "q"), *lses = buffer(io, RG_OUTPUT, "cmp_lse");
  double *q = malloc((size_t)(wide_q + l->H + l->KH * blocks + n * wide_k) * sizeof *q),
         *lse = q + wide_q, *score = lse + l->H, *k = score + l->KH * blocks;
  int32_t *want = malloc((size_t)(l->KH * l->top_n) * sizeof *want);
  double logit = 0;
  int undecided = 0;
  to_doubles(q, l->q, queries + (size_t)(t * wide_q) * rg_dtype_size(l->q), wide_q);
  to_doubles(lse, RG_F32, lses + (size_t)(t * l->H) * sizeof(float), l->H);
  for (int j = 0; j < n; j++) {
    const int r = j + l->kernel / l->stride - 1,
              at = pages ? pages[r / rows] * rows + r % rows : (t - offset) / l->stride + j;
    to_doubles(k + j * wide_k, l->kv, keys + (size_t)(at * wide_k) * rg_dtype_size(l->kv), wide_k);
  }
  const ref_topk ref = {1,         n,        1,        l->H,    l->KH,    l->D,      q,
                        k,         lse,      NULL,     cu,      cu_k,     &offset,   l->kernel,
                        l->stride, l->block, l->top_n, l->init, l->local, .scale = 0};
  ref_topk_forward(&ref, want, score, blocks, &logit);
  for (int h = 0; h < l->KH; h++) {
    const double *x = score + h * blocks, near = 1e-5 * (logit > 1 ? logit : 1); /* as optest.h's */
    const int32_t *kept = want + h * l->top_n;
    int enough = 0, next = 0, ties = 0;
    for (int b = 0; b < blocks; b++) {
      enough += x[b] >= 1e-26;
      if (next < l->top_n && kept[next] == b)
        next++;
      else
        for (int i = 0; i < l->top_n; i++)
          ties += x[kept[i]] > x[b] && x[kept[i]] * (1 - near) <= x[b];
    }
    if (ties) continue;
    undecided += blocks > l->top_n && enough < l->top_n;
    for (int i = 0; i < l->top_n; i++)
      cr_assert_eq(idx[h * l->top_n + i], kept[i], "%s: row %d, context %d, KV head %d: %d, not %d",
                   what, t, context, h, idx[h * l->top_n + i], kept[i]);
  }
  free(q), free(want);
  return undecided;
}

#endif
