/* memplan/report.c: a memory plan for people: who owns how many bytes when, as text and as SVG.

   Time runs to the right in both, one place per step; views move no bytes and take no time. The
   text shows bytes alive as a filled curve (saved below, scratch above; the axis ends at the bytes
   that are asked for) and under it the largest blocks, bar below curve. The SVG shows every block
   where it lies, scratch above saved. Neither judges: what they show is what the plan says.
 */
#include "memplan.h"
#include <stdio.h>
#include <string.h>

typedef struct view {
  const rgi_graph *g;
  const rgi_memory *m;
  rgi_arena *arena;
  int32_t *step;    /* per node: its place in time, counted without views */
  int32_t *node;    /* per step */
  int32_t n, turn;  /* steps; the first of backward, n if there is none */
  int64_t *saved;   /* per step: bytes alive */
  int64_t *scratch; /* per step */
  bool *given;      /* per block: another took its bytes over */
} view;

static void close_view(view *v) {
  rgi_arena_destroy(v->arena);
}

static bool open_view(view *v, const rgi_graph *g, const rgi_memory *m) {
  const size_t nodes = (size_t)g->nnode + 1;
  *v = (view){.g = g, .m = m, .arena = rgi_arena_create(g->ctx)};
  if (!v->arena) return false;
  v->step = rgi_alloc_n(v->arena, nodes, sizeof *v->step);
  v->node = rgi_alloc_n(v->arena, nodes, sizeof *v->node);
  v->saved = rgi_alloc_n(v->arena, nodes, sizeof *v->saved);
  v->scratch = rgi_alloc_n(v->arena, nodes, sizeof *v->scratch);
  v->given = rgi_alloc_n(v->arena, (size_t)m->nblock + 1, sizeof *v->given);
  if (!v->given || !v->step || !v->node || !v->saved || !v->scratch) {
    close_view(v);
    return false;
  }
  for (int32_t k = 0; k < g->nnode; k++) {
    v->step[k] = v->n;
    if (g->node[k].op->flags & RG_OP_VIEW) continue;
    if (!g->node[k].backward) v->turn = v->n + 1;
    v->saved[v->n] = m->reserved;
    v->node[v->n++] = k;
  }
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *b = &m->block[i];
    int64_t *alive = b->region == RGI_R_SAVED ? v->saved : v->scratch;
    if (b->region == RGI_R_HOST) continue;
    if (b->shares >= 0) v->given[b->shares] = true;
    /* Where bytes are handed over both blocks own them; they count once. */
    for (int32_t s = v->step[b->first] + (b->shares >= 0); s <= v->step[b->last]; s++)
      alive[s] += b->size;
  }
  return true;
}

static const char *block_name(const view *v, const rgi_block *b) {
  return b->tensor >= 0 ? v->g->tensor[b->tensor].name : v->g->node[b->first].name;
}

/* Indices of the blocks that have bytes, largest first (the earlier, then the lower, among
 * equals). */
static int32_t *by_size(const view *v, int32_t *count) {
  const rgi_memory *m = v->m;
  int32_t *order = rgi_alloc_n(v->arena, (size_t)m->nblock + 1, sizeof *order), n = 0;
  *count = 0;
  if (!order) return NULL;
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *b = &m->block[i];
    if (b->size == 0) continue;
    int32_t at = n++;
    for (; at > 0; at--) {
      const rgi_block *c = &m->block[order[at - 1]];
      if (c->size > b->size || (c->size == b->size && c->first <= b->first)) break;
      order[at] = order[at - 1];
    }
    order[at] = i;
  }
  *count = n;
  return order;
}

/* ---- text ---- */

enum { ROWS = 12, LARGEST = 20, SIZE_COLUMNS = 11, CELLS_PER_STEP = 8 };

typedef struct canvas {
  const view *v;
  int label; /* columns left of the axis */
  int forward, backward;
  rgi_buf *out;
} canvas;

/* Writes `text` in exactly `width` columns, cut or padded. Counts characters, not bytes. */
static void fitted(rgi_buf *out, const char *text, int width) {
  int n = 0;
  const char *cut = text, *p = text;
  for (; *p; p++) {
    if (((unsigned char)*p & 0xC0) == 0x80) continue;
    if (n == width - 1) cut = p;
    n++;
  }
  if (n > width) {
    rgi_buf_add(out, text, (size_t)(cut - text));
    rgi_buf_printf(out, "…");
    n = width;
  } else {
    rgi_buf_add(out, text, (size_t)(p - text));
  }
  rgi_buf_printf(out, "%*s", width - n, "");
}

static canvas make_canvas(const view *v, int columns, rgi_buf *out) {
  int name = columns / 4;
  if (name < 10) name = 10;
  if (name > 26) name = 26;
  canvas c = {.v = v, .label = name + SIZE_COLUMNS + 1, .out = out};
  int width = columns - c.label - 3; /* the axis, the turn, and one to spare */
  if (width < 16) width = 16;
  const int32_t nforward = v->turn, nbackward = v->n - v->turn;
  int each = v->n > 0 ? width / v->n : 0;
  if (each > CELLS_PER_STEP) each = CELLS_PER_STEP;
  if (each >= 1) {
    c.forward = each * nforward;
    c.backward = each * nbackward;
  } else {
    c.forward = (int)((int64_t)width * nforward / v->n);
    if (nforward && !c.forward) c.forward = 1;
    c.backward = width - c.forward;
    if (nbackward && !c.backward) c.forward--, c.backward = 1;
    if (!nbackward) c.forward += c.backward, c.backward = 0;
  }
  return c;
}

/* The steps that column `x` of the picture shows: one of several columns of a step, or several
 * steps. */
static void steps_at(const canvas *c, int x, int32_t *from, int32_t *to) {
  bool backward = x >= c->forward;
  int64_t cells = backward ? c->backward : c->forward,
          n = backward ? c->v->n - c->v->turn : c->v->turn;
  if (backward) x -= c->forward;
  *from = (int32_t)(x * n / cells);
  *to = (int32_t)((x + 1) * n / cells);
  if (*to <= *from) *to = *from + 1;
  if (backward) *from += c->v->turn, *to += c->v->turn;
}

/* One cell of the curve: the byte range [low, low + height), with `saved` bytes
 * below and `scratch` above them. */
static const char *curve_cell(double low, double height, double saved, double scratch) {
  static const char *const part[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  double top = (saved + scratch - low) / height, below = (saved - low) / height;
  if (top <= 0) return " ";
  if (below >= 0.5 || (below > 0 && below * 2 >= top)) return below >= 0.5 ? "▒" : "░";
  int eighths = top >= 1 ? 8 : (int)(top * 8 + 0.5);
  return part[eighths > 0 ? eighths : 1];
}

/* Writes a cell; spaces wait in *blank until something follows, so that no line ends in them. */
static void put(rgi_buf *out, int *blank, const char *mark) {
  if (mark[0] == ' ') {
    ++*blank;
    return;
  }
  rgi_buf_printf(out, "%*s%s", *blank, "", mark);
  *blank = 0;
}

static void draw_curve(const canvas *c) {
  const view *v = c->v;
  rgi_buf *out = c->out;
  const int64_t peak = v->m->saved + v->m->scratch;
  const double height = (double)peak / ROWS;
  char size[32];
  for (int row = ROWS - 1; row >= 0; row--) {
    bool tick = (row + 1) % 4 == 0;
    rgi_buf_printf(out, "%*s %s", c->label - 1,
                   tick ? rg_human_bytes((int64_t)(height * (row + 1)), size) : "",
                   tick ? "┤" : "│");
    int blank = 0;
    for (int x = 0; x < c->forward + c->backward; x++) {
      int32_t from, to, most;
      steps_at(c, x, &from, &to);
      most = from;
      for (int32_t s = from; s < to; s++)
        if (v->saved[s] + v->scratch[s] > v->saved[most] + v->scratch[most]) most = s;
      if (x == c->forward) put(out, &blank, "│");
      put(out, &blank,
          curve_cell(height * row, height, (double)v->saved[most], (double)v->scratch[most]));
    }
    rgi_buf_printf(out, "\n");
  }
}

static void draw_axis(const canvas *c) {
  rgi_buf *out = c->out;
  rgi_buf_printf(out, "%*s └", c->label - 1, "0 B");
  for (int x = 0; x < c->forward + c->backward; x++)
    rgi_buf_printf(out, "%s", x == c->forward ? "┴─" : "─");
  rgi_buf_printf(out, "\n%*s", c->label + 1, "");
  const char *forward = c->forward >= 9 ? "forward" : "fwd";
  if (c->forward > 0 && c->backward > 0) fitted(out, forward, c->forward < 3 ? 3 : c->forward);
  if (c->forward > 0 && c->backward == 0) rgi_buf_printf(out, "%s", forward);
  if (c->backward > 0) rgi_buf_printf(out, " %s", c->backward >= 9 ? "backward" : "bwd");
  rgi_buf_printf(out, "\n");
}

static void draw_block(const canvas *c, const rgi_block *b) {
  const view *v = c->v;
  rgi_buf *out = c->out;
  char name[300], size[32];
  snprintf(name, sizeof name, "%s%s%s", block_name(v, b),
           b->tensor < 0   ? " (work)"
           : b->shares < 0 ? ""
                           : " ← ",
           b->shares < 0 ? "" : block_name(v, &v->m->block[b->shares]));
  fitted(out, name, c->label - SIZE_COLUMNS - 1);
  rgi_buf_printf(out, "%*s │", SIZE_COLUMNS, rg_human_bytes(b->size, size));
  const int32_t first = v->step[b->first], last = v->step[b->last];
  int blank = 0;
  for (int x = 0; x < c->forward + c->backward; x++) {
    int32_t from, to;
    steps_at(c, x, &from, &to);
    if (x == c->forward) put(out, &blank, "┊");
    put(out, &blank,
        from > last || to <= first ? " "
        : b->region == RGI_R_HOST  ? "░"
        : b->region == RGI_R_SAVED ? "▒"
                                   : "█");
  }
  rgi_buf_printf(out, "\n");
}

static void direction_line(const char *name, int64_t size, int64_t bound, bool optimal,
                           rgi_buf *out) {
  char a[32], b[32];
  if (size == 0 && bound == 0) return;
  rgi_buf_printf(out, "  %-9s %10s, most alive at once %10s, gap %.2f %%%s\n", name,
                 rg_human_bytes(size, a), rg_human_bytes(bound, b),
                 bound > 0 ? 100.0 * (double)(size - bound) / (double)bound : 0.0,
                 optimal ? ", optimal" : "");
}

void rgi_memory_text(const rgi_graph *g, const rgi_memory *m, int columns, rgi_buf *out) {
  char a[32], b[32], spared[32];
  view v;
  if (!open_view(&v, g, m)) {
    out->failed = true;
    return;
  }
  rgi_buf_printf(out, "saved %s, scratch %s (%s without reuse; in place spared %s)\n",
                 rg_human_bytes(m->saved, a), rg_human_bytes(m->scratch, b),
                 rg_human_bytes(m->no_reuse, (char[32]){0}),
                 rg_human_bytes(m->inplace_gain, spared));
  direction_line("forward", m->forward_scratch, m->forward_bound, m->forward_optimal, out);
  direction_line("backward", m->backward_scratch, m->backward_bound, m->backward_optimal, out);
  int32_t n;
  int32_t *order = by_size(&v, &n);
  if (!order) out->failed = true;
  if (n > 0) {
    canvas c = make_canvas(&v, columns, out);
    rgi_buf_printf(out, "\n");
    draw_curve(&c);
    draw_axis(&c);
    rgi_buf_printf(out, "\n%*s █ scratch  ▒ saved\n", c.label, "");
    for (int32_t i = 0; i < n && i < LARGEST; i++) draw_block(&c, &m->block[order[i]]);
    int64_t rest = 0;
    for (int32_t i = LARGEST; i < n; i++) rest += m->block[order[i]].size;
    if (n > LARGEST)
      rgi_buf_printf(out, "and %d smaller, %s together\n", (int)n - LARGEST,
                     rg_human_bytes(rest, a));
  }
  close_view(&v);
}

/* ---- SVG ---- */

enum {
  LEFT = 92,
  RIGHT = 24,
  TOP = 64,
  PANELS = 600, /* height of both panels together */
  LEAST = 72,   /* of one that has bytes */
  GAP = 34,
  NAMES = 120, /* room for step names below */
  SHADES = 2
};

/* What a block holds decides its colour; neighbours of one kind alternate between two shades. */
typedef struct kind {
  const char *name, *fill[SHADES];
} kind;
enum { KIND_SAVED, KIND_VALUE, KIND_CLONE, KIND_GRADIENT, KIND_WORKSPACE, KINDS };
static const kind kinds[KINDS] = {
    {"saved for backward", {"#8fb8de", "#a9c9e8"}}, {"forward value", {"#9fd3a4", "#b7dfba"}},
    {"recomputed", {"#f5d17a", "#f8de9f"}},         {"gradient", {"#e9a3a0", "#f0bab7"}},
    {"workspace", {"#c9c9c9", "#d8d8d8"}},
};

static int kind_of(const view *v, const rgi_block *b) {
  const rgi_node *n = &v->g->node[b->first];
  if (b->tensor < 0) return KIND_WORKSPACE;
  if (b->region == RGI_R_SAVED) return KIND_SAVED;
  return n->kind == RGI_CLONE ? KIND_CLONE : n->backward ? KIND_GRADIENT : KIND_VALUE;
}

typedef struct panel {
  const view *v;
  rgi_region region;
  int64_t size;
  double y, height, width;
  rgi_buf *out;
} panel;

static double x_of(const panel *p, double step) {
  return LEFT + step * p->width / (p->v->n > 0 ? p->v->n : 1);
}
static double y_of(const panel *p, int64_t address) {
  return p->y + p->height * (1 - (double)address / (double)(p->size > 0 ? p->size : 1));
}

/* The largest type, up to 12, in which `letters` characters fit into w × h; 0 where it could not be
 * read. */
static double font_for(size_t letters, double w, double h) {
  double font = h - 2 < 12 ? h - 2 : 12, wide = (w - 3) / (0.58 * (double)letters);
  if (font > wide) font = wide;
  return font < 6.5 ? 0 : font;
}

static void svg_label(const panel *p, const rgi_block *b, double x, double y, double w, double h) {
  const char *name = block_name(p->v, b);
  const size_t letters = strlen(name);
  rgi_buf *out = p->out;
  double font = font_for(letters, w, h), upright = font_for(letters, h, w), cx = x + w / 2,
         cy = y + h / 2;
  if (font == 0 && upright == 0) return;
  bool turned = upright > font;
  if (turned) font = upright;
  /* The size goes under the name where there is room for two lines. */
  char size[32];
  bool two = !turned && h > 2.6 * font && font_for(strlen(rg_human_bytes(b->size, size)), w, h) > 0;
  rgi_buf_printf(out, "<text x=\"%.1f\" y=\"%.1f\" font-size=\"%.1f\" text-anchor=\"middle\"", cx,
                 cy + (two ? -0.2 : 0.35) * font, font);
  if (turned) rgi_buf_printf(out, " transform=\"rotate(-90 %.1f %.1f)\"", cx, cy);
  rgi_buf_printf(out, ">");
  rgi_buf_xml(out, name);
  if (two)
    rgi_buf_printf(out,
                   "<tspan x=\"%.1f\" dy=\"1.2em\" font-size=\"%.1f\" fill=\"#555\">%s</tspan>", cx,
                   font * 0.85, size);
  rgi_buf_printf(out, "</text>");
}

static void svg_block(const panel *p, const rgi_block *b, int shade) {
  const view *v = p->v;
  rgi_buf *out = p->out;
  /* Both sides of a hand-over have half of its step. */
  double x = x_of(p, v->step[b->first] + (b->shares >= 0 ? 0.5 : 0)),
         w = x_of(p, v->step[b->last] + (v->given[b - v->m->block] ? 0.5 : 1)) - x,
         y = y_of(p, b->address + b->size), h = y_of(p, b->address) - y;
  char size[32];
  rgi_buf_printf(out, "<g><title>");
  rgi_buf_xml(out, block_name(v, b));
  rgi_buf_printf(out, "%s&#10;%s (%lld bytes) at %s+%lld&#10;steps %d to %d: ",
                 b->tensor >= 0 ? "" : " (workspace)", rg_human_bytes(b->size, size),
                 (long long)b->size, rgi_region_name(b->region), (long long)b->address,
                 (int)v->step[b->first], (int)v->step[b->last]);
  rgi_buf_xml(out, v->g->node[b->first].name);
  rgi_buf_printf(out, " … ");
  rgi_buf_xml(out, v->g->node[b->last].name);
  if (b->shares >= 0) {
    rgi_buf_printf(out, "&#10;in place of ");
    rgi_buf_xml(out, block_name(v, &v->m->block[b->shares]));
  }
  rgi_buf_printf(out,
                 "</title><rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\"/>",
                 x, y, w, h > 0.4 ? h : 0.4, kinds[kind_of(v, b)].fill[shade]);
  if (b->shares >= 0)
    rgi_buf_printf(out, "<path d=\"M%.2f %.2fv%.2f\" stroke=\"#222\" stroke-width=\"2.5\"/>", x, y,
                   h);
  svg_label(p, b, x, y, w, h);
  rgi_buf_printf(out, "</g>\n");
}

static void svg_panel(const panel *p) {
  const rgi_memory *m = p->v->m;
  rgi_buf *out = p->out;
  char size[32];
  rgi_buf_printf(out, "<text class=\"b\" x=\"%d\" y=\"%.1f\">%s %s</text>\n", LEFT, p->y - 8,
                 rgi_region_name(p->region), rg_human_bytes(p->size, size));
  rgi_buf_printf(out,
                 "<rect x=\"%d\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"#f6f6f6\"/>\n",
                 LEFT, p->y, p->width, p->height);
  int64_t each = 1; /* a power of two, so that marks read well */
  const double marks = p->height / 45 > 2 ? p->height / 45 : 2;
  while ((double)each * marks < (double)p->size) each *= 2;
  for (int64_t at = 0; at <= p->size; at += each) {
    double y = y_of(p, at);
    rgi_buf_printf(out, "<path class=\"t\" d=\"M%d %.1fH%.1f\"/>", LEFT - 5, y, LEFT + p->width);
    rgi_buf_printf(out, "<text class=\"e\" x=\"%d\" y=\"%.1f\">%s</text>\n", LEFT - 8, y + 3.5,
                   rg_human_bytes(at, size));
  }
  int shade[KINDS] = {0};
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *b = &m->block[i];
    if (b->region != p->region || b->size == 0) continue;
    int k = kind_of(p->v, b);
    svg_block(p, b, shade[k]);
    shade[k] = (shade[k] + 1) % SHADES;
  }
}

/* Step names along the time axis, as many as fit. */
static void svg_names(const panel *p, double y) {
  const view *v = p->v;
  const double room = p->width / (v->n > 0 ? v->n : 1);
  const int32_t every = room >= 11 ? 1 : (int32_t)(11 / room) + 1;
  for (int32_t s = 0; s < v->n; s += every) {
    double x = x_of(p, s + 0.5) + 3;
    rgi_buf_printf(p->out,
                   "<text class=\"e\" x=\"%.1f\" y=\"%.1f\" transform=\"rotate(-60 %.1f %.1f)\">",
                   x, y, x, y);
    rgi_buf_xml(p->out, v->g->node[v->node[s]].name);
    rgi_buf_printf(p->out, "</text>\n");
  }
}

static void svg_legend(const view *v, rgi_buf *out) {
  bool used[KINDS] = {false}, inplace = false;
  for (int32_t i = 0; i < v->m->nblock; i++) {
    used[kind_of(v, &v->m->block[i])] = true;
    inplace = inplace || v->m->block[i].shares >= 0;
  }
  const int title = 9 * ((int)strlen(v->g->name ? v->g->name : "") + 22); /* stands to the left */
  int x = LEFT + (title > 300 ? title : 300);
  for (int k = 0; k < KINDS; k++) {
    if (!used[k]) continue;
    rgi_buf_printf(out,
                   "<rect x=\"%d\" y=\"15\" width=\"12\" height=\"12\" fill=\"%s\"/><text x=\"%d\" "
                   "y=\"25\">%s</text>\n",
                   x, kinds[k].fill[0], x + 17, kinds[k].name);
    x += 40 + 7 * (int)strlen(kinds[k].name);
  }
  if (inplace)
    rgi_buf_printf(out,
                   "<path d=\"M%d 15v12\" stroke=\"#222\" stroke-width=\"2.5\"/><text x=\"%d\" "
                   "y=\"25\">in place of "
                   "the one before</text>\n",
                   x + 6, x + 14);
}

void rgi_memory_svg(const rgi_graph *g, const rgi_memory *m, rgi_buf *out) {
  view v;
  if (!open_view(&v, g, m)) {
    out->failed = true;
    return;
  }
  const double width = v.n * 16 < 1100 ? 1100 : v.n * 16 > 4000 ? 4000 : v.n * 16;
  /* Both panels to one scale of bytes, unless one would be too low to see. */
  const double total = (double)m->saved + (double)m->scratch;
  double saved = m->saved > 0 ? PANELS * ((double)m->saved / total) : 0;
  if (m->saved > 0 && saved < LEAST) saved = LEAST;
  if (m->saved > 0 && m->scratch > 0 && saved > PANELS - LEAST) saved = PANELS - LEAST;
  panel upper = {&v, RGI_R_SCRATCH, m->scratch, TOP, PANELS - saved, width, out};
  panel lower = {&v, RGI_R_SAVED, m->saved, TOP + upper.height + GAP, saved, width, out};
  const double end = m->saved > 0 ? lower.y + lower.height : upper.y + upper.height;
  char size[32];
  rgi_buf_printf(
      out,
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" "
      "height=\"%.0f\" "
      "font-family=\"sans-serif\" font-size=\"11\" fill=\"#222\">\n<style>g rect{stroke:#555;"
      "stroke-width:.4}g:hover rect{stroke:#000;stroke-width:1.5}.t{stroke:#ccc;stroke-width:.7}"
      ".e{text-anchor:end;font-size:10px}.b{font-weight:bold;font-size:13px}</"
      "style>\n<title>memory of ",
      LEFT + width + RIGHT, end + NAMES, LEFT + width + RIGHT, end + NAMES);
  rgi_buf_xml(out, g->name ? g->name : "");
  rgi_buf_printf(
      out,
      "</title>\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n<text class=\"b\" "
      "x=\"%d\" y=\"26\">",
      LEFT);
  rgi_buf_xml(out, g->name ? g->name : "");
  rgi_buf_printf(out, ": %s at peak</text>\n", rg_human_bytes(m->saved + m->scratch, size));
  svg_legend(&v, out);
  if (m->scratch > 0 || m->saved == 0) svg_panel(&upper);
  if (m->saved > 0) svg_panel(&lower);
  if (v.turn > 0 && v.turn < v.n) {
    double x = x_of(&upper, v.turn);
    rgi_buf_printf(out,
                   "<path d=\"M%.1f %d V%.1f\" stroke=\"#333\" stroke-opacity=\".5\" "
                   "stroke-dasharray=\"4 3\"/>\n",
                   x, TOP - 16, end);
    rgi_buf_printf(out,
                   "<text class=\"e\" x=\"%.1f\" y=\"%d\">forward</text><text x=\"%.1f\" y=\"%d\" "
                   "font-size=\"10\">"
                   "backward</text>\n",
                   x - 5, TOP - 8, x + 5, TOP - 8);
  }
  svg_names(&upper, end + 10);
  rgi_buf_printf(out, "</svg>\n");
  close_view(&v);
}
