/* tests/fuzz/fuzz_spec.c: libFuzzer target: bytes → spec and policy → check → plan. Nothing is run.

   The input is a spec, perhaps followed by a line "%%" and a policy. Whatever the bytes are, each
   call either succeeds or names an error and leaves nothing behind. clang
   -fsanitize=fuzzer,address,undefined; seeds in corpus/spec.
 */
#include <regraph/regraph.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char separator[] = "\n%%\n";

static void require(int condition) {
  if (!condition) abort();
}

/* A failed call has an error with a message and no object; a good one the opposite. */
static void consistent(rg_status status, const rg_error *e, const void *object) {
  if (status == RG_E_INTERNAL) fprintf(stderr, "%s %s: %s\n", e->pointer, e->node, e->message);
  require((status == RG_OK) == (object != NULL));
  require(status == e->status);
  require(status == RG_OK || e->message[0]);
  require(status != RG_E_INTERNAL);
}

/* All errors at once begin with the first alone. */
static void several(rg_context *ctx, const char *text, size_t size, const rg_error *first) {
  rg_error e[4];
  size_t n;
  rg_spec *spec;
  rg_status status = rg_spec_load_text_all(ctx, text, size, "fuzz", NULL, 0, &spec, e, 4, &n);
  require(status == first->status && (n == 0) == (status == RG_OK) && n <= 4);
  require((status == RG_OK) == (spec != NULL));
  if (n) require(memcmp(&e[0], first, sizeof *first) == 0);
  for (size_t i = 1; i < n; i++) consistent(e[i].status, &e[i], NULL);
  rg_spec_destroy(spec);
}

static void plan(const rg_spec *spec, const rg_policy *policy, const char *device) {
  static const rg_binding small[] = {{"T", 48, NULL}, {"B", 2, NULL}};
  for (size_t nset = 0; nset <= 2; nset += 2) { /* not every spec knows T and B */
    rg_error e = {0};
    rg_plan *p = NULL;
    rg_plan_options o = {
        .set = small, .nset = nset, .device = device, .threads = 2, .pack_seconds = 1e-6};
    rg_status status = rg_plan_create(spec, policy, &o, &p, &e);
    consistent(status, &e, p);
    rg_sizes sizes;
    if (p)
      require(rg_plan_sizes(p, &sizes) == RG_OK && sizes.saved >= 0 &&
              sizes.predicted_peak >= sizes.saved);
    rg_plan_destroy(p);
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const char *text = (const char *)data, *cut = NULL;
  size_t spec_size = size;
  if (size >= sizeof separator - 1) cut = memmem(text, size, separator, sizeof separator - 1);
  if (cut) spec_size = (size_t)(cut - text);

  rg_context *ctx;
  rg_spec *spec = NULL;
  rg_policy *policy = NULL;
  rg_error e = {0};
  rg_text dump = {0};
  if (rg_context_create(NULL, &ctx, &e) != RG_OK) return 0;
  /* an exact copy, so that reading past its end is seen */
  char *copy = malloc(spec_size ? spec_size : 1);
  if (copy) {
    memcpy(copy, text, spec_size);
    rg_status status = rg_spec_load_text(ctx, copy, spec_size, "fuzz", NULL, 0, &spec, &e);
    consistent(status, &e, spec);
    several(ctx, copy, spec_size, &e);
    free(copy);
  }
  if (spec && cut) {
    const char *rest = cut + sizeof separator - 1;
    rg_status status =
        rg_policy_load_text(ctx, rest, (size_t)(text + size - rest), "fuzz", &policy, &e);
    consistent(status, &e, policy);
  }
  if (spec && e.status == RG_OK) {
    rg_status status = rg_check(spec, policy, &e);
    require(status == e.status && status != RG_E_INTERNAL);
    require(rg_spec_write(spec, "text", &dump, NULL) == RG_OK);
    rg_text_destroy(&dump);
    if (status == RG_OK) plan(spec, policy, "cpu");
    if (status == RG_OK && policy) plan(spec, policy, "cuda"); /* copies have windows there */
  }
  rg_policy_destroy(policy);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
  return 0;
}
