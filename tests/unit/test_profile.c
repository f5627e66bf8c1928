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
  cr_assert_gt(p->memory, INT64_C(140000000000));
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
  /* 4 ms of bytes, then 5 on the wire, whose rate (here the memory's) is one that it reaches */
  cost.wire = 5e7;
  cr_assert_float_eq(rgi_profile_ms(p, "y", NULL, RG_I32, &cost), 5 + 4 / 0.5 + 0.005, 1e-9);
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
  const double far = ms(p, "x", "fast", RG_F32, 1e12) / 1e4;
  cr_assert(far > 1.25 && far < 1.6, "%g", far);
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

  static const rg_measured bad[] = {
      {NULL, NULL, RG_F32, 0, 0, 1, 1},         {"add", NULL, RG_F32, 0, 0, 1, 0},
      {"add", NULL, RG_F32, 0, NAN, 1, 1},      {"add", NULL, RG_F32, 0, 0, 1, INFINITY},
      {"add", NULL, RG_F32, 0, 0, INFINITY, 1}, {"add", NULL, RG_F32, INFINITY, 0, 1, 1},
      {"add", NULL, RG_F32, 0, INFINITY, 1, 1}, {"add", NULL, (rg_dtype)17, 0, 0, 1, 1}};
  for (int i = 0; i < RGI_COUNT(bad); i++)
    cr_assert_eq(rg_profile_write(ctx, NULL, &bad[i], 1, &text, NULL), RG_E_USAGE);
  cr_assert_eq(rg_profile_write(ctx, NULL, NULL, 1, &text, NULL), RG_E_USAGE);
  static const rg_profile_options rates[] = {
      {.matrix_gflops = INFINITY}, {.special_gops = INFINITY}, {.bandwidth_gbs = NAN}};
  for (int i = 0; i < RGI_COUNT(rates); i++)
    cr_assert_eq(rg_profile_write(ctx, &rates[i], m, RGI_COUNT(m), &text, NULL), RG_E_USAGE);
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

/* ---- the shipped profiles against what was measured (recompute/profiles/NAME.tsv) ---- */

typedef struct line {
  char job[64], node[64], direction[16], op[64], kernels[64], dtype[8];
  rg_measured m;
} line;

typedef struct lines {
  line *at;
  int n;
} lines;

static bool read_line(const char *text, line *x) {
  char part[10][64];
  int n = 0;
  for (const char *p = text; n < 10; n++) {
    const size_t size = strcspn(p, "\t\n");
    cr_assert(size < sizeof part[n], "%s", text);
    snprintf(part[n], sizeof part[n], "%.*s", (int)size, p);
    p += size;
    if (*p != '\t') {
      n++;
      break;
    }
    p++;
  }
  if (n != 10) return false;
  strcpy(x->job, part[0]);
  strcpy(x->node, part[1]);
  snprintf(x->direction, sizeof x->direction, "%.15s", part[2]);
  strcpy(x->op, part[3]);
  strcpy(x->kernels, part[4]);
  x->m = (rg_measured){.op = x->op, .kernels = x->kernels, .flops = atof(part[6])};
  while (strcmp(rg_dtype_name(x->m.dtype), part[5]) != 0) x->m.dtype++;
  x->m.exps = atof(part[7]);
  x->m.bytes = atof(part[8]);
  x->m.ms = atof(part[9]);
  return true;
}

/* The list's lines; its first names the same source as the profile. */
static lines read_list(const char *name, const char *source) {
  char path[512], text[2048];
  lines l = {0};
  snprintf(path, sizeof path, RG_SOURCE_DIR "/recompute/profiles/%s.tsv", name);
  FILE *f = fopen(path, "r");
  cr_assert(f && fgets(text, sizeof text, f), "%s", path);
  text[strcspn(text, "\n")] = 0;
  cr_assert_str_eq(strrchr(text, '\t') + 1, source);
  l.at = calloc(4096, sizeof *l.at);
  while (fgets(text, sizeof text, f) && l.n < 4096)
    if (text[0] != '#') l.n += read_line(text, &l.at[l.n]);
  fclose(f);
  for (int i = 0; i < l.n; i++) { /* which have moved */
    l.at[i].m.op = l.at[i].op;
    l.at[i].m.kernels = l.at[i].kernels;
  }
  return l;
}

/* "nsa T=4096" planned by a profile. */
static rg_plan *plan_job(const char *job, const char *device, const char *profile) {
  char path[512], name[64];
  const char *space = strchr(job, ' ');
  rg_error e = {0};
  rg_spec *spec;
  rg_plan *plan;
  cr_assert(space && strncmp(space, " T=", 3) == 0 && !strchr(space + 1, ' '), "%s", job);
  snprintf(name, sizeof name, "%.*s", (int)(space - job), job);
  snprintf(path, sizeof path, RG_SOURCE_DIR "/examples/%s.json", name);
  const rg_binding set[] = {{.name = "T", .value = atoll(space + 3)}, {.name = "B", .value = 1}};
  const rg_plan_options o = {.device = device, .profile_path = profile, .set = set, .nset = 2};
  cr_assert_eq(rg_spec_load_file(ctx, path, NULL, 0, &spec, &e), RG_OK, "%s", e.message);
  cr_assert_eq(rg_plan_create(spec, NULL, &o, &plan, &e), RG_OK, "%s", e.message);
  rg_spec_destroy(spec);
  return plan;
}

typedef struct range {
  double least, most;
  int n, off; /* off: outside 0.8 … 1.25 */
} range;

static void add(range *r, double ratio, const char *job, const char *node) {
  const bool off = ratio < 0.8 || ratio > 1.25;
  if (off && getenv("REGRAPH_VERBOSE")) fprintf(stderr, "%s %s: %.3f\n", job, node, ratio);
  r->least = fmin(r->least, ratio);
  r->most = fmax(r->most, ratio);
  r->n++;
  r->off += off;
}

/* A cast of its own when the CPU was measured, since then the end of the node that adds last
 * (passes/fuse.h). To go from here when the CPU is measured again. */
static bool taken_over_since(const line *l, const char *next) {
  return strcmp(l->node, "d.q.cast") == 0 && strcmp(next, l->node) != 0;
}

/* Modelled ÷ measured of the job's nodes that take more than 2 % of it; kernels are those
 * that ran. */
static void compare_job(const line *at, int n, const char *device, const char *profile, range *r) {
  double all = 0;
  for (int i = 0; i < n; i++) all += at[i].m.ms;
  rg_plan *plan = plan_job(at->job, device, profile);
  rg_node_info x;
  int step = 0;
  for (size_t i = 0; rg_plan_node(plan, i, &x) == RG_OK; i++) {
    if (x.step < 0) continue;
    step += step < n && taken_over_since(&at[step], x.name);
    cr_assert_lt(step, n, "%s: a node more", at->job);
    const line *l = &at[step++];
    cr_assert_str_eq(x.name, l->node);
    cr_assert_str_eq(x.kernels ? x.kernels : "", l->kernels, "%s: %s", at->job, l->node);
    if (l->m.ms > 0.02 * all) add(r, x.model_ms / l->m.ms, at->job, l->node);
  }
  step += step < n && taken_over_since(&at[step], "");
  cr_assert_eq(step, n, "%s: a node less", at->job);
  rg_plan_destroy(plan);
}

static int job_length(const lines *l, int i) {
  int n = 0;
  while (i + n < l->n && strcmp(l->at[i + n].job, l->at[i].job) == 0) n++;
  return n;
}

/* GPUs of data sheets are asked for by name: attention, topk and learned compression take the
 * tensor cores that all GPUs since Ampere have. */
Test(profile, data_sheets) {
  static const struct {
    const char *name;
    int cc;
  } sheet[] = {{"a100", 80}, {"l40s", 89}, {"rtx4090", 89}, {"b200", 100}};
  for (int i = 0; i < 4; i++) {
    rgi_profile *p;
    rg_error e = {0};
    cr_assert_eq(rgi_profile_load(ctx, sheet[i].name, "cuda", &p, &e), RG_OK, "%s", e.message);
    cr_assert_eq(p->gpu.cc, sheet[i].cc);
    cr_assert(strstr(p->source, "data sheet"), "%s", p->source);
    rgi_profile_destroy(p);
    cr_assert_eq(rgi_profile_load(ctx, sheet[i].name, "cpu", &p, &e), RG_E_VALUE);
    rg_plan *plan = plan_job("nsa_linear T=8192", "cuda", sheet[i].name);
    rg_node_info x;
    int found = 0;
    for (size_t k = 0; rg_plan_node(plan, k, &x) == RG_OK; k++) {
      if (!strstr(x.op, "_attn") && !strstr(x.op, "compress_kv") && strcmp(x.op, "topk") != 0)
        continue;
      cr_assert(x.model_ms > 0, "%s: %s", sheet[i].name, x.name);
      cr_assert_str_eq(x.kernels, "mma: not Hopper", "%s: %s", sheet[i].name, x.name);
      found++;
    }
    cr_assert_eq(found, 9); /* three branches and compression both ways */
    rg_plan_destroy(plan);
  }
}

/* What is modelled is what was measured; a plan made without a GPU names the kernels that ran
 * on one. The CPU had other work meanwhile, and took up to twice as long for one of two equal
 * nodes. */
Test(profile, models_what_was_measured) {
  static const char *const name[] = {"h200", "cpu"}, *const device[] = {"cuda", "cpu"};
  range r[2] = {{.least = INFINITY}, {.least = INFINITY}};
  for (int i = 0; i < 2; i++) {
    char path[512];
    rgi_profile *p;
    rg_error e = {0};
    snprintf(path, sizeof path, RG_SOURCE_DIR "/recompute/profiles/%s.json", name[i]);
    cr_assert_eq(rgi_profile_load(ctx, path, device[i], &p, &e), RG_OK, "%s", e.message);
    lines l = read_list(name[i], p->source);
    for (int k = 0, n; k < l.n; k += n) {
      n = job_length(&l, k);
      compare_job(&l.at[k], n, device[i], path, &r[i]);
    }
    fprintf(stderr, "%s: %d nodes, modelled %.3f to %.3f of measured, %d off\n", name[i], r[i].n,
            r[i].least, r[i].most, r[i].off);
    free(l.at);
    rgi_profile_destroy(p);
  }
  cr_assert(r[0].n > 200 && r[0].off == 0);
  cr_assert(r[1].n > 80 && 10 * r[1].off <= r[1].n && r[1].least > 0.5 && r[1].most < 2);
}

static bool held_out(const char *job) {
  return strstr(job, " T=16384") || strstr(job, " T=65536");
}

/* Takes the points of a line's cost away, so that its time has to come from between the others. */
static void hold_out(rgi_profile *p, const line *l) {
  const rg_cost cost = {.flops = l->m.flops, .exps = l->m.exps, .bytes = l->m.bytes};
  rgi_point at;
  rgi_profile_point(p, l->m.dtype, &cost, 1, &at);
  for (int i = 0; i < p->nmeasured; i++) {
    rgi_measured *m = &p->measured[i];
    for (int k = 0; k < m->npoint && strcmp(m->op, l->op) == 0; k++) {
      double d = 0;
      for (int a = 0; a < RGI_POINT_AXES; a++) d = fmax(d, fabs(m->point[k].at[a] - at.at[a]));
      if (d < 0.05) m->point[k--] = m->point[--m->npoint];
    }
  }
}

/* Lengths that nobody measured lie between those that were: without 16K and 64K, what are they?
 * Costs do not say all: choices scatter more at 16K than at 4K, where a call with four times the
 * heads costs the same. */
Test(profile, between_what_was_measured) {
  rgi_profile *p;
  rg_error e = {0};
  range r = {.least = INFINITY};
  cr_assert_eq(rgi_profile_load(ctx, "shipped", "cuda", &p, &e), RG_OK, "%s", e.message);
  lines l = read_list("h200", p->source);
  for (int i = 0; i < l.n; i++)
    if (held_out(l.at[i].job)) hold_out(p, &l.at[i]);
  for (int i = 0, n; i < l.n; i += n) {
    double all = 0;
    n = job_length(&l, i);
    for (int k = i; k < i + n; k++) all += l.at[k].m.ms;
    for (int k = i; k < i + n && held_out(l.at[i].job); k++) {
      const rg_measured *m = &l.at[k].m;
      const rg_cost cost = {.flops = m->flops, .exps = m->exps, .bytes = m->bytes};
      if (m->ms <= 0.02 * all) continue;
      add(&r, rgi_profile_ms(p, m->op, m->kernels, m->dtype, &cost) / m->ms, l.at[k].job,
          l.at[k].node);
    }
  }
  fprintf(stderr, "held out: %d nodes, modelled %.3f to %.3f of measured, %d off\n", r.n, r.least,
          r.most, r.off);
  cr_assert_gt(r.n, 60);
  cr_assert_eq(r.off, 0);
  free(l.at);
  rgi_profile_destroy(p);
}
