/* ops/rope.h: the frequencies of rope, for both devices: ops/rope.c makes them of a call, what runs
 * it asks for pair after pair. */
#ifndef RGI_ROPE_H
#define RGI_ROPE_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

/* Frequency of pair i: theta^(−i / half). YaRN divides it by `factor`, by a share that rises from
 * 0 at pair `low` to 1 at pair `high`. */
typedef struct rgi_rope_scale {
  double theta, factor, low, high;
  double magnitude; /* of cosine and sine */
  int64_t half;     /* pairs */
  bool yarn, interleaved;
} rgi_rope_scale;

static inline double rgi_rope_frequency(const rgi_rope_scale *s, int64_t i) {
  double plain = pow(s->theta, -(double)i / (double)s->half);
  if (!s->yarn) return plain;
  double share = ((double)i - s->low) / (s->high - s->low);
  share = share < 0 ? 0 : share > 1 ? 1 : share;
  return plain * (1 - share) + plain / s->factor * share;
}

#endif
