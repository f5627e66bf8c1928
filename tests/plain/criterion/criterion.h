/* tests/plain/criterion/criterion.h: the few macros of Criterion that some tests use, run in one
   process.

   Criterion's own runner does not start under ThreadSanitizer and hangs under compute-sanitizer. A
   build with REGRAPH_SANITIZE=thread, and the target gpu_tests_plain, put this folder first in the
   include path and link plain.c: same test files, same assertions, no forking.
 */
#ifndef PLAIN_CRITERION_H
#define PLAIN_CRITERION_H

#include <math.h>
#include <setjmp.h>
#include <stdbool.h>
#include <string.h>

typedef struct plain_test {
  const char *suite, *name;
  void (*fn)(void);
  void (*init)(void);
  void (*fini)(void);
  double timeout;
  struct plain_test *next;
} plain_test;

/* Not NULL: where a failed assertion jumps to instead of ending the program. */
extern jmp_buf *plain_catch;
#define PLAIN_CATCHES

void plain_add(plain_test *test);
__attribute__((format(printf, 5, 6))) void
plain_check(bool holds, const char *text, const char *file, int line, const char *format, ...);

#define Test(Suite, Name, ...)                                                      \
  static void plain_##Suite##_##Name(void);                                         \
  __attribute__((constructor)) static void plain_add_##Suite##_##Name(void) {       \
    static plain_test test = {                                                      \
        .suite = #Suite, .name = #Name, .fn = plain_##Suite##_##Name, __VA_ARGS__}; \
    plain_add(&test);                                                               \
  }                                                                                 \
  static void plain_##Suite##_##Name(void)

#define PLAIN(holds, text, ...)     plain_check((holds), text, __FILE__, __LINE__, "" __VA_ARGS__)
#define cr_assert(c, ...)           PLAIN((c), #c, __VA_ARGS__)
#define cr_assert_not(c, ...)       PLAIN(!(c), "not " #c, __VA_ARGS__)
#define cr_assert_eq(a, b, ...)     PLAIN((a) == (b), #a " == " #b, __VA_ARGS__)
#define cr_assert_neq(a, b, ...)    PLAIN((a) != (b), #a " != " #b, __VA_ARGS__)
#define cr_assert_lt(a, b, ...)     PLAIN((a) < (b), #a " < " #b, __VA_ARGS__)
#define cr_assert_leq(a, b, ...)    PLAIN((a) <= (b), #a " <= " #b, __VA_ARGS__)
#define cr_assert_gt(a, b, ...)     PLAIN((a) > (b), #a " > " #b, __VA_ARGS__)
#define cr_assert_geq(a, b, ...)    PLAIN((a) >= (b), #a " >= " #b, __VA_ARGS__)
#define cr_assert_null(p, ...)      PLAIN((p) == NULL, #p " is NULL", __VA_ARGS__)
#define cr_assert_not_null(p, ...)  PLAIN((p) != NULL, #p " is not NULL", __VA_ARGS__)
#define cr_assert_str_eq(a, b, ...) PLAIN(strcmp((a), (b)) == 0, #a " equals " #b, __VA_ARGS__)
#define cr_assert_float_eq(a, b, tolerance, ...) \
  PLAIN(fabs((double)(a) - (double)(b)) <= (double)(tolerance), #a " near " #b, __VA_ARGS__)
#define cr_assert_arr_eq(a, b, bytes, ...) \
  PLAIN(memcmp((a), (b), (bytes)) == 0, #a " equals " #b, __VA_ARGS__)

#define cr_skip_test(...) return
#define cr_skip(...)      return

#endif
