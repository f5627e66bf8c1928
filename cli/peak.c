/* cli/peak.c: peak rates. Each thread repeats a small kernel in slices of ten milliseconds; its
   best slice counts, so that neighbours on the machine disturb little, and the threads' bests add
   up.

   The kernels exist once per CPU level, written for its vectors, and the highest usable level runs:
   what the CPU ops could reach at best, too.
 */
#include "peak.h"
#include "cli.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PEAK_SLICE   0.01 /* seconds */
#define PEAK_SLICES  20
#define PEAK_THREADS 256
#define PEAK_COPY \
  ((size_t)32 << 20) /* bytes a thread copies to and fro: past any cache of one core */
#define PEAK_ROUNDS 4096

/* Twelve chains hide the latency of a multiply-add and still fit in the registers. */
#define EACH(f)    f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define DECLARE(i) vec a##i = x * (float)(i + 1);
#define STEP(i)    a##i = FMA(a##i, x, y);
#define GATHER(i)  y += a##i;

/* Returns the flops it did. `vec` and FMA are the caller's. */
#define MATRIX_BODY(lanes)                \
  vec x = {0}, y = {0};                   \
  x += *seed;                             \
  y += 1e-9f;                             \
  EACH(DECLARE)                           \
  for (int n = 0; n < PEAK_ROUNDS; n++) { \
    EACH(STEP)                            \
  }                                       \
  EACH(GATHER)                            \
  *seed = y[0] > 1 ? 1 : 0.5f;            \
  return 12.0 * (lanes)*2 * PEAK_ROUNDS;

/* exp(x) as 2^n · 2^f with a polynomial, the way the CPU ops do it; four chains. Returns its
 * exponentials. */
#define EXP(i)                                                                         \
  {                                                                                    \
    vec t = x##i * 1.44269504f, r = (t + 12582912.f) - 12582912.f, f = t - r, c = {0}; \
    vec p = FMA(f, c + 1.3333558e-3f, c + 9.618129e-3f);                               \
    p = FMA(p, f, c + 5.550411e-2f);                                                   \
    p = FMA(p, f, c + 0.2402265f);                                                     \
    p = FMA(p, f, c + 0.6931472f);                                                     \
    p = FMA(p, f, c + 1.f);                                                            \
    sum##i += (vec)((ints)p + (__builtin_convertvector(r, ints) << 23));               \
    x##i -= 1e-4f;                                                                     \
  }
#define SPECIAL_BODY(lanes)                                     \
  vec x0 = {0}, sum0 = {0}, sum1 = {0}, sum2 = {0}, sum3 = {0}; \
  x0 += *seed;                                                  \
  vec x1 = x0 + 1, x2 = x0 + 2, x3 = x0 + 3;                    \
  for (int n = 0; n < PEAK_ROUNDS; n++) {                       \
    EXP(0) EXP(1) EXP(2) EXP(3)                                 \
  }                                                             \
  sum0 += sum1 + sum2 + sum3;                                   \
  *seed = sum0[0] > 1e30f ? 1 : 0.5f;                           \
  return 4.0 * (lanes)*PEAK_ROUNDS;

typedef float vec4 __attribute__((vector_size(16)));
typedef int32_t ints4 __attribute__((vector_size(16)));
#define vec          vec4
#define ints         ints4
#define FMA(a, b, c) ((a) * (b) + (c))
static double matrix_base(float *seed) {
  MATRIX_BODY(4)
}
static double special_base(float *seed) {
  SPECIAL_BODY(4)
}
#undef vec
#undef ints
#undef FMA

#if defined(__x86_64__)
typedef float vec8 __attribute__((vector_size(32)));
typedef int32_t ints8 __attribute__((vector_size(32)));
#define AVX2         __attribute__((target("avx2,fma")))
#define vec          vec8
#define ints         ints8
#define FMA(a, b, c) ((vec8)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
AVX2 static double matrix_avx2(float *seed){MATRIX_BODY(8)} AVX2
    static double special_avx2(float *seed) {
  SPECIAL_BODY(8)
}
#undef vec
#undef ints
#undef FMA

typedef float vec16 __attribute__((vector_size(64)));
typedef int32_t ints16 __attribute__((vector_size(64)));
#define AVX512       __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define vec          vec16
#define ints         ints16
#define FMA(a, b, c) ((vec16)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
AVX512 static double matrix_avx512(float *seed){MATRIX_BODY(16)} AVX512
    static double special_avx512(float *seed) {
  SPECIAL_BODY(16)
}
#undef vec
#undef ints
#undef FMA
#endif

typedef double (*kernel)(float *seed);

typedef struct worker {
  kernel fn;    /* NULL: copy */
  char *memory; /* 2 × PEAK_COPY bytes */
  double rate;  /* operations or bytes a second, of the best slice */
} worker;

static void *work(void *arg) {
  worker *w = arg;
  float seed = 0.5f;
  char *from = w->memory, *to = w->memory ? w->memory + PEAK_COPY : NULL;
  for (int slice = 0; slice < PEAK_SLICES; slice++) {
    double done = 0, start = cli_seconds(), took;
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
      took = cli_seconds() - start;
    } while (took < PEAK_SLICE);
    if (done / took > w->rate) w->rate = done / took;
  }
  return NULL;
}

/* Rates of all threads together; copies if fn is NULL. */
static double measure(int threads, kernel fn, char *memory) {
  pthread_t thread[PEAK_THREADS];
  worker w[PEAK_THREADS] = {{0}};
  bool started[PEAK_THREADS] = {false};
  for (int t = 0; t < threads; t++) {
    w[t] = (worker){fn, memory ? memory + (size_t)t * 2 * PEAK_COPY : NULL, 0};
    if (t > 0) started[t] = cli_thread_start(&thread[t], work, &w[t]) == 0;
  }
  work(&w[0]);
  double sum = w[0].rate;
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
