/* recompute/pareto.c: the front of (peak bytes, extra milliseconds) over all choices.

   Choices are visited in order of time; one that packs below the lowest peak so far is on the
   front. Exact up to RGI_EXACT_LIMIT candidates. Above that the candidates are added one at a time
   by memory freed per millisecond, which gives achievable points, not a proved front; the output
   says so.
 */
#include "search.h"
#include <string.h>

typedef struct point {
  const uint64_t *set;
  int64_t saved, peak;
  double ms;
} point;

typedef struct front {
  point *at;
  int count, capacity;
  int64_t explored;
} front;

static rg_status add_point(const rg_context *ctx, front *f, point p, rg_error *e) {
  if (f->count == f->capacity) {
    int larger = f->capacity ? 2 * f->capacity : 16;
    point *at = rgi_malloc(ctx, (size_t)larger * sizeof *at);
    if (!at) return rgi_nomem(e);
    if (f->count) memcpy(at, f->at, (size_t)f->count * sizeof *at);
    rgi_free(ctx, f->at);
    f->at = at;
    f->capacity = larger;
  }
  f->at[f->count++] = p;
  return RG_OK;
}

static rg_status consider(const rgi_model *m, front *f, const uint64_t *set, rg_error *e) {
  int64_t best = f->count ? f->at[f->count - 1].peak : INT64_MAX;
  point p = {0};
  RGI_TRY(rgi_model_measure(m, set, best - 1, &p.saved, &p.peak, &p.ms, e));
  f->explored++;
  if (p.peak >= best) return RG_OK;
  uint64_t *copy = rgi_model_set(m);
  if (!copy) return rgi_nomem(e);
  memcpy(copy, set, (size_t)m->words * sizeof *copy);
  p.set = copy;
  if (f->count && f->at[f->count - 1].ms >= p.ms) f->count--; /* equal time, less memory */
  return add_point(m->g->ctx, f, p, e);
}

static rg_status walk_all(const rgi_model *m, rgi_progress progress, front *f, rg_error *e) {
  rgi_subsets *s = rgi_subsets_create(m->g->ctx, m->ms, m->ncandidate);
  if (!s) return rgi_nomem(e);
  rg_status status = RG_OK;
  uint64_t set, needed;
  double cost, total = (double)(UINT64_C(1) << m->ncandidate);
  bool failed = false;
  for (int64_t seen = 0; rgi_subsets_next(s, &set, &cost, &failed); seen++) {
    if (progress.fn && (seen & 255) == 0) progress.fn(progress.user, "pareto", (double)seen, total);
    if (!rgi_model_needed(m, &set, &needed)) continue;
    if (f->count && rgi_model_peak_bound(m, &set) >= f->at[f->count - 1].peak) continue;
    RGI_GOTO(status, consider(m, f, &set, e), done);
  }
  if (failed) status = rgi_nomem(e);
done:
  rgi_subsets_destroy(s);
  return status;
}

static rg_status walk_in_order(const rgi_model *m, rgi_progress progress, front *f, rg_error *e) {
  uint64_t *set = rgi_model_set(m);
  int *order = rgi_alloc_n(m->arena, (size_t)m->ncandidate, sizeof *order);
  if (!set || !order) return rgi_nomem(e);
  rgi_model_order(m, order);
  RGI_TRY(consider(m, f, set, e));
  for (int i = 0; i < m->ncandidate; i++) {
    rgi_put(set, order[i]);
    if ((i + 1) % rgi_model_stride(m) && i + 1 < m->ncandidate) continue;
    if (progress.fn) progress.fn(progress.user, "pareto", i, m->ncandidate);
    RGI_TRY(consider(m, f, set, e));
  }
  return RG_OK;
}

static void names(const rgi_model *m, const uint64_t *set, const char *separator, bool quoted,
                  rgi_buf *out) {
  bool first = true;
  for (int i = 0; i < m->ncandidate; i++) {
    if (!rgi_has(set, i)) continue;
    rgi_buf_printf(out, "%s", first ? "" : separator);
    if (quoted)
      rgi_buf_json(out, m->g->origin[m->origin[i]].name);
    else
      rgi_buf_printf(out, "%s", m->g->origin[m->origin[i]].name);
    first = false;
  }
  if (first && !quoted) rgi_buf_printf(out, "nothing");
}

rg_status rgi_pareto(const rgi_graph *g, const rgi_profile *profile, const rgi_memory_options *mem,
                     rgi_progress progress, const char *format, rgi_buf *out, rg_error *e) {
  bool json = strcmp(format, "json") == 0;
  if (!json && strcmp(format, "text") != 0)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "unknown format \"%s\"; expected text or json",
                    format);
  rgi_model *m;
  front f = {0};
  RGI_TRY(rgi_model_create(g, profile, mem, &m, e));
  bool exact = m->ncandidate <= RGI_EXACT_LIMIT;
  rg_status status = exact ? walk_all(m, progress, &f, e) : walk_in_order(m, progress, &f, e);
  if (status == RG_OK && json) {
    rgi_buf_printf(
        out,
        "{\"version\": 1, \"exact\": %s, \"candidates\": %d, \"explored\": %lld, \"points\": [",
        exact ? "true" : "false", m->ncandidate, (long long)f.explored);
    for (int i = 0; i < f.count; i++) {
      rgi_buf_printf(
          out,
          "%s{\"peak_bytes\": %lld, \"saved_bytes\": %lld, \"extra_ms\": %.9g, \"recompute\": [",
          i ? ", " : "", (long long)f.at[i].peak, (long long)f.at[i].saved, f.at[i].ms);
      names(m, f.at[i].set, ", ", true, out);
      rgi_buf_printf(out, "]}");
    }
    rgi_buf_printf(out, "]}\n");
  } else if (status == RG_OK) {
    char a[32], b[32];
    rgi_buf_printf(out, "%12s  %12s  %12s  %s\n", "peak", "saved", "extra ms", "recomputed");
    for (int i = 0; i < f.count; i++) {
      rgi_buf_printf(out, "%12s  %12s  %12.3f  ", rgi_human_bytes(f.at[i].peak, a),
                     rgi_human_bytes(f.at[i].saved, b), f.at[i].ms);
      names(m, f.at[i].set, ", ", false, out);
      rgi_buf_printf(out, "\n");
    }
    rgi_buf_printf(out, "%s front of %d candidates, %lld choices packed\n",
                   exact ? "exact" : "achievable points, not a proved", m->ncandidate,
                   (long long)f.explored);
  }
  rgi_free(g->ctx, f.at);
  rgi_model_destroy(m);
  return status;
}
