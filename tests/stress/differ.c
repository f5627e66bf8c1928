/* tests/stress/differ.c: data, hashes, and what is said about tensors that differ. */
#include "stress.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- data ---- */

/* A sum of four uniforms: near enough to normal. */
static float normal(uint64_t *state) {
  float sum = 0;
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  uint64_t bits = *state ^ *state >> 29;
  bits *= 0xbf58476d1ce4e5b9u;
  bits ^= bits >> 32;
  for (int k = 0; k < 4; k++) sum += (float)(bits >> 16 * k & 0xffff) / 65536.0f - 0.5f;
  return sum * 1.7f;
}

static int64_t elements(const rg_tensor_info *t) {
  return t->bytes / (int64_t)rg_dtype_size(t->dtype);
}

static bool is_weight(const rg_tensor_info *t) {
  return t->name[0] == 'w' || strstr(t->name, "_weight") != NULL;
}
static bool has_rows(const rg_tensor_info *t, const stress_shape *s) {
  return t->rank > 1 && t->dim[0] == s->T && !is_weight(t);
}

/* Rows of a sequence become a slow walk, or one row with a little of its own each. */
static void relate(float *x, const stress_shape *s, int64_t width, stress_pattern pattern) {
  const float keep = pattern == CORRELATED ? 0.995f : 0.97f, own = sqrtf(1 - keep * keep);
  for (int64_t b = 0, row = 0; b < s->B; row += s->length[b++])
    for (int64_t i = 1; i < s->length[b]; i++) {
      const float *from = x + (pattern == CORRELATED ? row + i - 1 : row) * width;
      float *to = x + (row + i) * width;
      for (int64_t k = 0; k < width; k++) to[k] = keep * from[k] + own * to[k];
    }
}

void stress_fill(const rg_tensor_info *t, const stress_shape *s, stress_pattern pattern,
                 uint64_t seed, void *data) {
  const int64_t n = elements(t);
  memset(data, 0, (size_t)t->bytes);
  if (t->seqlens) {
    for (int64_t b = 0; b < s->B; b++)
      ((int32_t *)data)[b + 1] = ((int32_t *)data)[b] + s->length[b];
    return;
  }
  if (t->accumulates)
    for (int64_t k = 0; k < n; k++) ((float *)data)[k] = 1;
  if ((t->role != RG_INPUT && t->role != RG_GRAD_IN) || t->dtype == RG_I32 || n == 0) return;
  uint64_t state = seed * 1000003u + (uint64_t)t->role * 7919u;
  for (const char *c = t->name; *c; c++) state = state * 131u + (unsigned char)*c;
  float *x = malloc((size_t)n * sizeof *x);
  if (!x) abort();
  for (int64_t k = 0; k < n; k++) x[k] = normal(&state);
  if (has_rows(t, s)) {
    const int64_t width = n / s->T;
    int64_t live = 0;
    for (int64_t b = 0; b < s->B; b++) live += s->length[b];
    if (pattern != SCATTERED && t->role == RG_INPUT &&
        (strcmp(t->name, "q") == 0 || strcmp(t->name, "x") == 0))
      relate(x, s, width, pattern);
    for (int64_t k = live * width; k < n; k++) x[k] = NAN;
  } else if (is_weight(t) && t->rank == 2) {
    for (int64_t k = 0; k < n; k++) x[k] /= sqrtf((float)t->dim[1]);
  }
  rg_convert(t->dtype, data, RG_F32, x, (size_t)n);
  free(x);
}

uint64_t stress_hash(const void *data, size_t bytes) {
  uint64_t h = 0xcbf29ce484222325u ^ bytes;
  for (size_t i = 0; i < bytes; i += 8) {
    uint64_t word = 0;
    memcpy(&word, (const char *)data + i, bytes - i < 8 ? bytes - i : 8);
    h = (h ^ word) * 0x9e3779b97f4a7c15u;
    h ^= h >> 32;
  }
  return h;
}

/* ---- what differs ---- */

enum { ROWS_SHOWN = 6 };

static void print_value(const rg_tensor_info *t, const char *at) {
  const size_t size = rg_dtype_size(t->dtype);
  uint32_t bits = 0;
  memcpy(&bits, at, size);
  if (t->dtype == RG_I32) {
    printf("%d", (int)bits);
    return;
  }
  float x;
  rg_convert(RG_F32, &x, t->dtype, at, 1);
  printf("%.9g (%0*x)", (double)x, (int)size * 2, bits);
}

/* "[103, 5]" of the row's axes, and where in the pack axis 0 is. */
static void print_row(const rg_tensor_info *t, const stress_shape *s, int64_t row) {
  int64_t at[8] = {0};
  for (int a = t->rank - 2, left = (int)row; a >= 0; left /= (int)t->dim[a--])
    at[a] = left % t->dim[a];
  printf("    row [");
  for (int a = 0; a + 1 < t->rank; a++) printf("%s%lld", a ? ", " : "", (long long)at[a]);
  printf("]");
  if (!has_rows(t, s)) return;
  int64_t b = 0, begin = 0;
  while (b < s->B && begin + s->length[b] <= at[0]) begin += s->length[b++];
  if (b < s->B)
    printf(", position %lld of sequence %lld (length %d)", (long long)(at[0] - begin), (long long)b,
           s->length[b]);
  else
    printf(", a dead row");
}

void stress_differ(const rg_tensor_info *t, const stress_shape *s, const char *what,
                   const void *was, const void *is) {
  const int64_t n = elements(t), size = (int64_t)rg_dtype_size(t->dtype),
                width = t->rank ? t->dim[t->rank - 1] : 1, rows = width ? n / width : 0;
  const char *x = was, *y = is;
  int64_t bad = 0, bad_rows = 0;
  for (int64_t r = 0; r < rows; r++) {
    if (memcmp(x + r * width * size, y + r * width * size, (size_t)(width * size)) == 0) continue;
    bad_rows++;
    for (int64_t k = r * width; k < (r + 1) * width; k++)
      bad += memcmp(x + k * size, y + k * size, (size_t)size) != 0;
  }
  printf("  %s, %s [", what, rg_dtype_name(t->dtype));
  for (int a = 0; a < t->rank; a++) printf("%s%lld", a ? ", " : "", (long long)t->dim[a]);
  printf("]: %lld of %lld elements in %lld rows\n", (long long)bad, (long long)n,
         (long long)bad_rows);
  for (int64_t r = 0, shown = 0; r < rows && shown < ROWS_SHOWN; r++) {
    int64_t first = -1, last = 0, count = 0;
    for (int64_t k = 0; k < width; k++)
      if (memcmp(x + (r * width + k) * size, y + (r * width + k) * size, (size_t)size) != 0)
        first = first < 0 ? k : first, last = k, count++;
    if (count == 0) continue;
    shown++;
    print_row(t, s, r);
    printf(": %lld elements, %lld … %lld; element %lld was ", (long long)count, (long long)first,
           (long long)last, (long long)first);
    print_value(t, x + (r * width + first) * size);
    printf(", is ");
    print_value(t, y + (r * width + first) * size);
    printf("\n");
  }
}
