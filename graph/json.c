/* graph/json.c: see json.h. jansson parses; this file bounds what it is given and copies what it
   returns.

   jansson keeps reference counts and takes its memory from malloc, so its tree is freed before we
   return.
 */
#include "json.h"
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

/* ---- text ---- */

const char *rgi_near(rgi_shown *s, const char *word, const char *const *candidates, int n) {
  const char *near = rg_nearest(word, candidates, n);
  s->text[0] = 0;
  if (near) snprintf(s->text, sizeof s->text, " (nearest: '%.60s')", near);
  return s->text;
}

const char *rgi_hint(rgi_shown *s, const char *word, const char *const *candidates, int n) {
  if (*rgi_near(s, word, candidates, n)) return s->text;
  size_t size = 0; /* none is near: all of them, if they are few */
  for (int i = 0; i < n; i++) {
    int more = snprintf(s->text + size, sizeof s->text - size, "%s%s",
                        i ? ", " : " (known: ", candidates[i]);
    size += (size_t)more;
    if (size + 2 > sizeof s->text) {
      s->text[0] = 0;
      return s->text;
    }
  }
  if (size) memcpy(s->text + size, ")", 2);
  return s->text;
}

bool rgi_is_identifier(const char *text) {
  size_t n = 0;
  for (; text[n]; n++) {
    char c = text[n];
    bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
    if (!letter && !(n > 0 && c >= '0' && c <= '9')) return false;
    if (n >= 64) return false;
  }
  return n > 0;
}

rg_status rgi_check_identifier(const char *text, const char *what, const char *pointer,
                               rg_error *e) {
  rgi_shown s;
  if (rgi_is_identifier(text)) return RG_OK;
  return rgi_fail(
      e, RG_E_NAME, pointer, NULL,
      "%s '%s' is not a name: expected a letter or _, then at most 63 letters, digits or _", what,
      rgi_show(&s, text));
}

static size_t append(char *to, size_t at, size_t size, const char *text) {
  while (*text && at + 1 < size) to[at++] = *text++;
  to[at] = 0;
  return at;
}

const char *rgi_pointer_key(rgi_pointer *p, const char *parent, const char *key) {
  size_t n = append(p->text, 0, sizeof p->text, parent);
  n = append(p->text, n, sizeof p->text, "/");
  for (; *key; key++) {
    char one[3] = {*key, 0, 0};
    if (*key == '~') strcpy(one, "~0");
    if (*key == '/') strcpy(one, "~1");
    n = append(p->text, n, sizeof p->text, one);
  }
  while (n > 0 && n + 1 == sizeof p->text && ((unsigned char)p->text[n - 1] & 0x80))
    p->text[--n] = 0;
  return p->text;
}

const char *rgi_pointer_set(rgi_pointer *p, const char *text) {
  append(p->text, 0, sizeof p->text, text);
  return p->text;
}

const char *rgi_pointer_index(rgi_pointer *p, const char *parent, int i) {
  char digits[16];
  snprintf(digits, sizeof digits, "/%d", i);
  size_t n = append(p->text, 0, sizeof p->text, parent);
  append(p->text, n, sizeof p->text, digits);
  return p->text;
}

/* ---- files ---- */

rg_status rgi_read_file(const rg_context *ctx, const char *path, char **data, size_t *size,
                        rg_error *e) {
  char *buffer = NULL;
  rg_status status = RG_OK;
  *data = NULL;
  *size = 0;
  if (!*path)
    return rgi_fail(e, RG_E_IO, NULL, NULL, "can't open '': the name of the file is empty");
  FILE *f = fopen(path, "rbe");
  if (!f) return rgi_fail(e, RG_E_IO, NULL, NULL, "can't open the file: %s", strerror(errno));
  size_t capacity = 0, n = 0;
  for (;;) { /* not every readable file tells its size */
    if (n == capacity) {
      size_t next = capacity ? capacity * 2 : 16384;
      char *bigger = rgi_malloc(ctx, next);
      if (!bigger) {
        status = rgi_nomem(e);
        goto fail;
      }
      if (n) memcpy(bigger, buffer, n);
      rgi_free(ctx, buffer);
      buffer = bigger;
      capacity = next;
    }
    size_t got = fread(buffer + n, 1, capacity - n, f);
    n += got;
    if (n > RGI_FILE_LIMIT) {
      status = rgi_fail(e, RG_E_LIMIT, NULL, NULL, "the file is larger than 16 MiB");
      goto fail;
    }
    if (got == 0) break;
  }
  if (ferror(f)) {
    status = rgi_fail(e, RG_E_IO, NULL, NULL, "can't read the file: %s", strerror(errno));
    goto fail;
  }
  fclose(f);
  *data = buffer;
  *size = n;
  return RG_OK;
fail:
  rgi_free(ctx, buffer);
  fclose(f);
  return status;
}

/* ---- what is checked before jansson sees the text ---- */

static rg_status fail_at(rg_error *e, rg_status status, const char *text, size_t at,
                         const char *message) {
  bool fresh = e && e->status == RG_OK;
  rgi_fail(e, status, NULL, NULL, "%s", message);
  if (fresh) rgi_text_place(text, at, &e->line, &e->column);
  return status;
}

/* A byte order mark, NUL bytes and nesting. Brackets inside strings do not count. */
static rg_status scan(const char *text, size_t size, rg_error *e) {
  int depth = 0;
  bool string = false;
  if (size >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0)
    return fail_at(e, RG_E_SYNTAX, text, 0,
                   "the text opens with a byte order mark, which JSON does not have; save it as "
                   "UTF-8 without BOM");
  for (size_t i = 0; i < size; i++) {
    char c = text[i];
    if (c == 0) return fail_at(e, RG_E_SYNTAX, text, i, "NUL byte: expected JSON text in UTF-8");
    if (string) {
      if (c == '\\' && i + 1 < size && text[i + 1]) i++;
      if (c == '"') string = false;
      continue;
    }
    if (c == '"') string = true;
    if (c == ']' || c == '}') depth--;
    if ((c == '[' || c == '{') && ++depth > RGI_DEPTH_LIMIT)
      return fail_at(e, RG_E_LIMIT, text, i, "nested deeper than 64 levels");
  }
  return RG_OK;
}

/* ---- copying the tree ---- */

static rg_status copy(rgi_arena *a, json_t *from, rgi_json *to, rg_error *e) {
  switch (json_typeof(from)) {
  case JSON_NULL: to->type = RGI_JSON_NULL; return RG_OK;
  case JSON_TRUE:
  case JSON_FALSE:
    to->type = RGI_JSON_BOOL;
    to->i = json_is_true(from);
    return RG_OK;
  case JSON_INTEGER:
    to->type = RGI_JSON_INT;
    to->i = json_integer_value(from);
    return RG_OK;
  case JSON_REAL:
    to->type = RGI_JSON_REAL;
    to->f = json_real_value(from);
    return RG_OK;
  case JSON_STRING:
    to->type = RGI_JSON_STRING;
    to->text = rgi_strdup(a, json_string_value(from));
    return to->text ? RG_OK : rgi_nomem(e);
  case JSON_ARRAY: {
    size_t n = json_array_size(from);
    rgi_json *item = rgi_alloc_n(a, n ? n : 1, sizeof *item);
    if (!item) return rgi_nomem(e);
    for (size_t i = 0; i < n; i++) RGI_TRY(copy(a, json_array_get(from, i), &item[i], e));
    to->type = RGI_JSON_ARRAY;
    to->n = (int32_t)n;
    to->item = item;
    return RG_OK;
  }
  case JSON_OBJECT: {
    size_t n = json_object_size(from), i = 0;
    rgi_json *item = rgi_alloc_n(a, n ? n : 1, sizeof *item);
    const char **key = rgi_alloc_n(a, n ? n : 1, sizeof *key);
    if (!item || !key) return rgi_nomem(e);
    for (void *it = json_object_iter(from); it && i < n;
         it = json_object_iter_next(from, it), i++) {
      if (!(key[i] = rgi_strdup(a, json_object_iter_key(it)))) return rgi_nomem(e);
      RGI_TRY(copy(a, json_object_iter_value(it), &item[i], e));
    }
    to->type = RGI_JSON_OBJECT;
    to->n = (int32_t)n;
    to->item = item;
    to->key = key;
    return RG_OK;
  }
  }
  return rgi_fail(e, RG_E_INTERNAL, NULL, NULL, "JSON value of an unknown type");
}

/* jansson's lexer does not say so when memory runs out: it drops characters and calls the token
 * invalid. If memory of the text's size can't be had now, that is the likelier story. */
static bool out_of_memory(const json_error_t *je, size_t size) {
  if (je->line < 0 || !je->text[0] || json_error_code(je) == json_error_out_of_memory) return true;
  json_malloc_t get;
  json_free_t give;
  json_get_alloc_funcs(&get, &give);
  void *probe = get(size + 64);
  give(probe);
  return !probe;
}

static rg_status fail_jansson(rg_error *e, const json_error_t *je, size_t size) {
  rg_status status = RG_E_SYNTAX;
  const char *prefix = "not JSON: ";
  const char *text = je->text;
  if (out_of_memory(je, size)) return rgi_nomem(e);
  /* behind a value jansson takes a comma, too, but does not say so */
  if (!strncmp(text, "'}' expected", 12) || !strncmp(text, "']' expected", 12))
    prefix = "not JSON: ',' or ";
  switch (json_error_code(je)) {
  case json_error_duplicate_key:
    status = RG_E_KEY;
    prefix = "";
    break;
  case json_error_null_character:
  case json_error_null_byte_in_key:
    prefix = "";
    text = "a string holds \\u0000, which has no place here";
    break;
  case json_error_numeric_overflow:
    status = RG_E_OVERFLOW;
    prefix = "";
    break;
  case json_error_invalid_utf8: prefix = "not UTF-8: "; break;
  default: break;
  }
  bool fresh = e && e->status == RG_OK;
  rgi_fail(e, status, NULL, NULL, "%s%s", prefix, text);
  if (fresh) {
    e->line = je->line;
    e->column = je->column > 0 ? je->column : 1;
  }
  return status;
}

rg_status rgi_json_parse(rgi_arena *a, const char *text, size_t size, const rgi_json **out,
                         rg_error *e) {
  json_error_t je;
  *out = NULL;
  if (size > RGI_FILE_LIMIT)
    return rgi_fail(e, RG_E_LIMIT, NULL, NULL, "the text is larger than 16 MiB");
  RGI_TRY(scan(text, size, e));
  size_t blank = 0;
  while (blank < size && text[blank] && strchr(" \t\r\n", text[blank])) blank++;
  if (blank == size)
    return rgi_fail(e, RG_E_SYNTAX, NULL, NULL, "there is no JSON in it; expected an object");
  memset(&je, 0, sizeof je);
  json_t *tree = json_loadb(text, size, JSON_REJECT_DUPLICATES, &je);
  if (!tree) return fail_jansson(e, &je, size);
  rgi_json *root = rgi_alloc(a, sizeof *root);
  rg_status status = root ? copy(a, tree, root, e) : rgi_nomem(e);
  json_decref(tree);
  if (status == RG_OK) *out = root;
  return status;
}

/* ---- reading the tree ---- */

const rgi_json *rgi_json_get(const rgi_json *object, const char *key) {
  for (int i = 0; i < object->n; i++)
    if (strcmp(object->key[i], key) == 0) return &object->item[i];
  return NULL;
}

const char *rgi_json_kind(rgi_shown *s, const rgi_json *v) {
  rgi_shown text;
  switch (v->type) {
  case RGI_JSON_NULL: snprintf(s->text, sizeof s->text, "null"); break;
  case RGI_JSON_BOOL: snprintf(s->text, sizeof s->text, v->i ? "true" : "false"); break;
  case RGI_JSON_INT: snprintf(s->text, sizeof s->text, "the integer %lld", (long long)v->i); break;
  case RGI_JSON_REAL: { /* keeps looking like one: 7.0, not 7 */
    int n = snprintf(s->text, sizeof s->text, "the real number %.17g", v->f);
    if (!strpbrk(s->text + 16, ".en")) snprintf(s->text + n, sizeof s->text - (size_t)n, ".0");
    break;
  }
  case RGI_JSON_STRING:
    snprintf(s->text, sizeof s->text, "the string '%.70s'", rgi_show(&text, v->text));
    break;
  case RGI_JSON_ARRAY: snprintf(s->text, sizeof s->text, "an array"); break;
  case RGI_JSON_OBJECT: snprintf(s->text, sizeof s->text, "an object"); break;
  }
  return s->text;
}

rg_status rgi_json_expect(const rgi_json *v, rgi_json_type type, const char *pointer,
                          const char *node, rg_error *e) {
  static const char *const kinds[] = {"null",     "true or false", "an integer", "a real number",
                                      "a string", "an array",      "an object"};
  rgi_shown s;
  if (v->type == type) return RG_OK;
  return rgi_fail(e, RG_E_TYPE, pointer, node, "expected %s, not %s", kinds[type],
                  rgi_json_kind(&s, v));
}

rg_status rgi_json_keys(const rgi_json *object, const char *what, const char *const *known,
                        int nknown, int nrequired, const char *pointer, const char *node,
                        rg_error *e) {
  RGI_TRY(rgi_json_expect(object, RGI_JSON_OBJECT, pointer, node, e));
  for (int i = 0; i < object->n; i++) {
    const char *key = object->key[i];
    bool found = false;
    for (int k = 0; k < nknown && !found; k++) found = strcmp(key, known[k]) == 0;
    if (!found) {
      rgi_pointer p;
      rgi_shown shown, hint;
      return rgi_fail(e, RG_E_KEY, rgi_pointer_key(&p, pointer, key), node,
                      "unknown key '%s' in %s%s", rgi_show(&shown, key), what,
                      rgi_hint(&hint, key, known, nknown));
    }
  }
  for (int k = 0; k < nrequired; k++)
    if (!rgi_json_get(object, known[k]))
      return rgi_fail(e, RG_E_KEY, pointer, node, "%s lacks the key '%s'", what, known[k]);
  return RG_OK;
}

rg_status rgi_json_is(const rgi_json *root, const char *key, rg_error *e) {
  static const struct {
    const char *key, *what, *how;
  } kind[] = {{"regraph", "a spec", "the command takes it as its argument"},
              {"regraph_policy", "a policy", "give it by --policy"},
              {"regraph_profile", "a device profile", "give it by --profile"}};
  const char *wanted = "";
  if (root->type != RGI_JSON_OBJECT || rgi_json_get(root, key)) return RG_OK;
  for (int i = 0; i < RGI_COUNT(kind); i++)
    if (strcmp(kind[i].key, key) == 0) wanted = kind[i].what;
  for (int i = 0; i < RGI_COUNT(kind); i++) {
    rgi_pointer at;
    if (!rgi_json_get(root, kind[i].key)) continue;
    return rgi_fail(e, RG_E_KEY, rgi_pointer_key(&at, "", kind[i].key), NULL,
                    "this is %s, not %s; %s", kind[i].what, wanted, kind[i].how);
  }
  return RG_OK;
}

rg_status rgi_json_bytes(const rgi_json *v, const char *pointer, int64_t *out, rg_error *e) {
  rgi_shown s;
  if (v->type == RGI_JSON_STRING) {
    rg_error why = {0};
    rg_status status = rg_parse_size(v->text, out, &why);
    return status == RG_OK ? RG_OK : rgi_fail(e, status, pointer, NULL, "%s", why.message);
  }
  if (v->type != RGI_JSON_INT)
    return rgi_fail(e, RG_E_TYPE, pointer, NULL,
                    "expected an integer or a string such as \"6GiB\", not %s",
                    rgi_json_kind(&s, v));
  if (v->i < 0)
    return rgi_fail(e, RG_E_VALUE, pointer, NULL, "%lld bytes; expected 0 or more",
                    (long long)v->i);
  *out = v->i;
  return RG_OK;
}

/* ---- names ---- */

static uint32_t hash(const char *s) { /* FNV-1a */
  uint32_t h = 2166136261u;
  for (; *s; s++) h = (h ^ (unsigned char)*s) * 16777619u;
  return h;
}

bool rgi_names_init(rgi_names *m, rgi_arena *a, size_t n) {
  size_t slots = 8;
  while (slots < n + n / 2 + 1) slots *= 2; /* at most two thirds full */
  m->key = rgi_alloc_n(a, slots, sizeof *m->key);
  m->value = rgi_alloc_n(a, slots, sizeof *m->value);
  m->mask = (uint32_t)(slots - 1);
  return m->key && m->value;
}

int32_t rgi_names_add(rgi_names *m, const char *key, int32_t value) {
  uint32_t i = hash(key) & m->mask;
  while (m->key[i]) {
    if (strcmp(m->key[i], key) == 0) return m->value[i];
    i = (i + 1) & m->mask;
  }
  m->key[i] = key;
  m->value[i] = value;
  return -1;
}

int32_t rgi_names_get(const rgi_names *m, const char *key) {
  for (uint32_t i = hash(key) & m->mask; m->key[i]; i = (i + 1) & m->mask)
    if (strcmp(m->key[i], key) == 0) return m->value[i];
  return -1;
}
