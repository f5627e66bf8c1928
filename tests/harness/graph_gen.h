/* tests/harness/graph_gen.h: random specs out of the op table: directed acyclic graphs in which
 * tensors are read often, twice by one node, through views of views, and are outputs besides.
 */
#ifndef GRAPH_GEN_H
#define GRAPH_GEN_H

#include "optest.h"

typedef struct gen_options {
  bool whole; /* no dead rows, and views may break up the token axis */
  bool moved; /* views may break up the token axis though there are dead rows */
  bool mixed; /* f16 and bf16 beside f32, with casts between them */
  bool large; /* heads, groups, blocks and windows as models have them, mostly of one type */
  bool stops; /* some gradients are stopped; without it, seeds draw what they drew before */
  int nodes;  /* wanted, at least */
} gen_options;

/* JSON text that lives as long as t. Free dimensions are T, S (rows of keys that have lengths of
 * their own) and B; the inputs "cu_seqlens", "cu_keys" and "q_offset" go with them. Weights are
 * called "w…": draw them smaller by sqrt(last extent). */
const char *graph_gen(ot *t, gen_options o);

#endif
