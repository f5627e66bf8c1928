/* report/json.c: a plan as JSON, for programs: `regraph schema plan` describes it.

   Keys keep their order and meaning within one "version"; times that differ from run to run stay
   out of it, so equal plans give equal text.
 */
#include "report.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { JSON_VERSION = 1 };

void rgi_json_number(rgi_buf *b, double x) {
  char text[40];
  snprintf(text, sizeof text, "%.6g", isfinite(x) ? x : 0.0);
  for (char *c = text; *c; c++)
    if (*c == ',') *c = '.';
  rgi_buf_printf(b, "%s", text);
}

const char *rgi_role_key(rg_role role) {
  static const char *const key[] = {"input", "output", "grad_in", "grad_out", "state"};
  return key[role];
}

static const char *kind_key(rg_node_kind kind) {
  static const char *const key[] = {"primal", "gradient", "clone", "glue"};
  return key[kind];
}

static void json_int(rgi_buf *b, const char *key, int64_t value) {
  rgi_buf_printf(b, "\"%s\": %lld, ", key, (long long)value);
}
static void json_bool(rgi_buf *b, const char *key, bool value) {
  rgi_buf_printf(b, "\"%s\": %s, ", key, value ? "true" : "false");
}
static void json_text(rgi_buf *b, const char *key, const char *value) {
  rgi_buf_printf(b, "\"%s\": ", key);
  rgi_buf_json(b, value);
  rgi_buf_printf(b, ", ");
}

static void json_shape(rgi_buf *b, int rank, const int64_t *dim) {
  rgi_buf_printf(b, "\"shape\": [");
  for (int a = 0; a < rank; a++) rgi_buf_printf(b, "%s%lld", a ? ", " : "", (long long)dim[a]);
  rgi_buf_printf(b, "]");
}
static void json_real(rgi_buf *b, const char *key, double value) {
  rgi_buf_printf(b, "\"%s\": ", key);
  rgi_json_number(b, value);
  rgi_buf_printf(b, ", ");
}

static void json_tensors(const rg_plan *plan, rgi_buf *b) {
  rgi_buf_printf(b, "  \"tensors\": [");
  for (int32_t i = 0; i < plan->nbindable; i++) {
    const rg_tensor_info *t = &plan->bindable[i].info;
    rgi_buf_printf(b, "%s\n    {", i ? "," : "");
    json_text(b, "name", t->name);
    json_text(b, "role", rgi_role_key(t->role));
    json_text(b, "dtype", rg_dtype_name(t->dtype));
    json_int(b, "bytes", t->bytes);
    json_bool(b, "accumulates", t->accumulates);
    json_shape(b, t->rank, t->dim);
    rgi_buf_printf(b, "}");
  }
  rgi_buf_printf(b, "],\n");
}

static void json_marks(rgi_buf *b, uint32_t marks) {
  const char *gap = "";
  rgi_buf_printf(b, "\"marks\": [");
  for (int k = 0; k < RGI_MARKS; k++) {
    if (!(marks >> k & 1)) continue;
    rgi_buf_printf(b, "%s\"%s\"", gap, rgi_mark_name(k));
    gap = ", ";
  }
  rgi_buf_printf(b, "]");
}

static void json_nodes(const rgi_flow *f, rgi_buf *b) {
  const rg_plan *plan = f->plan;
  rg_node_info n;
  rgi_buf_printf(b, "  \"nodes\": [");
  for (size_t i = 0; rg_plan_node(plan, i, &n) == RG_OK; i++) {
    rgi_buf_printf(b, "%s\n    {", i ? "," : "");
    json_text(b, "name", n.name);
    json_text(b, "op", n.op);
    if (n.spec_node) json_text(b, "spec_node", n.spec_node);
    json_text(b, "direction", n.backward ? "backward" : "forward");
    json_text(b, "kind", kind_key(n.kind));
    json_int(b, "group", n.group);
    json_bool(b, "step", n.step >= 0);
    json_int(b, "workspace_bytes", n.workspace);
    if (n.kernels) json_text(b, "kernels", n.kernels);
    json_real(b, "flops", n.flops);
    json_real(b, "bytes", n.bytes);
    json_real(b, "model_ms", n.model_ms);
    if (n.step >= 0) {
      json_real(b, "exps", n.exps);
      json_text(b, "dtype", rg_dtype_name(n.dtype));
      json_real(b, "roofline_ms", n.roofline_ms);
      if (plan->cuda) json_int(b, "lane", plan->lane[n.step]);
    }
    json_marks(b, f->marks[i]);
    rgi_buf_printf(b, "}");
  }
  rgi_buf_printf(b, "],\n");
}

/* One for each tensor: who makes it and who reads it. */
static void json_edges(const rgi_flow *f, rgi_buf *b) {
  const rgi_graph *g = f->plan->graph;
  const char *gap = "";
  rgi_buf_printf(b, "  \"edges\": [");
  for (int32_t t = 0; t < g->ntensor; t++) {
    const rgi_tensor *x = &g->tensor[t];
    int64_t dim[RG_MAX_RANK];
    const rg_tensor_info *bound = rgi_flow_bound(f->plan, t);
    for (int a = 0; a < x->rank; a++) dim[a] = x->dim[a].c;
    rgi_buf_printf(b, "%s\n    {", gap);
    gap = ",";
    json_text(b, "tensor", x->name);
    if (bound) {
      json_text(b, "role", rgi_role_key(bound->role));
      json_text(b, "bound_as", bound->name);
    }
    json_text(b, "dtype", rg_dtype_name(x->dtype));
    json_shape(b, x->rank, dim);
    rgi_buf_printf(b, ", ");
    json_int(b, "bytes", rgi_bytes(x));
    json_bool(b, "lengths", f->lengths[t]);
    if (x->base >= 0) json_text(b, "inside", g->tensor[x->base].name);
    json_int(b, "from", x->producer);
    rgi_buf_printf(b, "\"to\": [");
    for (int32_t k = f->begin[t]; k < f->begin[t + 1]; k++)
      rgi_buf_printf(b, "%s%d", k > f->begin[t] ? ", " : "", (int)f->reader[k]);
    rgi_buf_printf(b, "]}");
  }
  rgi_buf_printf(b, "],\n");
}

/* What to write into a policy for this very plan, ranks aside. */
static void json_policy(const rg_plan *plan, rgi_buf *b) {
  const rgi_choice *c = plan->choice;
  int again = 0, offloaded = 0;
  rgi_buf_printf(b, "  \"policy\": {\"regraph_policy\": 1, \"recompute\": [");
  for (int i = 0; c && i < c->nnode; i++)
    if (c->node[i].recomputed) {
      rgi_buf_printf(b, "%s", again++ ? ", " : "");
      rgi_buf_json(b, c->node[i].name);
    }
  rgi_buf_printf(b, "]");
  for (int i = 0; c && i < c->nnode; i++)
    if (c->node[i].offloaded) {
      rgi_buf_printf(b, "%s", offloaded++ ? ", " : ", \"nodes\": {");
      rgi_buf_json(b, c->node[i].name);
      rgi_buf_printf(b, ": \"offload\"");
    }
  if (offloaded) rgi_buf_printf(b, "}");
  if (plan->split_heads) rgi_buf_printf(b, ", \"split_heads\": %d", plan->split_heads);
  if (plan->split_kv) rgi_buf_printf(b, ", \"split_kv\": true");
  rgi_buf_printf(b, "},\n");
}

/* What the device can do at best, by the profile. */
static void json_rates(const rg_plan *plan, rgi_buf *b) {
  const rgi_profile *p = plan->profile;
  rgi_buf_printf(b, "  \"rates\": {\"matrix_gflops\": {");
  const char *gap = "";
  for (int d = 0; d < RG_DTYPE_COUNT; d++) {
    if (d == RG_I32) continue;
    rgi_buf_printf(b, "%s\"%s\": ", gap, rg_dtype_name((rg_dtype)d));
    rgi_json_number(b, p->matrix_gflops[d]);
    gap = ", ";
  }
  rgi_buf_printf(b, "}, ");
  json_real(b, "special_gops", p->special_gops);
  rgi_buf_printf(b, "\"bandwidth_gbs\": ");
  rgi_json_number(b, p->bandwidth_gbs);
  rgi_buf_printf(b, "},\n");
}

static void json_fusions(const rg_plan *plan, rgi_buf *b) {
  const rgi_fusions *f = plan->fusions;
  rgi_buf_printf(b, "  \"fuse\": ");
  if (!f) {
    rgi_buf_printf(b, "null,\n");
    return;
  }
  rgi_buf_printf(b, "{");
  if (f->fused) {
    json_int(b, "peak_before_bytes", f->peak_before);
    json_int(b, "peak_after_bytes", f->peak_after);
  }
  if (f->casts) json_int(b, "casts_taken_over", f->casts);
  if (plan->split_kv) json_int(b, "split_kv_nodes", f->split);
  rgi_buf_printf(b, "\"nodes\": [");
  for (int i = 0; i < f->count; i++) {
    const rgi_fusion *a = &f->at[i];
    rgi_buf_printf(b, "%s\n    {", i ? "," : "");
    json_text(b, "name", a->name);
    json_int(b, "nodes", a->nodes);
    if (a->why) json_text(b, "why_not", a->why);
    json_int(b, "parts", a->parts);
    json_int(b, "sums_handed_on", a->deltas);
    rgi_buf_printf(b, "\"bytes_before\": %lld, \"bytes_after\": %lld}", (long long)a->before,
                   (long long)a->after);
  }
  rgi_buf_printf(b, "]},\n");
}

static void json_memory(const rg_plan *plan, rgi_buf *b) {
  const rgi_graph *g = plan->graph;
  const rgi_memory *m = plan->memory;
  rgi_buf_printf(b, "  \"memory\": {");
  json_int(b, "no_reuse_bytes", m->no_reuse);
  json_int(b, "inplace_gain_bytes", m->inplace_gain);
  json_int(b, "forward_bound_bytes", m->forward_bound);
  json_int(b, "backward_bound_bytes", m->backward_bound);
  json_bool(b, "forward_optimal", m->forward_optimal);
  json_bool(b, "backward_optimal", m->backward_optimal);
  json_int(b, "nodes_explored", m->explored);
  rgi_buf_printf(b, "\"blocks\": [");
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *k = &m->block[i];
    rgi_buf_printf(b, "%s\n    {", i ? "," : "");
    if (k->tensor >= 0)
      json_text(b, "tensor", g->tensor[k->tensor].name);
    else
      json_text(b, "workspace_of", g->node[k->first].name);
    json_text(b, "region", rgi_region_name(k->region));
    json_int(b, "offset", k->address);
    json_int(b, "size", k->size);
    json_int(b, "first", k->first);
    if (k->shares >= 0 && m->block[k->shares].tensor >= 0)
      json_text(b, "in_place_of", g->tensor[m->block[k->shares].tensor].name);
    rgi_buf_printf(b, "\"last\": %d}", k->last);
  }
  rgi_buf_printf(b, "]}\n");
}

void rgi_report_json(const rg_plan *plan, rgi_buf *b) {
  const rg_sizes *z = &plan->sizes;
  rgi_flow f;
  if (!rgi_flow_open(&f, plan)) {
    rgi_flow_close(&f);
    b->failed = true;
    return;
  }
  double forward = 0, backward = 0;
  for (int32_t i = 0; i < plan->nstep; i++)
    if (!rgi_is_copy(plan->graph, plan->step[i].node))
      *(i < plan->nforward ? &forward : &backward) += plan->step[i].ms;
  forward += plan->offload_ms[0];
  backward += plan->offload_ms[1];
  rgi_buf_printf(b, "{\n  \"version\": %d,\n  ", JSON_VERSION);
  json_text(b, "name", plan->graph->name);
  json_text(b, "device", plan->cuda ? "cuda" : "cpu");
  json_text(b, "profile", plan->profile->name);
  char times[RGI_TIMES];
  rgi_report_times(plan, times, sizeof times);
  json_text(b, "times", times);
  json_int(b, "threads", plan->threads);
  json_int(b, "head_groups", plan->graph->groups);
  rgi_buf_printf(b, "\"capacity\": {");
  for (int i = 0; i < plan->nfree; i++) {
    rgi_buf_printf(b, "%s", i ? ", " : "");
    rgi_buf_json(b, plan->free_name[i]);
    rgi_buf_printf(b, ": %lld", (long long)plan->free_value[i]);
  }
  rgi_buf_printf(b, "},");
  rgi_buf_printf(b, "\n  ");
  json_int(b, "predicted_peak_bytes", z->predicted_peak);
  json_int(b, "saved_bytes", z->saved);
  json_int(b, "scratch_bytes", z->scratch);
  if (z->comm) json_int(b, "comm_bytes", z->comm);
  if (z->host) json_int(b, "host_bytes", z->host);
  json_int(b, "forward_scratch_bytes", z->forward_scratch);
  json_int(b, "backward_scratch_bytes", z->backward_scratch);
  json_int(b, "lower_bound_bytes", z->lower_bound);
  json_int(b, "gap_bytes", z->predicted_peak - z->lower_bound);
  rgi_buf_printf(b, "\n  \"forward_model_ms\": ");
  rgi_json_number(b, forward);
  rgi_buf_printf(b, ", \"backward_model_ms\": ");
  rgi_json_number(b, backward);
  if (z->host) {
    rgi_buf_printf(b, ", \"offload_model_ms\": ");
    rgi_json_number(b, plan->offload_ms[0] + plan->offload_ms[1]);
  }
  rgi_buf_printf(b, ",\n");
  rgi_report_ranks_json(plan, b);
  json_tensors(plan, b);
  json_nodes(&f, b);
  json_edges(&f, b);
  json_rates(plan, b);
  json_policy(plan, b);
  json_fusions(plan, b);
  rgi_buf_printf(b, "  \"recompute\": ");
  if (plan->choice)
    rgi_choice_json(plan->choice, b);
  else
    rgi_buf_printf(b, "null");
  rgi_buf_printf(b, ",\n");
  json_memory(plan, b);
  rgi_buf_printf(b, "}\n");
  rgi_flow_close(&f);
}
