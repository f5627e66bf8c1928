/* cli/cmd_bench.c: `bench`: medians per node and direction, set against what the machine can do at
   best.

   --profile-out turns the measurement into a device profile: it plans with a raw profile of the
   measured peak rates (every op at 100 %), so that the cost model's milliseconds are the roofline,
   and then writes for each op the fraction of it that the op reached.
 */
#include "cli.h"
#include "data.h"
#include "ranks.h"
#include "peak.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RAW_STEP_US 1.0

typedef struct row {
  rg_node_time node; /* of the last run */
  rg_node_work work; /* at the lengths that were bound */
  double *ms;        /* per repeat; sorted once the median is taken */
  double median;
} row;

typedef struct bench {
  data_set data;
  row *row;
  int nrow;
  double *forward, *backward; /* ms per repeat */
  double *outside;            /* ms per repeat that no node accounts for */
  double forward_ms, backward_ms, outside_ms;
  peak_rates peak;
} bench;

static bool on_gpu(const cli *c) {
  return strcmp(c->args.device, "cuda") == 0;
}

static rg_status prepare(cli *c, bench *b) {
  rg_tensor_info info;
  for (size_t i = 0; rg_plan_tensor(c->plan, i, &info) == RG_OK; i++)
    b->data.backward |= info.role == RG_GRAD_OUT;
  rg_status s = data_bind(c, &b->data);
  if (s != RG_OK) return s;
  b->forward = calloc((size_t)c->args.repeat, sizeof *b->forward);
  b->backward = calloc((size_t)c->args.repeat, sizeof *b->backward);
  b->outside = calloc((size_t)c->args.repeat, sizeof *b->outside);
  return b->forward && b->backward && b->outside ? RG_OK : cli_nomem(&c->error);
}

/* A direction and its end; seconds in *took. */
static rg_status run_direction(cli *c, bool backward, double *took) {
  double start = cli_seconds();
  rg_status s = cli_direction(c, backward);
  *took = cli_seconds() - start;
  return s;
}

/* One run of both directions; repeat -1 is the warm-up. On a GPU, whole: replayed
 * as graphs, not node by node. */
static rg_status run_once(cli *c, bench *b, int64_t repeat, bool whole) {
  double forward, backward = 0;
  rg_status s = run_direction(c, false, &forward);
  if (s == RG_OK && b->data.backward) s = run_direction(c, true, &backward);
  if (s != RG_OK || repeat < 0) return s;
  if (whole || !on_gpu(c)) {
    b->forward[repeat] = 1e3 * forward;
    b->backward[repeat] = 1e3 * backward;
  }
  if (whole) return RG_OK;
  double inside = 0;
  for (int i = 0; i < b->nrow; i++) {
    rg_session_node_time(c->session, (size_t)i, &b->row[i].node);
    b->row[i].ms[repeat] = b->row[i].node.ms;
    if (!b->row[i].node.backward || b->data.backward) inside += b->row[i].node.ms;
  }
  b->outside[repeat] = b->forward[repeat] + b->backward[repeat] - inside;
  return RG_OK;
}

/* The directions as graphs; then a session that launches node by node takes over. */
static rg_status measure_whole(cli *c, bench *b) {
  rg_status s = RG_OK;
  for (int64_t r = -2; s == RG_OK && r < c->args.repeat; r++) {
    cli_progress(c, "timing whole directions", (double)(r + 2), (double)(c->args.repeat + 2));
    s = run_once(c, b, r < 0 ? -1 : r, true);
  }
  if (s != RG_OK) return s;
  rg_session_destroy(c->session);
  c->session = NULL;
  s = cli_make_session(c, true);
  return s == RG_OK ? data_rebind(c, &b->data) : s;
}

static rg_status measure(cli *c, bench *b) {
  int64_t repeat = c->args.repeat;
  rg_status s = on_gpu(c) && !c->args.eager ? measure_whole(c, b) : RG_OK;
  if (s != RG_OK) return s;
  cli_progress_expect("warming up", cli_model_seconds(c, false) + cli_model_seconds(c, true),
                      false);
  const double start = cli_seconds();
  s = run_once(c, b, -1, false);
  if (s != RG_OK) return s;
  cli_progress_expect("timing", (double)repeat * (cli_seconds() - start), false);
  rg_node_time n;
  int count = 0;
  while (rg_session_node_time(c->session, (size_t)count, &n) == RG_OK) count++;
  b->row = calloc((size_t)count + 1, sizeof *b->row);
  if (!b->row) return cli_nomem(&c->error);
  for (; b->nrow < count; b->nrow++)
    if (!(b->row[b->nrow].ms = calloc((size_t)repeat, sizeof(double)))) return cli_nomem(&c->error);
  for (int64_t r = 0; s == RG_OK && r < repeat; r++) {
    if (r > 0) cli_progress(c, "timing", (double)r, (double)repeat);
    s = run_once(c, b, r, false);
  }
  cli_progress_end();
  for (int i = 0; s == RG_OK && i < b->nrow; i++) {
    s = rg_session_node_work(c->session, (size_t)i, &b->row[i].work, &c->error);
    b->row[i].median = cli_median(b->row[i].ms, (int)repeat);
  }
  b->forward_ms = cli_median(b->forward, (int)repeat);
  b->backward_ms = cli_median(b->backward, (int)repeat);
  b->outside_ms = cli_median(b->outside, (int)repeat);
  return s;
}

static void free_bench(const cli *c, bench *b) {
  for (int i = 0; i < b->nrow; i++) free(b->row[i].ms);
  free(b->row);
  free(b->forward);
  free(b->backward);
  free(b->outside);
  data_close(c, &b->data);
}

/* ---- reports ---- */

/* Units of 10^9 a second. */
static double rate(double work, double ms) {
  return ms > 0 ? 1e-6 * work / ms : 0;
}

/* Milliseconds at best: either the multiply-adds or the bytes take that long. */
static double roofline_ms(const bench *b, const rg_node_work *n) {
  if (b->peak.matrix_gflops <= 0) return n->roofline_ms; /* a GPU: what the plan's profile says */
  double matrix = b->peak.matrix_gflops > 0 ? 1e-6 * n->flops / b->peak.matrix_gflops : 0;
  double bytes = b->peak.bandwidth_gbs > 0 ? 1e-6 * n->bytes / b->peak.bandwidth_gbs : 0;
  return matrix > bytes ? matrix : bytes;
}

/* Time of a direction that a row takes, in percent. */
static double share(const bench *b, const row *r) {
  const double whole = r->node.backward ? b->backward_ms : b->forward_ms;
  return whole > 0 ? 100 * r->median / whole : 0;
}

static void print_nodes(const bench *b) {
  int node = 0, op = 0;
  bool cached = false;
  for (int i = 0; i < b->nrow; i++) {
    const rg_node_time *n = &b->row[i].node;
    node = (int)strlen(n->name) > node ? (int)strlen(n->name) : node;
    op = (int)strlen(n->op) > op ? (int)strlen(n->op) : op;
  }
  const cli_widths w = cli_fit(node, op, 49);
  fputs(cli_ink(stdout, CLI_BOLD), stdout);
  cli_print_names("node", "op", w);
  printf("%-9s %10s %9s %8s %9s%s\n", "direction", "ms", "GFLOP/s", "GB/s", "roofline",
         cli_ink(stdout, CLI_PLAIN));
  for (int i = 0; i < b->nrow; i++) {
    const row *r = &b->row[i];
    if (r->node.backward && !b->data.backward) continue;
    const double best = r->median > 0 ? 100 * roofline_ms(b, &r->work) / r->median : 0;
    fputs(cli_share_ink(share(b, r)), stdout);
    cli_print_names(r->node.name, r->node.op, w);
    printf("%-9s %10.3f %9.1f %8.2f %7.1f %%%s%s\n", r->node.backward ? "backward" : "forward",
           r->median, rate(r->work.flops, r->median), rate(r->work.bytes, r->median), best,
           best > 100 ? "*" : "", cli_ink(stdout, CLI_PLAIN));
    cached = cached || best > 100;
  }
  if (cached)
    cli_wrap(stdout,
             "* over 100 %: its data came from a cache, and the roofline is drawn for memory", 0,
             cli_page(stdout));
}

static void print_text(const cli *c, const bench *b, const rg_sizes *z) {
  char p[32], m[32];
  printf("%s on %s, %d threads, median of %lld: forward %.2f ms", c->shown, c->args.device,
         cli_threads(c), (long long)c->args.repeat, b->forward_ms);
  if (b->data.backward) printf(", backward %.2f ms", b->backward_ms);
  printf("\npeak memory %s predicted, %s measured\n", cli_bytes(z->predicted_peak, p),
         cli_bytes(c->arena_peak, m));
  if (on_gpu(c))
    printf("whole directions: %s; nodes: launched one by one\n\n",
           c->args.eager ? "the same" : "replayed graphs");
  else
    printf("machine: %.0f GFLOP/s in fp32, %.1f GB/s\n\n", b->peak.matrix_gflops,
           b->peak.bandwidth_gbs);
  print_nodes(b);
}

static void print_field(const char *name, double x) {
  printf(", \"%s\": ", name);
  cli_json_number(stdout, x);
}

static void print_json(const cli *c, const bench *b, const rg_sizes *z) {
  printf("{\"version\": 1, \"spec\": ");
  cli_json_string(stdout, c->args.positional[0]);
  printf(", \"device\": \"%s\", \"threads\": %d, \"repeat\": %lld", c->args.device, cli_threads(c),
         (long long)c->args.repeat);
  print_field("forward_ms", b->forward_ms);
  if (b->data.backward)
    print_field("backward_ms", b->backward_ms);
  else
    fputs(", \"backward_ms\": null", stdout);
  printf(",\n \"predicted_peak_bytes\": %lld, \"measured_peak_bytes\": %lld,\n \"machine\": "
         "{\"threads\": %d",
         (long long)z->predicted_peak, (long long)c->arena_peak, cli_threads(c));
  print_field("matrix_gflops", b->peak.matrix_gflops);
  print_field("special_gops", b->peak.special_gops);
  print_field("bandwidth_gbs", b->peak.bandwidth_gbs);
  fputs("},\n \"nodes\": [", stdout);
  const char *gap = "";
  for (int i = 0; i < b->nrow; i++) {
    const row *r = &b->row[i];
    if (r->node.backward && !b->data.backward) continue;
    printf("%s\n  {\"name\": ", gap);
    cli_json_string(stdout, r->node.name);
    fputs(", \"op\": ", stdout);
    cli_json_string(stdout, r->node.op);
    printf(", \"direction\": \"%s\"", r->node.backward ? "backward" : "forward");
    print_field("ms", r->median);
    print_field("gflops", rate(r->work.flops, r->median));
    print_field("gbs", rate(r->work.bytes, r->median));
    print_field("roofline", r->median > 0 ? roofline_ms(b, &r->work) / r->median : 0);
    print_field("model_ms", r->node.model_ms);
    putchar('}');
    gap = ",";
  }
  puts("]}");
}

/* ---- profiles ---- */

static void write_profile(FILE *f, const bench *b, int threads, double step_us, double efficiency) {
  char host[128] = "cpu";
  gethostname(host, sizeof host - 1);
  fputs("{\n  \"regraph_profile\": 1,\n  \"name\": ", f);
  cli_json_string(f, host);
  fprintf(f, ",\n  \"device\": \"cpu\",\n  \"threads\": %d,\n", threads);
  fprintf(f, "  \"matrix_gflops\": {\"f32\": %.6g, \"f16\": %.6g, \"bf16\": %.6g},\n",
          b->peak.matrix_gflops,
          /* the CPU computes in fp32 whatever it stores */
          b->peak.matrix_gflops, b->peak.matrix_gflops);
  fprintf(f, "  \"special_gops\": %.6g,\n  \"bandwidth_gbs\": %.6g,\n  \"step_us\": %.6g,\n",
          b->peak.special_gops, b->peak.bandwidth_gbs, step_us);
  fprintf(f, "  \"memory\": %lld,\n  \"efficiency\": %.4g,\n  \"ops\": {",
          (long long)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE), efficiency);
}

/* Plans with a profile of the bare peak rates, in a file without a name, which nothing can leave
 * behind. */
static rg_status plan_raw(cli *c, const bench *b) {
  char path[64];
  FILE *f = tmpfile();
  rg_status s = RG_OK;
  if (f) {
    write_profile(f, b, cli_threads(c), RAW_STEP_US, 1);
    fputs("}\n}\n", f);
  }
  if (!f || fflush(f) != 0 || fseek(f, 0, SEEK_SET) != 0) {
    s = cli_fail(&c->error, RG_E_IO, NULL, "a temporary profile can't be written: %s",
                 strerror(errno));
  } else {
    snprintf(path, sizeof path, "/dev/fd/%d", fileno(f));
    s = cli_make_plan(c, path);
  }
  if (f) fclose(f);
  return s;
}

/* Fraction of the roofline that all nodes of one op reach together; op NULL: all nodes. */
static double op_efficiency(const bench *b, const char *op) {
  double best = 0, took = 0;
  for (int i = 0; i < b->nrow; i++) {
    if (op && strcmp(b->row[i].node.op, op) != 0) continue;
    best += b->row[i].work.roofline_ms; /* of the raw profile */
    took += b->row[i].median;
  }
  double x = took > 0 ? best / took : 1;
  return x < 1e-4 ? 1e-4 : x > 1 ? 1 : x;
}

static rg_status save_profile(cli *c, const bench *b) {
  char *text = NULL;
  size_t size = 0;
  FILE *f = open_memstream(&text, &size);
  if (!f) return cli_nomem(&c->error);
  double step_us = b->nrow ? 1e3 * b->outside_ms / b->nrow : 0;
  write_profile(f, b, cli_threads(c), step_us < RAW_STEP_US ? RAW_STEP_US : step_us,
                op_efficiency(b, NULL));
  const char *gap = "";
  for (int i = 0; i < b->nrow; i++) {
    bool first = true;
    for (int j = 0; j < i && first; j++) first = strcmp(b->row[j].node.op, b->row[i].node.op) != 0;
    if (!first) continue;
    fprintf(f, "%s\n    ", gap);
    cli_json_string(f, b->row[i].node.op);
    fprintf(f, ": %.4g", op_efficiency(b, b->row[i].node.op));
    gap = ",";
  }
  fputs("\n  }\n}\n", f);
  rg_status s = RG_OK;
  if (fclose(f) != 0)
    s = cli_nomem(&c->error);
  else
    s = cli_write_file(c, c->args.profile_out, text, size);
  free(text);
  return s;
}

rg_status cli_cmd_bench(cli *c) {
  bench b = {0};
  rg_sizes z;
  const cli_args *a = &c->args;
  if (a->profile && a->profile_out)
    return cli_fail(&c->error, RG_E_USAGE, "regraph bench",
                    "--profile and --profile-out exclude each other");
  if (a->repeat > 100000)
    return cli_fail(&c->error, RG_E_USAGE, "regraph bench", "--repeat %lld: at most 100000",
                    (long long)a->repeat);
  rg_status s = cli_open(c);
  if (s == RG_OK) s = cli_require_runner(c);
  if (s != RG_OK) return s;
  if (on_gpu(c) && a->profile_out)
    return cli_fail(&c->error, RG_E_USAGE, "regraph bench", "--profile-out measures the CPU only");
  s = cli_writable(c, a->profile_out);
  if (s != RG_OK) return s;
  if (!on_gpu(c)) {
    cli_progress(c, "measuring the machine", 0, 0);
    peak_measure(cli_threads(c), &b.peak);
  }
  s = data_open(c, &b.data);
  if (s == RG_OK) cli_default_sequences(c);
  if (s == RG_OK) s = a->profile_out ? plan_raw(c, &b) : cli_make_plan(c, NULL);
  const bool ranks = cli_ranks(c) > 1;
  if (s == RG_OK && !ranks) s = cli_make_session(c, a->eager);
  if (s == RG_OK) s = prepare(c, &b);
  if (s == RG_OK && ranks) s = cli_ranks_open(c, &b.data);
  if (s == RG_OK) s = measure(c, &b);
  if (s == RG_OK && a->profile_out) s = save_profile(c, &b);
  if (s == RG_OK) {
    rg_plan_sizes(c->plan, &z);
    if (a->json)
      print_json(c, &b, &z);
    else
      print_text(c, &b, &z);
  }
  cli_ranks_close(c);
  rg_session_destroy(c->session); /* before the memory it is bound to */
  c->session = NULL;
  free_bench(c, &b);
  return s;
}
