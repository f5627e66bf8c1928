/* regraph/build.h: specs by calls, a part of regraph.h, which includes it. */
#ifndef REGRAPH_BUILD_H
#define REGRAPH_BUILD_H

#include "regraph.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A spec without JSON text: calls that say what the document would (docs/spec.md).
 *
 *   const rg_item attrs[] = {rg_word("window_left", "$window")};
 *   rg_builder_create(ctx, "window", &b, &err);
 *   rg_build_param(b, rg_int("window", 511));
 *   rg_build_input(b, "q", "T,H,64", "bf16", RG_GRAD_PLAIN);          // ... k, v
 *   rg_build_input(b, "cu_seqlens", "B+1", "i32", RG_GRAD_NONE);
 *   rg_build_node(b, "attend", "swa_attn", "q k v cu_seqlens", "o=y", attrs, 1);
 *   rg_build_output(b, "o", "y");
 *   rg_build_spec(b, NULL, 0, &spec, &err);
 *   rg_builder_destroy(b);
 *
 * The calls need no checking: the first error stays with the builder, rg_build_spec reports it,
 * with the place in the document as if it had been a file ("window:/nodes/0/in/k: …"), and calls
 * after it add nothing. Each returns the builder's status so far. A builder belongs to one thread
 * at a time. */
typedef struct rg_builder rg_builder;

/* A parameter or an attribute: a name and a value, which the functions below fill in. */
typedef enum rg_item_kind {
  RG_ITEM_INT,
  RG_ITEM_REAL,
  RG_ITEM_BOOL,
  RG_ITEM_WORD,
  RG_ITEM_LIST
} rg_item_kind;
typedef struct rg_item {
  const char *name;
  rg_item_kind kind;
  int64_t i;        /* RG_ITEM_INT, RG_ITEM_BOOL */
  double f;         /* RG_ITEM_REAL */
  const char *text; /* RG_ITEM_WORD, RG_ITEM_LIST */
} rg_item;

static inline rg_item rg_item_of(const char *name, rg_item_kind kind, int64_t i, double f,
                                 const char *text) {
  rg_item item = {name, kind, i, f, text};
  return item;
}
static inline rg_item rg_int(const char *name, int64_t value) {
  return rg_item_of(name, RG_ITEM_INT, value, 0, NULL);
}
static inline rg_item rg_real(const char *name, double value) {
  return rg_item_of(name, RG_ITEM_REAL, 0, value, NULL);
}
static inline rg_item rg_bool(const char *name, bool value) {
  return rg_item_of(name, RG_ITEM_BOOL, value, 0, NULL);
}
/* A choice ("softmax"), "$name" for a parameter's value, or an expression over parameters
 * ("H*D"). */
static inline rg_item rg_word(const char *name, const char *value) {
  return rg_item_of(name, RG_ITEM_WORD, 0, 0, value);
}
/* Integers and expressions, as in a shape: "0,H,D". */
static inline rg_item rg_list(const char *name, const char *values) {
  return rg_item_of(name, RG_ITEM_LIST, 0, 0, values);
}

typedef enum rg_grad { RG_GRAD_NONE, RG_GRAD_PLAIN, RG_GRAD_ACCUMULATE } rg_grad;

/* `name` (NULL: none) is the spec's, and stands for the file in messages. Borrows ctx until the
 * builder is destroyed, name during the call, as all calls below do with their texts and arrays. */
RG_API rg_status rg_builder_create(rg_context *ctx, const char *name, rg_builder **out,
                                   rg_error *error);
RG_API void rg_builder_destroy(rg_builder *builder);
RG_API rg_status rg_build_param(rg_builder *builder, rg_item value);
/* `shape` lists extents, "T,H,D" or "B+1"; "" is a scalar's. `dtype` is a name or "$name". */
RG_API rg_status rg_build_input(rg_builder *builder, const char *name, const char *shape,
                                const char *dtype, rg_grad grad);
/* `next` is the tensor that is its new version. */
RG_API rg_status rg_build_state(rg_builder *builder, const char *name, const char *shape,
                                const char *dtype, const char *next);
/* `in` and `out` list ports between blanks: "q=x" connects port q to tensor x, "q" is short for
 * "q=q", and "o=a+b" gives a list port two tensors. NULL or "": none, as where all outputs keep
 * their names NODE.PORT. */
RG_API rg_status rg_build_node(rg_builder *builder, const char *name, const char *op,
                               const char *in, const char *out, const rg_item *attrs, size_t nattr);
/* `tensor` NULL: the one of that name. */
RG_API rg_status rg_build_output(rg_builder *builder, const char *name, const char *tensor);
/* Checks the document and makes a spec, which borrows nothing from the builder: that may go on, or
 * go. */
RG_API rg_status rg_build_spec(const rg_builder *builder, const rg_binding *set, size_t nset,
                               rg_spec **out, rg_error *error);

#ifdef __cplusplus
}
#endif
#endif
