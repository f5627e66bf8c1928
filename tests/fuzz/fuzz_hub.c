/* tests/fuzz/fuzz_hub.c: bytes → what three ranks' connections, and a stranger's, bring to the
 * meeting point of processes, in any order and cut anywhere.
 *
 * Each piece of input is a byte that says what happens (which connection, and: that many bytes
 * come, a well-formed word comes, it ends, time passes) and what it needs. The hub must survive,
 * answer nobody who has not said HELLO but with a refusal, and tell everybody a failure once. */
#include "cp/hub.h"
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { RANKS = 3, CONNECTIONS = 4 };

/* Takes what the hub sends; counts failures told. */
static void drain(rgi_hub *h, int connection, int *failures) {
  static char out[CONNECTIONS][1 << 20];
  static size_t have[CONNECTIONS];
  size_t n;
  if (!failures) { /* begin anew */
    memset(have, 0, sizeof have);
    return;
  }
  const void *p = rgi_hub_outgoing(h, connection, &n);
  if (have[connection] + n > sizeof out[0]) abort();
  if (n) memcpy(out[connection] + have[connection], p, n);
  rgi_hub_sent(h, connection, n);
  have[connection] += n;
  while (have[connection] >= sizeof(rgi_frame)) {
    rgi_frame f;
    memcpy(&f, out[connection], sizeof f);
    if (have[connection] < sizeof f + f.bytes) abort(); /* the hub sends whole words */
    if (f.word != RGI_WELCOME && f.word != RGI_RESULT && f.word != RGI_FAIL) abort();
    failures[connection] += f.word == RGI_FAIL;
    have[connection] -= sizeof f + f.bytes;
    memmove(out[connection], out[connection] + sizeof f + f.bytes, have[connection]);
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  rg_context *ctx = NULL;
  rgi_hub *h = NULL;
  int failures[CONNECTIONS] = {0};
  double now = 0;
  if (rg_context_create(NULL, &ctx, NULL) != RG_OK) return 0;
  if (rgi_hub_create(ctx, RANKS, 7, 10, now, &h, NULL) != RG_OK) abort();
  drain(h, 0, NULL);
  for (int i = 0; i < CONNECTIONS; i++)
    if (rgi_hub_connect(h) != i) abort();
  for (size_t at = 0; at + 2 <= size; at += 2) {
    const int connection = data[at] % CONNECTIONS, what = data[at] / CONNECTIONS % 8;
    const size_t n = data[at + 1], left = size - at - 2;
    if (what < 2) { /* bytes as they are */
      const size_t k = n < left ? n : left;
      rgi_hub_take(h, connection, data + at + 2, k, now);
      at += k;
    } else if (what < 6) { /* a word, perhaps of another rank or size */
      char bytes[sizeof(rgi_frame) + 256] = {0};
      rgi_frame f =
          rgi_frame_of(1 + n % 10, connection % RANKS, n == 255 ? 4 : RANKS, n == 254 ? 8 : 7);
      f.piece = n / 10 % 8;
      f.bytes = n % 10 == RGI_FAIL - 1 || n % 10 == RGI_STUCK - 1
                    ? 5
                    : rgi_call_payload(f.word, f.piece, RANKS);
      f.node[0] = 'a' + what - 2;
      memcpy(bytes, &f, sizeof f);
      rgi_hub_take(h, connection, bytes, sizeof f + f.bytes, now);
    } else if (what == 6) {
      rgi_hub_gone(h, connection);
    } else {
      now += n;
      rgi_hub_tick(h, now);
    }
    for (int i = 0; i < CONNECTIONS; i++) drain(h, i, failures);
  }
  for (int i = 0; i < CONNECTIONS; i++)
    if (failures[i] > 1) abort();
  rgi_hub_destroy(h);
  rg_context_destroy(ctx);
  return 0;
}
