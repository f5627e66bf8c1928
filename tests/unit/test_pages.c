/* tests/unit/test_pages.c: the page allocator: what it promises, each said once; and a hundred
 * thousand operations at random beside a model that keeps, for every row of every page, which
 * tokens it was made of. */
#include "../harness/round.h"
#include "run_util.h"

#include <stdint.h>

typedef struct pool {
  rg_context *ctx;
  rg_pages *p;
} pool;

static pool open_pool(int64_t pages, int64_t page, int64_t most) {
  rg_error e = {0};
  pool x;
  CR_OK(rg_context_create(NULL, &x.ctx, &e), &e);
  const rg_pages_options o = {
      .size = sizeof(rg_pages_options), .pages = pages, .page = page, .most = most};
  CR_OK(rg_pages_create(x.ctx, &o, &x.p, &e), &e);
  return x;
}
static void close_pool(pool *x) {
  rg_pages_destroy(x->p);
  rg_context_destroy(x->ctx);
}
static rg_sequence begin(rg_pages *p, const int32_t *tokens, int64_t n, int64_t want) {
  rg_error e = {0};
  rg_sequence s;
  int64_t known;
  CR_OK(rg_pages_open(p, tokens, n, &s, &known, &e), &e);
  cr_assert_eq(known, want, "%lld known, %lld expected", (long long)known, (long long)want);
  return s;
}
static void add(rg_pages *p, rg_sequence s, const int32_t *tokens, int64_t n) {
  rg_error e = {0};
  CR_OK(rg_pages_reserve(p, s, n, &e), &e);
  CR_OK(rg_pages_commit(p, s, tokens, n, &e), &e);
}
static void end(rg_pages *p, rg_sequence s) {
  rg_error e = {0};
  CR_OK(rg_pages_close(p, s, &e), &e);
}
static void counts(const rg_pages *p, int64_t used, int64_t kept, int64_t shared) {
  rg_pages_info i;
  cr_assert_eq(rg_pages_count(p, &i), RG_OK);
  cr_assert(i.used == used && i.kept == kept && i.shared == shared,
            "%lld used, %lld kept, %lld shared; expected %lld, %lld, %lld", (long long)i.used,
            (long long)i.kept, (long long)i.shared, (long long)used, (long long)kept,
            (long long)shared);
}

static const int32_t other[20] = {7, 7};
static const int32_t text[] = {5, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4};

Test(pages, prefixes_are_found_again) {
  pool x = open_pool(8, 4, 0);
  rg_sequence a = begin(x.p, text, 20, 0);
  add(x.p, a, text, 14);
  counts(x.p, 4, 0, 0);
  rg_sequence b = begin(x.p, text, 20, 12); /* whole pages */
  counts(x.p, 4, 0, 3);
  end(x.p, b);
  b = begin(x.p, text, 12, 8); /* one token at least is left to run */
  rg_sequence c = begin(x.p, text + 1, 19, 0);
  end(x.p, a);
  counts(x.p, 2, 1, 0); /* of a, page 2 is kept, page 3 never was full */
  a = begin(x.p, text, 20, 12);
  end(x.p, a), end(x.p, b), end(x.p, c);
  counts(x.p, 0, 3, 0);
  b = begin(x.p, NULL, 0, 0); /* takes all there is: free ones, then the last of what is kept */
  add(x.p, b, other, 20);
  counts(x.p, 5, 3, 0);
  add(x.p, b, text, 4);
  counts(x.p, 6, 2, 0);
  c = begin(x.p, text, 20, 8);
  end(x.p, b), end(x.p, c);
  close_pool(&x);
}

Test(pages, twins_become_one) {
  pool x = open_pool(8, 4, 0);
  const rg_sequence a = begin(x.p, text, 20, 0), b = begin(x.p, text, 20, 0);
  add(x.p, a, text, 6);
  add(x.p, b, text, 6);
  counts(x.p, 3, 0, 1);
  add(x.p, b, text + 6, 4);
  add(x.p, a, text + 6, 4);
  counts(x.p, 4, 0, 2);
  end(x.p, a), end(x.p, b);
  close_pool(&x);
}

Test(pages, tokens_not_told_are_not_found) {
  rg_error e = {0};
  pool x = open_pool(8, 4, 0);
  const rg_sequence a = begin(x.p, text, 20, 0);
  add(x.p, a, text, 5);
  add(x.p, a, NULL, 1);
  add(x.p, a, text + 6, 6);
  end(x.p, begin(x.p, text, 20, 4));
  CR_OK(rg_pages_truncate(x.p, a, 5, &e), &e);
  add(x.p, a, text + 5, 7); /* told after all */
  end(x.p, begin(x.p, text, 20, 12));
  CR_OK(rg_pages_truncate(x.p, a, 6, &e), &e); /* and page 1 is written anew */
  add(x.p, a, text, 1);
  end(x.p, begin(x.p, text, 20, 4));
  end(x.p, a);
  close_pool(&x);
}

Test(pages, shared_pages_are_copied_before_a_write) {
  rg_error e = {0};
  int32_t pairs[3][2], row[3];
  int64_t n;
  rg_sequence b, c;
  pool x = open_pool(6, 4, 3);
  const rg_sequence a = begin(x.p, NULL, 0, 0);
  add(x.p, a, text, 6);
  CR_OK(rg_pages_fork(x.p, a, &b, &e), &e);
  counts(x.p, 2, 0, 2);
  CR_OK(rg_pages_reserve(x.p, b, 1, &e), &e);
  CR_OK(rg_pages_fork(x.p, b, &c, &e), &e); /* shares a page whose copy is due */
  CR_OK(rg_pages_reserve(x.p, c, 1, &e), &e);
  CR_OK(rg_pages_reserve(x.p, b, 1, &e), &e);
  CR_OK(rg_pages_reserve(x.p, a, 1, &e), &e); /* alone with its page by now */
  counts(x.p, 4, 0, 1);
  FAILS(rg_pages_copies(x.p, pairs, 1, &n, &e), RG_E_LIMIT, "2 copies are due");
  CR_OK(rg_pages_copies(x.p, pairs, 3, &n, &e), &e);
  cr_assert_eq(n, 2);
  CR_OK(rg_pages_table(x.p, a, row, 3, &e), &e);
  cr_assert(row[1] == pairs[0][0] && row[1] == pairs[1][0] && row[2] == -1);
  CR_OK(rg_pages_table(x.p, b, row, 3, &e), &e);
  cr_assert_eq(row[1], pairs[0][1]);
  CR_OK(rg_pages_table(x.p, c, row, 3, &e), &e);
  cr_assert_eq(row[1], pairs[1][1]);
  cr_assert(pairs[2][0] == -1 && pairs[2][1] == -1);
  CR_OK(rg_pages_fork(x.p, a, &(rg_sequence){0}, &e), &e);
  CR_OK(rg_pages_reserve(x.p, a, 1, &e), &e);
  end(x.p, a); /* who was to write is gone, and its copy with it */
  CR_OK(rg_pages_copies(x.p, pairs, 3, &n, &e), &e);
  cr_assert_eq(n, 0);
  close_pool(&x);
}

Test(pages, exhaustion_loses_nothing) {
  rg_error e = {0};
  rg_sequence b;
  pool x = open_pool(4, 4, 0);
  const rg_sequence a = begin(x.p, NULL, 0, 0);
  add(x.p, a, text, 10);
  CR_OK(rg_pages_fork(x.p, a, &b, &e), &e);
  FAILS(rg_pages_reserve(x.p, a, 3, &e), RG_E_LIMIT, "2 more pages are needed, and of 4 1 are");
  FAILS(rg_pages_reserve(x.p, a, 7, &e), RG_E_LIMIT, "expected 0 to 6, for 4 pages of 4");
  counts(x.p, 3, 0, 3);
  cr_assert_eq(rg_pages_context(x.p, a), 10);
  FAILS(rg_pages_commit(x.p, a, text, 1, &e), RG_E_USAGE, "expected 0 to 0");
  end(x.p, b);
  add(x.p, a, text + 10, 3);
  FAILS(rg_pages_table(x.p, b, (int32_t[4]){0}, 4, &e), RG_E_USAGE, "no sequence that is open");
  FAILS(rg_pages_table(x.p, a, (int32_t[4]){0}, 3, &e), RG_E_USAGE, "row for 3 pages; expected 4");
  FAILS(rg_pages_truncate(x.p, a, 14, &e), RG_E_USAGE, "expected 0 to 13");
  FAILS(rg_pages_close(NULL, a, &e), RG_E_USAGE, "NULL");
  FAILS(rg_pages_create(x.ctx, &(rg_pages_options){.pages = 0, .page = 4}, &(rg_pages *){0}, &e),
        RG_E_USAGE, "0 pages of 4 tokens");
  close_pool(&x);
}

/* ---- beside a model ---- */

enum { P = 28, PAGE = 4, MOST = 8, SEQS = 8, ROOM = MOST * PAGE };

typedef struct twin {
  rg_sequence number;
  int64_t context, reserved, known;
  int32_t token[ROOM];
} twin;

typedef struct world {
  pool x;
  uint64_t seed;
  twin s[SEQS];
  uint64_t row[P][PAGE]; /* what is in the caches: all tokens up to that one */
  bool due;              /* copies may be: then rows are looked at after them */
  int64_t found, copied, refused;
} world;

static int below(world *w, int n) {
  return (int)(next_random(&w->seed) % (uint32_t)n);
}
/* A row of keys is made of all tokens so far. */
static uint64_t made_of(const twin *s, int64_t at) {
  uint64_t h = 1;
  for (int64_t i = 0; i <= at; i++) h = h * 0x100000001b3u + (uint64_t)s->token[i] + 7;
  return h;
}
static void table(world *w, const twin *s, int32_t *row) {
  rg_error e = {0};
  CR_OK(rg_pages_table(w->x.p, s->number, row, MOST, &e), &e);
}

/* Copies that are due, done in any order, as a graph does them. */
static void do_copies(world *w) {
  rg_error e = {0};
  int32_t pairs[P][2];
  uint64_t old[P][PAGE];
  int64_t n;
  CR_OK(rg_pages_copies(w->x.p, pairs, P, &n, &e), &e);
  memcpy(old, w->row, sizeof old);
  for (int64_t k = 0; k < n; k++) {
    for (int64_t j = 0; j < n; j++)
      cr_assert(j == k || (pairs[j][1] != pairs[k][1] && pairs[j][0] != pairs[k][1]));
    cr_assert_neq(pairs[k][0], pairs[k][1]);
    memcpy(w->row[pairs[k][1]], old[pairs[k][0]], sizeof *old);
  }
  w->copied += n;
  w->due = false;
}

static void check_all(world *w) {
  int32_t row[MOST];
  int holders[P] = {0};
  int64_t used = 0, shared = 0, open = 0;
  rg_pages_info i;
  for (const twin *s = w->s; s < w->s + SEQS; s++) {
    if (!s->number) continue;
    open++;
    table(w, s, row);
    cr_assert_eq(rg_pages_context(w->x.p, s->number), s->context);
    for (int64_t at = 0; at < s->context && !w->due; at++)
      cr_assert_eq(w->row[row[at / PAGE]][at % PAGE], made_of(s, at));
    for (int m = 0; m < MOST && row[m] >= 0; m++) holders[row[m]]++;
  }
  for (int p = 0; p < P; p++) used += holders[p] > 0, shared += holders[p] > 1;
  cr_assert_eq(rg_pages_count(w->x.p, &i), RG_OK);
  cr_assert(i.used >= used && i.used + i.kept + i.free == P && i.shared == shared &&
            i.sequences == open);
}

/* Pages that `s` needs before it may write n tokens. */
static int64_t needed(world *w, const twin *s, int64_t n) {
  int32_t row[MOST], other[MOST];
  int64_t has = 0, holders = 0;
  table(w, s, row);
  while (has < MOST && row[has] >= 0) has++;
  const int64_t m = s->context / PAGE, pages = (s->context + n + PAGE - 1) / PAGE;
  for (const twin *t = w->s; t < w->s + SEQS && n && s->context % PAGE; t++) {
    if (!t->number) continue;
    table(w, t, other);
    for (int k = 0; k < MOST; k++) holders += other[k] == row[m];
  }
  return (pages > has ? pages - has : 0) + (holders > 1);
}

static void reserve(world *w, twin *s, int64_t n) {
  rg_error e = {0};
  rg_pages_info i;
  cr_assert_eq(rg_pages_count(w->x.p, &i), RG_OK);
  const int64_t need = needed(w, s, n);
  const rg_status status = rg_pages_reserve(w->x.p, s->number, n, &e);
  if (s->context + n > ROOM || need > i.kept + i.free) {
    cr_assert_eq(status, RG_E_LIMIT);
    w->refused++;
  } else {
    CR_OK(status, &e);
    s->reserved = n;
    w->due = true;
  }
}

static void commit(world *w, twin *s, bool told) {
  rg_error e = {0};
  int32_t row[MOST], tokens[ROOM];
  const int64_t n = s->reserved ? below(w, (int)s->reserved + 1) : 0;
  cr_assert_eq(rg_pages_commit(w->x.p, s->number, NULL, s->reserved + 1, NULL), RG_E_USAGE);
  do_copies(w);
  table(w, s, row);
  for (int64_t i = 0; i < n; i++) tokens[i] = s->token[s->context + i] = below(w, 2);
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = s->context + i;
    w->row[row[at / PAGE]][at % PAGE] = made_of(s, at);
  }
  CR_OK(rg_pages_commit(w->x.p, s->number, told ? tokens : NULL, n, &e), &e);
  if (told && s->known == s->context) s->known += n;
  s->context += n;
  s->reserved -= n;
}

static void open_one(world *w, twin *s) {
  rg_error e = {0};
  int64_t known, want = 0;
  const int64_t n = below(w, ROOM + 1);
  *s = (twin){0};
  for (int64_t i = 0; i < n; i++) s->token[i] = below(w, 2);
  const twin *like = &w->s[below(w, SEQS)];
  if (like->number && below(w, 2)) memcpy(s->token, like->token, sizeof s->token);
  for (const twin *t = w->s; t < w->s + SEQS; t++) { /* at least what an open one has is found */
    int64_t m = 0;
    if (!t->number || t == s) continue;
    while ((m + 1) * PAGE < n && (m + 1) * PAGE <= t->known &&
           memcmp(t->token, s->token, (size_t)(m + 1) * PAGE * sizeof *t->token) == 0)
      m++;
    if (m * PAGE > want) want = m * PAGE;
  }
  CR_OK(rg_pages_open(w->x.p, s->token, n, &s->number, &known, &e), &e);
  cr_assert(known >= want && known % PAGE == 0 && (known < n || !known),
            "%lld of %lld known; expected %lld", (long long)known, (long long)n, (long long)want);
  s->context = s->known = known;
  w->found += known;
}

static void operate(world *w) {
  rg_error e = {0};
  twin *s = &w->s[below(w, SEQS)], *t = &w->s[below(w, SEQS)];
  if (!s->number) {
    open_one(w, s);
    return;
  }
  switch (below(w, 40)) {
  case 0:
  case 1:
  case 2:
    end(w->x.p, s->number);
    s->number = 0;
    break;
  case 3:
  case 4:
  case 5:
  case 6:
    if (t->number) break;
    *t = *s;
    CR_OK(rg_pages_fork(w->x.p, s->number, &t->number, &e), &e);
    s->reserved = t->reserved = 0;
    break;
  case 7:
  case 8:
    s->context -= below(w, (int)s->context + 1) / (1 + below(w, 8));
    if (s->known > s->context) s->known = s->context;
    s->reserved = 0;
    CR_OK(rg_pages_truncate(w->x.p, s->number, s->context, &e), &e);
    break;
  case 9: do_copies(w); break;
  default:
    if (below(w, 2))
      reserve(w, s, below(w, 9));
    else
      commit(w, s, below(w, 50) > 0);
  }
}

Test(pages, as_a_model_has_it) {
  enum { OPERATIONS = 200000 };
  world w = {.x = open_pool(P, PAGE, MOST), .seed = round_seed(77, 1)};
  for (int i = 0; i < OPERATIONS; i++) {
    operate(&w);
    check_all(&w);
  }
  cr_assert(w.found > 1000 && w.copied > 500 && w.refused > 500, "%lld found, %lld copied, %lld",
            (long long)w.found, (long long)w.copied, (long long)w.refused);
  for (twin *s = w.s; s < w.s + SEQS; s++)
    if (s->number) end(w.x.p, s->number);
  rg_pages_info i;
  cr_assert_eq(rg_pages_count(w.x.p, &i), RG_OK);
  cr_assert(i.used == 0 && i.kept + i.free == P && i.sequences == 0);
  close_pool(&w.x);
}
