/* tests/plain/plain.c: runs all tests of an executable in order, or those whose SUITE/NAME has one of the
 * arguments in it, in one process; see criterion/criterion.h here. --list first only names them. */
#include <criterion/criterion.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static plain_test *first, **last = &first;

void plain_add(plain_test *test) {
  *last = test;
  last = &test->next;
}

void plain_check(bool holds, const char *text, const char *file, int line, const char *format, ...) {
  if (holds) return;
  va_list args;
  fprintf(stderr, "%s:%d: %s: ", file, line, text);
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fprintf(stderr, "\n");
  exit(1);
}

static bool wanted(int argc, char **argv, const char *name) {
  for (int i = 1; i < argc; i++)
    if (strstr(name, argv[i])) return true;
  return argc < 2;
}

int main(int argc, char **argv) {
  int count = 0;
  const bool list = argc > 1 && strcmp(argv[1], "--list") == 0;
  if (list) argc--, argv++;
  for (plain_test *t = first; t; t = t->next) {
    char name[256];
    snprintf(name, sizeof name, "%s/%s", t->suite, t->name);
    if (!wanted(argc, argv, name)) continue;
    count++;
    printf("%s\n", name);
    fflush(stdout);
    if (list) continue;
    if (t->init) t->init();
    t->fn();
    if (t->fini) t->fini();
  }
  if (!list) printf("%d passed, 0 failed\n", count);
  return count == 0;
}
