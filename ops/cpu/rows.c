/* ops/cpu/rows.c: walks over strided tensors, SIMD conversions, and the structural ops' CPU
 * functions; see rows.h. */
#include "rows.h"

/* ---- walks ---- */

#define TASK_ELEMENTS \
  16384 /* aimed at per task: large against a task's overhead, small against a cache */

void rgi_walk_begin(rgi_walk *w, const rg_arg *shape, int64_t live) {
  *w = (rgi_walk){.rank = shape->rank > 0 ? shape->rank : 1, .dim = {1}};
  for (int i = 0; i < shape->rank; i++) w->dim[i] = shape->dim[i];
  w->live = live < w->dim[0] ? live : w->dim[0];
  rgi_walk_with(w, shape);
}

void rgi_walk_with(rgi_walk *w, const rg_arg *a) {
  int64_t dense = 1;
  for (int i = a->rank - 1; i >= w->inner; i--) {
    if (a->stride[i] != dense && a->dim[i] != 1) w->inner = i + 1;
    dense *= a->dim[i];
  }
}

typedef struct walk_job {
  const rgi_walk *w;
  rgi_run_fn fn;
  void *user;
  int64_t rows;   /* of axis 0 per task */
  int64_t per;    /* elements of the dense part, axis 0 left out */
  int64_t middle; /* runs per row of axis 0 */
} walk_job;

static void walk_task(void *arg, int64_t task, int thread) {
  const walk_job *j = arg;
  const rgi_walk *w = j->w;
  int64_t first = task * j->rows, end = first + j->rows;
  if (end > w->dim[0]) end = w->dim[0];
  rgi_run run = {.inner = w->inner, .n = j->per, .thread = thread};
  if (w->inner == 0) { /* dense throughout: at most one live and one dead run */
    int64_t border = w->live < first ? first : w->live > end ? end : w->live;
    run.start = first * j->per;
    run.n = (border - first) * j->per;
    run.live = true;
    if (run.n) j->fn(j->user, &run);
    run.start = border * j->per;
    run.n = (end - border) * j->per;
    run.live = false;
    if (run.n) j->fn(j->user, &run);
    return;
  }
  for (int64_t row = first; row < end; row++) {
    run.live = row < w->live;
    run.index[0] = row;
    for (int i = 1; i < w->inner; i++) run.index[i] = 0;
    for (int64_t m = 0; m < j->middle; m++) {
      j->fn(j->user, &run);
      for (int i = w->inner - 1; i > 0; i--) { /* the next index of the axes between */
        if (++run.index[i] < w->dim[i]) break;
        run.index[i] = 0;
      }
    }
  }
}

void rgi_walk_run(const rg_call *c, const rgi_walk *w, rgi_run_fn fn, void *user) {
  walk_job j = {.w = w, .fn = fn, .user = user, .per = 1, .middle = 1};
  for (int i = 1; i < w->rank; i++) {
    if (i < w->inner)
      j.middle *= w->dim[i];
    else
      j.per *= w->dim[i];
  }
  if (w->inner == 1 && w->rank == 1) j.per = 1;
  int64_t row = j.per * j.middle;
  if (row == 0 || w->dim[0] == 0) return;
  j.rows = row < TASK_ELEMENTS ? TASK_ELEMENTS / row : 1;
  c->parallel(c->pool, (w->dim[0] + j.rows - 1) / j.rows, walk_task, &j);
}

int64_t rgi_sequence_of(const int32_t *cu, int64_t nseq, int64_t row) {
  int64_t low = 0, high = nseq; /* cu[low] <= row < cu[high] */
  while (high - low > 1) {
    int64_t middle = low + (high - low) / 2;
    if (cu[middle] <= row)
      low = middle;
    else
      high = middle;
  }
  return low;
}

double rgi_call_bytes(const rg_call *c) {
  double bytes = 0;
  for (int i = 0; i < c->in_begin[c->op->nin]; i++)
    if (c->in[i].rank >= 0)
      bytes += rgi_arg_elements(&c->in[i]) * (double)rg_dtype_size(c->in[i].dtype);
  for (int i = 0; i < c->out_begin[c->op->nout]; i++)
    if (c->out[i].rank >= 0)
      bytes += rgi_arg_elements(&c->out[i]) * (double)rg_dtype_size(c->out[i].dtype);
  return bytes;
}

/* ---- conversions ---- */

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,f16c")))

AVX2 static int64_t load_f16(float *dst, const uint16_t *src, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(src + i))));
  return i;
}
AVX2 static int64_t load_bf16(float *dst, const uint16_t *src, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(src + i)));
    _mm256_storeu_si256((void *)(dst + i), _mm256_slli_epi32(wide, 16));
  }
  return i;
}
AVX2 static int64_t store_f16(uint16_t *dst, const float *src, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((void *)(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}
AVX2 static int64_t store_bf16(uint16_t *dst, const float *src, int64_t n) {
  const __m256i one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7fff),
                quiet = _mm256_set1_epi32(0x40);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 f = _mm256_loadu_ps(src + i);
    __m256i u = _mm256_castps_si256(f), top = _mm256_srli_epi32(u, 16);
    __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(half, _mm256_and_si256(top, one)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    __m256i r =
        _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_or_si256(top, quiet), nan);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128((void *)(dst + i), _mm256_castsi256_si128(packed));
  }
  return i;
}
#else
static int64_t load_f16(float *dst, const uint16_t *src, int64_t n) {
  return (void)dst, (void)src, (void)n, 0;
}
static int64_t load_bf16(float *dst, const uint16_t *src, int64_t n) {
  return (void)dst, (void)src, (void)n, 0;
}
static int64_t store_f16(uint16_t *dst, const float *src, int64_t n) {
  return (void)dst, (void)src, (void)n, 0;
}
static int64_t store_bf16(uint16_t *dst, const float *src, int64_t n) {
  return (void)dst, (void)src, (void)n, 0;
}
#endif

void rgi_load_by(int isa, float *dst, rg_dtype type, const void *src, int64_t n) {
  const uint16_t *h = src;
  int64_t done = 0;
  if (type == RG_F32) {
    memcpy(dst, src, (size_t)n * 4);
    return;
  }
  if (isa >= 1) done = type == RG_F16 ? load_f16(dst, h, n) : load_bf16(dst, h, n);
  rgi_load(dst + done, type, h + done, n - done);
}

void rgi_store_by(int isa, void *dst, rg_dtype type, const float *src, int64_t n) {
  uint16_t *h = dst;
  int64_t done = 0;
  if (type == RG_F32) {
    memcpy(dst, src, (size_t)n * 4);
    return;
  }
  if (isa >= 1) done = type == RG_F16 ? store_f16(h, src, n) : store_bf16(h, src, n);
  rgi_store(h + done, type, src + done, n - done);
}

/* ---- structural ops ---- */

static void zero_run(const rgi_run *r, const rg_arg *y) {
  memset(rgi_run_at(r, y), 0, (size_t)r->n * rg_dtype_size(y->dtype));
}

typedef struct copy_job {
  const rg_arg *x, *y;
  int isa;
} copy_job;

static void copy_run(void *user, const rgi_run *r) {
  const copy_job *j = user;
  if (!r->live) {
    zero_run(r, j->y);
    return;
  }
  const char *x = rgi_run_at(r, j->x);
  char *y = rgi_run_at(r, j->y);
  size_t xsize = rg_dtype_size(j->x->dtype), ysize = rg_dtype_size(j->y->dtype);
  if (j->x->dtype == j->y->dtype) {
    memmove(y, x, (size_t)r->n * xsize);
    return;
  }
  float piece[RGI_PIECE];
  for (int64_t i = 0; i < r->n; i += RGI_PIECE) {
    int64_t n = r->n - i < RGI_PIECE ? r->n - i : RGI_PIECE;
    rgi_load_by(j->isa, piece, j->x->dtype, x + (size_t)i * xsize, n);
    rgi_store_by(j->isa, y + (size_t)i * ysize, j->y->dtype, piece, n);
  }
}

rg_status rgi_run_cast(const rg_call *c) {
  const rg_arg *x = rg_in(c, 0), *y = rg_out(c, 0);
  copy_job j = {x, y, c->isa};
  rgi_walk w;
  rgi_walk_begin(&w, y, rgi_live_rows(rg_in(c, 1), y->rank ? y->dim[0] : 1));
  rgi_walk_with(&w, x);
  rgi_walk_run(c, &w, copy_run, &j);
  return RG_OK;
}

typedef struct add_job {
  const rg_arg *x, *y; /* x: nx of them */
  int nx, isa;
} add_job;

static void add_run(void *user, const rgi_run *r) {
  const add_job *j = user;
  if (!r->live) {
    zero_run(r, j->y);
    return;
  }
  float sum[RGI_PIECE], term[RGI_PIECE];
  char *y = rgi_run_at(r, j->y);
  for (int64_t i = 0; i < r->n; i += RGI_PIECE) {
    int64_t n = r->n - i < RGI_PIECE ? r->n - i : RGI_PIECE;
    bool first = true;
    for (int k = 0; k < j->nx; k++) {
      const rg_arg *x = &j->x[k];
      if (x->rank < 0) continue;
      const char *at = (const char *)rgi_run_at(r, x) + (size_t)i * rg_dtype_size(x->dtype);
      rgi_load_by(j->isa, first ? sum : term, x->dtype, at, n);
      if (!first) rgi_store_add(sum, term, n);
      first = false;
    }
    if (first) memset(sum, 0, sizeof sum);
    rgi_store_by(j->isa, y + (size_t)i * rg_dtype_size(j->y->dtype), j->y->dtype, sum, n);
  }
}

rg_status rgi_run_add(const rg_call *c) {
  const rg_arg *y = rg_out(c, 0);
  add_job j = {c->in + c->in_begin[0], y, rg_in_count(c, 0), c->isa};
  rgi_walk w;
  rgi_walk_begin(&w, y, rgi_live_rows(rg_in(c, 1), y->rank ? y->dim[0] : 1));
  for (int k = 0; k < j.nx; k++)
    if (j.x[k].rank >= 0) rgi_walk_with(&w, &j.x[k]);
  rgi_walk_run(c, &w, add_run, &j);
  return RG_OK;
}

rg_status rgi_run_concat(const rg_call *c) {
  const rg_arg *y = rg_out(c, 0), *x = c->in + c->in_begin[0];
  int axis = (int)c->attr[0].i;
  int64_t live = rgi_live_rows(rg_in(c, 1), y->dim[0]), start = 0;
  for (int k = 0; k < rg_in_count(c, 0); k++) {
    if (x[k].rank < 0) continue;
    rg_arg part = rgi_slice(y, axis, start, x[k].dim[axis]);
    copy_job j = {&x[k], &part, c->isa};
    int64_t rest = axis == 0 ? (live > start ? live - start : 0) : live;
    rgi_walk w;
    rgi_walk_begin(&w, &part, rest);
    rgi_walk_with(&w, &x[k]);
    rgi_walk_run(c, &w, copy_run, &j);
    start += x[k].dim[axis];
  }
  return RG_OK;
}

static void accumulate_run(void *user, const rgi_run *r) {
  const copy_job *j = user;
  float term[RGI_PIECE];
  const char *x = rgi_run_at(r, j->x);
  float *y = rgi_run_at(r, j->y);
  for (int64_t i = 0; i < r->n; i += RGI_PIECE) {
    int64_t n = r->n - i < RGI_PIECE ? r->n - i : RGI_PIECE;
    rgi_load_by(j->isa, term, j->x->dtype, x + (size_t)i * rg_dtype_size(j->x->dtype), n);
    rgi_store_add(y + i, term, n);
  }
}

rg_status rgi_run_accumulate(const rg_call *c) {
  const rg_arg *x = rg_in(c, 1), *y = rg_out(c, 0);
  int axis = (int)c->attr[0].i;
  rg_arg part = y->rank ? rgi_slice(y, axis, c->attr[1].i, x->dim[axis]) : *y;
  copy_job j = {x, &part, c->isa};
  rgi_walk w;
  rgi_walk_begin(&w, x, INT64_MAX);
  rgi_walk_with(&w, &part);
  rgi_walk_run(c, &w, accumulate_run, &j);
  return RG_OK;
}
