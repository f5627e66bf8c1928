/* report/report.c: what a plan says about itself: the one-screen report, timelines, dumps. Other
   files write the rest.

   Reads finished plans only; numbers come from the passes that made them. Equal plans give equal
   text.
 */
#include "report.h"

#include <stdio.h>
#include <string.h>

enum { TIMELINE_COLUMNS = 100, LEAST_COLUMNS = 40, MOST_COLUMNS = 400 };

static void shape(rgi_buf *b, const rg_tensor_info *t) {
  for (int a = 0; a < t->rank; a++)
    rgi_buf_printf(b, "%s%lld", a ? ", " : "", (long long)t->dim[a]);
}

/* ---- text ---- */

/* A spec node's share of the plan: its clones and head groups together. */
typedef struct share {
  int steps;
  double forward_ms, backward_ms;
} share;

/* Per spec node, and behind them what belongs to none (sums, casts): all[norigin + 1]. */
static void find_shares(const rg_plan *plan, share *all) {
  const rgi_graph *g = plan->graph;
  for (int32_t i = 0; i <= g->norigin; i++) all[i] = (share){0};
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *s = &plan->step[i];
    const rgi_node *n = &g->node[s->node];
    if (rgi_is_copy(g, s->node)) continue;
    share *r = &all[n->origin < 0 ? g->norigin : n->origin];
    r->steps++;
    *(n->backward ? &r->backward_ms : &r->forward_ms) += s->ms;
  }
}

static void write_capacity(const rg_plan *plan, rgi_buf *b) {
  rgi_buf_printf(b, "capacity");
  for (int i = 0; i < plan->nfree; i++)
    rgi_buf_printf(b, "%s %s = %lld", i ? "," : "", plan->free_name[i],
                   (long long)plan->free_value[i]);
  rgi_buf_printf(b, "\n");
  for (int32_t i = 0; i < plan->nbindable; i++) {
    const rg_tensor_info *t = &plan->bindable[i].info;
    const char *role = t->role == RG_INPUT    ? "input"
                       : t->role == RG_STATE  ? "state"
                       : t->role == RG_OUTPUT ? "output"
                                              : NULL;
    if (!role) continue;
    bool grad = false;
    for (int32_t k = 0; k < plan->nbindable; k++)
      grad |= plan->bindable[k].info.role == RG_GRAD_OUT && t->role == RG_INPUT &&
              strcmp(plan->bindable[k].info.name, t->name) == 0;
    char human[32];
    rgi_buf_printf(b, "  %-6s %-14s %-4s [", role, t->name, rg_dtype_name(t->dtype));
    shape(b, t);
    rgi_buf_printf(b, "]  %s%s\n", rg_human_bytes(t->bytes, human), grad ? ", gradient" : "");
  }
}

static void write_nodes(const rg_plan *plan, rgi_buf *b) {
  const rgi_graph *g = plan->graph;
  share *all = rgi_malloc(plan->ctx, ((size_t)g->norigin + 1) * sizeof *all);
  if (!all) {
    b->failed = true;
    return;
  }
  find_shares(plan, all);
  rgi_buf_printf(b, "nodes%*s%-14s %10s %10s\n", 13, "", "op", "fwd ms", "bwd ms");
  double forward = 0, backward = 0;
  for (int32_t o = 0; o < g->norigin; o++) {
    const share r = all[o];
    forward += r.forward_ms;
    backward += r.backward_ms;
    const rgi_choice_node *c =
        plan->choice && o < plan->choice->nnode ? &plan->choice->node[o] : NULL;
    rgi_buf_printf(b, "  %-15s %-14s", g->origin[o].name, g->origin[o].op->name);
    if (r.steps)
      rgi_buf_printf(b, " %10.4f %10.4f%s\n", r.forward_ms, r.backward_ms,
                     c && c->recomputed ? "  recomputed" : "");
    else
      rgi_buf_printf(b, " %10s %10s\n", "-", "-"); /* a view */
  }
  const share glue = all[g->norigin];
  rgi_free(plan->ctx, all);
  if (glue.steps)
    rgi_buf_printf(b, "  %-15s %-14s %10.4f %10.4f\n", "(sums, casts)", "", glue.forward_ms,
                   glue.backward_ms);
  if (plan->sizes.host)
    rgi_buf_printf(b, "  %-15s %-14s %10.4f %10.4f\n", plan->cuda ? "(waits: copies)" : "(copies)",
                   "", plan->offload_ms[0], plan->offload_ms[1]);
  forward += glue.forward_ms + plan->offload_ms[0];
  backward += glue.backward_ms + plan->offload_ms[1];
  rgi_buf_printf(b, "  %-15s %-14s %10.4f %10.4f  modelled for %s\n", "total", "", forward,
                 backward, plan->profile->name);
  char times[RGI_TIMES];
  rgi_report_times(plan, times, sizeof times);
  rgi_buf_printf(b, "  times           %s\n", times);
}

/* A line per node that could be taken apart, and what it gained together. */
static void write_fusions(const rg_plan *plan, rgi_buf *b) {
  const rgi_fusions *f = plan->fusions;
  char x[32], y[32];
  for (int i = 0; f && i < f->count; i++) {
    const rgi_fusion *a = &f->at[i];
    rgi_buf_printf(b, "  fuse         gradient of %s ", a->name);
    if (a->why) {
      rgi_buf_printf(b, "left whole: %s\n", a->why);
      continue;
    }
    rgi_buf_printf(b, "in %d part%s, %d sum%s handed on", a->parts, a->parts == 1 ? "" : "s",
                   a->deltas, a->deltas == 1 ? "" : "s");
    if (a->nodes > 1) rgi_buf_printf(b, ", %d groups", a->nodes);
    rgi_buf_printf(b, ": moves %s -> %s\n", rg_human_bytes((int64_t)a->before, x),
                   rg_human_bytes((int64_t)a->after, y));
  }
  if (f && f->casts)
    rgi_buf_printf(b, "  fuse         %d cast%s taken over by what adds last: moves %s -> %s\n",
                   f->casts, f->casts == 1 ? "" : "s", rg_human_bytes((int64_t)f->cast_before, x),
                   rg_human_bytes((int64_t)f->cast_after, y));
  if (plan->split_kv && f && f->split)
    rgi_buf_printf(b, "  split_kv     keys of single tokens shared out: %d node%s\n", f->split,
                   f->split == 1 ? "" : "s");
  else if (plan->split_kv)
    rgi_buf_printf(b, "  split_kv     changes nothing: %s\n",
                   !plan->cuda ? "it is for GPUs"
                   : !f        ? "no nodes are joined"
                               : "no node is a layer's step of single tokens as it wants them");
  if (f && f->fused)
    rgi_buf_printf(b, "  fuse         peak %s -> %s, the most bytes alive at once\n",
                   rg_human_bytes(f->peak_before, x), rg_human_bytes(f->peak_after, y));
}

static void write_bytes(const rg_plan *plan, rgi_buf *b) {
  const rg_sizes *z = &plan->sizes;
  const rgi_memory *m = plan->memory;
  const struct {
    const char *name;
    int64_t bytes;
    const char *what;
  } row[] = {{"saved", z->saved, "lives from forward to backward"},
             {"scratch", z->scratch, "the larger of"},
             {"  forward", z->forward_scratch, ""},
             {"  backward", z->backward_scratch, ""},
             {"comm", z->comm, "what collectives send and receive"},
             {"host", z->host, "what is offloaded, not on the device"},
             {"peak", z->predicted_peak, z->comm ? "saved + scratch + comm" : "saved + scratch"},
             {"lower bound", z->lower_bound, "the most bytes alive at once"},
             {"gap", z->predicted_peak - z->lower_bound, ""}};
  char w[32], x[32], y[32], v[32];
  rgi_buf_printf(b, "memory\n");
  for (int i = 0; i < RGI_COUNT(row); i++)
    if (row[i].bytes || (strcmp(row[i].name, "comm") != 0 && strcmp(row[i].name, "host") != 0))
      rgi_buf_printf(b, "  %-12s %12s  %14lld bytes%s%s\n", row[i].name,
                     rg_human_bytes(row[i].bytes, x), (long long)row[i].bytes,
                     *row[i].what ? "  " : "", row[i].what);
  rgi_buf_printf(b, "what each stage gained\n");
  const rgi_choice *c = plan->choice;
  write_fusions(plan, b);
  if (c && c->extra_ms > 0)
    rgi_buf_printf(b, "  recompute    saved %s -> %s, peak %s -> %s, for %.4f ms more\n",
                   rg_human_bytes(c->saved_before, w), rg_human_bytes(c->saved_after, x),
                   rg_human_bytes(c->peak_before, y), rg_human_bytes(c->peak_after, v),
                   c->extra_ms);
  if (z->host)
    rgi_buf_printf(b, "  offload      %s to the host and back, for %.4f ms more%s\n",
                   rg_human_bytes(z->host, x), plan->offload_ms[0] + plan->offload_ms[1],
                   plan->cuda ? " than what runs beside the copies" : "");
  rgi_buf_printf(b, "  in place     spared %s\n", rg_human_bytes(m->inplace_gain, x));
  rgi_buf_printf(b, "  packing      scratch %s -> %s, %s\n", rg_human_bytes(m->no_reuse, x),
                 rg_human_bytes(m->scratch, y),
                 m->forward_optimal && m->backward_optimal ? "proved optimal"
                                                           : "not proved optimal");
}

static void write_text(const rg_plan *plan, rgi_buf *b) {
  const rgi_graph *g = plan->graph;
  rgi_buf_printf(b, "plan of %s for %s", g->name, plan->cuda ? "cuda" : "cpu");
  if (!plan->cuda) rgi_buf_printf(b, ", %d thread%s", plan->threads, plan->threads == 1 ? "" : "s");
  rgi_buf_printf(b, ": %d steps, %d of them backward", plan->nstep, plan->nstep - plan->nforward);
  if (g->groups > 1) rgi_buf_printf(b, ", %d head groups", g->groups);
  rgi_buf_printf(b, "\n");
  write_capacity(plan, b);
  write_nodes(plan, b);
  rgi_report_ranks(plan, b);
  if (plan->cuda) rgi_report_kernels(plan, b);
  if (plan->choice) rgi_choice_text(plan->choice, b); /* why */
  write_bytes(plan, b);
  rgi_fold_lines(b);
}

/* ---- steps ---- */

static void write_place(const rg_plan *plan, rgi_place at, rgi_buf *b) {
  switch (at.bind) {
  case RGI_AT_NOTHING: rgi_buf_printf(b, "-"); return;
  case RGI_AT_SAVED: rgi_buf_printf(b, "saved+%lld", (long long)at.offset); return;
  case RGI_AT_HOST: rgi_buf_printf(b, "host+%lld", (long long)at.offset); return;
  case RGI_AT_SCRATCH: rgi_buf_printf(b, "scratch+%lld", (long long)at.offset); return;
  default: break;
  }
  const rg_tensor_info *t = &plan->bindable[at.bind].info;
  rgi_buf_printf(b, "%s:%s", rgi_role_key(t->role), t->name);
  if (at.offset) rgi_buf_printf(b, "+%lld", (long long)at.offset);
}

static void write_args(const rg_plan *plan, const rg_port *port, int nport, const int32_t *begin,
                       const rgi_place *place, rgi_buf *b) {
  for (int p = 0; p < nport; p++)
    for (int32_t i = begin[p]; i < begin[p + 1]; i++) {
      rgi_buf_printf(b, " %s=", port[p].name);
      write_place(plan, place[i], b);
    }
}

static void write_steps(const rg_plan *plan, rgi_buf *b) {
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *s = &plan->step[i];
    const rgi_node *n = &plan->graph->node[s->node];
    rgi_buf_printf(b, "%4d %s %s %s", i, n->backward ? "bwd" : "fwd", n->name, n->op->name);
    write_args(plan, n->op->in, n->op->nin, n->in_begin, s->place, b);
    rgi_buf_printf(b, " ->");
    write_args(plan, n->op->out, n->op->nout, n->out_begin, s->place + s->nin, b);
    if (s->workspace_size)
      rgi_buf_printf(b, " workspace=scratch+%lld:%lld", (long long)s->workspace,
                     (long long)s->workspace_size);
    rgi_buf_printf(b, "\n");
  }
}

/* ---- public ---- */

static void write_graph(const rg_plan *plan, rgi_buf *b) {
  rgi_dump_text(plan->graph, b);
}
static void write_svg(const rg_plan *plan, rgi_buf *b) {
  rgi_memory_svg(plan->graph, plan->memory, b);
}
static void write_timeline(const rg_plan *plan, rgi_buf *b) {
  rgi_memory_text(plan->graph, plan->memory, TIMELINE_COLUMNS, b);
}

/* "timeline:80": as wide as that; 0 if it is something else. */
static int timeline_columns(const char *format) {
  static const char name[] = "timeline:";
  int columns = 0;
  if (strncmp(format, name, sizeof name - 1) != 0) return 0;
  for (format += sizeof name - 1; *format >= '0' && *format <= '9' && columns < 1000; format++)
    columns = 10 * columns + *format - '0';
  return *format ? 0 : columns;
}

rg_status rg_plan_write(const rg_plan *plan, const char *format, rg_text *out, rg_error *e) {
  static const struct {
    const char *name;
    void (*write)(const rg_plan *, rgi_buf *);
  } formats[] = {{"text", write_text},         {"json", rgi_report_json}, {"dot", rgi_report_dot},
                 {"timeline", write_timeline}, {"svg", write_svg},        {"graph", write_graph},
                 {"steps", write_steps}};
  if (!out) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the out-pointer for the text is NULL");
  *out = (rg_text){0};
  if (!plan || !format)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the plan or the format is NULL");
  rgi_buf b;
  rgi_buf_init(&b, plan->ctx);
  for (int i = 0; i < RGI_COUNT(formats); i++)
    if (strcmp(format, formats[i].name) == 0) {
      formats[i].write(plan, &b);
      return rgi_buf_finish(&b, out, e);
    }
  const int columns = timeline_columns(format);
  if (columns >= LEAST_COLUMNS && columns <= MOST_COLUMNS) {
    rgi_memory_text(plan->graph, plan->memory, columns, &b);
    return rgi_buf_finish(&b, out, e);
  }
  return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                  "unknown format \"%s\"; expected text, json, dot, timeline, svg, graph or steps",
                  format);
}

RGI_NO_TAIL(rg_report_options, against);

rg_status rg_plan_report(const rg_plan *plan, const char *format, const rg_report_options *options,
                         rg_text *out, rg_error *e) {
  static const struct {
    const char *name;
    void (*write)(const rg_plan *, const rg_report_options *, rgi_buf *);
  } formats[] = {{"html", rgi_report_page}, {"trace", rgi_report_trace}};
  if (!out) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the out-pointer for the text is NULL");
  *out = (rg_text){0};
  if (!plan || !format)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the plan or the format is NULL");
  rg_report_options o;
  RGI_TRY(RGI_OPTIONS(rg_report_options, against, options, &o, e));
  if (o.step_ms && o.nstep != (size_t)plan->nstep)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%zu times were given for %d steps", o.nstep,
                    (int)plan->nstep);
  RGI_TRY(rgi_page_check(plan, &o, e));
  for (int i = 0; i < RGI_COUNT(formats); i++)
    if (strcmp(format, formats[i].name) == 0) {
      rgi_buf b;
      rgi_buf_init(&b, plan->ctx);
      formats[i].write(plan, &o, &b);
      return rgi_buf_finish(&b, out, e);
    }
  return rgi_fail(e, RG_E_USAGE, NULL, NULL, "unknown report \"%s\"; expected html or trace",
                  format);
}
