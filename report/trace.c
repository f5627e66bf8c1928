/* report/trace.c: a plan's steps on a time axis, as trace events for Perfetto and chrome://tracing
   (`regraph schema trace` describes what of that format is used).

   Two processes at most, one of times that were measured and one of the model's, each with a
   thread per lane: a CPU has one, a GPU one for each chain of steps, and collectives and copies to
   the host have theirs. Measured steps ran one by one. On a GPU the model's begin as soon as what
   they wait for is over, which arrows show: so nothing can run earlier, but steps side by side do
   take longer than alone. A third process has the memory: bytes alive as counters, and under them
   how long each block lives, in the time of the first process.
 */
#include "report.h"

#include <stdio.h>

enum { MEMORY = 1, STEPS = 2 }; /* processes; the model's is the one after */
enum { COLLECTIVES = 100000, COPIES };

typedef struct trace {
  rgi_flow f;
  const rg_plan *plan;
  rgi_buf *b;
  double *begin, *end; /* per step, microseconds */
  const char *gap;
} trace;

static void open_event(trace *t, const char *phase, int process, int thread) {
  rgi_buf_printf(t->b, "%s\n  {\"ph\": \"%s\", \"pid\": %d, \"tid\": %d", t->gap, phase, process,
                 thread);
  t->gap = ",";
}
static void add_text(trace *t, const char *key, const char *text) {
  rgi_buf_printf(t->b, ", \"%s\": ", key);
  rgi_buf_json(t->b, text);
}
static void add_number(trace *t, const char *key, double x) {
  rgi_buf_printf(t->b, ", \"%s\": ", key);
  rgi_json_number(t->b, x);
}
/* Whole nanoseconds: six digits are too few for where a step stands in a long run. */
static void add_time(trace *t, const char *key, double us) {
  const long long ns = (long long)(us * 1e3 + 0.5);
  rgi_buf_printf(t->b, ", \"%s\": %lld.%03d", key, ns / 1000, (int)(ns % 1000));
}

static void name(trace *t, const char *what, int process, int thread, const char *text) {
  open_event(t, "M", process, thread);
  rgi_buf_printf(t->b, ", \"name\": \"%s\", \"args\": {\"name\": ", what);
  rgi_buf_json(t->b, text);
  rgi_buf_printf(t->b, "}}");
}

static int thread_of(const trace *t, int32_t i) {
  const rg_plan *plan = t->plan;
  const rgi_graph *g = plan->graph;
  const rgi_node *n = &g->node[plan->step[i].node];
  if (n->op->flags & RG_OP_COMM) return COLLECTIVES;
  for (int k = 0; k < rgi_nin(n); k++)
    if (n->in[k] >= 0 && g->tensor[rgi_owner(g, n->in[k])].host) return COPIES;
  for (int k = 0; k < rgi_nout(n); k++)
    if (n->out[k] >= 0 && g->tensor[rgi_owner(g, n->out[k])].host) return COPIES;
  return plan->cuda ? plan->lane[i] : 0;
}

/* Lanes of a direction are numbered as they begin. */
static void name_threads(trace *t, int process) {
  int lanes = 0;
  bool collectives = false, copies = false;
  for (int32_t i = 0; i < t->plan->nstep; i++) {
    const int thread = thread_of(t, i);
    collectives |= thread == COLLECTIVES;
    copies |= thread == COPIES;
    if (thread < COLLECTIVES && thread >= lanes) lanes = thread + 1;
  }
  for (int i = 0; i < lanes; i++) {
    char text[32] = "steps";
    if (t->plan->cuda) snprintf(text, sizeof text, "lane %d", i);
    name(t, "thread_name", process, i, text);
  }
  if (collectives) name(t, "thread_name", process, COLLECTIVES, "collectives");
  if (copies) name(t, "thread_name", process, COPIES, "copies to the host and back");
}

/* When steps run: one by one, or, `lanes`, each when what it waits for is over; the backward after
 * the forward. */
static void place_steps(trace *t, const double *ms, bool lanes) {
  const rg_plan *plan = t->plan;
  double over = 0, turn = 0;
  for (int32_t i = 0; i < plan->nstep; i++) {
    if (i == plan->nforward) turn = over;
    t->begin[i] = lanes ? turn : over;
    for (const int32_t *p = lanes ? plan->after[i] : NULL; p && *p >= 0; p++)
      if (t->end[*p] > t->begin[i]) t->begin[i] = t->end[*p];
    t->end[i] = t->begin[i] + 1e3 * (ms ? ms[i] : plan->step[i].ms);
    if (t->end[i] > over) over = t->end[i];
  }
}

static void write_step(trace *t, int32_t i, int process) {
  const rgi_step *s = &t->plan->step[i];
  rg_node_info n;
  if (rg_plan_node(t->plan, (size_t)s->node, &n) != RG_OK) return;
  open_event(t, "X", process, thread_of(t, i));
  add_text(t, "name", n.name);
  add_text(t, "cat", n.backward ? "backward" : "forward");
  add_time(t, "ts", t->begin[i]);
  add_time(t, "dur", t->end[i] - t->begin[i]);
  rgi_buf_printf(t->b, ", \"args\": {\"step\": %d", (int)i);
  add_text(t, "op", n.op);
  if (n.kernels) add_text(t, "kernels", n.kernels);
  add_number(t, "flops", n.flops);
  add_number(t, "bytes", n.bytes);
  add_number(t, "model_ms", n.model_ms);
  add_number(t, "roofline_ms", n.roofline_ms);
  for (int k = 0; k < RGI_MARKS; k++)
    if (t->f.marks[s->node] >> k & 1) rgi_buf_printf(t->b, ", \"%s\": true", rgi_mark_name(k));
  rgi_buf_printf(t->b, "}}");
}

/* An arrow from the end of one step to the beginning of another on a lane of its own. */
static void write_wait(trace *t, int32_t from, int32_t to, int process, int id) {
  open_event(t, "s", process, thread_of(t, from));
  rgi_buf_printf(t->b, ", \"name\": \"waits\", \"cat\": \"waits\", \"id\": %d", id);
  add_time(t, "ts", t->end[from]);
  rgi_buf_printf(t->b, "}");
  open_event(t, "f", process, thread_of(t, to));
  rgi_buf_printf(t->b, ", \"bp\": \"e\", \"name\": \"waits\", \"cat\": \"waits\", \"id\": %d", id);
  add_time(t, "ts", t->begin[to]);
  rgi_buf_printf(t->b, "}");
}

static void write_process(trace *t, int process, const char *title, bool waits) {
  int id = 0;
  name(t, "process_name", process, 0, title);
  name_threads(t, process);
  for (int32_t i = 0; i < t->plan->nstep; i++) {
    write_step(t, i, process);
    for (const int32_t *p = waits ? t->plan->after[i] : NULL; p && *p >= 0; p++)
      if (thread_of(t, *p) != thread_of(t, i)) write_wait(t, *p, i, process, id++);
  }
}

/* ---- memory ---- */

/* The first step at node n or behind it, and the last at it or before. */
static int32_t step_from(const trace *t, int32_t node) {
  while (node < t->plan->graph->nnode && t->f.step[node] < 0) node++;
  return node < t->plan->graph->nnode ? t->f.step[node] : t->plan->nstep - 1;
}
static int32_t step_until(const trace *t, int32_t node) {
  while (node > 0 && t->f.step[node] < 0) node--;
  return t->f.step[node] < 0 ? 0 : t->f.step[node];
}

/* Bytes of a region that are alive at a step; where one block takes over another's, once. */
static int64_t alive(const rg_plan *plan, rgi_region region, int32_t node) {
  int64_t sum = 0;
  for (int32_t i = 0; i < plan->memory->nblock; i++) {
    const rgi_block *b = &plan->memory->block[i];
    if (b->region == region && b->first <= node && node <= b->last &&
        !(b->shares >= 0 && b->first == node))
      sum += b->size;
  }
  return sum;
}

static void write_memory(trace *t) {
  const rg_plan *plan = t->plan;
  const rgi_graph *g = plan->graph;
  name(t, "process_name", MEMORY, 0, "memory");
  for (int32_t i = 0; i < plan->nstep; i++) {
    open_event(t, "C", MEMORY, 0);
    rgi_buf_printf(t->b, ", \"name\": \"bytes alive\"");
    add_time(t, "ts", t->begin[i]);
    rgi_buf_printf(t->b, ", \"args\": {\"saved\": %lld, \"scratch\": %lld}}",
                   (long long)alive(plan, RGI_R_SAVED, plan->step[i].node),
                   (long long)alive(plan, RGI_R_SCRATCH, plan->step[i].node));
  }
  for (int32_t k = 0; k < plan->memory->nblock; k++) {
    const rgi_block *b = &plan->memory->block[k];
    const int32_t first = step_from(t, b->first), last = step_until(t, b->last);
    for (int end = 0; end < 2 && last >= first; end++) {
      open_event(t, end ? "e" : "b", MEMORY, 0);
      add_text(t, "name", b->tensor < 0 ? g->node[b->first].name : g->tensor[b->tensor].name);
      rgi_buf_printf(t->b, ", \"cat\": \"%s\", \"id\": %d",
                     b->tensor < 0 ? "workspace" : rgi_region_name(b->region), (int)k);
      add_time(t, "ts", end ? t->end[last] : t->begin[first]);
      if (!end)
        rgi_buf_printf(t->b, ", \"args\": {\"bytes\": %lld, \"offset\": %lld}", (long long)b->size,
                       (long long)b->address);
      rgi_buf_printf(t->b, "}");
    }
  }
}

static void write_all(trace *t, const rg_report_options *o) {
  const rg_plan *plan = t->plan;
  rgi_buf_printf(t->b, "{\"displayTimeUnit\": \"ms\", \"otherData\": {\"name\": ");
  rgi_buf_json(t->b, plan->graph->name);
  add_text(t, "device", plan->cuda ? "cuda" : "cpu");
  add_text(t, "profile", plan->profile->name);
  char times[RGI_TIMES];
  rgi_report_times(plan, times, sizeof times);
  add_text(t, "times", times);
  rgi_buf_printf(t->b, ", \"predicted_peak_bytes\": %lld", (long long)plan->sizes.predicted_peak);
  rgi_buf_printf(t->b, "},\n \"traceEvents\": [");
  if (o->step_ms) {
    place_steps(t, o->step_ms, false);
    write_process(t, STEPS, "measured, step by step", false);
    write_memory(t);
  }
  place_steps(t, NULL, plan->cuda);
  write_process(t, o->step_ms ? STEPS + 1 : STEPS, "modelled", plan->cuda);
  if (!o->step_ms) write_memory(t);
  rgi_buf_printf(t->b, "]}\n");
}

void rgi_report_trace(const rg_plan *plan, const rg_report_options *o, rgi_buf *b) {
  trace t = {.plan = plan, .b = b, .gap = ""};
  const size_t n = (size_t)plan->nstep + 1;
  const bool open = rgi_flow_open(&t.f, plan);
  t.begin = rgi_malloc(plan->ctx, n * sizeof *t.begin);
  t.end = rgi_malloc(plan->ctx, n * sizeof *t.end);
  if (open && t.begin && t.end)
    write_all(&t, o);
  else
    b->failed = true;
  rgi_free(plan->ctx, t.begin);
  rgi_free(plan->ctx, t.end);
  rgi_flow_close(&t.f);
}
