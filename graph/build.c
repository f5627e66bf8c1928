/* graph/build.c: specs without JSON text: calls that put a document together.

   A builder holds the members of the document as the parser would have made them; rg_build_spec
   hands the tree to the loader, which checks it like any other. Here only what the parser would
   have refused is refused: names given twice, text that is not UTF-8, too much of it, and short
   texts ("q=q k=cmp_k", "T,H,D") that can't be read. The first error stays with the builder, with
   the place of the call that made it as a pointer into the document, and later calls add nothing.
 */
#include "spec.h"
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Members of an object, or elements of an array: then without keys. */
typedef struct members {
  rgi_json *item;
  const char **key;
  int32_t n, capacity;
} members;

struct rg_builder {
  rgi_arena *arena; /* owns this struct and what follows */
  const rg_context *ctx;
  const char *name; /* or NULL */
  members params, inputs, state, nodes, outputs;
  size_t size; /* bytes of text taken so far */
  rg_error error;
};

/* ---- text ---- */

/* Every text that a caller gives comes through here once. */
static rg_status check_text(rg_builder *b, const char *text, const char *what, const char *pointer,
                            const char *node) {
  if (!text) return rgi_fail(&b->error, RG_E_USAGE, pointer, node, "the %s is NULL", what);
  const unsigned char *p = (const unsigned char *)text;
  for (size_t n; *p; p += n)
    if (!(n = rgi_utf8(p)))
      return rgi_fail(&b->error, RG_E_SYNTAX, pointer, node, "the %s is not UTF-8 from byte %zu on",
                      what, (size_t)(p - (const unsigned char *)text));
  b->size += (size_t)(p - (const unsigned char *)text);
  if (b->size > RGI_FILE_LIMIT)
    return rgi_fail(&b->error, RG_E_LIMIT, pointer, node, "the spec's text is larger than 16 MiB");
  return RG_OK;
}

static rg_status copy_text(rg_builder *b, const char *from, size_t n, const char **out) {
  char *text = rgi_alloc(b->arena, n + 1);
  if (!text) return rgi_nomem(&b->error);
  memcpy(text, from, n);
  *out = text;
  return RG_OK;
}

static bool blank(char c) {
  return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

/* ---- trees ---- */

/* Appends `value`, under `key` (n bytes) where that is not NULL. */
static rg_status append(rg_builder *b, members *m, const char *key, size_t n, rgi_json value,
                        const char *pointer, const char *node) {
  const char *own = NULL;
  for (int32_t i = 0; key && i < m->n; i++)
    if (strlen(m->key[i]) == n && memcmp(m->key[i], key, n) == 0) {
      rgi_pointer p;
      rgi_shown shown;
      return rgi_fail(&b->error, RG_E_KEY, rgi_pointer_key(&p, pointer, m->key[i]), node,
                      "'%s' is given twice", rgi_show(&shown, m->key[i]));
    }
  if (key) RGI_TRY(copy_text(b, key, n, &own));
  if (m->n == m->capacity) { /* what it had stays in the arena: together no more than it has now */
    const int32_t capacity = m->capacity ? 2 * m->capacity : 4;
    rgi_json *item = rgi_alloc_n(b->arena, (size_t)capacity, sizeof *item);
    const char **keys = rgi_alloc_n(b->arena, (size_t)capacity, sizeof *keys);
    if (!item || !keys) return rgi_nomem(&b->error);
    if (m->n) memcpy(item, m->item, (size_t)m->n * sizeof *item);
    if (m->n) memcpy(keys, m->key, (size_t)m->n * sizeof *keys);
    m->item = item;
    m->key = keys;
    m->capacity = capacity;
  }
  m->item[m->n] = value;
  m->key[m->n++] = own;
  return RG_OK;
}

static rg_status put(rg_builder *b, members *m, const char *key, rgi_json value,
                     const char *pointer, const char *node) {
  return append(b, m, key, strlen(key), value, pointer, node);
}

static rgi_json tree(rgi_json_type type, const members *m) {
  return (rgi_json){.type = type, .n = m->n, .item = m->item, .key = m->key};
}

/* A string of n bytes. */
static rg_status string(rg_builder *b, const char *text, size_t n, rgi_json *out) {
  *out = (rgi_json){.type = RGI_JSON_STRING};
  return copy_text(b, text, n, &out->text);
}

/* A text that a caller gives, whole. */
static rg_status word(rg_builder *b, const char *text, const char *what, const char *pointer,
                      const char *node, rgi_json *out) {
  RGI_TRY(check_text(b, text, what, pointer, node));
  return string(b, text, strlen(text), out);
}

/* ---- short texts ---- */

/* One axis: a number where it is one, else an expression. */
static rg_status axis(rg_builder *b, const char *text, size_t n, rgi_json *out) {
  char *end;
  RGI_TRY(string(b, text, n, out));
  const char *digits = out->text + (out->text[0] == '-');
  errno = 0;
  const long long value = strtoll(out->text, &end, 10);
  if (*digits >= '0' && *digits <= '9' && !*end && !errno)
    *out = (rgi_json){.type = RGI_JSON_INT, .i = value};
  return RG_OK;
}

/* "T,H,D" → ["T", "H", "D"] */
static rg_status axes(rg_builder *b, const char *text, const char *what, const char *pointer,
                      const char *node, rgi_json *out) {
  members m = {0};
  RGI_TRY(check_text(b, text, what, pointer, node));
  while (blank(*text)) text++;
  for (bool more = *text; more;) {
    rgi_json value;
    size_t n = strcspn(text, ","), kept = n;
    while (kept > 0 && blank(text[kept - 1])) kept--;
    RGI_TRY(axis(b, text, kept, &value));
    RGI_TRY(append(b, &m, NULL, 0, value, pointer, node));
    more = text[n] == ',';
    for (text += n + more; blank(*text);) text++;
  }
  *out = tree(RGI_JSON_ARRAY, &m);
  return RG_OK;
}

/* One of "q", "q=q", "o=cmp_o+slc_o", n bytes long. */
static rg_status port(rg_builder *b, members *m, const char *text, size_t n, const char *pointer,
                      const char *node) {
  const char *equals = memchr(text, '=', n),
             *tensor = equals ? equals + 1 : text, *const end = text + n;
  const size_t key = equals ? (size_t)(equals - text) : n;
  members list = {0};
  rgi_json one = {0};
  bool good =
      key > 0 && (equals || !memchr(text, '+', n)) && !memchr(tensor, '=', (size_t)(end - tensor));
  for (bool more = good; more;) {
    const char *plus = memchr(tensor, '+', (size_t)(end - tensor)), *to = plus ? plus : end;
    good = good && to > tensor;
    RGI_TRY(string(b, tensor, (size_t)(to - tensor), &one));
    RGI_TRY(append(b, &list, NULL, 0, one, pointer, node));
    more = good && plus;
    tensor = to + 1;
  }
  if (!good) {
    rgi_shown shown;
    rgi_json whole;
    RGI_TRY(string(b, text, n, &whole));
    return rgi_fail(&b->error, RG_E_SYNTAX, pointer, node,
                    "'%s' connects no port; expected PORT, PORT=TENSOR or PORT=TENSOR+TENSOR",
                    rgi_show(&shown, whole.text));
  }
  return append(b, m, text, key, list.n == 1 ? one : tree(RGI_JSON_ARRAY, &list), pointer, node);
}

/* "q=q k=cmp_k" → { "q": "q", "k": "cmp_k" }; no member where there is nothing to say. */
static rg_status ports(rg_builder *b, members *to, const char *side, const char *text,
                       const char *at, const char *node) {
  members m = {0};
  rgi_pointer p;
  rgi_pointer_key(&p, at, side);
  if (!text) return RG_OK;
  RGI_TRY(check_text(b, text, "text of ports", p.text, node));
  for (;;) {
    size_t n = 0;
    while (blank(*text)) text++;
    while (text[n] && !blank(text[n])) n++;
    if (!n) break;
    RGI_TRY(port(b, &m, text, n, p.text, node));
    text += n;
  }
  return m.n ? put(b, to, side, tree(RGI_JSON_OBJECT, &m), at, node) : RG_OK;
}

/* A parameter or an attribute. */
static rg_status item(rg_builder *b, members *to, const rg_item *v, const char *pointer,
                      const char *node) {
  rgi_json value = {0};
  rgi_pointer p;
  RGI_TRY(check_text(b, v->name, "name", pointer, node));
  rgi_pointer_key(&p, pointer, v->name);
  switch (v->kind) {
  case RG_ITEM_INT: value = (rgi_json){.type = RGI_JSON_INT, .i = v->i}; break;
  case RG_ITEM_BOOL: value = (rgi_json){.type = RGI_JSON_BOOL, .i = v->i != 0}; break;
  case RG_ITEM_REAL:
    if (!isfinite(v->f))
      return rgi_fail(&b->error, RG_E_VALUE, p.text, node, "the value is not finite");
    value = (rgi_json){.type = RGI_JSON_REAL, .f = v->f};
    break;
  case RG_ITEM_WORD: RGI_TRY(word(b, v->text, "value", p.text, node, &value)); break;
  case RG_ITEM_LIST: RGI_TRY(axes(b, v->text, "value", p.text, node, &value)); break;
  default:
    return rgi_fail(&b->error, RG_E_USAGE, p.text, node, "there is no kind %d of item",
                    (int)v->kind);
  }
  return put(b, to, v->name, value, pointer, node);
}

/* ---- public ---- */

rg_status rg_builder_create(rg_context *ctx, const char *name, rg_builder **out, rg_error *e) {
  if (out) *out = NULL;
  if (!ctx || !out)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_builder_create needs a context and a place for the builder");
  rgi_arena *a = rgi_arena_create(ctx);
  rg_builder *b = a ? rgi_alloc(a, sizeof *b) : NULL;
  if (!b) {
    rgi_arena_destroy(a);
    return rgi_nomem(e);
  }
  b->arena = a;
  b->ctx = ctx;
  if (name && check_text(b, name, "name", "/name", NULL) == RG_OK)
    copy_text(b, name, strlen(name), &b->name);
  *out = b; /* what is wrong with the name, rg_build_spec says */
  return RG_OK;
}

void rg_builder_destroy(rg_builder *b) {
  if (b) rgi_arena_destroy(b->arena);
}

/* May this call add something? */
static rg_status ready(const rg_builder *b) {
  return b ? b->error.status : RG_E_USAGE;
}

rg_status rg_build_param(rg_builder *b, rg_item value) {
  RGI_TRY(ready(b));
  RGI_TRY(rgi_spec_limit(b->params.n + 1, "/params", "parameters", RGI_MOST_NAMES, &b->error));
  return item(b, &b->params, &value, "/params", NULL);
}

rg_status rg_build_input(rg_builder *b, const char *name, const char *shape, const char *dtype,
                         rg_grad grad) {
  members m = {0};
  rgi_json value;
  rgi_pointer at, p;
  RGI_TRY(ready(b));
  RGI_TRY(rgi_spec_limit(b->inputs.n + 1, "/inputs", "inputs", RGI_MOST_NAMES, &b->error));
  RGI_TRY(check_text(b, name, "input's name", "/inputs", NULL));
  rgi_pointer_key(&at, "/inputs", name);
  RGI_TRY(axes(b, shape, "shape", rgi_pointer_key(&p, at.text, "shape"), NULL, &value));
  RGI_TRY(put(b, &m, "shape", value, at.text, NULL));
  RGI_TRY(word(b, dtype, "dtype", rgi_pointer_key(&p, at.text, "dtype"), NULL, &value));
  RGI_TRY(put(b, &m, "dtype", value, at.text, NULL));
  switch (grad) {
  case RG_GRAD_NONE: break;
  case RG_GRAD_PLAIN:
    RGI_TRY(put(b, &m, "grad", (rgi_json){.type = RGI_JSON_BOOL, .i = 1}, at.text, NULL));
    break;
  case RG_GRAD_ACCUMULATE:
    value = (rgi_json){.type = RGI_JSON_STRING, .text = "accumulate"};
    RGI_TRY(put(b, &m, "grad", value, at.text, NULL));
    break;
  default:
    return rgi_fail(&b->error, RG_E_USAGE, rgi_pointer_key(&p, at.text, "grad"), NULL,
                    "there is no kind %d of gradient", (int)grad);
  }
  return put(b, &b->inputs, name, tree(RGI_JSON_OBJECT, &m), "/inputs", NULL);
}

rg_status rg_build_state(rg_builder *b, const char *name, const char *shape, const char *dtype,
                         const char *next) {
  members m = {0};
  rgi_json value;
  rgi_pointer at, p;
  RGI_TRY(ready(b));
  RGI_TRY(rgi_spec_limit(b->state.n + 1, "/state", "states", RGI_MOST_NAMES, &b->error));
  RGI_TRY(check_text(b, name, "state's name", "/state", NULL));
  rgi_pointer_key(&at, "/state", name);
  RGI_TRY(axes(b, shape, "shape", rgi_pointer_key(&p, at.text, "shape"), NULL, &value));
  RGI_TRY(put(b, &m, "shape", value, at.text, NULL));
  RGI_TRY(word(b, dtype, "dtype", rgi_pointer_key(&p, at.text, "dtype"), NULL, &value));
  RGI_TRY(put(b, &m, "dtype", value, at.text, NULL));
  RGI_TRY(word(b, next, "next", rgi_pointer_key(&p, at.text, "next"), NULL, &value));
  RGI_TRY(put(b, &m, "next", value, at.text, NULL));
  return put(b, &b->state, name, tree(RGI_JSON_OBJECT, &m), "/state", NULL);
}

rg_status rg_build_node(rg_builder *b, const char *name, const char *op, const char *in,
                        const char *out, const rg_item *attrs, size_t nattr) {
  members m = {0}, list = {0};
  rgi_json value;
  rgi_pointer at, p;
  RGI_TRY(ready(b));
  RGI_TRY(rgi_spec_limit(b->nodes.n + 1, "/nodes", "nodes", RGI_MOST_NODES, &b->error));
  rgi_pointer_index(&at, "/nodes", b->nodes.n);
  RGI_TRY(word(b, name, "node's name", rgi_pointer_key(&p, at.text, "name"), NULL, &value));
  RGI_TRY(put(b, &m, "name", value, at.text, name));
  RGI_TRY(word(b, op, "op", rgi_pointer_key(&p, at.text, "op"), name, &value));
  RGI_TRY(put(b, &m, "op", value, at.text, name));
  RGI_TRY(ports(b, &m, "in", in, at.text, name));
  RGI_TRY(ports(b, &m, "out", out, at.text, name));
  rgi_pointer_key(&p, at.text, "attrs");
  if (nattr && !attrs)
    return rgi_fail(&b->error, RG_E_USAGE, p.text, name, "%zu attributes, but the array is NULL",
                    nattr);
  for (size_t i = 0; i < nattr; i++) RGI_TRY(item(b, &list, &attrs[i], p.text, name));
  if (nattr) RGI_TRY(put(b, &m, "attrs", tree(RGI_JSON_OBJECT, &list), at.text, name));
  return append(b, &b->nodes, NULL, 0, tree(RGI_JSON_OBJECT, &m), at.text, name);
}

rg_status rg_build_output(rg_builder *b, const char *name, const char *tensor) {
  rgi_json value;
  rgi_pointer p;
  RGI_TRY(ready(b));
  RGI_TRY(rgi_spec_limit(b->outputs.n + 1, "/outputs", "outputs", RGI_MOST_NAMES, &b->error));
  RGI_TRY(check_text(b, name, "output's name", "/outputs", NULL));
  RGI_TRY(word(b, tensor ? tensor : name, "tensor's name", rgi_pointer_key(&p, "/outputs", name),
               NULL, &value));
  return put(b, &b->outputs, name, value, "/outputs", NULL);
}

/* The one limit of the loader that only text has: what the spec writes must load again. */
static rg_status check_size(const rg_builder *b, const rgi_json *root, rg_error *e) {
  rgi_buf text;
  rgi_buf_init(&text, b->ctx);
  rgi_json_write(root, &text);
  const bool failed = text.failed, large = text.size > RGI_FILE_LIMIT;
  rgi_buf_free(&text);
  if (failed) return rgi_nomem(e);
  return large ? rgi_fail(e, RG_E_LIMIT, NULL, NULL, "the spec's text is larger than 16 MiB")
               : RG_OK;
}

rg_status rg_build_spec(const rg_builder *b, const rg_binding *set, size_t nset, rg_spec **out,
                        rg_error *e) {
  if (out) *out = NULL;
  if (!b || !out || (nset && !set))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_build_spec needs a builder and a place for the spec");
  const char *name = b->name ? b->name : "spec", *key[7];
  const rg_status before = rgi_error_before(e);
  rg_status status = b->error.status;
  rgi_json item[7];
  int32_t n = 0;
  if (status != RG_OK && e && before == RG_OK) *e = b->error;
  if (status == RG_OK) {
    key[n] = "regraph", item[n++] = (rgi_json){.type = RGI_JSON_INT, .i = 1};
    if (b->name) key[n] = "name", item[n++] = (rgi_json){.type = RGI_JSON_STRING, .text = b->name};
    if (b->params.n) key[n] = "params", item[n++] = tree(RGI_JSON_OBJECT, &b->params);
    key[n] = "inputs", item[n++] = tree(RGI_JSON_OBJECT, &b->inputs);
    if (b->state.n) key[n] = "state", item[n++] = tree(RGI_JSON_OBJECT, &b->state);
    key[n] = "nodes", item[n++] = tree(RGI_JSON_ARRAY, &b->nodes);
    key[n] = "outputs", item[n++] = tree(RGI_JSON_OBJECT, &b->outputs);
    const rgi_json root = {.type = RGI_JSON_OBJECT, .n = n, .item = item, .key = key};
    status = check_size(b, &root, e);
    if (status == RG_OK) status = rgi_spec_from(b->ctx, &root, name, set, nset, out, e);
  }
  rgi_error_file(e, before, name);
  return status;
}
