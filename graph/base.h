/* graph/base.h: what every other file of ours stands on: the context, errors, host memory, text
   buffers.

   Leaves to others: anything about graphs. Thread rules: an arena or buffer belongs to one thread
   at a time; the context is read-only once plugins are loaded.
 */
#ifndef RGI_BASE_H
#define RGI_BASE_H

#include <pthread.h>
#include <regraph/op.h>
#include <regraph/names.h>
#include <regraph/regraph.h>
#include <stdarg.h>

#define RGI_COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

/* Evaluate, pass a failure on. */
#define RGI_TRY(expr)                       \
  do {                                      \
    rg_status rgi_try_ = (expr);            \
    if (rgi_try_ != RG_OK) return rgi_try_; \
  } while (0)
/* Evaluate into `status`, jump to the cleanup label on failure. */
#define RGI_GOTO(status, expr, label)             \
  do {                                            \
    if (((status) = (expr)) != RG_OK) goto label; \
  } while (0)

/* Records an error (first wins; e may be NULL) and returns `status`. pointer and node may be
 * NULL. */
rg_status rgi_fail(rg_error *e, rg_status status, const char *pointer, const char *node,
                   const char *format, ...) __attribute__((format(printf, 5, 6)));
rg_status rgi_nomem(rg_error *e);

/* ---- options: structs that open with their size and grow at their end (the rule: regraph.h) */

/* *own becomes what *given (NULL: nothing) sets, everything else 0, its size `now`. `first` is what
 * size 0 stands for: the bytes up to the last member that 0.1.0 had. RG_E_USAGE if the size makes
 * no sense, or if something is set past `now`. `what` names the struct. */
rg_status rgi_options(const void *given, void *own, size_t first, size_t now, const char *what,
                      rg_error *e);
/* The same with the last member of 0.1.0 named. Nothing may hide in padding at a struct's end,
 * where an older caller leaves what happens to be there: hence the assertion, which names the last
 * member of today. */
#define RGI_OPTIONS(type, last, given, own, e) \
  rgi_options(given, own, RGI_UP_TO(type, last), sizeof(type), #type, e)
#define RGI_UP_TO(type, last) (offsetof(type, last) + sizeof(((type *)0)->last))
#define RGI_NO_TAIL(type, last) \
  _Static_assert(RGI_UP_TO(type, last) == sizeof(type), #type " has padding at its end")

/* Bytes of the character at p, if one of well-formed UTF-8 stands there; else 0, as at the end of a
 * text. */
size_t rgi_utf8(const unsigned char *p);

/* ---- context ---- */

struct rg_context {
  rg_allocator host;
  const rg_op **op; /* sorted by name: stock ops, then those of plugins merged in */
  int nop;
  int isa; /* CPU level, see rg_call.isa */
  struct rgi_plugin_handle *plugins;
};

/* NULL if there is none. */
const rg_op *rgi_find_op(const rg_context *ctx, const char *name);

/* Plain host memory from the context's allocator. rgi_malloc returns NULL on failure. */
void *rgi_malloc(const rg_context *ctx, size_t size);
void rgi_free(const rg_context *ctx, void *ptr);
/* Is that malloc, which any thread may call, and not the caller's? */
bool rgi_plain_malloc(const rg_context *ctx);

/* pthread_create for a thread of the library's own: it takes no signals, which are the caller's. */
int rgi_thread_start(pthread_t *thread, void *(*run)(void *), void *arg);

/* Text from a file made fit for a message: at most 64 bytes. Returns s->text. */
typedef struct rgi_shown {
  char text[112];
} rgi_shown;
const char *rgi_show(rgi_shown *s, const char *text);

/* ---- arena: many small things with one lifetime ---- */

typedef struct rgi_arena rgi_arena;
rgi_arena *rgi_arena_create(const rg_context *ctx); /* NULL on failure; borrows ctx */
void rgi_arena_destroy(rgi_arena *a);               /* NULL is fine */
/* zeroed, 16-byte aligned; NULL on failure */
void *rgi_alloc(rgi_arena *a, size_t size);
void *rgi_alloc_n(rgi_arena *a, size_t n, size_t size); /* the same, overflow-checked */
char *rgi_strdup(rgi_arena *a, const char *s);
char *rgi_format(rgi_arena *a, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- text buffer: printf into growing memory; a failed allocation sticks until rgi_buf_finish */

typedef struct rgi_buf {
  const rg_context *ctx;
  char *data;
  size_t size, capacity;
  bool failed;
} rgi_buf;
void rgi_buf_init(rgi_buf *b, const rg_context *ctx);
void rgi_buf_printf(rgi_buf *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
void rgi_buf_add(rgi_buf *b, const char *text, size_t n);
void rgi_buf_json(rgi_buf *b, const char *text); /* quoted and escaped */
void rgi_buf_xml(rgi_buf *b, const char *text);  /* escaped, control characters left out */
void rgi_buf_free(rgi_buf *b);
/* Folding (fold.c). Have names one pattern (rg_name_pattern)? That of a name. Lines that are alike
 * but for numbers in their first name, below one title, as one: "layer*_norm …  each of 12". */
bool rgi_alike(const char *a, const char *b);
void rgi_buf_pattern(rgi_buf *b, const char *name);
void rgi_fold_lines(rgi_buf *b);
/* Moves the text into *out, or frees it and fails. */
rg_status rgi_buf_finish(rgi_buf *b, rg_text *out, rg_error *e);

/* An integer, perhaps with K, M, G or T behind it, powers of 1024: "64K" is 65536. False for
 * anything else, and past 64 bits. */
bool rgi_parse_count(const char *text, int64_t *out);

/* FNV-1a over bytes; begin with RGI_HASH. */
#define RGI_HASH UINT64_C(0xcbf29ce484222325)
uint64_t rgi_hash(uint64_t hash, const void *data, size_t size);
uint64_t rgi_hash_text(uint64_t hash, const char *text);

/* Overflow-checked; false on overflow. */
static inline bool rgi_mul(int64_t a, int64_t b, int64_t *r) {
  return !__builtin_mul_overflow(a, b, r);
}
static inline bool rgi_add(int64_t a, int64_t b, int64_t *r) {
  return !__builtin_add_overflow(a, b, r);
}

#endif
