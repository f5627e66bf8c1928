/* kernels/session.h: what a session runs itself around the steps: lengths made safe, memory
 * poisoned. */
#ifndef RGK_SESSION_H
#define RGK_SESSION_H

#include "kernels.h"

/* Copies an input that holds lengths or positions, with every rule that governs a range of it
 * enforced:
 *   starts     begin at 0, never fall, end at most at `capacity`
 *   positions  at least 0, and position + length of the sequence at most INT32_MAX (starts: index
 *              of its rule, or -1)
 * The first rule found broken is written to flag: {1 + rule, entry, value}. */
enum { RGK_LENGTH_RULES = 8 };
typedef struct rgk_lengths_rule {
  int64_t offset, n, stride; /* elements */
  int32_t starts, lengths;   /* starts: 1; lengths: rule of the starts, in this list, or -1 */
  int64_t capacity;
  int32_t id; /* what flag calls it */
} rgk_lengths_rule;
typedef struct rgk_lengths_params {
  const int32_t *from;
  int32_t *to;
  int64_t n;
  int32_t nrule;
  rgk_lengths_rule rule[RGK_LENGTH_RULES];
  const int32_t *starts[RGK_LENGTH_RULES]; /* positions: clean starts they go with, or NULL */
  int64_t starts_stride[RGK_LENGTH_RULES], starts_n[RGK_LENGTH_RULES];
  int32_t *flag;
} rgk_lengths_params;
enum { RGK_LENGTHS_THREADS = 1024 };
RGK_GETTER(rgk_lengths(void))

/* The word of the current GPU's memory by which kernels take turns (device/fault.cuh); NULL: the
 * CUDA error is in cudaGetLastError(). */
RGK_GETTER(rgk_turn(void))

typedef struct rgk_poison_params {
  uint16_t *data;
  int64_t bytes;
  uint16_t pattern;
} rgk_poison_params;
RGK_GETTER(rgk_poison(void))

#endif
