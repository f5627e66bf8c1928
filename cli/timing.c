/* cli/timing.c: see timing.h. */
#include "timing.h"
#include "ranks.h"
#include <stdlib.h>
#include <string.h>

enum { ENOUGH = 3 };

rg_status timing_prepare(cli *c, timing *t) {
  rg_tensor_info info;
  for (size_t i = 0; rg_plan_tensor(c->plan, i, &info) == RG_OK; i++)
    t->data.backward |= info.role == RG_GRAD_OUT;
  rg_status s = data_bind(c, &t->data);
  if (s != RG_OK) return s;
  t->forward = calloc((size_t)c->args.repeat, sizeof *t->forward);
  t->backward = calloc((size_t)c->args.repeat, sizeof *t->backward);
  return t->forward && t->backward ? RG_OK : cli_nomem(&c->error);
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
static rg_status run_once(cli *c, timing *t, int64_t repeat, bool whole) {
  double forward, backward = 0;
  rg_status s = run_direction(c, false, &forward);
  if (s == RG_OK && t->data.backward) s = run_direction(c, true, &backward);
  if (s != RG_OK || repeat < 0) return s;
  if (whole || !cli_on_gpu(c) || c->ranks) {
    t->forward[repeat] = 1e3 * forward;
    t->backward[repeat] = 1e3 * backward;
  }
  if (whole) return RG_OK;
  for (int i = 0; i < t->nrow; i++) {
    rg_session_node_time(c->session, (size_t)i, &t->row[i].node);
    t->row[i].ms[repeat] = t->row[i].node.ms;
  }
  return RG_OK;
}

/* The directions as graphs; then a session that launches node by node takes over. */
static rg_status measure_whole(cli *c, timing *t) {
  rg_status s = RG_OK;
  for (int64_t r = -2; s == RG_OK && r < c->args.repeat; r++) {
    cli_progress(c, "timing whole directions", (double)(r + 2), (double)(c->args.repeat + 2));
    s = run_once(c, t, r < 0 ? -1 : r, true);
  }
  if (s != RG_OK) return s;
  rg_session_destroy(c->session);
  c->session = NULL;
  s = cli_make_session(c, true);
  return s == RG_OK ? data_rebind(c, &t->data) : s;
}

rg_status timing_measure(cli *c, timing *t, bool whole, double seconds) {
  const int64_t repeat = c->args.repeat;
  rg_status s = whole ? measure_whole(c, t) : RG_OK;
  if (s != RG_OK) return s;
  const double forward = cli_model_seconds(c, false), backward = cli_model_seconds(c, true);
  const double warm = cli_seconds();
  cli_progress_expect(c, "warming up", forward + backward, false);
  s = run_once(c, t, -1, false);
  if (s != RG_OK) return s;
  cli_progress_expect(c, "timing", (double)repeat * (cli_seconds() - warm), false);
  rg_node_time n;
  int count = 0;
  while (rg_session_node_time(c->session, (size_t)count, &n) == RG_OK) count++;
  t->row = calloc((size_t)count + 1, sizeof *t->row);
  if (!t->row) return cli_nomem(&c->error);
  for (; t->nrow < count; t->nrow++)
    if (!(t->row[t->nrow].ms = calloc((size_t)repeat, sizeof(double)))) return cli_nomem(&c->error);
  const double start = cli_seconds();
  int64_t done = 0;
  for (; s == RG_OK && done < repeat; done++) {
    if (seconds > 0 && done >= ENOUGH && cli_seconds() - start > seconds) break;
    if (done > 0) cli_progress(c, "timing", (double)done, (double)repeat);
    s = run_once(c, t, done, false);
  }
  cli_progress_end(c);
  for (int i = 0; s == RG_OK && i < t->nrow; i++) {
    s = rg_session_node_work(c->session, (size_t)i, &t->row[i].work, &c->error);
    t->row[i].median = cli_median(t->row[i].ms, (int)done);
  }
  if (s != RG_OK) return s;
  t->forward_ms = cli_median(t->forward, (int)(whole ? repeat : done));
  t->backward_ms = cli_median(t->backward, (int)(whole ? repeat : done));
  return RG_OK;
}

void timing_free(const cli *c, timing *t) {
  for (int i = 0; i < t->nrow; i++) free(t->row[i].ms);
  free(t->row);
  free(t->forward);
  free(t->backward);
  data_close(c, &t->data);
  *t = (timing){0};
}
