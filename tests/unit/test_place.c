/* tests/unit/test_place.c: lines and columns of what JSON pointers point to.

   Every value of every example is looked up by its pointer; what stands at the place must be the
   value, written as JSON. Then what examples lack: keys with escapes, several lines, pointers that
   lead nowhere.
 */
#include "graph/json.h"
#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef RG_SOURCE_DIR
#define RG_SOURCE_DIR "."
#endif

static void place(const char *text, rg_status status, const char *pointer, int *line, int *column) {
  const rgi_source source = {"text", text, strlen(text)};
  rg_error e = {.status = status};
  snprintf(e.pointer, sizeof e.pointer, "%s", pointer);
  rgi_error_place(&e, RG_OK, &source);
  cr_assert_str_eq(e.file, "text");
  *line = e.line;
  *column = e.column;
}

/* The text from a line and column on; columns count characters. */
static const char *text_at(const char *text, int line, int column) {
  cr_assert(line > 0 && column > 0);
  while (--line) text = strchr(text, '\n') + 1;
  while (--column) do
      text++;
    while (((unsigned char)*text & 0xc0) == 0x80);
  return text;
}

static int look_up(const char *text, const rgi_json *v, const char *pointer) {
  int line, column, n = 1;
  rgi_pointer p;
  if (*pointer) {
    place(text, RG_E_VALUE, pointer, &line, &column);
    const char *at = text_at(text, line, column);
    char want[32] = "";
    switch (v->type) {
    case RGI_JSON_STRING: snprintf(want, sizeof want, "\"%.20s", v->text); break;
    case RGI_JSON_INT: snprintf(want, sizeof want, "%lld", (long long)v->i); break;
    case RGI_JSON_BOOL: snprintf(want, sizeof want, v->i ? "true" : "false"); break;
    case RGI_JSON_ARRAY: snprintf(want, sizeof want, "["); break;
    case RGI_JSON_OBJECT: snprintf(want, sizeof want, "{"); break;
    default: break;
    }
    cr_assert(strncmp(at, want, strlen(want)) == 0, "%s: %.30s at %d:%d", pointer, at, line,
              column);
  }
  for (int i = 0; (v->type == RGI_JSON_ARRAY || v->type == RGI_JSON_OBJECT) && i < v->n; i++) {
    if (v->type == RGI_JSON_ARRAY) {
      n += look_up(text, &v->item[i], rgi_pointer_index(&p, pointer, i));
      continue;
    }
    rgi_pointer_key(&p, pointer, v->key[i]);
    place(text, RG_E_KEY, p.text, &line, &column); /* the key itself */
    const char *at = text_at(text, line, column);
    cr_assert(*at == '"' && strncmp(at + 1, v->key[i], strlen(v->key[i])) == 0, "%s: %.30s", p.text,
              at);
    n += look_up(text, &v->item[i], p.text);
  }
  return n;
}

Test(place, every_value_of_every_example) {
  rg_context *ctx;
  rg_error e = {0};
  int n = 0;
  cr_assert_eq(rg_context_create(NULL, &ctx, &e), RG_OK);
  DIR *d = opendir(RG_SOURCE_DIR "/examples");
  cr_assert(d);
  for (struct dirent *entry; (entry = readdir(d));) {
    char path[512], *text;
    size_t size;
    const rgi_json *root;
    const char *dot = strrchr(entry->d_name, '.');
    if (!dot || strcmp(dot, ".json") != 0) continue;
    snprintf(path, sizeof path, RG_SOURCE_DIR "/examples/%s", entry->d_name);
    cr_assert_eq(rgi_read_file(ctx, path, &text, &size, &e), RG_OK);
    char *whole = strndup(text, size);
    rgi_arena *a = rgi_arena_create(ctx);
    cr_assert_eq(rgi_json_parse(a, whole, size, &root, &e), RG_OK);
    n += look_up(whole, root, "");
    rgi_arena_destroy(a);
    free(whole);
    rgi_free(ctx, text);
  }
  closedir(d);
  cr_assert_gt(n, 500);
  rg_context_destroy(ctx);
}

Test(place, odd_keys_and_pointers) {
  static const char *const text =
      "\n{ \"a/b\" : 1,\n"
      "  \"c~d\": { \"\\u00fc\\ud83d\\ude00\\n\": [ \"x]\\\"},\", [], {} , 7 ] },\n"
      "  \"\xc3\xbc\": 2, \"deep\": [[[3]]], \"empty\": {} }";
  static const struct {
    const char *pointer;
    int line, column;
  } want[] = {
      {"/a~1b", 2, 11},
      {"/c~0d", 3, 10},
      {"/c~0d/\xc3\xbc\xf0\x9f\x98\x80\n", 3, 36},
      {"/c~0d/\xc3\xbc\xf0\x9f\x98\x80\n/0", 3, 38},
      {"/c~0d/\xc3\xbc\xf0\x9f\x98\x80\n/3", 3, 57},
      {"/\xc3\xbc", 4, 8},
      {"/deep/0/0/0", 4, 22},
      /* nowhere: as far as it goes */
      {"/deep/0/7", 4, 20},
      {"/empty/x", 4, 37},
      {"/a~1b/x", 2, 11},
      {"/c~0d/\xc3\xbc\xf0\x9f\x98\x80\n/9", 3, 36},
      {"/nothing", 2, 1},
  };
  for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
    int line, column;
    place(text, RG_E_VALUE, want[i].pointer, &line, &column);
    cr_assert(line == want[i].line && column == want[i].column, "%s: %d:%d", want[i].pointer, line,
              column);
  }
}

/* A text that is not what the pointer was made for leads nowhere, and nowhere past its end. */
Test(place, any_text_is_survived) {
  static const char whole[] =
      "{\"a\": [1, {\"b\\u00fc\\\\\": [2, \"x\\\"\"]}], \"c\": {\"d\": null}}";
  static const char *const pointer[] = {"/a/1/b\xc3\xbc\\/1", "/c/d", "/a/7", "/zz/1/2"};
  for (size_t n = 0; n < sizeof whole; n++)
    for (size_t i = 0; i < sizeof pointer / sizeof *pointer; i++) {
      char *cut = malloc(n ? n : 1); /* no byte past the end: sanitizers see a read of one */
      memcpy(cut, whole, n);
      const rgi_source source = {"cut", cut, n};
      rg_error e = {.status = RG_E_TYPE};
      snprintf(e.pointer, sizeof e.pointer, "%s", pointer[i]);
      rgi_error_place(&e, RG_OK, &source);
      cr_assert(e.line == 1 && e.column >= 1 && e.column <= (int)n + 1);
      free(cut);
    }
}
