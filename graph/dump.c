/* graph/dump.c: a graph as text (stable, for golden tests) and as Graphviz. */
#include "ir.h"
#include <stdio.h>

static void shape(const rgi_tensor *t, rgi_buf *out) {
  char axis[160];
  rgi_buf_printf(out, "%s[", rg_dtype_name(t->dtype));
  for (int i = 0; i < t->rank; i++)
    rgi_buf_printf(out, "%s%s", i ? ", " : "", rgi_dim_text(t->dim[i], axis, sizeof axis));
  rgi_buf_printf(out, "]");
}

static void attribute(const rg_attr *a, const rg_value *v, rgi_buf *out) {
  rgi_buf_printf(out, "%s=", a->name);
  switch (a->type) {
  case RG_ATTR_FLOAT: rgi_buf_printf(out, "%.9g", v->f); break;
  case RG_ATTR_BOOL: rgi_buf_printf(out, "%s", v->i ? "true" : "false"); break;
  case RG_ATTR_ENUM: rgi_buf_printf(out, "%s", a->choices[v->i]); break;
  case RG_ATTR_INTS:
    rgi_buf_printf(out, "[");
    for (int64_t i = 0; i < v->i; i++)
      rgi_buf_printf(out, "%s%lld", i ? ", " : "", (long long)v->list[i]);
    rgi_buf_printf(out, "]");
    break;
  case RG_ATTR_INT: rgi_buf_printf(out, "%lld", (long long)v->i); break;
  }
}

static void tensor(const rgi_graph *g, int t, rgi_buf *out) {
  const rgi_tensor *x = &g->tensor[t];
  rgi_buf_printf(out, "%s: ", x->name);
  shape(x, out);
  if (x->base >= 0)
    rgi_buf_printf(out, " in %s+%lld", g->tensor[x->base].name, (long long)x->offset);
  if (x->region != RGI_NOWHERE && x->base < 0) {
    rgi_buf_printf(out, " @%s", rgi_region_name(x->region));
    if (x->region == RGI_R_SAVED || x->region == RGI_R_SCRATCH)
      rgi_buf_printf(out, "+%lld", (long long)x->address);
  }
}

static void ports(const rgi_graph *g, const rg_port *port, int nport, const int32_t *begin,
                  const int32_t *ids, bool shapes, rgi_buf *out) {
  bool first = true;
  for (int p = 0; p < nport; p++) {
    bool any = false;
    for (int i = begin[p]; i < begin[p + 1]; i++) any = any || ids[i] >= 0;
    if (!any) continue;
    rgi_buf_printf(out, "%s%s=", first ? "" : ", ", port[p].name);
    first = false;
    bool list = port[p].flags & RG_PORT_LIST;
    if (list) rgi_buf_printf(out, "[");
    for (int i = begin[p]; i < begin[p + 1]; i++) {
      if (i > begin[p]) rgi_buf_printf(out, ", ");
      if (ids[i] < 0)
        rgi_buf_printf(out, "-");
      else if (shapes)
        tensor(g, ids[i], out);
      else
        rgi_buf_printf(out, "%s", g->tensor[ids[i]].name);
    }
    if (list) rgi_buf_printf(out, "]");
  }
}

void rgi_dump_text(const rgi_graph *g, rgi_buf *out) {
  rgi_buf_printf(out, "graph %s\n", g->name);
  for (int i = 0; i < g->ninput; i++) {
    rgi_buf_printf(out, g->input[i].state ? "state  " : "input  ");
    tensor(g, g->input[i].tensor, out);
    if (g->input[i].state) rgi_buf_printf(out, " next %s", g->tensor[g->input[i].next].name);
    if (g->input[i].want == RGI_GRAD_PLAIN) rgi_buf_printf(out, " grad");
    if (g->input[i].want == RGI_GRAD_ACCUMULATE) rgi_buf_printf(out, " grad accumulate");
    rgi_buf_printf(out, "\n");
  }
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    if (node->backward && (n == 0 || !g->node[n - 1].backward)) rgi_buf_printf(out, "backward\n");
    rgi_buf_printf(out, "%s = %s(", node->name, node->op->name);
    ports(g, node->op->in, node->op->nin, node->in_begin, node->in, false, out);
    rgi_buf_printf(out, ") {");
    bool first = true;
    for (int i = 0; i < node->op->nattr; i++) {
      if (!node->attr[i].set) continue;
      rgi_buf_printf(out, "%s", first ? "" : ", ");
      attribute(&node->op->attrs[i], &node->attr[i], out);
      first = false;
    }
    rgi_buf_printf(out, "}");
    if (node->after >= 0) rgi_buf_printf(out, " after %s", g->tensor[node->after].name);
    rgi_buf_printf(out, "\n    -> ");
    ports(g, node->op->out, node->op->nout, node->out_begin, node->out, true, out);
    rgi_buf_printf(out, "\n");
  }
  for (int i = 0; i < g->noutput; i++) {
    rgi_buf_printf(out, "output %s = %s", g->output[i].name, g->tensor[g->output[i].tensor].name);
    if (g->output[i].grad >= 0)
      rgi_buf_printf(out, " (gradient %s)", g->tensor[g->output[i].grad].name);
    rgi_buf_printf(out, "\n");
  }
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].grad >= 0)
      rgi_buf_printf(out, "gradient %s = %s\n", g->input[i].name, g->tensor[g->input[i].grad].name);
}

/* ---- Graphviz: nodes as boxes, tensors as edge labels; clones dashed, views grey ---- */

static void quoted(const char *text, rgi_buf *out) {
  rgi_buf_json(out, text);
}

void rgi_dump_dot(const rgi_graph *g, rgi_buf *out) {
  rgi_buf_printf(out, "digraph ");
  quoted(g->name, out);
  rgi_buf_printf(out,
                 " {\n  rankdir=LR;\n  node [shape=box, fontname=\"sans-serif\", fontsize=10];\n"
                 "  edge [fontname=\"sans-serif\", fontsize=8, color=\"#888888\"];\n");
  for (int i = 0; i < g->ninput; i++)
    rgi_buf_printf(out, "  t%d [shape=ellipse, label=\"%s\"];\n", g->input[i].tensor,
                   g->tensor[g->input[i].tensor].name);
  for (int i = 0; i < g->noutput; i++)
    if (g->output[i].grad >= 0)
      rgi_buf_printf(out, "  t%d [shape=ellipse, label=\"%s\"];\n", g->output[i].grad,
                     g->tensor[g->output[i].grad].name);
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    const char *style = node->kind == RGI_CLONE ? "style=\"filled,dashed\", fillcolor=\"#fff2cc\""
                        : node->op->flags & RG_OP_VIEW ? "style=dotted, fontcolor=\"#888888\""
                        : node->backward               ? "style=filled, fillcolor=\"#f8e0e0\""
                                                       : "style=filled, fillcolor=\"#e0ecf8\"";
    rgi_buf_printf(out, "  n%d [label=\"%s\\n%s\", %s];\n", n, node->name, node->op->name, style);
  }
  for (int n = 0; n < g->nnode; n++)
    for (int i = 0; i < rgi_nin(&g->node[n]); i++) {
      int t = g->node[n].in[i];
      if (t < 0) continue;
      if (g->tensor[t].producer >= 0)
        rgi_buf_printf(out, "  n%d -> n%d [label=\"%s\"];\n", g->tensor[t].producer, n,
                       g->tensor[t].name);
      else
        rgi_buf_printf(out, "  t%d -> n%d;\n", t, n);
    }
  for (int i = 0; i < g->noutput; i++)
    rgi_buf_printf(out, "  o%d [shape=ellipse, label=\"%s\"];\n  n%d -> o%d;\n", i,
                   g->output[i].name, g->tensor[g->output[i].tensor].producer, i);
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].grad >= 0 && g->tensor[g->input[i].grad].producer >= 0)
      rgi_buf_printf(out, "  g%d [shape=ellipse, label=\"gradient of %s\"];\n  n%d -> g%d;\n", i,
                     g->input[i].name, g->tensor[g->input[i].grad].producer, i);
  rgi_buf_printf(out, "}\n");
}
