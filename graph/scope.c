/* graph/scope.c: the names a spec's expressions may use: parameters, and the free dimensions of
   input shapes.

   A parameter is a number, a string or a truth value; a binding of the same name replaces it. Any
   other name in an input's shape is a free dimension: symbolic until bound. Attributes see
   parameters only, so that a graph's structure never depends on a dimension that changes from plan
   to plan.
 */
#include "spec.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- collecting ---- */

static bool letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}
static bool digit(char c) {
  return c >= '0' && c <= '9';
}

static rg_status collect_text(rg_spec *spec, const char *text, const char *pointer, rg_error *e) {
  while (*text) {
    if (digit(*text)) {
      while (digit(*text) || letter(*text))
        text++; /* "2x" is for the expression parser to refuse */
      continue;
    }
    if (!letter(*text)) {
      text++;
      continue;
    }
    size_t n = 0;
    while (letter(text[n]) || digit(text[n])) n++;
    char *name = rgi_alloc(spec->arena, n + 1);
    if (!name) return rgi_nomem(e);
    memcpy(name, text, n);
    text += n;
    if (n > 63 || rgi_names_get(&spec->param_index, name) >= 0) continue;
    if (spec->nfree == RGI_MOST_NAMES && rgi_names_get(&spec->free_index, name) < 0)
      return rgi_fail(e, RG_E_LIMIT, pointer, NULL, "more than %d free dimensions", RGI_MOST_NAMES);
    if (rgi_names_add(&spec->free_index, name, spec->nfree) < 0)
      spec->free_name[spec->nfree++] = name;
  }
  return RG_OK;
}

static rg_status check_param(const rg_spec *spec, int i, rg_error *e) {
  const rgi_json *v = &spec->params->item[i];
  rgi_pointer p;
  rgi_shown shown;
  const char *where = rgi_pointer_key(&p, "/params", spec->params->key[i]);
  RGI_TRY(rgi_check_identifier(spec->params->key[i], "parameter", where, e));
  if (v->type == RGI_JSON_INT || v->type == RGI_JSON_REAL || v->type == RGI_JSON_STRING ||
      v->type == RGI_JSON_BOOL)
    return RG_OK;
  return rgi_fail(e, RG_E_TYPE, where, NULL,
                  "a parameter is a number, a string or true or false, not %s",
                  rgi_json_kind(&shown, v));
}

rg_status rgi_scope_collect(rg_spec *spec, rgi_errors *all, rg_error *e) {
  rg_status wrong = RG_OK;
  rgi_pointer p;
  int nparam = spec->params ? spec->params->n : 0;
  spec->free_name = rgi_alloc_n(spec->arena, RGI_MOST_NAMES, sizeof *spec->free_name);
  if (!rgi_names_init(&spec->param_index, spec->arena, (size_t)nparam) ||
      !rgi_names_init(&spec->free_index, spec->arena, RGI_MOST_NAMES) || !spec->free_name)
    return rgi_nomem(e);
  for (int i = 0; i < nparam; i++) {
    RGI_KEEP(all, wrong, check_param(spec, i, e), e);
    rgi_names_add(&spec->param_index, spec->params->key[i], i);
  }
  for (int i = 0; i < spec->inputs->n; i++) {
    const rgi_json *in = &spec->inputs->item[i];
    const rgi_json *shape = in->type == RGI_JSON_OBJECT ? rgi_json_get(in, "shape") : NULL;
    if (!shape || shape->type != RGI_JSON_ARRAY) continue; /* reported by the elaboration */
    for (int d = 0; d < shape->n; d++)
      if (shape->item[d].type == RGI_JSON_STRING)
        RGI_TRY(collect_text(spec, shape->item[d].text, rgi_spec_input_at(spec, i, &p), e));
  }
  return wrong;
}

/* ---- bindings ---- */

/* A real number as JSON has it: unlike strtod, the same in every locale. */
static bool parse_real(rgi_arena *a, const char *text, double *out) {
  const rgi_json *list;
  char *wrapped = rgi_format(a, "[%s]", text);
  if (!wrapped || rgi_json_parse(a, wrapped, strlen(wrapped), &list, NULL) != RG_OK) return false;
  if (list->n != 1 || list->item[0].type != RGI_JSON_REAL) return false;
  *out = list->item[0].f;
  return true;
}

static rg_status bind_param(rgi_scope *s, int i, const rg_binding *b, rg_error *e) {
  rgi_json *v = &s->param[i];
  rgi_shown shown;
  char number[32];
  int64_t whole = b->value;
  double real;
  switch (v->type) {
  case RGI_JSON_STRING:
    snprintf(number, sizeof number, "%lld", (long long)b->value);
    v->text = rgi_strdup(s->arena, b->text ? b->text : number);
    return v->text ? RG_OK : rgi_nomem(e);
  case RGI_JSON_BOOL:
    if (b->text && strcmp(b->text, "true") == 0)
      whole = 1;
    else if (b->text && strcmp(b->text, "false") == 0)
      whole = 0;
    else if ((b->text && !rgi_parse_count(b->text, &whole)) || whole < 0 || whole > 1)
      return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                      "parameter '%s' is set to '%s'; expected true or false", b->name,
                      b->text ? rgi_show(&shown, b->text) : "another number");
    v->i = whole;
    return RG_OK;
  default: /* a number of either kind may stand for a number */
    if (!b->text || rgi_parse_count(b->text, &whole)) {
      v->type = RGI_JSON_INT;
      v->i = whole;
      return RG_OK;
    }
    if (!parse_real(s->arena, b->text, &real))
      return rgi_fail(e, RG_E_USAGE, NULL, NULL, "parameter '%s' is set to '%s'; expected a number",
                      b->name, rgi_show(&shown, b->text));
    v->type = RGI_JSON_REAL;
    v->f = real;
    return RG_OK;
  }
}

static rg_status bind(rgi_scope *s, const rg_binding *b, rg_error *e) {
  const rg_spec *spec = s->spec;
  rgi_shown shown, hint;
  if (!b->name) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "a binding without a name");
  int i = rgi_names_get(&spec->param_index, b->name);
  if (i >= 0) return bind_param(s, i, b, e);
  i = rgi_names_get(&spec->free_index, b->name);
  if (i < 0) {
    int nparam = spec->params ? spec->params->n : 0, n = 0;
    const char **known = rgi_alloc_n(s->arena, (size_t)(nparam + spec->nfree), sizeof *known);
    if (!known) return rgi_nomem(e);
    for (int k = 0; k < spec->nfree; k++) known[n++] = spec->free_name[k];
    for (int k = 0; k < nparam; k++) known[n++] = spec->params->key[k];
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "the spec has no dimension or parameter '%s' to set%s",
                    rgi_show(&shown, b->name), rgi_hint(&hint, b->name, known, n));
  }
  int64_t v = b->value;
  if (b->text && !rgi_parse_count(b->text, &v))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "dimension '%s' is set to '%s'; expected an integer such as 4096 or 64K",
                    b->name, rgi_show(&shown, b->text));
  if (v < 0 || v > RGI_MOST_ELEMENTS)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "dimension '%s' is set to %lld; expected 0 to 2^40",
                    b->name, (long long)v);
  s->value[i] = v;
  s->known[i] = true;
  return RG_OK;
}

rg_status rgi_scope_open(const rg_spec *spec, const rg_binding *set, size_t nset, rgi_arena *a,
                         rgi_scope *out, rg_error *e) {
  size_t nparam = spec->params ? (size_t)spec->params->n : 0;
  rgi_scope s = {.spec = spec, .arena = a};
  s.param = rgi_alloc_n(a, nparam, sizeof *s.param);
  s.value = rgi_alloc_n(a, (size_t)spec->nfree, sizeof *s.value);
  s.known = rgi_alloc_n(a, (size_t)spec->nfree, sizeof *s.known);
  if (!s.param || !s.value || !s.known) return rgi_nomem(e);
  if (nparam) memcpy(s.param, spec->params->item, nparam * sizeof *s.param);
  for (size_t i = 0; i < spec->nset; i++) RGI_TRY(bind(&s, &spec->set[i], e));
  for (size_t i = 0; i < nset; i++) RGI_TRY(bind(&s, &set[i], e));
  *out = s;
  return RG_OK;
}

/* ---- values ---- */

static rg_status unknown_param(const rgi_scope *s, const char *name, const char *pointer,
                               const char *node, rg_error *e) {
  rgi_shown shown, hint;
  const rgi_json *params = s->spec->params;
  return rgi_fail(e, RG_E_NAME, pointer, node, "there is no parameter '%s'%s",
                  rgi_show(&shown, name),
                  params ? rgi_hint(&hint, name, params->key, params->n) : "");
}

rg_status rgi_scope_value(const rgi_scope *s, const rgi_json *v, const char *pointer,
                          const char *node, const rgi_json **out, rg_error *e) {
  *out = v;
  if (v->type != RGI_JSON_STRING || v->text[0] != '$') return RG_OK;
  int i = rgi_names_get(&s->spec->param_index, v->text + 1);
  if (i < 0) return unknown_param(s, v->text + 1, pointer, node, e);
  *out = &s->param[i];
  return RG_OK;
}

static bool lookup(void *user, const char *name, rgi_dim *out) {
  rgi_scope *s = user;
  int i = rgi_names_get(&s->spec->param_index, name);
  s->odd = NULL;
  if (i >= 0) {
    if (s->param[i].type != RGI_JSON_INT) {
      s->odd = s->spec->params->key[i];
      return false;
    }
    *out = rgi_dim_of(s->param[i].i);
    return true;
  }
  i = rgi_names_get(&s->spec->free_index, name);
  if (i < 0) {
    snprintf(s->missing, sizeof s->missing, "%s", name);
    return false;
  }
  if (s->constant) {
    s->odd = s->spec->free_name[i];
    return false;
  }
  if (s->known[i]) {
    *out = rgi_dim_of(s->value[i]);
    return true;
  }
  *out = rgi_dim_symbol(s->arena, name);
  return true;
}

static rg_status expression(rgi_scope *s, const char *text, const char *pointer, const char *node,
                            rgi_dim *out, rg_error *e) {
  rg_error inner = {0};
  rgi_shown shown;
  s->odd = NULL;
  rg_status status = rgi_dim_parse(s->arena, text, lookup, s, out, &inner);
  if (status == RG_OK) return RG_OK;
  if (status == RG_E_NAME && s->odd) {
    int i = rgi_names_get(&s->spec->param_index, s->odd);
    if (i >= 0)
      return rgi_fail(e, RG_E_TYPE, pointer, node,
                      "parameter '%s' is %s; an expression needs integers", s->odd,
                      rgi_json_kind(&shown, &s->param[i]));
    return rgi_fail(
        e, RG_E_NAME, pointer, node,
        "'%s' is a free dimension; attributes may use parameters only (a reshape's shape says 0 "
        "to keep the input's extent)",
        s->odd);
  }
  /* only attributes get here: in a shape an unknown name is a free dimension */
  if (status == RG_E_NAME) {
    const rgi_json *params = s->spec->params;
    return rgi_fail(e, status, pointer, node, "%s%s", inner.message,
                    params ? rgi_hint(&shown, s->missing, params->key, params->n) : "");
  }
  char printable[sizeof inner.message];
  if (strstr(inner.message, rg_printable(text, printable, sizeof printable)))
    return rgi_fail(e, status, pointer, node, "%s", inner.message);
  return rgi_fail(e, status, pointer, node, "\"%s\": %s", rgi_show(&shown, text), inner.message);
}

rg_status rgi_scope_dim(rgi_scope *s, const rgi_json *v, const char *pointer, const char *node,
                        rgi_dim *out, rg_error *e) {
  if (v->type == RGI_JSON_INT) {
    *out = rgi_dim_of(v->i);
    return RG_OK;
  }
  rgi_shown shown;
  if (v->type != RGI_JSON_STRING)
    return rgi_fail(e, RG_E_TYPE, pointer, node,
                    "expected an integer or an expression string such as \"B+1\", not %s",
                    rgi_json_kind(&shown, v));
  s->constant = false;
  return expression(s, v->text, pointer, node, out, e);
}

rg_status rgi_scope_int(rgi_scope *s, const rgi_json *v, const char *pointer, const char *node,
                        int64_t *out, rg_error *e) {
  rgi_dim d;
  rgi_shown shown;
  bool reference = v->type == RGI_JSON_STRING && v->text[0] == '$';
  RGI_TRY(rgi_scope_value(s, v, pointer, node, &v, e));
  if (v->type == RGI_JSON_INT) {
    *out = v->i;
    return RG_OK;
  }
  if (reference || v->type != RGI_JSON_STRING)
    return rgi_fail(e, RG_E_TYPE, pointer, node, "expected an integer%s, not %s",
                    reference ? "" : " or an expression over parameters", rgi_json_kind(&shown, v));
  s->constant = true;
  RGI_TRY(expression(s, v->text, pointer, node, &d, e));
  *out = d.c;
  return RG_OK;
}
