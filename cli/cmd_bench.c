/* cli/cmd_bench.c: `bench`: medians per node and direction, set against what the machine can do at
   best. */
#include "bench_serve.h"
#include "peak.h"
#include "ranks.h"
#include "rows.h"
#include "timing.h"
#include <stdlib.h>
#include <string.h>

typedef struct bench {
  timing t;
  peak_rates peak;
} bench;

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

/* Time of a direction that a row's nodes take, in percent. */
static double share(const bench *b, const node_row *r) {
  const double whole = r->backward ? b->t.backward_ms : b->t.forward_ms;
  return whole > 0 ? 100 * r->ms * r->alike / whole : 0;
}

static int take_rows(const bench *b, node_row *row) {
  int n = 0;
  for (int i = 0; i < b->t.nrow; i++) {
    const timing_row *r = &b->t.row[i];
    if (r->node.backward && !b->t.data.backward) continue;
    row[n++] = (node_row){.name = r->node.name,
                          .op = r->node.op,
                          .backward = r->node.backward,
                          .ms = r->median,
                          .flops = r->work.flops,
                          .bytes = r->work.bytes,
                          .roofline_ms = roofline_ms(b, &r->work)};
  }
  return n;
}

static void print_rows(const bench *b, const node_row *row, int n) {
  bool cached = false;
  const cli_widths w = rows_fit(row, n, 50);
  fputs(cli_ink(stdout, CLI_BOLD), stdout);
  cli_print_names("node", "op", w);
  printf("%-9s %10s %9s %8s %9s%s\n", "direction", "ms", "GFLOP/s", "GB/s", "roofline",
         cli_ink(stdout, CLI_PLAIN));
  for (const node_row *r = row; r < row + n; r++) {
    const double best = r->ms > 0 ? 100 * r->roofline_ms / r->ms : 0;
    fputs(cli_share_ink(share(b, r)), stdout);
    cli_print_names(r->name, r->op, w);
    printf("%-9s %10.3f %9.1f %8.2f %7.1f %%%s", r->backward ? "backward" : "forward", r->ms,
           rate(r->flops, r->ms), rate(r->bytes, r->ms), best,
           best > 100     ? "*"
           : r->alike > 1 ? " "
                          : "");
    rows_end(r);
    cached = cached || best > 100;
  }
  if (cached)
    cli_wrap(stdout,
             "* over 100 %: its data came from a cache, and the roofline is drawn for memory", 0,
             cli_page(stdout));
}

static rg_status print_nodes(cli *c, const bench *b) {
  node_row *row = calloc((size_t)b->t.nrow + 1, sizeof *row);
  if (!row) return cli_nomem(&c->error);
  int n = take_rows(b, row);
  const rg_status s = rows_fold(c, row, &n);
  if (s == RG_OK) print_rows(b, row, n);
  rows_free(row, b->t.nrow);
  return s;
}

static rg_status print_text(cli *c, const bench *b, const rg_sizes *z) {
  char p[32], m[32];
  printf("%s on %s, %d threads, median of %lld: forward %.2f ms", c->shown, c->args.device,
         cli_threads(c), (long long)c->args.repeat, b->t.forward_ms);
  if (b->t.data.backward) printf(", backward %.2f ms", b->t.backward_ms);
  printf("\npeak memory %s predicted, %s measured\n", rg_human_bytes(z->predicted_peak, p),
         rg_human_bytes(c->arena_peak, m));
  if (cli_on_gpu(c))
    printf("whole directions: %s; nodes: launched one by one\n\n",
           c->args.eager || c->ranks ? "the same" : "replayed graphs");
  else
    printf("machine: %.0f GFLOP/s in fp32, %.1f GB/s\n\n", b->peak.matrix_gflops,
           b->peak.bandwidth_gbs);
  return print_nodes(c, b);
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
  print_field("forward_ms", b->t.forward_ms);
  if (b->t.data.backward)
    print_field("backward_ms", b->t.backward_ms);
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
  for (int i = 0; i < b->t.nrow; i++) {
    const timing_row *r = &b->t.row[i];
    if (r->node.backward && !b->t.data.backward) continue;
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

/* Medians, as they are printed. */
static rg_status write_reports(cli *c, const bench *b) {
  char how[48];
  double *ms = calloc((size_t)b->t.nrow + 1, sizeof *ms);
  if (!ms) return cli_nomem(&c->error);
  for (int i = 0; i < b->t.nrow; i++) ms[i] = b->t.row[i].median;
  snprintf(how, sizeof how, "median of %lld", (long long)c->args.repeat);
  const cli_measured m = {ms, (size_t)b->t.nrow, b->t.forward_ms, b->t.backward_ms, how};
  const rg_status s = cli_write_reports(c, &m);
  free(ms);
  return s;
}

rg_status cli_cmd_bench(cli *c) {
  bench b = {0};
  rg_sizes z;
  cli_args *a = &c->args;
  if (!a->repeat) a->repeat = 5;
  const bool gpu = cli_on_gpu(c);
  if (a->repeat > 100000)
    return cli_fail(&c->error, RG_E_USAGE, "regraph bench", "--repeat %lld: at most 100000",
                    (long long)a->repeat);
  rg_status s = cli_open(c);
  if (s == RG_OK) s = cli_require_runner(c);
  if (s == RG_OK) s = cli_reports_open(c);
  if (s == RG_OK && a->serve) return bench_serve(c);
  if (s != RG_OK) return s;
  if (!gpu) {
    cli_progress(c, "measuring the machine", 0, 0);
    peak_measure(cli_threads(c), &b.peak);
  }
  s = data_open(c, &b.t.data);
  if (s == RG_OK) cli_default_sequences(c);
  if (s == RG_OK) s = cli_make_plan(c);
  const bool ranks = cli_ranks(c) > 1;
  if (s == RG_OK) s = cli_ranks_alone(c);
  if (s == RG_OK && !ranks) s = cli_make_session(c, a->eager);
  if (s == RG_OK) s = timing_prepare(c, &b.t);
  if (s == RG_OK && ranks) s = cli_ranks_open(c, &b.t.data);
  if (s == RG_OK) s = timing_measure(c, &b.t, gpu && !a->eager && !ranks, 0);
  if (s == RG_OK) {
    rg_plan_sizes(c->plan, &z);
    if (a->json)
      print_json(c, &b, &z);
    else
      s = print_text(c, &b, &z);
    if (s == RG_OK) s = write_reports(c, &b);
  }
  cli_ranks_close(c);
  rg_session_destroy(c->session); /* before the memory it is bound to */
  c->session = NULL;
  timing_free(c, &b.t);
  return s;
}
