/* pack_instances.h: seeded packing instances, shared by the benchmark and the tests.

   The families "cuts", "coarse cuts" and "pinwheels" cut a full rectangle (time × bytes) into n
   pieces: the bound is known to be reachable, and nothing but a perfect packing reaches it.
 */
#ifndef RGI_PACK_INSTANCES_H
#define RGI_PACK_INSTANCES_H

#include <regraph/regraph.h>

typedef enum pack_family {
  PACK_RANDOM,      /* intervals of mixed length anywhere */
  PACK_NESTED,      /* lifetimes that mostly contain each other */
  PACK_TRAINING,    /* forward/backward: activations [i, 2N-i), gradients, short temporaries */
  PACK_MIXED,       /* many small, few large */
  PACK_CUTS,        /* guillotine cuts at fine coordinates */
  PACK_COARSE_CUTS, /* guillotine cuts on a coarse grid: many pieces start and end together */
  PACK_PINWHEELS,   /* cuts no guillotine can make, mixed with ones it can */
  PACK_FAMILIES
} pack_family;

const char *pack_family_name(pack_family family);
/* Whether the bound is reachable by construction. */
bool pack_family_perfect(pack_family family);
/* Fills b[0 … n). The same arguments give the same instance everywhere. */
void pack_instance(pack_family family, uint64_t seed, size_t n, rg_buffer *b);

/* The independent checker: O(n²), shares no code with the packer. Is it a packing on multiples of
 * align? */
bool pack_valid(const rg_buffer *b, size_t n, int64_t align, int64_t *peak);
/* Most bytes alive at once. */
int64_t pack_most_alive(const rg_buffer *b, size_t n);

#endif
