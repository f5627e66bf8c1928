/* recompute/beside.c: looks for better choices while a proof is at work, on a second core.

   From what the proof's program would choose, or from the best that is known with a few candidates
   of it kept: that is mended (mend.c), and what comes of it is for memplan. Where memplan refuses,
   it is mended once more, with so much less room as was lacking.

   Both sides count their work, and meet whenever each has done so much more: then both go on from
   the better choice of the two, and what the proof has offered meanwhile is taken in. So whatever
   is found is found at the same meeting, on one core or two, however busy they are: alone, the work
   of between two meetings is done at the later one.
 */
#include "search.h"
#include <pthread.h>
#include <stdatomic.h>

static const int64_t BETWEEN = 40000000; /* meetings: work, in steps of some 10 ns */
enum {
  OFFERS = 16,        /* that are known, the last ones */
  KNOWN_REFUSED = 64, /* … of choices */
  KEEPS = 4,          /* candidates of the best that are kept, at most; flips of an offer */
  MOST_REFUSALS = 4,  /* of a choice that gets less room each time */
  PART = 5            /* of the packer's work, for a choice */
};

typedef struct ring {
  uint64_t *set[KNOWN_REFUSED];
  int next, n, size;
} ring;

struct rgi_beside {
  const rg_context *ctx;
  rgi_chooser c; /* its own, of a model of its own */
  rgi_mender mend;
  uint64_t *trial;
  ring offered, refused; /* offered: what it looks from */
  int refusals;          /* of what comes of one choice, in a row */
  int64_t room;          /* for it */
  int64_t left;          /* work until the next meeting */
  rg_status status;      /* of all that was done, and why */
  rg_error e;
  /* the proof's side */
  ring inbox;
  int64_t met; /* its work at the last meeting */
  bool begun;
  /* the thread */
  bool threaded, ask, done, end; /* by the mutex */
  atomic_bool leave;             /* nobody wants what is at work any more */
  pthread_t thread;
  pthread_mutex_t mutex;
  pthread_cond_t wake;
};

static rg_status new_ring(rgi_beside *b, ring *r, int size, rg_error *e) {
  *r = (ring){.size = size};
  for (int i = 0; i < size; i++)
    if (!(r->set[i] = rgi_model_set(b->c.m))) return rgi_nomem(e);
  return RG_OK;
}

static void put(const rgi_beside *b, ring *r, const uint64_t *set) {
  memcpy(r->set[r->next], set, (size_t)b->c.m->words * sizeof *set);
  r->next = (r->next + 1) % r->size;
  if (r->n < r->size) r->n++;
}

static bool has(const rgi_beside *b, const ring *r, const uint64_t *set) {
  for (int i = 0; i < r->n; i++)
    if (rgi_model_same(b->c.m, r->set[i], set)) return true;
  return false;
}

/* ---- what is done between two meetings ---- */

/* The best with a few candidates kept, near each other or far apart. */
static void keep_some(rgi_beside *b) {
  const int n = b->c.nfree, count = 1 + rgi_draw(&b->mend.random, KEEPS),
            reach = rgi_draw(&b->mend.random, 2) || n < 16 ? n : 16;
  int at = rgi_draw(&b->mend.random, n);
  memcpy(b->trial, b->c.best, (size_t)b->c.m->words * sizeof *b->trial);
  for (int k = 0; k < count; k++) {
    for (int i = 0; i < n && !rgi_has(b->trial, b->c.free[at]); i++) at = (at + 1) % n;
    rgi_drop(b->trial, b->c.free[at]);
    at = (at + 1 + rgi_draw(&b->mend.random, reach)) % n;
  }
}

static void vary_offer(rgi_beside *b) {
  const ring *r = &b->offered;
  const uint64_t *set = r->set[rgi_draw(&b->mend.random, r->n)];
  memcpy(b->trial, set, (size_t)b->c.m->words * sizeof *set);
  for (int k = rgi_draw(&b->mend.random, KEEPS + 1); k > 0; k--) {
    const int i = b->c.free[rgi_draw(&b->mend.random, b->c.nfree)];
    if (rgi_has(b->trial, i))
      rgi_drop(b->trial, i);
    else
      rgi_put(b->trial, i);
  }
}

/* What memplan refused gets so much less room as was lacking, each time further, a few times. */
static void refused(rgi_beside *b, int64_t figure, int64_t over) {
  if (!has(b, &b->refused, b->trial)) put(b, &b->refused, b->trial);
  b->room = figure - (over << b->refusals++);
  if (b->refusals > MOST_REFUSALS) b->refusals = 0;
}

/* One choice more, or the last one mended further. */
static rg_status look_further(rgi_beside *b, rg_error *e) {
  rgi_chooser *c = &b->c;
  const int64_t before = b->mend.work, spent = c->m->spent;
  int64_t over = RGI_ALIGN;
  if (b->refusals == 0) {
    b->room = c->budget;
    if (b->offered.n == 0 || rgi_draw(&b->mend.random, 2))
      keep_some(b);
    else
      vary_offer(b);
  }
  b->mend.room = b->room;
  b->mend.best = c->best_ms * (1 - 1e-9);
  if (rgi_mend(&b->mend, b->trial)) {
    const rgi_taken x = rgi_replay_run(c->m->replay, b->trial, b->mend.used);
    if (!has(b, &b->refused, b->trial)) RGI_TRY(rgi_chooser_ask(c, b->trial, PART, &over, e));
    if (over > 0) {
      refused(b, rgi_figure(c, x), over);
    } else {
      memcpy(c->best, b->trial, (size_t)c->m->words * sizeof *c->best);
      c->best_ms = rgi_model_ms(c->m, b->mend.used) + x.wait_ms;
      b->refusals = 0;
    }
  } else {
    b->refusals = 0;
  }
  b->left -= b->mend.work - before + c->m->spent - spent;
  return RG_OK;
}

static void work(rgi_beside *b) {
  while (b->left > 0 && b->status == RG_OK && !atomic_load(&b->leave))
    b->status = look_further(b, &b->e);
}

static void *run(void *arg) {
  rgi_beside *b = arg;
  pthread_mutex_lock(&b->mutex);
  for (;;) {
    while (!b->ask && !b->end) pthread_cond_wait(&b->wake, &b->mutex);
    if (b->end) break;
    b->ask = false;
    pthread_mutex_unlock(&b->mutex);
    work(b);
    pthread_mutex_lock(&b->mutex);
    b->done = true;
    pthread_cond_broadcast(&b->wake);
  }
  pthread_mutex_unlock(&b->mutex);
  return NULL;
}

/* ---- the proof's side ---- */

rg_status rgi_beside_open(const rgi_chooser *c, rgi_beside **out, rg_error *e) {
  const rgi_model *m = c->m;
  *out = NULL;
  if (c->nfree == 0) return RG_OK;
  rgi_beside *b = *out = rgi_malloc(m->g->ctx, sizeof *b);
  if (!b) return rgi_nomem(e);
  memset(b, 0, sizeof *b);
  b->ctx = m->g->ctx;
  b->c = *c;
  b->c.progress = (rgi_progress){0};
  b->c.m = NULL;
  b->c.beside = NULL;
  rg_status status = rgi_model_create(m->g, m->profile, &m->mem, &b->c.m, e);
  if (status == RG_OK) status = new_ring(b, &b->offered, OFFERS, e);
  if (status == RG_OK) status = new_ring(b, &b->inbox, OFFERS, e);
  if (status == RG_OK) status = new_ring(b, &b->refused, KNOWN_REFUSED, e);
  if (status == RG_OK) {
    b->mend = (rgi_mender){.c = &b->c, .m = b->c.m, .random = 1, .used = rgi_model_set(b->c.m)};
    b->c.best = rgi_model_set(b->c.m);
    b->trial = rgi_model_set(b->c.m);
    if (!b->mend.used || !b->c.best || !b->trial) status = rgi_nomem(e);
  }
  if (status != RG_OK) {
    rgi_beside_close(b);
    *out = NULL;
    return status;
  }
  memcpy(b->c.best, c->best, (size_t)m->words * sizeof *c->best);
  if (m->mem.alone || !rgi_plain_malloc(b->ctx)) return RG_OK;
  pthread_mutex_init(&b->mutex, NULL); /* default attributes: these two cannot fail on Linux */
  pthread_cond_init(&b->wake, NULL);
  b->threaded = rgi_thread_start(&b->thread, run, b) == 0; /* else as if alone */
  if (!b->threaded) {
    pthread_cond_destroy(&b->wake);
    pthread_mutex_destroy(&b->mutex);
  }
  return RG_OK;
}

void rgi_beside_close(rgi_beside *b) {
  if (!b) return;
  if (b->threaded) {
    atomic_store(&b->leave, true);
    pthread_mutex_lock(&b->mutex);
    b->end = true;
    pthread_cond_broadcast(&b->wake);
    pthread_mutex_unlock(&b->mutex);
    pthread_join(b->thread, NULL);
    pthread_cond_destroy(&b->wake);
    pthread_mutex_destroy(&b->mutex);
  }
  rgi_model_destroy(b->c.m);
  rgi_free(b->ctx, b);
}

void rgi_beside_offer(rgi_beside *b, const uint64_t *set) {
  put(b, &b->inbox, set);
}

/* What was begun at the last meeting is done. */
static rg_status finish(rgi_beside *b, rgi_chooser *c, rg_error *e) {
  if (!b->threaded) {
    work(b);
  } else {
    pthread_mutex_lock(&b->mutex);
    while (!b->done) pthread_cond_wait(&b->wake, &b->mutex);
    pthread_mutex_unlock(&b->mutex);
  }
  c->explored += b->c.explored;
  b->c.explored = 0;
  if (b->status != RG_OK) {
    if (e) *e = b->e;
    return b->status;
  }
  if (b->c.best_ms >= c->best_ms) return RG_OK;
  c->best_ms = b->c.best_ms;
  memcpy(c->best, b->c.best, (size_t)c->m->words * sizeof *c->best);
  return RG_OK;
}

static void begin(rgi_beside *b, const rgi_chooser *c) {
  if (c->best_ms < b->c.best_ms) {
    b->c.best_ms = c->best_ms;
    memcpy(b->c.best, c->best, (size_t)c->m->words * sizeof *c->best);
  }
  for (int i = 0; i < b->inbox.n; i++) put(b, &b->offered, b->inbox.set[i]);
  b->inbox.n = b->inbox.next = 0;
  b->left += BETWEEN;
  b->begun = true;
  if (!b->threaded) return;
  pthread_mutex_lock(&b->mutex);
  b->ask = true;
  b->done = false;
  pthread_cond_broadcast(&b->wake);
  pthread_mutex_unlock(&b->mutex);
}

rg_status rgi_beside_meet(rgi_beside *b, rgi_chooser *c, int64_t work_done, bool last,
                          rg_error *e) {
  if (b->begun && !last && work_done - b->met < BETWEEN) return RG_OK;
  if (b->begun) RGI_TRY(finish(b, c, e));
  b->begun = false;
  b->met = work_done;
  if (!last) begin(b, c);
  return RG_OK;
}
