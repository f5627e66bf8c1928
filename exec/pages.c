/* exec/pages.c: which sequence has which pages of a pool (serving.h, "pages").
 *
 * A page is in one of three states:
 *
 *     used   refs > 0: so many sequences have it in their tables
 *     kept   refs = 0, known: nobody's, but its tokens are on record
 *     free   refs = 0, not known
 *
 * Pages of the last two stand in one queue, free ones before kept ones, these in the order in which
 * they were let go. What is needed is taken from its front. A sequence lets go of its last page
 * first, so that no page is lost before those that are found only through it.
 *
 * Known pages are found by (parent, tokens): `parent` is the serial number under which the page
 * before is known, and numbers never come again, so a page's number stands for all tokens up to its
 * end. Of two sequences that fill pages with the same tokens at the same time, the second lets go
 * of its own for the first's: what is in both has the same bits.
 *
 * Copies wait in a list until they are fetched. Until then a source is pinned: nobody may get it
 * as a target of another copy, since the list has no order. A target that is let go takes its entry
 * with it; a copy of a target is a copy of its source.
 */
#include "../graph/base.h"

#include <string.h>

enum { NO_PAGE = -1, NOT_KNOWN = 0, ROOT = 1 }; /* serial numbers are 2 … */

typedef struct page {
  int32_t refs, pins;
  int32_t previous, next; /* in the queue */
  int32_t chain;          /* the next known page of one bucket */
  uint64_t serial, parent;
} page;

typedef struct sequence {
  rg_sequence number; /* 0: this slot is empty */
  int64_t context, reserved;
  int64_t known;    /* tokens from the first on that we were told */
  int64_t n, room;  /* pages it has; entries of the arrays */
  int32_t *page;    /* [room] */
  uint64_t *serial; /* [room] what full pages of tokens that we were told are known as */
  int32_t next;     /* the next empty slot */
} sequence;

struct rg_pages {
  rg_context *ctx;
  int64_t P, size, most;
  bool prefixes;
  page *page;      /* [P] */
  int32_t *tokens; /* [P, size] */
  int32_t *bucket; /* [mask + 1] */
  uint64_t mask, serials;
  int32_t first, last; /* of the queue */
  int64_t waiting;     /* pages in it */
  int64_t kept;        /* of these, known ones */
  int64_t shared;      /* pages with more than one sequence */
  sequence *slot;
  int64_t nslot, sequences;
  int32_t empty; /* the first empty slot */
  int64_t opened;
  int32_t (*copy)[2];
  int64_t ncopy, copy_room;
};

/* ---- the queue ---- */

static bool in_queue(const page *x) {
  return x->refs == 0 && x->pins == 0;
}

static void link_page(rg_pages *p, int32_t i, bool front) {
  page *x = &p->page[i];
  x->previous = front ? NO_PAGE : p->last;
  x->next = front ? p->first : NO_PAGE;
  if (x->previous == NO_PAGE)
    p->first = i;
  else
    p->page[x->previous].next = i;
  if (x->next == NO_PAGE)
    p->last = i;
  else
    p->page[x->next].previous = i;
  p->waiting++;
  p->kept += x->serial != NOT_KNOWN;
}

static void unlink_page(rg_pages *p, int32_t i) {
  page *x = &p->page[i];
  if (x->previous == NO_PAGE)
    p->first = x->next;
  else
    p->page[x->previous].next = x->next;
  if (x->next == NO_PAGE)
    p->last = x->previous;
  else
    p->page[x->next].previous = x->previous;
  p->waiting--;
  p->kept -= x->serial != NOT_KNOWN;
}

/* ---- what is known ---- */

static int32_t *bucket_of(const rg_pages *p, uint64_t parent, const int32_t *tokens) {
  const uint64_t h =
      rgi_hash(rgi_hash(0, &parent, sizeof parent), tokens, (size_t)p->size * sizeof *tokens);
  return &p->bucket[(h ^ h >> 32) & p->mask];
}

static int32_t *tokens_of(const rg_pages *p, int32_t i) {
  return p->tokens + i * p->size;
}

static int32_t find(const rg_pages *p, uint64_t parent, const int32_t *tokens) {
  for (int32_t i = *bucket_of(p, parent, tokens); i != NO_PAGE; i = p->page[i].chain)
    if (p->page[i].parent == parent &&
        memcmp(tokens_of(p, i), tokens, (size_t)p->size * sizeof *tokens) == 0)
      return i;
  return NO_PAGE;
}

static void forget(rg_pages *p, int32_t i) {
  page *x = &p->page[i];
  if (x->serial == NOT_KNOWN) return;
  int32_t *at = bucket_of(p, x->parent, tokens_of(p, i));
  while (*at != i) at = &p->page[*at].chain;
  *at = x->chain;
  p->kept -= in_queue(x);
  x->serial = NOT_KNOWN;
}

/* ---- taking and letting go ---- */

static void hold(rg_pages *p, int32_t i) {
  if (in_queue(&p->page[i])) unlink_page(p, i);
  p->shared += ++p->page[i].refs == 2;
}

/* One from the queue, which is not empty. */
static int32_t take(rg_pages *p) {
  const int32_t i = p->first;
  forget(p, i);
  hold(p, i);
  return i;
}

static void settle(rg_pages *p, int32_t i) {
  if (in_queue(&p->page[i])) link_page(p, i, p->page[i].serial == NOT_KNOWN);
}

static void drop_copy(rg_pages *p, int64_t k) {
  const int32_t source = p->copy[k][0];
  memmove(p->copy + k, p->copy + k + 1, (size_t)(p->ncopy - k - 1) * sizeof *p->copy);
  p->ncopy--;
  p->page[source].pins--;
  settle(p, source);
}

static void let_go(rg_pages *p, int32_t i) {
  const int32_t refs = --p->page[i].refs;
  p->shared -= refs == 1;
  if (refs > 0) return;
  for (int64_t k = 0; k < p->ncopy; k++)
    if (p->copy[k][1] == i) {
      drop_copy(p, k);
      break;
    }
  settle(p, i);
}

/* Pages [n, …) of a sequence, the last first. */
static void shrink(rg_pages *p, sequence *s, int64_t n) {
  while (s->n > n) let_go(p, s->page[--s->n]);
}

/* Page m of a sequence is full of tokens that we were told. */
static void publish(rg_pages *p, sequence *s, int64_t m) {
  const uint64_t parent = m ? s->serial[m - 1] : ROOT;
  const int32_t own = s->page[m], same = find(p, parent, tokens_of(p, own));
  if (same != NO_PAGE) {
    hold(p, same);
    s->page[m] = same;
    let_go(p, own);
  } else {
    page *x = &p->page[own];
    int32_t *at = bucket_of(p, parent, tokens_of(p, own));
    x->serial = ++p->serials;
    x->parent = parent;
    x->chain = *at;
    *at = own;
  }
  s->serial[m] = p->page[s->page[m]].serial;
}

/* ---- growing ---- */

static rg_status grow(const rg_pages *p, void **array, int64_t old, int64_t room, size_t size,
                      rg_error *e) {
  void *more = rgi_malloc(p->ctx, (size_t)room * size);
  if (!more) return rgi_nomem(e);
  if (old) memcpy(more, *array, (size_t)old * size);
  rgi_free(p->ctx, *array);
  *array = more;
  return RG_OK;
}

static rg_status room_for(const rg_pages *p, sequence *s, int64_t n, rg_error *e) {
  if (n <= s->room) return RG_OK;
  int64_t room = s->room ? 2 * s->room : 8;
  while (room < n) room *= 2;
  void *pages = s->page, *serials = s->serial;
  rg_status status = grow(p, &pages, s->room, room, sizeof *s->page, e);
  s->page = pages;
  if (status == RG_OK) status = grow(p, &serials, s->room, room, sizeof *s->serial, e);
  s->serial = serials;
  if (status == RG_OK) s->room = room;
  return status;
}

static rg_status empty_slot(rg_pages *p, rg_error *e) {
  if (p->empty >= 0) return RG_OK;
  const int64_t room = p->nslot ? 2 * p->nslot : 16;
  void *slots = p->slot;
  if (room > INT32_MAX)
    return rgi_fail(e, RG_E_LIMIT, NULL, NULL, "%lld sequences are as many as there can be",
                    (long long)p->nslot);
  RGI_TRY(grow(p, &slots, p->nslot, room, sizeof *p->slot, e));
  p->slot = slots;
  for (int64_t i = room - 1; i >= p->nslot; i--) {
    p->slot[i] = (sequence){.next = p->empty};
    p->empty = (int32_t)i;
  }
  p->nslot = room;
  return RG_OK;
}

/* ---- sequences by number: slot + 2^31 · (1 + how many were opened before) ---- */

static sequence *named(const rg_pages *p, rg_sequence number) {
  const int64_t slot = number & INT32_MAX;
  return p && number > 0 && slot < p->nslot && p->slot[slot].number == number ? &p->slot[slot]
                                                                              : NULL;
}

static rg_status need(const rg_pages *p, rg_sequence number, sequence **out, rg_error *e) {
  *out = named(p, number);
  if (*out) return RG_OK;
  if (!p) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the pages are NULL");
  return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%lld is no sequence that is open", (long long)number);
}

/* There is an empty slot. */
static sequence *begin(rg_pages *p) {
  const int32_t i = p->empty;
  sequence *s = &p->slot[i];
  p->empty = s->next;
  p->sequences++;
  s->number = (++p->opened << 31) + i;
  s->context = s->reserved = s->known = s->n = 0;
  return s;
}

/* ---- the calls ---- */

RGI_NO_TAIL(rg_pages_options, most);

rg_status rg_pages_create(rg_context *ctx, const rg_pages_options *options, rg_pages **out,
                          rg_error *e) {
  rg_pages_options o = {0};
  if (out) *out = NULL;
  if (!ctx || !options || !out)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_pages_create needs a context, options and a place for the pages");
  RGI_TRY(RGI_OPTIONS(rg_pages_options, most, options, &o, e));
  if (o.pages < 1 || o.pages > INT32_MAX || o.page < 1 || o.page > 1 << 20 || o.most < 0)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "%lld pages of %lld tokens, at most %lld a sequence; expected 1 to 2^31 - 1 "
                    "of 1 to 2^20, and no negative number",
                    (long long)o.pages, (long long)o.page, (long long)o.most);
  rg_pages *p = rgi_malloc(ctx, sizeof *p);
  if (!p) return rgi_nomem(e);
  *p = (rg_pages){.ctx = ctx,
                  .P = o.pages,
                  .size = o.page,
                  .most = o.most ? o.most : o.pages,
                  .prefixes = !o.no_prefixes,
                  .serials = ROOT,
                  .first = NO_PAGE,
                  .last = NO_PAGE,
                  .empty = -1};
  while (p->mask + 1 < (uint64_t)o.pages) p->mask = 2 * p->mask + 1;
  p->page = rgi_malloc(ctx, (size_t)p->P * sizeof *p->page);
  p->bucket = rgi_malloc(ctx, (size_t)(p->mask + 1) * sizeof *p->bucket);
  if (p->prefixes) p->tokens = rgi_malloc(ctx, (size_t)(p->P * p->size) * sizeof *p->tokens);
  if (!p->page || !p->bucket || (p->prefixes && !p->tokens)) {
    rg_pages_destroy(p);
    return rgi_nomem(e);
  }
  for (uint64_t i = 0; i <= p->mask; i++) p->bucket[i] = NO_PAGE;
  for (int64_t i = 0; i < p->P; i++) {
    p->page[i] = (page){0};
    link_page(p, (int32_t)i, false);
  }
  *out = p;
  return RG_OK;
}

void rg_pages_destroy(rg_pages *p) {
  if (!p) return;
  for (int64_t i = 0; i < p->nslot; i++) {
    rgi_free(p->ctx, p->slot[i].page);
    rgi_free(p->ctx, p->slot[i].serial);
  }
  rgi_free(p->ctx, p->slot);
  rgi_free(p->ctx, p->copy);
  rgi_free(p->ctx, p->page);
  rgi_free(p->ctx, p->tokens);
  rgi_free(p->ctx, p->bucket);
  rgi_free(p->ctx, p);
}

rg_status rg_pages_open(rg_pages *p, const int32_t *tokens, int64_t n, rg_sequence *out,
                        int64_t *known, rg_error *e) {
  if (out) *out = 0;
  if (known) *known = 0;
  if (!p || !out || !known || n < 0 || (n && !tokens))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_pages_open needs pages, n tokens, and places for the sequence and for how "
                    "many are known");
  RGI_TRY(empty_slot(p, e));
  int64_t most = n ? (n - 1) / p->size : 0;
  if (most > p->most) most = p->most;
  sequence *s = &p->slot[p->empty];
  uint64_t parent = ROOT;
  int64_t m = 0;
  for (; p->prefixes && m < most; m++) {
    const int32_t i = find(p, parent, tokens + m * p->size);
    if (i == NO_PAGE) break;
    RGI_TRY(room_for(p, s, m + 1, e)); /* nothing is held yet */
    s->page[m] = i;
    parent = s->serial[m] = p->page[i].serial;
  }
  begin(p);
  for (s->n = m, m = 0; m < s->n; m++) hold(p, s->page[m]);
  s->context = s->known = s->n * p->size;
  *out = s->number;
  *known = s->context;
  return RG_OK;
}

static int64_t pages_for(const rg_pages *p, int64_t tokens) {
  return (tokens + p->size - 1) / p->size;
}

rg_status rg_pages_fork(rg_pages *p, rg_sequence number, rg_sequence *out, rg_error *e) {
  sequence *from;
  if (out) *out = 0;
  if (!out) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "rg_pages_fork needs a place for the copy");
  RGI_TRY(need(p, number, &from, e));
  RGI_TRY(empty_slot(p, e));
  from = named(p, number); /* slots may have moved */
  const int64_t n = pages_for(p, from->context);
  RGI_TRY(room_for(p, &p->slot[p->empty], n, e));
  sequence *s = begin(p);
  from->reserved = 0;
  for (s->n = 0; s->n < n; s->n++) {
    s->page[s->n] = from->page[s->n];
    s->serial[s->n] = from->serial[s->n];
    hold(p, s->page[s->n]);
  }
  s->context = from->context;
  s->known = from->known;
  *out = s->number;
  return RG_OK;
}

/* The page that the next token is written to has others in it that somebody else reads. */
static bool must_copy(const rg_pages *p, const sequence *s) {
  return s->context % p->size && p->page[s->page[s->context / p->size]].refs > 1;
}

static void copy_page(rg_pages *p, sequence *s) {
  const int64_t m = s->context / p->size;
  const int32_t old = s->page[m], new = take(p);
  int32_t source = old;
  for (int64_t k = 0; k < p->ncopy; k++)
    if (p->copy[k][1] == old) source = p->copy[k][0];
  p->copy[p->ncopy][0] = source;
  p->copy[p->ncopy++][1] = new;
  p->page[source].pins++;
  if (p->prefixes)
    memcpy(tokens_of(p, new), tokens_of(p, old),
           (size_t)(s->context % p->size) * sizeof *p->tokens);
  s->page[m] = new;
  let_go(p, old);
}

rg_status rg_pages_reserve(rg_pages *p, rg_sequence number, int64_t n, rg_error *e) {
  sequence *s;
  RGI_TRY(need(p, number, &s, e));
  if (n < 0 || n > p->most * p->size - s->context)
    return rgi_fail(e, n < 0 ? RG_E_USAGE : RG_E_LIMIT, NULL, NULL,
                    "%lld tokens after %lld; expected 0 to %lld, for %lld pages of %lld",
                    (long long)n, (long long)s->context,
                    (long long)(p->most * p->size - s->context), (long long)p->most,
                    (long long)p->size);
  const bool copy = n && must_copy(p, s);
  const int64_t pages = pages_for(p, s->context + n),
                more = (pages > s->n ? pages - s->n : 0) + copy;
  if (more > p->waiting)
    return rgi_fail(e, RG_E_LIMIT, NULL, NULL,
                    "%lld more pages are needed, and of %lld %lld are to be had", (long long)more,
                    (long long)p->P, (long long)p->waiting);
  RGI_TRY(room_for(p, s, pages, e));
  if (copy && p->ncopy == p->copy_room) {
    void *list = p->copy;
    const int64_t room = p->copy_room ? 2 * p->copy_room : 8;
    RGI_TRY(grow(p, &list, p->ncopy, room, sizeof *p->copy, e));
    p->copy = list;
    p->copy_room = room;
  }
  if (copy) copy_page(p, s);
  if (n && s->context % p->size) forget(p, s->page[s->context / p->size]);
  while (s->n < pages) s->page[s->n++] = take(p);
  shrink(p, s, pages);
  s->reserved = n;
  return RG_OK;
}

rg_status rg_pages_commit(rg_pages *p, rg_sequence number, const int32_t *tokens, int64_t n,
                          rg_error *e) {
  sequence *s;
  RGI_TRY(need(p, number, &s, e));
  if (n < 0 || n > s->reserved)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "%lld tokens; expected 0 to %lld, which are reserved", (long long)n,
                    (long long)s->reserved);
  const bool told = p->prefixes && tokens && s->known == s->context;
  for (int64_t i = 0; i < n && told; i++) {
    const int64_t at = s->context + i, m = at / p->size;
    tokens_of(p, s->page[m])[at % p->size] = tokens[i];
    if ((at + 1) % p->size == 0) publish(p, s, m);
  }
  s->context += n;
  s->reserved -= n;
  if (told) s->known = s->context;
  return RG_OK;
}

rg_status rg_pages_truncate(rg_pages *p, rg_sequence number, int64_t context, rg_error *e) {
  sequence *s;
  RGI_TRY(need(p, number, &s, e));
  if (context < 0 || context > s->context)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%lld tokens; expected 0 to %lld, which are there",
                    (long long)context, (long long)s->context);
  s->context = context;
  s->reserved = 0;
  if (s->known > context) s->known = context;
  shrink(p, s, pages_for(p, context));
  return RG_OK;
}

rg_status rg_pages_close(rg_pages *p, rg_sequence number, rg_error *e) {
  sequence *s;
  RGI_TRY(need(p, number, &s, e));
  shrink(p, s, 0);
  s->number = 0;
  s->next = p->empty;
  p->empty = (int32_t)(s - p->slot);
  p->sequences--;
  return RG_OK;
}

rg_status rg_pages_table(const rg_pages *p, rg_sequence number, int32_t *row, int64_t most,
                         rg_error *e) {
  sequence *s;
  RGI_TRY(need(p, number, &s, e));
  if (!row || most < s->n)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "a row for %lld pages; expected %lld or more",
                    row ? (long long)most : 0, (long long)s->n);
  if (s->n) memcpy(row, s->page, (size_t)s->n * sizeof *row);
  memset(row + s->n, 0xff, (size_t)(most - s->n) * sizeof *row); /* NO_PAGE */
  return RG_OK;
}

int64_t rg_pages_context(const rg_pages *p, rg_sequence number) {
  const sequence *s = named(p, number);
  return s ? s->context : -1;
}

rg_status rg_pages_copies(rg_pages *p, int32_t (*pairs)[2], int64_t most, int64_t *n, rg_error *e) {
  if (n) *n = 0;
  if (!p || !n || most < 0 || (most && !pairs))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_pages_copies needs pages, room for pairs and a place for their number");
  if (p->ncopy > most)
    return rgi_fail(e, RG_E_LIMIT, NULL, NULL, "%lld copies are due, and there is room for %lld",
                    (long long)p->ncopy, (long long)most);
  *n = p->ncopy;
  for (int64_t k = 0; k < most; k++)
    for (int i = 0; i < 2; i++) pairs[k][i] = k < *n ? p->copy[k][i] : NO_PAGE;
  while (p->ncopy) drop_copy(p, p->ncopy - 1);
  return RG_OK;
}

rg_status rg_pages_count(const rg_pages *p, rg_pages_info *out) {
  if (!p || !out) return RG_E_USAGE;
  *out = (rg_pages_info){.used = p->P - p->waiting,
                         .kept = p->kept,
                         .free = p->waiting - p->kept,
                         .shared = p->shared,
                         .sequences = p->sequences};
  return RG_OK;
}
