/* ops/cpu/watch.h: for loops in which the address sanitizer's look at every access would be nearly
 * all that they do. Such a function is RGI_WATCHED, that is, not looked at inside; whoever calls it
 * watches what it will read and write, row by row. Without that sanitizer neither does anything.
 */
#ifndef RGI_CPU_WATCH_H
#define RGI_CPU_WATCH_H

#include <stdint.h>

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
