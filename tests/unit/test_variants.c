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

/* ---- the models: y [n, M] of one sequence x [n, M] ---- */

typedef struct model {
  ot *t;
  buffers *b;
  double *value[MOST_TENSORS]; /* of inputs, as doubles; moved by what asks for slopes */
  int64_t M, H, KH, D, window; /* sizes of all specs in this file */
} model;

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

static const double *gpt_oss(const model *m, const double *x, int64_t n) {
  for (int pair = 0; pair < 2; pair++) {
    x = gpt_oss_layer(m, x, n, pair, "", m->window);
    x = gpt_oss_layer(m, x, n, pair, "full_", -1);
  }
  return x;
}

static const double *gated_attention(const model *m, const double *x, int64_t n) {
  const int64_t Q = m->H * m->D, K = m->KH * m->D, pairs = m->D / 8;
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

/* ---- a spec against its model ---- */

typedef const double *(*model_fn)(const model *m, const double *x, int64_t n);

/* y [T, M]; dead rows are 0. */
static double *outputs(const model *m, model_fn f) {
  double *y = ot_doubles(m->t, T * m->M);
  const double *x = input(m, "x");
  for (int64_t b = 0, at = 0; b < B; at += lengths[b++])
    if (lengths[b])
      memcpy(y + at * m->M, f(m, x + at * m->M, lengths[b]),
             (size_t)(lengths[b] * m->M) * sizeof *y);
  return y;
}

static double loss(const model *m, model_fn f) {
  const float *dy = buffer(m->b, RG_GRAD_IN, "y");
  const double *y = outputs(m, f);
  double sum = 0;
  for (int64_t i = 0; i < LIVE * m->M; i++) sum += y[i] * dy[i];
  return sum;
}

/* Along a random direction of input i, of length 1 an element at most. */
static void check_slope(model *m, model_fn f, int i) {
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
    difference += side * loss(m, f) / (2 * step);
    for (int64_t k = 0; k < n; k++) m->value[i][k] -= side * step * way[k];
  }
  cr_assert_float_eq(slope, difference, 1e-4 * sqrt(size) + 1e-6, "%s: %g along it, should be %g",
                     info->name, slope, difference);
}

static void check(const char *file, model m, model_fn f, const rg_binding *set, size_t nset) {
  rg_context *ctx = NULL;
  rg_spec *spec = NULL;
  rg_session *s = NULL;
  rg_error e = {0};
  char path[512];
  buffers b;
  m.t = ot_begin(1);
  m.b = &b;
  snprintf(path, sizeof path, "%s/examples/variants/%s.json", RG_SOURCE_DIR, file);
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  CR_OK(rg_spec_load_file(ctx, path, set, nset, &spec, &e), &e);
  rg_plan *plan = make_plan(spec, NULL, T, B, 2);
  make_buffers(plan, 5, T, lengths, &b);
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
  const double *want = outputs(&m, f);
  const float *y = buffer(&b, RG_OUTPUT, "y");
  double off = 0, size = 0;
  for (int64_t i = 0; i < T * m.M; i++) {
    off += pow(y[i] - want[i], 2);
    size += pow(want[i], 2);
  }
  cr_assert_leq(sqrt(off / size), 2e-6, "%s is off by %g", file, sqrt(off / size));
  for (int i = 0; i < b.n; i++)
    if (m.value[i]) check_slope(&m, f, i);
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

Test(variants, gpt_oss) {
  const rg_binding set[] = {SIZES, {"pairs", 2, NULL}, {"window", 9, NULL}};
  check("gpt_oss", (model){.M = 24, .H = 4, .KH = 2, .D = 32, .window = 9}, gpt_oss, set, 7);
}

Test(variants, gated_attention) {
  const rg_binding set[] = {SIZES, {"turned", 8, NULL}};
  check("gated_attention", (model){.M = 24, .H = 4, .KH = 2, .D = 32}, gated_attention, set, 6);
}
