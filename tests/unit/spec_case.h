/* tests/unit/spec_case.h: specs that load, for test_spec*.c. */
#ifndef SPEC_CASE_H
#define SPEC_CASE_H

#include "graph/spec.h"
#include <criterion/criterion.h>
#include <string.h>

#ifndef RG_SOURCE_DIR
#define RG_SOURCE_DIR "."
#endif
#define NSA RG_SOURCE_DIR "/examples/nsa.json"

static inline rg_context *context(void) {
  rg_context *ctx;
  cr_assert_eq(rg_context_create(NULL, &ctx, NULL), RG_OK);
  return ctx;
}

static inline rg_spec *must_load(rg_context *ctx, const char *text, const rg_binding *set,
                                 size_t nset) {
  rg_error e = {0};
  rg_spec *spec;
  rg_status status = rg_spec_load_text(ctx, text, strlen(text), "text", set, nset, &spec, &e);
  cr_assert_eq(status, RG_OK, "%s: %s", e.pointer, e.message);
  return spec;
}

static const char *const small =
    "{\"regraph\": 1, \"params\": {\"H\": 4, \"D\": 16, \"dtype\": \"f16\", \"eps\": 0.5, "
    "\"flag\": true},"
    " \"inputs\": {\"x\": {\"shape\": [\"T\", \"H*D\"], \"dtype\": \"$dtype\", \"grad\": true},"
    "   \"w\": {\"shape\": [\"H*D\"], \"dtype\": \"$dtype\", \"grad\": \"accumulate\"},"
    "   \"cu\": {\"shape\": [\"B+1\"], \"dtype\": \"i32\"}},"
    " \"nodes\": [{\"name\": \"n\", \"op\": \"rmsnorm\", \"in\": {\"x\": \"x\", \"w\": \"w\", "
    "\"cu_seqlens\": \"cu\"}}],"
    " \"outputs\": {\"y\": \"n.y\"}}";

#endif
