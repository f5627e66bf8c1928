/* cli/bench_serve.c: see bench_serve.h.

   Two tables, by one pool of pages that every row fills: single tokens over ever longer contexts of
   ever fewer sequences, and pieces of one prompt. A row is measured with tables just as wide as its
   context, then with wider ones: what capacity costs. (A prompt's piece is the context's end.)

   A step's inputs are named as docs/serving.md names them: lengths, context, pages, and perhaps
   forks. Steps are enqueued one behind the other, as a loop does whose tokens stay on the device:
   AT_ONCE of them, and their mean counts; of those, the median. The caches hold normal numbers,
   compressed rows too, so choices are scattered.
 */
#include "bench_serve.h"
#include "data.h"
#include <stdlib.h>
#include <string.h>

enum { AT_ONCE = 20, CAPACITIES = 3, MOST_ROWS = 24, PIECE = 32 << 20 };

typedef struct serve_row {
  int64_t batch, context, length; /* tokens that each sequence has, and has in this step */
  int64_t capacity[CAPACITIES];   /* in tokens */
  double ms[CAPACITIES];          /* 0: not measured */
  double gb;                      /* what the cost model says is read and written, 10^9 bytes */
} serve_row;

typedef struct serve_bench {
  cli *c;
  int64_t pages, page; /* of the pool; tokens of one */
  serve_row row[MOST_ROWS];
  int nrow, ndecode;
  /* of the plan at hand, by its tensors; the state stays from plan to plan */
  void *bound[256];
  void *state[256];
} serve_bench;

/* ---- what is measured ---- */

static void add_row(serve_bench *b, int64_t batch, int64_t context, int64_t length, int64_t wide) {
  if (b->nrow == MOST_ROWS || length > context || batch < 1) return;
  const int64_t exact = (context + b->page - 1) / b->page * b->page;
  b->row[b->nrow++] = (serve_row){.batch = batch,
                                  .context = context,
                                  .length = length,
                                  .capacity = {exact, wide > exact ? wide : exact, 8 * wide}};
}

/* On a GPU as the tables of docs/serving.md: 512 sequences of 4K tokens to 16 of 128K. */
static void add_rows(serve_bench *b) {
  const bool gpu = cli_on_gpu(b->c);
  const int64_t most = gpu ? 512 : 16, least = gpu ? 16 : 4, tokens = b->pages * b->page,
                longest = tokens / least;
  for (int64_t n = most; n >= least; n /= 2) add_row(b, n, tokens / n, 1, longest);
  for (int64_t n = 8; n >= 1; n /= n == 8 ? 2 : 4)
    if (n < least) add_row(b, n, longest, 1, longest);
  b->ndecode = b->nrow;
  for (int64_t n = gpu ? 512 : 64; n <= (gpu ? 8192 : 256); n *= 4)
    add_row(b, 1, longest, n, longest);
}

/* ---- inputs ---- */

static bool named(const rg_tensor_info *t, const char *name) {
  return t->role == RG_INPUT && strcmp(t->name, name) == 0;
}
static bool is_list(const rg_tensor_info *t) {
  return named(t, "lengths") || named(t, "context") || named(t, "pages") || named(t, "forks");
}

/* Binds the free dimensions of `t`'s axes to `dim`. */
static rg_status solve(serve_bench *b, const rg_tensor_info *t, const int64_t *dim) {
  cli *c = b->c;
  return rg_spec_solve(c->spec, t->name, t->rank, dim, c->solved,
                       sizeof c->solved / sizeof *c->solved, &c->nsolved, &c->error);
}

static rg_status bind_row(serve_bench *b, const serve_row *r, int64_t capacity) {
  rg_tensor_info t;
  rg_status s = RG_OK;
  b->c->nsolved = 0;
  for (size_t i = 0; s == RG_OK && rg_spec_tensor(b->c->spec, i, &t) == RG_OK; i++) {
    int64_t dim[8];
    memcpy(dim, t.dim, sizeof dim);
    if (t.role != RG_STATE && t.role != RG_INPUT) continue;
    if (t.role == RG_STATE)
      dim[0] = dim[0] < 0 ? b->pages : dim[0];
    else if (named(&t, "lengths") || named(&t, "context"))
      dim[0] = r->batch;
    else if (named(&t, "pages"))
      dim[0] = r->batch, dim[1] = (capacity + b->page - 1) / b->page;
    else if (named(&t, "forks"))
      dim[0] = 1;
    else if (dim[0] < 0)
      dim[0] = r->batch * r->length;
    s = solve(b, &t, dim);
  }
  return s;
}

static void fill_list(const serve_bench *b, const serve_row *r, const rg_tensor_info *t,
                      int32_t *to) {
  const int64_t n = t->bytes / (int64_t)sizeof *to;
  const int64_t each = t->rank > 1 ? t->dim[1] : 1, held = (r->context + b->page - 1) / b->page;
  for (int64_t i = 0; i < n; i++) {
    if (named(t, "lengths")) to[i] = (int32_t)r->length;
    if (named(t, "context")) to[i] = (int32_t)r->context;
    if (named(t, "forks")) to[i] = -1;
    if (!named(t, "pages")) continue;
    /* neighbours in a sequence lie apart: p → p · odd is one to one where the pool is a power of
     * two, and elsewhere pages stand in order */
    const int64_t p = i / each * held + i % each,
                  odd = (b->pages & (b->pages - 1)) == 0 ? 40503 : 1;
    to[i] = i % each < held ? (int32_t)(p * odd % b->pages) : -1;
  }
}

static rg_status fill_input(serve_bench *b, const serve_row *r, const rg_tensor_info *t, void *to) {
  cli *c = b->c;
  const size_t n = (size_t)t->bytes / rg_dtype_size(t->dtype);
  void *host = calloc(n + 1, rg_dtype_size(t->dtype));
  if (!host) return cli_nomem(&c->error);
  if (is_list(t))
    fill_list(b, r, t, host);
  else if (t->dtype != RG_I32)
    data_draw(c->args.seed, t->name, t->dtype, host, (int64_t)n, cli_threads(c));
  const rg_status s = rg_memory_write(c->plan, to, host, (size_t)t->bytes, &c->error);
  free(host);
  return s;
}

/* A piece is drawn once and laid down over and over, so that gigabytes take no minutes. */
static rg_status fill_state(serve_bench *b, const rg_tensor_info *t, char *to) {
  cli *c = b->c;
  const size_t size = rg_dtype_size(t->dtype), all = (size_t)t->bytes,
               piece = all < PIECE ? all : PIECE;
  char *host = malloc(piece + 1);
  if (!host) return cli_nomem(&c->error);
  data_draw(c->args.seed, t->name, t->dtype, host, (int64_t)(piece / size), cli_threads(c));
  rg_status s = RG_OK;
  for (size_t at = 0; s == RG_OK && at < all; at += piece)
    s = rg_memory_write(c->plan, to + at, host, all - at < piece ? all - at : piece, &c->error);
  free(host);
  return s;
}

/* ---- one measurement ---- */

static void unbind(serve_bench *b) {
  cli *c = b->c;
  rg_session_destroy(c->session);
  c->session = NULL;
  for (size_t i = 0; i < sizeof b->bound / sizeof *b->bound; i++) {
    if (b->bound[i] && b->bound[i] != b->state[i]) rg_memory_free(c->plan, b->bound[i]);
    b->bound[i] = NULL;
  }
}

static rg_status bind(serve_bench *b, const serve_row *r) {
  cli *c = b->c;
  rg_tensor_info t;
  rg_status s = RG_OK;
  for (size_t i = 0; s == RG_OK && rg_plan_tensor(c->plan, i, &t) == RG_OK; i++) {
    if (i == sizeof b->bound / sizeof *b->bound)
      return cli_fail(&c->error, RG_E_LIMIT, c->args.positional[0],
                      "the spec has more than %zu tensors, the most that --serve takes: give it "
                      "fewer layers",
                      i);
    const bool state = t.role == RG_STATE;
    b->bound[i] = b->state[i];
    if (!b->bound[i]) s = rg_memory_alloc(c->plan, (size_t)t.bytes, &b->bound[i], &c->error);
    if (s == RG_OK && state && !b->state[i]) s = fill_state(b, &t, b->bound[i]);
    if (state) b->state[i] = b->bound[i];
    if (s == RG_OK && t.role == RG_INPUT) s = fill_input(b, r, &t, b->bound[i]);
    if (s == RG_OK)
      s = rg_session_bind_index(c->session, i, b->bound[i], (size_t)t.bytes, &c->error);
  }
  return s;
}

static rg_status run(cli *c, int times) {
  rg_status s = RG_OK;
  for (int i = 0; s == RG_OK && i < times; i++) s = rg_session_forward(c->session, &c->error);
  return s == RG_OK ? rg_session_synchronize(c->session, &c->error) : s;
}

static rg_status measure(serve_bench *b, serve_row *r, int k) {
  cli *c = b->c;
  const int times = cli_on_gpu(c) && !c->args.eager ? AT_ONCE : 1, repeat = (int)c->args.repeat;
  double *ms = calloc((size_t)repeat, sizeof *ms);
  if (!ms) return cli_nomem(&c->error);
  rg_status s = run(c, times > 1 ? 2 : 1);
  for (int i = 0; s == RG_OK && i < repeat; i++) {
    const double start = cli_seconds();
    s = run(c, times);
    ms[i] = 1e3 * (cli_seconds() - start) / times;
  }
  r->ms[k] = cli_median(ms, repeat);
  free(ms);
  rg_node_work w;
  if (k == 0) r->gb = 0;
  for (size_t i = 0; s == RG_OK && k == 0; i++) {
    rg_error none = {0};
    if (rg_session_node_work(c->session, i, &w, &none) != RG_OK) break;
    r->gb += 1e-9 * w.bytes;
  }
  return s;
}

/* Step by step, each timed: the nodes of the first capacity. */
static void print_nodes(const cli *c, const serve_row *r) {
  rg_node_time n;
  printf("%lld x %lld, %lld new:", (long long)r->batch, (long long)r->context,
         (long long)r->length);
  for (size_t i = 0; rg_session_node_time(c->session, i, &n) == RG_OK; i++)
    printf("  %s %.4f", n.name, n.ms);
  putchar('\n');
}

/* There is always one to free the state with. */
static rg_status next_plan(cli *c) {
  rg_plan *before = c->plan;
  c->plan = NULL;
  const rg_status s = cli_make_plan(c);
  if (s == RG_OK)
    rg_plan_destroy(before);
  else
    c->plan = before;
  return s;
}

static rg_status measure_row(serve_bench *b, serve_row *r) {
  cli *c = b->c;
  rg_status s = RG_OK;
  for (int k = 0; s == RG_OK && k < (c->args.eager ? 1 : CAPACITIES); k++) {
    if (k > 0 && r->capacity[k] == r->capacity[k - 1]) {
      r->ms[k] = r->ms[k - 1];
      continue;
    }
    s = bind_row(b, r, r->capacity[k]);
    if (s == RG_OK) s = next_plan(c);
    if (s == RG_OK) s = cli_make_session(c, c->args.eager);
    if (s == RG_OK) s = bind(b, r);
    if (s == RG_OK) s = measure(b, r, k);
    if (s == RG_OK && c->args.eager && !c->args.json) print_nodes(c, r);
    if (c->plan) unbind(b);
  }
  return s;
}

/* ---- the tables ---- */

static const char *tokens_text(int64_t n, char text[32]) {
  if (n >= 1 << 20 && n % (1 << 20) == 0)
    snprintf(text, 32, "%lldM", (long long)(n >> 20));
  else if (n >= 1024 && n % 1024 == 0)
    snprintf(text, 32, "%lldK", (long long)(n >> 10));
  else
    snprintf(text, 32, "%lld", (long long)n);
  return text;
}

static void print_table(const serve_bench *b, int from, int to) {
  char x[32], y[32];
  const serve_row *first = &b->row[from];
  printf("%9s %7s %7s   ms at capacity exact %9s %9s %7s\n", "context", "batch", "new",
         tokens_text(first->capacity[1], x), tokens_text(first->capacity[2], y), "GB/s");
  for (int i = from; i < to; i++) {
    const serve_row *r = &b->row[i];
    printf("%9s %7lld %7lld %13s", tokens_text(r->context, x), (long long)r->batch,
           (long long)r->length, "");
    for (int k = 0; k < CAPACITIES; k++) printf(" %9.4f", r->ms[k]);
    printf(" %7.0f\n", r->ms[0] > 0 ? 1e3 * r->gb / r->ms[0] : 0);
  }
}

static void print_json(const serve_bench *b) {
  const cli *c = b->c;
  printf("{\"version\": 1, \"spec\": ");
  cli_json_string(stdout, c->args.positional[0]);
  printf(", \"device\": \"%s\", \"threads\": %d, \"repeat\": %lld,\n \"steps\": [", c->args.device,
         cli_threads(c), (long long)c->args.repeat);
  for (int i = 0; i < b->nrow; i++) {
    const serve_row *r = &b->row[i];
    printf("%s\n  {\"context\": %lld, \"batch\": %lld, \"new\": %lld, \"gb\": ", i ? "," : "",
           (long long)r->context, (long long)r->batch, (long long)r->length);
    cli_json_number(stdout, r->gb);
    fputs(", \"capacity\": [", stdout);
    for (int k = 0; k < CAPACITIES; k++) printf("%s%lld", k ? ", " : "", (long long)r->capacity[k]);
    fputs("], \"ms\": [", stdout);
    for (int k = 0; k < CAPACITIES; k++) {
      fputs(k ? ", " : "", stdout);
      cli_json_number(stdout, r->ms[k]);
    }
    fputs("]}", stdout);
  }
  puts("]}");
}

/* The pool, from the first state. */
static rg_status find_pool(serve_bench *b) {
  cli *c = b->c;
  rg_tensor_info t;
  bool lists[3] = {false}, rows = false;
  for (size_t i = 0; rg_spec_tensor(c->spec, i, &t) == RG_OK; i++) {
    lists[0] |= named(&t, "lengths"), lists[1] |= named(&t, "context");
    lists[2] |= named(&t, "pages");
    rows |= t.role == RG_INPUT && !is_list(&t) && t.rank > 0 && t.dim[0] < 0;
    if (t.role != RG_STATE || b->page > 0) continue;
    b->pages = t.dim[0] > 0 ? t.dim[0] : cli_on_gpu(c) ? 16384 : 64;
    b->page = t.dim[1];
  }
  if (b->page < 1 || !lists[0] || !lists[1] || !lists[2])
    return cli_fail(&c->error, RG_E_USAGE, "regraph bench",
                    "--serve is for specs of a serving step: state of pages, inputs lengths, "
                    "context and pages, as examples/nsa_serve.json has them");
  if (!rows)
    return cli_fail(&c->error, RG_E_USAGE, "regraph bench",
                    "--serve takes as many rows as its tables say; leave their number free (T of "
                    "examples/nsa_serve.json)");
  return RG_OK;
}

rg_status bench_serve(cli *c) {
  if (c->args.html || c->args.trace)
    return cli_fail(&c->error, RG_E_USAGE, "regraph bench",
                    "%s is of one plan, and --serve measures many; leave one of the two out",
                    c->args.html ? "--html" : "--trace");
  serve_bench *b = calloc(1, sizeof *b);
  if (!b) return cli_nomem(&c->error);
  b->c = c;
  rg_status s = find_pool(b);
  if (s == RG_OK) add_rows(b);
  for (int i = 0; s == RG_OK && i < b->nrow; i++) {
    cli_progress(c, "timing steps", i, b->nrow);
    s = measure_row(b, &b->row[i]);
  }
  cli_progress_end(c);
  if (s == RG_OK && c->args.json) {
    print_json(b);
  } else if (s == RG_OK && !c->args.eager) {
    printf("%s on %s, a pool of %lld pages of %lld tokens, median of %lld\n\n", c->shown,
           c->args.device, (long long)b->pages, (long long)b->page, (long long)c->args.repeat);
    print_table(b, 0, b->ndecode);
    putchar('\n');
    if (b->ndecode < b->nrow) print_table(b, b->ndecode, b->nrow);
  }
  for (size_t i = 0; c->plan && i < sizeof b->state / sizeof *b->state; i++)
    if (b->state[i]) rg_memory_free(c->plan, b->state[i]);
  free(b);
  return s;
}
