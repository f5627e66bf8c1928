/* tests/harness/lower.h: what a plan would launch on a GPU that is not there: every buffer gets
 * a made-up address, every op is asked for its launches, and what it hands over is written down.
 */
#ifndef LOWER_H
#define LOWER_H

#include "../../exec/plan.h"
#include "optest.h"

typedef struct lo_launch {
  int32_t step;
  bool library; /* a product of cuBLASLt; the rest says nothing */
  bool copies;  /* from or to the host's memory: `copy` alone says something */
  rg_copy copy;
  rg_launch launch;
  const uint64_t *params; /* a copy, in words; zeros past its end */
} lo_launch;

typedef struct lo_list {
  lo_launch *at;
  int n, capacity;
  int32_t step; /* being asked */
  int skipped;  /* steps that need what this build or machine lacks */
  ot *t;
} lo_list;

#define LO_COMM UINT64_C(0x1e0000000000) /* the comm block, which stays where it is */

/* Addresses of set 0 and set 1 differ in every buffer; no two buffers of a plan
 * are less than 64 GiB apart. */
char *lo_address(rgi_place at, int set);
/* Does a word of parameters look like one of them? */
bool lo_is_address(uint64_t word, int set);

/* Asks all steps. NULL, or what was wrong. */
const char *lo_ask(ot *t, const rg_plan *plan, int set, lo_list *out);

/* Bytes [from, to) of a place that argument k of step s stands at; those of all its elements lie
 * inside. */
int64_t lo_bytes(const rgi_step *s, int k);

#endif
