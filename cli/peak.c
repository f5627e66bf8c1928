/* cli/peak.c: peak rates. Each thread repeats a small kernel for a tenth of a second; rates of all threads add up.
 *
 * The kernels are written once over 64-byte vectors and compiled for several CPU levels, of which the highest usable
 * one runs: what the CPU ops could reach at best, too.
 */
#include "peak.h"
#include "cli.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define PEAK_SECONDS 0.1
#define PEAK_THREADS 256
#define PEAK_COPY    ((size_t)32 << 20) /* bytes a thread copies to and fro: past any cache of one core */

typedef float vec __attribute__((vector_size(64)));
typedef int32_t veci __attribute__((vector_size(64)));

/* Independent chains, as many as registers hold, hide the latency of a multiply-add. Returns its flops. */
#define MATRIX_BODY(chains)                                                                                  \
  vec acc[chains], x = {0}, y = {0};                                                                         \
  x += *seed;                                                                                                \
  y += 1e-9f;                                                                                                \
  for (int i = 0; i < chains; i++) acc[i] = x;                                                               \
  for (int n = 0; n < 4096; n++)                                                                             \
    for (int i = 0; i < chains; i++) acc[i] = acc[i] * x + y;                                                \
  for (int i = 1; i < chains; i++) acc[0] += acc[i];                                                         \
  *seed = acc[0][0] > 1 ? 1 : 0.5f;                                                                          \
  return 4096.0 * chains * 16 * 2;

/* exp(x) as 2^n · 2^f with a polynomial, the way the CPU ops do it. Returns its exponentials. */
#define SPECIAL_BODY                                                                                         \
  vec x = {0}, sum = {0};                                                                                    \
  x += *seed;                                                                                                \
  for (int i = 0; i < 4096; i++) {                                                                           \
    vec t = x * 1.44269504f, r = (t + 12582912.f) - 12582912.f, f = t - r;                                   \
    vec p = ((((f * 1.3333558e-3f + 9.618129e-3f) * f + 5.550411e-2f) * f + 0.2402265f) * f + 0.6931472f) * f + 1; \
    sum += (vec)((veci)p + (__builtin_convertvector(r, veci) << 23));                                        \
    x -= 1e-4f;                                                                                              \
  }                                                                                                          \
  *seed = sum[0] > 1e30f ? 1 : 0.5f;                                                                         \
  return 4096.0 * 16;

static double matrix_base(float *seed) { MATRIX_BODY(3) }
static double special_base(float *seed) { SPECIAL_BODY }
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static double matrix_avx2(float *seed) { MATRIX_BODY(6) }
__attribute__((target("avx2,fma"))) static double special_avx2(float *seed) { SPECIAL_BODY }
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) static double matrix_avx512(float *seed) {
  MATRIX_BODY(12)
}
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) static double special_avx512(float *seed) {
  SPECIAL_BODY
}
#endif

typedef double (*kernel)(float *seed);

typedef struct worker {
  kernel fn; /* NULL: copy */
  char *memory; /* 2 × PEAK_COPY bytes */
  double rate;  /* operations or bytes a second */
} worker;

static void *work(void *arg) {
  worker *w = arg;
  float seed = 0.5f;
  double done = 0, start = 0, now = 0;
  bool fresh = true; /* the first round warms up: pages, clocks */
  char *from = w->memory, *to = w->memory ? w->memory + PEAK_COPY : NULL;
  do {
    if (w->fn) {
      done += w->fn(&seed);
    } else {
      memcpy(to, from, PEAK_COPY);
      char *swap = from;
      from = to;
      to = swap;
      done += 2.0 * (double)PEAK_COPY;
    }
    now = cli_seconds();
    if (fresh) {
      start = now;
      done = 0;
      fresh = false;
    }
  } while (now - start < PEAK_SECONDS);
  w->rate = done / (now - start);
  return NULL;
}

/* Rates of all threads together; copies if fn is NULL. */
static double measure(int threads, kernel fn, char *memory) {
  pthread_t thread[PEAK_THREADS];
  worker w[PEAK_THREADS];
  bool started[PEAK_THREADS] = {false};
  double sum = 0;
  for (int t = 0; t < threads; t++) {
    w[t] = (worker){fn, memory ? memory + (size_t)t * 2 * PEAK_COPY : NULL, 0};
    if (t > 0) started[t] = pthread_create(&thread[t], NULL, work, &w[t]) == 0;
  }
  work(&w[0]);
  sum = w[0].rate;
  for (int t = 1; t < threads; t++) {
    if (!started[t]) continue;
    pthread_join(thread[t], NULL);
    sum += w[t].rate;
  }
  return sum;
}

void peak_measure(int threads, peak_rates *out) {
  if (threads > PEAK_THREADS) threads = PEAK_THREADS;
  kernel matrix = matrix_base, special = special_base;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    matrix = matrix_avx512;
    special = special_avx512;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    matrix = matrix_avx2;
    special = special_avx2;
  }
#endif
  *out = (peak_rates){0};
  out->matrix_gflops = 1e-9 * measure(threads, matrix, NULL);
  out->special_gops = 1e-9 * measure(threads, special, NULL);
  char *memory = malloc((size_t)threads * 2 * PEAK_COPY);
  if (!memory) return;
  memset(memory, 1, (size_t)threads * 2 * PEAK_COPY);
  out->bandwidth_gbs = 1e-9 * measure(threads, NULL, memory);
  free(memory);
}
