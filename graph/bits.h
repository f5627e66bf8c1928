/* graph/bits.h: sets of small numbers: bit i of an array of words. */
#ifndef RGI_BITS_H
#define RGI_BITS_H

#include <stdbool.h>
#include <stdint.h>

/* Words that hold bits 0 … n - 1; one at least, so that no set is NULL. */
static inline int32_t rgi_words(int32_t n) {
  return n / 64 + 1;
}
static inline bool rgi_has(const uint64_t *set, int32_t i) {
  return set[i >> 6] >> (i & 63) & 1;
}
static inline void rgi_put(uint64_t *set, int32_t i) {
  set[i >> 6] |= UINT64_C(1) << (i & 63);
}
static inline void rgi_drop(uint64_t *set, int32_t i) {
  set[i >> 6] &= ~(UINT64_C(1) << (i & 63));
}

#endif
