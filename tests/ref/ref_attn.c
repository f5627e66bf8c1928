/* tests/ref/ref_attn.c: attention and its gradient, one row at a time, with "is this key visible"
 * as the only thing that tells the three attention ops apart. */
#include "ref.h"
#include "sums.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void *need(size_t n) {
  void *p = calloc(n ? n : 1, 1);
  if (!p) abort();
  return p;
}

/* One query row: token t of sequence b, at position i, head h; its keys are rows key0 … key0 + nkey
 * − 1. */
typedef struct row {
  int64_t t, b, i, h, kh, key0, nkey;
} row;

static int64_t keys_of(const ref_attn *a, int64_t b, int64_t *key0) {
  const int32_t *cu = a->cu_k ? a->cu_k : a->cu;
  int64_t length = cu[b + 1] - cu[b];
  if (a->kind == REF_CMP) {
    *key0 = cu[b] / a->stride;
    return ref_blocks(length, a->kernel, a->stride);
  }
  *key0 = cu[b];
  return length;
}

static bool selected(const ref_attn *a, const row *r, int64_t key) {
  const int32_t *idx = a->idx + (a->one_idx ? r->t : r->t * a->KH + r->kh) * a->top_n;
  int64_t before = -1; /* largest entry so far */
  for (int64_t n = 0; n < a->top_n; n++) {
    if (idx[n] <= before) continue;
    before = idx[n];
    if (idx[n] == key / a->block) return true;
  }
  return false;
}

static bool visible(const ref_attn *a, const row *r, int64_t key) {
  switch (a->kind) {
  case REF_CMP: return r->i >= key * a->stride + a->kernel - 1;
  case REF_SLC: return key <= r->i && selected(a, r, key);
  case REF_SWA: return key <= r->i && (a->window_left < 0 || key >= r->i - a->window_left);
  }
  return false;
}

/* Fills s [nkey] with the logits (−inf: not visible); returns the lse. */
static double logits(const ref_attn *a, const row *r, double *s) {
  const double *q = a->q + (r->t * a->H + r->h) * a->D;
  double scale = a->scale != 0 ? a->scale : 1 / sqrt((double)a->D);
  double sink = a->sinks ? a->sinks[r->h] : -INFINITY, max = sink, sum;
  for (int64_t j = 0; j < r->nkey; j++) {
    s[j] = -INFINITY;
    if (!visible(a, r, j)) continue;
    const double *k = a->k + ((r->key0 + j) * a->KH + r->kh) * a->D;
    s[j] = scale * ref_dot(q, k, a->D);
    if (a->softcap != 0) s[j] = a->softcap * tanh(s[j] / a->softcap);
    if (s[j] > max) max = s[j];
  }
  if (max == -INFINITY) return -INFINITY;
  sum = exp(sink - max);
  for (int64_t j = 0; j < r->nkey; j++)
    if (s[j] != -INFINITY) sum += exp(s[j] - max);
  return max + log(sum);
}

/* p = exp(s − lse), the output row, both zero if nothing is visible. */
static void softmax_row(const ref_attn *a, const row *r, const double *s, double lse, double *p,
                        double *o) {
  memset(o, 0, (size_t)a->DV * sizeof *o);
  for (int64_t j = 0; j < r->nkey; j++) {
    p[j] = s[j] == -INFINITY ? 0 : exp(s[j] - lse);
    if (p[j] == 0) continue;
    ref_axpy(o, p[j], a->v + ((r->key0 + j) * a->KH + r->kh) * a->DV, a->DV);
  }
}

void ref_attn_forward(const ref_attn *a, double *o, double *lse) {
  double *s = need((size_t)(a->TK + 1) * 2 * sizeof *s), *p = s + a->TK + 1;
  memset(o, 0, (size_t)(a->T * a->H * a->DV) * sizeof *o);
  if (lse) memset(lse, 0, (size_t)(a->T * a->H) * sizeof *lse);
  for (int64_t b = 0; b < a->B; b++) {
    row r = {.b = b};
    r.nkey = keys_of(a, b, &r.key0);
    for (r.t = a->cu[b]; r.t < a->cu[b + 1]; r.t++)
      for (r.h = 0; r.h < a->H; r.h++) {
        r.i = r.t - a->cu[b] + (a->q_offset ? a->q_offset[b] : 0);
        r.kh = r.h / (a->H / a->KH);
        double l = logits(a, &r, s);
        softmax_row(a, &r, s, l, p, o + (r.t * a->H + r.h) * a->DV);
        if (lse) lse[r.t * a->H + r.h] = l;
      }
  }
  free(s);
}

/* Gradients of one row, added up: ds_j = p_j (d_o·v_j − d_o·o + d_lse), through the softcap, onto q
 * and k. */
static void backward_row(const ref_attn *a, const row *r, const double *s, const double *p,
                         const double *o, const double *d_o, double d_lse, double lse, double *dq,
                         double *dk, double *dv, double *dsinks) {
  double scale = a->scale != 0 ? a->scale : 1 / sqrt((double)a->D), delta;
  const double *q = a->q + (r->t * a->H + r->h) * a->D;
  delta = ref_dot(d_o, o, a->DV);
  if (dsinks && a->sinks) dsinks[r->h] += exp(a->sinks[r->h] - lse) * (d_lse - delta);
  for (int64_t j = 0; j < r->nkey; j++) {
    if (s[j] == -INFINITY) continue;
    int64_t key = (r->key0 + j) * a->KH + r->kh;
    const double *k = a->k + key * a->D, *v = a->v + key * a->DV;
    double dx = scale * p[j] * (ref_dot(d_o, v, a->DV) - delta + d_lse);
    if (a->softcap != 0) dx *= 1 - (s[j] / a->softcap) * (s[j] / a->softcap);
    if (dq) ref_axpy(dq + (r->t * a->H + r->h) * a->D, dx, k, a->D);
    if (dk) ref_axpy(dk + key * a->D, dx, q, a->D);
    if (dv) ref_axpy(dv + key * a->DV, p[j], d_o, a->DV);
  }
}

void ref_attn_backward(const ref_attn *a, const double *d_o, const double *d_lse, double *dq,
                       double *dk, double *dv, double *dsinks) {
  double *s = need((size_t)(2 * (a->TK + 1) + a->DV) * sizeof *s), *p = s + a->TK + 1,
         *o = p + a->TK + 1;
  if (dq) memset(dq, 0, (size_t)(a->T * a->H * a->D) * sizeof *dq);
  if (dk) memset(dk, 0, (size_t)(a->TK * a->KH * a->D) * sizeof *dk);
  if (dv) memset(dv, 0, (size_t)(a->TK * a->KH * a->DV) * sizeof *dv);
  if (dsinks) memset(dsinks, 0, (size_t)a->H * sizeof *dsinks);
  for (int64_t b = 0; b < a->B; b++) {
    row r = {.b = b};
    r.nkey = keys_of(a, b, &r.key0);
    for (r.t = a->cu[b]; r.t < a->cu[b + 1]; r.t++)
      for (r.h = 0; r.h < a->H; r.h++) {
        int64_t at = r.t * a->H + r.h;
        r.i = r.t - a->cu[b] + (a->q_offset ? a->q_offset[b] : 0);
        r.kh = r.h / (a->H / a->KH);
        double lse = logits(a, &r, s);
        if (lse == -INFINITY) continue;
        softmax_row(a, &r, s, lse, p, o);
        backward_row(a, &r, s, p, o, d_o + at * a->DV, d_lse ? d_lse[at] : 0, lse, dq, dk, dv,
                     dsinks);
      }
  }
  free(s);
}
