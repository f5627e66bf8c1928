/* tests/ref/ref_topk.c: block scores in fp64 and the total order over them. */
#include "ref.h"
#include "sums.h"
#include <math.h>
#include <stdlib.h>

/* Overlap of the token ranges of compressed block j and selection block b. */
static int64_t overlap(const ref_topk *a, int64_t j, int64_t b) {
  int64_t lo = j * a->stride > b * a->block ? j * a->stride : b * a->block;
  int64_t hi = j * a->stride + a->kernel < (b + 1) * a->block ? j * a->stride + a->kernel
                                                              : (b + 1) * a->block;
  return hi > lo ? hi - lo : 0;
}

static double product(const ref_topk *a, int64_t t, int64_t h, int64_t key) {
  return ref_dot(a->q + (t * a->H + h) * a->D, a->k + (key * a->KH + h / (a->H / a->KH)) * a->D,
                 a->D);
}

/* What key j counts, summed over the query heads of KV head kh; where the row does not see it,
 * `unseen`. */
/* The products of all queries that choose with the one at position i, row t of the pack; `last` is
 * the sequence's last position. */
static double shared_product(const ref_topk *a, int64_t t, int64_t i, int64_t last, int64_t h,
                             int64_t key) {
  int64_t share = a->share > 1 ? a->share : 1;
  double sum = 0;
  for (int64_t o = i / share * share; o < (i / share + 1) * share && o <= last; o++)
    sum += product(a, t + o - i, h, key);
  return sum;
}

static double unseen(const ref_topk *a) {
  return a->dot || a->relu ? -INFINITY : 0;
}

static void keys_count(const ref_topk *a, int64_t t, int64_t i, int64_t last, int64_t kh,
                       int64_t key0, int64_t nkey, double *p, double *max_logit) {
  int64_t g = a->H / a->KH;
  double scale = a->scale != 0 ? a->scale : 1 / sqrt((double)a->D);
  for (int64_t j = 0; j < nkey; j++) {
    p[j] = unseen(a);
    if (i < j * a->stride + a->kernel - 1) continue;
    p[j] = 0;
    for (int64_t h = kh * g; h < (kh + 1) * g; h++) {
      if (a->dot || a->relu) {
        double x = shared_product(a, t, i, last, h, key0 + j),
               w = a->weight ? a->weight[t * a->H + h] : 1;
        p[j] += a->dot ? x : x < 0 ? 0 : w * x;
        continue;
      }
      double s = scale * product(a, t, h, key0 + j);
      if (a->softcap != 0) s = a->softcap * tanh(s / a->softcap);
      if (fabs(s) > *max_logit) *max_logit = fabs(s);
      p[j] += exp(s - a->lse[t * a->H + h]);
    }
  }
}

static double block_score(const ref_topk *a, int64_t nkey, const double *p, int64_t b) {
  double score = a->max ? unseen(a) : 0;
  if ((a->dot || a->relu) && !a->max) return b < nkey ? p[b] : -INFINITY; /* keys are blocks */
  for (int64_t j = 0; j < nkey; j++)
    if (overlap(a, j, b) > 0) {
      if (!a->max)
        score += p[j] * (double)overlap(a, j, b) / (double)a->stride;
      else if (p[j] > score)
        score = p[j];
    }
  return score;
}

/* Does x rank before y? NaN ranks last; blocks are visited in ascending order, so
 * a tie keeps the lower index. */
static bool before(double x, double y) {
  return isnan(y) ? !isnan(x) : x > y;
}

void ref_topk_forward(const ref_topk *a, int32_t *idx, double *scores, int64_t nblock,
                      double *max_logit) {
  const int32_t *cu_k = a->cu_k ? a->cu_k : a->cu;
  double *p = calloc((size_t)a->TK + 1, sizeof *p), logit = 0;
  int64_t most = a->TK + a->T + 1; /* more blocks than any row has */
  for (int64_t b = 0; a->q_offset && b < a->B; b++) most += a->q_offset[b];
  double *score = calloc((size_t)most, sizeof *score);
  bool *taken = calloc((size_t)most, sizeof *taken);
  if (!p || !score || !taken) abort();
  for (int64_t n = 0; n < a->T * a->KH * a->top_n; n++) idx[n] = 0; /* dead rows */
  for (int64_t n = 0; scores && n < a->T * a->KH * nblock; n++) scores[n] = NAN;
  for (int64_t b = 0; b < a->B; b++)
    for (int64_t t = a->cu[b]; t < a->cu[b + 1]; t++)
      for (int64_t kh = 0; kh < a->KH; kh++) {
        int64_t i = t - a->cu[b] + (a->q_offset ? a->q_offset[b] : 0), own = i / a->block, left;
        int64_t key0 = cu_k[b] / a->stride,
                nkey = ref_blocks(cu_k[b + 1] - cu_k[b], a->kernel, a->stride);
        bool partial = a->local == 0 && (i + 1) % a->block != 0;
        int64_t last = partial && !a->tail ? own - 1 : own;
        keys_count(a, t, i, a->cu[b + 1] - a->cu[b] + (a->q_offset ? a->q_offset[b] : 0) - 1, kh,
                   key0, nkey, p, &logit);
        for (int64_t c = 0; c <= own; c++) taken[c] = false;
        for (int64_t c = 0; c <= last; c++) {
          bool forced = c < a->init || c > own - a->local || (c == own && partial);
          score[c] = forced ? INFINITY : block_score(a, nkey, p, c);
          if ((a->dot || a->relu) && isfinite(score[c]) && fabs(score[c]) > logit)
            logit = fabs(score[c]);
          if (scores && c < nblock) scores[(t * a->KH + kh) * nblock + c] = score[c];
        }
        for (left = a->top_n < last + 1 ? a->top_n : last + 1; left > 0; left--) {
          int64_t best = -1;
          for (int64_t c = 0; c <= last; c++)
            if (!taken[c] && (best < 0 || before(score[c], score[best]))) best = c;
          taken[best] = true;
        }
        int32_t *out = idx + (t * a->KH + kh) * a->top_n;
        int64_t n = 0;
        for (int64_t c = 0; c <= own; c++)
          if (taken[c]) out[n++] = (int32_t)c;
        while (n < a->top_n) out[n++] = -1;
      }
  if (max_logit) *max_logit = logit;
  free(p);
  free(score);
  free(taken);
}
