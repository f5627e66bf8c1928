/* graph/document.c: what can be done with a document besides parsing it: copy it, write it as JSON.

   What is written parses to the same tree: integers stay integers, reals real, keys keep their
   order. Two levels are laid out one member a line, what is deeper stands in one line: a spec's
   nodes are then a line each.
 */
#include "json.h"
#include <stdio.h>
#include <string.h>

static rg_status copy_into(rgi_arena *a, const rgi_json *from, rgi_json *to, rg_error *e) {
  *to = *from;
  if (from->type == RGI_JSON_STRING) {
    to->text = rgi_strdup(a, from->text);
    return to->text ? RG_OK : rgi_nomem(e);
  }
  if (from->type != RGI_JSON_ARRAY && from->type != RGI_JSON_OBJECT) return RG_OK;
  const size_t n = (size_t)from->n;
  rgi_json *item = rgi_alloc_n(a, n ? n : 1, sizeof *item);
  const char **key = rgi_alloc_n(a, n ? n : 1, sizeof *key);
  if (!item || !key) return rgi_nomem(e);
  for (size_t i = 0; i < n; i++) {
    if (from->type == RGI_JSON_OBJECT && !(key[i] = rgi_strdup(a, from->key[i])))
      return rgi_nomem(e);
    RGI_TRY(copy_into(a, &from->item[i], &item[i], e));
  }
  to->item = item;
  to->key = key;
  return RG_OK;
}

rg_status rgi_json_copy(rgi_arena *a, const rgi_json *from, const rgi_json **out, rg_error *e) {
  rgi_json *root = rgi_alloc(a, sizeof *root);
  *out = NULL;
  if (!root) return rgi_nomem(e);
  RGI_TRY(copy_into(a, from, root, e));
  *out = root;
  return RG_OK;
}

/* Seventeen digits tell every double from its neighbours; a dot whatever the locale; no integer. */
static void write_real(double x, rgi_buf *b) {
  char text[40];
  bool real = false;
  snprintf(text, sizeof text, "%.17g", x);
  for (char *c = text; *c; c++) {
    if (*c == ',') *c = '.';
    real = real || *c == '.' || *c == 'e';
  }
  rgi_buf_printf(b, "%s%s", text, real ? "" : ".0");
}

static void write_value(const rgi_json *v, int depth, rgi_buf *b) {
  const bool object = v->type == RGI_JSON_OBJECT, lines = depth < 2 && v->n > 0;
  switch (v->type) {
  case RGI_JSON_NULL: rgi_buf_printf(b, "null"); return;
  case RGI_JSON_BOOL: rgi_buf_printf(b, v->i ? "true" : "false"); return;
  case RGI_JSON_INT: rgi_buf_printf(b, "%lld", (long long)v->i); return;
  case RGI_JSON_REAL: write_real(v->f, b); return;
  case RGI_JSON_STRING: rgi_buf_json(b, v->text); return;
  case RGI_JSON_ARRAY:
  case RGI_JSON_OBJECT: break;
  }
  rgi_buf_printf(b, object ? "{" : "[");
  for (int i = 0; i < v->n; i++) {
    rgi_buf_printf(b, "%s", i ? "," : "");
    if (lines)
      rgi_buf_printf(b, "\n%*s", 2 * depth + 2, "");
    else
      rgi_buf_printf(b, "%s", i || object ? " " : "");
    if (object) {
      rgi_buf_json(b, v->key[i]);
      rgi_buf_printf(b, ": ");
    }
    write_value(&v->item[i], depth + 1, b);
  }
  rgi_buf_printf(b, object ? " }" : "]");
}

void rgi_json_write(const rgi_json *v, rgi_buf *b) {
  write_value(v, 0, b);
  rgi_buf_printf(b, "\n");
}
