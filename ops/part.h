/* ops/part.h: where a node stands for several, the call of one of them: its ports and attributes
 * are those of the same names. */
#ifndef RGI_PART_H
#define RGI_PART_H

#include "../graph/ir.h"

enum { RGI_PART_PORTS = 16 };
typedef struct rgi_part {
  rg_call call; /* borrows the rest */
  rg_value attr[RGI_PART_PORTS];
  rg_arg in[RGI_PART_PORTS], out[RGI_PART_PORTS];
  int32_t in_begin[RGI_PART_PORTS + 1], out_begin[RGI_PART_PORTS + 1];
} rgi_part;

/* c's part of op `op`, one element a port. What `op` reads and c has made (lse for topk) is found
 * among the outputs; attributes that c has not have their default. */
void rgi_part_of(const rg_call *c, const rg_op *op, rgi_part *p);
/* The same of a node's first part: what c has as "first.NAME" is its NAME. */
void rgi_part_of_first(const rg_call *c, const rg_op *op, rgi_part *p);
/* What that part takes, added to what others do. */
void rgi_part_cost(const rgi_part *p, rg_cost *sum);

#endif
