/* exec/queue.c: whose turn it is (serving.h, "a queue of requests").
 *
 * Requests stand in one array in the order in which they came, forks behind what they stem from:
 *
 *     [ 0 … served )       have a sequence of pages and, if rows are left, a place in the step
 *     [ served … count )   wait, with no pages; some were served before
 *
 * A step goes through the first part from the oldest on, so that whoever needs a page may take it
 * from the last: that one has no part in the step yet. The oldest always gets what it needs, since
 * a request that the whole pool can't hold is never let in. Then the second part moves up, in
 * order, and stops at the first that does not fit.
 *
 * A request's tokens stay here until it ends: a prompt, what was made, and the one that was made
 * last, which is in no page yet. So a request that waits again loses nothing: it comes back as a
 * longer prompt.
 *
 * It knows nothing of pages but the public calls.
 */
#include "../graph/base.h"

#include <string.h>

typedef struct request {
  rg_request number;
  int32_t *token;       /* [end] */
  int64_t n, end;       /* tokens there are; as many as there will be */
  int64_t context;      /* of these, in pages */
  rg_sequence sequence; /* 0: waits */
  int64_t rows;         /* in this step */
  int64_t lacked;       /* pages it would have had to find when it last did not fit */
  bool forked;          /* the page that it writes to next may be another's, too */
  bool gone;
} request;

struct rg_queue {
  rg_context *ctx;
  rg_queue_options o;
  rg_pages *pages;
  request **live; /* [room] */
  int64_t count, served, room;
  request **slot; /* [B] of the step that runs; NULL: cancelled since */
  int64_t used;
  bool *last; /* the caller's */
  bool running;
  rg_request numbers;
  rg_queue_info info;
};

RGI_NO_TAIL(rg_queue_options, forks);

static int64_t pages_for(const rg_queue *q, int64_t tokens) {
  return (tokens + q->o.page - 1) / q->o.page;
}

rg_status rg_queue_create(rg_context *ctx, const rg_queue_options *options, rg_queue **out,
                          rg_error *e) {
  rg_queue_options o = {0};
  if (out) *out = NULL;
  if (!ctx || !options || !out)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_queue_create needs a context, options and a place for the queue");
  RGI_TRY(RGI_OPTIONS(rg_queue_options, forks, options, &o, e));
  if (o.slots < 1 || o.rows < o.slots || o.most < 1 || o.forks < 0 || o.rows > INT32_MAX ||
      o.most > INT32_MAX || o.forks > INT32_MAX)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "steps of %lld rows, %lld slots, %lld pages a slot, %lld copies; expected a "
                    "slot, a row for each, a page, no negative number, and none past 2^31 - 1",
                    (long long)o.rows, (long long)o.slots, (long long)o.most, (long long)o.forks);
  rg_queue *q = rgi_malloc(ctx, sizeof *q);
  if (!q) return rgi_nomem(e);
  *q = (rg_queue){.ctx = ctx, .o = o};
  const rg_pages_options po = {.size = sizeof po,
                               .pages = o.pages,
                               .page = o.page,
                               .most = o.most,
                               .no_prefixes = o.no_prefixes};
  rg_status status = rg_pages_create(ctx, &po, &q->pages, e);
  if (status == RG_OK) {
    q->slot = rgi_malloc(ctx, (size_t)o.slots * sizeof *q->slot);
    if (!q->slot) status = rgi_nomem(e);
  }
  if (status != RG_OK) {
    rg_queue_destroy(q);
    return status;
  }
  *out = q;
  return RG_OK;
}

static void free_request(const rg_queue *q, request *r) {
  if (r) rgi_free(q->ctx, r->token);
  rgi_free(q->ctx, r);
}

void rg_queue_destroy(rg_queue *q) {
  if (!q) return;
  for (int64_t i = 0; i < q->count; i++) free_request(q, q->live[i]);
  rgi_free(q->ctx, q->live);
  rgi_free(q->ctx, q->slot);
  rg_pages_destroy(q->pages);
  rgi_free(q->ctx, q);
}

/* ---- coming and going ---- */

/* Room for one more in the array, and the request itself. */
static rg_status make(rg_queue *q, int64_t end, request **out, rg_error *e) {
  if (q->count == q->room) {
    const int64_t room = q->room ? 2 * q->room : 16;
    request **live = rgi_malloc(q->ctx, (size_t)room * sizeof *live);
    if (!live) return rgi_nomem(e);
    if (q->count) memcpy(live, q->live, (size_t)q->count * sizeof *live);
    rgi_free(q->ctx, q->live);
    q->live = live;
    q->room = room;
  }
  request *r = rgi_malloc(q->ctx, sizeof *r);
  if (!r) return rgi_nomem(e);
  *r = (request){.end = end, .token = rgi_malloc(q->ctx, (size_t)end * sizeof *r->token)};
  if (!r->token) {
    free_request(q, r);
    return rgi_nomem(e);
  }
  *out = r;
  return RG_OK;
}

static void insert(rg_queue *q, int64_t at, request *r) {
  memmove(q->live + at + 1, q->live + at, (size_t)(q->count - at) * sizeof *q->live);
  q->live[at] = r;
  q->count++;
  r->number = ++q->numbers;
}

/* One that no table has a row for would fail every step, whoever else shares it. */
static rg_status check_token(int32_t token, int64_t at, rg_error *e) {
  if (token >= 0) return RG_OK;
  return rgi_fail(e, RG_E_VALUE, NULL, NULL, "token %lld of the request is %d; expected 0 or more",
                  (long long)at, token);
}

rg_status rg_queue_add(rg_queue *q, const int32_t *tokens, int64_t n, int64_t most, rg_request *out,
                       rg_error *e) {
  request *r;
  int64_t end;
  if (out) *out = 0;
  if (!q || !tokens || !out || n < 1 || most < 1 || !rgi_add(n, most, &end))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_queue_add needs a queue, one token at least, one at least that is wanted, "
                    "and a place for the request");
  const int64_t row = q->o.most < q->o.pages ? q->o.most : q->o.pages;
  if (end - 1 > row * q->o.page) /* the last one is never in a page */
    return rgi_fail(e, RG_E_LIMIT, NULL, NULL,
                    "a request of %lld tokens and %lld more needs %lld pages; %s %lld",
                    (long long)n, (long long)most, (long long)pages_for(q, end - 1),
                    q->o.most < q->o.pages ? "a sequence has at most" : "the pool has",
                    (long long)row);
  for (int64_t t = 0; t < n; t++) RGI_TRY(check_token(tokens[t], t, e));
  RGI_TRY(make(q, end, &r, e));
  memcpy(r->token, tokens, (size_t)n * sizeof *tokens);
  r->n = n;
  insert(q, q->count, r);
  *out = r->number;
  return RG_OK;
}

static rg_status find(const rg_queue *q, rg_request number, int64_t *at, rg_error *e) {
  *at = 0;
  if (!q) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the queue is NULL");
  for (; *at < q->count; ++*at)
    if (q->live[*at]->number == number) return RG_OK;
  return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%lld is no request that is served or waits",
                  (long long)number);
}

static void let_pages_go(rg_queue *q, request *r) {
  if (r->sequence) rg_pages_close(q->pages, r->sequence, NULL);
  r->sequence = 0;
  r->context = r->rows = r->lacked = 0;
  r->forked = false;
}

/* The last of those that are served waits. */
static void preempt(rg_queue *q) {
  let_pages_go(q, q->live[--q->served]);
  q->info.preempted++;
}

/* After a step that was not, a page that a copy was to fill holds nothing. It is not full, so
 * nobody else finds it, and who had it gives it up. */
static void all_wait(rg_queue *q) {
  while (q->served) let_pages_go(q, q->live[--q->served]);
}

rg_status rg_queue_fork(rg_queue *q, rg_request number, int32_t token, rg_request *out,
                        rg_error *e) {
  request *r;
  int64_t at;
  if (out) *out = 0;
  if (!out)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "rg_queue_fork needs a place for the request");
  RGI_TRY(find(q, number, &at, e));
  if (!q->o.forks || q->running)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%s",
                    q->running ? "a fork while a step runs; expected after rg_queue_done"
                               : "a fork where a step copies no pages (forks 0)");
  request *from = q->live[at];
  RGI_TRY(check_token(token, from->n - 1, e));
  RGI_TRY(make(q, from->end, &r, e));
  if (from->sequence) {
    const rg_status status = rg_pages_fork(q->pages, from->sequence, &r->sequence, e);
    if (status != RG_OK) {
      free_request(q, r);
      return status;
    }
    from->forked = r->forked = true;
  }
  memcpy(r->token, from->token, (size_t)from->n * sizeof *r->token);
  r->token[from->n - 1] = token;
  r->n = from->n;
  r->context = from->context;
  insert(q, at + 1, r);
  q->served += r->sequence != 0;
  if (q->served > q->o.slots) preempt(q);
  *out = r->number;
  return RG_OK;
}

/* Takes out what is gone. */
static void close_up(rg_queue *q) {
  int64_t count = 0, served = 0;
  for (int64_t i = 0; i < q->count; i++) {
    request *r = q->live[i];
    if (r->gone) {
      let_pages_go(q, r);
      free_request(q, r);
      continue;
    }
    served += r->sequence != 0;
    q->live[count++] = r;
  }
  q->count = count;
  q->served = served;
}

rg_status rg_queue_cancel(rg_queue *q, rg_request number, rg_error *e) {
  int64_t at;
  RGI_TRY(find(q, number, &at, e));
  request *r = q->live[at];
  for (int64_t b = 0; b < q->used; b++)
    if (q->slot[b] == r) q->slot[b] = NULL;
  r->gone = true;
  q->info.cancelled++;
  close_up(q); /* its pages go to nobody before the step is done */
  return RG_OK;
}

/* ---- a step ---- */

/* Room for n more of the i-th; false: it waits itself, being the last. */
static rg_status reserve(rg_queue *q, int64_t i, int64_t n, bool *has, rg_error *e) {
  for (;;) {
    rg_error own = {0};
    const rg_status status = rg_pages_reserve(q->pages, q->live[i]->sequence, n, &own);
    *has = status == RG_OK;
    if (status == RG_OK) return RG_OK;
    if (status != RG_E_LIMIT) {
      if (e && e->status == RG_OK) *e = own;
      return status;
    }
    preempt(q);
    if (q->served == i) return RG_OK;
  }
}

static rg_status go_on(rg_queue *q, int64_t *left, rg_error *e) {
  int64_t singles = 0, copies = q->o.forks;
  for (int64_t i = 0; i < q->served; i++) singles += q->live[i]->n - q->live[i]->context == 1;
  for (int64_t i = 0; i < q->served; i++) {
    request *r = q->live[i];
    const int64_t due = r->n - r->context;
    int64_t n = due;
    if (due == 1)
      singles--;
    else if (n > *left - singles)
      n = *left - singles;
    if (n > *left) n = *left;
    if (n < 1 || (r->forked && !copies)) continue;
    bool has;
    RGI_TRY(reserve(q, i, n, &has, e));
    if (!has) return RG_OK;
    copies -= r->forked;
    r->forked = false;
    r->rows = n;
    *left -= n;
  }
  return RG_OK;
}

static int64_t to_be_had(const rg_queue *q) {
  rg_pages_info info = {0};
  rg_pages_count(q->pages, &info);
  return info.kept + info.free;
}

/* The first that waits is served, if there is room for all of its tokens, and a page for each of
 * those before to grow into: otherwise it would soon be sent away again. */
static rg_status move_up(rg_queue *q, int64_t *left, bool *up, rg_error *e) {
  request *r = q->live[q->served];
  int64_t known;
  *up = false;
  if (q->served && r->lacked > to_be_had(q)) return RG_OK;
  RGI_TRY(rg_pages_open(q->pages, r->token, r->n, &r->sequence, &known, e));
  const int64_t lacks = pages_for(q, r->n) - known / q->o.page + q->served;
  int64_t n = r->n - known < *left ? r->n - known : *left;
  if (q->served && lacks > to_be_had(q)) {
    let_pages_go(q, r);
    r->lacked = lacks;
    return RG_OK;
  }
  const rg_status status = rg_pages_reserve(q->pages, r->sequence, n, e);
  if (status != RG_OK) {
    let_pages_go(q, r);
    return status;
  }
  q->served++;
  q->info.found += known;
  r->context = known;
  r->rows = n;
  *left -= n;
  *up = true;
  return RG_OK;
}

static rg_status fill(rg_queue *q, rg_queue_arrays *a, rg_error *e) {
  const int64_t B = q->o.slots, M = q->o.most;
  int64_t b = 0, row = 0, copies;
  for (int64_t i = 0; i < q->served; i++) {
    request *r = q->live[i];
    if (!r->rows) continue;
    RGI_TRY(rg_pages_table(q->pages, r->sequence, a->pages + b * M, M, e));
    memcpy(a->tokens + row, r->token + r->context, (size_t)r->rows * sizeof *r->token);
    a->lengths[b] = (int32_t)r->rows;
    a->context[b] = (int32_t)(r->context + r->rows);
    a->request[b] = r->number;
    a->wanted[b] = r->context + r->rows == r->n;
    a->last[b] = false;
    q->slot[b++] = r;
    row += r->rows;
  }
  memset(a->tokens + row, 0, (size_t)(q->o.rows - row) * sizeof *a->tokens);
  memset(a->pages + b * M, 0xff, (size_t)((B - b) * M) * sizeof *a->pages);
  for (int64_t k = b; k < B; k++) {
    a->lengths[k] = a->context[k] = 0;
    a->request[k] = 0;
    a->wanted[k] = a->last[k] = false;
  }
  RGI_TRY(rg_pages_copies(q->pages, a->forks, q->o.forks, &copies, e));
  q->info.copies += copies;
  a->rows = row;
  a->used = q->used = b;
  q->last = a->last;
  q->running = row > 0;
  return RG_OK;
}

rg_status rg_queue_step(rg_queue *q, rg_queue_arrays *a, rg_error *e) {
  if (a) a->rows = a->used = 0;
  if (!q || !a || !a->tokens || !a->lengths || !a->context || !a->pages || !a->request ||
      !a->wanted || !a->last || (q->o.forks && !a->forks))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "rg_queue_step needs a queue and all arrays");
  if (q->running)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "the step before is not done; expected rg_queue_done first");
  const int64_t preempted = q->info.preempted;
  int64_t left = q->o.rows;
  for (int64_t i = 0; i < q->served; i++) q->live[i]->rows = 0;
  rg_status status = go_on(q, &left, e);
  bool up = q->info.preempted == preempted;
  while (status == RG_OK && up && left && q->served < q->count && q->served < q->o.slots)
    status = move_up(q, &left, &up, e);
  if (status == RG_OK) status = fill(q, a, e);
  if (status != RG_OK) all_wait(q);
  return status;
}

rg_status rg_queue_done(rg_queue *q, const int32_t *next, rg_error *e) {
  if (!q || !q->running)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "no step runs; expected rg_queue_step first");
  bool ended = false, filled = false;
  if (!next) all_wait(q);
  for (int64_t b = 0; b < q->used && next; b++) {
    request *r = q->slot[b];
    const bool none = next[b] < 0, told = q->last[b] || none;
    q->last[b] = false;
    if (!r) continue;
    rg_pages_commit(q->pages, r->sequence, r->token + r->context, r->rows, NULL);
    filled |= r->rows > 1 && r->context / q->o.page < (r->context + r->rows) / q->o.page;
    r->context += r->rows;
    q->info.rows += r->rows;
    if (r->context < r->n) continue;
    if (!none) r->token[r->n++] = next[b], q->info.tokens++;
    if (r->n < r->end && !told) continue;
    r->gone = ended = true;
    q->info.finished++;
    q->last[b] = true;
  }
  if (ended) close_up(q);
  /* whoever waits first may share pages of prompts that are full since, and lack fewer */
  if (filled && q->served < q->count) q->live[q->served]->lacked = 0;
  q->info.steps += next != NULL;
  q->used = 0;
  q->running = false;
  return RG_OK;
}

rg_status rg_queue_count(const rg_queue *q, rg_queue_info *out) {
  if (!q || !out) return RG_E_USAGE;
  *out = q->info;
  out->served = q->served;
  out->waiting = q->count - q->served;
  return rg_pages_count(q->pages, &out->pages);
}
