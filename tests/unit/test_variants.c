/* tests/unit/test_variants.c: examples/variants against attention written down a second time: whole
   layers in fp64 straight from how the models are described, a sequence at a time, token by token.
   It knows neither the specs' nodes nor the oracle of ops (tests/ref), and of a spec only the names
   of its inputs. Gradients: the fp32 ones along a random direction of each input against the
   difference of the fp64 outputs. */
#include "run_util.h"
#include "tests/harness/optest.h"

#include <math.h>

enum { T = 96, LIVE = 90, B = 4 };
static const int lengths[B] = {41, 1, 0, 48};

/* ---- the models: the output [n, width] of one sequence, tokens [at, at + n) of the inputs ---- */

typedef struct model model;
typedef const double *(*model_fn)(const model *m, int64_t at, int64_t n);
enum { OUTPUTS = 2 };

struct model {
  const char *out[OUTPUTS]; /* names of the outputs; the first is "y" where not said */
  model_fn f[OUTPUTS];
  ot *t;
  buffers *b;
  double *value[MOST_TENSORS]; /* of inputs, as doubles; moved by what asks for slopes */
  int64_t M, H, KH, D, window; /* sizes of all specs in this file */
  int64_t E, HI, DI, block, top_n;
  /* What was chosen for a token and head when the model ran first; slopes are taken of that. */
  bool *chosen;   /* [T, KH, T] */
  double *target; /* [T, KH, T]: of an index, likewise: it is taught, and does not teach */
  bool frozen;
};

static const double *input(const model *m, const char *name) {
  for (int i = 0; i < m->b->n; i++)
    if (m->b->info[i].role == RG_INPUT && strcmp(m->b->info[i].name, name) == 0) return m->value[i];
  cr_assert(false, "no input %s", name);
  return NULL;
}

static double *rms(const model *m, const double *x, int64_t rows, int64_t width, const double *w,
                   double eps) {
  double *y = ot_doubles(m->t, rows * width + 1);
  for (int64_t r = 0; r < rows; r++) {
    double squares = 0;
    for (int64_t c = 0; c < width; c++) squares += pow(x[r * width + c], 2) / (double)width;
    for (int64_t c = 0; c < width; c++)
      y[r * width + c] = x[r * width + c] * w[c] / sqrt(squares + eps);
  }
  return y;
}

/* x [n, in] · wᵀ + b, w [out, in] */
static double *project(const model *m, const double *x, int64_t n, int64_t in, int64_t out,
                       const double *w, const double *b) {
  double *y = ot_doubles(m->t, n * out + 1);
  for (int64_t i = 0; i < n; i++)
    for (int64_t o = 0; o < out; o++) {
      y[i * out + o] = b ? b[o] : 0;
      for (int64_t c = 0; c < in; c++) y[i * out + o] += x[i * in + c] * w[o * in + c];
    }
  return y;
}

/* Turns the first 2·pairs features of every head of x [n, H, D]: feature c with c + pairs. */
static void turn(double *x, int64_t n, int64_t H, int64_t D, int64_t pairs, const double *frequency,
                 double length) {
  for (int64_t i = 0; i < n * H; i++)
    for (int64_t c = 0; c < pairs; c++) {
      const int64_t position = i / H;
      double angle = (double)position * frequency[c], *at = x + i * D + c, a = at[0], b = at[pairs];
      at[0] = length * (a * cos(angle) - b * sin(angle));
      at[pairs] = length * (a * sin(angle) + b * cos(angle));
    }
}

/* Causal softmax attention within a window (-1: all), with a learned logit per head or without. */
static double *attend(const model *m, const double *q, const double *k, const double *v, int64_t n,
                      int64_t window, const double *sinks) {
  const int64_t H = m->H, KH = m->KH, D = m->D;
  double *o = ot_doubles(m->t, n * H * D + 1), weight[T];
  for (int64_t i = 0; i < n; i++)
    for (int64_t h = 0; h < H; h++) {
      const int64_t kh = h / (H / KH), first = window < 0 || i < window ? 0 : i - window;
      double sum = sinks ? exp(sinks[h]) : 0;
      for (int64_t j = first; j <= i; j++) {
        double dot = 0;
        for (int64_t c = 0; c < D; c++) dot += q[(i * H + h) * D + c] * k[(j * KH + kh) * D + c];
        sum += weight[j] = exp(dot / sqrt((double)D));
      }
      for (int64_t j = first; j <= i; j++)
        for (int64_t c = 0; c < D; c++)
          o[(i * H + h) * D + c] += weight[j] / sum * v[(j * KH + kh) * D + c];
    }
  return o;
}

static double *plus(const model *m, const double *x, const double *y, int64_t n) {
  double *z = ot_doubles(m->t, n + 1);
  for (int64_t i = 0; i < n; i++) z[i] = x[i] + y[i];
  return z;
}

/* gpt-oss's YaRN: frequencies of D/2 pairs, and the length of cosine and sine. */
static double yarn(int64_t D, double *frequency) {
  const double theta = 150000, factor = 32, original = 4096, pi = acos(-1);
  double low = (double)D / 2 * log(original / (32 * 2 * pi)) / log(theta),
         high = (double)D / 2 * log(original / (1 * 2 * pi)) / log(theta);
  for (int64_t c = 0; c < D / 2; c++) {
    double keep = 1 - fmin(1, fmax(0, ((double)c - low) / (high - low)));
    double plain = pow(theta, -2 * (double)c / (double)D);
    frequency[c] = keep * plain + (1 - keep) * plain / factor;
  }
  return 0.1 * log(factor) + 1;
}

static const double *gpt_oss_layer(const model *m, const double *x, int64_t n, int pair,
                                   const char *which, int64_t window) {
  const int64_t Q = m->H * m->D, K = m->KH * m->D;
  char name[64];
#define W(rest) (snprintf(name, sizeof name, "pair%d_%s" rest, pair, which), input(m, name))
  const double *normal = rms(m, x, n, m->M, W("wn"), 1e-5), *wq = W("wq"), *wk = W("wk"),
               *wv = W("wv"), *wo = W("wo");
  double *q = project(m, normal, n, m->M, Q, wq, W("bq")),
         *k = project(m, normal, n, m->M, K, wk, W("bk")),
         *v = project(m, normal, n, m->M, K, wv, W("bv")), frequency[64];
  const double length = yarn(m->D, frequency);
  turn(q, n, m->H, m->D, m->D / 2, frequency, length);
  turn(k, n, m->KH, m->D, m->D / 2, frequency, length);
  const double *o = attend(m, q, k, v, n, window, W("sinks"));
  return plus(m, x, project(m, o, n, Q, m->M, wo, W("bo")), n * m->M);
#undef W
}

static const double *gpt_oss(const model *m, int64_t at, int64_t n) {
  const double *x = input(m, "x") + at * m->M;
  for (int pair = 0; pair < 2; pair++) {
    x = gpt_oss_layer(m, x, n, pair, "", m->window);
    x = gpt_oss_layer(m, x, n, pair, "full_", -1);
  }
  return x;
}

static const double *gated_attention(const model *m, int64_t at, int64_t n) {
  const int64_t Q = m->H * m->D, K = m->KH * m->D, pairs = m->D / 8;
  const double *x = input(m, "x") + at * m->M;
  const double *normal = rms(m, x, n, m->M, input(m, "wn"), 1e-6);
  double *q = project(m, normal, n, m->M, Q, input(m, "wq"), NULL),
         *k = project(m, normal, n, m->M, K, input(m, "wk"), NULL),
         *v = project(m, normal, n, m->M, K, input(m, "wv"), NULL),
         *g = project(m, normal, n, m->M, Q, input(m, "wg"), NULL), frequency[64];
  q = rms(m, q, n * m->H, m->D, input(m, "wqn"), 1e-6);
  k = rms(m, k, n * m->KH, m->D, input(m, "wkn"), 1e-6);
  for (int64_t c = 0; c < pairs; c++) frequency[c] = pow(1e7, -(double)c / (double)pairs);
  turn(q, n, m->H, m->D, pairs, frequency, 1);
  turn(k, n, m->KH, m->D, pairs, frequency, 1);
  double *o = attend(m, q, k, v, n, -1, NULL);
  for (int64_t i = 0; i < n * Q; i++) o[i] /= 1 + exp(-g[i]);
  return plus(m, x, project(m, o, n, Q, m->M, input(m, "wo"), NULL), n * m->M);
}

/* ---- choices ---- */

/* Keeps the forced of n scores and the best of the others, `top` in all; the earlier of equals. */
static void choose(const model *m, int64_t token, int64_t head, const double *score, int64_t n,
                   const bool *forced, int64_t top, bool *out) {
  bool *old = m->chosen + (token * m->KH + head) * T;
  if (m->frozen) {
    memcpy(out, old, (size_t)n * sizeof *out);
    return;
  }
  memset(out, 0, (size_t)n * sizeof *out);
  for (int64_t b = 0; b < n; b++)
    if (forced[b] && top > 0) out[b] = true, top--;
  for (; top > 0; top--) {
    int64_t best = -1;
    for (int64_t b = 0; b < n; b++)
      if (!out[b] && !forced[b] && (best < 0 || score[b] > score[best])) best = b;
    if (best < 0) break;
    out[best] = true;
  }
  memcpy(old, out, (size_t)n * sizeof *out);
}

static double dot(const double *a, const double *b, int64_t n) {
  double sum = 0;
  for (int64_t c = 0; c < n; c++) sum += a[c] * b[c];
  return sum;
}

/* Token i's heads of KV head kh over the tokens j <= i whose block is in `chosen`; k [n, KH, D], v
 * [n, KH, E] with rows `v_row` apart. */
static void attend_chosen(const model *m, const double *q, const double *k, const double *v,
                          int64_t v_row, int64_t i, int64_t kh, const bool *chosen, int64_t block,
                          double scale, double *o) {
  const int64_t G = m->H / m->KH;
  for (int64_t h = kh * G; h < (kh + 1) * G; h++) {
    double weight[T], sum = 0;
    for (int64_t j = 0; j <= i; j++)
      if (chosen[j / block])
        sum += weight[j] =
            exp(scale * dot(q + (i * m->H + h) * m->D, k + (j * m->KH + kh) * m->D, m->D));
    for (int64_t j = 0; j <= i; j++)
      for (int64_t c = 0; c < m->E && chosen[j / block]; c++)
        o[(i * m->H + h) * m->E + c] += weight[j] / sum * v[j * v_row + kh * m->E + c];
  }
}

/* How the attention of heads [h0, h1) over the chosen tokens departs from the softmax of the
 * scores: the Kullback-Leibler divergence of its mean. */
static double divergence(const model *m, const double *q, const double *k, int64_t at, int64_t i,
                         int64_t h0, int64_t h1, const bool *chosen, int64_t block, double scale,
                         const double *score) {
  double *mean = m->target + ((at + i) * m->KH + h0 / (h1 - h0)) * T, exps = 0, sum = 0;
  if (!m->frozen) memset(mean, 0, T * sizeof *mean);
  for (int64_t h = h0; h < h1 && !m->frozen; h++) {
    double p[T], all = 0;
    const double *head = q + (i * m->H + h) * m->D;
    for (int64_t j = 0; j <= i; j++)
      if (chosen[j / block])
        all += p[j] = exp(scale * dot(head, k + (j * m->KH + h / (m->H / m->KH)) * m->D, m->D));
    for (int64_t j = 0; j <= i; j++)
      if (chosen[j / block]) mean[j] += p[j] / all / (double)(h1 - h0);
  }
  for (int64_t j = 0; j <= i; j++)
    if (chosen[j / block]) exps += exp(score[j]);
  for (int64_t j = 0; j <= i; j++)
    if (chosen[j / block]) sum += mean[j] * log(mean[j] / (exp(score[j]) / exps));
  return sum;
}

/* Rows of an input [T, width] from token `at` on. */
static const double *rows(const model *m, const char *name, int64_t at, int64_t width) {
  return input(m, name) + at * width;
}

/* MiniMax: a block of keys is worth its best token by the index of a KV head's group. */
static const double *msa_both(const model *m, int64_t at, int64_t n, bool of_loss) {
  const int64_t K = m->KH * m->D;
  const double *q = rows(m, "q", at, m->H * m->D), *k = rows(m, "k", at, K),
               *v = rows(m, "v", at, K), *iq = rows(m, "index_q", at, m->KH * m->DI),
               *ik = rows(m, "index_k", at, m->KH * m->DI);
  double *o = ot_doubles(m->t, n * m->H * m->D + 1), *loss_of = ot_doubles(m->t, n * m->KH + 1);
  for (int64_t i = 0; i < n; i++)
    for (int64_t kh = 0; kh < m->KH; kh++) {
      const int64_t own = i / m->block;
      double score[T];
      bool forced[T] = {false}, chosen[T];
      for (int64_t b = 0; b <= own; b++) score[b] = -INFINITY;
      double each[T];
      for (int64_t j = 0; j <= i; j++) {
        each[j] = dot(iq + (i * m->KH + kh) * m->DI, ik + (j * m->KH + kh) * m->DI, m->DI);
        score[j / m->block] = fmax(score[j / m->block], each[j]);
        each[j] /= sqrt(128);
      }
      forced[own] = true;
      choose(m, at + i, kh, score, own + 1, forced, m->top_n, chosen);
      attend_chosen(m, q, k, v, K, i, kh, chosen, m->block, 1 / sqrt((double)m->D), o);
      const int64_t G = m->H / m->KH;
      loss_of[i * m->KH + kh] = divergence(m, q, k, at, i, kh * G, (kh + 1) * G, chosen, m->block,
                                           1 / sqrt((double)m->D), each);
    }
  return of_loss ? loss_of : o;
}
static const double *msa(const model *m, int64_t at, int64_t n) {
  return msa_both(m, at, n, false);
}
static const double *msa_loss(const model *m, int64_t at, int64_t n) {
  return msa_both(m, at, n, true);
}

/* Qwen: complete blocks by the heads' positive products with their mean; the rest block is kept. */
static const double *qsa(const model *m, int64_t at, int64_t n) {
  const int64_t K = m->KH * m->D;
  const double *q = rows(m, "q", at, m->H * m->D), *k = rows(m, "k", at, K),
               *v = rows(m, "v", at, K), *iq = rows(m, "index_q", at, m->HI * m->DI),
               *ik = rows(m, "index_k", at, m->DI);
  double *o = ot_doubles(m->t, n * m->H * m->D + 1), *mean = ot_doubles(m->t, n * m->DI + 1);
  for (int64_t j = 0; j < n / m->block * m->block; j++)
    for (int64_t c = 0; c < m->DI; c++)
      mean[j / m->block * m->DI + c] += ik[j * m->DI + c] / (double)m->block;
  for (int64_t i = 0; i < n; i++) {
    const int64_t complete = (i + 1) / m->block, blocks = i / m->block + 1;
    double score[T] = {0};
    bool forced[T] = {false}, chosen[T];
    for (int64_t b = 0; b < complete; b++)
      for (int64_t h = 0; h < m->HI; h++)
        score[b] += fmax(0, dot(iq + (i * m->HI + h) * m->DI, mean + b * m->DI, m->DI));
    forced[blocks - 1] = complete < blocks;
    choose(m, at + i, 0, score, blocks, forced, m->top_n, chosen);
    for (int64_t kh = 0; kh < m->KH; kh++)
      attend_chosen(m, q, k, v, K, i, kh, chosen, m->block, 1 / sqrt((double)m->D), o);
  }
  return o;
}

/* Turns `pairs` pairs of features of every head from feature `from` on: neighbours, or those
 * `pairs` apart. */
static void turn_pairs(double *x, int64_t n, int64_t H, int64_t D, int64_t from, int64_t pairs,
                       bool neighbours) {
  for (int64_t i = 0; i < n * H; i++)
    for (int64_t c = 0; c < pairs; c++) {
      const int64_t position = i / H;
      const double angle = (double)position * pow(10000, -(double)c / (double)pairs);
      double *a = x + i * D + from + (neighbours ? 2 * c : c), *b = a + (neighbours ? 1 : pairs);
      const double x0 = *a, x1 = *b;
      *a = x0 * cos(angle) - x1 * sin(angle);
      *b = x0 * sin(angle) + x1 * cos(angle);
    }
}

/* DeepSeek V3.2, heads absorbed: D = R + P features of a key, whose first E = R are its value. */
static const double *dsa_both(const model *m, int64_t at, int64_t n, bool of_loss) {
  const int64_t P = m->D - m->E, C = 20;
  const double *x = rows(m, "x", at, m->M), *x_index = rows(m, "x_index", at, m->M),
               *c_q = rows(m, "c_q_index", at, C), *q_c = rows(m, "q_c", at, m->H * m->E),
               *q_pe = rows(m, "q_pe", at, m->H * P);
  const double *c = rms(m, project(m, x, n, m->M, m->E, input(m, "w_c"), NULL), n, m->E,
                        input(m, "w_n"), 1e-6),
               *pe = project(m, x, n, m->M, P, input(m, "w_pe"), NULL),
               *w = project(m, x_index, n, m->M, m->HI, input(m, "w_iw"), NULL);
  double *k = ot_doubles(m->t, n * m->D + 1), *q = ot_doubles(m->t, n * m->H * m->D + 1),
         *iq = project(m, c_q, n, C, m->HI * m->DI, input(m, "w_iq"), NULL),
         *ik = project(m, x_index, n, m->M, m->DI, input(m, "w_ik"), NULL),
         *o = ot_doubles(m->t, n * m->H * m->E + 1), *loss_of = ot_doubles(m->t, n + 1);
  for (int64_t i = 0; i < n; i++) {
    double mean = 0, variance = 0, *row = ik + i * m->DI;
    for (int64_t d = 0; d < m->DI; d++) mean += row[d] / (double)m->DI;
    for (int64_t d = 0; d < m->DI; d++) variance += pow(row[d] - mean, 2) / (double)m->DI;
    for (int64_t d = 0; d < m->DI; d++)
      row[d] = (row[d] - mean) / sqrt(variance + 1e-6) * input(m, "n_ik")[d] + input(m, "b_ik")[d];
    memcpy(k + i * m->D, c + i * m->E, (size_t)m->E * sizeof *k);
    memcpy(k + i * m->D + m->E, pe + i * P, (size_t)P * sizeof *k);
    for (int64_t h = 0; h < m->H; h++) {
      memcpy(q + (i * m->H + h) * m->D, q_c + (i * m->H + h) * m->E, (size_t)m->E * sizeof *q);
      memcpy(q + (i * m->H + h) * m->D + m->E, q_pe + (i * m->H + h) * P, (size_t)P * sizeof *q);
    }
  }
  turn_pairs(k, n, 1, m->D, m->E, P / 2, true);
  turn_pairs(q, n, m->H, m->D, m->E, P / 2, true);
  turn_pairs(iq, n, m->HI, m->DI, 0, P / 2, false);
  turn_pairs(ik, n, 1, m->DI, 0, P / 2, false);
  for (int64_t i = 0; i < n; i++) {
    double score[T] = {0};
    bool forced[T] = {false}, chosen[T];
    for (int64_t j = 0; j <= i; j++)
      for (int64_t h = 0; h < m->HI; h++)
        score[j] +=
            w[i * m->HI + h] * fmax(0, dot(iq + (i * m->HI + h) * m->DI, ik + j * m->DI, m->DI));
    choose(m, at + i, 0, score, i + 1, forced, m->top_n, chosen);
    attend_chosen(m, q, k, k, m->D, i, 0, chosen, 1, 0.07216878364870323, o);
    loss_of[i] = divergence(m, q, k, at, i, 0, m->H, chosen, 1, 0.07216878364870323, score);
  }
  return of_loss ? loss_of : o;
}
static const double *dsa(const model *m, int64_t at, int64_t n) {
  return dsa_both(m, at, n, false);
}
static const double *dsa_loss(const model *m, int64_t at, int64_t n) {
  return dsa_both(m, at, n, true);
}

/* DeepSeek V4's compressor: entry j from the last two stretches of STRIDE tokens before its end. An
 * earlier stretch gives columns [0, W) of x, the last one columns [W, 2W). */
enum { STRIDE = 4 };
static double *entries(const model *m, int64_t n, int64_t W, const double *x, const double *z,
                       const double *bias) {
  double *y = ot_doubles(m->t, n / STRIDE * W + 1);
  for (int64_t j = 0; j < n / STRIDE; j++)
    for (int64_t c = 0; c < W; c++) {
      double sum = 0;
      for (int64_t t = (j - 1) * STRIDE; t < (j + 1) * STRIDE; t++) {
        if (t < 0) continue;
        const int64_t column = t < j * STRIDE ? c : W + c;
        const double e = exp(z[t * 2 * W + column] + bias[t % STRIDE * 2 * W + column]);
        sum += e;
        y[j * W + c] += e * x[t * 2 * W + column];
      }
      y[j * W + c] /= sum;
    }
  return y;
}

/* One softmax over a sink, a window of tokens, and chosen entries that are over. */
static const double *csa(const model *m, int64_t at, int64_t n) {
  const int64_t W = m->D, I = m->DI;
  const double *q = rows(m, "q", at, m->H * W), *kv = rows(m, "kv", at, W),
               *iq = rows(m, "index_q", at, m->HI * I), *w = rows(m, "index_w", at, m->HI);
  const double *entry = rms(m,
                            entries(m, n, W, rows(m, "c", at, 2 * W), rows(m, "z", at, 2 * W),
                                    input(m, "bias")),
                            n / STRIDE, W, input(m, "norm"), 1e-6),
               *ik = entries(m, n, I, rows(m, "index_c", at, 2 * I), rows(m, "index_z", at, 2 * I),
                             input(m, "index_bias"));
  double *o = ot_doubles(m->t, n * m->H * W + 1);
  for (int64_t i = 0; i < n; i++) {
    const int64_t over = (i + 1) / STRIDE, first = i > m->window ? i - m->window : 0;
    double score[T] = {0};
    bool forced[T] = {false}, chosen[T];
    for (int64_t j = 0; j < over; j++)
      for (int64_t h = 0; h < m->HI; h++)
        score[j] += w[i * m->HI + h] * fmax(0, dot(iq + (i * m->HI + h) * I, ik + j * I, I));
    choose(m, at + i, 0, score, over, forced, m->top_n, chosen);
    for (int64_t h = 0; h < m->H; h++) {
      const double *query = q + (i * m->H + h) * W;
      double *to = o + (i * m->H + h) * W, sum = exp(input(m, "sinks")[h]);
      for (int64_t pass = 0; pass < 2; pass++)
        for (int64_t j = pass ? first : 0; j < (pass ? i + 1 : over); j++) {
          const double *key = (pass ? kv : entry) + j * W;
          if (!pass && !chosen[j]) continue;
          const double e = exp(dot(query, key, W) / sqrt((double)W));
          sum += e;
          for (int64_t c = 0; c < W; c++) to[c] += e * key[c];
        }
      for (int64_t c = 0; c < W; c++) to[c] /= sum;
    }
  }
  return o;
}

/* Quest: a page is worth the most that a product with a key between its smallest and largest
 * features could be. */
static const double *quest(const model *m, int64_t at, int64_t n) {
  const int64_t K = m->KH * m->D;
  const double *q = rows(m, "q", at, m->H * m->D), *k = rows(m, "k", at, K),
               *v = rows(m, "v", at, K);
  double *o = ot_doubles(m->t, n * m->H * m->D + 1);
  for (int64_t i = 0; i < n; i++)
    for (int64_t kh = 0; kh < m->KH; kh++) {
      const int64_t own = i / m->block, G = m->H / m->KH;
      double score[T] = {0};
      bool forced[T] = {false}, chosen[T];
      for (int64_t b = 0; b < own; b++)
        for (int64_t h = kh * G; h < (kh + 1) * G; h++)
          for (int64_t c = 0; c < m->D; c++) {
            double best = -INFINITY;
            for (int64_t j = b * m->block; j < (b + 1) * m->block; j++)
              best = fmax(best, q[(i * m->H + h) * m->D + c] * k[(j * m->KH + kh) * m->D + c]);
            score[b] += best;
          }
      forced[own] = true;
      choose(m, at + i, kh, score, own + 1, forced, m->top_n, chosen);
      attend_chosen(m, q, k, v, K, i, kh, chosen, m->block, 1 / sqrt((double)m->D), o);
    }
  return o;
}

/* SeerAttention: queries of a block choose for all of them, by their mean gate's product with the
 * gate of a block's largest, smallest and mean key features. */
static const double *seer(const model *m, int64_t at, int64_t n) {
  const int64_t K = m->KH * m->D, Q = m->H * m->D, G = m->KH * m->DI, blocks = n / m->block;
  const double *q0 = rows(m, "q_plain", at, Q), *k0 = rows(m, "k_plain", at, K),
               *v = rows(m, "v", at, K), *gq = project(m, q0, n, Q, G, input(m, "w_q"), NULL);
  double *o = ot_doubles(m->t, n * Q + 1), *q = ot_doubles(m->t, n * Q + 1),
         *k = ot_doubles(m->t, n * K + 1), *pooled = ot_doubles(m->t, blocks * 3 * K + 1),
         frequency[64];
  memcpy(q, q0, (size_t)(n * Q) * sizeof *q);
  memcpy(k, k0, (size_t)(n * K) * sizeof *k);
  for (int64_t c = 0; c < m->D / 2; c++) frequency[c] = pow(500000, -2 * (double)c / (double)m->D);
  turn(q, n, m->H, m->D, m->D / 2, frequency, 1);
  turn(k, n, m->KH, m->D, m->D / 2, frequency, 1);
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t c = 0; c < K; c++) {
      double *to = pooled + b * 3 * K + c / m->D * 3 * m->D + c % m->D;
      to[0] = -INFINITY, to[m->D] = INFINITY;
      for (int64_t j = b * m->block; j < (b + 1) * m->block; j++) {
        to[0] = fmax(to[0], k0[j * K + c]);
        to[m->D] = fmin(to[m->D], k0[j * K + c]);
        to[2 * m->D] += k0[j * K + c] / (double)m->block;
      }
    }
  const double *gk = project(m, pooled, blocks, 3 * K, G, input(m, "w_k"), NULL);
  for (int64_t i = 0; i < n; i++)
    for (int64_t kh = 0; kh < m->KH; kh++) {
      const int64_t own = i / m->block, end = n < (own + 1) * m->block ? n : (own + 1) * m->block;
      double score[T] = {0};
      bool forced[T] = {false}, chosen[T];
      for (int64_t b = 0; b < own; b++)
        for (int64_t r = own * m->block; r < end; r++)
          score[b] += dot(gq + r * G + kh * m->DI, gk + b * G + kh * m->DI, m->DI);
      forced[own] = true;
      choose(m, at + i, kh, score, own + 1, forced, m->top_n, chosen);
      attend_chosen(m, q, k, v, K, i, kh, chosen, m->block, 1 / sqrt((double)m->D), o);
    }
  return o;
}

/* InfLLM-v2: keys pooled over a window of tokens; a block is worth the largest probability,
 * summed over a group's heads, of the pooled keys that reach into it. */
static const double *infllm(const model *m, int64_t at, int64_t n) {
  enum { KERNEL = 8, STRIDE = 4 }; /* 32 and 16 in the paper */
  const int64_t K = m->KH * m->D, G = m->H / m->KH,
                pools = n < KERNEL ? 0 : (n - KERNEL) / STRIDE + 1;
  const double *q = rows(m, "q", at, m->H * m->D), *k = rows(m, "k", at, K),
               *v = rows(m, "v", at, K);
  double *o = ot_doubles(m->t, n * m->H * m->D + 1), *pooled = ot_doubles(m->t, pools * K + 1);
  for (int64_t j = 0; j < pools; j++)
    for (int64_t c = 0; c < KERNEL * K; c++)
      pooled[j * K + c % K] += k[j * STRIDE * K + c] / KERNEL;
  for (int64_t i = 0; i < n; i++)
    for (int64_t kh = 0; kh < m->KH; kh++) {
      const int64_t own = i / m->block, seen = i + 1 < KERNEL ? 0 : (i + 1 - KERNEL) / STRIDE + 1;
      double score[T] = {0}, p[T] = {0};
      bool forced[T] = {false}, chosen[T];
      for (int64_t h = kh * G; h < (kh + 1) * G; h++) {
        double e[T], sum = 0;
        for (int64_t j = 0; j < seen; j++)
          sum += e[j] = exp(dot(q + (i * m->H + h) * m->D, pooled + j * K + kh * m->D, m->D) /
                            sqrt((double)m->D));
        for (int64_t j = 0; j < seen; j++) p[j] += e[j] / sum;
      }
      for (int64_t j = 0; j < seen; j++)
        for (int64_t b = j * STRIDE / m->block; b <= (j * STRIDE + KERNEL - 1) / m->block; b++)
          score[b] = fmax(score[b], p[j]);
      forced[0] = forced[own] = true;
      choose(m, at + i, kh, score, own + 1, forced, m->top_n, chosen);
      attend_chosen(m, q, k, v, K, i, kh, chosen, m->block, 1 / sqrt((double)m->D), o);
    }
  return o;
}

/* ---- a spec against its model ---- */

/* Numbers a token of an output. */
static int64_t width(const model *m, int which) {
  for (int i = 0; i < m->b->n; i++)
    if (m->b->info[i].role == RG_OUTPUT && strcmp(m->b->info[i].name, m->out[which]) == 0)
      return m->b->info[i].bytes / 4 / T;
  cr_assert(false, "no output %s", m->out[which]);
  return 0;
}

/* [T, width]; dead rows are 0. */
static double *outputs(const model *m, int which) {
  const int64_t w = width(m, which);
  double *y = ot_doubles(m->t, T * w);
  for (int64_t b = 0, at = 0; b < B; at += lengths[b++])
    if (lengths[b])
      memcpy(y + at * w, m->f[which](m, at, lengths[b]), (size_t)(lengths[b] * w) * sizeof *y);
  return y;
}

static double loss(const model *m) {
  double sum = 0;
  for (int k = 0; k < OUTPUTS && m->f[k]; k++) {
    const float *dy = buffer(m->b, RG_GRAD_IN, m->out[k]);
    const double *y = outputs(m, k);
    for (int64_t i = 0; i < LIVE * width(m, k); i++) sum += y[i] * dy[i];
  }
  return sum;
}

static bool has_gradient(const model *m, const char *name) {
  for (int i = 0; i < m->b->n; i++)
    if (m->b->info[i].role == RG_GRAD_OUT && strcmp(m->b->info[i].name, name) == 0) return true;
  return false;
}

/* Along a random direction of input i, of length 1 an element at most. */
static void check_slope(model *m, int i) {
  const rg_tensor_info *info = &m->b->info[i];
  const float *grad = buffer(m->b, RG_GRAD_OUT, info->name);
  const int64_t n = info->bytes / 4;
  const double step = 1e-5;
  double *way = ot_doubles(m->t, n + 1), slope = 0, size = 0, difference = 0;
  for (int64_t k = 0; k < n; k++) {
    way[k] = 2 * ot_uniform(m->t) - 1;
    slope += way[k] * grad[k];
    size += pow(way[k] * grad[k], 2);
  }
  for (int side = 1; side >= -1; side -= 2) {
    for (int64_t k = 0; k < n; k++) m->value[i][k] += side * step * way[k];
    difference += side * loss(m) / (2 * step);
    for (int64_t k = 0; k < n; k++) m->value[i][k] -= side * step * way[k];
  }
  cr_assert_float_eq(slope, difference, 1e-4 * sqrt(size) + 1e-6, "%s: %g along it, should be %g",
                     info->name, slope, difference);
}

static void check(const char *file, model m, const rg_binding *set, size_t nset) {
  rg_context *ctx = NULL;
  rg_spec *spec = NULL;
  rg_session *s = NULL;
  rg_error e = {0};
  char path[512];
  buffers b;
  m.t = ot_begin(1);
  m.b = &b;
  if (!m.out[0]) m.out[0] = "y";
  snprintf(path, sizeof path, "%s/examples/variants/%s.json", RG_SOURCE_DIR, file);
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  CR_OK(rg_spec_load_file(ctx, path, set, nset, &spec, &e), &e);
  rg_plan *plan = make_plan(spec, NULL, T, B, 2);
  make_buffers(plan, 5, T, lengths, &b);
  m.target = ot_doubles(m.t, T * (m.KH ? m.KH : 1) * T);
  m.chosen = ot_alloc(m.t, (size_t)(T * (m.KH ? m.KH : 1) * T) * sizeof *m.chosen);
  for (int i = 0; i < b.n; i++) {
    if (b.info[i].role != RG_INPUT || b.info[i].dtype != RG_F32) continue;
    const int64_t n = b.info[i].bytes / 4;
    float *x = b.data[i];
    m.value[i] = ot_doubles(m.t, n);
    for (int64_t k = 0; k < n; k++) {
      if (b.info[i].rank == 2 && b.info[i].dim[0] != T) x[k] /= sqrtf((float)b.info[i].dim[1]);
      m.value[i][k] = x[k];
    }
  }
  CR_OK(rg_session_create(plan, NULL, &s, &e), &e);
  bind_all(s, &b);
  run_both(s);
  fetch_all(s, &b);
  for (int k = 0; k < OUTPUTS && m.f[k]; k++) {
    const double *want = outputs(&m, k);
    const float *y = buffer(&b, RG_OUTPUT, m.out[k]);
    double off = 0, size = 0;
    for (int64_t i = 0; i < T * width(&m, k); i++) {
      off += pow(y[i] - want[i], 2);
      size += pow(want[i], 2);
    }
    cr_assert_leq(sqrt(off / size), 2e-6, "%s: %s is off by %g", file, m.out[k], sqrt(off / size));
  }
  m.frozen = true;
  for (int i = 0; i < b.n; i++)
    if (m.value[i] && has_gradient(&m, b.info[i].name)) check_slope(&m, i);
  rg_session_destroy(s);
  free_buffers(&b);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
  ot_end(m.t);
}

#define SIZES                                                          \
  {"M", 24, NULL}, {"H", 4, NULL}, {"KH", 2, NULL}, {"D", 32, NULL}, { \
    "dtype", 0, "f32"                                                  \
  }
#define CHECK(file, set, ...) check(file, (model){__VA_ARGS__}, set, sizeof set / sizeof *set)

Test(variants, gpt_oss) {
  const rg_binding set[] = {SIZES, {"pairs", 2, NULL}, {"window", 9, NULL}};
  CHECK("gpt_oss", set, .f = {gpt_oss}, .M = 24, .H = 4, .KH = 2, .D = 32, .window = 9);
}

Test(variants, gated_attention) {
  const rg_binding set[] = {SIZES, {"turned", 8, NULL}};
  CHECK("gated_attention", set, .f = {gated_attention}, .M = 24, .H = 4, .KH = 2, .D = 32);
}

#define HEADS                                         \
  {"H", 4, NULL}, {"KH", 2, NULL}, {"D", 16, NULL}, { \
    "dtype", 0, "f32"                                 \
  }

Test(variants, msa) {
  const rg_binding set[] = {HEADS, {"DI", 8, NULL}, {"block", 8, NULL}, {"top_n", 3, NULL}};
  CHECK("msa", set, .out = {"o", "loss"}, .f = {msa, msa_loss}, .H = 4, .KH = 2, .D = 16, .E = 16,
        .DI = 8, .block = 8, .top_n = 3);
}

Test(variants, qsa) {
  const rg_binding set[] = {HEADS, {"HI", 3, NULL}, {"DI", 8, NULL}, {"top_n", 5, NULL}};
  CHECK("qsa", set, .out = {"o"}, .f = {qsa}, .H = 4, .KH = 2, .D = 16, .E = 16, .HI = 3, .DI = 8,
        .block = 4, .top_n = 5);
}

Test(variants, dsa) {
  const rg_binding set[] = {{"M", 24, NULL},  {"C", 20, NULL},     {"H", 4, NULL},
                            {"R", 32, NULL},  {"P", 8, NULL},      {"HI", 3, NULL},
                            {"DI", 16, NULL}, {"top_n", 12, NULL}, {"dtype", 0, "f32"}};
  CHECK("dsa", set, .out = {"o", "loss"}, .f = {dsa, dsa_loss}, .M = 24, .H = 4, .KH = 1, .D = 40,
        .E = 32, .HI = 3, .DI = 16, .top_n = 12);
}

Test(variants, infllm) {
  const rg_binding set[] = {HEADS,
                            {"kernel", 8, NULL},
                            {"stride", 4, NULL},
                            {"block", 8, NULL},
                            {"top_n", 4, NULL},
                            {"local", 1, NULL}};
  CHECK("infllm", set, .out = {"o"}, .f = {infllm}, .H = 4, .KH = 2, .D = 16, .E = 16, .block = 8,
        .top_n = 4);
}

Test(variants, csa) {
  const rg_binding set[] = {{"H", 4, NULL},     {"D", 16, NULL},    {"HI", 3, NULL},
                            {"DI", 8, NULL},    {"top_n", 3, NULL}, {"window", 6, NULL},
                            {"dtype", 0, "f32"}};
  CHECK("csa", set, .out = {"o"}, .f = {csa}, .H = 4, .KH = 1, .D = 16, .HI = 3, .DI = 8,
        .window = 6, .top_n = 3);
}

Test(variants, quest) {
  const rg_binding set[] = {HEADS, {"page", 4, NULL}, {"top_n", 4, NULL}};
  CHECK("quest", set, .out = {"o"}, .f = {quest}, .H = 4, .KH = 2, .D = 16, .E = 16, .block = 4,
        .top_n = 4);
}

Test(variants, seer) {
  const rg_binding set[] = {HEADS, {"DG", 8, NULL}, {"block", 8, NULL}, {"top_n", 3, NULL}};
  CHECK("seer", set, .out = {"o"}, .f = {seer}, .H = 4, .KH = 2, .D = 16, .E = 16, .DI = 8,
        .block = 8, .top_n = 3);
}
