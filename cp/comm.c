/* cp/comm.c: see comm.h. */
#include "comm.h"
#include <string.h>

static const char magic[8] = "regraph";
enum { FORMAT = 1 };

static rg_status differs(int rank, const char *what, rg_error *e) {
  return rgi_fail(e, RG_E_COMM, NULL, NULL, "rank %d has another %s than rank 0", rank, what);
}

rg_status rgi_cp_compare(const rgi_cp_hello *hello, int size, const rgi_cp_field *field, int n,
                         rg_error *e) {
  for (int r = 0; r < size; r++) {
    const rgi_cp_hello *h = &hello[r];
    if (memcmp(h->magic, magic, sizeof magic) != 0)
      return rgi_fail(e, RG_E_COMM, NULL, NULL,
                      "what rank %d sent at the start is no greeting of regraph", r);
    if (h->format != FORMAT) return differs(r, "library version", e);
    if (h->size != (uint32_t)size || h->rank != (uint32_t)r)
      return rgi_fail(e, RG_E_COMM, NULL, NULL, "rank %d of %d takes itself for rank %u of %u", r,
                      size, h->rank, h->size);
    if (h->fields != (uint32_t)n) return differs(r, "library version", e);
  }
  for (int i = 0; i < n; i++)
    for (int r = 1; r < size; r++)
      if (hello[r].hash[i] != hello[0].hash[i]) return differs(r, field[i].name, e);
  return RG_OK;
}

rg_status rgi_cp_agree(const rg_context *ctx, rg_comm *comm, const rgi_cp_field *field, int n,
                       rg_error *e) {
  rgi_cp_hello mine = {.format = FORMAT,
                       .size = (uint32_t)comm->size,
                       .rank = (uint32_t)comm->rank,
                       .fields = (uint32_t)n};
  if (n > RGI_CP_FIELDS) return rgi_fail(e, RG_E_INTERNAL, NULL, NULL, "%d fields to agree on", n);
  memcpy(mine.magic, magic, sizeof magic);
  for (int i = 0; i < n; i++) mine.hash[i] = field[i].hash;
  rgi_cp_hello *all = rgi_malloc(ctx, (size_t)comm->size * sizeof *all);
  if (!all) return rgi_nomem(e);
  rg_status status = comm->all_gather(comm, "start-up", &mine, all, sizeof mine, NULL, e);
  if (status == RG_OK) status = rgi_cp_compare(all, comm->size, field, n, e);
  rgi_free(ctx, all);
  return status;
}
