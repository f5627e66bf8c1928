/* tests/unit/test_build.c: specs built by calls are the specs that JSON text gives: the same plans,
   byte for byte, the same errors, word for word; and what a spec writes as JSON loads to the same
   again.

   `rebuild` turns any document into builder calls, where they can say it. Errors of the builder's
   own stand in tests/golden/build.txt; with RG_GOLDEN_UPDATE set that file is rewritten, and the
   test still fails.
 */
#include "graph/json.h"
#include "run_util.h"

#include <dirent.h>
#include <math.h>
#include <unistd.h>

enum { MOST_FILES = 512, MOST_ATTRS = 32 };

static rg_context *ctx;
static void setup(void) {
  rg_error e = {0};
  cr_assert_eq(chdir(RG_SOURCE_DIR), 0);
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
}
static void teardown(void) {
  rg_context_destroy(ctx);
}

static char *slurp(const char *path) { /* NULL if there is no such file */
  FILE *f = fopen(path, "rb");
  if (!f) return NULL;
  char *text = calloc(1, 1 << 20);
  cr_assert_lt(fread(text, 1, 1 << 20, f), (size_t)1 << 20);
  fclose(f);
  return text;
}

/* Files of a folder that end in .json but not in .policy.json. */
static int specs_in(const char *folder, char **path) {
  DIR *d = opendir(folder);
  int n = 0;
  cr_assert(d);
  for (struct dirent *entry; (entry = readdir(d));) {
    const char *dot = strchr(entry->d_name, '.');
    if (!dot || strcmp(dot, ".json") != 0) continue;
    cr_assert_lt(n, (int)MOST_FILES);
    path[n] = malloc(strlen(folder) + strlen(entry->d_name) + 2);
    sprintf(path[n++], "%s/%s", folder, entry->d_name);
  }
  closedir(d);
  return n;
}

/* ---- from a document to calls ---- */

/* Appends `v`, a string or an integer, to a short text in which `special` separates. */
static bool add_short(char *text, const char *separator, const rgi_json *v, const char *special) {
  const size_t n = strlen(text);
  char number[32];
  const char *s = v->text;
  if (v->type == RGI_JSON_INT) {
    sprintf(number, "%lld", (long long)v->i);
    s = number;
  } else if (v->type != RGI_JSON_STRING || v->text[0] == 0 || strpbrk(v->text, special)) {
    return false;
  }
  return snprintf(text + n, 4096 - n, "%s%s", n ? separator : "", s) < (int)(4096 - n);
}

static bool short_list(const rgi_json *v, char *text) {
  text[0] = 0;
  if (v->type != RGI_JSON_ARRAY) return false;
  for (int i = 0; i < v->n; i++)
    if (!add_short(text, ",", &v->item[i], ", \t\r\n")) return false;
  return true;
}

static bool short_ports(const rgi_json *v, char *text) {
  text[0] = 0;
  /* {} is pointed into, nothing is not */
  if (v && (v->type != RGI_JSON_OBJECT || v->n == 0)) return false;
  for (int i = 0; v && i < v->n; i++) {
    const rgi_json key = {.type = RGI_JSON_STRING, .text = v->key[i]}, *to = &v->item[i];
    const int n = to->type == RGI_JSON_ARRAY ? to->n : 1;
    if (n == 0 || (n == 1 && to->type == RGI_JSON_ARRAY))
      return false; /* a list of one is pointed into otherwise */
    if (!add_short(text, " ", &key, "=+ \t\r\n")) return false;
    for (int k = 0; k < n; k++) {
      const rgi_json *one = to->type == RGI_JSON_ARRAY ? &to->item[k] : to;
      if (one->type != RGI_JSON_STRING || !add_short(text, k ? "+" : "=", one, "=+ \t\r\n"))
        return false;
    }
  }
  return true;
}

static bool item_of(const char *name, const rgi_json *v, char *text, rg_item *out) {
  switch (v->type) {
  case RGI_JSON_INT: *out = rg_int(name, v->i); return true;
  case RGI_JSON_REAL: *out = rg_real(name, v->f); return true;
  case RGI_JSON_BOOL: *out = rg_bool(name, v->i); return true;
  case RGI_JSON_STRING: *out = rg_word(name, v->text); return true;
  case RGI_JSON_ARRAY: *out = rg_list(name, text); return short_list(v, text);
  default: return false;
  }
}

static const char *string_in(const rgi_json *object, const char *key) {
  const rgi_json *v = object->type == RGI_JSON_OBJECT ? rgi_json_get(object, key) : NULL;
  return v && v->type == RGI_JSON_STRING ? v->text : NULL;
}
static bool only(const rgi_json *object, const char *keys) { /* " a b " */
  char spaced[96];
  for (int i = 0; i < object->n; i++) {
    snprintf(spaced, sizeof spaced, " %.90s ", object->key[i]);
    if (!strstr(keys, spaced)) return false;
  }
  return true;
}

static bool rebuild_input(rg_builder *b, const char *name, const rgi_json *v) {
  char shape[4096];
  const char *dtype = string_in(v, "dtype");
  if (!dtype || !only(v, " shape dtype grad ") || !rgi_json_get(v, "shape")) return false;
  const rgi_json *grad = rgi_json_get(v, "grad");
  const bool sum = grad && grad->type == RGI_JSON_STRING && strcmp(grad->text, "accumulate") == 0;
  if (grad && !sum && grad->type != RGI_JSON_BOOL) return false;
  if (!short_list(rgi_json_get(v, "shape"), shape)) return false;
  rg_build_input(b, name, shape, dtype,
                 sum               ? RG_GRAD_ACCUMULATE
                 : grad && grad->i ? RG_GRAD_PLAIN
                                   : RG_GRAD_NONE);
  return true;
}

static bool rebuild_state(rg_builder *b, const char *name, const rgi_json *v) {
  char shape[4096];
  const char *dtype = string_in(v, "dtype"), *next = string_in(v, "next");
  const rgi_json *extents = rgi_json_get(v, "shape");
  if (!dtype || !next || !only(v, " shape dtype next ") || !extents) return false;
  if (!short_list(extents, shape)) return false;
  rg_build_state(b, name, shape, dtype, next);
  return true;
}

static bool rebuild_node(rg_builder *b, const rgi_json *v) {
  static char in[4096], out[4096], text[MOST_ATTRS][4096];
  rg_item item[MOST_ATTRS];
  const char *name = string_in(v, "name"), *op = string_in(v, "op");
  if (!name || !op || !only(v, " name op in out attrs ")) return false;
  const rgi_json *attrs = rgi_json_get(v, "attrs");
  if (attrs && (attrs->type != RGI_JSON_OBJECT || attrs->n > MOST_ATTRS || attrs->n == 0))
    return false;
  if (!short_ports(rgi_json_get(v, "in"), in) || !short_ports(rgi_json_get(v, "out"), out))
    return false;
  for (int i = 0; attrs && i < attrs->n; i++)
    if (!item_of(attrs->key[i], &attrs->item[i], text[i], &item[i])) return false;
  rg_build_node(b, name, op, in, out, item, attrs ? (size_t)attrs->n : 0);
  return true;
}

/* NULL: the document says what calls can't. */
static rg_builder *rebuild(const rgi_json *root) {
  rg_builder *b;
  rg_error e = {0};
  bool good = root->type == RGI_JSON_OBJECT &&
              only(root, " regraph name params inputs state nodes outputs ");
  const rgi_json *part[4] = {NULL};
  static const char *const key[] = {"params", "inputs", "nodes", "outputs"};
  for (int i = 0; i < 4 && good; i++) {
    part[i] = rgi_json_get(root, key[i]);
    good = part[i] ? part[i]->type == (i == 2 ? RGI_JSON_ARRAY : RGI_JSON_OBJECT) : i == 0;
  }
  const rgi_json *state = good ? rgi_json_get(root, "state") : NULL;
  if (state && state->type != RGI_JSON_OBJECT) return NULL;
  const rgi_json *version = good ? rgi_json_get(root, "regraph") : NULL;
  if (!version || version->type != RGI_JSON_INT || version->i != 1) return NULL;
  CR_OK(rg_builder_create(ctx, string_in(root, "name"), &b, &e), &e);
  for (int i = 0; part[0] && i < part[0]->n && good; i++) {
    rg_item item;
    char text[4096];
    good = item_of(part[0]->key[i], &part[0]->item[i], text, &item);
    if (good) rg_build_param(b, item);
  }
  for (int i = 0; i < part[1]->n && good; i++)
    good = rebuild_input(b, part[1]->key[i], &part[1]->item[i]);
  for (int i = 0; state && i < state->n && good; i++)
    good = rebuild_state(b, state->key[i], &state->item[i]);
  for (int i = 0; i < part[2]->n && good; i++) good = rebuild_node(b, &part[2]->item[i]);
  for (int i = 0; i < part[3]->n && good; i++) {
    good = part[3]->item[i].type == RGI_JSON_STRING;
    if (good) rg_build_output(b, part[3]->key[i], part[3]->item[i].text);
  }
  if (good) return b;
  rg_builder_destroy(b);
  return NULL;
}

/* A block of copies: by calls, one writes the loop. */
static bool repeats(const rgi_json *root) {
  const rgi_json *nodes = rgi_json_get(root, "nodes");
  for (int i = 0; nodes && i < nodes->n; i++)
    if (rgi_json_get(&nodes->item[i], "repeat")) return true;
  return false;
}

/* ---- the same plans ---- */

static char *plan_json(const rg_spec *spec, const rg_policy *policy, bool state) {
  rg_binding set[] = {
      {"T", 640, NULL}, {"B", 3, NULL}, {"M", 5, NULL}, {"P", 7, NULL}, {"F", 1, NULL}};
  rg_plan_options o = {.set = set, .nset = state ? 5 : 2, .threads = 2, .pack_seconds = 5};
  rg_plan *plan;
  rg_text text;
  rg_error e = {0};
  CR_OK(rg_plan_create(spec, policy, &o, &plan, &e), &e);
  CR_OK(rg_plan_write(plan, "json", &text, &e), &e);
  char *copy = strdup(text.data);
  rg_text_destroy(&text);
  rg_plan_destroy(plan);
  return copy;
}

Test(build, every_example_gives_the_same_plan, .init = setup, .fini = teardown) {
  char *path[MOST_FILES];
  const int n = specs_in("examples", path);
  rg_error e = {0};
  rg_policy *policy[2];
  CR_OK(rg_policy_load_file(ctx, "examples/policies/all.json", &policy[0], &e), &e);
  policy[1] = NULL;
  cr_assert_geq(n, 8);
  for (int i = 0; i < n; i++) {
    char *text = slurp(path[i]);
    rgi_arena *a = rgi_arena_create(ctx);
    const rgi_json *root;
    rg_spec *spec[3];
    rg_text written[3];
    CR_OK(rgi_json_parse(a, text, strlen(text), &root, &e), &e);
    if (repeats(root)) {
      rgi_arena_destroy(a);
      free(text);
      free(path[i]);
      continue;
    }
    rg_builder *b = rebuild(root);
    cr_assert(b, "%s can't be built by calls", path[i]);
    CR_OK(rg_spec_load_file(ctx, path[i], NULL, 0, &spec[0], &e), &e);
    CR_OK(rg_build_spec(b, NULL, 0, &spec[1], &e), &e);
    rg_builder_destroy(b);
    CR_OK(rg_spec_write(spec[1], "json", &written[1], &e), &e);
    CR_OK(
        rg_spec_load_text(ctx, written[1].data, written[1].size, "written", NULL, 0, &spec[2], &e),
        &e);
    for (int k = 0; k < 3; k += 2) {
      CR_OK(rg_spec_write(spec[k], "json", &written[k], &e), &e);
      cr_assert_str_eq(written[k].data, written[1].data, "%s", path[i]);
    }
    for (int p = 0; p < 2; p++) {
      char *json[3];
      for (int k = 0; k < 3; k++)
        json[k] = plan_json(spec[k], policy[p], rgi_json_get(root, "state"));
      cr_assert_str_eq(json[1], json[0], "%s: built and loaded", path[i]);
      cr_assert_str_eq(json[2], json[0], "%s: built, written and loaded", path[i]);
      for (int k = 0; k < 3; k++) free(json[k]);
    }
    for (int k = 0; k < 3; k++) rg_text_destroy(&written[k]), rg_spec_destroy(spec[k]);
    rgi_arena_destroy(a);
    free(text);
    free(path[i]);
  }
  rg_policy_destroy(policy[0]);
}

/* What parses and what is written, over everything JSON has. */
Test(build, written_documents_parse_to_themselves, .init = setup, .fini = teardown) {
  static const char *const text[] = {
      "{\"regraph\":1,\"inputs\":{},\"nodes\":[],\"outputs\":{}}",
      "{\"a\":[],\"b\":{},\"c\":[[],{},[{\"d\":[1,-2,0]}]]}",
      "{\"e\":\"\\\"\\\\\\n\\t\\u0001\\u00e9\\ud83d\\ude00\"}",
      "[0.1,1.0,-0.0,1e300,2.5e-308,5e-324,0.30000000000000004,123456789012345680.0,100000.0]",
      "[9223372036854775807,-9223372036854775808,true,false,null]"};
  for (size_t i = 0; i < sizeof text / sizeof *text; i++) {
    rgi_arena *a = rgi_arena_create(ctx);
    const rgi_json *tree[2];
    rg_error e = {0};
    rgi_buf b[2];
    CR_OK(rgi_json_parse(a, text[i], strlen(text[i]), &tree[0], &e), &e);
    for (int k = 0; k < 2; k++) {
      rgi_buf_init(&b[k], ctx);
      rgi_json_write(tree[k], &b[k]);
      if (k == 0) CR_OK(rgi_json_parse(a, b[0].data, b[0].size, &tree[1], &e), &e);
    }
    cr_assert_eq(b[0].size, b[1].size);
    cr_assert_eq(memcmp(b[0].data, b[1].data, b[0].size), 0);
    if (tree[0]->type == RGI_JSON_ARRAY)
      for (int k = 0; k < tree[0]->n; k++) { /* the values themselves, bit for bit */
        cr_assert_eq(tree[0]->item[k].type, tree[1]->item[k].type, "%d", k);
        cr_assert_eq(tree[0]->item[k].i, tree[1]->item[k].i, "%d", k);
      }
    for (int k = 0; k < 2; k++) rgi_buf_free(&b[k]);
    rgi_arena_destroy(a);
  }
}

/* ---- the same errors ---- */

static size_t bindings(char *text, rg_binding *set) { /* lines NAME=VALUE, cut up in place */
  size_t n = 0;
  for (char *line = text ? strtok(text, "\n") : NULL; line; line = strtok(NULL, "\n")) {
    char *value = strchr(line, '=');
    cr_assert(value && n < 16);
    *value = 0;
    set[n++] = (rg_binding){.name = line, .text = value + 1};
  }
  return n;
}

Test(build, golden_errors_come_back_word_for_word, .init = setup, .fini = teardown) {
  char *path[MOST_FILES], set_path[512];
  const int n = specs_in("tests/golden/errors", path);
  int compared = 0;
  for (int i = 0; i < n; i++) {
    char *text = slurp(path[i]);
    snprintf(set_path, sizeof set_path, "%.*s.set", (int)strlen(path[i]) - 5, path[i]);
    char *set_text = slurp(set_path);
    rg_binding set[16];
    const size_t nset = bindings(set_text, set);
    rgi_arena *a = rgi_arena_create(ctx);
    const rgi_json *root = NULL;
    rg_error was = {0}, is = {0};
    rg_spec *spec;
    rg_builder *b =
        rgi_json_parse(a, text, strlen(text), &root, NULL) == RG_OK ? rebuild(root) : NULL;
    if (b && rg_spec_load_text(ctx, text, strlen(text), "file", set, nset, &spec, &was) != RG_OK) {
      cr_assert_eq(rg_build_spec(b, set, nset, &spec, &is), was.status, "%s: %s", path[i],
                   is.message);
      cr_assert_null(spec);
      cr_assert_str_eq(is.message, was.message, "%s", path[i]);
      cr_assert_str_eq(is.pointer, was.pointer, "%s", path[i]);
      cr_assert_str_eq(is.node, was.node, "%s", path[i]);
      compared++;
    } else if (b) { /* the fault is the policy's */
      rg_spec_destroy(spec);
    }
    rg_builder_destroy(b);
    rgi_arena_destroy(a);
    free(set_text);
    free(text);
    free(path[i]);
  }
  cr_assert_gt(compared, 60, "%d of %d", compared, n);
}

/* ---- the builder's own errors ---- */

static void good(rg_builder *b) { /* a spec that is right so far */
  const rg_item attrs[] = {rg_word("act", "softmax")};
  rg_build_param(b, rg_int("H", 4));
  rg_build_input(b, "x", "T,H,8", "f32", RG_GRAD_PLAIN);
  rg_build_input(b, "gate", "T,H,2", "f32", RG_GRAD_NONE);
  rg_build_node(b, "mix", "combine", "o=x+x gate", "o=y", attrs, 1);
  rg_build_output(b, "y", NULL);
}

static void twice_param(rg_builder *b) {
  rg_build_param(b, rg_real("H", 1));
}
static void twice_input(rg_builder *b) {
  rg_build_input(b, "x", "T", "f32", RG_GRAD_NONE);
}
static void twice_output(rg_builder *b) {
  rg_build_output(b, "y", "x");
}
static void twice_port(rg_builder *b) {
  rg_build_node(b, "n", "add", "a=x a=y", NULL, NULL, 0);
}
static void twice_attr(rg_builder *b) {
  const rg_item attrs[] = {rg_int("dim", 1), rg_int("dim", 2)};
  rg_build_node(b, "n", "slice", "x", NULL, attrs, 2);
}
static void port_without_tensor(rg_builder *b) {
  rg_build_node(b, "n", "add", "a=", NULL, NULL, 0);
}
static void port_without_name(rg_builder *b) {
  rg_build_node(b, "n", "add", NULL, "  =x", NULL, 0);
}
static void port_with_a_hole(rg_builder *b) {
  rg_build_node(b, "n", "add", "a=x++y", NULL, NULL, 0);
}
static void port_ends_in_plus(rg_builder *b) {
  rg_build_node(b, "n", "add", "a=x+", NULL, NULL, 0);
}
static void port_with_two_equals(rg_builder *b) {
  rg_build_node(b, "n", "add", "a=x=y", NULL, NULL, 0);
}
static void port_is_a_sum(rg_builder *b) {
  rg_build_node(b, "n", "add", "x+y", NULL, NULL, 0);
}
static void port_without_blank(rg_builder *b) {
  rg_build_node(b, "n", "add", "a=x,gate=y", NULL, NULL, 0);
}
static void null_param(rg_builder *b) {
  rg_build_param(b, rg_int(NULL, 1));
}
static void null_input(rg_builder *b) {
  rg_build_input(b, NULL, "T", "f32", RG_GRAD_NONE);
}
static void null_shape(rg_builder *b) {
  rg_build_input(b, "z", NULL, "f32", RG_GRAD_NONE);
}
static void null_dtype(rg_builder *b) {
  rg_build_input(b, "z", "T", NULL, RG_GRAD_NONE);
}
static void null_node(rg_builder *b) {
  rg_build_node(b, NULL, "add", NULL, NULL, NULL, 0);
}
static void null_op(rg_builder *b) {
  rg_build_node(b, "n", NULL, NULL, NULL, NULL, 0);
}
static void null_attrs(rg_builder *b) {
  rg_build_node(b, "n", "add", "a=x+x", NULL, NULL, 2);
}
static void null_word(rg_builder *b) {
  const rg_item attrs[] = {rg_word("act", NULL)};
  rg_build_node(b, "n", "combine", "o=x", NULL, attrs, 1);
}
static void null_output(rg_builder *b) {
  rg_build_output(b, NULL, "x");
}
static void no_such_kind(rg_builder *b) {
  rg_item attr = rg_int("dim", 1);
  attr.kind = (rg_item_kind)9;
  rg_build_node(b, "n", "slice", "x", NULL, &attr, 1);
}
static void no_such_gradient(rg_builder *b) {
  rg_build_input(b, "z", "T", "f32", (rg_grad)7);
}
static void not_finite(rg_builder *b) {
  rg_build_param(b, rg_real("eps", NAN));
}
static void not_utf8(rg_builder *b) {
  rg_build_param(b, rg_word("dtype", "bf\xc0\xaf"));
}
static void not_utf8_name(rg_builder *b) {
  rg_build_input(b, "a\xed\xa0\x80", "T", "f32", RG_GRAD_NONE);
}
static void not_utf8_port(rg_builder *b) {
  rg_build_node(b, "n", "add", "a=\xff", NULL, NULL, 0);
}
static void control_character(rg_builder *b) {
  rg_build_node(b, "n", "add", "a=x\x1b[1m", NULL, NULL, 0);
}
static void pointer_with_a_slash(rg_builder *b) {
  rg_build_input(b, "a/b~c", "T", "f32", RG_GRAD_NONE);
}
static void axis_left_out(rg_builder *b) {
  rg_build_input(b, "z", "T,,8", "f32", RG_GRAD_NONE);
}
static void axis_after_the_last(rg_builder *b) {
  rg_build_input(b, "z", "T, ", "f32", RG_GRAD_NONE);
}
static void axis_too_large(rg_builder *b) {
  rg_build_input(b, "z", "99999999999999999999", "f32", RG_GRAD_NONE);
}
static void tensor_unknown(rg_builder *b) {
  rg_build_node(b, "n", "add", "a=x+xx", NULL, NULL, 0);
}
static void attribute_unknown(rg_builder *b) {
  const rg_item attrs[] = {rg_list("windows", "1,2")};
  rg_build_node(b, "n", "add", "a=x+x", NULL, attrs, 1);
}
static void first_of_two(rg_builder *b) {
  rg_build_output(b, "y", "x");
  rg_build_node(b, NULL, NULL, "==", NULL, NULL, 1);
}
static void too_many_nodes(rg_builder *b) {
  for (int i = 0; i < 17000; i++) rg_build_node(b, "n", "add", "a=x+x", NULL, NULL, 0);
}
static void too_many_inputs(rg_builder *b) {
  char name[16];
  for (int i = 0; i < 5000; i++)
    sprintf(name, "i%d", i), rg_build_input(b, name, "T", "f32", RG_GRAD_NONE);
}
static void too_much_text(rg_builder *b) {
  char *text = malloc(3 << 20);
  memset(text, 'a', (3 << 20) - 1);
  text[(3 << 20) - 1] = 0;
  for (int i = 0; i < 7; i++) rg_build_node(b, "n", text, NULL, NULL, NULL, 0);
  free(text);
}
/* Few bytes that grow when written: quotes do. */
static void too_much_text_written(rg_builder *b) {
  char *text = malloc(9 << 20);
  memset(text, '"', (9 << 20) - 1);
  text[(9 << 20) - 1] = 0;
  rg_build_param(b, rg_word("long", text));
  free(text);
}

#define CASE(f) \
  { #f, f }
static const struct {
  const char *name;
  void (*call)(rg_builder *b);
} own[] = {CASE(twice_param),
           CASE(twice_input),
           CASE(twice_output),
           CASE(twice_port),
           CASE(twice_attr),
           CASE(port_without_tensor),
           CASE(port_without_name),
           CASE(port_with_a_hole),
           CASE(port_ends_in_plus),
           CASE(port_with_two_equals),
           CASE(port_is_a_sum),
           CASE(port_without_blank),
           CASE(null_param),
           CASE(null_input),
           CASE(null_shape),
           CASE(null_dtype),
           CASE(null_node),
           CASE(null_op),
           CASE(null_attrs),
           CASE(null_word),
           CASE(null_output),
           CASE(no_such_kind),
           CASE(no_such_gradient),
           CASE(not_finite),
           CASE(not_utf8),
           CASE(not_utf8_name),
           CASE(not_utf8_port),
           CASE(control_character),
           CASE(pointer_with_a_slash),
           CASE(axis_left_out),
           CASE(axis_after_the_last),
           CASE(axis_too_large),
           CASE(tensor_unknown),
           CASE(attribute_unknown),
           CASE(first_of_two),
           CASE(too_many_nodes),
           CASE(too_many_inputs),
           CASE(too_much_text),
           CASE(too_much_text_written)};

Test(build, errors_of_its_own, .init = setup, .fini = teardown) {
  static char got[1 << 16];
  for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
    rg_builder *b;
    rg_spec *spec;
    rg_error e = {0};
    char line[1536];
    CR_OK(rg_builder_create(ctx, "built", &b, &e), &e);
    good(b);
    own[i].call(b);
    const rg_status status = rg_build_spec(b, NULL, 0, &spec, &e);
    cr_assert_neq(status, RG_OK, "%s", own[i].name);
    cr_assert_eq(e.status, status);
    cr_assert_null(spec);
    rg_error_format(&e, line, sizeof line);
    const size_t n = strlen(got);
    snprintf(got + n, sizeof got - n, "%s\n  %s\n", own[i].name, line);
    rg_builder_destroy(b);
  }
  char *want = slurp("tests/golden/build.txt");
  if (!want || strcmp(want, got) != 0) {
    fprintf(stderr, "--- expected\n%s--- got\n%s", want ? want : "(no file)\n", got);
    if (getenv("RG_GOLDEN_UPDATE")) {
      FILE *f = fopen("tests/golden/build.txt", "wb");
      cr_assert(f);
      fputs(got, f);
      fclose(f);
    }
    cr_assert(false, "tests/golden/build.txt differs");
  }
  free(want);
}

/* ---- a builder's life ---- */

Test(build, life, .init = setup, .fini = teardown) {
  rg_builder *b, *unnamed;
  rg_spec *spec[3];
  rg_error e = {0};
  rg_text text;
  CR_OK(rg_builder_create(ctx, "twice", &b, &e), &e);
  good(b);
  CR_OK(rg_build_spec(b, NULL, 0, &spec[0], &e), &e);
  rg_binding set[] = {{"T", 5, NULL}, {"H", 2, NULL}};
  CR_OK(rg_build_spec(b, set, 2, &spec[1], &e), &e); /* the same once more, bound */
  cr_assert_eq(rg_build_output(b, "z", "x"), RG_OK); /* and it may go on */
  CR_OK(rg_build_spec(b, NULL, 0, &spec[2], &e), &e);
  cr_assert_eq(rg_build_output(b, "z", "x"), RG_E_KEY);
  cr_assert_eq(rg_build_param(b, rg_int("K", 1)), RG_E_KEY, "the first error stays");
  rg_builder_destroy(b); /* the specs have all they need */
  rg_tensor_info t;
  cr_assert_eq(rg_spec_tensor(spec[0], 0, &t), RG_OK);
  cr_assert(t.dim[0] == -1 && t.dim[1] == 4);
  cr_assert_eq(rg_spec_tensor(spec[1], 0, &t), RG_OK);
  cr_assert(t.dim[0] == 5 && t.dim[1] == 2 && t.bytes == 5 * 2 * 8 * 4);
  CR_OK(rg_spec_write(spec[2], "summary", &text, &e), &e);
  cr_assert(strstr(text.data, "twice:") && strstr(text.data, "output z"), "%s", text.data);
  rg_text_destroy(&text);
  for (int i = 0; i < 3; i++) rg_spec_destroy(spec[i]);

  /* Errors there already stay; NULL is a usage error everywhere and frees nothing. */
  rg_error first = {.status = RG_E_IO, .message = "first"};
  cr_assert_eq(rg_build_spec(NULL, NULL, 0, &spec[0], &first), RG_E_USAGE);
  cr_assert_null(spec[0]);
  cr_assert_eq(first.status, RG_E_IO);
  cr_assert_eq(rg_build_param(NULL, rg_int("H", 1)), RG_E_USAGE);
  cr_assert_eq(rg_build_input(NULL, "q", "T", "f32", RG_GRAD_NONE), RG_E_USAGE);
  cr_assert_eq(rg_build_node(NULL, "n", "add", NULL, NULL, NULL, 0), RG_E_USAGE);
  cr_assert_eq(rg_build_output(NULL, "o", NULL), RG_E_USAGE);
  cr_assert_eq(rg_builder_create(NULL, NULL, &b, NULL), RG_E_USAGE);
  cr_assert_null(b);
  cr_assert_eq(rg_builder_create(ctx, NULL, NULL, NULL), RG_E_USAGE);
  rg_builder_destroy(NULL);

  CR_OK(rg_builder_create(ctx, NULL, &unnamed, &e), &e);
  rg_build_input(unnamed, "x", "", "f32", RG_GRAD_NONE); /* a scalar */
  rg_build_output(unnamed, "y", "x");
  cr_assert_eq(rg_build_spec(unnamed, NULL, 1, &spec[0], NULL), RG_E_USAGE);
  CR_OK(rg_build_spec(unnamed, NULL, 0, &spec[0], &e), &e);
  cr_assert_eq(rg_spec_tensor(spec[0], 0, &t), RG_OK);
  cr_assert(t.rank == 0 && t.bytes == 4);
  rg_spec_destroy(spec[0]);
  rg_builder_destroy(unnamed);

  CR_OK(rg_builder_create(ctx, "not a name", &b, &e), &e);
  good(b);
  cr_assert_eq(rg_build_spec(b, NULL, 0, &spec[0], &e), RG_E_NAME);
  cr_assert_str_eq(e.pointer, "/name");
  rg_builder_destroy(b);
}

/* Short texts of every shape: read, or refused. */
Test(build, random_short_texts, .init = setup, .fini = teardown) {
  static const char letters[] = "xxab==++  ,,-019(\t*\xc3\xa9\xf0";
  uint64_t state = 11;
  int refused = 0, made = 0;
  for (int round = 0; round < 20000; round++) {
    rg_builder *b;
    rg_spec *spec;
    rg_error e = {0};
    char text[16] = "";
    const int n = (int)(next_random(&state) % 12);
    for (int i = 0; i < n; i++) text[i] = letters[next_random(&state) % (sizeof letters - 1)];
    CR_OK(rg_builder_create(ctx, "random", &b, &e), &e);
    rg_build_input(b, "x", round % 2 ? text : "T,8", "f32", RG_GRAD_NONE);
    rg_build_input(b, "a", "T,8", "f32", RG_GRAD_NONE);
    if (round % 2 == 0) rg_build_node(b, "n", "add", text, NULL, NULL, 0);
    rg_build_output(b, "y", round % 2 ? "x" : "n.y");
    const rg_status status = rg_build_spec(b, NULL, 0, &spec, &e);
    cr_assert_eq(status == RG_OK, spec != NULL);
    if (status != RG_OK) cr_assert(e.pointer[0] == '/', "'%s' (%d): %s", text, round, e.message);
    *(status == RG_OK ? &made : &refused) += 1;
    rg_spec_destroy(spec);
    rg_builder_destroy(b);
  }
  cr_assert(made > 100 && refused > 1000, "%d made, %d refused", made, refused);
}
