/* recompute/front.c: what pareto found, as text, JSON or a picture.

   Numbers come from pareto.c. Names that differ in their digits alone stand once, as a pattern that
   a policy would take, so that rows stay narrow however many layers there are.
 */
#include "search.h"
#include <string.h>

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
    if (all == 1)
      rgi_buf_printf(out, "%s", name);
    else
      rgi_buf_pattern(out, name);
    if (all > 1 && taken == all)
      rgi_buf_printf(out, " (%d)", all);
    else if (all > 1)
      rgi_buf_printf(out, " (%d of %d)", taken, all);
  }
  if (first) rgi_buf_printf(out, "nothing");
}

static void both_names(const rgi_model *m, const rgi_point_of_front *p, rgi_buf *out) {
  folded_names(m, p->set, out);
  if (!p->away) return;
  rgi_buf_printf(out, "; ");
  folded_names(m, p->away, out);
}

static void summary(const rgi_model *m, const rgi_front *f, rgi_buf *out) {
  rgi_buf_printf(out, "%s front of %d candidates, %lld choices packed",
                 f->exact ? "exact" : "not a proved", m->ncandidate, (long long)f->explored);
  if (!f->exact)
    rgi_buf_printf(out, "; no point is above it by more than %.2f %% of the whole time",
                   100 * f->gap_ms / m->all_ms);
}

void rgi_front_text(const rgi_model *m, const rgi_front *f, rgi_buf *out) {
  char a[32], b[32];
  rgi_buf_printf(out, "%12s  %12s  ", "peak", "saved");
  if (f->offloads) rgi_buf_printf(out, "%12s  ", "host");
  rgi_buf_printf(out, "%12s  %s\n", "extra ms",
                 f->offloads ? "recomputed; offloaded" : "recomputed");
  for (int i = 0; i < f->count; i++) {
    rgi_buf_printf(out, "%12s  %12s  ", rg_human_bytes(f->at[i].peak, a),
                   rg_human_bytes(f->at[i].saved, b));
    if (f->offloads) rgi_buf_printf(out, "%12s  ", rg_human_bytes(f->at[i].host, a));
    rgi_buf_printf(out, "%12.3f  ", f->at[i].ms);
    both_names(m, &f->at[i], out);
    rgi_buf_printf(out, "\n");
  }
  summary(m, f, out);
  rgi_buf_printf(out, "\n");
}

void rgi_front_json(const rgi_model *m, const rgi_front *f, rgi_buf *out) {
  rgi_buf_printf(out,
                 "{\"version\": 1, \"exact\": %s, \"candidates\": %d, \"explored\": %lld, "
                 "\"all_ms\": %.9g, \"gap_ms\": %.9g, \"points\": [",
                 f->exact ? "true" : "false", m->ncandidate, (long long)f->explored, m->all_ms,
                 f->gap_ms);
  for (int i = 0; i < f->count; i++) {
    rgi_buf_printf(
        out, "%s{\"peak_bytes\": %lld, \"saved_bytes\": %lld, \"extra_ms\": %.9g, \"recompute\": [",
        i ? ", " : "", (long long)f->at[i].peak, (long long)f->at[i].saved, f->at[i].ms);
    names(m, f->at[i].set, out);
    rgi_buf_printf(out, "]");
    if (f->at[i].away) {
      rgi_buf_printf(out, ", \"host_bytes\": %lld, \"offload\": [", (long long)f->at[i].host);
      names(m, f->at[i].away, out);
      rgi_buf_printf(out, "]");
    }
    rgi_buf_printf(out, "}");
  }
  rgi_buf_printf(out, "]}\n");
}

/* ---- the picture: peak memory to the right, extra time upwards ---- */

enum { LEFT = 80, TOP = 56, WIDTH = 640, HEIGHT = 360, BELOW = 70, RIGHT = 30, MARKS = 6 };

typedef struct axes {
  double bytes_each, bytes_end; /* marks from 0 on */
  double ms_each, ms_end;
} axes;

/* 1, 2 or 5 times a power of `base` below, so that at most MARKS of it reach `most`. */
static double mark(double most, double base) {
  static const double step[] = {1, 2, 5};
  double power = 1;
  if (!(most > 0)) return 1;
  while (power * MARKS > most) power /= base;
  for (;; power *= base)
    for (int i = 0; i < 3; i++)
      if (step[i] < base && power * step[i] * MARKS >= most) return power * step[i];
}

static double x_of(const axes *a, double bytes) {
  return LEFT + WIDTH * bytes / a->bytes_end;
}
static double y_of(const axes *a, double ms) {
  return TOP + HEIGHT - HEIGHT * ms / a->ms_end;
}

static axes axes_of(const rgi_front *f) {
  double bytes = 1, ms = 0;
  for (int i = 0; i < f->count; i++) {
    if ((double)f->at[i].peak > bytes) bytes = (double)f->at[i].peak;
    if (f->at[i].ms > ms) ms = f->at[i].ms;
  }
  axes a = {.bytes_each = mark(bytes, 2), .ms_each = mark(ms, 10)};
  while (a.bytes_end < bytes) a.bytes_end += a.bytes_each;
  do a.ms_end += a.ms_each;
  while (a.ms_end < ms);
  return a;
}

static void draw_axes(const axes *a, rgi_buf *out) {
  char size[32];
  for (int i = 0; i * a->bytes_each <= a->bytes_end * 1.001; i++) {
    const double x = x_of(a, i * a->bytes_each);
    rgi_buf_printf(out,
                   "<path class=\"t\" d=\"M%.1f %dV%d\"/><text x=\"%.1f\" y=\"%d\" "
                   "text-anchor=\"middle\">%s</text>\n",
                   x, TOP, TOP + HEIGHT + 5, x, TOP + HEIGHT + 20,
                   rg_human_bytes((int64_t)(i * a->bytes_each), size));
  }
  for (int i = 0; i * a->ms_each <= a->ms_end * 1.001; i++) {
    const double y = y_of(a, i * a->ms_each);
    rgi_buf_printf(out,
                   "<path class=\"t\" d=\"M%d %.1fH%d\"/><text x=\"%d\" y=\"%.1f\" "
                   "text-anchor=\"end\">%.6g</text>\n",
                   LEFT - 5, y, LEFT + WIDTH, LEFT - 9, y + 4, i * a->ms_each);
  }
  rgi_buf_printf(out,
                 "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">peak memory</text>\n"
                 "<text x=\"18\" y=\"%d\" text-anchor=\"middle\" transform=\"rotate(-90 18 "
                 "%d)\">extra ms</text>\n",
                 LEFT + WIDTH / 2, TOP + HEIGHT + 42, TOP + HEIGHT / 2, TOP + HEIGHT / 2);
}

/* Within a budget between two points one has what the point to its left costs: a staircase. */
static void draw_points(const rgi_model *m, const rgi_front *f, const axes *a, rgi_buf *out) {
  char size[32];
  rgi_buf_printf(out, "<path d=\"");
  for (int i = 0; i < f->count; i++) {
    const double x = x_of(a, (double)f->at[i].peak), y = y_of(a, f->at[i].ms);
    rgi_buf_printf(out, i ? "V%.1fH%.1f" : "M%.1f %.1f", i ? y : x, i ? x : y);
  }
  rgi_buf_printf(out, "\" fill=\"none\" stroke=\"#2b6cb0\" stroke-width=\"1.5\"/>\n");
  for (int i = 0; i < f->count; i++) {
    rgi_buf_printf(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\"><title>%s, %.3f ms more&#10;",
                   x_of(a, (double)f->at[i].peak), y_of(a, f->at[i].ms),
                   rg_human_bytes(f->at[i].peak, size), f->at[i].ms);
    both_names(m, &f->at[i], out);
    rgi_buf_printf(out, "</title></circle>\n");
  }
}

void rgi_front_svg(const rgi_model *m, const rgi_front *f, rgi_buf *out) {
  const axes a = axes_of(f);
  const int width = LEFT + WIDTH + RIGHT, height = TOP + HEIGHT + BELOW;
  rgi_buf_printf(out,
                 "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" "
                 "height=\"%d\" font-family=\"sans-serif\" font-size=\"11\" fill=\"#222\">\n"
                 "<style>.t{stroke:#ddd}circle{fill:#2b6cb0}circle:hover{fill:#d33}</style>\n"
                 "<text x=\"%d\" y=\"22\" font-size=\"13\" font-weight=\"bold\">",
                 width, height, width, height, LEFT);
  rgi_buf_xml(out, m->g->name ? m->g->name : "");
  rgi_buf_printf(out, ": memory against time</text>\n<text x=\"%d\" y=\"40\" fill=\"#555\">", LEFT);
  summary(m, f, out);
  rgi_buf_printf(out, "</text>\n");
  draw_axes(&a, out);
  draw_points(m, f, &a, out);
  rgi_buf_printf(out, "</svg>\n");
}
