/* tests/unit/test_profile.c: device profiles as read, found and written, and the times modelled by
 * them. */
#include "exec/plan.h"
#include "graph/profile.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static rg_context *ctx;

static void setup(void) {
  rg_error e = {0};
  cr_assert_eq(rg_context_create(NULL, &ctx, &e), RG_OK, "%s", e.message);
}

static void teardown(void) {
  rg_context_destroy(ctx);
}

TestSuite(profile, .init = setup, .fini = teardown);

Test(profile, shipped) {
  rgi_profile *p;
  rg_error e = {0};
  cr_assert_eq(rgi_profile_load(ctx, NULL, "cpu", &p, &e), RG_OK, "%s", e.message);
  cr_assert_not(p->cuda);
  cr_assert(p->matrix_gflops[RG_F32] > 0 && p->special_gops > 0 && p->bandwidth_gbs > 0 &&
            p->memory > 0);
  rgi_profile_destroy(p);
  cr_assert_eq(rgi_profile_load(ctx, NULL, "cuda", &p, &e), RG_OK, "%s", e.message);
  cr_assert(p->cuda);
  cr_assert_eq(p->memory, INT64_C(141000000000));
  cr_assert(p->matrix_gflops[RG_BF16] > 10 * p->matrix_gflops[RG_F32]);
  rgi_profile_destroy(p);
  cr_assert_eq(rgi_profile_load(ctx, NULL, "tpu", &p, &e), RG_E_USAGE);
  cr_assert_null(p);
}

static rg_status load_profile(const char *text, const char *device, rgi_profile **out,
                              rg_error *e) {
  char path[] = "/tmp/rg_profile_XXXXXX";
  int file = mkstemp(path);
  cr_assert_geq(file, 0);
  cr_assert_eq(write(file, text, strlen(text)), (ssize_t)strlen(text));
  close(file);
  rg_status status = rgi_profile_load(ctx, path, device, out, e);
  if (status != RG_OK && e) cr_assert_str_eq(e->file, path);
  unlink(path);
  return status;
}

#define PROFILE(more)                                                                              \
  "{\"regraph_profile\": 1, \"device\": \"cpu\", \"matrix_gflops\": {\"f32\": 100, \"f16\": 200, " \
  "\"bf16\": "                                                                                     \
  "400},"                                                                                          \
  " \"special_gops\": 2, \"bandwidth_gbs\": 10, \"memory\": \"1GiB\"" more "}"

#define ONE(op, points) PROFILE(", \"measured\": [{\"op\": \"" op "\", \"points\": " points "}]")

Test(profile, cost_model) {
  rgi_profile *p;
  rg_error e = {0};
  cr_assert_eq(
      load_profile(PROFILE(", \"step_us\": 5, \"efficiency\": 0.5, \"ops\": {\"x\": 0.25}"), "cpu",
                   &p, &e),
      RG_OK, "%s: %s", e.pointer, e.message);
  cr_assert_eq(p->memory, 1 << 30);
  /* 1 ms of products at full speed, less of the rest */
  rg_cost cost = {.flops = 1e8, .exps = 1e5, .bytes = 1e5};
  cr_assert_float_eq(rgi_profile_ms(p, "y", NULL, RG_F32, &cost), 1 / 0.5 + 0.005, 1e-9);
  cr_assert_float_eq(rgi_profile_ms(p, "x", NULL, RG_F32, &cost), 1 / 0.25 + 0.005, 1e-9);
  cr_assert_float_eq(rgi_profile_ms(p, "y", NULL, RG_BF16, &cost), 0.25 / 0.5 + 0.005, 1e-9);
  cost = (rg_cost){.exps = 6e6, .bytes = 1e7}; /* 3 ms of exponentials, 1 ms of bytes */
  cr_assert_float_eq(rgi_profile_ms(p, "y", NULL, RG_F32, &cost), 3 / 0.5 + 0.005, 1e-9);
  cost = (rg_cost){.bytes = 4e7};
  cr_assert_float_eq(rgi_profile_ms(p, "y", NULL, RG_I32, &cost), 4 / 0.5 + 0.005, 1e-9);
  rgi_profile_destroy(p);
}

Test(profile, malformed) {
  static const struct {
    const char *text;
    rg_status status;
    const char *pointer;
  } bad[] = {
      {"{", RG_E_SYNTAX, ""},
      {"{\"regraph_profile\": 1}", RG_E_KEY, ""},
      {PROFILE(", \"speed\": 1"), RG_E_KEY, "/speed"},
      {PROFILE(", \"efficiency\": 1.5"), RG_E_VALUE, "/efficiency"},
      {PROFILE(", \"efficiency\": 0"), RG_E_VALUE, "/efficiency"},
      {PROFILE(", \"efficiency\": \"high\""), RG_E_TYPE, "/efficiency"},
      {PROFILE(", \"step_us\": -1"), RG_E_VALUE, "/step_us"},
      {PROFILE(", \"threads\": -1"), RG_E_VALUE, "/threads"},
      {PROFILE(", \"ops\": {\"x\": 2}"), RG_E_VALUE, "/ops/x"},
      {PROFILE(", \"name\": 3"), RG_E_TYPE, "/name"},
      {PROFILE(", \"source\": []"), RG_E_TYPE, "/source"},
      {PROFILE(", \"measured\": {}"), RG_E_TYPE, "/measured"},
      {PROFILE(", \"measured\": [3]"), RG_E_TYPE, "/measured/0"},
      {PROFILE(", \"measured\": [{\"op\": \"x\"}]"), RG_E_KEY, "/measured/0"},
      {ONE("x", "[]"), RG_E_VALUE, "/measured/0/points"},
      {ONE("x", "[[1, 2, 3]]"), RG_E_VALUE, "/measured/0/points/0"},
      {ONE("x", "[[1, 2, 3, 4], [1, 2, 3, 0]]"), RG_E_VALUE, "/measured/0/points/1"},
      {ONE("x", "[[1, -2, 3, 4]]"), RG_E_VALUE, "/measured/0/points/0"},
      {ONE("x", "[[1, 2, 1e300, 4]]"), RG_E_VALUE, "/measured/0/points/0"},
      {ONE("x", "[[1, 2, 3, \"4\"]]"), RG_E_VALUE, "/measured/0/points/0"},
      {ONE("x\", \"dtype\": \"f8", "[[1, 2, 3, 4]]"), RG_E_VALUE, "/measured/0/dtype"},
      {ONE("x\", \"kernels\": 3, \"dtype\": \"f32", "[[1, 2, 3, 4]]"), RG_E_TYPE,
       "/measured/0/kernels"},
      {"{\"regraph_profile\": 2, \"device\": \"cpu\", \"matrix_gflops\": 1, \"special_gops\": 1,"
       " \"bandwidth_gbs\": 1, \"memory\": 1}",
       RG_E_VALUE, "/regraph_profile"},
      {"{\"regraph_profile\": 1, \"device\": \"tpu\", \"matrix_gflops\": 1, \"special_gops\": 1,"
       " \"bandwidth_gbs\": 1, \"memory\": 1}",
       RG_E_VALUE, "/device"}};
  rgi_profile *p;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    rg_error e = {0};
    cr_assert_eq(load_profile(bad[i].text, "cpu", &p, &e), bad[i].status, "%s", bad[i].text);
    cr_assert_null(p);
    cr_assert_str_eq(e.pointer, bad[i].pointer);
  }
  rg_error e = {0};
  cr_assert_eq(load_profile(PROFILE(""), "cuda", &p, &e), RG_E_VALUE); /* for another device */
  cr_assert_null(p);
  e = (rg_error){0};
  cr_assert_eq(rgi_profile_load(ctx, "/nonexistent", "cpu", &p, &e), RG_E_IO);
}

/* ---- measured times ---- */

static double ms(const rgi_profile *p, const char *op, const char *kernels, rg_dtype dtype,
                 double flops) {
  const rg_cost cost = {.flops = flops, .bytes = flops / 1e3};
  return rgi_profile_ms(p, op, kernels, dtype, &cost);
}

/* 100 GFLOP/s: 1e8 flops are a millisecond at best. */
#define MEASURED                                                                         \
  PROFILE(", \"step_us\": 1, \"efficiency\": 0.5, \"measured\": ["                       \
          "{\"op\": \"x\", \"kernels\": \"fast\", \"dtype\": \"f32\", \"points\": ["     \
          "[1e8, 0, 1e5, 2.001], [4e8, 0, 4e5, 5.001]]},"                                \
          "{\"op\": \"x\", \"kernels\": \"slow\", \"points\": [[1e8, 0, 1e5, 50.001]]}," \
          "{\"op\": \"z\", \"points\": [[0, 0, 0, 0.5]]}]")

Test(profile, measured) {
  rgi_profile *p;
  rg_error e = {0};
  cr_assert_eq(load_profile(MEASURED, "cpu", &p, &e), RG_OK, "%s: %s", e.pointer, e.message);
  /* exact where it was measured */
  cr_assert_float_eq(ms(p, "x", "fast", RG_F32, 1e8), 2.001, 1e-3);
  cr_assert_float_eq(ms(p, "x", "fast", RG_F32, 4e8), 5.001, 1e-3);
  /* between: in order, and nearest to what is near */
  const double middle = ms(p, "x", "fast", RG_F32, 2e8);
  cr_assert_float_eq(middle, 2 * sqrt(2 * 1.25) + 0.001, 1e-2);
  cr_assert_float_eq(ms(p, "x", "fast", RG_F32, 1.1e8), 2.2, 1e-2);
  /* past the last the efficiency stays */
  cr_assert_float_eq(ms(p, "x", "fast", RG_F32, 1e12) / 1e4, 1.25, 0.2);
  /* the family decides, whatever it gives as its reason; then the type; then the op alone */
  cr_assert_float_eq(ms(p, "x", "slow: d_v 40", RG_F32, 1e8), 50.001, 1e-3);
  cr_assert_float_eq(ms(p, "x", "slow", RG_BF16, 1e8), 50.001 / 4, 1e-2);
  cr_assert_float_eq(ms(p, "x", "fast", RG_BF16, 1e8), 2.001 / 4, 1e-2);
  const double any = ms(p, "x", NULL, RG_F32, 1e8);
  cr_assert(any > 2.1 && any < 49);
  /* never measured: the profile's efficiency */
  cr_assert_float_eq(ms(p, "y", "fast", RG_F32, 1e8), 2.001, 1e-9);
  /* an op that costs nothing costs what it took */
  cr_assert_float_eq(ms(p, "z", NULL, RG_F32, 0), 0.5, 1e-3);
  rgi_profile_destroy(p);
}

/* What is written is read again, and gives back the times that went in; calls alike are one. */
Test(profile, written_and_read) {
  const rg_measured m[] = {{"cast", NULL, RG_F32, 0, 0, 1e6, 0.3},
                           {"cast", NULL, RG_F32, 0, 0, 1.001e6, 0.5},
                           {"cast", NULL, RG_F32, 0, 0, 1.002e6, 0.4},
                           {"cast", NULL, RG_F32, 0, 0, 1e9, 100},
                           {"add", "plain: alignment", RG_BF16, 0, 0, 1e6, 0.7},
                           {"add", "plain", RG_BF16, 0, 0, 1e8, 70}};
  const rg_profile_options o = {.name = "a \"box\"",
                                .source = "seen",
                                .threads = 3,
                                .matrix_gflops = 100,
                                .special_gops = 10,
                                .bandwidth_gbs = 10};
  rg_text text;
  rg_error e = {0};
  rgi_profile *p;
  cr_assert_eq(rg_profile_write(ctx, &o, m, RGI_COUNT(m), &text, &e), RG_OK, "%s", e.message);
  cr_assert_eq(load_profile(text.data, "cpu", &p, &e), RG_OK, "%s: %s", e.pointer, e.message);
  cr_assert_str_eq(p->name, "a \"box\"");
  cr_assert_str_eq(p->source, "seen");
  cr_assert_eq(p->threads, 3);
  cr_assert_eq(p->nmeasured, 2);
  cr_assert_eq(p->measured[0].npoint, 2);
  cr_assert_str_eq(p->measured[0].kernels, "plain");
  cr_assert_eq(p->measured[1].npoint, 2);
  rg_cost cost = {.bytes = 1e6};
  cr_assert_float_eq(rgi_profile_ms(p, "cast", NULL, RG_F32, &cost), 0.4, 1e-3);
  cr_assert_float_eq(rgi_profile_ms(p, "add", "plain", RG_BF16, &cost), 0.7, 1e-3);
  cost.bytes = 1e9;
  cr_assert_float_eq(rgi_profile_ms(p, "cast", NULL, RG_F32, &cost), 100, 1e-2);
  rgi_profile_destroy(p);
  rg_text_destroy(&text);

  static const rg_measured bad[] = {{NULL, NULL, RG_F32, 0, 0, 1, 1},
                                    {"add", NULL, RG_F32, 0, 0, 1, 0},
                                    {"add", NULL, RG_F32, 0, NAN, 1, 1},
                                    {"add", NULL, (rg_dtype)17, 0, 0, 1, 1}};
  for (int i = 0; i < RGI_COUNT(bad); i++)
    cr_assert_eq(rg_profile_write(ctx, NULL, &bad[i], 1, &text, NULL), RG_E_USAGE);
  cr_assert_eq(rg_profile_write(ctx, NULL, NULL, 1, &text, NULL), RG_E_USAGE);
}

/* Environment → what is read; the cache folder is a new one. */
Test(profile, found) {
  char folder[] = "/tmp/rg_cache_XXXXXX", path[1024], mine[1100];
  rgi_profile *p;
  rg_error e = {0};
  cr_assert_not_null(mkdtemp(folder));
  setenv("XDG_CACHE_HOME", folder, 1);
  unsetenv("REGRAPH_PROFILE");
  cr_assert_eq(rg_profile_path("cpu", path, sizeof path, &e), RG_OK);
  cr_assert_eq(strncmp(path, folder, strlen(folder)), 0);
  cr_assert_eq(rgi_profile_load(ctx, NULL, "cpu", &p, &e), RG_OK, "%s", e.message);
  cr_assert_str_eq(p->found, "shipped");
  const uint64_t shipped = p->id;
  rgi_profile_destroy(p);

  snprintf(mine, sizeof mine, "%s/regraph", folder);
  cr_assert_eq(mkdir(mine, 0700), 0);
  FILE *f = fopen(path, "w");
  cr_assert(f && fputs(PROFILE(", \"source\": \"tuned\""), f) >= 0 && fclose(f) == 0);
  static const struct {
    const char *which, *environment, *source; /* source NULL: the shipped one */
  } cases[] = {{NULL, NULL, "tuned"},    {"shipped", NULL, NULL},    {"cpu", NULL, "tuned"},
               {NULL, "shipped", NULL},  {NULL, "cpu", "tuned"},     {NULL, "", "tuned"},
               {"shipped", "cpu", NULL}, {"cpu", "shipped", "tuned"}};
  for (int i = 0; i < RGI_COUNT(cases); i++) {
    if (cases[i].environment) setenv("REGRAPH_PROFILE", cases[i].environment, 1);
    cr_assert_eq(rgi_profile_load(ctx, cases[i].which, "cpu", &p, &e), RG_OK, "%s", e.message);
    cr_assert_eq(p->id == shipped, !cases[i].source, "case %d", i);
    cr_assert_str_eq(p->found, cases[i].source ? path : "shipped");
    if (cases[i].source) cr_assert_str_eq(p->source, cases[i].source);
    rgi_profile_destroy(p);
    unsetenv("REGRAPH_PROFILE");
  }
  cr_assert_eq(rgi_profile_load(ctx, "other", "cpu", &p, &e), RG_E_USAGE);
  cr_assert(strstr(e.message, "/regraph/other.json"), "%s", e.message);
  cr_assert(strstr(e.message, "./NAME.json"), "%s", e.message);
  unlink(path);
  rmdir(mine);
  rmdir(folder);

  e = (rg_error){0};
  unsetenv("HOME");
  setenv("XDG_CACHE_HOME", "relative", 1);
  cr_assert_eq(rg_profile_path("cpu", path, sizeof path, &e), RG_E_USAGE);
  e = (rg_error){0};
  cr_assert_eq(rgi_profile_load(ctx, "other", "cpu", &p, &e), RG_E_USAGE);
  cr_assert_eq(rgi_profile_load(ctx, NULL, "cpu", &p, &e), RG_OK);
  cr_assert_eq(p->id, shipped);
  rgi_profile_destroy(p);
}
