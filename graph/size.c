/* graph/size.c: numbers with a unit, as people write them: bytes in policies, profiles, flags and
   Python ("1.5GiB"), counts in bindings ("64K" tokens). The one table of units and the one overflow
   check.
 */
#include "base.h"
#include <string.h>

/* Digits; false if they are more than 64 bits hold. *p moves past them. */
static bool take_digits(const char **p, int64_t *out) {
  bool fits = true;
  for (*out = 0; **p >= '0' && **p <= '9'; ++*p)
    fits = fits && rgi_mul(*out, 10, out) && rgi_add(*out, **p - '0', out);
  return fits;
}

/* "k", "K", "M", "G", "T" → its power, which is then behind *p; 0 without one. */
static int take_prefix(const char **p) {
  static const char prefix[] = "KMGT";
  const char *at = **p == 'k' ? prefix : **p ? strchr(prefix, **p) : NULL;
  if (!at) return 0;
  ++*p;
  return (int)(at - prefix) + 1;
}

static int64_t power(int64_t base, int exponent) {
  int64_t x = 1;
  while (exponent-- > 0) x *= base;
  return x;
}

rg_status rg_parse_size(const char *text, int64_t *bytes, rg_error *error) {
  if (!text || !bytes)
    return rgi_fail(error, RG_E_USAGE, NULL, NULL, "rg_parse_size needs a text and a place");
  const char *p = text;
  int64_t whole, part = 0, scale = 1, unit, sum;
  bool good = *p >= '0' && *p <= '9', fits = take_digits(&p, &whole);
  if (good && *p == '.') {
    good = p[1] >= '0' && p[1] <= '9';
    for (p++; *p >= '0' && *p <= '9' && scale < 1000000; p++) {
      part = part * 10 + (*p - '0');
      scale *= 10;
    }
  }
  if (*p == ' ') p++;
  const int prefix = take_prefix(&p);
  const bool decimal = prefix > 0 && *p == 'B'; /* KB; KiB and K alone are binary */
  if (prefix > 0 && p[0] == 'i' && p[1] == 'B') p++;
  if (*p == 'B') p++;
  rgi_shown shown;
  if (!good || *p)
    return rgi_fail(error, RG_E_VALUE, NULL, NULL,
                    "'%s' is no size; expected digits and a unit (B; KB, MB, GB, TB; KiB, MiB, "
                    "GiB, TiB or K, M, "
                    "G, T), as in 6GiB",
                    rgi_show(&shown, text));
  unit = power(decimal ? 1000 : 1024, prefix);
  if (!fits || !rgi_mul(whole, unit, &sum) || !rgi_add(sum, part * unit / scale, &sum))
    return rgi_fail(error, RG_E_OVERFLOW, NULL, NULL, "'%s' is more bytes than 64 bits can count",
                    rgi_show(&shown, text));
  *bytes = sum;
  return RG_OK;
}

bool rgi_parse_count(const char *text, int64_t *out) {
  const bool negative = *text == '-';
  const char *p = text + negative;
  int64_t x;
  if (*p < '0' || *p > '9' || !take_digits(&p, &x)) return false;
  if (!rgi_mul(x, power(1024, take_prefix(&p)), &x) || *p) return false;
  *out = negative ? -x : x;
  return true;
}
