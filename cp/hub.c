/* cp/hub.c: see hub.h. */
#include "hub.h"
#include <stdio.h>
#include <string.h>

enum { STRANGERS = 16, SENTENCE = 480, GRACE = 2 };
static const uint64_t MOST_PIECE = UINT64_C(1) << 36;

typedef struct bytes {
  char *data;
  size_t n, capacity;
} bytes;

typedef struct connection {
  int rank; /* -1: has not said HELLO */
  bool open, closing;
  bytes in, out;
} connection;

typedef struct member {
  int connection; /* -1: has not come */
  bool here, bye, stuck;
  rgi_word what; /* the call it is in, or was in last; 0: none */
  uint64_t piece;
  char node[sizeof((rgi_frame *)0)->node];
  bytes payload;
} member;

struct rgi_hub {
  const rg_context *ctx;
  int size, come, refused, arrived, connections; /* come, refused: of this job */
  uint64_t nonce;
  double deadline, since; /* since: when the first came, of the start or a call */
  double stuck_since;     /* 0: nobody is */
  char stuck_in[160];
  bool started, failed;
  char failure[SENTENCE];
  connection *at; /* [size + STRANGERS] */
  member *rank;   /* [size] */
};

static const char *const name[RGI_WORDS] = {
    [RGI_ALL_GATHER] = "all_gather",
    [RGI_ALL_TO_ALL] = "all_to_all",
    [RGI_HALO] = "halo",
    [RGI_BARRIER] = "barrier",
};
static bool is_call(int word) {
  return word > 0 && word < RGI_WORDS && name[word];
}

uint64_t rgi_call_payload(rgi_word word, uint64_t piece, int size) {
  return word == RGI_ALL_GATHER   ? piece
         : word == RGI_ALL_TO_ALL ? piece * (uint64_t)size
         : word == RGI_HALO       ? 2 * piece
                                  : 0;
}
uint64_t rgi_result_payload(rgi_word word, uint64_t piece, int size, int rank) {
  return word == RGI_HALO      ? ((rank > 0) + (uint64_t)(rank + 1 < size)) * piece
         : word == RGI_BARRIER ? 0
                               : piece * (uint64_t)size;
}

/* ---- bytes ---- */

static bool append(const rgi_hub *h, bytes *b, const void *data, size_t n) {
  if (b->n + n > b->capacity) {
    size_t capacity = b->capacity ? 2 * b->capacity : 512;
    while (capacity < b->n + n) capacity *= 2;
    char *more = rgi_malloc(h->ctx, capacity);
    if (!more) return false;
    if (b->n) memcpy(more, b->data, b->n);
    rgi_free(h->ctx, b->data);
    b->data = more;
    b->capacity = capacity;
  }
  if (n) memcpy(b->data + b->n, data, n);
  b->n += n;
  return true;
}
static void drop(bytes *b, size_t n) {
  b->n -= n;
  if (b->n) memmove(b->data, b->data + n, b->n);
}

/* ---- failing ---- */

static void send_frame(rgi_hub *h, connection *c, rgi_word word, const void *payload, size_t n) {
  rgi_frame f = rgi_frame_of(word, c->rank < 0 ? 0 : c->rank, h->size, h->nonce);
  f.bytes = n;
  /* without memory for an answer the connection ends, which the rank understands */
  if (!append(h, &c->out, &f, sizeof f) || !append(h, &c->out, payload, n)) c->closing = true;
}

static void fail_all(rgi_hub *h, const char *sentence) {
  if (h->failed) return;
  h->failed = true;
  snprintf(h->failure, sizeof h->failure, "%s", sentence);
  for (int i = 0; i < h->connections; i++)
    if (h->at[i].open && h->at[i].rank >= 0)
      send_frame(h, &h->at[i], RGI_FAIL, h->failure, strlen(h->failure));
}

static const char *last_call(const member *m, char *text, size_t size) {
  snprintf(text, size, "%s%s%.87s", m->what ? name[m->what] : "none", m->what ? " " : "",
           m->what ? m->node : "");
  return text;
}

/* Somebody did not come to where `waits` is (NULL: to the start) in time. */
static void too_late(rgi_hub *h, const member *waits) {
  char sentence[SENTENCE], there[128], last[128];
  for (int r = 0; r < h->size; r++) {
    const member *m = &h->rank[r];
    if (waits ? m->here : m->connection >= 0) continue;
    if (waits)
      snprintf(sentence, sizeof sentence, "rank %d did not reach %s within %g s (its last: %s)", r,
               last_call(waits, there, sizeof there), h->deadline, last_call(m, last, sizeof last));
    else
      snprintf(sentence, sizeof sentence, "rank %d of %d did not come within %g s", r, h->size,
               h->deadline);
    fail_all(h, sentence);
    return;
  }
}

static const member *waiting(const rgi_hub *h) {
  for (int r = 0; r < h->size; r++)
    if (h->rank[r].here) return &h->rank[r];
  return NULL;
}

/* ---- calls ---- */

static bool agree(rgi_hub *h) {
  char sentence[SENTENCE], mine[128], theirs[128];
  const member *a = &h->rank[0];
  for (int r = 1; r < h->size; r++) {
    const member *b = &h->rank[r];
    if (a->what == b->what && a->piece == b->piece && strcmp(a->node, b->node) == 0) continue;
    last_call(a, mine, sizeof mine);
    last_call(b, theirs, sizeof theirs);
    snprintf(sentence, sizeof sentence,
             "rank %d calls %s with %llu bytes, rank 0 %s with %llu: another %s", r, theirs,
             (unsigned long long)b->piece, mine, (unsigned long long)a->piece,
             strcmp(mine, theirs) == 0 ? "number of bytes" : "collective");
    fail_all(h, sentence);
    return false;
  }
  return true;
}

static void answer(rgi_hub *h, int rank) {
  const rgi_word word = h->rank[rank].what;
  const uint64_t piece = h->rank[rank].piece;
  connection *c = &h->at[h->rank[rank].connection];
  rgi_frame f = rgi_frame_of(RGI_RESULT, rank, h->size, h->nonce);
  f.piece = piece;
  f.bytes = rgi_result_payload(word, piece, h->size, rank);
  bool good = append(h, &c->out, &f, sizeof f);
  for (int r = 0; r < h->size && good && piece; r++) {
    const char *from = h->rank[r].payload.data;
    if (word == RGI_ALL_GATHER)
      good = append(h, &c->out, from, piece);
    else if (word == RGI_ALL_TO_ALL)
      good = append(h, &c->out, from + (size_t)rank * piece, piece);
    else if (word == RGI_HALO && (r == rank - 1 || r == rank + 1)) /* what it sent towards me */
      good = append(h, &c->out, from + (r < rank ? piece : 0), piece);
  }
  if (!good) fail_all(h, "rank 0 is out of memory");
}

static void call(rgi_hub *h, connection *c, const rgi_frame *f, const char *payload, double now) {
  member *m = &h->rank[c->rank];
  if (h->failed) return; /* it has been told */
  if (m->here || !h->started) {
    c->closing = true;
    return;
  }
  m->here = true;
  m->what = (rgi_word)f->word;
  m->piece = f->piece;
  memcpy(m->node, f->node, sizeof m->node);
  m->node[sizeof m->node - 1] = 0;
  m->payload.n = 0;
  if (!append(h, &m->payload, payload, f->bytes)) {
    fail_all(h, "rank 0 is out of memory");
    return;
  }
  if (h->arrived++ == 0) h->since = now;
  for (int r = 0; r < h->size; r++)
    if (h->rank[r].bye) {
      char sentence[SENTENCE], there[128];
      snprintf(sentence, sizeof sentence, "rank %d left before %s", r,
               last_call(m, there, sizeof there));
      fail_all(h, sentence);
      return;
    }
  if (h->arrived < h->size || !agree(h)) return;
  for (int r = 0; r < h->size; r++) answer(h, r);
  for (int r = 0; r < h->size; r++) h->rank[r].here = false;
  h->arrived = 0;
}

/* ---- words ---- */

static void hello(rgi_hub *h, connection *c, const rgi_frame *f, double now) {
  char sentence[SENTENCE] = "";
  if (f->word != RGI_HELLO || f->bytes) {
    c->closing = true;
    return;
  }
  if (f->nonce != h->nonce) /* not ours to fail about */
    snprintf(sentence, sizeof sentence,
             "another job's ranks meet at this port: set REGRAPH_MASTER_PORT to a free one");
  if (!sentence[0] && f->size == (uint32_t)h->size && f->rank < f->size &&
      h->rank[f->rank].connection < 0) {
    c->rank = (int)f->rank;
    h->rank[f->rank].connection = (int)(c - h->at);
    if (h->failed) send_frame(h, c, RGI_FAIL, h->failure, strlen(h->failure));
    if (h->come++ == 0) h->since = now;
    h->started = h->come == h->size && !h->failed;
    for (int r = 0; r < h->size && h->started; r++)
      send_frame(h, &h->at[h->rank[r].connection], RGI_WELCOME, NULL, 0);
    return;
  }
  if (!sentence[0]) {
    snprintf(sentence, sizeof sentence, "rank %u of %u came to a meeting of %d ranks%s", f->rank,
             f->size, h->size, f->size == (uint32_t)h->size ? ": there is one already" : "");
    fail_all(h, sentence);
    h->refused++;
  }
  send_frame(h, c, RGI_FAIL, sentence, strlen(sentence));
  c->closing = true;
}

static void word(rgi_hub *h, connection *c, const rgi_frame *f, const char *payload, double now) {
  char sentence[SENTENCE];
  if (c->rank < 0) {
    hello(h, c, f, now);
  } else if (is_call(f->word)) {
    call(h, c, f, payload, now);
  } else if (f->word == RGI_FAIL) {
    snprintf(sentence, sizeof sentence, "%.*s", (int)f->bytes, f->bytes ? payload : "");
    fail_all(h, sentence);
  } else if (f->word == RGI_STUCK) {
    h->rank[c->rank].stuck = true;
    if (h->stuck_since > 0) return;
    h->stuck_since = now;
    snprintf(h->stuck_in, sizeof h->stuck_in, "%.*s", (int)f->bytes, f->bytes ? payload : "");
  } else if (f->word == RGI_BYE) {
    const member *m = waiting(h);
    char there[128];
    h->rank[c->rank].bye = c->closing = true;
    if (!m) return;
    snprintf(sentence, sizeof sentence, "rank %d left before %s", c->rank,
             last_call(m, there, sizeof there));
    fail_all(h, sentence);
  } else {
    c->closing = true;
  }
}

/* Can this be what comes next, so that its payload is worth waiting for? */
static bool plausible(const rgi_hub *h, const rgi_frame *f) {
  const rgi_frame own = rgi_frame_of(RGI_HELLO, 0, 0, 0);
  if (f->magic != own.magic || f->version != own.version || f->piece > MOST_PIECE) return false;
  if (is_call(f->word)) return f->bytes == rgi_call_payload(f->word, f->piece, h->size);
  return f->bytes < SENTENCE;
}

/* ---- from outside ---- */

void rgi_hub_take(rgi_hub *h, int i, const void *data, size_t n, double now) {
  connection *c = &h->at[i];
  if (!c->open || c->closing) return;
  if (!append(h, &c->in, data, n)) {
    c->closing = true;
    fail_all(h, "rank 0 is out of memory");
    return;
  }
  while (c->in.n >= sizeof(rgi_frame) && !c->closing) {
    rgi_frame f;
    memcpy(&f, c->in.data, sizeof f);
    if (!plausible(h, &f)) {
      char sentence[SENTENCE];
      c->closing = true;
      if (c->rank < 0) return; /* a stranger */
      snprintf(sentence, sizeof sentence, "what rank %d sent can not be understood", c->rank);
      fail_all(h, sentence);
      return;
    }
    if (c->in.n < sizeof f + f.bytes) return;
    word(h, c, &f, c->in.data + sizeof f, now);
    drop(&c->in, sizeof f + f.bytes);
  }
}

void rgi_hub_gone(rgi_hub *h, int i) {
  connection *c = &h->at[i];
  char sentence[SENTENCE], last[128];
  if (!c->open) return;
  c->open = false;
  rgi_free(h->ctx, c->in.data);
  rgi_free(h->ctx, c->out.data);
  c->in = c->out = (bytes){0};
  if (c->rank < 0 || h->rank[c->rank].bye) return;
  h->rank[c->rank].bye = true;
  snprintf(sentence, sizeof sentence, "rank %d ended without a word (its last: %s)", c->rank,
           last_call(&h->rank[c->rank], last, sizeof last));
  fail_all(h, sentence);
}

/* The first rank that is not stuck where others are. */
static void name_missing(rgi_hub *h) {
  char sentence[SENTENCE];
  int r = 0;
  while (r < h->size && h->rank[r].stuck) r++;
  if (r < h->size)
    snprintf(sentence, sizeof sentence, "rank %d did not reach %s within %g s", r, h->stuck_in,
             h->deadline);
  else
    snprintf(sentence, sizeof sentence, "all ranks wait in %s for more than %g s", h->stuck_in,
             h->deadline);
  fail_all(h, sentence);
}

void rgi_hub_tick(rgi_hub *h, double now) {
  if (!h->failed && h->stuck_since > 0 && now - h->stuck_since > GRACE) name_missing(h);
  if (h->failed || now - h->since <= h->deadline) return;
  if (!h->started)
    too_late(h, NULL);
  else if (h->arrived)
    too_late(h, waiting(h));
}

int rgi_hub_connect(rgi_hub *h) {
  int i = 0;
  while (i < h->connections && (h->at[i].open || h->at[i].rank >= 0)) i++;
  if (i == h->size + STRANGERS) return -1;
  if (i == h->connections) h->connections++;
  h->at[i] = (connection){.rank = -1, .open = true};
  return i;
}

const void *rgi_hub_outgoing(const rgi_hub *h, int i, size_t *n) {
  *n = h->at[i].open ? h->at[i].out.n : 0;
  return h->at[i].out.data;
}
void rgi_hub_sent(rgi_hub *h, int i, size_t n) {
  drop(&h->at[i].out, n);
}
bool rgi_hub_closes(const rgi_hub *h, int i) {
  return h->at[i].open && h->at[i].closing && h->at[i].out.n == 0;
}
bool rgi_hub_idle(const rgi_hub *h, int i) {
  return h->at[i].rank < 0 && h->at[i].out.n == 0;
}
bool rgi_hub_failed(const rgi_hub *h) {
  return h->failed;
}
bool rgi_hub_complete(const rgi_hub *h) {
  return h->come + h->refused >= h->size;
}

rg_status rgi_hub_create(const rg_context *ctx, int size, uint64_t nonce, double deadline,
                         double now, rgi_hub **out, rg_error *e) {
  rgi_hub *h = rgi_malloc(ctx, sizeof *h);
  connection *at = rgi_malloc(ctx, (size_t)(size + STRANGERS) * sizeof *at);
  member *rank = rgi_malloc(ctx, (size_t)size * sizeof *rank);
  *out = NULL;
  if (!h || !at || !rank) {
    rgi_free(ctx, h), rgi_free(ctx, at), rgi_free(ctx, rank);
    return rgi_nomem(e);
  }
  *h = (rgi_hub){.ctx = ctx,
                 .size = size,
                 .nonce = nonce,
                 .deadline = deadline,
                 .since = now,
                 .at = at,
                 .rank = rank};
  for (int i = 0; i < size + STRANGERS; i++) at[i] = (connection){.rank = -1};
  for (int r = 0; r < size; r++) rank[r] = (member){.connection = -1};
  *out = h;
  return RG_OK;
}

void rgi_hub_destroy(rgi_hub *h) {
  if (!h) return;
  for (int i = 0; i < h->connections; i++) {
    rgi_free(h->ctx, h->at[i].in.data);
    rgi_free(h->ctx, h->at[i].out.data);
  }
  for (int r = 0; r < h->size; r++) rgi_free(h->ctx, h->rank[r].payload.data);
  rgi_free(h->ctx, h->at);
  rgi_free(h->ctx, h->rank);
  rgi_free(h->ctx, h);
}
