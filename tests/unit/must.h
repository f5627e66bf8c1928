/* tests/unit/must.h: calls that take &err and have to succeed; what they say otherwise ends the
 * test. */
#ifndef MUST_H
#define MUST_H

#include <regraph/regraph.h>

#include <criterion/criterion.h>

static rg_error err;

static void must(rg_status status, const char *what) {
  char line[1200];
  rg_error_format(&err, line, sizeof line);
  cr_assert_eq(status, RG_OK, "%s: %s", what, line);
}

#endif
