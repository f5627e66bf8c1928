/* exec/profile.c: measurements in, a profile out; and where profiles of this machine are kept.

   Writes what graph/profile.c reads. Rates that nobody measured, and those of links, are the
   shipped profile's: points say by what a call is slower than they allow, so all that hangs on them
   is how far past the last point times can be trusted.
 */
#include "../graph/json.h"
#include "../graph/profile.h"
#ifdef REGRAPH_CUDA
#include "cuda.h"
#endif

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

RGI_NO_TAIL(rg_profile_options, bandwidth_gbs);

/* Work this near (as a ratio, less one) is the same work. */
#define ALIKE 0.02

typedef struct sample {
  const rg_measured *m;
  size_t family; /* bytes of m->kernels that name the family */
} sample;

static size_t family(const rg_measured *m) {
  return m->kernels ? strcspn(m->kernels, ":") : 0;
}

static int compare_numbers(double a, double b) {
  return a < b ? -1 : a > b;
}

/* By op, family and type. */
static int compare_groups(const sample *a, const sample *b) {
  int order = strcmp(a->m->op, b->m->op);
  if (order == 0 && a->family && b->family)
    order = strncmp(a->m->kernels, b->m->kernels, a->family > b->family ? a->family : b->family);
  if (order == 0) order = compare_numbers((double)a->family, (double)b->family);
  return order ? order : compare_numbers(a->m->dtype, b->m->dtype);
}

static int compare(const void *x, const void *y) {
  const sample *a = x, *b = y;
  int order = compare_groups(a, b);
  if (order == 0) order = compare_numbers(a->m->flops, b->m->flops);
  if (order == 0) order = compare_numbers(a->m->bytes, b->m->bytes);
  if (order == 0) order = compare_numbers(a->m->exps, b->m->exps);
  return order ? order : compare_numbers(a->m->ms, b->m->ms);
}

static bool near(double a, double b) {
  return fabs(a - b) <= ALIKE * (fabs(a) > fabs(b) ? fabs(a) : fabs(b));
}

static bool alike(const sample *a, const sample *b) {
  return compare_groups(a, b) == 0 && near(a->m->flops, b->m->flops) &&
         near(a->m->exps, b->m->exps) && near(a->m->bytes, b->m->bytes);
}

static int by_value(const void *a, const void *b) {
  return compare_numbers(*(const double *)a, *(const double *)b);
}

static double median(double *x, size_t n) {
  qsort(x, n, sizeof *x, by_value);
  return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

/* Shortest text, with a dot whatever the locale. */
static void number(rgi_buf *b, const char *before, double x) {
  char text[40];
  snprintf(text, sizeof text, "%.6g", x);
  for (char *c = text; *c; c++)
    if (*c == ',') *c = '.';
  rgi_buf_printf(b, "%s%s", before, text);
}

/* The points of one op, family and type. room holds n numbers. */
static void write_group(const sample *s, size_t n, double *room, rgi_buf *b) {
  const rg_measured *m = s->m;
  rgi_buf_printf(b, "    {\"op\": ");
  rgi_buf_json(b, m->op);
  if (s->family) {
    char kernels[128];
    snprintf(kernels, sizeof kernels, "%.*s", (int)s->family, m->kernels);
    rgi_buf_printf(b, ", \"kernels\": ");
    rgi_buf_json(b, kernels);
  }
  rgi_buf_printf(b, ", \"dtype\": \"%s\", \"points\": [", rg_dtype_name(m->dtype));
  for (size_t i = 0, next; i < n; i = next) {
    for (next = i; next < n && alike(&s[i], &s[next]); next++) room[next - i] = s[next].m->ms;
    number(b, i ? ",\n      [" : "\n      [", s[i].m->flops);
    number(b, ", ", s[i].m->exps);
    number(b, ", ", s[i].m->bytes);
    number(b, ", ", median(room, next - i));
    rgi_buf_printf(b, "]");
  }
  rgi_buf_printf(b, "]}");
}

typedef struct work {
  const rg_measured *m;
  size_t n;
  sample *sample;
  double *room; /* n numbers */
} work;

static void write_measured(work *w, rgi_buf *b) {
  for (size_t i = 0; i < w->n; i++) w->sample[i] = (sample){&w->m[i], family(&w->m[i])};
  qsort(w->sample, w->n, sizeof *w->sample, compare);
  rgi_buf_printf(b, "  \"measured\": [");
  for (size_t i = 0, next; i < w->n; i = next) {
    for (next = i; next < w->n && compare_groups(&w->sample[i], &w->sample[next]) == 0; next++) {
    }
    rgi_buf_printf(b, i ? ",\n" : "\n");
    write_group(&w->sample[i], next - i, w->room, b);
  }
  rgi_buf_printf(b, "]\n");
}

/* The share of the roofline that half of the calls reach: for ops that were not measured. */
static double middle(const rgi_profile *p, work *w) {
  for (size_t i = 0; i < w->n; i++) {
    const rg_cost cost = {.flops = w->m[i].flops, .exps = w->m[i].exps, .bytes = w->m[i].bytes};
    w->room[i] = rgi_profile_roofline_ms(p, w->m[i].dtype, &cost) / w->m[i].ms;
  }
  const double x = w->n ? median(w->room, w->n) : p->efficiency;
  return x < 1e-3 ? 1e-3 : x > 1 ? 1 : x;
}

/* A step costs no more than the quickest one took. */
static double step_us(const rgi_profile *p, const work *w) {
  double least = p->step_us;
  for (size_t i = 0; i < w->n; i++)
    if (1e3 * w->m[i].ms < least) least = 1e3 * w->m[i].ms;
  return least < 1e-3 ? 1e-3 : least;
}

/* What is known of the machine, into the shipped profile's place. */
static rg_status describe(const rg_profile_options *o, rgi_profile *p, char *name, size_t size,
                          rg_error *e) {
  snprintf(name, size, "%s", o->name ? o->name : p->name);
  p->source = o->source ? o->source : "measured";
  p->threads = o->threads;
  if (!p->cuda) {
    if (!o->name) snprintf(name, size, "cpu");
    if (o->matrix_gflops > 0)
      for (int d = 0; d < RG_DTYPE_COUNT; d++) p->matrix_gflops[d] = o->matrix_gflops;
    if (o->special_gops > 0) p->special_gops = o->special_gops;
    if (o->bandwidth_gbs > 0) p->bandwidth_gbs = p->link_gbs = o->bandwidth_gbs;
    p->memory = (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    return RG_OK;
  }
#ifdef REGRAPH_CUDA
  RGI_TRY(rgi_cuda_about(&p->gpu, o->name ? NULL : name, size, &p->memory, e));
  rgi_cuda_host_rate(&p->host_gbs);
  return RG_OK;
#else
  return rg_device_check(o->device, e);
#endif
}

static void write_profile(const rgi_profile *p, const char *name, work *w, rgi_buf *b) {
  rgi_buf_printf(b, "{\n  \"regraph_profile\": 1,\n  \"name\": ");
  rgi_buf_json(b, name);
  rgi_buf_printf(b, ",\n  \"source\": ");
  rgi_buf_json(b, p->source);
  rgi_buf_printf(b, ",\n  \"device\": \"%s\",\n", p->cuda ? "cuda" : "cpu");
  if (p->cuda)
    rgi_buf_printf(b, "  \"compute_capability\": %d,\n  \"multiprocessors\": %d,\n", p->gpu.cc,
                   p->gpu.sms);
  else
    rgi_buf_printf(b, "  \"threads\": %d,\n", p->threads);
  number(b, "  \"matrix_gflops\": { \"f32\": ", p->matrix_gflops[RG_F32]);
  number(b, ", \"f16\": ", p->matrix_gflops[RG_F16]);
  number(b, ", \"bf16\": ", p->matrix_gflops[RG_BF16]);
  number(b, " },\n  \"special_gops\": ", p->special_gops);
  number(b, ",\n  \"bandwidth_gbs\": ", p->bandwidth_gbs);
  number(b, ",\n  \"link_gbs\": ", p->link_gbs);
  if (p->cuda) number(b, ",\n  \"host_gbs\": ", p->host_gbs);
  number(b, ",\n  \"step_us\": ", step_us(p, w));
  rgi_buf_printf(b, ",\n  \"memory\": %lld", (long long)p->memory);
  number(b, ",\n  \"efficiency\": ", middle(p, w));
  rgi_buf_printf(b, ",\n");
  write_measured(w, b);
  rgi_buf_printf(b, "}\n");
}

/* JSON has no others. */
static bool is_amount(double x) {
  return x >= 0 && isfinite(x);
}

static rg_status check(const rg_profile_options *o, const rg_measured *m, size_t n, rg_error *e) {
  for (size_t i = 0; i < n; i++)
    if (!m[i].op || !(m[i].ms > 0) || !is_amount(m[i].ms) || !is_amount(m[i].flops) ||
        !is_amount(m[i].exps) || !is_amount(m[i].bytes) || (unsigned)m[i].dtype >= RG_DTYPE_COUNT)
      return rgi_fail(
          e, RG_E_USAGE, NULL, NULL,
          "measurement %zu (op %s, %g ms, %g flops, %g exps, %g bytes): expected an op, "
          "a time, costs from 0 up, all finite, and a type",
          i, m[i].op ? m[i].op : "none", m[i].ms, m[i].flops, m[i].exps, m[i].bytes);
  if (!isfinite(o->matrix_gflops) || !isfinite(o->special_gops) || !isfinite(o->bandwidth_gbs))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rates of %g, %g GFLOP/s, %g GB/s; expected finite ones, or 0 for the shipped",
                    o->matrix_gflops, o->special_gops, o->bandwidth_gbs);
  return RG_OK;
}

rg_status rg_profile_write(rg_context *ctx, const rg_profile_options *options,
                           const rg_measured *measured, size_t n, rg_text *out, rg_error *e) {
  if (out) *out = (rg_text){0};
  if (!ctx || !out || (n && !measured))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_profile_write needs a context, measurements and a place for the text");
  rg_profile_options o;
  rgi_profile *p;
  char name[256];
  rgi_buf b;
  RGI_TRY(RGI_OPTIONS(rg_profile_options, bandwidth_gbs, options, &o, e));
  RGI_TRY(check(&o, measured, n, e));
  RGI_TRY(rgi_profile_load(ctx, "shipped", o.device, &p, e));
  work w = {.m = measured, .n = n};
  rgi_buf_init(&b, ctx);
  rg_status status = describe(&o, p, name, sizeof name, e);
  if (status == RG_OK) {
    w.sample = rgi_malloc(ctx, (n + 1) * sizeof *w.sample);
    w.room = rgi_malloc(ctx, (n + 1) * sizeof *w.room);
    status = w.sample && w.room ? RG_OK : rgi_nomem(e);
  }
  if (status == RG_OK) {
    write_profile(p, name, &w, &b);
    status = rgi_buf_finish(&b, out, e);
  } else {
    rgi_buf_free(&b);
  }
  rgi_free(ctx, w.room);
  rgi_free(ctx, w.sample);
  rgi_profile_destroy(p);
  return status;
}

rg_status rg_profile_path(const char *name, char *buffer, size_t size, rg_error *e) {
  if (!name || !buffer)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "rg_profile_path needs a name and a buffer");
  if (rgi_profile_path(name, buffer, size)) return RG_OK;
  return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                  "neither XDG_CACHE_HOME nor HOME names a folder for profiles, or the buffer of "
                  "%zu bytes is too small",
                  size);
}
