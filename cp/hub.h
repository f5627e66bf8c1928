/* cp/hub.h: the meeting point of ranks that are processes: what rank 0's process does with what the
 * ranks send over their connections, without any sockets, so that any bytes can be tried on it.
 *
 * A connection opens with HELLO and then makes calls one after another. The hub answers a call when
 * all ranks have made it: RESULT with what that rank gets. The first failure (a rank ends without
 * BYE, says FAIL, calls something else, or does not come within the deadline) stands; every rank
 * hears it once, as FAIL with one sentence, whether it waits or not. What is done elsewhere (NCCL)
 * a rank tells as STUCK; who does not say so within GRACE seconds of the first is who did not come.
 *
 *     call         its payload               the RESULT's
 *     all_gather   piece                     pieces by rank
 *     all_to_all   pieces by rank            pieces by rank
 *     halo         to previous, to next      from previous, from next
 *     barrier      nothing                   nothing
 */
#ifndef RGI_CP_HUB_H
#define RGI_CP_HUB_H

#include "../graph/base.h"

enum { RGI_HUB_MOST_RANKS = 1024 };

typedef enum rgi_word {
  RGI_HELLO = 1,
  RGI_WELCOME, /* all ranks have come */
  RGI_ALL_GATHER,
  RGI_ALL_TO_ALL,
  RGI_HALO,
  RGI_BARRIER,
  RGI_RESULT,
  RGI_FAIL, /* payload: a sentence */
  RGI_BYE,
  RGI_STUCK, /* payload: a collective that this rank waits in for too long, on its GPU */
  RGI_WORDS
} rgi_word;

/* What stands before a payload, in the machine's own byte order: a peer with another one is not
 * understood, and told so by `magic`. */
typedef struct rgi_frame {
  uint32_t magic;
  uint16_t version, word;
  uint32_t rank, size;
  uint64_t nonce; /* of the job: another one's processes may find the port */
  uint64_t piece, bytes;
  char node[88];
} rgi_frame;
static inline rgi_frame rgi_frame_of(rgi_word word, int rank, int size, uint64_t nonce) {
  return (rgi_frame){.magic = 0x70636772,
                     .version = 1,
                     .word = (uint16_t)word,
                     .rank = (uint32_t)rank,
                     .size = (uint32_t)size,
                     .nonce = nonce};
}
/* Bytes of a call's payload, or of the RESULT's. */
uint64_t rgi_call_payload(rgi_word word, uint64_t piece, int size);
uint64_t rgi_result_payload(rgi_word word, uint64_t piece, int size, int rank);

typedef struct rgi_hub rgi_hub;
/* deadline: seconds that ranks may come after the first one, at the start and to every call. */
rg_status rgi_hub_create(const rg_context *ctx, int size, uint64_t nonce, double deadline,
                         double now, rgi_hub **out, rg_error *e);
void rgi_hub_destroy(rgi_hub *h);

/* A new connection's number; -1 if there are too many (or no memory). */
int rgi_hub_connect(rgi_hub *h);
/* Bytes came on a connection; it ended; time passed. */
void rgi_hub_take(rgi_hub *h, int connection, const void *bytes, size_t n, double now);
void rgi_hub_gone(rgi_hub *h, int connection);
void rgi_hub_tick(rgi_hub *h, double now);

/* What is to be sent on a connection, and that n bytes of it were. */
const void *rgi_hub_outgoing(const rgi_hub *h, int connection, size_t *n);
void rgi_hub_sent(rgi_hub *h, int connection, size_t n);
/* May the connection be closed, once all is sent? */
bool rgi_hub_closes(const rgi_hub *h, int connection);
/* Is it nobody's so far, with nothing to hear? A stranger's that never says a word stays so. */
bool rgi_hub_idle(const rgi_hub *h, int connection);
bool rgi_hub_failed(const rgi_hub *h);
/* Has every rank been here, if only to be refused? */
bool rgi_hub_complete(const rgi_hub *h);

#endif
