/* tests/fuzz/fuzz_pack.c: bytes → buffers → a packing within a tiny limit, judged by the
   independent checker.

   Four bytes a buffer: lower, length, size, and how far to shift the size. The first byte chooses
   the alignment.
 */
#include "memplan/pack.h"
#include "tests/harness/pack_instances.h"
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  enum { MOST = 96 };
  rg_buffer b[MOST];
  rg_context *ctx;
  size_t n = 0;
  if (size < 1) return 0;
  int64_t align = data[0] % 4 == 0 ? 256 : data[0] % 4 == 1 ? 7 : 1, greedy, peak;
  for (const uint8_t *p = data + 1; p + 4 <= data + size && n < MOST; p += 4, n++)
    b[n] = (rg_buffer){p[0] % 64, p[0] % 64 + p[1] % 48, (int64_t)p[2] << p[3] % 24, -1};
  if (rg_context_create(NULL, &ctx, NULL) != RG_OK) return 0;
  rg_pack_options o = {.seconds = 0.02, .align = align};
  rg_pack_result r;
  if (rgi_pack_greedy(ctx, b, n, align, &greedy, NULL) != RG_OK) abort();
  if (!pack_valid(b, n, align, &peak) || peak != greedy) abort();
  if (rg_pack(ctx, b, n, &o, &r, NULL) != RG_OK) abort();
  if (!pack_valid(b, n, align, &peak) || peak != r.peak) abort();
  if (r.peak > greedy || r.peak < r.lower_bound || (r.peak == r.lower_bound && !r.optimal)) abort();
  if (r.lower_bound < pack_most_alive(b, n)) abort();
  rg_context_destroy(ctx);
  return 0;
}
