/* recompute/model.c: what a choice costs: cheap lower bounds for the search, memplan's verdict for
   the decision.

   The bound. Saved memory of a choice is exact: an owner is saved if its node is kept and a
   backward node, or a clone that is needed, reads it. Scratch is at least, at every backward node,
   the gradients alive there (they do not depend on the choice) plus the recomputed values that the
   node reads; and never less than with everything kept.
 */
#include "search.h"
#include <string.h>

typedef struct builder {
  rgi_model *m;
  const rgi_graph *g;
  int *candidate_of; /* origin → candidate, -1 */
  int *value_of;     /* owner → value, -1 */
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

/* The value behind forward tensor t (made on first sight), or -1: an input, an
 * output or a gradient; -2 on NOMEM. */
static int value_behind(builder *b, int t) {
  const rgi_graph *g = b->g;
  int owner = rgi_owner(g, t), p = g->tensor[owner].producer;
  if (p < 0 || g->node[p].backward || b->is_output[owner]) return -1;
  if (b->value_of[owner] < 0) {
    b->value_of[owner] = b->m->nvalue;
    rgi_value *v = &b->m->value[b->m->nvalue++];
    *v = (rgi_value){.bytes = rgi_bytes(&g->tensor[owner]),
                     .candidate = maker(b, t),
                     .readers = rgi_model_set(b->m)};
    if (!v->readers) return -2;
  }
  return b->value_of[owner];
}

/* Spec nodes whose clone backward, or another candidate's clone, could read. */
static void find_candidates(builder *b, bool *origin_is) {
  const rgi_graph *g = b->g;
  bool *read = rgi_alloc_n(b->m->arena, (size_t)g->ntensor, sizeof *read);
  if (!read) return; /* noticed by the caller through the next allocation */
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
}

static rg_status measure_base(builder *b, int64_t *base, rg_error *e) {
  /* bytes of backward's own owners alive at each node; an op that may work in place frees before it
   * takes */
  const rgi_graph *g = b->g;
  int *first = rgi_alloc_n(b->m->arena, (size_t)g->ntensor, sizeof *first);
  int *last = rgi_alloc_n(b->m->arena, (size_t)g->ntensor, sizeof *last);
  bool *kept_out = rgi_alloc_n(b->m->arena, (size_t)g->ntensor, sizeof *kept_out);
  if (!first || !last || !kept_out) return rgi_nomem(e);
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].grad >= 0) kept_out[rgi_owner(g, g->input[i].grad)] = true;
  for (int t = 0; t < g->ntensor; t++) first[t] = -1;
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    if (!node->backward || is_view(node)) continue;
    for (int i = 0; i < rgi_nout(node); i++) {
      if (node->out[i] < 0) continue;
      int owner = rgi_owner(g, node->out[i]);
      int from = node->op->flags & RG_OP_INPLACE ? n + 1 : n;
      if (first[owner] < 0) first[owner] = from;
      if (n > last[owner]) last[owner] = n;
    }
    for (int i = 0; i < rgi_nin(node); i++)
      if (node->in[i] >= 0) last[rgi_owner(g, node->in[i])] = n;
  }
  for (int t = 0; t < g->ntensor; t++) {
    if (first[t] < 0 || kept_out[t] || g->tensor[t].producer < 0) continue;
    for (int n = first[t]; n <= last[t] && n < g->nnode; n++) base[n] += rgi_bytes(&g->tensor[t]);
  }
  return RG_OK;
}

static rg_status build(builder *b, rg_error *e) {
  rgi_model *m = b->m;
  const rgi_graph *g = b->g;
  size_t nt = (size_t)g->ntensor + 1, no = (size_t)g->norigin + 1;
  bool *origin_is = rgi_alloc_n(m->arena, no, sizeof *origin_is);
  b->candidate_of = rgi_alloc_n(m->arena, no, sizeof(int));
  b->value_of = rgi_alloc_n(m->arena, nt, sizeof(int));
  b->is_output = rgi_alloc_n(m->arena, nt, sizeof(bool));
  m->value = rgi_alloc_n(m->arena, nt, sizeof *m->value);
  m->moment = rgi_alloc_n(m->arena, (size_t)g->nnode + 1, sizeof *m->moment);
  m->origin = rgi_alloc_n(m->arena, no, sizeof *m->origin);
  m->ms = rgi_alloc_n(m->arena, no, sizeof *m->ms);
  m->kept_bytes = rgi_alloc_n(m->arena, no, sizeof *m->kept_bytes);
  int64_t *base = rgi_alloc_n(m->arena, (size_t)g->nnode + 1, sizeof *base);
  if (!origin_is || !b->candidate_of || !b->value_of || !b->is_output || !m->value || !m->moment ||
      !m->origin || !m->ms || !m->kept_bytes || !base)
    return rgi_nomem(e);
  for (int t = 0; t < g->ntensor; t++) b->value_of[t] = -1;
  for (int i = 0; i < g->noutput; i++) b->is_output[g->output[i].tensor] = true;
  find_candidates(b, origin_is);
  for (int o = 0; o < g->norigin; o++) {
    b->candidate_of[o] = -1;
    if (!origin_is[o]) continue;
    b->candidate_of[o] = m->ncandidate;
    m->origin[m->ncandidate++] = o;
  }
  m->words = rgi_words(m->ncandidate);
  m->feeds = rgi_alloc_n(m->arena, (size_t)m->ncandidate * (size_t)m->words, sizeof *m->feeds);
  m->wanted = rgi_model_set(m);
  if (!m->feeds || !m->wanted) return rgi_nomem(e);
  rgi_arena *scratch = rgi_arena_create(g->ctx);
  if (!scratch) return rgi_nomem(e);
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    int c = node->origin >= 0 && !node->backward && node->kind == RGI_PRIMAL
                ? b->candidate_of[node->origin]
                : -1;
    if (c < 0 || is_view(node)) continue;
    double ms;
    rg_status status = rgi_node_ms(g, n, m->profile, scratch, &ms, e);
    if (status != RG_OK) {
      rgi_arena_destroy(scratch);
      return status;
    }
    m->ms[c] += ms;
  }
  rgi_arena_destroy(scratch);
  RGI_TRY(measure_base(b, base, e));
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    if (is_view(node)) continue;
    int c = node->origin >= 0 && !node->backward ? b->candidate_of[node->origin] : -1;
    if (!node->backward && c < 0) continue;
    rgi_moment *moment = NULL;
    if (node->backward) {
      moment = &m->moment[m->nmoment++];
      moment->base = base[n];
      moment->reads = rgi_alloc_n(m->arena, (size_t)rgi_nin(node) + 1, sizeof *moment->reads);
      if (!moment->reads) return rgi_nomem(e);
    }
    for (int i = 0; i < rgi_nin(node); i++) {
      int v = node->in[i] < 0 ? -1 : value_behind(b, node->in[i]);
      if (v == -2) return rgi_nomem(e);
      if (v < 0) continue;
      int from = m->value[v].candidate;
      if (moment) {
        m->value[v].direct = true;
        bool known = false;
        for (int k = 0; k < moment->nreads; k++) known = known || moment->reads[k] == v;
        if (!known) moment->reads[moment->nreads++] = v;
        if (from >= 0) rgi_put(m->wanted, from);
      } else {
        rgi_put(m->value[v].readers, c);
        if (from >= 0 && from != c) rgi_put(&m->feeds[(size_t)c * (size_t)m->words], from);
      }
    }
  }
  for (int v = 0; v < m->nvalue; v++)
    if (m->value[v].candidate >= 0) m->kept_bytes[m->value[v].candidate] += m->value[v].bytes;
  return RG_OK;
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

bool rgi_model_needed(const rgi_model *m, const uint64_t *set, uint64_t *needed) {
  for (int w = 0; w < m->words; w++) needed[w] = set[w] & m->wanted[w];
  for (bool grew = true; grew;) {
    grew = false;
    for (int c = 0; c < m->ncandidate; c++)
      for (int w = 0; rgi_has(needed, c) && w < m->words; w++) {
        uint64_t more = m->feeds[(size_t)c * (size_t)m->words + (size_t)w] & set[w] & ~needed[w];
        needed[w] |= more;
        grew = grew || more;
      }
  }
  for (int w = 0; w < m->words; w++)
    if (needed[w] != set[w]) return false;
  return true;
}

void rgi_model_order(const rgi_model *m, int *order) {
  for (int i = 0; i < m->ncandidate; i++) { /* insertion sort, stable */
    int j = i;
    for (; j > 0; j--) {
      int before = order[j - 1];
      if (m->ms[before] * (double)m->kept_bytes[i] <= m->ms[i] * (double)m->kept_bytes[before])
        break;
      order[j] = before;
    }
    order[j] = i;
  }
}

int64_t rgi_model_saved(const rgi_model *m, const uint64_t *set) {
  int64_t saved = m->mem.reserved;
  for (int v = 0; v < m->nvalue; v++) {
    const rgi_value *x = &m->value[v];
    bool read = x->direct;
    for (int w = 0; w < m->words && !read; w++) read = x->readers[w] & set[w];
    if (read && !(x->candidate >= 0 && rgi_has(set, x->candidate))) saved += x->bytes;
  }
  return saved;
}

int64_t rgi_model_peak_bound(const rgi_model *m, const uint64_t *set) {
  int64_t most = 0;
  for (int i = 0; i < m->nmoment; i++) {
    int64_t alive = m->moment[i].base;
    for (int k = 0; k < m->moment[i].nreads; k++) {
      const rgi_value *x = &m->value[m->moment[i].reads[k]];
      if (x->candidate >= 0 && rgi_has(set, x->candidate)) alive += x->bytes;
    }
    if (alive > most) most = alive;
  }
  return rgi_model_saved(m, set) + most;
}

rg_status rgi_model_measure(const rgi_model *m, const uint64_t *set, int64_t limit, int64_t *saved,
                            int64_t *peak, double *ms, rg_error *e) {
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
  status = rgi_memory_peak(g, &m->mem, true, saved, &forward, &backward, e);
  if (status == RG_OK) {
    *peak = *saved + (forward > backward ? forward : backward);
    if (*peak <= limit) {
      status = rgi_memory_peak(g, &m->mem, false, saved, &forward, &backward, e);
      *peak = *saved + (forward > backward ? forward : backward);
    }
  }
  rgi_graph_destroy(g);
  return status;
}
