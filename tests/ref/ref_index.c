/* tests/ref/ref_index.c: an indexer's divergence from attention, in fp64, from the definition. */
#include "ref.h"
#include "sums.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The keys of one row: p and score of each, whether it is one of them. */
typedef struct keys {
  double *p, *score;
  bool *in;
  int64_t first, n; /* of the sequence */
} keys;

static const double *index_query(const ref_index *a, int64_t t, int64_t j) {
  return a->index_q + (t * a->J + j) * a->C;
}
static double weight(const ref_index *a, int64_t t, int64_t j) {
  return a->weight ? a->weight[t * a->J + j] : 1;
}

/* Fills in the keys of row t, head i; false if there are none. */
static bool find(const ref_index *a, int64_t b, int64_t t, int64_t i, keys *s) {
  const int32_t *cu_k = a->cu_k ? a->cu_k : a->cu, *idx = a->idx + (t * a->I + i) * a->top_n;
  const int64_t position = t - a->cu[b] + (a->q_offset ? a->q_offset[b] : 0);
  const double scale = a->scale != 0 ? a->scale : 1 / sqrt((double)a->D);
  double sum = 0, exps = 0;
  int64_t before = -1;
  s->first = cu_k[b];
  s->n = cu_k[b + 1] - cu_k[b];
  memset(s->in, 0, (size_t)s->n * sizeof *s->in);
  for (int64_t e = 0; e < a->top_n; e++) {
    if (idx[e] <= before) continue;
    before = idx[e];
    for (int64_t k = before * a->block; k < (before + 1) * a->block; k++)
      if (k < s->n && k <= position) s->in[k] = true;
  }
  for (int64_t k = 0; k < s->n; k++) {
    s->p[k] = s->score[k] = 0;
    if (!s->in[k]) continue;
    for (int64_t h = i * (a->H / a->I); h < (i + 1) * (a->H / a->I); h++)
      s->p[k] +=
          exp(scale * ref_dot(a->q + (t * a->H + h) * a->D,
                              a->k + ((s->first + k) * a->KH + h / (a->H / a->KH)) * a->D, a->D) -
              a->lse[t * a->H + h]);
    for (int64_t j = i * (a->J / a->I); j < (i + 1) * (a->J / a->I); j++) {
      double x =
          ref_dot(index_query(a, t, j), a->index_k + ((s->first + k) * a->I + i) * a->C, a->C);
      s->score[k] += a->index_scale * weight(a, t, j) * (a->relu && x < 0 ? 0 : x);
    }
    sum += s->p[k];
  }
  if (sum == 0) return false;
  double most = -INFINITY;
  for (int64_t k = 0; k < s->n; k++)
    if (s->in[k]) most = fmax(most, s->score[k]);
  for (int64_t k = 0; k < s->n; k++)
    if (s->in[k]) exps += exp(s->score[k] - most);
  for (int64_t k = 0; k < s->n; k++) { /* score becomes its log-softmax */
    s->p[k] /= sum;
    s->score[k] -= most + log(exps);
  }
  return true;
}

static keys room(const ref_index *a) {
  const size_t n = (size_t)a->TK + 1;
  keys s = {.p = calloc(n, sizeof(double)), .score = calloc(n, sizeof(double)), .in = calloc(n, 1)};
  if (!s.p || !s.score || !s.in) abort();
  return s;
}
static void leave(keys s) {
  free(s.p);
  free(s.score);
  free(s.in);
}

void ref_index_forward(const ref_index *a, double *loss) {
  keys s = room(a);
  for (int64_t n = 0; n < a->T * a->I; n++) loss[n] = 0;
  for (int64_t b = 0; b < a->B; b++)
    for (int64_t t = a->cu[b]; t < a->cu[b + 1]; t++)
      for (int64_t i = 0; i < a->I; i++) {
        if (!find(a, b, t, i, &s)) continue;
        for (int64_t k = 0; k < s.n; k++)
          if (s.in[k] && s.p[k] > 0) loss[t * a->I + i] += s.p[k] * (log(s.p[k]) - s.score[k]);
      }
  leave(s);
}

void ref_index_backward(const ref_index *a, const double *dloss, double *dq, double *dk,
                        double *dw) {
  keys s = room(a);
  memset(dq, 0, (size_t)(a->T * a->J * a->C) * sizeof *dq);
  memset(dk, 0, (size_t)(a->TK * a->I * a->C) * sizeof *dk);
  memset(dw, 0, (size_t)(a->T * a->J) * sizeof *dw);
  for (int64_t b = 0; b < a->B; b++)
    for (int64_t t = a->cu[b]; t < a->cu[b + 1]; t++)
      for (int64_t i = 0; i < a->I; i++) {
        if (!find(a, b, t, i, &s)) continue;
        for (int64_t k = 0; k < s.n; k++) {
          if (!s.in[k]) continue;
          const double d = a->index_scale * dloss[t * a->I + i] * (exp(s.score[k]) - s.p[k]);
          const int64_t key = (s.first + k) * a->I + i;
          for (int64_t j = i * (a->J / a->I); j < (i + 1) * (a->J / a->I); j++) {
            const double *q = index_query(a, t, j), *x = a->index_k + key * a->C;
            const double y = ref_dot(q, x, a->C);
            if (a->relu && y <= 0) continue;
            dw[t * a->J + j] += d * y;
            ref_axpy(dq + (t * a->J + j) * a->C, d * weight(a, t, j), x, a->C);
            ref_axpy(dk + key * a->C, d * weight(a, t, j), q, a->C);
          }
        }
      }
  leave(s);
}
