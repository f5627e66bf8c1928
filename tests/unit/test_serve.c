/* tests/unit/test_serve.c: a serving step's whole layer over pages. Whatever the schedule, every
 * row of every step has the bits that the unpaged graph gives it: o, lse and idx of all branches,
 * and the caches in the end.
 *
 * What others got wrong, and where it would be seen here: a compressed row in the page before, from
 * length 2064 on (every_length); `init` and `local` of topk changed places (random_schedules, where
 * they differ); padding rows divided by zero (every step: rows past the last are zero); compressed
 * rows that no prefix shares (prefixes_are_shared_and_part); values as wide as keys (most layers
 * are not so); the price of room for longer contexts (capacity_costs_its_table).
 *
 * The same on a GPU, where tests/gpu.sh runs it.
 */
#include "../harness/num.h"
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
  const int score = below(seed, 6);
  l.dot = score == 0, l.relu = score == 1;
  if (l.dot || l.relu) l.kernel = l.stride = l.block = 16;
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

/* ---- the whole against the oracle ---- */

static double *doubles(ot *t, const buffers *io, rg_role role, const char *name) {
  for (int i = 0; i < io->n; i++)
    if (io->info[i].role == role && strcmp(io->info[i].name, name) == 0) {
      const size_t n = (size_t)io->info[i].bytes / rg_dtype_size(io->info[i].dtype);
      float *x = ot_alloc(t, n * sizeof *x + 1);
      double *y = ot_doubles(t, (int64_t)n + 1);
      rg_convert(RG_F32, x, io->info[i].dtype, io->data[i], n);
      for (size_t k = 0; k < n; k++) y[k] = (double)x[k];
      return y;
    }
  return NULL;
}

/* What was chosen, on the compressed keys and the lse that were stored. */
static const char *check_choice(ot *t, const layer *l, const buffers *io, int nseq) {
  const int32_t *cu = buffer(io, RG_INPUT, "cu");
  const int64_t T = cu[nseq], nblock = T / l->block + 2, dim[] = {T, l->KH, l->top_n},
                stride[] = {(int64_t)l->KH * l->top_n, l->top_n, 1};
  const ref_topk a = {.T = T,
                      .TK = T / l->stride,
                      .B = nseq,
                      .H = l->H,
                      .KH = l->KH,
                      .D = l->D,
                      .q = doubles(t, io, RG_INPUT, "q"),
                      .k = doubles(t, io, RG_OUTPUT, "cmp_k"),
                      .lse = doubles(t, io, RG_OUTPUT, "cmp_lse"),
                      .cu = cu,
                      .kernel = l->kernel,
                      .stride = l->stride,
                      .block = l->block,
                      .top_n = l->top_n,
                      .init = l->init,
                      .local = l->local,
                      .softcap = l->dot || l->relu ? 0 : l->softcap,
                      .dot = l->dot,
                      .relu = l->relu};
  int32_t *idx = ot_ints(t, T * l->KH * l->top_n + 1);
  double *scores = ot_doubles(t, T * l->KH * nblock + 1), logit;
  if (T == 0) return NULL;
  ref_topk_forward(&a, idx, scores, nblock, &logit);
  return ot_check_topk(t, ot_wrap(t, buffer(io, RG_OUTPUT, "idx"), RG_I32, 3, dim, stride), T, idx,
                       scores, nblock, logit, 0, 0.99);
}

/* o and lse of each branch, on the compressed keys that were stored and the blocks that were
 * chosen, and these. */
static void check_oracle(const layer *l, const side *whole, int nseq, const char *what) {
  static const char *const o_name[] = {"cmp_o", "slc_o", "swa_o"}, *const lse_name[] = {"cmp_lse",
                                                                                        "slc_lse",
                                                                                        "swa_lse"};
  static const ref_kind kind[] = {REF_CMP, REF_SLC, REF_SWA};
  const buffers *io = &whole->io;
  const int32_t *cu = buffer(io, RG_INPUT, "cu");
  ot *t = ot_begin(1);
  const char *bad = check_choice(t, l, io, nseq);
  cr_assert(!bad, "%s: %s", what, bad);
  for (int i = 0; i < 3; i++) {
    const rg_role role = i ? RG_INPUT : RG_OUTPUT;
    ref_attn a = {.kind = kind[i],
                  .T = cu[nseq],
                  .TK = i ? cu[nseq] : cu[nseq] / l->stride,
                  .B = nseq,
                  .H = l->H,
                  .KH = l->KH,
                  .D = l->D,
                  .DV = l->DV,
                  .q = doubles(t, io, RG_INPUT, "q"),
                  .k = doubles(t, io, role, i ? "k" : "cmp_k"),
                  .v = doubles(t, io, role, i ? "v" : "cmp_v"),
                  .cu = cu,
                  .sinks = l->sinks ? doubles(t, io, RG_INPUT, "sinks") : NULL,
                  .softcap = l->softcap,
                  .kernel = l->kernel,
                  .stride = l->stride,
                  .idx = buffer(io, RG_OUTPUT, "idx"),
                  .block = l->block,
                  .top_n = l->top_n,
                  .window_left = l->window};
    const int64_t n = a.T * a.H * a.DV;
    double *o = ot_doubles(t, n + 1), *lse = ot_doubles(t, a.T * a.H + 1), err2 = 0, all = 0;
    const double *got = doubles(t, io, RG_OUTPUT, o_name[i]),
                 *got_lse = doubles(t, io, RG_OUTPUT, lse_name[i]);
    ref_attn_forward(&a, o, lse);
    for (int64_t k = 0; k < n; k++) err2 += (got[k] - o[k]) * (got[k] - o[k]), all += o[k] * o[k];
    cr_assert(err2 <= num_gate(l->q) * num_gate(l->q) * (all + 1e-6 * (double)n),
              "%s: %s is off by %g of %g", what, o_name[i], sqrt(err2), sqrt(all));
    for (int64_t k = 0; k < a.T * a.H; k++)
      EXPECT(got_lse[k] == lse[k] ||
                 fabs(got_lse[k] - lse[k]) <= NUM_LSE_GATE * fmax(1, fabs(lse[k])),
             "%s: %s[%lld] is %g, not %g", what, lse_name[i], (long long)k, got_lse[k], lse[k]);
  }
  ot_end(t);
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
  check_oracle(&l, &whole, nseq, what);
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
  enum { CASES = 40 };
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
  open_line(&x, &l, 1, &last, 0, 64, (last + 40) / page + 2, page == 16 ? "page 16" : "page 128");
  while (x.done[0] < first - 1)
    feed(&x, 0, first - 1 - x.done[0] < 64 ? first - 1 - x.done[0] : 64);
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

/* Scratch for tables of 16 and of 8,192 pages of 16 tokens: more only by the checked table, and for
 * each thread by topk's scores of the blocks there may be. Results are the same. */
Test(serve, capacity_costs_its_table) {
  enum { LENGTH = 200 };
  static const int length[] = {LENGTH}, of[] = {0};
  rg_context *ctx;
  rg_error e = {0};
  int64_t scratch[2];
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  side whole = run_whole(ctx, &small, 3, 1, length, 0);
  for (int k = 0; k < 2; k++) {
    const int M = k ? 8192 : 16;
    steps s = open_steps(ctx, &small, &whole, 1, length, 40, 1, M, 16, "capacity");
    rg_sizes sizes;
    CR_OK(rg_plan_sizes(s.s.plan, &sizes), &e);
    scratch[k] = sizes.scratch;
    for (int m = 0; m < M; m++) s.pages[m] = m < 16 ? 15 - m : -1;
    for (int at = 40; at <= LENGTH; at += 40) {
      s.lengths[0] = 40, s.context[0] = at;
      step(&s, of, NULL, -1);
    }
    close_steps(&s);
  }
  const int64_t table = 8192 * 4, blocks = 8192 * 16 / 64, score = blocks * (32 * 8 + 8);
  cr_assert_leq(scratch[1] - scratch[0], table + 2 * score + 4096, "%lld and %lld",
                (long long)scratch[0], (long long)scratch[1]);
  close_side(&whole);
  rg_context_destroy(ctx);
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
  for (int i = 0; i < 9; i++) { /* of two the list's is said, whoever finds his first */
    x.s.forks[2 * (i % 2)] = 99, x.s.forks[2 * (i % 2) + 1] = 1;
    x.s.lengths[1] = 4, x.s.context[1] = 3;
    FAILS(try_forward(x.s.s.session, &x.s.s.io, &e), RG_E_DATA,
          i % 2 ? "pages[1][0] is 99; expected a page, 0 to 39, or two -1"
                : "pages[0][0] is 99; expected a page, 0 to 39, or two -1");
    for (int k = 0; k < 4; k++) x.s.forks[k] = -1;
  }
  close_line(&x);
}

/* Numbers of all kinds, also without paged_batch in between: the run ends, well or with RG_E_DATA,
 * and has touched nothing that is not the caches' (sanitizers look on). */
Test(serve, any_numbers) {
  static const int32_t odd[] = {-1, 0, 1, 40, 39, 16, 96, 97, INT32_MAX, INT32_MIN};
  static const int length[] = {1, 1};
  static const char *const cache[] = {"kc", "vc", "ck", "cv"};
  uint64_t seed = round_seed(31, 1);
  for (int raw = 0; raw < 2; raw++) {
    layer l = small;
    line x;
    rg_error e = {0};
    l.raw = raw;
    open_line(&x, &l, 2, length, 0, 20, 40, "any numbers");
    for (int n = 0; n < (in_sample(1, 2) ? 400 : 60); n++) {
      for (int b = 0; b < 2; b++) {
        x.s.context[b] = below(&seed, x.s.M * 16 + 1);
        x.s.lengths[b] = below(&seed, x.s.context[b] + 1);
        for (int m = 0; m < x.s.M; m++) x.s.pages[b * x.s.M + m] = below(&seed, 40);
      }
      for (int k = below(&seed, 4); k > 0; k--) {
        int32_t *const at[] = {&x.s.lengths[below(&seed, 2)], &x.s.context[below(&seed, 2)],
                               &x.s.pages[below(&seed, 2 * x.s.M)], &x.s.forks[below(&seed, 4)]};
        *at[below(&seed, 4)] = odd[below(&seed, 10)];
      }
      e = (rg_error){0};
      const rg_status status = try_forward(x.s.s.session, &x.s.s.io, &e);
      cr_assert(status == RG_OK || status == RG_E_DATA, "%s", e.message);
      for (int i = 0; i < 4; i++) x.s.forks[i] = -1;
      for (int i = 0; i < 4; i++) /* rows of NaN never were written */
        memset(buffer(&x.s.s.io, RG_STATE, cache[i]), 0,
               40 * row_bytes(&x.s.s.io, RG_STATE, cache[i]));
      upload_role(&x.s.s.io, RG_STATE);
    }
    close_line(&x);
  }
}

/* ---- the examples ---- */

static side open_example(rg_context *ctx, const char *name, const rg_binding *set, size_t nset,
                         uint64_t seed, const int *lengths) {
  rg_error e = {0};
  side s = {0};
  char path[512];
  snprintf(path, sizeof path, "%s/examples/%s.json", RG_SOURCE_DIR, name);
  rg_plan_options o = serve_options(NULL, 0);
  rg_session_options how = serve_session();
  CR_OK(rg_spec_load_file(ctx, path, set, nset, &s.spec, &e), &e);
  CR_OK(rg_plan_create(s.spec, NULL, &o, &s.plan, &e), &e);
  CR_OK(rg_session_create(s.plan, &how, &s.session, &e), &e);
  make_buffers(s.plan, seed, 0, lengths, &s.io);
  bind_all(s.session, &s.io);
  return s;
}

#define BIND(name, value) \
  { name, value, NULL }
#define SMALL                                                                    \
  BIND("H", 4), BIND("KH", 2), BIND("D", 16), BIND("DV", 16), BIND("kernel", 8), \
      BIND("stride", 4), BIND("block", 16), BIND("top_n", 4), BIND("window", 24)

Test(serve, example_gives_the_unpaged_example) {
  enum { N = 150 };
  rg_error e = {0};
  rg_context *ctx;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  const rg_binding one[] = {SMALL, BIND("T", N), BIND("B", 1)};
  const rg_binding two[] = {SMALL,         BIND("page", 16), BIND("T", 60), BIND("B", 2),
                            BIND("M", 12), BIND("P", 20),    BIND("F", 1)};
  side whole = open_example(ctx, "nsa", one, sizeof one / sizeof *one, 1, (const int[]){N}),
       steps = open_example(ctx, "nsa_serve", two, sizeof two / sizeof *two, 1, NULL);
  CR_OK(try_forward(whole.session, &whole.io, &e), &e);
  int32_t *lengths = buffer(&steps.io, RG_INPUT, "lengths"),
          *context = buffer(&steps.io, RG_INPUT, "context"),
          *pages = buffer(&steps.io, RG_INPUT, "pages");
  const size_t size = row_bytes(&steps.io, RG_OUTPUT, "o");
  memset(buffer(&steps.io, RG_INPUT, "forks"), 0xff, 2 * sizeof(int32_t));
  for (int m = 0; m < 24; m++) pages[m] = m < 12 ? -1 : 30 - m;
  lengths[0] = context[0] = context[1] = 0;
  for (int n = 1; context[1] < N; n = n * 7 % 59) {
    lengths[1] = n < N - context[1] ? n : N - context[1];
    for (int i = 0; i < 4; i++) {
      const size_t row = row_bytes(&steps.io, RG_INPUT, serve_given[i]);
      memcpy(buffer(&steps.io, RG_INPUT, serve_given[i]),
             (char *)buffer(&whole.io, RG_INPUT, serve_given[i]) + (size_t)context[1] * row,
             (size_t)lengths[1] * row);
    }
    context[1] += lengths[1];
    CR_OK(try_forward(steps.session, &steps.io, &e), &e);
    cr_assert_eq(
        memcmp(buffer(&steps.io, RG_OUTPUT, "o"),
               (char *)buffer(&whole.io, RG_OUTPUT, "o") + (size_t)(context[1] - lengths[1]) * size,
               (size_t)lengths[1] * size),
        0, "%d tokens up to %d", lengths[1], context[1]);
  }
  close_side(&steps);
  close_side(&whole);
  rg_context_destroy(ctx);
}

/* A loop around serve_model.json and rg_pages: `n` prompts, each with so many tokens to be made.
 * At most `chunk` rows a step, shared out from sequence `first` on. What comes out: the tokens, and
 * the last logits of each sequence. */
enum { V = 50, LOOP = 4, LOOP_T = 40, LOOP_B = 5, LOOP_M = 8, LOOP_P = 26 };
typedef struct answer {
  int32_t token[LOOP][100];
  float logits[LOOP][V];
  int64_t found, forked;
} answer;

static void loop(rg_context *ctx, const int *prompt, const int *all, int chunk, int first,
                 bool reuse, answer *a) {
  static const rg_binding set[] = {SMALL,
                                   BIND("page", 16),
                                   BIND("T", LOOP_T),
                                   BIND("B", LOOP_B),
                                   BIND("V", V),
                                   BIND("W", 24),
                                   BIND("F", 40),
                                   BIND("M", LOOP_M),
                                   BIND("P", LOOP_P),
                                   BIND("layers", 2),
                                   BIND("forks", LOOP_B)};
  rg_error e = {0};
  rg_pages *p;
  rg_sequence seq[LOOP] = {0};
  side s = open_example(ctx, "serve_model", set, sizeof set / sizeof *set, 5, NULL);
  int32_t *tokens = buffer(&s.io, RG_INPUT, "tokens"),
          *lengths = buffer(&s.io, RG_INPUT, "lengths"),
          *context = buffer(&s.io, RG_INPUT, "context"), *pages = buffer(&s.io, RG_INPUT, "pages"),
          *next = buffer(&s.io, RG_OUTPUT, "next");
  int made[LOOP];
  memcpy(made, prompt, sizeof made);
  CR_OK(rg_pages_create(ctx,
                        &(rg_pages_options){.size = sizeof(rg_pages_options),
                                            .pages = LOOP_P,
                                            .page = 16,
                                            .most = LOOP_M,
                                            .no_prefixes = !reuse},
                        &p, &e),
        &e);
  for (bool more = true; more;) {
    int left = chunk, of[LOOP_B], slot = 0;
    more = false;
    for (int k = 0; k < LOOP; k++) {
      const int q = (first + k) % LOOP;
      int64_t known;
      more = more || made[q] < all[q];
      if (!left) continue;
      if (!seq[q]) { /* a prompt has come; the last one is what 0 has, but for its end */
        if (reuse && q == LOOP - 1) {
          if (rg_pages_context(p, seq[0]) != prompt[q] - 1) continue;
          CR_OK(rg_pages_fork(p, seq[0], &seq[q], &e), &e);
          a->forked++;
        } else {
          CR_OK(rg_pages_open(p, a->token[q], made[q], &seq[q], &known, &e), &e);
          a->found += known;
        }
      }
      const int64_t was = rg_pages_context(p, seq[q]);
      int n = made[q] - (int)was < left ? made[q] - (int)was : left;
      if (made[q] == all[q] || !n) continue;
      CR_OK(rg_pages_reserve(p, seq[q], n, &e), &e);
      CR_OK(rg_pages_table(p, seq[q], pages + slot * LOOP_M, LOOP_M, &e), &e);
      memcpy(tokens + chunk - left, a->token[q] + was, (size_t)n * sizeof *tokens);
      lengths[slot] = n;
      context[slot] = (int32_t)was + n;
      of[slot++] = q;
      left -= n;
    }
    for (int b = slot; b < LOOP_B; b++) lengths[b] = context[b] = 0;
    int64_t copies;
    CR_OK(rg_pages_copies(p, buffer(&s.io, RG_INPUT, "forks"), LOOP_B, &copies, &e), &e);
    if (slot) CR_OK(try_forward(s.session, &s.io, &e), &e);
    for (int b = 0; b < slot; b++) {
      const int q = of[b];
      CR_OK(rg_pages_commit(p, seq[q], a->token[q] + context[b] - lengths[b], lengths[b], &e), &e);
      if (context[b] < made[q]) continue;
      rg_convert(RG_F32, a->logits[q], RG_BF16,
                 (char *)buffer(&s.io, RG_OUTPUT, "logits") + (size_t)(b * V) * 2, V);
      a->token[q][made[q]++] = next[b];
    }
  }
  for (int q = 0; q < LOOP; q++) CR_OK(rg_pages_close(p, seq[q], &e), &e);
  rg_pages_destroy(p);
  close_side(&s);
}

/* Prompts of which two begin alike and one ends otherwise: the same tokens and logits, to the bit,
 * whatever share a step and its pages. */
Test(serve, a_model_says_the_same_however_it_is_served) {
  static const int prompt[LOOP] = {37, 60, 5, 43}, all[LOOP] = {70, 75, 64, 73};
  rg_error e = {0};
  rg_context *ctx;
  uint64_t seed = 8;
  answer plain = {0}, other;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  for (int q = 0; q < LOOP; q++)
    for (int i = 0; i < prompt[q]; i++)
      plain.token[q][i] = q && i < 33 && q != 2 ? plain.token[0][i] : below(&seed, V);
  other = plain;
  answer start = plain;
  loop(ctx, prompt, all, LOOP_T, 0, false, &plain);
  /* sequence 3 goes on from what 0 was told and said, but for its last token */
  memcpy(start.token[3], plain.token[0], (size_t)(prompt[3] - 1) * sizeof(int32_t));
  start.token[3][prompt[3] - 1] = (plain.token[0][prompt[3] - 1] + 1) % V;
  plain = start;
  loop(ctx, prompt, all, LOOP_T, 0, false, &plain);
  for (int k = 0; k < 3; k++) {
    if (!in_sample(k, 2)) continue;
    other = start;
    loop(ctx, prompt, all, (const int[]){1, 7, 33}[k], k, k > 0, &other);
    if (k) cr_assert(other.found > 0 && other.forked == 1, "way %d shared nothing", k);
    for (int q = 0; q < LOOP; q++) {
      cr_assert_eq(memcmp(other.token[q], plain.token[q], sizeof *plain.token), 0, "way %d, %d", k,
                   q);
      cr_assert_eq(memcmp(other.logits[q], plain.logits[q], sizeof *plain.logits), 0,
                   "way %d: logits of %d", k, q);
    }
  }
  rg_context_destroy(ctx);
}
