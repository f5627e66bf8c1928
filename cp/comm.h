/* cp/comm.h: what is done with communicators beside moving bytes: agreeing, at start-up, on what
 * all ranks must have in common. Engines: comm_threads.c. */
#ifndef RGI_CP_COMM_H
#define RGI_CP_COMM_H

#include "../graph/base.h"

/* Something that all ranks must have in common, and a hash of it. */
typedef struct rgi_cp_field {
  const char *name; /* "policy" */
  uint64_t hash;
} rgi_cp_field;

enum { RGI_CP_FIELDS = 16 }; /* most there may be */

/* Collective: RG_E_COMM on every rank if one has another value than rank 0, naming rank and
 * field. */
rg_status rgi_cp_agree(const rg_context *ctx, rg_comm *comm, const rgi_cp_field *field, int n,
                       rg_error *e);

/* The message a rank sends, and what `size` of them, by rank, say about each other. Pure: any bytes
 * may come. */
typedef struct rgi_cp_hello {
  char magic[8];
  uint32_t format, size, rank, fields;
  uint64_t hash[RGI_CP_FIELDS];
} rgi_cp_hello;
rg_status rgi_cp_compare(const rgi_cp_hello *hello, int size, const rgi_cp_field *field, int n,
                         rg_error *e);

#endif
