/* cli/cmd_run.c: `run`: one forward, and a backward if asked for, on given or drawn arrays. */
#include "cli.h"
#include "data.h"
#include "ranks.h"
#include "rows.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct timing {
  double forward_ms, backward_ms; /* backward_ms < 0: it did not run */
} timing;

double cli_model_seconds(const cli *c, bool backward) {
  rg_node_info n;
  double ms = 0;
  for (size_t i = 0; rg_plan_node(c->plan, i, &n) == RG_OK; i++)
    if (n.backward == backward) ms += n.model_ms;
  return ms / 1e3;
}

/* How long backward takes is judged by what became of the judgement of forward. */
static rg_status run_once(cli *c, const data_set *d, timing *t) {
  const double forward = cli_model_seconds(c, false), backward = cli_model_seconds(c, true);
  cli_progress_expect(c, "running forward", forward, false);
  double start = cli_seconds();
  t->backward_ms = -1;
  rg_status s = cli_direction(c, false);
  t->forward_ms = 1e3 * (cli_seconds() - start);
  if (s != RG_OK || !d->backward) return s;
  cli_progress_expect(c, "running backward",
                      forward > 0 ? backward * t->forward_ms / 1e3 / forward : backward, false);
  start = cli_seconds();
  s = cli_direction(c, true);
  t->backward_ms = 1e3 * (cli_seconds() - start);
  return s;
}

/* A name, and "[2, 3]". */
static void result_text(const rg_tensor_info *t, char name[160], char shape[160]) {
  size_t k = (size_t)snprintf(shape, 160, "[");
  for (int j = 0; j < t->rank; j++)
    k += (size_t)snprintf(shape + k, 160 - k, "%s%lld", j ? ", " : "", (long long)t->dim[j]);
  snprintf(shape + k, 160 - k, "]");
  snprintf(name, 160, "%s%s", t->role == RG_GRAD_OUT ? "grad " : "", t->name);
}

static int take_rows(const cli *c, const timing *t, node_row *row) {
  int n = 0;
  rg_node_time x;
  for (size_t i = 0; rg_session_node_time(c->session, i, &x) == RG_OK; i++) {
    if (x.backward && t->backward_ms < 0) continue;
    if (row)
      row[n] = (node_row){.name = x.name,
                          .op = x.op,
                          .backward = x.backward,
                          .ms = x.ms,
                          .flops = x.flops,
                          .bytes = x.bytes};
    n++;
  }
  return n;
}

static void print_rows(const timing *t, const node_row *row, int n) {
  const cli_widths w = rows_fit(row, n, 29);
  fputs(cli_ink(stdout, CLI_BOLD), stdout);
  cli_print_names("node", "op", w);
  printf("%-9s %10s %7s%s\n", "direction", "ms", "share", cli_ink(stdout, CLI_PLAIN));
  for (const node_row *r = row; r < row + n; r++) {
    const double whole = r->backward ? t->backward_ms : t->forward_ms;
    const double share = whole > 0 ? 100 * r->ms / whole : 0;
    fputs(cli_share_ink(share * r->alike), stdout);
    cli_print_names(r->name, r->op, w);
    printf("%-9s %10.3f %5.1f %%", r->backward ? "backward" : "forward", r->ms, share);
    rows_end(r);
  }
}

static rg_status print_nodes(cli *c, const timing *t) {
  const int all = take_rows(c, t, NULL);
  int n = all;
  node_row *row = calloc((size_t)all + 1, sizeof *row);
  if (!row) return cli_nomem(&c->error);
  take_rows(c, t, row);
  const rg_status s = rows_fold(c, row, &n);
  if (s == RG_OK) print_rows(t, row, n);
  rows_free(row, all);
  return s;
}

static void print_results(const data_set *d) {
  char name[160], shape[160];
  int names = 6, shapes = 5;
  for (int i = 0; i < d->ntensor; i++) {
    if (!data_is_result(&d->tensor[i])) continue;
    result_text(&d->tensor[i].info, name, shape);
    names = (int)strlen(name) > names ? (int)strlen(name) : names;
    shapes = (int)strlen(shape) > shapes ? (int)strlen(shape) : shapes;
  }
  const int columns = cli_columns(STDOUT_FILENO);
  const bool extremes = !columns || names + shapes + 51 <= columns;
  printf("%s%-*s %-4s %-*s %10s %10s", cli_ink(stdout, CLI_BOLD), names, "result", "type", shapes,
         "shape", "mean", "rms");
  if (extremes) printf(" %10s %10s", "min", "max");
  puts(cli_ink(stdout, CLI_PLAIN));
  for (int i = 0; i < d->ntensor; i++) {
    const data_tensor *x = &d->tensor[i];
    if (!data_is_result(x)) continue;
    const data_summary y = x->summary;
    result_text(&x->info, name, shape);
    printf("%-*s %-4s %-*s %10.4g %10.4g", names, name, rg_dtype_name(x->info.dtype), shapes, shape,
           y.mean, y.rms);
    if (extremes) printf(" %10.4g %10.4g", y.min, y.max);
    if (y.nonfinite) printf("  (%lld not finite)", (long long)y.nonfinite);
    putchar('\n');
  }
}

static rg_status print_text(cli *c, const data_set *d, const timing *t, const rg_sizes *z) {
  char a[32], b[32];
  printf("%s on %s, %d threads: forward %.2f ms", c->shown, c->args.device, cli_threads(c),
         t->forward_ms);
  if (t->backward_ms >= 0) printf(", backward %.2f ms", t->backward_ms);
  printf("\npeak memory %s predicted, %s measured", rg_human_bytes(z->predicted_peak, a),
         rg_human_bytes(c->arena_peak, b));
  if (z->host) printf(", %s of the host's memory", rg_human_bytes(z->host, a));
  fputs("\n\n", stdout);
  const rg_status s = print_nodes(c, t);
  if (s != RG_OK) return s;
  putchar('\n');
  print_results(d);
  return RG_OK;
}

static void print_json(const cli *c, const data_set *d, const timing *t, const rg_sizes *z) {
  printf("{\"version\": 1, \"spec\": ");
  cli_json_string(stdout, c->args.positional[0]);
  printf(", \"device\": \"%s\", \"threads\": %d, \"seed\": %llu,\n \"predicted_peak_bytes\": %lld, "
         "\"measured_peak_bytes\": %lld, \"saved_bytes\": %lld, \"scratch_bytes\": %lld",
         c->args.device, cli_threads(c), (unsigned long long)c->args.seed,
         (long long)z->predicted_peak, (long long)c->arena_peak, (long long)z->saved,
         (long long)z->scratch);
  if (z->host) printf(", \"host_bytes\": %lld", (long long)z->host);
  fputs(",\n \"forward_ms\": ", stdout);
  cli_json_number(stdout, t->forward_ms);
  fputs(", \"backward_ms\": ", stdout);
  if (t->backward_ms >= 0)
    cli_json_number(stdout, t->backward_ms);
  else
    fputs("null", stdout);

  fputs(",\n \"nodes\": [", stdout);
  rg_node_time n;
  const char *gap = "";
  for (size_t i = 0; rg_session_node_time(c->session, i, &n) == RG_OK; i++) {
    if (n.backward && t->backward_ms < 0) continue;
    printf("%s\n  {\"name\": ", gap);
    cli_json_string(stdout, n.name);
    fputs(", \"op\": ", stdout);
    cli_json_string(stdout, n.op);
    printf(", \"direction\": \"%s\", \"ms\": ", n.backward ? "backward" : "forward");
    cli_json_number(stdout, n.ms);
    fputs(", \"model_ms\": ", stdout);
    cli_json_number(stdout, n.model_ms);
    rg_node_work work = {n.flops, n.bytes, n.roofline_ms};
    rg_session_node_work(c->session, i, &work, NULL);
    fputs(", \"flops\": ", stdout);
    cli_json_number(stdout, work.flops);
    fputs(", \"bytes\": ", stdout);
    cli_json_number(stdout, work.bytes);
    putchar('}');
    gap = ",";
  }

  fputs("],\n \"results\": [", stdout);
  gap = "";
  for (int i = 0; i < d->ntensor; i++) {
    const data_tensor *x = &d->tensor[i];
    if (!data_is_result(x)) continue;
    printf("%s\n  {\"name\": ", gap);
    cli_json_string(stdout, x->info.name);
    printf(", \"role\": \"%s\", \"dtype\": \"%s\", \"shape\": [",
           x->info.role == RG_OUTPUT ? "output" : "gradient", rg_dtype_name(x->info.dtype));
    for (int j = 0; j < x->info.rank; j++)
      printf("%s%lld", j ? ", " : "", (long long)x->info.dim[j]);
    const data_summary y = x->summary;
    const double number[] = {y.mean, y.rms, y.min, y.max};
    static const char *const label[] = {"mean", "rms", "min", "max"};
    putchar(']');
    for (int j = 0; j < 4; j++) {
      printf(", \"%s\": ", label[j]);
      cli_json_number(stdout, number[j]);
    }
    printf(", \"nonfinite\": %lld}", (long long)y.nonfinite);
    gap = ",";
  }
  puts("]}");
}

/* A graph that was replayed has no times of its steps: then there is nothing to show. */
static rg_status write_reports(cli *c, const timing *t) {
  rg_node_time n;
  size_t steps = 0;
  double sum = 0;
  while (rg_session_node_time(c->session, steps, &n) == RG_OK) steps++;
  double *ms = calloc(steps + 1, sizeof *ms);
  if (!ms) return cli_nomem(&c->error);
  for (size_t i = 0; i < steps; i++) {
    rg_session_node_time(c->session, i, &n);
    ms[i] = n.backward && t->backward_ms < 0 ? 0 : n.ms;
    sum += ms[i];
  }
  const cli_measured m = {ms, steps, t->forward_ms, t->backward_ms > 0 ? t->backward_ms : 0,
                          "one run"};
  const rg_status s = cli_write_reports(c, sum > 0 ? &m : NULL);
  free(ms);
  return s;
}

rg_status cli_require_runner(cli *c) {
  return rg_device_check(c->args.device, &c->error);
}

rg_status cli_cmd_run(cli *c) {
  data_set d = {0};
  timing t;
  rg_sizes z;
  rg_status s = cli_ranks_place(c);
  if (s == RG_OK) s = cli_open(c);
  if (s == RG_OK) s = cli_require_runner(c);
  if (s == RG_OK) s = cli_reports_open(c);
  if (s == RG_OK) s = data_open(c, &d);
  if (s == RG_OK) cli_default_sequences(c);
  if (s == RG_OK) s = cli_make_plan(c);
  const bool ranks = cli_ranks(c) > 1;
  if (s == RG_OK) s = cli_ranks_check(c);
  if (s == RG_OK && !ranks) s = cli_make_session(c, c->args.eager);
  if (s == RG_OK) s = data_bind(c, &d);
  if (s == RG_OK && ranks) s = cli_ranks_open(c, &d);
  if (s == RG_OK) s = run_once(c, &d, &t);
  data_blame(c, &d);
  cli_progress_end(c);
  if (s == RG_OK) s = ranks ? cli_ranks_gather(c, &d) : data_fetch(c, &d);
  const bool writes = cli_ranks_writes(c);
  if (s == RG_OK && writes) s = data_write(c, &d);
  if (s == RG_OK && writes) {
    data_summaries(c, &d);
    rg_plan_sizes(c->plan, &z);
    if (c->args.json)
      print_json(c, &d, &t, &z);
    else
      s = print_text(c, &d, &t, &z);
    if (s == RG_OK) s = write_reports(c, &t);
  }
  cli_ranks_close(c);
  rg_session_destroy(c->session); /* before the memory it is bound to */
  c->session = NULL;
  data_close(c, &d);
  return s;
}
