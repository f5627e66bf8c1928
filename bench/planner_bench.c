/* bench/planner_bench.c: how far from the best a plan under a budget may be, and how long it takes.

       planner_bench [FAMILY…]      chains, models, random, host; default: all of them; a number:
                                    that one of random's

   A row a graph and device: the worst gap (of the whole time; 0 where proved), the longest plan and
   the longest that is no least, over budgets from the least to what everything kept takes, and how
   often a larger budget was given a dearer plan, or was refused or not held. Whole plans, packing
   and all, in seconds of all cores together: where a proof has a companion (beside.c) that is up to
   twice what it takes on two. With ALONE in the environment one core does all, with VERBOSE there
   is a line for each budget, too.
 */
#include "exec/plan.h"
#include "tests/harness/random_spec.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { EACH = 12, SEEDS = 5 * EACH }; /* random graphs: of a size; in all */

typedef struct subject {
  char name[64];
  rg_context *ctx;
  rg_spec *spec;
  rg_binding set[2];
  size_t nset;
  const char *device, *host; /* NULL: nothing may be offloaded */
} subject;

typedef struct answer {
  bool met;
  long long budget;
  double ms, gap, whole, seconds;
  bool optimal;
  int candidates;
} answer;

static void die(const rg_error *e) {
  fprintf(stderr, "%s\n", e->message);
  exit(1);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* budget 0: the least; below: everything kept */
static answer ask(const subject *s, long long budget, long long *peak) {
  char text[160], bytes[32] = "\"least\"", host[64] = "";
  rg_policy *policy;
  rg_plan *plan;
  rg_error e = {0};
  rg_sizes z;
  const rg_plan_options o = {.set = s->set,
                             .nset = s->nset,
                             .device = s->device,
                             .profile_path = "shipped",
                             .threads = 1,
                             .plan_alone = getenv("ALONE") != NULL};
  if (budget) snprintf(bytes, sizeof bytes, "%lld", budget);
  if (s->host) snprintf(host, sizeof host, ", \"host\": \"%s\"", s->host);
  if (budget < 0)
    snprintf(text, sizeof text, "{\"regraph_policy\": 1}");
  else
    snprintf(text, sizeof text, "{\"regraph_policy\": 1, \"budget\": %s%s}", bytes, host);
  if (rg_policy_load_text(s->ctx, text, strlen(text), "policy", &policy, &e) != RG_OK) die(&e);
  answer a = {.budget = budget};
  const double began = now();
  const rg_status status = rg_plan_create(s->spec, policy, &o, &plan, &e);
  a.seconds = now() - began;
  rg_policy_destroy(policy);
  if (status == RG_E_INFEASIBLE) return a;
  if (status != RG_OK || rg_plan_sizes(plan, &z) != RG_OK) die(&e);
  *peak = z.predicted_peak;
  const rgi_choice *c = plan->choice;
  a.met = true;
  if (c) {
    a.budget = c->budget;
    a.whole = c->all_ms;
    a.ms = c->extra_ms + c->wait_ms;
    a.optimal = c->optimal;
    for (int i = 0; i < c->nnode; i++) a.candidates += c->node[i].candidate;
    a.gap = c->optimal ? 0 : (a.ms - c->bound_ms) / c->all_ms;
  }
  rg_plan_destroy(plan);
  return a;
}

static void sweep(subject *s) {
  static const double part[] = {0.02, 0.05, 0.1, 0.17, 0.25, 0.4, 0.6, 0.8, 0.95};
  long long all, peak;
  const bool verbose = getenv("VERBOSE") != NULL;
  const answer kept = ask(s, -1, &all), least = ask(s, 0, &peak);
  answer worst = least, before = least;
  double slowest = 0;
  int proved = least.optimal, dearer = 0, refused = 0, n = 1;
  if (verbose)
    printf("  %-12s %14lld  %9.4f ms more of %9.4f, gap %6.3f %%, %6.2f s\n", "least", least.budget,
           least.ms, least.whole, 100 * least.gap, least.seconds);
  for (size_t i = 0; i < sizeof part / sizeof *part; i++, n++) {
    const long long budget = least.budget + (long long)((double)(all - least.budget) * part[i]);
    const answer a = ask(s, budget, &peak);
    if (verbose)
      printf("  %-12g %14lld  %9.4f ms more of %9.4f, gap %6.3f %%, %6.2f s%s\n", part[i], budget,
             a.ms, a.whole, 100 * a.gap, a.seconds, a.met ? "" : "  REFUSED");
    refused += !a.met || peak > budget;
    dearer += a.ms > before.ms * (1 + 1e-9);
    proved += a.optimal;
    if (a.gap > worst.gap) worst = a;
    if (a.seconds > slowest) slowest = a.seconds;
    before = a;
  }
  printf("%-28s %-5s %-6s %4d  %4.2f  %6.2f at %4.2f  %6.2f  %3d/%-3d %5.2f %6.2f %6.2f %4d %4d\n",
         s->name, s->device, s->host ? s->host : "", least.candidates,
         (double)least.budget / (double)all, 100 * worst.gap,
         (double)(worst.budget - least.budget) / (double)(all - least.budget + 1), 100 * least.gap,
         proved, n, kept.seconds, least.seconds, slowest, dearer, refused);
  fflush(stdout);
  rg_spec_destroy(s->spec);
  rg_context_destroy(s->ctx);
}

static subject begin(const char *device, const char *host) {
  subject s = {.device = device, .host = host};
  rg_error e = {0};
  if (rg_context_create(NULL, &s.ctx, &e) != RG_OK) die(&e);
  return s;
}

static void chain(int nodes, const char *device, const char *host) {
  subject s = begin(device, host);
  rg_error e = {0};
  rgi_buf b;
  rgi_buf_init(&b, s.ctx);
  rgi_buf_printf(&b, "{\"regraph\":1,\"name\":\"chain\",\"inputs\":{\"x0\":{\"shape\":[\"T\",64],"
                     "\"dtype\":\"f32\",\"grad\":true}},\"nodes\":[");
  for (int i = 0; i < nodes; i++)
    rgi_buf_printf(&b,
                   "%s{\"name\":\"n%d\",\"op\":\"silu\",\"in\":{\"x\":\"x%d\"},\"out\":{\"y\":"
                   "\"x%d\"}}",
                   i ? "," : "", i, i, i + 1);
  rgi_buf_printf(&b, "],\"outputs\":{\"y\":\"x%d\"}}", nodes);
  if (rg_spec_load_text(s.ctx, b.data, b.size, "chain", NULL, 0, &s.spec, &e) != RG_OK) die(&e);
  rgi_buf_free(&b);
  s.set[s.nset++] = (rg_binding){"T", host ? 1 << 16 : 256, NULL};
  snprintf(s.name, sizeof s.name, "chain of %d", nodes);
  sweep(&s);
}

static void model(const char *file, int layers, long tokens, const char *device, const char *host) {
  subject s = begin(device, host);
  rg_error e = {0};
  const rg_binding params[] = {{"layers", layers, NULL}};
  char path[256];
  snprintf(path, sizeof path, RG_SOURCE_DIR "/examples/%s.json", file);
  if (rg_spec_load_file(s.ctx, path, params, 1, &s.spec, &e) != RG_OK) die(&e);
  s.set[s.nset++] = (rg_binding){"T", tokens, NULL};
  s.set[s.nset++] = (rg_binding){"B", 1, NULL};
  snprintf(s.name, sizeof s.name, "%s, %d layers, %ldK", file, layers, tokens >> 10);
  sweep(&s);
}

static void draw_graph(subject *s, int seed, int nodes, int reach) {
  rg_error e = {0};
  uint64_t state = (uint64_t)seed * 1000003 + 4242;
  rg_spec_destroy(s->spec);
  if (rgi_random_spec_near(s->ctx, &state, nodes, reach, &s->spec, &e) != RG_OK) die(&e);
}

static void random_graph(int seed, int nodes, const char *device, const char *host) {
  subject s = begin(device, host);
  draw_graph(&s, seed, nodes, nodes);
  s.set[s.nset++] = (rg_binding){"T", host ? 1 << 16 : 256, NULL};
  snprintf(s.name, sizeof s.name, "random %d of %d", seed, nodes);
  sweep(&s);
}

/* The smallest graph of so many candidates, or a tenth more. reach 0: any value may be read
 * again. */
static void random_of(int seed, int candidates, int reach, const char *device) {
  subject s = begin(device, NULL);
  s.set[s.nset++] = (rg_binding){"T", 256, NULL};
  for (int nodes = candidates; nodes < 16384; nodes += nodes / 256 + 1) {
    long long peak;
    draw_graph(&s, seed, nodes, reach ? reach : nodes);
    const int n = ask(&s, -1, &peak).candidates;
    if (n < candidates || n > candidates + candidates / 10) continue;
    snprintf(s.name, sizeof s.name, "random %d of %d by %d", seed, nodes, reach ? reach : nodes);
    sweep(&s);
    return;
  }
  fprintf(stderr, "random %d by %d: no graph of %d candidates\n", seed, reach, candidates);
  rg_spec_destroy(s.spec);
  rg_context_destroy(s.ctx);
}

/* Each size with values read far and near, on either device. */
static void random_seed(int seed, const char *const *device) {
  static const int size[] = {30, 60, 100, 142, 200}, reach[] = {0, 48, 12, 4};
  const int n = size[seed / EACH], i = seed % EACH, r = reach[i / 2 % 4];
  random_of(seed, n, r || n <= 60 ? r : n, device[i % 2]);
}

int main(int argc, char **argv) {
  static const char *const every[] = {"chains", "models", "random", "host"};
  static const char *const device[] = {"cpu", "cuda"};
  const int n = argc > 1 ? argc - 1 : 4;
  printf("%-28s %-5s %-6s %4s  %4s  %6s at %4s  %6s  %7s %5s %6s %6s %4s %4s\n", "graph", "",
         "host", "cand", "low", "gap %", "part", "least", "proved", "all s", "least", "most s",
         "dear", "bad");
  for (int i = 0; i < n; i++) {
    const char *what = argc > 1 ? argv[i + 1] : every[i];
    if (strcmp(what, "chains") == 0) {
      static const int nodes[] = {22, 60, 250, 1000};
      for (int k = 0; k < RGI_COUNT(nodes); k++) chain(nodes[k], "cpu", NULL);
    } else if (strcmp(what, "models") == 0) {
      for (int d = 0; d < 2; d++)
        for (int layers = 12; layers <= 48; layers += 36)
          model("nsa_model", layers, layers == 12 ? 8192 : 4096, device[d], NULL);
    } else if (strcmp(what, "random") == 0) {
      for (int seed = 0; seed < SEEDS; seed++) random_seed(seed, device);
    } else if (*what && strspn(what, "0123456789") == strlen(what) && atoi(what) < SEEDS) {
      random_seed(atoi(what), device);
    } else if (strcmp(what, "host") == 0) {
      model("nsa_model", 12, 8192, "cuda", "40GiB");
      model("nsa_model", 48, 4096, "cuda", "200GiB");
      model("nsa_model", 12, 8192, "cpu", "40GiB");
      chain(60, "cuda", "40GiB");
      for (int seed = 0; seed < 4; seed++) random_graph(seed, 30 + 30 * seed, "cuda", "40GiB");
    } else {
      fprintf(stderr, "planner_bench: there is no family '%s'\n", what);
      return 2;
    }
  }
  return 0;
}
