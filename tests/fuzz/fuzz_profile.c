/* tests/fuzz/fuzz_profile.c: bytes → a device profile → times modelled by it.

   Whatever the bytes are, reading them succeeds or names an error and leaves nothing behind, and a
   time that a profile gives is a number, not less than nothing.
 */
#include "graph/profile.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void model(const rgi_profile *p, const char *op, const char *kernels) {
  static const rg_cost cost[] = {
      {0, 0, 0, 0, 0}, {1e9, 1e6, 1e6, 0, 0}, {0, 0, 1e12, 1e6, 1e9}, {1e18, 0, 1, 0, 0}};
  for (int i = 0; i < RGI_COUNT(cost); i++)
    for (int d = 0; d < RG_DTYPE_COUNT; d++) {
      const double ms = rgi_profile_ms(p, op, kernels, (rg_dtype)d, &cost[i]);
      if (!(ms >= 0) || isnan(ms)) abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  rg_context *ctx;
  rgi_profile *p;
  rg_error e = {0};
  if (rg_context_create(NULL, &ctx, NULL) != RG_OK) return 0;
  char *copy = malloc(size ? size : 1); /* exact, so that reading past its end is seen */
  if (copy) {
    memcpy(copy, data, size);
    const rg_status status = rgi_profile_parse(ctx, copy, size, "fuzz", "fuzz", &p, &e);
    if (status != e.status || (status == RG_OK) != (p != NULL)) abort();
    if (status != RG_OK && (status == RG_E_INTERNAL || !e.message[0])) abort();
    if (p) {
      model(p, "never measured", NULL);
      for (int i = 0; i < p->nmeasured && i < 8; i++) {
        model(p, p->measured[i].op, p->measured[i].kernels);
        model(p, p->measured[i].op, "other: why");
      }
    }
    rgi_profile_destroy(p);
    free(copy);
  }
  rg_context_destroy(ctx);
  return 0;
}
