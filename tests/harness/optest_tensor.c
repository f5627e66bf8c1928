/* tests/harness/optest_tensor.c: memory, random numbers, tensors with guards and holes,
 * comparison. */
#include "optest_internal.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- memory ---- */

struct ot_chunk {
  struct ot_chunk *next;
  _Alignas(64) char data[];
};

ot *ot_begin(uint64_t seed) {
  ot *t = calloc(1, sizeof *t);
  if (!t) abort();
  t->state = seed * 0x9e3779b97f4a7c15u + 1;
  return t;
}

void ot_end(ot *t) {
  while (t->chunks) {
    struct ot_chunk *next = t->chunks->next;
    free(t->chunks);
    t->chunks = next;
  }
  for (int i = 0; i < t->nmap; i++) munmap(t->map[i].at, t->map[i].bytes);
  free(t);
}

void *ot_alloc(ot *t, size_t bytes) {
  size_t size = (sizeof(struct ot_chunk) + bytes + 63) & ~(size_t)63;
  struct ot_chunk *c = aligned_alloc(64, size);
  if (!c) abort();
  c->next = t->chunks;
  t->chunks = c;
  memset(c->data, 0, bytes);
  return c->data;
}

double *ot_doubles(ot *t, int64_t n) {
  return ot_alloc(t, (size_t)n * sizeof(double));
}
int32_t *ot_ints(ot *t, int64_t n) {
  return ot_alloc(t, (size_t)n * sizeof(int32_t));
}

const char *ot_text(ot *t, const char *format, ...) {
  enum { SIZE = 512 };
  char *text = ot_alloc(t, SIZE);
  va_list list;
  va_start(list, format);
  vsnprintf(text, SIZE, format, list);
  va_end(list);
  return text;
}

int ot_isa(void) {
#if defined(__x86_64__) && defined(__GNUC__)
  unsigned a, b, c, d;
  bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c) return 1;
#endif
  return 0;
}

/* ---- random numbers ---- */

uint64_t ot_random(ot *t) {
  uint64_t z = t->state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

double ot_uniform(ot *t) {
  return (double)(ot_random(t) >> 11) * 0x1p-53;
}
double ot_aside(const ot *t, uint64_t which) {
  ot other = {.state = t->state ^ (which + 1) * 0xd1342543de82ef95u};
  return ot_uniform(&other);
}
int64_t ot_below(ot *t, int64_t n) {
  return (int64_t)(ot_random(t) % (uint64_t)n);
}

double ot_normal(ot *t) {
  double radius = sqrt(-2 * log(1 - ot_uniform(t)));
  return radius * cos(6.283185307179586 * ot_uniform(t));
}

/* ---- elements: our own conversions, through exact doubles ---- */

/* 2^e of a normal double. (frexp and ldexp would take longer than all else that fills a tensor.) */
static double power(int e) {
  uint64_t u = (uint64_t)(e + 1023) << 52;
  double x;
  memcpy(&x, &u, 8);
  return x;
}

/* e with |x| in [2^e, 2^(e+1)); −1023 where x is less than any normal double. */
static int exponent(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  return (int)(u >> 52 & 2047) - 1023;
}

/* x rounded to a float of `bits` significant bits whose smallest normal exponent is `emin`. */
static double round_bits(double x, int bits, int emin, double most) {
  if (!isfinite(x) || x == 0) return x;
  int e = exponent(x);
  if (e < emin) e = emin;
  const double shift = 0x1.8p52, scaled = x * power(bits - 1 - e); /* exact */
  double r = copysign((scaled + shift - shift) * power(e + 1 - bits), x);
  return fabs(r) > most ? copysign(INFINITY, x) : r;
}

double ot_round(rg_dtype dtype, double x) {
  switch (dtype) {
  case RG_F16: return round_bits(x, 11, -14, 65504);
  case RG_BF16: return round_bits(x, 8, -126, 3.3895313892515355e38);
  case RG_F32: return (double)(float)x;
  default: return nearbyint(x);
  }
}

static void put(void *at, rg_dtype dtype, double x) {
  double r = ot_round(dtype, x);
  float f = (float)r;
  int32_t i;
  uint32_t u;
  uint16_t h;
  memcpy(&u, &f, 4);
  switch (dtype) {
  case RG_F32: memcpy(at, &f, 4); return;
  case RG_BF16:
    h = isnan(x) ? 0x7fc0 : (uint16_t)(u >> 16);
    memcpy(at, &h, 2);
    return;
  case RG_F16: {
    const int e = exponent(r);
    if (isnan(x))
      h = 0x7e00;
    else if (isinf(r))
      h = 0x7c00;
    else if (fabs(r) < 0x1p-14)
      h = (uint16_t)(fabs(r) * 0x1p24);
    else
      h = (uint16_t)(((e + 15) << 10) + (int)((fabs(r) * power(-e) - 1) * 1024));
    h |= (uint16_t)((u >> 31) << 15);
    memcpy(at, &h, 2);
    return;
  }
  default: i = (int32_t)r; memcpy(at, &i, 4);
  }
}

static double get(const void *at, rg_dtype dtype) {
  uint16_t h;
  uint32_t u;
  float f;
  int32_t i;
  switch (dtype) {
  case RG_F32: memcpy(&f, at, 4); return f;
  case RG_BF16:
    memcpy(&h, at, 2);
    u = (uint32_t)h << 16;
    memcpy(&f, &u, 4);
    return f;
  case RG_F16: {
    memcpy(&h, at, 2);
    int e = (h >> 10) & 31, m = h & 1023;
    double x = e == 31 ? (m ? NAN : INFINITY) : e ? (1024 + m) * power(e - 25) : m * 0x1p-24;
    return h >> 15 ? -x : x;
  }
  default: memcpy(&i, at, 4); return i;
  }
}

/* ---- tensors ---- */

enum { GUARD = 512, PATTERN = 0xa5 };

ot_tensor *ot_new(ot *t, rg_dtype dtype, int rank, const int64_t *dim, const int64_t *pad) {
  ot_tensor *a = ot_alloc(t, sizeof *a);
  int64_t extent = 1;
  a->arg.dtype = dtype;
  a->arg.rank = rank;
  a->n = 1;
  for (int k = rank - 1; k >= 0; k--) {
    a->arg.dim[k] = dim[k];
    a->arg.stride[k] = extent + (pad && k < rank - 1 ? pad[k] : 0);
    extent = a->arg.stride[k] * (dim[k] > 0 ? dim[k] : 1);
    a->n *= dim[k];
  }
  size_t body = a->n ? (size_t)extent * rg_dtype_size(dtype) : 0;
  a->bytes = body + 2 * GUARD;
  a->block = ot_alloc(t, a->bytes);
  memset(a->block, PATTERN, a->bytes);
  a->arg.data = a->block + GUARD;
  ot_fill(a, 0);
  return a;
}

ot_tensor *ot_like(ot *t, const ot_tensor *a, const int64_t *pad) {
  return ot_new(t, a->arg.dtype, a->arg.rank, a->arg.dim, pad);
}
ot_tensor *ot_like_as(ot *t, const ot_tensor *a, rg_dtype dtype) {
  return ot_new(t, dtype, a->arg.rank, a->arg.dim, NULL);
}

ot_tensor *ot_wrap(ot *t, void *data, rg_dtype dtype, int rank, const int64_t *dim,
                   const int64_t *stride) {
  ot_tensor *a = ot_alloc(t, sizeof *a);
  a->arg.data = data;
  a->arg.dtype = dtype;
  a->arg.rank = rank;
  a->n = 1;
  for (int k = 0; k < rank; k++) {
    a->arg.dim[k] = dim[k];
    a->arg.stride[k] = stride[k];
    a->n *= dim[k];
  }
  return a;
}

ot_tensor *ot_far(ot *t, const ot_tensor *a) {
  /* aligned */
  int64_t rows = a->arg.dim[0], step = (((int64_t)1 << 31) / (rows - 1) + 4096) & ~(int64_t)63;
  size_t bytes = (size_t)(step * rows) * rg_dtype_size(a->arg.dtype);
  if (t->nmap == MAX_MAPS) return NULL;
  void *at =
      mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return NULL;
  t->map[t->nmap].at = at;
  t->map[t->nmap++].bytes = bytes;
  ot_tensor *far = ot_wrap(t, at, a->arg.dtype, a->arg.rank, a->arg.dim, a->arg.stride);
  far->arg.stride[0] = step;
  ot_copy(far, a);
  return far;
}

/* Address of the i-th element in row-major order. */
void *ot_at(const ot_tensor *a, int64_t i) {
  int64_t offset = 0;
  for (int k = a->arg.rank - 1; k >= 0; k--) {
    offset += i % a->arg.dim[k] * a->arg.stride[k];
    i /= a->arg.dim[k];
  }
  return (char *)a->arg.data + offset * (int64_t)rg_dtype_size(a->arg.dtype);
}

int64_t ot_side_by_side(const ot_tensor *a) {
  int64_t n = 1;
  for (int k = a->arg.rank - 1; k >= 0 && a->arg.stride[k] == n && a->arg.dim[k] > 0; k--)
    n *= a->arg.dim[k];
  return n;
}

static int64_t row_size(const ot_tensor *a) {
  int64_t n = 1;
  for (int k = 1; k < a->arg.rank; k++) n *= a->arg.dim[k];
  return n;
}

/* Elements [from, to) of a, run by run: at points to n elements, of which the first is the i-th. */
#define EACH_RUN(a, from, to, i, at, n)                                                 \
  for (int64_t i = (from), side_ = ot_side_by_side(a), n = side_ - i % side_; i < (to); \
       i += n, n = side_)                                                               \
    for (char *at = ot_at((a), i); at && (n = n < (to)-i ? n : (to)-i, true); at = NULL)

void ot_set(ot_tensor *a, const double *x) {
  size_t size = rg_dtype_size(a->arg.dtype);
  EACH_RUN(a, 0, a->n, i, at, n)
  for (int64_t k = 0; k < n; k++) put(at + (size_t)k * size, a->arg.dtype, x[i + k]);
}
double *ot_get(ot *t, const ot_tensor *a) {
  double *x = ot_doubles(t, a->n);
  size_t size = rg_dtype_size(a->arg.dtype);
  EACH_RUN(a, 0, a->n, i, at, n)
  for (int64_t k = 0; k < n; k++) x[i + k] = get(at + (size_t)k * size, a->arg.dtype);
  return x;
}
void ot_set_ints(ot_tensor *a, const int32_t *x) {
  EACH_RUN(a, 0, a->n, i, at, n) memcpy(at, x + i, (size_t)n * 4);
}
int32_t *ot_get_ints(ot *t, const ot_tensor *a) {
  int32_t *x = ot_ints(t, a->n);
  EACH_RUN(a, 0, a->n, i, at, n) memcpy(x + i, at, (size_t)n * 4);
  return x;
}
double ot_element(const ot_tensor *a, int64_t i) {
  return get(ot_at(a, i), a->arg.dtype);
}

void ot_copy(ot_tensor *to, const ot_tensor *from) {
  bool same = to->arg.dtype == from->arg.dtype;
  int64_t run = same ? ot_side_by_side(from) : 1, most = ot_side_by_side(to);
  if (run > most) run = most;
  if (run > to->n) run = to->n;
  for (int64_t i = 0; i < to->n; i += run) {
    if (same)
      memcpy(ot_at(to, i), ot_at(from, i), (size_t)run * rg_dtype_size(to->arg.dtype));
    else
      put(ot_at(to, i), to->arg.dtype, ot_element(from, i));
  }
}

static void fill_range(ot_tensor *a, int64_t from, int64_t to, double value) {
  size_t size = rg_dtype_size(a->arg.dtype);
  EACH_RUN(a, from, to, i, at, n)
  for (int64_t k = 0; k < n; k++) put(at + (size_t)k * size, a->arg.dtype, value);
}

void ot_fill_normal(ot *t, ot_tensor *a, double deviation) {
  size_t size = rg_dtype_size(a->arg.dtype);
  EACH_RUN(a, 0, a->n, i, at, n)
  for (int64_t k = 0; k < n; k++)
    put(at + (size_t)k * size, a->arg.dtype, deviation * ot_normal(t));
}
void ot_fill_outliers(ot *t, ot_tensor *a) {
  size_t size = rg_dtype_size(a->arg.dtype);
  EACH_RUN(a, 0, a->n, i, at, n)
  for (int64_t k = 0; k < n; k++) {
    double x = ot_normal(t), big = 10 * ot_normal(t); /* variance 100 */
    put(at + (size_t)k * size, a->arg.dtype, ot_uniform(t) < 0.001 ? x + big : x);
  }
}
void ot_fill(ot_tensor *a, double value) {
  fill_range(a, 0, a->n, value);
}
void ot_fill_rows(ot_tensor *a, int64_t from, int64_t to, double value) {
  fill_range(a, from * row_size(a), to * row_size(a), value);
}
void ot_poison_rows(ot_tensor *a, int64_t from, int64_t to) {
  ot_fill_rows(a, from, to, a->arg.dtype == RG_I32 ? 1e9 : NAN);
}

/* ---- comparison ---- */

double ot_relrms(const ot_tensor *x, const double *ref, double floor) {
  double err = 0, norm = 0;
  const size_t size = rg_dtype_size(x->arg.dtype);
  EACH_RUN(x, 0, x->n, i, at, n)
  for (int64_t k = 0; k < n; k++) {
    const double v = get(at + (size_t)k * size, x->arg.dtype), r = ref[i + k];
    if (isnan(r) ? isnan(v) : v == r) {
      norm += isfinite(r) ? r * r : 0;
      continue;
    }
    if (!isfinite(v) || !isfinite(r)) return INFINITY;
    err += (v - r) * (v - r);
    norm += r * r;
  }
  if (err == 0) return 0;
  return sqrt(err) / fmax(sqrt(norm), floor * sqrt((double)x->n));
}

double ot_lse_error(const ot_tensor *x, const double *ref) {
  double worst = 0;
  for (int64_t i = 0; i < x->n; i++) {
    double v = ot_element(x, i);
    if (v == ref[i]) continue;
    if (!isfinite(v) || !isfinite(ref[i])) return INFINITY;
    worst = fmax(worst, fabs(v - ref[i]) / fmax(1, fabs(ref[i])));
  }
  return worst;
}

bool ot_same_rows(const ot_tensor *a, int64_t row_a, const ot_tensor *b, int64_t row_b, int64_t n) {
  int64_t w = row_size(a), run = ot_side_by_side(a), other = ot_side_by_side(b);
  if (a->arg.dtype != b->arg.dtype || w != row_size(b)) return false;
  if (run > other) run = other;
  if (run > w) run = w;
  for (int64_t i = 0; i < n * w; i += run)
    if (memcmp(ot_at(a, row_a * w + i), ot_at(b, row_b * w + i),
               (size_t)run * rg_dtype_size(a->arg.dtype)) != 0)
      return false;
  return true;
}

bool ot_same_bits(const ot_tensor *a, const ot_tensor *b) {
  if (a->arg.rank == 0) return memcmp(a->arg.data, b->arg.data, rg_dtype_size(a->arg.dtype)) == 0;
  return a->arg.dim[0] == b->arg.dim[0] && ot_same_rows(a, 0, b, 0, a->arg.dim[0]);
}

bool ot_zero_rows(const ot_tensor *a, int64_t from, int64_t to) {
  static const char zero[4] = {0};
  int64_t w = row_size(a);
  for (int64_t i = from * w; i < to * w; i++)
    if (memcmp(ot_at(a, i), zero, rg_dtype_size(a->arg.dtype)) != 0) return false;
  return true;
}

/* ---- top-k ---- */

static bool contains(const int32_t *row, int64_t n, int32_t x) {
  for (int64_t i = 0; i < n; i++)
    if (row[i] == x) return true;
  return false;
}

const char *ot_check_topk(ot *t, const ot_tensor *idx, int64_t rows, const int32_t *ref,
                          const double *scores, int64_t nblock, double max_logit, double floor,
                          double overlap) {
  int64_t heads = idx->arg.dim[1], top = idx->arg.dim[2], same = 0, total = 0;
  const int32_t *got = ot_get_ints(t, idx);
  double tolerance = 1e-5 * fmax(1, max_logit);
  for (int64_t r = 0; r < rows * heads; r++) {
    const int32_t *x = got + r * top, *y = ref + r * top;
    const double *s = scores + r * nblock;
    double last = INFINITY,
           best = -INFINITY; /* lowest score taken, highest score left out, among finite ones */
    for (int64_t n = 0; n < top; n++) {
      if ((x[n] < 0) != (y[n] < 0))
        return ot_text(t, "row %lld has the wrong number of indices", (long long)r);
      if (y[n] < 0) {
        if (x[n] != -1) return ot_text(t, "row %lld: index %d", (long long)r, x[n]);
        continue;
      }
      if (x[n] >= nblock || isnan(s[x[n]]))
        return ot_text(t, "row %lld: %d is no candidate", (long long)r, x[n]);
      if (n > 0 && x[n] <= x[n - 1]) return ot_text(t, "row %lld does not ascend", (long long)r);
      total++;
      same += contains(y, top, x[n]);
      last = fmin(last, s[x[n]]);
    }
    for (int64_t b = 0; b < nblock; b++)
      if (!isnan(s[b]) && !contains(x, top, (int32_t)b)) best = fmax(best, s[b]);
    double gap = best - last, size = fmax(fabs(best), fabs(last));
    if (best == INFINITY) return ot_text(t, "row %lld lacks a forced block", (long long)r);
    if (last == -INFINITY && best > last)
      return ot_text(t, "row %lld takes an incomplete block before a complete one", (long long)r);
    if (gap > 0 && size > floor && gap > tolerance * size)
      return ot_text(t, "row %lld: score %.9g taken, %.9g left out", (long long)r, last, best);
  }
  if ((double)same < overlap * (double)total)
    return ot_text(t, "only %lld of %lld indices agree", (long long)same, (long long)total);
  return NULL;
}
