/* regraph/names.h: how reports fold what many layers have alike and write sizes, for front ends
   that do so, too. */
#ifndef REGRAPH_NAMES_H
#define REGRAPH_NAMES_H

#include "regraph.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Reports write nodes of one pattern that say the same as one line, where they are more than so
 * many. */
enum { RG_MOST_APART = 3 };
/* The name with * for its numbers, as a policy's pattern has it: "layer12_q" gives "layer*_q". It
 * is never longer than the name; what `size` bytes have no room for is cut. */
RG_API void rg_name_pattern(const char *name, char *pattern, size_t size);
/* "1.50 GiB", "93.0 MiB", "17 B"; returns buffer. */
RG_API const char *rg_human_bytes(int64_t bytes, char buffer[32]);

#ifdef __cplusplus
}
#endif
#endif
