/* ops/cpu/watch.h: for loops of which a sanitizer's or a counter's part would be nearly all.
 *
 * A function that is RGI_WATCHED the address sanitizer does not look into; whoever calls it watches
 * what it will read and write, row by row. Without that sanitizer neither does anything. One that
 * is RGI_UNCOUNTED line coverage leaves out.
 */
#ifndef RGI_CPU_WATCH_H
#define RGI_CPU_WATCH_H

#include <stdint.h>

#define RGI_UNCOUNTED __attribute__((no_profile_instrument_function))

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define RGI_WATCHED __attribute__((no_sanitize("address"), no_sanitize("undefined")))
/* Reads the first byte of the row that may not be, if there is one: the sanitizer reports that. */
static inline void rgi_watch(const float *x, int64_t n) {
  const volatile char *bad = __asan_region_is_poisoned((void *)x, (size_t)n * sizeof *x);
  if (bad) (void)*bad;
}
#else
#define RGI_WATCHED
static inline void rgi_watch(const float *x, int64_t n) {
  (void)x, (void)n;
}
#endif

#endif
