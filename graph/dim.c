/* graph/dim.c: extents as integer polynomials over unbound names, and the expressions that specs
   write them in.

   A polynomial is a constant plus terms sorted by atom; an atom is a product of factors joined by
   '*', sorted, where a factor is a name or a parenthesised quotient such as ((T+1)/16). So equal
   polynomials have equal representations up to what floor division hides.
 */
#include "ir.h"
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TERMS = 64, MOST_DEPTH = 64, MOST_FACTORS = 16 };

bool rgi_dim_equal(rgi_dim a, rgi_dim b) {
  if (a.c != b.c || a.nterm != b.nterm) return false;
  for (int i = 0; i < a.nterm; i++)
    if (a.term[i].coef != b.term[i].coef || strcmp(a.term[i].atom, b.term[i].atom) != 0)
      return false;
  return true;
}

static rg_status overflow(rg_error *e) {
  return rgi_fail(e, RG_E_OVERFLOW, NULL, NULL,
                  "the expression leaves the range of 64-bit integers");
}

rgi_dim rgi_dim_symbol(rgi_arena *a, const char *name) {
  rgi_term *t = rgi_alloc(a, sizeof *t);
  char *atom = rgi_strdup(a, name);
  if (!t || !atom) return (rgi_dim){.nterm = -1};
  *t = (rgi_term){.coef = 1, .atom = atom};
  return (rgi_dim){.nterm = 1, .term = t};
}

/* x + sign·y, merging sorted terms. */
static rg_status add(rgi_arena *a, rgi_dim x, rgi_dim y, int64_t sign, rgi_dim *out, rg_error *e) {
  int64_t yc;
  rgi_dim r = {0};
  if (!rgi_mul(y.c, sign, &yc) || !rgi_add(x.c, yc, &r.c)) return overflow(e);
  if (x.nterm + y.nterm > 0) {
    rgi_term *t = rgi_alloc_n(a, (size_t)(x.nterm + y.nterm), sizeof *t);
    if (!t) return rgi_nomem(e);
    int i = 0, j = 0, n = 0;
    while (i < x.nterm || j < y.nterm) {
      int order = i == x.nterm ? 1 : j == y.nterm ? -1 : strcmp(x.term[i].atom, y.term[j].atom);
      int64_t coef = 0;
      const char *atom = order <= 0 ? x.term[i].atom : y.term[j].atom;
      if (order >= 0 && !rgi_mul(y.term[j++].coef, sign, &coef)) return overflow(e);
      if (order <= 0 && !rgi_add(x.term[i++].coef, coef, &coef)) return overflow(e);
      if (coef) t[n++] = (rgi_term){.coef = coef, .atom = atom};
    }
    if (n > MOST_TERMS)
      return rgi_fail(e, RG_E_LIMIT, NULL, NULL, "the expression has more than %d terms",
                      MOST_TERMS);
    r.term = t;
    r.nterm = n;
  }
  *out = r;
  return RG_OK;
}

static int by_text(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Splits at '*' outside parentheses; returns the number of factors or -1 if there are too many. */
static int factors_of(char *atom, char **factor, int n) {
  int depth = 0;
  char *start = atom;
  for (char *p = atom;; p++) {
    if (*p == '(') depth++;
    if (*p == ')') depth--;
    if (*p == 0 || (*p == '*' && depth == 0)) {
      if (n == MOST_FACTORS) return -1;
      bool end = *p == 0;
      *p = 0;
      factor[n++] = start;
      start = p + 1;
      if (end) return n;
    }
  }
}

static rg_status atom_product(rgi_arena *a, const char *x, const char *y, const char **out,
                              rg_error *e) {
  char *cx = rgi_strdup(a, x), *cy = rgi_strdup(a, y), *factor[MOST_FACTORS];
  char *text = rgi_alloc(a, strlen(x) + strlen(y) + 2);
  if (!cx || !cy || !text) return rgi_nomem(e);
  int n = factors_of(cx, factor, 0);
  if (n >= 0) n = factors_of(cy, factor, n);
  if (n < 0)
    return rgi_fail(e, RG_E_LIMIT, NULL, NULL, "the expression multiplies more than %d names",
                    MOST_FACTORS);
  qsort(factor, (size_t)n, sizeof *factor, by_text);
  char *p = text;
  for (int i = 0; i < n; i++) p += sprintf(p, "%s%s", i ? "*" : "", factor[i]);
  *out = text;
  return RG_OK;
}

static rg_status multiply(rgi_arena *a, rgi_dim x, rgi_dim y, rgi_dim *out, rg_error *e) {
  rgi_dim sum = {0};
  /* y's constant times x, then each term of y times x */
  for (int j = -1; j < y.nterm; j++) {
    int64_t k = j < 0 ? y.c : y.term[j].coef;
    rgi_dim part = {0};
    rgi_term *t = rgi_alloc_n(a, (size_t)x.nterm + 1, sizeof *t);
    if (!t) return rgi_nomem(e);
    int64_t c;
    if (!rgi_mul(x.c, k, &c)) return overflow(e);
    int n = 0;
    if (j < 0)
      part.c = c;
    else if (c)
      t[n++] = (rgi_term){.coef = c, .atom = y.term[j].atom};
    for (int i = 0; i < x.nterm && k; i++) {
      rgi_term product = {.atom = x.term[i].atom};
      if (!rgi_mul(x.term[i].coef, k, &product.coef)) return overflow(e);
      if (j >= 0) RGI_TRY(atom_product(a, x.term[i].atom, y.term[j].atom, &product.atom, e));
      rgi_dim one = {.nterm = 1, .term = &product};
      rgi_term *keep = rgi_alloc(a, sizeof *keep);
      if (!keep) return rgi_nomem(e);
      *keep = product;
      one.term = keep;
      RGI_TRY(add(a, part, one, 1, &part, e));
    }
    if (n) {
      rgi_dim one = {.nterm = 1, .term = t};
      RGI_TRY(add(a, part, one, 1, &part, e));
    }
    RGI_TRY(add(a, sum, part, 1, &sum, e));
  }
  *out = sum;
  return RG_OK;
}

static int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

static rg_status divide(rgi_arena *a, rgi_dim x, rgi_dim y, rgi_dim *out, rg_error *e) {
  if (rgi_dim_known(y) && y.c == 0) return rgi_fail(e, RG_E_VALUE, NULL, NULL, "division by zero");
  if (rgi_dim_known(x) && rgi_dim_known(y)) {
    if (x.c == INT64_MIN && y.c == -1) return overflow(e);
    *out = rgi_dim_of(floor_div(x.c, y.c));
    return RG_OK;
  }
  if (rgi_dim_equal(x, y)) {
    *out = rgi_dim_of(1);
    return RG_OK;
  }
  if (rgi_dim_known(y) &&
      y.c > 0) { /* exact where every coefficient divides: the constant alone is floored */
    bool exact = true;
    for (int i = 0; i < x.nterm; i++) exact = exact && x.term[i].coef % y.c == 0;
    if (exact) {
      rgi_term *t = rgi_alloc_n(a, (size_t)x.nterm, sizeof *t);
      if (!t) return rgi_nomem(e);
      for (int i = 0; i < x.nterm; i++)
        t[i] = (rgi_term){.coef = x.term[i].coef / y.c, .atom = x.term[i].atom};
      *out = (rgi_dim){.c = floor_div(x.c, y.c), .term = t, .nterm = x.nterm};
      return RG_OK;
    }
  }
  char top[256], bottom[256];
  rgi_dim_text(x, top, sizeof top);
  rgi_dim_text(y, bottom, sizeof bottom);
  if (strlen(top) + 1 == sizeof top || strlen(bottom) + 1 == sizeof bottom)
    return rgi_fail(e, RG_E_LIMIT, NULL, NULL,
                    "the expression divides sums longer than %d characters", (int)sizeof top - 2);
  bool sum_x = x.nterm + (x.c != 0) > 1, sum_y = !rgi_dim_known(y);
  rgi_term *t = rgi_alloc(a, sizeof *t);
  char *atom = rgi_format(
      a, sum_x ? (sum_y ? "((%s)/(%s))" : "((%s)/%s)") : (sum_y ? "(%s/(%s))" : "(%s/%s)"), top,
      bottom);
  if (!t || !atom) return rgi_nomem(e);
  *t = (rgi_term){.coef = 1, .atom = atom};
  *out = (rgi_dim){.term = t, .nterm = 1};
  return RG_OK;
}

rg_status rgi_dim_binary(rgi_arena *a, char op, rgi_dim x, rgi_dim y, rgi_dim *out, rg_error *e) {
  switch (op) {
  case '+': return add(a, x, y, 1, out, e);
  case '-': return add(a, x, y, -1, out, e);
  case '*': return multiply(a, x, y, out, e);
  case '/': return divide(a, x, y, out, e);
  default: return rgi_fail(e, RG_E_INTERNAL, NULL, NULL, "no operator '%c'", op);
  }
}

const char *rgi_dim_text(rgi_dim d, char *buffer, size_t size) {
  size_t n = 0;
  buffer[0] = 0;
  for (int i = 0; i < d.nterm && n < size; i++) {
    rgi_term t = d.term[i];
    const char *sign = t.coef < 0 ? "-" : i ? "+" : "";
    uint64_t k = t.coef < 0 ? 0 - (uint64_t)t.coef : (uint64_t)t.coef;
    if (k == 1)
      n += (size_t)snprintf(buffer + n, size - n, "%s%s", sign, t.atom);
    else
      n += (size_t)snprintf(buffer + n, size - n, "%s%llu*%s", sign, (unsigned long long)k, t.atom);
  }
  if ((d.c || d.nterm == 0) && n < size)
    snprintf(buffer + n, size - n, d.nterm && d.c > 0 ? "+%lld" : "%lld", (long long)d.c);
  return buffer;
}

/* ---- parser ----
 *
 *   sum     := product (('+'|'-') product)*
 *   product := unary (('*'|'/') unary)*
 *   unary   := '-' unary | atom */

typedef struct parser {
  rgi_arena *a;
  const char *text, *p;
  rgi_dim_lookup lookup;
  void *user;
  rg_error *e;
  int depth;
} parser;

static void skip_space(parser *s) {
  while (*s->p == ' ' || *s->p == '\t') s->p++;
}

static rg_status parse_sum(parser *s, rgi_dim *out);

static rg_status parse_atom(parser *s, rgi_dim *out) {
  skip_space(s);
  if (*s->p == '(') {
    s->p++;
    RGI_TRY(parse_sum(s, out));
    skip_space(s);
    if (*s->p != ')')
      return rgi_fail(s->e, RG_E_VALUE, NULL, NULL, "expression \"%.80s\" lacks a ')'", s->text);
    s->p++;
    return RG_OK;
  }
  if (isdigit((unsigned char)*s->p)) {
    int64_t v = 0;
    for (; isdigit((unsigned char)*s->p); s->p++)
      if (!rgi_mul(v, 10, &v) || !rgi_add(v, *s->p - '0', &v)) return overflow(s->e);
    *out = rgi_dim_of(v);
    return RG_OK;
  }
  if (isalpha((unsigned char)*s->p) || *s->p == '_') {
    char name[65];
    size_t n = 0;
    for (; isalnum((unsigned char)*s->p) || *s->p == '_'; s->p++)
      if (n < sizeof name - 1) name[n++] = *s->p;
    name[n] = 0;
    if (n == sizeof name - 1)
      return rgi_fail(s->e, RG_E_VALUE, NULL, NULL,
                      "a name in \"%.80s\" is longer than 63 characters", s->text);
    if (!s->lookup(s->user, name, out))
      return rgi_fail(s->e, RG_E_NAME, NULL, NULL,
                      "expression \"%.80s\" uses the unknown name \"%s\"", s->text, name);
    return out->nterm < 0 ? rgi_nomem(s->e) : RG_OK;
  }
  if (*s->p == 0)
    return rgi_fail(s->e, RG_E_VALUE, NULL, NULL,
                    "expression \"%.80s\" ends where a number or name is expected", s->text);
  return rgi_fail(s->e, RG_E_VALUE, NULL, NULL,
                  "expression \"%.80s\" has an unexpected character at position %d; numbers, "
                  "names, + - * / and "
                  "parentheses are allowed",
                  s->text, (int)(s->p - s->text) + 1);
}

static rg_status parse_unary(parser *s, rgi_dim *out) {
  if (++s->depth > MOST_DEPTH)
    return rgi_fail(s->e, RG_E_LIMIT, NULL, NULL, "an expression is nested deeper than %d",
                    MOST_DEPTH);
  skip_space(s);
  if (*s->p == '-') {
    s->p++;
    RGI_TRY(parse_unary(s, out));
    RGI_TRY(add(s->a, rgi_dim_of(0), *out, -1, out, s->e));
  } else {
    RGI_TRY(parse_atom(s, out));
  }
  s->depth--;
  return RG_OK;
}

static rg_status parse_product(parser *s, rgi_dim *out) {
  RGI_TRY(parse_unary(s, out));
  for (skip_space(s); *s->p == '*' || *s->p == '/'; skip_space(s)) {
    char op = *s->p++;
    rgi_dim right;
    RGI_TRY(parse_unary(s, &right));
    RGI_TRY(rgi_dim_binary(s->a, op, *out, right, out, s->e));
  }
  return RG_OK;
}

static rg_status parse_sum(parser *s, rgi_dim *out) {
  RGI_TRY(parse_product(s, out));
  for (skip_space(s); *s->p == '+' || *s->p == '-'; skip_space(s)) {
    char op = *s->p++;
    rgi_dim right;
    RGI_TRY(parse_product(s, &right));
    RGI_TRY(rgi_dim_binary(s->a, op, *out, right, out, s->e));
  }
  return RG_OK;
}

rg_status rgi_dim_parse(rgi_arena *a, const char *text, rgi_dim_lookup lookup, void *user,
                        rgi_dim *out, rg_error *e) {
  parser s = {.a = a, .text = text, .p = text, .lookup = lookup, .user = user, .e = e};
  RGI_TRY(parse_sum(&s, out));
  skip_space(&s);
  if (*s.p)
    return rgi_fail(e, RG_E_VALUE, NULL, NULL,
                    "expression \"%.80s\" has an unexpected character at position %d", text,
                    (int)(s.p - text) + 1);
  return RG_OK;
}
