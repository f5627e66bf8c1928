/* memplan/pack_csv.c: packing a file of lines "id,lower,upper,size".

   The header names the columns, in any order; columns other than lower, upper, size and offset are
   kept as they are. An existing offset column is overwritten, otherwise one is appended. A field
   may stand in double quotes, which protect commas ("" is a quote in it) but no line ends. Lines
   end in \n or \r\n, as the header does; blank lines and a byte order mark are dropped. Lines and
   columns in messages count from 1, columns in bytes and without the mark.
 */
#include "../graph/json.h"
#include "pack.h"
#include <stdio.h>
#include <string.h>

enum { ID, LOWER, UPPER, SIZE, OFFSET, NAMED };
static const char *const column_name[NAMED] = {"id", "lower", "upper", "size", "offset"};

typedef struct table {
  const rg_context *ctx;
  const char *path;
  char *text;
  size_t size;
  const char *header; /* the first line that is not blank */
  int header_line;
  const char **row; /* starts of the data lines, then one past the end of the text */
  rg_buffer *buffer;
  size_t n;
  int column[NAMED]; /* where each is, or -1 */
  int columns;
  bool carriage_return;
} table;

static rg_status fail_at(rg_error *e, rg_status status, const table *t, int line, int column,
                         const char *format, ...) __attribute__((format(printf, 6, 7)));
static rg_status fail_at(rg_error *e, rg_status status, const table *t, int line, int column,
                         const char *format, ...) {
  char message[512];
  va_list args;
  if (!e || e->status != RG_OK) return status;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  rgi_fail(e, status, NULL, NULL, "%s", message);
  snprintf(e->file, sizeof e->file, "%s", t->path);
  e->line = line;
  e->column = column;
  return status;
}

/* The whole text, NUL bytes (as UTF-16 has them) refused. */
static rg_status read_text(table *t, rg_error *e) {
  RGI_TRY(rgi_read_file(t->ctx, t->path, &t->text, &t->size, e));
  const char *nul = memchr(t->text, 0, t->size), *line = t->text;
  if (!nul) return RG_OK;
  int number = 1;
  for (const char *p = t->text; p < nul; p++)
    if (*p == '\n') number++, line = p + 1;
  return fail_at(e, RG_E_SYNTAX, t, number, (int)(nul - line) + 1,
                 "NUL byte: expected text in ASCII or UTF-8");
}

/* One past the last character of the line at p, without its \r. */
static const char *line_end(const table *t, const char *p) {
  const char *end = memchr(p, '\n', (size_t)(t->text + t->size - p));
  if (!end) end = t->text + t->size;
  return end > p && end[-1] == '\r' ? end - 1 : end;
}

static const char *next_line(const table *t, const char *p) {
  const char *end = memchr(p, '\n', (size_t)(t->text + t->size - p));
  return end ? end + 1 : t->text + t->size;
}

static void trim(const char **from, const char **to) {
  while (*from < *to && (**from == ' ' || **from == '\t')) ++*from;
  while (*to > *from && ((*to)[-1] == ' ' || (*to)[-1] == '\t')) --*to;
}

/* The end of the field at p on a line that ends at `end`; NULL if a quote is open there. */
static const char *field_end(const char *p, const char *end) {
  while (p < end && (*p == ' ' || *p == '\t')) p++;
  if (p < end && *p == '"') {
    for (p++; p < end && (*p != '"' || (p + 1 < end && p[1] == '"')); p++) p += *p == '"';
    if (p >= end) return NULL;
  }
  const char *comma = memchr(p, ',', (size_t)(end - p));
  return comma ? comma : end;
}

/* What a field says: without blanks around it, and without its quotes. */
static void contents(const char **from, const char **to) {
  trim(from, to);
  if (*to - *from < 2 || **from != '"' || (*to)[-1] != '"') return;
  ++*from;
  --*to;
  trim(from, to);
}

static rg_status open_quote(rg_error *e, const table *t, int line, int column) {
  return fail_at(e, RG_E_SYNTAX, t, line, column,
                 "the quote that opens here does not close on its line");
}

static bool blank(const table *t, const char *p) {
  const char *end = line_end(t, p);
  trim(&p, &end);
  return p == end;
}

/* A column of the header that may have been meant to be `name`, in `text`; or NULL. */
static const char *misspelt(const table *t, const char *name, char *text, size_t size) {
  const char *end = line_end(t, t->header);
  for (const char *p = t->header;; p++) {
    const char *from = p, *stop = field_end(p, end), *to = stop;
    bool known = false;
    contents(&from, &to);
    snprintf(text, size, "%.*s", (int)(to - from < 60 ? to - from : 60), from);
    for (int i = 0; i < NAMED; i++) known = known || strcmp(text, column_name[i]) == 0;
    if (!known && rg_nearest(text, &name, 1)) return text;
    p = stop;
    if (p == end) return NULL;
  }
}

static rg_status read_header(table *t, rg_error *e) {
  const char *limit = t->text + t->size, *start = t->text;
  if (t->size >= 3 && memcmp(start, "\xEF\xBB\xBF", 3) == 0) start += 3;
  for (t->header_line = 1; start < limit && blank(t, start); t->header_line++)
    start = next_line(t, start);
  if (start == limit)
    return fail_at(e, RG_E_KEY, t, 1, 1,
                   "the file has no header; expected a first line id,lower,upper,size");
  const char *end = line_end(t, start), *p = start;
  t->header = start;
  for (int i = 0; i < NAMED; i++) t->column[i] = -1;
  t->carriage_return = end < limit && *end == '\r';
  for (;; p++) {
    const char *from = p, *stop = field_end(p, end), *to = stop;
    if (!stop) return open_quote(e, t, t->header_line, (int)(p - start) + 1);
    contents(&from, &to);
    for (int i = 0; i < NAMED; i++) {
      if ((size_t)(to - from) != strlen(column_name[i]) ||
          strncmp(from, column_name[i], (size_t)(to - from)) != 0)
        continue;
      if (t->column[i] >= 0)
        return fail_at(e, RG_E_KEY, t, t->header_line, (int)(from - start) + 1,
                       "column \"%s\" appears twice; rename or drop one", column_name[i]);
      t->column[i] = t->columns;
    }
    t->columns++;
    p = stop;
    if (p == end) break;
  }
  for (int i = ID; i <= SIZE; i++) {
    if (t->column[i] >= 0) continue;
    char text[64];
    const char *near = misspelt(t, column_name[i], text, sizeof text);
    return fail_at(e, RG_E_KEY, t, t->header_line, 1,
                   "the header has no column \"%s\"%s%s%s; expected %s", column_name[i],
                   near ? " (\"" : "", near ? near : "", near ? "\" is near)" : "",
                   "id,lower,upper,size in any order");
  }
  return RG_OK;
}

static rg_status read_integer(const table *t, int line, int column, const char *name,
                              const char *from, const char *to, int64_t *out, rg_error *e) {
  const int shown = to - from > 40 ? 40 : (int)(to - from);
  const char *all = from, *p;
  contents(&from, &to);
  bool negative = from < to && *from == '-';
  p = from + (from < to && (*from == '-' || *from == '+'));
  *out = 0;
  if (p == to)
    return fail_at(e, RG_E_SYNTAX, t, line, column, "%s is \"%.*s\"; expected an integer", name,
                   shown, all);
  for (; p < to; p++) {
    if (*p < '0' || *p > '9')
      return fail_at(e, RG_E_SYNTAX, t, line, column, "%s is \"%.*s\"; expected an integer", name,
                     shown, all);
    int64_t digit = negative ? '0' - *p : *p - '0';
    if (!rgi_mul(*out, 10, out) || !rgi_add(*out, digit, out))
      return fail_at(e, RG_E_OVERFLOW, t, line, column,
                     "%s is %.*s, which leaves 64 bits; use a larger unit", name, shown, all);
  }
  return RG_OK;
}

static rg_status read_row(table *t, const char *start, int line, rg_buffer *b, rg_error *e) {
  const char *end = line_end(t, start), *p = start;
  int64_t value[NAMED] = {0};
  int at[NAMED] = {0}, count = 0;
  for (;; p++, count++) {
    const char *stop = field_end(p, end);
    if (!stop) return open_quote(e, t, line, (int)(p - start) + 1);
    if (count >= t->columns)
      return fail_at(
          e, RG_E_SYNTAX, t, line, (int)(p - start) + 1,
          "the line has more than the header's %d columns; a field that holds commas needs quotes",
          t->columns);
    for (int i = LOWER; i <= SIZE; i++)
      if (t->column[i] == count) {
        at[i] = (int)(p - start) + 1;
        RGI_TRY(read_integer(t, line, at[i], column_name[i], p, stop, &value[i], e));
      }
    p = stop;
    if (p == end) break;
  }
  if (++count < t->columns)
    return fail_at(e, RG_E_SYNTAX, t, line, (int)(end - start) + 1,
                   "the line has %d columns; the header has %d", count, t->columns);
  if (value[LOWER] > value[UPPER])
    return fail_at(e, RG_E_DATA, t, line, at[UPPER],
                   "upper is %lld, below lower, which is %lld; a life is [lower, upper)",
                   (long long)value[UPPER], (long long)value[LOWER]);
  if (value[SIZE] < 0)
    return fail_at(e, RG_E_DATA, t, line, at[SIZE], "size is %lld; expected 0 or more",
                   (long long)value[SIZE]);
  *b = (rg_buffer){value[LOWER], value[UPPER], value[SIZE], 0};
  return RG_OK;
}

static rg_status read_rows(table *t, rg_error *e) {
  const char *end = t->text + t->size;
  size_t lines = 0;
  for (const char *p = t->text; p < end; p = next_line(t, p)) lines++;
  t->row = rgi_malloc(t->ctx, (lines + 1) * sizeof *t->row);
  t->buffer = rgi_malloc(t->ctx, (lines + 1) * sizeof *t->buffer);
  if (!t->row || !t->buffer) return rgi_nomem(e);
  int number = t->header_line + 1;
  for (const char *p = next_line(t, t->header); p < end; p = next_line(t, p), number++) {
    if (blank(t, p)) continue;
    RGI_TRY(read_row(t, p, number, &t->buffer[t->n], e));
    t->row[t->n++] = p;
  }
  return RG_OK;
}

/* The line at p with its offset column replaced (offset NULL: kept) or appended. */
static void write_line(const table *t, const char *p, const char *offset, rgi_buf *out) {
  const char *end = line_end(t, p);
  for (int column = 0;; p++, column++) {
    const char *stop = field_end(p, end);
    if (column) rgi_buf_add(out, ",", 1);
    if (column == t->column[OFFSET] && offset)
      rgi_buf_add(out, offset, strlen(offset));
    else
      rgi_buf_add(out, p, (size_t)(stop - p));
    p = stop;
    if (p == end) break;
  }
  if (t->column[OFFSET] < 0) rgi_buf_printf(out, ",%s", offset ? offset : column_name[OFFSET]);
  rgi_buf_printf(out, t->carriage_return ? "\r\n" : "\n");
}

rg_status rg_pack_csv(rg_context *ctx, const char *path, const rg_pack_options *options,
                      rg_text *out, rg_pack_result *result, rg_error *error) {
  if (out) memset(out, 0, sizeof *out);
  if (result) memset(result, 0, sizeof *result);
  if (!ctx || !path || !out || !result)
    return rgi_fail(error, RG_E_USAGE, NULL, NULL, "an argument is NULL");
  table t = {.ctx = ctx, .path = path};
  rgi_buf text;
  rg_status status;
  rgi_buf_init(&text, ctx);
  RGI_GOTO(status, read_text(&t, error), done);
  RGI_GOTO(status, read_header(&t, error), done);
  RGI_GOTO(status, read_rows(&t, error), done);
  RGI_GOTO(status, rg_pack(ctx, t.buffer, t.n, options, result, error), done);
  write_line(&t, t.header, NULL, &text);
  for (size_t i = 0; i < t.n; i++) {
    char offset[24];
    snprintf(offset, sizeof offset, "%lld", (long long)t.buffer[i].offset);
    write_line(&t, t.row[i], offset, &text);
  }
  status = rgi_buf_finish(&text, out, error);
done:
  if (status != RG_OK && error && !error->file[0])
    snprintf(error->file, sizeof error->file, "%s", path);
  rgi_buf_free(&text);
  rgi_free(ctx, t.text);
  rgi_free(ctx, t.row);
  rgi_free(ctx, t.buffer);
  return status;
}
