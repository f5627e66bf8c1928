/* graph/place.c: where errors are: from a JSON pointer to the line and column of what it points to,
   and several errors at once.

   jansson keeps no positions, and few documents are ever wrong: so nothing is noted while parsing,
   and the text is walked again when an error is to be placed. The text has parsed before; should it
   not fit the pointer, the deepest value on the way is what is meant (a pointer that was cut off, a
   member that is missing).
 */
#include "json.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct walk {
  const char *at, *end;
} walk;

static void skip_blank(walk *w) {
  while (w->at < w->end && strchr(" \t\r\n", *w->at) && *w->at) w->at++;
}

/* Past the string that begins here. */
static void skip_string(walk *w) {
  for (w->at++; w->at < w->end && *w->at != '"'; w->at++)
    if (*w->at == '\\' && w->at + 1 < w->end) w->at++;
  if (w->at < w->end) w->at++;
}

static void skip_value(walk *w) {
  int depth = 0;
  while (w->at < w->end) {
    const char c = *w->at;
    if (depth == 0 && strchr(",]}", c)) return;
    if (c == '"') {
      skip_string(w);
    } else {
      depth += (c == '[' || c == '{') - (c == ']' || c == '}');
      w->at++;
    }
    if (depth == 0 && strchr("\"]}", c)) return;
  }
}

/* Past `c`, if it comes next. */
static bool take(walk *w, char c) {
  skip_blank(w);
  if (w->at == w->end || *w->at != c) return false;
  w->at++;
  skip_blank(w);
  return true;
}

/* ---- keys ---- */

static uint32_t hex4(const char *at, const char *end) {
  char digits[5] = "";
  if (end - at < 4) return 0;
  memcpy(digits, at, 4);
  return (uint32_t)strtoul(digits, NULL, 16);
}

static int utf8(uint32_t c, char out[4]) {
  static const int first[] = {0, 0, 0xc0, 0xe0, 0xf0};
  const int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
  for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3f));
  out[0] = (char)((uint32_t)first[n] | c);
  return n;
}

/* The next character of a string between its quotes, unescaped: its bytes in `out`. */
static int character(walk *w, char out[4]) {
  static const char escape[] = "b\bf\fn\nr\rt\t";
  out[0] = *w->at++;
  if (out[0] != '\\' || w->at == w->end) return 1;
  const char c = *w->at++, *known = strchr(escape, c);
  if (c == 'u') {
    uint32_t code = hex4(w->at, w->end);
    w->at += w->end - w->at < 4 ? w->end - w->at : 4;
    if (code >> 10 == 0x36 && w->end - w->at >= 6) { /* the first of a pair */
      code = 0x10000 + ((code & 0x3ff) << 10) + (hex4(w->at + 2, w->end) & 0x3ff);
      w->at += 6;
    }
    return utf8(code, out);
  }
  out[0] = known && c ? known[1] : c;
  return 1;
}

/* Is the string here what stands in the pointer up to the next '/'? Goes past the string. */
static bool is_key(walk *w, const char *token) {
  walk s = {w->at + 1, NULL};
  skip_string(w);
  s.end = w->at - 1;
  while (s.at < s.end) {
    char bytes[4];
    for (int i = 0, n = character(&s, bytes); i < n; i++) {
      const bool escaped = *token == '~' && token[1];
      if (*token == '/' || (escaped ? (token[1] == '1' ? '/' : '~') : *token) != bytes[i])
        return false;
      token += 1 + escaped;
    }
  }
  return *token == 0 || *token == '/';
}

/* ---- the walk ---- */

/* To the member, or element, that `token` names; false, and nothing moves, if there is none.
 * *key: where its key begins, or it itself. */
static bool step(walk *w, const char *token, const char **key) {
  walk s = *w;
  const bool object = *s.at == '{';
  if (!object && *s.at != '[') return false;
  s.at++;
  skip_blank(&s);
  for (long i = 0, wanted = object ? -1 : strtol(token, NULL, 10); s.at < s.end; i++) {
    const char *begin = s.at;
    bool found = i == wanted;
    if (object) {
      if (*s.at != '"') return false;
      found = is_key(&s, token);
      if (!take(&s, ':')) return false;
    } else if (*s.at == ']') {
      return false;
    }
    if (found) {
      *key = begin;
      *w = s;
      return s.at < s.end;
    }
    skip_value(&s);
    if (!take(&s, ',')) return false;
  }
  return false;
}

/* Where in the text, in bytes, the pointer leads. */
static size_t find(const rgi_source *s, const char *pointer, bool key) {
  walk w = {s->text, s->text + s->size};
  skip_blank(&w);
  const char *begin = w.at;
  while (*pointer == '/' && w.at < w.end && step(&w, pointer + 1, &begin))
    pointer += 1 + strcspn(pointer + 1, "/");
  return (size_t)((key ? begin : w.at) - s->text);
}

void rgi_text_place(const char *text, size_t at, int *line, int *column) {
  *line = *column = 1;
  for (size_t i = 0; i < at; i++) {
    if (text[i] == '\n') {
      ++*line;
      *column = 1;
    } else if (((unsigned char)text[i] & 0xc0) != 0x80) {
      ++*column;
    }
  }
}

/* ---- errors ---- */

bool rgi_source_copy(rgi_arena *a, const rgi_source *from, rgi_source *out) {
  char *text = from->text ? rgi_alloc(a, from->size + 1) : NULL;
  *out = (rgi_source){.name = rgi_strdup(a, from->name), .text = text, .size = from->size};
  if (!out->name || (from->text && !text)) return false;
  if (text) memcpy(text, from->text, from->size);
  return true;
}

void rgi_error_file(rg_error *e, rg_status before, const char *file) {
  if (e && before == RG_OK && e->status != RG_OK && !e->file[0])
    snprintf(e->file, sizeof e->file, "%s", file);
}

void rgi_error_place(rg_error *e, rg_status before, const rgi_source *s) {
  const bool mine = e && before == RG_OK && e->status != RG_OK && !e->file[0];
  rgi_error_file(e, before, s->name);
  if (!mine || !s->text || !e->pointer[0] || e->line) return;
  /* a key that should not be there is wrong itself; else its value is */
  rgi_text_place(s->text, find(s, e->pointer, e->status == RG_E_KEY), &e->line, &e->column);
}

/* ---- several ---- */

bool rgi_keep(rgi_errors *all, rg_status status, rg_error *e) {
  if (!all || status == RG_E_NOMEM || status == RG_E_INTERNAL) return false;
  if (e->status != RG_OK) {
    bool again = false; /* each copy of a block has the block's errors */
    for (size_t i = 0; i < all->n && !again; i++)
      again = e->pointer[0] && strcmp(all->item[i].pointer, e->pointer) == 0;
    if (!again) all->item[all->n++] = *e;
    *e = (rg_error){0};
  }
  return all->n < all->most;
}

rg_status rgi_kept(rgi_errors *all, rg_status status, const rg_error *e, size_t *n) {
  if (e->status != RG_OK && all->n < all->most) all->item[all->n++] = *e;
  *n = all->n;
  return all->n ? all->item[0].status : status;
}
