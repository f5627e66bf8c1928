/* graph/json.h: JSON in, an immutable tree in an arena out.

   The only door to jansson. A tree has no reference counts and no hidden state, so many threads may
   read one at once. Promises: at most RGI_FILE_LIMIT bytes and RGI_DEPTH_LIMIT levels, valid UTF-8,
   no NUL, no duplicate keys, integers within int64; keys and elements stand in the file's order.
   Leaves to others: what the values mean; the place of an error (place.c).
 */
#ifndef RGI_JSON_H
#define RGI_JSON_H

#include "base.h"

#define RGI_FILE_LIMIT  (16 << 20)
#define RGI_DEPTH_LIMIT 64

typedef enum rgi_json_type {
  RGI_JSON_NULL,
  RGI_JSON_BOOL,
  RGI_JSON_INT,
  RGI_JSON_REAL,
  RGI_JSON_STRING,
  RGI_JSON_ARRAY,
  RGI_JSON_OBJECT
} rgi_json_type;

typedef struct rgi_json {
  rgi_json_type type;
  int32_t n; /* children */
  union {
    int64_t i; /* INT, BOOL */
    double f;  /* REAL */
    const char *text;
    const struct rgi_json *item; /* n of them */
  };
  const char *const *key; /* OBJECT: n of them */
} rgi_json;

/* Reads a whole file (borrows path); free *data with rgi_free. RG_E_IO, RG_E_LIMIT, RG_E_NOMEM. */
rg_status rgi_read_file(const rg_context *ctx, const char *path, char **data, size_t *size,
                        rg_error *e);
/* Parses `size` bytes; the tree lives in `a` and borrows nothing from `text`. */
rg_status rgi_json_parse(rgi_arena *a, const char *text, size_t size, const rgi_json **out,
                         rg_error *e);

/* A deep copy in `a` (document.c). */
rg_status rgi_json_copy(rgi_arena *a, const rgi_json *from, const rgi_json **out, rg_error *e);
/* Writes it as JSON that parses to the same tree, with a newline at the end (document.c). */
void rgi_json_write(const rgi_json *v, rgi_buf *b);

/* " (nearest: 'x')", or "" if nothing is near; returns s->text. */
const char *rgi_near(rgi_shown *s, const char *word, const char *const *candidates, int n);
/* The same, or all candidates if none is near and they are few; returns s->text. */
const char *rgi_hint(rgi_shown *s, const char *word, const char *const *candidates, int n);
/* "the integer 7", "the string 'x'", "an array" and so on; returns s->text. */
const char *rgi_json_kind(rgi_shown *s, const rgi_json *v);

/* Member of an object, or NULL. Linear: for objects whose keys have been checked, hence few. */
const rgi_json *rgi_json_get(const rgi_json *object, const char *key);
/* RG_E_TYPE unless `v` has the type. */
rg_status rgi_json_expect(const rgi_json *v, rgi_json_type type, const char *pointer,
                          const char *node, rg_error *e);
/* Every key of `object` is among `known`, and the first `nrequired` of these are
 * there. `what` names the object. */
rg_status rgi_json_keys(const rgi_json *object, const char *what, const char *const *known,
                        int nknown, int nrequired, const char *pointer, const char *node,
                        rg_error *e);

/* Every document says in a key of its own what it is: "regraph" a spec, "regraph_policy",
 * "regraph_profile". RG_E_KEY if it is another than `key` says. */
rg_status rgi_json_is(const rgi_json *root, const char *key, rg_error *e);

/* A number of bytes: an integer, or a string that rg_parse_size takes. */
rg_status rgi_json_bytes(const rgi_json *v, const char *pointer, int64_t *out, rg_error *e);

/* JSON pointers, one step at a time; cut off when longer than an rg_error can hold. Each returns
 * p->text. */
typedef struct rgi_pointer {
  char text[256];
} rgi_pointer;
const char *rgi_pointer_key(rgi_pointer *p, const char *parent, const char *key);
/* `parent` may be p's own text. */
const char *rgi_pointer_index(rgi_pointer *p, const char *parent, int i);

const char *rgi_pointer_set(rgi_pointer *p, const char *text);

/* [A-Za-z_][A-Za-z0-9_]{0,63} */
bool rgi_is_identifier(const char *text);
/* RG_E_NAME unless it is one; `what` says what is named. */
rg_status rgi_check_identifier(const char *text, const char *what, const char *pointer,
                               rg_error *e);

/* Names `file` in an error that this call made: `before` is what the error's
 * status was when the call began (place.c). */
void rgi_error_file(rg_error *e, rg_status before, const char *file);

/* Where a document comes from. */
typedef struct rgi_source {
  const char *name; /* the file's, or what stands for it */
  const char *text; /* as it was parsed; NULL if calls made the document */
  size_t size;
} rgi_source;
/* A copy in `a`; false on NOMEM (place.c). */
bool rgi_source_copy(rgi_arena *a, const rgi_source *from, rgi_source *out);
/* As rgi_error_file, and gives line and column of what the error points to (place.c). */
void rgi_error_place(rg_error *e, rg_status before, const rgi_source *s);
/* Line and column, from 1 and in characters, of byte `at` (place.c). */
void rgi_text_place(const char *text, size_t at, int *line, int *column);
static inline rg_status rgi_error_before(const rg_error *e) {
  return e ? e->status : RG_OK;
}

/* ---- several errors at once (place.c) ----
 *
 * A collecting call keeps what rgi_fail puts into its rg_error, makes that one free again, and goes
 * on with what does not depend on it. A status without an error stands for one that was kept
 * already, or that only follows from one. */

typedef struct rgi_errors {
  rg_error *item; /* room for `most` */
  size_t most, n;
} rgi_errors;
/* May the caller go on after `status`? Not if all is NULL, if nothing more fits, or after what no
 * document is to blame for. Keeps *e, but one error a place. */
bool rgi_keep(rgi_errors *all, rg_status status, rg_error *e);
/* The end of a call that collected: *e, if it holds one, is the last; *n how many there are. */
rg_status rgi_kept(rgi_errors *all, rg_status status, const rg_error *e, size_t *n);
/* Evaluate; a failure is kept and noted in `wrong`, or passed on. */
#define RGI_KEEP(all, wrong, expr, e)                     \
  do {                                                    \
    rg_status rgi_kept_ = (expr);                         \
    if (rgi_kept_ != RG_OK) {                             \
      if (!rgi_keep(all, rgi_kept_, e)) return rgi_kept_; \
      (wrong) = rgi_kept_;                                \
    }                                                     \
  } while (0)

/* ---- a table from names to small integers, in an arena; size is fixed at creation ---- */

typedef struct rgi_names {
  const char **key;
  int32_t *value;
  uint32_t mask;
} rgi_names;
/* Room for n names; false on NOMEM. */
bool rgi_names_init(rgi_names *m, rgi_arena *a, size_t n);
/* Adds a name (borrowed). Returns -1, or, if it is there already, the value it has. */
int32_t rgi_names_add(rgi_names *m, const char *key, int32_t value);
/* -1 if it is not there. */
int32_t rgi_names_get(const rgi_names *m, const char *key);

#endif
