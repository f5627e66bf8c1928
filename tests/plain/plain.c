/* tests/plain/plain.c: runs all tests of an executable in order, or those whose SUITE/NAME has one
 * of the arguments in it (is the argument, where a test has just that name), in one process; see
 * criterion/criterion.h here. --list first only names them. */
#include <criterion/criterion.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

jmp_buf *plain_catch;
static plain_test *first, **last = &first;

void plain_add(plain_test *test) {
  *last = test;
  last = &test->next;
}

void plain_check(bool holds, const char *text, const char *file, int line, const char *format,
                 ...) {
  if (holds) return;
  va_list args;
  fprintf(stderr, "%s:%d: %s: ", file, line, text);
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fprintf(stderr, "\n");
  if (plain_catch) longjmp(*plain_catch, 1);
  exit(1);
}

static const char *full_name(const plain_test *t) {
  static char name[256];
  snprintf(name, sizeof name, "%s/%s", t->suite, t->name);
  return name;
}

static bool is_name(const char *text) {
  for (const plain_test *t = first; t; t = t->next)
    if (strcmp(full_name(t), text) == 0) return true;
  return false;
}

static bool wanted(int argc, char **argv, const plain_test *t) {
  for (int i = 1; i < argc; i++)
    if (is_name(argv[i]) ? strcmp(full_name(t), argv[i]) == 0
                         : strstr(full_name(t), argv[i]) != NULL)
      return true;
  return argc < 2;
}

int main(int argc, char **argv) {
  int count = 0;
  const bool list = argc > 1 && strcmp(argv[1], "--list") == 0;
  if (list) argc--, argv++;
  for (plain_test *t = first; t; t = t->next) {
    if (!wanted(argc, argv, t)) continue;
    count++;
    printf("%s\n", full_name(t));
    fflush(stdout);
    if (list) continue;
    if (t->init) t->init();
    t->fn();
    if (t->fini) t->fini();
  }
  if (!list) printf("%d passed, 0 failed\n", count);
  return count == 0;
}
