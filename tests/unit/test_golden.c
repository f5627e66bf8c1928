/* tests/unit/test_golden.c: what users see, word for word.

   tests/golden/errors: NAME.json is a spec, NAME.policy.json (perhaps) a policy, NAME.set (perhaps)
   lines NAME=VALUE, and NAME.expect two lines: the command's exit status and the whole message.
   Each must fail exactly like that, in loading or in rg_check. tests/golden/dump: NAME.json is a
   spec and NAME.txt its text dump.

   With RG_GOLDEN_UPDATE set, differing files are rewritten and the test still fails: look at the
   difference, run again.
 */
#include <criterion/criterion.h>
#include <dirent.h>
#include <regraph/regraph.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef RG_SOURCE_DIR
#define RG_SOURCE_DIR "."
#endif

enum { MOST_CASES = 1024, MOST_SET = 16 };

static char *slurp(const char *path) { /* NULL if there is no such file */
  FILE *f = fopen(path, "rb");
  if (!f) return NULL;
  fseek(f, 0, SEEK_END);
  long n = ftell(f);
  rewind(f);
  char *text = malloc((size_t)n + 1);
  cr_assert_eq(fread(text, 1, (size_t)n, f), (size_t)n);
  text[n] = 0;
  fclose(f);
  return text;
}

static int by_name(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Names of the files in `folder` that end in `suffix`, without it, sorted. */
static int cases(const char *folder, const char *suffix, char **name) {
  DIR *d = opendir(folder);
  cr_assert(d, "no folder %s", folder);
  int n = 0;
  for (struct dirent *entry; (entry = readdir(d));) {
    size_t length = strlen(entry->d_name), tail = strlen(suffix);
    if (length <= tail || strcmp(entry->d_name + length - tail, suffix) != 0) continue;
    cr_assert_lt(n, MOST_CASES);
    name[n] = strdup(entry->d_name);
    name[n++][length - tail] = 0;
  }
  closedir(d);
  qsort(name, (size_t)n, sizeof *name, by_name);
  return n;
}

static size_t bindings(char *text, rg_binding *set) { /* lines NAME=VALUE, cut up in place */
  size_t n = 0;
  for (char *line = text ? strtok(text, "\n") : NULL; line; line = strtok(NULL, "\n")) {
    char *value = strchr(line, '=');
    cr_assert(value && n < MOST_SET);
    *value = 0;
    set[n++] = (rg_binding){.name = line, .text = value + 1};
  }
  return n;
}

static bool same(const char *path, const char *got) {
  char *want = slurp(path);
  bool equal = want && strcmp(want, got) == 0;
  if (!equal) {
    fprintf(stderr, "%s\n--- expected\n%s--- got\n%s", path, want ? want : "(no file)\n", got);
    if (getenv("RG_GOLDEN_UPDATE")) {
      FILE *f = fopen(path, "wb");
      cr_assert(f);
      fputs(got, f);
      fclose(f);
    }
  }
  free(want);
  return equal;
}

/* All errors at once begin with the one that stands alone, and each has a place of its own. */
static void check_all(rg_context *ctx, const char *path, const rg_binding *set, size_t nset,
                      const rg_error *alone) {
  enum { MOST = 8 };
  rg_error e[MOST] = {{0}};
  for (size_t most = 1; most <= MOST; most += MOST - 1) {
    size_t n = MOST + 1;
    rg_spec *spec;
    const rg_status status = rg_spec_load_file_all(ctx, path, set, nset, &spec, e, most, &n);
    cr_assert_eq(status, alone->status, "%s", path);
    cr_assert(status == RG_OK ? spec && n == 0 : !spec && n >= 1 && n <= most, "%s", path);
    if (n) cr_assert_eq(memcmp(&e[0], alone, sizeof *alone), 0, "%s: %s", path, e[0].message);
    for (size_t i = 0; i < n; i++) {
      cr_assert(e[i].status != RG_OK && e[i].message[0] && e[i].file[0], "%s", path);
      cr_assert(!e[i].pointer[0] || e[i].line > 0, "%s", path);
      for (size_t j = 0; j < i; j++)
        cr_assert(strcmp(e[i].pointer, e[j].pointer) != 0, "%s: %s", path, e[i].pointer);
    }
    rg_spec_destroy(spec);
  }
}

Test(golden, errors) {
  char *name[MOST_CASES];
  cr_assert_eq(chdir(RG_SOURCE_DIR), 0); /* messages name files as given */
  int n = cases("tests/golden/errors", ".expect", name), wrong = 0;
  cr_assert_gt(n, 100);
  for (int i = 0; i < n; i++) {
    char spec_path[256], policy_path[256], set_path[256], expect[256], got[2048], line[1536];
    snprintf(spec_path, sizeof spec_path, "tests/golden/errors/%s.json", name[i]);
    snprintf(policy_path, sizeof policy_path, "tests/golden/errors/%s.policy.json", name[i]);
    snprintf(set_path, sizeof set_path, "tests/golden/errors/%s.set", name[i]);
    snprintf(expect, sizeof expect, "tests/golden/errors/%s.expect", name[i]);
    rg_error e = {0};
    rg_context *ctx;
    rg_spec *spec = NULL;
    rg_policy *policy = NULL;
    rg_binding set[MOST_SET];
    char *set_text = slurp(set_path);
    size_t nset = bindings(set_text, set);
    cr_assert_eq(rg_context_create(NULL, &ctx, &e), RG_OK);
    rg_status status = rg_spec_load_file(ctx, spec_path, set, nset, &spec, &e);
    cr_assert_eq(status == RG_OK, spec != NULL);
    check_all(ctx, spec_path, set, nset, &e);
    if (status == RG_OK && access(policy_path, F_OK) == 0) {
      status = rg_policy_load_file(ctx, policy_path, &policy, &e);
      cr_assert_eq(status == RG_OK, policy != NULL);
    }
    if (status == RG_OK) status = rg_check(spec, policy, &e);
    cr_assert_eq(status, e.status, "%s", name[i]);
    rg_error_format(&e, line, sizeof line);
    snprintf(got, sizeof got, "%d\n%s\n", rg_status_exit_code(status), line);
    wrong += status == RG_OK || !same(expect, got);
    rg_policy_destroy(policy);
    rg_spec_destroy(spec);
    rg_context_destroy(ctx);
    free(set_text);
    free(name[i]);
  }
  cr_assert_eq(wrong, 0, "%d of %d cases differ", wrong, n);
}

Test(golden, dumps) {
  char *name[MOST_CASES];
  cr_assert_eq(chdir(RG_SOURCE_DIR), 0);
  int n = cases("tests/golden/dump", ".json", name), wrong = 0;
  cr_assert_gt(n, 2);
  for (int i = 0; i < n; i++) {
    char path[256], expect[256];
    snprintf(path, sizeof path, "tests/golden/dump/%s.json", name[i]);
    snprintf(expect, sizeof expect, "tests/golden/dump/%s.txt", name[i]);
    rg_error e = {0};
    rg_context *ctx;
    rg_spec *spec;
    rg_text text;
    cr_assert_eq(rg_context_create(NULL, &ctx, &e), RG_OK);
    cr_assert_eq(rg_spec_load_file(ctx, path, NULL, 0, &spec, &e), RG_OK, "%s: %s", path,
                 e.message);
    cr_assert_eq(rg_check(spec, NULL, &e), RG_OK, "%s: %s", path, e.message);
    cr_assert_eq(rg_spec_write(spec, "text", &text, &e), RG_OK);
    wrong += !same(expect, text.data);
    rg_text_destroy(&text);
    rg_spec_destroy(spec);
    rg_context_destroy(ctx);
    free(name[i]);
  }
  cr_assert_eq(wrong, 0, "%d of %d dumps differ", wrong, n);
}
