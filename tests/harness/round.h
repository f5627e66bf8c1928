/* tests/harness/round.h: which seeds a random test draws, and which cases of a long list a build
   runs. Plain runs (and CI) draw round 0; tests/soak.sh goes on from there with REGRAPH_ROUND=1,
   2, …, each as many seeds further.
 */
#ifndef ROUND_H
#define ROUND_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

/* The first of `n` seeds in this round, where round 0 begins with `first`. */
static inline uint64_t round_seed(uint64_t first, int n) {
  const char *round = getenv("REGRAPH_ROUND");
  return first + (uint64_t)n * (round ? strtoull(round, NULL, 10) : 0);
}

/* Is case i run? Builds that count or watch every access (RG_TEST_SLOW: coverage, sanitizers) take
 * one of every `of`, except in a soak; all others take all. */
static inline bool in_sample(int i, int of) {
#ifdef RG_TEST_SLOW
  return getenv("REGRAPH_ROUND") || i % of == 0;
#else
  return (void)i, (void)of, true;
#endif
}

#endif
