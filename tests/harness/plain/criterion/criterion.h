/* tests/harness/plain/criterion/criterion.h: the part of Criterion our tests use, in one process.
 *
 * Criterion runs each test in a process of its own, which ThreadSanitizer and valgrind do not survive. With
 * this folder first in the include path (and Criterion not linked) the same test files become plain programs:
 * tests run one after the other in file order, the first failed assertion ends the program with status 1. An
 * argument filters by substring of suite.name. Tests that expect a signal or an exit code are counted as
 * skipped.
 */
#ifndef RGI_PLAIN_CRITERION_H
#define RGI_PLAIN_CRITERION_H

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct rgi_plain_options {
  int sentinel_;
  void (*init)(void);
  void (*fini)(void);
  int signal, exit_code;
  bool disabled;
  double timeout;
  const char *description;
} rgi_plain_options;

typedef struct rgi_plain_test {
  struct rgi_plain_test *next;
  const char *name;
  void (*run)(void);
  const rgi_plain_options *options;
} rgi_plain_test;

/* Weak, so that a program of several test files has one list and one main. */
__attribute__((weak)) rgi_plain_test *rgi_plain_first, **rgi_plain_last;
__attribute__((weak)) const char *rgi_plain_running;

static inline void rgi_plain_add(rgi_plain_test *t) {
  if (!rgi_plain_last) rgi_plain_last = &rgi_plain_first;
  *rgi_plain_last = t;
  rgi_plain_last = &t->next;
}

#define Test(suite, test, ...)                                                                               \
  static void suite##_##test##_run(void);                                                                    \
  __attribute__((constructor)) static void suite##_##test##_add(void) {                                      \
    static const rgi_plain_options options = {.sentinel_ = 0, __VA_ARGS__};                                  \
    static rgi_plain_test t = {NULL, #suite "." #test, suite##_##test##_run, &options};                      \
    rgi_plain_add(&t);                                                                                       \
  }                                                                                                          \
  static void suite##_##test##_run(void)

__attribute__((weak)) int main(int argc, char **argv) {
  int ran = 0, skipped = 0;
  for (rgi_plain_test *t = rgi_plain_first; t; t = t->next) {
    if (argc > 1 && !strstr(t->name, argv[1])) continue;
    if (t->options->disabled || t->options->signal || t->options->exit_code) {
      printf("skipped %s\n", t->name);
      skipped++;
      continue;
    }
    rgi_plain_running = t->name;
    if (t->options->init) t->options->init();
    t->run();
    if (t->options->fini) t->options->fini();
    ran++;
  }
  printf("%d passed, %d skipped\n", ran, skipped);
  return 0;
}

static inline void rgi_plain_fail(const char *file, int line, const char *what, const char *format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "%s:%d: %s: failed: %s: ", file, line, rgi_plain_running ? rgi_plain_running : "?", what);
  vfprintf(stderr, format, args);
  fputc('\n', stderr);
  va_end(args);
  exit(1);
}

#define rgi_plain_check(ok, what, ...)                                                                       \
  do {                                                                                                       \
    if (!(ok)) rgi_plain_fail(__FILE__, __LINE__, what, " " __VA_ARGS__);                                    \
  } while (0)

#define cr_assert(cond, ...)           rgi_plain_check((cond), #cond, __VA_ARGS__)
#define cr_assert_not(cond, ...)       rgi_plain_check(!(cond), "not " #cond, __VA_ARGS__)
#define cr_assert_eq(a, b, ...)        rgi_plain_check((a) == (b), #a " == " #b, __VA_ARGS__)
#define cr_assert_neq(a, b, ...)       rgi_plain_check((a) != (b), #a " != " #b, __VA_ARGS__)
#define cr_assert_lt(a, b, ...)        rgi_plain_check((a) < (b), #a " < " #b, __VA_ARGS__)
#define cr_assert_leq(a, b, ...)       rgi_plain_check((a) <= (b), #a " <= " #b, __VA_ARGS__)
#define cr_assert_gt(a, b, ...)        rgi_plain_check((a) > (b), #a " > " #b, __VA_ARGS__)
#define cr_assert_geq(a, b, ...)       rgi_plain_check((a) >= (b), #a " >= " #b, __VA_ARGS__)
#define cr_assert_null(a, ...)         rgi_plain_check(!(a), #a " is NULL", __VA_ARGS__)
#define cr_assert_not_null(a, ...)     rgi_plain_check((a), #a " is not NULL", __VA_ARGS__)
#define cr_assert_str_eq(a, b, ...)    rgi_plain_check(strcmp(a, b) == 0, #a " equals " #b, __VA_ARGS__)
#define cr_assert_str_neq(a, b, ...)   rgi_plain_check(strcmp(a, b) != 0, #a " differs from " #b, __VA_ARGS__)
#define cr_assert_arr_eq(a, b, n, ...) rgi_plain_check(memcmp(a, b, n) == 0, #a " equals " #b, __VA_ARGS__)
#define cr_assert_arr_neq(a, b, n, ...)                                                                      \
  rgi_plain_check(memcmp(a, b, n) != 0, #a " differs from " #b, __VA_ARGS__)
#define cr_assert_float_eq(a, b, eps, ...)                                                                   \
  rgi_plain_check(fabs((a) - (b)) <= (eps), #a " is near " #b, __VA_ARGS__)
#define cr_assert_fail(...) rgi_plain_check(false, "reached", __VA_ARGS__)
#define cr_fatal(...)       rgi_plain_check(false, "reached", __VA_ARGS__)

#define cr_expect          cr_assert
#define cr_expect_eq       cr_assert_eq
#define cr_expect_neq      cr_assert_neq
#define cr_expect_lt       cr_assert_lt
#define cr_expect_leq      cr_assert_leq
#define cr_expect_gt       cr_assert_gt
#define cr_expect_geq      cr_assert_geq
#define cr_expect_null     cr_assert_null
#define cr_expect_not_null cr_assert_not_null
#define cr_expect_str_eq   cr_assert_str_eq
#define cr_expect_arr_eq   cr_assert_arr_eq
#define cr_expect_float_eq cr_assert_float_eq
#define cr_log_info(...)   ((void)0)
#define cr_skip_test(...)                                                                                    \
  do {                                                                                                       \
    printf("skipped %s\n", rgi_plain_running);                                                               \
    return;                                                                                                  \
  } while (0)

#endif
