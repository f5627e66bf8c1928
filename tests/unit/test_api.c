/* tests/unit/test_api.c: what the public header promises beyond results: options that grow, the list of a plan's
 * nodes, what a bound pointer must satisfy, binding and running by index.
 */
#include "graph/base.h"
#include "run_util.h"

#define FAILS(call, code, part)                                                                              \
  do {                                                                                                       \
    rg_error e_ = {0};                                                                                       \
    rg_error *const e = &e_;                                                                                 \
    rg_status got_ = (call);                                                                                 \
    cr_assert_eq(got_, code, "%s: %s", rg_status_name(got_), e->message);                                    \
    cr_assert_eq(e->status, code);                                                                           \
    cr_assert(strstr(e->message, part), "\"%s\" does not mention \"%s\"", e->message, part);                 \
  } while (0)

/* ---- fixture ---- */

enum { T = 96, B = 2 };
static rg_context *ctx;
static rg_spec *spec;
static rg_plan *plan;

static void setup(void) {
  char text[8192];
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  spec = load_spec(ctx, nsa_spec("bf16", false, text, sizeof text));
  plan = make_plan(spec, NULL, T, B, 2);
}
static void teardown(void) {
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

/* ---- options that grow ---- */

static rg_status plan_with(const rg_plan_options *o, rg_plan **out, rg_error *e) {
  return rg_plan_create(spec, NULL, o, out, e);
}

Test(options, size_zero_is_the_first_version, .init = setup, .fini = teardown) {
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rg_plan *p;
  rg_error e = {0};
  rg_plan_options o = {.set = set, .nset = 2, .threads = 1};
  CR_OK(plan_with(&o, &p, &e), &e);
  rg_plan_destroy(p);
  o.size = sizeof o;
  CR_OK(plan_with(&o, &p, &e), &e);
  rg_plan_destroy(p);
  rg_text text;
  CR_OK(rg_pareto(spec, NULL, &o, "text", &text, &e), &e);
  rg_text_destroy(&text);
}

/* A caller built for a later version: more members at the end. */
Test(options, newer_callers, .init = setup, .fini = teardown) {
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  struct {
    rg_plan_options known;
    int64_t later;
  } o = {.known = {.size = sizeof o, .set = set, .nset = 2, .threads = 1}};
  rg_plan *p;
  rg_error e = {0};
  CR_OK(plan_with(&o.known, &p, &e), &e);
  rg_plan_destroy(p);
  o.later = 1;
  FAILS(plan_with(&o.known, &p, e), RG_E_USAGE, "rg_plan_options sets what regraph 0.1.0 does not know");
  cr_assert_null(p);
  o.known.size = 0; /* then it says nothing of later members */
  CR_OK(plan_with(&o.known, &p, &e), &e);
  rg_plan_destroy(p);
}

Test(options, sizes_that_make_no_sense, .init = setup, .fini = teardown) {
  static const size_t wrong[] = {1, sizeof(size_t), sizeof(rg_session_options) - 1, 1 << 20, SIZE_MAX};
  for (int i = 0; i < RGI_COUNT(wrong); i++) {
    rg_session *s;
    rg_plan *p;
    rg_text text;
    rg_pack_result result;
    rg_plan_options po = {.size = wrong[i]};
    rg_session_options so = {.size = wrong[i]};
    rg_pack_options ko = {.size = wrong[i]};
    FAILS(rg_session_create(plan, &so, &s, e), RG_E_USAGE, "rg_session_options.size is");
    cr_assert_null(s);
    if (i != 2) FAILS(rg_pack(ctx, NULL, 0, &ko, &result, e), RG_E_USAGE, "rg_pack_options.size is");
    FAILS(plan_with(&po, &p, e), RG_E_USAGE, "rg_plan_options.size is");
    FAILS(rg_pareto(spec, NULL, &po, "text", &text, e), RG_E_USAGE, "rg_plan_options.size is");
  }
}

/* A caller built for an earlier version than the library: the struct ends before `late` does. */
Test(options, older_callers) {
  typedef struct grown {
    size_t size;
    int64_t early, late;
  } grown;
  const size_t first = offsetof(grown, late);
  grown given = {0, 1, 2}, own;
  rg_error e = {0};
  CR_OK(rgi_options(&given, &own, first, sizeof own, "grown", &e), &e);
  cr_assert(own.early == 1 && own.late == 0 && own.size == sizeof own);
  given.size = first;
  CR_OK(rgi_options(&given, &own, first, sizeof own, "grown", &e), &e);
  cr_assert(own.early == 1 && own.late == 0);
  given.size = sizeof given;
  CR_OK(rgi_options(&given, &own, first, sizeof own, "grown", &e), &e);
  cr_assert(own.early == 1 && own.late == 2);
  CR_OK(rgi_options(NULL, &own, first, sizeof own, "grown", &e), &e);
  cr_assert(own.early == 0 && own.late == 0 && own.size == sizeof own);
}
