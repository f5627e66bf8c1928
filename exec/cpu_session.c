/* exec/cpu_session.c: runs a session's steps on this machine's cores: a thread pool, and the
 * contents of bound lengths checked before each forward. */
#include "pool.h"
#include "session.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void *malloc_256(void *user, size_t size) {
  (void)user;
  void *p = NULL;
  return posix_memalign(&p, RGI_ALIGN, size) ? NULL : p;
}
static void free_256(void *user, void *ptr) {
  (void)user;
  free(ptr);
}

static rgi_pool *pool_of(rg_session *s) {
  return s->device;
}
static rg_status create(rg_session *s, const rg_session_options *o, rg_error *e) {
  (void)o;
  rgi_pool *pool = NULL;
  RGI_TRY(rgi_pool_create(s->plan->ctx, s->plan->threads, &pool, e));
  s->device = pool;
  return RG_OK;
}
static void destroy(rg_session *s) {
  rgi_pool_destroy(pool_of(s));
}

static rg_status fill(rg_session *s, void *data, int byte, int64_t size, rg_error *e) {
  (void)s, (void)e;
  memset(data, byte, (size_t)size);
  return RG_OK;
}
static rg_status poison(rg_session *s, void *data, int64_t size, rg_error *e) {
  static const uint16_t pattern = RGI_POISON;
  char *p = data;
  (void)s, (void)e;
  if (size == 0) return RG_OK;
  memcpy(p, &pattern, size < 2 ? 1 : 2);
  for (int64_t n = 2, more; n < size; n += more) { /* what stands there already, behind itself */
    more = n < 4096 ? n : 4096;
    if (more > size - n) more = size - n;
    memcpy(p + n, p, (size_t)more);
  }
  return RG_OK;
}
static rg_status read_memory(rg_session *s, void *host, const void *device, size_t size,
                             rg_error *e) {
  (void)s, (void)e;
  memcpy(host, device, size);
  return RG_OK;
}

static rg_status alive(const rg_session *s, rg_error *e) {
  (void)s, (void)e;
  return RG_OK;
}

/* ---- contents that the host can check before a run ---- */

static int32_t entry(const rg_session *s, const rgi_check *c, int64_t i) {
  const int32_t *data =
      (const int32_t *)(const void *)((const char *)s->bound[c->bind] + c->offset);
  return data[i * c->stride];
}

static rg_status bad_entry(const rg_session *s, const rgi_check *c, int64_t i, rg_error *e,
                           const char *format, ...) __attribute__((format(printf, 5, 6)));
static rg_status bad_entry(const rg_session *s, const rgi_check *c, int64_t i, rg_error *e,
                           const char *format, ...) {
  char expected[256];
  va_list args;
  va_start(args, format);
  vsnprintf(expected, sizeof expected, format, args);
  va_end(args);
  return rgi_fail(e, RG_E_DATA, NULL, NULL, "%s[%lld] is %d; expected %s",
                  s->plan->bindable[c->bind].info.name, (long long)i, entry(s, c, i), expected);
}

static rg_status check_contents(rg_session *s, rg_error *e) {
  for (int32_t k = 0; k < s->plan->ncheck; k++) {
    const rgi_check *c = &s->plan->check[k];
    if (c->n == 0) continue;
    if (c->starts) {
      if (entry(s, c, 0) != 0) return bad_entry(s, c, 0, e, "0, where the first sequence starts");
      for (int64_t i = 1; i < c->n; i++)
        if (entry(s, c, i) < entry(s, c, i - 1))
          return bad_entry(s, c, i, e, "at least %d, the entry before it", entry(s, c, i - 1));
      if (entry(s, c, c->n - 1) > c->capacity)
        return bad_entry(s, c, c->n - 1, e, "at most %lld, the rows there are",
                         (long long)c->capacity);
      continue;
    }
    const rgi_check *starts = c->lengths >= 0 ? &s->plan->check[c->lengths] : NULL;
    for (int64_t i = 0; i < c->n; i++) {
      int64_t length =
          starts && i + 1 < starts->n ? (int64_t)entry(s, starts, i + 1) - entry(s, starts, i) : 0;
      if (entry(s, c, i) < 0) return bad_entry(s, c, i, e, "0 or more");
      if (entry(s, c, i) + length > INT32_MAX)
        return bad_entry(s, c, i, e, "at most %lld, so that positions fit 32 bits",
                         (long long)(INT32_MAX - length));
    }
  }
  return RG_OK;
}

static double now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static rg_status run_step(rg_session *s, int32_t i, rg_error *e) {
  const rgi_node *node = &s->plan->graph->node[s->plan->step[i].node];
  rg_call call = rgi_session_call(s, i, e);
  call.parallel = rgi_pool_run;
  call.pool = pool_of(s);
  double start = now_ms();
  rg_status status = node->op->run_cpu(&call);
  s->ms[i] = now_ms() - start;
  if (status != RG_OK)
    return rgi_fail(e, status, NULL, node->name, "op \"%s\" failed", node->op->name);
  return s->poison ? rgi_session_after_step(s, i, e) : RG_OK;
}

static rg_status run(rg_session *s, bool backward, rg_error *e) {
  for (int32_t i = 0; i < s->plan->nclean && !backward; i++) {
    /* contents that check_contents found to obey the rules */
    const rgi_clean *c = &s->plan->clean[i];
    if (c->n)
      memcpy(s->current->data + c->offset, s->current->at[c->bind], (size_t)c->n * sizeof(int32_t));
  }
  int32_t from = backward ? s->plan->nforward : 0,
          to = backward ? s->plan->nstep : s->plan->nforward;
  for (int32_t i = from; i < to; i++) RGI_TRY(run_step(s, i, e));
  return RG_OK;
}

static rg_status set_stream(rg_session *s, void *stream, rg_error *e) {
  (void)s;
  if (!stream) return RG_OK;
  return rgi_fail(e, RG_E_USAGE, NULL, NULL, "a CPU session has no stream; expected NULL");
}
static rg_status synchronize(rg_session *s, rg_error *e) {
  (void)s, (void)e;
  return RG_OK;
}
static rg_status no_memory(const rg_session *s, int64_t bytes, rg_error *e) {
  (void)s;
  return rgi_fail(e, RG_E_NOMEM, NULL, NULL, "the arena's allocator refused %lld bytes",
                  (long long)bytes);
}
static rg_status copy(void *dst, const void *src, size_t bytes, bool to_host, rg_error *e) {
  (void)to_host, (void)e;
  memcpy(dst, src, bytes);
  return RG_OK;
}

const rgi_backend rgi_cpu_backend = {
    .memory = {malloc_256, free_256, NULL},
    .host = {malloc_256, free_256, NULL},
    .create = create,
    .destroy = destroy,
    .alive = alive,
    .check = check_contents,
    .run = run,
    .fill = fill,
    .poison = poison,
    .read = read_memory,
    .set_stream = set_stream,
    .synchronize = synchronize,
    .no_memory = no_memory,
    .on_host = true,
    .copy = copy,
};
