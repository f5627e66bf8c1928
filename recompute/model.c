/* recompute/model.c: what may be chosen, what it costs, and memplan's verdict on a choice. */
#include "search.h"

typedef struct builder {
  rgi_model *m;
  const rgi_graph *g;
  int *candidate_of; /* origin → candidate, -1 */
  bool *is_output;   /* owner */
} builder;

static bool is_view(const rgi_node *n) {
  return n->op->flags & RG_OP_VIEW;
}

/* The candidate that makes t's bytes, through views; -1: none. */
static int maker(const builder *b, int t) {
  const rgi_graph *g = b->g;
  for (;;) {
    int p = g->tensor[t].producer;
    if (p < 0 || g->node[p].backward || b->is_output[rgi_owner(g, t)]) return -1;
    if (!is_view(&g->node[p]))
      return g->node[p].origin >= 0 ? b->candidate_of[g->node[p].origin] : -1;
    t = g->node[p].in[0];
  }
}

/* Spec nodes whose clone backward, or another candidate's clone, could read. */
static bool find_candidates(builder *b, bool *origin_is) {
  const rgi_graph *g = b->g;
  bool *read = rgi_alloc_n(b->m->arena, (size_t)g->ntensor, sizeof *read);
  if (!read) return false;
  for (int n = g->nnode - 1; n >= 0; n--) {
    const rgi_node *node = &g->node[n];
    bool reads = node->backward;
    if (!reads) {
      for (int i = 0; i < rgi_nout(node); i++) {
        int t = node->out[i];
        reads = reads || (t >= 0 && read[t] && !b->is_output[rgi_owner(g, t)]);
      }
      if (reads && !is_view(node)) {
        reads = rgi_repeatable(g, node);
        if (reads) origin_is[node->origin] = true;
      }
    }
    for (int i = 0; i < rgi_nin(node) && reads; i++)
      if (node->in[i] >= 0) read[node->in[i]] = true;
  }
  return true;
}

/* The bytes that backward, or a clone, reads of what each candidate makes. */
static rg_status find_bytes(builder *b, rg_error *e) {
  const rgi_graph *g = b->g;
  bool *known = rgi_alloc_n(b->m->arena, (size_t)g->ntensor + 1, sizeof *known);
  if (!known) return rgi_nomem(e);
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    if (is_view(node)) continue;
    if (!node->backward && (node->origin < 0 || b->candidate_of[node->origin] < 0)) continue;
    for (int i = 0; i < rgi_nin(node); i++) {
      const int t = node->in[i], owner = t < 0 ? -1 : rgi_owner(g, t), c = t < 0 ? -1 : maker(b, t);
      if (c < 0 || known[owner]) continue;
      known[owner] = true;
      b->m->kept_bytes[c] += rgi_bytes(&g->tensor[owner]);
    }
  }
  return RG_OK;
}

static rg_status find_times(builder *b, rg_error *e) {
  const rgi_graph *g = b->g;
  rgi_arena *scratch = rgi_arena_create(g->ctx);
  rg_status status = scratch ? RG_OK : rgi_nomem(e);
  for (int n = 0; n < g->nnode && status == RG_OK; n++) {
    const rgi_node *node = &g->node[n];
    double ms;
    status = rgi_node_ms(g, n, b->m->profile, scratch, &ms, e);
    if (status != RG_OK) break;
    /* a GPU's copies run beside the rest */
    if (!b->m->profile->cuda || !rgi_is_copy(g, n)) b->m->all_ms += ms;
    if (node->origin < 0 || node->backward || node->kind != RGI_PRIMAL || is_view(node)) continue;
    if (b->candidate_of[node->origin] >= 0) b->m->ms[b->candidate_of[node->origin]] += ms;
  }
  rgi_arena_destroy(scratch);
  return status;
}

static rg_status find_kinds(rgi_model *m, rg_error *e) {
  const rgi_origin *o = m->g->origin;
  const size_t n = (size_t)m->ncandidate + 1;
  m->kind = rgi_alloc_n(m->arena, n, sizeof *m->kind);
  m->op = rgi_alloc_n(m->arena, n, sizeof *m->op);
  int *first = rgi_alloc_n(m->arena, n, sizeof *first); /* of each kind */
  if (!m->kind || !m->op || !first) return rgi_nomem(e);
  for (int i = 0; i < m->ncandidate; i++) {
    int k = 0, p = 0;
    while (k < m->nkind && !rgi_alike(o[m->origin[i]].name, o[m->origin[first[k]]].name)) k++;
    while (p < i && o[m->origin[p]].op != o[m->origin[i]].op) p++;
    if (k == m->nkind) first[m->nkind++] = i;
    m->kind[i] = k;
    m->op[i] = p < i ? m->op[p] : m->nop++;
  }
  return RG_OK;
}

static rg_status build(builder *b, rg_error *e) {
  rgi_model *m = b->m;
  const rgi_graph *g = b->g;
  size_t no = (size_t)g->norigin + 1;
  bool *origin_is = rgi_alloc_n(m->arena, no, sizeof *origin_is);
  b->candidate_of = rgi_alloc_n(m->arena, no, sizeof(int));
  b->is_output = rgi_alloc_n(m->arena, (size_t)g->ntensor + 1, sizeof(bool));
  m->origin = rgi_alloc_n(m->arena, no, sizeof *m->origin);
  m->ms = rgi_alloc_n(m->arena, no, sizeof *m->ms);
  m->kept_bytes = rgi_alloc_n(m->arena, no, sizeof *m->kept_bytes);
  if (!origin_is || !b->candidate_of || !b->is_output || !m->origin || !m->ms || !m->kept_bytes)
    return rgi_nomem(e);
  for (int i = 0; i < g->noutput; i++) b->is_output[g->output[i].tensor] = true;
  if (!find_candidates(b, origin_is)) return rgi_nomem(e);
  for (int o = 0; o < g->norigin; o++) {
    b->candidate_of[o] = origin_is[o] ? m->ncandidate : -1;
    if (origin_is[o]) m->origin[m->ncandidate++] = o;
  }
  m->words = rgi_words(m->ncandidate);
  RGI_TRY(find_kinds(m, e));
  RGI_TRY(find_bytes(b, e));
  RGI_TRY(find_times(b, e));
  m->candidate_of = b->candidate_of;
  return rgi_replay_create(g, m->profile, &m->mem, b->candidate_of, m->ncandidate, m->arena,
                           &m->replay, e);
}

rg_status rgi_model_create(const rgi_graph *g, const rgi_profile *profile,
                           const rgi_memory_options *mem, rgi_model **out, rg_error *e) {
  *out = NULL;
  rgi_arena *a = rgi_arena_create(g->ctx);
  rgi_model *m = a ? rgi_alloc(a, sizeof *m) : NULL;
  if (!m) {
    rgi_arena_destroy(a);
    return rgi_nomem(e);
  }
  *m = (rgi_model){.arena = a, .g = g, .profile = profile, .mem = *mem};
  builder b = {.m = m, .g = g};
  rg_status status = build(&b, e);
  if (status != RG_OK) {
    rgi_arena_destroy(a);
    return status;
  }
  *out = m;
  return RG_OK;
}

void rgi_model_destroy(rgi_model *m) {
  if (m) rgi_arena_destroy(m->arena);
}

uint64_t *rgi_model_set(const rgi_model *m) {
  return rgi_alloc_n(m->arena, (size_t)m->words, sizeof(uint64_t));
}

double rgi_model_ms(const rgi_model *m, const uint64_t *set) {
  double ms = 0;
  for (int i = 0; i < m->ncandidate; i++)
    if (rgi_has(set, i)) ms += m->ms[i];
  return ms;
}

rg_status rgi_model_measure(rgi_model *m, const uint64_t *set, int64_t limit, bool enough,
                            int64_t *saved, int64_t *peak, double *ms, rg_error *e) {
  bool *chosen = rgi_malloc(m->g->ctx, (size_t)m->g->norigin + 1);
  if (!chosen) return rgi_nomem(e);
  memset(chosen, 0, (size_t)m->g->norigin + 1);
  for (int c = 0; c < m->ncandidate; c++)
    if (rgi_has(set, c)) chosen[m->origin[c]] = true;
  rgi_graph *g;
  rg_status status = rgi_rewrite(m->g, chosen, m->profile, &g, ms, e);
  rgi_free(m->g->ctx, chosen);
  RGI_TRY(status);
  int64_t forward, backward;
  rgi_memory_options mem = m->mem;
  int64_t ns = 0;
  mem.capacity = enough ? limit : 0;
  mem.taken = &ns;
  status = rgi_memory_peak(g, &mem, true, saved, &forward, &backward, e);
  if (status == RG_OK) {
    *peak = *saved + m->mem.comm + (forward > backward ? forward : backward);
    if (*peak <= limit && !mem.bound_only) {
      status = rgi_memory_peak(g, &mem, false, saved, &forward, &backward, e);
      *peak = *saved + m->mem.comm + (forward > backward ? forward : backward);
    }
  }
  m->spent += ns / 10;
  rgi_graph_destroy(g);
  return status;
}

rg_status rgi_chooser_ask(rgi_chooser *c, const uint64_t *set, int part, int64_t *over,
                          rg_error *e) {
  int64_t saved, peak;
  double ms;
  c->m->mem.part = part;
  const rg_status status =
      rgi_model_measure(c->m, set, c->of_saved ? -1 : c->budget, true, &saved, &peak, &ms, e);
  c->m->mem.part = 0;
  RGI_TRY(status);
  c->explored++;
  *over = (c->of_saved ? saved : peak) - c->budget;
  return RG_OK;
}

rg_status rgi_chooser_fits(rgi_chooser *c, const uint64_t *set, bool *yes, rg_error *e) {
  int64_t over;
  RGI_TRY(rgi_chooser_ask(c, set, 0, &over, e));
  *yes = over <= 0;
  return RG_OK;
}
