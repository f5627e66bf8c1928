/* graph/base.c: errors, host memory, text buffers; see base.h. */
#include "base.h"
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define RGI_STR2(x) #x
#define RGI_STR(x)  RGI_STR2(x)

const char *rg_version(void) {
  return RGI_STR(RG_VERSION_MAJOR) "." RGI_STR(RG_VERSION_MINOR) "." RGI_STR(RG_VERSION_PATCH);
}

/* ---- status and errors ---- */

static const struct {
  const char *name;
  int exit_code;
} status_table[] = {
    [RG_OK] = {"RG_OK", 0},
    [RG_E_USAGE] = {"RG_E_USAGE", 2},
    [RG_E_IO] = {"RG_E_IO", 3},
    [RG_E_SYNTAX] = {"RG_E_SYNTAX", 3},
    [RG_E_LIMIT] = {"RG_E_LIMIT", 3},
    [RG_E_KEY] = {"RG_E_KEY", 3},
    [RG_E_TYPE] = {"RG_E_TYPE", 3},
    [RG_E_VALUE] = {"RG_E_VALUE", 3},
    [RG_E_NAME] = {"RG_E_NAME", 3},
    [RG_E_CYCLE] = {"RG_E_CYCLE", 3},
    [RG_E_RANK] = {"RG_E_RANK", 3},
    [RG_E_SHAPE] = {"RG_E_SHAPE", 3},
    [RG_E_DTYPE] = {"RG_E_DTYPE", 3},
    [RG_E_OVERFLOW] = {"RG_E_OVERFLOW", 3},
    [RG_E_POLICY] = {"RG_E_POLICY", 3},
    [RG_E_DATA] = {"RG_E_DATA", 3},
    [RG_E_INFEASIBLE] = {"RG_E_INFEASIBLE", 4},
    [RG_E_DEVICE] = {"RG_E_DEVICE", 5},
    [RG_E_COMM] = {"RG_E_COMM", 6},
    [RG_E_NOMEM] = {"RG_E_NOMEM", 1},
    [RG_E_PLUGIN] = {"RG_E_PLUGIN", 3},
    [RG_E_INTERNAL] = {"RG_E_INTERNAL", 1},
};

const char *rg_status_name(rg_status status) {
  return (int)status >= 0 && (int)status < RGI_COUNT(status_table) ? status_table[status].name
                                                                   : "RG_E_?";
}

int rg_status_exit_code(rg_status status) {
  return (int)status >= 0 && (int)status < RGI_COUNT(status_table) ? status_table[status].exit_code
                                                                   : 1;
}

/* ---- text fit for one line of a terminal ---- */

size_t rgi_utf8(const unsigned char *p) {
  if (p[0] < 0x80) return p[0] != 0;
  size_t n = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
  if (p[0] < 0xc2 || p[0] > 0xf4) return 0;
  for (size_t i = 1; i < n; i++)
    if ((p[i] & 0xc0) != 0x80) return 0;
  bool overlong = (p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xf0 && p[1] < 0x90);
  /* surrogates; past 10FFFF */
  bool beyond = (p[0] == 0xed && p[1] > 0x9f) || (p[0] == 0xf4 && p[1] > 0x8f);
  return overlong || beyond ? 0 : n;
}

/* Bytes of the character at p if it may be printed: no control character (C0, DEL, C1). Else 0. */
static size_t printable_bytes(const unsigned char *p) {
  if (p[0] < 0x20 || p[0] == 0x7f || (p[0] == 0xc2 && p[1] < 0xa0)) return 0;
  return rgi_utf8(p);
}

const char *rg_printable(const char *text, char *buffer, size_t size) {
  size_t at = 0;
  if (size == 0) return buffer;
  for (const unsigned char *p = (const unsigned char *)(text ? text : ""); *p;) {
    char escape[5];
    const char *from = (const char *)p;
    size_t n = printable_bytes(p), used = n ? n : 1;
    if (n == 0) {
      const char *letter = strchr("\nn\tt\rr", *p); /* each is followed by its letter */
      n = (size_t)(letter && *p < 0x20 ? snprintf(escape, sizeof escape, "\\%c", letter[1])
                                       : snprintf(escape, sizeof escape, "\\x%02x", *p));
      from = escape;
    }
    if (at + n >= size) break;
    memcpy(buffer + at, from, n);
    at += n;
    p += used;
  }
  buffer[at] = 0;
  return buffer;
}

int rg_error_format(const rg_error *error, char *buffer, size_t size) {
  char raw[1536], line[4 * sizeof raw];
  if (!error) return snprintf(buffer, size, "RG_OK: no error");
  const char *code = rg_status_name(error->status);
  if (error->line > 0)
    snprintf(raw, sizeof raw, "%s:%d:%d: %s%s%s: %s", error->file, error->line, error->column,
             error->pointer, error->pointer[0] ? ": " : "", code, error->message);
  else if (error->file[0] && !error->pointer[0])
    snprintf(raw, sizeof raw, "%s: %s: %s", error->file, code, error->message);
  else if (error->file[0] || error->pointer[0])
    snprintf(raw, sizeof raw, "%s:%s: %s: %s", error->file, error->pointer, code, error->message);
  else if (error->node[0])
    snprintf(raw, sizeof raw, "%s: %s: %s", error->node, code, error->message);
  else
    snprintf(raw, sizeof raw, "%s: %s", code, error->message);
  return snprintf(buffer, size, "%s", rg_printable(raw, line, sizeof line));
}

static rg_status fail_v(rg_error *e, rg_status status, const char *pointer, const char *node,
                        const char *format, va_list args) {
  if (!e || e->status != RG_OK) return status;
  e->status = status;
  e->line = e->column = 0;
  snprintf(e->pointer, sizeof e->pointer, "%s", pointer ? pointer : "");
  snprintf(e->node, sizeof e->node, "%s", node ? node : "");
  char raw[sizeof e->message];
  vsnprintf(raw, sizeof raw, format, args);
  /* whoever shows the message alone gets one line, too */
  rg_printable(raw, e->message, sizeof e->message);
  return status;
}

rg_status rgi_fail(rg_error *e, rg_status status, const char *pointer, const char *node,
                   const char *format, ...) {
  va_list args;
  va_start(args, format);
  fail_v(e, status, pointer, node, format, args);
  va_end(args);
  return status;
}

rg_status rgi_nomem(rg_error *e) {
  return rgi_fail(e, RG_E_NOMEM, NULL, NULL,
                  "out of host memory; free some, or make the dimensions or the graph smaller");
}

rg_status rg_op_fail(rg_error *e, rg_status status, const rg_call *c, const char *format, ...) {
  va_list args;
  va_start(args, format);
  fail_v(e, status, NULL, c->node, format, args);
  va_end(args);
  return status;
}

const char *rgi_show(rgi_shown *s, const char *text) {
  size_t n = 0;
  while (n < 64 && text[n]) s->text[n] = text[n], n++;
  if (text[n]) { /* cut at the start of a character */
    while (n > 0 && ((unsigned char)text[n] & 0xc0) == 0x80) n--;
    memcpy(s->text + n, "...", 4);
  } else {
    s->text[n] = 0;
  }
  return s->text;
}

/* ---- options ---- */

enum { MOST_OPTIONS = 4096 }; /* more bytes is no struct of ours: the size was never set */

rg_status rgi_options(const void *given, void *own, size_t first, size_t now, const char *what,
                      rg_error *e) {
  const char *from = given;
  size_t size = 0;
  memset(own, 0, now);
  if (given) memcpy(&size, given, sizeof size);
  if (size && (size < first || size > MOST_OPTIONS))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%s.size is %zu; expected 0 or sizeof(%s), here %zu",
                    what, size, what, now);
  if (given && !size) size = first;
  for (size_t i = now; i < size; i++)
    if (from[i])
      return rgi_fail(
          e, RG_E_USAGE, NULL, NULL,
          "%s sets what regraph %s does not know (byte %zu of %zu); leave it 0 or use the library "
          "that the caller was built for",
          what, rg_version(), i, size);
  if (size) memcpy(own, given, size < now ? size : now);
  memcpy(own, &now, sizeof now);
  return RG_OK;
}

/* ---- dtypes ---- */

static const struct {
  const char *name;
  size_t size;
} dtype_table[RG_DTYPE_COUNT] = {
    [RG_F32] = {"f32", 4}, [RG_F16] = {"f16", 2}, [RG_BF16] = {"bf16", 2}, [RG_I32] = {"i32", 4}};

const char *rg_dtype_name(rg_dtype dtype) {
  return (int)dtype >= 0 && dtype < RG_DTYPE_COUNT ? dtype_table[dtype].name : "?";
}
size_t rg_dtype_size(rg_dtype dtype) {
  return (int)dtype >= 0 && dtype < RG_DTYPE_COUNT ? dtype_table[dtype].size : 0;
}

/* ---- context ---- */

const rg_op *rgi_find_op(const rg_context *ctx, const char *name) {
  int low = 0, high = ctx->nop;
  while (low < high) {
    int mid = (low + high) / 2, order = strcmp(name, ctx->op[mid]->name);
    if (order == 0) return ctx->op[mid];
    if (order < 0)
      high = mid;
    else
      low = mid + 1;
  }
  return NULL;
}

void *rgi_malloc(const rg_context *ctx, size_t size) {
  return ctx->host.alloc(ctx->host.user, size ? size : 1);
}
void rgi_free(const rg_context *ctx, void *ptr) {
  if (ptr) ctx->host.free(ctx->host.user, ptr);
}

int rgi_thread_start(pthread_t *thread, void *(*run)(void *), void *arg) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int code = pthread_create(thread, NULL, run, arg);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return code;
}

/* ---- arena ---- */

typedef struct chunk {
  struct chunk *next;
  size_t used, size;
} chunk; /* followed by its bytes */

struct rgi_arena {
  const rg_context *ctx;
  chunk *chunks; /* the first is the one being filled */
};

enum { CHUNK_HEADER = (sizeof(chunk) + 15) & ~15, FIRST_CHUNK = 8192, LARGEST_CHUNK = 1 << 20 };

rgi_arena *rgi_arena_create(const rg_context *ctx) {
  rgi_arena *a = rgi_malloc(ctx, sizeof *a);
  if (a) *a = (rgi_arena){.ctx = ctx};
  return a;
}

void rgi_arena_destroy(rgi_arena *a) {
  if (!a) return;
  for (chunk *c = a->chunks; c;) {
    chunk *next = c->next;
    rgi_free(a->ctx, c);
    c = next;
  }
  rgi_free(a->ctx, a);
}

void *rgi_alloc(rgi_arena *a, size_t size) {
  if (size > SIZE_MAX / 2) return NULL;
  size = (size + 15) & ~(size_t)15;
  if (size == 0) size = 16;
  chunk *c = a->chunks;
  if (!c || c->size - c->used < size) {
    size_t room = c ? c->size * 2 : FIRST_CHUNK;
    if (room > LARGEST_CHUNK) room = LARGEST_CHUNK;
    if (room < size) room = size;
    c = rgi_malloc(a->ctx, CHUNK_HEADER + room);
    if (!c) return NULL;
    *c = (chunk){.next = a->chunks, .size = room};
    a->chunks = c;
  }
  void *p = (char *)c + CHUNK_HEADER + c->used;
  c->used += size;
  return memset(p, 0, size);
}

void *rgi_alloc_n(rgi_arena *a, size_t n, size_t size) {
  size_t bytes;
  return __builtin_mul_overflow(n, size, &bytes) ? NULL : rgi_alloc(a, bytes);
}

char *rgi_strdup(rgi_arena *a, const char *s) {
  size_t n = strlen(s) + 1;
  char *p = rgi_alloc(a, n);
  return p ? memcpy(p, s, n) : NULL;
}

char *rgi_format(rgi_arena *a, const char *format, ...) {
  va_list args, again;
  va_start(args, format);
  va_copy(again, args);
  int n = vsnprintf(NULL, 0, format, args);
  char *p = n < 0 ? NULL : rgi_alloc(a, (size_t)n + 1);
  if (p) vsnprintf(p, (size_t)n + 1, format, again);
  va_end(again);
  va_end(args);
  return p;
}

/* ---- text buffer ---- */

void rgi_buf_init(rgi_buf *b, const rg_context *ctx) {
  *b = (rgi_buf){.ctx = ctx};
}

static bool reserve(rgi_buf *b, size_t more) {
  if (b->failed) return false;
  if (b->capacity - b->size > more) return true; /* one byte stays for the NUL */
  size_t capacity = b->capacity ? b->capacity * 2 : 512;
  while (capacity - b->size <= more) capacity *= 2;
  char *data = rgi_malloc(b->ctx, capacity);
  if (!data) {
    b->failed = true;
    return false;
  }
  if (b->size) memcpy(data, b->data, b->size);
  rgi_free(b->ctx, b->data);
  b->data = data;
  b->capacity = capacity;
  return true;
}

void rgi_buf_add(rgi_buf *b, const char *text, size_t n) {
  if (!reserve(b, n)) return;
  memcpy(b->data + b->size, text, n);
  b->size += n;
  b->data[b->size] = 0;
}

void rgi_buf_printf(rgi_buf *b, const char *format, ...) {
  va_list args, again;
  va_start(args, format);
  va_copy(again, args);
  int n = vsnprintf(NULL, 0, format, args);
  if (n >= 0 && reserve(b, (size_t)n)) {
    vsnprintf(b->data + b->size, (size_t)n + 1, format, again);
    b->size += (size_t)n;
  }
  va_end(again);
  va_end(args);
}

void rgi_buf_xml(rgi_buf *b, const char *text) {
  for (; *text; text++) {
    if (*text == '<')
      rgi_buf_add(b, "&lt;", 4);
    else if (*text == '&')
      rgi_buf_add(b, "&amp;", 5);
    else if (*text == '"')
      rgi_buf_add(b, "&quot;", 6);
    else if ((unsigned char)*text >= ' ')
      rgi_buf_add(b, text, 1);
  }
}

void rgi_buf_json(rgi_buf *b, const char *text) {
  rgi_buf_add(b, "\"", 1);
  for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
    if (*p == '"' || *p == '\\')
      rgi_buf_printf(b, "\\%c", *p);
    else if (*p == '\n')
      rgi_buf_add(b, "\\n", 2);
    else if (*p < 0x20)
      rgi_buf_printf(b, "\\u%04x", *p);
    else
      rgi_buf_add(b, (const char *)p, 1);
  }
  rgi_buf_add(b, "\"", 1);
}

void rgi_buf_free(rgi_buf *b) {
  rgi_free(b->ctx, b->data);
  *b = (rgi_buf){.ctx = b->ctx};
}

rg_status rgi_buf_finish(rgi_buf *b, rg_text *out, rg_error *e) {
  if (!b->failed && !b->data) rgi_buf_add(b, "", 0);
  if (b->failed) {
    rgi_buf_free(b);
    return rgi_nomem(e);
  }
  *out = (rg_text){.data = b->data, .size = b->size, .ctx = (rg_context *)b->ctx};
  *b = (rgi_buf){.ctx = b->ctx};
  return RG_OK;
}

void rg_text_destroy(rg_text *text) {
  if (!text || !text->data) return;
  rgi_free(text->ctx, text->data);
  *text = (rg_text){0};
}

const char *rg_human_bytes(int64_t bytes, char buffer[32]) {
  static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double x = (double)bytes;
  int u = 0;
  while (x >= 1024 && u < RGI_COUNT(unit) - 1) x /= 1024, u++;
  snprintf(buffer, 32, u ? (x < 10 ? "%.2f %s" : "%.1f %s") : "%.0f %s", x, unit[u]);
  return buffer;
}

/* ---- nearest name ---- */

enum { LONGEST_WORD = 64 };

/* Letters inserted, deleted, changed or swapped with their neighbour. */
static int edit_distance(const char *a, const char *b) {
  int na = (int)strlen(a), nb = (int)strlen(b), rows[3][LONGEST_WORD + 1];
  if (na > LONGEST_WORD || nb > LONGEST_WORD) return INT_MAX;
  for (int j = 0; j <= nb; j++) rows[0][j] = j;
  for (int i = 1; i <= na; i++) {
    int *row = rows[i % 3];
    const int *above = rows[(i + 2) % 3], *two_above = rows[(i + 1) % 3];
    row[0] = i;
    for (int j = 1; j <= nb; j++) {
      int best = above[j - 1] + (a[i - 1] != b[j - 1]);
      if (above[j] + 1 < best) best = above[j] + 1;
      if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
          two_above[j - 2] + 1 < best)
        best = two_above[j - 2] + 1;
      row[j] = best;
    }
  }
  return rows[na % 3][nb];
}

const char *rg_nearest(const char *word, const char *const *candidates, int n) {
  const char *best = NULL;
  int letters = (int)strlen(word); /* more slips than a third of them, and it is another word */
  int best_distance = 1 + (letters < 2 ? 0 : letters < 6 ? 1 : letters / 3);
  for (int i = 0; i < n; i++) {
    if (strcasecmp(word, candidates[i]) == 0) return candidates[i];
    int d = edit_distance(word, candidates[i]);
    if (d < best_distance) best = candidates[i], best_distance = d;
  }
  return best;
}

uint64_t rgi_hash(uint64_t hash, const void *data, size_t size) {
  const unsigned char *p = data;
  for (size_t i = 0; i < size; i++) hash = (hash ^ p[i]) * UINT64_C(0x100000001b3);
  return hash;
}

uint64_t rgi_hash_text(uint64_t hash, const char *text) {
  return rgi_hash(hash, text, strlen(text) + 1);
}
