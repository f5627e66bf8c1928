/* tests/unit/test_serve.c: a serving step's whole layer over pages. Whatever the schedule, every
 * row of every step has the bits that the unpaged graph gives it: o, lse and idx of all branches,
 * and the caches in the end. */
#include "../harness/round.h"
#include "serve_case.h"

static int below(uint64_t *seed, int n) {
  return (int)(next_random(seed) % (uint32_t)n);
}
#define ONE_OF(seed, ...) \
  ((const int[]){__VA_ARGS__}[below((seed), (int)(sizeof((int[]){__VA_ARGS__}) / sizeof(int)))])

static layer random_layer(uint64_t *seed) {
  static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
  layer l = {.KH = ONE_OF(seed, 1, 2), .D = ONE_OF(seed, 8, 16, 40), .DV = ONE_OF(seed, 8, 24)};
  l.H = l.KH * ONE_OF(seed, 1, 2, 3, 4, 16);
  l.page = ONE_OF(seed, 16, 16, 32, 48, 64, 128, 256);
  l.stride = ONE_OF(seed, 4, 8, 16);
  l.kernel = l.stride * ONE_OF(seed, 1, 2, 2, 4);
  l.block = l.page == 48 ? ONE_OF(seed, 16, 48) : ONE_OF(seed, 16, 32, 64, 128);
  l.init = below(seed, 2), l.local = 1 + below(seed, 2);
  l.top_n = l.init + l.local + ONE_OF(seed, 0, 1, 4, 13);
  l.window = ONE_OF(seed, -1, 0, 7, 63, 200);
  l.k_method = below(seed, SERVE_METHODS), l.v_method = below(seed, SERVE_METHODS);
  l.q = types[below(seed, 3)], l.kv = below(seed, 2) ? l.q : types[below(seed, 3)];
  l.hnd = below(seed, 2), l.sinks = below(seed, 3) == 0;
  l.softcap = below(seed, 4) ? 0 : 15;
  if (below(seed, 6) == 0) l.dot = true, l.kernel = l.stride = l.block = 16;
  return l;
}

static int random_length(uint64_t *seed, const layer *l) {
  const int n = ONE_OF(seed, 0, 1, 2, 3, 4, 4, 4, 4);
  switch (n) {
  case 0: return below(seed, 3);
  case 1: return l->kernel - 1 + below(seed, 3);
  case 2: return l->page - 1 + below(seed, 3);
  case 3: return l->block - 1 + below(seed, 3);
  default: return below(seed, 280);
  }
}

/* Tables of all sequences: pages in no order, page 0 nobody's, and past what a sequence needs
 * numbers that nobody may look at. */
static void shuffle_pages(uint64_t *seed, int32_t *table, int nseq, int M, int P, int page,
                          const int *length) {
  int32_t *pool = malloc((size_t)P * sizeof *pool);
  int next = 0;
  for (int i = 1; i < P; i++) {
    const int k = below(seed, i);
    pool[i - 1] = pool[k];
    pool[k] = i;
  }
  for (int b = 0; b < nseq; b++)
    for (int m = 0; m < M; m++)
      table[b * M + m] = m * page < length[b] ? pool[next++] : ONE_OF(seed, 0, -1, INT32_MAX, 3);
  free(pool);
}

static void random_schedule(uint64_t seed) {
  enum { MOST = 5 };
  rg_error e = {0};
  rg_context *ctx;
  char what[512], text[256];
  const uint64_t first = seed;
  next_random(&seed);
  const layer l = random_layer(&seed);
  const int nseq = 1 + below(&seed, MOST);
  int length[MOST], done[MOST] = {0}, order[MOST + 1], of[MOST + 1], pages = 0, longest = 1;
  for (int b = 0; b < nseq; b++) {
    length[b] = random_length(&seed, &l);
    pages += (length[b] + l.page - 1) / l.page;
    if (length[b] > longest) longest = length[b];
  }
  sprintf(what, "seed %llu: %s", (unsigned long long)first, layer_text(&l, text));
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  side whole = run_whole(ctx, &l, first, nseq, length, 0);
  const int M = (longest + l.page - 1) / l.page + below(&seed, 2),
            T = ONE_OF(&seed, 3, 20, 90, 300);
  steps s = open_steps(ctx, &l, &whole, nseq, length, T, nseq + 1, M, pages + 3, what);
  int32_t *table = malloc((size_t)(nseq * M) * sizeof *table);
  shuffle_pages(&seed, table, nseq, M, s.P, l.page, length);
  const int habit = below(&seed, 4); /* one by one, some, all that there is room for; or any */
  for (bool more = true; more;) {
    int left = T;
    more = false;
    for (int i = 0; i <= nseq; i++) { /* sequences sit in other slots every step, one is empty */
      const int k = below(&seed, i + 1);
      order[i] = order[k];
      order[k] = i;
    }
    for (int b = 0; b <= nseq; b++) {
      const int q = of[b] = order[b] < nseq ? order[b] : -1;
      int n = 0;
      if (q >= 0 && length[q] > done[q]) {
        const int rest = length[q] - done[q], most = rest < left ? rest : left;
        const int how = habit < 3 ? habit : below(&seed, 3);
        n = how == 0 ? most > 0 : how == 1 ? below(&seed, most + 1) : most;
        done[q] += n;
        left -= n;
        more = more || done[q] < length[q];
      }
      s.lengths[b] = n;
      s.context[b] = q >= 0 ? done[q] : 0;
      for (int m = 0; m < M; m++)
        s.pages[b * M + m] =
            q >= 0 && (m * l.page < done[q] || below(&seed, 2)) ? table[q * M + m] : INT32_MIN;
    }
    step(&s, of, NULL, -1);
  }
  check_caches(&s, table, done, NULL);
  free(table);
  close_steps(&s);
  close_side(&whole);
  rg_context_destroy(ctx);
}

Test(serve, random_schedules) {
  enum { CASES = 25 };
  const uint64_t first = round_seed(15000, CASES);
  for (int i = 0; i < CASES; i++)
    if (in_sample(i, 8)) random_schedule(first + (uint64_t)i);
}

/* ---- one by one ---- */

static const layer small = {.H = 4,
                            .KH = 2,
                            .D = 8,
                            .DV = 16,
                            .page = 16,
                            .kernel = 32,
                            .stride = 16,
                            .block = 64,
                            .top_n = 4,
                            .init = 1,
                            .local = 2,
                            .window = 100,
                            .q = RG_BF16,
                            .kv = RG_BF16};

/* A sequence for tests that say what happens to it: its pages are in descending order. */
typedef struct line {
  rg_context *ctx;
  side whole;
  steps s;
  int32_t table[512];
  int done[2];
} line;

static void open_line(line *x, const layer *l, int nseq, const int *length, int shared, int T,
                      int pages, const char *what) {
  rg_error e = {0};
  const int M = (length[0] + 40 + l->page - 1) / l->page;
  *x = (line){0};
  CR_OK(rg_context_create(NULL, &x->ctx, &e), &e);
  x->whole = run_whole(x->ctx, l, 3, nseq, length, shared);
  x->s = open_steps(x->ctx, l, &x->whole, nseq, length, T, nseq, M, pages, what);
  for (int i = 0; i < nseq * M; i++) x->s.pages[i] = x->table[i] = pages - 1 - i;
}
static void close_line(line *x) {
  close_steps(&x->s);
  close_side(&x->whole);
  rg_context_destroy(x->ctx);
}
/* `n` tokens more of sequence b, which must give what they should. */
static void feed(line *x, int b, int n) {
  static const int of[] = {0, 1};
  for (int i = 0; i < x->s.nseq; i++) {
    x->s.lengths[i] = i == b ? n : 0;
    x->done[i] += x->s.lengths[i];
    x->s.context[i] = x->done[i];
  }
  step(&x->s, of, NULL, -1);
}

/* The seed's decode wrote the compressed row of length 2064 to the page before. */
static void every_length(int page, int first, int last) {
  layer l = small;
  line x;
  l.page = page;
  open_line(&x, &l, 1, &last, 0, first > 2 ? first - 1 : 1, (last + 40) / page + 2,
            page == 16 ? "page 16" : "page 128");
  if (first > 1) feed(&x, 0, first - 1);
  while (x.done[0] < last) feed(&x, 0, 1);
  check_caches(&x.s, x.table, x.done, NULL);
  close_line(&x);
}

Test(serve, every_length) {
  for (int page = 16; page <= 128; page *= 8) {
    if (!in_sample(1, 2)) every_length(page, 1, 70);
    every_length(page, in_sample(1, 2) ? 1 : 2040, 2200);
  }
}

/* ---- prefixes, rollback ---- */

/* Sequence 1 takes over what 0 has in its pages, which is `ahead` tokens more than both begin
 * with: whole pages are shared, the last is copied. */
static void fork_at(const layer *l, int shared, int ahead, const char *what) {
  const int length[] = {shared + 150, shared + 120}, whole = shared / l->page;
  line x;
  open_line(&x, l, 2, length, shared, shared + ahead + 1, 2 * ((shared + 190) / l->page + 2), what);
  const int M = x.s.M, from = x.table[whole], to = x.table[M + whole];
  bool *stale = calloc((size_t)x.s.P, sizeof *stale);
  feed(&x, 0, shared + ahead);
  for (int m = 0; m < whole; m++) x.s.pages[M + m] = x.table[M + m] = x.table[m];
  size_t bytes[4];
  unsigned char *before[4];
  static const char *const cache[] = {"kc", "vc", "ck", "cv"};
  for (int i = 0; i < 4; i++) {
    bytes[i] = row_bytes(&x.s.s.io, RG_STATE, cache[i]);
    before[i] = malloc((size_t)x.s.P * bytes[i]);
    memcpy(before[i], buffer(&x.s.s.io, RG_STATE, cache[i]), (size_t)x.s.P * bytes[i]);
  }
  x.done[1] = shared;
  if (shared % l->page) x.s.forks[0] = from, x.s.forks[1] = to, stale[to] = true;
  feed(&x, 1, 1);
  x.s.forks[0] = x.s.forks[1] = -1;
  for (int n = 0; n < 50; n++) {
    feed(&x, 0, 1 + n % 3 - (n % 3 == 2));
    feed(&x, 1, 1 + n % 2);
  }
  for (int i = 0; i < 4; i++) {
    for (int m = 0; m < whole; m++)
      cr_assert_eq(
          memcmp(before[i] + (size_t)x.table[m] * bytes[i],
                 (char *)buffer(&x.s.s.io, RG_STATE, cache[i]) + (size_t)x.table[m] * bytes[i],
                 bytes[i]),
          0, "%s: shared page %d of %s", what, m, cache[i]);
    free(before[i]);
  }
  check_caches(&x.s, x.table, x.done, stale);
  free(stale);
  close_line(&x);
}

Test(serve, prefixes_are_shared_and_part) {
  static const int sizes[][3] = {{16, 32, 16}, {64, 32, 16}, {128, 16, 8}};
  for (int i = 0; i < 3; i++) {
    layer l = small;
    char what[64];
    l.page = sizes[i][0], l.kernel = sizes[i][1], l.stride = sizes[i][2], l.hnd = i == 1;
    const int at[] = {2 * l.page - 1, 2 * l.page, 2 * l.page + 1, l.page + l.stride + 3, 5};
    for (int k = 0; k < 5; k++)
      for (int ahead = 0; ahead < 30; ahead += 29) {
        if (!in_sample(i + k + ahead, 4)) continue;
        sprintf(what, "page %d, %d shared, %d ahead", l.page, at[k], ahead);
        fork_at(&l, at[k], ahead, what);
      }
  }
}

/* Tokens that are not kept: NaN, 1 … 40 of them; then those that should have been. */
Test(serve, rollback) {
  static const int nobody[] = {-1};
  for (int page = 16; page <= 128; page *= 8) {
    layer l = small;
    line x;
    const int length = 600;
    l.page = page, l.block = 16;
    open_line(&x, &l, 1, &length, 0, 60, 700 / page + 2, "rollback");
    for (int n = 1; n <= 40; n++) {
      feed(&x, 0, 1 + n % 5 * (n % 7));
      x.s.lengths[0] = n;
      x.s.context[0] = x.done[0] + n;
      step(&x.s, nobody, NULL, -1);
    }
    feed(&x, 0, 41); /* over all that was not kept */
    check_caches(&x.s, x.table, x.done, NULL);
    close_line(&x);
  }
}

/* ---- faults ---- */

Test(serve, faults_are_named_and_stay) {
  static const int of[] = {0, 1};
  static const struct {
    int length, context, page;
    const char *says;
  } bad[] = {{3, 20, -1, "pages[1][1] is -1"},
             {3, 20, 99, "pages[1][1] is 99"},
             {3, 20, INT32_MAX, "pages[1][1] is 2147483647"},
             {3, 100000, 1, "context[1] is 100000"},
             {4, 3, 1, "lengths[1] is 4; expected 0 to 3"}};
  const int length[] = {200, 180};
  line x;
  open_line(&x, &small, 2, length, 0, 20, 40, "faults");
  feed(&x, 0, 17);
  feed(&x, 1, 17);
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    const int32_t was = x.s.pages[x.s.M + 1];
    x.s.lengths[0] = 2;
    x.s.context[0] = x.done[0] += 2;
    x.s.lengths[1] = bad[i].length, x.s.context[1] = bad[i].context;
    x.s.pages[x.s.M + 1] = bad[i].page;
    step(&x.s, of, bad[i].says, 1);
    x.s.pages[x.s.M + 1] = was;
    check_caches(&x.s, x.table, x.done, NULL);
    feed(&x, 1, 1);
  }
  for (int i = 0; i < 2; i++) x.s.lengths[i] = 0, x.s.context[i] = x.done[i] * i;
  step(&x.s, of, NULL, -1); /* nothing to do is no fault */
  check_caches(&x.s, x.table, x.done, NULL);
  close_line(&x);
}
