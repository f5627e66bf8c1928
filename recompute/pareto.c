/* recompute/pareto.c: the front of (peak bytes, extra milliseconds) over all choices.

   Choices are visited in order of time; one that packs below the lowest peak so far is on the
   front. Exact up to RGI_EXACT_LIMIT candidates. Above that the points are the choices for a row of
   budgets, and the output says how far above the front they may lie.
 */
#include "search.h"
#include <stdlib.h>
#include <string.h>

enum { BUDGETS = 20 };

typedef struct point {
  const uint64_t *set;
  int64_t saved, peak;
  double ms;
} point;

typedef struct front {
  point *at;
  int count, capacity;
  int64_t explored;
  double gap_ms; /* most that a point is above the front */
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
  RGI_TRY(rgi_model_measure(m, set, best - 1, false, &p.saved, &p.peak, &p.ms, e));
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
    rgi_taken x = rgi_replay_run(m->replay, &set, &needed);
    if (needed != set || (f->count && x.peak >= f->at[f->count - 1].peak)) continue;
    RGI_GOTO(status, consider(m, f, &set, e), done);
  }
  if (failed) status = rgi_nomem(e);
done:
  rgi_subsets_destroy(s);
  return status;
}

static int dearer(const void *x, const void *y) {
  const point *a = x, *b = y;
  if (a->ms != b->ms) return a->ms < b->ms ? -1 : 1;
  return (a->peak > b->peak) - (a->peak < b->peak);
}

/* The choices for budgets from what everything kept takes down to the least. */
static rg_status walk_budgets(rgi_model *m, rgi_progress progress, front *f, rg_error *e) {
  rgi_chooser c;
  int64_t least, most, saved;
  double ms;
  uint64_t *set = rgi_model_set(m), *none = rgi_model_set(m);
  if (!set || !none) return rgi_nomem(e);
  RGI_TRY(rgi_chooser_init(&c, m, e));
  RGI_TRY(rgi_least_many(&c, set, &least, e));
  RGI_TRY(rgi_model_measure(m, none, INT64_MAX, false, &saved, &most, &ms, e));
  f->explored = c.explored + 1;
  RGI_TRY(add_point(m->g->ctx, f, (point){none, saved, most, ms}, e));
  for (int i = 1; i <= BUDGETS && least < most; i++) {
    if (progress.fn) progress.fn(progress.user, "pareto", i - 1, BUDGETS);
    RGI_TRY(rgi_chooser_init(&c, m, e));
    c.budget = most - (most - least) / BUDGETS * i;
    if (i == BUDGETS) c.budget = least;
    if (c.budget >= f->at[f->count - 1].peak) continue; /* the point before is within it, too */
    RGI_TRY(rgi_choose_many(&c, set, e));
    point p = {.set = c.best};
    RGI_TRY(rgi_model_measure(m, c.best, INT64_MAX, false, &p.saved, &p.peak, &p.ms, e));
    f->explored += c.explored + 1;
    if (p.ms - c.bound_ms > f->gap_ms) f->gap_ms = p.ms - c.bound_ms;
    RGI_TRY(add_point(m->g->ctx, f, p, e));
  }
  qsort(f->at, (size_t)f->count, sizeof *f->at, dearer);
  int kept = 0;
  for (int i = 0; i < f->count; i++)
    if (kept == 0 || f->at[i].peak < f->at[kept - 1].peak) f->at[kept++] = f->at[i];
  f->count = kept;
  return RG_OK;
}

static void names(const rgi_model *m, const uint64_t *set, rgi_buf *out) {
  bool first = true;
  for (int i = 0; i < m->ncandidate; i++) {
    if (!rgi_has(set, i)) continue;
    rgi_buf_printf(out, "%s", first ? "" : ", ");
    rgi_buf_json(out, m->g->origin[m->origin[i]].name);
    first = false;
  }
}

/* Names that differ in their digits alone once, with * for these: "layer*_norm (12)", or (9
 * of 12). */
static void folded_names(const rgi_model *m, const uint64_t *set, rgi_buf *out) {
  static const char digits[] = "0123456789";
  bool first = true;
  for (int kind = 0; kind < m->nkind; kind++) {
    int taken = 0, all = 0;
    const char *name = NULL;
    for (int i = 0; i < m->ncandidate; i++) {
      if (m->kind[i] != kind) continue;
      all++;
      if (!rgi_has(set, i)) continue;
      if (taken++ == 0) name = m->g->origin[m->origin[i]].name;
    }
    if (taken == 0) continue;
    rgi_buf_printf(out, "%s", first ? "" : ", ");
    first = false;
    while (*name && all > 1) {
      const size_t letters = strcspn(name, digits), number = strspn(name + letters, digits);
      rgi_buf_printf(out, "%.*s%s", (int)letters, name, number ? "*" : "");
      name += letters + number;
    }
    if (all == 1)
      rgi_buf_printf(out, "%s", name);
    else if (taken == all)
      rgi_buf_printf(out, " (%d)", all);
    else
      rgi_buf_printf(out, " (%d of %d)", taken, all);
  }
  if (first) rgi_buf_printf(out, "nothing");
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
  rg_status status = exact ? walk_all(m, progress, &f, e) : walk_budgets(m, progress, &f, e);
  if (status == RG_OK && json) {
    rgi_buf_printf(
        out,
        "{\"version\": 1, \"exact\": %s, \"candidates\": %d, \"explored\": %lld, \"all_ms\": %.9g, "
        "\"gap_ms\": %.9g, \"points\": [",
        exact ? "true" : "false", m->ncandidate, (long long)f.explored, m->all_ms, f.gap_ms);
    for (int i = 0; i < f.count; i++) {
      rgi_buf_printf(
          out,
          "%s{\"peak_bytes\": %lld, \"saved_bytes\": %lld, \"extra_ms\": %.9g, \"recompute\": [",
          i ? ", " : "", (long long)f.at[i].peak, (long long)f.at[i].saved, f.at[i].ms);
      names(m, f.at[i].set, out);
      rgi_buf_printf(out, "]}");
    }
    rgi_buf_printf(out, "]}\n");
  } else if (status == RG_OK) {
    char a[32], b[32];
    rgi_buf_printf(out, "%12s  %12s  %12s  %s\n", "peak", "saved", "extra ms", "recomputed");
    for (int i = 0; i < f.count; i++) {
      rgi_buf_printf(out, "%12s  %12s  %12.3f  ", rgi_human_bytes(f.at[i].peak, a),
                     rgi_human_bytes(f.at[i].saved, b), f.at[i].ms);
      folded_names(m, f.at[i].set, out);
      rgi_buf_printf(out, "\n");
    }
    rgi_buf_printf(out, "%s front of %d candidates, %lld choices packed",
                   exact ? "exact" : "not a proved", m->ncandidate, (long long)f.explored);
    if (!exact)
      rgi_buf_printf(out, "; no point is above it by more than %.2f %% of the whole time",
                     100 * f.gap_ms / m->all_ms);
    rgi_buf_printf(out, "\n");
  }
  rgi_free(g->ctx, f.at);
  rgi_model_destroy(m);
  return status;
}
