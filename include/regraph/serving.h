/* regraph/serving.h: the host's side of serving, a part of regraph.h, which includes it: pages, and
   a queue of requests on them. */
#ifndef REGRAPH_SERVING_H
#define REGRAPH_SERVING_H

#include "regraph.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- pages -------------------------------------------------------------------------------------
 * Which sequence has which pages of a pool: the host's side of serving (docs/serving.md). It
 * touches no cache; tables and copies that it hands out are inputs of the graph's next step.
 *
 *   rg_pages_open(p, prompt, n, &seq, &known, &e);     // `known` tokens are in pages already
 *   for each step:
 *     rg_pages_reserve(p, seq, n, &e);                 // room for n more, or RG_E_LIMIT
 *     rg_pages_table(p, seq, row, M, &e);
 *     rg_pages_copies(p, pairs, most, &count, &e);     // for page_copy, before anything is written
 *     ... run the step ...
 *     rg_pages_commit(p, seq, tokens, n, &e);          // they are in the pages now
 *   rg_pages_close(p, seq, &e);
 *
 * A full page whose tokens, and all before them, are known is found again by rg_pages_open, and
 * kept after its last sequence is closed until its room is needed. A page that several sequences
 * hold is copied before one writes to it. A call that fails changes nothing; where pages run out
 * (RG_E_LIMIT) close or truncate another sequence and call again. One thread at a time. */
typedef struct rg_pages rg_pages;
typedef int64_t rg_sequence; /* never 0; a closed one's number does not come again */

typedef struct rg_pages_options {
  size_t size;
  int64_t pages, page; /* P, tokens of a page */
  bool no_prefixes;    /* nothing is found again */
  int64_t most;        /* pages of one sequence (M); 0: as many as there are */
} rg_pages_options;

typedef struct rg_pages_info {
  int64_t used; /* pages that sequences hold, or a copy that is due reads */
  int64_t kept; /* nobody's, but found again: to be had like those that are free */
  int64_t free;
  int64_t shared; /* of those used: held by more than one */
  int64_t sequences;
} rg_pages_info;

RG_API rg_status rg_pages_create(rg_context *ctx, const rg_pages_options *options, rg_pages **out,
                                 rg_error *error);
RG_API void rg_pages_destroy(rg_pages *pages);
/* A new sequence, of these tokens' longest beginning that is in pages: whole ones, and never all n,
 * for the last one's logits are wanted. tokens NULL (n 0): an empty one. */
RG_API rg_status rg_pages_open(rg_pages *pages, const int32_t *tokens, int64_t n, rg_sequence *out,
                               int64_t *known, rg_error *error);
/* Another that begins as this one does: it shares all pages, none is copied yet. What was reserved
 * is so no more. */
RG_API rg_status rg_pages_fork(rg_pages *pages, rg_sequence sequence, rg_sequence *out,
                               rg_error *error);
/* Makes room for `n` tokens after those that are there (not after others reserved before). */
RG_API rg_status rg_pages_reserve(rg_pages *pages, rg_sequence sequence, int64_t n,
                                  rg_error *error);
/* `n` tokens, of what was reserved, are in the pages. NULL: not known; from here on nothing of the
 * sequence is found by others. */
RG_API rg_status rg_pages_commit(rg_pages *pages, rg_sequence sequence, const int32_t *tokens,
                                 int64_t n, rg_error *error);
/* Back to `context` tokens; what was reserved is so no more. */
RG_API rg_status rg_pages_truncate(rg_pages *pages, rg_sequence sequence, int64_t context,
                                   rg_error *error);
RG_API rg_status rg_pages_close(rg_pages *pages, rg_sequence sequence, rg_error *error);
/* A row of the step's table: the pages of what is there and reserved, then -1. */
RG_API rg_status rg_pages_table(const rg_pages *pages, rg_sequence sequence, int32_t *row,
                                int64_t most, rg_error *error);
/* Tokens that are there; -1 for no sequence. */
RG_API int64_t rg_pages_context(const rg_pages *pages, rg_sequence sequence);
/* Copies that are due, as pairs (source, target), which must be done before what was reserved is
 * written; they are due no more. Pairs past the last are -1. RG_E_LIMIT if there are more than
 * `most`. */
RG_API rg_status rg_pages_copies(rg_pages *pages, int32_t (*pairs)[2], int64_t most, int64_t *n,
                                 rg_error *error);
RG_API rg_status rg_pages_count(const rg_pages *pages, rg_pages_info *out);

/* ---- a queue of requests ------------------------------------------------------------------------
 * Who is served when: what a loop does between two steps of a graph (docs/serving.md). It keeps the
 * pages, fills a step's inputs, and touches no device.
 *
 *   rg_queue_add(q, prompt, n, 100, &request, &e);      // whenever one comes, at most 100 tokens
 *   for (;;) {
 *     rg_queue_step(q, &step, &e);                        // fills the arrays that step points to
 *     if (!step.rows) break;                              // nobody is left
 *     ... step's arrays to the device, a forward, `next` back from it ...
 *     rg_queue_done(q, next, &e);                         // where step.wanted[b], next[b] is
 *   }                                                     // request[b]'s next token
 *
 * Requests are served in the order in which they came. Those that are served have a slot each: one
 * token a step where only the last one is not in pages yet, and what is left of the step's rows for
 * prompts, in pieces. Where pages run out, the youngest of them waits again; its tokens are kept,
 * and what is no longer in pages later runs again. That changes when a token comes, not which.
 *
 * A call that fails changes nothing that shows, but rg_queue_step may have sent requests to wait;
 * it may be called again. One thread at a time. */
typedef struct rg_queue rg_queue;
typedef int64_t rg_request; /* 1, 2, 3 … as they are made, forks among them */

typedef struct rg_queue_options {
  size_t size;
  int64_t pages, page; /* P, tokens of a page */
  int64_t rows;        /* T: tokens of a step, as many as slots at least */
  int64_t slots;       /* B: sequences of a step */
  int64_t most;        /* M: pages of a sequence, the width of a step's table */
  bool no_prefixes;    /* nothing is found again */
  int64_t forks;       /* copies of pages that a step can make; 0: rg_queue_fork is refused */
} rg_queue_options;

/* A step's inputs, in the caller's memory of the host, and whose they are. What is nobody's is 0 in
 * tokens, lengths and context, -1 in pages and forks. */
typedef struct rg_queue_arrays {
  int32_t *tokens;     /* [T] */
  int32_t *lengths;    /* [B] */
  int32_t *context;    /* [B] */
  int32_t *pages;      /* [B, M] */
  int32_t (*forks)[2]; /* [forks, 2]; NULL where there are none */
  rg_request *request; /* [B] whose turn it is; 0: the slot is nobody's */
  bool *wanted;        /* [B] its next token is due, from the logits of its last row */
  bool *last;          /* [B] false; rg_queue_done sets it where a request has its last token */
  int64_t rows;        /* set: how many tokens there are; 0: nothing is to be done */
  int64_t used;        /* set: slots, from 0 on, that are somebody's */
} rg_queue_arrays;

typedef struct rg_queue_info {
  int64_t served, waiting;     /* requests */
  rg_pages_info pages;         /* now */
  int64_t steps, tokens;       /* so far: that were done; that they made */
  int64_t rows, found;         /* tokens that ran, and that were in pages already */
  int64_t preempted, copies;   /* times that a request was sent to wait; pages copied */
  int64_t finished, cancelled; /* requests */
} rg_queue_info;

RG_API rg_status rg_queue_create(rg_context *ctx, const rg_queue_options *options, rg_queue **out,
                                 rg_error *error);
RG_API void rg_queue_destroy(rg_queue *queue);
/* A request of n tokens, at least one and none of them negative, copied: at most `most` more, at
 * least one, are wanted. A token past the model's own fails the step that it is in, for all who
 * share that: check before.
 * RG_E_LIMIT for what would fit neither a row of the table nor the pool, if it had them for
 * itself. */
RG_API rg_status rg_queue_add(rg_queue *queue, const int32_t *tokens, int64_t n, int64_t most,
                              rg_request *out, rg_error *error);
/* Another that begins as this one does, in pages and tokens, but for the last token, which is
 * `token` here. Served beside it; if slots run out, the youngest waits. Not between rg_queue_step
 * and rg_queue_done. */
RG_API rg_status rg_queue_fork(rg_queue *queue, rg_request request, int32_t token, rg_request *out,
                               rg_error *error);
/* No more of it; also while a step runs, which then leaves nothing of it. */
RG_API rg_status rg_queue_cancel(rg_queue *queue, rg_request request, rg_error *error);
/* The next step. Not before the one before is done; `last` is borrowed until then. */
RG_API rg_status rg_queue_step(rg_queue *queue, rg_queue_arrays *arrays, rg_error *error);
/* The step ran: next[b] (the graph's `next`, or what was drawn from its logits) goes to the request
 * of slot b, where it was wanted. Where the caller has set last[b], that is the last one; wherever
 * it then is set, the request has ended, and its number is forgotten. A negative next[b] is none
 * (of logits that all are NaN, argmax says -1): the request ends without it, and others are served
 * on. next NULL: the step did not run to its end, and what it was to write runs again. */
RG_API rg_status rg_queue_done(rg_queue *queue, const int32_t *next, rg_error *error);
RG_API rg_status rg_queue_count(const rg_queue *queue, rg_queue_info *out);

#ifdef __cplusplus
}
#endif
#endif
