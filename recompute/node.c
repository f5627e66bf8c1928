/* recompute/node.c: what is asked of one node alone: may it be computed again, and how long does it
   take by the model?
 */
#include "search.h"

bool rgi_recomputable(const rgi_origin *o) {
  return o->op->flags & RG_OP_RECOMPUTABLE;
}

bool rgi_repeatable(const rgi_graph *g, const rgi_node *node) {
  if (node->origin < 0 || node->kind != RGI_PRIMAL || !rgi_recomputable(&g->origin[node->origin]))
    return false;
  for (int i = 0; i < rgi_nout(node); i++)
    if (node->out[i] >= 0 && g->tensor[node->out[i]].dtype == RG_I32)
      for (int t = 0; t < g->ntensor; t++)
        if (g->tensor[t].seqlens == node->out[i]) return false;
  return true;
}

int rgi_brings_back(const rgi_graph *g, int n) {
  if (!rgi_is_copy(g, n) || !g->node[n].backward) return -1;
  const int from = g->tensor[g->node[n].in[0]].producer;
  const int t = from < 0 ? -1 : g->node[from].in[0];
  return t >= 0 && g->tensor[t].base < 0 ? t : -1;
}

rg_status rgi_node_ms(const rgi_graph *g, int n, const rgi_profile *profile, rgi_arena *a,
                      double *ms, rg_error *e) {
  const rgi_node *node = &g->node[n];
  *ms = 0;
  if (node->op->flags & RG_OP_VIEW) return RG_OK;
  rg_call call;
  RGI_TRY(rgi_node_call(g, n, a, &call, e));
  call.gpu = profile->cuda ? &profile->gpu : NULL;
  rgi_modelled m;
  rgi_model_call(profile, &call, &m);
  *ms = m.ms;
  return RG_OK;
}
