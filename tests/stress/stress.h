/* tests/stress/stress.h: what the stress run walks through, and how it says what differs.
 *
 * A case is a shipped spec with settings and a pack of sequences. Its data follow from the seed,
 * role and name alone, so that every process and every way to run it starts from the same bits and
 * must end with the same.
 */
#ifndef STRESS_H
#define STRESS_H

#include <regraph/regraph.h>

/* Which blocks queries choose: each its own; mostly what their neighbour chose; all of a sequence
 * the same.
 */
typedef enum stress_pattern { SCATTERED, CORRELATED, SHARED } stress_pattern;

typedef struct stress_case {
  const char *name, *spec; /* examples/SPEC.json */
  int KH, G, D, DV;        /* KH 0: the spec knows G heads alone; D 0: it has its own widths */
  const char *dtype;
  const int *pack; /* lengths, ended by -1 */
  int dead;        /* rows past the last sequence's end */
  stress_pattern pattern;
  int M;           /* the layer's width; 0: the spec has none */
  const char *set; /* more settings, "block=32 top_n=4"; NULL: none */
} stress_case;

extern const stress_case stress_cases[];
extern const int stress_ncases;

enum { STRESS_SEQUENCES = 4096, STRESS_SETTINGS = 16 };

/* A case as it is run; `small`: few heads and tokens, for a CPU. */
typedef struct stress_shape {
  int64_t T, B;
  int length[STRESS_SEQUENCES];
  rg_binding set[STRESS_SETTINGS]; /* all but T and B */
  int nset;
  char text[256]; /* holds what `set` points to */
} stress_shape;
void stress_shape_of(const stress_case *c, bool small, stress_shape *out);

/* Contents of a tensor the caller binds: inputs and incoming gradients, with NaN in dead rows; sums
 * of ones; the rest zero. `data` has t->bytes. */
void stress_fill(const rg_tensor_info *t, const stress_shape *s, stress_pattern pattern,
                 uint64_t seed, void *data);

uint64_t stress_hash(const void *data, size_t bytes);

/* Prints how two contents of a tensor differ: how many elements, the first rows with their sequence
 * and position, and in each the first element's two values. */
void stress_differ(const rg_tensor_info *t, const stress_shape *s, const char *what,
                   const void *was, const void *is);

#endif
