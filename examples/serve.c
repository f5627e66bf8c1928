/* examples/serve.c: a serving loop: requests come, share the steps of one graph, and go.
 *
 *   cc serve.c $(pkg-config --cflags --libs regraph)
 *   ./a.out                                           # 64 requests to a small model, on the CPU
 *   ./a.out --device cuda --set layers=12 --set W=2048 --set dtype=bf16 …
 *   ./a.out --journal J --kill 40; ./a.out --journal J      # … and goes on from there
 *
 * rg_queue decides (serving.h): prompts in pieces beside single tokens, pages shared by prompts
 * that begin alike, copies before a write to a page that a fork has too, the youngest waiting where
 * pages run out. Here is what is left: memory, the copy of a step's inputs to the device, the
 * forward, the tokens back, and a journal.
 *
 * Requests are invented: some begin alike, every eighth forks after its fourth token, every
 * eleventh is cancelled while a step runs, one is too long and refused. Whatever the schedule, each
 * request's tokens are the same: the digest at the end says whether they were.
 *
 * The journal has a line for each thing that happened, and "step" after those of a step. A loop
 * that starts with one goes on with every request that had not ended, as a longer prompt; nothing
 * is lost but what was in flight: lines after the last "step", and the step that ran.
 *
 *   + REQUEST MOST TOKEN…     it came (a fork: with the tokens it began with)
 *   . REQUEST TOKEN           its next token
 *   = REQUEST                 it has ended; x: was cancelled; !: was refused
 */
#include <regraph/regraph.h>

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

enum { BUCKETS = 4, SETS = 48, TENSORS = 512, FORK_AT = 4, TOO_LONG = 13 };

typedef enum fate { TO_COME, LIVE, ENDED, CANCELLED, REFUSED } fate;

/* A request as its sender sees it. Number i + n is the fork of number i. */
typedef struct asked {
  rg_request number; /* the queue's; 0: not there */
  int32_t *token;    /* what it was given, then what it got */
  int64_t given, n, most;
  fate fate;
} asked;

/* Plans that differ in T alone: a step takes the first that holds its rows. */
typedef struct bucket {
  int64_t rows;
  rg_plan *plan;
  rg_session *session;
} bucket;

typedef struct server {
  /* what the caller may set */
  const char *device, *spec_path, *journal_path;
  rg_binding set[SETS];
  size_t nset;
  int64_t pages, slots, most, requests, arrive, longest, forks, kill;
  bool quiet, no_prefixes;

  rg_context *ctx;
  rg_spec *spec;
  bucket bucket[BUCKETS];
  int nbucket;
  int64_t page, V;
  void *memory[TENSORS]; /* the device's, of all buckets */
  int nmemory;
  char *inputs; /* a step's, on the host: one block, copied in one call */
  void *inputs_there;
  size_t inputs_bytes;
  void *next_there;
  int32_t *next;
  rg_queue *queue;
  rg_queue_arrays a;
  asked *asked;      /* [2 · requests]: then their forks */
  asked **by_number; /* the queue's numbers */
  int64_t come;
  FILE *journal;
  char *lines; /* of this step */
  size_t nlines, room;
  double ran; /* seconds in forwards */
} server;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t mix(uint64_t x) {
  x = (x ^ x >> 31) * UINT64_C(0x7fb5d329728ea185);
  x = (x ^ x >> 27) * UINT64_C(0x81dadef4bc2dd44d);
  return x ^ x >> 33;
}

/* ---- memory ---- */

static rg_status take(server *s, size_t bytes, void **out, rg_error *e) {
  if (s->nmemory == TENSORS) return RG_E_NOMEM;
  const rg_status status = rg_memory_alloc(s->bucket[0].plan, bytes, out, e);
  if (status == RG_OK) s->memory[s->nmemory++] = *out;
  return status;
}

/* A weight of the model: numbers in [-√(3/n), √(3/n)) for n inputs, and about 1 for norms, so that
 * what comes out of a layer is as large as what goes in. They hang on the tensor's name alone. */
static rg_status make_weight(server *s, const rg_tensor_info *t, void **out, rg_error *e) {
  const size_t n = (size_t)t->bytes / rg_dtype_size(t->dtype);
  const double inputs = (double)t->dim[t->rank - 1];
  uint64_t seed = 1;
  for (const char *c = t->name; *c; c++) seed = mix(seed + (unsigned char)*c);
  float *x = malloc(n * sizeof *x);
  void *stored = malloc((size_t)t->bytes);
  rg_status status = x && stored ? take(s, (size_t)t->bytes, out, e) : RG_E_NOMEM;
  if (status == RG_OK) {
    for (size_t i = 0; i < n; i++) {
      const double u = (double)(mix(seed + i) >> 11) * 0x1p-53;
      x[i] = (float)(t->rank == 1 ? 0.5 + u : (2 * u - 1) * 1.7 / (inputs < 3 ? 1 : inputs / 8));
    }
    rg_convert(t->dtype, stored, RG_F32, x, n);
    status = rg_memory_write(s->bucket[0].plan, *out, stored, (size_t)t->bytes, e);
  }
  free(x);
  free(stored);
  return status;
}

/* Where a step's inputs stand in their block; tokens, which buckets have more or fewer of, last. */
static void *place(server *s, const char *name) {
  const struct {
    const char *name;
    int64_t n;
  } at[] = {{"lengths", s->slots},
            {"context", s->slots},
            {"pages", s->slots * s->most},
            {"forks", 2 * s->forks},
            {"tokens", s->bucket[s->nbucket - 1].rows}};
  size_t offset = 0;
  for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
    if (name && strcmp(name, at[i].name) == 0) return s->inputs + offset;
    offset += ((size_t)at[i].n * sizeof(int32_t) + 255) / 256 * 256;
  }
  s->inputs_bytes = offset;
  return NULL;
}

/* Binds all that a bucket's plan names. What the largest one was given, all have. */
static rg_status bind(server *s, bucket *b, rg_error *e) {
  rg_tensor_info t;
  int shared = 2;
  for (size_t i = 0; rg_plan_tensor(b->plan, i, &t) == RG_OK; i++) {
    const bool first = b == &s->bucket[s->nbucket - 1];
    void *at = NULL;
    rg_status status = RG_OK;
    if (t.role == RG_INPUT && (at = place(s, t.name)))
      at = (char *)s->inputs_there + ((char *)at - s->inputs);
    else if (!first)
      at = s->memory[shared++];
    else if (t.role == RG_INPUT)
      status = make_weight(s, &t, &at, e);
    else
      status = take(s, (size_t)t.bytes, &at, e);
    if (status == RG_OK)
      status = rg_session_bind(b->session, t.role, t.name, at, (size_t)t.bytes, e);
    if (status != RG_OK) return status;
    if (t.role == RG_OUTPUT && strcmp(t.name, "next") == 0) s->next_there = at;
    if (t.role == RG_OUTPUT && strcmp(t.name, "logits") == 0) s->V = t.dim[1];
    if (t.role == RG_STATE && s->page == 0) s->page = t.dim[1]; /* [P, page, KH, D] */
  }
  return RG_OK;
}

static rg_status open_server(server *s, rg_error *e) {
  rg_status status = rg_context_create(NULL, &s->ctx, e);
  if (status == RG_OK)
    status = rg_spec_load_file(s->ctx, s->spec_path, s->set, s->nset, &s->spec, e);
  for (int i = 0; i < s->nbucket && status == RG_OK; i++) {
    bucket *b = &s->bucket[i];
    const rg_binding free[] = {{"T", b->rows, NULL},
                               {"B", s->slots, NULL},
                               {"M", s->most, NULL},
                               {"P", s->pages, NULL},
                               {"forks", s->forks, NULL}};
    const rg_plan_options o = {.set = free, .nset = 5, .device = s->device};
    status = rg_plan_create(s->spec, NULL, &o, &b->plan, e);
    if (status == RG_OK) status = rg_session_create(b->plan, NULL, &b->session, e);
  }
  if (status != RG_OK) return status;
  place(s, NULL);
  s->inputs = calloc(1, s->inputs_bytes);
  status = s->inputs ? take(s, s->inputs_bytes, &s->inputs_there, e) : RG_E_NOMEM;
  void *unused; /* bind counts from 2 on */
  if (status == RG_OK) status = take(s, 256, &unused, e);
  for (int i = s->nbucket - 1; i >= 0 && status == RG_OK; i--) status = bind(s, &s->bucket[i], e);
  if (status != RG_OK) return status;
  const rg_queue_options o = {.size = sizeof o,
                              .pages = s->pages,
                              .page = s->page,
                              .rows = s->bucket[s->nbucket - 1].rows,
                              .slots = s->slots,
                              .most = s->most,
                              .no_prefixes = s->no_prefixes,
                              .forks = s->forks};
  s->next = calloc((size_t)s->slots, sizeof *s->next);
  s->a = (rg_queue_arrays){.tokens = place(s, "tokens"),
                           .lengths = place(s, "lengths"),
                           .context = place(s, "context"),
                           .pages = place(s, "pages"),
                           .forks = place(s, "forks"),
                           .request = calloc((size_t)s->slots, sizeof(rg_request)),
                           .wanted = calloc((size_t)s->slots, sizeof(bool)),
                           .last = calloc((size_t)s->slots, sizeof(bool))};
  if (!s->next || !s->a.last || !s->a.request || !s->a.wanted) return RG_E_NOMEM;
  return rg_queue_create(s->ctx, &o, &s->queue, e);
}

static void close_server(server *s) {
  rg_queue_destroy(s->queue);
  for (int i = s->nmemory - 1; i >= 0; i--) rg_memory_free(s->bucket[0].plan, s->memory[i]);
  for (int i = 0; i < s->nbucket; i++) rg_session_destroy(s->bucket[i].session);
  for (int i = 0; i < s->nbucket; i++) rg_plan_destroy(s->bucket[i].plan);
  rg_spec_destroy(s->spec);
  rg_context_destroy(s->ctx);
  for (int64_t i = 0; s->asked && i < 2 * s->requests; i++) free(s->asked[i].token);
  free(s->asked);
  free(s->by_number);
  free(s->inputs), free(s->next), free(s->a.last), free(s->a.request), free(s->a.wanted);
  free(s->lines);
  if (s->journal) fclose(s->journal);
}

/* ---- the journal ---- */

static asked *named(const server *s, rg_request number) {
  return s->by_number[number];
}
static void know(server *s, asked *r) {
  s->by_number[r->number] = r;
}

__attribute__((format(printf, 2, 3))) static void note(server *s, const char *format, ...) {
  if (!s->journal) return;
  if (s->room < s->nlines + 64) {
    char *more = realloc(s->lines, s->room = 2 * s->room + 4096);
    if (!more) abort();
    s->lines = more;
  }
  va_list args;
  va_start(args, format);
  s->nlines += (size_t)vsnprintf(s->lines + s->nlines, 64, format, args);
  va_end(args);
}

static void note_asked(server *s, const asked *r) {
  note(s, "+ %d %" PRId64, (int)(r - s->asked), r->most);
  for (int64_t t = 0; t < r->given; t++) note(s, " %d", r->token[t]);
  note(s, "\n");
}

static rg_status cannot_write(const server *s, rg_error *e) {
  e->status = RG_E_IO;
  snprintf(e->message, sizeof e->message, "the journal %.500s can't be written", s->journal_path);
  return RG_E_IO;
}

static rg_status taken(const server *s, rg_error *e) {
  e->status = RG_E_IO;
  snprintf(e->message, sizeof e->message,
           "another loop writes the journal %.500s; expected one for each", s->journal_path);
  return RG_E_IO;
}

/* What a step did is in the file before the next one begins, or not at all. */
static rg_status note_step(server *s, rg_error *e) {
  if (!s->journal) return RG_OK;
  note(s, "step\n");
  const size_t n = fwrite(s->lines, 1, s->nlines, s->journal);
  if (n < s->nlines || fflush(s->journal) != 0) return cannot_write(s, e);
  s->nlines = 0;
  return RG_OK;
}

static rg_status not_ours(const server *s, rg_error *e) {
  e->status = RG_E_DATA;
  snprintf(e->message, sizeof e->message,
           "the journal %.500s is of other requests; expected one of the same options",
           s->journal_path);
  return RG_E_DATA;
}

/* Longest request there is, of the longest invented ones and of what may be made. */
static int64_t longest(const server *s) {
  const int64_t room = s->longest ? s->longest : s->most * s->page;
  return 2 * room + s->most * s->page + 2;
}

/* How a line of the journal begins: '+' came, '.' a token, '=' ended, 'x' cancelled, '!' refused,
   's' a step was done. */
static bool is_kind(char c) {
  return c && strchr("+.=x!s", c);
}

/* Takes in what the file says up to its last "step", and cuts off what stands behind. A file that
   is no journal stays as it is, and one that another loop writes to. */
static rg_status recall(server *s, rg_error *e) {
  char *text = NULL;
  size_t n = 0, room = 0;
  FILE *f = fopen(s->journal_path, "a+");
  if (!f) return cannot_write(s, e);
  s->journal = f;
  if (flock(fileno(f), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) return taken(s, e);
  rewind(f);
  for (size_t got = 1; got; n += got) {
    if (room < n + 4097) {
      char *more = realloc(text, room = 2 * room + 8192);
      if (!more) return free(text), RG_E_NOMEM;
      text = more;
    }
    got = fread(text + n, 1, 4096, f);
  }
  text[n] = 0;
  char *end = text, *at = text;
  for (char *p = text; (p = strstr(p, "step\n")); p = end) end = p + 5;
  rg_status status = end == text + n || is_kind(*end) ? RG_OK : not_ours(s, e);
  while (at < end && status == RG_OK) {
    const char kind = *at++;
    if (!is_kind(kind)) {
      status = not_ours(s, e);
      break;
    }
    if (kind != 's') {
      const long i = strtol(at, &at, 10);
      if (i < 0 || i >= 2 * s->requests) {
        status = not_ours(s, e);
        break;
      }
      asked *r = &s->asked[i];
      if (kind == '+') {
        r->most = strtol(at, &at, 10);
        for (r->n = 0; *at == ' ' && r->n < longest(s);)
          r->token[r->n++] = (int32_t)strtol(at, &at, 10);
        r->given = r->n;
        r->fate = LIVE;
        if (i < s->requests && i >= s->come) s->come = i + 1;
      } else if (kind == '.' && r->n < longest(s)) {
        r->token[r->n++] = (int32_t)strtol(at, &at, 10);
      } else if (kind != '.') {
        r->fate = kind == '=' ? ENDED : kind == 'x' ? CANCELLED : REFUSED;
        if (i < s->requests && i >= s->come) s->come = i + 1;
      }
    }
    if (*at != '\n' && kind != 's') status = not_ours(s, e);
    at = strchr(at, '\n') + 1;
  }
  int64_t ended = 0, live = 0, tokens = 0;
  for (int64_t i = 0; i < 2 * s->requests; i++) {
    asked *r = &s->asked[i];
    ended += r->fate > LIVE;
    if (r->fate != LIVE || status != RG_OK) continue;
    live++;
    tokens += r->n - r->given;
    status = rg_queue_add(s->queue, r->token, r->n, r->most - (r->n - r->given), &r->number, e);
    know(s, r);
  }
  if (n && status == RG_OK)
    printf("restart: %" PRId64 " requests had ended, %" PRId64 " go on after %" PRId64
           " tokens, %" PRId64 " are to come; %s\n",
           ended, live, tokens, s->requests - s->come,
           live ? "what the step that ran was to make is lost" : "nothing was in flight");
  if (text + n > end && status == RG_OK && truncate(s->journal_path, end - text) != 0)
    status = cannot_write(s, e);
  free(text);
  return status;
}

/* ---- requests ---- */

static rg_status invent(server *s, rg_error *e) {
  const int64_t room = s->longest ? s->longest : s->most * s->page;
  if (room < 4 || s->V < 1) {
    e->status = RG_E_USAGE;
    snprintf(e->message, sizeof e->message, "%s",
             room < 4 ? "requests need room for four tokens" : "the spec has no output 'logits'");
    return RG_E_USAGE;
  }
  s->asked = calloc(2 * (size_t)s->requests, sizeof *s->asked);
  s->by_number = calloc(2 * (size_t)s->requests + 1, sizeof(asked *));
  if (!s->asked || !s->by_number) return RG_E_NOMEM;
  for (int64_t i = 0; i < 2 * s->requests; i++) {
    asked *r = &s->asked[i];
    r->token = calloc((size_t)longest(s), sizeof *r->token);
    if (!r->token) return RG_E_NOMEM;
    if (i >= s->requests) continue;
    const int64_t alike = i % 3 ? room / 4 : 0; /* of two kinds */
    r->n = alike + 2 + (int64_t)(mix((uint64_t)i) % (uint64_t)(room / 4));
    r->most = 8 + (int64_t)(mix((uint64_t)i + 1000) % (uint64_t)(room / 4));
    if (i == TOO_LONG) r->n = s->most * s->page + 1;
    for (int64_t t = 0; t < r->n; t++)
      r->token[t] = (int32_t)(mix(t < alike ? (uint64_t)(t + i % 3 * 7919)
                                            : (uint64_t)(t + (i + 3) * 104729)) %
                              (uint64_t)s->V);
    r->given = r->n;
  }
  return RG_OK;
}

/* The next one comes. One that is too long is told so; the loop goes on. */
static rg_status receive(server *s, rg_error *e) {
  asked *r = &s->asked[s->come++];
  rg_error own = {0};
  const rg_status status = rg_queue_add(s->queue, r->token, r->n, r->most, &r->number, &own);
  r->fate = status == RG_OK ? LIVE : REFUSED;
  if (status == RG_OK) {
    know(s, r);
    note_asked(s, r);
  } else if (status == RG_E_LIMIT) {
    printf("request %d is refused: %s\n", (int)(r - s->asked), own.message);
    note(s, "! %d\n", (int)(r - s->asked));
  } else {
    *e = own;
    return status;
  }
  return RG_OK;
}

static bool to_be_cancelled(const server *s, const asked *r) {
  return (r - s->asked) % 11 == 10 && r->fate == LIVE && r->n - r->given == r->most / 2;
}

/* Its first tokens, and then others. */
static rg_status fork_off(server *s, asked *r, rg_error *e) {
  asked *f = r + s->requests;
  memcpy(f->token, r->token, (size_t)r->n * sizeof *r->token);
  f->token[r->n - 1] = (int32_t)((r->token[r->n - 1] + 1) % s->V);
  f->n = f->given = r->n;
  f->most = r->most - (r->n - r->given);
  f->fate = LIVE;
  note_asked(s, f);
  const rg_status status = rg_queue_fork(s->queue, r->number, f->token[f->n - 1], &f->number, e);
  know(s, f);
  return status;
}

/* ---- the loop ---- */

static rg_status forward(server *s, rg_error *e) {
  bucket *b = s->bucket;
  while (b->rows < s->a.rows) b++;
  const double start = now();
  const size_t bytes = (size_t)((char *)(s->a.tokens + b->rows) - s->inputs);
  rg_status status = rg_memory_write(b->plan, s->inputs_there, s->inputs, bytes, e);
  if (status == RG_OK) status = rg_session_forward(b->session, e);
  if (status == RG_OK) status = rg_session_synchronize(b->session, e);
  if (status == RG_OK)
    status = rg_memory_read(b->plan, s->next, s->next_there, (size_t)s->slots * sizeof *s->next, e);
  s->ran += now() - start;
  return status;
}

static rg_status step(server *s, rg_error *e) {
  rg_status status = forward(s, e);
  if (status != RG_OK) return status;
  for (int64_t b = 0; b < s->a.used; b++) { /* the step's tokens are of no use any more */
    asked *r = named(s, s->a.request[b]);
    if (!to_be_cancelled(s, r)) continue;
    r->fate = CANCELLED;
    note(s, "x %d\n", (int)(r - s->asked));
    if ((status = rg_queue_cancel(s->queue, r->number, e)) != RG_OK) return status;
  }
  if ((status = rg_queue_done(s->queue, s->next, e)) != RG_OK) return status;
  for (int64_t b = 0; b < s->a.used; b++) {
    asked *r = named(s, s->a.request[b]);
    if (!s->a.wanted[b] || r->fate != LIVE) continue;
    const int i = (int)(r - s->asked);
    if (s->next[b] >= 0) { /* else its logits are all NaN, and it has ended */
      r->token[r->n++] = s->next[b];
      note(s, ". %d %d\n", i, s->next[b]);
    }
    if (s->a.last[b]) {
      r->fate = ENDED;
      note(s, "= %d\n", i);
    } else if (i < s->requests && i % 8 == 7 && r->n - r->given == FORK_AT) {
      if ((status = fork_off(s, r, e)) != RG_OK) return status;
    }
  }
  return RG_OK;
}

static void report(const server *s, double seconds) {
  rg_queue_info i;
  rg_queue_count(s->queue, &i);
  printf("step %5" PRId64 ": %3" PRId64 " served, %3" PRId64 " wait; %3" PRId64 " of %" PRId64
         " pages, %" PRId64 " shared, %" PRId64 " kept; %7.0f tokens/s, host %.3f ms a step\n",
         i.steps, i.served, i.waiting, i.pages.used, s->pages, i.pages.shared, i.pages.kept,
         (double)i.tokens / seconds, 1e3 * (seconds - s->ran) / (double)(i.steps ? i.steps : 1));
}

static rg_status serve(server *s, rg_error *e) {
  const double start = now();
  double shown = start;
  rg_status status = s->journal_path ? recall(s, e) : RG_OK;
  for (int64_t n = 1; status == RG_OK; n++) {
    for (int64_t k = 0; k < s->arrive && s->come < s->requests && status == RG_OK; k++)
      status = receive(s, e);
    if (status == RG_OK) status = rg_queue_step(s->queue, &s->a, e);
    if (status != RG_OK || (!s->a.rows && s->come == s->requests)) break;
    if (n == s->kill) raise(SIGKILL);
    if (s->a.rows) status = step(s, e);
    if (status == RG_OK) status = note_step(s, e);
    if (status != RG_OK) break;
    if (!s->quiet && (n % 32 == 0 || now() - shown > 1)) {
      shown = now();
      report(s, shown - start);
    }
  }
  if (status != RG_OK) return status;
  report(s, now() - start);
  rg_queue_info i;
  rg_queue_count(s->queue, &i);
  uint64_t digest = 0;
  int64_t count[5] = {0};
  for (int64_t k = 0; k < 2 * s->requests; k++) {
    const asked *r = &s->asked[k];
    count[r->fate] += k < s->requests || r->fate != TO_COME;
    for (int64_t t = r->given; t < r->n; t++)
      digest += mix((uint64_t)k << 40 ^ (uint64_t)t << 20 ^ (uint64_t)r->token[t]);
  }
  printf("%" PRId64 " tokens ran, %" PRId64 " were in pages already; %" PRId64
         " times one had to wait, %" PRId64 " pages copied\n",
         i.rows, i.found, i.preempted, i.copies);
  printf("%" PRId64 " ended, %" PRId64 " cancelled, %" PRId64 " refused: digest %016" PRIx64 "\n",
         count[ENDED], count[CANCELLED], count[REFUSED], digest);
  return RG_OK;
}

/* ---- the command line ---- */

/* What was wrong; NULL: nothing, it was asked for. */
static int usage(const char *what) {
  FILE *f = what ? stderr : stdout;
  if (what) fprintf(f, "serve: %s\n", what);
  fputs("serve [SPEC] [--device cpu|cuda] [--set NAME=VALUE] [--rows T[,T…]] [--slots B]\n"
        "      [--pages P] [--most M] [--forks F] [--requests N] [--arrive N]\n"
        "      [--longest TOKENS] [--no-prefixes] [--quiet]\n"
        "      [--journal FILE] [--kill STEP]\n",
        f);
  return what ? 2 : 0;
}

/* A whole number of at least `least` that ends at `end`, or with the text. */
static bool take_number(char **at, char end, int64_t least, int64_t *out) {
  if (**at < '0' || **at > '9') return false;
  errno = 0;
  *out = strtoll(*at, at, 10);
  return errno == 0 && *out >= least && (**at == 0 || **at == end);
}

static bool take_rows(server *s, char *at) {
  for (s->nbucket = 0; s->nbucket < BUCKETS; at++) {
    const int64_t least = s->nbucket ? s->bucket[s->nbucket - 1].rows + 1 : 1;
    if (!take_number(&at, ',', least, &s->bucket[s->nbucket++].rows)) return false;
    if (*at == 0) return true;
  }
  return false;
}

static const char *parse(server *s, int argc, char **argv) {
  static char wrong[256];
  for (int i = 1; i < argc; i++) {
    const char *name = argv[i];
    const struct {
      const char *name;
      int64_t *value, least;
    } option[] = {{"--slots", &s->slots, 1},   {"--pages", &s->pages, 1},
                  {"--most", &s->most, 1},     {"--requests", &s->requests, 1},
                  {"--arrive", &s->arrive, 1}, {"--longest", &s->longest, 0},
                  {"--forks", &s->forks, 0},   {"--kill", &s->kill, 0}};
    if (name[0] != '-') {
      s->spec_path = name;
    } else if (strcmp(name, "--quiet") == 0) {
      s->quiet = true;
    } else if (strcmp(name, "--no-prefixes") == 0) {
      s->no_prefixes = true;
    } else {
      char *value = i + 1 < argc ? argv[++i] : NULL;
      bool known = false;
      if (!value) {
        snprintf(wrong, sizeof wrong, "%.100s: expected a value after it", name);
        return wrong;
      }
      for (size_t k = 0; k < sizeof option / sizeof *option; k++) {
        char *at = value;
        if (strcmp(name, option[k].name) != 0) continue;
        known = true;
        if (take_number(&at, 0, option[k].least, option[k].value)) continue;
        snprintf(wrong, sizeof wrong, "%s '%.100s': expected a whole number of at least %" PRId64,
                 name, value, option[k].least);
        return wrong;
      }
      if (strcmp(name, "--device") == 0) {
        s->device = value;
      } else if (strcmp(name, "--journal") == 0) {
        s->journal_path = value;
      } else if (strcmp(name, "--set") == 0) {
        char *is = strchr(value, '=');
        if (!is || s->nset == SETS) {
          snprintf(wrong, sizeof wrong, "--set '%.100s': expected NAME=VALUE, %d of them at most",
                   value, SETS);
          return wrong;
        }
        *is = 0;
        s->set[s->nset++] = (rg_binding){value, 0, is + 1};
      } else if (strcmp(name, "--rows") == 0) {
        if (take_rows(s, value)) continue;
        snprintf(wrong, sizeof wrong,
                 "--rows '%.100s': expected up to %d whole numbers that grow, such as 16,64", value,
                 BUCKETS);
        return wrong;
      } else if (!known) {
        snprintf(wrong, sizeof wrong, "there is no option '%.100s'; expected one of these:", name);
        return wrong;
      }
    }
  }
  return NULL;
}

int main(int argc, char **argv) {
  /* a small model, unless told otherwise: later ones win */
  static const rg_binding small[] = {
      {"layers", 2, NULL}, {"V", 512, NULL},     {"W", 64, NULL},     {"F", 128, NULL},
      {"H", 4, NULL},      {"KH", 2, NULL},      {"D", 16, NULL},     {"DV", 16, NULL},
      {"page", 16, NULL},  {"kernel", 8, NULL},  {"stride", 4, NULL}, {"block", 16, NULL},
      {"top_n", 4, NULL},  {"window", 24, NULL}, {"dtype", 0, "f32"}, {"kv", 0, "f32"}};
  static server s = {.device = "cpu",
                     .spec_path = "examples/serve_model.json",
                     .bucket = {{.rows = 16}, {.rows = 64}},
                     .nbucket = 2,
                     .pages = 48,
                     .slots = 16,
                     .most = 8,
                     .forks = 2,
                     .requests = 64,
                     .arrive = 2};
  rg_error e = {0};
  if (argc == 2 && strcmp(argv[1], "--help") == 0) return usage(NULL);
  const char *wrong = parse(&s, argc, argv);
  if (wrong) return usage(wrong);
  const size_t given = s.nset;
  for (size_t i = 0; i < sizeof small / sizeof *small && s.nset < SETS; i++) {
    bool told = false;
    for (size_t k = 0; k < given; k++) told |= strcmp(s.set[k].name, small[i].name) == 0;
    if (!told) s.set[s.nset++] = small[i];
  }
  rg_status status = open_server(&s, &e);
  if (status == RG_OK) status = invent(&s, &e);
  if (status == RG_OK) status = serve(&s, &e);
  if (status != RG_OK) {
    char line[1536] = "out of memory";
    if (e.status != RG_OK) rg_error_format(&e, line, sizeof line);
    fprintf(stderr, "serve: %s\n", line);
  }
  close_server(&s);
  return rg_status_exit_code(status);
}
