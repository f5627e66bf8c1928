/* report/dot.c: a plan for Graphviz: a box per step with its time, an arrow for what it hands on
   with shape and bytes; forward and backward in a frame each.

   Views run nothing and are drawn through; lengths go everywhere and are left out. On a GPU a
   colour is a lane, and a dotted arrow is a wait that no data asks for: bytes that are used again.
 */
#include "report.h"

#include <stdio.h>
#include <string.h>

typedef struct drawing {
  rgi_flow f;
  const rg_plan *plan;
  rgi_buf *b;
  int32_t *arrow; /* per step: the last step to which an arrow of it was drawn, or -1 */
} drawing;

/* What only lengths are made of, or made by, is no more to be seen than they are. */
static bool hidden(const drawing *d, int32_t step) {
  const rgi_node *n = &d->plan->graph->node[d->plan->step[step].node];
  for (int k = 0; k < rgi_nout(n); k++)
    if (n->out[k] < 0 || !d->f.lengths[n->out[k]]) return false;
  return rgi_nout(n) > 0;
}

static void write_box(const drawing *d, int32_t i) {
  static const char *const colour[] = {"#e0ecf8", "#fff2cc", "#e2f0d9",
                                       "#f8e0e0", "#e9e0f5", "#ddf0f0"};
  const rg_plan *plan = d->plan;
  const rgi_step *s = &plan->step[i];
  const rgi_node *n = &plan->graph->node[s->node];
  const char *path = rgi_plan_path(plan, i);
  const uint32_t marks = d->f.marks[s->node];
  const int lane = plan->cuda ? plan->lane[i] : n->kind == RGI_CLONE ? 1 : n->backward ? 3 : 0;
  rgi_buf_printf(d->b, "    s%d [label=\"%s\\n%s, %.4g ms%s%s", i, n->name, n->op->name, s->ms,
                 path ? "\\n" : "", path ? path : "");
  for (int k = 0; k < RGI_MARKS; k++)
    if (marks >> k & 1)
      rgi_buf_printf(d->b, "%s%s", marks & ((1u << k) - 1) ? ", " : "\\n", rgi_mark_name(k));
  if (plan->cuda) rgi_buf_printf(d->b, "\\nlane %d", lane);
  rgi_buf_printf(d->b, "\", fillcolor=\"%s\"%s];\n",
                 colour[lane % (int)(sizeof colour / sizeof *colour)],
                 n->kind == RGI_CLONE ? ", style=\"filled,dashed\"" : "");
}

static void write_label(const drawing *d, int32_t t) {
  const rgi_tensor *x = &d->plan->graph->tensor[t];
  char human[32];
  rgi_buf_printf(d->b, "%s\\n%s [", x->name, rg_dtype_name(x->dtype));
  for (int a = 0; a < x->rank; a++)
    rgi_buf_printf(d->b, "%s%lld", a ? ", " : "", (long long)x->dim[a].c);
  rgi_buf_printf(d->b, "]\\n%s", rg_human_bytes(rgi_bytes(x), human));
}

/* An arrow from whoever makes tensor t to step `to` (-1: to the caller, who knows it as `last`);
 * where a view makes it, from those who make what the view looks into. */
static void write_arrows(drawing *d, int32_t t, int32_t to, int32_t last) {
  const rgi_graph *g = d->plan->graph;
  const int32_t node = g->tensor[t].producer, step = node < 0 ? -1 : d->f.step[node];
  if (node >= 0 && step < 0) {
    for (int k = 0; k < rgi_nin(&g->node[node]); k++)
      if (g->node[node].in[k] >= 0 && !d->f.lengths[g->node[node].in[k]])
        write_arrows(d, g->node[node].in[k], to, last);
    return;
  }
  rgi_buf_printf(d->b, step < 0 ? "  t%d" : "  s%d", step < 0 ? (int)t : (int)step);
  rgi_buf_printf(d->b, to < 0 ? " -> t%d" : " -> s%d", to < 0 ? (int)last : (int)to);
  rgi_buf_printf(d->b, " [label=\"");
  write_label(d, t);
  rgi_buf_printf(d->b, "\"];\n");
  if (step >= 0 && to >= 0) d->arrow[step] = to;
}

static void write_direction(drawing *d, int32_t from, int32_t to, const char *name) {
  if (from == to) return;
  rgi_buf_printf(d->b, "  subgraph cluster_%s {\n    label=\"%s\";\n", name, name);
  for (int32_t i = from; i < to; i++)
    if (!hidden(d, i)) write_box(d, i);
  rgi_buf_printf(d->b, "  }\n");
}

/* What comes from the caller and what goes there. */
static void write_bound(const drawing *d, int32_t t) {
  const rg_tensor_info *bound = rgi_flow_bound(d->plan, t);
  if (!bound || d->f.lengths[t]) return;
  const bool gradient = bound->role == RG_GRAD_IN || bound->role == RG_GRAD_OUT;
  rgi_buf_printf(d->b, "  t%d [shape=ellipse, fillcolor=\"#ffffff\", label=\"%s%s\"];\n", (int)t,
                 gradient ? "gradient of " : "", bound->name);
}

static void draw(drawing *d) {
  const rg_plan *plan = d->plan;
  const rgi_graph *g = plan->graph;
  rgi_buf_printf(d->b, "digraph ");
  rgi_buf_json(d->b, g->name);
  rgi_buf_printf(d->b, " {\n  rankdir=LR;\n"
                       "  node [shape=box, style=filled, fontname=\"sans-serif\", fontsize=10];\n"
                       "  edge [fontname=\"sans-serif\", fontsize=8, color=\"#888888\"];\n");
  write_direction(d, 0, plan->nforward, "forward");
  write_direction(d, plan->nforward, plan->nstep, "backward");
  for (int32_t t = 0; t < g->ntensor; t++) write_bound(d, t);
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_node *n = &g->node[plan->step[i].node];
    if (hidden(d, i)) continue;
    for (int k = 0; k < rgi_nin(n); k++)
      if (n->in[k] >= 0 && !d->f.lengths[n->in[k]]) write_arrows(d, n->in[k], i, -1);
    for (const int32_t *p = plan->cuda ? plan->after[i] : NULL; p && *p >= 0; p++)
      if (d->arrow[*p] != i && !hidden(d, *p))
        rgi_buf_printf(d->b, "  s%d -> s%d [style=dotted];\n", (int)*p, (int)i);
  }
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].grad >= 0) write_arrows(d, g->input[i].grad, -1, g->input[i].grad);
  for (int i = 0; i < g->noutput; i++)
    write_arrows(d, g->output[i].tensor, -1, g->output[i].tensor);
  rgi_buf_printf(d->b, "}\n");
}

void rgi_report_dot(const rg_plan *plan, rgi_buf *b) {
  drawing d = {.plan = plan, .b = b};
  const bool open = rgi_flow_open(&d.f, plan);
  d.arrow = rgi_malloc(plan->ctx, ((size_t)plan->nstep + 1) * sizeof *d.arrow);
  if (open && d.arrow) {
    for (int32_t i = 0; i < plan->nstep; i++) d.arrow[i] = -1;
    draw(&d);
  } else {
    b->failed = true;
  }
  rgi_free(plan->ctx, d.arrow);
  rgi_flow_close(&d.f);
}
