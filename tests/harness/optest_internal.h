/* tests/harness/optest_internal.h: shared between the harness' own files. */
#ifndef OPTEST_INTERNAL_H
#define OPTEST_INTERNAL_H

#include "optest.h"

struct ot_chunk;
enum { MAX_MAPS = 32 };
struct ot {
  struct ot_chunk *chunks;
  struct {
    void *at;
    size_t bytes;
  } map[MAX_MAPS];
  int nmap;
  uint64_t state;
};

/* ---- a call under construction ---- */

enum { MAX_ATTRS = 32, MAX_LIST = 16 };

struct binding {
  int port;
  ot_tensor *tensor; /* NULL: absent element of a list */
  char *before;      /* copy of tensor->block, taken before the run */
  size_t room;       /* bytes there are for it */
};

struct ot_call {
  ot *t;
  const rg_op *op;
  rg_value attr[MAX_ATTRS];
  int64_t lists[MAX_ATTRS][MAX_LIST];
  struct binding in[OT_MAX_TENSORS], out[OT_MAX_TENSORS];
  int nin, nout;
  int isa;
  const char *wrong; /* first mistake in building the call */
  rg_status status;
  int delta;
  bool rounds;
};

/* The compute capability whose kernels and tiles a call on a GPU of `cc` takes: that of an older
 * GPU, 80 or 86, where REGRAPH_TEST_CC says so. */
int ot_cc(int cc);

/* Runs the op's cuda_steps on device copies of every tensor's block (guards and holes travel too)
 * and of a poisoned workspace between guards, and copies what changed back. `call` holds shapes
 * without data. NULL, or what was wrong. */
const char *ot_run_gpu(ot_call *c, rg_call *call, rg_arg *in, int nin, rg_arg *out, int nout,
                       int poison);

/* Address of the i-th element in row-major order. */
void *ot_at(const ot_tensor *a, int64_t i);
/* Elements r·n … r·n + n − 1 lie side by side, for every r; n > 0 divides the number of
 * elements. */
int64_t ot_side_by_side(const ot_tensor *a);

#endif
