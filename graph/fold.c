/* graph/fold.c: many layers, few lines: what differs in the number of its name alone stands once.

   A folded name has * for its digits, as a policy's pattern has. More than RG_MOST_APART that
   are alike are folded, so that what somebody numbers by hand stays as it was written.
 */
#include "base.h"
#include <ctype.h>
#include <string.h>

/* Takes a character, or a whole number, which gives '*'. */
static char step(const char **at, const char *end) {
  const char c = *(*at)++;
  if (!isdigit((unsigned char)c)) return c;
  while (*at < end && isdigit((unsigned char)**at)) ++*at;
  return '*';
}

static bool alike(const char *a, const char *a_end, const char *b, const char *b_end) {
  while (a < a_end && b < b_end)
    if (step(&a, a_end) != step(&b, b_end)) return false;
  return a == a_end && b == b_end;
}

bool rgi_alike(const char *a, const char *b) {
  return alike(a, a + strlen(a), b, b + strlen(b));
}

static void add_pattern(rgi_buf *out, const char *name, size_t n) {
  for (const char *at = name; at < name + n;) {
    const char c = step(&at, name + n);
    rgi_buf_add(out, &c, 1);
  }
}

void rgi_buf_pattern(rgi_buf *out, const char *name) {
  add_pattern(out, name, strlen(name));
}

void rg_name_pattern(const char *name, char *pattern, size_t size) {
  if (!name) name = "";
  const char *end = name + strlen(name);
  size_t n = 0;
  while (name < end && n + 1 < size) pattern[n++] = step(&name, end);
  if (size > 0) pattern[n] = '\0';
}

/* A line's first word that begins as a name does and has a number in it. */
typedef struct line {
  const char *text, *name, *rest, *end; /* rest: behind the name and its spaces */
  size_t length;                        /* of the name; 0: there is none */
  bool told;
} line;

static bool starts_name(char c) {
  return isalpha((unsigned char)c) || c == '_';
}

static line read_line(const char *text, const char *end) {
  line x = {.text = text, .name = text, .end = memchr(text, '\n', (size_t)(end - text))};
  if (!x.end) x.end = end;
  for (const char *p = text; p < x.end;) {
    while (p < x.end && *p == ' ') p++;
    const char *word = p;
    bool number = false;
    for (; p < x.end && *p != ' '; p++) number |= isdigit((unsigned char)*p) != 0;
    if (!number || !starts_name(*word)) continue;
    x.name = word;
    x.length = (size_t)(p - word);
    break;
  }
  x.rest = x.name + x.length;
  while (x.rest < x.end && *x.rest == ' ') x.rest++;
  return x;
}

/* Are they equal but for numbers in their names, which do differ? */
static bool lines_alike(const line *a, const line *b) {
  const size_t before = (size_t)(a->name - a->text), behind = (size_t)(a->end - a->rest);
  if (before != (size_t)(b->name - b->text) || memcmp(a->text, b->text, before) != 0) return false;
  if (behind != (size_t)(b->end - b->rest) || memcmp(a->rest, b->rest, behind) != 0) return false;
  if (a->length == b->length && memcmp(a->name, b->name, a->length) == 0) return false;
  return alike(a->name, a->name + a->length, b->name, b->name + b->length);
}

static void add_line(rgi_buf *out, const line *x, int alike) {
  if (alike <= RG_MOST_APART) {
    rgi_buf_add(out, x->text, (size_t)(x->end - x->text));
  } else {
    rgi_buf_add(out, x->text, (size_t)(x->name - x->text));
    const size_t from = out->size, gap = (size_t)(x->rest - x->name) - x->length;
    add_pattern(out, x->name, x->length);
    for (size_t n = gap > 1 ? out->size - from : x->length; n < x->length + gap; n++)
      rgi_buf_add(out, " ", 1); /* columns stay, sentences do */
    rgi_buf_add(out, x->rest, (size_t)(x->end - x->rest));
    rgi_buf_printf(out, "  each of %d", alike);
  }
  rgi_buf_add(out, "\n", 1);
}

/* Line i and those of its section that are alike; `mark`: are told with it. */
static int find_alike(line *all, size_t n, size_t i, bool mark) {
  int alike = 1;
  for (size_t k = i + 1; k < n && *all[k].text == ' ' && all[i].length; k++) {
    if (all[k].told || !lines_alike(&all[i], &all[k])) continue;
    all[k].told = mark;
    alike++;
  }
  return alike;
}

void rgi_fold_lines(rgi_buf *b) {
  size_t lines = 0, n = 0;
  for (size_t i = 0; i < b->size; i++) lines += b->data[i] == '\n';
  line *all = b->failed ? NULL : rgi_malloc(b->ctx, (lines + 1) * sizeof *all);
  if (!all) {
    b->failed = true;
    return;
  }
  const char *end = b->data + b->size;
  for (const char *p = b->data; p < end; p = all[n++].end + 1) all[n] = read_line(p, end);
  rgi_buf out;
  rgi_buf_init(&out, b->ctx);
  for (size_t i = 0; i < n; i++) {
    if (all[i].told) continue;
    const int alike = find_alike(all, n, i, false);
    if (alike > RG_MOST_APART) find_alike(all, n, i, true);
    add_line(&out, &all[i], alike);
  }
  rgi_free(b->ctx, all);
  rgi_buf_free(b);
  *b = out;
}
