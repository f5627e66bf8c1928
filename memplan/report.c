/* memplan/report.c: a memory plan for people: the arena's timeline as text and as SVG.
 *
 * Both draw time to the right (nodes in execution order) and addresses upwards. Neither judges: what they
 * show is what the plan says.
 */
#include "memplan.h"
#include <string.h>

static const char *block_name(const rgi_graph *g, const rgi_block *b) {
  return b->tensor >= 0 ? g->tensor[b->tensor].name : g->node[b->first].name;
}

/* What makes a block worth naming: its share of the picture. */
static double area(const rgi_block *b) {
  return (double)b->size * (b->last - b->first + 1);
}

static int32_t turn_of(const rgi_graph *g) {
  int32_t turn = 0;
  while (turn < g->nnode && !g->node[turn].backward) turn++;
  return turn;
}

static int64_t alive_at(const rgi_memory *m, rgi_region region, int32_t node) {
  int64_t sum = 0;
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *b = &m->block[i];
    /* Where bytes are handed over, both own them; they count once. */
    bool handed = b->shares >= 0 && b->first == node;
    if (b->region == region && b->first <= node && node <= b->last && !handed) sum += b->size;
  }
  return sum;
}

/* ---- text ---- */

enum { ROWS = 20, MARGIN = 12, LETTERS = 26 };

typedef struct legend {
  int32_t block[LETTERS];
  int n;
} legend;

/* The blocks of a region that get a letter, largest share first. */
static legend choose_letters(const rgi_memory *m, rgi_region region) {
  legend l = {.n = 0};
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *b = &m->block[i];
    if (b->region != region || b->size == 0) continue;
    int at = l.n;
    while (at > 0 && area(b) > area(&m->block[l.block[at - 1]])) at--;
    if (at == LETTERS) continue;
    if (l.n < LETTERS) l.n++;
    memmove(&l.block[at + 1], &l.block[at], (size_t)(l.n - 1 - at) * sizeof l.block[0]);
    l.block[at] = i;
  }
  return l;
}

/* What to print for the bytes [low, high) at a node: a letter, a shade for what has none, or nothing. */
static const char *cell(const rgi_memory *m, const legend *l, int32_t node, int64_t low, int64_t high,
                        char text[2]) {
  int32_t best = -1;
  int64_t most = 0, filled = 0;
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *b = &m->block[i];
    if (b->region != RGI_R_SCRATCH || node < b->first || node > b->last) continue;
    int64_t from = b->address > low ? b->address : low;
    int64_t to = b->address + b->size < high ? b->address + b->size : high;
    if (to <= from) continue;
    filled += to - from;
    if (to - from > most) most = to - from, best = i;
  }
  if (filled * 2 < high - low) return filled ? "." : " ";
  for (int k = 0; k < l->n; k++)
    if (l->block[k] == best) {
      text[0] = (char)('a' + k);
      text[1] = '\0';
      return text;
    }
  return "░";
}

static void legend_lines(const rgi_graph *g, const rgi_memory *m, const legend *l, bool letters,
                         rgi_buf *out) {
  char size[32], at[32];
  for (int k = 0; k < l->n; k++) {
    const rgi_block *b = &m->block[l->block[k]];
    rgi_buf_printf(out, "  %c %-28s%s %10s at %-10s %s", letters ? 'a' + k : ' ', block_name(g, b),
                   b->tensor >= 0 ? "          " : " workspace", rgi_human_bytes(b->size, size),
                   rgi_human_bytes(b->address, at), g->node[b->first].name);
    if (b->last != b->first) rgi_buf_printf(out, " … %s", g->node[b->last].name);
    if (b->shares >= 0) rgi_buf_printf(out, ", in place of %s", block_name(g, &m->block[b->shares]));
    rgi_buf_printf(out, "\n");
  }
}

static void scratch_picture(const rgi_graph *g, const rgi_memory *m, const legend *l, int columns,
                            rgi_buf *out) {
  int width = columns - MARGIN - 2;
  if (width > g->nnode) width = g->nnode > 0 ? g->nnode : 1;
  if (width < 8) width = 8;
  const int32_t turn = turn_of(g);
  char text[2], size[32];
  for (int row = ROWS - 1; row >= 0; row--) {
    /* Rounded up, so that the last byte is inside the picture. */
    int64_t step = m->scratch / ROWS + (m->scratch % ROWS != 0), low = step * row;
    bool tick = row == ROWS - 1 || row == ROWS / 2 - 1;
    rgi_buf_printf(out, "%*s %s", MARGIN - 1, tick ? rgi_human_bytes(low + step, size) : "",
                   tick ? "┤" : "│");
    for (int c = 0; c < width; c++) {
      int32_t node = (int32_t)((int64_t)c * g->nnode / width);
      if (node >= g->nnode) break;
      const char *mark = cell(m, l, node, low, low + step, text);
      /* A dotted line marks the turn where nothing is. */
      bool at_turn = turn > 0 && turn < g->nnode && node >= turn &&
                     (c == 0 || (int64_t)(c - 1) * g->nnode / width < turn);
      rgi_buf_printf(out, "%s", at_turn && mark[0] == ' ' ? "┊" : mark);
    }
    rgi_buf_printf(out, "\n");
  }
  rgi_buf_printf(out, "%*s └", MARGIN - 1, "0 B");
  for (int c = 0; c < width; c++) rgi_buf_printf(out, "─");
  rgi_buf_printf(out, "\n%*s  ", MARGIN - 1, "alive");
  static const char *const bar[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  for (int c = 0; c < width; c++) {
    int32_t from = (int32_t)((int64_t)c * g->nnode / width),
            to = (int32_t)((int64_t)(c + 1) * g->nnode / width);
    int64_t most = 0;
    for (int32_t k = from; k < to || k == from; k++) {
      int64_t here = k < g->nnode ? alive_at(m, RGI_R_SCRATCH, k) : 0;
      if (here > most) most = here;
    }
    rgi_buf_printf(
        out, "%s",
        bar[m->scratch > 0 ? (most / ((m->scratch + 7) / 8) > 8 ? 8 : most / ((m->scratch + 7) / 8)) : 0]);
  }
  int32_t split = g->nnode > 0 ? (int32_t)((int64_t)turn * width / g->nnode) : 0;
  rgi_buf_printf(out, "\n%*s  ", MARGIN - 1, "");
  if (turn > 0) rgi_buf_printf(out, "%-*s", split, split > 9 ? "forward →" : "");
  if (turn < g->nnode) rgi_buf_printf(out, "%s", width - split > 10 ? "backward →" : "");
  rgi_buf_printf(out, "\n");
}

static void direction_line(const char *name, int64_t size, int64_t bound, bool optimal, rgi_buf *out) {
  char a[32], b[32];
  if (size == 0 && bound == 0) return;
  rgi_buf_printf(out, "  %-9s %10s, most alive at once %10s, gap %.2f %%%s\n", name, rgi_human_bytes(size, a),
                 rgi_human_bytes(bound, b), bound > 0 ? 100.0 * (double)(size - bound) / (double)bound : 0.0,
                 optimal ? ", optimal" : "");
}

void rgi_memory_text(const rgi_graph *g, const rgi_memory *m, int columns, rgi_buf *out) {
  char a[32], b[32];
  rgi_buf_printf(out, "scratch %s (%s without reuse; in place spared %s)\n", rgi_human_bytes(m->scratch, a),
                 rgi_human_bytes(m->no_reuse, b), rgi_human_bytes(m->inplace_gain, (char[32]){0}));
  direction_line("forward", m->forward_scratch, m->forward_bound, m->forward_optimal, out);
  direction_line("backward", m->backward_scratch, m->backward_bound, m->backward_optimal, out);
  legend l = choose_letters(m, RGI_R_SCRATCH);
  if (m->scratch > 0) {
    rgi_buf_printf(out, "\n");
    scratch_picture(g, m, &l, columns, out);
    legend_lines(g, m, &l, true, out);
    rgi_buf_printf(out, "  ░ smaller ones; . mostly free\n");
  }
  l = choose_letters(m, RGI_R_SAVED);
  rgi_buf_printf(out, "\nsaved %s\n", rgi_human_bytes(m->saved, a));
  legend_lines(g, m, &l, false, out);
}

/* ---- SVG ---- */

enum { SVG_LEFT = 90, SVG_TOP = 34, SVG_WIDTH = 1200, SVG_HEIGHT = 560, SVG_GAP = 64 };

static void xml(rgi_buf *out, const char *text) {
  for (; *text; text++) {
    if (*text == '<')
      rgi_buf_add(out, "&lt;", 4);
    else if (*text == '&')
      rgi_buf_add(out, "&amp;", 5);
    else if (*text == '"')
      rgi_buf_add(out, "&quot;", 6);
    else if ((unsigned char)*text >= ' ')
      rgi_buf_add(out, text, 1);
  }
}

static int hue_of(const char *name) {
  uint32_t h = 2166136261u;
  for (; *name; name++) h = (h ^ (unsigned char)*name) * 16777619u;
  return (int)(h % 360);
}

typedef struct panel {
  const rgi_graph *g;
  const rgi_memory *m;
  rgi_region region;
  int64_t size;
  int y, height;
} panel;

static double x_of(const panel *p, double node) {
  return SVG_LEFT + node * SVG_WIDTH / (p->g->nnode > 0 ? p->g->nnode : 1);
}
static double y_of(const panel *p, int64_t address) {
  return p->y + p->height * (1 - (double)address / (double)(p->size > 0 ? p->size : 1));
}

static void svg_block(const panel *p, const rgi_block *b, rgi_buf *out) {
  const char *name = block_name(p->g, b);
  double x = x_of(p, b->first), w = x_of(p, b->last + 1) - x, y = y_of(p, b->address + b->size),
         h = y_of(p, b->address) - y;
  char size[32];
  rgi_buf_printf(out, "<g><title>");
  xml(out, name);
  rgi_buf_printf(out, "%s&#10;%s (%lld bytes) at %lld&#10;", b->tensor >= 0 ? "" : " (workspace)",
                 rgi_human_bytes(b->size, size), (long long)b->size, (long long)b->address);
  xml(out, p->g->node[b->first].name);
  rgi_buf_printf(out, " … ");
  xml(out, p->g->node[b->last].name);
  if (b->shares >= 0) {
    rgi_buf_printf(out, "&#10;in place of ");
    xml(out, block_name(p->g, &p->m->block[b->shares]));
  }
  rgi_buf_printf(
      out, "</title><rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"hsl(%d,%d%%,%d%%)\"/>",
      x, y, w, h, hue_of(name), b->tensor >= 0 ? 55 : 10, b->tensor >= 0 ? 72 : 80);
  double font = h - 2 < 11 ? h - 2 : 11, length = (double)strlen(name);
  if (font > w / (0.6 * length)) font = w / (0.6 * length);
  if (font >= 5) {
    rgi_buf_printf(out, "<text x=\"%.2f\" y=\"%.2f\" font-size=\"%.1f\" text-anchor=\"middle\">", x + w / 2,
                   y + h / 2 + font * 0.35, font);
    xml(out, name);
    rgi_buf_printf(out, "</text>");
  }
  rgi_buf_printf(out, "</g>\n");
}

static void svg_panel(const panel *p, rgi_buf *out) {
  char size[32];
  rgi_buf_printf(out, "<text x=\"%d\" y=\"%d\" font-size=\"13\" font-weight=\"bold\">%s %s</text>\n",
                 SVG_LEFT, p->y - 8, rgi_region_name(p->region), rgi_human_bytes(p->size, size));
  rgi_buf_printf(out, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"#f7f7f7\"/>\n", SVG_LEFT,
                 p->y, SVG_WIDTH, p->height);
  for (int i = 0; i <= 4; i++) {
    int64_t at = p->size / 4 * i + p->size % 4 * i / 4;
    double y = y_of(p, at);
    rgi_buf_printf(out, "<line x1=\"%d\" y1=\"%.2f\" x2=\"%d\" y2=\"%.2f\" stroke=\"#ccc\"/>", SVG_LEFT - 4,
                   y, SVG_LEFT + SVG_WIDTH, y);
    rgi_buf_printf(out, "<text x=\"%d\" y=\"%.2f\" font-size=\"10\" text-anchor=\"end\">%s</text>\n",
                   SVG_LEFT - 7, y + 3.5, rgi_human_bytes(at, size));
  }
  for (int32_t i = 0; i < p->m->nblock; i++)
    if (p->m->block[i].region == p->region && p->m->block[i].size > 0) svg_block(p, &p->m->block[i], out);
  int32_t turn = turn_of(p->g);
  if (turn > 0 && turn < p->g->nnode)
    rgi_buf_printf(
        out, "<line x1=\"%.2f\" y1=\"%d\" x2=\"%.2f\" y2=\"%d\" stroke=\"#333\" stroke-dasharray=\"4 3\"/>\n",
        x_of(p, turn), p->y, x_of(p, turn), p->y + p->height);
}

/* Node names along the time axis, as many as fit. */
static void svg_nodes(const panel *p, rgi_buf *out) {
  int32_t every = p->g->nnode / (SVG_WIDTH / 14) + 1;
  for (int32_t k = 0; k < p->g->nnode; k += every) {
    double x = x_of(p, k + 0.5), y = p->y + p->height + 8;
    rgi_buf_printf(out,
                   "<text x=\"%.2f\" y=\"%.2f\" font-size=\"9\" text-anchor=\"end\" transform=\"rotate(-60 "
                   "%.2f %.2f)\">",
                   x, y, x, y);
    xml(out, p->g->node[k].name);
    rgi_buf_printf(out, "</text>\n");
  }
}

void rgi_memory_svg(const rgi_graph *g, const rgi_memory *m, rgi_buf *out) {
  /* Both panels to one scale of bytes where both have room. */
  panel scratch = {g, m, RGI_R_SCRATCH, m->scratch, SVG_TOP, SVG_HEIGHT};
  panel saved = {g, m, RGI_R_SAVED, m->saved, SVG_TOP + SVG_HEIGHT + 120 + SVG_GAP, 0};
  double ratio = m->scratch > 0 ? (double)m->saved / (double)m->scratch : 1;
  saved.height = m->saved == 0  ? 0
                 : ratio < 0.25 ? SVG_HEIGHT / 4
                 : ratio > 1    ? SVG_HEIGHT
                                : (int)(SVG_HEIGHT * ratio);
  int height = saved.y + saved.height + 20;
  rgi_buf_printf(
      out,
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" "
      "font-family=\"sans-serif\">\n<style>g rect{stroke:#555;stroke-width:.4} g:hover rect{stroke:#000;"
      "stroke-width:1.5}</style>\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n<title>memory of ",
      SVG_LEFT + SVG_WIDTH + 20, height, SVG_LEFT + SVG_WIDTH + 20, height);
  xml(out, g->name ? g->name : "");
  rgi_buf_printf(out, "</title>\n");
  svg_panel(&scratch, out);
  svg_nodes(&scratch, out);
  if (m->saved > 0) svg_panel(&saved, out);
  rgi_buf_printf(out, "</svg>\n");
}
